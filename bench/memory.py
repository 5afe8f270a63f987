#!/usr/bin/env python3
"""Peak memory of quantising random Llamas of 0.15, 0.5 and 1.1 billion parameters.

    python3 bench/memory.py [--work DIR] [--methods rtn,gptq]

It must grow with the block, not with the model: the last columns set the peak against both.
"""

import argparse
import pathlib
import subprocess
import sys

from gptq import PEERS, ROOT, run
from peers.make_llama import SIZES


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/strata-bench"))
    parser.add_argument("--methods", default="rtn,gptq")
    parser.add_argument("--sizes", default="150m,500m,1100m")
    args = parser.parse_args()
    print(f"{'model':8} {'method':6} {'weights':>9} {'block f32':>10} {'peak':>9} {'seconds':>8}")
    for size in args.sizes.split(","):
        hidden, ffn, layers, heads, kv, vocab = SIZES[size]
        block = hidden * hidden * (2 + 2 * kv / heads) + 3 * hidden * ffn
        weights = 2 * (layers * block + 2 * vocab * hidden)
        model = args.work / size
        if not (model / "config.json").exists():
            run([sys.executable, PEERS / "make_llama.py", size, model])
        for method in args.methods.split(","):
            out = args.work / f"{size}-{method}"
            command = [
                ROOT / "target" / "release" / "strata", "quantize", model, "--method", method,
                "--bits", "4", "--group-size", "128", "--calibration",
                model / "calibration.json", "--samples", "32", "--sequence-length", "512",
                "--memory", "128MiB", "--no-evaluate", "--overwrite", "--out", out,
            ]
            seconds, peak = run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            print(
                f"{size:8} {method:6} {weights / 2**20:6.0f} MB {4 * block / 2**20:7.0f} MB "
                f"{peak:6.0f} MB {seconds:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
