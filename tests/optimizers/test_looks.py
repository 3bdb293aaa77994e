"""What a step sees of tensors, by torch's C function and by asking Python: the same, and all that it has to see."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from lion._memory import looks
from lion.cpu_kernels import dlpack

in_one_pass = pytest.mark.skipif(not looks._DESCRIBE, reason="needs a torch with DLPack's functions in C")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.float64)


@pytest.fixture(params=[pytest.param(True, marks=in_one_pass, id="in one pass"), pytest.param(False, id="one by one")])
def way(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(looks, "_DESCRIBE", None)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=6))
    room = torch.zeros(4000, dtype=draw(st.sampled_from(DTYPES)))
    strides = [draw(st.integers(0, 9)) for _ in shape]
    return torch.as_strided(room, shape, strides, draw(st.integers(0, 5)))


@in_one_pass
@given(st.lists(tensors(), max_size=5))
def test_forms_are_as_different_as_dtypes_shapes_and_strides(some):
    seen = [looks.look([tensor]) for tensor in some]
    expected = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in some]
    assert [a.forms == b.forms for a in seen for b in seen] == [a == b for a in expected for b in expected]
    assert [seen.addresses.tolist() for seen in seen] == [[tensor.data_ptr()] for tensor in some]
    whole = looks.look(some)
    assert whole.addresses.tolist() == [tensor.data_ptr() for tensor in some]
    assert whole.forms == b"".join(seen.forms for seen in seen)  # type: ignore[arg-type]
    assert not whole.missing


@pytest.mark.usefixtures("way")
@given(st.lists(tensors(), min_size=1, max_size=5), st.integers(0, 5))
def test_forms_of_the_first_and_the_last_tensors_are_parts_of_those_of_all(some, count):
    first, last = some[:count], some[count:]
    forms = looks.look(some).forms
    length = len(looks.look(first).forms)
    assert forms[:length] == looks.look(first).forms
    assert forms[length:] == looks.look(last).forms


def moved(p):
    p.data = p.data.clone()


def widened(p):
    p.data = p.data.double()


def read_as_integers(p):
    p.data = p.data.view(torch.int32)


def reshaped(p):
    p.data = p.data.view(3, 4)


def transposed(p):
    p.data = p.data.view(4, 3).t().contiguous().t()


def shortened(p):
    p.data = p.data[:3]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("change", [moved, widened, reshaped, transposed, shortened])
def test_a_look_tells_what_became_of_a_tensor(change):
    others, p = [torch.zeros(5), torch.zeros(0, 3)], torch.zeros(4, 3)
    kept = p.data
    before = looks.look([*others, p])
    again = looks.look([*others, p])
    assert (before.addresses.tolist(), before.forms) == (again.addresses.tolist(), again.forms)
    change(p)
    after = looks.look([*others, p])
    assert (before.addresses.tolist(), before.forms) != (after.addresses.tolist(), after.forms)
    assert kept.numel() == 12


@pytest.mark.usefixtures("way")
def test_memory_is_missing_where_there_are_elements_and_no_memory():
    freed = torch.zeros(4)
    assert not looks.look([torch.zeros(3), torch.zeros(0), torch.zeros(2, 0, 3), freed]).missing
    freed.untyped_storage().resize_(0)
    assert looks.look([torch.zeros(3), freed, torch.zeros(3)]).missing
    assert looks.look([torch.zeros(3), freed, torch.zeros(3)]).addresses[1] == 0


@in_one_pass
def test_what_the_function_cannot_describe_is_asked_in_python():
    meta, some = torch.zeros(2, device="meta"), torch.zeros(2)
    assert dlpack.describe(looks._DESCRIBE, np.array([id(some), id(meta)])) is None
    seen = looks.look([some, meta])
    assert seen.addresses.tolist() == [some.data_ptr(), 0]
    assert seen.missing
    with pytest.raises(RuntimeError, match="sparse"):
        looks.look([some, torch.zeros(2, 2).to_sparse()])


NAME, OTHER_NAME = b"dlpack_exchange_api", b"dltensor"


@pytest.mark.parametrize(
    ("name", "major", "function", "expected"),
    [
        (NAME, 1, 77, 77),
        (NAME, 1 | 3 << 32, 77, 77),
        (NAME, 1, -77, -77),
        (NAME, 2, 77, None),
        (NAME, 0, 77, None),
        (NAME, 1, 0, None),
        (OTHER_NAME, 1, 77, None),
    ],
)
def test_a_library_with_another_dlpack_is_asked_in_python(name, major, function, expected):
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    api = np.array([major, 0, 1, 2, 3, function, 4])
    capsule = new(("PyCapsule_New", ctypes.pythonapi))(api.ctypes.data, name, None)
    assert dlpack.function_of(capsule) == expected


def test_a_library_with_something_else_in_the_place_of_its_functions_is_asked_in_python():
    assert [dlpack.function_of(other) for other in (123, "capsule", object)] == [None] * 3


@in_one_pass
def test_what_others_set_for_functions_of_python_stays_as_they_set_it(monkeypatch):
    shared = ctypes.pythonapi.PyCapsule_GetPointer
    monkeypatch.setattr(shared, "restype", ctypes.POINTER(ctypes.c_int))
    monkeypatch.setattr(shared, "argtypes", [ctypes.py_object])
    assert dlpack.function_of(Tensor.__dlpack_c_exchange_api__) == looks._DESCRIBE
    assert (shared.restype, shared.argtypes) == (ctypes.POINTER(ctypes.c_int), [ctypes.py_object])


def test_where_numba_compiles_nothing_tensors_are_asked_in_python():
    """For the backends that need no compiler, as while somebody looks for a fault with a debugger."""
    program = "import lion, torch; p = torch.nn.Parameter(torch.zeros(9)); p.grad = p + 1; lion.Lion([p]).step()"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "LION_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_field_of_a_description_counts():
    """Of the library there is only a function here, which answers what the object's address points to."""
    sizes = np.array([2, 3, 30, 1])
    answers = {
        "plain": [4000, 1, 2 | 7 << 32, sizes.ctypes.data, sizes.ctypes.data + 16, 0],
        "with an offset": [4000, 1, 2 | 7 << 32, sizes.ctypes.data, sizes.ctypes.data + 16, 8],
        "another device": [4000, 2, 2 | 7 << 32, sizes.ctypes.data, sizes.ctypes.data + 16, 0],
        "the second device": [4000, 1 | 1 << 32, 2 | 7 << 32, sizes.ctypes.data, sizes.ctypes.data + 16, 0],
        "another dtype": [4000, 1, 2 | 8 << 32, sizes.ctypes.data, sizes.ctypes.data + 16, 0],
        "fewer dimensions": [4000, 1, 1 | 7 << 32, sizes.ctypes.data, sizes.ctypes.data + 16, 0],
        "no dimensions": [4000, 1, 7 << 32, 0, 0, 0],
        "another shape": [4000, 1, 2 | 7 << 32, sizes.ctypes.data + 8, sizes.ctypes.data + 16, 0],
        "other strides": [4000, 1, 2 | 7 << 32, sizes.ctypes.data, sizes.ctypes.data + 8, 0],
    }
    words = {name: np.array(answer) for name, answer in answers.items()}

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    def answer(thing, tensor):
        ctypes.memmove(tensor, thing, 48)
        return 0

    function = ctypes.cast(answer, ctypes.c_void_p).value
    seen = {name: dlpack.describe(function, np.array([word.ctypes.data])) for name, word in words.items()}
    assert {name: addresses.tolist() for name, (addresses, _, _) in seen.items()} == {
        name: [4008 if name == "with an offset" else 4000] for name in words
    }
    forms = {name: forms for name, (_, forms, _) in seen.items() if name != "with an offset"}
    assert len(set(forms.values())) == len(forms)
    assert seen["with an offset"][1] == forms["plain"]
    assert np.frombuffer(forms["plain"], np.int64).tolist() == [1, 2 | 7 << 32, 2, 3, 30, 1]


def test_identities_are_told_apart():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    assert looks.identities([a, b]) == looks.identities({a: 1, b: 2})
    assert looks.identities([a, b]) != looks.identities([b, a])
    assert looks.identities([a, b])[8:] == looks.identities([b])
    assert looks.identities([]) == b""
