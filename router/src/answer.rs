//! How a chat's answer is read (reasoning and calls apart from the content) and what binds it. The formats are the model's:
//! chosen once, by its chat template or by name. Not here: reading and binding themselves (`tandem_text::tools`).

use std::collections::BTreeSet;
use std::sync::Arc;

use tandem_core::TokenId;
use tandem_core::grammar::{Format, Grammar, Whitespace};
use tandem_core::thinking::Budget;
use tandem_text::chat::{CallIds, Kwargs};
use tandem_text::reasoning::ReasoningFormat;
use tandem_text::tools::{self, Choice, Reader, Reading, Tool, ToolFormat};
use tandem_text::{Skip, Tokenizer};

use crate::api::{Answer, Constraint, Form, Reasoning, RouterError, ToolChoice};
use crate::{Router, text_error};

/// Tokens at the end of a prompt that say whether it opened reasoning.
const TAIL: usize = 16;

/// What the model writes.
pub(crate) struct Formats {
    tools: Option<&'static ToolFormat>,
    reasoning: Option<&'static ReasoningFormat>,
    /// Special tokens that reading needs, of requests with tools and without.
    with_tools: BTreeSet<TokenId>,
    without_tools: BTreeSet<TokenId>,
    call_ids: CallIds,
}

/// What an answer must keep to.
#[derive(Default)]
pub(crate) struct Bounds {
    pub grammar: Option<Grammar>,
    pub thinking: Option<Budget>,
}

/// How one answer is read.
pub(crate) struct Plan {
    reading: Reading,
    tools: Arc<[Tool]>,
    pub shown: BTreeSet<TokenId>,
    /// Several calls may be in it.
    pub parallel: bool,
}

impl Plan {
    pub fn reader(&self) -> Reader {
        Reader::new(self.reading, self.tools.clone())
    }
}

impl Formats {
    pub fn new(
        tools: Option<&'static ToolFormat>,
        reasoning: Option<&'static ReasoningFormat>,
        tokenizer: &Tokenizer,
    ) -> Formats {
        let shown = |tools| {
            let is_opened = false;
            Reading {
                tools,
                reasoning,
                is_opened,
            }
            .shown(tokenizer)
        };
        let any_tools = Kwargs::from([("tools".to_owned(), serde_json::json!([]))]);
        let template = tokenizer.chat_template(&any_tools);
        Formats {
            tools,
            reasoning,
            with_tools: shown(tools),
            without_tools: shown(None),
            call_ids: template.map_or(CallIds::Any, |template| template.call_ids()),
        }
    }
}

impl Router {
    /// Which ids calls must have.
    pub fn call_ids(&self) -> CallIds {
        self.0.formats.call_ids
    }

    pub fn reasoning(&self) -> Reasoning {
        let template = self.tokenizer().chat_template(&Kwargs::new());
        match (template, self.config().reasoning_format) {
            (Ok(template), _) if template.switches_thinking() => Reasoning::Switched,
            (_, Some(_)) => Reasoning::Always,
            (_, None) => Reasoning::None,
        }
    }

