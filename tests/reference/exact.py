"""Rounding by Python fractions: an oracle that shares no code and no hardware with what it checks."""

from __future__ import annotations

from fractions import Fraction

# significand bits, exponent of the smallest normal number, largest exponent
FORMATS = {"float32": (24, -126, 127), "float16": (11, -14, 15), "bfloat16": (8, -126, 127)}


def rounded(value: Fraction, dtype: str) -> Fraction:
    """Return a value rounded to nearest even in a dtype; OverflowError where that is infinity."""
    bits, smallest, largest = FORMATS[dtype]
    if value == 0:
        return value
    exponent = smallest
    while Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    unit = Fraction(2) ** (exponent - bits + 1)
    nearest = round(value / unit) * unit  # Python rounds halves to even
    if abs(nearest) >= Fraction(2) ** (largest + 1):
        raise OverflowError(f"{float(value)} is infinite in {dtype}")
    return nearest


def float32(value: Fraction) -> Fraction:
    """Return a value rounded to float32."""
    return rounded(value, "float32")


def sign(value: Fraction) -> int:
    """Return -1, 0 or 1."""
    return (value > 0) - (value < 0)


def lion(
    param: Fraction, grad: Fraction, momentum: Fraction, k: tuple[Fraction, ...], scale: Fraction, dtype: str
) -> tuple[Fraction, Fraction]:
    """Return parameter and momentum after a Lion step, each operation rounded to float32 on its own."""
    lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = k
    g = float32(grad * scale)
    c = float32(float32(beta1 * momentum) + float32(one_minus_beta1 * g))
    new_param = rounded(float32(float32(param * decay) - lr * sign(c)), dtype)
    new_momentum = float32(float32(beta2 * momentum) + float32(one_minus_beta2 * g))
    return new_param, new_momentum
