// Scalars as they are stored and as they are computed with: shared by the CPU and the CUDA kernels.
#pragma once

#include <cstdint>
#include <cstring>

// Always inlined: the CPU kernels compile this header once per instruction set, and an out-of-line
// copy of the widest one must never be linked into the baseline.
#if defined(__CUDACC__)
#define FAST_INLINE __host__ __device__ __forceinline__
#else
#define FAST_INLINE inline __attribute__((always_inline))
#endif

namespace fast {

// How a tensor is stored. `codes8` is one byte per element and one float scale per kCodeBlock.
enum class Dtype : uint8_t { none, f32, f64, bf16, f16, codes8 };

constexpr int64_t kCodeBlock = 128;

FAST_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

FAST_INLINE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// a * b + c, rounded once where the hardware can. Contraction by the compiler is switched off
// (-ffp-contract=off), so vector bodies and scalar tails round alike.
FAST_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FAST_INLINE double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__CUDA_ARCH__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// `yes ? a : b` by masks. Of two choices by one condition GCC makes a branch, and then computes
// what follows on both sides: a division by 1 + c became two.
FAST_INLINE float choose(bool yes, float a, float b) {
#if defined(__CUDA_ARCH__)
  return yes ? a : b;
#else
  const uint32_t mask = yes ? 0xffffffffu : 0u;
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
#endif
}

FAST_INLINE double choose(bool yes, double a, double b) { return yes ? a : b; }

FAST_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// On a GPU the hardware's, as in Triton's kernels. Rounded correctly, this and the next function
// take 8 and 9 instructions instead of 1 and 3, and a branch each.
FAST_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return __builtin_sqrtf(x);
#endif
}

// a / b for b >= 0. On a GPU within 3 units in the last place, and for a b that is 0 or above
// 1e-23, as 1 plus a pull and sqrt(v) + eps are.
FAST_INLINE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(b));
  return a * root * root;
#else
  return a / b;
#endif
}

FAST_INLINE double quotient(double a, double b) { return a / b; }

FAST_INLINE float absolute(float x) { return float_of(bits_of(x) & 0x7fffffffu); }

// A bijective mix of 32 bits; the constants are those of Wellons' low-bias search ("lowbias32").
FAST_INLINE uint32_t finish_mix32(uint32_t x) {
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

FAST_INLINE uint32_t mix32(uint32_t x) { return finish_mix32(x ^ x >> 16); }

// Stochastic rounding draws from a counter, so it depends on neither threads nor list order.
// Element i of a tensor uses mix32(uint32(i) ^ rounding_key(seed, step, i >> 32)).
FAST_INLINE uint32_t rounding_key(uint64_t seed, uint32_t step, uint32_t high_index) {
  const uint32_t key = mix32(mix32(static_cast<uint32_t>(seed) ^ mix32(seed >> 32)) ^ step);
  return mix32(key ^ high_index);
}

// A step count as an integer, and 0 where it is not in range, as NaN is not. C++ leaves that
// conversion undefined; a GPU's saturates.
FAST_INLINE uint32_t whole_step(float step) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(step);
#else
  return step >= 0 && step < 0x1p32f ? static_cast<uint32_t>(step) : 0;
#endif
}

FAST_INLINE float from_bf16(uint16_t b) { return float_of(static_cast<uint32_t>(b) << 16); }

FAST_INLINE uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t high = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : high);
}

// Rounds up with the probability of the part cut off; `random` has 16 bits.
FAST_INLINE uint16_t to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = bits_of(x);
  return static_cast<uint16_t>(x != x ? 0x7fc0u : (u + random) >> 16);
}

// A float held as the nearest bf16 (ties away from zero) and the 16 bits it differs by. A zero
// never has a negative remainder, but one that other code wrote over a parameter may: it would
// borrow from the sign and make a NaN.
FAST_INLINE float join_bf16(uint16_t high, int16_t remainder) {
  const int32_t low = (high & 0x7fffu) == 0 && remainder < 0 ? 0 : int32_t{remainder};
  return float_of((static_cast<uint32_t>(high) << 16) + static_cast<uint32_t>(low));
}

