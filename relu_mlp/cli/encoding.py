"""How the cells of the features become the inputs of a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .reading import listed
from .table import Table


@dataclass(frozen=True)
class Encoding:
    """The inputs that each feature becomes, one feature after the other.

    Numbers become one input. Text becomes one input for each category, which is 1 where the
    cell has this category and 0 elsewhere. A feature with an indicator has one more input, 1
    where the cell is empty.
    """

    features: list[str]
    categories: dict[str, list[str]]  #: of each feature that is text, sorted
    indicators: list[str]  #: the features that have an indicator

    @classmethod
    def of(cls, table: Table, features: list[str], rows: Tensor) -> Encoding:
        """The encoding that fits the training rows; the other rows only say what is text."""
        cells = table.cells.iloc[rows.tolist()]
        texts = [name for name in features if table.is_text(name)]
        return cls(
            features,
            {name: sorted(cells[name].dropna().unique()) for name in texts},
            [name for name in features if cells[name].isna().any()],
        )

    def widths(self) -> Iterator[tuple[str, int]]:
        """Each feature, and the number of its inputs."""
        for name in self.features:
            yield name, len(self.categories.get(name, [name])) + (name in self.indicators)

    @property
    def inputs(self) -> int:
        return sum(width for _, width in self.widths())

    def is_number(self) -> Tensor:
        """(inputs,): whether an input is a number, not 0 or 1 for a category or an empty cell."""
        return torch.tensor(
            [
                n == 0 and name not in self.categories
                for name, width in self.widths()
                for n in range(width)
            ]
        )

    def apply(self, table: Table) -> Tensor:
        """(rows, inputs) in float64, with NaN for a number whose cell is empty.

        Raises:
            Problem: if a feature of numbers has a cell that is neither a number nor empty.
        """
        names = [name for name in self.features if name not in self.categories]
        numbers = dict(zip(names, table.numbers(names, empty=True), strict=True))
        columns: list[Tensor] = []
        for name in self.features:
            cells = table.cells[name]
            if name in numbers:
                columns.append(numbers[name])
            flags = [cells == category for category in self.categories.get(name, [])]
            if name in self.indicators:
                flags.append(cells.isna())
            columns += [torch.tensor(flag.to_numpy("float64", na_value=0)) for flag in flags]
        return torch.stack(columns, 1)

    def notes(self, table: Table) -> list[str]:
        """What of a table the training rows do not have, with the number of cells."""
        found = []
        for name, categories in self.categories.items():
            unseen = table.cells[name].dropna()
            unseen = unseen[~unseen.isin(categories)]
            if len(unseen):
                found.append(
                    f"Column {name!r}: {len(unseen)} cell(s) hold a category that no training row "
                    f"has, and count as none: {listed(sorted(unseen.unique()))}"
                )
        for name in self.features:
            empty = int(table.cells[name].isna().sum())
            if empty and name not in self.indicators:
                as_what = "as no category" if name in self.categories else "as the mean"
                found.append(
                    f"Column {name!r}: {empty} cell(s) are empty, unlike in the training rows, "
                    f"and count {as_what}"
                )
        return found
