//! The chat templates of one model: mostly one, sometimes a second for requests with tools.

use std::collections::BTreeMap;

use crate::chat::{ChatTemplate, Kwargs};
use crate::error::TextError;

pub(super) struct Templates {
    source: Option<String>,
    tool_source: Option<String>,
    default: Result<ChatTemplate, TextError>,
    tool_use: Option<Result<ChatTemplate, TextError>>,
}

impl Templates {
    /// Sources by name. Other names than these two are for callers that choose a template themselves, which no request
    /// can.
    pub fn new(mut sources: BTreeMap<String, String>, named_tokens: BTreeMap<String, String>) -> Templates {
        let names: Vec<String> = sources.keys().cloned().collect();
        let mut take = |name: &str| {
            let source = sources.remove(name)?;
            Some((ChatTemplate::new(&source, named_tokens.clone()), source))
        };
        let (tool_use, tool_source) = take("tool_use").unzip();
        match take("default") {
            Some((default, source)) => Templates {
                source: Some(source),
                tool_source,
                default,
                tool_use,
            },
            None => Templates {
                source: None,
                tool_source,
                default: Err(match names.is_empty() {
                    true => TextError::NoChatTemplate,
                    false => TextError::NoDefaultTemplate(names.join(", ")),
                }),
                tool_use,
            },
        }
    }

    /// What is wrong with one that is there.
    pub fn broken(&self) -> Option<&TextError> {
        let all = [Some(&self.default), self.tool_use.as_ref()];
        let mut errors = all
            .into_iter()
            .flatten()
            .filter_map(|template| template.as_ref().err());
        errors.find(|error| !matches!(error, TextError::NoChatTemplate | TextError::NoDefaultTemplate(_)))
    }

    pub fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    pub fn tool_source(&self) -> Option<&str> {
        self.tool_source.as_deref().or(self.source())
    }

    pub fn choose(&self, kwargs: &Kwargs) -> Result<&ChatTemplate, TextError> {
        let has_tools = kwargs.get("tools").is_some_and(|tools| !tools.is_null());
        let chosen = self
            .tool_use
            .as_ref()
            .filter(|_| has_tools)
            .unwrap_or(&self.default);
        chosen.as_ref().map_err(Clone::clone)
    }
}
