"""All methods that can be compared, by name: our presets, the peers, and functions of others."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from scialm_dask.api import impute
from scialm_dask.compare import peers
from scialm_dask.compare.peers import Task
from scialm_dask.config import Settings, preset
from scialm_dask.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

OURS = ("denoise", "complete", "paper")
_ELLIPSES = ("...", "…")


@dataclass(frozen=True)
class Method:
    """A way to complete a matrix.

    Parameters
    ----------
    label
        What figures call it.
    takes
        The matrix it wants: raw counts, counts normalised to one total, or the former where they are known.
    complete
        Turns a `Task` into a dense matrix, a pair of factors or an `Imputation`, on the scale that it takes.
    needs
        Modules that must be there, and are imported before time and memory are taken.
    seconds
        About what it takes on one core, imports included: to begin with, and for each million of entries, zeros too.
    """

    label: str
    takes: Literal["counts", "normalised", "either"]
    complete: Callable[[Task], Any]
    needs: tuple[str, ...] = ()
    seconds: tuple[float, float] = (5.0, 0.5)


def _ours(name: str) -> Callable[[Task], Any]:
    def complete(task: Task) -> Any:
        result = impute(task.path, preset=name, **{"seed": task.seed, **task.settings})
        task.note = f"rank {result.rank}, {result.summary['passes']} passes"
        return result

    return complete


_RUN = ("scialm_dask.run.job",)
METHODS = {
    "denoise": Method("scIALM denoise", "counts", _ours("denoise"), _RUN, (8, 0.1)),
    "complete": Method("scIALM complete", "normalised", _ours("complete"), _RUN, (10, 0.5)),
    "paper": Method("scIALM as published", "normalised", _ours("paper"), _RUN, (8, 10)),
    "magic": Method("MAGIC", "normalised", peers.magic, ("magic",), (10, 0.4)),
    "scvi": Method("scVI", "counts", peers.scvi, ("anndata", "scvi"), (30, 20)),
    "alra": Method("ALRA", "counts", peers.alra, ("sklearn.utils.extmath",), (5, 0.2)),
    "knn": Method("kNN smoothing", "counts", peers.knn, ("sklearn.decomposition", "sklearn.neighbors"), (5, 0.2)),
    "softimpute": Method("softImpute", "normalised", peers.softimpute, ("scipy.sparse.linalg",), (40, 1)),
    "gene-mean": Method("gene mean", "normalised", peers.gene_mean, (), (5, 0.02)),
    "auto": Method("scIALM auto", "either", _ours("auto"), _RUN, (5, 0.1)),  # one of the first two
}


class Quoted(NamedTuple):
    """What the publication's text says of a method that is not run here; the rest is in its figures alone."""

    label: str
    scores: dict[str, dict[str, float]]
    words: str


_COMPARED = "10 % masked: Pearson of scIALM higher by 3.2 % (PBMC) and 2.1 % (Klein), cosine by 3.5 % and 6.78 %"
QUOTED = {
    "dca": Quoted("DCA", {}, _COMPARED),
    "saver": Quoted("SAVER", {"PBMC": {"pearson": 0.7768}, "Campbell": {"pearson": 0.3389}}, "10 % masked"),
    "scimpute": Quoted("scImpute", {"PBMC": {"mse": 32.9176}, "Klein": {"mse": 288.8302}}, "10 % masked"),
}


@dataclass(frozen=True)
class Contestant:
    """A method, by name, at some settings: fields of `Settings` that are swept."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The settings in words, empty where there are none."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items())


def label_of(method: str, setting: str = "") -> str:
    """Return what figures and tables call a method."""
    known = METHODS.get(method) or QUOTED.get(method)
    return f"{known.label if known else method} {setting}".strip()


def labelled(scores: pd.DataFrame) -> pd.DataFrame:
    """Add a column ``label``, what figures call the method of each row."""
    return scores.assign(label=list(map(label_of, scores["method"], scores["setting"])))


def find_method(name: str) -> Method:
    """Look a method up by its name, or import it as ``module:function``.

    The function takes a `Task` and returns a completed matrix on the scale of the normalised counts that it is given;
    where it has an attribute ``takes`` that is ``"counts"``, it is given those.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, function = name.partition(":")
    if not function:
        known = ", ".join([*METHODS, *QUOTED, "peers", "all"])
        raise InputError(f"no method is called {name!r}; choose from {known}, or give your own as module:function")
    try:
        complete = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"method {name} cannot be imported ({error}); check its name and PYTHONPATH") from error
    return Method(function, getattr(complete, "takes", "normalised"), complete)


def contestants(names: Iterable[str], sweeps: Iterable[str] = ()) -> list[Contestant]:
    """List what is compared, in order and once each.

    Parameters
    ----------
    names
        Of methods; ``"peers"`` and ``"all"`` stand for several. Quoted ones are left out.
    sweeps
        Such as ``"max_rank=10,20,…,50"``: our presets are run at each value, and at each combination of values
        of several sweeps. Values that hold commas are parted by semicolons.

    Raises
    ------
    InputError
        If a method, a field or a value is not valid, or a preset does not use the field.
    """
    listed: list[Contestant] = []
    names, sweeps = list(dict.fromkeys(expanded(names))), list(sweeps)
    if sweeps and not set(names) & set(OURS):
        raise InputError(f"sweep is {sweeps[0]!r}, but no method has settings to sweep; add denoise, complete or paper")
    combinations = [dict(pairs) for pairs in itertools.product(*map(_sweep, sweeps))]
    for name in names:
        if name in QUOTED:
            continue
        find_method(name)
        for combination in combinations if name in OURS else [{}]:
            if name in OURS:
                preset(name, **combination)
            listed.append(Contestant(name, combination))
    return listed


def expanded(names: Iterable[str]) -> list[str]:
    """Put names for ``"peers"`` and ``"all"``."""
    runnable = [name for name in METHODS if name != "auto"]
    groups = {"peers": [*(name for name in runnable if name not in OURS), *QUOTED], "all": [*runnable, *QUOTED]}
    return [each for name in names for each in groups.get(name, [name])]


def _sweep(words: str) -> list[tuple[str, Any]]:
    """Read ``field=value,value,…`` into pairs."""
    name, equals, listed = words.partition("=")
    types: dict[str, type[Any]] = {f.name: type(f.default) for f in fields(Settings)}
    name = name.strip().replace("-", "_")
    if not equals or name not in types:
        raise InputError(f"sweep is {words!r}; give field=value,value with a field out of {', '.join(types)}")
    values = [value.strip() for value in listed.split(";" if ";" in listed else ",")]
    read: Callable[[str], Any] = types[name] if types[name] in (int, float) else str
    try:
        return [(name, read(value)) for value in _filled(values)]
    except (ValueError, IndexError):
        raise InputError(
            f"sweep is {words!r}; give values of {name} with commas between, such as 10,20,30 or 10,20,…,100"
        ) from None


def _filled(values: list[str]) -> list[str]:
    """Put for an ellipsis the even steps that it stands for."""
    if not set(values) & set(_ELLIPSES):
        return values
    at = next(i for i, value in enumerate(values) if value in _ELLIPSES)
    before, first, last = (int(values[i]) for i in (max(at - 2, 0), at - 1, at + 1))
    return values[:at] + [str(v) for v in range(2 * first - before, last, first - before)] + values[at + 1 :]
