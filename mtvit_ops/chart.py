"""The chart of speed-up against MAC ratio."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_atomically
from .lineup import BASELINE, TITLES

if TYPE_CHECKING:
    from .compare import CompareResult

# Okabe and Ito's colours, told apart by every kind of colour vision; shapes tell them apart in grey
_MARKS = {
    "vit": ("#000000", "o"),
    "avit": ("#0072B2", "s"),
    "evovit": ("#D55E00", "^"),
    "lifevit": ("#009E73", "D"),
    "mtvit": ("#CC79A7", "v"),
}


def check_matplotlib() -> None:
    """Say early that the chart cannot be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the chart in --out needs matplotlib: pip install "mtvit_ops[demo]"')


def write_chart(result: CompareResult, path: Path) -> None:
    """Draw every model at its MAC ratio and speed-up, with the line on which the whole saving arrives.

    Both axes are logarithmic, so that this line is straight; bars show the quartiles of the rounds.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(9, 6), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = result.rows
    lowest = min(row.mac_ratio for row in rows) / 1.12
    top = max(1 / lowest, *(row.speed_up_spread.high for row in rows)) * 1.05
    bottom = min(1 / 1.12, *(row.speed_up_spread.low / 1.05 for row in rows))
    axes.plot([1, lowest], [1, 1 / lowest], color="#555555", linewidth=1.5)
    axes.annotate(
        "realised fraction 1:\nall of the saving arrives",
        (lowest**0.62, lowest**-0.62),
        (-14, 10),
        textcoords="offset points",
        ha="right",
        fontsize=11,
        color="#555555",
    )
    axes.axhline(1, color="#bbbbbb", linewidth=1, zorder=0)
    for row in rows:
        tint, marker = _MARKS[row.name]
        low, high = row.speed_up_spread.low, row.speed_up_spread.high
        if row.name != BASELINE:
            axes.plot([row.mac_ratio] * 2, [low, high], color=tint, linewidth=2, solid_capstyle="butt")
        label = f"{TITLES[row.name]}: {row.speed_up:.2f}x faster"
        label += f" at {row.mac_ratio:.2f} of the MACs, realised {row.realised_fraction:.2f}"
        if row.name == BASELINE:
            label = f"{TITLES[row.name]}: the baseline"
        axes.plot([row.mac_ratio], [row.speed_up], marker, color=tint, markersize=10, label=label, linestyle="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    # cheaper to the right, faster upwards
    axes.set_xlim(1.06, lowest)
    axes.set_ylim(bottom, top)
    for axis, ticks in ((axes.xaxis, _ticks(lowest, 1.06, 0.05)), (axes.yaxis, _ticks(bottom, top, 0.1))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}".rstrip("0").rstrip(".")))
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    axes.set_xlabel("MAC ratio: adaptive / dense multiply-accumulates (cheaper to the right)", fontsize=12)
    axes.set_ylabel("speed-up: dense / adaptive time", fontsize=12)
    options = result.options
    axes.set_title(
        f"ViT-{options.size}, batch {options.batch}, {options.dtype}, {result.device}; bars: quartiles of"
        f" {options.rounds} rounds",
        fontsize=12,
    )
    axes.legend(loc="upper left", fontsize=10.5, framealpha=0.95)
    _name_points(axes, rows)
    figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _name_points(axes, rows) -> None:  # type: ignore[no-untyped-def]
    """Names beside the points, pushed apart where the points are close."""
    placed: list[float] = []
    points = [(row, axes.transData.transform((row.mac_ratio, row.speed_up))) for row in rows]
    for row, (_, y) in sorted(points, key=lambda point: point[1][1]):
        height = y if not placed else max(y, placed[-1] + 34)  # pixels at 150 dpi: a line of text
        placed.append(height)
        axes.annotate(
            TITLES[row.name],
            (row.mac_ratio, row.speed_up),
            (16, (height - y) * 72 / axes.figure.dpi - 4),
            textcoords="offset points",
            fontsize=11,
            color=_MARKS[row.name][0],
        )


def _ticks(low: float, high: float, step: float) -> list[float]:
    """Multiples of the step between two values, doubling the step until there are at most twelve."""
    while (high - low) / step > 12:
        step *= 2
    return [index * step for index in range(1, int(high / step) + 1) if low <= index * step <= high]
