"""What git knows: commits, files as they were, and what of the working tree differs."""

import subprocess
from pathlib import Path

LOCK = "dvc.lock"


def commit_of(revision: str) -> str:
    """The full name of the commit that a revision stands for.

    Raises:
        ValueError: if git knows no such commit.
    """
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode != 0:
        raise ValueError(
            f"git: no such commit, got '{revision}'; name one that `git log --all` lists"
        )
    return found.stdout.decode().strip()


def is_commit(revision: str) -> bool:
    try:
        commit_of(revision)
    except ValueError:
        return False
    return True


def text_at(revision: str, path: str) -> str | None:
    """A file's text at a revision; None if it was not there."""
    found = _git("show", f"{revision}:{path}")
    return found.stdout.decode(errors="replace") if found.returncode == 0 else None


def blobs_at(revision: str) -> dict[str, str]:
    """Path -> git's own digest of every file of a commit."""
    lines = _output("ls-tree", "-r", "-z", "--end-of-options", revision).split("\0")
    return {
        path: entry.split()[2]
        for entry, _, path in (line.partition("\t") for line in lines if line)
    }


def changed_files() -> list[str]:
    """Tracked files that differ from HEAD, without dvc.lock, which DVC writes while it runs."""
    names = _output("diff", "--name-only", "-z", "HEAD", "--", ".", f":(exclude){LOCK}")
    return [name for name in names.split("\0") if name]


def diff() -> bytes:
    """How tracked files differ from HEAD, dvc.lock left out."""
    return _git("diff", "--binary", "HEAD", "--", ".", f":(exclude){LOCK}").stdout


def files_changed_by(revision: str) -> list[str]:
    """Files that differ between a commit and its first parent; all files of a first commit."""
    names = _output(
        *("diff-tree", "-r", "-z", "--root", "--no-commit-id", "--name-only", "-m"),
        *("--first-parent", revision),
    )
    return [name for name in names.split("\0") if name]


def add_worktree(directory: Path, revision: str) -> None:
    """Check a commit out into a directory of its own."""
    _output("worktree", "add", "--detach", "--quiet", str(directory), revision)


def remove_worktree(directory: Path) -> None:
    _output("worktree", "remove", "--force", str(directory))


def _output(*arguments: str) -> str:
    found = _git(*arguments)
    if found.returncode != 0:
        said = found.stderr.decode(errors="replace").strip()
        raise ValueError(f"git {arguments[0]}: it failed, got {said!r}; run it in a git repository")
    return found.stdout.decode(errors="surrogateescape")


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], capture_output=True, check=False)
