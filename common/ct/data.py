"""Labelled images from the hub, from a local Hugging Face data set or from an image folder, for `data.TrainingData`.

`datasets` reads tables, `folders` lists image folders; images stay the bytes that they were stored as and go through
the same decoder, order and counts as samples of tar shards. Nothing is downloaded that runs: data sets that are
scripts are refused by `datasets`.
"""

import contextlib
import io
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

from common.data import folders
from common.data.cached_latents import read_manifest
from common.data.fetch import open_shard
from common.data.folders import IMAGE_KEYS
from common.data.images import decode_square
from common.data.shards import SampleError, expand_shards, is_remote, list_tars, tar_samples
from common.data.transfers import read_head
from common.errors import UserError

import torch

MAX_SHARDS, MAX_LABELS, HEAD_BYTES = 16, 20_000, 1 << 20  # that are looked at in advance
DATA_FILES = frozenset("parquet arrow csv tsv json jsonl ndjson tar zip gz tgz zst lance h5 hdf5 py".split())


class LabelledImages:
    """The rows of a data set: `keys`, `num_classes` (None without classes), and read(index) as TrainingData wants it.

    dataset: a datasets.Dataset. image_column: of feature Image. label_column: whole numbers, or None to leave classes
    out; its feature may say how many. classes: those that rows have. has_names: whether the data say what the classes
    are. `notes` and `unusable` are those of `folders.Samples`. UserError names `flag` where a column is missing or of
    another kind.
    """

    def __init__(self, dataset, name, flag, image_column="image", label_column=None):
        import datasets

        columns = ", ".join(dataset.column_names)
        if image_column not in dataset.column_names:
            raise UserError(f"{flag} has no column {image_column}: `dataset_image_column_name` is one of {columns}")
        if not isinstance(dataset.features[image_column], datasets.Image):
            raise UserError(f"{flag}: the column {image_column} does not hold images; its columns are {columns}")
        self._images = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self._column, self._labels, self.num_classes = image_column, None, None
        if label_column is not None:
            if label_column not in dataset.column_names:
                raise UserError(
                    f"{flag} has no column {label_column}: `dataset_class_label_column_name` is one of {columns}, and "
                    "an image folder has classes where its images lie in two or more subfolders"
                )
            feature = dataset.features[label_column]
            self._labels = dataset[label_column][:]
            self.classes = class_numbers(flag, label_column, self._labels)
            names = getattr(feature, "names", None)
            self.has_names, self.num_classes = bool(names), len(names) if names else max(self.classes) + 1
        self.name, self.flag, self.notes, self.unusable = name, flag, [], 0
        self.keys = [f"{index:08d}" for index in range(len(dataset))]

    def read(self, index):
        """{extension: bytes} of a row; an image that cannot be read becomes an empty one, which no decoder takes."""
        image = self._images[index][self._column] or {}
        data = image.get("bytes")
        if data is None and image.get("path"):
            try:
                data = Path(image["path"]).read_bytes()
            except OSError:
                data = None
        data = data or b""
        label = {} if self._labels is None else {"cls": str(self._labels[index]).encode()}
        return {IMAGE_KEYS[0]: data} | label


