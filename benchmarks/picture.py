"""The README's picture: what is learned and what is kept, of the runs of `retention`.

python -m benchmarks.picture
"""

from __future__ import annotations

import json
from statistics import mean

from benchmarks.common import RESULTS
from benchmarks.finetune.figures import best_rate
from fast.analysis.plots import comparison

PAIR = "resnet20 -> gtsrb"
METHODS = ("fast", "lp-ft", "vanilla")
PICTURE = RESULTS.parents[1] / "docs" / "img" / "learned-and-kept.png"


def main() -> None:
    records = [json.loads(line) for line in (RESULTS / "retention.jsonl").read_text().splitlines()]
    runs = {method: best_rate(records, PAIR, method) for method in METHODS}
    figure = comparison(
        {method: [run["history"] for run in records] for method, records in runs.items()},
        title=f"{PAIR}, mean of {len(runs['fast'])} seeds",
        source_before=mean(run["source_before"] for run in runs["fast"]),
    )
    figure.savefig(PICTURE, dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    main()
