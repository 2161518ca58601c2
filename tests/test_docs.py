"""README and guides: short, in 119 columns, without a dead link; their commands parse, and their Python runs."""

import contextlib
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from common.tools import plan
from common.tools.demo import __main__ as demo
from common.tools.demo import consistency, measuring, stable_diffusion
from common.tools.demo.stable_diffusion import build_classifier, build_teacher
from tests.benchmarks import remote
from tests.made import save_data_set, save_table

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]
MEASURED = {"measured.md", "performance_measured.md"}  # tables, whose words do not count
PYTHON = [*ROOT.glob("train_*.py"), *ROOT.glob("common/**/*.py"), *ROOT.glob("tests/**/*.py")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
STANDS_FOR = re.compile(r"\b[A-Z]{2,}\b|train_X|\.\.\.")
TRAIN_SCRIPTS = {path.stem for path in ROOT.glob("train_*.py")}
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def prose(page):
    return FENCE.sub("", page.read_text())


# --- what a page looks like


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 110 and len(text.split()) <= 800


@named
def test_a_guide_is_short(page):
    """Commands do not count; in the pages of measurements, tables do not either."""
    lines = prose(page).splitlines()
    if page.name in MEASURED:
        lines = [line for line in lines if not line.startswith("|")]
    assert len(" ".join(lines).split()) <= 900


def test_lines_have_119_columns():
    """Guides and Python alike. The public guides' commands stand in tests as they are."""
    long = []
    for path in [*PAGES, *PYTHON]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            line = re.sub(r" +# noqa.*", "", line)
            if len(line) > 119 and '="pipe:curl -L -s https://huggingface.co/datasets/laion/' not in line:
                long.append(f"{path.relative_to(ROOT)}:{number}")
    assert not long


def anchors(page):
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named
def test_links_and_pictures_exist(page):
    text = prose(page)
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)", text, re.M)
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pictures_are_small_shown_and_made_by_a_command():
    pictures = sorted((ROOT / "docs" / "images").glob("*.png"))
    commands = (ROOT / "docs" / "images" / "README.md").read_text()
    shown = "".join(page.read_text() for page in PAGES)
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size <= 150_000, picture.name
        assert f"`{picture.name}`" in commands and f"images/{picture.name})" in shown, picture.name


def test_the_table_of_contents_names_every_guide():
    contents = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        if page.parent == ROOT / "docs" and page.name != "README.md":
            assert f"]({page.name})" in contents, page.name


# --- commands


def commands(text):
    """The lines of shell in `text` that start a program of this repository, with their continuations joined."""
    joined = text.replace("\\\\\n", "").replace("\\\n", "")
    start = r"(?:\w+=\w+ )*(?:accelerate launch|python -m|python tests/|sbatch .*? python -m) .*"
    return re.findall(rf"^ *({start}[^.\n])$", joined, re.M)


def documented_commands():
    """(module, the words after it) of each command in the guides, and in docstrings of scripts and tools.

    Left out is what stands for something else in a sentence: METHOD, train_X.py, "...".
    """
    texts = ["\n".join(blocks(page, "bash")) for page in PAGES]
    inline = [code for page in PAGES for code in re.findall(r"`([^`\n]+ --[^`\n]+)`", prose(page))]
    texts += [code for code in inline if not STANDS_FOR.search(code)]
    texts += [path.read_text() for path in PYTHON if path.parts[len(ROOT.parts)] != "tests"]
    for text in texts:
        yield from modules(text)


def modules(text):
    """(module, the words after it) of each line of shell in `text` that starts a script or a tool."""
    for line in commands(text):
        found = re.search(r"(?:-m (common\.tools\.\w+)|(?<!plan )\b(train_\w+)\.py)(?: |$)", line)
        if found:
            yield found[1] or found[2], shlex.split(line[found.end() :])


def parse(name, words):
    if name == "common.tools.plan":
        args = importlib.import_module(name).parse_args(words)
        name, words = args.script.removesuffix(".py"), args.flags
    name += ".__main__" if name == "common.tools.demo" else ""
    return importlib.import_module(name).parse_args(words)


@pytest.fixture
def users_machine(monkeypatch):
    """One with a GPU, and with the prompts, the networks and the images that the commands of `evaluate` name."""
    evaluate = importlib.import_module("common.tools.evaluate")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(evaluate, "read_prompts", lambda flag, names: ["a prompt"] * 5000)
    monkeypatch.setattr(evaluate, "check_paths", lambda args: None)
    monkeypatch.setattr(evaluate, "find_labels", lambda *args: [0] * 5000)
    monkeypatch.setattr(evaluate, "find_device", lambda device: "cuda")


