// The anchored updates of one chunk, compiled once per instruction set (FAST_ISA names it).
//
// Plain loops: with -fno-math-errno -fno-trapping-math the compiler vectorises them, sqrt included,
// and intrinsics measured no faster. Nothing here may have external linkage but the table.

#include <type_traits>

#include "anchored_kernels.h"
#include "instruction_set.h"
#include "storage.h"

namespace fast {
namespace {

struct Sums {
  double gradient = 0, drift = 0, update = 0, forgetting = 0;
};

template <class T>
constexpr bool kHas = !std::is_same_v<T, None>;

// The loop over one stretch of elements. The norms are always summed: they cost nothing beside the
// streams (0.0 to 2 % measured), and without them there would be twice the code.
template <class Rule, class Real, class Moment, class Anchor, class Curvature>
void update(Real* __restrict w, const Real* __restrict g, Moment* __restrict m,
            Moment* __restrict v, const Anchor* __restrict w0, const Curvature* __restrict f, int n,
            const Rule rule, const Draws draws, Sums& sums) {
  Real gradient = 0, drift = 0, change = 0, forgetting = 0;
#pragma omp simd reduction(+ : gradient, drift, change, forgetting)
  for (int i = 0; i < n; i++) {
    const Real old = w[i];
    const Real grad = g[i] * rule.grad_scale;
    Real next;
    if constexpr (!kHas<Moment>) {
      next = rule.plain(old, grad);
    } else if constexpr (Rule::kMoments == 1) {
      Real first = get(m, i), none = 0;
      next = rule(old, grad, first, none);
      put(m, i, first);
    } else {
      Real first = get(m, i), second = get(v, i);
      next = rule(old, grad, first, second);
      put(m, i, first);
      put_second(v, i, second, draws);
    }
    if constexpr (kHas<Anchor>) {
      const Real start = get(w0, i);
      Real c = rule.pull, importance = 1;
      if constexpr (kHas<Curvature>) {
        importance = get(f, i);
        c *= importance;
      }
      next = pull_to(next, start, c);
      const Real away = next - start;
      drift = multiply_add(away, away, drift);
      if constexpr (kHas<Curvature>) forgetting = multiply_add(importance * away, away, forgetting);
    }
    w[i] = next;
    gradient = multiply_add(grad, grad, gradient);
    change = multiply_add(next - old, next - old, change);
  }
  sums.gradient += gradient;
  sums.drift += drift;
  sums.update += change;
  sums.forgetting += kHas<Curvature> ? forgetting : drift;
}

// What one stretch of elements is made of: addresses in the types that the loop is compiled for.
template <class Real>
struct Streams {
  Real* w;
  const Real* g;
  void *m, *v;
  const void *w0, *f;
  bool bf16_moments, bf16_anchor;  // bf16_anchor: anchor and curvature alike
};

template <class Rule, class Real, class Moment, class Compact>
void update_anchored(const Streams<Real>& s, int n, const Rule& rule, const Draws& draws,
                     Sums& sums) {
  auto* m = static_cast<Moment*>(s.m);
  auto* v = static_cast<Moment*>(s.v);
  constexpr const None* none = nullptr;
  const auto with_anchor = [&](auto* w0, auto* f) {
    if (s.f) return update(s.w, s.g, m, v, w0, f, n, rule, draws, sums);
    return update(s.w, s.g, m, v, w0, none, n, rule, draws, sums);
  };
  if (!s.w0) return update(s.w, s.g, m, v, none, none, n, rule, draws, sums);
  if (s.bf16_anchor)
    return with_anchor(static_cast<const Compact*>(s.w0), static_cast<const Compact*>(s.f));
  with_anchor(static_cast<const Real*>(s.w0), static_cast<const Real*>(s.f));
}

template <class Rule, class Real>
void update_any(const Streams<Real>& s, int n, const Rule& rule, const Draws& draws, Sums& sums) {
  // float64 has no compact variant of the loop: its streams are staged.
  using Compact = std::conditional_t<std::is_same_v<Real, float>, Bf16, Real>;
  if (s.bf16_moments) return update_anchored<Rule, Real, Compact, Compact>(s, n, rule, draws, sums);
  if (s.m || Rule::kMoments == 2)
    return update_anchored<Rule, Real, Real, Compact>(s, n, rule, draws, sums);
  if constexpr (Rule::kMoments == 1)
    update_anchored<Rule, Real, None, Compact>(s, n, rule, draws, sums);
}

template <class T>
T* at(const void* tensor, int64_t index) {
  return tensor ? const_cast<T*>(static_cast<const T*>(tensor)) + index : nullptr;
}

// Streams in the dtype of the arithmetic, and the usual bf16 ones, are read and written by the loop
// itself; any other goes through a tile in L1, so that every combination of dtypes works.
template <class Rule, class Real>
void chunk(const Row& row, const Chunk& chunk, const Rule& rule, uint64_t seed, uint32_t step,
           Sums& sums) {
  constexpr bool single = sizeof(Real) == 4;
  constexpr Dtype native = single ? Dtype::f32 : Dtype::f64;
  const auto all_bf16 = [](const void* a, Dtype x, const void* b, Dtype y) {
    return single && a && x == Dtype::bf16 && (!b || y == Dtype::bf16);
  };
  Streams<Real> s{};
  s.bf16_moments = all_bf16(row.moment[0], row.moment_type[0], row.moment[1], row.moment_type[1]);
  s.bf16_anchor = all_bf16(row.anchor, row.anchor_type, row.curvature, row.curvature_type);
  const auto stage = [](const void* t, Dtype type, bool direct) {
    return t && type != native && !direct;
  };
  const bool stage_w = row.param_type != native;
  const bool stage_g = row.grad_type != native;
  const bool stage_m = stage(row.moment[0], row.moment_type[0], s.bf16_moments);
  const bool stage_v = stage(row.moment[1], row.moment_type[1], s.bf16_moments);
  const bool stage_a = stage(row.anchor, row.anchor_type, s.bf16_anchor);
  const bool stage_f = stage(row.curvature, row.curvature_type, s.bf16_anchor);
  const auto place = [](void* t, Dtype type, int64_t i) -> void* {
    return type == Dtype::bf16 ? static_cast<void*>(at<Bf16>(t, i)) : at<Real>(t, i);
  };
  alignas(64) Real tile[6][kTile];
  alignas(64) uint32_t random[kTile];
  const uint32_t key = rounding_key(seed, step, static_cast<uint32_t>(chunk.begin >> 32));
  const int64_t end = chunk.begin + chunk.count;
  const bool any = stage_w || stage_g || stage_m || stage_v || stage_a || stage_f;
  const int stride = any ? kTile : chunk.count;
  for (int64_t i = chunk.begin; i < end; i += stride) {
    const int n = static_cast<int>(end - i < stride ? end - i : stride);
    const Draws draws(key, static_cast<uint32_t>(i));
    uint16_t* high = at<uint16_t>(row.param, i);
    if (row.remainder) {
      load_split(tile[0], high, row.remainder + i, n);
    } else if (stage_w) {
      load<true>(tile[0], row.param, row.param_type, nullptr, i, n);
    }
    if (stage_g) load<true>(tile[1], row.grad, row.grad_type, nullptr, i, n);
    if (stage_m) load<true>(tile[2], row.moment[0], row.moment_type[0], row.scale[0], i, n);
    if (stage_v) load<false>(tile[3], row.moment[1], row.moment_type[1], row.scale[1], i, n);
    if (stage_a) load<true>(tile[4], row.anchor, row.anchor_type, nullptr, i, n);
    if (stage_f) load<false>(tile[5], row.curvature, row.curvature_type, row.curvature_scale, i, n);
    s.w = stage_w ? tile[0] : at<Real>(row.param, i);
    s.g = stage_g ? tile[1] : at<Real>(row.grad, i);
    s.m = stage_m ? tile[2] : place(row.moment[0], row.moment_type[0], i);
    s.v = stage_v ? tile[3] : place(row.moment[1], row.moment_type[1], i);
    s.w0 = stage_a ? tile[4] : place(const_cast<void*>(row.anchor), row.anchor_type, i);
    s.f = stage_f ? tile[5] : place(const_cast<void*>(row.curvature), row.curvature_type, i);
    update_any(s, n, rule, draws, sums);
    if (stage_m || stage_v) fill(random, draws);
    if (row.remainder) {
      store_split(high, row.remainder + i, tile[0], n);
    } else if (stage_w) {
      store<true, false>(row.param, row.param_type, nullptr, i, tile[0], n, nullptr);
    }
    if (stage_m)
      store<true, false>(row.moment[0], row.moment_type[0], row.scale[0], i, tile[2], n, random);
    if (stage_v)
      store<false, true>(row.moment[1], row.moment_type[1], row.scale[1], i, tile[3], n, random);
  }
}

template <template <class> class Rule>
void run(const Row& row, const Chunk& piece, const Rule<double>& rule, uint64_t seed, uint32_t step,
         double* out) {
  Sums sums;
  if (row.param_type == Dtype::f64) {
    chunk<Rule<double>, double>(row, piece, rule, seed, step, sums);
  } else {
    chunk<Rule<float>, float>(row, piece, Rule<float>(rule), seed, step, sums);
  }
  out[grad_norm] = sums.gradient;
  out[drift] = sums.drift;
  out[update_norm] = sums.update;
  out[forgetting] = sums.forgetting;
}

// Several sums side by side: one alone waits for its own additions (1.27 times slower in cache,
// 1.16 from memory).
constexpr int kLanes = kVectorBytes / 2;

// Asks for the bytes that are read 8 KB after these: of one stream alone the hardware fetches too
// few ahead (0.42 ns for each float from memory without, 0.30 with, and the same from a cache).
FAST_INLINE void fetch_ahead(const void* from, int64_t bytes) {
  const auto ahead = reinterpret_cast<uintptr_t>(from) + 8192;
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + i), 0, 2);
}

