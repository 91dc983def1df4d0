"""All the layers solved at once: the objective against a dense reference, its preconditioner, and the pass in a job."""

import copy

import pytest
import torch
from references import DenseReference, build_jointly, tiny_vit

import snows
from snows.calibration.streams import Streams
from snows.methods import snows_with
from snows.network.network import Network
from snows.solve.cg import conjugate_gradients
from snows.solve.curvature import Curvature
from snows.solve.joint import joint_objective
from snows.solve.preconditioner import joint_inverses
from snows.solve.solver import solve

ONE_STEP = dict(newton_steps=1, max_CG_iterations=1, cg_tolerance=0.0, damping=1e-3, batching=False)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_products_equal_the_dense_matrix_of_all_the_layers(tiny, images, curvature, biases):
    objective, dense, theta = build_jointly(tiny, images, snows.Options(curvature=curvature, biases=biases))
    assert objective.loss(dense) < 1e-20
    expected = DenseReference(objective, theta)
    here = Curvature(objective, theta)
    vector = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(here.loss, expected.loss)
    torch.testing.assert_close(here.gradient, expected.gradient)
    torch.testing.assert_close(here.matvec(vector), expected.matrix(curvature) @ vector)


def test_products_equal_the_dense_matrix_through_a_transformer():
    images = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective, _, theta = build_jointly(tiny_vit(), images, layers=lambda name: name.startswith("blocks."))
    expected = DenseReference(objective, theta)
    here = Curvature(objective, theta)
    vector = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(here.gradient, expected.gradient)
    torch.testing.assert_close(here.matvec(vector), expected.gauss_newton @ vector)


def test_products_look_at_the_sampled_images_and_the_gradient_at_all(tiny, images):
    whole, _, theta = build_jointly(tiny, images, snows.Options(joint_images=0, curvature_images=1))  # a layer's own
    some, _, _ = build_jointly(tiny, images, snows.Options(joint_images=1))
    here, all_of_them = Curvature(some, theta), Curvature(whole, theta)
    torch.testing.assert_close((here.loss, here.gradient), (all_of_them.loss, all_of_them.gradient))
    assert len(images) == 5
    assert here.share == 2 / 5
    vector = torch.ones_like(theta)
    expected = all_of_them.operators[0].matvec(vector)
    torch.testing.assert_close(here.matvec(vector), 5 / 2 * expected)
    _, stats = solve(some, theta, torch.ones_like(theta), None, snows.Options(**ONE_STEP))
    assert stats.products == pytest.approx(2 / 5)


@pytest.mark.parametrize("targets", ["dense", "same"])
def test_targets_where_a_layer_in_front_is_pruned_and_not_solved(tiny, images, targets):
    network = Network(tiny)
    streams = Streams(network, list(images.split(2)), "cpu")
    network.model.stem.weight.data[0] = 0
    objective = joint_objective(network.layers[1:], streams, snows.Options(targets=targets))
    expected = tiny
    if targets == "same":
        expected = copy.deepcopy(tiny)
        expected.stem.weight.data[0] = 0
    logits = torch.cat([objective.targets(i)[-1] for i in range(len(objective))])
    torch.testing.assert_close(logits, expected(images))


def test_the_unknown_is_every_layer_in_order(tiny, images):
    objective, _, theta = build_jointly(tiny, images)
    weights, updates = objective.variables.unpack(theta)
    assert [tuple(w.shape) for w in weights] == [(4, 2, 3, 3), (4, 2, 3, 3), (4, 4, 1, 1), (3, 4)]
    assert [len(update) for update in updates] == [4, 4, 4, 3]
    assert torch.equal(objective.variables.pack(weights)[: 4 * 19].view(4, 19)[:, :18], weights[0].flatten(1))
    assert theta.numel() == sum(w.numel() for w in weights) + sum(update.numel() for update in updates)


def test_its_preconditioner_knows_the_layers_scales_and_saves_products(tiny, images):
    objective, dense, _ = build_jointly(tiny, images)
    mask = torch.rand(dense.shape, generator=torch.Generator().manual_seed(5)) < 0.7
    start = dense * mask
    inverse = joint_inverses(objective, start, mask, seed=0)
    matrix = torch.stack([inverse(row) for row in torch.eye(len(dense), dtype=torch.float64) * mask])
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix[mask][:, mask]).min() > 0
    assert not matrix[:, ~mask].any()
    here = Curvature(objective, start)
    right_side, product = -here.gradient * mask, lambda v: here.matvec(v) * mask
    plain, found = (conjugate_gradients(product, right_side, each, 0.0, 1e-3, 300) for each in (None, inverse))
    assert found.iterations < 0.7 * plain.iterations
    # The model at equal effort: how far the quadratic falls in five products.
    fall = [dot_fall(here, conjugate_gradients(product, right_side, each, 0.0, 0.0, 5)) for each in (None, inverse)]
    assert fall[1] > fall[0]


