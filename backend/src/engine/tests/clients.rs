//! Clients that leave, do not read, or ask what cannot be answered; and the end of all.

use super::*;

#[test]
fn a_client_that_leaves_frees_its_blocks() {
    let folder = demo();
    let prompt = cases()[0].prompt.clone();
    let mut rig = Rig::new(options(&folder));
    let endless = || Generate {
        stop_tokens: vec![],
        ..request(&prompt, 480, greedy())
    };
    let mut leaves = rig.send(endless());
    let aborted = rig.send(endless());
    for _ in 0..3 {
        assert!(matches!(leaves.blocking_recv(), Some(Event::Token { .. })));
    }
    drop(leaves);
    rig.command(Command::Abort(RequestId(2)));
    rig.wait_until("free", |stats| stats.running == 0 && stats.kv_blocks_used == 0);
    drop(aborted);
    // And one that leaves while it does not read: its sequence is parked, nothing is ever sent to it again.
    let parked = rig.send_with_queue(endless(), 1);
    rig.wait_until("running", |stats| stats.running == 1);
    drop(parked);
    rig.wait_until("free", |stats| stats.running == 0 && stats.kv_blocks_used == 0);
}

#[test]
fn a_client_that_does_not_read_waits_alone() {
    let folder = demo();
    let cases = cases();
    let asked = |case: &Case| Generate {
        stop_tokens: vec![],
        ..request(&case.prompt, case.greedy.len() as u32, greedy())
    };
    let mut rig = Rig::new(Options {
        max_num_seqs: 2,
        ..options(&folder)
    });
    // More than there are places, none of them reading.
    let mut slow: Vec<_> = cases
        .iter()
        .map(|case| rig.send_with_queue(asked(case), 1))
        .collect();
    assert_eq!(rig.ask(asked(&cases[0])).ids(), cases[0].greedy);
    let steps = rig.stats().steps;
    std::thread::sleep(Duration::from_millis(30));
    assert!(
        rig.stats().steps <= steps + 2,
        "nothing runs for clients that do not read"
    );
    for (receiver, case) in slow.iter_mut().zip(&cases) {
        assert_eq!(read(receiver).ids(), case.greedy);
    }
}

#[test]
fn what_cannot_be_answered_is_refused_alone() {
    let folder = demo();
    let prompt = cases()[0].prompt.clone();
    let mut rig = Rig::new(options(&folder));
    let missing = AdapterRef {
        digest: rig.handle.info.base_digest,
        folder: folder.clone(),
    };
    let refused = [
        (
            request(&[1, 9999], 4, greedy()),
            "token 9999 is not in the vocabulary of 1024",
        ),
        (request(&[], 4, greedy()), "0 tokens"),
        (
            request(&prompt, 1100, greedy()),
            "10 tokens and 1100 more exceed 1024",
        ),
        (
            Generate {
                adapter: Some(missing),
                ..request(&prompt, 4, greedy())
            },
            "adapter_config.json",
        ),
    ];
    for (request, why) in refused {
        let answer = rig.ask(request);
        let Some(Err(fault)) = answer.end else {
            panic!("{answer:?}")
        };
        assert!(fault.to_string().contains(why), "{fault}");
    }
    assert_eq!(
        rig.ask(request(&prompt, 4, greedy())).tokens.len(),
        4,
        "the engine lives"
    );
}

#[test]
fn stop_fails_what_runs_and_closes_the_statistics() {
    let folder = demo();
    let mut rig = Rig::new(options(&folder));
    let endless = Generate {
        stop_tokens: vec![],
        ..request(&cases()[0].prompt, 480, greedy())
    };
    let mut running = rig.send_with_queue(endless, 4096);
    assert!(matches!(running.blocking_recv(), Some(Event::Token { .. })));
    rig.command(Command::Stop);
    assert_eq!(read(&mut running).end, Some(Err(Fault::ShuttingDown)));
    let began = Instant::now();
    while rig.handle.stats.has_changed().is_ok() {
        assert!(began.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(1));
    }
    let (events, mut refused) = mpsc::channel(1);
    assert!(
        rig.handle
            .commands
            .blocking_send(Command::Generate(request(&[1], 1, greedy()), events))
            .is_err()
    );
    assert_eq!(refused.blocking_recv(), None);
}
