// The emulated device's one entry for a layout of lanes (GPU_TILE 1: CDNA, 2: RDNA, 3: NVIDIA): launches by name.
#define GPU_EMU
#include "kernels.cu"

namespace {

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(args[I])...);
}

struct Entry {
  const char* name;
  int arguments;
  void (*run)(void** args, const uint32_t* grid, uint32_t threads);
};

template <class... A>
constexpr int count(void (*)(A...)) {
  return sizeof...(A);
}

template <auto K, class... A>
void run(void (*)(A...), void** args, const uint32_t* grid, uint32_t threads) {
  emu::launch([=] { call(K, args, std::index_sequence_for<A...>()); }, grid[0], grid[1], grid[2], threads);
}

const Entry entries[] = {
#define GPU_KERNEL(name) \
  {#name, count(name), [](void** args, const uint32_t* grid, uint32_t threads) { run<name>(name, args, grid, threads); }},
#include "kernels.def"
};

}  // namespace

#define NAME_(tile) tandem_emu_##tile
#define NAME(tile) NAME_(tile)

// Whether there is such a kernel of so many arguments; then it has run.
extern "C" bool NAME(GPU_TILE)(const char* name, void** args, int arguments, const uint32_t* grid, uint32_t threads) {
  for (const Entry& entry : entries)
    if (!strcmp(entry.name, name) && entry.arguments == arguments) {
      entry.run(args, grid, threads);
      return true;
    }
  return false;
}
