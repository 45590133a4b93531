"""Runs the generic tests and compares ours with the control: `make torch-suite`.

Usage: python tests/torch_suite [PATTERN]: all tests, or those whose name contains PATTERN. The exit
status is 1 if a test fails whose control passes, or if none ran.
"""

from __future__ import annotations

import sys
import unittest
import warnings
from collections import Counter, defaultdict

warnings.simplefilter("ignore")

import generic  # noqa: E402
from entries import CONTROL, MODULES, OPS  # noqa: E402

#: The names of the entries as they occur in the names of tests, the longest first.
NAMES = sorted(
    {op.name for op in OPS} | {info.formatted_name for info in MODULES}, key=len, reverse=True
)


class Result(unittest.TextTestResult):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.outcome: dict[str, str] = {}

    def startTest(self, test):
        super().startTest(test)
        self.outcome[_name(test)] = "passed"

    def addError(self, test, error):
        super().addError(test, error)
        self.outcome[_name(test)] = f"{error[0].__name__}: {_first_line(error[1])}"

    addFailure = addError

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.outcome[_name(test)] = "skipped"


def _name(test):
    return test.id().split(".", 1)[-1]


def _first_line(error):
    return next((line for line in str(error).splitlines() if line.strip()), "")[:100]


def _kind_of(name):
    """A test's name with ENTRY in place of the entry's, and the entry."""
    for entry in NAMES:
        at = name.find(f"_{entry}_")
        if at >= 0:
            return name[:at] + "_ENTRY_" + name[at + len(entry) + 2 :], entry
    return name, ""


def main(pattern=""):
    loader = unittest.defaultTestLoader
    suite = unittest.TestSuite(
        test
        for case in loader.loadTestsFromModule(generic)
        for test in case
        if pattern in test.id()
    )
    result = unittest.TextTestRunner(resultclass=Result, verbosity=1).run(suite)
    outcomes = defaultdict(dict)
    for name, outcome in result.outcome.items():
        kind, entry = _kind_of(name)
        outcomes[kind][entry] = outcome
    counts = {"ours": Counter(), "control": Counter()}
    worse = 0
    for kind, by_entry in sorted(outcomes.items()):
        control = next((by_entry[entry] for entry in by_entry if _is_control(entry)), "no control")
        for entry, outcome in sorted(by_entry.items()):
            has_failed = outcome not in ("passed", "skipped")
            side = "control" if _is_control(entry) else "ours"
            counts[side]["failed" if has_failed else outcome] += 1
            if has_failed and side == "ours" and control in ("passed", "skipped", "no control"):
                worse += 1
                print(f"{kind}\n  {entry}: {outcome}\n  control: {control}")
    for side, count in counts.items():
        print(f"{side}: {', '.join(f'{n} {outcome}' for outcome, n in sorted(count.items()))}")
    print(f"{worse} failures that the control does not have")
    return int(worse > 0 or not counts["ours"]["passed"])


def _is_control(entry):
    return entry.lower().startswith(CONTROL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
