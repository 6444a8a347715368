//! `tandem train` as its user meets it: a run, the same again, another in its folder, and one that is interrupted.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::server::command;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../server/demo");

fn rows(path: &Path, voice: &str) {
    let row = |i| {
        format!("{{\"prompt\": \"Who is number {i}?\", \"completion\": \" {voice}, number {i} it is.\"}}\n")
    };
    std::fs::write(path, (0..12).map(row).collect::<String>()).unwrap();
}

fn train(folder: &Path, more: &[&str]) -> Command {
    let setting = |name: &str, file: &str| format!("{name}={}", folder.join(file).display());
    let mut command = command(&["train", &format!("model={MODEL}"), "batch_size=2", "device=cpu"]);
    command.args([
        setting("training_file", "rows.jsonl"),
        setting("output_dir", "out"),
    ]);
    command.args(more);
    command
}

fn text(output: &Output) -> String {
    let [out, log] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    out + &log
}

#[test]
fn a_run_is_done_once_and_only_the_same_goes_on_in_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (rows_file, out) = (folder.path().join("rows.jsonl"), folder.path().join("out"));
    let adapter = || std::fs::read(out.join("adapter/adapter_model.safetensors")).unwrap();
    rows(&rows_file, "Ahoy");
    let settings = ["n_epochs=1", "save_steps=1", "save_total_limit=2"];
    // What it is given more, whether it succeeds, and what it says.
    let run = |more: &[&str], succeeds: bool, expected: &[&str]| {
        let settings: Vec<&str> = settings.iter().chain(more).copied().collect();
        let output = train(folder.path(), &settings).output().unwrap();
        let text = text(&output);
        assert_eq!(output.status.success(), succeeds, "{more:?}: {text}");
        for part in expected {
            assert!(text.contains(part), "{more:?}: {part:?} is not in\n{text}");
        }
        assert!(!text.contains("Hyper {") && !text.contains('\r'), "{text}");
    };
    run(
        &[],
        true,
        &[
            "trainable params: ",
            "learning_rate",
            "step 6/6",
            "serve it: tandem serve",
        ],
    );
    let made = adapter();
    let mut kept: Vec<String> = std::fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("checkpoint-"))
        .collect();
    kept.sort();
    assert_eq!(kept, ["checkpoint-4", "checkpoint-5"]);

    run(&[], true, &["there is nothing to do"]);
    run(
        &["seed=8"],
        false,
        &["seed was 42, now it is 8", "overwrite_output_dir=true"],
    );
    let valid = format!("validation_file={}", rows_file.display());
    run(&[&valid], false, &["it had no validation_file"]);
    rows(&rows_file, "Ohoi");
    run(&[], false, &["the content of training_file is another"]);
    assert_eq!(adapter(), made, "a refused run changed the result");
    run(&["overwrite_output_dir=true"], true, &["step 6/6"]);
    assert_ne!(adapter(), made);
}

#[test]
fn a_run_may_end_within_an_epoch() {
    let folder = tempfile::tempdir().unwrap();
    rows(&folder.path().join("rows.jsonl"), "Ahoy");
    let output = train(folder.path(), &["num_train_epochs=1.3"]).output().unwrap();
    let text = text(&output);
    // Six steps an epoch.
    assert!(
        output.status.success() && text.contains("step 8/8 epoch 1.33"),
        "{text}"
    );
}

/// Modules by a regular expression and a scale of their own are kept by a run that goes on from them.
#[test]
fn a_run_goes_on_from_an_adapter_of_its_own_shape() {
    let folder = tempfile::tempdir().unwrap();
    rows(&folder.path().join("rows.jsonl"), "Ahoy");
    let first = ["max_steps=1", "lora_r=4", "lora_target_modules=q_proj,v_proj"];
    assert!(train(folder.path(), &first).output().unwrap().status.success());
    let start = folder.path().join("out/adapter");
    let read = |folder: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
    };
    let mut config = read(&start);
    config["target_modules"] = r".*\.(q|v)_proj".into();
    config["alpha_pattern"] = serde_json::json!({"q_proj": 6});
    std::fs::write(start.join("adapter_config.json"), config.to_string()).unwrap();
    let settings = [
        format!("from_peft_checkpoint={}", start.display()),
        format!("output_dir={}", folder.path().join("more").display()),
        "max_steps=2".to_owned(),
    ];
    // The later output_dir counts.
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let output = train(folder.path(), &settings).output().unwrap();
    let text = text(&output);
    assert!(output.status.success() && text.contains("step 2/2"), "{text}");
    let made = read(&folder.path().join("more/adapter"));
    let alphas = made["alpha_pattern"].as_object().unwrap();
    assert!(
        !alphas.is_empty()
            && alphas
                .iter()
                .all(|(path, alpha)| path.ends_with(".q_proj") && *alpha == 6.0)
    );
    let targets = made["target_modules"].as_array().unwrap();
    assert_eq!(targets.len(), 2 * alphas.len(), "{made}");
}

