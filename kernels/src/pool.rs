//! The compute pool. Not a scheduler: one job at a time, its tasks claimed one by one from a counter, the caller
//! taking part. There is one pool for all callers, and one for each thread that took a share of the machine
//! ([`take_share`]: ranks that are threads, which would else fight for the one). No OpenMP stands behind any fast path: a region of it that loses a core waits for the whole quantum of
//! whoever took it (8 ms seen for a job of 0.6 ms). Here a thread that lost its core holds back the one task it claimed.
//!
//! Also home of the per-thread scratch buffers, so that a kernel allocates nothing per call.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::slice::{Pages, Plain};
use crate::{machine, simd};

/// How long an idle worker looks for the next job before it sleeps: the gap between two ops of a layer is shorter, and
/// waking a sleeper costs several microseconds, on the caller too.
const SPIN: Duration = Duration::from_micros(40);
/// How long a caller that has run out of tasks spins before it lets others have the core between looks.
const CALLER_SPIN: Duration = Duration::from_micros(100);

/// Threads of a job, the caller among them, from the next job on, of all callers without a share. Default:
/// [`machine::compute_threads`].
pub fn set_threads(threads: usize) {
    POOL.threads.store(threads.max(1), Relaxed);
}

/// Threads of a job of this caller.
pub fn threads() -> usize {
    let pool = MINE.get();
    match pool.threads.load(Relaxed) {
        0 => {
            let threads = machine::compute_threads();
            // Not over a concurrent set_threads.
            let _ = pool.threads.compare_exchange(0, threads, Relaxed, Relaxed);
            pool.threads.load(Relaxed)
        }
        threads => threads,
    }
}

/// From now on this thread's jobs run on the `index`-th of `of` equal parts of the machine's compute threads
/// ([`set_threads`]), at least on itself; the threads of other parts neither help nor hinder. For ranks that are threads
/// of one process: they compute at the same time and meet at every sum, so each needs its own threads. The part's
/// workers outlive the caller, for the next one that takes the same part.
pub fn take_share(index: usize, of: usize) {
    assert!(index < of, "share {index} of {of}");
    if of == 1 {
        return MINE.set(&POOL);
    }
    // Of the whole, also where a share is exchanged for another.
    MINE.set(&POOL);
    let threads = (threads() + index) / of;
    let mut shares = SHARES.lock().expect("nothing panics while it holds this lock");
    while shares.len() <= index {
        shares.push(Box::leak(Box::new(Pool::new())));
    }
    let share = shares[index];
    share.threads.store(threads.max(1), Relaxed);
    MINE.set(share);
}

/// From now on this thread's jobs run on itself alone: work behind the threads that serve leaves the pool to them.
pub fn stand_aside() {
    ALONE.set(true);
}

