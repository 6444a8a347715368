//! What models write for reasoning before an answer. Not here: reading it out of an answer, binding what comes behind it
//! (`tools`).

/// How a family of models writes its reasoning: between two texts, at the beginning of its answer.
#[derive(Debug)]
pub struct ReasoningFormat {
    /// vLLM's `--reasoning-parser`; the first is ours.
    pub names: &'static [&'static str],
    /// A text of a chat template that shows the format. Empty: it is chosen by name alone.
    pub shows: &'static str,
    pub open: &'static [&'static str],
    pub close: &'static [&'static str],
    /// An answer begins with reasoning even where nothing opens it.
    pub is_always: bool,
    /// A tool call ends reasoning that was not closed.
    pub ends_with_call: bool,
    /// Parts of an answer are channels (gpt-oss): reasoning can be anywhere in it.
    pub has_channels: bool,
}

const THINK: ReasoningFormat = ReasoningFormat {
    names: &[],
    shows: "",
    open: &["<think>"],
    close: &["</think>"],
    is_always: false,
    ends_with_call: false,
    has_channels: false,
};

/// A template is looked at in this order. (vLLM's vllm/reasoning, and the models' chat templates.)
pub static FORMATS: &[ReasoningFormat] = &[
    ReasoningFormat {
        names: &["openai_gptoss"],
        shows: "<|channel|>",
        open: &["<|channel|>analysis<|message|>"],
        close: &["<|end|>"],
        has_channels: true,
        ..THINK
    },
    ReasoningFormat {
        names: &["mistral"],
        shows: "[/THINK]",
        open: &["[THINK]"],
        close: &["[/THINK]"],
        ..THINK
    },
    ReasoningFormat {
        names: &["cohere_command3", "cohere_command4"],
        shows: "<|END_THINKING|>",
        open: &["<|START_THINKING|>"],
        close: &["<|END_THINKING|>"],
        ends_with_call: true,
        ..THINK
    },
    ReasoningFormat {
        names: &["seed_oss"],
        shows: "</seed:think>",
        open: &["<seed:think>"],
        close: &["</seed:think>"],
        ..THINK
    },
    ReasoningFormat {
        names: &["gemma4"],
        shows: "<channel|>",
        open: &["<|channel>thought\n"],
        close: &["<channel|>"],
        ends_with_call: true,
        ..THINK
    },
    ReasoningFormat {
        names: &["granite"],
        shows: "Here is my thought process:",
        open: &["Here is my thought process:", "Here's my thought process:"],
        close: &["Here is my response:", "Here's my response:"],
        ..THINK
    },
    ReasoningFormat {
        names: &[
            "qwen3",
            "glm45",
            "glm47",
            "kimi_k2",
            "mimo",
            "step3p5",
            "nemotron_v3",
        ],
        shows: "</think>",
        ends_with_call: true,
        ..THINK
    },
    ReasoningFormat {
        names: &["deepseek_v3", "olmo3", "ernie45", "hy_v3", "holo2"],
        ..THINK
    },
    ReasoningFormat {
        names: &["deepseek_r1", "minimax_m2", "step3"],
        is_always: true,
        ..THINK
    },
];

impl ReasoningFormat {
    /// By a name of `--reasoning-parser`.
    pub fn named(name: &str) -> Option<&'static ReasoningFormat> {
        FORMATS.iter().find(|format| format.names.contains(&name))
    }

    /// The format that a chat template shows.
    pub fn of_template(template: &str) -> Option<&'static ReasoningFormat> {
        let shown = |format: &&ReasoningFormat| !format.shows.is_empty() && template.contains(format.shows);
        FORMATS.iter().find(shown)
    }

    /// What `named` knows.
    pub fn all_names() -> Vec<&'static str> {
        FORMATS.iter().flat_map(|format| format.names).copied().collect()
    }

    /// Whether an answer behind this prompt goes on with reasoning, or begins with it by itself.
    pub fn is_opened_by(&self, prompt: &str) -> bool {
        !self.has_channels && (ends_with(prompt, self.open) || self.is_always && !self.is_ended_by(prompt))
    }

    /// Whether the prompt ended the reasoning: an answer behind it has none.
    pub fn is_ended_by(&self, prompt: &str) -> bool {
        !self.has_channels && ends_with(prompt, self.close)
    }
}

fn ends_with(prompt: &str, marks: &[&str]) -> bool {
    let prompt = prompt.trim_end();
    marks.iter().any(|mark| prompt.ends_with(mark.trim_end()))
}
