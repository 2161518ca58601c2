"""Paths as people type them: every flag of scripts and tools that names one, and names that look like patterns."""

import importlib
import os
from pathlib import Path

from common import flags
from common.data.shards import expand_shards
from common.errors import UserError
from common.run import checkpointing, reference
from common.tools import evaluate
from tests.cases import SCRIPTS

import pytest

TRAINING = [script.__name__ for script in SCRIPTS.values()]
TOOLS = [
    f"common.tools.{name}" for name in ("demo.__main__", "encode_pairs", "encode_shards", "evaluate", "generate_pairs")
]
# Text that names nothing on a disk. A new flag stands here, or has one of the types of paths in `common.flags`.
NO_PATHS = set(
    "help revision teacher_revision variant device report_to tracker_project_name hub_token hub_model_id timesteps "
    "lora_target_modules dataset_config_name dataset_image_column_name dataset_class_label_column_name scheduler "
    "scheduler_kwargs student_scheduler student_scheduler_kwargs student_kwargs teacher_kwargs score_kwargs "
    "prompt_column "
    "negative_prompt ddpm_num_steps ddpm_num_inference_steps ddpm_beta_schedule save_images_epochs save_model_epochs "
    "enable_xformers_memory_efficient_attention".split()
)


def parser_of(name, monkeypatch):
    class Found(Exception):
        pass

    def found(parser, argv=None):
        raise Found(parser)

    monkeypatch.setattr(flags.ArgumentParser, "parse_args", found)
    with pytest.raises(Found) as caught:
        importlib.import_module(name).parse_args([])
    return caught.value.args[0]


@pytest.mark.parametrize("name", [*TRAINING, *TOOLS])
def test_every_flag_that_can_name_a_path_knows_the_home_folder(monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/me")
    texts = [action for action in parser_of(name, monkeypatch)._actions if action.nargs != 0 and not action.choices]
    untyped = {action.dest for action in texts if action.type is None}
    assert untyped <= NO_PATHS
    typed = [action for action in texts if action.type in (flags.path, evaluate.labelled_path, flags.prompt)]
    assert {"output_dir"} <= {action.dest for action in typed} and not {a.dest for a in typed} & NO_PATHS
    for action in typed:
        text = "@~/x" if action.type is flags.prompt else "~/x"
        assert action.type(text) == text.replace("~", "/home/me")


@pytest.mark.parametrize(
    "convert, text, expected",
    [
        (flags.path, "~", "/home/me"),
        (flags.path, "~/a b/[1]/ä", "/home/me/a b/[1]/ä"),
        (flags.path, "@~/prompts.txt", "@/home/me/prompts.txt"),
        (flags.path, "~/{0..3}.tar", "/home/me/{0..3}.tar"),
        (flags.path, "{~/a,~/b}/{0..3}.tar", "{/home/me/a,/home/me/b}/{0..3}.tar"),
        (flags.path, "~root/x", "/root/x"),
        (flags.path, "https://host/{~root,~/b}/0.tar", "https://host/{~root,~/b}/0.tar"),
        (flags.path, "runs/a,~root/0.tar", "runs/a,~root/0.tar"),
        (flags.path, "~nobody-has-this-name/x", "~nobody-has-this-name/x"),
        (flags.path, "a~/b", "a~/b"),
        (flags.path, "runs/~1", "runs/~1"),
        (flags.path, "org/model", "org/model"),
        (flags.path, "https://host/~user/{0..3}.tar", "https://host/~user/{0..3}.tar"),
        (flags.path, "pipe:cat {~/a,~/b}.tar", "pipe:cat {~/a,~/b}.tar"),  # bash expands them
        (evaluate.labelled_path, "mine=~/x", "mine=/home/me/x"),
        (evaluate.labelled_path, "~/x", "/home/me/x"),
        (evaluate.labelled_path, "~/x=y", "~/x=y"),  # a label with a ~, unless the folder exists
        (flags.prompt, "~ a wave ~", "~ a wave ~"),
        (flags.prompt, "@~/p.txt", "@/home/me/p.txt"),
    ],
)
def test_where_a_home_folder_is_meant(monkeypatch, convert, text, expected):
    monkeypatch.setenv("HOME", "/home/me")
    assert convert(text) == expected


def test_a_label_is_none_where_the_whole_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lr=1e-4").mkdir()
    assert evaluate.labelled_path("~/lr=1e-4") == f"{tmp_path}/lr=1e-4"
    assert evaluate.named_model(f"{tmp_path}/lr=1e-4") == ("lr=1e-4", f"{tmp_path}/lr=1e-4")


@pytest.mark.parametrize(
    "name", ["a b", "Größe", "[1]", "{a}", "{a,b}", "{0..1}", "x*", "what?", "~", "a'b\"c", "50%"]
)
def test_folders_that_exist_are_no_patterns(tmp_path, monkeypatch, name):
    """Beside them stand the folders that a pattern would find instead; the last part may be one."""
    for folder in (name, "1", "a", "b", "0", "xy", "whats"):
        (tmp_path / folder).mkdir()
        for number in (0, 1):
            (tmp_path / folder / f"{number}.tar").write_bytes(b"")
    expected = [f"{tmp_path}/{name}/{number}.tar" for number in (0, 1)]
    for last in ("", "/{0..1}.tar", "/*.tar", "/[01].tar", "/{0,1}.t?r"):
        assert expand_shards(f"{tmp_path}/{name}{last}") == expected
    assert list(map(str, reference.reference_files(f"{tmp_path}/{name}")[1])) == expected
    assert list(map(str, reference.reference_files(f"{tmp_path}/{name}/{{0..1}}.tar")[1])) == expected
    assert list(map(str, reference.reference_files(expected[0])[1])) == expected[:1]
    monkeypatch.chdir(tmp_path)
    assert expand_shards(f"./{name}/*.tar") == [f"./{name}/{number}.tar" for number in (0, 1)]


def test_a_checkpoint_with_the_unexpanded_path_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "teacher").mkdir()
    old = {"pretrained_teacher_model": "~/teacher", "train_shards_path_or_url": "~/{0..3}.tar", "seed": 1}
    now = {name: flags.path(value) if isinstance(value, str) else value for name, value in old.items()}
    assert now["train_shards_path_or_url"] == f"{tmp_path}/{{0..3}}.tar"
    checkpointing.check_same_run("checkpoint-1", old, now)
    with pytest.raises(UserError, match="`pretrained_teacher_model` was '~/teacher'"):
        checkpointing.check_same_run("checkpoint-1", old, now | {"pretrained_teacher_model": "~/other"})


def test_nothing_is_made_of_the_tilde_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    words = ["--pretrained_teacher_model=~/t", "--train_shards_path_or_url=~/s", "--output_dir=~/lcm"]
    args = importlib.import_module(TRAINING[0]).parse_args(words)
    checkpointing.prepare_output_dir(args.output_dir, None)
    assert os.listdir(tmp_path) == ["home"] and Path("home/lcm").is_dir()
