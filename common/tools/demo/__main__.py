"""The demo: distil a small Stable Diffusion of handwritten digits on a CPU, and measure teacher and student.

    python -m common.tools.demo --method lcm

builds, once, a teacher, a classifier and WebDataset shards (see `digits.py`), and pairs of the teacher for direct
distillation; launches the method's training script as anybody would; measures the teacher at 50, 8, 4, 2 and 1 steps
and the student at 4, 2 and 1, direct ones at the steps they were trained for; writes `demo/report.md` and
`demo/report.png`. Whatever is complete is reused by the next run.

There are two judges. The prompts of the teacher "parity" say "even" or "odd" and leave five digits open: its single
step is a smear, and blur and lost digits show. Those of all other teachers name the digit, which is easy. Left out:
several seeds; the numbers of one run say that a method works, not by how much it beats another.
"""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import flags as flags_module
from common import lock
from common.errors import UserError
from common.flags import ArgumentParser
from common.results import samples
from common.run import training_run
from common.tools.demo import consistency, digits, dit, stable_diffusion
from common.tools.demo.measuring import (
    TEACHER_STEPS,
    TEACHERS,
    Judge,
    beside,
    build_once,
    label,
    launch,
    launch_words,
    measure_once,
    measure_student,
    measure_teacher,
    to_tensor,
)

import numpy as np
import torch
from PIL import Image

