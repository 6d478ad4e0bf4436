"""Finding and starting workers: the one file that knows `Client`, `LocalCluster` and dask-jobqueue."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import format_bytes, parse_bytes

from scialm_dask.config import Count, bytes_of, checked, configured, seconds_of, validated
from scialm_dask.errors import ClusterError, InputError
from scialm_dask.reduction import current_client, n_threads, workers_of
from scialm_dask.run import interruption
from scialm_dask.run.interruption import check_processes, losses_explained, quiet_end, while_workers

if TYPE_CHECKING:
    from distributed import Client, Security

_JOBQUEUE = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "sge": "SGECluster", "lsf": "LSFCluster"}
CLUSTERS = ("local", *_JOBQUEUE)
_RETRIES = 10  # of a lost connection, so that a run of hours survives a minute without network
# Restarting a worker may take a while on a busy machine.
_RESTARTS = {"distributed.deploy.lost-worker-timeout": "5m"}
_ANSWER = 30  # seconds to wait for an answer from workers, which may be busy
_SAME_EVERYWHERE = ("python", "dask", "distributed", "scialm_dask")


@dataclass(frozen=True)
class Workers:
    """The processes that compute."""

    workers: int  # number of processes
    threads: int  # of each process
    memory: int | None  # bytes at which a worker pauses; None without a limit
    resident: int | None = None  # bytes that the largest worker uses now; None for threads of this process


@contextmanager
@checked
def connect(
    scheduler: str | None = None,
    *,
    scheduler_file: str | os.PathLike[str] | None = None,
    cluster: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    worker_memory: str | None = None,
    tls: bool | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Iterator[Client | None]:
    """Find or start workers for the computations of a ``with`` block.

    Options not given come from Dask's configuration, namespace ``scialm``. A cluster started here listens on the
    loopback interface, or on the interface that dask-jobqueue's configuration names, and is closed at the end.

    Parameters
    ----------
    scheduler : str, optional
        Address of a running scheduler.
    scheduler_file : str or path-like, optional
        The file that ``dask scheduler --scheduler-file`` writes; it may still be starting.
    cluster : {"local", "slurm", "pbs", "sge", "lsf"}, optional
        Cluster to start; dask-jobqueue's configuration describes its jobs. Without any of these three options, threads
        of this process compute.
    workers : int, optional
        Number of worker processes of `cluster`, or to wait for at a running scheduler.
    threads : int, optional
        Threads of each worker; without a cluster, of this process.
    worker_memory : str, optional
        Memory of each worker, such as ``"8GB"``.
    tls : bool, optional
        Encrypt and authenticate all connections: with a certificate made for this cluster alone or, for a running
        scheduler, with the files that Dask's configuration names under ``distributed.comm.tls``.
    notify : callable, optional
        Called with a line of text when this waits for workers, or goes on with fewer.

    Yields
    ------
    distributed.Client or None
        None for threads of this process.

    Raises
    ------
    InputError
        If options contradict each other, or need a program or package that is missing.
    ClusterError
        If the scheduler does not answer, no worker comes, or workers are lost later.

    Examples
    --------
    >>> import numpy as np, scialm_dask
    >>> counts = np.random.default_rng(0).poisson([[1, 5] * 20, [5, 1] * 20] * 30)
    >>> with scialm_dask.connect(threads=1):
    ...     result = scialm_dask.impute(counts)
    """
    if scheduler is scheduler_file is cluster is None:
        scheduler, scheduler_file, cluster = map(configured, ("scheduler", "scheduler-file", "cluster"))
    _check_places(scheduler, scheduler_file, cluster, workers=workers, threads=threads, memory=worker_memory, tls=tls)
    workers, threads = configured("workers", workers), configured("threads", threads)
    worker_memory, tls = configured("worker-memory", worker_memory), bool(configured("tls", tls))
    validated("workers", workers, Count | None)
    validated("threads", threads, Count | None)
    bytes_of("worker memory", worker_memory)
    if scheduler is scheduler_file is cluster is None:
        with dask.config.set({} if threads is None else {"num_workers": threads}):
            yield None
        return
    import distributed  # noqa: F401  (adds its settings to Dask's)

    with ExitStack() as stack:
        # Runs take hours, and send V, some megabytes, to every worker in each pass.
        retries = dask.config.get("distributed.comm.retry.count") or _RETRIES
        patient = {"comm.retry.count": retries, "admin.large-graph-warning-threshold": "1GB"}
        stack.enter_context(dask.config.set({f"distributed.{key}": value for key, value in patient.items()}))
        if cluster is None:
            client = stack.enter_context(_standing(scheduler, scheduler_file, tls))
            wanted = workers or 1
        else:
            start = _local if cluster == "local" else _jobqueue
            client, wanted = start(stack, cluster, workers, threads, worker_memory, _temporary(tls))
        _wait(client, wanted, notify)
        _same_versions(client)
        with losses_explained(), quiet_end(client, ours=cluster is not None), while_workers(client):
            try:
                yield client
            except KeyboardInterrupt:
                if cluster is not None:  # asyncio would report futures of the client that are never awaited
                    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
                raise


def workers_here() -> Workers:
    """Return the processes that would compute now."""
    if not (workers := workers_of(current_client())):
        return Workers(1, n_threads(), None)
    pause = float(dask.config.get("distributed.worker.memory.pause") or 1)
    limits = [worker["memory_limit"] for worker in workers.values() if worker["memory_limit"]]
    threads = max(worker["nthreads"] for worker in workers.values())
    resident = max(int(worker["metrics"]["memory"]) for worker in workers.values())
    return Workers(len(workers), threads, int(pause * min(limits)) if limits else None, resident)


def ask_everyone(question: Callable[[], int]) -> list[int]:
    """Return the answers of this process and, on a cluster, of its workers and scheduler.

    Each process answers once; processes that do not answer are skipped. Workers must be able to import the function.
    """
    client, answers = current_client(), dict([_signed(question)])
    if client is not None:
        # The cluster may be gone, or its scheduler may lack this package.
        with contextlib.suppress(Exception):
            answers |= client.run(_signed, question, on_error="ignore", callback_timeout=_ANSWER).values()
            answers |= [client.run_on_scheduler(_signed, question, callback_timeout=_ANSWER)]
    return list(answers.values())


def _signed(question: Callable[[], int]) -> tuple[tuple[str, int], int]:
    """Return the answer after the identity of this process, as workers may be threads of the one that asks."""
    return (socket.gethostname(), os.getpid()), question()


def _check_places(scheduler: Any, scheduler_file: Any, cluster: Any, **given: Any) -> None:
    """Raise `InputError` for options that contradict each other."""
    places = {"--scheduler": scheduler, "--scheduler-file": scheduler_file, "--cluster": cluster}
    named = [option for option, value in places.items() if value is not None]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} exclude each other; give one of them")
    if cluster is not None and cluster not in CLUSTERS:
        raise InputError(f"cluster is {cluster!r}; choose one of {', '.join(CLUSTERS)}")
    if given["workers"] is not None and not named:
        raise InputError("--workers counts other processes; give --cluster, --scheduler or --scheduler-file too")
    if given["memory"] is not None and cluster is None:
        raise InputError("--worker-memory describes a cluster to start; give --cluster too")
    if cluster is None and named and given["threads"] is not None:
        raise InputError(f"--threads goes with --cluster, or alone; the workers of {named[0]} have theirs already")
    if given["tls"] and not named:
        raise InputError("--tls is for workers in other processes; give --cluster, --scheduler or --scheduler-file too")


def _standing(scheduler: str | None, scheduler_file: Any, tls: bool) -> Client:
    """Connect to a running scheduler."""
    from distributed import Client

    timeout = seconds_of("connect-timeout")
    address = scheduler or _address_in(scheduler_file, timeout)
    if tls and "://" not in address:
        address = f"tls://{address}"
    if tls and not address.startswith("tls://"):
        raise InputError(f"{address}: not encrypted, and --tls was given; give the address as tls://HOST:PORT")
    security = _from_files() if address.startswith("tls://") else None
    try:
        # A client that fails to connect would stay Dask's default, and later computations would fail too.
        Client(address, timeout=timeout, security=security, set_as_default=False).close()
        return Client(address, timeout=timeout, security=security)
    except ValueError as error:
        raise InputError(
            f"{address}: not an address ({error}); give it as tcp://HOST:PORT or tls://HOST:PORT"
        ) from error
    except (OSError, TimeoutError) as error:
        raise ClusterError(
            f"{address}: no scheduler answered within {timeout:g} s; check that it runs and can be reached from here, "
            "and that both sides or neither use TLS"
        ) from error


def _address_in(scheduler_file: str | os.PathLike[str], timeout: float) -> str:
    """Return the address in a scheduler file, waiting for it to be written."""
    path = os.fspath(scheduler_file)
    end = time.monotonic() + timeout
    while True:
        try:
            with open(path) as file:
                return str(json.load(file)["address"])
        except FileNotFoundError:
            problem = "no such file"
        except (ValueError, KeyError, TypeError, OSError, UnicodeDecodeError):
            problem = "not what a scheduler writes"
        if time.monotonic() > end:
            raise ClusterError(
                f"{path}: {problem} after {timeout:g} s; start `dask scheduler --scheduler-file {path}` on a "
                "disk that both see"
            )
        time.sleep(0.05)


def _from_files() -> Security:
    """Return TLS settings with the files that Dask's configuration names."""
    from distributed import Security

    for key in ("ca-file", "client.cert"):
        path = dask.config.get(f"distributed.comm.tls.{key}")
        if path is None:
            raise InputError(f"distributed.comm.tls.{key} is not set in Dask's configuration; TLS needs that file")
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; it is distributed.comm.tls.{key} of Dask's configuration")
    return Security(require_encryption=True)


