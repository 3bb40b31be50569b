"""What does `thawline predict` do? Say of images what a finished run sees in them: on the terminal, or into a file."""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from thawline.cluster.cli.finished.verb import FinishedVerb
from thawline.cluster.cli.verbs import Flag
from thawline.cluster.words import as_json, printable, say

if TYPE_CHECKING:
    from thawline.cluster.serve.asked import Asked, Named
    from thawline.cluster.serve.mask_pictures import Masks
    from thawline.cluster.serve.predictor import Prediction, Predictor
    from thawline.dataio.stream.render import Item


@dataclass(frozen=True, kw_only=True)
class Predict(FinishedVerb):
    """Say of images what a finished run sees in them, as its validation would. Prints a line for each on a terminal,
    JSON lines elsewhere. An image that cannot be used is told and passed over; the exit status is then 1."""

    places: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE...")]
    """Images, folders of images, patterns ('photos/**/*.jpg'), URIs of either, manifests (.parquet, .arrow); - reads
    paths from stdin, one a line."""
    out: Annotated[str, arg(metavar="FILE")] = ""
    """Write into this file, whole or not at all, in place of stdout: .csv, .jsonl or .parquet."""
    overwrite: Flag = False
    """Write over FILE."""
    top_k: int = 0
    """Name so many classes with their probabilities, the most probable first; all of them in files, when 0."""
    threshold: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Where an image may have several labels: the probability above which one is predicted; the run's .5, if not
    given."""
    tta: int = 0
    """Average with so many augmented views of each image, each of which takes as long again; not points and masks."""
    masks: Annotated[str, arg(metavar="DIR")] = ""
    """Write each mask here, as a PNG of the size of its image with the values that the run's masks have."""
    overlay: Flag = False
    """Draw the masks over their images instead."""
    batch: int = 64
    """Images that go through the model at once."""

    def run(self) -> int:
        """Print the predictions, or the path of their file; 1 where an image cannot be used."""
        if not self.places:
            say("thawline: predict was given no IMAGE, so there is nothing to predict; give paths, or - for stdin")
            return 2
        from thawline.cluster.serve.asked import asked
        from thawline.cluster.serve.written import check_out

        if self.out:
            check_out(self.out, overwrite=self.overwrite)
        images = asked(self.places)
        with self.predictor() as predictor:
            refused = self._predict(predictor, images)
        if self.out:
            print(self.out)
        return 1 if refused else 0

    def _predict(self, predictor: "Predictor", images: "Asked") -> int:
        """Write what is said of each image; returns how many cannot be used. Raises PredictError, RecipeError."""
        from thawline.cluster.cli.bars import bar  # with rich

        masks, flying, done, refused = self._masks(predictor), deque["Named"](), 0, 0

        def items() -> "Iterator[Item]":
            for named in images.images:
                flying.append(named)
                yield named.item

        said = predictor.stream(
            items(),
            tta=self.tta,
            top_k=self.top_k,
            threshold=self.threshold,
            batch=self.batch,
            reading=images.reading,
        )
        with ExitStack() as opened:
            write = self._writer(opened)
            move = opened.enter_context(bar("predicting")) if self.out and images.total else None
            for each in said:
                named, done = flying.popleft(), done + 1
                if move is not None and images.total is not None:
                    move(done, images.total)
                if each.error is not None:
                    say(f"{each.name}: {each.error}; passed over")
                    refused += 1
                else:
                    drawn = None
                    if masks is not None and each.mask is not None:
                        drawn = masks.save(each.mask, named.item, named.short)
                    write(each, drawn)
        if refused:
            say(f"{refused:,} of {done:,} images cannot be used: nothing is said of them")
        return refused

    def _writer(self, opened: ExitStack) -> "Callable[[Prediction, str | None], None]":
        """Where predictions go, with the path of each one's mask."""
        from thawline.cluster.serve.written import in_words, row_of, written

        if self.out:
            write = opened.enter_context(written(self.out))
            return lambda said, mask: write(row_of(said, mask=mask))
        if sys.stdout.isatty():
            return lambda said, mask: print(printable(f"{said.name}  {in_words(said, top_k=self.top_k)}"))
        return lambda said, mask: print(as_json(row_of(said, mask=mask)))

    def _masks(self, predictor: "Predictor") -> "Masks | None":
        """Where masks go. Raises PredictError."""
        from thawline.cluster.errors import PredictError
        from thawline.cluster.serve.mask_pictures import Masks

        if not self.masks:
            return None
        about = predictor.about
        if not predictor.says_masks:
            raise PredictError(f"--masks with task {about.task}: its model says no masks; leave it out")
        return Masks(self.masks, values=about.values, classes=len(about.classes), overlay=self.overlay)
