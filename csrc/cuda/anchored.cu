// The anchored updates on CUDA; the rules are csrc/include/fast/update.h.
//
// Rows and chunks are in device tables, so one launch takes any number of tensors: as kernel
// arguments, six lists of addresses would allow 280 tensors in 32 KB. Only the gradients' addresses
// change between steps; write_addresses_cuda brings them as arguments.
//
// Built with -fmad=false: products are fused where multiply_add says so, as on the CPU.

#include <cuda_runtime.h>

#include "fast/anchored_cuda.h"
#include "fast/update.h"
#include "storage.cuh"

namespace fast {
namespace {

constexpr int kReduceThreads = 1024;

// One over the loss scale.
__device__ __forceinline__ double unscale(const CudaUpdateArgs& a) {
  if (!a.grad_scale) return 1.0;
  return 1.0 / (a.wide_scale ? *static_cast<const double*>(a.grad_scale)
                             : *static_cast<const float*>(a.grad_scale));
}

// What gradients are multiplied by, and whether the step is skipped.
__device__ __forceinline__ double gradient_scale(const CudaUpdateArgs& a, bool* skip) {
  if (a.max_grad_norm > 0) {
    *skip = a.control[2] != 0;
    return a.control[1];
  }
  *skip = a.found_inf && *a.found_inf != 0;
  return unscale(a);
}

// The sum over the threads of a block, in fixed order, for thread 0.
template <int Threads, class Real>
__device__ Real block_sum(Real x) {
  __shared__ Real of_warp[Threads / 32];
#pragma unroll
  for (int lane = 16; lane; lane /= 2) x += __shfl_down_sync(~0u, x, lane);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  Real total = 0;
  if (threadIdx.x == 0)
    for (int k = 0; k < Threads / 32; k++) total += of_warp[k];
  return total;
}

// The hyper-parameters of one tensor in `Real`, derived by one thread: pow in double is dear.
template <class Rule, class Wide>
__device__ __forceinline__ const Rule& derive(const CudaUpdateArgs& a, const Row& row,
                                              double scale) {
  static_assert(int{adamw_column::count} == int{sgd_column::count}, "one width of table");
  constexpr int64_t columns = adamw_column::count;
  __shared__ Rule shared;
  if (threadIdx.x == 0) shared = Rule(Wide(a.hyper + row.group * columns, *row.step + 1.0f, scale));
  __syncthreads();
  return shared;
}

template <class Real>
struct Sums {
  Real gradient = 0, drift = 0, change = 0, forgetting = 0;
};

template <class Rule, class Real>
__device__ __forceinline__ Real step(const Rule& rule, Real old, Real g, Real& m, Real& v,
                                     bool moments, bool anchored, Real w0, bool curved, Real f,
                                     Sums<Real>& sums) {
  g *= rule.grad_scale;
  Real next;
  if constexpr (Rule::kMoments == 1) {
    next = moments ? rule(old, g, m, v) : rule.plain(old, g);
  } else {
    next = rule(old, g, m, v);
  }
  if (anchored) next = pull_to(next, w0, curved ? rule.pull * f : rule.pull);
  sums.gradient = multiply_add(g, g, sums.gradient);
  sums.change = multiply_add(next - old, next - old, sums.change);
  if (anchored) {
    const Real away = next - w0;
    sums.drift = multiply_add(away, away, sums.drift);
    if (curved) sums.forgetting = multiply_add(f * away, away, sums.forgetting);
  }
  return next;
}

template <class Real>
__device__ void store_sums(const CudaUpdateArgs& a, int64_t chunk, Sums<Real> sums, bool curved) {
  const Real gradient = block_sum<kThreads>(sums.gradient), drift = block_sum<kThreads>(sums.drift),
             change = block_sum<kThreads>(sums.change),
             forgetting = block_sum<kThreads>(curved ? sums.forgetting : sums.drift);
  if (threadIdx.x) return;
  const int64_t n = a.chunk_count;
  if (!(a.max_grad_norm > 0)) a.partial[grad_norm * n + chunk] = gradient;
  a.partial[Stat::drift * n + chunk] = drift;
  a.partial[update_norm * n + chunk] = change;
  a.partial[Stat::forgetting * n + chunk] = forgetting;
}

// A block per chunk; `first` is the chunk of block 0. AdamW needs 90 registers: with 64 (8 blocks
// of 128 threads) or 80 (6) some spill; 5 blocks keep over 30 KB of loads in flight, what the
// latency of the memory asks for.
template <template <class> class Rule, class Real>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? 5 : 1)
    update_kernel(const CudaUpdateArgs a, int64_t first) {
  bool skip;
  const double scale = gradient_scale(a, &skip);
  if (skip) return;
  const Chunk chunk = a.chunks[first + blockIdx.x];
  const Row& row = a.rows[chunk.row];
  const Rule<Real>& rule = derive<Rule<Real>, Rule<double>>(a, row, scale);
  constexpr bool two = Rule<Real>::kMoments > 1;
  const void* grad = a.grads[chunk.row];
  const bool moments = row.moment[0] != nullptr;
  const bool anchored = row.anchor != nullptr, curved = anchored && row.curvature != nullptr;
  const bool split = sizeof(Real) == 4 && row.remainder;
  const bool vector = aligned(row.param, row.param_type) && aligned(grad, row.grad_type) &&
                      aligned(row.remainder, Dtype::bf16) &&
                      (!moments || aligned(row.moment[0], row.moment_type[0])) &&
                      (!two || aligned(row.moment[1], row.moment_type[1])) &&
                      (!anchored || aligned(row.anchor, row.anchor_type)) &&
                      (!curved || aligned(row.curvature, row.curvature_type));
  const uint32_t key = rounding_key(a.seed, static_cast<uint32_t>(*row.step + 1.0f),
                                    static_cast<uint32_t>(chunk.begin >> 32));
  Sums<Real> sums;
  // Every thread runs every tile: warps share the scales of codes.
  for (int at = 0; at < chunk.count; at += kTile) {
    const int n = chunk.count - at - static_cast<int>(threadIdx.x) * kWidth;
    const bool whole = vector && n >= kWidth;
    const int64_t i = chunk.begin + at + static_cast<int>(threadIdx.x) * kWidth;
    const int64_t block = i / kCodeBlock;
    typename RawOf<Real>::Type sw, sg, sr = {}, sm = {}, sv = {}, sa = {}, sf = {};
    fetch(&sw, row.param, row.param_type, i, n, whole);
    fetch(&sg, grad, row.grad_type, i, n, whole);
    if (split) fetch(&sr, row.remainder, Dtype::bf16, i, n, whole);
    if (moments) fetch(&sm, row.moment[0], row.moment_type[0], i, n, whole);
    if (two) fetch(&sv, row.moment[1], row.moment_type[1], i, n, whole);
    if (anchored) fetch(&sa, row.anchor, row.anchor_type, i, n, whole);
    if (curved) fetch(&sf, row.curvature, row.curvature_type, i, n, whole);
    const auto scale_of = [&](const float* scales, Dtype type) {
      return type == Dtype::codes8 && n > 0 ? scales[block] : 0.0f;
    };
    Real w[kWidth], g[kWidth], m[kWidth] = {}, v[kWidth] = {}, w0[kWidth] = {}, f[kWidth] = {};
    decode<true>(w, sw, row.param_type, 0);
    if constexpr (sizeof(Real) == 4) {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (split) w[k] = join_bf16(half_of(sw, k), static_cast<int16_t>(half_of(sr, k)));
    }
    decode<true>(g, sg, row.grad_type, 0);
    if (moments)
      decode<true>(m, sm, row.moment_type[0], scale_of(row.scale[0], row.moment_type[0]));
    if (two) decode<false>(v, sv, row.moment_type[1], scale_of(row.scale[1], row.moment_type[1]));
    if (anchored) decode<true>(w0, sa, row.anchor_type, 0);
    if (curved)
      decode<false>(f, sf, row.curvature_type, scale_of(row.curvature_scale, row.curvature_type));
#pragma unroll
    for (int k = 0; k < kWidth; k++)
      if (k < n)
        w[k] = step(rule, w[k], g[k], m[k], v[k], moments, anchored, w0[k], curved, f[k], sums);
    if (split) {
      Stored high = {}, low = {};
#pragma unroll
      for (int k = 0; k < kWidth; k++) {
        int16_t rest;
        high.word[k / 2] |= uint32_t{split_bf16(static_cast<float>(w[k]), &rest)} << (16 * (k % 2));
        low.word[k / 2] |= uint32_t{static_cast<uint16_t>(rest)} << (16 * (k % 2));
      }
      put(row.param, Dtype::bf16, i, n, whole, high);
      put(row.remainder, Dtype::bf16, i, n, whole, low);
    } else {
      keep<true, false>(w, row.param, row.param_type, nullptr, i, n, whole, key);
    }
    if (moments)
      keep<true, false>(m, row.moment[0], row.moment_type[0], row.scale[0] + block, i, n, whole,
                        key);
    if (two)
      keep<false, true>(v, row.moment[1], row.moment_type[1], row.scale[1] + block, i, n, whole,
                        key);
  }
  if (a.stats) store_sums(a, first + blockIdx.x, sums, curved);
}

// partial[grad_norm] of each chunk, in double: squares of floats may overflow.
__global__ void __launch_bounds__(kThreads) gradient_norm_kernel(const CudaUpdateArgs a) {
  const Chunk chunk = a.chunks[blockIdx.x];
  const void* grad = a.grads[chunk.row];
  const Dtype type = a.rows[chunk.row].grad_type;
  const bool vector = aligned(grad, type);
  double sum = 0;
  for (int at = static_cast<int>(threadIdx.x) * kWidth; at < chunk.count; at += kTile) {
    const int n = chunk.count - at;
    double g[kWidth];
    if (type == Dtype::f64) {
      StoredWide s;
      fetch(&s, grad, type, chunk.begin + at, n, false);
      decode<true>(g, s, type, 0);
    } else {
      float narrow[kWidth];
      decode<true>(narrow, fetch(grad, type, chunk.begin + at, n, vector && n >= kWidth), type, 0);
#pragma unroll
      for (int k = 0; k < kWidth; k++) g[k] = narrow[k];
    }
#pragma unroll
    for (int k = 0; k < kWidth; k++)
      if (k < n) sum += g[k] * g[k];
  }
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
cudaError_t launch(const CudaUpdateArgs& a, cudaStream_t stream) {
  const unsigned narrow = static_cast<unsigned>(a.float_chunks);
  const unsigned wide = static_cast<unsigned>(a.chunk_count - a.float_chunks);
  if (a.max_grad_norm > 0) {
    if (narrow + wide) gradient_norm_kernel<<<narrow + wide, kThreads, 0, stream>>>(a);
    clip_kernel<<<1, kReduceThreads, 0, stream>>>(a);
  }
  if (narrow) update_kernel<Rule, float><<<narrow, kThreads, 0, stream>>>(a, 0);
  if (wide) update_kernel<Rule, double><<<wide, kThreads, 0, stream>>>(a, a.float_chunks);
  finish_kernel<<<1, kReduceThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t anchored_adamw_cuda(const CudaUpdateArgs& args, cudaStream_t stream) {
  return launch<AdamW>(args, stream);
}

cudaError_t anchored_sgd_cuda(const CudaUpdateArgs& args, cudaStream_t stream) {
  return launch<Sgd>(args, stream);
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
