"""peft as a peer for mixed adapters: 8 rows over 4 LoRA adapters in one batch (`adapter_names`), 256-token prompts.

Prints one JSON line: decode_8_base and decode_8_of_4_adapters, the keys of `target/release/engine`.
"""

import argparse
import json
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ROWS, ADAPTERS, PROMPT_TOKENS = 8, 4, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", help="float32 where the processor has no bfloat16 arithmetic")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    )
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="0", autocast_adapter_dtype=False)
    for number in range(1, ADAPTERS):
        model.add_adapter(str(number), config)
    model.to(getattr(torch, arguments.dtype)).eval()
    # peft's name for rows without an adapter.
    nobody, mixed = ["__base__"] * ROWS, [str(row % ADAPTERS) for row in range(ROWS)]
    with torch.inference_mode():
        decode(model, mixed, 2)  # oneDNN makes its kernels
        result = {
            "decode_8_base": decode(model, nobody, arguments.new_tokens),
            "decode_8_of_4_adapters": decode(model, mixed, arguments.new_tokens),
        }
    print(json.dumps(result))


def decode(model, adapters: list, new_tokens: int) -> float:
    """Tokens per second over all rows, the prompts' time left out."""
    prompt = torch.randint(3, model.config.vocab_size, (ROWS, PROMPT_TOKENS))
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1, adapter_names=adapters)
    ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    began = time.perf_counter()
    for _ in range(new_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, adapter_names=adapters)
        ids = out.logits[:, -1:].argmax(-1)
    return ROWS * new_tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
