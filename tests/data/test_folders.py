"""Folders of images: what is listed, which samples captions and metadata make of it, how every reader sees them."""

import functools
import io
import os
import random
import re
import tarfile
from collections import Counter

from common.ct.data import check_shard_classes, class_folders, decode_image_label, load_labelled_images, open_images
from common.data import images
from common.data.folders import list_images, read_sample, read_samples
from common.data.images import FORMATS, decode_image_text, image_size, read_image
from common.data.shards import SampleError, expand_shards
from common.data.stream import TrainingData
from common.direct import sources
from common.errors import UserError
from common.run.reference import iterate_images, reference_files, to_tensor
from tests.data.making import encode, random_image, write_tar

import numpy as np
import pytest
from PIL import Image, ImageOps

PNG = encode(random_image(0))


def fill(root, *names, content=PNG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


# --- what is listed


@pytest.mark.parametrize(
    ("names", "links", "expected", "said"),
    [
        (["b/1.png", "a.jpg", "b-c/2.JPEG"], {}, ["a.jpg", "b-c/2.JPEG", "b/1.png"], []),
        ([f"{k}.{k}" for k in "jfif jpe bmp gif tif tiff avif webp JFIF".split()], {}, None, []),
        (["1.png", ".x/2.png", ".3.png", "._1.png", "__MACOSX/4.png", "@eaDir/1.png/S.jpg", "#recycle/1.png"], {},
         ["1.png"], []),
        (["1.png", "a/2.png"], {"b": "a", "c.png": "1.png"}, ["1.png", "a/2.png", "c.png"], []),
        (["b/1.png", ".x/2.png"], {"a": "b", "c": ".x", "d": ".x"}, ["a/1.png", "c/2.png"], []),
        (["a/1.png"], {"a/up": "", "a/self": "a/self", "b": "a/up/a"}, ["a/1.png"], []),
        (["1.png", "2.HEIC", "d/3.heic", "e.svg", "f.txt"], {}, ["1.png"], ["3 files left out (2 .heic, 1 .svg)"]),
        (["train/1.png", "test/2.png"], {}, ["train/1.png"], ["1 image of train are read, 1 of test are left out"]),
        (["Train/a/1.png", "val/a/1.png", "dev/1.png"], {}, ["Train/a/1.png"], ["2 of dev and val are left out"]),
        (["train/1.png", "test/2.png", "car/3.png"], {}, ["car/3.png", "test/2.png", "train/1.png"], []),
        (["train/1.png", "test/2.png", "3.png"], {}, ["3.png", "test/2.png", "train/1.png"], []),
        (["val/1.png", "test/2.png"], {}, ["test/2.png", "val/1.png"], []),
        (["train/1.png", "test/2.png", "metadata.csv"], {}, ["test/2.png", "train/1.png"], []),
    ],
)  # fmt: skip
def test_every_reader_lists_the_same(tmp_path, names, links, expected, said):
    folder = fill(tmp_path / "folder", *names)
    for link, target in links.items():
        (tmp_path / "folder" / link).symlink_to(tmp_path / "folder" / target)
    expected = sorted(names) if expected is None else expected
    listing = list_images(folder)
    assert listing.files == expected
    assert len(listing.notes) == len(said) and all(a in b for a, b in zip(said, listing.notes, strict=True))
    assert [os.path.relpath(file, folder) for file in reference_files(folder)[1]] == expected
    (source, of_name) = (load_labelled_images(*where, None, "image", None, None, None, None) for where in
                         ((None, folder), (folder, None)))  # fmt: skip
    assert source.keys == of_name.keys == expected and source.notes == listing.notes
    if "metadata.csv" not in names:
        fill(tmp_path / "folder", *(os.path.splitext(file)[0] + ".txt" for file in expected), content=b"a caption")
        assert [image for image, _ in read_samples(folder).items] == expected


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    folder, scan = fill(tmp_path / "f", "a/1.png", "b/1.png"), os.scandir

    def scandir(path):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for read in (expand_shards, reference_files, lambda path: open_images(None, train_data_dir=path)):
        with pytest.raises(Exception, match=r"f/b/' cannot be listed \(Permission denied\)"):
            read(folder)


def test_tars_and_folders_hold_the_same_samples_for_training_and_the_reference(tmp_path):
    """Two images of one name are one sample; what is hidden, and what is no image, is none."""
    contents = [("a.png", PNG), ("a.txt", b"a"), ("__MACOSX/a.png", PNG), ("__MACOSX/a.txt", b"x"), ("b.jfif", PNG),
                ("b.png", PNG), ("b.txt", b"b"), ("./c/._d.png", PNG), ("c/.ipynb_checkpoints/d.png", PNG),
                ("c/.ipynb_checkpoints/d.txt", b"x"), ("./c/d.bmp", PNG), ("./c/d.txt", b"d"), ("e.mask.png", PNG),
                ("f.txt", b"no image")]  # fmt: skip
    shard = write_tar(tmp_path / "0.tar", contents)
    data = TrainingData([shard], functools.partial(decode_image_text, resolution=8), batch_size=1, seed=0,
                        num_lanes=1, max_skip_ratio=1.0)  # fmt: skip
    trained = {batch["keys"][0] for batch, _ in zip(data, range(12), strict=False)}
    assert trained == {"0.tar/a", "0.tar/b", "0.tar/./c/d"}
    for reference in (shard, str(tmp_path), str(tmp_path / "{0..0}.tar"), str(tmp_path / "*.tar")):
        assert len(list(iterate_images(reference, 8, 8))) == 3
    with tarfile.open(shard) as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    assert len(reference_files(str(tmp_path / "folder"))[1]) == 5  # of a folder each file is an image
    fill(tmp_path, "1.png")
    assert reference_files(str(tmp_path))[0] == "tar" and expand_shards(str(tmp_path)) == [shard]


# --- captions and metadata


@pytest.mark.parametrize(
    ("rows", "expected", "unusable"),
    [
        ([("a.png", "x"), ("a.png", "y"), ("s/b.png", "z")], [("a.png", "x"), ("a.png", "y"), ("s/b.png", "z")], 0),
        ([("./s/../a.png", "x"), ("s//b.png", "y")], [("a.png", "x"), ("s/b.png", "y")], 0),
        ([("{root}/folder/a.png", "x"), ("{root}/link/s/b.png", "y")], [("a.png", "x"), ("s/b.png", "y")], 0),
        ([("{root}/out.png", "x"), ("../out.png", "y"), ("a.png", "z"), ("s/b.png", "")],
         [("{root}/out.png", "x"), ("{root}/out.png", "y"), ("a.png", "z"), ("s/b.png", "")], 1),
        ([("a.png", "x"), ("no.png", "y")], [("a.png", "x"), ("no.png", "y"), ("s/b.png", "")], 2),
    ],
)  # fmt: skip
def test_rows_of_metadata(tmp_path, rows, expected, unusable):
    folder = fill(tmp_path / "folder", "a.png", "s/b.png")
    fill(tmp_path, "out.png")
    (tmp_path / "link").symlink_to(folder)
    root = str(tmp_path)
    text = "".join(f"{name.format(root=root)},{caption}\n" for name, caption in rows)
    (tmp_path / "folder" / "metadata.csv").write_text("file_name,text\n" + text)
    samples = read_samples(folder)
    assert samples.items == [(name.format(root=root), caption) for name, caption in expected]
    assert samples.unusable == unusable
    for name, _ in samples.items:
        assert read_sample(folder, name, "x") == {"png": b"" if "no.png" in name else PNG, "txt": b"x"}


def test_metadata_of_subfolders_and_captions_beside_images(tmp_path):
    folder = fill(tmp_path, "a/0.png", "a/1.png", "b/0.JPG", "b/1.png")
    (tmp_path / "a" / "metadata.csv").write_text("file_name,text\n1.png,one\n0.png,zero\n")
    (tmp_path / "b" / "0.TXT").write_text("upper")
    samples = read_samples(folder)
    assert samples.items == [("a/0.png", "zero"), ("a/1.png", "one"), ("b/0.JPG", None), ("b/1.png", None)]
    assert samples.unusable == 1 and "1 image without a .txt beside it, the first is 'b/1.png'" in samples.notes[0]
    assert read_sample(folder, "b/0.JPG", None) == {"jpg": PNG, "txt": b"upper"}


def test_rows_that_name_no_file_say_what_a_name_is(tmp_path):
    name, hint = r"s\b.png", "with / between its parts and its extension"
    folder = fill(tmp_path, "s/b.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,text,image,prompt,seed\n{name},x,{name},x,1\n")
    said = f"1 of 1 row name no file, the first is {name!r}; "
    with pytest.raises(UserError) as caught:
        TrainingData([folder], None, batch_size=1, seed=0)
    assert "2 of 2 samples cannot be used" in str(caught.value) and said in str(caught.value)
    assert hint in str(caught.value) and "or raise `max_skip_ratio`" in str(caught.value)
    with pytest.raises(Exception, match="1 of 1 rows name no file") as caught:
        sources.PairImages(tmp_path / "metadata.csv")
    assert hint in str(caught.value)


# --- classes


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["train/1.png", "car/1.png", "bus/test_2.png", "bus/1.png"], ["bus", "car", "train"]),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], ["a", "b"]),
        (["images/a/1.png", "images/b/x/1.png"], ["a", "b"]),
        (["a/x/1.png", "b/y/1.png", ".git/z/1.png", "empty/notes.md"], ["a", "b"]),
        (["n01/images/1.png", "n02/images/1.png"], ["n01", "n02"]),
        (
            ["a/cat/1.png", "a/dog/1.png", "b/car/1.png"],
            "the 2 upper ones (a, b) or the 3 lowest (car, cat, dog); pas",
        ),
        (["a/x/1.png", "a/y/1.png", "b/x/1.png"], "the 2 upper ones (a, b) or the 2 lowest (x, y); say it in"),
        (["1.png", "2.png"], "its images lie in 0 subfolders"),
        (["a/1.png", "a/2.png"], "its images lie in 1 subfolder;"),
        (["a/1.png", "b/2.png", "3.png"], "it has 1 image beside its 2 subfolders of classes, the first is '3.png'"),
    ],
)
def test_classes_are_the_subfolders(tmp_path, names, classes):
    listing = list_images(fill(tmp_path, *names))
    if isinstance(classes, str):
        with pytest.raises(UserError, match=re.escape(classes)):
            class_folders(listing)
        return
    found, numbers = class_folders(listing)
    assert found == classes
    _, source = open_images(None, train_data_dir=tmp_path, label_column="label")
    assert [source.read(i) for i in range(len(numbers))] == [{"png": PNG, "cls": str(n).encode()} for n in numbers]
    assert source.num_classes == len(classes) and source.keys == listing.files
    assert all(classes[number] in key.split("/") for key, number in zip(source.keys, numbers, strict=True))


