// What a translation unit of one instruction set gives to the code that is the same for all.
#pragma once

#include "fast/anchored.h"
#include "fast/update.h"

namespace fast {

// Each function updates one chunk and writes its kStats sums.
struct AnchoredKernels {
  void (*adamw)(const Row&, const Chunk&, const AdamW<double>&, uint64_t seed, uint32_t step,
                double* sums);
  void (*sgd)(const Row&, const Chunk&, const Sgd<double>&, uint64_t seed, uint32_t step,
              double* sums);
  // The sum of squares of a chunk's gradients.
  double (*squares)(const Row&, const Chunk&);
};

const AnchoredKernels& anchored_kernels_baseline();
const AnchoredKernels& anchored_kernels_avx2();
const AnchoredKernels& anchored_kernels_avx512();

}  // namespace fast
