"""Are images mixed as MixUp and CutMix say, with the same numbers on any number of ranks and after any resume?"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from thawline.dataio.batch import Batch, ImageBatch
from thawline.dataio.errors import SpecError
from thawline.dataio.stream.mix import Mix
from thawline.dataio.stream.plan import Training
from thawline.trainer.losses.named import default_loss

CLASSES, BATCH, HEIGHT_PX, WIDTH_PX = 5, 16, 24, 40
KINDS: dict[str, dict[str, Any]] = {
    "mixup": {"mixup": 0.4, "cutmix": 0.0},
    "cutmix": {"mixup": 0.0, "cutmix": 1.0},
    "both": {"mixup": 0.4, "cutmix": 1.0},
}
Values = NDArray[np.float64]


def mix(kind: str = "both", **changes: Any) -> Mix:
    return Mix(**{"classes": CLASSES, "global_batch": BATCH, "seed": 11} | KINDS[kind] | changes)


def batch_at(positions: NDArray[np.int64], dtype: torch.dtype = torch.float32) -> ImageBatch:
    """Images and labels that are a function of the stream position alone; channels_last, as the engines write."""
    images = np.stack([np.random.default_rng(i).normal(size=(3, HEIGHT_PX, WIDTH_PX)) for i in positions])
    return ImageBatch(
        inputs=torch.from_numpy(images).to(dtype, memory_format=torch.channels_last),
        targets=torch.from_numpy(positions * 7 % CLASSES),
        ids=torch.from_numpy(positions),
    )


def step_batch(step: int, rank: int = 0, world_size: int = 1) -> ImageBatch:
    return batch_at(Training(n=1000, global_batch=BATCH, seed=0, rank=rank, world_size=world_size).positions(step))


def one_hot(batch: ImageBatch) -> Values:
    return np.eye(CLASSES)[batch.targets.numpy()]


def mixed_by_hand(mixer: Mix, step: int, images: Values, shares: Values) -> tuple[Values, Values]:
    """One sample after another: itself, and what it gets of its neighbour."""
    drawn = mixer.draw(step, width_px=WIDTH_PX, height_px=HEIGHT_PX)
    out_images, out_shares = images.copy(), shares.copy()
    for i in range(len(images)):
        other, weight = i ^ 1, drawn.weight[i // 2]
        if drawn.cut[i // 2]:
            left, top, right, bottom = drawn.box[i // 2]
            out_images[i, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
            assert weight == pytest.approx((bottom - top) * (right - left) / (HEIGHT_PX * WIDTH_PX), abs=1e-12)
        else:
            out_images[i] = (1 - weight) * images[i] + weight * images[other]
        out_shares[i] = (1 - weight) * shares[i] + weight * shares[other]
    return out_images, out_shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_as_by_hand(kind: str, dtype: torch.dtype) -> None:
    mixer = mix(kind)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # one rounding of a value below 8 in 11 bits
    for step in range(8):
        batch = batch_at(np.arange(step * BATCH, (step + 1) * BATCH), dtype)
        before = batch.inputs.clone(), batch.targets.clone()
        mixed = mixer(batch, step)
        images, shares = mixed_by_hand(mixer, step, batch.inputs.double().numpy(), one_hot(batch))
        np.testing.assert_allclose(mixed.inputs.double().numpy(), images, rtol=0, atol=tolerance)
        np.testing.assert_allclose(mixed.targets.numpy(), shares, rtol=0, atol=1e-6)
        np.testing.assert_allclose(mixed.targets.sum(1).numpy(), 1, rtol=0, atol=1e-6)
        assert mixed.inputs.dtype == dtype
        assert mixed.inputs.is_contiguous(memory_format=torch.channels_last)
        assert mixed.targets.dtype == torch.float32
        assert torch.equal(mixed.ids, batch.ids)
        assert torch.equal(batch.inputs, before[0])
        assert torch.equal(batch.targets, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_box_is_the_partners_pixels_and_the_rest_the_samples_own(dtype: torch.dtype) -> None:
    mixer, cut_something = mix("cutmix"), 0
    for step in range(8):
        batch = batch_at(np.arange(BATCH), dtype)
        mixed = mixer(batch, step).inputs
        drawn = mixer.draw(step, width_px=WIDTH_PX, height_px=HEIGHT_PX)
        for i in range(BATCH):
            left, top, right, bottom = drawn.box[i // 2]
            inside = torch.zeros(HEIGHT_PX, WIDTH_PX, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            assert torch.equal(mixed[i][:, inside], batch.inputs[i ^ 1][:, inside])
            assert torch.equal(mixed[i][:, ~inside], batch.inputs[i][:, ~inside])
            cut_something += 0 < int(inside.sum()) < inside.numel()
    assert cut_something > 4 * BATCH  # of 8 * BATCH


def test_a_batch_keeps_its_pixels_and_its_balance_of_classes() -> None:
    batch = step_batch(3)
    mixed = mix()(batch, 3)
    np.testing.assert_allclose(mixed.inputs.double().sum(0), batch.inputs.double().sum(0), atol=1e-5)
    np.testing.assert_allclose(mixed.targets.sum(0), one_hot(batch).sum(0), atol=1e-5)


def test_no_value_is_read_back_from_the_device() -> None:
    batch = step_batch(0)
    there = replace(batch, inputs=batch.inputs.to("meta"), targets=batch.targets.to("meta"))
    mixed = mix()(there, 0)  # a meta tensor has no values: whoever read one would fail
    assert mixed.inputs.shape == batch.inputs.shape
    assert mixed.inputs.device.type == mixed.targets.device.type == "meta"


def test_contiguous_images_stay_contiguous() -> None:
    batch = step_batch(0)
    plain = replace(batch, inputs=batch.inputs.contiguous())
    mixed = mix()(plain, 0).inputs
    assert mixed.is_contiguous()
    assert torch.equal(mixed, mix()(batch, 0).inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_mixes_the_same(kind: str, world_size: int) -> None:
    for step in (0, 1, 17):
        whole = mix(kind)(step_batch(step), step)
        parts = [
            mix(kind, rank=rank, world_size=world_size)(step_batch(step, rank, world_size), step)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_a_step_is_unbroken(kind: str) -> None:
    one = mix(kind)
    unbroken = [one(step_batch(step), step) for step in range(6)]
    for step in (5, 3):
        resumed = mix(kind)(step_batch(step), step)
        assert torch.equal(resumed.inputs, unbroken[step].inputs)
        assert torch.equal(resumed.targets, unbroken[step].targets)
    weights = [one.draw(step, width_px=WIDTH_PX, height_px=HEIGHT_PX).weight for step in range(6)]
    weights.append(mix(kind, seed=12).draw(0, width_px=WIDTH_PX, height_px=HEIGHT_PX).weight)
    assert len({tuple(weight) for weight in weights}) == 7  # another step or seed, other numbers


def many(mixer: Mix, steps: int) -> tuple[Values, Values, Values]:
    """Weights, boxes and who is cut, over many steps."""
    drawn = [mixer.draw(step, width_px=WIDTH_PX, height_px=HEIGHT_PX) for step in range(steps)]
    return (
        np.concatenate([one.weight for one in drawn]),
        np.concatenate([one.box for one in drawn]).astype(np.float64),
        np.concatenate([one.cut for one in drawn]).astype(np.float64),
    )


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_weights_have_the_moments_of_beta(alpha: float) -> None:
    weight, box, cut = many(mix("mixup", mixup=alpha, global_batch=512), 80)
    assert not box.any()
    assert not cut.any()
    assert weight.mean() == pytest.approx(0.5, abs=0.01)
    assert weight.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)
    assert abs(np.corrcoef(weight[:-256], weight[256:])[0, 1]) < 0.03  # one step says nothing of the next


def test_cutmix_boxes_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms import v2

    theirs = v2.CutMix(alpha=1.0, num_classes=CLASSES)
    images = torch.zeros(2, 3, HEIGHT_PX, WIDTH_PX)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [theirs.make_params([images]) for _ in range(4000)]
    expected = np.array([[1 - one["lam_adjusted"], *one["box"]] for one in params])
    weight, box, cut = many(mix("cutmix", global_batch=400), 20)
    assert cut.all()
    for ours, other in zip(np.column_stack([weight, box]).T, expected.T, strict=True):
        grid = np.unique(np.concatenate([ours, other]))
        below = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (ours, other)]
        assert np.abs(below[0] - below[1]).max() < 0.06  # Kolmogorov and Smirnov: exceeded once in a million


def test_half_of_the_pairs_are_cut_where_both_are_on() -> None:
    both, box, cut = many(mix("both", global_batch=512), 40)
    assert cut.mean() == pytest.approx(0.5, abs=0.025)  # five standard deviations of 10,240 tosses
    assert not box[cut == 0].any()
    alone = many(mix("mixup", global_batch=512), 40)[0]
    np.testing.assert_array_equal(both[cut == 0], alone[cut == 0])


def test_rows_of_several_labels_are_mixed_as_they_are() -> None:
    labels = (np.random.default_rng(1).uniform(size=(BATCH, CLASSES)) < 0.4).astype(np.float32)
    batch = replace(step_batch(2), targets=torch.from_numpy(labels))
    mixed = mix()(batch, 2)
    _, shares = mixed_by_hand(mix(), 2, batch.inputs.double().numpy(), labels.astype(np.float64))
    np.testing.assert_allclose(mixed.targets.numpy(), shares, rtol=0, atol=1e-6)
    assert mixed.targets.dtype == torch.float32


def test_the_loss_of_a_mixture_is_the_mixture_of_losses() -> None:
    batch, logits = step_batch(1), torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(0))
    weight = mix().draw(1, width_px=WIDTH_PX, height_px=HEIGHT_PX).weight.repeat(2)
    loss = default_loss("single_label")
    own, other = loss(logits, batch.targets), loss(logits, batch.targets.view(-1, 2).flip(1).flatten())
    expected = (1 - weight) * own.numpy() + weight * other.numpy()
    np.testing.assert_allclose(loss(logits, mix()(batch, 1).targets).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_batch": 17}, r"global_batch=17 is not a multiple of 2 \* world_size=2"),
        ({"global_batch": 12, "world_size": 4}, r"global_batch=12 is not a multiple of 2 \* world_size=8"),
        ({"global_batch": 0}, "global_batch=0"),
        ({"mixup": 0.0, "cutmix": 0.0}, "both off"),
        ({"mixup": 0.0, "cutmix": -1.0}, "both off"),
        ({"mixup": float("nan")}, "mixup=nan"),
        ({"cutmix": float("inf")}, "cutmix=inf"),
        ({"classes": 0}, "classes=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
    ],
)
def test_what_cannot_be_mixed_is_refused_when_built(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        mix(**changes)


@pytest.mark.parametrize(
    "targets",
    [
        torch.zeros(BATCH),
        torch.zeros(BATCH, dtype=torch.int32),
        torch.zeros(BATCH, CLASSES, dtype=torch.int64),
        torch.zeros(BATCH, CLASSES + 1),
        torch.zeros(BATCH, 4, 2),
        torch.zeros(BATCH, HEIGHT_PX, WIDTH_PX, dtype=torch.int64),
    ],
    ids=lambda targets: f"{tuple(targets.shape)} {targets.dtype}",
)
def test_targets_that_are_not_classes_are_refused(targets: torch.Tensor) -> None:
    with pytest.raises(SpecError, match="give mixup = 0 and cutmix = 0"):
        mix()(replace(step_batch(0), targets=targets), 0)


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(BATCH, 5), torch.zeros(BATCH, 3, 4, 4, dtype=torch.uint8), (torch.zeros(BATCH, 3, 4, 4),) * 2],
    ids=["rows", "bytes", "two"],
)
def test_inputs_that_are_not_images_are_refused(inputs: Any) -> None:
    with pytest.raises(SpecError, match=r"inputs of \(16, .* are not images \(N, C, H, W\).*give mixup = 0"):
        mix()(Batch(inputs, torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH)), 0)


def test_a_batch_that_is_not_this_ranks_local_batch_is_refused() -> None:
    with pytest.raises(SpecError, match="16 images came where rank 1's local batch is 8"):
        mix(rank=1, world_size=2)(step_batch(0), 0)
