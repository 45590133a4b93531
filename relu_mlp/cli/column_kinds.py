"""Which columns `relu-mlp train` can use, and what it makes of those that are not plain numbers."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from . import Problem
from .reading import pandas
from .table import Table

#: Text with more different values than this is free text.
MOST_CATEGORIES = 100

#: Text with at most so many different values is no free text, even if no value occurs twice.
FEW = 10

#: Text in a column of numbers makes categories of them only if at most so many values differ.
MOST_MIXED = 20

#: Three parts with a year, a slash or a colon: 2026-11-29, Nov 29, 2026. (Not 20-30, not 1.2.3.)
DATE = re.compile(r"(?=.*(\d{4}|[/:]))\w+\W+\w+\W+\w.*")


def check_columns(table: Table, features: Sequence[str], text_targets: Sequence[str]) -> None:
    """Says on the standard error what becomes of text and of empty cells.

    Raises:
        Problem: if columns can't be used. It names all of them.
    """
    found = {name: why_not(table, name) for name in (*features, *text_targets)}
    refused = {name: why for name, why in found.items() if why is not None}
    usable = [name for name in features if name not in refused]
    texts = {name: table.cells[name].nunique() for name in usable if table.is_text(name)}
    empty = {name: int(table.cells[name].isna().sum()) for name in usable}
    if texts:
        print(f"Text, with one input for each category: {counted(texts)}", file=sys.stderr)
    if any(empty.values()):
        print(
            "Empty cells, which count as the mean or as no category and are marked in one more "
            f"input: {counted({name: count for name, count in empty.items() if count})}",
            file=sys.stderr,
        )
    if refused:
        reasons = ", ".join(f"{name!r} ({why})" for name, why in refused.items())
        ignored = shlex.join(name for name in refused if name in features)
        remedy = f"; --ignore {ignored} leaves out what is not needed" if ignored else ""
        raise Problem(f"{table.path}: can't use {reasons}{remedy}")


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name!r} ({count})" for name, count in counts.items())


def why_not(table: Table, name: str) -> str | None:
    """Why a column can't be used, or None."""
    if table.cells[name].isna().all():
        return "no values"
    wrong = table.not_a_number(name, empty=True)
    if wrong is None or not table.is_text(name):
        return wrong
    present = table.cells[name].dropna()
    different = present.nunique()
    numeric = pandas().to_numeric(present, errors="coerce").notna().mean()
    if is_dates(present):
        return "dates"
    if numeric > 0.5 and different > min(MOST_MIXED, len(present) / 2):
        return f"{wrong} among numbers"
    if different > MOST_CATEGORIES or different > max(FEW, len(present) / 2):
        return f"free text, with {different} different values"
    return None


def is_dates(texts: Any) -> bool:
    """Whether nearly all of the texts, a pandas.Series, are dates."""
    some = texts.drop_duplicates().head(1000)
    if some.map(lambda text: DATE.fullmatch(str(text)) is not None).mean() < 0.9:
        return False
    with warnings.catch_warnings():  # of dates without a year, of unknown time zones, ...
        warnings.simplefilter("ignore")
        dates = pandas().to_datetime(some, errors="coerce", format="mixed", utc=True)
    return bool(dates.notna().mean() >= 0.9)
