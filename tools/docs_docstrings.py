"""Turns docstrings, which are plain text in Google's style, into Markdown for `make docs`."""

import re
import textwrap

import griffe

#: An entry of a section for several arguments, which share their description.
SHARED = re.compile(r"^    (\w+(?:, \w+)+)(: .*\n(?: {8,}.*\n|\n(?= {8}))*)", re.MULTILINE)
#: Sections of prose. griffe would take what stands before a colon for a type.
PROSE = re.compile(r"^(Returns|Shape):\n((?:    .*\n)+)", re.MULTILINE)


def as_markdown(docstring: str) -> str:
    text = docstring + "\n"
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)  # before a block of code
    text = text.replace("(*,", r"(\*,")  # no emphasis
    text = PROSE.sub(lambda match: f"**{match[1]}:**\n\n{textwrap.dedent(match[2])}", text)
    return SHARED.sub(
        lambda match: "".join(f"    {name}{match[2]}" for name in match[1].split(", ")), text
    )


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
