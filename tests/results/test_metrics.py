"""common/results/metrics.py against independent references, on random networks of a few thousand weights."""

import json
import math

from common.results import metrics
from common.results.samples import image_grid
from common.tools import prompt_metrics

import numpy as np
import pytest
import scipy.linalg
import torch
import transformers
from PIL import Image
from transformers.models.clip.configuration_clip import CLIPConfig

LABELS = {0: "zero", 1: "one", 2: "two, deuce"}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_images(count=5, height=20, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def resnet_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=LABELS
    )
    transformers.ResNetForImageClassification(config).save_pretrained(path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_tokenizer(path)
    text = {**VISION, "vocab_size": 600, "max_position_embeddings": 20, "eos_token_id": 513, "bos_token_id": 512}
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    transformers.CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(path)
    return path


def save_tokenizer(path):
    """A CLIPTokenizer that knows single bytes only: 256 of them, 256 that end a word, start and end of text."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path)
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(path)
    return tokenizer


# Distances


@pytest.mark.parametrize("counts", [(200, 150), (6, 150), (6, 5)])
def test_frechet_distance_agrees_with_the_matrix_square_root(counts):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(8, 8))
    a, b = rng.normal(size=(counts[0], 8)), rng.normal(size=(counts[1], 8)) @ mix + 0.5
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s_a @ s_b + 0j).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s_a + s_b - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert metrics.frechet_distance(b, a) == pytest.approx(metrics.frechet_distance(a, b), rel=1e-10)


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form():
    """Whitened samples have exactly the moments that the closed form uses."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(100, 5)), rng.normal(size=(80, 5))
    a, b = (whitened(x) for x in (a, b))
    std_a, std_b, mean_b = rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5), rng.normal(size=5)
    expected = np.square(mean_b).sum() + np.square(std_a - std_b).sum()
    assert metrics.frechet_distance(a * std_a, b * std_b + mean_b) == pytest.approx(expected, rel=1e-10)


def whitened(x):
    x = x - x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


def test_frechet_distance_of_equal_sets_is_zero_even_with_fewer_images_than_features():
    features = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)) * 100
    assert metrics.frechet_distance(features, features.flip(0)) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("block_size", [3, 7, 2048])
