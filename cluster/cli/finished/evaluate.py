"""What can be typed to measure a finished run? evaluate: every metric on a split, or on another manifest."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from thawline.cluster.cli.finished.verb import FinishedVerb
from thawline.cluster.words import as_json, finite, say


@dataclass(frozen=True, kw_only=True)
class Evaluate(FinishedVerb):
    """Measure a finished run on images that it has not seen: every metric with its interval, by class, a page."""

    manifest: Annotated[Positional[str], arg(metavar="[MANIFEST]")] = ""
    """Manifest to measure on (.parquet, .arrow); the run's own where none is given."""
    split: Annotated[Literal["test", "valid", "all"] | None, arg(metavar="test|valid|all")] = None
    """Images to measure on; without it test, or valid where there are no test images. all: also those for training."""
    root: Annotated[str, arg(metavar="FOLDER")] = ""
    """Folder that holds the images, if they moved since indexing."""
    metrics: tuple[str, ...] = ()
    """Further metrics, such as 'f_beta(beta=2)'; those that the task has names for are there anyway."""
    resamples: int = 400
    """How often to draw the images again for the metrics' intervals; 0 = no intervals."""
    batch: int = 64
    """Images that go through the model at once."""
    out: Annotated[str, arg(metavar="FOLDER")] = ""
    """Where to write evaluation.json and evaluation.html; without it the run's folder."""

    def run(self) -> int:
        """Print evaluation.json's line; the metrics for people go to stderr."""
        from thawline.cluster.serve import evaluation
        from thawline.cluster.serve.evaluation_page import page

        job = evaluation.job_of(self.source)
        with self.predictor() as predictor:
            about = predictor.about
            manifest = evaluation.manifest_for(about, self.manifest or None, job, root=self.root or None)
            split = evaluation.chosen_split(manifest, self.split)
            folder = evaluation.folder_for(self.out or None, self.source)
            name = self.manifest or (job.manifest if job else "")
            say(f"{self.source}: {about.model} on {split} of {name}")
            found, loader = evaluation.measure(
                predictor,
                manifest,
                split=split,
                metrics=self.metrics,
                loss=evaluation.loss_of(job, trust_code=self.trust_code),
                resamples=self.resamples,
                batch=self.batch,
            )
            with closing(loader):
                described = evaluation.described(found, run=self.source, manifest=name, predictor=predictor)
                drawn = page(found, finite(described), about, loader, outputs_of=evaluation.outputs_of(predictor))
        evaluation.write(folder, described, drawn)
        for line in evaluation.lines(found):
            say(line)
        say(f"{found.samples:,} images; see {Path(folder.text) / 'evaluation.html'}")
        print(as_json({name: of["value"] for name, of in described["metrics"].items()}))
        return 0
