#!/usr/bin/env python3
"""Kill `strata quantize` and `strata train` at random moments; resumed, they must end with the same bytes.

    python3 tests/kill/kill_and_resume.py [--kills 20] [--seed 0]

Needs `cargo build --release` and samples/almanac-3m. Reports how often each job was killed, and exits
with 1 if any output differs. report.html and report.json hold timings and are not compared.
"""

import argparse
import hashlib
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
STRATA = ROOT / "target" / "release" / "strata"
TIMED = {"report.html", "report.json"}

TRAIN = """
model: {model_type: llama, vocab_size: 2048, hidden_size: 64, intermediate_size: 128,
  num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 128,
  tie_word_embeddings: true}
data: [{almanac: {seed: 0, part: base}}]
sequence_length: 64
batch_size: 4
steps: 160
evaluate_every: 0
checkpoint_every: 20
schedule: {warmup_steps: 10}
"""


def digest(directory):
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in TIMED:
            files[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files


def start(arguments):
    return subprocess.Popen(
        [STRATA, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process, what):
    _, errors = process.communicate()
    if process.returncode != 0:
        sys.exit(f"{what} failed:\n{errors}")


def trial(name, arguments, kills, rng, scratch):
    out = scratch / f"{name}-plain"
    begun = time.monotonic()
    finish(start([*arguments, "--out", out]), name)
    seconds = time.monotonic() - begun
    wanted = digest(out)
    killed = rounds = 0
    while killed < kills:
        rounds += 1
        out = scratch / f"{name}-{rounds}"
        while True:
            process = start([*arguments, "--out", out, "--resume"])
            try:
                # Moments beyond the job's length let it end, so that later stages are hit too.
                process.wait(timeout=rng.uniform(0.02, 1.1 * seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                continue
            finish(process, name)
            break
        found = digest(out)
        if found != wanted:
            different = sorted(k for k in wanted | found if wanted.get(k) != found.get(k))
            print(f"{name}: round {rounds} differs in {different}")
            return False
        left = list(scratch.glob(f"{out.name}.*"))
        if left:
            print(f"{name}: round {rounds} left {left}")
            return False
        shutil.rmtree(out)
    print(f"{name}: killed {killed} times in {rounds} jobs of {seconds:.1f} s; all byte-identical")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    model = ROOT / "samples" / "almanac-3m"
    with tempfile.TemporaryDirectory(prefix="strata-kill-") as folder:
        scratch = pathlib.Path(folder)
        config = scratch / "train.yaml"
        config.write_text(TRAIN)
        quantize = ["quantize", model, "--bits", "4", "--group-size", "64", "--samples", "32",
                    "--sequence-length", "128", "--no-evaluate"]
        jobs = {
            "quantize-gptq": [*quantize, "--method", "gptq"],
            "quantize-awq": [*quantize, "--method", "awq"],
            "train": ["train", "--config", config],
        }
        good = [trial(n, j, arguments.kills, rng, scratch) for n, j in jobs.items()]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
