"""Can a URL lead an endpoint to where its sender may not go? Servers on loopback, names by a function."""

import asyncio
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.testclient import TestClient

from tests.kit.endpoints import answering, bundle_of
from tests.kit.hostile import pictures
from thawline.cluster.errors import ServeError
from thawline.cluster.serve.endpoint.fetching import Fetcher, allowed, is_public
from thawline.cluster.serve.endpoint.limits import Limits
from thawline.cluster.serve.endpoint.receiving import RefusedError

USABLE = pictures()["rgb.jpg"]


class Site(BaseHTTPRequestHandler):
    """Pictures, redirects, and what a bad host would send."""

    def do_GET(self) -> None:
        seen: list[tuple[str, str]] = self.server.seen  # type: ignore[attr-defined]
        seen.append((self.headers["Host"], self.path))
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif kind == "hop":
            self.send_response(302)
            self.send_header("Location", f"/hop/{int(rest) - 1}" if rest != "0" else "/picture")
            self.end_headers()
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.server.ended.wait(0.05)  # type: ignore[attr-defined]
        else:
            self.send_response(200 if kind in ("picture", "packed", "large") else 404)
            if kind == "packed":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(bytes(100_000) if kind == "large" else USABLE)

    def log_message(self, *words: object) -> None: ...


@contextmanager
def site(tls: ssl.SSLContext | None = None) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.seen, server.ended = [], threading.Event()  # type: ignore[attr-defined]
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()  # type: ignore[attr-defined]
            server.shutdown()
            thread.join()


def fetched(
    url: str,
    hosts: list[str],
    *,
    names: Callable[[str], list[str]] = lambda host: ["127.0.0.1"],
    anywhere: bool = True,
    tls: ssl.SSLContext | None = None,
) -> bytes | tuple[int, str]:
    """The file, or the status and the sentence. anywhere: loopback counts as public, or nothing could be tried."""

    async def resolve(host: str, port: int) -> list[str]:
        return names(host)

    async def run() -> bytes:
        fit = (lambda address: True) if anywhere else is_public
        limits = Limits(image_bytes=50_000, fetch_s=1)
        return await Fetcher(hosts, limits, resolve=resolve, fit=fit, tls=tls)(url)

    try:
        return asyncio.run(run())
    except RefusedError as error:
        return error.status, str(error)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        "100.64.0.1",
        *("192.0.2.1", "198.18.0.1", "203.0.113.5", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1", "64:ff9b::a00:1"),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
    ],
)  # fmt: skip
def test_no_such_address_is_asked_not_even_beside_a_public_one(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with site() as server:
        url, host = f"http://pictures.example:{server.server_port}/picture", f"pictures.example:{server.server_port}"
        answer = fetched(url, [host], names=lambda host: ["8.8.8.8", address], anywhere=False)
        assert answer == (403, "pictures.example has an address that is not public: nothing is fetched from it")
        assert server.seen == []  # type: ignore[attr-defined]


def test_public_addresses_are_public() -> None:
    assert all(is_public(ipaddress.ip_address(each)) for each in ("8.8.8.8", "1.1.1.1", "2606:4700::1111"))


def test_a_name_is_looked_up_once_and_what_was_checked_is_asked() -> None:
    """A name that is another's at its second look-up is not looked up twice."""
    with site() as server:
        asked = list[str]()

        def names(host: str) -> list[str]:
            asked.append(host)
            return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

        host = f"pictures.example:{server.server_port}"
        assert fetched(f"http://{host}/picture", [host], names=names) == USABLE
        assert asked == ["pictures.example"]
        assert server.seen == [(host, "/picture")]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("hop/1", 0, ""),
        ("hop/2", 0, ""),
        ("hop/3", 422, "it redirects more than 3 times"),
        ("to/http://other.example/picture", 403, "http://other.example/picture is of no host that URLs may be of here"),
        ("to/http://inside.example:PORT/picture", 403, "inside.example has an address that is not public"),
        ("to///127.0.0.1:PORT/picture", 403, "http://127.0.0.1"),
        ("to/file:///etc/passwd", 403, "file:/etc/passwd is no plain http or https URL"),
        ("to/gopher://pictures.example/", 403, "gopher://pictures.example"),
        ("to/http://a:b@pictures.example:PORT/", 403, "http://a:"),
        ("large", 413, "http://pictures.example"),
        ("drip", 504, "http://pictures.example"),
        ("none", 422, "http://pictures.example"),
    ],
)
def test_redirects_are_checked_as_the_first_and_limits_hold(path: str, status: int, told: str) -> None:
    with site() as server:
        path, port = path.replace("PORT", str(server.server_port)), server.server_port
        hosts = [f"pictures.example:{port}", f"inside.example:{port}"]

        async def resolve(host: str, port: int) -> list[str]:
            return ["127.0.0.1"] if host == "pictures.example" else ["127.0.0.2"]

        async def run() -> bytes:
            limits = Limits(image_bytes=50_000, fetch_s=1)
            fetch = Fetcher(hosts, limits, resolve=resolve, fit=lambda address: str(address) == "127.0.0.1")
            return await fetch(f"http://pictures.example:{port}/{path}")

        if not status:
            assert asyncio.run(run()) == USABLE
            return
        with pytest.raises(RefusedError) as error:
            asyncio.run(run())
    assert (error.value.status, str(error.value)[: len(told)]) == (status, told)