def test_the_documents_commands_parse(users_machine):
    found = [(name, words) for name, words in documented_commands() if words[-1:] != ["..."]]
    for name, words in found:
        parse(name, words)
    names = {name for name, _ in found}
    tools = {"evaluate", "plan", "encode_shards", "encode_pairs", "generate_pairs", "demo"}
    assert len(found) > 30 and names >= TRAIN_SCRIPTS | {f"common.tools.{tool}" for tool in tools}


def test_a_documented_command_that_is_wrong_is_found(users_machine, capsys):
    text = "accelerate launch train_direct_distill.py --pretrained_teacher_model=t \\\n    --no_such_flag=1\n"
    [line] = commands(text)
    with pytest.raises(SystemExit):
        parse("train_direct_distill", [*shlex.split(line)[3:], "--pairs_dir=p"])
    assert "--no_such_flag" in capsys.readouterr().err


def test_the_launchers_own_words_parse():
    """Those of `accelerate launch` before the script, and what its --config_file says."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in lines_of(block)]
    launched = [shlex.split(line.partition("accelerate launch ")[2]) for line in lines if "accelerate launch " in line]
    assert len(launched) > 15
    for words in launched:
        args = launch_command_parser().parse_args(words)
        if args.config_file:
            config = load_config_from_file(str(ROOT / args.config_file))
            assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2


@named
def test_commands_of_tests_name_files_and_flags_that_exist(page):
    """`python tests/...`, `python -m tests...` and `pytest`, in blocks and in the text."""
    text = "\n".join([*re.findall(r"`([^`\n]+)`", prose(page)), *commands("\n".join(blocks(page, "bash")))])
    for line in text.splitlines():
        line = line.split(" -- ")[0]
        for module in re.findall(r"python -m (tests[\w.]+)", line):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), line
        for path in re.findall(r"\btests/[\w./]+", line):
            assert (ROOT / path).exists(), line
        found = re.search(r"python (tests/benchmarks/\w+\.py)", line)
        for flag in re.findall(r" (--\w+)", line) if found else []:
            assert f'"{flag}"' in (ROOT / found[1]).read_text(), line


# --- a reader, who runs a page from top to bottom


LEFT_OUT = {  # what of the blocks cannot run here, and why
    r"^pip ": "it installs",
    r"-m pytest tests$": "it is this suite",
    r"train_\w+\.py \.\.\.$": "it starts several processes, as tests/soak does; its words are checked above",
    r"--method score": "it goes on from the start that it trains; tests/tools/test_demo.py checks its words",
    r"--suite gpu": "it needs a GPU; tests/soak/test_benchmarks.py runs it on a tiny shape",
    r"^import ray": "it needs ray; tests/tools/test_encode_shards.py runs the page's lines with a stand-in",
}
SD = ["--resolution=16", "--max_train_steps=1", "--validation_num_inference_steps=1", "--shuffle_block_samples=16"]
STAGES = [*SD, "--stage_segments=8,4,1", "--stage_steps=1", "--max_train_steps=3", "--adv_weights=0"]
TRAINING = ["--train_batch_size=2", "--gradient_accumulation_steps=1", "--validation_steps=0", "--mixed_precision=no"]
SMALL = {  # flags after those of a guide's command, of which the last counts
    "train_lcm_distill_sd_wds": SD + TRAINING,
    "train_lcm_distill_lora_sd_wds": [*SD, "--lora_rank=4", *TRAINING],
    "train_tscd_distill_sd_wds": STAGES + TRAINING,
    "train_tscd_distill_lora_sd_wds": [*STAGES, "--lora_rank=4", *TRAINING],
    "train_cm_ct_unconditional": [
        "--resolution=8", "--max_train_steps=10", "--eval_batch_size=2", "--checkpointing_steps=10", *TRAINING,
    ],
    "train_direct_distill": [
        "--max_train_steps=1", "--num_held_out=2", "--lora_rank=4", "--skip_pairs_check", *TRAINING,
    ],
    "common.tools.generate_pairs": ["--num_inference_steps=6", "--num_pairs=8", "--dtype=float32"],
    "common.tools.encode_pairs": ["--dtype=float32"],
    "common.tools.encode_shards": ["--resolution=16"],
    "common.tools.evaluate": [
        "--num_images=20", "--batch_size=20", "--num_inference_steps=1,2", "--height=16", "--width=16",
        "--dtype=float32",
    ],
}  # fmt: skip
TRAINING_COMMAND = (
    "accelerate launch train_lcm_distill_sd_wds.py --pretrained_teacher_model=runwayml/stable-diffusion-v1-5 "
    "--train_shards_path_or_url=shards/{00000..00099}.tar --output_dir=lcm"
)
SMALL["tests/benchmarks/precision.py"] = ["--updates", "1", "2", "--batch_size=2"]
SMALL["tests/benchmarks/data.py"] = ["--remote=100", "--pause=0.01", "--seconds=1"]
SMALL["common.tools.plan"] = SMALL["train_lcm_distill_sd_wds"]  # plan is the script's dry run
SMALL_UNET = {
    "_class_name": "UNet2DModel", "block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
}  # fmt: skip


def lines_of(code):
    """The commands of a block of shell, a line each."""
    lines = (line.strip() for line in re.split(r"\n| && ", code.replace("\\\n", "")))
    return [line for line in lines if line and not line.startswith("#")]


def is_left_out(code):
    return any(re.search(pattern, code, re.M) for pattern in LEFT_OUT)


def run(line):
    """A command of the guides, in this process, made small; of a SLURM array, what the job file starts as its task."""
    if line.startswith("sbatch "):
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
        [count] = re.findall(r"--array=0-(\d+) docs/slurm/array\.sbatch ", line)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in zip(names, (0, 0, 1, int(count) + 1), strict=True):
                patch.setenv(name, str(value))
            run(line.partition(".sbatch ")[2])
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    found, words = list(modules(line)), shlex.split(line)
    if found:
        [(name, words)] = found
        module = importlib.import_module(name + (".__main__" if name == "common.tools.demo" else ""))
        module.main(module.parse_args([*words, *SMALL.get(name, [])]))
    elif words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[0] == "python" and words[1].startswith("tests/"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*words[1:], *SMALL.get(words[1], [])])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    else:
        assert words[0] == "cp", line
        subprocess_run(words, check=True)


@contextlib.contextmanager
def in_turn(once, path, make):
    """What stands in for the demo's second process, which knows of no patch."""
    once(path, make)
    yield


