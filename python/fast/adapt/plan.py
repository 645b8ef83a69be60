"""The plan of an adaptation: the method's settings with the user's options applied, as data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fast.adapt.config import AdaptConfig
from fast.adapt.defaults import (
    EASED,
    OWN,
    SWITCHED,
    TOGETHER,
    default_clip,
    default_head_decay,
    default_lr,
    default_rank,
    default_tasks,
    distill_weight,
    rehearse_weight,
    too_few_for_norms,
)
from fast.adapt.methods import METHODS
from fast.errors import counted, warn
from fast.optim.groups import ramp_factor

log = logging.getLogger("fast")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an adaptation will do.

    Attributes:
        steps: optimizer steps.
        target_size, source_size: target samples of a step, and the places beside them in which
            features are rehearsed.
        rehearsed: whose features: `"source inputs"`, `"target inputs"`, `"target inputs (half or
            more with shuffled patches)"`, or `""` for none.
        head: `"new"` or `"keep"`.
        weighted: source curvature weights the pull, where the method uses it.
        tasks: `"together"`: one function, the same weights and statistics, answers both tasks;
            `"switched"`: two functions, between which `fast.source_task` switches what is kept per
            task. The heads are switched in both.
        adapter_rank: of the target's adapters; 0 for none.

    The other fields are the options of the same name (`fast.adapt.config.AdaptConfig`).
    """

    method: str
    steps: int
    target_size: int
    source_size: int
    rehearsed: str
    lr: float
    head: str
    weighted: bool
    max_entropy: bool
    head_lr_scale: float
    anchor_decay: float
    distill: float
    stall: int
    ramp: int
    head_steps: int
    rehearse: float
    average: int
    batch_norm: str
    tasks: str = TOGETHER
    adapter_rank: int = 0
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    head_decay: float = 0.0
    max_grad_norm: float | None = None
    grad_accum_steps: int = 1
    forget_budget: str | float | None = None

    def lr_factor(self, step: int) -> float:
        """Factor of the schedule on the peak learning rate at `step` (0-based).

        Linear warm-up to 1 over `warmup` steps, then constant, or half a cosine down to 0
        (Loshchilov and Hutter 2017, arXiv 1608.03983).
        """
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def ramp_factor(self, step: int) -> float:
        """Factor of stall and ramp on the backbone's learning rate at `step` (0-based)."""
        return ramp_factor(step, self.stall, self.ramp)

    def check_length(self, coming: int, *, owner: str, way_out: str) -> None:
        """Compare the number of steps that a Trainer will take with the plan's.

        Args:
            owner: who has the plan, for messages.
            way_out: the Trainer's option that takes as many steps as the plan.

        Raises:
            ValueError: the Trainer takes more.
        """
        if coming > self.steps:
            raise ValueError(
                f"the Trainer takes {coming} steps and the plan of {owner} ends after "
                f"{self.steps}: pass steps={coming}, or {way_out}"
            )
        if coming < self.steps:
            warn(
                f"the Trainer ends after {coming} of the {self.steps} steps that {owner} has "
                f"planned: the learning rate does not fall to its end. Pass steps={coming}",
            )

    def note_short(self, done: int) -> None:
        """Say that a loop has ended before the last step."""
        if 0 < done < self.steps:
            log.info(
                "finished after %d of the %d steps that were planned, so the learning rate has not "
                "come down: if the loop ends there, give steps=%d",
                done,
                self.steps,
                done,
            )

    def warn_beyond(self) -> None:
        """Warn that a step comes after the last one."""
        warn(
            f"the plan of {self.steps} steps is over and the loop goes on: its learning rate is at "
            "its end, and a forget_budget is not checked again before finish(). Pass the steps= or "
            "epochs= that the loop takes; the loader's batches should have adaptation.target_size "
            "samples"
        )

    def check_taken(self, done: int) -> None:
        """Warn where the batches of whole steps were taken for micro-batches.

        Args:
            done: steps that the loop has taken with all of the plan's batches, but for those that
                a loader has read ahead.
        """
        # A loader reads one batch ahead.
        most = min(self.steps / self.grad_accum_steps, self.steps - 2)
        if self.grad_accum_steps > 1 and 0 < done <= most:
            warn(
                f"the plan's batches are over after {done} of its {self.steps} steps: each is that "
                f"of a whole step, of which forward() takes 1/{self.grad_accum_steps} at a time "
                "(docs/own-loop.md)"
            )

    def __str__(self) -> str:
        """One line that says what will be done."""
        steps = f"{counted(self.steps, 'step')} of {counted(self.target_size, 'sample')}"
        if self.rehearsed:
            steps += f" and {self.source_size} {self.rehearsed}, whose features are kept"
        first = ""
        if self.head_steps:
            first = f"the head alone for up to {self.head_steps} steps, then "
        return f"{self.method}: {first}{steps}; lr {self.lr:g}{self._short_of_it}; {self.functions}"

    @property
    def _short_of_it(self) -> str:
        """What share of its rate the run gets to, where it ends on the way up."""
        rising = {
            "stall" if self.steps <= self.stall else "ramp": self.ramp_factor(self.steps - 1),
            "warm-up": min(1.0, self.steps / (self.warmup + 1)),
        }
        short = [name for name, reached in rising.items() if reached < 1]
        if not short:
            return ""
        share = f"{100 * math.prod(rising.values()):.3g} %"
        return f" (the run ends at {share} of it, before the end of its {' and '.join(short)})"

    @property
    def functions(self) -> str:
        """How many functions answer the two tasks, and what is switched between them."""
        if self.tasks == TOGETHER:
            return "one function"
        norms = ["batch norms"] if self.batch_norm == "per_task" else []
        adapters = ["adapters"] if self.adapter_rank else []
        return f"two functions: {' and '.join(adapters + norms)} are switched"


