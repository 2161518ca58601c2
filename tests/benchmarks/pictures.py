"""The pictures of README and docs/measured.md, from a folder of the demo.

    python tests/benchmarks/pictures.py demo docs/images

The demo must have measured its methods there. Writes demo.png (the same ten prompts by every model) and distance.png
(the distance of each model at its numbers of steps). --teacher names the teacher's folder in the demo's.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# {label: the demo's methods, the students of which make its rows}
METHODS = {"LCM": ["lcm"], "LCM LoRA": ["lcm_lora"], "TSCD": ["tscd"], "TSCD LoRA": ["tscd_lora"]}
METHODS |= {"direct": ["direct", "direct_1"], "score": ["score_4", "score"]}
SHOWN = {"teacher": (50, 4, 1), "student": (4, 2, 1)}
COLOURS = ["#444444", "#d1495b", "#edae49", "#00798c", "#66a182", "#7b4b94", "#2b59c3"]
SCALE, GAP, LEFT = 3, 4, 170


def measured(demo, teacher):
    """{label: (rows of the measurement, images of each row)} of the teacher and of the students that are there."""
    models = {"teacher": [demo / f"{teacher}_metrics"]}
    for label, methods in METHODS.items():
        models[label] = [demo / teacher.replace("teacher", method) / "metrics" for method in methods]
    found = {}
    for label, paths in models.items():
        paths = [path for path in paths if path.with_suffix(".json").exists()]
        if paths:
            rows = [row for path in paths for row in json.loads(path.with_suffix(".json").read_text())["rows"]]
            found[label] = rows, np.concatenate([np.load(path.with_suffix(".npy")) for path in paths])
    return found


def draw_samples(models):
    """A row of samples for each model and number of steps, a wider gap between models, and over them the prompts."""
    rows = []
    for label, (results, images) in models.items():
        shown = SHOWN.get(label, SHOWN["student"])
        found = [(row, image) for row, image in zip(results, images, strict=True) if row["steps"] in shown]
        for place, (row, image) in enumerate(found):
            rows.append((place == 0, f"{label}, {row['steps']} step{'s' * (row['steps'] > 1)}", image))
    side = rows[0][2].shape[1] * SCALE
    height = sum(side + GAP + 2 * GAP * first for first, *_ in rows)
    picture = Image.new("RGB", (LEFT + len(rows[0][2]) * (side + GAP), height), "white")
    pen, font, y = ImageDraw.Draw(picture), ImageFont.load_default(size=15), 0
    for first, label, images in rows:
        y += 2 * GAP * first
        pen.text((GAP, y + side // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(tile, (LEFT + column * (side + GAP), y))
        y += side + GAP
    return picture


def draw_distances(models, width=800, height=420, left=60, right=130, top=34, bottom=50):
    """Distance over the number of steps, both on logarithmic axes."""
    rows = [row for results, _ in models.values() for row in results]
    steps = sorted({row["steps"] for row in rows})
    distances = [row["frechet_distance"] for row in rows]
    low, high = np.log(min(distances) * 0.9), np.log(max(distances) * 1.1)
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)

    def place(step, distance):
        x = left + (width - left - right) * np.log(step / steps[0]) / np.log(steps[-1] / steps[0])
        return x, top + (height - top - bottom) * (high - np.log(distance)) / (high - low)

    for step in steps:
        pen.text((place(step, 1)[0], height - bottom + 18), str(step), fill="black", font=font, anchor="mm")
    for distance in (0.3, 0.5, 1, 2, 5, 10, 20):
        if low < np.log(distance) < high:
            y = place(1, distance)[1]
            pen.line([(left, y), (width - right, y)], fill="#dddddd")
            pen.text((left - 8, y), f"{distance:g}", fill="black", font=font, anchor="rm")
    pen.text((4, 10), "distance", fill="black", font=font, anchor="lm")
    pen.text(((left + width - right) // 2, height - 12), "steps", fill="black", font=font, anchor="mm")
    for number, (label, (results, _)) in enumerate(models.items()):
        points = [place(row["steps"], row["frechet_distance"]) for row in results]  # from many steps to few
        colour = COLOURS[number]
        pen.line(points, fill=colour, width=3)
        for x, y in points:
            pen.ellipse([(x - 5, y - 5), (x + 5, y + 5)], fill=colour)
        pen.text((width - right + 15, top + 10 + 24 * number), label, fill=colour, font=font, anchor="lm")
    return picture


def draw_speeds(sides, wanted, title, width=800, left=190, row=44, top=56):
    """Bars of what a consumer of `wanted` samples/s got: {label: (samples/s, share of the time spent waiting)}."""
    picture = Image.new("RGB", (width, top + row * len(sides) + 10), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    full = width - left - 200
    pen.text(
        (GAP, 14), f"{title}; the line is the {wanted:.0f} samples/s that training takes", fill="black", font=font
    )
    for number, (label, (speed, waiting)) in enumerate(sides.items()):
        y, end = top + number * row, left + full * speed / wanted
        pen.text((GAP, y + row // 2 - 4), label, fill="black", font=font, anchor="lm")
        pen.rectangle([left, y, end, y + row - 12], fill=COLOURS[number + 1])
        words = f"{speed:.0f} samples/s, waits {waiting:.0%}"
        pen.text((left + full + 10, y + row // 2 - 4), words, fill="black", font=font, anchor="lm")
    pen.line([(left + full, top - 8), (left + full, top + row * len(sides) - 4)], fill="black", width=2)
    return picture


def main(args):
    models = measured(Path(args.demo), args.teacher)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for name, picture in (("demo", draw_samples(models)), ("distance", draw_distances(models))):
        picture.quantize(128).save(Path(args.output_dir, f"{name}.png"), optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", help="a folder of the demo")
    parser.add_argument("output_dir", help="where the pictures go")
    parser.add_argument("--teacher", default="teacher_parity", help="its folder in the demo's")
    main(parser.parse_args())
