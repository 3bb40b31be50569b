"""How is an image fetched from a URL that a stranger gave? From hosts that were allowed, at public addresses only.

A name is resolved once, every address that it has is checked, and the connection goes to one of those: a name that is
another's a moment later changes nothing. Redirects are followed by hand, each checked like the first URL.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection

import httpx2

import thawline
from thawline.cluster.errors import ServeError
from thawline.cluster.serve.endpoint.limits import Limits
from thawline.cluster.serve.endpoint.receiving import RefusedError
from thawline.cluster.words import cut

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""(host, port) -> addresses. Raises OSError."""

_MOST_REDIRECTS = 3
_AT_ONCE = 16
_MOST_URL = 2048
_PORTS = {"http": 80, "https": 443}
_WITHIN_OTHERS = tuple(map(ipaddress.ip_network, ("::ffff:0:0/96", "::/96", "2002::/16", "2001::/32", "64:ff9b::/96")))
"""IPv6 addresses that lead to an IPv4 one: mapped, compatible, 6to4, Teredo, NAT64."""


def is_public(address: Address) -> bool:
    """Whether everybody may ask there anyway: not private, loopback, link-local, reserved, multicast, nor a disguise
    of such."""
    if isinstance(address, ipaddress.IPv6Address) and (
        address.is_site_local or any(address in network for network in _WITHIN_OTHERS)
    ):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


async def resolved(host: str, port: int) -> list[str]:
    """The system's answer."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


def allowed(hosts: Collection[str]) -> frozenset[tuple[str, int | None]]:
    """HOST, whose usual ports are meant, or HOST:PORT, as (host, port). Raises ServeError."""
    found = set()
    for each in hosts:
        host, colon, port = each.lower().rpartition(":")
        if not colon or each.endswith("]"):
            host, port = each.lower(), ""
        if not host or any(c in "/@?# *" for c in host) or (colon and port and not port.isdigit()):
            raise ServeError(
                f"--allow-urls {cut(each)} is no host: URLs could not be compared with it; give names such as "
                "images.example.org, or HOST:PORT"
            )
        found.add((host.strip("[]"), int(port) if port else None))
    return frozenset(found)


class Fetcher:
    """Gets the files of URLs; a function of `asking.Fetch`."""

    def __init__(
        self,
        hosts: Collection[str],
        limits: Limits,
        *,
        resolve: Resolve = resolved,
        fit: Callable[[Address], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """hosts: see `allowed`. resolve, fit: which addresses a name has, and which of them may be asked. tls: who
        vouches for names, if not those that the system trusts. Raises ServeError."""
        self._hosts, self._limits, self._resolve, self._fit = allowed(hosts), limits, resolve, fit
        self._tls, self._slots = tls or ssl.create_default_context(), asyncio.Semaphore(_AT_ONCE)

    async def __call__(self, url: str) -> bytes:
        """Raises RefusedError."""
        try:
            async with asyncio.timeout(self._limits.fetch_s), self._slots:
                return await self._followed(self._parsed(url))
        except TimeoutError:
            raise RefusedError(
                504, f"{cut(url)} did not arrive within {self._limits.fetch_s:g} s: send the image itself"
            ) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise RefusedError(
                422, f"{cut(url)} cannot be fetched ({cut(str(error)) or type(error).__name__})"
            ) from None

    async def _followed(self, url: httpx2.URL) -> bytes:
        """Without a proxy: it would look the name up itself."""
        async with httpx2.AsyncClient(verify=self._tls, trust_env=False, timeout=self._limits.fetch_s) as client:
            for _ in range(_MOST_REDIRECTS + 1):
                request = await self._request(client, url)
                response = await client.send(request, stream=True, follow_redirects=False)
                try:
                    if "location" not in response.headers or response.status_code // 100 != 3:
                        return await self._file(response, url)
                    url = self._parsed(str(url.join(response.headers["location"])))
                finally:
                    await response.aclose()
        raise RefusedError(422, f"it redirects more than {_MOST_REDIRECTS} times: send the image itself")

    def _parsed(self, text: str) -> httpx2.URL:
        """Raises RefusedError, httpx2.InvalidURL."""
        if len(text) > _MOST_URL:
            raise RefusedError(422, f"the URL has more than {_MOST_URL:,} characters: send the image itself")
        url = httpx2.URL(text)
        if url.scheme not in _PORTS or url.userinfo:
            raise RefusedError(403, f"{cut(text)} is no plain http or https URL: it is not fetched")
        host, port = url.raw_host.decode("ascii").lower(), url.port
        usual = port is None or port == _PORTS[url.scheme]
        if (host, port or _PORTS[url.scheme]) not in self._hosts and not (usual and (host, None) in self._hosts):
            raise RefusedError(403, f"{cut(text)} is of no host that URLs may be of here: send the image itself")
        return url

    async def _request(self, client: httpx2.AsyncClient, url: httpx2.URL) -> httpx2.Request:
        """The request to an address that was checked; TLS still asks for the name. Raises RefusedError, OSError."""
        host, port = url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]
        addresses = [ipaddress.ip_address(each.partition("%")[0]) for each in await self._resolve(host, port)]
        if not addresses or not all(map(self._fit, addresses)):
            raise RefusedError(403, f"{cut(host)} has an address that is not public: nothing is fetched from it")
        headers = {
            "Host": url.netloc.decode("ascii"),
            "Accept-Encoding": "identity",
            "User-Agent": f"thawline/{thawline.__version__}",
        }
        at = url.copy_with(host=str(addresses[0]))
        return client.build_request("GET", at, headers=headers, extensions={"sni_hostname": host})

    async def _file(self, response: httpx2.Response, url: httpx2.URL) -> bytes:
        """The bytes as sent: nothing is unpacked. Raises RefusedError."""
        if response.status_code != 200:
            raise RefusedError(422, f"{cut(str(url))} answers with status {response.status_code}: nothing is fetched")
        data = bytearray()
        async for more in response.aiter_raw():
            data += more
            if len(data) > self._limits.image_bytes:
                raise RefusedError(413, f"{cut(str(url))} has more than {self._limits.image_bytes:,} bytes")
        return bytes(data)
