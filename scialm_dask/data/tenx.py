"""What 10x Genomics software writes: matrices in HDF5 (.h5) and in Matrix Market folders (MEX)."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from scialm_dask.data.rows import StoredRows
from scialm_dask.data.store import open_store
from scialm_dask.data.transpose import Entries
from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MatrixMarket", "h5_annotation", "h5_group", "h5_rows", "is_10x_h5"]

_PIECE = 1 << 20  # entries of a text file parsed at once


def is_10x_h5(store: Any) -> bool:
    """Tell whether an open HDF5 file is 10x's rather than AnnData's."""
    return "X" not in store and any("barcodes" in group for group in store.values() if hasattr(group, "keys"))


def h5_group(path: str, genome: str | None) -> str:
    """Name of the group that holds the matrix: ``matrix``, or in files of before 2018 that of a genome."""
    store = open_store(path)
    groups = [name for name, group in store.items() if hasattr(group, "keys") and "barcodes" in group]
    if genome is None and len(groups) > 1:
        raise InputError(f"{path}: holds the genomes {', '.join(groups)}; choose one with --genome")
    if genome is not None and "matrix" not in groups and genome not in groups:
        raise InputError(f"{path}: has no genome {genome}; it holds {', '.join(groups)}")
    return genome if genome is not None and genome in groups else str(groups[0])


def h5_rows(path: str, group: str) -> StoredRows:
    """Cells × features of a 10x .h5 file, which stores them by cells."""
    element = open_store(path)[group]
    absent = [name for name in ("data", "indices", "indptr", "shape") if name not in element]
    if absent:
        raise InputError(f"{path}: group {group} has no {', '.join(absent)}; the file is damaged, fetch it again")
    shape = tuple(int(n) for n in np.ravel(element["shape"][()]))[::-1]
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{path}: shape {shape}; a matrix of at least one cell and gene is needed")
    return StoredRows(path, group, "csr_matrix", (shape[0], shape[1]))


def h5_annotation(rows: StoredRows) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells and features of a 10x .h5 file, features by name."""
    import pandas as pd

    element = open_store(rows.path)[rows.element]

    def strings(name: str, length: int) -> Any:
        if name not in element:
            raise InputError(f"{rows.name}: has no {name}; the file is damaged, fetch it again")
        try:
            found = element[name].asstr()[:]
        except (AttributeError, TypeError, ValueError, OSError) as error:
            raise InputError(f"{rows.name}: {name} cannot be read ({error}); fetch the file again") from error
        if len(found) != length:
            raise InputError(f"{rows.name}: {len(found)} {name}, but the matrix has {length}; fetch the file again")
        return found

    n_cells, n_features = rows.shape
    obs = pd.DataFrame(index=pd.Index(strings("barcodes", n_cells)))
    if rows.element == "matrix":
        columns = {"gene_ids": "features/id", "feature_types": "features/feature_type", "genome": "features/genome"}
        names = strings("features/name", n_features)
    else:
        columns, names = {"gene_ids": "genes"}, strings("gene_names", n_features)
    given = {key: strings(name, n_features) for key, name in columns.items() if name in element}
    return obs, pd.DataFrame(given, index=pd.Index(names))


