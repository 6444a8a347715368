//! One exercise through every kind of group: the same bits whether ranks are threads or processes; and what happens when
//! a rank is lost. Processes are this test binary, started again.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::*;

/// Of the sums: less than a cache line, odd, a decode step of one row, and beyond what processes gather whole.
const LENGTHS: [usize; 6] = [1, 31, 64, 1000, 4096, 150_001];
const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// Element `index` of a rank's tensor: of mixed magnitudes, so that the order of a sum shows in its bits.
fn element(rank: usize, index: usize) -> f32 {
    let mixed = (index as u32 ^ (rank as u32) << 20).wrapping_mul(0x9e37_79b9);
    let mixed = (mixed ^ mixed >> 15).wrapping_mul(0x85eb_ca6b);
    (mixed >> 8) as f32 / (1 << 24) as f32 * 10f32.powi((mixed % 7) as i32 - 3) - 0.4
}

fn tensor(rank: usize, length: usize, kind: Kind) -> Tensor {
    let values: Vec<f32> = (0..length).map(|index| element(rank, index)).collect();
    Tensor::from_slice(&values).to_kind(kind)
}

/// What every rank must get, bit for bit, computed by one thread.
fn reference(world: usize, length: usize, kind: Kind) -> Vec<f32> {
    let round = |x: f32| match kind {
        Kind::BFloat16 => bf16::from_f32(x).to_f32(),
        _ => x,
    };
    let sum = |index| {
        (1..world).fold(round(element(0, index)), |sum, rank| {
            sum + round(element(rank, index))
        })
    };
    (0..length).map(|index| round(sum(index))).collect()
}

fn floats(x: &Tensor) -> Vec<f32> {
    Vec::try_from(x.to_kind(Kind::Float).view([-1])).unwrap()
}

/// Every collective in the whole group and in parts of it, and in parts of parts.
fn exercise(comm: &Comm) {
    exercise_one(comm);
    for colour in [
        |rank| rank % 2,
        |rank| rank / 2,
        |rank| usize::from(rank > 0),
        |rank| rank,
    ] {
        let part = comm.split(colour(comm.rank()));
        let members = (0..comm.world()).filter(|&rank| colour(rank) == colour(comm.rank()));
        let members: Vec<usize> = members.collect();
        assert_eq!(part.world(), members.len());
        assert_eq!(members[part.rank()], comm.rank());
        exercise_one(&part);
        let part = part.split(part.rank() / 2);
        exercise_one(&part);
    }
    comm.meet();
}

/// Every collective, several times, against the reference.
fn exercise_one(comm: &Comm) {
    let (rank, world) = (comm.rank(), comm.world());
    comm.meet();
    comm.check();
    for (length, kind) in LENGTHS
        .iter()
        .flat_map(|&length| KINDS.map(|kind| (length, kind)))
    {
        let own = tensor(rank, length, kind);
        let expected = reference(world, length, kind);
        for _ in 0..3 {
            let mut x = own.copy();
            comm.all_reduce(&mut x);
            // Bits, though no NaN is among them.
            assert!(
                floats(&x) == expected,
                "{length} of {kind:?}, rank {rank} of {world}"
            );
        }
        if kind == Kind::Float {
            let part = comm.reduce_scatter(&tensor(rank, world * length, kind));
            let expected = &reference(world, world * length, kind)[rank * length..][..length];
            assert!(
                floats(&part) == expected,
                "{length} of {kind:?}, part {rank} of {world}"
            );
        }
        let all = comm.all_gather(&own);
        assert_eq!(all.size(), [world as i64, length as i64]);
        for other in 0..world {
            assert_eq!(all.get(other as i64), tensor(other, length, kind), "rank {other}");
        }
    }
    let whole = comm.all_gather(&Tensor::from(rank as i64));
    assert_eq!(
        Vec::<i64>::try_from(whole).unwrap(),
        (0..world as i64).collect::<Vec<_>>()
    );
    for length in [0, 1, 4087, 4088, 4089, 100_000] {
        let message: Vec<u8> = (0..length).map(|i| (i * 7 % 251) as u8).collect();
        let said = match rank {
            0 => message.clone(),
            _ => vec![9; 3],
        };
        assert_eq!(comm.broadcast(said), message, "{length} bytes");
    }
}

/// Runs `rank` on a thread for each end.
fn on_threads(ends: Vec<Comm>, rank: impl Fn(Comm) + Sync) {
    std::thread::scope(|scope| {
        for end in ends {
            scope.spawn(|| rank(end));
        }
    });
}

