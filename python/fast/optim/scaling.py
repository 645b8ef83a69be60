"""The scale of the gradients of a step: loss scale and clipping, over several calls or ranks.

An op clips by the norm of the gradients in its call. Where a step takes several calls, or
parameters are sharded over ranks, the norm is computed here, and clipping becomes part of the loss
scale that the op divides by. Nothing here reads a value on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast import dtensor
from fast.dtensor import Place
from fast.optim.batch import UpdateBatch


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What an op needs to know about the scale of its gradients.

    Attributes:
        grad_scale: the loss scale, by which gradients are divided.
        found_inf: nonzero if the step is to be skipped.
        max_grad_norm: the norm at which the op clips.
        shrink: the clip coefficient, if `grad_scale` already includes it.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None
    max_grad_norm: float | None
    shrink: Tensor | None = None

    def options(self) -> dict[str, Any]:
        return {
            "grad_scale": self.grad_scale,
            "found_inf": self.found_inf,
            "max_grad_norm": self.max_grad_norm,
        }

    def totals(self, place: Place, stats: Tensor, before: Mapping[Place, Tensor]) -> Tensor:
        """The figures of all ranks, float64 `[4]` (three norms and a sum), from this rank's.

        A skipped step leaves the figures `before`.
        """
        sums = torch.cat([stats[:3].square(), stats[3:]])
        sums = dtensor.sum_over(place.groups, sums)
        total = torch.cat([sums[:3].sqrt(), sums[3:]])
        if self.shrink is not None:
            total[0] /= self.shrink  # the op saw clipped gradients
        if self.found_inf is not None and place in before:
            total = torch.where(self.found_inf.reshape(()) != 0, before[place], total)
        return total


def _norm(batches: Mapping[Place, UpdateBatch]) -> Tensor:
    """float64 `[]`: the norm of all gradients of all ranks."""
    total = torch.zeros((), dtype=torch.float64, device=next(iter(batches)).device)
    for place, batch in batches.items():
        # In float64, because squares of float16 overflow, and every norm would be rounded.
        norms = torch.stack(list(torch._foreach_norm(batch.grads, 2, dtype=torch.float64)))
        total += dtensor.sum_over(place.groups, norms.square().sum())
    return total.sqrt()


def scale(
    batches: Mapping[Place, UpdateBatch],
    max_grad_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Scaling:
    """How the step over `batches` scales its gradients.

    Raises:
        RuntimeError: `max_grad_norm` is set and the parameters are on several devices.
    """
    if found_inf is not None and dtensor.is_sharded(found_inf):
        found_inf = found_inf.full_tensor()  # type: ignore[attr-defined]
    one_call = len(batches) == 1 and not next(iter(batches)).groups
    if max_grad_norm is None or one_call or not batches:
        return Scaling(grad_scale=grad_scale, found_inf=found_inf, max_grad_norm=max_grad_norm)
    devices = sorted({str(place.device) for place in batches})
    if len(devices) > 1:
        raise RuntimeError(
            f"max_grad_norm needs all parameters on one device; they are on {devices}: clip with "
            "torch.nn.utils.clip_grad_norm_ instead"
        )
    norm = _norm(batches)
    unscale = torch.ones_like(norm)
    if grad_scale is not None:
        unscale = grad_scale.double().reshape(())
        overflow = ~norm.isfinite()
        if found_inf is not None:
            overflow = overflow | (found_inf.reshape(()) != 0)
        found_inf = overflow.float()
    shrink = (max_grad_norm / (norm / unscale + 1e-6)).clamp(max=1.0)
    by = unscale / shrink
    if not any(p.dtype == torch.float64 for batch in batches.values() for p in batch.params):
        by = by.float()  # as the kernels take it without a copy
    return Scaling(grad_scale=by, found_inf=found_inf, max_grad_norm=None, shrink=shrink)


def unscale_(grads: Sequence[Tensor], grad_scale: Tensor, found_inf: Tensor | None) -> None:
    """Divide gradients in place by the loss scale, as torch's GradScaler does; not if the step is
    skipped."""
    factor = grad_scale.reshape(()).double().reciprocal()
    if found_inf is not None:
        factor = torch.where(found_inf.reshape(()) != 0, 1.0, factor)
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in map(dtensor.local, grads):
        by_device.setdefault(grad.device, []).append(grad)
    for device, group in by_device.items():
        torch._foreach_mul_(group, factor.to(device, torch.float32))
