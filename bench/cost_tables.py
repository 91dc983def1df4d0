"""The tables of what accuracy costs: end_to_end.csv, baselines.csv, joint.csv and ideas.csv; see bench/tables.py."""

from cells import average, found, load, of_chosen_rates, reached, seconds_of, table

PATTERNS = ("unstructured 0.7", "unstructured 0.8", "unstructured 0.9", "2:4", "1:4")  # in their usual order
UNMEASURED = "Not measured yet."


def costs(name: str) -> str:
    """One row per method and seconds of a training, with what it reaches at each pattern."""
    rows = of_chosen_rates(load(name))
    if not rows:
        return UNMEASURED
    patterns = found(rows, "pattern", PATTERNS)
    lines: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        budget = row.get("budget")
        way = row["method"] if budget is None else f"{row['method']}, {budget:g} s"
        lines.setdefault((way, row["images"]), {}).setdefault(row["pattern"], []).append(row)
    cells = [[*way, *(reached(each.get(pattern, [])) for pattern in patterns)] for way, each in lines.items()]
    said = "Accuracy in percent / relative error of the logits of held-out training images / seconds of the processor."
    return table(["method", "images", *patterns], cells) + f"\n\n{said}"


def fast(name: str) -> str:
    """One row per pattern: the shares of what the defaults gain on the mask, and of their seconds."""
    rows, cells = load(name), []
    for pattern in found(rows, "pattern", PATTERNS):
        own = [[row for row in rows if (row["pattern"], row["method"]) == (pattern, m)] for m in ("MP", "fast", "best")]
        if not all(own):
            continue
        mask, quick, best = (average(each, "accuracy") for each in own)
        seconds = [sum(map(seconds_of, each)) for each in own]
        shares = f"{(quick - mask) / (best - mask):.1%}", f"{seconds[1] / seconds[2]:.1%}"
        cells.append([pattern, mask, quick, best, *shares])
    return table(["pattern", "mask only (MP)", "fast", "best", "share of the gain", "share of the seconds"], cells)


def joint() -> str:
    """One row per pattern and number of joint steps: the loss and the logits' error, without and with recycling."""
    rows = {(r["pattern"], r["joint_steps"], r["recycle"]): r for r in load("joint")}
    kept, cells = sorted({recycle for *_, recycle in rows}), []
    for pattern, steps in dict.fromkeys((pattern, steps) for pattern, steps, _ in rows):
        own = [rows[pattern, steps, recycle] for recycle in kept]
        losses = (f"{r['loss_after']:.3f} ({r['products']:.0f})" for r in own)
        scores = (f"{r['held_out_error']:.4f}, {r['accuracy']:.2f}" for r in own)
        cells.append([pattern, steps, f"{own[0]['loss_before']:.3f}", *losses, *scores])
    heads = [f"recycle {recycle}: {what}" for what in ("loss (products)", "error, accuracy") for recycle in kept]
    return table(["pattern", "joint steps", "loss before", *heads], cells)


def ideas() -> str:
    """One row per idea, with what it reaches at each pattern."""
    rows = load("ideas")
    if not rows:
        return UNMEASURED
    patterns, cells = found(rows, "pattern", PATTERNS), []
    for idea in dict.fromkeys(row["idea"] for row in rows):
        own = [[row for row in rows if (row["idea"], row["pattern"]) == (idea, pattern)] for pattern in patterns]
        cells.append([idea, *map(reached, own)])
    said = "Accuracy in percent / relative error of the logits of held-out training images / seconds."
    return table(["", *patterns], cells) + f"\n\n{said}"
