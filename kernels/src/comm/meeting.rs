//! Where and as whom a rank that is a process meets the others, and what can go wrong until they have met.

use std::time::Duration;

use super::MAX_WORLD;

/// As torchrun's.
pub const DEFAULT_PORT: u16 = 29500;
/// How long ranks wait for each other, to meet and in a collective.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// One rank's invitation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meeting {
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// Rank among those of this machine: the index of its GPU.
    pub local_rank: usize,
    /// Where rank 0 listens: a host name or an address.
    pub master_addr: String,
    pub master_port: u16,
    /// For the meeting as a whole, and for a collective.
    pub timeout: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum CommError {
    #[error("{name}={value:?}: {why}")]
    Variable {
        name: &'static str,
        value: String,
        why: String,
    },
    #[error("{name} is not set, but {given} is: ranks need both")]
    Missing { name: &'static str, given: &'static str },
    #[error("rank {rank} of {world} could not meet the others at {at}: {why}")]
    Join {
        rank: usize,
        world: usize,
        at: String,
        why: String,
    },
}

/// Who we are, by whom it is said: torchrun and everybody who imitates it, LeaderWorkerSet, Slurm. Slurm sets its
/// variables for programs that are no ranks, too; it counts where MASTER_ADDR says that ranks are meant.
const WORLD: [&str; 3] = ["WORLD_SIZE", "LWS_GROUP_SIZE", "SLURM_NTASKS"];
const RANK: [&str; 3] = ["RANK", "LWS_WORKER_INDEX", "SLURM_PROCID"];
const LOCAL_RANK: [&str; 3] = ["LOCAL_RANK", "LOCAL_RANK", "SLURM_LOCALID"];
const ADDRESS: [&str; 3] = ["MASTER_ADDR", "LWS_LEADER_ADDRESS", "MASTER_ADDR"];
const PORT: &str = "MASTER_PORT";

impl Meeting {
    /// What the environment says, read through `vars`. None where it names no group.
    pub fn from_env(vars: impl Fn(&str) -> Option<String>) -> Result<Option<Meeting>, CommError> {
        let get = |name: &'static str| vars(name).filter(|value| !value.is_empty());
        let who = (0..WORLD.len())
            .find(|&who| get(WORLD[who]).is_some() && (who < 2 || get(ADDRESS[who]).is_some()));
        let Some(who) = who else {
            return match get("RANK") {
                Some(_) => Err(CommError::Missing {
                    name: "WORLD_SIZE",
                    given: "RANK",
                }),
                None => Ok(None),
            };
        };
        let need = |name: &'static str| {
            let given = WORLD[who];
            get(name)
                .map(|value| (name, value))
                .ok_or(CommError::Missing { name, given })
        };
        let world: usize = number(need(WORLD[who])?)?;
        if !(1..=MAX_WORLD).contains(&world) {
            return Err(wrong(
                WORLD[who],
                &world.to_string(),
                format!("a group has 1 to {MAX_WORLD} ranks"),
            ));
        }
        let rank: usize = number(need(RANK[who])?)?;
        if rank >= world {
            return Err(wrong(
                RANK[who],
                &rank.to_string(),
                format!("{} is {world}, ranks count from 0", WORLD[who]),
            ));
        }
        let local_rank = get(LOCAL_RANK[who]).map_or(Ok(0), |value| number((LOCAL_RANK[who], value)))?;
        let (_, master_addr) = need(ADDRESS[who])?;
        let master_port = get(PORT).map_or(Ok(DEFAULT_PORT), |value| number((PORT, value)))?;
        Ok(Some(Meeting {
            rank,
            world,
            local_rank,
            master_addr,
            master_port,
            timeout: DEFAULT_TIMEOUT,
        }))
    }

    pub(super) fn failed(&self, why: impl ToString) -> CommError {
        CommError::Join {
            rank: self.rank,
            world: self.world,
            at: format!("{}:{}", self.master_addr, self.master_port),
            why: why.to_string(),
        }
    }
}

fn number<T: std::str::FromStr>((name, value): (&'static str, String)) -> Result<T, CommError> {
    let parsed = value.trim().parse();
    parsed.map_err(|_| wrong(name, &value, "not such a number".to_owned()))
}

fn wrong(name: &'static str, value: &str, why: String) -> CommError {
    CommError::Variable {
        name,
        value: value.to_owned(),
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meeting(vars: &str) -> Result<Option<Meeting>, String> {
        let get = |name: &str| {
            let mut pairs = vars.split_whitespace().filter_map(|pair| pair.split_once('='));
            pairs
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.to_owned())
        };
        Meeting::from_env(get).map_err(|error| error.to_string())
    }

    #[test]
    fn environments_that_name_a_group() {
        for (vars, rank, world, local_rank, at) in [
            (
                "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=7",
                3,
                4,
                1,
                ("a", 7),
            ),
            (
                "RANK=0 WORLD_SIZE=1 MASTER_ADDR=::1",
                0,
                1,
                0,
                ("::1", DEFAULT_PORT),
            ),
            (
                "LWS_GROUP_SIZE=2 LWS_WORKER_INDEX=1 LWS_LEADER_ADDRESS=x-0.x",
                1,
                2,
                0,
                ("x-0.x", DEFAULT_PORT),
            ),
            (
                "SLURM_NTASKS=16 SLURM_PROCID=9 SLURM_LOCALID=1 MASTER_ADDR=n1",
                9,
                16,
                1,
                ("n1", DEFAULT_PORT),
            ),
        ] {
            let found = meeting(vars).unwrap().unwrap();
            assert_eq!(
                (found.rank, found.world, found.local_rank),
                (rank, world, local_rank),
                "{vars}"
            );
            assert_eq!((found.master_addr.as_str(), found.master_port), at, "{vars}");
        }
    }

    #[test]
    fn environments_that_name_none_or_half() {
        assert_eq!(meeting(""), Ok(None));
        assert_eq!(meeting("SLURM_NTASKS=16 SLURM_PROCID=0"), Ok(None));
        for (vars, expected) in [
            ("RANK=1", "WORLD_SIZE is not set, but RANK is"),
            ("WORLD_SIZE=2 MASTER_ADDR=a", "RANK is not set, but WORLD_SIZE is"),
            ("WORLD_SIZE=2 RANK=0", "MASTER_ADDR is not set"),
            ("WORLD_SIZE=2 RANK=2 MASTER_ADDR=a", "RANK=\"2\": WORLD_SIZE is 2"),
            (
                "WORLD_SIZE=0 RANK=0 MASTER_ADDR=a",
                "WORLD_SIZE=\"0\": a group has 1 to",
            ),
            (
                "WORLD_SIZE=two RANK=0 MASTER_ADDR=a",
                "WORLD_SIZE=\"two\": not such a number",
            ),
            (
                "WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=65536",
                "MASTER_PORT=\"65536\"",
            ),
        ] {
            let error = meeting(vars).unwrap_err();
            assert!(error.contains(expected), "{vars}: {error}");
        }
    }
}
