//! How long an all-reduce and a broadcast take: ranks that are threads against Gloo over loopback:
//! `cargo bench --workspace --bench comm`. Gloo's ranks are threads here too, each with a group of its own: the same
//! sockets, without the noise of processes. Best of a few rounds, because the machine is rarely quiet.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use tandem_kernels::comm::{Comm, Meeting};
use tch::{Device, Kind, Tensor};

const ROUNDS: usize = 5;
/// Of float32.
const ELEMENTS: [i64; 3] = [1 << 10, 4 << 10, 1 << 20];

fn main() {
    tch::set_num_threads(1);
    for world in [2, 4] {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        println!("{world} ranks on {cores} cores, microseconds");
        report("threads", Comm::threads(world));
        report("gloo", gloo(world));
    }
}

fn report(name: &str, ends: Vec<Comm>) {
    let times = std::thread::scope(|scope| {
        let ranks: Vec<_> = ends
            .into_iter()
            .map(|comm| scope.spawn(move || times(&comm)))
            .collect();
        let mut times = ranks.into_iter().map(|rank| rank.join().expect("a rank"));
        times.next().expect("a group has a rank")
    });
    for (what, time) in times {
        println!("  {name:<8} {what:<24} {:>9.1}", time.as_secs_f64() * 1e6);
    }
}

fn times(comm: &Comm) -> Vec<(String, Duration)> {
    let mut times: Vec<(String, Duration)> = ELEMENTS
        .map(|elements| {
            let mut x = Tensor::ones([elements], (Kind::Float, Device::Cpu));
            let time = best(comm, if elements > 1 << 16 { 10 } else { 200 }, || {
                comm.all_reduce(&mut x)
            });
            (format!("all_reduce {} KiB", elements * 4 / 1024), time)
        })
        .into();
    let x = Tensor::ones([4 << 10], (Kind::Float, Device::Cpu));
    let time = best(comm, 200, || drop(comm.all_gather(&x)));
    times.push(("all_gather 16 KiB".to_owned(), time));
    let time = best(comm, 200, || drop(comm.broadcast(vec![0; 500])));
    times.push(("broadcast 500 B".to_owned(), time));
    times
}

fn best(comm: &Comm, calls: u32, mut call: impl FnMut()) -> Duration {
    let rounds = (0..ROUNDS).map(|_| {
        comm.meet();
        let begun = Instant::now();
        (0..calls).for_each(|_| call());
        begun.elapsed() / calls
    });
    rounds.min().expect("at least one round")
}

fn gloo(world: usize) -> Vec<Comm> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let master_port = listener.local_addr().expect("bound").port();
    drop(listener);
    let ranks: Vec<_> = (0..world)
        .map(|rank| {
            let meeting = Meeting {
                rank,
                world,
                local_rank: rank,
                master_addr: "127.0.0.1".to_owned(),
                master_port,
                timeout: Duration::from_secs(60),
            };
            std::thread::spawn(move || Comm::join(&meeting, Device::Cpu).expect("the ranks meet"))
        })
        .collect();
    ranks
        .into_iter()
        .map(|rank| rank.join().expect("a rank"))
        .collect()
}