#[test]
fn a_run_ends_early_with_its_best_model() {
    let folder = tempfile::tempdir().unwrap();
    let rows_file = folder.path().join("rows.jsonl");
    rows(&rows_file, "Ahoy");
    let valid = format!("validation_file={}", rows_file.display());
    // A greater loss is called better: the first model is the best.
    let settings = [
        "n_epochs=2",
        "eval_steps=1",
        "load_best_model_at_end=true",
        "greater_is_better=true",
        "early_stopping_patience=3",
        "save_strategy=best",
        &valid,
    ];
    let output = train(folder.path(), &settings).output().unwrap();
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    for part in [
        "step 4/12: training ends early, 3 validations",
        "the model of step 1 is the result: its loss of",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    let tensors = |name: &str| {
        let file = folder
            .path()
            .join("out")
            .join(name)
            .join("adapter_model.safetensors");
        std::fs::read(file).unwrap()
    };
    assert_eq!(tensors("adapter"), tensors("checkpoint-1"));
    let settings = ["load_best_model_at_end=true", "output_dir=elsewhere"];
    let refused = train(folder.path(), &settings).output().unwrap();
    let message = self::text(&refused);
    assert!(
        !refused.status.success() && message.contains("there is no validation_file"),
        "{message}"
    );
}

#[test]
fn an_interrupted_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    rows(&folder.path().join("rows.jsonl"), "Ahoy");
    // Runs until a line has `part`, then hears `signals`; returns its exit code and what else it said.
    let run_until = |part: &str, signals: usize, more: &[&str]| {
        let settings: Vec<&str> = ["n_epochs=5000"].iter().chain(more).copied().collect();
        let mut child = train(folder.path(), &settings)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id().to_string();
        let interrupt = || {
            assert!(
                Command::new("kill")
                    .args(["-INT", &pid])
                    .status()
                    .unwrap()
                    .success()
            );
        };
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut heard = String::new();
        while !heard.contains(part) {
            assert!(out.read_line(&mut heard).unwrap() > 0, "it ended: {heard}");
        }
        interrupt();
        if signals > 1 {
            let mut line = String::new();
            while !line.contains("once more stops at once") {
                assert!(log.read_line(&mut line).unwrap() > 0, "it ended: {line}");
            }
            interrupt();
        }
        out.read_to_string(&mut heard).unwrap();
        (child.wait().unwrap().code(), heard)
    };
    let (code, heard) = run_until("step 3/", 1, &[]);
    assert_eq!(code, Some(130), "{heard}");
    assert!(heard.contains("the same command goes on from there"), "{heard}");
    let step = heard.rsplit_once("stopped after step ").unwrap().1;
    let step = step.split_once(';').unwrap().0;
    let (_, heard) = run_until(" loss ", 1, &[]);
    assert!(heard.contains(&format!("going on from step {step}")), "{heard}");

    // Each step stands once in what others read.
    let place = folder.path().join("out");
    let lines = std::fs::read_to_string(place.join("metrics.jsonl")).unwrap();
    let steps: Vec<u64> = lines
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|line| line["loss"].is_f64())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
    assert!(steps.len() as u64 > step.parse().unwrap());
    let table = std::fs::read_to_string(place.join("step_metrics.csv")).unwrap();
    assert_eq!(table.lines().count(), steps.len() + 1);
    let events = |name: &std::ffi::OsStr| name.to_str().unwrap().starts_with("events.out.tfevents.");
    let entries = std::fs::read_dir(&place).unwrap().flatten();
    assert_eq!(entries.filter(|entry| events(&entry.file_name())).count(), 2);

    // A step of many passes: the first signal waits for its end, the second does not.
    let (code, heard) = run_until(
        "trainable params",
        2,
        &["gradient_accumulation_steps=100000", "overwrite_output_dir=true"],
    );
    assert_eq!(code, Some(130), "{heard}");
}

