"""What torch's packed 2:4 weights are on a GPU, on the CPU: two values of four and their places, unpacked to multiply.

As torch's, it keeps two of four whatever it is given, takes inputs that lie in one piece alone, and knows no other
operation than products.
"""

import torch
import torch.nn.functional as F


class Packed(torch.Tensor):
    @staticmethod
    def __new__(cls, values, places, turned=False):
        """values, places: (out, in / 4, 2). turned: whether it is the weight's transpose."""
        shape = (len(values), 4 * values.shape[1])
        shape = shape[::-1] if turned else shape
        packed = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=values.dtype, device=values.device)
        packed.values_, packed.places, packed.turned = values, places, turned
        return packed

    def unpacked(self):
        """The weight, or its transpose, as it was."""
        weight = torch.zeros(*self.places.shape[:-1], 4, dtype=self.dtype)
        weight = weight.scatter_(-1, self.places, self.values_).flatten(1)
        return weight.T if self.turned else weight

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        return PRODUCTS[func.overloadpacket](*args)


def pack(weight):
    groups = weight.unflatten(1, (-1, 4))
    places = (groups != 0).int().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    return Packed(groups.gather(-1, places), places)


def linear(x, weight, bias=None):
    rows = x.view(-1, x.shape[-1])
    return F.linear(rows, weight.unpacked(), bias).view(*x.shape[:-1], -1)


PRODUCTS = {
    torch.ops.aten.detach: lambda weight: Packed(weight.values_, weight.places, weight.turned),
    torch.ops.aten.t: lambda weight: Packed(weight.values_, weight.places, not weight.turned),
    torch.ops.aten.addmm: lambda bias, x, weight: torch.addmm(bias, x, weight.unpacked()),
    torch.ops.aten.mm: lambda x, weight: torch.mm(x, weight.unpacked()),
    torch.ops.aten.linear: linear,
}
