"""Trajectory segmented consistency distillation as LoRAs: adapters for an SD or SDXL teacher, for 8, 4, 2, 1 steps.

One frozen base network serves three times: without the adapters it is the teacher, with them the student, with them
under no_grad the target. The trajectory is cut into k segments, k falls from stage to stage in one run, and each stage
leaves a LoRA for k steps. The distance is a mix of MSE and an adversarial loss. Paper: Hyper-SD (arXiv 2404.13686),
Section 3.1, Algorithm 1; the discriminator is that of SDXL-Lightning (2402.13929). Deviations: segments are cut on
node indices of the DDIM grid; jumps end at the lower end of a segment by default (--boundary_prob), where a network
that cannot see the end has an exact solution. `--score_weights` adds score distillation, step 7.9.

    accelerate launch train_tscd_distill_lora_sd_wds.py --pretrained_teacher_model=runwayml/stable-diffusion-v1-5 \\
        --train_shards_path_or_url="shards/{00000..00099}.tar" --output_dir=tscd_lora --mixed_precision=fp16 \\
        --learning_rate=1e-4 --adam_weight_decay=0 --max_train_steps=4000 --train_batch_size=12

To change the method, copy this file and edit step 7. Another solver: 7.6 and 7.7, and the line of 3 that makes it (7.8
and 7.9 jump with it too). Another objective: 3 (schedule), 4 (student, target, sampler), 6, 7, 8, `write_card`.
"""

import argparse
import itertools
from pathlib import Path

from common import flags, losses
from common.data.cached_latents import use_cached
from common.data.shards import expand_shards
from common.keyed_random import keyed_generator, keyed_seed
from common.networks import encoders, lora, sharded, teachers
from common.results import export, samples
from common.run import engine, sharding, simulation, training_data, updates
from common.run.training_run import TrainingRun, user_errors
from common.run.validation import TextValidation, load_feature_network
from common.schedules import alpha_sigma, append_dims
from common.tscd import adversarial, matching, segments
from common.tscd import flags as tscd_flags
from common.tscd.discriminator import Discriminator
from common.tscd.solver import TrajectorySolver, tcd_scheduler

import torch
from accelerate.utils import gather_object
from diffusers import DDPMScheduler


def parse_args(argv=None):
    parser = flags.ArgumentParser(__doc__.split("\n")[0])
    flags.add_teacher_arguments(parser)
    flags.add_data_arguments(parser)
    flags.add_training_arguments(parser, output_dir="tscd-distilled-lora", tracker_project_name="text2image-fine-tune")
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("method").add_argument
    add(
        "--init_lora",
        type=flags.path,
        help="start from an earlier LoRA (its folder or file) instead of from the teacher",
    )
    add("--lora_rank", type=flags.positive_int, default=64, help="rank of the adapters")
    add("--lora_alpha", type=flags.positive_float, default=64, help="adapters are scaled by alpha / rank")
    add("--lora_dropout", type=flags.beta, default=0.0, help="dropout before the adapters, while training")
    add("--lora_target_modules", help="ends of module paths, with commas; default: LCM-LoRA's list")
    add("--w_min", type=flags.non_negative_float, default=4.0, help="smallest guidance w, guidance_scale is w + 1")
    add("--w_max", type=flags.non_negative_float, default=5.0, help="largest guidance w")
    add("--num_ddim_timesteps", type=flags.positive_int, default=40, help="points of the grid, N")
    add("--stage_segments", type=flags.int_list, default=[8, 4, 2, 1], help="k of every stage: the steps of its model")
    add("--stage_steps", type=flags.int_list, help="updates of each stage; default: equal parts of --max_train_steps")
    add("--boundary_prob", type=flags.fraction, default=1.0, help="share of jumps to the segment's end; the paper: 0")
    add("--swap_terminal_noise", action=yes_no, default=True, help="start from pure noise at the last timestep")
    add(
        "--noise_offset",
        type=flags.non_negative_float,
        default=0.0,
        help="scale of noise that is constant per channel",
    )
    add("--loss_type", choices=losses.LOSS_TYPES, default="l2", help="huber is the pseudo-Huber loss")
    add("--huber_c", type=flags.positive_float, default=0.001, help="where the Huber loss turns from square to linear")
    tscd_flags.add_adversarial_arguments(parser)
    tscd_flags.add_score_arguments(parser)
    parser.set_defaults(validation_num_inference_steps=None)  # those of the stage
    args = parser.parse_args(argv)
    flags.check_training_arguments(parser, args)
    tscd_flags.check_stage_arguments(parser, args)
    return args


