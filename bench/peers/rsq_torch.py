"""RSQ in PyTorch on the CPU: the same equations as `strata quantize --method rsq`, for one random Llama.

Rotation by a randomised Hadamard matrix in f64, attention concentration from whole attention
probabilities of one sequence at a time, weighted Hessians, GPTQ with a symmetric grid per row and
the clipping search. Blocks run in stages, so that every activation is computed once, as in Strata;
GPTQ factorises in f32, as its reference code does. Reads a checkpoint and the windows that
make_llama.py wrote, writes a checkpoint, prints JSON with seconds and peak resident MB.
"""

import argparse
import json
import math
import pathlib
import resource
import shutil
import time

import torch
from safetensors.torch import load_file, save_file

PERCDAMP, BLOCK, R_MIN, NORM = 0.01, 128, 0.01, 2.4


def paley_one(order):
    """Hadamard matrix of order q + 1 for a prime q = 3 mod 4."""
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    h = torch.eye(order, dtype=torch.float64)
    for i in range(order):
        for j in range(order):
            if i == j:
                continue
            h[i, j] = 1 if i == 0 else -1 if j == 0 else 1 if (i - j) % q in squares else -1
    return h


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def hadamard(n):
    odd = n
    while odd % 2 == 0:
        odd //= 2
    order = 1 if odd == 1 else 4 * odd
    while order > 1 and not (order % 4 == 0 and is_prime(order - 1)):
        order *= 2
    h = torch.ones(1, 1, dtype=torch.float64) if order == 1 else paley_one(order)
    while h.shape[0] < n:
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return h


def rotate(tensors, config):
    """Folds the norms and rotates residual stream and value heads, in f64."""
    d = config["hidden_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    hd = config.get("head_dim") or d // heads
    signs = torch.randint(0, 2, (d,), dtype=torch.float64) * 2 - 1
    q = signs[:, None] * hadamard(d) / math.sqrt(d)
    h = hadamard(hd) / math.sqrt(hd)

    def reads(name, gain):
        w = tensors[name].double() * tensors[gain].double()
        tensors[name] = w @ q

    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for part in ("q", "k", "v"):
            reads(f"{p}self_attn.{part}_proj.weight", f"{p}input_layernorm.weight")
        for part in ("gate", "up"):
            reads(f"{p}mlp.{part}_proj.weight", f"{p}post_attention_layernorm.weight")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{p}{norm}.weight"] = torch.ones(d)
        v = tensors[f"{p}self_attn.v_proj.weight"].view(kv, hd, d)
        tensors[f"{p}self_attn.v_proj.weight"] = (h @ v).reshape(kv * hd, d)
        o = q.T @ tensors[f"{p}self_attn.o_proj.weight"].double()
        tensors[f"{p}self_attn.o_proj.weight"] = (o.view(d, heads, hd) @ h.T).reshape(d, -1)
        down = f"{p}mlp.down_proj.weight"
        tensors[down] = q.T @ tensors[down].double()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].double() @ q
    reads("lm_head.weight", "model.norm.weight")
    tensors["model.norm.weight"] = torch.ones(d)
    for name in tensors:
        tensors[name] = tensors[name].float()