/// Runs `task(0) .. task(n_tasks - 1)`, in any order and on any thread, and returns when all are done. A panic of a task
/// is raised here once no task runs any more. Inside a task, or while another thread's job runs, tasks run inline.
pub fn for_each(n_tasks: usize, task: impl Fn(usize) + Sync) {
    if INSIDE.get() {
        return (0..n_tasks).for_each(task);
    }
    let inside = Inside::enter();
    let helpers = match ALONE.get() {
        true => 0,
        false => threads().min(n_tasks).saturating_sub(1),
    };
    if helpers == 0 {
        return (0..n_tasks).for_each(task);
    }
    let pool = MINE.get();
    let Ok(mut workers) = pool.workers.try_lock() else {
        return (0..n_tasks).for_each(task);
    };
    while workers.len() < helpers {
        let worker = spawn(pool, workers.len());
        workers.push(worker);
    }
    let epoch = pool.publish(&task, n_tasks, &workers[..helpers]);
    pool.work(epoch);
    drop(inside);
    pool.await_finished(n_tasks);
    drop(workers);
    let panic = pool.panic.lock().expect("held only to move a value").take();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

thread_local! {
    /// Whether this thread is inside a job, and runs those of its tasks inline.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// Whether this thread asks nobody for help ([`stand_aside`]).
    static ALONE: Cell<bool> = const { Cell::new(false) };
    /// The pool of this thread's jobs.
    static MINE: Cell<&'static Pool> = const { Cell::new(&POOL) };
}

/// This thread's part in a job.
struct Inside;

impl Inside {
    fn enter() -> Inside {
        INSIDE.set(true);
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(false);
        simd::rest();
    }
}

/// Of every thread that took no share.
static POOL: Pool = Pool::new();
/// By index. A pool, once made, stays.
static SHARES: Mutex<Vec<&'static Pool>> = Mutex::new(Vec::new());

struct Pool {
    /// 0 = not yet asked for.
    threads: AtomicUsize,
    /// Held by the caller for the length of its job.
    workers: Mutex<Vec<Worker>>,
    /// Job number << 32 | next unclaimed task. A claim is a compare-exchange on both, so a late worker can never claim
    /// from a job it did not look at.
    ticket: CacheLine<AtomicU64>,
    job: Job,
    /// Tasks done, of this job.
    finished: CacheLine<AtomicUsize>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// `next` while the fields of a job are being written: nothing can be claimed.
const CLOSED: u32 = u32::MAX;

/// Written between closing and opening a ticket. Each store is a Release and each load an Acquire: a worker that sees a
/// new field also sees the closed ticket before it, so its claim fails.
struct Job {
    call: AtomicPtr<()>,
    task: AtomicPtr<()>,
    n_tasks: AtomicUsize,
    /// Workers with an index below this take part.
    helpers: AtomicUsize,
}

#[repr(align(128))]
struct CacheLine<T>(T);

struct Worker {
    thread: Thread,
    asleep: Arc<AtomicBool>,
}

impl Pool {
    const fn new() -> Pool {
        Pool {
            threads: AtomicUsize::new(0),
            workers: Mutex::new(Vec::new()),
            ticket: CacheLine(AtomicU64::new(CLOSED as u64)),
            job: Job {
                call: AtomicPtr::new(std::ptr::null_mut()),
                task: AtomicPtr::new(std::ptr::null_mut()),
                n_tasks: AtomicUsize::new(0),
                helpers: AtomicUsize::new(0),
            },
            finished: CacheLine(AtomicUsize::new(0)),
            panic: Mutex::new(None),
        }
    }

    /// Opens a job and returns its number.
    fn publish<F: Fn(usize) + Sync>(&self, task: &F, n_tasks: usize, workers: &[Worker]) -> u32 {
        assert!(n_tasks < CLOSED as usize, "{n_tasks} tasks");
        let epoch = ((self.ticket.0.load(Relaxed) >> 32) as u32).wrapping_add(1);
        let ticket = (epoch as u64) << 32;
        self.ticket.0.store(ticket | CLOSED as u64, SeqCst);
        self.job.call.store(call::<F> as *mut (), Release);
        self.job
            .task
            .store(std::ptr::from_ref(task).cast_mut().cast(), Release);
        self.job.n_tasks.store(n_tasks, Release);
        self.job.helpers.store(workers.len(), Release);
        self.finished.0.store(0, Release);
        self.ticket.0.store(ticket, SeqCst);
        for worker in workers {
            // Either this load sees the sleeper, or the sleeper's last look at the ticket sees the new job (SeqCst).
            if worker.asleep.load(SeqCst) {
                worker.thread.unpark();
            }
        }
        epoch
    }

    /// Claims and runs tasks of job `epoch` until none is left.
    fn work(&self, epoch: u32) {
        let mut done = 0;
        let mut ticket = self.ticket.0.load(Acquire);
        loop {
            let (job, next) = ((ticket >> 32) as u32, ticket as u32);
            let n_tasks = self.job.n_tasks.load(Acquire);
            let (call, task) = (self.job.call.load(Acquire), self.job.task.load(Acquire));
            if job != epoch || next == CLOSED || next as usize >= n_tasks {
                break;
            }
            match self
                .ticket
                .0
                .compare_exchange_weak(ticket, ticket + 1, AcqRel, Acquire)
            {
                Err(now) => ticket = now,
                Ok(_) => {
                    // SAFETY: `call` is the instance of `call` for the type behind `task`: the claim succeeded, so the
                    // fields were those of this job; and the caller keeps `task` alive until all claimed tasks are done.
                    let run = || unsafe {
                        let call = std::mem::transmute::<*mut (), unsafe fn(*const (), usize)>(call);
                        call(task, next as usize);
                    };
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                        self.panic
                            .lock()
                            .expect("held only to move a value")
                            .get_or_insert(panic);
                    }
                    done += 1;
                    ticket = self.ticket.0.load(Acquire);
                }
            }
        }
        if done > 0 {
            self.finished.0.fetch_add(done, Release);
        }
    }

    fn await_finished(&self, n_tasks: usize) {
        let mut started = None;
        while self.finished.0.load(Acquire) != n_tasks {
            std::hint::spin_loop();
            // A worker that lost its core may need ours to finish.
            if started.get_or_insert_with(Instant::now).elapsed() > CALLER_SPIN {
                std::thread::yield_now();
            }
        }
    }
}

/// # Safety
/// `task` points to a live `F`.
unsafe fn call<F: Fn(usize)>(task: *const (), index: usize) {
    // SAFETY: the caller's contract.
    unsafe { (*task.cast::<F>())(index) }
}

fn spawn(pool: &'static Pool, index: usize) -> Worker {
    let asleep = Arc::new(AtomicBool::new(false));
    let flag = asleep.clone();
    // A worker born with a job under way sees it as the first new one.
    let seen = (pool.ticket.0.load(Acquire) >> 32) as u32;
    let handle = std::thread::Builder::new()
        .name(format!("compute-{}", index + 1))
        .spawn(move || run_worker(pool, index, seen, &flag))
        .expect("the system refuses another thread");
    Worker {
        thread: handle.thread().clone(),
        asleep,
    }
}

fn run_worker(pool: &'static Pool, index: usize, mut seen: u32, asleep: &AtomicBool) {
    MINE.set(pool);
    loop {
        let mut spinning = Instant::now();
        let mut looks = 0u32;
        let epoch = loop {
            let ticket = pool.ticket.0.load(Acquire);
            if (ticket >> 32) as u32 != seen && ticket as u32 != CLOSED {
                break (ticket >> 32) as u32;
            }
            std::hint::spin_loop();
            looks += 1;
            if looks.is_multiple_of(64) && spinning.elapsed() > SPIN {
                asleep.store(true, SeqCst);
                if (pool.ticket.0.load(SeqCst) >> 32) as u32 == seen {
                    std::thread::park();
                }
                asleep.store(false, SeqCst);
                spinning = Instant::now();
            }
        };
        seen = epoch;
        if index < pool.job.helpers.load(Acquire) {
            let _inside = Inside::enter();
            pool.work(epoch);
        }
    }
}

/// A buffer lent by this thread, at least a cache line aligned. What stands in it is left over from its last use.
pub(crate) struct Scratch<T: Plain> {
    /// Some until dropped.
    pages: Option<Pages<u8>>,
    len: usize,
    element: std::marker::PhantomData<T>,
}

/// Buffers a thread keeps for its next use; a nested loan takes another one.
const KEPT_BUFFERS: usize = 8;
/// Larger buffers are given back to the system.
const KEPT_BYTES: usize = 64 << 20;

thread_local! {
    static KEPT: RefCell<Vec<Pages<u8>>> = const { RefCell::new(Vec::new()) };
}

/// `len` values of scratch from this thread's own buffers, returned when dropped.
pub(crate) fn scratch<T: Plain>(len: usize) -> Scratch<T> {
    let bytes = len * size_of::<T>();
    let kept = KEPT.with_borrow_mut(|kept| {
        // The smallest that is large enough; a large one stays free for a large loan.
        let fits = (0..kept.len()).filter(|&i| kept[i].len() >= bytes);
        fits.min_by_key(|&i| kept[i].len()).map(|i| kept.swap_remove(i))
    });
    // Rounded up, so that slowly growing shapes do not allocate each time.
    let pages = kept.unwrap_or_else(|| Pages::zeroed(bytes.next_power_of_two().max(4096)));
    Scratch {
        pages: Some(pages),
        len,
        element: std::marker::PhantomData,
    }
}

impl<T: Plain> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let pages = self.pages.as_ref().expect("given back only by drop");
        // SAFETY: the pages hold at least `len` values of T, for which any bytes are a value, aligned to a cache line.
        unsafe { std::slice::from_raw_parts(pages.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let pages = self.pages.as_mut().expect("given back only by drop");
        // SAFETY: as above, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), self.len) }
    }
}

impl<T: Plain> Drop for Scratch<T> {
    fn drop(&mut self) {
        let Some(pages) = self.pages.take() else { return };
        // At the thread's end KEPT may be gone: the pages are then simply freed.
        let _ = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            if kept.len() == KEPT_BUFFERS {
                let smallest = (0..kept.len())
                    .min_by_key(|&i| kept[i].len())
                    .expect("KEPT_BUFFERS > 0");
                kept.swap_remove(smallest);
            }
            if pages.len() <= KEPT_BYTES {
                kept.push(pages);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each task once, whatever the number of tasks, and results visible to the caller.
    #[test]
    fn each_task_runs_once() {
        for n in [0, 1, 2, 3, 7, 64, 1000] {
            for _ in 0..200 {
                let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                for_each(n, |i| {
                    counts[i].fetch_add(1, Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "{n} tasks");
            }
        }
    }

    #[test]
    fn several_callers_at_once() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..500 {
                        let sum = AtomicUsize::new(0);
                        for_each(17, |i| {
                            sum.fetch_add(i + round, Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 17 * 16 / 2 + 17 * round);
                    }
                });
            }
        });
    }

    /// Shares work side by side, on as many threads as they were given, and jobs without a share are not disturbed.
    #[test]
    fn shares_are_apart() {
        let together = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            for index in 0..2 {
                let together = &together;
                scope.spawn(move || {
                    let whole = threads();
                    take_share(index, 2);
                    assert_eq!(threads(), ((whole + index) / 2).max(1));
                    for _ in 0..50 {
                        for_each(3, |task| {
                            // Both shares are inside a job at once: neither waits for the other's.
                            if task == 0 {
                                together.wait();
                            }
                        });
                    }
                    take_share(0, 1);
                    assert_eq!(threads(), whole);
                });
            }
        });
    }

    #[test]
    fn nested_calls_run_inline() {
        let sum = AtomicUsize::new(0);
        for_each(8, |_| {
            let thread = std::thread::current().id();
            for_each(8, |i| {
                assert_eq!(std::thread::current().id(), thread);
                sum.fetch_add(i, Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), 8 * 28);
    }

    #[test]
    fn a_panic_reaches_the_caller_after_the_others_ended() {
        let done = AtomicUsize::new(0);
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            for_each(100, |i| {
                assert_ne!(i, 41, "task 41");
                done.fetch_add(1, Relaxed);
            })
        }));
        assert!(panicked.is_err());
        // Inline (another test holds the pool) the tasks behind the panic do not run.
        assert!(matches!(done.into_inner(), 41 | 99));
        for_each(100, |_| ());
    }

    #[test]
    fn sleepers_wake() {
        for _ in 0..20 {
            std::thread::sleep(5 * SPIN);
            let sum = AtomicUsize::new(0);
            for_each(4, |i| {
                sum.fetch_add(i, Relaxed);
            });
            assert_eq!(sum.into_inner(), 6);
        }
    }

    /// A thread that stands aside takes no worker, and nobody finds the pool taken by it.
    #[test]
    fn who_stands_aside_works_alone() {
        std::thread::spawn(|| {
            stand_aside();
            let me = std::thread::current().id();
            for_each(64, |_| assert_eq!(std::thread::current().id(), me));
        })
        .join()
        .expect("every task ran on the thread itself");
    }

    #[test]
    fn nested_loans_are_apart() {
        let mut outer = scratch::<f32>(100);
        outer.fill(1.0);
        let mut inner = scratch::<u16>(100);
        inner.fill(7);
        assert!(outer.iter().all(|&x| x == 1.0));
        drop(outer);
        assert_eq!(scratch::<f32>(3).len(), 3);
    }
}
