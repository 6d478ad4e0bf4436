"""Functions compiled by numba, kept between processes where that can be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import FunctionCache


class _Cache(FunctionCache):  # type: ignore[misc]
    """A cache that drops files that cannot be read, such as those cut short by a full disk, and writes what it can."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling raises
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Return a decorator that compiles a function, without the interpreter lock, when it is called first.

    Parameters
    ----------
    **options
        Of `numba.njit`.
    """

    def decorate(function: Any) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        with contextlib.suppress(RuntimeError):  # neither the package's folder nor the home can be written
            dispatcher._cache = _Cache(function)
        return dispatcher

    return decorate
