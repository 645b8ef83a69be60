"""`fast finetune` from files to files."""

import json
import runpy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fast

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
    switched += ("--batch-norm", "per_task")
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
    args = (*job.args, "--source-inputs", "source.npz")
    for budget in (1e-4, "5%"):
        options = ("--forget-budget", budget, "--output", f"run{budget}")
        code, _, err = job.fast("finetune", *args, *RUN[:-2], *options)
        assert code == 0, err
        folder = job.folder / f"run{budget}"
        history = (folder / "history.jsonl").read_text().splitlines()
        assert json.loads(history[0])["forecast"] == 0
        assert json.loads(history[-1])["forecast"] <= (0.05 if budget == "5%" else budget)
        record = json.loads((folder / "job.json").read_text())
        assert record["source_inputs"] == str(job.folder / "source.npz")


def test_the_budget_is_printed_beside_what_was_lost(job):
    args = (*job.args, *RUN[:-2], "--source-inputs", "source.npz")
    code, out, err = job.fast("finetune", *args, "--forget-budget", "5%", "--output", "points")
    assert code == 0, err
    final = json.loads((job.folder / "points" / "result.json").read_text())["final"]
    lost = f"forget budget 5 %: {100 * final['forecast']:.2g} % lost at the end, measured on held"
    assert lost in out
    code, out, err = job.fast("finetune", *args, "--forget-budget", "0.01", "--output", "nats")
    assert code == 0, err
    assert "forget budget 0.01 nats: " in out
    code, out, err = job.fast("finetune", *args, "--output", "none")
    assert "forget budget" not in out
    assert "by forecast" not in out  # the table has the source's accuracy
    without = [a for a in args if a != "--source"]
    without.remove("source.npz")
    code, out, err = job.fast("finetune", *without, "--output", "unmeasured")
    assert code == 0, err
    final = json.loads((job.folder / "unmeasured" / "result.json").read_text())["final"]
    lost = round(final["forecast"], 2) + 0.0
    assert f"the source task has lost {lost:.2f} nats, by forecast" in out


def test_what_source_inputs_measure_is_said(job):
    args = (*job.args, "--steps", 2, "--source-inputs")
    code, _, err = job.fast("finetune", *args, "source.npz")
    assert code == 0, err
    assert (
        "fast: note: --source-inputs source.npz: the same samples as --source: what is kept" in err
    )
    assert "by its features" not in err
    code, _, err = job.fast("finetune", *args, "target.npz")  # labels 0..3
    assert code == 0, err
    assert "target.npz: label 3, and the network's own head has 3 classes: what is forgo" in err
    assert "the same samples" not in err


def test_source_inputs_need_no_labels(job):
    """A plain folder of pictures, or folders whose names are not the network's classes."""
    image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")
    arrays = np.load("source.npz")["x_test"]
    for folder in ("old", "named/spring", "named/summer"):
        (job.folder / folder).mkdir(parents=True)
        for i in range(8):
            image.fromarray(arrays[i]).save(job.folder / folder / f"{i}.png")
    args = (*job.args, "--steps", 3, "--forget-budget", "5%", "--source-inputs")
    for name, words in (
        ("old", "fast: note: --source-inputs old: 8 samples without labels"),
        ("named", "2 classes with names (spring, summer), and the network's own head has 3"),
    ):
        code, out, err = job.fast("finetune", *args, name, "--output", f"run-{name}")
        assert code == 0, err
        assert words in err
        assert "lost at the end, measured on held-back source inputs" in out
    code, _, err = job.fast("finetune", "--resume", "run-old")
    assert code == 0, err


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


def test_a_home_is_expanded_after_the_equals_sign(job, monkeypatch):
    monkeypatch.setenv("HOME", str(job.folder))
    code, _, err = job.fast("finetune", *job.args, "--steps", 2, "--output=~/there")
    assert code == 0, err
    assert (job.folder / "there" / "result.json").is_file()


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
        max_position_embeddings=16,
        initializer_range=0.5,  # untrained, it must still tell words apart
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (job.folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer("vocab.txt").save_pretrained("bert")
    table = {
        "text": ["good film " * 20, "bad film", "bad", "good good film"] * 20,
        "label": [1, 0, 0, 1] * 20,
    }
    datasets.Dataset.from_dict(table).save_to_disk("reviews")
    code, out, err = job.fast(
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
    assert "texts are cut to 16 tokens: the network takes no more" in out + err
    result = json.loads((job.folder / "out" / "result.json").read_text())
    assert result["target_accuracy"] >= 0.75  # chance is 0.5


def test_the_head_is_named_and_starts_as_asked(job):
    run = (*job.args, "--steps", 2, "--output", "named")
    code, _, err = job.fast("finetune", *run, "--head", "none")
    assert code != 0
    assert "--head none: Net has no layer of that name" in err
    code, _, err = job.fast("finetune", *run, "--head", "fc", "--no-max-entropy")
    assert code == 0, err
    config = json.loads((job.folder / "named" / "fast.json").read_text())
    assert (config["head"], config["max_entropy"]) == ("fc", False)


def test_a_head_that_no_checkpoint_has_says_nothing_of_the_source(job):
    """Nothing would be lost of its answers, which are chance, whatever happens to the features."""
    weights = load_file("net.safetensors")
    save_file({n: x for n, x in weights.items() if not n.startswith("fc")}, "body.safetensors")
    body = ("--weights", "body.safetensors", "--allow-missing")
    args = ["finetune", *job.args, *body, "--steps", 20, "--method", "vanilla"]
    code, _, err = job.fast(*args)
    assert code == 2
    assert "--source source.npz: the network's own head, fc, is not in its checkpoint" in err
    at = args.index("--source")
    del args[at : at + 2]
    args += ["--source-inputs", "source.npz", "--output"]
    code, _, err = job.fast(*args, "out")
    assert code == 0, err
    assert "fc, is not in its checkpoint, and answers by chance: what is kept and measured" in err
    assert json.loads((job.folder / "out" / "fast.json").read_text())["source_skill"] == "features"
    code, _, err = job.fast("finetune", "--resume", "out")
    assert code == 0, err
    code, _, err = job.fast(*args, "answers", "--source-skill", "answers")
    assert code == 0, err
    code, _, err = job.fast("evaluate", "out", "source.npz", "--task", "source")
    assert code == 2
    assert "its head, fc, was in no checkpoint, and answers by chance" in err
    code, _, err = job.fast("join", "out", "--output", "joined")
    assert code == 2
    assert "RUN out: the head of the old classes, fc, is not in the checkpoint" in err
