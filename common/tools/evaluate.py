"""Measure a few-step pipeline: images from prompts and seeds, distances to reference images, CLIP score, time.

    python -m common.tools.evaluate --pretrained_model out/student --prompts @captions.txt --num_images 5000 \\
        --num_inference_steps 1,2,4,8 --scheduler lcm --guidance_scale 1 --feature_network facebook/dinov2-large \\
        --reference "coco/{00000..00009}.tar" --clip_model openai/clip-vit-large-patch14 --output_dir out/metrics

Image i is made from prompt i modulo the number of prompts and from a generator with seed --seed + i, so that neither
the batch size nor the number of steps changes what it starts from. Writes metrics.json, table.md, grid.png and, after
a measurement against images, reference_features.npz, which --reference takes in the next run.
Left out: several GPUs, and images on disk: one step count's images are in memory at a time (5,000 of 512x512: 4 GB).
"""

import hashlib
import inspect
import io
import itertools
import json
import math
import platform
import tarfile
import time
import zipfile
from pathlib import Path

from common import UserError, lock, models, tables, weights
from common.args import ArgumentParser, int_list, non_negative_float, non_negative_int, positive_int, tool_errors
from common.checkpointing import CONFIG
from common.folders import IMAGE_KEYS, list_images, reference_images
from common.images import read_image
from common.metrics import (
    clip_score,
    frechet_distance,
    image_features,
    image_grid,
    kernel_distance,
    load_feature_network,
    prompt_accuracy,
    prompt_labels,
)
from common.paths import labelled_path, prompt
from common.paths import path as path_type
from common.probes import CALL_ERRORS
from common.shards import SampleError, expand_shards, is_remote, mask_credentials, tar_samples, training_tars
from common.work import DTYPES, find_device

import numpy as np
import PIL
import torch
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps
from tqdm import tqdm

GRID_COLUMNS = 8
COLUMNS = {
    "model": "model",
    "num_inference_steps": "steps",
    "images": "images",
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance",
    "accuracy": "prompt accuracy",
    "clip_score": "CLIP score",
    "seconds_per_image": "s/image",
}


def parse_args(argv=None):
    parser = ArgumentParser("Measure a few-step pipeline.")
    add = parser.add_argument
    add("--pretrained_model", type=labelled_path, action="append", required=True, metavar="[LABEL=]PATH",
        help="pipeline folder or hub name; repeat to compare several")  # fmt: skip
    add("--lora", type=path_type, help="LoRA folder or .safetensors file on top of the one --pretrained_model")
    add("--unet", type=path_type, help="U-Net folder instead of the U-Net of the one --pretrained_model")
    add(
        "--prompts",
        type=prompt,
        action="append",
        help="a prompt, or @file: one a line, or a table; repeat for more; none: unconditional",
    )
    add("--num_inference_steps", type=int_list, help="such as 1,2,4,8, which is also the default")
    add("--timesteps", help="one explicit schedule instead, such as 999,749,499,249")
    add("--guidance_scale", type=non_negative_float, help="as the pipeline takes it; without it, its own default")
    add("--eta", type=non_negative_float, help="as the pipeline takes it: TCD's gamma, DDIM's eta")
    add(
        "--scheduler",
        choices=["keep", "ddim", "lcm", "tcd"],
        default="keep",
        help="replaces the pipeline's; ddim is trailing",
    )
    add("--height", type=positive_int, help="of the images, in pixels; without it, as trained, or the pipeline's")
    add("--width", type=positive_int, help="of the images, in pixels; without it, as trained, or the pipeline's")
    add("--num_images", type=positive_int, help="images per step count; without it, one per prompt")
    add("--seed", type=non_negative_int, default=0, help="image i starts from seed + i")
    add("--batch_size", type=positive_int, default=8, help="images that are made or measured together")
    add("--feature_network", type=path_type, help="CLIP, DINOv2 or an image classifier: folder or hub name")
    add("--reference", type=path_type, help="folder of images, tar shards (braces), or .npz; needs --feature_network")
    add("--num_reference_images", type=positive_int, help="use the first so many reference images; without it, all")
    add("--prompt_accuracy", action="store_true",
        help="how often --feature_network, a classifier, sees the class that the prompt names")  # fmt: skip
    add("--clip_model", type=path_type, help="CLIP for the CLIP score: folder or hub name")
    add("--output_dir", type=path_type, required=True, help="where the results go")
    add("--overwrite", action="store_true", help="replace the results that --output_dir holds")
    add("--dtype", choices=list(DTYPES), help="of the pipeline; without it, float16 on CUDA and float32 elsewhere")
    add("--device", help="such as cuda:1 or cpu; without it, cuda where there is one")
    add("--cache_dir", type=path_type, help="where hub downloads are kept")
    add("--revision", help="hub revision of --pretrained_model")
    add("--variant", help="weight files to load, such as fp16")
    args = parser.parse_args(argv)
    if not args.reference:
        parser.refuse_idle(["num_reference_images"], "there are no reference images; add --reference, or drop it")
    try:
        check_args(args)
    except UserError as error:
        parser.error(error)
    return args


