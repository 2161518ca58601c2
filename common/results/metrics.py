"""How close generated images are to reference images: Fréchet and kernel distances on the features of any image
network that transformers loads, and what a classifier sees in them.

Images are uint8 tensors (N, 3, H, W) everywhere. Distances are estimates that depend on the network, its preprocessing
and the number of images (few images bias the Fréchet distance upwards, the kernel distance not at all), and compare
only where all three agree. Not here: the Inception network of the original FID (transformers has none), precision and
recall.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from tqdm import tqdm


def frechet_distance(features_a, features_b):
    """Fréchet distance between Gaussians fitted to two feature sets (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

        d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    With centred features A and B, tr (S_a S_b)^(1/2) is the sum of the singular values of A B^T divided by
    sqrt((n_a - 1) (n_b - 1)); triangular factors R of A = QR shrink that product to (d, d). No root of a noisy
    eigenvalue is taken, so that fewer images than features are no numerical problem (they remain a statistical one).

    features_a, features_b: (n_a, d) and (n_b, d), tensors or arrays. Computed in float64 on the CPU. Returns d^2, a
    float, never below 0. ValueError: fewer than two images on a side, NaN or infinity.
    """
    features_a, features_b = _feature_pair(features_a, features_b)
    mean_a, mean_b = features_a.mean(0), features_b.mean(0)
    centred_a = (features_a - mean_a) / (len(features_a) - 1) ** 0.5  # S_a = centred_a^T centred_a
    centred_b = (features_b - mean_b) / (len(features_b) - 1) ** 0.5
    r_a = torch.linalg.qr(centred_a, mode="r").R  # (min(n_a, d), d)
    r_b = torch.linalg.qr(centred_b, mode="r").R
    trace_of_root = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * trace_of_root
    return max(distance.item(), 0.0)


def kernel_distance(features_a, features_b, block_size=2048):
    """Unbiased squared maximum mean discrepancy, k(x, y) = (x.y / d + 1)^3 (KID: Binkowski et al. 2018, eq. 4).

        MMD^2 = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

    Over all images at once rather than averaged over random subsets: the same expectation, less variance, no seed. At
    most block_size x block_size kernel values are in memory. The expectation is 0 for equal distributions, so that a
    small negative value is normal.

    features_a, features_b: (n_a, d) and (n_b, d), tensors or arrays. Computed in float64 on the CPU. Returns a float,
    not multiplied by 1000. ValueError: fewer than two images on a side, NaN or infinity.
    """
    features_a, features_b = _feature_pair(features_a, features_b)
    n_a, n_b, d = len(features_a), len(features_b), features_a.shape[1]

    def kernel_sum(x, y):
        return sum((p @ q.T / d + 1).pow(3).sum().item() for p in x.split(block_size) for q in y.split(block_size))

    def kernel_diagonal_sum(x):
        return (x.square().sum(1) / d + 1).pow(3).sum().item()

    within_a = (kernel_sum(features_a, features_a) - kernel_diagonal_sum(features_a)) / (n_a * (n_a - 1))
    within_b = (kernel_sum(features_b, features_b) - kernel_diagonal_sum(features_b)) / (n_b * (n_b - 1))
    return within_a + within_b - 2 * kernel_sum(features_a, features_b) / (n_a * n_b)


def diversity(features, groups=None):
    """Spread of images: the root mean square distance of features from the mean of their group.

        sqrt(sum_g sum_{i in g} |f_i - mean_g|^2 / (N - number of groups))

    With groups that are prompts it is how different the images of one prompt are, which lost modes make smaller. Where
    most images are the only one of their group, all are taken as one group.

    features: (N, d), N >= 2. groups: N hashables, or None: one group. Computed in float64 on the CPU; a float.
    """
    features = torch.as_tensor(features).detach().to("cpu", torch.float64)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups or ()))}
    if 2 * len(numbers) > len(features) or not numbers:
        groups, numbers = [None] * len(features), {None: 0}
    index = torch.tensor([numbers[group] for group in groups])
    sums = torch.zeros(len(numbers), features.shape[1], dtype=torch.float64).index_add_(0, index, features)
    means = sums / torch.bincount(index).unsqueeze(1)
    return ((features - means[index]).square().sum() / (len(features) - len(numbers))).sqrt().item()


def saturation(images):
    """Contrast and colour of images: the standard deviation of each one's values, in 0..1, over pixels and channels.

    Guided too much it rises, of blur it falls; of images without colour it is their contrast. images: uint8
    (N, 3, H, W). Returns float32 (N,).
    """
    return (images.flatten(1).float() / 255).std(1, correction=0)


def _feature_pair(features_a, features_b):
    """Both feature sets as float64 CPU tensors (n, d)."""
    features_a, features_b = (torch.as_tensor(f).detach().to("cpu", torch.float64) for f in (features_a, features_b))
    for features in (features_a, features_b):
        if len(features) < 2 or not torch.isfinite(features).all():
            raise ValueError(f"a distance needs 2 or more features without NaN and infinity, not {len(features)}")
    return features_a, features_b


class FeatureNetwork(NamedTuple):
    """What `load_feature_network` returns: plain parts that belong together."""

    model: Any  # a transformers model in eval mode
    processor: Any  # its image processor (PIL)
    tokenizer: Any  # its tokenizer where it reads text (CLIP), else None
    name: str


def load_feature_network(name_or_path, device="cpu", cache_dir=None):
    """Load an image network and its preprocessing: CLIP, DINOv2, any transformers image classifier.

    name_or_path: a hub name, or a folder as `save_pretrained` of the model and of its image processor leave it (CLIP
    for a CLIP score: of its tokenizer too). Images are preprocessed with PIL (whether or not torchvision is installed,
    so that numbers agree between machines). Returns a FeatureNetwork. ValueError: no preprocessor_config.json, a class
    that transformers lacks, or weights missing from the checkpoint (their random values would make the features).
    """
    import transformers

    name, where = str(name_or_path), {"cache_dir": cache_dir}
    config = transformers.AutoConfig.from_pretrained(name, **where)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil", **where)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no usable preprocessor_config.json: save its image processor "
            "(such as ViTImageProcessor) into the same folder"
        ) from error
    architecture = (config.architectures or ["AutoModel"])[0]
    if not hasattr(transformers, architecture):
        raise ValueError(f"transformers has no {architecture}, which {name} asks for")
    model, info = getattr(transformers, architecture).from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **where
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{name} lacks weights of {type(model).__name__} ({sorted(info['missing_keys'])[0]}, ...), "
            "so that its features would be random"
        )
    reads_text = hasattr(model, "get_text_features")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where) if reads_text else None
    return FeatureNetwork(model.eval().requires_grad_(False).to(device), processor, tokenizer, name)


def image_features(network, images, batch_size=64):
    """Features of images: uint8 (N, 3, H, W) -> float32 (N, d) on the CPU.

    CLIP: the projected image embedding (`image_embeds`, not normalized). A classifier: what enters its last linear
    layer. Any other network (DINOv2, CLIP's vision tower alone): its `pooler_output`.
    """
    return _run_network(network, images, batch_size, _pooled_output)


def class_logits(network, images, batch_size=64):
    """Logits of an image classifier: uint8 (N, 3, H, W) -> float32 (N, number of classes) on the CPU."""
    if not _is_classifier(network.model):
        raise ValueError(f"{network.name} is a {type(network.model).__name__}, not an image classifier")
    return _run_network(network, images, batch_size, lambda model, pixels: model(pixel_values=pixels).logits)


def class_statistics(network, images, allowed, batch_size=64):
    """What a classifier sees in images: whether they fit their prompts, how varied and how clear they are.

    network: a classifier from `load_feature_network`; images: uint8 (N, 3, H, W); allowed: for each image the tuple of
    class indices that its prompt allows. Returns {"accuracy": the fraction of images whose most likely class is
    allowed, "classes": exp(-sum p log p) over the p of the classes that were seen among those a prompt allows, its
    mean over the distinct prompts (at most their number), "confidence": the mean probability of the likeliest class}.
    """
    confidence, predicted = class_logits(network, images, batch_size).double().softmax(1).max(1)
    predicted, seen = predicted.tolist(), {classes: Counter() for classes in allowed}
    for classes, index in zip(allowed, predicted, strict=True):
        seen[classes][index] += index in classes
    numbers = []
    for counts in seen.values():
        p = torch.tensor([n for n in counts.values() if n] or [1], dtype=torch.float64)
        numbers.append(torch.special.entr(p / p.sum()).sum().exp().item())
    hits = sum(counts.total() for counts in seen.values())
    return {
        "accuracy": hits / len(images),
        "classes": sum(numbers) / len(numbers),
        "confidence": confidence.mean().item(),
    }


def _run_network(network, images, batch_size, forward):
    """forward(model, pixel_values) over batches; only one preprocessed batch is in memory at a time."""
    assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3, images.shape
    outputs = []
    with torch.no_grad(), tqdm(total=len(images), desc="features", unit="image", delay=5) as progress:
        for batch in images.split(batch_size):
            arrays = list(batch.cpu().numpy())
            pixels = network.processor(arrays, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
            output = forward(network.model, pixels.to(network.model.device, network.model.dtype))
            outputs.append(output.float().cpu())
            progress.update(len(batch))
    return torch.cat(outputs)


def _is_classifier(model):
    return "ForImageClassification" in type(model).__name__


def _pooled_output(model, pixel_values):
    """(B, 3, h, w) preprocessed -> (B, d); which output that is, `image_features` says."""
    if hasattr(model, "get_image_features"):
        output = model.get_image_features(pixel_values=pixel_values)
        return output if torch.is_tensor(output) else output.pooler_output
    if _is_classifier(model):
        entered = []
        heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == model.num_labels]
        if not heads:
            raise ValueError(
                f"{type(model).__name__} ends in no linear layer, so that its features are undefined here"
            )
        handle = heads[-1].register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
        try:
            model(pixel_values=pixel_values)
        finally:
            handle.remove()
        return entered[-1]
    output = model(pixel_values=pixel_values)
    pooled = getattr(output, "image_embeds", None)
    pooled = getattr(output, "pooler_output", None) if pooled is None else pooled
    if pooled is None:
        raise ValueError(f"{type(model).__name__} has no pooled output: take CLIP, DINOv2 or an image classifier")
    return pooled.flatten(1)  # convolutional networks pool to (B, d, 1, 1)
