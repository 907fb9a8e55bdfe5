"""requirements.lock, LICENCES.md, sbom.cdx.json and `requirements.sh --locked` hold together.

The lock is read here by pip's own rules (packaging), not by the script that makes the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
LICENCES = (ROOT / "LICENCES.md").read_text(encoding="utf-8")
SBOM = json.loads((ROOT / "sbom.cdx.json").read_text(encoding="utf-8"))
PYTHONS = ("3.10.14", "3.11.9", "3.12.7", "3.13.1")
PIN = re.compile(r"^(?P<line>[A-Za-z0-9][^\\\n]*?) \\\n(?P<hashes>(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M)


def pins(lock: str = LOCK) -> list[tuple[Requirement, set[str]]]:
    """Each pinned requirement with its hashes."""
    found = [(Requirement(pin["line"]), set(re.findall("[0-9a-f]{64}", pin["hashes"]))) for pin in PIN.finditer(lock)]
    assert len(found) == len(re.findall(r"^[^ #\n]", lock, re.M)), (
        "a line of the lock has no hash, or is none of a package"
    )
    return found


def version_of(requirement: Requirement) -> str:
    (pinned,) = requirement.specifier
    assert pinned.operator == "==" and "*" not in pinned.version, requirement
    return pinned.version


def key(requirement: Requirement) -> tuple[str, str]:
    return canonicalize_name(requirement.name), version_of(requirement)


def on_linux(python: str) -> dict[str, str]:
    """What a marker sees on Linux, x86-64."""
    return {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "implementation_version": python,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "extra": "",
    }


def applying(python: str) -> dict[str, str]:
    """Name -> version of what is installed under this Python; each name has one version."""
    versions = {}
    for requirement, _ in pins():
        if requirement.marker is None or requirement.marker.evaluate(on_linux(python)):
            name, version = key(requirement)
            assert name not in versions, f"{name} twice for Python {python}"
            versions[name] = version
    return versions


def asked() -> list[Requirement]:
    lines = [
        line for name in ("requirements.txt", "requirements.in") for line in (ROOT / name).read_text().splitlines()
    ]
    return [
        Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip() and not line.startswith("-")
    ]


class TestLock:
    @pytest.mark.parametrize("python", PYTHONS)
    def test_it_holds_what_is_asked_for(self, python):
        """Every requirement's version lies within the bounds; a changed bound asks for a new lock."""
        versions = applying(python)
        assert len(asked()) > 15 and len(versions) > 60
        for requirement in asked():
            assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement

    def test_it_names_no_place(self):
        """No index, address or folder: a hash says which file it is, wherever that comes from."""
        said = "\n".join(line for line in LOCK.splitlines() if not line.lstrip().startswith("#"))
        assert not re.search(r"://|index-url|find-links| @ |/", said)
        assert not re.search(r"://|/(tmp|home|root|work|usr|opt)/", LOCK)

    def test_torch_is_the_one_that_requirements_sh_takes(self):
        script = (ROOT / "requirements.sh").read_text()
        for name in ("torch", "torchvision"):
            assert f"{name}=={applying(PYTHONS[1])[name]} " in script.replace(")", " ")

    def test_a_line_without_a_hash_is_found(self):
        with pytest.raises(AssertionError):
            pins(LOCK + "left-out==1.0\n")


def listed() -> dict[tuple[str, str], str]:
    """Licence by name and version, from the table of what is locked."""
    section = LICENCES.split("## In requirements.lock")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (\S.*?) \| (.+) \|$", section, re.M)
    return {
        (name, version): said
        for name, versions, said in rows
        if name not in ("package", "---")
        for version in versions.split(", ")
    }


