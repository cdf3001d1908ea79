"""Augmentation against a per-image reference that is given the same parameters."""

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

import common
from study import constants, runs

SYMMETRIES = list(itertools.product([False, True], repeat=3))


def reference(image, symmetry, warped, affine):
    """One image (3, S, S) by NumPy and scipy: flips, transpose, then one bilinear affine warp with
    mirrored border.
    """
    if symmetry[0]:
        image = image[:, :, ::-1]
    if symmetry[1]:
        image = image[:, ::-1, :]
    if symmetry[2]:
        image = image.transpose(0, 2, 1)
    if not warped:
        return image.astype(np.float64)
    # [-1, 1] spans the outer edges of the pixels: x_pixel = (x + 1) * side / 2 - 1 / 2.
    side = image.shape[1]
    matrix = affine[:, :2][::-1, ::-1]  # (x, y) -> (row, column)
    centre = (side - 1) / 2
    offset = side / 2 * affine[:, 2][::-1] + centre - matrix @ np.array([centre, centre])
    options = {"offset": offset, "order": 1, "mode": "reflect"}
    channels = image.astype(np.float64)
    warped = [scipy.ndimage.affine_transform(channel, matrix, **options) for channel in channels]
    return np.stack(warped)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("warped", [False, True])
def test_mpa_equals_the_per_image_reference(symmetry, warped):
    generator = torch.Generator().manual_seed(3)
    patches = torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8, generator=generator)
    _, _, affine = common.draw_augmentation(6, "mpa", generator)
    draws = torch.tensor([symmetry] * 6), torch.full((6,), warped), affine
    got = common.augment(patches, *draws).numpy()
    for i in range(6):
        expected = reference(patches[i].numpy(), symmetry, warped, affine[i].double().numpy())
        # Of 255 grey levels: places are float32.
        np.testing.assert_allclose(got[i], expected, atol=0.02)


def test_mixed_batch_touches_only_its_own_images():
    generator = torch.Generator().manual_seed(4)
    patches = torch.randint(0, 256, (40, 3, 12, 12), dtype=torch.uint8, generator=generator)
    draws = common.draw_augmentation(40, "mpa", generator)
    warped = draws[1]
    assert 5 < warped.sum() < 35
    whole = common.augment(patches, *draws)
    for i in range(40):
        single = common.augment(patches[i : i + 1], *(draw[i : i + 1] for draw in draws))
        torch.testing.assert_close(whole[i : i + 1], single, rtol=0, atol=1e-3)
    assert (whole[~warped] == whole[~warped].round()).all()


def test_draws_keep_their_limits_and_probabilities():
    generator = torch.Generator().manual_seed(0)
    symmetry, warped, affine = common.draw_augmentation(20_000, "mpa", generator)
    assert (symmetry.float().mean(0) - 0.5).abs().max() < 0.02
    assert abs(warped.float().mean() - 0.5) < 0.02
    turn = affine[:, :, :2].double()
    scale = 1 / torch.linalg.det(turn).sqrt()
    angle = torch.rad2deg(torch.atan2(turn[:, 0, 1], turn[:, 0, 0]))
    shift = torch.linalg.solve(turn, -affine[:, :, 2].double()) / 2  # of the side
    for values, low, high in ((scale, 0.9, 1.1), (angle, -30, 30), (shift, -0.1, 0.1)):
        near = 0.01 * (high - low)
        assert low - 1e-4 <= values.min() < low + near
        assert high - near < values.max() <= high + 1e-4


@pytest.mark.parametrize(
    "preset, turns, warps", [("mpa", True, True), ("stnet", True, False), ("none", False, False)]
)
def test_presets_differ_as_named(preset, turns, warps):
    generator = torch.Generator().manual_seed(0)
    symmetry, warped, _ = common.draw_augmentation(100, preset, generator)
    assert symmetry.any() == turns
    assert warped.any() == warps


def test_presets_draw_the_same_affine_maps():
    """Then a difference between two of them is that of the presets, not of other draws."""
    draws = {
        preset: common.draw_augmentation(50, preset, torch.Generator().manual_seed(0))
        for preset in common.AUGMENTATIONS
    }
    for _, _, affine, *_ in draws.values():
        assert torch.equal(affine, draws["mpa"][2])
    assert all(map(torch.equal, draws["mpa"], draws["mpa_stain"]))
    assert draws["mpa_stain"][3].shape == (50, 3, 3)


def test_every_preset_is_allowed_as_aug():
    for preset in common.AUGMENTATIONS:
        constants.check_constants({"AUG": preset}, runs.NAMED_IN_COMMON)


