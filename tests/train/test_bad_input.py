"""Bad input gets an error that names the argument and the way out, before anything is trained."""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fast
from fast.train.config import TrainConfig
from fast.train.log import lines
from networks import ConvNet, images

X, Y = images(40, 4)


class Targets(TensorDataset):
    """Records its labels, of which one is this."""

    def __init__(self, x, y, one):
        super().__init__(x, y)
        self.targets = [*y.tolist()[1:], one]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((X, torch.full((40,), math.nan)), "train: 40 labels are NaN"),
        ((X, Y.float() + 0.5), "got fractions, as .*; numbers to predict are for fast.Adaptation"),
        ((X, torch.zeros(40, 4, 4)), "labels of each position are for fast.Adaptation"),
        ((X, Y - 1), "train: labels must be 0 or more"),
        ((X, nn.functional.one_hot(Y)), r"train: labels must be class indices of shape \[N\]"),
        ((X, Y[:-1]), "train: 40 inputs but 39 labels"),
        ((X[:0], Y[:0]), "train: no samples"),
        (({"a": X, "b": X[:10]}, Y), "train: inputs differ in their number of samples: 40, 10"),
        ((X, Y + 2**40), "train: label 10995116277[0-9]* among 40 samples"),
        (Targets(X, Y, 10_000), "train: label 10000 among 40 samples"),
    ],
)
def test_bad_training_data(train, message):
    with pytest.raises(ValueError, match=message):
        fast.finetune(ConvNet(), train, steps=2)


def test_labels_of_val_must_fit_the_classes():
    with pytest.raises(ValueError, match=r"val: labels must be 0\.\.2; got 0\.\.3"):
        fast.finetune(ConvNet(), (X, Y.clamp(max=2)), (X, Y), steps=2)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((X, ["cat"] * 40), "train: labels must be numbers, as a tensor or array; got list of str"),
        ((X, dict(enumerate(Y))), "train: labels must be numbers, .* array; got dict$"),
        ((X, (Y, Y)), "train: labels must be numbers, .* array; got tuple of Tensor$"),
        ((X, np.array(["a", "b"] * 20)), r"number the names: classes, labels = numpy.unique\("),
        ((np.array(["a"] * 40), Y), "train: inputs must be numbers"),
        ((["a"] * 40, Y), r"train: inputs are texts, and the network takes tensors: tokenizer\("),
        (iter([(X, Y)]), "train is a stream, .*, which cannot be read again; give some thousands"),
    ],
)
def test_what_is_not_a_number_is_refused(train, message):
    with pytest.raises(TypeError, match=message):
        fast.finetune(ConvNet(), train, steps=2)


def test_arrays_in_double_precision_are_taken_as_floats():
    model = ConvNet()
    losses = []
    for data in ((X, Y), (X.double().numpy(), Y.to(torch.uint8).numpy())):
        result = fast.finetune(copy.deepcopy(model), data, steps=2)
        losses.append(result.history[-1]["loss"])
    assert losses[0] == losses[1]


def test_other_kinds_of_data_are_refused():
    with pytest.raises(TypeError, match=r"train must be .* got str"):
        fast.finetune(ConvNet(), "folder", steps=2)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="unknown options: learning_rate"):
        fast.finetune(ConvNet(), (X, Y), learning_rate=1e-3)
    with pytest.raises(TypeError, match=r"Adaptation got unknown options: lrr; did you mean lr\?"):
        fast.Adaptation(ConvNet(), (X, Y), lrr=1e-3)


