//! How many KV blocks there are: decided once, at start, from what is free then. Not here: blocks' owners (core).

use std::fs;

use tandem_core::blocks::Groups;
use tandem_core::job::LM_HEAD;
use tandem_kernels::attention::BLOCK_SIZE;
use tandem_kernels::machine::gpu;
use tch::Device;

use crate::lora::params::AdapterShape;
use crate::model::Decoder;
use crate::train::memory::Memory;
use crate::train::slice::slice_tokens;
use crate::weights::{EMBED_PATH, LoadError};

/// Of the memory that is free after the weights are loaded, the most the KV cache takes by itself. The rest is for
/// activations, adapters, a fine-tuning job and the page cache.
const KV_SHARE: f64 = 0.5;
/// The same on a GPU, whose memory has no other tenants than these.
const GPU_KV_SHARE: f64 = 0.8;
/// What the cache takes where nobody says how much is free.
const UNKNOWN_KV_BYTES: u64 = 8 << 30;

/// What the options and the model ask of the cache.
pub struct KvDemand {
    pub max_num_seqs: u32,
    pub max_model_len: u32,
    /// Fewer tokens than `max_model_len` will do.
    pub is_shorter_if_need_be: bool,
    /// Of one block, all layers of a group.
    pub block_bytes: usize,
    /// Which blocks a sequence needs.
    pub groups: Groups,
}

impl KvDemand {
    /// `asked`: bytes the operator chose; `free`: what is free now.
    pub fn blocks(&self, asked: Option<u64>, free: Free) -> Result<u32, LoadError> {
        let KvDemand {
            max_num_seqs,
            max_model_len,
            is_shorter_if_need_be,
            block_bytes,
            ref groups,
        } = *self;
        let of_one = groups.most(max_model_len as usize) as u64;
        let of_shortest = groups.most(BLOCK_SIZE) as u64;
        let block_bytes = block_bytes as u64;
        let all = of_one * u64::from(max_num_seqs);
        let share = |bytes: u64, share: f64| (bytes as f64 * share) as u64;
        let (room, whose) = match (asked, free) {
            (Some(asked), _) => (asked, "--kv-cache-memory-bytes"),
            (None, Free::Host(bytes)) => (share(bytes, KV_SHARE), "half of the free memory"),
            (None, Free::Gpu(bytes)) => (share(bytes, GPU_KV_SHARE), "80 % of the GPU's free memory"),
            (None, Free::Unknown) => (UNKNOWN_KV_BYTES, "the default for a device of unknown memory"),
        };
        let fit = room / block_bytes;
        let needed = if is_shorter_if_need_be {
            of_shortest
        } else {
            of_one
        };
        if fit < needed {
            let advice = match fit < of_shortest {
                true => format!(
                    "not one block of {BLOCK_SIZE} tokens ({}) fits",
                    size(of_shortest * block_bytes)
                ),
                false => format!("choose --max-model-len {} or less", groups.longest(fit as usize)),
            };
            return Err(LoadError::Option(format!(
                "the KV cache of one sequence of --max-model-len {max_model_len} takes {}, {whose} is {}; {advice}, or \
                 give a larger --kv-cache-memory-bytes",
                size(of_one * block_bytes),
                size(room),
            )));
        }
        let blocks = match asked {
            Some(_) => fit,
            None => fit.min(all),
        };
        Ok(u32::try_from(blocks).unwrap_or(u32::MAX - 1))
    }
}

/// What a start is sure to take, before any weight is read: an operating system would rather end the process halfway than
/// say no. `kv_asked`: bytes the operator chose for the cache.
pub fn check_plan(weights: u64, kv_asked: Option<u64>, free: Free) -> Result<(), LoadError> {
    let (Free::Host(left) | Free::Gpu(left)) = free else {
        return Ok(());
    };
    let why = match kv_asked {
        _ if weights > left => {
            "stop what else takes memory, divide the model over more devices (--tensor-parallel-size), or take a smaller one"
        }
        Some(asked) if asked > left - weights => "ask for less, or leave that option out",
        _ => return Ok(()),
    };
    let asked = kv_asked.map(|asked| format!(" and --kv-cache-memory-bytes asks for {}", size(asked)));
    Err(LoadError::Option(format!(
        "the weights take {}{}, {} are free: {why}",
        size(weights),
        asked.unwrap_or_default(),
        size(left),
    )))
}

