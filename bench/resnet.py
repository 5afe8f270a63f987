#!/usr/bin/env python3
"""CIFAR ResNet-20, batch 128: forward pass and training step, Strata beside PyTorch, one run.

    python3 bench/resnet.py

PyTorch runs in both of its memory layouts; the faster one counts. Needs
`cargo build --release -p strata-train --example bench_resnet` and PyTorch.
"""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def output(command):
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    sides = {
        "strata": [TARGET / "release/examples/bench_resnet", "--json"],
        "torch": [sys.executable, ROOT / "bench/peers/resnet_torch.py"],
        "torch channels last": [
            sys.executable, ROOT / "bench/peers/resnet_torch.py", "--channels-last"
        ],
    }
    runs = {side: [] for side in sides}
    # Alternating, so that a busy machine disturbs all alike.
    for _ in range(3):
        for side, command in sides.items():
            runs[side].append(output(command))
    for key in ["forward_ms", "step_ms", "peak_mb"]:
        figures = {side: sorted(run[key] for run in all_runs)[1] for side, all_runs in runs.items()}
        ratio = figures["strata"] / min(v for side, v in figures.items() if side != "strata")
        text = "   ".join(f"{side} {value:8.1f}" for side, value in figures.items())
        print(f"{key:12} {text}   ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
