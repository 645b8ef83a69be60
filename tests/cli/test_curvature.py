"""`fast curvature` from files to files."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fast.cli import main
from fast.cli.report.curvature import _estimate
from fast.curvature import Hessian
from fast.curvature.algorithms.trace import Estimate
from fast.models.load import load_model
from fast.models.saved import load_saved

FEW = ("--samples", 24, "--batch-size", 12, "--top", 2, "--trace-products", 6, "--probes", 1,
       "--lanczos-steps", 6, "--no-progress")  # fmt: skip
ADAPT = ("--steps", 6, "--lr", 0.01, "--output", "out")


@pytest.fixture(scope="module")
def run_folder(pretrained, job_args, tmp_path_factory):
    """What `fast finetune --output` leaves, made once."""
    folder = tmp_path_factory.mktemp("adapted")
    shutil.copytree(pretrained, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["finetune", *job_args, *map(str, ADAPT)]) == 0
    return folder / "out"


@pytest.fixture
def adapted(job, run_folder):
    shutil.copytree(run_folder, job.folder / "out")
    return job


def test_both_losses_of_a_checkpoint(adapted):
    code, out, err = adapted.fast("curvature", "--checkpoint", "out", *FEW)
    assert code == 0, err
    results = json.loads((adapted.folder / "out/curvature/curvature.json").read_text())
    assert list(results["losses"]) == ["source", "target"]
    assert (adapted.folder / "out/curvature/spectrum.png").read_bytes()[1:4] == b"PNG"
    for name, classes in (("source", 3), ("target", 4)):
        loss = results["losses"][name]
        assert loss["parameters"] == 80 + 16 + 129 * classes - classes + classes
        assert list(loss["layers"]) == ["conv", "norm", "fc"]
        assert loss["top"]["converged"]
        assert out.count(name) == 3  # a column of the whole network's, two of its layers
    # The network that was pretrained on the source still knows most of it.
    assert results["losses"]["source"]["loss"] < 1.0
    assert "24 samples of" in err


def test_the_figures_are_those_of_the_saved_networks(adapted):
    adapted.fast("curvature", "--checkpoint", "out", *FEW[:-1], "--no-progress", "--samples", 80)
    results = json.loads((adapted.folder / "out/curvature/curvature.json").read_text())["losses"]
    arrays = np.load("source.npz")
    x = ((torch.from_numpy(arrays["x_test"]).float() / 255 - 0.5) / 0.5)[:, None]
    y = torch.from_numpy(arrays["y_test"])
    index = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:80]
    net = load_model("nets.py:Net(3)").model
    saved = load_saved("out", net, x[:2])
    assert saved.source is not None
    H = Hessian(saved.source.eval(), F.cross_entropy, (x[index], y[index]))
    loss, gradient = H.value_and_gradient()
    assert results["source"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert results["source"]["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-3)
    assert results["source"]["top"]["values"] == pytest.approx(H.top(2).values.tolist(), rel=1e-3)
    layer = H.block(r"fc\..*").top(1).values
    shown = results["source"]["layers"]["fc"]["top"]["values"]
    assert shown == pytest.approx(layer.tolist(), rel=1e-2)


def test_a_plain_network_and_its_own_task(job):
    args = ("--model", "nets.py:Net(3)", "--weights", "net.safetensors", "--source", "source.npz")
    code, _, err = job.fast("curvature", *args, *FEW, "--kind", "ggn", "--output", "c")
    assert code == 0, err
    results = json.loads((job.folder / "c/curvature.json").read_text())["losses"]
    assert list(results) == ["source"]
    assert results["source"]["top"]["values"][0] > 0
    assert results["source"]["loss"] < 0.5
    code, _, err = job.fast("curvature", *args, *FEW, "--no-layers", "--probes", 0, "--output", "d")
    assert code == 0, err
    assert [p.name for p in (job.folder / "d").iterdir()] == ["curvature.json"]


def test_the_source_of_batch_norms_kept_per_task_is_not_guessed(job):
    job.fast("finetune", *job.args, *ADAPT, "--batch-norm", "per_task")
    (job.folder / "out" / "source_norms.safetensors").unlink()  # as older versions wrote it
    code, _, err = job.fast("curvature", "--checkpoint", "out", *FEW)
    assert code == 0
    assert "the source loss is left out: out: the source's batch norm statistics" in err
    results = json.loads((job.folder / "out/curvature/curvature.json").read_text())
    assert list(results["losses"]) == ["target"]


def no_model_file(folder):
    (folder / "out" / "model.safetensors").unlink()


def one_sample(folder):
    arrays = np.load(folder / "source.npz")
    np.savez(folder / "source.npz", **{name: part[:1] for name, part in arrays.items()})


def flat_root(folder):
    """The square root of zero has an infinite slope."""
    (folder / "root.py").write_text(
        "from nets import Net\n\n\nclass Root(Net):\n    def forward(self, x):\n"
        "        return super().forward(x).mul(0).sqrt()\n"
    )


def keep(folder):
    pass


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (no_model_file, ["--checkpoint", "out"], "out has no model.safetensors"),
        (keep, ["--checkpoint", "nowhere"], "--checkpoint nowhere: no such folder"),
        (keep, ["--checkpoint", "out", "--weights", "net.safetensors"], "drop one of the two"),
        (keep, ["--checkpoint", "out", "--model", "nets.py:Net(3, 4)"], "out/model.safetensors"),
        (keep, ["--checkpoint", "out", "--top", 201], "--top must be at most 200; got 201"),
        (keep, ["--checkpoint", "out", "--samples", 0], "--samples must be at least 1; got 0"),
        (keep, ["--checkpoint", "out", "--params", "x"], "matches no parameter"),
        (keep, ["--checkpoint", "out", "--params", "("], "'(' is no regular expression"),
        (one_sample, ["--checkpoint", "out", "--source", "source.npz"], "--source: 1 sample;"),
        (keep, ["--checkpoint", "out", "--output", "/proc/new/er"], "/proc/new/er: cannot be wr"),
        (keep, ["--checkpoint", "out", "--output", "nets.py/new"], "nets.py/new: cannot be wr"),
        (flat_root, ["--model", "root.py:Root(3)", "--source", "source.npz"], "is not finite"),
        (keep, ["--checkpoint", "out", "--source", "target.npz"], "--source target.npz: labels"),
        (keep, ["--checkpoint", "out", "--device", "cuda:99"], "there is cpu"),
        (keep, ["--model", "nets.py:Net(3)"], "--source or --data must be given"),
        (keep, ["--model", "nets.py:Net(3)", "--data", "target.npz"], "needs a --checkpoint"),
        (keep, ["--source", "source.npz"], "--model must be given"),
    ],
)
def test_bad_input_says_so_and_writes_nothing(adapted, spoil, options, message):
    spoil(adapted.folder)
    before = sorted(p for p in adapted.folder.rglob("*") if "__pycache__" not in p.parts)
    code, _, err = adapted.fast("curvature", *FEW, *options)
    assert code == 2
    assert message in err
    assert err.splitlines()[-1].startswith("fast: error: ")
    after = sorted(p for p in adapted.folder.rglob("*") if "__pycache__" not in p.parts)
    assert after == before


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(2097.3, 163, "2097 ± 160"), (187.2, 24.3, "187.2 ± 24"), (1.5, 0.123, "1.5 ± 0.12")],
)
def test_errors_of_a_trace_are_plain_numbers(value, error, text):
    assert _estimate(Estimate(value=value, stderr=error, num_matvecs=6)) == text
