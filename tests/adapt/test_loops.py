"""Loops that pass an adaptation by are told so; steps that fail leave no trace."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils import checkpoint as checkpoint_module
from torch.utils.checkpoint import checkpoint

import fast
from networks import ConvNet, images

TRAIN, SOURCE = images(200, 4, seed=1), images(120, 5, seed=3)
CHECKPOINT_FUNCTION = checkpoint_module.CheckpointFunction


def adapted(**options):
    torch.manual_seed(1)
    model = ConvNet()
    options = {"source_inputs": SOURCE, "steps": 6, "batch_size": 32} | options
    adaptation = fast.Adaptation(model, TRAIN, **options)
    model.train()
    return model, adaptation


def backward(adaptation, inputs, labels, rows=None):
    logits, penalty = adaptation.forward(inputs, rows)
    (F.cross_entropy(logits, labels) + penalty).backward()


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_loop_with_an_optimizer_of_its_own_is_stopped():
    """`finish` would have returned to the first weights, as the average of no step."""
    model, adaptation = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first, second, *_ = adaptation.batches()
    backward(adaptation, *first)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"adaptation\.optimizer has taken no step"):
        backward(adaptation, *second)
    learned = vector(model)
    with pytest.raises(RuntimeError, match=r"Step adaptation\.optimizer"):
        adaptation.finish()
    assert torch.equal(vector(model), learned)


def test_a_step_without_forward_is_announced():
    model, adaptation = adapted()
    inputs, labels, _ = next(adaptation.batches())
    F.cross_entropy(model(inputs), labels).backward()
    with pytest.warns(UserWarning, match="nothing of the source is held by Rehearsal"):
        adaptation.optimizer.step()
    adaptation.optimizer.step()
    # The weights alone need no forward.
    model, adaptation = adapted(source_inputs=None, distill=0.0, rehearse=0.0)
    inputs, labels, _ = next(adaptation.batches())
    F.cross_entropy(model(inputs), labels).backward()
    adaptation.optimizer.step()


def test_a_loss_without_the_penalty_is_announced():
    _, adaptation = adapted(grad_accum_steps=2)
    inputs, labels, rows = next(adaptation.batches())
    with torch.no_grad():  # an evaluation, whose penalty nobody needs
        adaptation.forward(inputs[:14], rows[:14])
    adaptation._part = 0
    for half in torch.arange(len(labels)).chunk(2):
        logits, _ = adaptation.forward(inputs[half], rows[half])
        (F.cross_entropy(logits, labels[half]) / 2).backward()
    with pytest.warns(UserWarning, match=r"a loss without forward\(\)'s penalty, so that nothing"):
        adaptation.optimizer.step()
    adaptation.optimizer.step()
    # Without a guard there is no penalty to leave out.
    _, adaptation = adapted(source_inputs=None, distill=0.0, rehearse=0.0)
    inputs, labels, rows = next(adaptation.batches())
    F.cross_entropy(adaptation.forward(inputs, rows)[0], labels).backward()
    adaptation.optimizer.step()


def test_a_loop_that_goes_on_ends_in_the_average_and_the_budget():
    options = {"lr": 0.05, "ramp": 0, "rehearse": 0.0, "schedule": "constant", "average": 4}
    model, adaptation = adapted(forget_budget=0.05, **options)

    def epoch():
        for batch in adaptation.batches(start=0):
            backward(adaptation, *batch)
            adaptation.optimizer.step(), adaptation.optimizer.zero_grad()

    epoch()
    with pytest.warns(UserWarning, match=r"plan of 6 steps is over.*target_size"):
        epoch()
    epoch()
    now = vector(model)
    with adaptation.averaged():
        assert not torch.equal(vector(model), now)
    result = adaptation.finish()
    assert adaptation.done == 18
    assert result.final["forecast"] <= 0.05
    assert not torch.equal(vector(model), now)


@pytest.mark.parametrize("make", ["adamw", torch.optim.Adam], ids=["fused", "foreign"])
def test_a_batch_that_overflows_changes_nothing(make):
    """One infinite batch made the statistics of the normaliser, and so all later steps, NaN."""
    model, adaptation = adapted(optimizer=make, batch_norm="frozen", augmented=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i, (inputs, labels, _) in enumerate(adaptation.batches()):
        before = vector(model)
        if i == 2:
            inputs[0] = torch.inf
        logits, penalty = adaptation.forward(inputs)
        loss = F.cross_entropy(logits, labels) + penalty
        scaler.scale(loss).backward()
        scaler.step(adaptation.optimizer), scaler.update(), adaptation.optimizer.zero_grad()
        assert loss.isfinite() == (i != 2)
        assert torch.equal(vector(model), before) == (i == 2)
    assert all(b.isfinite().all() for b in model.buffers())
    rehearsal = next(g for g in adaptation.guards if hasattr(g, "moved"))
    assert 0 < rehearsal.moved < 1


def test_batches_of_whole_steps_that_are_taken_for_micro_batches_are_told():
    """Such a loop ended in the middle of its schedule."""
    _, adaptation = adapted(grad_accum_steps=2)

    def loop():
        for i, batch in enumerate(adaptation.batches()):
            backward(adaptation, *batch)
            if i % 2:
                adaptation.optimizer.step(), adaptation.optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"after 3 of its 6 steps: .* takes 1/2 at a time"):
        loop()


def test_a_step_of_fewer_micro_batches_is_followed_by_a_whole_one():
    """The last step of an epoch, whose source inputs the next one would have gone on with."""
    _, adaptation = adapted(grad_accum_steps=4)
    seen, run = [], adaptation.forward_part
    adaptation.forward_part = lambda batch, model: seen.append(batch.part) or run(batch, model)
    for batches in (2, 4):
        for batch in itertools.islice(adaptation.batches(), batches):
            backward(adaptation, *(x[:8] for x in batch))
        adaptation.optimizer.step(), adaptation.optimizer.zero_grad()
    assert seen == [0, 1, 0, 1, 2, 3]


def test_a_loader_that_reads_ahead_takes_whole_steps(recwarn):
    """A run of two steps was told that it took whole steps for micro-batches."""
    _, adaptation = adapted(steps=2, grad_accum_steps=2)
    stream = adaptation.batches()
    ahead = next(stream)
    while ahead is not None:
        batch, ahead = ahead, next(stream, None)
        for half in torch.arange(len(batch[1])).chunk(2):
            backward(adaptation, *(x[half] for x in batch))
        adaptation.optimizer.step(), adaptation.optimizer.zero_grad()
    assert adaptation.done == 2
    assert not recwarn.list


def test_a_loop_that_has_diverged_is_told_so():
    _, adaptation = adapted(forget_budget=None)
    logits, penalty = adaptation.forward(*next(adaptation.batches())[::2])
    (torch.nan * logits.sum() + penalty).backward()
    adaptation.optimizer.step()
    with pytest.warns(UserWarning, match="the weights are not finite"):
        adaptation.finish()


def test_a_step_that_calls_that_of_a_base_class_is_one():
    """Torch runs the hooks of both."""

    class Own(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # from now on its step runs hooks, too
    _, adaptation = adapted(optimizer=Own)
    for batch in adaptation.batches():
        backward(adaptation, *batch)
        adaptation.optimizer.step()
    assert adaptation.done == 6


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ("mo", "the optimizer has loaded a state of step 3, and the adaptation none"),
        ("ma", "the adaptation has loaded a state of step 3, and the optimizer none"),
        ("oa", "the adaptation has loaded a state of step 3, and the model none"),
        ("m", r"the weights have moved by [\d.e-]+, and the adaptation has loaded no state"),
        ("moa", None),
    ],
)
def test_a_run_that_resumes_loads_all_three_states(loaded, message):
    def step():
        backward(adaptation, *next(adaptation.batches()))
        adaptation.optimizer.step()

    model, adaptation = adapted()
    for _ in range(3):
        step(), adaptation.optimizer.zero_grad()
    parts = {"m": model, "o": adaptation.optimizer, "a": adaptation}
    saved = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    model, adaptation = adapted(resuming=True)
    parts = {"m": model, "o": adaptation.optimizer, "a": adaptation}
    for name in loaded:
        parts[name].load_state_dict(saved[name])
    before = vector(model)
    if message is None:
        step()
        assert adaptation.done == 4
        return
    with pytest.raises(RuntimeError, match=message):
        step()
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("steps", [4, 6])
def test_a_loop_that_ends_before_the_plan_is_told(log, steps):
    """A loader that is too short ends it in silence, at a learning rate that has not come down."""
    _, adaptation = adapted(steps=6)
    for batch in itertools.islice(adaptation.batches(), steps):
        backward(adaptation, *batch)
        adaptation.optimizer.step()
        adaptation.optimizer.zero_grad()
    adaptation.finish()
    told = "finished after 4 of the 6 steps that were planned" in log.text
    assert told == (steps == 4)


def test_there_is_no_forward_after_the_end():
    _, adaptation = adapted()
    adaptation.finish()
    with pytest.raises(RuntimeError, match=r"finish\(\) has removed the hooks"):
        adaptation.forward(TRAIN[0][:4])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.arange(4) + 198, r"rows must be in 0\.\.199, .* got 198\.\.201"),
        (torch.arange(4) - 9, r"got -9\.\.-6"),
        (torch.arange(3), r"numbers of these 4 inputs .* got int64 \[3\]"),
        (torch.arange(4)[:, None], r"int64 \[4, 1\]"),
        (torch.arange(4) > 1, r"got bool \[4\]\. Leave rows out"),
        (torch.arange(4.0), r"got float32 \[4\]"),
    ],
)
def test_rows_that_are_none_are_refused(rows, message):
    _, adaptation = adapted(distill=0.2)
    with pytest.raises(ValueError, match=message):
        adaptation.forward(TRAIN[0][:4], rows)


def test_rows_may_be_a_list():
    _, adaptation = adapted(distill=0.2, rehearse=0.0, source_inputs=None, batch_norm="frozen")
    penalties = [adaptation.forward(TRAIN[0][:4], r)[1] for r in ([0, 1, 2, 3], torch.arange(4))]
    assert torch.equal(*penalties)


def test_a_run_resumes_in_its_stall():
    """The weights of the backbone have not moved by then, as if the model lacked its state."""
    options = {"head_steps": 0, "stall": 5, "ramp": 0, "average": 0}
    model, adaptation = adapted(**options)
    for batch in itertools.islice(adaptation.batches(), 3):
        backward(adaptation, *batch)
        adaptation.optimizer.step(), adaptation.optimizer.zero_grad()
    again, resumed = adapted(resuming=True, **options)
    again.load_state_dict(model.state_dict())
    resumed.optimizer.load_state_dict(adaptation.optimizer.state_dict())
    resumed.load_state_dict(adaptation.state_dict())
    backward(resumed, *next(resumed.batches()))
    resumed.optimizer.step()
    assert resumed.done == 4


def test_rates_that_the_loop_sets_are_those_of_its_schedule():
    _, adaptation = adapted()
    for group in adaptation.optimizer.param_groups:
        group["lr"] = 0.5
    torch.optim.lr_scheduler.LambdaLR(adaptation.optimizer, lambda step: 0.1)
    assert [g["lr"] for g in adaptation.optimizer.param_groups] == [0.05, 0.05]


@pytest.mark.parametrize("make", ["adamw", torch.optim.Adam], ids=["fused", "foreign"])
def test_a_group_that_the_loop_adds_learns_beside_the_network(make):
    """A budget looked for its name."""
    _, adaptation = adapted(optimizer=make, forget_budget=0.05)
    beside = torch.nn.Linear(4, 4)
    before = beside.weight.detach().clone()
    adaptation.optimizer.add_param_group({"params": list(beside.parameters()), "lr": 1e-2})
    scheduler = adaptation.scheduler()
    for inputs, labels, rows in adaptation.batches():
        logits, penalty = adaptation.forward(inputs, rows)
        (F.cross_entropy(beside(logits), labels) + penalty).backward()
        adaptation.optimizer.step(), scheduler.step(), adaptation.optimizer.zero_grad()
    assert adaptation.finish().final["forecast"] <= 0.05
    assert not torch.equal(beside.weight, before)


def test_an_optimizer_that_cannot_be_driven_names_the_way_out():
    with pytest.raises(
        TypeError, match=r"got Adam\. The new head .* lambda groups: Adam\(groups\)"
    ):
        adapted(optimizer=torch.optim.Adam(ConvNet().parameters()))
    timm = pytest.importorskip("timm.optim", reason="a wrapper of optimizers")
    with pytest.raises(TypeError, match=r"Lookahead wraps another .* wrap adaptation\.optimizer"):
        adapted(optimizer=lambda groups: timm.Lookahead(torch.optim.Adam(groups)))
    _, adaptation = adapted(steps=3)
    outer = timm.Lookahead(adaptation.optimizer)
    for batch in adaptation.batches():
        backward(adaptation, *batch)
        outer.step(), outer.zero_grad()
    assert adaptation.done == 3


class Checkpointed(ConvNet):
    """The backward pass computes its features again, unless `reentrant` is None."""

    reentrant: bool | None = None

    def forward(self, x):
        if self.reentrant is None:
            features = self.features(x)
        else:
            x = x.clone().requires_grad_()
            features = checkpoint(self.features, x, use_reentrant=self.reentrant)
        return self.decide(torch.relu(self.project(features.flatten(1))))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["fast", "replay"])
def test_segments_that_are_recomputed_are_of_the_task_and_the_mode_that_they_ran_in(
    reentrant, method
):
    """The source's rows were recomputed in training mode, by the batch norms of the target."""

    def step(form):
        torch.manual_seed(1)
        model = Checkpointed()
        model.reentrant = form
        options = {"source_inputs": SOURCE, "steps": 6, "batch_size": 32, "batch_norm": "per_task"}
        if method == "fast":
            options |= {"rehearse": 100.0, "distill": 0.0}
        adaptation = fast.Adaptation(model, TRAIN, method=method, ramp=0, stall=0, **options)
        model.train()
        batches = adaptation.batches()
        backward(adaptation, *next(batches))
        adaptation.optimizer.step(), adaptation.optimizer.zero_grad()
        before = model.features[1].num_batches_tracked.item()
        _, penalty = adaptation.forward(*next(batches)[::2])
        penalty.backward()
        tracked = model.features[1].num_batches_tracked.item() - before
        return [p.grad for p in model.parameters() if p.grad is not None], penalty, tracked

    (expected, penalty, tracked), (grads, same, again) = step(None), step(reentrant)
    assert tracked == again == 1
    assert torch.allclose(penalty, same)
    assert max(g.abs().max() for g in expected) > 1e-4
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(grads, expected, strict=True))
    assert checkpoint_module.CheckpointFunction is CHECKPOINT_FUNCTION


