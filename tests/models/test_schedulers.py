"""Every scheduler of diffusers, in many configurations: equal to its pipeline's pictures, or refused in one line."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from models.generator import load_generator
from models.sampling import SCHEDULERS, SamplingSettings, scheduler_class, seeded_generators
from tests.conftest import SCHEDULER
from utils import UserError

SETTINGS = SamplingSettings(height=32, width=32, guidance_scale=3.0, num_inference_steps=6)
PROMPTS, SEEDS = ["a photo of a crane", "a crane"], [7, 8]
SPACINGS = [{"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")]
KINDS = [{"prediction_type": kind} for kind in ("v_prediction", "sample")]
SIGMAS = [{f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")]
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
SOLVERS = [{"solver_order": 1}, {"solver_order": 3}, {"final_sigmas_type": "sigma_min"}, {"lower_order_final": False}]
VARIANTS = {
    "PNDMScheduler": [*SPACINGS, KINDS[0], {"skip_prk_steps": False}, {"set_alpha_to_one": True}],
    "DDIMScheduler": [*SPACINGS, *KINDS, ZERO_SNR, {"set_alpha_to_one": False}, {"thresholding": True},
                      {"steps_offset": 0}, {"clip_sample": True}],
    "DDIMParallelScheduler": [{}], "DDPMParallelScheduler": [{}],
    "DDPMScheduler": [*SPACINGS, *KINDS, {"variance_type": "fixed_large"}, {"clip_sample": True}, {"steps_offset": 3}],
    "DPMSolverMultistepScheduler": [
        *SPACINGS, *KINDS, *SIGMAS, *SOLVERS, {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"solver_type": "heun"}, {"euler_at_final": True}, {"use_lu_lambdas": True}, {"thresholding": True}],
    "DPMSolverSinglestepScheduler": [{}, KINDS[0], SIGMAS[0], {"solver_order": 3}, {"algorithm_type": "dpmsolver",
                                                                                 "final_sigmas_type": "sigma_min"}],
    "DPMSolverSDEScheduler": [{}, SIGMAS[0]],
    "DEISMultistepScheduler": [{}, KINDS[0], SIGMAS[0], {"solver_order": 3}],
    "UniPCMultistepScheduler": [{}, *KINDS, *SIGMAS, {"solver_type": "bh1"}, {"solver_order": 3},
                                {"final_sigmas_type": "sigma_min"}, {"predict_x0": False}],
    "EulerDiscreteScheduler": [*SPACINGS, KINDS[0], *SIGMAS, ZERO_SNR, {"final_sigmas_type": "sigma_min"},
                               {"interpolation_type": "log_linear"},
                               {"timestep_type": "continuous", "prediction_type": "v_prediction"}],
    "EulerAncestralDiscreteScheduler": [*SPACINGS, KINDS[0], ZERO_SNR],
    "HeunDiscreteScheduler": [{}, KINDS[0], *SIGMAS, {"timestep_spacing": "trailing"}],
    "KDPM2DiscreteScheduler": [{}, KINDS[0], SIGMAS[0]], "KDPM2AncestralDiscreteScheduler": [{}, SIGMAS[0]],
    "LMSDiscreteScheduler": [{}, KINDS[0], SIGMAS[0]], "IPNDMScheduler": [{}],
    "SASolverScheduler": [{}, {"predictor_order": 3}, SIGMAS[0]],
    "LCMScheduler": [{}, KINDS[0], {"original_inference_steps": 30}],
    "TCDScheduler": [{}, KINDS[0], {"original_inference_steps": 30}]}
TABLE = [(name, changes) for name, variants in VARIANTS.items() for changes in variants]
TOTAL = 60


@pytest.fixture(scope="module")
def generator(tiny_model):
    """One for all: nothing here changes more of it than its scheduler."""
    return load_generator(tiny_model, "cpu", torch.float32)


def find_schedulers() -> set[str]:
    kinds = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    return {name for name, kind in kinds.items() if isinstance(kind, type)} | {"DPMSolverSDEScheduler"}


def skip_without_torchsde(name: str):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")


def make_scheduler(name: str, **changes):
    """SD 1.4's scheduler_config.json, changed, read by another class."""
    return getattr(diffusers, name).from_config({**SCHEDULER, **changes})


