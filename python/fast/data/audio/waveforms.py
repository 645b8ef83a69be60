"""Sound files as waveforms: mono, at the rate that a network was trained on."""

from __future__ import annotations

import math
import wave
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.data.sources import FileReport, Split
from fast.errors import first_line, some

# Full scale of integer samples by their bytes; those of one byte are unsigned.
SCALES = {1: 128, 2: 1 << 15, 3: 1 << 23, 4: 1 << 31}


@dataclass(frozen=True, kw_only=True)
class SoundFormat:
    """What sounds go through on their way to a network.

    Attributes:
        seconds: a longer sound is cut to this length.
        rate: samples per second to which sounds are resampled; None keeps the rate of the files,
            which must then be the same in all of them.
        extractor: a feature extractor of transformers, which turns waveforms into inputs; None: the
            inputs are waveforms `[N, T]` in -1..1 of exactly `seconds`, cut or followed by silence.
    """

    seconds: float
    rate: int | None = None
    extractor: Any = None

    def __call__(self, split: Split, report: FileReport | None = None) -> tuple[Any, Tensor]:
        """The sounds of a split as a network takes them, and their labels int64 `[N]`.

        Args:
            report: takes the files that cannot be read, and counts what is cut; None: they are an
                error.

        Raises:
            ValueError: files cannot be read, or differ in their rate where there must be one.
        """
        report = FileReport(skips=False) if report is None else report
        report.kind = "sound"
        sounds, rates, good = [], set(), []
        for i, name in enumerate(split.inputs.names):
            try:
                sound, rate = read_audio(partial(split.inputs.open, i))
            except (ValueError, OSError, EOFError) as error:
                report.broken[name] = first_line(error)
                continue
            if self.rate is not None:
                sound, rate = resampled(sound, rate, self.rate), self.rate
            rates.add(rate)
            most = max(1, round(self.seconds * rate))
            report.cut += len(sound) > most
            sounds.append(sound[:most])
            good.append(i)
        report.check(any_read=bool(sounds))
        if len(rates) > 1:
            raise ValueError(
                f"the sounds have rates of {some(sorted(rates))} Hz; convert them to one rate, as "
                "only a transformers: network says which it takes"
            )
        return self._inputs(sounds, rates.pop()), torch.from_numpy(split.labels[good])

    def _inputs(self, sounds: list[np.ndarray], rate: int) -> Any:
        if self.extractor is not None:
            inputs = self.extractor(
                sounds, sampling_rate=rate, padding=True, return_tensors="pt", truncation=False
            )
            return {name: torch.as_tensor(value) for name, value in inputs.items()}
        padded = np.zeros((len(sounds), round(self.seconds * rate)), np.float32)
        for row, sound in zip(padded, sounds, strict=True):
            row[: len(sound)] = sound
        return torch.from_numpy(padded)

    def with_rate_of(self, split: Split) -> SoundFormat:
        """This format, at the rate of the first file that can be read if it has no rate itself."""
        if self.rate is not None:
            return self
        for i in range(len(split)):
            try:
                return replace(self, rate=read_audio(partial(split.inputs.open, i))[1])
            except (ValueError, OSError, EOFError):  # reported where the split is prepared
                continue
        return self

    @property
    def words(self) -> list[str]:
        """The steps, one sentence each, for somebody who writes them again elsewhere."""
        rate = "the rate of the files" if self.rate is None else f"{self.rate} Hz"
        words = [
            "Decode to samples in -1..1; take the mean of the channels.",
            f"Resample to {rate} (scipy.signal.resample_poly).",
            f"Keep the first {self.seconds:g} s.",
        ]
        if self.extractor is None:
            count = "" if self.rate is None else f", {round(self.seconds * self.rate)} samples"
            return [
                *words,
                f"Fill shorter ones with zeros to exactly {self.seconds:g} s{count}.",
                "Arrange as float32 [batch, samples].",
            ]
        return [
            *words,
            f"Give them to the {type(self.extractor).__name__} beside this file, with padding to "
            "the longest of those that are prepared together.",
        ]

    def facts(self) -> dict[str, Any]:
        """The fields as plain values; the extractor, which has a file of its own, by its class."""
        extractor = None if self.extractor is None else type(self.extractor).__name__
        return {"seconds": self.seconds, "rate": self.rate, "extractor": extractor}


def read_audio(opened: Callable[[], Any]) -> tuple[np.ndarray, int]:
    """A sound as float32 `[T]` in -1..1, the mean of its channels, and its samples per second.

    Args:
        opened: returns the file's name, or a stream.

    Raises:
        ValueError: the file is damaged or empty, or needs the package soundfile.
    """
    try:
        with wave.open(opened()) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            values = _integers(file.readframes(file.getnframes()), width)
            sound = values.reshape(-1, channels).mean(1, dtype=np.float64) / SCALES[width]
    except EOFError as error:
        raise ValueError("it is empty or ends too early") from error
    except wave.Error as error:
        sound, rate = _soundfile(opened, error)
    if not len(sound) or rate < 1:
        raise ValueError("it is empty")
    return sound.astype(np.float32), rate


def resampled(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A sound at another rate, by a polyphase filter; float32 `[T * wanted / rate]`."""
    if rate == wanted:
        return sound
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return resample_poly(sound, wanted // common, rate // common).astype(np.float32)


def _integers(data: bytes, width: int) -> np.ndarray:
    if width == 1:
        return np.frombuffer(data, np.uint8).astype(np.int32) - 128
    if width == 3:  # no such type: the bytes are the upper three of an int32
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] >> 8
    return np.frombuffer(data, f"<i{width}")


def _soundfile(opened: Callable[[], Any], why: Exception) -> tuple[np.ndarray, int]:
    """Read what the standard library does not: other formats, and samples that are floats."""
    try:
        import soundfile
    except (ImportError, OSError):  # the latter where its C library is missing
        raise ValueError(
            f"{first_line(why)}; all but WAV of whole numbers needs pip install soundfile"
        ) from why
    try:
        values, rate = soundfile.read(opened(), always_2d=True)
    except RuntimeError as error:
        raise ValueError(first_line(error)) from error
    return values.mean(1), int(rate)
