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
import json
import math
import os
import platform
from pathlib import Path

from common import lock
from common.errors import CALL_ERRORS, UserError
from common.flags import (
    ArgumentParser,
    int_list,
    non_negative_float,
    non_negative_int,
    positive_int,
    prompt,
    read_prompts,
)
from common.flags import path as path_type
from common.networks import teachers, weights
from common.results import evaluation
from common.results.export import versions
from common.results.metrics import class_statistics, frechet_distance, kernel_distance, load_feature_network
from common.results.samples import image_grid
from common.run.reference import check_reference, npz_names, probe_features, reference_features
from common.run.screen import quiet_libraries
from common.run.training_run import tool_errors
from common.tools.prompt_metrics import clip_score
from common.tools.sampling import (
    find_labels,
    generate_images,
    load_index,
    load_pipeline,
    lora_file,
    trained_size,
    unet_class,
    used_value,
)
from common.tools.work import DTYPES, find_device

import numpy as np
import torch
from huggingface_hub import hf_hub_download

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow")  # whose versions are noted
GRID_COLUMNS = 8
COLUMNS = {
    "model": "model",
    "num_inference_steps": "steps",
    "images": "images",
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance",
    "diversity": "diversity",
    "saturation": "saturation",
    "accuracy": "prompt accuracy",
    "confidence": "confidence",
    "clip_score": "CLIP score",
    "seconds_per_image": "s/image",
}


def labelled_path(text):
    """argparse type: `flags.path` of `PATH` or `LABEL=PATH`."""
    whole = path_type(text)
    label, separator, rest = text.partition("=")
    return whole if os.path.exists(whole) or not separator else f"{label}={path_type(rest)}"


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
    quiet_libraries()
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
    if student := args.lora or args.unet:  # which the results are named after, where no label is given
        name = Path(os.path.abspath(student))
        name = name.parent.name if name.stem in ("unet", "pytorch_lora_weights") else name.stem
        args.models = {name if label == named_model(path)[0] else label: path for label, path in args.models.items()}
    if args.prompts is not None:
        args.prompts = [prompt.strip() for prompt in read_prompts("--prompts", args.prompts) if prompt.strip()]
        if not args.prompts:
            raise UserError("--prompts holds no text: give a prompt, or @file with one a line")
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
    skip = (*teachers.NOT_TRAINED, *(["unet"] if unet else []))
    weights.check_parts(flag, path, index, skip)
    weights.check_pipeline(flag, path, index, variant, **where, skip=skip)
    if unet:
        cls = unet_class(index)
        weights.check_name(f"--unet {unet}", unet)
        if not (Path(unet) / "config.json").is_file():
            raise UserError(f"--unet {unet} has no config.json: name the U-Net's own folder, such as {unet}/unet")
        weights.check_network(f"--unet {unet}", Path(unet), cls, has_variant_flag=False)


def parse_timesteps(text):
    try:
        timesteps = [int(part) for part in text.split(",")]
    except ValueError:
        timesteps = []
    if not timesteps or min(timesteps) < 0 or timesteps != sorted(set(timesteps), reverse=True):
        raise UserError(f"--timesteps {text} must fall, such as 999,749,499,249")
    return timesteps


def measure(images, prompts, reference_features=None, network=None, labels=None, clip_network=None, batch_size=64):
    """What these images score: a dict with images (their number) and what the arguments allow.

    images: uint8 (N, 3, H, W); prompts: N strings, or None each.
    reference_features, float32 (M, d) of the same network: what `evaluation.score` returns, as while training.
    labels, N class indices as `prompt_labels` finds them: accuracy and confidence, by the network, a classifier.
    clip_network: clip_score.
    """
    result = {"images": len(images)}
    if reference_features is not None:
        groups = None if prompts[0] is None else prompts
        result |= evaluation.score(*evaluation.observe(network, images, batch_size), reference_features, groups)
    if labels is not None:
        seen = class_statistics(network, images, [(label,) for label in labels], batch_size)
        result |= {name: seen[name] for name in ("accuracy", "confidence")}
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
    lock.take(output_dir)
    network = load_network(args.feature_network, "--feature_network", args.device, args.cache_dir)
    clip_network = load_network(args.clip_model, "--clip_model", args.device, args.cache_dir)
    if clip_network is not None and clip_network.tokenizer is None:
        raise UserError(
            f"--clip_model {args.clip_model} does not read text: name a CLIP such as clip-vit-large-patch14"
        )

    # 2. Generate and measure, one model and one step count at a time; the results so far are on disk after each
    options = {"height": args.height, "width": args.width, "eta": args.eta, "timesteps": args.timesteps}
    options = {name: value for name, value in options.items() if value is not None}
    on_cuda = torch.device(args.device).type == "cuda"
    device = {"device": torch.cuda.get_device_name(args.device) if on_cuda else platform.machine()}
    result = {"arguments": report_arguments(args), "versions": versions(PACKAGES) | device}
    result |= {"reference": None, "rows": []}
    references, pictures, size = None, [], None
    for label, path in args.models.items():
        steps = ", ".join(map(str, args.num_inference_steps))
        print(f"{label}: {args.num_images} images at {steps} step(s), on {args.device} in {args.dtype}", flush=True)
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
    print(f"\nwritten: {output_dir}/table.md, metrics.json, grid.png", flush=True)
    return result


def load_network(name, flag, device, cache_dir):
    if name is None:
        return None
    try:
        return load_feature_network(name, device, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {name} cannot be loaded: {error}") from error


def report_arguments(args):
    """The flags as given or derived; of the prompts their number, the first ones and a hash of all."""
    arguments = {name: value for name, value in vars(args).items() if name not in ("labels", "prompts")}
    arguments["num_prompts"] = len(args.prompts or [])
    arguments["prompts_sha256"] = hashlib.sha256("\n".join(args.prompts or []).encode()).hexdigest()
    arguments["first_prompts"] = (args.prompts or [])[:GRID_COLUMNS]
    return arguments


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


if __name__ == "__main__":
    main(parse_args())
