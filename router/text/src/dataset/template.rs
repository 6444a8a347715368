//! Prompts made of columns: a text with `{placeholders}`, or one by its name. The wording of a name is that of the trainer
//! whose users know it: torchtune 0.2 (`torchtune/data/_instruct_templates.py`), llama-recipes (`llama_recipes/datasets/`).

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::records::MAX_ROW_BYTES;
use super::{excerpt, type_name};

/// Of a template's text.
const MAX_TEMPLATE_BYTES: usize = 64 << 10;

/// The column of what is learned.
pub const OUTPUT: &str = "output";

const ALPACA_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further context. \
                            Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n\
                            {input}\n\n### Response:";
const ALPACA: &str = "Below is an instruction that describes a task. Write a response that appropriately completes the \
                      request.\n\n### Instruction:\n{instruction}\n\n### Response:";

/// A template that has a name.
struct Named {
    /// The last part of a path such as `torchtune.data.SummarizeTemplate`, and shorter ones.
    names: &'static [&'static str],
    text: &'static str,
    /// The same for rows without one column.
    without: Option<(&'static str, &'static str)>,
    /// What follows either.
    end: &'static str,
    /// Columns as known data sets call them, where the name that is wanted is not there.
    others: &'static [(&'static str, &'static str)],
}

const NAMED: &[Named] = &[
    Named {
        names: &["alpaca", "AlpacaInstructTemplate", "alpaca_cleaned_dataset"],
        text: ALPACA_INPUT,
        without: Some(("input", ALPACA)),
        end: "\n",
        others: &[],
    },
    // llama-recipes writes the answer right behind the colon.
    Named {
        names: &["alpaca_dataset"],
        text: ALPACA_INPUT,
        without: Some(("input", ALPACA)),
        end: "",
        others: &[],
    },
    Named {
        names: &["summarize", "SummarizeTemplate", "samsum"],
        text: "Summarize this dialogue:\n{dialogue}\n---\nSummary:\n",
        without: None,
        end: "",
        others: &[(OUTPUT, "summary")],
    },
    Named {
        names: &["samsum_dataset"],
        text: "Summarize this dialog:\n{dialogue}\n---\nSummary:\n",
        without: None,
        end: "",
        others: &[(OUTPUT, "summary")],
    },
    Named {
        names: &["grammar", "GrammarErrorCorrectionTemplate", "grammar_dataset"],
        text: "Correct this to standard English: {sentence}\n---\nCorrected: ",
        without: None,
        end: "",
        others: &[("sentence", "input"), (OUTPUT, "target")],
    },
    Named {
        names: &[
            "question_answer",
            "StackExchangedPairedTemplate",
            "QuestionAnswerTemplate",
        ],
        text: "Question: {question}\n\nAnswer: ",
        without: None,
        end: "",
        others: &[("question", "prompt"), ("question", "instruction")],
    },
];

/// What torchtune's data sets of the same name as llama-recipes' do.
const TORCHTUNE: [(&str, &str); 2] = [("alpaca_dataset", "alpaca"), ("samsum_dataset", "samsum")];

#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    text: Vec<Part>,
    without: Option<(String, Vec<Part>)>,
    others: &'static [(&'static str, &'static str)],
}

#[derive(Clone, Debug, PartialEq)]
enum Part {
    Text(String),
    Column(String),
}

impl Template {
    /// Errors say what to give instead.
    pub fn new(given: &str) -> Result<Template, String> {
        if given.len() > MAX_TEMPLATE_BYTES {
            return Err(format!(
                "template has {} bytes, at most {MAX_TEMPLATE_BYTES} are taken",
                given.len()
            ));
        }
        if given.contains('{') {
            let text = parts(given)?;
            return match text.iter().any(|part| matches!(part, Part::Column(_))) {
                true => Ok(Template {
                    text,
                    without: None,
                    others: &[],
                }),
                false => Err(format!("template has no {{column}} in it: {:?}", excerpt(given))),
            };
        }
        let last = given.rsplit('.').next().unwrap_or(given);
        let mut name = last;
        if given.starts_with("torchtune.") {
            name = TORCHTUNE
                .iter()
                .find(|(theirs, _)| *theirs == last)
                .map_or(last, |(_, ours)| ours);
        }
        let Some(named) = NAMED.iter().find(|named| named.names.contains(&name)) else {
            let names: Vec<&str> = NAMED.iter().map(|named| named.names[0]).collect();
            return Err(format!(
                "there is no template {:?}: give a text with {{columns}} in it, or one of {}",
                excerpt(given),
                names.join(", ")
            ));
        };
        let whole = |text: &str| parts(&format!("{text}{}", named.end)).expect("names have whole templates");
        Ok(Template {
            text: whole(named.text),
            without: named
                .without
                .map(|(column, text)| (column.to_owned(), whole(text))),
            others: named.others,
        })
    }

