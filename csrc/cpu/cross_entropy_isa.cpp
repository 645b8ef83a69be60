// Rows of the cross-entropy Hessian, compiled once per instruction set (FAST_ISA names it).

#include "fast/cross_entropy.h"
#include "instruction_set.h"

namespace fast {
namespace {

// Sums over this many elements are taken in the dtype, and added up in double: one float sum over
// 1000 classes was 3 times as far from the truth as torch's.
constexpr int64_t kStretch = 128;

// sum of p (u - shift)^Power
template <int Power, class Real>
double moment(const Real* __restrict p, const Real* __restrict u, Real shift, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    const int64_t end = begin + kStretch < n ? begin + kStretch : n;
    Real part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; i++) {
      const Real d = u[i] - shift;
      part += Power == 1 ? p[i] * d : p[i] * d * d;
    }
    total += static_cast<double>(part);
  }
  return total;
}

// The row of p stays in L1 while the K rows of u pass by.
template <class Real>
void rows(const CrossEntropyArgs& args, int64_t begin, int64_t end, double* quad) {
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
