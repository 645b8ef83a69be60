"""A network that is called leaves no trace, and answers the task that it is asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fast
from fast.heads import evaluating, task_head, traceless
from fast.heads.find import is_head_layer
from fast.heads.forward import logits_of
from networks import ConvNet, images

X = images(8, 5)[0]


class Failing(ConvNet):
    """It fails once it has moved its statistics and drawn numbers."""

    def forward(self, x):
        self.seen = [m.training for m in self.modules()]
        super().forward(x + torch.randn_like(x))
        raise RuntimeError


def test_every_module_gets_its_own_mode_back():
    model = Failing().train()
    model.project.eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        model(X)
    assert not any(model.seen)
    assert [m.training for m in model.modules()] == before


def test_buffers_and_random_state_are_restored_after_an_error():
    model, drawn = Failing().train(), torch.get_rng_state()
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(RuntimeError), traceless(model):
        model(X)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize(
    "wrap", [lambda z: z, lambda z: {"logits": z}, lambda z: (z, 1), lambda z: [z]]
)
def test_logits_are_taken_from_any_output(wrap):
    z = torch.randn(2, 3)
    assert logits_of(wrap(z)) is z


def test_an_output_without_logits_is_named():
    with pytest.raises(TypeError, match="model returned dict, which holds no logits"):
        logits_of({"scores": torch.zeros(2, 3)})


def test_a_question_to_the_source_inside_of_another_ends_none():
    model = fast.replace_head(ConvNet().eval(), 3, sample=X)
    with fast.source_task(model):
        before = model(X)
        with fast.source_task(model):
            pass
        assert torch.equal(model(X), before)
    assert model(X).shape == (8, 3)


def test_the_sources_head_stays_in_evaluation_mode():
    """One with spectral norm would change in each pass in training mode."""
    head = task_head(fast.replace_head(ConvNet(), 3, sample=X).train())
    assert head.linear.training
    assert not head.source.training


@pytest.mark.parametrize(
    ("layer", "answer"),
    [
        (nn.Linear(4, 4), True),
        (nn.Conv2d(4, 4, 1), True),
        (nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.Conv2d(4, 4, 3), False),
        (nn.Conv1d(4, 4, 1), False),
    ],
)
def test_what_can_be_a_head(layer, answer):
    assert is_head_layer(layer) == answer


class Padded(ConvNet):
    """A head of a round number of classes, of which the network counts five."""

    def __init__(self) -> None:
        super().__init__(8)

    def forward(self, x):
        return super().forward(x)[:, :5]


def test_a_network_that_counts_the_classes_is_named():
    with pytest.raises(ValueError, match=r"7 classes .* shape \[2, 5\]: its forward counts"):
        fast.replace_head(Padded(), 7, sample=X)
