#!/usr/bin/env python3
"""GPTQ at 4 bits, group 128: Strata beside llm-compressor, same model, same windows, one run.

    python3 bench/gptq.py [--size 150m] [--work DIR]

Needs `cargo build --release` and, for the peer, `pip install llmcompressor`. Prints seconds, peak
resident memory and the perplexity-free check that both outputs have the same tensors and shapes.
"""

import argparse
import pathlib
import subprocess
import sys
import time

from safetensors import safe_open

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"


def run(command, **options):
    """Seconds and peak resident MB of a command.

    The peak is read from the process itself while it runs: what wait4 reports includes the memory
    of this script, whose copy the child is before it becomes the command.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, **options)
    peak = 0
    while process.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            peak = max(peak, int(found[0])) if found else peak
        except (OSError, IndexError):
            pass
        time.sleep(0.02)
    if process.returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return time.perf_counter() - begun, peak / 1024


def tensors(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                found[name] = tuple(f.get_slice(name).get_shape())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="150m")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/strata-bench"))
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--bits", default="4")
    args = parser.parse_args()
    model = args.work / args.size
    if not (model / "config.json").exists():
        run([sys.executable, PEERS / "make_llama.py", args.size, model])
    rows = []
    ours = args.work / f"{args.size}-strata"
    command = [
        ROOT / "target" / "release" / "strata", "quantize", model, "--method", "gptq",
        "--bits", args.bits, "--group-size", "128", "--calibration", model / "calibration.json",
        "--samples", "32", "--sequence-length", "512", "--no-evaluate", "--overwrite", "--out", ours,
    ]
    rows.append(("strata", *run(command, stdout=subprocess.DEVNULL)))
    if not args.skip_peer:
        theirs = args.work / f"{args.size}-llmcompressor"
        rows.append((
            "llm-compressor",
            *run([sys.executable, PEERS / "gptq_llmcompressor.py", model, theirs],
                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
        ))
        a, b = tensors(ours), tensors(theirs)
        print("same tensors and shapes:", a == b)
        for name in sorted(set(a.items()) ^ set(b.items()))[:6]:
            print("  differs:", name)
    for name, seconds, peak in rows:
        print(f"{name:16} {seconds:8.1f} s   peak {peak:8.0f} MB")
    if len(rows) == 2:
        print(f"ratio            {rows[0][1] / rows[1][1]:8.2f}     memory {rows[0][2] / rows[1][2]:6.2f}")


if __name__ == "__main__":
    main()
