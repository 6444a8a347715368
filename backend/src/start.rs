//! From a model folder and options to a running replica: loads, plans memory once, starts the engine thread. Not here:
//! command lines (server), what the thread does (engine).

pub(crate) mod memory;
pub(crate) mod progress;
pub(crate) mod selftest;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};

use tandem_core::blocks::BlockPool;
use tandem_core::grammar::Vocabulary;
use tandem_core::replica::{COMMAND_QUEUE, ReplicaHandle, ReplicaInfo};
use tandem_core::rng;
use tandem_core::sched::{Limits, Lookup, Scheduler};
use tandem_core::stats::Stats;
use tandem_kernels::attention::{self, BLOCK_SIZE, CacheDtype};
use tandem_kernels::comm::Comm;
use tandem_kernels::gpu::emulating;
use tandem_kernels::weight::{self, Format, Precision, Recipe};
use tandem_kernels::{machine, pool};
use tch::{Device, Kind};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use crate::bank::AdapterBank;
use crate::engine::{Engine, Parts};
use crate::family::shard::{Layout, Shard};
use crate::family::{self, AttnSpec, DecoderSpec, LayerGroups, Param, ParamId, read_spec};
use crate::grammars::Grammars;
use crate::guard;
use crate::lora::params::AdapterShape;
use crate::model::Decoder;
use crate::pace::{self, Pace};
use crate::ranks::{self, Assembled, Followers, Plan, Ready, Team};
use crate::thoughts::Thoughts;
use crate::weights::{Checkpoint, LoadError};
use crate::words::device_name;
use memory::{Free, MemoryPlan, size};

/// Prompt tokens in a step that also continues streams. On a CPU a step's time grows with its tokens, and a quarter
/// of the whole step already multiplies at 85 % of the machine's rate: small keeps streams fluent, at little cost.
const CPU_PREFILL_BESIDE_DECODE: usize = 128;
/// Requests that may wait in the scheduler. The router's own admission is narrower.
const MAX_WAITING: usize = 4096;

#[derive(Clone, Debug)]
pub struct Options {
    pub model_folder: PathBuf,
    /// A file for the digests of weight files, so that the next start need not hash them.
    pub digests: Option<PathBuf>,
    pub device: Device,
    pub dtype: Dtype,
    pub quantization: Option<Quantization>,
    /// Default: what weights are multiplied in.
    pub kv_cache_dtype: Option<CacheDtype>,
    /// On a GPU: a row's bits do not depend on the rows beside it. On the CPU they never do.
    pub deterministic: bool,
    /// How tokens are guessed, if they are.
    pub lookup: Option<Lookup>,
    /// Default: what the checkpoint was made for.
    pub max_model_len: Option<ModelLen>,
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    /// Of each rank. Default: room for `max_num_seqs` whole sequences, within a share of the memory that is free.
    pub kv_cache_bytes: Option<u64>,
    pub max_loras: u32,
    pub max_lora_rank: u32,
    /// Fine-tuning jobs that train at once, as far as the memory allows.
    pub max_training_jobs: u32,
    /// Seconds fine-tuning jobs may take for each second of serving steps, while there are requests.
    pub training_share: f64,
    /// While streams only decode, training may also take what this leaves between two of their tokens.
    pub target_itl: Option<Duration>,
    /// Default: all cores.
    pub threads: Option<usize>,
    /// For requests that bring none. Default: another one at each start.
    pub seed: Option<u64>,
    pub team: Team,
    /// Without it, requests with a grammar are refused.
    pub vocabulary: Option<Arc<Vocabulary>>,
}

/// Tokens of prompt and answer together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelLen {
    Asked(u32),
    /// As many as the KV cache holds, at most what the checkpoint was made for.
    Fits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// As the checkpoint is stored: bf16 and f16 -> bf16, f32 -> f32.
    Auto,
    Bf16,
    F32,
}

/// How the linears of a model are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// Made at the start, of a checkpoint that is not quantised.
    Make(Recipe),
    /// As the checkpoint has them, which must be of this kind (`gptq`).
    OfCheckpoint(String),
}

