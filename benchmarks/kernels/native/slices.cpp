// Two builds of the CPU update and the memory floor, in turn on slices of the same tensors; built
// and called by ../builds/slices.py. A slice takes less than a time slice of the system, so that
// quantiles hold on a busy machine too.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "anchored_kernels.h"
#include "instruction_set.h"

#define TABLE FAST_WITH_ISA(anchored_kernels_)

namespace before {  // the other tree, compiled with -Dfast=before
struct AnchoredKernels;
const AnchoredKernels& TABLE();
}  // namespace before

namespace {

using fast::AnchoredKernels;
using fast::Chunk;
using fast::Dtype;

constexpr int64_t kCount = 8192 * 768, kSlice = 8192 * 32, kTile = 64;
constexpr int kRounds = 60;

struct Case {
  const char* name;
  Dtype moments, anchor, curvature;  // none: absent
  bool clip;
};

constexpr Case kCases[] = {
    {"AdamW", Dtype::f32, Dtype::none, Dtype::none, false},
    {"+ anchor + curvature + norms", Dtype::f32, Dtype::f32, Dtype::f32, false},
    {"whole job", Dtype::f32, Dtype::f32, Dtype::f32, true},
    {"AdamW, bf16 state", Dtype::bf16, Dtype::none, Dtype::none, false},
    {"whole job, bf16 state", Dtype::bf16, Dtype::bf16, Dtype::bf16, true},
    {"AdamW, 8-bit state", Dtype::codes8, Dtype::none, Dtype::none, false},
    {"whole job, 8-bit state", Dtype::codes8, Dtype::bf16, Dtype::codes8, true},
};

int64_t width(Dtype type) {
  return type == Dtype::f32 ? 4 : type == Dtype::bf16 ? 2 : type == Dtype::none ? 0 : 1;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

uint64_t read(const char* from, int64_t bytes) {
  const auto* words = reinterpret_cast<const uint64_t*>(from);
  uint64_t digest = 0;
#pragma omp simd reduction(^ : digest)
  for (int64_t i = 0; i < bytes / 8; i++) digest ^= words[i];
  return digest;
}

void rewrite(char* at, int64_t bytes, uint64_t mask) {
  auto* words = reinterpret_cast<uint64_t*>(at);
#pragma omp simd
  for (int64_t i = 0; i < bytes / 8; i++) words[i] ^= mask;
}

// The tensors of a case: weights, gradients, two moments, anchor and curvature. Moments and
// curvature of other magnitudes would take the same time.
struct Tensors {
  char* streams[6];
  int64_t widths[6];
  std::vector<float> scales;
  fast::Row row{};
  float step = 101;

  explicit Tensors(const Case& c) : scales(kCount / fast::kCodeBlock, 1e-10f) {
    const Dtype types[6] = {Dtype::f32, Dtype::f32, c.moments, c.moments, c.anchor, c.curvature};
    for (int k = 0; k < 6; k++) {
      widths[k] = width(types[k]);
      streams[k] = widths[k] ? static_cast<char*>(std::aligned_alloc(64, kCount * 4)) : nullptr;
      for (int64_t i = 0; i < kCount && widths[k]; i++) {
        const float x = 1e-4f * static_cast<float>(1 + i * 7919 % 1000);
        const uint16_t half = fast::to_bf16(x);
        if (types[k] == Dtype::f32) std::memcpy(streams[k] + i * 4, &x, 4);
        if (types[k] == Dtype::bf16) std::memcpy(streams[k] + i * 2, &half, 2);
        if (types[k] == Dtype::codes8) streams[k][i] = static_cast<char>(1 + i * 7919 % 255);
      }
    }
    row.param = streams[0], row.grad = streams[1];
    row.moment[0] = streams[2], row.moment[1] = streams[3];
    row.anchor = streams[4], row.curvature = streams[5];
    row.scale[0] = row.scale[1] = scales.data();
    row.curvature_scale = scales.data();
    row.step = &step, row.numel = kCount;
    row.param_type = row.grad_type = Dtype::f32;
    row.moment_type[0] = row.moment_type[1] = c.moments;
    row.anchor_type = c.anchor, row.curvature_type = c.curvature;
  }
  ~Tensors() {
    for (char* stream : streams) std::free(stream);
  }
};

volatile double sink;
volatile uint64_t digest;

void update(const AnchoredKernels& kernels, Tensors& t, int64_t begin, bool norm) {
  static const double hyper[] = {1e-3, 0.9, 0.999, 1e-8, 0.01, 10, 0};
  static const fast::AdamW<double> rule(hyper, 101, 1);
  double sums[fast::kStats];
  for (int64_t i = begin; i < begin + kSlice; i += fast::kChunk) {
    const Chunk chunk{i, 0, static_cast<int32_t>(fast::kChunk)};
    if (norm)
      sink = sink + kernels.squares(t.row, chunk);
    else
      kernels.adamw(t.row, chunk, rule, 7, 101, sums);
  }
}

void walk(Tensors& t, int64_t begin, bool norm) {
  static volatile uint64_t zero = 0;  // the compiler must not know
  const uint64_t mask = zero;
  for (int64_t i = begin; i < begin + kSlice; i += kTile)
    for (int k = 0; k < 6; k++) {
      char* at = t.streams[k] + i * t.widths[k];
      if (!t.widths[k] || (norm && k != 1)) continue;
      if (norm || k == 1 || k > 3)
        digest = digest ^ read(at, kTile * t.widths[k]);
      else
        rewrite(at, kTile * t.widths[k], mask);
    }
}

}  // namespace

// Prints name, and the lower quartiles of ns per element: before, after, floor; then the medians of
// the ratios within a round: after / before, before / floor, after / floor.
int main() {
  const AnchoredKernels* kernels[] = {&reinterpret_cast<const AnchoredKernels&>(before::TABLE()),
                                      &fast::TABLE()};
  for (const Case& c : kCases) {
    Tensors tensors(c);
    std::vector<double> times[3], ratios[3];
    int64_t at = 0;
    // Each slice is taken from memory: the one before it is far away by the time it comes again.
    const auto next = [&at] { return at = (at + kSlice) % kCount; };
    for (int round = 0; round < kRounds; round++) {
      double ns[3];
      for (int i = 0; i < 3; i++) {
        const int which = (i + round) % 3;
        ns[which] = 0;
        for (int pass = c.clip ? 0 : 1; pass < 2; pass++) {
          const int64_t begin = next();
          const double start = now();
          if (which == 2)
            walk(tensors, begin, pass == 0);
          else
            update(*kernels[which], tensors, begin, pass == 0);
          ns[which] += (now() - start) / kSlice * 1e9;
        }
        times[which].push_back(ns[which]);
      }
      ratios[0].push_back(ns[1] / ns[0]);
      ratios[1].push_back(ns[0] / ns[2]);
      ratios[2].push_back(ns[1] / ns[2]);
    }
    std::printf("%s", c.name);
    for (auto& t : times) std::sort(t.begin(), t.end()), std::printf("|%.3f", t[kRounds / 4]);
    for (auto& r : ratios) std::sort(r.begin(), r.end()), std::printf("|%.2f", r[kRounds / 2]);
    std::printf("\n");
  }
}