class LabelledFolder:
    """The images of a folder, a `folders.Listing`, as LabelledImages.

    label_column: None to leave classes out. Else they are whole numbers in a column of the folder's metadata, which is
    called so or `label`, or the subfolders as of `class_folders`. Samples are in the order of the
    metadata, else sorted by path. UserError names `flag`.
    """

    def __init__(self, listing, flag, label_column=None, num_classes=None):
        self.name, self.flag, self.num_classes, self.has_names = listing.folder, flag, None, False
        self.notes, self.unusable = list(listing.notes), 0
        try:
            rows, missing = folders.metadata_rows(listing, (), self.notes) if label_column else ([], 0)
            column = next((name for name in (label_column, "label") for _, _, row in rows if name in row), None)
            if column is not None:
                self._read_rows(listing, rows, missing, column)
            else:
                self._items = [(image, None) for image in folders.reference_images(listing)]
            if not self._items:
                raise UserError(f"it holds no images ({', '.join(IMAGE_KEYS)}){'; '.join(['', *self.notes])}")
            if label_column and column is None:
                names, classes = class_folders(listing, num_classes)
                self._items = list(zip(listing.files, classes, strict=True))
                self.num_classes, self.classes, self.has_names = len(names), set(classes), True
        except UserError as error:
            raise UserError(f"{flag}: {error}") from None
        self.keys = [image for image, _ in self._items]

    def _read_rows(self, listing, rows, missing, column):
        labels = []
        for _, place, row in rows:
            value = row.get(column)
            with contextlib.suppress(ValueError):  # a csv has texts
                value = int(value) if isinstance(value, str) else value
            if type(value) is not int:
                raise UserError(f"{place} has the {column} {str(row.get(column))[:40]!r}, which is no whole number")
            labels.append(value)
        self.classes = class_numbers(f"the metadata of {self.name}", column, labels)
        self.num_classes = max(self.classes) + 1
        self._items = [(image, label) for (image, _, _), label in zip(rows, labels, strict=True)]
        named = {image for image, _ in self._items}
        bare = [image for image in listing.files if image not in named]
        if bare:
            count = folders.count(len(bare), "image")
            self.notes.append(f"{listing.folder}: {count} without a row in the metadata, the first is {bare[0]!r}")
        self._items += [(image, None) for image in bare]
        self.unusable = missing + len(bare)

    def read(self, index):
        """{extension: bytes} of an image; one that cannot be read becomes an empty one."""
        image, label = self._items[index]
        raw = folders.read_sample(self.name, image, "")
        return {folders.image_key(image): raw[folders.image_key(image)]} | (
            {} if label is None else {"cls": str(label).encode()}
        )


def class_folders(listing: folders.Listing, num_classes: int | None = None) -> tuple[list[str], list[int]]:
    """(class names, the class of each of `files`): the classes are the subfolders, by name.

    Folders that hold nothing but one folder are passed through. Where subfolders have subfolders of several names, the
    number of classes says which of both are meant: `animals/cat`, or `cat/part1`. Raises UserError where it does not,
    where there are fewer than two classes, or images beside them.
    """
    parts = [file.split("/") for file in listing.files]
    depth = 1 if listing.split else 0
    while parts and min(map(len, parts)) > depth + 2 and len({part[depth] for part in parts}) == 1:
        depth += 1
    beside = [file for file, part in zip(listing.files, parts, strict=True) if len(part) <= depth + 1]
    names = sorted({part[depth] for part in parts if len(part) > depth + 1})
    if len(names) < 2:
        raise UserError(
            f"it has no classes: its images lie in {folders.count(len(names), 'subfolder')}; put those of each class "
            f"into a subfolder of their own, or add a metadata.csv with the columns file_name and label"
        )
    if beside:
        raise UserError(
            f"it has {folders.count(len(beside), 'image')} beside its {len(names)} subfolders of classes, the first "
            f"is {beside[0]!r}; move them into one"
        )
    classes = [part[depth] for part in parts]
    lowest = [part[-2] for part in parts]
    low_names = sorted(set(lowest))
    if len(low_names) > 1 and len(set(zip(classes, lowest, strict=True))) > len(names):
        readings = {len(names): classes, len(low_names): lowest} if len(names) != len(low_names) else {}
        if num_classes not in readings:
            way_out = f"pass `num_classes`={len(names)} or {len(low_names)}"
            raise UserError(
                f"its subfolders have subfolders, and the classes may be the {len(names)} upper ones ({_some(names)}) "
                f"or the {len(low_names)} lowest ({_some(low_names)}); "
                + (way_out if readings else "say it in a metadata.csv with the columns file_name and label")
            )
        classes = readings[num_classes]
        names = sorted(set(classes))
    numbers = {name: number for number, name in enumerate(names)}
    return names, [numbers[name] for name in classes]


def _some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def class_numbers(flag, column, labels):
    """The set of classes of a column; UserError unless it has whole numbers and at least one class."""
    if not labels or any(type(label) is not int for label in labels):
        raise UserError(f"{flag}: the column {column} must hold a whole number, the class, in each row")
    classes = {label for label in labels if label >= 0}
    if not classes:
        raise UserError(f"{flag}: no row has a class, the column {column} holds only negative numbers")
    return classes


