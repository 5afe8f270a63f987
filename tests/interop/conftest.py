"""Shared by the interop tests: where the binaries are, tiny models, running the command line."""

import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = pathlib.Path(os.environ.get("STRATA_SHARED", ROOT.parent / "shared"))


def target(*parts):
    base = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
    return pathlib.Path(base, "release", *parts)


@pytest.fixture(scope="session")
def strata():
    """Runs `strata`; returns its standard output."""
    binary = target("strata")
    if not binary.exists():
        pytest.fail(f"{binary} is missing; run: cargo build --release")

    def run(*arguments, check=True):
        done = subprocess.run(
            [binary, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
        )
        if check and done.returncode != 0:
            pytest.fail(f"strata {' '.join(map(str, arguments))}\n{done.stderr}")
        return done.stdout if check else done

    return run


@pytest.fixture(scope="session")
def logits_binary():
    binary = target("examples", "logits")
    if not binary.exists():
        pytest.fail(f"{binary} is missing; run: cargo build --release --examples -p strata-nn")
    return binary


@pytest.fixture(scope="session")
def strata_logits(logits_binary, tmp_path_factory):
    """Logits [B, T, vocab] that Strata computes for token ids."""
    from safetensors.torch import load_file

    def run(model, ids):
        folder = tmp_path_factory.mktemp("logits")
        (folder / "ids.json").write_text(json.dumps(ids))
        out = folder / "out.safetensors"
        subprocess.run([logits_binary, model, folder / "ids.json", out], check=True)
        return load_file(out)["logits"]

    return run


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A random Llama whose widths fit every packed layout, with calibration windows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.float16)
    path = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(path)
    ids = torch.randint(3, 512, (8, 64)).tolist()
    (path / "calibration.json").write_text(json.dumps(ids))
    return path
