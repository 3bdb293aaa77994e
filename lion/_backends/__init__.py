"""Who computes: implementations of the update, and the batches of tensors that they get."""

from lion._backends.batch import Batch, StaleBatch, Weights
from lion._backends.cpu import CpuBackend
from lion._backends.loss_scale import LossScale
from lion._backends.protocol import DTYPES, Backend, StepCoefficients
from lion._backends.reference import ReferenceBackend, as_numpy
from lion._backends.selection import for_device, requested, use_backend

__all__ = [
    "DTYPES",
    "Backend",
    "Batch",
    "CpuBackend",
    "LossScale",
    "ReferenceBackend",
    "StaleBatch",
    "StepCoefficients",
    "Weights",
    "as_numpy",
    "for_device",
    "requested",
    "use_backend",
]