def test_a_network_without_a_linear_head_is_refused():
    with pytest.raises(ValueError, match="no linear head"):
        fast.finetune(nn.Sequential(nn.Flatten(), nn.ReLU()), (X, Y), steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be one of fast, vanilla"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 1, "epochs": 1}, "steps or epochs, not both"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"lr": math.inf}, "lr must be positive"),
        ({"lr": "1e-3"}, "lr must be a number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"label_smoothing": 3.0}, "label_smoothing must be in"),
        ({"anchor_decay": -0.1}, "anchor_decay must not be negative"),
        ({"batch_size": 10, "grad_accum_steps": 3}, "multiple of grad_accum_steps"),
        ({"batch_norm": "off"}, "batch_norm must be one of frozen"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_patience_needs_val():
    with pytest.raises(ValueError, match="patience needs val"):
        fast.finetune(ConvNet(), (X, Y), steps=2, patience=2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("heavy", "'balanced'"),
        ((1.0, 2.0), "2 weights for 4 classes"),
        ((1.0, -1.0, 1.0, 1.0), "not negative; class 1 has -1"),
        ((1.0, 1.0, math.nan, 1.0), "must be finite .* class 2 has nan"),
        ((math.inf, 1.0, 1.0, 1.0), "must be finite .* class 0 has inf"),
        ((0.0,) * 4, "0 for every class in train"),
    ],
)
def test_class_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        fast.finetune(ConvNet(), (X, Y), steps=2, class_weights=weights)


def test_a_bad_option_leaves_the_model_as_it_was():
    model = ConvNet()
    with pytest.raises(ValueError, match="class_weights"):
        fast.finetune(model, (X, Y), steps=2, class_weights="heavy")
    assert type(model.decide) is nn.Linear


WIDE = (torch.zeros(40, 2, 8, 8), Y)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": WIDE}, r"train: the network does not take these inputs \(\[32, 2, 8, 8\]"),
        ({"val": WIDE}, r"val: the network does not take these inputs \(\[40, 2, 8, 8\] torch.fl"),
        ({"source": WIDE}, r"source: the network does not take these inputs"),
        ({"val": ((X, X), Y)}, r"val: the network .* takes? .*positional arguments"),
    ],
)
def test_inputs_that_the_network_does_not_take_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        fast.finetune(ConvNet(), **({"train": (X, Y)} | data), steps=2)


@pytest.mark.parametrize(
    ("x", "way_out"),
    [
        (X.movedim(1, -1).repeat(1, 1, 1, 3), r"pictures \[N, H, W, C\]: give x.permute\(0, 3, 1"),
        (X[:, 0], r"pictures are \[N, C, H, W\]: give x\[None\] of one, x\[:, None\] of grey"),
        ((X * 255).to(torch.uint8), r"give pixels as in training, mostly \(x / 255 - mean\) / std"),
        (X.double(), r"its weights are torch.float32: give x.to\(torch.float32\)"),
    ],
)
def test_pictures_that_are_not_ready_have_a_way_out(x, way_out):
    for call, name in (
        (lambda: fast.finetune(ConvNet(), (x, Y), steps=2), "train"),
        (lambda: fast.Adaptation(ConvNet(), (X, Y), source_inputs=x, steps=2), "source_inputs"),
        (lambda: fast.replace_head(ConvNet(), 4, sample=x), "sample"),
    ):
        with pytest.raises(ValueError, match=f"{name}: the network does not take.*{way_out}"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"card": 3}, "card must be a SourceCard or its file; got int"),
        ({"transform": lambda x: None}, "transform returned None"),
        ({"num_classes": 4.0}, r"num_classes must be a whole number; got 4\.0"),
    ],
)
def test_what_is_of_another_type_is_named(options, message):
    with pytest.raises(TypeError, match=message):
        fast.finetune(ConvNet(), (X, Y), steps=2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": True}, "steps must be a whole number; got True"),
        ({"lr": True}, "lr must be a number; got True"),
        ({"weight_decay": math.nan}, "weight_decay must be finite; got nan"),
        ({"class_weights": 3}, "class_weights must be 'balanced' or one weight per class; got 3"),
        ({"class_weights": {0: 1.0, 1: 9.0}}, "one weight per class, in their order; got a dict"),
    ],
)
def test_values_that_would_pass_for_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (None, TypeError, r"source: the function must return the accuracy, .* returned NoneType"),
        (torch.ones(2), TypeError, r"returned Tensor of shape \[2\]"),
        (math.nan, ValueError, r"source: .* an accuracy in 0\.\.1; got nan"),
        (93.0, ValueError, "got 93"),
    ],
)
def test_what_a_function_of_the_source_task_returns_is_checked(answer, error, message):
    with pytest.raises(error, match=message):
        fast.finetune(ConvNet(), (X, Y), source=lambda model: answer, steps=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X * math.nan, "source data: 40 samples are not finite"),
        (X[:, :, :, 0], r"source data: the network does not take these inputs \(\[40, 1, 8\]"),
    ],
)
def test_cards_name_what_is_wrong_with_the_data(data, message):
    with pytest.raises(ValueError, match=message):
        fast.SourceCard.estimate(ConvNet(), data)
    broken = ConvNet()
    next(broken.parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match="answers are not finite"):
        fast.SourceCard.estimate(broken, X)


def test_class_weights_that_leave_nothing_to_learn():
    weights = (0.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="0 for every class in train"):
        fast.finetune(ConvNet(), (X, 0 * Y), steps=2, num_classes=4, class_weights=weights)


