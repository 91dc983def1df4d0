"""What is saved keeps to its pattern, exactly, whatever the pattern, the scores and the way to set the survivors."""

import tempfile
from pathlib import Path

import safetensors.torch
import torch
from helpers import TinyCNN, randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import snows
from snows import methods
from snows.cli import run_folder
from snows.masks.saliency import SALIENCIES

N_M = st.sampled_from(
    [snows.NM(1, 2), snows.NM(1, 4), snows.NM(3, 4), snows.NM(1, 2, {"gate": "1:4", "stem": "dense"})]
)
SHARES = st.builds(
    snows.Unstructured,
    st.floats(0.1, 0.5),
    allocation=st.sampled_from(["global", "uniform", "erk"]),
    normalise=st.booleans(),
    layer_sparsity=st.sampled_from([{}, {"gate": 0.5, "fc": "dense"}]),
)
METHODS = {"mask_alg": st.sampled_from(list(SALIENCIES)), "algo": st.sampled_from(list(methods.METHODS))}
MODEL = randomise(TinyCNN())
IMAGES = torch.randn(6, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def saved(pattern, mask_alg, algo, schedule=1):
    """(state, masks) as the run's folder holds them."""
    options = snows.Options(batch_size=3, max_CG_iterations=2, schedule=schedule, joint_steps=1, joint_CG_iterations=1)
    pruned = snows.prune(MODEL, IMAGES, pattern, options, mask_alg=mask_alg, algo=algo)
    with tempfile.TemporaryDirectory() as folder:
        run_folder.save(Path(folder), pruned, {})
        names = ("model.safetensors", "masks.safetensors")
        return [safetensors.torch.load_file(Path(folder) / name) for name in names]


@settings(max_examples=25, deadline=None)
@given(pattern=N_M, **METHODS)
def test_every_group_keeps_n_of_m(pattern, mask_alg, algo):
    state, masks = saved(pattern, mask_alg, algo)
    for name, mask in masks.items():
        rule = pattern.of(name)
        kept = (state[f"{name}.weight"] != 0).movedim(1, -1).unflatten(-1, (-1, rule.m)).sum(-1)
        assert (kept <= rule.n).all()
        assert (mask.movedim(1, -1).unflatten(-1, (-1, rule.m)).sum(-1) == rule.n).all()
        assert not state[f"{name}.weight"][~mask].any()


@settings(max_examples=25, deadline=None)
@given(pattern=SHARES, **METHODS)
def test_as_many_weights_are_zero_as_were_asked_for(pattern, mask_alg, algo):
    parameters = [name for name, _ in MODEL.named_parameters()]
    wanted = round(pattern.target_sparsity * sum(MODEL.get_parameter(name).numel() for name in parameters))
    state, masks = saved(pattern, mask_alg, algo)
    assert sum((state[name] == 0).sum().item() for name in parameters) >= wanted
    assert sum((~mask).sum().item() for mask in masks.values()) == wanted
    assert all(not state[f"{name}.weight"][~mask].any() for name, mask in masks.items())
    if pattern.layer_sparsity:
        assert (~masks["gate"]).sum() == masks["gate"].numel() / 2
        assert "fc" not in masks
