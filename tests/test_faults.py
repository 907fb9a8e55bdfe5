"""Killed processes: a few kills of each cheap kind, and what they leave. `tests/faults.py` kills hundreds of times."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lseg import files
from lseg.errors import UserError
from lseg.files import HELD, UNFINISHED, locked_folder, unfinished, write_files

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_few_kills(jobs, tmp_path, seed):
    """A folder of photos, killed and resumed: every photo has its files and its line once."""
    output = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "tests" / "faults.py"), "--target", "folder", "--kills", "5"]
    command += ["--jobs", str(jobs)]
    command += ["--seed", str(seed), "--output", str(output), "--folder", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    entry = json.loads(output.read_text())["targets"]["folder"]
    assert entry["kills"] == 5 and entry["faults"] == []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def die_holding(folder: Path) -> None:
    with unfinished(folder) as inside:
        (inside / "half").write_bytes(b"half")
        os.kill(os.getpid(), 9)


def test_what_a_killed_process_left_goes(tmp_path, monkeypatch):
    """And what a live one holds stays, as does what is not of this program's making."""
    monkeypatch.setattr(files, "_swept", set())
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{UNFINISHED}link").symlink_to(tmp_path / "outside")
    (tmp_path / "out" / f"{UNFINISHED}file").touch()
    dead = multiprocessing.get_context("spawn").Process(target=die_holding, args=(tmp_path / "out",))
    dead.start()
    dead.join(60)
    others = [f"{UNFINISHED}file", f"{UNFINISHED}link"]
    (left,) = set(names(tmp_path / "out")) - set(others)
    assert dead.exitcode == -9 and (tmp_path / "out" / left / "half").exists()
    with unfinished(tmp_path / "out") as live:
        assert not (tmp_path / "out" / left).exists()
        files._swept.clear()
        with unfinished(tmp_path / "out"):
            assert live.is_dir() and (live / HELD).exists()
    assert names(tmp_path / "out") == others and names(tmp_path / "outside") == []


def test_making_and_removing_at_once(tmp_path):
    """Threads that make folders while others take every folder for a dead one's: nobody's goes while it is held."""
    errors: list[BaseException] = []

    def make() -> None:
        try:
            for _ in range(200):
                with unfinished(tmp_path) as inside:
                    (inside / "a").write_bytes(b"a")
                    files._sweep(tmp_path)
                    assert (inside / "a").read_bytes() == b"a"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and names(tmp_path) == []


def test_a_set_is_never_mixed(tmp_path):
    """Killed between the moves: the new first file stands without the older second one."""
    first, second = tmp_path / "a.png", tmp_path / "a.json"
    write_files({first: b"old", second: b"old"})
    child = os.fork()
    if child == 0:
        move, calls = os.replace, []

        def replace(*paths: object) -> None:
            if calls:
                os.kill(os.getpid(), 9)
            calls.append(move(*paths))

        os.replace = replace
        write_files({first: b"new", second: b"new"})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == {"a.png": b"new"}
    write_files({first: b"whole", second: b"whole"})
    assert first.read_bytes() == second.read_bytes() == b"whole"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """As NFS has none of folders: the work goes on, and nothing is taken for a dead process's."""

    def refuse(handle: int, how: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with unfinished(tmp_path) as live:
        files._sweep(tmp_path)
        assert live.is_dir()
        with locked_folder(tmp_path):
            write_files({tmp_path / "a": b"a"})
    assert names(tmp_path) == ["a"]


def test_a_server_remembers_few_folders(tmp_path, monkeypatch):
    """It makes a new one for each answer."""
    monkeypatch.setattr(files, "_swept", set())
    monkeypatch.setattr(files, "MOST_SWEPT", 3)
    for index in range(8):
        write_files({tmp_path / str(index) / "a": b"a"})
        assert len(files._swept) <= 3 and names(tmp_path / str(index)) == ["a"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who may not write there")
def test_a_folder_of_somebody_else(tmp_path):
    """One sentence, and nothing left; as nobody, since root may write everywhere."""
    tmp_path.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            write_files({tmp_path / "a": b"a"})
        except UserError as error:
            os._exit(0 if "cannot be written (Permission denied)" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and names(tmp_path) == []


def test_an_interrupt_while_a_folder_is_removed(tmp_path, monkeypatch):
    """Ctrl-C in the middle of the removal ends the run, and the folder goes all the same."""
    remove, calls = shutil.rmtree, []

    def interrupted(path: Path, **options: bool) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(files.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path) as inside:
        (inside / "half").write_bytes(b"half")
    assert len(calls) == 2 and names(tmp_path) == []
