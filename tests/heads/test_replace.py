"""Find, replace, calibrate and fold heads, on every kind of network."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fast
from fast.heads import FeatureNorm, calibrate, find_head, forward_logits, task_head
from networks import IMAGE_NETWORKS, ConvHead, ConvNet, SharedHead, TextNet, images, sentences

HEAD_NAMES = {
    "conv, batch norm": "decide",
    "conv head": "classifier",
    "sequential head": "classifier.3",
    "shared head": "fc",
}


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_the_head_is_found_by_running_the_model(name):
    model = IMAGE_NETWORKS[name]()
    assert find_head(model, images(4, 5)[0]).name == HEAD_NAMES[name]


def test_customary_names_need_no_sample():
    assert find_head(TextNet()).name == "score"
    assert find_head(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))).name == "2"


def test_a_head_of_unknown_name_asks_for_a_sample():
    with pytest.raises(ValueError, match="Pass sample="):
        find_head(ConvNet())


def test_a_hidden_layer_called_fc_is_not_taken_for_the_head():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.decide = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.decide(torch.relu(self.fc(x)))

    with pytest.raises(ValueError, match="Pass sample="):
        find_head(Hidden())
    assert find_head(Hidden(), torch.randn(4, 8)).name == "decide"
    groups = fast.param_groups(Hidden(), sample=torch.randn(4, 8))
    assert [len(g["params"]) for g in groups] == [2, 2]


def test_a_lazy_head_is_refused():
    with pytest.raises(ValueError, match="run the model once"):
        find_head(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))


def test_unknown_keys_of_a_group_are_refused():
    with pytest.raises(TypeError, match="unknown keys anchor_deacy"):
        fast.param_groups(TextNet(), anchor_deacy=5.0)


def test_timm_models_name_their_classifier():
    model = ConvNet()
    model.get_classifier = lambda: model.decide
    assert find_head(model).name == "decide"


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="no linear head"):
        fast.replace_head(nn.Sequential(nn.Flatten(), nn.ReLU()), 3)


def test_a_model_that_is_only_a_head_is_refused():
    with pytest.raises(ValueError, match="no backbone"):
        fast.replace_head(nn.Linear(4, 3), 3)


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_the_new_head_has_maximum_entropy_and_sends_no_error(name):
    model, x = IMAGE_NETWORKS[name](), images(16, 5)[0]
    fast.replace_head(model, 7, sample=x)
    logits = model(x)
    assert logits.shape == (16, 7)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(entropy, torch.full_like(entropy, math.log(7)))
    nn.functional.cross_entropy(logits, torch.arange(16) % 7).backward()
    body = [p for p in model.parameters() if p.requires_grad and p.shape[0] != 7]
    assert body
    assert all(p.grad is None or not p.grad.any() for p in body)
    assert task_head(model).linear.weight.grad.any()


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_the_source_head_answers_exactly_as_before(name):
    model, x = IMAGE_NETWORKS[name]().eval(), images(16, 5)[0]
    before = model(x)
    fast.replace_head(model, 7, sample=x)
    with fast.source_task(model):
        assert torch.equal(model(x), before)
    assert model(x).shape == (16, 7)


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_folding_keeps_the_function_and_leaves_no_trace(name):
    model, x = IMAGE_NETWORKS[name]().eval(), images(16, 5)[0]
    plain_names = set(model.state_dict())
    kinds = {type(m) for m in model.modules()}
    fast.replace_head(model, 7, sample=x)
    fast.heads.set_batch_norm(model, "per_task")
    nn.init.normal_(task_head(model).linear.weight)
    model.eval()
    before = model(x)
    fast.fold_head(model)
    assert torch.allclose(model(x), before, atol=1e-5)
    assert set(model.state_dict()) == plain_names
    assert {type(m) for m in model.modules()} == kinds
    assert all(p.requires_grad for p in model.parameters())


def test_a_shared_head_is_replaced_everywhere():
    model = SharedHead()
    fast.replace_head(model, 3, sample=images(8, 5)[0])
    assert model.fc is model.branches[0]
    fast.fold_head(model)
    assert model.fc is model.branches[0]
    assert type(model.fc) is nn.Linear


def test_tied_weights_leave_the_other_user_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.fc = nn.Linear(8, 20, bias=False)
            self.fc.weight = self.embed.weight

        def forward(self, ids):
            return self.fc(self.embed(ids).mean(1))

    model, ids = Tied(), torch.randint(20, (8, 4))
    before = model(ids)
    # Weights that the backbone uses too are anchored with it.
    (group,) = fast.param_groups(model, anchor_decay=5.0, sample=ids)
    assert (group["name"], group["anchor_decay"]) == ("backbone", 5.0)
    fast.replace_head(model, 3, sample=ids)
    with fast.source_task(model):
        assert torch.equal(model(ids), before)
    assert model(ids).shape == (8, 3)
    assert model.embed.weight.requires_grad
    trained = [p for g in fast.param_groups(model) for p in g["params"]]
    assert any(p is model.embed.weight for p in trained)


def test_number_of_labels_is_announced_where_transformers_looks():
    model, (x, _) = TextNet(), sentences(8, 5)
    fast.replace_head(model, 3, sample=x)
    assert model.num_labels == 3
    with fast.source_task(model):
        assert model.num_labels == 5
        assert forward_logits(model, x).shape == (8, 5)
    assert model.num_labels == 3


def test_replacing_twice_is_refused():
    model, x = ConvHead(), images(8, 5)[0]
    fast.replace_head(model, 3, sample=x)
    with pytest.raises(ValueError, match="fold_head"):
        fast.replace_head(model, 4, sample=x)


def test_a_relu_behind_the_head_is_refused_and_the_head_put_back():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    model.append(nn.Flatten())
    x = images(8, 5)[0]
    with pytest.raises(ValueError, match="max_entropy=False"):
        fast.replace_head(model, 3, sample=x)
    assert type(model[1]) is nn.Conv2d
    assert model(x).shape == (8, 5)


def test_a_failed_replacement_puts_the_head_back():
    model = TextNet()
    layer = model.score
    for _ in range(2):
        with pytest.raises(ValueError, match="two samples"):
            fast.replace_head(model, 3, sample=sentences(1, 5)[0])
        assert model.score is layer
        assert layer.weight.requires_grad
        assert model.num_labels == 5


@pytest.mark.parametrize("classes", [3, 2])
def test_the_names_of_the_labels_come_back_with_the_source_task(classes):
    """With as many classes as the source, the target's were saved under the source's names."""

    class Config:
        """As in transformers: another number of labels resets their names."""

        def __init__(self):
            self._names = {0: "neg", 1: "pos"}
            self.label2id = {"neg": 0, "pos": 1}

        num_labels = property(lambda self: len(self.id2label))
        id2label = property(lambda self: self._names)

        @num_labels.setter
        def num_labels(self, n):
            if n != len(self._names):
                self._names = {i: f"LABEL_{i}" for i in range(n)}
                self.label2id = {v: k for k, v in self._names.items()}

        @id2label.setter
        def id2label(self, names):
            self._names = names

    model = TextNet(num_classes=2)
    model.config = Config()
    fast.replace_head(model, classes, sample=sentences(8, 2)[0])
    assert model.config.num_labels == classes
    assert model.config.id2label == {i: f"LABEL_{i}" for i in range(classes)}
    names = {i: f"topic {i}" for i in range(classes)}
    model.config.id2label = names
    with fast.source_task(model), fast.source_task(model):
        assert model.config.id2label == {0: "neg", 1: "pos"}
        assert model.config.label2id == {"neg": 0, "pos": 1}
    assert model.config.id2label == names
    assert model.config.label2id == {f"LABEL_{i}": i for i in range(classes)}


def test_a_number_of_classes_that_cannot_be_set_stays():
    @dataclass(frozen=True)
    class Config:
        num_classes: int = 4

    class Own(TextNet):
        num_classes = property(lambda self: 5)
        config = Config()

    model = Own()
    fast.replace_head(model, 3)
    with fast.source_task(model):
        assert task_head(model).answers_source
    assert (model.score.num_classes, model.config.num_classes) == (3, 4)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes"):
        fast.replace_head(TextNet(), 1)


def test_features_are_normalised():
    norm = FeatureNorm(3)
    x = torch.randn(5000, 3) * torch.tensor([0.1, 1.0, 10.0]) + 5
    norm.update(x)
    z = norm.eval()(x)
    assert torch.allclose(z.mean(0), torch.zeros(3), atol=1e-3)
    # The variance floor is shared, so only features far below the mean variance shrink.
    assert torch.allclose(z[:, 2].std(), torch.tensor(1.0), atol=0.01)


def test_an_evaluation_moves_no_statistics_and_none_are_the_identity():
    norm, x = FeatureNorm(3).eval(), torch.randn(50, 3) + 5
    assert torch.allclose(norm(x), x, rtol=0.01)
    norm.train()(x)
    first = norm.eval()(x)
    norm(x + 9)
    assert torch.equal(norm(x), first)
    assert not torch.allclose(first, x)
    norm.train()(x[:1])  # which has no variance
    assert torch.equal(norm.eval()(x), first)


def test_dead_features_are_not_amplified():
    norm = FeatureNorm(2)
    norm.update(torch.stack([torch.randn(100), torch.zeros(100)], 1))
    assert norm.eval()(torch.ones(1, 2))[0, 1] < 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_features_of_16_bits_is_not_rounded(dtype):
    """In bfloat16 a mean of 10.03 is 10, which is off by three fifths of the deviation."""
    x = (10.03 + 0.05 * torch.randn(5000, 2)).to(dtype)
    norm = FeatureNorm(2)
    norm.update(x)
    z = norm.eval()(x)
    assert z.dtype == dtype
    assert z.float().mean(0).abs().max() < 0.01


def test_a_copy_of_a_normaliser_waits_for_nobody():
    """It collected all features that it saw in training mode."""
    norm = FeatureNorm(3)
    norm.defer()
    norm(torch.randn(8, 3))
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        twin(torch.randn(8, 3))
        assert twin._pending == []
        assert int(twin.num_batches_tracked) == 1
    assert len(norm._pending) == 1


def test_statistics_can_be_kept_as_they_are():
    norm = FeatureNorm(3)
    norm(torch.randn(8, 3))
    norm.freeze()
    before = norm.var.clone()
    norm(torch.randn(8, 3))
    assert torch.equal(norm.var, before)
    norm.track()
    norm(torch.randn(8, 3))
    assert not torch.equal(norm.var, before)


def test_calibration_needs_two_samples_and_finite_features():
    model = TextNet()
    fast.replace_head(model, 3)
    x, _ = sentences(1, 5)
    with pytest.raises(ValueError, match="two samples"):
        calibrate(model, [x])
    with torch.no_grad():
        model.body.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="non-finite"):
        calibrate(model, [sentences(8, 5)[0]])


def test_a_replaced_model_can_be_copied_and_pickled():
    model, x = ConvNet(), images(8, 5)[0]
    fast.replace_head(model, 3, sample=x)
    fast.heads.set_batch_norm(model, "frozen")
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert not twin.train().features[1].training
