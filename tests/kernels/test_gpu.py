"""The updates on a CUDA device: against the reference, in graphs, and to the bit."""

from __future__ import annotations

import warnings

import pytest
import torch

import fast
from fastkernels.op import ENVIRONMENT, explain
from kernels.cases import FEATURES, Feature
from kernels.update_harness import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
SIZES = (1, 0, 700, 16384, 16385, 100_003)
BF16, CODES = torch.bfloat16, torch.uint8
STATES = {
    "float32": (None, None),
    "bfloat16": (BF16, BF16),
    "codes": (CODES, CODES),
}


@pytest.fixture(params=["triton", "native"])
def backend(request, monkeypatch):
    for row in explain():
        if (row.backend, row.device) == (request.param, "cuda") and not row.available:
            pytest.skip(f"{request.param}: {row.reason}")
    monkeypatch.setenv(ENVIRONMENT, request.param)
    return request.param


def make(rule="adamw", feature=FEATURES["all"], dtypes=(None, None), param=torch.float32) -> Run:
    """A run whose tensors are moved to the device after they were made, the same every time."""
    torch.manual_seed(0)
    run = Run(rule, [torch.randn(n).to(param) for n in SIZES], feature, moment_dtypes=dtypes)
    run.hyper, run.stats = run.hyper.cuda(), run.stats.cuda()
    for name in ("params", "anchors", "curvature", "steps"):
        setattr(run, name, [t.cuda() for t in getattr(run, name)])
    run.moments = [[m.cuda() for m in moments] for moments in run.moments]
    run.scales = [[s.cuda() for s in scales] for scales in run.scales]
    return run


def gradients(count: int, param=torch.float32) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(n, generator=generator).to("cuda", param) for n in SIZES] for _ in range(count)
    ]


def flags(run: Run, found_inf: float = 0.0) -> dict[str, torch.Tensor]:
    if run.feature.grad_scale is None:
        return {}
    scale = torch.tensor(run.feature.grad_scale, device="cuda")
    return {"grad_scale": scale, "found_inf": torch.tensor(found_inf, device="cuda")}


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("param", [torch.float32, BF16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_against_the_reference(monkeypatch, backend, rule, param, feature):
    runs = []
    for name in (backend, "reference"):
        monkeypatch.setenv(ENVIRONMENT, name)
        run = make(rule, feature, param=param)
        for grads in gradients(3, param):
            run.step(grads, **flags(run))
        runs.append(run)
    unit = torch.finfo(param).eps
    for ours, theirs in zip(runs[0].params, runs[1].params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * unit, atol=4 * unit)
    torch.testing.assert_close(runs[0].stats, runs[1].stats, rtol=1e-4, atol=1e-6)
    assert [s.item() for s in runs[0].steps] == [3.0] * len(SIZES)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (CODES, CODES)], ids=["bfloat16", "codes"])
def test_compact_state_is_that_of_the_reference(monkeypatch, backend, dtypes):
    stored = []
    for name in (backend, "reference"):
        monkeypatch.setenv(ENVIRONMENT, name)
        run = make("adamw", Feature(), dtypes)
        run.step(gradients(1)[0], seed=2**40 + 7)
        stored.append([t.float() for m in run.moments for t in m if t.numel()])
    for ours, theirs in zip(*stored, strict=True):
        assert (ours != theirs).float().mean() < 1e-2


@pytest.mark.parametrize("dtypes", STATES.values(), ids=STATES)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_same_bits_every_time(backend, rule, dtypes):
    runs = [make(rule, dtypes=dtypes) for _ in range(3)]
    for run in runs:
        for grads in gradients(3):
            run.step(grads, **flags(run))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0].outputs(), other.outputs()))


def test_found_inf_changes_nothing(backend):
    run = make()
    grads = gradients(1)[0]
    run.step(grads, **flags(run))
    kept = [t.clone() for t in run.outputs()]
    run.step(grads, **flags(run, 1.0))
    assert all(map(torch.equal, run.outputs(), kept))
    grads[3][5] = torch.nan  # clipping has a loss scale: its norm is a found_inf
    run.step(grads, **flags(run))
    assert all(map(torch.equal, run.outputs(), kept))


