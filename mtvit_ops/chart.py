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
    """Names beside their points, at the first place that is clear of every point, of other names and of the line."""
    from matplotlib.transforms import Bbox

    points = {row.name: axes.transData.transform((row.mac_ratio, row.speed_up)) for row in rows}
    taken = [Bbox.from_bounds(x - 14, y - 14, 28, 28) for x, y in points.values()]  # pixels at 150 dpi
    start, end = axes.transData.transform([(1, 1), (0.01, 100)])
    steps = [start + (end - start) * share for share in (index / 2000 for index in range(2001))]
    taken += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in steps if axes.bbox.contains(x, y)]
    pixel = 72 / axes.figure.dpi
    for row in sorted(rows, key=lambda row: points[row.name][1]):
        x, y = points[row.name]
        text = axes.annotate(
            TITLES[row.name],
            (row.mac_ratio, row.speed_up),
            (0, 0),
            textcoords="offset points",
            fontsize=11,
            color=_MARKS[row.name][0],
            va="center",
            arrowprops={"arrowstyle": "-", "color": _MARKS[row.name][0], "linewidth": 0.8, "shrinkA": 0, "shrinkB": 7},
        )
        width, height = text.get_window_extent().size
        for away in range(0, 400, 34):
            places = [(24, -away), (-24 - width, -away), (24, away), (-24 - width, away), (-width / 2, -30 - away)]
            boxes = [Bbox.from_bounds(x + dx, y + dy - height / 2, width, height) for dx, dy in places]
            clear = [
                (place, box)
                for place, box in zip(places, boxes)
                if axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and axes.bbox.containsy(box.y0)
                if axes.bbox.containsy(box.y1) and not box.count_overlaps(taken)
            ]
            if clear:
                break
        (dx, dy), box = clear[0] if clear else (places[0], boxes[0])
        text.xyann = (dx * pixel, dy * pixel)
        # a name next to its point or straight below needs no tie
        text.arrow_patch.set_visible(abs(dy) >= 34 and dx != -width / 2)
        taken.append(box)


def _ticks(low: float, high: float, step: float) -> list[float]:
    """Multiples of the step between two values, doubling the step until there are at most twelve."""
    while (high - low) / step > 12:
        step *= 2
    return [index * step for index in range(1, int(high / step) + 1) if low <= index * step <= high]
