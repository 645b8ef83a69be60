// What is written in assembly. Another compiler than nvcc builds the kernels for the CPU, where
// tests run them without a GPU; there this is plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace fast {

#if defined(__CUDACC__)

// 1 / x, within one unit in the last place; infinity for a denormal.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A plain assignment is merged with the other branch, element by element.
__device__ __forceinline__ void store(void* to, uint32_t x) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void store(void* to, uint32_t x, uint32_t y) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store(void* to, const uint32_t (&x)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

#else

inline float reciprocal(float x) { return 1 / x; }
inline void store(void* to, uint32_t x) { memcpy(to, &x, 4); }
inline void store(void* to, uint32_t x, uint32_t y) {
  const uint32_t both[] = {x, y};
  memcpy(to, both, 8);
}
inline void store(void* to, const uint32_t (&x)[4]) { memcpy(to, x, 16); }

#endif

}  // namespace fast
