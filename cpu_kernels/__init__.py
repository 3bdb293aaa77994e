"""How a CPU does it: fused Numba kernels with the results of :mod:`lion.reference`, bit for bit, on raw addresses."""

from lion.cpu_kernels.clipping import percentile_clipping, squared_norm
from lion.cpu_kernels.lion import update_8bit_blockwise, update_8bit_tensorwise, update_32bit
from lion.cpu_kernels.quantization import dequantize_blockwise, quantize_blockwise
from lion.cpu_kernels.rounding import Master, Stochastic

__all__ = [
    "Master",
    "Stochastic",
    "dequantize_blockwise",
    "percentile_clipping",
    "quantize_blockwise",
    "squared_norm",
    "update_32bit",
    "update_8bit_blockwise",
    "update_8bit_tensorwise",
]
