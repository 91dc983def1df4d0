"""Jobs on a device that is not the CPU, where there is none: every tensor that should be there must be there.

tests/test_device.py runs this file in a process of its own, since torch can register such a device once. Its tensors
hold one of the CPU each, and compute on it; operations that mix them with tensors of the CPU fail as they do on a GPU.
"""

from collections import Counter

import pytest
import torch
from helpers import TinyCNN, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import backend_registration

import snows
from snows.calibration.store import Store
from snows.calibration.streams import Streams
from snows.masks.permute import permute
from snows.network.network import Network
from snows.result import Step
from snows.solve.layer import update_layer
from snows.zoo.evaluate import accuracy

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no devices written in Python", allow_module_level=True)
backend_registration._setup_privateuseone_for_python_backend("pretend")

copied = Counter()  # bytes that went from the CPU to the device, by type
BETWEEN_DEVICES = ("aten::_to_copy", "aten::copy_")  # from one device to the other
NUMBERS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")  # whose results are Python's own


class Pretend(Tensor):
    """A tensor of the device `pretend`, and the tensor of the CPU that it stands for."""

    @staticmethod
    def __new__(cls, held: Tensor):
        strides, offset = held.stride(), held.storage_offset()
        tensor = Tensor._make_wrapper_subclass(
            cls, held.shape, strides, offset, dtype=held.dtype, device=torch.device("pretend:0")
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return on_device(operation, *args, **(kwargs or {}))

    def tolist(self):
        return self.held.tolist()


def mapped(change, values):
    """Arguments or results of an operation, tensors changed; lists of them are all that an operation nests."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, (list, tuple)):
        return type(values)([mapped(change, value) for value in values])
    return values


def on_device(operation, *args, **kwargs):
    """What an operation gives on the device, computed on the CPU."""
    name, tensors = operation._schema.name, []
    mapped(tensors.append, [*args, *kwargs.values()])
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    # As on a GPU, single numbers may come from the CPU, and so may indices into a tensor of the device.
    indices = name.startswith("aten::index") and isinstance(tensors[0], Pretend)
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.ndim]
    if ours and strangers and not indices and name not in BETWEEN_DEVICES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if name in BETWEEN_DEVICES:
        up = strangers if name == "aten::_to_copy" else [args[1]] if ours and ours[0] is args[0] and strangers else []
        copied.update({tensor.dtype: tensor.nbytes for tensor in up})
    to_host = "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cpu"
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    held_args = mapped(held, args)
    held_kwargs = {key: mapped(held, value) for key, value in kwargs.items()}
    if name == "aten::_efficientzerotensor":  # has no storage to hold
        return Pretend(torch.zeros(*held_args, **held_kwargs))
    result = operation(*held_args, **held_kwargs)
    if name in NUMBERS or (to_host and ours):
        return result
    if name.removesuffix(".out").endswith("_"):
        return args[0]
    wrappers = {id(tensor.held): tensor for tensor in ours}
    return mapped(lambda tensor: wrappers[id(tensor)] if id(tensor) in wrappers else Pretend(tensor), result)


def held(tensor):
    return tensor.held if isinstance(tensor, Pretend) else tensor


library = torch.library.Library("_", "IMPL")
library.fallback(on_device, "PrivateUse1")  # for operations that have no tensor of the device to go by yet

HALF, ONE_OF_TWO = snows.Unstructured(0.5), snows.NM(1, 2)
JOBS = {
    "the defaults": (HALF, "MP", "SNOWS", {}),
    "the exact Hessian": (ONE_OF_TWO, "MP", "SNOWS", {"curvature": "hessian"}),
    "the paper's choices": (HALF, "MP", "SNOWS", {"batching": True, "targets": "same", "preconditioner": "none"}),
    "a warm start": (ONE_OF_TWO, "Wanda", "SNOWS", {"w_warm": True, "curvature_images": 2, "joint_images": 2}),
    "masks by the loss": (HALF, "OBS", "SNOWS", {"depth_weights": "mean", "biases": False}),
    "SparseGPT": (ONE_OF_TWO, "SparseGPT", "SparseGPT", {}),
    "SNOWS on SparseGPT": (HALF, "SparseGPT", "SNOWS", {}),
    "SNOWS on ALPS": (HALF, "ALPS", "SNOWS", {}),
    "least squares": (ONE_OF_TWO, "MP", "MP+", {}),
}


class Functional(nn.Module):
    """Weights that functions read, where a stream once kept what they were before their layer was solved."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.tied, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.tied.weight
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)))
        x = x.flatten(2).transpose(1, 2)  # (n, 16, 4)
        x = x + torch.tanh(self.again(torch.tanh(self.tied(x))))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return F.linear(x.mean(1), self.head.weight, self.head.bias)