def draw_by_pipeline(generator, scheduler, settings=SETTINGS) -> torch.Tensor:
    pipeline = StableDiffusionPipeline(generator.vae, generator.text_encoder, generator.tokenizer, generator.unet,
                                       scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, height=32, width=32, num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale, generator=seeded_generators(SEEDS),
                    output_type="pt").images


@torch.no_grad()
def draw_by_ours(generator, settings=SETTINGS) -> torch.Tensor:
    return generator.decode(generator.sample(generator.encode(PROMPTS), SEEDS, settings))


def test_table_is_long_and_names_every_accepted_scheduler():
    assert len(TABLE) >= TOTAL and set(VARIANTS) == set(SCHEDULERS)
    assert set(SCHEDULERS) <= find_schedulers()


@pytest.mark.parametrize("name, changes", TABLE, ids=lambda value: json.dumps(value) if value else "default")
def test_pictures_equal_the_pipelines(generator, name, changes):
    skip_without_torchsde(name)
    generator.scheduler, reference = make_scheduler(name, **changes), make_scheduler(name, **changes)
    assert {key: reference.config[key] for key in changes} == changes
    if name == "DPMSolverSDEScheduler":  # the pipeline would draw a seed of its own
        reference.register_to_config(noise_sampler_seed=SEEDS)
        reference.noise_sampler_seed = SEEDS
    try:
        theirs = draw_by_pipeline(generator, reference)
    except Exception:
        theirs = torch.tensor(torch.nan)
    if not theirs.isfinite().all():  # what the pipeline cannot draw is refused
        with pytest.raises(UserError):
            generator.check_sampling(SETTINGS)
        return
    generator.check_sampling(SETTINGS)
    assert (draw_by_ours(generator) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", sorted(find_schedulers() - set(SCHEDULERS)))
def test_other_schedulers_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"names the scheduler '{name}'") as raised:
        scheduler_class(name, "model")
    assert "\n" not in str(raised.value)


def edit_index(tiny_model: str, tmp_path: Path, **changes) -> str:
    shutil.copytree(tiny_model, tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
    return str(tmp_path / "model")


def edit_config(tiny_model: str, tmp_path: Path, part: str, **changes) -> str:
    folder = Path(edit_index(tiny_model, tmp_path))
    config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return str(folder)


def load_pipeline(folder: str):
    return DiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False, torch_dtype=torch.float32)


def compare_with_pipeline(folder: str, settings=SETTINGS):
    generator, pipeline = load_generator(folder, "cpu", torch.float32), load_pipeline(folder)
    theirs = draw_by_pipeline(StableDiffusionParts(pipeline), pipeline.scheduler, settings)
    assert (draw_by_ours(generator, settings) - theirs).abs().max() < 1e-4
    return generator


class StableDiffusionParts:
    """A loaded pipeline's parts under the names that `draw_by_pipeline` reads."""

    def __init__(self, pipeline):
        self.__dict__ = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}


@pytest.mark.parametrize("guidance_scale", [1.5, 8.0])
@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler", "DDIMScheduler"])
def test_guidance_embedding_as_the_pipeline_does(tiny_model, tmp_path, scheduler, guidance_scale):
    folder = edit_config(tiny_model, tmp_path, "unet", time_cond_proj_dim=16)
    torch.manual_seed(3)
    unet = UNet2DConditionModel.from_config(json.loads(Path(folder, "unet/config.json").read_text()))
    shutil.rmtree(f"{folder}/unet")
    unet.save_pretrained(f"{folder}/unet")
    index = Path(folder, "model_index.json")
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", scheduler]}))
    settings = SETTINGS._replace(guidance_scale=guidance_scale, num_inference_steps=4)
    generator = compare_with_pipeline(folder, settings)
    calls = []
    generator.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(output.sample)))
    draw_by_ours(generator, settings)
    assert set(calls) == {len(PROMPTS)}  # no unconditional half