FORMAT = 2  # of what the folder holds: another one's measurements cannot be read
# One entry per method: its script, its flags beyond the folders, its student's guidance_scale (1: the teacher's is
# distilled into it; None: the teacher's), and how far the w of training may be from the teacher's (None: it has no w).
METHODS = {
    "lcm": {
        "script": "train_lcm_distill_sd_wds.py",
        "guidance_scale": None,
        "w_range": 0.5,
        "flags": {
            "resolution": digits.RESOLUTION,
            "train_batch_size": 32,
            "max_train_steps": 800,
            "learning_rate": 1e-4,
            "adam_weight_decay": 0.0,
            "loss_type": "huber",
            "ema_decay": 0.95,
            "validation_steps": 400,
        },
    },
    "lcm_lora": {
        "script": "train_lcm_distill_lora_sd_wds.py",
        "guidance_scale": 1.0,
        "w_range": 0.0,
        "flags": {
            "resolution": digits.RESOLUTION,
            "train_batch_size": 32,
            "max_train_steps": 800,
            "lora_rank": 16,
            "lora_alpha": 16,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 20,
            "adam_weight_decay": 0.0,
            "loss_type": "huber",
            "validation_steps": 400,
        },
    },
    "tscd": {
        "script": "train_tscd_distill_sd_wds.py",
        "guidance_scale": 1.0,
        "w_range": 0.0,
        "flags": {
            "resolution": digits.RESOLUTION,
            "train_batch_size": 32,
            "stage_steps": 400,
            "learning_rate": 8e-4,
            "lr_scheduler": "linear",
            "lr_warmup_steps": 20,
            "adam_weight_decay": 0.0,
            "loss_type": "huber",
            "ema_decay": 0.8,
            "adv_learning_rate": 1e-4,
            "adv_head_learning_rate": 1e-3,
            "validation_steps": 0,
        },
    },
    "tscd_lora": {
        "script": "train_tscd_distill_lora_sd_wds.py",
        "guidance_scale": 1.0,
        "w_range": 0.0,
        "flags": {
            "resolution": digits.RESOLUTION,
            "train_batch_size": 32,
            "stage_steps": 400,
            "lora_rank": 16,
            "lora_alpha": 16,
            "learning_rate": 2e-3,
            "lr_scheduler": "linear",
            "lr_warmup_steps": 20,
            "adam_weight_decay": 0.0,
            "loss_type": "huber",
            "adv_learning_rate": 1e-4,
            "adv_head_learning_rate": 1e-3,
            "validation_steps": 0,
        },
    },
}
# {folder: flags of generate_pairs}. One step takes more pairs. The teacher's 8 steps are as good as its 50.
PAIRS = {
    "pairs": {"num_pairs": 2048, "num_inference_steps": 50, "batch_size": 64},
    "pairs_many": {"num_pairs": 8192, "num_inference_steps": 8, "batch_size": 64},
    "pairs_some": {"num_pairs": 4096, "num_inference_steps": 8, "batch_size": 64},
}
DIRECT = {
    "script": "train_direct_distill.py",
    "guidance_scale": 1.0,
    "w_range": None,
    "steps": (4,),
    "pairs": "pairs",
    "flags": {
        "num_inference_steps": 4,
        "lora_rank": 0,
        "train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 400,
        "learning_rate": 5e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "adam_weight_decay": 0.0,
        "validation_steps": 200,
    },
}
METHODS |= {
    "direct": DIRECT,
    "direct_8": DIRECT
    | {"steps": (8,), "flags": DIRECT["flags"] | {"num_inference_steps": 8, "max_train_steps": 200}},
    "direct_1": DIRECT
    | {
        "steps": (1,),
        "pairs": "pairs_many",
        "flags": DIRECT["flags"] | {"num_inference_steps": 1, "max_train_steps": 3000, "learning_rate": 1e-3},
    },
    "direct_lora": DIRECT | {"flags": DIRECT["flags"] | {"lora_rank": 16, "learning_rate": 2e-3}},
}
# Score distillation goes on from a regression that was stopped early; what both cost: docs/measured.md.
METHODS["score_start"] = METHODS["direct_1"] | {"pairs": "pairs_some"}
METHODS["score_start"]["flags"] = METHODS["direct_1"]["flags"] | {"max_train_steps": 1200}
SCORE = {"learning_rate": 1e-4, "adam_beta1": 0.0, "adam_beta2": 0.99, "ema_decay": 0.98, "regression_weight": 0.1}
SCORE |= {"score_weight": 1.0, "score_levels": 8, "fake_updates": 3, "fake_warmup": 100}
SCORE |= {"fake_lora_rank": 0, "fake_learning_rate": 4e-4, "adv_weight": 0.2}
METHODS["score_4_start"] = DIRECT | {"pairs": "pairs_some", "flags": DIRECT["flags"] | {"max_train_steps": 300}}
SCORE_4 = {"regression_weight": 0.2, "max_train_steps": 185}
METHODS |= {
    "score": METHODS["score_start"]
    | {"start": "score_start", "flags": METHODS["score_start"]["flags"] | SCORE | {"max_train_steps": 320}},
    "score_4": METHODS["score_4_start"] | {"start": "score_4_start", "flags": DIRECT["flags"] | SCORE | SCORE_4},
}


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output_dir", type=flags_module.path, default="demo", help="everything that is built and measured")
    add("--method", choices=[*METHODS, "ct"], default="lcm", help="which training script to run; ct needs no teacher")
    add("--teacher", choices=list(TEACHERS), default="parity", help="parity is the hard judge's; sd names the digit")
    add("--teacher_only", action="store_true", help="build teacher, classifier and shards, measure the teacher, stop")
    add("--rebuild", action="store_true", help="first remove what earlier runs left in --output_dir")
    add("--seed", type=flags_module.seed, default=0)
    args = parser.parse_args(argv)
    if args.method == "ct":
        parser.refuse_idle(["teacher", "teacher_only"], "--method=ct has no teacher; drop it")
    if args.teacher_only:
        parser.refuse_idle(["method"], "--teacher_only trains no student; drop one of them")
    if args.teacher == "dit" and not args.teacher_only and METHODS[args.method]["script"] != DIRECT["script"]:
        parser.error(f"--teacher=dit has no U-Net and --method={args.method} needs one; use one of the direct methods")
    return args