/// The message of the panic that a lost rank causes.
fn lost_in(collective: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(collective)).expect_err("a rank is lost");
    let message = panic
        .downcast_ref::<String>()
        .expect("a formatted message")
        .clone();
    assert!(message.starts_with(LOST), "{message}");
    message
}

#[test]
fn one_rank_alone() {
    exercise(&Comm::solo());
    Comm::solo().leave();
}

/// Four ranks outnumber the cores of a small machine.
#[test]
fn ranks_that_are_threads() {
    for world in 1..=4 {
        on_threads(Comm::threads(world), |comm| exercise(&comm));
    }
}

#[test]
fn many_small_rounds() {
    on_threads(Comm::threads(4), |comm| {
        let mut x = Tensor::ones([33], (Kind::Float, Device::Cpu));
        for _ in 0..2000 {
            let _ = x.fill_(comm.rank() as f64);
            comm.all_reduce(&mut x);
            assert!(floats(&x).iter().all(|&sum| sum == 6.0));
        }
    });
}

/// The last collective counts for everyone, however early one of the ranks goes.
#[test]
fn leaving_after_the_last_collective_fails_nobody() {
    for _ in 0..500 {
        on_threads(Comm::threads(3), |comm| {
            let mut x = Tensor::ones([100], (Kind::Float, Device::Cpu));
            comm.all_reduce(&mut x);
            assert_eq!(x.double_value(&[99]), 3.0);
        });
    }
}

#[test]
fn threads_that_lose_a_rank_say_whom() {
    // One rank waits asleep, one comes late, one leaves: by name, or by panicking.
    for leave in [|comm: Comm| comm.leave(), |comm: Comm| drop(comm)] {
        let (said, heard) = mpsc::channel();
        on_threads(Comm::threads(3), |comm| match comm.rank() {
            0 => {
                let message = lost_in(|| drop(comm.broadcast(vec![1])));
                assert!(message.contains("rank 2 of 3 left"), "{message}");
                said.clone().send(()).unwrap();
            }
            1 => {
                while comm_is_whole(&comm) {
                    std::thread::yield_now();
                }
                lost_in(|| comm.all_reduce(&mut Tensor::ones([4], (Kind::Float, Device::Cpu))));
            }
            _ => leave(comm),
        });
        heard.try_recv().expect("rank 0 heard of it");
    }
}

fn comm_is_whole(comm: &Comm) -> bool {
    catch_unwind(AssertUnwindSafe(|| comm.check())).is_ok()
}

#[test]
fn ranks_that_mean_different_sums_are_told() {
    on_threads(Comm::threads(2), |comm| {
        let mut x = Tensor::ones([4 + comm.rank() as i64], (Kind::Float, Device::Cpu));
        let panic = catch_unwind(AssertUnwindSafe(|| comm.all_reduce(&mut x))).expect_err("other lengths");
        let message = panic.downcast_ref::<&str>().expect("a plain message");
        assert!(message.contains("do not mean the same"), "{message}");
    });
}

/// A meeting on this machine, on a port that was free a moment ago.
fn meeting(world: usize, timeout: Duration) -> impl Fn(usize) -> Meeting {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let master_port = listener.local_addr().unwrap().port();
    move |rank| Meeting {
        rank,
        world,
        local_rank: rank,
        master_addr: "127.0.0.1".to_owned(),
        master_port,
        timeout,
    }
}

/// Longer than any rank should ever need, shorter than a test may hang.
const LONG: Duration = Duration::from_secs(120);
/// Says which part a rank that is a process plays.
const PART: &str = "TANDEM_TEST_PART";

/// This binary again, as one rank; `a_rank` is what it runs.
fn start_rank(meeting: &Meeting, part: &str) -> Child {
    let variables = [
        ("RANK", meeting.rank.to_string()),
        ("WORLD_SIZE", meeting.world.to_string()),
        ("MASTER_ADDR", meeting.master_addr.clone()),
        ("MASTER_PORT", meeting.master_port.to_string()),
        (PART, part.to_owned()),
    ];
    Command::new(std::env::current_exe().unwrap())
        .args(["comm::tests::a_rank", "--exact", "--ignored", "--nocapture"])
        .envs(variables)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this binary starts again")
}

fn ended_well(child: Child) {
    let output = child.wait_with_output().expect("our child");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (said(&output.stdout), said(&output.stderr));
    assert!(output.status.success(), "{}: {out}\n{err}", output.status);
}

