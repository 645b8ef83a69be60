"""Squared gradients of single samples, summed over a batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils import _pytree as pytree

from fast.curvature.network.batches import Batch
from fast.curvature.network.evaluation import ATTENTION
from fast.curvature.network.network import Network

# Bytes of per-sample gradients that are held at a time.
SAMPLE_BYTES = 256 * 2**20


def squared_sample_gradients(
    network: Network, leaves: Mapping[str, Tensor], batch: Batch, cotangent: Tensor
) -> list[Tensor]:
    """Sum over samples of (J_i^T c_i)^2, elementwise, one tensor per parameter.

    Args:
        leaves: all parameters, by name.
        cotangent: c, shaped as the output.
    """
    with ATTENTION:  # vmap has no rule for the fused kernels
        params = {n: leaves[n].detach() for n in network.names}
        others = {n: p.detach() for n, p in leaves.items() if n not in params}
        tensors, spec = pytree.tree_flatten(batch.inputs)
        per_sample = [isinstance(t, Tensor) and t.ndim > 0 for t in tensors]

        def gradients(c_i: Tensor, *sample: Tensor) -> dict[str, Tensor]:
            rest = iter(sample)
            leaves_i = [
                next(rest)[None] if is_sample else t
                for t, is_sample in zip(tensors, per_sample, strict=True)
            ]
            inputs = pytree.tree_unflatten(leaves_i, spec)
            _, pull = vjp(  # type: ignore[misc]
                lambda p: network.outputs({**others, **p}, inputs), params
            )
            return pull(c_i[None])[0]

        samples = [t for t, is_sample in zip(tensors, per_sample, strict=True) if is_sample]
        chunk = max(1, SAMPLE_BYTES // (8 * network.space.numel))
        of_batch = vmap(gradients, randomness="same")
        total = [torch.zeros_like(p) for p in params.values()]
        together = True
        for start in range(0, batch.size, chunk):
            part = slice(start, start + chunk)
            arguments = (cotangent[part], *(s[part] for s in samples))
            if together:
                try:
                    grads = of_batch(*arguments)
                except RuntimeError as error:
                    if "vmap" not in str(error):
                        raise
                    # The forward pass reads a value (a batch's longest text): one sample at a time.
                    together = False
            if not together:
                singles = [gradients(*sample) for sample in zip(*arguments, strict=True)]
                grads = {n: torch.stack([g[n] for g in singles]) for n in network.names}
            for t, g in zip(total, grads.values(), strict=True):
                t += torch.linalg.vecdot(g, g, dim=0)
        return total
