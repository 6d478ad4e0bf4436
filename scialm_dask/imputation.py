"""The result: two factors of the completed matrix, multiplied only on use."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
from numpy.typing import NDArray

from scialm_dask.config import checked, validated
from scialm_dask.data.annotated import add_result, aligned, as_matrix, match_names
from scialm_dask.data.annotation import add_source, positions_of
from scialm_dask.data.csr import Observed
from scialm_dask.data.matrix import ExpressionMatrix
from scialm_dask.data.written import CHUNK_BYTES
from scialm_dask.events import Listener, silent
from scialm_dask.reduction import check_held, stacked
from scialm_dask.solve.biological_zeros import BiologicalZeros
from scialm_dask.solve.estimate import Axes, Estimate
from scialm_dask.solve.scaling import CellModel
from scialm_dask.solve.stored import KEY, follow, read_result, write_result
from scialm_dask.solve.transform import transform

if TYPE_CHECKING:
    import anndata
    import dask.array as da
    import pandas as pd

LONG = ("settings", "singular_values", "weights")  # keys of a summary that are not shown with the others


class Imputation:
    """An imputed matrix, cells × genes: two factors and, after denoising, a share of the counts.

    The matrix is X̂ = A diag(1 − λ) + C diag(λ), where A is ``left @ right.T``, C the counts and λ the weight of each
    gene's own counts. Without counts it is A. Negative entries become zero. Values are on the scale of the input.
    Index it as ``imputation[cells, genes]``, or get the whole matrix lazily by `to_dask`.

    Parameters
    ----------
    left : dask.array.Array of shape (n_cells, rank), float32
        Left factors.
    right : ndarray of shape (n_genes, rank), float32
        Right factors.
    obs, var : pandas.DataFrame
        Annotation of cells and genes.
    summary : dict
        Description of the run, such as ``verdict``, ``rank`` and ``seconds``. All keys are on the site's page on
        summaries.
    history : dict
        Columns of equal length, with one value per iteration.
    clip : bool, default=True
        Whether negative entries become zero.
    model : CellModel, optional
        Scaling of the fit, for `transform`.
    residual_weight : ndarray of shape (n_genes,), float32, optional
        The weights λ.
    counts : ExpressionMatrix, optional
        C.
    axes : Axes, optional
        Principal axes of the log-normalised X̂.
    stored : str, optional
        The store from which it was opened.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)  # two types of cells, 40 genes
    >>> result = scialm_dask.impute(counts, max_rank=2)
    >>> result[[0, 1], :3].shape
    (2, 3)
    """

    def __init__(
        self,
        left: da.Array,
        right: NDArray[np.float32],
        *,
        obs: pd.DataFrame,
        var: pd.DataFrame,
        summary: dict[str, Any],
        history: dict[str, list[float]],
        clip: bool = True,
        model: CellModel | None = None,
        residual_weight: NDArray[np.float32] | None = None,
        counts: ExpressionMatrix | None = None,
        axes: Axes | None = None,
        stored: str | None = None,
    ) -> None:
        self.left, self.right, self.obs, self.var = left, right, obs, var
        self.summary, self._history, self.clip, self.model = summary, history, clip, model
        self.residual_weight, self.counts, self.axes, self.stored = residual_weight, counts, axes, stored

    @classmethod
    @checked
    def open(cls, path: str | os.PathLike[str], *, counts: Any = None) -> Imputation:
        """Open a result of `to_zarr` or ``scialm-dask impute``, or an AnnData to which `impute` has added a result.

        Parameters
        ----------
        path : str or path-like
            A .zarr or .h5ad; Zarr may be at a URL.
        counts : matrix, optional
            The counts, as `impute` takes them, if they were moved.

        Returns
        -------
        Imputation
            The result. Left factors are read on use. If the counts of a denoised result are missing or have changed,
            it is the low-rank part alone, with a warning.

        Raises
        ------
        InputError
            If there is no result at `path`, or `counts` has other cells or genes.

        Examples
        --------
        >>> _ = result.to_zarr("result.zarr")
        >>> scialm_dask.Imputation.open("result.zarr")
        Imputation of 60 cells × 40 genes, rank 2
        """
        arguments, reference = read_result(path)
        result = cls(**arguments)
        if result.residual_weight is None:
            return result
        if counts is not None:
            result.counts = aligned(as_matrix(counts), result)
        else:
            result.counts, note = follow(reference, arguments["stored"], result.shape)
            if note:
                warnings.warn(note, stacklevel=3)  # points to the caller of the checked function
        return result

    @property
    def left(self) -> da.Array:
        """Left factors. Raises `InputError` if they were on workers of a cluster that is gone."""
        check_held(self._left)
        return self._left

    @left.setter
    def left(self, left: da.Array) -> None:
        self._left = left

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × genes."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """Number of factors, r."""
        return int(self.right.shape[1])

    @property
    def observed(self) -> Observed:
        """Which entries were observed; see `ExpressionMatrix`."""
        return "nonzero" if self.clip else "finite"

    @functools.cached_property
    def X(self) -> ExpressionMatrix | None:  # noqa: N802  as AnnData calls it
        """The X that `to_zarr` has written beside the factors, if any."""
        if self.stored is None or not self.summary.get("X"):
            return None
        return ExpressionMatrix.open(self.stored, observed=self.observed)

    @property
    def mean_ratio(self) -> float | None:
        """Mean of X, or else of the imputed matrix, over the mean of the input; None if unknown."""
        written = self.summary.get("X")
        ratio = written["mean_over_observed"] if written else self.summary.get("mean_imputed_over_observed")
        return None if ratio is None else float(ratio)

    @property
    def history(self) -> pd.DataFrame:
        """One row per iteration: rank, threshold, residual, held-out error, passes."""
        import pandas as pd

        return pd.DataFrame(self._history)

    def __repr__(self) -> str:
        return f"Imputation of {self.shape[0]} cells × {self.shape[1]} genes, rank {self.rank}"

    @property
    def estimate(self) -> Estimate:
        """Computes imputed cells from left factors and counts."""
        return Estimate(self.right, self.residual_weight, self.counts, self.clip)

    @property
    def embedding(self) -> da.Array | None:
        """Principal components of the log-normalised imputed matrix: lazy, float32 of shape (n_cells, n_components).

        None if zeros of the input were observed values.
        """
        return None if self.axes is None else self._by_rows(self.axes.place, self.left, self.axes.loadings.shape[1])

    def to_dask(self) -> da.Array:
        """Return the imputed matrix as a lazy Dask array.

        Returns
        -------
        dask.array.Array of shape (n_cells, n_genes), float32
            Dense; each block is computed on use.

        Examples
        --------
        >>> result.to_dask().mean(axis=0).compute().shape
        (40,)
        """
        rows = max(1, CHUNK_BYTES // (4 * self.shape[1]))
        return self._by_rows(_rows, self.left.rechunk((rows, max(1, self.rank))), self.shape[1])

    def _by_rows(self, function: Callable[..., Any], left: da.Array, columns: int) -> da.Array:
        """Apply ``function(estimate, left, first)`` to the chunks of `left`; `first` is the first cell of a chunk."""
        estimate, apply = dask.delayed(self.estimate, traverse=False), dask.delayed(function)
        sizes = left.chunks[0]
        firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        pieces = [apply(estimate, *each) for each in zip(left.to_delayed().ravel(), firsts, strict=True)]
        return stacked(pieces, sizes, columns)

    def transform(self, matrix: Any, *, layer: str | None = None, listen: Listener = silent) -> Imputation:
        """Impute new cells in one pass: a small least-squares problem for each cell.

        Parameters
        ----------
        matrix : matrix
            New cells, as `impute` takes them, on the scale of the fit: raw counts, or counts normalised to the same
            total. Genes are matched by name, and some may be missing. An array, which has no names, must have the genes
            of the fit in the same order.
        layer : str, optional
            The layer to read instead of X.
        listen : callable, optional
            Called with a `Note` if less than half of the genes of the fit match.

        Returns
        -------
        Imputation
            The new cells × the genes of the fit. Cells are read on use. A cell without observed entries is zero.

        Raises
        ------
        InputError
            If too few genes match, names are ambiguous, or only one of fit and new cells has raw counts.

        Examples
        --------
        >>> result.transform(counts[:10])
        Imputation of 10 cells × 40 genes, rank 2
        """
        new = transform(self, matrix, layer=layer, listen=listen)
        same = {name: getattr(self, name) for name in ("right", "var", "clip", "model", "axes")}
        return Imputation(**same, **new, history={})

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """Return selected entries.

        Parameters
        ----------
        key : selection of cells, or pair of selections of cells and genes
            Numbers, names, symbols of genes, slices, masks, or lists of these.

        Returns
        -------
        ndarray, float32
            Cells × genes. Selecting a single name or number drops that axis.

        Raises
        ------
        InputError
            If there is no cell or gene of that name.
        IndexError
            If a number is out of range, or a mask has the wrong length.
        """
        cells, genes = key if isinstance(key, tuple) else (key, slice(None))
        rows, one_cell = positions_of(cells, self.obs, "cell")
        columns, one_gene = positions_of(genes, self.var, "gene")
        estimate = self.estimate
        values = estimate.rows(np.atleast_2d(self.left[rows].compute()), estimate.counts_of(rows), columns)
        return values[0 if one_cell else slice(None), 0 if one_gene else slice(None)]

    def to_zarr(
        self,
        path: str | os.PathLike[str],
        *,
        dense: bool = False,
        keep_observed: ExpressionMatrix | None = None,
        preserve_zeros: BiologicalZeros | None = None,
        overwrite: bool = False,
        sources: tuple[str | os.PathLike[str], ...] = (),
        listen: Listener = silent,
    ) -> dict[str, Any]:
        """Write an AnnData Zarr store.

        It has the factors in ``obsm["scialm_factors"]`` and ``varm["scialm_factors"]``, λ in ``var["scialm_residual"]``
        and the embedding in ``obsm["X_scialm"]``. Counts in memory are written as layer counts; counts on disk are
        referred to by path.

        Parameters
        ----------
        path : str or path-like
            The store. It appears only when complete.
        dense : bool, default=False
            Also write the imputed matrix, as chunked X.
        keep_observed : ExpressionMatrix, optional
            In X, keep the observed entries of this matrix unchanged.
        preserve_zeros : BiologicalZeros, optional
            Instead of `dense`, write the imputed matrix as sparse X in which the biological zeros of this rule stay
            zero. Observed entries imputed as zero keep their observed value.
        overwrite : bool, default=False
            Replace an existing store at `path`.
        sources : tuple of path-like, default=()
            Stores that are read meanwhile and must not be replaced.
        listen : callable, optional
            Called with every event of the computation; see `scialm_dask.events`.

        Returns
        -------
        dict
            The summary as written, with ``X``.

        Raises
        ------
        InputError
            If both `dense` and `preserve_zeros` are given, `keep_observed` is given without either, or `preserve_zeros`
            was found on another matrix.
        OutputError
            If `path` cannot be written.

        Examples
        --------
        >>> result.to_zarr("dense.zarr", dense=True)["X"]["written"]
        'dense'
        """
        path = validated("path", path, str | os.PathLike)
        written = write_result(self, path, dense, keep_observed, preserve_zeros, overwrite, sources, listen)
        return self.summary | {"X": written}

    def to_anndata(self) -> anndata.AnnData:
        """Return an AnnData with the lazy imputed matrix as X and the entries of `add_to`.

        Returns
        -------
        anndata.AnnData
            Its matrices are lazy. It also has ``obsm``, ``uns`` and ``layers`` of the imputed store.

        Examples
        --------
        >>> result.to_anndata()[:10].to_memory().X.shape
        (10, 40)
        """
        from anndata import AnnData

        adata = AnnData(self.to_dask(), obs=self.obs.copy(), var=self.var.copy())
        add_source(adata, str(self.summary.get("source", "")))
        self.add_to(adata)
        return adata

    def add_to(self, adata: anndata.AnnData, key: str = KEY) -> None:
        """Add the result to an AnnData of the same cells and genes, as `impute` does.

        Parameters
        ----------
        adata : anndata.AnnData
            Gets the embedding as ``obsm["X_" + key]``, the factors as ``obsm[key + "_factors"]`` and ``varm[key +
            "_factors"]``, λ as ``var[key + "_residual"]`` and notes as ``uns[key]``. Entries of ``obsm`` are computed
            unless X is lazy. Cells and genes are matched by name. A view becomes an actual AnnData.
        key : str, default="scialm"
            Prefix of all names.

        Raises
        ------
        InputError
            If the cells or genes differ.

        Examples
        --------
        >>> import anndata
        >>> cells = anndata.AnnData(counts)
        >>> result.add_to(cells)
        >>> sorted(cells.obsm)
        ['X_scialm', 'scialm_factors']
        """
        cells = match_names(self.obs.index, adata.obs_names, "cell", "result")
        genes = match_names(self.var.index, adata.var_names, "gene", "result")

        def placed(parts: dict[str, Any], order: NDArray[np.intp] | None) -> dict[str, Any]:
            return {name: p if order is None else p[order] for name, p in parts.items() if p is not None}

        by_cell = {f"{key}_factors": self.left, f"X_{key}": self.embedding}
        by_gene = {f"{key}_factors": self.right, f"{key}_residual": self.residual_weight}
        uns = {key: self.notes(None)}
        add_result(adata, obsm=placed(by_cell, cells), by_gene=placed(by_gene, genes), uns=uns)

    def notes(self, written: dict[str, Any] | None) -> dict[str, Any]:
        """Return the entries of ``uns``.

        Parameters
        ----------
        written : dict or None
            Description of the written X, for the summary.

        Returns
        -------
        dict
            Summary, history, and the parameters of `transform` and the embedding.

        Examples
        --------
        >>> sorted(result.notes(None))
        ['axes', 'clip', 'history', 'model', 'summary']
        """
        summary = self.summary | {"X": written}
        notes = {"summary": json.dumps(summary), "history": self.history, "clip": self.clip}
        extra = {"model": self.model, "axes": self.axes}
        return notes | {
            name: {key: value for key, value in vars(part).items() if value is not None}
            for name, part in extra.items()
            if part is not None
        }


def _rows(estimate: Estimate, left: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    return estimate.rows(left, estimate.counts_of(slice(first, first + len(left))))
