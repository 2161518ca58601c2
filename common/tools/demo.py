"""The demo: distil a small Stable Diffusion of handwritten digits on a CPU, and measure teacher and student.

    python -m common.tools.demo --method lcm

builds, once, a teacher, a classifier and WebDataset shards (see `digits.py`), and pairs of the teacher for direct
distillation; launches the method's training script as anybody would; measures the teacher at 50, 8, 4, 2 and 1 steps
and the student at 4, 2 and 1, direct ones at the steps they were trained for; writes `demo/report.md` and
`demo/report.png`. Whatever is complete is reused by the next run. Left out: several seeds; the numbers of one run
say that a method works, not by how much it beats another.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import UserError, lock, metrics, probes
from common import args as cli
from common.tools import digits, dit
from common.tools.evaluate import load_pipeline

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]

# --teacher: folder, what its U-Net predicts, whether it is in SDXL's layout
TEACHERS = {
    "sd": ("teacher", "epsilon", False),
    "v_prediction": ("teacher_v_prediction", "v_prediction", False),
    "sdxl": ("teacher_sdxl", "epsilon", True),
    "dit": ("teacher_dit", "flow", False),
}
TEACHER_STEPS = (50, 8, 4, 2, 1)
STUDENT_STEPS = (4, 2, 1)
GUIDANCE_SCALE = 2.0  # w = 1

# One entry per method: its script, its flags beyond the folders, and its student's guidance_scale in the report.
METHODS = {
    "lcm": {
        "script": "train_lcm_distill_sd_wds.py",
        "guidance_scale": GUIDANCE_SCALE,
        "flags": {
            "resolution": digits.RESOLUTION,
            "train_batch_size": 32,
            "max_train_steps": 800,
            "learning_rate": 1e-4,
            "adam_weight_decay": 0.0,
            "loss_type": "huber",
            "ema_decay": 0.95,
            "w_min": 0.5,
            "w_max": 1.5,
            "validation_steps": 400,
        },
    },
    "lcm_lora": {
        "script": "train_lcm_distill_lora_sd_wds.py",
        "guidance_scale": 1.0,  # baked in: w = 1, the teacher's guidance_scale of 2
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
            "w_min": 1.0,
            "w_max": 1.0,
            "validation_steps": 400,
        },
    },
    "tscd": {
        "script": "train_tscd_distill_sd_wds.py",
        "guidance_scale": 1.0,  # baked in
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
            "w_min": 1.0,
            "w_max": 1.0,
            "adv_learning_rate": 1e-4,
            "adv_head_learning_rate": 1e-3,
            "validation_steps": 0,
        },
    },
    "tscd_lora": {
        "script": "train_tscd_distill_lora_sd_wds.py",
        "guidance_scale": 1.0,
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
            "w_min": 1.0,
            "w_max": 1.0,
            "adv_learning_rate": 1e-4,
            "adv_head_learning_rate": 1e-3,
            "validation_steps": 0,
        },
    },
}

PAIRS = {"num_pairs": 2048, "num_inference_steps": 50, "guidance_scale": GUIDANCE_SCALE, "batch_size": 64}
DIRECT = {
    "script": "train_direct_distill.py",
    "guidance_scale": 1.0,  # distilled: the teacher's guidance_scale of 2
    "steps": (4,),
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
    "direct_lora": DIRECT | {"flags": DIRECT["flags"] | {"lora_rank": 16, "learning_rate": 2e-3}},
}

# A set is as large as the held-out part of the data, so that every distance here is biased alike, the floor's too.
NUM_SETS, SET_SIZE = 3, digits.NUM_HELD_OUT
SAMPLE_BATCH_SIZE = 60


def parse_args(argv=None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output_dir", type=cli.path, default="demo", help="everything that is built and measured")
    add("--method", choices=[*METHODS, "ct"], default="lcm", help="which training script to run; ct needs no teacher")
    add("--teacher", choices=list(TEACHERS), default="sd", help="sd predicts the noise, as SD1.5 and SDXL do")
    add("--teacher_only", action="store_true", help="build teacher, classifier and shards, measure the teacher, stop")
    add("--rebuild", action="store_true", help="first remove what earlier runs left in --output_dir")
    add("--seed", type=cli.seed, default=0)
    args = parser.parse_args(argv)
    if args.method == "ct":
        parser.refuse_idle(["teacher", "teacher_only"], "--method=ct has no teacher; drop it")
    if args.teacher_only:
        parser.refuse_idle(["method"], "--teacher_only trains no student; drop one of them")
    if args.teacher == "dit" and not args.teacher_only and METHODS[args.method]["script"] != DIRECT["script"]:
        parser.error(
            f"--teacher=dit has no U-Net and --method={args.method} needs one; use direct, direct_8, direct_lora"
        )
    return args


@cli.tool_errors
def main(args):
    # 1. One thread unless the user says more: with any second busy process, several would wait for each other.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

    # 2. What earlier runs left.
    output_dir = Path(args.output_dir)
    lock.take(output_dir, "--output_dir")
    open_output_dir(output_dir, args.seed, args.rebuild)
    teacher_name, prediction_type, sdxl = TEACHERS[args.teacher]
    started = time.perf_counter()
    if args.method == "ct":
        from common.tools import demo_ct  # which imports this module

        demo_ct.run(output_dir, args.seed)
        print(f"finished in {time.perf_counter() - started:.0f} s", flush=True)
        return

    # 3. Data, classifier, teacher.
    build_once(output_dir / "shards", lambda folder: digits.write_shards(folder, seed=args.seed))
    build_once(output_dir / "classifier", lambda folder: digits.build_classifier(folder, seed=args.seed))
    teacher_dir = output_dir / teacher_name
    if args.teacher == "dit":
        build_once(teacher_dir, lambda folder: dit.build_teacher(folder, seed=args.seed))
    else:
        build_once(
            teacher_dir, lambda folder: digits.build_teacher(folder, prediction_type, seed=args.seed, sdxl=sdxl)
        )
    (output_dir / "prompts.txt").write_text("\n".join(digits.canonical_prompts(len(digits.WORDS))) + "\n")
    judge = Judge(output_dir / "classifier")

    # 4. The teacher, measured once.
    measure_once(
        output_dir / f"{teacher_name}_metrics",
        lambda: measure_teacher(judge, teacher_dir, TEACHER_STEPS, args.seed),
    )
    if args.teacher_only:
        write_report(output_dir)
        return

    # 5. The student.
    student_dir = output_dir / teacher_name.replace("teacher", args.method)
    recipe = METHODS[args.method]
    if (student_dir / "README.md").exists():  # the card, which the scripts write last
        print(f"{student_dir} is complete and reused; --rebuild starts over", flush=True)
    else:
        data_dir = output_dir / "shards" / "train"
        if recipe["script"] == DIRECT["script"]:
            data_dir = generate_pairs(
                teacher_dir, data_dir, output_dir / teacher_name.replace("teacher", "pairs"), args.seed
            )
        train(recipe, teacher_dir, data_dir, student_dir, args.seed)
    measure_once(
        student_dir / "metrics",
        lambda: measure_student(judge, student_dir, teacher_dir, recipe, args.seed),
    )

    # 6. The report.
    write_report(output_dir)
    print(f"finished in {time.perf_counter() - started:.0f} s", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Build once, keep


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
            built_seed = json.loads(stamp.read_text())["seed"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{stamp} cannot be read; add --rebuild, or another --output_dir") from None
        if built_seed != seed:
            raise UserError(f"{output_dir} was built with --seed={built_seed}; add --rebuild, or another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps({"seed": seed}) + "\n")


def built_names():
    from common.tools import demo_ct

    teachers = [name for name, *_ in TEACHERS.values()]
    return [
        "shards",
        "classifier",
        *demo_ct.built_names(),
        *teachers,
        *(t.replace("teacher", m) for t in teachers for m in [*METHODS, "pairs"]),
    ]


def build_once(folder, build):
    """Call build(temporary folder) and rename, so that `folder` is complete wherever it exists."""
    if folder.exists():
        print(f"{folder} exists and is reused", flush=True)
        return
    print(f"building {folder}", flush=True)
    started = time.perf_counter()
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    build(unfinished)
    unfinished.rename(folder)
    print(f"built {folder} in {time.perf_counter() - started:.0f} s", flush=True)


def measure_once(path, measure):
    """Keep measure() = (results, images) as PATH.json and PATH.npy; the json, written last, says that both exist."""
    if path.with_suffix(".json").exists():
        print(f"{path}.json exists and is reused", flush=True)
        return
    results, images = measure()
    np.save(path.with_suffix(".npy"), images)
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.rename(path.with_suffix(".json"))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def training_command(recipe, teacher_dir, data_dir, student_dir, seed):
    """The words after `accelerate`, as a user would type them; data_dir: shards, or a direct method's pairs."""
    last = digits.NUM_TRAIN_SHARDS - 1
    data = f"--train_shards_path_or_url={data_dir}/{{00000..{last:05d}}}.tar"
    data = f"--pairs_dir={data_dir}" if recipe["script"] == DIRECT["script"] else data
    command = ["launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command += [] if torch.cuda.is_available() else ["--cpu"]
    command += [
        os.path.relpath(ROOT / recipe["script"]),
        f"--pretrained_teacher_model={teacher_dir}",
        data,
        f"--output_dir={student_dir}",
        *(f"--{name}={value}" for name, value in recipe["flags"].items()),
        f"--seed={seed}",
    ]
    if student_dir.is_dir() and any(student_dir.iterdir()):
        command.append("--resume_from_checkpoint=latest")  # an earlier demo was interrupted here
    return command


def generate_pairs(teacher_dir, shards_dir, pairs_dir, seed):
    """Let the teacher answer the captions of the training digits; what is there is kept. Returns pairs_dir."""
    is_dit = teacher_dir.name == TEACHERS["dit"][0]
    # the samplers that the teachers are measured with at 50 steps; the students begin with the same
    own = {"teacher_kwargs": json.dumps(dit.CALL_KWARGS)} if is_dit else {"scheduler": "DDIMScheduler"}
    own |= {} if is_dit else {"scheduler_kwargs": json.dumps({"timestep_spacing": "trailing"})}
    flags = {"pretrained_teacher_model": teacher_dir, "prompts": shards_dir, "output_dir": pairs_dir} | PAIRS | own
    # far from the seeds that the samples of `measure` are drawn with
    words = [f"--{name}={value}" for name, value in (flags | {"seed": 10**6 * (seed + 1)}).items()]
    print("python -m common.tools.generate_pairs " + " \\\n    ".join(map(shlex.quote, words)), flush=True)
    done = subprocess.run([sys.executable, "-m", "common.tools.generate_pairs", *words])
    if done.returncode:
        raise UserError(f"generate_pairs ended with exit code {done.returncode}; its own message is above")
    return pairs_dir


def train(recipe, teacher_dir, data_dir, student_dir, seed):
    command = training_command(recipe, teacher_dir, data_dir, student_dir, seed)
    print("accelerate " + " \\\n    ".join(shlex.quote(word) for word in command), flush=True)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.accelerate_cli", *command])
    if done.returncode:
        raise UserError(f"{recipe['script']} ended with exit code {done.returncode}; its own message is above")
    print(f"trained {student_dir} in {time.perf_counter() - started:.0f} s", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Judge:
    """The classifier with what it sees in the training images, and the distance of the held-out ones: the floor."""

    def __init__(self, folder):
        (train_images, _), (held_out_images, _) = digits.load_split()
        self.network = metrics.load_feature_network(folder)
        self.train_features = self.features(train_images)
        self.floor = self.distance(held_out_images)

    def features(self, images):
        return metrics.image_features(self.network, to_tensor(images), batch_size=256)

    def distance(self, images):
        return metrics.frechet_distance(self.features(images), self.train_features)

    def accuracy(self, images, prompts):
        labels = metrics.prompt_labels(self.network.model.config.id2label, prompts)
        return metrics.prompt_accuracy(self.network, to_tensor(images), labels, batch_size=256)


def to_tensor(images):
    """uint8 (N, H, W, 3) array to uint8 (N, 3, H, W) tensor."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def load_student(folder, teacher_dir):
    """What a method saved, as a stock pipeline: a whole one, or the teacher's with a U-Net or a LoRA from its file."""
    if (folder / "model_index.json").exists():
        return load_pipeline(str(folder))
    unet = folder / "unet"
    return load_pipeline(str(teacher_dir), **({"unet": unet} if unet.is_dir() else {"lora": folder}))


def measure_student(judge, folder, teacher_dir, recipe, seed):
    """The student at its method's numbers of steps, or the model of every stage at the number that it is for."""
    stages = {stage: [int(stage.name.split("-k")[1])] for stage in sorted(folder.glob("stage-*"))}
    measured = [
        measure(judge, load_student(part, teacher_dir), steps, recipe["guidance_scale"], seed)
        for part, steps in (stages or {folder: recipe.get("steps", STUDENT_STEPS)}).items()
    ]
    rows = [row for results, _ in measured for row in results["rows"]]
    return measured[0][0] | {"rows": rows}, np.concatenate([images for _, images in measured])


def measure_teacher(judge, folder, steps, seed):
    """As well as it samples in few steps. With DDIM from the last timestep down: the checkpoint's own spacing never
    sees noise at one and two steps. A flow's few steps end at an even schedule's last sigma instead of at the data.
    """
    pipeline = load_pipeline(str(folder))
    shipped = pipeline.scheduler
    if hasattr(shipped, "alphas_cumprod"):
        pipeline.scheduler = DDIMScheduler.from_config(shipped.config, clip_sample=False, timestep_spacing="trailing")
        return measure(judge, pipeline, steps, GUIDANCE_SCALE, seed)

    def schedule(num_inference_steps):
        change = probes.repairs(shipped, num_inference_steps)[-1] if 1 < num_inference_steps < 20 else {}
        pipeline.scheduler = type(shipped).from_config(shipped.config, **change)

    return measure(judge, pipeline, steps, GUIDANCE_SCALE, seed, schedule)


def measure(judge, pipeline, steps, guidance_scale, seed, schedule=None):
    """Sample NUM_SETS sets at every number of steps. Returns the results, and images (len(steps), 10, H, W, 3).

    schedule: called with each number of steps before it is sampled, to change the pipeline's scheduler.
    """
    prompts = digits.canonical_prompts(SET_SIZE)
    rows, shown = [], []
    for num_inference_steps in steps:
        distances, accuracies, seconds = [], [], 0.0
        if schedule:
            schedule(num_inference_steps)
        with tqdm(total=NUM_SETS * SET_SIZE, desc=f"{num_inference_steps} steps", unit="image") as progress:
            for index in range(NUM_SETS):
                generator = torch.Generator().manual_seed(seed * NUM_SETS + index)
                images = []
                for start in range(0, SET_SIZE, SAMPLE_BATCH_SIZE):
                    batch = prompts[start : start + SAMPLE_BATCH_SIZE]
                    started = time.perf_counter()
                    images.append(sample(pipeline, batch, num_inference_steps, guidance_scale, generator))
                    seconds += time.perf_counter() - started
                    progress.update(len(batch))
                images = np.concatenate(images)
                distances.append(judge.distance(images))
                accuracies.append(judge.accuracy(images, prompts))
                if index == 0:
                    shown.append(images[:10])
        rows.append(
            {
                "steps": num_inference_steps,
                "frechet_distance": float(np.mean(distances)),
                "frechet_distance_std": float(np.std(distances)),
                "prompt_accuracy": float(np.mean(accuracies)),
                "seconds_per_image": seconds / (NUM_SETS * SET_SIZE),
            }
        )
    results = {
        "guidance_scale": guidance_scale,
        "num_sets": NUM_SETS,
        "set_size": SET_SIZE,
        "batch_size": SAMPLE_BATCH_SIZE,
        "threads": torch.get_num_threads(),
        "floor": judge.floor,
        "rows": rows,
    }
    return results, np.stack(shown)


def sample(pipeline, prompts, num_inference_steps, guidance_scale, generator):
    """uint8 (N, H, W, 3)"""
    images = pipeline(
        prompts,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=generator,
        output_type="np",
        **(dit.CALL_KWARGS if isinstance(pipeline, StableDiffusion3Pipeline) else {}),
    ).images
    return (images * 255).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def write_report(output_dir):
    """report.md and report.png over everything that has been measured in this folder so far."""
    measured = {}
    for teacher, *_ in TEACHERS.values():
        measured[teacher] = output_dir / f"{teacher}_metrics.json"
        measured |= {
            name: output_dir / name / "metrics.json" for name in (teacher.replace("teacher", m) for m in METHODS)
        }
    results = {name: json.loads(path.read_text()) for name, path in measured.items() if path.exists()}
    lines = report_lines(results)
    (output_dir / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    labels = [f"{name}, {row['steps']} steps" for name, result in results.items() for row in result["rows"]]
    images = [to_tensor(row) for name in results for row in np.load(measured[name].with_suffix(".npy"))]
    metrics.image_grid(images, labels, list(digits.WORDS), scale=3).save(output_dir / "report.png")
    print("\n".join(lines), flush=True)
    print(f"\nwritten: {output_dir / 'report.md'}, {output_dir / 'report.png'}", flush=True)


def report_lines(results):
    first = next(iter(results.values()))
    num_sets, set_size = first["num_sets"], first["set_size"]
    lines = [
        "# Few-step samplers of handwritten digits",
        "",
        "| model | steps | Fréchet distance | prompt accuracy | s/image |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for row in result["rows"]:
            distance = f"{row['frechet_distance']:.2f} ± {row['frechet_distance_std']:.2f}"
            lines.append(
                f"| {name} | {row['steps']} | {distance} | {row['prompt_accuracy']:.3f} | "
                f"{row['seconds_per_image']:.4f} |"
            )
    lines += [
        "",
        f"Floor: the {set_size} held-out digits are at distance {first['floor']:.2f} from the training digits.",
        "",
        f"- Every row: {num_sets * set_size:,} samples in {num_sets} sets of {set_size}, as many as held-out "
        "digits; each set is compared with the 1,437 training digits. The distance is the mean over the sets, ± their "
        "standard deviation.",
        "- Features: the 64 pooled outputs of `classifier/`; they compare with no other network's.",
        f'- Prompts: "{digits.CANONICAL_TEMPLATE.format("zero")}" to "nine", equally often; accuracy is how often the '
        "classifier sees the digit that the prompt names.",
        "- Teachers are sampled with DDIM (trailing timesteps), the flow-matching one with its own scheduler (below "
        "20 steps ending as an even schedule does), students with the scheduler they were saved with; "
        "guidance_scale: "
        + ", ".join(f"{name} {result['guidance_scale']:g}" for name, result in results.items())
        + ".",
        f"- Seconds: on the CPU, {first['threads']} thread(s), batches of {first['batch_size']}, text and decoding "
        "included.",
        f"- Data: {digits.DATA_NOTE}.",
        "",
        "![samples](report.png)",
    ]
    return lines


if __name__ == "__main__":
    main(parse_args())
