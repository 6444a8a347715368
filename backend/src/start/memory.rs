//! How many KV blocks there are: decided once, at start, from what is free then. Not here: blocks' owners (core).

use std::fmt;
use std::fs;

use tandem_kernels::attention::BLOCK_SIZE;
use tch::Device;

use crate::weights::LoadError;

/// Of the memory that is free after the weights are loaded, the most the KV cache takes by itself. The rest is for
/// activations, adapters, a fine-tuning job and the page cache.
const KV_SHARE: f64 = 0.5;
/// libtorch does not say how much memory a GPU has left; this is what the cache takes there unless told.
const GPU_KV_BYTES: u64 = 8 << 30;

/// What the options and the model ask of the cache.
pub struct KvDemand {
    pub max_num_seqs: u32,
    pub max_model_len: u32,
    /// Of one block, all layers.
    pub block_bytes: usize,
}

impl KvDemand {
    /// `asked`: bytes the operator chose; `available`: bytes free now, if known.
    pub fn blocks(&self, asked: Option<u64>, available: Option<u64>) -> Result<u32, LoadError> {
        let KvDemand {
            max_num_seqs,
            max_model_len,
            block_bytes,
        } = *self;
        let of_one = u64::from(max_model_len).div_ceil(BLOCK_SIZE as u64);
        let block_bytes = block_bytes as u64;
        let all = of_one * u64::from(max_num_seqs);
        let (room, whose) = match (asked, available) {
            (Some(asked), _) => (asked, "kv_cache_bytes"),
            (None, Some(available)) => ((available as f64 * KV_SHARE) as u64, "half of the free memory"),
            (None, None) => (GPU_KV_BYTES, "the default for a device of unknown memory"),
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

/// Memory this process may still take, or `None` where nobody says.
pub fn available_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => {
            let machine = fs::read_to_string("/proc/meminfo")
                .ok()
                .and_then(|text| meminfo_available(&text));
            [machine, cgroup_left()].into_iter().flatten().min()
        }
        _ => None,
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
            (None, Some(1 << 30), Ok(16)),
            (None, Some(20_000), Ok(10)),
            (None, Some(7_000), Err("half of the free memory")),
            (Some(50_000), Some(0), Ok(50)),
            (Some(3_999), None, Err("choose max_model_len 96 or less")),
            (None, None, Ok(16)),
        ];
        for (asked, available, expected) in cases {
            match (demand.blocks(asked, available), expected) {
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
