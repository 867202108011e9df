"""Laws of what travels between stages."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PROJECT

from stages.artefacts import (
    CANDIDATES_SCHEMA,
    PAIRS_SCHEMA,
    ROW_GROUP,
    WORK,
    Column,
    TableWriter,
    blocks,
    digest,
    map_table,
    read_table,
    rows_of_split,
    stage,
    write_table,
)

Read = Callable[[Path, pa.Schema], Any]

pytestmark = pytest.mark.usefixtures("workplace")

INPUT, OUTPUT, FOLDER = Path("input.txt"), Path("artefacts/a.txt"), Path("artefacts/folder")
PAIRS = {
    "split": ["train"] * 500,
    "chosen": list(range(500)),
    "rejected": list(range(500, 1000)),
    "preference": [1.0] * 500,
}


def run_once(text: str) -> None:
    INPUT.touch()
    with stage("s", inputs=[INPUT], outputs=[OUTPUT, FOLDER], params={}) as workspace:
        workspace.partial(OUTPUT).write_text(text)
        workspace.partial(FOLDER).mkdir()
        (workspace.partial(FOLDER) / text).write_text(text)


def published() -> tuple[str, list[str]]:
    return OUTPUT.read_text(), sorted(path.name for path in FOLDER.iterdir())


def test_outputs_appear_when_a_stage_ends_and_not_before() -> None:
    INPUT.touch()
    with stage("s", inputs=[INPUT], outputs=[OUTPUT], params={}) as workspace:
        workspace.partial(OUTPUT).write_text("new")
        assert not OUTPUT.exists()
    assert OUTPUT.read_text() == "new"


def test_a_stage_replaces_its_earlier_outputs_whole() -> None:
    run_once("old")
    run_once("new")
    assert published() == ("new", ["new"])


def test_an_error_leaves_earlier_outputs_untouched() -> None:
    run_once("old")
    with (
        pytest.raises(ZeroDivisionError),
        stage("s", inputs=[INPUT], outputs=[OUTPUT, FOLDER], params={}) as workspace,
    ):
        workspace.partial(OUTPUT).write_text("half")
        workspace.partial(FOLDER).mkdir()
        raise ZeroDivisionError
    assert published() == ("old", ["old"])
    run_once("new")
    assert published() == ("new", ["new"])


def test_what_a_failed_run_left_half_written_is_gone_in_the_next() -> None:
    INPUT.touch()
    with (
        pytest.raises(ZeroDivisionError),
        stage("s", inputs=[INPUT], outputs=[FOLDER], params={}) as workspace,
    ):
        workspace.partial(FOLDER).mkdir()
        raise ZeroDivisionError
    with stage("s", inputs=[INPUT], outputs=[FOLDER], params={}) as workspace:
        assert not workspace.partial(FOLDER).exists()
        workspace.partial(FOLDER).mkdir()


def test_checkpoints_outlive_a_failed_run_of_the_same_inputs_and_no_other() -> None:
    def directory(params: dict[str, int]) -> Path:
        with (
            pytest.raises(ZeroDivisionError),
            stage("s", inputs=[INPUT], outputs=[], params=params) as workspace,
        ):
            workspace.checkpoints.mkdir(exist_ok=True)
            (workspace.checkpoints / "x").touch()
            raise ZeroDivisionError
        return workspace.checkpoints

    INPUT.write_text("a")
    first = directory({"beta": 1})
    assert directory({"beta": 1}) == first
    assert (first / "x").exists()
    assert directory({"beta": 2}) != first
    INPUT.write_text("b")
    assert directory({"beta": 1}) != first


def test_checkpoints_are_removed_when_a_stage_ends_well() -> None:
    INPUT.touch()
    with stage("s", inputs=[INPUT], outputs=[], params={}) as workspace:
        workspace.checkpoints.mkdir()
    assert not workspace.directory.exists()


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_inputs_that_changed_during_the_run_are_refused(change: str) -> None:
    run_once("old")
    INPUT.write_text("before")
    with (
        pytest.raises((ValueError, FileNotFoundError)) as caught,
        stage("s", inputs=[INPUT], outputs=[OUTPUT], params={}) as workspace,
    ):
        workspace.partial(OUTPUT).write_text("new")
        if change == "edited":
            INPUT.write_text("after")
        else:
            INPUT.unlink()
    assert caught.type is ValueError
    assert "stage 's': its inputs changed while it ran" in str(caught.value)
    assert published() == ("old", ["old"])


def test_a_file_changed_within_an_input_folder_is_refused() -> None:
    folder = Path("model")
    folder.mkdir()
    (folder / "weights").write_text("before")
    with (
        pytest.raises(ValueError, match="its inputs changed while it ran"),
        stage("s", inputs=[folder], outputs=[], params={}),
    ):
        (folder / "weights").write_text("after")


def test_a_missing_input_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"input.txt: no such input of stage 's'.*run `dvc repro`"),
        stage("s", inputs=[INPUT], outputs=[], params={}),
    ):
        pass


def test_a_second_holder_is_refused_and_another_stage_is_not() -> None:
    with stage("train@a", inputs=[], outputs=[], params={}):
        with stage("train@b", inputs=[], outputs=[], params={}):
            pass
        with (
            pytest.raises(ValueError, match="stage 'train@a': another process runs it"),
            stage("train@a", inputs=[], outputs=[], params={}),
        ):
            pass
    with stage("train@a", inputs=[], outputs=[], params={}):
        pass


KILLED = """
import os, signal
from pathlib import Path
from stages.artefacts import stage
output = Path("artefacts/a.txt")
with stage("s", inputs=[Path("input.txt")], outputs=[output], params={}) as workspace:
    workspace.partial(output).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_stage_leaves_earlier_outputs_and_a_free_lock() -> None:
    run_once("old")
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    killed = subprocess.run([sys.executable, "-B", "-c", KILLED], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert published() == ("old", ["old"])
    run_once("new")
    assert published() == ("new", ["new"])


def test_a_digest_is_of_names_and_bytes() -> None:
    def folder(name: str, **files: str) -> Path:
        path = Path(name)
        path.mkdir()
        for file, text in files.items():
            (path / file).write_text(text)
        return path

    one = digest(folder("one", a="x", b="y"))
    assert one == digest(folder("two", b="y", a="x"))
    assert one != digest(folder("three", a="x", b="z"))
    assert one != digest(folder("four", a="x", c="y"))


def test_a_table_is_read_as_it_was_written() -> None:
    columns = {"prompt": [0, 0], "text": ["é", ""], "tokens": [[1, 2], []]}
    write_table(Path("t.parquet"), columns, CANDIDATES_SCHEMA)
    assert read_table(Path("t.parquet"), CANDIDATES_SCHEMA) == columns


def test_a_mapped_table_is_read_as_it_was_written() -> None:
    columns = {"prompt": [0, 0, 7], "text": ["é", "", "x"], "tokens": [[1, 2], [], [3]]}
    write_table(Path("t.parquet"), columns, CANDIDATES_SCHEMA)
    mapped = map_table(Path("t.parquet"), CANDIDATES_SCHEMA)
    assert {name: list(column) for name, column in mapped.items()} == columns
    assert [mapped["tokens"][row] for row in (2, 0)] == [[3], [1, 2]]
    assert len(mapped["text"]) == 3
    with pytest.raises(IndexError):
        mapped["text"][3]


def test_a_mapped_table_outlives_its_file_and_leaves_nothing_behind() -> None:
    write_table(Path("pairs.parquet"), PAIRS, PAIRS_SCHEMA)
    mapped = map_table(Path("pairs.parquet"), PAIRS_SCHEMA)
    Path("pairs.parquet").unlink()
    assert list(mapped["rejected"]) == PAIRS["rejected"]
    assert list(WORK.iterdir()) == []


def test_the_bytes_of_a_table_do_not_depend_on_the_blocks_that_it_was_written_in() -> None:
    rows = 2 * ROW_GROUP + 5
    columns = {"prompt": [*range(rows)], "text": ["x"] * rows, "tokens": [[i] for i in range(rows)]}
    write_table(Path("whole.parquet"), columns, CANDIDATES_SCHEMA)
    with TableWriter(Path("blocks.parquet"), CANDIDATES_SCHEMA) as table:
        for block in blocks(range(rows), 1000):
            table.extend(
                {name: column[block[0] : block[-1] + 1] for name, column in columns.items()}
            )
    assert digest(Path("blocks.parquet")) == digest(Path("whole.parquet"))
    metadata = pq.read_metadata("blocks.parquet")
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == [ROW_GROUP, ROW_GROUP, 5]
    assert read_table(Path("blocks.parquet"), CANDIDATES_SCHEMA) == columns


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (["train", "train", "validation", "test"], range(2)),
        (["test", "train"], range(1, 2)),
        (["test"], range(0)),
    ],
)
def test_the_rows_of_a_split_are_those_that_say_so(splits: list[str], expected: range) -> None:
    assert rows_of_split(prompts_of(splits), "train") == expected


