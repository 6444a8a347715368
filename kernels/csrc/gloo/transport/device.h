#pragma once
// Stand-in (README.md): held by shared_ptr, which knows how to delete it since it was made inside libtorch.

namespace gloo::transport {

class Device;

} // namespace gloo::transport
