"""Checks and layout rules of the multi-tensor ops: what comes in must be safe for a flat loop."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkernels._update import Batch, Optionals


def check_batch(op: str, batch: Batch, columns: Sequence[str], moment_names: Sequence[str]) -> None:
    """Raise a ValueError that names the list and the entry when `batch` is inconsistent."""
    count = len(batch.params)
    lists: dict[str, Optionals] = {"grads": batch.grads, "steps": batch.steps}
    lists |= dict(zip(moment_names, batch.moments, strict=True))
    optional: dict[str, Optionals] = {"anchors": batch.anchors, "curvature": batch.curvature}
    if len(batch.groups) != count:
        raise ValueError(f"{op}: groups has {len(batch.groups)} entries for {count} params")
    for name, tensors in {**lists, **optional}.items():
        if len(tensors) != count and not (name in optional and not tensors):
            raise ValueError(f"{op}: {name} has {len(tensors)} entries for {count} params")
    if batch.hyper.dim() != 2 or batch.hyper.shape[1] != len(columns):
        raise ValueError(
            f"{op}: hyper must be [groups, {len(columns)}] ({', '.join(columns)}), "
            f"got {list(batch.hyper.shape)}"
        )
    if batch.groups and not 0 <= min(batch.groups) <= max(batch.groups) < batch.hyper.shape[0]:
        raise ValueError(f"{op}: groups must index the {batch.hyper.shape[0]} rows of hyper")
    for i, p in enumerate(batch.params):
        if not p.is_floating_point():
            raise ValueError(f"{op}: params[{i}] is {p.dtype}; it must be a real floating type")
        for name, tensors in {**lists, **optional}.items():
            t = tensors[i] if tensors else None
            if t is None or name == "steps" or (t.numel() == 0 and name in moment_names):
                continue
            if t.layout is not p.layout:
                raise ValueError(f"{op}: {name}[{i}] is {t.layout}, params[{i}] {p.layout}")
            if t.shape != p.shape:
                raise ValueError(
                    f"{op}: {name}[{i}] is {list(t.shape)}, params[{i}] is {list(p.shape)}"
                )
            if t.device != p.device:
                raise ValueError(f"{op}: {name}[{i}] is on {t.device}, params[{i}] on {p.device}")


def is_dense(t: Tensor) -> bool:
    """Whether `t` fills its storage range without gaps and without overlap."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether element i of the storage of `a` belongs to element i of `b` (same shapes given)."""
    if a.stride() == b.stride():
        return True
    return all(
        size <= 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def like(t: Tensor, param: Tensor) -> Tensor:
    """`t`, or a copy of it in the layout of `param`."""
    if same_layout(t, param):
        return t
    return t.new_empty_strided(param.shape, param.stride()).copy_(t)


def align(batch: Batch) -> Batch:
    """Give every tensor its parameter's layout, by copies where it has another.

    Copies of mutated tensors are noted in `batch.copies`; `write_back` returns their values.
    """
    params, moments = list(batch.params), [list(m) for m in batch.moments]
    grads, anchors, curvature = list(batch.grads), list(batch.anchors), list(batch.curvature)
    copies = []
    for i, p in enumerate(params):
        if p.numel() == 0:
            continue
        if not is_dense(p):
            params[i] = p.contiguous()
            copies.append((p, params[i]))
            p = params[i]
        grads[i] = like(grads[i], p)
        for optional in (anchors, curvature):
            if optional and (t := optional[i]) is not None:
                optional[i] = like(t, p)
        for ms in moments:
            if ms[i].numel() and not same_layout(ms[i], p):
                copies.append((ms[i], like(ms[i], p)))
                ms[i] = copies[-1][1]
    return Batch(
        params, grads, tuple(moments), batch.steps, batch.hyper, batch.groups, anchors, curvature,
        batch.curvature_scales, batch.moment_scales, batch.remainders, batch.grad_scale,
        batch.found_inf, batch.max_grad_norm, batch.stats, batch.seed, copies,
    )  # fmt: skip


def write_back(batch: Batch) -> None:
    for target, copy in batch.copies:
        target.copy_(copy)
