"""Decoding: from the bytes of an image to upright RGB, for everything that opens images, and from a sample's members
to a square uint8 image and a caption or a class, without torchvision.

Left out: video, audio, ICC profiles, all but the first of several frames or pages."""

import contextlib
import io
import math
import random
import warnings

from common.data import tables
from common.data.folders import IMAGE_KEYS, TEXT_KEYS
from common.data.shards import SampleError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

INTERPOLATION_TYPES = {
    "bilinear": {"mode": "bilinear", "antialias": True},
    "bicubic": {"mode": "bicubic", "antialias": True},
    "lanczos": {"mode": "lanczos", "antialias": True},
    "nearest": {"mode": "nearest"},
    "nearest-exact": {"mode": "nearest-exact"},
}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # of the extensions in `folders.IMAGE_KEYS`
MAX_IMAGE_PIXELS = 178956970 // 2
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_TILE = 258, 262, (322, 323)


def decode_image_text(
    raw: dict[str, bytes],
    rng: random.Random,
    *,
    resolution: int,
    interpolation_type: str = "bilinear",
    center_crop: bool = False,
    random_flip: bool = False,
    proportion_empty_prompts: float = 0.0,
    min_image_size: int = 0,
) -> dict:
    """Decode one image and its caption; the image's shorter side becomes R = `resolution`, then an R x R crop is cut.

    Returns `images` uint8 (3, R, R), `captions` str (empty with probability `proportion_empty_prompts`),
    `original_sizes` int64 (2,) = (height, width) of the source as it is meant to be seen, and `crop_top_lefts`
    int64 (2,) = (top, left) of the crop in pixels of the resized (and flipped) image.
    Draws from `rng` in a fixed order: flip, top, left, empty caption. Raises SampleError: "missing_caption",
    "too_small" (shorter side under `min_image_size`), "too_big" (more than MAX_IMAGE_PIXELS before or after the
    resize, judged before the pixels are decoded), or "decode".
    """
    flip, top, left = random_flip and rng.random() < 0.5, rng.random(), rng.random()
    empty_caption = rng.random() < proportion_empty_prompts
    caption = decode_caption(raw)
    image, original_size, corner = decode_square(
        raw, resolution, interpolation_type, center_crop, flip, top, left, min_image_size
    )
    return {
        "images": image,
        "captions": "" if empty_caption else caption,
        "original_sizes": torch.tensor(original_size),
        "crop_top_lefts": torch.tensor(corner),
    }


def decode_square(raw, resolution, interpolation_type, center_crop, flip, top, left, min_image_size):
    """The image uint8 (3, R, R), its source's (height, width), the crop's (top, left); top and left are fractions."""
    antialias = INTERPOLATION_TYPES[interpolation_type].get("antialias", False)
    image_bytes = image_member(raw)
    with _sample_errors():
        image, original_size = _decode_image(image_bytes, resolution, antialias, min_image_size)
    image = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)  # (1, 3, h, w)
    height, width = _resized_size(*original_size, resolution)
    if (height, width) != tuple(image.shape[2:]):
        image = F.interpolate(image, size=(height, width), **INTERPOLATION_TYPES[interpolation_type])
    if center_crop:
        top, left = (height - resolution) // 2, (width - resolution) // 2
    else:
        top, left = int(top * (height - resolution + 1)), int(left * (width - resolution + 1))
    column = width - resolution - left if flip else left  # (top, left) is a place in the flipped image
    image = image[0, :, top : top + resolution, column : column + resolution]  # (3, R, R)
    return image.flip(2) if flip else image, original_size, (top, left)


def image_member(raw: dict[str, bytes]) -> bytes:
    """The bytes of the image of a raw sample; SampleError "decode" where it has none."""
    data = next((raw[key] for key in IMAGE_KEYS if key in raw), None)
    if data is None:
        raise SampleError("decode", "no image")
    return data


def decode_caption(raw: dict[str, bytes]) -> str:
    """The caption of a raw sample; SampleError "missing_caption", or "decode" where it is no UTF-8."""
    data = next((raw[key] for key in TEXT_KEYS if key in raw), b"")
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SampleError("decode", f"caption: {error}") from error
    if not caption:
        raise SampleError("missing_caption")
    return caption


