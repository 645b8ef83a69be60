"""The pull around any optimizer does what the fused step does, and lets the optimizer be."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

import fast
from fast.optim import UnfusedPull
from optim.small_networks import batch, flat, network, parameter, train

DOUBLE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
OPTIMIZERS = {
    "adamw": (fast.AdamW, torch.optim.AdamW, {"weight_decay": 0.05}),
    "sgd": (fast.SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.05}),
}
both = pytest.mark.parametrize(("ours", "theirs", "keys"), OPTIMIZERS.values(), ids=OPTIMIZERS)


def groups(model: nn.Module, **keys: Any) -> list[dict[str, Any]]:
    """A backbone with stall, ramp, restraint, pull and curvature, and a head without."""
    *body, weight, bias = model.parameters()
    generator = torch.Generator().manual_seed(5)
    curvature = [torch.rand(p.shape, generator=generator, dtype=p.dtype) for p in body]
    pull = {"anchor_decay": 5.0, "curvature": curvature, "stall": 2, "ramp": 3, "restraint": 0.7}
    return [{"params": body, **pull | keys}, {"params": [weight, bias], "lr": 0.02}]


def pulled(cls: Any, params: Any, **keys: Any) -> tuple[Any, UnfusedPull]:
    optimizer = cls(params, **keys)
    return optimizer, UnfusedPull(optimizer)


@both
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("curvature", ["diagonal", "none"])
def test_equals_the_fused_optimizer(ours, theirs, keys, tensor_lr, curvature):
    weights, figures = [], []
    more = {} if curvature == "diagonal" else {"curvature": None}
    for cls in (ours, theirs):
        model = network(torch.float64)
        lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
        optimizer = cls(groups(model, **more), lr=lr, **keys)
        pull = UnfusedPull(optimizer) if cls is theirs else optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.02, 0.05], total_steps=10)
        for _ in range(9):
            train(optimizer, model, 1)
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.get_last_lr()[0])
        weights.append(flat(model))
        figures.append(pull.stats())
    torch.testing.assert_close(*weights, **DOUBLE)
    for key in ("drift", "forgetting"):
        torch.testing.assert_close(figures[0][key], figures[1][key], **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_lower_precision(dtype):
    """One rounding of the pull; bfloat16 differs in the step itself, which ours takes exactly."""
    weights = []
    for cls in (fast.SGD, torch.optim.SGD):
        model = network(dtype)
        optimizer = cls(groups(model, curvature=None), lr=0.05)
        if cls is torch.optim.SGD:
            UnfusedPull(optimizer)
        train(optimizer, model, 6)
        weights.append(flat(model))
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*weights, **tolerance)


def test_the_stall_hides_a_group_from_the_optimizer():
    class Counting(torch.optim.SGD):
        """Counts its steps in the group, as LAMB does, and calls a step that has hooks itself."""

        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] += 1
            return super().step(closure)

    torch.optim.SGD([parameter(1.0)])  # torch hangs the hooks on a class at its first object
    model = network()
    optimizer, _ = pulled(Counting, groups(model, stall=3), lr=0.1, momentum=0.9)
    body, start = optimizer.param_groups[0]["params"], network()
    for group in optimizer.param_groups:
        group["count"] = 0
    train(optimizer, model, 3)
    assert all(map(torch.equal, body, start.parameters()))
    assert not any(p in optimizer.state for p in body)
    assert all(p.grad is not None for p in body), "gradients are the user's again"
    assert [group["count"] for group in optimizer.param_groups] == [0, 3]
    train(optimizer, model, 1)
    assert all(p in optimizer.state for p in body)
    assert [group["progress"] for group in optimizer.param_groups] == [4, 4]


@both
def test_a_closure_makes_gradients_that_are_hidden_too(ours, theirs, keys):
    weights = []
    for cls in (ours, theirs):
        model = network(torch.float64)
        optimizer = cls(groups(model), lr=0.01, **keys)
        if cls is theirs:
            UnfusedPull(optimizer)

        def closure(optimizer=optimizer, model=model):
            optimizer.zero_grad(set_to_none=False)
            loss = batch(model)
            loss.backward()
            return loss

        for i in range(6):
            loss = optimizer.step(closure) if i % 2 else optimizer.step(closure=closure)
            assert loss.isfinite()
        weights.append(flat(model))
    torch.testing.assert_close(*weights, **DOUBLE)


@both
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(ours, theirs, keys, fused):
    """A step that overflowed is skipped, by the scaler or by an optimizer that is handed it."""
    weights = []
    for cls in (ours, theirs):
        model = network()
        optimizer = cls(groups(model), lr=0.01, fused=fused and cls is theirs, **keys)
        if cls is theirs:
            pull = UnfusedPull(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
        # Not the first step after the stall: torch's fused SGD then keeps a momentum of any memory.
        for overflow in (False, True, False, False, True, False, True, False, False):
            optimizer.zero_grad()
            loss = scaler.scale(batch(model))
            (loss * math.inf if overflow else loss).backward()
            before = flat(model)
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, flat(model)) == overflow
        (pull if cls is theirs else optimizer).state_dict()  # counts a step that is still open
        assert optimizer.param_groups[0]["progress"] == 6
        weights.append(flat(model))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_parameters_without_a_gradient_stay():
    p, q = parameter(1.0), parameter(1.0)
    optimizer, pull = pulled(torch.optim.SGD, [{"params": [p, q], "anchor_decay": 1.0}], lr=1.0)
    pull.set_anchors([torch.zeros(1), torch.zeros(1)])
    p.grad = torch.zeros(1)
    optimizer.step()
    assert (p.item(), q.item()) == (0.5, 1.0)


@pytest.mark.parametrize("anchor_decay", [1e3, math.inf])
@pytest.mark.parametrize("curvature", [None, 0.0, 1e37])
def test_any_strength(anchor_decay, curvature):
    p = parameter(1.0, 2.0)
    f = None if curvature is None else [torch.full((2,), curvature)]
    optimizer, _ = pulled(
        torch.optim.SGD, [{"params": [p], "anchor_decay": anchor_decay, "curvature": f}], lr=0.5
    )
    p.grad = torch.ones(2)
    optimizer.step()
    expected = torch.tensor([1.0, 2.0]) - (0.5 if curvature == 0 else 0.0)
    torch.testing.assert_close(p.detach(), expected, rtol=2e-3, atol=0)


@both
def test_resumes_exactly(ours, theirs, keys):
    def run(interrupted: bool) -> torch.Tensor:
        model = network()
        optimizer, pull = pulled(theirs, groups(model), lr=0.01, **keys)
        train(optimizer, model, 4)
        if interrupted:
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict(), pull.state_dict()), file)
            file.seek(0)
            states = torch.load(file, weights_only=True)
            model = network()
            with torch.no_grad():
                model[0].weight.add_(1.0)  # another pretrained network: the saved anchors count
            optimizer, pull = pulled(theirs, groups(model, curvature=None), lr=0.01, **keys)
            for part, state in zip((model, optimizer, pull), states, strict=True):
                part.load_state_dict(state)
        train(optimizer, model, 4)
        return flat(model)

    assert torch.equal(run(False), run(True))


def test_a_state_of_the_optimizer_alone_leaves_the_pull():
    model = network()
    plain = torch.optim.SGD(groups(model)[0]["params"], lr=0.1)
    optimizer, _ = pulled(torch.optim.SGD, groups(model)[:1], lr=0.2)
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["anchor_decay"], group["stall"], group["ramp"]) == (0.1, 5.0, 2, 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("anchors"), "has no anchors"),
        (lambda s: s["progress"].append(1), "has 3 groups, the optimizer 2"),
        (lambda s: s["anchors"].update({0: torch.zeros(3)}), r"anchors\[0\] is \[3\], its"),
        (lambda s: s["curvature"].update({9: torch.zeros(3)}), r"curvature\[9\] is \[3\], its"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil, message):
    _, pull = pulled(torch.optim.SGD, groups(network()), lr=0.1)
    before = copy.deepcopy(pull.state_dict())
    state = copy.deepcopy(before)
    state["progress"][0] = 7
    spoil(state)
    with pytest.raises(ValueError, match=message):
        pull.load_state_dict(state)
    assert pull.state_dict()["progress"] == before["progress"]


def test_remove_leaves_the_optimizer_as_it_was():
    weights = []
    for with_pull in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(groups(model), lr=0.01)
        if with_pull:
            UnfusedPull(optimizer).remove()
        train(optimizer, model, 3)
        weights.append(flat(model))
    assert torch.equal(*weights)


def test_a_step_that_raises_gives_rates_and_gradients_back():
    model = network()
    optimizer, _ = pulled(torch.optim.SGD, groups(model, stall=1), lr=0.1)
    optimizer.param_groups[1]["restraint"] = 0.5

    def closure():
        batch(model).backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    optimizer.zero_grad()
    train(optimizer, model, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("restraint", -1.0, ValueError, "restraint must not be negative"),
        ("anchor_decay", math.nan, ValueError, "anchor_decay must not be negative"),
        ("ramp", "x", ValueError, "ramp must be a number"),
        ("curvature", [torch.ones(3)], ValueError, "curvature: 1 tensors for 2"),
        ("lr", None, ValueError, "SGD has a group without lr"),
    ],
)
def test_bad_values_are_named_and_nothing_is_updated(key, value, error, message):
    model = network()
    optimizer, _ = pulled(torch.optim.SGD, groups(model, stall=0), lr=0.1)
    batch(model).backward()
    before = flat(model)
    optimizer.param_groups[1]["anchor_decay"] = 0.0
    optimizer.param_groups[1]["ramp"] = 5
    optimizer.param_groups[1][key] = value
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(before, flat(model))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_anchor_is_never_taken_from_weights_that_may_have_moved():
    model = network()
    optimizer, pull = pulled(torch.optim.SGD, model.parameters(), lr=0.1)
    train(optimizer, model, 1)
    optimizer.param_groups[0]["anchor_decay"] = 1.0
    with pytest.raises(RuntimeError, match="set_anchors"):
        train(optimizer, model, 1)
    pull.set_anchors()
    train(optimizer, model, 1)
    assert pull.stats()["drift"] > 0


def test_stats():
    model = network()
    optimizer = torch.optim.SGD(groups(model, stall=1), lr=0.1)
    pull = UnfusedPull(optimizer, grad_norm=True)
    assert list(pull.stats()) == list(fast.SGD([parameter(1.0)]).stats())
    assert pull.stats()["grad_norm"].isnan()
    train(optimizer, model, 1)
    head = torch.cat([p.grad.reshape(-1) for p in list(model.parameters())[-2:]])
    torch.testing.assert_close(pull.stats()["grad_norm"], head.double().norm())
    free = UnfusedPull(torch.optim.SGD(network().parameters()))
    assert all(figure.isnan() for figure in free.stats().values())


def test_a_complex_parameter_has_no_anchor():
    """The pull computes in real numbers, and would have dropped the imaginary part."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="view_as_real"):
        pulled(torch.optim.AdamW, [{"params": [weight], "anchor_decay": 1.0}])
    pulled(torch.optim.AdamW, [{"params": [weight]}])


