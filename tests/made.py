"""What the tests' runs are made of: small networks, data and pairs.

python -m tests.made tiny    # within a minute: tiny/teacher and tiny/shards, to try an edited script on
"""

import csv
import io
import json
import sys
import tarfile
from pathlib import Path

from common.tools import generate_pairs
from common.tools.demo import digits, stable_diffusion

import datasets
from PIL import Image

NUM_IMAGES = 120  # of the data set of consistency training
NUM_PAIRS, TEACHER_STEPS = 24, 8
QUICK = {  # a teacher whose autoencoder is good enough to encode its own images again
    "vae_steps": 250, "vae_batch_size": 16, "unet_steps": 300, "unet_channels": (16, 32), "unet_batch_size": 16,
    "unet_learning_rate": 4e-3,
}  # fmt: skip
CONFIG = {  # the network of consistency training
    "_class_name": "UNet2DModel", "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8, "dropout": 0.2,
}  # fmt: skip


def build_teacher(folder, kind="epsilon"):
    """A teacher of 16 pixels that has been trained for a moment; kind: as of the fixture `teacher`."""
    prediction_type = "epsilon" if kind == "sdxl" else kind
    stable_diffusion.build_teacher(
        folder, prediction_type, vae_steps=5, unet_steps=20, unet_batch_size=16, sdxl=kind == "sdxl"
    )


def rows(number=NUM_IMAGES):
    (images, labels), _ = digits.load_split()
    return [Image.fromarray(image) for image in images[:number]], labels[:number].tolist()


def save_data_set(folder):
    """A Hugging Face data set with CIFAR-10's columns."""
    images, labels = rows()
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(digits.WORDS))}
    datasets.Dataset.from_dict({"img": images, "label": labels}, datasets.Features(features)).save_to_disk(folder)


def save_prompts(path):
    path.write_text("\n".join(digits.canonical_prompts(10)) + "\n")


def ask(output_dir, teacher, prompts, **changes):
    """generate_pairs in this process, as its command line, which it returns."""
    values = {
        "pretrained_teacher_model": teacher, "prompts": prompts, "output_dir": output_dir, "num_pairs": NUM_PAIRS,
        "num_inference_steps": TEACHER_STEPS, "guidance_scale": 2, "samples_per_shard": 8, "batch_size": 4,
    } | changes  # fmt: skip
    words = [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items() if v is not None]
    generate_pairs.main(generate_pairs.parse_args(words))
    return words


def save_table(pictured, folder):
    """The images and the metadata.csv of the guide of direct distillation, of pairs with pngs."""
    folder.mkdir()
    rows = [["image", "prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale"]]
    for path in sorted(Path(pictured).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                stem, extension = member.name.split(".")
                if extension == "png":
                    (folder / member.name).write_bytes(tar.extractfile(member).read())
                    record = json.loads(tar.extractfile(f"{stem}.json").read())
                    rows.append([member.name, record["prompt"], record["seed"], "cpu", 4, 1])
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def save_seeded(pictured, folder):
    """Tars as tools that generate images write them, of pairs with pngs: KEY.png, KEY.txt, KEY.json with a `seed`."""
    folder.mkdir()
    for path in sorted(Path(pictured).glob("*.tar")):
        with tarfile.open(path) as source, tarfile.open(folder / path.name, "w") as tar:
            for name in sorted(source.getnames()):
                stem, extension = name.split(".")
                if extension == "png":
                    record = json.loads(source.extractfile(f"{stem}.json").read())
                    said = json.dumps({"seed": record["seed"], "steps": TEACHER_STEPS, "cfg": 2.0})
                    image = source.extractfile(name).read()
                    parts = {"png": image, "txt": record["prompt"].encode(), "json": said.encode()}
                    for ending, content in parts.items():
                        member = tarfile.TarInfo(f"{stem}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def members(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


if __name__ == "__main__":
    build_teacher(Path(sys.argv[1], "teacher"))
    digits.write_shards(Path(sys.argv[1], "shards"))
    print(f"made {sys.argv[1]}/teacher and {sys.argv[1]}/shards/train")
