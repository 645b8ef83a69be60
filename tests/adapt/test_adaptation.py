"""`fast.Adaptation` in loops of one's own: what `fast.finetune` does, to the bit; and more."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from fast.merge.joined import Joined
from networks import TextNet, images, sentences

TRAIN, VAL = images(200, 4, seed=1), images(100, 4, seed=2)
SOURCE = images(120, 5, seed=3)
STEPS, BATCH = 12, 32
RUNS = {
    "fast": {},
    "fast, source inputs": {"source_inputs": SOURCE},
    "fast, frozen norms": {"source_inputs": SOURCE[0], "batch_norm": "frozen"},
    "fast, distillation": {"distill": 0.2, "rehearse": 0.0},
    "fast, budget": {"source_inputs": SOURCE, "forget_budget": 0.01},
    "fast, sgd": {"optimizer": "sgd", "lr": 0.02, "max_grad_norm": 1.0},
    "vanilla": {"method": "vanilla"},
    "lp-ft": {"method": "lp-ft", "warmup": 3, "weight_decay": 0.1},
    "l2-sp": {"method": "l2-sp", "source_inputs": SOURCE, "forget_budget": "5%"},
    "ewc": {"method": "ewc", "schedule": "constant"},
    "replay": {"method": "replay", "source_inputs": SOURCE, "batch_norm": "per_task"},
    "fast, two functions": {"method": "fast", "tasks": "switched", "rehearse": 0.0},
    "adapter": {"method": "adapter"},
}


# Options that `fast.finetune` does not take.
LOOPS = RUNS | {
    "fast, own optimizer": {
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
        "source_inputs": SOURCE,
        "forget_budget": 0.01,
    }
}


def network(pretrained):
    """One whose dropout draws random numbers in every step."""
    torch.manual_seed(1)
    return nn.Sequential(copy.deepcopy(pretrained), nn.Dropout(0.2), nn.ReLU(), nn.Linear(5, 5))


def loop(model, train=TRAIN, loss=F.cross_entropy, **options):
    """The whole method in a plain loop."""
    torch.manual_seed(0)
    adaptation = fast.Adaptation(model, train, steps=STEPS, batch_size=BATCH, **options)
    optimizer, scheduler = adaptation.optimizer, adaptation.scheduler()
    model.train()
    for inputs, labels, rows in adaptation.batches():
        logits, penalty = adaptation.forward(inputs, rows)
        (loss(logits, labels) + penalty).backward()
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
    return adaptation.finish()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", RUNS)
def test_a_plain_loop_gives_the_weights_of_finetune(pretrained, name):
    mine, theirs = network(pretrained), network(pretrained)
    result = loop(mine, **RUNS[name])
    other = fast.finetune(theirs, TRAIN, steps=STEPS, batch_size=BATCH, **RUNS[name])
    assert same(mine, theirs)
    assert not same(mine, network(pretrained))
    assert result.plan == other.plan
    assert result.final["forecast"] == other.final["forecast"]
    assert result.final["drift"] == other.final["drift"]


def test_a_text_network_and_its_inputs_by_name():
    torch.manual_seed(0)
    mine = TextNet()
    theirs = copy.deepcopy(mine)
    train, source = sentences(100, 4, 1), sentences(40, 5, 3)[0]
    loop(mine, train, source_inputs=source)
    fast.finetune(theirs, train, steps=STEPS, batch_size=BATCH, source_inputs=source)
    assert same(mine, theirs)


@pytest.mark.parametrize(
    "name",
    [
        "fast",
        "fast, distillation",
        "fast, budget",
        "fast, own optimizer",
        "lp-ft",
        "replay",
        "adapter",
    ],
)
def test_a_state_goes_on_to_the_bit(pretrained, name):
    """Through `torch.save`, which then loads tensors and plain values only."""
    whole = network(pretrained)
    loop(whole, **LOOPS[name])

    def begin():
        model = network(pretrained)
        torch.manual_seed(0)
        adaptation = fast.Adaptation(model, TRAIN, steps=STEPS, batch_size=BATCH, **LOOPS[name])
        return model, adaptation, adaptation.scheduler()

    def take(adaptation, scheduler, steps):
        adaptation.model.train()
        for (inputs, labels, rows), _ in zip(adaptation.batches(), range(steps), strict=False):
            logits, penalty = adaptation.forward(inputs, rows)
            (F.cross_entropy(logits, labels) + penalty).backward()
            adaptation.optimizer.step(), scheduler.step(), adaptation.optimizer.zero_grad()

    model, adaptation, scheduler = begin()
    take(adaptation, scheduler, 7)
    file = io.BytesIO()
    parts = (model, adaptation.optimizer, scheduler, adaptation)
    torch.save([part.state_dict() for part in parts] + [torch.get_rng_state()], file)
    file.seek(0)

    model, adaptation, scheduler = begin()
    *states, generator = torch.load(file, weights_only=True)
    for part, state in zip(
        (model, adaptation.optimizer, scheduler, adaptation), states, strict=True
    ):
        part.load_state_dict(state)
    torch.set_rng_state(generator)
    assert adaptation.done == 7
    take(adaptation, scheduler, STEPS)
    adaptation.finish()
    assert same(model, whole)


def test_adapters_go_on_from_where_they_started(pretrained):
    """A process that resumes draws other adapters; drift is the distance from the first."""
    pytest.importorskip("peft", reason="adapters need PEFT")
    states, drift = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = copy.deepcopy(pretrained)
        options = {"method": "adapter", "steps": STEPS, "batch_size": BATCH, "batch_norm": "frozen"}
        adaptation = fast.Adaptation(model, TRAIN, **options)
        parts = (model, adaptation.optimizer, adaptation)
        if states:
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        else:
            inputs, labels, rows = next(adaptation.batches())
            F.cross_entropy(adaptation.forward(inputs, rows)[0], labels).backward()
            adaptation.optimizer.step()
            states = [copy.deepcopy(part.state_dict()) for part in parts]
        drift.append(adaptation.drift())
    assert drift[0] == drift[1] > 0


def test_the_schedule_follows_the_steps_that_were_taken(pretrained):
    """Accelerate steps a scheduler once for each process."""
    model = copy.deepcopy(pretrained)
    adaptation = fast.Adaptation(model, TRAIN, steps=STEPS, batch_size=BATCH)
    scheduler = adaptation.scheduler()
    for inputs, labels, rows in adaptation.batches():
        logits, penalty = adaptation.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        adaptation.optimizer.step(), scheduler.step(), scheduler.step()
        group = adaptation.optimizer.param_groups[0]
        assert group["lr"] == group["initial_lr"] * adaptation.plan.lr_factor(adaptation.done)
    assert adaptation.done == STEPS


def test_an_optimizer_has_to_take_the_groups(pretrained):
    def flat(groups):
        return torch.optim.Adam([p for group in groups for p in group["params"]])

    with pytest.raises(ValueError, match="has dropped the parameter groups that it was given"):
        fast.Adaptation(copy.deepcopy(pretrained), TRAIN, steps=2, optimizer=flat)


def test_a_state_of_another_adaptation_changes_nothing(pretrained):
    state = fast.Adaptation(network(pretrained), TRAIN, steps=STEPS).state_dict()
    other = fast.Adaptation(network(pretrained), TRAIN, steps=STEPS, average=0)
    before = other.state_dict()
    with pytest.raises(
        ValueError, match=r"state is of another run: average was the default, is 0$"
    ):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state has format 1, and this version reads 3"):
        other.load_state_dict(before | {"format": 1})
    assert other.state_dict() == before


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (TRAIN, {"steps": 7}, "steps was 6, is 7$"),
        (TRAIN, {"batch_size": 8, "seed": 1}, "batch_size was 16, is 8, seed was 0, is 1$"),
        ((TRAIN[0], TRAIN[1].flip(0)), {}, r"training data \(hash\) was '\w+', is '\w+'$"),
        (TRAIN, {"source_inputs": SOURCE[0]}, r"source inputs \(hash\) was 'none', is '"),
    ],
)
def test_a_state_of_a_run_on_other_data_or_with_other_options_is_refused(
    pretrained, train, options, message
):
    plain = {"steps": 6, "batch_size": 16}
    state = fast.Adaptation(copy.deepcopy(pretrained), TRAIN, **plain).state_dict()
    other = fast.Adaptation(copy.deepcopy(pretrained), train, **(plain | options))
    with pytest.raises(ValueError, match=f"state is of another run: .*{message}"):
        other.load_state_dict(state)


@pytest.mark.parametrize(("method", "rtol"), [("fast", 1e-6), ("replay", 1e-4)])
def test_accumulated_gradients_are_those_of_the_whole_batch(pretrained, method, rtol):
    """Replay's loss, which is float32, was a quarter with four micro-batches."""
    weights = []
    for parts in (1, 4):
        torch.manual_seed(0)  # a plain head starts at random
        model = copy.deepcopy(pretrained).double()
        x, y = TRAIN[0].double(), TRAIN[1]
        adaptation = fast.Adaptation(
            model,
            (x, y),
            method=method,
            source_inputs=SOURCE[0].double(),
            steps=6,
            batch_size=32,
            batch_norm="frozen",
            grad_accum_steps=parts,
        )
        model.train()
        for inputs, labels, rows in adaptation.batches():
            for part in torch.arange(len(labels)).chunk(parts):
                logits, penalty = adaptation.forward(inputs[part], rows[part])
                ((F.cross_entropy(logits, labels[part]) + penalty) / parts).backward()
            adaptation.optimizer.step()
            adaptation.optimizer.zero_grad()
        assert adaptation.done == 6
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.allclose(*weights, rtol=rtol, atol=1e-3 * rtol)


