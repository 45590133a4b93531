"""The user's CSV table: its numbers and labels, and their places in the file."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import Problem, needs
from .files import read_text

#: The largest number allowed: sums of its square are finite.
LARGEST = 1e100


def pandas() -> Any:
    return needs("pandas", "cli", "reading a table")


def listed(values: Sequence[Any], most: int = 8) -> str:
    """The first few entries of a list, as text."""
    return ", ".join([*map(str, values[:most]), *["..."] * (len(values) > most)])


def records(text: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, fields) of each record. Blank lines don't count, as in pandas."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    last = ""

    def lines() -> Iterator[str]:
        nonlocal last
        for physical in io.StringIO(text, newline=""):
            last = physical
            yield physical

    reader = csv.reader(lines(), skipinitialspace=True)
    line = 1
    for fields in reader:
        if last.strip(" \t\r\n"):  # a pair of quotes is an empty value, not a blank line
            yield line, fields
        line = reader.line_num + 1


@dataclass(frozen=True)
class Table:
    """The named columns of a CSV file, with at least one row."""

    path: Path
    text: str  #: the contents of the file
    cells: Any  #: a pandas.DataFrame
    nameless: int  #: the number of columns that were left out because they have no name

    @classmethod
    def read(cls, path: Path) -> Table:
        """Reads comma-separated values in UTF-8. The first line has the names of the columns.

        Blank lines don't count. pandas decides which values are missing.

        Raises:
            Problem: if the file is missing or is not such a table, if two columns have the
                same name, or if there are no rows.
        """
        text = read_text(path)
        cells = parse(path, text)
        header = next(records(text))[1]
        if len(header) == 1 and any(separator in header[0] for separator in ";\t|"):
            raise Problem(f"{path}: expected commas between the names, got {header[0]!r}")
        names = [name.strip() for name in header]
        if len(names) != cells.shape[1]:  # a lone \r, which is not always an end of line
            raise Problem(
                f"{path}: expected a CSV table, got: {len(names)} or {cells.shape[1]} names in "
                "its first line, depending on how lines end"
            )
        for name, count in Counter(names).items():
            if name and count > 1:
                raise Problem(
                    f"{path}: expected a name for each column, got {name!r} {count} times"
                )
        if not len(cells):
            raise Problem(f"{path}: expected rows below the names of the columns, got none")
        cells.columns = names
        named = [name for name in names if name]
        return cls(path, text, cells[named], len(names) - len(named))

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

    def line(self, row: int) -> int:
        """The number of a row's first line in the file. The first line of the file is 1."""
        return next(itertools.islice(records(self.text), row + 1, None))[0]

    def at(self, row: int, name: str) -> str:
        """The place of a cell in the file, for a message."""
        return f"{self.path}, line {self.line(row)}, column {name!r}"

    def numbers(self, names: Sequence[str], remedy: str = "") -> Tensor:
        """(rows, len(names)) in float64; true and false are 1 and 0.

        Raises:
            Problem: for the first cell of a column that is not a number from -`LARGEST`
                to `LARGEST`; it ends with `remedy`.
        """
        return torch.stack([self._numbers(name, remedy) for name in names], 1)

    def _numbers(self, name: str, remedy: str) -> Tensor:
        column = self.cells[name]
        values = torch.tensor(
            pandas().to_numeric(column, errors="coerce").to_numpy("float64", na_value=torch.nan)
        )
        bad = ~(values.abs() <= LARGEST)
        if bad.any():
            self._check_not_empty(name, remedy)
            row = int(bad.int().argmax())
            if column.isna().iloc[row]:
                mismatch = "a number, got none"
            elif values[row].isnan():
                mismatch = f"a number, got the text {column.iloc[row]!r}"
            else:
                mismatch = f"a number from -{LARGEST} to {LARGEST}, got {column.iloc[row]}"
            raise Problem(f"{self.at(row, name)}: expected {mismatch}{remedy}")
        return values

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
            self._numbers(name, "")
            if (column % 1 == 0).all():
                return [int(value) for value in column]
        return list(column.tolist())

    def _check_not_empty(self, name: str, remedy: str = "") -> None:
        if self.cells[name].isna().all():
            raise Problem(f"{self.path}: expected values in column {name!r}, got none{remedy}")


def parse(path: Path, text: str) -> Any:
    """The cells as pandas reads them, with a type for each column."""
    pd = pandas()
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(
                io.StringIO(text),
                index_col=False,  # otherwise a line with one more value would begin with an index
                skipinitialspace=True,
                low_memory=False,  # one type for a column, not one for each chunk
            )
        except pd.errors.EmptyDataError:
            raise Problem(f"{path}: expected the names of columns, got an empty file") from None
        except pd.errors.ParserWarning:
            problem = "a line has more values than the first line has names"
        except pd.errors.ParserError as error:
            problem = str(error).removeprefix("Error tokenizing data. C error: ").splitlines()[0]
    raise Problem(f"{path}: expected a CSV table, got: {problem}")
