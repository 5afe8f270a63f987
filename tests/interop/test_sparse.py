"""Sparse checkpoints that Strata writes, unpacked by compressed-tensors.

Versions of compressed-tensors from 0.12 on have no decompressors for them any more (only the bit
unpacking is left, which is used here). STRATA_OLD_COMPRESSED_TENSORS may name a folder with an older
version (`pip install --target FOLDER compressed-tensors==0.11.0`), whose classes are then used too.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module", params=["sparse-bitmask", "sparse-24-bitmask"])
def sparse(request, strata, tiny_llama, tmp_path_factory):
    """Name of the format, the pruned dense weights, the sparse checkpoint."""
    folder = tmp_path_factory.mktemp("sparse")
    dense = folder / "dense"
    dense.mkdir()
    weights = {}
    for file in tiny_llama.glob("*.safetensors"):
        weights.update(load_file(file))
    for name, weight in weights.items():
        if name.endswith("_proj.weight") and ".layers.1." in name:
            groups = weight.view(-1, 4)
            small = groups.abs().argsort(1)[:, :2]
            groups.scatter_(1, small, 0.0)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    (dense / "config.json").write_text((tiny_llama / "config.json").read_text())
    out = folder / "sparse"
    strata("convert", dense, "--to", request.param, "--out", out)
    return request.param, weights, out


def test_the_parts_give_the_weights(sparse):
    from compressed_tensors.utils import unpack_bitmasks

    name, weights, out = sparse
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == name
    assert abs(config["sparsity_config"]["global_sparsity"] - 0.5) < 0.01
    tensors = load_file(out / "model.safetensors")
    modules = [n[: -len(".bitmask")] for n in tensors if n.endswith(".bitmask")]
    assert len(modules) == 7 and all(".layers.1." in m for m in modules)
    for module in modules:
        dense = weights[module + ".weight"]
        shape = tensors[module + ".shape"].flatten().tolist()
        assert shape == list(dense.shape)
        mask = unpack_bitmasks(tensors[module + ".bitmask"], shape)
        values = tensors[module + ".compressed"]
        rebuilt = torch.zeros(shape, dtype=values.dtype)
        rebuilt[mask] = values.flatten()
        assert torch.equal(rebuilt, dense), module
        if name == "sparse-24-bitmask":
            assert list(values.shape) == [shape[0], shape[1] // 2]
            assert (mask.view(-1, 4).sum(1) == 2).all()
        else:
            counts = mask.sum(1)
            assert torch.equal(tensors[module + ".row_offsets"], counts.cumsum(0) - counts)
        assert module + ".weight" not in tensors


def test_strata_computes_with_them(sparse, strata_logits, tmp_path):
    _, weights, out = sparse
    dense = out.parent / "dense"
    ids = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(1)).tolist()
    # The weights are equal; dense f16 and unpacked f32 weights are summed in different orders.
    difference = (strata_logits(out, ids) - strata_logits(dense, ids)).abs().max()
    assert difference < 1e-5


OLD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import load_file
config = json.load(open(sys.argv[2] + "/config.json"))["quantization_config"]["sparsity_config"]
config = SparsityCompressionConfig.load_from_registry(config["format"], **config)
compressor = BaseCompressor.load_from_registry(config.format, config=config)
dense = load_file(sys.argv[3] + "/model.safetensors")
seen = 0
for name, weight in compressor.decompress(sys.argv[2] + "/model.safetensors"):
    assert torch.equal(weight, dense[name]), name
    seen += 1
assert seen == len(dense), (seen, len(dense))
print("read", seen)
"""


def test_the_compressors_of_an_older_version_read_them(sparse):
    old = os.environ.get("STRATA_OLD_COMPRESSED_TENSORS")
    if not old:
        pytest.skip("STRATA_OLD_COMPRESSED_TENSORS names no folder with compressed-tensors <= 0.11")
    _, _, out = sparse
    done = subprocess.run(
        [sys.executable, "-c", OLD, old, str(out), str(out.parent / "dense")], capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("read")
