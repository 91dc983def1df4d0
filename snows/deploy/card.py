"""The model card of a folder for the Hugging Face hub: what was pruned, how, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping

CITATION = """\
```bibtex
@inproceedings{lucas2025preserving,
  title     = {Preserving Deep Representations in One-Shot Pruning: A Hessian-Free Second-Order Optimization Framework},
  author    = {Lucas, Ryan and Mazumder, Rahul},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}
```
"""


def card(lines: Mapping[str, str], library: str, load: str) -> str:
    """Markdown under the heading that the hub reads.

    lines: what there is to say of the network, by its name. library: whose network it is. load: the call that loads it.
    """
    table = "\n".join(f"| {name} | {text} |" for name, text in lines.items())
    return (
        f"---\nlibrary_name: {library}\ntags: [image-classification, pruning, sparsity]\n---\n"
        f"# {lines.get('network', 'A network')}, pruned\n\nPruned in one shot by SNOWS. Load it with `{load}`.\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n## Citation\n\n{CITATION}"
    )
