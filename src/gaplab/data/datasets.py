"""torchvision's data sets, and any other `torch.utils.data.Dataset`, as uint8 tensors."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.utils import calculate_md5

from gaplab.data.resident import Resident
from gaplab.errors import UserError
from gaplab.files import locked, plain
from gaplab.targets import accepted, load_class


def load_dataset(
    target: str, root: str, train_kwargs: dict[str, Any], test_kwargs: dict[str, Any], allowed_targets: list[str]
) -> tuple[Resident, Resident, list[str]]:
    """The official training part, the official test part and the class names of the data set that `target` names.

    Archives that are there are verified first; what is missing is downloaded and unpacked by torchvision. Raises
    UserError for a wrong checksum (naming the file and touching nothing), or data that cannot be had or are of another
    kind.
    """
    dataset_class = load_class(target, allowed_targets, Dataset, "data._target_")
    root = str(Path(root).expanduser())
    given = accepted(dataset_class, {"root": root, "download": True})
    for kwargs in (train_kwargs, test_kwargs):
        try:
            inspect.signature(dataset_class).bind(**given | kwargs)
        except TypeError as error:
            raise UserError(f"data.train_kwargs, data.test_kwargs: {error}") from None
    parts = []
    with locked(Path(root) / ".gaplab.lock"):
        verify_archives(dataset_class, Path(root))
        for kwargs in (train_kwargs, test_kwargs):
            try:
                parts.append(dataset_class(**given | kwargs))
            except Exception as error:  # of files that are made to break their reader, it may be any; MemoryError, too
                reason = plain(str(error).strip().replace("\n", " ") or type(error).__name__)
                raise UserError(
                    f"data.root={root}: {dataset_class.__name__} is neither there in a readable form nor to be "
                    f"downloaded ({reason[:300]}); a damaged unpacked file is made anew when you delete it"
                ) from None
    train, test = (to_tensors(part) for part in parts)
    classes = getattr(parts[0], "classes", None) or [str(label) for label in range(int(train.labels.max()) + 1)]
    for part in (train, test):
        if not 0 <= int(part.labels.min()) <= int(part.labels.max()) < len(classes):
            raise UserError(
                f"data.root={root}: {dataset_class.__name__} has labels from {int(part.labels.min())} to "
                f"{int(part.labels.max())}, and {len(classes)} classes"
            )
    return train, test, [plain(name).partition(" - ")[0] for name in classes]  # MNIST's are "0 - zero" …


def verify_archives(dataset_class: Any, root: Path) -> None:
    """Compare the archives that lie there with the MD5 sums that the class publishes. Raises UserError."""
    published: list[tuple[Path, str]] = []
    if isinstance(getattr(dataset_class, "resources", None), list):  # MNIST and its kin
        for path in (root / dataset_class.__name__ / "processed").glob("*.pt"):  # read before those that have a sum
            raise UserError(f"{plain(path)}: data without a checksum, unpacked before 2021; delete it, raw/ is enough")
        folder = root / dataset_class.__name__ / "raw"
        published += [(folder / name, md5) for name, md5 in dataset_class.resources]
    if hasattr(dataset_class, "tgz_md5"):  # CIFAR
        published.append((root / dataset_class.filename, dataset_class.tgz_md5))
    if hasattr(dataset_class, "split_list"):  # SVHN
        published += [(root / name, md5) for _, name, md5 in dataset_class.split_list.values()]
    for path, md5 in published:
        if path.is_file() and (found := calculate_md5(str(path))) != md5:
            raise UserError(f"{path}: damaged, its MD5 sum is {found} instead of {md5}; replace or delete it")


def files_of(target: str, root: Path, allowed_targets: list[str]) -> list[Path]:
    """The files that torchvision reads for one of its own data sets, as far as they are there; it has to be known how
    that one names them, else there are none. Raises UserError."""
    dataset_class: Any = load_class(target, allowed_targets, Dataset, "data._target_")
    if not dataset_class.__module__.startswith("torchvision."):  # a class made from one of these may read more
        return []
    files, folders = [], []
    if isinstance(getattr(dataset_class, "resources", None), list):  # as above
        folders = [root / dataset_class.__name__ / name for name in ("raw", "processed")]
    if hasattr(dataset_class, "tgz_md5"):
        files, folders = [root / dataset_class.filename], [root / dataset_class.base_folder]
    if hasattr(dataset_class, "split_list"):
        files = [root / name for _, name, _ in dataset_class.split_list.values()]
    try:
        return files + [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    except OSError:
        return []


def to_tensors(dataset: Any) -> Resident:
    """A map-style data set as `Resident`: from its `data` and `targets` (or `labels`), or picture by picture.

    Raises UserError for pictures of different sizes or values that are not uint8.
    """
    name = type(dataset).__name__
    try:
        pixels, labels = _arrays(dataset)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"data._target_: {name} holds no pictures with labels ({plain(error)[:200]})") from None
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or not pixels.numel():
        raise UserError(f"data._target_: {name} holds {pixels.dtype} {tuple(pixels.shape)}, not uint8 pictures")
    if len(labels) != len(pixels):
        raise UserError(f"data._target_: {name} holds {len(pixels)} pictures and {len(labels)} labels")
    return Resident(pixels, labels)


def _arrays(dataset: Any) -> tuple[Tensor, Tensor]:
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if hasattr(dataset, "data") and labels is not None:
        pixels = torch.as_tensor(np.asarray(dataset.data))
        if pixels.ndim == 3:  # (N, H, W)
            pixels = pixels.unsqueeze(1)
        elif pixels.ndim == 4 and pixels.shape[1] not in (1, 3):  # (N, H, W, C)
            pixels = pixels.permute(0, 3, 1, 2)
    else:
        samples = [(_picture(image), int(label)) for image, label in (dataset[i] for i in range(len(dataset)))]
        if len({image.shape for image, _ in samples}) != 1:
            raise UserError(f"data._target_: {type(dataset).__name__} holds pictures of different sizes, or none")
        pixels, labels = torch.stack([image for image, _ in samples]), [label for _, label in samples]
    return pixels, torch.as_tensor(np.asarray(labels, dtype=np.int64)).flatten()


def _picture(image: Any) -> Tensor:
    """A PIL picture (H, W) or (H, W, C), or a tensor (C, H, W), as uint8 (C, H, W)."""
    if isinstance(image, Tensor):
        return image
    pixels = torch.as_tensor(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
