"""Pruning beside PyTorch: the same masks for the same rule, and files that others can unpack."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

SHARE = 0.6


def weights(path):
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama in single precision, where equal magnitudes are unlikely."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("layernorm.weight"):
                weight.mul_(torch.exp(0.5 * torch.randn_like(weight)))
    path = tmp_path_factory.mktemp("tiny-f32")
    model.save_pretrained(path)
    ids = torch.randint(3, 256, (16, 64)).tolist()
    (path / "calibration.json").write_text(json.dumps(ids))
    return path


@pytest.fixture(scope="module")
def prune(strata, model, tmp_path_factory):
    def run(method, *extra, share=SHARE):
        out = tmp_path_factory.mktemp("pruned") / "model"
        strata(
            "prune", model, "--method", method, "--sparsity", share,
            "--calibration", model / "calibration.json", "--samples", 16,
            "--sequence-length", 64, "--no-evaluate", "--out", out, *extra,
        )
        return out

    return run


def linears(tensors):
    return sorted(name for name in tensors if name.endswith("_proj.weight"))


def test_magnitude_masks_are_those_of_torch(prune, model):
    from torch.nn.utils import prune as torch_prune

    before, after = weights(model), weights(prune("magnitude", "--exact"))
    assert before.keys() == after.keys()
    for name in linears(before):
        out, width = before[name].shape
        module = torch.nn.Linear(width, out, bias=False)
        module.weight.data = before[name].clone()
        torch_prune.l1_unstructured(module, "weight", amount=SHARE)
        assert torch.equal(module.weight, after[name]), name


def inputs_of_the_first_block(model):
    """The inputs `[tokens, in]` of q, k and v in the first block."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor(json.loads((model / "calibration.json").read_text()))
    seen = []
    attention = network.model.layers[0].self_attn.q_proj
    attention.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        network(ids)
    return torch.cat(seen).double()


def test_wanda_is_weight_times_input_norm(prune, model):
    before, after = weights(model), weights(prune("wanda"))
    norms = inputs_of_the_first_block(model).norm(dim=0)
    for letter in "qkv":
        name = f"model.layers.0.self_attn.{letter}_proj.weight"
        scores = before[name].double().abs() * norms
        count = int(scores.shape[1] * SHARE)
        wanted = before[name].scatter(1, scores.argsort(dim=1, stable=True)[:, :count], 0)
        assert torch.equal(after[name], wanted), name


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_is_its_equations_in_double_precision(prune, model, pattern):
    share = SHARE if pattern == "unstructured" else 0.5
    before = weights(model)
    after = weights(prune("sparsegpt", "--pattern", pattern, share=share))
    x = inputs_of_the_first_block(model)
    hessian = 2 / len(x) * x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for letter in "qkv":
        name = f"model.layers.0.self_attn.{letter}_proj.weight"
        # 64 inputs are one block of columns.
        w = before[name].double()
        pruned = torch.zeros_like(w, dtype=torch.bool)
        scores = w**2 / upper.diagonal() ** 2
        if pattern == "unstructured":
            pruned = scores <= scores.flatten().sort()[0][int(scores.numel() * share)]
        for i in range(w.shape[1]):
            if pattern == "2:4" and i % 4 == 0:
                group = w[:, i : i + 4] ** 2 / upper.diagonal()[i : i + 4] ** 2
                pruned.scatter_(1, i + group.topk(2, dim=1, largest=False)[1], True)
            error = torch.where(pruned[:, i], w[:, i], 0) / upper[i, i]
            w -= error[:, None] * upper[i][None].triu(i)
            w[pruned[:, i], i] = 0
        ours = after[name].double()
        same = ((ours == 0) == (w == 0)).double().mean().item()
        assert same > 0.998, (name, same)
        agree = (ours == 0) == (w == 0)
        rows = agree.all(dim=1)
        assert torch.allclose(ours[rows], w[rows], rtol=1e-3, atol=1e-4), name


def test_mask_files_say_what_is_kept(prune):
    out = prune("wanda")
    tensors, masks = weights(out), weights(out / "masks")
    for name in linears(tensors):
        module = name[: -len(".weight")]
        shape = tuple(masks[module + ".shape"].tolist())
        bits = masks[module + ".bitmask"].numpy()
        kept = np.unpackbits(bits, axis=1, bitorder="little")[:, : shape[1]].astype(bool)
        assert kept.shape == shape == tuple(tensors[name].shape)
        assert not tensors[name].numpy()[~kept].any(), name


def test_a_pruned_model_loads_in_transformers(prune, strata_logits):
    from transformers import AutoModelForCausalLM

    out = prune("sparsegpt", "--calibration-order", "block")
    network = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = network(ids).logits
    assert (theirs - strata_logits(out, ids.tolist())).abs().max() < 1e-3
