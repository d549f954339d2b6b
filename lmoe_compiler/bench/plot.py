"""The picture of a table: microseconds of ours and the library's, and the memory floor, by op and shape."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def bars(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the picture, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [row for row in rows if "error" not in row]
    cells = list(dict.fromkeys((row["op"], tuple(row["shape"])) for row in good))
    if not cells:
        return
    figure, panels = pyplot.subplots(2, 1, figsize=(max(6.0, 0.8 * len(cells)), 8), sharex=True)
    for panel, (key, title) in zip(
        panels, (("forward", "forward"), ("both", "forward and backward")), strict=True
    ):
        for offset, side in enumerate(("ours", "fla")):
            found = {(r["op"], tuple(r["shape"])): r for r in good if r["side"] == side}
            at = [i + 0.38 * offset for i, cell in enumerate(cells) if cell in found]
            heights = [found[c][f"{key}_us"] for c in cells if c in found]
            panel.bar(at, heights, width=0.36, label=side)
        floors = {(r["op"], tuple(r["shape"])): r[f"{key}_floor_us"] for r in good}
        for i, cell in enumerate(cells):
            panel.hlines(floors[cell], i - 0.2, i + 0.6, colors="black", linewidth=1)
        panel.set_yscale("log")
        panel.set_ylabel("microseconds")
        panel.set_title(f"{title} (line: memory floor)")
        panel.legend()
    labels = [f"{op}\n{','.join(map(str, shape))}" for op, shape in cells]
    panels[-1].set_xticks(range(len(cells)), labels, rotation=90, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
