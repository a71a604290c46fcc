"""The GPU suite's results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def render(result: Row) -> str:
    """Conditions, stages, then a table for each kind of row."""
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value)
    lines = ["# GPU suite", "", facts + ". Random weights, inference, bfloat16.", ""]
    if result["smoke"]:
        lines += ["**A smoke run: tiny sizes, which say nothing about speed.**", ""]
    lines += ["| stage | outcome | seconds | commit |", "|---|---|---|---|"]
    for name, stage in result["stages"].items():
        lines.append(f"| {name} | {stage['status']} | {stage['seconds']:.0f} | {stage.get('commit', '')} |")
    rows = [row for stage in result["stages"].values() for row in stage["rows"]]
    for name, section in SECTIONS.items():
        found = [row for row in rows if row.get("table") == name]
        if found:
            lines += ["", *section(found)]
    return "\n".join(lines) + "\n"


def _build(rows: list[Row]) -> Iterator[str]:
    yield from ("## Build", "", "| what | | |", "|---|---|---|")
    for row in rows:
        yield f"| {row['what']} | {'yes' if row['ok'] else 'no'} | {_cell(row['note'])} |"


def _tests(rows: list[Row]) -> Iterator[str]:
    yield from ("## Tests", "", "| file | passed | failed | skipped | exit | seconds |", "|---|---|---|---|---|---|")
    for row in rows:
        failed = row.get("failed", 0) + row.get("error", 0)
        counts = f"{row.get('passed', 0)} | {failed} | {row.get('skipped', 0)}"
        yield f"| {row['file']} | {counts} | {row['code']} | {row.get('seconds', 0):.0f} |"
    failures = [line for row in rows for line in (*row.get("failures", ()), *row.get("tail", "").splitlines()[-15:])]
    if failures:
        yield from ("", "```", *failures, "```")


def _promises(rows: list[Row]) -> Iterator[str]:
    yield from ("## Promises", "")
    for what, title in (
        ("waits", "no wait for the device"),
        ("graph", "in a CUDA graph"),
        ("twice", "same bits twice"),
    ):
        kept = sum(row[what] == "ok" for row in rows)
        yield f"- {title}: {kept} of {len(rows)} cases"
    broken = [(row, what) for row in rows for what in ("waits", "graph", "twice") if row[what] != "ok"]
    served = [row for row in rows if row["served"] not in ("", "kernel")]
    if broken or served:
        yield from ("", "| case | what | said |", "|---|---|---|")
    yield from (f"| {row['case']} | {what} | {_cell(row[what])} |" for row, what in broken)
    yield from (f"| {row['case']} | served | {_cell(row['served'])} |" for row in served)


def _sanitize(rows: list[Row]) -> Iterator[str]:
    yield from ("## compute-sanitizer", "", "| tool | result | calls watched |", "|---|---|---|")
    yield from (f"| {row['tool']} | {row['result']} | {row['calls']} |" for row in rows)
    for row in rows:
        if row["said"]:
            yield from ("", "```", row["said"], "```")


def _ceilings(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        yield (
            f"Ceilings of this run: copy {row['gigabytes_a_second']:.0f} GB/s (read and written),"
            f" product of random bfloat16 {row['teraflops']:.0f} TFLOP/s."
        )


def _ops(rows: list[Row]) -> Iterator[str]:
    yield from ("## Ops", "")
    yield "Event: between device events, cold L2. Graph: the same call replayed. Host: until the call returns. Share:"
    yield "of the ceiling (copy or product) that is nearer. Over ours: fastest time over our fastest."
    yield from ("", "| op | candidate | event, ms | graph, ms | host, ms | over ours | share | peak, MiB |")
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        if "error" in row:
            yield f"| {row['op']} | {_cell(row['error'])} | | | | | | |"
        ours = _best(row["times"].get("ours", {}))
        for name, found in row["times"].items():
            head = f"| {row['op']}, {row['case']} | {name} |"
            if "error" in found:
                yield f"{head} {_cell(found['error'])} | | | | | |"
                continue
            best = _best(found)
            over = f"{best / ours:.2f}x" if ours and best else ""
            share = f"{100 * found['share']:.0f} %" if "share" in found else ""
            yield f"{head} {_times(found)} | {over} | {share} | {found.get('peak_mib', 0):.1f} |"


def _models(rows: list[Row]) -> Iterator[str]:
    yield from ("## Models", "")
    yield "Realised: (fastest dense time / time) / (dense MACs / MACs), from each one's fastest way to run."
    yield from (
        "",
        "| model | tokens | candidate | event, ms | graph, ms | host, ms | images/s | MACs | realised | MiB |",
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        head = f"| DeiT-{row['size'][0].upper()}, {row['batch']} | {row['title']} |"
        if "error" in row:
            yield f"{head} {_cell(row['error'])} | | | | | | | |"
        for name, found in row["times"].items():
            if "error" in found:
                yield f"{head} {name} | {_cell(found['error'])} | | | | | | |"
                continue
            realised = f"**{found['realised']:.2f}**" if "realised" in found else ""
            rest = f"{found.get('images_a_second', 0):.0f} | {row['mac_ratio']:.3f} | {realised}"
            yield f"{head} {name} | {_times(found)} | {rest} | {found.get('peak_mib', 0):.0f} |"


def _times(found: Row) -> str:
    def cell(kind: str) -> str:
        if kind in found:
            return f"{found[kind][0]:.4g}"
        return _cell(found.get("graph_error", "")) if kind == "graph_ms" else ""

    return " | ".join(cell(kind) for kind in ("ms", "graph_ms", "host_ms"))


def _best(found: Row) -> float | None:
    return min((found[kind][0] for kind in ("ms", "graph_ms") if kind in found), default=None)


def _cell(text: str) -> str:
    return str(text).replace("|", "/").replace("\n", " ")[:200]


SECTIONS = {
    "build": _build,
    "tests": _tests,
    "promises": _promises,
    "sanitize": _sanitize,
    "ceilings": _ceilings,
    "ops": _ops,
    "models": _models,
}
