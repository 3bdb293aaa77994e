"""Parameters and gradients of every layout: the numbers are right and the storage stays where it is."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from tests.comparing import assert_same_bits, guarded, to_numpy
from tests.optimizers.support import (
    KINDS,
    ByHand,
    assert_unchanged,
    every_dtype,
    every_kind,
    follow,
    parameter,
    set_gradients,
    snapshot,
)

SMALL = {"lr": 1e-3, "weight_decay": 0.1, "min_8bit_size": 0}


def base(*shape, dtype=torch.float32):
    return parameter(*shape, dtype=dtype).detach()


LAYOUTS = {
    "transposed": lambda dtype: base(30, 40, dtype=dtype).t(),
    "permuted": lambda dtype: base(5, 6, 40, dtype=dtype).permute(2, 0, 1),
    "strided": lambda dtype: base(2400, dtype=dtype)[::2],
    "stride of 0 along one element": lambda dtype: torch.as_strided(base(1200, dtype=dtype), (1, 1200), (0, 1)),
    "columns": lambda dtype: base(30, 50, dtype=dtype)[:, 3:43],
    "rows": lambda dtype: base(50, 30, dtype=dtype)[3:43],
    "channels_last": lambda dtype: base(4, 10, 6, 5, dtype=dtype).to(memory_format=torch.channels_last),
    "odd_offset": lambda dtype: base(1300, dtype=dtype)[7:1207],
    "odd_offset_2d": lambda dtype: base(1300, dtype=dtype)[1:1201].view(30, 40),
    "one_element_of_many": lambda dtype: base(10, dtype=dtype)[3],
    "one_row": lambda dtype: base(1200, 3, dtype=dtype)[:, 1:2],
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@every_layout
@every_dtype
@every_kind
def test_layout(layout, dtype, make):
    view = layout(dtype)
    storage = torch.empty(0, dtype=dtype).set_(view.untyped_storage())
    outside = torch.ones_like(storage, dtype=torch.bool)
    torch.as_strided(outside, view.shape, view.stride(), view.storage_offset()).fill_(False)
    before = storage.clone()
    p = nn.Parameter(view)
    address, strides, version = p.data_ptr(), p.stride(), p._version
    assert address == view.data_ptr()
    copy = ByHand.of(make, p, **SMALL)
    follow(make([p], **SMALL), {p: copy}, 4)
    assert (p.data_ptr(), p.stride()) == (address, strides)
    assert p._version > version
    assert_same_bits(view, copy.param, what="the view")
    assert_same_bits(storage[outside], before[outside], what="elements around the parameter")


@every_kind
@pytest.mark.parametrize("percentile", [100, 20])
def test_gradients_of_other_layouts(make, percentile):
    """The gradient's strides need not be the parameter's."""
    gradients = {
        "transposed": lambda: torch.randn(40, 30).t(),
        "expanded": lambda: torch.randn(30, 1).expand(30, 40),
        "scalar expanded": lambda: torch.tensor(0.5).expand(30, 40),
        "strided": lambda: torch.randn(30, 80)[:, ::2],
        "odd offset": lambda: torch.randn(1201)[1:].view(30, 40),
        "flipped": lambda: torch.randn(30, 40).flip(0),
        "with a graph": lambda: torch.randn(30, 40, requires_grad=True) * 2,
        "negative bit": lambda: torch.randn(30, 40, dtype=torch.complex64).conj().imag,
        "contiguous with the negative bit": lambda: torch._neg_view(torch.randn(30, 40)),
    }
    torch.manual_seed(0)
    kwargs = {**SMALL, "percentile_clipping": percentile}
    for storage in (lambda: base(30, 40), lambda: base(40, 30).t()):
        p = nn.Parameter(storage())
        copy = ByHand.of(make, p, **kwargs)
        optimizer = make([p], **kwargs)
        for name, gradient in gradients.items():
            p.grad = gradient()
            before = p.grad.detach().clone().contiguous()
            optimizer.step()
            copy.step(before.resolve_neg(), 1e-3, weight_decay=0.1)
            copy.check(p, optimizer, name)
            assert_same_bits(p.grad.resolve_neg(), before.resolve_neg(), what="gradient")


@every_kind
def test_views_of_one_flat_buffer(make):
    """As flat-parameter wrappers hold them: neighbours, at addresses of every alignment, gradients flat too."""
    for dtype in (torch.float32, torch.bfloat16):
        flat, flat_grad = base(3000, dtype=dtype), torch.zeros(3000, dtype=dtype)
        sizes = (1, 2, 3, 300, 5, 700, 257, 1, 512, 1000)
        params = [nn.Parameter(part) for part in flat[: sum(sizes)].split(sizes)]
        for p, grad in zip(params, flat_grad[: sum(sizes)].split(sizes), strict=True):
            p.grad = grad
        copies = {p: ByHand.of(make, p, **SMALL) for p in params}
        optimizer = make(params, **SMALL)
        tail = flat[sum(sizes) :].clone()
        for step in range(4):
            flat_grad.copy_(torch.randn(3000, generator=torch.Generator().manual_seed(step)))
            optimizer.step()
            for p in params:
                copies[p].step(p.grad, 1e-3, weight_decay=0.1)
                copies[p].check(p, optimizer)
        assert_same_bits(torch.cat([p.detach() for p in params]), flat[: sum(sizes)])
        assert_same_bits(flat[sum(sizes) :], tail)


@every_kind
@every_dtype
def test_every_byte_alignment(make, dtype):
    """A tensor over a buffer, such as a mapped file, begins at any byte; the bytes around it are left alone."""
    kwargs = {**SMALL, "percentile_clipping": 50}
    for offset in range(64):
        values = base(300, dtype=dtype)
        memory = guarded(to_numpy(values).view(np.uint8), offset_bytes=offset)
        view = torch.frombuffer(memory.array, dtype=dtype)
        assert view.data_ptr() % 64 == offset
        p = nn.Parameter(view)
        copy = ByHand.of(make, p, **kwargs)
        gradient = guarded(to_numpy(base(300, dtype=dtype)).view(np.uint8), offset_bytes=63 - offset)
        p.grad = torch.frombuffer(gradient.array, dtype=dtype)
        optimizer = make([p], **kwargs)
        for _ in range(2):
            optimizer.step()
            copy.step(p.grad, 1e-3, weight_decay=0.1)
            copy.check(p, optimizer, f"offset {offset}")
        memory.check()
        gradient.check()


@every_kind
def test_0_dim_and_many_dims(make):
    params = [parameter(), parameter(1, 1, 1), parameter(2, 3, 4, 5, 6, seed=1)]
    follow(make(params, **SMALL), {p: ByHand.of(make, p, **SMALL) for p in params}, 4)


@every_kind
@pytest.mark.parametrize("shape", [(0,), (5, 0), (0, 5), (3, 0, 2)], ids=str)
def test_no_elements(make, shape):
    p = parameter(*shape)
    follow(make([p], **SMALL), {p: ByHand.of(make, p, **SMALL)}, 3)


@every_kind
def test_no_elements_beyond_the_end_of_memory(make):
    p = nn.Parameter(torch.ones(4).as_strided((0, 3), (3, 1), 100))
    p.grad = torch.ones(0, 3)
    optimizer = make([p], **SMALL)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


@every_kind
def test_parameters_in_the_same_memory_take_turns(make):
    """In one kernel call, several threads would write to it at once."""
    p, other, empty = parameter(300), parameter(400), nn.Parameter(torch.ones(0))
    params = [p, nn.Parameter(p.data), empty, other, nn.Parameter(torch.ones(0)), nn.Parameter(p.data)]
    optimizer = make(params, **SMALL)
    set_gradients(params, 0)
    optimizer.step()
    together = [list(part.members(range(len(params)))) for part in optimizer._plans[0]._parts]
    assert together == [[0, 2, 3, 4], [1], [5]]


@every_kind
def test_parameters_that_overlap_take_turns_in_their_order(make):
    buffer = parameter(900).detach()
    pieces = [buffer[:300], buffer[300:600], buffer[200:400], buffer[600:], buffer[100:250], buffer[250:350]]
    params = list(map(nn.Parameter, pieces))
    alone, copy = buffer.clone(), buffer.clone()
    optimizer = make(params, **SMALL)
    set_gradients(params, 0)
    gradients = [p.grad.clone() for p in params]
    optimizer.step()
    together = [list(part.members(range(len(params)))) for part in optimizer._plans[0]._parts]
    assert together == [[0, 1, 3], [2], [4, 5]]
    for piece, grad in zip(pieces, gradients, strict=True):
        p = nn.Parameter(copy[piece.storage_offset() :][: piece.numel()])
        p.grad = grad
        make([p], **SMALL).step()
    assert_same_bits(buffer, copy)
    assert not torch.equal(buffer, alone)


@every_kind
def test_many_threads_do_not_write_to_parameters_that_overlap(make):
    buffer = torch.zeros(3_000_000)
    params = [nn.Parameter(buffer[:2_000_000]), nn.Parameter(buffer[1_000_000:])]
    optimizer = make(params, lr=1.0)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(buffer, torch.tensor([-3.0, -6.0, -3.0]).repeat_interleave(1_000_000))


@every_kind
@pytest.mark.parametrize("size", [2, 300])
def test_parameter_whose_elements_share_memory(make, size):
    """An expanded tensor has no place for its elements' own values: refused, with nothing changed."""
    good, p = parameter(300), nn.Parameter(torch.ones(1).expand(size))
    optimizer = make([good, p], **SMALL)
    set_gradients([good, p], 0)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match="parameter 1"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_kind
