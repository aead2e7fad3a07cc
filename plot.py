"""Run directories -> pictures. Reads only the JSON in runs/ (no torch, no model) and redraws everything in seconds.

    python plot.py          # runs/ -> nine PNGs beside this file; --runs_dir and --out_dir name other places

Edit `labels` to choose which runs are drawn, in which order, under which name. A directory that is not in it (your
own run_8) is drawn in the first two pictures all the same. Error bars and bands are the standard error over seeds.
"""
import argparse
import functools
import json
import re
import textwrap
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

labels = {  # run directory -> label, in the order drawn
    "run_0": "baseline",
    "run_1": "+ squared difference",
    "run_2": "+ Xavier, clipping",
    "run_3": "+ schedule, coef / 10",
    "run_4": "+ LayerNorm",
    "run_5": "GELU",
    "run_6": "temporal (ours)",
    "tsae_paper": "T-SAE (paper)",
    "tsae_released": "T-SAE (released code)",
    "matryoshka": "Matryoshka",
    "control_other_docs": "control: positives from other documents",
    "control_permuted": "control: tokens permuted in their document",
}
BASELINE, OURS, RIVAL = "run_0", "run_6", "tsae_paper"  # whom consistency.png and the pictures after it compare
STUDY = re.compile(r"tsae|matryoshka|control_|strong$|grid_|k\d+_")  # not in the first two pictures


# -- Style: one colour and marker for each run, the same in every picture ------------------------------------

# In the order of `labels`, then of what else is found. Safe for colour-blind readers; the first seven are >= 8
# apart in lightness (CIE L* 5 22 32 43 64 82 54), so they stay apart in greyscale; markers tell the rest.
COLOURS = ["#111111", "#332288", "#882255", "#117733", "#44AA99", "#DDCC77", "#D55E00",
           "#56B4E9", "#0072B2", "#CC79A7", "#999933", "#888888", "#AA4499", "#E69F00", "#661100", "#6699CC"]
MARKERS = "*ov^<>DsPXhdp8H4"
CLUSTERS = {"positional": ("#44AA99", "s"), "local/token": ("#BBBBBB", "o"), "segment": ("#0072B2", "^"),
            "document/topic": ("#661100", "D")}  # the names evaluate.py gives
LOSSES = {  # loss of a grid run ("": none) -> label, colour, marker, line; those of its full-budget run where it has one
    "": ("baseline", "#111111", "*", "none"), "selective": ("selective (ours)", "#D55E00", "D", "-"),
    "infonce": ("InfoNCE (T-SAE)", "#56B4E9", "s", "--"), "sqdiff": ("squared difference", "#332288", "o", "-."),
    "autocorr": ("autocorrelation", "#E69F00", "^", ":"), "variance": ("window variance", "#AA4499", "v", (0, (5, 1, 1, 1)))}

plt.switch_backend("Agg")  # draw to files; no display needed
plt.rcParams.update({"axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "hatch.linewidth": 0.6, "image.cmap": "cividis", "image.interpolation": "nearest",
                     "figure.constrained_layout.use": True, "savefig.dpi": 150})
warnings.filterwarnings("ignore", message="Mean of empty slice")  # a bin without latents: a gap
warnings.filterwarnings("ignore", message="Glyph .* missing")  # a token in a script the font lacks shows as a box


def canvas(rows, cols, height, title, seeds=(), **kwargs):
    """Axes (rows,cols) of a figure 9 inches wide (900 pixels in a README: 10 points are 14); seeds: n of each run drawn."""
    fig, axes = plt.subplots(rows, cols, figsize=(9, height), squeeze=False, **kwargs)
    n = " to ".join(map(str, sorted({min(seeds), max(seeds)}))) if seeds else ""
    note = f"mean ± standard error over seeds, n = {n}" if n and n != "1" else "one seed" if n else "first seed"
    fig.suptitle(f"{title} ({note})", x=0.01, ha="left", fontweight="bold")
    return axes


def mean_se(values):
    """Mean and standard error over the first axis (seeds); the error is 0 where there is one seed."""
    values = np.asarray(values, float)
    return values.mean(0), values.std(0, ddof=len(values) > 1) / len(values) ** 0.5


