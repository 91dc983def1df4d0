"""What tests of several rooms share: the checkout's folder, a tiny network, and weights away from their defaults."""

from pathlib import Path

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ROOT = Path(__file__).resolve().parent.parent


class TinyCNN(nn.Module):
    """Everything that goes wrong, small: a shared in-place ReLU, a residual sum, groups, BatchNorms, a smooth gate."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(4)
        self.gate = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        y = self.bn2(self.grouped(x))
        y += x
        y = self.relu(y)
        y = y * torch.sigmoid(self.gate(y))
        return self.fc(y.mean((2, 3)))


def randomise(model, seed=0):
    """Weights, statistics and affine parameters that are all away from their defaults, in float64, ready to prune."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


class OnceDifferentiable(Function):
    """A square without a forward-mode derivative, whose backward pass torch cannot differentiate, either."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient
