"""Checks and times the TensorRT backend on a GPU, and writes what it finds as JSON.

    python tests/gpu/check_tensorrt.py --output log/gpu.json --reference REF.npz --dataset camvid/test
    python tests/gpu/check_tensorrt.py --output log/gpu_full.json --onnx FULL --speed \
        --weights FULL/random_vit_l16.safetensors

REF.npz comes from `make_reference.py`: PyTorch float32 label maps and texts, so that this runs without torch.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from lseg.benchmark import machine, summarise  # noqa: E402
from lseg.cuda import Device  # noqa: E402
from lseg.features import Features  # noqa: E402
from lseg.image import labels_to_photo, read_image, to_pixels  # noqa: E402
from lseg.inference import label_photo  # noqa: E402
from lseg.metrics import class_iou, confusion  # noqa: E402
from lseg.run_tensorrt import TensorRTRunner  # noqa: E402
from lseg.runner import EngineOptions  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, default=ROOT / "onnx")
    parser.add_argument("--weights", default="demo")
    parser.add_argument("--engines", type=Path, default=ROOT / "engines")
    parser.add_argument("--reference", type=Path, help="label maps to agree with")
    parser.add_argument("--dataset", type=Path, help="images and masks of the reference")
    parser.add_argument("--forms", default="fp32:4d,fp16:4d", help="precision:matmul pairs")
    parser.add_argument("--speed", action="store_true", help="time only")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--soak", type=int, default=10000, help="runs of the endurance check")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    import tensorrt

    report = {"machine": machine(), "tensorrt": tensorrt.__version__, "weights": Path(args.weights).stem, "forms": {}}
    for form in args.forms.split(","):
        precision, matmul = form.split(":")
        if precision == "fp16" and int(tensorrt.__version__.split(".")[0]) < 10 and "+" not in tensorrt.__version__:
            # Without strong typing the types in the graph count for nothing: it would run in float32 by this name.
            print(f"{form} is left out: run this script through typed_tensorrt8.py", flush=True)
            continue
        entry = report["forms"][form] = {}
        start = time.perf_counter()
        with TensorRTRunner(args.weights, args.onnx, EngineOptions(args.engines, precision, matmul)) as runner:
            rng = np.random.default_rng(0)
            pixels = rng.integers(0, 256, (8, runner.image_size, runner.image_size, 3), dtype=np.uint8)
            real = to_pixels(read_image(ROOT / "image" / "temple.jpg"), runner.image_size)
            pixels[0] = real
            runner.segment(pixels[:1], unit(rng, 8))
            entry["first_result_seconds"] = round(time.perf_counter() - start, 1)
            print(form, "first result after", entry["first_result_seconds"], "s", flush=True)
            entry["speed"] = speed(runner, pixels, args.repeats, rng)
            entry["layers_ms"] = profile(runner)
            save(report, args.output)
            if not args.speed:
                entry["accuracy"] = accuracy(runner, args)
                save(report, args.output)
                entry["behaviour"] = behaviour(runner, pixels, rng, args.soak)
            save(report, args.output)
    device = Device()
    report["memory_after_close_mib"] = device.memory_used() >> 20
    device.close()
    save(report, args.output)


def save(report: dict, path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    x = rng.standard_normal((count, 512)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def speed(runner: TensorRTRunner, pixels: np.ndarray, repeats: int, rng: np.random.Generator) -> dict:
    """From uint8 images in host memory to label maps in host memory, with and without CUDA graphs."""
    result = {}
    for batch, labels in ((1, 8), (1, 150), (8, 8)):
        if batch > 1 and runner.identity.matmul == "2d":
            continue
        text, images = unit(rng, labels), pixels[:batch]
        for graphs in (True, False):
            runner.use_graphs = graphs
            with runner.device:
                runner.forget_graphs()
            taken = []
            for turn in range(repeats + 20):
                start = time.perf_counter()
                runner.segment(images, text)
                if turn >= 20:
                    taken.append((time.perf_counter() - start) * 1e3)
            name = f"batch {batch}, {labels} labels" + ("" if graphs else ", no CUDA graph")
            result[name] = summarise(taken)
            print(" ", name, {k: round(v, 3) for k, v in result[name].items()}, flush=True)
        runner.use_graphs = True
    return result


def profile(runner: TensorRTRunner, runs: int = 30) -> dict[str, float]:
    """Mean milliseconds of the image engine's slowest layers. The sum exceeds a run's time: layers are timed apart."""
    import tensorrt

    taken: dict[str, float] = {}

    class Profiler(tensorrt.IProfiler):
        def report_layer_time(self, name: str, milliseconds: float) -> None:
            taken[name] = taken.get(name, 0.0) + milliseconds / runs

    with runner.device:
        stages = runner.stages
        engine = stages.engine("image")
        context = engine.engine.create_execution_context()  # its own: a profiler stays with a context
        for name, buffer in (("image", "images"), ("z", "z")):
            context.set_tensor_address(name, stages.buffer(buffer, 1).address)
        context.profiler = Profiler()
        for _ in range(runs):
            engine.enqueue(context)
            stages.stream.synchronize()
    slowest = dict(sorted(taken.items(), key=lambda pair: -pair[1])[:40])
    print(f"  {len(taken)} layers, {sum(taken.values()):.3f} ms in all", flush=True)
    for name, milliseconds in slowest.items():
        print(f"    {milliseconds:.4f} {name[:150]}", flush=True)
    return {name: round(milliseconds, 4) for name, milliseconds in slowest.items()}


def accuracy(runner: TensorRTRunner, args: argparse.Namespace) -> dict:
    """Agreement with PyTorch's label maps, and mIoU, on the data set; texts through the engine's own encoder too."""
    reference = np.load(args.reference)
    text = runner.encode_text(reference["tokens"])
    result = {"text_cosine": float((text * reference["text"]).sum(axis=1).min())}
    photos = [args.dataset / str(name) for name in reference["names"]]
    agreement, ours, theirs = [], 0, 0
    for photo, expected in zip(photos, reference["labels"], strict=True):
        image = read_image(photo)
        labels = runner.segment(to_pixels(image, runner.image_size)[None], text).labels[0]
        agreement.append(float((labels == expected).mean()))
        truth = cv2.imread(str(photo.with_suffix(".png")), cv2.IMREAD_UNCHANGED)
        size = image.shape[1::-1]
        ours = ours + confusion(labels_to_photo(labels, *size), truth, len(text))
        theirs = theirs + confusion(labels_to_photo(expected, *size), truth, len(text))
    photo = to_pixels(read_image(ROOT / "image" / "temple.jpg"), runner.image_size)
    labels = runner.segment(photo[None], text).labels[0]
    result["label_agreement_percent"] = 100 * float(np.mean(agreement))
    result["worst_image_percent"] = 100 * min(agreement)
    result["photo_agreement_percent"] = 100 * float((labels == reference["photo_labels"]).mean())
    result["miou"] = float(np.nanmean(class_iou(ours)) * 100)
    result["miou_torch"] = float(np.nanmean(class_iou(theirs)) * 100)
    result["images"] = len(photos)
    for count in (1, 2, 8, 150, 1000):
        texts = reference["random_text"][:count]
        found = runner.segment(photo[None], texts).labels[0]
        agree = float((found == reference[f"random_labels_{count}"]).mean()) * 100
        result[f"agreement_{count}_labels_percent"] = agree
        asked, again = (runner.segment(photo[None], texts, best=best) for best in (True, False))
        assert again.best is None
        assert np.array_equal(asked.labels[0], found) and np.array_equal(again.labels[0], found)
        off = np.abs(asked.best[0] - reference[f"random_best_{count}"].astype(np.float32)).max()
        result[f"largest_cosine_difference_{count}_labels"] = float(off)
    whole = read_image(ROOT / "image" / "temple.jpg")
    for mode in ("window", "multiscale"):
        start = time.perf_counter()
        found, best = label_photo(runner, whole, reference["random_text"][:150], mode)
        result[f"{mode}_150_labels_first_ms"] = (time.perf_counter() - start) * 1e3
        result[f"{mode}_150_labels_percent"] = float((found == reference[f"{mode}_labels"]).mean()) * 100
        off = np.abs(best - reference[f"{mode}_best"].astype(np.float32)).max()
        result[f"{mode}_largest_cosine_difference"] = float(off)
    embeddings = runner.encode_image(photo[None])[0]
    sample = embeddings[:, ::8, ::8]
    places = np.random.default_rng(1).integers(0, runner.image_size, (40_001, 2))  # in three rounds
    size = runner.image_size
    picked = Features(embeddings, size, size, size).at(places[:, ::-1]).astype(np.float32)
    picked -= runner.features_at(photo[None], places)
    result["picked_embeddings_largest_difference"] = float(np.abs(picked).max())
    assert result["picked_embeddings_largest_difference"] <= (2e-3 if runner.identity.precision == "fp32" else 1e-2)
    result["embedding_cosine_min"] = float((sample * reference["photo_embeddings"]).sum(axis=0).min())
    print("  accuracy", {k: round(v, 4) for k, v in result.items()}, flush=True)
    return result


def behaviour(runner: TensorRTRunner, pixels: np.ndarray, rng: np.random.Generator, soak: int) -> dict:
    """Batches against single images, threads, another user of the context, and many runs with flat memory."""
    text = unit(rng, 8)
    single = np.concatenate([runner.segment(pixels[i : i + 1], text).labels for i in range(8)])
    result = {}
    for batch in (1, 2, 3, 5, 8):
        found = runner.segment(pixels[:batch], text).labels
        result[f"batch_{batch}_agreement_percent"] = 100 * float((found == single[:batch]).mean())

    wrong = []

    def loop(index: int) -> None:
        for _ in range(100):
            if not np.array_equal(runner.segment(pixels[index : index + 1], text).labels[0], single[index]):
                wrong.append(index)

    threads = [threading.Thread(target=loop, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result["wrong_results_of_two_threads"] = len(wrong)

    other = Device()  # as another library in this process would: its own allocations in the same primary context
    with other:
        memory = other.driver.mem_alloc(64 << 20)
        other.driver.memset_d32(memory, 0x7FC00000, 16 << 20)
        result["wrong_beside_another_user"] = int(
            not np.array_equal(runner.segment(pixels[:1], text).labels[0], single[0])
        )
        memory.free()
    other.close()
    result["wrong_after_another_user"] = int(not np.array_equal(runner.segment(pixels[:1], text).labels[0], single[0]))

    sizes = []
    for turn in range(soak):
        labels = runner.segment(pixels[:1], text).labels[0]
        if turn % 1000 == 0:
            assert np.array_equal(labels, single[0])
            sizes.append((runner.device.memory_used() >> 20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10))
    result["soak_runs"], result["soak_gpu_host_mib"] = soak, sizes
    print("  behaviour", result, flush=True)
    return result


if __name__ == "__main__":
    main(parse_args())
