"""Copy the committed results into the README, between its markers: run after ``make bench`` and ``make demo``."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"


def fill(readme: str) -> str:
    """The README with the newest tables."""
    blocks = {
        "demo": f"```\n{(RESULTS / 'compare.txt').read_text().rstrip()}\n```",
        "accuracy": (RESULTS.parent / "accuracy" / "table.md").read_text().rstrip(),
        "bench": bench_tables(),
    }
    for name, text in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        readme, found = re.subn(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", readme, flags=re.S)
        if found != 1:
            raise ValueError(f"README.md must hold one block <!-- {name} --> ... <!-- /{name} -->, got {found}")
    return readme


def bench_tables() -> str:
    """Conditions, models and attention; linear layers and small ops stay in the file."""
    return (RESULTS / "cpu.md").read_text().split("### Linear layers")[0].rstrip()


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(fill(path.read_text()))
