"""Rehearsal in the batch, the head's start, and averaged weights: each does what it says."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fast
from fast.adapt.config import TrainConfig
from fast.adapt.guards.distill import CachedDistillation, LiveDistillation, digest
from fast.adapt.guards.rehearse import TOLERANCE, HeadInput, Rehearsal, depends_on_mode, places_for
from fast.adapt.guards.weight_average import Average
from fast.adapt.head_start import head_is_last
from fast.data.source_inputs import SourceInputs
from fast.data.trees import join
from fast.heads import features_of, find_head, set_batch_norm, source_task, task_head
from fast.heads.outputs import source_features
from fast.models.saved import load_saved
from fast.train.trainer import Trainer
from networks import IMAGE_NETWORKS, ConvNet, TextNet, images, sentences

TRAIN, VAL = images(300, 4, seed=1), images(100, 4, seed=2)
KNOWN, ASKED = images(300, 5, seed=3), images(200, 5, seed=4)
RUN = {"steps": 60, "lr": 1e-2, "eval_every": 60}


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = KNOWN
    for index in torch.arange(300).repeat(20).split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()


def lost(pretrained, train=TRAIN, **options):
    """Rise of the source loss on inputs that were not rehearsed, in nats."""
    model = copy.deepcopy(pretrained)
    history = fast.finetune(model, train, source=ASKED, num_classes=4, **RUN, **options).history
    return history[-1]["source_loss"] - history[0]["source_loss"]


@pytest.mark.parametrize("kind", ["tensors", "loader"])
@pytest.mark.parametrize("batch_norm", ["frozen", "per_task"])
def test_rehearsal_alone_keeps_most_of_the_source(pretrained, kind, batch_norm):
    x, y = TRAIN[0], (TRAIN[1] + 1) % 4
    train = (x, y) if kind == "tensors" else DataLoader(TensorDataset(x, y), batch_size=60)
    options = {"distill": 0.0, "anchor_decay": 0.0, "batch_norm": batch_norm}
    without = lost(pretrained, train, rehearse=0.0, **options)
    kept = lost(pretrained, train, source_inputs=KNOWN[0], **options)
    assert kept < 0.3 * without


@pytest.mark.parametrize("batch_norm", ["frozen", "per_task"])
def test_a_step_sees_no_more_samples_than_before(pretrained, batch_norm):
    seen = []
    model = copy.deepcopy(pretrained)
    model.features.register_forward_pre_hook(
        lambda m, args: seen.append(len(args[0])) if torch.is_grad_enabled() else None
    )
    options = {"batch_norm": batch_norm, "source_inputs": KNOWN[0]}
    fast.finetune(model, TRAIN, steps=3, batch_size=32, **options)
    # Batch norms of two tasks cannot share a pass.
    step = [32] if batch_norm == "frozen" else [28, 4]
    assert seen[-3 * len(step) :] == 3 * step
    assert places_for(32) == 4


def test_the_head_never_sees_the_source_rows():
    model = fast.replace_head(ConvNet(), 4, sample=TRAIN[0][:64]).train()
    head = task_head(model)
    watched = HeadInput(head)
    target, source = TRAIN[0][:6], KNOWN[0][:2]
    set_batch_norm(model, "frozen")
    logits, features, kept = watched.forward(model, target, source, apart=False)
    assert logits.shape == (6, 4)
    assert torch.allclose(features, features_of(model, head, target), atol=1e-5)
    assert torch.allclose(kept, features_of(model, head, source), atol=1e-5)
    watched.close()
    assert not head._forward_pre_hooks


def test_source_inputs_of_another_shape_go_through_the_network_apart():
    assert join(torch.zeros(2, 3), torch.zeros(2, 4)) is None
    assert join({"a": torch.zeros(2, 3)}, {"b": torch.zeros(2, 3)}) is None
    assert join((torch.zeros(2, 3),), (torch.ones(1, 3),))[0].shape == (3, 3)
    known = {k: v[:, :4] for k, v in sentences(60, 5, 3)[0].items()}
    train, val = sentences(300, 4, 1), sentences(100, 4, 2)
    result = fast.finetune(TextNet(), train, val, steps=60, lr=3e-3, source_inputs=known)
    assert result.target_accuracy > 0.8


def test_rehearsal_adds_up_over_micro_batches():
    start = ConvNet().double()
    train, known = (TRAIN[0].double(), TRAIN[1]), KNOWN[0].double()
    runs = []
    for parts in (1, 4):
        model = copy.deepcopy(start)
        options = {"rehearse": 3.0, "grad_accum_steps": parts, "source_inputs": known}
        options |= {"batch_norm": "frozen"}  # else a micro batch has statistics of its own
        fast.finetune(model, train, steps=6, stall=0, **options)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*runs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_whether_the_head_makes_the_logits(name):
    model = IMAGE_NETWORKS[name]()
    assert head_is_last(model, TRAIN[0]) == (name != "conv head")
    assert not find_head(model, TRAIN[0][:2]).module._forward_hooks


def test_the_head_starts_with_what_features_alone_can_tell(pretrained):
    accuracy = {}
    for steps in (0, 200):
        model = copy.deepcopy(pretrained)
        result = fast.finetune(model, TRAIN, VAL, steps=1, head_steps=steps, stall=1)
        accuracy[steps] = result.history[0]["target_accuracy"]
    assert accuracy[0] < 0.5 < 0.8 < accuracy[200]


def test_the_average_of_the_first_steps_is_their_mean():
    weights = torch.nn.Parameter(torch.zeros(3))
    average = Average([weights], horizon=100)
    for step in range(1, 11):
        with torch.no_grad():
            weights.fill_(float(step))
        average.update(step)
    # Every other step: 2, 4, ..., 10.
    assert torch.allclose(average.values[0], torch.full((3,), 6.0))
    with average.applied():
        assert torch.allclose(weights, torch.full((3,), 6.0))
    assert torch.equal(weights, torch.full((3,), 10.0))


@pytest.mark.parametrize("steps", [5, 6])
def test_the_average_of_a_run_that_ends_in_its_stall_has_the_head_that_was_learned(steps):
    model = ConvNet()
    options = {"head_steps": 0, "stall": 5, "ramp": 0, "average": 4, "lr": 1e-2}
    result = fast.finetune(model, TRAIN, VAL, steps=steps, eval_every=1, **options)
    assert task_head(model).linear.weight.abs().sum() > 0
    assert result.history[3]["target_loss"] < result.history[0]["target_loss"]


def test_what_is_evaluated_in_the_middle_is_the_average():
    torch.manual_seed(0)
    model = ConvNet()
    options = {"steps": 40, "lr": 1e-2, "eval_every": 20, "schedule": "constant", "val": VAL}
    averaged = fast.finetune(copy.deepcopy(model), TRAIN, **options)
    plain = fast.finetune(copy.deepcopy(model), TRAIN, average=0, **options)
    # The same steps are taken; only what is shown of them differs.
    assert averaged.history[1]["loss"] == plain.history[1]["loss"]
    assert averaged.history[1]["target_loss"] != plain.history[1]["target_loss"]
    differ = [
        not torch.equal(a, b)
        for a, b in zip(averaged.model.parameters(), plain.model.parameters(), strict=True)
    ]
    assert any(differ)


def test_features_that_run_away_lower_the_learning_rate(pretrained):
    rates = {}
    for lr in (1e-4, 1e-1):
        model = copy.deepcopy(pretrained)
        options = {"schedule": "constant", "source_inputs": KNOWN[0], "rehearse": 1e-3}
        history = fast.finetune(model, TRAIN, steps=40, lr=lr, **options).history
        rates[lr] = min(record["lr"] for record in history)
    assert rates[1e-4] == 1e-4
    assert 0.1 * 1e-1 <= rates[1e-1] < 0.8 * 1e-1


@pytest.mark.parametrize("parts", [1, 2])
def test_how_far_features_are_is_a_mean_over_samples_and_steps(pretrained, parts):
    model = fast.replace_head(copy.deepcopy(pretrained), 4, sample=TRAIN[0])
    samples = SourceInputs.parse(KNOWN[0], 300)
    rehearsal = Rehearsal(model, task_head(model), samples, 8, 1.0, 0)
    before = rehearsal.features[:8]
    step = torch.full_like(before, (0.4 / rehearsal.scale) ** 0.5)
    step[4:] *= 0.5
    for _ in range(100):
        for part in torch.arange(8).chunk(parts):
            rehearsal.penalty(before[part], (before + step)[part])
        rehearsal.after_step()
    assert rehearsal.moved == pytest.approx(0.25, rel=1e-3)
    assert rehearsal.restraint == pytest.approx(TOLERANCE / 0.25, rel=1e-3)
    rehearsal.after_step()  # of a step without source inputs
    assert rehearsal.moved == pytest.approx(0.25, rel=1e-3)
    # A pull that no longer grows: three times that of plain feature distillation.
    far = (before + 10 * step).requires_grad_()
    rehearsal.penalty(before, far).backward()
    plain = before.clone().add_(10 * step).requires_grad_()
    (rehearsal.scale * (plain - before).square().mean(1)).sum().backward()
    assert torch.allclose(far.grad, 3 * plain.grad, rtol=1e-4)


class Dropping(nn.Module):
    """A network whose head sees features through a dropout."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.drop, self.fc = body, nn.Dropout(0.5), nn.Linear(5, 5)

    def forward(self, x):
        return self.fc(self.drop(self.body(x)))


