//! Command lines, settings files and variables together: what wins, and what is refused.

use super::*;
use crate::cli;

fn serve(args: &str, variables: &[&str]) -> Result<(cli::Serve, Given), ConfigError> {
    let args = ["tandem", "serve"]
        .into_iter()
        .chain(args.split_whitespace())
        .map(OsString::from);
    let parsed = parse(args, variables.iter().map(|&name| name.to_owned()))?;
    match parsed.cli.command {
        cli::Command::Serve(serve) => Ok((*serve, parsed.given)),
        other => panic!("{other:?}"),
    }
}

fn refusal(args: &str, variables: &[&str]) -> String {
    serve(args, variables).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn the_file_is_below_the_flags_and_above_the_defaults() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = "port = 9\nmax_num_seqs = 7\nkv-cache-memory = \"1G\"\nserved-model-name = [\"m\", \"n\"]\n\
                enable-lora = true\nlora-modules = { a = \"x\", b = \"y\" }\n";
    std::fs::write(file.path(), text).unwrap();
    let (serve, given) = serve(&format!("--config {} --port 10", file.path().display()), &[]).unwrap();
    assert_eq!((serve.edge.port, serve.model.max_num_seqs), (10, Some(7)));
    assert_eq!(serve.model.kv_cache_memory_bytes, Some(1 << 30));
    assert_eq!(serve.model.served_model_name, ["m", "n"]);
    let adapters: Vec<_> = serve
        .edge
        .adapters()
        .map(|module| (&*module.name, module.path.as_path()))
        .collect();
    assert_eq!(adapters, [("a", Path::new("x")), ("b", Path::new("y"))]);
    let source = |name: &str| {
        let mut options = given.options.iter();
        options
            .find(|option| option.name == name)
            .map(|option| option.source)
    };
    assert_eq!(source("port"), Some(Source::Flag));
    assert_eq!(source("max-num-seqs"), Some(Source::File));
    assert_eq!(source("host"), None);
    assert_eq!(given.harmless.len(), 1);
}

#[test]
fn unknown_names_are_refused_with_a_suggestion() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let config = format!("--config {}", file.path().display());
    for (text, expected) in [
        ("prt = 9", "did you mean port?"),
        ("max-num-seq = 9", "did you mean max-num-seqs?"),
        ("zzz = 1", "unknown option \"zzz\""),
        ("config = \"x\"", "unknown option"),
        ("port = true", "invalid value 'true'"),
        ("port = 1\nPORT = 2", "unknown option \"PORT\""),
        ("max-num-seqs = 1\nmax_num_seqs = 2", "say the same"),
        ("port = 1979-05-27", "must be a string"),
        ("port = ", "is not TOML"),
        ("port = \"many\"", "invalid value 'many'"),
        ("gpu-memory-utilization = 0.9", "use --kv-cache-memory-bytes"),
    ] {
        std::fs::write(file.path(), text).unwrap();
        let message = refusal(&config, &[]);
        assert!(message.contains(expected), "{text}: {message}");
    }
    for (variable, expected) in [
        ("TANDEM_PROT", "did you mean TANDEM_PORT?"),
        (
            "TANDEM_GPU_MEMORY_UTILISATION",
            "did you mean TANDEM_GPU_MEMORY_UTILIZATION?",
        ),
    ] {
        let message = refusal("", &[variable, "HOME"]);
        assert!(message.contains(expected), "{message}");
    }
    assert!(refusal("", &["TANDEM_MAX_MODEL_LEN", "TANDEM_CONTEXT_LENGTH"]).contains("say the same"));
    assert!(serve("", &["TANDEM_PORT", "TANDEM_LOG"]).is_ok());
    assert!(refusal("--prot 9", &[]).contains("--port"));
}

