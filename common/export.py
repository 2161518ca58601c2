"""What a run leaves for others: a pipeline that stock diffusers loads, a model card, an upload."""

import importlib.metadata
import json
import platform
from pathlib import Path

from common import UserError
from common.checkpointing import CONFIG
from common.metrics import image_grid

import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

DENOISERS_AND_SCHEDULER = ("unet", "transformer", "prior", "scheduler")  # folders that stand without a whole pipeline
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "webdataset")


def versions():
    """{"python": ..., package: ...} of what a result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def write_config(output_dir, flags, derived):
    """Write training_config.json: the run's flags, what follows from them, the versions of what it runs on."""
    config = {"flags": flags, "derived": derived, "versions": versions()}
    Path(output_dir, CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def teacher_license(name, token=None):
    """The licence that the teacher's own card states, or None where there is no card or it states none."""
    card = Path(name, "README.md")
    try:
        if Path(name).exists():
            return ModelCard.load(card).data.get("license") if card.is_file() else None
        return ModelCard.load(name, token=token).data.get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None


def save_grid(output_dir, images, prompts):
    """Write sample_grid.png: a row for each tag of {tag: uint8 (N, H, W, 3)}, a column for each prompt."""
    rows = [torch.from_numpy(batch).permute(0, 3, 1, 2) for batch in images.values()]
    labels = [tag.removeprefix("validation/").replace("_", " ") for tag in images]
    scale = max(1, 96 // rows[0].shape[-1])
    image_grid(rows, labels, prompts, scale=scale).save(Path(output_dir, "sample_grid.png"))


def write_model_card(
    output_dir,
    *,
    method,
    data,
    command,
    snippet,
    notes,
    tags,
    teacher=None,
    license=None,
    pipeline_tag="text-to-image",
):
    """Write README.md: front matter for the hub, what the model is, the snippet that runs it, samples, the command.

    teacher, data, command, method, notes: text; teacher is None where there is none. license: without it, what the
    teacher's card states. snippet: Python. The samples are `sample_grid.png` beside the card, the title is the
    folder's name. A teacher that is a local folder is named in the text only: `base_model` must be a hub repository.
    """
    front = {"library_name": "diffusers", "pipeline_tag": pipeline_tag, "tags": list(tags)}
    if teacher is not None and not Path(teacher).exists():
        front["base_model"] = teacher
    if license is None and teacher is not None:
        license = teacher_license(teacher)
    if license:
        front["license"] = license
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {Path(output_dir).resolve().name}", "", method, ""]
    if teacher is not None:
        lines.append(f"- Teacher: `{teacher}`" + (f" (licence: {license})" if license else ""))
    lines.append(f"- Data: {data}")
    lines += [f"- {note}" for note in notes] + ["", "```python", snippet.strip(), "```", ""]
    lines += ['Without a GPU, leave out `.to("cuda")`, and `dtype=` for speed.', ""]
    lines += ["![samples](sample_grid.png)", ""]
    lines += ["## How it was made", "", "```bash", command, "```", ""]
    lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".", ""]
    Path(output_dir, "README.md").write_text("\n".join(lines), encoding="utf-8")


def push_to_hub(output_dir, repo_id=None, token=None, private=False, commit_message="Add the trained model"):
    """Upload the model and its card, and nothing else of the folder: no checkpoint, log or run file.

    The model is model_index.json with its parts, folders of U-Nets and other denoisers beside them, weights in the
    folder itself (a LoRA) with the scheduler that they are for, and the models of earlier stages. Returns the address
    of the repository.
    """
    output_dir = Path(output_dir)
    index = output_dir / "model_index.json"
    parts = set(json.loads(index.read_text())) if index.is_file() else set()
    wanted = ["README.md", "sample_grid.png", "model_index.json"]
    for path in output_dir.iterdir():
        if path.is_dir() and (path.name in parts or path.name.startswith((*DENOISERS_AND_SCHEDULER, "stage-"))):
            wanted.append(f"{path.name}/*")
        elif path.is_file() and path.suffix == ".safetensors":
            wanted.append(path.name)
    api = HfApi(token=token)
    options = {"allow_patterns": wanted, "commit_message": commit_message}
    try:
        repo = api.create_repo(repo_id or output_dir.resolve().name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=str(output_dir), **options)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"--push_to_hub: the upload failed ({reason}); the model is complete in {output_dir}, upload it with "
            "`hf upload`"
        ) from error
    return str(repo)
