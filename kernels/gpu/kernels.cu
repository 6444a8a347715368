// All kernels, as one translation unit for each target.
#include "gpu.h"
#if defined(GPU_EMU)
namespace { // Each layout of the emulated device has its own copy of every template.
#endif
#include "rows.h"
#include "gemm.cu"
#include "adamw.cu"
#include "dequant.cu"
#include "dropout.cu"
#include "loss.cu"
#include "norm.cu"
#include "activation.cu"
#include "lora.cu"
#include "experts.cu"
#include "embedding.cu"
#include "pages.cu"
#include "rope.cu"
#include "fragments.cu"
#include "segments.cu"
#include "attention.cu"
#include "attention_f32.cu"
#include "attention_backward.cu"
#include "logits.cu"
#include "sample.cu"
#include "logprob.cu"
#if defined(GPU_EMU)
}
#endif
