"""A few lines on the data of a run: classes, their samples, held-out data, preprocessing."""

from __future__ import annotations

from typing import Any

from fast.cli.spec.task import TaskSpec
from fast.data.images.format import ImageFormat
from fast.data.images.pixels import CACHE_BYTES
from fast.data.images.preprocessing import Preprocessing
from fast.data.sources import FileReport
from fast.errors import printable, some

# Up to this many classes are listed one by one.
LISTED = 12


def image_facts(
    spec: TaskSpec, form: ImageFormat, says: Preprocessing, report: FileReport
) -> dict[str, Any]:
    """How images are prepared, and who says so.

    Args:
        says: what the network says about the images that it was trained on.
        report: the sizes of the images, and those that could not be read.
    """
    options = {"size": spec.input_size, "mean": spec.mean, "std": spec.std}
    origin = {
        name: "option" if value else says.origin if getattr(says, name) else "default"
        for name, value in options.items()
    }
    smallest, largest = min(report.sizes, default=(0, 0)), max(report.sizes, default=(0, 0))
    return {
        **form.description,
        "resize": form.resize or form.size,
        "augment": spec.augment,
        "origin": origin,
        "stored_sizes": [list(smallest), list(largest)],
        "skipped": list(report.broken),
    }


def lines(
    data: dict[str, Any],
    images: dict[str, Any] | None = None,
    sounds: dict[str, Any] | None = None,
    texts: dict[str, Any] | None = None,
) -> str:
    """The lines that a terminal shows.

    Args:
        data: `NamedData.description`.
        images: `image_facts`; None if the data are no images.
        sounds: `SoundFormat.facts()`, and how many were `cut`; None if the data are no sounds.
        texts: `max_length` in tokens, and how many were `cut`; None if the data are no texts.
    """
    classes, samples = data["classes"], data["samples"]
    train, val = samples["train"], samples.get("val")
    held_out = f", {sum(val)} held out ({data['held_out']})" if val else ", none held out"
    text = [f"data: {len(classes)} classes, {sum(train)} training samples{held_out}"]
    if len(classes) <= LISTED:
        shown = [
            f"{printable(name)} {count}" + (f"+{val[i]}" if val else "")
            for i, (name, count) in enumerate(zip(classes, train, strict=True))
        ]
        text.append(f"classes, in order: {', '.join(shown)}")
    else:
        text.append(
            f"classes, in order: {some(classes)}; {min(train)} to {max(train)} samples each"
        )
    if images:
        text.append(_images(images))
    if sounds:
        most = f"at most {sounds['seconds']:g} s (--max-seconds)"
        text.append(f"sounds: {sounds['rate']} Hz, {most}{_cut(sounds['cut'])}")
    if texts:
        text.append(
            f"texts: at most {texts['max_length']} tokens (--max-length){_cut(texts['cut'])}"
        )
    return "\n".join(text)


def _cut(count: int) -> str:
    return f"; {count} longer, which {'is' if count == 1 else 'are'} cut" if count else ""


def _images(images: dict[str, Any]) -> str:
    """How images of the stored sizes become the network's input."""
    low, high = ("x".join(map(str, size)) for size in images["stored_sizes"])
    stored = low if low == high else f"{low} to {high}"
    fit = "as they are"
    if images["size"]:
        side, size = "both sides" if images["stretch"] else "shorter side", images["size"]
        fit = f"{side} to {images['resize']} ({images['interpolation']}), central {size}x{size}"
    order = f" in {images['channels']}" if images["channels"] == "BGR" else ""
    mean, std = (f"{name} {','.join(f'{v:.4g}' for v in images[name])}" for name in ("mean", "std"))
    origin = images["origin"]
    shared = f", {mean}, {std} ({origin['std']})"
    apart = f", {mean} ({origin['mean']}), {std} ({origin['std']})"
    numbers = shared if origin["mean"] == origin["std"] else apart
    return f"images: {stored}, {fit}{order}{numbers}{_decoded(images)}"


def _decoded(images: dict[str, Any]) -> str:
    """A remark on pictures that are not kept in memory as the network takes them."""
    if images.get("in_memory", True):
        return ""
    if images["augment"] != "none":
        return f"; a new view of each in every epoch (--augment {images['augment']})"
    return f"; decoded in every epoch: more than {CACHE_BYTES / 2**30:.1f} GB is not kept in memory"


def gaps(data: dict[str, Any], folds: int | None = None) -> list[str]:
    """Notes on classes that have no samples in a split, or too few for one in each of the folds.

    Args:
        data: `NamedData.description`.
    """
    classes, samples = data["classes"], data["samples"]
    train, val = samples["train"], samples.get("val")
    missing = [classes[i] for i, count in enumerate(train) if not count]
    notes = []
    if missing:
        notes.append(
            f"{len(missing)} of {len(classes)} classes have no training sample ({some(missing)}); "
            "the head has a place for each"
        )
    few = [classes[i] for i, count in enumerate(train) if 0 < count < (folds or 0)]
    if few:
        notes.append(
            f"{len(few)} of {len(classes)} classes have fewer samples than --folds {folds} "
            f"({some(few)}), which are not measured in each; a single one is not trained on where "
            "it is measured"
        )
    if val:
        unseen = [classes[i] for i, count in enumerate(train) if count and not val[i]]
        if unseen:
            notes.append(
                f"{len(unseen)} of {len(classes)} classes have no held-out sample ({some(unseen)})"
                "; their accuracy is not measured"
            )
    return notes