impl Quantization {
    /// What is to be made of this checkpoint, if it is one that it can be made of.
    pub fn recipe(
        asked: Option<&Quantization>,
        checkpoint: &Checkpoint,
    ) -> Result<Option<Recipe>, LoadError> {
        match (asked, checkpoint.quantization()) {
            (None, _) => Ok(None),
            (Some(Quantization::Make(recipe)), None) => Ok(Some(*recipe)),
            (Some(Quantization::OfCheckpoint(kind)), Some(own)) if kind == own => Ok(None),
            (Some(Quantization::OfCheckpoint(kind)), None) => Err(LoadError::Option(format!(
                "--quantization {kind}: the checkpoint is not quantised; int8, int4 and nf4 can be made of it"
            ))),
            (Some(asked), Some(own)) => Err(LoadError::Option(format!(
                "--quantization {asked}: the checkpoint is quantised already ({own}); leave the option out"
            ))),
        }
    }
}

impl Options {
    /// The defaults for a CPU.
    pub fn new(model_folder: PathBuf) -> Options {
        Options {
            model_folder,
            digests: None,
            device: Device::Cpu,
            dtype: Dtype::Auto,
            quantization: None,
            kv_cache_dtype: None,
            deterministic: false,
            lookup: None,
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            kv_cache_bytes: None,
            max_loras: 16,
            max_lora_rank: 64,
            max_training_jobs: 4,
            training_share: pace::SHARE,
            target_itl: None,
            threads: None,
            seed: None,
            team: Team::Threads(1),
            vocabulary: None,
        }
    }
}

/// Loads the model and starts its engine thread, and the other ranks where there are some; returns when it answers. The
/// thread ends with `Command::Stop`, with the last handle, or with a rank; the handle's `stats` channel closes then.
pub fn start(options: Options) -> Result<ReplicaHandle, LoadError> {
    let (ready, loaded) = std_mpsc::channel();
    // The engine's thread loads, too: memory is touched first, and thread pools are made, where they are used.
    let thread = std::thread::Builder::new().name("tandem-engine".to_owned());
    let engine = move || match assemble(options) {
        Ok((engine, handle, followers)) => {
            match ready.send(Ok(handle)) {
                Ok(()) => engine.run(),
                Err(_) => drop(engine),
            }
            // They end with the engine's end of the group, and are waited for.
            drop(followers);
        }
        Err(error) => drop(ready.send(Err(error))),
    };
    thread
        .spawn(engine)
        .map_err(|error| LoadError::Option(format!("cannot start the engine's thread: {error}")))?;
    let died = |_| {
        Err(LoadError::Option(
            "the engine's thread died while it loaded the model".to_owned(),
        ))
    };
    loaded.recv().unwrap_or_else(died)
}

fn assemble(options: Options) -> Result<(Engine, ReplicaHandle, Followers), LoadError> {
    check(&options)?;
    let spec = read_spec(&options.model_folder)?;
    let world = options.team.world();
    // Before anybody is started.
    Layout::new(&spec, Shard { rank: 0, world })?;
    let Assembled {
        comm,
        device,
        local_world,
        followers,
    } = ranks::gather(&options.team, options.device, options.threads)?;
    // What the others miss is a panic of a collective here.
    let loaded = guard::torch(|| load(&options, device, local_world, comm));
    let (engine, handle) = loaded.map_err(|fault| LoadError::Lost(fault.message))??;
    Ok((engine, handle, followers))
}

