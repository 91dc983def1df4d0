"""What weights are worth, against dense float64 references, and the masks that come of it."""

import pytest
import torch
from helpers import randomise
from references import build
from torch import nn

import snows
from snows.calibration.stream import Stream
from snows.masks.rules import rule_of
from snows.masks.saliency import SALIENCIES, scores
from snows.masks.sparsegpt import damped_inverse
from snows.network.network import Network
from snows.solve.curvature import Curvature

LAYERS = ("stem", "grouped", "gate", "fc")


def scored(model, images, mask_alg, **changes):
    network = Network(model)
    stream = Stream(network, network.model, list(images.split(2)), "cpu")
    return scores(SALIENCIES[mask_alg], network.layers, stream, snows.Options(**changes))


def inputs_of(model, images):
    """Layer name -> the input that the model's own forward pass hands it."""
    found, handles = {}, []
    for name in LAYERS:

        def keep(module, args, name=name):
            found[name] = args[0].detach().clone()

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    model(images)
    for handle in handles:
        handle.remove()
    return found


def dense_columns(x, layer):
    """(groups, in, positions) of a layer's input."""
    if isinstance(layer, nn.Linear):
        return x.T[None]
    patches = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding)
    return patches.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)


@pytest.mark.parametrize("mask_alg", ["Wanda", "SparseGPT"])
def test_layer_wise_scores_equal_their_formulas(tiny, images, mask_alg):
    got, seen = scored(tiny, images, mask_alg), inputs_of(tiny, images)
    assert set(got) == set(LAYERS)
    for name in LAYERS:
        layer = tiny.get_submodule(name)
        x, weight = dense_columns(seen[name], layer), layer.weight.flatten(1)
        for row in range(len(weight)):
            columns = x[row * len(x) // len(weight)]
            moment = columns @ columns.T / columns.shape[1]
            expected = weight[row].abs() * moment.diagonal().sqrt()
            if mask_alg == "SparseGPT":
                damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
                expected = weight[row].square() / damped.inverse().diagonal()
            torch.testing.assert_close(got[name].flatten(1)[row], expected)


def test_obs_is_the_rise_of_the_loss_of_each_weight():
    """One linear map and K = 0: the quadratic model is the loss itself, and g is 1 whatever the random signs."""
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))
    images = torch.randn(20, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got, target = scored(model, images, "OBS", k_step=0)["1"], model(images)
    rises = torch.zeros_like(got)
    for row in range(3):
        for column in range(8):
            without = model[1].weight.detach().clone()
            without[row, column] = 0
            rises[row, column] = (images.flatten(1) @ without.T + model[1].bias - target).square().sum()
    torch.testing.assert_close(got / got.sum(), rises / rises.sum())


def test_obs_follows_the_diagonal_of_the_k_step_hessian(tiny, images):
    """Of the last layer, where g is the same for every output and A is exact."""
    objective, dense, _ = build(tiny, images, 3, 4, "hessian")  # fc, the last layer
    here = Curvature(objective, dense)
    basis = torch.eye(dense.numel(), dtype=torch.float64)
    diagonal = torch.stack([here.matvec(vector)[i] for i, vector in enumerate(basis)]).view(tiny.fc.weight.shape)
    exact = tiny.fc.weight.detach().square() * diagonal
    got = scored(tiny, images, "OBS")["fc"]
    torch.testing.assert_close(got / got.sum(), exact / exact.sum())


@pytest.mark.parametrize("k_step", [0, 1, 2])
def test_obs_weighs_each_output_by_what_the_k_steps_behind_make_of_it(k_step):
    """g against all the Jacobians; its estimate from random signs is within a third, and g differs by a hundred."""
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 6)))
    with torch.no_grad():
        model[3].weight *= torch.tensor([0.03, 0.3, 3.0, 30.0])
    images = torch.randn(256, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, scale = images.flatten(1), torch.zeros(4, dtype=torch.float64)
    for depth in range(k_step + 1):
        behind = model[2 : 2 + depth]
        features = behind(model[1](x))
        jacobian = torch.func.vmap(torch.func.jacrev(behind))(model[1](x))  # (images, features, 4)
        scale += jacobian.square().sum((0, 1)) / features.square().sum()
    expected = model[1].weight.square() * scale[:, None] * x.square().mean(0)
    got = scored(model, images, "OBS", k_step=k_step)["1"]
    torch.testing.assert_close(got / got.sum(), (expected / expected.sum()).detach(), rtol=0.35, atol=0)


def test_a_map_with_more_inputs_than_an_inverse_may_have_is_refused_by_sparsegpt_alone(images, monkeypatch):
    monkeypatch.setattr("snows.network.inputs.MAX_INPUTS", 16)
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(32, 4)))
    for mask_alg in ("Wanda", "OBS"):
        assert snows.prune(model, images, snows.NM(1, 2), mask_alg=mask_alg, algo="MP").masks
    with pytest.raises(
        snows.UsageError, match="SparseGPT needs the inputs of every layer, and those of 1 are more than"
    ):
        snows.prune(model, images, snows.NM(1, 2), algo="SparseGPT")


