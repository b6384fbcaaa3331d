"""torchvision's data sets, and any other `torch.utils.data.Dataset`, as uint8 tensors."""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.utils import calculate_md5

from gaplab.data.resident import Resident, count_flat, tell_flat
from gaplab.errors import UserError
from gaplab.files import locked, plain
from gaplab.targets import accepted, load_class

LOOKED_AT = 100  # samples


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
    name = dataset_class.__name__
    if train.in_shape != test.in_shape:
        raise UserError(
            f"data._target_: {name} has training pictures of {train.in_shape}, test ones of {test.in_shape}"
        )
    classes, of_test = (list(getattr(part, "classes", None) or []) for part in parts)
    if classes != of_test:  # each part numbers its own, as torchvision's ImageFolder does
        raise UserError(
            f"data._target_: {name} names other classes in its training part, {plain(classes)[:200]}, than in its test "
            f"part, {plain(of_test)[:200]}, so their labels differ in meaning"
        )
    classes = classes or [str(label) for label in range(int(train.labels.max()) + 1)]
    for part in (train, test):
        if not 0 <= int(part.labels.min()) <= int(part.labels.max()) < len(classes):
            raise UserError(
                f"data.root={root}: {name} has labels from {int(part.labels.min())} to {int(part.labels.max())}, and "
                f"{len(classes)} classes"
            )
    return train, test, [plain(one).partition(" - ")[0] for one in classes]  # MNIST's are "0 - zero" …


def notes_on(train: Resident, test: Resident, classes: list[str], name: str) -> Iterator[str]:
    """A line each on what is odd about a data set that can be trained on all the same."""
    counts = train.labels.bincount(minlength=len(classes))
    if missing := [one for one, count in zip(classes, counts, strict=True) if not count]:
        few = f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        yield f"{name}: {len(missing)} of its {len(classes)} `classes` have no training picture: {few}"
    flat = count_flat(train.pixels) + count_flat(test.pixels)
    if told := tell_flat(flat, len(train.labels) + len(test.labels)):
        yield f"{name}: {told}"


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
    """A map-style data set as `Resident`, as its `__getitem__` gives the samples.

    Raises UserError for one that gives another sample when it is asked again, for pictures of different sizes, values
    that are not uint8 and labels that are not whole numbers.
    """
    name = type(dataset).__name__
    try:
        pixels, labels = _stored(dataset) or _read(dataset)
    except UserError as error:
        raise UserError(f"data._target_: {name} {error}") from None
    except Exception as error:  # as above
        raise UserError(f"data._target_: {name} holds no pictures with labels ({plain(error)[:200]})") from None
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or not pixels.numel():
        raise UserError(
            f"data._target_: {name} holds {pixels.dtype} {tuple(pixels.shape)}, not uint8 pictures; return PIL "
            "pictures or uint8 values of 0 to 255, without ToTensor"
        )
    return Resident(pixels, labels)


def _stored(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """The arrays in which one of torchvision's own data sets holds all samples; None where there are none.

    That is faster than to ask for them one by one, and allowed where no user's code comes in between.
    """
    kind = type(dataset)
    own = all(getattr(kind, name).__module__.startswith("torchvision.") for name in ("__getitem__", "__len__"))
    changed = any(getattr(dataset, name, None) for name in ("transform", "target_transform", "transforms"))
    stored = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if not own or changed or not hasattr(dataset, "data") or stored is None:
        return None
    pixels, labels = torch.as_tensor(np.asarray(dataset.data)), torch.as_tensor(np.asarray(stored))
    if len(pixels) != len(labels):
        raise UserError(f"holds {len(pixels)} pictures and {len(labels)} labels")
    if len(dataset) != len(pixels) or labels.numel() != len(labels):
        return None
    labels = labels.flatten().long()
    if pixels.ndim == 3:  # (N, H, W)
        pixels = pixels.unsqueeze(1)
    elif pixels.ndim == 4 and pixels.shape[1] not in (1, 3):  # (N, H, W, C)
        pixels = pixels.permute(0, 3, 1, 2)
    samples = ((pixels[index], int(labels[index])) for index in _some(dataset))
    return (pixels, labels) if all(map(_same, samples, _samples(dataset, _some(dataset)))) else None


def _read(dataset: Any) -> tuple[Tensor, Tensor]:
    samples = list(_samples(dataset, range(len(dataset))))
    if len({image.shape for image, _ in samples}) != 1:
        raise UserError("holds pictures of different sizes, or none")
    for index, again in zip(_some(dataset), _samples(dataset, _some(dataset)), strict=True):
        if not _same(samples[index], again):
            raise UserError(
                f"gives another sample {index} when it is read again, and each is read once for all epochs: take what "
                "is random out of its __getitem__ and set data.augment, which changes training pictures alone"
            )
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def _some(dataset: Any) -> list[int]:
    """Samples to read twice: of 100, a change in every tenth reading is missed once in 10^9 times."""
    count = len(dataset)
    return sorted({index * count // LOOKED_AT for index in range(LOOKED_AT)})


def _same(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    return torch.equal(one[0], other[0]) and one[1] == other[1]


def _samples(dataset: Any, indices: Iterable[int]) -> Iterator[tuple[Tensor, int]]:
    for index in indices:
        image, label = dataset[index]
        value = np.asarray(label)
        if value.size != 1 or value.dtype.kind not in "iub":
            raise UserError(f"gives sample {index} the label {plain(repr(label))[:60]}, not a whole number from 0 on")
        yield _picture(image), int(value.item())


def _picture(image: Any) -> Tensor:
    """A PIL picture or an array, (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W), as (C, H, W)."""
    if isinstance(image, Image.Image) and image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise UserError(f"gives PIL pictures of mode {image.mode}, whose numbers are no grey or colour; convert them")
    pixels = image.clone() if isinstance(image, Tensor) else torch.as_tensor(np.array(image))
    if pixels.ndim == 2:
        return pixels.unsqueeze(0)
    pixels = pixels if isinstance(image, Tensor) else pixels.permute(2, 0, 1)
    if pixels.shape[0] > 4 >= min(pixels.shape[1:]):
        raise UserError("gives pictures with the channels in the wrong place: tensors are (C, H, W), arrays (H, W, C)")
    return pixels
