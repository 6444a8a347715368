//! How a chat's answer is read (reasoning and calls apart from the content) and what binds it. The formats are the model's:
//! chosen once, by its chat template or by name. Not here: reading and binding themselves (`tandem_text::tools`).

use std::collections::BTreeSet;
use std::sync::Arc;

use tandem_core::TokenId;
use tandem_core::grammar::{Format, Grammar, Whitespace};
use tandem_text::chat::{CallIds, Kwargs};
use tandem_text::reasoning::ReasoningFormat;
use tandem_text::tools::{self, Choice, Reader, Reading, Tool, ToolFormat};
use tandem_text::{Skip, Tokenizer};

use crate::Router;
use crate::api::{Answer, Constraint, Form, Reasoning, RouterError, ToolChoice};

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
    ) -> Result<(Plan, Option<Grammar>), RouterError> {
        let Answer {
            tools,
            choice,
            parallel,
            separate_reasoning,
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
        let is_opened_in = |format: &&ReasoningFormat| {
            let tail = &prompt[prompt.len().saturating_sub(TAIL)..];
            let tail = self.tokenizer().decode(tail, Skip::Nothing);
            tail.is_ok_and(|tail| format.is_opened_by(&tail))
        };
        let reasoning = formats.reasoning.filter(|_| separate_reasoning);
        let mut reading = Reading {
            tools: formats.tools.filter(|_| calls),
            reasoning,
            is_opened: reasoning.as_ref().is_some_and(is_opened_in),
        };
        let grammar = match (constraint, &choice) {
            (None, ToolChoice::Required) => {
                Some(self.bound(reading, &tools, Choice::Required, parallel).await?)
            }
            (None, ToolChoice::Named(name)) => {
                Some(self.bound(reading, &tools, Choice::Named(name), false).await?)
            }
            (None, ToolChoice::Auto | ToolChoice::None) => None,
            (Some(Constraint { param, form }), _) => {
                // What is bound from its first token on has no reasoning.
                (reading.reasoning, reading.is_opened) = (None, false);
                let form = match tools::bind(reading, &tools, Choice::Required, parallel) {
                    Some(calls) => Form::Format(Format::Or(vec![form.into_format(), calls])),
                    None => form,
                };
                Some(self.checked(Constraint { param, form }).await?)
            }
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
        Ok((plan, grammar))
    }

    /// The grammar of calls. A schema that cannot be honoured is named by its place.
    async fn bound(
        &self,
        reading: Reading,
        tools: &[Tool],
        choice: Choice<'_>,
        parallel: bool,
    ) -> Result<Grammar, RouterError> {
        let format =
            tools::bind(reading, tools, choice, parallel).ok_or_else(|| unknown_format("tool_choice"))?;
        let whole = Constraint {
            param: "tools".to_owned(),
            form: Form::Format(format),
        };
        let refusal = match self.checked(whole).await {
            Ok(grammar) => return Ok(grammar),
            Err(refusal) => refusal,
        };
        for (i, tool) in tools.iter().enumerate() {
            let is_chosen = match choice {
                Choice::Named(name) => tool.name == name,
                _ => true,
            };
            let Some(schema) = tool.parameters.as_ref().filter(|_| is_chosen) else {
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
