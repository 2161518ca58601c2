"""Direct distillation: any diffusers pipeline learns to give in a few steps what its teacher gives in many.

From the same prompt and noise, the student's few-step result is regressed onto the teacher's recorded many-step
result, with gradients through all steps of the pipeline's own call, so that training and inference are the same code.
Method: DiffSynth-Studio's direct distillation; there is no paper. Deviations: targets are the teacher's latents, not
an image that is encoded again; the loss is a pseudo-Huber distance in units of the latents' standard deviation.
`--score_weight` adds score distillation, steps 7.2 and 7.3. Left out: LPIPS, supervision of intermediate states.

    python -m common.tools.generate_pairs --pretrained_teacher_model=Qwen/Qwen-Image --prompts=prompts.txt \\
        --output_dir=pairs --num_inference_steps=40 --guidance_scale=4 --negative_prompt=" " --dtype=bfloat16
    accelerate launch train_direct_distill.py --pretrained_teacher_model=Qwen/Qwen-Image --pairs_dir=pairs \\
        --output_dir=direct --num_inference_steps=4 --lora_rank=64 --mixed_precision=bf16 --gradient_checkpointing

To change the method, copy this file and edit step 7. Another solver is another `--student_scheduler`. Another
objective: 7.2 to 7.6, 4 and 6 (what is measured and sampled), 8, `write_card`.
"""

import contextlib
import functools
import json
from pathlib import Path

from common import flags
from common.data import tables
from common.direct import embeddings, pairing, pairs, pipelines, probes, score, sources, stepwise
from common.direct import flags as direct_flags
from common.direct.card import write_card
from common.direct.student import (
    check_noise,
    check_overrides,
    check_pairs,
    check_start,
    check_teacher,
    freeze_unused,
    measure,
    possible_calls,
    roll_out,
    start_from,
    student_kwargs,
    teachers_calls,
)
from common.direct.validation import PairValidation, exchanged
from common.ema import ema_update
from common.errors import UserError
from common.losses import LOSS_TYPES, distance
from common.networks import fusing, lora, quantized
from common.results import export, samples
from common.run import engine, sharding, simulation
from common.run.training_run import TrainingRun, user_errors
from common.run.updates import networks_of
from common.run.validation import load_feature_network
from common.score.matching import ScoreMatching

import torch


def parse_args(argv=None):
    parser = flags.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument_group("teacher").add_argument
    add(
        "--pretrained_teacher_model",
        type=flags.path,
        required=True,
        help="folder or hub name of any text-to-image or -video pipeline",
    )
    flags.add_hub_arguments(add, "the teacher")
    flags.add_teacher_lora(add)
    direct_flags.add_data_arguments(parser)
    flags.add_training_arguments(parser, "direct-distilled", "direct-distillation", samples="pairs")
    group = parser.add_argument_group("method")
    add, free = group.add_argument, group.add_free
    add("--num_inference_steps", type=flags.positive_int, help="of the student; default: 4, or the table's")
    add("--student_scheduler", help="class of diffusers; default: the one that made the pairs")
    add("--student_scheduler_kwargs", help="JSON object of changes to its configuration")
    add("--student_kwargs", help="JSON object of arguments of the student's call, over what is found out")
    add("--loss_type", choices=LOSS_TYPES, default="huber", help="huber is the pseudo-Huber loss")
    add("--huber_c", type=flags.positive_float, default=0.1, help="in standard deviations of the latents")
    free("--backward", choices=("whole", "stepwise"), default="whole", help="stepwise: one step's activations")
    add("--ema_decay", type=flags.beta, default=0.0, help="of the weights that are measured and saved; 0: no EMA")
    add("--lora_rank", type=flags.non_negative_int, default=64, help="0 trains all weights of the denoiser")
    add("--lora_alpha", type=flags.positive_float, help="adapters are scaled by alpha / rank; default: the rank")
    add("--lora_dropout", type=flags.beta, default=0.0)
    add("--lora_target_modules", help="comma list; default: every linear layer and convolution of the blocks")
    add("--quantize_base", choices=quantized.KINDS, help="the frozen base of a LoRA in 4 or 8 bits")
    add("--init_lora", type=flags.path, help="start from this LoRA of the same rank, alpha and modules")
    add("--init_student", type=flags.path, help="start from the student of an earlier run; --lora_rank=0")
    direct_flags.add_score_arguments(parser)
    parser.set_defaults(train_batch_size=4, gradient_accumulation_steps=8, learning_rate=None)
    parser.set_defaults(lr_scheduler="constant_with_warmup", lr_warmup_steps=50)
    args = parser.parse_args(argv)
    direct_flags.check_arguments(parser, args)
    for name in ("student_scheduler_kwargs", "student_kwargs", *["score_kwargs"] * bool(args.score_weight)):
        try:
            setattr(args, name, pipelines.parse_kwargs(f"--{name}", getattr(args, name)))
        except UserError as error:
            parser.error(error)
    flags.check_training_arguments(parser, args)
    return args


