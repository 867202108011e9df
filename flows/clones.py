"""Git and DVC of many machines: clones, their worktrees, and dvc.lock on its way between them.

Git carries code and dvc.lock, DVC's remote carries data and the run cache. A run of the pipeline
has a ref of its own, `refs/prefopt/RUN`, whose commits are the revision with dvc.lock as far as it
has got. A stage runs in a new worktree of such a commit, and what its dvc.lock then says goes back
as another ref.
"""

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from flows.graph import LOCK
from flows.locks import hold, try_hold

REFS = "refs/prefopt"
SCRATCH = ".prefopt"  # checkpoints, caches, journals, of all worktrees of a clone
CLONE = "PREFOPT_CLONE"
SHARED = "PREFOPT_SHARED"
IDENTITY = {
    f"GIT_{role}_{what}": value
    for role in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "prefopt"), ("EMAIL", "prefopt@localhost"))
}


def git(root: Path, *arguments: str, **environment: str) -> str:
    """What git says.

    Raises:
        RuntimeError: if it fails.
    """
    done = subprocess.run(
        ["git", *arguments],
        cwd=root,
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"git {arguments[0]}: it failed, got {done.stderr.strip()}")
    return done.stdout.strip()


def require_committed(root: Path) -> str:
    """The commit that is checked out, if the working tree is it, dvc.lock apart.

    Raises:
        ValueError: if other tracked files were changed.
    """
    changed = git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{LOCK}")
    if changed:
        raise ValueError(
            f"{root}: workers see commits only, got changes of\n{changed}\n"
            "commit them or put them away with `git stash`"
        )
    return git(root, "rev-parse", "HEAD")


def require_remote(root: Path) -> None:
    """Refuse a repository whose data can reach nobody.

    Raises:
        ValueError: if DVC has no default remote.
    """
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        if not repo.config["core"].get("remote"):
            raise ValueError(
                f"{root}/.dvc/config: workers exchange data by DVC's remote, got none; "
                "`dvc remote add --default store URL`, and commit it"
            )


def origin_of(root: Path) -> str:
    """Where workers find what this repository publishes: its `origin`, or itself."""
    if "origin" in git(root, "remote").split():
        return git(root, "remote", "get-url", "origin")
    return str(root.resolve())


def fetch_file(root: Path, ref: str, path: str, *, origin: str) -> str:
    """A file's text, as a ref of the origin has it."""
    git(root, "fetch", "--quiet", origin, ref)
    return git(root, "show", f"FETCH_HEAD:{path}")


def publish_lock(root: Path, ref: str, *, origin: str, after: str = "HEAD") -> str:
    """Commit HEAD with dvc.lock as it is now, push it as a ref, and give the commit.

    Neither the index nor a branch of the workspace is touched.

    Args:
        root: the workspace.
        ref: that the origin is to have.
        origin: of workers.
        after: the commit's parent; an earlier one of the ref, if that is still to be found by it.
    """
    with TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": f"{folder}/index"}
        git(root, "read-tree", "HEAD", **index)
        if (root / LOCK).exists():
            git(root, "update-index", "--add", LOCK, **index)
        tree = git(root, "write-tree", **index)
    message = f"{LOCK} as far as the run has got"
    commit = git(root, "commit-tree", tree, "-p", after, "-m", message, **IDENTITY)
    git(root, "push", "--quiet", "--force", origin, f"{commit}:{ref}")
    return commit


def remove_refs(root: Path, pattern: str, *, origin: str) -> None:
    """Remove what runs left at the origin."""
    lines = git(root, "ls-remote", origin, pattern).splitlines()
    if lines:
        git(root, "push", "--quiet", origin, "--delete", *(line.split("\t")[1] for line in lines))


def own_clone(origin: str, ref: str) -> Path:
    """The clone of this worker, PREFOPT_CLONE, with a ref of the origin; made if there is none.

    Stages that a worker runs at the same time take turns.
    """
    clone = Path(os.environ.get(CLONE, "clone")).absolute()
    clone.parent.mkdir(parents=True, exist_ok=True)
    with hold(clone.with_name(f"{clone.name}.lock")):
        if not (clone / ".git").exists():
            git(Path.cwd(), "clone", "--quiet", origin, str(clone))
        git(clone, "fetch", "--quiet", "--force", origin, f"+{ref}:{ref}")
    return clone


@contextmanager
def worktree(clone: Path, revision: str, name: str) -> Generator[Path, None, None]:
    """A commit checked out beside the clone's own, with its DVC cache and scratch folder.

    What killed runs left is removed first.

    Args:
        clone: a repository.
        revision: what to check out.
        name: of the folder, which nobody else has now.
    """
    from dvc.config import Config
    from dvc.repo import Repo

    clone = clone.resolve()
    scratch = Path(os.environ.get(SHARED, clone / SCRATCH)).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    trees = clone / SCRATCH / "worktrees"
    trees.mkdir(parents=True, exist_ok=True)
    for lock in trees.glob("*.lock"):
        with try_hold(lock) as is_free:
            if is_free:
                _remove(clone, lock)
    lock, tree = trees / f"{name}.lock", trees / name
    with try_hold(lock) as is_ours:
        if not is_ours:
            raise ValueError(f"{tree}: another run works there, got a held lock; wait for it")
        git(clone, "worktree", "add", "--quiet", "--force", "--detach", str(tree), revision)
        (tree / SCRATCH).symlink_to(scratch)
        local = clone / ".dvc/config.local"
        if local.exists():
            shutil.copyfile(local, tree / ".dvc/config.local")
        with Repo(str(clone)) as repo:
            cache = repo.cache.local_cache_dir
        with Config(str(tree / ".dvc")).edit("local") as edited:
            config = cast(dict[str, Any], edited)
            config["cache"] = config.get("cache", {}) | {"dir": cache}
            config["core"] = config.get("core", {}) | {"site_cache_dir": str(tree / ".dvc/tmp")}
        try:
            yield tree
        finally:
            _remove(clone, lock)


def is_worktree(folder: Path) -> bool:
    """Whether a workspace is one of ours, which goes when its work is done."""
    return (folder / SCRATCH).is_symlink()


def _remove(clone: Path, lock: Path) -> None:
    # Not by git, which asks about files that it does not know.
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    git(clone, "worktree", "prune")
    lock.unlink()
