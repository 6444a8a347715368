//! The model card of an adapter that leaves the server: what it was made of and how, as far as that is on record.

use std::fmt::Write;

use serde_json::Value;
use tandem_router::api::{AdapterSource, Checkpoint, FileInfo, Job, ModelCard, ModelKind};

/// What is known of the job that made it.
pub struct Origin {
    pub job: Job,
    /// In the order of the job's; gone, when a file was deleted since.
    pub training_files: Vec<Option<FileInfo>>,
    /// The one that it is, or the job's last.
    pub checkpoint: Option<Checkpoint>,
}

/// A README.md as the hub reads it. `config` is the adapter's adapter_config.json.
pub fn readme(card: &ModelCard, config: &Value, origin: Option<&Origin>) -> String {
    let base = config["base_model_name_or_path"].as_str().unwrap_or_default();
    let mut text = String::from("---\n");
    let mut line = |line: String| writeln!(text, "{line}").expect("a text takes lines");
    // A JSON string is a YAML one, whatever is in it.
    line(format!("base_model: {}", Value::from(base)));
    line("library_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- tandem\n---\n".to_owned());
    line(format!("# {}\n", card.name));
    let ModelKind::Adapter {
        digest,
        parent,
        source,
        ..
    } = &card.kind
    else {
        return text;
    };
    line("| | |\n|---|---|".to_owned());
    let mut row = |name: &str, value: String| line(format!("| {name} | {} |", value.replace('|', "\\|")));
    row("base model", format!("{base} (served as {parent})"));
    row("adapter digest", digest.to_string());
    for name in ["r", "lora_alpha", "use_rslora", "target_modules"] {
        row(name, config[name].to_string());
    }
    match source {
        AdapterSource::Loaded => row("made by", "not known: it was loaded".to_owned()),
        AdapterSource::Job { job, step: None } => row("made by", job.clone()),
        AdapterSource::Job {
            job,
            step: Some(step),
        } => row("made by", format!("{job}, after step {step}")),
    }
    let Some(Origin {
        job,
        training_files,
        checkpoint,
    }) = origin
    else {
        return text;
    };
    for (id, file) in job.request.training_file.0.iter().zip(training_files) {
        let file = match file {
            Some(FileInfo { filename, bytes, .. }) => format!("{filename}, {bytes} bytes"),
            None => "deleted since".to_owned(),
        };
        row("training_file", format!("{id} ({file})"));
    }
    if let Some(tokens) = job.trained_tokens {
        row("trained tokens", tokens.to_string());
    }
    let metrics = checkpoint.as_ref().map(|checkpoint| &checkpoint.metrics);
    for (name, value) in metrics.and_then(Value::as_object).into_iter().flatten() {
        row(name, value.to_string());
    }
    if let Some(hyper) = &job.hyper {
        let hyper = serde_json::to_value(hyper).expect("plain data is JSON");
        for (name, value) in hyper.as_object().into_iter().flatten() {
            row(name, value.to_string());
        }
    }
    text
}
