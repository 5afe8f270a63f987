"""The pyramid container read by an independent decoder: Python integers for the indices, mpmath for
the levels of lengths, both from the description of the format alone."""

import functools
import json

import mpmath
import numpy as np
import pytest
from safetensors import safe_open

MODULE = "model.layers.1.mlp.down_proj"


@functools.cache
def count(d, k):
    """Integer vectors of dimension d whose magnitudes sum to k."""
    if k == 0:
        return 1
    if d == 0:
        return 0
    return count(d - 1, k) + count(d, k - 1) + count(d - 1, k - 1)


def decode(index, d, k):
    """Coordinate by coordinate: 0 first, then +1, -1, +2, -2, ..."""
    y = []
    for rest in reversed(range(d)):
        if index < count(rest, k):
            y.append(0)
            continue
        index -= count(rest, k)
        a = 1
        while index >= 2 * count(rest, k - a):
            index -= 2 * count(rest, k - a)
            a += 1
        sign = 1
        if index >= count(rest, k - a):
            index -= count(rest, k - a)
            sign = -1
        y.append(sign * a)
        k -= a
    assert index == 0 and k == 0
    return y


def levels(d, n, bits, mode):
    a, b = mpmath.mpf(d) / 2, mpmath.mpf(n - d) / 2

    def below(x, a=a):
        return mpmath.betainc(a, b, 0, x, regularized=True)

    def quantile(p):
        low, high = mpmath.mpf(0), mpmath.mpf(1)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if below(middle) < p else (low, middle)
        return low

    cells = 2**bits
    if mode == "beta_cdf":
        return [float(mpmath.sqrt(quantile((c + mpmath.mpf(1) / 2) / cells))) for c in range(cells)]
    # Conditional means of the length between quantiles.
    edges = [mpmath.mpf(0), *(quantile(mpmath.mpf(c) / cells) for c in range(1, cells)), mpmath.mpf(1)]
    ratio = mpmath.beta(a + mpmath.mpf(1) / 2, b) / mpmath.beta(a, b)
    means = [ratio * below(e, a + mpmath.mpf(1) / 2) for e in edges]
    return [float((high - low) * cells) for low, high in zip(means, means[1:])]


@pytest.mark.parametrize("mode", ["beta_cdf", "beta_cond"])
@pytest.mark.parametrize("group, pulses", [(16, 27), (8, 6), (32, 50), (48, 30)])
def test_independent_decoder_agrees(strata, tiny_llama, tmp_path, mode, group, pulses):
    model, windows = tiny_llama, tiny_llama / "calibration.json"
    common = [
        "quantize", model, "--method", "pvq", "--pvq-group", group, "--pvq-pulses", pulses,
        "--pvq-levels", mode.replace("_", "-"), "--pvq-length-bits", 3, "--pvq-rotation", "none",
        "--pvq-ragged", "--calibration", windows, "--samples", 8, "--sequence-length", 64,
        "--no-evaluate",
    ]
    strata(*common, "--format", "strata", "--out", tmp_path / "packed")
    strata(*common, "--format", "dequantized", "--out", tmp_path / "dense")
    config = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "strata"
    code = config["modules"][MODULE]
    out, width = code["shape"]
    assert (code["kind"], code["dimension"], code["pulses"]) == ("pyramid", group, pulses)
    shapes = [(group, pulses, code["index_bits"])] * (width // group)
    if "tail" in code:
        tail = code["tail"]
        shapes.append((tail["dimension"], tail["pulses"], tail["index_bits"]))
    with safe_open(tmp_path / "packed/model.safetensors", "np") as f:
        index = f.get_tensor(f"{MODULE}.pvq_index")
        amp = f.get_tensor(f"{MODULE}.pvq_amp")
        norms = f.get_tensor(f"{MODULE}.pvq_norm").astype(np.float64)
    with safe_open(tmp_path / "dense/model.safetensors", "np") as f:
        dense = f.get_tensor(f"{MODULE}.weight").astype(np.float64)
    assert index.dtype == np.uint8 and index.shape[1] % 8 == 0 and amp.shape[1] % 8 == 0
    tables = {d: levels(d, width, code["amp_bits"], mode) for d, _, _ in set(shapes)}
    for row in range(0, out, max(out // 7, 1)):
        stream = int.from_bytes(index[row].tobytes(), "little")
        lengths = int.from_bytes(amp[row].tobytes(), "little")
        values = []
        for d, k, bits in shapes:
            assert bits == (count(d, k) - 1).bit_length()
            y = np.array(decode(stream & ((1 << bits) - 1), d, k), dtype=np.float64)
            level = tables[d][lengths & ((1 << code["amp_bits"]) - 1)]
            stream >>= bits
            lengths >>= code["amp_bits"]
            values.extend(norms[row] * level * y / np.linalg.norm(y))
        # The dequantised file holds half-precision numbers.
        error = np.abs(np.array(values) - dense[row])
        assert np.all(error <= 2**-10 * np.abs(dense[row]) + 1e-7), error.max()
