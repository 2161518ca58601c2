"""Writing what `common/data/cached_latents.py` reads: shards of cached latents, and the manifest of their folder."""

import io
import json
import tarfile
from pathlib import Path

from common.data.cached_latents import FREE_KEYS, MANIFEST, MEMBER, manifest_digest, stats_path
from common.errors import UserError, blame
from common.files import check_place, whole

import numpy as np
import webdataset as wds


def check_folder(folder, settings):
    """`files.check_place`, and UserError unless the manifest there holds these settings, or more.

    Returns the manifest's bytes, or None where there is none.
    """
    path = Path(folder, MANIFEST)
    check_place(path)
    if not path.is_file():
        return None
    flag = f"`output_dir`={folder}"
    with blame(f"{flag}: its {path.name} cannot be read", OSError, ValueError, TypeError, way_out="name a new folder"):
        text = path.read_bytes()
        there = dict(json.loads(text))
    here = json.loads(json.dumps(settings))
    changed = [key for key in sorted(here) if key not in FREE_KEYS and there.get(key) != here[key]]
    if changed:
        listed = ", ".join(f"{key} was {there.get(key)!r} and is {here[key]!r}" for key in changed)
        raise UserError(
            f"{flag} holds latents of other settings: {listed}; repeat the command that began it, or name a new folder"
        )
    return text


def write_manifest(folder, manifest):
    """Write the manifest, or take that which is there, if it is the same; called by every task.

    Returns the file's bytes, equal for all tasks. The first that comes writes it. UserError as of `check_folder`.
    """
    if check_folder(folder, manifest) is None:
        text, path = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n", Path(folder, MANIFEST)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path, replace=False) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"`output_dir`={folder} cannot be written ({error.strerror}); name another folder"
            ) from None
    return check_folder(folder, manifest)


def write_shard(path, manifest_bytes, samples, stats):
    """Write a tar that is complete or does not exist, and after it its `_stats.json`.

    manifest_bytes: as from `write_manifest`. samples: (key, caption, {name: value} of the json, mean, std), arrays
    float16. stats: called with the number of samples and of bytes when all are written, returns what the file says;
    what it or `samples` raise ends the shard without a trace. Two tasks at one shard write the same. Raises OSError.
    """
    with whole(path) as unfinished, open(unfinished, "xb") as file:
        count = _write_tar(file, manifest_bytes, samples)
        said = stats(count, file.tell())
    with whole(stats_path(path)) as unfinished:
        unfinished.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _write_tar(file, manifest_bytes, samples):
    digest, count = manifest_digest(json.loads(manifest_bytes)), 0
    with wds.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:  # of names of any length
        head = tarfile.TarInfo(MEMBER)
        head.size = len(manifest_bytes)
        tar.tarstream.addfile(head, io.BytesIO(manifest_bytes))
        for key, caption, record, mean, std in samples:
            record = json.dumps(record | {"manifest": digest}, sort_keys=True).encode()
            members = {"mean.npy": _npy(mean), "std.npy": _npy(std), "txt": caption.encode(), "json": record}
            tar.write({"__key__": key} | members)
            count += 1
    return count


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
