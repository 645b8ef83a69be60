"""`fast finetune` from files to files."""

import json
import runpy
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fast
from fast.cli.commands import finetune
from fast.train.trainer import Trainer

RUN = ("--steps", 30, "--eval-every", 10, "--lr", 0.01, "--output", "out")


def accuracy(net, data, split):
    arrays = np.load(data)
    x = (torch.from_numpy(arrays[f"x_{split}"]) / 255 - 0.5) / 0.5
    with torch.no_grad():
        predicted = net.eval()(x[:, None]).argmax(1)
    return (predicted == torch.from_numpy(arrays[f"y_{split}"])).float().mean().item()


def test_it_learns_and_the_saved_network_is_plain(job):
    code, out, err = job.fast("finetune", *job.args, *RUN)
    assert code == 0, err
    result = json.loads((job.folder / "out" / "result.json").read_text())
    assert result["target_accuracy"] > 0.9
    assert result["source_accuracy_before"] > 0.9
    assert result["classes"] == ["0", "1", "2", "3"]

    net = runpy.run_path("nets.py")["Net"](4)
    net.load_state_dict(load_file("out/model.safetensors"))
    assert accuracy(net, "target.npz", "test") == pytest.approx(result["target_accuracy"])

    rows = [line.split() for line in out.splitlines()]
    lines = (job.folder / "out" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert [record["step"] for record in history] == [0, 10, 20, 30]
    before, first = result["source_accuracy_before"], history[0]
    for row in (
        ["target", first["target_accuracy"], result["target_accuracy"], "80"],
        ["source", before, first["source_accuracy"], result["source_accuracy"], "90"],
    ):
        assert [f"{100 * x:.1f}" if isinstance(x, float) else x for x in row] in rows

    by_class = json.loads((job.folder / "out" / "data.json").read_text())["accuracy_by_class"]
    assert sum(by_class["samples"]) == 80
    assert sum(by_class["right"]) / 80 == result["target_accuracy"]
    log = (job.folder / "out" / "run.log").read_text()
    for told in ("measuring the source", "head start: ", "training", "step 30/30 (epoch "):
        assert told in log
        assert told in err


@pytest.mark.parametrize("method", ["vanilla", "l2-sp", "lp-ft"])
def test_methods_and_default_folder(job, method):
    code, out, err = job.fast("finetune", *job.args, "--steps", 4, "--method", method)
    assert code == 0, err
    assert f"saved in runs/Net-target-{method}" in out
    assert (job.folder / "runs" / f"Net-target-{method}" / "model.safetensors").exists()


def test_adapters_and_the_regime_that_is_asked_for(job):
    pytest.importorskip("peft", reason="peft is not installed")
    switched = ("--method", "adapter", "--tasks", "switched", "--adapter-rank", 4)
    code, _, err = job.fast("finetune", *job.args, *RUN, *switched)
    assert code == 0, err
    assert "two functions: adapters and batch norms are switched" in err
    result = json.loads((job.folder / "out" / "result.json").read_text())
    assert result["target_accuracy"] > 0.8
    assert result["source_accuracy"] == result["source_accuracy_before"]
    assert (result["plan"]["tasks"], result["plan"]["adapter_rank"]) == ("switched", 4)
    assert len(load_file("out/adapters.safetensors")["conv.A"]) == 4
    runpy.run_path("nets.py")["Net"](4).load_state_dict(load_file("out/model.safetensors"))
    code, out, err = job.fast("finetune", *job.args, "--plan", "--tasks", "together")
    assert code == 0, err
    assert "; one function" in out
    code, _, err = job.fast("finetune", *job.args, *switched[:2], "--tasks", "together")
    assert code == 2
    assert "method 'adapter' makes two" in err


def test_without_source(job):
    args = [a for a in job.args if a not in ("--source", "source.npz")]
    code, out, err = job.fast("finetune", *args, "--epochs", 1)
    assert code == 0, err
    assert "source" not in out.split("saved in")[0]


def test_what_may_be_forgotten_of_source_inputs(job):
    """Checked on them; their file is kept by its absolute path, to go on from anywhere."""
    known = (*job.args, "--source-inputs", "source.npz")
    for budget in (1e-4, "5%"):
        options = ("--forget-budget", budget, "--output", f"run{budget}")
        code, _, err = job.fast("finetune", *known, *RUN[:-2], *options)
        assert code == 0, err
        folder = job.folder / f"run{budget}"
        history = (folder / "history.jsonl").read_text().splitlines()
        assert json.loads(history[0])["forecast"] == 0
        assert json.loads(history[-1])["forecast"] <= (0.05 if budget == "5%" else budget)
        given = json.loads((folder / "job.json").read_text())
        assert given["source_inputs"] == str(job.folder / "source.npz")


def test_the_budget_is_printed_beside_what_was_lost(job):
    known = (*job.args, *RUN[:-2], "--source-inputs", "source.npz")
    code, out, err = job.fast("finetune", *known, "--forget-budget", "5%", "--output", "points")
    assert code == 0, err
    final = json.loads((job.folder / "points" / "result.json").read_text())["final"]
    lost = f"forget budget 5 %: {100 * final['forecast']:.2g} % lost at the end, measured on held"
    assert lost in out
    code, out, err = job.fast("finetune", *known, "--forget-budget", "0.01", "--output", "nats")
    assert code == 0, err
    assert "forget budget 0.01 nats: " in out
    code, out, err = job.fast("finetune", *known, "--output", "none")
    assert "forget budget" not in out


def test_classes_without_samples_are_said(job):
    y = np.load("target.npz")["y_train"]
    changed(y_train=np.where(y == 3, 9, y))(job.folder)
    code, _, err = job.fast("finetune", *job.args, "--steps", 2)
    assert code == 0, err
    assert "--data target.npz: 6 of 10 classes have no training sample (3, 4, 5 and 3 more)" in err


def test_what_source_inputs_measure_is_said(job):
    known = (*job.args, "--steps", 2, "--source-inputs")
    code, _, err = job.fast("finetune", *known, "source.npz")
    assert code == 0, err
    assert "note: --source-inputs source.npz: the same samples as --source: what is kept" in err
    assert "by its features" not in err
    code, _, err = job.fast("finetune", *known, "target.npz")  # labels 0..3
    assert code == 0, err
    assert "target.npz: label 3, and the network's own head has 3 classes: what is forgo" in err
    assert "the same samples" not in err


def test_a_loss_that_is_not_finite_is_an_error_of_one_line(job):
    code, _, err = job.fast("finetune", *job.args, *RUN[:2], "--lr", 1e30, "--method", "vanilla")
    assert code == 2
    assert err.splitlines()[-1].startswith("fast: error: the loss is ")


def test_a_run_that_diverged_is_saved_and_fails(job, monkeypatch):
    monkeypatch.setattr("fast.train.finite.ABSURD", 1e-6)
    code, out, err = job.fast("finetune", *job.args, *RUN)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("fast: error: the loss at the end is ")
    assert "the run diverged" in last
    assert "warn" not in err
    assert "saved in out" in out
    assert (job.folder / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "/proc/x"], "--output /proc/x: cannot be written to"),
        (["--output", "nets.py"], "--output nets.py: is a file; name a folder"),
        (["--output", ""], "argument --output: a folder, not an empty name"),
        (["--forget-budget", "2%"], "--forget-budget needs --source-inputs to check on"),
        (["--val-fraction", "1.5"], "argument --val-fraction: a share from 0 to less than 1, as"),
        (["--val-fraction", "x"], "argument --val-fraction: a share from 0 to less than 1, as 0.2"),
        (["--steps", 10**20], "steps must be at most 10000000; got 100000000000000000000"),
        (["--seed", 2**70], f"seed must be at most {2**63 - 1}; got {2**70}"),
        (
            ["--forget-budget", 50],
            "points of source accuracy ('2%'), more than zero, and less than",
        ),
    ],
)
def test_options_are_looked_at_before_anything_is_read(job, monkeypatch, options, message):
    monkeypatch.setattr("fast.cli.commands.finetune.load_task", None)  # not called
    code, _, err = job.fast("finetune", *job.args, *options)
    assert code == 2
    (line,) = err.splitlines()
    assert message in line


