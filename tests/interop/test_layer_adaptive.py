"""Masks of layer-adaptive pruning against torch.nn.utils.prune, and PyTorch loading its exports."""

import json
import struct

import pytest
from safetensors.torch import load_file, save_file

torch = pytest.importorskip("torch")
prune = pytest.importorskip("torch.nn.utils.prune")


def chain():
    layers = {"fc1": torch.nn.Linear(16, 24), "fc2": torch.nn.Linear(24, 24)}
    layers["fc3"] = torch.nn.Linear(24, 10)
    return torch.nn.ModuleDict(layers)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(3)
    directory = tmp_path / "mlp"
    directory.mkdir()
    save_file(chain().state_dict(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"architecture": "mlp"}))
    return directory


def pruned(strata, model, out, *more):
    strata(
        "-q", "prune", model, "--method", "layer-adaptive-pruning", "--out", out,
        "--synthetic-calibration", "--curve-samples", 8, *more,
    )
    return out


def reference(model):
    net = chain()
    net.load_state_dict(load_file(model / "model.safetensors"))
    return net


def test_uniform_masks_are_those_of_l1_unstructured(strata, model, tmp_path):
    out = pruned(strata, model, tmp_path / "u", "--allocator", "uniform", "--sparsity", 0.37)
    masks = load_file(out / "masks" / "masks.safetensors")
    for name, layer in reference(model).items():
        prune.l1_unstructured(layer, "weight", amount=0.37)
        assert torch.equal(masks[f"{name}.weight_mask"], layer.weight_mask.bool()), name


def test_global_masks_are_those_of_global_unstructured(strata, model, tmp_path):
    out = pruned(strata, model, tmp_path / "g", "--allocator", "global", "--sparsity", 0.6)
    masks = load_file(out / "masks" / "masks.safetensors")
    net = reference(model)
    parameters = [(layer, "weight") for layer in net.values()]
    prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=0.6)
    for name, layer in net.items():
        assert torch.equal(masks[f"{name}.weight_mask"], layer.weight_mask.bool()), name


def test_lamp_keeps_the_largest_scores(strata, model, tmp_path):
    out = pruned(strata, model, tmp_path / "l", "--allocator", "lamp", "--sparsity", 0.8)
    masks = load_file(out / "masks" / "masks.safetensors")
    weights = load_file(model / "model.safetensors")
    scores = {}
    for name in ["fc1", "fc2", "fc3"]:
        square = weights[f"{name}.weight"].double().flatten().square()
        order = square.argsort()
        suffix = square[order].flip(0).cumsum(0).flip(0)
        score = torch.empty_like(square)
        score[order] = square[order] / suffix
        scores[name] = score
    everything = torch.cat(list(scores.values()))
    keep = len(everything) - round(0.8 * len(everything))
    threshold = everything.sort(descending=True).values[keep - 1]
    for name, score in scores.items():
        assert torch.equal(masks[f"{name}.weight_mask"].flatten(), score >= threshold), name


def test_curves_and_the_joint_distortion_are_what_pytorch_measures(strata, model, tmp_path):
    pixels = torch.randint(0, 256, (20, 16), dtype=torch.uint8, generator=torch.manual_seed(1))
    images = tmp_path / "few-images-idx3-ubyte"
    images.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 20, 4, 4) + pixels.numpy().tobytes())
    labels = bytes(i % 10 for i in range(20))
    (tmp_path / "few-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 20) + labels)
    out = tmp_path / "c"
    strata(
        "-q", "prune", model, "--method", "layer-adaptive-pruning", "--out", out,
        "--calibration", images, "--curve-points", 8, "--sparsity", 0.5,
    )
    x = pixels.float() / 255

    def logits(net):
        hidden = net["fc2"](net["fc1"](x).relu()).relu()
        return net["fc3"](hidden).double()

    with torch.no_grad():
        whole = logits(reference(model))
        for curve in json.loads((out / "curves.json").read_text())["layers"]:
            for count, distortion in zip(curve["pruned"], curve["distortion"]):
                net = reference(model)
                weight = net[curve["module"]].weight.view(-1)
                weight[weight.abs().argsort(stable=True)[:count]] = 0
                expected = (logits(net) - whole).square().mean().item()
                assert distortion == pytest.approx(expected, rel=1e-4, abs=1e-12)
        masked = chain()
        masked.load_state_dict(load_file(out / "model.safetensors"))
        expected = (logits(masked) - whole).square().mean().item()
    allocation = json.loads((out / "allocation.json").read_text())
    assert allocation["measured_distortion"] == pytest.approx(expected, rel=1e-4)


def test_pytorch_takes_the_export_on(strata, model, tmp_path):
    out = pruned(strata, model, tmp_path / "p", "--sparsity", 0.5, "--mask-export", "pytorch")
    export = load_file(out / "masks" / "pytorch.safetensors")
    dense = load_file(out / "model.safetensors")
    net = reference(model)
    for name, layer in net.items():
        prune.identity(layer, "weight")
        state = layer.state_dict()
        state.update({k.removeprefix(f"{name}."): v for k, v in export.items() if k.startswith(name)})
        layer.load_state_dict(state)
        layer(torch.zeros(1, layer.in_features))
        assert torch.equal(layer.weight, dense[f"{name}.weight"]), name
        prune.remove(layer, "weight")
        assert (layer.weight == 0).float().mean() > 0.01


def pruned_decoder(strata, tiny_llama, out, storage):
    strata(
        "-q", "prune", tiny_llama, "--method", "layer-adaptive-pruning", "--allocator", "lamp",
        "--sparsity", 0.5, "--calibration", tiny_llama / "calibration.json", "--curve-samples", 2,
        "--sequence-length", 32, "--no-evaluate", "--format", storage, "--out", out,
    )
    masks = load_file(out / "masks" / "masks.safetensors")
    assert len(masks) == 15
    return masks


def test_a_pruned_decoder_loads_in_transformers(strata, tiny_llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    masks = pruned_decoder(strata, tiny_llama, tmp_path / "d", "dense")
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d").state_dict()
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    for name, mask in masks.items():
        tensor = name.removesuffix("_mask")
        assert torch.equal(state[tensor].float(), original[tensor].float() * mask), tensor


def test_sparse_storage_holds_the_masks(strata, tiny_llama, tmp_path):
    # Loaders of current versions no longer unpack whole models (see test_sparse.py); the bits are
    # read as compressed-tensors reads them.
    utils = pytest.importorskip("compressed_tensors.utils")
    masks = pruned_decoder(strata, tiny_llama, tmp_path / "s", "sparse-bitmask")
    tensors = load_file(tmp_path / "s" / "model.safetensors")
    config = json.loads((tmp_path / "s" / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == "sparse-bitmask"
    for name, mask in masks.items():
        module = name.removesuffix(".weight_mask")
        shape = tensors[f"{module}.shape"].flatten().tolist()
        found = utils.unpack_bitmasks(tensors[f"{module}.bitmask"], shape)
        assert torch.equal(found.bool(), mask), module