def _temporary(tls: bool) -> Security | None:
    """Return TLS settings with a new certificate for this cluster alone, or None."""
    if not tls:
        return None
    from distributed import Security

    try:
        return Security.temporary()
    except ImportError as error:
        raise InputError("--tls needs cryptography; pip install 'scialm-dask[tls]'") from error


def _local(
    stack: ExitStack, _: str, workers: int | None, threads: int | None, memory: str | None, security: Security | None
) -> tuple[Client, int]:
    """Start worker processes on this machine."""
    from distributed import Client, LocalCluster

    preload = [*(dask.config.get("distributed.worker.preload") or ()), interruption.__name__]
    stack.enter_context(dask.config.set({**_RESTARTS, "distributed.worker.preload": preload}))
    with interruption.ignored_by_children():
        check_processes()
        started = stack.enter_context(
            LocalCluster(
                n_workers=workers,
                threads_per_worker=threads,
                memory_limit=memory or "auto",
                host="127.0.0.1",
                dashboard_address=configured("dashboard-address"),
                security=security,
            )
        )
    return stack.enter_context(Client(started)), len(started.workers)


def _jobqueue(
    stack: ExitStack, name: str, workers: int | None, threads: int | None, memory: str | None, security: Security | None
) -> tuple[Client, int]:
    """Submit jobs that run workers, as dask-jobqueue's configuration describes them."""
    from distributed import Client

    def get(key: str) -> Any:
        return dask.config.get(f"jobqueue.{name}.{key}", None)

    if workers is None:
        raise InputError(f"--cluster {name} needs a number of --workers")
    kind = _jobqueue_class(name)
    # By default dask-jobqueue would listen on all interfaces, and start many small processes.
    of_scheduler = {"dashboard_address": configured("dashboard-address"), **(get("scheduler-options") or {})}
    if get("interface") is None and not {"host", "interface"} & of_scheduler.keys():
        raise InputError(
            f"jobqueue.{name}.interface is not set in Dask's configuration; name the network interface by which "
            "workers reach this machine, such as ib0, or lo if they run here"
        )
    processes = get("processes") or 1
    options: dict[str, Any] = {"processes": processes, "scheduler_options": of_scheduler}
    if threads is not None:
        options["cores"] = threads * processes
    if memory is not None:
        options["memory"] = format_bytes(parse_bytes(memory) * processes)
    for option, key in {"threads": "cores", "worker-memory": "memory"}.items():
        if options.get(key, get(key)) is None:
            raise InputError(f"--cluster {name} needs --{option}, or jobqueue.{name}.{key} in Dask's configuration")
    if security is not None and get("shared-temp-directory") is None:
        options["shared_temp_directory"] = os.getcwd()  # readable by this user alone, removed at the end
    started = stack.enter_context(kind(**options, security=security))
    jobs = -(-workers // processes)
    _submit(started, jobs)
    started.adapt(minimum_jobs=jobs, maximum_jobs=jobs)  # replaces jobs that end or are cancelled
    return stack.enter_context(Client(started)), workers


def _submit(started: Any, jobs: int) -> None:
    """Submit the first jobs, and raise `ClusterError` if they are refused, which `scale` would only log."""
    from distributed import Status

    async def all_of_them() -> None:
        await started

    for _ in range(jobs):
        started.worker_spec.update(started.new_worker_spec())
    try:
        started.sync(all_of_them)
    except RuntimeError as error:
        for job in started.workers.values():
            job.status = Status.failed  # else the cluster cannot be closed, as jobs were never started
        words = [line for line in str(error).splitlines() if line.strip()]
        raise ClusterError(f"the job was refused: {words[-1]}") from error


def _jobqueue_class(name: str) -> Any:
    try:
        kind = getattr(importlib.import_module("dask_jobqueue"), _JOBQUEUE[name])
    except ImportError as error:
        raise InputError(f"--cluster {name} needs dask-jobqueue; pip install 'scialm-dask[jobqueue]'") from error
    program = shlex.split(kind.job_cls.submit_command)[0]
    if shutil.which(program) is None:
        raise InputError(
            f"--cluster {name} submits jobs by `{program}`, which is not on PATH; run this on a login node"
        )
    return kind


def _wait(client: Client, wanted: int, notify: Callable[[str], None]) -> None:
    """Wait for all workers or, after a timeout, go on with those that came."""
    if len(workers_of(client)) >= wanted:
        return
    timeout = seconds_of("worker-timeout")
    notify(f"waiting for {wanted} worker{'s' * (wanted > 1)}, {timeout:g} s at most")
    try:
        client.wait_for_workers(wanted, timeout=timeout)
    except TimeoutError:
        here = len(workers_of(client))
        if here == 0:
            raise ClusterError(
                f"{client.scheduler.address}: no worker came within {timeout:g} s; look at the queue and the logs of "
                "the jobs, or raise scialm.worker-timeout in Dask's configuration"
            ) from None
        notify(f"going on with {here} of {wanted} workers")


def _same_versions(client: Client) -> None:
    """Raise `ClusterError` if processes have other versions than this one: they would fail later, less clearly."""
    found = client.get_versions(packages=["scialm_dask"])
    here = found["client"]["packages"]
    everyone = {"the scheduler": found["scheduler"], **{f"worker {k}": v for k, v in found["workers"].items()}}
    for who, what in everyone.items():
        for package in _SAME_EVERYWHERE:
            theirs, ours = _short(package, what["packages"].get(package)), _short(package, here[package])
            if theirs != ours:
                raise ClusterError(
                    f"{who} has {package} {theirs or '(missing)'}, this process {ours}; install the same on both"
                )


def _short(package: str, version: str | None) -> str | None:
    return ".".join(version.split(".")[:2]) if package == "python" and version else version
