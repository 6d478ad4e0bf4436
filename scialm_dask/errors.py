"""Exceptions. Each message is one line that names the value, the limit and the remedy."""

from __future__ import annotations


class ScialmError(Exception):
    """Base of every error that this package raises on purpose.

    The command line prints the message and exits with `exit_code`.

    Parameters
    ----------
    message : str
        What is wrong, the limit and the remedy. It is made one line, as the words of other packages in it may not be.

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
    """The matrix, a setting or a file cannot be used.

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
    """The result cannot be written where it was asked for."""


class DoesNotFitError(ScialmError, MemoryError):
    """The forecast is larger than the memory or the disk at hand."""


class ClusterError(ScialmError, ConnectionError):
    """The scheduler or workers cannot be reached, or were lost. The same command may succeed later."""

    exit_code = 69  # EX_UNAVAILABLE


class CheckpointError(InputError):
    """A checkpoint is torn, truncated, edited, of another matrix or of a newer version."""


class StoppedError(ScialmError, RuntimeError):
    """A run was stopped before its end, its input being fine, and can go on from a checkpoint."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same again, later