def test_no_synchronisation(backend):
    run = make()
    options = flags(run)
    for grads in gradients(1):
        run.step([g * 1.0 for g in grads], **options)
    scaled = [[g * 1.0 for g in grads] for grads in gradients(2)]
    # Without a scale, because `run.step` would apply it, which makes a tensor.
    run.feature = Feature(anchor_decay=0.5, curvature=True, weight_decay=0.1, max_grad_norm=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for grads in scaled:
            run.step(grads, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("dtypes", STATES.values(), ids=STATES)
def test_nothing_is_written_past_the_end(backend, rule, dtypes):
    """Tensors are followed, in the same allocation, by numbers that must stay."""
    run = make(rule, dtypes=dtypes)
    guards: list[torch.Tensor] = []

    def guarded(t: torch.Tensor) -> torch.Tensor:
        size = -(-t.numel() * t.element_size() // 16) * 16 // t.element_size() + 64
        whole = torch.full((size,), 77, dtype=t.dtype, device="cuda")
        whole[: t.numel()] = t.flatten()
        guards.append(whole[t.numel() :])
        return whole[: t.numel()].view_as(t)

    for name in ("params", "anchors", "curvature"):
        setattr(run, name, [guarded(t) for t in getattr(run, name)])
    run.moments = [[guarded(m) for m in moments] for moments in run.moments]
    run.scales = [[guarded(s) for s in scales] for scales in run.scales]
    for grads in gradients(2):
        run.step(grads, **flags(run))
    assert guards
    assert all(bool((g == 77).all()) for g in guards)


def test_unaligned_gradients(backend):
    plain, moved = make(), make()
    for i, grads in enumerate(gradients(3)):
        plain.step(grads, **flags(plain))
        views = [torch.cat([g.new_zeros(i), g])[i:] for g in grads]
        moved.step(views, **flags(moved))
    for ours, theirs in zip(moved.params, plain.params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def captured(step, warm_up) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("feature", ["plain", "curvature", "clip"])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_replay_with_a_changing_lr_is_eager(backend, rule, feature):
    eager, graphed = make(rule, FEATURES[feature]), make(rule, FEATURES[feature])
    first, *rest = gradients(6)
    static = [g.clone() for g in first]
    # What the graph reads is fixed; the warm-up step uses other gradients than the capture.
    graph = captured(lambda: graphed.step(static), lambda: graphed.step([g.clone() for g in first]))
    eager.step(first)
    for i, grads in enumerate(rest):
        lr = 0.01 / (i + 1)
        for run in (eager, graphed):
            run.hyper[0, 0] = lr
        for target, g in zip(static, grads, strict=True):
            target.copy_(g)
        graph.replay()
        eager.step(grads)
    torch.cuda.synchronize()
    assert all(map(torch.equal, eager.outputs(), graphed.outputs()))
    # An eager step after replays must not see the graph's tables.
    eager.step(first)
    graphed.step(first)
    assert all(map(torch.equal, eager.outputs(), graphed.outputs()))


def test_optimizer_in_a_graph(backend):
    def model_and_optimizer():
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64).cuda()
        lr = torch.tensor(1e-2, device="cuda")
        return model, lr, fast.AdamW(model.parameters(), lr=lr, anchor_decay=0.1, max_grad_norm=1.0)

    x = torch.randn(32, 64, device="cuda")
    models = [model_and_optimizer() for _ in range(2)]

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    (eager, eager_lr, eager_opt), (graphed, graphed_lr, graphed_opt) = models
    graph = captured(lambda: step(graphed, graphed_opt), lambda: step(graphed, graphed_opt))
    step(eager, eager_opt)
    for lr in (1e-2, 5e-3, 1e-3):
        eager_lr.fill_(lr)
        graphed_lr.fill_(lr)
        graph.replay()
        step(eager, eager_opt)
    for ours, theirs in zip(graphed.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
