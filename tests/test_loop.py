"""Laws of the training loop: cuts and kills change nothing."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT
from torch import Tensor, nn

from prefopt.checkpoints import Checkpoints, Metrics
from prefopt.loop import (
    Diverged,
    Objective,
    Optimisation,
    Selection,
    Terminated,
    Watch,
    decay,
    fit,
)

NUM_STEPS = 10
OPTIMISATION = Optimisation(learning_rate=0.01, schedule="cosine", warmup=0.2, weight_decay=0.1)


class Killed(Exception):
    """What stands in for a killed process."""


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))


def squares(
    policy: nn.Module, *, micro_batch_size: int = 8, kill_at: int | None = None
) -> Objective:
    """A regression whose data depend on the step alone."""

    def objective(step: int) -> Iterator[tuple[Tensor, Metrics]]:
        if step == kill_at:
            raise Killed
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for start in range(0, 8, micro_batch_size):
            part = inputs[start : start + micro_batch_size]
            errors = (policy(part).squeeze(-1) - part.sum(1)) ** 2
            yield errors.sum() / 8, {"largest": part.abs().sum().item() / 8}

    return objective


def trained(
    *,
    optimisation: Optimisation = OPTIMISATION,
    checkpoints: Checkpoints | None = None,
    num_steps: int = NUM_STEPS,
    watch: Watch | None = None,
    **options: int | None,
) -> tuple[nn.Module, list[Metrics]]:
    policy, log = network(), []
    fit(
        policy,
        squares(policy, **options),
        num_steps,
        optimisation,
        log=log.append,
        checkpoints=checkpoints,
        watch=watch,
    )
    return policy, log


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(p, q)
        for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_micro_batches_change_nothing(micro_batch_size: int) -> None:
    whole, whole_log = trained()
    cut, cut_log = trained(micro_batch_size=micro_batch_size)
    for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)
    for one, other in zip(whole_log, cut_log, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_training_twice_gives_the_same_bits() -> None:
    (one, one_log), (other, other_log) = trained(), trained()
    assert same_bits(one, other)
    assert one_log == other_log


@pytest.mark.parametrize("every", [1, 3, 4])
@pytest.mark.parametrize("kill_at", [0, 1, 4, 7, 9])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, every: int, kill_at: int) -> None:
    straight, straight_log = trained()
    checkpoints = Checkpoints(tmp_path / "checkpoints", every)
    with pytest.raises(Killed):
        trained(checkpoints=checkpoints, kill_at=kill_at)
    resumed, resumed_log = trained(checkpoints=checkpoints)
    assert same_bits(straight, resumed)
    assert resumed_log == straight_log


def test_a_run_killed_again_and_again_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight, straight_log = trained()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    for kill_at in (3, 3, 5, 8):
        with pytest.raises(Killed):
            trained(checkpoints=checkpoints, kill_at=kill_at)
    resumed, resumed_log = trained(checkpoints=checkpoints)
    assert same_bits(straight, resumed)
    assert resumed_log == straight_log


KILLS_ITSELF = """
import os, signal, sys
from pathlib import Path
from test_loop import *

checkpoints = Checkpoints(Path("checkpoints"), 3)
policy, log = network(), []
objective = squares(policy)

def killing(step):
    if step == 7 and sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return objective(step)