def derived_configuration(run, num_train):
    """What follows from the flags: {name: text}. num_train: pairs to train on."""
    return run.derived_configuration() | {
        "samples per update": str(run.total_batch_size) + " (32 or more are better)" * (run.total_batch_size < 32),
        "pairs": f"{num_train} to train on, {run.args.num_held_out} held out",
        "evaluations per sample": f"{run.args.num_inference_steps} with gradients",
        **({"score": f"{run.args.fake_updates} updates of the fake score for one"} if run.args.score_weight else {}),
    }


@user_errors
def main(args):
    # 1. Accelerator, and every check that needs no weights.
    accelerator = engine.make_accelerator(args)
    is_main, device, world_size = accelerator.is_main_process, accelerator.device, accelerator.num_processes
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    place = {"revision": args.revision, "cache_dir": args.cache_dir}
    own = {"variant": args.variant, "teacher_lora": args.teacher_lora}
    config = pipelines.read_pipeline_config(args.pretrained_teacher_model, **own, **place)
    accelerator.print("".join(f"{note}\n" for note in config["notes"]), end="")
    target_names = None if args.lora_target_modules is None else lora.parse_target_modules(args.lora_target_modules)
    pipelines.check_performance(config["denoisers"], args.gradient_checkpointing, args.compile, args.channels_last)
    if args.lora_rank:
        for part, (network_class, values) in config["denoisers"].items():
            options = {"init_lora": args.init_lora, "network_class": network_class, "part": part}
            lora.check_lora(values, args.lora_rank, args.lora_alpha, target_names, **options)
    check_start(args.init_student, config["denoisers"])
    quantized.check(args.quantize_base, config["denoisers"], config["class"], None if args.dry_run else device)
    run = TrainingRun(args, accelerator)
    network = load_feature_network(args, device)
    args.data_seed = args.seed if args.data_seed is None else args.data_seed

    # 2. Pairs, and what follows from the flags.
    data = direct_flags.read_data(args)
    if args.quantize_base and data.config is None:
        raise UserError("--quantize_base: make the pairs first, with encode_pairs; they are checked by whole weights")
    images = sources.RealImages(args.adv_images) if args.adv_images else None
    for source in (data, images):
        sources.check_vae(source, config, args.pretrained_teacher_model, weight_dtype, **place)
    pairs_config = data.config  # None where they are made below, of images
    check_overrides(config["class"], args.student_kwargs, args.num_inference_steps)
    scheduler_class, scheduler_config = check_pairs(config, pairs_config, args.pairs_dir, args.teacher_lora)
    if args.student_scheduler:
        scheduler_class = probes.scheduler_class("--student_scheduler", args.student_scheduler)
    scheduler, notes = probes.student_scheduler(
        scheduler_class, scheduler_config, args.student_scheduler, args.student_scheduler_kwargs
    )
    probes.check_steps(scheduler, args.num_inference_steps)
    if args.score_weight:
        options = {"rank": args.fake_lora_rank, "has_regression": bool(args.regression_weight)}
        process = score.check(config, pairs_config, scheduler, args.score_kwargs, accelerator, **options)
    score_prompts = tables.read_prompts(args.score_prompts, "`score_prompts`") if args.score_prompts else []
    run.check_flags()
    fingerprints = pairs.fingerprints(data, score_prompts, images)
    if run.checkpoint:
        pairs.check_same_data(run.checkpoint, run.resumed, fingerprints)
    train_indices, held_out = pairs.split(len(data), args.num_held_out)
    order = pairs.PairOrder(len(train_indices), args.train_batch_size, args.data_seed)
    run.resolve_steps(len(train_indices))
    run.announce(derived_configuration(run, len(train_indices)))
    if args.dry_run:  # what follows runs on tensors without memory, for two updates
        accelerator.print(f"The first prompts: {data.prompts[:4]}. Dry run: nothing is written.")
        run.checkpoint, _ = None, simulation.begin(args, accelerator)
        args.fake_warmup = 0  # updates as all others are

    # 3. The teacher's pipeline. All prompts are encoded while its text encoders are alone on the device, then let go.
    torch.manual_seed(args.seed + accelerator.process_index)  # for the dropout of adapters; the noise is the pairs'
    accelerator.print(f"loading {args.pretrained_teacher_model}")
    outlined = sharding.is_on(accelerator)  # then its denoisers get their weights when they are split
    load = functools.partial(pipelines.load_pipeline, args.pretrained_teacher_model, outlined=outlined, **own, **place)
    if not args.dry_run:
        sources.check_encoder(data, args.pretrained_teacher_model, variant=args.variant, **place)
    dtypes = {} if args.lora_rank else dict.fromkeys(pipelines.DENOISERS, torch.float32)
    pipeline = load(dtypes | {"default": weight_dtype}, scheduler=scheduler)
    base, data.pipeline = list(pipelines.denoisers(pipeline).values()), pipeline
    pipelines.bring_others(pipeline, device)
    pipelines.exempt_vae(pipeline)
    if not args.dry_run:
        check_teacher(pipeline, pairs_config, args.pairs_dir)  # before what it makes is blamed on the pairs
    asked = {"teacher_kwargs": pairs_config["kwargs"] if pairs_config else {}, "overrides": args.student_kwargs}
    asked["num_inference_steps"] = args.num_inference_steps
    ready = args.pairs_dir and Path(args.pairs_dir, "embeddings")  # of generate_pairs or encode_pairs
    options = {"folder": Path(args.output_dir, "embeddings"), "ready": ready, "dry_run": args.dry_run}
    teacher_kwargs = score.teacher_kwargs(asked["teacher_kwargs"], args.score_kwargs or {})
    with simulation.waiting(base), simulation.before_updates(pipeline.components):
        calls, texts = possible_calls(pipeline, data, **asked), data.prompts + score_prompts
        own = teachers_calls(pipeline, data.prompts, teacher_kwargs) if args.score_weight else []
        texts += images.prompts if images else []
        texts += [text for call in own for text in call.values() if isinstance(text, str)]  # negative prompts
        accelerator.print(embeddings.let_go(pipeline, texts, calls + own, accelerator=accelerator, **options))

    # 4. Student: adapters or all weights of the denoisers, which come to the device now. What the pipeline's call does
    #    with them is found out; every change is reported. What gets no gradient is frozen. The checks of the pairs run
    #    on the untrained student, whose results the samples show beside the trained one's.
    quantized.quantize(base, args.quantize_base, device)
    if args.lora_rank:
        options = {"dropout": args.lora_dropout, "names": target_names, "init_lora": args.init_lora}
        pipelines.add_lora(pipeline, args.lora_rank, args.lora_alpha, **options)
    sharding.shard(accelerator, [] if args.lora_rank else base, plain=base if args.lora_rank else [])
    pipeline.to(device)
    if outlined:
        check_teacher(pipeline, pairs_config, args.pairs_dir)
    if not args.lora_rank:
        start_from(None if args.dry_run else args.init_student, pipelines.denoisers(pipeline))
        torch.nn.ModuleList(base).requires_grad_(True)
    repair = not (args.student_scheduler_kwargs or {"sigmas", "timesteps"} & args.student_kwargs.keys())
    teacher = {"model": args.pretrained_teacher_model, "revision": args.revision, "dtype": str(weight_dtype)[6:]}
    teacher["teacher_lora"] = fusing.identity(args.teacher_lora)
    with accelerator.autocast(), simulation.before_updates(pipeline.components):
        kwargs, found = student_kwargs(pipeline, data, **asked, repair=repair, calls=calls)
        accelerator.print("\n".join(notes + found))
        made_by = {"pipeline": pipeline, "kwargs": kwargs, "scheduler": config["scheduler"], "model": teacher}
        data = sources.pairs_of(data, accelerator, folder=Path(args.output_dir, "pairs"), **made_by)
        if images:
            images = sources.pairs_of(images, accelerator, folder=Path(args.output_dir, "real"), like=data, **made_by)
    networks = networks_of(pipeline)
    if args.score_weight:  # the teacher and the fake score, beside the student or on its base
        options = {"student_kwargs": kwargs, "teacher_kwargs": teacher_kwargs, "is_lora": bool(args.lora_rank)}
        more = functools.partial(score.load_denoisers, load, pipeline, accelerator)
        options["load_denoisers"] = lambda dtype: more(dtype or weight_dtype)
        scores = score.make_scores(pipeline, args.fake_lora_rank, **options)
        teacher_copy, fake_copy = scores.pipelines  # by these names a dry run calls what is no part of the student
        networks, base = networks | scores.copies, [*base, *scores.copies.values()]
    engine.apply_performance_flags(args, trained=base, frozen=[])
    rollout = pipelines.Rollout(pipeline, **kwargs)
    measured = list(held_out) or list(train_indices)[:16]
    shown = [i for i in measured if data.call_kwargs([i]) == data.call_kwargs(measured[:1])][:4]
    with accelerator.autocast(), samples.eval_mode(rollout):
        check_noise(data, data.latents(measured[:1]), measured[0])
        if args.score_weight:
            options = {"was_guided": (pairs_config or {}).get("guided"), "changes": args.score_kwargs}
            shape = data.latents(measured[:1]).shape
            score.try_out(scores, data, process, shape=shape, **options)
            scores = scores.with_adversary(data, process, shape) if args.adv_weight else scores
        untrained = None
        if not args.dry_run:  # which has no values to look at
            if not args.skip_pairs_check:
                accelerator.print(pairing.check_pairing(rollout, data, scheduler, args.train_batch_size))
            share = functools.partial(samples.share, accelerator)
            untrained = measure(rollout, data, measured, args.train_batch_size, kept=shown, share=share)
        is_stepwise = args.backward == "stepwise" or not args.regression_weight  # which is this once, then
        unused = freeze_unused(rollout, data, list(train_indices)[: args.train_batch_size], is_stepwise)
    if unused:
        accelerator.print(f"{len(unused)} tensors get no gradient and are frozen, the first is {unused[0]}")
    latent_std = pairs.standard_deviation(data, list(train_indices)[:256])
    weights = [parameter for parameter in rollout.parameters() if parameter.requires_grad]
    ema_weights = torch.nn.ParameterList([p.detach().clone() for p in weights] if args.ema_decay else [])
    ema_weights.requires_grad_(False)
    averaged = functools.partial(exchanged, weights if args.ema_decay else [], ema_weights)

    # 5. Optimizer and learning rate.
    optimizer = engine.make_optimizer(args, weights, run.total_batch_size)
    lr_scheduler = engine.make_lr_scheduler(args, optimizer)
    modules, objects = {"ema": ema_weights} if args.ema_decay else {}, {"lr_scheduler": lr_scheduler}
    if args.score_weight:
        for_results, for_loss = direct_flags.score_options(args, lr_scheduler)
        asked_about = score.Prompts(data, len(train_indices), score_prompts)
        about = {"data": asked_about, "images": images, "is_split": hasattr(accelerator, "sharding")}
        results = score.Results(student=rollout, process=process, **about, **for_results)
        fake_optimizer = engine.make_optimizer(
            args, list(scores.trained), run.total_batch_size, args.fake_learning_rate
        )
        trains = {"scores": scores, "optimizer": fake_optimizer, "accelerator": accelerator}
        matching = ScoreMatching(results=results, process=process, **trains, **for_loss)
        modules["fake_score"] = networks["the fake score"] = scores.trained
        objects |= {"fake_optimizer": matching.optimizer, "fake_scaler": matching.scaler}

    # 6. Prepare, resume, trackers.
    student = rollout
    rollout, optimizer = accelerator.prepare(rollout, optimizer)
    if args.lora_rank:
        lora.register_adapter_checkpointing(accelerator, rollout)
    run.register(networks=networks, modules=modules, objects=objects, **fingerprints)
    micro_batch = run.resumed["data"].get("next_micro_batch", 0)
    shows = {"measured": measured, "shown": shown, "untrained": untrained, "averaged": averaged}
    validation = PairValidation(run, student, data, network=network, **shows)

    # 7. The loop.
    rollout.train()
    while run.goes_on:
        begins = accelerator.sync_gradients  # an update
        with accelerator.accumulate(rollout):
            # 7.1 Pairs: global micro-batch j, the same after a resume and for any number of processes.
            indices = [train_indices[i] for i in order[micro_batch + accelerator.process_index]]
            losses, terms = {}, []

            # 7.2 The fake score follows the student, in updates of its own, on results from fresh noise.
            if args.score_weight:
                numbers = range(0 if run.global_step else -args.fake_warmup, args.fake_updates)
                for number in numbers if begins else ():
                    if number < 0 and run.stopper.check():
                        break
                    losses["loss_fake"] = matching.train_fake(micro_batch, number, args.fake_updates)

                if run.stopped:  # in the warm-up, of which nothing is kept
                    break

                # 7.3 Distribution matching: a step of the student from fresh noise; backward at once.
                own = micro_batch + accelerator.process_index
                with accelerator.no_sync(rollout) if args.regression_weight else contextlib.nullcontext():
                    x_0, drawn = results.result(rollout, "score", own)  # (B, ...)
                    loss, logged = matching.loss(x_0, drawn, own)
                    terms.append(loss)
                    accelerator.backward(loss)
                losses |= logged

            if args.regression_weight:
                # 7.4 Target: what the teacher made of these prompts and seeds in many steps.
                target = data.latents(indices).to(device, torch.float32, non_blocking=True)  # (B, ...)

                # 7.5 Student: the pipeline's call from the same noise in K steps, with gradients through all of them;
                #     or, stepwise, with a graph of the scheduler's arithmetic alone, and the denoiser's calls noted.
                with stepwise.recording(rollout, is_stepwise) as calls:
                    model_pred = roll_out(rollout, data, indices)  # (B, ...)

                # 7.6 Loss, in standard deviations of the latents. Backward; stepwise, call by call, computed again.
                loss = distance(model_pred / latent_std, target / latent_std, args.loss_type, args.huber_c)
                losses |= {"loss_regression": loss} if args.score_weight else {}
                terms.append(args.regression_weight * loss)
                accelerator.backward(terms[-1], retain_graph=bool(calls))
                stepwise.take_back(rollout, calls)

            # 7.7 Update.
            loss = sum(terms).detach()
            finite = run.update(optimizer, weights, loss, [str(i) for i in indices])
            optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)  # of several, they stay in DDP's buckets
            micro_batch += world_size
        run.means.add(losses | {"loss": loss})
        if not accelerator.sync_gradients:
            continue

        # 7.8 After an update: EMA, logs, evaluation, checkpoint, samples.
        if args.ema_decay:
            ema_update(ema_weights, weights, args.ema_decay, finite)
        lr_scheduler.step()
        run.after_update()
        if run.logs:
            watched, warnings = matching.watch(latent_std) if args.score_weight else ({}, [])
            accelerator.print("".join(f"{flags.spelled(warning)}\n" for warning in warnings), end="")
            run.log(watched | {"lr": lr_scheduler.get_last_lr()[0]})
        if run.evaluates:
            validation.evaluate()
        if run.saves:
            run.save(data={"next_micro_batch": micro_batch})
        if run.samples:
            validation.show()

    # 8. Export: weights or a LoRA with the scheduler, then what may fail: pipeline, error, card, samples, upload.
    quality = None
    run.load_best()
    with averaged():
        if not run.stopped:
            files = (pipelines.save_lora if args.lora_rank else pipelines.save_denoisers)(args.output_dir, pipeline)
            export.save_parts(args.output_dir, scheduler=pipeline.scheduler)  # both by every process
            with export.after_weights(accelerator, args.output_dir, run.global_step):
                if is_main and not args.lora_rank:
                    whole = load(torch.float32, scheduler=pipeline.scheduler, **pipelines.denoisers(pipeline))
                    export.save_rest(whole, args.output_dir, written=(*files, "scheduler"))
                images, relative_mse = validation.grid(step=run.exported_step)  # by every process
                result = {"held_out_pairs": len(held_out), "relative_mse": relative_mse, "untrained": untrained[0]}
                if is_main:
                    Path(args.output_dir, "held_out.json").write_text(json.dumps(result, indent=1) + "\n")
                    quality = write_card(args, pipeline, data, kwargs, files, run, result)
                    export.save_grid(args.output_dir, images, validation.labels)
    rollout, optimizer = accelerator.free_memory(rollout, optimizer)
    run.finish(quality)


if __name__ == "__main__":
    main(parse_args())
