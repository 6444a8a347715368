//! What this machine can do. Of its CPU, asked once: not a dispatcher, each op reads [`features`] and chooses for itself.
//! Of its GPUs: whether libtorch can use them ([`gpu`]), and what the driver shows of AMD's ([`amd`]).

pub mod amd;
pub mod gpu;

use std::sync::OnceLock;

/// The instruction sets the fast paths are written for. All false off x86-64 and under
/// `TANDEM_CPU_KERNELS=reference` (tests, diagnosis): every op then runs its reference.
/// `TANDEM_CPU_KERNELS=avx2` hides AVX-512, to test the narrower paths on a wider machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// AVX2 with FMA. A hypervisor may well hide AVX-512 on a CPU that has it, so this is a path of its own.
    pub avx2: bool,
    /// F with BW, DQ and VL: no CPU with BF16 or VNNI lacks them, so one name stands for all.
    pub avx512f: bool,
    pub avx512bf16: bool,
    pub avx512vnni: bool,
}

pub fn features() -> &'static Features {
    static FEATURES: OnceLock<Features> = OnceLock::new();
    FEATURES.get_or_init(|| match std::env::var("TANDEM_CPU_KERNELS").as_deref() {
        Ok("reference") => Features::default(),
        Ok("avx2") => Features {
            avx2: detect().avx2,
            ..Features::default()
        },
        _ => detect(),
    })
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Features {
    use std::arch::is_x86_feature_detected as has;
    let avx2 = has!("avx2") && has!("fma");
    let avx512f = avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
    Features {
        avx2,
        avx512f,
        avx512bf16: avx512f && has!("avx512bf16"),
        avx512vnni: avx512f && has!("avx512vnni"),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Features {
    Features::default()
}
