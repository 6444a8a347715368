//! Why text could not become tokens, or tokens text. Lines of training files have their own error, `dataset::BadLine`.

use std::path::PathBuf;

/// A variant exists where a caller would act differently: the first four end a start, the rest answer one request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    #[error("cannot read {}: {message}", path.display())]
    Read { path: PathBuf, message: String },
    #[error("{} is damaged: {message}", path.display())]
    Damaged { path: PathBuf, message: String },
    /// The tokenizer asks for something that is not built here. Refused by name rather than guessed.
    #[error("unsupported tokenizer: {0}")]
    Unsupported(String),
    /// The chat template itself does not compile.
    #[error("the chat template is broken: {0}")]
    BrokenTemplate(String),
    #[error(
        "this model has no chat template: start the server with --chat-template FILE (tandem train takes chat_template=FILE), \
         put a chat_template.jinja into the model's folder, or send a plain prompt to /v1/completions"
    )]
    NoChatTemplate,
    #[error(
        "the model's chat templates are named {0}, and none \"default\": name the one for a conversation without tools \
         so, or put it into chat_template.jinja"
    )]
    NoDefaultTemplate(String),
    /// The template compiled, but refused these messages (or arguments).
    #[error("the chat template refuses these messages: {0}")]
    Refused(String),
    /// The template would ignore a variable that the client set.
    #[error(
        "{name} has no effect: this model's chat template does not read it; it reads {reads}. Leave {name} out"
    )]
    UnreadVariable { name: String, reads: String },
    #[error(
        "this model's chat template does not write tools into the prompt: start the server with --chat-template FILE, one that \
         does (and with --tool-call-parser NAME, where the template does not show how the model writes calls)"
    )]
    NoTools,
    #[error("token {id} is not in the vocabulary of {vocab_size} tokens")]
    UnknownToken { id: u32, vocab_size: usize },
    #[error("this text cannot be tokenized: {0}")]
    Encode(String),
    /// A training row whose tokens would take too much memory while they are made.
    #[error("its text has {bytes} bytes, at most {most} are tokenized at once: make several rows of it")]
    TooLong { bytes: usize, most: usize },
    /// A training row of which nothing is left to learn after cutting. Callers skip and count these.
    #[error("no token with loss is left: the row has {tokens} tokens, max_seq_length is {max_seq_length}")]
    NoLabels { tokens: usize, max_seq_length: usize },
    #[error(
        "prompt_loss_weight weighs the prompt of {{\"prompt\": ..., \"completion\": ...}}, but the file has {shape}: leave it out"
    )]
    NoPrompt { shape: &'static str },
    /// Rows of another objective.
    #[error(
        "it is a row like {shape}, the job learns from {wanted}: give objective {suits}, or another file"
    )]
    OtherRows {
        shape: &'static str,
        wanted: &'static str,
        suits: &'static str,
    },
    /// The template rewrites earlier turns, so what an assistant turn adds cannot be told apart.
    #[error(
        "message {message}: the chat template changes earlier text when this message is added, so its tokens cannot be \
         found; set \"weight\": 0 on it or use another template"
    )]
    UnstableTemplate { message: usize },
    /// Such a template, and more turns than can be found one by one.
    #[error(
        "{turns} assistant turns are too many for this chat template, whose text for a message depends on what comes before: \
         split the conversation, or set \"weight\": 0 on most of them"
    )]
    TooManyTurns { turns: usize },
    #[error(
        "message {message}: the chat template leaves its reasoning out, so it would not be learned; write it into content, as the \
         model is to write it, or use another template"
    )]
    UnreadReasoning { message: usize },
}
