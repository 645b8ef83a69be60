"""One function or two: which of them a run has, what contradicts it, and adapters in a run."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fast
from fast.adapt.guards.pace import FARTHEST
from fast.adapt.plan import plan_for
from fast.heads import adapters, source_task
from fast.models.saved import load_saved
from fast.train.config import TrainConfig
from fast.train.finetune import plan
from networks import ConvNet, TextNet, images, sentences, taught

TRAIN, VAL, SOURCE = images(200, 4, seed=1), images(100, 4, seed=2), images(200, 5, seed=3)
PAGE = (Path(__file__).parents[2] / "docs" / "regimes.md").read_text()


@pytest.fixture
def adapter():
    pytest.importorskip("peft", reason="peft is not installed")
    norms = {"batch_norm": "per_task"}
    return {"method": "adapter", "lr": 1e-2, "steps": 40, "batch_size": 32} | norms


def answers(model, x=VAL[0]):
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize(
    ("options", "tasks", "batch_norm"),
    [
        ({}, "switched", "per_task"),
        ({"tasks": "together"}, "together", "frozen"),
        ({"tasks": "switched"}, "switched", "frozen"),
        ({"tasks": "switched", "batch_norm": "per_task"}, "switched", "per_task"),
        ({"tasks": "switched", "method": "fast"}, "switched", "per_task"),
        ({"batch_norm": "track"}, "together", "track"),
        ({"method": "vanilla"}, "together", "frozen"),
        ({"method": "vanilla", "tasks": "switched"}, "switched", "per_task"),
        ({"method": "lp-ft", "batch_norm": "per_task"}, "switched", "per_task"),
        ({"method": "adapter"}, "switched", "frozen"),
        ({"method": "adapter", "batch_norm": "per_task"}, "switched", "per_task"),
        ({"head": "keep"}, "together", "frozen"),
    ],
)
def test_the_plan_says_how_many_functions_there_are(options, tasks, batch_norm):
    settled = plan(ConvNet(4), TRAIN, steps=4, **options)
    assert (settled.tasks, settled.batch_norm) == (tasks, batch_norm)
    kept = ["adapters"] * bool(settled.adapter_rank) + ["batch norms"] * (batch_norm == "per_task")
    line = f"two functions: {' and '.join(kept)} are switched" if kept else "one function"
    assert str(settled).endswith(f"; {line}")


def test_switched_tasks_have_adapters_by_default():
    options = ({}, {"tasks": "together"}, {"tasks": "switched"})
    assert [TrainConfig(**o).method for o in options] == ["fast", "fast", "adapter"]
    assert TrainConfig(method="fast", tasks="switched").method == "fast"
    small = plan(TextNet(), sentences(60, 4), steps=4, tasks="switched")
    assert small.method == "adapter"
    assert small.adapter_rank


def test_norms_that_are_not_there_are_not_switched():
    with pytest.warns(UserWarning, match="batch_norm='per_task' is not used"):
        settled = plan(TextNet(), sentences(60, 4), steps=4, batch_norm="per_task")
    assert settled.tasks == "together"
    small = plan(ConvNet(), TRAIN, steps=4, method="adapter", batch_size=4)
    assert (small.tasks, small.batch_norm) == ("switched", "frozen")


@pytest.mark.parametrize(
    ("samples", "batch_norm"), [(100, "frozen"), (1999, "frozen"), (2000, "per_task")]
)
def test_few_samples_have_no_statistics_for_norms_beside_adapters(samples, batch_norm):
    settled = plan_for(TrainConfig(method="adapter"), steps=100, batch_norms=True, samples=samples)
    assert (settled.tasks, settled.batch_norm) == ("switched", batch_norm)


CONTRADICTIONS = [
    ({"tasks": "together", "batch_norm": "per_task"}, "tasks='together' .* batch_norm='per_task'"),
    ({"tasks": "together", "method": "adapter"}, "tasks='together' .* method 'adapter'"),
    (
        {"method": "fast", "tasks": "switched", "batch_norm": "frozen"},
        "tasks='switched' .*'frozen'.*method='adapter'",
    ),
    ({"tasks": "switched", "head": "keep"}, "tasks='switched' .* head='keep'"),
    ({"tasks": "both"}, "tasks must be one of together, switched; got 'both'"),
    ({"adapter_rank": 4}, "adapter_rank is for method 'adapter'; 'fast' has none"),
    ({"method": "adapter", "anchor_decay": 1.0}, "anchor_decay holds the source task"),
    ({"method": "adapter", "distill": 1.0}, "distill holds the source task"),
    ({"method": "adapter", "rehearse": 1.0}, "rehearse holds the source task"),
    ({"method": "adapter", "forget_budget": 0.1}, "forget_budget holds the source task"),
    ({"tasks": "switched", "forget_budget": 0.1}, "leave forget_budget out, or use 'fast'"),
    ({"method": "adapter", "head": "keep"}, "method 'adapter' .* head='keep'"),
    ({"method": "adapter", "batch_norm": "track"}, "batch_norm='track' .* method 'adapter'"),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS)
def test_options_that_contradict_each_other_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("network", "train", "options", "message"),
    [
        (
            TextNet,
            sentences(60, 4),
            {"method": "fast"},
            "the network has no batch norm; method='adapter'",
        ),
        (
            ConvNet,
            TRAIN,
            {"batch_size": 4, "method": "vanilla"},
            "the statistics of a batch are too noisy",
        ),
    ],
)
def test_nothing_to_switch_is_an_error_with_a_way_out(network, train, options, message):
    with pytest.raises(ValueError, match=rf"tasks='switched' .*{message}"):
        plan(network(), train, steps=4, tasks="switched", **options)


def test_a_rule_of_its_own_sets_the_adapters_rate_and_rank():
    settled = plan_for(TrainConfig(method="adapter"), steps=100)
    assert settled.lr > plan_for(TrainConfig(), steps=100).lr
    normed = plan_for(TrainConfig(method="adapter"), steps=100, layer_norms=True)
    assert (normed.lr, normed.adapter_rank, settled.adapter_rank) == (settled.lr, 8, 32)
    given = TrainConfig(method="adapter", adapter_rank=64)
    assert plan_for(given, steps=100, layer_norms=True).adapter_rank == 64
    assert plan_for(TrainConfig(), steps=100).adapter_rank == 0
    assert not any((settled.anchor_decay, settled.distill, settled.rehearse, settled.weighted))


def test_the_source_is_answered_to_the_bit_and_the_target_is_learned(adapter):
    model = taught(*SOURCE, 10)
    before = answers(model, SOURCE[0])
    result = fast.finetune(model, TRAIN, VAL, SOURCE, **adapter)
    assert result.target_accuracy > 0.9
    assert {row["source_accuracy"] for row in result.history} == {result.source_accuracy_before}
    assert {row["forecast"] for row in result.history} == {0.0}
    with source_task(model):
        assert torch.equal(answers(model, SOURCE[0]), before)
    assert not torch.equal(answers(model, SOURCE[0])[:, 0], before[:, 0])


def test_who_has_no_source_inputs_is_told_of_adapters(log):
    for options, said in (
        ({"tasks": "switched", "method": "fast"}, True),
        ({"tasks": "switched"}, False),
        ({}, True),
        ({"tasks": "together"}, False),
        ({"source_inputs": SOURCE[0]}, False),
        ({"tasks": "switched", "method": "vanilla"}, False),
    ):
        log.clear()
        plan(ConvNet(4), TRAIN, steps=4, **options)
        assert ("method='adapter' would forget nothing" in log.text) == said, options


@pytest.mark.parametrize(
    ("bias", "options", "told"),
    [
        (0.0, {}, True),
        (0.1, {}, False),
        (0.0, {"source_skill": "features"}, False),
    ],
)
def test_a_head_that_was_never_trained_is_told(log, bias, options, told):
    net = ConvNet(4)
    nn.init.constant_(net.decide.bias, bias)
    plan(net, TRAIN, source_inputs=SOURCE[0], steps=2, **options)
    assert ("such a head answers by chance" in log.text) == told


def test_source_inputs_and_a_card_only_report(adapter, log):
    start = taught(*SOURCE, 10)
    card = fast.SourceCard.estimate(start, SOURCE[0][:32])
    plain = fast.finetune(copy.deepcopy(start), TRAIN, **adapter).model
    told = fast.finetune(copy.deepcopy(start), TRAIN, source_inputs=SOURCE, card=card, **adapter)
    assert "method 'adapter' changes nothing that the source task uses" in log.text
    assert (told.plan.rehearsed, told.plan.source_size, told.plan.weighted) == ("", 0, False)
    assert told.final["forecast"] == 0.0
    same = zip(plain.parameters(), told.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_what_is_saved_answers_both_tasks_without_adapters(adapter, tmp_path):
    torch.manual_seed(0)
    start = ConvNet().eval()
    before = answers(start, SOURCE[0])
    result = fast.finetune(copy.deepcopy(start), TRAIN, VAL, **adapter)
    result.save(tmp_path)
    saved = load_saved(tmp_path, copy.deepcopy(start), VAL[0][:2])
    assert torch.equal(answers(saved.source, SOURCE[0]), before)
    torch.testing.assert_close(answers(saved.target), answers(result.model), atol=1e-4, rtol=1e-4)
    written = json.loads((tmp_path / "result.json").read_text())
    assert (written["plan"]["tasks"], written["plan"]["adapter_rank"]) == ("switched", 32)
    assert any(note.startswith("two functions: adapters and batch") for note in written["notes"])
    (tmp_path / "adapters.safetensors").unlink()
    partial = load_saved(tmp_path, copy.deepcopy(start), VAL[0][:2])
    assert partial.source is None
    assert "below the adapters, which are not in the folder" in partial.note


def test_merging_leaves_the_target_alone(adapter, tmp_path, log):
    torch.manual_seed(0)
    result = fast.finetune(ConvNet(), TRAIN, VAL, **adapter)
    result.save(tmp_path)
    before = answers(result.model)
    model = result.merge_adapters()
    assert model is result.model
    assert "answers the target task alone" in log.text
    torch.testing.assert_close(answers(model), before, atol=1e-4, rtol=1e-4)
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())
    result.save(tmp_path)
    assert not (tmp_path / "adapters.safetensors").exists()
    with pytest.raises(ValueError, match="the model has no adapters: method='adapter' makes them"):
        result.merge_adapters()


def refuse(*_):
    raise OSError("no")


@pytest.mark.parametrize("wrong", [{"transform": refuse}, {"source": refuse}])
def test_a_run_that_fails_leaves_the_model_as_it_was(adapter, wrong):
    model = ConvNet()
    model.features[0].bias.requires_grad_(False)
    before = [(n, type(m), m.training) for n, m in model.named_modules()]
    learns = [(id(p), p.requires_grad) for p in model.parameters()]
    with pytest.raises((OSError, ValueError, RuntimeError)):
        fast.finetune(model, TRAIN, **adapter, **wrong)
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == before
    assert [(id(p), p.requires_grad) for p in model.parameters()] == learns
    assert not hasattr(model, "peft_config")


def test_without_peft_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = ConvNet()
    with pytest.raises(ImportError, match=r"pip install 'fast-task-adaptation\[adapter\]'"):
        fast.finetune(model, TRAIN, method="adapter", steps=2)
    assert type(model.decide) is nn.Linear


def test_the_head_start_has_its_adapters_back(adapter, monkeypatch):
    monkeypatch.setitem(FARTHEST, "adapters", float("inf"))
    torch.manual_seed(0)
    model = ConvNet()
    bad = adapter | {"lr": 0.3, "ramp": 0, "steps": 6, "max_grad_norm": 1.0}
    result = fast.finetune(model, TRAIN, VAL, eval_every=2, **bad)
    assert result.final["step"] == 0
    now = (answers(model).argmax(1) == VAL[1]).float().mean().item()
    assert now == pytest.approx(result.target_accuracy)


def test_the_code_of_the_page(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {
        "model": taught(*SOURCE, 5),
        "x": TRAIN[0],
        "y": TRAIN[1],
        "val": VAL,
        "source": SOURCE,
        "x_old": SOURCE[0],
        "steps": 4,
    }
    exec(code, names)
    assert (tmp_path / "adapted" / "adapters.safetensors").is_file()
    assert not adapters(names["model"])
