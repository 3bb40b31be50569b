"""Where does a worker tell its telemetry? The [metrics] of a job."""

from dataclasses import dataclass
from typing import Annotated

from thawline.dataio.ranges import Range, given

_PORT = Range(lambda v: 0 <= v < 2**16, "0 <= _ < 65536; 0 is any free one", "no such port exists")


@dataclass(frozen=True)
class Metrics:
    """Where Prometheus finds a worker."""

    port: Annotated[int, _PORT] = 9400
    """Of the first worker on a machine, the next takes the next; 0 = any free port."""
    host: Annotated[str, given("an address such as 127.0.0.1", "nothing could listen")] = "127.0.0.1"
    """The address to listen on; 0.0.0.0 = every one."""
    sd_port: Annotated[int, _PORT] = 9399
    """On a cluster: of the driver's list of workers (http_sd); 0 = any free port."""
