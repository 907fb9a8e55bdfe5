"""Runs app.py with TensorRT on a GPU and asks it for label maps through Gradio's client, as a program would.

    python tests/gpu/check_page.py --onnx FOLDER --engines FOLDER --output log/page_gpu.json

Each label map is held against the one that `Segmenter` gives for the same photo and words: equal in windows; for a
photo seen whole, whose kept embeddings the page scores in float32 on the CPU, within fp16's bound. The demo weights.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cv2  # noqa: E402
from page_process import free_port, wait_until_up  # noqa: E402

from enginerun import LABELS, PHOTO  # noqa: E402
from lseg import Segmenter  # noqa: E402
from lseg.benchmark import machine, summarise  # noqa: E402
from lseg.variants import BOUNDS  # noqa: E402

RUNS = 30


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--precision", default="fp16", choices=BOUNDS)
    parser.add_argument("--backend", default="tensorrt", help="another, to try this script without a GPU")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from gradio_client import Client, handle_file

    words, port = LABELS.split(", "), free_port()
    places = ["--onnx", str(args.onnx), "--engines", str(args.engines)]
    script = [str(ROOT / "tests" / "gpu" / "typed_tensorrt8.py"), str(ROOT / "app.py")]
    command = [sys.executable, *script, "--backend", args.backend, "--precision", args.precision]
    command += ["--port", str(port), *places]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": folder}
        )
        try:
            wait_until_up(process, f"http://127.0.0.1:{port}", 200)
            client = Client(f"http://127.0.0.1:{port}", verbose=False)
            taken = []
            for turn in range(RUNS):
                start = time.perf_counter()
                line, label_map = client.predict(
                    photo=handle_file(str(PHOTO)), labels=words, inference="whole", api_name="/segment"
                )
                if turn >= 5:
                    taken.append((time.perf_counter() - start) * 1e3)
            windows, window_map = client.predict(
                photo=handle_file(str(PHOTO)), labels=words, inference="window", api_name="/segment"
            )
            found = {"whole": cv2.imread(label_map, -1), "window": cv2.imread(window_map, -1)}
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[0].decode()
    agreement = {}
    with Segmenter(backend=args.backend, onnx=args.onnx, engines=args.engines, precision=args.precision) as lseg:
        for mode, labels in found.items():
            agreement[mode] = 100 * float((lseg.segment(PHOTO, words, mode).labels == labels).mean())
    report = {"machine": machine(), "weights": "demo", "ran": line["ran"], "stages_ms": line["milliseconds"]}
    report |= {"whole_answer_ms": summarise(taken), "agreement_percent": agreement, "status": process.returncode}
    report["window_stages_ms"] = windows["milliseconds"]
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1), said)
    assert process.returncode == 0 and agreement["window"] == 100
    assert agreement["whole"] >= BOUNDS[args.precision].label_agreement


if __name__ == "__main__":
    main(parse_args())