def plan_for(
    config: AdaptConfig,
    *,
    steps: int,
    target_size: int = 0,
    source_size: int = 0,
    weighted: bool = False,
    head_is_last: bool = False,
    rehearsed: str = "",
    batch_norms: bool = False,
    layer_norms: bool = False,
    noisy_batches: Callable[[], bool] = lambda: False,
    samples: int | None = None,
) -> Plan:
    """The plan of this run; options that were not given are the method's own.

    Args:
        steps, target_size, source_size, rehearsed: see `Plan`.
        weighted: the pull is weighted by source curvature.
        head_is_last: the head's outputs are the logits.
        batch_norms, layer_norms: the network has such norms.
        noisy_batches: measures whether the statistics of a batch are too noisy to normalise by; it
            is called where batch norms of the target's own come into question.
        samples: of the training data, where their number is known.

    Raises:
        ValueError: an option that the method, or a head that is kept, has no use for.
    """
    method = METHODS[config.method]
    ease = EASED if rehearsed else 1.0
    decay = method.anchor_decay
    if weighted and method.card_decay is not None:
        decay = method.card_decay
    new_head = not config.keeps_head
    if not new_head:
        _check_kept_head(config, rehearsed)
    rank = int(_given(config.adapter_rank, default_rank(config, layer_norms=layer_norms)))

    def own_norms() -> bool:
        """Whether the target can have batch norms of its own."""
        if not batch_norms or (rank and too_few_for_norms(samples)):
            return False
        return not noisy_batches()

    tasks, batch_norm = _regime(config, rehearsed, rank, batch_norms, own_norms)
    head_steps = 0
    if head_is_last and new_head:
        head_steps = int(_given(config.head_steps, method.head_steps))
    # Per-task norms give the source head features of its own, and a head that is kept has to answer
    # target inputs otherwise: in both cases there is nothing to distil.
    distill = 0.0
    if batch_norm != "per_task" and new_head:
        distill = ease * method.distill * distill_weight(samples)
    rule = default_lr(
        config,
        steps=steps,
        rehearsed=bool(rehearsed),
        layer_norms=layer_norms,
        target_size=target_size,
        samples=samples,
    )
    lr = _given(config.lr, rule)
    head_lr_scale = _given(config.head_lr_scale, method.head_lr_scale) if new_head else 1.0
    return Plan(
        method=config.method,
        steps=steps,
        target_size=target_size,
        source_size=source_size,
        rehearsed=rehearsed,
        lr=lr,
        head="new" if new_head else "keep",
        weighted=weighted,
        max_entropy=new_head and bool(_given(config.max_entropy, method.max_entropy)),
        head_lr_scale=head_lr_scale,
        anchor_decay=_given(config.anchor_decay, ease * decay),
        distill=_given(config.distill, distill),
        stall=_stall(config, steps, starts_cold=new_head and not head_steps),
        ramp=int(_given(config.ramp, ease * method.ramp)),
        head_steps=head_steps,
        rehearse=rehearse_weight(config, rehearsed, samples) if rehearsed else 0.0,
        average=int(_given(config.average, min(method.average, steps // 4))),
        batch_norm=batch_norm,
        tasks=tasks,
        adapter_rank=rank,
        optimizer=config.optimizer,
        schedule=config.schedule,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        head_decay=default_head_decay(config, samples, lr * head_lr_scale) if new_head else 0.0,
        max_grad_norm=config.max_grad_norm or default_clip(config),
        grad_accum_steps=config.grad_accum_steps,
        forget_budget=config.forget_budget,
    )


def _given(value: float | None, default: float) -> float:
    """An option's value, or its default where it was not given."""
    return default if value is None else value


def _regime(
    config: AdaptConfig,
    rehearsed: str,
    rank: int,
    batch_norms: bool,
    own_norms: Callable[[], bool],
) -> tuple[str, str]:
    """`Plan.tasks` and `Plan.batch_norm`.

    Args:
        rank: of the adapters.
        batch_norms: the network has batch norms.
        own_norms: tells whether the target can have some of its own.

    Raises:
        ValueError: the tasks are to be switched, and nothing is kept per task.
    """
    if config.batch_norm not in (None, "frozen") and not batch_norms:
        warn(f"batch_norm={config.batch_norm!r} is not used: the network has no batch norm")
        config = replace(config, batch_norm=None)
    tasks = config.tasks or default_tasks(config, rehearsed)
    batch_norm = config.batch_norm or "frozen"
    if tasks == SWITCHED and config.batch_norm is None and own_norms():
        batch_norm = "per_task"
    if tasks == SWITCHED and not rank and batch_norm != "per_task":
        if config.tasks is not None:
            raise ValueError(
                "tasks='switched' switches what is kept per task, and there is nothing: "
                f"{_no_norms(batch_norms)}; method='adapter' keeps adapters per task"
            )
        tasks = TOGETHER
    return tasks, batch_norm


def _stall(config: AdaptConfig, steps: int, *, starts_cold: bool) -> int:
    """`Plan.stall`.

    Args:
        starts_cold: the head is new, and was not trained before the first step.

    Raises:
        ValueError: the method does not have the option that was given.
    """
    method = METHODS[config.method]
    if method.probe:
        if config.stall is not None:
            raise ValueError(f"{config.method} has no stall; it has probe_steps")
        return int(_given(config.probe_steps, max(1, round(method.probe * steps))))
    if config.probe_steps is not None:
        raise ValueError(f"probe_steps is for lp-ft; {config.method} has stall")
    return int(_given(config.stall, method.stall if starts_cold else 0))


def _no_norms(batch_norms: bool) -> str:
    """Why no batch norms are kept per task."""
    if not batch_norms:
        return "the network has no batch norm"
    return "the statistics of a batch are too noisy (batch_norm='per_task' takes them anyway)"


def _check_kept_head(config: AdaptConfig, rehearsed: str) -> None:
    """Raise ValueError for what asks for a new head."""
    without: dict[str, object] = {
        "max_entropy": config.max_entropy,
        "head_steps": config.head_steps,
        "head_lr_scale": config.head_lr_scale,
        "head_decay": config.head_decay,
        "probe_steps": config.probe_steps,
    }
    for name, value in without.items():
        if value:
            raise ValueError(f"{name} is for a new head, and head='keep' goes on with the old one")
    if METHODS[config.method].probe:
        raise ValueError(
            f"method {config.method!r} trains a new head first, and head='keep' goes on with the "
            "old one; use 'fast' or 'vanilla'"
        )
    if config.batch_norm == "per_task":
        raise ValueError(
            "batch_norm='per_task' tells two tasks apart, and with head='keep' there is one; use "
            "'frozen' or 'track'"
        )
    if rehearsed in OWN:
        raise ValueError(
            "rehearse holds the features of target inputs where there are no source_inputs, and "
            "with head='keep' those have to change: pass source_inputs="
        )
