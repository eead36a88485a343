"""Validators of single fields of `FambaVConfig`: each raises a `ValueError` that says what was expected."""

import math
from collections.abc import Callable
from typing import Any


def integer(minimum: int) -> Callable[[Any], None]:
    """Validator of an optional integer that must be at least `minimum`."""

    def validate_integer(value: Any) -> None:
        if value is None or isinstance(value, str):  # the field's own type says whether these are allowed
            return
        if isinstance(value, bool) or value < minimum:
            raise ValueError(f"expected an integer >= {minimum}, got {value!r}")

    return validate_integer


def number(minimum: float, maximum: float = math.inf, open_maximum: bool = False) -> Callable[[Any], None]:
    """Validator of a finite number in [minimum, maximum], or [minimum, maximum) with `open_maximum`."""

    def validate_number(value: Any) -> None:
        too_large = value >= maximum if open_maximum else value > maximum
        if isinstance(value, bool) or not math.isfinite(value) or value < minimum or too_large:
            closing = ")" if open_maximum else "]"
            raise ValueError(f"expected a finite number in [{minimum}, {maximum}{closing}, got {value!r}")

    return validate_number


def image_size_or_pair(value: Any) -> None:
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or any(isinstance(side, bool) or side < 1 for side in sides):
        raise ValueError(f"expected a positive integer or a pair (height, width) of them, got {value!r}")


def auto_or_integer(value: Any) -> None:
    if isinstance(value, str) and value != "auto":
        raise ValueError(f'expected "auto" or an integer >= 1, got {value!r}')
