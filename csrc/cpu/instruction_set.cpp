#include "instruction_set.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

InstructionSet of_processor() {
#ifdef FAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

InstructionSet detect() {
  const char* most = std::getenv("FASTKERNELS_CPU");
  if (!most) return of_processor();
  for (int i = 0; i < 3; i++)
    if (!std::strcmp(most, kNames[i]))
      return std::min(of_processor(), static_cast<InstructionSet>(i));
  throw std::invalid_argument(
      std::string("FASTKERNELS_CPU must be baseline, avx2 or avx512; got ") + most);
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet best = detect();
  return best;
}

const char* name_of(InstructionSet set) { return kNames[static_cast<int>(set)]; }

}  // namespace fast
