"""Rehearsal in the batch: features stay, the learning rate gives way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fast
from fast.adapt.defaults import SHUFFLED, source_share
from fast.adapt.guards.base import MicroBatch, Seen
from fast.adapt.guards.rehearse import Rehearsal, own_inputs, places_for
from fast.adapt.network.micro_batches import shares
from fast.adapt.network.shared_forward import HeadInput, cuts_at_head, depends_on_mode
from fast.data.dataset import as_data
from fast.data.images.patches import are_pictures, shuffled_patches
from fast.data.source_inputs import SourceInputs
from fast.data.stream import TrainBatches
from fast.data.trees import join
from fast.heads import features_of, set_batch_norm, source_task, task_head
from fast.heads.outputs import source_features
from fast.models.saved import load_saved
from networks import ConvNet, TextNet, images, sentences

TRAIN, VAL = images(300, 4, seed=1), images(100, 4, seed=2)
KNOWN, ASKED = images(300, 5, seed=3), images(200, 5, seed=4)
RUN = {"steps": 60, "lr": 1e-2, "eval_every": 60}


def lost(pretrained, train=TRAIN, **options):
    """Rise of the source loss on inputs that were not rehearsed, in nats."""
    model = copy.deepcopy(pretrained)
    options = RUN | options
    history = fast.finetune(model, train, source=ASKED, num_classes=4, **options).history
    return history[-1]["source_loss"] - history[0]["source_loss"]


@pytest.mark.parametrize("kind", ["tensors", "loader"])
@pytest.mark.parametrize("batch_norm", ["frozen", "per_task"])
def test_rehearsal_alone_keeps_most_of_the_source(pretrained, kind, batch_norm):
    x, y = TRAIN[0], (TRAIN[1] + 1) % 4
    train = (x, y) if kind == "tensors" else DataLoader(TensorDataset(x, y), batch_size=60)
    # Nothing eases the first steps, which then cost the source most.
    options = {"distill": 0.0, "anchor_decay": 0.0, "batch_norm": batch_norm, "lr": 3e-2}
    options |= {"head_steps": 0, "stall": 0, "ramp": 0}
    without = lost(pretrained, train, rehearse=0.0, **options)
    kept = lost(pretrained, train, source_inputs=KNOWN[0], rehearse=1.0, **options)
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
    step = [32] if batch_norm == "frozen" else [16, 16]
    assert seen[-3 * len(step) :] == 3 * step


@pytest.mark.parametrize(
    ("samples", "places"), [(20, 32), (500, 32), (1000, 16), (2000, 8), (10**6, 8), (None, 8)]
)
def test_few_samples_leave_more_of_a_batch_to_source_inputs(samples, places):
    assert places_for(64, source_share(samples)) == places


def test_the_batches_of_a_loader_and_own_texts_keep_their_share():
    loader = DataLoader(TensorDataset(*TRAIN), batch_size=64)
    assert fast.Adaptation(ConvNet(), loader, source_inputs=KNOWN[0]).plan.source_size == 8
    assert fast.Adaptation(ConvNet(), loader).plan.source_size == 8
    texts = sentences(300, 4, 1)
    assert fast.Adaptation(TextNet(), texts, batch_size=64).plan.source_size == 8


@pytest.mark.parametrize(("samples", "places"), [(100, 32), (600, 27), (2000, 8)])
def test_few_pictures_have_more_places_for_those_made_of_them(samples, places):
    train = images(samples, 4, seed=1)
    plan = fast.Adaptation(ConvNet(), train, batch_size=64).plan
    assert (plan.rehearsed, plan.source_size) == (
        SHUFFLED,
        places,
    )
    assert plan.rehearse == min(0.5, max(0.3, samples / 2000))


def test_large_pictures_are_kept_within_the_bytes_of_own_inputs(monkeypatch):
    x, _ = train = images(2000, 4, seed=1)
    for bytes_ in (2**28, 100 * x[0].nbytes):
        monkeypatch.setattr("fast.adapt.guards.rehearse.BYTES", bytes_)
        [kept] = [g for g in fast.Adaptation(ConvNet(), train).guards if isinstance(g, Rehearsal)]
        assert len(kept.inputs) == min(512, bytes_ // x[0].nbytes)


def test_pictures_larger_than_these_bytes_are_kept_all_the_same(monkeypatch):
    """Two of them fill the bytes, and four are the least to say how much features vary."""
    monkeypatch.setattr("fast.adapt.guards.rehearse.BYTES", 1)
    monkeypatch.setattr("fast.data.source_inputs.BYTES", 1)
    loader = DataLoader(TensorDataset(*images(40, 4, seed=1)), batch_size=2)
    kept = rehearsal_of(fast.Adaptation(ConvNet(), loader, num_classes=4))
    assert kept is not None
    assert len(kept.inputs) == 4


@pytest.mark.parametrize("source", [True, False])
def test_inputs_that_were_computed_with_gradients_are_data(source):
    """What they were computed from is not trained, and they serve every step."""
    x, y = TRAIN
    x = x.clone().requires_grad_()
    kept = KNOWN[0].clone().requires_grad_() * 2 if source else None
    options = {"source_inputs": kept, "steps": 3, "head_steps": 0}
    fast.finetune(ConvNet(), (x * 2, y), **options)
    fast.finetune(ConvNet(), TensorDataset(x, y), num_classes=4, **options)


def test_patches_are_shuffled_across_pictures_and_lose_none():
    """Sides that do not divide by four keep what is left over, and nothing else at its place."""
    x = torch.arange(2 * 3 * 9 * 10.0).view(2, 3, 9, 10)
    made = shuffled_patches((x,), 50, torch.Generator().manual_seed(0))[0]
    assert made.shape == (50, 3, 9, 10)
    assert set(made.flatten().tolist()) == set(x.flatten().tolist())
    again = shuffled_patches((x,), 50, torch.Generator().manual_seed(0))[0]
    assert torch.equal(made, again)
    border = x[:, :, 8, :], x[:, :, :, 8:]
    for picture in made:
        assert any(torch.equal(picture[:, 8], rows) for rows in border[0])
        assert any(torch.equal(picture[:, :, 8:], columns) for columns in border[1])
        assert not any(torch.equal(picture, known) for known in x)
    first = made[0, :, :2, :2]  # one patch is one of those of the two pictures, whole
    places = [(n, i, j) for n in range(2) for i in range(0, 8, 2) for j in range(0, 8, 2)]
    assert sum(torch.equal(first, x[n, :, i : i + 2, j : j + 2]) for n, i, j in places) == 1


@pytest.mark.parametrize(
    ("inputs", "pictures"),
    [
        (torch.zeros(2, 3, 8, 8), True),
        ({"pixel_values": torch.zeros(2, 1, 28, 28)}, True),
        (torch.zeros(2, 8, 8, 3), False),
        (torch.zeros(2, 3, 7, 32), False),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2, 4)), False),
        (torch.zeros(2, 64), False),
    ],
)
def test_pictures_alone_are_taken_apart(inputs, pictures):
    assert are_pictures(inputs) == pictures


def test_a_long_run_reads_a_part_of_the_data_before_its_first_step():
    read = set()

    class Watched(TensorDataset):
        def __getitem__(self, i):
            read.add(i)
            return super().__getitem__(i)

    data = Watched(*images(2000, 4, seed=1))
    adaptation = fast.Adaptation(
        ConvNet(), data, num_classes=4, steps=5000, batch_size=8, head_steps=0, distill=0.0
    )
    assert adaptation.plan.rehearsed == SHUFFLED
    assert len(read) < 1500


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


def test_pictures_as_they_are_are_mixed_with_shuffled_ones():
    """The first of them are measured in the first step, and kept where features are large."""
    train = images(2000, 4)
    own = own_inputs(TrainBatches(as_data(train, "train"), 64, 0), 64, True).inputs
    as_they_are = [bool((train[0] == x).flatten(1).all(1).any()) for x in own]
    assert 16 <= sum(as_they_are) <= 32 == len(own) // 2
    assert 4 < sum(as_they_are[:32]) < sum(as_they_are) - 4


def test_source_inputs_of_another_shape_go_through_the_network_apart():
    assert join(torch.zeros(2, 3), torch.zeros(2, 4)) is None
    assert join({"a": torch.zeros(2, 3)}, {"b": torch.zeros(2, 3)}) is None
    assert join((torch.zeros(2, 3),), (torch.ones(1, 3),))[0].shape == (3, 3)
    source = {k: v[:, :4] for k, v in sentences(60, 5, 3)[0].items()}
    train, val = sentences(300, 4, 1), sentences(100, 4, 2)
    result = fast.finetune(TextNet(), train, val, steps=60, lr=3e-3, source_inputs=source)
    assert result.target_accuracy > 0.8


def test_rehearsal_adds_up_over_micro_batches():
    start = ConvNet().double()
    train, source = (TRAIN[0].double(), TRAIN[1]), KNOWN[0].double()
    runs = []
    for parts in (1, 4):
        model = copy.deepcopy(start)
        options = {"rehearse": 3.0, "grad_accum_steps": parts, "source_inputs": source}
        options |= {"batch_norm": "frozen"}  # else a micro batch has statistics of its own
        fast.finetune(model, train, steps=6, stall=0, **options)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*runs, rtol=1e-4, atol=1e-6)


def test_features_that_run_away_lower_the_learning_rate(pretrained):
    rates = {}
    for lr in (1e-4, 1.0):
        model = copy.deepcopy(pretrained)
        options = {"schedule": "constant", "source_inputs": KNOWN[0], "rehearse": 0.5}
        history = fast.finetune(model, TRAIN, steps=40, lr=lr, **options).history
        rates[lr] = min(record["lr"] for record in history)
    assert rates[1e-4] == 1e-4
    assert 0.1 <= rates[1.0] < 0.8


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

    def changes(network):
        return depends_on_mode(network, task_head(network), TRAIN[0])

    torch.manual_seed(0)
    model = Dropping(copy.deepcopy(pretrained)).eval()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    assert changes(fast.replace_head(copy.deepcopy(model), 4, sample=TRAIN[0]))
    plain = fast.replace_head(copy.deepcopy(pretrained), 4, sample=TRAIN[0])
    assert changes(plain)  # batch norm
    set_batch_norm(plain, "frozen")
    assert not changes(plain)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    options = {"steps": 20, "lr": 1e-6, "schedule": "constant", "ramp": 0, "eval_every": 5}
    history = fast.finetune(model, TRAIN, source_inputs=KNOWN[0], **options).history
    assert {record["lr"] for record in history[1:]} == {1e-6}


def test_samples_that_depend_on_each_other_go_through_the_network_apart(pretrained):
    """Batch norm without running statistics normalises source inputs by those of the target."""
    model = fast.replace_head(copy.deepcopy(pretrained), 4, sample=TRAIN[0])
    head = task_head(model)
    assert cuts_at_head(model, head, TRAIN[0], 2 * KNOWN[0][:8])
    model.features[1].track_running_stats = False
    model.features[1].running_mean = model.features[1].running_var = None
    assert not cuts_at_head(model, head, TRAIN[0], 2 * KNOWN[0][:8])


def rehearsal_of(adaptation):
    return next((guard for guard in adaptation.guards if isinstance(guard, Rehearsal)), None)


@pytest.mark.parametrize(("method", "card"), [("fast", False), ("ewc", True)])
def test_ewc_keeps_its_card_when_it_rehearses(method, card):
    options = {"method": method, "rehearse": 1.0, "steps": 20}
    adaptation = fast.Adaptation(ConvNet(), TRAIN, source_inputs=KNOWN[0], **options)
    assert (adaptation.budget.card is not None) == card
    assert rehearsal_of(adaptation) is not None
    groups = adaptation.optimizer.param_groups
    assert all(g["anchor_decay"] > 0 for g in groups if g["name"].startswith("backbone"))
    states = adaptation.optimizer.state.values()
    assert any("curvature" in state or "curvature_codes" in state for state in states) == card


def test_without_source_inputs_the_targets_own_are_rehearsed(pretrained):
    """Under the source's statistics: their features stay where they were."""
    moved = {}
    for weight in (0.0, 10.0):
        model = copy.deepcopy(pretrained)
        options = {"rehearse": weight, "anchor_decay": 0.0, "distill": 0.0}
        result = fast.finetune(model, TRAIN, steps=60, lr=3e-3, **options)
        assert result.plan.rehearsed == (SHUFFLED if weight else "")
        before, now = (
            source_features(m, SourceInputs.parse(TRAIN[0], 200)) for m in (pretrained, model)
        )
        moved[weight] = float((now - before).square().mean() / before.var(0).mean())
    assert moved[10.0] < 0.3 * moved[0.0]


