"""The device of a run: tried out before anything is read."""

import pytest
import torch

import fast
from fast.models.device import pick_device
from networks import ConvNet, images


def test_the_environment_names_the_default(monkeypatch):
    monkeypatch.setenv("FAST_DEVICE", "nowhere")
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used here"):
        pick_device(None)
    assert pick_device("cpu").type == "cpu"


def test_devices_that_are_there(monkeypatch):
    monkeypatch.delenv("FAST_DEVICE")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device(None).type == expected
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_devices_that_are_not(name):
    with pytest.raises(ValueError, match=f"device '{name}' cannot be used here: there is cpu"):
        pick_device(name)


def test_finetune_changes_nothing_on_a_device_that_is_not_there():
    net = ConvNet()
    before = list(net.state_dict())
    with pytest.raises(ValueError, match="device 'gpu' cannot be used here"):
        fast.finetune(net, images(20, 3), steps=2, device="gpu")
    assert list(net.state_dict()) == before