def test_a_foreign_scheduler_owns_the_learning_rate(pretrained):
    """OneCycle sets lr; the restraint of rehearsal multiplies it in the step, and leaves it."""
    model = copy.deepcopy(pretrained)
    adaptation = fast.Adaptation(
        model, TRAIN, source_inputs=SOURCE[0], steps=40, lr=0.1, rehearse=0.5, ramp=0, head_decay=0
    )
    optimizer = adaptation.optimizer
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=41)
    model.train()
    restraints = []
    for inputs, labels, rows in adaptation.batches():
        logits, penalty = adaptation.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == rate
        restraints.append(adaptation.last_lr / rate)
        scheduler.step()
        optimizer.zero_grad()
    assert restraints[0] == 1
    assert 0.05 < min(restraints) < 0.9


def test_under_a_gradient_scaler_it_is_the_same_run(pretrained):
    plain = copy.deepcopy(pretrained)
    loop(plain, source_inputs=SOURCE[0])
    scaled = copy.deepcopy(pretrained)
    torch.manual_seed(0)
    adaptation = fast.Adaptation(
        scaled, TRAIN, steps=STEPS, batch_size=BATCH, source_inputs=SOURCE[0]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scheduler = adaptation.scheduler()
    scaled.train()
    for inputs, labels, rows in adaptation.batches():
        logits, penalty = adaptation.forward(inputs, rows)
        scaler.scale(F.cross_entropy(logits, labels) + penalty).backward()
        scaler.step(adaptation.optimizer)
        scaler.update()
        scheduler.step()
        adaptation.optimizer.zero_grad()
    adaptation.finish()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def lion(groups):
    optim = pytest.importorskip("timm.optim", reason="a third party's optimizer")
    return optim.Lion(groups, lr=1e-3)


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9), "sgd"),
        (lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0), "adamw"),
        (lion, None),
    ],
    ids=["torch SGD", "torch AdamW", "timm Lion"],
)
def test_any_optimizer(pretrained, make, fused):
    """The pull beside a foreign step is that inside the fused one."""
    source = SOURCE[0].double()
    train = TRAIN[0].double(), TRAIN[1]
    model = copy.deepcopy(pretrained).double()
    options = {"source_inputs": source, "forget_budget": 0.02}
    result = loop(model, train, optimizer=make, **options)
    assert result.final["drift"] > 0
    assert result.final["forecast"] <= 0.02
    if fused is not None:
        other = copy.deepcopy(pretrained).double()
        fused = {"optimizer": fused, "lr": result.plan.lr, "head_decay": 0.0}
        expected = loop(other, train, **fused, **options)
        assert result.final["drift"] == pytest.approx(expected.final["drift"], rel=1e-6)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def one_group_a_weight(groups):
    return torch.optim.AdamW([{**g, "params": [p]} for g in groups for p in g["params"]], lr=1e-3)


