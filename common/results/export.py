"""What a run leaves for others: a pipeline that stock diffusers loads, a model card, an upload."""

import contextlib
import importlib.metadata
import json
import platform
import traceback
from pathlib import Path

from common.errors import UserError, first_line, line_of, mask_credentials
from common.networks import fusing, teachers
from common.networks.sharded import write_network
from common.results.samples import image_grid

import torch
import yaml
from accelerate import PartialState
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

DENOISERS = ("unet", "transformer", "prior")  # what names of their folders begin with
DENOISERS_AND_SCHEDULER = (*DENOISERS, "scheduler")  # folders that stand without a whole pipeline
FAILURE = "export_failed.txt"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "webdataset")


def versions(packages=PACKAGES):
    """{"python": ..., package: ...} of what a result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


@contextlib.contextmanager
def after_weights(accelerator, output_dir, global_step):
    """What follows once the main process has written a finished run's weights; entered by every process. Whatever
    fails inside ends in one UserError that says what is safe; how it came about is written to FAILURE."""
    output_dir, is_main = Path(output_dir), accelerator.is_main_process
    accelerator.wait_for_everyone()  # an error while they are written is none of what follows
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            with open(output_dir / FAILURE, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(traceback.format_exc())  # after another process's, which may be what this one ended of
        found = [path for path in output_dir.iterdir() if path.is_dir() and path.name.startswith(DENOISERS)]
        names = ", ".join(sorted(path.name for path in [*found, *output_dir.glob("*.safetensors")]))
        raise UserError(
            f"`output_dir`={output_dir}: training is done and its weights are safe there ({names}), what follows them "
            f"failed: {first_line(error)} ({FAILURE} says where); `resume_from_checkpoint`=latest begins at step "
            f"{global_step} and writes the rest",
            on_one_rank=is_main,
        ) from error
    if is_main:
        (output_dir / FAILURE).unlink(missing_ok=True)  # of an earlier attempt


def save_parts(output_dir, **parts):
    """Write parts of a pipeline into folders of their names, the weights of each as one file; called by every process,
    the main one writes."""
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            write_network(Path(output_dir, name), part)
        elif PartialState().is_main_process:
            part.save_pretrained(Path(output_dir, name))


def save_rest(pipeline, output_dir, written):
    """Write a pipeline but for its parts of the names `written`, which are in their folders already."""
    for name, part in pipeline.components.items():
        if part is not None and name not in written:
            part.save_pretrained(Path(output_dir, name))
    pipeline.save_config(output_dir)  # model_index.json, last: the folder loads once it is there


def teacher_license(name):
    """The licence that the teacher's own card states, or None where there is no card or it states none."""
    card = Path(name, "README.md")
    try:
        if Path(name).exists():
            return ModelCard.load(card).data.get("license") if card.is_file() else None
        return ModelCard.load(name).data.get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None


