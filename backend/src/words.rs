//! Options as the words of a command line, so that who parses one needs no tensor type; and what this machine offers,
//! in words. Not here: defaults.

use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use tandem_core::job::JobSpec;
use tandem_core::sched::Lookup;
use tandem_kernels::attention::CacheDtype;
use tandem_kernels::gpu::{Lanes, emulate, emulating};
use tandem_kernels::machine::{self, amd, gpu, nvidia};
use tandem_kernels::pool;
use tandem_kernels::weight::{Precision, Recipe};
use tch::{Cuda, Device, Kind};

use crate::family::declared_kind;
use crate::model::WeightOptions;
use crate::ranks::Team;
use crate::start::memory::size;
use crate::start::{Dtype, Quantization};
use crate::train::mesh::Mesh;
use crate::train::run::RunOptions;
use crate::weights::{self, Checkpoint, LoadError, has_weights};

/// `auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:N` (under ROCm these are AMD's GPUs). An error where a GPU
/// may be meant and the program could not use any. `emu`, `emu:LANES`: from here on this process computes as on a GPU,
/// emulated ([`emulate`]).
pub fn device(word: &str) -> Result<Device, LoadError> {
    if let Some(lanes) = emulated_lanes(word)? {
        emulate(lanes);
        return Ok(Device::Cpu);
    }
    if word != "cpu" {
        gpu::gpu_check()?;
    }
    let count = || Cuda::device_count().max(0) as usize;
    let barred = || match gpu::flavour() {
        "rocm" => amd::barred(Path::new("/")),
        _ => None,
    };
    let index = match word {
        "auto" if !Cuda::is_available() => {
            return match barred() {
                None => Ok(Device::Cpu),
                Some(why) => Err(LoadError::Option(format!(
                    "device auto would be the CPU: {why}; --device cpu says that this is meant"
                ))),
            };
        }
        "cpu" => return Ok(Device::Cpu),
        "auto" | "cuda" => 0,
        other => {
            let index = other.strip_prefix("cuda:").and_then(|index| index.parse().ok());
            index.ok_or_else(|| {
                LoadError::Option(format!("device {other:?} is not auto, cpu, cuda:N or emu"))
            })?
        }
    };
    match index < count() {
        true => Ok(Device::Cuda(index)),
        false => Err(LoadError::Option(format!(
            "device {word}: libtorch sees {} GPUs{}",
            count(),
            barred().map_or_else(String::new, |why| format!("; {why}"))
        ))),
    }
}

/// The lanes of `emu` (AMD's matrix cores) and `emu:LANES`; `None` for another device.
fn emulated_lanes(word: &str) -> Result<Option<Lanes>, LoadError> {
    let Some(rest) = word.strip_prefix("emu") else {
        return Ok(None);
    };
    let lanes = match rest {
        "" => Ok(Lanes::Cdna),
        _ => rest.strip_prefix(':').unwrap_or(rest).parse(),
    };
    let named = lanes.map_err(|why| LoadError::Option(format!("device {word:?}: {why}")));
    named.map(Some)
}

/// As [`device`] takes it.
pub fn device_name(device: Device) -> String {
    match (device, emulating()) {
        (Device::Cpu, Some(lanes)) => format!("emu:{lanes}"),
        (Device::Cpu, None) => "cpu".to_owned(),
        (Device::Cuda(index), _) => format!("cuda:{index}"),
        (other, _) => format!("{other:?}").to_lowercase(),
    }
}

/// `kind`: `thread` or `mp`, else what suits the device. `program rank` becomes a rank of its own.
pub fn team(ranks: usize, kind: Option<&str>, device: Device, program: PathBuf) -> Result<Team, LoadError> {
    match kind {
        _ if ranks == 1 => Ok(Team::Threads(1)),
        Some("thread") => Ok(Team::Threads(ranks)),
        None if device == Device::Cpu => Ok(Team::Threads(ranks)),
        None | Some("mp") => Ok(Team::Processes {
            world: ranks,
            program,
        }),
        Some(other) => Err(LoadError::Option(format!(
            "ranks as {other:?} are unknown: thread and mp are known"
        ))),
    }
}