def band(ax, x, values, run, linestyle="-", **kwargs):
    """Line through the mean of values (seeds, len(x)), with a band of one standard error."""
    mean, se = mean_se(values)
    ax.plot(x, mean, linestyle, color=run.colour, **kwargs)
    ax.fill_between(x, mean - se, mean + se, color=run.colour, alpha=0.25, linewidth=0)


# -- Reading run directories ---------------------------------------------------------------------------------
@functools.cache  # a missing file is reported once, not once a picture
def load(path):
    """Parsed JSON, a list of rows for .jsonl; {}, with a line on stdout, where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except (OSError, ValueError) as error:
        print(f"skipped: {path} ({getattr(error, 'strerror', None) or error})")
        return {}


class Run:
    """One run directory. scores: metric -> one value a seed; a metric that is undefined for a seed is not there."""

    def __init__(self, path, label, index):
        self.path, self.name, self.label = path, path.name, label
        self.colour, self.marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        self.config, info = load(path / "config.json"), load(path / "final_info.json")
        self.scores = {k: np.array(v, float) for dataset in info.values() for k, v in dataset["final_info_dict"].items()}
        self.n = len(self.scores.get("explained_variance", ()))  # seeds

    @functools.cached_property
    def consistency(self):
        """The consistency.json of each seed: in seed_K/ where a run has several, else in the run directory."""
        paths = sorted(self.path.glob("seed_*/consistency.json"), key=lambda p: int(p.parent.name[5:]))
        return [one for one in map(load, paths or [self.path / "consistency.json"]) if one] or [{}]

    def curve(self, term):
        """(steps, values (seeds, steps)) of a term of log.jsonl, at the steps all seeds logged; None without any."""
        rows = [row for row in load(self.path / "log.jsonl") if row.get(term) is not None]
        seeds = [{row["step"]: row[term] for row in rows if row["seed"] == seed} for seed in {row["seed"] for row in rows}]
        steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
        return (steps, [[values[step] for step in steps] for values in seeds]) if steps else None


def find_runs(runs_dir):
    """Name -> Run of every run directory: `labels`, then a user's own, then the rest of the study."""
    present = {p.parent.name for p in runs_dir.glob("*/config.json") if load(p)}
    for name in [name for name in labels if present and name not in present]:
        print(f"skipped: no run {runs_dir / name}")
    order = [*labels, *sorted(present - labels.keys(), key=lambda name: (bool(STUDY.match(name)), len(name), name))]
    return {name: Run(runs_dir / name, labels.get(name, name), i) for i, name in enumerate(order) if name in present}


# -- The ladder of runs: metrics_comparison.png and training_curves.png --------------------------------------
def bars(ax, runs, metric, side, fmt, ylabel):
    """One bar a run; side -1 (plain) and 1 (hatched) share a place, 0 has it alone. Negative bars hang down."""
    scored = [mean_se(run.scores[metric]) if metric in run.scores else None for run in runs]
    height, error = np.array([one or (0, 0) for one in scored]).T
    drawn = ax.bar(np.arange(len(runs)) + 0.2 * side, height, 0.38 if side else 0.6, yerr=error, edgecolor="white",
                   color=[run.colour for run in runs], hatch="////" if side > 0 else None, error_kw={"ecolor": "0.5"})
    crowded = len(runs) > 8  # then the numbers stand upright
    ax.bar_label(drawn, [fmt.format(one[0]) if one else "n/a" for one in scored], padding=2, fontsize=8.5, rotation=90 * crowded)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set(xmargin=0.02, ymargin=0.4 if crowded else 0.2, ylabel=ylabel)


