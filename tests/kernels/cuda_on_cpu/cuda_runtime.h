// CUDA's words for the CPU: a block is 128 threads of the operating system, one block at a time.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __builtin_assume(x)
#define __isGlobal(p) true

struct Index {
  unsigned x;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulated {
constexpr int kThreads = 128, kLanes = 32;
inline std::barrier<> block(kThreads);
inline std::barrier<> warp[kThreads / kLanes] = {std::barrier<>(kLanes), std::barrier<>(kLanes),
                                                 std::barrier<>(kLanes), std::barrier<>(kLanes)};
inline uint64_t slot[kThreads];
}  // namespace emulated

inline thread_local Index threadIdx, blockIdx;

using std::max;
using std::min;

inline void __syncthreads() { emulated::block.arrive_and_wait(); }

// What every lane of the warp of this thread brings, to `use`, which gets the first of 32 slots.
template <class T, class Use>
T exchange(T x, Use use) {
  const unsigned w = threadIdx.x / emulated::kLanes;
  memcpy(&emulated::slot[threadIdx.x], &x, sizeof(T));
  emulated::warp[w].arrive_and_wait();
  T all[emulated::kLanes];
  for (int i = 0; i < emulated::kLanes; i++)
    memcpy(&all[i], &emulated::slot[w * emulated::kLanes + i], sizeof(T));
  emulated::warp[w].arrive_and_wait();
  return use(all);
}

template <class T>
T __shfl_down_sync(unsigned, T x, int by) {
  const int lane = threadIdx.x % emulated::kLanes;
  return exchange(
      x, [&](const T* all) { return all[lane + by < emulated::kLanes ? lane + by : lane]; });
}

inline uint32_t __reduce_max_sync(unsigned, uint32_t x) {
  return exchange(
      x, [](const uint32_t* all) { return *std::max_element(all, all + emulated::kLanes); });
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t pick) {
  const uint64_t both = uint64_t{y} << 32 | x;
  uint32_t out = 0;
  for (int k = 0; k < 4; k++) out |= uint32_t(both >> (8 * (pick >> 4 * k & 7)) & 0xff) << (8 * k);
  return out;
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
