//! Who is alive: each rank holds one line to rank 0, on which both say so twice a second. A process that ends closes its
//! line at once; a machine that vanishes falls silent. Rank 0 tells the others whom it lost. Needed because a rank may
//! idle for hours in a collective (so no time-out can notice), and because NCCL notices nobody. Carries no data.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::MAX_WORLD;
use super::c10d::{Failure, Group, Over};

const BEAT: Duration = Duration::from_millis(500);
/// A process that gets no processor for this long is as good as dead.
const SILENCE: Duration = Duration::from_secs(10);
/// Between two looks at the door while the others come, once, at start.
const KNOCK: Duration = Duration::from_millis(5);
/// For who came to say who it is.
const GREETING: Duration = Duration::from_secs(2);
/// Said on a line: "alive"; else the number of a rank that is lost, or of one that has ended, which is told by a bit.
const ALIVE: u8 = u8::MAX;
const ENDED: u8 = 0x80;
const _: () = assert!(MAX_WORLD <= 0x7f);
const KEY: &str = "watch";

pub(super) struct Watch {
    circle: Arc<Circle>,
    keepers: Vec<JoinHandle<()>>,
}

struct Circle {
    rank: usize,
    world: usize,
    groups: Mutex<Groups>,
    lines: Vec<Line>,
    /// Lost, or ended here: nothing more is said.
    over: AtomicBool,
}

/// That end with the circle: of all its ranks, and of parts of them.
struct Groups {
    all: Vec<Arc<Group>>,
    /// Why they were given up.
    why: Option<(String, Over)>,
}

struct Line {
    peer: usize,
    stream: TcpStream,
}

/// One rank's place in the circle.
pub(super) struct Place {
    pub rank: usize,
    pub world: usize,
    /// Where rank 0 is.
    pub master: IpAddr,
    pub deadline: Instant,
}

impl Watch {
    pub fn start(place: &Place, group: Arc<Group>) -> Result<Watch, Failure> {
        let lines = match place.rank {
            0 => receive(place, &group)?,
            _ => vec![call(place, &group)?],
        };
        for Line { stream, .. } in &lines {
            let set = stream
                .set_read_timeout(Some(BEAT))
                .and_then(|()| stream.set_write_timeout(Some(SILENCE)));
            set.and_then(|()| stream.set_nodelay(true)).map_err(failed)?;
        }
        let circle = Arc::new(Circle {
            rank: place.rank,
            world: place.world,
            groups: Mutex::new(Groups {
                all: vec![group],
                why: None,
            }),
            lines,
            over: AtomicBool::new(false),
        });
        let keepers = (0..circle.lines.len())
            .map(|line| {
                let circle = circle.clone();
                let name = format!("watch-{}", circle.lines[line].peer);
                std::thread::Builder::new()
                    .name(name)
                    .spawn(move || circle.keep(line))
            })
            .collect::<Result<_, _>>()
            .map_err(failed)?;
        Ok(Watch { circle, keepers })
    }

    /// Gives up the group, here whatever was heard before, and tells every rank.
    pub fn leave(&self) {
        let Circle { rank, world, .. } = *self.circle;
        let how = "left the group";
        self.circle
            .give_up(format!("rank {rank} of {world} {how}"), Over::Lost);
        self.circle.part(rank, Over::Lost, how);
    }

    /// Another group of these ranks, or of some: it is given up with the first.
    pub fn also_over(&self, group: Arc<Group>) {
        let mut groups = self.circle.groups();
        if let Some((why, over)) = &groups.why {
            group.give_up(why, *over);
        }
        groups.all.push(group);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let (over, how) = match std::thread::panicking() {
            true => (Over::Lost, "panicked"),
            false => (Over::Ended, "has ended"),
        };
        self.circle.part(self.circle.rank, over, how);
        for keeper in self.keepers.drain(..) {
            // A keeper that panicked said so itself.
            let _ = keeper.join();
        }
    }
}

