"""Samples per second, FLOPs, memory and a breakdown of the step: `python tests/benchmarks/throughput.py --shape tiny`.

Runs a training script of this repository as it is, on a teacher of the named shape with random weights and on made
images, in a process of its own, and measures a window of updates after a warm-up. The clock reads the end of an
optimizer's step, so that any script can be measured: `--peer PATH` runs another one, a public script say, alternately
with ours on the same teacher, data and flags, and prints the ratio. What stands after `--` are flags for ours alone.

    python tests/benchmarks/throughput.py --shape tiny --script lcm --cached
    python tests/benchmarks/throughput.py --shape sd15 --batch_size 16 --cached -- --mixed_precision=bf16 --compile
    python tests/benchmarks/throughput.py --shape tiny --peer ../public/train_lcm_distill_sd_wds.py --rounds 3
    python tests/benchmarks/throughput.py --suite gpu --minutes 8 --output_dir bench   # the most telling rows first

FLOPs per sample are the model's (nothing recomputed is counted); MFU is their share of a GPU's dense bfloat16 peak, on
a CPU of what a large matrix product reaches in the same process. Peak memory is the allocator's on a GPU, over the
whole run, and the resident set on a CPU. Every run adds a line of JSON to OUTPUT_DIR/results.jsonl.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import json
import os
import platform
import runpy
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SCRIPTS = {
    "lcm": "train_lcm_distill_sd_wds.py",
    "lcm_lora": "train_lcm_distill_lora_sd_wds.py",
    "tscd": "train_tscd_distill_sd_wds.py",
    "tscd_lora": "train_tscd_distill_lora_sd_wds.py",
    "direct": "train_direct_distill.py",
    "direct_lora": "train_direct_distill.py",
}
MARK = "results.jsonl"  # says that a folder is of this program
BF16, ALWAYS_ADVERSARIAL = ["--mixed_precision=bf16"], ["--stage_segments=1", "--adv_weights=0.1"]
FAST = [*BF16, "--compile", "--channels_last"]
# name: (shape, script, batch size, cached, flags)
SUITES = {
    "gpu": {
        "SD1.5 LCM, images, no lever": ("sd15", "lcm", 16, False, BF16),
        "SD1.5 LCM, cached": ("sd15", "lcm", 16, True, BF16),
        "SD1.5 LCM, cached, compiled": ("sd15", "lcm", 16, True, FAST),
        "SD1.5 LCM, images, 8-bit Adam, selective checkpointing (24 GB card)": (
            *("sd15", "lcm", 12, False),
            [*BF16, "--use_8bit_adam", "--gradient_checkpointing=selective"],
        ),
        "SD1.5 LCM LoRA, images, full checkpointing (12 GB card)": (
            *("sd15", "lcm_lora", 12, False),
            [*BF16, "--use_8bit_adam", "--gradient_checkpointing"],
        ),
        "SD1.5 LCM LoRA, cached, compiled": ("sd15", "lcm_lora", 16, True, FAST),
        "SD1.5 TSCD without a discriminator, cached": (
            *("sd15", "tscd", 16, True),
            [*BF16, "--stage_segments=1", "--adv_weights=0"],
        ),
        "SD1.5 TSCD with its discriminator, cached": ("sd15", "tscd", 16, True, [*BF16, *ALWAYS_ADVERSARIAL]),
        "SDXL LCM LoRA, cached, full checkpointing": (
            *("sdxl", "lcm_lora", 8, True),
            [*BF16, "--gradient_checkpointing"],
        ),
        "SD1.5 LCM, cached, compiled, batch 64": ("sd15", "lcm", 64, True, FAST),
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# The measured process


class Meter:
    """Reads the clock at the end of updates, and how long the named stages of a step took.

    On a GPU stages lie between events on its stream, which nobody waits for until the end; the wait for data is the
    host's.
    """

    def __init__(self, path, batch_size, warmup, steps):
        import torch

        self.torch, self.path, self.batch_size, self.warmup, self.steps = torch, path, batch_size, warmup, steps
        self.cuda = torch.cuda.is_available()
        self.optimizer, self.updates, self.spans = None, 0, defaultdict(list)

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def stage(self, name):
        start = self.now()
        yield
        self.spans[name].append((start, self.now()))

    def wrap(self, owner, attribute, name):
        """Count the calls of owner.attribute to a stage: its name, or a function of the call's arguments."""
        inner = getattr(owner, attribute)

        @functools.wraps(inner)
        def outer(*args, **kwargs):
            with self.stage(name(*args, **kwargs) if callable(name) else name):
                return inner(*args, **kwargs)

        setattr(owner, attribute, outer)

    def unet_stage(self, unet, sample, *args, **kwargs):
        if self.torch.is_grad_enabled() and any(p.requires_grad for p in unet.parameters()):
            return "student forward"
        is_double = len(sample) == 2 * self.batch_size  # with and without the caption
        without_w = unet.config.time_cond_proj_dim is None and not getattr(unet, "peft_config", None)
        return "teacher" if is_double or without_w else "target"

    def install(self):
        """Hooks for what all scripts share, and for what is this repository's alone; before the script is imported."""
        import common.discriminator
        import common.ema

        from diffusers import AutoencoderKL, UNet2DConditionModel
        from torch.optim import optimizer
        from torch.utils.data.dataloader import _BaseDataLoaderIter
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        self.wrap(UNet2DConditionModel, "forward", self.unet_stage)
        self.wrap(AutoencoderKL, "encode", "VAE")
        self.wrap(common.discriminator.Discriminator, "forward", "discriminator forward")
        for encoder in (CLIPTextModel, CLIPTextModelWithProjection):
            self.wrap(encoder, "forward", "text encoder")
        self.wrap(self.torch.Tensor, "backward", "backward")
        self.wrap(common.ema, "ema_update", "EMA")
        next_batch = _BaseDataLoaderIter.__next__

        def timed_next(loader):
            start = time.perf_counter()
            batch = next_batch(loader)
            self.spans["wait for data (host)"].append((start, time.perf_counter()))
            return batch

        _BaseDataLoaderIter.__next__ = timed_next
        optimizer.register_optimizer_step_pre_hook(self.before_step)
        optimizer.register_optimizer_step_post_hook(self.after_step)

    def before_step(self, optimizer, args, kwargs):
        self.step_start = self.now()

    def after_step(self, optimizer, args, kwargs):
        self.spans["optimizer"].append((self.step_start, self.now()))
        self.optimizer = self.optimizer or optimizer  # a discriminator's steps are not updates
        if optimizer is not self.optimizer:
            return
        self.updates += 1
        if self.updates == self.warmup:
            self.synchronize()
            gc.collect(), gc.freeze()  # a walk over all that was imported, 0.4 s, would fall into one run in three
            self.spans.clear()
            self.start = time.perf_counter()
        elif self.updates == self.warmup + self.steps:
            self.synchronize()
            self.finish(time.perf_counter() - self.start)

    def synchronize(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def finish(self, seconds):
        """Write what was measured and leave: nothing is saved."""
        torch = self.torch
        stages = {}
        for name, spans in self.spans.items():
            if isinstance(spans[0][0], float):
                stages[name] = sum(end - start for start, end in spans) / self.steps
            else:
                stages[name] = sum(start.elapsed_time(end) for start, end in spans) / 1000 / self.steps
        measured = {
            "seconds_per_update": seconds / self.steps,
            "stages": stages,
            "device": torch.cuda.get_device_name() if self.cuda else platform.processor() or platform.machine(),
            "peak_flops": peak_flops(torch, self.cuda),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.cuda else resident_peak(),
        }
        Path(self.path).write_text(json.dumps(measured))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


def peak_flops(torch, cuda):
    """FLOPs per second: the data sheet's dense bfloat16 of a known GPU; else of a matrix product measured here."""
    sheets = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "L40S": 362e12}
    name = torch.cuda.get_device_name() if cuda else ""
    if known := next((peak for key, peak in sheets.items() if key in name), None):
        return known
    size = 8192 if cuda else 1024
    a = torch.randn(size, size, dtype=torch.bfloat16 if cuda else torch.float32, device="cuda" if cuda else "cpu")
    times = []
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def resident_peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def child(path, batch_size, warmup, steps, script, *words):
    """Run `script` with `words` as its command line under a Meter, as this process's main program."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    Meter(path, int(batch_size), int(warmup), int(steps)).install()
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    sys.exit("the script ended before it had done the updates that were to be measured")


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of it


def make_inputs(args, shape_name, script, cached):
    """The teacher and the data of a run, made once in OUTPUT_DIR: (teacher's folder, flags that name the data)."""
    from tests.benchmarks import synthetic

    import torch

    shape, folder = synthetic.SHAPES[shape_name], args.output_dir / shape_name
    synthetic.write_teacher(folder / "teacher", shape, "cuda" if torch.cuda.is_available() else "cpu")
    teacher = f"--pretrained_teacher_model={folder / 'teacher'}"
    if script.startswith("direct"):
        (folder / "prompts.txt").write_text("a photograph of something\n")
        words = [f"--prompts={folder / 'prompts.txt'}", f"--output_dir={folder / 'pairs'}", "--num_pairs=64"]
        scheduler = ["--scheduler=DDIMScheduler", '--scheduler_kwargs={"clip_sample": false}']
        run_tool("generate_pairs", teacher, *words, *scheduler, "--num_inference_steps=4", "--guidance_scale=1")
        return folder / "teacher", [f"--pairs_dir={folder / 'pairs'}"]
    number = f"{args.shards}x{args.samples_per_shard}"
    images = synthetic.write_images(args.output_dir / f"images_{number}", args.shards, args.samples_per_shard)
    resolution = args.resolution or shape.resolution
    if cached:
        encoded = folder / f"encoded_{resolution}_{number}"
        run_tool("encode_shards", images, encoded, teacher, f"--resolution={resolution}")
        images = encoded
    return folder / "teacher", [f"--train_shards_path_or_url={images}/{{00000..{args.shards - 1:05d}}}.tar"]


def run_tool(name, *words):
    log = subprocess.run(
        [sys.executable, "-m", f"common.tools.{name}", *map(str, words)], cwd=ROOT, capture_output=True
    )
    if log.returncode:
        raise SystemExit(f"common.tools.{name} failed:\n{log.stderr.decode()[-2000:]}")


def run_once(args, script_path, name, batch_size, words):
    """One process: what its Meter wrote, or None if it failed (the end of its output is printed)."""
    result, log = args.output_dir / "measured.json", args.output_dir / "last_run.log"
    result.unlink(missing_ok=True)
    counts = batch_size, args.warmup, args.steps
    command = [sys.executable, __file__, "--child", result, *counts, script_path, *words]
    left = None if args.deadline is None else args.deadline - time.monotonic()
    options = {"stderr": subprocess.STDOUT, "cwd": ROOT, "timeout": left}
    try:
        with open(log, "wb") as file:
            code = subprocess.run(list(map(str, command)), stdout=file, **options).returncode
    except subprocess.TimeoutExpired:
        code = f"ended after --minutes={args.minutes:g}"
    if code or not result.exists():
        print(f"{name}: failed ({code})\n{log.read_text(errors='replace')[-3000:]}", flush=True)
        return None
    return json.loads(result.read_text())


def script_flags(args, shape_name, script, batch_size, teacher, data):
    """Flags that ours and a public script share."""
    from tests.benchmarks import synthetic

    words = [f"--pretrained_teacher_model={teacher}", *data, f"--train_batch_size={batch_size}", "--seed=0"]
    words += ["--learning_rate=1e-6", "--max_train_steps=1000000", "--checkpointing_steps=1000000"]
    words += [f"--gradient_accumulation_steps={args.gradient_accumulation_steps}"]
    if script == "direct":
        words.append("--lora_rank=0")
    if not script.startswith("direct"):
        words += [f"--resolution={args.resolution or synthetic.SHAPES[shape_name].resolution}"]
        words += [f"--dataloader_num_workers={args.workers}", "--validation_steps=1000000"]
        words += [f"--max_train_samples={args.shards * args.samples_per_shard}"]
    return words


def measure(args, name, shape_name, script, batch_size, cached, extra):
    """Rounds of ours, and of the peer in turn: prints a row for each, and appends lines of JSON."""
    from common.export import versions
    from tests.benchmarks import synthetic

    teacher, data = make_inputs(args, shape_name, script, cached)
    words = script_flags(args, shape_name, script, batch_size, teacher, data)
    resolution = args.resolution or synthetic.SHAPES[shape_name].resolution
    ours = [*words, *extra]
    runs = {name: (ROOT / SCRIPTS[script], ours)}
    if args.peer:
        images = data if not cached else make_inputs(args, shape_name, script, False)[1]
        peers = script_flags(args, shape_name, script, batch_size, teacher, images)
        runs["peer"] = (args.peer, [*peers, *args.peer_flags.split()])
    measured = {key: [] for key in runs}
    for number in range(args.rounds):
        for key, (path, flags) in runs.items():
            out = args.output_dir / "runs" / f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}-{number}"
            result = run_once(args, path, key, batch_size, [*flags, f"--output_dir={out}"])
            if result:
                measured[key].append(result)
    samples = batch_size * args.gradient_accumulation_steps
    for key, results in measured.items():
        if not results:
            continue
        seconds = median(result["seconds_per_update"] for result in results)
        flops = synthetic.step_flops(teacher, script, resolution, cached=cached and key != "peer")
        row = {
            "name": key,
            "shape": shape_name,
            "script": str(runs[key][0].name),
            "resolution": resolution,
            "batch_size": batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "cached": cached and key != "peer",
            "flags": list(extra) if key != "peer" else args.peer_flags.split(),
            "samples_per_second": samples / seconds,
            "gflops_per_sample": flops / 1e9,
            "mfu": flops * samples / seconds / max(result["peak_flops"] for result in results),
            "peak_gib": max(result["peak_bytes"] for result in results) / 2**30,
            "seconds_per_update": [result["seconds_per_update"] for result in results],
            "stages": {
                stage: median(result["stages"].get(stage, 0.0) for result in results) for stage in results[0]["stages"]
            },
            "device": results[0]["device"],
            "versions": versions(),
            "date": f"{datetime.date.today()}",
        }
        report(args, row)
    if args.peer and all(len(results) == args.rounds for results in measured.values()):
        ratios = [
            theirs["seconds_per_update"] / own["seconds_per_update"]
            for own, theirs in zip(measured[name], measured["peer"], strict=True)
        ]
        rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"ours does {median(ratios):.2f} times the peer's samples per second (rounds: {rounds})")
    return all(len(results) == args.rounds for results in measured.values())


