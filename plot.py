"""Draw pictures and the page of latents from the records of runs. Needs no torch and no model.

    python plot.py                        # the study in runs/study and your own runs in runs/
    python plot.py run_4 run_5            # only these runs
    python plot.py --compare run_4 run_5  # their scores side by side, and the differences
    python plot.py --page run_0 run_6     # latents of one run or of two: latents.html in the last
    python plot.py --tables               # the tables of README.md and notes.txt anew

metrics_comparison.png and training_curves.png are written beside this file, the others under
figures/. What has no data is skipped with a sentence. Edit `labels` to choose order and names.
Error bars and bands are one standard error over seeds.

Read from a run's directory: config.json, final_info.json, log.jsonl, latents.json, and
consistency.json (of each seed in seed_K/ where a run has several). Read from runs/study.csv, one
row a run and seed: the columns run, seed, temp_loss, temp_alpha, window, temporal_fraction and k,
then the headline numbers under their names in final_info.json; an empty cell is undefined. The
short runs of the grid of windows, weights, leading shares and losses, which pictures show, have
names that begin with grid_; grid_base is their baseline (weight 0).
"""
import argparse
import contextlib
import csv
import functools
import html
import json
import math
import os
import textwrap
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

labels = {  # run directory under runs/study -> label, in the order drawn
    "run_0": "baseline",
    "run_1": "+ squared difference",
    "run_2": "+ Xavier, clipping",
    "run_3": "+ schedule, weight / 10",
    "run_4": "+ LayerNorm",
    "run_5": "GELU",
    "run_6": "temporal (ours)",
    "run_7": "temporal, weight .03",
    "run_8": "window mean, squared error",
    "tsae_published": "T-SAE (as published)",
    "tsae_released": "T-SAE (as released)",
    "tsae_tuned": "T-SAE (tuned)",
    "matryoshka": "Matryoshka",
    "gemma_base": "Gemma 3: baseline",
    "gemma_ours": "Gemma 3: temporal (ours)",
    "gemma_strong": "Gemma 3: temporal, weight .03",
    "gemma_tsae": "Gemma 3: T-SAE (cosines)",
    "gemma_tsae_dot": "Gemma 3: T-SAE (inner products)",
}
# The runs of the study in the two top-level pictures, in those of latents, and in consistency.png.
LADDER = ("run_0", "run_1", "run_2", "run_3", "run_4", "run_5", "run_6")
PAIR = ("run_0", "run_6")
TRIO = ("run_0", "tsae_tuned", "run_6")
# The same loss with other weights in whole runs, from study.csv: one curve in frontier.png.
WEIGHTS = {"run_6": ("whole_a0.003", "run_7", "whole_a0.1"),
           "run_8": ("whole_mean_a0.5", "whole_mean_a1")}
# Runs of four times the budget, of which only study.csv tells: which run of the study each is like.
LONG = {"long_base": "run_0", "long_ours": "run_6", "long_mean": "run_8", "long_tsae": "tsae_tuned"}
LOSSES = {  # temp_loss -> label, colour, marker, line style; the default first
    "window_infonce": ("window mean, InfoNCE (ours)", "#D55E00", "D", "-"),
    "window_mean": ("window mean, squared error", "#0072B2", "P", "-"),
    "selective": ("selective", "#117733", ">", (0, (3, 1))),
    "infonce": ("InfoNCE (T-SAE)", "#56B4E9", "s", "--"),
    "infonce_dot": ("InfoNCE, inner products", "#882255", "d", "--"),
    "sqdiff": ("squared difference", "#332288", "o", "-."),
    "autocorr": ("autocorrelation", "#E69F00", "^", ":"),
    "variance": ("window variance", "#AA4499", "v", (0, (5, 1, 1, 1))),
}
CLUSTERS = {  # name that evaluate.py gives a cluster -> colour, marker
    "positional": ("#44AA99", "s"),
    "local/token": ("#999999", "o"),
    "segment": ("#0072B2", "^"),
    "document/topic": ("#882255", "D"),
}
# One colour and marker a run of the study, the same in every picture, in the order of `labels`. Your
# runs take the colours after the ladder's, with markers from the other end.
# Safe for colour-blind readers; the first seven also differ in lightness.
COLOURS = ("#111111", "#332288", "#882255", "#117733", "#44AA99", "#DDCC77", "#D55E00", "#56B4E9",
           "#0072B2", "#CC79A7", "#999933", "#E69F00", "#888888", "#AA4499", "#661100", "#6699CC")
MARKERS = "*ov^<>DsPXhdp8H4"

HERE = Path(__file__).resolve().parent
plt.switch_backend("Agg")
plt.rcParams.update({
    "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "hatch.linewidth": 0.6, "image.cmap": "cividis",
    "image.interpolation": "nearest", "figure.constrained_layout.use": True, "savefig.dpi": 150})
warnings.filterwarnings("ignore", message="Glyph .* missing")  # shown as a box


# ------------------------------------------------------------------------------------------------
# 1. Records
# ------------------------------------------------------------------------------------------------


class Missing(Exception):
    """The data of a picture are not there; the message says which."""


