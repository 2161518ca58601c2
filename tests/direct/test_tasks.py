"""Which pipelines of diffusers make images or videos of text alone: over all that it has, against its own tables."""

import inspect

from common.direct import tasks

import diffusers
import pytest
from diffusers.pipelines import auto_pipeline as auto

# By reading their documentation; what diffusers' tables do not say.
OF_TEXT = (
    "StableDiffusionPipeline StableDiffusionXLPipeline FluxPipeline Flux2Pipeline QwenImagePipeline "
    "QwenImage21Pipeline WanPipeline LTXPipeline HunyuanVideoPipeline CogVideoXPipeline MochiPipeline KolorsPipeline "
    "AnimateDiffPipeline StableDiffusionPAGPipeline SanaPipeline ZImagePipeline ZImageOmniPipeline LattePipeline "
    "HiDreamImagePipeline"
).split()
OF_MORE = (
    "FluxKontextPipeline FluxFillPipeline FluxControlPipeline FluxControlNetPipeline QwenImageEditPipeline "
    "PIAPipeline QwenImageEditPlusPipeline WanImageToVideoPipeline WanVACEPipeline WanAnimatePipeline "
    "LTXConditionPipeline LTXImageToVideoPipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline "
    "OmniGenPipeline "
    "StableDiffusionControlNetPipeline StableDiffusionControlNetXSPipeline StableDiffusionUpscalePipeline "
    "StableDiffusionDepth2ImgPipeline StableDiffusionInstructPix2PixPipeline StableDiffusionAdapterPipeline "
    "HunyuanVideoImageToVideoPipeline CogVideoXFunControlPipeline Cosmos2VideoToWorldPipeline LucyEditPipeline "
    "StableUnCLIPImg2ImgPipeline Kandinsky5I2VPipeline AnimateDiffVideoToVideoPipeline DDPMPipeline AudioLDM2Pipeline "
    "StableAudioPipeline LTX2Pipeline KandinskyV22PriorEmb2EmbPipeline I2VGenXLPipeline ChronoEditPipeline"
).split()


def every_pipeline():
    """{name: class}, but for those that need a library which is not there."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")}
    return {name: c for name, c in found.items() if inspect.isclass(c) and issubclass(c, diffusers.DiffusionPipeline)}


def names(*mappings):
    return {pipeline_class.__name__ for mapping in mappings for pipeline_class in mapping.values()}


def test_every_pipeline_of_diffusers_is_told_apart():
    classes = every_pipeline()
    accepted = {name for name, c in classes.items() if tasks.objection(c) is None}
    assert len(classes) > 200 and len(accepted) > 60
    assert not set(OF_TEXT) & classes.keys() - accepted and not set(OF_MORE) & accepted
    of_text = names(auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, auto.AUTO_TEXT2VIDEO_PIPELINES_MAPPING)
    refused = {name for name in of_text - accepted if "Control" not in name}
    assert refused == {"FluxKontextPipeline", "HeliosPyramidPipeline"}  # edits; takes no number of steps
    of_more = names(
        auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, auto.AUTO_INPAINT_PIPELINES_MAPPING,
        auto.AUTO_IMAGE2VIDEO_PIPELINES_MAPPING, auto.AUTO_VIDEO2VIDEO_PIPELINES_MAPPING,
        auto.AUTO_TEXT2AUDIO_PIPELINES_MAPPING,
    )  # fmt: skip
    assert of_more & accepted == {"Flux2Pipeline", "Flux2KleinPipeline"}  # made for both
    words = ("Img2Img", "Inpaint", "ControlNet", "Upscal", "SuperRes", "ImageToVideo", "VideoToVideo", "Edit")
    assert [name for name in accepted if any(word in name for word in words)] == [
        "StableDiffusionModelEditingPipeline"
    ]


@pytest.mark.parametrize(
    ("saved", "samples"),
    [
        ("StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"),
        ("StableDiffusionControlNetInpaintPipeline", "StableDiffusionPipeline"),
        ("StableDiffusionXLControlNetUnionPipeline", "StableDiffusionXLPipeline"),
        ("StableDiffusion3PAGImg2ImgPipeline", "StableDiffusion3PAGPipeline"),
        ("FluxImg2ImgPipeline", "FluxPipeline"),
        ("WanVideoToVideoPipeline", "WanPipeline"),
        ("QwenImageInpaintPipeline", "QwenImagePipeline"),
        ("FluxKontextInpaintPipeline", None),
        ("FluxControlImg2ImgPipeline", None),
        ("QwenImageEditInpaintPipeline", None),
        ("WanImageToVideoPipeline", None),
        ("StableUnCLIPImg2ImgPipeline", None),  # its parts lack the prior
        ("StableDiffusionPipeline", None),  # it is one itself
    ],
)
def test_what_another_task_saved_is_sampled_from_text_where_its_parts_can(saved, samples):
    saved = getattr(diffusers, saved)
    found = tasks.text_class(saved, saved._get_signature_keys(saved)[0], [{"in_channels": 4, "out_channels": 4}])
    assert (found and found.__name__) == samples
    inpainting = [{"in_channels": 9, "out_channels": 4}]
    assert tasks.text_class(saved, saved._get_signature_keys(saved)[0], inpainting) is None
