//! A fine-tuning job beside requests.

use super::*;
use crate::train::TrainError;

/// Not what the model says by itself.
const LESSON: [TokenId; 4] = [700, 701, 702, EOS];

/// A job that teaches the cases' prompts another end.
pub fn job(folder: &Path, cases: &[Case], max_steps: u64) -> JobSpec {
    let example = |case: &Case| {
        let tokens = [&case.prompt[..], &LESSON].concat();
        let weights = (0..tokens.len())
            .map(|i| if i < case.prompt.len() { 0.0 } else { 1.0 })
            .collect();
        Example { tokens, weights }
    };
    let examples: Vec<Group> = cases.iter().map(example).map(Group::from).collect();
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join(files::TRAIN), dataset::encode(&examples)).unwrap();
    let hyper = Hyper {
        n_epochs: 1000.0,
        max_steps: Some(max_steps),
        max_steps_per_epoch: None,
        batch_size: 4,
        gradient_accumulation_steps: 1,
        learning_rate: 1e-2,
        lr_scheduler: Schedule::Constant,
        warmup_steps: 0,
        weight_decay: 0.0,
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        optimizer: Default::default(),
        max_grad_norm: 1.0,
        loraplus_lr_ratio: None,
        neftune_noise_alpha: None,
        seed: 1,
        max_seq_length: 128,
        packing: false,
        shuffle: true,
        save_strategy: SaveStrategy::Steps,
        save_steps: 0,
        eval_steps: 0,
        selection: None,
        objective: Objective::default(),
        frozen_layers: 0,
        method: Method::Lora(lora(8)),
    };
    JobSpec {
        id: "ftjob-test".parse().unwrap(),
        folder: folder.to_owned(),
        tenant: String::new(),
        base_model: "demo".to_owned(),
        hyper,
        life: Life::default(),
    }
}

fn named(id: &str, spec: JobSpec) -> JobSpec {
    JobSpec {
        id: id.parse().unwrap(),
        ..spec
    }
}

pub fn train(rig: &Rig, spec: JobSpec) -> mpsc::Receiver<JobEvent> {
    let (events, receiver) = mpsc::channel(JOB_EVENT_QUEUE);
    rig.command(Command::StartJob(Box::new(spec), events));
    receiver
}

pub fn to_the_end(events: &mut mpsc::Receiver<JobEvent>) -> Vec<JobEvent> {
    let mut heard = vec![];
    while let Some(event) = events.blocking_recv() {
        heard.push(event);
    }
    heard
}

#[test]
fn a_job_trains_beside_requests_and_its_adapter_answers() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let mut rig = Rig::new(Options {
        max_training_jobs: 1,
        ..options(&folder)
    });
    let mut job_events = train(&rig, job(&directory.path().join("job"), &cases, 60));
    for (id, why) in [
        ("ftjob-test", "is training here already"),
        ("ftjob-other", "(--max-training-jobs)"),
    ] {
        let second = named(id, job(&directory.path().join("second"), &cases, 1));
        let heard = to_the_end(&mut train(&rig, second));
        assert!(
            matches!(&heard[..], [JobEvent::Refused { message }] if message.contains(why)),
            "{heard:?}"
        );
    }
    // Served while it trains, the base says what it always says.
    for case in &cases {
        let asked = Generate {
            stop_tokens: vec![],
            ..request(&case.prompt, case.greedy.len() as u32, greedy())
        };
        assert_eq!(rig.ask(asked).ids(), case.greedy);
    }
    let heard = to_the_end(&mut job_events);
    assert!(
        matches!(
            heard[0],
            JobEvent::Started {
                total_steps: 60,
                resumed_from: None,
                ..
            }
        ),
        "{:?}",
        heard[0]
    );
    assert_eq!(
        heard
            .iter()
            .filter(|event| matches!(event, JobEvent::Step(_)))
            .count(),
        60
    );
    let Some(JobEvent::Finished { adapter, .. }) = heard.last() else {
        panic!("{:?}", heard.last())
    };
    rig.wait_until("resident", |stats| {
        stats.resident_adapters.contains(&adapter.digest) && stats.training_jobs == 0
    });
    let loads = rig.stats().adapter_loads;
    let asked = Generate {
        adapter: Some(adapter.clone()),
        ..request(&cases[0].prompt, 10, greedy())
    };
    let answer = rig.ask(asked.clone());
    assert_eq!(answer.ids(), LESSON, "it learned its lesson");
    assert_eq!(rig.stats().adapter_loads, loads, "it was resident already");
    // The same bits from disk.
    let mut fresh = Rig::new(options(&folder));
    fresh.ask(asked).assert_same(&answer, "read from disk");
}

