"""Settings are checked once, and say what is wrong in one line."""

import dataclasses
import json

import dask
import pytest

from scialm_dask.config import Settings, configured, preset
from scialm_dask.errors import InputError


def test_presets():
    paper = preset("paper")
    assert (paper.rank_policy, paper.stop, paper.scaling) == ("paper", "residual", (0.0, 0.0))
    assert (paper.epsilon, paper.first_rank, paper.increment, paper.max_iterations) == (1e-4, 5, 200, 1000)
    assert preset("auto") == Settings()
    assert preset("paper", rank_policy="adaptive", svd_passes=2).svd_passes == 2
    assert preset("auto", epsilon=None, seed=3) == Settings(seed=3)


@pytest.mark.parametrize(
    ("words", "exponents"), [("none", (0, 0)), ("poisson", (0.5, 0.5)), ("0.75,0.5", (0.75, 0.5)), ((1, 0), (1, 0))]
)
def test_scaling_by_word_or_number(words, exponents):
    assert preset("auto", scaling=words).scaling == exponents


def test_a_rank_without_limit_and_words_for_numbers():
    assert preset("auto", max_rank="none").max_rank is None
    assert preset("auto", max_rank=None).max_rank == preset("auto").max_rank == 128
    assert preset("paper", max_rank="50").max_rank == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_policy": "best"}, "rank_policy is 'best'; choose one of paper, adaptive"),
        ({"stop": "never"}, "stop is 'never'; choose one of residual, held-out"),
        *(({name: 0}, f"{name} is 0; it must be 1 at least") for name in
          ("max_iterations", "first_rank", "increment", "patience", "svd_passes", "max_rank")),
        ({"max_rank": "all"}, "max_rank is 'all'; give a number, or none for no limit"),
        ({"seed": -1}, "seed is -1"),
        ({"epsilon": 0.0}, "epsilon is 0.0; it must lie between 0 and 1"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"validation": 1.0}, "validation is 1.0; it is a share"),
        ({"validation": float("nan")}, "validation is nan"),
        ({"scaling": "log"}, "scaling is 'log'; give none, poisson, or two exponents"),
        ({"scaling": "1,2,3"}, "scaling is '1,2,3'"),
        ({"scaling": (0.5, 1.5)}, "give two exponents between 0 and 1"),
        ({"scaling": (0.5,)}, "scaling is (0.5,); give 2 numbers or None"),
        ({"scaling": (0.5, float("nan"))}, "give two exponents"),
        ({"svd_tolerance": -1.0}, "svd_tolerance is -1.0"),
        ({"svd_tolerance": float("nan")}, "svd_tolerance is nan"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError) as caught:
        preset("auto", **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_named():
    with pytest.raises(InputError, match="preset is 'fast'; choose one of auto, paper"):
        preset("fast")


def test_settings_are_frozen_and_plain():
    settings = Settings(max_rank=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.max_rank = 5
    assert json.loads(json.dumps(settings.as_dict()))["max_rank"] == 4


def test_what_was_set_before_the_first_use_takes_no_defaults_along():
    """Dask removes the whole namespace at the end, if it was not there at the beginning."""
    before = dask.config.config.pop("scialm", None)
    try:
        with dask.config.set({"scialm.memory-limit": "1 MB"}):
            assert (configured("memory-limit"), configured("scratch")) == ("1 MB", "auto")
        assert (configured("memory-limit"), configured("scratch")) == (None, "auto")
    finally:
        if before is not None:
            dask.config.config["scialm"] = before


def test_a_setting_that_there_is_not_is_refused_by_name():
    with pytest.raises(InputError, match="no setting is called max_ranks; there are rank_policy, stop"):
        preset("auto", max_ranks=5)
