//! The C interface of `csrc/c10d.cpp`, made safe: a group of processes and its collectives, in libtorch's order of
//! summation. Not here: who may call when, what a failure means.

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr::NonNull;
use std::time::Duration;

use tch::{Device, Tensor};
use torch_sys::C_tensor;

/// What c10d said, in one line.
#[derive(Debug)]
pub(super) struct Failure(pub String);

/// Who meets where. See `tandem_c10d_join`.
pub(super) struct Invitation<'a> {
    pub host: &'a str,
    pub port: u16,
    pub store: StoreSide,
    /// Sets this meeting's keys apart.
    pub prefix: &'a str,
    pub rank: usize,
    pub world: usize,
    /// The address that the others reach us by.
    pub own_address: &'a str,
    pub device: Device,
    pub limit: Duration,
}

/// The store by which ranks find each other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum StoreSide {
    Serves,
    Asks,
}

pub(super) struct Group {
    raw: NonNull<RawGroup>,
}

#[repr(C)]
struct RawGroup {
    private: [u8; 0],
}

// SAFETY: the C++ group may be used from any thread, and from several: what they share is behind its mutex, and the
// groups of c10d lock for themselves.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

unsafe extern "C" {
    fn tandem_c10d_free(text: *mut c_char);
    fn tandem_c10d_join(
        host: *const c_char,
        port: u16,
        serves: c_int,
        prefix: *const c_char,
        rank: c_int,
        world: c_int,
        own_address: *const c_char,
        gpu: c_int,
        limit_ms: i64,
        out: *mut *mut RawGroup,
    ) -> *mut c_char;
    fn tandem_c10d_part(
        whole: *const RawGroup,
        prefix: *const c_char,
        rank: c_int,
        world: c_int,
        own_address: *const c_char,
        out: *mut *mut RawGroup,
    ) -> *mut c_char;
    fn tandem_c10d_set(group: *mut RawGroup, key: *const c_char, value: *const c_char) -> *mut c_char;
    fn tandem_c10d_get(group: *mut RawGroup, key: *const c_char, value: *mut *mut c_char) -> *mut c_char;
    fn tandem_c10d_all_reduce(group: *mut RawGroup, x: *const C_tensor) -> *mut c_char;
    fn tandem_c10d_all_gather(group: *mut RawGroup, out: *const C_tensor, x: *const C_tensor) -> *mut c_char;
    fn tandem_c10d_all_to_all(group: *mut RawGroup, out: *const C_tensor, x: *const C_tensor) -> *mut c_char;
    fn tandem_c10d_broadcast(group: *mut RawGroup, x: *const C_tensor, patient: c_int) -> *mut c_char;
    fn tandem_c10d_meet(group: *mut RawGroup) -> *mut c_char;
    fn tandem_c10d_check(group: *mut RawGroup) -> *mut c_char;
    fn tandem_c10d_give_up(group: *mut RawGroup, reason: *const c_char, last_word_ms: i64, may_begin: c_int);
    fn tandem_c10d_delete(group: *mut RawGroup);
}

impl Group {
    pub fn join(invitation: &Invitation) -> Result<Group, Failure> {
        let (host, prefix, own_address) = (
            text(invitation.host),
            text(invitation.prefix),
            text(invitation.own_address),
        );
        let gpu = match invitation.device {
            Device::Cuda(index) => index as c_int,
            _ => -1,
        };
        let mut raw = std::ptr::null_mut();
        // SAFETY: the strings live until the call returns; `raw` is written only on success.
        failure(unsafe {
            tandem_c10d_join(
                host.as_ptr(),
                invitation.port,
                c_int::from(invitation.store == StoreSide::Serves),
                prefix.as_ptr(),
                invitation.rank as c_int,
                invitation.world as c_int,
                own_address.as_ptr(),
                gpu,
                invitation.limit.as_millis() as i64,
                &mut raw,
            )
        })?;
        let raw = NonNull::new(raw).expect("a join without an error made a group");
        Ok(Group { raw })
    }

    /// A group of some of these ranks, this one as `rank` of `world`; all of them call, with the same `prefix`, which no other
    /// part of this group has.
    pub fn part(&self, prefix: &str, rank: usize, world: usize, own_address: &str) -> Result<Group, Failure> {
        let (prefix, own_address) = (text(prefix), text(own_address));
        let mut raw = std::ptr::null_mut();
        // SAFETY: a live group, strings that live until the call returns; `raw` is written only on success.
        failure(unsafe {
            tandem_c10d_part(
                self.raw.as_ptr(),
                prefix.as_ptr(),
                rank as c_int,
                world as c_int,
                own_address.as_ptr(),
                &mut raw,
            )
        })?;
        let raw = NonNull::new(raw).expect("a part without an error made a group");
        Ok(Group { raw })
    }

