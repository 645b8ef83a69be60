"""The update ops against float64, with plain torch's error as the yardstick."""

from __future__ import annotations

import pytest
import torch

from cases import CHUNK, FEATURES, SHAPES, gradient_layouts
from helpers import assert_no_worse_than_torch
from kernels.update_harness import Run, torch_steps

pytestmark = pytest.mark.usefixtures("backend")
RULES = ("adamw", "sgd")
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
