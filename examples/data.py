"""The data of the examples, as tensors: images scaled to [0, 1], one flattened image a row, and labels."""

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset

DEBIAN_PACKAGE = "dataset-fashion-mnist"

# sha256 of the uncompressed files, which are the same in whatever way they were packed.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,200 to train on, 597 to test on, always the same."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=597, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return TensorDataset(train_images.float(), train_labels), TensorDataset(test_images.float(), test_labels)


def fashion_mnist(folder: Path | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Fashion-MNIST: 60,000 images of 28 x 28 pixels to train on, 10,000 to test on.

    The four IDX files, gzipped or not, come from ``folder``; without one, from a Debian package that is fetched once
    into the user's cache.
    """
    folder = debian_fashion_mnist() if folder is None else folder
    train_images, train_labels, test_images, test_labels = (read_idx(folder, name) for name in FASHION_MNIST)
    return (
        TensorDataset(train_images.flatten(1) / 255, train_labels.long()),
        TensorDataset(test_images.flatten(1) / 255, test_labels.long()),
    )


def read_idx(
    folder: Path, name: str, digests: dict[str, str] = FASHION_MNIST, data: str = "Fashion-MNIST"
) -> torch.Tensor:
    """Read one IDX file and check that it is the file it should be."""
    found = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
    if found is None:
        raise SystemExit(f"There is neither {name} nor {name}.gz in {folder}.")
    content = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    if hashlib.sha256(content).hexdigest() != digests[name]:
        raise SystemExit(f"{found} is damaged, or is not {data}: its digest is wrong. Delete it and try again.")
    dimensions = content[3]  # IDX: two zeros, the type (8: unsigned bytes), the number of dimensions, their sizes
    sizes = np.frombuffer(content, ">i4", count=dimensions, offset=4).tolist()
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes).copy())


def debian_fashion_mnist() -> Path:
    """Return the folder of the Debian package's files, fetching them (31 MB) if they are not on this machine yet."""
    inside = Path("usr/share/datasets/fashion-mnist")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_graddiv" / DEBIAN_PACKAGE
    for root in (Path("/"), cache):
        if all((root / inside / f"{name}.gz").exists() for name in FASHION_MNIST):
            return root / inside
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SystemExit(
            "Without apt-get this example cannot fetch Fashion-MNIST. Pass --data-dir with the folder of its four IDX "
            f"files ({', '.join(FASHION_MNIST)}; .gz or not), for example torchvision's data/FashionMNIST/raw."
        )
    print(f"fetching {DEBIAN_PACKAGE} (31 MB) into {cache}")
    with tempfile.TemporaryDirectory() as download:
        fetched = subprocess.run(
            ["apt-get", "download", DEBIAN_PACKAGE], cwd=download, capture_output=True, text=True, check=False
        )
        packages = list(Path(download).glob("*.deb"))
        if fetched.returncode or not packages:
            raise SystemExit(
                f"apt-get could not download {DEBIAN_PACKAGE}. Run `apt-get update` first, or pass --data-dir with the "
                f"folder of Fashion-MNIST's IDX files. It said:\n{fetched.stderr.strip()}"
            )
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(cache)], check=True)
    return cache / inside
