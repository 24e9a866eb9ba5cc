"""The figures of the experiments."""

from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from evaluation.statistics import Proportion, standard_error
from utils import replace_file


def plot_curves(path: Path, xlabel: str, ylabel: str, curves: dict[str, dict]):
    """Write {x: value} for each label, of Proportions with their intervals, of lists with the mean's standard error.

    A curve where x is numbers, points over their names where it is words.
    """
    axis = Figure((6, 3.6)).subplots()
    for label, by_x in curves.items():
        bars = [(found.value, found.value - found.low, found.high - found.value) if isinstance(found, Proportion) else
                (mean(found), standard_error(found), standard_error(found)) for found in by_x.values()]
        values, below, above = zip(*bars, strict=True)
        words = not all(str(x).isdecimal() for x in by_x)
        axis.errorbar(list(by_x), values, [below, above], fmt="o" if words else "o-", capsize=3, label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.tick_params("x", rotation=90 if words else 0)
    if len(curves) > 1:
        axis.legend(frameon=False, fontsize=8)
    with replace_file(path) as temporary:
        axis.figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
