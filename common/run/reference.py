"""Reference images: which files are meant, and their features."""

import io
import itertools
import tarfile
import zipfile
from pathlib import Path

from common.data.folders import IMAGE_KEYS, list_images, reference_images
from common.data.images import read_image
from common.data.shards import SampleError, expand_shards, is_remote, tar_samples, training_tars
from common.errors import UserError, blame, mask_credentials, speaking_of
from common.results.metrics import image_features

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm


def reference_files(reference):
    """reference -> ("npz" | "tar" | "folder", list of files)."""
    path = Path(reference)
    if path.suffix == ".npz":
        return "npz", [path]
    if path.is_dir():
        tars = [Path(tar) for tar in training_tars(str(path))]
        return ("tar", tars) if tars else ("folder", reference_folder(path)[0])
    with speaking_of("`reference`"):
        shards = expand_shards(reference)
    if remote := next(filter(is_remote, shards), None):
        raise UserError(f"`reference`: {mask_credentials(remote)} is no local file, and only those are read: copy it")
    return "tar", [Path(shard) for shard in shards]


def reference_folder(folder):
    """(paths of the images that training would list in a folder, what is to be said of it)"""
    listing = list_images(folder)
    return [Path(folder, image) for image in reference_images(listing)], listing.notes


def check_reference(reference):
    """UserError unless a reference is there and two images of it can be read; the others are seen later."""
    kind, files = reference_files(reference)
    if not files:
        raise UserError(
            f"`reference` {reference} holds neither images ({', '.join(IMAGE_KEYS)}) nor *.tar: name another"
        )
    if kind == "npz":
        with blame(f"`reference` {files[0]} is no .npz file", OSError, ValueError, zipfile.BadZipFile):
            names = npz_names(reference)
        if not {"features", "images", "arr_0"} & set(names):
            raise UserError(f"`reference` {files[0]} holds neither images, arr_0 nor features")
        if "features" in names:
            return
    checked_count(read_batch(iterate_images(reference, 8, 8), 2, reference), reference)


def npz_names(reference):
    """Names of the arrays in an .npz reference; none for other references."""
    kind, files = reference_files(reference)
    if kind != "npz":
        return []
    with np.load(files[0], allow_pickle=False) as arrays:
        return list(arrays.files)


def iterate_images(reference, height, width):
    """Reference images one by one: uint8 (3, height, width).

    Images of folders and tars are those that training would take and look as they do there. Each is scaled until it
    covers height x width (bicubic, antialiased) and the middle is kept. An .npz holds `images` or `arr_0`: uint8
    (N, H, W, 3).
    """
    kind, files = reference_files(reference)
    if kind == "folder":
        for file in files:
            yield to_tensor(file, file, height, width)
    elif kind == "tar":
        for file in files:
            with open(file, "rb") as opened:
                for _, key, raw in tar_samples(opened, (IMAGE_KEYS,)):
                    if image_key := next((extension for extension in IMAGE_KEYS if extension in raw), None):
                        data = io.BytesIO(raw[image_key] or b"")  # None: too big to be read
                        yield to_tensor(data, f"{key}.{image_key} in {file}", height, width)
    else:
        with np.load(files[0], allow_pickle=False) as arrays:
            images = arrays["images" if "images" in arrays.files else "arr_0"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(f"`reference` {files[0]} holds {images.dtype} {images.shape}, not uint8 (N, H, W, 3)")
        for image in images:
            yield fit(Image.fromarray(image), height, width)


def to_tensor(file, name, height, width):
    """An image as training sees it, fitted: uint8 (3, height, width). file: a path, or an open binary file."""
    try:
        data = file.read() if hasattr(file, "read") else Path(file).read_bytes()
        return fit(read_image(data), height, width)
    except (OSError, SampleError) as error:
        raise UserError(
            f"`reference`: {name} is no readable image ({getattr(error, 'detail', error)}): remove it"
        ) from error


def fit(image, height, width):
    fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def probe_features(network, height, width):
    """Features of one fixed image, by which stored features tell whether they are this network's: float32 (d)."""
    ramp = torch.arange(3 * height * width).remainder(251).to(torch.uint8)
    return image_features(network, ramp.reshape(1, 3, height, width))[0]


def read_features(path, network, height, width):
    """Features that an earlier run wrote: float32 (N, d); UserError unless of this network and image size."""
    with np.load(path, allow_pickle=False) as arrays:
        if missing := {"features", "probe", "height", "width"} - set(arrays.files):
            raise UserError(f"`reference` {path} has no {sorted(missing)[0]}: give the images instead")
        size = (arrays["height"].item(), arrays["width"].item())
        features, probe = (torch.from_numpy(arrays[name]).float() for name in ("features", "probe"))
    if size != (height, width):
        raise UserError(
            f"`reference` {path} is of images of {size[0]}x{size[1]}, not {height}x{width}: give the images instead"
        )
    expected = probe_features(network, height, width)
    if probe.shape != expected.shape or not torch.allclose(probe, expected, rtol=1e-2, atol=1e-2 * expected.std()):
        raise UserError(f"`reference` {path} holds features of another network: give the images instead")
    return features


def reference_features(reference, network, height, width, batch_size=64, limit=None):
    """Features of the first `limit` reference images: float32 (N, d). One batch of images is in memory at a time."""
    if "features" in npz_names(reference):
        path = reference_files(reference)[1][0]
        return checked_count(read_features(path, network, height, width)[:limit], reference)
    for note in reference_folder(reference)[1] if reference_files(reference)[0] == "folder" else ():
        print(f"the reference: {note}.", flush=True)
    images = itertools.islice(iterate_images(reference, height, width), limit)
    features = []
    with tqdm(desc="reference", unit="image", delay=5) as progress:
        while batch := read_batch(images, batch_size, reference):
            features.append(image_features(network, torch.stack(batch), batch_size))
            progress.update(len(batch))
    return checked_count(torch.cat(features) if features else [], reference)


def read_batch(images, batch_size, reference):
    with blame(
        f"`reference` {reference} is damaged or no file of images",
        SampleError,
        tarfile.TarError,
        zipfile.BadZipFile,
        OSError,
        EOFError,
        ValueError,
        way_out="make it anew",
    ):
        return list(itertools.islice(images, batch_size))


def checked_count(features, reference):
    if len(features) < 2:
        raise UserError(f"`reference` {reference} gave {len(features)} images: a distance needs at least two")
    return features
