"""Laws of many processes: their number changes nothing but the order of sums."""

import csv
import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import PROJECT, byte_tokenizer, llama, shipped_params
from safetensors.torch import load_file

from prefopt.distributed import shares
from prefopt.packing import Row
from prefopt.scoring import token_logps
from stages import sft, train
from stages.artefacts import (
    CHECKED,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    REFERENCE,
    REFERENCE_SCHEMA,
    REVISIONS,
    REVISIONS_SCHEMA,
    SFT,
    WORK,
    curve_of,
    generations_of,
    logratios_of,
    model_of,
    write_table,
)
from stages.launch import check_gpus
from stages.params import load_params
from stages.tracking import JOURNALS

NUM_TRAIN = 11  # steps of 5, 5 and 1: in the last one, one of two processes has nothing to do
NUM_ROWS = NUM_TRAIN + 3  # and for validation


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path, None, None]:
    """What sft and a run read: uneven rows and a random model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.tracking._start_courier", lambda: None)
    generator = random.Random(0)

    def tokens(least: int, most: int) -> list[int]:
        return [generator.randrange(3, 259) for _ in range(generator.randint(least, most))]

    prompts = [tokens(2, 6) for _ in range(NUM_ROWS)]
    rows = [Row(prompts[i // 2], tokens(1, 12)) for i in range(2 * NUM_ROWS)]
    for path in (CHECKED, SFT):
        path.parent.mkdir(parents=True, exist_ok=True)
    CHECKED.write_text("sound\n")
    for directory in ("data/base", SFT):
        llama().save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
    texts = [""] * NUM_ROWS
    splits = ["train"] * NUM_TRAIN + ["validation"] * (NUM_ROWS - NUM_TRAIN)
    columns = {
        "split": splits,
        "text": texts,
        "tokens": prompts,
        "gold": texts,
        "gold_tokens": [row.completion for row in rows[::2]],
        "rejected": texts,
        "rejected_tokens": [[] for _ in texts],
    }
    write_table(PROMPTS, columns, PROMPTS_SCHEMA)
    columns = {
        "prompt": [row.prompt for row in rows],
        "completion": [row.completion for row in rows],
    }
    write_table(COMPLETIONS, columns, COMPLETIONS_SCHEMA)
    columns = {
        "split": splits,
        "chosen": list(range(0, 2 * NUM_ROWS, 2)),
        "rejected": list(range(1, 2 * NUM_ROWS, 2)),
        "preference": [0.9] * NUM_ROWS,
    }
    write_table(PAIRS, columns, PAIRS_SCHEMA)
    write_table(REVISIONS, {name: [] for name in REVISIONS_SCHEMA.names}, REVISIONS_SCHEMA)
    logps = [logp.tolist() for logp in token_logps(llama(), rows)]
    write_table(REFERENCE, {"logps": logps}, REFERENCE_SCHEMA)
    # Nobody reads what a courier would carry away; one that finds another at work ends at once.
    JOURNALS.mkdir(parents=True)
    with open(JOURNALS / "courier.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


NUM_STEPS = 3 * 12
LONG_STEPS = 3 * 6
MAX_KL = 0.006
PATIENCE = 300  # seconds, where the machine is busy

ACCURACIES = "validation/rewards/accuracies"
LORA = {"rank": 2, "alpha": 4, "targets": "all-linear"}

# kto couples the examples of a micro-batch, and its reference is alive. Of lora and of short the
# looks decide which policy is left.
RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo", "beta": 0.1, "sft_weight": 0.2},
    "kto": {"loss": "kto", "beta": 0.1},
    "lora": {"loss": "dpo", "beta": 0.1, "lora": LORA, "select": ACCURACIES},
    "short": {"loss": "dpo", "beta": 0.1, "max_kl": MAX_KL},
}
LONG = {"loss": "dpo", "beta": 0.1, "num_epochs": LONG_STEPS // 3, "select": "validation/loss"}


def set_params(num_processes: int, top_layers: int = 0) -> None:
    tree = shipped_params()
    tree["compute"] |= {"token_budget": 60, "checkpoint_every": 5, "num_processes": num_processes}
    for section in ("sft", "train"):
        tree[section] |= {"batch_size": 5, "num_epochs": NUM_STEPS // 3, "top_layers": top_layers}
    tree["data"]["max_completion_tokens"] = 6
    tree["watch"] |= {"every": 2, "num_generations": 3}
    tree["runs"] = {name: row | {"num_epochs": 2} for name, row in RUNS.items()} | {"long": LONG}
    Path("params.yaml").write_text(yaml.safe_dump(tree))


def forked(num_processes: int, program: Callable[[], None]) -> list[int]:
    """Run `program` in processes as torchrun would start them; what they exit with."""
    return ended(started(num_processes, program))


def started(num_processes: int, program: Callable[[], None]) -> list[int]:
    """Ids of processes that run `program` together, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children: list[int] = []
    for rank in range(num_processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        # Whatever happens here, this process must not go on with the tests.
        try:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
            sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), num_processes)
            os.environ |= {key: str(value) for key, value in (numbers | sizes).items()}
            os.environ["MASTER_ADDR"] = "localhost"
            program()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return children


