"""Latent consistency distillation: a Stable Diffusion or SDXL teacher becomes a student that samples in 1 to 8 steps.

The student maps every point of the teacher's guided ODE trajectory straight to its origin, and is trained to give the
same answer at two neighbouring points of the DDIM grid; the guidance scale w is an input of the student. Paper: Latent
Consistency Models (arXiv 2310.04378), Algorithm 1. Deviations: the new embedding of w starts at zero, so that the
student equals the teacher at step 0; the teacher runs before the student, which lowers the peak memory.

    accelerate launch train_lcm_distill_sd_wds.py --pretrained_teacher_model=runwayml/stable-diffusion-v1-5 \\
        --train_shards_path_or_url="shards/{00000..00099}.tar" --output_dir=lcm --mixed_precision=fp16 \\
        --learning_rate=1e-6 --loss_type=huber --adam_weight_decay=0 --max_train_steps=1000 --train_batch_size=12

To change the method, copy this file and edit step 7. Another solver: 7.7, and its name in `write_card`. One that asks
the teacher twice (Heun's method in alpha / sigma): 7.6 becomes a function of (z, t, w, cond) before the loop. x_0 is
then the mean of both x_0; eps follows from it at the start, (z - alpha x_0) / sigma, where alpha may be 0 and sigma is
not; and `solver.step` is called again.
Another objective: flags, 3 (schedule), 4 (student, target, sampler), 6 (what is saved, sampled), 7, 8, `write_card`.
`python -m tests.made tiny` makes tiny/teacher and tiny/shards/train to try the copy on.
"""

import copy
import functools
import itertools

from common import flags
from common.data.cached_latents import use_cached
from common.data.shards import expand_shards
from common.ema import ema_update
from common.errors import UserError
from common.keyed_random import keyed_generator
from common.losses import LOSS_TYPES, distance
from common.networks import encoders, teachers
from common.results import export
from common.run import engine, sharding, simulation, training_data
from common.run.training_run import TrainingRun, user_errors
from common.run.updates import networks_of
from common.run.validation import TextValidation, load_feature_network
from common.schedules import (
    alpha_sigma,
    append_dims,
    boundary_scalings,
    ddim_timesteps,
    guidance_scale_embedding,
    to_eps,
    to_x_0,
)
from common.solvers import DDIMSolver

import torch
from diffusers import DDPMScheduler


def parse_args(argv=None):
    parser = flags.ArgumentParser(__doc__.split("\n")[0])
    flags.add_teacher_arguments(parser)
    flags.add_data_arguments(parser)
    flags.add_training_arguments(parser, output_dir="lcm-xl-distilled", tracker_project_name="text2image-fine-tune")
    group = parser.add_argument_group("method")
    add, free = group.add_argument, group.add_free  # free: may change where a run resumes
    add("--init_unet", type=flags.path, help="start from an earlier student (its folder) instead of from the teacher")
    add("--w_min", type=flags.non_negative_float, help="smallest guidance w, guidance_scale is w + 1; SD: 5, SDXL: 3")
    add("--w_max", type=flags.non_negative_float, default=15.0, help="largest guidance w")
    add("--num_ddim_timesteps", type=flags.positive_int, default=50, help="points of the DDIM grid")
    add("--loss_type", choices=LOSS_TYPES, default="l2", help="huber is the pseudo-Huber loss")
    add("--huber_c", type=flags.positive_float, default=0.001, help="where the Huber loss turns from square to linear")
    add("--unet_time_cond_proj_dim", type=flags.embedding_width, default=256, help="width of the embedding of w")
    add(
        "--timestep_scaling_factor", type=flags.positive_float, default=10.0, help="t is scaled by it in c_skip, c_out"
    )
    add("--ema_decay", type=flags.beta, default=0.95, help="of the target network")
    free(
        "--validation_guidance_scale", type=flags.positive_float, help="default: 8, or the middle of the trained range"
    )
    args = parser.parse_args(argv)
    flags.check_training_arguments(parser, args)
    return args


