"""Methods of an evaluation in the process of the test, where that is all the same: to start others takes seconds."""

from contextlib import contextmanager

import pytest

from scialm_dask.compare import isolated, trial


@contextmanager
def in_process():
    """Measure methods here; test_isolated and the tests of the commands have processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "run_isolated", lambda request, folder, time_limit: isolated._measured(request, folder))
        yield
