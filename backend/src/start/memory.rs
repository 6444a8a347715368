//! How many KV blocks there are: decided once, at start, from what is free then. Not here: blocks' owners (core).

use std::fmt;
use std::fs;

use tandem_kernels::attention::BLOCK_SIZE;
use tandem_kernels::machine::gpu;
use tch::Device;

use crate::weights::LoadError;

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
    /// Of one block, all layers.
    pub block_bytes: usize,
}

impl KvDemand {
    /// `asked`: bytes the operator chose; `free`: what is free now.
    pub fn blocks(&self, asked: Option<u64>, free: Free) -> Result<u32, LoadError> {
        let KvDemand {
            max_num_seqs,
            max_model_len,
            block_bytes,
        } = *self;
        let of_one = u64::from(max_model_len).div_ceil(BLOCK_SIZE as u64);
        let block_bytes = block_bytes as u64;
        let all = of_one * u64::from(max_num_seqs);
        let share = |bytes: u64, share: f64| (bytes as f64 * share) as u64;
        let (room, whose) = match (asked, free) {
            (Some(asked), _) => (asked, "kv_cache_bytes"),
            (None, Free::Host(bytes)) => (share(bytes, KV_SHARE), "half of the free memory"),
            (None, Free::Gpu(bytes)) => (share(bytes, GPU_KV_SHARE), "80 % of the GPU's free memory"),
            (None, Free::Unknown) => (UNKNOWN_KV_BYTES, "the default for a device of unknown memory"),
        };
        let fit = room / block_bytes;
        if fit < of_one {
            return Err(LoadError::Option(format!(
                "the KV cache of one sequence of max_model_len {max_model_len} takes {}, {whose} is {}; \
                 choose max_model_len {} or less, or a larger kv_cache_bytes",
                gib(of_one * block_bytes),
                gib(room),
                fit * BLOCK_SIZE as u64,
            )));
        }
        let blocks = match asked {
            Some(_) => fit,
            None => fit.min(all),
        };
        Ok(u32::try_from(blocks).unwrap_or(u32::MAX - 1))
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
                    .and_then(|text| meminfo_available(&text));
                let least = [machine, cgroup_left()].into_iter().flatten().min();
                least.map_or(Free::Unknown, Free::Host)
            }
            Device::Cuda(index) => gpu::memory(index).map_or(Free::Unknown, |memory| Free::Gpu(memory.free)),
            _ => Free::Unknown,
        }
    }
}

fn meminfo_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// A container's limit (cgroup 2, then 1) minus what it uses; page cache that can be dropped counts as used, so this
/// is cautious.
fn cgroup_left() -> Option<u64> {
    let files = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ];
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    files
        .iter()
        .find_map(|(limit, used)| Some(number(limit)?.saturating_sub(number(used)?)))
}

/// Bytes for people.
pub fn gib(bytes: u64) -> impl fmt::Display {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fit_what_is_there() {
        let demand = KvDemand {
            max_num_seqs: 4,
            max_model_len: 100,
            block_bytes: 1000,
        };
        let cases = [
            (None, Free::Host(1 << 30), Ok(16)),
            (None, Free::Host(20_000), Ok(10)),
            (None, Free::Host(7_000), Err("half of the free memory")),
            (None, Free::Gpu(10_000), Ok(8)),
            (Some(50_000), Free::Host(0), Ok(50)),
            (Some(3_999), Free::Unknown, Err("choose max_model_len 96 or less")),
            (None, Free::Unknown, Ok(16)),
        ];
        for (asked, free, expected) in cases {
            match (demand.blocks(asked, free), expected) {
                (Ok(blocks), Ok(expected)) => assert_eq!(blocks, expected),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (got, expected) => panic!("{got:?} instead of {expected:?}"),
            }
        }
        assert_eq!(
            meminfo_available("MemTotal: 9 kB\nMemAvailable:   1234 kB\n"),
            Some(1234 * 1024)
        );
    }
}
