#!/usr/bin/env python3
"""Decoding speed in 4 bits of a random Llama: Strata beside llama.cpp, in one run.

    python3 bench/decode_llamacpp.py [--size 500m] [--tokens 64] [--rounds 3] [--threads N]

Both sides compute with the same 4-bit codes (round to nearest, symmetric, 32 weights to a scale: what
llama.cpp calls Q4_0) and a head in f16; `strata convert` carries the codes over. A third row is
llama.cpp on its own usual mix (Q4_0 with a Q6_K head). Rounds alternate between the sides; the best
of each counts. GB/s are the bytes of the weights that a token reads, against the machine's copy
bandwidth.

Needs `pip install llama-cpp-python` (built for this machine), `cargo build --release` and
`cargo build --release -p strata-nn --example bench_decode`.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import time

from gptq import PEERS, ROOT, run

TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
STRATA = TARGET / "strata"
WARM = 8


def ours(model, tokens, threads):
    """Tokens/s, bytes per token and copy bandwidth, as the example prints them."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [TARGET / "examples" / "bench_decode", model, str(tokens)], check=True, capture_output=True,
        text=True, env=environment,
    ).stdout
    megabytes = float(re.search(r"([\d.]+) MB read per token", done)[1])
    rate = float(re.search(r"([\d.]+) tokens/s", done)[1])
    copy = float(re.search(r"of ([\d.]+) GB/s copied", done)[1])
    return rate, megabytes * 1e6, copy


class LlamaCpp:
    """A GGUF file in llama.cpp, decoding greedily one token at a time."""

    def __init__(self, path, threads):
        import gguf
        import llama_cpp

        tensors = gguf.GGUFReader(path).tensors
        self.bytes = sum(t.n_bytes for t in tensors if t.name != "token_embd.weight")
        self.model = llama_cpp.Llama(
            model_path=str(path), n_ctx=512, n_threads=threads, verbose=False
        )

    def rate(self, tokens):
        self.model.reset()
        self.model.eval([1, 2, 3, 4])
        for _ in range(WARM):
            self.model.eval([self.best()])
        start = time.perf_counter()
        for _ in range(tokens):
            self.model.eval([self.best()])
        return tokens / (time.perf_counter() - start)

    def best(self):
        import numpy as np

        logits = self.model._ctx.get_logits()
        return int(np.ctypeslib.as_array(logits, shape=(self.model.n_vocab(),)).argmax())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/strata-bench"))
    parser.add_argument("--size", default="500m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    model = args.work / args.size
    if not (model / "config.json").exists():
        run([sys.executable, PEERS / "make_llama.py", args.size, model])
    packed, same, usual = (
        args.work / f"{args.size}-4bit-g32",
        args.work / f"{args.size}-same-codes.gguf",
        args.work / f"{args.size}-q4_0.gguf",
    )
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run(
        [STRATA, "quantize", model, "--method", "rtn", "--bits", "4", "--group-size", "32",
         "--symmetric", "--format", "compressed-tensors", "--no-evaluate", "--overwrite", "--out",
         packed], **quiet,
    )
    gguf = [STRATA, "convert", "--to", "gguf", "--without-tokenizer", "--overwrite"]
    run([*gguf, packed, "--out", same], **quiet)
    run([*gguf, model, "--type", "q4_0", "--out", usual], **quiet)

    theirs = {"same codes": LlamaCpp(same, args.threads), "usual mix": LlamaCpp(usual, args.threads)}
    best = {"strata": 0.0, **dict.fromkeys(theirs, 0.0)}
    copy = 0.0
    for _ in range(args.rounds):
        rate, size, bandwidth = ours(packed, args.tokens, args.threads)
        best["strata"], copy = max(best["strata"], rate), max(copy, bandwidth)
        for name, side in theirs.items():
            best[name] = max(best[name], side.rate(args.tokens))
    sizes = {"strata": size, **{name: side.bytes for name, side in theirs.items()}}
    labels = {"strata": "strata, Q4_0 codes", "same codes": "llama.cpp, same codes",
              "usual mix": "llama.cpp, Q4_0 with Q6_K head"}
    print(f"{args.size} parameters, {args.threads} threads, copy bandwidth {copy:.1f} GB/s")
    print(f"{'':32}{'tokens/s':>10}{'MB/token':>10}{'GB/s':>8}{'of copy':>9}{'strata/it':>11}")
    for name, rate in best.items():
        speed = rate * sizes[name] / 1e9
        print(
            f"{labels[name]:32}{rate:10.1f}{sizes[name] / 1e6:10.1f}{speed:8.1f}"
            f"{speed / copy:8.0%}{best['strata'] / rate:11.2f}"
        )


if __name__ == "__main__":
    main()
