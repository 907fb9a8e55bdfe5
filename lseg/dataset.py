"""Data sets of photos with masks: CamVid's and ADE20K's layouts, and what their pixel values mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lseg.errors import UserError
from lseg.image import decode

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
VOID = -1  # of a mask as `Dataset.mask` gives it: the pixel counts nowhere
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Dataset:
    """Photos, their masks, and the names of the masks' values.

    `zero_is_void` holds for ADE20K: 0 is unlabelled and label i has the value i + 1. Elsewhere label i has the value i,
    and N and 255 are unlabelled.
    """

    name: str
    pairs: tuple[tuple[Path, Path], ...]
    labels: tuple[str, ...]
    zero_is_void: bool = False

    def mask(self, path: Path, shape: tuple[int, ...]) -> np.ndarray:
        """A mask as int32 [H, W]: indices of `labels`, or VOID.

        Raises:
            UserError: it cannot be read, has another size than `shape`, or a value beyond the labels.
        """
        values = decode(path, path.read_bytes(), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise UserError(f"{path} cannot be read as a mask: restore it")
        if values.ndim != 2:
            raise UserError(f"{path} is no mask: it has {values.shape[2]} channels, and a mask has one value a pixel")
        if values.shape != tuple(shape[:2]):
            sizes = f"{values.shape[1]} x {values.shape[0]} pixels and its photo {shape[1]} x {shape[0]}"
            raise UserError(f"{path} has {sizes}: give a mask of the photo's size")
        bits = _png_bits(path)
        if bits is not None and bits < 8:  # OpenCV stretches them to 0..255
            values = values // (255 // (2**bits - 1))
        count, first = len(self.labels), int(self.zero_is_void)
        mask = values.astype(np.int32) - first
        void = (-1,) if first else (count,)
        if values.dtype == np.uint8:
            void += (255 - first,)
        mask[np.isin(mask, void)] = VOID
        if mask.max(initial=VOID) >= count:
            worst = int(mask.max()) + self.zero_is_void
            raise UserError(
                f"{path} has the value {worst}, beyond the {count} labels: give the labels that it was made for"
            )
        return mask


def _png_bits(path: Path) -> int | None:
    """Bits a pixel's value has in a PNG; None for another file."""
    with open(path, "rb") as file:
        head = file.read(26)
    return head[24] if head.startswith(b"\x89PNG") and len(head) == 26 else None


def find_dataset(folder: Path, labels: Sequence[str] | None = None, limit: int | None = None) -> Dataset:
    """The data set in a folder.

    Known layouts: NAME.jpg with NAME.png beside it; `X/` with masks in `Xannot/` (CamVid as SegNet's tutorial has it);
    `images/validation` or `images/` with masks of the same names under `annotations/` (ADE20K).

    Args:
        folder: the data set, or one of its splits.
        labels: the names of the masks' values; CamVid's 11 by default, ADE20K's from the `objectInfo150.txt` in it.
        limit: use the first photos only.

    Raises:
        UserError: there are no photos, a mask is missing, or ADE20K's labels are.
    """
    from lseg.labels import read_labels_file

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the data set's")
    if folder.name in ("", ".."):
        folder = folder.resolve()
    ade = (folder / "images").is_dir() and (folder / "annotations").is_dir()
    if ade:
        images = folder / "images" / "validation" if (folder / "images" / "validation").is_dir() else folder / "images"
        masks = folder / "annotations" / images.relative_to(folder / "images")
        if labels is None:
            files = [folder / "objectInfo150.txt", folder.parent / "objectInfo150.txt"]
            found = next((file for file in files if file.is_file()), None)
            if found is None:
                raise UserError(f"{folder} holds no objectInfo150.txt: name the masks' values with --labels-file")
            labels = [names[0] for names in read_labels_file(found)]
    else:
        images = folder
        annotated = folder.with_name(f"{folder.name}annot")
        masks = annotated if annotated.is_dir() else folder
    photos = sorted(file for file in images.iterdir() if file.suffix.lower() in SUFFIXES)
    if masks == images:
        photos = [file for file in photos if file.suffix.lower() != ".png"]
    if not photos:
        splits = sorted(file.name for file in images.iterdir() if file.is_dir() and not file.name.endswith("annot"))
        if splits:
            raise UserError(f"{images} holds no photo, only folders ({', '.join(splits[:5])}): give one of them")
        wanted = "NAME.jpg with masks NAME.png" if masks == images else "photos"
        raise UserError(f"{images} holds no photo: give a folder of {wanted}")
    pairs = tuple((photo, masks / f"{photo.stem}.png") for photo in photos[:limit])
    for photo, mask in pairs:
        if not mask.is_file():
            raise UserError(f"{photo} has no mask {mask}: add it, or take the photo out")
    return Dataset(folder.resolve().name, pairs, tuple(labels or CAMVID), ade)
