"""One screen of how things stand: `prefopt status`.

DVC says what is stale and why; the files of `.prefopt/locks` say what runs and what failed, whoever
started it; a Prefect server, if PREFECT_API_URL names one, what runs elsewhere. It only reads, and
waits for nobody's lock.
"""

import base64
import fcntl
import json
import os
import re
import socket
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.processes import is_gone

WORK = Path(".prefopt")
SERVER_SECONDS = 3.0
NAMED = 3  # files, or reasons, before the rest is counted

# What DVC calls a file's state, of what a stage reads and of what it leaves.
READ = {
    "modified": "{} changed",
    "new": "{} is new",
    "deleted": "{} is missing",
}
LEFT = {
    "modified": "{} changed by hand",
    "new": "{} not in dvc.lock",
    "deleted": "{} missing",
    "not in cache": "its outputs are not in DVC's cache",
}
NEVER = "it has not run yet"
RESTORED = ("deleted", "modified")


@dataclass(frozen=True)
class Stale:
    """Stages of dvc.yaml that DVC would look at."""

    num_stages: int
    reasons: dict[str, list[str]]  # of each stale stage; none of one that only follows another
    restorable: bool  # all of it are outputs that `dvc checkout` brings back


@dataclass(frozen=True)
class Record:
    """What a stage's lock says of it."""

    stage: str
    time: int  # seconds of the epoch: when it began, or when it failed
    held: bool
    holder: str
    error: str  # empty if it had no time to say


def report() -> str:
    """The screen.

    Raises:
        ValueError: if this is no workspace, or dvc.yaml or params.yaml cannot be read.
    """
    records = read_records()
    running = {name: record for name, record in records.items() if record.held}
    stale = read_stale(set(running))
    failed = {
        name: record
        for name, record in records.items()
        if not record.held and name in stale.reasons
    }
    waiting = {name: why for name, why in stale.reasons.items() if name not in failed}
    current = stale.num_stages - len(stale.reasons) - len(running)
    sections = [
        _section("running", [_running(record) for record in running.values()]),
        _section("failed", [line for record in failed.values() for line in _failed(record)]),
        _section("stale", _grouped(waiting)),
        _section("up to date", [f"{current} of {stale.num_stages} stages"]),
        _section("MLflow", _undelivered()),
        _section("Prefect", _elsewhere()),
        _section("next", [_next(stale, running, failed)]),
    ]
    return "\n".join(section for section in sections if section)


def read_records() -> dict[str, Record]:
    """The stages that run, and those that ended otherwise than well, by what their locks say."""
    found: dict[str, Record] = {}
    folder = WORK / "locks"
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                held = False
            except BlockingIOError:
                held = True
            text = file.read()
        if not text:
            continue  # It ended well, or is about to say who holds it.
        said = json.loads(text)
        here = said.get("host") == socket.gethostname()
        holder = f"process {said.get('pid')} of {'this machine' if here else said.get('host')}"
        found[said["stage"]] = Record(
            said["stage"], said["time"], held, holder, said.get("error", "")
        )
    return found


