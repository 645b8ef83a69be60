// The anchored updates on CUDA: arguments and launchers. All pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "fast/anchored.h"

namespace fast {

struct CudaUpdateArgs {
  const Row* rows;           // [row_count]; `grad` is not read
  const void* const* grads;  // [row_count]
  const Chunk* chunks;       // [chunk_count]
  int64_t row_count, chunk_count;
  const double* hyper;     // [groups, columns]
  double* partial;         // [kStats, chunk_count], scratch
  double* control;         // [3], scratch: norm, what gradients are multiplied by, skip
  double* stats;           // [kStats] or null
  const void* grad_scale;  // [1] or null: gradients are divided by it
  const float* found_inf;  // [1] or null: nonzero skips the step
  bool wide_scale;         // grad_scale is double, else float
  double max_grad_norm;    // <= 0: no clipping
  uint64_t seed;
};

// The dtypes of a row that has a kernel of its own, whether it has a remainder, and with streams
// that are all aligned to 16 bytes. Both moments are of one dtype.
struct CudaKind {
  Dtype param, grad, moment, anchor, curvature;
  bool remainder;
};
std::vector<CudaKind> cuda_kinds();

// A run of chunks whose rows are of one kind: an index into cuda_kinds(), or one of the two that
// take any row of their arithmetic.
enum { kAnyFloat = -1, kAnyDouble = -2 };
struct CudaLaunch {
  int32_t kind;
  int64_t first, count;
};

cudaError_t anchored_adamw_cuda(const CudaUpdateArgs& args, const std::vector<CudaLaunch>& launches,
                                cudaStream_t stream);
cudaError_t anchored_sgd_cuda(const CudaUpdateArgs& args, const std::vector<CudaLaunch>& launches,
                              cudaStream_t stream);

// table[i] = addresses[i], through kernel arguments: needs no pinned memory and no sync, and a
// captured graph keeps the addresses.
cudaError_t write_addresses_cuda(uint64_t* table, const uint64_t* addresses, int64_t count,
                                 cudaStream_t stream);

}  // namespace fast