def test_the_number_of_classes_says_which_subfolders_they_are(tmp_path):
    fill(tmp_path, "a/cat/1.png", "a/dog/1.png", "b/1.png", "b/car/1.png")
    for num_classes, labels in ((2, "0011"), (4, "2301")):
        _, source = open_images(None, train_data_dir=tmp_path, label_column="label", num_classes=num_classes)
        assert "".join(source.read(i)["cls"].decode() for i in range(4)) == labels
        assert source.num_classes == num_classes


@pytest.mark.parametrize(
    ("classes", "num_classes", "said"),
    [
        ([1, 2, 3, 4] * 3, 4, "samples have the class 4, and classes count from 0 to 3; if these run from 1 to 4"),
        ([1, 1, 1, 4], 4, "samples have the class 4"),  # sorted by class, cut off
        ([0, 1, 2, 3, 4] * 5, 4, "pass `num_classes`=5 or more"),
        ([1, 2, 3] * 3, 4, "no sample of class 0 among the 9 that were looked at"),
        ([0, 1, 2, 3] * 5 + [4], 4, ""),  # a stray
        ([3] * 30 + [4], 5, ""),
        ([3] * 30 + [5], 5, ""),  # sorted by class, and a stray
        ([-1, 0, 1, 2], 4, ""),
    ],
)
@pytest.mark.parametrize("kind", ["{}", "file://{}", "pipe:cat {}"])
def test_classes_that_count_from_1_are_found(tmp_path, classes, num_classes, said, kind):
    samples = [[(f"{i:03d}.png", PNG), (f"{i:03d}.cls", b"%d" % c)] for i, c in enumerate(classes)]
    shard = kind.format(write_tar(tmp_path / "0.tar", sum(samples, [])))
    if "class 4" in said or "more" in said:
        with pytest.raises(UserError, match=said):
            check_shard_classes([shard], num_classes, "label")
    else:
        found = check_shard_classes([shard], num_classes, "label")
        assert said in found and bool(said) == bool(found)


