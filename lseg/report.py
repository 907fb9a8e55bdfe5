"""Measurements as JSON, as a table in Markdown, as the README's section and as a plot."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from lseg.benchmark import is_stationary
from lseg.errors import UserError

FORMAT = "lseg-report-1"
SECTION = re.compile(r"(<!-- performance: (?P<files>[^>]*?) -->\n).*?(<!-- /performance -->)", re.DOTALL)
REQUIRED = {"machine", "weights", "settings", "rows", "matrix_rate", "photos", "labels", "reference", "image_size"}
HEADER = (
    "backend",
    "precision",
    "batch, labels",
    "encode_image",
    "encode_text",
    "total",
    "images/s",
    "TFLOP/s",
    "labels equal",
    "embeddings off",
    "mIoU",
)


def load_reports(paths: Sequence[Path]) -> list[dict]:
    """Reads reports and merges those of the same weights, inputs and settings on the same machine, in order.

    Raises:
        UserError: a file cannot be read or is no report, or two that belong together measured the same.
    """
    merged: dict[tuple, dict] = {}
    for path in paths:
        try:
            report = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): give a JSON that testlseg.py wrote") from None
        except (ValueError, RecursionError):
            report = None
        if not _is_report(report):
            raise UserError(f"{path} is no report of this version of testlseg.py: measure again")
        gpu = report["machine"]["gpu"] or {}
        same = (report["weights"], report["settings"], report["photos"], report["labels"], report["reference"])
        key = (json.dumps(same, sort_keys=True), report["machine"]["cpu"], gpu.get("name"))
        if key not in merged:
            merged[key] = report
            continue
        there = [case for row in merged[key]["rows"] for case in _measured(row)]
        twice = [case for row in report["rows"] for case in _measured(row) if case in there]
        if twice:
            raise UserError(f"{path} holds {twice[0][0]}, as another report of the same weights and machine: give one")
        if gpu:
            clocks = merged[key]["machine"]["gpu"]
            clocks["clocks.sm"] = _span(clocks["clocks.sm"], gpu["clocks.sm"])
        merged[key]["rows"] += report["rows"]
        merged[key]["matrix_rate"] |= report["matrix_rate"]
    return list(merged.values())


def _span(one: str, other: str) -> str:
    """Two clocks as one, from the lowest to the highest: each "1980 MHz" or a span already."""
    numbers = [int(number) for number in re.findall(r"\d{1,9}", f"{one} {other}")] or [0]
    low, high = min(numbers), max(numbers)
    return f"{low} MHz" if low == high else f"{low} to {high} MHz"


def _is_report(report: object) -> bool:
    """Whether a JSON value has all that a table is made of."""
    if not isinstance(report, dict) or report.get("format") != FORMAT or not REQUIRED <= report.keys():
        return False
    try:
        markdown(report)
        hash((report["machine"]["cpu"], (report["machine"]["gpu"] or {}).get("name")))
        for row in report["rows"]:
            hash(tuple(_measured(row)))
        return isinstance(report["matrix_rate"], dict) and isinstance(report["rows"], list)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return False


def _measured(row: dict) -> list[tuple]:
    """What a row has of a backend: its accuracy alone, or the numbers of images and labels that it was timed with."""
    return [(row["variant"], case["batch"], case["labels"]) for case in row["speed"]] or [(row["variant"],)]


def markdown(report: dict) -> str:
    """A report as Markdown: what it was taken on, the table, and notes on what is flagged in it."""
    machine, weights, settings = report["machine"], report["weights"], report["settings"]
    gpu = machine["gpu"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    if gpu:
        where = f"{gpu['name']}, driver {gpu['driver_version']}, SM clock {gpu['clocks.sm']}; {where}"
    kind = "random weights of the official size" if weights["random"] else f"weights: {weights['name']}"
    size = report["image_size"]
    lines = [f"**{where}; {kind}; {size} × {size}**", ""]
    rows = [cells for row in report["rows"] for cells in _cells(report, row)]
    # What no row has is no column: images a second are of later reports alone.
    kept = [i for i, name in enumerate(HEADER) if name != "images/s" or any(cells[i] != "–" for cells in rows)]
    header, *rows = ([cells[i] for i in kept] for cells in (HEADER, *rows))
    widths = [max(len(cells[i]) for cells in (header, *rows)) for i in range(len(header))]
    for cells in (header, ["-" * width for width in widths], *rows):
        lines.append("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")
    starred = any(cell.endswith("*") for cells in rows for cell in cells)
    lines += ["", *_notes(report, settings, starred)]
    return "\n".join(lines)


def _cells(report: dict, row: dict) -> list[tuple[str, ...]]:
    """A table row for each batch size and number of labels of one backend."""
    name = f"{row['library']} ({row['device']})" if row["library"] else row["variant"]
    arithmetic = row["precision"] + (f" {row['matmul']}" if row["matmul"] else "")
    accuracy = row["accuracy"] or {}
    off = ("reference", "–")
    if not accuracy.get("is_reference"):
        off = _number(accuracy.get("label_agreement"), ".2f", " %"), _number(accuracy.get("relative_difference"), ".1e")
    found = (*off, _number(accuracy.get("dataset", {}).get("miou"), ".2f"))
    if row["error"] and not row["speed"]:
        return [(name, arithmetic, "failed", *["–"] * 5, *found)]
    if not row["speed"]:
        return [(name, arithmetic, *["–"] * 6, *found)]
    text = row["encode_text"].get(str(report["settings"]["table_text_count"]))
    rate = report["matrix_rate"].get(row["precision"])
    if rate and (row["device"] != "CPU") != (rate.get("device") == "GPU"):
        rate = None  # of another device
    cells = []
    for case in row["speed"]:
        stages = case["stages"]
        share = f" ({case['tflops'] / rate['tflops']:.0%})" if rate else ""
        cells.append(
            (
                name,
                arithmetic,
                f"{case['batch']}, {case['labels']}",
                _milliseconds(stages.get("encode_image")),
                _milliseconds(text),
                _milliseconds(stages["total"]),
                _rate(case.get("throughput")),
                f"{case['tflops']:.2f}{share}" if case["tflops"] else "–",
                *found,
            )
        )
    return cells


def _milliseconds(summary: dict | None) -> str:
    if summary is None:
        return "–"
    digits = 2 if summary["median"] < 10 else 1 if summary["median"] < 100 else 0
    flag = "" if is_stationary(summary) else " *"
    return f"{summary['median']:.{digits}f} ({summary['p99']:.{digits}f}){flag}"


def _rate(throughput: dict | None) -> str:
    if throughput is None:
        return "–"
    rate = throughput["images_a_second"]
    return f"{rate:.{2 if rate < 10 else 1 if rate < 100 else 0}f}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _notes(report: dict, settings: dict, starred: bool) -> list[str]:
    """What the columns mean, and what a reader must know of single rows."""
    notes = [
        f"Median milliseconds (p99) of {settings['runs']} runs after {settings['warmup']} of warm-up, backends "
        "interleaved. encode_image: from normalised image to embeddings, on the device; from uint8 image to label map "
        "where one engine does both (TensorRT, PyTorch compiled). encode_text: "
        f"{settings['table_text_count']} labels. total: from uint8 image to label map, both in host memory, the text "
        f"embeddings kept. {_throughput_note(report)}TFLOP/s: of encode_image, with the share of a large matrix "
        "product's rate in PyTorch. "
        f"Labels and embeddings: against {report['reference']}, on {_photos(report)}; embeddings off: the length of "
        "the difference over the length, of all pixels' embeddings together."
    ]
    if settings.get("batch"):
        notes.append(f"TensorRT's image engine takes {settings['batch']} images a run, and fewer in the same time.")
    if starred:
        notes.append("\\* not stationary: the last quarter of the runs differs by more than 10 % from the first.")
    for row in report["rows"]:
        if row["error"]:
            notes.append(f"{row['variant']} failed: {row['error']}.")
        for reason in row["broken"]:
            notes.append(f"{row['variant']} breaks its bound: {reason}.")
        if row["build_seconds"]:
            notes.append(f"{row['variant']}: engines built in {row['build_seconds']:.0f} s.")
        if (row["device_memory_mib"] or 0) > 0:
            notes.append(f"{row['variant']}: {row['device_memory_mib']:.0f} MiB of GPU memory.")
        data = (row["accuracy"] or {}).get("dataset")
        if data:
            notes.append(f"{row['variant']} on {_dataset_line(data)}")
    return "\n\n".join(notes).split("\n")


def _throughput_note(report: dict) -> str:
    """What the images a second are of, where there are some."""
    found = [case["throughput"] for row in report["rows"] for case in row["speed"] if case.get("throughput")]
    callers = sorted({each["callers"] for each in found})
    if not found:
        return ""
    return f"images/s: the same in calls by as many threads as keep a backend busy: {' or '.join(map(str, callers))}. "


def _photos(report: dict) -> str:
    return ", ".join(report["photos"]) or "no photo"


def _dataset_line(data: dict) -> str:
    """One data set's result in words and numbers."""
    line = f"{data['name']} ({data['images']} images, {data['evaluation']}): mIoU {data['miou']:.2f}"
    change = data.get("miou_difference")
    if change:
        low, high = change["low"], change["high"]
        line += f" ({change['value']:+.3f} from the reference's, 95 % interval {low:+.3f} to {high:+.3f})"
    line += f", pixel accuracy {data['pixel_accuracy']:.2f}; "
    return line + ", ".join(f"{name} {_number(value, '.1f')}" for name, value in data["iou"].items()) + "."


