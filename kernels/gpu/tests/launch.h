// Launches of the tests, by name as everybody's, and what they leave as case files (../cases/README.md).
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <array>
#include <map>
#include <string>
#include <tuple>
#include <vector>

// ---- The heap: a kernel is given an address, its case the buffer behind it.
template <class T>
struct Malloc {
  using value_type = T;
  Malloc() = default;
  template <class U>
  Malloc(const Malloc<U>&) {}
  T* allocate(size_t n) { return (T*)malloc(n * sizeof(T)); }
  void deallocate(T* p, size_t) { free(p); }
  bool operator==(const Malloc&) const { return true; }
  bool operator!=(const Malloc&) const { return false; }
};

// Bytes by where they begin.
using Heap = std::map<uintptr_t, size_t, std::less<uintptr_t>, Malloc<std::pair<const uintptr_t, size_t>>>;
inline Heap& heap() {
  static Heap* heap = new (malloc(sizeof(Heap))) Heap;
  return *heap;
}

// What nobody has written is NaN, and the same each time.
void* operator new(size_t n) {
  void* p = malloc(n ? n : 1);
  if (!p) abort();
  heap()[(uintptr_t)p] = n;
  return memset(p, 0xff, n);
}
void operator delete(void* p) noexcept {
  if (p) heap().erase((uintptr_t)p);
  free(p);
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }

// From `p` to the end of what it lies in; 0: nowhere.
inline size_t bytes_from(const void* p) {
  auto above = heap().upper_bound((uintptr_t)p);
  if (above == heap().begin()) return 0;
  auto [begin, size] = *--above;
  return (uintptr_t)p < begin + size ? begin + size - (uintptr_t)p : 0;
}

// ---- Launches.
#define EMULATED_(tile) tandem_emu_##tile
#define EMULATED(tile) EMULATED_(tile)
extern "C" bool EMULATED(GPU_TILE)(const char* name, void** args, int arguments, const uint32_t* grid, uint32_t threads);

using Grid = std::array<uint32_t, 4>; // And the threads of a block.

template <class... A>
void emulate(const std::string& kernel, const Grid& grid, std::tuple<A...>& args) {
  std::apply(
      [&](A&... each) {
        void* pointers[] = {(void*)&each...};
        if (EMULATED(GPU_TILE)(kernel.c_str(), pointers, sizeof...(A), grid.data(), grid[3])) return;
        fprintf(stderr, "no kernel %s of %zu arguments\n", kernel.c_str(), sizeof...(A));
        abort();
      },
      args);
}

// ---- Cases.
using Bytes = std::vector<char>;
constexpr size_t MOST_CASE_BYTES = 1 << 20;
// Where they go: a folder, or a file for one kernel alone. Empty: nowhere.
inline std::string case_path, case_kernel;

// An address in a buffer: which argument's, where, and the buffer that it is of.
struct Address {
  uint32_t argument, offset;
  Bytes to;
};

struct Recorder {
  const std::string& kernel;
  std::vector<Bytes> args;
  Bytes kinds; // What each is, or what it points to.
  std::vector<std::vector<Address>> addresses; // By argument.

  // What has no type are pages, which the kernel's name says, or a table.
  template <class T>
  char kind() const {
    auto of_name = [&](const char* end) { return kernel.size() > strlen(end) && kernel.substr(kernel.size() - strlen(end)) == end; };
    if (std::is_same_v<T, float> || (std::is_void_v<T> && of_name("_f32"))) return 'f';
    if (std::is_same_v<T, uint16_t> || (std::is_void_v<T> && of_name("_bf16"))) return 'h';
    return 'b';
  }

  template <class T>
  void add(const T& value) {
    kinds.push_back(0);
    addresses.emplace_back();
    args.emplace_back((const char*)&value, (const char*)(&value + 1));
  }
  template <class T>
  void add(T* const& p) {
    kinds.push_back(kind<std::remove_const_t<T>>());
    addresses.emplace_back();
    if (p && !bytes_from(p)) fprintf(stderr, "a pointer that is not into the heap\n"), abort();
    args.emplace_back((const char*)p, (const char*)p + (p ? bytes_from(p) : 0));
    if (!std::is_same_v<T, const void>) return; // What it points to has no type, so may hold addresses.
    Bytes& copy = args.back();
    for (size_t at = 0; at + 8 <= copy.size(); at += 8) {
      const char* word;
      memcpy(&word, &copy[at], 8);
      size_t bytes = bytes_from(word);
      if (bytes) addresses.back().push_back({(uint32_t)args.size() - 1, (uint32_t)at, Bytes(word, word + bytes)});
    }
  }
};

