"""What stages made that dvc.yaml no longer has, such as the samples of a run that was dropped.

DVC leaves it where it lies. Stages that read a folder would read it too, and dvc.lock would not be
that of a clone which never had the run.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from flows.graph import find_leftovers, read_entries
from flows.objects import Objects


def remove_leftovers(root: Path, say: Callable[[str], None]) -> None:
    """Remove it from a workspace, if DVC's cache keeps it; what returns is restored from there.

    What the cache does not keep, as what was changed since, stays and is named.

    Args:
        root: where dvc.yaml lies.
        say: is told what was done.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    removed, kept = list[str](), list[str]()
    with Repo(str(root)) as repo:
        try:
            left = find_leftovers(root, repo.index.stages, read_entries(root))
        except DvcException:
            return  # The run itself says what is wrong with dvc.yaml, and better.
        objects = Objects(repo, deep=False)
        for path, digest in left.items():
            if objects.at(path)[0] == digest and _is_kept(objects, digest):
                _remove(root / path)
                removed.append(path)
            else:
                kept.append(path)
    if removed:
        say(f"removed, because dvc.yaml makes it no more; DVC's cache keeps it: {_listed(removed)}")
    if kept:
        say(
            "left, though dvc.yaml makes it no more, because DVC's cache does not keep it: "
            f"{_listed(kept)}; remove it, or who reads its folder reads it too"
        )


def _is_kept(objects: Objects, digest: str) -> bool:
    """Whether the cache has all bytes behind a digest."""
    files = objects.listed(digest)
    return files is not None and all(objects.in_cache(each) == each for each in files.values())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _listed(paths: list[str]) -> str:
    return ", ".join(sorted(paths))
