"""SparseGPT's equations in PyTorch: Hessian per linear, threshold per block of 128 columns over all
rows, columns pruned one by one with the others making up for them."""

import torch

from blocks_torch import arguments, walk

BLOCK = 128
ARGS = arguments(__doc__)


def collect(x, statistics):
    gram = statistics.setdefault("gram", torch.zeros(x.shape[1], x.shape[1]))
    gram.addmm_(x.T, x)


def prune(weight, statistics):
    w = weight.clone()
    hessian = statistics["gram"] * (2 / statistics["sequences"])
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    w[:, dead] = 0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    width = w.shape[1]
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        here, u = w[:, start:end].clone(), upper[start:end, start:end]
        errors = torch.zeros_like(here)
        diagonal = u.diagonal()
        pruned = torch.zeros_like(here, dtype=torch.bool)
        if ARGS.pattern is None:
            scores = here**2 / diagonal**2
            order = scores.flatten().sort()[0]
            pruned = scores <= order[int(scores.numel() * ARGS.sparsity)]
        for i in range(end - start):
            if ARGS.pattern and i % ARGS.pattern[1] == 0:
                keep, of = ARGS.pattern
                scores = here[:, i : i + of] ** 2 / diagonal[i : i + of] ** 2
                cheapest = scores.topk(of - keep, dim=1, largest=False)[1]
                pruned.scatter_(1, i + cheapest, True)
            column = here[:, i]
            error = torch.where(pruned[:, i], column, 0) / diagonal[i]
            here[:, i:] -= error[:, None] * u[i, i:][None]
            here[:, i][pruned[:, i]] = 0
            errors[:, i] = error
        w[:, start:end] = here
        w[:, end:] -= errors @ upper[start:end, end:]
    return w


walk(ARGS, collect, prune)
