"""Random lists of tensors through the update ops, against float64.

`python fuzz_ops.py SEED FIRST LAST`: every list is drawn from (seed, its number) alone. Each step
is compared, element by element, with the same step in float64 from the very state that was stored
before it; what float32 may lose is bounded term by term (`Bounded`). It prints the number of a list
before it runs, so that a crash has a name, and a line of JSON for each list.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastkernels
from fastkernels import codes as codec

F32, F64, BF16, F16, U8 = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8,
)  # fmt: skip
REAL = (F32, F64, BF16, F16)
BETAS = (0.0, 0.1, 0.3, 0.5, 0.6, 0.9, 0.99, 0.999)
# Triton's interpreter reads denormal bfloat16 as another number.
INTERPRETED = os.environ.get("FASTKERNELS_BACKEND") == "triton"
SLACK = 4.0  # of the bounds, which count one rounding per operation
OPS = {"adamw": fastkernels.anchored_adamw_, "sgd": fastkernels.anchored_sgd_}
MOMENTS = {"adamw": ("exp_avgs", "exp_avg_sqs"), "sgd": ("momentum_buffers",)}
SCALES = {"adamw": ("exp_avg_scales", "exp_avg_sq_scales"), "sgd": ("momentum_scales",)}


@dataclass
class List:
    """The arguments of an op for one list of tensors, but for the gradients."""

    rule: str
    call: dict[str, Any]
    layouts: list[str] = field(default_factory=list)


# Drawing.


def numbers(rng: random.Random, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """float64 numbers of one of several kinds."""
    x = torch.randn(shape, generator=generator, dtype=F64)
    kind = rng.choice(["normal"] * 6 + ["tiny", "large", "wide", "zeros", "denormal", "sparse"])
    if kind == "denormal" and INTERPRETED:
        return x * 0
    if kind == "wide":
        return x * 10 ** (6 * torch.randn(shape, generator=generator, dtype=F64)).clamp(-12, 9)
    if kind == "sparse":
        return x * (torch.rand(shape, generator=generator) < 0.1)
    return x * {"tiny": 1e-8, "large": 1e6, "zeros": 0.0, "denormal": 1e-40}.get(kind, 1.0)


def shape_of(rng: random.Random, most: int) -> tuple[int, ...]:
    dims = rng.choice([0, 1, 1, 1, 2, 2, 4])
    size = 10 ** rng.uniform(0, math.log10(most))
    if dims == 1:
        return (rng.choice([0, 1, 3, 127, 129, 513, int(size)]),)
    side = max(1, int(size ** (1 / max(1, dims))))
    return tuple(rng.randint(1, side) for _ in range(dims))


def laid_out(rng: random.Random, t: Tensor) -> tuple[Tensor, str]:
    """`t` in one of the layouts that a parameter or a gradient may have."""
    layout = rng.choice(["plain"] * 4 + ["transposed", "gapped", "offset", "channels_last"])
    if layout == "transposed" and t.dim() == 2:
        return t.t().contiguous().t(), layout
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last), layout
    if layout == "gapped" and t.dim() in (1, 2):
        return t.repeat_interleave(2, -1)[..., ::2], layout
    if layout == "offset":
        memory = t.new_zeros(t.numel() + 3)
        return memory[3:].view(t.shape).copy_(t), layout
    return t, "plain"


def draw(seed: int, number: int) -> tuple[List, list[list[Tensor]], dict[str, Any]]:
    """A list, the gradients of two steps, and the options of the steps."""
    rng = random.Random(f"{seed} {number}")
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    most = int(os.environ.get("FAST_CAMPAIGN_ELEMENTS", "100000"))
    rule = rng.choice(["adamw", "sgd"])
    count, rows = rng.randint(1, 8), rng.randint(1, 3)
    lr = [10 ** rng.uniform(-6, 0 if rng.random() < 0.8 else 6) for _ in range(rows)]
    pulls = [rng.choice([0.0, 10 ** rng.uniform(-3, 9)]) / r for r in lr]
    table = []
    for k in range(rows):
        middle = (
            [rng.choice(BETAS), rng.choice(BETAS), rng.choice([1e-8, 1e-8, 1e-3, 1e-15])]
            if rule == "adamw"
            else [rng.choice([0.0, 0.5, 0.9]), rng.choice([0.0, 0.0, 0.3]), rng.randint(0, 1)]
        )
        decay = rng.choice([0.0, 0.1])
        table.append([lr[k], *middle, decay, pulls[k], rng.randint(0, 3) == 0])
    call: dict[str, Any] = {"hyper": torch.tensor(table, dtype=F64)}
    lists = ("params", "steps", "groups", "anchors", "curvature", "curvature_scales", "remainders")
    call |= {key: [] for key in (*lists, *MOMENTS[rule], *SCALES[rule])}
    found = List(rule, call)
    gradients: list[list[Tensor]] = [[], []]
    first = rng.choice([0.0, 0.0, 3.0, 1000.0, 2.0**24 - 1, 2.0**24])
    for _ in range(count):
        shape = shape_of(rng, most)
        dtype = rng.choice([F32, F32, F32, *REAL])
        p, layout = laid_out(rng, numbers(rng, generator, shape).clamp(-6e4, 6e4).to(dtype))
        found.layouts.append(layout)
        call["params"].append(p)
        call["steps"].append(torch.tensor(first))
        call["groups"].append(rng.randrange(rows))
        split = dtype == BF16 and rng.random() < 0.5
        spare = torch.randint(-9, 9, p.shape, generator=generator, dtype=torch.int16)
        call["remainders"].append(
            torch.empty_like(p, dtype=torch.int16).copy_(spare) if split else torch.empty(0)
        )
        for k, key in enumerate(MOMENTS[rule]):
            value = numbers(rng, generator, shape) * 0.01
            value = value.square() if k else value
            kinds = [F32, F32, F64, BF16] + [U8] * (layout != "gapped")
            absent = rule == "sgd" and rng.random() < 0.2
            put(
                call, key, SCALES[rule][k], p, value, rng.choice(kinds), signed=not k, absent=absent
            )
        anchored = rng.random() < 0.6
        w0 = numbers(rng, generator, shape).clamp(-6e4, 6e4).to(rng.choice(REAL))
        call["anchors"].append(w0 if anchored else None)
        f = numbers(rng, generator, shape).square().clamp(max=1e12)
        kind = rng.choice([None, F32, F64, BF16, *([U8] if layout != "gapped" else [])])
        if kind is None or not anchored:
            call["curvature"].append(None)
            call["curvature_scales"].append(None)
        else:
            put(call, "curvature", "curvature_scales", p, f, kind, signed=False)
        expanded = rng.random() < 0.1 and len(shape) == 2
        for grads in gradients:
            g = numbers(rng, generator, shape).to(rng.choice([dtype, *REAL]))
            if g.numel() and rng.random() < 0.03:
                g.view(-1)[rng.randrange(g.numel())] = rng.choice([math.nan, math.inf, -math.inf])
            grads.append(g[:1].expand(shape) if expanded else laid_out(rng, g)[0])
    options: dict[str, Any] = {"seed": rng.randrange(2**63)}
    if rng.random() < 0.3:
        options["max_grad_norm"] = 10 ** rng.uniform(-3, 3)
    if rng.random() < 0.3:
        options["grad_scale"] = torch.tensor(2.0 ** rng.randint(-3, 16))
        options["found_inf"] = torch.tensor(float(rng.random() < 0.1))
    if rng.random() < 0.8:
        options["stats"] = torch.full((4,), math.nan, dtype=F64)
    return found, gradients, options


def put(
    call: dict[str, Any], key: str, scales: str, p: Tensor, value: Tensor, dtype: torch.dtype,
    *, signed: bool, absent: bool = False,
) -> None:  # fmt: skip
    """Append `value`, stored as `dtype` in the layout of `p`, to list `key`."""
    stored = torch.empty_like(p, dtype=dtype)
    scale = torch.empty(0)
    if absent:
        stored = torch.empty(0)
    elif dtype == U8:
        dense = torch.empty_like(p, dtype=F32).copy_(value)
        codes, scale = codec.encode(codec.flat(dense), 1 << 19, signed=signed)
        codec.flat(stored).copy_(codes)
    else:
        stored.copy_(value)
    call[key].append(stored)
    call[scales].append(scale)


# The truth.


def value_of(t: Tensor, scale: Tensor | None, *, signed: bool) -> Tensor:
    """float64 numbers of a stored tensor."""
    if t.dtype != U8:
        return t.double()
    out = torch.empty_like(t, dtype=F64)
    codec.flat(out).copy_(codec.decode(codec.flat(t), scale, signed=signed))
    return out


def weight_of(p: Tensor, remainder: Tensor) -> Tensor:
    if not remainder.numel():
        return p.double()
    bits = (p.view(torch.int16).long() & 0xFFFF) << 16
    low = remainder.long()
    bits = bits + torch.where(bits & 0x7FFF0000 == 0, low.clamp(min=0), low)
    signs = torch.where(bits >= 2**31, bits - 2**32, bits)
    return signs.to(torch.int32).view(F32).double()


@dataclass
class Bounded:
    """Numbers in float64, and how far from them an exactly rounded computation may be."""

    x: Tensor
    error: Tensor
    eps: float
    tiny: float

    def made(self, x: Tensor, error: Tensor) -> Bounded:
        return Bounded(x, error + self.eps * x.abs() + self.tiny, self.eps, self.tiny)

    def __add__(self, other: Bounded) -> Bounded:
        return self.made(self.x + other.x, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return self.made(self.x - other.x, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        error = self.error * (other.x.abs() + other.error) + self.x.abs() * other.error
        return self.made(self.x * other.x, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        least = (other.x.abs() - other.error).clamp(min=0)
        x = self.x / other.x
        return self.made(x, (self.error + x.abs() * other.error) / least)

    def sqrt(self) -> Bounded:
        x = self.x.sqrt()
        low, high = (self.x - self.error).clamp(min=0).sqrt(), (self.x + self.error).sqrt()
        return self.made(x, torch.maximum(high - x, x - low))

    def where(self, condition: Tensor, other: Bounded) -> Bounded:
        pick = (
            torch.where(condition, self.x, other.x),
            torch.where(condition, self.error, other.error),
        )
        return Bounded(*pick, self.eps, self.tiny)


def scale_of(gradients: list[Tensor], options: dict[str, Any]) -> tuple[float, float, bool]:
    """(norm before clipping, what gradients are multiplied by, whether the step is skipped)."""
    scale = 1.0 / float(options.get("grad_scale", 1.0))
    norm = math.sqrt(sum(float((g.double() * scale).square().sum()) for g in gradients))
    skip = bool(float(options.get("found_inf", 0.0)))
    if (most := options.get("max_grad_norm")) is not None:
        skip |= "grad_scale" in options and not math.isfinite(norm)
        coefficient = most / (norm + 1e-6)
        scale *= 1.0 if coefficient >= 1 else coefficient
    return norm, scale, skip


def stepped(found: List, i: int, g: Tensor, scale: float) -> tuple[dict[str, Bounded], Tensor]:
    """The new weight and moments of tensor i; and float64 curvature, 1 where there is none."""
    call, p = found.call, found.call["params"][i]
    eps, tiny = (2**-53, 5e-324) if p.dtype == F64 else (2**-24, 2.0**-149)

    def exact(x: Tensor | float) -> Bounded:
        x = torch.as_tensor(x, dtype=F64).expand(p.shape)
        return Bounded(x, torch.zeros_like(x), eps, tiny)

    def rounded(x: Tensor | float) -> Bounded:
        x = torch.as_tensor(x, dtype=F64).expand(p.shape)
        return Bounded(x, eps * x.abs() + tiny, eps, tiny)

    h = call["hyper"][call["groups"][i]].tolist()
    lr, decay, maximize = h[0], h[4], h[6]
    step = float(call["steps"][i]) + 1
    if step > 2**24:
        step = float(2**24)
    w = exact(weight_of(p, call["remainders"][i]))
    grad = rounded(g.double()) * rounded(-scale if maximize else scale)
    new: dict[str, Bounded] = {}
    stored = [
        None if p.numel() and not call[key][i].numel() else exact(
            value_of(call[key][i], call[scales][i], signed=not k).to(F64))
        for k, (key, scales) in enumerate(zip(MOMENTS[found.rule], SCALES[found.rule], strict=True))
    ]  # fmt: skip
    if p.dtype != F64:  # the arithmetic is float32
        stored = [m and rounded(m.x) for m in stored]
    if found.rule == "adamw":
        beta1, beta2, small = h[1:4]
        m, v = stored
        if 1 - beta1 < 0.5:
            m = m + rounded(1 - beta1) * (grad - m)
        else:
            m = grad - rounded(beta1) * (grad - m)
        v = rounded(beta2) * v + rounded(1 - beta2) * (grad * grad)
        root = v.sqrt() * rounded(1 / math.sqrt(1 - beta2**step)) + rounded(small)
        u = w * rounded(1 - lr * decay) - rounded(lr / (1 - beta1**step)) * (m / root)
        new |= {"exp_avgs": m, "exp_avg_sqs": v}
    else:
        momentum, dampening, nesterov = h[1:4]
        (b,) = stored
        grad = grad + rounded(decay) * w
        move = grad
        if b is not None:
            b = grad if step == 1 else rounded(momentum) * b + rounded(1 - dampening) * grad
            move = grad + rounded(momentum) * b if nesterov else b
            new["momentum_buffers"] = b
        u = w - rounded(lr) * move
    f = torch.ones((), dtype=F64)
    if call["anchors"][i] is not None:
        w0, c = rounded(call["anchors"][i].double()), rounded(lr * h[5])
        if call["curvature"][i] is not None:
            f = value_of(call["curvature"][i], call["curvature_scales"][i], signed=False)
            c = c * rounded(f)
        share = exact(1.0) / (exact(1.0) + c)
        weak, strong = u + c * share * (w0 - u), w0 + (u - w0) * share
        new["away"] = strong.where(c.x > 1, weak) - w0
        u = strong.where(c.x > 1, weak)
    return new | {"params": u, "change": u - w}, f


# The comparison.


def cell_of(t: Tensor, scale: Tensor | None, x: Tensor, *, signed: bool, second: bool) -> Tensor:
    """How far storing may move `x`: half a unit in the last place, or one where it is random."""
    if t.dtype == F64:
        return torch.zeros_like(x)
    if t.dtype == U8:
        wide = torch.empty_like(t, dtype=F64)
        flat = codec.flat(wide)
        flat.copy_(scale.double().repeat_interleave(128)[: t.numel()])
        if signed:  # a quarter of an octave, or a step of the flat part
            fine = x.abs() / 4 + wide / 7000
            return (
                torch.where(x.abs() < 9 * wide, fine, torch.minimum(fine, wide)) * 1.01 + 2.0**-149
            )
        return (x.abs() + wide) / 8 * 1.01 + 2.0**-149
    info = torch.finfo(t.dtype)
    unit = (x.abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
    return unit if second and t.dtype == BF16 else unit / 2


def finite_block(t: Tensor, x: Tensor) -> Tensor:
    """Where the code block of an element has nothing that is not finite, or beyond float32."""
    fine = torch.empty_like(t, dtype=torch.bool).copy_(x.isfinite() & (x.abs() < 1e38))
    if t.dtype == U8:
        flat = codec.flat(fine)
        bad = torch.nn.functional.pad(~flat, (0, -flat.numel() % 128)).view(-1, 128).any(1)
        flat.copy_(~bad.repeat_interleave(128)[: flat.numel()])
    return fine


def wrong_entries(what: str, ours: Tensor, truth: Bounded, cell: Tensor, fine: Tensor) -> list[str]:
    error, bound = (ours - truth.x).abs(), SLACK * truth.error + cell
    # Nothing is asked of what overflows on the way; what is not finite in the truth must not be.
    known = fine & truth.error.isfinite() & (truth.error < 1e37)
    bad = known & ~(error <= bound)
    lost = ~truth.x.isfinite() & ours.isfinite() & ~ours.isnan()
    out = []
    if bad.any():
        k = int(bad.flatten().nonzero()[0])
        out.append(f"{what}[{k}]: {ours.flatten()[k]:.9g}, not {truth.x.flatten()[k]:.9g} "
                   f"+- {bound.flatten()[k]:.2g}")  # fmt: skip
    if lost.any():
        out.append(f"{what}: finite where the truth is not")
    return out


def check_list(seed: int, number: int) -> tuple[int, list[str]]:
    """(tensors compared, what is wrong) of one list, stepped twice."""
    found, gradients, options = draw(seed, number)
    call, rule = found.call, found.rule
    written = ("params", "steps", "remainders", *MOMENTS[rule], *SCALES[rule])
    wrong: list[str] = []
    for grads in gradients:
        norm, scale, skip = scale_of(grads, options)
        before = {key: [t.clone() for t in call[key]] for key in written}
        kept = [g.clone() for g in grads]
        truths = [stepped(found, i, g, scale) for i, g in enumerate(grads)]
        OPS[rule](grads=grads, **call, **options)
        wrong += [f"grads[{i}] changed" for i, (g, k) in enumerate(zip(grads, kept, strict=True))
                  if not torch.equal(g.nan_to_num(7), k.nan_to_num(7))]  # fmt: skip
        if skip:
            for key, tensors in before.items():
                for i, (a, b) in enumerate(zip(tensors, call[key], strict=True)):
                    if not ((a == b) | (a != a)).all():
                        wrong.append(f"{key}[{i}] changed in a skipped step")
            continue
        limit = SLACK * 2**-24
        total = {"away": 0.0, "change": 0.0, "forgetting": 0.0}
        spread = dict.fromkeys(total, 0.0)
        for i, (truth, f) in enumerate(truths):
            p = call["params"][i]
            if float(call["steps"][i]) != min(float(before["steps"][i]) + 1, 2.0**24):
                wrong.append(f"steps[{i}] is {float(call['steps'][i])}")
            for k, key in enumerate(MOMENTS[rule]):
                t, s = call[key][i], call[SCALES[rule][k]][i]
                if key not in truth or not t.numel():
                    continue
                cell = cell_of(t, s, truth[key].x, signed=not k, second=bool(k))
                ours = value_of(t, s, signed=not k)
                wrong += wrong_entries(f"{key}[{i}]", ours, truth[key], cell,
                                       finite_block(t, truth[key].x))  # fmt: skip
            split = call["remainders"][i].numel() > 0
            cell = cell_of(p if not split else p.float(), None, truth["params"].x, signed=True,
                           second=False)  # fmt: skip
            most = torch.finfo(F32 if split else p.dtype).max
            fine = truth["params"].x.abs() < 0.99 * most
            ours = weight_of(p, call["remainders"][i])
            wrong += wrong_entries(f"params[{i}]", ours, truth["params"], cell, fine)
            for key, weight in (("away", 1.0), ("change", 1.0), ("forgetting", f)):
                part = truth.get("away" if key == "forgetting" else key)
                if part is not None:
                    total[key] += float((weight * part.x.square()).sum())
                    spread[key] += float((weight * part.error.square()).sum())
        figures = options["stats"].tolist() if "stats" in options else []
        truth_of = [
            norm,
            *(math.sqrt(total[k]) for k in ("away", "change")),
            total["forgetting"] / 2,
        ]
        allowed = [
            norm * 1e-5,
            *(math.sqrt(spread[k]) for k in ("away", "change")),
            math.sqrt(total["forgetting"] * spread["forgetting"]) + spread["forgetting"],
        ]
        for k, ours in enumerate(figures):
            size = truth_of[k] if k < 3 else math.sqrt(truth_of[k])
            plain = math.isfinite(allowed[k]) and 1e-15 < size < 1e15
            if plain and abs(ours - truth_of[k]) > SLACK * allowed[k] + 1e2 * limit * truth_of[k]:
                wrong.append(f"stats[{k}] is {ours:.9g}, not {truth_of[k]:.9g}")
    return 2 * len(call["params"]), wrong


def main() -> None:
    seed, first, last = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    for number in range(first, last):
        print("begin", number, flush=True)
        tensors, wrong = check_list(seed, number)
        print(json.dumps({"list": number, "tensors": tensors, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
