"""Images to train on: MNIST or CIFAR files where the user points to them, else sklearn's digits.

Nothing is downloaded. Layouts that are found, in the folder or up to two folders below it: MNIST's
four files (gz or not), CIFAR's two folders of batches, CIFAR's two archives (gz or not).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar import read_batch
from formats import DataError, read_idx, read_members
from torch import Tensor

MNIST = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Cifar:
    """How one of the two data sets is stored."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    labels: str
    classes: int

    def is_in(self, folder: Path) -> bool:
        return (folder / self.train[0]).is_file() and (folder / self.test).is_file()


CIFAR = (
    Cifar(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "labels",
        10,
    ),
    Cifar("cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "fine_labels", 100),
)
EXPECTED = (
    f"expected {', '.join(MNIST)} (.gz or not), or {' or '.join(c.folder for c in CIFAR)}, or "
    f"{' or '.join(c.archive for c in CIFAR)}, there or up to two folders below; without --data, "
    "scikit-learn's digits are taken"
)


@dataclass(frozen=True)
class Images:
    """Images as [count, channels, height, width], uint8 or float; labels as [count] int64.

    ``prepared`` makes float32 of a batch: (x - mean) / scale, by channel.
    """

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor | float = 0.0
    scale: Tensor | float = 1.0
    varied: bool = False  # a shifted, mirrored image still shows the same: true of photographs

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    def prepared(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.scale

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffle by torch's generator, and drop the last, short batch: sizes stay static."""
        order = torch.randperm(len(self.train_y))
        for chosen in order[: len(order) // size * size].split(size):
            x = self.prepared(self.train_x[chosen])
            yield (vary(x) if self.varied else x), self.train_y[chosen]


def vary(x: Tensor) -> Tensor:
    """Mirror half of the images, and shift each by up to 4 pixels; zeros come in."""
    count, _, height, width = x.shape
    mirrored = torch.where(torch.rand(count, 1, 1, 1) < 0.5, x.flip(3), x)
    padded = F.pad(mirrored, (4, 4, 4, 4))
    down, right = torch.randint(9, (2, count, 1))
    rows = (down + torch.arange(height))[:, :, None]  # [count, height, 1]
    columns = (right + torch.arange(width))[:, None, :]  # [count, 1, width]
    each = torch.arange(count)[:, None, None]
    return padded[each, :, rows, columns].permute(0, 3, 1, 2).contiguous()


def load(folder: str | None) -> Images:
    """Read what there is in ``folder``; without one, scikit-learn's digits.

    Raises:
        DataError: naming the path, what was expected and what was found.
    """
    if folder is None:
        return digits()
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"--data {folder}: not a folder; {EXPECTED}")
    found = _found(root)
    if not found:
        raise DataError(f"--data {folder}: none of the known files is there; {EXPECTED}")
    if len(found) > 1:
        places = " and ".join(str(place) for _, place in found)
        raise DataError(f"--data {folder}: several data sets, {places}; point to one of them")
    kind, place = found[0]
    return _read_mnist(place) if kind is None else _read_cifar(kind, place)


def _found(root: Path) -> list[tuple[Cifar | None, Path]]:
    """(kind, place) of every data set; None is MNIST. An archive counts if it isn't unpacked."""
    folders = [root, *sorted(p for depth in ("*", "*/*") for p in root.glob(depth) if p.is_dir())]
    found: list[tuple[Cifar | None, Path]] = [
        (None, folder) for folder in folders if any(_plain_or_zipped(folder, n) for n in MNIST)
    ]
    for cifar in CIFAR:
        unpacked = [f for f in folders if f.name == cifar.folder or cifar.is_in(f)]
        archives = [
            folder / name
            for folder in folders
            for name in (cifar.archive, cifar.archive.removesuffix(".gz"))
            if (folder / name).is_file()
        ]
        found += [(cifar, place) for place in unpacked or archives[:1]]
    return found


def _plain_or_zipped(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _read_mnist(folder: Path) -> Images:
    parts = []
    for name in MNIST:
        path = _plain_or_zipped(folder, name)
        if path is None:
            raise DataError(f"{folder / name}: missing (.gz or not), its siblings are there")
        parts.append(read_idx(path, rank=3 if "images" in name else 1))
    train_x, train_y, test_x, test_y = parts
    for x, y, name in ((train_x, train_y, MNIST[0]), (test_x, test_y, MNIST[2])):
        if len(x) != len(y):
            raise DataError(f"{folder / name}: {len(x)} images, but {len(y)} labels beside them")
        if x.shape[1:] != train_x.shape[1:]:
            raise DataError(
                f"{folder / name}: images of {list(x.shape[1:])}, the training images are "
                f"{list(train_x.shape[1:])}"
            )
        if y.max() > 9:
            raise DataError(f"{folder}: label {y.max()} beside {name}, expected 0 to 9")
    return _standardised(
        Images("MNIST", 10, train_x[:, None], train_y.long(), test_x[:, None], test_y.long())
    )


def _read_cifar(cifar: Cifar, place: Path) -> Images:
    """Read the batches of a folder or of an archive."""
    names = (*cifar.train, cifar.test)
    if place.is_dir():
        if missing := [name for name in names if not (place / name).is_file()]:
            raise DataError(f"{place / missing[0]}: missing")
        contents = {name: (place / name).read_bytes() for name in names}
    else:
        contents = read_members(place, names)
    parts = [
        read_batch(contents[name], str(place / name), cifar.labels, cifar.classes) for name in names
    ]
    x, y = zip(*parts[:-1], strict=True)
    name = f"CIFAR-{cifar.classes}"
    images = Images(name, cifar.classes, torch.cat(x), torch.cat(y), *parts[-1])
    return dataclasses.replace(_standardised(images), varied=True)


def _standardised(images: Images) -> Images:
    """Give the training images mean 0 and deviation 1, channel by channel; exact, from counts."""
    mean, scale = [], []
    values = torch.arange(256, dtype=torch.float64)
    for channel in images.train_x.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append((share * values).sum())
        scale.append((share * (values - mean[-1]) ** 2).sum().sqrt().clamp(min=1.0))
    mean, scale = (torch.stack(each).float().view(-1, 1, 1) for each in (mean, scale))
    return dataclasses.replace(images, mean=mean, scale=scale)


def digits() -> Images:
    """1797 images of 8 x 8 pixels of 0 to 16, 500 of them to test on: the quickstart's split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            f"the digits come with scikit-learn, which can't be imported ({error}): install it, "
            "or give --data a folder with MNIST or CIFAR"
        ) from error
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x, y, test_size=500, stratify=y, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, split)
    shaped = (part.float().view(-1, 1, 8, 8) for part in (train_x, test_x))
    train_x, test_x = shaped
    return Images("digits", 10, train_x, train_y, test_x, test_y, scale=16.0)
