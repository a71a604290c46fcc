"""What a training tells: a line of JSON for each record, TensorBoard's events, and the progress on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..progress import Progress


class Journal:
    """Records of a training in ``metrics.jsonl`` and, where TensorBoard is installed, in ``events/``.

    Args:
        folder: of the run; None: nothing is written.
        step: steps done so far; what an interrupted run wrote beyond them is dropped, for it comes again.
        progress: what a person sees.
    """

    def __init__(self, folder: Path | None, step: int, progress: Progress) -> None:
        self._path = None if folder is None else folder / "metrics.jsonl"
        self._events = None
        self._progress = progress
        if folder is None or self._path is None:
            return
        if self._path.exists():
            kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            text = "".join(f"{line}\n" for line in kept).encode()
            write_atomically(self._path, lambda file: file.write(text))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            progress.say("no TensorBoard events: tensorboard is not installed")
            return
        self._events = SummaryWriter(str(folder / "events"), purge_step=step + 1)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One record: ``kind`` is ``"train"`` or ``"evaluate"``, values are JSON's."""
        if self._path is not None:
            line = json.dumps({"kind": kind, "step": step, **values})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def say(self, text: str) -> None:
        self._progress.say(text)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # half a line of a run that was killed
        return float("inf")
