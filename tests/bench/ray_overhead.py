"""Times the same photos through enginerun.py and lseg_ray.py on this machine, and writes JSON.

    python tests/bench/ray_overhead.py log/ray_cpu_demo.json 500

Crops of the bundled photo, 480 x 360, eight labels, the demo weights, ONNX Runtime. Each script runs in a process of
its own, once to warm the disk on a tenth of the photos and once for the figure. Both write label maps. enginerun.py
draws a picture a photo besides, which it cannot leave out; lseg_ray.py has a cluster to start, which its own seconds
leave out and the process's include.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
SIZE = (480, 360)  # width, height


def make_photos(folder: Path, count: int) -> None:
    import cv2
    import numpy as np

    from lseg.image import read_image, write_image

    photo, rng = read_image(ROOT / "image" / "temple.jpg"), np.random.default_rng(0)
    height, width = photo.shape[:2]
    for index in range(count):
        y, x = (int(rng.integers(0, side // 2)) for side in (height, width))
        crop = photo[y : y + height // 2, x : x + width // 2]
        write_image(folder / f"{index:05d}.jpg", cv2.resize(crop, SIZE, interpolation=cv2.INTER_AREA))


def measure(script: str, photos: Path, output: Path) -> dict:
    command = [sys.executable, str(ROOT / script), str(photos), "--output", str(output), "--save-labels"]
    command += ["--backend", "onnxruntime"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    (found,) = re.findall(r"(\d+) (?:photos|images) in ([\d.]+) s,", done.stdout)
    count, work = int(found[0]), float(found[1])
    row = {"script": script, "images": count, "process_seconds": round(seconds, 1), "work_seconds": work}
    return row | {"images_a_second": round(count / work, 2)}


def main(output: Path, count: int = 500) -> None:
    from lseg.benchmark import machine

    rows, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photos(folder / "photos", count)
        make_photos(folder / "few", max(1, count // 10))
        for script in ("enginerun.py", "lseg_ray.py"):
            measure(script, folder / "few", folder / f"few_{script}")
            rows.append(measure(script, folder / "photos", folder / script))
            print(rows[-1], flush=True)
        same = [
            file.read_bytes() == (folder / "lseg_ray.py" / file.name).read_bytes()
            for file in sorted((folder / "enginerun.py").glob("*_labels.png"))
        ]
    about = {"weights": "demo", "size": SIZE, "machine": machine(), "load_before": round(load, 2)}
    about |= {"ray": __import__("ray").__version__, "label_maps_equal": [sum(same), len(same)]}
    output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