fn load(
    options: &Options,
    device: Device,
    local_world: usize,
    comm: Comm,
) -> Result<(Engine, ReplicaHandle), LoadError> {
    let began = Instant::now();
    let Options {
        model_folder,
        digests,
        device: _,
        dtype,
        quantization,
        kv_cache_dtype,
        deterministic,
        lookup,
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens,
        kv_cache_bytes,
        max_loras,
        max_lora_rank,
        max_training_jobs,
        training_share,
        target_itl,
        threads: _,
        seed,
        team,
        vocabulary,
    } = options.clone();
    let (spec, checkpoint) = family::open(&model_folder)?;
    for note in &spec.notes {
        warn!(model = %model_folder.display(), "{note}");
    }
    let precision = match (dtype, checkpoint.main_kind()) {
        (Dtype::Bf16, _) | (Dtype::Auto, Kind::BFloat16 | Kind::Half) => Precision::Bf16,
        (Dtype::F32, _) | (Dtype::Auto, _) => Precision::F32,
    };
    let is_shorter_if_need_be = !matches!(max_model_len, Some(ModelLen::Asked(_)));
    let max_model_len = context_length(max_model_len, &spec)?;
    let recipe = Quantization::recipe(quantization.as_ref(), &checkpoint)?;
    let plan = Plan {
        model_folder,
        bf16: precision == Precision::Bf16,
        recipe: recipe.map(|recipe| recipe.name().to_owned()),
        kv_cache_dtype: kv_cache_dtype.unwrap_or(precision.into()).name().to_owned(),
        deterministic,
        max_num_seqs,
        max_model_len,
        max_num_batched_tokens,
        is_shorter_if_need_be,
        kv_cache_bytes,
    };
    let Ready {
        decoder,
        cache,
        base_digest,
        blocks,
        weight_bytes,
    } = ranks::lead(&plan, spec, &checkpoint, device, local_world, digests, comm)?;
    let Plan { model_folder, .. } = plan;
    let layers = LayerGroups::of(&decoder.spec);
    let groups = layers.blocks(max_num_batched_tokens as usize);
    let room = u32::try_from(groups.longest(blocks as usize)).unwrap_or(u32::MAX);
    if room < max_model_len {
        warn!(
            made_for = max_model_len,
            max_model_len = room,
            kv_cache = %size((cache.bytes() * team.world()) as u64),
            "the KV cache does not hold one sequence as long as the model was made for, so sequences are shorter; a larger \
             --kv-cache-memory-bytes, fewer or smaller weights or more memory would hold it"
        );
    }
    let max_model_len = max_model_len.min(room);
    let kv_tokens = groups.capacity(blocks as usize, max_model_len as usize);

    let limits = Limits {
        max_num_seqs: max_num_seqs as usize,
        max_num_batched_tokens: max_num_batched_tokens as usize,
        max_prefill_beside_decode: match device {
            Device::Cpu => CPU_PREFILL_BESIDE_DECODE.min(max_num_batched_tokens as usize),
            _ => max_num_batched_tokens as usize,
        },
        max_waiting: MAX_WAITING,
        max_model_len: max_model_len as usize,
        lookup,
    };
    let scheduler = Scheduler::new(limits, BlockPool::new(blocks, groups));
    warn_of_slow_paths(&decoder);
    warn_of_unpacked(&decoder, &checkpoint);
    let bank = AdapterBank::new(
        max_loras as usize,
        max_lora_rank,
        decoder.fit(),
        model_folder.clone(),
    );
    let (commands, inbox) = mpsc::channel(COMMAND_QUEUE);
    let (stats, published) = watch::channel(Stats::default());
    let info = ReplicaInfo {
        model_folder,
        base_digest,
        vocab_size: decoder.spec.vocab as u32,
        hidden_size: decoder.spec.hidden as u32,
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens,
        dtype: stored_as(&decoder, cache.dtype()),
        device: device_name(device),
        tensor_parallel_size: team.world() as u32,
        parameters: decoder.parameters(),
        weight_bytes,
        kv_blocks: blocks,
        block_size: BLOCK_SIZE as u32,
        kv_tokens,
        kv_bytes: (cache.bytes() * team.world()) as u64,
        max_loras,
        max_lora_rank,
        max_training_jobs,
        lora_targets: decoder.spec.lora_targets(),
        lora_sizes: AdapterShape::sizes(&decoder.spec),
        eos_tokens: decoder.spec.eos_tokens.clone(),
        grammars: vocabulary.is_some(),
    };
    info!(
        model = %info.model_folder.display(),
        parameters = info.parameters,
        dtype = info.dtype,
        device = info.device,
        ranks = info.tensor_parallel_size,
        threads = pool::threads(),
        cpu_kernels = %machine::features(),
        weights = %by_format(&decoder),
        kv_cache = %format!("{} in {}", size(info.kv_bytes), cache.dtype().name()),
        kv_tokens,
        load_ms = began.elapsed().as_millis() as u64,
        "replica ready"
    );
    let plan = MemoryPlan {
        weights: info.weight_bytes,
        kv_cache: info.kv_bytes,
        kv_tokens,
        kv_groups: layers.shown(),
        max_loras,
        max_lora_rank,
        tokens: max_num_batched_tokens as usize,
        sequences: max_num_seqs as usize,
        free: Free::on(device),
    };
    info!("memory:\n{}", plan.shown(&decoder));
    let seed = seed.unwrap_or_else(random_seed);
    let thoughts = Thoughts::new(vocabulary.clone());
    let grammars = Grammars::new(vocabulary, &decoder.spec.eos_tokens);
    let engine = Engine::new(Parts {
        decoder,
        cache,
        scheduler,
        bank,
        grammars,
        thoughts,
        pace: Pace::new(training_share, target_itl),
        max_training_jobs: max_training_jobs as usize,
        commands: inbox,
        stats,
        seed,
    });
    Ok((
        engine,
        ReplicaHandle {
            info,
            commands,
            stats: published,
        },
    ))
}