    /// Into the store, for every rank.
    pub fn set(&self, key: &str, value: &str) -> Result<(), Failure> {
        let (key, value) = (text(key), text(value));
        // SAFETY: a live group, strings that live until the call returns.
        failure(unsafe { tandem_c10d_set(self.raw.as_ptr(), key.as_ptr(), value.as_ptr()) })
    }

    /// Waits until some rank has set it.
    pub fn get(&self, key: &str) -> Result<String, Failure> {
        let key = text(key);
        let mut value = std::ptr::null_mut();
        // SAFETY: as in `set`; `value` is written only on success.
        failure(unsafe { tandem_c10d_get(self.raw.as_ptr(), key.as_ptr(), &mut value) })?;
        // SAFETY: a string of malloc, ours from here.
        unsafe { taken(value) }.ok_or_else(|| Failure("out of memory".to_owned()))
    }

    pub fn all_reduce(&self, x: &mut Tensor) -> Result<(), Failure> {
        // SAFETY: a live group and a live tensor.
        failure(unsafe { tandem_c10d_all_reduce(self.raw.as_ptr(), x.as_mut_ptr()) })
    }

    /// `out`: the world times as many elements as `x`, contiguous as it is.
    pub fn all_gather(&self, out: &mut Tensor, x: &Tensor) -> Result<(), Failure> {
        // SAFETY: a live group and live tensors; c10d checks their shapes.
        failure(unsafe { tandem_c10d_all_gather(self.raw.as_ptr(), out.as_mut_ptr(), x.as_ptr()) })
    }

    /// Part `r` of `x` (its first dimension in equal parts) to rank `r`; `out`, of the same shape, gets one of each.
    pub fn all_to_all(&self, out: &mut Tensor, x: &Tensor) -> Result<(), Failure> {
        // SAFETY: as above.
        failure(unsafe { tandem_c10d_all_to_all(self.raw.as_ptr(), out.as_mut_ptr(), x.as_ptr()) })
    }

    /// Rank 0's CPU tensor into everyone's, of the same shape.
    pub fn broadcast(&self, x: &mut Tensor, limit: Limit) -> Result<(), Failure> {
        let patient = c_int::from(limit == Limit::Life);
        // SAFETY: as above.
        failure(unsafe { tandem_c10d_broadcast(self.raw.as_ptr(), x.as_mut_ptr(), patient) })
    }

    /// Waits for every rank.
    pub fn meet(&self) -> Result<(), Failure> {
        // SAFETY: a live group.
        failure(unsafe { tandem_c10d_meet(self.raw.as_ptr()) })
    }

    pub fn check(&self) -> Result<(), Failure> {
        // SAFETY: a live group.
        failure(unsafe { tandem_c10d_check(self.raw.as_ptr()) })
    }

    /// From any thread: a collective fails with `reason`, but what was on its way still counts. What is said of an end
    /// gives way to what is said of a loss.
    pub fn give_up(&self, reason: &str, over: Over) {
        let reason = text(reason);
        let (last_word, may_begin) = match over {
            Over::Ended => (FAREWELL, 1),
            Over::Lost => (LAST_WORD, 0),
        };
        let last_word_ms = last_word.as_millis() as i64;
        // SAFETY: a live group, a string that lives until the call returns.
        unsafe { tandem_c10d_give_up(self.raw.as_ptr(), reason.as_ptr(), last_word_ms, may_begin) }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: made by join, deleted once.
        unsafe { tandem_c10d_delete(self.raw.as_ptr()) }
    }
}

/// Why a group is of no more use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    /// A rank went by itself after its last collective, which others may have yet to hear the end of, or even to enter.
    Ended,
    /// A collective fails at once.
    Lost,
}

/// How long a collective may still end after one of its ranks was lost.
const LAST_WORD: Duration = Duration::from_millis(250);
/// And after one has ended: on a busy machine that takes its time.
const FAREWELL: Duration = Duration::from_secs(10);

/// How long a rank waits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Limit {
    /// The meeting's time-out.
    Timeout,
    /// As long as all live.
    Life,
}

fn text(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).expect("no zero is left")
}

fn failure(error: *mut c_char) -> Result<(), Failure> {
    // SAFETY: null, or a string of malloc that is ours.
    match unsafe { taken(error) } {
        None => Ok(()),
        // A stack trace and the names of C++ functions follow.
        Some(error) => Err(Failure(
            error.lines().next().unwrap_or_default().trim().to_owned(),
        )),
    }
}

/// # Safety
/// Null, or a string that `tandem_c10d_free` frees, used no more after this.
unsafe fn taken(text: *mut c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: the caller's contract.
    let owned = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: as above.
    unsafe { tandem_c10d_free(text) };
    Some(owned)
}
