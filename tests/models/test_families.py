"""Every family of generators: pictures and gradients of its own pipeline in diffusers, and whole
runs.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import run
from command_line import parse_settings
from method.update import Batch, token_gradient
from models.generator import load_generator
from models.sampling import seeded_generators
from runs.session import Session
from runs.sweep import run_sweep
from tests.conftest import flags
from tests.models import interrupted
from tests.models.families import FAMILIES, INDEXES, save_family
from tests.models.pipelines import PROMPTS, SEEDS, draw_by_ours, draw_by_pipeline
from tokens.class_token import load_token, save_token
from utils import UserError

WITH_TOKEN = ["a photo of a newclas crane", "a newclas crane"]
# those differ in the pictures alone
WHOLE_RUNS = [name for name in FAMILIES if name not in INDEXES]
KEYS = {
    1: [("newclas", "text_encoder", "tokenizer")],
    2: [("clip_l", "text_encoder", "tokenizer"), ("clip_g", "text_encoder_2", "tokenizer_2")],
}


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory) -> dict[str, str]:
    return {
        name: save_family(name, tiny_model, tmp_path_factory.mktemp(name) / "model")
        for name in FAMILIES
    }


def load_pipeline(folder: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_token_file(
    pipeline: DiffusionPipeline, file: Path, widths: tuple[int, ...]
) -> list[torch.nn.Embedding]:
    """Load the file as README says; the embedding of every encoder."""
    tensors = load_file(file)
    for key, encoder, tokenizer in KEYS[len(widths)]:
        pipeline.load_textual_inversion(
            {"newclas": tensors[key]} if len(widths) == 1 else tensors[key],
            token="newclas",
            text_encoder=getattr(pipeline, encoder),
            tokenizer=getattr(pipeline, tokenizer),
        )
    return [
        getattr(pipeline, encoder).get_input_embeddings() for _, encoder, _ in KEYS[len(widths)]
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_equal_its_pipelines(folders, name):
    generator, settings = load_generator(folders[name], "cpu", torch.float32), FAMILIES[name][2]
    generator.check_sampling(settings, is_training=True)
    assert generator.describe_mismatches(settings) == []
    theirs = draw_by_pipeline(load_pipeline(folders[name]), settings)
    assert theirs.std() > 0.01 and (draw_by_ours(generator, settings) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name, count", [(name, 1) for name in WHOLE_RUNS] + [("sd2", 3), ("sdxl", 3)]
)
def test_gradient_equals_the_pipelines_own(folders, tmp_path, name, count):
    """That of autograd through the pipeline's whole call, with the latents cut before the last
    step, in the rows of the token that it loaded.
    """
    generator, settings = load_generator(folders[name], "cpu", torch.float32), FAMILIES[name][2]
    generator.set_placeholder("newclas")
    vectors = 0.1 * torch.randn(
        count, sum(generator.token_widths), generator=torch.Generator().manual_seed(3)
    )
    save_token(tmp_path / "token.safetensors", "newclas", vectors, generator.token_widths, {})
    weights = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    leaf = vectors.expand(2, -1, -1).clone().requires_grad_()
    losses, _ = token_gradient(
        generator,
        lambda images, targets, _: ((images * weights[targets]).sum((1, 2, 3)), targets > 0),
        leaf,
        Batch(
            WITH_TOKEN,
            torch.tensor([0, 1]),
            torch.tensor(SEEDS),
            torch.tensor([0, 1]),
            torch.ones(2),
        ),
        settings,
        1,
    )

    pipeline = load_pipeline(folders[name])
    embeddings = load_token_file(pipeline, tmp_path / "token.safetensors", generator.token_widths)
    last = []

    def cut_graph(pipeline, step, timestep, tensors):
        last.append(tensors["latents"])
        if step + 1 == pipeline.num_timesteps:
            return {}
        # PNDM's memory
        pipeline.scheduler.ets = [
            noise.detach() for noise in getattr(pipeline.scheduler, "ets", [])
        ]
        return {"latents": tensors["latents"].detach()}

    images = (
        type(pipeline)
        .__call__.__wrapped__(
            pipeline,
            WITH_TOKEN,
            height=32,
            width=32,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=seeded_generators(SEEDS),
            output_type="pt",
            callback_on_step_end=cut_graph,
            **{"guidance_rescale": settings.guidance_rescale} if settings.guidance_rescale else {},
        )
        .images
    )
    assert len(last) == pipeline.num_timesteps
    assert (losses - (images * weights).sum((1, 2, 3))).abs().max() < 1e-2
    gradients = torch.autograd.grad(
        (images * weights).sum(), [embedding.weight for embedding in embeddings]
    )
    expected = torch.cat([gradient[-count:] for gradient in gradients], 1)
    assert (leaf.grad.sum(0) - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_an_update_a_kill_an_evaluation(folders, tiny_config, tmp_path, name):
    """The resumed token is that of an undisturbed run, and no frozen weight has changed."""
    sampling = FAMILIES[name][2]
    tiny_config.model = folders[name]
    settings = {
        "class_index": 3,
        "train": True,
        "evaluate": True,
        "controls": True,
        "loss": "tests.models.interrupted:brightness",
        "num_train_epochs": 2,
        "target_accuracy": 1,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "guidance_rescale": sampling.guidance_rescale,
    }
    argv = flags(tiny_config, **settings)
    interrupted.CALLS.clear()
    with pytest.raises(KeyboardInterrupt):
        run.main(argv)
    assert len(next(tmp_path.rglob("demo/history.jsonl")).read_text().splitlines()) == 1
    assert run.main(argv) == 0

    config, _ = parse_settings([*argv, "--exp_id", "undisturbed", "--evaluate", "False"])
    session = Session(config)
    run_sweep(session)
    resumed, undisturbed = (
        load_token(next(tmp_path.rglob(f"{run_id}/learned_embeds.safetensors")))
        for run_id in ("demo", "undisturbed")
    )
    assert torch.equal(resumed.vectors, undisturbed.vectors)
    assert resumed.widths == session.generator.token_widths
    history = [
        json.loads(line)
        for line in next(tmp_path.rglob("demo/history.jsonl")).read_text().splitlines()
    ]
    assert history[0]["vector_norm"] != history[1]["vector_norm"]
    conditions = {path.parent.name for path in tmp_path.rglob("demo/eval/*/*.png")}
    assert conditions == {"without", "with", "untrained", "random"}
    fresh = load_generator(folders[name], "cpu", torch.float32)
    for network, before in zip(session.generator.networks, fresh.networks, strict=True):
        for key, value in network.state_dict().items():
            assert torch.equal(value, before.state_dict()[key])


def test_sdxl_in_half_precision_decodes_in_float32(folders):
    generator = load_generator(folders["sdxl"], "cpu", torch.float16)
    assert (generator.unet.dtype, generator.vae.dtype) == (torch.float16, torch.float32)
    assert generator.decode(torch.randn(1, 4, 4, 4).half()).dtype == torch.float32


@pytest.mark.parametrize(
    "name, settings, reason",
    [
        (
            "sdxl",
            {"_class_name": "StableDiffusionXLImg2ImgPipeline"},
            "is for StableDiffusionXLImg2ImgPipeline",
        ),
        (
            "sdxl",
            {"text_encoder_2": ["transformers", "T5EncoderModel"]},
            "T5EncoderModel.* as its text_encoder_2",
        ),
        (
            "sdxl",
            {"_class_name": "StableDiffusionPipeline"},
            "parts .* are not of one Stable Diffusion model",
        ),
    ],
)
def test_what_only_looks_like_a_family_is_refused(
    folders, tmp_path, tiny_model, name, settings, reason
):
    folder = save_family(name, tiny_model, tmp_path / "model")
    index = Path(folder, "model_index.json")
    index.write_text(json.dumps({**json.loads(index.read_text()), **settings}))
    with pytest.raises(UserError, match=reason):
        load_generator(folder, "cpu", torch.float32)


def test_prompts_differ_from_each_other(folders):
    """Or equality with a pipeline would say little."""
    for name in ("sd2", "sdxl"):
        generator = load_generator(folders[name], "cpu", torch.float32)
        first, second = generator.encode(PROMPTS)
        assert (first - second).abs().max() > 0.1
