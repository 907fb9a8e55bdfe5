"""Remakes what tells of the dependencies: requirements.lock, LICENCES.md and sbom.cdx.json.

    python3 -m venv DIR && DIR/bin/pip install "pip>=25.1" "uv>=0.9,<1" "cyclonedx-bom>=7.2,<8"
    DIR/bin/python tests/supply.py               # newest versions that requirements.in allows
    DIR/bin/python tests/supply.py --keep-lock   # of the lock that is there

It needs PyPI, and `./requirements.sh --dev` run before, whose packages are listed beside the locked ones.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.license import LicenseExpression
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from licences import licence_of, page
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK, LICENCES, SBOM = ROOT / "requirements.lock", ROOT / "LICENCES.md", ROOT / "sbom.cdx.json"
INDEX = "https://pypi.org/simple"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SYSTEMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64"), ("emscripten", "wasm32"))


class Locked(NamedTuple):
    """One entry of the lock; `lines` is its text, hashes included."""

    name: str
    version: str
    requirement: Requirement
    lines: str


def make_lock() -> None:
    """Names and hashes of PyPI, whatever index this machine's settings name."""
    command = ["pip", "compile", "--no-config", "--universal", "--python-version", PYTHONS[0], "--upgrade", "--quiet"]
    command += ["--generate-hashes", "--default-index", INDEX, "--no-python-downloads"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    environment["UV_CUSTOM_COMPILE_COMMAND"] = "python tests/supply.py"
    beside = Path(sys.executable).with_name("uv")
    subprocess.run([beside, *command, "requirements.in", "-o", LOCK.name], cwd=ROOT, env=environment, check=True)


def read_lock() -> list[Locked]:
    entries = []
    for lines in re.findall(r"^[a-z0-9].*\\\n(?:    --hash=.*\n)+", LOCK.read_text(), re.MULTILINE):
        requirement = Requirement(lines.split("\\\n")[0])
        version = next(iter(requirement.specifier)).version
        entries.append(Locked(canonicalize_name(requirement.name), version, requirement, lines))
    return entries


def python_of(entry: Locked) -> str:
    """The oldest Python that the entry is for on some system."""
    marker = entry.requirement.marker
    for python in PYTHONS:
        for system, machine in SYSTEMS:
            here = {"python_full_version": f"{python}.9", "python_version": python}
            here |= {"sys_platform": system, "platform_machine": machine}
            if marker is None or marker.evaluate(here):
                return python
    raise SystemExit(f"error: {entry.requirement} is for no Python of {', '.join(PYTHONS)}: change PYTHONS")


def read_metadata(entries: Iterable[Locked]) -> dict[tuple[str, str], dict]:
    """Each locked file's metadata by name and version, from the index."""
    groups = defaultdict(list)
    for entry in entries:
        groups[python_of(entry)].append(entry)
    found = {}
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)] + [
        "manylinux2014_x86_64",
        "manylinux1_x86_64",
    ]
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
    environment.pop("PIP_FIND_LINKS", None)
    for python, group in groups.items():
        with tempfile.TemporaryDirectory() as folder:
            listed, report = Path(folder, "listed.txt"), Path(folder, "report.json")
            # Without markers, which pip would ask of the Python it runs on, and hashes, for which it would download.
            listed.write_text("".join(f"{entry.name}=={entry.version}\n" for entry in group))
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--dry-run",
                "--ignore-installed",
                "--no-deps",
            ]
            command += [
                "--index-url",
                INDEX,
                "--only-binary=:all:",
                "--python-version",
                f"{python}.9",
                "--target",
                folder,
            ]
            command += [word for platform in platforms for word in ("--platform", platform)]
            subprocess.run([*command, "--report", report, "-r", listed], env=environment, check=True)
            for item in json.loads(report.read_text())["install"]:
                metadata = item["metadata"]
                found[canonicalize_name(metadata["name"]), metadata["version"]] = metadata
    return found


def read_installed(python: Path) -> dict[tuple[str, str], dict]:
    """The metadata of what an interpreter has installed, by name and version."""
    program = "import importlib.metadata as m, json; print(json.dumps([d.metadata.json for d in m.distributions()]))"
    told = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout
    return {(canonicalize_name(item["name"]), item["version"]): item for item in json.loads(told)}


def make_sbom(licences: dict[tuple[str, str], str]) -> None:
    """cyclonedx-py's list of the lock with the licences added, without times, serial numbers and local paths."""
    beside = Path(sys.executable).with_name("cyclonedx-py")
    command = [
        beside,
        "requirements",
        "--output-reproducible",
        "--of",
        "JSON",
        "--pyproject",
        "pyproject.toml",
        LOCK.name,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: cyclonedx-py failed: {done.stderr}")
    bom, factory = json.loads(done.stdout), LicenseFactory()
    for component in bom["components"]:
        component.pop("description")  # the line of the lock, whose hashes stand in the component already
        licence = factory.make_from_string(licences[component["name"], component["version"]])
        if isinstance(licence, LicenseExpression):
            component["licenses"] = [{"expression": licence.value}]
        else:
            component["licenses"] = [{"license": {"id": licence.id} if licence.id else {"name": licence.name}}]
    text = json.dumps(bom, indent=1) + "\n"
    if wrong := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise SystemExit(f"error: the SBOM does not keep to CycloneDX's schema: {wrong}")
    SBOM.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-lock", action="store_true", help="leave requirements.lock as it is")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv/bin/python", help="where --dev installed")
    args = parser.parse_args()
    if not args.keep_lock:
        make_lock()
    entries = read_lock()
    licences = {key: licence_of(metadata) for key, metadata in read_metadata(entries).items()}
    missing = [str(entry.requirement) for entry in entries if (entry.name, entry.version) not in licences]
    if missing:
        raise SystemExit(f"error: the index told nothing of {', '.join(missing)}: look at requirements.lock")
    names = {entry.name for entry in entries} | {"pip"}
    installed = {key: licence_of(metadata) for key, metadata in read_installed(args.python).items()}
    LICENCES.write_text(page(licences, {key: said for key, said in installed.items() if key[0] not in names}))
    make_sbom(licences)


if __name__ == "__main__":
    main()
