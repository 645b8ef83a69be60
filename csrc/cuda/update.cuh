// The update kernel, compiled for one combination of dtypes or for any; the rules are
// csrc/include/fast/update.h.
//
// Built with -fmad=false: products are fused where multiply_add says so, as on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "fast/anchored_cuda.h"
#include "fast/update.h"
#include "storage.cuh"

namespace fast {

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

// The hyper-parameters of one tensor in `Real`, derived by one thread: pow in double is expensive.
template <class Rule, class Wide>
__device__ __forceinline__ Rule derive(const CudaUpdateArgs& a, const Row& row, double scale) {
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
                                     bool has_moments, bool has_anchor, Real w0, bool has_curvature,
                                     Real f, Sums<Real>& sums) {
  g *= rule.grad_scale;
  Real next;
  if constexpr (Rule::kMoments == 1) {
    next = has_moments ? rule(old, g, m, v) : rule.plain(old, g);
  } else {
    next = rule(old, g, m, v);
  }
  if (has_anchor) next = pull_to(next, w0, has_curvature ? rule.pull * f : rule.pull);
  sums.gradient = multiply_add(g, g, sums.gradient);
  sums.change = multiply_add(next - old, next - old, sums.change);
  if (has_anchor) {
    const Real away = next - w0;
    sums.drift = multiply_add(away, away, sums.drift);
    if (has_curvature) sums.forgetting = multiply_add(f * away, away, sums.forgetting);
  }
  return next;
}

template <class Real>
__device__ void store_sums(const CudaUpdateArgs& a, int64_t chunk, Sums<Real> sums,
                           bool has_curvature) {
  const Real gradient = block_sum<kThreads>(sums.gradient), drift = block_sum<kThreads>(sums.drift),
             change = block_sum<kThreads>(sums.change),
             forgetting = block_sum<kThreads>(has_curvature ? sums.forgetting : sums.drift);
  if (threadIdx.x) return;
  const int64_t n = a.chunk_count;
  if (!(a.max_grad_norm > 0)) a.partial[grad_norm * n + chunk] = gradient;
  a.partial[Stat::drift * n + chunk] = drift;
  a.partial[update_norm * n + chunk] = change;
  a.partial[Stat::forgetting * n + chunk] = forgetting;
}

// What a kernel knows of its rows: nothing, or all of their dtypes. Both moments have one type, and
// what is absent has none.
struct NoTable {
  __device__ __forceinline__ void fill() {}
};

struct Any {
  using Lookup = NoTable;
  static constexpr int kBlocks = 4;
  static __device__ __forceinline__ Row of(const Row& row) { return row; }
  static __device__ __forceinline__ bool split(const Row& row) { return row.remainder; }
};

template <Dtype Param, Dtype Grad, bool Split, Dtype Moment, Dtype Anchor, Dtype Curvature>
struct Fixed {
  using Lookup = std::conditional_t<Moment == Dtype::codes8, Table, NoTable>;
  static constexpr int kBlocks = 8;
  static __device__ __forceinline__ Row of(Row row) {
    row.param_type = Param;
    row.grad_type = Grad;
    row.moment_type[0] = row.moment_type[1] = Moment;
    row.anchor_type = Anchor;
    row.curvature_type = Curvature;
    return row;
  }
  static __device__ __forceinline__ bool split(const Row&) { return Split; }
};

// The row from element `begin` on, where a code block begins.
__device__ __forceinline__ Row from(Row row, int64_t begin) {
  const auto move = [begin](auto*& p, Dtype type) {
    using Pointer = std::remove_reference_t<decltype(p)>;
    p = (Pointer)((uintptr_t)p + begin * size_of(type));
  };
  move(row.param, row.param_type);
  move(row.grad, row.grad_type);
  move(row.remainder, Dtype::bf16);
  move(row.anchor, row.anchor_type);
  move(row.curvature, row.curvature_type);
  for (int k = 0; k < 2; k++) {
    move(row.moment[k], row.moment_type[k]);
    row.scale[k] += begin / kCodeBlock;
  }
  row.curvature_scale += begin / kCodeBlock;
  return row;
}

// Whether every stream can be loaded four elements at once.
__device__ __forceinline__ bool are_aligned(const Row& row) {
  return is_aligned(row.param, row.param_type) && is_aligned(row.grad, row.grad_type) &&
         is_aligned(row.remainder, Dtype::bf16) && is_aligned(row.moment[0], row.moment_type[0]) &&
         is_aligned(row.moment[1], row.moment_type[1]) && is_aligned(row.anchor, row.anchor_type) &&
         is_aligned(row.curvature, row.curvature_type);
}

// kTile elements of a chunk, of which `count` are there: all of them, and every stream aligned, if
// `Whole`. Every thread runs every tile: warps share the scales of codes.
template <bool Whole, class Rule, class Lookup, class Real>
__device__ __forceinline__ void update_tile(const Row& row, const Rule& rule, const Lookup& lookup,
                                            int at, int count, bool vector, bool split,
                                            uint32_t key, Sums<Real>& sums) {
  constexpr bool two = Rule::kMoments > 1;
  const bool has_moments = row.moment_type[0] != Dtype::none;
  const bool has_anchor = row.anchor_type != Dtype::none;
  const bool has_curvature = has_anchor && row.curvature_type != Dtype::none;
  const int i = at + static_cast<int>(threadIdx.x) * kWidth;
  const int n = Whole ? kWidth : count - i;
  const bool whole = Whole || (vector && n >= kWidth);
  const unsigned block = static_cast<unsigned>(i) / kCodeBlock;
  typename RawOf<Real>::Type sw, sg, sr = {}, sm = {}, sv = {}, sa = {}, sf = {};
  fetch(&sw, row.param, row.param_type, i, n, whole);
  fetch(&sg, row.grad, row.grad_type, i, n, whole);
  if (split) fetch(&sr, row.remainder, Dtype::bf16, i, n, whole);
  if (has_moments) fetch(&sm, row.moment[0], row.moment_type[0], i, n, whole);
  if (two) fetch(&sv, row.moment[1], row.moment_type[1], i, n, whole);
  if (has_anchor) fetch(&sa, row.anchor, row.anchor_type, i, n, whole);
  if (has_curvature) fetch(&sf, row.curvature, row.curvature_type, i, n, whole);
  const auto scale_of = [&](const float* scales, Dtype type) {
    return type == Dtype::codes8 && n > 0 ? fetch_scale(scales, block) : 0.0f;
  };
  const float scale_m = has_moments ? scale_of(row.scale[0], row.moment_type[0]) : 0.0f;
  const float scale_v = two ? scale_of(row.scale[1], row.moment_type[1]) : 0.0f;
  const float scale_f = has_curvature ? scale_of(row.curvature_scale, row.curvature_type) : 0.0f;
  Real w[kWidth], g[kWidth], m[kWidth] = {}, v[kWidth] = {}, w0[kWidth] = {}, f[kWidth] = {};
  decode<true>(w, sw, row.param_type, 0);
  if constexpr (sizeof(Real) == 4) {
#pragma unroll
    for (int k = 0; k < kWidth; k++)
      if (split) w[k] = join_bf16(half_of(sw, k), static_cast<int16_t>(half_of(sr, k)));
  }
  decode<true>(g, sg, row.grad_type, 0);
  if constexpr (std::is_same_v<Lookup, Table>)
    lookup.decode(m, sm, scale_m);
  else if (has_moments)
    decode<true>(m, sm, row.moment_type[0], scale_m);
  if (two) decode<false>(v, sv, row.moment_type[1], scale_v);
  if (has_anchor) decode<true>(w0, sa, row.anchor_type, 0);
  if (has_curvature) decode<false>(f, sf, row.curvature_type, scale_f);
#pragma unroll
  for (int k = 0; k < kWidth; k++)
    if (k < n)
      w[k] = step(rule, w[k], g[k], m[k], v[k], has_moments, has_anchor, w0[k], has_curvature, f[k],
                  sums);
  if (split) {
    Raw high = {}, low = {};
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
  if (has_moments)
    keep<true, false>(m, row.moment[0], row.moment_type[0], row.scale[0], i, n, whole, key);
  if (two) keep<false, true>(v, row.moment[1], row.moment_type[1], row.scale[1], i, n, whole, key);
}

// A block per chunk; `first` is the chunk of block 0. Rows are copied: what the kernel writes might
// be the table, as far as the compiler knows, which would read it again at every tile.
template <template <class> class Rule, class Real, class Kind>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? Kind::kBlocks : 1)
    update_kernel(const CudaUpdateArgs a, int64_t first) {
  bool skip;
  const double scale = gradient_scale(a, &skip);
  if (skip) return;
  const Chunk chunk = a.chunks[first + blockIdx.x];
  Row row = Kind::of(a.rows[chunk.row]);
  row.grad = a.grads[chunk.row];
  const bool split = sizeof(Real) == 4 && Kind::split(row);
  const bool vector = !std::is_same_v<Kind, Any> || are_aligned(row);
  __shared__ typename Kind::Lookup lookup;
  lookup.fill();  // before the barrier of derive
  const Rule<Real> rule = derive<Rule<Real>, Rule<double>>(a, row, scale);
  // Element i of the chunk draws mix32(i ^ key): `begin` has no bits of i.
  const uint32_t count = whole_step(*row.step + 1.0f);
  const uint32_t key = rounding_key(a.seed, count, static_cast<uint32_t>(chunk.begin >> 32)) ^
                       static_cast<uint32_t>(chunk.begin);
  row = from(row, chunk.begin);
  Sums<Real> sums;
  int at = 0;
  if constexpr (std::is_same_v<Kind, Any>) {
    for (; at < chunk.count; at += kTile)
      update_tile<false>(row, rule, lookup, at, chunk.count, vector, split, key, sums);
  } else {
    for (; at + kTile <= chunk.count; at += kTile)
      update_tile<true>(row, rule, lookup, at, chunk.count, vector, split, key, sums);
    if (at < chunk.count)
      update_tile<false>(row, rule, lookup, at, chunk.count, vector, split, key, sums);
  }
  if (a.stats)
    store_sums(a, first + blockIdx.x, sums,
               row.anchor_type != Dtype::none && row.curvature_type != Dtype::none);
}

}  // namespace fast
