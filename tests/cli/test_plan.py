"""`fast finetune --plan`: what a run would do, and nothing done."""

import json

import pytest
import torch

from fast.train.finetune import plan
from networks import ConvNet, images


def rows(out):
    """Settings by name, from the table that is printed."""
    lines = out.split("-------\n")[-1] if "-------\n" in out else out
    return dict(line.split(None, 1) for line in lines.splitlines() if "  " in line)


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("method", ["fast", "vanilla", "lp-ft"])
def test_the_plan_is_that_of_the_run(job, method):
    options = ("--steps", 8, "--method", method, "--output", "out")
    before = files(job.folder)
    code, out, err = job.fast("finetune", *job.args, *options, "--plan")
    assert code == 0, err
    assert out.partition("\n")[2].startswith("data: 4 classes, 200 training samples, 80 held out")
    assert f"\n{method}: " in out
    assert files(job.folder) == before
    printed = rows(out)
    assert "head_layer        fc (Linear, 3 outputs)" in out
    code, _, err = job.fast("finetune", *job.args, *options)
    assert code == 0, err
    done = json.loads((job.folder / "out" / "result.json").read_text())["plan"]
    for name, value in done.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value) or "none"
        assert printed[name].strip() == shown, name


def test_bad_input_is_said(job):
    code, _, err = job.fast("finetune", *job.args, "--plan", "--source", "target.npz")
    assert code == 2
    assert "--source target.npz: labels must be 0..2" in err


def test_an_interrupted_run_can_be_asked_for_its_plan(job):
    code, _, err = job.fast("finetune", *job.args, "--steps", 4, "--output", "out")
    assert code == 0, err
    before = files(job.folder)
    code, out, err = job.fast("finetune", "--resume", "out", "--plan")
    assert code == 0, err
    assert rows(out)["steps"].strip() == "4"
    assert files(job.folder) == before


def test_planning_leaves_the_network_as_it_is():
    torch.manual_seed(0)
    model = ConvNet(4).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    generator = torch.get_rng_state()
    settings = plan(model, images(40, 3), steps=12, method="fast")
    assert (settings.steps, settings.method) == (12, "fast")
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    with pytest.raises(ValueError, match="steps must be at least 1"):
        plan(model, images(40, 3), steps=0)
