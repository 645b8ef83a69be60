"""Networks by name, and checkpoints that do or do not fit them."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fast.models.load import load_model, parse_spec
from fast.models.preparation import most_tokens
from fast.models.weights import load_weights
from helpers import same_state

NETS = """
import torch
from torch import nn
from helper_of_nets import WIDTH

class Net(nn.Module):
    def __init__(self, classes=3, *, channels=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, WIDTH, 3)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))

def number(classes=3):
    return classes
"""


@pytest.fixture
def nets(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "helper_of_nets.py").write_text("WIDTH = 4")
    return tmp_path / "nets.py"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("timm:resnet18.a1_in1k", ("timm", "resnet18.a1_in1k", [], {})),
        ("transformers:org/name", ("transformers", "org/name", [], {})),
        ("a/b.py:Net", ("a/b.py", "Net", [], {})),
        ("a/b.py:Net(20, w=0.5, s='x')", ("a/b.py", "Net", [20], {"w": 0.5, "s": "x"})),
        (
            "b.py:Net((1, 2), flag=True, none=None)",
            ("b.py", "Net", [(1, 2)], {"flag": True, "none": None}),
        ),
    ],
)
def test_specs(spec, expected):
    assert parse_spec(spec) == expected


@pytest.mark.parametrize("spec", ["resnet18", "keras:x", "net.py", "", "net.txt:Net"])
def test_unknown_specs_say_what_there_is(spec):
    with pytest.raises(ValueError, match="must be timm:NAME"):
        parse_spec(spec)


@pytest.mark.parametrize("args", ["print(1)", "x", "*[1]", "**{}", "1) + f(2", "__import__('os')"])
def test_arguments_are_literals_only(args):
    with pytest.raises(ValueError, match=r"must be (literals|timm)"):
        parse_spec(f"a.py:Net({args})")


def test_file_with_a_neighbour_and_arguments(nets):
    loaded = load_model(f"{nets}:Net(5, channels=3)")
    assert loaded.model.fc.out_features == 5
    assert loaded.channels == 3
    assert "no --weights" in loaded.notes[0]


def test_file_errors(nets, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.py: no such file"):
        load_model(f"{tmp_path}/no.py:Net")
    with pytest.raises(ValueError, match="has no Mlp; it has Net, number"):
        load_model(f"{nets}:Mlp")
    with pytest.raises(ValueError, match="does not take these arguments"):
        load_model(f"{nets}:Net(depth=3)")
    with pytest.raises(ValueError, match=r"returned int, not a torch nn\.Module"):
        load_model(f"{nets}:number")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_here")
    with pytest.raises(ImportError, match=r"broken\.py: No module named"):
        load_model(f"{broken}:Net")


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def other_values(net):
    return {
        k: torch.rand_like(v) if v.is_floating_point() else v for k, v in net.state_dict().items()
    }


def test_weights_in_every_wrapping(net, tmp_path):
    state = other_values(net)
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "c.pt"
    )
    for file in ("a.safetensors", "b.pt", "c.pt"):
        net.load_state_dict({k: torch.zeros_like(v) for k, v in state.items()})
        assert load_weights(net, tmp_path / file) == []
        assert same_state(net, state), file


def test_half_precision_files_are_cast(net, tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in other_values(net).items()}
    save_file(state, tmp_path / "a.safetensors")
    load_weights(net, tmp_path / "a.safetensors")
    assert net[0].weight.dtype == torch.float32
    assert torch.equal(net[0].weight, state["0.weight"].float())


def test_only_num_batches_tracked_may_be_missing(net, tmp_path):
    state = other_values(net)
    del state["1.num_batches_tracked"]
    save_file(state, tmp_path / "a.safetensors")
    assert load_weights(net, tmp_path / "a.safetensors") == []

    state["other"] = torch.ones(1)
    del state["2.bias"]
    save_file(state, tmp_path / "b.safetensors")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"lacks 1 of 9 tensors .*: 2\.bias; it has others .*: other; --allow"
    ):
        load_weights(net, tmp_path / "b.safetensors")
    assert same_state(net, before)

    notes = load_weights(net, tmp_path / "b.safetensors", allow_missing=True)
    assert [("missing" in n, "not used" in n) for n in notes] == [(True, False), (False, True)]


def test_weights_that_do_not_fit(net, tmp_path):
    state = other_values(net) | {"2.weight": torch.ones(7, 3)}
    save_file(state, tmp_path / "a.safetensors")
    message = r"2\.weight is \(7, 3\) in the file, \(2, 3\) in the network; .*\(num_classes=7\)"
    with pytest.raises(ValueError, match=message):
        load_weights(net, tmp_path / "a.safetensors", allow_missing=True)


def test_damaged_weights_files(net, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(net, tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="is a folder; name a file of weights"):
        load_weights(net, tmp_path)
    path = tmp_path / "a.safetensors"
    save_file(other_values(net), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"a\.safetensors: truncated or not"):
        load_weights(net, path)
    with pytest.raises(ValueError, match=r"is a folder; name one of its files: a\.safetensors"):
        load_weights(net, tmp_path)
    path = tmp_path / "b.pt"
    torch.save(other_values(net), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"b\.pt: not a readable checkpoint"):
        load_weights(net, path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds no state dict of tensors, but a list"):
        load_weights(net, path)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_runs_no_code(net, tmp_path):
    torch.save({"x": Touch(str(tmp_path / "touched"))}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint of plain tensors"):
        load_weights(net, tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'torchvision'", name="torchvision.ops"),
            "models by timm need torchvision: pip install torchvision",
        ),
        (ModuleNotFoundError("", name="PIL"), "need PIL: pip install pillow"),
        (
            ImportError("\ncannot import name 'x'\n", name="torch"),
            r"timm, which is installed but cannot be imported \(cannot import name 'x'\)",
        ),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            r"torchvision was compiled for another torch than .* install both from the same place",
        ),
    ],
)
def test_the_library_that_is_missing_is_named(error, message, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr("fast.errors.importlib.import_module", fail)
    with pytest.raises(ImportError, match=message):
        load_model("timm:resnet10t")


def importable(library):
    """Installed and working: timm fails to import where torchvision is missing."""
    if importlib.util.find_spec(library) is None:
        return False
    return library != "timm" or importlib.util.find_spec("torchvision") is not None


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet10t"), ("torchvision", "resnet18")])
def test_libraries_bring_their_input_format(library, name, tmp_path):
    if not importable(library):
        missing = library if importlib.util.find_spec(library) is None else "torchvision"
        with pytest.raises(ImportError, match=f"models by {library} need {missing}: pip install"):
            load_model(f"{library}:{name}", tmp_path / "w.pt")
        return
    module = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    torch.save(
        getattr(module, "create_model", getattr(module, "get_model", None))(name).state_dict(),
        tmp_path / "w.pt",
    )
    loaded = load_model(f"{library}:{name}", tmp_path / "w.pt")
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)
    assert loaded.channels == 3
    with pytest.raises(ValueError, match=rf"{library}:nosuch.*[Uu]nknown model"):
        load_model(f"{library}:nosuch", tmp_path / "w.pt")


def save_bert(kind, folder):
    """A tiny network of this class, and a tokenizer that knows three words."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    kind(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


