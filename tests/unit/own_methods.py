"""Methods of a user's own, some of which come to a bad end."""

import os
import signal
from pathlib import Path

import numpy as np


def doubled(task):
    task.note = "twice what was given"
    return 2 * task.csr().toarray()


def doubled_counts(task):
    return doubled(task)


doubled_counts.takes = "counts"


def fails(task):
    raise ValueError("the matrix is\ntoo nice")


def takes_everything(task):
    return np.ones((1 << 20, 1 << 10), np.float32)


def never_ends(task):
    Path(task.path).with_name("pid").write_text(str(os.getpid()))
    signal.pause()


def dies(task):
    os._exit(3)


def killed(task):
    os.kill(os.getpid(), signal.SIGKILL)


def wrong_shape(task):
    return np.ones((3, 2), np.float32)
