//! Adapters that come when named, and touch nobody else.

use super::*;

/// A PEFT folder of random numbers `scale` large.
fn adapter(base: &Path, parent: &Path, rank: u32, scale: f64) -> AdapterRef {
    let lora = lora(rank);
    let mut params = AdapterParams::init(
        AdapterShape::new(&read_spec(base).unwrap(), &lora),
        u64::from(rank),
    );
    let noise: Vec<f32> = (0..params.flat.numel() as u64)
        .map(|i| (scale * tandem_core::rng::normal(u64::from(rank), 0, i)) as f32)
        .collect();
    params.flat.copy_(&tch::Tensor::from_slice(&noise));
    let folder = parent.join(format!("rank-{rank}"));
    std::fs::create_dir(&folder).unwrap();
    peft::write(
        &folder,
        &params,
        &PeftConfig {
            base_model: "demo",
            lora: &lora,
        },
    )
    .unwrap();
    AdapterRef {
        digest: peft::digest(&folder).unwrap(),
        folder,
    }
}

#[test]
fn adapters_come_when_named_and_touch_nobody_else() {
    let folder = demo();
    let directory = tempfile::tempdir().unwrap();
    let adapters: Vec<AdapterRef> = [2, 8, 5]
        .into_iter()
        .map(|rank| adapter(&folder, directory.path(), rank, 0.05))
        .collect();
    let choices = || std::iter::once(None).chain(adapters.iter().cloned().map(Some));
    let mut requests = vec![];
    for case in cases() {
        let long = [&case.prompt[..], &case.greedy].concat();
        let raw = || RawSampling {
            logprobs: Some(2),
            ..greedy()
        };
        requests.extend(choices().map(|adapter| Generate {
            adapter,
            ..request(&long, 12, raw())
        }));
    }
    let mut alone = Rig::new(options(&folder));
    let expected: Vec<_> = requests
        .iter()
        .map(|request| alone.ask(request.clone()))
        .collect();
    for answers in expected.chunks(choices().count()) {
        for (i, answer) in answers.iter().enumerate() {
            assert!(
                answers[..i].iter().all(|other| other.tokens != answer.tokens),
                "each adapter says something else"
            );
        }
    }
    for max_loras in [1, 2, 16] {
        let mut rig = Rig::new(Options {
            max_loras,
            ..options(&folder)
        });
        for (i, (answer, expected)) in rig.ask_all(&requests).iter().zip(&expected).enumerate() {
            answer.assert_same(expected, &format!("request {i} with {max_loras} places"));
        }
        let stats = rig.stats();
        assert!(
            stats.resident_adapters.len() <= max_loras as usize && stats.adapter_loads >= 3,
            "{stats:?}"
        );
    }
    // Loaded ahead, forgotten, and refused when the folder is not what the digest says.
    let load = |adapter: &AdapterRef| {
        let (reply, answer) = oneshot::channel();
        alone.command(Command::LoadAdapter(adapter.clone(), reply));
        answer.blocking_recv().unwrap()
    };
    let info = load(&adapters[1]).unwrap();
    assert!(info.rank == 8 && info.bytes > 0 && info.digest == adapters[1].digest);
    let swapped = AdapterRef {
        digest: expected_digest(&folder),
        folder: adapters[0].folder.clone(),
    };
    assert!(load(&swapped).unwrap_err().to_string().contains("its content is"));
    alone.command(Command::UnloadAdapter(adapters[1].digest));
    alone.wait_until("unloaded", |stats| {
        !stats.resident_adapters.contains(&adapters[1].digest)
    });
}

fn expected_digest(folder: &Path) -> tandem_core::id::Digest {
    crate::weights::Checkpoint::open(folder)
        .unwrap()
        .digest(None)
        .unwrap()
}

#[test]
fn an_adapter_that_overflows_fails_alone() {
    let folder = demo();
    let directory = tempfile::tempdir().unwrap();
    let broken = adapter(&folder, directory.path(), 4, 1e30);
    let cases = cases();
    let mut rig = Rig::new(options(&folder));
    let good = request(&cases[0].prompt, 10, greedy());
    let bad = Generate {
        adapter: Some(broken),
        ..good.clone()
    };
    for _ in 0..3 {
        let answers = rig.ask_all(&[good.clone(), bad.clone(), good.clone()]);
        assert_eq!(answers[0].ids(), cases[0].greedy[..10]);
        assert_eq!(answers[2].ids(), cases[0].greedy[..10]);
        assert!(
            matches!(&answers[1].end, Some(Err(Fault::Step(why))) if why.contains("not finite")),
            "{answers:?}"
        );
    }
}

#[test]
fn whoever_waits_for_a_place_gets_one() {
    let folder = demo();
    let directory = tempfile::tempdir().unwrap();
    let [busy, other] = [2, 8].map(|rank| adapter(&folder, directory.path(), rank, 0.05));
    let prompt = cases().swap_remove(0).prompt;
    let with = |adapter: &AdapterRef| Generate {
        adapter: Some(adapter.clone()),
        ..request(&prompt, 24, greedy())
    };
    let mut rig = Rig::new(Options {
        max_loras: 1,
        ..options(&folder)
    });
    // Nobody asks for what was loaded ahead.
    let (reply, _) = oneshot::channel();
    rig.command(Command::LoadAdapter(busy.clone(), reply));
    let mut answer = rig.send(with(&other));
    rig.wait_until("given the place", |stats| {
        stats.resident_adapters == [other.digest]
    });
    assert!(matches!(read(&mut answer).end, Some(Ok(_))));
    // Somebody always asks for what is resident.
    let mut running = rig.send(with(&busy));
    running.blocking_recv().unwrap();
    let mut waiting = rig.send(with(&other));
    for n in 0.. {
        let next = rig.send(with(&busy));
        read(&mut running);
        running = next;
        if waiting.try_recv().is_ok() {
            break;
        }
        assert!(n < 500, "others kept the place");
        running.blocking_recv().unwrap();
    }
    assert!(matches!(read(&mut running).end, Some(Ok(_))));
}