#[test]
fn a_job_is_cancelled_or_kept_at_stop() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let started = |events: &mut mpsc::Receiver<JobEvent>| {
        while !matches!(events.blocking_recv(), Some(JobEvent::Step(report)) if report.step >= 3) {}
    };
    let rig = Rig::new(options(&folder));
    let mut events = train(&rig, job(&directory.path().join("cancelled"), &cases, 100_000));
    started(&mut events);
    rig.command(Command::CancelJob("ftjob-other".parse().unwrap()));
    rig.command(Command::CancelJob("ftjob-test".parse().unwrap()));
    let heard = to_the_end(&mut events);
    assert!(
        matches!(heard.last(), Some(JobEvent::Cancelled { step }) if *step >= 3),
        "{:?}",
        heard.last()
    );

    let kept = job(&directory.path().join("kept"), &cases, 100_000);
    let mut events = train(&rig, kept.clone());
    started(&mut events);
    rig.command(Command::Stop);
    let mut heard = to_the_end(&mut events);
    let Some(JobEvent::Kept { step }) = heard.pop() else {
        panic!("it says after which step its state was written")
    };
    assert!(
        heard.iter().all(|event| matches!(event, JobEvent::Step(_))),
        "{:?}",
        heard.last()
    );
    let rig = Rig::new(options(&folder));
    let mut events = train(&rig, kept);
    let Some(JobEvent::Started { resumed_from, .. }) = events.blocking_recv() else {
        panic!("it starts")
    };
    assert!(
        resumed_from == Some(step) && step >= 3,
        "{resumed_from:?}, {step}"
    );
}

/// Three jobs of different ranks, rates, objectives and lengths; the second keeps checkpoints, the third learns pairs.
fn three(folder: &Path, cases: &[Case]) -> [JobSpec; 3] {
    let of = |name: &str, max_steps| {
        let id = format!("ftjob-{name}");
        named(&id, job(&folder.join(name), cases, max_steps))
    };
    let mut first = of("first", 30);
    first.hyper.method = Method::Lora(Lora {
        dropout: 0.1,
        ..lora(4)
    });
    let mut second = of("second", 9);
    second.hyper.learning_rate = 1e-3;
    second.hyper.save_steps = 2;
    second.hyper.batch_size = 1;
    let mut third = of("third", 12);
    third.hyper.method = Method::Lora(lora(16));
    third.hyper.objective = Objective::Dpo {
        loss: DpoLoss::Sigmoid,
        beta: 0.1,
        label_smoothing: 0.0,
    };
    third.hyper.learning_rate = 5e-4;
    let pair = |case: &Case| {
        let answer = |end: &[TokenId]| Example {
            tokens: [&case.prompt[..], end].concat(),
            weights: [vec![0.0; case.prompt.len()], vec![1.0; end.len()]].concat(),
        };
        Group {
            examples: vec![answer(&LESSON), answer(&case.greedy)],
            value: 1.0,
        }
    };
    let pairs: Vec<Group> = cases
        .iter()
        .filter(|case| !case.greedy.is_empty())
        .map(pair)
        .collect();
    std::fs::write(third.folder.join(files::TRAIN), dataset::encode(&pairs)).unwrap();
    [first, second, third]
}

/// A job that is alone with its tenant makes as many steps as the two of another together.
#[test]
fn tenants_have_equal_shares_however_many_jobs_they_have() {
    // By time, which other programs disturb: without tenants it were two. Pairs go alone; rows that share passes cost less
    // than what is counted for them, so who has many jobs has a little more of it.
    tenants_share(|[_, _, pairs]| pairs, 0.6..1.5);
    tenants_share(|[rows, _, _]| rows, 0.6..1.75);
}

