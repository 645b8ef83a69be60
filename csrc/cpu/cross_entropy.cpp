// Blocks of rows over the threads; the rows' code is in cross_entropy_isa.

#include "fast/cross_entropy.h"

#include <algorithm>
#include <vector>

#include "instruction_set.h"

namespace fast {
namespace {

// Below this many logits the other threads cost more than they bring.
constexpr int64_t kParallelFrom = 32768;

}  // namespace

void cross_entropy_cpu(const CrossEntropyArgs& args) {
  const CrossEntropyKernels& kernels = FAST_BEST(cross_entropy_kernels_);
  const int64_t blocks = (args.rows + kRowBlock - 1) / kRowBlock;
  std::vector<double> partial(args.quad ? blocks * args.vectors : 0, 0.0);
  const int64_t work = args.vectors * args.rows * args.classes;
  const int threads = work < kParallelFrom ? 1 : args.threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t b = 0; b < blocks; b++) {
    double* quad = args.quad ? partial.data() + b * args.vectors : nullptr;
    kernels.rows(args, b * kRowBlock, std::min(args.rows, (b + 1) * kRowBlock), quad);
  }
  if (!args.quad) return;
  std::fill_n(args.quad, args.vectors, 0.0);
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t k = 0; k < args.vectors; k++) args.quad[k] += partial[b * args.vectors + k];
}

}  // namespace fast
