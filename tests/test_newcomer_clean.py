"""The README's examples, run as they are written by somebody who has just cloned the repository.

Another user, an environment with nothing but PATH, HOME and TMPDIR, no pip cache, a folder with a space in its name and
a virtual environment that the README's first command makes. It takes some gigabytes of /tmp, the package index and a
quarter of an hour. Only what was committed is tested.

`./requirements.sh` is put in front of later examples, as the README says. `--dev pytest` would run all tests again: it
gets the one file tests/test_model.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from readme_examples import ROOT, Example, Runs, examples, place

pytestmark = pytest.mark.slow
NOBODY = 65534
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST, DEV = "./requirements.sh python enginerun.py", "./requirements.sh --dev pytest"
LONGEST = 1200  # seconds an example may take, the set-up included


class Newcomer:
    """A clone in a home of its own, and how commands run there."""

    def __init__(self, home: Path):
        self.home, self.clone = home, home / "my clone"
        self.before: list[str] = []
        if os.geteuid() == 0:
            self.before = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]

    def start(self, *command: str) -> subprocess.Popen:
        # Gradio's client keeps its files in one folder of /tmp for all users: here it must not meet another's.
        environment = {"PATH": os.defpath, "HOME": str(self.home), "TMPDIR": str(self.home)}
        return subprocess.Popen(
            [*self.before, *command],
            cwd=self.clone,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell that runs the tests in the background has them ignore Ctrl-C, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *command: str) -> str:
        """What it prints; it must end with status 0 and no traceback."""
        began = time.monotonic()
        process = self.start(*command)
        try:
            said = process.communicate(timeout=LONGEST)[0]
        finally:
            process.kill()
        print(f"{time.monotonic() - began:.1f} s: {command}\n{said}")
        assert process.returncode == 0 and "Traceback" not in said, said
        return said


@pytest.fixture(scope="module")
def newcomer() -> Iterator[Newcomer]:
    home = Path(tempfile.mkdtemp(prefix="newcomer-"))
    try:
        found = Newcomer(home)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(found.clone)], check=True)
        provide(found.clone)
        if found.before:
            subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", str(home)], check=True)
        found.run("bash", "-c", FIRST)
        yield found
    finally:
        shutil.rmtree(home)


def provide(clone: Path) -> None:
    """The reader's own files, all made from the bundled photo: each is another part of it."""
    photo, count = cv2.imread(str(clone / "image" / "temple.jpg")), 0

    def write(name: str) -> Path:
        nonlocal count
        count += 1
        path = clone / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), photo[10 * count : 10 * count + 240, 15 * count : 15 * count + 320])
        return path

    for name in ("street", "room", "kitchen", "holiday/beach", "drive/day/first", "room/sofa", "photos/a", "photos/b"):
        write(f"{name}.jpg")
    (clone / "frames.txt").write_text(f"{write('second.jpg').name}\n")
    third = write("third.jpg")
    (clone / "shards").mkdir()
    for name in ("shard-000.tar", "shards/0.tar"):
        with tarfile.open(clone / name, "w") as archive:
            archive.add(third, third.name)
    (clone / "spots.txt").write_text("10 20\n300 200\n")
    video = cv2.VideoWriter(str(clone / "drive.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (320, 240))
    for left in range(4):
        video.write(photo[:240, left : left + 320])
    video.release()


def check(clone: Path, example: Example, said: str) -> None:
    """What the example should have made is there and can be read, and it says what it should."""
    where = place(example)
    assert isinstance(where, Runs) and re.search(where.says, said), said
    for pattern in where.makes:
        paths = list(clone.glob(pattern))
        assert paths, f"{pattern} was not made: {said}"
        for path in paths:
            assert path.stat().st_size > 0
            if path.suffix == ".png":
                height, width = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).shape[:2]
                assert not path.name.endswith("_labels.png") or (width, height) == (320, 240)
            elif path.suffix == ".json":
                assert json.loads(path.read_text())["labels"]
            elif path.suffix == ".npy":
                assert np.load(path).shape == (2, 512)
            elif path.suffix == ".mp4":
                assert cv2.VideoCapture(str(path)).read()[0]


EXAMPLES = [example for example in examples(README) if isinstance(place(example), Runs)]
PAGE = [example for example in EXAMPLES if "app.py" in example.text or "gradio_client" in example.text]
LAST = [example for example in EXAMPLES if example.text.startswith(DEV)]
# The one that sets up for developers comes last: it installs what other examples say they install themselves.
ORDER = [example for example in EXAMPLES if example not in PAGE + LAST]


@pytest.mark.parametrize("example", ORDER, ids=lambda example: example.text.splitlines()[0][:70])
def test_example(newcomer, example):
    if example.language == "python":
        said = newcomer.run("./requirements.sh", "python", "-c", example.text)
    elif example.text.startswith("./"):
        said = newcomer.run("bash", "-c", example.text)
    else:
        said = newcomer.run("bash", "-c", f"./requirements.sh {example.text}")
    check(newcomer.clone, example, said)


def test_the_page_and_its_client(newcomer):
    """app.py at its usual port, the client's example beside it, and Ctrl-C."""
    page, client = PAGE
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 7860), 1):
        pytest.skip("port 7860, which the README names, is taken by another program here")
    process = newcomer.start("bash", "-c", f"exec ./requirements.sh {page.text}")
    try:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):
                urllib.request.urlopen("http://127.0.0.1:7860", timeout=5).close()
                break
            time.sleep(0.5)
        assert process.poll() is None, process.stdout.read()
        said = newcomer.run("./requirements.sh", "python", "-c", client.text)
        check(newcomer.clone, client, said)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said, said
    check(newcomer.clone, page, said)


def test_the_tests(newcomer):
    (example,) = LAST
    said = newcomer.run("bash", "-c", f"{example.text} tests/test_model.py")
    check(newcomer.clone, example, said)


def test_the_clone_is_clean(newcomer):
    """Running the examples changes no file of the repository."""
    assert newcomer.run("git", "status", "--porcelain", "--untracked-files=no") == ""
