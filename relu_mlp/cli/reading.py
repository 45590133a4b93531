"""From the text of a CSV file to its cells, which pandas reads and types."""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import Problem, needs

#: Digits in groups of three, as in 1,234.5; and numbers that are too short for a group.
WITH_SEPARATORS = r"[+-]?(\d{1,3}(,\d{3})+|\d{1,3})(\.\d*)?"


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


def read_cells(path: Path, text: str, texts: Collection[str]) -> Any:
    """The cells as a pandas.DataFrame, with a type for each column; some names may be empty.

    Args:
        texts: the names of columns that are text, whatever their cells look like.

    Raises:
        Problem: if the text is not a CSV table, or if two columns have the same name.
    """
    cells = parse(path, text, texts)
    header = next(records(text))[1]
    if len(header) == 1 and any(separator in header[0] for separator in ";\t|"):
        raise Problem(f"{path}: expected commas between the names, got {header[0]!r}")
    names = [name.strip() for name in header]
    if len(names) != cells.shape[1]:  # a lone \r, which is not always an end of line
        raise Problem(
            f"{path}: expected a CSV table, got: {len(names)} or {cells.shape[1]} names in "
            "its first line, depending on how lines end"
        )
    counts = Counter(name for name in names if name)
    repeated = [f"{name!r} {count} times" for name, count in counts.items() if count > 1]
    if repeated:
        raise Problem(f"{path}: expected a name for each column, got {', '.join(repeated)}")
    if not len(cells):
        raise Problem(f"{path}: expected rows below the names of the columns, got none")
    short = [line for line, fields in records(text) if len(fields) != len(names)]
    if short:
        raise Problem(
            f"{path}: expected {len(names)} values in each line, got fewer in line {listed(short)}"
        )
    return cells.set_axis(names, axis=1).apply(tidied)


def parse(path: Path, text: str, texts: Collection[str]) -> Any:
    """The cells as pandas reads them. An empty cell, NA, null, ? and the like are missing."""
    pd = pandas()
    header = next(records(text), (1, []))[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(
                io.StringIO(text),
                index_col=False,  # otherwise a line with one more value would begin with an index
                skipinitialspace=True,
                low_memory=False,  # one type for a column, not one for each chunk
                na_values=["?"],
                dtype={name: str for name in header if name.strip() in texts},
            )
        except pd.errors.EmptyDataError:
            raise Problem(f"{path}: expected the names of columns, got an empty file") from None
        except pd.errors.ParserWarning:
            problem = "a line has more values than the first line has names"
        except pd.errors.ParserError as error:
            problem = str(error).removeprefix("Error tokenizing data. C error: ").splitlines()[0]
    raise Problem(f"{path}: expected a CSV table, got: {problem}")


def tidied(column: Any) -> Any:
    """Text without spaces around it; numbers if all of it is numbers such as 1,234."""
    if pandas().api.types.infer_dtype(column, skipna=True) != "string":
        return column
    column = column.str.strip()
    column = column.mask(column == "")
    present = column.dropna()
    if present.str.contains(",").any() and present.str.fullmatch(WITH_SEPARATORS).all():
        return pandas().to_numeric(column.str.replace(",", ""))
    return column
