"""Loading a state: what is refused changes nothing, and hooks see what torch's would."""

from __future__ import annotations

import copy

import pytest
import torch

import fast
from fast.optim import SGD, AdamW
from optim.small_networks import flat, network, parameter, train

CLASSES = {"adamw": (AdamW, "exp_avg_sq"), "sgd": (SGD, "momentum_buffer")}
classes = pytest.mark.parametrize(("cls", "last"), CLASSES.values(), ids=CLASSES)


def trained(cls, **options):
    model = network()
    if cls is SGD:
        options["momentum"] = 0.9
    optimizer = cls(model.parameters(), lr=1e-2, anchor_decay=0.1, **options)
    train(optimizer, model, 2)
    return model, optimizer


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@classes
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s, n: s.update({n: s[n][..., :-1]}), r"is \[5, 63\], but must be \[5, 64\]"),
        (lambda s, n: s.update({n: 0.5}), "must be a tensor; got float"),
        (lambda s, n: s.update({f"{n}_codes": s.pop(n).byte()}), "codes but no .*scales"),
        (lambda s, n: s.update(anchor=torch.zeros(3)), r"\['anchor'\] is \[3\]"),
        (lambda s, n: s.update(step=torch.zeros(3)), r"\['step'\] must be one number"),
        (lambda s, n: s.update(step=torch.tensor(torch.nan)), "must be finite and not .*; got nan"),
        (lambda s, n: s.update(step=-1), "must be finite and not negative; got -1"),
        (lambda s, n: s.update(step=torch.inf), "must be finite and not negative; got inf"),
    ],
    ids=["shape", "type", "scales", "anchor", "step", "nan", "negative", "infinite"],
)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(cls, last, spoil, message):
    _, optimizer = trained(cls)
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy((state, optimizer.stats()))
    state["param_groups"][0]["lr"] = 5.0
    state["state"][0]["step"] = torch.tensor(77.0)
    spoil(state["state"][2], last)
    with pytest.raises(ValueError, match=r"state_dict: state\[2\].*" + message):
        optimizer.load_state_dict(state)
    assert same(before, (optimizer.state_dict(), optimizer.stats()))


def test_a_failing_hook_changes_nothing():
    def hook(_):
        raise RuntimeError("no")

    _, optimizer = trained(AdamW)
    before = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(before)
    other["param_groups"][0]["lr"] = 5.0
    optimizer.register_load_state_dict_post_hook(hook)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.load_state_dict(other)
    assert same(before, optimizer.state_dict())


@classes
def test_what_a_pre_hook_returns_is_loaded(cls, last):
    def hook(_, state_dict):
        changed = copy.deepcopy(state_dict)
        changed["state"][0][last].fill_(3.0)
        changed["state"][0]["anchor"].fill_(2.0)
        changed["param_groups"][0]["lr"] = 0.5
        return changed

    model, optimizer = trained(cls)
    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.state[next(model.parameters())]
    assert (state[last] == 3).all()
    assert (state["anchor"] == 2).all()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_pre_hook_may_repair_what_does_not_fit():
    model, optimizer = trained(AdamW)
    good = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda *_: good)
    optimizer.load_state_dict({"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": []})
    assert optimizer.state[next(model.parameters())]["step"] == 2


@classes
def test_a_post_hook_sees_and_may_change_the_final_state(cls, last):
    """bfloat16 parameters: torch casts the moments to bfloat16, and here they are float32."""
    model = network(torch.bfloat16)
    p = next(model.parameters())
    options = {"momentum": 0.9} if cls is SGD else {}
    optimizer = cls(model.parameters(), **options)
    train(optimizer, model, 2)
    seen = []

    def hook(optimizer):
        seen.append(optimizer.state[p][last].dtype)
        optimizer.state[p][last].fill_(7.0)

    optimizer.register_load_state_dict_post_hook(hook)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert seen == [torch.float32]
    assert (optimizer.state[p][last] == 7).all()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(seen) == 2, "the hooks of one load must not stay for the next"