def check_args(args):
    """Cross-checks, files and derived values; only configuration files are read. UserError names the flag."""
    args.models = dict(named_model(value) for value in args.pretrained_model)
    if len(args.models) < len(args.pretrained_model):
        raise UserError("two --pretrained_model have one label: write --pretrained_model LABEL=PATH")
    if len(args.models) > 1 and (args.lora or args.unet):
        raise UserError("--lora and --unet go with one --pretrained_model: measure the others in another run")
    args.prompts = read_prompts(args.prompts) if args.prompts is not None else None
    if args.timesteps is not None and args.num_inference_steps is not None:
        raise UserError("--timesteps is a schedule of its own: drop it or --num_inference_steps")
    args.timesteps = parse_timesteps(args.timesteps) if args.timesteps is not None else None
    if args.num_inference_steps == []:
        raise UserError("--num_inference_steps holds no number: give some, such as 1,2,4,8")
    args.num_inference_steps = [len(args.timesteps)] if args.timesteps else args.num_inference_steps or [1, 2, 4, 8]
    if (args.height is None) != (args.width is None):
        raise UserError("--height and --width go together: pipelines ignore one alone")
    if args.timesteps and args.scheduler == "ddim":
        raise UserError("--timesteps needs a scheduler that takes them: --scheduler lcm or tcd")
    if args.num_images is None:
        if args.prompts is None:
            raise UserError("without --prompts, --num_images must say how many images to make")
        args.num_images = len(args.prompts)
    if args.reference and not args.feature_network:
        raise UserError("--reference needs --feature_network, whose features are compared")
    if args.feature_network and not (args.reference or args.prompt_accuracy):
        raise UserError("--feature_network measures nothing alone: add --reference or --prompt_accuracy")
    if args.prompt_accuracy and not args.feature_network:
        raise UserError("--prompt_accuracy needs --feature_network, a classifier")
    if args.reference and args.num_images < 2:
        raise UserError("a distance to --reference needs at least two images: raise --num_images")
    if args.clip_model and args.prompts is None:
        raise UserError("--clip_model compares images with --prompts: give some")
    check_paths(args)
    args.device = str(find_device(args.device))
    args.dtype = args.dtype or ("float16" if args.device.startswith("cuda") else "float32")
    args.labels = None
    if args.prompt_accuracy:
        args.labels = find_labels(args.feature_network, args.prompts, args.cache_dir)


