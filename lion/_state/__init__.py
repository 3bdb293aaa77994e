"""What is kept for a parameter: its layout, checks, conversions, and how it is saved and loaded."""

from lion._state.adapting import adapted, momentum, placed, put, quantized, zero_momentum
from lion._state.checkpoints import check_parts, check_saved_group, converted, entries_beside, python_numbers
from lion._state.checks import check_contents, is_reset
from lion._state.layout import Form, State, form_of, kind_in, rounding_seed_of
from lion._state.master import for_communication, from_communication, join, split

__all__ = [
    "Form",
    "State",
    "adapted",
    "check_contents",
    "check_parts",
    "check_saved_group",
    "converted",
    "entries_beside",
    "for_communication",
    "form_of",
    "from_communication",
    "is_reset",
    "join",
    "kind_in",
    "momentum",
    "placed",
    "put",
    "python_numbers",
    "quantized",
    "rounding_seed_of",
    "split",
    "zero_momentum",
]
