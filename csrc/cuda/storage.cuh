// Stored tensors to and from registers, four consecutive elements per thread: a warp holds 128. The
// dtype is looked at while the kernel runs. That costs nothing, as an H100 has time for 240
// instructions per element of the plain update, and it lets one launch take tensors of any mix.
#pragma once

#include "fast/anchored.h"

namespace fast {

constexpr int kThreads = 128, kWidth = 4, kTile = kThreads * kWidth;
static_assert(kCodeBlock % (32 * kWidth) == 0 && kTile % kCodeBlock == 0, "warps share a scale");

// Four elements as stored; conversion comes after every stream's load has been issued. A double in
// a kernel of float arithmetic is converted at once.
struct Stored {
  uint32_t word[4];
};

__device__ __forceinline__ int size_of(Dtype type) {
  if (type == Dtype::f64) return 8;
  if (type == Dtype::f32) return 4;
  return type == Dtype::codes8 ? 1 : 2;
}

// Whether every group of four elements can be loaded at once.
__device__ __forceinline__ bool aligned(const void* p, Dtype type) {
  const uintptr_t mask = size_of(type) >= 4 ? 15 : size_of(type) * 4 - 1;
  return (reinterpret_cast<uintptr_t>(p) & mask) == 0;
}

// Elements i to i + n of a tensor, at most four, none where n is negative; `whole` when there are
// four and they are aligned.
//
// n is what is left of the chunk, not clamped to 0..4: of a clamped n, ptxas 13.0 for sm_90 takes
// `n == 4` from the predicate of its VIMNMX.RELU, which holds for ragged ends too. They were read
// and written by 16 bytes, past the end of the tensor (compute-sanitizer, H200).
__device__ __forceinline__ Stored fetch(const void* from, Dtype type, int64_t i, int n,
                                        bool whole) {
  __builtin_assume(__isGlobal(from));  // else generic loads: the address comes from a table
  Stored s = {};
  if (type == Dtype::f64) {
    const double* d = static_cast<const double*>(from) + i;
#pragma unroll
    for (int k = 0; k < kWidth; k++)
      if (k < n) s.word[k] = bits_of(static_cast<float>(d[k]));
  } else if (type == Dtype::f32) {
    const float* f = static_cast<const float*>(from) + i;
    if (whole) {
      const uint4 x = *reinterpret_cast<const uint4*>(f);
      s = {{x.x, x.y, x.z, x.w}};
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) s.word[k] = bits_of(f[k]);
    }
  } else if (type == Dtype::codes8) {
    const uint8_t* c = static_cast<const uint8_t*>(from) + i;
    if (whole) {
      s.word[0] = *reinterpret_cast<const uint32_t*>(c);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) s.word[0] |= uint32_t{c[k]} << (8 * k);
    }
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(from) + i;
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

__device__ __forceinline__ uint16_t half_of(const Stored& s, int k) {
  return static_cast<uint16_t>(s.word[k / 2] >> (16 * (k % 2)));
}

template <bool Signed>
__device__ __forceinline__ void decode(float* to, const Stored& s, Dtype type, float scale) {
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    if (type == Dtype::bf16) {
      to[k] = from_bf16(half_of(s, k));
    } else if (type == Dtype::f16) {
      to[k] = from_f16(half_of(s, k));
    } else if (type == Dtype::codes8) {
      const uint32_t code = (s.word[0] >> (8 * k)) & 0xffu;
      const float y = scale * (Signed ? from_signed_code(static_cast<int>(code & 0x7fu))
                                      : from_unsigned_code(code));
      to[k] = Signed ? float_of(bits_of(y) | (code & 0x80u) << 24) : y;
    } else {
      to[k] = float_of(s.word[k]);
    }
  }
}

// The largest magnitude of a code block, for each of its threads. All threads of the block call it.
__device__ __forceinline__ uint32_t largest_of_block(uint32_t top) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2) top = max(top, __shfl_xor_sync(~0u, top, lane));
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

// As in csrc/cpu/storage.h: stochastic, a block with anything not finite becomes NaN, and a second
// moment above zero never becomes zero.
template <bool Signed>
__device__ __forceinline__ Stored encode(const float* x, float* scale, int64_t i, int n,
                                         uint32_t key) {
  constexpr float top = Signed ? kSignedTop : kUnsignedTop;
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kWidth; k++)
    if (k < n) bits = max(bits, bits_of(x[k]) & 0x7fffffffu);
  bits = largest_of_block(bits);
  const float inverse = inverse_of_block(bits, top);
  if (i % kCodeBlock == 0 && n > 0) *scale = scale_of_block(bits, top);
  Stored s = {};
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    const uint32_t draw = mix32(static_cast<uint32_t>(i + k) ^ key);
    const uint32_t random = Signed ? draw >> 12 : (draw & 0xffffu) << 4;
    const float y = absolute(x[k]) * inverse;
    uint32_t code = Signed ? to_signed_code(y, random) : to_unsigned_code(y, random);
    if (Signed) code |= (bits_of(x[k]) >> 24) & 0x80u;
    if (!Signed) code = code == 0u && x[k] > 0.0f ? 1u : code;
    s.word[0] |= code << (8 * k);
  }
  return s;
}

