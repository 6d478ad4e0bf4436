"""The method as a scikit-learn estimator."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from scialm_dask.api import impute
from scialm_dask.data.annotated import as_matrix, is_anndata, named
from scialm_dask.data.csr import Observed
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.imputation import Imputation

if TYPE_CHECKING:
    import dask.array as da
    from numpy.typing import NDArray


class IALM(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Denoise or complete expression matrices, as a scikit-learn transformer.

    `fit` learns gene factors, and `transform` imputes the same or other cells with them, as a lazy Dask array of shape
    (n_cells, n_genes), float32.

    Parameters
    ----------
    preset : {"auto", "denoise", "complete", "paper"}, default="auto"
        As in `impute`.
    max_rank, max_iterations, scaling, validation : optional
        As in `Settings`; None keeps the value of the preset. ``max_rank="none"`` means no limit.
    observed : {"nonzero", "finite"}, default="nonzero"
        ``"nonzero"``: zeros are missing. ``"finite"``: NaN is missing, zeros and negative values are observed.
    memory_limit : int or str, optional
        Maximum memory of each process, in bytes or as text such as ``"8 GB"``. By default the free memory.
    random_state : int, default=0
        Seed of all random draws; `seed` of `Settings`.

    Attributes
    ----------
    imputation_ : Imputation
        The fit: the imputed matrix as factors, with its history and summary.
    n_features_in_ : int
        Number of genes.
    feature_names_in_ : ndarray of shape (n_genes,), object
        Names of the genes, if X had any.

    Notes
    -----
    ``fit_transform(X)`` is the imputed X, as `impute` returns it. ``fit(X).transform(X)`` solves for each cell again,
    given the gene factors, as for new cells; the two are close but not equal.

    X is any matrix that `impute` takes. An AnnData is not changed.

    Examples
    --------
    >>> import numpy as np
    >>> from scialm_dask import IALM
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)  # two types of cells, 40 genes
    >>> ialm = IALM(max_rank=2).fit(counts)
    >>> ialm.components_.shape
    (2, 40)
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
        self.preset, self.max_rank, self.max_iterations = preset, max_rank, max_iterations
        self.scaling, self.validation, self.observed = scaling, validation, observed
        self.memory_limit, self.random_state = memory_limit, random_state

    def fit(self, X: Any, y: object = None) -> Self:
        """Impute the cells X and learn gene factors from them.

        Parameters
        ----------
        X : matrix of shape (n_cells, n_genes)
            The cells; see the class.
        y : None
            Ignored.

        Returns
        -------
        IALM
            The estimator.

        Raises
        ------
        InputError
            If X or a parameter is invalid.

        Examples
        --------
        >>> IALM(max_rank=2).fit(counts).n_iter_
        1
        """
        parameters = self.get_params()
        del parameters["observed"]
        seed = parameters.pop("random_state")
        self.imputation_: Imputation = impute(self._matrix(X, reset=True), seed=seed, **parameters)
        return self

    def fit_transform(self, X: Any, y: object = None) -> da.Array:
        """Impute the cells X. The class describes the difference from ``fit(X).transform(X)``.

        Parameters
        ----------
        X : matrix of shape (n_cells, n_genes)
            The cells.
        y : None
            Ignored.

        Returns
        -------
        dask.array.Array of shape (n_cells, n_genes), float32
            The imputed cells, lazy.

        Examples
        --------
        >>> IALM(max_rank=2).fit_transform(counts)[0, :3].compute().round(1)
        array([1. , 4.1, 1.3], dtype=float32)
        """
        return self.fit(X).imputation_.to_dask()

    def transform(self, X: Any) -> da.Array:
        """Impute cells with the gene factors of the fit, in one pass: a small least-squares problem for each cell.

        Parameters
        ----------
        X : matrix of shape (n_cells, n_genes)
            Cells on the scale of the fit. The genes of an AnnData or a store are matched by name, and some may be
            missing. Other matrices must have the genes of the fit in the same order.

        Returns
        -------
        dask.array.Array of shape (n_cells, n_genes of the fit), float32
            The imputed cells, lazy.

        Raises
        ------
        InputError
            If X is invalid.

        Examples
        --------
        >>> ialm.transform(counts[:10]).shape
        (10, 40)
        """
        check_is_fitted(self)
        return self.imputation_.transform(self._matrix(X, reset=False)).to_dask()

    @property
    def components_(self) -> NDArray[np.float32]:
        """Gene factors, float32 of shape (rank, n_genes)."""
        return self.imputation_.right.T

    @property
    def n_iter_(self) -> int:
        """Number of iterations; 1 if counts were denoised."""
        return int(self.imputation_.summary.get("iterations", 1))

    def _matrix(self, X: Any, *, reset: bool) -> ExpressionMatrix:
        """Return X as a matrix; an array is checked as scikit-learn does."""
        import dask

        is_array = not (is_anndata(X) or isinstance(X, str | os.PathLike | ExpressionMatrix))
        if is_array and not dask.is_dask_collection(X):
            finite = self.observed == "finite"
            accepted = {"accept_sparse": "csr", "dtype": "numeric", "ensure_non_negative": not finite}
            allowed = "allow-nan" if finite else True
            checked = validate_data(self, X, reset=reset, ensure_all_finite=allowed, **accepted)
            return named(as_matrix(checked, observed=self.observed), X)
        matrix = as_matrix(X, observed=self.observed)
        if reset:
            self.n_features_in_ = matrix.shape[1]
            self.__dict__.pop("feature_names_in_", None)  # of an earlier fit
            if matrix.annotation is not None:
                self.feature_names_in_ = matrix.var.index.to_numpy(object)
        return matrix

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.allow_nan = self.observed == "finite"
        tags.input_tags.positive_only = self.observed == "nonzero"
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
