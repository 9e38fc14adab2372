"""A pytest plugin: tests are items of a task. Each is on disk before and after it runs, and a lost GPU ends all."""

from __future__ import annotations

import time

import pytest

from bench.gpu.made import Absent
from bench.gpu.task import BROKEN, Task, lost, reason, spoiled

TASK = Task.current()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    running = in_turn(items)[TASK.shard :: TASK.shards] if TASK.shards > 1 else items
    left = set(TASK.plan([item.nodeid for item in running]))
    items[:] = [item for item in running if item.nodeid in left]


def in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """The first case of every test function, then the second of every one: what time does not reach is spread out."""
    seen: dict[str, int] = {}
    turns = []
    for item in items:
        function = item.nodeid.partition("[")[0]
        turns.append(seen.get(function, 0))
        seen[function] = turns[-1] + 1
    return [item for _, item in sorted(zip(turns, items, strict=True), key=lambda pair: pair[0])]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if TASK.late():
        item.session.shouldstop = "no time was left"
        return True  # nothing is left to do for this item
    TASK.row(item.nodeid, "begun", time=time.time())
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    error = call.excinfo.value if call.excinfo else None
    values = dict(getattr(item, "row", {}))
    if report.failed and isinstance(error, Absent):
        TASK.row(item.nodeid, "not run", why=str(error))
    elif report.failed:
        TASK.row(item.nodeid, "failed", why=f"{report.when}: {reason(error)}", **values)
    elif report.skipped:
        TASK.row(item.nodeid, "not run", why=str(getattr(error, "msg", error)), **values)
    elif report.when == "call":
        TASK.row(item.nodeid, "ok", seconds=round(call.duration, 3), **values)
    if spoiled() or (report.failed and error is not None and lost(error, TASK.device)):
        pytest.exit("another process goes on: this one's GPU context is lost, or a graph's capture failed", BROKEN)
    return report
