"""What was saved answers as it did, and code that a folder names is not run."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import fast
from fast.models.saved import read_options, write_manifest
from fast.models.saved.claim import claim
from interruption import Stopped, dying_at
from networks import ConvNet, SharedHead, TextNet, images, sentences


def test_both_tasks_are_answered_as_before_saving(adapted):
    loaded = fast.load(adapted.folder, ConvNet(7))
    assert repr(loaded) == "Predictor(ConvNet, 4 classes, takes arrays)"
    own, again = (p.predict(adapted.x).logits for p in (adapted.result, loaded))
    torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-5)  # its head was folded
    own, again = (p.predict(adapted.x, task="source").logits for p in (adapted.result, loaded))
    assert torch.equal(again, own)
    with fast.source_task(loaded.model), torch.no_grad():
        assert torch.equal(loaded.model(adapted.x), own)
    assert loaded.predict(adapted.x, task="source").classes == ["0", "1", "2", "3", "4"]


def test_a_network_that_was_adapted_is_loaded_into_and_joined(adapted):
    """README's example in one session: the network at hand has both heads already."""
    model = copy.deepcopy(adapted.result.model)
    own = adapted.result.predict(adapted.x).logits
    for _ in range(2):
        loaded = fast.load(adapted.folder, model)
        torch.testing.assert_close(loaded.predict(adapted.x).logits, own, rtol=1e-4, atol=1e-5)
    joined = fast.join(loaded, source_inputs=adapted.source, data=(adapted.x, adapted.y),
                       source_classes=list("abcde"))  # fmt: skip
    assert joined.classes == (*"abcde", *loaded.classes)


def test_the_source_task_takes_no_names_away(tmp_path):
    """A network of transformers numbered its classes once it had answered the source task."""
    x, y = sentences(48, 3)
    model = TextNet()
    model.config = SimpleNamespace(id2label=dict(enumerate("abcde")), label2id={})
    result = fast.finetune(model, (x, y), steps=2, batch_size=16)
    result.classes = ["x", "y", "z"]
    result.save(tmp_path)
    other = TextNet()
    other.config = SimpleNamespace(num_labels=5, id2label={}, label2id={})
    loaded = fast.load(tmp_path, other)
    assert loaded.predict(x, task="source").classes == [*"abcde"]
    with fast.source_task(loaded.model):
        assert loaded.model.config.id2label == dict(enumerate("abcde"))
    assert loaded.model.config.id2label == dict(enumerate("xyz"))
    assert loaded.model.config.num_labels == 3


def test_accuracies_are_those_of_the_run_to_the_last_digit(adapted):
    loaded = fast.load(adapted.folder, ConvNet())
    for predictor in (adapted.result, loaded):
        assert predictor.evaluate((adapted.x, adapted.y)).accuracy == adapted.result.target_accuracy
        source = predictor.evaluate(adapted.source, task="source")
        assert source.accuracy == adapted.result.source_accuracy


@pytest.mark.parametrize("network", [SharedHead, TextNet])
def test_networks_of_other_forms(network, tmp_path):
    x, y = sentences(48, 3) if network is TextNet else images(48, 3)
    result = fast.finetune(network(), (x, y), steps=2, batch_size=16)
    result.save(tmp_path / "run")
    loaded = fast.load(tmp_path / "run", network())
    torch.testing.assert_close(loaded.predict(x).logits, result.predict(x).logits)
    assert torch.equal(
        loaded.predict(x, task="source").logits, result.predict(x, task="source").logits
    )


def test_a_network_that_keeps_its_head_has_one_task(tmp_path):
    x, y = images(48, 5)
    result = fast.finetune(ConvNet(), (x, y), steps=2, batch_size=16, head="keep")
    result.save(tmp_path / "run")
    loaded = fast.load(tmp_path / "run", ConvNet())
    assert torch.equal(loaded.predict(x).logits, result.predict(x).logits)
    assert torch.equal(loaded.predict(x, task="source").logits, loaded.predict(x).logits)


def test_a_head_that_was_folded_answers_the_target_alone(adapted, tmp_path):
    shutil.copytree(adapted.folder, tmp_path / "run")
    (tmp_path / "run" / "source_head.safetensors").unlink()
    loaded = fast.load(tmp_path / "run", ConvNet())
    assert len(loaded.predict(adapted.x[:3])) == 3
    with pytest.raises(ValueError, match=r"source task cannot be .* has no source_head.safetensor"):
        loaded.predict(adapted.x, task="source")


def test_a_network_that_was_an_object_is_asked_for(adapted):
    with pytest.raises(ValueError, match=r"a ConvNet, was given as an object: .*model="):
        fast.load(adapted.folder)
    with pytest.raises(ValueError, match=r"is of another network|does not fit the head"):
        fast.load(adapted.folder, SharedHead())


def renamed(folder, name):
    """Change the name of the network in a result, with the hashes that go with it."""
    facts = json.loads((folder / "result.json").read_text())
    facts["network"]["name"] = name
    (folder / "result.json").write_text(json.dumps(facts))
    write_manifest(folder, None, {})


