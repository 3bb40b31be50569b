"""What does thawline do? `make demo`: trains on real digits, and reads live metrics while it trains."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUN = Path("runs/demo")
TARGETS = Path("runs/demo.targets.json")


class Scraper(threading.Thread):
    """Reads every worker's endpoint now and then, as a Prometheus would, and keeps the last answers."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.last: dict[str, str] = {}

    def run(self) -> None:
        while not self.done.wait(1.0):
            try:
                entries = json.loads(TARGETS.read_text())
                for endpoint in (target for entry in entries for target in entry["targets"]):
                    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=1) as answer:
                        self.last[endpoint] = answer.read().decode()
            except (OSError, ValueError):  # not up yet, or just gone: the next second tells
                continue


def main() -> int:
    """Train, then show what was read from the workers meanwhile, and where the results lie."""
    scraper = Scraper()
    scraper.start()
    command = [str(Path(sys.executable).with_name("thawline")), "train", str(HERE / "demo.toml")]
    # Ctrl-C reaches the child as well, which ends with a checkpoint: wait for it instead of killing it.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    status = subprocess.Popen(command).wait()
    scraper.done.set()
    scraper.join()
    if status:
        return status
    if scraper.last:
        print("\nread from the workers' endpoints while they trained:")
    shown = re.compile(r"^thawline_(images_total|data_wait_seconds_sum|loss|learning_rate)\b.*", re.M)
    for endpoint, text in sorted(scraper.last.items()):
        for match in shown.finditer(text):
            print(f"  http://{endpoint}/metrics  {match.group()}")
    for name in ("report.html", "result.json", "rows.parquet", "valid.parquet", "job.toml", "model"):
        if (RUN / name).exists():
            print(f"{RUN / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
