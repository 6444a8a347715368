//! Command lines of `tandem train`, of TRL and of torchtune, as settings.

/// TRL's command lines, too: `--learning_rate 1e-4`, `--packing`, `--config recipe.yaml`.
pub fn as_settings(args: &[String]) -> Vec<String> {
    let (mut settings, mut args) = (Vec::new(), args.iter().peekable());
    while let Some(arg) = args.next() {
        let Some(flag) = arg.strip_prefix("--") else {
            // Programs of torchtune, whose configs say the rest.
            match arg.as_str() {
                "lora_finetune_single_device" => settings.push("method=lora".to_owned()),
                "full_finetune_single_device" => settings.push("method=full".to_owned()),
                // These share what their ranks hold.
                "lora_finetune_distributed" | "lora_finetune_fsdp2" => {
                    settings.extend([
                        "method=lora".to_owned(),
                        "sharding_strategy=FULL_SHARD".to_owned(),
                    ]);
                }
                "full_finetune_distributed" => {
                    settings.extend([
                        "method=full".to_owned(),
                        "sharding_strategy=FULL_SHARD".to_owned(),
                    ]);
                }
                "lora_dpo_single_device" | "lora_dpo_distributed" => {
                    settings.extend(["method=lora".to_owned(), "objective=dpo".to_owned()]);
                }
                _ => settings.push(arg.clone()),
            }
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (
                flag,
                args.next_if(|next| !next.starts_with("--")).map(String::as_str),
            ),
        };
        match (name, value) {
            ("config", Some(file)) => settings.insert(0, file.to_owned()),
            // A flag of its own in any place.
            ("preview", Some(value)) if value.parse::<usize>().is_err() => {
                settings.extend(["preview=true".to_owned(), value.to_owned()]);
            }
            _ => settings.push(format!("{}={}", name.replace('-', "_"), value.unwrap_or("true"))),
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    #[test]
    fn flags_are_settings_as_well() {
        for (line, expected) in [
            ("recipe.yaml lr=1e-4", "recipe.yaml lr=1e-4"),
            (
                "--nproc_per_node 1 lora_finetune_distributed --config x.yaml dataset.split=train[:1%]",
                "x.yaml nproc_per_node=1 method=lora sharding_strategy=FULL_SHARD dataset.split=train[:1%]",
            ),
            ("recipe.yaml --preview", "recipe.yaml preview=true"),
            ("--preview lr=1", "preview=true lr=1"),
            ("--preview 5", "preview=5"),
            (
                "--learning-rate 1e-4 --packing --config recipe.yaml --seed=3",
                "recipe.yaml learning_rate=1e-4 packing=true seed=3",
            ),
            ("--lr -1", "lr=-1"),
        ] {
            let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
            assert_eq!(super::as_settings(&args).join(" "), expected);
        }
    }
}
