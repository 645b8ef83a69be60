"""`fast.finetune` from end to end, on small networks of every kind."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fast
from fast.adapt.methods import METHODS
from fast.heads import forward_logits, task_head
from helpers import same_state
from networks import IMAGE_NETWORKS, ConvNet, TextNet, images, sentences

TRAIN, VAL = images(300, 4, seed=1), images(100, 4, seed=2)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_on_every_network(name, method):
    torch.manual_seed(0)
    model = IMAGE_NETWORKS[name]()
    source_inputs = images(64, 5, seed=3)[0] if method == "replay" else None
    options = {"method": method, "steps": 80, "lr": 1e-2, "eval_every": 20}
    result = fast.finetune(
        model, TRAIN, VAL, source=images(50, 5), source_inputs=source_inputs, **options
    )
    assert [r["step"] for r in result.history] == [0, 20, 40, 60, 80]
    assert result.target_accuracy > 0.5
    assert result.history[-1]["loss"] < result.history[1]["loss"]
    assert 0 <= result.source_accuracy <= 1
    assert result.history[-1]["drift"] > 0
    assert result.model is model
    assert not model.training


def test_a_text_network_takes_batches_of_named_inputs():
    model = TextNet()
    train, val = sentences(300, 4, 1), sentences(100, 4, 2)
    result = fast.finetune(model, train, val, steps=60, lr=3e-3)
    assert result.target_accuracy > 0.8


def test_a_data_set_and_a_loader_give_what_tensors_give():
    dataset = TensorDataset(*TRAIN)
    x, y = VAL
    torch.manual_seed(0)
    start = ConvNet()
    outcomes = []
    for train in (TRAIN, dataset):
        model = copy.deepcopy(start)
        fast.finetune(model, train, (x, y), num_classes=4, steps=8)
        outcomes.append(weights(model))
    assert same_state(*outcomes)
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    result = fast.finetune(copy.deepcopy(start), loader, VAL, num_classes=4, epochs=2, lr=1e-2)
    assert result.history[-1]["step"] == 2 * len(loader)


def test_batches_of_a_mapping_carry_their_labels():
    rows = [
        {"ids": i, "mask": m, "labels": y}
        for i, m, y in zip(*sentences(64, 4)[0].values(), sentences(64, 4)[1], strict=True)
    ]
    loader = DataLoader(rows, batch_size=16)
    result = fast.finetune(TextNet(), loader, num_classes=4, steps=4)
    assert result.target_accuracy is None
    assert result.history[-1]["loss"] is not None


def test_the_stall_leaves_the_backbone_alone():
    model = ConvNet()
    before = weights(model.features)
    fast.finetune(model, TRAIN, steps=5, stall=5, batch_norm="frozen")
    assert same_state(before, weights(model.features))


def test_seeds_repeat_and_the_callers_random_state_stays():
    torch.manual_seed(3)
    start, state = SequentialDropout(), torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(start)
        fast.finetune(model, TRAIN, steps=6, seed=seed)
        runs.append(weights(model))
    assert same_state(runs[0], runs[1])
    assert not same_state(runs[0], runs[2])
    assert torch.equal(state, torch.get_rng_state())


class SequentialDropout(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 5)
        )


def test_accumulating_gradients_changes_nothing_but_rounding():
    start = ConvNet().double()
    train = (TRAIN[0].double(), TRAIN[1])
    options = {"steps": 6, "class_weights": "balanced", "label_smoothing": 0.1, "lr": 1e-3}
    runs = []
    for parts in (1, 4):
        model = copy.deepcopy(start)
        fast.finetune(model, train, grad_accum_steps=parts, method="vanilla", **options)
        runs.append(torch.cat([v.double().flatten() for v in weights(model).values()]))
    assert torch.allclose(*runs, rtol=1e-4, atol=1e-6)


def test_accumulation_updates_the_feature_statistics_once_per_step():
    start = ConvNet().double()
    train = (TRAIN[0].double(), TRAIN[1])
    runs = []
    options = {"steps": 6, "stall": 0, "lr": 1e-3, "batch_norm": "frozen"}
    for parts in (1, 4, 64):
        model = copy.deepcopy(start)
        fast.finetune(model, train, grad_accum_steps=parts, **options)
        runs.append(torch.cat([v.double().flatten() for v in weights(model).values()]))
    assert torch.allclose(runs[0], runs[1], rtol=1e-4, atol=1e-6)
    assert torch.allclose(runs[0], runs[2], rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_steps():
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) in steps 1\.\.5"):
        fast.finetune(ConvNet(), TRAIN, method="vanilla", steps=10, eval_every=5, lr=1e30)


def test_a_batch_of_classes_of_weight_zero_changes_nothing_badly():
    x, y = TRAIN
    model = ConvNet()
    mostly = torch.cat([(y == 0).nonzero(), (y == 1).nonzero()[:1]]).squeeze(1)
    options = {"num_classes": 4, "class_weights": (0.0, 1.0, 1.0, 1.0), "steps": 9}
    fast.finetune(model, (x[mostly], y[mostly]), method="vanilla", batch_size=8, **options)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_call_that_fails_before_the_first_step_leaves_the_head():
    for x, y in (images(1, 4), (torch.full((30, 1, 8, 8), float("nan")), torch.zeros(30))):
        model = ConvNet()
        layer = model.decide
        with pytest.raises(ValueError, match=r"1 sample;|samples are not finite"):
            fast.finetune(model, (x, y), num_classes=4, steps=2)
        assert model.decide is layer
        assert type(model.features[1]) is nn.BatchNorm2d


def test_very_short_runs_still_move_the_backbone():
    model = ConvNet()
    before = weights(model.features)
    fast.finetune(model, TRAIN, steps=3, lr=1e-2)
    assert not same_state(before, weights(model.features))


def test_early_stopping_goes_back_to_the_best_weights():
    model = ConvNet()
    result = fast.finetune(
        model, TRAIN, VAL, steps=400, lr=3e-2, method="vanilla", eval_every=5, patience=3
    )
    accuracies = [r["target_accuracy"] for r in result.history]
    assert result.history[-1]["step"] < 400
    assert result.target_accuracy == max(accuracies)
    x, y = VAL
    assert (forward_logits(model, x).argmax(1) == y).float().mean().item() == pytest.approx(
        max(accuracies)
    )


def test_a_function_of_the_model_can_measure_the_source():
    result = fast.finetune(ConvNet(), TRAIN, source=lambda model: 0.25, steps=2)
    assert result.source_accuracy == result.source_accuracy_before == 0.25


def test_the_batch_transform_is_for_training_only():
    sizes = []

    def flip(x):
        sizes.append(len(x))
        return x.flip(-1)

    fast.finetune(ConvNet(), TRAIN, VAL, steps=3, transform=flip)
    assert sizes == [32, 32, 32]  # half of the places rehearse where there are few samples


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_clipping_and_schedules_run(optimizer):
    result = fast.finetune(
        ConvNet(),
        TRAIN,
        VAL,
        steps=20,
        optimizer=optimizer,
        max_grad_norm=0.5,
        warmup=4,
        schedule="constant",
        rehearse=0.0,  # whose restraint moves the rate
        weight_decay=0.01,
        lr=1e-2,
        eval_every=2,
    )
    assert result.history[1]["lr"] < result.history[-1]["lr"] == pytest.approx(1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_mixed_precision_keeps_weights_in_fp32(precision):
    model = ConvNet()
    result = fast.finetune(model, TRAIN, VAL, steps=40, lr=1e-2, precision=precision)
    assert result.target_accuracy > 0.5
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_saved_model_loads_into_the_plain_architecture(tmp_path):
    model = ConvNet()
    result = fast.finetune(model, TRAIN, VAL, steps=10, output=str(tmp_path / "run"))
    folder = result.save(tmp_path / "saved")
    plain = ConvNet(num_classes=4).eval()
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.allclose(plain(VAL[0]), model(VAL[0]), atol=1e-4)
    record = json.loads((folder / "result.json").read_text())
    assert record["target_accuracy"] == result.target_accuracy
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


class Wrapping(nn.Module):
    """A part of it is called `module`, and it is no wrapper for all that."""

    def __init__(self):
        super().__init__()
        self.module, self.fc = nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.module(x).relu())


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile])
def test_a_network_with_a_part_called_module_is_saved_whole(tmp_path, wrap):
    model = Wrapping()
    result = fast.finetune(model, TRAIN, steps=2)
    result.model = wrap(model)
    record = load_file(result.save(tmp_path) / "model.safetensors")
    assert set(record) == {"module.1.weight", "module.1.bias", "fc.weight", "fc.bias"}
    assert (tmp_path / "source_head.safetensors").is_file()


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_distillation_keeps_the_answers_of_the_source_head(name, kind):
    """At a large weight the source's answers to the training inputs hardly change."""
    torch.manual_seed(0)
    source = {"method": "vanilla", "steps": 60, "lr": 1e-2}
    start = fast.finetune(IMAGE_NETWORKS[name](), images(300, 5, seed=3), **source).model
    fast.fold_head(start).eval()
    x, _ = TRAIN
    before = start(x).softmax(1)
    train = TRAIN if kind == "tensors" else DataLoader(TensorDataset(*TRAIN), batch_size=60)
    change = {}
    for weight in (0.0, 100.0):
        model = copy.deepcopy(start)
        options = {"anchor_decay": 0.0, "stall": 0, "ramp": 0, "head_steps": 0, "lr": 1e-2}
        options |= {"steps": 40, "rehearse": 0.0}
        fast.finetune(model, train, num_classes=4, distill=weight, **options)
        with fast.source_task(model):
            change[weight] = (model(x).softmax(1) - before).abs().mean().item()
    assert change[100.0] < 0.3 * change[0.0]


def test_distillation_adds_up_over_micro_batches():
    start = ConvNet().double()
    train = (TRAIN[0].double(), TRAIN[1])
    runs = []
    for parts in (1, 4):
        model = copy.deepcopy(start)
        options = {"method": "vanilla", "distill": 2.0, "grad_accum_steps": parts}
        fast.finetune(model, train, steps=6, **options)
        runs.append(torch.cat([v.double().flatten() for v in weights(model).values()]))
    assert torch.allclose(*runs, rtol=1e-4, atol=1e-6)
    assert not task_head(model)._forward_pre_hooks