def test_classes_that_count_from_1_end_the_stream_where_the_start_of_the_data_did_not_show_it():
    raw, seen = lambda label: {"png": PNG, "cls": b"%d" % label}, Counter()
    decode = functools.partial(decode_image_label, rng=random.Random(0), resolution=8, num_classes=4, seen=seen)
    for label in [1, 2, 3, 3, 2, 1] * 2:
        decode(raw(label))
    for _ in range(4):
        with pytest.raises(SampleError, match="the class is 4"):
            decode(raw(4))
    with pytest.raises(UserError, match="`num_classes`=4: samples have the class 4"):
        decode(raw(4))


@pytest.mark.parametrize(
    "label",
    [{}, *({"cls": text} for text in (b"10", b"-1", b"cat", b"\xff\xfe")),
     *({"json": text} for text in (b"[1]", b'{"label": 1.5}', b'{"caption": "one"}'))],
)  # fmt: skip
def test_classes_that_are_none(label):
    with pytest.raises(SampleError) as caught:
        decode_image_label({"png": PNG} | label, random.Random(0), resolution=8, num_classes=10)
    assert caught.value.reason == "decode"


def test_classes_of_metadata(tmp_path):
    fill(tmp_path, "a/0.png", "a/1.png", "b/2.png")
    rows = '{"file_name": "a/1.png", "label": 4}\n{"file_name": "b/2.png", "label": 0}'
    (tmp_path / "metadata.jsonl").write_text(rows)
    _, source = open_images(None, train_data_dir=tmp_path, label_column="fine")
    assert source.num_classes == 5 and source.classes == {0, 4} and source.unusable == 1
    assert [source.read(i).get("cls") for i in range(3)] == [b"4", b"0", None]  # as in the table, which others kept
    assert "1 image without a row in the metadata, the first is 'a/0.png'" in source.notes[0]


