"""A state that is loaded has the form of the one that it replaces."""

from __future__ import annotations

import pytest
import torch

from fast.adapt.state import check_state, differences, joined_state, split_state
from fast.train.config import TrainConfig

OWN = {
    "format": 3,
    "run": {"lr": 0.1, "steps": 5},
    "done": 2,
    "guards": {"Pace": {"pace": None}, "values": {"0": torch.zeros(2)}},
}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "state is of another adaptation: all on one side only"),
        ({**OWN, "more": 1}, "state is of another adaptation: more on one side only"),
        ({**OWN, "guards": {}}, "state.guards is of another adaptation: Pace, values on one side"),
        ({**OWN, "run": {"lr": None, "steps": 5}}, "another run: lr was the default, is 0.1$"),
        ({**OWN, "done": {}}, "state.done is a dict, and must be a plain value"),
        ({**OWN, "done": torch.tensor(2)}, "state.done is a Tensor, and must be a plain value"),
    ],
)
def test_what_has_another_form_is_named(state, message):
    with pytest.raises(ValueError, match=message):
        check_state(state, OWN)


@pytest.mark.parametrize(
    ("value", "given"),
    [
        (torch.zeros(3), r"\(\[3\], torch.float32\)"),
        (torch.zeros(2, dtype=torch.float64), r"\(\[2\], torch.float64\)"),
        (0.0, "0.0"),
    ],
)
def test_a_tensor_has_its_shape_and_dtype(value, given):
    state = {**OWN, "guards": {**OWN["guards"], "values": {"0": value}}}
    with pytest.raises(
        ValueError, match=rf"values\.0 is {given}, and must be \(\[2\], torch.float32"
    ):
        check_state(state, OWN)


def test_plain_values_may_differ():
    check_state({**OWN, "done": 7, "guards": {**OWN["guards"], "Pace": {"pace": 0.5}}}, OWN)


def test_runs_differ_in_what_the_first_had():
    assert differences({"lr": 0.1, "seed": 1, "head": None}, {"lr": 0.1, "seed": 2, "more": 3}) == (
        "seed was 1, is 2"
    )


def test_a_hash_is_named_where_nothing_else_differs():
    """Another batch size makes other batches of a loader, and the user looked at the data."""
    before = {"batch_size": 8, "training data (hash)": "a"}
    now = {"batch_size": 8, "training data (hash)": "b"}
    assert differences(before, now) == "training data (hash) was 'a', is 'b'"
    assert differences(before, now | {"batch_size": 16}) == "batch_size was 8, is 16"


def test_tensors_are_taken_out_of_a_state_and_put_back():
    tensors = {"state.mean": torch.ones(2), "state.guards.0": torch.zeros(3)}
    state = {"mean": tensors["state.mean"], "done": 2, "guards": {"0": tensors["state.guards.0"]}}
    plain, taken = split_state(state, "state")
    assert plain == {"done": 2, "guards": {}}
    assert taken == tensors
    assert joined_state(plain, taken, state, "state") == state
    with pytest.raises(KeyError):
        joined_state(plain, {}, state, "state")


def test_where_a_run_computes_is_no_part_of_what_it_computes():
    here, there = (
        TrainConfig(lr=0.1),
        TrainConfig(lr=0.1, device="cuda", output="there", shard=True),
    )
    assert here.computed() == there.computed()
    assert {"lr", "steps", "seed", "mixup"} < set(here.computed())
    assert not {"device", "output", "shard", "progress"} & set(here.computed())
