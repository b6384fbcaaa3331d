"""A folder of pictures, one sub-folder a class: found, decoded alike, kept in memory or streamed from disk."""

import hashlib
import multiprocessing
import os
import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gaplab.data.resident import Resident, Source, count_flat, moments, pixel_sums, tell_flat
from gaplab.errors import UserError
from gaplab.files import plain
from gaplab.machine import usable_cores

# What cameras and programs write; not EPS or WMF, which are programs themselves, and not what hardly anyone has tried
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000")
SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO"))
MIN_SIDE, MAX_SIDE = 2, 30_000  # pixels; Pillow itself refuses more than 89 million of them
MAX_DEPTH = 100
PART = re.compile(  # of seg_train, Test-Images
    r"(?:.*[ _-])?"
    r"(?:(?P<train>train|training)|(?P<valid>val|valid|validation|dev)|(?P<test>test|testing|eval|evaluation))"
    r"(?:[ _-]?(?:set|split|data|images|pictures))?",
    re.IGNORECASE,
)
SYSTEM = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM |= {"thumbs.db", "desktop.ini"}
FEW_LEVELS = 16  # of 256, what 12-bit values stored in 16 bits would keep: too few to train on
SHOWN_KINDS = 6  # of files that are not read


@dataclass
class Folder:
    """What lies in a folder of pictures: files, their class and the part (train, valid, test) that they are in.

    `notes` are lines about files and folders that are not read.
    """

    files: list[Path]
    labels: list[int]
    parts: list[str]
    classes: list[str]
    notes: list[str]


def find_pictures(root: Path) -> Folder:
    """The pictures below `root/<class>/`, or `root/<part>/<class>/` if folders are named as parts, sorted by name.

    Folders that are links are looked into at the level of parts and classes only. Raises UserError for an empty folder,
    parts that are ambiguous, a class without a picture, a single class, a class that only `valid` or `test` has, a link
    that leads out of `root`, and a name that is not UTF-8.
    """
    real = Path(os.path.realpath(root))
    found = Folder([], [], [], [], [])
    parts = _parts(root, real, found.notes)
    classes = found.classes = [path.name for path in _folders(parts["train"], real)]
    if not classes:
        raise UserError(
            f"{plain(parts['train'])}: no class folders; expected one sub-folder of pictures for each class"
        )
    if len(classes) == 1:
        raise UserError(f"data.root={plain(root)}: a single class ({plain(classes[0])}); at least two are needed")
    unread: Counter[str] = Counter()
    for part, folder in parts.items():
        before = len(found.files)
        for class_folder in _folders(folder, real):
            if class_folder.name not in classes:
                raise UserError(f"{plain(class_folder)}: a class that {plain(parts['train'].name)}/ does not have")
            others: Counter[str] = Counter()
            files = list(_pictures(class_folder, real, others))
            if not files and part == "train":
                raise UserError(
                    f"{plain(class_folder)}: no picture in this class folder ({', '.join(sorted(SUFFIXES))})"
                    f"{'; it holds ' + list_kinds(others) if others else ''}"
                )
            unread += others
            found.files += files
            found.labels += [classes.index(class_folder.name)] * len(files)
            found.parts += [part] * len(files)
        unread["in no class folder"] += sum(is_picture(entry.name) and entry.is_file() for entry in _entries(folder))
        if len(found.files) == before:
            found.notes.append(f"{plain(folder)}: no class folder with pictures, so there is no {part} part")
    if +unread:
        found.notes.append(f"not read: {list_kinds(unread)}; convert pictures among them to PNG or JPEG")
    return found


def _parts(root: Path, real: Path, notes: list[str]) -> dict[str, Path]:
    """The folders of the parts by name; `root` alone as the train part where its sub-folders are the classes.

    A folder named as a part may be a class: that of trains, say. It is a part if it has sub-folders, or if every folder
    beside it is named as one too. Raises UserError where two folders, or none, could be the training part.
    """
    folders = _folders(root, real)
    named = {path: match.lastgroup or "" for path in folders if (match := PART.fullmatch(path.name))}
    if not named or (len(named) < len(folders) and not any(_folders(path, real) for path in named)):
        return {"train": root}
    parts: dict[str, Path] = {}
    for path, part in named.items():
        if part in parts:
            both = f"{plain(parts[part].name)}/ and {plain(path.name)}/"
            raise UserError(f"data.root={plain(root)}: {both} are both named as the {part} part; rename or move one")
        parts[part] = path
    others = [f"{plain(path.name)}/" for path in folders if path not in named and _holds_pictures(path)]
    first = f"{plain(next(iter(named)).name)}/"
    if "train" not in parts:
        raise UserError(
            f"data.root={plain(root)}: {first} is named as the {next(iter(parts))} part, and no folder as the training "
            "part; name that one train/, or rename a class"
        )
    if others and len(parts) == 1:
        raise UserError(
            f"data.root={plain(root)}: {first} is named as the training part, and {', '.join(others[:5])} beside it "
            "hold pictures too; rename a class, or move what is not part of the data"
        )
    if others:
        notes.append(f"not read: {', '.join(others[:5])} beside the folders of the parts")
    return parts


