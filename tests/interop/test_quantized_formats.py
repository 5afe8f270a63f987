"""Other tools read the quantised checkpoints that Strata writes, and see the same numbers.

compressed-tensors is loaded with transformers. The AutoAWQ and GPTQ loaders need a GPU, so their
layouts are unpacked here, independently of Strata, from the layouts' descriptions.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

METHODS = ["rtn", "gptq", "awq"]


def weights(path):
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


@pytest.fixture(scope="module")
def quantize(strata, tiny_llama, tmp_path_factory):
    made = {}

    def run(method, fmt, bits=4, group=32, *extra):
        key = (method, fmt, bits, group, extra)
        if key not in made:
            out = tmp_path_factory.mktemp("quantized") / "model"
            strata(
                "quantize", tiny_llama, "--method", method, "--bits", bits, "--group-size", group,
                "--calibration", tiny_llama / "calibration.json", "--samples", 8,
                "--sequence-length", 64, "--format", fmt, "--no-evaluate", "--out", out, *extra,
            )
            made[key] = out
        return made[key]

    return run


def linear_modules(tensors):
    return sorted(n[: -len(".weight")] for n in tensors if n.endswith("_proj.weight"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("extra", [(), ("--symmetric",)], ids=["asymmetric", "symmetric"])
def test_compressed_tensors_loads_in_transformers(quantize, strata_logits, method, extra):
    from transformers import AutoModelForCausalLM

    packed = quantize(method, "compressed-tensors", 4, 32, *extra)
    plain = weights(quantize(method, "dequantized", 4, 32, *extra))
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    ids = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(ids).logits
    ours = strata_logits(packed, ids.tolist())
    assert (theirs - ours).abs().max() < 1e-3
    seen = 0
    for name, module in model.named_modules():
        if name.endswith("_proj") and hasattr(module, "weight"):
            mine = plain[name + ".weight"].float()
            # The plain checkpoint rounds grid values to half precision.
            assert torch.allclose(module.weight.float(), mine, rtol=1e-3, atol=1e-6), name
            seen += 1
    assert seen == 14


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_other_widths(quantize, strata_logits, bits):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    packed = quantize("rtn", "compressed-tensors", bits)
    tensors, plain = weights(packed), weights(quantize("rtn", "dequantized", bits))
    for module in linear_modules(plain):
        shape = torch.Size(tensors[module + ".weight_shape"].tolist())
        codes = unpack_from_int32(tensors[module + ".weight_packed"], bits, shape).float()
        scale = tensors[module + ".weight_scale"].float()
        groups = scale.shape[1]
        zero = unpack_from_int32(
            tensors[module + ".weight_zero_point"], bits, torch.Size([shape[0], groups]),
            packed_dim=0,
        ).float()
        width = shape[1] // groups
        value = (codes - zero.repeat_interleave(width, 1)) * scale.repeat_interleave(width, 1)
        assert torch.equal(value.half(), plain[module + ".weight"]), module


@pytest.mark.parametrize("group", [0, 32], ids=["channel", "group"])
@pytest.mark.parametrize("extra", [(), ("--symmetric",)], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_compressed_tensors_of_every_grid_load(quantize, strata_logits, bits, extra, group):
    from transformers import AutoModelForCausalLM

    packed = quantize("rtn", "compressed-tensors", bits, group, *extra)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    ids = torch.randint(3, 512, (1, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = model(ids).logits
    assert (theirs - strata_logits(packed, ids.tolist())).abs().max() < 1e-3


def test_compressed_tensors_with_several_grids_load(strata, strata_logits, tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe, out = tmp_path / "mixed.yaml", tmp_path / "mixed"
    recipe.write_text(
        f"""
model: {tiny_llama}
stages:
  - quantize:
      method: rtn
      bits: 4
      group_size: 32
      exclude: ["*.layers.1.self_attn.o_proj"]
      overrides:
        - {{ pattern: "*.down_proj", bits: 8, group_size: 64, symmetric: true }}
        - {{ pattern: "*.layers.0.self_attn.*", bits: 3, group_size: 0 }}
      measure: {{ skip: true }}
      out: {out}
