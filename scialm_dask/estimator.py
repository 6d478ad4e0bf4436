"""The method as an estimator, by scikit-learn's conventions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from scialm_dask.api import impute
from scialm_dask.data.annotated import as_matrix, is_anndata, named
from scialm_dask.data.matrix import ExpressionMatrix, Observed
from scialm_dask.imputation import Imputation

if TYPE_CHECKING:
    import dask.array as da
    from numpy.typing import ArrayLike, NDArray


class IALM(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Complete an expression matrix by low-rank matrix completion (scIALM), as a scikit-learn transformer.

    `fit` learns gene factors, `transform` completes cells with them, those of the fit or others. What these give is
    a lazy Dask array, cells × genes, float32; nothing of it is computed until it is asked for.

    Parameters
    ----------
    preset
        ``"auto"``: ``"denoise"`` for raw counts, else ``"complete"``; see `impute`. ``"paper"``: the published method.
    max_rank, max_iterations, scaling, validation
        As in `Settings`; None leaves the preset's. A `max_rank` of ``"none"`` is no limit.
    observed
        ``"nonzero"``: zeros are missing. ``"finite"``: NaN is missing, zeros and negative values are observed.
    memory_limit
        Bytes that each process may take in all, or words such as ``"8 GB"``; what is free by default.
    random_state
        Fixes every random draw; the `seed` of `Settings`.

    Attributes
    ----------
    imputation_ : Imputation
        The fit: the completed matrix in factors, its history and summary.
    components_ : ndarray
        Gene factors, float32, shape ``(r, n)``.
    n_iter_ : int
        Iterations made; 1 where counts were denoised.
    n_features_in_ : int
        Number of genes, n.
    feature_names_in_ : ndarray
        Their names, if the cells of the fit came with any.

    Notes
    -----
    ``fit_transform(X)`` is the completed X, as `impute` gives it. ``fit(X).transform(X)`` solves for each cell anew
    with the gene factors alone, as for any other cell, and is near it but not the same.

    The cells, ``X``, may be a NumPy or SciPy sparse array, a data frame, a Dask array, an AnnData (its X; it is left
    as it is), a path to a store, or an `ExpressionMatrix`.
    """

    def __init__(
        self,
        preset: str = "auto",
        *,
        max_rank: int | str | None = None,
        max_iterations: int | None = None,
        scaling: tuple[float, float] | str | None = None,
        validation: float | None = None,
        observed: Observed = "nonzero",
        memory_limit: int | str | None = None,
        random_state: int = 0,
    ) -> None:
        self.preset = preset
        self.max_rank = max_rank
        self.max_iterations = max_iterations
        self.scaling = scaling
        self.validation = validation
        self.observed = observed
        self.memory_limit = memory_limit
        self.random_state = random_state

    def fit(self, X: Any, y: object = None) -> Self:
        """Complete the cells X, and learn gene factors from them.

        Parameters
        ----------
        X
            Cells × genes; see the class.
        y
            Ignored.

        Raises
        ------
        InputError
            If X or a parameter cannot be used.
        """
        self.imputation_: Imputation = impute(
            self._matrix(X, reset=True),
            preset=self.preset,
            memory_limit=self.memory_limit,
            max_rank=self.max_rank,
            max_iterations=self.max_iterations,
            scaling=self.scaling,
            validation=self.validation,
            seed=self.random_state,
        )
        return self

    def fit_transform(self, X: Any, y: object = None) -> da.Array:
        """Complete the cells X; see the class for how this differs from ``fit(X).transform(X)``.

        Parameters
        ----------
        X
            Cells × genes.
        y
            Ignored.

        Returns
        -------
        dask.array.Array
            Lazy, cells × genes, float32.
        """
        return self.fit(X).imputation_.to_dask()

    def transform(self, X: Any) -> da.Array:
        """Complete cells with the gene factors of the fit: one pass, a small problem for each cell.

        Parameters
        ----------
        X
            Cells × genes, on the scale of the cells of the fit. The genes of an AnnData or a store are matched by
            name, and some may be missing; other kinds must have those of the fit in their order.

        Returns
        -------
        dask.array.Array
            Lazy, cells × genes of the fit, float32.

        Raises
        ------
        InputError
            If X cannot be used.
        """
        check_is_fitted(self)
        return self.imputation_.transform(self._matrix(X, reset=False)).to_dask()

    @property
    def components_(self) -> NDArray[np.float32]:
        """Gene factors."""
        return self.imputation_.right.T

    @property
    def n_iter_(self) -> int:
        """Iterations made; 1 where counts were denoised."""
        return int(self.imputation_.summary.get("iterations", 1))

    def _matrix(self, X: Any, *, reset: bool) -> ExpressionMatrix:
        """Check X as scikit-learn does if it is an array, and take it."""
        import dask

        is_array = not (is_anndata(X) or isinstance(X, str | os.PathLike | ExpressionMatrix))
        if is_array and not dask.is_dask_collection(X):
            return named(as_matrix(self._checked(X, reset), observed=self.observed), X)
        matrix = as_matrix(X, observed=self.observed)
        if reset:
            self.n_features_in_ = matrix.shape[1]
            self.__dict__.pop("feature_names_in_", None)  # of an earlier fit
            if matrix.annotation is not None:
                self.feature_names_in_ = matrix.var.index.to_numpy(object)
        return matrix

    def _checked(self, X: ArrayLike, reset: bool) -> Any:
        finite = self.observed == "finite"
        return validate_data(
            self,
            X,
            reset=reset,
            accept_sparse="csr",
            dtype="numeric",
            ensure_all_finite="allow-nan" if finite else True,
            ensure_non_negative=not finite,
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.allow_nan = self.observed == "finite"
        tags.input_tags.positive_only = self.observed == "nonzero"
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