def test_attention_mask_as_the_pipeline_does(tiny_model, tmp_path):
    plain = draw_by_ours(load_generator(tiny_model, "cpu", torch.float32))
    generator = compare_with_pipeline(edit_config(tiny_model, tmp_path, "text_encoder", use_attention_mask=True))
    assert (draw_by_ours(generator) - plain).abs().max() > 1e-3


def test_tiny_autoencoder_draws_and_learns(tiny_model, tmp_path):
    folder = edit_index(tiny_model, tmp_path, vae=["diffusers", "AutoencoderTiny"])
    shutil.rmtree(f"{folder}/vae")
    torch.manual_seed(4)
    AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
                    num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)).save_pretrained(f"{folder}/vae")
    generator = compare_with_pipeline(folder)
    generator.set_placeholder("newclas")
    vectors = torch.ones(1, 1, 32, requires_grad=True)
    cond = generator.encode(["a newclas crane"], vectors)
    generator.decode(generator.sample(cond, [0], SETTINGS))[0, 0, :8].sum().backward()
    assert vectors.grad.norm() > 0
    assert generator.encode_images(torch.rand(1, 3, 32, 32))[0].shape == (1, 4, 4, 4)


@pytest.mark.parametrize("part, changes, reason", [
    ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
    ("unet", {"num_class_embeds": 3}, "num_class_embeds"),
    ("unet", {"addition_embed_type": "text"}, "addition_embed_type"),
    ("unet", {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32}, "encoder_hid_dim_type")])
def test_unets_that_need_more_are_refused(tiny_model, tmp_path, part, changes, reason):
    folder = edit_config(tiny_model, tmp_path, part, **changes)
    unet = UNet2DConditionModel.from_config(json.loads(Path(folder, "unet/config.json").read_text()))
    shutil.rmtree(f"{folder}/unet")
    unet.save_pretrained(f"{folder}/unet")
    with pytest.raises(UserError, match=f"needs more than a prompt: its config has {reason}"):
        load_generator(folder, "cpu", torch.float32)


@pytest.mark.parametrize("part, name", [("vae", "ConsistencyDecoderVAE"), ("unet", "UNet2DModel"),
                                        ("text_encoder", "T5EncoderModel"), ("tokenizer", "T5Tokenizer")])
def test_other_parts_are_refused_by_name(tiny_model, tmp_path, part, name):
    with pytest.raises(UserError, match=f"{name}.*as its {part}, which must be"):
        load_generator(edit_index(tiny_model, tmp_path, **{part: ["library", name]}), "cpu", torch.float32)


WEIGHTS = [("text_encoder", "model", "embeddings.token_embedding.weight"),
           ("text_encoder", "model", "layers.0.self_attn.q_proj.weight"),
           ("unet", "diffusion_pytorch_model", "conv_in.weight"),
           ("vae", "diffusion_pytorch_model", "decoder.conv_in.weight")]


@pytest.mark.parametrize("part, file, key", WEIGHTS)
@pytest.mark.parametrize("damage", ["dropped", "renamed", "reshaped"])
def test_weights_that_do_not_arrive_are_named(tiny_model, tmp_path, part, file, key, damage):
    folder = edit_index(tiny_model, tmp_path)
    path = Path(folder, part, f"{file}.safetensors")
    state = load_file(path)
    stored = next(name for name in state if name.endswith(key))
    weight = state.pop(stored)
    if damage == "renamed":
        state[stored.replace(".weight", ".base_layer.weight")] = weight
    if damage == "reshaped":
        state[stored] = torch.cat([weight, weight])
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=key) as raised:
        load_generator(folder, "cpu", torch.float32)
    assert "\n" not in str(raised.value)
    assert ("in other shapes" if damage == "reshaped" else "lacks") in str(raised.value)


