"""The batch-norm policy holds whenever `model.train()` is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fast
from fast.heads import (
    estimate_statistics,
    plain_batch_norm,
    running_statistics,
    set_batch_norm,
)
from fast.heads.batch_norm import estimate, has_batch_norm, has_layer_norm, per_task_norms
from helpers import same_state
from networks import ConvNet, images


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


def test_frozen_statistics_never_move():
    model, x = ConvNet(), images(16, 5)[0]
    set_batch_norm(model, "frozen")
    before = statistics(model)
    model.train()
    assert model.training
    model(x).sum().backward()
    assert same_state(before, statistics(model))
    assert model.features[1].weight.grad is not None
    assert isinstance(model.features[1], nn.BatchNorm2d)


@pytest.mark.parametrize("policy", ["per_task", "frozen"])
def test_instance_norms_that_track_statistics_keep_the_sources(policy):
    model, x = ConvNet(), images(16, 5)[0]
    channels = model.features[1].num_features
    model.features[1] = nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)
    model.train()(x)
    before = model.eval()(x)
    fast.finetune(model, images(32, 3), steps=3, batch_norm=policy, anchor_decay=1e9, distill=0)
    with fast.source_task(model):
        assert torch.allclose(model(x), before, atol=1e-4)


def test_tracked_statistics_move():
    model, x = ConvNet(), images(16, 5)[0]
    set_batch_norm(model, "track")
    before = statistics(model)
    model.train()(x)
    assert not same_state(before, statistics(model))


def test_statistics_per_task_leave_the_source_alone():
    model, x = ConvNet(), images(16, 5)[0]
    model.eval()
    before = model(x)
    fast.replace_head(model, 3, sample=x)
    set_batch_norm(model, "per_task")
    assert not any(p.requires_grad for p in model.features[1].source_norm.parameters())
    assert len(running_statistics(model)) == 2  # the target's
    model.train()
    for _ in range(3):
        model(x + 2)
    with torch.no_grad():
        model.features[1].weight.mul_(3)
    model.eval()
    with fast.source_task(model):
        assert torch.equal(model(x), before)
    assert model.features[1].running_mean.abs().sum() > 0
    with pytest.raises(ValueError, match="fold_head"):
        set_batch_norm(model, "frozen")


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="frozen, per_task or track"):
        set_batch_norm(ConvNet(), "freeze")


def test_target_statistics_are_those_of_the_inputs_and_the_sources_stay():
    torch.manual_seed(0)
    model = fast.replace_head(ConvNet(), 3, sample=images(20, 3)[0]).train()
    set_batch_norm(model, "per_task")
    x = [3 * images(40, 3, seed=s)[0] + 2 for s in (1, 2)]
    norm, plain = model.features[1], model.features[0]
    with torch.no_grad():
        before = norm.source_norm.running_mean.clone()
        found = [plain(part).transpose(0, 1).flatten(1) for part in x]
    estimate_statistics(model, x)
    mean = torch.stack([f.mean(1) for f in found]).mean(0)
    var = torch.stack([f.var(1) for f in found]).mean(0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(norm.running_var, var, rtol=1e-4)
    assert torch.equal(norm.source_norm.running_mean, before)
    assert (norm.momentum, norm.training, norm.source_norm.training) == (0.1, True, False)


@pytest.mark.parametrize(
    ("own", "during"), [(0.01, 0.1), (3e-4, 0.1), (None, 0.1), (0.1, 0.1), (0.5, 0.5)]
)
def test_the_targets_statistics_follow_within_a_run(own, during):
    """Slow averages of long trainings would take longer than the run."""
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=own), nn.Linear(3, 2))
    set_batch_norm(model, "per_task")
    assert (model[0].momentum, model[0].source_norm.momentum) == (during, own)
    assert plain_batch_norm(model)[0].momentum == own
    for policy in ("frozen", "track"):
        assert set_batch_norm(model, policy)[0].momentum == own


@pytest.mark.parametrize("policy", ["track", "per_task"])
@pytest.mark.parametrize("x", [torch.randn(1, 3), torch.randn(1, 3, 1, 1)], ids=["1-D", "1x1 map"])
def test_one_value_per_channel_takes_the_statistics_that_are_there(policy, x):
    kind = nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d
    model = nn.Sequential(kind(3))
    model[0].running_mean.fill_(2.0)
    set_batch_norm(model, policy)
    with torch.no_grad():
        answer = model.train()(x)
    assert torch.equal(answer, model.eval()(x))
    assert int(model[0].num_batches_tracked) == 0
    model.train()(torch.cat([x, x + 1]))
    assert int(model[0].num_batches_tracked) == 1
    assert type(plain_batch_norm(model)[0]) is kind


def test_statistics_of_single_values_alone_are_not_estimated():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))
    model[1].running_mean.fill_(2.0)
    set_batch_norm(model, "per_task")
    estimate_statistics(model, images(1, 3)[0].split(1))
    assert model[1].running_mean.eq(2.0).all()


@pytest.mark.parametrize("policy", ["per_task", "frozen"])
def test_statistics_of_torchs_averaged_model_leave_the_source_alone(policy):
    """`update_bn` reset those of the source, which see no batch in training mode afterwards."""
    model = set_batch_norm(ConvNet(), policy)
    ema = torch.optim.swa_utils.AveragedModel(model)
    norm = ema.module.features[1]
    source = getattr(norm, "source_norm", norm)
    source.running_mean.fill_(3.0)
    torch.optim.swa_utils.update_bn(images(100, 4, seed=1)[0].split(50), ema)
    assert (source.running_mean == 3).all()
    assert int(norm.num_batches_tracked) == (2 if policy == "per_task" else 0)


def test_statistics_of_the_source_can_be_estimated():
    model = set_batch_norm(ConvNet(), "per_task")
    _, (source,) = per_task_norms(model)
    inputs = images(64, 4, seed=1)[0]
    for _ in range(2):
        with fast.source_task(model):
            estimate([source], model, [inputs])
    mean = model.features[0](inputs).mean((0, 2, 3))
    torch.testing.assert_close(source.running_mean, mean)


def test_norms_without_statistics_are_left_as_they_are():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    assert not has_batch_norm(model)
    set_batch_norm(model, "per_task")
    assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.parametrize(
    "name", ["LayerNorm", "LayerNorm2d", "T5LayerNorm", "LlamaRMSNorm", "RMSNorm"]
)
def test_layer_norms_of_other_libraries_go_by_their_names(name):
    norm = type(name, (nn.Module,), {})()
    assert has_layer_norm(nn.Sequential(nn.Linear(2, 2), norm))
    assert not has_layer_norm(ConvNet())
