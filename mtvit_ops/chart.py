"""The chart of speed-up against MAC ratio."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_atomically
from .lineup import BASELINE, TITLES
from .report import setting

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

    figure = Figure(figsize=(9, 7.2), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = result.rows
    lowest = min(row.mac_ratio for row in rows) / 1.12
    top = max(1 / lowest, *(row.speed_up_spread.high for row in rows)) * 1.05
    bottom = min(1 / 1.12, *(row.speed_up_spread.low / 1.05 for row in rows))
    axes.plot([1, lowest], [1, 1 / lowest], color="#555555", linewidth=1.5)
    axes.axhline(1, color="#bbbbbb", linewidth=1, zorder=0)
    for row in rows:
        tint, marker = _MARKS[row.name]
        low, high = row.speed_up_spread.low, row.speed_up_spread.high
        if row.name != BASELINE:
            axes.plot([row.mac_ratio] * 2, [low, high], color=tint, linewidth=2, solid_capstyle="butt")
        label = f"{TITLES[row.name]}: {row.speed_up:.2f} times the dense speed at {row.mac_ratio:.2f} of the MACs,"
        label += f" realised fraction {row.realised_fraction:.2f}"
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
    axes.set_title(f"{setting(result)}; bars: quartiles of {result.options.rounds} rounds", fontsize=12, wrap=True)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.13), fontsize=11, frameon=False)
    figure.tight_layout()
    _name_line(axes, lowest)
    _name_points(axes, rows)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _name_line(axes, lowest: float) -> None:  # type: ignore[no-untyped-def]
    """The meaning of the line along it, at the angle it has on the page."""
    (left, low), (right, high) = axes.transData.transform([(1, 1), (lowest, 1 / lowest)])
    axes.annotate(
        "realised fraction 1: all of the saving arrives",
        (lowest**0.45, lowest**-0.45),
        (-4, 6),
        textcoords="offset points",
        rotation=math.degrees(math.atan2(high - low, right - left)),
        rotation_mode="anchor",
        ha="center",
        fontsize=11,
        color="#555555",
    )


def _name_points(axes, rows) -> None:  # type: ignore[no-untyped-def]
    """Names beside the points, pushed apart where the points are close."""
    placed: list[tuple[float, float]] = []
    points = [(row, axes.transData.transform((row.mac_ratio, row.speed_up))) for row in rows]
    for row, (x, y) in sorted(points, key=lambda point: point[1][1]):
        height = y
        for other_x, other in placed:
            if abs(x - other_x) < 250:  # pixels at 150 dpi: a name is about as wide, and 34 high
                height = max(height, other + 34)
        placed.append((x, height))
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
