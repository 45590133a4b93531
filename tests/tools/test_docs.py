"""The documentation is true.

In every Markdown file of the repository:

- A fenced block whose first line names a file after the language, as in
  ```python relu_mlp/reference.py, quotes it. Its lines occur there, one after the other. A line of
  three dots leaves some out, and indentation may differ.
- Any other block of Python runs, after those above it on the page. A block of text right after it
  shows its output.
- So do the lines of other blocks that begin with "$ relu-mlp".
- A relative link leads to a file, and to a heading of it where it names one.
- Every file that docs/architecture.md and docs/adding.md name exists, and so does every name of a
  module that they give with its module, such as `functional.is_served`.
- README.md and docs/architecture.md keep to their length, and the figures in README.md are those of
  docs/performance.md.
- docs/api.md has every public name, and the docstring of each describes every argument, the result
  and the errors. `make docs` builds the site, in which a broken link is an error.
"""

import contextlib
import importlib
import inspect
import io
import linecache
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

import relu_mlp
import relu_mlp.parallel
from relu_mlp import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
MOST_WORDS = {"README.md": 1000, "docs/architecture.md": 1500}


@dataclass
class Block:
    language: str
    path: str  #: the quoted file, or an empty string
    text: str
    line: int  #: the line at which it begins
    follows: bool  #: whether only blank lines separate it from the block before


def blocks_of(page):
    text, end, blocks = page.read_text(encoding="utf-8"), 0, []
    for match in FENCE.finditer(text):
        between = text[end : match.start()]
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(Block(*match.groups(), line, bool(blocks) and not between.strip()))
        end = match.end()
    return blocks


def name_of(page):
    return str(page.relative_to(ROOT))


def file_of(path):
    """A file of the repository. The package's own files may be installed elsewhere."""
    if path.startswith("relu_mlp/"):
        return Path(relu_mlp.__file__).parent / path.removeprefix("relu_mlp/")
    return ROOT / path


