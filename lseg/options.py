"""Options of enginerun.py that do not go together, and values that cannot be."""

from __future__ import annotations

import importlib.util
from argparse import Namespace

from lseg.errors import UserError


def check_options(args: Namespace, usual: Namespace) -> None:
    """Refuses options that would have no effect, or would write over what is read; `usual` is what they are by default.

    Raises:
        UserError: with the first of them.
    """
    given = {name for name, value in vars(args).items() if value != vars(usual)[name]}

    def refuse(names: str, reason: str) -> None:
        for name in names.split():
            if name in given:
                raise UserError(f"{'--' * (name != 'photos')}{name.replace('_', '-')} {reason}")

    check_unknown(args.unknown)
    mapping = "stride points regions"
    if args.export_triton:
        photos = (
            "photos labels labels_file templates text_onnx inference output save_labels save_scores jsonl rle batch"
        )
        others = "features video frames unknown resume"
        refuse(f"{photos} {mapping} {others}", "has no meaning beside --export-triton: leave one out")
        return
    if args.video is not None:
        refuse("photos", "are there beside --video: give one of the two")
        refuse(
            f"features {mapping} batch jsonl rle resume save_scores", "is for photos, not for --video: leave one out"
        )
        if args.frames is not None and args.frames < 1:
            raise UserError(f"--frames {args.frames} cannot be: give 1 or more")
        return
    refuse("frames", "is for --video: name that too")
    if args.features:
        refuse("batch", "is for pictures: --features looks at photos one by one: leave one out")
        pictures = "save_labels save_scores jsonl rle unknown labels labels_file templates text_onnx"
        refuse(pictures, "has no meaning beside --features, which makes no pictures: leave one out")
        if args.inference != "whole":
            raise UserError(f"--features is for photos seen whole, not --inference {args.inference}: leave one out")
    else:
        refuse(mapping, "is for --features: name that too")
    if args.jsonl and (args.jsonl.suffix.lower() != ".jsonl" or args.jsonl.is_dir()):
        raise UserError(f"--jsonl {args.jsonl}: name a file that ends in .jsonl")  # never a photo or a list of labels
    if args.rle and not args.jsonl:
        raise UserError("--rle adds masks to the lines of --jsonl: name that file too")
    if args.rle and not importlib.util.find_spec("pycocotools"):
        raise UserError("--rle needs pycocotools, which is not installed: run './requirements.sh'")
    if args.save_scores and args.inference != "whole":
        raise UserError(f"--save-scores is for photos seen whole, not --inference {args.inference}: leave one out")


def check_unknown(cosine: float | None) -> None:
    """Of --unknown, in any script."""
    if cosine is not None and not -1 <= cosine <= 1:
        raise UserError(f"--unknown {cosine} is no cosine: give a number from -1 to 1, such as 0.2")
