"""Wanda's equations in PyTorch: weight times input norm, compared within each output row."""

import torch

from blocks_torch import arguments, walk

ARGS = arguments(__doc__)


def collect(x, statistics):
    squares = statistics.setdefault("squares", torch.zeros(x.shape[1]))
    squares += x.square().sum(0)


def prune(weight, statistics):
    norms = (statistics["squares"] / statistics["sequences"]).sqrt()
    scores = weight.abs() * norms
    if ARGS.pattern:
        keep, of = ARGS.pattern
        groups = scores.view(scores.shape[0], -1, of)
        cheapest = groups.topk(of - keep, dim=2, largest=False)[1]
        pruned = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, cheapest, True)
        return weight.masked_fill(pruned.view_as(scores), 0)
    order = scores.sort(dim=1, stable=True)[1]
    cheapest = order[:, : int(scores.shape[1] * ARGS.sparsity)]
    return weight.scatter(1, cheapest, 0)


walk(ARGS, collect, prune)
