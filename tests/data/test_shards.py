"""What an address, a pattern or a folder means."""

import shutil
from functools import partial
from itertools import islice
from pathlib import Path

from common.data.images import decode_image_text
from common.data.shards import count_samples, expand_shards
from common.data.transfers import read_head
from common.errors import UserError
from tests.data.making import (
    SAMPLE_SKIPS,
    R,
    count_after,
    encode,
    epoch_of,
    image_folder,
    make_data,
    make_shards,
    members,
    random_image,
    run,
    write_tar,
)

import fsspec
import pytest

# ----- remote shards


def test_a_pipe_is_tried_again(tmp_path):
    good = make_shards(tmp_path, [5])[0]
    tries = tmp_path / "tries"
    command = f"pipe:echo x >> {tries}; cat {good}; test $(wc -l < {tries}) -ge 3"
    assert len(count_after([command], 5)["keys"]) == 5
    assert len(tries.read_text().split()) == 3


def test_http_addresses_with_blanks_and_umlauts(tmp_path, server):
    (tmp_path / "my shards").mkdir()
    shard = Path(make_shards(tmp_path, [5])[0]).rename(tmp_path / "my shards/ü 0.tar")
    for name in ("my shards/ü 0.tar", "my%20shards/%C3%BC 0.tar"):
        assert len(count_after([f"{server.address}/good/{name}"], 5)["keys"]) == 5
    assert read_head(f"{server.address}/good/my shards/ü 0.tar") == shard.read_bytes()[: 1 << 16]


def test_fsspec_addresses(tmp_path):
    shard = make_shards(tmp_path, [5])[0]
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({f"/test_data/{n:05d}.tar": Path(shard).read_bytes() for n in range(3)})
    shards = expand_shards("memory://test_data/*.tar")
    assert shards == expand_shards("memory:///test_data/{00000..00002}.tar") and len(shards) == 3
    assert len(count_after(shards, 15)["keys"]) == 15
    filesystem.rm(f"/test_data/{1:05d}.tar")
    assert count_after(shards, 20)["shard_open"] >= 1
    with pytest.raises(UserError, match="nothing matches"):
        expand_shards("memory://test_data/*.zip")
    with pytest.raises(UserError, match="`train_shards_path_or_url`.*nosuchprotocol"):
        expand_shards("nosuchprotocol://bucket/*.tar")


# ----- which shards


def test_expand_shards(tmp_path):
    shards = make_shards(tmp_path, [1, 1, 1])
    assert expand_shards(str(tmp_path / "{00000..00002}.tar")) == shards
    assert expand_shards(str(tmp_path / "0000?.tar")) == shards
    assert expand_shards(str(tmp_path)) == expand_shards([str(tmp_path)]) == shards
    assert expand_shards([shards[2], str(tmp_path / "{00000..00001}.tar")]) == [shards[2], *shards[:2]]
    assert expand_shards("https://host/{0..1}.tar?a=b") == ["https://host/0.tar?a=b", "https://host/1.tar?a=b"]
    assert expand_shards(r"pipe:f() { cat $1; }; f /x/{3..4}\ y") == [
        r"pipe:f() { cat $1; }; f /x/3\ y",
        r"pipe:f() { cat $1; }; f /x/4\ y",
    ]
    braces = write_tar(tmp_path / "{a,b}.tar", members(0, 1))
    assert expand_shards(braces) == [braces]


