"""Where the records of a run go: callbacks, TensorBoard, a bar, a DataFrame."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import fast
from fast.progress import BAR_FORMAT
from fast.train.log.figures import figures, progress_bar
from helpers import ROOT, run_python
from networks import ConvNet, images

TRAIN, VAL = images(60, 4, seed=1), images(30, 4, seed=2)
RUN = {"steps": 4, "eval_every": 2, "batch_size": 16, "progress": False}


def test_a_callback_gets_each_record():
    records = []

    def spoil(record):
        record.clear()  # a copy: the history stays

    result = fast.finetune(ConvNet(), TRAIN, VAL, callbacks=[spoil, records.append], **RUN)
    assert records == result.history
    assert [record["step"] for record in records] == [0, 2, 4]


def test_a_callback_that_evaluates_the_model_ends_no_training():
    """All steps after the first evaluation ran in evaluation mode, without dropout."""
    model, modes = ConvNet(), []
    model.project.register_forward_hook(
        lambda layer, *_: modes.append(layer.training) if torch.is_grad_enabled() else None
    )
    options = RUN | {"rehearse": 0.0, "distill": 0.0}
    fast.finetune(model, TRAIN, VAL, callbacks=[lambda _: model.eval()], **options)
    assert modes[-4:] == [True] * 4


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_callback_raises_ends_the_run_with_its_name(folder, tmp_path):
    def report_to_server(record):
        if record["step"] == 2:
            raise ConnectionError("no server")

    options = RUN | ({"output": tmp_path} if folder else {})
    with pytest.raises(ConnectionError, match="no server") as error_info:
        fast.finetune(ConvNet(), TRAIN, callbacks=[report_to_server], **options)
    (note,) = error_info.value.__notes__
    assert "report_to_server, at step 2" in note


@pytest.mark.parametrize("callbacks", [print, [print, "log"], None])
def test_callbacks_that_are_no_list_of_functions(callbacks):
    model = ConvNet()
    before = dict(model.named_modules())
    with pytest.raises(TypeError, match="callbacks must be a list of functions"):
        fast.finetune(model, TRAIN, callbacks=callbacks, **RUN)
    assert dict(model.named_modules()) == before


def test_the_history_is_a_data_frame():
    pandas = pytest.importorskip("pandas", reason="the history becomes one of its DataFrames")
    result = fast.finetune(ConvNet(), TRAIN, VAL, **RUN)
    frame = pandas.DataFrame(result.history).set_index("step")
    assert frame.index.tolist() == [0, 2, 4]
    assert frame["target_accuracy"].iloc[-1] == result.target_accuracy


def test_tensorboard_gets_the_figures_of_a_folder(tmp_path):
    pytest.importorskip("tensorboard", reason="it reads what is written")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fast.finetune(ConvNet(), TRAIN, VAL, output=tmp_path, **RUN)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = board.Scalars("target_accuracy")
    assert [(p.step, pytest.approx(p.value)) for p in points] == [
        (r["step"], r["target_accuracy"]) for r in result.history
    ]


@pytest.mark.parametrize(("config", "shown"), [({"IPKernelApp": {}}, True), ({}, False)])
def test_a_notebook_has_a_bar(config, shown, monkeypatch):
    shell = SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False, write=str, flush=str))
    bar = progress_bar(None, 0, 3, "fast")
    assert bar.disable is not shown
    bar.close()


def test_the_page_about_watching_a_run(monkeypatch):
    """Its Python runs as it stands; stand-ins take the place of the loggers, which need servers."""
    pytest.importorskip("pandas", reason="the page makes a DataFrame")
    pytest.importorskip("matplotlib", reason="the page draws")
    page = (ROOT / "docs" / "watching.md").read_text()
    reports: list[dict] = []
    logger = SimpleNamespace(
        init=lambda project: None,
        set_experiment=lambda name: None,
        log=lambda figures, step: reports.append(figures),
        log_metrics=lambda figures, step: reports.append(figures),
    )
    monkeypatch.setitem(sys.modules, "wandb", logger)
    monkeypatch.setitem(sys.modules, "mlflow", logger)
    names = dict(zip(("x", "y", "x_val", "y_val"), (*TRAIN, *VAL), strict=True))
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        names["model"] = ConvNet()
        exec(block.replace("epochs=5", "steps=2, eval_every=1"), names)
    assert [figures["step"] for figures in reports] == [0, 1, 2] * 2
    assert all(isinstance(value, int | float) for figures in reports for value in figures.values())
    assert names["frame"].index.tolist() == [0, 1, 2]


def test_the_log_is_silenced_before_the_first_run_too():
    run_python(
        "import logging, fast\n"
        "log = logging.getLogger('fast')\n"
        "log.setLevel('WARNING')\n"
        "fast.finetune\n"
        "assert log.handlers and log.level == logging.WARNING"
    )


def test_the_bar_shows_what_is_kept_in_80_columns():
    record = {"source_accuracy": 0.825, "forecast": 0.123, "target_accuracy": 0.81}
    out = io.StringIO()
    with tqdm(
        total=1000,
        initial=21,
        desc="fast",
        ncols=80,
        file=out,
        bar_format=BAR_FORMAT,
    ) as bar:
        bar.set_postfix_str(figures(record, before=0.915))
    line = next(line for line in out.getvalue().split("\r") if "source" in line).rstrip()
    assert "21/1000, source 82.5 (-9.0) forgets 0.12 target 81.0" in line
    assert len(line) <= 80
    assert line.endswith("]")
