"""Runs of FastTrainer on every rank: `python -m trainer_runs FOLDER`; not collected itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import torchvision_ops

torchvision_ops.declare()
torch.set_num_threads(1)

from trainer_cases import CASES, STEPS, trainer  # noqa: E402

PARTS = {"bert": 1, "vit": 2}


def run(folder, name, ranks=1, resume=None, steps=STEPS):
    """Each step takes 16 samples, of all ranks and micro-batches."""
    args = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 16 // ranks // PARTS[name],
        "gradient_accumulation_steps": PARTS[name],
        "save_steps": 5,
    }
    make, data = CASES[name]
    # 80 samples make whole epochs, so that every rank has as many in each step.
    done = trainer(
        folder, name, model=make().double(), args=args, train_dataset=data(80, 5, 1), distill=0.2
    )
    done.train(resume_from_checkpoint=resume)
    return done


def main(folder):
    number, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    for name in CASES:
        output = Path(folder) / name
        for again in (None, str(output / "checkpoint-5")):
            done = run(output, name, number, again)
            outcome = {
                "weights": done.model.state_dict(),
                "source": done.source_accuracy,
                "evaluations": [r for r in done.state.log_history if "eval_accuracy" in r],
            }
            kind = "again" if again else "whole"
            torch.save(outcome, Path(folder) / f"{name} {kind} {rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
