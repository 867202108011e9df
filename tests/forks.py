"""Stages in forks of one process that has imported what is heavy, so that each takes a second.

`launched(folder)` starts that process; the command that it gives stands for `python -m`. The stage
gets the caller's arguments, folder, environment and streams, and the caller its exit status.
`python_of_forks(folder)` gives a folder for PATH instead, whose `python -m` is that command.
"""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

CALLER = """
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(os.path.join(os.path.dirname(__file__), "socket"))
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(call).to_bytes(8, "big")], [1, 2])
server.sendall(call)
sys.exit(server.recv(1)[0])
"""
SERVER = """
import json, os, runpy, signal, socket, sys
import jinja2, matplotlib.pyplot, pandas, peft, pyarrow.parquet, scipy.special, scipy.stats
import statsmodels.stats.multitest, torch, transformers, transformers.modeling_utils
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
while True:
    caller, _ = listening.accept()
    length, streams, _, _ = socket.recv_fds(caller, 8, 2)
    (module, *arguments), folder, environment = json.loads(
        caller.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
    )
    if os.fork():
        caller.close()
        for stream in streams:
            os.close(stream)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        caller.sendall(bytes([status % 256]))
        os._exit(0)
    os.dup2(streams[0], 1)
    os.dup2(streams[1], 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, folder)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
"""


@contextmanager
def launched(folder: Path) -> Generator[str, None, None]:
    """Start the process; gives the command, to be followed by a module and its arguments."""
    folder.mkdir()
    caller = folder / "call.py"
    caller.write_text(CALLER)
    command = [sys.executable, "-c", SERVER, str(folder / "socket")]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        try:
            yield f"{sys.executable} -IS {caller}"
        finally:
            server.terminate()


@contextmanager
def python_of_forks(folder: Path) -> Generator[Path, None, None]:
    """Start the process; gives a folder with a `python` that runs modules in forks of it."""
    with launched(folder) as launcher:
        python = folder / "python"
        own = f'[ "$1" = -m ] || exec {sys.executable} "$@"'
        python.write_text(f'#!/bin/sh\n{own}\nshift\nexec {launcher} "$@"\n')
        python.chmod(0o755)
        yield folder
