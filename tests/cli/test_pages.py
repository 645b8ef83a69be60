"""The commands and the Python of docs/photos.md, texts.md and audio.md run as they stand, on small
data and with small networks in place of those that they name."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fast
from fast.cli import main
from fast.cli.report.options import page as options_page
from fast.data.audio.waveforms import SoundFormat, read_audio, resampled
from fast.data.sources import FileReport, load_data
from helpers import write_wav

DOCS = Path(__file__).parents[2] / "docs"
WORDS = {"good": ["fine", "great", "lovely"], "bad": ["awful", "poor", "dull"]}


def commands(page):
    """The commands of a page, as argument lists."""
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    commands = [shlex.split(line)[1:] for block in blocks for line in block.strip().splitlines()]
    assert commands
    return commands


def run(command, model, *more):
    """The command with another network, and little to do."""
    place = command.index("--model") + 1
    short = ["--batch-size", "8", "--no-progress", *more]
    if "--epochs" not in command:
        short += ["--steps", "3"]
    argv = [*command[:place], model, *command[place + 1 :], *short]
    if "--epochs" in argv:
        argv[argv.index("--epochs") + 1] = "1"
    return main(argv)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three classes of JPEGs, of several sizes, and the usual litter."""
    image = pytest.importorskip("PIL.Image", reason="image files need Pillow")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label, name in enumerate(("daisy", "rose", "tulip")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 120, (40 + i, 50, 3), dtype=np.uint8)
            pixels[..., label] += 100
            image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.JPG")
        (tmp_path / "photos" / name / "._0.jpg").write_bytes(b"litter")
    (tmp_path / "photos" / ".DS_Store").touch()