def list_image_folder(folder):
    """The `folders.Listing` of a folder of image files; None for one of tables or archives, which `datasets` reads."""
    if not Path(folder).is_dir():
        return None
    card = Path(folder, "README.md")
    if card.is_file() and re.search(r"^configs:", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        return None  # its card says what to read
    listing = folders.list_images(folder)
    stems = {file.rpartition(".")[0] for file in listing.files}
    tables = (path for path in Path(folder).rglob("*") if path.suffix[1:].lower() in DATA_FILES)
    tables = (path for path in tables if path.name not in folders.METADATA)
    others = sum(path.relative_to(folder).as_posix().rpartition(".")[0] not in stems for path in tables)
    return listing if len(listing.files) > others else None


def load_labelled_images(
    dataset_name, train_data_dir, dataset_config_name, image_column, label_column, num_classes, cache_dir, revision
):
    """The training split of a data set of the hub or a folder (`dataset_name`), or an image folder (`train_data_dir`).

    A local folder is what `Dataset.save_to_disk` wrote, an image folder, or files that `datasets.load_dataset` reads
    (parquet, csv with image paths, ...). Raises UserError when nothing is found or it is not as described.
    """
    flag = f"`train_data_dir`={train_data_dir}" if dataset_name is None else f"`dataset_name`={dataset_name}"
    is_saved = dataset_name and any(Path(dataset_name, f).is_file() for f in ("state.json", "dataset_dict.json"))
    if dataset_name is None and not Path(train_data_dir).is_dir():
        raise UserError(f"{flag}: there is no such folder")
    if is_saved and dataset_config_name:
        raise UserError(f"`dataset_config_name`: {flag} was saved to disk without configurations; drop it")
    try:
        if dataset_name is None:
            listing = folders.list_images(train_data_dir)
        else:
            listing = None if is_saved or dataset_config_name else list_image_folder(dataset_name)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if listing is not None:
        return LabelledFolder(listing, flag, label_column, num_classes)

    import datasets

    datasets.disable_progress_bars()
    try:
        if is_saved:
            dataset = datasets.load_from_disk(dataset_name)
        else:
            dataset = datasets.load_dataset(
                path=dataset_name, name=dataset_config_name, revision=revision, cache_dir=cache_dir
            )
    except Exception as error:  # of the hub, of parquet, of Arrow, of the file system: each has its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{flag} cannot be loaded ({type(error).__name__}: {reason}); check the name") from None
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise UserError(f"{flag} has no split named train, only {', '.join(dataset)}")
        dataset = dataset["train"]
    if len(dataset) == 0:
        raise UserError(f"{flag} holds no images")
    return LabelledImages(dataset, str(dataset_name), flag, image_column, label_column)


def check_shard_classes(shards, num_classes, label_name):
    """A warning, or "", on the classes of some shards. Only the heads of remote ones are read, and no images.

    UserError where the classes seem to count from 1, see `check_classes`.
    """
    seen, most = Counter(), min(len(shards), MAX_SHARDS)
    for shard in {shards[i * (len(shards) - 1) // max(1, most - 1)] for i in range(most)}:
        if is_remote(shard) and shard not in (shards[0], shards[-1]):
            continue
        with contextlib.suppress(SampleError):  # damage is reported where the stream comes to it
            with io.BytesIO(read_head(shard, HEAD_BYTES)) if is_remote(shard) else open_shard(shard, 0) as file:
                for _, _, raw in itertools.islice(tar_samples(file, [("cls", "json")]), MAX_LABELS // most):
                    with contextlib.suppress(SampleError):
                        decode_label(raw, label_name, num_classes, seen)
    check_classes(seen, num_classes, least=1)
    if num_classes > 2 and not seen[0] and set(range(1, num_classes)) <= seen.keys():
        return (
            f"no sample of class 0 among the {seen.total()} that were looked at, and some of each other class: "
            "classes count from 0; if these count from 1, subtract one from each and pass "
            f"`num_classes`={num_classes - 1}"
        )
    return ""


def open_images(
    shards,
    dataset_name=None,
    train_data_dir=None,
    dataset_config_name=None,
    image_column="image",
    label_column=None,
    num_classes=None,
    cache_dir=None,
    revision=None,
):
    """What TrainingData is to read: its list of shards, and the source beside it, None for shards.

    One of `shards` (`train_shards_path_or_url`), `dataset_name` and `train_data_dir` is given. label_column: None
    where classes are not wanted. num_classes: as far as the user said.
    UserError as from `expand_shards` and `load_labelled_images`.
    """
    if not shards:
        source = load_labelled_images(
            dataset_name=dataset_name,
            train_data_dir=train_data_dir,
            dataset_config_name=dataset_config_name,
            image_column=image_column,
            label_column=label_column,
            num_classes=num_classes,
            cache_dir=cache_dir,
            revision=revision,
        )
        return [source.name], source
    folder = Path(str(shards))
    if folder.is_dir() and not list_tars(str(folder)):
        raise UserError(
            f"`train_shards_path_or_url`={shards} is a folder without *.tar shards; pass images as `train_data_dir`"
        )
    found = expand_shards(shards)
    if read_manifest(found) is not None:
        raise UserError(
            f"`train_shards_path_or_url`={shards} holds cached latents, and this script trains on images; name the "
            "shards that encode_shards read"
        )
    return found, None


def decode_image_label(
    raw: dict[str, bytes],
    rng: random.Random,
    *,
    resolution: int,
    num_classes: int | None = None,
    label_name: str = "label",
    interpolation_type: str = "bilinear",
    center_crop: bool = False,
    random_flip: bool = False,
    min_image_size: int = 0,
    seen: Counter | None = None,
) -> dict:
    """Decode one image as `decode_image_text` does, and with `num_classes` its class instead of a caption.

    The class is a whole number in the member `cls`, or under `label_name` in the member `json`. Returns `images` uint8
    (3, R, R) and, with `num_classes`, `class_labels` int64 (), from 0 to num_classes - 1. Draws from `rng` in a fixed
    order: flip, top, left. Raises SampleError: "decode" (also for a class that is missing or out of range),
    "too_small", "too_big"; UserError as `check_classes` does, where `seen` counts the classes of this process.
    """
    flip, top, left = random_flip and rng.random() < 0.5, rng.random(), rng.random()
    label = {}
    if num_classes is not None:
        label["class_labels"] = torch.tensor(decode_label(raw, label_name, num_classes, seen))
    image, _, _ = decode_square(raw, resolution, interpolation_type, center_crop, flip, top, left, min_image_size)
    return {"images": image} | label


def decode_label(raw: dict[str, bytes], label_name: str, num_classes: int, seen: Counter | None = None) -> int:
    """The class of a raw sample, as in `decode_image_label`. Raises SampleError "decode".

    seen: counts it, and is checked: UserError.
    """
    try:
        label = int(raw["cls"].decode("utf-8-sig")) if "cls" in raw else json.loads(raw["json"])[label_name]
    except (ValueError, KeyError, TypeError) as error:
        raise SampleError("decode", f"no class, neither in cls nor as {label_name} in json: {error}") from error
    if seen is not None and type(label) is int:
        seen[label] += 1
        if label == num_classes:
            check_classes(seen, num_classes, least=5)
    if type(label) is not int or not 0 <= label < num_classes:
        raise SampleError("decode", f"the class is {label!r}, not a whole number below `num_classes`={num_classes}")
    return label


def check_classes(seen: Counter, num_classes: int, least: int) -> None:
    """UserError where `seen`, {class: samples}, shows that the class `num_classes`, one too many, is no stray: it has
    `least` samples, or 5 where there are some of class 0, and at least a tenth of what a class has on average."""
    beyond = seen[num_classes]
    if beyond >= (5 if seen[0] else least) and 10 * beyond * len(seen) >= seen.total():
        raise UserError(
            f"`num_classes`={num_classes}: samples have the class {num_classes}, and classes count from 0 to "
            f"{num_classes - 1}; if these run from 1 to {num_classes}, subtract one from each, else pass "
            f"`num_classes`={num_classes + 1} or more"
        )