def test_an_empty_parameter_beside_one_whose_gradient_is_copied(make):
    p, empty = parameter(30, 20), parameter(0, 3, seed=1)
    copies = {q: ByHand.of(make, q, **SMALL) for q in (p, empty)}

    def before(step):
        p.grad = p.grad.t().contiguous().t()

    follow(make([p, empty], **SMALL), copies, 2, before=before)


@every_kind
def test_gradient_objects_replaced_and_kept(make):
    p = parameter(3000)
    copy = ByHand.of(make, p, **SMALL)
    optimizer = make([p], **SMALL)
    p.grad = torch.zeros_like(p)
    for step in range(8):
        gradient = torch.randn(3000, generator=torch.Generator().manual_seed(step))
        if step % 2:
            p.grad = gradient
        else:
            p.grad.copy_(gradient)
        optimizer.step()
        copy.step(p.grad, 1e-3, weight_decay=0.1)
        copy.check(p, optimizer)


@every_kind
def test_data_replaced_between_steps(make):
    p, other = parameter(3000), parameter(100, seed=1)
    copies = {q: ByHand.of(make, q, **SMALL) for q in (p, other)}
    kept = []  # so that no address is used again

    def before(i):
        kept.append(p.data)
        if i == 1:
            p.data = p.data.clone()
        if i == 2:
            p.data = torch.cat([torch.zeros(1), p.data])[1:]
        if i == 3:
            p.data = torch.stack([p.data, p.data], 1)[:, 0]
        if i == 5:
            p.data = p.data.contiguous()

    follow(make([p, other], **SMALL), copies, 8, before=before)


