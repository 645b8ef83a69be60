// Arguments of the anchored updates. One row per tensor, one chunk per piece of work; CPU and CUDA
// read the same tables.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fast/numeric.h"

namespace fast {

// A chunk is the unit of work and of the partial sums of the norms: fixed, so that results do not
// depend on the number of threads. 8192 elements x 6 float streams = 192 KB, inside an L2.
constexpr int64_t kChunk = 8192;

struct Row {
  void* param;                   // [numel]
  const void* grad;              // [numel]
  void* moment[2];               // [numel] each, or null
  const void* anchor;            // [numel] or null
  const void* curvature;         // [numel] or null
  float* scale[2];               // [ceil(numel / kCodeBlock)] each: where a moment is codes8
  const float* curvature_scale;  // [ceil(numel / kCodeBlock)]: where the curvature is codes8
  int16_t* remainder;            // [numel] or null: the low bits of a bf16 param
  float* step;                   // [1]
  int64_t numel;
  int32_t group;
  Dtype param_type, grad_type, moment_type[2], anchor_type, curvature_type;
};

struct Chunk {
  int64_t begin;
  int32_t row, count;
};

// plan.py and device_plan.py in fastkernels/ops/update write rows and chunks as words of 8 bytes.
static_assert(sizeof(Row) == 14 * 8 && sizeof(Chunk) == 2 * 8, "tables");
static_assert(offsetof(Row, moment) == 2 * 8 && offsetof(Row, anchor) == 4 * 8 &&
                  offsetof(Row, scale) == 6 * 8 && offsetof(Row, curvature_scale) == 8 * 8 &&
                  offsetof(Row, remainder) == 9 * 8 && offsetof(Row, step) == 10 * 8 &&
                  offsetof(Row, group) == 12 * 8 && offsetof(Row, param_type) == 12 * 8 + 4 &&
                  offsetof(Row, curvature_type) == 13 * 8 + 1,
              "tables");
static_assert(offsetof(Chunk, row) == 8 && offsetof(Chunk, count) == 12, "tables");

enum Stat { grad_norm, drift, update_norm, forgetting, kStats };

struct UpdateArgs {
  const Row* rows;  // [row_count]
  int64_t row_count;
  const Chunk* chunks;  // [chunk_count]
  int64_t chunk_count;
  const double* hyper;   // [groups, columns]
  double* partial;       // [chunk_count, kStats], scratch
  double* stats;         // [kStats] or null
  bool has_grad_scale;   // whether a loss scale is in use
  double grad_scale;     // gradients are divided by it; 1 if not
  double max_grad_norm;  // <= 0: no clipping
  uint64_t seed;
  int threads;
};

// Both change nothing when a loss scale is in use and the gradient norm that clipping needs is not
// finite.
void anchored_adamw_cpu(const UpdateArgs& args);
void anchored_sgd_cpu(const UpdateArgs& args);

}  // namespace fast
