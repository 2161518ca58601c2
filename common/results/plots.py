"""Pictures of numbers over the updates of a run."""

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#d1495b", "#00798c", "#edae49", "#66a182", "#7b4b94", "#2e4057", "#a05a2c", "#8d96a3")
TICKS = 5


def draw_lines(panels, path, width=900, height=230, left=70, right=210, top=30, bottom=34):
    """Write a PNG of panels above each other, which share the axis of updates.

    panels: {title: ({label: [(update, value)]}, {label: value of a horizontal line})}. A panel without a point is left
    out; of none, nothing is written. A label has one colour in all.
    """
    panels = {title: panel for title, panel in panels.items() if any(panel[0].values())}
    if not panels:
        return
    labels = list(dict.fromkeys(label for lines, _ in panels.values() for label in lines))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    last = max(x for lines, _ in panels.values() for line in lines.values() for x, _ in line)
    picture = Image.new("RGB", (width, height * len(panels)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for number, (title, (lines, marks)) in enumerate(panels.items()):
        values = [y for line in lines.values() for _, y in line] + list(marks.values())
        low, high = min(0.0, *values), max(values) * 1.05 or 1.0
        base, rows, columns = number * height + height - bottom, height - top - bottom, width - left - right

        def place(x, y, base=base, rows=rows, columns=columns, low=low, high=high):
            return left + columns * x / last, base - rows * (y - low) / (high - low)

        pen.text((8, base - rows - 18), title, fill="black", font=font, anchor="lm")
        for tick in range(TICKS):
            value = low + (high - low) * tick / (TICKS - 1)
            y = place(0, value)[1]
            pen.line([(left, y), (left + columns, y)], fill="#dddddd")
            pen.text((left - 8, y), f"{value:.3g}", fill="black", font=font, anchor="rm")
            update = round(last * tick / (TICKS - 1))
            pen.text((place(update, low)[0], base + 14), str(update), fill="black", font=font, anchor="mm")
        legend = []
        for label, value in marks.items():
            y = place(0, value)[1]
            for x in range(left, left + columns, 12):
                pen.line([(x, y), (min(x + 6, left + columns), y)], fill="#444444", width=2)
            legend.append((label, "#444444"))
        for label, line in lines.items():
            points = [place(*point) for point in line]
            if len(points) > 1:
                pen.line(points, fill=colours[label], width=2)
            for x, y in points:
                pen.ellipse([(x - 3, y - 3), (x + 3, y + 3)], fill=colours[label])
            legend.append((label, colours[label]))
        for i, (label, colour) in enumerate(legend):
            pen.text((left + columns + 14, base - rows + 17 * i), label, fill=colour, font=font, anchor="lm")
    picture.save(path)