def test_weights_that_are_not_used_are_named(tiny_model, tmp_path, capsys):
    folder = edit_index(tiny_model, tmp_path)
    path = Path(folder, "text_encoder/model.safetensors")
    save_file({**load_file(path), "text_model.adapter.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    load_generator(folder, "cpu", torch.float32)
    warning = capsys.readouterr().err
    assert "adapter.weight" in warning and "not used" in warning


@pytest.mark.parametrize("name, changes", [
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True})])
def test_a_last_step_that_does_nothing_cannot_train(generator, name, changes):
    generator.scheduler = make_scheduler(name, **changes)
    generator.check_sampling(SETTINGS)
    with pytest.raises(UserError, match="the last step of .* changes nothing.*sigma_min.*give --train_timesteps"):
        generator.check_sampling(SETTINGS, is_training=True)
    generator.check_sampling(SETTINGS._replace(timesteps=(999, 600)), is_training=True)


@pytest.mark.parametrize("changes", [
    {"timestep_spacing": "linspace"}, {"interpolation_type": "log_linear"}, {"timestep_type": "continuous"},
    {"sigma_min": 0.1, "sigma_max": 5.0},
    {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}])
def test_explicit_timesteps_do_not_depend_on_the_samplers_options(generator, changes):
    settings = SETTINGS._replace(timesteps=(999, 600))
    generator.scheduler = make_scheduler("PNDMScheduler")
    expected = draw_by_ours(generator, settings)
    generator.scheduler = make_scheduler("EulerDiscreteScheduler", **changes)
    assert torch.equal(draw_by_ours(generator, settings), expected)


def test_scheduler_without_its_package_says_what_to_install(tiny_model, tmp_path):
    try:
        import torchsde  # noqa: F401
        pytest.skip("torchsde is installed")
    except ImportError:
        folder = edit_index(tiny_model, tmp_path, scheduler=["diffusers", "DPMSolverSDEScheduler"])
        with pytest.raises(UserError, match="requires the torchsde library.*pip install"):
            load_generator(folder, "cpu", torch.float32)


@pytest.mark.parametrize("scheduler, changes, settings, words", [
    ("PNDMScheduler", {}, {}, []),
    ("PNDMScheduler", {}, {"height": 64}, ["made for 32 x 32 pixels, and height and width are 64 and 32"]),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {"num_inference_steps": 30},
     ["distilled to 8 steps or fewer", "distilled to draw without guidance, and guidance_scale is 3.0"]),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {"num_inference_steps": 1, "guidance_scale": 0.0}, []),
    ("EulerDiscreteScheduler", ZERO_SNR, {"num_inference_steps": 30}, []),
    ("LCMScheduler", {}, {"num_inference_steps": 4, "guidance_scale": 1.5}, []),
    ("TCDScheduler", {}, {"num_inference_steps": 30, "guidance_scale": 1.0}, ["num_inference_steps is 30"])])
def test_settings_that_a_checkpoint_was_not_made_for_are_told(generator, scheduler, changes, settings, words):
    generator.scheduler = make_scheduler(scheduler, **changes)
    found = generator.describe_mismatches(SETTINGS._replace(**settings))
    assert len(found) == len(words) and all(word in told for word, told in zip(words, found, strict=True))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_does_not_depend_on_its_batch(generator, name):
    skip_without_torchsde(name)
    generator.scheduler = make_scheduler(name)
    with torch.no_grad():
        alone = generator.decode(generator.sample(generator.encode(PROMPTS[1:]), SEEDS[1:], SETTINGS))
    assert (draw_by_ours(generator)[1:] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("name, changes, steps, reason", [
    ("PNDMScheduler", {"skip_prk_steps": False}, 3, "PNDM without skip_prk_steps needs 4 or more"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, 6, "is for a UNet that predicts a variance too"),
    ("DPMSolverSDEScheduler", {"noise_sampler_seed": 5}, 6, "set it to null")])
def test_schedulers_that_cannot_draw_are_refused_with_the_cause(generator, name, changes, steps, reason):
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


def test_unet_that_predicts_a_variance_too_is_refused(tiny_model, tmp_path):
    folder = edit_config(tiny_model, tmp_path, "unet", out_channels=8)
    unet = UNet2DConditionModel.from_config(json.loads(Path(folder, "unet/config.json").read_text()))
    shutil.rmtree(f"{folder}/unet")
    unet.save_pretrained(f"{folder}/unet")
    with pytest.raises(UserError, match="predicts 8 channels"):
        load_generator(folder, "cpu", torch.float32)