def test_a_split_in_several_places_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rows of one split do not lie together, got 'train' in 2 places"
    ):
        rows_of_split(prompts_of(["train", "test", "train"]), "train")


def prompts_of(splits: list[str]) -> dict[str, Column]:
    return {"split": Column(pa.chunked_array([splits]))}


both_ways = pytest.mark.parametrize("read", [read_table, map_table])


@both_ways
@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_a_flipped_bit_is_refused_on_reading(column: int, read: Read) -> None:
    path = Path("pairs.parquet")
    write_table(path, PAIRS, PAIRS_SCHEMA)
    chunk = pq.read_metadata(path).row_group(0).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    end = start + chunk.total_compressed_size
    damaged = bytearray(path.read_bytes())
    damaged[end - 1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"pairs.parquet: cannot be read.*dvc checkout"):
        read(path, PAIRS_SCHEMA)


@both_ways
def test_a_truncated_or_missing_table_is_refused(read: Read) -> None:
    path = Path("pairs.parquet")
    with pytest.raises(ValueError, match=r"pairs.parquet: cannot be read"):
        read(path, PAIRS_SCHEMA)
    write_table(path, PAIRS, PAIRS_SCHEMA)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"pairs.parquet: cannot be read"):
        read(path, PAIRS_SCHEMA)


@both_ways
def test_a_table_of_another_schema_is_refused(read: Read) -> None:
    path = Path("pairs.parquet")
    write_table(path, PAIRS, PAIRS_SCHEMA)
    with pytest.raises(ValueError, match=r"other columns than expected, got .*run `dvc repro`"):
        read(path, CANDIDATES_SCHEMA)
    nullable = pa.schema([field.with_nullable(True) for field in PAIRS_SCHEMA])
    pq.write_table(pa.table(PAIRS, schema=nullable), path)
    with pytest.raises(ValueError, match="other columns than expected"):
        read(path, PAIRS_SCHEMA)


def test_a_null_is_refused_on_writing() -> None:
    columns = PAIRS | {"chosen": [None] * 500}
    with pytest.raises((AssertionError, pa.ArrowException)):
        write_table(Path("pairs.parquet"), columns, PAIRS_SCHEMA)
