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
from scialm_dask.data.beside import add_source
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

    The imputed matrix is X̂ = A diag(1 − λ) + C diag(λ), with A = ``left @ right.T``, C the counts and λ the weights of
    residuals; without these it is A. Negative entries are set to zero. It is on the scale of the input, and is stored
    only where `to_zarr` was told to, and can be another there; see `X`. Ask for entries by
    ``imputation[cells, genes]``, or for all of it, lazily, by `to_dask`.

    Parameters
    ----------
    left
        Dask array, float32, shape ``(m, r)``.
    right
        Float32, shape ``(n, r)``.
    obs, var
        Annotation of cells and genes.
    summary
        What was done and found, plain values; see the notes.
    history
        Columns of equal length, a value for each iteration.
    clip
        Whether negative entries are set to zero.
    model
        What `transform` needs to know of the fit; None if it cannot be done.
    residual_weight
        λ, float32, shape ``(n,)``; None where only A was fitted.
    counts
        C; None where there are none, or where they are gone. X̂ is A then.
    axes
        Principal axes of the log-normalised X̂; None where there are none.
    stored
        The store that it was opened from.

    Notes
    -----
    The summary of what `impute` gives has

    ``n_cells``, ``n_genes``, ``n_observed``, ``n_empty_cells``, ``n_empty_genes``
        Size of the matrix, its observed entries, and rows and columns without any.
    ``source``, ``raw_counts``
        What the matrix is called, such as ``path:X``, and whether all its values are whole numbers.
    ``scaling``, ``zeros``, ``settings``
        What was scaled, in words; the confidence in zeros; the fields of `Settings`, as they were used.
    ``iterations``, ``chosen_iteration``, ``passes``
        Iterations made, the one whose estimate this is, from 1, and passes over the data.
    ``rank``, ``singular_values``
        Of the chosen iteration, the values on the scale on which it was solved.
    ``residual``, ``held_out_error``
        ‖P_Ω(D − A)‖ / ‖P_Ω(D)‖ there, and the same over held-out entries; None if none were held out.
    ``count_splitting``
        Where zeros or the threshold were chosen by it: what was tried and how well unseen molecules were predicted;
        see `scialm_dask.solve.zeros.account`.
    ``converged``, ``stop_reason``
        Whether a stopping rule was met, and which, in words.
    ``mean_observed``, ``mean_imputed_over_observed``
        Mean of the observed matrix, zeros included, and that of the imputed matrix, before clipping, over it. Only
        where zeros are unknown.
    ``n_blocks``, ``scratch``
        Row blocks, and where the working state was: ``"memory"`` or ``"zarr"``.
    ``date``, ``command``
        When it ended, as text, and of a result of the command line what was typed.
    ``seconds``
        Wall time.
    ``peak_memory_bytes``, ``forecast_memory_bytes``
        The most memory that any of the processes has ever held, and what was forecast for each, in bytes. Processes
        are this one, or this one, the workers and the scheduler; those of them that are gone at the end do not count.
    ``peak_memory_bytes_in_all``
        The sum of what each of them has held at most.
    ``resumed_after_iteration``, ``run``
        Of a run that was resumed: the iteration of its checkpoint. Of the command line: a token of the run.
    ``X``
        Of a result that was written: None if without X, else ``written`` (``"dense"``, or ``"preserve_zeros"``: sparse,
        without the biological zeros of ALRA's rule, with its ``rank``), ``keep_observed``, and ``mean_over_observed``,
        the mean of X over ``mean_observed``, if that is known.

    That of `transform` has ``n_cells``, ``n_genes``, ``rank``, ``scaling`` and ``source`` alike, and
    ``n_genes_matched``, ``n_genes_not_in_fit``
        Genes of the new cells that the fit knows, and that it does not.
    ``few_genes``
        What that means, in words; only where the new cells have less than half of the genes of the fit.
    ``noise``
        Variance of an entry, on the scale of the fit, at which the new cells predict themselves best.
    ``fitted_on``
        The source of the fit.
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
        path
            Of a .zarr or .h5ad; Zarr may be at a URL.
        counts
            Counts of the same cells and genes, as `impute` takes them, if they are no longer where they were.

        Returns
        -------
        Imputation
            Its left factor is read when it is asked for. Where the counts of a denoised result are gone or have changed
            it is the low-rank part alone, and a warning says so.

        Raises
        ------
        InputError
            If there is no such result at `path`, or `counts` are of other cells or genes.
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
        """What `to_zarr` has written as X beside the factors, to be read by blocks; None if nothing."""
        if self._stored is None or not self.summary.get("X"):
            return None
        return ExpressionMatrix.open(self._stored, observed=self.observed)

    @property
    def mean_ratio(self) -> float | None:
        """Mean of X, or of the imputed matrix where there is no X, over the mean observed; None if that is unknown."""
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
        """What makes imputed cells of left factors and counts."""
        return Estimate(self.right, self.residual_weight, self.counts, self.clip)

    @property
    def embedding(self) -> da.Array | None:
        """Principal components of the log-normalised imputed matrix: lazy, float32, of shape ``(m, k)``.

        None where there are none: of matrices whose zeros are values.
        """
        return None if self.axes is None else self._by_rows(self.axes.place, self.left, self.axes.loadings.shape[1])

    def to_dask(self) -> da.Array:
        """Return the imputed matrix as a dense Dask array, float32, computed block by block when asked for."""
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
        """Impute some cells, given by a slice or by their numbers: float32, one row of ``n`` genes each."""
        return self._some(cells, slice(None))

    def _some(self, cells: Any, genes: Any) -> NDArray[np.float32]:
        estimate = self.estimate
        return estimate.rows(np.atleast_2d(self.left[cells].compute()), estimate.counts_of(cells), genes)

    def transform(self, matrix: Any, *, layer: str | None = None, listen: Listener = silent) -> Imputation:
        """Complete cells that were not in the fit, with its gene factors: one pass, a small problem for each cell.

        Parameters
        ----------
        matrix
            New cells × genes, on the scale of the matrix of the fit: raw counts if those were, else normalised to
            the same total. An `ExpressionMatrix`, an AnnData, a path to a store, or an array, which has no names
            and must have the genes of the fit in their order. Otherwise genes are matched by name; some may be
            missing.
        layer
            Layer to read instead of X.
        listen
            Called with a `scialm_dask.events.Note` if less than half of the genes of the fit match.

        Returns
        -------
        Imputation
            Of the new cells × the genes of the fit. Its left factor is lazy: cells are read when they are asked for.
            A cell without an observed entry is zero.

        Raises
        ------
        InputError
            If too few genes match, names are ambiguous, or one is of raw counts and the other not.
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
        """Impute some cells and genes, given as numbers, names, slices, masks, or lists of these.

        Returns
        -------
        ndarray
            Float32, cells × genes; an axis that is picked by one name or number is dropped.

        Raises
        ------
        InputError
            If there is no cell or gene of a name.
        IndexError
            If a number is too large, or a mask of the wrong length.
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

        It has the factors in ``obsm["scialm_factors"]`` and ``varm["scialm_factors"]``, the weights of residuals in
        ``var["scialm_residual"]`` and the embedding in ``obsm["X_scialm"]``. Counts stay where they are; those that are
        in memory are written as layer counts.

        Parameters
        ----------
        path
            Where; appears only when it is complete.
        dense
            Write the imputed matrix too, as chunked X.
        keep_observed
            In X, leave the observed entries of this matrix as they were.
        preserve_zeros
            Write the imputed matrix as sparse X, without what this rule, as `biological_zeros` gives it, takes for
            biological zeros. Observed entries stay, at their observed value if they were imputed as zero. Instead of
            `dense`.
        overwrite
            Replace what is at `path`.
        sources
            Stores that are read meanwhile.
        listen
            Called with every event of the work; see `scialm_dask.events`.

        Returns
        -------
        dict
            The summary as it was written: with ``X``.

        Raises
        ------
        InputError
            If `dense` and `preserve_zeros` are both given, `keep_observed` without either, or a rule for
            `preserve_zeros` that is none, or of another matrix.
        OutputError
            If `path` cannot be written.
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
        """Return an AnnData whose X is the imputed matrix, as a lazy dense Dask array, with what `add_to` adds.

        It has ``obsm``, ``uns`` and ``layers`` of the store that was imputed, where that is still there with the same
        cells. All matrices are lazy. Take a part and ``to_memory()`` it; to write all of it to a store use `to_zarr`.
        """
        import anndata

        adata = anndata.AnnData(self.to_dask(), obs=self.obs.copy(), var=self.var.copy())
        add_source(adata, str(self.summary.get("source", "")))
        self.add_to(adata)
        return adata

    def add_to(self, adata: anndata.AnnData, key: str = _KEY) -> None:
        """Put the factors into an AnnData of the same cells and genes, as `impute` does.

        Parameters
        ----------
        adata
            Gets the embedding as ``obsm["X_" + key]``, the factors as ``obsm[key + "_factors"]`` and
            ``varm[key + "_factors"]``, λ as ``var[key + "_residual"]`` and notes as ``uns[key]``. What goes to ``obsm``
            is computed unless X is lazy. A view becomes an AnnData of its own.
        key
            Name.

        Raises
        ------
        InputError
            If its cells or genes are others. Those in another order get their own factors.
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
