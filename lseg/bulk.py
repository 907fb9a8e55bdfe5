"""Bulk work on Ray: parts of images through decoding, the network and writing, on as many machines as there are."""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import re
import shlex
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lseg.bulk_inputs import Row, one_line
from lseg.bulk_stages import Engines, Network, Part, Wanted, decode, pack, write
from lseg.bulk_tables import OnTables, on_tables
from lseg.errors import UserError
from lseg.image import silent_stderr

ROOT = Path(__file__).resolve().parent.parent
SLOT = 0.5  # CPU slots of a worker that reads or writes: unlike an actor's, or Ray would put reading into the actors
TRIES = 5  # how often a part is tried on workers that die: an image may be what kills them
PART = 32  # images handed out together: 22 MB of pixels at 480 x 480
AHEAD = 2  # parts that an actor has in hand: one comes or goes while the network works on another
FEATURE_PART = 8  # with features, which are megabytes an image
LEAST, MOST = 256 << 20, 16 << 30  # bytes of a local cluster's object store: an eighth of the memory within these
ANSWER = 5.0  # seconds for a cluster to answer
QUIET = ("ray.data", "ray.data._internal.execution.streaming_executor")


class Places(NamedTuple):
    """Where the network runs."""

    actors: int
    gpus: float  # of each actor
    threads: int  # of each actor on a CPU; 0: the library's own choice


@dataclass(frozen=True)
class Stages:
    """The three stages: functions, and a class whose object is an actor."""

    decode: Callable[[Part, Wanted], Part] = decode
    network: type = Network
    write: Callable[[Part, Wanted], Part] = write


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A running Ray: the one at `address`, the one this process has already, or a new one on this machine.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of C++, on stderr: what fails comes as an exception
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without a GPU leave the variable alone
    try:
        import ray
        import ray.data  # noqa: F401  # asks for pyarrow
    except ImportError as error:
        raise UserError(
            f"Ray Data is not installed ({one_line(error)}): run 'pip install -r requirements-ray.txt'"
        ) from None
    if ray.is_initialized():
        yield
        return
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": path, "PYTHONUTF8": "1"}}}
    options |= {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if address:
        _check_address(address)
        options["address"] = address
    else:
        # Three slots at least: an actor has one whole slot, and what reads and writes must find one as well.
        slots = max(3, _cores())
        options["runtime_env"] |= interpreter()
        options |= {"address": "local", "num_cpus": slots, "include_dashboard": False, "object_store_memory": _memory()}
    try:
        with silent_stderr:  # it tells of the log level
            ray.init(**options)
    except Exception as error:  # Ray has several
        reason = one_line(error)
        if address:
            raise UserError(
                f"the Ray cluster at {address} does not take this process ({reason}): check --address; where it asks "
                "for a token, set RAY_AUTH_MODE=token"
            ) from None
        raise UserError(f"no Ray cluster starts on this machine ({reason}): mend that and try again") from None
    try:
        yield
    finally:
        with silent_stderr:  # of an interrupted run it tells of every worker that it ends
            ray.shutdown()


def interpreter() -> dict[str, str]:
    """Of a runtime environment, what lets workers start from a path with a space: Ray hands it to a shell."""
    quoted = shlex.quote(sys.executable)
    return {"py_executable": quoted} if quoted != sys.executable else {}


def _check_address(address: str) -> None:
    """A refused or silent address is told in seconds; Ray itself would try for a minute."""
    found = re.fullmatch(r"(?:ray://)?(\[[^\]]+\]|[^:/]+):(\d{1,5})", address)
    if address == "auto":
        return
    if not found or int(found[2]) > 65535:
        raise UserError(f"--address {address} is no address: give HOST:PORT, ray://HOST:PORT or 'auto'")
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), ANSWER).close()
    except OSError as error:
        raise UserError(
            f"the Ray cluster at {address} does not answer ({one_line(error)}): check --address, or leave it out to "
            "run on this machine"
        ) from None


