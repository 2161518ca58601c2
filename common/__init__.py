"""What the training scripts share. Nothing here imports a script."""

import logging
import os
import warnings

# Libraries announce at import what a CPU or a missing torchvision costs them, a screen full before the first own line.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for _name in ("xformers", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")  # diffusers passes it, huggingface_hub warns
