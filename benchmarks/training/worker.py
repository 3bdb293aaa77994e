"""One job in a process of its own, so that nothing before it counts: ``python -m benchmarks.training.worker JOB``.

The job is a JSON object; the last line printed is its result, another one.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.training.contestants import BY_NAME, DECAY, Contestant
from benchmarks.training.tasks import Task, found_task
from lion import StepInBackward
from lion._cli import measure
from lion._cli.language_model import learning_rate_factor

EVALUATIONS = 8
UNTIMED_STEPS = 3
KINDS = ("search", "training", "memory", "time")
WARM_UP_ELEMENTS = 1 << 13


class Job(NamedTuple):
    """What to do.

    Attributes:
        kind: "search" or "training": train and evaluate; "time" or "memory": measure some steps.
        task: Name of the task.
        contestant: Name of the contestant.
        lr: Learning rate.
        seed: Of weights and batches; of measurements the number of the repetition.
        batch_size: Examples in a batch.
        steps: Steps to take.
    """

    kind: str
    task: str
    contestant: str
    lr: float
    seed: int
    batch_size: int
    steps: int


class Training:
    """A model in training.

    Args:
        task: What is trained.
        contestant: By which optimizer.
        job: How.
        device: Where.
    """

    def __init__(self, task: Task, contestant: Contestant, job: Job, device: torch.device) -> None:
        self.task, self.dtype, self.device = task, contestant.dtype, device
        torch.manual_seed(job.seed)
        self.model = task.make_model().to(device, contestant.dtype).train()  # a pretrained one may come for evaluation
        self.optimizer: Optimizer = contestant.make(self.model.parameters(), job.lr, DECAY / job.lr)
        self.in_backward = StepInBackward(self.optimizer) if contestant.in_backward else None
        self.schedule = LambdaLR(self.optimizer, lambda step: learning_rate_factor(step, job.steps))
        self.gradients = 0
        """Bytes of gradients after a backward pass."""

    def step(self, batch: Any) -> tuple[float, float]:
        """Train on a batch; return the seconds of all of it and those of the optimizer."""
        begin = self.now()
        self.loss(batch).backward()
        self.gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        middle = self.now()
        if self.in_backward is None:
            self.optimizer.step()
        end = self.now()
        self.schedule.step()
        self.optimizer.zero_grad()
        return self.now() - begin, end - middle

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        return self.computed(self.task.loss, batch)

    def computed(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """Return a function of the model and a batch, computed in bfloat16."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.float32):
            return function(self.model, moved(batch, self.device))

    @torch.no_grad()
    def held_out(self, function: Callable[[nn.Module, Any], Tensor]) -> float:
        """Return the mean of a function over the held-out batches."""
        self.model.eval()
        mean = statistics.fmean(self.computed(function, batch).item() for batch in self.task.held_out)
        self.model.train()
        return mean

    def now(self) -> float:
        """Return the time, after what the device has to do still."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch, a tensor or tensors by name, on a device."""
    if isinstance(batch, dict):
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return batch.to(device)


def train(training: Training, job: Job, show: Callable[[str], None]) -> dict[str, Any]:
    """Return the course of the held-out loss, and the metric; where training diverges it ends, with None for them."""
    # Of a search only the end is asked for.
    evaluations = EVALUATIONS if job.kind == "training" else 1
    curve = [(0, training.held_out(training.task.loss))] if job.kind == "training" else []
    step = 0
    for step, batch in enumerate(training.task.batches(job.seed, job.steps, job.batch_size), start=1):
        training.step(batch)
        if step * evaluations // job.steps > (step - 1) * evaluations // job.steps:
            curve.append((step, training.held_out(training.task.loss)))
            show(f"{step} of {job.steps} steps, held-out loss {curve[-1][1]:.4f}")
            if not math.isfinite(curve[-1][1]):
                break
    else:
        if step != job.steps:
            raise ValueError(f"the task gave {step} batches where {job.steps} were asked for")
    loss, metric = curve[-1][1], training.task.metric
    if not math.isfinite(loss):
        return {"curve": curve[:-1], "loss": None, "metric": None}
    return {"curve": curve, "loss": loss, "metric": metric and training.held_out(metric)}


def times(training: Training, job: Job) -> dict[str, Any]:
    """Return the median seconds of a step and of the optimizer's part of it."""
    batches = list(training.task.batches(job.seed, job.steps + UNTIMED_STEPS, job.batch_size))
    seconds = [training.step(batch) for batch in batches][UNTIMED_STEPS:]
    whole, optimizer = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "step_seconds": whole,
        "optimizer_seconds": None if training.in_backward else optimizer,
        "tokens_per_second": job.batch_size * training.task.tokens / whole,
    }


def memory(task: Task, contestant: Contestant, job: Job, device: torch.device) -> dict[str, Any]:
    """Return the peak of memory from before the model was made, and the bytes of what it is known to hold."""
    warm_up = nn.Parameter(torch.ones(WARM_UP_ELEMENTS, dtype=contestant.dtype, device=device))
    optimizer = contestant.make([warm_up], job.lr, 0)
    warm_up.grad = torch.ones_like(warm_up)
    optimizer.step()  # what code takes is no part of it
    del warm_up, optimizer
    batches = list(task.batches(job.seed, job.steps, job.batch_size))
    trainings: list[Training] = []

    def run() -> None:
        trainings.append(Training(task, contestant, job, device))
        for batch in batches:
            trainings[0].step(batch)

    peak = measure.peak_extra_bytes(run, device)
    training = trainings[0]
    params = list(training.model.parameters())
    return {
        "parameters": sum(p.numel() for p in params),
        "peak": peak,
        "weights": sum(p.nbytes for p in params),
        "gradients": training.gradients,
        "state": measure.state_bytes(training.optimizer.state),
    }


def work(job: Job, data: Path | None, device: torch.device, show: Callable[[str], None]) -> dict[str, Any]:
    """Return the result of a job."""
    task, contestant = found_task(job.task, data), BY_NAME[job.contestant]
    if job.kind == "memory":
        return memory(task, contestant, job, device)
    training = Training(task, contestant, job, device)
    return times(training, job) if job.kind == "time" else train(training, job, show)


def main() -> None:
    """Read the job, do it and print the result."""
    told = json.loads(sys.argv[1])
    torch.set_num_threads(told["threads"])
    data = Path(told["data"]) if told["data"] else None

    def show(text: str) -> None:
        print(text, flush=True)

    print(json.dumps(work(Job(**told["job"]), data, torch.device(told["device"]), show)))


if __name__ == "__main__":
    main()
