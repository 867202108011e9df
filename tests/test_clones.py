"""A worker's clone: made once, and asked for where it is used."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.clones import CLONE, IDENTITY, git, own_clone
from flows.cluster import require_place


def test_stages_that_begin_at_the_same_time_share_a_new_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = tmp_path / "origin"
    git(tmp_path, "init", "--quiet", str(origin))
    git(origin, "commit", "--quiet", "--allow-empty", "--message", "a revision", **IDENTITY)
    git(origin, "update-ref", "refs/prefopt/run", "HEAD")
    monkeypatch.setenv(CLONE, str(tmp_path / "machine/clone"))
    with ThreadPoolExecutor(6) as pool:
        clones = list(pool.map(lambda _: own_clone(str(origin), "refs/prefopt/run"), range(6)))
    assert set(clones) == {tmp_path / "machine/clone"}
    assert git(clones[0], "rev-parse", "refs/prefopt/run") == git(origin, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    ("pool", "clone", "message"),
    [
        ("gpus", Path("clone"), "no such pool, got gpus; one of cpu, gpu, api, retrain"),
        ("retrain", Path("clone"), "`prefopt deploy` was given, got clone; leave it out"),
        ("gpu", None, "the pool gpu run in a clone, got none; name a folder"),
    ],
)
def test_a_worker_of_no_pool_or_in_the_wrong_place_is_refused(
    pool: str, clone: Path | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        require_place(pool, clone)
