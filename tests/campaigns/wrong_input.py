"""Random wrong inputs to the update ops and the optimizers.

`python wrong_input.py SEED FIRST LAST`: every case is drawn from (seed, its number) alone, and run
once on each backend that can run here. It prints the number of a case before it runs, so that a
crash has a name, and a line of JSON for each: the kind of fault, what each backend said, and
whether it had written anything before.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fast
import fastkernels
from fastkernels import codes as codec
from fastkernels.op import ENVIRONMENT

OPS = {"adamw": fastkernels.anchored_adamw_, "sgd": fastkernels.anchored_sgd_}
MOMENTS = {"adamw": ["exp_avgs", "exp_avg_sqs"], "sgd": ["momentum_buffers"]}
SCALES = {"adamw": ["exp_avg_scales", "exp_avg_sq_scales"], "sgd": ["momentum_scales"]}
Call = dict[str, Any]


def backends() -> list[str]:
    rows = fastkernels.explain()
    return sorted({r.backend for r in rows if r.op == "anchored_adamw_" and r.device == "cpu"
                   and r.available})  # fmt: skip


# A call of an op, and what can be wrong with it.


def right_call(rng: random.Random, rule: str) -> Call:
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
    shapes = [rng.choice([(7,), (2, 3), (130,), (4, 1, 5)]) for _ in range(rng.randint(1, 4))]

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        return [torch.ones(s, dtype=dtype) for s in shapes]

    row = {"adamw": [1e-2, 0.9, 0.999, 1e-8], "sgd": [1e-2, 0.9, 0.0, 0.0]}[rule]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "params": tensors(dtype), "grads": tensors(dtype), "anchors": tensors(dtype),
        "curvature": tensors(torch.float32), **{key: tensors(state) for key in MOMENTS[rule]},
        "steps": [torch.zeros(()) for _ in shapes], "groups": [0] * len(shapes),
        "hyper": torch.tensor([[*row, 0.0, 0.1, 0.0]], dtype=torch.float64),
        "stats": torch.zeros(4, dtype=torch.float64), "seed": 3,
    }  # fmt: skip


def misaligned(t: Tensor) -> Tensor:
    raw = bytearray(t.nbytes + 1)
    return torch.frombuffer(raw, dtype=t.dtype, offset=1).view(t.shape)


def resized(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes // 2)
    return t


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.ones(t.shape, dtype=t.dtype)


# What no list takes as an entry in place of a tensor `t`.
ENTRIES: dict[str, Callable[[Tensor], Any]] = {
    "a word": lambda t: "x",
    "a number": lambda t: 1.0,
    "a list": lambda t: [1.0],
    "an array": lambda t: t.float().numpy(),
    "another shape": lambda t: torch.ones(t.numel() + 1, dtype=t.dtype),
    "a matrix": lambda t: torch.ones(*t.shape, 2, dtype=t.dtype),
    "integers": lambda t: torch.ones(t.shape, dtype=torch.int64),
    "bools": lambda t: torch.ones(t.shape, dtype=torch.bool),
    "complex numbers": lambda t: torch.ones(t.shape, dtype=torch.complex64),
    "sparse": lambda t: torch.ones(t.shape, dtype=t.dtype).to_sparse(),
    "meta": lambda t: t.to("meta"),
    "misaligned": misaligned,
    "resized": resized,
}
OPTIONS: dict[str, list[Any]] = {
    "max_grad_norm": [0, 0.0, -1, -1.0, math.nan, -math.inf, "1", True, [1.0], torch.ones(())],
    "seed": [-1, 2**63, 2**64, 1.5, "a", None, True, [1], torch.ones(())],
    "grad_scale": [2.0, True, "x", torch.ones(2), torch.ones(0), [1.0],
                   torch.ones((), dtype=torch.complex64)],
    "found_inf": [True, 1, "x", torch.ones(3), torch.ones(0), [0.0]],
    "stats": [[0.0] * 4, torch.zeros(4), torch.zeros(3, dtype=torch.float64), "x",
              torch.zeros(8, dtype=torch.float64)[::2], misaligned(torch.zeros(4).double()),
              inference(torch.zeros(4).double())],
    "hyper": [None, [[1.0] * 7], torch.ones(1, 7), torch.ones(7, dtype=torch.float64), "x",
              torch.ones(1, 6, dtype=torch.float64), torch.ones(1, 14).double()[:, ::2],
              misaligned(torch.ones(1, 7).double())],
    "groups": [None, 0, "0", [1], [-1], [0.0], ["0"], [None], torch.zeros(1, dtype=torch.int64)],
}  # fmt: skip


def spoil_entry(rng: random.Random, rule: str, call: Call) -> str:
    key = rng.choice(["params", "grads", "anchors", "curvature", "steps", *MOMENTS[rule]])
    i, (kind, make) = rng.randrange(len(call["params"])), rng.choice([*ENTRIES.items()])
    call[key][i] = make(call[key][i])
    return f"{key}: {kind}"


def spoil_length(rng: random.Random, rule: str, call: Call) -> str:
    key = rng.choice(["params", "grads", "anchors", "curvature", "steps", "groups", *MOMENTS[rule]])
    call[key] = call[key] * 2 if rng.random() < 0.5 or len(call[key]) < 2 else call[key][:-1]
    return f"{key}: {len(call[key])} entries"


def spoil_list(rng: random.Random, rule: str, call: Call) -> str:
    key = rng.choice(["params", "grads", "anchors", "curvature", "steps", *MOMENTS[rule]])
    call[key] = rng.choice([None, torch.ones(len(call["params"]), 7), {0: call[key]}, "x", 1])
    return f"{key}: no list"


def spoil_option(rng: random.Random, rule: str, call: Call) -> str:
    key = rng.choice([*OPTIONS])
    call[key] = rng.choice(OPTIONS[key])
    return f"{key}: {str(call[key])[:40]}"


def spoil_memory(rng: random.Random, rule: str, call: Call) -> str:
    written = ["params", "steps", *MOMENTS[rule]]
    key, other = rng.choice(written), rng.choice([*written, "grads", "anchors", "curvature"])
    i, j = rng.randrange(len(call["params"])), rng.randrange(len(call["params"]))
    if (key, i) == (other, j) or rng.random() < 0.3:
        call[key][i] = inference(call[key][i])
        return f"{key}: inference tensor"
    if rng.random() < 0.2 and call[key][i].numel() > 1:
        t = call[key][i]
        call[key][i] = t.flatten()[0].clone().expand(t.shape)
        return f"{key}: expanded"
    a, b = call[key][i], call[other][j]
    if a.numel() == 1 or b.numel() == 1 or a.dtype != b.dtype:
        call[key][i] = (
            torch.empty(0) if rule == "adamw" or key != MOMENTS["sgd"][0] else misaligned(a)
        )
        return f"{key}: empty or misaligned"
    memory = torch.ones(a.numel() + b.numel(), dtype=a.dtype)
    call[key][i] = memory[: a.numel()].view(a.shape)
    start = a.numel() - rng.randint(1, min(a.numel(), b.numel()))
    call[other][j] = memory[start : start + b.numel()].view(b.shape)
    return f"{key} and {other} overlap"


def spoil_codes(rng: random.Random, rule: str, call: Call) -> str:
    k = rng.randrange(len(MOMENTS[rule]))
    call[MOMENTS[rule][k]] = [torch.zeros(p.shape, dtype=torch.uint8) for p in call["params"]]
    scales: list[Any] = [torch.zeros(codec.code_scales(p.numel())) for p in call["params"]]
    kind = rng.choice(
        ["missing", "short", "long", "double", "few", "none", "integers", "inference"]
    )
    i = rng.randrange(len(scales))
    if kind in ("short", "long"):
        scales[i] = torch.zeros(max(0, scales[i].numel() + (1 if kind == "long" else -1)))
    elif kind in ("double", "integers"):
        scales[i] = scales[i].to({"double": torch.float64, "integers": torch.int32}[kind])
    elif kind == "inference":
        scales[i] = inference(scales[i])
    else:
        scales[i] = None if kind == "none" else scales[i]
    call[SCALES[rule][k]] = {"missing": [], "few": scales * 2}.get(kind, scales)
    return f"{MOMENTS[rule][k]}: scales {kind}"


def spoil_remainder(rng: random.Random, rule: str, call: Call) -> str:
    if call["params"][0].dtype == torch.bfloat16:
        dtype = rng.choice([torch.int32, torch.float32, torch.uint8])
        call["remainders"] = [torch.zeros(p.shape, dtype=dtype) for p in call["params"]]
        return f"remainders: {dtype}"
    call["remainders"] = [torch.zeros(p.shape, dtype=torch.int16) for p in call["params"]]
    return "remainders of another dtype's parameters"


OP_FAULTS = [spoil_entry, spoil_entry, spoil_length, spoil_list, spoil_option, spoil_option,
             spoil_memory, spoil_codes, spoil_remainder]  # fmt: skip


# An optimizer, and what can be wrong with it.

VALUES: dict[str, list[Any]] = {
    "lr": [-1.0, math.inf, math.nan, "x", None, torch.ones(2), torch.tensor(-1.0)],
    "weight_decay": [-0.1, math.inf, math.nan, "x", None],
    "anchor_decay": [-0.1, math.nan, -math.inf, "x", None],
    "ramp": [-2, math.nan, "x"],
    "stall": [-1, math.nan, None],
}
OWN = {
    "adamw": {"betas": [(2, 3), (0.9, 1.0), (-0.1, 0.9), 0.9, (0.9,), ("a", 0.9), (math.nan, 0.9)],
              "eps": [-1.0, math.inf, math.nan, "x", None]},
    "sgd": {"momentum": [-0.1, math.inf, math.nan, "x"], "dampening": [math.inf, math.nan, "x"]},
}  # fmt: skip
BUILT = {
    "max_grad_norm": [0, -1.0, math.nan, "1", torch.ones(2)],
    "seed": [-1, 2**63, 1.5, "a", None],
    "state_dtype": [torch.float16, torch.int32, "x"],
    "curvature": [[torch.ones(3)], [torch.full((5,), -1.0)], [torch.full((5,), math.nan)], 3],
}


def optimizer_case(rng: random.Random, rule: str) -> tuple[str, Callable[[], Iterator[Any]]]:
    """(kind, a generator): it yields what may not change, then does what must be refused."""
    cls = {"adamw": fast.AdamW, "sgd": fast.SGD}[rule]
    kind = rng.choice(["built", "built", "group", "group", "group", "state", "state", "load"])
    values = VALUES | OWN[rule]
    key = rng.choice([*values])
    value = rng.choice(values[key])
    compact = rng.choice([None, torch.bfloat16, torch.uint8])
    momentum = {"momentum": 0.9} if rule == "sgd" else {}
    what = rng.choice(["missing", "empty", "short", "integers", "misaligned", "inference", "word"])
    moment = rng.choice({"adamw": ["exp_avg", "exp_avg_sq"], "sgd": ["momentum_buffer"]}[rule])
    if rule == "sgd" and what == "missing":
        moment = "step"
    built = rng.choice([*BUILT])
    built_value = rng.choice(BUILT[built])
    foreign = rng.choice(["RAdam", "NAdam", "Adamax", "RMSprop", "Rprop", "ASGD"])

    def run() -> Iterator[Any]:
        p = nn.Parameter(torch.ones(5))
        p.grad = torch.ones(5)
        if kind == "built":
            options = {built: built_value} if built_value is not None or built == "seed" else {}
            if rng_choice:
                options = {key: value}
            yield [p]
            cls([p], **options)
            return
        optimizer = cls([p], anchor_decay=0.1, state_dtype=compact, **momentum)
        optimizer.step()
        state = optimizer.state[p]
        if kind == "group":
            optimizer.param_groups[0][key] = value
        elif kind == "state":
            name = moment if compact is not torch.uint8 or moment == "step" else f"{moment}_codes"
            t = state[name]
            if what == "missing":
                del state[name]
            else:
                state[name] = {
                    "empty": torch.empty(0), "short": torch.ones(3, dtype=t.dtype), "word": "x",
                    "integers": torch.ones(t.shape, dtype=torch.int64),
                    "misaligned": misaligned(t.float()), "inference": inference(t),
                }[what]  # fmt: skip
        yield [p, *(t for t in state.values() if isinstance(t, Tensor))]
        if kind != "load":
            optimizer.step()
            return
        q = nn.Parameter(torch.ones(5))
        q.grad = torch.ones(5)
        other = getattr(torch.optim, foreign)([q])
        other.step()
        optimizer.load_state_dict(other.state_dict())

    rng_choice = rng.random() < 0.5
    names = {"built": f"{key}={value}" if rng_choice else f"{built}={built_value}",
             "group": f"{key}={value}", "state": f"{moment} {what}", "load": foreign}  # fmt: skip
    return f"{rule} {kind}: {names[kind]}", run


# Running.


def op_case(rng: random.Random, rule: str) -> tuple[str, Callable[[], Iterator[Any]]]:
    state = rng.getstate()
    kind = rng.choice(OP_FAULTS)(rng, rule, right_call(rng, rule))

    def run() -> Iterator[Any]:
        again = random.Random()
        again.setstate(state)
        fault = again.choice(OP_FAULTS)
        call = right_call(again, rule)
        fault(again, rule, call)
        found = [t for v in call.values() for t in (v if isinstance(v, (list, tuple)) else [v])]
        yield found
        OPS[rule](**call)

    return f"{rule}: {kind}", run


def readable(t: Any) -> bool:
    if not isinstance(t, Tensor) or t.is_meta or t.layout is not torch.strided:
        return False
    return t.untyped_storage().nbytes() >= t.nbytes


def outcome(run: Callable[[], Iterator[Any]]) -> tuple[str, bool]:
    """(what was raised, or "accepted"; whether a tensor was changed before)."""
    case = run()
    tensors = list(filter(readable, next(case)))
    before = [t.clone() for t in tensors]
    try:
        next(case)
    except StopIteration:
        return "accepted", True
    except Exception as error:  # noqa: BLE001 - any is an outcome
        said = f"{type(error).__name__}: {error}"
    changed = any(not torch.equal(a, b.detach()) for a, b in zip(before, tensors, strict=True)
                  if not a.isnan().any())  # fmt: skip
    return said, changed


def main() -> None:
    seed, first, last = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in range(first, last):
        rng = random.Random(f"{seed} {number}")
        rule = rng.choice(["adamw", "sgd"])
        name, run = (op_case if rng.random() < 0.7 else optimizer_case)(rng, rule)
        print("begin", number, name, flush=True)
        said, changed = {}, {}
        for backend in backends():
            os.environ[ENVIRONMENT] = backend
            said[backend], changed[backend] = outcome(run)
        print(
            json.dumps({"case": number, "kind": name, "said": said, "changed": changed}), flush=True
        )


if __name__ == "__main__":
    main()