def resolve_defaults(args, config):
    flags.resolve_teacher_defaults(args, config, {"w_min": 3.0 if config["is_sdxl"] else 5.0})
    if args.w_min > args.w_max:
        raise UserError(f"--w_min={args.w_min} is larger than --w_max={args.w_max}; swap them")
    if args.validation_guidance_scale is None:
        middle = (args.w_min + args.w_max) / 2
        args.validation_guidance_scale = 8.0 if args.w_min <= 7.0 <= args.w_max else middle + 1.0


@user_errors
def main(args):
    # 1. Accelerator, and every check that needs no weights.
    accelerator = engine.make_accelerator(args)
    is_main, device = accelerator.is_main_process, accelerator.device
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    teacher_dtype = weight_dtype if args.cast_teacher_unet else torch.float32
    teacher_options = flags.teacher_options(args)
    config = teachers.read_teacher_config(args.pretrained_teacher_model, **teacher_options)
    place = {"revision": args.revision, "cache_dir": args.cache_dir}
    if args.pretrained_vae_model_name_or_path:
        config = teachers.read_vae_config(args.pretrained_vae_model_name_or_path, config, **place)
    resolve_defaults(args, config)
    encoders.check_resolution(config, args.resolution)
    if args.init_unet:
        teachers.check_init_unet(args.init_unet, config, args.unet_time_cond_proj_dim, **place)
    noise_scheduler = DDPMScheduler.from_config(config["scheduler"])
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    ddim_grid = ddim_timesteps(args.num_ddim_timesteps, num_train_timesteps).to(device)  # (N,)
    shards = expand_shards(args.train_shards_path_or_url)
    run = TrainingRun(args, accelerator)
    network = load_feature_network(args, device)
    run.resolve_data(training_data.images_in_folder(shards))

    # 2. Data: the position of a resumed run, and the first batch, before any weight is loaded.
    train_data = training_data.text_image_data(args, accelerator, shards, config, weight_dtype)
    run.follow(train_data)
    run.resolve_steps(training_data.epoch_size(args, shards, run.num_images))
    derived = run.derived_configuration() | {"latents": training_data.describe(train_data.cached)}
    run.announce(derived)
    batches = iter(train_data)
    first_batch = next(batches)
    prompts = run.resolve_prompts(first_batch["captions"])
    if args.dry_run:  # what follows runs on tensors without memory, for two updates of this batch
        accelerator.print(f"The first captions: {first_batch['captions'][:4]}. Dry run: nothing is written.")
        run.checkpoint, batches = None, simulation.begin(args, accelerator, first_batch)

    # 3. Schedule and solver, float32; frozen parts, in the compute dtype.
    torch.manual_seed(args.seed + accelerator.process_index)  # for dropout; all other draws are keyed, see 7.1
    prediction_type = noise_scheduler.config.prediction_type
    alpha, sigma = (x.to(device) for x in alpha_sigma(noise_scheduler.alphas_cumprod))  # (T,)
    solver = DDIMSolver(alpha, sigma)
    scalings = functools.partial(boundary_scalings, timestep_scaling=args.timestep_scaling_factor)
    teacher_options |= {"vae": args.pretrained_vae_model_name_or_path, "vae_revision": args.revision}
    accelerator.print(f"loading {args.pretrained_teacher_model}")
    outlined = sharding.is_on(accelerator)  # then its U-Net gets its weights when it is split
    teacher = teachers.load_teacher(args.pretrained_teacher_model, outlined=outlined, **teacher_options)
    use_cached(train_data.cached, teacher.vae)  # cached latents need no encoder
    encoders.to_device(teacher, config, device, weight_dtype)  # VAE and text encoders
    uncond = encoders.uncond_conditioning(teacher)  # what the U-Net is told without a caption, for one sample

    # 4. Student and target, float32, computing under autocast; the scheduler they are sampled with. Without w it is
    #    `teachers.make_student(teacher.unet)` and no timestep_cond, sampled by `teacher.scheduler`. Where its output
    #    is x_0: `DDIMScheduler.from_config(config["scheduler"], prediction_type="sample")`, and the same in `to_x_0`.
    unet = teachers.make_student(teacher.unet, args.unet_time_cond_proj_dim, args.init_unet, **place)
    target_unet = copy.deepcopy(unet).requires_grad_(False).to(device)
    teacher_unet = teacher.unet.to(device, teacher_dtype)  # after the student has its float32 weights
    sampler = teachers.lcm_scheduler(config["scheduler"], args.num_ddim_timesteps, args.timestep_scaling_factor)
    sharding.shard(accelerator, [unet, target_unet], plain=[teacher_unet])
    engine.apply_performance_flags(args, trained=[unet], frozen=[target_unet, teacher_unet], vae=teacher.vae)

    # 5. Optimizer and learning rate.
    optimizer = engine.make_optimizer(args, list(unet.parameters()), run.total_batch_size)
    lr_scheduler = engine.make_lr_scheduler(args, optimizer)

    # 6. Prepare, resume, trackers. Without a target network, modules={}; a student without w is sampled with the
    #    pipeline's own guidance. `teacher_unet` here is what `--eval_steps` compares the student with.
    unet, optimizer = accelerator.prepare(unet, optimizer)
    run.register(
        networks=networks_of(teacher) | {"the student": accelerator.unwrap_model(unet), "the target": target_unet},
        modules={"target_unet": target_unet},
        objects={"lr_scheduler": lr_scheduler},
        validation_prompts=prompts,
    )
    validation = TextValidation(
        run,
        teacher,
        network=network,
        shown={"student": accelerator.unwrap_model(unet), "target": target_unet},
        scheduler=sampler,
        guidance_scale=args.validation_guidance_scale,
        teacher_unet=teacher_unet,
        teacher_guidance_scale=args.validation_guidance_scale,
    )

    # 7. The loop.
    batches = itertools.chain([first_batch], batches)
    while run.goes_on:
        batch = next(batches)
        with accelerator.accumulate(unet):
            # 7.1 Encode. All draws of a micro-batch are keyed by (seed, micro-batch): the same after a resume and for
            #     any number of processes, different on every rank.
            generator = keyed_generator(args.seed, "lcm", batch["micro_batch"], device)
            latents = encoders.encode_batch(teacher.vae, batch, generator, args.vae_encode_batch_size)  # (B, 4, h, w)
            time_ids = encoders.time_ids(batch, args.resolution, args.use_fix_crop_and_size)  # (B, 6), for SDXL
            cond = encoders.conditioning(teacher, batch["captions"], time_ids)
            batch_size = len(latents)

            # 7.2 Draw t_{n+k} on the DDIM grid, and t_n one grid step below it.
            index = torch.randint(args.num_ddim_timesteps, (batch_size,), generator=generator, device=device)
            start_timesteps = ddim_grid[index]  # (B,)
            timesteps = (start_timesteps - num_train_timesteps // args.num_ddim_timesteps).clamp(min=0)  # (B,)

            # 7.3 Boundary scalings (Appendix B) at both times.
            c_skip_start, c_out_start = (append_dims(c, 4) for c in scalings(start_timesteps))
            c_skip, c_out = (append_dims(c, 4) for c in scalings(timesteps))

            # 7.4 Add noise: z_{t_{n+k}} = alpha z_0 + sigma eps.
            noise = torch.randn(latents.shape, generator=generator, device=device)
            alpha_start, sigma_start = (append_dims(x[start_timesteps], 4) for x in (alpha, sigma))
            noisy_latents = alpha_start * latents + sigma_start * noise  # (B, 4, h, w)

            # 7.5 Draw the guidance w and embed it.
            w = args.w_min + (args.w_max - args.w_min) * torch.rand(batch_size, generator=generator, device=device)
            timestep_cond = guidance_scale_embedding(w, args.unet_time_cond_proj_dim)  # (B, 256)

            with torch.no_grad():
                # 7.6 Teacher: cond and uncond in one forward, guided = cond + w (cond - uncond).
                teacher_output = teacher_unet(
                    noisy_latents.repeat(2, 1, 1, 1).to(teacher_dtype),
                    start_timesteps.repeat(2),
                    **encoders.concat_conditioning(cond, uncond, teacher_dtype),
                ).sample.float()
                cond_output, uncond_output = teacher_output.chunk(2)
                guided = cond_output + append_dims(w, 4) * (cond_output - uncond_output)
                pred_x_0 = to_x_0(guided, noisy_latents, alpha_start, sigma_start, prediction_type)
                pred_eps = to_eps(guided, noisy_latents, alpha_start, sigma_start, prediction_type)

                # 7.7 One DDIM step down to t_n: z_{t_n} = alpha_{t_n} x_0 + sigma_{t_n} eps.
                alpha_t, sigma_t = (append_dims(x[timesteps], 4) for x in (alpha, sigma))
                z_prev = solver.step(pred_x_0, pred_eps, timesteps)  # (B, 4, h, w)

                # 7.8 Target: f(z_{t_n}, t_n, c, w) of the EMA network.
                with accelerator.autocast():
                    target_output = target_unet(z_prev, timesteps, timestep_cond=timestep_cond, **cond).sample
                target_x_0 = to_x_0(target_output.float(), z_prev, alpha_t, sigma_t, prediction_type)
                target = c_skip * z_prev + c_out * target_x_0

            # 7.9 Student: f(z_{t_{n+k}}, t_{n+k}, c, w).
            output = unet(noisy_latents, start_timesteps, timestep_cond=timestep_cond, **cond).sample
            student_x_0 = to_x_0(output.float(), noisy_latents, alpha_start, sigma_start, prediction_type)
            model_pred = c_skip_start * noisy_latents + c_out_start * student_x_0

            # 7.10 Loss, backward, update; skipped where a gradient is not finite (common/run/updates.py).
            loss = distance(model_pred, target, args.loss_type, args.huber_c)
            accelerator.backward(loss)
            finite = run.update(optimizer, unet.parameters(), loss, batch["keys"])
            optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)  # of several, they stay in DDP's buckets
        run.means.add({"loss": loss})
        if not accelerator.sync_gradients:
            continue

        # 7.11 After an update: EMA of the target, logs, evaluation, checkpoint, samples.
        ema_update(target_unet.parameters(), accelerator.unwrap_model(unet).parameters(), args.ema_decay, finite)
        lr_scheduler.step()
        run.after_update()
        if run.logs:
            run.log({"lr": lr_scheduler.get_last_lr()[0]})
        if run.evaluates:
            validation.evaluate()
        if run.saves:
            run.save()
        if run.samples:
            validation.show()

    # 8. Export: weights, then what may fail: a pipeline that samples with the student, samples, card, upload.
    run.load_best()
    if not run.stopped:
        parts = {"unet": accelerator.unwrap_model(unet).eval(), "scheduler": sampler}
        export.save_parts(args.output_dir, **parts, unet_target=target_unet)  # by every process
        with export.after_weights(accelerator, args.output_dir, run.global_step):
            if is_main:
                pipeline = teachers.load_teacher(args.pretrained_teacher_model, **teacher_options, **parts)
                export.save_rest(pipeline, args.output_dir, written=parts)
                write_card(args, config, shards, run)
            images = validation.grid()  # by every process
            if is_main:
                export.save_grid(args.output_dir, images, prompts)
    unet, optimizer = accelerator.free_memory(unet, optimizer)
    run.finish()