def ended(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run_of(name: str) -> Callable[[], None]:
    def main() -> None:
        sys.argv = ["train", name]
        train.main()

    return main


def curve(path: Path) -> list[dict[str, float]]:
    with open(path) as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def same_but_for_rounding(found: Path, expected: Path) -> None:
    """The same files under both folders; numbers agree to 1e-5 of the largest, or relatively."""
    files = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    assert files == {path.relative_to(found) for path in found.rglob("*") if path.is_file()}
    for path in files:
        match path.suffix:
            case ".safetensors":
                ours, theirs = load_file(found / path), load_file(expected / path)
                assert ours.keys() == theirs.keys()
                for name, tensor in theirs.items():
                    scale = tensor.abs().max().item()
                    assert torch.allclose(ours[name], tensor, rtol=0, atol=1e-5 * scale), name
            case ".csv":
                steps = zip(curve(found / path), curve(expected / path), strict=True)
                for number, (one, other) in enumerate(steps):
                    # The policy is the reference at step 0, and rounding decides who is ahead.
                    names = {n for n in other if number > 0 or not n.endswith("/accuracies")}
                    assert one.keys() == other.keys()
                    for name in names:
                        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
            case ".parquet":
                ours, theirs = pq.read_table(found / path), pq.read_table(expected / path)
                assert ours.schema.equals(theirs.schema)
                for name, kind in zip(ours.column_names, ours.schema.types, strict=True):
                    found_values, values = ours[name].to_pylist(), theirs[name].to_pylist()
                    if pa.types.is_floating(kind):
                        values = pytest.approx(values, rel=1e-4, abs=1e-5)
                    assert found_values == values, name
            case _:
                assert (found / path).read_bytes() == (expected / path).read_bytes()


def left_by(name: str, into: str) -> Path:
    """Move what a training left into another folder."""
    for path in (of(name) for of in (model_of, curve_of, logratios_of, generations_of)):
        if path.exists():
            to = Path(into) / path
            to.parent.mkdir(parents=True, exist_ok=True)
            path.rename(to)
    return Path(into)


def test_runs_of_two_processes_are_those_of_one(workplace: Path) -> None:
    for num_processes, into in ((1, "one"), (2, "two")):
        set_params(num_processes=num_processes)
        for name in RUNS:
            assert set(forked(num_processes, run_of(name))) == {0}
            left_by(name, into)
    same_but_for_rounding(Path("two"), Path("one"))
    assert Path("two", model_of("lora"), "adapter_model.safetensors").exists()
    assert [step["kept"] for step in curve(Path("two", curve_of("lora"))) if "kept" in step][
        -1
    ] == 0
    short = curve(Path("two", curve_of("short")))
    assert len(short) < len(curve(Path("two", curve_of("dpo"))))
    assert short[-1]["validation/kl"] > MAX_KL


def saved() -> list[str]:
    """Names of the checkpoints of what is training: the numbers of their steps."""
    return sorted(path.name for path in WORK.glob("stages/*/*/checkpoints/0*"))


def wait_for_checkpoint() -> None:
    deadline = time.monotonic() + PATIENCE
    while not saved():
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.005)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_training_goes_on_with_any_number_of_processes(
    workplace: Path, before: int, after: int
) -> None:
    set_params(num_processes=1)
    assert forked(1, sft.main) == [0]
    expected = left_by("sft", "straight")
    set_params(num_processes=before)
    children = started(before, sft.main)
    wait_for_checkpoint()
    # One of them is told, and all of them stop after the same step.
    os.kill(children[-1], signal.SIGTERM)
    assert set(ended(children)) == {128 + signal.SIGTERM}
    assert 5 <= int(saved()[-1]) < NUM_STEPS
    set_params(num_processes=after)
    assert set(forked(after, sft.main)) == {0}
    same_but_for_rounding(left_by("sft", "resumed"), expected)


