"""Prepare raw inputs for a network; the steps are saved with its weights, in numbers and words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fast.data.audio.waveforms import SoundFormat
from fast.data.dataset import as_data
from fast.data.images.format import BGR, ImageFormat
from fast.data.images.pixels import is_image_split, prepare_images, prepared_by
from fast.data.sources import EncodedAudio, FileReport, Split
from fast.errors import import_library
from fast.files import read_json, reading, write_json
from fast.workers import workers_for

PREPARATION_FILE = "preprocessing.json"
# What a feature extractor of transformers saves.
EXTRACTOR_FILE = "preprocessor_config.json"
# Any of these files is part of what a tokenizer of transformers saves.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def most_tokens(model: nn.Module, tokenizer: Any) -> int | None:
    """How many tokens a text network of transformers has positions for; None where no limit is
    known."""
    limits = [getattr(tokenizer, "model_max_length", None)]
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int):
        # RoBERTa counts positions from the one after the padding's.
        offsets = [
            m.padding_idx + 1
            for name, m in model.named_modules()
            if name.endswith("position_embeddings") and getattr(m, "padding_idx", None) is not None
        ]
        limits.append(positions - max(offsets, default=0))
    # A tokenizer that knows no limit says 10^30, and XLNet has -1 positions.
    return min((x for x in limits if isinstance(x, int) and 0 < x < 1 << 30), default=None)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The steps that pictures, texts and sounds go through on their way to a network.

    Attributes:
        images: how pictures are decoded, resized and normalised; None if the data were not images.
        sounds: how sounds are resampled, cut and padded; None if the data were not sounds.
        tokenizer: a transformers tokenizer; None if the data were not texts.
        max_length: length at which a text is cut, in tokens.
    """

    images: ImageFormat | None = None
    sounds: SoundFormat | None = None
    tokenizer: Any = None
    max_length: int = 128

    @property
    def kind(self) -> str:
        """What the raw inputs are: images, sounds, texts or arrays."""
        if self.images is not None:
            return "images"
        if self.sounds is not None:
            return "sounds"
        return "arrays" if self.tokenizer is None else "texts"

    def __call__(self, split: Split, report: FileReport | None = None) -> Any:
        """Prepare a split as `(inputs, labels)` tensors, or as a Dataset where pictures are too
        large for memory.

        Args:
            report: records pictures and sounds that cannot be read, which without it are an error,
                and counts the texts and sounds that are cut.

        Raises:
            ValueError: the network takes inputs of another kind, or these cannot be read.
        """
        if is_image_split(split):
            if self.images is None:
                raise ValueError(f"the data are images, and the network takes {self.kind}")
            return prepare_images(split, self.images, report)
        if isinstance(split.inputs, EncodedAudio):
            if self.sounds is None:
                raise ValueError(f"the data are sounds, and the network takes {self.kind}")
            return self.sounds(split, report)
        labels = torch.from_numpy(split.labels)
        if isinstance(split.inputs, list):
            tokens = self.tokens(split.inputs)
            if report is not None:
                report.cut += self._cut(split.inputs, tokens)
            return tokens, labels
        if isinstance(split.inputs, dict):
            return {name: _tensor(value) for name, value in split.inputs.items()}, labels
        return _tensor(split.inputs), labels

    def batches(
        self, split: Split, batch_size: int, report: FileReport
    ) -> Iterator[tuple[Any, torch.Tensor]]:
        """Prepare a split batch by batch, in order; pictures are decoded on demand.

        Args:
            report: records files that cannot be read; these are left out.

        Yields:
            inputs and their labels.

        Raises:
            ValueError: see `__call__`.
        """
        if self.images is not None and is_image_split(split):
            pictures = prepared_by(split, self.images, "none")
            yield from pictures.batches(batch_size, report, workers_for(len(split)))
        else:
            yield from as_data(self(split, report), "inputs").eval_batches(batch_size)

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Token ids and masks `[N, L]`, padded to the longest text."""
        if self.tokenizer is None:
            raise ValueError("the data are texts: only a transformers: network brings a tokenizer")
        return dict(
            self.tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
        )

    def _cut(self, texts: list[str], tokens: dict[str, torch.Tensor]) -> int:
        """How many texts are longer than `max_length` tokens."""
        if tokens["input_ids"].shape[1] < self.max_length:
            return 0
        longer = self.tokenizer(texts, truncation=True, max_length=self.max_length + 1)
        return sum(len(row) > self.max_length for row in longer["input_ids"])

    @property
    def words(self) -> list[str]:
        """The steps in one sentence each, for somebody who has to write them elsewhere."""
        if self.images is not None:
            return _picture_words(self.images)
        if self.sounds is not None:
            return self.sounds.words
        if self.tokenizer is not None:
            return [
                f"Tokenize with the {type(self.tokenizer).__name__} beside this file.",
                f"Cut a text to {self.max_length} tokens; pad a batch to its longest text.",
            ]
        return ["The network takes arrays as they were given to fast.finetune."]

    def facts(self) -> dict[str, Any]:
        """The preparation as plain values, with its words, as `preprocessing.json` has it."""
        facts: dict[str, Any] = {"kind": self.kind, "words": self.words}
        if self.images is not None:
            facts["images"] = dataclasses.asdict(self.images)
        if self.tokenizer is not None:
            facts["texts"] = {"max_length": self.max_length}
        if self.sounds is not None:
            facts["sounds"] = self.sounds.facts()
        return facts

    def save(self, folder: Path) -> None:
        """Write `preprocessing.json`, and the files of the tokenizer or feature extractor."""
        self.save_parts(folder)
        write_json(folder / PREPARATION_FILE, self.facts())

    def save_parts(self, folder: Path) -> None:
        """Write the files of the tokenizer or feature extractor."""
        extractor = None if self.sounds is None else self.sounds.extractor
        for part in (self.tokenizer, extractor):
            if part is not None:
                part.save_pretrained(folder)


def read_preparation(folder: Path) -> Preparation:
    """Read what `Preparation.save` wrote; where there is no file, the inputs are arrays.

    Raises:
        ValueError: the file is damaged.
        ImportError: there is a tokenizer, and transformers is not installed.
    """
    file = folder / PREPARATION_FILE
    if not file.is_file():
        return Preparation()
    facts = read_json(file)
    with reading(file):
        images, texts, sounds = (facts.get(name) for name in ("images", "texts", "sounds"))
        form = None if images is None else ImageFormat(**images)
        length = {} if texts is None else {"max_length": int(texts["max_length"])}
        has_extractor = sounds is not None and sounds.pop("extractor") is not None
        sound_format = None if sounds is None else SoundFormat(**sounds)
    tokenizer = None
    if texts is not None:
        tokenizer = _part(folder, "AutoTokenizer", TOKENIZER_FILES, "reads texts", "tokenizer")
    if sound_format is not None and has_extractor:
        files, what = (EXTRACTOR_FILE,), "feature extractor"
        extractor = _part(folder, "AutoFeatureExtractor", files, "hears sounds", what)
        sound_format = dataclasses.replace(sound_format, extractor=extractor)
    return Preparation(images=form, sounds=sound_format, tokenizer=tokenizer, **length)


def _part(folder: Path, kind: str, files: tuple[str, ...], does: str, what: str) -> Any:
    """Load a tokenizer or a feature extractor from the folder.

    Args:
        kind: the class of transformers that loads it.
        files: the files of which it needs one.
        does: what the network does with it, for the message.
        what: the name of the part, for the message.
    """
    if not any((folder / name).is_file() for name in files):
        raise ValueError(f"{folder}: the network {does}, and its {what} is not there")
    transformers = import_library("transformers", f"{folder} needs")
    return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False)


def _picture_words(form: ImageFormat) -> list[str]:
    words = [
        "Decode; turn upright by the EXIF tag; show transparency on white; divide 16 bits by 257.",
        "Convert to grey (one channel)." if form.channels == 1 else "Convert to red, green, blue.",
    ]
    if form.size is None:
        words.append("Keep the size: all pictures must have that of the training pictures.")
    else:
        side = form.resize or form.size
        if form.stretch:
            words.append(f"Resize both sides to {side} pixels ({form.interpolation}, antialiased).")
        else:
            words.append(
                f"Resize the shorter side to {side} pixels and the longer in proportion, rounded "
                f"down ({form.interpolation}, antialiased)."
            )
        words.append(f"Cut out the central square of {form.size} pixels.")
    if form.channels == BGR:
        words.append("Put blue first: the order is blue, green, red.")
    words.append(
        f"Divide by 255, subtract mean {_listed(form.mean)} and divide by std {_listed(form.std)}, "
        "by channel."
    )
    words.append("Arrange as float32 [batch, channels, height, width].")
    return words


def _listed(values: Any) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"


def _tensor(x: np.ndarray) -> torch.Tensor:
    # Files may hold types and byte orders that torch does not have.
    return torch.from_numpy(
        np.ascontiguousarray(x, np.float32 if x.dtype.kind == "f" else np.int64)
    )
