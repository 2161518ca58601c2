"""Samples per second, FLOPs, memory and a breakdown of the step: `python tests/benchmarks/throughput.py --shape tiny`.

Runs a training script of this repository as it is, on networks of the named shape with random weights and on made
images, in a process of its own, and measures a window of updates after a warm-up. The clock reads the end of an
optimizer's step, so that any script can be measured: `--peer PATH` runs another one, a public script say, alternately
with ours on the same teacher, data and flags, and prints the ratio. What stands after `--` are flags for ours alone.

    python tests/benchmarks/throughput.py --shape tiny --script lcm --cached
    python tests/benchmarks/throughput.py --shape sd15 --batch_size 16 --cached -- --mixed_precision=bf16 --compile
    python tests/benchmarks/throughput.py --shape tiny --peer ../public/train_lcm_distill_sd_wds.py --rounds 3
    python tests/benchmarks/throughput.py --shape ct64 --script ict --batch_size 64 -- --mixed_precision=bf16
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
from typing import NamedTuple

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
    "ict": "train_cm_ct_unconditional.py",
    "ect": "train_cm_ct_unconditional.py",
}
OWN_FLAGS = {  # what makes one script two; ECT begins with one update of its diffusion training, in the warm-up
    "direct": ["--lora_rank=0"],
    "ict": ["--objective=ict", "--pretrain_steps=0"],
    "ect": ["--objective=ect", "--pretrain_steps=1"],
}
MARK = "results.jsonl"  # says that a folder is of this program
STUDENT = "student forward"
BF16, COMPILED, LAYOUT = ["--mixed_precision=bf16"], ["--compile"], ["--channels_last"]
SELECTIVE = ["--gradient_checkpointing=selective"]
FAST, EIGHT_BIT, TSCD = BF16 + COMPILED + LAYOUT, [*BF16, "--use_8bit_adam"], [*BF16, "--stage_segments=1"]


class Row(NamedTuple):
    """What is measured. flags: beside those that this program sets; peer: another script than SCRIPTS[script]."""

    shape: str
    script: str
    batch_size: int
    cached: bool
    flags: list
    peer: Path | None = None


# The most telling first, and the compiled ones, which take minutes, as late as that allows.
SUITES = {
    "gpu": {
        "SD1.5 LCM, images, no lever": Row("sd15", "lcm", 16, False, BF16),
        "SD1.5 LCM, cached": Row("sd15", "lcm", 16, True, BF16),
        "SD1.5 LCM, cached, compiled": Row("sd15", "lcm", 16, True, FAST),
        "SD1.5 LCM, images, 8-bit Adam, selective checkpointing (24 GB card)": Row(
            "sd15", "lcm", 12, False, EIGHT_BIT + SELECTIVE
        ),
        "SD1.5 LCM LoRA, images, full checkpointing (12 GB card)": Row(
            "sd15", "lcm_lora", 12, False, [*EIGHT_BIT, "--gradient_checkpointing"]
        ),
        "iCT, default network at 64 px": Row("ct64", "ict", 64, False, BF16),
        "SD1.5 TSCD without a discriminator, cached": Row("sd15", "tscd", 16, True, [*TSCD, "--adv_weights=0"]),
        "SD1.5 TSCD with its discriminator, cached": Row("sd15", "tscd", 16, True, [*TSCD, "--adv_weights=0.1"]),
        "SDXL LCM LoRA, cached, full checkpointing": Row(
            "sdxl", "lcm_lora", 8, True, [*BF16, "--gradient_checkpointing"]
        ),
        "SD1.5 LCM LoRA, cached, compiled": Row("sd15", "lcm_lora", 16, True, FAST),
        "SD1.5 LCM, cached, compiled, batch 64": Row("sd15", "lcm", 64, True, FAST),
    },
    "ct": {  # of consistency training, for a CPU
        **{
            " ".join(("iCT", *flags)): Row("tiny", "ict", 8, False, flags)
            for flags in ([], LAYOUT, COMPILED, COMPILED + LAYOUT, SELECTIVE, BF16)
        },
        "ECT": Row("tiny", "ect", 8, False, []),
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
            return STUDENT
        is_double = len(sample) == 2 * self.batch_size  # with and without the caption
        without_w = unet.config.time_cond_proj_dim is None and not getattr(unet, "peft_config", None)
        return "teacher" if is_double or without_w else "target"

    def install(self):
        """Hooks for what all scripts share, and for what is this repository's alone; before the script is imported."""
        from common import ema
        from common.tscd import discriminator

        from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
        from torch.optim import optimizer
        from torch.utils.data.dataloader import _BaseDataLoaderIter
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        self.wrap(UNet2DConditionModel, "forward", self.unet_stage)
        self.wrap(UNet2DModel, "forward", lambda *_, **__: STUDENT if self.torch.is_grad_enabled() else "target")
        self.wrap(AutoencoderKL, "encode", "VAE")
        self.wrap(discriminator.Discriminator, "forward", "discriminator forward")
        for encoder in (CLIPTextModel, CLIPTextModelWithProjection):
            self.wrap(encoder, "forward", "text encoder")
        self.wrap(self.torch.Tensor, "backward", "backward")
        self.wrap(ema, "ema_update", "EMA")
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


