// The collectives of libtorch (c10d) for ranks that are processes, behind a C interface: TCPStore to meet, Gloo for what
// lies on the CPU, NCCL for what lies on a GPU (under ROCm the same class speaks to RCCL). Not here: order of summation,
// framing of messages, who is alive: that is Rust's.
//
// Every function catches what C++ throws and returns it as a string of malloc (null: all is well). Tensors are
// `at::Tensor*` as torch-sys hands them out. Headers are narrow on purpose: this file compiles in seconds.
//
// USE_C10D_NCCL: compile the NCCL group in. USE_ROCM with it: against HIP headers.

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

using namespace std::chrono_literals;
using std::chrono::milliseconds;

namespace {

constexpr milliseconds kWhose = 250ms;

// Gloo's own limit where a rank may idle (it has none for "for ever"). Liveness is watched elsewhere.
constexpr milliseconds kPatience = std::chrono::hours(24 * 365);

} // namespace

struct TandemGroup {
  // Before the groups: their threads call back into these until the groups are gone.
  std::mutex mutex;
  std::condition_variable changed;
  std::optional<std::string> given_up;
  // A result that was on its way when the group was given up still counts, for so long.
  milliseconds last_word{};
  // Given up because a rank ended by itself: a collective that it had its part of may not even have begun here.
  bool may_begin = false;
  // A collective did not end: its thread may still be inside Gloo, and destruction would wait for it.
  bool abandoned = false;

  milliseconds limit{};
  at::Device device = at::kCPU;
  c10::intrusive_ptr<c10d::Store> store;
  // On the CPU, always: messages.
  c10::intrusive_ptr<c10d::Backend> gloo;
  // On `device`: tensors. The same as `gloo` where that is the CPU.
  c10::intrusive_ptr<c10d::Backend> tensors;
};

namespace {

char* copy(const char* text) {
  return strdup(text);
}

template <typename F>
char* caught(F&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& error) {
    return copy(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return copy(error.what());
  } catch (...) {
    return copy("an exception of unknown type");
  }
}

// Returns when `work` is done; throws what it failed with, or when the group is given up, or after `limit`.
void finish(TandemGroup& group, const c10::intrusive_ptr<c10d::Work>& work, std::optional<milliseconds> limit) {
  struct State {
    bool done = false;
    std::exception_ptr error;
  };
  auto state = std::make_shared<State>();
  work->getFuture()->addCallback([&group, state](c10::ivalue::Future& future) {
    std::lock_guard<std::mutex> lock(group.mutex);
    state->done = true;
    state->error = future.exception_ptr();
    group.changed.notify_all();
  });
  std::unique_lock<std::mutex> lock(group.mutex);
  auto over = [&] { return state->done || group.given_up; };
  bool in_time = true;
  if (limit) {
    in_time = group.changed.wait_for(lock, *limit, over);
  } else {
    group.changed.wait(lock, over);
  }
  if (!state->done && group.given_up) {
    group.changed.wait_for(lock, group.last_word, [&] { return state->done; });
  }
  if (state->done) {
    if (state->error && !group.given_up) {
      // A broken connection is noticed before it is known whose it was.
      group.changed.wait_for(lock, kWhose, [&] { return group.given_up.has_value(); });
    }
    if (state->error && group.given_up) {
      // Its connections broke because of that.
      throw std::runtime_error(*group.given_up);
    }
    if (state->error) {
      std::rethrow_exception(state->error);
    }
    return;
  }
  group.abandoned = true;
  if (group.given_up) {
    throw std::runtime_error(*group.given_up);
  }
  if (!in_time) {
    throw std::runtime_error("no answer from the other ranks within " + std::to_string(limit->count()) + " ms");
  }
}

// Of the tensors' device: a GPU's collective is queued on its stream, the CPU's is waited for.
void finish_tensors(TandemGroup& group, const c10::intrusive_ptr<c10d::Work>& work) {
  if (group.device.is_cpu()) {
    finish(group, work, group.limit);
  } else {
    work->wait();
  }
}

void check(TandemGroup& group) {
  std::lock_guard<std::mutex> lock(group.mutex);
  if (group.given_up && !group.may_begin) {
    throw std::runtime_error(*group.given_up);
  }
}

c10::intrusive_ptr<c10d::Backend> make_gloo(const TandemGroup& group, int rank, int world, const char* own_address) {
  auto options = c10d::ProcessGroupGloo::Options::create(group.limit);
  const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
  options->devices.push_back(
      interface ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                : c10d::ProcessGroupGloo::createDeviceForHostname(own_address));
  // One collective at a time.
  options->threads = 1;
  group.store->setTimeout(group.limit);
  auto store = c10::make_intrusive<c10d::PrefixStore>("gloo", group.store);
  // Connects every pair of ranks, within the limit; how long a collective may take is decided in `finish`.
  c10::intrusive_ptr<c10d::Backend> gloo =
      c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, world, options);
  gloo->setTimeout(kPatience);
  return gloo;
}

c10::intrusive_ptr<c10d::Backend> make_nccl(const TandemGroup& group, int rank, int world) {
#ifdef USE_C10D_NCCL
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = group.limit;
  auto store = c10::make_intrusive<c10d::PrefixStore>("nccl", group.store);
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, world, options);
#else
  (void)rank, (void)world;
  throw std::runtime_error("this build has no NCCL: rank on " + group.device.str() + " of a libtorch for the CPU");
#endif
}

