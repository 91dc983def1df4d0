"""Dimensions that must stand in one order, and what operations on values make of them.

A slot is a dimension of a parameter or buffer, as ("conv.weight", 0). Each value of a trace has a slot for each of its
own dimensions; what is computed number by number of two values makes one set of the slots that meet.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torchvision
from timm.layers import pad_same
from torch import fx

from snows.network.known import ELEMENTWISE, NAMESPACES
from snows.network.trace import SHAPES

Slot = tuple[str, int]
FIXED: Slot = ("", 0)  # images, positions, and all else whose order must stay
ONE: Slot = ("", 1)  # a dimension of size 1, which goes with any other


@dataclass(frozen=True)
class Value:
    """The slots of a value's dimensions; unless it is whole there may be more on the left, whose order must stay."""

    slots: tuple[Slot, ...] = ()
    whole: bool = True

    def slot(self, dim: int) -> Slot:
        """That of a dimension counted from the right, as -1."""
        return self.slots[dim] if len(self.slots) >= -dim else FIXED

    def dims(self, given: Any) -> list[int]:
        """Dimensions counted from either end, one or several, counted from the left."""
        return [dim % len(self.slots) for dim in (given if isinstance(given, Sequence) else [given])]


NUMBER, UNKNOWN = Value(), Value(whole=False)


class Slots:
    """Which slots make one set (union-find)."""

    def __init__(self):
        self.parent: dict[Slot, Slot] = {FIXED: FIXED}

    def find(self, slot: Slot) -> Slot:
        """The slot that stands for a set."""
        while self.parent.setdefault(slot, slot) != slot:
            self.parent[slot] = slot = self.parent[self.parent[slot]]
        return slot

    def unite(self, *slots: Slot) -> Slot:
        """Make one set of several slots; returns one of them."""
        sized = [slot for slot in slots if slot != ONE]
        for slot in sized:
            self.parent[self.find(slot)] = self.find(sized[0])
        return sized[0] if sized else ONE

    def free(self) -> list[list[Slot]]:
        """The sets whose order is not fixed."""
        sets: dict[Slot, list[Slot]] = {}
        for slot in list(self.parent):
            sets.setdefault(self.find(slot), []).append(slot)
        return [slots for slots in sets.values() if FIXED not in slots]

    def fix(self, value: Value, dims: Iterable[int]) -> Value:
        """A value some dimensions of which keep their order."""
        slots = list(value.slots)
        for dim in dims:
            slots[dim] = self.unite(FIXED, slots[dim])
        return Value(tuple(slots), value.whole)

    def broadcast(self, values: list[Value]) -> Value:
        """What is computed number by number of several values, whose dimensions are aligned on the right."""
        rank = max(len(value.slots) for value in values)
        padded = [(ONE if v.whole else FIXED,) * (rank - len(v.slots)) + v.slots for v in values]
        return Value(tuple(self.unite(*slots) for slots in zip(*padded)), all(value.whole for value in values))

    def merge(self, slots: Iterable[Slot]) -> Slot:
        """Several dimensions as one, whose order is that of the only one that has a size, if there is but one."""
        sized = [slot for slot in slots if slot != ONE]
        return self.unite(*sized) if len(sized) < 2 else self.unite(FIXED, *sized)


# What operations make of the values that they read; None where that is not understood.
Rule = Callable[[Slots, fx.Node, list[Value]], "Value | None"]


