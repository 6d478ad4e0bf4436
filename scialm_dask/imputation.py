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

from scialm_dask.arguments import checked, validated
from scialm_dask.data.annotated import add_result, aligned, as_matrix, match_names
from scialm_dask.data.annotation import positions_of
from scialm_dask.data.matrix import ExpressionMatrix, Observed
from scialm_dask.data.written import CHUNK_BYTES, ZeroRule
from scialm_dask.events import Listener, silent
from scialm_dask.reduction import check_held, stacked
from scialm_dask.solve.cell_model import CellModel
from scialm_dask.solve.embedding import Axes
from scialm_dask.solve.estimate import Estimate
from scialm_dask.solve.stored import KEY, follow, read_result, write_result
from scialm_dask.solve.transform import Fit, transform

if TYPE_CHECKING:
    import anndata
    import dask.array as da
    import pandas as pd

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
        self.stored = stored

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
        if self.stored is None or not self.summary.get("X"):
            return None
        return ExpressionMatrix.open(self.stored, observed=self.observed)

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
        estimate, apply = dask.delayed(self.estimate, traverse=False), dask.delayed(function)
        sizes = left.chunks[0]
        firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        pieces = [apply(estimate, *each) for each in zip(left.to_delayed().ravel(), firsts, strict=True)]
        return stacked(pieces, sizes, columns)

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
        rows, one_cell = positions_of(cells, self.obs.index, "cell")
        columns, one_gene = positions_of(genes, self.var.index, "gene")
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
        written = write_result(self, path, dense, keep_observed, preserve_zeros, overwrite, sources, listen)
        return self.summary | {"X": written}

    def to_anndata(self) -> anndata.AnnData:
        """Return an AnnData whose X is the imputed matrix, as a lazy dense Dask array, with what `add_to` adds.

        What is added to ``obsm`` is lazy too. Take a part and ``to_memory()`` it; to write all of it to a store use
        `to_zarr`.
        """
        import anndata

        adata = anndata.AnnData(self.to_dask(), obs=self.obs.copy(), var=self.var.copy())
        self.add_to(adata)
        return adata

    def add_to(self, adata: anndata.AnnData, key: str = KEY) -> None:
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
            uns={key: self.notes(None)},
        )

    def notes(self, written: dict[str, Any] | None) -> dict[str, Any]:
        """Return what is kept in ``uns``, beside an X that is as `written`, or not of ours."""
        summary = self.summary | {"X": written}
        notes = {"summary": json.dumps(summary), "history": self.history, "clip": self.clip}
        extra = {"model": self.model, "axes": self.axes}
        return notes | {name: vars(part).copy() for name, part in extra.items() if part is not None}


def _rows(estimate: Estimate, left: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    return estimate.rows(left, estimate.counts_of(slice(first, first + len(left))))
