"""The update ops against float64, with plain torch's error as the yardstick."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import assert_no_worse_than_torch
from kernels.cases import CHUNK, FEATURES, SHAPES, Feature, gradient_layouts
from kernels.update_harness import LR, RULES, Run, torch_steps

pytestmark = pytest.mark.usefixtures("backend")
STEPS = 4


def check(run: Run, gradients: list[list[torch.Tensor]], factor: float = 2.0) -> None:
    start = [p.clone() for p in run.params]
    truth = torch_steps(run, gradients, torch.float64)
    yardstick = torch_steps(run, gradients, start[0].dtype)
    for grads in gradients:
        run.step(grads)
    for i, p in enumerate(run.params):
        what = f"params[{i}] {list(p.shape)}"
        assert_no_worse_than_torch(p, yardstick[i], truth[i], factor=factor, what=what)
        assert run.steps[i] == len(gradients)
    if sum(p.numel() for p in start):
        assert not all(map(torch.equal, run.params, start)), "nothing moved"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(rule, feature, shape):
    params = [torch.randn(shape)]
    gradients = [[torch.randn(shape)] for _ in range(STEPS)]
    check(Run(rule, params, feature), gradients)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_dtypes(rule, feature, dtype):
    params = [torch.randn(s).to(dtype) for s in ((3,), (17, 23), (CHUNK + 1,))]
    gradients = [[torch.randn(p.shape).to(dtype) for p in params] for _ in range(STEPS)]
    check(Run(rule, params, feature), gradients)


@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_another_dtype(gradient_dtype):
    params = [torch.randn(1000)]
    gradients = [[torch.randn(1000).to(gradient_dtype)] for _ in range(STEPS)]
    check(Run("adamw", params, FEATURES["all"]), gradients)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", gradient_layouts())
def test_layouts(rule, layout):
    """torch 2.13's fused CPU AdamW reads such gradients in the wrong order, silently."""
    param, grad = gradient_layouts()[layout]
    check(Run(rule, [param], FEATURES["all"]), [[grad], [grad * 0.5]])


def test_expanded_parameter_is_refused():
    with pytest.raises(ValueError, match="expanded"):
        Run("adamw", [torch.zeros(1).expand(4)], FEATURES["plain"]).step([torch.ones(4)])


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_momentum(momentum, nesterov):
    params = [torch.randn(700)]
    gradients = [[torch.randn(700)] for _ in range(STEPS)]
    check(Run("sgd", params, FEATURES["all"], momentum, nesterov), gradients)


@pytest.mark.parametrize("rule", RULES)
def test_many_tensors_of_many_sizes(rule):
    sizes = [0, 1, 3, 5, CHUNK, 0, 2 * CHUNK + 5, 40_000, 1, 700]
    params = [torch.randn(n) for n in sizes]
    gradients = [[torch.randn(n) for n in sizes] for _ in range(STEPS)]
    check(Run(rule, params, FEATURES["all"]), gradients)


def test_extreme_values_stay_finite_and_right():
    """Huge and denormal gradients, and a pull far beyond what an explicit step survives."""
    params = [torch.tensor([1.0, -1.0, 1e-30, 1e30, 0.0])]
    gradients = [[torch.tensor([1e18, 1e-18, 1e-38, -1e10, 0.0])] for _ in range(STEPS)]
    check(Run("adamw", params, FEATURES["plain"]), gradients)
    run = Run("adamw", [torch.randn(100)], FEATURES["curvature"])
    run.curvature = [torch.full((100,), 1e12)]
    run.step([torch.randn(100)])
    torch.testing.assert_close(run.params[0], run.anchors[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.49, 0.5, 0.51, 0.999])
def test_every_beta_is_as_exact_as_torch(beta1, beta2, dtype):
    """Element by element, and with gradients that fall from 1e4 to 1e-4."""
    start = torch.linspace(0.5, 2.0, 33, dtype=dtype)
    gradients = [start * scale for scale in (1e4, 1e-4, 1.0, 1e-4)]
    run = Run("adamw", [start.clone()], FEATURES["plain"])
    run.hyper[0, 1:3] = torch.tensor([beta1, beta2], dtype=torch.float64)
    found = {}
    for kind in (torch.float64, dtype):
        p = torch.nn.Parameter(start.to(kind, copy=True))
        optimizer = torch.optim.AdamW([p], lr=LR, betas=(beta1, beta2), weight_decay=0.0)
        found[kind] = []
        for g in gradients:
            p.grad = g.to(kind, copy=True)
            optimizer.step()
            found[kind].append((p.detach().clone(), optimizer.state[p]["exp_avg"].clone()))
    for g, truth, yardstick in zip(gradients, found[torch.float64], found[dtype], strict=True):
        run.step([g])
        ours = (run.params[0], run.moments[0][0])
        for x, y, t in zip(ours, yardstick, truth, strict=True):
            assert_no_worse_than_torch(x, y, t)


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("c", [0.3, 1.0, 1.5, 1e3, 1e9, 1e37, math.inf])
def test_a_pull_of_any_strength(c, curved):
    """Also where w is so large that w0 is lost in it."""
    w = torch.tensor([0.77, 1e9, -1e9, 3e20, 0.0])
    run = Run("sgd", [w.clone()], Feature(anchor_decay=c, curvature=curved), momentum=0.0)
    run.hyper[0, 0] = 1.0
    run.hyper[0, 5] = c
    anchor = run.anchors[0] = torch.tensor([-0.23, 0.5, 1e-9, 7.0, 0.0])
    run.curvature = [torch.ones(5)]
    gradient = torch.tensor([1e9, 0.0, 1.0, -1e9, 0.0])
    run.step([gradient])
    u, a = w.double() - gradient.double(), anchor.double()
    truth = a + (u - a) / (1 + c)
    assert ((run.params[0] - truth).abs() <= 4e-7 * (truth.abs() + u.abs() / (1 + c))).all()


def test_an_infinite_pull_of_no_curvature_is_none():
    run = Run("sgd", [torch.ones(2)], Feature(anchor_decay=math.inf, curvature=True), momentum=0.0)
    run.curvature = [torch.tensor([0.0, 1.0])]
    run.step([torch.ones(2)])
    torch.testing.assert_close(run.params[0], torch.stack([torch.tensor(0.99), run.anchors[0][1]]))


@pytest.mark.parametrize("rule", RULES)
def test_large_index(rule):
    """A second chunk of a second tensor lands where it should."""
    params = [torch.zeros(CHUNK + 3), torch.zeros(CHUNK + 3)]
    grads = [torch.zeros(CHUNK + 3), torch.zeros(CHUNK + 3)]
    grads[1][-1] = 1.0
    run = Run(rule, params, FEATURES["plain"])
    run.step(grads)
    assert params[0].count_nonzero() == 0
    assert params[1].nonzero().tolist() == [[CHUNK + 2]]
