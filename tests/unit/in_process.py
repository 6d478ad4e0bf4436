"""Methods of an evaluation in the process of the test, where that is all the same: to start others takes seconds."""

from contextlib import contextmanager

import pytest

from scialm_dask.compare import benchmark, methods


@contextmanager
def in_process():
    """Measure methods here; test_methods and the tests of the commands have processes of their own."""

    def measured(method, task, folder, *, memory_limit, timeout):
        return methods._measured(method, folder, None, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "run_isolated", measured)
        yield
