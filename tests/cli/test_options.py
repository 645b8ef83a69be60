"""Records of options: what is typed, what is not, and what a file keeps of them."""

import json

import pytest

from fast.cli.job_file import _argv
from fast.cli.options import flags_of, parser_of
from fast.cli.spec import COMMANDS, FinetuneSpec, LandscapeSpec, RetentionSpec
from fast.cli.spec.base import shown
from fast.train.config import TrainConfig

NAMED = ["--model", "nets.py:Net(3)", "--data", "target.npz"]


def parsed(spec, *argv):
    return spec.parse(parser_of(spec).read([*NAMED, *argv]))


def test_only_what_was_typed_is_read():
    assert parser_of(FinetuneSpec).read(NAMED) == {"model": "nets.py:Net(3)", "data": "target.npz"}
    spec = parsed(FinetuneSpec)
    assert spec.training == TrainConfig()
    assert (spec.task.val_fraction, spec.task.flip, spec.plan) == (0.2, False, False)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--steps", "7"], "steps", 7),
        (["--lr", "1e-2"], "lr", 0.01),
        (["--no-max-entropy"], "max_entropy", False),
        (["--max-entropy"], "max_entropy", True),
        (["--class-weights", "balanced"], "class_weights", "balanced"),
        (["--class-weights", "1,2.5"], "class_weights", (1.0, 2.5)),
        (["--batch-norm", "per_task"], "batch_norm", "per_task"),
        (["--mean", "imagenet"], "mean", (0.485, 0.456, 0.406)),
        (["--std", "0.5,0.4"], "std", (0.5, 0.4)),
        (["--skip-broken"], "skip_broken", True),
        (["--input-size", "12"], "input_size", 12),
    ],
)
def test_values_have_the_types_of_their_fields(argv, name, value):
    spec = parsed(FinetuneSpec, *argv)
    record = spec.training if hasattr(spec.training, name) else spec.task
    assert getattr(record, name) == value
    assert type(getattr(record, name)) is type(value)


def test_what_a_file_keeps_of_the_options_gives_them_again():
    """The options of the training are at other values than their defaults."""
    changed = {
        "method": "l2-sp", "steps": 9, "batch_size": 8, "lr": 0.5, "eval_every": 3, "seed": 4,
        "head": "fc", "max_entropy": False, "head_lr_scale": 3.0, "anchor_decay": 0.1,
        "weight_decay": 0.2, "distill": 0.3, "source_skill": "features", "stall": 1, "ramp": 2,
        "head_steps": 5, "rehearse": 0.7, "average": 6, "batch_norm": "track", "optimizer": "sgd",
        "schedule": "constant", "warmup": 1, "grad_accum_steps": 2, "max_grad_norm": 1.5,
        "precision": "bf16", "label_smoothing": 0.1, "class_weights": [0.1, 2.0], "patience": 3,
        "save_every": 2, "progress": False, "device": "cpu",
    }  # fmt: skip
    assert all(getattr(TrainConfig(), name) != value for name, value in changed.items())
    argv = _argv(changed, parser_of(FinetuneSpec))
    spec = parsed(FinetuneSpec, *argv, "--mean", "0.5", "--flip", "--val-fraction", "0.3")
    kept = json.loads(json.dumps(shown(spec)))
    again = parser_of(FinetuneSpec).read(_argv(kept, parser_of(FinetuneSpec)))
    assert FinetuneSpec.parse(again) == spec
    assert shown(spec).items() >= {"lr": 0.5, "max_entropy": False, "flip": True}.items()
    assert "steps" not in shown(parsed(FinetuneSpec))


def test_a_command_has_no_option_that_it_sets_itself():
    for name in ("anchor_decay", "save_every", "resume"):
        with pytest.raises(ValueError, match="unrecognized"):
            parsed(RetentionSpec, f"--{name.replace('_', '-')}=1")
    with pytest.raises(ValueError, match="unrecognized"):
        parsed(LandscapeSpec, "--patience=3")


def test_a_demo_has_a_length_of_its_own():
    def demo(*argv):
        return LandscapeSpec.parse(parser_of(LandscapeSpec).read(["--demo", *argv])).training

    assert (demo().steps, demo().eval_every) == (100, 5)
    assert (demo("--steps", "7").steps, demo("--steps", "7").eval_every) == (7, 5)
    assert (demo("--epochs", "2").steps, demo("--epochs", "2").eval_every) == (None, None)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_line_of_help(name):
    for action in parser_of(COMMANDS[name])._actions:
        assert action.help[0] not in " (", action.option_strings


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--folds", "1"], "--folds must be at least 2; got 1"),
        (["--folds", "5", "--val-fraction", "0.1"], "--folds holds out each part in turn"),
        (["--folds", "5", "--save-every", "9"], "--folds: its runs are not saved"),
        (["--flip", "--augment", "light"], "--augment light mirrors images: drop --flip"),
        (["--max-seconds", "0"], "--max-seconds must be more than 0"),
        (["--mixup", "-1"], "mixup must not be negative"),
    ],
)
def test_options_that_do_not_go_together(argv, message):
    with pytest.raises(ValueError, match=message):
        parsed(FinetuneSpec, *argv)


@pytest.mark.parametrize("name", [n for n in COMMANDS if "--output" in flags_of(COMMANDS[n])])
def test_the_output_is_o_everywhere(name):
    assert parser_of(COMMANDS[name]).flags >= {"-o", "--output"}


@pytest.mark.parametrize("spec", [LandscapeSpec, RetentionSpec])
def test_folds_are_of_one_run(spec):
    with pytest.raises(ValueError, match="unrecognized arguments: --folds"):
        parsed(spec, "--folds", "5", "--source", "source.npz")


def test_what_is_typed_without_a_flag_is_shown():
    with pytest.raises(
        ValueError, match=r"--data x; type fast evaluate RUN \[DATA\] \[options\] \("
    ):
        parser_of(COMMANDS["evaluate"], "fast evaluate").read(["run", "--data", "x"])
