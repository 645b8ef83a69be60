"""Estimate a source card: the diagonal from squared gradients, and what it means in nats."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fast.curvature.card.answers import Answers, backbone_parameters
from fast.curvature.card.calibrate import calibrate
from fast.curvature.card.codes import Codes
from fast.curvature.card.file import fingerprint
from fast.curvature.losses.loss import Loss
from fast.curvature.losses.recognise import recognise
from fast.curvature.network.network import Params, select
from fast.curvature.operators.fisher_diagonal import LABELS, fisher_diagonal
from fast.data.finite import check_finite_inputs
from fast.data.source_inputs import SourceInputs
from fast.heads import evaluating, source_task, unwrap
from fast.heads.forward import input_errors
from fast.heads.outputs import source_logits

TEMPERATURE = 3.0
BATCH = 64
IGNORE_INDEX = -100  # the label that torch leaves out


def estimate_fields(
    model: nn.Module,
    data: Any,
    loss_fn: Any,
    *,
    labels: str,
    num_samples: int,
    calibration_samples: int,
    temperature: float,
    coherence: bool,
    seed: int,
    params: Params,
) -> tuple[dict[str, Any], dict[str, nn.Parameter]]:
    """The fields of a card, and the backbone's parameters by name; see `SourceCard.estimate`."""
    start = time.monotonic()
    _check_options(labels, temperature, num_samples, calibration_samples)
    model = unwrap(model)
    samples = _samples(model, data, labels, num_samples)
    backbone = backbone_parameters(model, samples.part(0, 2).inputs)
    if params is not None:
        backbone = {n: backbone[n] for n in select(backbone, params)}
    diagonal = _diagonal(model, samples, backbone, loss_fn, labels, temperature, seed)
    probe = samples.part(0, calibration_samples)
    calibration = calibrate(
        model, backbone, diagonal, probe, temperature if coherence else None, seed
    )
    loss = accuracy = None
    if samples.labels is not None:
        loss, accuracy = _performance(model, samples, recognise(loss_fn))
    fields = {
        "entries": {n: Codes.of(d) for n, d in diagonal.items()},
        "fingerprints": {n: fingerprint(p) for n, p in backbone.items()},
        "num_samples": samples.size,
        "labels": labels,
        "temperature": temperature,
        "calibration": calibration,
        "source_loss": loss,
        "source_accuracy": accuracy,
        "seconds": round(time.monotonic() - start, 2),
    }
    return fields, backbone


def _check_options(
    labels: str, temperature: float, num_samples: int, calibration_samples: int
) -> None:
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {LABELS}; got {labels!r}")
    if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature!r}")
    numbers = {"num_samples": num_samples, "calibration_samples": calibration_samples}
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 2:
            raise ValueError(f"{name} must be at least 2, a whole number; got {number!r}")


def _samples(model: nn.Module, data: Any, labels: str, num_samples: int) -> SourceInputs:
    """Samples of the data, on the model's device, for which it gives finite answers."""
    samples = SourceInputs.parse(data, num_samples)
    if labels == "data" and samples.labels is None:
        raise ValueError("labels='data' needs labelled data (x, y); or use 'sampled'")
    samples = samples.to(next(model.parameters()).device)
    check_finite_inputs(samples.inputs, "source data")
    with input_errors("source data", samples.inputs, model):
        first = source_logits(model, samples.part(0, 2))
    if not first.isfinite().all():
        raise ValueError(
            "source data: the network's answers are not finite (NaN or infinite), the inputs "
            "are: look at its weights and at the scale of the inputs"
        )
    return samples


def _performance(
    model: nn.Module, samples: SourceInputs, loss: Loss
) -> tuple[float | None, float | None]:
    """Loss and accuracy of the samples; None where the source head cannot give their labels."""
    answers, labels = source_logits(model, samples), samples.labels
    assert labels is not None
    # Other labels belong to a skill that the features have and the source head has not.
    if labels.shape != answers.argmax(1).shape or int(labels.max()) >= answers.shape[1]:
        return None, None
    counts = labels != getattr(loss, "ignore_index", IGNORE_INDEX)
    right = (answers.argmax(1) == labels)[counts].float().mean()
    return float(loss.value(answers, labels)), float(right)


def _diagonal(
    model: nn.Module,
    samples: SourceInputs,
    params: Mapping[str, nn.Parameter],
    loss_fn: Any,
    labels: str,
    temperature: float,
    seed: int,
) -> dict[str, Tensor]:
    """`C_ii`: at temperature T the curvature of `T^2 KL` of the answers over T."""
    batches = [(x, y) if labels == "data" else (x, None) for x, y in samples.batches(BATCH)]
    with evaluating(model), source_task(model):
        network = Answers(model, temperature)
        names = [f"model.{n}" for n in params]
        diagonal = fisher_diagonal(network, loss_fn, batches, names, labels=labels, seed=seed)
    return {n: diagonal[f"model.{n}"] * temperature**2 for n in params}
