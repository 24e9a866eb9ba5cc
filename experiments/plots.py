"""The figures of the experiments."""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from evaluation.statistics import Interval, Proportion, interval_over_classes, standard_error
from experiments.trainings import Trainings
from utils import replace_file


def plot_curves(path: Path, xlabel: str, ylabel: str, curves: dict[str, dict]):
    """Write one panel of curves; see `plot_panels`."""
    plot_panels(path, ylabel, {xlabel: curves})


def plot_panels(path: Path, ylabel: str, panels: dict[str, dict[str, dict]]):
    """Write {x label: {label: {x: value}}} as panels.

    Proportions and Intervals are drawn as they are, lists as mean and standard error; curves where
    x is numbers, points over names where it is words.
    """
    figure = Figure((6 * len(panels), 3.6))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (xlabel, curves) in zip(axes, panels.items(), strict=True):
        axis.set(xlabel=xlabel)
        for label, by_x in curves.items():
            plot_curve(axis, label, by_x)
        if len(curves) > 1:
            axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel(ylabel)
    save_figure(figure, path)


def plot_curve(axis: Axes, label: str, by_x: dict):
    """Draw one curve, or points over words."""
    has_words = not all(str(x).isdecimal() for x in by_x)
    bars = [describe_bar(found) for found in by_x.values()]
    values = [value for value, _, _ in bars]
    errors = [below for _, below, _ in bars], [above for _, _, above in bars]
    style = "o" if has_words else "o-"
    axis.errorbar(list(by_x), values, errors, fmt=style, capsize=3, label=label)
    if has_words:
        axis.tick_params("x", labelrotation=30)
        for text in axis.get_xticklabels():
            text.set_horizontalalignment("right")


def describe_bar(found: Proportion | Interval | list[float]) -> tuple[float, float, float]:
    """Return a value, and how far its bar reaches below and above it."""
    if isinstance(found, list):
        error = standard_error(found)
        return mean(found), error, error
    value = found.value if isinstance(found, Proportion) else found.mean
    return value, value - found.low, found.high - value


def plot_tradeoff(
    path: Path,
    title: str,
    plain: list[float],
    measured: dict[str, Trainings],
    tried: dict[str, Trainings],
    chosen: str = "",
    reference: str = "",
):
    """Plot the accuracy of settings over their cost.

    Those `measured` for a test, and those `tried` before. With a `reference` among them, the
    difference to it, paired by class; `plain` are the accuracies without a token.
    """
    base = [0.0] * len(plain)
    ylabel = "accuracy on held-out seeds"
    if reference:
        base = measured[reference].class_means()
        ylabel = f"accuracy minus that of\n{reference}"

    def compare_base(shares: list[float]) -> Interval:
        differences = [share - other for share, other in zip(shares, base, strict=True)]
        return interval_over_classes(differences)

    figure = Figure((9, 4.2))
    axes = figure.subplots(1, 2, sharey=True)
    level = compare_base(plain).mean
    for axis, cost in zip(axes, ("unet_calls", "seconds"), strict=True):
        axis.axhline(level, color="grey", linestyle=":")
        axis.annotate(
            "without a token",
            (0.02, level),
            xycoords=("axes fraction", "data"),
            va="bottom",
            color="grey",
            fontsize=8,
        )
        costs = [getattr(found, cost) for found in tried.values()]
        gains = [compare_base(found.class_means()).mean for found in tried.values()]
        axis.scatter(costs, gains, s=16, facecolors="none", edgecolors="grey", label="exploratory")
        for name, found in measured.items():
            gain = compare_base(found.class_means())
            is_chosen = name == chosen
            plot_setting(axis, name, getattr(found, cost), gain, is_chosen)
    label_costs(axes, ylabel)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def plot_setting(axis: Axes, name: str, cost: float, gain: Interval, is_chosen: bool):
    """Draw one setting of a test."""
    value, below, above = describe_bar(gain)
    axis.errorbar(
        cost,
        value,
        [[below], [above]],
        fmt="o",
        capsize=3,
        label=name,
        markersize=9 if is_chosen else 6,
        color="tab:green" if is_chosen else None,
    )


def label_costs(axes: list[Axes], ylabel: str):
    """Label the panels of `plot_tradeoff`: UNet calls, on a logarithmic scale, and seconds."""
    calls, seconds = axes
    calls.set(ylabel=ylabel, xscale="log", xlabel="UNet calls per class")
    calls.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    calls.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    calls.xaxis.set_minor_formatter(NullFormatter())
    seconds.set(xlabel="seconds per class")
    seconds.set_xlim(0)
    seconds.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def save_figure(figure: Figure, path: Path):
    """Write a figure as PNG, atomically, with the same bytes for the same figure."""
    with replace_file(path) as temporary:
        figure.savefig(
            temporary, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None}
        )
