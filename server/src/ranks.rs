//! Which rank of a replica this process is: the only one, rank 0, one that rank 0 started (`tandem rank`), or one that
//! torchrun, Slurm or Kubernetes started beside it with the same command line. Not here: what ranks do (backend).

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use tandem_backend::ranks::{Team, follow_meeting, follow_parent, train_meeting};
use tandem_backend::train::TrainError;
use tandem_backend::{Meeting, words};

use crate::cli::{ModelOptions, Rank};
use crate::commands::replica;
use crate::exit::WrongSetting;

/// A group that somebody else started.
pub struct Started {
    meeting: Meeting,
    /// Of its ranks, those on this machine.
    local_world: usize,
}

impl Started {
    /// Of a size that was asked, if one was. An error says the number and what there is instead.
    pub fn team(self, asked: Option<usize>) -> Result<Team, String> {
        let Started { meeting, local_world } = self;
        match asked.filter(|&asked| asked != meeting.world) {
            Some(asked) => {
                let world = meeting.world;
                Err(format!(
                    "{asked}, but the environment has a group of {world} ranks"
                ))
            }
            None => Ok(Team::Meeting { meeting, local_world }),
        }
    }

    pub fn is_rank_0(&self) -> bool {
        self.meeting.rank == 0
    }

    /// Trains beside rank 0, with this machine's copy of the model, until the run ends or some rank `stops`.
    pub fn train(&self, device: &str, model: &Path, stops: &dyn Fn() -> bool) -> Result<(), TrainError> {
        let device = words::device(device)?;
        train_meeting(&self.meeting, self.local_world, device, model, stops)
    }
}

/// What the environment says of a group of more than this process.
pub fn started() -> Result<Option<Started>> {
    let variable = |name: &str| std::env::var(name).ok();
    let meeting = Meeting::from_env(variable).context("the environment's ranks")?;
    let Some(meeting) = meeting.filter(|meeting| meeting.world > 1) else {
        return Ok(None);
    };
    // torchrun says it; elsewhere a machine has as many as the group's local ranks tell: one, unless told.
    let number = |value: String| {
        let why = || WrongSetting(format!("LOCAL_WORLD_SIZE {value:?} is not a number of ranks"));
        value.trim().parse::<usize>().map_err(|_| why())
    };
    let local_world = variable("LOCAL_WORLD_SIZE").map_or(Ok(1), number)?;
    Ok(Some(Started {
        local_world: local_world.max(meeting.local_rank + 1),
        meeting,
    }))
}

/// Who computes the replica of which this process is rank 0.
pub fn team(options: &ModelOptions, started: Option<Started>) -> Result<Team> {
    let asked = options.tensor_parallel_size.map(|size| size as usize);
    if let Some(started) = started {
        let unlike = |message| WrongSetting(format!("--tensor-parallel-size {message}"));
        return Ok(started.team(asked).map_err(unlike)?);
    }
    let program = std::env::current_exe().context("this program's own path")?;
    let backend = options.distributed_executor_backend.as_deref();
    Ok(words::team(
        asked.unwrap_or(1),
        backend,
        words::device(&options.device)?,
        program,
    )?)
}

/// True when this process is a rank beside rank 0, and has ended as one.
pub fn followed(options: &ModelOptions, started: &Option<Started>, data_dir: &Path) -> Result<Followed> {
    let Some(Started { meeting, local_world }) = started else {
        return Ok(Followed::Leads);
    };
    if meeting.rank == 0 {
        return Ok(Followed::Leads);
    }
    crate::commands::edge::make_data_dir(data_dir)?;
    let (folder, _) = replica::model(options, data_dir)?;
    let device = words::device(&options.device)?;
    let threads = options.threads.map(|threads| threads as usize);
    follow_meeting(meeting, *local_world, device, threads, &folder)?;
    Ok(Followed::ToTheEnd)
}

pub enum Followed {
    /// This process is rank 0.
    Leads,
    /// It was another, and the replica ended.
    ToTheEnd,
}

/// `tandem rank`: until rank 0 says that it is over, or its process ends.
pub fn run(options: &Rank) -> Result<()> {
    let meeting = Meeting::from_env(|name| std::env::var(name).ok())?;
    let meeting = meeting.context("`tandem rank` is started by rank 0, which sets RANK and WORLD_SIZE")?;
    let watch = std::thread::Builder::new().name("tandem-parent".to_owned());
    watch.spawn(end_with_parent).context("a thread")?;
    let Rank { device, threads } = options;
    let threads = threads.map(|threads| threads as usize);
    Ok(follow_parent(&meeting, words::device(device)?, threads)?)
}

/// Rank 0 holds the other end of our standard input.
fn end_with_parent() {
    let mut nothing = [0; 1];
    while std::io::stdin().read(&mut nothing).is_ok_and(|n| n > 0) {}
    tandem_backend::exit_at_once(1)
}
