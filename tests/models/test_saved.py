"""The files of a saved result belong together."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

import fast
from fast.models.saved import load_saved
from fast.models.weights import load_weights
from networks import ConvNet, TextNet, images, sentences

TRAIN, VAL = images(64, 4, seed=1), images(30, 4, seed=2)


def start():
    torch.manual_seed(0)
    return ConvNet()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    kept = images(24, 5, seed=3)[0]
    for name, lr in (("a", 1e-3), ("b", 1e-2)):
        result = fast.finetune(start(), TRAIN, VAL, steps=3, lr=lr, source_inputs=kept)
        result.save(folder / name)
    return folder


@pytest.fixture
def folders(results, tmp_path):
    shutil.copytree(results, tmp_path / "results")
    return tmp_path / "results"


class Versioned(ConvNet):
    """It loads no state that does not say its version, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        assert metadata["version"] == 2
        super()._load_from_state_dict(state, prefix, metadata, *others)


def load(folder):
    return load_saved(folder, start(), VAL[0][:2])


FILES = [
    "model.safetensors",
    "source_head.safetensors",
    "source_norms.safetensors",
    "fast.json",
    "result.json",
    "history.jsonl",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["of another run", "one bit"])
def test_a_file_that_is_not_what_was_saved_is_refused(folders, name, kind):
    file = folders / "a" / name
    data = bytearray((folders / ("b" if kind == "of another run" else "a") / name).read_bytes())
    if kind == "one bit" or data == file.read_bytes():
        data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged, or was not saved together with"):
        load(folders / "a")


def test_the_manifest_is_needed_and_knows_itself(folders):
    file = folders / "a" / "manifest.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"run": "another"}))
    with pytest.raises(ValueError, match=r"manifest.json is damaged or was changed: its checksum"):
        load(folders / "a")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json: its result was not"):
        load(folders / "a")


def test_a_file_that_does_not_belong_is_refused(folders):
    (folders / "a" / "job.json").write_text("{}")
    with pytest.raises(ValueError, match=r"job.json is damaged, or was not saved together"):
        load(folders / "a")


def test_a_file_that_was_taken_away_is_said(folders):
    (folders / "b" / "source_head.safetensors").unlink()
    assert "has no source_head.safetensors" in load(folders / "b").note


def test_saving_again_replaces_the_whole(folders):
    result = fast.finetune(start(), TRAIN, steps=3, batch_norm="frozen")
    result.save(folders / "a")
    assert load(folders / "a").source is not None
    assert not (folders / "a" / "source_norms.safetensors").exists()


def test_nothing_of_an_earlier_network_stays_beside_a_later_one(tmp_path):
    result = fast.finetune(start(), TRAIN, VAL, steps=1)
    result.save(tmp_path)
    assert load(tmp_path).source is not None
    fast.fold_head(result.model)
    result.save(tmp_path)
    networks = load(tmp_path)
    assert (networks.source, networks.note) == (None, f"{tmp_path} has no source_head.safetensors")


def test_norms_that_the_network_lacks_are_not_missing_from_the_folder(tmp_path):
    """The option asks for norms per task, and the plan knows that there are none."""
    train, source = sentences(40, 4), sentences(20, 5)
    with pytest.warns(UserWarning, match="batch_norm='per_task' is not used"):
        result = fast.finetune(TextNet(5), train, steps=2, batch_norm="per_task")
    result.save(tmp_path / "run")
    loaded = fast.load(tmp_path / "run", TextNet(5))
    assert 0 <= loaded.evaluate(source, task="source").accuracy <= 1


@pytest.mark.parametrize("method", ["fast", "adapter"])
def test_a_network_that_asks_a_state_for_its_version_gets_it(method, tmp_path):
    if method == "adapter":
        pytest.importorskip("peft", reason="adapters are its layers")
    torch.manual_seed(0)
    start = Versioned()
    options = {"steps": 4, "eval_every": 1, "patience": 1, "method": method}
    result = fast.finetune(copy.deepcopy(start), TRAIN, VAL, output=tmp_path / "run", **options)
    again = fast.finetune(copy.deepcopy(start), TRAIN, VAL, resume=tmp_path / "run", **options)
    x, answers = VAL[0], result.predict(VAL[0]).logits
    assert torch.equal(again.predict(x).logits, answers)
    result.save(tmp_path / "saved")
    loaded = fast.load(tmp_path / "saved", Versioned())
    torch.testing.assert_close(loaded.predict(x).logits, answers, rtol=1e-4, atol=1e-5)
    loaded.export(tmp_path / "served", "safetensors")
    plain = Versioned(4).eval()
    load_weights(plain, tmp_path / "served" / "model.safetensors")
    torch.testing.assert_close(plain(x), answers, rtol=1e-4, atol=1e-5)
    network = load_saved(tmp_path / "saved", Versioned(), x[:2]).source
    with fast.source_task(result.model), torch.no_grad():
        torch.testing.assert_close(network.eval()(x), result.model(x), rtol=1e-4, atol=1e-5)
