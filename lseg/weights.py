"""Which file `--weights` means. No torch here: a run from exported files needs only this and the file's hash."""

from __future__ import annotations

from pathlib import Path

from lseg.errors import UserError, short

DEMO_WEIGHTS = Path(__file__).resolve().parent.parent / "demo" / "lseg_demo.safetensors"
OFFICIAL_ID = "1FTuHY1xPUkM-5gaDtMfgCl3D0gR89WV7"
OFFICIAL_URL = f"https://drive.google.com/file/d/{OFFICIAL_ID}"
REMEDY = f"fetch the official file with 'python lseg_export.py --download' or in a browser from {OFFICIAL_URL}"


def resolve(weights: str | Path) -> Path:
    """The file meant by `--weights`: "demo", or a path. Raises UserError where there is none."""
    if str(weights) == "demo":
        if not DEMO_WEIGHTS.is_file():
            shown = short(DEMO_WEIGHTS)
            raise UserError(f"{shown} is missing: restore it with 'git checkout -- {shown}'")
        return DEMO_WEIGHTS
    path = Path(weights)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the checkpoint file in it")
    if not path.exists():
        raise UserError(f"{path} does not exist: give a checkpoint's path or 'demo', or {REMEDY}")
    return path
