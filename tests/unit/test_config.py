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
    assert preset("complete") == Settings()
    assert (preset("denoise").method, preset("denoise").max_rank) == ("denoise", 64)
    assert preset("paper", rank_policy="adaptive", svd_passes=2).svd_passes == 2
    assert preset("complete", epsilon=None, seed=3) == Settings(seed=3)


@pytest.mark.parametrize(
    ("words", "exponents"), [("none", (0, 0)), ("poisson", (0.5, 0.5)), ("0.75,0.5", (0.75, 0.5)), ((1, 0), (1, 0))]
)
def test_scaling_by_word_or_number(words, exponents):
    assert preset("complete", scaling=words).scaling == exponents


def test_a_rank_without_limit_and_words_for_numbers():
    assert preset("complete", max_rank="none").max_rank is None
    assert preset("complete", max_rank=None).max_rank == preset("complete").max_rank == 128
    assert preset("paper", max_rank="50").max_rank == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_policy": "best"}, "rank_policy is 'best'; choose one of paper, adaptive"),
        ({"stop": "never"}, "stop is 'never'; choose one of residual, held-out"),
        *(({name: 0}, f"{name} is 0; give a whole number of at least 1") for name in
          ("max_iterations", "first_rank", "increment", "patience", "svd_passes", "max_rank")),
        ({"max_rank": "all"}, "max_rank is 'all'; give a number, or none for no limit"),
        ({"seed": -1}, "seed is -1; give a whole number of at least 0"),
        ({"epsilon": 0.0}, "epsilon is 0.0; give a number between 0 and 1"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"validation": 1.0}, "validation is 1.0; give a number between 0 and 1"),
        ({"validation": float("nan")}, "validation is nan"),
        ({"scaling": "log"}, "scaling is 'log'; give none, poisson, or two exponents"),
        ({"scaling": "1,2,3"}, "scaling is '1,2,3'"),
        ({"scaling": (0.5, 1.5)}, "scaling is (0.5, 1.5); give 2 numbers from 0 to 1 or None"),
        ({"scaling": (0.5,)}, "scaling is (0.5,); give 2 numbers from 0 to 1 or None"),
        ({"scaling": (0.5, float("nan"))}, "give 2 numbers from 0 to 1"),
        ({"svd_tolerance": -1.0}, "svd_tolerance is -1.0"),
        ({"svd_tolerance": float("nan")}, "svd_tolerance is nan"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError) as caught:
        preset("complete", **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("complete", {"increment": 200}, "increment has no effect with preset complete (rank_policy adaptive); it goes with rank_"),
        ("denoise", {"first_rank": 7}, "first_rank has no effect with preset denoise (method denoise); it goes with the presets complete and"),
        ("paper", {"rank_policy": "adaptive", "increment": 7}, "increment has no effect with preset paper"),
        ("paper", {"validation": 0.3}, "validation has no effect with preset paper (stop residual)"),
        ("denoise", {"validation": 0.3}, "validation has no effect with preset denoise (method denoise)"),
        ("paper", {"patience": 3}, "patience has no effect with preset paper (stop residual)"),
        ("complete", {"svd_tolerance": 0.1}, "svd_tolerance has no effect with preset complete (svd_passes 2)"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(name, changes, message):
    with pytest.raises(InputError) as caught:
        preset(name, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("complete", {"rank_policy": "paper", "increment": 7, "first_rank": 3}),
        ("complete", {"stop": "residual", "epsilon": 0.1}),
        ("complete", {"svd_passes": 3, "svd_tolerance": 0.1}),
        ("complete", {"increment": None}),
        ("paper", {"stop": "held-out", "validation": 0.3, "patience": 3}),
        ("denoise", {"max_rank": 5, "scaling": (0.5, 0.0), "svd_passes": 3}),
    ],
)
def test_what_has_an_effect_is_taken(name, changes):
    settings = preset(name, **changes).as_dict()
    assert {field: settings[field] for field, value in changes.items() if value is not None}.items() <= changes.items()


def test_what_auto_means_is_for_a_matrix_to_say():
    with pytest.raises(
        InputError, match="preset is 'auto', which depends on the matrix; choose one of denoise, complete, paper"
    ):
        preset("auto")


def test_an_unknown_preset_is_named():
    with pytest.raises(InputError, match="preset is 'fast'; choose one of auto, denoise, complete, paper"):
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
    with pytest.raises(InputError, match="no setting is called max_ranks; there are method, rank_policy, stop"):
        preset("complete", max_ranks=5)