/// Where a replica's memory goes, for whoever starts it. What grows with use is given at its most.
pub struct MemoryPlan {
    /// Of all ranks, as the cache.
    pub weights: u64,
    pub kv_cache: u64,
    pub kv_tokens: u64,
    /// How layers share it, where they do not all see the same.
    pub kv_groups: Option<String>,
    pub max_loras: u32,
    pub max_lora_rank: u32,
    /// Of a step.
    pub tokens: usize,
    pub sequences: usize,
    /// With weights and cache in place.
    pub free: Free,
}

impl MemoryPlan {
    pub fn shown(&self, decoder: &Decoder) -> String {
        const FLOAT: u64 = 4;
        /// Of a job that does not say (`core::settings`).
        const RANK: u32 = 16;
        let MemoryPlan {
            weights,
            kv_cache,
            kv_tokens,
            ref kv_groups,
            max_loras,
            max_lora_rank,
            tokens,
            sequences,
            free,
        } = *self;
        let spec = &decoder.spec;
        let numbers = |rank: u32, is_adapted: fn(&str) -> bool| {
            let module = |path: &str, _: &str| is_adapted(path).then_some((i64::from(rank), 1.0));
            AdapterShape::build(spec, module).len() as u64
        };
        let value_bytes = decoder.precision().value_bytes() as u64;
        let adapters = u64::from(max_loras) * numbers(max_lora_rank, |_| true) * value_bytes;
        let slice = slice_tokens(decoder.device());
        let training = Memory::of_numbers(
            decoder,
            numbers(RANK, |path| ![LM_HEAD, EMBED_PATH].contains(&path)),
        );
        let widest = spec.linears().map(|(_, linear)| {
            let outputs: i64 = linear.parts.iter().map(|part| part.width()).sum();
            (linear.inputs + outputs) as u64
        });
        let row = 2 * spec.hidden as u64 + widest.max().unwrap_or(0);
        let workspace = FLOAT * (tokens as u64 * row + sequences as u64 * spec.vocab as u64);
        let left = match free {
            Free::Host(bytes) | Free::Gpu(bytes) => size(bytes),
            Free::Unknown => "unknown".to_owned(),
        };
        let held = match kv_groups {
            None => format!("{kv_tokens} tokens"),
            Some(groups) => format!("{kv_tokens} tokens; {groups}"),
        };
        let lines = [
            ("weights", size(weights), String::new()),
            ("KV cache", size(kv_cache), held),
            (
                "adapters",
                size(adapters),
                format!("at most: {max_loras} of rank {max_lora_rank} on every linear and the head"),
            ),
            (
                "training",
                size(training.numbers + training.activations),
                format!("about, while a job runs: rank {RANK}, {slice} tokens at once"),
            ),
            (
                "workspace",
                size(workspace),
                format!("about: a step of {tokens} tokens, the logits of {sequences} sequences"),
            ),
            ("free", left, "now, for the last three and the system".to_owned()),
        ];
        let lines = lines
            .map(|(name, bytes, what)| format!("  {name:<10} {bytes:>10}  {what}").trim_end().to_owned());
        lines.join("\n")
    }
}

/// Bytes this process may still take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Free {
    Host(u64),
    Gpu(u64),
    /// Nobody says.
    Unknown,
}

impl Free {
    /// What is left for each of the ranks that share it. (On GPUs every rank has its own.)
    pub fn share(self, ranks: usize) -> Free {
        match self {
            Free::Host(bytes) => Free::Host(bytes / ranks as u64),
            own => own,
        }
    }

    pub fn on(device: Device) -> Free {
        match device {
            Device::Cpu => {
                let machine = fs::read_to_string("/proc/meminfo")
                    .ok()
                    .and_then(|text| meminfo(&text, "MemAvailable:"));
                let least = [machine, cgroup_left()].into_iter().flatten().min();
                least.map_or(Free::Unknown, Free::Host)
            }
            Device::Cuda(index) => gpu::memory(index).map_or(Free::Unknown, |memory| Free::Gpu(memory.free)),
            _ => Free::Unknown,
        }
    }
}

fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// A container's limit (cgroup 2, then 1) minus what it uses. Page cache that was not read again is dropped first when
/// memory is needed (the model's own files are there), so it counts as free.
fn cgroup_left() -> Option<u64> {
    let groups = [
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "/sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ];
    groups.iter().find_map(|(group, limit, used, droppable)| {
        let text = |file: &str| fs::read_to_string(format!("{group}/{file}")).ok();
        let number = |file: &str| text(file)?.trim().parse::<u64>().ok();
        let (limit, used) = (number(limit)?, number(used)?);
        let stat = text("memory.stat").unwrap_or_default();
        let dropped = stat_value(&stat, droppable).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(dropped)))
    })
}

