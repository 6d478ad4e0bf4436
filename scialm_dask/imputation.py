"""The result: two factors whose product is the completed matrix, multiplied only where it is asked for."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import zarr
from numpy.typing import NDArray

from scialm_dask.arguments import checked, validated
from scialm_dask.data.annotated import add_result, aligned, as_matrix, match_names
from scialm_dask.data.annotation import StoredAnnotation, read_annotation
from scialm_dask.data.arrays import check_whole, write_element
from scialm_dask.data.layout import RowBlocks
from scialm_dask.data.matrix import ExpressionMatrix, Observed
from scialm_dask.data.provenance import follow, refer_to
from scialm_dask.data.store import atomic_store, lasting, new_anndata, open_store, readable
from scialm_dask.data.written import CHUNK_BYTES, ZeroRule, write_dense, write_left, write_sparse
from scialm_dask.errors import InputError
from scialm_dask.events import Listener, begin, silent
from scialm_dask.reduction import check_held
from scialm_dask.solve.cell_model import CellModel, model_of
from scialm_dask.solve.embedding import Axes
from scialm_dask.solve.estimate import Estimate
from scialm_dask.solve.transform import Fit, transform

if TYPE_CHECKING:
    import anndata
    import dask.array as da
    import pandas as pd

__all__ = ["LONG", "Imputation"]

_KEY = "scialm"
_FACTORS, _RESIDUAL = f"{_KEY}_factors", f"{_KEY}_residual"
LONG = ("settings", "singular_values", "weights")  # of a summary; told elsewhere, or not to everybody


class Imputation:
    """An imputed matrix, cells × genes: two factors and, where it was denoised, a share of the counts.

    The matrix is X̂ = A diag(1 − λ) + C diag(λ), where A is ``left @ right.T``, C the counts and λ the weight of each
    gene's own counts. Without counts it is A. Negative entries become zero. Its values are on the scale of the input.
    Index it, ``imputation[cells, genes]``, or take all of it lazily by `to_dask`. `impute`, `resume`, `transform` and
    `open` make these objects.

    Parameters
    ----------
    left : dask.array.Array of shape (n_cells, rank), float32
        Left factors.
    right : ndarray of shape (n_genes, rank), float32
        Right factors.
    obs, var : pandas.DataFrame
        Annotation of cells and genes.
    summary : dict
        What was done and found; see the notes.
    history : dict
        Columns of equal length, with a value for each iteration.
    clip : bool, default=True
        Whether negative entries become zero.
    model : CellModel, optional
        What `transform` has to know of the fit. Without it `transform` is refused.
    residual_weight : ndarray of shape (n_genes,), float32, optional
        The weights λ.
    counts : ExpressionMatrix, optional
        C.
    axes : Axes, optional
        Principal axes of the log-normalised X̂.
    stored : str, optional
        The store that it was opened from.

    Notes
    -----
    The summary that `impute` makes has

    ``n_cells``, ``n_genes``, ``n_observed``, ``n_empty_cells``, ``n_empty_genes``
        Size of the matrix, observed entries, and rows and columns without any.
    ``source``, ``raw_counts``
        The name of the matrix, such as ``path:X``, and whether all its values are whole numbers.
    ``scaling``, ``settings``
        What was scaled, in words, and the fields of `Settings` as they were used.
    ``unseen``, ``verdict``, ``residual_share``
        Of denoised counts: the error on molecules that the fit has not seen, of the counts, the means of genes and the
        imputed matrix; what that means, in words; and the median of λ.
    ``iterations``, ``chosen_iteration``, ``passes``
        Iterations made, the one that was kept, counted from 1, and passes over the data.
    ``rank``, ``singular_values``, ``weights``
        Of the result, on the scale on which it was solved; ``weights`` of denoised counts.
    ``residual``, ``held_out_error``
        ‖P_Ω(D − A)‖ / ‖P_Ω(D)‖, and the same over held-out entries; None if none were held out.
    ``converged``, ``stop_reason``
        Whether a stopping rule was met, and which, in words.
    ``mean_observed``, ``mean_imputed_over_observed``
        Mean of the input, zeros included, and mean of the imputed matrix before clipping over it. Only where zeros are
        unknown.
    ``n_blocks``, ``scratch``
        Row blocks, and where the working state was: ``"memory"`` or ``"zarr"``.
    ``date``, ``command``, ``seconds``
        When the run ended, what was typed on the command line, and wall time.
    ``peak_memory_bytes``, ``peak_memory_bytes_in_all``, ``forecast_memory_bytes``
        The most memory that one process held, the sum over this process, workers and scheduler, and the forecast for
        one process. Processes that are gone at the end do not count.
    ``resumed_after_iteration``, ``run``
        Of a resumed run: the iteration of its checkpoint. Of the command line: a token of the run.
    ``X``
        Of a written result: None without X, else ``written`` (``"dense"``, or ``"preserve_zeros"`` with the ``rank`` of
        the rule), ``keep_observed``, and ``mean_over_observed``: the mean of X over ``mean_observed``, if known.

    That of `transform` has ``n_cells``, ``n_genes``, ``rank``, ``scaling`` and ``source`` alike, and

    ``n_genes_matched``, ``n_genes_not_in_fit``
        New genes that the fit knows, and that it does not.
    ``few_genes``
        A warning in words, if the new cells have less than half of the genes of the fit.
    ``noise``
        The variance of an entry, on the scale of the fit, at which the new cells predict themselves best.
    ``fitted_on``
        The source of the fit.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)  # two types of cells, 40 genes
    >>> result = scialm_dask.impute(counts, max_rank=2)
    >>> result
    Imputation of 60 cells × 40 genes, rank 2
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
        self._stored = stored

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
            Its left factors are read when they are used. If the counts of a denoised result are gone or have changed it
            is the low-rank part alone, and a warning says so.

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
        import anndata

        root: Any = open_store(path)
        held = {"obsm": _FACTORS, "varm": _FACTORS, "uns": _KEY}
        with readable(path):
            if isinstance(root, zarr.Array) or any(axis not in root or k not in root[axis] for axis, k in held.items()):
                raise InputError(f"{path}: not a result of this version; make one with `scialm-dask impute`")
            left, right, notes = (root[axis][key] for axis, key in held.items())
            for name, part in {"left factor": left, "right factor": right}.items():
                check_whole(f"{path}: {name}", part, always=True)
            check_whole(f"{path}:uns/{_KEY}", notes)
            right, uns = np.asarray(right[...]), anndata.io.read_elem(notes)
            summary = json.loads(str(uns["summary"]))
            if left.shape[1:] != right.shape[1:] or not isinstance(summary, dict) or not np.isfinite(right).all():
                raise InputError(f"{path}: the factors or their summary are damaged; impute again")
            result = cls(
                _stored_rows(lasting(path), f"obsm/{_FACTORS}", left),
                right,
                obs=read_annotation(StoredAnnotation(lasting(path)), "obs", left.shape[0]),
                var=read_annotation(StoredAnnotation(lasting(path)), "var", right.shape[0]),
                summary=summary,
                history={name: column.tolist() for name, column in uns["history"].items()},
                clip=bool(uns["clip"]),
                model=model_of(uns["model"]) if "model" in uns else None,
                axes=Axes(**uns["axes"]) if "axes" in uns else None,
                stored=lasting(path),
            )
        if _RESIDUAL in result.var:
            result.residual_weight = result.var.pop(_RESIDUAL).to_numpy(np.float32)
            if counts is not None:
                result.counts = aligned(as_matrix(counts), result)
            else:
                result.counts, note = follow(uns.get("counts"), lasting(path), result.shape)
                if note:
                    warnings.warn(note, stacklevel=3)  # of who called what is checked
        return result

    @property
    def left(self) -> da.Array:
        """Left factor; raises `InputError` if it is held by workers of a cluster that is gone."""
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
        if self._stored is None or not self.summary.get("X"):
            return None
        return ExpressionMatrix.open(self._stored, observed=self.observed)

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
        import dask.array as da

        estimate, apply = dask.delayed(self.estimate, traverse=False), dask.delayed(function)
        bounds = np.cumsum([0, *left.chunks[0]]).tolist()
        pieces = [
            da.from_delayed(apply(estimate, piece, first), (last - first, columns), np.float32)
            for piece, (first, last) in zip(left.to_delayed().ravel(), pairwise(bounds), strict=True)
        ]
        return da.concatenate(pieces, axis=0)

    def rows(self, cells: slice | NDArray[np.intp]) -> NDArray[np.float32]:
        """Return some imputed cells.

        Parameters
        ----------
        cells : slice or ndarray of int
            Their numbers.

        Returns
        -------
        ndarray of shape (n, n_genes), float32
            One row for each of them.

        Examples
        --------
        >>> result.rows(slice(0, 5)).shape
        (5, 40)
        """
        return self._some(cells, slice(None))

    def _some(self, cells: Any, genes: Any) -> NDArray[np.float32]:
        estimate = self.estimate
        return estimate.rows(np.atleast_2d(self.left[cells].compute()), estimate.counts_of(cells), genes)

    def transform(self, matrix: Any, *, layer: str | None = None, listen: Listener = silent) -> Imputation:
        """Impute cells that were not in the fit: one pass over them, a small least-squares problem for each.

        Parameters
        ----------
        matrix : matrix
            New cells, as `impute` takes them, on the scale of the fit: raw counts if those were, else normalised to the
            same total. Genes are matched by name, and some may be missing. An array has no names; its genes must be
            those of the fit in their order.
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
        return self._of_cells(*transform(fit, matrix, layer=layer, listen=listen))

    def _of_cells(
        self,
        left: da.Array,
        counts: ExpressionMatrix | None,
        measured: NDArray[np.bool_],
        obs: pd.DataFrame,
        summary: dict[str, Any],
    ) -> Imputation:
        """Return the imputation of other cells, whose left factor and counts are known, by the same right factor."""
        return Imputation(
            left,
            self.right,
            obs=obs,
            var=self.var,
            summary=summary,
            history={},
            clip=self.clip,
            model=self.model,
            residual_weight=None if self.residual_weight is None else self.residual_weight * measured,
            counts=counts,
            axes=self.axes,
        )

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """Return some entries.

        Parameters
        ----------
        key : selection of cells, or a pair of those of cells and of genes
            Numbers, names, slices, masks, or lists of these.

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
        rows, one_cell = _positions(cells, self.obs.index, "cell")
        columns, one_gene = _positions(genes, self.var.index, "gene")
        values = self._some(rows, columns)
        return values[0 if one_cell else slice(None), 0 if one_gene else slice(None)]

    def to_zarr(
        self,
        path: str | os.PathLike[str],
        *,
        dense: bool = False,
        keep_observed: ExpressionMatrix | None = None,
        preserve_zeros: ZeroRule | None = None,
        overwrite: bool = False,
        sources: tuple[str | os.PathLike[str], ...] = (),
        listen: Listener = silent,
    ) -> dict[str, Any]:
        """Write an AnnData Zarr store.

        It has the factors in ``obsm["scialm_factors"]`` and ``varm["scialm_factors"]``, λ in ``var["scialm_residual"]``
        and the embedding in ``obsm["X_scialm"]``. Counts stay where they are; those in memory are written as layer
        counts.

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
        self._check_x(dense, keep_observed, preserve_zeros)
        keep_observed = None if keep_observed is None else aligned(keep_observed, self)
        advance = begin(listen, "writing")
        embedding = self.embedding
        parts = 1 + (embedding is not None) + (dense or preserve_zeros is not None)

        def advance_part(share: float) -> None:
            advance(share / parts)

        with atomic_store(path, overwrite=overwrite, sources=sources) as partial:
            root = new_anndata(partial, obs=self.obs, var=self._var(_KEY))
            write_left(root, _FACTORS, self.left, advance_part)
            if embedding is not None:
                write_left(root, f"X_{_KEY}", embedding, advance_part)
            write_element(root["varm"], _FACTORS, self.right)
            written: dict[str, Any] | None = None
            if preserve_zeros is not None:
                total = write_sparse(root, self, preserve_zeros, keep_observed is not None, advance_part)
                written = {"written": "preserve_zeros", "rank": preserve_zeros.rank}
            elif dense:
                total = write_dense(root, self, keep_observed, advance_part)
                written = {"written": "dense"}
            if written is not None:
                written |= {
                    "keep_observed": keep_observed is not None,
                    "mean_over_observed": self._over_observed(total),
                }
            counts = {} if self.counts is None else {"counts": json.dumps(refer_to(self.counts, root, self._stored))}
            write_element(root["uns"], _KEY, self._notes(written) | counts)
            zarr.consolidate_metadata(root.store)
            if read := preserve_zeros.matrix if preserve_zeros is not None else keep_observed:
                read.check_unchanged()
        return self.summary | {"X": written}

    def _check_x(self, dense: bool, keep_observed: ExpressionMatrix | None, preserve_zeros: ZeroRule | None) -> None:
        """Raise `InputError` if this is not what X can be."""
        if dense and preserve_zeros is not None:
            raise InputError("dense and preserve_zeros both say what X is to be; give one of them")
        if keep_observed is not None and not dense and preserve_zeros is None:
            raise InputError("keep_observed is about X, and none is written; give dense=True or preserve_zeros too")
        if preserve_zeros is None:
            return
        if not hasattr(preserve_zeros, "expressed"):
            raise InputError(
                f"preserve_zeros is {preserve_zeros!r}; give the rule of the matrix that was imputed: "
                "biological_zeros(matrix)"
            )
        if aligned(preserve_zeros.matrix, self) is not preserve_zeros.matrix:
            raise InputError(
                f"preserve_zeros is of {preserve_zeros.matrix.name}, whose cells or genes are in another order than "
                "those of the result; give the rule of the matrix that was imputed"
            )

    def _over_observed(self, total: float) -> float | None:
        """Mean of a matrix of this sum over the mean observed."""
        observed = self.summary.get("mean_observed")
        return total / self.shape[0] / self.shape[1] / observed if observed else None

    def to_anndata(self) -> anndata.AnnData:
        """Return an AnnData whose X is the lazy imputed matrix, with what `add_to` adds.

        Take a part and call ``to_memory()``; to write all of it use `to_zarr`.

        Returns
        -------
        anndata.AnnData
            X and ``obsm`` are Dask arrays.

        Examples
        --------
        >>> result.to_anndata()[:10].to_memory().X.shape
        (10, 40)
        """
        import anndata

        adata = anndata.AnnData(self.to_dask(), obs=self.obs.copy(), var=self.var.copy())
        self.add_to(adata)
        return adata

    def add_to(self, adata: anndata.AnnData, key: str = _KEY) -> None:
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
        by_cell = {f"{key}_factors": self.left, f"X_{key}": self.embedding}
        by_gene = {f"{key}_factors": self.right, f"{key}_residual": self.residual_weight}
        add_result(
            adata,
            obsm={name: part if cells is None else part[cells] for name, part in by_cell.items() if part is not None},
            by_gene={
                name: part if genes is None else part[genes] for name, part in by_gene.items() if part is not None
            },
            uns={key: self._notes(None)},
        )

    def _var(self, key: str) -> pd.DataFrame:
        """Annotation of genes, with λ."""
        return (
            self.var if self.residual_weight is None else self.var.assign(**{f"{key}_residual": self.residual_weight})
        )

    def _notes(self, written: dict[str, Any] | None) -> dict[str, Any]:
        """Make what is kept in ``uns``, beside an X that is as `written`, or not of ours."""
        summary = self.summary | {"X": written}
        notes = {"summary": json.dumps(summary), "history": self.history, "clip": self.clip}
        extra = {"model": self.model, "axes": self.axes}
        return notes | {name: vars(part).copy() for name, part in extra.items() if part is not None}


def _rows(estimate: Estimate, left: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    return estimate.rows(left, estimate.counts_of(slice(first, first + len(left))))


def _stored_rows(path: str, name: str, stored: Any) -> da.Array:
    """Return an array of a result as a Dask array whose tasks open the store themselves."""
    import dask.array as da

    read, (cells, rank) = dask.delayed(_read_rows, pure=True), stored.shape
    rows = RowBlocks.panels(cells, max(1, rank), CHUNK_BYTES)
    if stored.chunks is not None:  # an .h5ad may hold it in one piece
        rows = RowBlocks((*range(0, cells, stored.chunks[0]), cells))
    pieces = [da.from_delayed(read(path, name, *span), (span[1] - span[0], rank), stored.dtype) for span in rows]
    return da.concatenate(pieces, axis=0)


def _read_rows(path: str, name: str, start: int, stop: int) -> NDArray[np.float32]:
    with readable(f"{path}:{name}"):
        rows = np.asarray(open_store(path)[name][start:stop])
    if not np.isfinite(rows).all():
        raise InputError(f"{path}: {name} of cells {start} to {stop} is not finite; impute again")
    return rows


def _positions(wanted: Any, names: pd.Index, what: str) -> tuple[Any, bool]:
    """Turn names, or whatever NumPy indexes with, into positions; tell whether it was a single one."""
    if isinstance(wanted, slice):
        return wanted, False
    single = isinstance(wanted, str | int | np.integer)
    items = np.atleast_1d(np.asarray(wanted))
    if not items.size:
        return np.empty(0, np.intp), False
    if items.dtype.kind in "US" or items.dtype == object:
        repeated = np.isin(items, names[names.duplicated()])
        if repeated.any():
            raise InputError(f"several {what}s are named '{items[np.argmax(repeated)]}'; pick one by its number")
        positions = names.get_indexer_for(items)
        if (positions < 0).any():
            absent = items[np.flatnonzero(positions < 0)[0]]
            raise InputError(f"no {what} is named '{absent}'; the first ones are {', '.join(map(str, names[:3]))}")
        return positions, single
    return np.arange(len(names))[items], single
