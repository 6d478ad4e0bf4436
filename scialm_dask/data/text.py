"""Matrices in text, plain or gzip, read a few lines at a time: Matrix Market with tables of names, CSV and TSV."""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from scialm_dask.data.annotation import looks_like
from scialm_dask.data.temporary import Entries
from scialm_dask.errors import InputError
from scialm_dask.events import Advance

if TYPE_CHECKING:
    import pandas as pd

Axis = Literal["cells", "genes"]

_PIECE = 1 << 20  # entries parsed at once
_LONGEST_LINE = 1 << 20  # bytes of an entry, or of a name
_LONGEST_ROW = 1 << 28  # bytes of a row of a table
_UNREADABLE = (ValueError, OverflowError, EOFError, OSError, zlib.error)
_NOT_READ = "cannot be read"
_TABLE = re.compile(r"\.(csv|tsv|tab|txt)(\.gz)?$")
_MARKET = re.compile(r"\.mtx(\.gz)?$")


def open_text(path: str, prefix: str | None = None, rows: Axis | None = None) -> TextMatrix | None:
    """Open a matrix in text and read its header; None if `path` is no such matrix.

    It is a folder with matrix.mtx, barcodes.tsv and features.tsv or genes.tsv, as Cell Ranger and STARsolo write it,
    with `prefix` before these names; an .mtx file; or a table with names in its first line and column. `rows` says what
    the rows of a file are; by default its names do.
    """
    name = os.path.basename(path)
    if os.path.isdir(path):
        names = _folder(path, prefix)
        return MatrixMarket.open(_needed(*names, "matrix.mtx"), names=names)
    if _MARKET.search(name):
        stem = re.sub(r"matrix\.mtx(\.gz)?$", "", name)
        if stem != name and _found(os.path.dirname(path), stem, "barcodes.tsv"):
            return MatrixMarket.open(Path(path), names=(os.path.dirname(path), stem))
        if rows is None:
            raise InputError(f"{path}: has no names, so its rows may be cells or genes; say which by --rows")
        return MatrixMarket.open(Path(path), rows)
    return Table.open(Path(path), rows) if _TABLE.search(name) else None


def _folder(path: str, prefix: str | None) -> tuple[str, str]:
    """Return the folder of the one matrix below `path`, and the prefix of its name."""
    if _found(path, prefix or "", "matrix.mtx"):
        return path, prefix or ""
    ending = re.compile(rf"^{re.escape(prefix or '')}.*matrix\.mtx(\.gz)?$")
    for where in (Path(path).glob("*"), Path(path).glob("*/*"), Path(path).glob("*/*/*")):
        places = sorted({(str(p.parent), re.sub(r"matrix\.mtx.*", "", p.name)) for p in where if ending.search(p.name)})
        if len(places) > 1:
            folders = sorted({folder for folder, _ in places})
            here = " or ".join(f"--prefix {start}" for _, start in places) if len(folders) == 1 else ", ".join(folders)
            raise InputError(f"{path}: holds several matrices; give one of {here}")
        if places:
            return places[0]
    return path, prefix or ""


def _found(folder: str, prefix: str, *names: str) -> Path | None:
    paths = (Path(folder, f"{prefix}{name}{end}") for name in names for end in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _needed(folder: str, prefix: str, *names: str) -> Path:
    if (path := _found(folder, prefix, *names)) is None:
        names = tuple(prefix + name for name in names)
        raise InputError(f"{folder}: has no {' or '.join(names)}, plain or .gz; a 10x folder needs it")
    return path


class _Lines(io.RawIOBase):
    """A stream that raises `InputError` at a line of more than `longest` bytes, before it fills the memory."""

    def __init__(self, path: Path, longest: int) -> None:
        self._stream: Any = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
        self._path, self._longest, self._line = path, longest, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_read: int = self._stream.readinto(buffer)
        end = bytes(memoryview(buffer)[:n_read]).rfind(b"\n")
        self._line = self._line + n_read if end < 0 else n_read - end - 1
        if self._line > self._longest:
            raise InputError(f"{self._path}: has a line of more than {self._longest:,} bytes; fetch it again")
        return n_read

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def _stream(path: Path, problem: Callable[[], str], longest: int = _LONGEST_LINE) -> Iterator[IO[bytes]]:
    """Open a file for reading; raises `InputError` for whatever is wrong with it, as `problem` says."""
    try:
        with io.BufferedReader(_Lines(path, longest), 1 << 16) as stream:
            yield stream
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path}: {problem()} ({str(error).strip()}); fetch it again") from error


