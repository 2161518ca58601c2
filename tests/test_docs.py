"""README and guides: short, in 119 columns, without a dead link; their commands parse, and their Python runs."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
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
    for line in (line for text in texts for line in commands(text)):
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


# --- Python


SMALL_UNET = {
    "_class_name": "UNet2DModel", "block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
}  # fmt: skip
SHARED = ["--train_batch_size=2", "--validation_steps=0", "--seed=0", "--shuffle_block_samples=16"]


def train(name, folder, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script = importlib.import_module(name)
    script.main(script.parse_args([f"--output_dir={folder}", *SHARED, *flags]))


@pytest.fixture(scope="session")
def students(build_once, teacher, shards):
    """A folder with students of a few updates, under the names that the guides' commands give them."""

    def build(folder):
        sd = [f"--pretrained_teacher_model={teacher()}", f"--train_shards_path_or_url={shards}", "--resolution=16"]
        sd += ["--max_train_steps=1", "--validation_num_inference_steps=1"]
        stages = [*sd, "--stage_segments=8,4,1", "--stage_steps=1", "--max_train_steps=3", "--adv_weights=0"]
        train("train_lcm_distill_sd_wds", folder / "lcm", *sd)
        train("train_lcm_distill_lora_sd_wds", folder / "lcm_lora", *sd, "--lora_rank=4")
        train("train_tscd_distill_sd_wds", folder / "tscd", *stages)
        train("train_tscd_distill_lora_sd_wds", folder / "tscd_lora", *stages, "--lora_rank=4")
        draw = np.random.default_rng(0)
        for number in range(20):
            path = folder / "images" / str(number % 10) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        (folder / "unet.json").write_text(json.dumps(SMALL_UNET))
        train("train_cm_ct_unconditional", folder / "ict", f"--train_data_dir={folder / 'images'}", "--resolution=8",
              "--class_conditional", "--num_classes=10", f"--model_config_name_or_path={folder / 'unet.json'}",
              "--max_train_steps=10", "--eval_batch_size=2")  # fmt: skip

    return build_once("students", build)


@pytest.fixture
def users_folder(tmp_path, students, monkeypatch):
    """Where the guides' Python runs: the students, photos with captions, and COCO's captions."""
    for student in students.iterdir():
        (tmp_path / student.name).symlink_to(student)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / f"{number}.jpg")
        (tmp_path / "photos" / f"{number}.txt").write_text("a photo")
    (tmp_path / "annotations").mkdir()
    rows = [{"image_id": number // 2, "caption": f"image\n{number}"} for number in range(11_000)]
    (tmp_path / "annotations" / "captions_val2014.json").write_text(json.dumps({"annotations": rows}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_of_the_guides_runs(page, users_folder, teacher):
    """In a page's order, on a CPU, on small students: what a reader pastes after the page's commands."""
    names = {}
    for code in blocks(page, "python"):
        if "import ray" in code:  # tests/tools/test_encode_shards.py runs it
            continue
        code = code.replace('.to("cuda")', "").replace("torch.float16", "torch.float32")
        code = code.replace("runwayml/stable-diffusion-v1-5", teacher())
        exec(compile(code, str(page), "exec"), names)
    if page.name in ("lcm.md", "tscd.md"):
        assert names["image"].size == (16, 16)
    if page.name == "consistency_training.md":
        assert len(names["one_step"]) == len(names["two_steps"]) == 8
    made = {"README.md": "out.png", "data.md": "shards/00000.tar", "evaluation.md": "coco5k.txt"}
    if page.name in made:
        assert Path(made[page.name]).stat().st_size
    if page.name == "evaluation.md":
        assert len(Path("coco5k.txt").read_text().splitlines()) == 5000
