"""Runs an exercise's tests in a copy of the repository. `exercise.py` starts it in a separate process for each body."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SHOWN = 30  # lines of a failed test


class Outcomes:
    """A plugin of pytest: which tests passed, and what the first that failed said. Stops when the exercise's first
    test fails, the definition: then there are no points."""

    def __init__(self, tests: list[str]):
        self.found: dict[str, list[str]] = {test: [] for test in tests}
        self.first, self.said = "", ""

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = next(test for test in self.found if f"{report.nodeid}[".startswith((f"{test}[", f"{test}::")))
        if report.when == "call" or not report.passed:
            self.found[test].append(report.outcome)
        if not report.passed:  # a test that skips proves nothing
            self.note(test, report)
            if test == next(iter(self.found)):
                self.session.shouldstop = "without the definition there are no points"

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.note(report.nodeid, report)

    def note(self, test: str, report: Any) -> None:
        if not self.first:
            lines = [*report.longreprtext.splitlines()[-SHOWN:], *report.capstdout.splitlines()[-SHOWN:]]
            self.first, self.said = test, "\n".join(line[:300] for line in lines)


def run(tests: list[str]) -> dict[str, Any]:
    """Runs tests by pytest: those that passed, and the first that failed with what it said."""
    import pytest
    from hypothesis import Phase, settings

    # A failing body needs no smaller example: to look for one may take minutes.
    settings.register_profile("graded", deadline=None, derandomize=True, database=None, max_examples=25,
                              phases=[Phase.explicit, Phase.generate])  # fmt: skip
    outcomes = Outcomes(tests)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins that are installed take no part
    # The plugin `unraisableexception` looks for garbage at the end, which takes longer than many an exercise's tests.
    options = ["-o", "addopts=", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:unraisableexception",
               "-p", "_hypothesis_pytestplugin", "--hypothesis-profile", "graded"]  # fmt: skip
    pytest.main([*options, *tests], plugins=[outcomes])
    passed = [test for test, cases in outcomes.found.items() if {*cases} == {"passed"}]  # every case, and none skipped
    return {"passed": passed, "first": outcomes.first, "said": outcomes.said}


def main() -> None:
    """Reads the task on stdin and writes the outcome to the file that it names. No `atexit` handler runs afterwards."""
    task, here = json.load(sys.stdin), Path.cwd()
    # Remove the clone that this copy was made from: an editable install puts it on the path.
    clones = [folder for folder in sys.path if (Path(folder) / "prefixkv.py").exists()]
    sys.path[:] = [folder for folder in sys.path if folder not in clones or Path(folder).resolve() == here.resolve()]
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
    Path(task["result"]).write_text(json.dumps(run(task["tests"])), encoding="utf-8")
    os._exit(0)