class TestLicences:
    def test_every_locked_package_is_listed(self):
        locked = {key(requirement) for requirement, _ in pins()}
        assert listed().keys() == locked and len(locked) > 100
        assert all(said.strip("* ") for said in listed().values())

    def test_what_is_not_permissive_is_bold_and_explained(self):
        """Looked for by other words than the script's, which knows the permissive ones."""
        head = LICENCES.split("## In requirements.lock")[0]
        for (name, _), said in listed().items():
            if re.search(r"propriet|GPL|MPL|EPL|CDDL|not stated|commercial|unknown", said, re.I):
                assert said.startswith("**"), (name, said)
            if said.startswith("**"):
                assert f"`{name}`" in head or name.startswith("nvidia-") and "`nvidia-*`" in head, name

    def test_the_direct_ones_beside_the_lock_are_listed(self):
        for name in ("requirements-dev.txt", "requirements-ray.txt"):
            for line in (ROOT / name).read_text().splitlines():
                if not line.startswith(("#", "-")):
                    assert f"\n| {canonicalize_name(Requirement(line.split('#')[0]).name)} |" in LICENCES, line


CASES = [
    ({"license_expression": "MIT AND (Apache-2.0 OR BSD-3-Clause)", "license": "GPL"}, True),
    ({"license": "BSD", "classifier": ["License :: OSI Approved :: MIT License"]}, True),
    ({"license": "Copyright\nand pages of text", "classifier": ["License :: OSI Approved :: MIT License"]}, True),
    ({"license_expression": "MIT AND LGPL-2.1-only"}, False),
    ({"license": "Apache 2.0", "classifier": ["License :: Other/Proprietary License"]}, False),
    ({"license": "A licence that nobody knows"}, False),
    ({"license": "UNKNOWN", "classifier": ["Programming Language :: C"]}, False),
    ({}, False),
]