def stripped(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def quote_problem(quote, source):
    """The reason why a quote does not occur in a source, or None."""
    lines, at = stripped(source), 0
    for part in re.split(r"^\s*\.\.\.$", quote, flags=re.MULTILINE):
        wanted = stripped(part)
        found = [
            n for n in range(at, len(lines)) if wanted and lines[n : n + len(wanted)] == wanted
        ]
        if not found:
            return f"not in the file, or not in this order: {wanted}"
        at = found[0] + len(wanted)
    return None


quotes = [
    pytest.param(block, id=f"{name_of(page)}:{block.line}")
    for page in PAGES
    for block in blocks_of(page)
    if block.path
]


@pytest.mark.parametrize("block", quotes)
def test_quoted_lines_stand_in_the_code(block):
    source = file_of(block.path).read_text(encoding="utf-8")
    assert quote_problem(block.text, source) is None


def test_there_are_quotes():
    assert len(quotes) > 10


@pytest.mark.parametrize(
    ("quote", "stands"),
    [
        ("b\nc", True),
        ("  b\n  c", True),
        ("a\n...\nd", True),
        ("b\nd", False),
        ("d\n...\na", False),
        ("x", False),
        ("", False),
    ],
)
def test_a_quote_that_does_not_stand_is_found(quote, stands):
    assert (quote_problem(quote, "a\nb\n\n    c\nd\n") is None) == stands


def runs(page):
    return [b for b in blocks_of(page) if b.language == "python" and not b.path]


def run(page):
    """Runs a page's Python from top to bottom, and compares its output."""
    namespace = {"__name__": "docs"}
    blocks = blocks_of(page)
    for n, block in enumerate(blocks):
        for command in re.findall(r"^\$ relu-mlp (.*)$", block.text, re.MULTILINE):
            assert cli.main(shlex.split(command)) == 0, command
        if block.language != "python" or block.path:
            continue
        name, source = f"{page}:{block.line}", "\n" * block.line + block.text
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        code = compile(source, name, "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        after = blocks[n + 1] if n + 1 < len(blocks) else None
        if after and after.follows and after.language == "text":
            actual = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
            assert actual == after.text.rstrip("\n"), f"line {block.line} prints\n{actual}"


# PyTorch says this about itself when it first loads the code for forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.installation
@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=name_of)
def test_code_in_the_documentation_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("code", ["print(1 / 0)", "print(2)"])
def test_code_that_fails_or_prints_something_else_is_found(code, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(textwrap.dedent(f"Text.\n\n```python\n{code}\n```\n\n```text\n1\n```\n"))
    with pytest.raises((AssertionError, ZeroDivisionError)):
        run(page)


def test_a_command_that_fails_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```\n$ relu-mlp train --data missing.csv --target y\n```\n")
    with pytest.raises(AssertionError, match="missing"):
        run(page)


def anchors_of(page):
    """The anchors that GitHub makes from a page's headings."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    titles = [re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(text)]
    return {title.strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in LINK.findall(text):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        if path.is_relative_to(ROOT):
            path = file_of(path.relative_to(ROOT).as_posix())
        assert path.exists(), f"{target} does not exist"
        if anchor and path.suffix == ".md":
            assert anchor in anchors_of(path), f"{target} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_nested_in_a_list_is_indented_by_four_spaces(page):
    """GitHub needs two or three, and Python-Markdown, which builds the site, needs four."""
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^ {1,3}(?:```|[-*] |\d+\. ).*", text, re.MULTILINE) == []


OF_PARALLEL = relu_mlp.parallel.__all__
PUBLIC = {f"relu_mlp.{name}": getattr(relu_mlp, name) for name in relu_mlp.__all__}
PUBLIC |= {f"relu_mlp.parallel.{n}": getattr(relu_mlp.parallel, n) for n in OF_PARALLEL}
del PUBLIC["relu_mlp.__version__"]
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
#: The classes that users construct. Functions of this package make the others.
CONSTRUCTED = ["relu_mlp.ReluMLP", "relu_mlp.backend", "relu_mlp.parallel.ReluMLPParallel"]
CALLED = [name for name in PUBLIC if name not in CLASSES or name in CONSTRUCTED]


def methods_of(cls):
    """The public methods and properties. The docstring of a module describes its forward."""
    for name, value in vars(cls).items():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if inspect.isfunction(function) and name[0] != "_" and name != "forward":
            yield name, function


METHODS = {
    f"{name}.{method}": function
    for name, cls in CLASSES.items()
    for method, function in methods_of(cls)
}


def sections_of(docstring):
    """The sections of a docstring, such as Args, as lists of their lines."""
    sections, lines = {}, []
    for line in inspect.cleandoc(docstring).splitlines():
        if title := re.fullmatch(r"(Args|Returns|Raises|Shape):", line):
            lines = sections.setdefault(title[1], [])
        elif line and line[0] != " ":
            lines = []
        else:
            lines.append(line)
    return sections


def undescribed(function):
    """What the docstring of a function does not describe."""
    sections, signature = sections_of(function.__doc__ or ""), inspect.signature(function)
    entries = [re.match(r" {4}(\w+(?:, \w+)*): \S", line) for line in sections.get("Args", [])]
    described = {name for entry in entries if entry for name in entry[1].split(", ")}
    missing = signature.parameters.keys() - described - {"self", "cls"}
    # The docstring of a property, or of a method without arguments, is about the result.
    is_about_result = inspect.isclass(function) or list(signature.parameters) == ["self"]
    if not is_about_result and signature.return_annotation not in ("None", None):
        missing |= {"Returns"} - sections.keys()
    return missing if function.__doc__ else {"everything"}


@pytest.mark.parametrize("name", [*CALLED, *METHODS])
def test_public_docstrings_describe_arguments_and_results(name):
    assert undescribed(PUBLIC.get(name) or METHODS[name]) == set()


@pytest.mark.parametrize("name", CALLED)
def test_public_docstrings_name_the_errors(name):
    assert "Raises" in sections_of(PUBLIC[name].__doc__)


@pytest.mark.parametrize("name", CLASSES)
def test_public_classes_describe_fields_and_shapes(name):
    """A module gives shapes. A field has a comment for Sphinx, on its line or on the one above."""
    cls = CLASSES[name]
    lines = inspect.getsource(cls).splitlines()
    fields = [n for n, line in enumerate(lines) if re.match(r" {4}[a-z]\w*: ", line)]
    assert [lines[n] for n in fields if "#: " not in lines[n] + lines[n - 1]] == []
    assert cls.__doc__
    if issubclass(cls, nn.Module):
        assert {"Shape", "Raises"} <= sections_of(cls.__doc__).keys()


def test_what_a_docstring_lacks_is_found():
    def add(x, y) -> float:
        """Adds.

        Args:
            x: a number.
        """

    assert undescribed(add) == {"y", "Returns"}
    assert undescribed(lambda x: x) == {"everything"}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_has_every_public_name(name):
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"^(:::|      heading:) {re.escape(name)}$", text, re.MULTILINE)


NAMES_FILES = ["docs/architecture.md", "docs/adding.md"]
FILE = re.compile(
    r"(?<![\w./])((?:[\w-]+/)*[\w-]+\.(?:py|h|cpp|cu|cuh|md|ipynb)|(?:[\w-]+/)+)(?![\w*])"
)


def files_named(text):
    """Files and folders, such as cpu/plan.cpp and csrc/cpu/isa/."""
    text = re.sub(r"\]\([^)]*\)|<br/>", " ", text)  # links have a test of their own
    return set(FILE.findall(text))


def exists(name):
    """Whether a file or folder has this path, or a path that ends with it."""
    folders = ["csrc", "docs", "tests", "tools", "examples"]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found += Path(relu_mlp.__file__).parent.rglob("*")
    ends = "/" + name.strip("/")
    paths = [*ROOT.iterdir(), *found, Path(relu_mlp.__file__).parent]
    return any(path.as_posix().endswith(ends) for path in paths)


@pytest.mark.parametrize("page", NAMES_FILES)
def test_files_that_the_map_and_the_recipes_name_exist(page):
    named = files_named((ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 30
    assert [name for name in sorted(named) if not exists(name)] == []


def test_a_file_that_does_not_exist_is_found():
    assert files_named("see `cpu/nowhere.h`, [a](b.md)") == {"cpu/nowhere.h"}
    assert not exists("cpu/nowhere.h") and exists("cpu/plan.cpp") and exists("fusion/")


@pytest.mark.parametrize("page", NAMES_FILES)
def test_names_that_the_map_and_the_recipes_give_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    package = Path(relu_mlp.__file__).parent
    modules = {path.stem for path in package.glob("*.py")} | {"ops"}
    for module, name in re.findall(r"`(\w+)\.(\w+)(?:\([^`]*\))?`", text):
        if module in modules and name not in ("py", "h", "cpp"):
            assert hasattr(importlib.import_module(f"relu_mlp.{module}"), name), f"{module}.{name}"


@pytest.mark.parametrize("name", MOST_WORDS)
def test_pages_keep_to_their_length(name):
    assert len((ROOT / name).read_text(encoding="utf-8").split()) <= MOST_WORDS[name]


def rows_by_shape(page):
    """The table rows that begin with a shape, such as 64x3-2-1, as lists of their other cells.

    Without the tables that benchmarks/training.py writes, which have a test of their own.
    """
    text = re.sub(r"<!-- bench.*?<!-- end -->", "", page.read_text("utf-8"), flags=re.DOTALL)
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if re.fullmatch(r"\d+x[\d-]+", row[0])]


def test_the_figures_of_the_readme_are_those_of_the_suite():
    suite = {}
    for shape, *figures in rows_by_shape(ROOT / "docs" / "performance.md"):
        suite.setdefault(shape, figures)
    rows = rows_by_shape(ROOT / "README.md")
    assert rows
    for shape, *speedups in rows:
        training, inference, _, training_bfloat16, inference_bfloat16 = suite[shape]
        measured = [training, inference, training_bfloat16, inference_bfloat16]
        assert speedups == [figure.split()[0] for figure in measured], shape


@pytest.mark.parametrize(
    "program", [p.name for p in sorted(ROOT.glob("examples/*")) if p.suffix in (".py", ".ipynb")]
)
def test_every_program_is_named_in_the_documentation(program):
    assert any(program in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_guide_names_every_command(command):
    assert f"\nrelu-mlp {command} " in (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## (\S+) - \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert first and first[1] == relu_mlp.__version__


def test_compatibility_names_tests_that_exist():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    text = re.sub(r"<!-- make matrix -->.*?<!-- end -->", "", text, flags=re.DOTALL)
    rows = [line for line in text.splitlines() if re.match(r"\| [^|]*[^|\s-]", line)]
    named = re.findall(r"`(\w+\.py)::(\w+)`", text)
    assert len(rows) > 90
    assert all(re.search(r"`(\w+\.py::\w+|make [\w-]+)`", row) for row in rows)
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    missing = [
        (file, test)
        for file, test in named
        if not re.search(rf"^def {test}\(", sources.get(file, ""), re.MULTILINE)
    ]
    assert not missing
    commands = re.findall(r"`make ([\w-]+)`", text)
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert commands and set(commands) <= set(rules)
