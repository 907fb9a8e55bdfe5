"""Photos to files of pixel embeddings: of every nth pixel, of given points, or of a mask's regions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lseg.errors import UserError
from lseg.features import (
    Features,
    check_mask,
    check_points,
    read_about,
    read_points,
    read_region_mask,
    write_features,
)
from lseg.image import to_pixels
from lseg.made_with import short_digest
from lseg.photos import Group, Task, run_tasks
from lseg.picking import plan_points, plan_stride
from lseg.runner import Runner, Timings
from lseg.sources import FEATURES, Photo, output_names
from lseg.tensorfile import sha256_once
from lseg.weights import resolve

FILES = (".npy", ".safetensors")
OTHER_FILES = (".npz", ".pt", ".pth", ".json", ".txt", ".h5", ".png", ".bin")  # what is no folder's name either
DIMENSION = 512  # of an embedding
LARGEST = 4 << 30  # bytes of one photo's features


class Made(NamedTuple):
    """A photo after the network."""

    arrays: Callable[[], dict[str, np.ndarray]]  # makes what is written, by name
    about: dict[str, Any]  # it, as the file has it
    taken: Timings


@dataclass(frozen=True)
class FeatureFiles:
    """Which embeddings are written, and where.

    Attributes:
        output: a file that ends in .npy or .safetensors, for one photo; or a folder, for NAME_features.safetensors.
        stride: pixels from one to the next, along rows and columns; None: as few as give no more than the network's
            own grid has along the longer side.
        points: file of "x y" lines, or None.
        regions: file of a mask of the photos' size, or None.
        resume: leave out photos whose files are there, made with the same weights, stride, points or mask; of a file
            that is named, of the same photo too.
        weights: as `--weights`.
    """

    output: Path
    stride: int | None = None
    points: Path | None = None
    regions: Path | None = None
    resume: bool = False
    weights: str = "demo"

    def tasks(self, photos: Sequence[Photo]) -> list[Task]:
        """Each photo with its file; to resume, those that are not done.

        Raises:
            UserError: one file is named for several photos, or the stride, points, mask or weights cannot be used.
        """
        if self.stride is not None and self.stride < 1:
            raise UserError(f"--stride {self.stride} cannot be: give 1 or more")
        if self.points and self.regions:
            raise UserError("--points and --regions ask for two kinds of features: give one of them")
        if self.stride is not None and (self.points or self.regions):
            raise UserError("--stride has no meaning beside --points or --regions: leave it out")
        _ = self.wishes  # says so now if they cannot be read
        if self.output.suffix.lower() in OTHER_FILES and not self.output.is_dir():
            raise UserError(f"{self.output}: name a .npy or .safetensors file, or a folder")
        if self.output.suffix.lower() in FILES:
            if len(photos) > 1:
                raise UserError(f"{self.output} is one file for {len(photos)} photos: name a folder")
            if self.output.is_dir():
                raise UserError(f"{self.output} is a folder: name a file in it")
            for other in (self.points, self.regions, resolve(self.weights)):
                if other and other.exists() and self.output.exists() and self.output.samefile(other):
                    raise UserError(f"{self.output} is read and would be written: choose another --features")
            if self.regions and self.output.suffix.lower() == ".npy":
                raise UserError(f"{self.output}: regions have ids too, so give a name that ends in .safetensors")
            tasks = [(photos[0], self.output)]
        else:
            names = output_names(photos, self.output)
            files = [self.output / name.with_name(f"{name.name}{FEATURES}") for name in names]
            tasks = list(zip(photos, files, strict=True))
        _ = self.made_with  # says so now if the weights cannot be read
        return [task for task in tasks if not (self.resume and self._is_done(*task))]

    def _is_done(self, photo: Photo, path: Path) -> bool:
        """Whether a run with the same made the file: one that is named, of this photo."""
        told = read_about(path, ("made_with", "photo"))
        alike = told.get("made_with") == self.made_with
        return alike and (path != self.output or told.get("photo") == photo.shown)

    def made_otherwise(self, tasks: Sequence[Task]) -> int:
        """How many of the photos have a file that another run made, with something else."""
        return sum(path.exists() for _, path in tasks) if self.resume else 0

    @cached_property
    def made_with(self) -> str:
        """What stands for all that decides a photo's embeddings but the backend: the weights' bytes, not their name."""
        return short_digest([sha256_once(resolve(self.weights)), self.stride, *map(_array_digest, self.wishes)])

    @cached_property
    def wishes(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The points and the mask, read once."""
        points = read_points(self.points) if self.points else None
        return points, read_region_mask(self.regions) if self.regions else None


