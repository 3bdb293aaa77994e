"""Names, order and defaults of bitsandbytes 0.44.1's arguments, as a program written for it passes them.

The classes have more arguments, all of them by keyword only.
"""

from __future__ import annotations

import inspect

import pytest

import lion
from lion import functional

CLASS = "params, lr=0.0001, betas=(0.9, 0.99), weight_decay=0, "
OPTIONS = "args=None, min_8bit_size=4096, percentile_clipping=100, block_wise=True"
CLASSES = {
    "Lion": f"{CLASS}optim_bits=32, {OPTIONS}, is_paged=False",
    "Lion8bit": f"{CLASS}{OPTIONS}, is_paged=False",
    "Lion32bit": f"{CLASS}{OPTIONS}, is_paged=False",
    "PagedLion": f"{CLASS}optim_bits=32, {OPTIONS}",
    "PagedLion8bit": f"{CLASS}{OPTIONS}",
    "PagedLion32bit": f"{CLASS}{OPTIONS}",
}
FUNCTIONS = {
    "create_dynamic_map": "signed=True, max_exponent_bits=7, total_bits=8",
    "quantize_blockwise": "A, code=None, absmax=None, out=None, blocksize=4096",  # and nested=False, not for optimizers
    "dequantize_blockwise": "A, quant_state=None, absmax=None, code=None, out=None, blocksize=4096",  # likewise
    "percentile_clipping": "grad, gnorm_vec, step, percentile=5",
}
METHODS = {
    "get_instance": "",
    "initialize": "self",
    "register_parameters": "self, params",
    "override_config": "self, parameters, key=None, value=None, key_value_dict=None",
    "register_module_override": "self, module, param_name, config",
}


def plain_signature(function):
    """Return what may be passed by position, as text without annotations."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


@pytest.mark.parametrize("name", CLASSES)
def test_class(name):
    assert plain_signature(getattr(lion, name)) == CLASSES[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    assert plain_signature(getattr(functional, name)) == FUNCTIONS[name]


@pytest.mark.parametrize("name", METHODS)
def test_manager(name):
    assert plain_signature(getattr(lion.GlobalOptimManager, name)) == METHODS[name]


def test_the_module_of_the_optimizers_is_called_optim():
    """Programs write ``bitsandbytes.optim.Lion8bit`` and ``bitsandbytes.optim.GlobalOptimManager``."""
    names = [*CLASSES, "GlobalOptimManager"]
    assert sorted(lion.optim.__all__) == sorted(names)
    assert all(getattr(lion.optim, name) is getattr(lion, name) for name in names)