def test_dropout_is_no_movement_of_features(pretrained):
    """Where training mode changes features, source rows run apart, in evaluation mode: at a rate
    that hardly moves the weights, they are where they were."""
    torch.manual_seed(0)
    model = Dropping(copy.deepcopy(pretrained)).eval()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    assert depends_on_mode(fast.replace_head(copy.deepcopy(model), 4, sample=TRAIN[0]), TRAIN[0])
    plain = fast.replace_head(copy.deepcopy(pretrained), 4, sample=TRAIN[0])
    assert depends_on_mode(plain, TRAIN[0])  # batch norm
    set_batch_norm(plain, "frozen")
    assert not depends_on_mode(plain, TRAIN[0])
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    options = {"steps": 20, "lr": 1e-6, "schedule": "constant", "ramp": 0, "eval_every": 5}
    history = fast.finetune(model, TRAIN, source_inputs=KNOWN[0], **options).history
    assert {record["lr"] for record in history[1:]} == {1e-6}


def test_class_weights_hold_for_the_head_start():
    answers = {}
    for weight in (0.0, 1.0):
        config = {"num_classes": 4, "class_weights": (weight, 1.0, 1.0, 1.0)}
        result = fast.finetune(ConvNet(), TRAIN, VAL, steps=1, stall=1, **config)
        with torch.no_grad():
            answers[weight] = (result.model(VAL[0]).argmax(1) == 0).float().mean().item()
    assert answers[0.0] < 0.5 * answers[1.0]


