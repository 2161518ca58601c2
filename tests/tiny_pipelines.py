"""Small random pipelines of many architectures, without text encoders and autoencoders: `encode_prompt` is a stub.

`make(name)` is the same pipeline every time. KWARGS: what a teacher of this kind is called with, guidance included.
WASTES: whether the shipped schedule wastes the last of four evaluations. OFF: what switches guidance off, by reading.
"""

import hashlib

import diffusers as d
import torch

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TEXT = 8  # width of the embeddings


def embed(prompts, length=5, width=TEXT):
    """(B, length, width), the same for the same prompts."""
    rows = []
    for prompt in prompts:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
        rows.append(torch.randn(length, width, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


def stub(shape):
    """An encode_prompt that returns `shape(embeddings, pooled, mask, negative embeddings, negative pooled)`."""

    def encode_prompt(prompt=None, *args, **kwargs):
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        e, n = embed(prompts), embed(["no"] * len(prompts))
        return shape(e, e[:, 0], torch.ones(e.shape[:2], dtype=torch.long), n, n[:, 0])

    return encode_prompt


SD_UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT, "attention_head_dim": 2,
}  # fmt: skip
TIME_IDS = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + TEXT,
}  # fmt: skip
HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
FLUX = HEADS | {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT,
    "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
NOTHING = {"vae": None, "text_encoder": None, "tokenizer": None}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
SIZE = {"height": 64, "width": 64}
CLIP = ("text_encoder_2", "tokenizer_2")


def flow(**config):
    return d.FlowMatchEulerDiscreteScheduler(**config)


def parts(**more):
    return NOTHING | more


def masked(e, p, m, n, q):
    return e, m, n, m


# name: (pipeline class, denoiser, scheduler, other parts, encode_prompt's answer)
PIPELINES = {
    "SD1.5": lambda: (
        d.StableDiffusionPipeline, {"unet": d.UNet2DConditionModel(**SD_UNET)},
        d.PNDMScheduler(**BETAS, skip_prk_steps=True),
        parts(safety_checker=None, feature_extractor=None, requires_safety_checker=False),
        lambda e, p, m, n, q: (e, n),
    ),
    "SDXL": lambda: (
        d.StableDiffusionXLPipeline, {"unet": d.UNet2DConditionModel(**SD_UNET, **TIME_IDS)},
        d.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        parts(**dict.fromkeys(CLIP), add_watermarker=False), lambda e, p, m, n, q: (e, n, p, q),
    ),
    "SD3": lambda: (
        d.StableDiffusion3Pipeline,
        {"transformer": d.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=TEXT,
            caption_projection_dim=16, pooled_projection_dim=TEXT, pos_embed_max_size=8, **HEADS)},
        flow(shift=3.0), parts(**dict.fromkeys((*CLIP, "text_encoder_3", "tokenizer_3"))),
        lambda e, p, m, n, q: (e, n, p, q),
    ),
    "Flux": lambda: (
        d.FluxPipeline,
        {"transformer": d.FluxTransformer2DModel(**FLUX, pooled_projection_dim=TEXT, guidance_embeds=True)},
        flow(**DYNAMIC, max_image_seq_len=4096), parts(**dict.fromkeys(CLIP)),
        lambda e, p, m, n, q: (e, p, torch.zeros(e.shape[1], 3)),
    ),
    "Qwen-Image": lambda: (
        d.QwenImagePipeline,
        {"transformer": d.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=TEXT,
            axes_dims_rope=(2, 2, 4), **HEADS)},
        flow(**DYNAMIC, shift_terminal=0.02, max_image_seq_len=8192), parts(), lambda e, p, m, n, q: (e, m),
    ),
    "PixArt": lambda: (
        d.PixArtAlphaPipeline,
        {"transformer": d.PixArtTransformer2DModel(
            in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16, sample_size=8, patch_size=2,
            caption_channels=TEXT, norm_num_groups=4, interpolation_scale=1, **HEADS)},
        d.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02), parts(), masked,
    ),
    "Sana": lambda: (
        d.SanaPipeline,
        {"transformer": d.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8,
            cross_attention_dim=16, caption_channels=TEXT, mlp_ratio=2.0, sample_size=4, patch_size=1, **HEADS)},
        d.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        parts(), masked,
    ),
    "Lumina2": lambda: (
        d.Lumina2Pipeline,
        {"transformer": d.Lumina2Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64),
            cap_feat_dim=TEXT)},
        flow(shift=6.0), parts(), masked,
    ),
    "Z-Image": lambda: (
        d.ZImagePipeline,
        {"transformer": d.ZImageTransformer2DModel(
            in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT,
            axes_dims=[4, 2, 2], axes_lens=[64, 32, 32])},
        flow(shift=3.0), parts(), lambda e, p, m, n, q: (list(e), list(n)),
    ),
    "Wan": lambda: (
        d.WanPipeline,
        {"transformer": wan_transformer()}, d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        parts(), lambda e, p, m, n, q: (e, n),
    ),
    "Wan2.2": lambda: (
        d.WanPipeline,
        {"transformer": wan_transformer(), "transformer_2": wan_transformer()}, d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        parts(boundary_ratio=0.8), lambda e, p, m, n, q: (e, n),
    ),
    "AuraFlow": lambda: (
        d.AuraFlowPipeline,
        {"transformer": d.AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            joint_attention_dim=TEXT, caption_projection_dim=16, out_channels=4, pos_embed_max_size=16, **HEADS)},
        flow(shift=1.73), parts(), masked,
    ),
    "CogView4": lambda: (
        d.CogView4Pipeline,
        {"transformer": d.CogView4Transformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=TEXT, time_embed_dim=8,
            condition_dim=4, rope_axes_dim=(4, 4), sample_size=8, **HEADS)},
        flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256,
             max_image_seq_len=4096, time_shift_type="linear"),
        parts(), lambda e, p, m, n, q: (e, n),
    ),
    "HunyuanDiT": lambda: (
        d.HunyuanDiTPipeline,
        {"transformer": d.HunyuanDiT2DModel(
            in_channels=4, patch_size=2, sample_size=8, hidden_size=16, num_layers=2, cross_attention_dim=TEXT,
            cross_attention_dim_t5=TEXT, pooled_projection_dim=8, text_len=5, text_len_t5=5, **HEADS)},
        d.DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False),
        parts(safety_checker=None, feature_extractor=None, requires_safety_checker=False),
        lambda e, p, m, n, q: (e, n, m, m),
    ),
    "Chroma": lambda: (
        d.ChromaPipeline,
        {"transformer": d.ChromaTransformer2DModel(
            **FLUX, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)},
        flow(**DYNAMIC, max_image_seq_len=4096), parts(),
        lambda e, p, m, n, q: (e, torch.zeros(e.shape[1], 3), m.bool(), n, torch.zeros(e.shape[1], 3), m.bool()),
    ),
    "LTX": lambda: (
        d.LTXPipeline,
        {"transformer": d.LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, cross_attention_dim=16, num_layers=2, caption_channels=TEXT, **HEADS)},
        flow(**DYNAMIC, shift_terminal=0.1, max_image_seq_len=4096), parts(), masked,
    ),
}  # fmt: skip


