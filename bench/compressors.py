#!/usr/bin/env python3
"""Every compressor of the house on the almanac model: what it costs and what is left.

    python3 bench/compressors.py [--model samples/almanac-3m] [--quick] [--only gptq,awq] [--json FILE]

Quantises (and prunes) the model at several widths and writes the table between the marks of
docs/choosing-a-compressor.md. Time and peak memory (VmHWM) are those of the command without its
evaluation; perplexity is on the almanac's test text, facts are held-out wordings, the size is that of
all tensor files. Methods that this build does not have are left out and named.

Needs `cargo build --release`; STRATA names another binary.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
STRATA = pathlib.Path(os.environ.get("STRATA", ROOT / "target" / "release" / "strata"))
PAGE = ROOT / "docs" / "choosing-a-compressor.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
CALIBRATION = ["--samples", "64", "--sequence-length", "256"]


class Missing(Exception):
    """The build does not have this method or option."""


def run(command):
    """Seconds and peak resident bytes of a command, read from the process while it runs."""
    begun = time.perf_counter()
    errors = tempfile.TemporaryFile()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
    peak = 0
    while process.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            peak = max(peak, int(found[0]) if found else 0)
        except (OSError, IndexError):
            pass
        time.sleep(0.01)
    seconds = time.perf_counter() - begun
    if process.returncode != 0:
        errors.seek(0)
        raise Missing(errors.read().decode().strip().splitlines()[-1:] or ["failed"])
    return seconds, peak * 1024


def ask(*arguments):
    """What a command prints as JSON."""
    done = subprocess.run([STRATA, "-q", *arguments, "--json"], cwd=ROOT, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, arguments))}\n{done.stderr.decode()}")
    return json.loads(done.stdout)


def tensor_bytes(directory):
    return sum(f.stat().st_size for f in pathlib.Path(directory).glob("*.safetensors"))


def jobs(methods):
    """(label, bits as asked for, arguments) of every job."""
    grid = ["--group-size", "32"]
    for bits in (8, 4, 3, 2):
        for method in ("rtn", "awq", "gptq", "adadim", "rsq"):
            if method in methods:
                text = [] if method == "rtn" else CALIBRATION
                own = ["--format", "strata"] if method == "adadim" else []
                arguments = ["quantize", "--method", method, "--bits", str(bits), *grid, *text, *own]
                yield method, str(bits), arguments
        if "pvq" in methods and bits < 8:
            arguments = ["quantize", "--method", "pvq", "--pvq-rate", str(bits), *CALIBRATION]
            yield "pvq", str(bits), [*arguments, "--format", "strata"]
    if "layerwise-quant" in methods:
        for size in ("3.6", "3.1"):
            low = ["--low-bits", "2", "--budget", f"{size}bpw"]
            base = ["quantize", "--method", "gptq", "--bits", "4", *grid, *CALIBRATION]
            yield "gptq, two widths by lim", f"{size} bpw", [*base, *low]
            yield "gptq, budget", f"{size} bpw", [*base, "--budget", f"{size}bpw"]
    for sparsity in ("0.3", "0.5"):
        share = f"{float(sparsity):.0%} zeros"
        own = {
            "magnitude": [],
            "d-pruner": [*CALIBRATION, "--dialect", "law"],
            # A hundred points of every layer's curve: few windows are enough, and take long enough.
            "layer-adaptive-pruning": ["--samples", "8", "--sequence-length", "128"],
        }
        for method in ("magnitude", "wanda", "sparsegpt", "d-pruner", "layer-adaptive-pruning"):
            if method in methods or method in ("magnitude", "wanda", "sparsegpt"):
                text = own.get(method, CALIBRATION)
                yield method, share, ["prune", "--method", method, "--sparsity", sparsity, *text]


def measure(model, work):
    """Perplexity and share of held-out facts, as the jobs themselves measure them."""
    recipe = work / "evaluate.yaml"
    recipe.write_text(f"model: {model}\nstages:\n  - evaluate: {{}}\n")
    result = ask("run", recipe)[0]["result"]
    facts = result["facts"]["heldout"]
    return result["perplexity"]["perplexity"], facts["correct"] / facts["total"]


def effective_bits(directory):
    """Mean bits per weight of the compressed layers, side information included."""
    layers = json.loads((directory / "strata.json").read_text()).get("layers") or []
    # Layer-adaptive pruning records layers of any network: no width, no matrix.
    layers = [layer for layer in layers if "bits_per_weight" in layer]
    size = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    bits = sum(layer["bits_per_weight"] * n for layer, n in zip(layers, size))
    return bits / sum(size) if size else 16.0


def row_of(cells):
    return "| " + " | ".join(cells) + " |\n"


def table(rows):
    names = ["method", "asked for", "bits per weight", "tensors", "perplexity", "facts", "time",
             "peak memory"]
    text = row_of(names) + "|---|---|---:|---:|---:|---:|---:|---:|\n"
    for row in rows:
        seconds = f"{row['seconds']:.1f} s" if row["seconds"] else ""
        peak = f"{row['peak'] / 2**20:.0f} MiB" if row["peak"] else ""
        text += row_of([row["method"], row["asked"], f"{row['bits']:.2f}",
                        f"{row['bytes'] / 2**20:.2f} MiB", f"{row['perplexity']:.4f}",
                        f"{row['facts']:.1%}", seconds, peak])
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="samples/almanac-3m")
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--quick", action="store_true", help="4 bits only, and no pruning")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    args = parser.parse_args()
    if not STRATA.exists():
        sys.exit(f"{STRATA} is missing: cargo build --release, or set STRATA")
    methods = {card["slug"] for card in ask("methods")}
    only = set(args.only.split(",")) if args.only else None
    rows, missing = [], []
    with tempfile.TemporaryDirectory(prefix="strata-compressors-") as work:
        work = pathlib.Path(work)
        perplexity, facts = measure(args.model, work)
        rows.append({"method": "none", "asked": "", "bits": 16.0, "seconds": None, "peak": None,
                     "bytes": tensor_bytes(ROOT / args.model), "perplexity": perplexity,
                     "facts": facts})
        for method, asked, (verb, *options) in jobs(methods):
            if only and not only & {method, method.split(",")[0]}:
                continue
            if args.quick and (asked not in ("4", "3.6 bpw") or verb == "prune"):
                continue
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            try:
                seconds, peak = run([STRATA, "-q", verb, args.model, *options, "--no-evaluate",
                                     "--out", out])
            except Missing as error:
                missing.append((method, asked, error.args[0][0]))
                continue
            perplexity, facts = measure(out, work)
            rows.append({"method": method, "asked": asked, "bits": effective_bits(out),
                         "bytes": tensor_bytes(out), "perplexity": perplexity, "facts": facts,
                         "seconds": seconds, "peak": peak})
            print(f"{method:26} {asked:10} {rows[-1]['bits']:6.2f} {perplexity:9.4f} {facts:6.1%} "
                  f"{seconds:6.1f} s {peak / 2**20:6.0f} MiB", flush=True)
    for method, asked, reason in missing:
        print(f"left out: {method} {asked}: {reason}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if only or args.quick:
        print(table(rows))
        return
    page = PAGE.read_text()
    before, rest = page.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    PAGE.write_text(before + BEGIN + table(rows) + END + after)
    print(f"{PAGE.relative_to(ROOT)} rewritten: {len(rows)} rows")


if __name__ == "__main__":
    main()
