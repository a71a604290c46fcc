"""What a training tells: a line of JSON for each record, TensorBoard's events, and the progress on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..progress import Progress
from .state import TrainError


class Journal:
    """Records of a training in ``metrics.jsonl`` and, where TensorBoard is installed, in ``events/``, once it is open.

    Args:
        progress: what a person sees.
    """

    def __init__(self, progress: Progress) -> None:
        self._path: Path | None = None
        self._events: Any = None
        self._progress = progress

    def open(self, folder: Path, step: int, *, owed: bool = False) -> None:
        """Write to a folder from now on.

        Args:
            folder: of the run.
            step: steps done so far; what an interrupted run wrote beyond them is dropped, for it comes again.
            owed: the evaluation after them comes again, too.

        Raises:
            TrainError: the folder's files cannot be written.
        """
        self._path = folder / "metrics.jsonl"
        try:
            self._open(folder, self._path, step, owed)
        except OSError as error:
            raise TrainError(f"cannot write to {folder}: {error}") from error

    def _open(self, folder: Path, path: Path, step: int, owed: bool) -> None:
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if not _comes_again(line, step, owed)]
            text = "".join(f"{line}\n" for line in kept).encode()
            write_atomically(path, lambda file: file.write(text))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._progress.say("no TensorBoard events: tensorboard is not installed")
            return
        self._events = SummaryWriter(str(folder / "events"), purge_step=step + 1)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One record: ``kind`` is ``"train"`` or ``"evaluate"``, values are JSON's.

        Raises:
            TrainError: it cannot be written.
        """
        try:
            self._write(kind, step, values)
        except OSError as error:
            raise TrainError(f"cannot write the record of step {step}: {error}; the last state is intact") from error

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
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
        if self._events is None:
            return
        try:
            self._events.close()
        except OSError as error:  # what ended the training is told, this beside it
            self._progress.say(f"TensorBoard's events are incomplete: {error}")


def _comes_again(line: str, step: int, owed: bool) -> bool:
    try:
        record = json.loads(line)
        at, kind = int(record["step"]), record["kind"]
    except (ValueError, KeyError, TypeError):  # half a line of a run that was killed
        return True
    return at > step or (owed and at == step and kind == "evaluate")