// The opposite of decode. `scale` is the block's, of codes; Signed and Stochastic as on the CPU.
template <bool Signed, bool Stochastic>
__device__ __forceinline__ Stored pack(const float* x, Dtype type, float* scale, int64_t i, int n,
                                       uint32_t key) {
  if (type == Dtype::codes8) return encode<Signed>(x, scale, i, n, key);
  Stored s = {};
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

// __stwb: a plain assignment is merged with the other branch, element by element.
__device__ __forceinline__ void put(void* to, Dtype type, int64_t i, int n, bool whole,
                                    const Stored& s) {
  __builtin_assume(__isGlobal(to));
  if (type == Dtype::f64) {
#pragma unroll
    for (int k = 0; k < kWidth; k++)
      if (k < n) static_cast<double*>(to)[i + k] = float_of(s.word[k]);
  } else if (type == Dtype::f32) {
    float* f = static_cast<float*>(to) + i;
    if (whole) {
      __stwb(reinterpret_cast<uint4*>(f), make_uint4(s.word[0], s.word[1], s.word[2], s.word[3]));
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) f[k] = float_of(s.word[k]);
    }
  } else if (type == Dtype::codes8) {
    uint8_t* c = static_cast<uint8_t*>(to) + i;
    if (whole) {
      __stwb(reinterpret_cast<unsigned*>(c), s.word[0]);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) c[k] = static_cast<uint8_t>(s.word[0] >> (8 * k));
    }
  } else {
    uint16_t* h = static_cast<uint16_t*>(to) + i;
    if (whole) {
      __stwb(reinterpret_cast<uint2*>(h), make_uint2(s.word[0], s.word[1]));
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k++)
        if (k < n) h[k] = half_of(s, k);
    }
  }
}

// x as elements i to i + n of a tensor.
template <bool Signed, bool Stochastic>
__device__ __forceinline__ void keep(const float* x, void* to, Dtype type, float* scale, int64_t i,
                                     int n, bool whole, uint32_t key) {
  put(to, type, i, n, whole, pack<Signed, Stochastic>(x, type, scale, i, n, key));
}

// The same for double arithmetic, an element at a time: rare, and bound by its own arithmetic on
// most devices.
struct StoredWide {
  double value[4];  // a code stays one until decode
};

__device__ __forceinline__ void fetch(StoredWide* s, const void* from, Dtype type, int64_t i, int n,
                                      bool) {
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    double x = 0;
    if (k < n) {
      const int64_t at = i + k;
      if (type == Dtype::f64) x = static_cast<const double*>(from)[at];
      if (type == Dtype::f32) x = static_cast<const float*>(from)[at];
      if (type == Dtype::bf16) x = from_bf16(static_cast<const uint16_t*>(from)[at]);
      if (type == Dtype::f16) x = from_f16(static_cast<const uint16_t*>(from)[at]);
      if (type == Dtype::codes8) x = static_cast<const uint8_t*>(from)[at];
    }
    s->value[k] = x;
  }
}

__device__ __forceinline__ void fetch(Stored* s, const void* from, Dtype type, int64_t i, int n,
                                      bool whole) {
  *s = fetch(from, type, i, n, whole);
}

template <bool Signed>
__device__ __forceinline__ void decode(double* to, const StoredWide& s, Dtype type, float scale) {
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    if (type == Dtype::codes8) {
      const uint32_t code = static_cast<uint32_t>(s.value[k]);
      const float y = scale * (Signed ? from_signed_code(static_cast<int>(code & 0x7fu))
                                      : from_unsigned_code(code));
      to[k] = Signed && (code & 0x80u) ? -y : y;
    } else {
      to[k] = s.value[k];
    }
  }
}

template <bool Signed, bool Stochastic>
__device__ __forceinline__ void keep(const double* x, void* to, Dtype type, float* scale, int64_t i,
                                     int n, bool whole, uint32_t key) {
  float narrow[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; k++) {
    narrow[k] = static_cast<float>(x[k]);
    if (type == Dtype::f64 && k < n) static_cast<double*>(to)[i + k] = x[k];
  }
  if (type != Dtype::f64) keep<Signed, Stochastic>(narrow, to, type, scale, i, n, whole, key);
}

template <class Real>
struct RawOf;
template <>
struct RawOf<float> {
  using Type = Stored;
};
template <>
struct RawOf<double> {
  using Type = StoredWide;
};

}  // namespace fast