impl FromStr for Dtype {
    type Err = LoadError;

    fn from_str(word: &str) -> Result<Dtype, LoadError> {
        match word {
            "auto" => Ok(Dtype::Auto),
            // There is one kind of 16 bits.
            "bfloat16" | "bf16" | "half" | "float16" | "fp16" | "f16" => Ok(Dtype::Bf16),
            "float32" | "fp32" | "float" | "f32" => Ok(Dtype::F32),
            other => Err(LoadError::Option(format!(
                "dtype {other:?} is not auto, bfloat16 (half, float16) or float32 (float)"
            ))),
        }
    }
}

/// vLLM's `--kv-cache-dtype`. None: what weights are multiplied in.
pub fn kv_cache_dtype(word: &str) -> Result<Option<CacheDtype>, LoadError> {
    if word == CacheDtype::Int8.name() {
        return Ok(Some(CacheDtype::Int8));
    }
    match word.parse() {
        Ok(Dtype::Auto) => Ok(None),
        Ok(Dtype::Bf16) => Ok(Some(CacheDtype::Bf16)),
        Ok(Dtype::F32) => Ok(Some(CacheDtype::F32)),
        Err(_) => Err(LoadError::Option(format!(
            "kv_cache_dtype {word:?} is not auto, bfloat16, float32 or int8, which is the one of 8 bits"
        ))),
    }
}

/// vLLM's `speculative_config`, a JSON object.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpeculativeConfig {
    method: Option<String>,
    /// Its older place, as "[ngram]".
    model: Option<String>,
    num_speculative_tokens: Option<usize>,
    prompt_lookup_max: Option<usize>,
    prompt_lookup_min: Option<usize>,
    disable_by_batch_size: Option<usize>,
}

/// vLLM's `--speculative-config`: only `ngram` is built.
pub fn speculative_config(json: &str) -> Result<Lookup, LoadError> {
    let bad = |message: String| LoadError::Option(format!("speculative_config: {message}"));
    let config: SpeculativeConfig = serde_json::from_str(json).map_err(|error| {
        bad(format!(
            "{error}; it is a JSON object as {{\"method\": \"ngram\", \"num_speculative_tokens\": 5, \"prompt_lookup_max\": 4, \
             \"prompt_lookup_min\": 2}}, with disable_by_batch_size if wanted"
        ))
    })?;
    let method = config.method.or(config.model).unwrap_or_default();
    if !["ngram", "[ngram]"].contains(&method.as_str()) {
        return Err(bad(format!("method {method:?} is not built, only \"ngram\" is")));
    }
    let between = |name: &str, value: usize, most: usize| match (1..=most).contains(&value) {
        true => Ok(value),
        false => Err(bad(format!("{name} must be between 1 and {most}, got {value}"))),
    };
    let tokens = config
        .num_speculative_tokens
        .ok_or_else(|| bad("num_speculative_tokens is missing: tokens to guess in a step".to_owned()))?;
    let max = config.prompt_lookup_max.or(config.prompt_lookup_min).unwrap_or(5);
    let min = config.prompt_lookup_min.unwrap_or(max);
    let lookup = Lookup {
        tokens: between("num_speculative_tokens", tokens, 64)?,
        max: between("prompt_lookup_max", max, 64)?,
        min: between("prompt_lookup_min", min, 64)?,
        max_sequences: config.disable_by_batch_size.unwrap_or(usize::MAX),
    };
    match lookup.min <= lookup.max {
        true => Ok(lookup),
        false => Err(bad(format!(
            "prompt_lookup_min {} is above prompt_lookup_max {}",
            lookup.min, lookup.max
        ))),
    }
}

impl FromStr for Quantization {
    type Err = LoadError;

