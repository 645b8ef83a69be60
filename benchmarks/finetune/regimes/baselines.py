"""How each method of the table is trained: FAST by its own loop, the baselines by a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from benchmarks.common import Record
from benchmarks.finetune.regimes.samples import Task
from benchmarks.finetune.regimes.spd import AdamSPD
from benchmarks.finetune.regimes.wise_ft import line, trained
from fast.data.trees import pick
from fast.heads import features_of, find_head, has_batch_norm

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
# Inverse strengths of the penalty of a linear probe, chosen on a fifth of the training data.
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
HELD_OUT = 0.2
PROBE_BATCH = 125
# A run is measured at its sixths: often enough to see whether half of it would have done.
EVALUATIONS = 6


def finetune(task: Task, *, steps: int, **options: Any) -> Record:
    """`fast.finetune`: the history, and the accuracies of what it returns."""
    result = fast.finetune(
        task.model,
        task.train,
        task.val,
        task.source,
        steps=steps,
        eval_every=max(1, round(steps / EVALUATIONS)),
        progress=False,
        **task.options,
        **options,
    )
    keys = {"step": "step", "target": "target_accuracy", "source": "source_accuracy"}
    history = [{name: record[key] for name, key in keys.items()} for record in result.history]
    return {
        "history": history,
        "target": result.target_accuracy,
        "source": result.source_accuracy,
        "source_before": result.source_accuracy_before,
    }


def synthetic(task: Task, **options: Any) -> Record:
    """`fast.finetune` with synthetic inputs as source inputs; making them is part of the time."""
    inputs, _ = task.train
    return finetune(task, source_inputs=fast.synthetic_inputs(task.model, inputs), **options)


def loop(task: Task, *, each: Callable[[int], None] = lambda done: None, **options: Any) -> Record:
    """The same training in a plain loop, which is measured at its end alone: measuring a baseline
    as often as FAST would take as long as its run.

    Args:
        each: called after each step, with the number of steps done.
    """
    before = task.source_accuracy(task.model)
    torch.manual_seed(task.options["seed"])  # as `fast.finetune` does, which draws the head first
    adaptation = fast.Adaptation(task.model, task.train, **task.options, **options)
    task.model.train()
    for inputs, labels, rows in adaptation.batches():
        adaptation.schedule()
        logits, penalty = adaptation.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        adaptation.optimizer.step()
        adaptation.optimizer.zero_grad()
        each(adaptation.done)
    adaptation.finish()
    target, source = task.target_accuracy(task.model), task.source_accuracy(task.model)
    return {
        "history": [{"step": adaptation.done, "target": target, "source": source}],
        "target": target,
        "source": source,
        "source_before": before,
    }


def lp_ft(task: Task, *, steps: int, **options: Any) -> Record:
    """LP-FT, and the line of WiSE-FT from the end of its linear probe to its end.

    The probe's head is the one that fits the pretrained weights, so both ends are classifiers.
    """
    probe = max(1, round(steps / 6))
    start: dict[str, Tensor] = {}

    def keep(done: int) -> None:
        if done == probe:
            start.update(trained(task.model))

    record = loop(task, steps=steps, probe_steps=probe, each=keep, **options)
    return record | {"line": line(task, start, (record["target"], record["source"]))}


def spd(task: Task, **options: Any) -> Record:
    """LP-FT with selective projection decay in place of its optimizer."""
    return loop(task, optimizer=AdamSPD, **options)


def norm_only(task: Task, *, batch_norm: str, **options: Any) -> Record:
    """Norms and the head alone are trained (Mudrakarta et al. 2018, arXiv 1810.10703).

    With `per_task` every norm is switched, layer norms as well: what the source is measured with
    then are the weights from before the run, which are put back for it.
    """
    norms = [m for m in task.model.modules() if isinstance(m, NORMS)]
    if not norms:
        raise ValueError("norm-only needs a network with norms")
    task.model.requires_grad_(False)
    for norm in norms:
        norm.requires_grad_(True)
    before = trained(task.model)
    own = {"batch_norm": batch_norm} if has_batch_norm(task.model) else {}
    record = loop(task, **own, **options)
    if batch_norm == "per_task" and any(isinstance(m, nn.LayerNorm) for m in norms):
        with torch.no_grad():
            for name, p in task.model.named_parameters():
                if name in before:
                    p.copy_(before[name])
        record["source"] = task.source_accuracy(task.model)
    return record


def linear_probe(task: Task, **_: Any) -> Record:
    """Logistic regression on the features of the pretrained network, which stays what it was."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (inputs, labels), (val, val_labels) = task.train, task.val
    head = find_head(task.model, pick(inputs, slice(2))).module

    def features(rows: Any, count: int) -> Any:
        parts = (pick(rows, slice(i, i + PROBE_BATCH)) for i in range(0, count, PROBE_BATCH))
        return torch.cat([features_of(task.model, head, part) for part in parts]).numpy()

    x, y = features(inputs, len(labels)), labels.numpy()
    held_out = int(HELD_OUT * len(y))
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(task.options["seed"]))
    chosen, rest = rows[:held_out].numpy(), rows[held_out:].numpy()

    def probe(strength: float, part: Any) -> Any:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
        return model.fit(x[part], y[part])

    scores = {c: float(probe(c, rest).score(x[chosen], y[chosen])) for c in STRENGTHS}
    best = max(scores, key=lambda c: scores[c])
    target = float(probe(best, rows.numpy()).score(features(val, len(val_labels)), val_labels))
    source = task.source_accuracy(task.model)
    return {
        "history": [{"step": 0, "target": target, "source": source}],
        "target": target,
        "source": source,
        "source_before": source,
        "strength": best,
    }


RUNNERS: dict[str, Callable[..., Record]] = {
    "finetune": finetune,
    "synthetic": synthetic,
    "loop": loop,
    "lp_ft": lp_ft,
    "norm_only": norm_only,
    "spd": spd,
    "linear_probe": linear_probe,
}