@user_errors
def main(args):
    # 1. Accelerator, and every check that needs no weights.
    accelerator = engine.make_accelerator(args)
    is_main, device = accelerator.is_main_process, accelerator.device
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    teacher_dtype = weight_dtype if args.cast_teacher_unet else torch.float32
    frozen_dtype = teacher_dtype if args.freeze_discriminator_backbone else None
    teacher_options = flags.teacher_options(args)
    config = teachers.read_teacher_config(args.pretrained_teacher_model, **teacher_options)
    place = {"revision": args.revision, "cache_dir": args.cache_dir}
    if args.pretrained_vae_model_name_or_path:
        config = teachers.read_vae_config(args.pretrained_vae_model_name_or_path, config, **place)
    flags.resolve_teacher_defaults(args, config)
    encoders.check_resolution(config, args.resolution)
    target_modules = lora.parse_target_modules(args.lora_target_modules)
    lora_options = {"rank": args.lora_rank, "alpha": args.lora_alpha, "target_modules": target_modules}
    lora.check_lora(config["unet"], **lora_options, init_lora=args.init_lora)
    noise_scheduler = DDPMScheduler.from_config(config["scheduler"])
    process = tscd_flags.check_score(args, config["unet"], noise_scheduler, accelerator)
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    nodes = segments.nodes(args.num_ddim_timesteps, args.stage_segments, num_train_timesteps).to(device)  # (N + 1,)
    shards = expand_shards(args.train_shards_path_or_url)
    run = TrainingRun(args, accelerator)
    tscd_flags.resolve_real(args, run.resumed)
    network = load_feature_network(args, device)
    run.resolve_data(training_data.images_in_folder(shards))

    # 2. Data: the position of a resumed run, and the first batch, before any weight is loaded.
    train_data = training_data.text_image_data(args, accelerator, shards, config, weight_dtype)
    run.follow(train_data)
    run.resolve_steps(training_data.epoch_size(args, shards, run.num_images))
    stages = tscd_flags.resolve_stages(args, run.resumed)
    with_discriminator = any(stage.adv_weight for stage in stages)
    derived = run.derived_configuration() | {"latents": training_data.describe(train_data.cached)}
    run.announce(derived | {stage.name: stage.summary for stage in stages})
    batches = iter(train_data)
    first_batch = next(batches)
    prompts = run.resolve_prompts(first_batch["captions"])
    if args.dry_run:  # what follows runs on tensors without memory, for two updates of this batch
        accelerator.print(f"The first captions: {first_batch['captions'][:4]}. Dry run: nothing is written.")
        run.checkpoint, batches = None, simulation.begin(args, accelerator, first_batch)
        stages, run.global_step = segments.heaviest_update(stages)

    # 3. Schedule and solver, float32; frozen parts, in the compute dtype.
    torch.manual_seed(args.seed + accelerator.process_index)  # for dropout; all other draws are keyed, see 7.1
    alpha, sigma = (x.to(device) for x in alpha_sigma(noise_scheduler.alphas_cumprod))  # (T,)
    solver = TrajectorySolver(alpha, sigma, noise_scheduler.config.prediction_type)
    teacher_options |= {"vae": args.pretrained_vae_model_name_or_path, "vae_revision": args.revision}
    accelerator.print(f"loading {args.pretrained_teacher_model}")
    outlined = sharding.is_on(accelerator)  # then its U-Net gets its weights when it is split
    teacher = teachers.load_teacher(args.pretrained_teacher_model, outlined=outlined, **teacher_options)
    use_cached(train_data.cached, teacher.vae)  # cached latents need no encoder
    encoders.to_device(teacher, config, device, weight_dtype)  # VAE and text encoders
    uncond = encoders.uncond_conditioning(teacher)  # what the U-Net is told without a caption, for one sample
    middle_w = (args.w_min + args.w_max) / 2  # of samples and scores

    # 4. Student: the base with float32 adapters; without them it is the teacher. The scheduler it is sampled with.
    if with_discriminator:
        latent_size = args.resolution // encoders.vae_scale_factor(config["vae"])
        discriminator = Discriminator(teacher.unet, latent_size, frozen_dtype, device)
    teacher_unet = teacher.unet.to(device, teacher_dtype)  # after the discriminator has its float32 weights
    lora.add_lora(teacher_unet, **lora_options, dropout=args.lora_dropout, init_lora=args.init_lora)
    unet = teacher_unet.train()
    sharding.shard(accelerator, [], plain=[unet])
    if args.score_weights:
        scores = matching.make_scores(unet, uncond, middle_w, **tscd_flags.fake_options(args))
    teacher_forward = sharded.plain_forward(teacher_unet)  # without the autocast that accelerate puts around it
    sampler = tcd_scheduler(config["scheduler"], args.num_ddim_timesteps)
    trained = [unet, *([discriminator.encoder] if with_discriminator else [])]
    engine.apply_performance_flags(args, trained=trained, frozen=[], vae=teacher.vae)

    # 5. Optimizer and learning rate.
    optimizer = engine.make_optimizer(args, lora.lora_parameters(unet), run.total_batch_size)
    lr_scheduler = engine.make_lr_scheduler(args, optimizer)
    lora.register_adapter_checkpointing(accelerator, unet)
    modules, objects = {}, {"lr_scheduler": lr_scheduler}
    if with_discriminator:
        rates = {"learning_rate": args.adv_learning_rate, "head_learning_rate": args.adv_head_learning_rate}
        adversary = adversarial.Adversary(discriminator, accelerator, **rates)
        modules["discriminator"], objects = discriminator, objects | adversary.objects
    if args.score_weights:
        fake_optimizer = engine.make_optimizer(args, scores.trained, run.total_batch_size, args.fake_learning_rate)
        options = {"process": process, "accelerator": accelerator, **tscd_flags.score_options(args, lr_scheduler)}
        jumps = matching.Jumps(unet, solver, args.seed)
        score = matching.StageScore(jumps, scores, fake_optimizer, **options)
        modules["fake_score"], objects = scores.trained, objects | score.objects

    # 6. Prepare, resume, trackers.
    unet, optimizer = accelerator.prepare(unet, optimizer)
    run.register(
        networks=updates.networks_of(teacher) | {f"the {name}": module for name, module in modules.items()},
        modules=modules,
        objects=objects,
        validation_prompts=prompts,
        stage_edges=[0, *(each.end for each in stages)],
    )
    shown = {"student": accelerator.unwrap_model(unet)}

    validation = TextValidation(
        run,
        teacher,
        network=network,
        shown=shown,
        scheduler=sampler,
        guidance_scale=1.0,
        teacher_unet=teacher_unet,
        teacher_guidance_scale=middle_w + 1.0,
    )

    # 7. The loop.
    batches, grid = itertools.chain([first_batch], batches), None
    while run.goes_on:
        stage, begins = segments.stage_at(stages, run.global_step), accelerator.sync_gradients  # an update
        if stage.adv_weight and run.global_step == stage.start and begins:
            adversary.begin(keyed_seed(args.seed, "discriminator", stage.index))
        batch = next(batches)
        with accelerator.accumulate(unet):
            # 7.1 Encode. All draws of a micro-batch are keyed by (seed, micro-batch): the same after a resume and for
            #     any number of processes, different on every rank.
            generator = keyed_generator(args.seed, "tscd", batch["micro_batch"], device)
            latents = encoders.encode_batch(teacher.vae, batch, generator, args.vae_encode_batch_size)  # (B, 4, h, w)
            time_ids = encoders.time_ids(batch, args.resolution, args.use_fix_crop_and_size)  # (B, 6), for SDXL
            cond = encoders.conditioning(teacher, batch["captions"], time_ids)
            batch_size = len(latents)

            # 7.2 Draw the nodes t > t' >= s of a segment, and its upper end.
            grid_options = {"num_segments": stage.num_segments, "num_ddim_timesteps": args.num_ddim_timesteps}
            grid_options |= {"boundary_prob": args.boundary_prob, "top_prob": stage.top_prob}
            drawn = segments.draw_segment(**grid_options, batch_size=batch_size, generator=generator)
            start_timesteps, timesteps, end_timesteps, top_timesteps = (nodes[index] for index in drawn)  # (B,) each
            is_whole = drawn[3] - drawn[2] == args.num_ddim_timesteps // stage.num_segments  # s: the segment's end
            is_whole &= (drawn[0] == drawn[3]) | (stage.adv_real != "data")  # t: its upper end, where sampling starts
            count = batch_size * segments.share_whole(**grid_options, from_top=stage.adv_real == "data")

            # 7.3 No boundary scalings: the jump is the identity at s = t.

            # 7.4 Add noise: x_t = alpha z_0 + sigma eps, and noise alone at the last timestep.
            noise = torch.randn(latents.shape, generator=generator, device=device)
            noise += args.noise_offset * torch.randn((*noise.shape[:2], 1, 1), generator=generator, device=device)
            alpha_start, sigma_start = (append_dims(x[start_timesteps], 4) for x in (alpha, sigma))
            noisy_latents = alpha_start * latents + sigma_start * noise  # (B, 4, h, w)
            if args.swap_terminal_noise:
                is_last_timestep = append_dims(start_timesteps == num_train_timesteps - 1, 4)
                noisy_latents = torch.where(is_last_timestep, noise, noisy_latents)

            # 7.5 Draw the guidance w.
            w = args.w_min + (args.w_max - args.w_min) * torch.rand(batch_size, generator=generator, device=device)

            with torch.no_grad():
                # 7.6 Teacher: cond and uncond in one forward, guided = cond + w (cond - uncond).
                with lora.adapters_off(teacher_unet):
                    teacher_output = teacher_forward(
                        noisy_latents.repeat(2, 1, 1, 1).to(teacher_dtype),
                        start_timesteps.repeat(2),
                        **encoders.concat_conditioning(cond, uncond, teacher_dtype),
                    ).sample.float()
                cond_output, uncond_output = teacher_output.chunk(2)
                guided = cond_output + append_dims(w, 4) * (cond_output - uncond_output)

                # 7.7 The exact jump down to t': r x_t + (sigma_t' - r sigma_t) eps with r = alpha_t' / alpha_t.
                z_prev = solver.jump(guided, noisy_latents, start_timesteps, timesteps)  # (B, 4, h, w)

                # 7.8 Target: the student's own jump from t' to s.
                with accelerator.autocast():
                    target_output = teacher_unet(z_prev, timesteps, **cond).sample
                target = solver.jump(target_output, z_prev, timesteps, end_timesteps)

            # 7.9 Where the stage has a score: the fake one learns from what the student's k jumps make of fresh noise,
            #     and distribution matching moves that; backward at once. Then the student's jump from t to s.
            loss_score, score_logged = 0.0, {}
            if stage.score_weight:
                score.jumps.take(latents, cond, nodes[:: args.num_ddim_timesteps // stage.num_segments].flip(0))
                loss_score, score_logged = score.loss(stage, run, batch["micro_batch"], begins)
                if run.stopped:  # in the fake score's warm-up, of which nothing is kept
                    break
                accelerator.backward(loss_score)
            output = unet(noisy_latents, start_timesteps, **cond).sample
            model_pred = solver.jump(output, noisy_latents, start_timesteps, end_timesteps)

            # 7.10 Loss: lambda_mse d(y^, y) + lambda_adv softplus(-D(y^)), backward, update.
            mse_pred, adv_pred = (model_pred.view_as(model_pred) for _ in range(2))  # to tell their gradients apart
            loss_mse = losses.distance(mse_pred, target, args.loss_type, args.huber_c)
            loss, adv_logged = stage.mse_weight * loss_mse, {}
            if stage.adv_weight:
                adv_generator = keyed_generator(args.seed, "adversarial", batch["micro_batch"], device)
                ends = {"end_timesteps": end_timesteps, "top_timesteps": top_timesteps}
                renoising = adversarial.draw_renoising(alpha, **ends, shape=latents.shape, generator=adv_generator)
                adv_timesteps, q, adv_noise = renoising
                real = target
                if stage.adv_real == "data":  # what the jump should look like: alpha_s z_0 + sigma_s eps'
                    real = adversarial.noise_data(solver, latents, end_timesteps, generator=adv_generator)
                context = {"timesteps": adv_timesteps, "cond": cond}
                context |= {"noisy_latents": noisy_latents, "start_timesteps": start_timesteps}
                context["conditional"] = stage.is_conditional(run.global_step, args.adv_unconditional_start)
            if stage.adv_weight and not stage.is_warmup(run.global_step):
                mse_pred.retain_grad(), adv_pred.retain_grad()
                with accelerator.autocast():
                    (fake_logits,) = discriminator([q * adv_pred + adv_noise], **context)
                adv_losses = adversarial.generator_loss(fake_logits)  # (B,)
                loss = loss + stage.adv_weight * adversarial.masked_mean(adv_losses, is_whole, count)
                adv_logged["loss_adv"] = adversarial.masked_mean(adv_losses, is_whole)
            accelerator.backward(loss)
            run.update(optimizer, lora.lora_parameters(unet), loss + loss_score, batch["keys"])
            optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)  # of several, they stay in DDP's buckets
            if "loss_adv" in adv_logged and stage.mse_weight:
                adv_logged["grad_norm_ratio"] = adv_pred.grad.norm() / mse_pred.grad.norm()

            #      The discriminator: softplus(-D(real)) + softplus(D(y^)), in every micro-batch too.
            if stage.adv_weight:
                renoised = [q * x + adv_noise for x in (real, model_pred.detach())]
                over = {"mask": is_whole, "count": count, "stage": stage, "global_step": run.global_step}
                adv_logged |= adversary.learn(renoised, guard=run.guard, **over, **context)
        run.means.add({"loss": loss + loss_score, "loss_mse": loss_mse, **score_logged})
        run.means.add(adv_logged, weight=is_whole.sum())
        if not accelerator.sync_gradients:
            continue

        # 7.11 After an update: logs, the stage's model, evaluation, checkpoint, samples.
        lr_scheduler.step()
        run.after_update()
        if run.logs:
            watched, warnings = score.watch() if stage.score_weight else ({}, "")
            warnings += adversary.watch.warning() if with_discriminator else ""
            accelerator.print(flags.spelled(warnings), end="")
            run.log(watched | {"stage": stage.index, "lr": lr_scheduler.get_last_lr()[0]})
        if run.global_step in (stage.end, args.max_train_steps):  # before the checkpoint: a resume goes on after it
            folder, grid = Path(args.output_dir, stage.name), None
            lora.save_lora(folder, unet)  # by every process
            export.save_parts(folder, scheduler=sampler)
            if is_main:
                with samples.going_on(accelerator, run.global_step):
                    write_card(args, config, teacher_options, stage, folder, shards, run)
            grid = validation.show(stage.num_segments, name=f"{stage.name}/sample_grid.png")  # by every process
        if run.evaluates or run.global_step == stage.end:
            validation.evaluate(stage.num_segments, stage=stage.name)
        if run.saves or run.global_step == stage.end:
            run.save()
        if run.samples and run.global_step != stage.end:
            validation.show(stage.num_segments)

    # 8. Export: the LoRA for diffusers and for ComfyUI / A1111, then what may fail: card, samples, upload.
    stage = segments.stage_at(stages, run.global_step - 1)
    best = run.load_best(stage.name)
    if not run.stopped:
        lora.save_lora(args.output_dir, unet)  # by every process
        export.save_parts(args.output_dir, scheduler=sampler)
        with export.after_weights(accelerator, args.output_dir, run.global_step):
            if is_main:
                write_card(args, config, teacher_options, stage, None, shards, run)
            if best or not all(gather_object([grid is not None])):  # a resume with nothing left to do, or it failed
                grid = validation.grid(stage.num_segments)  # by every process
            if is_main:
                export.save_grid(args.output_dir, grid, prompts)
                if not best:  # else the stage's folder keeps its last weights
                    export.save_grid(Path(args.output_dir, stage.name), grid, prompts)
    unet, optimizer = accelerator.free_memory(unet, optimizer)
    run.finish()


def write_card(args, config, teacher_options, stage, stage_folder, shards, run):
    """README.md of the LoRA in --output_dir, or of one stage's in its folder there."""
    w = f"from {args.w_min:g} to {args.w_max:g}" if args.w_min < args.w_max else f"fixed at {args.w_min:g}"
    model, size = export.model_code(args.output_dir, args.hub_model_id), export.size_code(config, args.resolution)
    prompt = export.quoted(run.prompts[0])
    prefix = f"{stage.name}/" if stage_folder else ""
    weight_name = f"{prefix}{lora.WEIGHTS}"  # not subfolder=: a file of that name above it would be loaded instead
    k, classes = stage.num_segments, ["TCDScheduler"]
    snippet = f"""
{export.teacher_code(args.pretrained_teacher_model, config["is_sdxl"], classes, **teacher_options)}
pipe.scheduler = TCDScheduler.from_pretrained({model}, subfolder="{prefix}scheduler")
pipe.load_lora_weights({model}, weight_name="{weight_name}")
image = pipe({prompt}, num_inference_steps={k}, guidance_scale=1, eta=0.0{size}).images[0]
"""
    folder = stage_folder or args.output_dir
    export.write_model_card(
        folder,
        method=f"A LoRA that samples in {k} step(s), by trajectory segmented consistency distillation (2404.13686).",
        teacher=args.pretrained_teacher_model,
        data=export.shards_text(args.train_shards_path_or_url, shards),
        command=flags.command_line(),
        snippet=snippet,
        notes=[
            f"Trained for {run.exported_step} updates of {run.total_batch_size} samples at {args.resolution} pixels, "
            f"w {w}; in this stage {stage.weights}.",
            segments.steps_note(k, args.boundary_prob),
            "Guidance is baked in: pass `guidance_scale=1`; the default of the pipeline would guide twice.",
            f"Rank {args.lora_rank}, alpha {args.lora_alpha:g}. `pytorch_lora_weights.safetensors` is for diffusers, "
            "`pytorch_lora_weights_kohya.safetensors` for ComfyUI and A1111.",
        ],
        tags=["tscd", "lora", "text-to-image", "diffusers"],
    )


if __name__ == "__main__":
    main(parse_args())
