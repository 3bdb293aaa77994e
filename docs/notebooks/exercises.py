"""How the notebooks answer whoever tries an exercise."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any


def attempt(check: Callable[[Any], None], mine: Any) -> None:
    """Try a solution and print how it went.

    Args:
        check: Asserts what a solution has to do.
        mine: The solution; raises ``NotImplementedError`` as long as nothing is filled in.
    """
    try:
        check(mine)
    except NotImplementedError:
        print(
            "Not filled in yet: replace `raise NotImplementedError` and run this cell again."
        )
    except AssertionError as error:
        *_, place = traceback.extract_tb(error.__traceback__)
        print("Not right yet. This does not hold:", place.line)
    else:
        print("Right.")
