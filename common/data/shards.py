"""Where training samples come from: listing and reading tar shards; `fetch` opens them, `folders` are of images.

A raw sample is {member extension: bytes}. Nothing is unpickled, and members that nobody asked for are never read.
"""

import contextlib
import glob
import itertools
import json
import os
import re
import tarfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from common.data import tables
from common.data.folders import expand_home, is_hidden, is_image, literal_folder, read_samples, walk
from common.errors import UserError, blame

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

SKIP_CLASSES = ("shard_open", "shard_read", "decode", "missing_caption", "too_small", "too_big", "filtered")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")  # in any case
HELD_OUT = ("test", "val", "valid", "validation", "eval", "dev")  # folders that are not for training, beside others
SAMPLE = "the members of a sample lie side by side in a tar, under one name up to the first dot after their folder"
MAX_MEMBER_BYTES = 1 << 28  # larger members of a tar are not read: their sample is too_big


class SampleError(Exception):
    """A sample (or a shard) that cannot be used; `reason` is one of SKIP_CLASSES, `detail` a few words for the log."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        assert reason in SKIP_CLASSES
        self.reason, self.detail = reason, detail[:300]


def expand_shards(spec: str | list[str]) -> list[str]:
    """List the shards that `train_shards_path_or_url` means, in a fixed order.

    Brace patterns `{00000..00099}` are expanded everywhere, also inside `pipe:COMMAND`; globs in local paths and in
    fsspec addresses (s3://, gs://, hf://, ...); a folder means its tars, or the folder itself where it holds images.
    What exists as it is written, file or leading folders, is no pattern.
    Raises UserError when a local file is missing or nothing matches.
    """
    shards = [shard for one in ([spec] if isinstance(spec, str) else spec) for shard in _expand_spec(one)]
    if not shards:
        raise UserError("`train_shards_path_or_url` names no shard: give tars, a pattern, an address or a folder.")
    return shards


def _expand_spec(spec: str) -> list[str]:
    spec = expand_home(spec)
    try:
        folder, rest = ("", spec) if is_remote(spec) else literal_folder(spec)
        paths = [spec] if os.path.exists(spec) else [folder + one for one in braceexpand(rest, escape=False)]
    except UnbalancedBracesError:
        raise UserError(f"`train_shards_path_or_url`: the braces of {spec!r} do not match.") from None
    shards, missing = [], []
    for path in paths:
        if is_remote(path):
            shards += _expand_fsspec(path) if uses_fsspec(path) else [path]
            continue
        if os.path.isdir(path):
            shards += _expand_folder(path)
        elif os.path.exists(path):
            shards.append(path)
        else:
            folder, rest = literal_folder(path)
            matches = sorted(glob.glob(glob.escape(folder) + rest))
            shards += matches
            missing += [] if matches else [path]
    if missing:
        what = f"{len(missing)} of {len(paths)} paths match no file, the first is {missing[0]!r}"
        what = what if len(paths) > 1 else f"{missing[0]!r} matches no file"
        raise UserError(f"`train_shards_path_or_url`: {what}; correct the path or the range in braces")
    return shards


def is_remote(shard: str) -> bool:
    return shard.startswith("pipe:") or "://" in shard


def uses_fsspec(shard: str) -> bool:
    return not shard.startswith(("pipe:", "http://", "https://"))


def _expand_fsspec(address: str) -> list[str]:
    # a missing package, wrong credentials, no network: each file system has its own exceptions
    with blame(f"`train_shards_path_or_url`: {address!r} cannot be listed", Exception):
        filesystem, path = fsspec.core.url_to_fs(address)
        if not glob.has_magic(path):
            return [address]
        matches = sorted(filesystem.glob(path))
    if not matches:
        raise UserError(f"`train_shards_path_or_url`: nothing matches {address!r}.")
    return [filesystem.unstrip_protocol(match) for match in matches]


def _expand_folder(folder: str) -> list[str]:
    tars = training_tars(folder)
    if not tars:
        read_samples(folder)
        return [folder]
    return tars


def training_tars(folder: str) -> list[str]:
    """`list_tars` without those in folders that are held out by their names, which is said once a node.

    Raises UserError where the folder has no tars of its own beside them.
    """
    tars = list_tars(folder)
    tops = {tar: os.path.relpath(tar, folder).rpartition(os.sep)[0].partition(os.sep)[0] for tar in tars}
    held_out = sorted({top for top in tops.values() if top.lower() in HELD_OUT})
    if held_out and "" in tops.values():
        kept = [tar for tar in tars if tops[tar] not in held_out]
        if os.environ.get("RANK", "0") == "0":
            print(
                f"note: of {folder}, {len(tars) - len(kept)} tars in {', '.join(held_out)} are left out.", flush=True
            )
        return kept
    if held_out and len(names := sorted(set(tops.values()))) > 1:
        raise UserError(
            f"the tars of {folder!r} lie in {', '.join(names)}, and {held_out[0]} is not for training by its name: "
            "pass one of these folders, or a pattern for those that are meant."
        )
    return tars


def tar_suffix(path: str) -> str:
    """The end of a path by which it is a tar, "" for any other."""
    return next((path[-len(suffix) :] for suffix in TAR_SUFFIXES if path.lower().endswith(suffix)), "")


def list_tars(folder: str) -> list[str]:
    """The tars of a folder and its subfolders, links followed, hidden ones left out; sorted by path.

    A folder that holds images and has tars in subfolders alone is a folder of images: [].
    """
    files = [path for path, _ in walk(folder)]
    tars = [path for path in files if tar_suffix(path)]
    if all("/" in tar for tar in tars) and any(is_image(path) for path in files):
        return []
    tars = sorted(os.path.join(folder, tar) for tar in tars)
    return sorted({os.path.realpath(tar): tar for tar in reversed(tars)}.values())  # each once, by its first name


def count_samples(shards: list[str]) -> int | None:
    """Number of raw samples; None when a shard is remote.

    A folder of images is counted exactly. For a local tar, `successes` of img2dataset's NNNNN_stats.json beside it is
    believed; without that file the headers of the tar are scanned (a damaged tar counts up to the damage).
    """
    if any(is_remote(shard) for shard in shards):
        return None
    total = 0
    for shard in tqdm(shards, desc="Counting samples", unit="shard", delay=5, leave=False):
        if os.path.isdir(shard):
            total += len(read_samples(shard).items)
            continue
        stats = Path(shard[: -len(tar_suffix(shard)) or None] + "_stats.json")
        try:
            total += int(json.loads(stats.read_text())["successes"])
        except (OSError, ValueError, KeyError, TypeError):
            total += _count_tar(shard)
    return total


def _count_tar(path: str) -> int:
    count = 0
    with contextlib.suppress(Exception), open(path, "rb") as file:  # training reports the damage, with its class
        for index, _, _, _ in _tar_members(tarfile.open(fileobj=file, mode="r:*")):
            count = index + 1
    return count


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[int, str, str, tarfile.TarInfo]]:
    """(sample's index in the shard, key, extension, member) of the regular files, in order, reading headers only.

    Consecutive members of one key are one sample. Raises when the archive is damaged or cut off.
    """
    index, key, extensions, offset = -1, None, set(), -1
    while (member := tar.next()) is not None:
        tar.members.clear()  # tarfile remembers every member otherwise
        if tar.offset <= offset or member.size < 0:
            raise tarfile.ReadError("a header points backwards")
        offset = tar.offset
        prefix, extension = base_plus_ext(member.name)
        nameless = prefix is None or prefix.endswith("/")  # no name before the first dot, or no extension
        if (
            nameless
            or is_hidden(member.name)
            or not member.isreg()
            or member.issparse()
            or re.match(r"__[^/]*__($|/)", member.name)
        ):
            continue
        extension = extension.lower()
        if prefix != key or extension in extensions:
            index, key, extensions = index + 1, prefix, set()
        extensions.add(extension)
        yield index, key, extension, member
    # tarfile ends without a word at a damaged header. A sound archive is followed by nothing or by zeros.
    tar.fileobj.seek(tar.offset)
    while chunk := tar.fileobj.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise tarfile.ReadError(f"no valid header at byte {tar.offset}")


def tar_samples(file, required, part: int = 0, parts: int = 1, start: int = 0) -> Iterator[tuple[int, str, dict]]:
    """(index in the shard, key, {extension: bytes}) of the samples with index >= start and index % parts == part.

    Only members that `required` or "json" names are read; all else is seeked over. A member over MAX_MEMBER_BYTES
    is None. Raises SampleError("shard_read") where the archive is damaged, after the samples before the damage.
    """
    wanted = {"json", *itertools.chain(*required)}
    current, current_key, raw = -1, None, {}
    try:
        tar = _open_tar(file)
        for index, key, extension, member in _tar_members(tar):
            if index != current:
                if raw is not None and current >= 0:
                    yield current, current_key, raw
                current, current_key = index, key
                raw = {} if index >= start and index % parts == part else None
            if raw is not None and extension in wanted:
                raw[extension] = None
                if member.size <= MAX_MEMBER_BYTES:
                    raw[extension] = _read_member(tar, member)
    except Exception as error:  # hostile bytes make tarfile raise nearly anything; SampleError: the rest does not come
        if raw and missing_group(raw, required) is None and None not in raw.values():
            yield current, current_key, raw  # the sample before the damage is whole
        if isinstance(error, SampleError):
            raise
        raise SampleError("shard_read", f"{type(error).__name__}: {error}") from error
    if raw is not None and current >= 0:
        yield current, current_key, raw


def _open_tar(file):
    head = file.read(512)
    file.seek(0)
    try:
        return tarfile.open(fileobj=file, mode="r:*")
    except tarfile.ReadError:
        found = tables.what_is(head) or f"a file that begins with {head[:16]!r}"
        raise SampleError("shard_read", f"no tar that can be opened but {found}") from None


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    tar.fileobj.seek(member.offset_data)
    data = tar.fileobj.read(member.size)
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut off")
    return data


def missing_group(raw: dict, required) -> tuple | None:
    return next((group for group in required if not any(extension in raw for extension in group)), None)


def check_members(raw: dict, required):
    """SampleError unless a raw sample has a member of each group of extensions, and none that was too big to read."""
    missing = missing_group(raw, required)
    if missing:
        reason = "missing_caption" if "txt" in missing else "decode"
        raise SampleError(reason, f"no member {', '.join(missing)}; {SAMPLE}")
    if None in raw.values():
        raise SampleError("too_big", f"a member of more than {MAX_MEMBER_BYTES} bytes")


def quote_address(url):
    """An http address with its blanks, umlauts and the like percent-encoded; what is encoded already stays."""
    parts = urllib.parse.urlsplit(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", url.strip()))
    user, at, host = parts.netloc.rpartition("@")
    if not host.isascii():
        host = host.encode("idna").decode()
    quoted = {name: urllib.parse.quote(getattr(parts, name), "/%:?@!$&'()*+,;=~[]") for name in ("path", "query")}
    return parts._replace(netloc=user + at + host, **quoted).geturl()
