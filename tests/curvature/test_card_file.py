"""Cards of strangers, and damaged ones: one line that names the file, and nothing allocated."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fast
from fast.curvature.card import Codes
from fast.curvature.card.calibrate import Calibration
from fast.curvature.card.file import fingerprint

Facts = dict[str, Any]


def card() -> fast.SourceCard:
    values = {"a.weight": torch.arange(300.0).view(20, 15), "b": torch.ones(3)}
    return fast.SourceCard(
        entries={n: Codes.of(v) for n, v in values.items()},
        fingerprints={n: fingerprint(v) for n, v in values.items()},
        num_samples=60,
        labels="sampled",
        temperature=3.0,
        calibration=Calibration(
            scale=2.0, exponent=1.0, spread=1.5, coherence=float("nan"), points=((1e-3, 2e-3),)
        ),
    )


def rewrite(path: Path, change: Callable[[Facts, dict[str, torch.Tensor]], Any]) -> None:
    """Change the fields or the tensors of a card; the checksum is left out."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        keys = file.keys()
        tensors = {k: file.get_tensor(k) for k in keys}
    facts = json.loads(metadata["card"])
    result = change(facts, tensors)
    metadata["card"] = result if isinstance(result, str) else json.dumps(facts)
    del metadata["checksum"]
    save_file(tensors, path, metadata)


def put(*keys: str, value: Any) -> Callable[[Facts, Any], None]:
    def change(facts: Facts, _: Any) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        facts[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[Facts, Any], None]:
    def change(facts: Facts, _: Any) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        del facts[keys[-1]]

    return change


def tensor(key: str, value: torch.Tensor | None) -> Callable[[Any, dict[str, torch.Tensor]], None]:
    def change(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value

    return change


HOSTILE: dict[str, Callable[..., Any]] = {
    "shape of a terabyte": put("shapes", "b", value=[10**12]),
    "shape of no number": put("shapes", "b", value=["3"]),
    "negative shape": put("shapes", "b", value=[-3]),
    "shapes of another tensor": put("shapes", "c", value=[3]),
    "shapes a list": put("shapes", value=[]),
    "no fingerprints": drop("fingerprints"),
    "no calibration": drop("calibration"),
    "no scale": drop("calibration", "scale"),
    "fingerprint too short": put("fingerprints", "b", value="12"),
    "temperature NaN": put("temperature", value=float("nan")),
    "temperature infinite": put("temperature", value=float("inf")),
    "temperature as long as a page": put("temperature", value=10**400),
    "scale NaN": put("calibration", "scale", value=float("nan")),
    "scale negative": put("calibration", "scale", value=-1.0),
    "exponent": put("calibration", "exponent", value=1e308),
    "spread": put("calibration", "spread", value=None),
    "points": put("calibration", "points", value=[[1.0]]),
    "calibration a list": put("calibration", value=[1]),
    "samples a word": put("num_samples", value="many"),
    "samples a truth": put("num_samples", value=True),
    "labels": put("labels", value=["sampled"]),
    "accuracy": put("source_accuracy", value=7),
    "private": put("_anchors", value={"b": [0.0]}),
    "unknown": put("extra", value=1),
    "nested": lambda facts, tensors: "[" * 100_000,
    "a list": lambda facts, tensors: "[]",
    "no JSON": lambda facts, tensors: "{",
    "codes cut short": tensor("a.weight:codes", torch.zeros(2, dtype=torch.uint8)),
    "codes of floats": tensor("b:codes", torch.zeros(3)),
    "no codes": tensor("b:codes", None),
    "one tensor more": tensor("c:codes", torch.zeros(3, dtype=torch.uint8)),
    "scales short": tensor("a.weight:scales", torch.ones(1)),
    "scales NaN": tensor("b:scales", torch.tensor([float("nan")])),
    "scales infinite": tensor("b:scales", torch.tensor([float("inf")])),
}


@pytest.mark.filterwarnings("ignore:source card .* has no checksum")
@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_card_says_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = card().save(tmp_path / "card.safetensors")
    rewrite(path, HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"card\.safetensors") as caught:
            fast.SourceCard.load(path)
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.filterwarnings("error")
def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    path = card().save(tmp_path / "card.safetensors")
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, 8 * len(whole), (300,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        # The warning is of a flip in the word "checksum" itself.
        with pytest.raises((ValueError, UserWarning), match=r"card\.safetensors"):
            fast.SourceCard.load(path)


def test_a_card_without_a_checksum_is_read_with_a_warning(tmp_path: Path) -> None:
    path = card().save(tmp_path / "card.safetensors")
    rewrite(path, lambda facts, tensors: None)
    with pytest.warns(UserWarning, match="has no checksum"):
        old = fast.SourceCard.load(path)
    assert torch.equal(old.diagonal()["b"], card().diagonal()["b"])


def test_representations_are_short() -> None:
    result = card()
    assert repr(result) == "SourceCard(303 weights in 2 tensors, 60 samples, labels 'sampled')"
    assert repr(result.entries["b"]) == "Codes([3])"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": "many"}, "num_samples must be a whole number; got 'many'"),
        ({"calibration_samples": 0}, "calibration_samples must be at least 2"),
        ({"temperature": float("nan")}, "temperature must be positive and finite"),
        ({"temperature": "hot"}, "temperature must be positive and finite; got 'hot'"),
    ],
)
def test_options_of_an_estimate(change: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=message):
        fast.SourceCard.estimate(model, torch.randn(8, 4), **change)
