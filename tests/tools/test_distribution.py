"""What tools/wheel.py and tools/matrix.py do around the builds and the tests that they run."""

import importlib.util
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
<testcase classname="tests.core.test_gradcheck" name="test_recomputed[1]"><skipped/></testcase>
<testcase classname="tests.composition.test_export" name="test_one_operator[a]"/>
<testcase classname="" name="tests.core.test_gradcheck"><error/></testcase>
</testsuite></testsuites>"""


def test_outcomes_are_counted_by_area(tmp_path):
    matrix = load("matrix")
    (tmp_path / "report.xml").write_text(REPORT)
    areas = matrix.outcomes(tmp_path / "report.xml")
    assert areas["export"] == {"passed": 1, "skipped": 0, "failed": []}
    derivatives = areas["derivatives"]
    assert (derivatives["passed"], derivatives["skipped"]) == (1, 1)
    assert derivatives["failed"][0] == "core/test_gradcheck.py::test_recomputed"
    assert matrix.cell(derivatives) == "1 pass, 2 fail, 1 skipped"


def test_what_is_missing_is_a_row(monkeypatch):
    """Here are no CPython 3.10 and 3.14, and no PyTorch 9 for CPython 3.11."""
    matrix = load("matrix")
    newest = {"3.13": "9.0+cu1", "3.11": "8.0"}

    def tested(wheel, python, torch):
        if torch == "2.13.0":
            raise matrix.Missing("no network")
        areas = {area: {"passed": 5, "skipped": 0, "failed": []} for area in matrix.AREAS}
        row = {"compiled": ["baseline", "amx"], "supported": ["baseline"], "areas": areas}
        return {"python": f"{python}.1", "torch": torch or newest[python], **row}

    monkeypatch.setattr(matrix, "can_be_had", lambda python: python not in ("3.10", "3.14"))
    monkeypatch.setattr(matrix, "tested", tested)
    rows = list(matrix.rows_of(Path("wheel")))
    assert [(row["python"], row["torch"], "missing" in row) for row in rows] == [
        ("3.14", "any", True),
        ("3.10", "any", True),
        ("3.13.1", "2.11.0", False),
        ("3.13", "2.13.0", True),
        ("3.13.1", "9.0+cu1", False),
        ("3.11.1", "2.11.0", False),
        ("3.11", "2.13.0", True),
        ("3.11.1", "8.0", False),
        ("3.11", "9.0", True),
    ]
    text = matrix.table({"rows": rows})
    assert "| 9.0 | 3.13.1 | 5 pass |" in text and "| 2.13.0 | 3.13 | not run: no network |" in text
    assert text.endswith("The processor has no amx, which did not run.\n")
