//! A fine-tuning job beside requests.

use super::*;

/// A job that teaches the first case's prompt another end.
fn job(folder: &Path, cases: &[Case], max_steps: u64) -> JobSpec {
    let example = |case: &Case| {
        let tokens = [&case.prompt[..], &[700, 701, 702, 2]].concat();
        let weights = (0..tokens.len())
            .map(|i| if i < case.prompt.len() { 0.0 } else { 1.0 })
            .collect();
        Example { tokens, weights }
    };
    let examples: Vec<Example> = cases.iter().map(example).collect();
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join(files::TRAIN), dataset::encode(&examples)).unwrap();
    let hyper = Hyper {
        n_epochs: 1000,
        max_steps: Some(max_steps),
        batch_size: 4,
        gradient_accumulation_steps: 1,
        learning_rate: 1e-2,
        lr_scheduler: Schedule::Constant,
        warmup_steps: 0,
        weight_decay: 0.0,
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        max_grad_norm: 1.0,
        seed: 1,
        max_seq_length: 128,
        packing: false,
        save_steps: 0,
        eval_steps: 0,
        method: Method::Lora(lora(8)),
    };
    JobSpec {
        id: JobId("ftjob-test".to_owned()),
        folder: folder.to_owned(),
        base_model: "story".to_owned(),
        hyper,
        life: Life::default(),
    }
}

fn train(rig: &Rig, spec: JobSpec) -> mpsc::Receiver<JobEvent> {
    let (events, receiver) = mpsc::channel(JOB_EVENT_QUEUE);
    rig.command(Command::StartJob(Box::new(spec), events));
    receiver
}

fn to_the_end(events: &mut mpsc::Receiver<JobEvent>) -> Vec<JobEvent> {
    let mut heard = vec![];
    while let Some(event) = events.blocking_recv() {
        heard.push(event);
    }
    heard
}

#[test]
fn a_job_trains_beside_requests_and_its_adapter_answers() {
    let Some(folder) = story() else { return };
    let directory = tempfile::tempdir().unwrap();
    let cases = cases(&folder);
    let mut rig = Rig::new(options(&folder));
    let mut job_events = train(&rig, job(&directory.path().join("job"), &cases, 60));
    let mut second = train(&rig, job(&directory.path().join("second"), &cases, 1));
    assert!(
        matches!(&to_the_end(&mut second)[..], [JobEvent::Refused { message }] if message.contains("one job"))
    );
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
        stats.resident_adapters.contains(&adapter.digest) && !stats.job_running
    });
    let loads = rig.stats().adapter_loads;
    let asked = Generate {
        adapter: Some(adapter.clone()),
        ..request(&cases[0].prompt, 10, greedy())
    };
    let answer = rig.ask(asked.clone());
    assert_eq!(answer.ids(), [700, 701, 702, 2], "it learned its lesson");
    assert_eq!(rig.stats().adapter_loads, loads, "it was resident already");
    // The same bits from disk.
    let mut fresh = Rig::new(options(&folder));
    fresh.ask(asked).assert_same(&answer, "read from disk");
}

#[test]
fn a_job_is_cancelled_or_kept_at_stop() {
    let Some(folder) = story() else { return };
    let directory = tempfile::tempdir().unwrap();
    let cases = cases(&folder);
    let started = |events: &mut mpsc::Receiver<JobEvent>| {
        while !matches!(events.blocking_recv(), Some(JobEvent::Step(report)) if report.step >= 3) {}
    };
    let rig = Rig::new(options(&folder));
    let mut events = train(&rig, job(&directory.path().join("cancelled"), &cases, 100_000));
    started(&mut events);
    rig.command(Command::CancelJob(JobId("ftjob-other".to_owned())));
    rig.command(Command::CancelJob(JobId("ftjob-test".to_owned())));
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
