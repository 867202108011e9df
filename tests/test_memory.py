"""The stages' peak memory does not grow with the number of rows in the data."""

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory import RESULT, measure, peak_of
from benchmarks.report import README, memory_table
from stages.artefacts import LOGRATIOS_SCHEMA, logratios_of, read_table, write_table
from stages.evaluate import arrays_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

FEW, MANY = 1_000, 20_000


def test_peak_memory_is_that_of_a_twentieth_of_the_rows() -> None:
    few, many = (dict(measure(pairs, ("prepare", "label", "train"))) for pairs in (FEW, MANY))
    # label is so light that a row group, which so few pairs do not fill, is a fifth of it.
    for stage in ("prepare", "train"):
        assert many[stage].bytes < 1.1 * few[stage].bytes, stage
    assert many["label"].bytes < few["prepare"].bytes / 2


def test_an_evaluation_makes_no_python_number_of_a_log_ratio(workplace: Path) -> None:
    pairs = 3 * 8192 + 1
    draw = np.random.default_rng(0)
    drawn = {
        name: draw.integers(1, 99, pairs) if "tokens" in name else draw.normal(-9, 5, pairs)
        for name in LOGRATIOS_SCHEMA.names
    }
    columns = {
        name: drawn[name].astype(LOGRATIOS_SCHEMA.field(name).type.to_pandas_dtype())
        for name in drawn
    }
    logratios_of("dpo").parent.mkdir(parents=True)
    write_table(logratios_of("dpo"), columns, LOGRATIOS_SCHEMA)
    tracemalloc.start()
    try:
        found = arrays_of("dpo")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for name, values in read_table(logratios_of("dpo"), LOGRATIOS_SCHEMA).items():
        expected = np.array(values)
        assert found[name].dtype == expected.dtype
        assert np.array_equal(found[name], expected)
    # 24 bytes as they are stored, 48 in 64 bits; of lists beside those it was 192.
    assert peak / pairs < 90


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
