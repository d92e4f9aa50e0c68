"""The rule that CI skips nothing that it was built to run: a hook for pytest."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

MARKERS = ("browser", "vllm", "tensorrt", "embedded")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under COSY_REQUIRE_ALL=1, a skipped test of one of the markers fails; of `embedded`, if its model is there."""
    report = yield
    markers = [name for name in MARKERS if item.get_closest_marker(name)]
    if not (item.config.rootpath / "assets" / "embedded").is_dir():
        markers = [name for name in markers if name != "embedded"]
    if report.skipped and not hasattr(report, "wasxfail") and markers and os.environ.get("COSY_REQUIRE_ALL") == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"COSY_REQUIRE_ALL=1 requires every test marked {markers[0]}. {reason}"
    return report