void make_groups(TandemGroup& group, int rank, int world, const char* own_address) {
  group.gloo = make_gloo(group, rank, world, own_address);
  if (group.device.is_cpu()) {
    group.tensors = group.gloo;
  } else {
    c10::DeviceGuard guard(group.device);
    group.tensors = make_nccl(group, rank, world);
  }
}

} // namespace

extern "C" {

void tandem_c10d_free(char* text) {
  std::free(text);
}

// Meets `world` ranks at host:port, where rank 0 (`serves` != 0) opens the store, within `limit_ms`. `prefix` sets this
// meeting's keys apart in a store that others use too. `gpu`: index, or -1 for the CPU.
char* tandem_c10d_join(
    const char* host,
    uint16_t port,
    int serves,
    const char* prefix,
    int rank,
    int world,
    const char* own_address,
    int gpu,
    int64_t limit_ms,
    TandemGroup** out) {
  return caught([&] {
    auto group = std::make_unique<TandemGroup>();
    group->limit = milliseconds(limit_ms);
    if (gpu >= 0) {
      group->device = at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(gpu));
    }
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = serves != 0;
    options.numWorkers = world;
    options.timeout = group->limit;
    group->store =
        c10::make_intrusive<c10d::PrefixStore>(prefix, c10::make_intrusive<c10d::TCPStore>(host, options));
    make_groups(*group, rank, world, own_address);
    *out = group.release();
  });
}

// Meets `world` of the ranks of `whole` within its limit, by its store: a group of their own, on the same device.
char* tandem_c10d_part(
    const TandemGroup* whole,
    const char* prefix,
    int rank,
    int world,
    const char* own_address,
    TandemGroup** out) {
  return caught([&] {
    auto group = std::make_unique<TandemGroup>();
    group->limit = whole->limit;
    group->device = whole->device;
    group->store = c10::make_intrusive<c10d::PrefixStore>(prefix, whole->store);
    make_groups(*group, rank, world, own_address);
    *out = group.release();
  });
}

char* tandem_c10d_set(TandemGroup* group, const char* key, const char* value) {
  return caught([&] { group->store->set(key, std::vector<uint8_t>(value, value + std::strlen(value))); });
}

// Waits for the key. `*value` is to be freed by tandem_c10d_free.
char* tandem_c10d_get(TandemGroup* group, const char* key, char** value) {
  return caught([&] {
    auto bytes = group->store->get(key);
    *value = copy(std::string(bytes.begin(), bytes.end()).c_str());
  });
}

// The sum in place, in whatever order the backend likes.
char* tandem_c10d_all_reduce(TandemGroup* group, at::Tensor* x) {
  return caught([&] {
    check(*group);
    c10::DeviceGuard guard(group->device);
    std::vector<at::Tensor> tensors{*x};
    finish_tensors(*group, group->tensors->allreduce(tensors));
  });
}

// `out`: world times the elements of `x`.
char* tandem_c10d_all_gather(TandemGroup* group, at::Tensor* out, at::Tensor* x) {
  return caught([&] {
    check(*group);
    c10::DeviceGuard guard(group->device);
    finish_tensors(*group, group->tensors->_allgather_base(*out, *x));
  });
}

// Part r of `x` to rank r; `out` gets this rank's part of every rank. Parts: the first dimension divided by the ranks.
char* tandem_c10d_all_to_all(TandemGroup* group, at::Tensor* out, at::Tensor* x) {
  return caught([&] {
    check(*group);
    c10::DeviceGuard guard(group->device);
    std::vector<int64_t> even;
    finish_tensors(*group, group->tensors->alltoall_base(*out, *x, even, even));
  });
}

// Rank 0's CPU tensor into everyone's. `patient` != 0: without a limit, while the group is not given up.
char* tandem_c10d_broadcast(TandemGroup* group, at::Tensor* x, int patient) {
  return caught([&] {
    check(*group);
    std::vector<at::Tensor> tensors{*x};
    auto limit = patient != 0 ? std::nullopt : std::optional<milliseconds>(group->limit);
    finish(*group, group->gloo->broadcast(tensors), limit);
  });
}

// Returns when every rank is here, without a limit, while the group is not given up.
char* tandem_c10d_meet(TandemGroup* group) {
  return caught([&] {
    check(*group);
    finish(*group, group->gloo->barrier(), std::nullopt);
  });
}

char* tandem_c10d_check(TandemGroup* group) {
  return caught([&] { check(*group); });
}

// From any thread: a collective fails with `reason`, unless it ends within `last_word_ms`. With `may_begin` != 0 one that
// is entered later has as much time; else it fails at once, and what is queued on a GPU is cut short.
void tandem_c10d_give_up(TandemGroup* group, const char* reason, int64_t last_word_ms, int may_begin) {
  {
    std::lock_guard<std::mutex> lock(group->mutex);
    if (group->given_up && !(group->may_begin && may_begin == 0)) {
      return;
    }
    group->given_up = reason;
    group->last_word = milliseconds(last_word_ms);
    group->may_begin = may_begin != 0;
  }
  group->changed.notify_all();
  if (may_begin == 0 && !group->device.is_cpu()) {
    // Kernels that wait for a peer end; else the stream, and everyone who synchronises with it, would wait for ever.
    std::free(caught([&] { group->tensors->abort(); }));
  }
}

void tandem_c10d_delete(TandemGroup* group) {
  bool abandoned;
  {
    std::lock_guard<std::mutex> lock(group->mutex);
    abandoned = group->abandoned;
  }
  // A group whose thread is stuck inside a collective is left to the end of the process, which is near.
  if (!abandoned) {
    std::free(caught([&] { delete group; }));
  }
}

} // extern "C"
