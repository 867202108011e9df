"""Paths and schemas of all that travels between stages, and how a stage publishes it.

A row of `completions` is a completion's identity; pairs, rankings and reference point at row
numbers.
Tables are parquet with page checksums and non-null columns, compared with their schema on read.
Those that grow with the data are written by row groups and read through a memory map, so that no
stage's memory grows with them.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path("artefacts")
CHECKED = ROOT / "checked.txt"
PROMPTS = ROOT / "prompts.parquet"
LISTS = ROOT / "lists.parquet"
TEMPLATES = ROOT / "templates.json"
CANDIDATES = ROOT / "candidates.parquet"
COMPLETIONS = ROOT / "completions.parquet"
PAIRS = ROOT / "pairs.parquet"
RANKINGS = ROOT / "rankings.parquet"
REVISIONS = ROOT / "revisions.parquet"
REFERENCE = ROOT / "reference.parquet"
SFT = ROOT / "models" / "sft"
SFT_CURVE = ROOT / "curves" / "sft.csv"
COMPARISON = ROOT / "comparison.json"
FRONTIER = ROOT / "frontier.csv"
REPORT = ROOT / "report"
WORK = Path(".prefopt")  # checkpoints, locks, journals: neither git's nor DVC's


def model_of(run: str) -> Path:
    return ROOT / "models" / run


def curve_of(run: str) -> Path:
    return ROOT / "curves" / f"{run}.csv"


def logratios_of(run: str) -> Path:
    return ROOT / "logratios" / f"{run}.parquet"


def generations_of(run: str) -> Path:
    return ROOT / "generations" / f"{run}.parquet"


def looks_of(run: str) -> Path:
    return ROOT / "looks" / f"{run}.csv"


def samples_of(run: str) -> Path:
    return ROOT / "samples" / f"{run}.parquet"


def judgements_of(run: str) -> Path:
    return ROOT / "judgements" / f"{run}.parquet"


def card_of(judge: str) -> Path:
    return ROOT / "cards" / f"{judge}.json"


def metrics_of(run: str) -> Path:
    return ROOT / "metrics" / f"{run}.json"


def reward_of(model: str) -> Path:
    return ROOT / "rewards" / model


def reward_curve_of(model: str) -> Path:
    return ROOT / "curves" / "rewards" / f"{model}.csv"


def reward_metrics_of(model: str) -> Path:
    return ROOT / "metrics" / "rewards" / f"{model}.json"


def reliability_of(model: str) -> Path:
    return ROOT / "reliability" / f"{model}.csv"


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in columns.items()])


_TOKENS = pa.list_(pa.field("element", pa.int32(), nullable=False))
_NATS = pa.list_(pa.field("element", pa.float32(), nullable=False))
_REWARDS = pa.list_(pa.field("element", pa.float32(), nullable=False))

PROMPTS_SCHEMA = _schema(
    split=pa.string(),  # train, validation, test, or shifted: of another distribution
    text=pa.string(),
    tokens=_TOKENS,
    gold=pa.string(),  # the data set's completion: SFT's target and an opponent
    gold_tokens=_TOKENS,
    rejected=pa.string(),  # where the data set has pairs (gold is then chosen), else empty
    rejected_tokens=_TOKENS,
)
# Of a prompt, row for row with `prompts`: the data set's own completions with rewards, or none.
LISTS_SCHEMA = _schema(
    completions=pa.list_(pa.field("element", _TOKENS, nullable=False)),
    rewards=_REWARDS,
)
CANDIDATES_SCHEMA = _schema(prompt=pa.int64(), text=pa.string(), tokens=_TOKENS)
COMPLETIONS_SCHEMA = _schema(prompt=_TOKENS, completion=_TOKENS)
PAIRS_SCHEMA = _schema(
    split=pa.string(),  # train, and after all of those validation
    chosen=pa.int64(),
    rejected=pa.int64(),
    preference=pa.float32(),
)
RANKINGS_SCHEMA = _schema(
    split=pa.string(),  # as in `pairs`
    completions=pa.list_(pa.field("element", pa.int64(), nullable=False)),  # one row may come twice
    rewards=_REWARDS,
)
# Of a pair, row for row with `pairs`: its completions under the prompts that show one of them.
REVISIONS_SCHEMA = _schema(
    chosen_given_rejected=pa.int64(),
    rejected_given_rejected=pa.int64(),
    chosen_given_chosen=pa.int64(),
    rejected_given_chosen=pa.int64(),
)
REFERENCE_SCHEMA = _schema(logps=_NATS)
# Of a pair, row for row with `pairs`: u = logp - reference_logp, and what it is relative to.
LOGRATIOS_SCHEMA = _schema(
    chosen=pa.float32(),
    rejected=pa.float32(),
    chosen_reference=pa.float32(),
    rejected_reference=pa.float32(),
    chosen_tokens=pa.int32(),
    rejected_tokens=pa.int32(),
)
# What a run writes while it trains.
GENERATIONS_SCHEMA = _schema(
    step=pa.int64(),  # after it
    prompt=pa.int64(),  # row of prompts
    seed=pa.int64(),
    text=pa.string(),
    tokens=_TOKENS,
    logp=pa.float32(),
    reference_logp=pa.float32(),
    kl=pa.float32(),  # of the next token, policy from reference, summed along the completion
)
# What a policy writes to be trained on, until its training has ended.
ROLLOUTS_SCHEMA = _schema(
    step=pa.int64(),
    prompt=pa.int64(),  # row of prompts
    text=pa.string(),
    tokens=_TOKENS,
    proposal_logp=pa.float64(),
    reference_logp=pa.float64(),
    features=pa.list_(pa.field("element", pa.float64(), nullable=False)),
)
SAMPLES_SCHEMA = _schema(
    prompt=pa.int64(),  # row of prompts
    revision=pa.int8(),  # 0, or how often the policy has revised its completion
    seed=pa.int64(),
    temperature=pa.float32(),
    text=pa.string(),
    tokens=_TOKENS,
    logp=pa.float32(),
    reference_logp=pa.float32(),
)
JUDGEMENTS_SCHEMA = _schema(
    prompt=pa.int64(),
    revision=pa.int8(),  # of the run's completion; the opponent's is always its first
    opponent=pa.string(),  # sft or gold
    judge=pa.string(),
    verdict=pa.string(),  # policy, opponent, tie; or unparsed, refused, missing
    policy_reward=pa.float32(),  # NaN of a judge that gives none
    opponent_reward=pa.float32(),
    order_consistent=pa.bool_(),
    policy_first=pa.string(),  # the verdict in each order, empty if it was not asked
    opponent_first=pa.string(),
    policy_first_reply=pa.string(),  # the judge's words, verbatim
    opponent_first_reply=pa.string(),
)


Item = TypeVar("Item")

ROW_GROUP = 8192  # rows: what is held of a table that is written


class TableWriter(AbstractContextManager["TableWriter"]):
    """Writes a table block by block; its bytes depend on the rows, not on the blocks."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._pending = schema.empty_table()
        self._file = pq.ParquetWriter(path, schema, write_page_checksum=True)

    def extend(self, columns: Mapping[str, Sequence[Any]]) -> None:
        block = pa.table(dict(columns), schema=self._pending.schema)
        block.validate(full=True)
        for name in block.column_names:
            assert block[name].null_count == 0, f"{self._path}: null in {name}"
        self._pending = pa.concat_tables([self._pending, block])
        while len(self._pending) >= ROW_GROUP:
            self._file.write_table(self._pending.slice(0, ROW_GROUP).combine_chunks())
            self._pending = self._pending.slice(ROW_GROUP)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None and len(self._pending):
            self._file.write_table(self._pending.combine_chunks())
        self._file.close()


