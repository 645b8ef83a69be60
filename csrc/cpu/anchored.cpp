// One parallel region per step over the chunks of all tensors; the chunks' code is in anchored_isa.

#include <algorithm>
#include <cmath>
#include <vector>

#include "anchored_kernels.h"
#include "instruction_set.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fast {
namespace {

// Below this many elements the other threads cost more than they bring.
constexpr int64_t kParallelFrom = 32768;

double sum(const double* partial, int64_t count, int stat) {
  double total = 0;
  for (int64_t i = 0; i < count; i++) total += partial[i * kStats + stat];
  return total;
}

// `columns`: of the hyper table of a rule, whose kernel is `update`.
template <class Rule>
void step(const UpdateArgs& a, int columns,
          void (*update)(const Row&, const Chunk&, const Rule&, uint64_t, uint32_t, double*)) {
  const auto squares = FAST_BEST(anchored_kernels_).squares;
  const bool clip = a.max_grad_norm > 0;
  std::vector<Rule> rules(a.row_count);
  std::vector<int64_t> before(a.chunk_count + 1, 0);  // elements before each chunk
  for (int64_t i = 0; i < a.chunk_count; i++) before[i + 1] = before[i] + a.chunks[i].count;
  const int64_t elements = before[a.chunk_count];
  double norm = 0;
  bool skip = false;

  // Every thread takes the chunks that begin in its share of the elements.
  const auto first_chunk = [&](int64_t thread, int64_t threads) {
    const int64_t from = elements * thread / threads;
    return std::lower_bound(before.begin(), before.end() - 1, from) - before.begin();
  };
  const auto derive_rules = [&] {
    double scale = 1 / a.grad_scale;
    if (clip) {
      norm = std::sqrt(sum(a.partial, a.chunk_count, grad_norm)) * scale;
      skip = a.has_grad_scale && !std::isfinite(norm);
      const double coefficient = a.max_grad_norm / (norm + 1e-6);  // torch's clip_grad_norm_
      if (!(coefficient >= 1)) scale *= coefficient;  // NaN clips too: it must reach the weights
    }
    for (int64_t i = 0; i < a.row_count && !skip; i++) {
      const Row& row = a.rows[i];
      const float count = *row.step + 1;
      const bool same = i && a.rows[i - 1].group == row.group && *a.rows[i - 1].step == count;
      rules[i] = same ? rules[i - 1] : Rule(a.hyper + row.group * columns, count, scale);
      *row.step = count;
    }
  };

  const int threads = elements < kParallelFrom ? 1 : a.threads;
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
    const int thread = 0, team = 1;
#endif
    const int64_t begin = first_chunk(thread, team), end = first_chunk(thread + 1, team);
    if (clip) {
      for (int64_t c = begin; c < end; c++)
        a.partial[c * kStats + grad_norm] = squares(a.rows[a.chunks[c].row], a.chunks[c]);
#pragma omp barrier
    }
#pragma omp single
    derive_rules();
    for (int64_t c = begin; c < end && !skip; c++) {
      const Row& row = a.rows[a.chunks[c].row];
      update(row, a.chunks[c], rules[a.chunks[c].row], a.seed, whole_step(*row.step),
             a.partial + c * kStats);
    }
  }
  if (skip || !a.stats) return;
  a.stats[grad_norm] = clip ? norm : std::sqrt(sum(a.partial, a.chunk_count, grad_norm));
  a.stats[drift] = std::sqrt(sum(a.partial, a.chunk_count, drift));
  a.stats[update_norm] = std::sqrt(sum(a.partial, a.chunk_count, update_norm));
  a.stats[forgetting] = 0.5 * sum(a.partial, a.chunk_count, forgetting);
}

}  // namespace

void anchored_adamw_cpu(const UpdateArgs& args) {
  step<AdamW<double>>(args, adamw_column::count, FAST_BEST(anchored_kernels_).adamw);
}

void anchored_sgd_cpu(const UpdateArgs& args) {
  step<Sgd<double>>(args, sgd_column::count, FAST_BEST(anchored_kernels_).sgd);
}

}  // namespace fast
