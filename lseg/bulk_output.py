"""The output of bulk work: label maps and Parquet parts in a folder or an object store, and what the job was.

A part holds the results of the images that were handed out together. It is written last and whole, under a name that
follows from them: work that is done twice, because a worker died, writes the same file again. What stands in the parts
is done; a resumed job leaves it out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lseg.bulk_inputs import BUCKETS, URI, Row, one_line, open_store, values
from lseg.errors import UserError
from lseg.files import writable_folder, write_files

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs

JOB, PARTS = "job.json", "parts"
RUN = ".run.lock"  # tells the run that may write
FORMAT = 1  # of the parts and the job file


class Output:
    """A folder to write to: a local path, or a URI that pyarrow opens. It may be pickled.

    Files appear whole or not at all. Names are relative, with slashes.
    """

    def __init__(self, where: str):
        self.where = where.rstrip("/") if URI.match(where) else os.path.abspath(where)
        self.local = not URI.match(where)
        self.run: str | None = None  # which run it belongs to; None before `take_over`

    def prepare(self) -> None:
        """Proves that it can be written; UserError where it cannot."""
        if self.local:
            writable_folder(Path(self.where))
        else:
            self.write({f"{PARTS}/.probe": b"\0"})
            files, base = self._open()
            files.delete_file(f"{base}/{PARTS}/.probe")

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Writes files; UserError where the disk is full, the store refuses, or a later run has taken over."""
        if self.local:
            with self._turn():
                write_files({Path(self.where, name): data for name, data in contents.items()})
            return
        files, base = self._open()
        direct = self.where.partition("://")[0] in BUCKETS  # whose files appear when they are complete
        try:
            for name, data in contents.items():
                path = f"{base}/{name}"
                parent, _, last = path.rpartition("/")
                if not direct:
                    files.create_dir(parent, recursive=True)
                target = path if direct else f"{parent}/.{os.urandom(6).hex()}-{last}"
                with files.open_output_stream(target) as file:
                    file.write(data)
                if not direct:
                    files.move(target, path)
        except OSError as error:
            raise UserError(f"{self.where} cannot be written ({one_line(error)}); choose another --output") from None

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None where there is none."""
        files, base = self._open()
        try:
            with files.open_input_file(f"{base}/{name}") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{self.where}/{name} cannot be read ({one_line(error)})") from None

    def parts(self) -> list[str]:
        """Paths of the parts that are there, in the file system's own form."""
        import pyarrow.fs as pafs

        files, base = self._open()
        found = files.get_file_info(pafs.FileSelector(f"{base}/{PARTS}", allow_not_found=True))
        return sorted(one.path for one in found if one.base_name.startswith("part-") and one.extension == "parquet")

    def done(self) -> dict[str, str]:
        """The images whose results stand in parts: names, and where each came from.

        Raises:
            UserError: a part is damaged, or an image stands in two.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        files, _ = self._open()
        found: dict[str, str] = {}
        for path in self.parts():
            try:
                table = pq.read_table(path, columns=["name", "source"], filesystem=files)
            except (OSError, pa.ArrowException) as error:
                raise UserError(
                    f"{path} is damaged ({one_line(error)}): delete it, and its images are done again"
                ) from None
            columns = [values(table[column], path, column) for column in ("name", "source")]
            for name, source in zip(*columns, strict=True):
                if not isinstance(name, str):
                    raise UserError(f"{path} is damaged (a name is none): delete it, and its images are done again")
                if name in found:
                    raise UserError(f"{name} stands in {path} and in another part as well: delete one and run again")
                found[name] = source
        return found

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps a second run out of a local folder; UserError where another has it. The system drops it at exit.

        The folder of the parts is what is held: the one around it may be that of the exported files, too, which an
        export holds while it puts them there.
        """
        if not self.local:
            yield
            return
        parts = Path(self.where, PARTS)
        try:
            parts.mkdir(exist_ok=True)
            handle = os.open(parts, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{parts} cannot be written ({error.strerror}); choose another --output") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another run is writing to {self.where}: wait for it, or choose another --output"
                ) from None
            yield
        finally:
            os.close(handle)

    def take_over(self) -> None:
        """Lets only this object and its copies write to a local folder from now on.

        Workers may outlive the process of a run that was killed for a moment: what they wrote after the next run has
        looked at what is done would be there twice. In an object store nothing keeps them from that.
        """
        if self.local:
            self.run = os.urandom(8).hex()
            with self._turn(begin=True):
                pass

    @contextmanager
    def _turn(self, begin: bool = False) -> Iterator[None]:
        """Lets the runs of a folder write by turns, and one that is over not at all."""
        if self.run is None:
            yield
            return
        try:
            handle = os.open(os.path.join(self.where, RUN), os.O_RDWR | (os.O_CREAT if begin else 0), 0o666)
        except FileNotFoundError:  # a worker's machine has another folder there, or none
            remedy = "on a cluster, give an --output that all machines share"
            raise UserError(f"{self.where} is not, or no more, the folder that the run began with: {remedy}") from None
        except OSError as error:
            raise UserError(f"{self.where} cannot be written ({error.strerror}); choose another --output") from None
        with open(handle, "r+b", buffering=0) as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX if begin else fcntl.LOCK_SH)
            if begin:
                try:
                    file.truncate()
                    file.write(self.run.encode())
                except OSError as error:
                    raise UserError(
                        f"{self.where} cannot be written ({error.strerror}); choose another --output"
                    ) from None
            elif file.read() != self.run.encode():
                raise UserError(f"another run has begun to write to {self.where}: this one ends")
            yield

    def holds(self, name: str) -> bool:
        """Whether a file is there."""
        files, base = self._open()
        return files.get_file_info(f"{base}/{name}").is_file

    def _open(self) -> tuple[pyarrow.fs.FileSystem, str]:
        import pyarrow.fs as pafs

        return (pafs.LocalFileSystem(), self.where) if self.local else open_store(self.where)


