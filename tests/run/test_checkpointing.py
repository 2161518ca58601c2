import json
import resource
from pathlib import Path

from common.errors import UserError
from common.results.evaluation import record
from common.run import checkpointing

import pytest
import torch
from accelerate import Accelerator


def setup_run(seed=0):
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    net, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    net, optimizer = accelerator.prepare(net, optimizer)
    return accelerator, net, optimizer, {"target": target}, {"schedule": schedule}


def update(net, optimizer, schedule, target):
    loss = net(torch.randn(4, 3)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    with torch.no_grad():
        target.weight.lerp_(net.weight, 0.5)


def save(output_dir, step, total_limit=None, run=None):
    accelerator, _, _, modules, objects = run or setup_run()
    state = {"args": {"seed": 1}, "data": {"position": step}}
    return checkpointing.save_checkpoint(accelerator, output_dir, step, state, modules, objects, total_limit)


def test_everything_comes_back(tmp_path):
    run = setup_run()
    accelerator, net, optimizer, modules, objects = run
    for _ in range(3):
        update(net, optimizer, objects["schedule"], modules["target"])
    path = save(tmp_path, 3, run=run)
    for _ in range(3):
        update(net, optimizer, objects["schedule"], modules["target"])
    expected = [net.weight.clone(), modules["target"].weight.clone(), objects["schedule"].get_last_lr()]
    expected.append(torch.randn(3))

    accelerator, net, optimizer, modules, objects = setup_run(seed=99)
    checkpointing.load_checkpoint(accelerator, path, modules, objects)
    for _ in range(3):
        update(net, optimizer, objects["schedule"], modules["target"])
    assert torch.equal(net.weight, expected[0]) and torch.equal(modules["target"].weight, expected[1])
    assert objects["schedule"].get_last_lr() == expected[2] and torch.equal(torch.randn(3), expected[3])
    state = checkpointing.read_state(path)
    assert state["global_step"] == 3 and state["data"] == {"position": 3} and checkpointing.completeness(path) is None


def test_leftovers_are_those_of_saves_and_a_whole_save_gets_its_name(tmp_path):
    save(tmp_path, 2).rename(tmp_path / "checkpoint-2.tmp")  # it lacks only its rename
    for name in ("checkpoint-1.tmp", "checkpoint-mine.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7.tmp").touch()
    checkpointing.remove_leftovers(tmp_path)
    expected = ["checkpoint-2", "checkpoint-7.tmp", "checkpoint-mine.tmp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == expected
    assert checkpointing.completeness(tmp_path / "checkpoint-2") is None


STATE = ["optimizer.bin", "objects.pt", "model.safetensors", "target.safetensors", "random_states_0.pkl"]


@pytest.mark.parametrize("name", STATE)
def test_a_file_that_is_damaged_at_its_right_size_ends_in_one_sentence(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).write_bytes(bytes((path / name).stat().st_size))
    accelerator, *_, modules, objects = setup_run(seed=5)
    with pytest.raises(UserError, match="checkpoint-1 is damaged or of another model|damaged random states"):
        checkpointing.load_checkpoint(accelerator, path, modules, objects)


@pytest.mark.parametrize("names", [["README.md", "unet"], ["training_config.json", "model_index.json"], ["notes.txt"]])
def test_latest_never_starts_anew_over_files_of_others_or_a_result(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="holds files but no complete checkpoint"):
        checkpointing.find_checkpoint(tmp_path, "latest")


def test_a_checkpoint_of_another_folder_needs_an_empty_one(tmp_path):
    path = save(tmp_path / "a", 1)
    (tmp_path / "b").mkdir()
    assert checkpointing.find_checkpoint(tmp_path / "b", str(path)) == path
    (tmp_path / "b" / "unet").mkdir()
    with pytest.raises(UserError, match="is of another folder"):
        checkpointing.find_checkpoint(tmp_path / "b", str(path))


def test_the_same_path_in_another_spelling_is_no_other_configuration(tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    saved = {"pretrained_teacher_model": str(tmp_path / "teacher")}
    for spelling in ("teacher", "teacher/", "./teacher"):
        checkpointing.check_same_run("c", saved, {"pretrained_teacher_model": spelling})


def test_the_same_step_saved_again_replaces_the_first(tmp_path):
    run = setup_run()
    path = save(tmp_path, 2, run=run)
    (path / "old").touch()
    assert save(tmp_path, 2, run=run) == path
    assert not (path / "old").exists() and [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 10]), (1, [10]), (2, [3, 10]), (9, [1, 2, 3, 10])])
def test_total_limit_keeps_the_newest(tmp_path, limit, kept):
    run = setup_run()
    for step in (1, 2, 3, 10):
        save(tmp_path, step, limit, run)
    assert [c.name for c in checkpointing.list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in kept]


def test_the_best_is_kept_besides(tmp_path):
    run, kept = setup_run(), []
    row = {"network": "ema", "num_inference_steps": 2}
    rows = [row | {"frechet_distance": distance} for distance in (9.0, 2.0, 3.0, 4.0, 1.0, 7.0)]
    for step, row in enumerate(rows, 1):
        record(tmp_path, step, [row], None if step == 1 else f"checkpoint-{step}")  # before the checkpoint stands
        save(tmp_path, step, 2, run)
        kept.append([int(c.name.split("-")[1]) for c in checkpointing.list_checkpoints(tmp_path)])
    assert kept == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [4, 5], [4, 5, 6]]
    # Back at step 4: rows of steps 4 and 5 are dropped; step 2 is best again, but its checkpoint is gone.
    assert record(tmp_path, 4, [rows[3]], "checkpoint-4")["step"] == 2
    best = json.loads((tmp_path / "best_checkpoint.json").read_text())
    assert best["frechet_distance"] == 2.0 and best["checkpoint"] is None


