"""Flags of consistency training besides the method's own, their cross-checks, and what follows from them.

Beside `common/flags.py`, so that the script holds the method: data with classes, network, average, evaluation.
"""

import argparse

from common import flags
from common.ct import data as image_data
from common.ct.consistency import MOST_OF_START, ema_start_share
from common.errors import UserError

from accelerate import PartialState

REFUSED = {  # flags of the public script that it never reads
    "ddpm_num_steps": "a consistency model has no DDPM schedule, --discretization_s_1 is the number of noise levels",
    "ddpm_num_inference_steps": "a consistency model has no DDPM schedule, --eval_nfe is the number of sampling steps",
    "ddpm_beta_schedule": "a consistency model has no DDPM schedule, --sigma_min, --sigma_max and --rho are its noise",
    "save_images_epochs": "samples are drawn every --validation_steps updates",
    "save_model_epochs": "checkpoints are saved every --checkpointing_steps updates",
}


def add_arguments(parser):
    """All groups of this module; defaults of shared flags that the papers set otherwise."""
    group = parser.add_argument_group("data with classes")
    add, free, with_data = group.add_argument, group.add_free, group.add_with_data
    with_data(
        "--dataset_name",
        type=flags.path,
        help="data set of the hub, or a folder that `datasets` reads; its split `train`",
    )
    with_data("--dataset_config_name", help="which configuration of it")
    with_data("--train_data_dir", type=flags.path, help="folder of images; a subfolder per class")
    with_data("--dataset_image_column_name", default="image", help="column of the images")
    with_data(
        "--dataset_class_label_column_name", default="label", help="column of the classes; in shards: key in the json"
    )
    add("--class_conditional", action="store_true", help="the network is told the class")
    add("--num_classes", type=flags.positive_int, help="default: what the data set says; shards need it")
    add("--class_embed_type", choices=["timestep", "identity"], help="how classes enter; without it, an embedding")
    free(
        "--overwrite_output_dir", action="store_true", help="move an earlier run in --output_dir aside and start anew"
    )

    add = parser.add_argument_group("network").add_argument
    add(
        "--model_config_name_or_path",
        type=flags.path,
        help="config.json of a UNet2DModel (file, folder, hub name); not needed at 32 and 64 px",
    )
    add(
        "--pretrained_model_name_or_path",
        type=flags.path,
        help="weights to start from, of this script or in its parametrisation",
    )
    flags.add_hub_arguments(add, "networks and data sets")
    add(
        "--dropout",
        type=flags.beta,
        help="default: what the network's configuration says; of the own ones 0.3 and 0.2",
    )

    add = parser.add_argument_group("weight average").add_argument
    add("--use_ema", action="store_true", help="keep an average of the weights, and sample from it")
    add(
        "--ema_max_decay",
        type=flags.beta,
        default=0.99993,
        help="fit it to the run, which should be 3 / (1 - it) steps",
    )
    add("--ema_min_decay", type=flags.beta, help="rise from it to the largest; default: the largest from the start")
    add("--use_ema_warmup", action="store_true", help="rise as 1 - (1 + step / ema_inv_gamma)^-ema_power")
    add("--ema_inv_gamma", type=flags.positive_float, default=1.0, help="of the warm-up")
    add("--ema_power", type=flags.positive_float, default=0.75, help="of the warm-up")
    add(
        "--ema_gamma", type=flags.positive_float, help="power-function average instead: (1 - 1 / step)^(ema_gamma + 1)"
    )

    group = parser.add_argument_group("samples and evaluation")
    add, free = group.add_argument, group.add_free
    free("--eval_nfe", type=flags.int_list, default=[1, 2], help="sampling steps of grids and measurements")
    add(
        "--mid_sigma", type=flags.positive_float, help="noise level of the last step; default: 0.821, from 64 px 1.526"
    )
    free("--eval_batch_size", type=flags.positive_int, default=16, help="images of a grid, and sampled at once")
    free("--eval_num_samples", type=flags.positive_int, default=10_000, help="samples of a measurement")
    free(
        "--eval_num_reference", type=flags.positive_int, default=50_000, help="training images compared with, at most"
    )
    free(
        "--eval_class_accuracy", action="store_true", help="the network is a classifier of the same classes, in order"
    )

    add = parser.add_argument_group("refused").add_argument
    for name in REFUSED:
        add(f"--{name}", help=argparse.SUPPRESS)
    parser.set_defaults(resolution=64, adam_weight_decay=1e-6, max_grad_norm=None)  # the papers clip nothing