def test_a_home_is_expanded_after_the_equals_sign(job, monkeypatch):
    monkeypatch.setenv("HOME", str(job.folder))
    code, _, err = job.fast("finetune", *job.args, "--steps", 2, "--output=~/there")
    assert code == 0, err
    assert (job.folder / "there" / "result.json").is_file()


def test_names_never_reach_the_terminal_raw(job):
    shutil.copy("target.npz", "evil\x1b[2J\nfast: error: .npz")
    args = [*job.args[:4], "--data", "evil\x1b[2J\nfast: error: .npz", "--steps", 2]
    code, out, err = job.fast("finetune", *args)
    assert code == 0, err
    assert "evil\\x1b[2J" in out
    assert "\x1b" not in out + err
    code, out, err = job.fast("finetune", *args[:4], "--data", "no\x1b[2J\x9b.npz")
    assert err.splitlines() == ["fast: error: no\\x1b[2J\\x9b.npz: no such file"]


def test_a_card_beside_the_weights(job):
    net = runpy.run_path("nets.py")["Net"](3)
    net.load_state_dict(load_file("net.safetensors"))
    arrays = np.load("source.npz")
    x = (torch.from_numpy(arrays["x_test"]) / 255 - 0.5) / 0.5
    fast.SourceCard.estimate(net.eval(), x[:, None]).save("card.safetensors")
    run = ("--method", "ewc", "--card", "card.safetensors", "--forget-budget", 0.05)
    code, _, err = job.fast("finetune", *job.args, *RUN, *run)
    assert code == 0, err
    history = (job.folder / "out" / "history.jsonl").read_text().splitlines()
    assert 0 < json.loads(history[-1])["forecast"] <= 0.05


