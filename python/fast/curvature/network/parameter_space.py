"""Vectors over named parameters, in the three forms in which users have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Vectors = Tensor | Mapping[str, Tensor]
# One [K, *shape] per parameter: this is the form that operators work in.
Blocks = list[Tensor]


class ParameterSpace:
    """The P coordinates of some named tensors, flattened one after the other, in order."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        if not tensors:
            raise ValueError("params selects no parameter: nothing to differentiate by")
        self.names = tuple(tensors)
        self.shapes = tuple(t.shape for t in tensors.values())
        self.dtypes = tuple(t.dtype for t in tensors.values())
        self.sizes = tuple(t.numel() for t in tensors.values())
        self.numel = sum(self.sizes)
        first = next(iter(tensors.values()))
        self.device = first.device
        self.dtype = first.dtype
        for name, t in tensors.items():
            if t.device != self.device:
                raise ValueError(
                    f"parameters lie on {self.device} and {t.device} ({name}): select those of one "
                    "device with params="
                )
            self.dtype = torch.promote_types(self.dtype, t.dtype)
        if not self.dtype.is_floating_point:
            raise ValueError(f"parameters must be floating point; got {self.dtype}")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ParameterSpace)
            and self.names == other.names
            and self.shapes == other.shapes
        )

    __hash__ = None  # type: ignore[assignment]

    def unpack(self, vectors: Vectors) -> tuple[Blocks, Callable[[Blocks], Vectors]]:
        """One [K, *shape] block per parameter, and a function back to the caller's form.

        Args:
            vectors: [P], [P, K], or a dict name -> [K, *shape] (with one K for all, or without).

        Raises:
            ValueError, TypeError: the form, shape, dtype or device does not fit.
        """
        if isinstance(vectors, Mapping):
            return self._unpack_dict(vectors)
        if not isinstance(vectors, Tensor):
            raise TypeError(
                f"V must be a tensor or a dict of tensors; got {type(vectors).__name__}"
            )
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.numel:
            raise ValueError(
                f"V must be [P] or [P, K] with P = {self.numel}; got {list(vectors.shape)}"
            )
        self._check_dtype("V", vectors, self.dtype)
        rows = vectors[None] if vectors.ndim == 1 else vectors.T
        single = vectors.ndim == 1

        def restore(blocks: Blocks) -> Tensor:
            flat = self.join(blocks)
            return flat[0] if single else flat.T

        return self.split(rows), restore

    def _unpack_dict(
        self, vectors: Mapping[str, Tensor]
    ) -> tuple[Blocks, Callable[[Blocks], Vectors]]:
        missing = [n for n in self.names if n not in vectors]
        unknown = [n for n in vectors if n not in self.names]
        if missing or unknown:
            raise ValueError(
                f"V must have one entry per parameter: missing {missing[:5]}, unknown {unknown[:5]}"
            )
        single = all(vectors[n].shape == s for n, s in zip(self.names, self.shapes, strict=True))
        blocks = []
        num_vectors = None
        for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True):
            v = vectors[name][None] if single else vectors[name]
            if v.shape[1:] != shape or (num_vectors is not None and v.shape[0] != num_vectors):
                raise ValueError(
                    f"V[{name!r}] must be [K, {', '.join(map(str, shape))}] with the same K for "
                    f"every name; got {list(vectors[name].shape)}"
                )
            self._check_dtype(f"V[{name!r}]", v, dtype)
            num_vectors = v.shape[0]
            blocks.append(v.contiguous())

        def restore(blocks: Blocks) -> dict[str, Tensor]:
            return {n: b[0] if single else b for n, b in zip(self.names, blocks, strict=True)}

        return blocks, restore

    def _check_dtype(self, name: str, v: Tensor, dtype: torch.dtype) -> None:
        if v.dtype != dtype or v.device != self.device:
            raise ValueError(
                f"{name} is {v.dtype} on {v.device}, the parameters are {dtype} on {self.device}: "
                f"pass {name}.to('{self.device}', {dtype})"
            )

    def split(self, rows: Tensor) -> Blocks:
        """Rows [K, P] as blocks: one contiguous [K, *shape] per parameter."""
        parts = rows.split(self.sizes, dim=1)
        return [
            p.reshape(rows.shape[0], *s).to(d).contiguous()
            for p, s, d in zip(parts, self.shapes, self.dtypes, strict=True)
        ]

    def join(self, blocks: Sequence[Tensor]) -> Tensor:
        """Blocks as rows: a contiguous [K, P]."""
        return torch.cat(
            [
                b.reshape(b.shape[0], n).to(self.dtype)
                for b, n in zip(blocks, self.sizes, strict=True)
            ],
            dim=1,
        )

    def zeros(self, num_vectors: int) -> Blocks:
        """Blocks of zeros."""
        return [
            torch.zeros((num_vectors, *s), dtype=d, device=self.device)
            for s, d in zip(self.shapes, self.dtypes, strict=True)
        ]

    def slices(self) -> dict[str, slice]:
        """The places of each parameter among the P coordinates, by its name."""
        out, start = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            out[name] = slice(start, start + size)
            start += size
        return out

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n}{list(s)}" for n, s in zip(self.names, self.shapes, strict=True))
        return f"ParameterSpace(P={self.numel}: {shapes})"


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product per vector, [K], summed in float64 where the device has it."""
    total: Tensor | float = 0.0
    for x, y in zip(a, b, strict=True):
        # Tangents lie in memory in any order, and a copy takes longer than the product.
        order = 0, *sorted(range(1, x.ndim), key=x.stride, reverse=True)
        x, y = x.permute(order), y.permute(order)
        rows = (x.shape[0], x.shape[1:].numel())
        part = torch.linalg.vecdot(x.reshape(rows), y.reshape(rows))
        total = total + (part.double() if part.device.type != "mps" else part)
    assert isinstance(total, Tensor)
    return total
