"""Which modules are mutated, in which ways, and which tests have to notice."""

from __future__ import annotations

from typing import NamedTuple

from lion.cpu_kernels import avx2, portable

_BINARY = (
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul"),
    *("LShift_RShift", "RShift_LShift", "BitAnd_BitOr", "BitOr_BitAnd", "BitXor_BitOr"),
)
# Each comparison with its boundary moved, and turned round.
_COMPARISONS = (
    *("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt"),
    *("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is"),
)
# Names of cosmic-ray's operators; a number becomes one more and one less.
OPERATORS = (
    *(f"ReplaceBinaryOperator_{name}" for name in _BINARY),
    *(f"ReplaceComparisonOperator_{name}" for name in _COMPARISONS),
    *("ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Invert", "ReplaceUnaryOperator_Delete_Not"),
    *("NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
)


class Run(NamedTuple):
    """A run of pytest that should fail.

    Attributes:
        arguments: What pytest is called with.
        within: Names of the functions whose mutants it is for; none for all.
        as_python: Whether the CPU kernels run as Python, which is quicker than compiling them for each mutant.
        lookups: Name of the lookups of 8-bit states; "" for the fastest that the processor has.
    """

    arguments: tuple[str, ...]
    within: tuple[str, ...] = ()
    as_python: bool = False
    lookups: str = ""


def _kernels(names: str, *within: str, as_python: bool = False, lookups: str = "") -> Run:
    return Run(("tests/differential/test_cpu_kernels.py", "-k", names), within, as_python, lookups)


# Without the tests that take longest and notice nothing that the others do not.
def _tests(*files: str) -> Run:
    return Run((*(f"tests/{file}" for file in files), "-k", "not keyboard_interrupt and not new_process"))


_WEIGHTS = _tests(
    *("weights16/test_options.py", "weights16/test_checkpoints.py", "weights16/test_training.py"),
    "weights16/test_exchange.py",
)
_BATCH = (
    _tests("optimizers/test_tensors.py", "fuzzing/test_memory.py", "distributed/test_one_process.py"),
    _tests("optimizers/test_contract.py", "optimizers/test_programs.py", "failures", "optimizers/test_numbers.py"),
    _WEIGHTS,
    _tests("weights16/test_sharded.py"),
)
_COMPUTING = (
    _tests("optimizers/test_numbers.py"),
    _tests(
        *("optimizers/test_functional.py", "optimizers/test_loss_scale.py", "optimizers/test_construction.py"),
        *("differential/test_errors.py", "distributed/test_one_process.py", "optimizers/test_contract.py"),
    ),
    _WEIGHTS,
)
_PLAN = (
    _tests("optimizers/test_tensors.py", "optimizers/test_overrides.py", "optimizers/test_construction.py"),
    _tests("optimizers/test_contract.py", "distributed/test_one_process.py", "optimizers/test_programs.py"),
    _tests("fuzzing", "failures", "paging/test_paged.py", "optimizers/test_state.py"),
    _tests("distributed/test_fsdp1.py", "distributed/test_fsdp2.py", "distributed/test_agreement.py"),
    _WEIGHTS,
)
_STATE = (
    _tests("checkpoints/test_mutations.py", "checkpoints/test_options.py", "fuzzing/test_checkpoints.py"),
    _tests("optimizers/test_overrides.py", "fuzzing/test_memory.py", "distributed/test_one_process.py"),
    _tests("optimizers/test_state.py", "interop", "paging/test_fork.py"),
    _WEIGHTS,
)

# A mutant that passes all its runs lives on; the runs that are quick and notice most come first.
MODULES: dict[str, tuple[Run, ...]] = {
    "reference/clipping.py": (_tests("reference/test_clipping.py"),),
    "reference/lion.py": (_tests("reference/test_lion.py"),),
    "reference/quantization.py": (_tests("reference/test_quantization.py"),),
    "reference/rounding.py": (_tests("reference/test_rounding.py"),),
    "cpu_kernels/clipping.py": (
        _kernels("percentile_clipping", "_clip_kernel", "percentile_clipping", as_python=True),
        _kernels("norm or percentile or invalid", as_python=True),
        _kernels("norm or percentile or invalid"),
    ),
    "cpu_kernels/lion.py": (
        _kernels("update_32bit", "_update_32bit_kernel", "new_param", "count_step", as_python=True),
        _kernels("test_update_8bit_blockwise", "_update_8bit_kernel", as_python=True),
        _kernels(
            "test_update_8bit_tensorwise",
            *("_move_tensorwise_kernel", "_requantize_tensorwise_kernel", "_ends_of_tensorwise_kernels"),
            as_python=True,
        ),
        _kernels("update or at_thresholds or counter"),
    ),
    "cpu_kernels/quantization.py": (
        _kernels("quantize", "_quantize_kernel", "_dequantize_kernel", "threshold_code", as_python=True),
        _kernels("test_update_8bit_blockwise", "quantize_block", "dequantize_block", "stored_absmax", as_python=True),
        _kernels("8bit or quantize or at_thresholds or every_code or invalid"),
        _kernels("8bit or at_thresholds or quantize", lookups=avx2.NAME),
    ),
    "cpu_kernels/portable.py": (
        _kernels("test_update_8bit_blockwise", as_python=True, lookups=portable.NAME),
        _kernels("8bit or at_thresholds or quantize", lookups=portable.NAME),
    ),
    "cpu_kernels/rounding.py": (
        _kernels("at_random or all_chunks or invalid", as_python=True),
        Run(("tests/differential/test_every_weight.py",)),
        Run(("tests/differential/test_conversions.py", "-k", "bfloat16 or pairs")),
        _kernels("update_32bit or at_random or all_chunks or every_bfloat16 or invalid"),
    ),
    "cpu_kernels/pool.py": (
        _kernels("squared_norm or invalid", as_python=True),
        _kernels("update_32bit or norm or invalid"),
        _tests("differential/test_cpu_threads.py"),
    ),
    "cpu_kernels/device.py": (
        _kernels("update_32bit"),
        _kernels("not other_code"),
        _tests("differential/test_cpu_cache.py", "differential/test_cpu_threads.py"),
    ),
    "cpu_kernels/avx2.py": (
        _tests("differential/test_cpu_lookups.py"),
        _kernels("8bit or at_thresholds or every_code", lookups=avx2.NAME),
        _kernels("other_code"),
    ),
    "cpu_kernels/avx512.py": (_kernels("at_thresholds"), _kernels("8bit or fast_code or every_code")),
    "cpu_kernels/vectors.py": (_tests("differential/test_cpu_lookups.py"), _kernels("at_thresholds")),
    "cpu_kernels/dlpack.py": (_tests("optimizers/test_looks.py"),),
    "lion/_backends/batch.py": _BATCH,
    "lion/_backends/cpu.py": _COMPUTING,
    "lion/_backends/loss_scale.py": (
        _tests("optimizers/test_loss_scale.py"),
        _tests("situations/test_scaled_losses.py"),
    ),
    "lion/_backends/reference.py": _COMPUTING,
    "lion/_backends/selection.py": _COMPUTING,
    "lion/_memory/looks.py": (_tests("optimizers/test_looks.py"),),
    "lion/_memory/objects.py": (_tests("situations/test_swapped_parameters.py"),),
    "lion/_memory/paging.py": (_tests("paging/test_paged.py", "paging/test_fork.py", "paging/test_errors.py"),),
    "lion/_memory/sharding.py": (
        _tests("distributed/test_one_process.py"),
        _tests("distributed/test_fsdp2.py"),
        _tests("distributed/test_dcp.py", "distributed/test_agreement.py"),
        _tests("weights16/test_sharded.py"),
    ),
    "lion/_options.py": (
        _tests("optimizers/test_construction.py", "fuzzing/test_arguments.py"),
        _tests("optimizers/test_contract.py", "paging/test_paged.py", "optimizers/test_overrides.py"),
        _tests("situations/test_other_algorithms.py", "situations/test_schedules.py"),
        _tests("weights16/test_options.py"),
    ),
    "lion/_parameters.py": _PLAN,
    "lion/_plan.py": _PLAN,
    "lion/_state/adapting.py": _STATE,
    "lion/_state/checkpoints.py": (
        _tests("checkpoints/test_mutations.py", "checkpoints/test_options.py", "fuzzing/test_checkpoints.py"),
        _tests("optimizers/test_contract.py", "optimizers/test_state.py", "interop", "checkpoints/test_foreign.py"),
        _tests("situations/test_schedules.py"),
    ),
    "lion/_state/checks.py": _STATE,
    "lion/_state/layout.py": _STATE,
    "lion/_state/loading.py": _STATE,
    "lion/_state/master.py": (_WEIGHTS, _tests("weights16/test_sharded.py")),
    "lion/exchange.py": (
        _tests("interop", "fuzzing/test_checkpoints.py", "distributed/test_one_process.py"),
        _tests("weights16/test_exchange.py", "weights16/test_checkpoints.py"),
        _tests("weights16/test_sharded.py"),
    ),
    "lion/functional.py": (
        _tests("optimizers/test_functional.py", "interop", "differential/test_errors.py", "fuzzing/test_memory.py"),
    ),
    "lion/in_backward.py": (
        _tests("optimizers/test_in_backward.py"),
        _tests("distributed/test_in_backward.py", "situations/test_swapped_parameters.py"),
    ),
    "lion/optimizers.py": (
        _tests("interop/test_signatures.py", "optimizers/test_construction.py", "optimizers/test_loss_scale.py"),
        _tests("optimizers/test_contract.py", "optimizers/test_torch_suite.py", "distributed/test_one_process.py"),
        _tests("failures", "optimizers/test_overrides.py", "optimizers/test_state.py", "paging/test_fork.py"),
        _tests("distributed/test_fsdp1.py", "distributed/test_agreement.py"),
    ),
    "lion/overrides.py": (
        _tests("optimizers/test_overrides.py"),
        _tests("fuzzing/test_arguments.py"),
        _tests("situations/test_computed_attributes.py", "situations/test_swapped_parameters.py"),
    ),
    "lion/trainer.py": (_tests("integration/test_trainer_arguments.py"),),
}
