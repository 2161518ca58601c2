"""One run per folder: who may write, whose lock is dead, and that every end releases it."""

import importlib
import json
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

from common import lock
from common.errors import UserError
from common.run import checkpointing, training_run
from tests.cases import one_sentence
from tests.data.making import encode, random_image
from tests.forks import end_of, fork, is_running

import pytest
from accelerate import Accelerator


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 0.4)
    monkeypatch.setattr(lock, "SIGHT", 0.4)
    with lock.releasing():
        yield


def take(folder, *part, report=lambda line: None):
    return lock.take(folder, part or (0, 1), report)


def left_by(folder, name="RUNNING", **changes):
    """A lock in `folder` as of this process, but for `changes`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(lock._me() | changes))
    return path


def keep_touching(path, ended):
    while not ended.wait(0.05):
        os.utime(path)


ELSEWHERE = {"machine": "another boot", "host": "node7"}


@pytest.mark.parametrize(
    "owner, touched, taken, waits",
    [
        ({}, False, False, False),  # this process lives
        ({"process_start": "1"}, False, True, False),  # another one had its number before
        ({"pid": 2**22 + 1}, False, True, False),  # more than a number can be
        ({"pid": 1, "process_start": lock._process_start(1)}, False, False, False),  # another user's, perhaps
        (ELSEWHERE, True, False, True),
        (ELSEWHERE, False, True, True),
        (ELSEWHERE | {"host": lock._me()["host"]}, True, False, True),  # a container, or a host that boots anew
        ({"machine": None, "pid": 2**22 + 1}, True, False, True),  # of a system that does not say which it is
    ],
)
def test_a_living_owner_is_named_and_a_dead_one_followed(tmp_path, owner, touched, taken, waits):
    path, lines, ended = left_by(tmp_path / "out", **owner), [], threading.Event()
    before = path.read_text()
    if touched:
        threading.Thread(target=keep_touching, args=(path, ended), daemon=True).start()
    try:
        if taken:
            held = take(tmp_path / "out", report=lines.append)
            assert json.loads(path.read_text()) == held.owner and "which is dead" in lines[-1]
        else:
            said = f"`output_dir`={tmp_path}/out is in use by process [0-9]+ on [^;]+; wait "
            with pytest.raises(UserError, match=said):
                take(tmp_path / "out", report=lines.append)
            assert path.read_text() == before
    finally:
        ended.set()
    assert any("for a sign of life" in line for line in lines) == waits
    assert os.listdir(tmp_path / "out") == ["RUNNING"]


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    ready = tmp_path / "ready"

    def body():
        take(tmp_path / "out")
        ready.touch()
        time.sleep(60)

    process = fork(body)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"process {process} on"):
        take(tmp_path / "out")
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    take(tmp_path / "out")  # though nobody has asked for its exit code yet
    end_of(process)


def test_of_many_starts_at_once_one_gets_a_dead_owners_folder(tmp_path):
    for round in range(2):
        left_by(tmp_path / str(round), process_start="1")
        if round:  # a start died while it took the folder
            (tmp_path / "1" / ".RUNNING.taken").touch()
            os.utime(tmp_path / "1" / ".RUNNING.taken", (1, 1))
        start = time.time() + 0.1

        def body(folder=tmp_path / str(round), start=start):
            time.sleep(max(0, start - time.time()))
            try:
                take(folder)
            except UserError:
                raise SystemExit(2) from None
            time.sleep(60)

        starts = [fork(body) for _ in range(6)]
        while sum(map(is_running, starts)) > 1 and time.time() < start + 10:
            time.sleep(0.01)
        for process in starts:
            os.kill(process, signal.SIGKILL)
        assert sorted(map(end_of, starts)) == [-signal.SIGKILL, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "first, second, taken",
    [((0, 4), (1, 4), True), ((1, 4), (1, 4), False), ((0, 1), (3, 4), False), ((3, 4), (0, 1), False),
     ((0, 2), (1, 4), True), ((1, 2), (3, 4), False), ((2, 3), (1, 2), False)],
)  # fmt: skip
def test_tasks_share_a_folder_where_they_write_different_shards(tmp_path, first, second, taken):
    """A task of index i of n writes shards i, i + n, ..."""
    overlap = set(range(first[0], 48, first[1])) & set(range(second[0], 48, second[1]))
    assert taken == (not overlap)
    with lock.releasing():
        take(tmp_path / "out", *first)
        if taken:
            take(tmp_path / "out", *second)
        else:
            with pytest.raises(UserError, match="is in use"):
                take(tmp_path / "out", *second)
        assert lock.contents(tmp_path / "out") == set()
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_users_is_left_alone_and_an_empty_one_is_no_owner(tmp_path):
    (tmp_path / "RUNNING").write_text("my notes")
    with pytest.raises(UserError, match="the file RUNNING in it is no run's; name a new folder"):
        take(tmp_path)
    assert (tmp_path / "RUNNING").read_text() == "my notes"
    (tmp_path / "RUNNING").write_text("")  # of a start that was killed between two system calls
    take(tmp_path)


@pytest.mark.parametrize("end", [None, UserError("no"), ValueError("no"), SystemExit(75), KeyboardInterrupt()])
@pytest.mark.parametrize("decorate", [training_run.user_errors, training_run.tool_errors])
def test_every_end_releases_the_folder(tmp_path, end, decorate):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()

    @decorate
    def main(args):
        take(tmp_path / "new")
        take(tmp_path / "mine")
        if end is not None:
            raise end

    with pytest.raises((SystemExit, ValueError)) if end else lock.releasing():
        main(None)
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == ["notes"]


def test_the_owner_shows_that_it_lives_and_ends_where_its_folder_was_taken(tmp_path):
    def body():
        lock.BEAT = 0.05
        path = take(tmp_path / "out").path
        os.utime(path, (1, 1))
        time.sleep(0.3)
        assert path.stat().st_mtime > time.time() - 60
        for unreadable in (b"", b"\0" * 400, b"\xff", path.read_bytes()[:100]):  # a server's moment of weakness
            path.write_bytes(unreadable)
            time.sleep(0.15)
        left_by(tmp_path / "out")
        time.sleep(60)

    assert end_of(fork(body)) == 2 and (tmp_path / "out" / "RUNNING").is_file()  # the other's


def test_a_run_that_is_moved_aside_takes_no_lock_with_it(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / checkpointing.CONFIG).write_text("{}")
    checkpointing.open_output_dir(Accelerator(cpu=True), out, None, overwrite=True)
    assert os.listdir(tmp_path / "out.1") == [checkpointing.CONFIG] and os.listdir(out) == ["RUNNING"]
    with pytest.raises(UserError, match="is in use"):
        checkpointing.open_output_dir(Accelerator(cpu=True), out, None, overwrite=True)
    checkpointing.open_output_dir(Accelerator(cpu=True), out, "latest", dry_run=True)  # which writes nothing
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(UserError, match="holds files but no run"):
        checkpointing.open_output_dir(Accelerator(cpu=True), tmp_path / "mine", None, overwrite=True)
    assert "notes" in os.listdir(tmp_path / "mine")
    assert sorted(os.listdir(tmp_path)) == ["mine", "out", "out.1"]


def test_a_node_with_a_folder_of_its_own_is_found_at_the_start(tmp_path, monkeypatch):
    def of_two_nodes(values):  # the second is asked for its own folder of that name
        return [*values, lock.is_seen(other, json.loads((tmp_path / "out" / "RUNNING").read_text()))]

    monkeypatch.setattr(checkpointing, "gather_object", of_two_nodes)
    words = "is not one folder for all processes: what process 0 on [^ ]+ wrote there is not seen by process 1; name"
    other = tmp_path / "other"
    for make in (lambda: None, other.touch, lambda: (other.unlink(), other.mkdir()), lambda: left_by(other)):
        make()
        with lock.releasing(), pytest.raises(UserError, match=words):
            checkpointing.open_output_dir(Accelerator(cpu=True), tmp_path / "out", None)
    (other / "RUNNING").unlink()
    other.rmdir()
    other.symlink_to(tmp_path / "out")
    checkpointing.open_output_dir(Accelerator(cpu=True), tmp_path / "out", None)


def test_every_process_resumes_from_what_the_main_one_finds(tmp_path, monkeypatch):
    """Another node's server may not list the newest checkpoint yet."""
    owner, newest = json.loads(left_by(tmp_path).read_text()), tmp_path / "checkpoint-2"
    monkeypatch.setattr(checkpointing, "broadcast_object_list", lambda values: [None, owner, newest])
    another = SimpleNamespace(is_main_process=False)
    assert checkpointing.open_output_dir(another, tmp_path, "latest") == newest


