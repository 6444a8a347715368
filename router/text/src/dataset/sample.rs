//! What rows of a file say beside an example: that one answer is preferred to another, that an example is good or bad, what
//! it is worth. Forms are OpenAI's (`input`, `preferred_output`, `non_preferred_output`) and TRL's (`prompt`, `chosen`,
//! `rejected`; `label`). Not here: examples themselves (the parent), which objective wants what (`label::group`).

use serde_json::{Map, Value};

use super::{Kind, Problem, Row, Seam, excerpt, keys, messages_of, row, tools_of, type_name};

/// One row of a training file.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    Example(Row),
    /// Both answer the same prompt.
    Pair {
        chosen: Row,
        rejected: Row,
    },
    Judged {
        row: Row,
        is_desirable: bool,
    },
    Rewarded {
        row: Row,
        reward: f32,
    },
}

impl Sample {
    pub fn kind(&self) -> Kind {
        match self {
            Sample::Example(row) => row.kind(),
            Sample::Pair { .. } => Kind::Pair,
            Sample::Judged { .. } => Kind::Judged,
            Sample::Rewarded { .. } => Kind::Rewarded,
        }
    }
}

/// Of OpenAI: its guide and its specification differ.
const PREFERRED: [&str; 2] = ["preferred_output", "preferred_completion"];
const OTHER: [&str; 2] = ["non_preferred_output", "non_preferred_completion"];

pub(super) fn sample(mut object: Map<String, Value>, seam: Seam) -> Result<Sample, Problem> {
    let has = |key: &&str| object.get(*key).is_some_and(|value| !value.is_null());
    if PREFERRED.iter().chain(&OTHER).any(has) {
        return Ok(openai_pair(object)?);
    }
    if ["chosen", "rejected"].iter().any(has) {
        let is_known = object.contains_key("prompt");
        keys::check_row(&object).map_err(|problem| Problem::of_key(&problem, is_known))?;
        return Ok(trl_pair(object)?);
    }
    let [label, reward] = ["label", "reward"].map(|key| taken(&mut object, key));
    let example = row(object, seam)?;
    match (label, reward) {
        (None, None) => Ok(Sample::Example(example)),
        (Some(_), Some(_)) => Err(": label and reward exclude each other.".to_owned().into()),
        (Some(label), None) => {
            let is_desirable = match (label.as_bool(), label.as_i64()) {
                (Some(flag), _) => flag,
                (None, Some(number @ (0 | 1))) => number == 1,
                _ => {
                    return Err(format!(
                        ": label says whether the example is desirable (KTO) and must be true or false, got {}.",
                        excerpt(&label.to_string())
                    )
                    .into());
                }
            };
            Ok(Sample::Judged {
                row: example,
                is_desirable,
            })
        }
        (None, Some(reward)) => match reward.as_f64().map(|reward| reward as f32) {
            Some(reward) if reward.is_finite() => Ok(Sample::Rewarded { row: example, reward }),
            _ => Err(format!(": reward must be a number, got {}.", excerpt(&reward.to_string())).into()),
        },
    }
}

/// `{"input": {"messages": [...], "tools": [...]}, "preferred_output": [...], "non_preferred_output": [...]}`
fn openai_pair(mut object: Map<String, Value>) -> Result<Sample, String> {
    let mut one_of = |names: [&str; 2]| {
        let found: Vec<(&str, Value)> = names
            .iter()
            .filter_map(|name| Some((*name, taken(&mut object, name)?)))
            .collect();
        match <[_; 1]>::try_from(found) {
            Ok([(name, Value::Array(answer))]) => Ok((name.to_owned(), answer)),
            Ok([(name, other)]) => Err(format!(
                ": {name} must be an array of messages, got {}.",
                type_name(&other)
            )),
            Err(found) if found.is_empty() => Err(format!(": {} is missing.", names[0])),
            Err(_) => Err(format!(": {} and {} are the same key.", names[0], names[1])),
        }
    };
    let (chosen, rejected) = (one_of(PREFERRED)?, one_of(OTHER)?);
    let mut input = match object.remove("input") {
        Some(Value::Object(input)) => input,
        Some(other) => {
            return Err(format!(
                ": input must be a dictionary, got {}.",
                type_name(&other)
            ));
        }
        None => return Err(": input is missing.".to_owned()),
    };
    keys::check_row(&input).map_err(|problem| format!(": input.{problem}"))?;
    let tools = tools_of(&mut input)?;
    let prompt = match input.remove("messages") {
        Some(Value::Array(prompt)) => prompt,
        Some(other) => {
            return Err(format!(
                ": input.messages must be an array, got {}.",
                type_name(&other)
            ));
        }
        None => return Err(": input.messages is missing.".to_owned()),
    };
    keys::rest_of_row(&input).map_err(|problem| format!(": input: {problem}"))?;
    rest(&object)?;
    chat_pair(prompt, chosen, rejected, &tools)
}