def save_grid(output_dir, images, prompts, name="sample_grid.png"):
    """Write a picture: a row for each tag of {tag: uint8 (N, H, W, 3)}, a column for each prompt. Returns its path."""
    path = Path(output_dir, name)
    rows = [torch.from_numpy(batch).permute(0, 3, 1, 2) for batch in images.values()]
    labels = [tag.removeprefix("validation/").replace("_", " ").replace(" 1 steps", " 1 step") for tag in images]
    scale = max(1, 96 // rows[0].shape[-1])
    path.parent.mkdir(exist_ok=True)
    image_grid(rows, labels, prompts, scale=scale).save(path)
    return path


def quoted(text):
    """Any text as a literal of Python, in double quotes where that shows it as it is."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)


def model_code(output_dir, hub_model_id=None):
    """What a card loads a run's result from, as Python: the repository, or the folder's whole path."""
    return quoted(hub_model_id or str(Path(output_dir).absolute()))


def load_code(class_name, name, more="", **options):
    """Python that loads `name`: a folder (by its whole path), a hub repository, or one `.safetensors` file.

    options: keyword arguments of the call that are text, None for one that is left out; more: others, as Python.
    """
    is_here, is_file = Path(name).exists(), Path(name).suffix == ".safetensors"
    dropped = {"revision": is_here, "variant": is_file}  # what such a call has no use for
    given = [f", {key}={quoted(value)}" for key, value in options.items() if value and not dropped.get(key)]
    call = "from_single_file" if is_file else "from_pretrained"
    return f"{class_name}.{call}({quoted(str(Path(name).absolute()) if is_here else name)}{''.join(given)}{more})"


def teacher_code(
    name, is_sdxl, classes, *, revision=None, variant=None, cache_dir=None, vae=None, vae_revision=None, lora=None
):
    """Python that loads the teacher as the plain pipeline `pipe`, as the run did, under imports of this and
    `classes` from diffusers.

    name and the keywords: as for `teachers.load_teacher`, but for `cache_dir`.
    """
    plain, more = teachers.PLAIN[is_sdxl].__name__, ", dtype=torch.float16"
    names = sorted({plain, *classes, *(["AutoencoderKL"] if vae else [])})
    lines = ["import torch", f"from diffusers import {', '.join(names)}", ""]
    if vae:
        place = {"subfolder": teachers.vae_subfolder(vae), "revision": vae_revision}
        lines.append(f"vae = {load_code('AutoencoderKL', vae, more, **place)}")
        more = f", vae=vae{more}"
    call = load_code(plain, name, more, revision=revision, variant=variant)
    return "\n".join([*lines, f'pipe = {call}.to("cuda")', *fusing.code(lora)])


def pipeline_code(model):
    """Python that loads the whole pipeline of a run, `model` as from `model_code`, as `pipe`."""
    return f"""
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model}, dtype=torch.float16).to("cuda")"""


def shards_text(name, shards):
    """The training data in a card's words: what was named, and of how many tars where there are several."""
    return f"`{mask_credentials(name)}`" + (f" ({len(shards)} shards)" if len(shards) > 1 else "")


def size_code(config, resolution):
    """The size in a call of a student's pipeline, as Python: nothing where it is the pipeline's own."""
    is_own = teachers.samples_by_default_at(config, resolution)
    return "" if is_own else f", height={resolution}, width={resolution}"


def write_model_card(
    output_dir, *, method, data, command, snippet, notes, tags, teacher=None, pipeline_tag="text-to-image"
):
    """Write README.md: front matter for the hub, what the model is, the snippet that runs it, samples, the command.

    teacher: None where there is none; the licence is that of its card, and one that is a local folder is no
    `base_model`, which must be a hub repository. snippet: Python. The title is the folder's name.
    """
    front = {"library_name": "diffusers", "pipeline_tag": pipeline_tag, "tags": tags}
    if teacher is not None and not Path(teacher).exists():
        front["base_model"] = teacher
    license = teacher_license(teacher) if teacher is not None else None
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
    Path(output_dir, "README.md").write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")


def push_to_hub(output_dir, repo_id=None, token=None, private=False):
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
    options = {"allow_patterns": wanted, "commit_message": "Add the trained model"}
    try:
        repo = api.create_repo(repo_id or output_dir.resolve().name, private=private, exist_ok=True)
        for card in [*output_dir.glob("README.md"), *output_dir.glob("stage-*/README.md")]:  # of where others find it
            text = card.read_text(encoding="utf-8")
            card.write_text(text.replace(model_code(output_dir, repo_id), quoted(repo.repo_id)), encoding="utf-8")
        api.upload_folder(repo_id=repo.repo_id, folder_path=str(output_dir), **options)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"`push_to_hub`: the upload failed ({line_of(error)[:200]}); the model is complete in {output_dir}, "
            "upload it with `hf upload`"
        ) from error
    return str(repo)
