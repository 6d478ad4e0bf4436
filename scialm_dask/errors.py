"""Exceptions. Every message is one line with the value, the limit and the remedy."""

from __future__ import annotations


class ScialmError(Exception):
    """Base class of the errors raised by this package.

    The command line prints the message and exits with `exit_code`.

    Parameters
    ----------
    message : str
        The value, the limit and the remedy. Line breaks, which quoted errors may have, become spaces.

    Examples
    --------
    >>> import scialm_dask
    >>> try:
    ...     scialm_dask.Imputation.open("absent.zarr")
    ... except scialm_dask.ScialmError as error:
    ...     print(error)
    absent.zarr: no such file or folder; check the path
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")).rstrip())


class InputError(ScialmError, ValueError):
    """A matrix, setting or file is invalid.

    Parameters
    ----------
    message : str
        See `ScialmError`.

    Examples
    --------
    >>> import scialm_dask
    >>> scialm_dask.Settings(seed=-1)
    Traceback (most recent call last):
        ...
    scialm_dask.errors.InputError: seed is -1; give a whole number of at least 0
    """


class OutputError(ScialmError, OSError):
    """The output cannot be written."""


class DoesNotFitError(ScialmError, MemoryError):
    """The forecast exceeds the available memory or disk space."""


class ClusterError(ScialmError, ConnectionError):
    """The scheduler or its workers cannot be reached or were lost. The same command may succeed later."""

    exit_code = 69  # EX_UNAVAILABLE


class CheckpointError(InputError):
    """A checkpoint is damaged, or belongs to another matrix or a newer version."""


class StoppedError(ScialmError, RuntimeError):
    """A run was stopped early and can be resumed from a checkpoint."""

    exit_code = 75  # EX_TEMPFAIL
