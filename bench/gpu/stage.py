"""What every stage of the GPU suite shares: its arguments, its clock, and rows that survive being killed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


class Stage:
    """One stage's process.

    Attributes:
        smoke: tiny sizes on whatever device there is: proves that the stage runs.
        device: where it runs.
    """

    def __init__(self, doc: str | None) -> None:
        parser = argparse.ArgumentParser(description=doc)
        parser.add_argument("--out", type=Path, required=True, help="file that rows are appended to, one a line")
        parser.add_argument("--seconds", type=float, default=600.0, help="nothing new is begun past these")
        parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU where there is no GPU")
        options = parser.parse_args()
        self.out, self.smoke = options.out, options.smoke
        self._end = time.monotonic() + options.seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)

    def time_left(self) -> float:
        return self._end - time.monotonic()

    def emit(self, **row: Any) -> None:
        """A row of results, on disk at once."""
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row)[:300], file=sys.stderr, flush=True)


def in_words(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
