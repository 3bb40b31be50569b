"""How does a worker start in a moment? A process that has imported everything already forks it.

    python -m thawline.cluster.launch.forkserver SOCKET

One on each machine of a run: torch and the rest take many seconds to import, which each worker would otherwise spend
again whenever a failure has ended the others. It is forked before CUDA or DALI have been touched, and while it has
one thread. It ends when its standard input does, a worker when the connection to whoever asked for it does.
"""

import array
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from thawline.cluster.outputs import SafeStream
from thawline.dataio.store.private import check_own, scratch, scratch_path, use_compile_cache

Main = Callable[[Connection, Any], None]
_MOST = 1 << 20
_AGAIN_S = 0.1
_END_S = 5.0


def serve(path: Path, main: Main) -> None:
    """Fork whoever asks at the socket `path`, until standard input ends. Each child runs `main` and ends with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for children: their connections tell
    with contextlib.suppress(PermissionError):  # Ray's workers give way to its agents; those that train shall not
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o600)
        server.listen(64)
        poll = select.poll()
        poll.register(server, select.POLLIN)
        poll.register(0, select.POLLIN | select.POLLHUP)
        while not any(fd == 0 for fd, _ in poll.poll()):
            asked, _ = server.accept()
            with asked:
                _fork(server, asked, main)
    with contextlib.suppress(OSError):  # where the process that it serves was killed, the next start may be quicker
        path.unlink()
        path.parent.rmdir()


def _fork(server: socket.socket, asked: socket.socket, main: Main) -> None:
    words, outputs = _receive(asked)
    if words is None or os.fork():
        for fd in outputs:
            os.close(fd)
        return
    status = 1
    try:
        server.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd, onto in zip(outputs, (1, 2), strict=True):
            os.dup2(fd, onto)
            os.close(fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(words["env"])
        main(Connection(asked.detach()), words["part"])
        status = 0
    except BaseException:  # nothing above this frame is the child's
        traceback.print_exc(file=SafeStream(sys.stderr))
    finally:
        SafeStream(sys.stdout).flush()
        SafeStream(sys.stderr).flush()
        os._exit(status)  # what the parent would do at its end is not this process's to do


def _receive(asked: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """What a client sent with `fork`: its words, and its two outputs. None for words that broke off."""
    outputs = array.array("i")
    text = b""
    while not text.endswith(b"\n"):
        some, passed, _, _ = asked.recvmsg(_MOST, socket.CMSG_LEN(2 * outputs.itemsize))
        for level, kind, data in passed:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                outputs.frombytes(data[: len(data) - len(data) % outputs.itemsize])
        if not some:
            return None, list(outputs)
        text += some
    return json.loads(text), list(outputs)


def fork(path: Path, part: Mapping[str, Any], *, wait_s: float) -> Connection:
    """Have the server at `path` fork a child with this environment and these outputs; the connection to it.

    part: what the child's main is given, as JSON. wait_s: how long to wait for a server that is about to stand there.
    Raises TimeoutError when none comes; PlaceError when its folder is somebody else's.
    """
    deadline = time.monotonic() + wait_s
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            check_own(path.parent)
            client.connect(str(path))
            break
        except OSError as error:
            client.close()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no process at {path} after {wait_s:g} s ({error.strerror}): this machine cannot start a worker; "
                    "its Ray logs tell why"
                ) from error
            time.sleep(_AGAIN_S)
    text = json.dumps({"env": dict(os.environ), "part": part}).encode() + b"\n"
    sent = socket.send_fds(client, [text], [1, 2])
    client.sendall(text[sent:])
    return Connection(client.detach())


def socket_of(name: str, node: str) -> Path:
    """Where the fork server of that name listens on that machine."""
    return scratch_path(f"{name}-{node[:12]}") / "fork"


class ForkServer:
    """Keeps a fork server on this machine, which ends with this process at the latest. Ray makes actors of it."""

    def __init__(self, name: str, node: str) -> None:
        self._path = socket_of(name, node)
        self._folder = contextlib.ExitStack()
        self._folder.enter_context(scratch(self._path.parent))
        self._server: subprocess.Popen[bytes] | None = None
        self._closing = False
        threading.Thread(target=self._keep, name="thawline-fork-server", daemon=True).start()

    def _keep(self) -> None:
        found = os.pathsep.join(place for place in sys.path if place)  # with the code that Ray has brought here
        while not self._closing:
            self._path.unlink(missing_ok=True)
            self._server = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self._path)],
                stdin=subprocess.PIPE,  # ends when this process does
                env=os.environ | {"PYTHONPATH": found, "PYTHONSAFEPATH": "1"},
                cwd=self._path.parent,  # the one that Ray has unpacked may be replaced, and torch asks where it is
                start_new_session=True,
            )
            self._server.wait()
            time.sleep(_AGAIN_S)

    def close(self) -> None:
        """End it, and wait: what a process of Ray's has started is killed with it, and would leave its socket."""
        self._closing = True
        if self._server is not None and self._server.stdin is not None:
            self._server.stdin.close()
            try:
                self._server.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:  # it imports still: nobody has been forked
                self._server.kill()
                self._server.wait()
        self._folder.close()


if __name__ == "__main__":
    # Python counts other threads, such as the allocator's own, which know how to be forked.
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
    use_compile_cache()
    from thawline.cluster.launch.worker_part import main

    serve(Path(sys.argv[1]), main)
    os._exit(0)  # to take all that was imported apart would take a second, for which an end of a run waits