def check_paths(args):
    """The folders and files that the flags name."""
    for path in args.models.values():
        check_model(path, "--pretrained_model", "model_index.json", args.revision, args.cache_dir)
        check_weights(path, args.unet, args.variant, args.revision, args.cache_dir)
    for flag, path in [("--feature_network", args.feature_network), ("--clip_model", args.clip_model)]:
        if path:
            check_model(path, flag, "config.json", cache_dir=args.cache_dir)
    if args.lora:
        lora_file(args.lora)
    if args.reference:
        check_reference(args.reference)
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    if lock.contents(output_dir) and not args.overwrite:
        raise UserError(f"--output_dir {output_dir} is not empty: name another or add --overwrite")


def named_model(value):
    """`label=path` or `path` -> (label, path)."""
    label, separator, path = value.partition("=")
    if separator and not Path(value).exists():
        return label, path
    return Path(value).name or value, value


def check_model(path, flag, file_name, revision=None, cache_dir=None):
    """A folder, or else a hub name, must hold file_name; of the hub only that file is read."""
    weights.check_name(f"{flag} {path}", path)
    if Path(path).is_dir():
        if not (Path(path) / file_name).is_file():
            raise UserError(f"{flag} {path} has no {file_name}: name the folder that save_pretrained wrote")
        return
    try:
        hf_hub_download(path, file_name, revision=revision, cache_dir=cache_dir)
    except (OSError, ValueError) as error:  # no such repository or file, no connection, no valid name
        raise UserError(f"{flag} {path} is neither a folder nor a hub name that can be read: check it") from error


def check_weights(path, unet=None, variant=None, revision=None, cache_dir=None):
    """A pipeline, and the U-Net instead of its own, must have all tensors; no weight is loaded."""
    where, flag = {"revision": revision, "cache_dir": cache_dir}, f"--pretrained_model {path}"
    index = load_index(path, where)
    skip = (*models.NOT_TRAINED, *(["unet"] if unet else []))
    weights.check_parts(flag, path, index, skip)
    weights.check_pipeline(flag, path, index, variant, **where, skip=skip)
    if unet:
        cls = unet_class(index)
        weights.check_name(f"--unet {unet}", unet)
        if not (Path(unet) / "config.json").is_file():
            raise UserError(f"--unet {unet} has no config.json: name the U-Net's own folder, such as {unet}/unet")
        weights.check_network(f"--unet {unet}", Path(unet), cls, has_variant_flag=False)


def load_index(path, where):
    """A pipeline's model_index.json."""
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(path, **where)
    except (OSError, ValueError) as error:
        raise UserError(f"--pretrained_model {path} cannot be loaded: {error}") from error
    if not isinstance(index, dict):
        raise UserError(f"--pretrained_model {path}: its model_index.json holds no names of parts")
    return index


def unet_class(index):
    """The class of a pipeline's U-Net."""
    import diffusers

    if "unet" not in index:
        raise UserError(f"--unet: a {index.get('_class_name')} has no U-Net: drop the flag")
    return getattr(diffusers, index["unet"][1])


def read_prompts(values):
    """Each value is a prompt or @file, see `tables.read_prompts`."""
    prompts = []
    for value in values:
        is_file = value.startswith("@")
        prompts += tables.read_prompts(value[1:], f"--prompts {value}") if is_file else [value.strip()]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError("--prompts holds no text: give a prompt, or @file with one a line")
    return prompts


def parse_timesteps(text):
    try:
        timesteps = [int(part) for part in text.split(",")]
    except ValueError:
        timesteps = []
    if not timesteps or min(timesteps) < 0 or timesteps != sorted(set(timesteps), reverse=True):
        raise UserError(f"--timesteps {text} must fall, such as 999,749,499,249")
    return timesteps


def lora_file(path):
    """The one .safetensors file of a LoRA folder, or the file itself."""
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    standard = path / "pytorch_lora_weights.safetensors"
    found = [standard] if standard.is_file() else sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"--lora {path} must be a .safetensors file or a folder with one: it has {len(found)}")
    return found[0]


