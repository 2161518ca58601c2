"""How images and captions are decoded."""

import random

from common.data.images import INTERPOLATION_TYPES, decode_image_text
from common.data.shards import SampleError
from tests.data.making import R, encode, png_header, random_image

import numpy as np
import pytest
import torch
from PIL import Image


def decode_image(image_bytes, resolution=None, extension="png", **options):
    options = {"resolution": resolution, "center_crop": True} | options
    return decode_image_text({extension: image_bytes, "txt": b" a caption\n"}, random.Random(0), **options)


def pixels(sample):
    return sample["images"].permute(1, 2, 0).numpy().astype(int)  # (R, R, 3)


def smooth_image(height, width):
    """Sinusoids of several scales and some noise, like a photograph."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:height, :width]
    image = rng.normal(0, 6, (height, width, 3)) + 128
    for scale in (7, 31, 83):
        a, b, phase = rng.normal(0, 1 / scale, 3), rng.normal(0, 1 / scale, 3), rng.uniform(0, 6, 3)
        image += 30 * np.sin(x[..., None] * a + y[..., None] * b + phase)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(480, 640), (333, 250), (64, 64), (97, 31), (1000, 1400)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "lanczos"])
def test_the_resize_is_within_one_grey_level_of_pillow(size, mode):
    image, short = smooth_image(*size), min(size)
    height, width = size[0] * 64 // short, size[1] * 64 // short
    expected = image.resize((width, height), Image.Resampling[mode.upper()])
    top, left = (height - 64) // 2, (width - 64) // 2
    expected = np.asarray(expected).astype(int)[top : top + 64, left : left + 64]
    sample = decode_image(encode(image), 64, interpolation_type=mode)
    assert np.abs(pixels(sample) - expected).max() <= 1
    assert sample["crop_top_lefts"].tolist() == [top, left] and sample["original_sizes"].tolist() == list(size)


@pytest.mark.parametrize("mode", INTERPOLATION_TYPES)
def test_every_interpolation_type_works(mode):
    sample = decode_image(encode(smooth_image(90, 120)), 32, interpolation_type=mode)
    assert sample["images"].shape == (3, 32, 32) and sample["images"].dtype == torch.uint8


def test_a_large_jpeg_is_decoded_at_a_fraction(monkeypatch):
    image = smooth_image(103, 130).resize((1300, 1030), Image.Resampling.BICUBIC)
    loaded = []
    original = Image.Image.getexif
    monkeypatch.setattr(Image.Image, "getexif", lambda self: (loaded.append(self.size), original(self))[1])
    sample = decode_image(encode(image, "JPEG", quality=95), 128, "jpg")
    assert loaded[-1] == (163, 129) and sample["original_sizes"].tolist() == [1030, 1300]
    reference = image.resize((1300 * 128 // 1030, 128), Image.Resampling.BILINEAR)
    left = (reference.width - 128) // 2
    difference = np.abs(pixels(sample) - np.asarray(reference).astype(int)[:, left : left + 128])
    assert difference.mean() < 4
    decode_image(encode(image, "JPEG"), 600, "jpg")
    assert loaded[-1] == (1300, 1030)


def test_crops_and_flips_say_where_they_are():
    rows, columns = np.mgrid[:20, :50]
    source = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    raw = {"png": encode(Image.fromarray(source)), "caption": b"x"}
    flips, tops, lefts = set(), set(), set()
    for resolution, array in ((20, source), (20, source.transpose(1, 0, 2))):
        raw["png"] = encode(Image.fromarray(array))
        for seed in range(200):
            sample = decode_image_text(raw, random.Random(seed), resolution=resolution, random_flip=True)
            top, left = sample["crop_top_lefts"].tolist()
            flip = int(np.any(pixels(sample)[0, 0] > pixels(sample)[0, -1]))
            image = array[:, ::-1] if flip else array
            assert (pixels(sample) == image[top : top + 20, left : left + 20]).all()
            flips.add(flip), tops.add(top), lefts.add(left)
    assert flips == {0, 1} and {0, 30} <= tops and {0, 30} <= lefts


def test_captions():
    def caption(raw, **options):
        image = {"png": encode(random_image(0))}
        return decode_image_text(image | raw, random.Random(0), resolution=R, **options)["captions"]

    assert caption({"txt": "Grüße\n".encode()}) == "Grüße"
    assert caption({"caption": b"\xef\xbb\xbfx"}) == "x" and caption({"text": b"a", "txt": b"b"}) == "a"
    assert caption({"txt": b"x"}, proportion_empty_prompts=1.0) == ""
    for raw, reason in [({}, "missing_caption"), ({"txt": b" "}, "missing_caption"), ({"txt": b"\xff\xfe"}, "decode")]:
        with pytest.raises(SampleError) as caught:
            caption(raw)
        assert caught.value.reason == reason
    rng = random.Random(1)
    raw = {"png": encode(random_image(0)), "txt": b"x"}
    shares = [decode_image_text(raw, rng, resolution=R, proportion_empty_prompts=0.25)["captions"] for _ in range(400)]
    assert 60 < shares.count("") < 140


def test_16_bit_grey_is_scaled():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    expected = np.round(values / 257).astype(int)[..., None]
    assert (pixels(decode_image(encode(image), 8)) == expected).all()


def test_transparency_is_laid_on_white():
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    rgba[:4, :, 3] = 0
    alpha = rgba[..., 3:] / 255.0
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(decode_image(encode(Image.fromarray(rgba)), 8)) - expected).max() <= 1
    webp = encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)
    assert np.abs(pixels(decode_image(webp, 8, "webp")) - expected).max() <= 1

    la = Image.fromarray(rgba[..., 2:])
    assert la.mode == "LA"
    expected = rgba[..., 2:3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(decode_image(encode(la), 8)) - expected).max() <= 1


def test_palettes():
    indices = np.random.default_rng(0).integers(0, 4, (8, 8), dtype=np.uint8)
    palette = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30], [0, 0, 0]], dtype=np.uint8)
    image = Image.frombytes("P", (8, 8), indices.tobytes())
    image.putpalette(palette.tobytes())
    assert (pixels(decode_image(encode(image), 8)) == palette[indices]).all()
    transparent = encode(image, transparency=2)
    palette[2] = 255
    assert (pixels(decode_image(transparent, 8)) == palette[indices]).all()


def test_grey_bilevel_cmyk_and_transparent_colours():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    assert (pixels(decode_image(encode(Image.fromarray(grey)), 8)) == grey[..., None]).all()
    assert (pixels(decode_image(encode(Image.fromarray(grey > 99)), 8)) == 255 * (grey > 99)[..., None]).all()
    colour = pixels(decode_image(encode(Image.fromarray(grey), transparency=8), 8))
    assert (colour[grey == 8] == 255).all() and (colour[grey == 12] == 12).all()
    cmyk = Image.new("RGB", (64, 64), (200, 60, 20)).convert("CMYK")
    assert np.abs(pixels(decode_image(encode(cmyk, "JPEG", quality=98), 32, "jpg")) - [200, 60, 20]).max() <= 6


@pytest.mark.parametrize(
    "image_bytes, reason",
    [
        (png_header(20000, 10050), "too_big"),
        (png_header(9000, 10050), "too_big"),  # where Pillow alone would only warn
        (png_header(100, 100), "decode"),  # no pixels
        (encode(Image.new("L", (2, 4000))), "too_big"),  # 512 x 1,024,000 after the resize
        (encode(Image.new("L", (5, 40))), "too_small"),
        (encode(random_image(0), "JPEG")[:-300], "decode"),
        (encode(random_image(0))[:-200], "decode"),
        (encode(random_image(0), "PPM"), "decode"),
        (b"", "decode"),
    ],
    ids=["200 Mpx", "90 Mpx", "no pixels", "long", "small", "cut jpeg", "cut png", "ppm", "empty"],
)
def test_images_that_are_refused(image_bytes, reason, recwarn):
    with pytest.raises(SampleError) as caught:
        decode_image(image_bytes, 512, min_image_size=6 if reason == "too_small" else 0)
    assert caught.value.reason == reason and not recwarn.list
