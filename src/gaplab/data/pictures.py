"""A folder of pictures, one sub-folder a class: found, decoded alike, kept in memory or streamed from disk."""

import hashlib
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gaplab.data.resident import Resident, Source, moments, pixel_sums
from gaplab.errors import UserError
from gaplab.files import plain
from gaplab.machine import usable_cores

# What cameras and programs write; not EPS or WMF, which are programs themselves, and not what hardly anyone has tried
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000")
SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO"))
MIN_SIDE, MAX_SIDE = 2, 30_000  # pixels; Pillow itself refuses more than 89 million of them
MAX_DEPTH = 100
ALIASES = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}


@dataclass
class Folder:
    """What lies in a folder of pictures: files, their class and the part (train, valid, test) that they are in."""

    files: list[Path]
    labels: list[int]
    parts: list[str]
    classes: list[str]


def find_pictures(root: Path) -> Folder:
    """The pictures below `root/<class>/`, or below `root/<part>/<class>/` when there is a `root/train`, sorted by name.

    Folders that are links are looked into at the level of parts and classes only. Raises UserError for an empty folder,
    a class without a picture, a single class, a class that only `valid` or `test` has, a link that leads out of `root`,
    and a name that is not UTF-8.
    """
    real = Path(os.path.realpath(root))
    parts = {"train": root}
    if (root / "train").is_dir():
        parts = {ALIASES[path.name]: path for path in _folders(root, real) if path.name in ALIASES}
    classes = [path.name for path in _folders(parts["train"], real)]
    found = Folder([], [], [], classes)
    if not classes:
        raise UserError(f"data.root={plain(root)}: empty; expected one sub-folder of pictures for each class")
    if len(classes) == 1:
        raise UserError(f"data.root={plain(root)}: a single class ({plain(classes[0])}); at least two are needed")
    for part, folder in parts.items():
        for class_folder in _folders(folder, real):
            if class_folder.name not in classes:
                raise UserError(f"{plain(class_folder)}: a class that train/ does not have")
            files = list(_pictures(class_folder, real))
            if not files and part == "train":
                raise UserError(
                    f"{plain(class_folder)}: no picture in this class folder ({', '.join(sorted(SUFFIXES))})"
                )
            found.files += files
            found.labels += [classes.index(class_folder.name)] * len(files)
            found.parts += [part] * len(files)
    return found


def _folders(path: Path, root: Path) -> list[Path]:
    """The folders in `path`, hidden ones left out, sorted by name."""
    found = [Path(entry) for entry in _entries(path) if not entry.name.startswith(".") and os.path.isdir(entry)]
    for folder in found:
        _check_entry(folder, root, folder.is_symlink())
    return found


def _pictures(folder: Path, root: Path, depth: int = 0) -> Iterator[Path]:
    """The pictures at any depth below `folder`, in the order of their paths' parts. No link to a folder is followed."""
    if depth > MAX_DEPTH:
        raise UserError(f"{plain(folder)}: more than {MAX_DEPTH} folders deep")
    for entry in _entries(folder):
        link = entry.is_symlink()
        if link and os.path.isdir(entry):
            _check_entry(Path(entry), root, link)
        elif entry.is_dir(follow_symlinks=False):
            yield from _pictures(Path(entry), root, depth + 1)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            if link or not entry.name.isascii():
                _check_entry(Path(entry), root, link)
            # a pipe, a socket or a device would keep us waiting
            if os.path.isfile(entry) if link else entry.is_file(follow_symlinks=False):
                yield Path(entry)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{plain(folder)}: cannot be read ({error.strerror})") from None