fn check(options: &Options) -> Result<(), LoadError> {
    let Options {
        max_num_seqs,
        max_num_batched_tokens,
        max_loras,
        max_lora_rank,
        max_training_jobs,
        training_share,
        threads,
        ..
    } = options;
    if !training_share.is_finite() || *training_share <= 0.0 {
        let message = format!("training_share must be above 0, got {training_share}");
        return Err(LoadError::Option(message));
    }
    let at_least_one = [
        ("max_num_seqs", u64::from(*max_num_seqs)),
        ("max_num_batched_tokens", u64::from(*max_num_batched_tokens)),
        ("max_loras", u64::from(*max_loras)),
        ("max_lora_rank", u64::from(*max_lora_rank)),
        ("max_training_jobs", u64::from(*max_training_jobs)),
        ("threads", threads.unwrap_or(1) as u64),
    ];
    match at_least_one.into_iter().find(|(_, value)| *value == 0) {
        Some((name, _)) => Err(LoadError::Option(format!("{name} must be at least 1, got 0"))),
        None => Ok(()),
    }
}

fn context_length(asked: Option<ModelLen>, spec: &DecoderSpec) -> Result<u32, LoadError> {
    let made_for = u32::try_from(spec.max_positions).expect("config.json's sizes are below 2^31");
    match asked {
        Some(ModelLen::Asked(0)) => Err(LoadError::Option(
            "max_model_len must be at least 1, got 0".to_owned(),
        )),
        Some(ModelLen::Asked(asked)) if asked > made_for => {
            let message =
                format!("max_model_len {asked} exceeds the {made_for} positions the model was made for");
            Err(LoadError::Option(message))
        }
        Some(ModelLen::Asked(asked)) => Ok(asked),
        Some(ModelLen::Fits) | None => Ok(made_for),
    }
}

/// One compute pool, for the thread that computes: it is to call this first. OpenMP, libtorch's own, only where our
/// kernels cannot run: its regions and ours on the same few cores cost a scheduling quantum whenever one waits for a
/// core (a fifth of a training step went into its spinning). `None`: all cores.
pub fn set_threads(device: Device, threads: Option<usize>) {
    if let Some(threads) = threads {
        pool::set_threads(threads);
    }
    if device == Device::Cpu {
        machine::keep_freed_memory();
    }
    let ours = device == Device::Cpu
        && emulating().is_none()
        && *machine::features() != machine::Features::default();
    tch::set_num_threads(if ours { 1 } else { pool::threads() as i32 });
}