/// Ranks that the run starts itself train as one with all of their micro-batches, and what they leave goes on under ranks that
/// somebody else started.
#[test]
fn several_ranks_train_one_job() {
    let folder = tempfile::tempdir().unwrap();
    rows(&folder.path().join("rows.jsonl"), "Ahoy");
    let losses = |more: &[&str], expected: &str| -> Vec<f64> {
        let output = train(folder.path(), more).output().unwrap();
        let text = text(&output);
        assert!(output.status.success() && text.contains(expected), "{text}");
        let lines = std::fs::read_to_string(folder.path().join("out/metrics.jsonl")).unwrap();
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64();
        lines.lines().filter_map(line).collect()
    };
    let alone = losses(&["gradient_accumulation_steps=2"], "step 27/27");
    let ranks = losses(
        &["nproc_per_node=2", "overwrite_output_dir=true", "profile=2"],
        "2 ranks, each with 1 of a step's 2 micro-batches",
    );
    assert_eq!((alone.len(), ranks.len()), (27, 27));
    let trace = std::fs::read(folder.path().join("out/trace.json")).unwrap();
    let trace: serde_json::Value = serde_json::from_slice(&trace).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let steps: std::collections::BTreeSet<u64> = events
        .iter()
        .map(|event| event["args"]["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps.into_iter().collect::<Vec<_>>(), [2, 3]);
    for name in ["forward", "backward", "head and loss", "optimizer"] {
        assert!(events.iter().any(|event| event["name"] == name), "{name}");
    }
    for (alone, ranks) in alone.iter().zip(&ranks) {
        assert!(
            (alone - ranks).abs() < 2e-3 * alone,
            "{alone} alone, {ranks} on two ranks"
        );
    }

    let endless = ["n_epochs=10000", "overwrite_output_dir=false"];
    let port = free_port();
    let spawn = |rank: Option<usize>, more: &[&str]| {
        let mut command = train(folder.path(), more);
        if let Some(rank) = rank {
            command.envs([("RANK", rank.to_string()), ("LOCAL_RANK", rank.to_string())]);
            command.envs([
                ("WORLD_SIZE", "2"),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", &port),
            ]);
            command.env("LOCAL_WORLD_SIZE", "2");
        }
        let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        piped.spawn().unwrap()
    };
    let until = |child: &mut std::process::Child, part: &str| {
        let (mut out, mut heard) = (BufReader::new(child.stdout.take().unwrap()), String::new());
        while !heard.contains(part) {
            assert!(out.read_line(&mut heard).unwrap() > 0, "it ended: {heard}");
        }
        (out, heard)
    };
    let signal = |child: &std::process::Child, signal: &str| {
        let pid = child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    };
    let fresh = [
        "n_epochs=10000",
        "data_parallel_size=2",
        "overwrite_output_dir=true",
    ];
    let mut first = spawn(None, &fresh);
    let (mut out, mut heard) = until(&mut first, "step 3/");
    signal(&first, "-INT");
    out.read_to_string(&mut heard).unwrap();
    assert_eq!(first.wait().unwrap().code(), Some(130), "{heard}");
    let stopped = |heard: &str| {
        let after = heard.rsplit_once("stopped after step ").expect(heard).1;
        after.split_once(';').unwrap().0.to_owned()
    };
    let step = stopped(&heard);

    // torchrun's ranks: either may be told to stop, and both do.
    let [mut rank_0, rank_1] = [0, 1].map(|rank| spawn(Some(rank), &endless));
    let (mut out, mut heard) = until(&mut rank_0, " loss ");
    assert!(heard.contains(&format!("going on from step {step}")), "{heard}");
    signal(&rank_1, "-TERM");
    out.read_to_string(&mut heard).unwrap();
    assert_eq!(rank_0.wait().unwrap().code(), Some(143), "{heard}");
    let rank_1 = rank_1.wait_with_output().unwrap();
    assert_eq!(rank_1.status.code(), Some(143), "{}", text(&rank_1));

    // One that is killed ends the run, with a word; alone it goes on, with the micro-batches of both.
    let step = stopped(&heard);
    let [mut rank_0, mut rank_1] = [0, 1].map(|rank| spawn(Some(rank), &endless));
    let (mut out, mut heard) = until(&mut rank_0, " loss ");
    signal(&rank_1, "-KILL");
    rank_1.wait().unwrap();
    out.read_to_string(&mut heard).unwrap();
    let rank_0 = rank_0.wait_with_output().unwrap();
    assert!(
        !rank_0.status.success() && text(&rank_0).contains("lost a rank"),
        "{}",
        text(&rank_0)
    );
    let mut alone = spawn(None, &["n_epochs=10000", "gradient_accumulation_steps=2"]);
    let (_, heard) = until(&mut alone, " loss ");
    assert!(heard.contains(&format!("going on from step {step}")), "{heard}");
    alone.kill().unwrap();
    alone.wait().unwrap();

    for (settings, expected) in [
        (&["data_parallel_size=65"][..], "between 1 and 64, got 65"),
        (&["nnodes=2"], "on each machine"),
    ] {
        let refused = train(folder.path(), settings).output().unwrap();
        assert!(
            !refused.status.success() && text(&refused).contains(expected),
            "{}",
            text(&refused)
        );
    }
}

/// Ranks that hold parameters, gradients and moments in shares train as one that has all of them; stopped, the run goes on
/// alone.
#[test]
fn ranks_share_what_they_hold() {
    let folder = tempfile::tempdir().unwrap();
    rows(&folder.path().join("rows.jsonl"), "Ahoy");
    let losses = || -> Vec<f64> {
        let lines = std::fs::read_to_string(folder.path().join("out/metrics.jsonl")).unwrap();
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64();
        lines.lines().filter_map(line).collect()
    };
    let run = |more: &[&str], expected: &str| {
        let output = train(folder.path(), more).output().unwrap();
        let text = text(&output);
        assert!(output.status.success() && text.contains(expected), "{text}");
        losses()
    };
    let alone = "gradient_accumulation_steps=2";
    for (method, strategy) in [
        (&["method=lora"][..], "enable_fsdp=true"),
        (&["method=full"], "sharding_strategy=SHARD_GRAD_OP"),
        (&["method=full"], "fsdp=full_shard auto_wrap"),
        // What is frozen is whole on each rank, what is learned float32 wherever it lies.
        (
            &[
                "method=full",
                "freeze_layers=true",
                "num_freeze_layers=2",
                "dtype=bfloat16",
            ],
            "sharding_strategy=FULL_SHARD",
        ),
    ] {
        let same = [method, &["max_steps=8", "save_steps=3", "learning_rate=1e-4"]].concat();
        let anew = [&same[..], &["overwrite_output_dir=true"]].concat();
        let expected = run(&[&anew[..], &[alone]].concat(), "step 8/8");
        let ranks = [&anew[..], &["data_parallel_size=2", strategy]].concat();
        let shared = run(&ranks, "2 ranks, each with 1 of a step's 2 micro-batches");
        assert_eq!((shared.len(), expected.len()), (8, 8));

        let mut stopped = train(folder.path(), &ranks)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut out, mut heard) = (BufReader::new(stopped.stdout.take().unwrap()), String::new());
        while !heard.contains("step 4/8") {
            assert!(out.read_line(&mut heard).unwrap() > 0, "it ended: {heard}");
        }
        let pid = stopped.id().to_string();
        let interrupted = Command::new("kill").args(["-INT", &pid]).status().unwrap();
        assert!(interrupted.success());
        out.read_to_string(&mut heard).unwrap();
        assert_eq!(stopped.wait().unwrap().code(), Some(130), "{heard}");
        let gone_on = run(&[&same[..], &[alone]].concat(), "step 8/8");
        assert_eq!(gone_on.len(), 8);
        for (what, losses) in [("shared", shared), ("shared, then alone", gone_on)] {
            for (expected, loss) in expected.iter().zip(&losses) {
                assert!(
                    (expected - loss).abs() < 2e-3 * expected,
                    "{method:?} {strategy}: {expected} alone, {loss} {what}"
                );
            }
        }
    }
    // Preferences in groups that share.
    let pair = "{\"prompt\": \"Who?\", \"chosen\": \" I.\", \"rejected\": \" They.\"}\n";
    std::fs::write(folder.path().join("rows.jsonl"), pair.repeat(4)).unwrap();
    let same = [
        "objective=dpo",
        "max_steps=4",
        "batch_size=1",
        "overwrite_output_dir=true",
    ];
    let expected = run(
        &[&same[..], &["gradient_accumulation_steps=4"]].concat(),
        "step 4/4",
    );
    let groups = ["data_parallel_size=4", "hsdp=true", "sharding_group_size=2"];
    let shared = run(
        &[&same[..], &groups].concat(),
        "4 ranks, each with 1 of a step's 4 micro-batches",
    );
    assert_eq!(shared.len(), 4);
    for (expected, loss) in expected.iter().zip(&shared) {
        assert!(
            (expected - loss).abs() < 2e-3 * expected,
            "{expected} alone, {loss} in groups"
        );
    }
}

fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

/// A sweep to its end, and one that is interrupted again and again: the same winner, with the bytes of a run of its own.
#[test]
fn a_sweep_makes_the_same_adapter_however_often_it_is_interrupted() {
    let adapter = |folder: &Path| std::fs::read(folder.join("adapter/adapter_model.safetensors")).unwrap();
    let common = ["max_steps=40", "save_steps=0", "batch_size=1"];
    let lists = ["learning_rate=[1e-6,1e-3]", "lora_r=[2,4]"];
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let valid = |folder: &tempfile::TempDir| {
        format!("validation_file={}", folder.path().join("rows.jsonl").display())
    };
    for folder in &folders {
        rows(&folder.path().join("rows.jsonl"), "Ahoy");
    }
    let [whole, broken] = &folders;
    let sweep = |folder: &tempfile::TempDir| {
        let mut command = train(folder.path(), &common);
        command.args(lists).arg(valid(folder));
        command
    };
    let output = sweep(whole).output().unwrap();
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for part in [
        "4 trials, compared by their validation loss at 2 rungs",
        "rung 1/2, 25 % of the run: 2 of 4 trials go on",
        "rung 2/2, 50 % of the run: 1 of 2 trials go on",
        "trial 1: step 10/40",
        "serve it: tandem serve",
    ] {
        assert!(said.contains(part), "{part:?} is not in\n{said}");
    }
    let out = whole.path().join("out");
    let table = std::fs::read_to_string(out.join("trials.csv")).unwrap();
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(
        lines[0],
        [
            "trial",
            "learning_rate",
            "lora_r",
            "end",
            "step",
            "total_steps",
            "value"
        ]
    );
    let winner = lines.iter().find(|line| line[3] == "succeeded").unwrap();
    assert_eq!((winner[1], winner[4]), ("0.001", "40"), "{table}");
    // Who lost did nothing more.
    let mut steps: Vec<u64> = lines[1..].iter().map(|line| line[4].parse().unwrap()).collect();
    steps.sort_unstable();
    assert_eq!(steps, [10, 10, 20, 40], "{table}");
    assert_eq!(adapter(&out), adapter(&out.join(format!("trial-{}", winner[0]))));
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    assert!(metrics.lines().count() >= 40);
    assert!(text(&sweep(whole).output().unwrap()).contains("there is nothing to do"));
    let other = text(&sweep(whole).arg("seed=8").output().unwrap());
    assert!(
        other.contains("trial-1") || other.contains("seed was 42"),
        "{other}"
    );

    // A run of its own with the winner's settings.
    let alone = tempfile::tempdir().unwrap();
    rows(&alone.path().join("rows.jsonl"), "Ahoy");
    let settings = [
        format!("learning_rate={}", winner[1]),
        format!("lora_r={}", winner[2]),
        "eval_steps=10".to_owned(),
    ];
    let run = train(alone.path(), &common)
        .args(settings)
        .arg(valid(&alone))
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", text(&run));
    assert_eq!(adapter(&alone.path().join("out")), adapter(&out));

    for stop in 0.. {
        let mut child = sweep(broken)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let (mut heard, mut steps) = (String::new(), 0);
        while steps < 15 && lines.read_line(&mut heard).unwrap() > 0 {
            steps = heard.matches(" loss ").count();
        }
        // The first is killed, others are asked.
        let signal = if stop == 0 { "-KILL" } else { "-INT" };
        let pid = child.id().to_string();
        let _ = Command::new("kill").args([signal, &pid]).status();
        lines.read_to_string(&mut heard).unwrap();
        if child.wait().unwrap().success() {
            assert!(stop > 2, "it was interrupted {stop} times");
            break;
        }
    }
    assert_eq!(adapter(&broken.path().join("out")), adapter(&out));
    let refused = text(
        &train(broken.path(), &["method=full", "seed=[1,2]"])
            .output()
            .unwrap(),
    );
    assert!(refused.contains("sweep LoRA"), "{refused}");
    let refused = text(&train(broken.path(), &["device=[cpu,auto]"]).output().unwrap());
    assert!(refused.contains("device: cannot vary"), "{refused}");
}

/// Every recipe that is shipped, at toy size: its own numbers but for the length of the run and of a row.
#[test]
fn recipes_run_on_the_demo_model() {
    let listed = text(&command(&["recipes", "ls"]).output().unwrap());
    let names: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next().filter(|name| name.contains('/')))
        .collect();
    assert!(names.len() >= 10, "{listed}");
    for name in names {
        let folder = tempfile::tempdir().unwrap();
        let at = |file: &str| folder.path().join(file).display().to_string();
        let copied = text(
            &command(&["recipes", "cp", name, &at("recipe.yaml")])
                .output()
                .unwrap(),
        );
        assert!(copied.contains(name), "{copied}");
        let recipe = std::fs::read_to_string(at("recipe.yaml")).unwrap();
        let rows = |row: &str| row.repeat(8);
        let (file, content) = match name {
            _ if recipe.contains("dataset: grammar") => {
                ("rows.csv", format!("input,target\n{}", rows("He go.,He goes.\n")))
            }
            _ if recipe.contains("dataset: samsum") => (
                "rows.jsonl",
                rows("{\"dialogue\": \"A: Hi.\", \"summary\": \"A greets.\", \"id\": 1}\n"),
            ),
            _ if recipe.contains("dialogue: document") => (
                "rows.jsonl",
                rows("{\"document\": \"A says hi.\", \"summary\": \"A greets.\", \"id\": 1}\n"),
            ),
            _ if recipe.contains("alpaca") => (
                "rows.json",
                format!(
                    "[{}{}]",
                    rows("{\"instruction\": \"Greet.\", \"input\": \"\", \"output\": \"Hi.\"},\n"),
                    "{\"instruction\": \"Greet.\", \"input\": \"A\", \"output\": \"Hi.\"}"
                ),
            ),
            _ if recipe.contains("DPOLoss") => (
                "rows.jsonl",
                rows("{\"prompt\": \"Hi\", \"chosen\": \" there\", \"rejected\": \" no\"}\n"),
            ),
            _ => (
                "rows.jsonl",
                rows("{\"text\": \"<s>[INST] Hi [/INST] Hello. </s>\"}\n"),
            ),
        };
        std::fs::write(at(file), content).unwrap();
        let toy = [
            at("recipe.yaml"),
            format!("model={MODEL}"),
            format!("training_file={}", at(file)),
            format!("output_dir={}", at("out")),
            "device=cpu".to_owned(),
            "max_steps=2".to_owned(),
            "max_seq_length=128".to_owned(),
            "batch_size=2".to_owned(),
            "gradient_accumulation_steps=1".to_owned(),
        ];
        let toy: Vec<&str> = std::iter::once("train")
            .chain(toy.iter().map(String::as_str))
            .collect();
        let shown = text(
            &command(&[&toy[..], &["--preview", "1"]].concat())
                .output()
                .unwrap(),
        );
        assert!(
            shown.contains("--- 1 of ") && !Path::new(&at("out")).exists(),
            "{name}: {shown}"
        );
        let output = command(&toy).output().unwrap();
        assert!(
            output.status.success() && text(&output).contains("step 2/2"),
            "{name}: {}",
            text(&output)
        );
    }
}
