import json

from common.results import export

import numpy as np
import yaml
from PIL import Image


def card(tmp_path, **changes):
    values = {"method": "A method.", "teacher": "org/teacher", "data": "some shards", "notes": ["one"], "tags": ["t"]}
    values |= {"command": "accelerate launch x.py --a=b", "snippet": "print(1)"}
    export.write_model_card(tmp_path, **(values | changes))
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_names_teacher_licence_command_and_versions(tmp_path):
    front, body = card(tmp_path)
    assert front["base_model"] == "org/teacher" and "license" not in front and front["library_name"] == "diffusers"
    for part in (
        f"# {tmp_path.name}",
        "accelerate launch x.py --a=b",
        "print(1)",
        "- one",
        "torch 2.13.0",
        "sample_grid.png",
    ):
        assert part in body


def test_a_local_teacher_is_no_hub_base_model(tmp_path):
    front, body = card(tmp_path, teacher=str(tmp_path))
    assert "base_model" not in front and "license" not in front and str(tmp_path) in body


def test_the_licence_is_the_teachers(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: openrail\n---\ntext")
    assert card(tmp_path, teacher=str(tmp_path / "teacher"))[0]["license"] == "openrail"


def test_grid_has_a_row_for_each_tag(tmp_path):
    images = {f"validation/student_{k}_steps": np.full((2, 16, 16, 3), 10 * k, np.uint8) for k in (1, 2, 4)}
    export.save_grid(tmp_path, images, ["a", "b"])
    grid = Image.open(tmp_path / "sample_grid.png")
    assert {(10, 10, 10), (20, 20, 20), (40, 40, 40)} <= {color for _, color in grid.getcolors(1 << 20)}


def test_upload_is_the_model_and_its_card_only(tmp_path, monkeypatch):
    index = {"_class_name": "X", "unet": ["diffusers", "U"], "vae": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = ["unet/model.safetensors", "unet_target/model.safetensors", "scheduler/config.json"]
    model += ["stage-1-k4/unet/model.safetensors", "stage-1-k4/README.md"]
    model += ["transformer/model.safetensors", "transformer_adapter/adapter_config.json"]  # a merged LoRA and itself
    others = ["checkpoint-5/model.safetensors", "logs/run/events", "my logs/events", "skipped_samples.jsonl"]
    for name in [*model, *others, "README.md", "checkpoint-6.tmp/x", "pytorch_lora_weights.safetensors"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    uploaded = {}

    class Api:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, name, private, exist_ok):
            uploaded["repo"] = (name, private)
            return type("Repo", (), {"repo_id": f"me/{name}", "__str__": lambda self: "address"})()

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            from huggingface_hub.utils import filter_repo_objects

            names = [str(p.relative_to(folder_path)) for p in tmp_path.rglob("*") if p.is_file()]
            uploaded["files"] = sorted(filter_repo_objects(names, allow_patterns=allow_patterns))

    monkeypatch.setattr(export, "HfApi", Api)
    assert export.push_to_hub(tmp_path, None, "hf_x", True) == "address"
    assert uploaded["files"] == ["README.md", "model_index.json", "pytorch_lora_weights.safetensors", *sorted(model)]
    assert uploaded["token"] == "hf_x" and uploaded["repo"] == (tmp_path.name, True)
