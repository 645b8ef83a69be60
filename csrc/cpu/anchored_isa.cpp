// The anchored updates of one chunk, compiled once per instruction set (FAST_ISA names it).
//
// Plain loops: with -fno-math-errno -fno-trapping-math the compiler vectorises them, sqrt included,
// and intrinsics measured no faster. Nothing here may have external linkage but the table.

#include "anchored_kernels.h"
#include "storage.h"

namespace fast {
namespace {

struct Sums {
  double gradient = 0, drift = 0, update = 0, forgetting = 0;
};

template <class Rule, bool HasMoments, bool HasAnchor, bool HasCurvature, bool HasSums, class Real>
void update(Real* __restrict w, const Real* __restrict g, Real* __restrict m, Real* __restrict v,
            const Real* __restrict w0, const Real* __restrict f, int n, const Rule rule,
            Sums* sums) {
  Real gradient = 0, drift = 0, change = 0, forgetting = 0;
#pragma omp simd reduction(+ : gradient, drift, change, forgetting)
  for (int i = 0; i < n; i++) {
    const Real old = w[i];
    const Real grad = g[i] * rule.grad_scale;
    Real next;
    if constexpr (!HasMoments) {
      next = rule.plain(old, grad);
    } else {
      Real first = m[i], second = Rule::kMoments > 1 ? v[i] : Real(0);
      next = rule(old, grad, first, second);
      m[i] = first;
      if constexpr (Rule::kMoments > 1) v[i] = second;
    }
    if constexpr (HasAnchor) {
      const Real c = HasCurvature ? rule.pull * f[i] : rule.pull;
      next = pull_to(next, w0[i], c);
    }
    w[i] = next;
    if constexpr (HasSums) {
      gradient = multiply_add(grad, grad, gradient);
      change = multiply_add(next - old, next - old, change);
      if constexpr (HasAnchor) {
        const Real away = next - w0[i];
        drift = multiply_add(away, away, drift);
        if constexpr (HasCurvature) forgetting = multiply_add(f[i] * away, away, forgetting);
      }
    }
  }
  if constexpr (HasSums) {
    sums->gradient += gradient;
    sums->drift += drift;
    sums->update += change;
    sums->forgetting += HasCurvature ? forgetting : drift;
  }
}

template <class Rule, bool HasMoments, class Real>
void update_any(Real* w, const Real* g, Real* m, Real* v, const Real* w0, const Real* f, int n,
                const Rule& rule, Sums* sums) {
  if (sums) {
    if (!w0) return update<Rule, HasMoments, false, false, true>(w, g, m, v, w0, f, n, rule, sums);
    if (!f) return update<Rule, HasMoments, true, false, true>(w, g, m, v, w0, f, n, rule, sums);
    return update<Rule, HasMoments, true, true, true>(w, g, m, v, w0, f, n, rule, sums);
  }
  if (!w0) return update<Rule, HasMoments, false, false, false>(w, g, m, v, w0, f, n, rule, sums);
  if (!f) return update<Rule, HasMoments, true, false, false>(w, g, m, v, w0, f, n, rule, sums);
  return update<Rule, HasMoments, true, true, false>(w, g, m, v, w0, f, n, rule, sums);
}

template <class Real>
constexpr Dtype kNative = sizeof(Real) == 8 ? Dtype::f64 : Dtype::f32;

template <class Real>
Real* at(const void* tensor, int64_t index) {
  return tensor ? const_cast<Real*>(static_cast<const Real*>(tensor)) + index : nullptr;
}

// Streams that are stored in the dtype of the arithmetic are used in place, the others through a
// tile in L1; the arithmetic is the same code for every combination of dtypes.
template <class Rule, class Real>
void chunk(const Row& row, const Chunk& chunk, const Rule& rule, uint64_t seed, uint32_t step,
           Sums* sums) {
  const Dtype native = kNative<Real>;
  const bool moments = row.moment[0] != nullptr;
  const bool two = Rule::kMoments > 1;
  const bool staged_w = row.param_type != native || row.remainder;
  const bool staged_g = row.grad_type != native;
  const bool staged_m = moments && row.moment_type[0] != native;
  const bool staged_v = two && row.moment_type[1] != native;
  const bool staged_a = row.anchor && row.anchor_type != native;
  const bool staged_f = row.curvature && row.curvature_type != native;
  const bool staged = staged_w || staged_g || staged_m || staged_v || staged_a || staged_f;
  alignas(64) Real tile[6][kTile];
  const uint32_t key = rounding_key(seed, step, static_cast<uint32_t>(chunk.begin >> 32));
  const int64_t end = chunk.begin + chunk.count;
  const int stride = staged ? kTile : chunk.count;
  for (int64_t i = chunk.begin; i < end; i += stride) {
    const int n = static_cast<int>(end - i < stride ? end - i : stride);
    const Draws draws{key, static_cast<uint32_t>(i)};
    Real* w = staged_w ? tile[0] : at<Real>(row.param, i);
    const Real* g = staged_g ? tile[1] : at<Real>(row.grad, i);
    Real* m = staged_m ? tile[2] : at<Real>(row.moment[0], i);
    Real* v = staged_v ? tile[3] : at<Real>(row.moment[1], i);
    const Real* w0 = staged_a ? tile[4] : at<Real>(row.anchor, i);
    const Real* f = staged_f ? tile[5] : at<Real>(row.curvature, i);
    uint16_t* high = at<uint16_t>(row.param, i);
    if (row.remainder) {
      load_split(tile[0], high, row.remainder + i, n);
    } else if (staged_w) {
      load<true>(tile[0], row.param, row.param_type, nullptr, i, n);
    }
    if (staged_g) load<true>(tile[1], row.grad, row.grad_type, nullptr, i, n);
    if (staged_m) load<true>(tile[2], row.moment[0], row.moment_type[0], row.scale[0], i, n);
    if (staged_v) load<false>(tile[3], row.moment[1], row.moment_type[1], row.scale[1], i, n);
    if (staged_a) load<true>(tile[4], row.anchor, row.anchor_type, nullptr, i, n);
    if (staged_f)
      load<false>(tile[5], row.curvature, row.curvature_type, row.curvature_scale, i, n);
    if (moments) {
      update_any<Rule, true>(w, g, m, v, w0, f, n, rule, sums);
    } else if constexpr (Rule::kMoments == 1) {
      update_any<Rule, false>(w, g, m, v, w0, f, n, rule, sums);
    }
    if (row.remainder) {
      store_split(high, row.remainder + i, tile[0], n);
    } else if (staged_w) {
      store<true, false>(row.param, row.param_type, nullptr, i, tile[0], n, draws);
    }
    if (staged_m)
      store<true, false>(row.moment[0], row.moment_type[0], row.scale[0], i, tile[2], n, draws);
    if (staged_v)
      store<false, true>(row.moment[1], row.moment_type[1], row.scale[1], i, tile[3], n, draws);
  }
}

template <template <class> class Rule>
void run(const Row& row, const Chunk& piece, const Rule<double>& rule, uint64_t seed, uint32_t step,
         double* out) {
  Sums sums;
  if (row.param_type == Dtype::f64) {
    chunk<Rule<double>, double>(row, piece, rule, seed, step, out ? &sums : nullptr);
  } else {
    chunk<Rule<float>, float>(row, piece, Rule<float>(rule), seed, step, out ? &sums : nullptr);
  }
  if (out) {
    out[grad_norm] = sums.gradient;
    out[drift] = sums.drift;
    out[update_norm] = sums.update;
    out[forgetting] = sums.forgetting;
  }
}

double squares(const Row& row, const Chunk& chunk) {
  double total = 0;
  if (row.grad_type == Dtype::f32 || row.grad_type == Dtype::f64) {
    const int n = chunk.count;
    if (row.grad_type == Dtype::f64) {
      const double* g = at<double>(row.grad, chunk.begin);
#pragma omp simd reduction(+ : total)
      for (int i = 0; i < n; i++) total += g[i] * g[i];
    } else {
      const float* g = at<float>(row.grad, chunk.begin);
#pragma omp simd reduction(+ : total)
      for (int i = 0; i < n; i++) total += static_cast<double>(g[i]) * static_cast<double>(g[i]);
    }
    return total;
  }
  alignas(64) float tile[kTile];
  for (int begin = 0; begin < chunk.count; begin += kTile) {
    const int n = chunk.count - begin < kTile ? chunk.count - begin : kTile;
    load<true>(tile, row.grad, row.grad_type, nullptr, chunk.begin + begin, n);
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < n; i++)
      total += static_cast<double>(tile[i]) * static_cast<double>(tile[i]);
  }
  return total;
}

}  // namespace

#define FAST_JOIN_(a, b) a##b
#define FAST_JOIN(a, b) FAST_JOIN_(a, b)

const AnchoredKernels& FAST_JOIN(anchored_kernels_, FAST_ISA)() {
  static constexpr AnchoredKernels table = {run<AdamW>, run<Sgd>, squares};
  return table;
}

}  // namespace fast