class Transformer(nn.Module):
    """A block as torchvision writes it: its attention's projections are functions on the module's parameters."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(2, 4, 2, stride=2), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), nn.Linear(4, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)  # (n, 4, 4)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


NETWORKS = {"modules": TinyCNN, "functions": Functional, "a transformer": Transformer}


def network(name):
    return randomise(NETWORKS[name]())


def test_tensors_of_both_devices_do_not_mix():
    here, there = torch.ones(2), torch.ones(2, device="pretend")
    for mixed in (lambda: here + there, lambda: here @ there, lambda: here[there > 0], lambda: there.dot(here)):
        with pytest.raises(RuntimeError):
            mixed()


# Every job on modules; on the other networks, those that read what their functions hold.
PAIRS = [(job, "modules") for job in JOBS]
PAIRS += [(job, kind) for kind in list(NETWORKS)[1:] for job in ("the defaults", "SNOWS on SparseGPT")]


@pytest.mark.parametrize(("job", "kind"), PAIRS)
def test_a_job_on_a_device_gives_what_it_gives_on_the_cpu(images, job, kind):
    pattern, mask_alg, algo, changes = JOBS[job]
    options = snows.Options(batch_size=2, schedule=1, max_CG_iterations=3, joint_steps=1, joint_CG_iterations=2)
    job = (network(kind), images[:3], pattern, options.but(**changes))  # a micro-batch of two and one of one
    ours, reference = (snows.prune(*job, mask_alg=mask_alg, algo=algo, device=d) for d in ("pretend", "cpu"))
    for name, weight in reference.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight, rtol=1e-9, atol=1e-9)
    for name, mask in ours.masks.items():  # both are where the caller's model is
        assert not weight_of(ours.model, name)[~mask].any()


def weight_of(model, name):
    state = model.state_dict()
    return state[f"{name}.weight"] if f"{name}.weight" in state else state[f"{name}_weight"]


@pytest.mark.parametrize(
    ("room", "kind"), [*((room, "modules") for room in ("device", "host", "files")), ("files", "a transformer")]
)
def test_where_features_lie_makes_no_difference(images, kind, room, tmp_path, monkeypatch):
    options = snows.Options(batch_size=2, max_CG_iterations=2, schedule=1, joint_steps=1, cache_dir=str(tmp_path))
    reference = snows.prune(network(kind), images, ONE_OF_TWO, options).model.state_dict()
    stores = []

    def small(device, device_bytes, host_bytes, cache_dir):
        bounds = {"device": (2**40, 2**40), "host": (0, 2**40), "files": (0, 0)}[room]
        stores.append(Store(device, *bounds, cache_dir))
        return stores[0]

    monkeypatch.setattr(snows.calibration.streams, "Store", small)
    ours = snows.prune(network(kind), images, ONE_OF_TWO, options, device="pretend").model.state_dict()
    for name, weight in reference.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-9, atol=1e-9)
    assert stores[0].most[room] > 0


@pytest.mark.parametrize("index", range(4))
def test_in_a_newton_step_inputs_and_targets_go_up_at_most_once(tiny, images, index):
    """All that a default step asks for: coefficients, preconditioner, linearisation, products, line search."""
    options = snows.Options(batch_size=2)
    streams = Streams(Network(tiny, "pretend"), list(images.split(2)), "pretend", options)
    layer = streams.network.layers[index]
    weight = streams.network.model.get_parameter(layer.parameter)
    copied.clear()
    update = update_layer(layer, weight.abs() > weight.abs().mean(), streams, options)
    assert update.stats.products > 0
    assert copied[torch.float64] <= 2 * images.nbytes  # the images of either stream; nothing that follows from them
    assert copied[torch.int8] > 0  # the signs of the probes


RESUMED = {
    "the defaults": (HALF, "MP", "SNOWS", {"schedule": 1}),
    "masks as they are for two sweeps": (ONE_OF_TWO, "MP", "SNOWS", {"schedule": 0, "sweeps": 2, "biases": False}),
    "SNOWS on SparseGPT": (ONE_OF_TWO, "SparseGPT", "SNOWS", {"schedule": 0, "sweeps": 2}),
    "SparseGPT": (ONE_OF_TWO, "SparseGPT", "SparseGPT", {}),
}


@pytest.mark.parametrize("job", RESUMED)
def test_a_job_on_a_device_goes_on_from_steps_on_the_host(tiny, images, job):
    """As a journal holds them: in the first sweep, in the last one, behind it, and within the joint steps."""
    pattern, mask_alg, algo, changes = RESUMED[job]
    options = snows.Options(batch_size=5, max_CG_iterations=2, joint_steps=1, joint_CG_iterations=2).but(**changes)
    job = (tiny, images, pattern, options)
    how = {"mask_alg": mask_alg, "algo": algo, "layers": lambda name: name != "stem"}
    steps, reference = [], snows.prune(*job, **how)

    def keep(step, job):
        bias_update = None if step.bias_update is None else step.bias_update.cpu()
        steps.append(Step(step.record, step.mask.cpu(), step.weight.cpu(), bias_update))

    snows.prune(*job, **how, device="pretend", listener=keep)
    assert len(steps) == len(reference.layers)
    for count in {1, len(steps) // 2, len(steps) - 4, len(steps) - 1}:
        resumed = snows.prune(*job, **how, device="pretend", finished=steps[:count])
        for name, weight in reference.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=1e-9, atol=1e-9)
        assert all(torch.equal(mask, reference.masks[name]) for name, mask in resumed.masks.items())


def test_a_permuted_network_on_a_device_gives_what_it_gives_on_the_cpu(images):
    model = randomise(nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 3)))
    permuted = permute(model, snows.NM(2, 4))
    assert permuted.kept
    options = snows.Options(batch_size=2, max_CG_iterations=2, joint_steps=1, joint_CG_iterations=2)
    job = (permuted.model, images, snows.NM(2, 4), options)
    ours, reference = (snows.prune(*job, device=device).model.state_dict() for device in ("pretend", "cpu"))
    for name, weight in reference.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-9, atol=1e-9)


def test_accuracy_is_measured_on_a_device(tiny, images):
    labels = tiny(images).argmax(1)
    assert accuracy(tiny, [(images[:3], labels[:3]), (images[3:], labels[3:])], "pretend") == 100


def test_a_script_runs_on_a_device(script, tmp_path):
    flags = ["--schedule", 0, "--k_step", 1, "--max_CG_iterations", 1, "--joint_steps", 1, "--joint_CG_iterations", 1]
    flags += ["--device", "pretend", "--ngrads", 4, "--layers_to_prune", "head", "--skip_evaluation"]
    flags += ["--min_samples", 0, "--out_dir", tmp_path / "run"]
    printed = script("VIT_pruning/prune_NM.py", *flags).out
    assert "SNOWS" in printed
    assert (tmp_path / "run" / "model.safetensors").exists()
