"""Where photos come from: files, folders, patterns, lists and tar archives; and what their results are called."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath

from lseg.errors import UserError, short
from lseg.image import SUFFIXES, read_bytes

PICTURE, LABEL_MAP, MEANING = "_lseg.png", "_labels.png", "_labels.json"  # what a photo's name is followed by
SCORES, FEATURES = "_scores.npy", "_features.safetensors"
RESULTS = (PICTURE, LABEL_MAP, MEANING, SCORES, FEATURES)
BROKEN = (tarfile.TarError, ValueError, OverflowError)  # what tarfile raises of archives that are damaged
LONGEST = 225  # bytes of a name, so that what follows it fits into a file system's 255
LONGEST_FOLDER, DEEPEST = 1500, 64  # bytes and number of a name's folders, so that all fits into 4096


@dataclass(frozen=True)
class Photo:
    """One image to segment.

    Attributes:
        shown: its path, for messages.
        name: what its results are called below the output folder, without suffix.
        read: gives the file's bytes; UserError where it cannot.
        identity: the same for the same file, however it was named.
        file: where it lies, unless in an archive.
        place: of an image in an archive, that file, and from which byte on how many are the image's.
    """

    shown: str
    name: PurePosixPath
    read: Callable[[], bytes]
    identity: str
    file: Path | None = None
    place: tuple[Path, int, int] | None = None


def list_photos(inputs: Sequence[str | Path]) -> tuple[list[Photo], list[str]]:
    """The photos that the user means, each once, and notes on what is left out.

    A folder stands for all images below it, a pattern for what it matches, a text file for the paths in it (one a
    line), a tar archive for the images in it. Results mirror the tree of a folder or archive. Files that an earlier run
    wrote are not taken for photos.

    Raises:
        UserError: something does not exist or cannot be read, or holds no photo.
    """
    photos: dict[str, Photo] = {}
    notes: list[str] = []
    for text in inputs:
        for photo in _expand(text, notes):
            if photos.setdefault(photo.identity, photo) is not photo:
                notes.append(f"{photo.shown} is given more than once, and segmented once")
    return list(photos.values()), notes


def _expand(text: str | Path, notes: list[str]) -> list[Photo]:
    if not str(text).strip():
        raise UserError("an empty name is given for a photo: leave it out, or name one")
    path = Path(text)
    try:
        if path.is_dir():
            return _in_folder(path, notes)
        if not path.exists() and glob.has_magic(str(text)):
            found = sorted(glob.glob(str(text), recursive=True))
            files = [Path(name) for name in found if is_image(name) and not is_ours(name)]
            if not files:
                raise UserError(f"the pattern {text} matches no image; check it, and quote it")
            return [_photo(file, file.stem) for file in files]
        if not path.exists():
            raise UserError(f"{path} does not exist; check the name")
        if path.suffix.lower() in (".txt", ".tar") and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} is not a regular file; give a list or an archive")
        if path.suffix.lower() == ".txt":
            return _in_list(path)
        if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")):
            raise UserError(f"{path} is a compressed archive; unpack it, or give a plain .tar")
        if path.suffix.lower() == ".tar":
            return _in_archive(path, notes)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its name and permissions") from None
    return [_photo(path, path.stem)]


def _photo(file: Path, name: str | PurePosixPath) -> Photo:
    return Photo(str(file), PurePosixPath(name), lambda: read_bytes(file), os.path.realpath(file), file)


def _in_folder(folder: Path, notes: list[str]) -> list[Photo]:
    def refuse(error: OSError) -> None:
        raise error

    photos, ours = [], 0
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not is_image(name):
                continue
            if is_ours(name):
                ours += 1
                continue
            file = Path(parent, name)
            photos.append(_photo(file, file.relative_to(folder).with_suffix("").as_posix()))
    if not photos and ours:
        raise UserError(f"the folder {folder} holds no photo, only what this program wrote; give one with photos")
    if not photos:
        raise UserError(f"the folder {folder} holds no image; give one with {', '.join(SUFFIXES)} files")
    if ours:
        notes.append(f"{ours} in {folder} left out: files of that name are what this program wrote")
    return photos


def _in_list(path: Path) -> list[Photo]:
    """The paths in a text file: as they stand, or from the list's own folder."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is no list of paths: it is no text in UTF-8") from None
    photos = []
    for number, line in enumerate(lines, 1):
        if line:
            file = next((file for file in (Path(line), path.parent / line) if file.is_file()), None)
            if file is None:
                raise UserError(
                    f"line {number} of {path}, a list of photos, names '{line}', which is no file; correct it"
                )
            photos.append(_photo(short(file), file.stem))
    if not photos:
        raise UserError(f"{path} names no photo; write one path a line")
    return photos


