"""What `TrainingArguments` decides of a FastTrainer, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fast
from fast.adapt.defaults import LAYER_NORM_LR, SETTLED
from fast.heads import task_head

transformers = pytest.importorskip("transformers", reason="the Trainer is its")
pytest.importorskip("datasets", reason="its tables are the Trainer's data")
pytest.importorskip("accelerate", reason="the Trainer needs it")
sys.path.insert(0, str(Path(__file__).parent))

from trainer_cases import (  # noqa: E402
    CASES,
    CLASSES,
    SOURCE_CLASSES,
    STEPS,
    bert,
    texts,
    trainer,
    weights,
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, name, smoothing):
    """72 samples: the last step of an epoch has fewer, and accumulates fewer micro-batches."""
    finals = []
    for size, parts in ((16, 1), (8, 2)):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        args |= {"save_strategy": "no", "eval_strategy": "no", "label_smoothing_factor": smoothing}
        make = CASES[name][0]
        run = trainer(tmp_path, name, model=make().double(), args=args, source_eval=None)
        run.train()
        assert run.adaptation.done == STEPS
        finals.append(weights(run.model))
    # The statistics of the normaliser are kept in float32.
    torch.testing.assert_close(*finals, rtol=1e-5, atol=3e-7)


def test_the_arguments_rule_the_optimizer(tmp_path):
    run = trainer(tmp_path)
    assert run.adaptation.plan.lr == pytest.approx(LAYER_NORM_LR * (STEPS / SETTLED) ** 2)
    run.create_optimizer_and_scheduler(STEPS)
    assert isinstance(run.optimizer, fast.AdamW)
    assert run.lr_scheduler.get_last_lr() != [0.0]
    args = {
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 4,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_epsilon": 1e-6,
    }
    run = trainer(tmp_path, args=args)
    plan = run.adaptation.plan
    assert (plan.lr, plan.schedule, plan.warmup) == (3e-4, "constant", 4)
    run.create_optimizer_and_scheduler(STEPS)
    assert run.lr_scheduler.get_last_lr()[0] == 0  # the Trainer's warm-up starts there
    assert {(g["betas"], g["eps"]) for g in run.optimizer.param_groups} == {((0.8, 0.999), 1e-6)}
    # None of biases; that of the new head is its own.
    assert {g["weight_decay"] for g in run.optimizer.param_groups} == {0.0, 0.1, 1.0}
    run.train()
    assert run.adaptation.done == STEPS


def test_epochs_are_counted_as_the_trainer_counts_them(tmp_path):
    args = {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 8}
    run = trainer(tmp_path, args=args | {"gradient_accumulation_steps": 4, "eval_strategy": "no"})
    assert run.adaptation.plan.target_size == 32
    run.train()
    assert run.state.max_steps == run.adaptation.plan.steps == run.adaptation.done == 5


def test_any_optimizer_of_the_trainer_gets_the_pull(tmp_path):
    run = trainer(tmp_path, args={"optim": "rmsprop", "learning_rate": 1e-3})
    run.train()
    assert isinstance(run.adaptation.optimizer, torch.optim.RMSprop)
    assert run.result.final["drift"] > 0
    again = trainer(tmp_path, args={"optim": "rmsprop", "learning_rate": 1e-3})
    again.train(resume_from_checkpoint=True)  # of the last step, which is within an epoch
    assert again.state.global_step == again.adaptation.done == STEPS
    assert torch.equal(weights(run.model), weights(again.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "steps: set max_steps of TrainingArguments"),
        ({"shard": True}, "shard: the Trainer wraps the network in DistributedDataParallel"),
        ({"args": {"bf16_full_eval": True}}, "bf16_full_eval of TrainingArguments"),
        ({"args": {"auto_find_batch_size": True}}, "auto_find_batch_size of TrainingArguments"),
        ({"args": {"neftune_noise_alpha": 5.0}}, "neftune_noise_alpha of TrainingArguments"),
        ({"optimizers": (None, None)}, "takes no optimizers: set optim of TrainingArguments"),
        ({"model_init": bert}, "takes no model_init: pass the pretrained model itself"),
        ({"id2label": {0: "a", 7: "b"}}, "id2label must name the classes 0 to 4"),
        ({"forget_budget": 1, "source_inputs": None}, "forget_budget needs source_inputs"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_as_it_was(tmp_path, options, message):
    model = bert()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model, **options)
    assert model.num_labels == model.config.num_labels == SOURCE_CLASSES
    assert list(model.state_dict()) == list(bert().state_dict())
    assert torch.equal(weights(model), weights(bert()))


def test_a_head_without_bias_is_refused(tmp_path):
    model = bert()
    model.classifier = torch.nn.Linear(16, SOURCE_CLASSES, bias=False)
    model.bfloat16()
    with (
        pytest.raises(ValueError, match="give the head a bias, or set max_entropy=False"),
        pytest.warns(UserWarning, match="too coarse for the steps"),
    ):
        trainer(tmp_path, model=model)
    assert task_head(model) is None
    assert weights(model).dtype == torch.bfloat16
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_data_without_row_numbers_are_refused(tmp_path):
    stream = texts(72, CLASSES, 1).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset is iterable only"):
        trainer(tmp_path, train_dataset=stream)
