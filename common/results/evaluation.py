"""Evaluations of a student while it trains: what its samples score against a reference, the record of all scores, the
best of them, what to be warned of, and a picture. Scripts and tools measure with the same functions.

A row is {"step", "checkpoint", "network", "num_inference_steps", what `score` returns, "judge"}. Rows of one judge
were measured alike and compare: on one network, one reference, as many images of the same prompts.
"""

import hashlib
import json
import math
from pathlib import Path

from common.files import whole
from common.results import metrics, plots, samples

import torch

METRICS = "metrics.jsonl"
BEST = "best_checkpoint.json"  # {"checkpoint": name or null, ...}, which pruning spares
PICTURE = "evaluation.png"
FOLDER = "evaluation"  # what is measured once for a run
TEACHER = "teacher"  # the network of the teacher's row
TOLD_APART = ("judge", "stage")  # rows that agree in these compare
PATIENCE = 3  # evaluations without a better one, after which that is said
TOLERANCE = 0.2  # share by which the BOUNDED may differ from the teacher's
BOUNDED = ("diversity", "saturation")
SHOWN = {"frechet_distance": "distance", "diversity": "diversity", "saturation": "saturation"}


def observe(network, images, batch_size=64):
    """What a measurement keeps of images, uint8 (N, 3, H, W): features, float32 (N, d), and saturations, (N,)."""
    return metrics.image_features(network, images, batch_size), metrics.saturation(images)


def score(features, saturations, reference=None, groups=None):
    """{"frechet_distance", "kernel_distance", "diversity", "saturation"} of what `observe` kept of N images.

    reference: features, (M, d), that the distances are measured to; None: no distances. groups: see
    `metrics.diversity`. Where features are not finite, as of weights that have diverged, each value is None.
    """
    distances = {} if reference is None else dict.fromkeys(("frechet_distance", "kernel_distance"))
    if not torch.isfinite(features).all():
        return distances | {"diversity": None, "saturation": None}
    for name in distances:
        distances[name] = getattr(metrics, name)(features, reference)
    spread = {"diversity": metrics.diversity(features, groups), "saturation": saturations.mean().item()}
    return distances | spread