def read_stale(running: set[str]) -> Stale:
    """Ask DVC for the stages of dvc.yaml that are not up to date, those that run left out.

    Raises:
        ValueError: if DVC cannot read the workspace.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.stage import Stage

    # Beneath its decorator, which would wait for, or fail at, the stages that run.
    status: Any = vars(Stage)["status"].__wrapped__
    changes: dict[str, list[Any]] = {}
    sources: dict[str, set[str]] = {}
    made: dict[str, set[str]] = {}  # what stages read, and which stages it comes from
    try:
        with Repo(".") as repo:
            stages: dict[str, Any] = {stage.addressing: stage for stage in repo.index.stages}
            makers = {str(out): name for name, stage in stages.items() for out in stage.outs}
            # Read once: a stage's own view of its dvc.yaml parses dvc.lock again.
            files = {stage.path: stage.dvcfile for stage in stages.values()}
            locked = {
                path: set(file.lockfile_contents.get("stages", {})) for path, file in files.items()
            }
            for name, stage in stages.items():
                read = {str(dep) for dep in stage.deps}
                made |= {path: _makers(path, makers) for path in read - set(made)}
                sources[name] = set[str]().union(*(made[path] for path in read))
                if name not in running:
                    known = stage.name in locked[stage.path]
                    changes[name] = status(stage).get(name, []) if known else [NEVER]
    except (DvcException, OSError) as error:
        raise ValueError(
            f"status: DVC cannot read this workspace, got {error}; stand where dvc.yaml is"
        ) from error
    reasons: dict[str, list[str]] = {}
    for name in _in_order(sources):
        behind = {path for path, made_by in made.items() if made_by & (set(reasons) | running)}
        found = _in_words(changes.get(name, []), behind)
        if found or sources[name] & (set(reasons) | running):
            reasons[name] = found
    reasons = {name: why for name, why in reasons.items() if name not in running}
    restorable = all(_is_restorable(changes[name], made) for name in reasons)
    return Stale(len(sources), reasons, restorable)


def _makers(path: str, makers: Mapping[str, str]) -> set[str]:
    """The stages that make a path, what lies in it, or what it lies in."""
    within = path + os.sep
    return {
        name
        for out, name in makers.items()
        if path == out or out.startswith(within) or path.startswith(out + os.sep)
    }


def _in_order(sources: Mapping[str, set[str]]) -> list[str]:
    """Every stage after those whose outputs it reads."""
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in order:
            for source in sources[name]:
                visit(source)
            order[name] = None

    for name in sources:
        visit(name)
    return list(order)


def _in_words(changes: list[Any], behind: set[str]) -> list[str]:
    """What DVC says of a stage, as reasons a person can read; of paths `behind`, nothing."""
    found: list[str] = []
    for change in changes:
        if change == NEVER:
            found.append(NEVER)
        elif isinstance(change, str):
            command = change in ("changed command", "changed checksum")
            found.append("its command changed" if command else "it always runs")
        elif "changed deps" in change:
            for path, state in change["changed deps"].items():
                if isinstance(state, dict):  # Of parameters: each with a state of its own.
                    found += [READ[one].format(key) + f" in {path}" for key, one in state.items()]
                elif path not in behind:
                    found.append(READ[state].format(path))
        else:
            outs = change["changed outs"]
            for state in sorted(set(outs.values())):
                paths = [path for path, one in outs.items() if one == state]
                found.append(LEFT[state].format(", ".join(paths)))
    return found


def _is_restorable(changes: list[Any], made: Mapping[str, set[str]]) -> bool:
    """Whether a stage lacks nothing but files that DVC's cache holds."""
    for change in changes:
        if isinstance(change, str):
            return False
        for path, state in change.get("changed deps", {}).items():
            if state not in RESTORED or not made.get(path):
                return False
        if not set(change.get("changed outs", {}).values()) <= set(RESTORED):
            return False
    return True


def _section(title: str, lines: list[str]) -> str:
    head = f"{title:<12}"
    return "\n".join((head if i == 0 else " " * 12) + line for i, line in enumerate(lines))


def _running(record: Record) -> str:
    path = WORK / "progress" / f"{record.stage}.json"
    try:
        said = json.loads(path.read_text())
        progress = f", step {said['step']} of {said['steps']}"
    except FileNotFoundError:
        progress = ""
    return f"{record.stage}: {record.holder}, for {_ago(record.time)}{progress}"


def _failed(record: Record) -> list[str]:
    if not record.error:
        what = f"ended without a word ({record.holder}): killed, or out of memory"
        return [f"{record.stage}: {what}; begun {_ago(record.time)} ago"]
    first, *rest = record.error.splitlines() or [""]
    lines = [f"{record.stage}: {_ago(record.time)} ago: {first}", *(f"  {line}" for line in rest)]
    return lines[:4]


