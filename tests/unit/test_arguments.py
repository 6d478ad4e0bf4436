"""What is of another type than it is annotated with ends in one line, before any work."""

import json
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pytest
import scipy.sparse as sp

from scialm_dask import (
    ExpressionMatrix,
    Imputation,
    InputError,
    PooledALS,
    PooledNuclearNorm,
    balanced_pools,
    biological_zeros,
    connect,
    evaluate_imputation,
    gene_scores,
    impute,
    measure,
    pool_report,
    random_pools,
    resume,
    write_report,
)
from scialm_dask.config import Count, Ratio, Settings, Share, checked, validated
from scialm_dask.data.qc import Thresholds, quality_control
from scialm_dask.evaluate.mask import mask
from scialm_dask.evaluate.simulate import simulate

X = np.random.default_rng(0).poisson(2, (40, 30)).astype(np.float32)


@pytest.mark.parametrize(
    ("value", "kind", "plain"),
    [
        (np.int32(5), int, 5),
        (np.float32(0.5), float, 0.5),
        (1, float, 1.0),
        (np.float64(2), float | Literal["auto"], 2.0),
        ("auto", float | Literal["auto"], "auto"),
        (np.array([0.5, 1]), tuple[float, float], (0.5, 1.0)),
        (range(3), Sequence[int], (0, 1, 2)),
        (None, int | None, None),
        (print, Callable[[str], None], print),
    ],
)
def test_what_fits_becomes_plain(value, kind, plain):
    got = validated("it", value, kind)
    assert got == plain
    assert type(got) is type(plain)


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        (True, int, "it is True; give a whole number"),
        (np.True_, float | None, "give a number or None"),
        (5.0, int, "it is 5.0; give a whole number"),
        ("5", float | Literal["auto"], "it is '5'; give a number or auto"),
        (3, Literal["one", "two"], "it is 3; choose one of one, two"),
        (np.array([1, 2]), Literal["one", "two"], "it is array([1, 2]); choose one of one, two"),
        ((1, 2, 3), tuple[float, float], "it is (1, 2, 3); give 2 numbers"),
        ("ab", Sequence[str], "it is 'ab'; give a list of words"),
        ([1, "a"], Sequence[int], "give a list of whole numbers"),
        (3, Callable[[str], None], "it is 3; give a function"),
        (0, Count, "it is 0; give a whole number of at least 1"),
        (1.5, Ratio | None, "it is 1.5; give a number from 0 to 1 or None"),
        (1, Share, "it is 1; give a number between 0 and 1"),
        (float("nan"), Ratio, "it is nan; give a number from 0 to 1"),
        ((0.5, -1), tuple[Ratio, Ratio], "it is (0.5, -1); give 2 numbers from 0 to 1"),
        (3, str | Imputation, "it is 3; give a word or an Imputation"),
    ],
)
def test_what_does_not_is_one_line(value, kind, wanted):
    with pytest.raises(InputError) as caught:
        validated("it", value, kind)
    assert wanted in str(caught.value)


def test_what_is_shown_is_short_and_one_line():
    with pytest.raises(InputError) as caught:
        validated("it", np.ones((300, 300)), float)
    assert len(str(caught.value)) < 150
    assert "\n" not in str(caught.value)


def test_a_checked_function_is_called_with_plain_values_and_keeps_its_name():
    @checked
    def doubled(x: int, *, of: float = 1.0) -> float:
        """Double."""
        return (x, of, type(x), type(of))

    assert doubled(np.int64(2), of=1) == (2, 1.0, int, float)
    assert doubled.__doc__ == "Double."
    with pytest.raises(TypeError, match="missing"):
        doubled()


def test_settings_of_numpy_numbers_are_plain():
    settings = Settings(max_rank=np.int64(4), epsilon=np.float32(0.5), scaling=np.array([0.5, 0.5]), seed=np.uint8(3))
    again = json.loads(json.dumps(settings.as_dict()))
    assert (again["max_rank"], again["epsilon"], again["scaling"], again["seed"]) == (4, 0.5, [0.5, 0.5], 3)
    assert settings == Settings(max_rank=4, epsilon=0.5, scaling=(0.5, 0.5), seed=3)


def test_a_result_of_numpy_settings_is_written(tmp_path):
    result = impute(X, preset="complete", max_rank=np.int64(3), max_iterations=np.int32(4), validation=np.float32(0.2))
    result.to_zarr(tmp_path / "result.zarr")
    assert Imputation.open(tmp_path / "result.zarr").summary["settings"]["max_rank"] == 3


