"""What a person sees of a run: a bar or a line per layer while it goes, and a table at its end."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from snows.cli.flags import as_flags
from snows.errors import by_reason
from snows.result import JOINT, LayerRecord


class Progress:
    """One bar over the layers on a terminal, a line per layer elsewhere; "verbose": both, "quiet": neither.

    earlier: layers that were finished before this run went on; they are not shown again.
    """

    def __init__(self, name: str, style: str = "", earlier: int = 0):
        terminal = sys.stdout.isatty()
        self.lines = style == "verbose" or (style == "" and not terminal)
        self.bar = tqdm(
            desc=name,
            unit="layer",
            initial=earlier,
            dynamic_ncols=True,
            file=sys.stdout,
            disable=style == "quiet" or not terminal,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n}/{total} layers, {remaining} left{postfix}",
        )
        self.earlier, self.products, self.joint = earlier, 0.0, False

    def __call__(self, layer: LayerRecord, layers: int) -> None:
        self.bar.total = layers
        self.products += layer.products
        if self.earlier > 0:
            self.earlier -= 1
            return
        again, self.joint = layer.joint and self.joint, layer.joint
        if self.lines and not again:
            tqdm.write(line(layer), file=sys.stdout)
        elif layer.problem and not self.bar.disable:
            self.bar.clear()  # the warning above it stays
        self.bar.set_postfix_str(f"{self.products:.0f} products, {layer.name}{losses(layer)}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def losses(layer: LayerRecord) -> str:
    return f" {layer.loss_before:.3g} -> {layer.loss_after:.3g}" if layer.newton_steps else ""


def line(layer: LayerRecord) -> str:
    """What is said of a finished layer."""
    text = f"  {JOINT:<40}" if layer.joint else f"  {layer.name:<28} {layer.sparsity:6.1%} zero"
    if layer.products:
        text += f"   loss {layer.loss_before:9.3g} -> {layer.loss_after:9.3g}"
        text += f"   {layer.newton_steps} steps, {layer.cg_iterations:3d} CG iterations"
    if layer.products and not layer.joint:
        text += f", {layer.seconds:6.1f} s"
    if layer.problem:
        text += f"   not solved: {as_flags(layer.problem)}"
    if layer.accuracy is not None:
        text += f"   accuracy {percent(layer.accuracy)}"
    return text


def percent(accuracy: float | None) -> str:
    return "not measured" if accuracy is None else f"{accuracy:.2f} %"


def kinds(names: Iterable[str]) -> str:
    """Layer names, those that differ in numbers alone put together: "blocks.*.mlp.fc1 (12), head"."""
    counts = Counter(re.sub(r"\d+(?=.*\.)", "*", name) for name in names)
    return ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in counts.items())


def summary(metrics: dict, folder: Path) -> str:
    """The closing table: dense, masked only, pruned, beside the dense network; what was left dense or not solved."""
    rows = [("dense", "dense_", "dense_sparsity"), ("masked only", "masked_", "sparsity")]
    if metrics["algo"] != "MP":
        rows.append((metrics["algo"], "", "sparsity"))
    lines = ["", f"  {'':<12} {'accuracy':>12} {'agreement':>12} {'logit error':>12} {'zeros':>9}"]
    for name, which, zeros in rows:
        own, agreement, error = (metrics.get(which + what) for what in ("accuracy", "agreement", "logit_error"))
        logits = "" if error is None else f"{error:.3g}"
        as_dense = "" if agreement is None else percent(agreement)
        lines += [f"  {name:<12} {percent(own):>12} {as_dense:>12} {logits:>12} {metrics[zeros]:9.2%}"]
    lines += ["", f"  {metrics['seconds']:.0f} s, {metrics['curvature_products']:.0f} curvature products"]
    if metrics["left_dense"]:
        reasons: dict[str, list[str]] = {reason: [] for reason in metrics["left_dense"].values()}
        for name, reason in metrics["left_dense"].items():
            reasons[reason].append(name)
        lines += ["  left dense:", *(f"    {kinds(names)}: {reason}" for reason, names in reasons.items())]
    lines += [f"  saved in {folder}"]
    if metrics["problems"]:
        lines += [f"  not solved, weights as they were: {as_flags(by_reason(metrics['problems']))}"]
    return "\n".join(lines)
