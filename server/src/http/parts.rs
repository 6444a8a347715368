//! An answer in parts, as Anthropic's API and the Responses API have it: reasoning, text and calls, one after the other. A
//! stream and a whole answer are made of the same steps, so they say the same. Not here: what a part looks like.

use tandem_openapi::usage::Usage;
use tandem_router::api::{CallDelta, Delta, Finish, Piece, RouterError, TokenText, What};

use super::feed::Admitted;
use crate::error::ApiError;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Reasoning,
    Text,
    Call { name: String },
}

/// What happens to the answer's parts. Only the last one is open.
#[derive(Debug, PartialEq)]
pub enum Step {
    Begin(Kind),
    /// More of the reasoning,
    Think(String),
    /// of the text,
    Say(String),
    /// or of the call's arguments.
    Argue(String),
    /// Of the text that follows.
    Tokens(Vec<TokenText>),
    End,
}

/// Takes pieces apart. An answer without anything is one empty text.
#[derive(Default)]
pub struct Parts {
    open: Option<Open>,
    has_begun: bool,
    /// Of text that has not begun.
    tokens: Vec<TokenText>,
    hides_reasoning: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Open {
    Reasoning,
    Text,
    Call,
}

impl Parts {
    pub fn new(shows_reasoning: bool) -> Parts {
        Parts {
            hides_reasoning: !shows_reasoning,
            ..Parts::default()
        }
    }

    pub fn take(&mut self, delta: Delta, tokens: Vec<TokenText>, steps: &mut Vec<Step>) {
        let Delta {
            reasoning,
            content,
            calls,
        } = delta;
        let thinks = !reasoning.is_empty();
        self.tokens.extend(tokens);
        if !reasoning.is_empty() && !self.hides_reasoning {
            self.go_on(Open::Reasoning, || Kind::Reasoning, steps);
            steps.push(Step::Think(reasoning));
        }
        if !content.is_empty() {
            self.go_on(Open::Text, || Kind::Text, steps);
        }
        match self.open {
            Some(Open::Text) if !self.tokens.is_empty() => {
                steps.push(Step::Tokens(std::mem::take(&mut self.tokens)));
            }
            // They said something else.
            Some(_) => self.tokens.clear(),
            None if thinks => self.tokens.clear(),
            None => {}
        }
        if !content.is_empty() {
            steps.push(Step::Say(content));
        }
        for CallDelta { name, arguments, .. } in calls {
            if let Some(name) = name {
                self.end(steps);
                self.go_on(Open::Call, || Kind::Call { name }, steps);
            }
            if !arguments.is_empty() {
                steps.push(Step::Argue(arguments));
            }
        }
    }

    pub fn finish(&mut self, steps: &mut Vec<Step>) {
        if !self.has_begun {
            self.go_on(Open::Text, || Kind::Text, steps);
            steps.push(Step::Tokens(std::mem::take(&mut self.tokens)));
        }
        self.end(steps);
    }

    fn go_on(&mut self, kind: Open, begins: impl FnOnce() -> Kind, steps: &mut Vec<Step>) {
        if self.open == Some(kind) {
            return;
        }
        self.end(steps);
        self.open = Some(kind);
        self.has_begun = true;
        steps.push(Step::Begin(begins()));
    }

