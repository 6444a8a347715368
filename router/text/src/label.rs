//! Training rows to tokens with loss weights, through the same template and tokenizer that serve. Not here: parsing
//! (`dataset`), the loss.
//!
//! The rule: what the model reads at serving time is the prompt here, token for token where the tokenizer allows it,
//! and what it must then write, its end of turn included, carries the weight. A prompt and its completion are one text, as
//! in TRL: where a token lies in both, or the template writes a prompt that is answered otherwise than one that waits, the
//! completion begins where the tokens of prompt and whole diverge.

use std::ops::Range;

use serde_json::Value as Json;
use tandem_core::dataset::{Example, Group};
use tandem_core::job::Rows;
use tandem_core::settings::Settings;

use crate::chat::{ChatTemplate, Ending, Kwargs, Message};
use crate::dataset::{Kind, Row, Sample, Seam};
use crate::error::TextError;
use crate::tokenizer::{Placed, SpecialTokens, Tokenizer};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Longer rows are cut at the end.
    pub max_seq_length: u32,
    /// Rows are not cut one by one: they are one text, in blocks of that length.
    pub wraps: bool,
    /// Loss weight of the prompt of prompt/completion rows; 0 for other rows, which have none.
    pub prompt_loss_weight: f32,
    /// Every token of every row has loss.
    pub train_on_input: bool,
    /// What the job's objective learns from.
    pub rows: Rows,
}

impl Options {
    pub fn new(settings: &Settings, max_seq_length: u32, rows: Rows) -> Options {
        Options {
            max_seq_length,
            wraps: settings.wraps(),
            prompt_loss_weight: settings.prompt_loss_weight.unwrap_or(0.0) as f32,
            train_on_input: settings.train_on_input.unwrap_or(false),
            rows,
        }
    }

    /// Tokens of one row at most.
    pub fn row_limit(&self) -> usize {
        match self.wraps {
            true => usize::MAX,
            false => self.max_seq_length as usize,
        }
    }
}

/// A row as tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    pub group: Group,
    /// Of its longest example, before it was cut.
    pub whole_tokens: usize,
    /// The tokens of a prompt by itself are not what those of the whole begin with.
    pub diverges: bool,
}

/// A row as tokens, before it is cut.
struct Whole {
    tokens: Vec<u32>,
    weights: Vec<f32>,
    /// Where there is one that is tokenised together with what answers it.
    prompt: Option<Prompt>,
}

#[derive(Clone, Copy)]
struct Prompt {
    /// With which the row begins.
    tokens: usize,
    diverges: bool,
}

/// Text of one row at most: a tokenizer takes about a hundred times as much memory meanwhile, and it is more than a million
/// tokens, which no model reads at once.
const MAX_TEXT_BYTES: usize = 4 << 20;
/// What finding the turns of one row may render at most, where each turn takes all before it: some seconds.
const MAX_RENDERED_BYTES: usize = 1 << 30;
/// What rendering a message costs beside its text, as so many bytes of it.
const MESSAGE_COST_BYTES: usize = 512;

/// What the objective gets of a row of the file; errors as [`tokenize`].
pub fn group(sample: &Sample, tokenizer: &Tokenizer, options: &Options) -> Result<Labelled, TextError> {
    suits(sample, options.rows)?;
    let whole = |row: &Row| whole(row, tokenizer, options);
    let (wholes, value) = match sample {
        Sample::Example(row) => (vec![whole(row)?], 0.0),
        Sample::Pair { chosen, rejected } => {
            let mut pair = [whole(chosen)?, whole(rejected)?];
            share_prompt(&mut pair);
            (pair.into(), 0.0)
        }
        Sample::Judged { row, is_desirable } => {
            let value = match options.rows {
                Rows::Judged => f32::from(u8::from(*is_desirable)),
                _ => 0.0,
            };
            (vec![whole(row)?], value)
        }
        Sample::Rewarded { row, reward } => (vec![whole(row)?], *reward),
    };
    let whole_tokens = wholes.iter().map(|whole| whole.tokens.len()).max().unwrap_or(0);
    let diverges = wholes
        .iter()
        .any(|whole| whole.prompt.is_some_and(|prompt| prompt.diverges));
    let examples = wholes.into_iter().map(|whole| cut(whole, options));
    Ok(Labelled {
        group: Group {
            examples: examples.collect::<Result<_, _>>()?,
            value,
        },
        whole_tokens,
        diverges,
    })
}

