// HIP, NVIDIA's driver, hiprtc, NVRTC and torch's stream for the tests of driver.rs: writes to LOG what it is given.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifndef GFX
#  define GFX ""
#endif
#ifndef MAJOR
#  define MAJOR 0
#  define MINOR 0
#endif
#ifndef LACKS
#  define LACKS ""
#endif
#ifndef REFUSES
#  define REFUSES 0
#endif

static void say(const char* format, ...) {
  FILE* log = fopen(LOG, "a");
  va_list args;
  va_start(args, format);
  vfprintf(log, format, args);
  va_end(args);
  fputc('\n', log);
  fclose(log);
}

static uint32_t sum(const char* bytes, size_t n) {
  uint32_t sum = 0;
  for (size_t i = 0; i < n; ++i) sum = sum * 31 + (uint8_t)bytes[i];
  return sum;
}

// ---- what the two drivers share
static int refuse = REFUSES;
static char names[256][64];
static int known;

static int load(void** module, const char* image) {
  if (refuse) return refuse--, 209;
  say("module %u", sum(image, 64));
  *module = (void*)1;
  return 0;
}
static int find(void** function, void* module, const char* name) {
  if (module != (void*)1 || !strcmp(name, LACKS)) return 500;
  say("function %s", name);
  strcpy(names[known], name);
  *function = names[known++];
  return 0;
}
static int launch(void* function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared, void* stream,
                  void** args, void** extra) {
#ifdef LAUNCH_FAILS
  return 719;
#endif
  if (extra) return 1;
  say("launch %s %u %u %u of %u %u %u, %u shared, stream %d, %llx %x %x", (char*)function, x, y, z, tx, ty, tz, shared, (int)(intptr_t)stream,
      *(unsigned long long*)args[0], *(int*)args[1], *(int*)args[2]);
  return 0;
}
static const char* name(int code) {
  static char text[32];
  snprintf(text, sizeof text, "named %d", code);
  return text;
}

// ---- HIP
int hipSetDevice(int device) { return say("device %d", device), 0; }
int hipGetDevicePropertiesR0600(char* to, int device) {
  memset(to, 0, 1472);
  strcpy(to, "a board named gfx");
  strcpy(to + 1160, GFX);
  return 0;
}
int hipModuleLoadData(void** module, const void* image) { return load(module, image); }
int hipModuleGetFunction(void** function, void* module, const char* name) { return find(function, module, name); }
int hipModuleLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared, void* stream,
                          void** args, void** extra) {
  return launch(f, x, y, z, tx, ty, tz, shared, stream, args, extra);
}
const char* hipGetErrorString(int code) { return name(code); }

// ---- NVIDIA
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* handle, int device) {
#ifdef NO_DEVICE
  return 100;
#endif
  return *handle = device + 70, 0;
}
int cuDeviceGetAttribute(int* to, int attribute, int handle) {
  if (handle < 70 || (attribute != 75 && attribute != 76)) return 1;
  return *to = attribute == 75 ? MAJOR : MINOR, 0;
}
int cuDevicePrimaryCtxRetain(void** context, int handle) { return *context = (void*)(intptr_t)(handle - 70 + 1), 0; }
int cuCtxSetCurrent(void* context) { return say("device %d", (int)(intptr_t)context - 1), 0; }
int cuModuleLoadData(void** module, const void* image) { return load(module, image); }
int cuModuleGetFunction(void** function, void* module, const char* name) { return find(function, module, name); }
int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared, void* stream,
                   void** args, void** extra) {
  return launch(f, x, y, z, tx, ty, tz, shared, stream, args, extra);
}
int cuGetErrorString(int code, const char** to) { return *to = name(code), 0; }

// ---- torch
int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) { return *stream = (void*)(intptr_t)(1000 + device), 0; }

// ---- the compilers
static const char* source;
static int headers;
static const char message[] = "In file included from somewhere\nkernels.cu:1: error: no matrix cores\nand more";

static int create(void** program, const char* text, const char* file, int n, const char** texts, const char** files) {
  if (strcmp(file, "kernels.cu")) return 1;
  for (int i = 0; i < n; ++i)
    if (!strlen(texts[i]) || !strlen(files[i])) return 2;
  source = text;
  headers = n;
  *program = (void*)2;
  return 0;
}
static int compile(void* program, int n, const char** options) {
#ifdef CANNOT_COMPILE
  return 6;
#endif
  if (n < 2 || n > 3 || program != (void*)2) return 3;
  say("compile %u %d %s %s%s%s", sum(source, strlen(source)), headers, options[0], options[1], n > 2 ? " " : "", n > 2 ? options[2] : "");
  return 0;
}
static int size(size_t to, size_t* of) { return *of = to, 0; }
static int image(char* to) { return memset(to, 'i', 100), 0; }
static int log_(char* to) { return memcpy(to, message, sizeof message), 0; }

int hiprtcCreateProgram(void** p, const char* t, const char* f, int n, const char** h, const char** hn) { return create(p, t, f, n, h, hn); }
int hiprtcCompileProgram(void* p, int n, const char** o) { return compile(p, n, o); }
int hiprtcGetProgramLogSize(void* p, size_t* to) { return size(sizeof message, to); }
int hiprtcGetProgramLog(void* p, char* to) { return log_(to); }
int hiprtcGetCodeSize(void* p, size_t* to) { return size(100, to); }
int hiprtcGetCode(void* p, char* to) { return image(to); }
int nvrtcCreateProgram(void** p, const char* t, const char* f, int n, const char** h, const char** hn) { return create(p, t, f, n, h, hn); }
int nvrtcCompileProgram(void* p, int n, const char** o) { return compile(p, n, o); }
int nvrtcGetProgramLogSize(void* p, size_t* to) { return size(sizeof message, to); }
int nvrtcGetProgramLog(void* p, char* to) { return log_(to); }
int nvrtcGetCUBINSize(void* p, size_t* to) { return size(100, to); }
int nvrtcGetCUBIN(void* p, char* to) { return image(to); }