    /// Of an answer to `prompt`: how it is read, and what it must be.
    pub(crate) async fn plan(
        &self,
        answer: Answer,
        prompt: &[TokenId],
        constraint: Option<Constraint>,
    ) -> Result<(Plan, Bounds), RouterError> {
        let Answer {
            tools,
            choice,
            parallel,
            separate_reasoning,
            thinking_budget,
        } = answer;
        let formats = &self.0.formats;
        let calls = !tools.is_empty() && choice != ToolChoice::None;
        if calls && formats.tools.is_none() {
            match choice {
                ToolChoice::Auto if self.config().calls_as_content => {}
                ToolChoice::Auto | ToolChoice::None => return Err(unknown_format("tools")),
                ToolChoice::Required | ToolChoice::Named(_) => return Err(unknown_format("tool_choice")),
            }
        }
        let tail = &prompt[prompt.len().saturating_sub(TAIL)..];
        let tail = self.tokenizer().decode(tail, Skip::Nothing).unwrap_or_default();
        let read_with = |reasoning: Option<&'static ReasoningFormat>| Reading {
            tools: formats.tools.filter(|_| calls),
            reasoning,
            is_opened: reasoning.is_some_and(|format| format.is_opened_by(&tail)),
        };
        let reading = read_with(formats.reasoning.filter(|_| separate_reasoning));
        // The model reasons whether or not it is shown apart, but not behind a prompt that ended its reasoning.
        let written = read_with(formats.reasoning.filter(|format| !format.is_ended_by(&tail)));
        let grammar = match (constraint, &choice) {
            (None, ToolChoice::None) => None,
            (None, ToolChoice::Auto) => self.bound(written, &tools, Choice::Auto, parallel).await?,
            (None, ToolChoice::Required) => self.bound(written, &tools, Choice::Required, parallel).await?,
            (None, ToolChoice::Named(name)) => {
                self.bound(written, &tools, Choice::Named(name), false).await?
            }
            (Some(constraint), _) => Some(self.bound_to(constraint, written, &tools, parallel).await?),
        };
        let thinking = match thinking_budget {
            None => None,
            Some(tokens) => self.budget(tokens, written)?,
        };
        let shown = match calls {
            true => formats.with_tools.clone(),
            false => formats.without_tools.clone(),
        };
        let plan = Plan {
            reading,
            tools,
            shown,
            parallel,
        };
        Ok((plan, Bounds { grammar, thinking }))
    }

    /// `None`: there is no reasoning to bound.
    fn budget(&self, tokens: u32, written: Reading) -> Result<Option<Budget>, RouterError> {
        let refused = |why: &str| {
            let message = format!("thinking_token_budget cannot be honoured: {why}");
            Err(RouterError::invalid("thinking_token_budget", message))
        };
        if self.0.formats.reasoning.is_none() {
            return refused(
                "this model does not reason, as far as its chat template tells (or start the server with \
                 --reasoning-parser)",
            );
        }
        if !self.info().grammars {
            return refused(
                "the backends of this server bound no reasoning; start them with the version of this router",
            );
        }
        let Some(marks) = written.marks() else {
            return Ok(None);
        };
        let end = self.tokenizer().encode_within(marks.ends[0]);
        let owned = |marks: &[&str]| marks.iter().map(|mark| (*mark).to_owned()).collect();
        Ok(Some(Budget {
            tokens,
            opens: owned(&marks.opens),
            ends: owned(&marks.ends),
            end: end.map_err(|error| text_error("thinking_token_budget", error))?,
            is_opened: written.is_opened,
            is_anywhere: marks.are_anywhere,
        }))
    }

    /// The grammar of calls. A schema that cannot be honoured is named by its place. `None`: the model may write what it
    /// wants.
    async fn bound(
        &self,
        written: Reading,
        tools: &[Tool],
        choice: Choice<'_>,
        parallel: bool,
    ) -> Result<Option<Grammar>, RouterError> {
        let format = match (tools::bind(written, tools, choice, parallel), choice) {
            (Some(format), _) => format,
            (None, Choice::Auto) => return Ok(None),
            (None, Choice::Required | Choice::Named(_)) => return Err(unknown_format("tool_choice")),
        };
        let whole = Constraint {
            param: "tools".to_owned(),
            form: Form::Format(format),
        };
        let refusal = match self.checked(whole).await {
            Ok(grammar) => return Ok(Some(grammar)),
            Err(refusal) => refusal,
        };
        for (i, tool) in tools.iter().enumerate() {
            let is_bound = match choice {
                Choice::Named(name) => tool.name == name,
                Choice::Required => true,
                Choice::Auto => tool.strict,
            };
            let Some(schema) = tool.parameters.as_ref().filter(|_| is_bound) else {
                continue;
            };
            let param = format!("tools[{i}].function.parameters");
            let grammar = Grammar::json_schema(schema, &Whitespace::Usual)
                .map_err(|bad| RouterError::invalid(&param, format!("{param} cannot be honoured: {bad}")))?;
            let form = Form::Grammar(grammar);
            self.checked(Constraint { param, form }).await?;
        }
        Err(refusal)
    }

    /// The grammar of a form, with the reasoning that comes before it and the calls that may stand in its place.
    async fn bound_to(
        &self,
        constraint: Constraint,
        written: Reading,
        tools: &[Tool],
        parallel: bool,
    ) -> Result<Grammar, RouterError> {
        if written.reasoning.is_none() && written.tools.is_none() {
            return self.checked(constraint).await;
        }
        let Constraint { param, form } = constraint.clone();
        let form = Form::Format(tools::bind_form(written, tools, parallel, form.into_format()));
        match self.checked(Constraint { param, form }).await {
            Ok(grammar) => Ok(grammar),
            Err(refusal) => {
                // Alone it is refused with its place.
                self.checked(constraint).await?;
                Err(refusal)
            }
        }
    }
}

impl Form {
    fn into_format(self) -> Format {
        match self {
            Form::Grammar(grammar) => grammar.as_format(),
            Form::Format(format) => format,
        }
    }
}

fn unknown_format(param: &str) -> RouterError {
    let message = format!(
        "{param}: how this model writes tool calls cannot be told from its chat template: start the server with \
         --tool-call-parser NAME, one of {}",
        ToolFormat::all_names().join(", ")
    );
    RouterError::invalid(param, message)
}
