"""What does a forked worker do? Its part of a run, in touch with the Ray Train worker that it works for.

What they say to one another is in messages.
"""

import contextlib
import os
import socket
import sys
import threading
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thawline.cluster.errors import KINDS, USER_ERRORS
from thawline.cluster.job import job as jobs
from thawline.cluster.launch import ranks
from thawline.cluster.launch.messages import Asked, Crashed, Ended, Message, Refused, Rows
from thawline.cluster.outputs import SafeStream
from thawline.cluster.run.folder import run_dir
from thawline.cluster.run.run import run
from thawline.trainer.records.rows import Row
from thawline.trainer.step.sentences import Sentence


@dataclass
class ForkedContext:
    """See trainer.context.RunContext."""

    run_dir: str | Path
    device: torch.device
    rank: int
    world_size: int
    local_rank: int
    restarts: int
    link: Connection
    _asked: Asked = field(default_factory=Asked)
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def should_stop(self) -> bool:
        """What was last heard."""
        return self._asked.stop

    def taken_at(self) -> float | None:
        """What was last heard."""
        return self._asked.taken_at

    def publish(self, rows: Sequence[Row]) -> None:
        """Send rows on their way."""
        self.send(Rows(rows))

    def send(self, message: Message) -> None:
        """Tell the Ray Train worker; where it is gone, this process is about to end."""
        with self._sending, contextlib.suppress(BrokenPipeError):
            self.link.send(message)

    def listen(self) -> None:
        """Take what is heard; end this process, whatever it is at, when nobody is there any more."""
        try:
            while True:
                self._asked = self.link.recv()
        except (EOFError, OSError):
            os._exit(1)


def meet(part: Mapping[str, Any], *, timeout: timedelta) -> None:
    """Make the process group, of ranks that meet at part's host and port; 127.0.0.1 where all are on this machine.

    torch's own way would have rank 0's store listen on every address of its machine, and a store asks nobody who he is.
    """
    host, port, first = part["host"], part["port"], part["rank"] == 0
    if host == "127.0.0.1":
        ranks.stay_on_this_machine()
    listens = _listen(host, port).detach() if first else None  # the store's from here on
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, part["world_size"], first, timeout, master_listen_fd=listens
    )
    dist.init_process_group(
        part["backend"], store=store, rank=part["rank"], world_size=part["world_size"], timeout=timeout
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError:  # the machine is known by an address that another one translates
        return socket.create_server(("", port))


def main(link: Connection, part: dict[str, Any]) -> None:
    """Train as one of the ranks. part: see ray_train, which sends it."""
    job = jobs.from_dict(tomllib.loads(part["job"]), trust_code=True)  # the driver has asked, and sent it
    context = ForkedContext(
        run_dir=run_dir(job),
        device=torch.device(part["device"]),
        rank=part["rank"],
        world_size=part["world_size"],
        local_rank=part["local_rank"],
        restarts=part["restarts"],
        link=link,
    )
    threading.Thread(target=context.listen, name="thawline-listen", daemon=True).start()
    try:
        if context.device.type == "cuda":
            torch.cuda.set_device(context.device)
        meet(part, timeout=timedelta(seconds=job.cluster.first_step_s))
        context.send(Ended(run(job, context, held=True)))
        dist.destroy_process_group()
    except USER_ERRORS as error:
        context.send(Refused(Sentence.of(error, KINDS)))
    except BaseException as error:  # whatever it is, the one who waits shall hear of it
        traceback.print_exc(file=SafeStream(sys.stderr))
        context.send(Crashed("".join(traceback.format_exception(error))))
