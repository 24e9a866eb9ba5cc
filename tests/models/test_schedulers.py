"""Every scheduler of diffusers, in many configurations: equal to its pipeline's pictures, or
refused in one line.
"""

import inspect
import json

import diffusers
import pytest
import torch
from torch.overrides import TorchFunctionMode

from models.generator import load_generator
from models.loading import SCHEDULER_CHANGES
from models.sampling import SCHEDULERS, scheduler_class
from tests.conftest import SCHEDULER
from tests.models.pipelines import (
    PROMPTS,
    SEEDS,
    SETTINGS,
    as_pipeline,
    draw_by_ours,
    draw_by_pipeline,
)
from utils import ROOT, UserError

SPACINGS = [{"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")]
KINDS = [{"prediction_type": kind} for kind in ("v_prediction", "sample")]
SIGMAS = [{f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")]
ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}
SOLVERS = [
    {"solver_order": 1},
    {"solver_order": 3},
    {"final_sigmas_type": "sigma_min"},
    {"lower_order_final": False},
]
VARIANTS = {
    "PNDMScheduler": [*SPACINGS, KINDS[0], {"skip_prk_steps": False}, {"set_alpha_to_one": True}],
    "DDIMScheduler": [
        *SPACINGS,
        *KINDS,
        ZERO_SNR,
        {"set_alpha_to_one": False},
        {"thresholding": True},
        {"steps_offset": 0},
        {"clip_sample": True},
    ],
    "DDIMParallelScheduler": [{}],
    "DDPMParallelScheduler": [{}],
    "DDPMScheduler": [
        *SPACINGS,
        *KINDS,
        {"variance_type": "fixed_large"},
        {"clip_sample": True},
        {"steps_offset": 3},
    ],
    "DPMSolverMultistepScheduler": [
        *SPACINGS,
        *KINDS,
        *SIGMAS,
        *SOLVERS,
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"solver_type": "heun"},
        {"euler_at_final": True},
        {"use_lu_lambdas": True},
        {"thresholding": True},
    ],
    "DPMSolverSinglestepScheduler": [
        {},
        KINDS[0],
        SIGMAS[0],
        {"solver_order": 3},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ],
    "DPMSolverSDEScheduler": [{}, SIGMAS[0]],
    "DEISMultistepScheduler": [{}, KINDS[0], SIGMAS[0], {"solver_order": 3}],
    "UniPCMultistepScheduler": [
        {},
        *KINDS,
        *SIGMAS,
        {"solver_type": "bh1"},
        {"solver_order": 3},
        {"final_sigmas_type": "sigma_min"},
        {"predict_x0": False},
    ],
    "EulerDiscreteScheduler": [
        *SPACINGS,
        KINDS[0],
        *SIGMAS,
        ZERO_SNR,
        {"final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    ],
    "EulerAncestralDiscreteScheduler": [*SPACINGS, KINDS[0], ZERO_SNR],
    "HeunDiscreteScheduler": [{}, KINDS[0], *SIGMAS, {"timestep_spacing": "trailing"}],
    "KDPM2DiscreteScheduler": [{}, KINDS[0], SIGMAS[0]],
    "KDPM2AncestralDiscreteScheduler": [{}, SIGMAS[0]],
    "LMSDiscreteScheduler": [{}, KINDS[0], SIGMAS[0]],
    "IPNDMScheduler": [{}],
    "SASolverScheduler": [{}, {"predictor_order": 3}, SIGMAS[0]],
    "LCMScheduler": [{}, KINDS[0], {"original_inference_steps": 30}],
    "TCDScheduler": [{}, KINDS[0], {"original_inference_steps": 30}],
}
TABLE = [(name, changes) for name, variants in VARIANTS.items() for changes in variants]
TOTAL = 60


@pytest.fixture(scope="module")
def generator(tiny_model):
    """One for all: nothing here changes more of it than its scheduler."""
    return load_generator(tiny_model, "cpu", torch.float32)


def find_schedulers() -> set[str]:
    kinds = {
        name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")
    }
    return {name for name, kind in kinds.items() if isinstance(kind, type)} | {
        "DPMSolverSDEScheduler"
    }


def skip_without_torchsde(name: str):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")


def make_scheduler(name: str, **changes):
    """SD 1.4's scheduler_config.json, changed, read by another class."""
    return getattr(diffusers, name).from_config({**SCHEDULER, **changes})


def test_table_is_long_and_names_every_accepted_scheduler():
    assert len(TABLE) >= TOTAL and set(VARIANTS) == set(SCHEDULERS)
    assert set(SCHEDULERS) <= find_schedulers()


@pytest.mark.parametrize(
    "name, changes", TABLE, ids=lambda value: json.dumps(value) if value else "default"
)
def test_pictures_equal_the_pipelines(generator, name, changes):
    skip_without_torchsde(name)
    reference = make_scheduler(name, **changes)
    generator.scheduler = type(reference).from_config(reference.config, **SCHEDULER_CHANGES)
    assert {key: reference.config[key] for key in changes} == changes
    if name == "DPMSolverSDEScheduler":  # the pipeline would draw a seed of its own
        reference.register_to_config(noise_sampler_seed=SEEDS)
        reference.noise_sampler_seed = SEEDS
    try:
        theirs = draw_by_pipeline(as_pipeline(generator, reference))
    except Exception:
        theirs = torch.tensor(torch.nan)
    if not theirs.isfinite().all():  # what the pipeline cannot draw is refused
        with pytest.raises(UserError):
            generator.check_sampling(SETTINGS)
        return
    generator.check_sampling(SETTINGS)
    assert (draw_by_ours(generator) - theirs).abs().max() < 1e-4


def test_other_schedulers_are_refused_by_name():
    others = find_schedulers() - set(SCHEDULERS)
    assert others
    for name in others:
        with pytest.raises(UserError, match=f"names the scheduler '{name}'") as raised:
            scheduler_class(name, "model")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
        (
            "DPMSolverMultistepScheduler",
            {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
        ),
    ],
)
def test_a_last_step_that_does_nothing_cannot_train(generator, name, changes):
    generator.scheduler = make_scheduler(name, **changes)
    generator.check_sampling(SETTINGS)
    with pytest.raises(
        UserError, match="the last step of .* changes nothing.*sigma_min.*give --train_timesteps"
    ):
        generator.check_sampling(SETTINGS, is_training=True)
    generator.check_sampling(SETTINGS._replace(timesteps=(999, 600)), is_training=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"timestep_spacing": "linspace"},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous"},
        {"sigma_min": 0.1, "sigma_max": 5.0},
        {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True},
        {"final_sigmas_type": "sigma_min"},
    ],
)
def test_explicit_timesteps_do_not_depend_on_the_samplers_options(generator, changes):
    settings = SETTINGS._replace(timesteps=(999, 600))
    generator.scheduler = make_scheduler("PNDMScheduler")
    expected = draw_by_ours(generator, settings)
    generator.scheduler = make_scheduler("EulerDiscreteScheduler", **changes)
    assert torch.equal(draw_by_ours(generator, settings), expected)


