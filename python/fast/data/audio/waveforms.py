"""Sound files as waveforms: mono, at the rate that a network was trained on."""

from __future__ import annotations

import math
import wave
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.data.sources import Split
from fast.errors import first_line, printable, some

# Full scale of integer samples by their bytes; those of one byte are unsigned.
SCALES = {1: 128, 2: 1 << 15, 3: 1 << 23, 4: 1 << 31}


def prepare_audio(split: Split, extractor: Any, max_seconds: float) -> tuple[Any, Tensor]:
    """The sounds of a split as a network takes them, and their labels int64 `[N]`.

    Args:
        extractor: a feature extractor of transformers, which says the rate and makes the inputs;
            None: waveforms `[N, T]` in -1..1 at the rate of the files, each of exactly
            `max_seconds`, cut or followed by silence.
        max_seconds: what is longer is cut.

    Raises:
        ValueError: files cannot be read, or differ in their rate, and there is no extractor.
    """
    sounds: list[np.ndarray] = []
    rates: set[int] = set()
    broken: dict[str, str] = {}
    for i, name in enumerate(split.inputs.names):
        try:
            sound, rate = read_audio(partial(split.inputs.open, i))
        except (ValueError, OSError, EOFError) as error:
            broken[name] = first_line(error)
            continue
        if extractor is not None:
            sound, rate = resampled(sound, rate, extractor.sampling_rate), extractor.sampling_rate
        rates.add(rate)
        sounds.append(sound[: max(1, round(max_seconds * rate))])
    if broken:
        name, reason = next(iter(broken.items()))
        others = f"; also {some(list(broken)[1:], 9)}" if len(broken) > 1 else ""
        raise ValueError(
            f"{printable(name)}: not a readable sound ({printable(reason)}); remove or replace it"
            + others
        )
    labels = torch.from_numpy(split.labels)
    if extractor is not None:
        made = extractor(
            sounds, sampling_rate=rates.pop(), padding=True, return_tensors="pt", truncation=False
        )
        return {name: torch.as_tensor(value) for name, value in made.items()}, labels
    if len(rates) > 1:
        raise ValueError(
            f"the sounds have rates of {some(sorted(rates))} Hz; convert them to one, as only a "
            "transformers: network says which it takes"
        )
    length = round(max_seconds * rates.pop())
    padded = np.zeros((len(sounds), length), np.float32)
    for row, sound in zip(padded, sounds, strict=True):
        row[: len(sound)] = sound
    return torch.from_numpy(padded), labels


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
    except (wave.Error, EOFError) as error:
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
    """What the standard library does not read: other formats, floats."""
    try:
        import soundfile
    except (ImportError, OSError):  # the latter where its C library is missing
        raise ValueError(
            f"{first_line(why) or 'it ends too early'}; all but WAV of whole numbers needs pip "
            "install soundfile"
        ) from why
    try:
        values, rate = soundfile.read(opened(), always_2d=True)
    except RuntimeError as error:
        raise ValueError(first_line(error)) from error
    return values.mean(1), int(rate)
