"""Kinds of command-line arguments, for argparse, and one that several commands have."""

from __future__ import annotations

import argparse
import ast
from typing import Any


def ratio(text: str) -> float:
    """A number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return value


def count(text: str) -> int:
    """A whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A whole number in [0, 2**63)."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text!r}")
    return int(text)


def override(text: str) -> tuple[str, Any]:
    """KEY=VALUE or GROUP.KEY=VALUE, the value as Python writes it, or a bare word."""
    key, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in key.split(".", 1)):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value  # a word, such as evovit.mode=layer


def add_changes(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    """``--set``, as ``changes``: a list of what ``override`` makes, to change ``what``."""
    parser.add_argument(
        "--set",
        dest="changes",
        type=override,
        action="append",
        default=[],
        metavar=metavar,
        help=f"change {what}; may be given again",
    )
