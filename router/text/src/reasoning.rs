//! What models write for reasoning before an answer. Not here: reading it out of an answer (`tools`).

/// How a family of models writes its reasoning: between two texts, at the beginning of its answer.
#[derive(Debug)]
pub struct ReasoningFormat {
    /// vLLM's `--reasoning-parser`; the first is ours.
    pub names: &'static [&'static str],
    pub open: &'static str,
    pub close: &'static str,
    /// An answer begins with reasoning even where `open` is not written.
    pub always: bool,
}

pub static FORMATS: &[ReasoningFormat] = &[
    ReasoningFormat {
        names: &["qwen3"],
        open: "<think>",
        close: "</think>",
        always: false,
    },
    ReasoningFormat {
        names: &["deepseek_r1"],
        open: "<think>",
        close: "</think>",
        always: true,
    },
];

impl ReasoningFormat {
    /// By a name of `--reasoning-parser`.
    pub fn named(name: &str) -> Option<&'static ReasoningFormat> {
        FORMATS.iter().find(|format| format.names.contains(&name))
    }

    /// The format that a chat template shows.
    pub fn of_template(template: &str) -> Option<&'static ReasoningFormat> {
        FORMATS.iter().find(|format| template.contains(format.close))
    }

    /// What `named` knows.
    pub fn all_names() -> Vec<&'static str> {
        FORMATS.iter().flat_map(|format| format.names).copied().collect()
    }

    /// Whether a prompt ends within reasoning, so that the answer goes on with it.
    pub fn is_opened_by(&self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(self.open)
    }
}
