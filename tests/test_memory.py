"""The stages' peak memory does not grow with the number of rows in the data."""

import json
import sys

import pytest

from benchmarks.memory import RESULT, measure, peak_of
from benchmarks.report import README, memory_table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

FEW, MANY = 1_000, 20_000


def test_peak_memory_is_that_of_a_twentieth_of_the_rows() -> None:
    few, many = (dict(measure(pairs, ("prepare", "label", "train"))) for pairs in (FEW, MANY))
    # label is so light that a row group, which so few pairs do not fill, is a fifth of it.
    for stage in ("prepare", "train"):
        assert many[stage].bytes < 1.1 * few[stage].bytes, stage
    assert many["label"].bytes < few["prepare"].bytes / 2


def test_what_a_program_holds_is_seen_and_what_it_maps_is_not() -> None:
    holds = "import time; held = bytearray(b'x' * 2**26); time.sleep(0.2)"
    maps = (
        "import mmap, tempfile, time; file = tempfile.TemporaryFile(); file.truncate(2**26); "
        "mapped = mmap.mmap(file.fileno(), 2**26, access=mmap.ACCESS_READ); "
        "seen = sum(mapped[i] for i in range(0, 2**26, 4096)); time.sleep(0.2)"
    )
    nothing = peak_of([sys.executable, "-c", "import time; time.sleep(0.2)"]).bytes
    assert peak_of([sys.executable, "-c", holds]).bytes > nothing + 2**26 - 2**20
    assert peak_of([sys.executable, "-c", maps]).bytes < nothing + 2**24


def test_the_page_shows_the_committed_peaks() -> None:
    assert memory_table(json.loads(RESULT.read_text())) in README.read_text()
