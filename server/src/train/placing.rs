//! Where the ranks of a run stand, in the words of torchrun, FSDP, torchtune and llama-recipes. Not here: what a mesh is and does
//! (backend).

use tandem_backend::MAX_WORLD;
use tandem_backend::ranks::Team;
use tandem_backend::train::mates::Sharding;
use tandem_backend::train::mesh::Mesh;

use super::settings::{SettingsError, wrong};

/// What was said of them.
#[derive(Default)]
pub struct Places<'a> {
    pub data_parallel_size: Option<usize>,
    pub tensor_parallel_size: Option<usize>,
    pub num_processes: Option<usize>,
    pub sharding_strategy: Option<&'a str>,
    pub sharding_group_size: Option<i64>,
    pub replica_group_size: Option<usize>,
    pub hsdp: Option<bool>,
    pub enable_fsdp: Option<bool>,
}

#[derive(Debug)]
pub struct Placing {
    /// All of them, if it was said.
    pub ranks: Option<usize>,
    pub tensor_parallel: usize,
    pub sharding: Sharding,
    groups: Groups,
}

/// Of models that share what they hold.
#[derive(Debug, PartialEq)]
enum Groups {
    All,
    Machines,
    OfSize(usize),
    Number(usize),
    OfSizeAndNumber(usize, usize),
}

impl Placing {
    pub fn read(places: &Places) -> Result<Placing, SettingsError> {
        let &Places {
            data_parallel_size,
            tensor_parallel_size,
            num_processes,
            sharding_group_size,
            replica_group_size,
            ..
        } = places;
        for (key, size) in [
            ("data_parallel_size", data_parallel_size),
            ("tensor_parallel_size", tensor_parallel_size),
            ("num_processes", num_processes),
            ("replica_group_size", replica_group_size),
        ] {
            if let Some(size) = size.filter(|size| !(1..=MAX_WORLD).contains(size)) {
                return Err(wrong(
                    key,
                    format!("must be a number between 1 and {MAX_WORLD}, got {size}"),
                ));
            }
        }
        let tensor_parallel = tensor_parallel_size.unwrap_or(1);
        let product = data_parallel_size.map(|models| models * tensor_parallel);
        if let (Some(product), Some(all)) = (
            product.filter(|&product| num_processes.unwrap_or(product) != product),
            num_processes,
        ) {
            return Err(wrong(
                "num_processes",
                format!("is {all}, but data_parallel_size times tensor_parallel_size is {product}"),
            ));
        }
        let size = match sharding_group_size {
            None | Some(-1) => None,
            Some(size) => Some(usize::try_from(size).ok().filter(|size| (1..=MAX_WORLD).contains(size)).ok_or_else(
                || {
                    wrong(
                        "sharding_group_size",
                        format!("must be a number of models between 1 and {MAX_WORLD}, or -1 for all, got {size}"),
                    )
                },
            )?),
        };
        let (sharding, is_hybrid) = sharding(places)?;
        let groups = match (size, replica_group_size) {
            (None, None) if is_hybrid && sharding_group_size.is_none() => Groups::Machines,
            (None, None) => Groups::All,
            (Some(size), None) => Groups::OfSize(size),
            (None, Some(number)) => Groups::Number(number),
            (Some(size), Some(number)) => Groups::OfSizeAndNumber(size, number),
        };
        Ok(Placing {
            ranks: product.or(num_processes),
            tensor_parallel,
            sharding,
            groups,
        })
    }

    pub fn is_of_several(&self) -> bool {
        self.tensor_parallel > 1 || self.ranks.is_some_and(|ranks| ranks > 1)
    }

    /// The mesh of these ranks.
    pub fn on(&self, team: &Team) -> Result<Mesh, SettingsError> {
        let world = team.world();
        let mut mesh = Mesh {
            tensor_parallel: self.tensor_parallel,
            sharding: self.sharding,
            sharers: None,
        };
        mesh.check(world)
            .map_err(|message| wrong("tensor_parallel_size", message))?;
        let models = mesh.models(world);
        mesh.sharers = match self.groups {
            Groups::All => None,
            Groups::OfSize(size) => Some(size),
            Groups::Machines => match team {
                Team::Meeting { local_world, .. } => Some(local_world / self.tensor_parallel),
                Team::Threads(_) | Team::Processes { .. } => None,
            },
            Groups::Number(number) if models.is_multiple_of(number) => Some(models / number),
            Groups::OfSizeAndNumber(size, number) if models == size * number => Some(size),
            Groups::Number(number) => {
                let message = format!("{models} models cannot stand in {number} groups");
                return Err(wrong("replica_group_size", message));
            }
            Groups::OfSizeAndNumber(size, number) => {
                let message = format!(
                    "{number} groups of {size} are {} models, there are {models}",
                    size * number
                );
                return Err(wrong("sharding_group_size", message));
            }
        };
        mesh.check(world)
            .map_err(|message| wrong("sharding_group_size", message))?;
        Ok(mesh)
    }
}

