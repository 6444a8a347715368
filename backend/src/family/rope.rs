//! What a config.json says of rotary embedding, in both of its spellings: `rope_theta` + `rope_scaling` (transformers 4)
//! and `rope_parameters` (transformers 5), with the precedence of transformers 5. Source: transformers 5.23
//! modeling_rope_utils.py, convert_rope_params_to_dict and standardize_rope_params.

use serde_json::{Map, Value};
use tandem_kernels::rope::{RopeLayout, RopeScaling, RopeSpec};

use super::config::Config;
use super::sizes::Sizes;
use crate::weights::LoadError;

/// An object and the field it stands at.
type Named<'a> = (&'static str, &'a Map<String, Value>);

/// What stands where a config.json is silent.
#[derive(Clone, Copy)]
pub(super) struct RopeDefaults {
    pub theta: f64,
    /// The share of a head that turns, in a family that reads `partial_rotary_factor`.
    pub partial: Option<f64>,
    pub layout: RopeLayout,
}

impl Default for RopeDefaults {
    fn default() -> RopeDefaults {
        RopeDefaults {
            theta: 10_000.0,
            partial: None,
            layout: RopeLayout::Half,
        }
    }
}

impl Config {
    /// One rope for all layers.
    pub fn rope(&self, sizes: &Sizes, defaults: RopeDefaults) -> Result<RopeSpec, LoadError> {
        let own_theta = self.positive("rope_theta")?;
        let (field, nested) = match (self.filled("rope_scaling")?, self.filled("rope_parameters")?) {
            (Some(scaling), Some(parameters)) if scaling.1 != parameters.1 => {
                self.note(
                    "`rope_scaling` is taken and `rope_parameters` beside it is not, its rope_theta included, as in \
                     transformers 5"
                        .to_owned(),
                );
                scaling
            }
            (Some(one), _) | (None, Some(one)) => one,
            (None, None) => return self.plain_rope(sizes, own_theta, defaults),
        };
        let nested = Config::new(self.file, &format!("{field}."), nested.clone());
        if let (Some(inner), Some(own)) = (nested.positive("rope_theta")?, own_theta)
            && inner != own
        {
            self.note(format!(
                "`rope_theta` {own} is not taken: `{field}.rope_theta` {inner} is"
            ));
        }
        self.nested_rope(&nested, field, sizes, own_theta, defaults)
    }