def wan_transformer():
    return d.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=TEXT, freq_dim=8, ffn_dim=16, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


NO_BINNING = {"use_resolution_binning": False}
KWARGS = dict.fromkeys(PIPELINES, SIZE | {"guidance_scale": 4.0}) | {
    "Flux": SIZE | {"guidance_scale": 3.5},
    "Qwen-Image": SIZE | {"true_cfg_scale": 4.0, "negative_prompt": " "},
    "PixArt": SIZE | NO_BINNING | {"guidance_scale": 4.0},
    "HunyuanDiT": SIZE | NO_BINNING | {"guidance_scale": 4.0},
    "Sana": {"height": 128, "width": 128, "guidance_scale": 4.0} | NO_BINNING,
    "Wan": SIZE | {"num_frames": 5, "guidance_scale": 4.0},
    "Wan2.2": SIZE | {"num_frames": 5, "guidance_scale": 4.0},
    "LTX": SIZE | {"num_frames": 9, "guidance_scale": 4.0},
}
OFF = dict.fromkeys(PIPELINES, {"guidance_scale": 1.0}) | {
    "Flux": {"true_cfg_scale": 1.0},
    "Qwen-Image": {"true_cfg_scale": 1.0},
    "Z-Image": {"guidance_scale": 0.0},
    "Wan2.2": {"guidance_scale": 1.0, "guidance_scale_2": 1.0},
}
WASTES = ("SD1.5", "SDXL", "SD3", "Qwen-Image", "AuraFlow", "CogView4", "HunyuanDiT", "LTX")


def make(name):
    """The pipeline called `name` in PIPELINES, frozen and in eval mode, with the same random weights every time."""
    torch.manual_seed(0)
    pipeline_class, networks, scheduler, others, answer = PIPELINES[name]()
    for network in networks.values():
        for parameter in network.parameters():  # nothing that is initialised to zero hides a gradient
            parameter.data += 0.05 * torch.randn_like(parameter)
        network.requires_grad_(False).eval()
    pipeline = pipeline_class(**networks, scheduler=scheduler, **others)
    pipeline.encode_prompt = stub(answer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