def test_a_disk_that_is_full_at_any_byte_is_one_sentence_and_leaves_nothing(tmp_path):
    run = setup_run()
    update(run[1], run[2], run[4]["schedule"], run[3]["target"])
    sizes = [path.stat().st_size for path in save(tmp_path, 1, run=run).iterdir()]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [*range(0, max(sizes), max(sizes) // 40), max(sizes) - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(UserError, match="checkpoint of step 2 could not be written .*make room and resume"):
                save(tmp_path, 2, run=run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    save(tmp_path, 2, run=run)


def test_nothing_is_pruned_before_the_new_one_stands(tmp_path, monkeypatch):
    run = setup_run()
    save(tmp_path, 1, 1, run)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    with pytest.raises(UserError, match="read-only"):
        save(tmp_path, 2, 1, run)
    assert checkpointing.completeness(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: (path / "model.safetensors").write_bytes(b"x"), "model.safetensors has 1 bytes"),
        (lambda path: (path / "optimizer.bin").unlink(), "optimizer.bin is missing"),
        (lambda path: (path / "COMPLETE").unlink(), "no COMPLETE file"),
    ],
)
def test_partial_checkpoints_are_refused_by_name_and_passed_over_by_latest(tmp_path, spoil, words):
    run, lines = setup_run(), []
    save(tmp_path, 1, run=run)
    spoil(save(tmp_path, 2, run=run))
    with pytest.raises(UserError, match=words):
        checkpointing.find_checkpoint(tmp_path, "checkpoint-2")
    assert checkpointing.find_checkpoint(tmp_path, "latest", lines.append).name == "checkpoint-1"
    assert words in lines[0]


def test_what_resume_from_checkpoint_may_be(tmp_path):
    lines = []
    assert checkpointing.find_checkpoint(tmp_path, None) is None
    assert checkpointing.find_checkpoint(tmp_path, "latest", lines.append) is None and not lines  # a first start
    (tmp_path / checkpointing.CONFIG).touch()  # it died before its first checkpoint
    (tmp_path / "logs").mkdir()
    assert checkpointing.find_checkpoint(tmp_path, "latest", lines.append) is None and "starts anew" in lines[0]
    path = save(tmp_path, 5)
    for name in ("latest", "checkpoint-5", str(path)):
        assert checkpointing.find_checkpoint(tmp_path, name) == path
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpointing.find_checkpoint(tmp_path, "checkpoint-6")


def test_another_configuration_is_refused_with_a_list(tmp_path):
    saved = {"seed": 1, "w_min": 5.0, "max_train_steps": 10, "data_seed": 1, "train_batch_size": 4}
    rules = {"free": {"max_train_steps"}, "with_data": {"data_seed", "train_batch_size"}}
    checkpointing.check_same_run("c", saved, saved | {"max_train_steps": 20, "new_flag": None}, **rules)
    with pytest.raises(UserError, match="`seed` was 1 and is 2, `w_min` was 5.0 and is 6.0; pass what it was, or st"):
        checkpointing.check_same_run("c", saved, saved | {"seed": 2, "w_min": 6.0})
    with pytest.raises(UserError, match="`train_batch_size` was 4 and is 8; pass what it was, or another `data_seed`"):
        checkpointing.check_same_run("c", saved, saved | {"train_batch_size": 8}, **rules)
    checkpointing.check_same_run("c", saved, saved | {"train_batch_size": 8, "data_seed": 2}, **rules)
    there, renewed, other = ({"shards": f"https://h/{n}?X-Amz-Date={d}&sig=***"} for n, d in ((0, 1), (0, 2), (1, 1)))
    checkpointing.check_same_run("c", there, renewed)
    with pytest.raises(UserError, match="`shards` was"):
        checkpointing.check_same_run("c", there, other)


def test_output_dir_is_checked_before_anything_is_written(tmp_path):
    new = tmp_path / "a" / "b"
    checkpointing.prepare_output_dir(new, None, dry_run=True)
    assert not new.parent.exists()
    checkpointing.prepare_output_dir(new, None)
    assert list(new.iterdir()) == []
    (new / "precious").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        checkpointing.prepare_output_dir(new, None)
    checkpointing.prepare_output_dir(new, "latest")
    assert (new / "precious").read_text() == "mine"
    for dry_run in (False, True):
        with pytest.raises(UserError, match="precious cannot be written to"):
            checkpointing.prepare_output_dir(new / "precious", None, dry_run)


def test_a_start_that_failed_does_not_stand_in_the_way_of_the_next(tmp_path):
    """It has written its flags before the weights were loaded, and what it skipped of data that were all bad."""
    (tmp_path / "training_config.json").write_text("{}")
    for name in ("skipped_samples.jsonl", "skipped_samples.rank1.jsonl"):
        (tmp_path / name).write_text("{}")
    checkpointing.prepare_output_dir(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["training_config.json"]
    (tmp_path / "logs").mkdir()  # training has begun
    with pytest.raises(UserError, match="is not empty"):
        checkpointing.prepare_output_dir(tmp_path, None)


def test_a_full_disk_is_found_at_the_start(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot be written to .No space left on device."):
        checkpointing.prepare_output_dir(tmp_path / "new", None)


def test_a_death_while_an_old_one_is_pruned_leaves_no_half_of_it(tmp_path, monkeypatch):
    save(tmp_path, 1, total_limit=1)

    def die_halfway(folder, ignore_errors=False):
        if Path(folder).exists():
            (Path(folder) / checkpointing.STATE).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.shutil, "rmtree", die_halfway)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, total_limit=1)
    assert [c.name for c in checkpointing.list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert checkpointing.completeness(tmp_path / "checkpoint-2") is None
    checkpointing.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
