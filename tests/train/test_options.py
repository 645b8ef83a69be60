"""The options: each is written down for the run and for type checkers."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch

import fast
from fast.adapt.config import AdaptConfig, AdaptOptions
from fast.adapt.methods import METHODS, MethodName
from fast.train.config import TrainConfig, TrainOptions
from fast.train.finetune import plan
from networks import ConvNet, TextNet, images, sentences


@pytest.mark.parametrize(
    ("record", "keywords"), [(AdaptConfig, AdaptOptions), (TrainConfig, TrainOptions)]
)
def test_a_type_checker_knows_every_option(record, keywords):
    hints = typing.get_type_hints(keywords, localns={"torch": torch})
    fields = {f.name: f for f in dataclasses.fields(record)}
    # `fast.Adaptation` has an argument of that name, which may be a function too.
    assert set(fields) - set(hints) <= {"optimizer"}
    assert set(hints) <= set(fields)
    for name, hint in hints.items():
        members = set(typing.get_args(hint)) or {hint}
        if fields[name].metadata["choices"]:
            literal = next((m for m in members if typing.get_args(m)), hint)
            assert typing.get_args(literal) == fields[name].metadata["choices"], name
        optional = fields[name].default is None
        assert (type(None) in members) == optional, name


def test_methods_have_the_names_that_are_promised():
    assert typing.get_args(MethodName) == tuple(METHODS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": 2}, "save_every=2 is not used: nothing is saved without output="),
        ({"num_workers": 1}, "num_workers=1 is not used: it is for a Dataset"),
        ({"source_skill": "features"}, "source_skill='features' is not used: .* source_inputs"),
        ({"rehearse": 1.0, "batch_size": 1}, "rehearse=1 is not used: there are no source_inputs"),
        ({"batch_norm": "track"}, "batch_norm='track' is not used: the network has no batch norm"),
    ],
)
def test_an_option_that_nothing_uses_is_named(options, message):
    with pytest.warns(UserWarning, match=message):
        plan(TextNet(), sentences(20, 4), steps=2, **options)


def test_one_process_does_not_shard():
    with pytest.warns(UserWarning, match="shard=True is not used: there is one process"):
        fast.Adaptation(ConvNet(), images(20, 4), steps=2, shard=True)


def test_batch_norms_that_are_not_there_change_nothing_else():
    """The answers to target inputs are distilled only where batch norms are not kept per task."""
    train = sentences(20, 4)
    with pytest.warns(UserWarning, match="batch_norm='per_task' is not used"):
        settled = plan(TextNet(), train, steps=2, batch_norm="per_task")
    assert settled == plan(TextNet(), train, steps=2)
    options = {"method": "fast", "batch_norm": "per_task", "tasks": "switched"}
    with (
        pytest.warns(UserWarning, match="batch_norm='per_task' is not used"),
        pytest.raises(ValueError, match=r"tasks='switched' .* the network has no batch norm"),
    ):
        plan(TextNet(), train, steps=2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "replay"}, "'replay' trains on source inputs: pass source_inputs="),
        ({"forget_budget": 0.1}, "forget_budget needs source_inputs to check on"),
        (
            {"forget_budget": 0.1, "source_inputs": images(40, 5)[0], "anchor_decay": 0.0},
            "forget_budget needs a pull .* set anchor_decay above 0",
        ),
    ],
)
def test_a_plan_refuses_what_its_run_would(options, message):
    for start in (plan, fast.finetune):
        with pytest.raises(ValueError, match=message):
            start(ConvNet(), images(20, 4), steps=2, **options)