def _array_digest(values: np.ndarray | None) -> list[object]:
    if values is None:
        return []
    values = np.ascontiguousarray(values)
    return [values.shape, values.dtype.str, hashlib.sha256(values).hexdigest()]


def write_photo_features(
    tasks: Sequence[Task],
    runner: Runner,
    wanted: FeatureFiles,
    timings: Timings,
    say: Callable[[str], object],
    quiet: bool = False,
) -> int:
    """Writes each photo's embeddings; returns how many photos could not be read.

    A photo that the points or the mask do not fit counts as one that cannot be used.

    Raises:
        UserError: no photo could be used, or a file cannot be written.
    """
    points, mask = wanted.wishes
    side = runner.image_size // 2

    def stride_for(height: int, width: int) -> int:
        return wanted.stride or -(-max(height, width) // side)

    def check(photo: np.ndarray) -> None:
        height, width = photo.shape[:2]
        if points is not None:
            check_points(points, width, height)
        elif mask is not None:
            check_mask(mask, width, height)
        else:
            step = stride_for(height, width)
            size = -(-height // step) * -(-width // step) * DIMENSION * 2
            if size > LARGEST:
                least = math.ceil(step * math.sqrt(size / LARGEST))
                raise UserError(f"--stride {step} makes {size / 2**30:.1f} GiB of it: give --stride {least} or more")

    def work(group: Group) -> list[Made]:
        return [embed(*loaded) for _, loaded in group]

    def embed(photo: np.ndarray, taken: Timings) -> Made:
        """What the network gives; the rest is done where it is stored, beside the network."""
        size, (height, width) = runner.image_size, photo.shape[:2]
        pixels = taken.measure("preprocess", lambda: to_pixels(photo, size)[None])
        about: dict[str, Any] = {"size": [width, height]}
        if points is not None:
            about["points"] = points.tolist()
        elif mask is not None:
            about["regions"] = str(wanted.regions)
        else:
            about["stride"] = stride_for(height, width)
        if runner.features_at is not None and mask is None:
            asked = (size, height, width)
            plan = plan_stride(about["stride"], *asked) if points is None else plan_points(points, *asked)
            found = taken.measure("encode_image", lambda: runner.features_at(pixels, plan.places))
            return Made(lambda: {"features": plan.expand(found)}, about, taken)
        grid = taken.measure("encode_image", lambda: runner.encode_image(pixels)[0])
        features = Features(grid, size, height, width)

        def arrays() -> dict[str, np.ndarray]:
            if points is not None:
                return {"features": features.at(points)}
            if mask is not None:
                return dict(zip(("ids", "features", "pixels"), features.regions(mask), strict=True))
            return {"features": features.strided(about["stride"])}

        return Made(arrays, about, taken)

    def store(task: Task, made: Made) -> tuple[Path, None, Timings]:
        about = {"photo": task[0].shown, "weights": Path(wanted.weights).name, "text_encoder": runner.text_encoder}
        about |= {"made_by": str(runner.identity), "made_with": wanted.made_with, **made.about}
        made.taken.measure("draw", lambda: write_features(task[1], made.arrays(), about))
        return task[1], None, made.taken

    return run_tasks(tasks, work, store, lambda _: None, timings, say, quiet, check)