inline void write_array(FILE* file, const void* from, uint64_t bytes) {
  fwrite(&bytes, 8, 1, file);
  fwrite(from, 1, bytes, file);
}

// As a case, if it is more than what is kept of this kernel already: more pointers that are not null, then more bytes. Runs on
// copies, each with an allocation of its own as on a GPU.
template <class... A>
void record(const std::string& kernel, const Grid& grid, std::tuple<A...> args) {
  static std::map<std::string, std::pair<int, size_t>> kept;
  if (case_path.empty() || (!case_kernel.empty() && case_kernel != kernel)) return;
  Recorder before{kernel, {}, {}, {}};
  std::apply([&](A&... each) { (before.add(each), ...); }, args);
  std::pair<int, size_t> worth{0, 0};
  for (size_t i = 0; i < before.args.size(); ++i) {
    worth.first += before.kinds[i] && !before.args[i].empty();
    worth.second += before.args[i].size();
    for (auto& address : before.addresses[i]) worth.second += address.to.size();
  }
  if (worth.second > MOST_CASE_BYTES || (kept.count(kernel) && worth <= kept[kernel])) return;
  kept[kernel] = worth;

  std::vector<Bytes> after = before.args;
  for (size_t i = 0; i < after.size(); ++i)
    for (auto& address : before.addresses[i]) {
      const char* to = address.to.data();
      memcpy(&after[i][address.offset], &to, 8);
    }
  size_t i = 0;
  auto own = [&](auto& each) {
    if constexpr (std::is_pointer_v<std::decay_t<decltype(each)>>) each = (std::decay_t<decltype(each)>)(after[i].empty() ? nullptr : after[i].data());
    ++i;
  };
  std::apply([&](A&... each) { (own(each), ...); }, args);
  emulate(kernel, grid, args);

  FILE* file = fopen((case_kernel.empty() ? case_path + "/" + kernel + ".case" : case_path).c_str(), "wb");
  if (!file) perror(case_path.c_str()), exit(1);
  write_array(file, kernel.data(), kernel.size());
  write_array(file, grid.data(), sizeof grid);
  for (auto* arrays : {&before.args, &after})
    for (size_t i = 0; i < arrays->size(); ++i) {
      if (arrays == &after && !before.kinds[i]) continue;
      for (auto& address : before.addresses[i]) memset(&(*arrays)[i][address.offset], 0, 8);
      write_array(file, (*arrays)[i].data(), (*arrays)[i].size());
    }
  for (auto& of_argument : before.addresses)
    for (auto& address : of_argument) {
      uint32_t place[] = {address.argument, address.offset};
      write_array(file, place, sizeof place);
      write_array(file, address.to.data(), address.to.size());
    }
  write_array(file, before.kinds.data(), before.kinds.size());
  fclose(file);
}

template <class K>
struct Launch;
template <class... P>
struct Launch<void (*)(P...)> {
  template <class... A>
  static void run(const std::string& kernel, uint32_t gx, uint32_t gy, uint32_t gz, uint32_t threads, A... args) {
    static_assert(sizeof...(A) == sizeof...(P), "the kernel's arguments");
    std::tuple<P...> values{(P)args...};
    Grid grid = {gx, gy, gz, threads};
    record(kernel, grid, values);
    emulate(kernel, grid, values);
  }
};

// launch_kernel(rms_norm, rows, 1, 1, 256, x.data(), ...): the kernel, the grid, the threads of a block, its arguments.
#define launch_kernel(kernel, ...) Launch<decltype(&kernel)>::run(#kernel, __VA_ARGS__)
// Of several of one signature, by name: launch_as(rms_norm, is_short ? "rms_norm_short" : "rms_norm", ...).
#define launch_as(kernel, name, ...) Launch<decltype(&kernel)>::run(name, __VA_ARGS__)

// What a test is given: nothing, a folder for the cases of all its kernels, or a file for that of `kernel`.
inline void take_arguments(int arguments, char** argument, const char* kernel = "") {
  if (arguments < 2) return;
  case_path = argument[1];
  struct stat found;
  bool folder = !stat(argument[1], &found) && S_ISDIR(found.st_mode);
  if (!folder) case_kernel = kernel;
  if (!folder && case_kernel.empty()) fprintf(stderr, "%s is no folder\n", argument[1]), exit(2);
}