def find_labels(feature_network, prompts, cache_dir=None):
    """The class that each prompt names, from the classifier's configuration alone."""
    from transformers import AutoConfig

    if prompts is None:
        raise UserError("--prompt_accuracy needs --prompts that name the classes")
    try:
        config = AutoConfig.from_pretrained(feature_network, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"--feature_network {feature_network} cannot be loaded: {error}") from error
    if not any("ForImageClassification" in name for name in config.architectures or []):
        raise UserError(f"--prompt_accuracy needs an image classifier: --feature_network {feature_network} is none")
    try:
        return prompt_labels(config.id2label, prompts)
    except ValueError as error:
        raise UserError(f"--prompt_accuracy: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Reference images


def reference_files(reference):
    """--reference -> ("npz" | "tar" | "folder", list of files)."""
    path = Path(reference)
    if path.suffix == ".npz":
        return "npz", [path]
    if path.is_dir():
        try:
            tars = [Path(tar) for tar in training_tars(str(path))]
        except UserError as error:
            raise UserError(f"--reference: {error}") from None
        return ("tar", tars) if tars else ("folder", reference_folder(path)[0])
    try:
        shards = expand_shards(reference)
    except UserError as error:
        raise UserError(str(error).replace("--train_shards_path_or_url", "--reference")) from None
    if remote := next(filter(is_remote, shards), None):
        raise UserError(f"--reference: {mask_credentials(remote)} is no local file, and only those are read: copy it")
    return "tar", [Path(shard) for shard in shards]


def reference_folder(folder):
    """(paths of the images that training would list in a folder, what is to be said of it)"""
    try:
        listing = list_images(folder)
        return [Path(folder, image) for image in reference_images(listing)], listing.notes
    except UserError as error:
        raise UserError(f"--reference: {error}") from None


def check_reference(reference):
    kind, files = reference_files(reference)
    if not files:
        raise UserError(
            f"--reference {reference} holds neither images ({', '.join(IMAGE_KEYS)}) nor *.tar: name another"
        )
    for file in files:
        if not file.is_file():
            raise UserError(f"--reference: {file} is no file: check the path")
        if kind == "tar" and not tarfile.is_tarfile(file):
            raise UserError(f"--reference: {file} is neither a folder, a tar nor an .npz")
    if kind == "npz" and not zipfile.is_zipfile(files[0]):
        raise UserError(f"--reference {files[0]} is no .npz file")
    if kind == "npz" and not set(npz_names(reference)) & {"features", "images", "arr_0"}:
        raise UserError(f"--reference {files[0]} holds neither images, arr_0 nor features")


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
        for note in reference_folder(reference)[1]:
            print(f"--reference: {note}.", flush=True)
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
            raise UserError(f"--reference {files[0]} holds {images.dtype} {images.shape}, not uint8 (N, H, W, 3)")
        for image in images:
            yield fit(Image.fromarray(image), height, width)


def to_tensor(file, name, height, width):
    """An image as training sees it, fitted: uint8 (3, height, width). file: a path, or an open binary file."""
    try:
        data = file.read() if hasattr(file, "read") else Path(file).read_bytes()
        return fit(read_image(data), height, width)
    except (OSError, SampleError) as error:
        raise UserError(
            f"--reference: {name} is no readable image ({getattr(error, 'detail', error)}): remove it"
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
            raise UserError(f"--reference {path} has no {sorted(missing)[0]}: give the images instead")
        size = (arrays["height"].item(), arrays["width"].item())
        features, probe = (torch.from_numpy(arrays[name]).float() for name in ("features", "probe"))
    if size != (height, width):
        raise UserError(
            f"--reference {path} is of images of {size[0]}x{size[1]}, not {height}x{width}: give the images instead"
        )
    expected = probe_features(network, height, width)
    if probe.shape != expected.shape or not torch.allclose(probe, expected, rtol=1e-2, atol=1e-2 * expected.std()):
        raise UserError(f"--reference {path} holds features of another network: give the images instead")
    return features


def reference_features(reference, network, height, width, batch_size=64, limit=None):
    """Features of the first `limit` reference images: float32 (N, d). One batch of images is in memory at a time."""
    if "features" in npz_names(reference):
        path = reference_files(reference)[1][0]
        return checked_count(read_features(path, network, height, width)[:limit], reference)
    images = itertools.islice(iterate_images(reference, height, width), limit)
    features = []
    with tqdm(desc="reference", unit="image", delay=5) as progress:
        while batch := read_batch(images, batch_size, reference):
            features.append(image_features(network, torch.stack(batch), batch_size))
            progress.update(len(batch))
    return checked_count(torch.cat(features) if features else [], reference)


def read_batch(images, batch_size, reference):
    try:
        return list(itertools.islice(images, batch_size))
    except (SampleError, tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise UserError(f"--reference {reference} is damaged or no file of images ({error}): make it anew") from None


def checked_count(features, reference):
    if len(features) < 2:
        raise UserError(f"--reference {reference} gave {len(features)} images: a distance needs at least two")
    return features


def reference_floor(features, num_images):
    """What a perfect model would score: distances between num_images reference images and the others.

    The images are drawn at random (seed 0). None where fewer than 2 num_images are there: the Fréchet distance of
    fewer images would be higher than a perfect model's.
    """
    if len(features) < 2 * num_images:
        return None
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    drawn, others = features[order[:num_images]], features[order[num_images:]]
    return {
        "images": num_images,
        "other_images": len(others),
        "frechet_distance": frechet_distance(drawn, others),
        "kernel_distance": kernel_distance(drawn, others),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Generation and measurement


def load_pipeline(
    path, unet=None, lora=None, scheduler="keep", dtype=torch.float32, device="cpu", revision=None, variant=None,
    cache_dir=None,
):  # fmt: skip
    """A stock diffusers pipeline without its safety checker, which would replace images by black ones.

    unet: folder that replaces its U-Net; lora: folder or file; with the scheduler beside either, where there is one;
    scheduler: keep, ddim, lcm or tcd, the last three made from the configuration of the pipeline's own, ddim from the
    last timestep down (trailing), which few steps need. UserError: not loadable, or the LoRA fits nothing.
    """
    import diffusers

    where = {"revision": revision, "cache_dir": cache_dir}
    parts = {}
    index = load_index(path, where)
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    if unet:
        parts["unet"] = load_unet(index, unet, dtype)
    flag = f"--pretrained_model {path}"
    try:
        cls = pipeline_class(path, index, is_student=bool(unet or lora), **where)
        pipeline = models.load_checked(flag, path, index, cls, dtype, variant=variant, **where, **parts)
    except models.LOAD_ERRORS as error:
        raise UserError(f"{flag} cannot be loaded: {error}") from error
    weights.fit_tokenizers(pipeline)
    if scheduler == "keep" and (lora or unet):
        pipeline.scheduler = scheduler_beside(lora or Path(unet).parent) or pipeline.scheduler
    if scheduler != "keep":
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            name = type(pipeline.scheduler).__name__
            raise UserError(f"--scheduler {scheduler} cannot be made from {path}'s {name}: use --scheduler keep")
        cls = {"ddim": diffusers.DDIMScheduler, "lcm": diffusers.LCMScheduler, "tcd": diffusers.TCDScheduler}[
            scheduler
        ]
        # Its defaults too, which from_config leaves to the new class: LCM's and TCD's betas are others.
        config = {k: v for k, v in pipeline.scheduler.config.items() if k != "_use_default_values"}
        spacing = {"timestep_spacing": "trailing"} if scheduler == "ddim" else {}
        pipeline.scheduler = cls.from_config({"clip_sample": False} | config | spacing)
    if lora:
        load_lora(pipeline, lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def pipeline_class(path, index, is_student, **where):
    """What `path` is loaded as: the class that saved it; plain text-to-image where that one starts from an image, or
    guides in ways of its own (PAG), which a student of training has not seen."""
    import diffusers

    saved, plain = getattr(diffusers, str(index.get("_class_name")), None), models.plain_class(index)
    if plain in (None, saved):
        return diffusers.DiffusionPipeline
    unet = diffusers.UNet2DConditionModel.load_config(path, subfolder="unet", **where)
    takes = inspect.signature(saved.__call__).parameters if saved else {"image"}
    if unet["in_channels"] != unet["out_channels"] or not (is_student or {"image", "control_image"} & set(takes)):
        return diffusers.DiffusionPipeline
    print(f"{path}: saved by {index.get('_class_name')}, measured as {plain.__name__}", flush=True)
    return plain


def trained_size(path, unet=None, lora=None):
    """{"height", "width"} that a student of ours was trained at, in pixels, by the training_config.json of its run; {}
    where there is none."""
    folder = Path(lora or unet or path)
    for place in (folder, *(folder.absolute().parents[:2] if lora or unet else ())):
        if (place / CONFIG).is_file():
            side = json.loads((place / CONFIG).read_text(encoding="utf-8"))["flags"].get("resolution")
            return {"height": side, "width": side} if side else {}
    return {}


def scheduler_beside(folder):
    """The scheduler that a training script saved in FOLDER/scheduler, or None."""
    import diffusers

    file = Path(folder, "scheduler", "scheduler_config.json")
    if not file.is_file():
        return None
    cls = getattr(diffusers, json.loads(file.read_text())["_class_name"])
    return cls.from_pretrained(folder, subfolder="scheduler")


def load_unet(index, unet, dtype):
    """The U-Net of a folder, in the class that the pipeline's index names."""
    try:
        return models.load_network(f"--unet {unet}", unet_class(index), unet, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"--unet {unet} cannot be loaded: {error}") from error


def load_lora(pipeline, lora):
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"--lora: {type(pipeline).__name__} takes no LoRA: drop the flag")
    file = lora_file(lora)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
    except Exception as error:  # the loader raises whatever a foreign state dict leads to
        raise UserError(f"--lora {lora} does not fit the pipeline: {error}") from error
    if not pipeline.get_list_adapters():
        raise UserError(f"--lora {lora} holds no weights for any part of this pipeline")


def generate_images(pipeline, prompts, num_inference_steps, guidance_scale, seed, batch_size, **pipeline_kwargs):
    """Images from a diffusers pipeline, image i from prompts[i] and a CPU generator with seed + i.

    prompts: N strings, or N times None for an unconditional pipeline. guidance_scale: None leaves the pipeline's
    default. pipeline_kwargs go to the pipeline as they are (height, width, eta, timesteps).
    Returns (uint8 (N, 3, H, W) on the CPU, seconds per image); the first batch warms up and is not timed where there
    are others. ValueError: the pipeline does not take an argument, or returned NaN.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    options = dict(pipeline_kwargs, num_inference_steps=num_inference_steps)
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    conditional = prompts[0] is not None
    if missing := [name for name in (*options, *["prompt"] * conditional) if name not in accepted]:
        raise ValueError(f"{type(pipeline).__name__} takes no {missing[0]}")
    if "eta" in options and not uses_eta(pipeline):
        raise ValueError(f"{type(pipeline.scheduler).__name__} has no eta: drop it or take another scheduler")
    if not conditional and "prompt" in accepted:
        raise ValueError(f"{type(pipeline).__name__} needs prompts")
    images, timed = [], []
    with tqdm(total=len(prompts), desc=f"{num_inference_steps} steps", unit="image", delay=5) as progress:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(batch))]
            inputs = {"prompt": batch} if conditional else {"batch_size": len(batch)}
            started = time.perf_counter()
            output = pipeline(**inputs, **options, generator=generators, output_type="np").images  # (B, H, W, C) 0..1
            timed.append((time.perf_counter() - started, len(batch)))  # the copy to the CPU has waited for the GPU
            images.append(to_uint8(output))
            progress.update(len(batch))
    timed = timed[1:] or timed
    return torch.cat(images), sum(seconds for seconds, _ in timed) / sum(count for _, count in timed)


def to_uint8(images):
    """float (B, H, W, C) in 0..1 -> uint8 (B, 3, H, W); one channel becomes three equal ones."""
    if not np.isfinite(images).all():
        raise ValueError("the pipeline returned NaN: its VAE may need another --dtype, such as bfloat16 or float32")
    images = torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    return images.expand(-1, 3, -1, -1).contiguous()


def measure(images, prompts, reference_features=None, network=None, labels=None, clip_network=None, batch_size=64):
    """What these images score: a dict with images (their number) and what the arguments allow.

    images: uint8 (N, 3, H, W); prompts: N strings, read by CLIP only.
    reference_features, float32 (M, d) of the same network: frechet_distance and kernel_distance.
    labels, N class indices as `prompt_labels` finds them: accuracy, by the network, a classifier.
    clip_network: clip_score.
    """
    result = {"images": len(images)}
    if reference_features is not None:
        features = image_features(network, images, batch_size)
        result["frechet_distance"] = frechet_distance(features, reference_features)
        result["kernel_distance"] = kernel_distance(features, reference_features)
    if labels is not None:
        result["accuracy"] = prompt_accuracy(network, images, labels, batch_size)
    if clip_network is not None:
        result["clip_score"] = clip_score(clip_network, images, prompts, batch_size)
    return result


def format_table(rows):
    """Rows (dicts) as a markdown table with the columns of COLUMNS that any row has; "-" where a row lacks one."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]

    def cell(value):
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    table = [[COLUMNS[key] for key in keys], *([cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(3, *(len(line[column]) for line in table)) for column in range(len(keys))]

    def line(cells):
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]) + " |"

    rule = "|-" + "-|-".join("-" * width for width in widths[:1]) + "-|"
    rule += "".join("-" * (width + 1) + ":|" for width in widths[1:])
    return "\n".join([line(table[0]), rule, *(line(cells) for cells in table[1:])]) + "\n"


@tool_errors
def main(args):
    output_dir = Path(args.output_dir)
    prompts = [args.prompts[i % len(args.prompts)] if args.prompts else None for i in range(args.num_images)]
    labels = [args.labels[i % len(args.labels)] for i in range(args.num_images)] if args.labels else None

    # 1. The networks that measure
    lock.take(output_dir, "--output_dir")
    network = load_network(args.feature_network, "--feature_network", args.device, args.cache_dir)
    clip_network = load_network(args.clip_model, "--clip_model", args.device, args.cache_dir)
    if clip_network is not None and clip_network.tokenizer is None:
        raise UserError(
            f"--clip_model {args.clip_model} does not read text: name a CLIP such as clip-vit-large-patch14"
        )

    # 2. Generate and measure, one model and one step count at a time; the results so far are on disk after each
    options = {"height": args.height, "width": args.width, "eta": args.eta, "timesteps": args.timesteps}
    options = {name: value for name, value in options.items() if value is not None}
    result = {"arguments": report_arguments(args), "versions": versions(args.device), "reference": None, "rows": []}
    references, pictures, size = None, [], None
    for label, path in args.models.items():
        pipeline = load_pipeline(
            path, args.unet, args.lora, args.scheduler, DTYPES[args.dtype], args.device, args.revision, args.variant,
            args.cache_dir,
        )  # fmt: skip
        own = trained_size(path, args.unet, args.lora) if args.height is None else {}
        own = own if "height" in inspect.signature(pipeline.__call__).parameters else {}
        for steps in args.num_inference_steps:
            try:
                images, seconds = generate_images(
                    pipeline, prompts, steps, args.guidance_scale, args.seed, args.batch_size, **options, **own
                )
            except CALL_ERRORS as error:
                raise UserError(f"--pretrained_model {path} at {steps} steps: {error}") from error
            size = size or images.shape[2:]
            if images.shape[2:] != size:
                raise UserError("the models make images of different sizes: set --height and --width")
            if args.reference and references is None:
                references = reference_features(
                    args.reference, network, *size, args.batch_size, args.num_reference_images
                )
                result["reference"] = {
                    "network": args.feature_network,
                    "images": len(references),
                    "features": references.shape[1],
                    "floor": reference_floor(references, args.num_images),
                }
                if "features" not in npz_names(args.reference):
                    np.savez(
                        output_dir / "reference_features.npz", features=references.numpy(), height=size[0],
                        width=size[1], probe=probe_features(network, *size).numpy(),
                    )  # fmt: skip
            measured = measure(images, prompts, references, network, labels, clip_network, args.batch_size)
            settings = {
                "model": label,
                "num_inference_steps": steps,
                "guidance_scale": used_value(pipeline, "guidance_scale", args.guidance_scale),
                "eta": used_value(pipeline, "eta", args.eta),
                "scheduler": type(pipeline.scheduler).__name__,
                "height": images.shape[2],
                "width": images.shape[3],
            }
            result["rows"].append(settings | measured | {"seconds_per_image": seconds})
            pictures.append(
                (f"{label} {steps}" if len(args.models) > 1 else str(steps), images[:GRID_COLUMNS].clone())
            )
            write_results(output_dir, result, pictures, prompts[:GRID_COLUMNS])
        del pipeline
    print((output_dir / "table.md").read_text(encoding="utf-8"), end="")
    return result


def load_network(name, flag, device, cache_dir):
    if name is None:
        return None
    try:
        return load_feature_network(name, device, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {name} cannot be loaded: {error}") from error


def used_value(pipeline, name, value):
    """What the pipeline ran with: the flag's value, else the pipeline's own default; None if it has none."""
    parameter = inspect.signature(pipeline.__call__).parameters.get(name)
    if parameter is None or (name == "eta" and not uses_eta(pipeline)):
        return None
    return parameter.default if value is None else value


def uses_eta(pipeline):
    return "eta" in inspect.signature(pipeline.scheduler.step).parameters


def report_arguments(args):
    """The flags as given or derived; of the prompts their number, the first ones and a hash of all."""
    arguments = {name: value for name, value in vars(args).items() if name not in ("labels", "prompts")}
    arguments["num_prompts"] = len(args.prompts or [])
    arguments["prompts_sha256"] = hashlib.sha256("\n".join(args.prompts or []).encode()).hexdigest()
    arguments["first_prompts"] = (args.prompts or [])[:GRID_COLUMNS]
    return arguments


def versions(device):
    import diffusers
    import transformers

    on_cuda = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
    }


def write_results(output_dir, result, pictures, column_labels):
    """metrics.json, table.md and grid.png. pictures: (row label, uint8 images) per row of the grid."""
    rows, reference = result["rows"], result["reference"]
    caption = ""
    if reference:
        caption = f"\nDistances to {reference['images']} reference images, features of {reference['network']}.\n"
        if reference["floor"] is None:
            caption += f"No floor: it takes at least {2 * rows[0]['images']} reference images.\n"
        else:
            rows = [*rows, {"model": "reference (floor)", **reference["floor"]}]
    (output_dir / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (output_dir / "table.md").write_text(format_table(rows) + caption, encoding="utf-8")
    row_labels, images = zip(*pictures, strict=True)
    scale = max(1, math.ceil(96 / min(images[0].shape[2:])))
    labels = None if column_labels[0] is None else column_labels
    image_grid(list(images), list(row_labels), labels, scale).save(output_dir / "grid.png")


if __name__ == "__main__":
    main(parse_args())
