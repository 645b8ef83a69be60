// The Hessian of cross-entropy in the logits, for K vectors; the equation is in
// fastkernels/ops/cross_entropy_hvp/reference.py.

#pragma once

#include <cstdint>

namespace fast {

struct CrossEntropyArgs {
  void* u;            // [K, N, C]: read, and overwritten unless `quad` is given
  const void* p;      // [N, C]
  const void* scale;  // [N]
  double* quad;       // [K] or null: only <u, H u>
  int64_t vectors, rows, classes;
  bool f64;
  int threads;
};

void cross_entropy_cpu(const CrossEntropyArgs& args);

// A block's forms are summed alone and then in order, so the result is that of one thread.
constexpr int64_t kRowBlock = 16;

// At most kRowBlock rows [begin, end); `quad` [K] receives their share of the forms. One table per
// instruction set.
struct CrossEntropyKernels {
  void (*rows)(const CrossEntropyArgs& args, int64_t begin, int64_t end, double* quad);
};

const CrossEntropyKernels& cross_entropy_kernels_baseline();
const CrossEntropyKernels& cross_entropy_kernels_avx2();
const CrossEntropyKernels& cross_entropy_kernels_avx512();

}  // namespace fast
