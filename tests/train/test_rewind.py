"""A network that has forgotten is taken back to a forgetting budget."""

from __future__ import annotations

import copy
import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from fast.heads import fold_head, source_task
from helpers import ROOT, same_state
from networks import ConvNet, SharedHead, TextNet, images


def teach(model, x, y, steps=60, lr=1e-2):
    """A loop that knows nothing of this library."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def case():
    """A network of one task, the same tuned to another with another number of classes, data."""
    torch.manual_seed(0)
    x_old, y_old = images(240, 5)
    base = teach(ConvNet(5), x_old, y_old)
    x, y = images(240, 3, seed=3)
    x = x.flip(-1)
    tuned = copy.deepcopy(base)
    tuned.decide = nn.Linear(16, 3)
    teach(tuned, x, y, steps=80)
    return types.SimpleNamespace(base=base, tuned=tuned, source=(x_old, y_old), data=(x, y))


def source_loss(model, data):
    x, y = data
    with torch.no_grad(), source_task(model):
        return F.cross_entropy(model(x), y).item()


def test_the_budget_is_kept_and_more_is_lost_without_it(case):
    x, y = case.source
    result = fast.rewind(case.base, case.tuned, case.source, 0.02, data=case.data)
    rest = (x[120:], y[120:])
    loss = source_loss(result.model, rest) - source_loss(case.base, rest)
    assert result.lost == pytest.approx(loss, abs=1e-4)
    assert result.lost <= 0.02
    assert result.history[0]["stage"] == "tuned"
    assert result.history[0]["forecast"] > 0.04
    assert result.target_accuracy > 0.5
    assert result.source_accuracy_before is not None


def test_what_is_passed_stays_as_it_was(case):
    before = [copy.deepcopy(m.state_dict()) for m in (case.base, case.tuned)]
    fast.rewind(case.base, case.tuned, case.source, 0.02, data=case.data)
    for model, state in zip((case.base, case.tuned), before, strict=True):
        assert same_state(model, state)


def test_the_names_of_the_tuned_classes_stay(case, tmp_path):
    """A network of transformers came back with its classes numbered."""
    tuned, names = copy.deepcopy(case.tuned), ["ant", "bee", "cat"]
    tuned.config = types.SimpleNamespace(id2label=dict(enumerate(names)))
    with pytest.warns(UserWarning, match="budget 15 nats"):
        result = fast.rewind(case.base, tuned, case.source, 15, data=case.data)
    result.save(tmp_path)
    with pytest.warns(UserWarning, match="budget 15 nats"):
        again = fast.rewind(case.base, tmp_path, case.source, 15, data=case.data)
    assert result.classes == again.classes == names


def test_a_network_inside_the_budget_is_returned_as_it_is(case):
    with pytest.warns(UserWarning, match="budget 15 nats"):
        result = fast.rewind(case.base, case.tuned, case.source, 15, data=case.data)
    assert result.final["stage"] == "tuned"
    x = case.data[0]
    with torch.no_grad():
        assert torch.equal(result.model(x), case.tuned(x))


def test_without_target_data_it_says_what_is_not_known(case):
    with pytest.warns(UserWarning, match="no target data"):
        result = fast.rewind(case.base, case.tuned, case.source[0], 0.02)
    assert result.unknown
    assert result.target_accuracy is None
    assert {r["stage"] for r in result.history} == {"tuned", "line"}
    assert result.lost <= 0.02
    assert 0 < result.final["place"] < 1


def test_a_small_budget_takes_it_far_back_and_the_head_is_taught_again(case):
    result = fast.rewind(case.base, case.tuned, case.source, 0.001, data=case.data)
    assert [r["stage"] for r in result.history][:2] == ["tuned", "line"]
    assert result.lost <= 0.001
    assert result.final["place"] < 0.5
    weight = result.model.decide.linear.weight
    assert weight.shape == case.tuned.decide.weight.shape
    assert not torch.equal(weight, case.tuned.decide.weight)
    assert result.target_accuracy == result.final["target_accuracy"]


def test_the_head_of_the_source_is_fitted_to_its_features(case):
    """At the weights that were found, the source loses less than with its head of before."""
    result = fast.rewind(case.base, case.tuned, case.source[0], 0.02, data=case.data)
    rest = tuple(x[120:] for x in case.source)
    after = source_loss(result.model, rest)
    head = result.model.decide
    assert not torch.equal(head.source.weight, case.base.decide.weight)
    head.source.load_state_dict(case.base.decide.state_dict())
    assert after < source_loss(result.model, rest)


@pytest.mark.parametrize("form", ["modules", "states", "files", "prefixed", "folder"])
def test_every_form_of_a_checkpoint_gives_the_same(case, tmp_path, form):
    base, tuned, options = case.base, case.tuned, {"model": ConvNet(5)}
    if form == "states":
        base, tuned = base.state_dict(), tuned.state_dict()
    elif form in ("files", "prefixed"):
        prefix = "module." if form == "prefixed" else ""
        for name, model in (("base", base), ("tuned", tuned)):
            state = {prefix + n: x for n, x in model.state_dict().items()}
            torch.save({"state_dict": state, "epoch": 3}, tmp_path / f"{name}.pt")
        base, tuned = tmp_path / "base.pt", str(tmp_path / "tuned.pt")
    elif form == "folder":
        torch.save(tuned.state_dict(), tmp_path / "pytorch_model.bin")
        tuned = tmp_path
    result = fast.rewind(base, tuned, case.source, 0.02, data=case.data, **options)
    expected = fast.rewind(case.base, case.tuned, case.source, 0.02, data=case.data)
    assert same_state(fold_head(result.model), fold_head(expected.model))


def test_nats_that_may_be_meant_as_points_are_told(case):
    with pytest.warns(UserWarning, match="budget 5 nats lets .* points .* written '5%'"):
        fast.rewind(case.base, case.tuned, case.source, 5)


def test_a_head_of_another_name_is_taken(case, caplog):
    state = {n.replace("decide.", "decide.1."): x for n, x in case.tuned.state_dict().items()}
    with caplog.at_level("INFO", "fast"), pytest.warns(UserWarning, match="budget 15 nats"):
        result = fast.rewind(case.base, state, case.source, 15)
    assert "decide.1.weight is taken for the head" in caplog.text
    with torch.no_grad():
        assert torch.equal(result.model(case.data[0]), case.tuned(case.data[0]))


def test_the_result_is_saved_and_read_as_any_other(case, tmp_path):
    from fast.models.saved import load_saved

    result = fast.rewind(case.base, case.tuned, case.source, 0.02, data=case.data)
    saved = load_saved(result.save(tmp_path), ConvNet(5), case.data[0])
    with torch.no_grad():
        torch.testing.assert_close(saved.target.eval()(case.data[0]), result.model(case.data[0]))
    assert source_loss(saved.source.eval(), case.source) == pytest.approx(
        source_loss(result.model, case.source), abs=1e-5
    )


def test_the_picture_has_the_line_the_budget_and_the_choice(case):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    result = fast.rewind(case.base, case.tuned, case.source, 0.001, data=case.data)
    axis = result.plot().axes[0]
    labels = axis.get_legend_handles_labels()[1]
    assert labels == ["on the line", "chosen", "budget"]
    lines = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert lines[0].get_ydata()[0] == 0.001
    assert len(axis.texts) == 2  # target accuracy at the end, and where it was chosen


def test_points_of_accuracy_with_labels_and_without(case):
    for source in (case.source, case.source[0]):
        result = fast.rewind(case.base, case.tuned, source, "2%", data=case.data)
        assert result.lost <= 0.02


def test_a_network_of_named_inputs():
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (80, 6))
    inputs = {"ids": ids, "mask": torch.ones(80, 6)}
    base = TextNet(5).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.5 * torch.randn_like(p))
    result = fast.rewind(base, tuned, inputs, 0.01, data=(inputs, ids[:, 0] % 5))
    assert result.lost <= 0.01


def test_a_head_that_shares_its_weights():
    torch.manual_seed(0)
    x, y = images(80, 5)
    shared = SharedHead(5).eval()
    other = copy.deepcopy(shared)
    with torch.no_grad():
        other.body[1].weight.add_(0.5 * torch.randn_like(other.body[1].weight))
    result = fast.rewind(shared, other, x, 0.01, data=(x, y))
    assert result.lost <= 0.01
    assert fold_head(result.model).branches[0] is result.model.fc


def test_transformers():
    transformers = pytest.importorskip("transformers", reason="a network of transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        base.classifier.weight.mul_(50)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.bert.parameters():
            p.add_(0.2 * torch.randn_like(p))
    inputs = {"input_ids": torch.randint(0, 30, (60, 5))}
    with pytest.warns(UserWarning, match="no target data"):
        result = fast.rewind(base, tuned, inputs, 0.01)
    assert result.lost <= 0.01
    assert result.final["place"] < 1


BROKEN = {
    "the same twice": (lambda c: {"tuned": c.base}, "nothing to rewind"),
    "another architecture": (
        lambda c: {"tuned": SharedHead(5)},
        "tuned: is of another architecture: lacks",
    ),
    "no architecture": (lambda c: {"base": c.base.state_dict()}, "model must be given"),
    "no checkpoint": (lambda c: {"tuned": 3}, "tuned must be a network"),
    "an empty state": (lambda c: {"tuned": {}}, "tuned: a state dict holds tensors"),
    "no file": (lambda c: {"tuned": "nowhere.pt"}, "tuned nowhere.pt: no such file"),
    "no source inputs": (lambda c: {"source_inputs": None}, "source_inputs must be given"),
    "few source inputs": (lambda c: {"source_inputs": c.source[0][:3]}, "source_inputs: 3 samples"),
    "budget": (lambda c: {"budget": "much"}, "^budget must be"),
    "budget of zero": (lambda c: {"budget": "0%"}, "^budget must be"),
    "labels": (lambda c: {"data": (c.data[0], c.data[1] + 3)}, "data: labels must be 0..2"),
    "NaN in base": (lambda c: {"base": _nan(c.base)}, "base: weights that are NaN"),
    "NaN in tuned": (lambda c: {"tuned": _nan(c.tuned)}, "tuned: weights that are NaN"),
}


def _nan(model):
    model = copy.deepcopy(model)
    model.project.weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("what", BROKEN)
def test_bad_input_is_named(case, what):
    change, message = BROKEN[what]
    arguments = {
        "base": case.base, "tuned": case.tuned, "source_inputs": case.source, "budget": 0.1,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        fast.rewind(**arguments | change(case))


def test_the_page_of_the_docs_runs(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "rewind.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    torch.save(case.tuned.state_dict(), "signs.pt")
    names = {"model": case.base, "x_old": case.source[0], "x": case.data[0], "y": case.data[1]}
    with pytest.warns(UserWarning, match="no target data"):
        exec("\n".join(blocks), names)
    assert (tmp_path / "rewound" / "model.safetensors").is_file()
    assert (tmp_path / "rewind.png").is_file()


def test_the_command_line_gives_what_python_gives(tmp_path, monkeypatch, capsys):
    import numpy as np

    from fast.cli import main
    from fast.tensor_files import load_tensors

    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    names: dict = {}
    exec(NETS, names)
    torch.manual_seed(0)
    x_old, x = torch.randn(120, 8), torch.randn(90, 8)
    y_old, y = x_old.argmax(1) % 4, x.argmin(1) % 3
    base = teach(names["Net"](4), x_old, y_old)
    tuned = copy.deepcopy(base)
    tuned.fc = nn.Linear(16, 3)
    teach(tuned, x, y)
    torch.save(base.state_dict(), "base.pt")
    torch.save(tuned.state_dict(), "tuned.pt")
    for name, inputs, labels in (("old", x_old, y_old), ("new", x, y)):
        np.savez(f"{name}.npz", x_train=inputs.numpy(), y_train=labels.numpy())
    argv = ["rewind", "--model", "nets.py:Net(4)", "--base", "base.pt", "--tuned", "tuned.pt",
            "--source-inputs", "old.npz", "--budget", "0.1", "--data", "new.npz",
            "--output", "rewound"]  # fmt: skip
    assert main(argv) == 0
    assert "forget budget 0.1 nats" in capsys.readouterr().out
    order = np.random.default_rng(0).permutation(120)
    result = fast.rewind(base, tuned, (x_old[order], y_old[order]), "0.1", data=(x, y))
    saved = load_tensors(tmp_path / "rewound" / "model.safetensors")
    assert same_state(fold_head(result.model), saved)
    assert main(["evaluate", "rewound", "new.npz"]) == 0
    assert "samples (target task)" in capsys.readouterr().out
    assert main(["export", "rewound", "--format", "torch.export", "-o", "served"]) == 0
    with pytest.raises(ValueError, match=r"its network is code: .*nets\.py:Net\(4\)"):
        fast.load("rewound")

    assert main(["rewind", "--tuned", "tuned.pt", "--budget", "0.1"]) == 2
    assert "--source-inputs must be given" in capsys.readouterr().err
    assert main([*argv[:-1], "other", "--tuned", "base.pt"]) == 2
    assert "nothing to rewind" in capsys.readouterr().err
    assert main(argv) == 0  # once more, into its own folder
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "model.safetensors").write_bytes(b"a network")
    assert main([*argv[:-1], "others"]) == 2
    assert "others: is not empty; name another folder" in capsys.readouterr().err
    assert (tmp_path / "others" / "model.safetensors").read_bytes() == b"a network"


NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        return self.fc(self.body(x))
"""
