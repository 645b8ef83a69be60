"""How long a run is, how fast it goes, and what it goes back to."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fast
from fast.adapt.defaults import (
    EASED,
    FEW,
    LAYER_NORM_LR,
    LEAST_REHEARSE,
    LEAST_STEPS,
    REHEARSING_LR,
    SETTLED,
    SGD_CLIP,
    SGD_FACTOR,
    SHUFFLED,
    SOURCE_INPUTS,
    TARGET_INPUTS,
    own_beside_shuffled,
    own_beside_synthetic,
    steps_for,
    uses_card,
)
from fast.adapt.methods import METHODS
from fast.adapt.plan import plan_for
from fast.data.dataset import as_data
from fast.data.stream import TrainBatches
from fast.train.config import TrainConfig
from networks import ConvNet, images

TRAIN, VAL = images(120, 4, seed=1), images(100, 4, seed=2)


def steps(samples, **options):
    config = TrainConfig(**options)
    data = as_data((torch.zeros(samples, 1), torch.arange(samples) % 2), "train")
    return steps_for(config, TrainBatches(data, config.batch_size, 0))


def test_the_default_length_suits_the_data():
    assert steps(20) == steps(1000) == LEAST_STEPS
    assert steps(64_000) == 3 * 1000
    assert steps(120, epochs=3) == 6  # 5.6: all of the last epoch is used
    assert steps(120, steps=7) == 7


@pytest.mark.parametrize(
    ("samples", "beside_shuffled", "beside_synthetic"),
    [(100, 1, 26), (1000, 64, 128), (2000, 256, 256), (10**6, 256, 256)],
)
def test_few_inputs_that_are_learned_by_heart_are_kept(samples, beside_shuffled, beside_synthetic):
    assert own_beside_shuffled(256, samples) == beside_shuffled
    assert own_beside_synthetic(256, samples) == beside_synthetic
    assert own_beside_shuffled(256, None) == 256


@pytest.mark.parametrize(
    ("options", "card", "source_inputs", "uses"),
    [
        ({}, False, True, False),  # rehearsal keeps more than a card of its own
        ({}, True, False, True),
        ({"rehearse": 0.0}, False, True, True),
        ({"rehearse": 0.0}, False, False, False),
        ({"method": "ewc"}, False, False, True),
        ({"method": "ewc", "rehearse": 1.0}, False, True, True),
        ({"method": "l2-sp"}, False, True, False),
        ({"method": "adapter"}, True, True, False),
    ],
)
def test_a_run_has_a_card_where_it_is_given_or_needed(options, card, source_inputs, uses):
    assert uses_card(TrainConfig(**options), card, source_inputs) == uses


@pytest.mark.parametrize("length", [1, 3, 10, 1000])
def test_what_protects_the_backbone_does_not_shrink_with_the_run(length):
    facts = {"head_is_last": True, "rehearsed": "target inputs"}
    plan = plan_for(TrainConfig(), steps=length, **facts)
    assert plan.ramp == plan_for(TrainConfig(), steps=1000, **facts).ramp > 10
    later = plan_for(TrainConfig(), steps=length)
    assert later.stall == METHODS["fast"].stall


def test_a_short_run_has_a_lower_rate_unless_it_was_given_one():
    whole = plan_for(TrainConfig(), steps=SETTLED).lr
    assert plan_for(TrainConfig(), steps=SETTLED // 10).lr == pytest.approx(whole / 100)
    assert plan_for(TrainConfig(lr=1e-2), steps=6).lr == 1e-2
    assert plan_for(TrainConfig(method="vanilla"), steps=6).lr == 1e-3


@pytest.mark.parametrize(
    ("size", "samples", "share"),
    [
        (64, 10_000, 1.0),
        (256, 10_000, 1.0),
        (16, None, 0.5),
        (16, 10_000, 0.5),
        (8, 16, 0.5),  # as noisy as 16 of infinitely many
        (8, 8, 1.0),  # a batch of all samples has no noise
        (0, None, 1.0),  # nobody knows
    ],
)
def test_adapters_have_a_lower_rate_in_small_batches(size, samples, share):
    facts = {"steps": SETTLED, "target_size": size, "samples": samples}
    plan = plan_for(TrainConfig(method="adapter"), **facts)
    assert plan.lr == pytest.approx(1e-2 * share, rel=1e-3)
    assert plan_for(TrainConfig(method="adapter", lr=1e-2), **facts).lr == 1e-2
    assert plan_for(TrainConfig(), **facts).lr == plan_for(TrainConfig(), steps=SETTLED).lr


@pytest.mark.parametrize(
    ("options", "samples", "decay"),
    [
        ({"method": "adapter"}, 100, 4.0),
        ({"method": "adapter"}, 750, 2.0),
        ({"method": "adapter"}, None, 0.0),
        ({"method": "adapter", "optimizer": "sgd"}, 100, 0.2),  # its rate is 20 times as high
        ({"method": "adapter", "head_decay": 0.0}, 100, 0.0),
        ({"method": "adapter", "weight_decay": 5.0}, 100, 5.0),
        ({"method": "fast"}, 100, 1.0),  # few samples are learned by heart
        ({"method": "fast"}, FEW, 0.0),
        ({"method": "fast"}, None, 0.0),
        ({"method": "fast", "weight_decay": 0.01}, FEW, 0.01),
        ({"method": "fast", "lr": 0.5}, 100, 0.02),  # a tenth of the head a step, at 10 times that
        ({"method": "lp-ft"}, 100, 0.0),
        ({"head": "keep"}, 100, 0.0),
    ],
)
def test_a_new_head_decays_where_samples_are_few(options, samples, decay):
    plan = plan_for(TrainConfig(**options), steps=SETTLED, samples=samples)
    assert plan.head_decay == pytest.approx(decay)


def test_a_head_that_is_kept_has_no_decay_of_its_own():
    with pytest.raises(ValueError, match="head_decay is for a new head"):
        plan_for(TrainConfig(head="keep", head_decay=1.0), steps=SETTLED)


def test_the_plan_is_part_of_the_result_and_says_what_is_done():
    result = fast.finetune(ConvNet(), TRAIN, steps=3)
    assert (result.plan.steps, result.plan.target_size, result.plan.source_size) == (3, 32, 32)
    assert "3 steps of 32 samples" in str(result.plan)
    assert "32 target inputs (half or more with shuffled patches)" in str(result.plan)


def test_the_plan_counts_one_step_and_one_sample():
    assert "1 step of 1 sample;" in str(plan_for(TrainConfig(), steps=1, target_size=1))


def test_the_plan_is_told_before_the_first_step(capsys):
    fast.finetune(ConvNet(), TRAIN, steps=3, progress=False)
    told = capsys.readouterr().err
    assert "3 steps of 32 samples and 32 target inputs (half or more with shuffled patches)" in told
    assert "(the run ends at 16.7 % of it, before the end of its ramp)" in told
    assert "4 classes, 120 training samples" in told


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, [1.0, 0.8536, 0.5, 0.1464, 0.0]),
        ({"warmup": 2}, [1 / 3, 2 / 3, 1.0, 0.5, 0.0]),
        ({"warmup": 9}, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ({"warmup": 1, "schedule": "constant"}, [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_rate_rises_in_the_warm_up_and_falls_by_half_a_cosine(options, factors):
    plan = plan_for(TrainConfig(**options), steps=4)
    assert [plan.lr_factor(step) for step in range(5)] == pytest.approx(factors, abs=1e-4)
    assert plan.lr_factor(31) == plan.lr_factor(20)  # a loop may go on


@pytest.mark.parametrize(
    ("options", "batch_norms", "distill"),
    [
        ({}, False, 0.05 * EASED),
        ({}, True, 0.0),  # the source's batch norms give its head features of their own
        ({"tasks": "together"}, True, 0.05 * EASED),
        ({"head": "keep"}, False, 0.0),
        ({"head": "keep", "distill": 0.2}, False, 0.2),
    ],
)
def test_answers_are_kept_where_they_need_not_change(options, batch_norms, distill):
    facts = {"rehearsed": SOURCE_INPUTS, "batch_norms": batch_norms}
    plan = plan_for(TrainConfig(**options), steps=100, **facts)
    assert plan.distill == pytest.approx(distill)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lp-ft", "stall": 1}, "lp-ft has no stall; it has probe_steps"),
        ({"probe_steps": 1}, "probe_steps is for lp-ft; fast has stall"),
    ],
)
def test_a_method_has_its_own_name_for_a_start_of_the_head_alone(options, message):
    with pytest.raises(ValueError, match=message):
        plan_for(TrainConfig(**options), steps=10)


@pytest.mark.parametrize(("steps", "probe"), [(60, 10), (3, 1), (2, 1)])
def test_a_sixth_of_lp_ft_is_its_probe(steps, probe):
    assert plan_for(TrainConfig(method="lp-ft"), steps=steps).stall == probe


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ramp": 10}, "lr 1; "),
        ({"ramp": 11}, "lr 1 (the run ends at 90.9 % of it, before the end of its ramp); "),
        ({"stall": 10, "ramp": 0}, "lr 1 (the run ends at 0 % of it, before the end of its stall)"),
        ({"stall": 9, "ramp": 0}, "lr 1; "),
        ({"ramp": 10, "warmup": 9}, "lr 1; "),
        ({"ramp": 10, "warmup": 10}, "lr 1 (the run ends at 90.9 % of it, before the end of its w"),
        ({"ramp": 20, "warmup": 19}, "at 25 % of it, before the end of its ramp and warm-up)"),
    ],
)
def test_a_plan_tells_that_its_run_does_not_get_to_its_rate(options, told):
    config = TrainConfig(lr=1.0, **{"stall": 0, **options})
    assert told in str(plan_for(config, steps=10, head_is_last=True))


def test_training_that_makes_the_validation_worse_returns_the_head_start():
    torch.manual_seed(0)
    model = ConvNet()
    bad = {"lr": 0.3, "ramp": 0, "anchor_decay": 0.0, "max_grad_norm": 1.0, "rehearse": 0.0}
    result = fast.finetune(model, TRAIN, VAL, steps=3, eval_every=1, **bad)
    first, last = result.history[0], result.history[-1]
    assert last["target_accuracy"] < first["target_accuracy"]
    assert result.final is first
    assert result.target_accuracy == first["target_accuracy"]
    with torch.no_grad():
        now = (model(VAL[0]).argmax(1) == VAL[1]).float().mean().item()
    assert now == pytest.approx(first["target_accuracy"])


def test_a_run_that_improves_keeps_its_end():
    result = fast.finetune(ConvNet(), TRAIN, VAL, steps=40, lr=1e-2)
    assert result.final is result.history[-1]


class Bag(nn.Module):
    """The mean of embeddings, of texts of any length."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.fc = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids, name=None):
        return self.fc(self.body(self.embed(ids).mean(1)).relu())


