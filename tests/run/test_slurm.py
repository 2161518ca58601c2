"""The job files of docs/slurm under bash, with stand-ins for SLURM's commands; with real launchers in tests/soak."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "slurm"
JOBS = sorted(path.name for path in FOLDER.glob("*.sbatch"))

# Stands for a training run: it notes its command, waits for STOP or for its time, and leaves what a run leaves.
RUN = """#!/bin/bash
echo "$SLURM_NODEID $*" >> "$LOG/commands"
case "$BEHAVIOUR" in
    fails) exit 7 ;;
    ends) exit 0 ;;
esac
touch "$LOG/started.$SLURM_NODEID"
until [ -e "$OUTPUT_DIR/STOP" ]; do sleep 0.05; done
if [ "$BEHAVIOUR" = orphans ]; then
    (sleep 1; echo '{"global_step": 5}' > "$OUTPUT_DIR/REQUEUE") &
    exit 1
fi
echo '{"global_step": 5}' > "$OUTPUT_DIR/REQUEUE"
exit 1
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") echo localhost; echo other ;;
    *) echo "$*" >> "$LOG/scontrol" ;;
esac
"""
# One task on each node, the highest exit code, as srun has it.
SRUN = """#!/bin/bash
shift
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
worst=0
for task in $tasks; do wait $task; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
"""


@pytest.fixture
def job(tmp_path):
    """job(file, behaviour, arguments): the started process of a job file under stand-ins for SLURM's commands."""
    (tmp_path / "bin").mkdir()
    for name, text in {"accelerate": RUN, "scontrol": SCONTROL, "srun": SRUN, "work": WORK}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    started = []

    def start(file, behaviour="stops", arguments=("train.py", "--a=b c"), real_accelerate=False, **env):
        if real_accelerate:
            (tmp_path / "bin" / "accelerate").write_text(
                f'#!/bin/bash\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n'
            )
        env = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(tmp_path), "BEHAVIOUR": behaviour,
            "OUTPUT_DIR": str(tmp_path / "out"), "SLURM_JOB_ID": "777", "SLURM_NNODES": "2", "SLURM_NODEID": "0",
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16",
            "SLURM_ARRAY_JOB_ID": "700", "GPUS_PER_NODE": "1",
        } | env  # fmt: skip
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        process = subprocess.Popen(["bash", FOLDER / file, *arguments], env=os.environ | env, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


WORK = """#!/bin/bash
echo "$SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_TASK_COUNT: $*" >> "$LOG/commands"
[ "$BEHAVIOUR" = ends ] && exit 0
[ "$BEHAVIOUR" = fails ] && exit 7
touch "$LOG/started.0"
exec sleep 60
"""


def wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize("name", JOBS)
def test_job_files_are_bash_and_ask_slurm_for_a_signal_and_a_requeue(name):
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    text = (FOLDER / name).read_text()
    assert "#SBATCH --requeue" in text and "#SBATCH --signal=B:USR1@" in text and len(JOBS) == 3


@pytest.mark.parametrize("name", ["single_node.sbatch", "multi_node.sbatch"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_job_stops_the_run_and_requeues_it(tmp_path, job, name, number):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "REQUEUE").write_text("old")
    process = job(name)
    nodes = 2 if "multi" in name else 1
    for node in range(nodes):
        wait_for(tmp_path / f"started.{node}", process)
    assert not (tmp_path / "out" / "REQUEUE").exists()
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and 'stopped with a checkpoint: {"global_step": 5}' in out
    assert (tmp_path / "scontrol").read_text() == "requeue 777\n"
    commands = sorted((tmp_path / "commands").read_text().splitlines())
    tail = f"train.py --a=b c --output_dir={tmp_path / 'out'} --resume_from_checkpoint=latest"
    if nodes == 1:
        assert commands == [f"0 launch {tail}"]
    else:
        machines = "--num_machines=2 --num_processes=2 --machine_rank={0}"
        place = "--main_process_ip=localhost --main_process_port=20777"
        assert commands == [f"{n} launch --multi_gpu {machines.format(n)} {place} {tail}" for n in range(2)]


def test_an_engine_takes_the_place_of_multi_gpu_which_would_undo_it(tmp_path, job):
    job("multi_node.sbatch", "ends", ENGINE="--config_file docs/fsdp2.yaml").communicate(timeout=60)
    commands = (tmp_path / "commands").read_text().splitlines()
    assert sorted(c.split(" --num_machines")[0] for c in commands) == [
        f"{n} launch --config_file docs/fsdp2.yaml" for n in range(2)
    ]


def test_a_run_that_outlives_its_launcher_is_waited_for(tmp_path, job):
    process = job("single_node.sbatch", "orphans")
    wait_for(tmp_path / "started.0", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "scontrol").read_text() == "requeue 777\n"


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(("behaviour", "code"), [("ends", 0), ("fails", 7)])
def test_a_run_that_ends_or_fails_is_not_requeued(tmp_path, job, name, behaviour, code):
    process = job(name, behaviour, ("work",) if name == "array.sbatch" else ("train.py",))
    process.communicate(timeout=60)
    assert process.returncode == code and not (tmp_path / "scontrol").exists()


def test_a_task_of_an_array_that_runs_out_of_time_comes_back(tmp_path, job):
    process = job("array.sbatch", "waits", ("work", "in", "out"))
    wait_for(tmp_path / "started.0", process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "task 3 of 16 comes back" in out
    assert (tmp_path / "commands").read_text() == "3 of 16: in out\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 700_3\n"