def _memory() -> int:
    return max(LEAST, min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8, MOST))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def places(actors: int | None, backend: str) -> Places:
    """How many actors there are and what each gets, in the cluster that runs.

    An actor a GPU; without GPUs one a machine, with the machine's cores for threads.

    Raises:
        UserError: so many do not fit: reading and writing need a CPU slot too.
    """
    import ray

    have = ray.cluster_resources()
    gpus, slots = int(have.get("GPU", 0)), have.get("CPU", 0)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if backend == "tensorrt" and not gpus:
        raise UserError("Ray finds no GPU, which TensorRT needs: choose another --backend, or another cluster")
    count = actors or gpus or max(1, len(machines))
    if gpus and count > gpus:
        raise UserError(f"--actors {count} are more than the cluster's {gpus} GPUs: give at most one a GPU")
    if count + SLOT > slots:
        raise UserError(
            f"{count} actors would leave no CPU slot of the cluster's {slots:g} for reading and writing: give --actors "
            f"{max(1, int(slots - SLOT))} or fewer, or a larger cluster"
        )
    if gpus:
        return Places(count, 1, 0)
    cores = min(min(int(node["CPU"]) for node in machines), _cores() if len(machines) == 1 else 1 << 30)
    return Places(count, 0, max(1, cores * len(machines) // count) if count > len(machines) else cores)


def into_parts(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Parts of at most `size` images. Of a Parquet file's row group none are put together with others."""
    parts: list[list[Row]] = []
    for row in rows:
        last = parts[-1] if parts else []
        together = last and (last[0].group < 0) == (row.group < 0)
        if together and row.group >= 0:
            together = (last[0].path, last[0].group) == (row.path, row.group)
        if together and len(last) < size:
            last.append(row)
        else:
            parts.append([row])
    return parts


def run_parts(
    parts: Sequence[Sequence[Row]],
    engines: Engines,
    wanted: Wanted,
    text: np.ndarray | None,
    where: Places,
    quiet: bool = False,
    stages: Stages | None = None,
) -> Iterator[tuple[int, list[str]]]:
    """Does the parts, each at least once, in any order; a part that is done twice is written as the same file.

    Yields:
        of each part how many of its images were written, and a sentence on each that was not.

    Raises:
        UserError: a worker cannot do its work: a full disk, engines that are not there, memory that ends.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    for name in QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors come as exceptions, and become a sentence
    context = DataContext.get_current()
    context.enable_progress_bars = not quiet and sys.stderr.isatty()
    context.print_on_execution_start = False
    stages = stages or Stages()
    data = ray.data.from_items([pack(list(part)) for part in parts], override_num_blocks=len(parts))
    # A part is one row. For GPUs Ray wants to be told of a batch's size.
    whole = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    with warnings.catch_warnings():  # how often to try has no other way in, up to the newest version asked for
        warnings.simplefilter("ignore")
        slot = {"fn_kwargs": {"wanted": wanted}, "num_cpus": SLOT, "max_retries": TRIES}
        data = data.map_batches(on_tables(stages.decode), **whole, **slot)
        data = data.map_batches(
            OnTables,
            **whole,
            # Ray keeps these in its object store: one copy of the texts a machine, however many actors.
            fn_constructor_kwargs={"kind": stages.network, "engines": engines, "wanted": wanted, "text": text},
            compute=ActorPoolStrategy(size=where.actors, max_tasks_in_flight_per_actor=AHEAD + 1, **_threaded()),
            max_concurrency=AHEAD,
            num_cpus=1,
            num_gpus=where.gpus,
            max_restarts=-1,
            max_task_retries=TRIES,
            scheduling_strategy="SPREAD",
        )
        data = data.map_batches(on_tables(stages.write), **whole, **slot)
    try:
        for result in data.iter_rows():
            yield int(result["done"]), pickle.loads(result["bad"])
    except Exception as error:
        raise in_a_sentence(error) from None


def _threaded() -> dict[str, bool]:
    """Lets the parts that an actor has go through it at once; older Ray lets them be fetched and handed on at once."""
    from ray.data import ActorPoolStrategy

    name = "enable_true_multi_threading"
    return {name: True} if name in inspect.signature(ActorPoolStrategy).parameters else {}


def in_a_sentence(error: BaseException) -> UserError:
    """The sentence of a worker's error: a UserError's own, wherever it is in the chain."""
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop(0)
        if one is None or one in seen:
            continue
        if isinstance(one, UserError):
            return UserError(str(one.args[0]) if one.args else str(one))
        seen.append(one)
        queue += [getattr(one, "cause", None), one.__cause__, one.__context__]
    told = re.findall(r"lseg\.errors\.UserError: (.+)", str(error))  # of an actor that could not be made: text alone
    if told:
        return UserError(told[-1])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = (lines[-1] if lines else type(error).__name__)[:200]
    return UserError(
        f"Ray gave up ({type(error).__name__}: {reason}): what is written stays; mend that and go on with --resume"
    )
