"""Every operator's schema and fake, in one place; importing this registers the operators.

Each op lives in `fastkernels/ops/<op>`, which attaches the implementation with `implement`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "fastkernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Lists run parallel to `params`. An optional list is empty when its feature is off, and an optional
# entry is None (read-only lists) or a tensor of 0 elements (mutated lists, which cannot hold None).
SCHEMAS = {
    "anchored_adamw_": """(
        Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,
        Tensor(d!)[] steps, Tensor hyper, int[] groups, *,
        Tensor?[] anchors, Tensor?[] curvature, Tensor?[] curvature_scales,
        Tensor(e!)[] exp_avg_scales, Tensor(f!)[] exp_avg_sq_scales, Tensor(g!)[] remainders,
        Tensor? grad_scale=None, Tensor? found_inf=None, float? max_grad_norm=None,
        Tensor(h!)? stats=None, int seed=0) -> ()""",
    "anchored_sgd_": """(
        Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers,
        Tensor(c!)[] steps, Tensor hyper, int[] groups, *,
        Tensor?[] anchors, Tensor?[] curvature, Tensor?[] curvature_scales,
        Tensor(d!)[] momentum_scales, Tensor(e!)[] remainders,
        Tensor? grad_scale=None, Tensor? found_inf=None, float? max_grad_norm=None,
        Tensor(f!)? stats=None, int seed=0) -> ()""",
    "cross_entropy_hvp_": "(Tensor(a!) u, Tensor p, Tensor scale) -> ()",
    "cross_entropy_quad": "(Tensor u, Tensor p, Tensor scale) -> Tensor",
}

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + " ".join(_schema.split()))


def implement(name: str, function: Callable[..., Any]) -> None:
    """Register `function` as the implementation of op `name` on every real device."""
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, function, key)


def _fake_update(params: list[torch.Tensor], grads: list[torch.Tensor], *_: Any, **__: Any) -> None:
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        torch._check(
            p.shape == g.shape, lambda i=i: f"grads[{i}] has another shape than params[{i}]"
        )


def _fake_cross_entropy_hvp(u: torch.Tensor, p: torch.Tensor, scale: torch.Tensor) -> None:
    torch._check(u.shape[1:] == p.shape, lambda: "u must be [K, *p.shape]")


def _fake_cross_entropy_quad(u: torch.Tensor, p: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return u.new_empty(u.shape[0], dtype=torch.float64)


for _name, _fake in (
    ("cross_entropy_hvp_", _fake_cross_entropy_hvp),
    ("cross_entropy_quad", _fake_cross_entropy_quad),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
for _name in ("anchored_adamw_", "anchored_sgd_"):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake_update, lib=LIBRARY)
