#!/usr/bin/env python3
"""Decoding speed of a random Llama in f16 and in 4 bits: tokens/s and GB/s against copy bandwidth.

    python3 bench/decode.py [--size 500m]

Needs `cargo build --release` and `cargo build --release -p strata-nn --example bench_decode`.
"""

import argparse
import pathlib
import subprocess
import sys

from gptq import PEERS, ROOT, run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/strata-bench"))
    parser.add_argument("--size", default="500m")
    args = parser.parse_args()
    model = args.work / args.size
    if not (model / "config.json").exists():
        run([sys.executable, PEERS / "make_llama.py", args.size, model])
    packed = args.work / f"{args.size}-decode-4bit"
    run(
        [ROOT / "target" / "release" / "strata", "quantize", model, "--method", "rtn", "--bits",
         "4", "--group-size", "128", "--no-evaluate", "--overwrite", "--out", packed],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    for path in (model, packed):
        subprocess.run([ROOT / "target/release/examples/bench_decode", path, "48"], check=True)


if __name__ == "__main__":
    main()
