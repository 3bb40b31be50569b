"""Where does a worker tell its telemetry? The [metrics] of a job."""

from dataclasses import dataclass
from typing import Annotated

from thawline.dataio.ranges import Range, given

_PORT = Range(lambda v: 0 <= v < 2**16, "0 <= _ < 65536; 0 is any free one", "no such port exists")


@dataclass(frozen=True)
class Metrics:
    """Where Prometheus finds a worker."""

    port: Annotated[int, _PORT] = 9400
    """Port of the first worker on a machine; the next worker takes the next one; 0 = any free port."""
    host: Annotated[str, given("an address such as 127.0.0.1", "nothing could listen")] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = all of the machine's."""
    sd_port: Annotated[int, _PORT] = 9399
    """Port, on a cluster, of the driver's list of workers (http_sd); 0 = any free port."""