def _check_entry(path: Path, root: Path, link: bool) -> None:
    """Raises UserError for a name that is not UTF-8, which no report could show, or a link that leads out of `root`."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{plain(path)}: its name is not UTF-8; rename it") from None
    if link and not (target := Path(os.path.realpath(path))).is_relative_to(root):
        raise UserError(
            f"{plain(path)}: a link out of data.root, to {plain(target)}; copy that here, or make data.root the folder "
            "that holds both"
        )


def decode(path: Path, size: int, channels: int) -> Tensor:
    """A picture file of any mode as uint8 (channels, size, size): scaled by its shorter side, then cut to its middle.

    The camera's orientation is applied, 16-bit grey keeps its upper 8 bits, transparency is laid on white. Of several
    frames, the first counts. Raises whatever the decoder of a file raises that is no picture of `FORMATS`, is cut off,
    or is unreasonably small or large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as opened:
            if not MIN_SIDE <= min(opened.size) <= max(opened.size) <= MAX_SIDE:
                raise ValueError(f"{' x '.join(map(str, opened.size))} pixels; sides are {MIN_SIDE} to {MAX_SIDE}")
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits in one channel, which convert() would clip
                picture = Image.fromarray((np.asarray(picture, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
            elif picture.mode == "F":
                raise ValueError("floating-point pixels have no defined range")
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("L" if channels == 1 else "RGB")
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()


class PictureFiles(Dataset[tuple[Tensor, str]]):
    """Decoded pictures by index, each with an empty string, or zeros with the reason why it could not be read."""

    def __init__(self, files: list[Path], size: int, channels: int) -> None:
        self.files = files
        self.size = size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return decode(self.files[index], self.size, self.channels), ""
        except Exception as error:  # of a file that is made to break decoders, it may be any; MemoryError, too
            reason = plain(str(error).partition("\n")[0] or type(error).__name__)
            return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8), reason


class Streamed:
    """A `Source` on disk: pictures are decoded when they are needed, in the order asked for, by worker processes.

    Args:
        pictures: the files.
        labels: int64 (N,).
        sums: `pixel_sums` of each picture, int64 (N, 2, C), so that statistics need no second reading.
        workers: number of processes; 0 decodes in this one.
    """

    def __init__(self, pictures: PictureFiles, labels: Tensor, sums: Tensor, workers: int) -> None:
        self.pictures = pictures
        self.labels = labels
        self.in_shape = (pictures.channels, pictures.size, pictures.size)
        self._sums = sums
        self._workers = workers
        self._device = torch.device("cpu")

    def images(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        loader = _loader(self.pictures, [indices.tolist() for indices in batches], self._workers)
        for images, reasons in loader:
            if broken := next(filter(None, reasons), None):
                raise UserError(f"data.root: a picture became unreadable during the run ({broken})")
            yield images.to(self._device, non_blocking=True)

    def moments(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return moments(self._sums[indices], len(indices) * self.in_shape[1] * self.in_shape[2])

    def digest(self) -> str:
        whole = hashlib.sha256(self._sums.contiguous().numpy().data)
        whole.update(self.labels.numpy().data)
        whole.update("\0".join(path.name for path in self.pictures.files).encode())
        return whole.hexdigest()[:16]

    def to_(self, device: torch.device) -> None:
        self._device = device


def _loader(pictures: PictureFiles, batches: list[list[int]], workers: int) -> DataLoader[tuple[Tensor, str]]:
    generator = torch.Generator().manual_seed(0)  # the loader would otherwise draw from the run's own stream
    workers = min(workers, len(batches), usable_cores())  # more would wait for each other
    # joblib's worker processes replace the start method by one of their own, which only starts processes of joblib's
    start_method = multiprocessing.get_all_start_methods()[0] if workers else None
    return DataLoader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        generator=generator,
        worker_init_fn=_ignore_signals,
        multiprocessing_context=start_method,
    )


def _ignore_signals(_worker: int) -> None:
    """They are for the training process, which reads on until it has saved, and then ends its workers."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def fit_memory(folder: Folder, size: int, channels: int, memory_budget_gb: float) -> bool:
    """Whether `memory_budget_gb` holds all pictures of the folder decoded."""
    return len(folder.files) * channels * size * size <= memory_budget_gb * 1e9


def load_pictures(
    folder: Folder, size: int, channels: int, skip_broken: bool, memory_budget_gb: float, workers: int
) -> tuple[Source, Folder, list[str]]:
    """Every picture read once: a `Source` over them, the folder without broken ones, and the names of those.

    In memory when `memory_budget_gb` holds them all decoded, else streamed. Raises UserError that lists the unreadable
    files unless `skip_broken`.
    """
    files = PictureFiles(folder.files, size, channels)
    keep = fit_memory(folder, size, channels, memory_budget_gb)
    pixels = torch.empty(len(files) if keep else 0, channels, size, size, dtype=torch.uint8)
    sums = torch.empty(len(files), 2, channels, dtype=torch.int64)
    broken: dict[int, str] = {}
    order = torch.arange(len(files)).split(64)
    for indices, (images, reasons) in zip(
        order, _loader(files, [part.tolist() for part in order], workers), strict=True
    ):
        if keep:
            pixels[indices] = images
        sums[indices] = torch.stack([pixel_sums(image[None]) for image in images])
        broken |= {int(index): reason for index, reason in zip(indices, reasons, strict=True) if reason}
    names = [f"{plain(folder.files[index])} ({reason})" for index, reason in broken.items()]
    if broken and not skip_broken:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise UserError(
            f"unreadable pictures: {'; '.join(names[:10])}{more}; remove them, or set data.skip_broken=true"
        )
    good = [index for index in range(len(files)) if index not in broken]
    if broken:
        folder = Folder(
            [folder.files[i] for i in good],
            [folder.labels[i] for i in good],
            [folder.parts[i] for i in good],
            folder.classes,
        )
        for label, name in enumerate(folder.classes):
            if label not in (found for found, part in zip(folder.labels, folder.parts, strict=True) if part == "train"):
                raise UserError(f"class {plain(name)}: every picture of it is unreadable")
    labels = torch.tensor(folder.labels, dtype=torch.int64)
    if keep:
        return Resident(pixels[good] if broken else pixels, labels), folder, names
    return Streamed(PictureFiles(folder.files, size, channels), labels, sums[good], workers), folder, names