def judge_of(**settings):
    """A short name of what an evaluation is measured with: equal for equal settings, JSON-able."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class Evaluation:
    """Measures samples against a reference; called by every process, which share the work.

    network: from `metrics.load_feature_network`. reference: features, (M, d). groups: of each of the N images that are
    sampled, the index of its prompt, or its class. batch_size: images that are sampled at once. mark: {"name", and
    what `score` returns} of the reference's or the teacher's images, to which diversity and saturation are compared.
    judge: from `judge_of`. class_accuracy: the network is a classifier, and groups are its classes.
    """

    def __init__(self, accelerator, network, reference, groups, batch_size, mark, judge, class_accuracy=False):
        self.accelerator, self.network, self.reference, self.groups = accelerator, network, reference, groups
        self.batch_size, self.mark, self.judge, self.class_accuracy = batch_size, mark, judge, class_accuracy

    def __call__(self, sample, names, steps):
        """A row per name of a network and number of steps, on every process.

        sample(name, num_inference_steps, start, stop): uint8 (stop - start, 3, H, W) on the CPU, the images of these
        indices: the same at any time, for any number of processes.
        """
        rows = []
        for name in names:
            for num_steps in steps:

                def of_part(start, stop, name=name, num_steps=num_steps):
                    return sample(name, num_steps, start, stop)

                row = {"network": name, "num_inference_steps": num_steps}
                rows.append(row | self.measure(of_part) | {"judge": self.judge})
        return rows

    def measure(self, sample):
        """What `score` returns of the images of sample(start, stop), and "class_accuracy" where it is asked for."""
        features, saturations, hits = sample_and_observe(
            self.accelerator, self.network, sample, len(self.groups), self.batch_size, self._hits
        )
        values = score(features, saturations, self.reference, self.groups)
        if self.class_accuracy:
            values["class_accuracy"] = sum(hits) / len(features)
        return values

    def _hits(self, images, start):
        if not self.class_accuracy:
            return 0.0
        allowed = [(group,) for group in self.groups[start : start + len(images)]]
        return metrics.class_statistics(self.network, images, allowed)["accuracy"] * len(images)


def sample_and_observe(accelerator, network, sample, num_images, batch_size, more=lambda images, start: None):
    """What `observe` keeps of sample(start, stop) over all images, on every process, which share the batches.

    Returns (features, saturations, [more(images, start) of each batch]).
    """

    def part(start):
        images = sample(start, min(start + batch_size, num_images))
        features, saturations = observe(network, images, batch_size)
        return features.numpy(), saturations.numpy(), more(images, start)

    parts = samples.share(accelerator, list(range(0, num_images, batch_size)), part)
    features, saturations = (torch.cat([torch.from_numpy(each[i]) for each in parts]) for i in (0, 1))
    return features, saturations, [each[2] for each in parts]


def read_rows(output_dir):
    """The rows of metrics.jsonl, in order."""
    path = Path(output_dir, METRICS)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_rows(output_dir, rows):
    with whole(Path(output_dir, METRICS)) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(output_dir, step, rows, checkpoint=None, metric="frechet_distance", is_saved=True, at=None):
    """Append the rows of `step` to metrics.jsonl and note the best evaluation so far in best_checkpoint.json.

    Best is the lowest `metric` over all networks at `at` steps, default: the most that are measured, among the rows
    that compare with these; `checkpoints_total_limit` spares its checkpoint. checkpoint: the name of this step's, None
    where none is saved. is_saved: False where it will be saved if it is the best alone. Rows of later steps, and of
    this one, are those of a run that was killed and resumed: they are dropped. Returns the best row.
    """
    kept = [row for row in read_rows(output_dir) if row["step"] < step]
    kept += [{"step": step, "checkpoint": checkpoint} | row for row in rows]
    rivals = comparable(kept)
    at = at or max(row["num_inference_steps"] for row in rivals)
    rivals = [row for row in rivals if row["num_inference_steps"] == at]
    best = min(rivals, key=lambda row: math.inf if row[metric] is None else row[metric])
    if not is_saved and best["step"] < step:
        for row in kept[-len(rows) :]:
            row["checkpoint"] = None
    write_rows(output_dir, kept)
    if best["step"] < step and not Path(output_dir, best["checkpoint"] or BEST).is_dir():
        best = best | {"checkpoint": None}  # pruned, when one of the rows that were dropped was better
    with whole(Path(output_dir, BEST)) as unfinished:
        unfinished.write_text(json.dumps({"metric": metric} | best, indent=1) + "\n")
    return best


def record_teacher(output_dir, values, num_inference_steps, judge):
    """Put the teacher's row, of step 0, in place of another one, before those of the student."""
    row = {"step": 0, "checkpoint": None, "network": TEACHER, "num_inference_steps": num_inference_steps}
    others = [row for row in read_rows(output_dir) if row["network"] != TEACHER]
    write_rows(output_dir, [row | values | {"judge": judge}, *others])


def comparable(rows):
    """The students' rows that compare with the last one."""
    return [r for r in rows if r["network"] != TEACHER and all(r.get(k) == rows[-1].get(k) for k in TOLD_APART)]


def read_best(output_dir):
    """What best_checkpoint.json says, None where there is none."""
    path = Path(output_dir, BEST)
    return json.loads(path.read_text()) if path.is_file() else None


def describe_best(output_dir):
    """The best evaluation of a run in words."""
    best = read_best(output_dir)
    if best is None:
        return "not measured: `eval_steps` and `feature_network` do that while it trains"
    value = best[best["metric"]]
    what = "not finite" if value is None else f"{best['metric'].replace('_', ' ')} {value:.4g}"
    return f"{what} with {best['num_inference_steps']} steps, the best, at update {best['step']}; all in {METRICS}"