def _grouped(reasons: Mapping[str, list[str]]) -> list[str]:
    """Stages with the same reasons in one line; in the last line those that only follow them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, why in reasons.items():
        member = name.partition("@")[2]
        shared = (_alike(reason, member) for reason in why)
        groups.setdefault(tuple(shared), []).append(name)
    followers = groups.pop((), [])
    lines: list[str] = []
    for why, names in groups.items():
        member = names[0].partition("@")[2]
        alone = len(names) == 1 and member
        shown = tuple(reason.replace("RUN", member) for reason in why) if alone else why
        lines.append(f"{_braced(names)}: {_some(shown)}")
    if followers:
        lines.append(f"{_braced(followers)}: after these")
    return lines


def _alike(reason: str, member: str) -> str:
    """A reason in the words that it has for all members of one `foreach`."""
    return re.sub(rf"(?<![\w-]){re.escape(member)}(?![\w-])", "RUN", reason) if member else reason


def _braced(names: list[str]) -> str:
    """Names, the members of one `foreach` together as NAME@{...}."""
    members: dict[str, list[str]] = {}
    for name in names:
        template, _, member = name.partition("@")
        members.setdefault(template, []).append(member)
    return ", ".join(
        template
        if found == [""]
        else f"{template}@{found[0]}"
        if len(found) == 1
        else f"{template}@{{{','.join(found)}}}"
        for template, found in members.items()
    )


def _some(things: tuple[str, ...]) -> str:
    rest = len(things) - NAMED
    return ", ".join(things[:NAMED]) + (f", and {rest} more" if rest > 0 else "")


def _undelivered() -> list[str]:
    pending = list((WORK / "tracking").glob("*.jsonl"))
    if not pending:
        return []
    return [
        f"{len(pending)} journals are not delivered yet; `python -m stages.tracking` does it, "
        "the next `prefopt repro` too"
    ]


def _elsewhere() -> list[str]:
    """What Prefect's server says is running, by which worker, and what failed there last."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return []
    try:
        running = _of_type("RUNNING")
        both = {"task_runs": running, "flow_runs": running, "limit": 40}
        at_work = _ask(url, "task_runs", both)
        flows = _ask(url, "flow_runs", {"flow_runs": running, "limit": 40})
        wrong = {**_of_type("FAILED", "CRASHED")}
        failed = _ask(url, "flow_runs", {"flow_runs": wrong, "sort": "END_TIME_DESC", "limit": 1})
    except (OSError, ValueError) as error:
        return [f"{_without_user(url)} does not answer: {error}"]
    killed = {one["id"]: one["name"] for one in flows if any(map(is_gone, one["tags"]))}
    at_work = [one for one in at_work if one["flow_run_id"] not in killed]
    workers = {one["id"]: one["labels"].get("prefect.worker.name", "") for one in flows}
    # The coordinator has a task of each stage that a worker has; the worker's says more.
    where = dict.fromkeys((one["name"] for one in at_work), "")
    where |= {one["name"]: by for one in at_work if (by := workers.get(one["flow_run_id"]))}
    lines = [f"running: {name}" + (f" by {by}" if by else "") for name, by in where.items()]
    lines += [f"killed: flow run {name}; the next one tells the server" for name in killed.values()]
    lines += [
        f"failed last: {one['name']}: {one['state']['message']} ({one['end_time'][:16]})"
        for one in failed
    ]
    return lines or [f"{_without_user(url)}: nothing runs, nothing failed"]


def _of_type(*types: str) -> dict[str, Any]:
    return {"state": {"type": {"any_": list(types)}}}


def _ask(url: str, what: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
    request = urllib.request.Request(f"{url}/{what}/filter", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as answer:
        return json.load(answer)


def _without_user(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _next(stale: Stale, running: Mapping[str, Record], failed: Mapping[str, Record]) -> str:
    if running:
        return "wait; a second `prefopt repro` would wait too"
    if failed:
        names = " ".join(failed)
        return (
            f"mend what is said above, then `prefopt repro`; `dvc repro {names}` goes only so far"
        )
    if not stale.reasons:
        return "nothing to do; `report/index.html` is the report"
    if stale.restorable:
        return "`dvc checkout`; all of it is in DVC's cache"
    return "`prefopt repro`"


def _ago(moment: int) -> str:
    seconds = max(0, int(time.time()) - moment)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
