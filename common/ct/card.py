"""The card of a consistency model, and the warnings that belong on it."""

from common.ct.consistency import karras_sigmas, sampling_timesteps
from common.results import export

WARN = "WARNING: "


def write_card(output_dir, flags, command, global_step, total_batch_size, chosen, start_share, report=print):
    """Write README.md. flags: the run's, {name: value}. chosen: whether `unet/` is the "ema" or the "raw" weights.

    start_share: how much of the average is still its start. Warnings are passed to `report` too. Returns the warnings.
    """
    num_sigmas = flags["discretization_s_1"] + 1
    sigma_range = (flags["sigma_min"], flags["sigma_max"], flags["rho"])
    two = sampling_timesteps(2, flags["mid_sigma"], num_sigmas, *sigma_range)
    stock = flags["noise_precond_type"] == flags["input_precond_type"] == "cm"
    notes = [
        f"Trained for {global_step} updates of {total_batch_size} images at {flags['resolution']} pixels, "
        f"`objective`={flags['objective']}"
        + (f", the first {flags['pretrain_steps']} as a diffusion model." if flags["pretrain_steps"] else "."),
        f"Two steps: `timesteps={two}` starts the second at sigma {flags['mid_sigma']:g}; `num_inference_steps=2` "
        f"would start it at {karras_sigmas(num_sigmas, *sigma_range).flip(0)[num_sigmas // 2]:.3g}.",
    ]
    classes = flags["num_classes"] if flags["class_conditional"] else None
    if classes:
        notes.append(f"`class_labels`: whole numbers from 0 to {flags['num_classes'] - 1}, one per image.")
    other = {"ema": "raw", "raw": "ema"}[chosen]
    if flags["use_ema"]:
        names = {"ema": "the average of the weights", "raw": "the last weights"}
        notes.append(f"`unet/` holds {names[chosen]}, `unet_{other}/` {names[other]}.")
    warnings = list_warnings(flags, global_step, chosen, start_share, stock)
    for warning in warnings:
        report(WARN + warning)
    export.write_model_card(
        output_dir,
        method="A consistency model (arXiv 2303.01469) that samples images in 1 or 2 steps, trained without a teacher "
        + {"ict": "(iCT, arXiv 2310.14189).", "ect": "(ECT, arXiv 2406.14548)."}[flags["objective"]],
        data=f"`{flags['dataset_name'] or flags['train_data_dir'] or flags['train_shards_path_or_url']}`",
        command=command,
        snippet=usage(export.model_code(output_dir, flags["hub_model_id"]), two, classes, stock),
        notes=[WARN + warning for warning in warnings] + notes,
        tags=["consistency-model", "image-generation", "diffusers"],
        pipeline_tag="unconditional-image-generation",
    )
    return warnings


def list_warnings(flags, global_step, chosen, start_share, stock):
    """What a user of the result should know first."""
    warnings = []
    if global_step <= flags["pretrain_steps"]:
        warnings.append(
            "every update was diffusion training (`pretrain_steps`), so this is no consistency model yet: pass it as "
            "`pretrained_model_name_or_path`, or sample it with many steps."
        )
    if flags["use_ema"] and chosen == "raw":
        warnings.append(
            f"the run is too short for its average, {start_share:.0%} of which is still its start; `unet/` holds the "
            "last weights instead. Lower `ema_max_decay` or train longer."
        )
    if not stock:
        warnings.append(
            "`noise_precond_type` or `input_precond_type` is not cm, which stock diffusers cannot sample: the "
            "scheduler is `PreconditionedConsistencyScheduler` of the training scripts' repository."
        )
    return warnings


def usage(model, two_steps, num_classes, stock):
    """Python that samples one and two steps from `model`, a literal of Python; num_classes: None without classes."""
    labels = f", class_labels={[i % num_classes for i in range(8)]}" if num_classes else ""
    load = f"""from diffusers import ConsistencyModelPipeline

pipe = ConsistencyModelPipeline.from_pretrained({model})"""
    if not stock:
        load = f"""from common.consistency_scheduler import PreconditionedConsistencyScheduler
from diffusers import ConsistencyModelPipeline, UNet2DModel

scheduler = PreconditionedConsistencyScheduler.from_pretrained({model}, subfolder="scheduler")
pipe = ConsistencyModelPipeline(UNet2DModel.from_pretrained({model}, subfolder="unet"), scheduler)"""
    return f"""
{load}
pipe.to("cuda")
one_step = pipe(batch_size=8{labels}, num_inference_steps=1).images
two_steps = pipe(batch_size=8{labels}, num_inference_steps=None, timesteps={two_steps}).images
"""
