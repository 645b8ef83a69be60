"""One softmax over old and new classes: order, merging, cost, calibration, export, bad input."""

from __future__ import annotations

import copy
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from fast.heads import evaluating, task_head
from fast.merge.join_fit import Side, fit
from fast.merge.joined import load_joined, merged
from fast.models.saved.description import classes_beside
from helpers import same_state
from networks import ConvHead, ConvNet, TextNet, images, sentences, taught

OLD = ["cat", "dog", "cow", "owl", "hen"]
NEW = ["oak", "elm", "fir", "yew"]


def target(n, seed=0):
    """Blobs at the same places as the source's, and a bright border, which the source has not."""
    x, y = images(n, 4, seed)
    x[:, :, 0], x[:, :, -1] = 2.0, 2.0
    return x, y


@pytest.fixture(scope="module")
def source_inputs():
    return images(120, 5, seed=8)


@pytest.fixture(scope="module")
def adapted(source_inputs):
    """Results by the policy of batch norm."""
    pretrained = taught(*images(300, 5, seed=3), rounds=20)
    return {
        policy: fast.finetune(
            copy.deepcopy(pretrained),
            target(200),
            source_inputs=source_inputs[0],
            steps=60,
            batch_norm=policy,
            progress=False,
        )
        for policy in ("frozen", "per_task")
    }


@pytest.fixture(params=["frozen", "per_task"])
def result(request, adapted):
    return adapted[request.param]


def joined_of(result, source_inputs, **names):
    return fast.join(result, source_inputs=source_inputs, data=target(100, 5), **names)


def accuracy(model, x, y):
    return (model(x).argmax(1) == y).float().mean().item()


def test_logits_are_the_sources_then_the_targets(result, source_inputs):
    joined = joined_of(result, source_inputs[0], source_classes=OLD, target_classes=NEW)
    (x_old, y_old), (x_new, y_new) = images(200, 5, seed=11), target(200, 12)
    assert joined.classes == (*OLD, *NEW)
    assert joined(x_old).shape == (200, 9)
    with evaluating(result.model):
        oracle = accuracy(result.model, x_new, y_new)
        with fast.source_task(result.model):
            oracle_old = accuracy(result.model, x_old, y_old)
    assert min(oracle, oracle_old) > 0.9
    assert accuracy(joined, x_old, y_old) > oracle_old - 0.05
    assert accuracy(joined, x_new, y_new + 5) > oracle - 0.05


def test_a_result_joins_itself(adapted, source_inputs):
    ours = adapted["frozen"].join(source_inputs=source_inputs, data=target(100, 5))
    x = images(7, 5)[0]
    assert torch.equal(ours(x), joined_of(adapted["frozen"], source_inputs)(x))


def test_within_a_task_the_answers_stay(result, source_inputs):
    joined = joined_of(result, source_inputs)
    x = target(50, 12)[0]
    with evaluating(result.model):
        plain = result.model(x)
        with fast.source_task(result.model):
            source = result.model(x)
    scales = joined.calibration
    for rows, logits, scale in (
        (slice(5), source, scales.source_scale),
        (slice(5, 9), plain, scales.target_scale),
    ):
        ours, theirs = joined(x)[:, rows].log_softmax(1), (scale * logits).log_softmax(1)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_function_takes_one_pass_and_two_functions_two(adapted, source_inputs):
    for policy, passes in (("frozen", 1), ("per_task", 2)):
        joined = joined_of(adapted[policy], source_inputs[0])
        calls = Counter()
        for network in joined.networks:
            network.project.register_forward_hook(lambda *_, calls=calls: calls.update(["pass"]))
        joined(images(3, 5)[0])
        assert calls["pass"] == joined.passes == passes


def test_the_loss_over_all_classes_falls(result, source_inputs):
    for kept in (source_inputs, source_inputs[0]):
        calibration = joined_of(result, kept).calibration
        assert calibration.loss < calibration.loss_before
        assert calibration.mistaken < 0.05
        assert calibration.source_labelled == (kept is source_inputs)
    assert calibration.source_scale == 1


def test_without_labels_the_probabilities_that_the_source_gives_are_right(adapted, source_inputs):
    """Not its most likely classes alone."""
    result, data = adapted["frozen"], target(60)
    before = []
    for x in (source_inputs[0], data[0]):
        with evaluating(result.model), fast.source_task(result.model):
            source = result.model(x)
        with evaluating(result.model):
            before.append((source, torch.cat([source, result.model(x)], 1).log_softmax(1)))
    (answers, old), (_, new) = before
    losses = -(answers.softmax(1) * old[:, :5]).sum(1).mean(), F.nll_loss(new, data[1] + 5)
    joined = result.join(source_inputs=source_inputs[0], data=data)
    assert joined.calibration.loss_before == pytest.approx(float(sum(losses)) / 2, rel=1e-4)


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e-3])
def test_heads_that_are_far_too_sure_or_unsure_are_brought_to_one_scale(scale):
    """The line search must not overflow: beside a head whose logits were 100 it gave NaN."""
    source, spread = torch.randn(300, 10), torch.randn(300, 20)
    rows = torch.arange(300)
    labels = rows % 10, rows % 20
    features = torch.randn(300, 8)
    sides = tuple(
        Side(
            source=scale * (source + 2 * F.one_hot(labels[0], 10) * (i == 0)),
            target=scale * (spread + 2 * F.one_hot(labels[1], 20) * (i == 1)),
            features=features + i,
            answers=F.one_hot(labels[i] + 10 * i, 30).float(),
        )
        for i in (0, 1)
    )
    classes = torch.arange(30)
    own = classes < 10, classes >= 10
    scales, calibration = fit(sides, classes, own, labelled=True)
    assert calibration.loss < min(calibration.loss_before, math.log(30))
    assert all(x.isfinite().all() for x in vars(scales).values())


