"""Trace estimates with their own standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fast.curvature.algorithms.arguments import check_whole
from fast.curvature.algorithms.probes import draw_probes, require_finite
from fast.curvature.algorithms.protocol import Symmetric
from fast.curvature.network.parameter_space import dot
from fast.progress import bar

METHODS = ("hutch++", "hutchinson")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A random estimate, its standard error, and the number of products that it cost."""

    value: float
    stderr: float
    num_matvecs: int

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"{self.value:.6g} +- {self.stderr:.2g} ({self.num_matvecs} products)"


def trace(
    operator: Symmetric,
    num_matvecs: int = 48,
    *,
    method: str = "hutch++",
    seed: int = 0,
    chunk: int = 8,
    progress: bool | None = None,
) -> Estimate:
    """Unbiased estimate of tr A.

    "hutch++" (Meyer, Musco, Musco and Woodruff 2021): with Q an orthonormal basis of A S, S a third
    of the products' worth of random signs,

        tr A = tr(Q^T A Q) + E[v^T (I - QQ^T) A (I - QQ^T) v],

    of which the first term is exact and only the second is estimated. That is far better where few
    eigenvalues dominate, as in trained networks. Q is num_matvecs / 3 vectors of P numbers.

    "hutchinson" (Hutchinson 1990): the mean of v^T A v over random signs v. It holds `chunk`
    vectors, and v^T A v is cheaper than a product for GGN and Fisher.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}; got {method!r}")
    check_whole(seed=seed)
    check_whole(num_matvecs=num_matvecs, least=6 if method == "hutch++" else 2)
    space = operator.space
    with bar(num_matvecs, "trace", progress, unit="product") as ticks:

        def quadratics(rows: Tensor) -> Tensor:
            ticks.update(rows.shape[0])
            return operator.quadratics(space.split(rows)).cpu()

        if method == "hutchinson":
            probes = draw_probes(space, num_matvecs, seed=seed, chunk=chunk)
            return _estimate([quadratics(v) for v in probes], 0.0, num_matvecs)

        third = num_matvecs // 3
        parts = []
        for v in draw_probes(space, third, seed=seed, chunk=chunk):
            parts.append(require_finite(operator.rows(v)))
            ticks.update(v.shape[0])
        images = torch.cat(parts).T
        wide = torch.promote_types(space.dtype, torch.float32)  # torch has no QR of half precision
        basis = torch.linalg.qr(images.to(wide))[0].T.to(space.dtype).contiguous()
        exact = sum(float(quadratics(q).sum()) for q in basis.split(chunk))
        probes = draw_probes(space, num_matvecs - 2 * third, seed=seed + 1, chunk=chunk)
        rest = [quadratics(v - (v @ basis.T) @ basis) for v in probes]
        return _estimate(rest, exact, num_matvecs)


def block_traces(
    operator: Symmetric,
    blocks: Mapping[str, Iterable[str]],
    num_matvecs: int = 48,
    *,
    seed: int = 0,
    chunk: int = 8,
    progress: bool | None = None,
) -> dict[str, Estimate]:
    """Traces of principal blocks, all from the same products (Hutchinson, random signs).

    Args:
        blocks: name -> names of the parameters in that block, e.g. those of one layer.
    """
    check_whole(seed=seed)
    check_whole(num_matvecs=num_matvecs, least=2)
    space = operator.space
    place = {name: i for i, name in enumerate(space.names)}
    places = {name: [place[n] for n in names] for name, names in blocks.items()}
    values: dict[str, list[Tensor]] = {name: [] for name in places}
    with bar(num_matvecs, "traces of layers", progress, unit="product") as ticks:
        for rows in draw_probes(space, num_matvecs, seed=seed, chunk=chunk):
            v = space.split(rows)
            av = operator.products(v)
            for name, at in places.items():
                values[name].append(dot([v[i] for i in at], [av[i] for i in at]).cpu())
            ticks.update(rows.shape[0])
    return {name: _estimate(parts, 0.0, num_matvecs) for name, parts in values.items()}


def _estimate(parts: list[Tensor], exact: float, num_matvecs: int) -> Estimate:
    values = torch.cat(parts)
    stderr = float(values.std()) / len(values) ** 0.5
    return Estimate(value=exact + float(values.mean()), stderr=stderr, num_matvecs=num_matvecs)