def check_arguments(parser, args):
    """Cross-checks that need no file and no model; each ends in `parser.error`."""
    for name, reason in REFUSED.items():
        if vars(args).pop(name) is not None:
            parser.error(f"--{name}: {reason}; drop it")
    given = [name for name in ("dataset_name", "train_data_dir", "train_shards_path_or_url") if getattr(args, name)]
    if len(given) != 1:
        parser.error("one of --dataset_name, --train_data_dir and --train_shards_path_or_url is needed, and only one")
    if args.train_shards_path_or_url:
        parser.refuse_idle(["dataset_image_column_name"], "shards have no columns, images are found by name; drop it")
    if not args.class_conditional:
        parser.refuse_idle(["dataset_class_label_column_name"], "no class is read; add --class_conditional, or drop")
    if args.dataset_config_name and not args.dataset_name:
        parser.error("--dataset_config_name is for --dataset_name")
    if args.num_classes and not args.class_conditional:
        parser.error("--num_classes is for --class_conditional")
    if args.class_conditional and args.train_shards_path_or_url and not args.num_classes:
        parser.error("--class_conditional: shards do not tell how many classes there are; add --num_classes")
    if args.class_embed_type == "identity":
        parser.error("--class_embed_type=identity takes a vector per image, and the data have class numbers; drop it")
    if args.class_embed_type and not args.class_conditional:
        parser.error("--class_embed_type is for --class_conditional")
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        parser.error("--overwrite_output_dir starts anew and --resume_from_checkpoint goes on; drop one")
    if args.pretrained_model_name_or_path and args.model_config_name_or_path:
        parser.error("--pretrained_model_name_or_path has its own configuration; drop --model_config_name_or_path")
    if args.use_8bit_adam and args.optimizer_type == "radam":
        parser.error("--use_8bit_adam is 8-bit AdamW; drop it, or --optimizer_type=radam")
    args.optimizer_type = args.optimizer_type or ("adamw" if args.use_8bit_adam else "radam")
    _check_ema(parser, args)
    args.mid_sigma = args.mid_sigma or (1.526 if args.resolution >= 64 else 0.821)
    if not args.sigma_min < args.mid_sigma < args.sigma_max:
        parser.error(f"--mid_sigma={args.mid_sigma} must lie between --sigma_min and --sigma_max")
    if min(args.eval_num_samples, args.eval_num_reference) < 2:
        parser.error("--eval_num_samples and --eval_num_reference: a distance needs at least 2 of each")
    if args.eval_class_accuracy and not (args.eval_steps and args.class_conditional):
        parser.error("--eval_class_accuracy needs --eval_steps and --class_conditional")


def _check_ema(parser, args):
    if args.ema_min_decay is not None and args.ema_min_decay > args.ema_max_decay:
        parser.error(
            f"--ema_min_decay={args.ema_min_decay} is more than --ema_max_decay={args.ema_max_decay}; swap them"
        )
    if args.ema_gamma is not None and (args.use_ema_warmup or args.ema_min_decay is not None):
        parser.error("--ema_gamma is another average than --use_ema_warmup and --ema_min_decay; choose one")
    if not args.use_ema:
        names = ["ema_max_decay", "ema_min_decay", "use_ema_warmup", "ema_inv_gamma", "ema_power", "ema_gamma"]
        parser.refuse_idle(names, "there is no average; add --use_ema, or drop it")
    if args.ema_gamma is not None:
        parser.refuse_idle(["ema_max_decay"], "--ema_gamma is an average without a largest decay; choose one")
    if not args.use_ema_warmup:
        parser.refuse_idle(["ema_inv_gamma", "ema_power"], "there is no warm-up; add --use_ema_warmup, or drop it")


def ema_options(args):
    """The options of `consistency.ema_decay`."""
    options = {"max_decay": args.ema_max_decay, "min_decay": args.ema_min_decay, "gamma": args.ema_gamma}
    return options | ({"inv_gamma": args.ema_inv_gamma, "power": args.ema_power} if args.use_ema_warmup else {})


def resolve_num_classes(args, shards, source):
    """Fill in --num_classes from the data. UserError where they have more, or count from 1."""
    if not args.class_conditional:
        return
    if source is None:
        warning = image_data.check_shard_classes(shards, args.num_classes, args.dataset_class_label_column_name)
        if warning and PartialState().is_main_process:
            print(f"WARNING: --num_classes={args.num_classes}: {warning}.", flush=True)
        return
    first, last = min(source.classes), source.num_classes - 1
    if first and not source.has_names and args.num_classes in (None, last):
        raise UserError(
            f"{source.flag}: its classes run from {first} to {last}, and classes count from 0; subtract {first} from "
            f"each, or pass --num_classes={last + 1} where the first are to stay without images"
        )
    if args.num_classes is None:
        args.num_classes = source.num_classes
    if args.num_classes < source.num_classes:
        raise UserError(f"--num_classes={args.num_classes}: the data have {source.num_classes} classes; drop the flag")
    if empty := sorted(set(range(args.num_classes)) - source.classes):
        source.notes.append(f"{len(empty)} of {args.num_classes} classes have no image, the first is {empty[0]}")


def check_pretrain_steps(args):
    """UserError where --pretrain_steps are more than all updates, which epochs may have decided."""
    if args.pretrain_steps > args.max_train_steps:
        raise UserError(
            f"--pretrain_steps={args.pretrain_steps} is more than --max_train_steps={args.max_train_steps}"
        )


def place(args):
    """Where networks come from."""
    return {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}


def image_options(args):
    """The flags of `ct.data.open_images`."""
    return {
        "shards": args.train_shards_path_or_url,
        "dataset_name": args.dataset_name,
        "train_data_dir": args.train_data_dir,
        "dataset_config_name": args.dataset_config_name,
        "image_column": args.dataset_image_column_name,
        "label_column": args.dataset_class_label_column_name if args.class_conditional else None,
        "num_classes": args.num_classes,
        "cache_dir": args.cache_dir,
        "revision": args.revision,
    }


def unet_options(args):
    """The flags of `unet2d.read_unet_config`."""
    return {
        "resolution": args.resolution,
        "config_name": args.model_config_name_or_path,
        "pretrained_name": args.pretrained_model_name_or_path,
        "num_classes": args.num_classes,
        "class_embed_type": args.class_embed_type,
        "dropout": args.dropout,
        "revision": args.revision,
        "variant": args.variant,
        "cache_dir": args.cache_dir,
        "stock_scheduler": args.noise_precond_type == args.input_precond_type == "cm",
    }


def describe_average(args):
    """{name: text}: how much of the average is its start."""
    if not args.use_ema:
        return {}
    share = ema_start_share(args.max_train_steps, **ema_options(args))
    text = f"{share:.0%} of it still its start at the end"
    if share > MOST_OF_START:
        text += ": too much, the result will be the last weights; lower --ema_max_decay"
    return {"average": text}
