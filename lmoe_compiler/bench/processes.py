"""Measurements in processes of their own: an illegal access or a hang loses one, not the rest.

A worker imports everything it needs (with the library that takes ten seconds), says that it is ready, then waits for a
line on its standard input. It answers with lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

WORKER = "lmoe_compiler.bench.worker"
READY = "ready\n"


@dataclass
class Task:
    """What a worker does (`what` and its arguments), and its environment beside ours."""

    work: dict[str, Any]
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """The rows that a worker printed, and why it printed no more ("" if it ended well)."""

    task: Task
    rows: list[dict[str, Any]]
    error: str


class Process:
    """A started worker."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", WORKER, json.dumps(task.work)]
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **task.variables},
        )

    def wait(self) -> None:
        """Until it is ready, or has failed."""
        assert self.child.stdout is not None
        while self.child.stdout.readline() not in (READY, ""):
            pass

    def run(self, limit: float) -> Answer:
        """Gives the worker its turn, for at most `limit` seconds."""
        error = ""
        try:
            output, _ = self.child.communicate("go\n", timeout=limit)
        except subprocess.TimeoutExpired:
            self.child.kill()
            output, _ = self.child.communicate()
            error = f"more than {limit:.0f} s"
        if not error and self.child.returncode:
            error = self._last_words()
        self.log.close()
        # Other lines are the library's; one without an end was being written when the worker was killed.
        lines = [line for line in output.splitlines(keepends=True) if line.startswith("{")]
        rows = [json.loads(line) for line in lines if line.endswith("}\n")]
        return Answer(self.task, rows, error)

    def end(self) -> None:
        """Ends a worker that gets no turn."""
        self.child.kill()
        self.child.communicate()
        self.log.close()

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines() or ["no message"]
        return f"exit {self.child.returncode}: {lines[-1][:200]}"


def in_advance(tasks: Iterable[Task], ahead: int = 1) -> Iterator[Process]:
    """Processes in order, of which the next `ahead` are already importing."""
    left = iter(tasks)
    ready: deque[Process] = deque()
    try:
        while True:
            while len(ready) <= ahead and (task := next(left, None)) is not None:
                ready.append(Process(task))
            if not ready:
                return
            yield ready.popleft()
    finally:
        for process in ready:
            process.end()


def one_by_one(tasks: Sequence[Task], limit: float, together: int = 16) -> Iterator[Answer]:
    """Answers in order. So many workers import together; then each has the machine for itself: what waits for the
    processor (small calls, compilation) would wait for the others' imports.
    """
    for first in range(0, len(tasks), together):
        processes = [Process(task) for task in tasks[first : first + together]]
        try:
            for process in processes:
                process.wait()
            while processes:
                yield processes.pop(0).run(limit)
        finally:
            for process in processes:
                process.end()


def side_by_side(tasks: Sequence[Task], limit: float, workers: int) -> Iterator[Answer]:
    """Answers in order, of workers that run `workers` at a time."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda task: Process(task).run(limit), tasks)
