"""What does a job load? Its manifests and its model, each once in a process, when first needed.

It only reads: whether a run may use them, see `folder` and `preflight`.
"""

from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING

from thawline.cluster.job.job import Job
from thawline.cluster.job.recipes import sides_px
from thawline.dataio.checks.census import label_moments
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest

if TYPE_CHECKING:
    from thawline.models.classifier import Classifier


class Loaded:
    """What a job names, loaded when first needed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._model: Classifier | None = None

    @property
    def manifest(self) -> Manifest:
        """The job's manifest. Raises ManifestError."""
        return self._manifests[0]

    @property
    def valid(self) -> Manifest | None:
        """The manifest to validate on, if the job names another one. Raises ManifestError."""
        return self._manifests[1]

    @property
    def manifests(self) -> list[Manifest]:
        """One or both. Raises ManifestError."""
        return [manifest for manifest in self._manifests if manifest is not None]

    @property
    def fingerprint(self) -> str:
        """The manifests' fingerprints, which differ for other data. Raises ManifestError."""
        return " ".join(manifest.fingerprint() for manifest in self.manifests)

    def make_model(self, *, fresh: bool = False) -> None:
        """Make the model, its weights fetched and checked, for the one who will take it. Raises as `take_model`.

        A run that has checkpoints needs no other weights: where those that it began with are gone, it goes on without.
        fresh: it will be begun anew, whatever its folder holds.
        """
        from thawline.models.errors import WeightsError
        from thawline.trainer.checkpoints import checkpoint

        try:
            self._model = self._created(self.job.model.weights)
        except WeightsError:
            root = Root.of(self.job.storage).child(self.job.name).child("checkpoints")
            if fresh or checkpoint.newest(root)[0] is None:
                raise
            self._model = self._created("none")
            self._model.origin = f"of its checkpoint; {self.job.model.weights} is not there any more"

    def _created(self, weights: str) -> "Classifier":
        from thawline.models.classifier import create  # with torch, which reading a manifest does not need

        model, classes = self.job.model, self.manifest.classes
        mean, std = label_moments(self.manifest) or (None, None)
        made = create(
            model.name,
            len(classes),
            task=self.manifest.task,
            weights=weights,
            dropout=model.dropout,
            seed=self.job.seed,
            class_names=classes,
            label_mean=mean,
            label_std=std,
            y_range=model.y_range,
            decoder=model.decoder,
            groups=model.groups,
            size_px=sides_px(self.job)[-1],
            checkpointing=model.checkpointing,
        )
        if model.lora.rank:
            from thawline.models.lora import add_lora

            add_lora(made, **asdict(model.lora), seed=self.job.seed)
        return made

    def take_model(self) -> "Classifier":
        """A model that nobody has trained: whoever takes it may. Raises ModelError, ManifestError."""
        if self._model is None:
            self.make_model()
        assert self._model is not None
        model, self._model = self._model, None
        return model

    def forget(self) -> None:
        """Give the memory back: ten million rows are not to lie here until a run has ended."""
        self._model = None
        self.__dict__.pop("_manifests", None)

    @cached_property
    def _manifests(self) -> tuple[Manifest, Manifest | None]:
        job = self.job
        manifest = Manifest.load(job.manifest, root=job.data.root or None)
        if not job.data.valid:
            return manifest, None
        other = Manifest.load(job.data.valid)
        manifest.check_vocabulary(other, name=job.data.valid)
        return manifest, other