@pytest.mark.parametrize(
    ("url", "status"),
    [
        *[(f"{scheme}://pictures.example/a", 403) for scheme in ("file", "gopher", "ftp", "data", "dict", "HTTPX")],
        *[(f"http://{host}/a", 403) for host in ("127.0.0.1", "0x7f.1", "2130706433", "[::1]", "localhost")],
        *[(f"http://{host}/a", 403) for host in ("pictures.example.evil.org", "evil.org#pictures.example")],
        *[(f"http://{host}/a", 403) for host in ("pictures.example@evil.org", "pictures.example:22")],
        ("http://x.pictures.example/a", 403),
        ("http://pictures.example./a", 403),
        ("http://pictures.example\\@evil.org/a", 403),
        ("pictures.example", 403),
        ("", 403),
        ("http://[", 403),
        ("http://pictures.example/\r\nHost: evil", 422),
        ("http://pictures.example/" + "a" * 3000, 422),
    ],
)  # fmt: skip
def test_other_urls_are_not_even_resolved(url: str, status: int) -> None:
    def names(host: str) -> list[str]:
        pytest.fail(f"{host} was looked up")

    answer = fetched(url, ["pictures.example"], names=names)
    assert isinstance(answer, tuple)
    assert answer[0] == status, answer


def certified(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(the server's, whose certificate is for this name, that of a client which trusts it)."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder().subject_name(who).issuer_name(who).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    signed = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False).sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return server, ssl.create_default_context(cafile=str(folder / "cert.pem"))


def test_tls_asks_for_the_name_though_an_address_is_connected_to(tmp_path: Path) -> None:
    server_side, client_side = certified(tmp_path, "pictures.example")
    with site(server_side) as server:
        port = server.server_port
        hosts = [f"pictures.example:{port}", f"other.example:{port}"]
        assert fetched(f"https://pictures.example:{port}/picture", hosts, tls=client_side) == USABLE
        refused = fetched(f"https://other.example:{port}/picture", hosts, tls=client_side)
        assert isinstance(refused, tuple)
        assert refused[0] == 422
        assert "CERTIFICATE_VERIFY_FAILED" in refused[1]


def test_an_endpoint_answers_for_a_url_that_is_allowed(tmp_path: Path) -> None:
    async def fetch(url: str) -> bytes:
        if url != "https://pictures.example/a.jpg":
            raise RefusedError(403, "not that")
        return USABLE

    with answering(bundle_of(tmp_path), fetch=fetch) as (app, _):
        client = TestClient(app)
        by_url = client.post("/predict", json={"url": "https://pictures.example/a.jpg"}).json()
        assert by_url[0]["name"] == "https://pictures.example/a.jpg"
        assert by_url[0]["probabilities"] == client.post("/predict", content=USABLE).json()[0]["probabilities"]
        assert client.post("/predict", json={"url": "http://x"}).json() == {"error": "not that"}
        others: list[Any] = [{}, [], "text", {"url": 7}, 5]
        for wrong in others:
            assert client.post("/predict", json=wrong).status_code == 422


def test_hosts_that_are_none_get_a_sentence() -> None:
    expected = {("a.example", None), ("b.example", 8080), ("2001:db8::1", 80)}
    assert allowed(["A.example", "b.example:8080", "[2001:db8::1]:80"]) == expected
    for wrong in ("http://a.example", "a b", "*.example", "a:b", "", ":80", "a@b"):
        with pytest.raises(ServeError, match=r"--allow-urls .* is no host"):
            allowed([wrong])