    /// What is made here, and vLLM's names of what checkpoints are.
    fn from_str(word: &str) -> Result<Quantization, LoadError> {
        if let Some(recipe) = Recipe::ALL.into_iter().find(|recipe| recipe.name() == word) {
            return Ok(Quantization::Make(recipe));
        }
        let own = weights::QUANTIZATIONS.iter().find(|kind| {
            // A kernel of vLLM's for the same files.
            **kind == word || word.strip_suffix("_marlin") == Some(kind)
        });
        own.map(|kind| Quantization::OfCheckpoint((*kind).to_owned()))
            .ok_or_else(|| {
                LoadError::Option(format!(
                    "quantization {word:?} is not int8, int4 or nf4, which are made at the start, nor the kind of a \
                     quantised checkpoint: {}",
                    weights::QUANTIZATIONS.join(", ")
                ))
            })
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Quantization::Make(recipe) => recipe.name(),
            Quantization::OfCheckpoint(kind) => kind,
        })
    }
}

/// How a model's weights are held, and what they are stored in, or what config.json declares when there are none yet.
pub fn weights(
    model_folder: &Path,
    dtype: &str,
    quantization: Option<&str>,
    device: &str,
) -> Result<(WeightOptions, Kind), LoadError> {
    let quantization: Option<Quantization> = quantization.map(str::parse).transpose()?;
    let (save_kind, recipe) = match has_weights(model_folder) {
        true => {
            let checkpoint = Checkpoint::open(model_folder)?;
            let recipe = Quantization::recipe(quantization.as_ref(), &checkpoint)?;
            (checkpoint.main_kind(), recipe)
        }
        false => (declared_kind(model_folder)?, None),
    };
    let precision = match (dtype.parse()?, save_kind) {
        (Dtype::Bf16, _) | (Dtype::Auto, Kind::BFloat16 | Kind::Half) => Precision::Bf16,
        (Dtype::F32, _) | (Dtype::Auto, _) => Precision::F32,
    };
    let weights = WeightOptions {
        precision,
        recipe,
        device: self::device(device)?,
    };
    Ok((weights, save_kind))
}

impl RunOptions {
    /// Full training stores what the checkpoint was stored in.
    pub fn new(
        spec: JobSpec,
        model_folder: PathBuf,
        dtype: &str,
        quantization: Option<&str>,
        device: &str,
        team: Team,
    ) -> Result<RunOptions, LoadError> {
        let (weights, save_kind) = weights(&model_folder, dtype, quantization, device)?;
        Ok(RunOptions {
            spec,
            model_folder,
            weights,
            save_kind,
            team,
            mesh: Mesh::PLAIN,
            profile: None,
        })
    }
}

/// For `tandem doctor`: one fact a line.
pub fn report() -> String {
    let machine::Features {
        avx2,
        avx512f,
        avx512bf16,
        avx512vnni,
        amx,
    } = *machine::features();
    let mut text = String::new();
    let mut say =
        |name: &str, value: String| writeln!(text, "{name:<22} {value}").expect("a String takes any text");
    let yes = |has: bool| if has { "yes" } else { "no" }.to_owned();
    say(
        "processors",
        std::thread::available_parallelism().map_or_else(|_| "unknown".to_owned(), |n| n.to_string()),
    );
    say("physical cores", machine::compute_threads().to_string());
    say("compute threads", pool::threads().to_string());
    say("avx2", yes(avx2));
    say("avx512", yes(avx512f));
    say("avx512-bf16", yes(avx512bf16));
    say("avx512-vnni", yes(avx512vnni));
    say("amx-bf16", yes(amx));
    say("libtorch built for", gpu::flavour().to_owned());
    let registered = match gpu::gpu_check() {
        Ok(()) => yes(gpu::registered()),
        Err(error) => error.to_string(),
    };
    say("GPU backend", registered);
    say("GPUs seen by libtorch", Cuda::device_count().to_string());
    for gpu in amd::gpus(Path::new("/")) {
        say(&format!("AMD GPU {}", gpu.index), amd_gpu(&gpu));
    }
    if let Some(why) = amd::barred(Path::new("/")) {
        say("AMD GPUs", format!("cannot be used: {why}"));
    }
    for gpu in nvidia::gpus() {
        say(&format!("NVIDIA GPU {}", gpu.index), nvidia_gpu(&gpu));
    }
    let kernels = |index: usize| match tandem_kernels::gpu::report(index) {
        Ok(kernels) => kernels,
        Err(why) => format!("libtorch's ops: {why}"),
    };
    match Cuda::device_count().max(0) as usize {
        0 => say(
            "GPU kernels",
            format!("embedded for {}", tandem_kernels::gpu::architectures().join(", ")),
        ),
        count => (0..count).for_each(|index| say(&format!("kernels of GPU {index}"), kernels(index))),
    }
    say("sums over GPUs", gpu::sums());
    say("CPU kernels", machine::features().to_string());
    text
}