fit(policy, killing, NUM_STEPS, OPTIMISATION, log=log.append, checkpoints=checkpoints)
straight, straight_log = trained()
assert same_bits(policy, straight) and log == straight_log
"""


def test_a_run_that_was_sent_sigkill_resumes_to_the_same_bits(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"}

    def run(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-B", "-c", KILLS_ITSELF, how],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    assert run("kill").returncode == -signal.SIGKILL
    assert names(tmp_path / "checkpoints") == ["00000003", "00000006"]
    resumed = run("resume")
    assert resumed.returncode == 0, resumed.stderr


def test_a_run_killed_at_twenty_random_moments_resumes_to_the_same_bits(tmp_path: Path) -> None:
    steps = 2000
    straight, straight_log = trained(num_steps=steps)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 10)
    draw = random.Random(0)
    for _ in range(20):
        child = os.fork()
        if child == 0:
            # Whatever happens here, this process must not go on with the tests.
            try:
                trained(checkpoints=checkpoints, num_steps=steps)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    reached = max(map(int, (path.name for path in checkpoints.directory.glob("0*"))))
    assert 0 < reached < steps
    resumed, log = trained(checkpoints=checkpoints, num_steps=steps)
    assert same_bits(straight, resumed)
    assert log == straight_log


def test_a_checkpoint_that_was_cut_off_is_ignored(tmp_path: Path) -> None:
    straight, _ = trained()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    with pytest.raises(Killed):
        trained(checkpoints=checkpoints, kill_at=7)
    partial = checkpoints.directory / "partial"
    shutil.copytree(checkpoints.directory / "00000006", partial)
    weights = partial / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    resumed, log = trained(checkpoints=checkpoints)
    assert same_bits(straight, resumed)
    assert len(log) == NUM_STEPS


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("file", ["state.safetensors", "history.jsonl", "digests.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, file: str, damage: str
) -> None:
    straight, straight_log = trained()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    with pytest.raises(Killed):
        trained(checkpoints=checkpoints, kill_at=7)
    path = checkpoints.directory / "00000006" / file
    written = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(written[:-20])
        case "changed":
            path.write_bytes(written[:-9] + bytes([written[-9] ^ 1]) + written[-8:])
        case _:
            path.unlink()
    with pytest.warns(UserWarning, match="00000006: a damaged checkpoint; going on from 00000003"):
        resumed, log = trained(checkpoints=checkpoints)
    assert same_bits(straight, resumed)
    assert log == straight_log


def test_with_no_whole_checkpoint_a_run_starts_again(tmp_path: Path) -> None:
    straight, _ = trained()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 6)
    with pytest.raises(Killed):
        trained(checkpoints=checkpoints, kill_at=7)
    (checkpoints.directory / "00000006" / "state.safetensors").unlink()
    with pytest.warns(UserWarning, match="a damaged checkpoint; going on from the start"):
        resumed, _ = trained(checkpoints=checkpoints)
    assert same_bits(straight, resumed)


def test_sigterm_saves_the_step_under_way_and_ends_the_run(tmp_path: Path) -> None:
    straight, straight_log = trained()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 100)
    policy, log = network(), []
    objective = squares(policy)

    def terminated(step: int) -> Iterator[tuple[Tensor, Metrics]]:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        yield from objective(step)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as ended:
        fit(policy, terminated, NUM_STEPS, OPTIMISATION, log=log.append, checkpoints=checkpoints)
    assert ended.value.code == 128 + signal.SIGTERM
    assert names(checkpoints.directory) == ["00000005"]
    assert signal.getsignal(signal.SIGTERM) is before
    resumed, resumed_log = trained(checkpoints=checkpoints)
    assert same_bits(straight, resumed)
    assert resumed_log == straight_log


def test_a_step_that_diverges_is_named_and_the_state_before_it_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 100)
    policy = network()
    objective = squares(policy)

    def diverging(step: int) -> Iterator[tuple[Tensor, Metrics]]:
        for loss, metrics in objective(step):
            yield loss * (math.nan if step == 4 else 1.0), metrics

    with pytest.raises(Diverged, match="step 4: loss nan") as raised:
        fit(policy, diverging, NUM_STEPS, OPTIMISATION, log=lambda _: None, checkpoints=checkpoints)
    assert raised.value.step == 4
    assert names(checkpoints.directory) == ["00000004"]
    straight, _ = trained()
    resumed, _ = trained(checkpoints=checkpoints)
    assert same_bits(straight, resumed)


def test_the_two_newest_checkpoints_are_kept_with_their_logs(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    _, log = trained(checkpoints=checkpoints)
    assert names(tmp_path) == ["00000006", "00000009"]
    lines = (tmp_path / "00000009" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == log[:9]


def test_a_finished_run_resumes_to_its_log_alone(tmp_path: Path) -> None:
    first, first_log = trained(checkpoints=Checkpoints(tmp_path, 5))
    again, again_log = trained(checkpoints=Checkpoints(tmp_path, 5), kill_at=0)
    assert same_bits(first, again)
    assert again_log == first_log


def test_every_step_is_logged_once_with_its_learning_rate() -> None:
    _, log = trained()
    assert [metrics["step"] for metrics in log] == list(range(NUM_STEPS))
    assert [metrics["learning_rate"] for metrics in log] == [
        0.01 * decay(step, NUM_STEPS, OPTIMISATION) for step in range(NUM_STEPS)
    ]


def test_training_lowers_the_loss() -> None:
    _, log = trained(num_steps=200)
    assert sum(m["loss"] for m in log[-10:]) < 0.5 * sum(m["loss"] for m in log[:10])


def test_the_logged_gradient_norm_is_that_before_clipping() -> None:
    policy, log = network(), []
    fit(policy, squares(policy), 1, Optimisation(0.0, max_grad_norm=1e-3), log=log.append)
    fresh = network()
    for loss, _ in squares(fresh)(0):
        loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in fresh.parameters()))
    assert log[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_one_step_is_adamws() -> None:
    """At step 0 AdamW moves every entry by the learning rate against its gradient's sign."""
    policy = network()
    before = [p.detach().clone() for p in policy.parameters()]
    for loss, _ in squares(policy)(0):
        loss.backward()
    signs = [p.grad.sign() for p in policy.parameters()]
    policy.zero_grad()
    rate = 0.01
    fit(
        policy,
        squares(policy),
        1,
        Optimisation(rate, "constant", warmup=0.0, weight_decay=0.5, max_grad_norm=1e9),
        log=lambda _: None,
    )
    for old, sign, new in zip(before, signs, policy.parameters(), strict=True):
        shrunk = old * (1 - rate * 0.5) if old.ndim >= 2 else old
        torch.testing.assert_close(new.detach(), shrunk - rate * sign, rtol=0, atol=1e-5)