/// The prompt of both is the shorter one, as in TRL.
fn share_prompt(pair: &mut [Whole; 2]) {
    let [Some(a), Some(b)] = [&pair[0], &pair[1]].map(|whole| whole.prompt) else {
        return;
    };
    let shared = a.tokens.min(b.tokens);
    for (whole, prompt) in pair.iter_mut().zip([a, b]) {
        whole.weights[shared..prompt.tokens].fill(1.0);
    }
}

/// Whether an objective learns from such a row.
pub fn suits(sample: &Sample, rows: Rows) -> Result<(), TextError> {
    match (rows, sample) {
        (Rows::Examples, Sample::Example(_))
        // It asks for what is done anyway.
        | (Rows::Examples, Sample::Judged { is_desirable: true, .. })
        | (Rows::Pairs, Sample::Pair { .. })
        | (Rows::Judged, Sample::Judged { .. })
        | (Rows::Rewarded, Sample::Rewarded { .. }) => Ok(()),
        (wanted, sample) => Err(TextError::OtherRows {
            shape: sample.kind().shape(),
            wanted: match wanted {
                Rows::Examples => "examples without label and reward (objective sft)",
                Rows::Pairs => "prompt, chosen and rejected (objectives dpo, orpo, cpo, simpo)",
                Rows::Judged => "examples with label (objective kto)",
                Rows::Rewarded => "examples with reward (objective reward_weighted)",
            },
            suits: match sample.kind() {
                Kind::Chat | Kind::Completion | Kind::Text => "sft",
                Kind::Pair => "dpo, orpo, cpo or simpo",
                Kind::Judged => "kto",
                Kind::Rewarded => "reward_weighted",
            },
        }),
    }
}

fn whole(row: &Row, tokenizer: &Tokenizer, options: &Options) -> Result<Whole, TextError> {
    let Options {
        max_seq_length: _,
        wraps: _,
        prompt_loss_weight,
        train_on_input,
        rows: _,
    } = *options;
    if prompt_loss_weight != 0.0 && row.kind() != Kind::Completion {
        return Err(TextError::NoPrompt {
            shape: row.kind().shape(),
        });
    }
    let mut row = match row {
        Row::Chat { messages, tools } => chat(messages, tools, tokenizer)?,
        Row::Answer {
            messages,
            n_prompt,
            tools,
        } => answer(messages, *n_prompt, tools, tokenizer)?,
        Row::Completion {
            prompt,
            completion,
            seam,
        } => completion_row(prompt, completion, *seam, tokenizer, prompt_loss_weight)?,
        Row::Text { text } => {
            must_fit(text.len())?;
            let tokens = end(tokenizer.encode(text, SpecialTokens::Add)?, tokenizer);
            let weights = vec![1.0; tokens.len()];
            Whole {
                tokens,
                weights,
                prompt: None,
            }
        }
    };
    if train_on_input {
        row.weights.fill(1.0);
    }
    Ok(row)
}

/// `NoLabels` when nothing with a weight is left: callers skip and count it. Other errors of a row concern the whole file.
fn cut(whole: Whole, options: &Options) -> Result<Example, TextError> {
    let Whole {
        mut tokens,
        mut weights,
        prompt: _,
    } = whole;
    let n_tokens = tokens.len();
    let max_seq_length = options.row_limit();
    // What a block has behind its last label is what the next row begins behind.
    if options.wraps {
        return match weights.iter().any(|&weight| weight != 0.0) {
            true => Ok(Example { tokens, weights }),
            false => Err(TextError::NoLabels {
                tokens: n_tokens,
                max_seq_length,
            }),
        };
    }
    // Nothing after the last label can change the loss: attention is causal.
    let last_label = weights
        .iter()
        .take(max_seq_length)
        .rposition(|&weight| weight != 0.0);
    let kept = last_label.filter(|&last| last > 0).map_or(0, |last| last + 1); // the first token is never predicted
    tokens.truncate(kept);
    weights.truncate(kept);
    match kept {
        0 => Err(TextError::NoLabels {
            tokens: n_tokens,
            max_seq_length,
        }),
        _ => Ok(Example { tokens, weights }),
    }
}

