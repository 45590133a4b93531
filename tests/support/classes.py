"""Makes classes of modules from source text, as a notebook does."""

from __future__ import annotations

import linecache
import textwrap

import torch
import torch.nn.functional as F
from torch import nn


def class_from_source(base, body, arguments="self, x", before="", is_async=False, **names):
    """A subclass whose `forward` has this text as its body. Its source is found as in a notebook.

    Args:
        before: the lines before it in the class, such as a decorator.
        names: the global variables of the method, besides torch, nn and F.
    """
    header = f"{before}\n{'async ' * is_async}def forward({arguments}):\n"
    method = header + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    source = "class Own(Base):\n" + textwrap.indent(method, "    ") + "\n"
    name = f"<source {len(linecache.cache)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace = {
        "__name__": base.__module__,
        "Base": base,
        "torch": torch,
        "nn": nn,
        "F": F,
        **names,
    }
    exec(compile(source, name, "exec", dont_inherit=True), namespace)
    return namespace["Own"]
