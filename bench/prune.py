#!/usr/bin/env python3
"""SparseGPT and Wanda: Strata beside the same equations in PyTorch, same model, same windows.

    python3 bench/prune.py [--size 150m] [--work DIR] [--methods sparsegpt,wanda] [--pattern 2:4]

The size 150m has 85M prunable weights of 110M parameters. Needs `cargo build --release`, torch and transformers. Prints seconds and peak resident memory of
both sides, and how far the masks agree: they are the same rule on the same statistics, so what
differs is rounding in the forward pass.
"""

import argparse
import pathlib
import subprocess
import sys

import torch
from safetensors import safe_open

from gptq import PEERS, ROOT, run


def weights(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                if name.endswith("_proj.weight"):
                    found[name] = f.get_tensor(name)
    return found


def agreement(ours, theirs):
    """Share of weights on which both sides agree whether they are zero, and both sparsities."""
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    same = sum(((a[n] == 0) == (b[n] == 0)).sum().item() for n in a)
    total = sum(w.numel() for w in a.values())
    zeros = [sum((w == 0).sum().item() for w in side.values()) / total for side in (a, b)]
    return same / total, zeros


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="150m")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/strata-bench"))
    parser.add_argument("--methods", default="sparsegpt,wanda")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/strata")
    parser.add_argument("--skip-peer", action="store_true")
    args = parser.parse_args()
    model = args.work / args.size
    if not (model / "config.json").exists():
        run([sys.executable, PEERS / "make_llama.py", args.size, model])
    for method in args.methods.split(","):
        ours, theirs = (args.work / f"{args.size}-{method}-{side}" for side in ("strata", "torch"))
        command = [
            args.binary, "prune", model, "--method", method, "--sparsity", "0.5",
            "--pattern", args.pattern, "--calibration", model / "calibration.json",
            "--samples", "32", "--sequence-length", "512", "--no-evaluate", "--overwrite",
            "--out", ours,
        ]
        rows = [("strata", *run(command, stdout=subprocess.DEVNULL))]
        if not args.skip_peer:
            peer = [
                sys.executable, PEERS / f"{method}_torch.py", model, theirs,
                "--pattern", args.pattern,
            ]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            rows.append(("pytorch", *run(peer, **quiet)))
        print(f"{method}, {args.pattern}")
        for name, seconds, peak in rows:
            print(f"  {name:10} {seconds:8.1f} s   peak {peak:8.0f} MB")
        if len(rows) == 2:
            same, zeros = agreement(ours, theirs)
            print(f"  ratio      {rows[0][1] / rows[1][1]:8.2f}     memory {rows[0][2] / rows[1][2]:6.2f}")
            print(f"  masks agree on {100 * same:.2f} % of the weights; zeros {zeros[0]:.4f}, {zeros[1]:.4f}")


if __name__ == "__main__":
    main()