@pytest.mark.parametrize(
    "scheduler, changes, settings, words",
    [
        ("PNDMScheduler", {}, {}, []),
        (
            "PNDMScheduler",
            {},
            {"height": 64},
            ["made for 32 x 32"],
        ),
        (
            "EulerDiscreteScheduler",
            {"timestep_spacing": "trailing"},
            {"num_inference_steps": 30},
            [
                "distilled to 8 steps or fewer",
                "without guidance",
            ],
        ),
        (
            "EulerDiscreteScheduler",
            {"timestep_spacing": "trailing"},
            {"num_inference_steps": 1, "guidance_scale": 0.0},
            [],
        ),
        ("EulerDiscreteScheduler", ZERO_SNR, {"num_inference_steps": 30}, []),
        ("LCMScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 1.5}, []),
        (
            "TCDScheduler",
            {},
            {"num_inference_steps": 30, "guidance_scale": 1.0},
            ["num_inference_steps is 30"],
        ),
    ],
)
def test_settings_that_a_checkpoint_was_not_made_for_are_told(
    generator, scheduler, changes, settings, words
):
    generator.scheduler = make_scheduler(scheduler, **changes)
    found = generator.describe_mismatches(SETTINGS._replace(**settings))
    assert len(found) == len(words) and all(
        word in told for word, told in zip(words, found, strict=True)
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_does_not_depend_on_its_batch(generator, name):
    skip_without_torchsde(name)
    generator.scheduler = make_scheduler(name)
    with torch.no_grad():
        alone = generator.decode(
            generator.sample(generator.encode(PROMPTS[1:]), SEEDS[1:], SETTINGS)
        )
    assert (draw_by_ours(generator)[1:] - alone).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name, changes, steps, reason",
    [
        (
            "PNDMScheduler",
            {"skip_prk_steps": False},
            3,
            "PNDM without skip_prk_steps needs 4 or more",
        ),
        (
            "DDPMScheduler",
            {"variance_type": "learned_range"},
            6,
            "also predicts a variance",
        ),
        ("DPMSolverSDEScheduler", {"noise_sampler_seed": 5}, 6, "set it to null"),
    ],
)
def test_schedulers_that_cannot_draw_are_refused_with_the_cause(
    generator, name, changes, steps, reason
):
    skip_without_torchsde(name)
    generator.scheduler = make_scheduler(name, **changes)
    with pytest.raises(UserError, match=reason):
        generator.check_sampling(SETTINGS._replace(num_inference_steps=steps))


def test_explicit_timesteps_with_any_noise_schedule(generator):
    """Euler does not know every beta_schedule; it is given the betas themselves."""
    generator.scheduler = make_scheduler("DDPMScheduler", beta_schedule="sigmoid")
    settings = SETTINGS._replace(timesteps=(999, 600))
    generator.check_sampling(settings, is_training=True)
    assert draw_by_ours(generator, settings).isfinite().all()


class WithoutFloat64(TorchFunctionMode):
    """As on Apple's GPUs: nothing that our code moves to the device of the networks is float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = [*args[1:], *(kwargs or {}).values()]
        caller = inspect.currentframe().f_back.f_code.co_filename
        is_moved = function is torch.Tensor.to and any(
            isinstance(value, torch.device) for value in given
        )
        if is_moved and caller.startswith(str(ROOT / "models")):
            assert args[0].dtype != torch.float64 or any(
                isinstance(value, torch.dtype) for value in given
            )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name",
    [
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
    ],
)
def test_no_timesteps_leave_in_float64(generator, name):
    generator.scheduler = scheduler_class(name, "").from_config(
        {**SCHEDULER, "use_karras_sigmas": True}
    )
    with WithoutFloat64():
        assert generator.sample(generator.encode(PROMPTS), SEEDS, SETTINGS).isfinite().all()
