"""Trace estimates with their own standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fast.curvature.algorithms.arguments import check_whole
from fast.curvature.algorithms.probes import draw_probes, require_finite
from fast.curvature.algorithms.progress import bar
from fast.curvature.network.parameter_space import dot
from fast.curvature.operators.base import SymmetricOperator

METHODS = ("hutch++", "hutchinson")


@dataclass(frozen=True)
class Estimate:
    """A random estimate: its value, its standard error, and what it cost."""

    value: float
    stderr: float
    num_matvecs: int

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"{self.value:.6g} +- {self.stderr:.2g} ({self.num_matvecs} products)"


def trace(
    operator: SymmetricOperator,
    num_matvecs: int = 48,
    *,
    method: str = "hutch++",
    seed: int = 0,
    chunk: int = 8,
    progress: bool | None = None,
) -> Estimate:
    """Trace of an operator, unbiased.

    "hutch++" (Meyer et al. 2021) takes a third of the products to find the dominant subspace, takes
    the trace there exactly, and estimates only the remainder: far better where few eigenvalues
    dominate, as in trained networks. It holds num_matvecs / 3 vectors of P numbers. "hutchinson"
    (Hutchinson 1990, random signs) holds `chunk` vectors and needs only v^T A v, which is cheaper
    than a product for GGN and Fisher.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}; got {method!r}")
    least = 6 if method == "hutch++" else 2
    check_whole(num_matvecs=num_matvecs, seed=seed)
    if num_matvecs < least:
        raise ValueError(
            f"num_matvecs must be at least {least} with {method}, for an error estimate; got "
            f"{num_matvecs}"
        )
    with bar(num_matvecs, "trace", progress) as ticks:
        if method == "hutchinson" or operator.shape[0] <= num_matvecs // 3:
            values = []
            for v in draw_probes(operator, num_matvecs, seed=seed, chunk=chunk):
                values.append(operator._quad(operator.space.split(v)).cpu())
                ticks.update(v.shape[0])
            return _estimate(torch.cat(values), 0.0, num_matvecs)

        third = num_matvecs // 3
        images = []
        for v in draw_probes(operator, third, seed=seed, chunk=chunk):
            images.append(require_finite(operator.rows(v)))
            ticks.update(v.shape[0])
        basis = torch.linalg.qr(torch.cat(images).T)[0].T.contiguous()
        exact = 0.0
        for q in basis.split(chunk):
            exact += float(operator._quad(operator.space.split(q)).sum())
            ticks.update(q.shape[0])
        values = []
        rest = num_matvecs - 2 * third
        for v in draw_probes(operator, rest, seed=seed + 1, chunk=chunk):
            v = v - (v @ basis.T) @ basis
            values.append(operator._quad(operator.space.split(v)).cpu())
            ticks.update(v.shape[0])
        return _estimate(torch.cat(values), exact, num_matvecs)


def block_traces(
    operator: SymmetricOperator,
    blocks: Mapping[str, Iterable[str]],
    num_matvecs: int = 48,
    *,
    seed: int = 0,
    chunk: int = 8,
    progress: bool | None = None,
) -> dict[str, Estimate]:
    """Traces of principal blocks, all of them from the same products (Hutchinson, random signs).

    Args:
        blocks: name -> names of parameters, e.g. one layer's.
    """
    check_whole(num_matvecs=num_matvecs, seed=seed)
    if num_matvecs < 2:
        raise ValueError(f"num_matvecs must be at least 2, for an error; got {num_matvecs}")
    place = {name: i for i, name in enumerate(operator.space.names)}
    wanted = {name: [place[n] for n in names] for name, names in blocks.items()}
    values: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    with bar(num_matvecs, "traces of layers", progress) as ticks:
        for rows in draw_probes(operator, num_matvecs, seed=seed, chunk=chunk):
            v = operator.space.split(rows)
            av = operator.products(v)
            for name, at in wanted.items():
                values[name].append(dot([v[i] for i in at], [av[i] for i in at]).cpu())
            ticks.update(rows.shape[0])
    return {name: _estimate(torch.cat(parts), 0.0, num_matvecs) for name, parts in values.items()}


def _estimate(values: torch.Tensor, exact: float, num_matvecs: int) -> Estimate:
    stderr = float(values.std()) / len(values) ** 0.5
    return Estimate(exact + float(values.mean()), stderr, num_matvecs)
