"""Folders of images: which files count, and the samples that captions and metadata make of them.

Linked folders are followed, each real one once. Hidden files and folders are left out, and so is what systems add. Of
a folder in splits (train, test, ...) the training split is read. What is left out or cannot be used is in `notes`.
Left out: opening images, which `images` does, and metadata as parquet.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.data.tables import read_table
from common.errors import UserError

IMAGE_KEYS = ("jpg", "png", "jpeg", "webp", "jfif", "jpe", "bmp", "gif", "tif", "tiff", "avif")  # the first one counts
TEXT_KEYS = ("text", "txt", "caption")
CAPTION_FILES = (".txt", ".TXT", ".text", ".caption")  # beside an image; the first one counts
OTHER_IMAGES = frozenset(  # by name images, and never read
    "ai apng arw cr2 cr3 dds dib dng eps exr hdr heic heif icns ico j2c j2k jp2 jpc jpf jpx jxl mpo nef orf pbm pcx "
    "pfm pgm pnm ppm psd qoi raf raw rw2 sgi svg tga xbm xpm".split()
)
SYSTEM_NAMES = frozenset(
    ("__MACOSX", "@eaDir", "@tmp", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found")
)
METADATA = ("metadata.csv", "metadata.jsonl")
TRAIN_WORDS = frozenset(("train", "training"))
SPLIT_WORDS = TRAIN_WORDS | {"test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev"}


def is_hidden(name: str) -> bool:
    """Whether any part of a path is hidden, or a folder that a system adds."""
    return any(part in SYSTEM_NAMES or part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def count(number: int, what: str) -> str:
    """`1 image`, `2 images`, `2 processes`"""
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('s') else 's'}"


class Listing(NamedTuple):
    """The files of a folder by their paths below it, sorted."""

    folder: str
    files: list[str]  # images
    captions: set[str]  # of CAPTION_FILES, without extension
    tables: list[str]  # of METADATA: the folder's own, or those of its subfolders
    split: list[str]  # the top folders that are the training split; empty where there are no splits
    places: dict[str, str]  # every real folder: its path below this one
    notes: list[str]


def walk(folder: str, places: dict | None = None) -> Iterator[tuple[str, str]]:
    """(path below the folder, name) of every file in it and below it, in no order. What is hidden is left out.

    Links are followed; what is reached by several paths is read once, by the first of them. places: takes {real
    folder: its path below this one}. Raises UserError where a folder cannot be listed.
    """
    places, left = {} if places is None else places, [("", os.path.realpath(folder))]
    while left:
        below, real = left.pop()
        if real in places:
            continue
        places[real] = below.rstrip("/")
        for entry in sorted(_entries(os.path.join(folder, below)), key=lambda entry: entry.name + "/", reverse=True):
            if is_hidden(entry.name):
                continue
            if not _is_folder(entry):
                yield below + entry.name, entry.name
                continue
            place = os.path.join(real, entry.name)
            left.append((f"{below}{entry.name}/", os.path.realpath(place) if entry.is_symlink() else place))


def is_image(path: str) -> bool:
    """Whether a file is an image by its name."""
    return os.path.splitext(path)[1][1:].lower() in IMAGE_KEYS


def list_images(folder: str) -> Listing:
    """List a folder and all folders below it. Raises UserError as `walk` does."""
    folder, files, captions, found_tables, others, places = str(folder), [], set(), {}, Counter(), {}
    for path, name in walk(folder, places):
        stem, extension = os.path.splitext(path)
        if is_image(path):
            files.append(path)
        elif extension in CAPTION_FILES:
            captions.add(stem)
        elif extension[1:].lower() in OTHER_IMAGES:
            others[extension[1:].lower()] += 1
        elif name in METADATA:
            below = path[: -len(name)]
            found_tables[below] = min(name, found_tables.get(below, name), key=METADATA.index)
    files.sort()
    notes = []
    if others:
        listed = ", ".join(f"{number} .{key}" for key, number in sorted(others.items()))
        read = ", ".join(IMAGE_KEYS)
        notes.append(f"{folder}: {count(others.total(), 'file')} left out ({listed}), for only {read} are read")
    split = [] if "" in found_tables else _training_split(folder, files, notes)
    if split:
        files = [file for file in files if file.split("/", 1)[0] in split]
        found_tables = {below: name for below, name in found_tables.items() if below.split("/", 1)[0] in split}
    roots = [""] if "" in found_tables else sorted(found_tables)
    return Listing(folder, files, captions, [root + found_tables[root] for root in roots], split, places, notes)


def _entries(folder):
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder!r} cannot be listed ({error.strerror}); make it readable, or move it away") from None


def _is_folder(entry):
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _training_split(folder, files, notes):
    """The top folders of the training split, where all images lie in top folders that are called as splits are."""
    tops = Counter(file.split("/", 1)[0] if "/" in file else "" for file in files)
    split = [top for top in tops if top.lower() in TRAIN_WORDS]
    others = [top for top in tops if top.lower() not in TRAIN_WORDS]
    if not split or not all(top.lower() in SPLIT_WORDS for top in tops):
        return []
    if others:
        number, left_out = sum(tops[top] for top in split), sum(tops[top] for top in others)
        notes.append(
            f"{folder} is laid out in splits: {count(number, 'image')} of {' and '.join(sorted(split))} are read, "
            f"{left_out} of {' and '.join(sorted(others))} are left out; name one of these folders to read that alone"
        )
    return split


def metadata_rows(listing: Listing, columns=(), notes=None) -> tuple[list[tuple[str, str, dict]], int]:
    """([(image, place, row)], how many name no file) of the folder's metadata.

    image: as in `files`, or an absolute path outside the folder; a row whose file is not there keeps the name that it
    gives. place: in words. columns: those that a row must have, besides file_name. notes: takes what is to be said.
    Raises UserError.
    """
    files, rows, missing, resolved = set(listing.files), [], 0, {}
    for table in listing.tables:
        path, lost = os.path.join(listing.folder, table), []
        found = read_table(path, columns=("file_name", *columns))
        for place, row in found:
            name = row["file_name"]
            if not isinstance(name, str):
                raise UserError(f"{path}: the file_name of {place} is no text but {str(name)[:40]!r}")
            image, is_there = _find(listing, files, os.path.dirname(table), name, resolved)
            if not is_there:
                lost.append(name)
            rows.append((image, f"{path}: {place}", row))
        if lost and notes is not None:
            notes.append(
                f"{path}: {len(lost)} of {count(len(found), 'row')} name no file, the first is {lost[0]!r}; "
                f"{NAMES.format('the folder of this table')}"
            )
        missing += len(lost)
    return rows, missing


def _find(listing, files, base, name, resolved):
    """(path below the folder, or the absolute path of another place, whether a file is there)"""
    image = os.path.normpath(os.path.join(base, name))
    if image in files:
        return image, True
    path = os.path.abspath(os.path.join(listing.folder, image))
    image = os.path.relpath(path, os.path.abspath(listing.folder))
    if image in files:
        return image, True
    if not os.path.isfile(path):
        return os.path.normpath(os.path.join(base, name)), False
    parent, file = os.path.split(path)
    if parent not in resolved:
        resolved[parent] = listing.places.get(os.path.realpath(parent))
    if resolved[parent] is not None:
        image = os.path.join(resolved[parent], file)
    return (image if image in files else path), True


NAMES = "a name is a path from {} on, with / between its parts and its extension"  # what a table gives


class Samples(NamedTuple):
    """items: (image, caption, or None where a file beside it has it), sorted by image. unusable: how many of them lack
    their file, caption or class as far as that is known before anything is opened. notes: sentences for the user."""

    items: list[tuple[str, str | None]]
    unusable: int
    notes: list[str]


def read_samples(folder: str) -> Samples:
    """The images of a folder with their captions. Each row of the metadata is a sample, also of one image.

    Raises UserError, naming `train_shards_path_or_url`, where there are no images or no captions.
    """
    flag = "`train_shards_path_or_url`"
    listing = list_images(folder)
    notes = list(listing.notes)
    rows, missing = metadata_rows(listing, ("text",), notes)
    items = []
    for image, place, row in rows:
        if not isinstance(row["text"], str | None):
            raise UserError(f"{place} has a text that is no text but {str(row['text'])[:40]!r}")
        items.append((image, row["text"] or ""))
    if not listing.files and not items:
        raise UserError(
            f"{flag}: the folder {folder!r} holds neither *.tar shards nor images "
            f"({', '.join('*.' + key for key in IMAGE_KEYS)}, also in its subfolders)."
            + "".join(f" {note}." for note in notes)
        )
    # An image without a row counts as missing_caption, a row without its file as decode: neither is dropped unseen.
    named, roots = {image for image, _ in items}, [table.rpartition("/")[0] for table in listing.tables]
    rowless, bare = [], []
    for image in listing.files:
        if image not in named:
            has_table = any(not root or image.startswith(root + "/") for root in roots)
            items.append((image, "" if has_table else None))
            if has_table:
                rowless.append(image)
            elif os.path.splitext(image)[0] not in listing.captions:
                bare.append(image)
    if not rows and len(bare) == len(items):
        raise UserError(
            f"{flag}: the images in {folder!r} have no captions: add metadata.csv or metadata.jsonl with the columns "
            "file_name and text, or a .txt of the same name beside each image."
        )
    blank = [image for image, _, row in rows if not (row["text"] or "").strip()]
    for images, lack in ((rowless, "row in the metadata"), (bare, ".txt beside it"), (blank, "text in its row")):
        if images:
            notes.append(f"{folder}: {count(len(images), 'image')} without a {lack}, the first is {images[0]!r}")
    items.sort(key=lambda item: item[0])
    return Samples(items, min(len(items), missing + len(rowless) + len(bare) + len(blank)), notes)


def reference_images(listing: Listing) -> list[str]:
    """Every image of the listing, whatever is said of it; where it has none, those that its metadata name."""
    return listing.files or sorted({image for image, _, _ in metadata_rows(listing)[0]})


def read_sample(folder: str, image: str, caption: str | None) -> dict[str, bytes]:
    """The raw sample, {extension: bytes}, of one of `Samples.items`; a file that cannot be read becomes an empty one.

    The extension only says that the member is the image: the decoder looks at the bytes.
    """
    path = os.path.join(folder, image)
    raw = {image_key(path): b""}
    with contextlib.suppress(OSError):
        raw[image_key(path)] = Path(path).read_bytes()
    if caption is not None:
        return raw | {"txt": caption.encode()}
    for extension in CAPTION_FILES:
        with contextlib.suppress(OSError):
            return raw | {"txt": Path(os.path.splitext(path)[0] + extension).read_bytes()}
    return raw


def image_key(path: str) -> str:
    key = os.path.splitext(path)[1][1:].lower()
    return key if key in IMAGE_KEYS else IMAGE_KEYS[0]


def expand_home(text):
    """A file, a folder, a hub name, a pattern or an address as people type it, from `~` on.

    `~` and `~user` become the home folder where a path can begin: at the start, after the @ of a file of prompts, and
    at the start of a part of a brace pattern that begins the text. The shell of a `pipe:` command expands its own.
    """
    beginnings = r"(^|[{,])" if text.startswith("{") else r"(^@?)"
    return re.sub(beginnings + r"(~[^/,{}]*)", lambda found: found[1] + os.path.expanduser(found[2]), text)


def literal_folder(pattern):
    """(the longest leading folder that exists as it is written, with its slash; the rest, which may be a pattern)."""
    ends = [found.end() for found in re.finditer("/", pattern)]
    end = next((end for end in reversed(ends) if os.path.isdir(pattern[:end])), 0)
    return pattern[:end], pattern[end:]