def test_stream_and_advance_are_a_run(pretrained):
    """What `benchmarks/step_time.py` drives is what `finetune` does."""
    from fast.data.generators import seeded

    whole = copy.deepcopy(pretrained)
    fast.finetune(whole, TRAIN, steps=5, source_inputs=KNOWN[0])
    model = copy.deepcopy(pretrained)
    with seeded(0):
        config = TrainConfig(steps=5)
        trainer = Trainer(config, model, TRAIN, None, None, None, None, None, KNOWN[0])
        stream = trainer.stream(0)
        model.train()
        for step in range(5):
            trainer.advance(step, next(stream))
    expected = whole.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("method", "card"), [("fast", False), ("ewc", True)])
def test_ewc_keeps_its_card_when_it_rehearses(method, card):
    config = TrainConfig(method=method, rehearse=1.0, steps=20)
    trainer = Trainer(config, ConvNet(), TRAIN, None, None, None, None, None, KNOWN[0])
    assert (trainer.protection.card is not None) == card
    assert trainer.function_pull.rehearsal is not None
    weights = [g for g in trainer.optimizer.param_groups if g["name"].startswith("backbone")]
    assert all(g["anchor_decay"] > 0 for g in weights)
    assert any("curvature" in state for state in trainer.optimizer.state.values()) == card


def test_without_source_inputs_the_targets_own_are_rehearsed(pretrained):
    """Under the source's statistics: their features stay where they were."""
    moved = {}
    for weight in (0.0, 10.0):
        model = copy.deepcopy(pretrained)
        options = {"rehearse": weight, "anchor_decay": 0.0, "distill": 0.0}
        result = fast.finetune(model, TRAIN, steps=60, lr=3e-3, **options)
        assert result.plan.rehearsed == ("target inputs" if weight else "")
        before, now = (
            source_features(m, SourceInputs.parse(TRAIN[0], 200)) for m in (pretrained, model)
        )
        moved[weight] = float((now - before).square().mean() / before.var(0).mean())
    assert moved[10.0] < 0.3 * moved[0.0]


