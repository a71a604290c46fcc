"""What ``compare`` found, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from .files import write_atomically
from .photos import DEFAULT_PHOTOS

if TYPE_CHECKING:
    from .compare import CompareResult, ModelResult

SCHEMA = "mtvit_ops.compare"
SCHEMA_VERSION = 1
_BARS = " ▁▂▃▄▅▆▇█"
_ASCII_BARS = " .:-=+*#@"


class Column(NamedTuple):
    """A heading of two lines, one cell a model."""

    heading: tuple[str, str]
    cells: tuple[str, ...]
    left: bool = False


def token_bar(tokens: Sequence[float], most: float, ascii_only: bool = False) -> str:
    """One character a block, as high as its share of ``most`` tokens; the lowest bar stands for any token at all."""
    levels = _ASCII_BARS if ascii_only else _BARS
    top = len(levels) - 1
    return "".join(levels[0 if count <= 0 else max(1, round(top * min(count / most, 1.0)))] for count in tokens)


def columns(result: CompareResult, ascii_only: bool = False) -> list[Column]:
    """The table, column by column."""
    rows = result.rows
    most = max(rows[0].tokens_per_block)

    def cells(text: Any) -> tuple[str, ...]:
        return tuple(text(row) for row in rows)

    dash = "-" if ascii_only else "\N{EN DASH}"
    table = [
        Column(("", "model"), cells(lambda row: row.name), True),
        Column(("tokens", "per block"), cells(lambda row: token_bar(row.tokens_per_block, most, ascii_only)), True),
        Column(("", "GMACs"), cells(lambda row: _significant(row.macs / 1e9))),
        Column(("MAC", "ratio"), cells(lambda row: f"{row.mac_ratio:.3f}")),
        Column(("ms per", "image"), cells(lambda row: _significant(row.milliseconds.median))),
        Column(
            ("", "quartiles"),
            cells(lambda row: f"{_significant(row.milliseconds.low)}{dash}{_significant(row.milliseconds.high)}"),
        ),
        Column(("speed-", "up"), cells(lambda row: f"{row.speed_up:.2f}")),
        Column(("realised", "fraction"), cells(lambda row: f"{row.realised_fraction:.2f}")),
        Column(("peak", "MiB"), cells(lambda row: _significant(row.peak_memory.bytes / 2**20))),
    ]
    if any(row.top1 is not None for row in rows):
        table.append(Column(("", "top-1"), cells(lambda row: "" if row.top1 is None else f"{row.top1:.1%}")))
    return table


def plain_table(result: CompareResult, ascii_only: bool = False) -> str:
    """The table as text; no line ends in spaces."""
    table = columns(result, ascii_only)
    widths = [max(map(len, (*column.heading, *column.cells))) for column in table]
    gap = " " * _gap(widths)
    lines = []
    for cells in zip(*((*column.heading, *column.cells) for column in table), strict=True):
        parts = [
            cell.ljust(width) if column.left else cell.rjust(width)
            for cell, width, column in zip(cells, widths, table, strict=True)
        ]
        lines.append(gap.join(parts).rstrip())
    rule = ("-" if ascii_only else "─") * (sum(widths) + len(gap) * (len(widths) - 1))
    return "\n".join([*lines[:2], rule, *lines[2:]])


def setting(result: CompareResult) -> str:
    """The models and how they were run, in one line."""
    options = result.options
    return f"{result.models}, batch {options.batch}, {options.dtype}, {result.device}"


def header(result: CompareResult) -> str:
    """What was compared, in one line."""
    options, facts = result.options, result.environment
    where = f" ({facts['cpu']}, {facts['threads']} threads)" if result.device == "cpu" else ""
    photos = f"{result.num_photos} photograph{'' if result.num_photos == 1 else 's'}"
    return f"{photos}, {setting(result)}{where}, torch {facts['torch']}, {options.rounds} interleaved rounds"


def footnotes(result: CompareResult) -> list[str]:
    """What a reader must know beside the table."""
    checked = result.rows[0].equality.images
    changed = max(row.equality.changed_decisions for row in result.rows)
    ties = f" (near-ties decided up to {changed:.2%} of an image's tokens otherwise)" if changed else ""
    return [
        *result.notes,
        f"checked before timing on the {checked} images timed: removal equals masking, batch equals alone{ties}.",
        "speed-up: ratio of the medians. realised fraction = (dense / adaptive time) / (dense / adaptive MACs);"
        " 1: the whole saving arrives.",
        f"peak: memory of one batch beyond weights and inputs, {result.rows[0].peak_memory.how}.",
    ]


def print_report(result: CompareResult, stream: TextIO | None = None) -> None:
    """Print table and notes; with colours where the stream is a terminal and rich is installed."""
    stream = stream or sys.stdout
    ascii_only = not _can_print(stream, _BARS + "─\N{EN DASH}")
    width = shutil.get_terminal_size((100, 24)).columns
    print(textwrap.fill(_printable(header(result), ascii_only), width), file=stream)
    print(file=stream)
    if stream.isatty() and not ascii_only:
        try:
            _print_rich(result, stream)
        except ImportError:
            print(plain_table(result), file=stream)
    else:
        print(plain_table(result, ascii_only), file=stream)
    print(file=stream)
    for note in footnotes(result):
        print(textwrap.fill(_printable(f"* {note}", ascii_only), width, subsequent_indent="  "), file=stream)


def to_json(result: CompareResult) -> dict[str, Any]:
    """Everything measured, in plain values; names carry the units."""
    options = dataclasses.asdict(result.options)
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "options": options,
        "environment": dict(result.environment),
        "device": result.device,
        "photos": {
            "read": result.num_photos,
            "free_photographs": None if result.options.photos else [photo._asdict() for photo in DEFAULT_PHOTOS],
            "sample": result.num_sample,
            "timed_images": result.num_timed,
            "problems": [{"path": path, "reason": reason} for path, reason in result.problems],
            "labels": result.labels,
        },
        "models": [_model_to_json(row) for row in result.rows],
        "notes": footnotes(result),
        "pictures": [path.name for path in result.pictures],
    }


def write_json(result: CompareResult, path: Path) -> None:
    """Write ``to_json`` into a file, all or nothing."""
    text = json.dumps(to_json(result), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace") + b"\n"))


def _model_to_json(row: ModelResult) -> dict[str, Any]:
    return {
        "name": row.name,
        "tokens_per_block": list(row.tokens_per_block),
        "macs_per_image": row.macs,
        "mac_ratio": row.mac_ratio,
        "ms_per_image": {**row.milliseconds._asdict(), "rounds": list(row.rounds)},
        "speed_up": row.speed_up,
        "speed_up_quartiles": {"low": row.speed_up_spread.low, "high": row.speed_up_spread.high},
        "realised_fraction": row.realised_fraction,
        "peak_memory_bytes": row.peak_memory.bytes,
        "peak_memory_measured_by": row.peak_memory.how,
        "top1": row.top1,
        "calibration": None if row.calibration is None else row.calibration._asdict(),
        "equality": row.equality._asdict(),
    }


def _print_rich(result: CompareResult, stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    gap = _gap([max(map(len, (*column.heading, *column.cells))) for column in columns(result)])
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="bold")
    for column in columns(result):
        table.add_column("\n".join(column.heading), justify="left" if column.left else "right", no_wrap=True)
    for index, cells in enumerate(zip(*(column.cells for column in columns(result)), strict=True)):
        table.add_row(*cells, style="dim" if index == 0 else None)
    # a table wider than the terminal is better wrapped by it than cut
    width = max(map(len, plain_table(result).splitlines())) + 2
    console = Console(file=stream)
    console.width = max(width, console.width)
    console.print(table)


def _gap(widths: Sequence[int]) -> int:
    """Spaces between columns: two, or one where that fits a terminal of 80."""
    return 2 if sum(widths) + 2 * (len(widths) - 1) <= 80 else 1


def _significant(value: float) -> str:
    """Three digits or more, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _can_print(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _printable(text: str, ascii_only: bool) -> str:
    return text.encode("ascii", "replace").decode() if ascii_only else text
