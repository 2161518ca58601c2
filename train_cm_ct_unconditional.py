"""Consistency training: a model that samples images in 1 or 2 steps, from scratch, without a teacher.

The network learns to give the same answer for an image with more and with less noise of one draw; the two noise levels
of a pair move together as training goes on. `--objective=ict`: Improved Techniques for Training Consistency Models
(arXiv 2310.14189), from scratch. `--objective=ect`: Easy Consistency Tuning (arXiv 2406.14548), which starts from a
diffusion model of the same parametrisation, trained here (`--pretrain_steps`) or given. Deviations: positional, not
Fourier features of the noise level, since diffusers' U-Net divides by those; new networks start at f = c_skip x.

    accelerate launch train_cm_ct_unconditional.py --dataset_name=cifar10 --dataset_image_column_name=img \\
        --resolution=32 --class_conditional --num_classes=10 --train_batch_size=128 --max_train_steps=400000 \\
        --use_ema --mixed_precision=fp16 --output_dir=ct

To change the method, copy this file and edit step 7. There is no solver: both sides of a pair are made in 7.3. Another
objective: 3 (parametrisation, sampler), 4 (target), 6 (what is saved and sampled), 7.2 to 7.6, 8, `ct/card.py`.
"""

import copy
import functools
import itertools
from argparse import BooleanOptionalAction
from collections import Counter

from common import flags
from common.ct import card as ct_card
from common.ct import consistency, sampling
from common.ct import data as image_data
from common.ct import flags as ct_flags
from common.ct import unet as ct_unet
from common.ct.data import decode_image_label
from common.ct.scheduler import make_scheduler, save_result
from common.data.folders import IMAGE_KEYS
from common.data.stream import TrainingData
from common.ema import ema_update
from common.keyed_random import keyed_generator, keyed_seed
from common.networks import sharded
from common.results import export, samples
from common.run import engine, sharding, simulation, training_data, validation
from common.run.training_run import TrainingRun, user_errors
from common.schedules import append_dims

import torch