class Texts(Dataset):
    """Sentences of two to six tokens, each with its name."""

    def __len__(self):
        return 60

    def __getitem__(self, i):
        ids = (torch.arange(2 + i % 5) + i) % 9
        return {"ids": ids, "name": f"text {i}", "label": i % 3}


def padded(rows, names):
    ids = nn.utils.rnn.pad_sequence([row["ids"] for row in rows], batch_first=True)
    batch = {"ids": ids, "label": torch.tensor([row["label"] for row in rows])}
    return batch | ({"name": [row["name"] for row in rows]} if names else {})


@pytest.mark.parametrize("names", [False, True])
def test_batches_that_cannot_be_put_together_are_trained_on(names):
    """Features are kept of inputs of one shape, and of none that come beside names."""
    loader = DataLoader(Texts(), 4, shuffle=True, collate_fn=lambda rows: padded(rows, names))
    result = fast.finetune(Bag(), loader, num_classes=3, steps=20)
    assert result.plan.rehearsed == ("" if names else "target inputs")


def test_a_sampler_of_the_users_says_how_large_its_batches_are():
    class Pairs:
        def __iter__(self):
            return iter([[i, i + 1] for i in range(0, 60, 2)])

        def __len__(self):
            return 30

    data = [{"x": x, "label": int(y)} for x, y in zip(*images(60, 4, seed=1), strict=True)]
    plan = fast.finetune(
        ConvNet(), DataLoader(data, batch_sampler=Pairs()), num_classes=4, steps=2
    ).plan
    assert (plan.target_size, plan.source_size, plan.batch_norm) == (2, 1, "frozen")