subprocess_run = subprocess.run  # the tests' own, whatever stands in for the demo's


def launched(command, **_):
    """What stands in for the processes that the demo starts: the same in this one."""
    script = next((place for place, word in enumerate(command) if word.endswith(".py")), None)
    words = ["python", *command[1:]]
    if script:
        words = ["accelerate", "launch", Path(command[script]).name, *command[script + 1 :]]
    run(shlex.join(words))
    return subprocess.CompletedProcess(command, 0)


@contextlib.contextmanager
def quick():
    """The demo trains its networks for a moment and measures few samples; a plan is of one choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stable_diffusion, "build_teacher", partial(build_teacher, vae_steps=5, unet_steps=5))
        patch.setattr(stable_diffusion, "build_classifier", partial(build_classifier, steps=20))
        patch.setattr(measuring, "SET_SIZE", 20)
        patch.setattr(measuring, "NUM_SETS", 1)
        patch.setattr(measuring, "STUDENT_STEPS", (1,))
        patch.setattr(demo, "TEACHER_STEPS", (4, 1))
        patch.setattr(demo, "beside", in_turn)
        patch.setattr(plan, "RECOMPUTED", ("none",))
        for name, number in {"SHARDS": 4, "SAMPLES": 40, "WORKERS": 2, "DISTINCT": 4}.items():
            patch.setattr(remote, name, number)
        patch.setattr(consistency, "RUNS", {"ict": {}, "ect": consistency.RUNS["ect"] | {"pretrain_steps": 2}})
        patch.setattr(subprocess, "run", launched)
        yield


@pytest.fixture(scope="session")
def demo_folder(build_once):
    """What the demo's command leaves."""

    def build(folder):
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch, quick():
            patch.chdir(folder)
            run("python -m common.tools.demo")

    return build_once("demo", build) / "demo"


