"""The figures of the experiments."""

from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from evaluation.statistics import Interval, Proportion, interval_over_classes, standard_error
from experiments.trainings import Trainings
from utils import replace_file


def plot_curves(path: Path, xlabel: str, ylabel: str, curves: dict[str, dict]):
    """Write one panel of curves; see `plot_panels`."""
    plot_panels(path, ylabel, {xlabel: curves})


def plot_panels(path: Path, ylabel: str, panels: dict[str, dict[str, dict]]):
    """Write {x label: {label: {x: value}}}, Proportions and Intervals as they are, lists with the mean's error.

    A curve where x is numbers, points over their names where it is words.
    """
    figure = Figure((6 * len(panels), 3.6))
    for axis, (xlabel, curves) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(),
                                      strict=True):
        for label, by_x in curves.items():
            values, below, above = zip(*map(describe_bar, by_x.values()), strict=True)
            words = not all(str(x).isdecimal() for x in by_x)
            axis.errorbar(list(by_x), values, [below, above], fmt="o" if words else "o-", capsize=3, label=label)
        axis.set(xlabel=xlabel)
        if words:
            axis.tick_params("x", labelrotation=30)
            for label in axis.get_xticklabels():
                label.set_horizontalalignment("right")
        if len(curves) > 1:
            axis.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel(ylabel)
    save_figure(figure, path)


def describe_bar(found: Proportion | Interval | list[float]) -> tuple[float, float, float]:
    """A value, and how far its bar reaches below and above it."""
    if isinstance(found, list):
        return mean(found), standard_error(found), standard_error(found)
    value = found.value if isinstance(found, Proportion) else found.mean
    return value, value - found.low, found.high - value


def plot_tradeoff(path: Path, title: str, plain: list[float], measured: dict[str, Trainings],
                  tried: dict[str, Trainings], chosen: str = "", reference: str = ""):
    """Write how often settings are right over what they cost: those `measured` for a test, and those `tried` before.

    With a `reference` among them how much more often than it, paired by class; `plain` are the shares without a token.
    """
    base = measured[reference].class_means() if reference else [0.0] * len(plain)

    def compare_base(shares: list[float]) -> Interval:
        return interval_over_classes([share - other for share, other in zip(shares, base, strict=True)])

    figure = Figure((9, 4.2))
    for axis, cost, label in zip(figure.subplots(1, 2, sharey=True), ("unet_calls", "seconds"),
                                 ("UNet calls per class", "seconds per class"), strict=True):
        level = compare_base(plain).mean
        axis.axhline(level, color="grey", linestyle=":")
        axis.annotate("without a token", (0.02, level), xycoords=("axes fraction", "data"), va="bottom",
                      color="grey", fontsize=8)
        axis.scatter([getattr(found, cost) for found in tried.values()],
                     [compare_base(found.class_means()).mean for found in tried.values()], s=16, facecolors="none",
                     edgecolors="grey", label="exploratory")
        for name, found in measured.items():
            value, *bars = describe_bar(compare_base(found.class_means()))
            axis.errorbar(getattr(found, cost), value, [[bar] for bar in bars], fmt="o", capsize=3, label=name,
                          markersize=9 if name == chosen else 6, color="tab:green" if name == chosen else None)
        axis.set(xlabel=label)
    what = f"right more often than with\n{reference}" if reference else "right class, on held-out seeds"
    figure.axes[0].set(ylabel=what, xscale="log")
    figure.axes[1].set_xlim(0)
    figure.axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    figure.axes[0].xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    figure.axes[0].xaxis.set_minor_formatter(NullFormatter())
    figure.axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path):
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
