"""The user's CSV table: its numbers, texts and labels, and their places in the file."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import Problem
from .files import read_text
from .reading import listed, pandas, read_cells, records

#: The largest number allowed: sums of its square are finite.
LARGEST = 1e100


@dataclass(frozen=True)
class Table:
    """The named columns of a CSV file, with at least one row."""

    path: Path
    text: str  #: the contents of the file
    cells: Any  #: a pandas.DataFrame, whose index has the number of each row in the file
    nameless: int  #: the number of columns that were left out because they have no name

    @classmethod
    def read(cls, path: Path, texts: Collection[str] = ()) -> Table:
        """Reads comma-separated values in UTF-8. The first line has the names of the columns.

        Blank lines don't count. pandas decides which values are missing.

        Args:
            texts: the names of columns that are text, whatever their cells look like.

        Raises:
            Problem: if the file is missing or is not such a table, if two columns have the
                same name, or if there are no rows.
        """
        text = read_text(path)
        cells = read_cells(path, text, texts)
        named = [name for name in cells.columns if name]
        return cls(path, text, cells[named], cells.shape[1] - len(named))

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def names(self) -> list[str]:
        return list(self.cells.columns)

    def require(self, names: Sequence[str], why: str) -> None:
        """Raises a `Problem` if a column is missing; `why` is, say, "which --target names"."""
        for name in names:
            if name not in self.cells.columns:
                close = difflib.get_close_matches(name, self.names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {listed(self.names)}"
                raise Problem(f"{self.path} has no column {name!r}, {why}; {hint}")

    def with_values_of(self, names: Sequence[str]) -> Table:
        """The rows that have a value in each of these columns.

        Raises:
            Problem: if a column has no values.
        """
        for name in names:
            self._check_not_empty(name)
        return replace(self, cells=self.cells.dropna(subset=list(names)))

    def line(self, row: int) -> int:
        """The number of a row's first line in the file. The first line of the file is 1."""
        place = int(self.cells.index[row])
        return next(itertools.islice(records(self.text), place + 1, None))[0]

    def at(self, row: int, name: str) -> str:
        """The place of a cell in the file, for a message."""
        return f"{self.path}, line {self.line(row)}, column {name!r}"

    def numbers(self, names: Sequence[str], empty: bool = False) -> list[Tensor]:
        """For each column (rows,) in float64; true and false are 1 and 0.

        Args:
            empty: whether cells may be empty; they are NaN.

        Raises:
            Problem: if a cell is not a number from -`LARGEST` to `LARGEST`. It names the first
                such cell of each column.
        """
        wrong = [self.not_a_number(name, empty) for name in names]
        places = [
            f"{what} of column {name!r}" for name, what in zip(names, wrong, strict=True) if what
        ]
        if places:
            raise Problem(
                f"{self.path}: expected numbers from -{LARGEST} to {LARGEST}, "
                f"got {', '.join(places)}"
            )
        return [self._as_numbers(name) for name in names]

    def is_text(self, name: str) -> bool:
        """Whether a cell of a column is neither a number, nor true or false, nor empty."""
        return bool((self._present(name) & self._as_numbers(name).isnan()).any())

    def not_a_number(self, name: str, empty: bool) -> str | None:
        """The first cell of a column that is not a number, and its line, or None."""
        values = self._as_numbers(name)
        present = self._present(name)
        bad = ~(values.abs() <= LARGEST) & (present if empty else True)
        if not bad.any():
            return None
        row = int(bad.int().argmax())
        if not present[row]:
            what = "an empty cell"
        else:
            cell = self.cells[name].iloc[row]
            what = f"the text {cell!r}" if values[row].isnan() else str(cell)
        return f"{what} in line {self.line(row)}"

    def _present(self, name: str) -> Tensor:
        """(rows,): whether a cell is not empty."""
        return torch.tensor(self.cells[name].notna().to_numpy("bool"))

    def _as_numbers(self, name: str) -> Tensor:
        """(rows,) in float64; NaN where a cell is empty or is not a number."""
        numbers = pandas().to_numeric(self.cells[name], errors="coerce")
        return torch.tensor(numbers.to_numpy("float64", na_value=torch.nan))

    def labels(self, name: str) -> list[Any]:
        """The values of a column: all str, all bool, all int, or all float.

        Numbers are int if all of them are integers.

        Raises:
            Problem: for the first cell that is missing or infinite.
        """
        column = self.cells[name]
        missing = column.isna()
        if missing.any():
            self._check_not_empty(name)
            raise Problem(f"{self.at(int(missing.argmax()), name)}: expected a value, got none")
        if column.dtype.kind == "f":
            self.numbers([name])
            if (column % 1 == 0).all():
                return [int(value) for value in column]
        return list(column.tolist())

    def _check_not_empty(self, name: str) -> None:
        if self.cells[name].isna().all():
            raise Problem(f"{self.path}: expected values in column {name!r}, got none")
