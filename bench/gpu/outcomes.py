"""A pytest plugin: the outcome of each test on disk at once, and no test in a process whose device is lost."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest
import torch

FILE_VARIABLE = "MTVIT_OPS_OUTCOMES"  # where to
ON_WORKER = "PYTEST_XDIST_WORKER"  # set by pytest-xdist, which starts a worker anew that dies


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's first, and all ops mixed: time may run out, and should leave something known of each."""
    items.sort(key=lambda item: ("triton" not in item.nodeid, zlib.crc32(item.nodeid.encode())))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if ON_WORKER in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    why = report.longreprtext[-600:] if report.failed else ""
    with Path(os.environ[FILE_VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"test": report.nodeid, "outcome": outcome, "why": why}) + "\n")


def pytest_runtest_logfinish() -> None:
    if ON_WORKER not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)