@dataclass(frozen=True)
class MatrixMarket:
    """A folder with matrix.mtx, barcodes.tsv and features.tsv or genes.tsv, plain or gzip."""

    folder: str
    matrix: Path
    header: tuple[str, int, int, int]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> MatrixMarket:
        """Find the files and read the header of the matrix."""
        folder = os.fspath(folder)
        matrix = _find(folder, "matrix.mtx")
        with _stream(matrix) as stream:
            header = _header(stream, matrix)
        if 0 in header[1:3]:
            raise InputError(f"{matrix}: shape {header[1:3]}; a matrix of at least one cell and one gene is needed")
        return cls(folder, matrix, header)

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × features."""
        return self.header[2], self.header[1]

    @property
    def n_entries(self) -> int:
        """Number of entries that the header announces."""
        return self.header[3]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values: int32 for ``integer`` files, else float32."""
        return np.dtype(np.int32 if self.header[0] == "integer" else np.float32)

    def annotation(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Cells and features, features by name."""
        import pandas as pd

        barcodes = _table(_find(self.folder, "barcodes.tsv"), self.shape[0])
        features = _table(_find(self.folder, "features.tsv", "genes.tsv"), self.shape[1])
        obs = pd.DataFrame(index=pd.Index(barcodes[0].to_numpy()))
        var = pd.DataFrame(index=pd.Index(features[min(1, features.shape[1] - 1)].to_numpy()))
        for column, name in {0: "gene_ids", 2: "feature_types"}.items():
            if column < features.shape[1]:
                var[name] = features[column].to_numpy()
        return obs, var

    def entries(self) -> Iterator[Entries]:
        """Parse the entries, in the order of the file, some at a time."""
        import pandas as pd

        n_read = 0
        kind = np.int64 if self.dtype.kind == "i" else np.float32
        types = {"row": np.int64, "column": np.int64, "value": kind}
        how = {"sep": r"\s+", "header": None, "names": list(types), "dtype": types, "comment": "%", "chunksize": _PIECE}
        try:
            with _stream(self.matrix) as stream:
                _header(stream, self.matrix)
                with pd.read_csv(stream, **how) as parts:
                    for part in parts:
                        n_read += len(part)
                        if len(part):
                            yield self._checked(part)
        except pd.errors.EmptyDataError:
            pass
        except InputError:
            raise
        except (ValueError, OverflowError, EOFError, OSError, zlib.error) as error:
            raise InputError(f"{self.matrix}: cannot be read after entry {n_read} ({error}); fetch it again") from error
        if n_read != self.n_entries:
            raise InputError(f"{self.matrix}: {n_read} entries, {self.n_entries} announced; fetch it again")

    def _checked(self, part: pd.DataFrame) -> Entries:
        values = part["value"].to_numpy()
        if self.dtype.kind == "i" and values.max() > np.iinfo(self.dtype).max:
            raise InputError(f"{self.matrix}: count {values.max()} is too large for {self.dtype}; fetch it again")
        entries = Entries(part["column"].to_numpy() - 1, part["row"].to_numpy() - 1, values.astype(self.dtype))
        for what, index, size in (("cell", entries.rows, self.shape[0]), ("gene", entries.columns, self.shape[1])):
            wrong = (index < 0) | (index >= size)
            if wrong.any():
                raise InputError(f"{self.matrix}: {what} {index[wrong][0] + 1} is outside 1 to {size}; fetch it again")
        return entries._replace(columns=entries.columns.astype(np.int32))


def _find(folder: str, *names: str) -> Path:
    for name in names:
        for candidate in (Path(folder, name), Path(folder, name + ".gz")):
            if candidate.is_file():
                return candidate
    raise InputError(f"{folder}: has no {' or '.join(names)}, plain or .gz; a 10x folder needs it")


def _stream(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _header(stream: IO[bytes], path: Path) -> tuple[str, int, int, int]:
    """Read up to the line of sizes; give the kind of the values, rows, columns and entries."""
    try:
        banner = stream.readline().decode().lower().split()
        line = stream.readline()
        while line.startswith(b"%") or (line and not line.strip()):
            line = stream.readline()
        n_rows, n_columns, n_entries = (int(word) for word in line.split())
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: not a Matrix Market file ({error}); fetch it again") from error
    if banner[:3] != ["%%matrixmarket", "matrix", "coordinate"] or banner[3:] not in (
        ["integer", "general"],
        ["real", "general"],
    ):
        raise InputError(
            f"{path}: its first line is {' '.join(banner)!r}; "
            "give '%%MatrixMarket matrix coordinate integer general', or real"
        )
    return banner[3], n_rows, n_columns, n_entries


def _table(path: Path, length: int) -> pd.DataFrame:
    import pandas as pd

    try:
        table = pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch it again") from error
    if len(table) != length:
        raise InputError(f"{path}: {len(table)} lines, but the matrix has {length}; the files do not belong together")
    return table