def test_two_samples_a_step_leave_something_to_keep():
    result = fast.finetune(ConvNet(), TRAIN, batch_size=2, steps=1)
    assert (result.plan.rehearsed, result.plan.source_size) == (SHUFFLED, 1)


class Centred(nn.Module):
    """A buffer that the forward replaces."""

    def __init__(self):
        super().__init__()
        self.net = ConvNet()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean() + 0.1
        return self.net(x - self.mean)


def test_the_head_start_has_its_buffers_back():
    torch.manual_seed(0)
    model = Centred()
    bad = {"lr": 0.1, "ramp": 0, "anchor_decay": 0.0, "max_grad_norm": 1.0, "rehearse": 0.0}
    result = fast.finetune(model, TRAIN, VAL, steps=3, **bad)
    assert result.final["step"] == 0
    assert model.mean == 0
    with torch.no_grad():
        now = (model(VAL[0]).argmax(1) == VAL[1]).float().mean().item()
    assert now == pytest.approx(result.target_accuracy)


@pytest.mark.parametrize(
    ("samples", "share", "answers"),
    [
        (20, 0.3, 0.0),
        (500, 0.3, 0.0),
        (750, 0.375, 0.1875),
        (1000, 0.5, 0.5),
        (2000, 1.0, 1.0),
        (10**6, 1.0, 1.0),
        (None, 1.0, 1.0),
    ],
)
@pytest.mark.parametrize("rehearsed", [TARGET_INPUTS, SOURCE_INPUTS])
def test_the_function_is_held_less_hard_where_samples_are_few(samples, share, answers, rehearsed):
    many = plan_for(TrainConfig(), steps=100, rehearsed=rehearsed)
    plan = plan_for(TrainConfig(), steps=100, rehearsed=rehearsed, samples=samples)
    assert many.distill > 0
    assert many.rehearse == 1.0
    assert plan.rehearse == pytest.approx(share * many.rehearse)
    assert plan.distill == pytest.approx(answers * many.distill)
    assert plan.anchor_decay == many.anchor_decay
    given = TrainConfig(rehearse=0.7, distill=0.2)
    plan = plan_for(given, steps=100, rehearsed=rehearsed, samples=samples)
    assert (plan.rehearse, plan.distill) == (0.7, 0.2)


