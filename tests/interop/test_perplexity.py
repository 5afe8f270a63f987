"""Perplexity against the procedure of the transformers documentation, on a real model and real text.

Needs torch, transformers, the data under STRATA_SHARED (default ../shared) and the binary:
`cargo build --release -p strata-cli`. STRATA_BIN names another binary.
"""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("STRATA_SHARED", ROOT.parent / "shared"))
BINARY = Path(os.environ.get("STRATA_BIN", ROOT / "target/release/strata"))
MODEL = SHARED / "data/stories260k"
STORIES = SHARED / "data/tinystories-sample/tinystories_1000.json"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    if not MODEL.exists() or not STORIES.exists():
        pytest.skip("skipped: no data under STRATA_SHARED")
    stories = json.loads(STORIES.read_text())
    stories = [s if isinstance(s, str) else s["text"] for s in stories]
    whole = [s.strip() for s in stories if s.strip().startswith(("Once upon", "One day"))][:40]
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n\n".join(whole))
    return path


def documented(text, window, stride):
    """The loop of "Perplexity of fixed-length models"."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids
    length, previous, nll_sum, tokens = ids.size(1), 0, 0.0, 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        new = end - previous
        inputs = ids[:, begin:end]
        targets = inputs.clone()
        targets[:, :-new] = -100
        with torch.no_grad():
            loss = model(inputs, labels=targets).loss.item()
        counted = (targets != -100).sum().item() - targets.size(0)
        if counted:
            nll_sum += loss * counted
        tokens += counted
        previous = end
        if end == length:
            break
    return math.exp(nll_sum / tokens), tokens


def strata(text, window, stride):
    numbers = [str(window), str(stride)]
    if BINARY.name == "perplexity":  # the example of strata-eval
        command = [BINARY, MODEL, text, *numbers]
    else:
        command = [BINARY, "eval", MODEL, "--task", "perplexity", "--text", text,
                   "--window", numbers[0], "--stride", numbers[1], "--json"]
    done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    if isinstance(result, list):
        result = result[0]
    return result["perplexity"], result["tokens"]


@pytest.mark.parametrize("window,stride", [(512, 512), (512, 256), (128, 64), (100, 37)])
def test_agrees_with_the_documentation(text, window, stride):
    if not BINARY.exists():
        pytest.skip(f"skipped: {BINARY} is not built")
    expected, count = documented(text, window, stride)
    found, tokens = strata(text, window, stride)
    print(f"window {window}, stride {stride}: transformers {expected:.6f}, strata {found:.6f}")
    assert tokens == count
    assert abs(found / expected - 1) < 1e-3
