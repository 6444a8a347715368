//! What a job takes over from the adapter that it starts from: what its adapter_config.json says of its shape. Not here: its
//! numbers (the backend reads and checks them), which adapter it is (the router's names).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{Lora, TABLES};
use crate::settings::{ALL_LINEAR, Settings};

/// Before the name of the matrix, in peft's names of tensors.
const MATRICES: [&str; 2] = [".lora_A.", ".lora_embedding_A"];
/// The length of a safetensors file's header stands before it.
const LENGTH_BYTES: usize = 8;

impl Lora {
    /// What a job takes over: as [`Lora::of_peft`], and of an adapter with modules, layers, ranks or scales of its own
    /// (`rank_pattern`, `layers_to_transform`, a regular expression, ...) the greatest rank and the modules that some layer
    /// has. Its own shape is then read with its numbers, by who trains it. `tensors`: the safetensors file, or its beginning with
    /// the header whole.
    pub fn of_start(config: &Map<String, Value>, tensors: &[u8], known: &[String]) -> Result<Lora, String> {
        if let Ok(even) = Lora::of_peft(config, known) {
            return Ok(even);
        }
        let known_and_tables = [known, &TABLES.map(str::to_owned)].concat();
        let mut ranks: BTreeMap<String, u64> = BTreeMap::new();
        for (name, tensor) in header(tensors)? {
            let Some(path) = MATRICES
                .iter()
                .find_map(|matrix| Some(name.split_once(matrix)?.0))
            else {
                continue;
            };
            let module = path.rsplit('.').next().unwrap_or(path);
            if !known_and_tables.iter().any(|known| known == module) {
                let names = known_and_tables.join(", ");
                return Err(format!("it adapts {path}, and modules that train are {names}"));
            }
            let rank = tensor["shape"][0].as_u64().unwrap_or(0);
            let most = ranks.entry(module.to_owned()).or_default();
            *most = rank.max(*most);
        }
        let r = ranks.values().max().copied().filter(|&r| r > 0);
        let r = r.and_then(|r| u32::try_from(r).ok());
        let is_set = |name: &str| config.get(name) == Some(&Value::Bool(true));
        Ok(Lora {
            r: r.ok_or("it has no LoRA tensor")?,
            alpha: config.get("lora_alpha").and_then(Value::as_f64).unwrap_or(8.0),
            dropout: 0.0,
            target_modules: known_and_tables
                .into_iter()
                .filter(|name| ranks.contains_key(name))
                .collect(),
            use_rslora: is_set("use_rslora"),
            use_dora: is_set("use_dora"),
        })
    }

    /// Of PEFT's adapter_config.json, of one rank for the same modules of every layer; `known`: modules of the base. What is not
    /// of such an adapter is refused by its field.
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
                "{name} is set, but here one rank is trained for the same modules of every layer"
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

/// What a safetensors file says of its tensors.
fn header(tensors: &[u8]) -> Result<Map<String, Value>, String> {
    let damaged = || "its tensors are no safetensors file".to_owned();
    let (length, rest) = tensors.split_first_chunk::<LENGTH_BYTES>().ok_or_else(damaged)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| damaged())?;
    let header = rest.get(..length).ok_or_else(damaged)?;
    serde_json::from_slice(header).map_err(|error| format!("{}: {error}", damaged()))
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
        // Ranks and layers of its own: what its tensors are.
        let own = json!({"r": 4, "lora_alpha": 6, "target_modules": ".*[01].*_proj", "rank_pattern": {"q_proj": 2}});
        let tensor = |module: &str, rank: u64| {
            let name = format!("base_model.model.model.layers.1.self_attn.{module}.lora_A.weight");
            (
                name,
                json!({"dtype": "F32", "shape": [rank, 8], "data_offsets": [0, 0]}),
            )
        };
        let of_start = |modules: &[(&str, u64)]| {
            let header: Map<String, Value> = modules
                .iter()
                .map(|&(module, rank)| tensor(module, rank))
                .collect();
            let header = Value::Object(header).to_string();
            let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
            Lora::of_start(own.as_object().unwrap(), &file, &known)
        };
        let uneven = of_start(&[("v_proj", 5), ("q_proj", 2)]).unwrap();
        assert_eq!((uneven.r, uneven.alpha), (5, 6.0));
        assert_eq!(uneven.target_modules, ["q_proj", "v_proj"]);
        assert!(
            of_start(&[("w_proj", 5)])
                .unwrap_err()
                .contains("w_proj, and modules that train")
        );
        assert!(of_start(&[]).is_err());
        assert!(Lora::of_start(own.as_object().unwrap(), b"x", &known).is_err());
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
