//! What all ranks do between meeting and serving: agree on what is loaded, each read its part, agree on the cache. Not
//! here: options (start), who started whom (team).

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tandem_core::id::Digest;
use tandem_kernels::attention::{CacheDtype, KvCache};
use tandem_kernels::comm::Comm;
use tandem_kernels::gpu;
use tandem_kernels::rope::{RopeScaling, RopeSpec};
use tandem_kernels::weight::{Precision, Recipe};
use tch::{Device, Kind, Tensor};
use tracing::info;

use super::{Errand, decode, encode};
use crate::family::shard::{Layout, Shard};
use crate::family::{DecoderSpec, LayerGroups};
use crate::model::{Decoder, WeightOptions, planned_bytes};
use crate::start::memory::{self, Free, KvDemand};
use crate::start::{progress, selftest};
use crate::weights::{Checkpoint, LoadError};

/// What rank 0 decides for all.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Ranks of the same machine read it; others have their own copy.
    pub model_folder: PathBuf,
    pub bf16: bool,
    /// What dense linears become, by its name.
    pub recipe: Option<String>,
    /// By its name.
    pub kv_cache_dtype: String,
    pub deterministic: bool,
    pub max_num_seqs: u32,
    pub max_model_len: u32,
    pub max_num_batched_tokens: u32,
    /// A cache that does not hold one sequence of `max_model_len` makes sequences shorter.
    pub is_shorter_if_need_be: bool,
    /// Of each rank.
    pub kv_cache_bytes: Option<u64>,
}

/// One rank, loaded.
pub struct Ready {
    pub decoder: Decoder,
    pub cache: KvCache,
    pub base_digest: Digest,
    pub blocks: u32,
    /// Of all ranks.
    pub weight_bytes: u64,
}

/// Where a rank computes.
pub(super) struct Place {
    pub device: Device,
    /// Ranks that share this machine's memory.
    pub local_world: usize,
    /// Where digests of weight files are kept.
    pub digests: Option<PathBuf>,
}

impl Plan {
    fn kv_cache_dtype(&self) -> CacheDtype {
        let named = |dtype: &CacheDtype| dtype.name() == self.kv_cache_dtype;
        let dtype = CacheDtype::ALL.into_iter().find(named);
        dtype.expect("rank 0 says a dtype that there is")
    }
}

/// How weights are held, of what travels.
pub(crate) fn weights(bf16: bool, recipe: Option<&str>, device: Device) -> WeightOptions {
    let named = |name: &str| Recipe::ALL.into_iter().find(|recipe| recipe.name() == name);
    WeightOptions {
        precision: match bf16 {
            true => Precision::Bf16,
            false => Precision::F32,
        },
        recipe: recipe.and_then(named),
        device,
    }
}

/// Rank 0's copy of a checkpoint is hashed by rank 0, another machine's by one of its ranks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Copy {
    SameAsRank0,
    Own,
}

/// Rank 0's side: says what is to be done, and does its part.
///
/// # Panics
/// When a rank is lost meanwhile.
pub fn lead(
    plan: &Plan,
    spec: DecoderSpec,
    checkpoint: &Checkpoint,
    device: Device,
    local_world: usize,
    digests: Option<PathBuf>,
    comm: Comm,
) -> Result<Ready, LoadError> {
    let place = Place {
        device,
        local_world,
        digests,
    };
    Errand::Serve(plan.clone()).announce(&comm);
    load(plan, spec, checkpoint, &place, Copy::Own, comm)
}

