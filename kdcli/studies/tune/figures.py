"""Figures of a study."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

from kdcli.base.plotting import BLUE, FRONT, GREEN, GRID, ORANGE, Target, drawn_to, shown
from kdcli.studies.tune.study import Trial


def importances(shares: Mapping[str, float], target: Target) -> None:
    """Draw each setting's share as a bar, the largest on top.

    Raises:
        KdError: the figure cannot be written.
    """
    names = list(shares)[::-1]
    with drawn_to(target, 7.2, 1.2 + 0.4 * len(names)) as figure:
        axes = figure.add_subplot()
        percent = [100 * shares[name] for name in names]
        bars = axes.barh(range(len(names)), percent, color=BLUE, height=0.6)
        axes.bar_label(bars, [f"{value:.0f} %" for value in percent], padding=4)
        axes.set_yticks(range(len(names)), [shown("--" + name.replace("_", "-")) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 110)
        axes.set_xlabel("share of the variance of accuracies, %")
        axes.grid(axis="x", color=GRID, linewidth=0.6)


def history(trials: Sequence[Trial], target: Target) -> None:
    """Draw the accuracy of each trial by number, and the best so far.

    Raises:
        KdError: the figure cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    with drawn_to(target, 7.2, 4.0) as figure:
        axes = figure.add_subplot()
        finished = [trial for trial in trials if trial.state == "complete"]
        numbers = [trial.number for trial in finished]
        best = list(accumulate((trial.accuracy or 0.0 for trial in finished), max))
        axes.step(numbers, best, where="post", color=FRONT, linewidth=1.5, label="best so far")
        for state, colour, label in (("complete", BLUE, "finished"), ("pruned", ORANGE, "pruned")):
            own = [trial for trial in trials if trial.state == state and trial.accuracy is not None]
            if own:
                x, y = [trial.number for trial in own], [trial.accuracy or 0.0 for trial in own]
                axes.scatter(x, y, s=30, color=colour, label=label, zorder=2)
        if finished:
            top = numbers[best.index(best[-1])]
            axes.plot([top], [best[-1]], "o", markersize=9.5, mfc="none", mec=GREEN, mew=1.8, zorder=3)
            axes.set_title(f"best {best[-1]:.2f} % in trial {top}", fontsize=9, loc="right")
        axes.set_xlabel("trial")
        axes.set_ylabel("validation accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=GRID, linewidth=0.6)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9)
