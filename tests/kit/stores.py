"""How do tests get an object store? moto's S3 on loopback, a bucket a test: `pytest_plugins = ["tests.kit.stores"]`."""

import itertools
from collections.abc import Iterator

import pyarrow.fs as pafs
import pytest

from thawline.dataio.store import root

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Host and port of an S3 server of this module."""
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    started = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"{host}:{port}"
    started.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a folder in a bucket of the test's own, which does not exist yet; {} is the folder's name."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    options = f"endpoint_override={s3_server}&scheme=http&region=us-east-1"
    bucket = f"bucket-{next(_NUMBERS)}"
    filesystem, _ = pafs.FileSystem.from_uri(f"s3://{bucket}?{options}&allow_bucket_creation=true")
    filesystem.create_dir(bucket)
    yield f"s3://{bucket}/{{}}?{options}"
    root._open.cache_clear()
