"""The variants of the loop: their gradients, their other draws, and which one is recommended."""

import pytest
import torch

from evaluation.statistics import Proportion
from experiments import gradient_step
from experiments.gradient_step import Variant
from method.losses import cross_entropy
from method.training import Batch, token_gradient
from prompt_datasets import TEMPLATES

ONE, TWO, DRAWS = Variant("one", (999, 600)), Variant("two", (999, 600), 2), Variant("draws", (999, 600), 1, 2)


def test_the_command(run_experiment, settings):
    result = run_experiment("gradient_step", settings, "--updates", "1", "--images", "1", "--epoch_size", "4",
                            variants=(ONE, TWO, DRAWS, ONE._replace(name="paper's", timesteps=None)))
    one, two, draws, paper = result["results"]
    assert two["mb_per_trajectory"] > 1.1 * one["mb_per_trajectory"]
    assert 1.5 < draws["mb_per_trajectory"] / one["mb_per_trajectory"] < 2.5
    assert draws["spread"] != one["spread"]
    assert paper["mb_per_trajectory"] == pytest.approx(one["mb_per_trajectory"], rel=0.01)


def make_result(successes: int, seconds: float, graph_steps: int = 1) -> dict:
    return {"right": Proportion(successes, 100), "seconds_per_update": seconds, "graph_steps": graph_steps, "draws": 1}


def test_recommended_is_the_fastest_of_those_as_good_that_run_py_knows():
    best, good, fast, other = make_result(88, 3), make_result(85, 2), make_result(70, 1), make_result(90, 1, 5)
    assert gradient_step.recommend_variant([fast, good, best]) == (best, good)
    assert gradient_step.recommend_variant([fast, good, best, other]) == (other, good)
    assert gradient_step.recommend_variant([fast, other]) == (other, fast)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_one_step_with_a_graph_is_the_methods_gradient(lab, batch_size):
    generator, (target,) = lab.get_generator(), lab.targets
    vectors = generator.initial_vectors("a")
    lab = lab._replace(config=gradient_step.replace(lab.config, epoch_size=5))
    found = gradient_step.measure_gradient(lab, target, vectors, 2, ONE, batch_size)
    inserted, seeds = vectors.expand(3, 1, -1).clone().requires_grad_(), torch.arange(5) + lab.config.seed + 10
    token_gradient(generator, cross_entropy(lab.get_guide()), inserted,
                   Batch([template.format(f"newclas {target.name}") for template in TEMPLATES], torch.arange(5) % 3,
                         seeds, torch.full((5,), target.index), torch.full((5,), 1 / 5)),
                   lab.drawer.sampling._replace(timesteps=ONE.timesteps), batch_size)
    assert (found - inserted.grad.sum(0)).norm() / found.norm() < 1e-4


def test_more_steps_with_a_graph_draw_the_same_and_change_the_gradient(lab):
    one, two = (gradient_step.measure_gradient(lab, lab.targets[0], lab.get_generator().initial_vectors("a"), 0,
                                               variant, batch_size=4) for variant in (ONE, TWO))
    assert (one - two).norm() > 1e-3 * one.norm()


def test_other_draws_start_from_their_own_trajectory(lab):
    """The first of a trajectory's draws is what no draws at all give; all draws are of the same picture."""
    generator, sampling = lab.get_generator(), lab.drawer.sampling._replace(timesteps=(999, 300))
    with torch.no_grad():
        cond = generator.encode(["a photo of a crane", "a photo of a palm"])
        one, three = (gradient_step.draw_latents(generator, cond, [1000, 1001], sampling, 1, draws) for draws in (1, 3))
    assert torch.equal(three[:2], one) and len(three) == 6
    others = three[2:].view(2, 2, *one.shape[1:])  # [draw, trajectory, 4, h, w]
    assert (others[0] - others[1]).abs().mean() > 0.01  # other noise
    assert ((others - one).flatten(2).norm(dim=2) < 0.7 * (others - one.flip(0)).flatten(2).norm(dim=2)).all()
