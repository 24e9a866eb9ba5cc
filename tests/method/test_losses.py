"""What an image is scored by, besides cross-entropy: the box's other loss, and functions of a
user's own.
"""

import sys

import pytest
import torch

from method.losses import build_loss, cross_entropy
from models.classifiers import load_classifier
from models.generator import load_generator
from tests.models.families import save_family
from utils import UserError


@pytest.fixture(scope="module")
def classifier(tiny_classifier):
    return load_classifier(tiny_classifier, "cpu")


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module `scores` of the user's."""
    (tmp_path / "scores.py").write_text(
        "import torch\n"
        "def redness(images, targets): return -images[:, 0].mean((1, 2)) * (1 + targets)\n"
        "def one_number(images, targets): return images.mean()\n"
        "def cut(images, targets): return images.detach().mean((1, 2, 3))\n"
        "def infinite(images, targets): return images.mean((1, 2, 3)) / 0\n"
        "def broken(images, targets): raise KeyError('no such\\nkey')\n"
        "def mixed(images, targets): return images.mean() * images.mean((1, 2, 3))\n"
        "def nothing(images, targets): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "scores"
    sys.modules.pop("scores", None)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_norm_penalty_by_hand(tiny_model, tmp_path, classifier, family):
    """Nothing where every vector is as long as the vocabulary's mean; one where it is twice as long
    or zero.
    """
    generator = load_generator(
        save_family(family, tiny_model, tmp_path / "model"), "cpu", torch.float32
    )
    tables = [
        encoder.text_encoder.get_input_embeddings().weight for encoder in generator.prompt_encoders
    ]
    ideal = torch.cat(
        [torch.eye(table.shape[1])[:2] * table.norm(dim=1).mean() for table in tables], 1
    )
    vectors = torch.stack([ideal, 2 * ideal, 0 * ideal + 1e-9, 1.5 * ideal]).requires_grad_()
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    plain, right = cross_entropy(classifier)(images, targets)
    loss, correct = build_loss("norm_penalty", classifier, generator)(images, targets, vectors)
    assert torch.equal(right, correct)
    assert torch.allclose(loss - plain, torch.tensor([0, 1, 1, 0.25]), atol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), vectors)
    assert gradient[0].abs().max() < 1e-5 and (gradient[1] * ideal).sum() > 0


def test_a_function_of_the_users(classifier, generator, user_module):
    images, targets = torch.rand(3, 3, 32, 32, requires_grad=True), torch.tensor([0, 1, 2])
    loss, correct = build_loss("scores:redness", classifier, generator)(images, targets, None)
    assert torch.equal(loss, -images[:, 0].mean((1, 2)) * (1 + targets)) and loss.requires_grad
    assert torch.equal(correct, classifier(images).argmax(1) == targets)


@pytest.mark.parametrize(
    "function, reason",
    [
        ("one_number", r"\[\] .* \[2\]"),
        ("cut", "or gives no gradient"),
        ("infinite", "a non-finite loss"),
        ("broken", r"KeyError 'no such"),
        ("nothing", "AttributeError"),
        ("mixed", "of an image depends on the others"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_functions_that_cannot_teach_are_told(classifier, generator, user_module, function, reason):
    with pytest.raises(UserError, match=reason) as raised:
        build_loss(f"scores:{function}", classifier, generator)
    assert "\n" not in str(raised.value)
