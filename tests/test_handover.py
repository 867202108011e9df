"""Checkpoints on their way between machines, by DVC's remote or by a folder of all."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from prefect.logging import disable_run_logger
from processes import wait_until

from flows import handover
from flows.clones import IDENTITY, SHARED, git, worktree
from flows.handover import handed_over

STAGE = "train@dpo"


class KilledError(Exception):
    """What a machine's end looks like from within."""


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Path]:
    """A repository with a folder for DVC's remote."""
    origin, store = tmp_path / "origin", tmp_path / "store"
    git(tmp_path, "init", "--quiet", str(origin))
    with Repo.init(str(origin)) as repo, repo.config.edit("repo") as config:
        config["core"]["remote"] = "store"
        config["remote"]["store"] = {"url": str(store)}
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "--message", "a project", **IDENTITY)
    with disable_run_logger():
        yield origin


def machine(origin: Path, name: str) -> Path:
    """A clone on a machine of its own."""
    clone = origin.parent / name
    git(origin.parent, "clone", "--quiet", str(origin), str(clone))
    return clone


@contextmanager
def killed_at(clone: Path, stage: str) -> Generator[Path, None, None]:
    """A stage in a worktree, killed at the end of the block."""
    with worktree(clone, "HEAD", "run") as tree, suppress(KilledError), handed_over(tree, stage):
        yield tree
        raise KilledError


def left(origin: Path) -> dict[str, str]:
    """What the remote has of the stage."""
    folder = origin.parent / "store/checkpoints/train-dpo"
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_next_machine_has_what_a_killed_one_left_and_a_good_end_leaves_nothing(
    origin: Path,
) -> None:
    first, second = machine(origin, "first"), machine(origin, "second")
    with killed_at(first, STAGE) as tree:
        stage = tree / ".prefopt/stages/train-dpo/digest"
        write(stage, "checkpoints/00000002/state", "of two steps")
        write(stage, "partial/model", "half")
    assert left(origin) == {"digest/checkpoints/00000002/state": "of two steps"}
    with worktree(second, "HEAD", "run") as tree, handed_over(tree, STAGE):
        state = tree / ".prefopt/stages/train-dpo/digest/checkpoints/00000002/state"
        assert state.read_text() == "of two steps"
    assert left(origin) == {}


def test_a_file_of_which_the_copy_was_cut_off_reaches_nobody(
    origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.fs import LocalFileSystem

    def cut_off(_: Any, source: str, target: str, **__: Any) -> None:
        Path(target).write_text(Path(source).read_text()[:4])
        raise KilledError

    first, second = machine(origin, "first"), machine(origin, "second")
    with monkeypatch.context() as patched, killed_at(first, STAGE) as tree:
        write(tree / ".prefopt/stages/train-dpo", "rounds/1", "all of a round")
        patched.setattr(LocalFileSystem, "put_file", cut_off)
    assert list(left(origin).values()) == ["all "]
    with worktree(second, "HEAD", "run") as tree, handed_over(tree, STAGE):
        assert not [*(tree / ".prefopt/stages/train-dpo").rglob("*")]
    assert left(origin) == {}
    # Whoever goes on where it was cut off copies the file whole.
    with killed_at(first, STAGE):
        pass
    assert left(origin) == {"rounds/1": "all of a round"}


def test_what_is_new_is_copied_while_the_stage_runs_and_what_is_old_goes(
    origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "SECONDS", 0.1)
    with worktree(machine(origin, "first"), "HEAD", "run") as tree, handed_over(tree, STAGE):
        stage = tree / ".prefopt/stages/train-dpo"
        write(stage, "00000002", "earlier")
        wait_until(lambda: left(origin) == {"00000002": "earlier"})
        write(stage, "00000004", "later")
        (stage / "00000002").unlink()
        wait_until(lambda: left(origin) == {"00000004": "later"})


def test_machines_that_share_a_folder_find_it_there_and_copy_nothing(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SHARED, str(tmp_path / "shared"))
    first, second = machine(origin, "first"), machine(origin, "second")
    with killed_at(first, STAGE) as tree:
        write(tree / ".prefopt/stages/train-dpo", "00000002", "of two steps")
    assert left(origin) == {}
    with worktree(second, "HEAD", "run") as tree, handed_over(tree, STAGE):
        assert (tree / ".prefopt/stages/train-dpo/00000002").read_text() == "of two steps"
    assert (tmp_path / "shared/stages/train-dpo/00000002").exists()