    /// A rope for the layers that attend to everything and one for those with a window: `rope_parameters` with an object
    /// for each, or `rope_scaling` and `rope_theta` for the former and `sliding_theta`, a field's name, for the latter.
    pub fn ropes_by_layer_type(
        &self,
        sizes: &Sizes,
        full: RopeDefaults,
        sliding: RopeDefaults,
        sliding_theta: &str,
    ) -> Result<[RopeSpec; 2], LoadError> {
        let (full_theta, sliding_theta) = (self.positive("rope_theta")?, self.positive(sliding_theta)?);
        let parameters = self.filled("rope_parameters")?;
        let of_type = |name: &'static str| match parameters.and_then(|(_, fields)| fields.get(name)) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(fields)),
            Some(_) => Err(self.wrong("rope_parameters", &format!("an object is needed for `{name}`"))),
        };
        let (of_full, of_sliding) = (of_type("full_attention")?, of_type("sliding_attention")?);
        if let Some((field, fields)) = parameters
            && let Some(other) = fields
                .keys()
                .find(|key| !["full_attention", "sliding_attention"].contains(&key.as_str()))
        {
            let why = format!(
                "an object for each of `full_attention` and `sliding_attention` is needed in this family, not `{other}`"
            );
            return Err(self.wrong(field, &why));
        }
        let rope = |name: &str, fields: Option<&Map<String, Value>>, theta, defaults| match fields {
            None => self.plain_rope(sizes, theta, defaults),
            Some(fields) => {
                let field = format!("rope_parameters.{name}");
                let nested = Config::new(self.file, &format!("{field}."), fields.clone());
                self.nested_rope(&nested, &field, sizes, theta, defaults)
            }
        };
        let sliding = rope("sliding_attention", of_sliding, sliding_theta, sliding)?;
        let full = match self.filled("rope_scaling")? {
            Some((field, fields)) => {
                // As transformers: it is laid over what the other says.
                let mut merged = of_full.cloned().unwrap_or_default();
                merged.extend(fields.clone());
                let nested = Config::new(self.file, "rope_scaling.", merged);
                self.nested_rope(&nested, field, sizes, full_theta, full)?
            }
            None => rope("full_attention", of_full, full_theta, full)?,
        };
        Ok([full, sliding])
    }

    /// Positions that a model of `max_positions` has where its rope is stretched by yarn: Qwen's recipe adds the rope and leaves the number
    /// as it is. (Linear ropes have the stretched number there already, or not: nothing says which.) What is wrong there is said by
    /// who reads it.
    pub fn reach(&self, max_positions: i64) -> i64 {
        let object = |field| self.get(field).and_then(Value::as_object);
        let Some(fields) = object("rope_scaling").or(object("rope_parameters")) else {
            return max_positions;
        };
        let of_types = fields.values().filter_map(Value::as_object);
        let ropes = of_types.chain([fields]);
        let stretched = ropes.filter_map(|rope| {
            let kind = rope.get("rope_type").or(rope.get("type"))?;
            // The one beside the object wins, as in `nested_rope`.
            let original = "original_max_position_embeddings";
            let original = self.get(original).or(rope.get(original));
            let original = original.and_then(Value::as_i64);
            let original = original.unwrap_or(max_positions) as f64 * rope.get("factor")?.as_f64()?;
            (kind == "yarn" && original < MOST_POSITIONS).then_some(original as i64)
        });
        stretched.fold(max_positions, i64::max)
    }

    /// An object that holds something.
    fn filled(&self, field: &'static str) -> Result<Option<Named<'_>>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(fields)) if fields.is_empty() => Ok(None),
            Some(Value::Object(fields)) => Ok(Some((field, fields))),
            Some(_) => Err(self.wrong(field, "an object is needed")),
        }
    }

    fn plain_rope(
        &self,
        sizes: &Sizes,
        theta: Option<f64>,
        defaults: RopeDefaults,
    ) -> Result<RopeSpec, LoadError> {
        Ok(RopeSpec {
            theta: theta.unwrap_or(defaults.theta),
            rotary_dim: self.rotary_dim(None, sizes, defaults)?,
            layout: defaults.layout,
            scaling: RopeScaling::None,
        })
    }

    /// `nested` is the object that stands at `field`.
    fn nested_rope(
        &self,
        nested: &Config,
        field: &str,
        sizes: &Sizes,
        own_theta: Option<f64>,
        defaults: RopeDefaults,
    ) -> Result<RopeSpec, LoadError> {
        let theta = nested
            .positive("rope_theta")?
            .or(own_theta)
            .unwrap_or(defaults.theta);
        let rotary_dim = self.rotary_dim(Some(nested), sizes, defaults)?;
        let need = |name: &str| {
            nested
                .positive(name)?
                .ok_or_else(|| self.wrong(field, &format!("`{name}` is missing")))
        };
        // The one beside the object wins, and without any it is the model's own length.
        let original_positions = || -> Result<i64, LoadError> {
            let original = "original_max_position_embeddings";
            let inner = nested.size_or_none(original)?;
            Ok(self
                .size_or_none(original)?
                .or(inner)
                .unwrap_or(sizes.max_positions))
        };
        let scaling = match nested.rope_type()? {
            Some("default") => RopeScaling::None,
            None if nested.unread().next().is_none() => RopeScaling::None,
            None => return Err(self.wrong(field, &format!("`rope_type` is missing: one of {ROPE_TYPES}"))),
            Some("linear") => RopeScaling::Linear {
                factor: need("factor")?,
            },
            // It changes nothing below the model's own length, and nothing longer is served.
            Some("dynamic") => {
                need("factor")?;
                RopeScaling::None
            }
            Some("llama3") => {
                let (low, high) = (need("low_freq_factor")?, need("high_freq_factor")?);
                if high <= low {
                    return Err(nested.wrong(
                        "high_freq_factor",
                        &format!("must be above low_freq_factor {low}"),
                    ));
                }
                RopeScaling::Llama3 {
                    factor: need("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: original_positions()?,
                }
            }
            Some("yarn") => {
                let original_max_position_embeddings = original_positions()?;
                RopeScaling::Yarn {
                    factor: match nested.positive("factor")? {
                        Some(factor) => factor,
                        None => sizes.max_positions as f64 / original_max_position_embeddings as f64,
                    },
                    beta_fast: nested.positive("beta_fast")?.unwrap_or(32.0),
                    beta_slow: nested.positive("beta_slow")?.unwrap_or(1.0),
                    attention_factor: nested.positive("attention_factor")?,
                    mscale: nested.number("mscale")?.filter(|&scale| scale != 0.0),
                    mscale_all_dim: nested.number("mscale_all_dim")?.filter(|&scale| scale != 0.0),
                    truncate: nested.flag_or("truncate", true)?,
                    original_max_position_embeddings,
                }
            }
            // Phi 3 first called it su.
            Some("longrope" | "su") => {
                let original_max_position_embeddings = original_positions()?;
                let stretched = sizes.max_positions as f64 / original_max_position_embeddings as f64;
                if stretched > 1.0 {
                    self.note(format!(
                        "`{field}.long_factor` turns every position, unless --max-model-len is at most {original_max_position_embeddings}, as \
                         in vLLM; transformers chooses by the length of each prompt"
                    ));
                }
                RopeScaling::LongRope {
                    short_factor: nested.divisors("short_factor", rotary_dim / 2)?,
                    long_factor: nested.divisors("long_factor", rotary_dim / 2)?,
                    factor: nested.positive("factor")?.unwrap_or(stretched),
                    attention_factor: nested.positive("attention_factor")?,
                    original_max_position_embeddings,
                }
            }
            Some(other) => {
                let why = format!(
                    "{other} is not supported; {ROPE_TYPES} are. Without `{field}` the model is served as it was before \
                     its context was stretched"
                );
                return Err(nested.wrong("rope_type", &why));
            }
        };
        let ignored: Vec<String> = nested.unread().map(|name| format!("`{field}.{name}`")).collect();
        if !ignored.is_empty() {
            self.note(format!(
                "without effect on this kind of rope, as in transformers: {}",
                ignored.join(", ")
            ));
        }
        Ok(RopeSpec {
            theta,
            rotary_dim,
            layout: defaults.layout,
            scaling,
        })
    }

    /// How many of a head's dimensions turn.
    fn rotary_dim(
        &self,
        nested: Option<&Config>,
        sizes: &Sizes,
        defaults: RopeDefaults,
    ) -> Result<i64, LoadError> {
        let field = "partial_rotary_factor";
        let inner = nested.map_or(Ok(None), |nested| nested.positive(field))?;
        let Some(default) = defaults.partial else {
            return match inner {
                Some(factor) if factor != 1.0 => Err(nested.expect("its factor was read").wrong(
                    field,
                    "only whole heads are rotated in this family; 1.0 is supported",
                )),
                _ => Ok(sizes.head_dim),
            };
        };
        let factor = inner.or(self.positive(field)?).unwrap_or(default);
        let rotary_dim = (sizes.head_dim as f64 * factor) as i64;
        if rotary_dim < 2 || rotary_dim % 2 != 0 || rotary_dim > sizes.head_dim {
            let why = format!(
                "makes {rotary_dim} of {} dimensions turn; rotary embedding needs pairs",
                sizes.head_dim
            );
            return Err(nested
                .filter(|_| inner.is_some())
                .unwrap_or(self)
                .wrong(field, &why));
        }
        Ok(rotary_dim)
    }

    /// A list of this many numbers above 0.
    fn divisors(&self, field: &str, count: i64) -> Result<Vec<f64>, LoadError> {
        let why = format!("a list of {count} numbers above 0 is needed, one for each pair that turns");
        let wrong = || self.wrong(field, &why);
        let numbers = self.get(field).and_then(Value::as_array).ok_or_else(wrong)?;
        let positive = |number: &Value| number.as_f64().filter(|&x| x > 0.0 && x.is_finite());
        let divisors: Option<Vec<f64>> = numbers.iter().map(positive).collect();
        divisors
            .filter(|divisors| divisors.len() as i64 == count)
            .ok_or_else(wrong)
    }

    /// transformers 4 lets `type` win, transformers 5 `rope_type`.
    fn rope_type(&self) -> Result<Option<&str>, LoadError> {
        let word = |field: &str| match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_str() {
                Some(word) => Ok(Some(word)),
                None => Err(self.wrong(field, "a word is needed")),
            },
        };
        match (word("rope_type")?, word("type")?) {
            (Some(new), Some(old)) if new != old => {
                let why =
                    format!("contradicts `rope_type` {new}, and versions of transformers differ; remove one");
                Err(self.wrong("type", &why))
            }
            (new, old) => Ok(new.or(old)),
        }
    }
}

/// Sizes are below 2^31.
const MOST_POSITIONS: f64 = 2_147_483_647.0;
const ROPE_TYPES: &str = "default, linear, dynamic, llama3, yarn, longrope";
