"""Write a random Llama checkpoint (f16, sharded) and pre-tokenised calibration windows.

Both sides of a benchmark read the same files. Sizes: 15m, 150m, 500m, 1100m.
"""

import argparse
import json
import pathlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    # hidden, ffn, layers, heads, kv heads, vocabulary
    "15m": (288, 768, 6, 6, 2, 32000),
    "150m": (768, 2048, 12, 12, 12, 16000),
    "500m": (1280, 3456, 22, 20, 20, 16000),
    "1100m": (2048, 5632, 22, 32, 4, 32000),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float16")
    args = parser.parse_args()
    hidden, ffn, layers, heads, kv, vocab = SIZES[args.size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Trained weights have a few strong input channels; plain noise would make every method equal.
        for name, weight in model.named_parameters():
            if name.endswith("layernorm.weight"):
                weight.mul_(torch.exp(0.5 * torch.randn_like(weight)))
    model = model.to(getattr(torch, args.dtype))
    model.save_pretrained(args.out, max_shard_size="400MB")
    ids = torch.randint(3, vocab, (args.samples, args.length)).tolist()
    (args.out / "calibration.json").write_text(json.dumps(ids))
    print(args.out, sum(p.numel() for p in model.parameters()), "parameters")


if __name__ == "__main__":
    main()
