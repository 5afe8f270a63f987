"""Several widths in one checkpoint: other tools find each layer's own grid."""

import json
import re

import pytest
import torch

from test_quantized_formats import quantize, unpack_dense, weights  # noqa: F401

IMPORTANCE = ("--low-bits", 2, "--average-bits", 3, "--layer-score", "lim")
BUDGET = ("--budget", "4.6bpw")


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("extra", [IMPORTANCE, BUDGET], ids=["importance", "budget"])
def test_config_groups_load_in_transformers(quantize, strata_logits, method, extra):  # noqa: F811
    from transformers import AutoModelForCausalLM

    packed = quantize(method, "compressed-tensors", 4, 32, *extra)
    plain = weights(quantize(method, "dequantized", 4, 32, *extra))
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert len(groups) > 1 and len({g["weights"]["num_bits"] for g in groups}) == len(groups)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    ids = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(ids).logits
    assert (theirs - strata_logits(packed, ids.tolist())).abs().max() < 1e-3
    seen = 0
    for name, module in model.named_modules():
        if name.endswith("_proj") and hasattr(module, "weight"):
            mine = plain[name + ".weight"].float()
            assert torch.allclose(module.weight.float(), mine, rtol=1e-3, atol=1e-6), name
            seen += 1
    assert seen == 14


def dynamic(config, module):
    """The grid of a module as GPTQModel looks it up: the first expression that matches decides."""
    for pattern, grid in config.get("dynamic", {}).items():
        if pattern.startswith("-:"):
            if re.match(pattern[2:], module):
                return None
        elif re.match(pattern.removeprefix("+:"), module):
            return {**config, **grid}
    return config


@pytest.mark.parametrize("extra", [IMPORTANCE, BUDGET], ids=["importance", "budget"])
def test_gptq_dynamic_names_every_layer_and_no_other(quantize, extra):  # noqa: F811
    packed = quantize("gptq", "gptq-v2", 4, 32, *extra)
    tensors = weights(packed)
    plain = weights(quantize("gptq", "dequantized", 4, 32, *extra))
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["dynamic"]
    schedule = json.loads((packed / "schedule.json").read_text())
    # Both jobs decide alike unless a width is missing from a format.
    if extra is IMPORTANCE:
        assert len(schedule["bits"]) == 2
    for layer in schedule["layers"]:
        module = layer["module"]
        grid = dynamic(config, module)
        assert (grid["bits"], grid["group_size"]) == (layer["bits"], layer["group_size"]), module
        out, width = plain[module + ".weight"].shape
        q = unpack_dense(tensors[module + ".qweight"].numpy(), grid["bits"], width)
        assert q.shape == (width, out) and q.max() < 2 ** grid["bits"]
        # Names that only begin or end alike are other layers.
        for other in (module.replace("layers.", "layers.1"), "x" + module):
            assert dynamic(config, other)["bits"] == config["bits"], other