impl Circle {
    fn keep(&self, line: usize) {
        let Line { peer, ref stream } = self.lines[line];
        let (mut reader, mut writer) = (stream, stream);
        let mut heard = Instant::now();
        let mut said: Option<Instant> = None;
        while !self.over.load(SeqCst) {
            if said.is_none_or(|said| said.elapsed() >= BEAT) {
                // A line that is broken may still have a last word to read.
                let _ = writer.write_all(&[ALIVE]);
                said = Some(Instant::now());
            }
            let mut word = [0];
            match reader.read(&mut word) {
                Ok(0) => return self.part(peer, Over::Lost, "is gone"),
                Ok(_) if word[0] == ALIVE => heard = Instant::now(),
                Ok(_) if word[0] & ENDED != 0 => {
                    return self.part(usize::from(word[0] & !ENDED), Over::Ended, "has ended");
                }
                Ok(_) => return self.part(usize::from(word[0]), Over::Lost, "is gone"),
                Err(error) if is_pause(error.kind()) => (),
                Err(_) => return self.part(peer, Over::Lost, "is gone"),
            }
            if heard.elapsed() > SILENCE {
                let how = format!("has said nothing for {} s", SILENCE.as_secs());
                return self.part(peer, Over::Lost, &how);
            }
        }
    }

    /// Once: this group is over, for everyone.
    fn part(&self, rank: usize, over: Over, how: &str) {
        if self.over.swap(true, SeqCst) {
            return;
        }
        self.give_up(format!("rank {rank} of {} {how}", self.world), over);
        let word = match over {
            Over::Ended => rank as u8 | ENDED,
            Over::Lost => rank as u8,
        };
        for Line { stream, .. } in &self.lines {
            let mut stream = stream;
            // A line that cannot be written to ends below, which says enough.
            let _ = stream.write_all(&[word]);
        }
        self.hang_up();
    }

    fn give_up(&self, why: String, over: Over) {
        let mut groups = self.groups();
        groups.all.iter().for_each(|group| group.give_up(&why, over));
        groups.why = Some((why, over));
    }

    fn groups(&self) -> MutexGuard<'_, Groups> {
        let groups = self.groups.lock();
        groups.expect("nothing panics while it holds this lock")
    }

    fn hang_up(&self) {
        for Line { stream, .. } in &self.lines {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn is_pause(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// Rank 0: opens a door, says in the store where, and waits for the others.
fn receive(place: &Place, group: &Group) -> Result<Vec<Line>, Failure> {
    let any: IpAddr = match place.master {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let door = TcpListener::bind((any, 0)).map_err(failed)?;
    door.set_nonblocking(true).map_err(failed)?;
    let port = door.local_addr().map_err(failed)?.port();
    // Who read the store is one of us.
    let word = RandomState::new().build_hasher().finish();
    group.set(KEY, &format!("{port} {word}"))?;
    let mut lines: Vec<Line> = Vec::new();
    while lines.len() + 1 < place.world {
        match door.accept() {
            Ok((stream, _)) => {
                let Some(peer) = greeted(&stream, word) else {
                    continue;
                };
                let known = lines.iter().any(|line| line.peer == peer);
                if known || !(1..place.world).contains(&peer) {
                    return Err(Failure(format!("there are two ranks {peer}")));
                }
                lines.push(Line { peer, stream });
            }
            Err(error) if is_pause(error.kind()) && Instant::now() < place.deadline => {
                std::thread::sleep(KNOCK)
            }
            Err(error) if is_pause(error.kind()) => {
                let come = lines.len() + 1;
                return Err(Failure(format!("{come} of {} ranks came", place.world)));
            }
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(lines)
}

/// The rank that came. None for a stranger.
fn greeted(stream: &TcpStream, word: u64) -> Option<usize> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(GREETING)).ok()?;
    let mut greeting = [0; 9];
    let mut reader = stream;
    reader.read_exact(&mut greeting).ok()?;
    let (rank, said) = greeting.split_first().expect("nine bytes");
    (said == word.to_le_bytes()).then_some(usize::from(*rank))
}

fn call(place: &Place, group: &Group) -> Result<Line, Failure> {
    let said = group.get(KEY)?;
    let parsed = said
        .split_once(' ')
        .and_then(|(port, word)| Some((port.parse::<u16>().ok()?, word.parse::<u64>().ok()?)));
    let (port, word) = parsed.ok_or_else(|| Failure(format!("rank 0 speaks another version: {said:?}")))?;
    let left = place.deadline.saturating_duration_since(Instant::now());
    let door = SocketAddr::new(place.master, port);
    let mut stream = TcpStream::connect_timeout(&door, left.max(KNOCK)).map_err(failed)?;
    let mut greeting = vec![place.rank as u8];
    greeting.extend(word.to_le_bytes());
    stream.write_all(&greeting).map_err(failed)?;
    Ok(Line { peer: 0, stream })
}

fn failed(error: std::io::Error) -> Failure {
    Failure(format!("watching the ranks: {error}"))
}