@every_kind
def test_dtype_changed_between_steps(make):
    """As ``model.half()`` does it: the state stays what it is."""
    p = parameter(3000)
    copy = ByHand.of(make, p, **SMALL)
    optimizer = make([p], **SMALL)
    follow(optimizer, {p: copy}, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        p.grad = None
        p.data = p.data.to(dtype)
        copy.param = ByHand.of(make, p, **SMALL).param
        follow(optimizer, {p: copy}, 2)


@every_kind
def test_state_replaced_between_steps(make):
    params = [parameter(3000), parameter(100, seed=1)]
    kwargs = {**SMALL, "percentile_clipping": 40}
    copies = {p: ByHand.of(make, p, **kwargs) for p in params}
    optimizer = make(params, **kwargs)
    kept = []

    def poison(tensor):
        """Keep the old memory and make its use visible."""
        kept.append(tensor)
        new = tensor.clone()
        tensor.fill_(77)
        return new

    def before(i):
        for p in params:
            state = optimizer.state[p]
            if i == 1:
                for key in [key for key in state if key != "qmap1"]:
                    state[key] = poison(state[key])
            if i == 2:
                optimizer.state[p] = {key: value.clone() for key, value in state.items()}
            if i == 3:
                for key in [key for key in state if key != "qmap1"]:
                    old = state[key].data
                    state[key].data = old.clone()
                    kept.append(old.fill_(77))
            if i == 4:
                for key in [key for key in state if key != "qmap1"]:
                    state[key].share_memory_()
            if i == 5:
                optimizer.state = dict(optimizer.state)

    follow(optimizer, copies, 8, before=before)


@pytest.mark.parametrize("key", ["step", "state1", "absmax1", "max1", "new_max1", "gnorm_vec", "qmap1"])
def test_each_state_tensor_may_get_other_memory(key):
    """``tensor.data = ...``, ``set_`` and ``share_memory_`` move a tensor's memory while the object stays."""
    make = KINDS["tensorwise" if "max1" in key and key != "absmax1" else "blockwise"]
    p = parameter(3000)
    kwargs = {**SMALL, "percentile_clipping": 40}
    copy = ByHand.of(make, p, **kwargs)
    optimizer = make([p], **kwargs)
    kept = []

    def before(i):
        if i:
            tensor = optimizer.state[p][key]
            old = tensor.data
            tensor.set_(tensor.clone())
            kept.append(old)
            if key != "qmap1":
                old.fill_(77)

    follow(optimizer, {p: copy}, 4, before=before)


@every_kind
def test_state_edited_or_removed_between_steps(make):
    params = [parameter(3000), parameter(100, seed=1)]
    copies = {p: ByHand.of(make, p, **SMALL) for p in params}
    optimizer = make(params, **SMALL)
    follow(optimizer, copies, 3)
    p, q = params
    del optimizer.state[p]  # starts anew
    copies[p] = ByHand.of(make, p, **SMALL)
    follow(optimizer, copies, 3)
    optimizer.state[q]["state1"].fill_(127 if optimizer.state[q]["state1"].dtype == torch.uint8 else 0)
    if copies[q].kind == "32bit":
        copies[q].momentum[:] = 0
    else:
        copies[q].codes[:] = 127
    follow(optimizer, copies, 3)
    optimizer.state.clear()
    copies = {p: ByHand.of(make, p, **SMALL) for p in params}
    follow(optimizer, copies, 3)


@every_kind
def test_state_that_does_not_fit_is_refused(make):
    good, p = parameter(300), parameter(3000, seed=1)
    optimizer = make([good, p], **SMALL)
    follow(optimizer, {q: ByHand.of(make, q, **SMALL) for q in (good, p)}, 2)
    set_gradients([good, p], 5)
    fine = dict(optimizer.state[p])
    for key, bad in {
        "state1": fine["state1"][:-1].clone(),
        "step": torch.zeros(2),
        **({} if make is KINDS["32bit"] else {"qmap1": torch.zeros(16)}),
        **({"absmax1": torch.zeros(1)} if "absmax1" in fine else {}),
        **({"max1": torch.zeros(2)} if "max1" in fine else {}),
    }.items():
        optimizer.state[p] = {**fine, key: bad}
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=f"parameter 1 of group 0.*{key}"):
            optimizer.step()
        assert_unchanged(optimizer, before)
    for key in fine:
        optimizer.state[p] = {k: v for k, v in fine.items() if k != key}
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=f"parameter 1 of group 0.*{key}"):
            optimizer.step()
        assert_unchanged(optimizer, before)
    optimizer.state[p] = fine
    optimizer.step()


