#!/usr/bin/env python3
"""Llama 15M shape (batch 4 x 256): forward pass and training step, Strata beside PyTorch, one run.

    python3 bench/train.py

Needs `cargo build --release -p strata-train --example bench_step` and PyTorch with transformers.
"""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def output(command):
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    ours, theirs = [], []
    # Alternating, so that a busy machine disturbs both alike.
    for _ in range(3):
        ours.append(output([ROOT / "target/release/examples/bench_step", "llama15m", "--json"]))
        theirs.append(output([sys.executable, ROOT / "bench/peers/train_torch.py"]))
    for key in ["forward_ms", "step_ms", "peak_mb"]:
        a, b = (sorted(run[key] for run in runs)[1] for runs in (ours, theirs))
        print(f"{key:12} strata {a:8.1f}   torch {b:8.1f}   ratio {a / b:.2f}")


if __name__ == "__main__":
    main()