def test_the_tars_of_a_folder(tmp_path, capsys):
    shards = make_shards(tmp_path, [1, 1])
    for name in ("more/1/a.TAR", "more/b.tgz", "c.Tar.GZ", ".cache/d.tar", "more/.e.tar", "more/f.txt", "g/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shards[0], tmp_path / name)
    (tmp_path / "more/round").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "more/1")
    expected = [*shards, *(str(tmp_path / name) for name in ("c.Tar.GZ", "linked/a.TAR", "more/b.tgz"))]
    assert expand_shards(str(tmp_path)) == expand_shards(f"{tmp_path}/") == expected
    (tmp_path / "c_stats.json").write_text('{"successes": 70}')
    assert count_samples(expected) == 74

    for word in ("train", "Val"):
        (tmp_path / "split" / word).mkdir(parents=True)
        shutil.copy(shards[0], tmp_path / "split" / word / "0.tar")
    with pytest.raises(UserError, match="lie in Val, train, and Val is not for training by its name"):
        expand_shards(str(tmp_path / "split"))
    shutil.move(tmp_path / "split/train/0.tar", tmp_path / "split/1.tar")
    assert expand_shards(f"{tmp_path}/split/") == [f"{tmp_path}/split/1.tar"]
    assert "split/, 1 tars in Val are left out" in capsys.readouterr().out
    assert len(expand_shards(str(tmp_path / "split/Val"))) == len(expand_shards(f"{tmp_path}/split/*.tar")) == 1

    (tmp_path / "images/original").mkdir(parents=True)  # images, and what they were unpacked from
    shutil.copy(shards[0], tmp_path / "images/original/0.tar")
    (tmp_path / "images/0.png").write_bytes(b"")
    (tmp_path / "images/0.txt").write_text("caption")
    assert expand_shards(str(tmp_path / "images")) == [str(tmp_path / "images")]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{00000..00004}.tar", "2 of 5 paths match no file.*00003.tar"),
        ("{00000..00004.tar", "braces"),
        ("*.zip", "matches no file"),
        ("missing.tar", "matches no file"),
        ("empty", "neither .*tar.* nor images"),
    ],
)
def test_expand_shards_refuses_what_is_not_there(tmp_path, spec, message):
    make_shards(tmp_path, [1, 1, 1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"`train_shards_path_or_url`.*{message}"):
        expand_shards(str(tmp_path / spec))
    with pytest.raises(UserError, match="names no shard"):
        expand_shards([])


def test_count_samples(tmp_path):
    shards = make_shards(tmp_path, [5, 7])
    assert count_samples(shards) == 12
    (tmp_path / "00001_stats.json").write_text('{"successes": 70}')
    assert count_samples(shards) == 75
    (tmp_path / "00001_stats.json").write_text("{")
    assert count_samples(shards) == 12
    assert count_samples([*shards, "pipe:cat x"]) is count_samples(["s3://a/b.tar"]) is None
    assert count_samples([image_folder(tmp_path / "images", 9)]) == 9


# ----- folders of images


@pytest.mark.parametrize("captions", ["txt", "csv", "jsonl"])
def test_folders_of_images(tmp_path, captions):
    folder = image_folder(tmp_path / "images", 30, captions)
    assert expand_shards(folder) == [folder]
    decode = partial(decode_image_text, resolution=R)
    expected, end = run([folder], 1, 0, 48, num_lanes=4, decode=decode)
    assert run([folder], 2, 2, 48, num_lanes=4, decode=decode) == (expected, end)
    _, state = run([folder], 2, 0, 14, num_lanes=4, decode=decode)
    assert run([folder], 4, 0, 32, state, num_lanes=4, decode=decode)[0] == expected[14:46]
    separator = " " if captions == "txt" else ", "
    for _, _, keys, texts, _, _ in expected:
        assert texts == [f"caption{separator}{int(key[-7:-4])}" for key in keys]
    keys, skipped = epoch_of([folder])
    assert len(set(keys)) == len(keys) == 30 and not skipped


def test_images_without_captions_and_captions_without_images_are_counted(tmp_path):
    folder = Path(image_folder(tmp_path / "images", 30, "csv"))
    (folder / "extra.png").write_bytes(encode(random_image(0)))
    with open(folder / "metadata.csv", "a") as file:
        file.write("gone.png,gone\n")
    counters = count_after([str(folder)], 100)
    assert counters["missing_caption"] >= 2 and counters["decode"] >= 2
    assert counters["read"] == 100 + sum(counters[name] for name in SAMPLE_SKIPS)


def test_folders_that_cannot_be_used(tmp_path):
    images = tmp_path / "images"
    image_folder(images, 3, captions=None)
    with pytest.raises(UserError, match="have no captions: add metadata.csv or metadata.jsonl.*.txt"):
        expand_shards(str(images))
    (images / "metadata.csv").write_text("name,text\n000.png,x\n")
    with pytest.raises(UserError, match="metadata.csv has no column file_name"):
        expand_shards(str(images))
    (images / "metadata.csv").unlink()
    (images / "metadata.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="metadata.jsonl: line 1 is no JSON"):
        expand_shards(str(images))
    (images / "metadata.jsonl").write_text('{"file_name": "000.png", "text": 7}')
    with pytest.raises(UserError, match="metadata.jsonl: row 1 has a text that is no text but '7'"):
        expand_shards(str(images))
    folder = image_folder(tmp_path / "good", 3)
    with pytest.raises(UserError, match="folder of images"):
        make_data([folder, *make_shards(tmp_path, [5])])
    with pytest.raises(UserError, match="holds 3 images and the data have 8 lanes"):
        list(islice(make_data([folder]), 8))
