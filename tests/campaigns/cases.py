"""Do inputs that once failed come out right? One line each for a folder of scripts that make them.

    python -m tests.campaigns.cases FOLDER [NAME ...]

FOLDER holds the scripts, each of which makes one kind of input (folders.py, tables.py, masks.py, ...); they are copied,
run, and what they make is given to `thawline`. Prints "ok" or "WRONG", the case, and what was said of it; exits with 1
if any is wrong. With NAMEs, only those cases. It takes minutes: the kinds have fast tests of their own.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Check = tuple[bool, str]

THAWLINE = Path(sys.executable).with_name("thawline")
LIMIT_S = 400
SMALL = (
    *("--data.size-px", "32", "--data.presize-px", "32", "--data.global-batch", "8", "--model.name", "resnet18"),
    *("--model.weights", "none", "--fit.epochs", "1", "--fit.frozen-epochs", "0", "--metrics.port", "0"),
)


@dataclass(frozen=True)
class Said:
    """What a command came to."""

    status: int
    out: str
    err: str

    def refused(self, *words: str) -> Check:
        """It failed with a sentence of at most two lines that holds these words."""
        sentence = self.err[self.err.rfind("thawline: ") :] if "thawline: " in self.err else self.err
        short = len(sentence) < 700 and "Traceback" not in self.err
        return self.status == 1 and short and _holds(sentence, words), sentence.strip()

    def told(self, *words: str) -> Check:
        """It ended well and said these words."""
        lines = [line for line in self.err.splitlines() if any(re.search(word, line) for word in words)]
        return self.status == 0 and _holds(self.err, words), " | ".join(lines) or self.err.strip()[-300:]


def _holds(text: str, words: tuple[str, ...]) -> bool:
    return all(re.search(word, text, re.DOTALL | re.MULTILINE) for word in words)


class Cases:
    """Each method is a case: an iterator of (what, check)."""

    def __init__(self, scripts: Path, folder: Path) -> None:
        self.scripts, self.folder = scripts, folder

    def make(self, script: str, *words: object) -> Said:
        return self.run(sys.executable, f"{script}.py", *words, cwd=self.scripts)

    def thawline(self, *words: object) -> Said:
        return self.run(THAWLINE, *words)

    def run(self, *words: object, cwd: Path | None = None) -> Said:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}  # noqa: PTH109
        done = subprocess.run(
            list(map(str, words)), cwd=cwd or self.folder, capture_output=True, text=True, timeout=LIMIT_S, env=env
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def index(self, source: object, *words: object, out: str = "m.parquet") -> Said:
        return self.thawline("index", source, "--out", out, *words)

    def train(self, manifest: object, name: str, *words: object) -> Said:
        return self.thawline("train", manifest, "--name", name, *SMALL, *words)

    # ------------------------------------------------------------------------------------------------------

    def odd_pixels(self) -> Iterator[tuple[str, Check]]:
        self.make("odd_pixels", self.folder / "odd")
        yield from self._compared(self.folder / "odd", side_px=64)

    def _compared(self, pictures: Path, *, side_px: int) -> Iterator[tuple[str, Check]]:
        """By how much both engines differ from Pillow, picture by picture."""
        script = (self.scripts / "compare.py").read_text()
        script = script.replace('"compare_black.png"', repr(str(self.folder / "black.png"))).replace("64", str(side_px))
        (self.scripts / "compared.py").write_text(script)
        said = self.make("compared", pictures)
        for line in said.out.splitlines():
            most = max(map(int, re.findall(r"max +(\d+)", line)), default=0)
            yield line.split()[0], (most <= 1, " ".join(line.split()[1:]))
        if said.status or not said.out:
            yield "compare", (False, said.err[-300:])

    def folders(self) -> Iterator[tuple[str, Check]]:
        self.make("folders", self.folder / "folders")
        made = self.folder / "folders"
        self.index(made / "dollar")
        said = self.train("m.parquet", "dollar")
        report = (self.folder / "runs" / "dollar" / "report.html").exists()
        yield "dollar", (said.status == 0 and report, f"exit {said.status}, a report: {report}")
        yield "nas", self.index(made / "nas").told(r"^16 images", "@eaDir")
        yield "phone", self.index(made / "phone").told(r"\.heic", r"fox")
        yield "contradiction", self.index(made / "contradiction").told(r"(?i)label")
        yield "valid_only", self.index(made / "valid_only", "--valid", "folder:valid").told(r"fox.*train")
        yield "valid_only, train", self.train("m.parquet", "valid_only").told(r"fox")

    def tables(self) -> Iterator[tuple[str, Check]]:
        self.make("tables", self.folder / "tables")
        made = self.folder / "tables"

        def index(name: str, *words: str, file: str = "labels.csv") -> Said:
            label = () if "--label" in words else ("--label", "column:label")
            return self.index(made / name / file, *label, *words)

        points = ("--label", "points:eye_x,eye_y")
        yield "semicolon", index("semicolon").told(r"^12 images")
        yield "pandas_index", index("pandas_index").refused("--path-column", "file")
        yield "pandas_index, told", index("pandas_index", "--path-column", "file").told(r"^12 images")
        yield "space_behind_label", index("space_behind_label").told(r"^2 classes", r"(?i)space|written")
        yield "label_nfc_nfd", index("label_nfc_nfd").told(r"^2 classes", r"(?i)unicode|written")
        yield (
            "windows",
            index("windows").told(r"^12 images")
            if (made / "windows" / "photos").exists()
            else (self._windows(made / "windows")),
        )
        yield "excel", index("excel", file="labels.xlsx").refused(r"(?i)csv")
        yield "classes_bom", index("classes_bom", "--classes", str(made / "classes_bom" / "classes.txt")).told("^12 im")
        yield "nan_labels", index("nan_labels", file="labels.parquet").refused("1 of 12", "--skip-unlabelled")
        yield "nan_labels, skipped", index("nan_labels", "--skip-unlabelled", file="labels.parquet").told(r"^11 images")
        yield "hugging_face", index("hugging_face", file="labels.parquet").refused("struct")
        yield "points_in_units", index("points_in_units", *points).told(r"shares of the sides")
        yield "points_outside", index("points_outside", *points).told(r"outside")
        yield "points_minus_one", index("points_minus_one", *points).told(r"-1")

    def _windows(self, folder: Path) -> Check:
        (folder / "photos").mkdir()
        for file in folder.glob("*.jpg"):
            file.rename(folder / "photos" / file.name)
        return self.index(folder / "labels.csv", "--label", "column:label").told(r"^12 images")

    def masks(self) -> Iterator[tuple[str, Check]]:
        self.make("masks", self.folder / "masks")
        for kind, ending, remedy in (("png", "png", "--values 0,255"), ("jpeg", "jpg", "(?i)png")):
            said = self.index(
                self.folder / "masks" / kind,
                *("--folders", "images", "--label", f"mask:labels/{{stem}}.{ending}", "--classes", "background,object"),
            )
            yield kind, said.refused(remedy)
        plain = ("--folders", "images", "--label", "mask:labels/{stem}.jpg")
        yield "jpeg, any values", self.index(self.folder / "masks" / "jpeg", *plain).refused("(?i)png")

    def weights(self) -> Iterator[tuple[str, Check]]:
        self._digits()
        self.make("images", "pictures", "a:12", "b:12")
        self.index(self.scripts / "pictures")
        self.train("m.parquet", "source")
        model = next((self.folder / "runs" / "source" / "checkpoints").glob("step_*/model.pt"))
        self.make("weights", model, self.folder / "weights")
        for file in ("ddp.pt", "compiled.pt", "lightning.ckpt", "timm.pth"):
            weights = self.folder / "weights" / file
            said = self.train("m.parquet", f"from_{file}", "--model.weights", weights)
            yield file, said.told(rf"{re.escape(file)}: body")
        said = self.train("m.parquet", "from_nan", "--model.weights", self.folder / "weights" / "nan.pt")
        yield "nan.pt", said.refused("(?i)nan", r"layer1\.0\.conv1")

    def hangup(self) -> Iterator[tuple[str, Check]]:
        self.make("images", "many", "a:400", "b:400")
        self.index(self.scripts / "many")
        job = [THAWLINE, "train", self.folder / "m.parquet", "--name", "hangup", *SMALL, "--fit.epochs", "3"]
        said = self.make("hangup", *job)
        yield "hangup", ("exit status 0" in said.out, said.out.strip() + said.err[-200:])

    def many_classes(self) -> Iterator[tuple[str, Check]]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        for line in self.make("many_classes").out.splitlines():
            found = re.search(r"([\d.]+) s .* peak ([\d.]+) GiB", line)
            fits = found is not None and float(found[2]) < 1.5
            yield " ".join(line.split()[:3]), (fits, line.split(":", 1)[-1].strip())
        assert before >= 0

    def ray_before(self) -> Iterator[tuple[str, Check]]:
        self.make("images", "few", "a:12", "b:12")
        self.index(self.scripts / "few")
        said = self.make("ray_before", self.folder / "m.parquet")
        yield "ray_before", ("Ray runs in this process already" in said.out, (said.out + said.err[-300:]).strip())

    def white_is_zero(self) -> Iterator[tuple[str, Check]]:
        self.make("white_is_zero", self.folder / "fax")
        said = self.index(self.folder / "fax")
        talk = [line for line in said.err.splitlines() if re.search(r"(?i)tiff|warning|codec", line)]
        yield "index", (said.status == 0 and not talk, " | ".join(talk[:2]) or "silent")
        said = self.train("m.parquet", "fax")
        talk = [line for line in said.err.splitlines() if re.search(r"(?i)libtiff|TIFFFetch|nvimgcodec", line)]
        yield "train", (said.status == 0 and not talk, " | ".join(talk[:2]) or "silent")
        pixels = list(self._compared(self.folder / "fax", side_px=32))
        yield "pixels", (all(right for _, (right, _) in pixels), f"{len(pixels)} pictures; {pixels[0][1][1]}")

    def untrusted(self) -> Iterator[tuple[str, Check]]:
        made = self.folder / "untrusted"
        said = self.make("untrusted", self._digits(), made, THAWLINE)
        if said.status:
            yield "made", (False, said.err[-300:])
            return
        for name in ("label", "split"):
            said = self.train(made / "edited" / f"{name}.parquet", f"edited_{name}")
            yield f"edited {name}", said.refused("changed")
        yield "swapped", self.train(made / "swapped" / "pack" / "manifest.arrow", "swapped").refused("another pack")
        said = self.train(made / "worn" / "pack" / "manifest.arrow", "worn", "--data.max-quarantined", "1")
        yield "worn", said.told(r"")
        result = json.loads((self.folder / "runs" / "worn" / "result.json").read_text())
        found = result["quarantined"]
        yield (
            "worn, named",
            (len(found) >= 5 and all("shard-00000" in each for each in found), "; ".join(found[:2])),
        )
        label = ("--label", "column:label")
        yield "late.csv", self.index(made / "csv" / "late.csv", *label).refused(r"\b4[78]\b")
        said = self.train(made / "special" / "m.parquet", "special", "--data.max-quarantined", "1")
        yield "special", said.told(r"")
        result = json.loads((self.folder / "runs" / "special" / "result.json").read_text())
        yield "special, named", (len(result["quarantined"]) == 3, "; ".join(result["quarantined"]))

    def _digits(self) -> Path:
        digits = self.folder / "digits"
        if not digits.exists():
            self.thawline("sample", "digits", digits)
        return digits


def main() -> None:
    source, *names = sys.argv[1:]
    wrong = total = 0
    with tempfile.TemporaryDirectory(prefix="thawline-cases-") as folder:
        scripts = Path(folder) / "scripts"
        shutil.copytree(source, scripts)
        every: list[Callable[[Cases], Iterator[tuple[str, Check]]]] = [
            *(Cases.odd_pixels, Cases.folders, Cases.tables, Cases.masks, Cases.weights, Cases.hangup),
            *(Cases.many_classes, Cases.ray_before, Cases.white_is_zero, Cases.untrusted),
        ]
        for case in every:
            if names and case.__name__ not in names:
                continue
            own = Path(folder) / case.__name__
            own.mkdir()
            try:
                for what, (right, said) in case(Cases(scripts, own)):
                    total, wrong = total + 1, wrong + (not right)
                    words = " ".join(said.replace(folder, "").split())[:240]
                    print(f"{'ok   ' if right else 'WRONG'} {case.__name__}: {what}: {words}", flush=True)
            except Exception as error:  # a case that cannot be made is wrong, and the next ones are tried
                total, wrong = total + 1, wrong + 1
                print(f"WRONG {case.__name__}: {type(error).__name__}: {str(error)[-300:]}", flush=True)
    print(f"{total - wrong} of {total} right")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
