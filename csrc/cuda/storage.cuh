// Stored tensors to and from registers, four consecutive elements per thread: a warp holds 128, and
// its access is contiguous at 128 bits a thread for float32, 64 for bf16, and 32 for codes. Eight
// elements would make bf16 128 bits wide, and leave holes of 16 bytes between the float32 stores of
// neighbouring threads.
//
// Everything is inlined: where the dtype is a constant of the kernel, nothing of the others is
// left.
#pragma once

#include "fast/anchored.h"
#include "intrinsics.cuh"

namespace fast {

constexpr int kThreads = 128, kWidth = 4, kTile = kThreads * kWidth;
static_assert(kCodeBlock % (32 * kWidth) == 0 && kTile % kCodeBlock == 0, "warps share a scale");

// Four elements as stored; conversion comes after every stream's load has been issued. A double in
// a kernel of float arithmetic is converted at once.
struct Raw {
  uint32_t word[4];
};

__device__ __forceinline__ int size_of(Dtype type) {
  if (type == Dtype::f64) return 8;
  if (type == Dtype::f32) return 4;
  return type == Dtype::codes8 ? 1 : 2;
}

// Whether every group of four elements can be loaded at once.
__device__ __forceinline__ bool is_aligned(const void* p, Dtype type) {
  const uintptr_t mask = size_of(type) >= 4 ? 15 : size_of(type) * 4 - 1;
  return (reinterpret_cast<uintptr_t>(p) & mask) == 0;
}

// Elements i to i + n of a tensor, at most four, none where n is negative; `whole` when there are
// four and they are aligned.
//
// n is what is left of the chunk, not clamped to 0..4: of a clamped n, ptxas 13.0 for sm_90 takes
// `n == 4` from the predicate of its VIMNMX.RELU, which holds for ragged ends too. They were read
// and written by 16 bytes, past the end of the tensor (compute-sanitizer, H200).
__device__ __forceinline__ Raw fetch(const void* from, Dtype type, int i, int n, bool whole) {
  __builtin_assume(__isGlobal(from));  // else generic loads: the address comes from a table
  Raw s = {};
  if (type == Dtype::f64) {
    const double* d = static_cast<const double*>(from) + unsigned(i);
#pragma unroll
    for (int k = 0; k < kWidth; k++)
      if (k < n) s.word[k] = bits_of(static_cast<float>(d[k]));
  } else if (type == Dtype::f32) {
    const float* f = static_cast<const float*>(from) + unsigned(i);
    if (whole) {
      const uint4 x = *reinterpret_cast<const uint4*>(f);
      s = {{x.x, x.y, x.z, x.w}};
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) s.word[k] = bits_of(f[k]);
    }
  } else if (type == Dtype::codes8) {
    const uint8_t* c = static_cast<const uint8_t*>(from) + unsigned(i);
    if (whole) {
      s.word[0] = *reinterpret_cast<const uint32_t*>(c);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) s.word[0] |= uint32_t{c[k]} << (8 * k);
    }
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(from) + unsigned(i);
    if (whole) {
      const uint2 x = *reinterpret_cast<const uint2*>(h);
      s.word[0] = x.x;
      s.word[1] = x.y;
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) s.word[k / 2] |= uint32_t{h[k]} << (16 * (k % 2));
    }
  }
  return s;
}

// The scale of code block `block`.
__device__ __forceinline__ float fetch_scale(const float* scales, unsigned block) {
  __builtin_assume(__isGlobal(scales));
  return scales[block];
}

__device__ __forceinline__ void put_scale(float* scales, unsigned block, float scale) {
  __builtin_assume(__isGlobal(scales));
  scales[block] = scale;
}

__device__ __forceinline__ uint16_t half_of(const Raw& s, int k) {
  return static_cast<uint16_t>(s.word[k / 2] >> (16 * (k % 2)));
}

// Code k of four. By PRMT, which leaves the shift of from_unsigned_code to be merged with its sum.
__device__ __forceinline__ uint32_t code_of(const Raw& s, int k) {
  return __byte_perm(s.word[0], 0, 0x4440 + k);
}

// What the signed codes stand for, but for their scale: a look-up in shared memory takes a third of
// the instructions of from_signed_code. Filled by all threads of a block.
struct Table {
  float value[256];
  __device__ __forceinline__ void fill() {
    for (int code = static_cast<int>(threadIdx.x); code < 256; code += kThreads) {
      value[code] = from_code<true>(static_cast<uint32_t>(code), 1.0f);
    }
  }
  __device__ __forceinline__ void decode(float* to, const Raw& s, float scale) const {
#pragma unroll
    for (int k = 0; k < kWidth; k++) to[k] = scale * value[code_of(s, k)];
  }
};

template <bool Signed>
__device__ __forceinline__ void decode(float* to, const Raw& s, Dtype type, float scale) {
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    if (type == Dtype::bf16) {
      to[k] = from_bf16(half_of(s, k));
    } else if (type == Dtype::f16) {
      to[k] = from_f16(half_of(s, k));
    } else if (type == Dtype::codes8) {
      to[k] = from_code<Signed>(code_of(s, k), scale);
    } else {
      to[k] = float_of(s.word[k]);
    }
  }
}

// The largest magnitude of a code block, for each of its threads. All threads of the block call it.
__device__ __forceinline__ uint32_t largest_of_block(uint32_t top) {
  top = __reduce_max_sync(~0u, top);
  constexpr int kWarps = kCodeBlock / (32 * kWidth);
  if constexpr (kWarps > 1) {
    __shared__ uint32_t of_warp[kThreads / 32];
    const int warp = threadIdx.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warp[warp] = top;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kWarps; k++) top = max(top, of_warp[warp / kWarps * kWarps + k]);
  }
  return top;
}

// scale_of_block and inverse_of_block of numeric.h, to the bit, without the branches of a division:
// one step of Newton for 1 / b where that is not a constant, and one for the quotient. A quotient
// that is too small to be rounded so is below kLeastScale; one by 0 or by a denormal is a NaN, and
// above 1 / kLeastScale.
__device__ __forceinline__ float newton_quotient(float a, float b, float inverse) {
  const float q = a * inverse;
  return __fmaf_rn(__fmaf_rn(-b, q, a), inverse, q);
}

template <bool Signed>
__device__ __forceinline__ float block_scale(uint32_t largest) {
  constexpr float top = Signed ? kSignedTop : kUnsignedTop;
  const float scale = newton_quotient(float_of(largest), top, 1.0f / top);
  const float least = largest ? kLeastScale : 0.0f;
  return largest < 0x7f800000u ? fmaxf(scale, least) : float_of(0x7fc00000u);
}

template <bool Signed>
__device__ __forceinline__ float block_inverse(uint32_t largest) {
  constexpr float top = Signed ? kSignedTop : kUnsignedTop;
  const float quarter = 0.25f * float_of(largest);  // the inverse of the whole might be denormal
  float y = reciprocal(quarter);
  y = __fmaf_rn(__fmaf_rn(-quarter, y, 1.0f), y, y);
  return fminf(0.25f * newton_quotient(top, quarter, y), 1 / kLeastScale);
}

// Byte `which` of each of four words, as one word.
__device__ __forceinline__ uint32_t bytes(const uint32_t (&x)[4], int which) {
  const uint32_t pick = 0x40 + 0x11 * which;
  return __byte_perm(__byte_perm(x[0], x[1], pick), __byte_perm(x[2], x[3], pick), 0x5410);
}

// As in csrc/cpu/storage.h: stochastic, a block with anything not finite becomes NaN, and a second
// moment above zero never becomes zero.
template <bool Signed>
__device__ __forceinline__ Raw encode(const float* x, float* scales, int i, int n, uint32_t key) {
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kWidth; k++)
    if (k < n) bits = max(bits, bits_of(x[k]) & 0x7fffffffu);
  bits = largest_of_block(bits);
  const float inverse = block_inverse<Signed>(bits);
  const unsigned at = static_cast<unsigned>(i);
  if (at % kCodeBlock == 0 && n > 0) put_scale(scales, at / kCodeBlock, block_scale<Signed>(bits));
  uint32_t code[kWidth], sign[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    const uint32_t draw = mix32(static_cast<uint32_t>(i + k) ^ key);
    const uint32_t random = Signed ? draw >> 12 : (draw & 0xffffu) << 4;
    const float y = absolute(x[k]) * inverse;
    sign[k] = bits_of(x[k]);
    if (Signed) {
      code[k] = to_signed_code(y, random);
    } else {
      // to_unsigned_code, with its limits before the shift; `least` is a code of 1 where x > 0.
      const uint32_t least = min(bits_of(x[k]) + 0xfffffu, 0x100000u);
      code[k] = max(min(bits_of(y + 1.0f) - kOne + random, 0xfffffffu), least) >> 20;
    }
  }
  Raw s = {};
  s.word[0] = bytes(code, 0);
  if (Signed) s.word[0] |= bytes(sign, 3) & 0x80808080u;
  return s;
}