class TestTransformers:
    """On tiny networks written to disk here; the hub gives the same objects."""

    @pytest.fixture(scope="class")
    def transformers(self):
        return pytest.importorskip("transformers", reason="transformers is not installed")

    def test_text(self, transformers, tmp_path):
        save_bert(transformers.BertForSequenceClassification, tmp_path)
        loaded = load_model(f"transformers:{tmp_path}")
        tokens = loaded.tokenizer(["good film", "bad"], padding=True, return_tensors="pt")
        assert tokens["input_ids"].shape == (2, 4)
        assert loaded.model(**tokens).logits.shape == (2, 2)

    @pytest.mark.parametrize(
        ("kind", "limit", "most"),
        [("Bert", None, 32), ("Bert", 20, 20), ("Roberta", None, 30), ("XLNet", None, None)],
    )
    def test_the_most_tokens_of_a_text(self, transformers, kind, limit, most):
        """RoBERTa counts positions from 2; XLNet's are relative."""
        sizes = {
            "vocab_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "hidden_size": 8,
            "intermediate_size": 8,
            "max_position_embeddings": 32,
        }
        if kind == "XLNet":
            sizes = {"vocab_size": 8, "n_layer": 1, "n_head": 2, "d_model": 8, "d_inner": 8}
        config = getattr(transformers, f"{kind}Config")(**sizes)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
        tokenizer = SimpleNamespace(model_max_length=limit or int(1e30))
        assert most_tokens(model, tokenizer) == most
        if kind == "Roberta":
            ids = torch.full((1, most), 3)
            model(input_ids=ids)
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, most + 1), 3))

    def test_a_name_that_is_not_there(self, transformers, tmp_path):
        with pytest.raises(ValueError, match="model transformers:"):
            load_model(f"transformers:{tmp_path}/nothing")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("my nets (1).py:Net(10)", ("my nets (1).py", "Net", [10], {})),
        ("C:\\work (old)\\nets.py:Net", ("C:\\work (old)\\nets.py", "Net", [], {})),
        ("timm:hf_hub:timm/r18", ("timm", "hf_hub:timm/r18", [], {})),
        ("hf-hub:timm/r18(num_classes=3)", ("timm", "hf-hub:timm/r18", [], {"num_classes": 3})),
        (" timm:resnet18 ( num_classes=3 ) ", ("timm", "resnet18", [], {"num_classes": 3})),
    ],
)
def test_specs_with_colons_brackets_and_spaces(spec, expected):
    assert parse_spec(spec) == expected


