"""Quality over cost: one figure, two panels (FLOPs and seconds), the metric's own noise as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditdial.plain import files


def plot_pareto(
    series: dict[str, Sequence[dict[str, Any]]], path: str | Path, *, metric: str = "frechet"
) -> None:
    """Draw one line per series; rows have ``ratio``, ``time_ratio``, the metric and its noise.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
        ValueError: no rows, or a file of a kind that matplotlib does not write.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need: pip install 'ditdial[plot]'") from error
    if not any(series.values()):
        raise ValueError("nothing to draw: no rows; legal: at least one series with a row")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, key, title in zip(
        panels,
        ("ratio", "time_ratio"),
        ("FLOPs, share of full", "seconds, share of full"),
        strict=True,
    ):
        for name, rows in series.items():
            points = sorted(
                (row for row in rows if row.get(key) is not None), key=lambda row: row[key]
            )
            panel.errorbar(
                [row[key] for row in points],
                [row[metric] for row in points],
                yerr=[row[f"{metric}_noise"] for row in points],
                marker="o",
                capsize=2,
                label=name,
            )
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{metric} (lower is better)" if metric != "accuracy" else metric)
    panels[0].legend(fontsize=8)
    kind = Path(path).suffix[1:] or "png"
    with files.writing(path) as partial:
        figure.savefig(partial, dpi=130, format=kind)
    plt.close(figure)
