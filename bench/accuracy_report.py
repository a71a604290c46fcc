"""The accuracy results of all seeds as one table (Markdown) and one chart: accuracy against measured milliseconds.

    python bench/accuracy_report.py

Reads ``bench/results/accuracy/seed*.json``, writes ``table.md`` beside them and ``docs/accuracy.png``.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from mtvit_ops.files import write_atomically
from mtvit_ops.lineup import BASELINE, TITLES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "accuracy"
COLOURS = {"vit": "#444444", "avit": "#0072b2", "evovit": "#d55e00", "lifevit": "#009e73", "mtvit": "#cc79a7"}


def main() -> None:
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("seed*.json"))]
    if not runs:
        raise SystemExit(f"no seed*.json in {RESULTS}")
    text = table(runs)
    write_atomically(RESULTS / "table.md", lambda file: file.write(text.encode()))
    draw(runs, ROOT / "docs" / "accuracy.png")


def table(runs: list[dict[str, Any]]) -> str:
    """One row a model, means over its trainings; accuracies with the least and the most in brackets."""
    first = runs[0]
    environment, options = first["environment"], first["options"]
    images = first["accuracy"][BASELINE]["images"]
    lines = [
        f"{images} validation photographs of Imagenette, 112 px, 196 patches; {environment['cpu']},"
        f" {environment['threads']} threads, {options['dtype']}, batch {options['batch']}, {options['rounds']}"
        f" interleaved rounds on {first['photos']['timed_images']} of the photographs, torch {environment['torch']}.",
        "",
        "Top-1, chosen and at random, is of all photographs, over several trainings their mean, with the least and the"
        " most in brackets. MAC ratio, time, speed-up and realised fraction are of the"
        f" {first['photos']['timed_images']} that were timed: where the image decides how many tokens live (A-ViT,"
        " MT-ViT), another sample has another MAC ratio. The cards in `checkpoints/` have it on 256 photographs.",
        "",
        "| model | trainings | top-1, % | to dense | at random, % | above random | MAC ratio | ms per image"
        " | speed-up | realised fraction |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in [row["name"] for row in first["models"]]:
        lines.append(f"| {' | '.join(_cells(name, trained(runs, name)))} |")
    more = [run["accuracy"]["vit_trained_on"] for run in runs if "vit_trained_on" in run["accuracy"]]
    if more:
        taught = " with a teacher" if more[0]["recipe"]["teacher"]["share"] > 0 else ""
        reached = _spread([100 * each["top1"] for each in more], ".2f")
        lines += [
            "",
            "The methods start from the dense ViT and learn on; the dense ViT itself, trained on"
            f"{taught}, reaches {reached} %.",
        ]
    lines += [
        "",
        "*At random*: the same model, as many tokens of every image in every block, or the same tails over all images,"
        " but dealt at random.",
        "",
    ]
    return "\n".join(lines)


def trained(runs: list[dict[str, Any]], name: str) -> list[tuple[dict[str, Any], dict[str, Any], float]]:
    """Of each run with a training of its own: the model's row, its accuracies, the dense model's top-1.

    Several runs hold the same dense model, each with times of its own; it was trained once.
    """
    found = []
    for run in runs:
        rows = {row["name"]: row for row in run["models"]}
        if name in rows:
            found.append((rows[name], run["accuracy"][name], rows[BASELINE]["top1"]))
    return found


def _cells(name: str, found: list[tuple[dict[str, Any], dict[str, Any], float]]) -> tuple[str, ...]:
    adaptive = name != BASELINE
    top1 = [100 * row["top1"] for row, _, _ in found]
    drawn = [100 * accuracy["random_top1"] for _, accuracy, _ in found] if adaptive else []
    return (
        TITLES[name],
        str(len({(accuracy["seed"], row["top1"]) for row, accuracy, _ in found})),
        _spread(top1, ".2f"),
        _spread([each - 100 * dense for each, (_, _, dense) in zip(top1, found)], "+.2f") if adaptive else "",
        _spread(drawn, ".2f") if adaptive else "",
        _spread([each - random for each, random in zip(top1, drawn)], "+.2f") if adaptive else "",
        format(mean(row["mac_ratio"] for row, _, _ in found), ".3f"),
        format(mean(row["ms_per_image"]["median"] for row, _, _ in found), ".2f"),
        format(mean(row["speed_up"] for row, _, _ in found), ".2f"),
        format(mean(row["realised_fraction"] for row, _, _ in found), ".2f"),
    )


def _spread(values: list[float], form: str) -> str:
    shown = format(mean(values), form)
    if len({format(value, form) for value in values}) == 1:
        return shown
    return f"{shown} ({min(values):{form}} to {max(values):{form}})"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over time, a filled point a seed, and hollow the same with random choices."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, run in enumerate(runs):
        for row in run["models"]:
            name, time = row["name"], row["ms_per_image"]
            if name == BASELINE and number > 0:  # the same weights
                continue
            tint = COLOURS[name]
            label = TITLES[name] if number == 0 else None
            top1 = 100 * row["top1"]
            axes.plot([time["low"], time["high"]], [top1, top1], color=tint, linewidth=2, solid_capstyle="butt")
            axes.plot([time["median"]], [top1], "o", color=tint, markersize=10, label=label)
            if name == BASELINE:
                axes.axhline(top1, color="#bbbbbb", linewidth=1, zorder=0)
                continue
            drawn = 100 * run["accuracy"][name]["random_top1"]
            axes.plot([time["median"]] * 2, [drawn, top1], ":", color=tint, linewidth=1)
            axes.plot([time["median"]], [drawn], "o", mec=tint, mfc="white", markersize=8)
    axes.plot([], [], "o", mec="#444444", mfc="white", markersize=8, label="as many tokens or tails, at random")
    axes.set_xlim(left=0)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    options, environment = runs[0]["options"], runs[0]["environment"]
    threads = f"{environment['threads']} threads, {options['dtype']}, batch {options['batch']}; bars: quartiles"
    axes.set_xlabel(f"ms per image ({threads})", fontsize=12)
    axes.set_ylabel("top-1 on Imagenette's validation photographs, %", fontsize=12)
    axes.set_title("Trained ViTs of 1.4 million parameters: accuracy against measured time", fontsize=12)
    axes.legend(fontsize=11, loc="lower left", frameon=False)
    figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


if __name__ == "__main__":
    main()
