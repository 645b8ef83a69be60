"""`fast rewind`: the classes of its data are those of the network that was tuned."""

import json

import numpy as np
import pytest

NAMES = np.array(["ant", "bee", "cat", "dog"])


@pytest.fixture
def tuned(job):
    """A job with a short run in `out` whose classes have names; `rewind(*args)` rewinds it."""
    arrays = dict(np.load("target.npz"))
    np.savez("target.npz", **arrays, classes=NAMES)
    code, _, err = job.fast("finetune", *job.args, "--steps", 20, "--lr", 0.01, "--output", "out")
    assert code == 0, err
    base = ["--model", "nets.py:Net(3)", "--base", "net.safetensors", "--source-inputs"]
    job.rewind = lambda *args: job.fast("rewind", *base, "source.npz", "--budget", 0.5, *args)
    job.arrays = arrays
    return job


def result_in(folder):
    return json.loads((folder / "result.json").read_text())


def save_reversed(file, arrays, names):
    """The same samples, with classes that are numbered the other way round."""
    y = {key: 3 - array for key, array in arrays.items() if key.startswith("y")}
    np.savez(file, **arrays | y, classes=names)


def test_classes_are_matched_by_name(tuned):
    save_reversed("reversed.npz", tuned.arrays, NAMES[::-1])
    for i, data in enumerate(("target.npz", "reversed.npz")):
        code, _, err = tuned.rewind("--tuned", "out", "--data", data, "--output", f"back{i}")
        assert code == 0, err
    first, second = (result_in(tuned.folder / f"back{i}") for i in range(2))
    assert first["target_accuracy"] == second["target_accuracy"] > 0.5
    assert first["classes"] == second["classes"] == list(NAMES)


def test_a_class_that_the_tuned_network_lacks_is_refused(tuned):
    save_reversed("others.npz", tuned.arrays, np.array(["elk", "cat", "bee", "ant"]))
    code, _, err = tuned.rewind("--tuned", "out", "--data", "others.npz", "--output", "back")
    assert code == 2
    assert "others.npz: classes that are none of the target's: elk; the run has ant, bee" in err
    assert not (tuned.folder / "back").exists()


@pytest.mark.filterwarnings("default::fast.data.sources.DataWarning")
def test_classes_that_are_taken_by_order_are_told(tuned):
    """Nothing says the classes of a file of weights alone."""
    image = pytest.importorskip("PIL.Image", reason="pictures need pillow")
    (tuned.folder / "out" / "model.safetensors").rename("tuned.safetensors")
    for i, label in enumerate(tuned.arrays["y_train"][:40]):
        folder = tuned.folder / "new" / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(tuned.arrays["x_train"][i]).save(folder / f"{i}.png")
    code, _, err = tuned.rewind("--tuned", "tuned.safetensors", "--data", "new", "--output", "back")
    assert code == 0, err
    assert "note: new: the classes ant, bee, cat and 1 more are taken in this order" in err


def test_a_second_rewind_leaves_the_first_as_it_is(tuned):
    for name in ("Net-data-rewind", "Net-data-rewind-2"):
        code, out, err = tuned.rewind("--tuned", "out")
        assert code == 0, err
        assert f"saved in runs/{name}" in out
    assert (tuned.folder / "runs" / "Net-data-rewind" / "model.safetensors").is_file()


def test_without_data_the_classes_are_those_of_the_tuned_network(tuned):
    code, _, err = tuned.rewind("--tuned", "out", "--output", "back")
    assert code == 0, err
    assert result_in(tuned.folder / "back")["classes"] == list(NAMES)
