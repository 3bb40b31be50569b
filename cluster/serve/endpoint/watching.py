"""How does a new bundle take over? It is loaded and tried beside the old one, which answers until then."""

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from thawline.cluster.errors import USER_ERRORS
from thawline.cluster.serve.endpoint.batching import Batcher
from thawline.cluster.serve.predictor import Predictor
from thawline.dataio.closing import Closing
from thawline.models.bundle import DESCRIPTION, FOLDER

log = logging.getLogger(__name__)


def fingerprint(source: str | Path) -> str:
    """The hash of a run's or bundle's description, which is written last and holds that of the weights; "" without
    one."""
    folder = Path(source).expanduser()
    for file in (folder / DESCRIPTION, folder / FOLDER / DESCRIPTION):
        try:
            return hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError:
            continue
    return ""


class Watch(Closing):
    """Looks at a bundle every few seconds, in a thread, and swaps it in when it is another."""

    def __init__(
        self,
        source: str | Path,
        batcher: Batcher,
        load: Callable[[], Predictor],
        *,
        served: str,
        every_s: float = 2.0,
        tell: Callable[[str], None],
    ) -> None:
        """load: makes a warmed predictor of it. served: the fingerprint of what is answered with. tell: what happens
        is said by it."""
        self._source, self._batcher, self._load, self._every_s, self._tell = source, batcher, load, every_s, tell
        self._served, self._said, self._end = served, "", threading.Event()
        self._thread = threading.Thread(target=self._run, name="thawline-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more. A swap that is under way is finished."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            found = fingerprint(self._source)
            if found and found != self._served:
                self._swap(found)

    def _swap(self, found: str) -> None:
        try:
            predictor = self._load()
        except USER_ERRORS as error:  # it may be half copied: it is tried again
            self._complain(f"{error}; what was served before goes on")
        except Exception as error:
            log.debug("a bundle could not be loaded", exc_info=True)
            self._complain(f"{self._source} cannot be loaded ({error}); what was served before goes on")
        else:
            self._batcher.swap(predictor)
            self._served, self._said = found, ""
            self._tell(f"{self._source} changed: its bundle of step {predictor.about.step:,} answers now")

    def _complain(self, sentence: str) -> None:
        """Once, not every few seconds."""
        if sentence != self._said:
            self._tell(sentence)
        self._said = sentence