template <bool Ahead, class Real>
double sum_squares(const Real* g, int n) {
  double lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (Ahead) fetch_ahead(g + i, kLanes * sizeof(Real));
#pragma omp simd
    for (int k = 0; k < kLanes; k++) {
      const double x = g[i + k];
      lanes[k] = multiply_add(x, x, lanes[k]);
    }
  }
  double total = 0;
  for (; i < n; i++) total = multiply_add(double{g[i]}, double{g[i]}, total);
  for (const double lane : lanes) total += lane;
  return total;
}

double squares(const Row& row, const Chunk& chunk) {
  if (row.grad_type == Dtype::f64)
    return sum_squares<true>(at<double>(row.grad, chunk.begin), chunk.count);
  if (row.grad_type == Dtype::f32)
    return sum_squares<true>(at<float>(row.grad, chunk.begin), chunk.count);
  double total = 0;
  alignas(64) float tile[kTile];
  for (int begin = 0; begin < chunk.count; begin += kTile) {
    const int n = chunk.count - begin < kTile ? chunk.count - begin : kTile;
    fetch_ahead(at<uint16_t>(row.grad, chunk.begin + begin), n * sizeof(uint16_t));
    load<true>(tile, row.grad, row.grad_type, nullptr, chunk.begin + begin, n);
    total += sum_squares<false>(tile, n);
  }
  return total;
}

}  // namespace

const AnchoredKernels& FAST_WITH_ISA(anchored_kernels_)() {
  static constexpr AnchoredKernels table = {run<AdamW>, run<Sgd>, squares};
  return table;
}

}  // namespace fast
