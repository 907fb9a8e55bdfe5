"""Many visitors at once on the page, for minutes: is every answer right, every refusal clear, and memory flat?

    python tests/bench/page_load.py --minutes 10 --output log/page_load_cpu_demo.json

app.py runs in a process of its own on a free port of 127.0.0.1, with the demo weights, ONNX Runtime and the CPU. Each
of the clients goes on until the time is over: programs that ask the API, browsers with the page open that change
words, files that are no photos, words that do not do, and connections that are closed in the middle. Each label map
must be, pixel by pixel, the one computed beforehand for its photo and words; only where the two best cosines are nearer
than NEAR may either label stand, for the page scores kept embeddings in NumPy and the API in ONNX Runtime. Exits with 1
where an answer was wrong, an error was no clear refusal, the server printed a traceback or reached for another machine,
or its memory grew by more than GROWTH.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from page_visitor import How, Refused, Server, Tab, Wrong, ask_api

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

NEAR = 2e-5  # as tests/equality.py has it for float32
GROWTH = 1.10  # the last minute's median of the server's memory over the second minute's, at most
SIZES = ((640, 427), (480, 480), (1200, 800), (320, 240))  # width, height
WORDS = (
    ("sky", "building", "tree", "road", "other"),
    ("temple", "garden", "sky"),
    ("roof", "grass", "water", "person", "other"),
    ("house", "tree"),
    ("building", "sky", "fence", "sign", "pole", "car", "pavement", "bicyclist"),
    tuple(f"thing {number}" for number in range(60)),
)
MANY = [f"word {number}" for number in range(300)]
CHANGES = 4  # of words, for a photo that is open
# How often a client does what; the first three are answered, the others refused or left.
TURNS = {"api": 6, "page": 4, "pixels": 1, "no photo": 2, "cut short": 1, "empty": 1, "no words": 1, "too many": 1}
TURNS |= {"left upload": 1, "left call": 1, "left page": 1}
SENTENCES = ("is not an image", "cut short", "is empty", "no label is given", "are too many", "Queue is full")
SENTENCES += ("is no longer kept on the server", "made room for others'")


def make_photos(rng: random.Random) -> dict[str, bytes]:
    """JPEGs, each another part of the bundled photo."""
    from enginerun import PHOTO

    photo, found = cv2.imread(str(PHOTO)), {}
    for number, (width, height) in enumerate(SIZES):
        left, top = (rng.randrange(side // 4) for side in photo.shape[1::-1])
        part = photo[top : top + photo.shape[0] * 3 // 4, left : left + photo.shape[1] * 3 // 4]
        resized = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
        found[f"photo{number}.jpg"] = cv2.imencode(".jpg", resized)[1].tobytes()
    return found


class Wanted(NamedTuple):
    """A label map, and where two labels are as near as each other."""

    labels: np.ndarray  # [H, W]
    ties: np.ndarray  # bool [H, W]


def answers_of(photos: dict[str, bytes], folder: Path) -> tuple[dict[tuple[str, tuple[str, ...]], Wanted], str]:
    """Every photo's label map for every list of words, one at a time; and what made them."""
    from lseg import Segmenter
    from lseg.page_work import Desk, Upload

    found = {}
    with Desk(lambda weights, backend: Segmenter(weights, backend, onnx=folder), backend="onnxruntime") as desk:
        for name, data in photos.items():
            for words in WORDS:
                key, _ = desk.open_photo(Upload(name, data), words, desk.usual)
                labels = decode(desk.download(key, "labels")[1])
                found[name, words] = Wanted(labels, near_ties(desk.kept.get(key), labels.shape))
                desk.kept.drop(key)
        return found, str(desk.segmenter(desk.usual).runner.identity)