fn tenants_share(which: fn([JobSpec; 3]) -> JobSpec, bounds: std::ops::Range<f64>) {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(options(&folder));
    let of = |name: &str, tenant: &str| {
        let mut spec = which(three(&directory.path().join(name), &cases));
        spec.tenant = tenant.to_owned();
        spec.hyper.max_steps = Some(100_000);
        train(&rig, named(&format!("ftjob-{name}"), spec))
    };
    let mut jobs = [of("one", "many"), of("two", "many"), of("three", "single")];
    let mut steps = [0; 3];
    // From where all three train on.
    let mut before = None;
    while steps[2] < 60 {
        for (events, steps) in jobs.iter_mut().zip(&mut steps) {
            while let Ok(event) = events.try_recv() {
                *steps += u64::from(matches!(event, JobEvent::Step(_)));
            }
        }
        if before.is_none() && steps.iter().all(|&steps| steps > 0) {
            before = Some(steps);
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let before = before.expect("all have made a step");
    let [one, two, three] = [0, 1, 2].map(|i| (steps[i] - before[i]) as f64);
    assert!(
        bounds.contains(&((one + two) / three)),
        "{one} and {two} beside {three}"
    );
}

pub fn finished(heard: &[JobEvent]) -> AdapterDigest {
    match heard.last() {
        Some(JobEvent::Finished { adapter, .. }) => adapter.digest,
        other => panic!("{other:?}"),
    }
}

/// On one rank and on two: each job alone, then all at once beside requests.
#[test]
fn jobs_beside_each_other_make_the_bytes_of_each_alone() {
    let (folder, cases) = (demo(), cases());
    for ranks in [1, 2] {
        let directory = tempfile::tempdir().unwrap();
        let mut rig = Rig::new(Options {
            team: Team::Threads(ranks),
            ..options(&folder)
        });
        let alone = three(&directory.path().join("alone"), &cases);
        let alone = alone.map(|spec| finished(&to_the_end(&mut train(&rig, spec))));
        let together = three(&directory.path().join("together"), &cases);
        let mut events = together.map(|spec| train(&rig, spec));
        for case in &cases {
            let asked = Generate {
                stop_tokens: vec![],
                ..request(&case.prompt, case.greedy.len() as u32, greedy())
            };
            assert_eq!(rig.ask(asked).ids(), case.greedy);
        }
        let together = events.each_mut().map(|events| finished(&to_the_end(events)));
        assert_eq!(together, alone, "{ranks} ranks");
        let stats = rig.stats();
        let (passes, slices) = (stats.shared_passes, stats.shared_slices);
        assert!(
            passes > 0 && slices >= 2 * passes,
            "{slices} slices in {passes} passes"
        );
        rig.wait_until("all over", |stats| {
            let resident = |digest| stats.resident_adapters.contains(digest);
            stats.training_jobs == 0 && together.iter().all(resident)
        });
    }
}

/// Whatever ends one job, in order or not, the others go on to the bytes that they would have had.
#[test]
fn the_end_of_a_job_leaves_the_others() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(options(&folder));
    let [first, _, third] = three(&directory.path().join("alone"), &cases);
    let expected = [first, third].map(|spec| finished(&to_the_end(&mut train(&rig, spec))));
    let [first, _, third] = three(&directory.path().join("beside"), &cases);
    let mut events = [first, third].map(|spec| train(&rig, spec));
    for end in [
        "cancelled",
        "paused",
        "diverges",
        "full",
        "unsupervised",
        "damaged",
    ] {
        let id = format!("ftjob-{end}");
        let mut spec = named(&id, saved_job(&directory.path().join(end), &cases, 100_000));
        match end {
            "diverges" => spec.hyper.learning_rate = 1e3,
            "full" => full_disk(&spec),
            "damaged" => std::fs::write(spec.folder.join(files::TRAIN), b"no examples").unwrap(),
            _ => {}
        }
        let mut of_it = train(&rig, spec.clone());
        let mut until =
            |is_it: fn(&JobEvent) -> bool| while !of_it.blocking_recv().is_some_and(|event| is_it(&event)) {};
        match end {
            "cancelled" | "paused" | "unsupervised" => until(|event| matches!(event, JobEvent::Step(_))),
            "full" => until(|event| matches!(event, JobEvent::NoRoom { .. })),
            _ => {}
        }
        match end {
            "cancelled" | "full" => rig.command(Command::CancelJob(spec.id.clone())),
            "paused" => rig.command(Command::PauseJob(spec.id.clone())),
            "unsupervised" => {
                drop(of_it);
                continue;
            }
            _ => {}
        }
        let heard = to_the_end(&mut of_it);
        let is_so = match heard.last() {
            Some(JobEvent::Cancelled { .. }) => ["cancelled", "full"].contains(&end),
            Some(JobEvent::Kept { .. }) => end == "paused",
            Some(JobEvent::Failed { .. }) => end == "diverges",
            Some(JobEvent::Damaged { .. }) => end == "damaged",
            _ => false,
        };
        assert!(is_so, "{end}: {:?}", heard.last());
    }
    let got = events.each_mut().map(|events| finished(&to_the_end(events)));
    assert_eq!(got, expected);
}

/// A pause between any two quanta, and the life after it, give the bytes of a run that nobody paused.
#[test]
fn a_paused_job_ends_with_the_same_bytes() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(options(&folder));
    let digest = |heard: &[JobEvent]| match heard.last() {
        Some(JobEvent::Finished { adapter, .. }) => adapter.digest,
        other => panic!("{other:?}"),
    };
    let undisturbed = job(&directory.path().join("undisturbed"), &cases, 12);
    let expected = digest(&to_the_end(&mut train(&rig, undisturbed)));
    let paused = job(&directory.path().join("paused"), &cases, 12);
    // Before it has begun it may have nothing to keep.
    let mut events = train(&rig, paused.clone());
    rig.command(Command::PauseJob(paused.id.clone()));
    assert!(matches!(
        &to_the_end(&mut events)[..],
        [] | [.., JobEvent::Kept { .. }]
    ));
    let mut pauses = 0;
    loop {
        let mut events = train(&rig, paused.clone());
        let mut heard = vec![];
        while let Some(event) = events.blocking_recv() {
            if matches!(event, JobEvent::Step(_)) {
                rig.command(Command::PauseJob("ftjob-other".parse().unwrap()));
                rig.command(Command::PauseJob(paused.id.clone()));
            }
            heard.push(event);
        }
        match heard.last() {
            Some(JobEvent::Kept { .. }) => pauses += 1,
            _ => {
                assert_eq!(digest(&heard), expected);
                break;
            }
        }
    }
    println!("{pauses} pauses");
    assert!(pauses > 1, "it was over before it could be paused");
}

