"""The method as an estimator, by scikit-learn's conventions."""

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
    from numpy.typing import ArrayLike, NDArray


class IALM(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Denoise or complete expression matrices, as a scikit-learn transformer.

    `fit` learns gene factors and `transform` imputes cells with them, those of the fit or others. Both give lazy Dask
    arrays, cells × genes, float32.

    Parameters
    ----------
    preset : {"auto", "denoise", "complete", "paper"}, default="auto"
        As in `impute`.
    max_rank, max_iterations, scaling, validation : optional
        As in `Settings`; None keeps the preset's. A `max_rank` of ``"none"`` is no limit.
    observed : {"nonzero", "finite"}, default="nonzero"
        ``"nonzero"``: zeros are missing. ``"finite"``: NaN is missing, zeros and negative values are observed.
    memory_limit : int or str, optional
        Bytes that each process may take in all, or words such as ``"8 GB"``. By default what is free.
    random_state : int, default=0
        Fixes every random draw; the `seed` of `Settings`.

    Attributes
    ----------
    imputation_ : Imputation
        The fit: the imputed matrix as factors, with its history and summary.
    n_features_in_ : int
        Number of genes.
    feature_names_in_ : ndarray of shape (n_genes,), object
        Their names, if the cells of the fit came with any.

    Notes
    -----
    ``fit_transform(X)`` is the imputed X, as `impute` returns it. ``fit(X).transform(X)`` solves for each cell anew
    with the gene factors alone, as for any other cell; the two are close but not the same.

    X is what `impute` takes. An AnnData stays as it is.

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
        self.preset = preset
        self.max_rank = max_rank
        self.max_iterations = max_iterations
        self.scaling = scaling
        self.validation = validation
        self.observed = observed
        self.memory_limit = memory_limit
        self.random_state = random_state

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
            If X or a parameter cannot be used.

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
        """Impute the cells X; see the class for how this differs from ``fit(X).transform(X)``.

        Parameters
        ----------
        X : matrix of shape (n_cells, n_genes)
            The cells.
        y : None
            Ignored.

        Returns
        -------
        dask.array.Array of shape (n_cells, n_genes), float32
            Lazy.

        Examples
        --------
        >>> IALM(max_rank=2).fit_transform(counts)[0, :3].compute().round(1)
        array([1. , 4.1, 1.3], dtype=float32)
        """
        return self.fit(X).imputation_.to_dask()

    def transform(self, X: Any) -> da.Array:
        """Impute cells with the gene factors of the fit: one pass over them, a small least-squares problem for each.

        Parameters
        ----------
        X : matrix of shape (n_cells, n_genes)
            Cells on the scale of the fit. The genes of an AnnData or a store are matched by name, and some may be
            missing. Other kinds must have those of the fit in their order.

        Returns
        -------
        dask.array.Array of shape (n_cells, n_genes of the fit), float32
            Lazy.

        Raises
        ------
        InputError
            If X cannot be used.

        Examples
        --------
        >>> ialm.transform(counts[:10]).shape
        (10, 40)
        """
        check_is_fitted(self)
        return self.imputation_.transform(self._matrix(X, reset=False)).to_dask()

    @property
    def components_(self) -> NDArray[np.float32]:
        """Gene factors, float32, of shape (rank, n_genes)."""
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