@every_kind
def test_changed_size_is_refused(make):
    p = parameter(3000)
    optimizer = make([p], **SMALL)
    follow(optimizer, {p: ByHand.of(make, p, **SMALL)}, 2)
    p.grad = None
    p.data = torch.zeros(4000)
    p.grad = torch.ones(4000)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="state1"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_kind
@pytest.mark.parametrize("strided", [False, True])
def test_changed_shape_is_refused(make, strided):
    """As many elements as before, but in another order than those of the state."""
    p = nn.Parameter(base(30, 80)[:, ::2] if strided else base(30, 40))
    optimizer = make([p], **SMALL)
    follow(optimizer, {p: ByHand.of(make, p, **SMALL)}, 2)
    p.grad = None
    p.data = base(40, 60)[:, ::2] if strided else p.data.view(40, 30)
    p.grad = torch.ones(40, 30)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="state1"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_kind
@pytest.mark.parametrize("strided", [False, True])
def test_gradient_left_over_from_another_dtype(make, strided):
    p = nn.Parameter(base(3000, 2, dtype=torch.float16)[:, 0] if strided else base(3000, dtype=torch.float16))
    optimizer = make([p], **SMALL)
    follow(optimizer, {p: ByHand.of(make, p, **SMALL)}, 2)
    p.data = base(3000, 2, dtype=torch.bfloat16)[:, 0] if strided else p.data.bfloat16()
    assert p.grad.dtype == torch.float16
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="torch.bfloat16 or torch.float32"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_kind
def test_sparse_gradient(make):
    embedding = nn.Embedding(50, 10, sparse=True)
    other = parameter(300)
    optimizer = make([other, embedding.weight], **SMALL)
    set_gradients([other], 0)
    for first in (True, False):
        embedding.weight.grad = None
        if not first:
            embedding.weight.grad = torch.zeros(50, 10)
            optimizer.step()
            embedding.weight.grad = None
        embedding(torch.tensor([1, 2])).sum().backward()
        before = snapshot(optimizer)
        with pytest.raises((TypeError, ValueError), match="(?i)sparse"):
            optimizer.step()
        assert_unchanged(optimizer, before)
        assert (embedding.weight in optimizer.state) is not first


@every_kind
def test_autograd_sees_the_change(make):
    for p in (parameter(300), nn.Parameter(base(300, 2)[:, 0])):
        loss = (p * p).sum()
        p.grad = torch.ones(300)
        make([p], **SMALL).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_kind
def test_state_needs_no_gradient_and_no_graph(make):
    p = parameter(300)
    optimizer = make([p], **SMALL)
    p.grad = torch.ones(300, requires_grad=True) * 2
    optimizer.step()
    assert p.is_leaf and p.requires_grad
    assert not any(value.requires_grad for value in optimizer.state[p].values())


def test_nothing_of_the_gradient_is_kept_alive():
    p = parameter(300)
    strided = nn.Parameter(base(300, 2)[:, 0])
    for make in KINDS.values():
        optimizer = make([p, strided], **SMALL)
        set_gradients([p, strided], 0)
        optimizer.step()
        refs = [weakref.ref(q.grad.untyped_storage()) for q in (p, strided)]
        grads = [weakref.ref(q.grad) for q in (p, strided)]
        optimizer.zero_grad()
        assert [ref() for ref in refs + grads] == [None] * 4
