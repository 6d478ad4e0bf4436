"""The result: two factors whose product is the completed matrix, multiplied only where it is asked for."""

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
from scialm_dask.solve.transform import Fit, transform

if TYPE_CHECKING:
    import anndata
    import dask.array as da
    import pandas as pd

LONG = ("settings", "singular_values", "weights")  # of a summary; told elsewhere, or not to everybody


class Imputation:
    """An imputed matrix, cells × genes: two factors and, where it was denoised, a share of the counts.

    The matrix is X̂ = A diag(1 − λ) + C diag(λ), where A is ``left @ right.T``, C the counts and λ the weight of each
    gene's own counts. Without counts it is A. Negative entries become zero. Its values are on the scale of the input.
    Index it, ``imputation[cells, genes]``, or take all of it lazily by `to_dask`.

    Parameters
    ----------
    left : dask.array.Array of shape (n_cells, rank), float32
        Left factors.
    right : ndarray of shape (n_genes, rank), float32
        Right factors.
    obs, var : pandas.DataFrame
        Annotation of cells and genes.
    summary : dict
        What was done and found, such as ``verdict``, ``rank`` and ``seconds``; the site's page on summaries has all of
        it.
    history : dict
        Columns of equal length, with a value for each iteration.
    clip : bool, default=True
        Whether negative entries become zero.
    model : CellModel, optional
        What `transform` has to know of the fit.
    residual_weight : ndarray of shape (n_genes,), float32, optional
        The weights λ.
    counts : ExpressionMatrix, optional
        C.
    axes : Axes, optional
        Principal axes of the log-normalised X̂.
    stored : str, optional
        The store that it was opened from.

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
        self.left = left
        self.right = right
        self.obs = obs
        self.var = var
        self.summary = summary
        self.model = model
        self._history = history
        self.clip = clip
        self.residual_weight = residual_weight
        self.counts = counts
        self.axes = axes
        self.stored = stored

    @classmethod
    @checked
    def open(cls, path: str | os.PathLike[str], *, counts: Any = None) -> Imputation:
        """Open what `to_zarr` or ``scialm-dask impute`` has written, or an AnnData that `impute` has added to.

        Parameters
        ----------
        path : str or path-like
            A .zarr or .h5ad; Zarr may be at a URL.
        counts : matrix, optional
            The counts, as `impute` takes them, if they are no longer where they were.

        Returns
        -------
        Imputation
            Its left factors are read when they are used. If the counts of a denoised result are gone or have changed,
            it is the low-rank part alone, and a warning says so.

        Raises
        ------
        InputError
            If there is no such result at `path`, or `counts` are of other cells or genes.

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
                warnings.warn(note, stacklevel=3)  # of who called what is checked
        return result

    @property
    def left(self) -> da.Array:
        """Left factors; raises `InputError` if workers of a cluster that is gone had them."""
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
        """What `to_zarr` has written as X beside the factors, an `ExpressionMatrix`; None if nothing."""
        if self.stored is None or not self.summary.get("X"):
            return None
        return ExpressionMatrix.open(self.stored, observed=self.observed)

    @property
    def mean_ratio(self) -> float | None:
        """Mean of X, or of the imputed matrix without X, over the mean observed; None if that is unknown."""
        written = self.summary.get("X")
        ratio = written["mean_over_observed"] if written else self.summary.get("mean_imputed_over_observed")
        return None if ratio is None else float(ratio)

    @property
    def history(self) -> pd.DataFrame:
        """One row for each iteration: rank, threshold, residual, held-out error, passes."""
        import pandas as pd

        return pd.DataFrame(self._history)

    def __repr__(self) -> str:
        return f"Imputation of {self.shape[0]} cells × {self.shape[1]} genes, rank {self.rank}"

    @property
    def estimate(self) -> Estimate:
        """What makes imputed cells from left factors and counts."""
        return Estimate(self.right, self.residual_weight, self.counts, self.clip)

    @property
    def embedding(self) -> da.Array | None:
        """Principal components of the log-normalised imputed matrix: lazy, float32, of shape (n_cells, n_components).

        None if zeros of the input were values.
        """
        return None if self.axes is None else self._by_rows(self.axes.place, self.left, self.axes.loadings.shape[1])

    def to_dask(self) -> da.Array:
        """Return the imputed matrix as a lazy Dask array.

        Returns
        -------
        dask.array.Array of shape (n_cells, n_genes), float32
            Dense; each block is computed when it is used.

        Examples
        --------
        >>> result.to_dask().mean(axis=0).compute().shape
        (40,)
        """
        rows = max(1, CHUNK_BYTES // (4 * self.shape[1]))
        return self._by_rows(_rows, self.left.rechunk((rows, max(1, self.rank))), self.shape[1])

    def _by_rows(self, function: Callable[..., Any], left: da.Array, columns: int) -> da.Array:
        """Apply ``function(estimate, left, first)`` to the chunks of a left factor."""
        estimate, apply = dask.delayed(self.estimate, traverse=False), dask.delayed(function)
        sizes = left.chunks[0]
        firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        pieces = [apply(estimate, *each) for each in zip(left.to_delayed().ravel(), firsts, strict=True)]
        return stacked(pieces, sizes, columns)

    def transform(self, matrix: Any, *, layer: str | None = None, listen: Listener = silent) -> Imputation:
        """Impute cells that were not in the fit: one pass over them, a small least-squares problem for each.

        Parameters
        ----------
        matrix : matrix
            New cells, as `impute` takes them, on the scale of the fit: raw counts if those were, else normalised to the
            same total. Genes are matched by name, and some may be missing; those of an array, which has no names, must
            be those of the fit in their order.
        layer : str, optional
            The layer to read instead of X.
        listen : callable, optional
            Called with a `Note` if less than half of the genes of the fit match.

        Returns
        -------
        Imputation
            Of the new cells × the genes of the fit. Cells are read when they are used. A cell without an observed entry
            is zero.

        Raises
        ------
        InputError
            If too few genes match, names are ambiguous, or only one of the two is raw counts.

        Examples
        --------
        >>> result.transform(counts[:10])
        Imputation of 10 cells × 40 genes, rank 2
        """
        fit = Fit(self.right, self.var.index, self.model, self.observed, self.summary.get("source"))
        new = transform(fit, matrix, layer=layer, listen=listen)
        return Imputation(
            new.left,
            self.right,
            obs=new.obs,
            var=self.var,
            summary=new.summary,
            history={},
            clip=self.clip,
            model=self.model,
            residual_weight=None if self.residual_weight is None else self.residual_weight * new.measured,
            counts=new.counts,
            axes=self.axes,
        )

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """Return some entries.

        Parameters
        ----------
        key : selection of cells, or a pair of those of cells and of genes
            Numbers, names or symbols of genes, slices, masks, or lists of these.

        Returns
        -------
        ndarray, float32
            Cells × genes. An axis that is picked by one name or number is dropped.

        Raises
        ------
        InputError
            If there is no cell or gene of a name.
        IndexError
            If a number is too large, or a mask has the wrong length.
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
        and the embedding in ``obsm["X_scialm"]``. Counts in memory are written as layer counts; others stay where they
        are.

        Parameters
        ----------
        path : str or path-like
            The store, which appears only when it is complete.
        dense : bool, default=False
            Write the imputed matrix too, as chunked X.
        keep_observed : ExpressionMatrix, optional
            In X, leave the observed entries of this matrix as they were.
        preserve_zeros : BiologicalZeros, optional
            Write the imputed matrix as sparse X in which the biological zeros of this rule stay zero. Observed entries
            stay: at their observed value where they were imputed as zero. Instead of `dense`.
        overwrite : bool, default=False
            Replace what is at `path`.
        sources : tuple of path-like, default=()
            Stores that are read meanwhile, and must not be replaced.
        listen : callable, optional
            Called with every event of the work; see `scialm_dask.events`.

        Returns
        -------
        dict
            The summary as it was written: with ``X``.

        Raises
        ------
        InputError
            If `dense` and `preserve_zeros` are both given, `keep_observed` without either, or `preserve_zeros` is of
            another matrix.
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
        """Return an AnnData whose X is the lazy imputed matrix, with what `add_to` adds.

        Returns
        -------
        anndata.AnnData
            Its matrices are lazy; ``obsm``, ``uns`` and ``layers`` of the store that was imputed are there too.

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
        """Put the result into an AnnData of the same cells and genes, as `impute` does.

        Parameters
        ----------
        adata : anndata.AnnData
            Gets the embedding as ``obsm["X_" + key]``, the factors as ``obsm[key + "_factors"]`` and ``varm[key +
            "_factors"]``, λ as ``var[key + "_residual"]`` and notes as ``uns[key]``. What goes to ``obsm`` is computed
            unless X is lazy. Cells and genes are matched by name. A view becomes an AnnData of its own.
        key : str, default="scialm"
            Begins all names.

        Raises
        ------
        InputError
            If the cells or genes are others.

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
        """Return what is kept in ``uns``.

        Parameters
        ----------
        written : dict or None
            What was written as X, for the summary.

        Returns
        -------
        dict
            Summary, history, and what `transform` and the embedding need.

        Examples
        --------
        >>> sorted(result.notes(None))
        ['axes', 'clip', 'history', 'model', 'summary']
        """
        summary = self.summary | {"X": written}
        notes = {"summary": json.dumps(summary), "history": self.history, "clip": self.clip}
        extra = {"model": self.model, "axes": self.axes}
        return notes | {name: vars(part).copy() for name, part in extra.items() if part is not None}


def _rows(estimate: Estimate, left: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    return estimate.rows(left, estimate.counts_of(slice(first, first + len(left))))