/// What is known, nothing about what is not.
fn amd_gpu(gpu: &amd::Gpu) -> String {
    let amd::Gpu {
        index: _,
        gfx,
        name,
        wave,
        xcc,
        hive,
        render_minor,
        compute_partition,
        memory_partition,
        numa_node,
        vram_total_bytes,
        vram_used_bytes,
        busy_percent,
        power_watts,
        temperature_celsius,
    } = gpu;
    let partitions: Vec<&str> = [compute_partition, memory_partition]
        .into_iter()
        .flatten()
        .map(String::as_str)
        .collect();
    let facts = [
        name.clone(),
        Some(gfx.clone()),
        memory(*vram_total_bytes, *vram_used_bytes),
        busy_percent.map(|percent| format!("{percent} % busy")),
        (!partitions.is_empty()).then(|| partitions.join("/")),
        wave.map(|threads| format!("wave {threads}")),
        xcc.map(|dies| format!("{dies} XCC")),
        numa_node.map(|node| format!("NUMA node {node}")),
        hive.map(|hive| format!("XGMI {hive:x}")),
        power_watts.map(|watts| format!("{watts:.0} W")),
        temperature_celsius.map(|celsius| format!("{celsius:.0} °C")),
        render_minor.map(|minor| format!("/dev/dri/renderD{minor}")),
    ];
    facts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn memory(total: Option<u64>, used: Option<u64>) -> Option<String> {
    total.map(|total| match used {
        Some(used) => format!("{} of {} used", size(used), size(total)),
        None => size(total),
    })
}

fn nvidia_gpu(gpu: &nvidia::Gpu) -> String {
    let nvidia::Gpu {
        index: _,
        name,
        architecture,
        memory_bytes,
        memory_used_bytes,
        busy_percent,
        power_watts,
        temperature_celsius,
    } = gpu;
    let facts = [
        name.clone(),
        architecture.clone(),
        memory(*memory_bytes, *memory_used_bytes),
        busy_percent.map(|percent| format!("{percent} % busy")),
        power_watts.map(|watts| format!("{watts:.0} W")),
        temperature_celsius.map(|celsius| format!("{celsius:.0} °C")),
    ];
    facts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nvidias_gpus_are_told_as_well() {
        let gpu = nvidia::Gpu {
            name: Some("NVIDIA H200".to_owned()),
            architecture: Some("sm_90".to_owned()),
            memory_bytes: Some(141 << 30),
            busy_percent: Some(3),
            ..nvidia::Gpu::default()
        };
        assert_eq!(nvidia_gpu(&gpu), "NVIDIA H200, sm_90, 141 GiB, 3 % busy");
        assert!(report().lines().any(|line| line.starts_with("sums over GPUs")));
    }

    #[test]
    fn a_gpu_is_told_by_what_is_known_of_it() {
        let little = amd::Gpu {
            gfx: "gfx1100".to_owned(),
            ..amd::Gpu::default()
        };
        assert_eq!(amd_gpu(&little), "gfx1100");
        let more = amd::Gpu {
            name: Some("AMD Instinct MI300X OAM".to_owned()),
            vram_total_bytes: Some(192 << 30),
            vram_used_bytes: Some(3 << 29),
            compute_partition: Some("SPX".to_owned()),
            memory_partition: Some("NPS1".to_owned()),
            numa_node: Some(1),
            ..little
        };
        assert_eq!(
            amd_gpu(&more),
            "AMD Instinct MI300X OAM, gfx1100, 1.50 GiB of 192 GiB used, SPX/NPS1, NUMA node 1"
        );
    }
}