def write_table(path: Path, columns: Mapping[str, Sequence[Any]], schema: pa.Schema) -> None:
    with TableWriter(path, schema) as table:
        table.extend(columns)


def blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Cut into lists of `size` items; the last may have fewer."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def read_table(path: Path, schema: pa.Schema) -> dict[str, list[Any]]:
    """Columns as Python lists.

    Raises:
        ValueError: if the file is missing, damaged or has another schema.
    """
    with _opened(path, schema) as file:
        return file.read().to_pydict()


class Column:
    """A mapped table's column: a sequence of Python values, each made when it is asked for."""

    def __init__(self, values: pa.ChunkedArray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> Any:
        return self.values[row].as_py()

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))


def map_table(path: Path, schema: pa.Schema) -> dict[str, Column]:
    """Columns of a table of any length, in memory that does not grow with it.

    The file is decoded once, as `spooled` does it, which verifies its checksums too.

    Raises:
        ValueError: if the file is missing, damaged or has another schema.
    """
    with _opened(path, schema) as file:
        return spooled(file.iter_batches(ROW_GROUP), schema)


def spooled(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> dict[str, Column]:
    """Columns of a table that lies in a file on disk and is mapped into memory.

    The file has no name: it takes up space as long as this process reads from it and no longer.
    """
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=WORK) as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        table = pa.ipc.open_file(pa.memory_map(f"/dev/fd/{file.fileno()}")).read_all()
    return {name: Column(table[name]) for name in schema.names}


