"""The anchored updates: one fused optimizer step of many tensors, with a pull towards an anchor."""

from fastkernels.ops.update.adamw import anchored_adamw_
from fastkernels.ops.update.call import MAX_PULL, STATS
from fastkernels.ops.update.sgd import anchored_sgd_

__all__ = ["MAX_PULL", "STATS", "anchored_adamw_", "anchored_sgd_"]
