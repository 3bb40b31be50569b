"""Does an endpoint go on for others while one client is slow, while its bundle changes, and when it is told to end?"""

import contextlib
import http.client
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import thawline
from tests.kit.bundles import write_bundle
from tests.kit.endpoints import answering, bundle_of, over_loopback, read_answer
from tests.kit.hostile import pictures
from tests.kit.runs import environment
from thawline.cluster.cli.finished.serve import Serve
from thawline.cluster.errors import ServeError
from thawline.cluster.serve.endpoint.batching import warmed
from thawline.cluster.serve.endpoint.limits import Limits
from thawline.cluster.serve.endpoint.watching import Watch, fingerprint
from thawline.cluster.serve.predictor import Predictor
from thawline.models.errors import BundleError

USABLE = pictures()["rgb.jpg"]
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"


def ask(port: int, data: bytes = USABLE) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/predict", data)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_slow_clients_are_cut_off_and_hold_nobody_up(tmp_path: Path) -> None:
    """Thirty that send a byte every .2 s, of a head or a body: a quick one is answered meanwhile, and the others get
    408 when their time is over."""
    with answering(bundle_of(tmp_path), Limits(receive_s=1.5)) as (app, _), over_loopback(app) as port:
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
        for connection in slow[:15]:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        began, answered = time.monotonic(), 0
        while time.monotonic() - began < 1.0:
            for connection in slow:
                connection.sendall(b"P")
            answered += ask(port)[0] == 200
            time.sleep(0.2)
        assert answered >= 2
        for connection in slow[:15]:
            assert b"408 Request Timeout" in (answer := read_answer(connection))
            assert b"the request did not arrive within 1.5 s" in answer
        for connection in slow:
            connection.close()


def test_a_large_body_is_refused_while_it_arrives(tmp_path: Path) -> None:
    """Of 50 MB in chunks, without a length, little is taken; the answer reaches a client that reads only at the end."""
    with answering(bundle_of(tmp_path), Limits(request_bytes=1 << 20)) as (app, _), over_loopback(app) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            chunk, sent = b"100000\r\n" + bytes(1 << 20) + b"\r\n", 0
            with contextlib.suppress(OSError):
                for _ in range(2):
                    connection.sendall(chunk)
                    sent += len(chunk)
            assert b"413 Request Entity Too Large" in read_answer(connection)
        assert ask(port)[0] == 200


def test_a_new_bundle_takes_over_without_a_lost_request(tmp_path: Path) -> None:
    """Eight clients ask all the time; a half-copied bundle is told of, and what was there goes on."""
    served, said, end = bundle_of(tmp_path), list[str](), threading.Event()
    other = write_bundle(tmp_path / "other", "tiny", "single_label", 5, size_px=48)
    found = list[tuple[int, int]]()

    def load() -> Predictor:
        return warmed(thawline.load(served), batch=32)

    def ask_on(port: int) -> None:
        while not end.is_set():
            status, answer = ask(port)
            found.append((status, answer.count(b"class")))

    def until(told: str) -> None:
        for _ in range(200):
            if any(told in line for line in said):
                return
            time.sleep(0.05)
        pytest.fail(f"{told!r} is not in {said}")

    first = fingerprint(served)
    with (
        answering(served) as (app, batcher),
        over_loopback(app) as port,
        Watch(served, batcher, load, served=first, every_s=0.05, tell=said.append),
    ):
        clients = [threading.Thread(target=ask_on, args=(port,)) for _ in range(8)]
        for client in clients:
            client.start()
        try:
            shutil.copy(other / "model.json", served)
            until("what was served before goes on")
            shutil.copy(other / "model.safetensors", served)
            until("its bundle of step 7 answers now")
            time.sleep(0.3)
        finally:
            end.set()
            for client in clients:
                client.join()
    # the class predicted, and each one's probability
    assert {status for status, _ in found} == {200}
    assert {classes for _, classes in found} == {1 + 3, 1 + 5}
    assert found[-1][1] == 1 + 5
    assert len(said) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, r"give --local"),
        ({"local": True, "host": "0.0.0.0"}, r"--host 0.0.0.0 lets whoever reaches this machine ask: give --token"),
        ({"local": True, "host": "no.such.host.invalid"}, r"lets whoever reaches"),
        ({"local": True, "port": 70000}, r"--port 70000 is no port: give one of 1 to 65535"),
        ({"local": True, "host": "192.0.2.1", "no_token": True}, r"port 8000 of 192.0.2.1 cannot be listened at"),
        ({"local": True, "host": "no.such.invalid", "no_token": True}, r"--host no.such.invalid is no address"),
        ({"local": True, "batch": 0}, r"--batch 0 leaves nothing to answer with"),
        ({"local": True, "max_mb": float("nan")}, r"--max-mb nan is no size of a request"),
        ({"local": True, "allow_urls": ("*",)}, r"--allow-urls \* is no host"),
        ({"local": True, "token": "{tmp}/none"}, r"--token .*none cannot be read \(No such file or directory\)"),
        ({"local": True, "token": "{tmp}/open"}, r"--token .*open can be read by others: .*chmod 600"),
        ({"local": True, "token": "{tmp}/short"}, r"--token .*short holds no token of at least 16 characters"),
        ({"local": True, "port": 0, "source": "{tmp}/gone"}, r"gone holds no bundle .*: its run has not finished"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_gets_a_sentence(options: dict[str, object], told: str, tmp_path: Path) -> None:
    (tmp_path / "open").write_text("a" * 32)
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "short").chmod(0o600)
    filled = {name: v.format(tmp=tmp_path) if isinstance(v, str) else v for name, v in options.items()}
    with pytest.raises((ServeError, BundleError), match=told):
        Serve(**{"source": str(tmp_path), **filled}).run()  # type: ignore[arg-type]


def test_a_port_in_use_gets_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ServeError, match=rf"port {port} of 127.0.0.1 cannot be listened at \(Address already in use\)"
        ):
            Serve(source=str(tmp_path), local=True, port=port).run()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_once_what_is_under_way_is_answered(number: signal.Signals, tmp_path: Path) -> None:
    """The process, as it is typed; its status is 0."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    token.chmod(0o600)
    words = ["serve", str(bundle_of(tmp_path)), "--local", "--port", "0", "--token", str(token)]
    command = [sys.executable, "-m", "thawline.cluster.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        port = int(process.stdout.readline().decode().rstrip("/\n").rpartition(":")[2])
        assert ask(port)[0] == 401
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(HEAD + b"Authorization: Bearer 0123456789abcdef\r\n")
            connection.sendall(b"Content-Length: %d\r\n\r\n" % len(USABLE) + USABLE[:500])
            time.sleep(0.2)
            process.send_signal(number)
            time.sleep(0.5)
            connection.sendall(USABLE[500:])
            assert b'"prediction": "class' in read_answer(connection)
        assert process.wait(20) == 0
        assert process.stderr.read() == b""