"""
    )
    strata("run", recipe)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.randint(3, 512, (1, 24), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        theirs = model(ids).logits
    assert (theirs - strata_logits(out, ids.tolist())).abs().max() < 1e-3


@pytest.mark.parametrize("to", ["compressed-tensors", "awq", "gptq-v2", "strata"])
def test_converted_codes_compute_the_same(quantize, strata, strata_logits, tmp_path, to):
    packed = quantize("gptq", "gptq-v2")
    strata("convert", packed, "--to", to, "--out", tmp_path / "out")
    ids = torch.randint(3, 512, (1, 40), generator=torch.Generator().manual_seed(7)).tolist()
    # Only the type of what is not packed may differ.
    difference = (strata_logits(tmp_path / "out", ids) - strata_logits(packed, ids)).abs().max()
    assert difference < 1e-5


def unpack_columns(words, order):
    """Nibbles of int32 words along the last axis; `order[i]` is the column of nibble i."""
    words = words.astype(np.int64) & 0xFFFFFFFF
    out = np.zeros((*words.shape[:-1], words.shape[-1] * 8), dtype=np.int64)
    for nibble, column in enumerate(order):
        out[..., column::8] = (words >> (4 * nibble)) & 15
    return out


@pytest.mark.parametrize("method", METHODS)
def test_autoawq_layout(quantize, method):
    packed = quantize(method, "awq")
    tensors, plain = weights(packed), weights(quantize(method, "dequantized"))
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "awq" and config["version"] == "gemm"
    assert config["bits"] == 4 and config["group_size"] == 32 and config["zero_point"] is True
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for module in linear_modules(plain):
        q = unpack_columns(tensors[module + ".qweight"].numpy(), order)
        z = unpack_columns(tensors[module + ".qzeros"].numpy(), order)
        s = tensors[module + ".scales"].float().numpy()
        value = (q - z.repeat(32, 0)) * s.repeat(32, 0)
        mine = plain[module + ".weight"].numpy()
        assert np.array_equal(value.T.astype(np.float16), mine), module
        assert module + ".weight" not in tensors


def unpack_dense(words, bits, count):
    """`count` codes of `bits` bits from little-endian words along the first axis."""
    words = words.astype(np.int64) & 0xFFFFFFFF
    out = np.zeros((count, words.shape[1]), dtype=np.int64)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        value = words[word] >> shift
        if shift + bits > 32:
            value = value | (words[word + 1] << (32 - shift))
        out[i] = value & ((1 << bits) - 1)
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fmt", ["gptq", "gptq-v2"])
def test_gptq_layout(quantize, bits, fmt):
    # v1 cannot hold a zero point of 0, so it is tested on the symmetric grid.
    extra = ("--symmetric",) if fmt == "gptq" else ("--act-order",)
    packed = quantize("gptq", fmt, bits, 32, *extra)
    tensors, plain = weights(packed), weights(quantize("gptq", "dequantized", bits, 32, *extra))
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["bits"] == bits and config["quant_method"] == "gptq"
    assert config["checkpoint_format"] == fmt.replace("-", "_")
    assert json.loads((packed / "quantize_config.json").read_text())["bits"] == bits
    for module in linear_modules(plain):
        mine = plain[module + ".weight"].numpy()
        out, width = mine.shape
        q = unpack_dense(tensors[module + ".qweight"].numpy(), bits, width)
        z = unpack_dense(tensors[module + ".qzeros"].numpy().T, bits, out).T
        z = z + (1 if fmt == "gptq" else 0)
        s = tensors[module + ".scales"].float().numpy()
        index = tensors[module + ".g_idx"].numpy()
        value = (q - z[index]) * s[index]
        assert np.array_equal(value.T.astype(np.float16), mine), module


@pytest.mark.parametrize("fmt", ["compressed-tensors", "awq", "gptq-v2"])
def test_strata_computes_with_codes_what_it_computes_with_weights(quantize, strata_logits, fmt):
    packed, plain = quantize("gptq", fmt), quantize("gptq", "dequantized")
    ids = torch.randint(3, 512, (1, 40), generator=torch.Generator().manual_seed(2)).tolist()
    difference = (strata_logits(packed, ids) - strata_logits(plain, ids)).abs().max()
    # Half-precision rounding of the plain weights is all that separates them.
    assert difference < 5e-3
