"""Plans are used again only for the tensors they were made for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastkernels.backends import native
from fastkernels.ops.update import plan
from fastkernels.ops.update import signature as signatures
from fastkernels.ops.update.adamw import ADAMW
from fastkernels.ops.update.call import UpdateCall
from fastkernels.ops.update.plan import Plans


def call(*shapes: tuple[int, ...]) -> UpdateCall:
    def each() -> list[Tensor]:
        return [torch.randn(s) for s in shapes]

    return UpdateCall(
        rule=ADAMW,
        params=each(),
        grads=each(),
        moments=(each(), each()),
        moment_scales=((), ()),
        steps=[torch.zeros(()) for _ in shapes],
        hyper=torch.zeros(1, 7, dtype=torch.float64),
        groups=[0] * len(shapes),
        anchors=each(),
    )


@pytest.fixture(params=["NativeSignature", "TorchSignature"])
def signature(request):
    if request.param == "NativeSignature" and not native.available()[0]:
        pytest.skip(native.available()[1])
    return getattr(signatures, request.param)()


def test_gradients_may_move_and_nothing_else(signature):
    b = call((3, 4), (5,), (), (0, 2))
    addresses = signature.record(b)
    assert addresses == [g.data_ptr() for g in b.grads] == signature.match(b)
    b.grads = [g.clone() for g in b.grads]
    assert signature.match(b) == [g.data_ptr() for g in b.grads]


def swap(tensors: list[Tensor], new: Tensor) -> None:
    tensors[0] = new


CHANGES = {
    "a parameter in other memory": lambda b: swap(b.params, b.params[0].clone()),
    "a parameter with new storage": lambda b: setattr(b.params[0], "data", b.params[0].clone()),
    "a moment with new storage": lambda b: setattr(b.moments[1][0], "data", torch.zeros(3, 4)),
    "a moment of another dtype": lambda b: swap(b.moments[0], b.moments[0][0].view(torch.int32)),
    "an anchor that is gone": lambda b: swap(b.anchors, None),
    "no anchors": lambda b: setattr(b, "anchors", []),
    "a step count in other memory": lambda b: swap(b.steps, torch.zeros(())),
    "a gradient of another dtype": lambda b: swap(b.grads, b.grads[0].bfloat16()),
    "a gradient of another shape": lambda b: swap(b.grads, torch.zeros(4, 3)),
    "a gradient in another order": lambda b: swap(b.grads, b.grads[0].t().contiguous().t()),
    "an expanded gradient": lambda b: swap(b.grads, torch.zeros(()).expand(3, 4)),
    "a sparse gradient": lambda b: swap(b.grads, torch.zeros(3, 4).to_sparse()),
    "another group": lambda b: setattr(b, "groups", [0, 0, 1, 0]),
    "a moment transposed in place": lambda b: b.moments[0][0].t_(),
    "a moment cut in place": lambda b: b.moments[0][1].resize_(2),
    "an anchor transposed in place": lambda b: b.anchors[0].t_(),
    "a step count of another dtype": lambda b: swap(b.steps, b.steps[0].view(torch.int32)),
    "a tensor more": lambda b: [x.append(torch.zeros(2)) for x in (b.params, b.grads, *b.moments)],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changed_is_seen(signature, change):
    b = call((3, 4), (5,), (), (0, 2))
    signature.record(b)
    change(b)
    assert signature.match(b) is None


def test_strides_of_dimensions_of_size_one_mean_nothing(signature):
    b = call((1, 4, 1, 3))
    signature.record(b)
    b.grads[0] = torch.randn(12).as_strided((1, 4, 1, 3), (77, 3, 5, 1))
    assert signature.match(b) is not None


def test_a_plan_is_built_once_and_again_when_something_moved():
    built = []
    plans = Plans(lambda b: built.append(len(b.params)) or len(built))
    b = call((3, 4), (5,))
    assert [plans.find(b)[0] for _ in range(3)] == [1, 1, 1]
    b.grads[0] = torch.zeros(()).expand(3, 4)  # copied to the parameter's layout: the plan holds
    number, used, addresses, _ = plans.find(b)
    assert number == 1
    assert used.grads[0].is_contiguous()
    assert addresses[0] == used.grads[0].data_ptr()
    b.moments[0][1] = b.moments[0][1].clone()
    assert [plans.find(b)[0] for _ in range(2)] == [2, 2]


def test_plans_do_not_grow_for_ever(monkeypatch):
    monkeypatch.setattr(plan, "MAX_TENSORS", 3)
    plans = Plans(lambda b: object())
    kept = [call((2,)) for _ in range(5)]
    for b in kept:
        plans.find(b)
    assert len(plans) == 3


def test_another_thread_may_drop_a_plan_that_is_being_used(monkeypatch):
    monkeypatch.setattr(plan, "MAX_TENSORS", 1)
    plans, ours, theirs = Plans(lambda b: object()), call((2,)), call((3,))
    plans.find(ours)
    (entry,) = plans._entries.values()
    match = type(entry.signature).match

    def interrupted(signature, b):
        if b is ours:
            plans.find(theirs)  # drops the plan of `ours`
        return match(signature, b)

    monkeypatch.setattr(type(entry.signature), "match", interrupted)
    assert plans.find(ours)[0] is entry.plan
    assert len(plans) == 1