@functools.cache
def load(path):
    """Parsed JSON, or a list of rows for .jsonl; {} and a sentence where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        print(f"not read: {path} ({reason})")
        return {}


class Run:
    """One run directory. scores: metric -> array of one value a seed; no undefined ones."""

    def __init__(self, path, label, index, study):
        self.path = path
        self.name = path.name
        self.label = label
        self.study = study  # True for the study's own runs, False for the user's
        if study:
            self.colour = COLOURS[index % len(COLOURS)]
            self.marker = MARKERS[index % len(MARKERS)]
        else:
            spare = COLOURS[len(LADDER) :]
            self.colour = spare[index % len(spare)]
            self.marker = MARKERS[-1 - index % len(MARKERS)]
        self.config = {}  # an SAE that was scored without a run has none
        if (path / "config.json").is_file():
            self.config = load(path / "config.json")
        self.scores = {}
        for dataset in load(path / "final_info.json").values():
            for metric, values in dataset["final_info_dict"].items():
                self.scores[metric] = np.array(values, float)
        if "pw_mcc" in self.scores:  # one value a pair of seeds; pairs share seeds, so no error
            self.scores["pw_mcc"] = self.scores["pw_mcc"].mean(keepdims=True)
        self.seeds = len(self.scores.get("explained_variance", ()))

    @functools.cached_property
    def consistency(self):
        """The consistency.json of each seed."""
        found = sorted(self.path.glob("seed_*/consistency.json"), key=seed_number)
        trees = [load(path) for path in found or [self.path / "consistency.json"]]
        return [tree for tree in trees if tree]

    def curve(self, term):
        """(steps, values (seeds, steps)) of a term of log.jsonl, where all seeds logged it."""
        seeds = defaultdict(dict)
        for row in load(self.path / "log.jsonl"):
            if row.get(term) is not None:
                seeds[row["seed"]][row["step"]] = row[term]
        if not seeds:
            return [], np.zeros((0, 0))
        steps = sorted(set.intersection(*[set(values) for values in seeds.values()]))
        values = [[logged[step] for step in steps] for logged in seeds.values()]
        return steps, np.array(values, float)


def seed_number(path):
    """K of seed_K/consistency.json."""
    return int(path.parent.name.removeprefix("seed_"))


def find_runs(runs_dir, names=(), needs="config.json"):
    """The runs named; if none is, the study's in the order of `labels`, then the user's.

    needs: the file by which a folder that is named is taken for a run.
    """
    study = sorted(file.parent.resolve() for file in runs_dir.glob("study/*/config.json"))
    own = sorted(file.parent.resolve() for file in runs_dir.glob("*/config.json"))
    order = list(dict.fromkeys([*labels, *[path.name for path in study]]))
    study.sort(key=lambda path: order.index(path.name))
    runs = []
    for path in [run_path(name, runs_dir, needs) for name in names] or study + own:
        if path in study:
            name = path.name
            runs.append(Run(path, labels.get(name, name), order.index(name), True))
        else:
            label = f"{path.name} (yours)" if study else path.name
            place = own.index(path) if path in own else len(own)
            runs.append(Run(path, label, place, False))
    return runs


def run_path(name, runs_dir, needs):
    """The directory of a run given as a path, or as a name under runs/ or runs/study/."""
    places = [runs_dir / name, runs_dir / "study" / name, Path(name).expanduser()]
    for place in places:
        if (place / needs).is_file():
            return place.resolve()
    tried = ", ".join(str(place) for place in places)
    raise ValueError(f"no run {name}: {needs} is in none of {tried}")


def read_table(path):
    """The runs of study.csv: name, config, scores as in Run."""
    found = defaultdict(list)
    if path.exists():
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            found[row["run"]].append(row)
    table = []
    for name, rows in found.items():
        numbers = {}
        for column in rows[0]:
            with contextlib.suppress(ValueError):  # words, or an empty cell: undefined
                numbers[column] = np.array([float(row[column]) for row in rows])
        shape = ("temp_alpha", "window", "temporal_fraction", "k")
        config = {column: numbers[column][0] for column in shape}
        config["temp_loss"] = rows[0]["temp_loss"]
        table.append(SimpleNamespace(name=name, config=config, scores=numbers))
    return table


@dataclass
class Records:
    """What a picture is drawn from."""

    runs: list  # of Run
    table: list  # of the runs in study.csv
    chosen: bool  # the user named the runs

    @property
    def grid(self):
        """The short runs of the grid."""
        return [run for run in self.table if run.name.startswith("grid_")]

    def run(self, name):
        """The run of this name; KeyError if there is none."""
        return {run.name: run for run in self.runs}[name]

    def ladder(self):
        """The runs of the two top-level pictures."""
        if self.chosen:
            return self.runs
        return [run for run in self.runs if run.name in LADDER or not run.study]

    def compared(self, names, key, most):
        """At most `most` runs, scored on the same rows, with `key` in consistency.json."""
        wanted = self.runs
        if not self.chosen:
            own = [run for run in self.runs if not run.study]
            wanted = [run for run in self.runs if run.study and run.name in names] + own
        scored = [run for run in wanted if run.consistency and run.consistency[0].get(key)]
        if not scored:
            raise Missing(f"no run has {key} in its consistency.json")
        same = [run for run in scored if judged_rows(run) == judged_rows(scored[0])][:most]
        others = [run.label for run in scored if run not in same]
        if others:
            print(f"{key}: not drawn, scored on other rows or beyond {most} runs: "
                  f"{', '.join(others)}")
        return same


def read_records(runs, runs_dir, chosen=False):
    """These runs with those of study.csv."""
    return Records(runs, read_table(runs_dir / "study.csv"), chosen)


def judged_rows(run):
    """The hash of the rows on which a run was scored."""
    return run.consistency[0].get("hashes", {}).get("rows")


# ------------------------------------------------------------------------------------------------
# 2. Drawing
# ------------------------------------------------------------------------------------------------


def heading(figure, title, note):
    """Title at the left, with what is averaged in brackets."""
    figure.suptitle(f"{title} ({note})", x=0.01, ha="left", fontweight="bold")


def errors_over(seeds):
    """What the error bars are; seeds: the number of seeds of each run drawn."""
    if max(seeds) == 1:
        return "one seed"
    counts = " to ".join(str(n) for n in sorted({min(seeds), max(seeds)}))
    return f"mean ± standard error over seeds, n = {counts}"


def mean_se(values):
    """Mean and standard error over the first axis (seeds); the error is 0 for one seed."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(0), np.zeros(values.shape[1:])
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def band(ax, x, values, run, **style):
    """Line through the mean of values (seeds, len(x)), with a band of one standard error."""
    mean, error = mean_se(values)
    ax.plot(x, mean, color=run.colour, **style)
    ax.fill_between(x, mean - error, mean + error, color=run.colour, alpha=0.25, linewidth=0)