#[test]
#[ignore = "the part of one rank, run by the tests below"]
fn a_rank() {
    let meeting = Meeting::from_env(|name| std::env::var(name).ok());
    let meeting = Meeting {
        timeout: LONG,
        ..meeting
            .expect("a valid environment")
            .expect("a rank's environment")
    };
    let comm = Comm::join(&meeting, Device::Cpu).expect("the ranks meet");
    exercise(&comm);
    let part = comm.split(comm.rank() % 2);
    let begun = Instant::now();
    match std::env::var(PART).expect("a part").as_str() {
        "exercise" => {
            // Who ends first could be missed by one that is still in the last sum: the test lets all go together.
            println!("exercised");
            let _ = std::io::stdin().read_line(&mut String::new());
            return;
        }
        "sum" => drop(lost_in(|| {
            part.all_reduce(&mut Tensor::ones([8], (Kind::Float, Device::Cpu)))
        })),
        "listen" => drop(lost_in(|| drop(comm.broadcast(Vec::new())))),
        "die" => {
            println!("ready");
            std::thread::sleep(LONG);
        }
        other => panic!("no part {other}"),
    }
    assert!(begun.elapsed() < LONG, "by notice, not by time-out");
    lost_in(|| comm.meet());
}

#[test]
fn ranks_that_are_processes() {
    for world in [2, 4] {
        let meeting = meeting(world, LONG);
        let mut ranks: Vec<Child> = (0..world)
            .map(|rank| start_rank(&meeting(rank), "exercise"))
            .collect();
        // Kept until the ranks have ended: they go on writing.
        let mut outputs: Vec<_> = ranks
            .iter_mut()
            .map(|rank| BufReader::new(rank.stdout.take().unwrap()).lines())
            .collect();
        for lines in &mut outputs {
            // One that failed says why when it is waited for.
            lines.map_while(Result::ok).any(|line| line.contains("exercised"));
        }
        // Closes their standard input.
        ranks.into_iter().for_each(ended_well);
    }
}

/// One waits for its part of a sum, in a group with the one that is killed; one idles. Both notice, and rank 0 tells what the third cannot see.
#[test]
fn a_killed_process_is_noticed() {
    let meeting = meeting(3, LONG);
    let others = ["sum", "listen"].iter().enumerate();
    let others: Vec<Child> = others
        .map(|(rank, part)| start_rank(&meeting(rank), part))
        .collect();
    let mut victim = start_rank(&meeting(2), "die");
    let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let ready = lines.map_while(Result::ok).any(|line| line.contains("ready"));
    assert!(ready, "rank 2 did its exercise");
    victim.kill().unwrap();
    victim.wait().unwrap();
    others.into_iter().for_each(ended_well);
}

#[test]
fn who_does_not_come_is_an_error_in_time() {
    let short = Duration::from_millis(1500);
    for rank in [0, 1] {
        let begun = Instant::now();
        let error = Comm::join(&meeting(2, short)(rank), Device::Cpu)
            .err()
            .expect("nobody else comes");
        let message = error.to_string();
        assert!(
            message.starts_with(&format!("rank {rank} of 2 could not meet")),
            "{message}"
        );
        assert!(begun.elapsed() < LONG, "{message}");
    }
}

/// Ranks with groups of their own, in one process.
fn joined(meetings: impl Fn(usize) -> Meeting, world: usize, rank: impl Fn(Comm) + Sync) {
    let meetings: Vec<Meeting> = (0..world).map(meetings).collect();
    std::thread::scope(|scope| {
        for meeting in &meetings {
            scope.spawn(|| rank(Comm::join(meeting, Device::Cpu).expect("the ranks meet")));
        }
    });
}

/// Idling is no failure, however long; keeping others waiting in a sum is.
#[test]
fn a_time_out_is_for_sums_not_for_idling() {
    let timeout = Duration::from_secs(3);
    joined(meeting(2, timeout), 2, |comm| {
        if comm.rank() == 0 {
            std::thread::sleep(timeout + Duration::from_millis(200));
            comm.broadcast(vec![5]);
            let message = lost_in(|| comm.all_reduce(&mut Tensor::ones([8], (Kind::Float, Device::Cpu))));
            assert!(message.contains("within 3000 ms"), "{message}");
        } else {
            assert_eq!(comm.broadcast(Vec::new()), [5]);
            // Never sums. The other, whose sum failed, has told.
            let message = lost_in(|| drop(comm.broadcast(Vec::new())));
            assert!(message.contains("rank 0 of 2"), "{message}");
        }
    });
}

#[test]
fn processes_that_are_left_say_by_whom() {
    joined(meeting(2, LONG), 2, |comm| match comm.rank() {
        0 => {
            let message = lost_in(|| drop(comm.all_gather(&Tensor::ones([8], (Kind::Float, Device::Cpu)))));
            assert!(message.contains("rank 1 of 2"), "{message}");
        }
        _ => {
            comm.leave();
            lost_in(|| comm.meet());
        }
    });
}