def dot_fall(here, cg):
    return -(here.gradient @ cg.step + cg.step @ cg.product / 2)


@pytest.mark.parametrize("pattern", [snows.NM(2, 4), snows.Unstructured(0.5)])
def test_the_joint_steps_lower_the_loss_on_the_masks_as_they_are(tiny, images, pattern):
    first = snows.prune(tiny, images, pattern, snows.Options(joint_steps=0))
    both = snows.prune(tiny, images, pattern, snows.Options(joint_steps=2))
    assert all(torch.equal(first.masks[name], both.masks[name]) for name in first.masks)
    for name, mask in both.masks.items():
        assert not both.model.get_parameter(f"{name}.weight")[~mask].any()
    joint = [record for record in both.layers if record.sweep == both.layers[-1].sweep]
    assert [record.name for record in joint] == list(both.masks)
    assert joint[0].loss_after < joint[0].loss_before
    # What is written is what was solved: the pruned network's own loss, its BatchNorms' biases included.
    for result, loss in ((first, joint[0].loss_before), (both, joint[0].loss_after)):
        network = Network(tiny)
        layers = [layer for layer in network.layers if layer.name in both.masks]
        streams = Streams(network, [images], "cpu")
        network.model.load_state_dict(result.model.state_dict())
        objective = joint_objective(layers, streams, snows.Options())
        theta = objective.variables.pack([network.model.get_parameter(layer.parameter) for layer in layers])
        assert objective.loss(theta).item() == pytest.approx(loss, rel=1e-9)


def test_a_job_goes_on_inside_and_behind_the_joint_steps(tiny, images):
    options, steps = snows.Options(schedule=1), []
    whole = snows.prune(tiny, images, snows.NM(2, 4), options, listener=lambda step, job: steps.append(step))
    count = len(whole.masks)
    assert len(steps) == 3 * count
    for kept in (2 * count, 2 * count + 1, 3 * count):
        resumed, again = go_on(tiny, images, options, steps[:kept])
        assert again == (0 if kept == 3 * count else count)  # of joint steps, all or none
        for (name, ours), reference in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, reference), name


def go_on(model, images, options, finished):
    """(the pruned network, the number of steps that were not finished yet)"""
    steps = []
    pruned = snows.prune(
        model, images, snows.NM(2, 4), options, listener=lambda step, job: steps.append(step), finished=finished
    )
    return pruned, sum(not step.replayed for step in steps)


def test_joint_steps_that_are_not_finite_keep_the_weights(tiny, images, caplog):
    def solver(objective, *problem):
        if len(objective.window.layers) > 1:
            raise FloatingPointError("a curvature product is not finite")
        return solve(objective, *problem)

    kept = snows.prune(tiny, images, snows.NM(2, 4), snows.Options(), algo=snows_with(solver))
    plain = snows.prune(tiny, images, snows.NM(2, 4), snows.Options(joint_steps=0))
    assert all(torch.equal(a, b) for a, b in zip(kept.model.parameters(), plain.model.parameters(), strict=True))
    assert "the layers keep their weights: a curvature product is not finite" in caplog.text
    assert kept.problems == {"all layers together": "a curvature product is not finite"}
    assert plain.problems == {}


def test_iterations_are_counted_once_for_all_the_layers(tiny, images):
    options = snows.Options(schedule=0, joint_steps=2, batch_size=5)
    pruned = snows.prune(tiny, images, snows.NM(2, 4), options)
    assert pruned.cg_iterations == pruned.curvature_products
    assert pruned.cg_iterations > sum(layer.cg_iterations for layer in pruned.layers if not layer.joint)


def test_a_layer_that_is_removed_altogether_takes_part(tiny, images):
    masks = {"stem": torch.zeros(4, 2, 3, 3, dtype=torch.bool), "gate": torch.ones(4, 4, 1, 1, dtype=torch.bool)}
    for biases in (True, False):
        options = snows.Options(joint_steps=2, batch_size=5, biases=biases)
        pruned = snows.prune(tiny, images, masks, options)
        assert not pruned.problems
        assert not pruned.model.stem.weight.any()


def test_running_out_of_memory_in_the_joint_steps_halves_the_micro_batch(tiny, images, caplog):
    tried = []

    def solver(objective, *problem):
        if len(objective.window.layers) > 1:
            tried.append(len(objective))
            if len(tried) == 1:
                raise MemoryError
        return solve(objective, *problem)

    pruned = snows.prune(tiny, images, snows.NM(2, 4), snows.Options(batch_size=4), algo=snows_with(solver))
    assert tried == [2, 3]
    assert "out of memory at the joint steps" in caplog.text
    assert pruned.layers[-1].batch_size == 2
