"""The variants of the loop: their gradients, their noise draws, and what the command compares."""

import pytest
import torch
from torch.autograd import grad

from experiments import gradient_step
from experiments.gradient_step import SHORT, Variant, open_variant
from models.sampling import new_scheduler

TWO = Variant((999, 600), 1.0, 2)


def test_the_command(run_experiment):
    loops = {"one": SHORT, "two": SHORT._replace(graph_steps=2), "draws": SHORT._replace(draws=2)}
    result = run_experiment(
        "gradient_step",
        explored={"start": Variant((999, 800))},
        loops=loops,
        more_loops={"more": TWO},
        contrasts=(("two", "one"), ("draws", "one")),
        reference="one",
    )
    # two updates of four pictures
    assert {name: found["unet_calls"] for name, found in result["loops"].items()} == pytest.approx(
        {"one": 8 * 3, "two": 8 * 3, "draws": 8 * 3.25, "start": 8 * 2, "more": 8 * 2}
    )
    assert list(result["tests"]) == ["two vs. one", "draws vs. one"]
    spreads = [spread for _, spread in result["starts"].values()]
    assert len(set(spreads)) == 4 and all(spread > 0 for spread in spreads)


def sample_gradients(study, *variants: Variant) -> list[torch.Tensor]:
    """Of a picture's latents by the prompt, for each variant."""
    found = []
    for variant in variants:
        varied = open_variant(study, variant)
        cond = varied.session.generator.encode(["a photo of a crane"]).requires_grad_()
        settings = varied.session.training_sampling
        latents = varied.session.generator.sample(cond, torch.tensor([1000]), settings)
        found.append(grad(latents.square().sum(), cond)[0])
    return found


def test_a_plain_variant_is_the_methods_own_loop(study):
    settings = study.session.training_sampling._replace(timesteps=(999, 600), guidance_scale=1.0)
    cond = study.session.generator.encode(["a photo of a crane"]).requires_grad_()
    expected = grad(
        study.session.generator.sample(cond, torch.tensor([1000]), settings).square().sum(), cond
    )[0]
    assert torch.equal(*sample_gradients(study, TWO._replace(graph_steps=1)), expected)


def test_more_steps_with_a_graph_and_the_stop_gradient(study):
    """With the stop-gradient two steps' gradient is the sum of what either gives with the other's
    prompt fixed.
    """
    one, two, stopped = sample_gradients(
        study, TWO._replace(graph_steps=1), TWO, TWO._replace(stop_gradient=True)
    )
    assert (two - one).norm() > 1e-3 * one.norm() and (two - stopped).norm() > 1e-3 * two.norm()
    generator, settings = study.session.generator, study.session.training_sampling
    cond = generator.encode(["a photo of a crane"])
    first, last = (cond.clone().requires_grad_() for _ in range(2))
    scheduler = new_scheduler(generator.scheduler, settings._replace(timesteps=(999, 600)), [1000])
    latents = (
        generator.initial_noise([torch.Generator().manual_seed(1000)], settings)
        * scheduler.init_noise_sigma
    )
    for t, own in zip(scheduler.timesteps, (first, last), strict=True):
        noise = generator.predict_noise(scheduler.scale_model_input(latents, t).detach(), t, own)
        latents = scheduler.step(noise, t, latents).prev_sample
    expected = sum(grad(latents.square().sum(), (first, last)))
    assert (stopped - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    "count, draws, shared",
    [
        (6, 2, [0, 1, 2, 0, 1, 2]),
        (5, 2, [0, 1, 2, 0, 1]),
        (7, 2, [0, 1, 2, 0, 1, 2, 6]),
        (9, 3, [0, 1, 2] * 3),
    ],
)
def test_noise_draws_stay_with_their_prompt(count, draws, shared):
    assert gradient_step.share_trajectories([i % 3 for i in range(count)], draws) == shared
    # two classes in a batch
    both = [f"{name} {i % 3}" for name in ("crane", "jaguar") for i in range(count)]
    assert gradient_step.share_trajectories(both, draws) == shared + [count + i for i in shared]


def test_noise_draws_share_a_trajectory(study):
    """Two draws of one trajectory are nearer to each other than to another seed's, and not the
    same.
    """
    varied = open_variant(study, Variant((999, 300), 1.0, draws=2))
    settings = varied.session.training_sampling
    with torch.no_grad():
        cond = varied.session.generator.encode(["a photo of a crane"]).expand(4, -1, -1)
        latents = varied.session.generator.sample(cond, torch.arange(1000, 1004), settings).flatten(
            1
        )
    distances = torch.cdist(latents, latents)
    assert (
        0 < distances[0, 1] < 0.7 * distances[0, 2] and 0 < distances[2, 3] < 0.7 * distances[3, 1]
    )


@pytest.mark.parametrize("batch_size", [1, 5])
def test_gradients_at_the_start_are_of_every_class_alone(study, batch_size):
    both, *alone = (
        gradient_step.measure_gradients(
            study._replace(
                session=study.session.with_settings(class_index=classes, batch_size=batch_size)
            ),
            1,
        )
        for classes in ("7,8", "7", "8")
    )
    assert both.shape[0] == 2 and (both - torch.cat(alone)).norm() < 1e-4 * both.norm()
