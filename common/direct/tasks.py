"""Which task a pipeline class of diffusers is for, told by the arguments of its call: no weights are needed.

Direct distillation gives a teacher a prompt and noise. A pipeline that edits, fills in or follows an image, a video or
a sound answers something else without it, often silently, since the argument has a default.
"""

import inspect
import re

import diffusers
from diffusers.pipelines import auto_pipeline

NEEDED_ARGUMENTS = ("prompt", "num_inference_steps", "generator", "output_type", "return_dict")
# Arguments that say what is drawn on, by the end of their names. The image of an IP adapter only adds to the prompt.
DRAWN_ON = re.compile(
    r"(?<!ip_adapter_)image$|images$|video$|audio$|waveforms$|conditions$|conditioning_frames$|depth_map$|reference$|"
    r"(?<!attention_)(?<!embeds_)mask$|^strength$"
)
SWITCHES = ("render_", "sample_")  # of what is made
# Classes that make images or videos of text alone although their calls can take some to start from.
_OF_TEXT = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_TEXT2VIDEO_PIPELINES_MAPPING
OF_TEXT = {pipeline_class.__name__ for mapping in _OF_TEXT for pipeline_class in mapping.values()}
OF_TEXT -= {"FluxKontextPipeline"}  # its weights learned to edit, and nothing but its name says so
OF_SOUND = {pipeline_class.__name__ for pipeline_class in auto_pipeline.AUTO_TEXT2AUDIO_PIPELINES_MAPPING.values()}
# What the name of a class has more than that of the class which makes images of text with the same parts.
VARIANT = re.compile(r"ControlNet(Union)?|Img2Img|Inpaint(ing)?|VideoToVideo")


def arguments(pipeline_class):
    """{name: inspect.Parameter} of the call, without what decorates it."""
    return inspect.signature(inspect.unwrap(pipeline_class.__call__)).parameters


def objection(pipeline_class):
    """Why a call cannot be distilled from prompts and noise alone, as a clause; None where it can."""
    takes = arguments(pipeline_class)
    if missing := [name for name in NEEDED_ARGUMENTS if name not in takes]:
        return f"its call takes no {missing[0]}"
    if pipeline_class.__name__ in OF_SOUND or any(name.startswith("audio_") for name in takes):
        return "it makes sound"
    if controls := [name for name in takes if name.startswith("control")]:
        return f"it follows a control image, by its {controls[0]}"
    starts = [name for name in takes if DRAWN_ON.search(name) and not name.startswith(SWITCHES)]
    if starts and pipeline_class.__name__ not in OF_TEXT:
        return f"it starts from an image, a video or a sound, its {starts[0]}"
    for name, parameter in takes.items():
        open_ended = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not open_ended and name not in ("self", "prompt"):
            return f"its call needs {name}"
    return None


def text_class(pipeline_class, parts, configs=()):
    """The class that makes images or videos of text alone with the same parts as one that cannot, else None.

    parts: names of those that are there; configs: of the denoisers. A denoiser with more channels at its input than at
    its output has learned to be given an image too.
    """
    if not objection(pipeline_class):
        return None
    sibling = getattr(diffusers, VARIANT.sub("", pipeline_class.__name__), None)
    if sibling is None or sibling is pipeline_class or objection(sibling):
        return None
    needed = set(sibling._get_signature_keys(sibling)[0]) - set(sibling._optional_components)
    for config in configs:
        if config.get("out_channels") and config.get("in_channels", 0) > config["out_channels"]:
            return None
    return sibling if needed <= set(parts) else None