@pytest.mark.parametrize("number", range(4))
def test_photos(photos, tmp_path, capsys, number):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "net.safetensors")
    command = commands("photos.md")[number]
    assert run(command, "timm:test_resnet", "--weights", "net.safetensors") == 0
    out = capsys.readouterr().out
    assert "data: 3 classes" in out
    if "--output" in command:
        folder = tmp_path / command[command.index("--output") + 1]
        assert (folder / "model.safetensors").is_file()
        assert "step 0/" in (folder / "run.log").read_text()
        assert re.search(r"^class +right, % +samples$", out, flags=re.MULTILINE)
        assert re.search(r"^accuracy, % +head start +after +samples", out, flags=re.MULTILINE)
        data = json.loads((folder / "data.json").read_text())
        assert data["images"]["library"]["library"] == "timm"
        assert sum(data["accuracy_by_class"]["samples"]) == 6
    if "--folds" in command:
        assert "accuracy over 5 folds, %" in out
        folds = json.loads(next(tmp_path.glob("runs/*-folds/folds.json")).read_text())
        accuracies = [one["target_accuracy"] for one in folds["runs"]]
        assert len(accuracies) == 5
        assert folds["spread"]["target_accuracy"]["mean"] == pytest.approx(np.mean(accuracies))


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """A table and lines of texts, and a small network with a tokenizer of their words."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(tmp_path)
    rows = [
        (f"{word} film {i}", label)
        for label, words in WORDS.items()
        for word in words
        for i in "abcd"
    ]
    lines = ["text,label", *(f"{text},{label}" for text, label in rows)]
    (tmp_path / "reviews.csv").write_text("\n".join(lines))
    (tmp_path / "reviews").mkdir()
    for name in WORDS:
        texts = [text for text, label in rows if label == name]
        (tmp_path / "reviews" / f"{name}.txt").write_text("\n".join(texts))
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "film",
        *"abcd",
        *WORDS["good"],
        *WORDS["bad"],
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "bert")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "bert")
    return {"model": model, "tokenizer": tokenizer, "rows": rows}


@pytest.mark.parametrize("number", range(2))
def test_texts(reviews, tmp_path, capsys, number):
    command = commands("texts.md")[number]
    assert run(command, f"transformers:{tmp_path / 'bert'}") == 0
    out, err = capsys.readouterr()
    assert "data: 2 classes, 20 training samples, 4 held out" in out
    note = "columns: inputs in text, labels in label" if number == 0 else "each line in it a sample"
    assert note in err
    assert run(command, f"transformers:{tmp_path / 'bert'}", "--max-length", "3", "--plan") == 0
    assert "texts: at most 3 tokens (--max-length); 24 longer, which are cut" in (
        capsys.readouterr().out
    )


def test_texts_are_not_augmented(reviews, tmp_path, capsys):
    command = commands("texts.md")[0]
    assert run(command, f"transformers:{tmp_path / 'bert'}", "--augment", "light") == 2
    assert "--augment is for images, and --data is texts: drop it" in capsys.readouterr().err


def test_a_head_that_is_kept_has_its_own_order_of_classes(reviews, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.AutoConfig.from_pretrained("bert")
    learn = commands("texts.md")[0]
    for names, code in ((["glad", "calm", "sad"], 2), (["good", "fair", "bad"], 0)):
        config.id2label = dict(enumerate(names))
        config.save_pretrained("bert")
        assert run(learn, f"transformers:{tmp_path / 'bert'}", "--head", "keep") == code
    err = capsys.readouterr().err
    assert "(bad, good), and the network's own head has 3 classes (glad, calm, sad): nothing" in err
    data = json.loads((tmp_path / "runs/reviews/data.json").read_text())["data"]
    assert data["classes"] == ["good", "fair", "bad"]
    assert data["samples"]["train"] == [10, 0, 10]
    assert fast.load("runs/reviews").predict("a film").classes == ["good", "fair", "bad"]


def test_texts_of_two_tasks_are_joined(reviews, tmp_path, capsys):
    """And the joined network has its tokenizer, its architecture and the names of all classes."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.AutoConfig.from_pretrained("bert")
    config.id2label = {0: "sad", 1: "calm", 2: "glad"}
    config.save_pretrained("bert")
    (tmp_path / "old.txt").write_text("\n".join(text for text, _ in reviews["rows"]))
    learn = commands("texts.md")[0]
    assert run(learn, f"transformers:{tmp_path / 'bert'}", "--val-fraction", "0.5") == 0
    assert main(["join", "runs/reviews", "--source-inputs", "old.txt", "--output", "joined"]) == 0
    shutil.rmtree("bert")
    assert main(["predict", "joined", "old.txt", "--csv", "answers.csv"]) == 0
    classes = ["sad", "calm", "glad", "bad", "good"]
    assert Path("answers.csv").read_text().splitlines()[0].split(",")[3:] == classes
    assert main(["export", "joined", "--format", "hf", "-o", "served"]) == 0
    served = transformers.pipeline("text-classification", model="served")
    assert {answer["label"] for answer in served("a film", top_k=None)} == set(classes)