// The opposite of decode. `scales` are those of codes; Signed and Stochastic as on the CPU.
template <bool Signed, bool Stochastic>
__device__ __forceinline__ Raw pack(const float* x, Dtype type, float* scales, int i, int n,
                                    uint32_t key) {
  if (type == Dtype::codes8) return encode<Signed>(x, scales, i, n, key);
  Raw s = {};
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    if (type == Dtype::bf16) {
      const uint32_t draw = Stochastic ? mix32(static_cast<uint32_t>(i + k) ^ key) & 0xffffu : 0;
      const uint32_t h = Stochastic ? to_bf16_stochastic(x[k], draw) : to_bf16(x[k]);
      s.word[k / 2] |= h << (16 * (k % 2));
    } else if (type == Dtype::f16) {
      s.word[k / 2] |= uint32_t{to_f16(x[k])} << (16 * (k % 2));
    } else {
      s.word[k] = bits_of(x[k]);
    }
  }
  return s;
}

__device__ __forceinline__ void put(void* to, Dtype type, int i, int n, bool whole, const Raw& s) {
  __builtin_assume(__isGlobal(to));
  if (type == Dtype::f64) {
#pragma unroll
    for (int k = 0; k < kWidth; k++)
      if (k < n) static_cast<double*>(to)[i + k] = float_of(s.word[k]);
  } else if (type == Dtype::f32) {
    float* f = static_cast<float*>(to) + unsigned(i);
    if (whole) {
      store(f, s.word);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) f[k] = float_of(s.word[k]);
    }
  } else if (type == Dtype::codes8) {
    uint8_t* c = static_cast<uint8_t*>(to) + unsigned(i);
    if (whole) {
      store(c, s.word[0]);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) c[k] = static_cast<uint8_t>(s.word[0] >> (8 * k));
    }
  } else {
    uint16_t* h = static_cast<uint16_t*>(to) + unsigned(i);
    if (whole) {
      store(h, s.word[0], s.word[1]);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) h[k] = half_of(s, k);
    }
  }
}

// x as elements i to i + n of a tensor.
template <bool Signed, bool Stochastic>
__device__ __forceinline__ void keep(const float* x, void* to, Dtype type, float* scales, int i,
                                     int n, bool whole, uint32_t key) {
  put(to, type, i, n, whole, pack<Signed, Stochastic>(x, type, scales, i, n, key));
}

// The same for double arithmetic, an element at a time: rare, and bound by its own arithmetic on
// most devices.
struct RawWide {
  double value[4];  // a code stays one until decode
};

__device__ __forceinline__ void fetch(RawWide* s, const void* from, Dtype type, int i, int n,
                                      bool) {
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    double x = 0;
    if (k < n) {
      const int at = i + k;
      if (type == Dtype::f64) x = static_cast<const double*>(from)[at];
      if (type == Dtype::f32) x = static_cast<const float*>(from)[at];
      if (type == Dtype::bf16) x = from_bf16(static_cast<const uint16_t*>(from)[at]);
      if (type == Dtype::f16) x = from_f16(static_cast<const uint16_t*>(from)[at]);
      if (type == Dtype::codes8) x = static_cast<const uint8_t*>(from)[at];
    }
    s->value[k] = x;
  }
}

__device__ __forceinline__ void fetch(Raw* s, const void* from, Dtype type, int i, int n,
                                      bool whole) {
  *s = fetch(from, type, i, n, whole);
}

template <bool Signed>
__device__ __forceinline__ void decode(double* to, const RawWide& s, Dtype type, float scale) {
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    const bool code = type == Dtype::codes8;
    to[k] = code ? from_code<Signed>(static_cast<uint32_t>(s.value[k]), scale) : s.value[k];
  }
}

template <bool Signed, bool Stochastic>
__device__ __forceinline__ void keep(const double* x, void* to, Dtype type, float* scales, int i,
                                     int n, bool whole, uint32_t key) {
  float narrow[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    narrow[k] = static_cast<float>(x[k]);
    if (type == Dtype::f64 && k < n) static_cast<double*>(to)[i + k] = x[k];
  }
  if (type != Dtype::f64) keep<Signed, Stochastic>(narrow, to, type, scales, i, n, whole, key);
}

template <class Real>
struct RawOf;
template <>
struct RawOf<float> {
  using Type = Raw;
};
template <>
struct RawOf<double> {
  using Type = RawWide;
};

}  // namespace fast
