"""A joined network answers the classes of two tasks in one softmax, as a plain module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast.files import read_json, reading, write_json
from fast.heads.forward import logits_of
from fast.heads.replace import name_classes
from fast.models.saved import (
    ADAPTERS_FILE,
    JOIN_FILE,
    MODEL_FILE,
    OPTIONS_FILE,
    RESULT_FILE,
    SOURCE_HEAD_FILE,
    SOURCE_NORMS_FILE,
    load_saved,
    write_manifest,
)
from fast.models.saved.description import save_library_config
from fast.models.signature import Signature
from fast.tensor_files import write_tensors


@dataclass(frozen=True, kw_only=True)
class HeadCalibration:
    """How two heads were brought to one scale.

    Losses are cross-entropies over all classes in nats, in which each task has half the weight.

    Attributes:
        source_scale, target_scale: factors on the logits of each head (one over a temperature).
        offset: what is added to the target's logits, at the mean of the features.
        ridge: weight of the penalty on what is added beside the offset, which depends on the
            features.
        loss_before: the loss with the heads as they were, side by side.
        loss: the loss after calibration, on samples that it was not fitted on (cross-validated).
        mistaken: the share of these samples that are given a class of the other task.
        source_labelled: whether the source inputs had labels; if not, `source_scale` is 1.
    """

    source_scale: float
    target_scale: float
    offset: float
    ridge: float
    loss_before: float
    loss: float
    mistaken: float
    source_labelled: bool


class Joined(nn.Module):
    """Logits `[B, C]` over the classes of the source and then those of the target.

    Attributes:
        networks: one plain network whose head has all rows, or two plain networks whose logits are
            put side by side (an input then takes two passes).
        rows: the class of each row of the heads.
        classes: the C different names among the rows, in the order of the logits. A class that both
            tasks have gets the sum of their probabilities.
        source_rows: how many of the rows are the source's; they come first.
        head: name of the layer of `networks` that makes the logits.
        calibration: how the heads were brought to one scale.
        inputs: shapes and types of the network's inputs, where they are known.
    """

    place: Tensor

    def __init__(
        self,
        networks: Sequence[nn.Module],
        rows: Sequence[str],
        source_rows: int,
        head: str,
        calibration: HeadCalibration | None = None,
        inputs: Signature = None,
    ) -> None:
        super().__init__()
        self.source_rows = source_rows
        self.inputs = inputs
        self.head = head
        self.networks = nn.ModuleList(networks)
        self.rows = tuple(rows)
        self.classes = tuple(dict.fromkeys(rows))
        self.calibration = calibration
        places = {name: place for place, name in enumerate(self.classes)}
        self.register_buffer(
            "place", torch.tensor([places[name] for name in rows]), persistent=False
        )
        self.eval()

    @property
    def network(self) -> nn.Module:
        """The network whose head has all rows; it can learn further tasks.

        Raises:
            ValueError: there are two networks.
        """
        if self.passes > 1:
            raise ValueError(
                "each task has norms (or adapters) of its own, and so its own network: adapt with "
                'batch_norm="frozen" to join them in one'
            )
        return self.networks[0]

    @property
    def plain(self) -> nn.Module:
        """The plain network with the same logits, where there is one; else this module."""
        same = self.passes == 1 and len(self.rows) == len(self.classes)
        return self.networks[0] if same else self

    @property
    def passes(self) -> int:
        """The number of forward passes that an input takes."""
        return len(self.networks)

    def name_rows(self) -> None:
        """Tell networks of transformers the names of their rows, for `save_pretrained` say."""
        cut = self.source_rows if self.passes > 1 else None
        for network, rows in zip(self.networks, (self.rows[:cut], self.rows[cut:]), strict=False):
            name_classes(getattr(network, "config", None), list(rows))

    def classes_of(self, task: str) -> list[int]:
        """The places, among `classes`, of the classes that a task has.

        Args:
            task: source or target.
        """
        own = slice(None, self.source_rows) if task == "source" else slice(self.source_rows, None)
        return self.place[own].tolist()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        answers = [logits_of(network(*args, **kwargs)) for network in self.networks]
        return merged(torch.cat(answers, 1), self.place, len(self.classes))

    def save(self, folder: str | Path, facts: dict[str, Any] | None = None) -> Path:
        """Write the joined network; `load_joined` reads it.

        `model.safetensors` loads into the plain architecture with a head of all rows. Where the
        tasks have norms of their own it holds the target's network, and
        `source_head.safetensors` and `source_norms.safetensors` hold what differs in the source's.
        `join.json` has the names of the rows, the passes and the calibration, `result.json` the
        classes and the shapes of inputs, `config.json` the architecture of a transformers network,
        and `manifest.json` the hashes of all files.

        Args:
            facts: further entries of `result.json`, of the run for instance.

        Returns:
            the folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        source, target = self.networks[0], self.networks[-1]
        left = [ADAPTERS_FILE, OPTIONS_FILE]  # by a network that was saved here before
        if self.passes > 1:
            write_tensors(source.get_submodule(self.head).state_dict(), folder / SOURCE_HEAD_FILE)
            write_tensors(own_state(source, target, self.head), folder / SOURCE_NORMS_FILE)
        else:
            left += [SOURCE_HEAD_FILE, SOURCE_NORMS_FILE]
        write_tensors(target.state_dict(), folder / MODEL_FILE)
        for name in left:
            (folder / name).unlink(missing_ok=True)
        calibration = asdict(self.calibration) if self.calibration else None
        write_json(
            folder / JOIN_FILE,
            {
                "rows": self.rows,
                "source_rows": self.source_rows,
                "head": self.head,
                "passes": self.passes,
                "calibration": calibration,
            },
        )
        save_library_config(target, folder, list(self.rows) if self.passes == 1 else None)
        result = {**(facts or {}), "inputs": self.inputs, "classes": self.classes}
        write_json(folder / RESULT_FILE, result)
        write_manifest(folder, None, {})
        return folder