fn must_fit(bytes: usize) -> Result<(), TextError> {
    let most = MAX_TEXT_BYTES;
    match bytes <= most {
        true => Ok(()),
        false => Err(TextError::TooLong { bytes, most }),
    }
}

/// Appends EOS where the tokenizer did not.
fn end(mut tokens: Vec<u32>, tokenizer: &Tokenizer) -> Vec<u32> {
    if let Some((eos, _)) = tokenizer.eos().filter(|(eos, _)| tokens.last() != Some(eos)) {
        tokens.push(eos);
    }
    tokens
}

/// [`Seam::Together`]: what TRL makes of the row. [`Seam::Apart`]: the prompt's tokens are exactly those a client's prompt gets, and
/// where those of both texts as one begin otherwise, the completion is encoded as a continuation.
fn completion_row(
    prompt: &str,
    completion: &str,
    seam: Seam,
    tokenizer: &Tokenizer,
    prompt_loss_weight: f32,
) -> Result<Whole, TextError> {
    must_fit(prompt.len() + completion.len())?;
    let prompt_tokens = without_end(tokenizer.encode(prompt, SpecialTokens::Add)?, tokenizer);
    let mut whole = tokenizer.encode(&format!("{prompt}{completion}"), SpecialTokens::Add)?;
    let mut prompt = common(&prompt_tokens, &whole);
    if prompt.diverges
        && seam == Seam::Apart
        && let Some(continuation) = tokenizer.encode_continuation(completion)?
    {
        prompt = Prompt {
            tokens: prompt_tokens.len(),
            diverges: false,
        };
        whole = [prompt_tokens, continuation].concat();
    }
    let tokens = end(whole, tokenizer);
    let mut weights = vec![1.0; tokens.len()];
    weights[..prompt.tokens].fill(prompt_loss_weight);
    Ok(Whole {
        tokens,
        weights,
        prompt: Some(prompt),
    })
}

/// What a row has of its prompt: the tokens with which both begin.
fn common(prompt: &[u32], whole: &[u32]) -> Prompt {
    let tokens = prompt.iter().zip(whole).take_while(|(a, b)| a == b).count();
    Prompt {
        tokens,
        diverges: tokens < prompt.len(),
    }
}

/// A tokenizer that adds EOS by itself adds it to a prompt too.
fn without_end(mut tokens: Vec<u32>, tokenizer: &Tokenizer) -> Vec<u32> {
    if tokenizer
        .eos()
        .is_some_and(|(eos, _)| tokens.len() > 1 && tokens.last() == Some(&eos))
    {
        tokens.pop();
    }
    tokens
}

fn chat(messages: &[Message], tools: &[Json], tokenizer: &Tokenizer) -> Result<Whole, TextError> {
    let kwargs = &of_tools(tools);
    let template = tokenizer.chat_template(kwargs)?;
    let text = template.render(messages, Ending::Closed, kwargs)?;
    must_fit(text.len())?;
    let placed = tokenizer.encode_placed(&text, SpecialTokens::Omit)?;
    let tokens: Vec<u32> = placed.iter().map(|token| token.id).collect();
    let mut weights = vec![0.0; tokens.len()];
    let mut reached = 0;
    for turn in assistant_turns(messages, template, kwargs, &text)? {
        let span = labelled(&placed, reached, turn, &text, tokenizer);
        reached = span.start;
        weights[span].fill(1.0);
    }
    let whole = Whole {
        tokens,
        weights,
        prompt: None,
    };
    let is_closed = whole
        .tokens
        .last()
        .is_some_and(|&token| tokenizer.is_special(token));
    Ok(closed(whole, is_closed, tokenizer))
}

fn of_tools(tools: &[Json]) -> Kwargs {
    let tools = (!tools.is_empty()).then(|| ("tools".to_owned(), Json::from(tools)));
    Kwargs::from_iter(tools)
}

