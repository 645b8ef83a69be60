"""The report of `fast evaluate`: tables, a confusion matrix, and a sheet of the worst mistakes."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast.cli.report.html import pairs, picture, write_page
from fast.cli.report.table import html_table, percent
from fast.data.images.decoding import Unreadable, decode
from fast.data.images.pixels import channels_first
from fast.data.sources import EncodedImages
from fast.data.sources.formats import pillow
from fast.deploy.evaluation import Evaluation, Mistake
from fast.errors import printable

# The longer side of a picture in the contact sheet, in pixels.
THUMBNAIL = 200
CLASS_HEADER = ("class", "samples", "recognised", "right where answered", "F1")
# How many classes the terminal shows; report.html has all.
LISTED = 20


def class_rows(evaluation: Evaluation) -> list[list[str]]:
    """A row for each class, the least recognised first; shares in percent."""
    scores = sorted(evaluation.per_class, key=lambda score: (not score.samples, score.recall))
    return [
        [
            printable(score.name),
            str(score.samples),
            percent(score.recall if score.samples else None),
            percent(score.precision),
            percent(score.f1),
        ]
        for score in scores
    ]


def verdict(evaluation: Evaluation) -> str:
    """The outcome in a sentence or two."""
    right = int((evaluation.predicted == evaluation.labels).sum())
    count = len(evaluation.labels)
    tasks = "both tasks" if evaluation.task == "both" else f"{evaluation.task} task"
    text = (
        f"{percent(evaluation.accuracy)} % right: {right} of {count} samples ({tasks}). "
        f"Loss {evaluation.loss:.3f} nats; confidence and accuracy are "
        f"{100 * evaluation.calibration_error:.1f} points apart (calibration error)."
    )
    pairs_ = evaluation.confused(1)
    if pairs_:
        label, answer, n = pairs_[0]
        times = "once" if n == 1 else f"{n} times"
        text += f" Most often {printable(label)} is taken for {printable(answer)}: {times}."
    return text


def numbers(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as plain values, for evaluation.json."""
    return {
        "task": evaluation.task,
        "samples": len(evaluation.labels),
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "calibration_error": evaluation.calibration_error,
        "per_class": [score._asdict() for score in evaluation.per_class],
        "confused": evaluation.confused(100),
        "mistakes": [mistake._asdict() for mistake in evaluation.mistakes(100)],
    }


def write_evaluation(
    path: Path, *, title: str, evaluation: Evaluation, figure: bytes, worst: int, facts: Any
) -> None:
    """Write report.html.

    Args:
        figure: a PNG.
        worst: how many mistakes are shown, at most.
        facts: names of the run and the data, and the machine.
    """
    mistakes = evaluation.mistakes(worst)
    wrong = int((evaluation.predicted != evaluation.labels).sum())
    shown = f"{len(mistakes)} of {wrong}" if wrong > len(mistakes) else str(wrong)
    body = f"""<p>{html.escape(verdict(evaluation))}</p>
{picture(figure, "Confusion matrix, and accuracy over confidence")}
<h2>Classes</h2>
<div class="scroll">{html_table(CLASS_HEADER, class_rows(evaluation))}</div>
<p class="note">In percent. Recognised: the share of the samples of a class that is answered rightly
(recall). Right where answered: the share of the answers of this class that are right (precision).
Calibration error: the mean distance of confidence and accuracy in 15 equal parts of 0..1 (Guo et
al. 2017).</p>
<h2>The worst mistakes ({shown})</h2>
{_sheet(evaluation, mistakes)}
<h2>What was evaluated</h2>
{pairs(facts)}
"""
    write_page(path, title, body)


def _sheet(evaluation: Evaluation, mistakes: Sequence[Mistake]) -> str:
    """The mistakes, with their pictures where they are pictures."""
    if not mistakes:
        return "<p>There is none.</p>"
    thumbnails = [_thumbnail(evaluation.raw, mistake.row) for mistake in mistakes]
    if not any(thumbnails):
        rows = [
            [m.name[:300], m.label, percent(m.probability_of_label), m.predicted,
             percent(m.probability)]
            for m in mistakes
        ]  # fmt: skip
        header = ["sample", "class", "%", "answer", "%"]
        return f'<div class="scroll plain">{html_table(header, rows)}</div>'
    figures = []
    for mistake, data in zip(mistakes, thumbnails, strict=True):
        image = picture(data, mistake.name, "jpeg") if data else ""
        figures.append(
            f"<figure>{image}<figcaption><b>{html.escape(mistake.label)}</b> "
            f"{percent(mistake.probability_of_label)} %, taken for "
            f"<b>{html.escape(mistake.predicted)}</b> {percent(mistake.probability)} %<br>"
            f"{html.escape(Path(mistake.name).name)}</figcaption></figure>"
        )
    return f'<div class="sheet">{"".join(figures)}</div>'


def _thumbnail(raw: Any, row: int) -> bytes | None:
    """A small JPEG of a sample; None where it is no picture, or cannot be read any more."""
    if isinstance(raw, EncodedImages):
        try:
            image, _ = decode(lambda: raw.open(row), 3)
        except Unreadable:
            return None
    elif getattr(raw, "dtype", None) == "uint8" and raw.ndim in (3, 4):
        values = channels_first(raw[row : row + 1])[0, :3].permute(1, 2, 0).numpy()
        image = pillow().fromarray(values.squeeze()).convert("RGB")
        image = image.resize((THUMBNAIL, THUMBNAIL * image.height // image.width), 0)
    else:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()
