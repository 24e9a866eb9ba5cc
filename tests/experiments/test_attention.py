"""What the token looks at: the command, and what is painted over."""

import torch

from experiments import attention


def test_the_command(run_experiment):
    result = run_experiment("attention")
    assert [list(shares) for shares in result["right"].values()] == [attention.PLACES] * 2
    assert len(result["tests"]) == 5


def test_the_most_attended_quarter_is_hidden():
    # the last row leads ...
    image, places = (
        torch.rand(3, 64, 64),
        torch.linspace(0, 0.4, 64).reshape(8, 8),
    )
    places[2, 3] = places[5, 5] = 1  # ... but for two places
    hidden = (attention.hide_places(image, places) != image).any(0)
    assert hidden[16:24, 24:32].all() and hidden[40:48, 40:48].all() and hidden[56:].all()
    assert hidden.sum() == 16 * 64
