"""A round of retraining in git and DVC: a worktree of its own, and its commits on a branch.

A round's first commit is a revision of this project with other parameters, and with pointers to
data and to the champion's model, which DVC stores; its second adds dvc.lock. The branch goes from
round to round, and each round's first commit also has the revision for a parent. What DVC tracks
here is named by digest alone: a pointer is the text of a .dvc file.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.clones import IDENTITY, git, worktree
from flows.graph import LOCK, read_entries
from flows.reproduce import run_dvc
from flows.supervise import Supervisor

DATA = "data/preferences.jsonl"
ACCEPTED = "data/accepted.jsonl"
CHAMPION = "data/models/champion"


@dataclass(frozen=True)
class Round:
    """A round under way.

    Args:
        root: the repository whose branch it is.
        tree: the worktree.
        branch: the branch's name.
        base: the commit that the round is of.
        environment: of DVC.
        supervisor: of DVC's processes.
    """

    root: Path
    tree: Path
    branch: str
    base: str
    environment: Mapping[str, str]
    supervisor: Supervisor

    @property
    def code(self) -> str:
        """What the round is of, whatever commit says so: git's digest of all tracked files."""
        return git(self.root, "rev-parse", f"{self.base}^{{tree}}")

    @property
    def pointers(self) -> list[str]:
        """The files by which DVC knows what the round is given."""
        names = [f"{path}.dvc" for path in (DATA, CHAMPION)]
        return [name for name in names if (self.tree / name).exists()]

    def dvc(self, *command: str) -> None:
        """Run DVC in the worktree.

        Raises:
            ValueError: if it fails.
        """
        done = run_dvc(command, self.environment, self.supervisor, self.tree)
        if done.status != 0:
            raise ValueError(f"dvc {command[0]}: it failed, got {done.reason}; mend what it says")

    def add(self, path: str) -> str:
        """Have DVC store and track a file of the worktree; gives its digest."""
        from dvc.utils.serialize import load_yaml

        self.dvc("add", "--quiet", path)
        (out,) = load_yaml(str(self.tree / f"{path}.dvc"))["outs"]
        return out["md5"]

    def fetch(self, digests: Mapping[str, str]) -> None:
        """Put what DVC stores under digests into the worktree, at these paths."""
        for path, digest in digests.items():
            pointer = f"outs:\n- md5: {digest}\n  hash: md5\n  path: {Path(path).name}\n"
            (self.tree / f"{path}.dvc").write_text(pointer)
        if digests:
            command = "pull" if has_remote(self.root) else "checkout"
            self.dvc(command, "--quiet", *(f"{path}.dvc" for path in digests))

    def forget(self, path: str) -> None:
        """Of what was fetched to be looked at alone."""
        for each in (self.tree / path, self.tree / f"{path}.dvc"):
            each.unlink(missing_ok=True)

    def made(self, run: str) -> str:
        """The digest of a run's model, by the worktree's dvc.lock."""
        stage = read_entries(self.tree)["sft" if run == "sft" else f"train@{run}"]
        return next(out["md5"] for out in stage["outs"] if out["path"] == model_path(run))

    def commit_inputs(self, message: str) -> str:
        """Commit parameters and pointers, after the last round and the revision.

        A round that is given what the last one was, as after refused data, has its commit.
        """
        git(self.tree, "add", "--force", "params.yaml", *self.pointers)
        tip = self._tip()
        if tip and self._began(tip):
            git(self.tree, "reset", "--quiet", "--soft", tip)
            return tip
        parents = [*(["-p", tip] if tip else []), "-p", self.base]
        return self._commit(message, *parents)

    def commit_lock(self, message: str) -> str:
        """Commit dvc.lock."""
        git(self.tree, "add", LOCK)
        return self._commit(message, "-p", "HEAD")

    def publish(self) -> None:
        """Let the branch be where the worktree is; share it, and its data, where others look."""
        head = git(self.tree, "rev-parse", "HEAD")
        git(self.root, "update-ref", f"refs/heads/{self.branch}", head, self._tip())
        if has_remote(self.root):
            self.dvc("push", "--quiet", "--run-cache")
        if "origin" in git(self.root, "remote").split():
            git(self.root, "push", "--quiet", "origin", f"{head}:refs/heads/{self.branch}")

    def _tip(self) -> str:
        return git(self.root, "for-each-ref", "--format=%(objectname)", f"refs/heads/{self.branch}")

    def _began(self, commit: str) -> bool:
        """Whether a commit is of this revision, with what the worktree's index has."""
        tree, *parents = git(self.root, "log", "-1", "--format=%T %P", commit).split()
        return self.base in parents and tree == git(self.tree, "write-tree")

    def _commit(self, message: str, *parents: str) -> str:
        tree = git(self.tree, "write-tree")
        commit = git(self.tree, "commit-tree", tree, *parents, "-m", message, **IDENTITY)
        git(self.tree, "reset", "--quiet", "--soft", commit)
        return commit


@contextmanager
def new_round(
    root: Path, revision: str, branch: str, environment: Mapping[str, str]
) -> Generator[Round, None, None]:
    """A round of a revision, alone on its branch.

    Raises:
        ValueError: if another round of the branch is under way.
    """
    base = git(root, "rev-parse", "--verify", f"{revision}^{{commit}}")
    name = f"round-of-{branch.replace('/', '-')}"
    with worktree(root, base, name) as tree, Supervisor() as supervisor:
        yield Round(root, tree, branch, base, environment, supervisor)


def model_path(run: str) -> str:
    """Where a run's model lies in a workspace."""
    return f"artefacts/models/{run}"


def has_remote(root: Path) -> bool:
    """Whether DVC has somewhere to keep data for others."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return bool(repo.config["core"].get("remote"))