FAST_INLINE uint16_t split_bf16(float x, int16_t* remainder) {
  const uint32_t u = bits_of(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  const uint32_t high = nan ? 0x7fc0u : (u + 0x8000u) >> 16;
  *remainder = static_cast<int16_t>(nan ? 0u : u - (high << 16));
  return static_cast<uint16_t>(high);
}

FAST_INLINE float from_f16(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const uint32_t exponent = h & 0x7c00u;
  // A denormal half is the fraction above 2^-14; this never makes a denormal float.
  const uint32_t denormal = bits_of(float_of(magnitude + 0x38800000u) - float_of(0x38800000u));
  uint32_t u = exponent == 0u ? denormal : magnitude + 0x38000000u;
  u = exponent == 0x7c00u ? magnitude + 0x70000000u : u;
  return float_of(u | static_cast<uint32_t>(h & 0x8000u) << 16);
}

FAST_INLINE uint16_t to_f16(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t u = bits_of(x) & 0x7fffffffu;
  const uint32_t normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a denormal half in the low bits, rounded to nearest by the addition.
  const uint32_t denormal = bits_of(float_of(u) + 0.5f) - 0x3f000000u;
  uint32_t h = u < 0x38800000u ? denormal : normal;
  h = u >= 0x477ff000u ? 0x7c00u : h;
  h = u > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(sign | h);
}

// 8-bit codes of y = |x| / scale; the largest value of a block gets the largest code, and 0 is
// exact.
//
// An unsigned code counts eighths of an octave of y + 1, over 32 octaves: linear near zero,
// logarithmic above, for second moments, which span many orders. A signed code (sign in the high
// bit) is finest where a momentum is largest: from 9/80 of the block's largest value on it counts
// steps of 1/80 of that value, and below, quarters of an octave of y + 1, over 14 octaves.
//
// Between two codes both are linear, so a uniform draw of 20 bits for `random` rounds without bias;
// 1 << 19 rounds to nearest.
constexpr uint32_t kOne = 0x3f800000u;
constexpr float kUnsignedTop = 4026531839.0f;  // y of code 255: 1.875 * 2^31 - 1
constexpr float kSignedTop = 80.0f;            // y of code 127
constexpr float kSignedFlat = 9.0f;            // from this y on, code = y + 47
constexpr float kSignedFine = 16383 / 9.0f;    // below: code 56 is 2^14 - 1
constexpr int kSignedShift = 47, kSignedKnee = 56;

FAST_INLINE float from_unsigned_code(uint32_t code) { return float_of((code << 20) + kOne) - 1.0f; }

FAST_INLINE uint32_t to_unsigned_code(float y, uint32_t random) {
  const uint32_t code = (bits_of(y + 1.0f) - kOne + random) >> 20;
  return code > 255u ? 255u : code;
}

// The magnitude of a signed code, which is given without its sign.
FAST_INLINE float from_signed_code(uint32_t code) {
  const float fine = float_of((code << 21) + kOne) - 1.0f;
  const int whole = static_cast<int>(code);  // signed numbers become floats faster
  return whole < kSignedKnee ? fine * (1.0f / kSignedFine)
                             : static_cast<float>(whole - kSignedShift);
}

// The number of a code, with its sign if it has one.
template <bool Signed>
FAST_INLINE float from_code(uint32_t code, float scale) {
  if (!Signed) return scale * from_unsigned_code(code);
  return float_of(bits_of(scale * from_signed_code(code & 0x7fu)) | (code & 0x80u) << 24);
}

FAST_INLINE uint32_t to_signed_code(float y, uint32_t random) {
  constexpr uint32_t top = 0x42a00000u;               // the bits of kSignedTop
  y = float_of(bits_of(y) < top ? bits_of(y) : top);  // a NaN, too, must fit an integer
  const uint32_t fine = bits_of(y * kSignedFine + 1.0f) - kOne;
  const uint32_t flat = static_cast<uint32_t>(static_cast<int>(y * 0x1p21f)) + (kSignedShift << 21);
  return ((y < kSignedFlat ? fine : flat) + 2 * random) >> 21;
}

// The scale of a block by the bits of its largest magnitude, and what its values are multiplied by.
// The least scale keeps both finite; anything not finite makes the whole block NaN.
constexpr float kLeastScale = 0x1p-126f;

FAST_INLINE float scale_of_block(uint32_t largest, float top) {
  const float scale = float_of(largest) / top;
  const float least = largest ? kLeastScale : 0.0f;
  return largest < 0x7f800000u ? (scale > least ? scale : least) : float_of(0x7fc00000u);
}

FAST_INLINE float inverse_of_block(uint32_t largest, float top) {
  const float inverse = top / float_of(largest);
  return inverse < 1 / kLeastScale ? inverse : 1 / kLeastScale;
}

}  // namespace fast
