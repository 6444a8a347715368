//! What a job takes over from the adapter that it starts from: what its adapter_config.json says of its shape. Not here: its
//! numbers (the backend reads and checks them), which adapter it is (the router's names).

use serde_json::{Map, Value};

use super::{Lora, TABLES};
use crate::settings::{ALL_LINEAR, Settings};

impl Lora {
    /// Of PEFT's adapter_config.json; `known`: modules of the base. What a job cannot go on with is refused by its field.
    pub fn of_peft(config: &Map<String, Value>, known: &[String]) -> Result<Lora, String> {
        let is_given = |name: &str| match config.get(name) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Object(fields)) => !fields.is_empty(),
            Some(Value::Array(items)) => !items.is_empty(),
            Some(_) => true,
        };
        let uneven = [
            "rank_pattern",
            "alpha_pattern",
            "layers_to_transform",
            "exclude_modules",
        ];
        if let Some(name) = uneven.into_iter().find(|name| is_given(name)) {
            return Err(format!(
                "{name} is set, but a job trains one rank for the same modules of every layer"
            ));
        }
        let number = |name: &str| config.get(name).and_then(Value::as_f64).unwrap_or(8.0);
        let known_and_tables = [known, &TABLES.map(str::to_owned)].concat();
        let target_modules = match config.get("target_modules") {
            Some(Value::String(all)) if all == ALL_LINEAR => known.to_vec(),
            Some(Value::Array(names)) => {
                let of = |name: &Value| {
                    let name = name
                        .as_str()
                        .filter(|name| known_and_tables.iter().any(|known| known == name));
                    name.map(str::to_owned)
                };
                names.iter().map(of).collect::<Option<_>>().ok_or_else(|| {
                    format!(
                        "target_modules has others than names of modules ({})",
                        known_and_tables.join(", ")
                    )
                })?
            }
            _ => return Err("target_modules is not a list of names of modules".to_owned()),
        };
        // In the order in which the base lists them: peft writes a set.
        let target_modules = known_and_tables
            .iter()
            .filter(|name| target_modules.contains(name));
        Ok(Lora {
            r: number("r") as u32,
            alpha: number("lora_alpha"),
            dropout: 0.0,
            target_modules: target_modules.cloned().collect(),
            use_rslora: config.get("use_rslora") == Some(&Value::Bool(true)),
            use_dora: config.get("use_dora") == Some(&Value::Bool(true)),
        })
    }
}

impl Settings {
    /// Takes over what the adapter says. A setting that asks for something else is refused: its name, and why.
    pub fn start_from(&mut self, adapter: &Lora) -> Result<(), (&'static str, String)> {
        let Lora {
            r,
            alpha,
            dropout: _,
            target_modules,
            use_rslora,
            use_dora,
        } = adapter;
        let differs = |name: &'static str, asked: String, there: String| {
            let message = format!(
                "{name} is {asked}, but the adapter that the job starts from has {there}: leave {name} out"
            );
            Err((name, message))
        };
        if let Some(asked) = self.lora_r.filter(|asked| asked != r) {
            return differs("lora_r", asked.to_string(), r.to_string());
        }
        if let Some(asked) = self.lora_alpha.filter(|asked| asked != alpha) {
            return differs("lora_alpha", asked.to_string(), alpha.to_string());
        }
        if let Some(asked) = self.use_rslora.filter(|asked| asked != use_rslora) {
            return differs("use_rslora", asked.to_string(), use_rslora.to_string());
        }
        if let Some(asked) = self.use_dora.filter(|asked| asked != use_dora) {
            return differs("use_dora", asked.to_string(), use_dora.to_string());
        }
        if let Some(asked) = &self.lora_target_modules {
            let is_same =
                asked.len() == target_modules.len() && asked.iter().all(|name| target_modules.contains(name));
            if !is_same && !asked.iter().any(|name| name == ALL_LINEAR) {
                return differs("lora_target_modules", asked.join(", "), target_modules.join(", "));
            }
        }
        self.lora_r = Some(*r);
        self.lora_alpha = Some(*alpha);
        self.use_rslora = Some(*use_rslora);
        self.use_dora = Some(*use_dora);
        self.lora_target_modules = Some(target_modules.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_adapter_says_how_it_is_trained_on() {
        let known = ["q_proj", "k_proj", "v_proj"].map(str::to_owned);
        let read = |config: Value| Lora::of_peft(config.as_object().unwrap(), &known);
        let plain = json!({"r": 4, "lora_alpha": 6.5, "target_modules": ["v_proj", "q_proj"], "rank_pattern": {}, "use_dora": false});
        let lora = read(plain).unwrap();
        assert_eq!((lora.r, lora.alpha, lora.use_rslora), (4, 6.5, false));
        assert_eq!(lora.target_modules, ["q_proj", "v_proj"]);
        let with_head = read(json!({"target_modules": ["lm_head", "v_proj"]})).unwrap();
        assert_eq!(with_head.target_modules, ["v_proj", "lm_head"]);
        for (config, field) in [
            (json!({"target_modules": "q_proj|v_proj"}), "target_modules"),
            (json!({"target_modules": ["embeddings"]}), "target_modules"),
            (
                json!({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}),
                "rank_pattern",
            ),
        ] {
            assert!(read(config).unwrap_err().contains(field));
        }
        let asked = |settings: Value| -> Settings { serde_json::from_value(settings).unwrap() };
        let mut same = asked(json!({"lora_r": 4, "lora_target_modules": ["v_proj", "q_proj"]}));
        same.start_from(&lora).unwrap();
        assert_eq!((same.lora_r, same.lora_alpha), (Some(4), Some(6.5)));
        for (settings, name, text) in [
            (
                json!({"lora_r": 8}),
                "lora_r",
                "is 8, but the adapter that the job starts from has 4",
            ),
            (json!({"lora_alpha": 8.0}), "lora_alpha", "6.5"),
            (json!({"use_rslora": true}), "use_rslora", "false"),
            (
                json!({"lora_target_modules": ["q_proj"]}),
                "lora_target_modules",
                "q_proj, v_proj",
            ),
        ] {
            let (param, message) = asked(settings).start_from(&lora).unwrap_err();
            assert!(param == name && message.contains(text), "{message}");
        }
    }
}