def part_name(rows: Sequence[Row]) -> str:
    """The part of images that are handed out together, from their names."""
    digest = hashlib.sha256("\0".join(row.name for row in rows).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{PARTS}/part-{digest[:24]}.parquet"


def check_job(output: Output, job: dict[str, Any], resume: bool) -> dict[str, bytes]:
    """Compares a job with what it was when it was begun, if it was.

    Args:
        output: where to.
        job: what decides the results, each under what the user calls it.
        resume: go on with a job that is there.

    Returns:
        the file that says what the job is, for `Output.write`; nothing where it is there.

    Raises:
        UserError: there is a job and `resume` is not given, or it was begun with something else.
    """
    there = output.read(JOB)
    text = json.dumps({"format": FORMAT, **job}, ensure_ascii=False, indent=1) + "\n"
    if there is None:
        if output.parts():
            raise UserError(f"{output.where} holds parts and no {JOB}: choose another --output")
        return {JOB: text.encode("utf-8", "backslashreplace")}
    if not resume:
        raise UserError(f"{output.where} holds a job already: add --resume to go on, or choose another --output")
    try:
        before, now = dict(json.loads(there)), json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{output.where}/{JOB} is damaged: choose another --output") from None
    for key in now:
        if before.get(key) != now[key]:
            shown = [json.dumps(value.get(key), ensure_ascii=False) for value in (before, now)]
            old, new = (text if len(text) <= 60 else f"{text[:59]}…" for text in shown)
            raise UserError(
                f"the job in {output.where} was begun with other {key} ({old}, now {new}): resume it with what it was "
                "begun with, or choose another --output"
            )
    return {}


def left_to_do(rows: Sequence[Row], done: Mapping[str, str], where: str) -> list[Row]:
    """The images that are not done.

    Raises:
        UserError: a name that is done belongs to another image now.
    """
    left = []
    for row in rows:
        before, now = done.get(plain(row.name)), plain(row.source)
        if before is None:
            left.append(row)
        elif before != now:
            raise UserError(
                f"{row.name} in {where} was made from {before}, and is {now} now: give the images that the job was "
                "begun with, or choose another --output"
            )
    return left


def plain(text: str) -> str:
    """A text as Parquet holds it: names that are no UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def table_bytes(results: list[dict[str, Any]], schema: pa.Schema, made_by: str) -> bytes:
    """A part's file: a row an image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(results, schema.with_metadata({"lseg.format": str(FORMAT), "lseg.made_by": made_by}))
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def label_schema(rle: bool) -> pa.Schema:
    """Of a row with labels: `lseg.results.describe`'s entries beside the image's name and where it came from."""
    import pyarrow as pa

    entry = [("index", pa.int32()), ("name", pa.string()), ("share", pa.float64()), ("confidence", pa.float64())]
    if rle:
        entry.append(("rle", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])))
    return pa.schema(
        [*_common(), ("unlabelled", pa.float64()), ("labels", pa.list_(pa.struct(entry)))],
    )


def feature_schema() -> pa.Schema:
    """Of a row with features: float16 [rows, columns, D], flat, with the shape and the pixels from one to the next."""
    import pyarrow as pa

    shape = [("stride", pa.int32()), ("shape", pa.list_(pa.int32())), ("features", pa.list_(pa.float16()))]
    return pa.schema([*_common(), *shape])


def _common() -> list[tuple[str, pa.DataType]]:
    import pyarrow as pa

    size = ("size", pa.list_(pa.int32()))  # width, height
    return [("name", pa.string()), ("source", pa.string()), ("photo", pa.string()), size]
