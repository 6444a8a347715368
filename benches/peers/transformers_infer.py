"""transformers as a peer for inference: sdpa, greedy, the whole model in one process.

Prints one JSON line with tokens per second: prefill_512, decode_1, decode_8 (256-token prompts), the keys of
`target/release/engine`.
"""

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", help="float32 where the processor has no bfloat16 arithmetic")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, attn_implementation="sdpa").eval()
    result = {}
    with torch.inference_mode():
        prefill(model, 512)  # oneDNN makes its kernels
        result["prefill_512"] = max(512 / prefill(model, 512) for _ in range(3))
        for streams in arguments.streams:
            result[f"decode_{streams}"] = decode(model, streams, 256, arguments.new_tokens)
    print(json.dumps(result))


def prompts(model, streams: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (streams, tokens))


def prefill(model, tokens: int) -> float:
    ids = prompts(model, 1, tokens)
    began = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began


def decode(model, streams: int, prompt_tokens: int, new_tokens: int) -> float:
    """Tokens per second over all streams, the prompts' time left out."""
    out = model(input_ids=prompts(model, streams, prompt_tokens), use_cache=True, logits_to_keep=1)
    ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    began = time.perf_counter()
    for _ in range(new_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids = out.logits[:, -1:].argmax(-1)
    return streams * new_tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