def test_a_folder_is_no_network(tmp_path):
    for file, message in (
        ("notes.txt", "It is a folder$"),
        (
            "model.safetensors",
            r"folder of a run: name the network of the run.*--weights .*model\.s",
        ),
        ("config.json", "of a network of transformers is transformers:"),
    ):
        (tmp_path / file).write_bytes(b"")
        with pytest.raises(ValueError, match=message):
            parse_spec(str(tmp_path))


def test_a_folder_with_brackets_is_a_name(tmp_path):
    folder = tmp_path / "bert (1)"
    folder.mkdir()
    assert parse_spec(f"transformers:{folder}") == ("transformers", str(folder), [], {})


def test_a_text_network_without_padding(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = tokenizers.models.WordLevel({"<eos>": 0, "good": 1, "film": 2}, unk_token="<eos>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>"
    ).save_pretrained(tmp_path)
    config = transformers.GPT2Config(vocab_size=3, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    loaded = load_model(f"transformers:{tmp_path}")
    assert "no padding token: texts are padded with <eos>" in loaded.notes
    tokens = loaded.tokenizer(["good film", "good"], padding=True, return_tensors="pt")
    single = loaded.tokenizer(["good"], return_tensors="pt")
    with torch.no_grad():
        both, alone = loaded.model.eval()(**tokens).logits, loaded.model(**single).logits
    torch.testing.assert_close(both[1], alone[0])


def test_what_no_checkpoint_holds_is_the_same_in_each_call(nets, tmp_path):
    """A run that is resumed begins with the same weights, and nobody's random numbers change."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    save_bert(transformers.BertModel, tmp_path / "bert")
    for spec in (f"transformers:{tmp_path / 'bert'}", f"{nets}:Net"):
        before = torch.get_rng_state()
        first, again = load_model(spec), load_model(spec)
        assert torch.equal(torch.get_rng_state(), before)
        assert same_state(first.model.state_dict(), again.model.state_dict())
        assert first.missing == (["classifier.bias", "classifier.weight"] if "bert" in spec else [])
