"""What the CUDA path does on the host, with stand-ins for the device."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lion
from lion._backends import CpuBackend
from tests.comparing import assert_same_bits
from tests.optimizers.support import KINDS, every_kind, move_to_bucket, parameter, set_gradients

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from lion._backends import cuda  # noqa: E402
from lion.cuda_kernels import device, launch, simulator  # noqa: E402
from lion.cuda_kernels.tuning import DEFAULT, Tuning  # noqa: E402

simulated = pytest.mark.skipif(not simulator.enabled(), reason=simulator.NEEDED)


def test_threads_that_take_their_first_step_at_once_share_one_lookup_table(monkeypatch):
    """Each writes the table's address into memory that a kernel reads later, when another might have been freed."""
    made = cuda.lookup_table()
    found = []
    for _ in range(20):
        monkeypatch.setattr(cuda, "_lookups", {})
        found.clear()
        barrier = threading.Barrier(4)

        def slow_table(barrier=barrier):
            # Four that get here would meet; one alone goes on.
            try:
                barrier.wait(0.02)
            except threading.BrokenBarrierError:
                pass
            return made

        monkeypatch.setattr(cuda, "lookup_table", slow_table)
        threads = [threading.Thread(target=lambda: found.append(cuda._lookup(torch.device("cpu")))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and len(set(map(id, found))) == 1


class Dispatcher:
    """A compiled kernel's stand-in; one that is kept on the disk fails as ``fault`` says."""

    def __init__(self, fault):
        self.fault = fault

    def compile(self, signature):
        if self.fault:
            raise self.fault
        return SimpleNamespace(max_cooperative_grid_blocks=lambda threads: 7)


@pytest.mark.skipif(simulator.enabled(), reason="the simulator compiles nothing")
@pytest.mark.parametrize("when", ["decorating", "compiling"])
@pytest.mark.parametrize("fault", [RuntimeError("cannot cache function: no locator"), OSError(28, "No space left")])
def test_kernels_are_compiled_where_no_folder_can_be_written(monkeypatch, when, fault):
    def jit(function=None, cache=False):
        if cache and when == "decorating":
            raise fault
        kept = Dispatcher(fault if cache else None)
        return kept if function else lambda function: kept

    monkeypatch.setattr(device.cuda, "jit", jit)
    monkeypatch.setattr(launch, "require", lambda: None)
    compiled = launch._compiled.__wrapped__
    dispatcher, resident = compiled("update_32bit", "float32", 0)
    assert dispatcher.fault is None and resident == 7


@pytest.mark.skipif(simulator.enabled(), reason="the simulator compiles nothing")
@pytest.mark.parametrize(("name", "expected"), [("update_8bit_blockwise", {"max_registers": 48}), ("update_32bit", {})])
def test_registers_are_limited_as_a_tuning_says(monkeypatch, name, expected):
    given = []

    def jit(cache=False, **options):
        given.append(options)
        return lambda function: Dispatcher(None)

    monkeypatch.setattr(device.cuda, "jit", jit)
    monkeypatch.setattr(launch, "require", lambda: None)
    tuning = Tuning(max_registers=(("update_8bit_blockwise", 48),))
    plain, tuned = (launch.kernel(name, "bfloat16", tuning=how).__qualname__ for how in (DEFAULT, tuning))
    assert plain != tuned  # so that the disk has both
    launch._compiled.__wrapped__(name, "bfloat16", 0, tuning=tuning)
    assert given == [expected]


def test_errors_of_the_compiler_and_the_driver_are_runtime_errors(monkeypatch):
    class CudaAPIError(Exception):
        """As those of numba-cuda and cuda-core."""

    def failing(*arguments, **kind):
        raise CudaAPIError("[700] an illegal address was encountered")

    monkeypatch.setattr(launch, "_compiled", failing)
    with pytest.raises(RuntimeError, match=r"update_32bit on device 0: CudaAPIError: \[700\]") as raised:
        launch.update_32bit("float32", 0, 1, 0, 0)
    assert isinstance(raised.value.__cause__, CudaAPIError)


@every_kind
def test_a_first_step_is_not_captured(make, monkeypatch):
    """What makes its state would run when the graph is replayed, after the state was used."""
    params = [parameter(5000), parameter(300)]
    optimizer = make(params, lr=0.5)
    set_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    with monkeypatch.context() as capture:
        capture.setattr(CpuBackend, "is_capturing", lambda self, device: True)
        with pytest.raises(RuntimeError, match="warm up with such steps first"):
            optimizer.step()
    assert not optimizer.state
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p, old)
    optimizer.step()
    with monkeypatch.context() as capture:
        capture.setattr(CpuBackend, "is_capturing", lambda self, device: True)
        optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


@simulated
@every_kind
def test_a_captured_step_keeps_what_the_graph_reads_and_no_tensors_in_the_simulator(make, monkeypatch):
    with lion.use_backend("cuda"):
        p = nn.Parameter(torch.ones(300))
        optimizer = make([p], min_8bit_size=0)
        p.grad = torch.ones(300)
        optimizer.step()
        monkeypatch.setattr(cuda, "_is_capturing", lambda device: True)
        optimizer.step()
        tensors = [p, p.grad, *optimizer.state[p].values()]
        refs = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
        del p, optimizer, tensors
        assert not [ref for ref in refs if ref() is not None]


@simulated
@pytest.mark.parametrize("percentile", [100, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_in_inference_mode_and_the_next_outside_in_the_simulator(kind, percentile):
    def trained(backend):
        p = parameter(600)
        optimizer = KINDS[kind]([p], lr=1e-2, min_8bit_size=0, percentile_clipping=percentile)
        with lion.use_backend(backend):
            for seed in range(3):
                set_gradients([p], seed)
                with torch.inference_mode(seed == 0):
                    optimizer.step()
        return p

    assert_same_bits(trained("cuda"), trained("cpu"))


BUCKETS = [
    *((torch.float32, alignment, {"percentile_clipping": 50}) for alignment in (8, 4)),
    *((torch.bfloat16, alignment, {"percentile_clipping": 50}) for alignment in (8, 4, 2)),
    *((torch.bfloat16, 8, {"master_weight_bits": bits}) for bits in (24, 32)),
    (torch.bfloat16, 4, {"stochastic_rounding": True, "rounding_seed": 1}),
]


@simulated
@pytest.mark.parametrize(("dtype", "alignment", "options"), BUCKETS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_a_bucket_are_read_by_loads_as_wide_as_all_allow_in_the_simulator(
    kind, dtype, alignment, options, monkeypatch
):
    told, launched = {}, launch._launch

    def noted(name, *arguments, **kind):
        told.setdefault(name, set()).add(kind.get("grad_alignment"))
        launched(name, *arguments, **kind)

    monkeypatch.setattr(launch, "_launch", noted)

    def trained(backend, bucket):
        params = [parameter(size, dtype=dtype) for size in (264, 70)]
        optimizer = KINDS[kind](params, lr=1e-2, min_8bit_size=0, **options)
        with lion.use_backend(backend):
            for seed in range(2):
                set_gradients(params, seed)
                if bucket:
                    move_to_bucket(params, alignment)
                optimizer.grad_scale = torch.tensor(1024.0)
                optimizer.step()
        return params, optimizer

    (params, optimizer), (expected, reference) = trained("cuda", True), trained("cpu", False)
    for p, q in zip(params, expected, strict=True):
        assert_same_bits(p, q)
        for name, value in reference.state[q].items():
            assert_same_bits(optimizer.state[p][name], value, what=name)
    readers = told.keys() & set(launch.READING_GRADIENTS)
    assert len(readers) == (kind == "tensorwise") + 1 + ("percentile_clipping" in options)
    assert all(told[name] == {alignment} for name in readers)
