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

__all__ = [
    "BLOCK_SIZE",
    "HISTORY",
    "Coefficients",
    "coefficients",
    "create_dynamic_map",
    "dequantize_blockwise",
    "percentile_clipping",
    "quantize_blockwise",
    "quantize_thresholds",
    "squared_norm",
    "update_32bit",
    "update_8bit_blockwise",
    "update_8bit_tensorwise",
]