def test_image_folder_with_flip(job):
    image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")
    arrays = np.load("target.npz")
    for i, (pixels, label) in enumerate(zip(arrays["x_train"], arrays["y_train"], strict=True)):
        folder = job.folder / "photos" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).convert("RGB").resize((10, 8)).save(folder / f"{i}.png")
    code, _, err = job.fast(
        "finetune", *job.args[:4], "--data", "photos", "--input-size", 8, "--flip", *RUN
    )
    assert code == 0, err
    result = json.loads((job.folder / "out" / "result.json").read_text())
    assert result["classes"] == [f"class{i}" for i in range(4)]


def test_texts_with_a_network_of_transformers(job):
    """A tiny BERT and a Hugging Face data set, both on disk: two inputs and a tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,  # untrained, it must still tell words apart
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (job.folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer("vocab.txt").save_pretrained("bert")
    table = {
        "text": ["good film", "bad film", "bad", "good good film"] * 20,
        "label": [1, 0, 0, 1] * 20,
    }
    datasets.Dataset.from_dict(table).save_to_disk("reviews")
    code, _, err = job.fast(
        "finetune",
        "--model",
        "transformers:bert",
        "--data",
        "reviews",
        "--batch-size",
        16,
        *RUN,
        "--stall",
        0,
    )
    assert code == 0, err
    result = json.loads((job.folder / "out" / "result.json").read_text())
    assert result["target_accuracy"] >= 0.75  # chance is 0.5


def fail_at(monkeypatch, step, error):
    original = Trainer.step

    def stop(self, *args):
        if self.adaptation.done == step:
            raise error
        return original(self, *args)

    monkeypatch.setattr(Trainer, "step", stop)


def test_resume_gives_the_same_weights_as_an_uninterrupted_run(job, monkeypatch, tmp_path_factory):
    job.fast("finetune", *job.args, *RUN[:-1], "whole", "--flip")
    with monkeypatch.context() as patch:
        fail_at(patch, 25, KeyboardInterrupt())
        code, _, err = job.fast("finetune", *job.args, *RUN[:-1], "cut", "--flip")
    assert code == 130
    assert "to go on: fast finetune --resume cut" in err
    assert not (job.folder / "cut" / "model.safetensors").exists()

    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    code, out, err = job.fast("finetune", "--resume", job.folder / "cut")
    assert code == 0, err
    assert "30 steps" in out
    whole, cut = (load_file(job.folder / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_resume_takes_no_other_options(job):
    job.fast("finetune", *job.args, *RUN)
    code, _, err = job.fast("finetune", "--resume", "out", "--lr", 0.1)
    assert code == 2
    assert "--resume goes on exactly as out/job.json says; drop --lr" in err
    code, _, err = job.fast("finetune", "--resume", "out", "--val-fraction", 0.2)  # the default
    assert code == 2
    assert "drop --val-fraction" in err
    code, _, err = job.fast("finetune", "--resume", "nowhere")
    assert code == 2
    assert "--resume nowhere: has no job.json" in err


@pytest.mark.parametrize("name", ["max-length", "input-size"])
def test_sizes_are_at_least_one(job, name):
    code, _, err = job.fast("finetune", *job.args, f"--{name}", 0)
    assert code == 2
    assert f"error: argument --{name}: a whole number, at least 1, not '0'" in err


def test_output_is_never_overwritten(job):
    (job.folder / "out").mkdir()
    (job.folder / "out" / "thesis.txt").write_text("x")
    code, _, err = job.fast("finetune", *job.args, *RUN)
    assert code == 2
    assert "--output out: exists" in err


def test_runs_that_start_together_have_folders_of_their_own(job, monkeypatch):
    """The second looks for its folder while the first has just taken its own, and fails."""
    claim, results = finetune._claim, []

    def claim_and_start_another(spec):
        folder = claim(spec)
        if not results:
            results.append(None)
            with pytest.MonkeyPatch.context() as patch:
                fail_at(patch, 0, ValueError("no"))
                results.append(job.fast("finetune", *job.args, "--steps", 4)[0])
            (folder / "notes.txt").write_text("mine")
        return folder

    monkeypatch.setattr(finetune, "_claim", claim_and_start_another)
    code, out, err = job.fast("finetune", *job.args, "--steps", 4)
    assert code == 0, err
    assert results[1] == 2
    assert "saved in runs/Net-target-fast\n" in out
    assert [p.name for p in (job.folder / "runs").iterdir()] == ["Net-target-fast"]


def test_a_failing_run_removes_its_own_files_only(job, monkeypatch):
    fail_at(monkeypatch, 5, ValueError("no"))
    claim = finetune._claim

    def claim_with_notes(spec):
        folder = claim(spec)
        (folder / "notes.txt").write_text("mine")
        return folder

    monkeypatch.setattr(finetune, "_claim", claim_with_notes)
    assert job.fast("finetune", *job.args, *RUN)[0] == 2
    assert [p.name for p in (job.folder / "out").iterdir()] == ["notes.txt"]


def test_a_folder_claimed_by_another_is_refused(job, monkeypatch):
    monkeypatch.setattr(finetune, "_check_new", lambda folder: None)  # both saw it empty
    (job.folder / "out").mkdir()
    (job.folder / "out" / "job.json").write_text("{}")
    code, _, err = job.fast("finetune", *job.args, *RUN)
    assert code == 2
    assert "--output out: another run has just started there" in err
    assert (job.folder / "out" / "job.json").read_text() == "{}"


def changed(**arrays):
    def write(folder):
        kept = dict(np.load(folder / "target.npz"))
        np.savez(
            folder / "target.npz", **{k: v for k, v in (kept | arrays).items() if v is not None}
        )

    return write


def truncate(name):
    def write(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-50])

    return write


def corrupt_folder(folder):
    for name in ("a", "b"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(5):
            (folder / "photos" / name / f"{i}.jpg").write_bytes(b"no image")


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("output", ["new/deep/out", "empty"])
def test_a_run_without_a_checkpoint_leaves_nothing_and_can_be_run_again(
    job, monkeypatch, error, output
):
    (job.folder / "empty").mkdir()
    with monkeypatch.context() as patch:
        fail_at(patch, 5, error)
        code, _, err = job.fast("finetune", *job.args, *RUN[:-1], output)
        assert code in (1, 2, 130)
        assert "--resume" not in err
    assert not (job.folder / "new").exists()
    assert list((job.folder / "empty").iterdir()) == []
    code, _, err = job.fast("finetune", *job.args, *RUN[:-1], output)
    assert code == 0, err


def test_a_run_with_a_checkpoint_is_kept(job, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 25, ValueError("no"))
        assert job.fast("finetune", *job.args, *RUN)[0] == 2
    code, _, err = job.fast("finetune", "--resume", "out")
    assert code == 0, err


def test_resuming_a_folder_without_checkpoints_leaves_it(job):
    code, _, err = job.fast("finetune", *job.args, *RUN)
    assert code == 0, err
    (checkpoint,) = (job.folder / "out").glob("checkpoint-*")
    shutil.rmtree(checkpoint)
    kept = sorted(p.name for p in (job.folder / "out").iterdir())
    code, _, err = job.fast("finetune", "--resume", "out")
    assert code == 2
    assert "nothing to resume from" in err
    assert sorted(p.name for p in (job.folder / "out").iterdir()) == kept


@pytest.mark.parametrize("dtype", [np.float64, np.longdouble, np.dtype(">f8"), np.float16])
def test_arrays_of_any_precision_and_byte_order(job, dtype):
    arrays = np.load("target.npz")
    features = {
        name: (value[:, None] / 255).astype(dtype) if name[0] == "x" else value.astype(">i2")
        for name, value in arrays.items()
    }
    np.savez("features.npz", **features)
    code, _, err = job.fast("finetune", *job.args[:4], "--data", "features.npz", "--steps", 2)
    assert code == 0, err


def keep(folder):
    pass


def named_folders(folder):
    image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")
    for name in ("cat", "dog"):
        (folder / "animals" / name).mkdir(parents=True)
        for i in range(4):
            image.new("L", (8, 8), 20 * i).save(folder / "animals" / name / f"{i}.png")


def floats(folder):
    arrays = np.load(folder / "target.npz")
    x = (arrays["x_train"][:, None] / 255).astype(np.float32)
    np.savez(folder / "floats.npz", x=x, y=arrays["y_train"] % 3)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (keep, ["--data", "no.npz"], "no.npz: no such file"),
        (keep, ["--data", "nothere"], "nothere: no such file or folder"),
        (keep, ["--device", "gpu"], "device 'gpu' cannot be used here: there is cpu"),
        (keep, ["--device", "cuda:99"], "device 'cuda:99' cannot be used here: there is cpu"),
        (keep, ["--device", "meta"], "device 'meta' cannot be used here: there is cpu"),
        (keep, ["--label-smoothing", 3], "label_smoothing"),
        (keep, ["--seed", -1], "seed must not be negative; got -1"),
        (keep, ["--source-inputs", "no.npz"], "no.npz: no such file"),
        (keep, ["--card", "no.safetensors"], "no.safetensors: no such file"),
        (keep, ["--forget-budget", "lots"], "forget_budget must be nats"),
        (keep, ["--forget-budget", "0.1"], "--forget-budget needs --source-inputs"),
        (changed(y_train=np.array(["a", "b", "c", "d"] * 50)), [], "class indices 0, 1, ...; got"),
        (keep, ["--data", "nets.py"], "nets.py: unknown file type '.py'"),
        (keep, ["--data", "source.npz"], "and no training split: give one"),
        (keep, ["--source", "target.npz"], "--source target.npz: labels must be 0..2, as the"),
        (named_folders, ["--source", "animals"], "--source animals: 2 class folders with names"),
        (named_folders, ["--source-inputs", "animals"], "2 class folders with names, and the net"),
        (
            keep,
            ["--input-column", "text"],
            "--input-column is for tables and Hugging Face data sets; target",
        ),
        (keep, ["--label-column", "y"], "--label-column is for tables and Hugging Face data sets"),
        (keep, ["--weights", "no.safetensors"], "no.safetensors: no such file"),
        (truncate("net.safetensors"), [], "net.safetensors: truncated"),
        (truncate("target.npz"), [], "target.npz: not a readable .npz"),
        (keep, ["--model", "nets.py:Net(9)"], "shapes differ: fc.weight is (3, 128)"),
        (keep, ["--model", "resnet18"], "must be timm:NAME"),
        (
            keep,
            ["--model", "nets.py:headless", "--allow-missing"],
            "none of its 9 tensors is",
        ),
        (keep, ["--mean", "0.5,0.5"], "mean has 2 values but the images have 1 channels"),
        (keep, ["--val-fraction", "2", "--data", "xy.npz"], "from 0 to less than 1"),
        (changed(y_train=np.full(200, np.nan)), [], "target.npz: y_train: 200 labels are NaN"),
        (changed(y_train=np.zeros(200, int), y_test=np.zeros(80, int)), [], "one class only"),
        (changed(y_test=np.full(80, 7), classes=["a", "b", "c", "d"]), [], "first 7 in row 0"),
        (changed(x_train=np.zeros((199, 8, 8), np.uint8)), [], "199 inputs but 200 labels"),
        (
            changed(x_train=np.zeros((200, 6), np.float32), x_test=np.zeros((80, 6), np.float32)),
            [],
            "does not take these inputs (x [2, 6]",
        ),
        (
            changed(x_test=np.zeros((80, 8, 8), np.float32)),
            [],
            "--data target.npz: the training split is images, the validation split an array of fl",
        ),
        (
            changed(x_test=np.zeros((80, 9, 8), np.uint8)),
            [],
            "training samples are [1, 8, 8], validation samples [1, 9, 8]; they must be of one sh",
        ),
        (floats, ["--data", "floats.npz", "--mean", "0.5"], "--mean is for images, and --data is"),
        (floats, ["--data", "floats.npz", "--input-size", 8], "--input-size is for images, and"),
        (floats, ["--source-inputs", "floats.npz", "--std", 1], "and --source-inputs is an array"),
        (changed(y_train=np.full(200, 2**40)), [], "label 1099511627776 among 280 samples"),
        (corrupt_folder, ["--data", "photos"], "photos/a/0.jpg: not a readable image"),
    ],
)
def test_bad_input_says_so_and_writes_nothing(job, spoil, options, message):
    np.savez("xy.npz", x=np.zeros((4, 8, 8), np.uint8), y=[0, 0, 1, 1])
    spoil(job.folder)
    before = sorted(p.name for p in job.folder.iterdir())
    code, _, err = job.fast("finetune", *job.args, *RUN, *options)
    assert code == 2
    assert message in err
    assert err.splitlines()[-1].startswith("fast: error: ")
    after = sorted(p.name for p in job.folder.iterdir() if p.name != "__pycache__")
    assert after == before


def test_the_head_is_named_and_starts_as_asked(job):
    run = (*job.args, "--steps", 2, "--output", "named")
    code, _, err = job.fast("finetune", *run, "--head", "none")
    assert code != 0
    assert "head='none': Net has no layer of that name" in err
    code, _, err = job.fast("finetune", *run, "--head", "fc", "--no-max-entropy")
    assert code == 0, err
    config = json.loads((job.folder / "named" / "fast.json").read_text())
    assert (config["head"], config["max_entropy"]) == ("fc", False)