/// A template that never closes the last turn would teach to go on for ever.
fn closed(mut whole: Whole, is_closed: bool, tokenizer: &Tokenizer) -> Whole {
    let ends_open = whole.weights.last() == Some(&1.0) && !is_closed;
    if let Some((eos, _)) = tokenizer.eos().filter(|_| ends_open) {
        whole.tokens.push(eos);
        whole.weights.push(1.0);
    }
    whole
}

/// All behind the prompt, what a template writes after the end of turn, too: TRL's, whose rows these are. An answer in which
/// others than the assistant speak is learned by its turns, and so is one that opens the conversation.
fn answer(
    messages: &[Message],
    n_prompt: usize,
    tools: &[Json],
    tokenizer: &Tokenizer,
) -> Result<Whole, TextError> {
    let (asked, said) = messages.split_at(n_prompt);
    if asked.is_empty() || !said.iter().all(is_learned) {
        return chat(messages, tools, tokenizer);
    }
    let kwargs = &of_tools(tools);
    let template = tokenizer.chat_template(kwargs)?;
    let text = template.render(messages, Ending::Closed, kwargs)?;
    must_fit(text.len())?;
    let opening = template.render(asked, Ending::GenerationPrompt, kwargs)?;
    let same = opening.chars().zip(text.chars()).take_while(|(a, b)| a == b);
    let shared: usize = same.map(|(a, _)| a.len_utf8()).sum();
    let is_unread = |message: &Message| {
        let reasoning = message.reasoning().unwrap_or_default().trim();
        !text[shared..].contains(reasoning)
    };
    if let Some(i) = said.iter().position(is_unread) {
        return Err(TextError::UnreadReasoning {
            message: n_prompt + i + 1,
        });
    }
    let tokens = tokenizer.encode(&text, SpecialTokens::Omit)?;
    let prompt = common(&tokenizer.encode(&opening, SpecialTokens::Omit)?, &tokens);
    let mut weights = vec![1.0; tokens.len()];
    weights[..prompt.tokens].fill(0.0);
    // ChatML has a newline behind it.
    let last = tokens.iter().rev().find(|&&token| {
        let bytes = tokenizer.token_bytes(token);
        tokenizer.is_special(token) || !bytes.iter().all(u8::is_ascii_whitespace)
    });
    let is_closed = last.is_some_and(|&token| tokenizer.is_special(token));
    let whole = Whole {
        tokens,
        weights,
        prompt: Some(prompt),
    };
    Ok(closed(whole, is_closed, tokenizer))
}

/// The bytes of `text` that each learned assistant turn adds to the prompt it answers, in their order. Found by rendering
/// the conversation up to it, with and without it: no knowledge of the template's markers is needed.
fn assistant_turns(
    messages: &[Message],
    template: &ChatTemplate,
    kwargs: &Kwargs,
    text: &str,
) -> Result<Vec<Range<usize>>, TextError> {
    let turns = match turns_behind_a_stub(messages, template, kwargs, text) {
        Some(turns) => turns,
        None => turns_behind_all(messages, template, kwargs, text)?,
    };
    let learned = messages
        .iter()
        .enumerate()
        .filter(|(_, message)| is_learned(message));
    for ((i, message), turn) in learned.zip(&turns) {
        let reasoning = message.reasoning().unwrap_or_default().trim();
        if !text[turn.clone()].contains(reasoning) {
            return Err(TextError::UnreadReasoning { message: i + 1 });
        }
    }
    Ok(turns)
}

fn is_learned(message: &Message) -> bool {
    message.role == "assistant" && message.weight != Some(0.0)
}

/// The whole conversation before a turn is rendered: what counts, and takes a time that is quadratic in the turns.
fn turns_behind_all(
    messages: &[Message],
    template: &ChatTemplate,
    kwargs: &Kwargs,
    text: &str,
) -> Result<Vec<Range<usize>>, TextError> {
    let turns = messages.iter().filter(|message| is_learned(message)).count();
    let bytes = turns.saturating_mul(text.len() + MESSAGE_COST_BYTES * messages.len());
    if turns > 1 && bytes > MAX_RENDERED_BYTES {
        return Err(TextError::TooManyTurns { turns });
    }
    let learned = messages
        .iter()
        .enumerate()
        .filter(|(_, message)| is_learned(message));
    learned
        .map(|(i, _)| {
            let prompt = prompt(&messages[..=i], template, kwargs)?;
            let closed = template.render(&messages[..=i], Ending::Closed, kwargs)?;
            match closed.starts_with(&prompt) && text.starts_with(&closed) {
                true => Ok(prompt.len()..closed.len()),
                false => Err(TextError::UnstableTemplate { message: i + 1 }),
            }
        })
        .collect()
}