def parse_args(argv=None):
    parser = flags.ArgumentParser(__doc__.split("\n")[0])
    flags.add_data_arguments(parser, text=False)
    flags.add_training_arguments(parser, "consistency-model", "consistency-training", samples="images")
    ct_flags.add_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add("--objective", choices=["ict", "ect"], default="ict", help="from scratch, or from a diffusion model")
    add(
        "--pretrain_steps",
        type=flags.non_negative_int,
        default=0,
        help="of --max_train_steps: diffusion training first",
    )
    add("--pretrain_p_mean", type=flags.real, default=-1.2, help="mean of ln sigma in these")
    add("--pretrain_p_std", type=flags.positive_float, default=1.2, help="standard deviation of ln sigma in these")
    add("--prediction_type", choices=["sample"], default="sample", help="the only one: f predicts the image")
    add("--sigma_min", type=flags.positive_float, default=0.002, help="smallest noise level")
    add("--sigma_max", type=flags.positive_float, default=80.0, help="largest noise level")
    add("--sigma_data", type=flags.positive_float, default=0.5, help="standard deviation of the images in [-1, 1]")
    add("--rho", type=flags.positive_float, default=7.0, help="curvature of the noise levels")
    add("--p_mean", type=flags.real, default=-1.1, help="mean of ln sigma of the pairs")
    add("--p_std", type=flags.positive_float, default=2.0, help="standard deviation of ln sigma of the pairs")
    add("--discretization_s_0", type=flags.positive_int, default=10, help="noise levels at the start, less one")
    add("--discretization_s_1", type=flags.positive_int, default=1280, help="noise levels at the end, less one")
    add("--constant_discretization_steps", action="store_true", help="s_0 + 1 noise levels from start to end")
    add("--skip_steps", type=flags.positive_int, default=1, help="noise levels from one of a pair to the other")
    add("--ect_q", type=flags.positive_float, default=2.0, help="r / t is 1 - 1 / q^stage for large t; 256: one stage")
    add("--ect_stages", type=flags.positive_int, default=8, help="stages of equal length")
    add("--ect_k", type=flags.non_negative_float, default=8.0, help="k of g(t) = 1 + k sigmoid(-b t)")
    add("--ect_b", type=flags.non_negative_float, default=1.0, help="b of g(t) = 1 + k sigmoid(-b t)")
    add("--huber_c", type=flags.non_negative_float, help="default: iCT 0.00054 sqrt(values of an image), ECT 0")
    add("--loss_weighting", choices=consistency.LOSS_WEIGHTINGS, default="inverse_step", help="edm: ECT, ImageNet-64")
    add("--noise_precond_type", choices=consistency.NOISE_PRECOND_TYPES, default="cm", help="what the network is told")
    add("--input_precond_type", choices=consistency.INPUT_PRECOND_TYPES, default="cm", help="none: input not scaled")
    yes_no = BooleanOptionalAction
    add("--cast_teacher", action=yes_no, default=True, help="run the target in the dtype of --mixed_precision as well")
    add("--optimizer_type", choices=["radam", "adamw"], help="default: radam; adamw with --use_8bit_adam")
    args = parser.parse_args(argv)
    flags.check_training_arguments(parser, args)
    of_others = {"ict": ["ect_q", "ect_stages", "ect_k", "ect_b"]}
    of_others["ect"] = ["discretization_s_0", "constant_discretization_steps", "skip_steps"]
    parser.refuse_idle(of_others[args.objective], f"--objective={args.objective} has no such number; drop it")
    if not args.pretrain_steps:
        names = ["pretrain_p_mean", "pretrain_p_std"]
        parser.refuse_idle(names, "there is no diffusion training; add --pretrain_steps, or drop it")
    if args.sigma_min >= args.sigma_max:
        parser.error(f"--sigma_min={args.sigma_min} must be less than --sigma_max={args.sigma_max}")
    if args.objective == "ect" and not (args.pretrain_steps or args.pretrained_model_name_or_path):
        parser.error(
            "--objective=ect tunes a diffusion model: add --pretrain_steps or --pretrained_model_name_or_path"
        )
    if not 1 < args.ect_q <= args.ect_q**args.ect_stages <= 2**16:
        parser.error("--ect_q must be more than 1, and ect_q^ect_stages at most 65536, where float32 ends")
    if args.discretization_s_1 < args.discretization_s_0:
        parser.error(f"--discretization_s_1={args.discretization_s_1} is less than --discretization_s_0; swap them")
    if args.skip_steps > args.discretization_s_0:
        parser.error(f"--skip_steps={args.skip_steps}: at most --discretization_s_0={args.discretization_s_0}")
    if args.huber_c is None:
        args.huber_c = consistency.default_huber_c(3, args.resolution) if args.objective == "ict" else 0.0
    ct_flags.check_arguments(parser, args)
    return args


