"""What a run says: at its start, at each log entry, and at its end. Only the main process prints.

The start says what costs nothing to know: what is held without activations, and what a checkpoint takes. Activations
and FLOPs are simulated by `dry_run` alone, whose minute may not delay each start. A run measures the memory of its
first update and its speed, and says both.
"""

import ast
import datetime
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path

from common.ema import part
from common.flags import ArgumentParser, spelled
from common.networks import lora
from common.run import engine, simulation
from common.run.simulation import as_size

import diffusers
import torch
import transformers
from tqdm import tqdm

WIDTH = 119
ENTRIES = 100  # lines of a whole run in a log file, and one more after each SILENCE seconds
SILENCE = 600
MEASURED_WITH = {"num_inference_steps", "guidance_scale", "eta", "height", "width"}  # what `evaluate` can pass on
LAST = {"update", "machine", "run", "logging and validation", "evaluation", "hub"}  # groups after the method's own
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def quiet_libraries():
    """Leave out bars and warnings of diffusers and transformers, among which one's own lines would not be found."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def echo(title, values):
    """Print a block of `name: value` lines, aligned."""
    width = max(map(len, values))
    print("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in values.items())]), flush=True)


def say(text):
    """Print a line without tearing the progress bar apart. Of the main process."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def show_flags(flags, verbose):
    """Print the flags that were typed, a line for each group of the parser, and those that the run has filled in.

    flags: {name: value} of the run. verbose: all of them, one a line.
    """
    rows, filled_in, parser = {}, [], ArgumentParser.latest
    for title, actions in sorted(parser.groups(), key=lambda group: group[0] in LAST):
        known = [action for action in actions if action.dest in flags]
        if verbose and known:
            echo(title, {action.dest: flags[action.dest] for action in known})
            continue
        rows[title] = [_word(action, flags[action.dest]) for action in known if action.dest in parser.typed]
        others = [action for action in known if action.dest not in parser.typed]
        changed = [a for a in others if flags[a.dest] not in (a.default, [a.default], None, {})]
        filled_in += [_word(action, flags[action.dest]) for action in changed]
    if not verbose:
        _rows(rows | {"not given, so": filled_in})


def show_changes(flags, saved):
    """Print what a resumed run does otherwise than the one before. saved: its flags, of a checkpoint."""
    names = [name for name in saved if name in flags and name not in ("resume_from_checkpoint", "local_rank")]
    _rows({"changed": [f"--{n}: {saved[n]} -> {flags[n]}" for n in names if saved[n] != flags[n]]})


def _word(action, value):
    if isinstance(value, bool):
        return action.option_strings[0 if value else -1]
    values = value if isinstance(value, list) else [value]
    values = [f"{v:g}" if isinstance(v, float) else v for v in values]
    text = ",".join(map(str, values)) if len(values) < 5 else f"{values[0]},... ({len(values)})"
    return f"{action.option_strings[0]}={shlex.quote(text)}"


def _rows(rows):
    """Print {title: words} as wrapped paragraphs, those that have words."""
    rows = {title: words for title, words in rows.items() if words}
    width = max(map(len, rows), default=0) + 2
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * width}
    for title, words in rows.items():
        print(textwrap.fill(f"{title:<{width}}{'  '.join(words)}", WIDTH, **options), flush=True)


