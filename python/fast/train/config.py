"""The options of `fast.finetune`: those of the adaptation, and those of the loop around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fast.adapt.config import AdaptConfig, AdaptOptions, OptimizerName, setting

if TYPE_CHECKING:  # the options are read for `fast --help`, which does without torch
    import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]
# Options that may be given as paths and devices, and are kept as text.
AS_TEXT = ("output", "resume", "device")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(AdaptConfig):
    """Options of `fast.finetune`. `None` stands for the method's own default.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    eval_every: int | None = setting(
        None, "optimizer steps between evaluations (default: 1/10 run)", least=1
    )
    precision: str = setting("auto", "arithmetic of the forward pass", choices=Precision)
    label_smoothing: float = setting(0.0, "label smoothing of the cross-entropy")
    class_weights: str | tuple[float, ...] | None = setting(
        None, "'balanced', or one weight per class"
    )
    mixup: float = setting(0.0, "Mixup of images: alpha of its Beta distribution, as 0.2", least=0)
    cutmix: float = setting(0.0, "CutMix of images, likewise, as 1", least=0)
    tta: bool = setting(False, "measure the target on each image and its mirror image together")
    num_workers: int | None = setting(
        None,
        "processes that read samples of a Dataset (default: up to 8 for files that do not fit into "
        "memory, else 0)",
        least=0,
    )
    patience: int | None = setting(
        None, "stop after this many evaluations without a better val", least=1
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:1, ... (default: FAST_DEVICE, or CUDA if there)", free=True
    )
    output: str | None = setting(None, "folder for model, checkpoints, config and log", free=True)
    save_every: int | None = setting(
        None, "steps between checkpoints (default: at evaluations)", least=1, free=True
    )
    resume: str | None = setting(None, "folder of an interrupted run to go on with", free=True)
    progress: bool | None = setting(
        None, "progress bar (default: in a terminal or a notebook)", free=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1); got {self.label_smoothing}")
        if self.patience is not None and self.forget_budget is not None:
            raise ValueError(
                "patience goes back to weights that forget_budget has not checked: drop one"
            )

    def _plain(self, name: str, value: Any, kinds: tuple[type, ...]) -> Any:
        if name in AS_TEXT and value is not None:
            return str(value)
        if name == "class_weights" and value is not None and not isinstance(value, str):
            if isinstance(value, (Mapping, Set)):
                raise ValueError(
                    "class_weights must be 'balanced' or one weight per class, in their order; got "
                    f"a {type(value).__name__}"
                )
            try:
                return tuple(float(weight) for weight in value)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"class_weights must be 'balanced' or one weight per class; got {value!r}"
                ) from error
        return super()._plain(name, value, kinds)


class TrainOptions(AdaptOptions, total=False):
    """The fields of `TrainConfig` as keyword arguments, for type checkers."""

    optimizer: OptimizerName
    eval_every: int | None
    precision: Precision
    label_smoothing: float
    class_weights: Literal["balanced"] | Iterable[float] | None
    mixup: float
    cutmix: float
    tta: bool
    num_workers: int | None
    patience: int | None
    device: str | torch.device | None
    output: str | Path | None
    save_every: int | None
    resume: str | Path | None
    progress: bool | None
