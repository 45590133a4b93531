"""What tools/wheel.py and tools/matrix.py do around the builds and the tests that they run."""

import importlib.util
import json
import os
import re
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# -- make wheel ------------------------------------------------------------------


def test_an_sdist_does_not_depend_on_its_builder(tmp_path):
    wheel, archives = load("wheel"), []
    for name, date, mode in [("one", 10**9, 0o600), ("two", 2 * 10**9, 0o664)]:
        top = tmp_path / name / "relu_mlp-1"
        top.mkdir(parents=True)
        for file in ("b", "a") if name == "one" else ("a", "b"):
            (top / file).write_text(file)
            os.utime(top / file, (date, date))
            (top / file).chmod(mode)
        archives.append(tmp_path / f"{name}.tar.gz")
        with tarfile.open(archives[-1], "w:gz") as archive:
            archive.add(top, top.name)
        wheel.without_builder(archives[-1], 1_700_000_000)
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with tarfile.open(archives[0]) as archive:
        assert archive.getnames() == ["relu_mlp-1", "relu_mlp-1/a", "relu_mlp-1/b"]
        assert {member.mtime for member in archive} == {1_700_000_000}
        assert archive.extractfile("relu_mlp-1/b").read() == b"b"


# -- make matrix -----------------------------------------------------------------


def test_the_tests_of_the_matrix_exist():
    for tests in load("matrix").AREAS.values():
        for test in tests:
            file, _, function = test.partition("::")
            text = (ROOT / "tests" / file).read_text()
            assert not function or re.search(rf"^def {function}\(", text, re.M), test


REPORT = """<testsuites><testsuite>
<testcase classname="tests.core.test_gradcheck" name="test_third_derivative[1]"/>
<testcase classname="tests.core.test_gradcheck" name="test_recomputed"><failure/></testcase>
<testcase classname="tests.core.test_gradcheck" name="test_recomputed[1]">
<skipped message="no luck"/></testcase>
<testcase classname="tests.composition.test_export" name="test_one_operator[a]"/>
<testcase classname="" name="tests.core.test_gradcheck"><error/></testcase>
</testsuite></testsuites>"""


def test_outcomes_are_counted_by_area(tmp_path):
    matrix = load("matrix")
    (tmp_path / "report.xml").write_text(REPORT)
    areas = matrix.outcomes(tmp_path / "report.xml")
    assert areas["export"] == {"passed": 1, "skipped": {}, "failed": []}
    derivatives = areas["derivatives"]
    assert (derivatives["passed"], derivatives["skipped"]) == (1, {"no luck": 1})
    assert derivatives["failed"][0] == "core/test_gradcheck.py::test_recomputed"
    assert matrix.cell(derivatives) == "1 pass, 2 fail, 1 skipped"


#: The builds of a registry: the oldest and the newest CPython of each PyTorch.
BUILDS = {"2.11.0": (10, 13), "2.13.0": (10, 14), "2.14.1": (10, 14), "2.15.0": (12, 14)}


def test_what_is_missing_is_a_row(monkeypatch):
    """Here are no CPython 3.10 and 3.14, and the connection fails once."""
    matrix = load("matrix")

    def version_for(python, torch="torch"):
        minor = int(python.partition(".")[2])
        found = [v for v, (oldest, newest) in BUILDS.items() if oldest <= minor <= newest]
        wanted = torch.partition("==")[2] or found[-1]
        if wanted not in found:
            raise matrix.Missing("no such build")
        return wanted

    def tested(wheel, python, torch):
        if (python, torch) == ("3.13", "2.13.0"):
            raise matrix.Missing("no network")
        areas = {area: {"passed": 5, "skipped": {}, "failed": []} for area in matrix.AREAS}
        areas["export"]["skipped"]["no luck"] = 2
        row = {"compiled": ["baseline", "amx"], "supported": ["baseline"], "areas": areas}
        names = ["torch._C._gone"] if torch == "2.15.0" and python == "3.12" else []
        return {"python": f"{python}.1", "torch": f"{torch}+cu1", "missing_names": names, **row}

    monkeypatch.setattr(matrix, "version_for", version_for)
    monkeypatch.setattr(matrix, "can_be_had", lambda python: python not in ("3.10", "3.14"))
    monkeypatch.setattr(matrix, "tested", tested)
    rows = list(matrix.rows_of(Path("wheel")))
    assert [(row["torch"], row["python"], row.get("missing", "")[:12]) for row in rows] == [
        ("2.11.0", "3.10", "this CPython"),
        ("2.11.0+cu1", "3.11.1", ""),
        ("2.11.0", "3.14", "the registry"),
        ("2.11.0+cu1", "3.13.1", ""),
        ("2.13.0", "3.10", "this CPython"),
        ("2.13.0+cu1", "3.11.1", ""),
        ("2.13.0", "3.14", "this CPython"),
        ("2.13.0", "3.13", ""),
        ("2.15.0", "3.10", "the registry"),
        ("2.15.0", "3.11", "the registry"),
        ("2.15.0+cu1", "3.12.1", ""),
        ("2.15.0", "3.14", "this CPython"),
        ("2.15.0+cu1", "3.13.1", ""),
    ]
    assert [what for row in rows for what in matrix.problems(row)] == ["no network"]
    text = matrix.table({"rows": rows})
    assert (
        "| 2.15.0 | 3.13.1 | 5 pass |" in text and "| 2.13.0 | 3.13 | failed: no network |" in text
    )
    assert text.endswith(
        "\n\nInstruction sets: baseline.\nThe processor has no amx, which did not run.\n"
        "PyTorch 2.15.0+cu1 has no `torch._C._gone`.\nSkipped: no luck.\n"
    )


def test_the_kept_matrix():
    """The page shows docs/matrix.json, which has every pair that `make matrix` runs."""
    matrix = load("matrix")
    results, page = json.loads(matrix.RESULTS.read_text()), matrix.PAGE.read_text()
    assert matrix.page_with(matrix.table(results), page) == page
    assert matrix.MARKS[0] in page
    for python in (matrix.PYTHONS[0], matrix.PYTHONS[-1]):
        ran_or_not = {
            matrix.release(row["torch"])
            for row in results["rows"]
            if row["python"].startswith(python)
        }
        assert {*matrix.TORCHES} < ran_or_not  # and the newest of that day


def test_a_page_with_another_table():
    matrix = load("matrix")
    first, last = matrix.MARKS
    page = f"a\n{first}old\nolder\n{last}\nb\n"
    assert matrix.page_with("new\n", page) == f"a\n{first}new\n{last}\nb\n"