def test_per_task_batch_norm_starts_from_the_statistics_of_the_target(pretrained):
    """Head start and normaliser see what the target's own batch norms give."""
    (x, y), (x_val, y_val) = TRAIN, VAL
    train, val = (5 * x + 3, y), (5 * x_val + 3, y_val)
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
        answers = result.model(x)
    with torch.no_grad():
        torch.testing.assert_close(saved.source.eval()(x), answers)
        torch.testing.assert_close(saved.target.eval()(x), result.model(x), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "source_norms.safetensors").exists() == (batch_norm == "per_task")


class Guarded:
    """Rehearsal of 20 source inputs, four a step, whose features are moved at will."""

    def __init__(self, weight=1.0, inputs=KNOWN[0][:20]):
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 5))
        self.guard = Rehearsal(
            model=self.model,
            head=self.model[2],
            samples=SourceInputs.parse(inputs, 20),
            name="source_inputs",
            size=4,
            weight=weight,
            seed=0,
        )
        self.done = 0

    def step(self, *e, parts=1):
        """The penalty of a step that finds the features of its inputs at these distances."""
        penalty = 0.0
        apart = (torch.tensor(e) / self.guard.scale).sqrt().expand(4)
        for source, moved in zip(
            shares(self.guard.source_batch(self.done), parts), apart.chunk(parts), strict=True
        ):
            batch = MicroBatch(inputs=None, places=torch.tensor([]), remembered=0, source=source)
            facts = {"model": self.model, "step": self.done, "inputs": None, "features": None}
            features = source.reference + moved[:, None]
            penalty += self.guard.penalty(Seen(batch=batch, source_features=features, **facts))
        self.done += 1
        self.guard.after_step(self.done)
        return float(penalty)