def test_per_task_batch_norm_starts_from_the_statistics_of_the_target(pretrained):
    """Head start and normaliser see what the target's own batch norms give."""
    (x, y), (asked, right) = TRAIN, VAL
    train, val = (5 * x + 3, y), (5 * asked + 3, right)
    model = copy.deepcopy(pretrained)
    before = copy.deepcopy(pretrained).eval()(KNOWN[0])
    options = {"batch_norm": "per_task", "steps": 2, "stall": 2, "source_inputs": KNOWN}
    result = fast.finetune(model, train, val, **options)
    assert result.history[0]["target_accuracy"] > 0.8
    head = task_head(model)
    features = features_of(model, head, train[0])
    assert (features.mean(0) - head.norm.mean).abs().max() < 0.3 * features.std()
    with fast.source_task(model):
        assert torch.allclose(model(KNOWN[0]), before, atol=1e-5)


@pytest.mark.parametrize("batch_norm", ["frozen", "per_task"])
def test_a_saved_run_answers_both_tasks(pretrained, tmp_path, batch_norm):
    model = copy.deepcopy(pretrained)
    options = {"batch_norm": batch_norm, "steps": 5, "source_inputs": KNOWN[0]}
    result = fast.finetune(model, TRAIN, **options)
    result.save(tmp_path)
    saved = load_saved(tmp_path, ConvNet(), VAL[0][:2])
    x = VAL[0]
    result.model.eval()
    with torch.no_grad(), source_task(result.model):
        asked = result.model(x)
    with torch.no_grad():
        torch.testing.assert_close(saved.source.eval()(x), asked)
        torch.testing.assert_close(saved.target.eval()(x), result.model(x), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "source_norms.safetensors").exists() == (batch_norm == "per_task")


class Views(Dataset):
    """Mirrors the samples whose number `mirrors` answers, at every second reading."""

    def __init__(self, mirrors):
        self.mirrors, self.read = mirrors, Counter()

    def __len__(self):
        return len(TRAIN[1])

    def __getitem__(self, i):
        self.read[i] += 1
        x = TRAIN[0][i]
        return x.flip(-1) if self.mirrors(i) and self.read[i] % 2 else x, int(TRAIN[1][i])


def flipped(x):
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


@pytest.mark.parametrize(
    ("data", "options", "live"),
    [
        (lambda: TRAIN, {}, False),
        (lambda: TRAIN, {"transform": flipped}, True),
        (lambda: Views(lambda i: False), {}, False),
        (lambda: Views(lambda i: True), {}, True),
        (lambda: Views(lambda i: i == LATE), {}, False),
        (lambda: DataLoader(Views(lambda i: True), 60), {}, True),
    ],
    ids=["tensors", "transform", "Dataset", "it augments", "it augments one", "loader"],
)
def test_what_is_remembered_of_one_view_is_not_held_against_another(
    pretrained, monkeypatch, data, options, live
):
    """Before anything has moved, staying what it was costs nothing, whatever the view."""
    made = []
    for kind in (CachedDistillation, LiveDistillation):
        start = kind.__init__
        monkeypatch.setattr(
            kind, "__init__", lambda self, *a, s=start: (made.append(type(self)), s(self, *a))[1]
        )
    still = {"steps": 9, "eval_every": 9, "stall": 99, "head_steps": 0, "average": 0, "lr": 1e-9}
    still |= {"num_classes": 4, "batch_size": 60, "ramp": 0, "batch_norm": "frozen"}
    loss = [
        fast.finetune(copy.deepcopy(pretrained), data(), distill=d, **still, **options).history[-1]
        for d in (0.0, 100.0)
    ]
    assert loss[1]["loss"] == pytest.approx(loss[0]["loss"], abs=1e-5)
    assert made == [LiveDistillation if live else CachedDistillation]


# Not in the first batch, by which augmentation is recognised.
LATE = int(torch.randperm(300, generator=torch.Generator().manual_seed(0))[-1])


def test_a_view_that_is_not_known_is_left_out():
    head = task_head(fast.replace_head(ConvNet(), 4, sample=TRAIN[0]))
    x = TRAIN[0][:3]
    known = CachedDistillation(
        head, 1.0, torch.tensor([4, 2, 7]), torch.zeros(3, 5), 9, [digest(row) for row in x]
    )
    assert known.places(torch.tensor([2, 4, 0, 7]), x[[1, 1, 0, 2]]).tolist() == [1, -1, -1, 2]
