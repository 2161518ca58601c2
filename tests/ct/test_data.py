"""What consistency training reads: data sets, folders and shards, with classes."""

import io
import json
import tarfile

import train_cm_ct_unconditional as ct
from common.ct.data import decode_image_label, open_images
from common.data import cached_latents
from common.data.folders import IMAGE_KEYS
from common.data.stream import TrainingData
from common.errors import UserError
from common.tools import latent_shards
from common.tools.demo import digits
from tests.cases import one_sentence
from tests.cases import train as run_script
from tests.made import NUM_IMAGES, rows

import datasets
import pytest


@pytest.fixture(scope="session")
def image_folder(build_once):
    def build(folder):
        for i, (image, label) in enumerate(zip(*rows(), strict=True)):
            (folder / digits.WORDS[label]).mkdir(parents=True, exist_ok=True)
            image.save(folder / digits.WORDS[label] / f"{i}.png")

    return build_once("ct_image_folder", build)


@pytest.fixture(scope="session")
def label_shards(build_once):
    """Shards of images, the class as `cls` in even ones and in the json in odd ones."""

    def build(folder):
        folder.mkdir()
        images, labels = rows()
        for shard in range(4):
            with tarfile.open(folder / f"{shard}.tar", "w") as tar:
                for i in range(shard, NUM_IMAGES, 4):
                    png = io.BytesIO()
                    images[i].save(png, "png")
                    text = str(labels[i]) if i % 2 else json.dumps({"label": labels[i]})
                    for name, data in (
                        (f"{i}.png", png.getvalue()),
                        (f"{i}.{'cls' if i % 2 else 'json'}", text.encode()),
                    ):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))

    return build_once("ct_shards", build)


@pytest.fixture
def flags(ct_flags):
    return ct_flags


def train(words):
    run_script(words, ct)


def test_all_sources_give_the_same_images_and_classes(data_set, image_folder, label_shards):
    seen = []
    for where in ({"dataset_name": data_set, "image_column": "img"}, {"train_data_dir": image_folder}):
        seen.append(read_all(*open_images(None, label_column="label", **where)))
    seen.append(read_all(*open_images(str(label_shards))))
    names = sorted(digits.WORDS)  # the classes of an image folder are in alphabetic order
    for images, other in zip(seen[0], seen[1], strict=True):
        assert images[0] == other[0] and digits.WORDS[images[1]] == names[other[1]]
    assert len(seen[0]) == NUM_IMAGES and seen[0] == seen[2]


def read_all(shards, source):
    def decode(raw, rng):
        return decode_image_label(raw, rng, resolution=8, num_classes=10)

    required = (IMAGE_KEYS, ("cls", "json"))
    data = TrainingData(shards, decode, batch_size=1, seed=0, num_lanes=1, source=source, required=required)
    samples = [next_batch for next_batch, _ in zip(data, range(NUM_IMAGES), strict=False)]
    return sorted((batch["images"].numpy().tobytes(), batch["class_labels"].item()) for batch in samples)


def test_unreadable_images_and_classes_are_skipped_and_counted(tmp_path, flags):
    images, labels = rows(40)
    encoded = []
    for image in images:
        png = io.BytesIO()
        image.save(png, "png")
        encoded.append({"bytes": png.getvalue(), "path": None})
    encoded[3]["bytes"], encoded[5]["bytes"] = b"no image", b""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"img": encoded, "label": labels[:7] + [-1] + labels[8:]}, features).save_to_disk(
        tmp_path / "bad"
    )
    train(flags(tmp_path / "out", dataset_name=tmp_path / "bad", max_train_steps=20, checkpointing_steps=20))
    log = [json.loads(line) for line in (tmp_path / "out" / "skipped_samples.jsonl").read_text().splitlines()]
    assert {line["key"] for line in log} == {"00000003", "00000005", "00000007"}
    assert any("`num_classes`=10" in line["detail"] for line in log)


def test_hub_data_sets_are_read_by_name_and_configuration(monkeypatch):
    """What `datasets` is asked for; a download is not possible here."""
    asked, images = [], rows(4)
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", *digits.WORDS])})
    data = datasets.Dataset.from_dict({"img": images[0], "fine": images[1]}, features)

    def load_dataset(path, name=None, revision=None, cache_dir=None):
        asked.append((path, name, revision, cache_dir))
        return datasets.DatasetDict({"test": data.select([0]), "train": data})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = {"image_column": "img", "label_column": "fine"}
    place = {"cache_dir": "/cache", "revision": "main"}
    shards, source = open_images(None, "cifar100", dataset_config_name="cfg", **columns, **place)
    assert asked == [("cifar100", "cfg", "main", "/cache")] and shards == ["cifar100"]
    assert source.num_classes == 11 and len(source.keys) == 4 and source.read(1)["cls"] == str(images[1][1]).encode()
    monkeypatch.setattr(datasets, "load_dataset", lambda **kwargs: datasets.DatasetDict({"test": data}))
    with pytest.raises(UserError, match="has no split named train, only test"):
        open_images(None, "cifar100", image_column="img")


def test_a_classifier_of_other_classes_is_refused(tmp_path, flags, classifier, capsys):
    options = {"eval_steps": 4, "feature_network": classifier, "eval_class_accuracy": True, "num_classes": 11}
    assert "knows 10 classes and the data have 11" in one_sentence(capsys, train, flags(tmp_path / "out", **options))


def labelled(labels):
    images, _ = rows(len(labels))
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"img": images, "label": labels}, features)


def test_a_split_without_classes_is_refused(tmp_path, flags, capsys):
    """Test splits of the hub have -1 in each row; the network then got no class and no embedding for one."""
    labelled([-1] * 20).save_to_disk(tmp_path / "data")
    assert "no row has a class, the column label holds only negative numbers" in one_sentence(
        capsys, train, flags(tmp_path / "out", dataset_name=tmp_path / "data", num_classes=None)
    )


def test_cached_latents_are_called_by_their_name(tmp_path):
    header = {"format": 1, "shape": [4, 8, 8], "dtype": "float32", "seed": 0, "encoder_sha256": "x"}
    header |= dict.fromkeys(cached_latents.IMAGE_FLAGS, 0)
    latent_shards.write_shard(tmp_path / "0.tar", json.dumps(header).encode(), [], lambda count, size: {"bytes": size})
    with pytest.raises(UserError, match="holds cached latents, and this script trains on images; name the shards"):
        open_images(str(tmp_path / "0.tar"))


def test_data_of_which_nothing_is_usable_are_called_by_their_flag(tmp_path, flags, capsys):
    (tmp_path / "data").mkdir()
    for i in range(8):
        (tmp_path / "data" / f"{i}.png").write_bytes(b"no image")
    changes = {"dataset_name": None, "train_data_dir": tmp_path / "data", "class_conditional": None}
    changes |= {"dataset_image_column_name": None, "num_classes": None}
    assert f"check --train_data_dir={tmp_path / 'data'}, or pass fewer" in one_sentence(
        capsys, train, flags(tmp_path / "out", **changes)
    )


def test_max_train_samples_limits_the_distinct_images(tmp_path, flags, monkeypatch):
    keys, stream = set(), TrainingData._consume

    def consume(self, item):
        keys.update(item["batch"]["keys"])
        return stream(self, item)

    monkeypatch.setattr(TrainingData, "_consume", consume)
    train(flags(tmp_path / "out", max_train_samples=8, max_train_steps=8))
    assert len(keys) == 8