# ------------------------------------------------------------------------------------------------
# 3. The two pictures of the ladder of runs
# ------------------------------------------------------------------------------------------------


def bars(ax, runs, metric, side, digits, ylabel):
    """One bar a run. side -1 (plain) and 1 (hatched) share a place; 0 has it alone."""
    places, means, errors, colours = [], [], [], []
    for place, run in enumerate(runs):
        if metric in run.scores:
            mean, error = mean_se(run.scores[metric])
            places.append(place + 0.2 * side)
            means.append(mean)
            errors.append(error)
            colours.append(run.colour)
    drawn = ax.bar(places, means, 0.38 if side else 0.6, yerr=errors, error_kw={"ecolor": "0.5"},
                   color=colours, edgecolor="white", hatch="////" if side > 0 else None)
    crowded = len(runs) > 8  # then the numbers stand upright
    ax.bar_label(drawn, [f"{mean:.{digits}f}" for mean in means], padding=2, fontsize=8.5,
                 rotation=90 * crowded)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set(xmargin=0.02, ymargin=0.2 + 0.2 * crowded, ylabel=ylabel)


def metrics_comparison(records):
    """Reconstruction, sparsity and behaviour of the language model, a bar a run."""
    runs = [run for run in records.ladder() if run.seeds]
    if not runs:
        raise Missing("no run has a final_info.json")
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 8.2), sharex=True)
    heading(figure, "Scores on held-out documents", errors_over([run.seeds for run in runs]))
    right = middle.twinx()
    right.spines["right"].set_visible(True)
    bars(top, runs, "explained_variance", -1, 3, "")
    bars(top, runs, "cossim", 1, 3, "explained variance (plain)\ncosine similarity (hatched)")
    bars(middle, runs, "l0", -1, 1, "L0: active latents a token\n(plain)")
    bars(right, runs, "l1", 1, 0, "L1: sum |code| a token\n(hatched)")
    bars(bottom, runs, "ce_loss_score", 0, 3,
         "CE loss score (1: as the LM\nalone, 0: zero ablation)")
    width = max(12, 84 // len(runs))
    names = [textwrap.fill(run.label, width) for run in runs]
    bottom.set_xticks(range(len(runs)), names, fontsize=9, rotation=45 * (len(runs) > 8))
    return figure


def training_curves(records):
    """Reconstruction loss, L1 of the codes and dead latents over the training steps."""
    runs = [run for run in records.ladder() if run.curve("recon")[0]]
    if not runs:
        raise Missing("no run has a log.jsonl")
    figure, axes = plt.subplot_mosaic([["recon", "recon"], ["l1", "dead"]], figsize=(9, 7))
    heading(figure, "Training", errors_over([len(run.curve("recon")[1]) for run in runs]))
    for term, ax in axes.items():
        for run in runs:
            steps, values = run.curve(term)
            if steps:
                band(ax, steps, values, run, label=run.label, marker=run.marker, markersize=5,
                     markevery=0.15, linewidth=1.4)
        ax.set_xlabel("training step")
    axes["recon"].set(yscale="log", title="Reconstruction loss",
                      ylabel="share of variance missed (log)")
    axes["recon"].yaxis.set_major_formatter("{x:g}")
    axes["recon"].yaxis.set_minor_formatter(minor_tick)
    axes["l1"].set(title="Sparsity: L1 of the codes", ylabel="sum |code| a token (scaled input)")
    axes["dead"].set(title="Sparsity: dead latents", ylabel="latents without a recent firing")
    for term in ("l1", "dead"):
        axes[term].set_ylim(bottom=0)
    figure.legend(*axes["recon"].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def minor_tick(value, _):
    """Number at 2, 3, 5 and 7 times a power of ten, nothing between."""
    if f"{value:e}"[0] in "2357":
        return f"{value:g}"
    return ""


# ------------------------------------------------------------------------------------------------
# 4. What the temporal loss buys and costs
# ------------------------------------------------------------------------------------------------


def consistency(records):
    """Autocorrelation by lag against raw activations and the linear limit; what a probe gains."""
    runs = records.compared(TRIO, "autocorr", 6)
    figure, axes = plt.subplot_mosaic([["lags", "topic"], ["lags", "document"]], figsize=(9, 5.8),
                                      width_ratios=[1.5, 1])
    heading(figure, "Do codes last from token to token?",
            errors_over([len(run.consistency) for run in runs]))
    lag_panel(axes["lags"], runs)
    topics = {"whole": "token_topic_5", "lead": "token_topic_5_lead", "rest": "token_topic_5_rest"}
    probes = runs[0].consistency[0].get("probes", {})
    for dims, name in (("5", "5 raw dimensions"), ("all", "all raw dimensions")):
        level(axes["topic"], probes.get("raw", {}).get("token_topic", {}).get(dims), name)
    probe_panel(axes["topic"], runs, topics)
    axes["topic"].set(title="Topic of a token from 5 latents", ylabel="AUROC")
    document = probes.get("document_id", {})
    level(axes["document"], document.get("chance"), "chance")
    probe_panel(axes["document"], runs, {"whole dictionary": "document_id"})
    n = document.get("documents", 120)
    axes["document"].set(title=f"Which of {n} documents a token is from", ylabel="accuracy",
                         ylim=(0, None), xlim=(-0.7, 0.7))
    figure.legend(*axes["lags"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def lag_panel(ax, runs):
    """Mean autocorrelation of the codes by lag: solid for the leading share, dashed for all.

    Thin: the leading share when the tokens of each document are shuffled. What lies above it is the
    order of the tokens, what lies below is which document they are from.
    """
    first = runs[0].consistency[0]  # lags, raw activations and limit are the same for all runs
    lags = first["lags"]
    for run in runs:
        for group, line, width in (("lead", "-", 2.2), ("whole", "--", 1.2)):
            values = [tree["autocorr"][group]["mean"] for tree in run.consistency]
            band(ax, lags, values, run, linestyle=line, linewidth=width, marker=run.marker,
                 label=f"{run.label}, {group}")
        shuffled = [tree["autocorr_null"]["lead"]["mean"] for tree in run.consistency]
        ax.plot(lags, np.mean(np.array(shuffled, float), 0), color=run.colour, linewidth=0.8)
    ax.plot([], [], color="0.3", linewidth=0.8, label="thin: lead, tokens shuffled in a document")
    limit = first.get("linear_limit")
    if limit:
        means = {int(n): np.array(values, float) for n, values in limit["mean"].items()}
        few, many = min(means), max(means)
        ax.fill_between(limit["lags"], means[many], means[few], color="0.88", zorder=0, linewidth=0,
                        label=f"linear limit, {few} (top) to {many} directions")
    raw = np.array(first["autocorr_raw"]["mean"], float)
    ax.plot(lags, raw, "-.", color="0.45", label="raw activations")
    best = [tree["autocorr_best"] for tree in runs[0].consistency if "autocorr_best" in tree]
    if best:
        band(ax, lags, [one["mean"] for one in best], runs[0], linestyle=":",
             label=f"{runs[0].label}, its best {best[0]['n']}")
    ax.axhline(0, color="0.3", linewidth=0.6)
    ax.set_xscale("log", base=2)
    ax.set(title="Leading share (solid) and whole dictionary (dashed)", xlabel="lag (tokens, log)",
           xticks=lags, xticklabels=lags, ylabel="autocorrelation of a latent's code, mean")


def probe_panel(ax, runs, metrics):
    """One point a run and metric, with its number; metrics: name on the axis -> headline name."""
    for index, run in enumerate(runs):
        shift = 0.7 * ((index + 0.5) / len(runs) - 0.5)
        for place, metric in enumerate(metrics.values()):
            if metric in run.scores:
                mean, error = mean_se(run.scores[metric])
                ax.errorbar(place + shift, mean, error, color=run.colour, marker=run.marker,
                            markersize=7, capsize=3)
                digits = 2 + (mean < 0.1)
                number = f"{mean:.{digits}f}".removeprefix("0")
                ax.annotate(number, (place + shift, mean + error), (0, 6), ha="center", fontsize=9,
                            textcoords="offset points", color=run.colour)
    ax.set_xticks(range(len(metrics)), metrics)
    ax.margins(0.12, 0.2)


def level(ax, value, name):
    """A grey line at a reference value, with its name in the middle."""
    if value is None:
        return
    ax.axhline(value, color="0.45", linestyle="-.", linewidth=1)
    ax.annotate(name, (0.5, value), (0, 2), xycoords=("axes fraction", "data"), ha="center",
                textcoords="offset points", fontsize=8.5, color="0.35")


FRONTIER = {"token_topic_5": "topic of a token, 5 latents (AUROC)",
            "document_id": "which document (accuracy)",
            "smoothness_S": "smoothness S (lower is smoother)"}


def frontier(records):
    """Explained variance against topic, document and S: short runs by weight, whole and long runs."""
    full = [run for run in records.runs if on_frontier(run)]
    if not full:
        raise Missing(f"no run has explained_variance, {' and '.join(FRONTIER)}")
    reference = next((run.config for run in full if run.name == PAIR[1]), full[0].config)
    same = ("k", "model", "layer", "dataset")
    full = [run for run in full if all(run.config.get(key) == reference.get(key) for key in same)]
    full = near_the_best(full)
    table = [] if records.chosen else records.table
    points = with_other_weights(full, table)
    panels = [("Whole runs; numbers: weight", points)]
    grid = []
    if not records.chosen:
        grid = near_the_best([run for run in records.grid if on_frontier(run)])
    if len(grid) > 1:
        panels.insert(0, ("Short runs; numbers: weight", by_loss(grid, reference)))
    named = {run.name: run for run in full}
    long = [run for run in table if LONG.get(run.name) in named]
    if long:
        like = [named[LONG[run.name]] for run in long]
        panels.append(("Runs of four times the budget", [
            (one.label, one.colour, one.marker, "none", [run]) for one, run in zip(like, long)]))
    height = 0.5 + 3.4 * len(panels)
    figure, axes = plt.subplots(len(panels), len(FRONTIER), figsize=(12, height), squeeze=False,
                                sharey="row")
    drawn = [run for _, curves in panels for *_, runs in curves for run in runs]
    errors = errors_over([len(run.scores["l0"]) for run in drawn])
    heading(figure, "What it costs", f"{errors}; hollow: L0 over 1 % off")
    for row, (title, curves) in zip(axes, panels):
        for ax, metric in zip(row, FRONTIER):
            frontier_panel(ax, metric, curves)
            ax.set(title=title, xlabel=FRONTIER[metric])
        row[0].set_ylabel("explained variance")
        row[-1].legend(*row[0].get_legend_handles_labels(), loc="center left",
                       bbox_to_anchor=(1, 0.5), fontsize=8.5)
    return figure


def on_frontier(run):
    """Whether a run has what frontier.png draws."""
    return {"explained_variance", "l0", *FRONTIER} <= run.scores.keys()


def with_other_weights(full, table):
    """A curve for each run, as in by_loss: of the run itself, or of its loss at several weights."""
    rows = {run.name: run for run in table if on_frontier(run)}
    others_of = {run.name: [rows[name] for name in WEIGHTS.get(run.name, ()) if name in rows]
                 for run in full}
    in_a_curve = {run.name for others in others_of.values() for run in others}
    curves = []
    for run in full:
        if run.name in in_a_curve:
            continue
        others = others_of[run.name]
        runs = sorted([run, *others], key=lambda run: run.config["temp_alpha"])
        line = "-" if others else "none"
        curves.append((run.label, run.colour, run.marker, line, runs))
    return curves


def near_the_best(runs):
    """The runs whose explained variance is within 0.1 of the best; others would squeeze them."""
    explained = {run.name: run.scores["explained_variance"].mean() for run in runs}
    far = [name for name in explained if explained[name] < max(explained.values()) - 0.1]
    if far:
        print(f"frontier.png leaves out what explains much less variance: {', '.join(far)}")
    return [run for run in runs if run.name not in far]


def by_loss(grid, reference):
    """A curve a loss: label, colour, marker, line and its runs, in the order of their weights.

    Where a loss has several windows and leading shares, the curve is of those with most weights,
    and among these of the window and the share of the settings `reference`, if they are there.
    """
    curves = []
    base = [run for run in grid if run.config["temp_alpha"] == 0]
    if base:
        curves.append(("weight 0", "#111111", "*", "none", base))
    families = defaultdict(lambda: defaultdict(list))
    for run in grid:
        if run.config["temp_alpha"] > 0:
            shape = run.config["window"], run.config["temporal_fraction"]
            families[run.config["temp_loss"]][shape].append(run)
    for loss, shapes in families.items():
        usual = reference.get("window"), reference.get("temporal_fraction")
        shape = max(shapes, key=lambda shape: (len(shapes[shape]), shape == usual))
        runs = sorted(shapes[shape], key=lambda run: run.config["temp_alpha"])
        curves.append((*LOSSES.get(loss, (loss, "#888888", "X", "-")), runs))
    return curves


def frontier_panel(ax, metric, curves):
    """Points with error bars, hollow where L0 is more than 1 % off k; weights beside curves."""
    numbers = []  # weight, its place and its colour
    for label, colour, marker, line, runs in curves:
        if metric == "smoothness_S":  # with LayerNorm it is in other units
            runs = [run for run in runs if not run.config.get("layernorm")]
        if not runs:
            continue
        x, dx = np.transpose([mean_se(run.scores[metric]) for run in runs])
        y, dy = np.transpose([mean_se(run.scores["explained_variance"]) for run in runs])
        ax.errorbar(x, y, dy, dx, color=colour, marker=marker, linestyle=line, label=label,
                    markersize=7, capsize=2)
        for run, *place in zip(runs, x, y):
            if abs(run.scores["l0"].mean() / run.config["k"] - 1) > 0.01:
                ax.plot(*place, color=colour, marker=marker, markersize=7, markerfacecolor="white",
                        zorder=3)
            if line != "none":
                numbers.append((run.config["temp_alpha"], place, colour))
    ax.locator_params("x", nbins=5)
    ax.autoscale_view()
    write_weights(ax, sorted(numbers, key=lambda number: -number[0]))


def write_weights(ax, numbers):
    """Weights beside their points, the first given first, where there is room for them."""
    outline = [withStroke(linewidth=1.5, foreground="white")]
    taken = []
    for weight, place, colour in numbers:
        pixel = ax.transData.transform(place)
        if all(abs(pixel[0] - x) > 28 or abs(pixel[1] - y) > 10 for x, y in taken):
            ax.annotate(f"{weight:g}", place, (5, 4), color=colour, fontsize=8.5,
                        textcoords="offset points", path_effects=outline)
            taken.append(pixel)


ABLATED = (  # headline name, its name in the baseline, title, decimals
    ("token_topic_5_lead", "token_topic_5", "topic of a token,\n5 leading latents (AUROC)", 2),
    ("document_id", "document_id", "which document\n(accuracy)", 2),
    ("explained_variance", "explained_variance", "explained variance\n", 4))


def ablation(records):
    """Window x leading share at the default weight: what the probes gain and what it costs."""
    base = next((run for run in records.grid if run.name == "grid_base"), None)
    cells = grid_cells(records.grid)
    if records.chosen or base is None or len(cells) < 2:
        raise Missing("runs/study.csv has no grid of windows and leading shares")
    shown = [row for row in ABLATED
             if row[1] in base.scores and all(row[0] in run.scores for run in cells.values())]
    if not shown:
        raise Missing("the grid in runs/study.csv lacks the headline numbers to be drawn")
    n_windows = len({window for window, _ in cells})
    figure, axes = plt.subplots(1, len(shown), squeeze=False, sharey=True,
                                figsize=(11, 1.6 + 0.4 * n_windows))
    seeds = min(len(run.scores["explained_variance"]) for run in cells.values())
    over = f"mean of {seeds} paired seeds" if seeds > 1 else "one seed"
    heading(figure, "Gain over weight 0 in short runs", over)
    for ax, (metric, base_metric, title, digits) in zip(axes[0], shown):
        table = {place: paired(run.scores[metric], base.scores[base_metric]).mean()
                 for place, run in cells.items()}
        heat_map(ax, table, digits)
        ax.set(title=title, xlabel="leading share of the latents")
    axes[0, 0].set_ylabel("window (tokens)")
    return figure


def paired(values, base):
    """values - base of the seeds that both have."""
    seeds = min(len(values), len(base))
    return values[:seeds] - base[:seeds]


def grid_cells(grid):
    """The default loss's grid at its commonest weight: {(window, leading share): run}."""
    runs = [run for run in grid
            if run.config["temp_loss"] == next(iter(LOSSES)) and run.config["temp_alpha"] > 0]
    weights = Counter(run.config["temp_alpha"] for run in runs)
    return {(run.config["window"], run.config["temporal_fraction"]): run for run in runs
            if run.config["temp_alpha"] == weights.most_common(1)[0][0]}


def heat_map(ax, table, digits):
    """Numbers on colours. table: (row, column) -> number; a cell that was not run stays grey."""
    rows, columns = [sorted(set(axis)) for axis in zip(*table)]
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), number in table.items():
        values[rows.index(row), columns.index(column)] = number
    image = ax.imshow(values, aspect="auto")
    ax.set_facecolor("0.85")
    ax.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
    ax.set_yticks(range(len(rows)), [f"{row:g}" for row in rows])
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white"
            if image.norm(value) > 0.5:
                colour = "black"
            rounded = round(value, digits) + 0.0  # no -0
            number = f"{rounded:+.{digits}f}".replace("0.", ".", 1).replace("-", "−")
            ax.text(column, row, number, ha="center", va="center", color=colour, fontsize=9)


# ------------------------------------------------------------------------------------------------
# 5. What the latents do (first seed)
# ------------------------------------------------------------------------------------------------


def position_correlation(records):
    """Correlation of codes, and of raw activations, between the positions of a context."""
    runs = records.compared(PAIR, "position_corr", 2)
    panels = [(f"codes, {run.label}", run.consistency[0]["position_corr"], "codes") for run in runs]
    panels.append(("raw activations", runs[0].consistency[0]["position_corr"], "raw"))
    tables = [np.array(found[key], float) for _, found, key in panels]
    off_diagonal = [table[~np.eye(len(table), dtype=bool)] for table in tables]
    low, high = np.nanpercentile(np.concatenate(off_diagonal), (1, 99))
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.7))
    heading(figure, "Correlation between positions p and q of a context", "first seed")
    for ax, table, (title, found, key) in zip(axes, tables, panels):
        end = len(table) * found["step"]  # tokens
        share = found["toeplitzness"][key]  # of the table's variance
        if share is not None:
            title += f"\n{share:.0%} explained by |p − q|"
        image = ax.imshow(table, vmin=low, vmax=high, extent=(0, end, end, 0))
        ax.set(title=title, xlabel="position q (tokens)", ylabel="position p (tokens)")
        ax.set_facecolor("0.8")  # no pair of tokens was seen
        ax.label_outer()
    figure.colorbar(image, ax=axes, extend="both", shrink=0.8, pad=0.01, label="correlation")
    return figure


def redundancy(records):
    """Correlation between latents, ordered by cluster, and the histogram of best partners."""
    runs = records.compared(PAIR, "redundancy", 2)
    lowest = min(np.min(run.consistency[0]["redundancy"]["matrix"]["corr"]) for run in runs)
    figure, (*squares, right) = plt.subplots(1, len(runs) + 1, figsize=(9, 4.1))
    heading(figure, "Redundant latents", "first seed")
    for ax, run in zip(squares, runs):
        found = run.consistency[0]["redundancy"]
        matrix = found["matrix"]
        image = ax.imshow(matrix["corr"], vmin=lowest, vmax=1)
        starts = np.flatnonzero(np.diff(matrix["clusters"])) + 0.5  # of the next cluster
        rank = f"effective rank {found['effective_rank']:.0f} of {found['latents']}"
        ax.set(title=f"{run.label}\n{rank}",
               xlabel=f"{len(matrix['corr'])} latents, ordered by cluster",
               xticks=starts, yticks=starts, xticklabels=[], yticklabels=[])
        ax.grid(color="white", linewidth=0.8)
        ax.tick_params(length=0)
        counts = np.array(found["best_partner_histogram"]["counts"])
        edges = np.array(found["best_partner_histogram"]["edges"])
        first = np.flatnonzero(counts)[0]  # correlations start well above -1
        right.stairs(100 * counts[first:] / counts.sum(), edges[first:], color=run.colour,
                     linewidth=2, label=f"{run.label}: {found['share_above_0.9']:.1%} above 0.9")
    right.set(xlabel="correlation with the best partner", ylabel="latents (%)")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.colorbar(image, ax=squares, location="bottom", shrink=0.6,
                    label="correlation of codes over tokens")
    return figure


def clusters(records):
    """Latents by activation pattern: a scatter, and the share of each kind."""
    runs = records.compared(PAIR, "clusters", 2)
    names = list(CLUSTERS)
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.2), height_ratios=[1.5, 1])
    heading(figure, "Kinds of latents by activation pattern", "first seed")
    axes[0, 1].set_visible(len(runs) == 2)
    keys = [Line2D([], [], color=colour, marker=marker, linestyle="none", label=name)
            for name, (colour, marker) in CLUSTERS.items()]
    for index, run in enumerate(runs):
        latents = run.consistency[0]["latents"]
        found = run.consistency[0]["clusters"]
        kind = np.array([one["name"] for one in found["list"]])[latents["cluster"]]
        for key in keys:
            x, y = [np.array(latents[axis], float)[kind == key.get_label()] for axis in "xy"]
            axes[0, index].scatter(x, y, 9, key.get_color(), marker=key.get_marker(), linewidths=0,
                                   alpha=0.7)
        axes[0, index].set(title=f"{run.label}, silhouette {found['silhouette']:.2f}",
                           xlabel="first principal component (of each run's own)", ylabel="second")
        for ax, share in zip(axes[1], ("size", "mass_share")):
            sums = [sum(one[share] for one in found["list"] if one["name"] == name)
                    for name in names]
            places = np.arange(len(names)) + 0.4 * index - 0.2
            drawn = ax.barh(places, 100 * np.array(sums) / sum(sums), 0.37, color=run.colour,
                            label=run.label)
            ax.bar_label(drawn, fmt="%.1f", padding=2)
    for ax, what in zip(axes[1], ("latents (%)", "firing mass (%)")):
        ax.set(xlabel=what, xmargin=0.15, ylim=(len(names) - 0.4, -0.6))
        ax.set_yticks(range(len(names)), names)
    handles = keys + axes[1, 0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


# ------------------------------------------------------------------------------------------------
# 6. The page of latents
# ------------------------------------------------------------------------------------------------


def write_page(folders, pictures_dir):
    """Write latents.html, self-contained, into the last of one or two run directories."""
    runs = []
    for folder in folders:
        tree = load(folder / "latents.json")
        if not tree:
            raise ValueError(f"{folder / 'latents.json'} cannot be read")
        runs.append(tree)
    target = folders[-1] / "latents.html"
    pictures = []
    for name in PICTURES:
        if (pictures_dir / name).is_file():
            link = os.path.relpath(pictures_dir / name, target.parent)
            pictures.append([Path(name).stem, Path(link).as_posix()])
    title = "Latents of " + " and ".join(run["run"] for run in runs)
    data = json.dumps({"runs": runs, "pictures": pictures}, ensure_ascii=False, allow_nan=False,
                      separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # or a text that holds </script> would end the data
    before, after = (HERE / "latents_template.html").read_text(encoding="utf-8").split("__DATA__")
    page = before.replace("__TITLE__", html.escape(title)) + data + after
    target.write_text(page, encoding="utf-8", errors="replace", newline="\n")
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


# ------------------------------------------------------------------------------------------------
# 7. Scores side by side
# ------------------------------------------------------------------------------------------------

SAME = {  # what runs that are compared should share: where it stands in consistency.json
    "by evaluate.py": ("hashes", "evaluate"),
    "on the rows": ("hashes", "rows"),
    "on model": ("scored_on", "model"),
    "on layer": ("scored_on", "layer"),
    "in dtype": ("scored_on", "dtype"),
    "with sample_rows": ("counts", "sample_rows"),  # fewer are kept of a code with a high L0
}


def compare(runs):
    """Print all headline numbers of some runs, and how the others differ from the first one."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    first, *others = runs
    table = [["", *names, *(f"{name} - {names[0]}" for name in names[1:])]]
    for metric in dict.fromkeys(metric for run in runs for metric in run.scores):
        values = [significant(run.scores.get(metric)) for run in runs]
        gaps = [gap_to(first, run, metric) for run in others]
        table.append([metric, *values, *gaps])
    widths = [max(map(len, column)) for column in zip(*table)]
    for metric, *cells in table:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print("  ".join([metric.ljust(widths[0]), *cells]))
    for run, name in zip(others, names[1:]):
        for sentence in caveats(first, run):
            print(f"note: {name} and {names[0]} {sentence}")


def significant(values, sign=""):
    """Mean ± standard error with significant digits; "-" for no values.

    For scores of any size, which with_error, made for tables of shares, rounds away. One seed has
    no error. sign: "+" shows it.
    """
    if values is None:
        return "-"
    mean, error = mean_se(values)
    text = f"{mean:{sign}.4g}"
    if len(values) > 1:
        text += f" ± {error:.2g}"
    return text


def gap_to(first, run, metric):
    """How a score of a run differs from the first run's; paired where both begin at one seed."""
    if metric not in first.scores or metric not in run.scores:
        return "-"
    a, b = first.scores[metric], run.scores[metric]
    if first.config.get("seed") == run.config.get("seed"):
        return significant(paired(b, a), "+")
    return significant([b.mean() - a.mean()], "+")


def caveats(first, run):
    """Sentences, without their subject, on why two runs may not be comparable."""
    a, b = first.scores["l0"].mean(), run.scores["l0"].mean()
    if abs(b - a) > 0.01 * a:
        yield (f"have an L0 of {b:.4g} and {a:.4g}: not within 1 %, so smoothness and "
               "autocorrelation are not comparable")
    if not (first.consistency and run.consistency):
        yield "do not both have a consistency.json, which would show whether they were scored alike"
        return
    for what, (block, key) in SAME.items():
        a, b = [one.consistency[0][block].get(key) for one in (first, run)]
        if a != b:
            if block == "hashes":
                a, b = a[:12], b[:12]
            yield f"were scored {what} {b} and {a}"


# ------------------------------------------------------------------------------------------------
# 8. Tables of README.md and notes.txt: whatever stands between `table: NAME` and `end of table`
# ------------------------------------------------------------------------------------------------

HEADLINE = {  # metric -> row of the first table
    "token_topic_5": "topic of the document from one token's code, 5 latents (AUROC)",
    "token_topic_5_lead": "... 5 of the leading latents",
    "document_id": "which of 120 documents a token is from (accuracy)",
    "boundary": "does a new document begin here, from the leading codes (AUROC)",
    "autocorr_16_lead": "autocorrelation of the leading latents at lag 16",
    "autocorr_16_best": "... of as many latents, those where it is highest",
    "smoothness_S": "smoothness S (lower is smoother)",
    "token_class_5": "class of a token, 5 latents (AUROC)",
    "explained_variance": "explained variance",
    "ce_loss_score": "CE loss score",
    "l0": "L0",
}
RIVALS = {  # metric -> column of the table of several runs
    "explained_variance": "explained variance",
    "ce_loss_score": "CE score",
    "token_topic_5": "topic, 5 latents",
    "token_topic_5_lead": "5 of the lead",
    "document_id": "which document",
    "autocorr_16_lead": "lead at lag 16",
    "smoothness_S": "S",
}
SUMMARY = ("explained_variance", "ce_loss_score", "l0", "token_topic_5", "token_topic_5_lead",
           "document_id", "boundary", "doc_topic_5", "token_class_5", "token_class_20", "autocorr_1",
           "autocorr_16_lead", "autocorr_16_best", "smoothness_S", "redundant_share", "together",
           "frac_alive")
SHORT = ("explained_variance", "token_topic_5", "token_topic_5_lead", "document_id",
         "autocorr_16_lead", "autocorr_16_best", "smoothness_S", "token_class_5")


def with_error(values, signed=False):
    """Mean ± standard error over seeds, rounded so that the error shows two digits.

    One seed has no error.
    """
    mean, error = mean_se(values)
    digits = 4
    if error > 0:
        digits = int(np.clip(1 - math.floor(math.log10(error)), 0, 5))
    text = f"{mean:.{digits}f}"
    if signed:
        text = f"{mean:+.{digits}f}"
    if len(values) > 1:
        text += f" ± {error:.{digits}f}"
    return text


def headline_table(records):
    """Baseline and default side by side, with the difference paired by seed."""
    base, ours = records.run("run_0"), records.run("run_6")
    lines = [f"| {base.seeds} paired seeds | baseline | temporal | difference |",
             "|---|---|---|---|"]
    for metric, words in HEADLINE.items():
        a, b = base.scores[metric], ours.scores[metric]
        difference = with_error(paired(b, a), signed=True)
        lines.append(f"| {words}, `{metric}` | {with_error(a)} | {with_error(b)} | {difference} |")
    return lines


def rivals_table(records, *names):
    """Several runs, a line each."""
    lines = ["| run (seeds) | " + " | ".join(RIVALS.values()) + " |"]
    lines.append("|---" * (len(RIVALS) + 1) + "|")
    for run in map(records.run, names):
        cells = [with_error(run.scores[metric]) for metric in RIVALS]
        lines.append(f"| {run.label} ({run.seeds}) | " + " | ".join(cells) + " |")
    return lines


def results_table(records, name):
    """The headline numbers of one run."""
    run = records.run(name)
    return [f"Results: mean ± standard error of {run.seeds} seeds",
            *[f"- {metric}: {with_error(run.scores[metric])}" for metric in SUMMARY]]


def differences_table(records, base, *names):
    """Differences of some runs to another one, paired by seed."""
    lines = [f"{'difference to ' + base:24}" + "".join(f"{name:>24}" for name in names)]
    for metric in SUMMARY:
        gaps = [paired(records.run(name).scores[metric], records.run(base).scores[metric])
                for name in names]
        cells = "".join(f"{with_error(gap, signed=True):>24}" for gap in gaps)
        lines.append(f"{metric:24}{cells}")
    return lines


def means_table(records, base, *prefixes):
    """Runs of study.csv, by how their names begin: mean difference to `base`, paired by seed."""
    base = {run.name: run for run in records.table}[base]
    title = f"difference to {base.name}"
    lines = [f"{title:28}" + "".join(f"{metric:>19}" for metric in SHORT)]
    for run in records.table:
        if run.name.startswith(prefixes) and run is not base:
            gaps = [paired(run.scores[metric], base.scores[metric]).mean() for metric in SHORT]
            lines.append(f"{run.name:28}" + "".join(f"{gap:>+19.4f}" for gap in gaps))
    return lines


TABLES = {"headline": headline_table, "rivals": rivals_table, "results": results_table,
          "differences": differences_table, "means": means_table}


def fill_tables(text, records):
    """The text with each of its tables made anew from the records."""
    kept = []
    inside = False
    for line in text.splitlines():
        if "end of table" in line:
            inside = False
        if not inside:
            kept.append(line)
        if "table: " in line:
            inside = True
            kind, *names = line.split("table: ")[1].removesuffix("-->").split()
            kept += TABLES[kind](records, *names)
    return "\n".join(kept) + "\n"


# ------------------------------------------------------------------------------------------------
# 9. The command
# ------------------------------------------------------------------------------------------------

PICTURES = {
    "metrics_comparison.png": metrics_comparison,
    "training_curves.png": training_curves,
    "figures/consistency.png": consistency,
    "figures/ablation.png": ablation,
    "figures/frontier.png": frontier,
    "figures/clusters.png": clusters,
    "figures/redundancy.png": redundancy,
    "figures/position_correlation.png": position_correlation,
}


def draw_pictures(records, out_dir):
    """Draw every picture whose data are there."""
    (out_dir / "figures").mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        try:
            figure = draw(records)
        except Missing as reason:
            print(f"skipped {name}: {reason}")
            continue
        except KeyError as key:
            print(f"skipped {name}: a record has no {key}; was it made by another revision?")
            continue
        # without the version stamp the same numbers give the same bytes
        figure.savefig(out_dir / name, metadata={"Software": None})
        plt.close(figure)
        print(f"wrote {out_dir / name}")


def main(argv=None):
    """The command. Exit code 0, 1 if there is no run, 2 for bad usage."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="a run directory or its name in runs/ or runs/study/ (default: all)")
    parser.add_argument("--page", action="store_true",
                        help="write the page of latents of one run or of two, instead of pictures")
    parser.add_argument("--compare", action="store_true",
                        help="print the scores of some runs side by side, instead of pictures")
    parser.add_argument("--tables", action="store_true",
                        help="make the tables of README.md and notes.txt anew from the study")
    parser.add_argument("--runs_dir", type=Path, default=HERE / "runs",
                        help="where the run directories are (default: %(default)s)")
    parser.add_argument("--out_dir", type=Path, default=HERE,
                        help="where the pictures go (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.page:
            if len(args.runs) not in (1, 2):
                raise ValueError("--page takes one run or two")
            folders = [run_path(name, args.runs_dir, "latents.json") for name in args.runs]
            write_page(folders, args.out_dir.resolve())
            return
        if args.compare:
            if len(args.runs) < 2:
                raise ValueError("--compare takes two runs or more")
            compare(find_runs(args.runs_dir, args.runs, "final_info.json"))
            return
        runs = find_runs(args.runs_dir, args.runs)
        if not runs:
            parser.exit(1, f"plot.py: no run in {args.runs_dir}; train one with "
                           "python experiment.py --out_dir my_run\n")
        records = read_records(runs, args.runs_dir, chosen=bool(args.runs))
        if args.tables:
            paths = (HERE / "README.md", HERE / "notes.txt")
            texts = [fill_tables(path.read_text(encoding="utf-8"), records) for path in paths]
            for path, text in zip(paths, texts):
                path.write_text(text, encoding="utf-8")
            return
        draw_pictures(records, args.out_dir)
    except KeyError as error:
        parser.exit(2, f"plot.py: the records hold no {error}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"plot.py: {error}\n")


if __name__ == "__main__":
    main()
