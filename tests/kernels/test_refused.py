"""What the ops refuse: the same by every backend, by name, and before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkernels
from fastkernels import codes as codec

pytestmark = pytest.mark.usefixtures("backend")
N = 7


def arguments(rule: str = "adamw", **hyper: float) -> dict[str, Any]:
    """A call of two tensors that every backend takes."""
    ones: Callable[[], list[Tensor]] = lambda: [torch.ones(N), torch.ones(3, 4)]  # noqa: E731
    moments = {"adamw": ("exp_avgs", "exp_avg_sqs"), "sgd": ("momentum_buffers",)}[rule]
    row = {"adamw": [1e-2, 0.9, 0.999, 1e-8], "sgd": [1e-2, 0.9, 0.0, 0.0]}[rule]
    return {
        "params": ones(), "grads": ones(), **{key: ones() for key in moments},
        "steps": [torch.zeros(()), torch.zeros(())], "groups": [0, 0], "anchors": ones(),
        "hyper": torch.tensor([[*row, 0.0, 0.1, 0.0]], dtype=torch.float64),
    }  # fmt: skip


def misaligned(n: int = N, width: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.frombuffer(bytearray(width * n + 1), dtype=dtype, offset=1)


def resized(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(N)


def first(key: str, make: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    """Replace the first entry of a list."""
    return lambda call: call[key].__setitem__(0, make())


def given(**options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda call: call.update(options)


def same(key: str, other: str, i: int = 0, j: int = 0) -> Callable[[dict[str, Any]], None]:
    """Entry i of list `key` becomes entry j of list `other`."""
    return lambda call: call[key].__setitem__(i, call[other][j])


def overlapping(call: dict[str, Any]) -> None:
    memory = torch.ones(30)
    call["params"] = [memory[:N], memory[N - 1 : N + 11].view(3, 4)]


def stats_in_a_param(call: dict[str, Any]) -> None:
    call["stats"] = torch.ones(4, dtype=torch.float64)
    call["params"][0] = call["stats"].view(torch.float32)[:N]


def hyper_in_a_param(call: dict[str, Any]) -> None:
    call["params"][0] = call["hyper"].view(torch.float32)[0, :N]


def codes_without_scales(call: dict[str, Any]) -> None:
    call["exp_avgs"] = [t.byte() for t in call["exp_avgs"]]
    call["exp_avg_scales"] = [torch.zeros(1)]


def second_on_meta(call: dict[str, Any]) -> None:
    for key in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "anchors"):
        call[key][1] = call[key][1].to("meta")


REFUSED = {
    "empty moment": (first("exp_avgs", lambda: torch.empty(0)), r"exp_avgs\[0\] is \[0\]"),
    "empty second": (first("exp_avg_sqs", lambda: torch.empty(0)), r"exp_avg_sqs\[0\] is \[0\]"),
    "missing moment": (first("exp_avgs", lambda: None), r"exp_avgs\[0\] must be a tensor; got N"),
    "resized moment": (first("exp_avgs", lambda: resized(torch.ones(N))), "needs 28 bytes of its"),
    "resized param": (first("params", lambda: resized(torch.ones(N))), r"params\[0\] needs 28 byt"),
    "resized anchor": (first("anchors", lambda: resized(torch.ones(N))), r"anchors\[0\] needs 28"),
    "few scales": (codes_without_scales, "exp_avg_scales has 1 entries for 2 params"),
    "misaligned param": (first("params", misaligned), r"params\[0\] begins at an address that is"),
    "misaligned grad": (first("grads", misaligned), r"grads\[0\] begins at an address that is"),
    "misaligned moment": (first("exp_avg_sqs", misaligned), r"exp_avg_sqs\[0\] begins at an addr"),
    "misaligned anchor": (
        first("anchors", lambda: misaligned(N, 2, torch.float16)),
        r"anchors\[0\] begins at an address that is no multiple of its 2 bytes",
    ),
    "misaligned hyper": (
        lambda call: given(hyper=misaligned(7, 8, torch.float64).view(1, 7))(call),
        "hyper must be contiguous and aligned",
    ),
    "inference param": (first("params", inference), r"params\[0\] is an inference tensor"),
    "inference moment": (first("exp_avgs", inference), r"exp_avgs\[0\] is an inference tensor"),
    "negative view": (
        first("anchors", lambda: torch._neg_view(torch.ones(N))), r"anchors\[0\] is a negative"),
    "expanded moment": (first("exp_avgs", lambda: torch.ones(1).expand(N)), r"exp_avgs\[0\] is w"),
    "woven param": (
        lambda c: c["params"].__setitem__(1, torch.ones(8).as_strided((3, 4), (2, 1))),
        r"params\[1\] is written to, and several of its elements are one in memory",
    ),
    "param twice": (
        lambda c: c.update({k: [c[k][0], c[k][0]] if k == "params" else [c[k][0], c[k][0].clone()]
                            for k in ("params", "grads", "exp_avgs", "exp_avg_sqs", "anchors")}),
        r"params\[0\] and params\[1\] share memory",
    ),
    "overlapping params": (overlapping, r"params\[0\] and params\[1\] share memory"),
    "moment is moment": (same("exp_avgs", "exp_avg_sqs"), r"exp_avg_sqs\[0\] and exp_avgs\[0\] sh"),
    "grad is param": (same("grads", "params"), r"grads\[0\] and params\[0\] share memory"),
    "moment is param": (same("exp_avgs", "params"), r"exp_avgs\[0\] and params\[0\] share memory"),
    "anchor is param": (same("anchors", "params"), r"anchors\[0\] and params\[0\] share memory"),
    "moment is anchor": (same("anchors", "exp_avgs"), r"anchors\[0\] and exp_avgs\[0\] share mem"),
    "one step count": (same("steps", "steps", 0, 1), r"steps\[0\] and steps\[1\] share memory"),
    "stats in hyper": (
        lambda c: c.update(stats=c["hyper"].view(-1)[:4]), "hyper and stats share memory"),
    "stats in a param": (stats_in_a_param, r"params\[0\] and stats share memory"),
    "hyper in a param": (hyper_in_a_param, r"hyper and params\[0\] share memory"),
    "clip by 0": (given(max_grad_norm=0), "max_grad_norm must be None or a pos.*; got 0"),
    "clip by -1": (given(max_grad_norm=-1.0), "max_grad_norm must be None or a pos.*; got -1"),
    "clip by nan": (given(max_grad_norm=torch.nan), "max_grad_norm must be None or a pos.*; got"),
    "clip by a word": (given(max_grad_norm="1"), "max_grad_norm must be None or a pos.*; got"),
    "negative seed": (given(seed=-1), "seed must be an integer in"),
    "large seed": (given(seed=2**63), "seed must be an integer in"),
    "real seed": (given(seed=1.5), "seed must be an integer in"),
    "no seed": (given(seed=None), "seed must be an integer in"),
    "scale of a float": (given(grad_scale=2.0), "grad_scale must be None or a tensor of one"),
    "scales": (given(grad_scale=torch.ones(2)), r"grad_scale must be None or .*; got \[2\]"),
    "found_inf of a bool": (given(found_inf=True), "found_inf must be None or a tensor of one num"),
    "params is a tensor": (given(params=torch.ones(2, N)), "params must be a list; got Tensor"),
    "steps is a tensor": (given(steps=torch.zeros(2)), "steps must be a list; got Tensor"),
    "grad of None": (first("grads", lambda: None), r"grads\[0\] must be a tensor; got NoneType"),
    "groups of floats": (given(groups=[0, 0.0]), r"groups\[1\] must be an int that .*; got 0.0"),
    "a group of no row": (given(groups=[0, 1]), r"groups\[1\] .* the 1 rows of hyper; got 1"),
    "two devices": (second_on_meta, r"params\[1\] is on meta, params\[0\] on cpu"),
    "hyper of a list": (given(hyper=[[1.0] * 7]), "hyper must be float64 .*; got list"),
}  # fmt: skip


def tensors_of(call: dict[str, Any]) -> list[Tensor]:
    """Those that have memory."""
    found = [t for v in call.values() for t in (v if isinstance(v, list) else [v])]
    tensors = [t for t in found if isinstance(t, Tensor) and not t.is_meta]
    return [t for t in tensors if t.untyped_storage().nbytes() >= t.nbytes]


@pytest.mark.parametrize("first_call", [True, False], ids=["first call", "later call"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_anything_is_written(case, first_call):
    change, message = REFUSED[case]
    call = arguments()
    if not first_call:  # a plan of these tensors is known then
        fastkernels.anchored_adamw_(**call)
    change(call)
    before = [t.clone() for t in tensors_of(call)]
    with pytest.raises(ValueError, match=message):
        fastkernels.anchored_adamw_(**call)
    assert all(map(torch.equal, before, tensors_of(call)))


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_an_overflow_hides_no_wrong_input(found_inf):
    call = arguments()
    call["exp_avgs"][1] = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"exp_avgs\[1\] is \[4, 3\]"):
        fastkernels.anchored_adamw_(**call, found_inf=torch.tensor(found_inf))


def test_a_missing_argument_is_one_of_the_op():
    with pytest.raises(TypeError, match=r"anchored_adamw_\(\) missing 7 .*'params'"):
        fastkernels.anchored_adamw_()


def test_only_sgd_may_do_without_a_moment():
    call = arguments("sgd")
    call["momentum_buffers"][0] = torch.empty(0)
    fastkernels.anchored_sgd_(**call)
    assert (call["params"][0] < 1).all()


def test_columns_of_one_matrix_share_nothing():
    """Their ranges overlap, their elements do not; and gradients may share memory."""
    call, whole = arguments(), torch.ones(3, 8)
    call["params"] = [whole[:, ::2], whole[:, 1::2]]
    for key in ("exp_avgs", "exp_avg_sqs", "anchors"):
        call[key] = [torch.ones(3, 4), torch.ones(3, 4)]
    call["grads"] = [torch.ones(1).expand(3, 4)] * 2
    fastkernels.anchored_adamw_(**call)
    assert torch.equal(whole[:, ::2], whole[:, 1::2])
    assert (whole < 1).all()
    call["params"][1] = whole[:, 4:]
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        fastkernels.anchored_adamw_(**call)


def test_elements_between_each_other_share_nothing():
    """The strides alone do not tell: 0 2 4 of the first row, 3 5 7 of the second."""
    call = arguments()
    call["params"][1] = torch.ones(8).as_strided((2, 3), (3, 2))
    for key in ("grads", "exp_avgs", "exp_avg_sqs", "anchors"):
        call[key][1] = torch.ones(2, 3)
    fastkernels.anchored_adamw_(**call)
    assert (call["params"][1] < 1).all()


def test_an_infinite_norm_clips_nothing():
    calls = [arguments(), arguments()]
    fastkernels.anchored_adamw_(**calls[0], max_grad_norm=torch.inf)
    fastkernels.anchored_adamw_(**calls[1])
    assert all(map(torch.equal, calls[0]["params"], calls[1]["params"]))


def test_misaligned_logits_are_refused():
    p, scale = torch.full((2, 3), 1 / 3), torch.ones(2)
    u = misaligned(6).view(1, 2, 3)
    for op in (fastkernels.cross_entropy_hvp_, fastkernels.cross_entropy_quad):
        with pytest.raises(ValueError, match="u begins at an address"):
            op(u, p, scale)
        with pytest.raises(ValueError, match="p needs 24 bytes"):
            op(torch.ones(1, 2, 3), resized(p.clone()), scale)
    with pytest.raises(ValueError, match="p and u share memory"):
        fastkernels.cross_entropy_hvp_(p[None], p, scale)


def test_codes_are_of_enough_scales():
    call = arguments()
    call["exp_avgs"] = [torch.zeros(300, dtype=torch.uint8)] * 2
    call |= {key: [torch.ones(300), torch.ones(300)] for key in ("params", "grads", "exp_avg_sqs")}
    call |= {"exp_avg_scales": [torch.zeros(codec.code_scales(300) - 1)] * 2, "anchors": []}
    with pytest.raises(ValueError, match=r"exp_avg_scales\[0\] must be float32 with 3 elements"):
        fastkernels.anchored_adamw_(**call)
