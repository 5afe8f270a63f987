"""llm-compressor's side of the GPTQ benchmark: 4 bits, group 128, on its CPU path.

Reads the checkpoint and the pre-tokenised windows that make_llama.py wrote; prints JSON with
seconds and peak resident MB.
"""

import argparse
import json
import pathlib
import resource
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

# The windows are token ids already; the collator only wants some tokenizer to exist.
TOKENIZER = pathlib.Path(__file__).resolve().parents[2] / "samples" / "almanac-3m"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    windows = json.loads((args.model / "calibration.json").read_text())
    dataset = Dataset.from_dict(
        {"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]}
    )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    recipe = GPTQModifier(targets="Linear", scheme="W4A16_ASYM", ignore=["lm_head"], actorder=None)
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
    )
    model.save_pretrained(args.out, save_compressed=True)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - start,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