def test_resized_patches_keep_order_and_colour():
    patches = torch.zeros((3, 224, 224, 3), dtype=torch.uint8)
    for i, value in enumerate((200, 100, 50)):
        patches[i, :, :, i] = value
    small = common.place_patches(patches, 32, torch.device("cpu"))[torch.arange(3)]
    assert small.shape == (3, 3, 32, 32)
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert small.amax((2, 3)).tolist() == [[200, 0, 0], [0, 100, 0], [0, 0, 50]]


@pytest.mark.parametrize("sizes", [[], [3], [3, 2], [2, 1, 3, 1]])
def test_patches_are_read_ahead_bit_for_bit_and_in_order(tmp_path, sizes):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 224, 224, 3), np.uint8)
    np.save(tmp_path / "patches.npy", pixels)
    patches = torch.from_numpy(np.load(tmp_path / "patches.npy", mmap_mode="c"))
    order = torch.tensor([4, 0, 6, 2, 2, 5, 1])[: sum(sizes)]
    batches = order.split(sizes) if sizes else []
    device = torch.device("cpu")
    read = list(common.read_ahead(common.place_patches(patches, 224, device), batches, device))
    assert [len(part) for part in read] == sizes
    if sizes:
        assert torch.equal(torch.cat(read).permute(0, 2, 3, 1), patches[order])


def test_what_fails_while_reading_ahead_is_raised():
    device = torch.device("cpu")
    two = torch.zeros((2, 224, 224, 3), dtype=torch.uint8)
    patches = common.place_patches(two, 224, device)
    batches = common.read_ahead(patches, [torch.tensor([0]), torch.tensor([5])], device)
    assert next(batches).shape == (1, 3, 224, 224)
    with pytest.raises(IndexError):
        next(batches)


def test_symmetries_one_by_one_are_those_at_once():
    patches = torch.randint(0, 256, (16, 3, 9, 9), dtype=torch.uint8)
    patches = patches.contiguous(memory_format=torch.channels_last)
    symmetry = torch.tensor(SYMMETRIES * 2)
    one_by_one = common.apply_symmetry(patches, symmetry)
    assert torch.equal(one_by_one, common.apply_symmetry_at_once(patches, symmetry))


def test_the_affine_grid_is_torchs():
    _, _, affine = common.draw_augmentation(9, "mpa", torch.Generator().manual_seed(0))
    expected = F.affine_grid(affine, (9, 3, 37, 37), align_corners=False)
    torch.testing.assert_close(common.lay_affine_grid(affine, 37), expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ what the published scripts do
def test_a_free_aspect_scales_across_and_down_apart():
    generator = torch.Generator().manual_seed(0)
    _, _, affine = common.draw_augmentation(5000, "mpa", generator, aspect="free")
    # The lengths of the rows are the inverse scales across and down.
    across, down = (1 / affine[:, row, :2].norm(dim=1) for row in (0, 1))
    assert torch.corrcoef(torch.stack([across, down]))[0, 1].abs() < 0.05
    for scale in (across, down):
        assert 0.9 - 1e-4 <= scale.min() < 0.91
        assert 1.09 < scale.max() <= 1.1 + 1e-4
    fixed = common.draw_augmentation(50, "mpa", generator, aspect="fixed")[2]
    torch.testing.assert_close(*(fixed[:, row, :2].norm(dim=1) for row in (0, 1)))


def test_a_free_aspect_is_rotation_after_scale():
    """Against the matrices that albumentations' documentation names: scale, rotate, shift."""
    uniform = torch.tensor([[0.3, 0.9, 0.1, 0.8, 0.7]])
    angle = np.deg2rad((0.8 * 2 - 1) * 30)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = turn @ np.diag([0.9 + 0.2 * 0.1, 0.9 + 0.2 * 0.7])
    (affine,) = common.sample_affine(uniform, "free").numpy()
    np.testing.assert_allclose(affine[:, :2], np.linalg.inv(forward), rtol=1e-5)


def test_a_black_border_is_black_where_a_reflected_one_is_tissue():
    white = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)
    draws = common.draw_augmentation(64, "mpa", torch.Generator().manual_seed(0))
    reflected = common.augment(white, *draws)
    torch.testing.assert_close(reflected, white.float(), rtol=0, atol=1e-3)
    black = common.augment(white, *draws, border="black")
    share = (black == 0).float().mean((1, 2, 3))
    assert (share[draws[1]] > 0).float().mean() > 0.9
    assert 0.08 < share[draws[1]].mean() < 0.18, "13 % by the audit of the published scripts"
    assert (share[~draws[1]] == 0).all()