@training_run.tool_errors
def main(args):
    # 1. One thread unless the user says more: with any second busy process, several would wait for each other.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

    # 2. What earlier runs left.
    output_dir, teacher = Path(args.output_dir), TEACHERS[args.teacher]
    lock.take(output_dir)
    open_output_dir(output_dir, args.seed, args.rebuild)
    started = time.perf_counter()
    print(f"Parts that are complete are kept in {output_dir}: started again, the same command goes on.", flush=True)
    if args.method == "ct":
        consistency.run(output_dir, args.seed)
        print(f"finished in {time.perf_counter() - started:.0f} s", flush=True)
        return

    # 3. Data, classifier, teacher.
    shards_dir, teacher_dir = output_dir / teacher.shards, output_dir / teacher.folder
    build_once(shards_dir, lambda folder: digits.write_shards(folder, args.seed, teacher.captions))
    classifier = output_dir / "classifier"
    with beside(build_once, classifier, functools.partial(stable_diffusion.build_classifier, seed=args.seed)):
        build_once(teacher_dir, lambda folder: teacher.build(folder, args.seed))
    prompts = digits.canonical_prompts(len(teacher.captions.words), teacher.captions)
    (output_dir / f"{teacher.shards.replace('shards', 'prompts')}.txt").write_text("\n".join(prompts) + "\n")
    judge = Judge(classifier)

    # 4. The teacher, measured once, while the student is trained.
    measured = functools.partial(measure_teacher, judge, teacher_dir, TEACHER_STEPS, args.seed, teacher)
    with beside(measure_once, output_dir / f"{teacher.folder}_metrics", measured):
        if not args.teacher_only:
            student_dir = train_student(args, teacher, teacher_dir, shards_dir, output_dir)

    # 5. The student, and the report.
    if not args.teacher_only:
        measured = functools.partial(
            measure_student, judge, student_dir, teacher_dir, METHODS[args.method], args.seed, teacher
        )
        measure_once(student_dir / "metrics", measured)
    write_report(output_dir)
    print(f"finished in {time.perf_counter() - started:.0f} s", flush=True)


def train_student(args, teacher, teacher_dir, shards_dir, output_dir):
    """Trains what is not there: pairs, the student that the method begins with, its own. Returns its folder."""
    recipe, start = METHODS[args.method], None
    for method in filter(None, (recipe.get("start"), args.method)):
        student_dir = output_dir / teacher.folder.replace("teacher", method)
        if (student_dir / "README.md").exists():  # the card, which the scripts write last
            print(f"{student_dir} is complete and reused; --rebuild starts over", flush=True)
        else:
            data_dir = shards_dir / "train"
            if recipe["script"] == DIRECT["script"]:
                data_dir = generate_pairs(METHODS[method], teacher, teacher_dir, data_dir, output_dir, args.seed)
            train(METHODS[method], teacher, teacher_dir, data_dir, student_dir, args.seed, start)
        start = student_dir
    return student_dir