/// `{"prompt": ..., "chosen": ..., "rejected": ...}` of strings, or of lists of messages. Without a prompt it is what both begin
/// with.
fn trl_pair(mut object: Map<String, Value>) -> Result<Sample, String> {
    let tools = tools_of(&mut object)?;
    let mut take = |name: &str| taken(&mut object, name);
    let prompt = take("prompt");
    let [Some(chosen), Some(rejected)] = [take("chosen"), take("rejected")] else {
        return Err(": chosen and rejected go together: one of them is missing.".to_owned());
    };
    // Beside conversations that are given whole, others' data sets have the prompt a second time, as text, or as messages.
    for again in ["messages", "score_chosen", "score_rejected"] {
        take(again);
    }
    rest(&object)?;
    match (prompt, chosen, rejected) {
        (Some(Value::Array(prompt)), Value::Array(chosen), Value::Array(rejected)) => chat_pair(
            prompt,
            named("chosen", chosen),
            named("rejected", rejected),
            &tools,
        ),
        (None | Some(Value::String(_)), Value::Array(mut chosen), Value::Array(rejected)) => {
            let common = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
            let common = common
                .min(chosen.len().saturating_sub(1))
                .min(rejected.len().saturating_sub(1));
            if common == 0 {
                return Err(
                    ": there is no prompt: give it as a list of messages, or have both lists begin with it."
                        .to_owned(),
                );
            }
            let rejected = rejected[common..].to_vec();
            let answer = chosen.split_off(common);
            chat_pair(
                chosen,
                named("chosen", answer),
                named("rejected", rejected),
                &tools,
            )
        }
        (_, Value::String(_), Value::String(_)) if !tools.is_empty() => {
            Err(": tools go with messages.".to_owned())
        }
        (Some(Value::String(prompt)), Value::String(chosen), Value::String(rejected)) => {
            text_pair(prompt, chosen, rejected)
        }
        (None, Value::String(chosen), Value::String(rejected)) => {
            let prompt = common_prompt(&chosen, &rejected);
            text_pair(
                prompt.to_owned(),
                chosen[prompt.len()..].to_owned(),
                rejected[prompt.len()..].to_owned(),
            )
        }
        (prompt, chosen, rejected) => Err(format!(
            ": prompt, chosen and rejected must all be strings or all be lists of messages, got {}, {} and {}.",
            prompt.as_ref().map_or("nothing", type_name),
            type_name(&chosen),
            type_name(&rejected)
        )),
    }
}

/// What both begin with; a blank before the difference belongs to the answers, as in TRL.
fn common_prompt<'a>(chosen: &'a str, rejected: &str) -> &'a str {
    let differs = chosen
        .char_indices()
        .zip(rejected.chars())
        .find(|((_, a), b)| a != b)
        .map_or(chosen.len().min(rejected.len()), |((at, _), _)| at);
    let prompt = &chosen[..differs];
    prompt.strip_suffix(' ').unwrap_or(prompt)
}

fn named(name: &str, answer: Vec<Value>) -> (String, Vec<Value>) {
    (name.to_owned(), answer)
}

fn text_pair(prompt: String, chosen: String, rejected: String) -> Result<Sample, String> {
    let row = |name: &str, completion: String| match completion.is_empty() {
        true => Err(format!(": {name} is empty.")),
        false => Ok(Row::Completion {
            prompt: prompt.clone(),
            completion,
            seam: Seam::Together,
        }),
    };
    Ok(Sample::Pair {
        chosen: row("chosen", chosen)?,
        rejected: row("rejected", rejected)?,
    })
}

fn chat_pair(
    prompt: Vec<Value>,
    chosen: (String, Vec<Value>),
    rejected: (String, Vec<Value>),
    tools: &[Value],
) -> Result<Sample, String> {
    let row = |(name, answer): (String, Vec<Value>)| {
        answered(prompt.clone(), answer, tools.to_vec()).map_err(|problem| format!(", {name}{problem}"))
    };
    Ok(Sample::Pair {
        chosen: row(chosen)?,
        rejected: row(rejected)?,
    })
}

/// A conversation of which only the answer is learned.
pub(super) fn answered(mut prompt: Vec<Value>, answer: Vec<Value>, tools: Vec<Value>) -> Result<Row, String> {
    let is_said = |message: &Value| message["role"] == "assistant";
    if !answer.iter().any(is_said) {
        return Err(": an answer must have a message from the assistant.".to_owned());
    }
    if let Some(other) = answer
        .iter()
        .find(|message| message["role"] == "user" || message["role"] == "system")
    {
        return Err(format!(
            ": an answer has messages from the assistant and its tools, got one from {}.",
            other["role"]
        ));
    }
    for message in prompt.iter_mut().filter(|message| is_said(message)) {
        if let Value::Object(message) = message {
            message.insert("weight".to_owned(), 0.into());
        }
    }
    let n_prompt = prompt.len();
    prompt.extend(answer);
    Ok(Row::Answer {
        messages: messages_of(Value::Array(prompt))?,
        n_prompt,
        tools,
    })
}

/// null is nothing.
fn taken(object: &mut Map<String, Value>, key: &str) -> Option<Value> {
    object.remove(key).filter(|value| !value.is_null())
}

fn rest(object: &Map<String, Value>) -> Result<(), String> {
    keys::rest_of_row(object).map_err(|problem| format!(": {problem}"))
}