#[test]
fn command_lines_of_other_servers_are_understood() {
    let line = "./m --enable-lora --served-model-name a b --max_model_len 32k --dtype half -tp 1 --seed 7 \
                --host localhost --gpu-layers=3";
    let message = refusal(line, &[]);
    assert!(message.contains("--gpu-layers is not taken"), "{message}");
    let (serve, given) = serve(&line.replace("--gpu-layers=3", "--no-enable-prefix-caching"), &[]).unwrap();
    let cli::ModelOptions {
        served_model_name,
        max_model_len,
        tensor_parallel_size,
        seed,
        ..
    } = &serve.model;
    assert_eq!(serve.model.folder(), Some(Path::new("./m")));
    assert_eq!(served_model_name[..], ["a", "b"]);
    assert_eq!(*max_model_len, Some(tandem_backend::ModelLen::Asked(32_000)));
    assert_eq!((*tensor_parallel_size, *seed), (Some(1), Some(7)));
    assert!(serve.edge.host.is_loopback());
    let harmless: Vec<&str> = given.harmless.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(harmless, ["--enable-prefix-caching", "--enable-lora"]);
}

#[test]
fn each_foreign_option_gets_its_word() {
    // None: it is taken.
    for (line, expected) in [
        ("--gpu-memory-utilization 0.9", Some("--kv-cache-memory-bytes")),
        ("--tool-call-parser hermes --reasoning-parser none", None),
        ("--tool-parser-plugin x.py", Some("--tool-call-parser")),
        ("-q int8", None),
        ("--no-enable-auto-tool-choice", None),
        ("--enable-auto-tool-choice", None),
        ("--pipeline-parallel-size 1 --data-parallel-size=1", None),
        ("-pp 2", Some("--tensor-parallel-size")),
        (
            "--load-format auto --kv-cache-dtype auto --tokenizer-mode auto",
            None,
        ),
        (
            "--trust-remote-code --enforce-eager --disable-log-requests --swap-space 4",
            None,
        ),
        ("--model m ./m", Some("say the same")),
        (
            "--model-path m --tp-size 1 --context-length 4K --max-running-requests 8",
            None,
        ),
        ("-hf org/name --code-revision x", None),
        ("--enable-lora true", Some("takes no word")),
        ("--enable-lora=true", None),
        ("--workers 4", Some("tandem backend")),
        ("--hf-token x", Some("HF_TOKEN")),
        ("--download-dir x", Some("HF_HUB_CACHE")),
        ("--max-model-len -1", None),
        ("--max-model-len 0", Some("4k (4000)")),
    ] {
        match (serve(line, &[]), expected) {
            (Ok(_), None) => {}
            (Err(error), Some(part)) => assert!(error.to_string().contains(part), "{line}: {error}"),
            (Err(error), None) => panic!("{line}: {error}"),
            (Ok(_), Some(part)) => panic!("{line} is taken, not refused with {part}"),
        }
    }
}

#[test]
fn variables_of_other_servers_are_named() {
    let variables = [
        "VLLM_API_KEY",
        "VLLM_FLASH_ATTN_VERSION",
        "DATABASE_URL",
        "HOME",
        "TANDEM_PORT",
    ];
    let (_, given) = serve("", &variables).unwrap();
    let unread: Vec<&str> = given.unread.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        unread,
        ["VLLM_API_KEY", "VLLM_FLASH_ATTN_VERSION", "DATABASE_URL"]
    );
    assert!(given.unread[0].1.contains("TANDEM_API_KEY"));
}

#[test]
fn other_commands_are_told_what_to_use() {
    for (word, expected) in [
        ("chat", "`tandem generate MODEL user=TEXT`"),
        ("run", "`tandem serve`"),
        ("sevre", "did you mean `tandem serve`?"),
        ("finetune", "`tandem train"),
        ("/tmp", "did you mean `tandem serve /tmp`?"),
        ("org/name", "did you mean `tandem serve org/name`?"),
        ("pull", "`tandem download"),
        ("zzz", "`tandem --help`"),
    ] {
        let args = ["tandem", word].map(OsString::from);
        let message = parse(args, []).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains(expected), "{word}: {message}");
    }
}
