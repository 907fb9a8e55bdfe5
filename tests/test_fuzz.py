"""Hostile files: a part of what tests/fuzz.py runs, the faults that it has found, and proof that it finds faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import spread
from fuzzing import bad_readers
from fuzzing.harness import Limits, run_cases
from fuzzing.targets import TARGETS

SLOW = ("model", "onnx", "onnxruntime", "triton", "list", "tar", "video", "text_cache")  # 30 to 300 ms a case


def test_hostile_files(tiny, tmp_path, seed):
    """Some two thousand cases of all targets; of each case made by hand, others in each run."""
    counts = {name: min(count, 3) if name in SLOW else count for name, count in spread(2000, None).items()}
    first = seed % 60
    tallies = run_cases(
        [(name, first, count) for name, count in counts.items()], seed, exported=tiny.folder, keep=tmp_path / "found"
    )
    failures = [f"{name} {one}" for name, tally in tallies.items() for one in tally.failures]
    assert not failures, f"seed {seed}, kept in {tmp_path / 'found'}: {failures[:5]}"
    assert {name: tally.cases for name, tally in tallies.items()} == counts and sum(counts.values()) > 1900
    for kind in ("accepted", "refused"):  # a fuzzer whose cases all go one way tries nothing
        assert sum(getattr(tally, kind) for tally in tallies.values()) > 300


def test_targets_take_their_seeds():
    """Names are different, and each target has its share."""
    assert len({target.name for target in TARGETS}) == len(TARGETS) and all(target.share > 0 for target in TARGETS)


def test_every_kind_of_failure_is_noticed(tmp_path, seed):
    """Bad readers, one of each kind, beside a good one: each is blamed for what it does, and the work goes on."""
    work = [(target.name, 0, 1) for target in bad_readers.TARGETS]
    limits = Limits(seconds=1.5, growth=200 << 20)
    tallies = run_cases(work, seed, limits=limits, table="fuzzing.bad_readers", keep=tmp_path)
    assert not tallies["fine"].failures and tallies["fine"].cases == 1
    for read, kind in bad_readers.KINDS.items():
        found = [(failure.kind, failure.case) for failure in tallies[read.__name__].failures]
        assert found == [(kind, 0)], (read.__name__, tallies[read.__name__].failures)
        assert (Path(tallies[read.__name__].failures[0].saved) / "a.txt").is_file()
    assert "SIGSEGV" in tallies["crash"].failures[0].words


def test_a_bad_target_name():
    from lseg.errors import UserError

    with pytest.raises(UserError, match="--target none is none: choose checkpoint, clip"):
        spread(10, ["none"])