def show_plan(args, accelerator, networks, modules, optimizers, start):
    """Print what a run takes, as far as it is known before the first update after `start` ones.

    networks: {name: module} of all that the loss depends on; modules: those that a checkpoint has besides what
    accelerate prepared; optimizers: all of them.
    """
    found, folder = (*networks.values(), *modules.values()), Path(args.output_dir)
    tensors = {id(t): t for module in found for t in (*module.parameters(), *module.buffers())}.values()
    weights = [tensor for tensor in tensors if isinstance(tensor, torch.nn.Parameter)]
    trained = [weight for each in optimizers for group in each.param_groups for weight in group["params"]]
    trains, total = (f"{sum(weight.numel() for weight in group) / 1e6:.4g} M" for group in (trained, weights))
    held = {
        "weights": sum(part(each).nbytes for each in tensors if each.device.type == accelerator.device.type),
        "gradients": sum(part(each).nbytes for each in trained),
        "optimizer": sum(engine.state_bytes(optimizer, part) for optimizer in optimizers),
    }
    parts = ", ".join(f"{name} {as_size(number)}" for name, number in held.items())
    memory, card = as_size(sum(held.values())), _memory_of(accelerator.device)
    prepared = [weight for model in accelerator._models for weight in model.parameters()]
    if getattr(args, "lora_rank", 0):  # the base is the teacher's
        prepared = [weight for weight in prepared if weight.requires_grad]
    besides = [weight for module in modules.values() for weight in module.parameters()]
    written = sum(weight.nbytes for weight in prepared + besides) + sum(
        engine.state_bytes(optimizer) for optimizer in optimizers
    )
    number = max(1, args.max_train_steps // args.checkpointing_steps)
    kept, free = min(number, args.checkpoints_total_limit or number), shutil.disk_usage(folder).free
    lines = {
        "trained": f"{trains} of {total} weights",
        "memory": f"{memory}{card and f' of {as_size(card)}' or ''} before activations: {parts}",
        "disk": f"{as_size(written)} a checkpoint, {kept} kept; {as_size(free)} are free",
    }
    second = (start // args.logging_steps + 2) * args.logging_steps  # log entry, at which `Progress` says it
    lines |= {"time": f"measured until update {second}"} if second < args.max_train_steps else {}
    echo(spelled("The plan of each process; `dry_run` simulates activations and FLOPs"), lines)
    there = len(list(folder.glob("checkpoint-*")))
    if free < (kept + 1 - there) * written:  # the oldest goes once the newest is there
        print(spelled("WARNING: the checkpoints do not fit; pass `checkpoints_total_limit`"), flush=True)


def show_simulated(title, result):
    """Print a `simulation.Result`: what to decide by, then what the peak is made of, and the moments of an update."""
    for heading, values in simulated(title, result).items():
        if values:
            echo(heading, values)


def simulated(title, result):
    """{heading: {name: text}} of a `simulation.Result`."""
    allowance = f"{simulation.FRAGMENTATION:.0%} for fragmentation and {as_size(simulation.CONTEXT)} for CUDA"
    largest = f"none of {', '.join(map(str, simulation.CARDS))} GB"
    card = f"{result.card} GB is the smallest that holds" if result.card else f"{largest} holds"
    flops, sample = (simulation.number(n) for n in (result.flops / 1e12, result.flops / result.samples / 1e9))
    return {
        title: {
            "card": f"{card} {as_size(result.needed)}: the peak, and by rule {allowance}",
            "peak": f"{as_size(result.peak)}, in: {result.moment}; between updates: {as_size(result.between)}",
            "FLOPs": f"{flops} T an update, {sample} G a sample",
            "trained": f"{result.trained / 1e6:.4g} M of {(result.trained + result.frozen) / 1e6:.4g} M weights",
        },
        "The peak is the sum of": {name: f"{as_size(size):>10}" for name, size in result.parts.items()},
        "The peak of each moment": {
            name: f"{as_size(size):>10}" for name, size in result.moments.items() if " the " not in name
        },
        "Waits": {
            f"{'' if line.endswith(')') and ' (in ' in line else 'WARNING: '}{times} times an update": (
                f"the update waits for the device in line {line}"
            )
            for line, times in result.waits.items()
        },
    }


def _memory_of(device):
    """Bytes that a GPU has; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def say_memory(device):
    """Print the most memory that torch has held so far on the GPU `device`, and what there is; nothing on a CPU."""
    if there := _memory_of(device):
        say(f"memory of the first update: {as_size(torch.cuda.max_memory_reserved(device))} of {as_size(there)}")


def warmup_warning(args):
    """A sentence where the learning rate warms up for half of the run or more, as by the default in a short one."""
    steps, updates = args.lr_warmup_steps, args.max_train_steps
    if args.lr_scheduler == "constant" or 2 * steps < updates or not steps:
        return None
    reached = f"it never reaches `learning_rate`, but {updates / steps:.0%} of it" if steps >= updates else ""
    return spelled(
        f"WARNING: `lr_warmup_steps`={steps} is {steps / updates:.0%} of the run's {updates} updates, in which the "
        f"learning rate rises{reached and ': '}{reached}; pass less, such as `lr_warmup_steps`={updates // 10}"
    )


RESOLUTION = {"bf16": 2**-8, "fp16": 2**-11}  # relative, of the outputs that half precision keeps
SHOWS_AFTER = 100  # updates, at least, until what a LoRA has learnt is above it


def resolution_warning(args):
    """A sentence where an update of a LoRA is far below what half precision resolves in the outputs that it changes.

    By Adam, B moves by the learning rate at each place, and so an output of B A x by about alpha / rank sqrt(rank)
    times that, in units of the layer's own outputs, with A as PEFT draws it.
    """
    rank, resolution = getattr(args, "lora_rank", 0), RESOLUTION.get(args.mixed_precision)
    if not rank or not resolution or args.scale_lr:
        return None
    move = args.learning_rate * args.lora_alpha / rank**0.5
    if not 0 < move * SHOWS_AFTER < resolution:
        return None
    return spelled(
        f"WARNING: `learning_rate`={args.learning_rate:g} moves the outputs of a LoRA of rank {rank} by about "
        f"{move:.0e} of their size in an update, and {args.mixed_precision} rounds them to {resolution:.0e}: hundreds "
        "of updates pass until it shows; pass more, such as `learning_rate`=1e-4, or `mixed_precision`=no"
    )


class Progress:
    """The updates of a run: a bar on a terminal. Elsewhere, as in a job's log, a line at some of the log entries."""

    def __init__(self, start, total, is_shown):
        self.start = self.step = self.printed = start
        self.total, self.is_shown, self.values, self.entry = total, is_shown, {}, None
        self.started = self.time = time.monotonic()
        is_bar = is_shown and _is_terminal(sys.stderr)
        self.bar = tqdm(total=total, initial=start, desc="steps", disable=not is_bar, bar_format=BAR, smoothing=0.02)

    def update(self):
        self.step += 1
        self.bar.update()

    def show(self, values):
        """After an update: loss, speed, and what was skipped, of a log entry {name: number}."""
        self.values = values
        words = [f"loss {values['loss']:.4g}"] if "loss" in values else []
        words.append(f"{values['samples_per_second']:.3g} samples/s")
        for name in ("samples_skipped", "updates_skipped"):
            words += [f"{values[name]} {name.replace('_', ' ')}"] if values.get(name) else []
        if not self.bar.disable:
            self.bar.set_postfix_str(", ".join(words))
        elif self.is_shown:
            self._line(words)
        self._say_time()

    def _say_time(self):
        """Once, at the second entry: how long the run takes. The host waits for the device at each entry."""
        if self.is_shown and self.entry and self.total > self.step:
            (step, then), self.entry = self.entry, ()
            each = (time.monotonic() - then) / (self.step - step)
            left = (self.total - self.step) * each
            ends = datetime.datetime.now() + datetime.timedelta(seconds=left)
            words = f"time: {each:.3g} s an update, {_duration(left)} for those to come, until {ends:%a %H:%M}"
            if left >= 60:
                say(f"{words}; samples, measurements and checkpoints come on top")
        elif self.entry is None:
            self.entry = self.step, time.monotonic()

    def _line(self, words):
        is_due = (self.step - self.printed) * ENTRIES >= self.total or time.monotonic() - self.time >= SILENCE
        if is_due or self.step == self.total:
            self.printed, self.time = self.step, time.monotonic()
            left = (self.total - self.step) * (self.time - self.started) / max(1, self.step - self.start)
            words = [f"step {self.step} of {self.total}", *words, *([f"{_duration(left)} left"] if left else [])]
            print(", ".join(words), file=sys.stderr, flush=True)

    def finish(self, args, quality=None):
        """Say where the result is, how to use it and how good it is. quality: in words, where the script knows it."""
        self.bar.close()
        took, loss = _duration(time.monotonic() - self.started), self.values.get("loss")
        done = f"{self.step - self.start} updates" + (f" ({self.step} in all)" if self.start else "") + f" in {took}"
        done += f", loss {loss:.4g}" if loss is not None else ""
        if "samples_read" in self.values:
            done += "; samples: {samples_read} read, {samples_skipped} skipped".format_map(self.values)
            done += " (skipped_samples.jsonl)" if self.values["samples_skipped"] else ""
        if skipped := self.values.get("updates_skipped"):
            done += f"; {skipped} updates skipped (nonfinite_updates.jsonl)"
        lines = {"done": done, "result": f"{args.output_dir}: README.md says how to use it, sample_grid.png shows it"}
        if quality:
            lines["quality"] = spelled(quality)
        if code := card_code(args.output_dir):
            lines |= {"sample": sample_command(code), "measure": evaluate_command(args, code)}
        print("\n".join(f"{name:<8} {line}" for name, line in lines.items() if line), flush=True)


def _is_terminal(file):
    """Whether a bar would be seen: a terminal without a size, as of some containers, shows none."""
    try:
        return min(os.get_terminal_size(file.fileno())) > 0
    except OSError:
        return False


def _duration(seconds):
    return str(datetime.timedelta(seconds=round(seconds)))


def card_code(output_dir):
    """The Python of a result's card that makes images with it, or None."""
    card = Path(output_dir, "README.md")
    found = re.search(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.S) if card.is_file() else None
    return found and found[1]


def sample_command(code):
    """A line for a shell that runs a card's code, here where there may be no GPU, and saves the image."""
    if not torch.cuda.is_available():
        code = re.sub(r'^pipe\.to\("cuda"\)\n|\.to\("cuda"\)|, dtype=torch\.\w+', "", code, flags=re.M)
    name = ast.parse(code).body[-1].targets[0].id
    first = name if name == "image" else f"{name}[0]"
    lines = [line for line in code.splitlines() if line] + [f'{first}.save("sample.png")']
    return f"python -c {shlex.quote('; '.join(lines))}"


def evaluate_command(args, code):
    """What measures the result, called as in a card's code: against training images, or else by its prompts alone;
    None where `evaluate` cannot call it so."""
    call = next(node for node in ast.walk(ast.parse(code).body[-1]) if getattr(node, "keywords", None))
    called = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    if not MEASURED_WITH >= called.keys():
        return None
    given = {"pretrained_model": args.output_dir}
    if not Path(args.output_dir, "model_index.json").is_file():
        if not Path(args.output_dir, lora.WEIGHTS).is_file():
            return None
        given = {"pretrained_model": args.pretrained_teacher_model, "lora": args.output_dir}
    given |= called | {"prompts": "@prompts.txt"}
    if shards := getattr(args, "train_shards_path_or_url", None):
        given |= {"feature_network": "facebook/dinov2-large", "reference": shards}
    else:
        given["clip_model"] = "openai/clip-vit-large-patch14"
    given |= {"output_dir": f"{os.path.normpath(args.output_dir)}_measured"}
    words = [f"--{name}={value}" for name, value in given.items()]
    return f"python -m common.tools.evaluate {shlex.join(words)}  # prompts.txt: one a line"