/// The same on every rank, in the same order.
pub(super) fn load(
    plan: &Plan,
    mut spec: DecoderSpec,
    checkpoint: &Checkpoint,
    place: &Place,
    copy: Copy,
    comm: Comm,
) -> Result<Ready, LoadError> {
    let began = Instant::now();
    let is_chosen_by_length = |rope: &RopeSpec| matches!(rope.scaling, RopeScaling::LongRope { .. });
    if spec.ropes.iter().any(is_chosen_by_length) {
        // Which of its factors turn goes by what is served.
        spec.max_positions = spec.max_positions.min(i64::from(plan.max_model_len));
    }
    let Place {
        device,
        local_world,
        ref digests,
    } = *place;
    let weights = weights(plan.bf16, plan.recipe.as_deref(), device);
    if device != Device::Cpu {
        selftest::run(device, &comm)?;
    }
    let shard = Shard {
        rank: comm.rank(),
        world: comm.world(),
    };
    let layout = Layout::new(&spec, shard)?;
    memory::check_plan(
        planned_bytes(&spec, &layout, weights, |name| checkpoint.quantised_bytes(name)),
        plan.kv_cache_bytes,
        Free::on(device).share(local_world),
    )?;
    // Ranks of this machine read all of it together; a part of it is read as it is reached.
    if comm.world() == local_world && copy == Copy::Own {
        checkpoint.read_ahead();
    }
    if plan.deterministic {
        gpu::be_deterministic();
    }
    let is_loaded = AtomicBool::new(false);
    let (decoder, own_digest) = std::thread::scope(|scope| {
        // Where it is not known it reads every byte once more, on another core than the one that packs them.
        let digest = (copy == Copy::Own).then(|| scope.spawn(|| checkpoint.digest(digests.as_deref())));
        let _watch = (comm.rank() == 0).then(|| progress::watch(scope, checkpoint, &is_loaded));
        let decoder = Decoder::from_checkpoint(spec, checkpoint, weights, comm.clone())?;
        let digest = digest.map(|digest| digest.join().expect("hashing does not panic"));
        Ok::<_, LoadError>((decoder, digest.transpose()?))
    })?;
    // Nobody waits for the others' disks with a limit.
    comm.meet();
    let base_digest = agreed(own_digest, &comm)?;
    let cache_shape = |blocks| decoder.layout().cache_shape(&decoder.spec, blocks);
    let demand = KvDemand {
        max_num_seqs: plan.max_num_seqs,
        max_model_len: plan.max_model_len,
        is_shorter_if_need_be: plan.is_shorter_if_need_be,
        block_bytes: cache_shape(1).block_bytes(plan.kv_cache_dtype()),
        groups: LayerGroups::of(&decoder.spec).blocks(plan.max_num_batched_tokens as usize),
    };
    let fit = demand.blocks(plan.kv_cache_bytes, Free::on(device).share(local_world))?;
    let ours = Tensor::from_slice(&[i64::from(fit), decoder.weight_bytes() as i64]).to_device(device);
    let all = comm.all_gather(&ours).to_device(Device::Cpu).to_kind(Kind::Int64); // [world, 2]
    let blocks = all.select(1, 0).min().int64_value(&[]) as u32;
    let weight_bytes = all.select(1, 1).sum(Kind::Int64).int64_value(&[]) as u64;
    let cache = KvCache::new(cache_shape(blocks as usize), plan.kv_cache_dtype(), device)?;
    if comm.world() > 1 {
        info!(
            rank = comm.rank(),
            ranks = comm.world(),
            ?device,
            weight_bytes = decoder.weight_bytes(),
            kv_bytes = cache.bytes(),
            load_ms = began.elapsed().as_millis() as u64,
            "rank ready"
        );
    }
    Ok(Ready {
        decoder,
        cache,
        base_digest,
        blocks,
        weight_bytes,
    })
}

/// Rank 0's digest, if this rank's copy is the same.
fn agreed(own: Option<Digest>, comm: &Comm) -> Result<Digest, LoadError> {
    let digest: Digest = match comm.rank() {
        0 => {
            let digest = own.expect("rank 0 hashes its copy");
            if comm.world() > 1 {
                comm.broadcast(encode(&digest));
            }
            digest
        }
        _ => decode(&comm.broadcast(vec![])),
    };
    if let Some(own) = own {
        is_rank_0s(own, digest, comm)?;
    }
    Ok(digest)
}

/// Whether this rank's copy of the model is rank 0's.
pub(crate) fn is_rank_0s(own: Digest, rank_0s: Digest, comm: &Comm) -> Result<(), LoadError> {
    match own == rank_0s {
        true => Ok(()),
        false => Err(LoadError::Option(format!(
            "rank {}'s copy of the model is {}, rank 0's is {}",
            comm.rank(),
            own.short(),
            rank_0s.short()
        ))),
    }
}

/// A folder as rank 0 named it, or this machine's own.
pub(super) fn folder<'a>(plan: &'a Plan, own: Option<&'a Path>) -> &'a Path {
    own.unwrap_or(&plan.model_folder)
}
