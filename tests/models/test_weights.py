"""Checkpoints as trainers write them: wrapped, prefixed, or of something else."""

import argparse

import pytest
import torch
from torch import nn

from fast.models.weights import load_weights
from helpers import same_state


def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = build()


@pytest.fixture
def state():
    return {name: torch.rand_like(value) for name, value in build().state_dict().items()}


def loads(net, state, stored, path, **options):
    torch.save(stored, path)
    notes = load_weights(net, path, **options)
    own = net.state_dict()
    assert same_state({name: own[name] for name in state}, state)
    return notes


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net."])
def test_prefixes_of_wrappers(state, prefix, tmp_path):
    stored = {prefix + name: value for name, value in state.items()}
    assert loads(build(), state, {"state_dict": stored}, tmp_path / "w.pt") == []


def test_a_prefix_of_the_network(state, tmp_path):
    own = {f"backbone.{name}": value for name, value in state.items()}
    (note,) = loads(Wrapped(), own, state, tmp_path / "w.pt")
    assert note.endswith("its names lack backbone.")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"net": state, "epoch": 3},
        lambda state: {"checkpoint": {"model": state}},
        lambda state: {"anything": state, "optimizer": {"state": {}, "param_groups": []}},
        lambda state: {"state_dict_ema": state},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.999))},
    ],
)
def test_keys_of_trainers(state, wrap, tmp_path):
    assert loads(build(), state, wrap(state), tmp_path / "w.pt") == []


def test_averaged_weights_are_used_and_told(state, tmp_path):
    stored = {"state_dict": build().state_dict(), "state_dict_ema": state}
    (note,) = loads(build(), state, stored, tmp_path / "w.pt")
    assert "the weights under 'state_dict_ema' are used, not state_dict" in note


def test_how_much_was_loaded_is_told(state, tmp_path):
    del state["2.bias"]
    (note,) = loads(build(), state, state, tmp_path / "w.pt", allow_missing=True)
    assert "3 of 4 tensors loaded, 1 tensor missing" in note


def test_a_program_is_no_state(tmp_path):
    """torch's own message advises to run its code."""
    torch.jit.trace(build(), torch.zeros(1, 4)).save(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: is a TorchScript program; save its weights, if"):
        load_weights(build(), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {f"other.{n}": v for n, v in s.items()}, "none of its 4 tensors is one of this"),
        (
            lambda s: {f"{p}.{n}": v for p in ("student", "teacher") for n, v in s.items()},
            "holds several networks, student. and teacher.",
        ),
        (lambda s: {"a": s, "b": s}, "holds no state dict of tensors, several: a, b"),
        (lambda s: s | {"2.bias": torch.ones(3, dtype=torch.int8)}, "are no floats: 2.bias"),
        (lambda s: s | {"2.bias": torch.ones(3, dtype=torch.complex64)}, "are no floats: 2.bias"),
    ],
)
@pytest.mark.parametrize("allow_missing", [False, True])
def test_what_cannot_be_meant_is_refused(state, change, message, allow_missing, tmp_path):
    torch.save(change(state), tmp_path / "w.pt")
    net = build()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(net, tmp_path / "w.pt", allow_missing=allow_missing)
    assert same_state(net, before)
