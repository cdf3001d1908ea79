"""The conventional pipeline that this project is compared with: a PNG a patch, per-image
transforms, fp32, per-gene r.

It is what a tutorial would write, kept in its usual, correct form. Nothing outside benchmarks/ uses
it.
"""

import numpy as np
import scipy.linalg
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def cut_patches(slide, corners, folder, size=224):
    """Read the slide (h, w, 3) whole and save the patch at each of the corners (n, 2), which may
    lie outside.
    """
    pixels = tifffile.imread(slide)
    pixels = np.pad(pixels, ((size, size), (size, size), (0, 0)), constant_values=255)
    for number, (top, left) in enumerate(corners + size):
        patch = pixels[top : top + size, left : left + size]
        Image.fromarray(patch).save(folder / f"{number:05d}.png")


def save_patches(patches, folder):
    """(n, S, S, 3) uint8 as PNG files."""
    for number, patch in enumerate(patches):
        Image.fromarray(np.asarray(patch)).save(folder / f"{number:05d}.png")


def transform(augmented):
    """MPA by torchvision, image by image, then ImageNet's normalisation."""
    bilinear = transforms.InterpolationMode.BILINEAR
    warp = transforms.RandomAffine(30, (0.1, 0.1), (0.9, 1.1), interpolation=bilinear)
    mpa = [
        transforms.RandomHorizontalFlip(),
        transforms.RandomVerticalFlip(),
        transforms.RandomApply([transforms.Lambda(transpose)]),
        transforms.RandomApply([warp]),
    ]
    plain = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose(mpa + plain if augmented else plain)


def transpose(image):
    return image.transpose(Image.Transpose.TRANSPOSE)


class PngPatches(Dataset):
    """(3, S, S) float32 patches and (G,) expression, read file by file."""

    def __init__(self, folder, target, augmented):
        self.files = sorted(folder.glob("*.png"))
        self.target = target
        self.transform = transform(augmented)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(Image.open(self.files[i]).convert("RGB")), self.target[i]


def load(folder, target, augmented, workers, batch_size=32):
    """The DataLoader of a folder of patches."""
    dataset = PngPatches(folder, torch.from_numpy(target), augmented)
    return DataLoader(
        dataset,
        batch_size,
        shuffle=augmented,
        drop_last=augmented,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def train_epoch(model, loader, optimiser, device):
    """One pass in fp32; returns the mean loss."""
    model.train()
    losses = []
    for images, target in loader:
        images, target = images.to(device), target.to(device)
        optimiser.zero_grad()
        loss = F.mse_loss(model(images), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def predict(model, loader, device):
    """(n, G) in fp32."""
    model.eval()
    return np.concatenate([model(images.to(device)).cpu().numpy() for images, _ in loader])


def choose_shrinkage(x, y, folds, penalties):
    """(number of the penalty, rank) of the reduced-rank ridge of expression y (n, G) on features x
    (n, F), both centred, that errs least on what the folds [(to fit, held out)] hold out: an SVD of
    (features x genes) for every penalty and fold.
    """
    explained = np.zeros((len(penalties), min(x.shape[1], y.shape[1])))
    for train, held_out in folds:
        sizes, axes = scipy.linalg.eigh(x[train].T @ x[train])
        sizes = sizes.clip(0)
        xy = axes.T @ (x[train].T @ y[train])
        judged_xx = axes.T @ (x[held_out].T @ x[held_out]) @ axes
        judged_xy = axes.T @ (x[held_out].T @ y[held_out])
        for i, penalty in enumerate(penalties):
            weight = xy / (sizes + penalty)[:, None]
            predicted = np.sqrt(sizes)[:, None] * weight
            patterns = scipy.linalg.svd(predicted, full_matrices=False)[2].T
            directions = weight @ patterns
            gains = 2 * directions * (judged_xy @ patterns) - directions * (judged_xx @ directions)
            explained[i] += gains.sum(0).cumsum()
    penalty, last = np.unravel_index(explained.argmax(), explained.shape)
    return penalty, last + 1


def correlate(predicted, truth):
    """Pearson r gene by gene."""
    genes = range(truth.shape[1])
    return np.array([np.corrcoef(predicted[:, g], truth[:, g])[0, 1] for g in genes])