/// What computes slower than it should says so once.
fn warn_of_slow_paths(decoder: &Decoder) {
    let (device, precision) = (decoder.device(), decoder.precision());
    let odd = |attn: &&AttnSpec| !attention::has_kernels(attn.head_dim as usize);
    let odd = decoder.spec.attentions().find(odd).map(|attn| attn.head_dim);
    if let Some(lanes) = emulating() {
        warn!(
            %lanes,
            "an emulated GPU: our GPU kernels run on the CPU, a thread at a time, and all else on libtorch's ops; for tests, \
             hundreds of times slower than the CPU's own kernels"
        );
        return;
    }
    if let Device::Cuda(index) = device {
        match tandem_kernels::gpu::report(index) {
            Ok(kernels) => info!(kernels, "GPU kernels"),
            Err(why) => warn!(
                why,
                "none of our kernels run on this GPU: libtorch's ops compute, several times slower"
            ),
        }
    }
    match device {
        Device::Cpu if *machine::features() == machine::Features::default() => warn!(
            "no kernels of our own run here (they want AVX2 with FMA, and TANDEM_CPU_KERNELS not to be reference): \
             libtorch's ops compute, several times slower, and an answer's last bits depend on what is beside it"
        ),
        Device::Cpu if odd.is_some() => warn!(
            head_dim = odd,
            "attention runs on libtorch's ops, its kernels take head dimensions that are multiples of 16: it is slower, \
             and an answer's last bits depend on what is beside it"
        ),
        Device::Cuda(_) if precision == Precision::Bf16 && weight::widens(device) => warn!(
            "this libtorch has no product of bfloat16 with a float32 result: weights are widened at every call, \
             several times slower"
        ),
        _ => {}
    }
}

/// Says which linears the checkpoint stores in codes and that are kept as numbers, in more memory than its files take.
fn warn_of_unpacked(decoder: &Decoder, checkpoint: &Checkpoint) {
    let formats = decoder.linear_formats();
    let unpacked = |param: &&Param| match param.id {
        ParamId::Linear(id) => {
            matches!(formats.get(&id), Some(Format::F32 | Format::Bf16))
                && param
                    .tensors
                    .iter()
                    .any(|tensor| checkpoint.is_quantised(&tensor.name))
        }
        _ => false,
    };
    let params = decoder.spec.params();
    let unpacked: Vec<&Param> = params.iter().filter(unpacked).collect();
    if let Some(first) = unpacked.first() {
        warn!(
            linears = unpacked.len(),
            first = first.tensors[0].name,
            "stored in codes that are not multiplied as they lie (inputs grouped by an index, or several formats in one \
             product): kept as numbers, the same answers with more memory"
        );
    }
}

/// `bfloat16`, or `bfloat16 with weights in int8 by rows and a KV cache in int8`: replicas that differ in it answer
/// differently.
fn stored_as(decoder: &Decoder, cache: CacheDtype) -> String {
    let precision = match decoder.precision() {
        Precision::F32 => Format::F32,
        Precision::Bf16 => Format::Bf16,
    };
    let formats = decoder.formats().into_iter().map(|(format, _)| format);
    let quantised: Vec<String> = formats
        .filter(|format| *format != precision)
        .map(|format| format.to_string())
        .collect();
    let weights = (!quantised.is_empty()).then(|| format!("weights in {}", quantised.join(" and ")));
    let cache = (cache != decoder.precision().into()).then(|| format!("a KV cache in {}", cache.name()));
    let differing: Vec<String> = weights.into_iter().chain(cache).collect();
    match differing.is_empty() {
        true => precision.to_string(),
        false => format!("{precision} with {}", differing.join(" and ")),
    }
}

/// `60.8 MiB in int4 in groups of 32, 54.0 MiB in bfloat16`, of this rank.
fn by_format(decoder: &Decoder) -> String {
    let formats = decoder.formats().into_iter();
    let formats: Vec<String> = formats
        .map(|(format, bytes)| format!("{} in {format}", size(bytes)))
        .collect();
    formats.join(", ")
}

/// From the system's entropy, by way of the keys std draws for its hash maps.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    rng::bits(RandomState::new().hash_one("tandem"), 0, 0)
}
