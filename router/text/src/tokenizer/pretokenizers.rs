//! How byte-level BPE cuts a text into words before it merges within each, by the names that GGUF files have for it
//! (`tokenizer.ggml.pre`). Reference: src/llama-vocab.cpp of llama.cpp, whose comments quote the original tokenizer.json's
//! expressions; these are used where they differ from llama.cpp's.

pub struct Pretokenizer {
    pub names: &'static [&'static str],
    /// Each cuts what the one before it left whole.
    pub splits: &'static [&'static str],
    /// A word that is a token is taken without merges (tiktoken's way).
    pub takes_whole_words: bool,
    /// A text begins with BOS.
    pub adds_bos: bool,
    /// Text is composed first (NFC). A GGUF does not say so; the published tokenizers of this name do.
    pub composes: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: Pretokenizer = Pretokenizer {
    names: &[],
    splits: &[],
    takes_whole_words: false,
    adds_bos: false,
    composes: false,
};

pub const KNOWN: [Pretokenizer; 11] = [
    Pretokenizer {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        splits: &[LLAMA3],
        takes_whole_words: true,
        adds_bos: true,
        ..PLAIN
    },
    Pretokenizer {
        names: &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"],
        splits: &[LLAMA3],
        ..PLAIN
    },
    Pretokenizer {
        names: &["qwen2"],
        splits: &[QWEN2],
        composes: true,
        ..PLAIN
    },
    Pretokenizer {
        names: &["deepseek-r1-qwen", "stablelm2", "megrez", "kormo", "hunyuan"],
        splits: &[QWEN2],
        ..PLAIN
    },
    Pretokenizer {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        splits: &[r"\p{N}", GPT2],
        ..PLAIN
    },
    Pretokenizer {
        names: &[
            "gpt-2",
            "mpt",
            "olmo",
            "phi-2",
            "exaone4",
            "a.x-4.0",
            "mellum",
            "trillion",
            "granite-docling",
        ],
        splits: &[GPT2],
        ..PLAIN
    },
    Pretokenizer {
        names: &["tekken"],
        splits: &[TEKKEN],
        takes_whole_words: true,
        adds_bos: true,
        ..PLAIN
    },
    Pretokenizer {
        names: &["gpt-4o", "llama4", "kanana2"],
        splits: &[GPT4O],
        ..PLAIN
    },
    Pretokenizer {
        names: &["deepseek-coder"],
        splits: &[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u{4E00}-\u{9FA5}\u{0800}-\u{4E00}\u{AC00}-\u{D7FF}]+",
            r"\p{N}",
        ],
        ..PLAIN
    },
    Pretokenizer {
        names: &["falcon"],
        splits: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
        ..PLAIN
    },
    Pretokenizer {
        names: &["default"],
        splits: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ..PLAIN
    },
];

pub fn named(name: &str) -> Option<&'static Pretokenizer> {
    KNOWN.iter().find(|known| known.names.contains(&name))
}

/// For errors.
pub fn names() -> String {
    let names: Vec<&str> = KNOWN.iter().flat_map(|known| known.names).copied().collect();
    names.join(", ")
}
