#!/usr/bin/env python3
"""RSQ at 3 bits, one scale per row: Strata beside PyTorch with the same equations, in one run.

    python3 bench/rsq.py [--size 150m] [--work DIR] [--bits 3]

Needs `cargo build --release` and `pip install torch transformers safetensors`. The model is a random
Llama (`150m` has 110 million parameters), the text 32 windows of 512 tokens. Prints seconds, peak
memory, and how far the logits of each output are from the original's: both sides do the same work
when these agree.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from gptq import PEERS, ROOT, run


def distance(original, other, windows):
    """Relative error of the logits on two windows."""
    import torch
    from transformers import LlamaForCausalLM

    ids = torch.tensor(windows)[:, :128]
    with torch.no_grad():
        logits = [
            LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (original, other)
        ]
    return float((logits[0] - logits[1]).norm() / logits[0].norm())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="150m")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/strata-bench"))
    parser.add_argument("--bits", default="3")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--strata", type=pathlib.Path, default=ROOT / "target/release/strata")
    args = parser.parse_args()
    model = args.work / args.size
    if not (model / "config.json").exists():
        run([sys.executable, PEERS / "make_llama.py", args.size, model])
    windows = json.loads((model / "calibration.json").read_text())[:2]
    ours, theirs = args.work / f"{args.size}-rsq", args.work / f"{args.size}-rsq-torch"
    command = [
        args.strata, "quantize", model, "--method", "rsq", "--bits", args.bits, "--group-size", "0",
        "--symmetric", "--mse", "--format", "dequantized", "--calibration",
        model / "calibration.json", "--samples", "32", "--sequence-length", "512",
        "--no-evaluate", "--overwrite", "--out", ours,
    ]
    rows = [("strata", *run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))]
    peer = [sys.executable, PEERS / "rsq_torch.py", model, theirs, "--bits", args.bits,
            "--threads", args.threads]
    _, peak = run(peer, stdout=subprocess.DEVNULL)
    # Starting Python and importing torch is not part of the comparison.
    rows.append(("pytorch", json.loads((theirs / "bench.json").read_text())["seconds"], peak))
    for (name, seconds, peak), out in zip(rows, (ours, theirs)):
        off = distance(model, out, windows)
        print(f"{name:10} {seconds:8.1f} s   peak {peak:8.0f} MB   logits off by {off:.4f}")
    print(f"ratio      {rows[0][1] / rows[1][1]:8.2f}     memory {rows[0][2] / rows[1][2]:6.2f}")


if __name__ == "__main__":
    main()