def write_card(args, config, shards, run):
    w = f"from {args.w_min:g} to {args.w_max:g}" if args.w_min < args.w_max else f"fixed at {args.w_min:g}"
    low, high = args.w_min + 1, args.w_max + 1
    model, size = export.model_code(args.output_dir, args.hub_model_id), export.size_code(config, args.resolution)
    prompt = export.quoted(run.prompts[0])
    steps, scale = min(4, args.num_ddim_timesteps), args.validation_guidance_scale
    snippet = f"""{export.pipeline_code(model)}
image = pipe({prompt}, num_inference_steps={steps}, guidance_scale={scale:g}{size}).images[0]
"""
    export.write_model_card(
        args.output_dir,
        method="A latent consistency model (arXiv 2310.04378): it samples in 1 to 8 steps with LCMScheduler.",
        teacher=args.pretrained_teacher_model,
        data=export.shards_text(args.train_shards_path_or_url, shards),
        command=flags.command_line(),
        snippet=snippet,
        notes=[
            f"Trained for {run.exported_step} updates of {run.total_batch_size} samples at {args.resolution} pixels, "
            f"w {w}.",
            f"`guidance_scale` is w + 1 and an input of the network: use {low:g} to {high:g}, the trained range.",
            "`unet_target/` holds the EMA of the student that made the targets.",
        ],
        tags=["latent-consistency-model", "text-to-image", "diffusers"],
    )


if __name__ == "__main__":
    main(parse_args())
