"""Where results are kept: one JSON file, written again after every job."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.training.contestants import Contestant
from benchmarks.training.worker import Job
from lion._cli import UsageError

# Of a machine: the losses depend on the threads, the times on both.
SAME = ("machine", "threads")


class Store:
    """The results of one task.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self.machines: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        """Reasons why a contestant could not take part with a batch size, by both."""
        self._failed: set[str] = set()
        self._results: dict[Job, dict[str, Any]] = {}
        self._machines: dict[Job, int] = {}
        if path.exists():
            stored = json.loads(path.read_text())
            self.settings, self.machines, self.skipped = stored["settings"], stored["machines"], stored["skipped"]
            for run in stored["runs"]:
                job = Job(**run["job"])
                self._results[job], self._machines[job] = run["result"], run["machine"]

    def begin(self, settings: dict[str, Any], machine: dict[str, Any], batch_size: int) -> None:
        """Go on with what is stored, on a machine.

        Args:
            settings: What has to be the same for all results.
            machine: What measures now; its name and its threads have to be the same, too.
            batch_size: The usual one, which has to be the smallest: with larger ones the steps are fewer.

        Raises:
            UsageError: If what is stored was made with other settings, or there can be no such folder.
        """
        if self._results:
            known = {**self.settings, "batch_size": min(job.batch_size for job in self._results)}
            for stored in self.machines:
                known.update({key: stored[key] for key in SAME if key in stored})
            for key, value in {**settings, "batch_size": batch_size, **{key: machine[key] for key in SAME}}.items():
                if known.get(key, value) != value:
                    told = f"{self.path} holds results with {key} {known[key]}, not {value}"
                    raise UsageError(f"{told}; choose another --out")
        self.settings = settings
        if machine not in self.machines:
            self.machines.append(machine)
        self._machine = self.machines.index(machine)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"Invalid --out: {self.path.parent}; {error.strerror}") from None

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return the result of a job, or None."""
        return self._results.get(job)

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Keep a result."""
        self.skipped.pop(_who(job), None)
        self._results[job], self._machines[job] = result, self._machine
        self._write()

    def skip(self, job: Job, reason: str) -> None:
        """Note that a job's contestant cannot take part here with its batch size."""
        self._failed.add(_who(job))
        self.skipped[_who(job)] = reason
        self._write()

    def has_failed(self, job: Job) -> bool:
        """Return whether a job of this contestant with this batch size has failed since the command began."""
        return _who(job) in self._failed

    def runs(self, kind: str) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Return the jobs of a kind with their results, as they were done."""
        yield from ((job, result) for job, result in self._results.items() if job.kind == kind)

    def rate(self, contestant: Contestant, batch_size: int) -> float | None:
        """Return the best rate of a contestant's search, or None if there was none.

        Args:
            contestant: Who.
            batch_size: Examples in a batch.
        """
        name = contestant.searched_as or contestant.name
        losses = {
            job.lr: math.inf if result["loss"] is None else result["loss"]
            for job, result in self.runs("search")
            if (job.contestant, job.batch_size) == (name, batch_size)
        }
        return min(losses, key=lambda lr: losses[lr], default=None)

    def _write(self) -> None:
        runs = [
            {"job": job._asdict(), "machine": self._machines[job], "result": result}
            for job, result in self._results.items()
        ]
        report = {"settings": self.settings, "machines": self.machines, "skipped": self.skipped}
        lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)
        head = json.dumps(report, indent=1)[:-2]
        new = self.path.with_suffix(".new")
        new.write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n')
        os.replace(new, self.path)


def _who(job: Job) -> str:
    return f"{job.contestant}, batch of {job.batch_size}"
