"""Single-bit flips, zeroed blocks and mixes of checkpoints and saved results: none is silent.

pytest -m slow tests/campaigns/test_damage.py
"""

from __future__ import annotations

import shutil

import pytest
import torch

import fast
from campaigns.campaign import Campaign, cases
from fast.models.saved import load_saved
from interruption import Stopped, dying_at
from networks import ConvNet, images

TRAIN, VAL, KEPT = images(64, 4, seed=1), images(30, 4, seed=2), images(24, 5, seed=3)[0]
OPTIONS = {"steps": 6, "eval_every": 2, "save_every": 2, "batch_size": 16, "source_inputs": KEPT}
BLOCK = 512
UNCLEAR = (RuntimeError, LookupError, TypeError, AttributeError, OSError)


def start():
    torch.manual_seed(0)
    return ConvNet()


def run(folder, at=None, **options):
    """A run, which dies at step `at`."""
    with dying_at(at):
        return fast.finetune(start(), TRAIN, VAL, output=folder, **OPTIONS, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`whole`, ended and saved; cut after steps 2 and 4; of another seed; saved of another rate."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "whole").save(folder / "result")
    run(folder / "faster", lr=1e-2).save(folder / "other result")
    for name, at, more in (("cut", 4, {}), ("early", 2, {}), ("other", 4, {"seed": 1})):
        with pytest.raises(Stopped):
            run(folder / name, at, **more)
    return folder


def damage(campaign, folder, others):
    """Change one file of a folder; what was done."""
    chance = campaign.random
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "tensorboard" not in p.parts)
    file = chance.choice(files)
    data = bytearray(file.read_bytes())
    kind = chance.choice(["bit", "bit", "bit", "block", "mix"])
    if kind == "bit" or (kind == "block" and file.suffix != ".safetensors"):
        place = chance.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
        return f"bit {place} of {file.name}"
    if kind == "block":
        place = chance.randrange(max(1, len(data) - BLOCK))
        data[place : place + BLOCK] = bytes(min(BLOCK, len(data) - place))
        file.write_bytes(data)
        return f"zeros at {place} of {file.name}"
    other = chance.choice(others)
    there = sorted(other.rglob(file.name))
    if there:
        shutil.copy(there[0], file)
    return f"{file.name} of {other.name}"


def outcome(campaign, what, act, same):
    """Count what came of `act`; `same` tells whether its value is the undamaged one."""
    try:
        value = act()
    except (ValueError, FileNotFoundError) as error:
        told = str(error)
        named = any(s in told for s in (".safetensors", ".json", "checkpoint-", "options"))
        campaign.count("refused", None if named else f"{what}: {told}")
    except UNCLEAR as error:
        campaign.count("unclear", f"{what}: {type(error).__name__} {error}")
    else:
        harmless = same(value)
        campaign.count("harmless" if harmless else "SILENT", None if harmless else what)


def equal(a, b):
    return all(torch.equal(a[k], v) for k, v in b.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:resume. the run was saved with")
def test_damaged_checkpoints(runs, tmp_path, capsys):
    campaign = Campaign("damaged checkpoints")
    whole = run(tmp_path / "whole").model.state_dict()
    for _ in range(cases(200)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(runs / "cut", tmp_path / "run")
        what = damage(campaign, tmp_path / "run", [runs / "early", runs / "other", runs / "whole"])
        outcome(
            campaign,
            what,
            lambda: fast.finetune(start(), TRAIN, VAL, resume=tmp_path / "run", **OPTIONS),
            lambda result: equal(result.model.state_dict(), whole),
        )
    campaign.finish(capsys)


@pytest.mark.slow
def test_damaged_results(runs, tmp_path, capsys):
    campaign = Campaign("damaged results")
    whole = load_saved(runs / "result", start(), VAL[0][:2])
    for _ in range(cases(100)):
        shutil.rmtree(tmp_path / "result", ignore_errors=True)
        shutil.copytree(runs / "result", tmp_path / "result")
        what = damage(campaign, tmp_path / "result", [runs / "other result"])
        outcome(
            campaign,
            what,
            lambda: load_saved(tmp_path / "result", start(), VAL[0][:2]),
            lambda saved: (
                equal(saved.target.state_dict(), whole.target.state_dict())
                and equal(saved.source.state_dict(), whole.source.state_dict())
            ),
        )
    campaign.finish(capsys)