# --- how they look


def oriented(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(random_image(3, 12, 20), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def grey16(kind, **options):
    return encode(Image.fromarray(np.full((16, 16), 30000, np.uint16)), kind, **options)


def frames(kind):
    images = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    return encode(images[0], kind, save_all=True, append_images=images[1:])


HIDDEN = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
LOOKS = {
    "hidden colours of a png": (encode(HIDDEN), (255, 255, 255)),
    "hidden colours of a webp": (encode(HIDDEN, "WEBP", lossless=True, exact=True), (255, 255, 255)),
    "hidden colours of a tiff": (encode(HIDDEN, "TIFF"), (255, 255, 255)),
    "hidden colours of an avif": (encode(HIDDEN, "AVIF"), (255, 255, 255)),
    "a transparent gif": (encode(Image.new("P", (16, 16), 1), "GIF", transparency=1), (255, 255, 255)),
    "16-bit grey": (grey16("PNG"), (117, 117, 117)),
    "16-bit grey of a tiff": (grey16("TIFF"), (117, 117, 117)),
    "16-bit grey of a tiff, 0 is white": (grey16("TIFF", tiffinfo={262: 0}), (138, 138, 138)),
    "the first frame of a gif": (frames("GIF"), (250, 0, 0)),
    "the first page of a tiff": (frames("TIFF"), (250, 0, 0)),
    "a bmp": (encode(Image.new("RGB", (16, 16), (1, 2, 3)), "BMP"), (1, 2, 3)),
    "cmyk of a tiff": (encode(Image.new("RGB", (16, 16), (200, 60, 20)).convert("CMYK"), "TIFF"), (200, 60, 20)),
}


def every_reader(tmp_path, data):
    """The image as training, consistency training, evaluate's reference and direct distillation get it, 16 x 16."""
    options = {"resolution": 16, "center_crop": True}
    yield decode_image_text({"jpg": data, "txt": b"x"}, random.Random(0), **options)["images"]
    fill(tmp_path, "0.png", content=data)
    _, source = open_images(None, train_data_dir=tmp_path)
    yield decode_image_label(source.read(0), random.Random(0), **options)["images"]
    yield to_tensor(io.BytesIO(data), "x", 16, 16)
    (tmp_path / "m.csv").write_text("image,prompt,seed\n0.png,x,1\n")
    table = sources.PairImages(tmp_path / "m.csv")
    assert table.sizes == [(16, 16)]
    yield ((table.pixels([0])[0] + 1) * 127.5).round().byte()


@pytest.mark.parametrize("name", LOOKS)
def test_every_reader_sees_the_same(tmp_path, name):
    """Files are called jpg or png, whatever they are."""
    data, colour = LOOKS[name]
    for image in every_reader(tmp_path, data):
        assert image.shape == (3, 16, 16)
        assert (image.float() - image.new_tensor(colour)[:, None, None]).abs().max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_format_is_upright(tmp_path, kind):
    for orientation in range(1, 9):
        data = oriented(kind, orientation)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        image = read_image(data)
        assert (np.asarray(image) == np.asarray(upright)).all(), orientation
        fill(tmp_path, "a", content=data)
        assert image_size(tmp_path / "a") == image.size[::-1] == ((20, 12) if orientation > 4 else (12, 20))
        sample = decode_image_text({"jpg": data, "txt": b"x"}, random.Random(0), resolution=12, center_crop=True)
        left, top = (upright.width - 12) // 2, (upright.height - 12) // 2
        expected = np.asarray(upright)[top : top + 12, left : left + 12].transpose(2, 0, 1)
        assert (sample["images"].numpy() == expected).all()
        assert sample["original_sizes"].tolist() == [upright.height, upright.width]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (encode(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "32 bits in one channel"),
        (encode(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "32 bits in one channel"),
        (b"", f"an empty file, not a whole {', '.join(FORMATS)}"),
        (b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
        (encode(Image.new("RGB", (4, 4)), "PPM"), "no image, not a whole"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(tmp_path, data, sentence):
    fill(tmp_path, "0.png", content=data)
    with pytest.raises(SampleError, match=sentence):
        read_image(data)
    with pytest.raises(Exception, match="0.png is no readable image") as caught:
        list(iterate_images(str(tmp_path), 8, 8))
    assert sentence in str(caught.value) and "object at" not in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_pixels_of_every_format_are_limited_before_they_are_decoded(kind, monkeypatch):
    data = encode(Image.new("RGB", (64, 64)), kind)
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 64 * 64)
    assert read_image(data).size == (64, 64)
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(SampleError, match="64 x 64 pixels") as caught:
        read_image(data)
    assert caught.value.reason == "too_big"
