"""Photos to files of pixel embeddings: of every nth pixel, of given points, or of a mask's regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lseg.errors import UserError
from lseg.features import Features, read_points, read_region_mask, write_features
from lseg.image import to_pixels
from lseg.photos import Task, run_tasks
from lseg.runner import Runner, Timings
from lseg.sources import FEATURES, Photo, output_names

STRIDE = 4  # of pixels, unless points or regions are asked for: 64 MB for 640 x 480
FILES = (".npy", ".safetensors")


@dataclass(frozen=True)
class FeatureFiles:
    """Which embeddings are written, and where.

    Attributes:
        output: a file that ends in .npy or .safetensors, for one photo; or a folder, for NAME_features.safetensors.
        stride: pixels from one to the next, along rows and columns.
        points: file of "x y" lines, or None.
        regions: file of a mask of the photos' size, or None.
        resume: leave out photos whose files are there.
    """

    output: Path
    stride: int = STRIDE
    points: Path | None = None
    regions: Path | None = None
    resume: bool = False

    def tasks(self, photos: Sequence[Photo]) -> list[Task]:
        """Each photo with its file; to resume, those that are not done.

        Raises:
            UserError: one file is named for several photos, or the stride, points or mask cannot be used.
        """
        if self.stride < 1:
            raise UserError(f"--stride {self.stride} cannot be: give 1 or more")
        if self.points and self.regions:
            raise UserError("--points and --regions ask for two kinds of features: give one of them")
        self.wishes()
        if self.output.suffix.lower() in FILES:
            if len(photos) > 1:
                raise UserError(f"{self.output} is one file for {len(photos)} photos: name a folder")
            if self.regions and self.output.suffix.lower() == ".npy":
                raise UserError(f"{self.output}: regions have ids too, so give a name that ends in .safetensors")
            tasks = [(photos[0], self.output)]
        else:
            names = output_names(photos, self.output)
            files = [self.output / name.with_name(f"{name.name}{FEATURES}") for name in names]
            tasks = list(zip(photos, files, strict=True))
        return [task for task in tasks if not (self.resume and task[1].exists())]

    def wishes(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The points and the mask."""
        points = read_points(self.points) if self.points else None
        return points, read_region_mask(self.regions) if self.regions else None


def write_photo_features(
    tasks: Sequence[Task],
    runner: Runner,
    wanted: FeatureFiles,
    weights: str,
    timings: Timings,
    say: Callable[[str], object],
    quiet: bool = False,
) -> int:
    """Writes each photo's embeddings; returns how many photos could not be read.

    Raises:
        UserError: no photo could be read, a point lies outside its photo, the mask is of another size, or a file cannot
            be written.
    """
    points, mask = wanted.wishes()

    def work(_: object, loaded: tuple[np.ndarray, Timings]) -> tuple[Features, Timings]:
        photo, taken = loaded
        pixels = taken.measure("preprocess", lambda: to_pixels(photo, runner.image_size)[None])
        grid = taken.measure("encode_image", lambda: runner.encode_image(pixels)[0])
        return Features(grid, runner.image_size, *photo.shape[:2]), taken

    def store(task: Task, made: tuple[Features, Timings]) -> tuple[Path, None, Timings]:
        features, taken = made
        about: dict[str, Any] = {"photo": task[0].shown, "size": [features.width, features.height]}
        about |= {"weights": Path(weights).name, "text_encoder": runner.text_encoder, "made_by": str(runner.identity)}
        if points is not None:
            arrays = {"features": features.at(points)}
            about["points"] = points.tolist()
        elif mask is not None:
            ids, vectors, pixels = features.regions(mask)
            arrays = {"features": vectors, "ids": ids, "pixels": pixels}
            about["regions"] = str(wanted.regions)
        else:
            arrays = {"features": features.strided(wanted.stride)}
            about["stride"] = wanted.stride
        write_features(task[1], arrays, about)
        return task[1], None, taken

    return run_tasks(tasks, work, store, lambda _: None, timings, say, quiet)