def open_output_dir(output_dir, seed, rebuild):
    """Create the folder, or check that it is a demo's; with `rebuild`, remove what demos write there."""
    stamp = output_dir / "demo.json"
    if lock.contents(output_dir) and not stamp.exists():
        raise UserError(f"--output_dir={output_dir} holds other files and no demo; name an empty or new folder")
    if rebuild and stamp.exists():
        for name in built_names():
            shutil.rmtree(output_dir / name, ignore_errors=True)
            for suffix in (".json", ".npy"):
                (output_dir / f"{name}_metrics").with_suffix(suffix).unlink(missing_ok=True)
    elif stamp.exists():
        try:
            built = json.loads(stamp.read_text())
            built_seed, is_ours = built["seed"], built.get("format") == FORMAT
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{stamp} cannot be read; add --rebuild, or another --output_dir") from None
        if not is_ours:
            raise UserError(f"{output_dir} is of another version of the demo; add --rebuild, or another --output_dir")
        if built_seed != seed:
            raise UserError(f"{output_dir} was built with --seed={built_seed}; add --rebuild, or another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps({"seed": seed, "format": FORMAT}) + "\n")


def built_names():
    teachers = [teacher.folder for teacher in TEACHERS.values()]
    return [
        *{teacher.shards for teacher in TEACHERS.values()},
        "classifier",
        *consistency.built_names(),
        *teachers,
        *(t.replace("teacher", m) for t in teachers for m in [*METHODS, *PAIRS, "images"]),
    ]


def flags_of(recipe, teacher):
    """{name: value}: a method's flags, with w, or the range of w, around the teacher's guidance_scale - 1."""
    w, w_range = teacher.guidance_scale - 1, recipe["w_range"]
    return recipe["flags"] | ({} if w_range is None else {"w_min": w - w_range, "w_max": w + w_range})


def training_command(recipe, teacher, teacher_dir, data_dir, student_dir, seed, more=None):
    """The words after `accelerate`, as a user would type them; data_dir: shards, or a direct method's pairs.

    more: {name: value} of flags that name what the demo has made besides.
    """
    last = digits.NUM_TRAIN_SHARDS - 1
    data = f"--train_shards_path_or_url={data_dir}/{{00000..{last:05d}}}.tar"
    data = f"--pairs_dir={data_dir}" if recipe["script"] == DIRECT["script"] else data
    command = [
        *launch_words(recipe["script"]),
        f"--pretrained_teacher_model={teacher_dir}",
        data,
        f"--output_dir={student_dir}",
        *(f"--{name}={value}" for name, value in flags_of(recipe, teacher).items()),
        f"--seed={seed}",
        *(f"--{name}={value}" for name, value in (more or {}).items()),
    ]
    if student_dir.is_dir() and any(student_dir.iterdir()):
        command.append("--resume_from_checkpoint=latest")  # an earlier demo was interrupted here
    return command


def generate_pairs(recipe, teacher, teacher_dir, shards_dir, output_dir, seed):
    """Let the teacher answer the captions of the training digits; what is there is kept. Returns their folder."""
    pairs_dir = output_dir / teacher.folder.replace("teacher", recipe["pairs"])
    is_dit = teacher.prediction_type == "flow"
    # the samplers that the teachers are measured with at 50 steps; the students begin with the same
    own = {"teacher_kwargs": json.dumps(dit.CALL_KWARGS)} if is_dit else {"scheduler": "DDIMScheduler"}
    own |= {} if is_dit else {"scheduler_kwargs": json.dumps({"timestep_spacing": "trailing"})}
    flags = {"pretrained_teacher_model": teacher_dir, "prompts": shards_dir, "output_dir": pairs_dir}
    flags |= PAIRS[recipe["pairs"]] | own | {"guidance_scale": teacher.guidance_scale}
    # far from the seeds that the samples of `measure` are drawn with
    words = [f"--{name}={value}" for name, value in (flags | {"seed": 10**6 * (seed + 1)}).items()]
    print("python -m common.tools.generate_pairs " + " \\\n    ".join(map(shlex.quote, words)), flush=True)
    done = subprocess.run([sys.executable, "-m", "common.tools.generate_pairs", *words])
    if done.returncode:
        raise UserError(f"generate_pairs ended with exit code {done.returncode}; its own message is above")
    return pairs_dir


def real_images(teacher, output_dir, seed):
    """The table of real images for an adversary; what is there is kept."""
    folder = output_dir / teacher.folder.replace("teacher", "images")
    build_once(folder, lambda folder: digits.write_table(folder, seed, teacher.captions))
    return folder / "metadata.csv"


def train(recipe, teacher, teacher_dir, data_dir, student_dir, seed, start=None):
    started = time.perf_counter()
    more = {} if start is None else {"init_student": start}
    if "adv_weight" in recipe["flags"]:
        more["adv_images"] = real_images(teacher, student_dir.parent, seed)
    launch(training_command(recipe, teacher, teacher_dir, data_dir, student_dir, seed, more))
    print(f"trained {student_dir} in {time.perf_counter() - started:.0f} s", flush=True)


def write_report(output_dir):
    """report.md and report.png over everything that has been measured in this folder so far, judge by judge."""
    judged, pictures = [], []
    for captions in (digits.PARITY, digits.NAMED):
        teachers = [teacher.folder for teacher in TEACHERS.values() if teacher.captions is captions]
        measured = {}
        for teacher in teachers:
            measured[teacher] = output_dir / f"{teacher}_metrics.json"
            students = (teacher.replace("teacher", method) for method in METHODS)
            measured |= {name: output_dir / name / "metrics.json" for name in students}
        results = {name: json.loads(path.read_text()) for name, path in measured.items() if path.exists()}
        if results:
            labels = [label(name, row) for name, result in results.items() for row in result["rows"]]
            images = [to_tensor(row) for name in results for row in np.load(measured[name].with_suffix(".npy"))]
            columns = [captions.words[i % len(captions.words)] for i in range(10)]
            pictures.append(samples.image_grid(images, labels, columns, scale=3))
            judged.append((captions, results))
    lines = report_lines(judged)
    (output_dir / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for number, picture in enumerate(pictures):
        whole.paste(picture, (0, sum(p.height for p in pictures[:number])))
    whole.save(output_dir / "report.png")
    print("\n".join(lines), flush=True)
    print(f"\nwritten: {output_dir / 'report.md'}, {output_dir / 'report.png'}", flush=True)


def report_lines(judged):
    """judged: [(captions, {model: results})]."""
    lines = ["# Few-step samplers of handwritten digits"]
    for captions, results in judged:
        prompts = [f'"{prompt}"' for prompt in digits.canonical_prompts(len(captions.words), captions)]
        most = len(captions.digits[0])
        many = f" {most} digits fit each." if most > 1 else ""
        heads = ["model", "steps", "Fréchet distance", "prompt accuracy", f"digits of {most}", "confidence", "s/image"]
        lines += ["", f"Prompts: {prompts[0]} to {prompts[-1]}.{many}", "", "| " + " | ".join(heads) + " |"]
        lines.append("|---" * len(heads) + "|")
        held_out = {"steps": "", "seconds_per_image": None} | next(iter(results.values()))["held_out"]
        rows = [("held-out digits", held_out)]
        rows += [(name, row) for name, result in results.items() for row in result["rows"]]
        for name, row in rows:
            spread, seconds = row.get("frechet_distance_std"), row["seconds_per_image"]
            distance = f"{row['frechet_distance']:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
            seen = f"{row['prompt_accuracy']:.3f} | {row['classes']:.2f} | {row['confidence']:.3f}"
            seconds = "" if seconds is None else f"{seconds:.4f}"
            lines.append(f"| {name} | {row['steps']} | {distance} | {seen} | {seconds} |")
    results = {name: result for _, results in judged for name, result in results.items()}
    first = next(iter(results.values()))
    num_sets, set_size = first["num_sets"], first["set_size"]
    guidance = ", ".join(f"{name} {result['guidance_scale']:g}" for name, result in results.items())
    lines += [
        "",
        "- The held-out digits show what is within reach.",
        "- Fréchet distance to the 1,437 training digits, on the 64 pooled outputs of `classifier/`.",
        f"- A row is the mean of {num_sets} sets of {set_size} samples, ± their standard deviation; at 50 steps, one.",
        "- Prompt accuracy: how often the classifier sees a digit that the prompt allows.",
        "- Digits: the effective number of those it sees for a prompt, exp of their entropy. Fewer are lost digits.",
        "- Confidence: the mean probability of the likeliest digit. Blur lowers it.",
        "- Teachers are sampled with DDIM (trailing timesteps), the flow-matching one with its own scheduler (below "
        "20 steps ending as an even schedule does), students with the scheduler they were saved with.",
        f"- guidance_scale: {guidance}.",
        f"- Seconds: on the CPU, {first['threads']} thread(s), batches of {first['batch_size']}, text and decoding "
        "included.",
        f"- Data: {digits.DATA_NOTE}.",
    ]
    if len(judged) == 1:
        other, what = ("sd", "name the digit") if judged[0][0] is digits.PARITY else ("parity", "leave digits open")
        lines.append(f"- The other judge, whose prompts {what}: `python -m common.tools.demo --teacher {other}`.")
    lines += ["", "![samples](report.png)"]
    return lines


if __name__ == "__main__":
    main(parse_args())
