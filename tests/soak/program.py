"""The random programs of the optimizer tests, and what only a long run brings to light: forks, threads, collections."""

from __future__ import annotations

import gc
import os
import threading
import traceback

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import precondition, run_state_machine_as_test

from tests.optimizers.support import VARIANTS, ByHand, follow, parameter
from tests.optimizers.test_programs import Program, some_seed, then_step

PROGRAMS, RULES = 3, 30


class SoakProgram(Program):
    """A random program that also forks, collects garbage, and steps beside other optimizers."""

    steps_taken = 0

    def step(self) -> None:
        super().step()
        SoakProgram.steps_taken += 1

    @precondition(lambda self: not self.shares)
    @then_step()
    def step_in_a_forked_child(self) -> None:
        """The child's steps are right, and leave those of the parent alone."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                # The threads of torch's own operations do not survive a fork.
                torch.set_num_threads(1)
                self.step()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        self.step()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    @then_step(make=st.sampled_from(list(VARIANTS.values())), seed=some_seed)
    def step_beside_another_thread(self, make, seed) -> None:
        errors: list[BaseException] = []

        def train() -> None:
            try:
                params = [parameter(5000, seed=seed), parameter(300, dtype=torch.bfloat16, seed=seed)]
                optimizer = make(params, percentile_clipping=50)
                follow(optimizer, {p: ByHand.of(make, p, percentile_clipping=50) for p in params}, 3, seed=seed)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=train)
        thread.start()
        self.step()
        gc.collect()
        thread.join()
        if errors:
            raise errors[0]

    @then_step()
    def collect_garbage(self) -> None:
        gc.collect()


def run_programs() -> None:
    """Run some random programs to their ends, or fail with one that is as short as possible."""
    run_state_machine_as_test(
        SoakProgram,
        settings=settings(
            max_examples=PROGRAMS,
            stateful_step_count=RULES,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
    gc.collect()