def resolution_of(args, row):
    from tests.benchmarks import synthetic

    return args.resolution or synthetic.shapes(row.script)[row.shape].resolution


def make_inputs(args, row):
    """What a run reads, made once in OUTPUT_DIR: flags that name the network, first, and the data."""
    from tests.benchmarks import synthetic

    shape, folder = synthetic.shapes(row.script)[row.shape], args.output_dir / row.shape
    resolution, number = resolution_of(args, row), f"{args.shards}x{args.samples_per_shard}"
    if row.script in synthetic.CT_SCRIPTS:
        images = args.output_dir / f"images_{resolution}px_{number}"
        synthetic.write_image_folder(images, args.shards * args.samples_per_shard, resolution)
        network = synthetic.write_unet_config(folder / "unet.json", shape)
        words = [f"--model_config_name_or_path={network}", f"--train_data_dir={images}", "--use_ema"]
        return [*words, f"--cache_dir={args.output_dir / 'cache'}"]
    run_tool(args, folder / "teacher", "tests.benchmarks.synthetic", folder / "teacher", row.shape)
    teacher = f"--pretrained_teacher_model={folder / 'teacher'}"
    if row.script.startswith("direct"):
        (folder / "prompts.txt").write_text("a photograph of something\n")
        words = [f"--prompts={folder / 'prompts.txt'}", f"--output_dir={folder / 'pairs'}", "--num_pairs=64"]
        words += ["--scheduler=DDIMScheduler", '--scheduler_kwargs={"clip_sample": false}']
        words += ["--num_inference_steps=4", "--guidance_scale=1"]
        run_tool(args, folder / "pairs", "common.tools.generate_pairs", teacher, *words)
        return [teacher, f"--pairs_dir={folder / 'pairs'}"]
    images = synthetic.write_images(args.output_dir / f"images_{number}", args.shards, args.samples_per_shard)
    if row.cached:
        encoded = folder / f"encoded_{resolution}_{number}"
        words = [images, encoded, teacher, f"--resolution={resolution}"]
        run_tool(args, encoded, "common.tools.encode_shards", *words)
        images = encoded
    return [teacher, f"--train_shards_path_or_url={images}/{{00000..{args.shards - 1:05d}}}.tar"]


def run_tool(args, output, module, *words):
    """Make the folder `output`, unless an earlier row or call has done so; what is left of the time is its limit."""
    done = output.with_suffix(".done")
    if done.exists() and output.is_dir():
        return
    command = [sys.executable, "-m", module, *map(str, words)]
    log = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds_left(args))
    if log.returncode:
        raise SystemExit(f"{module} failed:\n{log.stderr.decode()[-2000:]}")
    done.touch()


def seconds_left(args):
    return None if args.deadline is None else args.deadline - time.monotonic()


def script_flags(args, row, inputs):
    """The words of a script's command line; ours and a public script share all but OWN_FLAGS."""
    words = [*inputs, f"--train_batch_size={row.batch_size}", "--seed=0", "--learning_rate=1e-6"]
    words += ["--max_train_steps=1000000", "--checkpointing_steps=1000000"]
    words += [f"--gradient_accumulation_steps={args.gradient_accumulation_steps}"]
    if not row.script.startswith("direct"):
        words += [
            f"--resolution={resolution_of(args, row)}",
            f"--max_train_samples={args.shards * args.samples_per_shard}",
        ]
        words += [f"--dataloader_num_workers={args.workers}", "--validation_steps=1000000"]
    return [*words, *([] if row.peer else OWN_FLAGS.get(row.script, [])), *row.flags]


