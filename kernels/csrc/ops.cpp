// Tells which ops libtorch runs on this thread.

#include <ATen/record_function.h>

namespace {

using Hear = void (*)(const char* name, bool begins);
thread_local Hear hears = nullptr;

std::unique_ptr<at::ObserverContext> begins(const at::RecordFunction& op) {
  if (hears) hears(op.name(), true);
  return nullptr;
}

void ends(const at::RecordFunction& op, at::ObserverContext*) {
  if (hears) hears(op.name(), false);
}

}  // namespace

// From here on `hear` is called as each op begins and ends, until the next call with null. A name lives as long as the
// call.
extern "C" void tandem_hear_ops(Hear hear) {
  static thread_local at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;
  if (handle != at::INVALID_CALLBACK_HANDLE) at::removeCallback(handle);
  handle = at::INVALID_CALLBACK_HANDLE;
  hears = hear;
  if (hear) handle = at::addThreadLocalCallback(at::RecordFunctionCallback(begins, ends).scopes({at::RecordScope::FUNCTION}));
}
