"""No number in the README that a committed file does not show."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def readme_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_readme", ROOT / "bench" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_the_committed_results(readme_tool: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert readme_tool.fill(text) == text


def test_a_changed_number_is_found(readme_tool: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    start = text.index("<!-- bench -->")
    number = re.search(r"\d+\.\d\d", text[start:])
    assert number is not None
    changed = text[:start] + text[start:].replace(number[0], "123.45", 1)
    assert readme_tool.fill(changed) == text


def test_linked_files_are_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).is_file(), target
