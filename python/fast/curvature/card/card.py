"""`SourceCard`: which weights the source task needs, estimated from a few hundred source inputs."""

from __future__ import annotations

import dataclasses
import html
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import dtensor
from fast.curvature.card.calibrate import Calibration
from fast.curvature.card.codes import Codes
from fast.curvature.card.estimate import TEMPERATURE, estimate_fields
from fast.curvature.card.file import fingerprint, read_card, write_card
from fast.curvature.network.network import Params
from fast.heads import unwrap


@dataclass(frozen=True, kw_only=True, repr=False)
class SourceCard:
    """Curvature of the source loss at the pretrained weights: a diagonal, calibrated in nats.

    `estimate` makes a card, `save` and `load` keep it. As `curvature=` of `fast.AdamW` it says how
    hard each weight is pulled back; `forecast` turns a displacement into nats of source loss.

    Attributes:
        entries: backbone parameter -> its diagonal `C_ii >= 0`, nats per squared weight, in 7 bits.
        fingerprints: backbone parameter -> hash of the weights at which the curvature was taken.
        num_samples, labels, temperature: how it was estimated.
        calibration: from the diagonal's energy to nats.
        source_loss, source_accuracy: those of the samples, where they had labels.
        seconds: time that estimating took.
    """

    entries: dict[str, Codes]
    fingerprints: dict[str, str]
    num_samples: int
    labels: str
    temperature: float
    calibration: Calibration
    source_loss: float | None = None
    source_accuracy: float | None = None
    seconds: float = 0.0
    # Name -> parameter of the model that this card was estimated on or bound to (weak, for an id
    # alone may by now be that of another tensor), and name -> a copy of that model's weights then.
    _names: dict[str, weakref.ref[Tensor]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )
    _anchors: dict[str, Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def estimate(
        cls,
        model: nn.Module,
        data: Any,
        loss_fn: Any = F.cross_entropy,
        *,
        labels: str = "sampled",
        num_samples: int = 256,
        calibration_samples: int = 64,
        temperature: float = TEMPERATURE,
        coherence: bool = True,
        seed: int = 0,
        params: Params = None,
    ) -> SourceCard:
        """Estimate the card of `model`, which answers the source task.

        `C_ii = T^2 mean (d log p_T(y | x) / dw_i)^2`, with `p_T` the softmax of the logits over the
        temperature T: the diagonal of the Gauss-Newton (Fisher) matrix, from squared gradients of
        single samples. That costs about 2 gradients per sample of `num_samples`, and 8 per
        calibration sample. The weights, modes and random state of the model stay as they are.

        Target inputs will do where no source data are left: the card then says which weights the
        source head's answers to the target inputs need. That protects less.

        Args:
            model: a classifier with its original head, or after `fast.replace_head`.
            data: source inputs: a tensor, or a tuple or mapping of tensors; `(inputs, labels)`; a
                Dataset; a DataLoader. `num_samples` of them are used, drawn at random; of a
                DataLoader the first, so let it shuffle sorted data.
            loss_fn: the source loss.
            labels: "sampled" from the network's own answers (default; none needed), its "predicted"
                ones, or those of the "data".
            num_samples: the largest number of samples; the standard error of an entry goes as the
                inverse root of their number.
            calibration_samples: number of those samples that the calibration measures on.
            temperature: T, of the answers that labels are sampled from, too. At 1 a network that is
                sure of its training images has hardly any curvature left; what it needs to stay
                sure shows at 3.
            coherence: whether to measure it by an exact product, half of the cost of a calibration
                sample; it is only reported.
            seed: seed of the labels and of the calibration.
            params: which parameters (default: those of the backbone that can be trained).

        Raises:
            ValueError, TypeError: an option or the data do not fit.
        """
        fields, backbone = estimate_fields(
            model,
            data,
            loss_fn,
            labels=labels,
            num_samples=num_samples,
            calibration_samples=calibration_samples,
            temperature=temperature,
            coherence=coherence,
            seed=seed,
            params=params,
        )
        return cls(**fields)._remember(backbone)

    def save(self, path: str | Path) -> Path:
        """Write the card as safetensors, whole or not at all: 0.91 bytes per backbone weight."""
        facts = {n: v for n, v in vars(self).items() if n != "entries" and not n.startswith("_")}
        facts["calibration"] = dataclasses.asdict(self.calibration)
        return write_card(Path(path), entries=self.entries, facts=facts, summary=str(self))

    @classmethod
    def load(cls, path: str | Path) -> SourceCard:
        """Read a card.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or damaged, is no card, or holds what no card holds.
        """
        entries, facts = read_card(Path(path))
        facts["calibration"] = Calibration(**facts["calibration"])
        return cls(entries=entries, **facts)

    def bind(self, model: nn.Module) -> SourceCard:
        """The same card, for this model, after a check that it is the card of its weights.

        Raises:
            ValueError: it is the card of another model, or of other weights; the message names the
                first tensor that differs.
        """
        params = dict(unwrap(model).named_parameters())
        for name, codes in self.entries.items():
            where = f"this card is of another model: its tensor {name!r}"
            if name not in params:
                hint = ""
                if any(".lora_" in n for n in params):
                    hint = "; fast.integrations.peft.adapter_card makes one for its LoRA factors"
                raise ValueError(f"{where} is no parameter of {type(model).__name__}{hint}")
            if params[name].shape != codes.codes.shape:
                raise ValueError(
                    f"{where} is {list(codes.codes.shape)}, the model's {list(params[name].shape)}"
                )
            if fingerprint(params[name]) != self.fingerprints[name]:
                raise ValueError(
                    f"this card is of other weights: {name!r} differs (first of "
                    f"{len(self.entries)} tensors checked in order). Bind it to the pretrained "
                    "checkpoint that it was estimated on, before training"
                )
        return self._remember({n: params[n] for n in self.entries})

    def without_weights(self) -> SourceCard:
        """The same card without its copy of the pretrained weights: `energy` and `forecast` then
        need `anchors=`, such as those that the optimizer keeps."""
        return dataclasses.replace(self, _anchors={})

    def is_bound(self, model: nn.Module) -> bool:
        """Whether the card was bound to this model, at the weights that it had then."""
        own = dict(unwrap(model).named_parameters())
        names = self._names.items()
        return bool(names) and all(r() is own.get(name) for name, r in names)

    def diagonal(self) -> dict[str, Tensor]:
        """Parameter name -> `C_ii`, float32 on the CPU, in nats per squared weight."""
        return {name: codes.decode() for name, codes in self.entries.items()}

    @property
    def mean(self) -> float:
        """Mean of the diagonal over all weights."""
        total = sum(float(c.decode().double().sum()) for c in self.entries.values())
        return total / max(1, sum(c.codes.numel() for c in self.entries.values()))

    def curvature_for(self, params: Iterable[Tensor]) -> list[Tensor | None]:
        """`F` of each parameter: its diagonal over the mean of all; None for those not in the card.

        Mean 1 keeps the meaning of `anchor_decay` from network to network. The parameters of the
        model of `estimate` or `bind` are recognised by identity, others by the hash of their
        values: those that were sharded after it, too (`fully_shard` makes new ones), each of which
        gets its shard of `F`.

        Raises:
            ValueError: not one of the parameters is in the card.
        """
        mean = self.mean or 1.0
        return [
            None if n is None else dtensor.shard(self.entries[n].decode() / mean, p)
            for n, p in self._match(list(params))
        ]

    def energy(self, params: Iterable[Tensor], anchors: Sequence[Tensor] | None = None) -> float:
        """`1/2 sum C_ii (w - w0)_i^2`: the forecast of the diagonal alone, before calibration.

        Args:
            anchors: the pretrained weights of `params` (default: the copy that this card holds).
        """
        params = list(params)
        total = 0.0
        for i, (name, p) in enumerate(self._match(params)):
            if name is None:
                continue
            before = anchors[i] if anchors is not None else self._anchors.get(name)
            if before is None:
                raise ValueError(
                    "this card does not know the pretrained weights: card.bind(model) before "
                    "training, or pass anchors="
                )
            c = dtensor.shard(self.entries[name].decode(), p).double()
            displacement = (p - dtensor.like(before, p)).detach().double()
            total += float(dtensor.whole((c * displacement.square()).sum()))
        return 0.5 * total

    def forecast(self, params: Iterable[Tensor], anchors: Sequence[Tensor] | None = None) -> float:
        """Forecast rise of the source loss at these weights, in nats.

        The forecast is right within a factor of a few only (`calibration.spread`, and more for
        directions unlike Adam's first steps); `Calibration.through` a measurement of the run itself
        makes it useful.
        """
        return self.calibration.nats(self.energy(params, anchors))

    def __repr__(self) -> str:
        count = sum(c.codes.numel() for c in self.entries.values())
        return (
            f"SourceCard({count:,} weights in {len(self.entries)} tensors, {self.num_samples} "
            f"samples, labels {self.labels!r})"
        )

    def __str__(self) -> str:
        count = sum(c.codes.numel() for c in self.entries.values())
        c = self.calibration
        lines = [
            f"Source card of {count:,} backbone weights in {len(self.entries)} tensors",
            f"  {self.num_samples} source samples, labels {self.labels}, temperature "
            f"{self.temperature:g}, estimated in {self.seconds:.1f} s",
            f"  rise of source loss = {c.scale:.3g} * energy^{c.exponent:.2f} nats, within a "
            f"factor {c.spread:.1f} on the steps it was measured on",
        ]
        if math.isfinite(c.coherence):
            lines.append(
                f"  coherence {c.coherence:.0f}: an exact Gauss-Newton product over the diagonal "
                "alone"
            )
        if self.source_loss is not None:
            lines.append(
                f"  source loss {self.source_loss:.3f} nats, accuracy {self.source_accuracy:.1%}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled card belongs to no model's parameters until it is bound."""
        return {**self.__dict__, "_names": {}}

    def _remember(self, params: Mapping[str, nn.Parameter]) -> SourceCard:
        """The same card, which knows these parameters by identity and holds a copy of them."""
        names: dict[str, weakref.ref[Tensor]] = {n: weakref.ref(p) for n, p in params.items()}
        anchors = {n: p.detach().clone() for n, p in params.items()}
        return dataclasses.replace(self, _names=names, _anchors=anchors)

    def _match(self, params: list[Tensor]) -> list[tuple[str | None, Tensor]]:
        """(name in this card or None, parameter), in the order of `params`."""
        bound = {id(p): n for n, reference in self._names.items() if (p := reference()) is not None}
        if any(id(p) in bound for p in params):
            return [(bound.get(id(p)), p) for p in params]
        # Equal tensors (fresh biases) are told apart by their order, which is the model's.
        by_value: dict[tuple[str, torch.Size], list[str]] = {}
        for name, codes in self.entries.items():
            by_value.setdefault((self.fingerprints[name], codes.codes.shape), []).append(name)
        names: list[str | None] = []
        for p in params:
            same = by_value.get((fingerprint(p), p.shape))
            names.append(same.pop(0) if same else None)
        if params and not any(names):
            first = next(iter(self.entries))
            raise ValueError(
                f"none of the {len(params)} parameters is one of this card (its first is "
                f"{first!r}): another model, or weights that have moved. Call card.bind(model) on "
                "the pretrained model before training"
            )
        return list(zip(names, params, strict=True))