def test_gradients_of_another_task_are_not_part_of_the_first_step():
    """Those of the last step of pretraining were added to it; `fast.finetune` drops them."""

    def first_step(stale):
        torch.manual_seed(1)
        model = ConvNet()
        for p in model.parameters():
            p.grad = torch.full_like(p, stale) if stale else None
        adaptation = fast.Adaptation(model, TRAIN, steps=3, batch_size=32, stall=0, ramp=0)
        model.train()
        backward(adaptation, *next(adaptation.batches()))
        adaptation.optimizer.step()
        return vector(model)

    assert torch.equal(first_step(9.0), first_step(0.0))


def test_layers_that_are_unfrozen_on_the_way_are_announced():
    def run(before, after):
        torch.manual_seed(1)
        model = ConvNet()
        model.features.requires_grad_(before)
        adaptation = fast.Adaptation(model, TRAIN, steps=4, batch_size=32, stall=0, ramp=0)
        model.features.requires_grad_(after)
        conv, moved = model.features[0].weight, []
        for i, batch in enumerate(adaptation.batches()):
            if i == 2:
                model.features.requires_grad_(True)
            was = conv.detach().clone()
            backward(adaptation, *batch)
            adaptation.optimizer.step(), adaptation.optimizer.zero_grad()
            moved.append(not torch.equal(conv, was))
        return moved

    said = r"\(features\.0\.weight, .*\) can learn only since"
    with pytest.warns(UserWarning, match=said) as seen:
        assert run(before=False, after=False) == [False] * 4
    assert len(seen) == 1
    # The way out that the warning names.
    assert run(before=True, after=False) == [False, False, True, True]


def test_a_copy_of_an_adaptation_is_refused():
    """Its optimizer had lost the hooks, and the loop was said to step another one."""
    _, adaptation = adapted()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"copy adaptation\.model, or save state_dict"):
            copied(adaptation)