@classes
@pytest.mark.parametrize("state_dtype", [None, torch.uint8])
def test_a_state_in_another_layout_takes_that_of_its_parameter(cls, last, state_dtype):
    weight, grads = torch.randn(4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    options = {"momentum": 0.9} if cls is SGD else {}

    def stepped(layout, state=None):
        p = torch.nn.Parameter(weight.clone(memory_format=layout))
        optimizer = cls([p], lr=0.1, anchor_decay=1.0, state_dtype=state_dtype, **options)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        p.grad = grads[int(state is not None)]
        optimizer.step()
        return p, optimizer

    first = stepped(torch.contiguous_format)[1].state_dict()
    plain, _ = stepped(torch.contiguous_format, first)
    moved, optimizer = stepped(torch.channels_last, first)
    codes = "" if state_dtype is None else "_codes"
    for name in (f"{last}{codes}", "anchor"):
        assert optimizer.state[moved][name].stride() == moved.stride()
    torch.testing.assert_close(moved, plain, rtol=0, atol=0 if state_dtype is None else 1e-2)


def damped(cls, model, momentum, **options):
    return cls(model.parameters(), lr=0.1, momentum=momentum, dampening=0.5, **options)


@pytest.mark.parametrize("state_dtype", [None, torch.uint8])
def test_momentum_may_be_switched_on_and_off(state_dtype):
    """With dampening: torch starts a new momentum undamped, and keeps one that is not used."""
    weights = []
    for cls in (SGD, torch.optim.SGD):
        model = network()
        optimizer = damped(cls, model, 0.0, **({"state_dtype": state_dtype} if cls is SGD else {}))
        for momentum in (0.0, 0.9, 0.0, 0.9):
            optimizer.param_groups[0]["momentum"] = momentum
            train(optimizer, model, 3)
        weights.append(flat(model))
    tolerance = 2e-6 if state_dtype is None else 8e-3  # 8-bit codes
    torch.testing.assert_close(*weights, rtol=tolerance, atol=tolerance)


def test_momentum_of_one_group_only():
    weights = []
    for cls in (SGD, torch.optim.SGD):
        model = network()
        groups = [
            {"params": model[0].parameters(), "momentum": 0.9},
            {"params": model[3].parameters()},
        ]
        optimizer = cls(groups, lr=0.1, dampening=0.5)
        train(optimizer, model, 3)
        optimizer.param_groups[0]["momentum"] = 0.0
        optimizer.param_groups[1]["momentum"] = 0.9
        train(optimizer, model, 3)
        weights.append(flat(model))
    torch.testing.assert_close(*weights, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("second", [SGD, torch.optim.SGD])
def test_a_state_that_never_stepped_starts_its_momentum_undamped(second):
    reference, model = network(), network()
    train(damped(torch.optim.SGD, reference, 0.9), reference, 4)
    fresh = damped(SGD, model, 0.9)
    fresh.set_anchors()  # anchors alone make a state
    optimizer = damped(second, model, 0.9)
    optimizer.load_state_dict(fresh.state_dict())
    train(optimizer, model, 4)
    torch.testing.assert_close(flat(model), flat(reference), rtol=2e-6, atol=2e-6)
    assert "momentum_buffer" in fresh.state[model[0].weight], "the state itself is not changed"


def foreign_states():
    def state(make):
        p = parameter(1.0)
        optimizer = make([p])
        p.grad = torch.ones(1)
        optimizer.step()
        return optimizer.state_dict()

    adamw = state(torch.optim.AdamW)
    incomplete = copy.deepcopy(adamw)
    del incomplete["state"][0]["exp_avg_sq"]
    return {
        "SGD's": (state(torch.optim.SGD), "is not one of AdamW: its groups have no betas, eps"),
        "Adam's": (
            state(lambda p: torch.optim.Adam(p, weight_decay=0.1)),
            "whose weight decay goes into the gradient",
        ),
        "half a state": (incomplete, "has exp_avg but not all of"),
        "no state": ({}, "has no 'state'"),
        "a list": (adamw | {"state": {0: [1]}}, "must be a dict"),
    }


@pytest.mark.parametrize("which", ["SGD's", "Adam's", "half a state", "no state", "a list"])
def test_states_of_others_are_refused_and_change_nothing(which):
    state, message = foreign_states()[which]
    if which == "Adam's" and "decoupled_weight_decay" not in state["param_groups"][0]:
        pytest.skip("this torch does not record how the weights decay")
    optimizer = fast.AdamW([parameter(1.0)], lr=0.5)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5