/// `job`, saved every other step.
fn saved_job(folder: &Path, cases: &[Case], max_steps: u64) -> JobSpec {
    let mut spec = job(folder, cases, max_steps);
    spec.hyper.save_steps = 2;
    spec
}

#[test]
fn a_checkpoint_is_told_in_its_place_and_when_it_is_durable() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(options(&folder));
    let spec = saved_job(&directory.path().join("job"), &cases, 7);
    let mut events = train(&rig, spec.clone());
    let (mut step, mut checkpoints) = (0, vec![]);
    while let Some(event) = events.blocking_recv() {
        match event {
            JobEvent::Step(report) => step = report.step,
            JobEvent::Checkpoint {
                step: of, adapter, ..
            } => {
                assert_eq!(of, step, "it comes after its step and before the next");
                assert_eq!(peft::digest(&adapter.folder).unwrap(), adapter.digest);
                let state = std::fs::read(spec.folder.join(files::STATE)).unwrap();
                let (progress, _) =
                    crate::train::state::parse::<crate::train::state::Progress>(&state).unwrap();
                assert!(progress.step >= of, "{} is not {of}", progress.step);
                checkpoints.push(of);
            }
            JobEvent::Finished { adapter, .. } => {
                assert_eq!(peft::digest(&adapter.folder).unwrap(), adapter.digest);
            }
            _ => {}
        }
    }
    assert_eq!((step, &checkpoints[..]), (7, &[2, 4, 6][..]));
}

#[test]
fn a_job_that_diverges_publishes_nothing() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(options(&folder));
    // Numbers that are finite and multiply to none, after one step; then numbers that are none.
    for (name, alpha, learning_rate, weight_decay) in
        [("products", 1e6, 1e3, 0.0), ("decayed", 16.0, 1e3, 1e3)]
    {
        let mut spec = saved_job(&directory.path().join(name), &cases, 30);
        spec.hyper.learning_rate = learning_rate;
        spec.hyper.weight_decay = weight_decay;
        spec.hyper.save_steps = 1;
        spec.hyper.method = Method::Lora(Lora { alpha, ..lora(8) });
        let heard = to_the_end(&mut train(&rig, spec.clone()));
        let Some(JobEvent::Failed { message }) = heard.last() else {
            panic!("{heard:?}")
        };
        println!("{message}");
        assert!(
            message.starts_with("step ") && message.contains("a lower learning rate may help"),
            "{name}: {message}"
        );
        // What was published before answers.
        for event in &heard {
            if let JobEvent::Checkpoint { adapter, .. } = event {
                let asked = Generate {
                    adapter: Some(adapter.clone()),
                    ..request(&cases[0].prompt, 4, greedy())
                };
                let mut fresh = Rig::new(options(&folder));
                assert!(matches!(fresh.ask(asked).end, Some(Ok(_))));
            }
        }
        assert!(!spec.folder.join(files::ADAPTER).exists());
    }
}