def metrics_comparison(runs):
    """Bars of every run of the ladder: fidelity, sparsity, behaviour of the LM."""
    (top,), (middle,), (bottom,) = canvas(3, 1, 8.2, "Scores on held-out documents", [run.n for run in runs], sharex=True)
    right = middle.twinx()
    right.spines["right"].set_visible(True)
    bars(top, runs, "explained_variance", -1, "{:.3f}", "")
    bars(top, runs, "cossim", 1, "{:.3f}", "explained variance (plain)\ncosine similarity (hatched)")
    bars(middle, runs, "l0", -1, "{:.1f}", "L0: active latents a token\n(plain)")
    bars(right, runs, "l1", 1, "{:.0f}", "L1: sum |code| a token\n(hatched)")
    bars(bottom, runs, "ce_loss_score", 0, "{:.3f}", "CE loss score (1 = as the\nLM alone, 0 = zero ablation)")
    names = ["\n".join(textwrap.wrap(run.label, max(12, 84 // len(runs)))) for run in runs]
    bottom.set_xticks(range(len(runs)), names, fontsize=9, rotation=45 * (len(runs) > 8))


def training_curves(runs):
    """Reconstruction loss and sparsity over training steps."""
    (top,), (bottom,) = canvas(2, 1, 7.2, "Training", [len(run.curve("recon")[1]) for run in runs], sharex=True)
    for run in runs:
        mark = {"marker": run.marker, "markersize": 5, "markevery": 0.15, "linewidth": 1.4}
        band(top, *run.curve("recon"), run, label=run.label, **mark)
        band(bottom, *(run.curve("l1") or run.curve("l0")), run, "--" if run.curve("l1") else "-", **mark)
    top.set(yscale="log", ylabel="share of variance missed (log)", title="Reconstruction loss")
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "2357" else "")
    if any(run.curve("l1") for run in runs):
        bottom.set(yscale="log", ylabel="L0 (active latents a token) or\nL1 (sum |code| a token), log",
                   title="Sparsity: L1 loss (dashed) of the runs that have one; L0 of the top-k runs, which have none")
    else:  # from zero: wiggles of a fixed L0 are no news
        bottom.set(ylim=(0, 1.1 * bottom.dataLim.y1), ylabel="L0 (active latents a token)",
                   title="Sparsity: L0, because top-k runs have no L1 loss")
    bottom.set_xlabel("training step")
    plt.figlegend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=4)


# -- What the temporal loss buys and costs: consistency.png, frontier.png, ablation.png ----------------------
def gains(base, run):
    """How much higher a latent's autocorrelation at lag 1 is than base's: [as it is, at equal firing rates], a value a seed.

    The second is c in autocorrelation ~ a + b log10(firing rate) + c [latent of run], fitted to all latents of both runs."""
    seeds = []
    for tables in zip(base.consistency, run.consistency):
        rho, rate = (np.concatenate([np.array(one["latents"][key], float) for one in tables])
                     for key in ("autocorr_1", "rate"))
        second = np.repeat([0.0, 1.0], [len(one["latents"]["rate"]) for one in tables])
        known = np.isfinite(rho)
        fit = np.linalg.lstsq(np.c_[np.ones(known.sum()), np.log10(rate[known]), second[known]], rho[known])[0]
        seeds.append((rho[known & (second == 1)].mean() - rho[known & (second == 0)].mean(), fit[2]))
    return np.transpose(seeds)


def consistency(runs):
    """Autocorrelation of codes by lag, with its null and the raw activations'; at lag 1 by firing rate."""
    axes = canvas(2, 2, 8.0, "Do codes last from token to token?", [len(run.consistency) for run in runs]).ravel()
    first = runs[0].consistency[0]  # its lags and raw activations hold for all: the held-out rows are the same
    for ax, name, weight, title in zip(axes, ("autocorr", "autocorr", "autocorr_within"), ("mean", "mass", "mean"),
                                       ("mean over latents", "weighted by firing rate", "mean, within a document")):
        for run in runs:
            codes, null = ([s[key]["whole"][weight] for s in run.consistency] for key in (name, name + "_null"))
            band(ax, first["lags"], codes, run, label=run.label, marker=run.marker)
            band(ax, first["lags"], null, run, "--", linewidth=1)
        ax.plot(first["lags"], np.array(first[name + "_raw"][weight], float), "-.", color="0.5", label="raw activations")
        ax.axhline(0, color="0.3", linewidth=0.6)
        ax.set_xscale("log", base=2)
        ax.set(title=title, xlabel="lag (tokens)", xticks=first["lags"], xticklabels=first["lags"])
    # frequent latents are smoother in any dictionary: at an equal rate, is there still a difference?
    edges = np.logspace(-3.3, -0.7, 9)
    for run in runs:
        tables = [(np.array(s["latents"]["rate"]), np.array(s["latents"]["autocorr_1"], float)) for s in run.consistency]
        seeds = [[np.nanmean(np.r_[rho[(rate >= a) & (rate < b)], np.nan]) for a, b in zip(edges, edges[1:])] for rate, rho in tables]
        band(axes[3], np.sqrt(edges[:-1] * edges[1:]), seeds, run, marker=run.marker)
    axes[3].set(xscale="log", title="at lag 1, by firing rate", xlabel="firing rate (share of tokens)")
    note = [f"gain over {runs[0].label}: as it is; at equal firing rates"]
    for run in runs[1:]:
        plain, equal = ("{:+.4f} ± {:.4f}".format(*mean_se(values)) for values in gains(runs[0], run))
        note.append(f"{run.label}: {plain}; {equal}")
        print(f"autocorr_1, gain of {run.name} over {runs[0].name}: {plain}; at equal firing rates: {equal}")
    axes[3].text(0.02, 0.99, "\n".join(note), va="top", fontsize=8.5, transform=axes[3].transAxes)
    axes[3].set_ylim(top=1.3 * axes[3].get_ylim()[1])  # room for the note
    for ax in axes[::2]:
        ax.set_ylabel("autocorrelation of a latent's code")
    axes[0].plot([], [], "--", color="0.3", linewidth=1, label="dashed: tokens permuted within a document")
    plt.figlegend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def frontier(runs):
    """Explained variance against autocorrelation in documents: each loss over its coefficients; the full-budget runs."""
    grid = [run for run in runs if run.name.startswith("grid_")]
    panels = [panel for panel in (grid, [run for run in runs if run not in grid]) if panel]
    title = f"What consistency costs, L0 {runs[0].config['k']} ± 1 %"
    (axes,) = canvas(1, len(panels), 5.8, title, [run.n for run in runs], width_ratios=[1.5, 1][-len(panels):])
    keys, hollow = {}, []  # colour and marker -> what the legend shows: the curves, and the runs that have none
    for ax, panel in zip(axes, panels):
        curves, short = {}, panel is grid  # label, colour, marker, line -> runs
        worth = max(run.scores["explained_variance"].mean() for run in panel) - 0.1
        for run in panel:
            if run.scores["explained_variance"].mean() < worth:  # nobody wants it, and it would squeeze all others
                print(f"frontier.png: {run.name} explains {run.scores['explained_variance'].mean():.2f}: too far down to be drawn")
                continue
            loss = run.config["temp_loss"] if run.config["temp_alpha"] else ""
            alone = run.label, run.colour, run.marker, "none"
            ours = loss == "selective" and run.config["control"] == "none"  # at two weights
            curves.setdefault(LOSSES.get(loss, alone) if short or ours else alone, []).append(run)
        numbers = []  # coefficient and its place
        for (label, colour, marker, line), points in curves.items():
            points.sort(key=lambda run: run.config["temp_alpha"])
            (x, dx), (y, dy) = (np.transpose([mean_se(run.scores[metric]) for run in points])
                                for metric in ("autocorr_within_1", "explained_variance"))
            style = {"color": colour, "marker": marker, "markersize": 7}
            drawn = ax.errorbar(x, y, dy, dx, **style, linestyle=line, label=label, capsize=2, zorder=2.5)
            keys.setdefault((colour, marker), drawn)
            numbers += [(run.config["temp_alpha"], colour, place) for run, *place in zip(points, x, y) if line != "none"]
            for run, *place in zip(points, x, y):
                if abs(run.scores["l0"].mean() / run.config["k"] - 1) > 0.01:
                    print(f"frontier.png: the L0 of {run.name} is {run.scores['l0'].mean():.2f}: hollow")
                    hollow = ax.plot(*place, **style, linestyle="none", markerfacecolor="white", zorder=3,
                                     label="hollow: L0 is further off")
        ax.autoscale_view()
        taken = []  # pixels: weak coefficients leave runs beside the baseline, where not all numbers have room
        for alpha, colour, place in sorted(numbers, key=lambda number: -number[2][0]):  # from the right
            x, y = ax.transData.transform(place)
            if all(abs(x - u) > 35 or abs(y - v) > 9 for u, v in taken):
                ax.annotate(f"{alpha:g}", place, (6, 3), textcoords="offset points", fontsize=8.5, color=colour,
                            path_effects=[withStroke(linewidth=1.5, foreground="white")])
            taken.append((x, y))
        budget = f"{panel[0].config['train_tokens'] / 1e6:g} M tokens"
        ax.set(title=f"{budget}; small numbers: coefficient" if short else budget, ylabel="explained variance",
               xlabel="autocorrelation at lag 1 within a document")
    plt.figlegend(handles=[*keys.values(), *hollow], loc="outside lower center", ncols=3)


def ablation(runs):
    """Window x coefficient: gain in autocorrelation and cost in explained variance, against the first run, the baseline."""
    base, *grid = runs
    tables = {}  # loss -> {(window, coefficient): (gain, cost)}, each a mean and standard error over paired seeds
    for run in grid:
        n = min(run.n, base.n)
        gain = run.scores["autocorr_1"][:n] / base.scores["autocorr_1"][:n]
        cost = run.scores["explained_variance"][:n] - base.scores["explained_variance"][:n]
        cells = tables.setdefault(run.config["temp_loss"], {})
        cells[run.config["window"], run.config["temp_alpha"]] = mean_se(gain), mean_se(cost)
    heights = [len({window for window, _ in cells}) for cells in tables.values()]
    title = f"Window × coefficient, {base.config['train_tokens'] / 1e6:g} M tokens"
    height = 0.6 + 0.9 * len(tables) + 0.4 * sum(heights)
    axes = canvas(len(tables), 2, height, title, [run.n for run in grid], height_ratios=heights)
    for k, fmt, what in ((0, "{:.2f}", "autocorrelation at lag 1, × baseline"),
                         (1, "{:+.3f}", "explained variance − baseline")):
        means = [cell[k][0] for cells in tables.values() for cell in cells.values()]  # the same colours for each loss
        for ax, (loss, cells) in zip(axes[:, k], tables.items()):
            windows, alphas = (sorted(set(axis)) for axis in zip(*cells))
            table = [[cells[w, a][k][0] if (w, a) in cells else np.nan for a in alphas] for w in windows]
            image = ax.imshow(table, vmin=min(means), vmax=max(means), aspect="auto")
            for (w, a), cell in cells.items():
                number = fmt.format(cell[k][0]).replace("-", "−")
                ax.text(alphas.index(a), windows.index(w), number, ha="center", va="center",
                        color="black" if image.norm(cell[k][0]) > 0.5 else "white")
            error = max(cell[k][1] for cell in cells.values())
            ax.set(title=f"{LOSSES.get(loss, [loss])[0]}\n{what} (± {error:.1g} or less)", xlabel="coefficient",
                   xticks=range(len(alphas)), xticklabels=[f"{a:g}" for a in alphas], ylabel="window (tokens)",
                   yticks=range(len(windows)), yticklabels=windows)


# -- What the features do (first seed): feature_timeline, position_correlation, redundancy, clusters ---------
def feature_timeline(runs, shown=56):  # tokens along x; more could not be read
    """Strips of the most active latents along one held-out passage; the tokens stand below."""
    passages = [run.consistency[0]["timeline"] for run in runs]
    tokens = [re.sub("^[Ġ▁]", "", t).replace("Ċ", "⏎").replace("\n", "⏎") for t in passages[0]["tokens"][:shown]]
    axes = canvas(len(runs), 1, 1.3 + 2.7 * len(runs), f"Most active latents, held-out passage: {passages[0]['doc']}")
    for ax, run, passage in zip(axes[:, 0], runs, passages):
        codes = np.array(passage["codes"], float)[:, :shown]
        hue = LinearSegmentedColormap.from_list(run.name, ["#F4F4F4", run.colour])  # off is nearly white
        ax.imshow(codes / codes.max(1, keepdims=True).clip(1e-9), cmap=hue, aspect="auto", vmin=0, vmax=1)
        ax.hlines(np.arange(len(codes) - 1) + 0.5, -0.5, len(tokens) - 0.5, color="white", linewidth=2)  # rows become strips
        ax.set_yticks(range(len(codes)), passage["latents"], fontsize=8.5)
        ax.set(ylabel="latent", xticks=[], title=f"{run.label}: switched on or off {np.sum(np.diff(codes > 0, axis=1))} times")
    ax.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=9, parse_math=False)  # a token may be "$"
    ax.set_xlabel("token (depth of colour: code / the latent's largest code in the passage)")


def position_correlation(runs):
    """Correlation of codes and of raw activations between positions of a context."""
    panels = [(f"codes, {run.label}", run.consistency[0]["position_corr"], "codes") for run in runs]
    panels.append(("raw activations", runs[0].consistency[0]["position_corr"], "raw"))
    tables = [np.array(one[key], float) for _, one, key in panels]
    low, high = np.nanpercentile([t[~np.eye(len(t), dtype=bool)] for t in tables], (1, 99))  # the diagonal would hide the rest
    (axes,) = canvas(1, len(panels), 3.7, "Correlation between positions p and q of a context")
    for ax, table, (title, one, key) in zip(axes, tables, panels):
        end, share = len(table) * one["step"], one["toeplitzness"][key]  # tokens; of the table's variance
        image = ax.imshow(table, vmin=low, vmax=high, extent=(0, end, end, 0))
        ax.set(title=title + ("" if share is None else f"\n{share:.0%} explained by |p − q|"), xlabel="position q (tokens)",
               ylabel="position p (tokens)", facecolor="0.8")  # grey where no pair was seen
        ax.label_outer()
    plt.colorbar(image, ax=axes, extend="both", shrink=0.8, pad=0.01, label="correlation")


def redundancy(runs):
    """Latent x latent correlation ordered by cluster, and the histogram of best partners."""
    found = [run.consistency[0]["redundancy"] for run in runs]
    low = min(np.min(one["matrix"]["corr"]) for one in found)
    ((*squares, right),) = canvas(1, len(runs) + 1, 4.1, "Redundant latents")
    for ax, run, one in zip(squares, runs, found):
        n, starts = len(one["matrix"]["corr"]), np.flatnonzero(np.diff(one["matrix"]["clusters"])) + 0.5  # of the next cluster
        image = ax.imshow(one["matrix"]["corr"], vmin=low, vmax=1)
        ax.set(title=f"{run.label}\neffective rank {one['effective_rank']:.0f} of {one['latents']}",
               xlabel=f"{n} latents, ordered by cluster", xticks=starts, yticks=starts, xticklabels=[], yticklabels=[])
        ax.grid(color="white", linewidth=0.8)
        ax.tick_params(length=0)
        counts, bins = (np.array(one["best_partner_histogram"][key]) for key in ("counts", "edges"))
        first = np.flatnonzero(counts)[0]  # correlations start well above -1
        right.stairs(100 * counts[first:] / counts.sum(), bins[first:], color=run.colour, linewidth=2,
                     label=f"{run.label}: {one['share_above_0.9']:.1%} above 0.9")
    right.set(xlabel="correlation with the best partner", ylabel="latents (%)")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    plt.colorbar(image, ax=squares, location="bottom", shrink=0.6, label="correlation of codes over tokens")


def clusters(runs):
    """Latents by activation pattern: scatter, and shares by kind."""
    axes = canvas(2, 2, 7.2, "Kinds of latents by activation pattern", height_ratios=[1.5, 1])
    axes[0, 1].set_visible(len(runs) == 2)
    for i, run in enumerate(runs):
        latents, found = run.consistency[0]["latents"], run.consistency[0]["clusters"]
        kind = np.array([one["name"] for one in found["list"]])[latents["cluster"]]
        for name, (colour, marker) in CLUSTERS.items():
            x, y = (np.array(latents[axis], float)[kind == name] for axis in "xy")
            axes[0, i].scatter(x, y, 9, colour, marker=marker, linewidths=0, alpha=0.7)
        axes[0, i].set(title=f"{run.label}, silhouette {found['silhouette']:.2f}", xlabel="PCA 1 (of each run's own)", ylabel="PCA 2")
        for ax, key, what in zip(axes[1], ("size", "mass_share"), ("latents (%)", "firing mass (%)")):
            shares = np.array([sum(one[key] for one in found["list"] if one["name"] == name) for name in CLUSTERS])
            drawn = ax.barh(np.arange(4) + 0.4 * i - 0.2, 100 * shares / shares.sum(), 0.37, color=run.colour, label=run.label)
            ax.bar_label(drawn, fmt="%.1f", padding=2)
            ax.set(xlabel=what, xmargin=0.15, ylim=(3.6, -0.6), yticks=range(4), yticklabels=CLUSTERS)
    keys = [Line2D([], [], color=colour, marker=marker, linestyle="none", label=name) for name, (colour, marker) in CLUSTERS.items()]
    plt.figlegend(handles=keys + axes[1, 0].get_legend_handles_labels()[0], loc="outside lower center", ncols=3)


def choose(runs):
    """Picture -> the runs it draws."""
    scored = [run for run in runs.values() if {"explained_variance", "autocorr_1", "autocorr_within_1"} <= run.scores.keys()]
    ladder = [run for run in runs.values() if not STUDY.match(run.name)]
    pair = [runs[name] for name in (BASELINE, OURS) if name in runs]
    grid = [run for run in scored if run.name.startswith("grid_")]
    base = [run for run in grid if run.config["temp_alpha"] == 0][:1]
    grid = [run for run in grid if base and run.config["train_tokens"] == base[0].config["train_tokens"]]  # equal budget
    windows = {loss: {run.config["window"] for run in grid if run.config["temp_loss"] == loss} for loss in LOSSES}
    swept = [run for run in grid if run not in base and len(windows.get(run.config["temp_loss"], ())) > 1]
    costs = [run for run in scored if run in pair or re.match("tsae|matryoshka|control_|strong$", run.name)]
    costs += [run for run in grid if run.config["window"] == 2]
    has = lambda run, key, part: (run.consistency[0].get(key) or {}).get(part) is not None
    return {metrics_comparison: [run for run in ladder if "explained_variance" in run.scores],
            training_curves: [run for run in ladder if run.curve("recon")],
            consistency: [runs[name] for name in (BASELINE, RIVAL, OURS) if name in runs and has(runs[name], "autocorr", "whole")],
            frontier: costs if len(costs) > 1 else [],
            ablation: swept and base + swept,
            feature_timeline: [run for run in pair if has(run, "timeline", "codes")],
            position_correlation: [run for run in pair if has(run, "position_corr", "codes")],
            redundancy: [run for run in pair if has(run, "redundancy", "matrix")],
            clusters: [run for run in pair if has(run, "clusters", "silhouette")]}


def main():
    """The command. Exit code 0, 1 if there is no run, 2 bad usage."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"plot.py: {message}\n")
    parser.add_argument("--runs_dir", type=Path, default=here / "runs", help="where the run directories are (default: %(default)s)")
    parser.add_argument("--out_dir", type=Path, default=here, help="where the PNGs go (default: %(default)s)")
    args = parser.parse_args()
    if not args.runs_dir.is_dir():
        parser.error(f"--runs_dir {args.runs_dir} is not a directory")
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out_dir {args.out_dir}: {error.strerror}")
    runs = find_runs(args.runs_dir)
    if not runs:
        parser.exit(1, f"plot.py: no run found in {args.runs_dir}; train one with: python experiment.py --out_dir run_0\n")
    for draw, drawn in choose(runs).items():
        path = args.out_dir / f"{draw.__name__}.png"
        if drawn:
            draw(drawn)
            plt.savefig(path, metadata={"Software": None})  # no version stamp: same numbers, same bytes
            plt.close()
        print(f"wrote {path}" if drawn else f"skipped: {path.name} (no run has what it draws)")


if __name__ == "__main__":
    main()