class Rows(Dataset):
    """Samples one by one, of which number 29 is broken."""

    def __len__(self):
        return len(Y)

    def __getitem__(self, i):
        return X[i] if i != 29 else X[i] * math.inf, int(Y[i])


@pytest.mark.parametrize("method", ["fast", "vanilla", "ewc"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: (torch.stack([x for x, _ in Rows()]), Y), "number 29"),
        (Rows, "number 29"),
        (lambda: DataLoader(Rows(), 8), "number 5"),
    ],
    ids=["tensors", "Dataset", "loader"],
)
def test_a_sample_that_is_not_finite_is_named_before_it_spoils_the_weights(method, data, message):
    model = ConvNet()
    with pytest.raises(ValueError, match=rf"train: 1 sample is not finite .* {message}; drop"):
        fast.finetune(model, data(), num_classes=4, steps=8, method=method)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (lambda x: None, TypeError, "transform returned NoneType"),
        (lambda x: x.numpy(), TypeError, "transform returned .*ndarray"),
        (lambda x: x[:5], ValueError, "transform turned 20 inputs into 5"),
        (lambda x: x.double(), ValueError, "transform: the network does not take"),
        (lambda x: (x, x), ValueError, "transform: the network does not take"),
    ],
)
def test_what_a_transform_returns_is_checked(transform, error, message):
    with pytest.raises(error, match=message):
        fast.finetune(ConvNet(), (X, Y), batch_size=40, steps=2, transform=transform)


def test_a_transform_that_spoils_a_batch_is_named():
    with pytest.raises(ValueError, match="train: 32 samples are not finite"):
        fast.finetune(ConvNet(), (X, Y), steps=2, transform=lambda x: x / 0)


def spoiled(change):
    model = ConvNet()
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.project.weight.data[1, 2:4].fill_(math.nan), "2 of 512 values of project.wei"),
        (
            lambda m: m.features[1].running_var.fill_(math.inf),
            r"8 of 8 .* features\.1\.running_var",
        ),
        (lambda m: m.to("meta"), r"features\.0\.weight is on the meta device"),
        (lambda m: inferred(m), r"project\.weight was made under torch\.inference_mode"),
        (
            lambda m: m.register_parameter("phase", nn.Parameter(torch.ones(2) + 0j)),
            r"phase is torch\.complex64, and only real weights can be trained: freeze it",
        ),
    ],
    ids=["NaN weights", "infinite variance", "meta", "inference", "complex"],
)
def test_networks_that_cannot_be_trained_are_named(change, message):
    with pytest.raises(ValueError, match=f"model: {message}"):
        fast.finetune(spoiled(change), (X, Y), steps=2, method="vanilla")


def inferred(model):
    with torch.inference_mode():
        model.project = nn.Linear(32, 16)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.to("meta"), "train: inputs on the meta device"),
        (X.to_sparse(), r"train: inputs of layout torch\.sparse_coo; .*to_dense"),
    ],
)
def test_inputs_that_hold_no_plain_numbers_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        fast.finetune(ConvNet(), (x, Y), steps=2)


def test_inputs_made_for_inference_are_named():
    with torch.inference_mode():
        x = X + 0
    with pytest.raises(ValueError, match=r"train: .*inference_mode; give x\.clone"):
        fast.finetune(ConvNet(), (x, Y), steps=2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_where_nothing_can_be_trained_says_so(mode):
    with mode(), pytest.raises(ValueError, match=f"under torch.{mode.__name__}"):
        fast.finetune(ConvNet(), (X, Y), steps=2)


@pytest.mark.parametrize(
    ("train", "message"),
    [((X[:1], Y[:1]), "train: 1 sample; give at least 2"), ((X, 0 * Y), "train: all labels are 0")],
)
def test_too_little_to_learn_is_not_blamed_on_val(train, message):
    with pytest.raises(ValueError, match=message):
        fast.finetune(ConvNet(), train, (X, Y), steps=2)


@pytest.mark.parametrize("part", ["features", "all"])
def test_a_frozen_backbone_is_said(part):
    model = ConvNet().requires_grad_(False)
    before = model.features[0].weight.clone()
    with pytest.warns(UserWarning, match="no parameter of the backbone .*only the head is trained"):
        fast.finetune(model, (X, Y), steps=2)
    assert torch.equal(model.features[0].weight, before)


@pytest.mark.parametrize("ending", [nn.Sigmoid(), nn.Softmax(1)])
@pytest.mark.parametrize("outputs", [1, 5])
def test_probabilities_in_the_place_of_logits_are_refused(ending, outputs):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, outputs), ending)
    with pytest.raises(ValueError, match=r"returns probabilities .* follows its head"):
        fast.finetune(model, (X, Y), steps=2, method="vanilla")


