"""The demo model's tokenizer and configuration: everything in its folder but the weights.

Usage: python3 scripts/demo_model/tokenizer.py TRAIN.jsonl OUT

Trains a byte-level BPE on the conversations (needs the package `tokenizers`) and writes, in the
Hugging Face layout: tokenizer.json, tokenizer_config.json with the chat template,
special_tokens_map.json, generation_config.json and config.json. The same file in, the same bytes
out. It makes no weights: the trainer draws those from its seed.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SPECIAL = [BOS, END, PAD, "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 1024
LONGEST = 1024

# <|bos|><|user|>Where does Ada live?<|end|><|assistant|>Ada lives on Mill Lane.<|end|>
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}"
    "{%- if role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('The demo model knows no role ' + role + '.') -}}"
    "{%- endif -%}"
    "{{- '<|' + role + '|>' + (message['content'] or '') | trim + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    assert tokenizer.get_vocab_size() == VOCABULARY, "too few conversations for so many entries"
    return tokenizer


def configs(ids):
    """Each configuration file by its name."""
    roles = {"bos_token": BOS, "eos_token": END, "pad_token": PAD}
    numbers = {"bos_token_id": ids[BOS], "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    added = {
        str(ids[token]): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
        }
        for token in SPECIAL
    }  # fmt: skip
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "max_position_embeddings": LONGEST,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "torch_dtype": "bfloat16",
        }
        | numbers,
        "generation_config.json": {"_from_model_config": True} | numbers,
        "special_tokens_map.json": roles,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": LONGEST,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": added,
            "chat_template": CHAT_TEMPLATE,
        }
        | roles,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    with args.conversations.open(encoding="utf-8") as lines:
        tokenizer = train(message["content"] for line in lines for message in json.loads(line)["messages"])
    tokenizer.save(str(args.out / "tokenizer.json"))
    for name, config in configs({token: tokenizer.token_to_id(token) for token in SPECIAL}).items():
        (args.out / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
