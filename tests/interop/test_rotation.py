"""transformers loads what `--rotate-only` and `--method rsq` write and computes the same logits."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCAB = 97
BASE = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
GPT2 = dict(
    vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
    bos_token_id=1, eos_token_id=2,
)
OPT = dict(
    vocab_size=VOCAB, hidden_size=64, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, init_std=0.2, word_embed_proj_dim=64, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)
NEOX = {**BASE, "rotary_pct": 0.5}
NEOX.pop("head_dim")
NEOX.pop("num_key_value_heads")

CASES = {
    "llama-tied": ("Llama", {**BASE, "tie_word_embeddings": True}),
    "llama-untied-bias": ("Llama", {**BASE, "attention_bias": True, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {**BASE, "sliding_window": 5, "tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {**BASE, "tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {**BASE, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {**BASE, "tie_word_embeddings": True}),
    "gpt2-tied": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False}),
    "opt-tied": ("OPT", {**OPT, "tie_word_embeddings": True}),
    "opt-projected": ("OPT", {**OPT, "word_embed_proj_dim": 24}),
    "opt-no-bias": ("OPT", {**OPT, "enable_bias": False}),
    "neox": ("GPTNeoX", NEOX),
}


def random_model(family, settings, path, bare=False):
    """A random network whose norms have gains and biases far from 1 and 0."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                weight.add_(0.5 * torch.randn_like(weight))
            elif name.endswith("bias"):
                weight.normal_(0, 0.2)
    # A bare model is saved without the prefix of its family and without a head.
    (model.base_model if bare else model).save_pretrained(path)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


IDS = torch.randint(3, VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rotation", ["hadamard", "random"])
@pytest.mark.parametrize("case", CASES)
def test_rotated_checkpoint_loads_and_computes_the_same(strata, tmp_path, case, rotation):
    family, settings = CASES[case]
    original = random_model(family, settings, tmp_path / "model")
    out = tmp_path / "rotated"
    strata(
        "quantize", tmp_path / "model", "--method", "rsq", "--rotate-only", "--rotation", rotation,
        "--no-evaluate", "--out", out,
    )
    rotated, loading = type(original).from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    before, after = logits(original, IDS), logits(rotated.eval(), IDS)
    assert (before - after).abs().max() < 1e-4 * before.abs().max()
    changed = [
        name for name, weight in rotated.named_parameters()
        if name in original.state_dict()
        and not torch.allclose(weight, original.state_dict()[name])
    ]
    assert len(changed) > 8


def test_bare_gpt2_gets_the_usual_names(strata, tmp_path):
    original = random_model("GPT2", GPT2, tmp_path / "model", bare=True)
    out = tmp_path / "rotated"
    strata(
        "quantize", tmp_path / "model", "--method", "rsq", "--rotate-only", "--no-evaluate",
        "--out", out,
    )
    rotated, loading = transformers.GPT2LMHeadModel.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    before, after = logits(original, IDS), logits(rotated.eval(), IDS)
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("case", ["llama-tied", "qwen2-tied", "opt-tied"])
def test_quantised_rotated_checkpoint_loads(strata, strata_logits, tmp_path, case):
    pytest.importorskip("compressed_tensors")
    family, settings = CASES[case]
    random_model(family, settings, tmp_path / "model")
    text = torch.randint(3, VOCAB, (8, 32), generator=torch.Generator().manual_seed(2))
    (tmp_path / "ids.json").write_text(json.dumps(text.tolist()))
    out = tmp_path / "rsq"
    strata(
        "quantize", tmp_path / "model", "--method", "rsq", "--bits", 4, "--group-size", 16,
        "--symmetric", "--calibration", tmp_path / "ids.json", "--samples", 8,
        "--sequence-length", 32, "--no-evaluate", "--out", out,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    theirs, ours = logits(model.eval(), IDS), strata_logits(out, IDS.tolist())
    assert (theirs - ours).abs().max() < 1e-3 * theirs.abs().max()
