// The combinations of dtypes that have an update kernel of their own.
#pragma once

#include "update.cuh"

namespace fast {

// X(parameter, gradient, whether there are remainders, moments, anchor, curvature): float32 and
// exact bf16, with every state and pull that options of the optimizers lead to. All else (half
// precision, rounded bf16, gradients of another dtype, tensors that are not aligned) is for `Any`.
#define FAST_PULLS(X, P, R, M) \
  X(P, P, R, M, none, none)    \
  X(P, P, R, M, P, none)       \
  X(P, P, R, M, P, f32)        \
  X(P, P, R, M, bf16, bf16)    \
  X(P, P, R, M, bf16, codes8)
#define FAST_KINDS(X)                    \
  FAST_PULLS(X, f32, false, f32)         \
  FAST_PULLS(X, f32, false, bf16)        \
  FAST_PULLS(X, f32, false, codes8)      \
  X(f32, f32, false, f32, bf16, none)    \
  X(f32, f32, false, bf16, bf16, none)   \
  X(f32, f32, false, codes8, bf16, none) \
  FAST_PULLS(X, bf16, true, f32)         \
  FAST_PULLS(X, bf16, true, bf16)        \
  FAST_PULLS(X, bf16, true, codes8)

#define FAST_ONE(...) +1
constexpr int kKinds = FAST_KINDS(FAST_ONE);
#undef FAST_ONE

using Kernel = void (*)(const CudaUpdateArgs, int64_t);
extern const Kernel adamw_kernels[kKinds], sgd_kernels[kKinds];

// Makes the kernels of FAST_RULE, which the source that includes this names.
#define FAST_KERNEL(P, G, R, M, A, F) \
  update_kernel<FAST_RULE, float, Fixed<Dtype::P, Dtype::G, R, Dtype::M, Dtype::A, Dtype::F>>,

}  // namespace fast