def _resized_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    if height <= width:
        return resolution, max(resolution, resolution * width // height)
    return max(resolution, resolution * height // width), resolution


def _decode_image(data: bytes, resolution: int, may_shrink: bool, min_image_size: int):
    """RGB pixels uint8 (h, w, 3) and the (height, width) of the source, both as they are meant to be seen.

    Where `may_shrink`, a JPEG of twice the resolution or more is decoded at 1/2, 1/4 or 1/8 of its size.
    """
    image = _open(io.BytesIO(data))
    width, height = image.size
    resized_height, resized_width = _resized_size(height, width, resolution)
    if resized_height * resized_width > MAX_IMAGE_PIXELS:
        raise SampleError("too_big", f"{width} x {height} pixels")
    if min(width, height) < min_image_size:
        raise SampleError("too_small", f"{width} x {height} pixels")
    if may_shrink and min(width, height) >= 2 * resolution:
        image.draft(None, (resolution, resolution))  # never below the resolution; other formats ignore it
    image, is_quarter_turn = _load(image)
    return np.array(image), (width, height) if is_quarter_turn else (height, width)


def read_image(data: bytes) -> Image.Image:
    """The RGB image that these bytes are, whole and as it is meant to be seen, as training sees it.

    Upright by EXIF, transparency on white, 16 bits scaled to 8, of several frames the first. Raises SampleError
    "decode" or "too_big".
    """
    with _sample_errors():
        return _load(_open(io.BytesIO(data)))[0]


def image_size(path) -> tuple[int, int]:
    """(height, width) of a file's `read_image`, from its header. Raises SampleError "decode" or "too_big"."""
    with _sample_errors(), open(path, "rb") as file:
        image = _open(file)
        turn = ORIENTATIONS.get(Image.Image.getexif(image).get(0x0112))  # PNG's own decodes the pixels
        is_quarter_turn = turn in QUARTER_TURNS and image.format != "TIFF"  # whose size is that of the turned image
        return image.size if is_quarter_turn else image.size[::-1]


@contextlib.contextmanager
def _sample_errors():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of files that it repairs; what it cannot repair it raises
            yield
    except SampleError:
        raise
    except Exception as error:  # hostile bytes make Pillow raise nearly anything
        raise SampleError("decode", f"{type(error).__name__}: {error}") from error


def _open(file):
    """The image by its first bytes, whatever it is called; its pixels are not decoded yet."""
    Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleError("too_big", str(error)) from error
    except UnidentifiedImageError:
        file.seek(0)
        found = tables.what_is(file.read(512)) or "no image"
        raise SampleError("decode", f"{found}, not a whole {', '.join(FORMATS)}") from None
    width, height = image.size
    tile = [image.tag_v2.get(tag, 1) for tag in TIFF_TILE] if image.format == "TIFF" else [1]
    if max(width * height, math.prod(tile)) > MAX_IMAGE_PIXELS:
        raise SampleError("too_big", f"{width} x {height} pixels")
    return image


def _load(image):
    """(RGB image, upright, whether that swapped height and width)"""
    image.load()
    turn = ORIENTATIONS.get(image.getexif().get(0x0112))  # of a TIFF it is done by now
    image = _to_rgb(image)
    return (image if turn is None else image.transpose(turn)), turn in QUARTER_TURNS


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode that FORMATS have: transparency on white, 16 bits scaled to 8."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = tags.get(TIFF_BITS, (16,))[0]
    if image.mode == "F" or image.mode.startswith("I") and (bits != 16 or tags and image.mode == "I"):
        raise SampleError("decode", f"{bits} bits in one channel, of which it is not known what is white")
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)  # (h, w)
        values = 65535 - values if tags.get(TIFF_PHOTOMETRIC) == 0 else values  # 0 is white there
        grey = ((values + 128) // 257).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = [ORIENTATIONS[value] for value in (5, 6, 7, 8)]
