// Rows of the cross-entropy Hessian, compiled once per instruction set (FAST_ISA names it).

#include "fast/cross_entropy.h"
#include "fast/numeric.h"
#include "instruction_set.h"

namespace fast {
namespace {

// Sums over this many elements are taken in the dtype, and added up in double: one float sum over
// 1000 classes was 3 times as far from the truth as torch's.
constexpr int64_t kStretch = 128;

// Rows of at most so many classes are summed beside each other: most of the time of one alone went
// into the sum of its lanes.
constexpr int kNarrow = 15;
constexpr int kRows = static_cast<int>(kRowBlock);

// Vectors of N lanes.
template <int N, class Real>
struct Lanes {
  typedef Real Vector __attribute__((vector_size(N * sizeof(Real))));

  FAST_INLINE static Vector load(const Real* from) {
    Vector v;
    memcpy(&v, from, sizeof(v));
    return v;
  }

  // v with 0 in all but its last n lanes.
  FAST_INLINE static Vector last(Vector v, int n) {
    Vector place;
    for (int k = 0; k < N; k++) place[k] = Real(k);
    return place < Real(N - n) ? Vector{} : v;
  }

  // In pairs: `omp simd reduction` adds one lane after another, and each waits for the last.
  FAST_INLINE static Real sum(Vector v) {
    if constexpr (N == 2) {
      return v[0] + v[1];
    } else {
      using Half = Lanes<N / 2, Real>;
      typename Half::Vector halves[2];
      memcpy(halves, &v, sizeof(v));
      return Half::sum(halves[0] + halves[1]);
    }
  }
};

// sum of p (u - shift)^Power. What does not fill a vector is taken with the classes before it,
// which are left out.
template <int Power, class Real>
double moment(const Real* p, const Real* u, Real shift, int64_t n) {
  constexpr int count = kVectorBytes / sizeof(Real);
  using L = Lanes<count, Real>;
  const auto term = [](auto weight, auto d) { return Power == 1 ? weight * d : weight * d * d; };
  const auto terms = [&](int64_t i) { return term(L::load(p + i), L::load(u + i) - shift); };
  double total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = i + kStretch < n ? i + kStretch : n;
    typename L::Vector even = {}, odd = {};
    for (; i + 2 * count <= end; i += 2 * count) {
      even += terms(i);
      odd += terms(i + count);
    }
    if (i + count <= end) {
      even += terms(i);
      i += count;
    }
    Real few = 0;
    if (i < end && end >= count) {
      odd += L::last(terms(end - count), static_cast<int>(end - i));
    } else {
      for (; i < end; i++) few += term(p[i], u[i] - shift);
    }
    i = end;
    total += static_cast<double>(L::sum(even + odd) + few);
  }
  return total;
}

// The row of p stays in L1 while the K rows of u pass by.
template <class Real>
void wide_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end, double* quad) {
  const int64_t classes = args.classes;
  for (int64_t n = begin; n < end; n++) {
    const Real* __restrict p = static_cast<const Real*>(args.p) + n * classes;
    const Real a = static_cast<const Real*>(args.scale)[n];
    for (int64_t k = 0; k < args.vectors; k++) {
      Real* __restrict u = static_cast<Real*>(args.u) + (k * args.rows + n) * classes;
      const Real mean = static_cast<Real>(moment<1>(p, u, Real(0), classes));
      if (quad) {
        quad[k] += static_cast<double>(a) * moment<2>(p, u, mean, classes);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < classes; i++) u[i] = a * p[i] * (u[i] - mean);
      }
    }
  }
}

// to[k] += from(k) for every row k.
template <class Real, class From>
FAST_INLINE void add(Real* __restrict to, From from) {
#pragma omp simd
  for (int k = 0; k < kRows; k++) to[k] += from(k);
}

// to[i][r] = from[r][i]
template <class Real>
void transpose(Real (*__restrict to)[kRows], const Real* __restrict from, int classes) {
  for (int i = 0; i < classes; i++) {
#pragma omp simd
    for (int r = 0; r < kRows; r++) to[i][r] = from[r * classes + i];
  }
}

// kRows rows of at most kNarrow classes: a lane for each row.
template <class Real>
void narrow_rows(const CrossEntropyArgs& args, int64_t begin, double* quad) {
  const int classes = static_cast<int>(args.classes);
  const Real* const a = static_cast<const Real*>(args.scale) + begin;
  alignas(64) Real p[kNarrow][kRows], u[kNarrow][kRows];
  transpose(p, static_cast<const Real*>(args.p) + begin * classes, classes);
  for (int64_t k = 0; k < args.vectors; k++) {
    Real* const at = static_cast<Real*>(args.u) + (k * args.rows + begin) * classes;
    transpose(u, at, classes);
    alignas(64) Real mean[kRows] = {}, form[kRows] = {};
    for (int i = 0; i < classes; i++) add(mean, [&](int r) { return p[i][r] * u[i][r]; });
    for (int i = 0; i < classes; i++) {
      if (quad) {
        add(form, [&](int r) {
          const Real d = u[i][r] - mean[r];
          return p[i][r] * d * d;
        });
      } else {
#pragma omp simd
        for (int r = 0; r < kRows; r++) at[r * classes + i] = a[r] * p[i][r] * (u[i][r] - mean[r]);
      }
    }
    if (quad)
      for (int r = 0; r < kRows; r++)
        quad[k] += static_cast<double>(a[r]) * static_cast<double>(form[r]);
  }
}

template <class Real>
void rows(const CrossEntropyArgs& args, int64_t begin, int64_t end, double* quad) {
  if (args.classes <= kNarrow && end - begin == kRows) return narrow_rows<Real>(args, begin, quad);
  wide_rows<Real>(args, begin, end, quad);
}

void any_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end, double* quad) {
  if (args.f64) return rows<double>(args, begin, end, quad);
  rows<float>(args, begin, end, quad);
}

}  // namespace

const CrossEntropyKernels& FAST_WITH_ISA(cross_entropy_kernels_)() {
  static constexpr CrossEntropyKernels table = {any_rows};
  return table;
}

}  // namespace fast
