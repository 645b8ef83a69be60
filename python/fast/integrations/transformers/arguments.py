"""Translate `TrainingArguments` into options of `fast.Adaptation`."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from fast.adapt.config import AdaptOptions
from fast.integrations.transformers.files import STATE_FILE

# Options of `fast.Adaptation` that `TrainingArguments` has, under these names.
ELSEWHERE = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "warmup": "warmup_steps",
    "weight_decay": "weight_decay",
}
# Arguments of `transformers.Trainer` that `FastTrainer` has not.
OF_TRAINER = {
    "optimizers": "set optim of TrainingArguments, or use FastCallback in a Trainer of yours",
    "optimizer_cls_and_kwargs": "set optim of TrainingArguments",
    "optimizer": "set optim of TrainingArguments",
    "model_init": "pass the pretrained model itself, and make a new trainer for each run",
    "tokenizer": "pass it as processing_class",
}
REFUSED = {
    "auto_find_batch_size": "the plan counts steps of one size; leave it out",
    "bf16_full_eval": "it casts the weights; bf16=True evaluates under autocast",
    "fp16_full_eval": "it casts the weights; fp16=True evaluates under autocast",
    "deepspeed": "it trains copies of the weights; leave it out",
    "fsdp": "it shards the weights; leave it out",
    "neftune_noise_alpha": "features that are kept would seem to move by its noise; leave it out",
}
DEFAULTS = {f.name: f.default for f in fields(TrainingArguments)}


def check_options(options: AdaptOptions) -> None:
    """Raise ValueError for an option that belongs to `TrainingArguments`, or to other Trainers."""
    for name in sorted(OF_TRAINER.keys() & options.keys()):
        raise ValueError(f"FastTrainer takes no {name}: {OF_TRAINER[name]}")
    for name in sorted(ELSEWHERE.keys() & options.keys()):
        raise ValueError(f"{name}: set {ELSEWHERE[name]} of TrainingArguments")


def check_arguments(args: TrainingArguments, model: nn.Module, options: AdaptOptions) -> None:
    """Raise ValueError for what the method cannot do inside the Trainer."""
    for name, reason in REFUSED.items():
        if getattr(args, name, None):
            raise ValueError(f"{name} of TrainingArguments: {reason}")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process and {args.n_gpu} GPUs would be torch's DataParallel: start a process for "
            f"each GPU (torchrun --nproc-per-node {args.n_gpu}), or set CUDA_VISIBLE_DEVICES"
        )
    if options.get("shard"):
        raise ValueError(
            "shard: the Trainer wraps the network in DistributedDataParallel; use fast.finetune or "
            "fast.Adaptation in a loop of yours"
        )
    if args.load_best_model_at_end and args.save_only_model:
        raise ValueError(f"load_best_model_at_end reads {STATE_FILE}: leave save_only_model out")
    if hasattr(model, "peft_config"):
        raise ValueError(
            "model is a PEFT model, whose head and adapters are saved apart: use fast.Adaptation "
            "in a loop of yours, or merge_and_unload()"
        )


def adaptation_options(args: TrainingArguments, batches: int, options: AdaptOptions) -> Any:
    """The user's options, together with those that `args` decides.

    Args:
        batches: the number of the Trainer's batches in an epoch.
        options: the user's own options.
    """
    steps = _num_steps(args, batches)
    own = dict(options)
    if not plan_schedules(args, options) and args.lr_scheduler_type.startswith("constant"):
        own["schedule"] = "constant"
    if args.learning_rate != DEFAULTS["learning_rate"]:
        own.setdefault("lr", args.learning_rate)
    return own | {
        "steps": steps,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "grad_accum_steps": args.gradient_accumulation_steps,
        "seed": args.seed,
        "warmup": args.get_warmup_steps(steps),
        "weight_decay": args.weight_decay,
    }


def plan_schedules(args: TrainingArguments, options: AdaptOptions) -> bool:
    """Whether the plan's schedule is used, and not the Trainer's own scheduler."""
    return "schedule" in options or args.lr_scheduler_type == DEFAULTS["lr_scheduler_type"]


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The dtype of forward passes under the Trainer's mixed precision, or None."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None


def _num_steps(args: TrainingArguments, batches: int) -> int:
    """Optimizer steps of the run, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * per_epoch)
