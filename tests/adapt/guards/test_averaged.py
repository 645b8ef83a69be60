"""The block of the averaged weights: nested, saved in, stepped in; and what `finish` then does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import fast
from networks import ConvNet, images

TRAIN, KEPT = images(200, 4, seed=1), images(120, 5, seed=3)[0]


def adapted(steps=7, **options):
    """A run of 12 steps, of which some are done."""
    torch.manual_seed(1)
    model = ConvNet()
    adaptation = fast.Adaptation(
        model, TRAIN, source_inputs=KEPT, steps=12, batch_size=32, **options
    )
    model.train()
    train(adaptation, steps)
    return model, adaptation


def train(adaptation, steps):
    for (inputs, labels, rows), _ in zip(adaptation.batches(), range(steps), strict=False):
        logits, penalty = adaptation.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        adaptation.optimizer.step(), adaptation.optimizer.zero_grad()


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_block_inside_of_a_block_is_the_same():
    """The inner one put the last step's weights back, so that a helper measured these."""
    model, adaptation = adapted()
    now = vector(model)
    with adaptation.averaged():
        average = vector(model)
        with adaptation.averaged():
            assert torch.equal(vector(model), average)
        assert torch.equal(vector(model), average)
    assert torch.equal(vector(model), now)
    assert not torch.equal(average, now)


def test_states_and_steps_belong_outside():
    """A checkpoint of the block held the average as the weights, and these as the average."""
    model, adaptation = adapted()
    state, now = adaptation.state_dict(), vector(model)
    for what, act in {
        "a state": adaptation.state_dict,
        r"finish\(\)": adaptation.finish,
        "a step": lambda: train(adaptation, 1),
    }.items():
        with (
            pytest.raises(RuntimeError, match=f"^{what} inside of averaged"),
            adaptation.averaged(),
        ):
            act()
    with pytest.raises(RuntimeError, match="a state inside"), adaptation.averaged():
        adaptation.load_state_dict(state)
    assert torch.equal(vector(model), now)
    assert adaptation.done == 7


@pytest.mark.parametrize("theirs_first", [True, False])
def test_an_average_of_ones_own_in_the_same_evaluation_is_announced(theirs_first):
    """Two averages that are put into place together exchanged weights, and said nothing."""
    model, adaptation = adapted()
    other = {name: value + 1 for name, value in model.state_dict().items()}

    def evaluate():
        if theirs_first:
            back = copy.deepcopy(model.state_dict())
            model.load_state_dict(other)
        with adaptation.averaged():
            if not theirs_first:
                back = copy.deepcopy(model.state_dict())
                model.load_state_dict(other)
            model.load_state_dict(back)

    with pytest.warns(UserWarning, match=r"written to inside of averaged\(\)"):
        evaluate()


@pytest.mark.parametrize("looks", [1, 2])
def test_a_look_at_the_average_is_no_loading(looks):
    """A loop that stops early after an evaluation gets the average, without a warning."""
    model, adaptation = adapted(4)
    for _ in range(looks):
        with adaptation.averaged():
            average = vector(model)
    adaptation.finish()
    assert torch.equal(vector(model), average)


def test_weights_that_are_loaded_after_the_last_step_stay():
    """A loop that stops early, loads its best weights and finishes got the average instead."""
    model, adaptation = adapted(4)
    with adaptation.averaged():
        best, average = copy.deepcopy(model.state_dict()), vector(model)
    train(adaptation, 4)
    model.load_state_dict(best)
    with adaptation.averaged():
        assert not torch.equal(vector(model), average)
    with pytest.warns(UserWarning, match=r"finish\(\) keeps them, and not the average"):
        adaptation.finish()
    with adaptation.averaged():
        assert torch.equal(vector(model), average)
    assert torch.equal(vector(model), average)


def test_a_checkpoint_that_is_loaded_brings_its_average():
    model, adaptation = adapted(4)
    states = copy.deepcopy(
        (model.state_dict(), adaptation.optimizer.state_dict(), adaptation.state_dict())
    )
    with adaptation.averaged():
        average = vector(model)
    train(adaptation, 4)
    for part, state in zip((model, adaptation.optimizer, adaptation), states, strict=True):
        part.load_state_dict(state)
    adaptation.finish()
    assert torch.equal(vector(model), average)


def test_a_second_finish_changes_nothing(recwarn):
    """It took the average that the first one had adopted for weights that somebody had loaded."""
    model, adaptation = adapted()
    adaptation.finish()
    final = vector(model)
    adaptation.finish()
    assert torch.equal(vector(model), final)
    assert not recwarn.list
