"""Serves what `enginerun.py --export-triton DIR` writes by a Triton server on the CPU, without a container.

    python -m venv served && served/bin/pip install nvidia-pytriton onnxruntime
    served/bin/python demo/triton_server.py DIR [what tritonserver takes, as --grpc-port 9001]

The package nvidia-pytriton brings the server itself with its Python backend only, so ONNX Runtime's place is taken by
`demo/triton_backend.py`. It wants NumPy 1: give it an environment of its own. All else is as on any Triton server:
configurations, ensemble, batches of several clients' requests, warm-up, cache, gRPC, HTTP and metrics.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lseg.errors import Parser, UserError, run  # noqa: E402

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
INSTALL = "pip install nvidia-pytriton onnxruntime, in an environment of their own"


def packaged() -> Path:
    """The folder of the server in nvidia-pytriton."""
    for name in ("pytriton", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed beside {sys.executable}: {INSTALL}")
    spec = importlib.util.find_spec("pytriton")
    assert spec and spec.origin
    server = Path(spec.origin).parent / "tritonserver"
    if not (server / "python_backend_stubs" / VERSION).is_dir():
        raise UserError(f"nvidia-pytriton brings no server for Python {VERSION} here: take another Python")
    return server


def write_backends(server: Path, folder: Path) -> None:
    """A folder of backends: the Python one with the process for this Python, and ours by the name "onnxruntime"."""
    shutil.copytree(server / "backends" / "python", folder / "python")
    shutil.copy(server / "python_backend_stubs" / VERSION / "triton_python_backend_stub", folder / "python")
    (folder / "onnxruntime").mkdir()
    shutil.copy(ROOT / "demo" / "triton_backend.py", folder / "onnxruntime" / "model.py")


def environment(server: Path) -> dict[str, str]:
    """Variables for the server. Its Python process needs this very Python's library, or the server waits for ever.

    The process takes its packages from where the first `python3` of PATH lies, whatever PYTHONPATH says.
    """
    library = Path(sysconfig.get_config_var("LIBDIR") or sys.base_prefix)
    name = f"libpython{VERSION}.so.1.0"
    if not (library / name).exists():
        raise UserError(f"{library / name} is missing: take a Python that was built with its shared library")
    libraries = [server.parent.parent / "nvidia_pytriton.libs", library]
    paths = {"LD_LIBRARY_PATH": libraries, "PATH": [Path(sys.executable).parent]}
    changed = {name: os.pathsep.join([*map(str, first), os.environ.get(name, "")]) for name, first in paths.items()}
    return {**os.environ, **{name: value.rstrip(os.pathsep) for name, value in changed.items()}}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("repository", type=Path, metavar="DIR", help="that --export-triton wrote")
    return parser.parse_known_args(argv)


def main(args: argparse.Namespace, others: list[str]) -> int:
    if not (args.repository / "lseg" / "config.pbtxt").is_file():
        raise UserError(f"{args.repository} is no model repository: write one by enginerun.py --export-triton DIR")
    server = packaged()
    variables = environment(server)
    with tempfile.TemporaryDirectory(prefix="lseg-triton-") as folder:
        write_backends(server, Path(folder))
        caches = server / "caches"
        command = [server / "bin" / "tritonserver", f"--model-repository={args.repository}"]
        command += [f"--backend-directory={folder}", f"--cache-directory={caches}", *others]
        process = subprocess.Popen(command, env=variables)
        for number in (signal.SIGINT, signal.SIGTERM):  # the server ends by itself then, and we after it
            signal.signal(number, lambda number, _: process.send_signal(number))
        return process.wait()


if __name__ == "__main__":
    run(lambda: main(*parse_args()))
