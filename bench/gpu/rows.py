"""Rows of results: one JSON object a line, on disk as soon as it is known.

part      which part of the suite it is of
item      what of that part: a test, or a job and an implementation of it
status    planned | begun, on the way; ok | failed | not run, at the end
why       of what failed or was not run
"""

from __future__ import annotations

import json
import os
from pathlib import Path

FINAL = ("ok", "failed", "not run")


def append(path: Path, **row) -> None:
    """One write of one line, so that processes may share the file."""
    line = json.dumps(row, default=str) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def read(path: Path) -> list[dict]:
    return Tail(path).all()


class Tail:
    """The rows of a file that others write to; of one shard of a part only, where one is named."""

    def __init__(self, path: Path, part: str | None = None, shard: int = 0) -> None:
        self.path, self.part, self.shard = path, part, shard
        self._at, self._rows = 0, []

    def all(self) -> list[dict]:
        """Every row so far; a line that a crash cut off is left out, and one that is not whole yet comes next time."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                file.seek(self._at)
                whole = file.read().rpartition(b"\n")[0]
            self._at += len(whole) + bool(whole)
            self._rows += [row for line in whole.splitlines() if (row := _parsed(line)) and self._mine(row)]
        return self._rows

    def _mine(self, row: dict) -> bool:
        return self.part is None or (row["part"], row.get("shard", 0)) == (self.part, self.shard)


def _parsed(line: bytes) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:  # a line cut off by a crash
        return None


def final(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["status"] in FINAL]


def unfinished(rows: list[dict]) -> tuple[str | None, list[str]]:
    """The item that was begun and has no final row, and the planned ones that were never begun."""
    done = {row["item"] for row in final(rows)}
    begun = [row["item"] for row in rows if row["status"] == "begun" and row["item"] not in done]
    planned = [name for row in rows if row["status"] == "planned" for name in row["items"]]
    return (begun[-1] if begun else None), [name for name in dict.fromkeys(planned) if name not in done | set(begun)]
