"""The options: each is written down for the run and for type checkers."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch

from fast.adapt.config import AdaptConfig, AdaptOptions
from fast.adapt.methods import METHODS, MethodName
from fast.train.config import TrainConfig, TrainOptions


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