def test_an_optimizer_may_divide_the_groups_of_a_card(pretrained):
    drifts = []
    for make in (lambda groups: torch.optim.AdamW(groups, lr=1e-3), one_group_a_weight):
        model = copy.deepcopy(pretrained).double()
        train = TRAIN[0].double(), TRAIN[1]
        drifts.append(loop(model, train, method="ewc", optimizer=make).final["drift"])
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", one_group_a_weight], ids=["fused", "foreign"])
def test_a_card_weights_no_head_that_is_kept(pretrained, optimizer):
    model = copy.deepcopy(pretrained)
    adaptation = fast.Adaptation(
        model, SOURCE, head="keep", method="ewc", optimizer=optimizer, steps=2
    )
    weighted = adaptation._optimizer
    known = weighted.unfused.curvature if weighted.unfused else weighted.optimizer.state
    curved = {p for p in known if weighted.unfused or "curvature" in known[p]}
    assert curved == set(model.parameters()) - set(model.decide.parameters())


@pytest.mark.parametrize(("method", "weighted"), [("fast", True), ("l2-sp", False)])
def test_a_card_weights_the_pull_of_methods_that_have_a_weighted_one(pretrained, method, weighted):
    card = fast.SourceCard.estimate(
        pretrained, SOURCE[0], num_samples=16, calibration_samples=4, coherence=False
    )
    options = {"method": method, "card": card, "steps": 2, "rehearse": 0.0}
    adaptation = fast.Adaptation(copy.deepcopy(pretrained), TRAIN, **options)
    states = adaptation.optimizer.state.values()
    assert any("curvature" in state or "curvature_codes" in state for state in states) == weighted


