//! Keys of training rows and messages that are not read here. One that says nothing of what is learned is let pass, one
//! that asks for what is done anyway too; any other is refused, because training its opposite in silence would be
//! worse. Not here: the keys that are read.

use serde_json::{Map, Value};
use tandem_core::suggest::closest;

/// What stands around the examples: names, origins, notes.
const HARMLESS: &str = "id _id idx index uuid prompt_id example_id sample_id row_id conversation_id session_id
    kind type source origin dataset dataset_name url split metadata meta tags tag category topic subject domain task language
    lang title comment comments note notes license author annotator created_at updated_at timestamp date version
    difficulty num_tokens n_tokens token_count num_turns hash";

struct Key {
    /// Separated by white space.
    names: &'static str,
    /// Values that ask for what is done anyway. null always does.
    same: fn(&Value) -> bool,
    /// What to do instead.
    says: &'static str,
}

const fn key(names: &'static str, same: fn(&Value) -> bool, says: &'static str) -> Key {
    Key { names, same, says }
}

fn never(_: &Value) -> bool {
    false
}

fn one(value: &Value) -> bool {
    value == true || value.as_f64() == Some(1.0)
}

fn empty(value: &Value) -> bool {
    match value {
        Value::Bool(flag) => !flag,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

const TEXT_ONLY: &str = "only text is trained";
const AS_WRITTEN: &str = "it binds the answer to a request; a row is learned as it is written";
const WHOLE: &str = "a row counts once and whole: leave the line out of the file to leave it out";
const TOKENS: &str = "tokens and their weights are made here, from messages, prompt and completion, or text";

const ROW: &[Key] = &[
    key(
        "rejected_completion rejected_messages chosen_messages rejected_response",
        never,
        "a preference is written as prompt, chosen and rejected, or as input, preferred_output and non_preferred_output",
    ),
    key(
        "score rewards",
        never,
        "what an example is worth is written as reward, a number; leave the key out where rows count alike",
    ),
    key(
        "weight weights loss_weight sample_weight train training trainable",
        one,
        WHOLE,
    ),
    key("masked mask ignore skip", empty, WHOLE),
    key(
        "tool_choice function_call",
        |value| value == "none" || value == "auto",
        AS_WRITTEN,
    ),
    key("parallel_tool_calls", Value::is_boolean, AS_WRITTEN),
    key("images image videos video audio audios", empty, TEXT_ONLY),
    key(
        "chat_template_kwargs documents enable_thinking",
        empty,
        "rows are rendered by the template without variables",
    ),
    key(
        "system system_prompt",
        empty,
        "write it as a message of role system, or into the prompt, by a template such as '{system}{question}'; column_map={system: ''} \
         leaves it out",
    ),
    key(
        "input_ids labels attention_mask completion_mask assistant_masks prompt_mask",
        never,
        TOKENS,
    ),
];

const MESSAGE: &[Key] = &[
    key("refusal audio annotations images image videos", empty, TEXT_ONLY),
    key("prefix partial", empty, "a turn is learned whole"),
    key("from value", never, "a message has role and content"),
];

/// Keys that say whether a turn is learned, and what they say then. `weight` is how that is said here.
const LEARNED: &str = "train training trainable loss learn";
const MASKED: &str = "masked mask ignore";

/// Refuses a row that asks for another kind of training, before its shape is looked at.
pub(super) fn check_row(row: &Map<String, Value>) -> Result<(), String> {
    contrary(row.iter(), ROW)
}

/// The same of what is not read by a name that the job gives.
pub(super) fn check_rest(row: &Map<String, Value>, is_read: impl Fn(&str) -> bool) -> Result<(), String> {
    contrary(row.iter().filter(|(name, _)| !is_read(name)), ROW)
}

/// The same, of a message.
pub(super) fn check_message(message: &Map<String, Value>) -> Result<(), String> {
    contrary(message.iter(), MESSAGE)
}

/// Of a row, in all shapes.
const READ: [&str; 16] = [
    "messages",
    "tools",
    "functions",
    "prompt",
    "completion",
    "text",
    "instruction",
    "output",
    "conversations",
    "chosen",
    "rejected",
    "input",
    "preferred_output",
    "non_preferred_output",
    "label",
    "reward",
];

pub(super) fn is_read(name: &str) -> bool {
    READ.contains(&name) || ROW.iter().any(|key| has(key.names, name))
}

/// `rest`: what was not read.
pub(super) fn rest_of_row(rest: &Map<String, Value>) -> Result<(), String> {
    unread(rest, ROW, &READ)
}

/// `is_learned`: whether this turn carries loss.
pub(super) fn rest_of_message(mut rest: Map<String, Value>, is_learned: bool) -> Result<(), String> {
    for (names, means_learned) in [(LEARNED, true), (MASKED, false)] {
        for name in names.split_whitespace() {
            let value = rest.remove(name).filter(|value| !value.is_null());
            match value.map(|value| one(&value) == means_learned) {
                Some(asked) if asked != is_learned => {
                    return Err(match is_learned {
                        true => format!(
                            "{name}: this turn is learned; \"weight\": 0 leaves an assistant's turn out."
                        ),
                        false => format!(
                            "{name}: this turn is not learned, only an assistant's whose weight is not 0 is."
                        ),
                    });
                }
                _ => {}
            }
        }
    }
    unread(
        &rest,
        MESSAGE,
        &[
            "role",
            "content",
            "tool_calls",
            "tool_call_id",
            "reasoning_content",
            "weight",
            "name",
        ],
    )
}

/// Of a content part, beside type and text.
pub(super) fn rest_of_part(rest: &Map<String, Value>) -> Result<(), String> {
    let allowed = key("cache_control annotations", |_| true, "");
    unread(rest, &[allowed], &["type", "text"])
}

/// Errors are sentences without the line.
fn contrary<'a>(fields: impl Iterator<Item = (&'a String, &'a Value)>, keys: &[Key]) -> Result<(), String> {
    fields
        .filter(|(_, value)| !value.is_null())
        .try_for_each(|(name, value)| match find(keys, name) {
            Some(key) if !(key.same)(value) => Err(format!("{name}: {}.", key.says)),
            _ => Ok(()),
        })
}

fn unread(rest: &Map<String, Value>, keys: &[Key], read: &[&str]) -> Result<(), String> {
    contrary(rest.iter(), keys)?;
    let unknown = rest
        .iter()
        .find(|(name, value)| !value.is_null() && find(keys, name).is_none() && !has(HARMLESS, name));
    let Some((name, _)) = unknown else {
        return Ok(());
    };
    let known = keys.iter().flat_map(|key| key.names.split_whitespace());
    let hint = match closest(name, known.chain(read.iter().copied())) {
        Some(meant) => format!("did you mean {meant}?"),
        None => format!("{} are read. Rename or remove it.", read.join(", ")),
    };
    let name: String = name.chars().take(60).collect();
    Err(format!("nothing reads the key {name:?}; {hint}"))
}

fn find<'a>(keys: &'a [Key], name: &str) -> Option<&'a Key> {
    keys.iter().find(|key| has(key.names, name))
}

fn has(names: &str, name: &str) -> bool {
    names.split_whitespace().any(|known| known == name)
}