def test_the_result_stays_as_it_was(result, source_inputs):
    before = copy.deepcopy(result.model.state_dict())
    mode = [m.training for m in result.model.modules()]
    joined_of(result, source_inputs)
    assert same_state(result.model, before)
    assert mode == [m.training for m in result.model.modules()]
    assert task_head(result.model) is not None


def test_two_networks_share_the_weights_of_both_tasks(adapted, source_inputs):
    first, second = joined_of(adapted["per_task"], source_inputs).networks
    assert first.project.weight is second.project.weight
    assert first.features[1].weight is not second.features[1].weight
    assert first.decide.out_features == 5
    assert second.decide.out_features == 4


def test_classes_of_one_name_are_one(result, source_inputs):
    new = ["oak", "cow", "fir", "cat"]
    joined = joined_of(result, source_inputs, source_classes=OLD, target_classes=new)
    apart = joined_of(result, source_inputs, source_classes=OLD, target_classes=NEW)
    assert joined.classes == (*OLD, "oak", "fir")
    assert joined.rows == (*OLD, *new)
    (x_new, y_new), (x_old, y_old) = target(200, 12), images(200, 5, seed=11)
    place = torch.tensor([5, 2, 6, 0])
    assert accuracy(joined, x_new, place[y_new]) >= accuracy(apart, x_new, y_new + 5) - 0.02
    assert accuracy(joined, x_old, y_old) >= accuracy(apart, x_old, y_old) - 0.02


def test_merged_probabilities_add_up():
    logits = torch.randn(6, 5, dtype=torch.float64) * 50
    place = torch.tensor([0, 1, 2, 1, 0])
    p = logits.softmax(1)
    sums = torch.stack([p[:, 0] + p[:, 4], p[:, 1] + p[:, 3], p[:, 2]], 1)
    torch.testing.assert_close(merged(logits, place, 3).softmax(1), sums)


def test_export_and_files_give_the_same_logits(result, source_inputs, tmp_path):
    joined = joined_of(result, source_inputs, source_classes=OLD, target_classes=["cow", *NEW[1:]])
    x = images(7, 5)[0]
    exported = torch.export.export(joined, (x,)).module()
    torch.testing.assert_close(exported(x), joined(x))
    again = load_joined(joined.save(tmp_path / "joined"), ConvNet(3))
    assert torch.equal(again(x), joined(x))
    assert (again.classes, again.rows) == (joined.classes, joined.rows)
    assert again.calibration == joined.calibration
    assert again.save(tmp_path / "again").is_dir()
    assert torch.equal(load_joined(tmp_path / "again", ConvNet(3))(x), joined(x))


def test_one_pass_is_a_plain_network(adapted, source_inputs):
    joined = joined_of(adapted["frozen"], source_inputs)
    plain = ConvNet(9).eval()
    plain.load_state_dict(joined.network.state_dict())
    x = images(7, 5)[0]
    assert torch.equal(plain(x), joined(x))
    assert not any(type(m).__module__.startswith("fast") for m in joined.network.modules())


@pytest.mark.parametrize(
    ("policy", "way"), [("frozen", "give joined.network"), ("per_task", "tasks='together' first")]
)
def test_the_object_itself_learns_no_third_task(adapted, source_inputs, policy, way):
    joined = joined_of(adapted[policy], source_inputs)
    with pytest.raises(ValueError, match=way):
        fast.finetune(joined, images(40, 3), steps=2)


def test_a_third_task_joins_the_other_two(adapted, source_inputs):
    first = joined_of(adapted["frozen"], source_inputs, source_classes=OLD, target_classes=NEW)
    x, y = images(200, 3, seed=21)
    x = x.flip(3) * -1
    (x_old, y_old), (x_new, y_new) = images(150, 5, seed=11), target(150, 12)
    kept = torch.cat([source_inputs[0][:60], target(60, 5)[0]])
    second = fast.finetune(
        copy.deepcopy(first.network), (x[:150], y[:150]), source_inputs=kept, steps=60,
        batch_norm="frozen", progress=False,
    )  # fmt: skip
    joined = fast.join(
        second, source_inputs=kept, data=(x[150:], y[150:]), source_classes=first.rows,
        target_classes=["sun", "moon", "star"],
    )  # fmt: skip
    assert joined.classes == (*OLD, *NEW, "sun", "moon", "star")
    assert joined.passes == 1
    assert accuracy(joined, x[150:], y[150:] + 9) > 0.8
    assert accuracy(joined, x_old, y_old) > 0.8
    assert accuracy(joined, x_new, y_new + 5) > 0.8


