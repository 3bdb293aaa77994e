"""How a GPU does it: Numba-CUDA kernels with the results of :mod:`lion.reference`, bit for bit."""
