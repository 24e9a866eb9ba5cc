"""--estimate: what a real update takes, found without weights; nothing is written."""

import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from method.losses import cross_entropy
from method.update import token_gradient
from models.classifiers import load_classifier
from models.costs import PARTS
from models.generator import load_generator
from models.sampling import SamplingSettings
from run import main
from runs.estimate import EstimateSettings, count_trajectory, describe_fit, make_batch, open_update
from tests import memory
from tests.conftest import error_of, flags
from tests.models.families import save_family
from utils import ROOT

IN_A_TEST = [
    "batch_size 16",
    "batch_size 64: the denoiser's graph is kept",
    "gradient_checkpointing",
    "one step",
    "the paper's trajectory, 3 steps, guidance 3",
    "8 images of 128 x 128",
]


def pick_settings(config) -> EstimateSettings:
    return EstimateSettings(**config.pick_settings(EstimateSettings._fields))


@pytest.fixture
def configs(tiny_config, tmp_path):
    """The tiny configuration's checkpoints without weights."""
    for name in ("model", "classifier"):
        shutil.copytree(
            getattr(tiny_config, name),
            tmp_path / name,
            ignore=shutil.ignore_patterns("*.safetensors", "*.bin"),
        )
        setattr(tiny_config, name, str(tmp_path / name))
    return tiny_config


def read_table(text: str) -> dict[str, list[str]]:
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    return {row[0]: row[1:] for row in rows}


def test_command_line(configs, capsys, tmp_path):
    """No weights, no class, no GPU, and nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    argv = [
        *flags(configs),
        "--evaluator",
        configs.classifier,
        "--device",
        "cuda",
        "--mixed_precision",
        "fp16",
        "--estimate",
        "True",
        "--epoch_size",
        "1",
    ]
    assert main([*argv, "--evaluate", "True", "--memory_gb", "8"]) == 0
    captured = capsys.readouterr()
    assert (
        not captured.err
        and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    )
    assert list(read_table(captured.out)) == ["1", "2"]
    assert all(len(row) == 6 for row in read_table(captured.out).values())
    for words in (
        "UNet calls per update: 8, 1 of them with a graph",
        "below 2, 1 more",
        "of 50 training pictures",
        "evaluator 0.0 M",
        "of 4 evaluation pictures",
        "without --batch_size: 2 at first",
        "--batch_size 2 fits into 8 GB, 0.5 of them for the CUDA context",
    ):
        assert words in captured.out
    assert main([*argv, "--memory_gb", "0.1", "--loss", "norm_penalty", "--batch_size", "3"]) == 0
    found = capsys.readouterr().out
    assert (
        list(read_table(found)) == ["1", "2", "3"] and "loss 'norm_penalty' is not counted" in found
    )
    assert (
        "no --batch_size fits into 0.1 GB" in found
        and "try --gradient_checkpointing True, smaller" in found
    )


def test_errors_are_those_of_a_run(configs, capsys):
    argv = [*flags(configs), "--estimate", "True"]
    assert "must be greater than 0" in error_of(capsys, *argv, "--memory_gb", "-1")
    assert "is for --estimate True" in error_of(
        capsys, "--memory_gb", "8", "--class_index", "3", "--train", "True"
    )
    assert "cannot open 'nowhere'" in error_of(capsys, *argv, "--model", "nowhere")
    assert "is too few for" in error_of(
        capsys, *argv, "--num_vectors", "1", "--initializer_token", "a photo of"
    )


def test_what_fits(tiny_config):
    settings = pick_settings(tiny_config)._replace(memory_gb=8.0)
    peaks = {1: 3.0, 2: 7.6, 4: 9.0}
    assert describe_fit(peaks, settings).startswith(
        "--batch_size 2 fits into 8 GB: it takes 7.6 GB"
    )
    assert describe_fit(peaks, settings._replace(device="cuda:1")).startswith(
        "--batch_size 1 fits into 8 GB, 0.5 of"
    )
    line = describe_fit(peaks, settings._replace(memory_gb=2.0, classes_at_once=2))
    assert (
        line == "no --batch_size fits into 2 GB: 1 takes 3 GB; try --mixed_precision fp16 or bf16, "
        "--gradient_checkpointing True, fewer --classes_at_once, smaller images"
    )


@pytest.mark.parametrize(
    "family, changes",
    [
        ("", {}),
        ("", {"timesteps": (999, 600), "guidance_scale": 1.0}),
        ("", {"timesteps": (600,)}),
        ("sdxl", {}),
        ("sdxl", {"guidance_scale": 1.0}),
        ("lcm", {"num_inference_steps": 1}),
    ],
)
def test_flops_are_torchs_count_of_a_real_update(tiny_config, tmp_path, family, changes):
    """With the last step's graph made again and kept."""
    if family:
        tiny_config.model = save_family(family, tiny_config.model, tmp_path / family)
    settings = pick_settings(tiny_config)
    sampling = SamplingSettings(**tiny_config.sampling_settings())._replace(**changes)
    update = open_update(settings, sampling, "cpu")
    batch, vectors = make_batch(update.generator, update.vectors, update.prompts, update.images)
    kept, again = count_trajectory(open_update(settings, sampling), sampling)
    for is_kept in (True, False):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            token_gradient(
                update.generator,
                cross_entropy(update.classifier),
                vectors,
                batch,
                sampling,
                batch_size=update.images * (2 if is_kept else 1),
            )
        assert vectors.grad.any()
        assert (
            sum(kept[part] + again[part] * (not is_kept) for part in PARTS)
            == counter.get_total_flops()
        )


@pytest.mark.parametrize("family", ["lcm", "sd_turbo", "sdxl", "sdxl_turbo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_family_has_its_shapes(tiny_model, tmp_path, family, dtype):
    folder = save_family(family, tiny_model, tmp_path / family)
    generators = [load_generator(folder, device, dtype) for device in ("cpu", "meta")]
    assert type(generators[0]) is type(generators[1])
    for real, shape in zip(*(generator.networks for generator in generators), strict=True):
        assert describe_weights(real) == describe_weights(shape)
        assert all(weight.is_meta for weight in shape.parameters())


def describe_weights(network):
    return {name: (weight.shape, weight.dtype) for name, weight in network.named_parameters()}


def test_classifiers_have_their_shapes(tiny_classifier, tmp_path):
    labels = ROOT / "miniature/weights/clip/labels.txt"
    for name in (
        tiny_classifier,
        f"mean:{tiny_classifier}",
        f"zero-shot:{ROOT / 'miniature/weights/clip'}",
    ):
        real, shape = (
            load_classifier(name, device, labels_file=str(labels)) for device in ("cpu", "meta")
        )
        assert (
            describe_weights(real.model) == describe_weights(shape.model)
            and real.labels == shape.labels
        )
        logits = shape.compute_logits(
            shape.model, real.preprocess(torch.rand(2, 3, 64, 64)).to("meta")
        )
        assert logits.shape == (2, len(real.labels))
    assert len(load_classifier("timm:resnet18", "meta").labels) == 1000


def test_memory_is_a_real_updates():
    """Within 20 % of the peak that the system reports."""
    for name, found in zip(IN_A_TEST, memory.measure_apart(*IN_A_TEST), strict=True):
        assert found["measured"] > 0.1 and abs(found["estimated"] / found["measured"] - 1) < 0.2, (
            name,
            found,
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", memory.SD14)
def test_memory_at_stable_diffusions_sizes(name):
    (found,) = memory.measure_apart(name)
    assert found["measured"] > 3 and abs(found["estimated"] / found["measured"] - 1) < 0.2
