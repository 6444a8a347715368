//! Whether this process may use the processor's tile registers (AMX).

use std::arch::x86_64::{__cpuid, __cpuid_count};

/// Whether there are tiles with products of bfloat16, and the system lets this process use them: Linux wants to be asked.
pub(crate) fn permitted() -> bool {
    const AMX_TILE: u32 = 1 << 24;
    const AMX_BF16: u32 = 1 << 22;
    // Leaf 7 is there where there is AVX2.
    let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (AMX_TILE | AMX_BF16) == AMX_TILE | AMX_BF16;
    has && ask()
}

#[cfg(target_os = "linux")]
fn ask() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: grants this process a part of the processor's state, or refuses; no memory is involved.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask() -> bool {
    false
}
