// The anchored updates on CUDA: what goes before and after the update, and its launches.
//
// Rows and chunks are in device tables, so one launch takes any number of tensors of one kind: as
// kernel arguments, six lists of addresses would allow 24 tensors in 4 KB and 280 in 32 KB. A block
// reads its chunk and its row once, for 16384 elements, and keeps them in registers. Only the
// gradients' addresses change between steps; write_addresses_cuda brings them as arguments.

#include "kinds.cuh"

namespace fast {
namespace {

constexpr int kReduceThreads = 1024;

// The squares of a chunk of gradients of one type, in double: those of floats may overflow.
template <Dtype Type>
__device__ __forceinline__ double squares_of(const void* grad, const Chunk& chunk) {
  const bool vector = is_aligned(grad, Type);
  grad = static_cast<const char*>(grad) + chunk.begin * size_of(Type);
  double sum = 0;
  for (int at = static_cast<int>(threadIdx.x) * kWidth; at < chunk.count; at += kTile) {
    const int n = chunk.count - at;
    double g[kWidth];
    if constexpr (Type == Dtype::f64) {
      RawWide s;
      fetch(&s, grad, Type, at, n, false);
      decode<true>(g, s, Type, 0);
    } else {
      float narrow[kWidth];
      decode<true>(narrow, fetch(grad, Type, at, n, vector && n >= kWidth), Type, 0);
#pragma unroll
      for (int k = 0; k < kWidth; k++) g[k] = narrow[k];
    }
#pragma unroll
    for (int k = 0; k < kWidth; k++)
      if (k < n) sum += g[k] * g[k];
  }
  return sum;
}

// partial[grad_norm] of each chunk.
__global__ void __launch_bounds__(kThreads) gradient_norm_kernel(const CudaUpdateArgs a) {
  const Chunk chunk = a.chunks[blockIdx.x];
  const void* grad = a.grads[chunk.row];
  const Dtype type = a.rows[chunk.row].grad_type;
  double sum = 0;
  if (type == Dtype::f32) sum = squares_of<Dtype::f32>(grad, chunk);
  if (type == Dtype::bf16) sum = squares_of<Dtype::bf16>(grad, chunk);
  if (type == Dtype::f16) sum = squares_of<Dtype::f16>(grad, chunk);
  if (type == Dtype::f64) sum = squares_of<Dtype::f64>(grad, chunk);
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) a.partial[grad_norm * a.chunk_count + blockIdx.x] = sum;
}

__device__ double sum_of(const CudaUpdateArgs& a, int stat) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < a.chunk_count; i += kReduceThreads)
    total += a.partial[stat * a.chunk_count + i];
  return block_sum<kReduceThreads>(total);
}

__global__ void __launch_bounds__(kReduceThreads) clip_kernel(const CudaUpdateArgs a) {
  const double squares = sum_of(a, grad_norm);
  if (threadIdx.x) return;
  bool skip = a.found_inf && *a.found_inf != 0;
  double scale = unscale(a);
  const double norm = sqrt(squares) * scale;
  if (a.grad_scale && !isfinite(norm)) skip = true;
  const double coefficient = a.max_grad_norm / (norm + 1e-6);  // torch's clip_grad_norm_
  if (!(coefficient >= 1)) scale *= coefficient;  // NaN clips too: it must reach the weights
  a.control[0] = norm;
  a.control[1] = scale;
  a.control[2] = skip;
}

// One block, after the update: nothing else reads or writes the step counts then.
__global__ void __launch_bounds__(kReduceThreads) finish_kernel(const CudaUpdateArgs a) {
  bool skip;
  gradient_scale(a, &skip);
  if (skip) return;
  for (int64_t i = threadIdx.x; i < a.row_count; i += kReduceThreads) *a.rows[i].step += 1.0f;
  if (!a.stats) return;
  const bool clip = a.max_grad_norm > 0;
  const double squares = clip ? 0 : sum_of(a, grad_norm), away = sum_of(a, Stat::drift),
               change = sum_of(a, update_norm), energy = sum_of(a, Stat::forgetting);
  if (threadIdx.x) return;
  a.stats[grad_norm] = clip ? a.control[0] : sqrt(squares);
  a.stats[Stat::drift] = sqrt(away);
  a.stats[update_norm] = sqrt(change);
  a.stats[Stat::forgetting] = 0.5 * energy;
}

// 4 KB of arguments, what every driver takes.
struct Addresses {
  static constexpr int kCount = 480;
  uint64_t value[kCount];
};

// table: [count], written.
__global__ void write_addresses_kernel(uint64_t* table, int count, const Addresses addresses) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) table[i] = addresses.value[i];
}

template <template <class> class Rule>
cudaError_t launch(const CudaUpdateArgs& a, const std::vector<CudaLaunch>& launches,
                   const Kernel* kernels, cudaStream_t stream) {
  const unsigned count = static_cast<unsigned>(a.chunk_count);
  if (a.max_grad_norm > 0) {
    if (count) gradient_norm_kernel<<<count, kThreads, 0, stream>>>(a);
    clip_kernel<<<1, kReduceThreads, 0, stream>>>(a);
  }
  for (const CudaLaunch& some : launches) {
    const unsigned blocks = static_cast<unsigned>(some.count);
    if (some.kind == kAnyFloat)
      update_kernel<Rule, float, Any><<<blocks, kThreads, 0, stream>>>(a, some.first);
    else if (some.kind == kAnyDouble)
      update_kernel<Rule, double, Any><<<blocks, kThreads, 0, stream>>>(a, some.first);
    else if (some.kind >= 0 && some.kind < kKinds)
      kernels[some.kind]<<<blocks, kThreads, 0, stream>>>(a, some.first);
    else
      return cudaErrorInvalidValue;
  }
  finish_kernel<<<1, kReduceThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

std::vector<CudaKind> cuda_kinds() {
#define FAST_KIND(P, G, R, M, A, F) {Dtype::P, Dtype::G, Dtype::M, Dtype::A, Dtype::F, R},
  return {FAST_KINDS(FAST_KIND)};
#undef FAST_KIND
}

cudaError_t anchored_adamw_cuda(const CudaUpdateArgs& args, const std::vector<CudaLaunch>& launches,
                                cudaStream_t stream) {
  return launch<AdamW>(args, launches, adamw_kernels, stream);
}

cudaError_t anchored_sgd_cuda(const CudaUpdateArgs& args, const std::vector<CudaLaunch>& launches,
                              cudaStream_t stream) {
  return launch<Sgd>(args, launches, sgd_kernels, stream);
}

cudaError_t write_addresses_cuda(uint64_t* table, const uint64_t* addresses, int64_t count,
                                 cudaStream_t stream) {
  for (int64_t i = 0; i < count; i += Addresses::kCount) {
    const int n = static_cast<int>(count - i < Addresses::kCount ? count - i : Addresses::kCount);
    Addresses some = {};
    for (int k = 0; k < n; k++) some.value[k] = addresses[i + k];
    write_addresses_kernel<<<1, 256, 0, stream>>>(table + i, n, some);
  }
  return cudaGetLastError();
}

}  // namespace fast
