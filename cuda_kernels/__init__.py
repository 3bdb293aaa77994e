"""How a GPU does it: Numba-CUDA kernels with the results of :mod:`reference`, bit for bit."""
