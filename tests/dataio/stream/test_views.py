"""Batch transforms and test-time augmentation: does the learner hand out and average what it says?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kit.runs import digits_manifest, planned_hash, write_job
from tests.kit.toy import ToyLoader, learner, loaders
from thawline.cluster.job import job as jobs
from thawline.cluster.launch.launch import in_process
from thawline.dataio.batch import Batch
from thawline.dataio.errors import SpecError
from thawline.trainer.errors import RecipeError
from thawline.trainer.metrics.predictions import Predictions, average


def test_a_batch_transform_sees_every_training_batch_with_its_step_and_no_validation() -> None:
    seen = list[tuple[int, list[int]]]()

    def noted(batch: Batch, step: int) -> Batch:
        seen.append((step, batch.ids.tolist()))
        return replace(batch, inputs=batch.arguments[0] + 1)

    train, valid = loaders(train=12, valid=5, global_batch=4)
    subject = learner(data=(train, valid), batch_transform=noted)
    subject.fit_one_cycle(2, 1e-2)
    subject.validate()
    expected = [(step, batch.ids.tolist()) for step, batch in zip(range(6), train.stream(), strict=False)]
    assert seen == expected


def test_a_transform_changes_what_is_trained_on() -> None:
    plain, shifted = learner(), learner(batch_transform=lambda b, step: replace(b, inputs=b.arguments[0] * 0))
    for subject in (plain, shifted):
        subject.fit_one_cycle(1, 1e-2)
    assert plain.recorder.of_kind("train")[0]["loss"] != shifted.recorder.of_kind("train")[0]["loss"]


def test_tta_averages_the_views_and_the_plain_images() -> None:
    """The toy's view v adds v + 1 to every pixel: what the model says of that, by hand."""
    train, valid = loaders(train=12, valid=7, global_batch=4)
    subject = learner(data=(train, valid))
    found = subject.tta(views=3, beta=0.4)
    assert found is not None
    subject.model.eval()
    with torch.inference_mode():
        said = [subject.model(valid.inputs + shift).softmax(1).double().numpy() for shift in (0, 1, 2, 3)]
    expected = 0.4 * said[0] + 0.6 * (said[1] + said[2] + said[3]) / 3
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(found.losses, -np.log(expected[np.arange(7), valid.targets.numpy()]), atol=1e-5)


def test_data_without_views_is_refused_with_a_sentence() -> None:
    train, valid = loaders(train=12, valid=7, global_batch=4)
    subject = learner(data=(train, valid))
    subject.session.valid = Plain(valid)  # type: ignore[assignment]
    with pytest.raises(RecipeError, match="Plain has no augmented views of its samples: there is nothing to average"):
        subject.tta()


class Plain:
    """Of a loader, what has to do with no pictures."""

    def __init__(self, loader: ToyLoader) -> None:
        self.task, self.classes, self.stream = loader.task, loader.classes, loader.stream


def test_views_that_lack_a_sample_leave_it_out_and_multi_label_losses_are_the_mean_over_classes() -> None:
    targets = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    nothing = np.zeros(3, np.float32)
    one = np.array([[0.5, 0.5], [0.2, 0.8], [0.6, 0.4]], np.float32)
    first = Predictions(np.array([3, 5, 9]), targets, one, nothing, "multi_label")
    other = np.array([[0.7, 0.1], [0.8, 0.8]], np.float32)
    second = Predictions(np.array([3, 9]), targets[[0, 2]], other, nothing[:2], "multi_label")
    found = average(first, [second], beta=0.5)
    assert found.ids.tolist() == [3, 9]
    np.testing.assert_allclose(found.probabilities, [[0.6, 0.3], [0.7, 0.6]], atol=1e-6)
    by_hand = [-(np.log(0.6) + np.log(0.7)) / 2, -(np.log(0.7) + np.log(0.6)) / 2]
    np.testing.assert_allclose(found.losses, by_hand, atol=1e-6)


@pytest.mark.slow
def test_a_job_trains_on_mixtures_over_the_same_stream(tmp_path: Path) -> None:
    manifest = digits_manifest(tmp_path)
    job = jobs.resolved(jobs.load(write_job(tmp_path, manifest)))
    job = replace(job, fit=replace(job.fit, epochs=1))
    plain = in_process(replace(job, name="plain"))
    assert plain["stream_hash"] == planned_hash(manifest, 10)
    for name in ("mixup", "cutmix"):
        share: dict[str, Any] = {name: 0.4}
        mixed = replace(job, name=name, augment=replace(job.augment, **share))
        made = in_process(mixed)
        assert made["stream_hash"] == plain["stream_hash"]
        assert made["metrics"]["train_loss"] > plain["metrics"]["train_loss"]  # a mixture's entropy stays
        odd = replace(mixed, name="odd", data=replace(mixed.data, global_batch=25))
        with pytest.raises(SpecError, match="global_batch=25"):
            in_process(odd)