@pytest.mark.parametrize(("e", "penalty"), [(0.0, 0.0), (0.2, 0.2), (0.3, 0.45), (1.3, 3.45)])
def test_the_penalty_grows_with_the_square_of_the_distance_and_then_steadily(e, penalty):
    assert Guarded(weight=1.0).step(e) == pytest.approx(penalty, rel=1e-4)
    assert Guarded(weight=0.5).step(e) == pytest.approx(penalty / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("weight", "strength", "factors"),
    [
        (1.0, 1.0, [1.0, 0.5, 0.1 / 0.18]),
        (2.0, 1.0, [1.0, 0.5, 0.1 / 0.18]),
        (0.8, 1.0, [1.0, 0.625, 0.125 / 0.18]),
        (0.1, 1.0, [1.0, 1.0, 1.0]),
        (1.0, 0.8, [1.0, 0.625, 0.125 / 0.18]),
        (1.0, 4.0, [0.25, 0.125, 0.025 / 0.18]),
    ],
)
def test_the_rate_falls_as_the_average_distance_exceeds_the_tolerance(weight, strength, factors):
    """The average rises by a third of what is missing, and falls by a tenth of it."""
    run = Guarded(weight)
    run.guard.strength = strength
    told = []
    for e in (0.3, 0.4, 0.0):
        run.step(e)
        told.append(run.guard.lr_factor())
    assert told == pytest.approx(factors, rel=1e-3)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_distances_are_averaged_over_the_samples_of_a_step(parts):
    run = Guarded()
    assert run.step(0.3, 0.3, 0.1, 0.2, parts=parts) == pytest.approx(1.15 / 4, rel=1e-3)
    assert run.guard.moved == pytest.approx(0.225 / 3, rel=1e-3)
    run.guard.after_step(2)  # a step without source inputs
    assert run.guard.moved == pytest.approx(0.225 / 3, rel=1e-3)


