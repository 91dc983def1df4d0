"""The tables that a newcomer should see first."""

from cells import WAYS, average, load, table


def default(arch: str) -> str:
    """A run without flags."""
    run = next(row for row in load("defaults") if row["arch"] == arch)
    rows = [
        ["dense", run["dense_accuracy"], f"{run['dense_sparsity']:.0%}"],
        ["masked only", run["masked_accuracy"], f"{run['sparsity']:.0%}"],
        ["SNOWS", run["accuracy"], f"{run['sparsity']:.0%}"],
    ]
    spent = f"\n\n{run['seconds']:.0f} s, {run['curvature_products']:.0f} products."
    return table(["", "accuracy %", "zeros"], rows) + spent


def headline() -> str:
    """What a newcomer should see first: five rows, each figure the mean over the seeds that there are."""
    every = load("resnet20_cifar10_accuracy")
    resnet = [row for row in every if row["images"] == 1024 and not row["flags"]]
    vit = [row for row in load("compare_vit_2048") if row["mask"] == "MP"]
    best = {"ResNet-20": (every, is_most), "ViT": (load("end_to_end_vit_cifar10"), is_most_vit)}
    patterns = ("unstructured 0.8", "unstructured 0.9", "2:4", "1:4")
    sources = [("ResNet-20", resnet, pattern, "algo", "MP") for pattern in patterns]
    sources.append(("ViT", vit, "1:4", "way", "alone"))
    lines, seeds, images = [], set(), {}
    for network, rows, pattern, column, mask in sources:
        ways = [[row for row in rows if (row["pattern"], row[column]) == (pattern, way)] for way in (mask, *WAYS[1:])]
        held, chosen = best[network]
        ways += [[row for row in held if row["pattern"] == pattern and chosen(row, mixed)] for mixed in (False, True)]
        means = [average(way, "accuracy") for way in ways]
        lines.append([network, pattern, ways[0][0]["dense_accuracy"], *means])
        seeds |= {len(way) for way in ways[2:] if way}
        images[network] = f"{rows[0]['images']:,} ({network})"
    said = f"Accuracy in percent on {vit[0]['test_images']:,} test images of CIFAR-10; calibration images: "
    said += f"{', '.join(images.values())}; last columns: 3,000 (ResNet-20), `--mask_alg ALPS`, under N:M `--permute`, "
    said += "in the very last `--mixtures 1` too, with two Newton steps a layer and, at 0.8 and 0.9, `--schedule 4` "
    said += "(ResNet-20); the ViT under SNOWS in one pass without joint steps; "
    said += f"SNOWS: means over {min(seeds)} to {max(seeds)} seeds."
    head = ["network", "pattern", "dense", "mask only (MP)", "MP+", "SNOWS", "SNOWS, masks by ALPS", "and mixtures"]
    return table(head, lines) + f"\n\n{said}"


def is_most(row: dict, mixtures: bool) -> bool:
    """Whether a row of `cifar10.py accuracy` has 3,000 images and the best masks, in the best order under N:M.

    Rows of more effort besides would not average with those.
    """
    chosen = "--mask_alg ALPS" in row["flags"] and ("--permute" in row["flags"]) == (":" in row["pattern"])
    more = any(flag in row["flags"] for flag in ("--joint_steps", "--joint_stages"))
    return row["images"] == 3000 and chosen and not more and ("--mixtures 1" in row["flags"]) == mixtures


def is_most_vit(row: dict, mixtures: bool) -> bool:
    """The same of `end_to_end.py vit_cifar10`, with as many images as the other columns."""
    masks = "best, permuted, masks by ALPS" if ":" in row["pattern"] else "best, masks by ALPS"
    return (row["images"], row["method"]) == (2048, masks + ", mixtures" * mixtures)