def report(args, row):
    """A row of a table, the breakdown of its step, and the line of JSON."""
    print(
        f"| {row['name']} | {row['samples_per_second']:.3g} | {row['gflops_per_sample']:.4g} | {row['mfu']:.1%} | "
        f"{row['peak_gib']:.2f} |",
        flush=True,
    )
    seconds = median(row["seconds_per_update"])
    stages = dict(sorted(row["stages"].items(), key=lambda item: -item[1]))
    on_device = sum(value for stage, value in stages.items() if not stage.endswith("(host)"))
    stages["the rest"] = seconds - on_device
    print("  " + ", ".join(f"{stage} {value / seconds:.1%}" for stage, value in stages.items()), flush=True)
    with open(args.output_dir / MARK, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def parse_args(argv):
    from common import args as cli

    words, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = cli.ArgumentParser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--shape", choices=["tiny", "sd15", "sdxl"], help="default: tiny, or what the suite says")
    add("--script", choices=list(SCRIPTS), help="default: lcm")
    add("--cached", action="store_true", help="train on latents that encode_shards has made")
    add("--suite", choices=list(SUITES), help="measure its rows one after the other; --shape=tiny: a try of them")
    add("--only", nargs="+", type=cli.non_negative_int, help="numbers of the suite's rows, from 0")
    add("--batch_size", type=cli.positive_int, help="default: 8")
    add("--gradient_accumulation_steps", type=cli.positive_int, default=1)
    add("--resolution", type=cli.positive_int, help="default: the shape's")
    add("--warmup", type=cli.positive_int, default=5, help="updates before the measured ones")
    add("--steps", type=cli.positive_int, default=20, help="measured updates")
    add("--rounds", type=cli.positive_int, default=1)
    add("--minutes", type=cli.non_negative_float, help="end then; what has not been measured is said")
    add("--workers", type=cli.non_negative_int, default=1, help="loader processes")
    add("--shards", type=cli.positive_int, default=4)
    add("--samples_per_shard", type=cli.positive_int, default=64)
    add("--peer", type=Path, help="another training script; it always reads images")
    add("--peer_flags", help="flags for the peer alone, in one word")
    add("--output_dir", type=Path, default=ROOT / "runs" / "throughput", help="new, empty, or of an earlier call")
    args = parser.parse_args(words)
    if args.suite:
        given = {
            "--script": args.script,
            "--batch_size": args.batch_size,
            "--cached": args.cached,
            "flags after --": extra,
        }
        if ignored := [name for name, value in given.items() if value]:
            parser.error(f"{ignored[0]}: the rows of --suite say that themselves; drop the one or the other")
        if args.shape not in (None, "tiny"):
            parser.error(f"--shape={args.shape}: the rows of --suite have their own shapes; drop it, or try tiny")
        if (number := max(args.only or [0])) >= len(SUITES[args.suite]):
            parser.error(f"--only={number}: --suite={args.suite} has rows 0 to {len(SUITES[args.suite]) - 1}")
    elif args.only is not None:
        parser.error("--only chooses rows of a suite; pass --suite, or drop it")
    args.script, args.batch_size = args.script or "lcm", args.batch_size or 8
    if args.script.startswith("direct") and (args.cached or args.resolution):
        flag = "--cached" if args.cached else "--resolution"
        parser.error(f"{flag}: --script={args.script} trains from pairs of the teacher's own size; drop it")
    if args.peer and not args.peer.is_file():
        parser.error(f"--peer={args.peer} is no file; name a training script")
    if args.peer_flags and not args.peer:
        parser.error("--peer_flags are for --peer; pass it, or drop them")
    args.output_dir = folder = args.output_dir.resolve()
    if folder.exists() and not folder.is_dir():
        parser.error(f"--output_dir={folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        parser.error(f"--output_dir={folder} holds files of others; name a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()
    except OSError as error:
        parser.error(f"--output_dir={folder} cannot be written to ({error.strerror}); name another folder")
    args.deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    args.peer, args.peer_flags = args.peer and args.peer.resolve(), args.peer_flags or ""
    return args, extra


def main():
    args, extra = parse_args(sys.argv[1:])
    rows = {"ours": (args.shape or "tiny", args.script, args.batch_size, args.cached, extra)}
    if args.suite:
        rows = SUITES[args.suite]
        if args.only is not None:
            rows = {name: row for number, (name, row) in enumerate(rows.items()) if number in args.only}
        if args.shape == "tiny":  # the suite's own dry run: its scripts and flags at a size that any machine can do
            rows = {name: ("tiny", script, 2, cached, flags) for name, (_, script, _, cached, flags) in rows.items()}
    print("| | samples/s | GFLOPs per sample | MFU | peak GiB |\n|---|---|---|---|---|", flush=True)
    done = []
    for name, row in rows.items():
        if args.deadline is not None and time.monotonic() >= args.deadline:
            print(f"{name}: not measured, --minutes={args.minutes:g} are over", flush=True)
            done.append(False)
        else:
            done.append(measure(args, name, *row))
    return 0 if all(done) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    sys.exit(main())
