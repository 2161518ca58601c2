"""What of a training command fits a card, how long it takes, and the command to run: before it waits in a queue.

    python -m common.tools.plan --gpu_memory 24 train_lcm_distill_sd_wds.py --pretrained_teacher_model=MODEL \\
        --train_shards_path_or_url="shards/{00000..00099}.tar" --max_train_steps=1000 --mixed_precision=fp16

Updates of the script are simulated as --dry_run does it, at two batch sizes for each choice of recomputed activations;
memory is a straight line in the batch size between and beyond them. Where not even one sample fits, nothing that
recomputes less is tried. The largest batch that fits, and divides the samples of an update, is what is offered; the
samples of an update stay what the command says. Where nothing fits, direct distillation is tried with
--backward=stepwise, and a LoRA with --quantize_base=nf4 too. The choice that is recommended is simulated at its batch
size. A picture shows memory over its update.
"""

import argparse
import contextlib
import importlib.util
import io
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from common.data import folders
from common.data.cached_latents import read_manifest
from common.data.shards import expand_shards
from common.errors import UserError
from common.flags import ArgumentParser, fraction, positive_float, positive_int
from common.run import screen, simulation, training_run

import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image, ImageDraw
from tqdm import tqdm

GIB = 2**30
# Dense bfloat16 by data sheets, TFLOPS, of RTX 3060, RTX 4080, RTX 4090, A100, L40S, H100, H200, by their GB.
TFLOPS = {12: 51, 16: 97, 24: 165, 40: 312, 48: 362, 80: 989, 141: 989}
RECOMPUTED = ("none", "selective", "full")
TRIED = (2, 4)  # samples; small enough for any data
OFFERED = "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "use_8bit_adam"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#999933", "#882255")


class Choice(NamedTuple):
    """One row of the table: the largest batch that fits, 0 where none does. needed: GiB at that batch, or at the
    smallest that was simulated; flops: of a sample."""

    recomputed: str
    use_8bit_adam: bool
    batch: int
    needed: float
    flops: float
    simulated: int = 1  # samples that `needed` is of where none fits


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--gpu_memory", type=positive_int, default=24, help="of a card, GB")
    add("--processes", type=positive_int, default=1, help="cards that train together")
    add("--fsdp2", action="store_true", help="they split weights, gradients and states: docs/fsdp2.yaml")
    add("--mfu", type=fraction, default=0.35, help="share of the card's peak that a run reaches")
    add("--gpu_tflops", type=positive_float, help=f"its peak in bfloat16; default by --gpu_memory: {TFLOPS}")
    add("--picture", default="plan.png", help="where the picture of memory over the update goes")
    add("script", metavar="SCRIPT", help="a training script, also an edited copy")
    add("flags", metavar="FLAGS", nargs=argparse.REMAINDER, help="as for the script")
    args = parser.parse_args(argv)
    own = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    if misplaced := [word for word in args.flags if word.split("=")[0] in own]:
        parser.error(f"{misplaced[0]} is no flag of {args.script}; put it before the script")
    if not Path(args.script).is_file():
        parser.error(f"{args.script}: there is no such script; put it before its flags")
    if args.mfu == 0:
        parser.error("--mfu=0: a run reaches some share of the peak; give one above 0")
    if args.fsdp2 and args.processes == 1:
        parser.error("--fsdp2 splits over --processes; give more than one")
    if args.gpu_tflops is None:
        args.gpu_tflops = float(TFLOPS[min(TFLOPS, key=lambda size: abs(size - args.gpu_memory))])
    if Path(args.picture).suffix != ".png" or not Path(args.picture).absolute().parent.is_dir():
        parser.error(f"--picture={args.picture}: name a .png file in a folder that exists")
    return args


