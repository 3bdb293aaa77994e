"""The executable specification: what every implementation must compute, to the bit, in NumPy."""

from lion.reference.clipping import HISTORY, percentile_clipping, squared_norm
from lion.reference.lion import (
    BLOCK_SIZE,
    Coefficients,
    coefficients,
    update_8bit_blockwise,
    update_8bit_tensorwise,
    update_32bit,
)
from lion.reference.quantization import (
    create_dynamic_map,
    dequantize_blockwise,
    quantize_blockwise,
    quantize_thresholds,
)
from lion.reference.rounding import (
    Master,
    Stochastic,
    join,
    philox4x32,
    random_bits,
    split,
    stochastic_round,
)

__all__ = [
    "BLOCK_SIZE",
    "HISTORY",
    "Coefficients",
    "Master",
    "Stochastic",
    "coefficients",
    "create_dynamic_map",
    "dequantize_blockwise",
    "join",
    "percentile_clipping",
    "philox4x32",
    "quantize_blockwise",
    "quantize_thresholds",
    "random_bits",
    "split",
    "squared_norm",
    "stochastic_round",
    "update_32bit",
    "update_8bit_blockwise",
    "update_8bit_tensorwise",
]
