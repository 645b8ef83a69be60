// The update kernels of csrc/cuda, run on the CPU: called by tests/kernels/test_cuda_on_cpu.py.

#include <thread>
#include <vector>

#include "kinds.cuh"

namespace fast {
namespace {
#define FAST_RULE AdamW
const Kernel adamw[] = {FAST_KINDS(FAST_KERNEL)};
#undef FAST_RULE
#define FAST_RULE Sgd
const Kernel sgd[] = {FAST_KINDS(FAST_KERNEL)};

template <template <class> class Rule>
Kernel kernel(const Kernel* kernels, int kind) {
  if (kind == kAnyFloat) return update_kernel<Rule, float, Any>;
  if (kind == kAnyDouble) return update_kernel<Rule, double, Any>;
  return kernels[kind];
}
}  // namespace
}  // namespace fast

using namespace fast;

// types: [kinds, 6], written: the dtypes of a kind and whether it has a remainder.
extern "C" int cuda_kinds(uint8_t* types) {
  const CudaKind kinds[] = {
#define FAST_KIND(P, G, R, M, A, F) {Dtype::P, Dtype::G, Dtype::M, Dtype::A, Dtype::F, R},
      FAST_KINDS(FAST_KIND)};
  memcpy(types, kinds, sizeof(kinds));
  return kKinds;
}

extern "C" void run_chunks(int rule, int kind, int64_t first, int64_t count, const void* rows,
                           const void* grads, const void* chunks, int64_t chunk_count,
                           const double* hyper, double* partial, double* control, double* stats,
                           double max_grad_norm, uint64_t seed) {
  CudaUpdateArgs a{};
  a.rows = static_cast<const Row*>(rows);
  a.grads = static_cast<const void* const*>(grads);
  a.chunks = static_cast<const Chunk*>(chunks);
  a.chunk_count = chunk_count;
  a.hyper = hyper;
  a.partial = partial;
  a.control = control;
  a.stats = stats;
  a.max_grad_norm = max_grad_norm;
  a.seed = seed;
  const Kernel run = rule == 0 ? kernel<AdamW>(adamw, kind) : kernel<Sgd>(sgd, kind);
  for (int64_t block = 0; block < count; block++) {
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < kThreads; t++)
      threads.emplace_back([=] {
        threadIdx.x = t;
        blockIdx.x = static_cast<unsigned>(block);
        run(a, first);
      });
    for (std::thread& thread : threads) thread.join();
  }
}