@training_run.tool_errors
def main(args):
    script = load_script(args.script)
    flags = without(args.flags, "dry_run", "report_to")
    typed = script.parse_args([*flags, "--report_to=none", "--dry_run"])  # which needs no GPU for fp16
    samples = typed.train_batch_size * typed.gradient_accumulation_steps  # of an update, on one process
    if (
        getattr(typed, "vae_encode_batch_size", 1) is None
        and read_manifest(expand_shards(typed.train_shards_path_or_url)) is None
    ):
        flags += ["--vae_encode_batch_size=1"]  # a VAE in float32 can take more than all the rest
    choices, refused = try_choices(args, script, flags, samples)
    print_table(args, choices, refused)
    chosen = recommend(choices, samples)
    for lever in further_levers(args, typed) if chosen is None else ():
        try:
            choices, refused = try_choices(args, script, [*flags, lever], samples)
        except UserError as error:
            print(f"{lever} is refused: {error}", flush=True)
            continue
        flags.append(lever)
        typed = script.parse_args([*flags, "--report_to=none", "--dry_run"])
        chosen = recommend(choices, samples)
        print(f"\nNone fits; with {lever}:")
        print_table(args, choices, refused)
        if chosen is not None:
            break
    if chosen is None:
        least = min(choices, key=lambda choice: choice.needed / choice.simulated)
        ways = " or ".join(filter(None, [", ".join(ways_out(args, typed)), "a larger card"]))
        raise UserError(
            f"--gpu_memory={args.gpu_memory}: nothing of the table fits, {least.needed:.1f} GiB are needed for "
            f"{folders.count(least.simulated, 'sample')}; use {ways}"
        )
    words = [*without(flags, *OFFERED), *offered(chosen, samples)]
    result = simulate(script, words, args.processes, args.fsdp2)
    updates = result.updates if typed.max_train_steps else max(1, round(result.updates / args.processes))
    hours = updates * args.processes * result.flops / (args.mfu * args.gpu_tflops * 1e12) / 3600
    screen.show_simulated(f"Recommended, simulated: {' '.join(offered(chosen, samples))}", result)
    print(
        f"{updates} updates take {hours:.3g} GPU-hours, {hours / args.processes:.3g} hours on "
        f"{folders.count(args.processes, 'card')}, at {args.mfu:.0%} of {args.gpu_tflops:g} TFLOPS"
        + ("" if typed.mixed_precision in ("fp16", "bf16") else ", which is bfloat16's: float32 takes longer")
    )
    draw(result, args.gpu_memory, args.picture)
    together = ["--config_file=docs/fsdp2.yaml"] if args.fsdp2 else ["--multi_gpu"] if args.processes > 1 else []
    launch = ["accelerate", "launch", *together, f"--num_processes={args.processes}", args.script]
    print(
        f"{args.picture} shows memory over the update. The command:\n\n{shlex.join([*launch, *words])}\n", flush=True
    )
    return chosen, result


def further_levers(args, typed):
    """Flags of the script that take less memory and more time, one after the other, beyond the table."""
    levers = ["--backward=stepwise"] if getattr(typed, "backward", None) == "whole" else []
    quantizes = getattr(typed, "quantize_base", "") is None and typed.lora_rank and not args.fsdp2
    return levers + (["--quantize_base=nf4"] if quantizes else [])


def ways_out(args, typed):
    """What a script of these flags can do to take less, beyond the table."""
    ways = ["--backward=stepwise"] if getattr(typed, "backward", None) == "whole" else []
    ways += ["--fsdp2 before the script"] if args.processes > 1 and not args.fsdp2 else []
    ways += [] if getattr(typed, "lora_rank", 0) else ["a LoRA"]
    return ways + (["a lower --resolution"] if hasattr(typed, "resolution") else [])


