//! What this machine can do. Of its CPU, asked once: not a dispatcher, each op reads [`features`] and chooses for itself.
//! Of its GPUs: whether libtorch can use them ([`gpu`]), and what the drivers show of AMD's ([`amd`]) and NVIDIA's ([`nvidia`]).

pub mod amd;
pub mod ceilings;
mod cores;
pub mod gpu;
pub mod nvidia;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tiles;

use std::fmt;
use std::sync::OnceLock;

pub use cores::compute_threads;

/// Ends the process as it is. The usual way runs libtorch's destructors, which take its tables from under threads that
/// still compute: they would die of it, loudly.
pub fn exit_at_once(code: i32) -> ! {
    // SAFETY: _exit takes any number, touches no memory of ours and does not return.
    unsafe { libc::_exit(code) }
}

/// Lets the allocator keep what is freed, up to the activations of a training step, which are freed and asked for again all the
/// time: each time given back to the system, their pages are faulted in and zeroed anew (a tenth of a step). Who is done with
/// much calls [`give_back_memory`].
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: two settings of glibc's allocator, which takes them at any time and from any thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// Gives what [`keep_freed_memory`] kept back to the system.
pub fn give_back_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: glibc's allocator looks through its own free memory, under its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Forces a lower instruction set: for tests and diagnosis.
pub const KERNELS_VARIABLE: &str = "TANDEM_CPU_KERNELS";

/// The instruction sets the fast paths are written for. All false off x86-64 and under
/// `TANDEM_CPU_KERNELS=reference` (tests, diagnosis): every op then runs its reference.
/// `TANDEM_CPU_KERNELS=avx512` hides AMX and `avx2` hides AVX-512 too, to test the narrower paths on a wider machine; `amx`
/// insists on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// AVX2 with FMA. A hypervisor may well hide AVX-512 on a CPU that has it, so this is a path of its own.
    pub avx2: bool,
    /// F with BW, DQ and VL: no CPU with BF16 or VNNI lacks them, so one name stands for all.
    pub avx512f: bool,
    /// BF16 beside VBMI, which looks levels of bytes up. Cooper Lake alone has the one without the other, and takes AVX2's path.
    pub avx512bf16: bool,
    pub avx512vnni: bool,
    /// Tiles with products of bfloat16, beside AVX-512 with BF16, and the system's permission to use them.
    pub amx: bool,
}

impl fmt::Display for Features {
    /// What the kernels are written in here.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match *self {
            Features { amx: true, .. } => "AMX with bfloat16, AVX-512",
            Features { avx512bf16: true, .. } => "AVX-512 with bfloat16 dot products",
            Features { avx512f: true, .. } => "AVX-512",
            Features { avx2: true, .. } => "AVX2",
            _ => "reference (libtorch): works, slower",
        })
    }
}

/// # Panics
/// When TANDEM_CPU_KERNELS is none of its words: see [`check_kernels`].
pub fn features() -> &'static Features {
    static FEATURES: OnceLock<Features> = OnceLock::new();
    FEATURES.get_or_init(|| asked().unwrap_or_else(|why| panic!("{why}")))
}

/// Refuses a mistyped TANDEM_CPU_KERNELS, and one that this processor cannot do: for a start, before anything computes.
pub fn check_kernels() -> Result<(), String> {
    asked().map(drop)
}

fn asked() -> Result<Features, String> {
    let word = std::env::var_os(KERNELS_VARIABLE).unwrap_or_default();
    choose(&word.to_string_lossy(), detect())
}

fn choose(word: &str, here: Features) -> Result<Features, String> {
    match word {
        // Compose sets a variable it has no value for to nothing.
        "" => Ok(here),
        "reference" => Ok(Features::default()),
        "avx2" if here.avx2 => Ok(Features {
            avx2: true,
            ..Features::default()
        }),
        "avx512" if here.avx512f => Ok(Features { amx: false, ..here }),
        "amx" if here.amx => Ok(here),
        "avx2" => Err(format!(
            "{KERNELS_VARIABLE} is avx2, and this processor has no AVX2 with FMA"
        )),
        "avx512" => Err(format!(
            "{KERNELS_VARIABLE} is avx512, and this processor has no AVX-512 (F, BW, DQ and VL)"
        )),
        "amx" => Err(format!(
            "{KERNELS_VARIABLE} is amx, and this processor has no AMX with bfloat16, or the system keeps it from programs"
        )),
        other => Err(format!(
            "{KERNELS_VARIABLE} is {other:?}: it takes amx, avx512, avx2 or reference, and unset it means the best there is"
        )),
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Features {
    use std::arch::is_x86_feature_detected as has;
    // No CPU with AVX2 lacks F16C.
    let avx2 = has!("avx2") && has!("fma") && has!("f16c");
    let avx512f = avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
    let avx512bf16 = avx512f && has!("avx512bf16") && has!("avx512vbmi");
    Features {
        avx2,
        avx512f,
        avx512bf16,
        avx512vnni: avx512f && has!("avx512vnni"),
        amx: avx512bf16 && tiles::permitted(),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Features {
    Features::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_chosen_by_words_that_exist() {
        let wide = Features {
            avx2: true,
            avx512f: true,
            avx512bf16: true,
            avx512vnni: true,
            amx: true,
        };
        let avx512 = Features { amx: false, ..wide };
        let avx2 = Features {
            avx2: true,
            ..Features::default()
        };
        for (word, here, expected) in [
            ("", wide, Ok(wide)),
            ("amx", wide, Ok(wide)),
            ("avx512", wide, Ok(avx512)),
            ("avx512", avx512, Ok(avx512)),
            ("avx2", wide, Ok(avx2)),
            ("amx", avx512, Err("no AMX")),
            ("avx512", avx2, Err("no AVX-512")),
            ("reference", wide, Ok(Features::default())),
            ("avx2", Features::default(), Err("no AVX2")),
            ("avx3", wide, Err("it takes amx, avx512, avx2 or reference")),
            ("Reference", wide, Err("it takes amx, avx512, avx2 or reference")),
        ] {
            match (choose(word, here), expected) {
                (Ok(got), Ok(expected)) => assert_eq!(got, expected, "{word:?}"),
                (Err(why), Err(part)) => assert!(why.contains(part), "{why}"),
                (got, expected) => panic!("{word:?}: {got:?}, expected {expected:?}"),
            }
        }
    }
}