def _holds_pictures(folder: Path) -> bool:
    return any(is_picture(name) for _, _, names in os.walk(folder) for name in names)


def is_picture(name: str) -> bool:
    """By its suffix; a file that the system made is none."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not is_system(name)


def is_system(name: str) -> bool:
    """Whether a file or a folder is hidden, or made by an operating system or an archiver for itself."""
    return name.startswith(".") or name.casefold() in SYSTEM


def list_kinds(unread: Counter[str]) -> str:
    """The most frequent kinds of files in a line: `40 .heic, 2 .txt`."""
    kinds = [f"{count} {plain(kind)[:30]}" for kind, count in (+unread).most_common(SHOWN_KINDS)]
    rest = unread.total() - sum(count for _, count in unread.most_common(SHOWN_KINDS))
    return ", ".join(kinds) + (f" and {rest} more" if rest else "")


def kind_of(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _folders(path: Path, root: Path) -> list[Path]:
    """The folders in `path`, without those of the system, sorted by name."""
    found = [Path(entry) for entry in _entries(path) if os.path.isdir(entry)]
    for folder in found:
        _check_entry(folder, root, folder.is_symlink())
    return found


def _pictures(folder: Path, root: Path, unread: Counter[str], depth: int = 0) -> Iterator[Path]:
    """The pictures at any depth below `folder`, in the order of their paths' parts. No link to a folder is followed.

    What is not read is counted in `unread`.
    """
    if depth > MAX_DEPTH:
        raise UserError(f"{plain(folder)}: more than {MAX_DEPTH} folders deep")
    for entry in _entries(folder):
        link = entry.is_symlink()
        if link and os.path.isdir(entry):
            _check_entry(Path(entry), root, link)
            unread["links to folders"] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from _pictures(Path(entry), root, unread, depth + 1)
        elif not is_picture(entry.name):
            unread[kind_of(entry.name)] += 1
        else:
            if link or not entry.name.isascii():
                _check_entry(Path(entry), root, link)
            # a pipe, a socket or a device would keep us waiting
            if os.path.isfile(entry) if link else entry.is_file(follow_symlinks=False):
                yield Path(entry)
            else:
                unread["broken links, pipes or devices"] += 1


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in `folder`, without the files of the system, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_system(entry.name)), key=lambda entry: entry.name)
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


def decode(path: Path, size: int, channels: int) -> tuple[Tensor, int]:
    """A picture file of any mode as uint8 (channels, size, size): scaled by its shorter side, then cut to its middle.

    The camera's orientation is applied, transparency is laid on white. Of several frames, the first counts. Beside it
    the largest value, 0 to 255, of a picture whose file has 16 bits a channel; -1 for others. Raises whatever the
    decoder of a file raises that is no picture of `FORMATS`, is cut off, or is unreasonably small or large, and
    ValueError for values without a defined range.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as opened:
            if not MIN_SIDE <= min(opened.size) <= max(opened.size) <= MAX_SIDE:
                raise ValueError(f"{' x '.join(map(str, opened.size))} pixels; sides are {MIN_SIDE} to {MAX_SIDE}")
            stored = str(opened.tile[0].args) if opened.tile else ""  # names the layout, as RGB;16B; gone once loaded
            tags = dict(opened.tag_v2) if isinstance(opened, TiffImagePlugin.TiffImageFile) else {}
            picture, deep = _in_8_bits(ImageOps.exif_transpose(opened), stored, tags)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("L" if channels == 1 else "RGB")
            largest = int(np.asarray(picture).max()) if deep else -1
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous(), largest


def _in_8_bits(picture: Image.Image, stored: str, tags: dict[int, Any]) -> tuple[Image.Image, bool]:
    """A loaded picture with 8 bits a channel, and whether its file has 16: of those, the upper 8 remain.

    Pillow gives the numbers of a TIFF as they are stored, so the tags decide what they mean. Values of 0 to 255 in
    signed or 32-bit integers are taken as they are. Raises ValueError for others, and for floating point.
    """
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save it with 8 or 16 bits a channel")
    signed = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    if not picture.mode.startswith("I"):
        if signed and int(np.asarray(picture).max()) > 127:  # Pillow takes -1 for 255
            raise ValueError("negative pixels; save it with values of 0 to 255")
        return picture, ";16" in stored
    values = np.asarray(picture, dtype=np.int64)
    if bits <= 16 and not signed:
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
            values = 2**bits - 1 - values
        return Image.fromarray((values >> bits - 8).astype(np.uint8)), bits == 16
    if not signed:
        values &= 2**32 - 1
    if values.min() < 0 or values.max() > 255:
        raise ValueError(
            f"{bits}-bit integers from {values.min()} to {values.max()} have no defined range; save it with values of "
            "0 to 255, or as unsigned 16-bit of the whole range"
        )
    return Image.fromarray(values.astype(np.uint8)), False


