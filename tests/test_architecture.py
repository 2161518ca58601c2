"""The law of the house: which room may import which, who knows flags, and how large a file may be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMON = ROOT / "common"
FILES = sorted(path for path in COMMON.rglob("*.py") if path.name != "__init__.py")
SCRIPTS = sorted(ROOT.glob("train_*.py"))
# A room imports its own modules and those of lower rooms. Modules that lie beside the rooms are the lowest, but flags.
ORDER = {
    "": 0,
    "networks": 1,
    "data": 2,
    "results": 2,
    "flags": 3,
    "run": 4,
    "score": 5,
    "ct": 6,
    "direct": 6,
    "tscd": 6,
    "tools": 7,
}
ANNEXES = {
    "score": {"train_direct_distill", "train_tscd_distill_sd_wds", "train_tscd_distill_lora_sd_wds"},
    "ct": {"train_cm_ct_unconditional"},
    "direct": {"train_direct_distill"},
    "tscd": {"train_tscd_distill_sd_wds", "train_tscd_distill_lora_sd_wds"},
}
OLD_ADDRESS = COMMON / "consistency_scheduler.py"  # by which saved models' cards import a scheduler


def room(module):
    """`common.data.shards` -> data; `common.losses`, beside the rooms, -> ""; `common.flags` -> flags."""
    parts = module.split(".")[1:]
    return parts[0] if len(parts) > 1 or parts[0] == "flags" else ""


def imported(path):
    """The modules of `common` that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "common":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if (ROOT / f"{full.replace('.', '/')}.py").is_file() else node.module


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_lower_ones_alone(path):
    own = room(name_of(path))
    for module in imported(path) if path != OLD_ADDRESS else ():
        assert room(module) == own or ORDER[room(module)] < ORDER[own], module


def test_no_module_imports_itself_by_way_of_others():
    graph = {name_of(path): set(imported(path)) for path in FILES}
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_an_annex_is_its_own_scripts_alone(script):
    for module in imported(script):
        assert script.stem in ANNEXES.get(room(module), {script.stem}), module


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_name_parameters_and_no_flags(path):
    if room(name_of(path)) in ("flags", "tools") or path.name == "flags.py":
        return  # they define the flags
    text = re.sub(r"--(sort|header|user|proxy)\b", "", path.read_text())  # of other programs
    assert not re.search(r"(?<![\w-])--[a-z]\w+", text), re.search(r".*(?<![\w-])--[a-z]\w+.*", text)[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_longer_than_can_be_read(path):
    assert sum(1 for line in path.read_text().splitlines() if line.strip()) <= 450


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_scripts_call_with_keywords_and_pack_nothing(script):
    calls = (node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call))
    packed = [arg for call in calls for arg in call.args if isinstance(arg, ast.Starred)]
    assert not [ast.unparse(arg) for arg in packed if isinstance(arg.value, ast.Name)]


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_steps_that_a_scripts_docstring_names_are_there(script):
    text = script.read_text()
    named = re.findall(r"\b7\.\d+", ast.get_docstring(ast.parse(text)))
    assert named and [step for step in named if f"# {step} " not in text] == []
