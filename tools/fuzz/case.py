"""The random choices that define a case, all from one seed."""

from __future__ import annotations

import math
import mmap
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import relu_mlp
import support

from .verdict import Subclass, describe

SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")

#: The memory to which a child process writes its log, for the process that watches it.
LIVE: mmap.mmap | None = None


class Case:
    """Random choices, tensors and settings, all from one seed, and a log of them."""

    def __init__(self, seed: object, number: int) -> None:
        self.r = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.r.getrandbits(60))
        self.log: list[str] = []

    def note(self, what: str, value: Any) -> Any:
        text = f"{what}: {describe(value)}"
        self.log.append(text)
        if LIVE is not None:
            LIVE.write(text.encode("ascii", "backslashreplace")[:10_000] + b"\n\0")
            LIVE.seek(-1, os.SEEK_CUR)
        return value

    def chance(self, of: float) -> bool:
        return self.r.random() < of

    # -- Numbers and shapes --

    def integers(self, shape: Sequence[int], density: float = 1.0) -> Tensor:
        """-1, 0 and 1 in float64."""
        values = torch.randint(-1, 2, tuple(shape), generator=self.generator, dtype=torch.float64)
        if density >= 1:
            return values
        return values * (torch.rand(tuple(shape), generator=self.generator) < density)

    def size(self, scale: int) -> int:
        if scale == 0 or self.chance(0.15):
            return self.r.choice([0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 9])
        if scale == 1 or self.chance(0.3):
            return self.r.choice([15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65])
        return self.r.choice([95, 96, 97, 127, 128, 129, 130, 200, 256, 257, 300, 500])

    def rows(self, scale: int) -> int:
        if scale == 0:
            return self.size(0)
        if scale == 1:
            return self.r.choice([0, 1, 5, 6, 7, 11, 12, 13, 16, 23, 24, 25, 47, 48, 49, 95, 97])
        return self.r.choice([1, 2, 7, 16, 64, 96, 239, 240, 241, 300, 480, 481, 500, 1100, 2100])

    def shape(self, rows: int, features: int) -> list[int]:
        """A shape (*, features) of rank 1 to 4, with this many rows in all."""
        if rows == 1 and self.chance(0.3):
            return [features]
        leading = [rows]
        while len(leading) < 3 and self.chance(0.25):
            divisors = [d for d in range(1, 10) if leading[-1] % d == 0]
            divisor = self.r.choice(divisors)
            leading = [*leading[:-1], divisor, leading[-1] // divisor]
        self.r.shuffle(leading)
        return [*leading, features]

    # -- Layouts --

    def placed(self, t: Tensor, special: bool = True) -> Tensor:
        """t in a random layout, which may change its values."""
        if t.layout is not torch.strided or self.chance(0.5):
            return t
        how = self.r.choice(
            ["transposed", "steps", "inside", "expanded", "overlapping", "parameter"]
            + ["negative", "misaligned", "subclass", "zero"] * (special and self.chance(0.1))
        )
        if how == "transposed" and t.dim() > 1:
            a, b = self.r.sample(range(t.dim()), 2)
            return t.transpose(a, b).contiguous().transpose(a, b)
        if how in ("steps", "inside") and t.dim():
            step = 1 if how == "inside" else self.r.choice([1, 2, 3])
            # PyTorch's product of bfloat16 slices multiplies the numbers beside them by 0.
            around = 7.0 if t.dtype == torch.bfloat16 else math.nan
            larger = torch.full([step * n + 9 for n in t.shape], around, dtype=t.dtype)
            inner = larger[tuple(slice(4, 4 + step * n, step) for n in t.shape)]
            return inner.copy_(t)
        if how == "expanded" and t.numel():
            d = self.r.randrange(t.dim())
            return t.narrow(d, 0, 1).expand(t.shape)
        if how == "overlapping" and t.numel():
            strides = [self.r.choice([0, 1, 1, 2]) for _ in t.shape]
            needed = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
            flat = t.flatten().repeat(-(-(needed + 3) // t.numel()))
            return flat.as_strided(t.shape, strides, 3)
        if how == "parameter":
            return nn.Parameter(t, requires_grad=False)
        if how == "negative":
            return torch._neg_view(-t)
        if how == "misaligned" and 0 < t.numel() < 1000 and not SANITIZED:
            raw = bytearray(1) + bytes(t.flatten().clone().untyped_storage().tolist())
            return torch.frombuffer(raw, dtype=t.dtype, offset=1).view(t.shape)
        if how == "subclass":
            return t.as_subclass(Subclass)
        if how == "zero" and t.numel():
            return torch._efficientzerotensor(t.shape, dtype=t.dtype)
        return t

    # -- Settings --

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Threads, instruction set and backend."""
        threads = self.r.choice([1, 1, 2])
        self.backend = name = self.r.choice([*support.BACKENDS, support.BACKENDS[0]])
        self.note("threads, backend", (threads, name))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            if INSTRUCTION_SETS:
                torch.ops.relu_mlp_testing.choose_instruction_set(
                    self.note("instruction set", self.r.choice(INSTRUCTION_SETS))
                )
            with relu_mlp.backend(name):
                yield
        finally:
            torch.set_num_threads(before)

    def mode(self, choices: Sequence[str] = ()) -> Callable[[], Any]:
        """A random mode of PyTorch, as a function that returns its context manager."""
        self.mode_name = self.note("mode", self.r.choice(choices or [*MODES]))
        return MODES[self.mode_name]


INSTRUCTION_SETS = relu_mlp.build_info().supported_instruction_sets


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


MODES: dict[str, Callable[[], Any]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
}
PLAIN_MODES = ["grad", "no_grad", "inference", "deterministic"]
