"""How busy the image encoder is over a folder of photos, with reading and writing beside it and one after the other.

    python tests/bench/folder.py FOLDER OUTPUT.json [--count 500] [--onnx FOLDER --weights FILE ...]

Photos go round until there are as many as asked for. The encoder is busy for the median time that it and the scoring
take alone, from uint8 pixels to labels, for each photo of a batch, times the photos, over the time of the whole run;
the engines' loading and the texts' embedding are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from model_options import add_model_options  # noqa: E402

from enginerun import LABELS  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=500)
    add_model_options(parser)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--batch", type=int, default=1, help="photos a run of the network")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from lseg.benchmark import machine
    from lseg.image import read_image, to_pixels
    from lseg.labels import parse_labels
    from lseg.photos import Wanted, segment_photos
    from lseg.runner import EngineOptions, Timings, open_runner
    from lseg.sources import list_photos
    from lseg.tokenizer import Tokenizer
    from lseg.vocabulary import Vocabulary

    labels = parse_labels(LABELS)
    photos = list_photos([str(args.folder)])[0]
    options = EngineOptions(args.engines, args.precision, batch=args.batch)
    report = {"machine": machine(), "weights": Path(args.weights).stem, "photos": args.count}
    report |= {"batch": args.batch, "runs": []}
    with open_runner(args.backend, args.weights, args.onnx, engines=options) as runner:
        report["backend"] = str(runner.identity)
        text = runner.encode_text(Tokenizer()(labels.names))
        vocabulary = Vocabulary.of(labels)
        pixels = np.repeat(to_pixels(read_image(photos[0].shown), runner.image_size)[None], args.batch, axis=0)
        alone = [runner.segment(pixels, text).timings.milliseconds for _ in range(60)]
        median = float(np.median([sum(each.values()) for each in alone[10:]])) / args.batch
        report["encoder_alone_ms"] = median
        for overlap in (True, False, True):
            with tempfile.TemporaryDirectory() as folder:
                tasks = [(photos[i % len(photos)], Path(f"{i:05d}")) for i in range(args.count)]
                timings = Timings()
                start = time.perf_counter()
                wanted = Wanted(Path(folder), quiet=True, batch=args.batch)
                step = args.count if overlap else args.batch
                for first in range(0, args.count, step):
                    segment_photos(tasks[first : first + step], runner, text, vocabulary, wanted, timings, str)
                seconds = time.perf_counter() - start
            run = {"overlap": overlap, "seconds": seconds, "photos_per_second": args.count / seconds}
            run |= {"encoder_busy_percent": args.count * median / seconds / 10}
            report["runs"].append(run | {"milliseconds": timings.milliseconds})
            print(report["runs"][-1], flush=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_args())