@pytest.fixture
def users_folder(tmp_path, demo_folder, pictured, monkeypatch):
    """Where a reader is: data of each kind under the guides' names, and what they have made before."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_folder, "demo")
    for script in TRAIN_SCRIPTS:  # a reader stands in the repository
        (tmp_path / f"{script}.py").symlink_to(ROOT / f"{script}.py")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "unet.json").write_text(json.dumps(SMALL_UNET))
    (tmp_path / "prompts.txt").write_text("a photo of the digit three\na photo of the digit four\n")
    save_data_set(tmp_path / "cifar10")
    save_table(pictured, tmp_path / "images")
    shutil.copytree(tmp_path / "images", tmp_path / "val2014")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / f"{number}.jpg")
        (tmp_path / "photos" / f"{number}.txt").write_text("a photo")
    (tmp_path / "annotations").mkdir()
    rows = [{"image_id": number // 2, "caption": f"image\n{number}"} for number in range(11_000)]
    (tmp_path / "annotations" / "captions_val2014.json").write_text(json.dumps({"annotations": rows}))
    return tmp_path


def stand_ins(teacher, shards):
    """{what a page says: what is there instead}."""
    new = " --model_config_name_or_path=unet.json"
    return {
        "shards/{00000..00099}.tar": shards, "shards/{00000..01099}.tar": shards,
        "latents/{00000..00099}.tar": f"latents/{Path(shards).name}",
        "runwayml/stable-diffusion-v1-5": teacher, "Qwen/Qwen-Image": teacher,
        "stabilityai/stable-diffusion-xl-base-1.0": teacher, "=runs/sd15": f"={teacher}",
        "student=lcm ": "student=demo/lcm_parity ",
        "facebook/dinov2-large": "demo/classifier", " --clip_model openai/clip-vit-large-patch14": "",
        "=200000": "=2", "=10000": "=2", "=50000": "=20", "max_train_steps=18000 ": "", "=10800": "=2",
        "--eval_num_images=500": "--eval_num_images=20", "--eval_num_images=360": "--eval_num_images=20",
        "_dir=ict": "_dir=ict" + new, "_dir=diffusion": "_dir=diffusion" + new,
        "ct_study.py": "ct_study.py --demo demo",
    }  # fmt: skip


def test_all_scripts_and_tools_are_run_and_what_is_left_out_is_there():
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in lines_of(block)]
    ran = {name for line in lines if not is_left_out(line) for name, _ in modules(line)}
    tools = {path.stem for path in ROOT.glob("common/tools/*.py") if "parse_args(" in path.read_text()} | {"demo"}
    assert ran == TRAIN_SCRIPTS | {f"common.tools.{tool}" for tool in tools}
    lines += [block for page in PAGES for block in blocks(page, "python")]
    for pattern in LEFT_OUT:
        assert any(re.search(pattern, line, re.M) for line in lines), pattern


GOES_ON = {"score_distillation.md": "direct_distill.md"}  # a page that begins where another one ends; with -m soak


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.soak if page.name in GOES_ON else ())
        for page in PAGES
        if "\n```" in page.read_text()
    ],
    ids=lambda page: page.stem,
)
def test_what_a_page_says_runs(page, users_folder, teacher, direct_teacher, shards, request):
    """Its commands and its Python in their order, on a CPU and on small things, as a reader pastes them."""
    names, training = {}, TRAINING_COMMAND
    is_pairs = page.name == "pairs.md"
    if is_pairs:
        shards = f"{request.getfixturevalue('seeded')}/{{00000..00002}}.tar"
    others = stand_ins(direct_teacher() if is_pairs else teacher(), shards)
    for name, stand_in in others.items():
        training = training.replace(name, stand_in)
    before = [ROOT / "docs" / GOES_ON[page.name]] if page.name in GOES_ON else []
    for language, code in FENCE.findall("".join(each.read_text() for each in (*before, page))):
        for name, stand_in in others.items():
            code = code.replace(name, stand_in)
        if language == "bash":
            for line in lines_of(code):
                if line.startswith("--"):  # flags to add to a training command
                    line = re.sub(r"(--output_dir=\w+)", r"\1_more", training) + f" {line}"
                if not is_left_out(line):
                    with quick():
                        run(line)
                    training = line if re.search(r"launch train_", line) else training
        elif language == "python" and not is_left_out(code):
            code = code.replace('.to("cuda")', "").replace("torch.float16", "torch.float32")
            exec(compile(code, str(page), "exec"), names)
    if page.name in ("lcm.md", "tscd.md"):
        assert names["image"].size == (16, 16)
    if page.name == "consistency_training.md":
        assert len(names["one_step"]) == len(names["two_steps"]) == 8
    made = {"README.md": "out.png", "data.md": "shards/00000.tar", "direct_distill.md": "direct/README.md"}
    if page in (README, ROOT / "docs" / page.name) and page.name in made:
        assert Path(made[page.name]).stat().st_size
    if page.name == "evaluation.md":
        assert len(Path("coco5k.txt").read_text().splitlines()) == 5000