def test_frozen_parameters_stay_as_they_are(tmp_path: Path) -> None:
    policy, initial = network(), network()
    policy[0].requires_grad_(False)
    fit(
        policy,
        squares(policy),
        3,
        OPTIMISATION,
        log=lambda _: None,
        checkpoints=Checkpoints(tmp_path, 1),
    )
    assert same_bits(policy[0], initial[0])
    assert not same_bits(policy[3], initial[3])


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        # Two of ten steps warm up, then eight fall from 1 towards 0.
        ("constant", [0.5, 1.0] + [1.0] * 8),
        ("linear", [0.5, 1.0] + [1 - i / 8 for i in range(8)]),
        ("cosine", [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: str, shares: list[float]) -> None:
    optimisation = Optimisation(1.0, schedule, warmup=0.2)
    assert [decay(step, 10, optimisation) for step in range(10)] == pytest.approx(shares)


def test_without_warm_up_the_peak_comes_first() -> None:
    assert decay(0, 10, Optimisation(1.0, "linear", warmup=0.0)) == 1.0
    assert decay(0, 1, Optimisation(1.0, "linear", warmup=0.0)) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_before_it_moves_the_policy(bad: float) -> None:
    policy = network()
    weights = [p.detach().clone() for p in policy.parameters()]

    def objective(step: int) -> Iterator[tuple[Tensor, Metrics]]:
        yield policy(torch.ones(1, 4)).sum() * bad, {}

    with pytest.raises(FloatingPointError, match=r"step 0: loss .*lower the learning rate"):
        fit(policy, objective, 2, OPTIMISATION, log=lambda _: None)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), weights, strict=True))


def test_a_loss_that_is_not_finite_is_refused_though_its_gradient_is() -> None:
    policy = network()

    def objective(step: int) -> Iterator[tuple[Tensor, Metrics]]:
        yield policy(torch.ones(1, 4)).sum() + math.inf, {}

    with pytest.raises(FloatingPointError, match=r"step 0: loss inf, gradient norm \d"):
        fit(policy, objective, 2, OPTIMISATION, log=lambda _: None)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    policy = network()

    def objective(step: int) -> Iterator[tuple[Tensor, Metrics]]:
        # sqrt has value 0 and an infinite slope at 0.
        yield (policy(torch.ones(1, 4)).sum() * 0.0).sqrt(), {}

    with pytest.raises(FloatingPointError, match=r"step 0: .*gradient norm nan"):
        fit(policy, objective, 2, OPTIMISATION, log=lambda _: None)


