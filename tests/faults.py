"""Faults by count: the nth call of a function, in whichever process, ends the process, raises, or fills its memory."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import signal
import threading

from distributed import WorkerPlugin


def count(path):
    """Add one to the number that a file stands for, whatever processes do so at once, and give it."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b".")
        file.flush()
        return file.tell()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise OSError(errno.EIO, "Input/output error")


def fill_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def fill_memory(held=[]):  # noqa: B006
    """Take a gigabyte, in pieces that are written to, and wait to be killed for it."""
    held.extend(bytearray(os.urandom(1 << 20)) * 64 for _ in range(16))
    threading.Event().wait()


def inject(target, path, at):
    """Count the calls of a function in a file, and do what `at` says before some of them.

    Parameters
    ----------
    target
        ``"module:name"`` or ``"module:class.name"``.
    at
        Faults by number of the call, from 1.

    Returns
    -------
    callable
        Takes the fault out again.
    """
    module, _, name = target.partition(":")
    owner = importlib.import_module(module)
    *classes, name = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    honest = getattr(owner, name)

    def faulty(*args, **kwargs):
        at.get(count(path), lambda: None)()
        return honest(*args, **kwargs)

    setattr(owner, name, faulty)
    return lambda: setattr(owner, name, honest)


class Faults(WorkerPlugin):
    """Injects on every worker, restarted ones too. With `each`, calls are counted for each worker by its name."""

    name = "faults"

    def __init__(self, target, path, at, *, each=False):
        self.target, self.path, self.at, self.each = target, str(path), at, each

    def setup(self, worker):
        self.remove = inject(self.target, f"{self.path}.{worker.name}" if self.each else self.path, self.at)

    def teardown(self, worker):
        self.remove()