@pytest.mark.parametrize("mask_alg", ["Wanda", "SparseGPT", "OBS"])
def test_scores_do_not_depend_on_inputs_that_are_never_there(tiny, images, mask_alg):
    images[:, 1] = 0
    got = scored(tiny, images, mask_alg)["stem"]
    assert torch.isfinite(got).all()
    assert (got[:, 1] < 0.1 * got[:, 0].mean()).all()


def test_a_moment_of_zeros_has_an_inverse():
    assert torch.isfinite(damped_inverse(torch.zeros(2, 3, 3, dtype=torch.float64))).all()


@pytest.mark.parametrize("mask_alg", ["Wanda", "SparseGPT", "ALPS", "OBS"])
@pytest.mark.parametrize("pattern", [snows.NM(1, 2), snows.Unstructured(0.6)], ids=str)
@pytest.mark.parametrize("algo", ["MP", "SparseGPT", "SNOWS"])
def test_every_mask_is_kept_to_and_solved_in_every_way(tiny, images, mask_alg, pattern, algo):
    options = snows.Options(batch_size=2, schedule=int(algo == "SNOWS"))
    pruned = snows.prune(tiny, images, pattern, options, mask_alg=mask_alg, algo=algo)
    for name, mask in pruned.masks.items():
        weight = pruned.model.get_submodule(name).weight
        assert (weight[~mask] == 0).all()
        if algo == "MP":
            assert torch.equal(weight, tiny.get_submodule(name).weight * mask)
        if isinstance(pattern, snows.NM):
            assert (mask.unflatten(1, (-1, 2)).sum(2) == 1).all()
        elif mask_alg == "Wanda":
            assert mask.flatten(1).sum(1).max() - mask.flatten(1).sum(1).min() <= 1
    if isinstance(pattern, snows.Unstructured):
        removed = sum((~mask).sum().item() for mask in pruned.masks.values())
        assert removed == round(0.6 * sum(p.numel() for p in tiny.parameters()))


@pytest.mark.parametrize("pattern", [snows.NM(1, 2), snows.NM(3, 4)], ids=str)
def test_under_nm_obs_chooses_as_wanda_does(tiny, images, pattern):
    """Its factor for each output row changes no order within a group: bench/compare.py runs only one of the two."""
    wanda, obs = (snows.prune(tiny, images, pattern, mask_alg=by, algo="MP").masks for by in ("Wanda", "OBS"))
    assert wanda.keys() == obs.keys()
    assert all(torch.equal(wanda[name], obs[name]) for name in wanda)


@pytest.mark.parametrize("mask_alg", ["SparseGPT", "ALPS", "OBS"])
def test_a_job_whose_masks_images_choose_goes_on_to_the_same_result(tiny, images, mask_alg):
    options, steps = snows.Options(batch_size=2, schedule=1, sweeps=1), []
    job = (tiny, images, snows.NM(1, 4), options)
    whole = snows.prune(*job, mask_alg=mask_alg, listener=lambda step, job: steps.append(step))
    resumed = snows.prune(*job, mask_alg=mask_alg, finished=steps[:3])
    assert len(steps) == 3 * len(whole.masks)
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, resumed.model.get_parameter(name))


def test_masks_that_images_choose_need_images_and_layers_that_show_theirs(tiny):
    for mask_alg in ("Wanda", "ALPS"):
        with pytest.raises(snows.UsageError, match="calibration images are needed"):
            snows.prune(tiny, None, snows.NM(1, 2), mask_alg=mask_alg, algo="MP")
    with pytest.raises(snows.UsageError, match="nothing for OBS to choose"):
        snows.prune(tiny, None, {"fc": torch.ones(3, 4)}, mask_alg="OBS")
    with pytest.raises(snows.UsageError, match="'magic' is not one of MP, Wanda"):
        snows.prune(tiny, None, snows.NM(1, 2), mask_alg="magic")


class Own(nn.Conv2d):
    """A convolution that does something of its own with its input."""

    def forward(self, x):
        return super().forward(x.abs())


@pytest.mark.parametrize("method", [{"mask_alg": "Wanda"}, {"algo": "SparseGPT"}], ids=str)
def test_a_layer_that_hides_its_inputs_is_refused_by_name(images, method, monkeypatch):
    monkeypatch.setattr("snows.network.trace.get_notrace_modules", lambda: [Own])
    model = nn.Sequential(Own(2, 4, 1), nn.Flatten(), nn.Linear(64, 2)).double()
    with pytest.raises(snows.UsageError, match=r"inputs of every layer, and those of 0 cannot be unfolded.*`layers`"):
        snows.prune(model, images, snows.NM(1, 2), **method)
    pruned = snows.prune(model, images, snows.NM(1, 2), layers=lambda name: name != "0", **method)
    assert list(pruned.masks) == ["2"]


