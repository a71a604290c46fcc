"""What every stage of the GPU suite shares: its arguments, its clock, and rows that survive being killed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
Case = TypeVar("Case")


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
        parser.add_argument("--skip", type=int, default=0, help="cases that a process before this one went through")
        parser.add_argument("--share", type=int, nargs=2, metavar=("I", "N"), help="of N processes this is the I-th")
        options = parser.parse_args()
        self.out, self.smoke = options.out, options.smoke
        self._skip, self._share = options.skip, options.share
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

    def emitted(self) -> list[dict[str, Any]]:
        """Rows so far, those of processes before this one too."""
        return [json.loads(line) for line in self.out.read_text().splitlines()] if self.out.is_file() else []

    def todo(self, cases: Iterable[Case]) -> Iterator[Case]:
        """This process's share of the cases, as long as the device lives."""
        place, processes = self._share or (0, 1)
        for index, case in enumerate(cases):
            if index < self._skip or index % processes != place:
                continue
            yield case
            self._replace_if_lost(index + 1)

    def _replace_if_lost(self, done: int) -> None:
        """After an error that CUDA does not recover from, a new process goes on: in this one every call would fail."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            command = [sys.executable, *sys.argv, "--seconds", str(self.time_left()), "--skip", str(done)]
            raise SystemExit(subprocess.run(command, check=False).returncode) from None

    def share_out(self, processes: int) -> None:
        """Let this many processes do the stage, and end with their worst exit code: compiling takes cores."""
        if self._share or self.device.type != "cuda" or processes < 2:
            return
        command = [sys.executable, *sys.argv, "--seconds", str(self.time_left())]
        running = [subprocess.Popen([*command, "--share", str(i), str(processes)]) for i in range(processes)]
        raise SystemExit(max(abs(process.wait()) for process in running))


def run_within(seconds: float, command: list[str], environment: dict[str, str]) -> tuple[str, int | None]:
    """What a command said, and its exit code, None where time ran out; nothing that it started is left."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=said, env=environment, text=True, start_new_session=True
        )
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(max(seconds, 1.0))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        said.seek(0)
        return said.read(), code


def in_words(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