ALIASES = {"dim": "axis", "keepdim": "keepdims"}  # NumPy's names, which torch takes too


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """What a call is given, by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, node.kwargs.get(ALIASES.get(name, name), default))


def several(node: fx.Node, name: str) -> Any:
    """What a call is given as (1, 2) or as 1, 2."""
    given = node.args[1:] or node.kwargs.get(name, ())
    return given[0] if len(given) == 1 and isinstance(given[0], Sequence) else given


def elementwise(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    return slots.broadcast(values)


def layer_norm(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    """Over the last dimension alone: its weight and bias meet the value as in a product."""
    shape = argument(node, 1, "normalized_shape")
    return slots.broadcast(values) if isinstance(shape, Sequence) and len(shape) == 1 else None


def pooled(slots: Slots, value: Value, size: Any = None) -> Value | None:
    """What is computed of the positions of each channel alone; size: of the result, where that is known."""
    if len(value.slots) < 3:
        return None
    value = slots.fix(value, (-2, -1))
    return Value((*value.slots[:-2], ONE, ONE), value.whole) if size in (1, (1, 1)) else value


def pool(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    flagged = any(each is True for each in (*node.args, *node.kwargs.values()))  # it may return the indices too
    return None if flagged or len(values) > 1 else pooled(slots, values[0])


def adaptive_pool(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    flagged = any(each is True for each in (*node.args, *node.kwargs.values()))
    return None if flagged or len(values) > 1 else pooled(slots, values[0], argument(node, 1, "output_size"))


def pad(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    amounts, value = argument(node, 1, "pad"), values[0]
    if not isinstance(amounts, Sequence) or len(amounts) > 2 * len(value.slots):
        return None
    return slots.fix(value, [-1 - i // 2 for i, amount in enumerate(amounts) if amount != 0])


def pad_positions(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    return pooled(slots, values[0]) if len(values) == 1 else None


def flattened(slots: Slots, value: Value, start: int, end: int) -> Value | None:
    if not value.whole:
        slots.fix(value, range(len(value.slots)))
        return Value((FIXED, FIXED)) if (start, end) == (1, -1) else None
    first, last = value.dims((start, end))
    merged = slots.merge(value.slots[first : last + 1])
    return Value((*value.slots[:first], merged, *value.slots[last + 1 :]))


def flatten(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    return flattened(slots, values[0], argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1))


def reshape(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    """Other dimensions, whose order is fixed; but (n, -1) is a flattening, and (1, -1, 1) lays a vector out anew."""
    sizes, value = several(node, "shape"), values[0]
    if not all(isinstance(size, (int, fx.Node)) for size in sizes) or isinstance(sizes[-1], fx.Node):
        return None
    if len(sizes) == 2 and sizes[1] == -1 and is_first_size(sizes[0], node.args[0]):
        return flattened(slots, value, 1, -1)
    if value.whole and sum(size != 1 for size in sizes) == sum(slot != ONE for slot in value.slots) == 1:
        return Value(tuple(ONE if size == 1 else slots.merge(value.slots) for size in sizes))
    slots.fix(value, range(len(value.slots)))
    return Value((FIXED,) * len(sizes))


def is_first_size(size: Any, value: fx.Node) -> bool:
    """Whether a size is read as value.size(0) or value.shape[0]."""
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return size.args == (value, 0)
    shape, *index = size.args if size.target is operator.getitem else [None]
    return isinstance(shape, fx.Node) and shape.target is getattr and (*shape.args, *index) == (value, "shape", 0)


def permute(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    value, dims = values[0], several(node, "dims")
    if value.whole and len(value.slots) == len(dims):
        return Value(tuple(value.slots[dim] for dim in dims))
    slots.fix(value, range(len(value.slots)))
    return Value((FIXED,) * len(dims))


def transpose(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    value, given = values[0], [argument(node, 1, "dim0"), argument(node, 2, "dim1")]
    if not value.whole:
        return None
    (one, other), order = value.dims(given), list(value.slots)
    order[one], order[other] = order[other], order[one]
    return Value(tuple(order))


def reduced(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    """A mean or the like, which is the same in any order of what it is taken over."""
    value, dims = values[0], argument(node, 1, "dim")
    if not value.whole or len(values) > 1:
        return None
    gone = range(len(value.slots)) if dims is None else value.dims(dims)
    if argument(node, 2, "keepdim", False):
        return Value(tuple(ONE if i in gone else slot for i, slot in enumerate(value.slots)))
    return Value(tuple(slot for i, slot in enumerate(value.slots) if i not in gone))


def unsqueeze(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    value, dim = values[0], argument(node, 1, "dim")
    if not value.whole:
        return None
    place = dim % (len(value.slots) + 1)
    return Value((*value.slots[:place], ONE, *value.slots[place:]))


def expand(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    """A value repeated along its dimensions of size 1, and along new ones."""
    sizes, value = several(node, "size"), values[0]
    if not value.whole or len(sizes) < len(value.slots):
        return None
    padded = (ONE,) * (len(sizes) - len(value.slots)) + value.slots
    return Value(tuple(FIXED if slot == ONE and size not in (1, -1) else slot for slot, size in zip(padded, sizes)))


def concatenated(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    """Values side by side along a dimension, which keeps its order."""
    ranks = {len(value.slots) if value.whole else None for value in values}
    dim = argument(node, 1, "dim", 0)
    if len(ranks) > 1 or None in ranks:
        return None
    (place,) = values[0].dims(dim)
    values = [slots.fix(value, [place]) for value in values]
    together = slots.broadcast(values)
    return Value((*together.slots[:place], FIXED, *together.slots[place + 1 :]))


def item(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    """Parts of a value along some dimensions, which keep their order."""
    value, index = values[0], node.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if value == NUMBER:
        return NUMBER
    if not value.whole or not all(isinstance(each, (int, slice)) for each in index) or len(index) > len(value.slots):
        return None
    touched = [dim for dim, each in enumerate(index) if each != slice(None)]
    kept = slots.fix(value, touched).slots
    return Value(
        tuple(
            FIXED if dim in touched else slot
            for dim, slot in enumerate(kept)
            if dim >= len(index) or isinstance(index[dim], slice)
        )
    )


def attribute_read(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    return NUMBER if node.args[1] in SHAPES else None


def number(slots: Slots, node: fx.Node, values: list[Value]) -> Value | None:
    return NUMBER


BY_NAME: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(("add", "sub", "mul", "div", "truediv", "true_divide", "maximum", "minimum", "pow"), elementwise),
    **dict.fromkeys(("neg", "abs", "exp", "sqrt", "rsqrt", "square", "clamp", "clip", "erf"), elementwise),
    **dict.fromkeys(("dropout", "dropout2d", "contiguous", "clone", "detach"), elementwise),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("max_pool2d", "avg_pool2d"), pool),
    **dict.fromkeys(("adaptive_avg_pool2d", "adaptive_max_pool2d"), adaptive_pool),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), reduced),
    **dict.fromkeys(("reshape", "view"), reshape),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenated),
    **{"pad": pad, "flatten": flatten, "permute": permute, "transpose": transpose, "unsqueeze": unsqueeze},
    **{"expand": expand, "getitem": item},
}
FUNCTIONS: dict[Any, Rule] = {
    getattr(space, name): rule for name, rule in BY_NAME.items() for space in (*NAMESPACES, operator)
    if hasattr(space, name)
}  # fmt: skip
FUNCTIONS |= {pad_same: pad_positions, torchvision.ops.stochastic_depth: elementwise, getattr: attribute_read}
METHODS: dict[Any, Rule] = {**BY_NAME, **dict.fromkeys(SHAPES - {"shape"}, number)}