@pytest.mark.parametrize("tool", ["demo", "encode_pairs", "encode_shards", "evaluate", "generate_pairs"])
def test_a_tool_is_not_started_twice_in_one_folder(tmp_path, teacher, shards, monkeypatch, capsys, tool):
    module = importlib.import_module(f"common.tools.{tool}" + (".__main__" if tool == "demo" else ""))
    out = tmp_path / "out"
    (tmp_path / "1.png").write_bytes(encode(random_image(0, 16, 16)))
    (tmp_path / "pairs.csv").write_text("image,prompt,seed\n1.png,one,1\n")
    (tmp_path / "prompts.txt").write_text("one\n")
    model = f"--pretrained_teacher_model={teacher()}"
    words = {
        "demo": [f"--output_dir={out}"],
        "encode_pairs": [str(tmp_path / "pairs.csv"), str(out), model],
        "encode_shards": [shards, str(out), model, "--resolution=16"],
        "evaluate": [f"--output_dir={out}", f"--pretrained_model={teacher()}", "--prompts=one"],
        "generate_pairs": [f"--output_dir={out}", model, f"--prompts={tmp_path / 'prompts.txt'}"],
    }[tool]
    args = module.parse_args(words)
    path = left_by(out)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    assert f"={out} is in use by process {os.getpid()}" in one_sentence(capsys, module.main, args)
    assert os.listdir(out) == ["RUNNING"] and path.is_file()
    shutil.rmtree(out)