def foreign(name: str) -> tuple[Any, dict[str, Any]]:
    """An optimizer class of another library, and its arguments."""
    if name == "muon":
        return torch.optim.Muon, {"lr": 0.01}
    if name == "adafactor":
        adafactor = pytest.importorskip("transformers", reason="its Adafactor").Adafactor
        return adafactor, {"lr": 0.01, "relative_step": False, "scale_parameter": False}
    if name == "bitsandbytes":
        return pytest.importorskip("bitsandbytes", reason="its AdamW").optim.AdamW, {"lr": 0.01}
    timm = pytest.importorskip("timm.optim", reason="its optimizers")
    return getattr(timm, name), {"lr": 0.01}


@pytest.mark.parametrize("name", ["muon", "adafactor", "bitsandbytes", "Lion", "Lamb", "NAdamW"])
def test_optimizers_of_others(name):
    """They keep the keys of the groups, take no step in the stall, and are pulled after it."""
    cls, keys = foreign(name)
    drifts = []
    for anchor_decay in (0.0, 100.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
        start = model[0].weight.detach().clone()
        body, head = model.parameters()
        pull_keys = {"anchor_decay": anchor_decay, "stall": 2, "ramp": 2}
        optimizer, _ = pulled(cls, [{"params": [body], **pull_keys}, {"params": [head]}], **keys)
        x = torch.randn(16, 4)
        for step in range(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(16) % 3).backward()
            optimizer.step()
            assert torch.equal(model[0].weight, start) == (step < 2)
        assert optimizer.param_groups[0]["lr"] == keys["lr"]
        drifts.append((model[0].weight - start).norm())
    assert drifts[1] < 0.9 * drifts[0]


def test_a_rate_that_changes_within_a_step_stays():
    """As by a scheduler that hangs on a hook, while the ramp has its hands on the rate."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [p], "ramp": 4}], lr=0.1)
    optimizer.register_step_post_hook(lambda o, *_: o.param_groups[0].update(lr=0.5))
    UnfusedPull(optimizer)
    p.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.1 / 4))
    assert optimizer.param_groups[0]["lr"] == 0.5