def near_ties(photo: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Where the two best cosines of a kept photo are nearer than NEAR, bool of the shape."""
    from lseg.image import labels_to_photo
    from lseg.windows import resize_aligned

    text, side = photo.answer.text, photo.grid.shape[1]
    scores = np.tensordot(text, photo.grid, 1).reshape(len(text), side, side)
    best = np.partition(resize_aligned(scores, *photo.answer.labels.shape), -2, axis=0)[-2:]
    return labels_to_photo(best[1] - best[0] < NEAR, *shape[::-1])


def decode(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)


class Tally:
    """What happened, counted by all clients; times are of the wall clock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.turns: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.faults: list[str] = []
        self.milliseconds: dict[str, list[float]] = {}
        self.label_maps = 0
        self.near_ties = 0  # pixels with the other label

    def timed(self, kind: str, start: float) -> None:
        with self.lock:
            self.milliseconds.setdefault(kind, []).append((time.perf_counter() - start) * 1e3)

    def refused(self, turn: str, text: str) -> None:
        known = next((sentence for sentence in SENTENCES if sentence in text), None)
        with self.lock:
            if known is None or (turn in ("api", "page", "pixels") and known not in SENTENCES[-3:]):
                self.faults.append(f"{turn}: refused without a reason: {text[:300]}")
            else:
                self.refusals[f"{turn}: {known}"] += 1

    def wrong(self, turn: str, error: object) -> None:
        with self.lock:
            self.faults.append(f"{turn}: {type(error).__name__}: {error}"[:500])


class Client:
    """Does one thing after the other until the time is over."""

    def __init__(self, server: Server, how: How, photos: dict, wanted: dict, tally: Tally, seed: int):
        self.server, self.how, self.photos, self.wanted, self.tally = server, how, photos, wanted, tally
        self.rng = random.Random(seed)

    def run(self, end: float) -> None:
        turns, weights = list(TURNS), list(TURNS.values())
        while time.monotonic() < end:
            turn = self.rng.choices(turns, weights)[0]
            with self.tally.lock:
                self.tally.turns[turn] += 1
            try:
                self.turn(turn)
            except Refused as refusal:
                self.tally.refused(turn, str(refusal))
            except Exception as error:  # whatever it is, it is told
                self.tally.wrong(turn, error)

    def turn(self, turn: str) -> None:
        name, words = self.rng.choice(list(self.photos)), self.rng.choice(WORDS)
        data = self.photos[name]
        if turn == "left upload":
            self.server.upload_half(name, data)
        elif turn in ("page", "pixels", "left page"):
            with Tab(self.server, self.how) as tab:
                self.visit(tab, turn, name, words)
        else:
            bad = {"no photo": b"a letter, not a photo", "cut short": data[: len(data) // 2], "empty": b""}
            given = {"no words": (), "too many": MANY}.get(turn, words)
            start = time.perf_counter()
            file = self.server.upload(name, bad.get(turn, data))
            found = ask_api(self.server, file, given, self.how, leave=turn == "left call")
            if found:
                self.tally.timed("api", start)
                if turn != "api":
                    raise Wrong("it was answered")
                line, png = found
                self.compare(png, name, words)
                if {label["name"] for label in line["labels"]} - set(words):
                    raise Wrong(f"other labels than {words}: {line['labels']}")

    def visit(self, tab: Tab, turn: str, name: str, words: tuple[str, ...]) -> None:
        start = time.perf_counter()
        file = self.server.upload(name, self.photos[name])
        if tab.open(file, words, leave=turn == "left page") is None:
            return
        self.tally.timed("page: photo", start)
        self.compare(tab.label_map(), name, words)
        for _ in range(CHANGES):
            words = self.rng.choice([other for other in WORDS if other != words])
            start = time.perf_counter()
            shown = tab.change(words)
            self.tally.timed("page: words" if shown["kept"] else "page: words, embeddings gone", start)
            self.compare(tab.label_map(), name, words)
            if turn == "pixels":
                self.point(tab, name, words)

    def point(self, tab: Tab, name: str, words: tuple[str, ...]) -> None:
        labels, ties = self.wanted[name, words]
        y, x = (self.rng.randrange(side) for side in labels.shape)
        start = time.perf_counter()
        try:
            best = tab.viewer("pixel", x=x, y=y)["scores"][0]["name"]
            self.tally.timed("page: pixel", start)
        except Refused as refusal:
            self.tally.refused("pixels", str(refusal))
            return
        if best != words[labels[y, x]] and not ties[y, x]:
            raise Wrong(f"{name}, pixel {x} {y} is {best}, not {words[labels[y, x]]}")
        if "map" not in tab.viewer("heat", index=0):
            raise Wrong("no heat map")

    def compare(self, png: bytes, name: str, words: tuple[str, ...]) -> None:
        found, (wanted, ties) = decode(png), self.wanted[name, words]
        if found is None or found.shape != wanted.shape:
            raise Wrong(f"{name}, {words}: no label map of {wanted.shape}")
        others = found != wanted
        with self.tally.lock:
            self.tally.label_maps += 1
            self.tally.near_ties += int((others & ties).sum())
        if different := int((others & ~ties).sum()):
            raise Wrong(f"{name}, {words[:8]}: {different} pixels of {wanted.size} have another label")


def watch(pid: int, start: float, end: float, samples: list[dict[str, float]]) -> None:
    """Each second: the process's memory in MiB, its threads and open files, and the machine's load."""
    while time.monotonic() < end:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        sample = {"rss": int(status["VmRSS"].split()[0]) / 1024, "threads": int(status["Threads"])}
        sample |= {"files": len(os.listdir(f"/proc/{pid}/fd")), "load": os.getloadavg()[0]}
        samples.append({"second": time.monotonic() - start, **sample})
        time.sleep(1)


def by_minute(samples: list[dict[str, float]]) -> list[dict[str, float]]:
    """Medians of each minute."""
    rows = []
    for minute in range(int(samples[-1]["second"] // 60) + 1):
        part = [sample for sample in samples if sample["second"] // 60 == minute]
        if len(part) > 30:
            names = ("rss", "threads", "files", "load")
            rows.append({name: round(statistics.median(sample[name] for sample in part), 2) for name in names})
    return rows


def drain(page: Any, lines: list[str]) -> None:
    """Takes what the server prints: a full pipe would hold it up."""
    for raw in page.process.stdout:
        lines.append(raw.decode(errors="replace").rstrip())


def load(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from page_process import serve

    from lseg.benchmark import machine

    rng, onnx = random.Random(args.seed), folder / "onnx"
    load_before, photos = os.getloadavg(), make_photos(rng)
    wanted, made_by = answers_of(photos, onnx)
    print(f"{len(wanted)} label maps computed by {made_by}", flush=True)
    tally, samples, printed = Tally(), [], []
    with serve(folder / "page", onnx, "--backend", "onnxruntime", "--quiet") as page:
        threading.Thread(target=drain, args=(page, printed), daemon=True).start()
        server, start = Server(page.address), time.monotonic()
        how = How("whole", "demo", "onnxruntime")
        end = start + args.minutes * 60
        clients = [Client(server, how, photos, wanted, tally, rng.randrange(2**31)) for _ in range(args.clients)]
        threads = [threading.Thread(target=client.run, args=(end,), daemon=True) for client in clients]
        threads += [threading.Thread(target=watch, args=(page.process.pid, start, end, samples), daemon=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(args.minutes * 60 + 300)
            if thread.is_alive():
                tally.wrong("a client", "did not come to its end")
        seconds = time.monotonic() - start
        ended = page.process.poll() is not None
        left = {"files": len(page.files()), "mib": round(sum(path.stat().st_size for path in page.files()) / 2**20, 1)}
        reached = page.attempts.read_text()
    minutes, done = by_minute(samples), sum(tally.turns.values())
    growth = minutes[-1]["rss"] / minutes[1]["rss"] if len(minutes) > 2 else None
    faults = tally.faults + [f"printed: {line}" for line in printed if "Error" in line or "Traceback" in line]
    faults += [f"reached for another machine: {reached}"] if reached else []
    faults += ["the server ended"] if ended else []
    faults += [f"memory grew by the factor {growth:.3f}"] if growth and growth > GROWTH else []
    summary = {
        kind: {"answers": len(values), **{f"p{p}": round(float(np.percentile(values, p)), 1) for p in (50, 99)}}
        for kind, values in sorted(tally.milliseconds.items())
    }
    return {
        "weights": "demo",
        "made_by": made_by,
        "machine": machine(),
        "clients": args.clients,
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "turns": dict(tally.turns),
        "turns_a_second": round(done / seconds, 2),
        "label_maps_compared": tally.label_maps,
        "pixels_with_the_other_of_two_near_labels": tally.near_ties,
        "milliseconds": summary,
        "refusals": dict(sorted(tally.refusals.items())),
        "faults": len(faults),
        "faults_first": faults[:20],
        "printed_first": printed[:100],
        "memory_mib_growth": growth and round(growth, 4),
        "memory_bound": GROWTH,
        "minutes": minutes,
        "visitors_files_at_the_end": left,
        "load_average_before": [round(value, 2) for value in load_before],
        "note": "the clients ran on the server's own cores; minutes: medians of the server's memory (MiB), threads and "
        "open files, and of the machine's load average, other work included",
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="default: a fresh one")
    parser.add_argument("--output", type=Path, help="a JSON of all figures")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="page-load-") as folder:
        found = load(args, Path(folder))
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