def few_levels(largest: list[int]) -> tuple[int, str]:
    """How many of 256 levels remain to pictures of 16 bits a channel, and that in words if they are half or less.

    Args:
        largest: of each picture, as `decode` gives it.
    """
    deep = [value for value in largest if value >= 0]
    levels = max(deep, default=255) + 1
    if levels > 128:
        return levels, ""
    return levels, (
        f"{len(deep)} pictures with 16 bits have no value above {256 * levels - 1} of 65535, which leaves {levels} of "
        f"256 levels; multiply their values by {256 // levels}, or save them with 8 bits"
    )


class PictureFiles(Dataset[tuple[Tensor, int, str]]):
    """What `decode` gives by index, each with an empty string, or zeros with the reason why it could not be read."""

    def __init__(self, files: list[Path], size: int, channels: int) -> None:
        self.files = files
        self.size = size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        try:
            return *decode(self.files[index], self.size, self.channels), ""
        except Exception as error:  # of a file that is made to break decoders, it may be any; MemoryError, too
            reason = plain(str(error).partition("\n")[0] or type(error).__name__)
            return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8), -1, reason


class Streamed:
    """A `Source` on disk: pictures are decoded when they are needed, in the order asked for, by worker processes.

    Args:
        pictures: the files.
        labels: int64 (N,).
        sums: `pixel_sums` of each picture, int64 (N, 2, C), so that statistics need no second reading.
        digest: that of the same pictures and labels as `Resident`.
        workers: number of processes; 0 decodes in this one.
    """

    def __init__(self, pictures: PictureFiles, labels: Tensor, sums: Tensor, digest: str, workers: int) -> None:
        self.pictures = pictures
        self.labels = labels
        self.in_shape = (pictures.channels, pictures.size, pictures.size)
        self._sums = sums
        self._digest = digest
        self._workers = workers
        self._device = torch.device("cpu")

    def images(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        loader = _loader(self.pictures, [indices.tolist() for indices in batches], self._workers)
        for images, _, reasons in loader:
            if broken := next(filter(None, reasons), None):
                raise UserError(f"data.root: a picture became unreadable during the run ({broken})")
            yield images.to(self._device, non_blocking=True)

    def moments(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return moments(self._sums[indices], len(indices) * self.in_shape[1] * self.in_shape[2])

    def digest(self) -> str:
        return self._digest

    def to_(self, device: torch.device) -> None:
        self._device = device


def _loader(pictures: PictureFiles, batches: list[list[int]], workers: int) -> DataLoader[tuple[Tensor, int, str]]:
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
    """Every picture read once: a `Source` over them, the folder without broken ones, and lines about these and others.

    In memory when `memory_budget_gb` holds them all decoded, else streamed. Raises UserError that lists the unreadable
    files unless `skip_broken`, and for 16-bit pictures that would be black, or nearly.
    """
    files = PictureFiles(folder.files, size, channels)
    keep = fit_memory(folder, size, channels, memory_budget_gb)
    pixels = torch.empty(len(files) if keep else 0, channels, size, size, dtype=torch.uint8)
    sums = torch.empty(len(files), 2, channels, dtype=torch.int64)
    broken: dict[int, str] = {}
    largest: list[int] = []
    flat = 0
    whole = hashlib.sha256()  # as `Resident` has it
    order = torch.arange(len(files)).split(64)
    for indices, (images, values, reasons) in zip(
        order, _loader(files, [part.tolist() for part in order], workers), strict=True
    ):
        if keep:
            pixels[indices] = images
        sums[indices] = torch.stack([pixel_sums(image[None]) for image in images])
        broken |= {int(index): reason for index, reason in zip(indices, reasons, strict=True) if reason}
        largest += values.tolist()
        images = images[[not reason for reason in reasons]]
        flat += count_flat(images)
        if not keep:
            whole.update(images.numpy().data)
    names = [f"{plain(folder.files[index])} ({reason})" for index, reason in broken.items()]
    if broken and not skip_broken:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise UserError(
            f"unreadable pictures: {'; '.join(names[:10])}{more}; remove them, or set data.skip_broken=true"
        )
    good = [index for index in range(len(files)) if index not in broken]
    if broken:
        folder = replace(
            folder,
            files=[folder.files[i] for i in good],
            labels=[folder.labels[i] for i in good],
            parts=[folder.parts[i] for i in good],
        )
        for label, name in enumerate(folder.classes):
            if label not in (found for found, part in zip(folder.labels, folder.parts, strict=True) if part == "train"):
                raise UserError(f"class {plain(name)}: every picture of it is unreadable")
    levels, told = few_levels(largest)
    if levels <= FEW_LEVELS:
        raise UserError(f"data.root: {told}")
    notes = [f"left out: {name}" for name in names] + [note for note in (told, tell_flat(flat, len(good))) if note]
    labels = torch.tensor(folder.labels, dtype=torch.int64)
    if keep:
        return Resident(pixels[good] if broken else pixels, labels), folder, notes
    whole.update(labels.numpy().data)
    digest = whole.hexdigest()[:16]
    return Streamed(PictureFiles(folder.files, size, channels), labels, sums[good], digest, workers), folder, notes