@pytest.mark.parametrize("metadata, permissive", CASES)
def test_what_is_not_known_counts_as_not_permissive(metadata, permissive, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    from licences import is_permissive, licence_of

    assert is_permissive(licence_of(metadata)) is permissive


class TestSbom:
    def test_every_locked_package_is_in_it(self):
        """With its version, its hashes and a licence; and nothing else is."""
        hashes = {
            (part["name"], part["version"]): {
                found["content"] for place in part["externalReferences"] for found in place.get("hashes", [])
            }
            for part in SBOM["components"]
        }
        assert hashes == {key(requirement): found for requirement, found in pins()}
        assert all(part["licenses"] and part["purl"].startswith("pkg:pypi/") for part in SBOM["components"])

    def test_its_licences_are_those_listed(self):
        for part in SBOM["components"]:
            (said,) = part["licenses"]
            text = said.get("expression") or said["license"].get("id") or said["license"]["name"]
            assert text == listed()[part["name"], part["version"]].strip("*"), part["name"]

    def test_it_is_cyclonedx_and_can_be_made_again(self):
        assert (SBOM["bomFormat"], SBOM["specVersion"]) == ("CycloneDX", "1.6")
        assert SBOM["metadata"]["component"]["name"] == "lseg-tensorrt"
        assert "serialNumber" not in SBOM and "timestamp" not in SBOM["metadata"]
        text = (ROOT / "sbom.cdx.json").read_text()
        assert not re.search(r'file:|"/|/(tmp|home|root|work|opt)/', text)
        assert set(re.findall(r'"https://([^/"]+)/simple', text)) == {"pypi.org"}


def test_the_demo_weights_are_those_of_the_readme():
    found = hashlib.sha256((ROOT / "demo" / "lseg_demo.safetensors").read_bytes()).hexdigest()
    said = re.findall(r"[0-9a-f]{64}", (ROOT / "README.md").read_text().split("## Which weights")[1].split("\n## ")[0])
    assert said == [found]


# A Python that makes "virtual environments" of itself and tells how it was called.
STUB = """#!/bin/sh
if [ "$2" = venv ]; then
  for folder in "$@"; do :; done
  mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"
fi
echo "$@"
"""


@pytest.fixture
def locked(tmp_path):
    """Runs requirements.sh --locked with that Python, in a clone whose path has a space."""
    clone = tmp_path / "my clone"
    clone.mkdir()
    for name in ("requirements.sh", "requirements.lock", "requirements.txt"):
        shutil.copy(ROOT / name, clone)
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
        environment = {"PATH": os.defpath, "PYTHON": str(python), **environment}
        return subprocess.run(
            ["./requirements.sh", "--locked", *words], cwd=clone, env=environment, capture_output=True, text=True
        )

    run.clone = clone
    return run


class TestLocked:
    def test_it_installs_the_lock_alone(self, locked):
        done = locked("echo", "then this")
        assert done.returncode == 0, done.stderr
        (install,) = [line for line in done.stdout.splitlines() if "pip install" in line]
        assert "--require-hashes --only-binary :all:" in install and install.count(" -r ") == 1
        assert install.endswith(f"-r {locked.clone}/requirements.lock") and "==" not in install
        assert done.stdout.splitlines()[-1] == "then this"

    def test_a_second_run_installs_nothing_and_a_new_lock_does(self, locked):
        locked()
        assert "pip install" not in locked().stdout
        (locked.clone / "requirements.lock").write_text(LOCK + "# changed\n")
        again = locked().stdout
        assert "pip install" in again and "venv --clear" in again

    def test_one_that_was_cut_short_is_begun_anew(self, locked):
        locked()
        (locked.clone / ".venv" / ".requirements.locked").write_text("unfinished\n")
        assert "pip install" in locked().stdout

    def test_a_folder_of_another_making_is_left_alone(self, locked):
        own = locked.clone / ".venv" / "lib" / "mine"
        own.mkdir(parents=True)
        done = locked()
        assert done.returncode == 2 and "remove it, or name another folder with --venv" in done.stderr
        assert own.exists() and len(done.stderr.splitlines()) == 1

    def test_where_it_cannot_hold(self, locked):
        for done in (locked("--dev"), locked(NVIDIA_PYTORCH_VERSION="24.06")):
            assert done.returncode == 2 and re.fullmatch(r"error: --locked .*\n", done.stderr)
        assert "its own torch and TensorRT stay" in done.stderr and not (locked.clone / ".venv").exists()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    clone = tmp_path_factory.mktemp("locked") / "my clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    yield clone
    shutil.rmtree(clone)


@pytest.mark.slow
class TestReally:
    """Gigabytes from the package index, in a clone whose path has a space."""

    def test_it_is_what_is_locked_and_it_runs(self, clone):
        environment = {**os.environ, "PYTHON": sys.executable}
        command = ["./requirements.sh", "--locked", "python", "enginerun.py", "--backend"]
        for backend in ("onnxruntime", "torch"):
            done = subprocess.run(
                [*command, backend], cwd=clone, env=environment, capture_output=True, text=True, timeout=1800
            )
            assert done.returncode == 0, done.stderr
            (clone / "image" / "temple_lseg.png").unlink()
        list_all = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
        told = subprocess.run([clone / ".venv/bin/python", "-c", list_all], capture_output=True, text=True, check=True)
        installed = {canonicalize_name(name): version for name, version in map(str.split, told.stdout.splitlines())}
        assert installed.pop("pip")
        assert installed == applying(".".join(map(str, sys.version_info[:3])))

    def test_another_file_is_refused(self, clone):
        """pip holds to the hashes: with one changed nothing is installed."""
        (pin,) = [each for each in PIN.finditer(LOCK) if each["line"].startswith("mdurl==")]
        wrong = clone.parent / "wrong.lock"
        wrong.write_text(re.sub("[0-9a-f]{64}", "0" * 64, pin[0]).rstrip(" \\\n") + "\n")
        command = [clone / ".venv/bin/python", "-m", "pip", "download", "--no-deps", "--require-hashes"]
        done = subprocess.run([*command, "-d", str(clone.parent), "-r", str(wrong)], capture_output=True, text=True)
        assert done.returncode != 0 and "HASH" in done.stderr.upper()
        assert not list(clone.parent.glob("mdurl*"))
