"""Laws of the SFT stage's program: kills change no bit of it, and rows that break it are named."""

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_distributed import PATIENCE, ended, forked, saved, started

from prefopt.packing import Steps
from stages import sft
from stages.artefacts import (
    CHECKED,
    PROMPTS,
    PROMPTS_SCHEMA,
    SFT,
    SFT_CURVE,
    digest,
    write_table,
)

NUM_ROWS, BATCH_SIZE, NUM_EPOCHS = 18, 4, 60
NUM_KILLS = 20
Write = Callable[..., dict[str, Any]]


@pytest.fixture
def prepared(base: Path, write_params: Write) -> Write:
    """What `sft` reads; gives what writes its parameters, with changes."""
    draw = random.Random(0)

    def tokens(count: int) -> list[list[int]]:
        return [[draw.randrange(3, 259) for _ in range(draw.randint(1, 9))] for _ in range(count)]

    columns: dict[str, list[Any]] = {name: [""] * NUM_ROWS for name in PROMPTS_SCHEMA.names}
    columns |= {
        "split": ["train"] * NUM_ROWS,
        "tokens": tokens(NUM_ROWS),
        "gold_tokens": tokens(NUM_ROWS),
        "rejected_tokens": [[]] * NUM_ROWS,
    }
    CHECKED.parent.mkdir()
    CHECKED.touch()
    write_table(PROMPTS, columns, PROMPTS_SCHEMA)

    def write(**changes: Any) -> dict[str, Any]:
        small = {
            "sft.batch_size": BATCH_SIZE,
            "sft.num_epochs": NUM_EPOCHS,
            "compute.checkpoint_every": 3,
            "compute.token_budget": 40,
        }
        return write_params(**small | changes)

    write()
    return write


def test_sft_killed_at_random_moments_ends_with_the_same_bits(prepared: Write) -> None:
    began = time.monotonic()
    assert forked(1, sft.main) == [0]
    took = time.monotonic() - began
    straight = digest(SFT), SFT_CURVE.read_bytes()
    shutil.rmtree(SFT)
    SFT_CURVE.unlink()
    draw = random.Random(0)
    reached = [0]
    for _ in range(NUM_KILLS):
        (child,) = started(1, sft.main)
        # Before its first step or some steps on; all of them together stop short of the end.
        wait_for_step(reached[-1] + draw.randrange(-4, 8))
        time.sleep(draw.uniform(0, took / 50))
        os.kill(child, signal.SIGKILL)
        assert ended([child]) == [-signal.SIGKILL]
        reached.append(last_saved())
    assert len(set(reached)) > NUM_KILLS / 3, reached
    assert forked(1, sft.main) == [0]
    assert (digest(SFT), SFT_CURVE.read_bytes()) == straight


def last_saved() -> int:
    return int(max(saved(), default="0"))


def wait_for_step(step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while last_saved() < step:
        assert time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.002)


def test_rows_that_break_a_step_are_named_and_the_state_before_it_is_saved(
    prepared: Write,
) -> None:
    """Weights as large as float32 holds: the first step is whole, the second one is not."""
    prepared(**{"sft.learning_rate": 1e38, "sft.warmup": 0.0})
    rows = Steps(NUM_ROWS, BATCH_SIZE, NUM_EPOCHS, seed=0)[1]
    message = f"step 1: loss nan, gradient norm nan; .*; it was of rows {re.escape(str(rows))} of"
    with pytest.raises(ValueError, match=f"{message} {PROMPTS}"):
        sft.main()
    assert saved() == ["00000001"]
    assert not SFT.exists()