def load_joined(folder: str | Path, model: nn.Module) -> Joined:
    """Read what `Joined.save` or `fast join` wrote.

    Args:
        model: the plain architecture, with a head for any number of classes.

    Raises:
        FileNotFoundError: the folder holds no joined network.
        ValueError: a file is damaged, or belongs to another network.
    """
    folder = Path(folder)
    file = folder / JOIN_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {JOIN_FILE}: fast join writes one")
    facts = read_json(file)
    with reading(file):
        rows, passes = [str(name) for name in facts["rows"]], int(facts["passes"])
        source_rows = int(facts["source_rows"])
        head, figures = str(facts["head"]), facts["calibration"]
        calibration = HeadCalibration(**figures) if figures else None
    saved = load_saved(folder, model, head=head)
    networks = [saved.target]
    if passes > 1:
        if saved.source is None:
            raise ValueError(saved.note)
        networks.insert(0, saved.source)
    joined = Joined(networks, rows, source_rows, head, calibration)
    joined.name_rows()
    return joined


def merged(logits: Tensor, place: Tensor, num_classes: int) -> Tensor:
    """Turn logits `[B, R]` of rows into logits `[B, C]` of classes, by log-sum-exp over the rows.

    Args:
        place: the class of each row, `[R]`; the first rows of all classes are in order.
    """
    if num_classes == logits.shape[1]:
        return logits
    index = place.expand(len(logits), -1)
    empty = logits.new_full((len(logits), num_classes), -torch.inf)
    top = empty.scatter_reduce(1, index, logits, "amax")
    shares = (logits - top.gather(1, index)).exp()
    return torch.zeros_like(top).scatter_add(1, index, shares).log() + top


def own_state(source: nn.Module, target: nn.Module, head: str) -> dict[str, Tensor]:
    """The tensors in which the source's network differs from the target's, without the head."""
    theirs = target.state_dict()
    return {
        name: value
        for name, value in source.state_dict().items()
        if not name.startswith(f"{head}.") and not torch.equal(value, theirs[name])
    }
