"""What the PyTorch sides of the pruning benchmark share: a decoder walked block by block.

A block sees the calibration windows once to gather statistics of every linear's input, is pruned,
and sees them again so that the next block is calibrated on what it has become.
"""

import argparse
import json
import pathlib
import time

import torch
from transformers import AutoModelForCausalLM


def arguments(doc):
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="unstructured")
    args = parser.parse_args()
    args.pattern = None if args.pattern == "unstructured" else tuple(map(int, args.pattern.split(":")))
    return args


@torch.no_grad()
def walk(args, collect, prune):
    """`collect(x, statistics)` folds an input `[tokens, in]` into the statistics of a linear,
    `prune(weight, statistics)` returns the new weight."""
    torch.set_num_threads(args.threads)
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.eval()
    windows = torch.tensor(json.loads((args.model / "calibration.json").read_text()))
    inputs = list(model.model.embed_tokens(windows).split(4))
    length = windows.shape[1]
    positions = torch.arange(length)[None]
    rotary = model.model.rotary_emb(inputs[0], positions)
    for block in model.model.layers:
        linears = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        statistics = {name: {"sequences": len(windows)} for name in linears}
        hooks = [
            module.register_forward_pre_hook(
                lambda _, x, s=statistics[name]: collect(x[0].flatten(0, -2), s)
            )
            for name, module in linears.items()
        ]
        for x in inputs:
            block(x, position_embeddings=rotary, position_ids=positions)
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():
            module.weight.data = prune(module.weight.data, statistics[name])
        inputs = [block(x, position_embeddings=rotary, position_ids=positions) for x in inputs]
        inputs = [x[0] if isinstance(x, tuple) else x for x in inputs]
    model.to(torch.float16).save_pretrained(args.out)
    print(json.dumps({"seconds": time.perf_counter() - begun}))