def test_texts_from_python(reviews):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    text = (DOCS / "texts.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("steps=100", "steps=3")
    names = reviews | {"frame": pandas.DataFrame(reviews["rows"], columns=["text", "label"])}
    exec(code, names)
    assert names["result"].final["step"] == 3


@pytest.fixture
def birds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(("crow", "owl")):
        for i in range(10):
            file = tmp_path / "birds" / name / f"{i}.wav"
            write_wav(file, 0.2 + 0.01 * i, 8000, pitch=300 + 500 * label)
            write_wav(tmp_path / "more-birds" / name / f"{i}.wav", 0.1, 8000, pitch=400)
    write_wav(tmp_path / "night.wav", 0.3, 16000, pitch=300)
    write_wav(tmp_path / "forest" / "a.wav", 0.3, 16000, channels=2, pitch=800)
    write_wav(tmp_path / "forest" / "deep" / "b.wav", 7, 24000, width=3, pitch=800)
    return tmp_path


def test_audio_by_a_network_of_transformers(birds, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        num_labels=3,
    )
    transformers.Wav2Vec2ForSequenceClassification(config).save_pretrained(birds / "waves")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(birds / "waves")
    learn, *use = commands("audio.md")[:4]
    assert run(learn, f"transformers:{birds / 'waves'}") == 0
    out = capsys.readouterr().out
    assert "data: 2 classes, 16 training samples, 4 held out" in out
    assert "sounds: 16000 Hz, at most 5 s (--max-seconds)" in out
    for command in use:
        assert main(command) == 0
        out += capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if ".wav " in line] == [
        "night.wav", "forest/a.wav", "forest/deep/b.wav",
    ]  # fmt: skip
    facts = [json.loads((birds / "runs/birds" / name).read_text()) for name in (
        "result.json", "evaluation-target/evaluation.json", "preprocessing.json",
    )]  # fmt: skip
    assert facts[0]["target_accuracy"] == facts[1]["accuracy"]
    assert "samples (target task)" in (birds / "report/report.html").read_text()
    assert "Resample to 16000 Hz (scipy.signal.resample_poly)." in facts[2]["words"]
    assert facts[2]["sounds"] == {
        "seconds": 5.0, "rate": 16000, "extractor": "Wav2Vec2FeatureExtractor",
    }  # fmt: skip

    names = {}
    exec((DOCS / "audio.md").read_text().split("```python\n")[1].split("```")[0], names)
    waves = [read_audio(lambda name=name: name) for name in names["answers"].names]
    waves = [resampled(sound, rate, 16000)[: 5 * 16000] for sound, rate in waves]
    made = transformers.Wav2Vec2FeatureExtractor()(
        waves, sampling_rate=16000, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = names["loaded"].model(**made).logits
    torch.testing.assert_close(names["answers"].logits, logits, rtol=1e-4, atol=1e-4)

    names["loaded"].export("served", "hf")
    names |= {"waveform": waves[0], "rate": 16000}
    exec((DOCS / "audio.md").read_text().split("```python\n")[2].split("```")[0], names)
    assert names["best"] == names["loaded"].predict("night.wav").labels[0]


def test_sounds_that_are_cut_are_counted(birds):
    report = FileReport()
    SoundFormat(seconds=0.255)(load_data("birds").train, report)
    assert report.cut == 8  # those of 0.26 to 0.29 s


class Waves(nn.Module):
    """Reads a second at 8 kHz."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 8, 64, stride=16), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        assert x.shape[1] == 8000
        return self.fc(self.body(x[:, None]).mean(2))


def test_audio_by_a_network_of_a_file(birds, capsys):
    code = f"import torch\nfrom torch import nn\n\n\n{inspect.getsource(Waves)}"
    (birds / "nets.py").write_text(code)
    torch.manual_seed(0)
    save_file(Waves().state_dict(), birds / "waves.safetensors")
    command, predict = commands("audio.md")[4:]
    assert run(command, f"{birds / 'nets.py'}:Waves", "--weights", "waves.safetensors") == 0
    assert main(predict) == 0
    assert re.search(r"^night\.wav +(crow|owl) .*%?", capsys.readouterr().out, flags=re.MULTILINE)
    loaded = fast.load("runs/waves", Waves())
    sound, rate = read_audio(lambda: "night.wav")
    wave = torch.zeros(1, 8000)
    wave[0, :2400] = torch.from_numpy(resampled(sound, rate, 8000))
    torch.testing.assert_close(loaded.predict("night.wav").logits, loaded.predict(wave).logits)
    (birds / "forest" / "c.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"c\.wav: not a readable sound .*--skip-broken"):
        loaded.predict("forest")
    assert main(["predict", "runs/waves", "forest", "--skip-broken"]) == 0
    assert "fast: note: forest/c.wav: left out" in capsys.readouterr().err
    (birds / "empty").mkdir()
    with pytest.raises(ValueError, match="there are no sounds in this folder"):
        loaded.predict("empty")


def test_the_page_of_options_is_that_of_the_code():
    assert (DOCS / "options.md").read_text() == options_page(), (
        "python -m fast.cli.report.options > docs/options.md"
    )
