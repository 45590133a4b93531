"""The report of `fuse`: the modules that it replaced, and those that it left, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Replaced(NamedTuple):
    """A module that `fuse` replaced."""

    name: str  #: its name in `named_modules`; empty for the model itself
    kind: str  #: the name of its class before
    became: str  #: the name of its class now
    note: str  #: the children that run as one operator, and when they run natively


class Left(NamedTuple):
    """A module with two Linears or more, or one of its Linears, that `fuse` left as it was."""

    name: str  #: its name in `named_modules`; empty for the model itself
    kind: str  #: the name of its class
    reason: str  #: why it was left, as a predicate: "is followed by GELU"


@dataclass(frozen=True)
class FuseReport(Generic[M]):
    """The result of `fuse(model, report=True)`. `print` shows it as a table."""

    model: M  #: the model itself
    replaced: list[Replaced]  #: (name, kind, became, note) of each module that was replaced
    left: list[Left]  #: (name, kind, reason) of each module, or Linear, that was left as it was

    def __str__(self) -> str:
        replaced = [
            (entry.name, entry.kind, f"{entry.became}: {entry.note}") for entry in self.replaced
        ]
        left = [(entry.name, entry.kind, entry.reason) for entry in self.left]
        return "\n".join(
            [
                f"replaced: {len(replaced) or 'nothing'}",
                *_table(replaced),
                f"left as it was: {len(left) or 'nothing'}",
                *_table(left),
            ]
        )


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    names = [name or "(the model)" for name, _, _ in rows]
    width = max(map(len, names), default=0)
    width_of_kind = max((len(kind) for _, kind, _ in rows), default=0)
    return [
        f"  {name:{width}}  {kind:{width_of_kind}}  {text}"
        for name, (_, kind, text) in zip(names, rows, strict=True)
    ]
