"""lseg_ray.py over a folder of photos with --save-labels, killed, then with --resume: each image once, none lost.

Rounds of three kinds. In one the run has a cluster of its own: all of it is killed, or the process alone that was
started, whose cluster must end with it. In the others it uses one that goes on, so that the next run may begin while
the killed one's workers still work; in one of these, workers are killed as well, which the run must survive. A resumed
run may hand out other parts than the killed one did.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import onnxruntime  # noqa: F401  # so that children need not import it
import pyarrow.parquet as pq
import ray.data  # noqa: F401
from checkpoints import write_tiny
from kills.export import export
from kills.folder import files_in
from kills.forked import in_child, rounds
from kills.rounds import Command, Settings
from kills.slow_stages import STAGES

import lseg_ray
from lseg import bulk, errors, run_onnxruntime, text_cache, tokenizer  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent.parent
PHOTOS = 16
LABELS = "sky, building, tree, road"
KINDS = 3
OWN, SHARED, WORKERS_DIE = range(KINDS)
ENDS = ("_labels.png", "_labels.json")
PARTS = (2, 3)  # sizes, of which each run chooses one
WORKERS = 3  # killed in a run at most: fewer than a part is tried again
MOMENT = 1.5  # seconds at most from one killed worker to the next
ENDED = 120  # seconds after which what is left counts as an orphan: workers that were just starting take half of it
AGENTS, AGENTS_ENDED = r"ray::\w+Agent", 180  # which try for a minute to tell the dead cluster of its death
PR_SET_PDEATHSIG = 1
CLUSTER = """
import ray, time
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False)
print("address", ray.get_runtime_context().gcs_address, flush=True)
time.sleep(10**6)
"""


class Bulk:
    two = False  # a second run is refused while another has the folder

    def __init__(self, settings: Settings):
        self.rng, self.report = settings.rng, settings.report
        self.made = settings.folder / "made"
        (self.made / "photos" / "below").mkdir(parents=True)
        rng = np.random.default_rng(settings.seed)
        for number in range(PHOTOS):
            pixels = rng.integers(0, 256, (*rng.integers(30, 90, 2), 3), dtype=np.uint8)
            path = self.made / "photos" / ("below" if number % 3 == 0 else "") / f"p{number:02d}.png"
            path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        self.weights = self.made / "tiny.safetensors"
        in_child(
            lambda: write_tiny(self.weights, settings.seed) and export(self.weights, self.made / "onnx", False),
            self.made,
        )
        # Short, since paths of sockets are; apart from the rounds' folder, since clusters outlive rounds.
        self.sessions = Path(tempfile.mkdtemp(prefix="lr-", dir="/tmp"))
        os.environ |= {"RAY_TMPDIR": str(self.sessions), "PYTHONPATH": str(ROOT / "tests")}
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
        os.environ["RAY_AUTH_MODE"] = (
            "disabled"  # the clusters are this machine's alone, and leave no token in the home
        )
        os.environ["RAY_worker_niceness"] = "0"  # or on a busy machine the workers would get no turn
        self.cluster, self.address, self.sessions_seen = None, None, set()

    def prepare(self) -> None:
        """Starts the cluster that goes on, and makes what is expected."""
        self.cluster = Command([sys.executable, "-c", CLUSTER], self.made / "cluster.txt", cwd=ROOT)
        end = time.monotonic() + 60
        while not (found := re.search(r"^address (\S+)$", self.cluster.log.read_text(), re.MULTILINE)):
            if self.cluster.wait(0.1) is not None or time.monotonic() > end:
                raise SystemExit(f"error: no cluster: {self.cluster.output()}")
            time.sleep(0.1)
        self.address = found[1]
        whole = self.made / "whole"
        whole.mkdir()
        in_child(lambda: self.segment(SHARED, PARTS[0], False), whole)
        self.rows = rows_in(whole / "out")
        self.maps = label_maps(whole / "out")
        if len(self.rows) != PHOTOS or len(self.maps) != 2 * PHOTOS:
            raise SystemExit(f"error: the undisturbed run gave {len(self.rows)} rows and {len(self.maps)} files")

    def end(self) -> None:
        if self.cluster:
            self.cluster.kill()
            self.sessions_seen.add(self.cluster.process.pid)
        for sentence in living(self.sessions_seen, AGENTS_ENDED):
            self.report.fault(0, f"after the last round, {sentence}")
        shutil.rmtree(self.sessions, ignore_errors=True)

    def begin(self, folder: Path, kind: int) -> None:
        """An empty folder, and whether its runs are killed alone or with their cluster."""
        self.alone = kind == OWN and folder.name == "round" and self.rng.random() < 0.5

    def work(self, kind: int, again: bool) -> object:
        with open("sessions", "a") as file:
            file.write(f"{os.getsid(0)}\n")
        if self.alone:
            return in_a_group_of_its_own(lambda: self.run(kind, again))
        return self.run(kind, again)

    def run(self, kind: int, again: bool) -> None:
        if kind == WORKERS_DIE:
            ticks = random.Random(self.rng.random())
            threading.Thread(target=self.kill_workers, args=(ticks, Path.cwd() / "died"), daemon=True).start()
        self.segment(kind, self.rng.choice(PARTS), again)

    def segment(self, kind: int, part: int, resume: bool) -> None:
        options = [str(self.made / "photos"), "--output", "out", "--save-labels", "--labels", LABELS, "--quiet"]
        options += ["--weights", str(self.weights), "--onnx", str(self.made / "onnx"), "--backend", "onnxruntime"]
        options += ["--part", str(part), "--batch", "1"]
        options += ["--resume"] if resume else []
        options += [] if kind == OWN else ["--address", self.address]
        errors.run(lambda: lseg_ray.main(lseg_ray.parse_args(options), STAGES))

    def kill_workers(self, ticks: random.Random, log: Path) -> None:
        """In a thread of the run: its readers, actors and writers, each with a line in a file."""
        for _ in range(WORKERS):
            time.sleep(ticks.uniform(0, MOMENT))
            found = [one for one in processes({self.cluster.process.pid}) if re.match(r"ray::.*(Map|IDLE)", one[1])]
            if found:
                pid, name = ticks.choice(found)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with open(log, "a") as file:
                    file.write(f"{name}\n")

    def left(self, folder: Path, kind: int) -> list[str]:
        """What stands in parts is whole, and each of its images has its label map."""
        wrong = self.orphans(folder)
        try:
            rows = rows_in(folder / "out")  # before the label maps, for workers may write still
        except Exception as error:
            return [*wrong, f"a part cannot be read: {error}"]
        found = label_maps(folder / "out")
        wrong += [f"{name} is not whole" for name, data in found.items() if data != self.maps.get(name)]
        for row in rows:
            if row not in self.rows:
                wrong.append(f"the parts have another row: {row}")
            wrong += [f"{name} is in a part and has no {end}" for name, end in missing(row, found)]
        names = [row["name"] for row in rows]
        wrong += [f"{name} is in two parts" for name in sorted(set(names)) if names.count(name) > 1]
        return wrong

    def done(self, folder: Path, kind: int) -> list[str]:
        if (folder / "died").exists():
            for name in (folder / "died").read_text().splitlines():
                self.report.count(f"killed workers: {re.split(r'[(.]', name)[0]}")
        wrong = self.orphans(folder)
        rows, found = rows_in(folder / "out"), label_maps(folder / "out")
        if rows != self.rows:
            names, there = [row["name"] for row in self.rows], [row["name"] for row in rows]
            lost, more = sorted(set(names) - set(there)), sorted({name for name in there if there.count(name) > 1})
            wrong.append(f"the rows are not the undisturbed run's: {lost} are lost, {more} doubled")
        for name in sorted(found.keys() | self.maps.keys()):
            if found.get(name) != self.maps.get(name):
                wrong.append(f"{name} is not as in the undisturbed run")
        return wrong

    def orphans(self, folder: Path) -> list[str]:
        """What lives on of the clusters whose runs have ended."""
        path = folder / "sessions"
        found = {int(line) for line in path.read_text().split()} if path.exists() else set()
        self.sessions_seen |= found
        return living(found, ENDED, but=AGENTS)


def living(sessions: Collection[int], seconds: float, but: str = "$.") -> list[str]:
    """Waits for all processes of these sessions to end, but those of these names; a sentence where they do not."""
    end = time.monotonic() + seconds
    while found := [one for one in processes(sessions) if not re.match(but, one[1])]:
        if time.monotonic() > end:
            return [f"{len(found)} processes of a cluster live on: {[name[-60:] for _, name in found[:3]]}"]
        time.sleep(0.05)
    return []


def processes(sessions: Collection[int]) -> list[tuple[int, str]]:
    """Processes of these sessions: numbers and command lines. Ray's workers keep the session of what started them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                state, *numbers = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(numbers[2]) in sessions and state not in "ZX":
                    name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    found.append((int(entry.name), name))
    return found


def in_a_group_of_its_own(work: Callable[[], object]) -> int:
    """Does the work in a process that nothing but its own death reaches: it dies with this one, and no other does."""
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)
        status = 1
        try:
            status = work() or 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return status


def rows_in(folder: Path) -> list[dict]:
    """Of all parts, by name; a name that stands there twice is there twice."""
    rows = [row for file in sorted(folder.glob("parts/*.parquet")) for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: row["name"])


def label_maps(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_in(folder).items() if name.endswith(ENDS)}


def missing(row: dict, found: dict[str, bytes]) -> list[tuple[str, str]]:
    return [(row["name"], end) for end in ENDS if f"{row['name']}{end}" not in found]


def run(settings: Settings) -> None:
    target = Bulk(settings)
    try:
        target.prepare()
        rounds(settings, target, KINDS, undisturbed_runs=1)
    finally:
        target.end()