def test_an_optimizer_at_a_rate_of_0_moves_nothing(pretrained):
    model = copy.deepcopy(pretrained)
    options = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0), "batch_norm": "frozen"}
    result = loop(model, source_inputs=SOURCE[0], **options)
    assert result.final["drift"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_trained_in_float32(pretrained, dtype):
    model = copy.deepcopy(pretrained).to(dtype)
    wide = copy.deepcopy(model).float()
    train, kept = (TRAIN[0].to(dtype), TRAIN[1]), SOURCE[0].to(dtype)
    with pytest.raises(TypeError, match="optimizer"), pytest.warns(match="too coarse"):
        fast.Adaptation(model, train, source_inputs=kept, steps=STEPS, optimizer=lambda _: None)
    assert all(p.dtype == dtype for p in model.parameters())
    assert not model._forward_pre_hooks
    card = fast.SourceCard.estimate(model, kept, num_samples=16, calibration_samples=4)
    with pytest.warns(UserWarning, match="weights, too coarse for the steps"):
        fast.Adaptation(copy.deepcopy(model), train, card=card, steps=STEPS)
    with pytest.warns(UserWarning, match="weights, too coarse for the steps"):
        loop(model, train, source_inputs=kept)
    loop(wide, (train[0].float(), TRAIN[1]), source_inputs=kept.float())
    assert same(model, wide)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (1, "a joined network of 1 forward pass .*give joined.network"),
        (2, "a joined network of 2 forward passes .*only one that takes one pass learns another"),
    ],
)
def test_a_joined_network_is_refused_with_the_way_out(pretrained, passes, message):
    networks = [copy.deepcopy(pretrained) for _ in range(passes)]
    joined = Joined(networks, "abcdefghij"[: 5 * passes], 5, "decide")
    with pytest.raises(ValueError, match=message):
        fast.Adaptation(joined, TRAIN, steps=2)


def test_a_network_is_wrapped_after_the_adaptation(pretrained, tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(pretrained))
        with pytest.raises(ValueError, match=r"wrap it after fast\.Adaptation, and pass it to for"):
            fast.Adaptation(model, TRAIN, steps=2)
        assert fast.Adaptation(model, SOURCE, head="keep", steps=2).model is model.module
    finally:
        torch.distributed.destroy_process_group()


def test_an_optimizer_that_is_none_is_refused(pretrained):
    model = copy.deepcopy(pretrained)
    with pytest.raises(TypeError, match="optimizer must be 'adamw', 'sgd' or a function"):
        fast.Adaptation(model, TRAIN, steps=2, optimizer=lambda groups: None)
    assert same(model, pretrained)
    with pytest.raises(ValueError, match="optimizer must be one of adamw, sgd"):
        fast.Adaptation(model, TRAIN, steps=2, optimizer="adam")
    with pytest.raises(ValueError, match=r"max_grad_norm clips inside the fused .*clip_grad_norm_"):
        fast.Adaptation(model, TRAIN, steps=2, optimizer=torch.optim.SGD, max_grad_norm=1.0)


@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_a_head_that_decays_keeps_the_statistics_of_its_features(pretrained, decay):
    """Tracked ones took back the growth of features that the decay had asked for."""
    model = network(pretrained)
    adaptation = fast.Adaptation(model, TRAIN, steps=4, head_decay=decay, average=0)
    groups = {g["name"].split(".")[0]: g["weight_decay"] for g in adaptation.optimizer.param_groups}
    assert (groups["head"], groups["backbone"]) == (decay, 0.0)
    norm = fast.heads.task_head(model).norm
    before = norm.var.clone()
    for inputs, labels, rows in adaptation.batches():
        logits, penalty = adaptation.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        adaptation.optimizer.step()
    assert torch.equal(norm.var, before) == (decay > 0)
    adaptation.finish()
    model.train()(TRAIN[0][:8])
    assert not torch.equal(norm.var, before)  # whoever goes on training tracks them