REFUSED = [
    (lambda: impute(X, validation="0.1"), "validation is '0.1'; give a number"),
    (lambda: impute(X, max_rank=5.5), "max_rank is 5.5; give a whole number of at least 1 or None"),
    (lambda: impute(X, max_rank=True), "max_rank is True; give"),
    (lambda: impute(X, scaling=3), "scaling is 3; give 2 numbers from 0 to 1 or None"),
    (lambda: impute(X, stop=3), "stop is 3; choose one of residual, held-out"),
    (lambda: impute(X, preset=[1]), "preset is [1]; give a word"),
    (lambda: impute(X, layer=3), "layer is 3; give a word or None"),
    (lambda: impute(X, checkpoint=5), "checkpoint is 5; give a word, a path, a Checkpointing or None"),
    (lambda: impute(X, memory_limit=[1]), "memory_limit is [1]; give a number, a word or None"),
    (lambda: impute(X, listen=3), "listen is 3; give a function"),
    (lambda: impute(3), "matrix is 3; give a matrix of numbers"),
    (lambda: impute(None), "matrix is None; give a matrix of numbers"),
    (lambda: impute([1, 2]), "matrix: shape (2,); give a matrix of known size"),
    (lambda: impute((3, 4)), "matrix: shape (2,)"),
    (lambda: impute(np.ones((2, 3, 4))), "matrix: shape (2, 3, 4)"),
    (lambda: impute(sp.coo_array([1.0, 2.0])), "matrix: shape (2,)"),
    (lambda: impute([[1, 2], [3]]), "matrix: a list, not a matrix of numbers"),
    (lambda: impute(X.astype(np.float16)), "values are of type float16"),
    (lambda: ExpressionMatrix.of(X, blocks=2.5), "blocks is 2.5; give a whole number or None"),
    (lambda: ExpressionMatrix.open(3), "path is 3; give a word or a path"),
    (lambda: Imputation.open(3), "path is 3; give a word or a path"),
    (lambda: resume(3), "folder is 3; give a word or a path"),
    (lambda: PooledALS("3"), "rank is '3'; give a whole number"),
    (lambda: PooledALS(3, tol=None), "tol is None; give a number"),
    (lambda: PooledALS(3, -1), "random_state is -1; give a whole number of at least 0"),
    (lambda: PooledALS(3).fit(3, np.eye(4)), "measurements is 3; give a matrix of numbers"),
    (lambda: PooledNuclearNorm(None), "delta is None; give a number"),
    (lambda: PooledNuclearNorm(1, max_iterations=2.5), "max_iterations is 2.5; give a whole number"),
    (lambda: PooledNuclearNorm(1).fit(X, np.eye(30), start=3), "start is 3; give a PooledResult or None"),
    (lambda: random_pools(30.5, 3), "genes is 30.5; give a whole number"),
    (lambda: random_pools(30, 3, random_state=-1), "random_state is -1; give a whole number of at least 0"),
    (lambda: balanced_pools(30, 3, per_gene="2"), "per_gene is '2'; give a whole number"),
    (lambda: pool_report([[1], [1, 0]]), "pools: rows differ in length"),
    (lambda: measure(3, np.eye(3)), "expression is 3; give a matrix of numbers"),
    (lambda: gene_scores(3, X), "truth is 3; give a matrix of numbers"),
    (lambda: evaluate_imputation(X, methods="auto"), "methods is 'auto'; give a list of words"),
    (lambda: evaluate_imputation(X, shares=0.1), "shares is 0.1; give a list of numbers"),
    (lambda: evaluate_imputation(X, seeds=[0.5]), "seeds is [0.5]; give a list of whole numbers"),
    (lambda: evaluate_imputation(X, method_timeout="1h"), "method_timeout is '1h'; give a number over 0 or None"),
    (lambda: simulate("x.zarr", n_cells="3", n_genes=3), "n_cells is '3'; give a whole number"),
    (lambda: simulate("x.zarr", n_cells=3, n_genes=3, density="x"), "density is 'x'; give a number"),
    (lambda: mask("x.zarr", "y.zarr", fraction="x"), "fraction is 'x'; give a number"),
    (lambda: quality_control("x.zarr", "y.zarr", 3), "thresholds is 3; give a Thresholds or None"),
    (lambda: Thresholds(min_genes="200"), "min_genes is '200'; give a whole number of at least 0 or None"),
    (lambda: biological_zeros(3), "matrix is 3; give an ExpressionMatrix"),
    (lambda: write_report(3, "x.html"), "result is 3; give an Imputation, a word or a path"),
    (lambda: connect(threads="x").__enter__(), "threads is 'x'; give a whole number or None"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_public_functions_refuse_other_types(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