@dataclass(frozen=True)
class _Text:
    """A matrix in a text file with a header that was read."""

    path: Path
    rows: Axis  # what the rows of the file are
    shape: tuple[int, int]  # cells × features
    dtype: np.dtype[Any]  # int32 for whole numbers, else float32
    n_entries: int  # non-zeros, as far as the header says


@dataclass(frozen=True)
class MatrixMarket(_Text):
    """A Matrix Market file."""

    names: tuple[str, str] | None  # folder and prefix of the tables of names

    @classmethod
    def open(cls, path: Path, rows: Axis = "genes", names: tuple[str, str] | None = None) -> MatrixMarket:
        """Read the header."""
        with _stream(path, lambda: "not a Matrix Market file") as stream:
            banner = stream.readline().decode().lower().split()
            line = stream.readline()
            while line.startswith(b"%") or (line and not line.strip()):
                line = stream.readline()
            if len(sizes := [int(word) for word in line.split()]) != 3:
                raise ValueError(f"{len(sizes)} sizes")
        if banner not in [["%%matrixmarket", "matrix", "coordinate", kind, "general"] for kind in ("integer", "real")]:
            wanted = "give '%%MatrixMarket matrix coordinate integer general', or real"
            raise InputError(f"{path}: its first line is {' '.join(banner)!r}; {wanted}")
        n_rows, n_columns, n_entries = sizes
        if 0 in (n_rows, n_columns):
            raise InputError(f"{path}: shape {(n_rows, n_columns)}; a matrix of at least one cell and gene is needed")
        shape = (n_columns, n_rows) if rows == "genes" else (n_rows, n_columns)
        return cls(path, rows, shape, np.dtype(np.int32 if banner[3] == "integer" else np.float32), n_entries, names)

    def annotation(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return data frames of cells and features, features by name, numbered if there are no names."""
        import pandas as pd

        if self.names is None:
            obs, var = (pd.DataFrame(index=pd.RangeIndex(n).astype(str)) for n in self.shape)
            return obs, var
        barcodes = _table(_needed(*self.names, "barcodes.tsv"), self.shape[0])
        features = _table(_needed(*self.names, "features.tsv", "genes.tsv"), self.shape[1])
        obs = pd.DataFrame(index=pd.Index(barcodes[0].to_numpy()))
        var = pd.DataFrame(index=pd.Index(features[min(1, features.shape[1] - 1)].to_numpy()))
        for column, name in {0: "gene_ids", 2: "feature_types"}.items():
            if column < features.shape[1]:
                var[name] = features[column].to_numpy()
        return obs, var

    def entries(self, advance: Advance) -> Iterator[Entries]:
        """Yield the entries in the order of the file, some at a time."""
        import pandas as pd

        n_read = 0
        kind = np.int64 if self.dtype.kind == "i" else np.float32
        types = {"row": np.int64, "column": np.int64, "value": kind}
        # names replace the line of sizes
        how = {"sep": r"\s+", "header": 0, "names": list(types), "dtype": types, "comment": "%", "chunksize": _PIECE}
        with (
            _stream(self.path, lambda: f"cannot be read after entry {n_read}") as stream,
            suppress(pd.errors.EmptyDataError),
            pd.read_csv(stream, **how) as parts,
        ):
            for part in parts:
                if not isinstance(part.index, pd.RangeIndex):  # made from a fourth column
                    raise ValueError("a line of more than 3 numbers")
                n_read += len(part)
                if len(part):
                    yield self._entries(part)
                advance(len(part) / max(1, self.n_entries))
        if n_read != self.n_entries:
            raise InputError(f"{self.path}: {n_read} entries, {self.n_entries} announced; fetch it again")

    def _entries(self, part: pd.DataFrame) -> Entries:
        values = part["value"].to_numpy()
        if self.dtype.kind == "i" and values.max() > np.iinfo(self.dtype).max:
            raise InputError(f"{self.path}: count {values.max()} is too large for {self.dtype}; fetch it again")
        places = [part["column"].to_numpy() - 1, part["row"].to_numpy() - 1]
        cells, genes = places if self.rows == "genes" else places[::-1]
        for what, index, size in (("cell", cells, self.shape[0]), ("gene", genes, self.shape[1])):
            wrong = (index < 0) | (index >= size)
            if wrong.any():
                raise InputError(f"{self.path}: {what} {index[wrong][0] + 1} is outside 1 to {size}; fetch it again")
        return Entries(cells, genes.astype(np.int32), values.astype(self.dtype))


def _table(path: Path, length: int) -> pd.DataFrame:
    """Return a table of names; raises `InputError` unless all its lines have as many columns as the first."""
    import pandas as pd

    with _stream(path, lambda: _NOT_READ) as stream:
        lines = [line.rstrip("\r\n").split("\t") for line in io.TextIOWrapper(stream)]
    lines = [line for line in lines if line != [""]]
    for number, line in enumerate(lines, 1):
        if len(line) != len(lines[0]):
            n = len(line)
            raise InputError(f"{path}: line {number} has {n} columns, and the first {len(lines[0])}; fetch it again")
    if len(lines) != length:
        raise InputError(f"{path}: {len(lines)} lines, but the matrix has {length}; the files do not belong together")
    return pd.DataFrame(lines)


@dataclass(frozen=True)
class Table(_Text):
    """A table in text with names in its first line and column; zeros are no entries."""

    lines: list[str]  # their names
    columns: list[str]
    separator: bytes

    @classmethod
    def open(cls, path: Path, rows: Axis | None) -> Table:
        """Read the file once, for the names, the type of the values and the number of non-zeros."""
        import pandas as pd

        lines: list[str] = []
        whole, n_entries, width = True, 0, -1
        with _stream(path, lambda: _NOT_READ, _LONGEST_ROW) as stream:
            header = stream.readline().rstrip(b"\r\n")
            separator = max((b"\t", b",", b";", b" "), key=header.count)
            columns = [_unquoted(word) for word in header.split(separator)]
            for line in filter(bytes.strip, stream):
                first, _, rest = line.rstrip(b"\r\n").partition(separator)
                lines.append(_unquoted(first))
                whole = whole and not re.search(rb"[.eEnN]", rest)
                width = rest.count(separator) + 1 if width < 0 else width
                n_entries += width - rest.count(separator + b"0")
        columns = columns[1:] if width + 1 == len(columns) else columns  # the corner may have a name, or none
        if width != len(columns):
            raise InputError(f"{path}: not a table with names in its first line and column; give one, or an .h5ad")
        if rows is None:
            of_lines, of_columns = looks_like(pd.Index(lines)), looks_like(pd.Index(columns))
            if of_lines == of_columns:
                names = f"{', '.join(lines[:2])} by {', '.join(columns[:2])}"
                raise InputError(f"{path}: its rows may be cells or genes ({names}); say which by --rows")
            rows = of_lines or ("genes" if of_columns == "cells" else "cells")
        shape = (len(lines), len(columns)) if rows == "cells" else (len(columns), len(lines))
        kind = np.dtype(np.int32 if whole else np.float32)
        return cls(path, rows, shape, kind, n_entries, lines, columns, separator)

    def annotation(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return data frames of cells and genes."""
        import pandas as pd

        lines, columns = pd.DataFrame(index=pd.Index(self.lines)), pd.DataFrame(index=pd.Index(self.columns))
        return (lines, columns) if self.rows == "cells" else (columns, lines)

    def entries(self, advance: Advance) -> Iterator[Entries]:
        """Yield the non-zeros of some lines at a time."""
        step = max(1, _PIECE // len(self.columns))
        with _stream(self.path, lambda: _NOT_READ, _LONGEST_ROW) as stream:
            stream.readline()
            for start in range(0, len(self.lines), step):
                stop = min(start + step, len(self.lines))
                dense = np.stack([self._values(number, stream.readline()) for number in range(start, stop)])
                at, across = np.nonzero(dense)
                values = dense[at, across].astype(self.dtype)
                cells, genes = (at + start, across) if self.rows == "cells" else (across, at + start)
                if len(values):
                    yield Entries(cells, genes.astype(np.int32), values)
                advance((stop - start) / len(self.lines))

    def _values(self, number: int, line: bytes) -> Any:
        words = line.rstrip(b"\r\n").split(self.separator)[1:]
        try:
            values = np.array(words).astype(np.float64)
            if len(values) != len(self.columns) or (self.dtype.kind == "i" and values.max() > np.iinfo(np.int32).max):
                raise ValueError(f"{len(values)} values, the largest {values.max(initial=0):g}")
        except ValueError as error:
            what = f"line {number + 2}, of {self.lines[number]!r}, holds no {len(self.columns)} numbers ({error})"
            raise InputError(f"{self.path}: {what}; mend it, or fetch the file again") from error
        return values


TextMatrix = MatrixMarket | Table


def _unquoted(word: bytes) -> str:
    return word.decode(errors="replace").strip().strip('"')
