"""Colour and texture of a patch in 40 numbers: what the ridge on colour sees, and 26's distance."""

import numpy as np
import torch
import torch.nn.functional as F

from common import DYES, parts_of


def colour_statistics(patches):
    """40 colour and texture statistics a patch, (n, 224, 224, 3) uint8 -> (n, 40) float64.

    They are all that the baseline knows of a patch: mean, sd and three percentiles of red, green,
    blue; these and the skewness of the two dyes' densities (Ruifrok and Johnston 2001); mean and sd
    of saturation; gradients and contrast of grey at three scales and gradients of hematoxylin;
    fractions of dark and of white pixels.
    """
    dyes = torch.tensor(DYES)
    unmix = torch.linalg.inv(dyes / dyes.norm(dim=1, keepdim=True))[:, :2]
    # Filled in place: small results kept between large ones would keep the memory of all of them.
    statistics = np.empty((len(patches), 40))
    for part in parts_of(len(patches), 16):  # So few stay in the processor's caches.
        rgb = torch.from_numpy(patches[part]).permute(0, 3, 1, 2).float().div(255)
        rgb = F.avg_pool2d(rgb, 2)
        density = -torch.log(rgb.clamp_min(1 / 255))
        stains = torch.einsum("bchw,cd->bdhw", density, unmix)
        colours = describe_colours(torch.cat([rgb, stains], 1).flatten(2))
        statistics[part] = torch.cat([colours, describe_texture(rgb, stains)], 1).numpy()
    return statistics


def describe_colours(values):
    """(B, 27): mean, sd, skewness (of the last two) and percentiles of channels (B, 5, pixels)."""
    mean, sd = values.mean(2), values.std(2)
    centred = values[:, 3:] - mean[:, 3:, None]
    skewness = (centred**3).mean(2) / sd[:, 3:].clamp_min(1e-6) ** 3
    some = values[:, :, ::4]
    percentiles = some.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=2).permute(1, 0, 2).flatten(1)
    return torch.cat([mean, sd, skewness, percentiles], 1)


def describe_texture(rgb, stains):
    """(B, 13): saturation, gradients and contrast at three scales, fractions of dark and white."""
    saturation = (1 - rgb.amin(1) / rgb.amax(1).clamp_min(1e-3)).flatten(1)
    grey, hematoxylin = rgb.mean(1, keepdim=True), stains[:, :1]
    columns = [saturation.mean(1), saturation.std(1)]
    for scale in (1, 2, 4):
        coarse = F.avg_pool2d(grey, scale)
        columns.append(mean_gradient(coarse))
        columns.append(mean_gradient(F.avg_pool2d(hematoxylin, scale)))
        columns.append(coarse.std((1, 2, 3)))
    columns.append((grey < 0.4).float().mean((1, 2, 3)))
    columns.append((grey > 0.85).float().mean((1, 2, 3)))
    return torch.stack(columns, 1)


def mean_gradient(images):
    """(B,): mean difference of neighbouring pixels of (B, 1, h, w), down plus across."""
    down, across = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return down.mean((1, 2, 3)) + across.mean((1, 2, 3))
