//! What of a model an adapter changes: in Tinker's words, and as PEFT has it. Not here: numbers.

use tandem_core::job::{LM_HEAD, Lora, TABLES};
use tandem_store::SaveRecord;

/// W' = W + (alpha / rank) B A, as Tinker has it ("LoRA Without Regret").
const ALPHA: f64 = 32.0;
const ATTENTION: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];

/// Of an adapter that was made elsewhere: what it changes some of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    pub rank: u32,
    pub train_attn: bool,
    pub train_mlp: bool,
    pub train_unembed: bool,
}

impl Reach {
    pub fn of(lora: &Lora) -> Reach {
        let is_attention = |name: &&String| ATTENTION.contains(&name.as_str());
        let names = || lora.target_modules.iter();
        Reach {
            rank: lora.r,
            train_attn: names().any(|name| is_attention(&name)),
            train_mlp: names().any(|name| !is_attention(&name) && !TABLES.contains(&name.as_str())),
            train_unembed: names().any(|name| name == LM_HEAD),
        }
    }

    /// `known`: modules of the base.
    pub fn lora(self, known: &[String]) -> Lora {
        let chosen = known
            .iter()
            .filter(|name| match ATTENTION.contains(&name.as_str()) {
                true => self.train_attn,
                false => self.train_mlp,
            });
        let head = self.train_unembed.then(|| LM_HEAD.to_owned());
        Lora {
            r: self.rank,
            alpha: ALPHA,
            dropout: 0.0,
            target_modules: chosen.cloned().chain(head).collect(),
            use_rslora: false,
            use_dora: false,
        }
    }
}

pub(super) fn lora_of(record: &SaveRecord, known: &[String]) -> Lora {
    let reach = Reach {
        rank: record.rank,
        train_attn: record.train_attn,
        train_mlp: record.train_mlp,
        train_unembed: record.train_unembed,
    };
    record.lora.clone().unwrap_or_else(|| reach.lora(known))
}

pub(super) fn words(lora: &Lora) -> String {
    let Lora {
        r,
        alpha,
        dropout: _,
        target_modules,
        use_rslora,
        use_dora,
    } = lora;
    let kind = match (use_dora, use_rslora) {
        (true, _) => " with DoRA",
        (false, true) => " with rsLoRA",
        (false, false) => "",
    };
    format!(
        "rank {r} and alpha {alpha}{kind} on {}",
        target_modules.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_neither_attention_nor_mlp() {
        let reach = |modules: &[&str]| {
            let asked = Reach {
                rank: 4,
                train_attn: false,
                train_mlp: false,
                train_unembed: false,
            };
            let target_modules = modules.iter().map(|&name| name.to_owned()).collect();
            let Reach {
                rank: _,
                train_attn,
                train_mlp,
                train_unembed,
            } = Reach::of(&Lora {
                target_modules,
                ..asked.lora(&[])
            });
            (train_attn, train_mlp, train_unembed)
        };
        assert_eq!(reach(&["embed_tokens"]), (false, false, false));
        assert_eq!(reach(&["embed_tokens", "lm_head"]), (false, false, true));
        assert_eq!(reach(&["q_proj", "up_proj"]), (true, true, false));
    }
}
