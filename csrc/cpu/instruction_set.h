// The instruction sets that `*_isa.cpp` is compiled for; FAST_ISA names one of them.
#pragma once

namespace fast {

enum class InstructionSet { baseline, avx2, avx512 };

// The best that this processor has, found once. FASTKERNELS_CPU=baseline|avx2|avx512 is the most to
// use, for tests and for comparing; std::invalid_argument where it is none of these.
InstructionSet instruction_set();
const char* name_of(InstructionSet set);

// Bytes of a vector of the instruction set that a file is compiled for.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// prefix_ and the name of the instruction set.
#define FAST_JOIN_(a, b) a##b
#define FAST_JOIN(a, b) FAST_JOIN_(a, b)
#define FAST_WITH_ISA(prefix_) FAST_JOIN(prefix_, FAST_ISA)

// What the best of the functions `prefix_baseline()`, `prefix_avx2()` and `prefix_avx512()` gives.
#ifdef FAST_X86
#define FAST_BEST(prefix_) ::fast::best_of(prefix_##baseline, prefix_##avx2, prefix_##avx512)

template <class Table>
const Table& best_of(const Table& (*baseline)(), const Table& (*avx2)(), const Table& (*avx512)()) {
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return avx512();
    case InstructionSet::avx2:
      return avx2();
    case InstructionSet::baseline:
      break;
  }
  return baseline();
}
#else
#define FAST_BEST(prefix_) prefix_##baseline()
#endif

}  // namespace fast