/// Of memory.stat: `inactive_file 4096`.
fn stat_value(stat: &str, name: &str) -> Option<u64> {
    let line = stat
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line?.trim().parse().ok()
}

/// Bytes for people: three digits in the unit that suits them.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let power = (0..UNITS.len() - 1)
        .find(|&power| bytes < 1 << (10 * (power + 1)))
        .unwrap_or(UNITS.len() - 1);
    let number = bytes as f64 / (1_u64 << (10 * power)) as f64;
    let decimals = match number {
        _ if power == 0 => 0,
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    format!("{number:.decimals$} {}", UNITS[power])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fit_what_is_there() {
        let demand = KvDemand {
            max_num_seqs: 4,
            max_model_len: 100,
            is_shorter_if_need_be: false,
            block_bytes: 1000,
            groups: Groups::one(BLOCK_SIZE),
        };
        let cases = [
            (None, Free::Host(1 << 30), Ok(16)),
            (None, Free::Host(20_000), Ok(10)),
            (None, Free::Host(7_000), Err("half of the free memory")),
            (None, Free::Gpu(10_000), Ok(8)),
            (Some(50_000), Free::Host(0), Ok(50)),
            (Some(50_000), Free::Unknown, Ok(50)),
            (
                Some(3_999),
                Free::Unknown,
                Err("choose --max-model-len 96 or less"),
            ),
            (Some(999), Free::Unknown, Err("not one block of 32 tokens")),
            (None, Free::Host(0), Err("not one block of 32 tokens")),
            (None, Free::Unknown, Ok(16)),
        ];
        for (asked, free, expected) in cases {
            match (demand.blocks(asked, free), expected) {
                (Ok(blocks), Ok(expected)) => assert_eq!(blocks, expected),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (got, expected) => panic!("{got:?} instead of {expected:?}"),
            }
        }
        let shorter = KvDemand {
            is_shorter_if_need_be: true,
            ..demand
        };
        assert_eq!(shorter.blocks(Some(3_999), Free::Unknown).ok(), Some(3));
        assert!(shorter.blocks(Some(999), Free::Unknown).is_err());
        // Four groups with a window of 8 tokens, steps of 8 tokens: 400 tokens take 13 blocks of one, 2 of each other.
        let windowed = KvDemand {
            max_model_len: 400,
            groups: Groups::new(BLOCK_SIZE, [vec![None], vec![Some(8); 4]].concat(), 8),
            is_shorter_if_need_be: false,
            ..shorter
        };
        assert_eq!(windowed.blocks(Some(21_000), Free::Unknown).ok(), Some(21));
        let advice = windowed
            .blocks(Some(20_999), Free::Unknown)
            .unwrap_err()
            .to_string();
        assert!(advice.contains("choose --max-model-len 384 or less"), "{advice}");
        for (bytes, expected) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (3_670_016, "3.50 MiB"),
            (5 << 29, "2.50 GiB"),
            (16 << 30, "16.0 GiB"),
            (500 << 30, "500 GiB"),
            (1 << 50, "1024 TiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
        for (weights, asked, free, expected) in [
            (1 << 33, None, Free::Host(1 << 33), None),
            (1 << 50, Some(1 << 50), Free::Unknown, None),
            (1 << 30, Some(1 << 30), Free::Gpu(2 << 30), None),
            (
                3 << 30,
                None,
                Free::Gpu(1 << 30),
                Some("the weights take 3.00 GiB, 1.00 GiB are free: stop"),
            ),
            (
                1 << 30,
                Some(100 << 40),
                Free::Host(8 << 30),
                Some(
                    "the weights take 1.00 GiB and --kv-cache-memory-bytes asks for 100 TiB, 8.00 GiB are free: ask for less",
                ),
            ),
        ] {
            let error = check_plan(weights, asked, free)
                .err()
                .map(|error| error.to_string());
            match expected {
                None => assert_eq!(error, None),
                Some(part) => assert!(
                    error.as_ref().is_some_and(|error| error.starts_with(part)),
                    "{error:?}"
                ),
            }
        }
        assert_eq!(
            stat_value("inactive_anon 7\ninactive_file 4096\n", "inactive_file"),
            Some(4096)
        );
        assert_eq!(
            meminfo("MemTotal: 9 kB\nMemAvailable:   1234 kB\n", "MemAvailable:"),
            Some(1234 * 1024)
        );
    }
}