def report(rows, best, mark):
    """Lines for people on the latest evaluation: what was measured, and warnings.

    rows: all, from `read_rows`. best: from `record`. mark: of `Evaluation`.
    """
    rivals = comparable(rows)
    step = rivals[-1]["step"]
    now = [row for row in rivals if row["step"] == step]
    lines = [f"evaluation at step {step}: {_words(row, mark)}" for row in now]
    metric = "frechet_distance"
    if best["step"] < step and best[metric] is not None:
        lines.append(f"the best is that of step {best['step']}: distance {best[metric]:.4g}")
    age = len({row["step"] for row in rivals if row["step"] > best["step"]})
    if age >= PATIENCE:
        lines.append(
            f"WARNING: {age} evaluations without a better one than step {best['step']}'s: stop, and export it with "
            "`export`=best, or lower the learning rate"
        )
    for row in now:
        before = [r for r in rivals if r["step"] < step and _series(r) == _series(row)]
        if row["num_inference_steps"] == best["num_inference_steps"]:
            lines += [f"WARNING: {text}" for text in _left(row, before[-1] if before else None, mark)]
    return lines


def _words(row, mark):
    if row["diversity"] is None:
        return f"{_series(row)}: not finite"
    shares = {name: share for name in BOUNDED if (share := _share(row, name, mark)) is not None}
    words = " and ".join(f"{name} {share:.0%}" for name, share in shares.items())
    distance = f"distance {row['frechet_distance']:.4g}"
    return f"{_series(row)}: {distance}" + (f", {words} of {mark['name']}'s" if shares else "")


def _left(row, before, mark):
    """What to be warned of in a row: diversity and saturation out of bounds, which were not so in the row before."""
    for name in BOUNDED:
        share = _share(row, name, mark)
        was = before and _share(before, name, mark)
        if share is not None and abs(share - 1) > TOLERANCE and not (was and abs(was - 1) > TOLERANCE):
            meaning = {
                ("diversity", True): "its images vary more than they should, as noise does",
                ("diversity", False): "it loses variety: the learning rate or an adversarial weight may be too large",
                ("saturation", True): "contrast or colour is too strong: is it guided twice, or trained too long?",
                ("saturation", False): "its images are washed out or blurred",
            }[name, share > 1]
            yield f"{_series(row)}: {name} is {share:.0%} of {mark['name']}'s; {meaning}"


def _share(row, name, mark):
    return row[name] / mark[name] if mark and mark.get(name) and row.get(name) is not None else None


def _series(row):
    steps = row["num_inference_steps"]
    stage = f"{row['stage']}, " if row.get("stage") else ""
    return f"{stage}{row['network']}, {steps} step{'s' * (steps > 1)}"


def draw(output_dir, rows, mark):
    """Write evaluation.png: distance, diversity and saturation over the updates, of the latest judge's rows."""
    rows = [row for row in rows if row["network"] != TEACHER and row.get("judge") == rows[-1].get("judge")]
    panels = {}
    for name, title in SHOWN.items():
        lines = {}
        for row in rows:
            if row.get(name) is not None:
                lines.setdefault(_series(row), []).append((row["step"], row[name]))
        known = mark and mark.get(name) is not None
        panels[title] = lines, ({mark["name"]: mark[name]} if known else {})
    plots.draw_lines(panels, Path(output_dir, PICTURE))


def flatten(rows):
    """Rows of an evaluation as {"eval/NETWORK_K_steps/METRIC": value} for trackers."""
    keys = ("network", "num_inference_steps", *TOLD_APART)
    return {
        f"eval/{row['network']}_{row['num_inference_steps']}_steps/{name}": value
        for row in rows
        for name, value in row.items()
        if name not in keys and value is not None
    }
