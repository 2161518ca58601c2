"""Tars of many makers: this project's reader and webdataset's give the same keys and members."""

import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

from common.data.shards import tar_samples

import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st


def by_tarfile(format, suffix=""):
    def make(folder, samples, rng):
        contents = [(f"{key}.{e}" if e else key, data) for key, raw in samples.items() for e, data in raw.items()]
        rng.shuffle(contents)
        with tarfile.open(folder / f"0.tar{suffix}", "w" + suffix.replace(".", ":"), format=format) as tar:
            for name, kind in (("d", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "a.png"
                tar.addfile(info)
            for name, data in contents:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    return make


def by_tar(*options):
    def make(folder, samples, rng):
        for key, raw in samples.items():
            for extension, data in raw.items():
                path = folder / "in" / (f"{key}.{extension}" if extension else key)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        (folder / "in").mkdir(exist_ok=True)
        subprocess.run(["tar", *options, "-cf", folder / "0.tar", "-C", folder / "in", "."], check=True)

    return make


def by_webdataset(folder, samples, rng):
    with wds.ShardWriter(f"{folder}/%d.tar", maxcount=2, verbose=0, encoder=False, format="PAX_FORMAT") as writer:
        for key, raw in samples.items():
            writer.write({"__key__": key} | {extension: data for extension, data in raw.items() if extension})


MAKERS = {
    "GNU": by_tarfile(tarfile.GNU_FORMAT),
    "pax, zipped": by_tarfile(tarfile.PAX_FORMAT, ".gz"),
    "tar by name": by_tar("--sort=name"),
    "tar as it comes": by_tar("--format=posix"),
    "ShardWriter": by_webdataset,
}
tar_keys = st.sampled_from(["a", "b", "_c", "ü 1", "d/a", "d.v1/a", "d/e/f", "__m__", "__x__/g", "long" * 40])
tar_members = st.dictionaries(
    st.sampled_from(["png", "TXT", "json", "seg.png", ""]), st.binary(max_size=600), min_size=1
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(list(MAKERS)), st.dictionaries(tar_keys, tar_members), st.randoms(use_true_random=False))
def test_tars_give_the_keys_and_members_that_webdataset_reads(maker, samples, rng):
    required, found = [("png", "txt", "json", "seg.png")], []
    with tempfile.TemporaryDirectory() as folder:
        MAKERS[maker](Path(folder), samples, rng)
        paths = sorted(map(str, Path(folder).glob("*.tar*")))
        for path in paths:
            with open(path, "rb") as file:
                found += [(key, dict(raw)) for _, key, raw in tar_samples(file, required)]
        theirs = [*wds.WebDataset(paths, shardshuffle=False, empty_check=False)] if paths else []
    assert found == [
        (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in theirs
    ]
