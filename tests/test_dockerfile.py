"""The Dockerfile and what it starts, as far as that can be checked where no image is built."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import app
import enginerun

ROOT = Path(app.__file__).parent


def test_hadolint():
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed: run './requirements.sh --dev true'")
    found = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_what_it_copies_is_there():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name
    entry = re.search(r'ENTRYPOINT \["(.+)"\]', "\n".join(lines))[1]
    assert (ROOT / entry).stat().st_mode & 0o111


def test_start(tmp_path):
    """Options reach the script with the volume's folders first, so that a visitor's own may follow."""
    text = (ROOT / "docker" / "start.sh").read_text()
    script = tmp_path / "start.sh"
    script.write_text(text.replace("/data", str(tmp_path / "data")).replace("cd /lseg", f"cd {tmp_path}"))
    (tmp_path / "app.py").write_text("import sys; print(*sys.argv[1:])")
    command = ["bash", str(script), "app.py", "--host", "0.0.0.0"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    )
    given = done.stdout.split()
    assert done.returncode == 0 and (tmp_path / "data" / "engines").is_dir()
    for parse in (app.parse_args, enginerun.parse_args):
        args = parse(given[:4])
        assert (args.onnx.name, args.engines.name) == ("onnx", "engines")
    assert app.parse_args(given).host == "0.0.0.0"
    assert subprocess.run(["bash", str(script)], capture_output=True).returncode != 0
