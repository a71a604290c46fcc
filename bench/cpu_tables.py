"""The CPU results as Markdown: what was promised and reached, then models, attention, linear layers and small ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]
Cell = tuple[str, float]  # where, and the number there


class Target(NamedTuple):
    """A promise: every cell at least (or at most) ``bound``."""

    text: str
    bound: float
    cells: Callable[[list[Row]], Iterator[Cell]]
    at_most: bool = False

    def judge(self, rows: list[Row]) -> str:
        """The line of the table: the worst cell, how many hold, and the worst that do not."""
        found = list(self.cells(rows))
        if not found:
            return f"| {self.text} | not measured | | |"
        sign = -1 if self.at_most else 1
        missed = sorted((sign * value, where) for where, value in found if sign * value < sign * self.bound)
        where, worst = min(found, key=lambda cell: sign * cell[1])
        listed = ", ".join(f"{name} ({sign * value:.2f})" for value, name in missed[:4]) or "none"
        listed += f" and {len(missed) - 4} more" if len(missed) > 4 else ""
        return f"| {self.text} | {worst:.2f} ({where}) | {len(found) - len(missed)} of {len(found)} | {listed} |"


def realised(row: Row) -> dict[str, float]:
    """Of each adaptive model: speed-up over the faster dense model, divided by dense MACs over adaptive MACs."""
    slower = row["times_slower_than_subject"]
    fastest = min(1.0, slower["timm"])  # in units of our dense model's time
    return {name: fastest / slower[name] * ratio for name, ratio in row["mac_ratio"].items() if name != "dense"}


def model_name(row: Row) -> str:
    return f"DeiT-{row['size'][0].upper()}, {row['batch']}, {row['dtype']}, {row['threads']}"


def attention_name(row: Row) -> str:
    return f"{row['dtype']}, {row['tokens']}, {row['batch']}, {row['threads']}"


def _dense(rows: list[Row]) -> Iterator[Cell]:
    return ((model_name(row), row["times_slower_than_subject"]["timm"]) for row in _of("models", rows))


def _realised(rows: list[Row]) -> Iterator[Cell]:
    for row in _of("models", rows):
        yield from ((f"{model_name(row)}: {name}", value) for name, value in realised(row).items())


def _attention(dtype: str) -> Callable[[list[Row]], Iterator[Cell]]:
    def cells(rows: list[Row]) -> Iterator[Cell]:
        for row in _of("attention", rows):
            if row["dtype"] == dtype:
                yield attention_name(row), row["times_slower_than_subject"]["SDPA loop"]

    return cells


def _scores(rows: list[Row]) -> Iterator[Cell]:
    for row in _of("attention", rows):
        for kind in ("class", "mean"):
            extra = row["times_slower_than_subject"][f"with {kind} scores"]
            yield f"{attention_name(row)}: {kind}", extra


TARGETS = (
    Target("our dense model over timm's, at least 1.0x", 1.0, _dense),
    Target("realised fraction, at least 0.95", 0.95, _realised),
    Target("`varlen_attention` over the SDPA loop, float32, at least 1.3x", 1.3, _attention("float32")),
    Target("`varlen_attention` over the SDPA loop, bfloat16, at least 1.7x", 1.7, _attention("bfloat16")),
    Target("time with scores over time without, at most 1.05x", 1.05, _scores, at_most=True),
)


def _of(table: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["table"] == table]


def tables(result: dict[str, Any]) -> str:
    """Markdown: conditions, targets, then a table each for models, attention, linear layers and ops."""
    facts, rows = result["machine"], result["rows"]
    threads = sorted({row["threads"] for row in rows})
    commits = " and ".join(dict.fromkeys(row["commit"] for row in rows))
    rounds = ", ".join(map(str, sorted({row["rounds"] for row in rows})))
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, threads as given, {facts['isa']}; torch"
        f" {facts['torch']}, timm {facts['timm']}, mtvit_ops {facts['mtvit_ops']} at {commits}. Random weights,"
        " inference, our linear weights packed (`pack_weights`), timm as it is; all columns of a row timed in turn in"
        f" one process, each on warm caches, medians of {rounds} rounds, ratios paired by round.",
        "",
        "### Targets",
        "",
        "| target | worst | cells that hold | cells that do not |",
        "|---|---|---|---|",
        *(target.judge(rows) for target in TARGETS),
        "",
    ]
    for count in threads:
        lines += model_table([row for row in _of("models", rows) if row["threads"] == count], count)
    for count in threads:
        lines += attention_table([row for row in _of("attention", rows) if row["threads"] == count], count)
    for count in threads:
        lines += linear_table([row for row in _of("linear", rows) if row["threads"] == count], count)
    for count in threads:
        lines += op_table([row for row in _of("ops", rows) if row["threads"] == count], count)
    return "\n".join(lines)


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def model_table(rows: list[Row], threads: int) -> list[str]:
    """Dense speed, then speed-up and realised fraction of everything that removes tokens."""
    if not rows:
        return []
    adaptive = list(realised(rows[0]))
    lines = [
        f"### Models, {_threads(threads)}",
        "",
        "Milliseconds per image; behind each adaptive time its MAC ratio and **realised fraction** (speed-up over the"
        " faster of the two dense models, divided by dense MACs over adaptive MACs).",
        "",
        "| model, batch, dtype | timm dense | dense | over timm | " + " | ".join(adaptive) + " |",
        "|---|---|---|---|" + "---|" * len(adaptive),
    ]
    for row in rows:
        times = {name: value[0] / row["batch"] for name, value in row["milliseconds"].items()}
        ratio = row["mac_ratio"]
        cells = [f"{times[name]:.2f} ({ratio[name]:.2f}, **{value:.2f}**)" for name, value in realised(row).items()]
        head = f"DeiT-{row['size'][0].upper()}, {row['batch']}, {row['dtype']}"
        over = row["times_slower_than_subject"]["timm"]
        lines.append(f"| {head} | {times['timm']:.2f} | {times['dense']:.2f} | {over:.2f}x | {' | '.join(cells)} |")
    return [*lines, ""]


def attention_table(rows: list[Row], threads: int) -> list[str]:
    """Speed over the loop, and what the scores cost."""
    if not rows:
        return []
    lines = [
        f"### varlen_attention, 6 heads of 64, {_threads(threads)}",
        "",
        "| dtype | tokens an image | batch | SDPA loop, ms | varlen_attention, ms | speed-up | class scores add |"
        " mean scores add |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times, slower = row["milliseconds"], row["times_slower_than_subject"]
        extra = [f"{100 * (slower[name] - 1):+.0f} %" for name in ("with class scores", "with mean scores")]
        lines.append(
            f"| {row['dtype']} | {row['tokens']} | {row['batch']} | {times['SDPA loop'][0]:.3f} |"
            f" {times['varlen_attention'][0]:.3f} | **{slower['SDPA loop']:.2f}x** | {extra[0]} | {extra[1]} |"
        )
    return [*lines, ""]


def linear_table(rows: list[Row], threads: int) -> list[str]:
    """Ours against PyTorch's two."""
    if not rows:
        return []
    lines = [
        f"### Linear layers of DeiT-S, {_threads(threads)}",
        "",
        "Milliseconds; the speed-up is that of ours with packed weights over oneDNN's with packed weights, or over"
        " `F.linear` where oneDNN does not take the dtype on this CPU. fc1 with its GELU.",
        "",
        "| dtype | layer | tokens | F.linear | oneDNN, packed | ours | ours, packed | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times, slower = row["milliseconds"], row["times_slower_than_subject"]
        cells = [f"{times[name][0]:.3f}" if name in times else "" for name in ("F.linear", "oneDNN, packed", "ours")]
        over = slower.get("oneDNN, packed", slower["F.linear"])
        lines.append(
            f"| {row['dtype']} | {row['op']} | {row['tokens']} | {' | '.join(cells)} | {times['ours, packed'][0]:.3f} |"
            f" {over:.2f}x |"
        )
    return [*lines, ""]


def op_table(rows: list[Row], threads: int) -> list[str]:
    """Native against reference."""
    if not rows:
        return []
    lines = [
        f"### Small ops, width 384, half of 197 tokens alive, {_threads(threads)}",
        "",
        "| op | batch | reference, ms | native, ms | speed-up |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        times, slower = row["milliseconds"], row["times_slower_than_subject"]
        lines.append(
            f"| {row['op']} | {row['batch']} | {times['reference'][0]:.3f} | {times['native'][0]:.3f} |"
            f" {slower['reference']:.1f}x |"
        )
    return [*lines, ""]
