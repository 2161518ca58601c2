"""What the server of fork_server.py loads once, so that its forks need not."""

import train_cm_ct_unconditional  # noqa: F401
import train_direct_distill  # noqa: F401
import train_lcm_distill_lora_sd_wds  # noqa: F401
import train_lcm_distill_sd_wds  # noqa: F401
import train_tscd_distill_lora_sd_wds  # noqa: F401
import train_tscd_distill_sd_wds  # noqa: F401
from common.tools import generate_pairs  # noqa: F401

import torch
import torch.utils.tensorboard  # noqa: F401
from diffusers import StableDiffusionPipeline  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

torch.set_num_threads(1)
