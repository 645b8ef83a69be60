// The kernels of Sgd, one for each kind: a source of their own, compiled beside the others.
#define FAST_RULE Sgd
#include "kinds.cuh"

namespace fast {

const Kernel sgd_kernels[kKinds] = {FAST_KINDS(FAST_KERNEL)};

}  // namespace fast