@user_errors
def main(args):
    # 1. Accelerator, and every check that needs no weights.
    accelerator = engine.make_accelerator(args)
    is_main, device = accelerator.is_main_process, accelerator.device
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    with accelerator.main_process_first():
        shards, source = image_data.open_images(**ct_flags.image_options(args))
    ct_flags.resolve_num_classes(args, shards, source)
    unet_config = ct_unet.read_unet_config(**ct_flags.unet_options(args))
    run = TrainingRun(args, accelerator)
    run.resolve_data(len(source.keys) if source else None)
    classes = args.num_classes if args.eval_class_accuracy else None
    network = validation.load_feature_network(args, device, side=args.resolution, classes=classes)

    # 2. Data: the position of a resumed run, and the first batch, before any weight is loaded.
    decode = functools.partial(
        decode_image_label, num_classes=args.num_classes, label_name=args.dataset_class_label_column_name
    )
    options = {"source": source, "required": ((IMAGE_KEYS, ("cls", "json")) if args.num_classes else (IMAGE_KEYS,))}
    augmented = functools.partial(decode, **training_data.image_options(args), seen=Counter())
    train_data = TrainingData(shards, augmented, **training_data.data_options(args, accelerator), **options)
    run.follow(train_data)
    run.resolve_steps(training_data.epoch_size(args, shards, run.num_images))
    ct_flags.check_pretrain_steps(args)
    # How long the curriculum is; an extended run keeps the one that it began with.
    tuning_steps = run.resumed.get("tuning_steps") or args.max_train_steps - args.pretrain_steps
    s_0 = args.discretization_s_0
    s_1 = s_0 if args.constant_discretization_steps else args.discretization_s_1
    discretization_steps = functools.partial(
        consistency.discretization_steps, max_train_steps=tuning_steps, s_0=s_0, s_1=s_1
    )
    derived = ct_flags.describe_average(args) | run.derived_configuration()
    sigma_range = {"sigma_min": args.sigma_min, "sigma_max": args.sigma_max, "rho": args.rho}
    timesteps = {
        k: consistency.sampling_timesteps(k, args.mid_sigma, args.discretization_s_1 + 1, **sigma_range)
        for k in args.eval_nfe
    }
    if args.objective == "ict" and tuning_steps:  # with an error where the curriculum or its shares do not fit
        derived["noise levels"] = f"{discretization_steps(0)} to {discretization_steps(tuning_steps - 1)}"
        sigmas = consistency.karras_sigmas(s_0 + 1, **sigma_range)
        consistency.sigma_probabilities(sigmas, args.p_mean, args.p_std, args.skip_steps)
    run.announce(derived)
    batches = iter(train_data)
    first_batch = next(batches)
    if args.dry_run:  # what follows runs on tensors without memory, for two updates of this batch
        labels = f" Its classes: {first_batch['class_labels'].tolist()}." if args.class_conditional else ""
        accelerator.print(f"The first batch was read.{labels} Dry run: nothing is written.")
        run.checkpoint, batches = None, simulation.begin(args, accelerator, first_batch)
        if tuning_steps:  # updates with a target take more than those of diffusion training
            run.global_step = max(run.global_step, args.pretrain_steps)

    # 3. Parametrisation, and the scheduler that samples with it. Noise levels and loss are float32 everywhere.
    f = functools.partial(
        consistency.consistency_function,
        sigma_min=args.sigma_min,
        sigma_data=args.sigma_data,
        noise_precond_type=args.noise_precond_type,
        input_precond_type=args.input_precond_type,
    )
    scheduler = make_scheduler(
        args.noise_precond_type,
        args.input_precond_type,
        num_train_timesteps=args.discretization_s_1 + 1,
        sigma_data=args.sigma_data,
        **sigma_range,
    )

    # 4. Network and its average, float32; F computes under autocast. The target is the same network without gradients.
    torch.manual_seed(args.seed)  # for new weights; all other draws are keyed, see 7.1
    outlined = sharding.is_on(accelerator)  # then a given network gets its weights when it is split
    unet = ct_unet.make_unet(unet_config, args.pretrained_model_name_or_path, outlined, **ct_flags.place(args))
    ema_unet = copy.deepcopy(unet).requires_grad_(False).to(device) if args.use_ema else None
    sharding.shard(accelerator, [unet, *([ema_unet] if ema_unet else [])])
    engine.apply_performance_flags(args, trained=[unet], frozen=[ema_unet] if ema_unet else [])
    target_unet = sharded.plain_forward(unet)  # without accelerate's autocast: --no-cast_teacher computes in float32
    target_autocast = functools.partial(
        torch.autocast, device.type, dtype=weight_dtype, enabled=args.cast_teacher and weight_dtype != torch.float32
    )
    dropout_devices = [device] if device.type == "cuda" else []

    # 5. Optimizer and learning rate.
    optimizer = engine.make_optimizer(args, list(unet.parameters()), run.total_batch_size)
    lr_scheduler = engine.make_lr_scheduler(args, optimizer)
    ema_options = ct_flags.ema_options(args)

    # 6. Prepare, resume, trackers, evaluation.
    unet, optimizer = accelerator.prepare(unet, optimizer)
    networks = {"the student": accelerator.unwrap_model(unet)} | ({"its average": ema_unet} if ema_unet else {})
    run.register(
        networks=networks,
        modules={"ema_unet": ema_unet} if ema_unet else {},
        objects={"lr_scheduler": lr_scheduler},
        tuning_steps=tuning_steps,
    )
    unets = {"raw": accelerator.unwrap_model(unet)} | ({"ema": ema_unet} if ema_unet else {})
    grid_labels = [i % args.num_classes if args.num_classes else None for i in range(args.eval_batch_size)]
    columns = ["" if label is None else str(label) for label in grid_labels]
    grid = functools.partial(sampling.sample_grid, accelerator, unets, scheduler, grid_labels, timesteps, args.seed)
    if args.eval_steps:
        plain = functools.partial(
            decode, **training_data.image_options(args) | {"center_crop": True, "random_flip": False}
        )
        reference = TrainingData(shards, plain, batch_size=1, seed=0, num_lanes=1, **options)
        evaluate = sampling.open_evaluation(
            accelerator,
            network,
            sampling.read_reference(reference, args.eval_num_reference),
            name=args.feature_network,
            num_samples=args.eval_num_samples,
            batch_size=args.eval_batch_size,
            class_accuracy=args.eval_class_accuracy,
        )
        judge = validation.Judge(run, evaluate)
        sampled = sampling.sampled(evaluate, unets, scheduler, timesteps, args.seed)

    # 7. The loop.
    batches = itertools.chain([first_batch], batches)
    num_levels = sigmas = probabilities = None
    draw = functools.partial(consistency.lognormal_sigmas, sigma_min=args.sigma_min, sigma_max=args.sigma_max)
    while run.goes_on:
        batch = next(batches)
        with accelerator.accumulate(unet):
            # 7.1 Images. All draws of a micro-batch are keyed by (seed, micro-batch): the same after a resume and for
            #     any number of processes, different on every rank.
            generator = keyed_generator(args.seed, "ct", batch["micro_batch"], device)
            images = batch["images"].to(device, non_blocking=True).float() / 127.5 - 1  # (B, 3, H, W)
            class_labels = batch["class_labels"].to(device, non_blocking=True) if args.class_conditional else None
            batch_size, step = len(images), run.global_step - args.pretrain_steps  # of the consistency training

            # 7.2 Draw a pair of noise levels: sigma > target_sigma >= 0. 0 is the data.
            if step < 0:
                progress_values = {"pretraining": 1}
                sigma = draw(batch_size, args.pretrain_p_mean, args.pretrain_p_std, generator)  # (B,)
                target_sigma = torch.zeros_like(sigma)
            elif args.objective == "ict":
                if num_levels != discretization_steps(step):
                    num_levels = discretization_steps(step)
                    sigmas = consistency.karras_sigmas(num_levels, **sigma_range)  # (N,) float64
                    probabilities = consistency.sigma_probabilities(sigmas, args.p_mean, args.p_std, args.skip_steps)
                    sigmas, probabilities = (x.to(device, non_blocking=True) for x in (sigmas.float(), probabilities))
                progress_values = {"discretization_steps": num_levels}
                index = torch.multinomial(probabilities, batch_size, replacement=True, generator=generator)
                sigma, target_sigma = sigmas[index + args.skip_steps], sigmas[index]
            else:
                stage = consistency.ect_stage(step, tuning_steps, args.ect_stages)
                progress_values = {"ect_stage": stage}
                sigma = draw(batch_size, args.p_mean, args.p_std, generator)
                target_sigma = consistency.ect_target_sigma(sigma, stage, args.ect_q, args.ect_k, args.ect_b)

            # 7.3 Add the same noise to both sides.
            noise = torch.randn(images.shape, generator=generator, device=device)
            noisy_images = images + append_dims(sigma, 4) * noise
            target_noisy_images = images + append_dims(target_sigma, 4) * noise

            # 7.4 Student: f(x + sigma z, sigma), with dropout masks that are keyed too.
            dropout_seed = keyed_seed(args.seed, "dropout", batch["micro_batch"])
            with torch.random.fork_rng(dropout_devices):
                torch.manual_seed(dropout_seed)
                model_pred = f(unet, noisy_images, sigma, class_labels)

            # 7.5 Target: the same weights and masks without gradients. Up to sigma_min f is the identity: there, the
            #     target is x + r z itself; the data where r = 0.
            target = images
            if step >= 0:
                with torch.no_grad(), target_autocast(), torch.random.fork_rng(dropout_devices):
                    torch.manual_seed(dropout_seed)
                    lower = target_sigma.clamp(min=args.sigma_min)
                    target = f(target_unet, target_noisy_images, lower, class_labels)

            # 7.6 Loss, backward, update: one norm per sample. Before that, diffusion training: squared, EDM's weights.
            if step < 0:
                squared = (model_pred - target).square().flatten(1).mean(1)  # (B,)
                loss = (consistency.edm_weight(sigma, args.sigma_data) * squared).mean()
            else:
                weight = consistency.loss_weight(sigma, target_sigma, args.loss_weighting, args.sigma_data)
                loss = (weight * consistency.pseudo_huber(model_pred, target, args.huber_c)).mean()
            accelerator.backward(loss)
            finite = run.update(optimizer, unet.parameters(), loss, batch["keys"])
            optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)  # of several, they stay in DDP's buckets
        run.means.add({"loss": loss})
        if not accelerator.sync_gradients:
            continue

        # 7.7 After an update: average, logs, evaluation, checkpoint, samples.
        if ema_unet:
            decay = consistency.ema_decay(run.global_step + 1, **ema_options)
            ema_update(ema_unet.parameters(), accelerator.unwrap_model(unet).parameters(), decay, finite)
        lr_scheduler.step()
        run.after_update()
        if run.logs:
            run.log(progress_values | {"lr": lr_scheduler.get_last_lr()[0]})
        if run.evaluates:
            judge(sampled, unets, timesteps)
        if run.saves:
            run.save()
        if run.samples:
            with samples.going_on(accelerator, run.global_step):
                run.show(grid(step=run.global_step), labels=columns)

    # 8. Export: a pipeline that samples with the network's average, then what may fail: card, samples, upload.
    best = run.load_best()
    if not run.stopped:  # by every process
        start_share = consistency.ema_start_share(run.exported_step, **ema_options) if ema_unet else 1.0
        chosen = best["network"] if best else "ema" if start_share <= consistency.MOST_OF_START else "raw"
        save_result(args.output_dir, unets[chosen].eval(), scheduler)
        for name in unets.keys() - {chosen}:
            export.save_parts(args.output_dir, **{f"unet_{name}": unets[name].eval()})
    if not run.stopped:
        with export.after_weights(accelerator, args.output_dir, run.global_step):
            if is_main:
                ct_card.write_card(
                    args.output_dir,
                    flags=run.flags,
                    command=flags.command_line(),
                    global_step=run.exported_step,
                    total_batch_size=run.total_batch_size,
                    chosen=chosen,
                    start_share=start_share,
                    report=accelerator.print,
                )
            images = grid(step=run.exported_step)  # by every process
            if is_main:
                export.save_grid(args.output_dir, images, columns)
    unet, optimizer = accelerator.free_memory(unet, optimizer)
    run.finish()


if __name__ == "__main__":
    main(parse_args())
