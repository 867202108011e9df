"""Bytes and their digests, as DVC computes and keeps them.

DVC remembers the digest of a file by its inode, size and time of change, so that an unchanged file
is not read again; `deep` reads every byte.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

Files = dict[str, str]  # name inside a folder, empty of a file itself -> MD5


class Objects:
    """What lies at a path of the working tree, and what DVC's cache holds under a digest."""

    def __init__(self, repo: "Repo", *, deep: bool) -> None:
        from dvc_data.hashfile.state import StateNoop

        self._repo = repo
        self._cache = repo.cache.local
        self._state = StateNoop() if deep else repo.state
        self._cache.state = self._state
        self.bytes_seen = 0

    def at(self, path: str) -> tuple[str | None, Files]:
        """The digest of what lies at a path, None if nothing does, and its files."""
        from dvc_data.hashfile.build import build
        from dvc_data.hashfile.tree import Tree

        where = self._repo.fs.join(self._repo.root_dir, path)
        if not self._repo.fs.exists(where):
            return None, {}
        ignore: Any = self._repo.dvcignore
        _, meta, found = build(
            self._cache, where, self._repo.fs, "md5", ignore=ignore, dry_run=True
        )
        self.bytes_seen += meta.size or 0
        digest = _value(found.hash_info)
        return digest, _files(found) if isinstance(found, Tree) else {"": digest}

    def listed(self, digest: str) -> Files | None:
        """The files behind a digest; None if it is a folder's whose list the cache lacks."""
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.tree import Tree
        from dvc_objects.errors import ObjectFormatError

        if not digest.endswith(".dir"):
            return {"": digest}
        try:
            tree = Tree.load(self._cache, HashInfo("md5", digest))
        except (FileNotFoundError, ObjectFormatError):
            return None
        return _files(tree)

    def in_cache(self, digest: str) -> str | None:
        """The digest of the bytes that the cache holds under a digest; None if it holds none."""
        from dvc_data.hashfile.hash import hash_file

        path = self.path_of(digest)
        if not self._cache.fs.exists(path):
            return None
        meta, found = hash_file(path, self._cache.fs, "md5", self._state)
        self.bytes_seen += meta.size or 0
        return _value(found).removesuffix(".dir") + (".dir" if digest.endswith(".dir") else "")

    def path_of(self, digest: str) -> str:
        """Where the cache holds, or would hold, a digest."""
        return self._cache.oid_to_path(digest)


def folder_digest(files: Mapping[str, str]) -> str:
    """The digest of a folder with these files."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    tree = Tree()
    for name, digest in files.items():
        tree.add(tuple(name.split("/")), None, HashInfo("md5", digest))
    tree.digest()
    return _value(tree.hash_info)


def _files(tree: "Tree") -> Files:
    return {"/".join(key): _value(entry) for key, (_, entry) in tree.iteritems()}


def _value(info: "HashInfo | None") -> str:
    assert info is not None
    assert info.value is not None
    return info.value
