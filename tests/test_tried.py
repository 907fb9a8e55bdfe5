"""The README's table of what was tried to break it says what the runs' files say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## What was tried to break it")[1].split("\n## ")[0]
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


class Row(NamedTuple):
    what: str
    many: str
    outcome: str
    where: str
    command: str

    @property
    def log(self) -> object:
        (name,) = re.findall(r"log/\w+\.json", self.command)
        return json.loads((ROOT / name).read_text())


LINES = [line for line in SECTION.splitlines() if line.startswith("| ")][2:]
ROWS = [Row(*(cell.strip() for cell in line.strip("|").split(" | "))) for line in LINES]


def values(told: object) -> Iterator[tuple[str, object]]:
    """Every value with its key, at any depth; of objects and lists their lengths too."""
    if isinstance(told, dict | list):
        yield "", len(told)
        for name, value in told.items() if isinstance(told, dict) else enumerate(told):
            yield str(name), value
            yield from values(value)


def untold(text: str, log: object) -> list[str]:
    """The text's numbers that no value of the log rounds to."""
    numbers = [value for _, value in values(log) if isinstance(value, int | float) and not isinstance(value, bool)]

    def is_told(number: str) -> bool:
        digits = len(number.partition(".")[2])
        return any(f"{value:.{digits}f}" == number.replace(",", "") for value in numbers)

    return [number for number in NUMBER.findall(text) if not is_told(number)]


def test_there_are_rows():
    assert len(ROWS) >= 7 and SECTION.count("| --- ") == 5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what[:40])
class TestRow:
    def test_its_numbers_are_the_files(self, row):
        assert NUMBER.search(row.many)
        assert not untold(f"{row.many} {row.outcome}", row.log)

    def test_nothing_broke(self, row):
        """No part of the file tells of a failure; or, of a bound that was passed, the row tells too."""
        found = list(values(row.log))
        assert not [name for name, value in found if name == "holds" and value is not True]
        assert not [(name, value) for name, value in found if name in ("failed", "wrong") and value]
        failures = [value for name, value in found if name == "failures" and value]
        assert bool(failures) == ("beyond what the run allowed" in row.outcome)

    def test_its_faults_are_told(self, row):
        """A run that counted faults says so in its row."""
        faults = [value for name, value in values(row.log) if name == "faults" and value]
        assert bool(faults) == ("fault" in row.outcome)

    def test_its_weights_are_the_files(self, row):
        weights = [value for name, value in values(row.log) if name == "weights" and isinstance(value, str)]
        assert all(weight in row.where for weight in weights)

    def test_its_command_is_there(self, row):
        for name in re.findall(r"python (\S+\.py)", row.command):
            assert (ROOT / name).is_file()


def test_another_number_is_found():
    """The checks above can fail."""
    row = ROWS[0]
    many = int(NUMBER.search(row.many)[0].replace(",", ""))
    assert untold(f"{many + 1}", row.log) == [f"{many + 1}"] and untold("12,345.67", row.log) == ["12,345.67"]
