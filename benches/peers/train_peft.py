"""peft as a peer for LoRA training: r 16 on all linear layers, AdamW, 4 x 512 tokens a step, loss on every token.

Prints one JSON line: train_tok_s and train_peak_rss_mb, the keys of `target/release/engine`.
"""

import argparse
import json
import resource
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="measured, after one that is not")
    parser.add_argument("--dtype", default="bfloat16", help="float32 where the processor has no bfloat16 arithmetic")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    )
    # autocast_adapter_dtype keeps A, B and their moments in float32, peft's default.
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        ids = torch.randint(3, base.config.vocab_size, (4, 512))
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    step()
    seconds = min(step() for _ in range(arguments.steps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"train_tok_s": 4 * 512 / seconds, "train_peak_rss_mb": peak}))


if __name__ == "__main__":
    main()