def load_script(path):
    """The module of a training script."""
    sys.path.insert(0, str(Path(path).absolute().parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "main") or not hasattr(module, "parse_args"):
        raise UserError(f"{path} is no training script, it has no parse_args and main; name one of train_*.py")
    return module


def without(words, *names):
    """A command line without these flags and their values."""
    kept, drops = [], False
    for word in words:
        if word.startswith("--"):
            drops = word[2:].split("=")[0] in names
        if not drops:
            kept.append(word)
    return kept


def offered(choice, samples):
    words = [f"--train_batch_size={choice.batch}", f"--gradient_accumulation_steps={samples // choice.batch}"]
    words += [f"--gradient_checkpointing={choice.recomputed}"] if choice.recomputed != "none" else []
    return words + (["--use_8bit_adam"] if choice.use_8bit_adam else [])


def simulate(script, words, processes, fsdp2=False):
    """The result of a dry run of one update, without a word of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    wishes = {"processes": processes, "fsdp2": fsdp2, "report": False, "updates": 1}
    with simulation.wishing(**wishes), contextlib.redirect_stdout(io.StringIO()):
        return script.main(script.parse_args([*words, "--report_to=none", "--dry_run"]))


def try_choices(args, script, flags, samples):
    """([Choice], {what was refused: why})"""
    flags = without(flags, *OFFERED)
    accumulates = min(2, samples)  # two micro-batches take what more of them do
    choices, refused, saved = [], {}, None
    with tqdm(total=2 * len(RECOMPUTED) + 1, desc="simulated updates") as bar:

        def run(*changes):
            errors = io.StringIO()
            bar.set_postfix_str(" ".join(changes))
            try:
                with contextlib.redirect_stderr(errors):
                    return simulate(script, [*flags, *changes], args.processes, args.fsdp2)
            except SystemExit:
                refused[" ".join(changes[2:])] = errors.getvalue().strip().split("\n")[-1]
                return None
            finally:
                bar.update()

        for which in reversed(RECOMPUTED):
            lever = [] if which == "none" else [f"--gradient_checkpointing={which}"]
            words, more = (
                (f"--train_batch_size={size}", f"--gradient_accumulation_steps={accumulates}") for size in TRIED
            )
            sizes = [run(*words, *lever)]
            if None in sizes:
                continue
            if saved is None:
                eight = run(*words, "--use_8bit_adam")
                saved = {False: 0} | ({} if eight is None else {True: sizes[0].between - eight.between})
            peak = least_peak(sizes[0], max(saved.values()))
            if simulation.needed(peak / TRIED[0]) <= args.gpu_memory * GIB:  # else not even one sample fits
                sizes.append(run(*more, *lever))
            found = [choice_of(args, which, adam, sizes, less, samples) for adam, less in saved.items()]
            choices = found + choices
            if not any(choice.batch for choice in found):
                break  # what recomputes less needs more
    if not choices:
        raise UserError(refused.popitem()[1].split("error: ")[-1])
    return choices, refused


def least_peak(result, less):
    """Bytes, where each update takes `less` of them less."""
    return max(size - less * (moment != simulation.BEFORE) for moment, size in result.moments.items())


def needed_at(sizes, less=0):
    """GiB of a card as a function of the batch size, from results at TRIED; less: bytes that an update saves."""
    small, large = sizes

    def needed(batch):
        peaks = []
        for moment, size in large.moments.items():
            slope = (size - small.moments.get(moment, size)) / (TRIED[1] - TRIED[0])
            saved = 0 if moment == simulation.BEFORE else less
            peaks.append(size + slope * (batch - TRIED[1]) - saved)
        return simulation.needed(max(peaks)) / GIB

    return needed


def choice_of(args, which, use_8bit_adam, sizes, less, samples):
    """The row of the table: of the batch sizes that divide the samples of an update, the largest that fits."""
    flops = sizes[0].flops / sizes[0].samples
    if len(sizes) == 1:
        return Choice(which, use_8bit_adam, 0, simulation.needed(least_peak(sizes[0], less)) / GIB, flops, TRIED[0])
    needed = needed_at(sizes, less)
    fitting = [n for n in range(1, samples + 1) if samples % n == 0 and needed(n) <= args.gpu_memory]
    batch = max(fitting, default=0)
    return Choice(which, use_8bit_adam, batch, needed(batch or 1), flops)


def print_table(args, choices, refused):
    print(f"\nWhat fits {args.gpu_memory} GB, on {folders.count(args.processes, 'process')}:\n")
    rows = [("recomputed", "8-bit Adam", "largest batch", "GiB needed", "GFLOPs a sample")]
    for choice in choices:
        needed = f"{choice.needed:.1f}" if choice.batch else f"{choice.needed:.1f} for {choice.simulated}"
        adam, flops = "yes" if choice.use_8bit_adam else "no", simulation.number(choice.flops / 1e9)
        rows.append((choice.recomputed, adam, str(choice.batch or "none"), needed, flops))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    for what, why in refused.items():
        print(f"\n{what} is refused: {why.split('error: ')[-1]}")
    print(flush=True)


def recommend(choices, samples):
    """The choice with the least work a sample among those with a batch of 4 or more (all samples, if they are fewer),
    else the one with the largest batch; AdamW before its 8-bit form. None where nothing fits."""
    enough = [choice for choice in choices if choice.batch >= min(4, samples)]
    if enough:
        return min(enough, key=lambda choice: (choice.flops, choice.use_8bit_adam))
    fitting = [choice for choice in choices if choice.batch]
    return max(fitting, key=lambda choice: (choice.batch, -choice.flops, not choice.use_8bit_adam), default=None)


def draw(result, gpu_memory, path, width=1200, height=520):
    """A picture of live memory over the operations of an update, coloured by what it is doing, and the card's."""
    left, right, top, bottom = 70, 300, 30, 40
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    most = max(result.peak, gpu_memory * GIB) * 1.05
    columns, rows = width - left - right, height - top - bottom
    names = list(dict.fromkeys(moment for _, moment in result.curve))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}

    def y(size):
        return top + rows - round(rows * size / most)

    for column in range(columns):
        start = column * len(result.curve) // columns
        part = result.curve[start : max(start + 1, (column + 1) * len(result.curve) // columns)]
        size, moment = max(part)
        pen.line([(left + column, top + rows), (left + column, y(size))], fill=colour[moment])
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if most / GIB / step <= 12)
    for number in range(0, int(most / GIB) + 1, step):
        pen.text((20, y(number * GIB) - 6), f"{number} GiB", fill="black")
        pen.line([(left - 5, y(number * GIB)), (left, y(number * GIB))], fill="black")
    pen.line([(left, y(gpu_memory * GIB)), (left + columns, y(gpu_memory * GIB))], fill="black", width=2)
    pen.text((left + 5, y(gpu_memory * GIB) - 14), f"a card of {gpu_memory} GB", fill="black")
    for i, name in enumerate(names):
        pen.rectangle([(width - right + 15, top + 20 * i), (width - right + 27, top + 12 + 20 * i)], fill=colour[name])
        pen.text((width - right + 33, top + 20 * i), f"{name}: {result.moments[name] / GIB:.2f} GiB", fill="black")
    before = result.moments.get(simulation.BEFORE)
    if before:
        pen.line([(left, y(before)), (left + columns, y(before))], fill="#888888")
        text = f"{simulation.BEFORE}: {before / GIB:.2f} GiB, the line"
        pen.text((width - right + 33, top + 20 * len(names)), text, fill="#555555")
    pen.text((left, height - 25), "operations of one update", fill="black")
    image.save(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse_args())
