// Stored tensors to and from the dtype of the arithmetic, a tile at a time. For one instruction
// set: include only from a translation unit that is compiled for it.
#pragma once

#include "fast/anchored.h"

namespace fast {
namespace {

// Elements staged at once: 6 streams x 2 KB stay in the smallest L1 (32 KB). A multiple of
// kCodeBlock.
constexpr int kTile = 512;

// The rounding draws of a stretch of elements; `key` already has seed, step and the high half of
// the index. The index `first` of a stretch is a multiple of a power of two that is no less than
// its length, so that first + i is first ^ i, and the first step of the mix is the same for all i.
struct Draws {
  uint32_t start;
  FAST_INLINE Draws(uint32_t key, uint32_t first) : start((first ^ key) ^ (first ^ key) >> 16) {}
  FAST_INLINE uint32_t at(int i) const { return finish_mix32(start ^ static_cast<uint32_t>(i)); }
};
static_assert(kChunk <= 1 << 16 && kChunk % kTile == 0 && kTile % kCodeBlock == 0, "stretches");

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

FAST_INLINE void fill(uint32_t (&to)[kTile], const Draws draws) {
#pragma omp simd
  for (int i = 0; i < kTile; i++) to[i] = draws.at(i);
}

// Codes change their width in loops of their own: beside bytes the compiler takes as many numbers
// at once as a vector has bytes, and runs out of registers.
template <bool Signed, class Real>
void decode_block(Real* __restrict to, const uint8_t* __restrict codes, float scale) {
  alignas(64) uint32_t wide[kCodeBlock];
  convert(wide, codes, kCodeBlock, [](uint8_t code) { return uint32_t{code}; });
  convert(to, wide, kCodeBlock,
          [scale](uint32_t code) { return Real(from_code<Signed>(code, scale)); });
}

// Both moments round stochastically: a nearest-rounded average that moves by less than half a code
// per step never moves. Returns the scale.
template <bool Signed, class Real>
float encode_block(uint8_t* __restrict codes, const Real* __restrict from,
                   const uint32_t* __restrict draws) {
  constexpr float top = Signed ? kSignedTop : kUnsignedTop;
  // Magnitudes order like their bits, and what is not finite comes last.
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < kCodeBlock; i++) {
    const uint32_t size = bits_of(static_cast<float>(from[i])) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  const float inverse = inverse_of_block(largest, top);
  alignas(64) uint32_t wide[kCodeBlock];
#pragma omp simd
  for (int i = 0; i < kCodeBlock; i++) {
    const float x = static_cast<float>(from[i]);
    const float y = absolute(x) * inverse;
    if (Signed) {
      wide[i] = to_signed_code(y, draws[i] >> 12) | ((bits_of(x) >> 24) & 0x80u);
    } else {
      // A second moment above zero never becomes zero: it is divided by.
      const auto bits = static_cast<int32_t>(bits_of(x)), least = bits < 1 ? bits : 1;
      const auto code = static_cast<int32_t>(to_unsigned_code(y, (draws[i] & 0xffffu) << 4));
      wide[i] = static_cast<uint32_t>(code > least ? code : least);
    }
  }
  convert(codes, wide, kCodeBlock, [](uint32_t code) { return static_cast<uint8_t>(code); });
  return scale_of_block(largest, top);
}

// `to` has room for whole blocks.
template <bool Signed, class Real>
void decode(Real* to, const uint8_t* codes, const float* scales, int n) {
  int i = 0;
  for (; i + kCodeBlock <= n; i += kCodeBlock)
    decode_block<Signed>(to + i, codes + i, scales[i / kCodeBlock]);
  if (i == n) return;
  uint8_t last[kCodeBlock] = {};
  memcpy(last, codes + i, n - i);
  decode_block<Signed>(to + i, last, scales[i / kCodeBlock]);
}

template <bool Signed, class Real>
void encode(uint8_t* codes, float* scales, const Real* from, int n, const uint32_t* draws) {
  int i = 0;
  for (; i + kCodeBlock <= n; i += kCodeBlock)
    scales[i / kCodeBlock] = encode_block<Signed>(codes + i, from + i, draws + i);
  if (i == n) return;
  uint8_t last[kCodeBlock];
  Real padded[kCodeBlock] = {};
  memcpy(padded, from + i, (n - i) * sizeof(Real));
  scales[i / kCodeBlock] = encode_block<Signed>(last, padded, draws + i);
  memcpy(codes + i, last, n - i);
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

// Stochastic: whether bf16 is rounded by the draws, uint32 [n].
template <bool Signed, bool Stochastic, class Real>
void store(void* to, Dtype type, float* scales, int64_t at, const Real* __restrict from, int n,
           const uint32_t* __restrict draws) {
  switch (type) {
    case Dtype::f32:
      return convert(static_cast<float*>(to) + at, from, n, [](Real x) { return float(x); });
    case Dtype::f64:
      return convert(static_cast<double*>(to) + at, from, n, [](Real x) { return double(x); });
    case Dtype::bf16: {
      uint16_t* __restrict b = static_cast<uint16_t*>(to) + at;
#pragma omp simd
      for (int i = 0; i < n; i++)
        b[i] = Stochastic ? to_bf16_stochastic(from[i], draws[i] & 0xffffu) : to_bf16(from[i]);
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