def launched(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-B", "-m", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(PROJECT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def children_of(process: subprocess.Popen[str]) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in listed.split()]


def test_a_killed_process_ends_the_others_and_the_run_goes_on_to_the_same_bits(
    workplace: Path,
) -> None:
    set_params(num_processes=2)
    assert forked(2, run_of("long")) == [0, 0]
    expected = left_by("long", "straight")
    training = launched("stages.train", "long")
    wait_for_checkpoint()
    workers = children_of(training)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, told = training.communicate(timeout=PATIENCE)
    assert training.returncode == 128 + signal.SIGKILL
    assert "error: process 1 was ended by SIGKILL; run it again" in told
    assert "Traceback" not in told
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert int(saved()[-1]) < LONG_STEPS
    training = launched("stages.train", "long")
    _, told = training.communicate(timeout=PATIENCE)
    assert training.returncode == 0
    assert told.count("is kept, by validation/loss") == 1
    found = left_by("long", "resumed")
    files = [path.relative_to(expected) for path in expected.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".csv", ".parquet"}
    for path in files:
        assert (found / path).read_bytes() == (expected / path).read_bytes(), path


def test_what_all_processes_refuse_is_told_once(workplace: Path) -> None:
    set_params(num_processes=2, top_layers=3)
    training = launched("stages.sft")
    _, told = training.communicate(timeout=PATIENCE)
    assert training.returncode == 1
    message = "error: top_layers: more than the model has, got 3; at most 2\n"
    assert told.endswith(message)
    assert told.count("error: ") == 1
    assert "Traceback" not in told


def test_examples_are_dealt_out_evenly_and_always_alike() -> None:
    assert shares([3, 1, 1, 1], 2) == [[0], [1, 2, 3]]
    assert shares([5], 3) == [[0], [], []]
    assert shares([1, 1, 1, 1, 1], 1) == [[0, 1, 2, 3, 4]]
    costs = [random.Random(seed).randint(1, 100) for seed in range(64)]
    dealt = shares(costs, 8)
    assert sorted(number for share in dealt for number in share) == list(range(64))
    loads = [sum(costs[number] for number in share) for share in dealt]
    assert max(loads) - min(loads) <= max(costs)
    assert dealt == shares(costs, 8)


def test_more_processes_than_a_step_has_examples_are_refused(workplace: Path) -> None:
    set_params(num_processes=6)
    message = r"compute\.num_processes: more than a step has examples, got 6 for sft\.batch_size 5"
    with pytest.raises(ValueError, match=message):
        load_params()


def test_more_processes_than_gpus_are_refused() -> None:
    check_gpus(3, 0)
    check_gpus(2, 2)
    with pytest.raises(ValueError, match="more than this machine has GPUs, got 3 for 2; a process"):
        check_gpus(3, 2)


def test_another_number_than_torchrun_started_is_refused(
    workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_params(num_processes=3)
    assert forked(2, sft.main) == [1, 1]
    assert "torchrun started another number, got 3 for 2; set it" in capfd.readouterr().err
