"""Runs app.py with TensorRT on a GPU, asks it for label maps, and times its answers. Writes JSON.

    python tests/gpu/check_page.py --onnx FOLDER --engines FOLDER --output log/page_gpu.json

Each label map is held against what `Segmenter` gives for the same photo and words: the API's equal, whole and in
windows; the page's, which scores kept embeddings in float32 on the CPU, within the precision's bound. The demo weights.

Timed over HTTP from this machine, from the first byte sent to the last received, WARMUP turns, then RUNS, in each turn
one of every kind: "api" (upload, /segment, the label map), "api_new_word" (the same with a label that is new each time
and so embedded), "api_client" (Gradio's client instead, as programs use it), "page_photo" (upload and answer) and
"page_new_word" (a label more for the photo that is open). "stages" are the server's own milliseconds of the last turn.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from page_process import free_port, wait_until_up  # noqa: E402
from page_visitor import How, Server, Tab, ask_api  # noqa: E402

from enginerun import LABELS, PHOTO  # noqa: E402
from lseg import Segmenter  # noqa: E402
from lseg.benchmark import machine, summarise  # noqa: E402
from lseg.variants import BOUNDS  # noqa: E402

WARMUP, RUNS = 10, 100


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--precision", default="fp16", choices=BOUNDS)
    parser.add_argument("--runs", type=int, default=RUNS, help=f"timed turns (default: {RUNS})")
    parser.add_argument("--backend", default="tensorrt", help="another, to try this script without a GPU")
    return parser.parse_args()


def decode(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)


def ask(address: str, backend: str, words: list[str], runs: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Label maps of each kind of call for the words, and the times of `runs` calls of each."""
    server, client = Server(address), Client(address, verbose=False)
    how, photo = How("whole", "demo", backend), PHOTO.read_bytes()
    maps: dict[str, np.ndarray] = {}
    taken: dict[str, list[float]] = {}
    stages: dict[str, dict] = {}

    def clock(kind: str, start: float, found: dict) -> None:
        taken.setdefault(kind, []).append((time.perf_counter() - start) * 1e3)
        stages[kind] = found

    for _ in range(WARMUP + runs):
        for kind, given in (("api", words), ("api_new_word", new_word(words))):
            start = time.perf_counter()
            line, png = ask_api(server, server.upload("photo.jpg", photo), given, how)
            clock(kind, start, line["milliseconds"])
            maps[kind] = decode(png)
        start = time.perf_counter()
        line, path = client.predict(photo=handle_file(str(PHOTO)), labels=words, api_name="/segment")
        clock("api_client", start, line["milliseconds"])
        maps["api_client"] = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        with Tab(server, how) as tab:
            start = time.perf_counter()
            shown = tab.open(server.upload("photo.jpg", photo), words)
            clock("page_photo", start, shown["stages"])
            maps["page"] = decode(tab.label_map())
            start = time.perf_counter()
            shown = tab.change(new_word(words))
            clock("page_new_word", start, shown["stages"])
            assert shown["kept"], "the embeddings were not kept: the network ran"
    del maps["api_new_word"]
    line, png = ask_api(server, server.upload("photo.jpg", photo), words, how._replace(inference="window"))
    maps["window"], stages["window"] = decode(png), line["milliseconds"]
    times = {kind: summarise(values[WARMUP:]) for kind, values in taken.items()}
    return maps, {"ran": line["ran"].split("; inference")[0], "milliseconds": times, "stages": stages}


def new_word(words: list[str]) -> list[str]:
    return [*words, f"thing {uuid.uuid4().hex[:6]}"]


def main(args: argparse.Namespace) -> None:
    words, port = LABELS.split(", "), free_port()
    places = ["--onnx", str(args.onnx), "--engines", str(args.engines)]
    script = [str(ROOT / "tests" / "gpu" / "typed_tensorrt8.py")] if args.backend == "tensorrt" else []
    command = [sys.executable, *script, str(ROOT / "app.py"), "--backend", args.backend, "--precision", args.precision]
    command += ["--port", str(port), *places]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": folder}
        )
        try:
            wait_until_up(process, f"http://127.0.0.1:{port}", 200)
            maps, found = ask(f"http://127.0.0.1:{port}", args.backend, words, args.runs)
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[0].decode()
    agreement = {}
    with Segmenter(backend=args.backend, onnx=args.onnx, engines=args.engines, precision=args.precision) as lseg:
        wanted = {mode: lseg.segment(PHOTO, words, mode).labels for mode in ("whole", "window")}
    for kind, labels in maps.items():
        agreement[kind] = 100 * float((wanted["window" if kind == "window" else "whole"] == labels).mean())
    report = {"machine": machine(), "weights": "demo", "photo": "640 x 427", "labels": len(words), **found}
    report |= {"agreement_percent": agreement, "status": process.returncode}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1), said)
    assert process.returncode == 0 and "Traceback" not in said
    assert {agreement[kind] for kind in ("api", "api_client", "window")} == {100}
    assert agreement["page"] >= BOUNDS[args.precision].label_agreement


if __name__ == "__main__":
    main(parse_args())