def test_code_that_a_folder_names_is_not_run(adapted, tmp_path):
    shutil.copytree(adapted.folder, tmp_path / "run")
    (tmp_path / "nets.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    renamed(tmp_path / "run", f"{tmp_path}/nets.py:Net()")
    with pytest.raises(ValueError, match=r"its network is code: look at it, and name it: model="):
        fast.load(tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_a_factory_that_is_named_is_run(adapted, tmp_path):
    (tmp_path / "nets.py").write_text("from networks import ConvNet\n")
    loaded = fast.load(adapted.folder, f"{tmp_path}/nets.py:ConvNet(3)")
    assert len(loaded.predict(adapted.x)) == len(adapted.x)


def as_written_before(folder):
    """Make of a result one of before fast.json: the options in config.json, and no descriptions."""
    (folder / "fast.json").rename(folder / "config.json")
    facts = json.loads((folder / "result.json").read_text())
    for name in ("network", "inputs"):
        del facts[name]
    (folder / "result.json").write_text(json.dumps(facts))
    (folder / "preprocessing.json").unlink()


def test_an_older_result_is_read(adapted, tmp_path):
    shutil.copytree(adapted.folder, tmp_path / "run")
    folder = tmp_path / "run"
    as_written_before(folder)
    images = {"size": 8, "resize": 8, "stretch": False, "interpolation": "bicubic",
              "mean": [0.5], "std": [0.25], "channels": 1}  # fmt: skip
    (folder / "data.json").write_text(json.dumps({"data": {}, "images": images}))
    (folder / "job.json").write_text(json.dumps({"model": "nets.py:Net"}))
    write_manifest(folder, None, {})
    assert read_options(folder)["method"] == "fast"
    with pytest.raises(ValueError, match="its network is code"):
        fast.load(folder)
    loaded = fast.load(folder, ConvNet(9))
    assert loaded.preparation.images.std == [0.25]
    source = loaded.evaluate(adapted.source, task="source")
    assert source.accuracy == adapted.result.source_accuracy


def test_a_library_configuration_is_no_options(adapted, tmp_path):
    shutil.copytree(adapted.folder, tmp_path / "run")
    (tmp_path / "run" / "fast.json").unlink()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "bert", "method": "x"}')
    assert read_options(tmp_path / "run") == {}


def test_an_older_run_goes_on(tmp_path):
    data, options = images(48, 4), {"steps": 6, "save_every": 3}
    torch.manual_seed(0)
    whole = fast.finetune(ConvNet(), data, output=tmp_path / "whole", **options)
    torch.manual_seed(0)
    with dying_at(4), pytest.raises(Stopped):
        fast.finetune(ConvNet(), data, output=tmp_path / "run", **options)
    (tmp_path / "run" / "fast.json").rename(tmp_path / "run" / "config.json")
    torch.manual_seed(0)
    again = fast.finetune(ConvNet(), data, resume=tmp_path / "run", **options)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_an_unfinished_run_is_said(tmp_path):
    fast.finetune(ConvNet(), images(48, 4), steps=2, output=tmp_path / "run")
    with pytest.raises(ValueError, match=r"has checkpoints and no result: go on .*resume='"):
        fast.load(tmp_path / "run", ConvNet())
    with claim(tmp_path / "run"), pytest.raises(ValueError, match="its run is going on"):
        fast.load(tmp_path / "run", ConvNet())
    (tmp_path / "run" / "job.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoints and no result: .*fast finetune --resume"):
        fast.load(tmp_path / "run", ConvNet())
    names = ("begun", "empty", "photo.jpg", "weights")
    begun, empty, file, weights = (tmp_path / name for name in names)
    begun.mkdir()
    (begun / "job.json").write_text("{}")
    with pytest.raises(ValueError, match=r"stopped before its first checkpoint: .*--resume"):
        fast.load(begun, ConvNet())
    empty.mkdir()
    file.touch()
    weights.mkdir()
    (weights / "model.safetensors").touch()
    for folder, message in (
        (weights, r"has weights alone: not a folder of .* read by the library"),
        (empty, r"has no model.safetensors: not a folder of"),
        (file, r"is a file, and a run is a folder"),
        (tmp_path / "none", r"none: no such folder"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            fast.load(folder, ConvNet())


def test_a_damaged_description_is_refused(adapted, tmp_path):
    shutil.copytree(adapted.folder, tmp_path / "run")
    (tmp_path / "run" / "preprocessing.json").write_text("{}")
    with pytest.raises(ValueError, match=r"preprocessing.json is damaged, or was not saved"):
        fast.load(tmp_path / "run", ConvNet())


def test_mirror_images_are_asked_as_in_the_run(tmp_path):
    x, y = images(48, 4)
    result = fast.finetune(ConvNet(), (x, y), (x, y), steps=2, batch_size=16, tta=True)
    result.save(tmp_path / "run")
    loaded = fast.load(tmp_path / "run", ConvNet())
    evaluation = loaded.evaluate((x, y))
    assert evaluation.accuracy == result.target_accuracy
    one, other = (loaded.predict(view).logits for view in (x, x.flip(3)))
    torch.testing.assert_close(evaluation.logits, (one + other) / 2)
    assert not torch.equal(evaluation.logits, one)
