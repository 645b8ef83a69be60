// Stored tensors to and from the dtype of the arithmetic, a tile at a time. For one instruction
// set: include only from a translation unit that is compiled for it.
#pragma once

#include "fast/anchored.h"

namespace fast {
namespace {

// Elements staged at once: 6 streams x 2 KB stay in the smallest L1 (32 KB). A multiple of
// kCodeBlock.
constexpr int kTile = 512;

// The rounding draws of one tile: `key` already has seed, step and the high half of the index.
struct Draws {
  uint32_t key, first;
  FAST_INLINE uint32_t at(int i) const { return mix32((first + static_cast<uint32_t>(i)) ^ key); }
};

// Element types of the streams that the update loop reads and writes directly.
struct None {};
struct Bf16 {
  uint16_t bits;
};

FAST_INLINE float get(const float* p, int i) { return p[i]; }
FAST_INLINE double get(const double* p, int i) { return p[i]; }
FAST_INLINE float get(const Bf16* p, int i) { return from_bf16(p[i].bits); }

FAST_INLINE void put(float* p, int i, float x) { p[i] = x; }
FAST_INLINE void put(double* p, int i, double x) { p[i] = x; }
FAST_INLINE void put(Bf16* p, int i, float x) { p[i].bits = to_bf16(x); }

FAST_INLINE void put_second(float* p, int i, float x, const Draws&) { p[i] = x; }
FAST_INLINE void put_second(double* p, int i, double x, const Draws&) { p[i] = x; }
FAST_INLINE void put_second(Bf16* p, int i, float x, const Draws& draws) {
  p[i].bits = to_bf16_stochastic(x, draws.at(i) & 0xffffu);
}

template <class Real, class Stored, class Convert>
FAST_INLINE void convert(Real* __restrict to, const Stored* __restrict from, int n, Convert f) {
#pragma omp simd
  for (int i = 0; i < n; i++) to[i] = f(from[i]);
}

template <bool Signed, class Real>
void decode(Real* __restrict to, const uint8_t* __restrict codes, const float* scales, int n) {
  for (int begin = 0; begin < n; begin += kCodeBlock) {
    const int end = begin + kCodeBlock < n ? begin + static_cast<int>(kCodeBlock) : n;
    const float scale = scales[begin / kCodeBlock];
#pragma omp simd
    for (int i = begin; i < end; i++) {
      const uint32_t code = codes[i];
      const float y = scale * (Signed ? from_signed_code(static_cast<int>(code & 0x7fu))
                                      : from_unsigned_code(code));
      to[i] = Signed ? float_of(bits_of(y) | (code & 0x80u) << 24) : y;
    }
  }
}

// Both moments round stochastically: a nearest-rounded average that moves by less than half a code
// per step never moves. A second moment above zero never becomes zero: it is divided by.
template <bool Signed, class Real>
void encode(uint8_t* __restrict codes, float* scales, const Real* __restrict from, int n,
            const Draws& draws) {
  constexpr float top = Signed ? kSignedTop : kUnsignedTop;
  for (int begin = 0; begin < n; begin += kCodeBlock) {
    const int end = begin + kCodeBlock < n ? begin + static_cast<int>(kCodeBlock) : n;
    // Magnitudes order like their bits, and what is not finite comes last.
    uint32_t top_bits = 0;
#pragma omp simd reduction(max : top_bits)
    for (int i = begin; i < end; i++) {
      const uint32_t x = bits_of(static_cast<float>(from[i])) & 0x7fffffffu;
      top_bits = x > top_bits ? x : top_bits;
    }
    const float inverse = inverse_of_block(top_bits, top);
    scales[begin / kCodeBlock] = scale_of_block(top_bits, top);
#pragma omp simd
    for (int i = begin; i < end; i++) {
      const float x = static_cast<float>(from[i]);
      const uint32_t random = Signed ? draws.at(i) >> 12 : (draws.at(i) & 0xffffu) << 4;
      const float y = absolute(x) * inverse;
      uint32_t code = Signed ? to_signed_code(y, random) : to_unsigned_code(y, random);
      if (Signed) code |= (bits_of(x) >> 24) & 0x80u;
      if (!Signed) code = code == 0u && x > 0.0f ? 1u : code;
      codes[i] = static_cast<uint8_t>(code);
    }
  }
}

// n elements from index `at` of a stored tensor. Signed says how codes8 are read.
template <bool Signed, class Real>
void load(Real* to, const void* from, Dtype type, const float* scales, int64_t at, int n) {
  switch (type) {
    case Dtype::f32:
      return convert(to, static_cast<const float*>(from) + at, n, [](float x) { return Real(x); });
    case Dtype::f64:
      return convert(to, static_cast<const double*>(from) + at, n,
                     [](double x) { return Real(x); });
    case Dtype::bf16:
      return convert(to, static_cast<const uint16_t*>(from) + at, n,
                     [](uint16_t x) { return Real(from_bf16(x)); });
    case Dtype::f16:
      return convert(to, static_cast<const uint16_t*>(from) + at, n,
                     [](uint16_t x) { return Real(from_f16(x)); });
    case Dtype::codes8:
      return decode<Signed>(to, static_cast<const uint8_t*>(from) + at, scales + at / kCodeBlock,
                            n);
    case Dtype::none:
      return;
  }
}

// Stochastic: whether bf16 is rounded by the draws.
template <bool Signed, bool Stochastic, class Real>
void store(void* to, Dtype type, float* scales, int64_t at, const Real* __restrict from, int n,
           const Draws& draws) {
  switch (type) {
    case Dtype::f32:
      return convert(static_cast<float*>(to) + at, from, n, [](Real x) { return float(x); });
    case Dtype::f64:
      return convert(static_cast<double*>(to) + at, from, n, [](Real x) { return double(x); });
    case Dtype::bf16: {
      uint16_t* __restrict b = static_cast<uint16_t*>(to) + at;
#pragma omp simd
      for (int i = 0; i < n; i++)
        b[i] = Stochastic ? to_bf16_stochastic(from[i], draws.at(i) & 0xffffu) : to_bf16(from[i]);
      return;
    }
    case Dtype::f16:
      return convert(static_cast<uint16_t*>(to) + at, from, n, [](Real x) { return to_f16(x); });
    case Dtype::codes8:
      return encode<Signed>(static_cast<uint8_t*>(to) + at, scales + at / kCodeBlock, from, n,
                            draws);
    case Dtype::none:
      return;
  }
}

template <class Real>
void load_split(Real* __restrict to, const uint16_t* __restrict high,
                const int16_t* __restrict remainder, int n) {
#pragma omp simd
  for (int i = 0; i < n; i++) to[i] = join_bf16(high[i], remainder[i]);
}

template <class Real>
void store_split(uint16_t* __restrict high, int16_t* __restrict remainder,
                 const Real* __restrict from, int n) {
#pragma omp simd
  for (int i = 0; i < n; i++) high[i] = split_bf16(static_cast<float>(from[i]), &remainder[i]);
}

}  // namespace
}  // namespace fast