def test_inputs_that_are_not_finite_end_in_one_line(tiny, images):
    tiny.bn.bias.data[0] = float("inf")
    with pytest.raises(snows.SnowsError, match="inputs of layer grouped hold NaN or infinity"):
        snows.prune(tiny, images, snows.NM(1, 2), mask_alg="Wanda", algo="MP")


@pytest.mark.parametrize("how", [{"algo": "SparseGPT"}, {"mask_alg": "ALPS"}], ids=str)
def test_a_layer_whose_inputs_are_not_finite_keeps_its_masked_weight_and_the_others_are_solved(how, caplog):
    class Bursts(nn.Module):
        def forward(self, x):
            return x / 0

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.burst, self.bursts = nn.Linear(8, 4), nn.Linear(8, 4), Bursts()

        def forward(self, x):
            x = x.flatten(1)
            return self.whole(x) + torch.nan_to_num(self.burst(self.bursts(x)), 0.0, 0.0, 0.0)

    model, images = randomise(Beside()), torch.randn(32, 2, 2, 2, dtype=torch.float64)
    options = snows.Options(schedule=0, joint_steps=0, min_samples=0)
    pruned = snows.prune(model, images, snows.NM(2, 4), options, **how)
    assert pruned.problems == {"burst": "its inputs hold NaN or infinity"}
    assert "layer burst keeps its masked weights: the inputs of layer burst hold NaN or infinity" in caplog.text
    assert pruned.model.burst.weight.equal(model.burst.weight * pruned.masks["burst"])
    assert not pruned.model.whole.weight.equal(model.whole.weight * pruned.masks["whole"])


def test_the_scores_halve_the_micro_batch_where_memory_runs_out(tiny, images, monkeypatch, caplog):
    wanted = snows.prune(tiny, images, snows.NM(1, 2), snows.Options(batch_size=5), mask_alg="Wanda", algo="MP")
    columns = snows.network.inputs.layer_columns

    def small_memory(network, layer, x):
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return columns(network, layer, x)

    monkeypatch.setattr(snows.masks.saliency, "layer_columns", small_memory)
    got = snows.prune(tiny, images, snows.NM(1, 2), snows.Options(batch_size=5), mask_alg="Wanda", algo="MP")
    assert all(torch.equal(got.masks[name], mask) for name, mask in wanted.masks.items())
    assert caplog.messages[-1] == "out of memory at the scores: going on with micro-batches of 2 images"


class Auxiliary(nn.Module):
    """A head that is for training alone, with the most of the weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.aux, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 200), nn.Linear(4, 3)
        self.head.register_parameter("temperature", nn.Parameter(torch.ones(5)))  # nor is this, but its module runs

    def forward(self, x):
        x = torch.relu(self.conv(x)).mean((2, 3))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_a_target_sparsity_counts_what_runs_and_says_once_what_does_not(images, caplog):
    model, options = randomise(Auxiliary()), snows.Options(schedule=2, batch_size=5)
    pruned = snows.prune(model, images, snows.Unstructured(0.5), options)
    running = [p for module in (model.conv, model.head) for p in module.parameters()]
    removed = sum((~mask).sum().item() for mask in pruned.masks.values())
    assert removed == round(0.5 * sum(p.numel() for p in running))
    assert pruned.left_dense == {"aux": "the traced forward pass does not use it"}
    said = [message for message in caplog.messages if "does not use" in message]
    assert len(said) == 1
    assert "1000 of the 1032 parameters (in aux)" in said[0]
    caplog.clear()
    assert set(snows.prune(model, images, snows.NM(1, 2), options, algo="MP").masks) == {"conv", "head"}
    assert not caplog.messages


def test_a_rule_by_name_beats_a_pattern_and_the_first_pattern_the_others():
    rules = {"layer*": 1, "layer1.*": 2, "layer1.conv": 3}
    assert [rule_of(name, rules) for name in ("layer1.conv", "layer1.fc", "fc")] == [3, 1, None]


@pytest.mark.parametrize("mask_alg", SALIENCIES)
def test_scores_of_layers_compare_as_shares_where_they_are_in_units_of_their_own(tiny, images, mask_alg):
    def kept(normalise):
        chosen = snows.choose_masks(tiny, images, snows.Unstructured(0.5, 1.0, normalise=normalise), mask_alg=mask_alg)
        return {name: int(mask.sum()) for name, mask in chosen.masks.items()}

    assert kept(None) == kept(SALIENCIES[mask_alg].layer_wise)
    assert kept(True) != kept(False)
