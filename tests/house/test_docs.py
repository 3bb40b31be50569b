"""Do README and docs/ say what is true? Every command and Python block is run, or marked with the reason why not."""

import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from PIL import Image

import thawline
from tests.kit import blocks, deploy_commands
from thawline.dataio.table.tasks import TASKS as LABEL_TASKS
from thawline.trainer.tasks import TASKS as TRAINED_TASKS

ROOT = Path(__file__).parents[2]
PAGES = {
    str(file.relative_to(ROOT)): file.read_text() for file in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
}
RUNNABLE = [page for page, text in PAGES.items() if any(b.language in blocks.RUN for b in blocks.blocks(page, text))]


def photos(folder: Path) -> None:
    """photos/cat/1.jpg and so on: what somebody has who begins with images of their own."""
    random = np.random.default_rng(0)
    for label, red in (("cat", 200), ("dog", 60)):
        (folder / "photos" / label).mkdir(parents=True)
        for i in range(1, 31):
            pixels = np.array([red, 80, 40], np.uint8) + random.integers(0, 50, (96, 128, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"photos/{label}/{i}.jpg")


def labels(folder: Path) -> None:
    """labels.csv: a class and tags for each of the photos."""
    rows = [
        f"photos/{kind}/{i}.jpg,{kind},{tags}"
        for kind, tags in (("cat", "indoor;young"), ("dog", ""))
        for i in (1, 2, 3)
    ]
    (folder / "labels.csv").write_text("\n".join(["file,species,tags", *rows, ""]))


def faces(folder: Path) -> None:
    """faces.csv: points of 10 faces; camvid/: 10 images beside their masks."""
    random = np.random.default_rng(0)
    (folder / "faces").mkdir()
    rows = ["file,left_eye_x,left_eye_y,right_eye_x,right_eye_y"]
    for kind in ("images", "labels"):
        (folder / "camvid" / kind).mkdir(parents=True)
    (folder / "codes.txt").write_text("road\nsky\n")
    for i in range(10):
        image = Image.fromarray(random.integers(0, 255, (96, 128, 3), np.uint8))
        image.save(folder / f"faces/{i}.jpg")
        image.save(folder / f"camvid/images/{i}.jpg")
        rows.append(f"faces/{i}.jpg,{40 + i},30,{80 + i},31.5")
        Image.fromarray(random.integers(0, 2, (96, 128), np.uint8)).save(folder / f"camvid/labels/{i}_P.png")
    (folder / "faces.csv").write_text("\n".join([*rows, ""]))


GIVEN: dict[str, Callable[[Path], None]] = {"photos": photos, "labels": labels, "faces": faces}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page_does_what_it_shows(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in blocks.given(PAGES[page]):
        GIVEN[name](tmp_path)
    with mock.patch.dict(LABEL_TASKS), mock.patch.dict(TRAINED_TASKS):  # a page may add a task
        unlike = [*blocks.run(blocks.blocks(page, PAGES[page]), tmp_path)]
    assert not unlike, "\n".join(unlike)


@pytest.mark.parametrize("page", PAGES)
def test_nothing_on_a_page_is_passed_over_without_a_reason(page: str) -> None:
    found = blocks.blocks(page, PAGES[page])
    assert [problem for block in found for problem in blocks.problems(block)] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_not_run_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    fences = [block for block in blocks.blocks(page, PAGES[page]) if "not run" in block.marks]
    code = [command for block in fences if block.language in ("sh", "console") for command, _ in blocks.commands(block)]
    spans = [code for code in deploy_commands.code_of(PAGES[page]) if "\n" not in code and "VERB" not in code]
    found = [words for text in (*code, *spans) for words in deploy_commands.in_shell(text)]
    assert [problem for words in found for problem in deploy_commands.parse_command(words)] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_to_are_there(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", PAGES[page])
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_a_page_that_says_what_is_not_so_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        "```sh\ntrue\nfalse  # at last\n```\n"
        "```console\n$ echo 3 of 4 in 1.5 s\n3 of 4 in 2.25 s\n$ echo 3 of 4\n3 of 5\n```\n"
        "<!-- exits 1 -->\n```sh\nfalse\n```\n"
        "```python\nprint(6 * 7)\n```\n<!-- printed -->\n```text\n41\n```\n"
        "<!-- not run: there is no such thing -->\n```sh\nno-such-thing\n```\n"
    )
    said = [*blocks.run(blocks.blocks("page", text), tmp_path)]
    assert [line.splitlines()[0] for line in said] == [
        "page:1: false: exit status 1, not 0:",
        "page:5: echo 3 of 4: the page shows",
        "page:19: the page shows",
    ]
    wrong = "```\nls\n```\n<!-- not run: -->\n```sh\nls\n```\n```text\n$ ls\n```\n<!-- slwo -->\n```sh\nls\n```\n"
    assert len([problem for block in blocks.blocks("page", wrong) for problem in blocks.problems(block)]) == 4


def test_every_public_name_and_error_has_its_place_in_the_reference() -> None:
    reference = PAGES["docs/reference/python.md"] + PAGES["docs/reference/errors.md"]
    listed = {
        name.rpartition(".")[2] for name in re.findall(r"^\.\. auto(?:class|function):: ([\w.]+)", reference, re.M)
    }
    documented = {
        "BundleError",
        "CodeError",
        "DataError",
        "ModelError",
        "TrainError",
        "UnknownModelError",
        "WeightsError",
    } | listed  # by automodule
    assert sorted({*thawline.__all__} - documented) == []


def test_citation_changelog_and_package_say_the_same_version() -> None:
    version = thawline.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## (\S+?)[,\s]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == version