def test_kernel_distance_agrees_with_a_double_loop(block_size):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(12, 4)), rng.normal(size=(9, 4)) + 0.3

    def k(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 4 + 1) ** 3

    within = [np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    expected = sum(within) - 2 * np.mean([k(x, y) for x in a for y in b])
    assert metrics.kernel_distance(a, b, block_size) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased_where_the_frechet_distance_is_not():
    rng = np.random.default_rng(3)
    pairs = [(rng.normal(size=(20, 4)), rng.normal(size=(30, 4))) for _ in range(400)]
    distances = np.array([metrics.kernel_distance(a, b) for a, b in pairs])
    assert abs(distances.mean()) < 4 * distances.std() / len(pairs) ** 0.5
    assert (distances < 0).any()
    assert np.mean([metrics.frechet_distance(a, b) for a, b in pairs]) > 0.1


@pytest.mark.parametrize("distance", [metrics.frechet_distance, metrics.kernel_distance])
def test_distances_refuse_what_has_none(distance):
    good = torch.randn(5, 3)
    for other in (good[:1], good * float("nan")):
        with pytest.raises(ValueError, match="2 or more features without NaN"):
            distance(good, other)


# Networks


def test_classifier_features_and_logits(resnet_dir):
    network = metrics.load_feature_network(resnet_dir)
    images = make_images()
    features, logits = (
        metrics.image_features(network, images, batch_size=2),
        metrics.class_logits(network, images, batch_size=2),
    )
    assert features.shape == (5, 16) and features.dtype == torch.float32 and logits.shape == (5, 3)
    model = transformers.ResNetForImageClassification.from_pretrained(resnet_dir).eval()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pixels = transformers.ViTImageProcessorPil.from_pretrained(resnet_dir)(pictures, return_tensors="pt")[
        "pixel_values"
    ]
    with torch.no_grad():
        pooled = model.resnet(pixels).pooler_output.flatten(1)
        torch.testing.assert_close(features, pooled)
        torch.testing.assert_close(logits, model.classifier(pooled))


def test_preprocessing_is_pils(resnet_dir):
    """Each pixel_value by hand: PIL's bilinear resize, then (x / 255 - 0.5) / 0.5."""
    seen = []
    network = metrics.load_feature_network(resnet_dir)
    handle = network.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    images = make_images(2, 50, 40)
    metrics.image_features(network, images)
    handle.remove()
    for image, pixels in zip(images, seen[0], strict=True):
        resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_vit_classifier_features_enter_its_last_layer(tmp_path):
    config = transformers.ViTConfig(**VISION, image_size=32, patch_size=8, id2label=LABELS)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    network = metrics.load_feature_network(tmp_path)
    images = make_images()
    expected = metrics.class_logits(network, images)
    torch.testing.assert_close(network.model.classifier(metrics.image_features(network, images)), expected)


def test_dinov2_features_are_the_pooled_output(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    transformers.BitImageProcessorPil(**size).save_pretrained(tmp_path)
    images = make_images()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pixels = transformers.BitImageProcessorPil.from_pretrained(tmp_path)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = transformers.Dinov2Model.from_pretrained(tmp_path).eval()(pixels).last_hidden_state[:, 0]
    network = metrics.load_feature_network(tmp_path)
    torch.testing.assert_close(metrics.image_features(network, images, batch_size=3), expected)
    with pytest.raises(ValueError, match="not an image classifier"):
        metrics.class_logits(network, images)


def test_clip_vision_tower_with_projection(tmp_path):
    config = transformers.CLIPVisionConfig(**VISION, image_size=32, patch_size=8, projection_dim=12)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(tmp_path)
    network = metrics.load_feature_network(tmp_path)
    assert metrics.image_features(network, make_images()).shape == (5, 12)
    with pytest.raises(ValueError, match="does not read text"):
        prompt_metrics.clip_score(network, make_images(1), ["zero"])


def test_clip_score_agrees_with_the_models_own_logits(clip_dir):
    images, prompts = make_images(3), ["a zero", "one", "a zero and very very many more words than it reads"]
    network = metrics.load_feature_network(clip_dir)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(clip_dir)(pictures, return_tensors="pt")[
        "pixel_values"
    ]
    model = transformers.CLIPModel.from_pretrained(clip_dir).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_dir)
    cosines = []
    for image, prompt in zip(pixels, prompts, strict=True):  # one by one: no padding, no batches
        tokens = tokenizer([prompt], truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            output = model(pixel_values=image[None], **tokens)
        cosines.append(output.logits_per_image.item() / model.logit_scale.exp().item())
    expected = 100 * sum(cosines) / 3
    assert prompt_metrics.clip_score(network, images, prompts, batch_size=2) == pytest.approx(expected, abs=1e-4)


def test_prompt_labels():
    found = prompt_metrics.prompt_labels(LABELS, ["a ONE.", "zero", "deuce of spades", "two", "a ONE."])
    assert found == [1, 0, 2, 2, 1]
    for prompt, names in [("someone", "none"), ("one or zero", "zero, one")]:
        with pytest.raises(ValueError, match=f"names {names}"):
            prompt_metrics.prompt_labels(LABELS, [prompt])


def test_class_statistics(resnet_dir, monkeypatch):
    """Two prompts: classes 0 and 1 fit the first, 2 the second; the first's six images show 0 three times, 1, 2, 1."""
    network, images = metrics.load_feature_network(resnet_dir), make_images(8)
    shares = torch.tensor([[0.5, 0.25, 0.25]] * 3 + [[0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.25, 0.5, 0.25]])
    shares = torch.cat([shares, torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])])
    monkeypatch.setattr(metrics, "class_logits", lambda *_: shares.log())
    seen = metrics.class_statistics(network, images, [(0, 1)] * 6 + [(2,)] * 2)
    assert seen["accuracy"] == 6 / 8 and seen["confidence"] == pytest.approx((6 * 0.5 + 2) / 8)
    assert seen["classes"] == pytest.approx((math.exp(scipy.stats.entropy([3, 2])) + 1) / 2)


def test_folders_without_preprocessing_or_with_missing_weights_are_refused(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        metrics.load_feature_network(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="lacks weights"):
        metrics.load_feature_network(tmp_path)


# Grid


def test_image_grid_shows_every_pixel():
    rows = [make_images(3, 4, 5, seed=1), make_images(2, 4, 5, seed=2)]
    grid = np.array(image_grid(rows, scale=2))
    assert grid.shape == (4 + 2 * (8 + 4), 3 * (10 + 4), 3)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            shown = grid[4 + row * 12 :, column * 14 :][:8, :10]
            assert (shown[::2, ::2] == image.permute(1, 2, 0).numpy()).all()
            assert (shown[1::2, 1::2] == shown[::2, ::2]).all()


def test_image_grid_labels_take_room_and_draw_something():
    rows = [make_images(2, 16, 16)]
    grid = np.array(image_grid(rows, ["a long label"], ["short", "many words that do not fit " * 5], scale=2))
    bare = np.array(image_grid(rows, scale=2))
    assert grid.shape[0] > bare.shape[0] and grid.shape[1] > bare.shape[1]
    assert (grid[:10] < 128).any() and (grid[:, :30] < 128).any()