def rows_of_split(table: Mapping[str, Column], split: str) -> range:
    """Rows of `prompts` or `pairs` that are of a split.

    Raises:
        ValueError: if they do not lie together.
    """
    start, found = 0, list[range]()
    for name, members in groupby(table["split"]):
        end = start + sum(1 for _ in members)
        if name == split:
            found.append(range(start, end))
        start = end
    if len(found) > 1:
        raise ValueError(
            f"{ROOT}: rows of one split do not lie together, got '{split}' in {len(found)} "
            "places; run `dvc repro --force prepare label`"
        )
    return found[0] if found else range(0)


@contextmanager
def _opened(path: Path, schema: pa.Schema) -> Generator[pq.ParquetFile, None, None]:
    try:
        # A buffer made beforehand would be of the whole file.
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(schema):
                raise ValueError(
                    f"{path}: other columns than expected, got {file.schema_arrow.names}; "
                    "it was written by another version, run `dvc repro`"
                )
            yield file
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path}: cannot be read, got {error}; run `dvc checkout {path}`, or `dvc repro`"
        ) from error


@dataclass(frozen=True)
class Workspace:
    """Where a running stage writes: `partial(path)` becomes `path` when the stage ends well."""

    name: str
    fingerprint: str
    directory: Path
    partials: Path

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def partial(self, output: Path) -> Path:
        path = self.partials / output
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def stage(
    name: str, *, inputs: Sequence[Path], outputs: Sequence[Path], params: Any
) -> Generator[Workspace, None, None]:
    """Run a stage's body so that its outputs appear whole or not at all.

    One process at a time holds a stage. Its inputs (files, parameters, this project's modules that
    are loaded) are hashed at the start, which names the checkpoints that it may resume from, and
    again at the end: what changed meanwhile would otherwise be recorded as the cause of these
    outputs. The process dies with its parent, so that a killed `dvc repro` leaves no second writer.
    Of several processes that torchrun started the first is the one that all this is said of; what
    the others write is thrown away.

    Raises:
        ValueError: if an input is missing, changed meanwhile, or another process holds the stage.
    """
    die_with_parent()
    started = time.monotonic()
    for path in inputs:
        if not path.exists():
            raise ValueError(
                f"{path}: no such input of stage '{name}', got nothing; run `dvc repro`"
            )
    WORK.mkdir(exist_ok=True)
    code = _first_party_modules()
    if not is_first():
        fingerprint = _fingerprint([*inputs, *code], params)
        with tempfile.TemporaryDirectory() as thrown_away:
            yield Workspace(name, fingerprint, _directory(name, fingerprint), Path(thrown_away))
        return
    with _held(name):
        fingerprint = _fingerprint([*inputs, *code], params)
        directory = _directory(name, fingerprint)
        shutil.rmtree(directory / "partial", ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        yield Workspace(name, fingerprint, directory, directory / "partial")
        if _fingerprint([*inputs, *code], params) != fingerprint:
            raise ValueError(
                f"stage '{name}': its inputs changed while it ran, got other bytes at the end; "
                "run `dvc repro` again"
            )
        for output in outputs:
            _publish(directory / "partial" / output, output)
        shutil.rmtree(directory.parent)
    with open(WORK / "times.jsonl", "a") as file:
        times = {"stage": name, "seconds": round(time.monotonic() - started, 1)}
        file.write(json.dumps(times) + "\n")


def is_first() -> bool:
    """Whether this process owns what a stage leaves: torchrun may have started several."""
    return os.environ.get("RANK", "0") == "0"


def program(main: Callable[[], None]) -> None:
    """Run a stage program; what this project refuses ends it with the one message and no trace."""
    try:
        main()
    except ValueError as error:
        # Before a stage holds its lock, DVC alone says which stage it is.
        if is_first() and "DVC_STAGE" in os.environ:
            with suppress(BlockingIOError), _locked(os.environ["DVC_STAGE"]) as record:
                record(_failure(error))
        raised_in = list(traceback.walk_tb(error.__traceback__))[-1][0].f_code.co_filename
        if not Path(raised_in).is_relative_to(Path(__file__).parents[1]) or (
            "site-packages" in raised_in
        ):
            raise
        sys.exit(f"error: {error}")


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a directory's names and bytes."""
    sha = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            sha.update(str(file.relative_to(path)).encode())
            with open(file, "rb") as stream:
                sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()


def weights_digest(model: Path) -> str:
    """SHA-256 of a model directory's weights and of the config that says how they are read."""
    sha = hashlib.sha256()
    for file in sorted([*model.glob("*.safetensors*"), model / "config.json"]):
        sha.update(f"{file.name} {digest(file)}\n".encode())
    return sha.hexdigest()


def _first_party_modules() -> list[Path]:
    here = Path.cwd()
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = {Path(file) for file in files if file and Path(file).is_relative_to(here)}
    return sorted(p.relative_to(here) for p in paths if "site-packages" not in p.parts)


def _directory(name: str, fingerprint: str) -> Path:
    return WORK / "stages" / name.replace("@", "-") / fingerprint[:16]


def _fingerprint(paths: Sequence[Path], params: Any) -> str:
    parts = {"params": params, "files": {str(path): digest(path) for path in paths}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _held(name: str) -> Generator[None, None, None]:
    """Hold a stage's lock; its file says who holds it, and in the end nothing, or what went wrong.

    So `prefopt status` can tell a stage that runs, one that failed, and one that was killed.
    """
    with ExitStack() as held:
        try:
            record = held.enter_context(_locked(name))
        except BlockingIOError:
            raise ValueError(
                f"stage '{name}': another process runs it, got a held lock; wait for it or end it"
            ) from None
        record({"pid": os.getpid(), "host": socket.gethostname()})
        try:
            yield
        except BaseException as error:
            record(_failure(error))
            raise
        record({})


@contextmanager
def _locked(name: str) -> Generator[Callable[[dict[str, Any]], None], None, None]:
    """Take a stage's lock or raise BlockingIOError; gives what writes its file anew."""
    path = WORK / "locks" / name.replace("@", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

        def record(said: dict[str, Any]) -> None:
            file.truncate(0)
            if said:
                file.write(json.dumps({"stage": name, "time": int(time.time()), **said}))
            file.flush()

        yield record


def _failure(error: BaseException) -> dict[str, Any]:
    what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return {"error": what[:1000]}


def _publish(partial: Path, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in [partial, *partial.rglob("*")]:
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if output.is_dir():
        shutil.rmtree(output)
    partial.replace(output)


def die_with_parent() -> None:
    """Be sent SIGTERM when the parent ends, however it ends."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
