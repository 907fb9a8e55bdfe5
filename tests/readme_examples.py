"""The README's examples, and for each whether it can run on a machine without a GPU, docker, large downloads and more.

Examples are found by how they begin, so that an option more or less does not move them. A new one must be placed here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OFFICIAL = "needs the official checkpoint"
GPU = "needs a GPU"
DOCKER = "needs docker and a GPU"
CLUSTER = "needs a cluster"
TRITON = "needs a Triton server"
APART = "needs an environment of its own"
DATA = "needs data sets that are not shipped"
NETWORK = "downloads weights"
HOURS = "takes hours without a GPU"


class Example(NamedTuple):
    """One command line, or one block of Python."""

    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """A command line's words, without remarks, split at &&."""
        commands: list[list[str]] = [[]]
        for word in shlex.split(self.text, comments=True):
            if word == "&&":
                commands.append([])
            else:
                commands[-1].append(word)
        return commands


class Runs(NamedTuple):
    """An example that runs here: what files it makes, and what its output says."""

    makes: tuple[str, ...] = ()
    says: str = ""


# Beginnings of examples -> what they do here, or why they cannot run.
PLACES: dict[str, Runs | str] = {
    "./requirements.sh python enginerun.py": Runs(("image/temple_lseg.png", "onnx/lseg.onnx"), "temple_lseg.png"),
    "./requirements.sh --dev pytest": Runs((), r"\d+ passed"),
    "docker run": DOCKER,
    "docker build": DOCKER,
    "python lseg_export.py --download": NETWORK,
    "python lseg_export.py --weights demo_e200.ckpt": OFFICIAL,
    "python clip_onnx_export.py --weights demo_e200.ckpt": OFFICIAL,
    "python clip_onnx_export.py --weights openai": NETWORK,
    "python enginerun.py photo.jpg --weights demo_e200.ckpt": OFFICIAL,
    "python enginerun.py street.jpg holiday/": Runs(
        ("image/street_lseg.png", "image/street_labels.png", "image/street_labels.json", "image/**/beach_labels.png")
    ),
    'python enginerun.py "drive/**/*.jpg" frames.txt shard-000.tar': Runs(
        ("maps/**/first_lseg.png", "maps/**/second_lseg.png", "maps/**/third_lseg.png")
    ),
    "python enginerun.py --video drive.mp4": Runs(("image/drive_lseg.mp4",)),
    "python enginerun.py room/ --features map": Runs(("map/**/sofa_features.safetensors",)),
    "python enginerun.py kitchen.jpg --features spots.npy": Runs(("spots.npy",)),
    "from lseg import Segmenter": Runs(),
    "python app.py --weights demo demo_e200.ckpt": f"{OFFICIAL} and a GPU",
    "python app.py ": Runs((), "the page is at http://127.0.0.1:7860"),
    "from gradio_client import": Runs((), "'name': 'building'"),
    "python testlseg.py --quick": Runs((), "ONNX Runtime"),
    "python testlseg.py --dataset camvid/test": DATA,
    "python testlseg.py --random-weights": HOURS,
    "python testlseg.py --report": Runs((), "NVIDIA H200"),
    "./polygraph.sh compare": Runs(("log/polygraph_compare.log",), "PASS"),
    "python demo/train.py": DATA,
    "python -m pip install -r requirements-ray.txt": Runs(),
    "python lseg_ray.py photos/": Runs(("results/parts/*.parquet",), r"2 images in .* a second"),
    'python lseg_ray.py "shards/*.tar"': Runs(
        ("results_shards/parts/*.parquet", "results_shards/**/third_labels.png"), r"1 image in .* a second"
    ),
    "python lseg_ray.py s3://": CLUSTER,
    "python enginerun.py --weights demo_e200.ckpt --export-triton": OFFICIAL,
    "tritonserver": TRITON,
    'python -m pip install "tritonclient[grpc]"': Runs(),
    "python demo/triton_client.py": TRITON,
    "pip install nvidia-pytriton": APART,
    "python demo/triton_server.py": APART,
}
# What stands for the reader's own in the examples, beside what they make or what is downloaded.
OWN = {"photo.jpg", "street.jpg", "room.jpg", "kitchen.jpg", "holiday/", "room/", "photos/", "drive/**/*.jpg"}
OWN |= {"frames.txt", "shard-000.tar", "shards/*.tar", "spots.txt", "drive.mp4", "demo_e200.ckpt"}
MADE = {"spots.npy"}


def examples(readme: str) -> Iterator[Example]:
    """Every fenced example: command lines one by one, Python in blocks."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE):
        if language == "bash":
            lines = block.replace("\\\n", " ").splitlines()
            yield from (Example("bash", line) for line in lines if line.strip() and not line.startswith("#"))
        else:
            yield Example(language, block)


def place(example: Example) -> Runs | str | None:
    """What PLACES says: the entry with the longest beginning; None where there is none."""
    text = f"{example.text} "
    beginnings = [beginning for beginning in PLACES if text.startswith(beginning)]
    return PLACES[max(beginnings, key=len)] if beginnings else None