class Text(nn.Module):
    """Takes token ids by name, as transformers has it."""

    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, input_ids, **more):
        batch, tokens = input_ids.shape
        return self.fc(self.embed(input_ids).view(batch, tokens, -1).mean(1))


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (Text(), X, "it is a text network .it takes input_ids., and these look like images"),
        (Text(), {"pixel_values": X}, "text network"),
        (Text(), {"tokens": Y[:, None]}, "it takes input_ids"),
        (ConvNet(), {"pixel_values": X}, r"its forward takes \(x\)"),
    ],
)
def test_what_the_network_takes_is_said(model, x, message):
    with pytest.raises(ValueError, match=rf"train: the network does not take .*{message}"):
        fast.finetune(model, (x, Y), steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 10**20}, "steps must be at most 10000000; got 1"),
        ({"seed": 2**70}, "seed must be at most"),
        ({"num_classes": 2**63}, "num_classes must be at most 1000000; got 9223372036854775808"),
        ({"num_classes": 0}, "num_classes must be at least 2; got 0"),
        ({"forget_budget": 50}, "less than 20 nats or 100%; got 50"),
    ],
)
def test_absurd_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fast.finetune(ConvNet(), (X, Y), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": None}, "batch_size must not be None; leave it out for 64"),
        ({"warmup": None}, "warmup must not be None"),
        ({"weight_decay": None}, "weight_decay must not be None"),
        ({"schedule": None}, "schedule must be one of cosine, constant; got None"),
        ({"max_entropy": "no"}, "max_entropy must be True or False; got 'no'"),
        ({"shard": 1}, "shard must be True or False; got 1"),
    ],
)
def test_values_of_another_kind_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
    assert TrainConfig(max_entropy=np.True_).max_entropy is True


def test_arguments_of_an_adaptation_are_named():
    with pytest.raises(ValueError, match="process_group must be 'auto', None or a process group"):
        fast.Adaptation(ConvNet(), (X, Y), steps=2, process_group=5)
    with pytest.raises(TypeError, match=r"optimizer must be .* got NoneType"):
        fast.Adaptation(ConvNet(), (X, Y), steps=2, optimizer=None)


def test_a_budget_of_nats_that_may_be_meant_as_points_is_said():
    with pytest.warns(UserWarning, match=r"forget_budget 2 nats lets .* points .* written '2%'"):
        fast.finetune(ConvNet(), (X, Y), steps=2, source_inputs=X, forget_budget=2)


def test_a_misspelt_option_has_a_suggestion():
    with pytest.raises(TypeError, match=r"unknown options: warm_up; did you mean warmup\?"):
        fast.finetune(ConvNet(), (X, Y), warm_up=2)


def test_source_pictures_of_another_size_are_told():
    with pytest.warns(UserWarning, match=r"source_inputs are \[1, 12, 12\].*inputs \[1, 8, 8\]"):
        fast.finetune(ConvNet(), (X, Y), steps=1, source_inputs=torch.randn(16, 1, 12, 12))


def test_validation_samples_that_are_trained_on_are_announced(caplog, monkeypatch):
    """Their accuracy was taken for that of held-out ones."""
    monkeypatch.setattr(lines.log, "propagate", True)
    caplog.set_level(logging.INFO, "fast")
    (x, y), near = images(12, 4, seed=7), X[:3].clone()
    near[:, 0, 3, 3] += 1
    both, labels = torch.cat([x, X[-5:], near]), torch.cat([y, Y[-5:], Y[:3]])
    for train, val, said in (
        (X, both, ["val: 5 of 20 samples are in train, too: what is measured of them is not held"]),
        ({"x": X}, {"x": both}, ["val: 5 of 20 samples are in train, too"]),
        (X, torch.cat([x, near, near, near[:2]]), []),
    ):
        caplog.clear()
        fast.finetune(ConvNet(), (train, Y), val=(val, labels), steps=1)
        messages = {m for m in caplog.messages if m.startswith("val: ")}  # of two handlers
        assert len(messages) == len(said)
        assert all(m.startswith(s) for m, s in zip(messages, said, strict=True))