@pytest.mark.parametrize("kind", ["conv head", "text"])
def test_other_networks(kind):
    torch.manual_seed(0)
    model = ConvHead() if kind == "conv head" else TextNet()
    kept = images(60, 5)[0] if kind == "conv head" else sentences(60, 5)[0]
    data = images(60, 4, seed=2) if kind == "conv head" else sentences(60, 4, seed=2)
    result = fast.finetune(model, data, source_inputs=kept, steps=5, progress=False)
    joined = fast.join(result, source_inputs=kept, data=data)
    logits = joined(kept) if kind == "conv head" else joined(**kept)
    assert logits.shape == (60, 9)


def test_what_transformers_and_the_result_call_the_classes(adapted, source_inputs):
    result = copy.copy(adapted["frozen"])
    result.classes = NEW
    joined = joined_of(result, source_inputs)
    assert joined.classes == (*(f"class {i}" for i in range(5)), *NEW)
    head = copy.deepcopy(result.model)
    task_head(head).source_labels = {"id2label": dict(enumerate(OLD))}
    assert joined_of(head, source_inputs, target_classes=NEW).classes == (*OLD, *NEW)


def test_a_network_of_transformers_is_told_its_rows(result, source_inputs, tmp_path):
    """The names were lost with `joined.network.save_pretrained`, and for a third task."""
    model = copy.deepcopy(result.model)
    model.config = SimpleNamespace(num_labels=4, id2label=dict(enumerate(NEW)))
    joined = joined_of(model, source_inputs, source_classes=OLD)
    rows = (OLD + NEW,) if joined.passes == 1 else (OLD, NEW)
    assert [[*n.config.id2label.values()] for n in joined.networks] == [*rows]
    assert model.config.id2label == dict(enumerate(NEW))
    joined.save(tmp_path)
    assert classes_beside(tmp_path / "model.safetensors") == rows[-1]  # of two, the target's


def test_bad_input_is_named(adapted, source_inputs):
    result = adapted["frozen"]
    x, y = target(100, 5)

    def join(match, model=result, source_inputs=source_inputs, data=(x, y), **names):
        with pytest.raises(ValueError, match=match):
            fast.join(model, source_inputs=source_inputs, data=data, **names)

    join("one head", fast.fold_head(copy.deepcopy(result.model)))
    join("source_classes: got 4 names.* 5 classes", source_classes=NEW)
    join("target_classes: got 'oak'", target_classes="oak")
    join("'elm'|elm more than once", target_classes=["oak", "elm", "elm", "fir"])
    join("numbers do not say", source_classes=list("01234"), target_classes=list("0123"))
    join("data: has no labels", data=x)
    join("data: labels must be 0..3", data=(x, y + 1))
    join("source_inputs: labels must be 0..4", source_inputs=(x, y + 9))
    join("source_inputs: 4 samples", source_inputs=x[:4])
    join("data: .*not finite|NaN", data=(x * torch.nan, y))
    join("data: the network does not take", data=(x[:, 0, 0], y))
    join("something follows it", _Doubled(result.model))


class _Doubled(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return 2 * self.network(x)


@pytest.mark.parametrize("other", [3, "runs/old", {"model": None}])
def test_what_is_no_network_is_named(other):
    with pytest.raises(TypeError, match=f"result must be .*; got {type(other).__name__}"):
        fast.join(other, source_inputs=None, data=None)


def test_a_damaged_or_other_folder_is_refused(adapted, source_inputs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"join\.json"):
        load_joined(adapted["frozen"].save(tmp_path / "run"), ConvNet())
    folder = joined_of(adapted["per_task"], source_inputs).save(tmp_path / "joined")
    for name in ("join.json", "source_head.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-9])
        with pytest.raises(ValueError, match="damaged"):
            load_joined(folder, ConvNet())
        (folder / name).write_bytes(content)


def test_a_folder_holds_what_was_saved_there_last(adapted, source_inputs, tmp_path):
    """A joined network got the adapters of the one before it, and a result its join.json."""
    pytest.importorskip("peft", reason="adapters are its layers")
    x = source_inputs[0]
    adapter = fast.finetune(ConvNet(), target(60), steps=2, method="adapter", progress=False)
    joined = adapter.join(source_inputs=x, data=target(60))
    for saved in (adapter, joined, adapted["per_task"], joined, adapted["frozen"]):
        saved.save(tmp_path)
        network = saved if saved is joined else saved.model
        with evaluating(network):
            expected = network(x)
        loaded = fast.load(tmp_path, ConvNet())
        assert loaded.is_joined == (saved is joined)
        torch.testing.assert_close(loaded.predict(x).logits, expected, rtol=1e-4, atol=1e-4)