def _in_archive(path: Path, notes: list[str]) -> list[Photo]:
    """Images in a tar: each is read at its place, so that several threads may read at once."""
    photos = []
    places: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in _members(archive, path, notes):
                if member.islnk() and member.linkname in places:  # a second name of an earlier member
                    member.offset_data, member.size = places[member.linkname]
                elif not member.isreg():
                    continue
                places[member.name] = member.offset_data, member.size
                if not is_image(member.name) or is_ours(member.name):
                    continue
                if "\0" in member.name or member.issparse():
                    notes.append(f"{path}:{ascii(member.name)} is left out: pack it as a plain file of a plain name")
                    continue
                shown, at, size = f"{path}:{member.name}", member.offset_data, member.size
                read = lambda shown=shown, at=at, size=size: read_at(path, shown, at, size)  # noqa: E731
                identity = f"{os.path.realpath(path)}:{at}"
                photos.append(Photo(shown, plain_parts(member.name), read, identity, place=(path, at, size)))
    except BROKEN as error:
        raise UserError(f"{path} is no tar archive ({error}); pack it again") from None
    if not photos:
        raise UserError(f"{path} holds no image; pack {', '.join(SUFFIXES)} files")
    return photos


def _members(archive: tarfile.TarFile, path: Path, notes: list[str]) -> Iterator[tarfile.TarInfo]:
    """The archive's members up to where it breaks off, if it does."""
    while True:
        try:
            member = archive.next()
        except BROKEN as error:
            notes.append(f"{path} breaks off or is damaged ({error}): what stands before that is taken")
            return
        if member is None:
            if not _ends_here(path, archive.offset):
                notes.append(f"{path} breaks off or is damaged: what stands before that is taken")
            return
        yield member


def _ends_here(path: Path, offset: int) -> bool:
    """Whether a tar archive is over at this place: nothing follows, or a block of zeros does."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    return not block.strip(b"\0") and len(block) in (0, tarfile.BLOCKSIZE)


def read_at(path: Path, shown: str, offset: int, size: int) -> bytes:
    """The bytes of an image in an archive; `shown` names it in errors."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size) if size >= 0 and offset + size <= os.fstat(file.fileno()).st_size else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its name and permissions") from None
    if not 0 <= size <= len(data):
        raise UserError(f"{shown} is cut short, with its archive; copy or pack that again")
    if not data:
        raise UserError(f"{shown} is empty; pack it again")
    return data


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    file = PurePosixPath(name)
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def plain_parts(name: str) -> PurePosixPath:
    """A name from elsewhere, less its suffix and whatever would leave the output folder, or not fit into it."""
    parts = [part for part in name.replace("\0", "").split("/") if part not in ("", ".", "..")] or ["photo"]
    folders, room = [], LONGEST_FOLDER
    for part in parts[:-1]:
        part = os.fsencode(part)[:LONGEST].decode(errors="ignore") or "folder"
        room -= len(part.encode()) + 1
        if room > 0 and len(folders) < DEEPEST:  # a folder that is called as results are stands in their way
            folders.append(f"{part}_" if part.endswith(RESULTS) or part in ("job.json", "parts") else part)
    stem = PurePosixPath(parts[-1]).stem
    return PurePosixPath(*folders, "photo" if stem in (".", "..") else stem)


def is_ours(name: str) -> bool:
    """Whether a file of this name is what an earlier run wrote."""
    return name.endswith((PICTURE, LABEL_MAP))


def output_names(photos: Sequence[Photo], folder: Path) -> list[Path]:
    """What each photo's files begin with, below `folder`.

    A number is added where files would overwrite another photo's, or a photo itself.
    """
    folder = Path(os.path.realpath(folder))
    taken = {photo.identity for photo in photos}
    files = [photo.file for photo in photos if photo.file]
    taken |= {os.path.join(os.path.realpath(file.parent), file.name) for file in files}  # a link counts as well
    names = []
    for photo in photos:
        stem = os.fsencode(photo.name.name)[:LONGEST].decode(errors="ignore") or "photo"
        for number in count(1):
            name = photo.name.with_name(stem if number == 1 else f"{stem}_{number}")
            results = {str(folder / f"{name}{end}") for end in RESULTS}
            if not results & taken:
                break
        taken |= results
        names.append(Path(name))
    return names