/// Where a state is to be written lies a device that is always full.
fn full_disk(spec: &JobSpec) {
    std::os::unix::fs::symlink("/dev/full", spec.folder.join(".state.safetensors.partial")).unwrap();
}

#[test]
fn a_job_waits_for_room_on_the_disk_and_goes_on() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(options(&folder));
    let spec = saved_job(&directory.path().join("job"), &cases, 5);
    full_disk(&spec);
    let heard = to_the_end(&mut train(&rig, spec.clone()));
    let steps = heard.iter().filter_map(|event| match event {
        JobEvent::NoRoom { message } => {
            assert!(message.contains(files::STATE), "{message}");
            Some("no room")
        }
        JobEvent::Checkpoint { .. } => Some("checkpoint"),
        JobEvent::Finished { .. } => Some("finished"),
        _ => None,
    });
    let expected = ["no room", "checkpoint", "checkpoint", "finished"];
    assert_eq!(steps.collect::<Vec<_>>(), expected, "{heard:?}");
    // Too many open files pass, too.
    let passes = |code| {
        let (file, error) = (files::STATE.to_owned(), std::io::Error::from_raw_os_error(code));
        TrainError::File { file, error }.is_no_room()
    };
    assert!(passes(libc::EMFILE) && passes(libc::ENFILE) && passes(libc::ENOSPC) && !passes(libc::EIO));
}

#[test]
fn a_job_that_waits_for_room_can_be_cancelled_and_stopped() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    for name in ["cancelled", "stopped"] {
        let rig = Rig::new(options(&folder));
        let spec = saved_job(&directory.path().join(name), &cases, 1000);
        full_disk(&spec);
        let mut events = train(&rig, spec.clone());
        while !matches!(events.blocking_recv(), Some(JobEvent::NoRoom { .. })) {}
        match name {
            "cancelled" => rig.command(Command::CancelJob(spec.id.clone())),
            _ => rig.command(Command::Stop),
        }
        let heard = to_the_end(&mut events);
        let checkpoint = |event: &JobEvent| matches!(event, JobEvent::Checkpoint { .. });
        assert!(!heard.iter().any(checkpoint), "{name}: {heard:?}");
        match (name, heard.last()) {
            ("cancelled", Some(JobEvent::Cancelled { step })) => assert!(*step >= 2),
            // There was room for the state that it stops with.
            ("stopped", Some(JobEvent::Kept { step })) => assert!(*step >= 2),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn damaged_examples_are_told_apart_from_a_job_that_fails() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(options(&folder));
    let spec = job(&directory.path().join("job"), &cases, 1);
    let path = spec.folder.join(files::TRAIN);
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let heard = to_the_end(&mut train(&rig, spec));
    assert!(
        matches!(&heard[..], [JobEvent::Damaged { message }] if message.contains(files::TRAIN)),
        "{heard:?}"
    );
}

/// A disk that takes nothing: opening a pipe that nobody reads waits for ever.
#[test]
fn a_slow_disk_stops_no_stream_and_holds_one_copy() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let mut rig = Rig::new(options(&folder));
    let spec = saved_job(&directory.path().join("job"), &cases, 1000);
    let pipe = spec.folder.join(".state.safetensors.partial");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let mut events = train(&rig, spec.clone());
    let mut steps = 0;
    while steps < 2 {
        if let Some(JobEvent::Step(report)) = events.blocking_recv() {
            steps = report.step;
        }
    }
    rig.wait_until("about to save again", |stats| stats.train_steps == 4);
    // The job waits, and requests are answered as ever.
    for case in &cases {
        let asked = Generate {
            stop_tokens: vec![],
            ..request(&case.prompt, case.greedy.len() as u32, greedy())
        };
        assert_eq!(rig.ask(asked).ids(), case.greedy);
    }
    assert_eq!(rig.stats().train_steps, 4, "no second copy");
    assert!(events.try_recv().is_err(), "nothing is told before it is durable");
    // The adapter first, then the state that names its step.
    assert!(spec.folder.join("checkpoint-2").is_dir() && !spec.folder.join(files::STATE).exists());
    // A pipe cannot be synced: when the disk says so, the job fails and says it, too.
    std::fs::read(&pipe).unwrap();
    let heard = to_the_end(&mut events);
    assert!(
        matches!(heard.last(), Some(JobEvent::Failed { message }) if message.contains(files::STATE)),
        "{heard:?}"
    );
    let checkpoint = |event: &JobEvent| matches!(event, JobEvent::Checkpoint { .. });
    assert!(!heard.iter().any(checkpoint));
}