def measure(args, name, row):
    """One process: what its Meter wrote, or None if it failed or its time was over, which is printed."""
    result, log = args.output_dir / "measured.json", args.output_dir / "last_run.log"
    result.unlink(missing_ok=True)
    log.write_text("")
    out = args.output_dir / "runs" / f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    try:
        words = [*script_flags(args, row, make_inputs(args, row)), f"--output_dir={out}"]
        counts = row.batch_size, args.warmup, args.steps
        command = [
            sys.executable,
            __file__,
            "--child",
            result,
            *counts,
            row.peer or ROOT / SCRIPTS[row.script],
            *words,
        ]
        options = {"stderr": subprocess.STDOUT, "cwd": ROOT, "timeout": seconds_left(args)}
        with open(log, "wb") as file:
            code = subprocess.run(list(map(str, command)), stdout=file, **options).returncode
    except subprocess.TimeoutExpired:
        code = f"its share of --minutes={args.minutes:g} is over"
    if code or not result.exists():
        print(f"{name}: failed ({code})\n{log.read_text(errors='replace')[-3000:]}", flush=True)
        return None
    return json.loads(result.read_text())


def report(args, name, row, results):
    """A line of the table, the breakdown of the step, and the line of JSON, from the results of all rounds."""
    from common.results.export import versions
    from tests.benchmarks import synthetic

    network, resolution = make_inputs(args, row)[0].split("=", 1)[1], resolution_of(args, row)
    flops = synthetic.step_flops(network, row.script, resolution, cached=row.cached, **counted_flags(row.flags))
    seconds = median(result["seconds_per_update"] for result in results)
    speed = row.batch_size * args.gradient_accumulation_steps / seconds
    stages = {key: median(result["stages"].get(key, 0.0) for result in results) for key in results[0]["stages"]}
    line = {
        "name": name,
        "shape": row.shape,
        "script": (row.peer or Path(SCRIPTS[row.script])).name,
        "resolution": resolution,
        "batch_size": row.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "cached": row.cached,
        "flags": row.flags,
        "samples_per_second": speed,
        "gflops_per_sample": flops / 1e9,
        "mfu": flops * speed / max(result["peak_flops"] for result in results),
        "peak_gib": max(result["peak_bytes"] for result in results) / 2**30,
        "seconds_per_update": [result["seconds_per_update"] for result in results],
        "stages": stages,
        "device": results[0]["device"],
        "versions": versions(),
        "date": f"{datetime.date.today()}",
    }
    print(f"| {name} | {speed:.3g} | {flops / 1e9:.4g} | {line['mfu']:.1%} | {line['peak_gib']:.2f} |", flush=True)
    shown = dict(sorted(stages.items(), key=lambda item: -item[1]))
    shown["the rest"] = seconds - sum(value for stage, value in stages.items() if not stage.endswith("(host)"))
    print("  " + ", ".join(f"{stage} {value / seconds:.1%}" for stage, value in shown.items()), flush=True)
    with open(args.output_dir / MARK, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def report_ratios(rows, measured):
    """Every row against the first one of the same script, shape and batch, by rounds."""
    keys = {name: (SCRIPTS[row.script], row.shape, row.batch_size) for name, row in rows.items()}
    for name in rows:
        first = next(other for other in rows if keys[other] == keys[name])
        if first != name:
            pairs = zip(measured[first], measured[name], strict=True)
            ratios = [theirs["seconds_per_update"] / own["seconds_per_update"] for theirs, own in pairs]
            rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{name}: {median(ratios):.2f} times the samples per second of {first} (rounds: {rounds})")


def counted_flags(words):
    """What flags after `--` change in the FLOPs of a step, as `step_flops` calls it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--lora_rank", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, default=4, dest="steps")
    return vars(parser.parse_known_args(words)[0])


def parse_args(argv):
    from common.flags import ArgumentParser, non_negative_float, non_negative_int, positive_int
    from tests.benchmarks import synthetic

    words, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = ArgumentParser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--shape", help="tiny (default), sd15, sdxl; with --script=ict or ect tiny, ct32, ct64; or what the suite says"
    )
    add("--script", choices=list(SCRIPTS), help="default: lcm")
    add("--cached", action="store_true", help="train on latents that encode_shards has made")
    add("--suite", choices=list(SUITES), help="measure its rows one after the other; --shape=tiny: a try of them")
    add("--only", nargs="+", type=non_negative_int, help="numbers of the suite's rows, from 0")
    add("--batch_size", type=positive_int, help="default: 8")
    add("--gradient_accumulation_steps", type=positive_int, default=1)
    add("--resolution", type=positive_int, help="default: the shape's")
    add("--warmup", type=positive_int, default=5, help="updates before the measured ones")
    add("--steps", type=positive_int, default=20, help="measured updates")
    add("--rounds", type=positive_int, default=1, help="each measures all rows, or ours and the peer, in turn")
    add("--minutes", type=non_negative_float, help="end then; what has not been measured is said")
    add("--workers", type=non_negative_int, default=1, help="loader processes")
    add("--shards", type=positive_int, default=4)
    add("--samples_per_shard", type=positive_int, default=64)
    add("--peer", type=Path, help="another training script; it always reads images")
    add("--peer_flags", help="flags for the peer alone, in one word")
    add("--output_dir", type=Path, default=ROOT / "runs" / "throughput", help="new, empty, or of an earlier call")
    args = parser.parse_args(words)
    if args.suite:
        given = {
            "--script": args.script,
            "--batch_size": args.batch_size,
            "--cached": args.cached,
            "--peer": args.peer,
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
    if (args.shape or "tiny") not in (names := synthetic.shapes(args.script)):
        parser.error(f"--shape={args.shape}: --script={args.script} has the shapes {', '.join(names)}; name one")
    if args.script in synthetic.CT_SCRIPTS and args.cached:
        parser.error(f"--cached: --script={args.script} trains on images themselves, without a VAE; drop it")
    decided = ["--train_batch_size", "--resolution", "--gradient_accumulation_steps"]
    decided += [word.split("=")[0] for word in OWN_FLAGS.get(args.script, [])]
    if twice := [word for word in extra if word.split("=")[0] in decided]:
        parser.error(f"{twice[0]} after --: this program sets it itself, by --script and its own flags; drop it")
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
    args.deadline = None
    args.peer, args.peer_flags = args.peer and args.peer.resolve(), args.peer_flags or ""
    return args, extra


def main():
    args, extra = parse_args(sys.argv[1:])
    ours = Row(args.shape or "tiny", args.script, args.batch_size, args.cached, extra)
    rows = {"peer": ours._replace(cached=False, flags=args.peer_flags.split(), peer=args.peer)} if args.peer else {}
    rows["ours"] = ours
    if args.suite:
        rows = SUITES[args.suite]
        if args.only is not None:
            rows = {name: row for number, (name, row) in enumerate(rows.items()) if number in args.only}
        if args.shape == "tiny":  # the suite's own dry run: its scripts and flags at a size that any machine can do
            rows = {name: row._replace(shape="tiny", batch_size=2) for name, row in rows.items()}
    print("| | samples/s | GFLOPs per sample | MFU | peak GiB |\n|---|---|---|---|---|", flush=True)
    measured, turns = {name: [] for name in rows}, list(rows.items()) * args.rounds
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    for number, (name, row) in enumerate(turns, 1):
        now, result = time.monotonic(), None
        if end is not None and now >= end:
            print(f"{name}: not measured, --minutes={args.minutes:g} are over", flush=True)
        else:  # at most half of what is left: a row that compiles for too long costs no other row
            args.deadline = end if end is None or number == len(turns) else now + (end - now) / 2
            result = measure(args, name, row)
        measured[name].append(result)
        if number > len(turns) - len(rows) and (results := [result for result in measured[name] if result]):
            report(args, name, row, results)
    complete = {name: row for name, row in rows.items() if all(measured[name])}
    report_ratios(complete, measured)
    return 0 if len(complete) == len(rows) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    sys.exit(main())