def test_a_rate_is_left_to_features_that_are_lost():
    run = Guarded()
    run.step(1e4)
    assert run.guard.lr_factor() == 0.1


def test_a_step_that_overflows_tells_nothing_about_the_features():
    run = Guarded()
    run.step(0.3)
    run.step(float("inf"))
    assert run.guard.moved == pytest.approx(0.1, rel=1e-3)
    run.step(0.4)
    assert run.guard.moved == pytest.approx(0.2, rel=1e-3)


def test_source_inputs_of_a_step_depend_on_its_number_alone():
    one, other = Guarded().guard, Guarded().guard
    in_order = [one.source_batch(step).inputs for step in range(7)]
    assert torch.equal(other.source_batch(5).inputs, in_order[5])
    assert torch.equal(other.source_batch(6).inputs, in_order[6])
    assert torch.equal(other.source_batch(6).inputs, in_order[6])
    assert {len(inputs) for inputs in in_order} == {4}
    assert len(torch.cat(in_order[:5]).unique(dim=0)) == 20


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"^source_inputs: .* all 20 inputs the same feat"):
        Guarded(inputs=torch.ones(20, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^source_inputs: .* features that are not finite"):
        Guarded(inputs=KNOWN[0][:20] * 1e39)


def test_large_features_are_kept_of_the_first_inputs_alone(monkeypatch):
    monkeypatch.setattr("fast.adapt.guards.rehearse.CHUNK", 8)
    for kept, bytes_ in ((8, 1), (8, 8 * 6 * 4 - 1), (16, 8 * 6 * 4)):
        monkeypatch.setattr("fast.adapt.guards.rehearse.FEATURE_BYTES", bytes_)
        guard = Guarded().guard
        assert (len(guard.features), len(guard.inputs)) == (kept, kept)