def test_the_weight_of_a_run_is_that_of_its_number_of_samples():
    assert fast.Adaptation(ConvNet(), TRAIN).plan.rehearse == LEAST_REHEARSE
    many = images(800, 4, seed=1)
    assert fast.Adaptation(ConvNet(), many, head_steps=0).plan.rehearse == pytest.approx(0.4)


def test_a_network_with_layer_norms_has_a_lower_rate():
    def rate(norm, **options):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), norm, nn.Linear(16, 4))
        return fast.Adaptation(model, images(40, 4, seed=1), steps=SETTLED, **options).plan.lr

    assert rate(nn.LayerNorm(16)) == LAYER_NORM_LR < rate(nn.Identity()) == REHEARSING_LR
    assert rate(nn.LayerNorm(16), lr=1e-3) == 1e-3
    assert rate(nn.LayerNorm(16), method="vanilla") == rate(nn.Identity(), method="vanilla")


def test_sgd_has_a_rate_and_a_clip_of_its_own():
    plan = plan_for(TrainConfig(optimizer="sgd"), steps=SETTLED, rehearsed=TARGET_INPUTS)
    assert plan.lr == pytest.approx(SGD_FACTOR * REHEARSING_LR)
    assert plan.max_grad_norm == SGD_CLIP
    chosen = plan_for(TrainConfig(optimizer="sgd", lr=0.1, max_grad_norm=5.0), steps=SETTLED)
    assert (chosen.lr, chosen.max_grad_norm) == (0.1, 5.0)
    assert plan_for(TrainConfig(), steps=SETTLED).max_grad_norm is None
    assert plan_for(TrainConfig(optimizer="sgd", method="vanilla"), steps=9).max_grad_norm is None
