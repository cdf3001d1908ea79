"""Augmentation against a per-image reference that is given the same parameters."""

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch

import common

SYMMETRIES = list(itertools.product([False, True], repeat=3))


def reference(image, symmetry, warped, affine):
    """One image (3, S, S) by NumPy and scipy: flips, transpose, then one bilinear affine warp with mirrored border."""
    if symmetry[0]:
        image = image[:, :, ::-1]
    if symmetry[1]:
        image = image[:, ::-1, :]
    if symmetry[2]:
        image = image.transpose(0, 2, 1)
    if not warped:
        return image.astype(np.float64)
    side = image.shape[1]
    scale = side / 2  # [-1, 1] spans the outer edges of the pixels: x_pixel = (x + 1) * side / 2 - 1 / 2
    matrix = affine[:, :2][::-1, ::-1]  # (x, y) -> (row, column)
    centre = (side - 1) / 2
    offset = scale * affine[:, 2][::-1] + centre - matrix @ np.array([centre, centre])
    return np.stack(
        [
            scipy.ndimage.affine_transform(channel.astype(np.float64), matrix, offset, order=1, mode="reflect")
            for channel in image
        ]
    )


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("warped", [False, True])
def test_mpa_equals_the_per_image_reference(symmetry, warped):
    generator = torch.Generator().manual_seed(3)
    patches = torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8, generator=generator)
    draw = common.draw_augmentation(6, "mpa", generator)
    affine = draw[2]
    got = common.augment(patches, torch.tensor([symmetry] * 6), torch.full((6,), warped), affine).numpy()
    for i in range(6):
        expected = reference(patches[i].numpy(), symmetry, warped, affine[i].double().numpy())
        np.testing.assert_allclose(got[i], expected, atol=0.02)  # of 255 grey levels: float32 places


def test_mixed_batch_touches_only_its_own_rows():
    generator = torch.Generator().manual_seed(4)
    patches = torch.randint(0, 256, (40, 3, 12, 12), dtype=torch.uint8, generator=generator)
    draw = common.draw_augmentation(40, "mpa", generator)
    assert 5 < draw[1].sum() < 35
    whole = common.augment(patches, *draw)
    single = torch.cat([common.augment(patches[i : i + 1], *(part[i : i + 1] for part in draw)) for i in range(40)])
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-3)
    exact = ~draw[1]
    assert (whole[exact] == whole[exact].round()).all()


def test_the_eight_symmetries_are_exact_and_different():
    patch = torch.arange(3 * 5 * 5, dtype=torch.uint8).reshape(1, 3, 5, 5)
    seen = {common.apply_symmetry(patch, torch.tensor([s])).numpy().tobytes() for s in SYMMETRIES}
    assert len(seen) == 8


def test_draws_keep_their_limits_and_probabilities():
    symmetry, warped, affine = common.draw_augmentation(20_000, "mpa", torch.Generator().manual_seed(0))
    assert (symmetry.float().mean(0) - 0.5).abs().max() < 0.02
    assert abs(warped.float().mean() - 0.5) < 0.02
    turn = affine[:, :, :2].double()
    scale = 1 / torch.linalg.det(turn).sqrt()
    angle = torch.rad2deg(torch.atan2(turn[:, 0, 1], turn[:, 0, 0]))
    shift = torch.linalg.solve(turn, -affine[:, :, 2].double()) / 2  # of the side
    for values, low, high in ((scale, 0.9, 1.1), (angle, -30, 30), (shift, -0.1, 0.1)):
        span = high - low
        assert low - 1e-4 <= values.min() < low + 0.01 * span and high - 0.01 * span < values.max() <= high + 1e-4


def test_presets_differ_as_named():
    draws = {p: common.draw_augmentation(100, p, torch.Generator().manual_seed(0)) for p in ("mpa", "stnet", "none")}
    kinds = {preset: (bool(symmetry.any()), bool(warped.any())) for preset, (symmetry, warped, _) in draws.items()}
    assert kinds == {"none": (False, False), "stnet": (True, False), "mpa": (True, True)}


def test_resized_patches_keep_order_and_colour():
    patches = np.zeros((3, 224, 224, 3), np.uint8)
    patches[0, ..., 0], patches[1, ..., 1], patches[2, ..., 2] = 200, 100, 50
    patches, device = torch.from_numpy(patches), torch.device("cpu")
    small = common.place_patches(patches, 32, device)[torch.arange(3)]
    assert small.shape == (3, 3, 32, 32) and small.is_contiguous(memory_format=torch.channels_last)
    assert small.amax((2, 3)).tolist() == [[200, 0, 0], [0, 100, 0], [0, 0, 50]]


@pytest.mark.parametrize("sizes", [[], [3], [3, 2], [2, 1, 3, 1]])
def test_patches_are_read_ahead_bit_for_bit_and_in_order(tmp_path, sizes):
    np.save(tmp_path / "patches.npy", np.random.default_rng(0).integers(0, 256, (7, 224, 224, 3), np.uint8))
    patches = torch.from_numpy(np.load(tmp_path / "patches.npy", mmap_mode="c"))
    order = torch.tensor([4, 0, 6, 2, 2, 5, 1])[: sum(sizes)]
    device = torch.device("cpu")
    read = list(
        common.read_ahead(common.place_patches(patches, 224, device), order.split(sizes) if sizes else [], device)
    )
    assert [len(part) for part in read] == sizes
    if sizes:
        assert torch.equal(torch.cat(read).permute(0, 2, 3, 1), patches[order])


def test_what_fails_while_reading_ahead_is_raised():
    device = torch.device("cpu")
    patches = common.place_patches(torch.zeros((2, 224, 224, 3), dtype=torch.uint8), 224, device)
    batches = common.read_ahead(patches, [torch.tensor([0]), torch.tensor([5])], device)
    assert next(batches).shape == (1, 3, 224, 224)
    with pytest.raises(IndexError):
        next(batches)


def test_symmetries_one_by_one_are_those_at_once():
    patches = torch.randint(0, 256, (16, 3, 9, 9), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    symmetry = torch.cartesian_prod(*[torch.tensor([False, True])] * 3).repeat(2, 1)
    assert torch.equal(common.apply_symmetry(patches, symmetry), common.apply_symmetry_at_once(patches, symmetry))


def test_the_affine_grid_is_torchs():
    _, _, affine = common.draw_augmentation(9, "mpa", torch.Generator().manual_seed(0))
    expected = torch.nn.functional.affine_grid(affine, (9, 3, 37, 37), align_corners=False)
    torch.testing.assert_close(common.lay_affine_grid(affine, 37), expected, rtol=0, atol=1e-6)