# What the looks below say after each step that they follow.
QUALITY = {1: 0.3, 3: 0.8, 5: 0.8, 7: 0.5, 9: 0.6}
SPENT = {1: 1.0, 3: 2.0, 5: 3.0, 7: 5.0, 9: 4.0}


def looking(*, worth: str = "step", budget: float = math.inf, kill_at: int | None = None) -> Watch:
    def look(step: int) -> Metrics:
        if step == kill_at:
            raise Killed
        return {"quality": QUALITY[step], "spent": SPENT[step]}

    return Watch(look, QUALITY, Selection(lambda m: m[worth], ends=lambda m: m["spent"] > budget))


def after(num_updates: int) -> nn.Module:
    """The policy after so many updates of the ten."""
    policy, weights = network(), []

    def copies(step: int) -> Metrics:
        weights.append({name: p.clone() for name, p in policy.state_dict().items()})
        return {}

    watch = Watch(copies, steps=[num_updates - 1])
    fit(policy, squares(policy), NUM_STEPS, OPTIMISATION, log=lambda _: None, watch=watch)
    policy.load_state_dict(*weights)
    return policy


def test_looks_change_nothing_and_stand_in_their_steps() -> None:
    straight, straight_log = trained()
    watched, log = trained(watch=Watch(lambda step: {"seen": step}, steps=[1, 3, 9]))
    assert same_bits(straight, watched)
    assert [m["step"] for m in log if "seen" in m] == [m["seen"] for m in log if "seen" in m]
    assert [{k: v for k, v in m.items() if k != "seen"} for m in log] == straight_log
    assert sum("seen" in m for m in log) == 3


@pytest.mark.parametrize(
    ("options", "num_updates", "num_steps", "kept"),
    [
        ({"worth": "quality"}, 4, 10, [1, 1, 0, 0, 0]),  # Of equals the earlier.
        ({"worth": "spent"}, 8, 10, [1, 1, 1, 1, 0]),
        ({"budget": 4.5}, 6, 8, [1, 1, 1, 0]),  # The last within the budget.
        ({"budget": 3.0}, 6, 8, [1, 1, 1, 0]),  # The budget itself is within.
        ({"budget": 5.0}, 10, 10, [1, 1, 1, 1, 1]),
        ({"worth": "quality", "budget": 2.5}, 4, 6, [1, 1, 0]),
    ],
)
def test_the_policy_left_is_that_of_the_best_look_within_the_budget(
    options: dict[str, Any], num_updates: int, num_steps: int, kept: list[int]
) -> None:
    watch = looking(**options)
    policy, log = trained(watch=watch)
    assert same_bits(policy, after(num_updates))
    best = watch.best(log)
    assert best is not None
    assert best["step"] == num_updates - 1
    assert len(log) == num_steps
    assert [m["kept"] for m in log if "kept" in m] == kept


def test_when_the_first_look_ends_the_training_none_is_best() -> None:
    watch = looking(budget=0.5)
    _, log = trained(watch=watch)
    assert len(log) == 2
    assert watch.best(log) is None


@pytest.mark.parametrize(
    "options", [{"worth": "quality"}, {"budget": 4.5}, {"worth": "quality", "budget": 2.5}], ids=str
)
def test_a_watched_run_killed_before_and_in_every_look_resumes_to_the_same_bits(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    straight, straight_log = trained(watch=looking(**options))
    for kill_at in range(len(straight_log)):
        for where in ("step", "look"):
            if where == "look" and kill_at not in QUALITY:
                continue
            checkpoints = Checkpoints(tmp_path / f"{where}{kill_at}", 3)
            step_kill = kill_at if where == "step" else None
            look_kill = kill_at if where == "look" else None
            with pytest.raises(Killed):
                trained(
                    checkpoints=checkpoints,
                    watch=looking(**options, kill_at=look_kill),
                    kill_at=step_kill,
                )
            resumed, log = trained(checkpoints=checkpoints, watch=looking(**options))
            assert same_bits(straight, resumed)
            assert log == straight_log


def test_a_run_that_a_look_ended_is_over_when_it_is_resumed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    first, first_log = trained(checkpoints=checkpoints, watch=looking(budget=4.5))
    again, again_log = trained(checkpoints=checkpoints, watch=looking(budget=4.5), kill_at=8)
    assert same_bits(first, again)
    assert again_log == first_log
