"""Times a change of words on the page: a new label for a photo whose embeddings are kept. Writes JSON.

    python tests/bench/page_words.py log/page_cpu_demo.json

The bundled photo, at two sizes, and the demo weights. One label more than the usual eight, new each time, so that it is
encoded: from the words to all that the browser gets. WARMUP turns, then RUNS.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

SIZES = ((640, 427), (4000, 3000))  # width, height
WARMUP, RUNS = 5, 20


def main(output: Path, backend: str = "onnxruntime") -> None:
    import cv2

    from enginerun import LABELS, PHOTO
    from lseg import Segmenter
    from lseg.benchmark import machine, summarise
    from lseg.image import read_image
    from lseg.page_work import Desk, Upload

    words, rows, about = LABELS.split(", "), [], machine()
    with Desk(Segmenter, backend=backend) as desk:
        for width, height in SIZES:
            photo = cv2.resize(read_image(PHOTO)[..., ::-1], (width, height), interpolation=cv2.INTER_CUBIC)
            upload = Upload("photo.jpg", cv2.imencode(".jpg", photo)[1].tobytes())
            start = time.perf_counter()
            key, _ = desk.open_photo(upload, words, desk.usual)
            opened = (time.perf_counter() - start) * 1e3
            taken: dict[str, list[float]] = {}
            for turn in range(WARMUP + RUNS):
                more = [*words, f"thing {uuid.uuid4().hex[:6]}"]
                start = time.perf_counter()
                found = desk.answer(key, more, desk.usual)
                total = (time.perf_counter() - start) * 1e3
                assert found["kept"]
                if turn >= WARMUP:
                    for stage, value in {**found["stages"], "total": total}.items():
                        taken.setdefault(stage, []).append(value)
            stages = {stage: summarise(values) for stage, values in taken.items() if any(values)}
            rows.append({"width": width, "height": height, "labels": len(words) + 1, "opened_ms": opened, **stages})
            print(
                f"{width} x {height}: opened in {opened:.0f} ms, new word {stages['total']['median']:.1f} ms",
                flush=True,
            )
        identity = str(desk.segmenter(desk.usual).runner.identity)
    found = {"weights": "demo", "made_by": identity, "machine": about, "rows": rows}
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
