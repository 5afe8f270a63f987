#!/usr/bin/env python3
"""SparseGPT and Wanda: Strata beside the same equations in PyTorch, same model, same windows.

    python3 bench/prune.py [--size 150m] [--work DIR] [--methods sparsegpt,wanda] [--pattern 2:4]

The size 150m has 85M prunable weights of 110M parameters. Needs `cargo build --release`, torch and
transformers. Prints seconds and peak resident memory of both sides, and how far the masks agree.
Strata runs twice: in its own order (every set of layers is
calibrated on what the sets before it have become, one pass through a block) and in the peer's (all
layers on the untouched block, two passes). In the peer's order it is the same rule on the same
statistics, so what differs is rounding in the forward pass.
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


QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def command(args, model, method, order, out):
    return [
        args.binary, "prune", model, "--method", method, "--sparsity", "0.5",
        "--pattern", args.pattern, "--calibration-order", order,
        "--calibration", model / "calibration.json", "--samples", "32", "--sequence-length", "512",
        "--no-evaluate", "--overwrite", "--out", out,
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="150m")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/strata-bench"))
    parser.add_argument("--methods", default="sparsegpt,wanda")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/strata")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--order", default="sets,block", help="calibration orders of Strata")
    args = parser.parse_args()
    model = args.work / args.size
    if not (model / "config.json").exists():
        run([sys.executable, PEERS / "make_llama.py", args.size, model])
    for method in args.methods.split(","):
        ours, theirs = (args.work / f"{args.size}-{method}-{side}" for side in ("strata", "torch"))
        rows = []
        # The last order is the peer's own, so that the masks can be compared.
        for order in args.order.split(","):
            rows.append((f"strata ({order})", *run(command(args, model, method, order, ours), **QUIET)))
        if not args.skip_peer:
            peer = [
                sys.executable, PEERS / f"{method}_torch.py", model, theirs,
                "--pattern", args.pattern,
            ]
            rows.append(("pytorch", *run(peer, **QUIET)))
        print(f"{method}, {args.pattern}")
        for name, seconds, peak in rows:
            print(f"  {name:16} {seconds:8.1f} s   peak {peak:8.0f} MB")
        if not args.skip_peer:
            *sides, (_, theirs_seconds, theirs_peak) = rows
            for name, seconds, peak in sides:
                ratio, memory = seconds / theirs_seconds, peak / theirs_peak
                print(f"  {name} / pytorch: time {ratio:.2f}, memory {memory:.2f}")
            same, zeros = agreement(ours, theirs)
            print(f"  masks agree on {100 * same:.2f} % of the weights; zeros {zeros[0]:.4f}, {zeros[1]:.4f}")


if __name__ == "__main__":
    main()