def test_decay_moves_a_head_whose_loss_asks_for_nothing(pretrained):
    model = network(pretrained)
    options = {"head_decay": 4.0, "ramp": 0, "rehearse": 0.0, "distill": 0.0}
    adaptation = fast.Adaptation(model, TRAIN, steps=2, **options)
    weight = fast.heads.task_head(model).linear.weight
    before = weight.detach().clone()
    for group in adaptation.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    adaptation.optimizer.step()
    rate = adaptation.plan.lr * adaptation.plan.head_lr_scale
    assert torch.allclose(weight, before * (1 - 4.0 * rate))


def test_an_optimizer_of_the_users_own_decays_as_it_likes(pretrained):
    model = network(pretrained)
    adaptation = fast.Adaptation(model, TRAIN, steps=2, method="adapter", optimizer=lion)
    assert adaptation.plan.head_decay == 0
    with pytest.raises(ValueError, match=r"head_decay is for .*name begins with"):
        fast.Adaptation(network(pretrained), TRAIN, steps=2, optimizer=lion, head_decay=1.0)


def test_without_rows_a_frozen_copy_remembers(pretrained):
    """Before anything has moved, staying what it was costs nothing."""
    model = copy.deepcopy(pretrained)
    options = {"distill": 10.0, "rehearse": 0.0, "batch_norm": "frozen"}
    adaptation = fast.Adaptation(model, TRAIN, steps=4, **options)
    _, with_rows = adaptation.forward(TRAIN[0][:8], torch.arange(8))
    assert with_rows.item() == pytest.approx(0, abs=1e-5)
    assert with_rows.requires_grad
    # Rows of other inputs than these hold nothing that could be compared with.
    _, mixed = adaptation.forward(TRAIN[0][:8] + 1.0, torch.arange(8))
    assert mixed.item() == pytest.approx(0, abs=1e-5)
    _, without = adaptation.forward(TRAIN[0][:8])
    assert without.item() == pytest.approx(0, abs=1e-5)


def test_averaged_weights_are_in_place_for_a_while(pretrained):
    model = copy.deepcopy(pretrained)
    adaptation = fast.Adaptation(model, TRAIN, steps=20, lr=1e-2, average=4)
    model.train()
    for inputs, labels, rows in list(adaptation.batches())[:9]:
        logits, penalty = adaptation.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        adaptation.optimizer.step()
        adaptation.optimizer.zero_grad()
    now = copy.deepcopy(model)
    with adaptation.averaged():
        assert not same(model, now)
        average = copy.deepcopy(model)
    assert same(model, now)
    adaptation.finish()
    assert same(model, average)


@pytest.mark.parametrize(("batch_size", "size"), [(1, 2), (2, 2), (5, 5)])
def test_a_sample_has_more_than_one_input(pretrained, batch_size, size):
    options = {"batch_size": batch_size, "rehearse": 0.0, "steps": 2}
    assert len(fast.Adaptation(copy.deepcopy(pretrained), TRAIN, **options).sample) == size


@pytest.mark.parametrize("name", ["fast", "fast, distillation", "replay"])
def test_no_hook_is_left_on_the_network(pretrained, name):
    model = network(pretrained)
    adaptation = fast.Adaptation(model, TRAIN, steps=STEPS, **RUNS[name])
    (adaptation.close if name == "replay" else adaptation.finish)()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_constructor_that_fails_leaves_the_model(pretrained):
    model = copy.deepcopy(pretrained)
    for options, message in [
        ({"source_inputs": torch.zeros(9, 7)}, "source_inputs: the network does not take"),
        ({"forget_budget": 0.1}, "forget_budget needs source_inputs"),
        ({"method": "replay"}, "pass source_inputs="),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"num_classes": 3}, "labels must be 0..2; got 0..3"),
        ({"augmented": "no"}, "augmented must be True or False; got 'no'"),
        ({"resuming": 1}, "resuming must be True or False; got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            fast.Adaptation(model, TRAIN, steps=2, **options)
        assert same(model, pretrained)
        assert not model.training
    with pytest.raises(TypeError, match="unknown options: stepz; did you mean steps"):
        fast.Adaptation(model, TRAIN, stepz=2)
