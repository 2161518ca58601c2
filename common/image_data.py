"""Labelled images from the hub, from a local Hugging Face data set or from an image folder, for `data.TrainingData`.

`datasets` reads the tables; images stay the bytes that they were stored as and go through the same decoder, order and
counts as samples of tar shards. Nothing is downloaded that runs: data sets that are scripts are refused by `datasets`.
"""

from pathlib import Path

from common.latents import read_manifest
from common.shards import IMAGE_KEYS, DataError, expand_shards

MAGIC = {b"\x89PNG": "png", b"\xff\xd8": "jpg", b"RIFF": "webp"}


class LabelledImages:
    """The rows of a data set: `keys`, `num_classes` (None without classes), and read(index) as TrainingData wants it.

    dataset: a datasets.Dataset. image_column: of feature Image. label_column: whole numbers, or None to leave classes
    out; its feature may say how many. DataError names `flag` where a column is missing or of another kind.
    """

    def __init__(self, dataset, name, flag, image_column="image", label_column=None):
        import datasets

        columns = ", ".join(dataset.column_names)
        if image_column not in dataset.column_names:
            raise DataError(f"{flag} has no column {image_column}: --dataset_image_column_name is one of {columns}")
        if not isinstance(dataset.features[image_column], datasets.Image):
            raise DataError(f"{flag}: the column {image_column} does not hold images; its columns are {columns}")
        self._images = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self._column, self._labels, self.num_classes = image_column, None, None
        if label_column is not None:
            if label_column not in dataset.column_names:
                raise DataError(
                    f"{flag} has no column {label_column}: --dataset_class_label_column_name is one of {columns}, and "
                    "an image folder has classes where its images lie in two or more subfolders"
                )
            feature = dataset.features[label_column]
            self._labels = dataset[label_column][:]
            if not self._labels or any(type(label) is not int for label in self._labels):
                raise DataError(f"{flag}: the column {label_column} must hold a whole number, the class, in each row")
            if max(self._labels) < 0:
                raise DataError(f"{flag}: no row has a class, the column {label_column} holds only negative numbers")
            names = getattr(feature, "names", None)
            self.num_classes = len(names) if names else max(self._labels) + 1
        self.name, self.flag, self.keys = name, flag, [f"{index:08d}" for index in range(len(dataset))]

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
        extension = next((ext for magic, ext in MAGIC.items() if data.startswith(magic)), IMAGE_KEYS[0])
        label = {} if self._labels is None else {"cls": str(self._labels[index]).encode()}
        return {extension: data} | label


def load_labelled_images(
    dataset_name, train_data_dir, dataset_config_name, image_column, label_column, cache_dir, revision
):
    """The training split of a data set of the hub or a folder (`dataset_name`), or an image folder (`train_data_dir`).

    A local folder is what `Dataset.save_to_disk` wrote, or files that `datasets.load_dataset` reads (parquet, csv with
    image paths, ...). In an image folder each subfolder is a class; metadata.csv or .jsonl may give a `label` instead.
    Raises DataError when nothing is found or it is not as described.
    """
    import datasets

    datasets.disable_progress_bars()
    if dataset_name is None:
        flag = f"--train_data_dir={train_data_dir}"
        if not Path(train_data_dir).is_dir():
            raise DataError(f"{flag}: there is no such folder")
        options = {"path": "imagefolder", "data_dir": str(train_data_dir)}
    else:
        flag = f"--dataset_name={dataset_name}"
        options = {"path": dataset_name, "name": dataset_config_name, "revision": revision}
    is_saved = dataset_name and any(Path(dataset_name, f).is_file() for f in ("state.json", "dataset_dict.json"))
    if is_saved and dataset_config_name:
        raise DataError(f"--dataset_config_name: {flag} was saved to disk without configurations; drop it")
    try:
        if is_saved:
            dataset = datasets.load_from_disk(dataset_name)
        else:
            dataset = datasets.load_dataset(**options, cache_dir=cache_dir)
    except Exception as error:  # of the hub, of parquet, of Arrow, of the file system: each has its own
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{flag} cannot be loaded ({type(error).__name__}: {reason}); check the name") from None
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise DataError(f"{flag} has no split named train, only {', '.join(dataset)}")
        dataset = dataset["train"]
    if len(dataset) == 0:
        raise DataError(f"{flag} holds no images")
    if dataset_name is None and label_column not in (None, "label") and "label" in dataset.column_names:
        dataset = dataset.rename_column("label", label_column) if label_column not in dataset.column_names else dataset
    if dataset_name is None and image_column not in dataset.column_names and "image" in dataset.column_names:
        dataset = dataset.rename_column("image", image_column)
    name = str(dataset_name or train_data_dir)
    return LabelledImages(dataset, name, flag, image_column, label_column)


def open_images(
    shards,
    dataset_name=None,
    train_data_dir=None,
    dataset_config_name=None,
    image_column="image",
    label_column=None,
    cache_dir=None,
    revision=None,
):
    """What TrainingData is to read: its list of shards, and the source beside it, None for shards.

    One of `shards` (--train_shards_path_or_url), `dataset_name` and `train_data_dir` is given. label_column: None
    where classes are not wanted. DataError as from `expand_shards` and `load_labelled_images`.
    """
    if not shards:
        source = load_labelled_images(
            dataset_name, train_data_dir, dataset_config_name, image_column, label_column, cache_dir, revision
        )
        return [source.name], source
    folder = Path(str(shards))
    if folder.is_dir() and not any(folder.glob("*.tar")) and not any(folder.glob("*.tar.gz")):
        raise DataError(
            f"--train_shards_path_or_url={shards} is a folder without *.tar shards; pass images as --train_data_dir"
        )
    found = expand_shards(shards)
    if read_manifest(found) is not None:
        raise DataError(
            f"--train_shards_path_or_url={shards} holds cached latents, and this script trains on images; name the "
            "shards that encode_shards read"
        )
    return found, None
