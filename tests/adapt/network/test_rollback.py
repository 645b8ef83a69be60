"""A run that fails before its first step leaves the model as it was; later ones no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fast
from fast.data.generators import process_generators
from fast.heads import set_batch_norm, task_head
from fast.train import trainer
from networks import ConvNet, TextNet, images, sentences

TRAIN, VAL = images(100, 4, seed=1), images(40, 4, seed=2)
WIDE = torch.zeros(4, 2, 8, 8)


def refuse(*_):
    raise OSError("no")


FAILURES = {
    "a budget without source inputs": {"forget_budget": 0.1},
    "val of another shape": {"val": (WIDE, torch.zeros(4))},
    "source inputs of another shape": {"source_inputs": WIDE},
    "the first batch": {"transform": refuse},
    "a measure of the source": {"source": refuse},
    "too many weights": {"class_weights": (1.0,)},
}


def facts(model):
    return [
        (
            name,
            type(m),
            m.training,
            getattr(m, "momentum", None),
            [(id(p), p.requires_grad) for p in m.parameters(False)],
        )
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("batch_norm", ["frozen", "per_task", "track"])
def test_the_model_is_what_it_was(name, batch_norm):
    model = ConvNet()
    model.features[0].requires_grad_(False)
    model.decide.bias.requires_grad_(False)
    model.project.eval()
    model.features[1].momentum = 0.01
    before, state = facts(model), copy.deepcopy(model.state_dict())
    drawn = process_generators()
    with pytest.raises((ValueError, RuntimeError, OSError)):
        fast.finetune(model, TRAIN, batch_norm=batch_norm, steps=4, **FAILURES[name])
    assert process_generators() == drawn
    assert facts(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    fast.finetune(model, TRAIN, steps=1)


def test_batch_norms_keep_a_policy_that_they_had_and_names_of_classes_come_back():
    model = set_batch_norm(ConvNet(), "frozen")
    kind = type(model.features[1])
    with pytest.raises(ValueError, match="forget_budget"):
        fast.finetune(model, TRAIN, steps=4, batch_norm="track", forget_budget=0.1)
    assert type(model.features[1]) is kind is not nn.BatchNorm2d
    text = TextNet()
    with pytest.raises(ValueError, match="forget_budget"):
        fast.finetune(text, sentences(60, 4), steps=4, forget_budget=0.1)
    assert text.num_labels == 5


def test_a_checkpoint_that_cannot_be_gone_on_with_leaves_the_weights(tmp_path, monkeypatch):
    torch.manual_seed(0)
    start = ConvNet()
    fast.finetune(copy.deepcopy(start), TRAIN, steps=4, output=str(tmp_path))
    model = copy.deepcopy(start)
    monkeypatch.setattr(trainer, "RunLog", refuse)  # the checkpoint has been read by then
    with pytest.raises(OSError, match="no"):
        fast.finetune(model, TRAIN, steps=4, resume=str(tmp_path))
    assert all(torch.equal(v, start.state_dict()[k]) for k, v in model.state_dict().items())


def test_after_the_first_step_the_head_stays():
    model = ConvNet()
    calls = []

    def at_last(x):
        calls.append(x)
        return refuse() if len(calls) == 3 else x

    with pytest.raises(OSError, match="no"):
        fast.finetune(model, TRAIN, steps=4, transform=at_last, grad_accum_steps=2)
    head = task_head(model)
    assert head is not None
    norm = head.norm
    assert (norm.deferred, norm._pending) == (False, [])


def test_after_a_run_the_normaliser_goes_on_by_itself():
    model = fast.finetune(ConvNet(), TRAIN, steps=2).model
    norm = task_head(model).norm
    before = norm.mean.clone()
    model.train()(VAL[0])
    assert not torch.equal(norm.mean, before)


def test_what_is_no_network_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got str"):
        fast.finetune("resnet18", TRAIN, steps=1)


def test_random_generators_are_what_they_were():
    """The head is taught, and its batches are drawn, before the optimizer turns out to be none."""
    model = ConvNet()
    drawn = process_generators()
    with pytest.raises(TypeError, match="it returned NoneType"):
        fast.Adaptation(model, TRAIN, steps=4, optimizer=lambda groups: None)
    assert process_generators() == drawn


def test_a_head_that_was_to_be_kept_has_no_hook_left():
    model = ConvNet()
    kept = model.decide.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="it returned NoneType"):
        fast.Adaptation(
            model,
            images(100, 5, seed=1),
            source_inputs=images(60, 5, seed=3)[0],
            head="keep",
            steps=4,
            optimizer=lambda groups: None,
        )
    hooks = [h for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
    assert [list(h) for h in hooks if h] == [[kept.id]]