/// What is shared, and whether in groups.
fn sharding(places: &Places) -> Result<(Sharding, bool), SettingsError> {
    let &Places {
        sharding_strategy: strategy,
        sharding_group_size,
        replica_group_size,
        hsdp,
        enable_fsdp,
        ..
    } = places;
    let wrong = |message: String| Err(wrong("sharding_strategy", message));
    // Sizes of groups alone are FSDP's, as torchtune has them.
    let is_asked = enable_fsdp == Some(true)
        || hsdp == Some(true)
        || sharding_group_size.is_some()
        || replica_group_size.is_some();
    let (sharding, is_hybrid) = match strategy {
        None if is_asked => (Sharding::Parameters, false),
        None | Some("" | "NO_SHARD") => (Sharding::None, false),
        Some("SHARD_GRAD_OP") => (Sharding::Gradients, false),
        Some("FULL_SHARD") => (Sharding::Parameters, false),
        Some("HYBRID_SHARD") => (Sharding::Parameters, true),
        Some("HYBRID_SHARD_ZERO2" | "_HYBRID_SHARD_ZERO2") => (Sharding::Gradients, true),
        Some(other) => {
            return wrong(format!(
                "must be NO_SHARD, SHARD_GRAD_OP, FULL_SHARD, HYBRID_SHARD or HYBRID_SHARD_ZERO2, got {other}"
            ));
        }
    };
    let is_hybrid = match (hsdp, is_hybrid) {
        (Some(false), true) => {
            return wrong(format!(
                "{} is of groups, hsdp=false is not: give one of them",
                strategy.unwrap_or_default()
            ));
        }
        (hsdp, is_hybrid) => is_hybrid || hsdp == Some(true),
    };
    let has_groups =
        is_hybrid || replica_group_size.is_some() || sharding_group_size.is_some_and(|size| size != -1);
    match (sharding, enable_fsdp, strategy) {
        (Sharding::None, _, Some(strategy)) if has_groups => wrong(format!(
            "{strategy} shares nothing, so there are no groups that do: give one of them"
        )),
        (Sharding::Gradients | Sharding::Parameters, Some(false), strategy) => wrong(format!(
            "{} shares, enable_fsdp=false does not: give one of them",
            strategy.unwrap_or("a group's size")
        )),
        _ => Ok((sharding, is_hybrid)),
    }
}

#[cfg(test)]
mod tests {
    use tandem_backend::Meeting;

    use super::*;

    fn team(world: usize, local_world: usize) -> Team {
        let meeting = |name: &str| match name {
            "WORLD_SIZE" => Some(world.to_string()),
            "RANK" => Some("0".to_owned()),
            "MASTER_ADDR" => Some("127.0.0.1".to_owned()),
            _ => None,
        };
        Team::Meeting {
            meeting: Meeting::from_env(meeting)
                .expect("a group")
                .expect("a rank's environment"),
            local_world,
        }
    }

    #[test]
    fn ranks_stand_as_they_are_told_or_it_is_said_why_not() {
        let plain = Places::default;
        let hybrid = || Places {
            sharding_strategy: Some("HYBRID_SHARD"),
            ..plain()
        };
        let of = |tensor_parallel, sharding, sharers| {
            Ok(Mesh {
                tensor_parallel,
                sharding,
                sharers,
            })
        };
        use Sharding::{Gradients, Parameters};
        // On two machines of four ranks.
        for (places, expected) in [
            (plain(), of(1, Sharding::None, None)),
            (hybrid(), of(1, Parameters, Some(4))),
            (
                Places {
                    sharding_strategy: Some("HYBRID_SHARD_ZERO2"),
                    tensor_parallel_size: Some(2),
                    data_parallel_size: Some(4),
                    num_processes: Some(8),
                    ..plain()
                },
                of(2, Gradients, Some(2)),
            ),
            (
                Places {
                    hsdp: Some(true),
                    enable_fsdp: Some(true),
                    sharding_group_size: Some(2),
                    replica_group_size: Some(4),
                    ..plain()
                },
                of(1, Parameters, Some(2)),
            ),
            (
                Places {
                    sharding_group_size: Some(-1),
                    replica_group_size: Some(2),
                    ..plain()
                },
                of(1, Parameters, Some(4)),
            ),
            (
                Places {
                    tensor_parallel_size: Some(3),
                    ..plain()
                },
                Err("8 ranks cannot divide models in 3 parts"),
            ),
            (
                Places {
                    sharding_group_size: Some(3),
                    ..hybrid()
                },
                Err("8 models cannot share in groups of 3"),
            ),
            (
                Places {
                    replica_group_size: Some(3),
                    ..hybrid()
                },
                Err("8 models cannot stand in 3 groups"),
            ),
            (
                Places {
                    sharding_group_size: Some(2),
                    replica_group_size: Some(2),
                    ..hybrid()
                },
                Err("2 groups of 2 are 4 models, there are 8"),
            ),
            (
                Places {
                    sharding_group_size: Some(0),
                    ..hybrid()
                },
                Err("between 1 and 64, or -1 for all, got 0"),
            ),
            (
                Places {
                    hsdp: Some(false),
                    ..hybrid()
                },
                Err("HYBRID_SHARD is of groups, hsdp=false is not"),
            ),
            (
                Places {
                    sharding_strategy: Some("NO_SHARD"),
                    hsdp: Some(true),
                    ..plain()
                },
                Err("NO_SHARD shares nothing"),
            ),
            (
                Places {
                    num_processes: Some(8),
                    data_parallel_size: Some(8),
                    tensor_parallel_size: Some(2),
                    ..plain()
                },
                Err("is 8, but data_parallel_size times tensor_parallel_size is 16"),
            ),
        ] {
            let found = Placing::read(&places).and_then(|placing| placing.on(&team(8, 4)));
            match (found, expected) {
                (Ok(mesh), expected) => assert_eq!(Ok(mesh), expected),
                (Err(error), Err(why)) => assert!(error.to_string().contains(why), "{error}"),
                (Err(error), Ok(_)) => panic!("{error}"),
            }
        }
    }
}