def norm(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def grid(w, bits):
    """Symmetric scale per row with the clipping search; maxq and scale."""
    maxq = 2 ** (bits - 1) - 1
    full = w.abs().amax(1).clamp(min=1e-5)
    best = torch.full_like(full, float("inf"))
    scale = full / maxq
    for i in range(80):
        s = full * (1 - i / 100) / maxq
        quantized = torch.clamp(torch.round(w / s[:, None]), -maxq - 1, maxq) * s[:, None]
        error = (quantized - w).abs_().pow_(NORM).sum(1)
        better = error < best
        best[better] = error[better]
        scale[better] = s[better]
    return scale, maxq


def gptq(w, hessian, bits):
    """The quantised weight; `hessian` is used up."""
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w = w.clone()
    w[:, dead] = 0
    scale, maxq = grid(w, bits)
    hessian.diagonal().add_(PERCDAMP * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    out = torch.zeros_like(w)
    columns = w.shape[1]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        w1 = w[:, start:end].clone()
        errors = torch.zeros_like(w1)
        u1 = upper[start:end, start:end]
        for i in range(end - start):
            column = w1[:, i]
            q = torch.clamp(torch.round(column / scale), -maxq - 1, maxq) * scale
            out[:, start + i] = q
            error = (column - q) / u1[i, i]
            w1[:, i:] -= error[:, None] * u1[i, i:][None, :]
            errors[:, i] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    return out


class Block:
    def __init__(self, tensors, index, config):
        self.p = f"model.layers.{index}."
        self.t, self.c = tensors, config
        d = config["hidden_size"]
        self.heads, self.kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.hd = config.get("head_dim") or d // self.heads
        self.eps = config["rms_norm_eps"]

    def linear(self, name, x):
        return x @ self.t[f"{self.p}{name}.weight"].T

    def queries_and_keys(self, x, cos, sin):
        n = x.shape[0]
        q = self.linear("self_attn.q_proj", x).view(n, self.heads, self.hd).transpose(0, 1)
        k = self.linear("self_attn.k_proj", x).view(n, self.kv, self.hd).transpose(0, 1)
        k = rope(k, cos, sin).repeat_interleave(self.heads // self.kv, 0)
        return rope(q, cos, sin), k

    def weights(self, x, cos, sin):
        """Token weights of one sequence by attention concentration."""
        q, k = self.queries_and_keys(x, cos, sin)
        n = x.shape[0]
        scores = q @ k.transpose(1, 2) / math.sqrt(self.hd)
        mask = torch.full((n, n), float("-inf")).triu(1)
        s = (scores + mask).softmax(-1).sum((0, 1))
        r = R_MIN + (1 - R_MIN) * (s - s.min()) / (s.max() - s.min())
        return r * n / r.sum()

    def attend(self, x, cos, sin):
        q, k = self.queries_and_keys(x, cos, sin)
        n = x.shape[0]
        v = self.linear("self_attn.v_proj", x).view(n, self.kv, self.hd).transpose(0, 1)
        v = v.repeat_interleave(self.heads // self.kv, 0)
        y = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
        return y[0].transpose(0, 1).reshape(n, -1)

    def expand(self, x):
        gate = torch.nn.functional.silu(self.linear("mlp.gate_proj", x))
        return gate * self.linear("mlp.up_proj", x)

    def quantize(self, names, inputs, weights, bits):
        hessian = torch.zeros(inputs[0].shape[1], inputs[0].shape[1])
        for n, (x, w) in enumerate(zip(inputs, weights)):
            x = x * w.sqrt()[:, None]
            hessian *= n / (n + 1)
            hessian += 2 / (n + 1) * (x.T @ x)
        for name in names:
            key = f"{self.p}{name}.weight"
            self.t[key] = gptq(self.t[key], hessian.clone(), bits)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = json.loads((args.model / "config.json").read_text())
    windows = json.loads((args.model / "calibration.json").read_text())
    start = time.perf_counter()
    tensors = {}
    for file in sorted(args.model.glob("*.safetensors")):
        tensors.update(load_file(file))
    rotate(tensors, config)
    rotated = time.perf_counter()
    length = len(windows[0])
    rotary = config.get("rope_parameters") or config
    hd = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    inverse = rotary["rope_theta"] ** (-torch.arange(0, hd, 2).float() / hd)
    angles = torch.outer(torch.arange(length).float(), inverse).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    stream = [tensors["model.embed_tokens.weight"][torch.tensor(w)] for w in windows]
    for index in range(config["num_hidden_layers"]):
        b = Block(tensors, index, config)
        x = [norm(h, b.eps) for h in stream]
        weights = [b.weights(h, cos, sin) for h in x]
        b.quantize([f"self_attn.{n}_proj" for n in "qkv"], x, weights, args.bits)
        x = [b.attend(h, cos, sin) for h in x]
        b.quantize(["self_attn.o_proj"], x, weights, args.bits)
        stream = [h + b.linear("self_attn.o_proj", y) for h, y in zip(stream, x)]
        x = [norm(h, b.eps) for h in stream]
        b.quantize(["mlp.gate_proj", "mlp.up_proj"], x, weights, args.bits)
        x = [b.expand(h) for h in x]
        b.quantize(["mlp.down_proj"], x, weights, args.bits)
        stream = [h + b.linear("mlp.down_proj", y) for h, y in zip(stream, x)]
    args.out.mkdir(parents=True, exist_ok=True)
    dtype = torch.float16
    save_file(
        {name: t.to(dtype).contiguous() for name, t in tensors.items()},
        args.out / "model.safetensors",
        metadata={"format": "pt"},
    )
    seconds = time.perf_counter() - start
    for name in ("config.json", "generation_config.json"):
        if (args.model / name).exists():
            shutil.copy(args.model / name, args.out / name)
    result = {
        "seconds": seconds,
        "rotation": rotated - start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    (args.out / "bench.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
