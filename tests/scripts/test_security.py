"""Nothing is run from data, checkpoints or teachers; docs/security.md says so line by line."""

import ast
import re
import shutil
from pathlib import Path

from common.ct.data import open_images
from common.direct import pipelines
from common.errors import UserError
from common.networks import teachers
from common.run import checkpointing
from common.tools import evaluate
from tests.cases import ROOT
from tests.data.making import Trap, pickle_members, write_tar
from tests.made import edit_json
from tests.run.test_checkpointing import save, setup_run

import datasets
import pytest
import torch

SOURCES = sorted([*ROOT.glob("train_*.py"), *ROOT.glob("common/**/*.py")])


def calls(path):
    """(dotted name, call node) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_line_of_ours_unpickles_evaluates_or_opens_a_shell():
    shells, loads = [], []
    for path in SOURCES:
        for name, node in calls(path):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name not in ("eval", "exec", "__import__", "os.system", "os.popen"), (path, name)
            assert not re.match(r"(pickle|dill|joblib|cloudpickle|marshal|shelve)\.", name), (path, name)
            assert "shell" not in keywords and keywords.get("trust_remote_code", "False") == "False", (path, name)
            assert name not in ("wds.decode", "webdataset.decode"), (path, name)
            assert keywords.get("allow_pickle", "False") == "False", (path, name)  # numpy's default
            if name == "torch.load":
                loads.append(keywords.get("weights_only"))
            if name.startswith("subprocess."):
                shells.append((path.name, ast.unparse(node)))
    assert loads and set(loads) == {"True"}
    # the pipe: that the user typed, and the demo and the evaluation that start scripts by a list of words
    assert {name for name, text in shells if "bash" in text or "arguments" in text} <= {"transfers.py"}, shells


@pytest.mark.parametrize("force", [False, True], ids=["", "with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "objects.pt", "pytorch_model.bin"])
def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch, name, force):
    """accelerate reads the first two itself, and the last where model.safetensors is missing."""
    path, trap = save(tmp_path, 1), tmp_path / "ran"
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if name == "pytorch_model.bin":
        (path / "model.safetensors").unlink()
    torch.save({"schedule": Trap(trap), "random_state": Trap(trap)}, path / name)
    accelerator, *_, modules, objects = setup_run(seed=5)
    with pytest.raises(UserError, match="damaged"):
        checkpointing.load_checkpoint(accelerator, path, modules, objects)
    assert not trap.exists()


CODE = "import os\nos.mkdir({trap!r})\nclass Own:\n    from_pretrained = from_config = staticmethod(print)\n"


@pytest.mark.parametrize("what", ["scheduler", "pipeline", "tokenizer"])
def test_a_teacher_runs_no_code(tmp_path, teacher, what):
    folder, trap = Path(shutil.copytree(teacher(), tmp_path / "teacher")), tmp_path / "ran"
    code = CODE.format(trap=str(trap))
    if what == "pipeline":
        (folder / "own.py").write_text(code)
        (folder / "pipeline.py").write_text(code)
        edit_json(folder / "model_index.json", _class_name=["own", "Own"])
    elif what == "scheduler":
        (folder / "scheduler" / "own.py").write_text(code)
        edit_json(folder / "model_index.json", scheduler=["own", "Own"])
    else:
        (folder / "tokenizer" / "own.py").write_text(code)
        edit_json(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    for module, read, load in (
        (teachers, "read_teacher_config", "load_teacher"),
        (pipelines, "read_pipeline_config", "load_pipeline"),
    ):
        try:
            getattr(module, read)(str(folder))
            getattr(module, load)(str(folder))
        except UserError as error:
            assert "`pretrained_teacher_model`=" in str(error)
        else:
            assert what == "tokenizer"  # CLIPTokenizer is named by its class, and the map is not looked at
        assert not trap.exists()


@pytest.mark.parametrize("what", ["script", "script beside data", "pickles", "tar of pickles"])
def test_a_data_set_runs_no_code(tmp_path, monkeypatch, what):
    """Consistency training reads data sets through `datasets`, which runs no code of theirs."""
    folder, trap = tmp_path / "own", tmp_path / "ran"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder.mkdir()
    if "script" in what:
        (folder / "own.py").write_text(CODE.format(trap=str(trap)))
    if what == "script beside data":
        (folder / "data.csv").write_text("image,label\na.png,1\n")
    if what == "pickles":
        torch.save({"image": Trap(trap)}, folder / "train.pkl")
    if what == "tar of pickles":
        write_tar(folder / "0.tar", pickle_members(trap))
    for name in (folder, folder / "own.py") if what == "script" else (folder,):
        with pytest.raises(UserError, match="`dataset_name`="):
            open_images(None, str(name), image_column="image", label_column="label")
    assert not trap.exists()


def test_pickled_weights_are_refused(tmp_path, teacher):
    folder = Path(shutil.copytree(teacher(), tmp_path / "teacher"))
    weights, trap = folder / "text_encoder" / "model.safetensors", tmp_path / "ran"
    weights.unlink()
    torch.save({"a": Trap(trap)}, weights.with_name("pytorch_model.bin"))
    for read in (teachers.read_teacher_config, pipelines.read_pipeline_config, evaluate.check_weights):
        with pytest.raises(UserError, match="text_encoder/ has its weights only as pytorch_model.bin, a pickle"):
            read(str(folder))
    with pytest.raises(UserError, match="cannot be loaded"):  # as a hub name, whose files are not looked at before
        teachers.load_teacher(str(folder))
    assert not trap.exists()


def test_the_guide_has_ten_lines_and_names_tests_that_exist():
    lines = re.findall(r"^\d+\. .*(?:\n   .*)*", (ROOT / "docs" / "security.md").read_text(), re.M)
    assert len(lines) == 10
    for line in lines:
        names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
        assert names, line
        for file, test in names:
            assert f"def {test}(" in (ROOT / file).read_text(), (file, test)