    fn end(&mut self, steps: &mut Vec<Step>) {
        if self.open.take().is_some() {
            steps.push(Step::End);
        }
    }
}

/// One part, as far as it is.
#[derive(Clone, Debug)]
pub struct Part {
    pub kind: Kind,
    pub text: String,
    /// Of a text.
    pub tokens: Vec<TokenText>,
    pub is_whole: bool,
}

/// Does what the steps say.
pub fn apply(parts: &mut Vec<Part>, step: &Step) {
    match (step, parts.last_mut()) {
        (Step::Begin(kind), _) => parts.push(Part {
            kind: kind.clone(),
            text: String::new(),
            tokens: Vec::new(),
            is_whole: false,
        }),
        (Step::Think(text) | Step::Say(text) | Step::Argue(text), Some(open)) => open.text.push_str(text),
        (Step::Tokens(tokens), Some(open)) => open.tokens.extend(tokens.iter().cloned()),
        (Step::End, Some(open)) => open.is_whole = true,
        (_, None) => {}
    }
}

/// How an answer ended.
#[derive(Clone, Debug)]
pub struct Ending {
    pub reason: Finish,
    pub stop_string: Option<String>,
}

/// The one answer to the one prompt, whole, and what it took.
pub async fn gather(admitted: Admitted, mut taking: Parts) -> Result<(Vec<Part>, Ending, Usage), ApiError> {
    let Admitted {
        prompts, mut feed, ..
    } = admitted;
    let (mut parts, mut steps, mut news) = (Vec::new(), Vec::new(), Vec::new());
    let (mut thought, mut end) = (0, None);
    while feed.next(&mut news).await {
        for (_, Piece { what, .. }) in news.drain(..) {
            match what {
                What::Prompt(_) | What::Pooled(_) => {}
                What::Text {
                    text,
                    tokens,
                    reasoning_tokens,
                    ..
                } => {
                    thought += u64::from(reasoning_tokens);
                    taking.take(text, tokens, &mut steps);
                }
                What::Finished {
                    reason,
                    stop_string,
                    completion_tokens,
                    cached_tokens,
                    guessed,
                } => {
                    taking.finish(&mut steps);
                    let prompt_tokens = prompts.iter().map(|prompt| prompt.len() as u64).sum();
                    let usage = Usage::new(
                        prompt_tokens,
                        u64::from(completion_tokens),
                        u64::from(cached_tokens),
                    )
                    .guessing(guessed.tokens.into(), guessed.accepted.into())
                    .reasoning(thought);
                    end = Some((Ending { reason, stop_string }, usage));
                }
                What::Failed(fault) => return Err(ApiError::Router(RouterError::Engine(fault))),
            }
            steps.drain(..).for_each(|step| apply(&mut parts, &step));
        }
    }
    let (ending, usage) = end.ok_or_else(|| ApiError::Internal("an answer without an end".to_owned()))?;
    Ok((parts, ending, usage))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(reasoning: &str, content: &str, calls: &[(usize, Option<&str>, &str)]) -> Delta {
        let call = |&(index, name, arguments): &(usize, Option<&str>, &str)| CallDelta {
            index,
            name: name.map(str::to_owned),
            arguments: arguments.to_owned(),
        };
        Delta {
            reasoning: reasoning.to_owned(),
            content: content.to_owned(),
            calls: calls.iter().map(call).collect(),
        }
    }

    fn parts(shows_reasoning: bool, deltas: Vec<Delta>) -> Vec<String> {
        let (mut taking, mut steps) = (Parts::new(shows_reasoning), Vec::new());
        for delta in deltas {
            taking.take(delta, vec![], &mut steps);
        }
        taking.finish(&mut steps);
        let begun = steps.iter().filter(|step| matches!(step, Step::Begin(_))).count();
        let ended = steps.iter().filter(|step| **step == Step::End).count();
        assert_eq!(begun, ended);
        let mut parts = Vec::new();
        steps.iter().for_each(|step| apply(&mut parts, step));
        assert!(parts.iter().all(|part| part.is_whole));
        let shown = parts.into_iter().map(|part| match part.kind {
            Kind::Reasoning => format!("({})", part.text),
            Kind::Text => part.text,
            Kind::Call { name } => format!("{name}{}", part.text),
        });
        shown.collect()
    }

    #[test]
    fn parts_begin_and_end_one_after_the_other() {
        let all = || {
            vec![
                delta("so", "", &[]),
                delta(" so", "We", &[]),
                delta("", "ll", &[(0, Some("f"), "{\"a")]),
                delta("", "", &[(0, None, "\":1}"), (1, Some("g"), "{}")]),
                delta("", "and", &[]),
            ]
        };
        assert_eq!(
            parts(true, all()),
            ["(so so)", "Well", "f{\"a\":1}", "g{}", "and"]
        );
        assert_eq!(parts(false, all()), ["Well", "f{\"a\":1}", "g{}", "and"]);
        assert_eq!(parts(true, vec![]), [""]);
        assert_eq!(parts(false, vec![delta("so", "", &[])]), [""]);
        assert_eq!(parts(true, vec![delta("so", "", &[])]), ["(so)"]);
    }
}
