"""A set of runs, several seeds of each arm, as a table (mean ± standard error, n), differences from one arm, and a figure."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common import plain_text
from report.plot_style import COLOURS, drawable, pyplot, save_figure

Results = Mapping[str, Mapping[int, Mapping[str, float | None]]]  # {arm: {seed: {measure: value}}}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, s / √n with s of n − 1; the error of a single value is NaN."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def summarise(
    results: Results, reference: str, incomparable: Mapping[str, set[str]] | None = None
) -> dict[str, dict[str, dict]]:
    """{arm: {measure: {mean, error, n, comparable, difference, difference_error}}}.

    The difference from the reference arm is taken seed by seed: two arms of one seed share their first weights, batches and
    noise, so that much of the chance cancels. Its error is that of the mean of these differences. `incomparable` names
    the measures of an arm that cannot be compared with the reference's: they have no difference.
    """
    measures = dict.fromkeys(m for seeds in results.values() for r in seeds.values() for m in r)
    table = {arm: {} for arm in results}
    for arm, measure in itertools.product(results, measures):
        values, others = (_by_seed(results[name], measure) for name in (arm, reference))
        if not values:
            continue
        mean, error = mean_and_error(list(values.values()))
        comparable = measure not in (incomparable or {}).get(arm, ())
        row = {"mean": mean, "error": error, "n": len(values), "comparable": comparable}
        pairs = [value - others[seed] for seed, value in values.items() if seed in others]
        if arm != reference and pairs and comparable:
            row["difference"], row["difference_error"] = mean_and_error(pairs)
        table[arm][measure] = row
    return table


def _by_seed(seeds: Mapping[int, Mapping[str, float | None]], measure: str) -> dict[int, float]:
    """{seed: value} of an arm, where it was measured."""
    return {seed: found[measure] for seed, found in seeds.items() if found.get(measure) is not None}


def markdown(
    table: Mapping[str, Mapping[str, Mapping]], measures: Mapping[str, str], differences: Sequence[str] = ()
) -> str:
    """A table with one row an arm: each measure of {name: format} as mean ± error, n, and for some the difference beside it.

    A dagger marks a value that cannot be compared with the reference's.
    """
    heads = ["arm", "n"]
    for name in measures:
        heads += [name, "Δ"] if name in differences else [name]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, rows in table.items():
        cells = [plain_text.markdown(arm), str(max(row["n"] for row in rows.values()))]
        for name, form in measures.items():
            row = rows.get(name, {})
            mark = "" if row.get("comparable", True) else " †"
            cells.append(_plus_minus(row, "mean", "error", form) + mark)
            if name in differences:
                cells.append(_plus_minus(row, "difference", "difference_error", f"+{form}"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plus_minus(row: Mapping, value: str, error: str, form: str) -> str:
    if value not in row:
        return "—"
    shown = format(row[value], form)
    return shown if np.isnan(row[error]) else f"{shown} ± {format(row[error], form.removeprefix('+'))}"


def plot_arms(
    path: str | Path,
    results: Results,
    reference: str,
    measures: Mapping[str, str],
    title: str,
    incomparable: Mapping[str, set[str]] | None = None,
) -> None:
    """One panel a measure of {name: label}: each arm's seeds as dots, its mean ± standard error, and the reference's mean.

    Measures of an arm that cannot be compared with the reference's (`incomparable`, as in `summarise`) are left out.
    """
    arms, skipped = list(results), incomparable or {}
    size = (2.0 + 2.9 * len(measures), 1.3 + 0.34 * len(arms))
    shape = {"figsize": size, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(1, len(measures), **shape)
    for panel, (measure, label) in zip(axes[0], measures.items(), strict=True):
        for row, arm in enumerate(arms):
            values = list(_by_seed(results[arm], measure).values())
            if not values or measure in skipped.get(arm, ()):
                continue
            mean, error = mean_and_error(values)
            bar = None if np.isnan(error) else error
            dot = {"color": "#555555" if arm == reference else COLOURS[0], "zorder": 2}
            panel.plot(values, [row + 0.16] * len(values), "o", alpha=0.4, markersize=4, **dot)
            panel.errorbar(mean, row, xerr=bar, fmt="D", markersize=5, capsize=3, **dot)
            if arm == reference:
                panel.axvline(mean, color="#777777", linewidth=1, linestyle="--", zorder=1)
        panel.set_xlabel(label)
        panel.grid(axis="y", visible=False)
        panel.locator_params(axis="x", nbins=4)
    axes[0, 0].set_yticks(range(len(arms)), map(drawable, arms))
    axes[0, 0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(title)
    found = {
        name: {arm: [seed.get(name) for seed in results[arm].values()] for arm in arms} for name in measures
    }
    save_figure(figure, path, {"title": title, "reference": reference, "measures": found})
