"""FLOPs are those of the calls that training makes, wherever it runs, and belong to the network
that makes them.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTForImageClassification

from benchmarks import flops
from method.losses import cross_entropy
from method.update import token_gradient
from models.stable_diffusion import StableDiffusion
from prompt_datasets import TEMPLATES
from runs.estimate import make_batch
from tests.method.conftest import PAPER, SHORT, open_generator
from utils import ROOT

UNGUIDED = SHORT._replace(guidance_scale=1.0)


@pytest.fixture
def classifier(tiny_classifier):
    return flops.wrap_classifier(
        ViTForImageClassification.from_pretrained(tiny_classifier).requires_grad_(False)
    )


@pytest.fixture
def generator(tiny_model):
    return open_generator(tiny_model, torch.float32)


def count_both_ways(function, *inputs) -> tuple[int, int]:
    """FLOPs of a function's call, and of its way back to those inputs that have a gradient."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = function(*inputs)
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("sampling, calls", [(PAPER, 8), (SHORT, 4), (UNGUIDED, 2)])
def test_parts_equal_a_count_by_hand(generator, classifier, sampling, calls):
    """PNDM makes four steps of three."""
    counts = flops.count_images(generator, classifier, sampling, is_recomputed=False)
    vectors = torch.randn(3, 1, 32, requires_grad=True)
    text, text_back = count_both_ways(lambda v: generator.encode(["a newclas cat"] * 3, v), vectors)
    cond = torch.randn(5, 24, 32, requires_grad=True)
    unet, unet_back = count_both_ways(
        lambda c: generator.predict_noise(torch.randn(5, 4, 4, 4), 500, c), cond
    )
    latents, images = (
        torch.randn(5, 4, 4, 4, requires_grad=True),
        torch.rand(5, 3, 32, 32, requires_grad=True),
    )
    assert (counts["images"], counts["images with a graph"]) == (5 * calls, 5)
    assert counts["UNet"] == calls * unet + unet_back
    assert counts["VAE"] == sum(count_both_ways(generator.decode, latents))
    assert counts["classifier"] == sum(count_both_ways(classifier, images))
    negative = text // 3 if sampling.guidance_scale > 1 else 0
    assert counts["text encoder"] == text + text_back + negative
    again = flops.count_images(generator, classifier, sampling)
    assert again["images"] == 5 * (calls + 1) and 0 < again["UNet"] - counts["UNet"] <= unet
    assert all(again[part] == counts[part] for part in flops.PARTS if part != "UNet")


@pytest.mark.parametrize("sampling", [PAPER, SHORT, UNGUIDED])
def test_meta_device_counts_what_training_takes(generator, classifier, sampling):
    prompts = [template.format("newclas crane") for template in TEMPLATES]
    batch, vectors = make_batch(generator, generator.initial_vectors("a"), prompts, flops.IMAGES)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        token_gradient(
            generator, cross_entropy(classifier), vectors, batch, sampling, batch_size=flops.IMAGES
        )
    assert vectors.grad.any()
    real = flops.count_images(generator, classifier, sampling)
    assert sum(real[part] for part in flops.PARTS) == counter.get_total_flops()
    _, unet, vae = generator.networks
    shapes = StableDiffusion(generator.prompt_encoders, unet, vae, generator.scheduler, "meta")
    assert (
        flops.count_images(shapes, flops.wrap_classifier(classifier.model.to("meta")), sampling)
        == real
    )


def test_rows_are_relative_to_the_paper(generator, classifier):
    least = flops.count_images(generator, classifier, PAPER, is_recomputed=False)
    counts = flops.count_images(generator, classifier, PAPER)
    row, total = flops.make_row("paper", counts, least, None)
    assert len(row) == len(flops.COLUMNS)
    assert row[:4] == ["paper", "8", "1", "1"] and row[-1] == "1.000"
    twice, _ = flops.make_row("twice", counts, least, total / 2)
    assert twice[-1] == "2.000"


@pytest.mark.slow
def test_shipped_page_is_the_present_count():
    settings = flops.list_settings()
    page = (ROOT / "docs/flops.md").read_text()
    name = "600, training guidance 1"
    row, _ = flops.make_row(name, *flops.count_setting(*settings[name]), None)
    assert f"| {' | '.join(row[:-1])} |" in page
    assert all(f"| {name} |" in page for name in settings)
