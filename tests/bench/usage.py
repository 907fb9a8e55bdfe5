"""What a machine is busy with while something runs: its cores, by kind of process, and its GPUs."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

EVERY = 0.25  # seconds from one look to the next
# Of a process's command line, which Ray's workers change with what they do: "workers" read, and write.
KINDS = {
    "OnTables": "network",
    "MapBatches(": "workers",
    "lseg_ray.py": "driver",
    "ray::": "ray",
    "-packages/ray/": "ray",
}
TICKS = os.sysconf("SC_CLK_TCK")


class Look(NamedTuple):
    """One look at the machine."""

    when: float  # seconds since the epoch, as files have them
    total: float  # CPU seconds of all processes since the machine started
    kinds: Counter[str]  # CPU seconds since the watch began, by what the processes are
    gpus: list[float]  # per cent of the time since the last look in which each GPU did something


class Usage:
    """Watches from now on, until `stop`."""

    def __init__(self) -> None:
        self.looks: list[Look] = []
        self._gpus: list[float] = []
        self._cpu: dict[str, float] = {}  # of each process at the last look
        self._kinds: Counter[str] = Counter()
        self._worked: dict[str, str] = {}  # what an idle worker did last: its work may be over before a look
        self._done = threading.Event()
        command = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "250"]
        try:
            self._smi = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self._smi = None  # no GPU here
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._read)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._smi:
            self._smi.kill()
            self._smi.wait()
        for thread in self._threads:
            thread.join()

    def between(self, start: float, end: float) -> dict[str, object]:
        """Means over a time, in seconds since the epoch: cores busy, in all and by kind; each GPU's busy share."""
        looks = [look for look in self.looks if start <= look.when <= end]
        if len(looks) < 2:
            return {}
        first, last = looks[0], looks[-1]
        seconds = last.when - first.when
        kinds = {kind: round((value - first.kinds[kind]) / seconds, 2) for kind, value in last.kinds.items()}
        gpus = [round(sum(each) / len(each), 1) for each in zip(*(look.gpus for look in looks), strict=False)]
        found = {"seconds": round(seconds, 1), "busy_cores": round((last.total - first.total) / seconds, 2)}
        return found | {"busy_cores_by": kinds, "gpus_busy_percent": gpus}

    def _watch(self) -> None:
        while not self._done.wait(EVERY):
            self._count()
            self.looks.append(Look(time.time(), cpu_seconds(), self._kinds.copy(), list(self._gpus)))

    def _count(self) -> None:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError, ValueError, IndexError):  # it has ended
                words = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
                spent = (int(words[11]) + int(words[12])) / TICKS
                if spent > self._cpu.get(pid, 0.0):
                    title = Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace")
                    kind = next((kind for part, kind in KINDS.items() if part in title), "other")
                    kind = self._worked.get(pid, kind) if "ray::IDLE" in title else kind
                    self._worked[pid] = kind
                    self._kinds[kind] += spent - self._cpu.get(pid, 0.0 if self.looks else spent)
                self._cpu[pid] = spent

    def _read(self) -> None:
        for line in self._smi.stdout if self._smi else ():
            with suppress(ValueError):  # a remark of the driver
                index, percent = (float(word) for word in line.split(","))
                self._gpus += [0.0] * (int(index) + 1 - len(self._gpus))
                self._gpus[int(index)] = percent


def cpu_seconds() -> float:
    """Of all cores, in any program."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / TICKS
