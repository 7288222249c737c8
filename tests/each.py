"""One test for many values, where a hundred items of `pytest.mark.parametrize` would say no more."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def each(names: str, values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for every value in turn, as one item; a failure names its value.

    `names` and `values` are those of `pytest.mark.parametrize`. Several of them on one test run every combination.
    """
    keys = [name.strip() for name in names.split(",")]
    cases = [dict(zip(keys, value if len(keys) > 1 else (value,), strict=True)) for value in values]
    assert cases, names

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            for case in cases:
                try:
                    test(**case, **fixtures)
                except BaseException as error:
                    error.add_note(", ".join(f"{key} = {value!r}" for key, value in case.items()))
                    raise

        # pytest gives fixtures for what is left of the signature
        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in keys]
        assert len(left) == len(signature.parameters) - len(keys), names
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return decorate