/// The same for a template whose messages only add text of their own, in linear time: a turn and what came since the one
/// before are rendered behind a short conversation of the roles that the real one begins with. `None` where what is
/// rendered so is not what stands in `text`, each turn right behind the one before.
fn turns_behind_a_stub(
    messages: &[Message],
    template: &ChatTemplate,
    kwargs: &Kwargs,
    text: &str,
) -> Option<Vec<Range<usize>>> {
    let render = |messages: &[Message], ending| template.render(messages, ending, kwargs).ok();
    let first = messages.iter().position(|message| message.role == "assistant")?;
    let (opening, rest) = messages.split_at(first + 1);
    let closed = render(opening, Ending::Closed).filter(|closed| text.starts_with(closed))?;
    let mut turns = vec![];
    if is_learned(&messages[first]) {
        let prompt = prompt(opening, template, kwargs).ok()?;
        closed
            .starts_with(&prompt)
            .then(|| turns.push(prompt.len()..closed.len()))?;
    }
    let stub: Vec<Message> = opening
        .iter()
        .map(|message| Message::new(&message.role, "x"))
        .collect();
    let before = render(&stub, Ending::Closed)?;
    let added = |messages: &[Message], ending| {
        let rendered = render(&[&stub, messages].concat(), ending)?;
        rendered.strip_prefix(&before).map(str::to_owned)
    };
    let mut end = closed.len();
    for exchange in rest.split_inclusive(|message| message.role == "assistant") {
        let Some((answer, asked)) = exchange.split_last().filter(|(last, _)| last.role == "assistant") else {
            break; // Nobody answered what comes last.
        };
        let closed = added(exchange, Ending::Closed).filter(|closed| text[end..].starts_with(closed))?;
        if is_learned(answer) {
            let prompt =
                added(asked, Ending::GenerationPrompt).filter(|prompt| closed.starts_with(prompt))?;
            turns.push(end + prompt.len()..end + closed.len());
        }
        end += closed.len();
    }
    Some(turns)
}

/// What the model reads before it writes the last message.
fn prompt(messages: &[Message], template: &ChatTemplate, kwargs: &Kwargs) -> Result<String, TextError> {
    match messages {
        // Templates cannot open a conversation that has no message; they can open the assistant's own.
        [opening] => {
            let empty = Message::new(&opening.role, "");
            template.render(&[empty], Ending::OpenMessage, kwargs)
        }
        [before @ .., _] => template.render(before, Ending::GenerationPrompt, kwargs),
        [] => Ok(String::new()),
    }
}

/// Tokens of a turn, looked for from the token `reached` on. One that begins before the turn and ends in it counts: the
/// model must write it.
fn labelled(
    placed: &[Placed],
    reached: usize,
    turn: Range<usize>,
    text: &str,
    tokenizer: &Tokenizer,
) -> Range<usize> {
    let first = placed[reached..]
        .iter()
        .position(|token| token.end > turn.start)
        .map_or(placed.len(), |n| reached + n);
    let last = first
        + placed[first..]
            .iter()
            .take_while(|token| token.start < turn.end)
            .count();
    // White space after the end of turn (ChatML's newline) is never asked of the model: generation ended before it.
    let is_layout =
        |token: &Placed| !tokenizer.is_special(token.id) && text[token.start..token.end].trim().is_empty();
    let layout = placed[first..last]
        .iter()
        .rev()
        .take_while(|token| is_layout(token))
        .count();
    let end = last - layout;
    let closes = end > first && tokenizer.is_special(placed[end - 1].id);
    first..if closes { end } else { last }
}

#[cfg(test)]
mod tests;