    /// Whether the file's column is part of the prompt or the answer.
    pub fn reads(&self, column: &str, names: &BTreeMap<String, String>) -> bool {
        let is_it = |wanted: &str| names.get(wanted).map_or(wanted, String::as_str) == column;
        let is_part = |part: &Part| matches!(part, Part::Column(wanted) if is_it(wanted));
        is_it(OUTPUT) || self.text.iter().any(is_part)
    }

    /// Prompt and answer of a row. Errors continue the sentence "Line 7".
    pub fn fill(
        &self,
        row: &Map<String, Value>,
        names: &BTreeMap<String, String>,
    ) -> Result<(String, String), String> {
        let column = |wanted: &str| -> Result<String, String> {
            let there = |name: &&str| row.get(*name).is_some_and(|value| !value.is_null());
            let named = names.get(wanted).map(String::as_str);
            let others = || {
                self.others
                    .iter()
                    .filter(|(name, _)| *name == wanted)
                    .map(|(_, other)| *other)
            };
            let name = named.unwrap_or(wanted);
            if named.is_some() || there(&name) {
                return Ok(name.to_owned());
            }
            others().find(there).map(str::to_owned).ok_or_else(|| {
                let has: Vec<&str> = row.keys().take(8).map(String::as_str).collect();
                format!(
                    " has no column {wanted} for the template, but [{}]: say which it is with column_map, such as \
                     {{\"{wanted}\": \"{}\"}}.",
                    excerpt(&has.join(", ")),
                    has.last().copied().unwrap_or("its name")
                )
            })
        };
        let text = |wanted: &str| -> Result<Cow<str>, String> {
            let name = column(wanted)?;
            match row.get(&name) {
                Some(Value::String(text)) => Ok(text.into()),
                Some(Value::Null) | None => Err(format!(
                    ": the column {name}, for {wanted} of the template, is empty."
                )),
                Some(number @ (Value::Number(_) | Value::Bool(_))) => Ok(number.to_string().into()),
                Some(other) => Err(format!(
                    ": the column {name}, for {wanted} of the template, must be a string, got {}.",
                    type_name(other)
                )),
            }
        };
        let is_without = self.without.as_ref().is_some_and(|(wanted, _)| {
            let name = names.get(wanted).unwrap_or(wanted);
            match row.get(name) {
                None | Some(Value::Null) => true,
                Some(value) => value == "",
            }
        });
        let parts = match &self.without {
            Some((_, parts)) if is_without => parts,
            _ => &self.text,
        };
        let mut prompt = String::new();
        for part in parts {
            let more = match part {
                Part::Text(text) => Cow::from(text),
                Part::Column(name) => text(name)?,
            };
            if prompt.len() + more.len() > MAX_ROW_BYTES {
                return Err(format!(
                    ": the template makes more than {MAX_ROW_BYTES} bytes of it, which is a row's limit."
                ));
            }
            prompt.push_str(&more);
        }
        Ok((prompt, text(OUTPUT)?.into_owned()))
    }
}

/// As Python's `str.format`: doubled braces are braces.
fn parts(text: &str) -> Result<Vec<Part>, String> {
    let (mut parts, mut plain) = (vec![], String::new());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '{' | '}' if chars.peek() == Some(&c) => {
                chars.next();
                plain.push(c);
            }
            '{' => {
                let name: String = chars.by_ref().take_while(|&c| c != '}').collect();
                if name.trim().is_empty() || name.contains(['{', '!', ':', '\n']) {
                    return Err(format!(
                        "template: {:?} is no column; a brace that is meant is doubled",
                        excerpt(&format!("{{{name}}}"))
                    ));
                }
                if !plain.is_empty() {
                    parts.push(Part::Text(std::mem::take(&mut plain)));
                }
                parts.push(Part::Column(name.trim().to_owned()));
            }
            '}' => {
                return Err(
                    "template: a closing brace stands alone; one that is meant is doubled".to_owned(),
                );
            }
            c => plain.push(c),
        }
    }
    if !plain.is_empty() {
        parts.push(Part::Text(plain));
    }
    Ok(parts)
}
