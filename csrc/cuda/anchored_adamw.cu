// The kernels of AdamW, one for each kind: a source of their own, compiled beside the others.
#define FAST_RULE AdamW
#include "kinds.cuh"

namespace fast {

const Kernel adamw_kernels[kKinds] = {FAST_KINDS(FAST_KERNEL)};

}  // namespace fast
