"""Jobs on a device that is not the CPU, where there is none: every tensor that should be there must be there.

tests/test_device.py runs this file in a process of its own, since torch can register such a device once. Its tensors
hold one of the CPU each, and compute on it; operations that mix them with tensors of the CPU fail as they do on a GPU.
"""

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

import snows
from snows.evaluate import accuracy
from snows.result import Step

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no devices written in Python", allow_module_level=True)
backend_registration._setup_privateuseone_for_python_backend("pretend")

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


def on_device(operation, *args, **kwargs):
    """What an operation gives on the device, computed on the CPU."""
    name, tensors = operation._schema.name, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    # As on a GPU, single numbers may come from the CPU, and so may indices into a tensor of the device.
    indices = name.startswith("aten::index") and isinstance(tensors[0], Pretend)
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.ndim]
    if ours and strangers and not indices and name not in BETWEEN_DEVICES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    to_host = "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cpu"
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    held_args, held_kwargs = tree_map_only(Pretend, lambda tensor: tensor.held, (args, kwargs))
    if name == "aten::_efficientzerotensor":  # has no storage to hold
        return Pretend(torch.zeros(*held_args, **held_kwargs))
    result = operation(*held_args, **held_kwargs)
    if name in NUMBERS or (to_host and ours):
        return result
    if name.removesuffix(".out").endswith("_"):
        return args[0]
    wrappers = {id(tensor.held): tensor for tensor in ours}
    return tree_map_only(
        Tensor, lambda tensor: wrappers[id(tensor)] if id(tensor) in wrappers else Pretend(tensor), result
    )


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
    "least squares": (ONE_OF_TWO, "MP", "MP+", {}),
}


def test_tensors_of_both_devices_do_not_mix():
    here, there = torch.ones(2), torch.ones(2, device="pretend")
    for mixed in (lambda: here + there, lambda: here @ there, lambda: here[there > 0], lambda: there.dot(here)):
        with pytest.raises(RuntimeError):
            mixed()


@pytest.mark.parametrize("job", JOBS)
def test_a_job_on_a_device_gives_what_it_gives_on_the_cpu(tiny, images, job):
    pattern, mask_alg, algo, changes = JOBS[job]
    options = snows.Options(batch_size=2, max_CG_iterations=3, joint_steps=1, joint_CG_iterations=2).but(**changes)
    job = (tiny, images, pattern, options)
    ours, reference = (snows.prune(*job, mask_alg=mask_alg, algo=algo, device=d) for d in ("pretend", "cpu"))
    for name, weight in reference.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight)
    for name, mask in ours.masks.items():  # both are where the caller's model is
        assert not ours.model.get_submodule(name).weight[~mask].any()


RESUMED = {
    "the defaults": (HALF, "MP", "SNOWS", {"schedule": 1}),
    "masks as they are for two sweeps": (ONE_OF_TWO, "MP", "SNOWS", {"schedule": 0, "sweeps": 2, "biases": False}),
    "SNOWS on SparseGPT": (ONE_OF_TWO, "SparseGPT", "SNOWS", {"schedule": 0, "sweeps": 2}),
    "SparseGPT": (ONE_OF_TWO, "SparseGPT", "SparseGPT", {}),
}


@pytest.mark.parametrize("job", RESUMED)
def test_a_job_on_a_device_goes_on_from_steps_on_the_host(tiny, images, job):
    """As a journal holds them; from every prefix: in the first sweep, the last one, and the joint steps."""
    pattern, mask_alg, algo, changes = RESUMED[job]
    options = snows.Options(batch_size=5, max_CG_iterations=2, joint_steps=1, joint_CG_iterations=2).but(**changes)
    job = (tiny, images, pattern, options)
    how = {"mask_alg": mask_alg, "algo": algo, "layers": lambda name: name != "stem"}
    steps, reference = [], snows.prune(*job, **how)

    def keep(step, model):
        shift = None if step.shift is None else step.shift.cpu()
        steps.append(Step(step.record, step.mask.cpu(), step.weight.cpu(), shift))

    snows.prune(*job, **how, device="pretend", on_step=keep)
    assert len(steps) == len(reference.layers)
    for count in range(len(steps) + 1):
        resumed = snows.prune(*job, **how, device="pretend", finished=steps[:count])
        for name, weight in reference.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=1e-9, atol=1e-9)
        assert all(torch.equal(mask, reference.masks[name]) for name, mask in resumed.masks.items())


def test_accuracy_is_measured_on_a_device(tiny, images):
    labels = tiny(images).argmax(1)
    assert accuracy(tiny, [(images[:3], labels[:3]), (images[3:], labels[3:])], "pretend") == 100


def test_a_script_runs_on_a_device(script, tmp_path):
    flags = ["--schedule", 0, "--k_step", 1, "--max_CG_iterations", 1, "--joint_steps", 1, "--joint_CG_iterations", 1]
    flags += ["--device", "pretend", "--ngrads", 4, "--out_dir", tmp_path / "run"]
    printed = script("VIT_pruning/prune_NM.py", *flags).out
    assert "SNOWS" in printed
    assert (tmp_path / "run" / "model.safetensors").exists()
