"""The card of a student by direct distillation."""

from common import flags
from common.direct import pipelines
from common.results import export


def write_card(args, pipeline, data, kwargs, files, run, result):
    """Write README.md. kwargs: of the student's call. files: names of what was saved. result: {"held_out_pairs",
    "relative_mse", "untrained"}. Returns how good the student is, a sentence."""
    model, scheduler = export.model_code(args.output_dir, args.hub_model_id), type(pipeline.scheduler).__name__
    teacher = {"name": args.pretrained_teacher_model, "revision": args.revision, "variant": args.variant}
    teacher["lora"] = args.teacher_lora
    size = data.call_kwargs([0]) if len(set(data.sizes)) == 1 else {}
    teacher = teacher if args.lora_rank else None
    snippet = pipelines.student_code(pipeline, model, data.prompts[0], kwargs | size, files, teacher)
    number = result["held_out_pairs"]
    where = f"{number} held-out pairs" if number else "pairs that it was trained on"
    error = f"On {where} its squared error is {result['relative_mse']:.3f} of the variance of the teacher's latents, "
    error += f"{result['untrained']:.3f} before training."
    if args.score_weight:
        error += " The score moves results away from the teacher's own ones, towards what the teacher could have made."
    elif not result["relative_mse"] < result["untrained"]:
        way_out = flags.spelled("Lower `learning_rate`, or train longer.")
        error = f"WARNING: training has not made it better. {error} {way_out}"
    rank = [f"LoRA of rank {args.lora_rank}, alpha {args.lora_alpha:g}: {', '.join(files)}."]
    score = []
    if args.score_weight:
        score = [
            f"Score distillation (2405.14867) of weight {args.score_weight:g}, with {args.fake_updates} updates of "
            f"the fake score for each of the student's, beside a regression of weight {args.regression_weight:g}."
        ]
    if args.score_weight and args.adv_weight:
        real = f"the images of `{args.adv_images}`" if args.adv_images else "the teacher's own results"
        score += [f"An adversary of weight {args.adv_weight:g} tells its results from {real}."]
    by = "score distillation" if args.score_weight else "direct distillation"
    export.write_model_card(
        args.output_dir,
        method=f"A student by {by}: it samples in {args.num_inference_steps} steps, without guidance.",
        teacher=args.pretrained_teacher_model,
        data=f"`{args.pairs_dir or args.dataset_metadata_path}`, the teacher's own results",
        command=flags.command_line(),
        snippet=snippet,
        notes=[
            f"Trained for {run.exported_step} updates of {run.total_batch_size} samples.",
            *score,
            error,
            f"{args.num_inference_steps} steps of the saved {scheduler} and these arguments are what was trained; "
            "guidance is distilled into the weights.",
            *(rank if args.lora_rank else []),
        ],
        tags=["direct-distillation", *(["lora"] if args.lora_rank else []), "text-to-image", "diffusers"],
    )
    return error
