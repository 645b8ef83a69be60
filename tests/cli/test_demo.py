"""`fast demo` on scikit-learn's digits."""

import pytest
import torch

from fast.cli import main
from fast.cli.commands import demo
from fast.cli.task import digits

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")


def test_digits_are_split_once_and_labelled_from_0():
    train, test = digits.digits(range(5, 10))
    assert len(train[1]) + len(test[1]) == 896
    assert sorted(set(test[1].tolist())) == [0, 1, 2, 3, 4]
    assert train[0].shape[1:] == (1, 8, 8)
    assert train[0].min() >= -1
    assert train[0].max() <= 1
    seen = {x.numpy().tobytes() for x in train[0]}
    assert sum(x.numpy().tobytes() in seen for x in test[0]) <= 2  # few digits are drawn alike


def test_short_demo_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(digits, "PRETRAIN_EPOCHS", 2)
    for name, value in {"SEEDS": (0,), "STEPS": 5}.items():
        monkeypatch.setattr(demo, name, value)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert main(["demo", "--output", str(tmp_path / "d")]) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    out, err = capsys.readouterr()
    assert "\nfast " in out
    assert "\nvanilla " in out
    assert " --m" not in out + err  # it has no option that advice may name
    assert (tmp_path / "d" / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_demo_shows_what_it_says(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    table = {
        line.split()[0]: [float(x) for x in line.split()[2:-1] if x.replace(".", "").isdigit()]
        for line in out.splitlines()
        if line.startswith(("fast  ", "vanilla  "))
    }
    target, before, after = (table["fast"][i] for i in (0, 2, 3))
    assert before > 98
    assert target >= table["vanilla"][0] - 1
    assert before - after <= (before - table["vanilla"][3]) / 2
