"""Types of command line arguments; what does not fit is refused with the rule."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def output_path(text: str) -> Path:
    """A file that can be written, so that nothing is lost after hours; its folder is made."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}")
    return path


def plot_path(text: str) -> Path:
    """A picture that can be written."""
    path = output_path(text)
    if path.suffix not in _PLOT_SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(_PLOT_SUFFIXES)} (got {text})")
    return path


def positive(text: str) -> float:
    """A finite argument above 0."""
    value = positive_or_inf(text)
    if value == math.inf:
        raise argparse.ArgumentTypeError(f"must be finite (got {text})")
    return value


def positive_or_inf(text: str) -> float:
    """An argument above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive (got {text})")
    return value


def positive_int(text: str) -> int:
    """An argument of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {text})")
    return value


def count(text: str) -> int:
    """A whole argument of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0 (got {text})")
    return value


def at_least_0(text: str) -> float:
    """A finite argument of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0 and finite (got {text})")
    return value


def positive_share(text: str) -> float:
    """An argument in (0, 1]."""
    value = share(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be above 0 (got {text})")
    return value


def share(text: str) -> float:
    """An argument in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1] (got {text})")
    return value