def readme_section(files: Sequence[str], root: Path) -> str:
    """What stands in the README between its markers, from the reports named there."""
    return "\n\n".join(markdown(report) for report in load_reports([root / name for name in files])) + "\n"


def update_readme(readme: Path, files: Sequence[str] | None = None) -> list[str]:
    """The README's text with its section made anew, from `files` or from those that it names.

    Returns:
        the text before and after.

    Raises:
        UserError: the README has no such section, or a report cannot be read.
    """
    text = readme.read_text(encoding="utf-8")
    match = SECTION.search(text)
    if match is None:
        raise UserError(f"{readme} has no section between '<!-- performance: FILES -->' and '<!-- /performance -->'")
    names = list(files) if files else match["files"].split()
    head = f"<!-- performance: {' '.join(names)} -->\n"
    section = head + readme_section(names, readme.parent) + match[3]
    return [text, text[: match.start()] + section + text[match.end() :]]


def plot(report: dict, path: Path) -> None:
    """Latency by stage, stacked, of the first case, and label agreement beside it; a PNG.

    Raises:
        UserError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Matplotlib is not installed: 'pip install matplotlib', or give --no-plot") from None
    import io

    from lseg.files import write_files

    rows = [row for row in report["rows"] if row["speed"]][::-1]
    names = [
        f"{row['library']}\n{row['device'][:24]}, {row['precision']} {row['matmul'] or ''}".strip() for row in rows
    ]
    places = range(len(rows))
    figure = Figure(figsize=(9, 1.4 + 0.6 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    start = [0.0] * len(rows)
    for stage, colour in (("preprocess", "#8a8f98"), ("encode_image", "#2a7de1"), ("similarity", "#f2a33a")):
        values = [row["speed"][0]["stages"].get(stage, {}).get("median", 0.0) for row in rows]
        left.barh(places, values, left=start, color=colour, label=stage)
        start = [a + b for a, b in zip(start, values, strict=True)]
    for index, total in enumerate(start):
        left.text(total, index, f" {total:.3g} ms", va="center")
    left.set_yticks(places, names)
    case = rows[0]["speed"][0] if rows else {"batch": 1, "labels": 0}
    left.set_xlabel(f"median milliseconds, batch {case['batch']}, {case['labels']} labels")
    left.margins(x=0.15)
    left.legend(loc="lower right", frameon=False)
    agreement = [(row["accuracy"] or {}).get("label_agreement") for row in rows]
    known = [(index, value) for index, value in enumerate(agreement) if value is not None]
    right.scatter([value for _, value in known], [index for index, _ in known], color="#222", zorder=3)
    right.set_xlabel("labels equal, %")
    right.grid(axis="x", alpha=0.3)
    lowest = min((value for _, value in known), default=100.0)
    right.set_xlim(min(99.0, lowest - 0.2), 100.1)
    figure.suptitle(_title(report), fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_files({path: file.getvalue()})


def _title(report: dict) -> str:
    gpu = report["machine"]["gpu"]
    weights = "random weights, official size" if report["weights"]["random"] else f"{report['weights']['name']} weights"
    return f"{gpu['name'] if gpu else report['machine']['cpu']}, {weights}"
