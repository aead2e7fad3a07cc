"""Draw pictures from the records of runs. Needs no torch and no model.

    python plot.py                        # metrics_comparison.png and training_curves.png
    python plot.py run_4 run_5            # only these runs
    python plot.py --figures              # also the pictures of the study's argument, in figures/
    python plot.py --compare run_4 run_5  # scores side by side and their differences, in Markdown

Without names the runs are those of the study that `labels` in this file lists, and your own in
runs/. What has no data, or is not comparable, is left out with a sentence. Error bars and bands are
one standard error. Read are config.json, final_info.json, log.jsonl, consistency.json (of each
seed) and runs/study.csv.
"""
import argparse
import functools
import json
import os
import sys
import textwrap
from pathlib import Path

os.environ.pop("MPLBACKEND", None)  # a bad name there would end the import
import matplotlib
import numpy as np

for stream in (sys.stdout, sys.stderr):  # a letter that the terminal lacks must not stop it
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

labels = {  # run directory under runs/study -> label, in the order drawn
    "run_0": "baseline",
    "run_1": "+ squared difference",
    "run_2": "+ Xavier, clipping",
    "run_3": "+ schedule, weight / 10",
    "run_4": "+ LayerNorm",
    "run_5": "GELU",
    "run_6": "temporal (ours)",
    "tsae_tuned": "T-SAE (tuned)",
    "run_7": "temporal, weight .03",
    "tsae_published": "T-SAE (as published)",
    "tsae_released": "T-SAE (as released)",
    "matryoshka": "Matryoshka",
}
# The runs of the study in the two top-level pictures, those of latents, of probes, of the price.
LADDER = ("run_0", "run_1", "run_2", "run_3", "run_4", "run_5", "run_6")
PAIR = ("run_0", "run_6")
TRIO = ("run_0", "run_6", "tsae_tuned")
RIVALS = ("run_0", "run_6", "run_7", "tsae_published", "tsae_released", "tsae_tuned", "matryoshka")
WEIGHTS = ("whole_a0.003", "run_6", "run_7", "whole_a0.1")  # of study.csv: our loss by its weight
HEADLINE = (  # the scores that stand first in --compare, as in README.md
    "token_topic_5", "token_topic_5_lead", "document_id", "document_id_shifted", "boundary",
    "autocorr_16_lead", "autocorr_16_best", "position_probe", "shift_consistency",
    "explained_variance", "ce_loss_score", "l0")
# Reference values beside the scores of a probe in consistency.json.
LEVELS = {"raw": "raw dimensions", "raw_all": "all raw dimensions", "slow": "slow directions",
          "chance": "chance"}
# Where no loss binds the leading latents they are any latents. What counts of such a run instead:
UNBOUND = {"token_topic_5_lead": "token_topic_5", "autocorr_16_lead": "autocorr_16_best",
           "position_probe": "position_probe_best", "position_eta2": "position_eta2_best",
           "shift_consistency": "shift_consistency_best"}
# Of the labelled runs (15 at most) in order; others take the colours after the first eight, markers
# from the end. Safe for colour-blind readers; the first seven also differ in lightness.
COLOURS = ("#111111", "#332288", "#882255", "#117733", "#44AA99", "#DDCC77", "#D55E00", "#56B4E9",
           "#0072B2", "#CC79A7", "#999933", "#E69F00", "#888888", "#AA4499", "#661100", "#6699CC")
MARKERS = "*ov^<>DsPXhdp8H"
HERE = Path(__file__).resolve().parent
matplotlib.rcParams.update({  # parse_math: the name of a run is text
    "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "hatch.linewidth": 0.6, "image.cmap": "cividis", "savefig.dpi": 150,
    "figure.constrained_layout.use": True, "figure.titleweight": "bold", "text.parse_math": False})


# ------------------------------------------------------------------------------------------------
# 1. Records and numbers
# ------------------------------------------------------------------------------------------------


@functools.cache
def load(path):
    """Parsed JSON, or the list of the lines of a .jsonl; {} where there is none or it is broken."""
    text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    if path.suffix == ".jsonl":
        text = f"[{','.join(text.splitlines())}]"
    try:
        return json.loads(text)
    except ValueError as error:
        print(f"not read: {path} ({error})")
        return {}


class Run:
    """One run directory. scores: metric -> array of one value a seed; no undefined ones."""

    def __init__(self, path, label, wanted):
        self.path = path
        self.name = path.name
        self.label = label
        self.wanted = wanted  # in every picture: the user named it, or it is the user's own
        self.config = load(path / "config.json")  # {} of an SAE that was scored without a run
        self.scores = {}
        for dataset in load(path / "final_info.json").values():
            for metric, values in dataset["final_info_dict"].items():
                self.scores[metric] = np.array(values, float)
        if "pw_mcc" in self.scores:  # one value a pair of seeds; pairs share seeds, so no error
            self.scores["pw_mcc"] = self.scores["pw_mcc"].mean(keepdims=True)
        files = [*path.glob("seed_*/consistency.json"), path / "consistency.json"]
        files.sort(key=lambda file: (len(str(file)), file))  # seed_2 before seed_10
        self.consistency = [tree for tree in map(load, files) if tree]  # of each seed
        self.first = self.consistency[0] if self.consistency else {}
        self.settings = self.config | self.first.get("scored_on", {}) | self.first.get("hashes", {})
        alphas = self.config.get("temp_alpha", 0), self.config.get("matryoshka_alpha", 0)
        # whether a loss binds some latents and not the others
        self.leads = max(alphas) > 0 and self.config.get("temporal_fraction", 1) < 1

    def score(self, metric):
        """The values of a metric, one a seed, or None; see UNBOUND."""
        return self.scores.get(metric if self.leads else UNBOUND.get(metric, metric))

    def values(self, *keys):
        """What stands under these keys in consistency.json, one a seed; None if one has nothing."""
        found = self.consistency
        for key in keys:
            found = [(tree or {}).get(key) for tree in found]
        if not found or any(one is None or isinstance(one, dict) for one in found):
            return None
        return np.array(found, float)

    def curve(self, term):
        """Steps at which log.jsonl has a term, its mean over seeds and the standard error."""
        by_step = {}
        for row in load(self.path / "log.jsonl"):
            if row.get(term) is not None:
                by_step.setdefault(row["step"], []).append(row[term])
        steps = sorted(by_step)
        return steps, *np.reshape([mean_se(by_step[step]) for step in steps], (-1, 2)).T


def find_runs(runs_dir, names=()):
    """The runs named; if none is, the study's in the order of `labels`, then the user's."""
    study = [(runs_dir / "study" / name).resolve() for name in labels]
    own = sorted(file.parent.resolve() for file in runs_dir.glob("*/config.json"))
    found = [path for path in study if (path / "config.json").is_file()]
    runs = []
    for path in [run_path(name, runs_dir) for name in names] or found + own:
        label = labels[path.name] if path in study else f" {path.name}"  # "_x" would be hidden
        runs.append(Run(path, label, bool(names) or path not in study))
    paint(runs, study)
    return runs


def run_path(name, runs_dir):
    """The directory of a run given as a path, or as a name under runs/ or runs/study/."""
    places = [runs_dir / name, runs_dir / "study" / name, Path(name).expanduser()]
    found = [place for place in places
             if (place / "config.json").is_file() or (place / "final_info.json").is_file()]
    if not found:
        raise ValueError(f"no run {name}: looked in {', '.join(map(str, places))}")
    if len(found) > 1 and not found[0].samefile(found[1]):
        print(f"note: {name} is {found[0]}, not {found[1]}", file=sys.stderr)
    return found[0].resolve()


def paint(runs, study):
    """Give each run a colour and a marker, those not in `labels` by a hash of the name."""
    spare = COLOURS[8:]
    taken = []
    for run in sorted(runs, key=lambda run: run.name):
        if run.path in study:
            place = study.index(run.path)
            run.colour, run.marker = COLOURS[place], MARKERS[place]
            continue
        place = sum(run.name.encode()) % len(spare)  # a hash that is the same every day
        turn = len(taken) // len(spare)  # 1 when all colours are taken
        while taken.count(place) > turn:
            place = (place + 1) % len(spare)
        taken.append(place)
        run.colour, run.marker = spare[place], MARKERS[-1 - (place + turn) % len(MARKERS)]


def differences(first, run, *keys):
    """Clauses on the settings of a run that are not those of the first."""
    words = {"rows": f"was scored on other rows than {first.name}",
             "evaluate": f"was scored by another evaluate.py than {first.name}"}
    found = [(key, run.settings.get(key), first.settings.get(key)) for key in keys]
    return [words.get(key, f"has {key} {theirs}, {first.name} {ours}")
            for key, theirs, ours in found if None not in (theirs, ours) and theirs != ours]


def comparable(runs, *keys):
    """The runs that share these settings with the first one; the others are named in a sentence."""
    for run in runs:
        for difference in differences(runs[0], run, *keys)[:1]:
            print(f"left out: {run.name} {difference}")
    return [run for run in runs if not differences(runs[0], run, *keys)]


def choose(runs, names, data):
    """The runs, of the study those named, with these data: a file, a score or a consistency key."""
    found = [run for run in runs if (run.wanted or run.name in names)
             and ((run.path / data).is_file() or data in run.scores or run.first.get(data))]
    if not found:
        raise KeyError(data)
    return found


def read_table(path):
    """study.csv: {run: its rows, one a seed, with the columns by name}; {} where there is none."""
    if not path.exists():
        return {}
    rows = np.genfromtxt(path, ndmin=1, delimiter=",", names=True, dtype=None, encoding="utf-8")
    return {name: rows[rows["run"] == name] for name in rows["run"]}


def mean_se(values):
    """Mean and standard error over the first axis (seeds); the error is 0 for one seed."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(0), np.zeros(values.shape[1:])
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def heading(figure, title, runs=()):
    """Title at the left, with what is shown: means over the seeds of runs, or the first seed."""
    note = "first seed"
    if runs:
        counts = [run.config.get("n_seeds", 1) for run in runs]
        ends = sorted({min(counts), max(counts)})
        note = f"± standard error over seeds, n = {' to '.join(map(str, ends))}"
    figure.suptitle(f"{title} ({note})", x=0.01, ha="left")


def band(ax, x, mean, error, run, **style):
    """Line with a band of one standard error."""
    ax.plot(x, mean, color=run.colour, **style)
    ax.fill_between(x, mean - error, mean + error, color=run.colour, alpha=0.25, linewidth=0)


# ------------------------------------------------------------------------------------------------
# 2. Pictures
# ------------------------------------------------------------------------------------------------


def metrics_comparison(runs, table):
    """Reconstruction, sparsity, behaviour of the language model, and what lasts: bars a run."""
    runs = choose(runs, LADDER, "l0")
    figure, axes = plt.subplots(4, 1, figsize=(9, 10.5), sharex=True)
    heading(figure, "Scores on held-out documents", runs)
    l1 = axes[1].twinx()
    bars(axes[0], runs, "explained_variance", 0, 2)
    bars(axes[0], runs, "cossim", 1, 2)
    bars(axes[1], runs, "l0", 0, 2, digits=1)
    bars(l1, runs, "l1", 1, 2, digits=0)
    bars(axes[2], runs, "ce_loss_score", 0, 1)
    of = 2 + any("position_probe" in run.scores for run in runs)
    bars(axes[3], runs, "token_topic_5_lead", 0, of)
    bars(axes[3], runs, "document_id", 1, of)
    bars(axes[3], runs, "position_probe", 2, of)
    axes[0].set_ylabel("explained variance (plain)\ncosine similarity (hatched)")
    axes[1].set_ylabel("L0: active latents a token\n(plain)")
    l1.set_ylabel("L1: sum |code| a token (hatched;\nLayerNorm: other units)")
    axes[2].set_ylabel("CE loss score (1: as the LM\nalone, 0: zero ablation)")
    axes[3].set(ylim=(0, 1.1), ylabel="topic, AUROC (plain); which\ndocument (hatched),\nplace (dotted)")
    axes[3].set_title("topic and place: by the leading latents, where none lead by all and by as many "
                      "of the best", fontsize=9)
    names = [textwrap.fill(run.label, max(12, 84 // len(runs))) for run in runs]
    axes[3].set_xticks(range(len(runs)), names, fontsize=9, rotation=45 * (len(runs) > 8))
    return figure


def bars(ax, runs, metric, place, of, digits=3):
    """One bar a run, the `place`-th of `of` bars that stand side by side for each run."""
    crowded = len(runs) * of > 16  # then the numbers stand upright
    for i, run in enumerate(runs):
        values = run.score(metric)
        if values is not None and not (metric == "l1" and run.config.get("layernorm")):
            mean, error = mean_se(values)
            drawn = ax.bar(i + 0.8 * ((place + 0.5) / of - 0.5), mean, min(0.6, 0.76 / of),
                           yerr=error, ecolor="0.5", color=run.colour, edgecolor="white",
                           hatch=(None, "////", "....")[place])
            ax.bar_label(drawn, [f"{mean:.{digits}f}"], padding=2, fontsize=8.5,
                         rotation=90 * crowded)
    ax.set(xmargin=0.02, ymargin=0.2 + 0.2 * crowded)


def training_curves(runs, table):
    """Reconstruction loss, L1 of the codes and dead latents over the training steps."""
    runs = choose(runs, LADDER, "log.jsonl")
    figure, axes = plt.subplot_mosaic([["recon", "recon"], ["l1", "dead"]], figsize=(9, 7))
    heading(figure, "Training", runs)
    titles = {"recon": "Reconstruction loss: share of variance missed (log)",
              "l1": "L1 of the codes, scaled input (LayerNorm: other units)",
              "dead": "Dead latents: without a recent firing"}
    for term, ax in axes.items():
        for run in runs:
            if not (term == "l1" and run.config.get("layernorm")):
                band(ax, *run.curve(term), run, label=run.label, marker=run.marker, markersize=5,
                     markevery=0.15, linewidth=1.4)
        ax.set(title=titles[term], xlabel="training step")
    for term in ("l1", "dead"):
        axes[term].set_ylim(bottom=0)
    axes["recon"].set_yscale("log")
    axes["recon"].yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}",
                            minor_locator=NullLocator())
    figure.legend(*axes["recon"].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def consistency(runs, table):
    """Autocorrelation by lag against raw activations and the linear limit; what probes tell."""
    runs = choose(runs, TRIO, "autocorr")
    panels = [["lags", "topic"], ["lags", "document"], ["lags", "position"]]
    figure, axes = plt.subplot_mosaic(panels, figsize=(9.5, 7.5), width_ratios=[1.3, 1])
    heading(figure, "What lasts from token to token?", runs)
    lag_panel(axes["lags"], runs)
    probe_panel(axes["topic"], runs, "probes", "token_topic")
    probe_panel(axes["document"], runs, "probes", "document_id_shifted")
    probe_panel(axes["position"], runs, "position", "probe")
    axes["topic"].set(title="Topic of a token, from 5 latents", ylabel="AUROC")
    axes["document"].set(title="Which document, told at another place", ylabel="accuracy")
    axes["position"].set(title="Which eighth of its row it stands in", ylabel="accuracy")
    figure.legend(*axes["lags"].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def lag_panel(ax, runs):
    """Mean autocorrelation by lag, of the leading latents where a loss binds them, else of all."""
    first = runs[0].first  # lags, raw activations and limit are the same for all runs
    lags = first["lags"]
    for run in runs:
        group = "lead" if run.leads else "whole"
        label = f"{run.label}: {group}, {run.first['groups'][group]['latents']} latents"
        lines = {("autocorr", group): {"linewidth": 2.2, "marker": run.marker, "label": label},
                 ("autocorr", "best"): {"linewidth": 1.8, "linestyle": ":"},
                 ("autocorr_null", group): {"linewidth": 0.7}}
        for keys, style in lines.items():
            if run.values(*keys) is not None:
                band(ax, lags, *mean_se(run.values(*keys)), run, **style)
    ax.set_title("solid: lead, or all; dotted: as many of the best; thin: shuffled")
    if first.get("linear_limit"):
        limit = first["linear_limit"]["mean"]
        ax.fill_between(lags, *np.array([limit["100"], limit["10"]], float), color="0.9", zorder=0,
                        linewidth=0, label="linear limit: slowest 10 (top) to 100 directions")
    ax.plot(lags, np.array(first["autocorr_raw"], float), "-.", color="0.45", linewidth=1.2,
            label="raw activations")
    ax.set_xscale("log", base=2)
    ax.set(xticks=lags, xticklabels=lags, xlabel="lag (tokens, log)", ylabel="mean autocorrelation")


def probe_panel(ax, runs, *keys):
    """Points with numbers, a run and group of latents each, from `keys` of consistency.json."""
    groups = {"whole": "whole\ndictionary", "lead": "leading\nlatents",
              "best": "as many of the\nbest at lag 16", "rest": "the rest"}
    groups = {group: words for group, words in groups.items()
              if any(run.values(*keys, group) is not None for run in runs)}
    if not groups:  # activations without a text have no passages
        ax.set_axis_off()
        return
    for index, run in enumerate(runs):
        for place, group in enumerate(groups):
            values = run.values(*keys, group)
            if values is not None and (run.leads or group not in ("lead", "rest")):
                mean, error = mean_se(values)
                x = place + 0.7 * ((index + 0.5) / len(runs) - 0.5)
                ax.errorbar(x, mean, error, color=run.colour, marker=run.marker, markersize=7,
                            capsize=3)
                if len(runs) < 5:  # else the numbers would cover each other
                    ax.annotate(f"{mean:.2f}".lstrip("0"), (x, mean + error), (0, 7), ha="center",
                                fontsize=9, textcoords="offset points", color=run.colour)
    ax.set_xticks(range(len(groups)), groups.values())
    ax.set(xlim=(-0.5, len(groups) - 0.5), ymargin=0.15)
    found = {name: runs[0].values(*keys, name) for name in LEVELS}  # the same for runs of one lead
    found = {name: values.mean() for name, values in found.items() if values is not None}
    for value in found.values():
        ax.axhline(value, color="0.55", linestyle="-.", linewidth=1, zorder=0)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high)  # or a later line would move them
    height = -1  # of the last name; they stand at the right, clear of the points and of each other
    for name, value in sorted(found.items(), key=lambda item: item[1]):
        height = max((value - low) / (high - low), height + 0.09)
        ax.annotate(LEVELS[name], (1.01, height), xycoords="axes fraction", va="center",
                    fontsize=8.5, color="0.35")


def frontier(runs, table):
    """Explained variance against topic, document and S; the line is our loss by its weight."""
    panels = {"token_topic_5": "topic of a token, 5 latents (AUROC)",
              "document_id": "which document (accuracy)",
              "smoothness_S": "smoothness S (lower is smoother)"}
    runs = comparable(choose(runs, RIVALS, "token_topic_5"), "k", "layernorm")  # S in other units
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.9), sharey=True)
    heading(figure, "What it costs", runs)
    weights = [table[name] for name in WEIGHTS if name in table]
    for ax, (metric, words) in zip(axes, panels.items()):
        points = [[np.mean(row[metric]), np.mean(row["explained_variance"])] for row in weights]
        if points:
            ax.plot(*np.transpose(points), "o-", color="#D55E00", markersize=4,
                    label="numbers: weight of our loss")
        for row, point in zip(weights, points):
            ax.annotate(f"{row['temp_alpha'][0]:g}", point, (7, 4), textcoords="offset points",
                        fontsize=8.5, color="#D55E00")
        for run in runs:
            x, dx = mean_se(run.scores[metric])
            y, dy = mean_se(run.scores["explained_variance"])
            ax.errorbar(x, y, dy, dx, color=run.colour, marker=run.marker, linestyle="none",
                        label=run.label, markersize=7, capsize=2)
        ax.set(xlabel=words, xmargin=0.12, ymargin=0.08)
        ax.locator_params("x", nbins=5)
    axes[0].set_ylabel("explained variance")
    axes[2].legend(*axes[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def ablation(runs, table):
    """Gain over weight 0 by window and by leading share, in short runs of study.csv."""
    cells = [row for name, row in table.items() if name.startswith("grid_w")]
    if "grid_base" not in table or not cells:
        raise KeyError("grid_base and grid_w*")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.7), sharey=True)
    figure.suptitle(f"Gain over weight 0 in short runs (n = {len(cells[0])})", x=0.01, ha="left")
    defaults = {"window": 16, "temporal_fraction": 0.02}
    lines = {"token_topic_5_lead": ("topic of a token, 5 leading latents (AUROC)", "D-"),
             "document_id": ("which document (accuracy)", "o--")}
    for ax, setting, other in zip(axes, defaults, reversed(defaults)):
        shown = [row for row in cells if row[other][0] == defaults[other]]
        shown.sort(key=lambda row: row[setting][0])
        x = [row[setting][0] for row in shown]
        ax.axvline(defaults[setting], color="0.88", linewidth=7, zorder=0, label="default")
        for metric, (words, style) in lines.items():
            base = table["grid_base"][UNBOUND.get(metric, metric)]
            gains = [mean_se(row[metric] - base[: len(row)]) for row in shown]
            ax.errorbar(x, *np.transpose(gains), fmt=style, capsize=2, label=words)
        ax.set(xscale="log", xticks=x, xticklabels=x, xlabel=f"{setting} (log)",
               title=f"{other} {defaults[other]}")
        ax.minorticks_off()
    axes[0].set(ylabel="difference to weight 0", ylim=(min(0, axes[0].get_ylim()[0]), None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def position_correlation(runs, table):
    """Correlation of codes, and of raw activations, between the positions of a context."""
    runs = choose(runs, PAIR, "position_corr")
    first = runs[0].first["position_corr"]
    squares = {f"codes, {run.label}": run.first["position_corr"]["codes"] for run in runs}
    squares["raw activations"] = first["raw"]
    return draw_squares(squares, "Correlation between positions p and q of a context",
                        len(first["raw"]) * first["step"], xlabel="position q (tokens)",
                        ylabel="position p (tokens)")


def redundancy(runs, table):
    """Correlation between the codes of the latents that fire most, similar ones side by side."""
    squares = {}
    for run in choose(runs, PAIR, "correlation"):
        title = f"{run.label}: {run.first['redundancy']['share_above_0.9']:.2%} of those scored"
        squares[f"{title}\ncorrelate above .9 with another"] = run.first["correlation"]["corr"]
    return draw_squares(squares, "Redundant latents", 1, xlabel="the latents that fire most",
                        xticks=[], yticks=[])


def draw_squares(squares, words, end, **style):
    """Tables {title: (m, m)} on one scale of colours, which the diagonal does not stretch."""
    tables = [np.array(table, float) for table in squares.values()]
    others = np.concatenate([table[~np.eye(len(table), dtype=bool)] for table in tables])
    low, high = np.nanpercentile(others, (1, 99))
    figure, axes = plt.subplots(1, len(tables), figsize=(9, 1 + 7.5 / len(tables)), squeeze=False)
    heading(figure, words)
    for ax, title, table in zip(axes[0], squares, tables):
        image = ax.imshow(table, vmin=low, vmax=high, extent=(0, end, end, 0),
                          interpolation="nearest")
        ax.set(title=title, facecolor="0.8", **style)  # grey: no pair of tokens was seen
        ax.label_outer()
    figure.colorbar(image, ax=axes, extend="both", shrink=0.8, pad=0.01, label="correlation")
    return figure


def clusters(runs, table):
    """Kinds of latents by rate, span and autocorrelation: their curves, and how much they fire."""
    from sklearn.cluster import KMeans  # no other picture needs it
    runs = choose(runs, PAIR, "latents")
    latents = [run.first["latents"] for run in runs]
    lags = runs[0].first["lags"]
    rate, span = [np.concatenate([one[key] for one in latents]) for key in ("rate", "span")]
    autocorr = np.concatenate([np.array(one["autocorr"], float).T for one in latents])
    known = ~np.isnan(autocorr).all(0)  # not those of a lag beyond the context
    lags, autocorr = np.array(lags)[known], np.nan_to_num(autocorr[:, known])
    features = np.column_stack([np.log(rate), np.log(span), autocorr])
    features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    found = KMeans(5, n_init=10, random_state=0).fit_predict(features)
    owner = np.repeat(range(len(runs)), [len(one["rate"]) for one in latents])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), width_ratios=[1.5, 1])
    heading(figure, "Kinds of latents: k-means on rate, span and autocorrelation")
    bottom = np.zeros(len(runs))
    order = np.argsort([features[found == kind, -1].mean() for kind in range(5)])
    for place, kind in enumerate(order):
        mine = found == kind
        colour = plt.get_cmap("cividis")(place / 4)
        left.plot(lags, autocorr[mine].mean(0), color=colour, marker=MARKERS[place],
                  label=f"{mine.sum()} latents")
        shares = np.bincount(owner, rate * mine) / np.bincount(owner, rate)
        drawn = right.bar(range(len(runs)), shares, 0.6, bottom, color=colour, edgecolor="white")
        right.bar_label(drawn, [f"{share:.0%}" if share > 0.03 else "" for share in shares],
                        label_type="center", color="white" if place < 2 else "black")
        bottom += shares
    left.set_xscale("log", base=2)
    left.set(xticks=lags, xticklabels=lags, xlabel="lag (tokens)", ylabel="mean autocorrelation")
    left.legend(reverse=True)
    right.set_xticks(range(len(runs)), [textwrap.fill(run.label, 16) for run in runs])
    right.set(ylabel="share of firings", title="how much each kind fires")
    return figure


# ------------------------------------------------------------------------------------------------
# 3. Scores side by side, and the command
# ------------------------------------------------------------------------------------------------


def with_error(values, sign=""):
    """Mean ± standard error, rounded so that the error shows two digits; one seed has no error."""
    mean, error = mean_se(values)
    if np.isnan(mean):
        return "–"
    if len(values) < 2:
        return f"{mean:{sign}.4g}"
    digits = max(0, 1 - int(np.floor(np.log10(max(error, 1e-4)))))
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def comparison(runs, metrics):
    """Lines of a Markdown table: scores, and differences to the first run, paired by seed."""
    names = [run.name.replace("|", "\\|") for run in runs]
    lines = [["metric", *names, *[f"{name} - {names[0]}" for name in names[1:]]],
             ["---"] * 2 * len(runs)]
    for metric in metrics:
        values = [run.score(metric) for run in runs]
        values = [np.array([np.nan]) if one is None else one for one in values]
        cells = [with_error(one) for one in values]
        for run, b in zip(runs[1:], values[1:]):
            a = values[0]
            if run.config.get("seed") != runs[0].config.get("seed"):  # then there is no pairing
                a, b = a.mean(keepdims=True), b.mean(keepdims=True)
            cells.append(with_error(b[: len(a)] - a[: len(b)], "+"))
        lines.append([metric, *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[cell.ljust(width) for cell, width in zip(cells, widths)] for cells in lines]
    return [f"| {' | '.join(cells)} |" for cells in padded]


def caveats(first, run):
    """Sentences on why two runs may not be comparable."""
    keys = ("evaluate", "rows", "model", "layer", "dtype", "train_tokens")
    found = [f"{run.name} {clause}" for clause in differences(first, run, *keys)]
    n, m = len(first.scores["l0"]), len(run.scores["l0"])
    if n != m:
        found.append(f"{first.name} has {n} seeds, {run.name} {m}: the difference is of the first "
                     f"{min(n, m)}")
    a, b = first.scores["l0"].mean(), run.scores["l0"].mean()
    if abs(b - a) > 0.01 * a:
        found.append(f"{run.name} has an L0 of {b:.4g}, not {a:.4g} as {first.name}: S and "
                     "autocorrelation are not comparable")
    if bool(first.config.get("layernorm")) != bool(run.config.get("layernorm")):
        found.append(f"one of {run.name} and {first.name} has LayerNorm: S and L1 in other units")
    return found


def compare(runs):
    """Print all headline numbers of some runs, how the others differ from the first, and notes."""
    for run in runs:
        if "l0" not in run.scores:
            raise ValueError(f"{run.path / 'final_info.json'} holds no scores")
    found = dict.fromkeys(metric for run in runs for metric in run.scores)
    first = [metric for metric in HEADLINE if metric in found]
    unbound = [run.name for run in runs if not run.leads]
    if unbound:
        names = ", ".join(f"{name} is its {other}" for name, other in UNBOUND.items())
        print(f"note: no latents lead in {', '.join(unbound)}: {names}")
    for run in runs[1:]:
        for sentence in caveats(runs[0], run):
            print(f"note: {sentence}")
    print("\n".join(comparison(runs, dict.fromkeys([*first, *found]))))


PICTURES = (metrics_comparison, training_curves)
FIGURES = (consistency, frontier, ablation, clusters, redundancy, position_correlation)


def draw(make, runs, table, out_dir):
    """Draw one picture, if its data are there."""
    path = out_dir / ("figures" if make in FIGURES else "") / f"{make.__name__}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure = make(runs, table)
        figure.savefig(path, metadata={"Software": None})  # the same numbers give the same bytes
        print(f"wrote {path}")
    except (KeyError, TypeError, ValueError) as error:
        print(f"skipped {path.name}: not in the records: {error}")
    plt.close("all")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def main(argv=None):
    """The command. Returns the exit code: 0, 1 if there is no run, 2 for bad usage."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="name or directory of a run")
    parser.add_argument("--figures", action="store_true", help="also draw those in figures/")
    parser.add_argument("--compare", action="store_true", help="print scores instead of pictures")
    parser.add_argument("--runs_dir", type=Path, default=HERE / "runs", help="[%(default)s]")
    parser.add_argument("--out_dir", type=Path, default=HERE, help="of the pictures [%(default)s]")
    args = parser.parse_args(argv)
    try:
        runs = find_runs(args.runs_dir, args.runs)
        if args.compare and len(runs) < 2:
            raise ValueError("--compare takes two runs or more")
        if args.compare:
            compare(runs)
            return 0
        if not runs:
            print(f"error: no run in {args.runs_dir}; experiment.py makes one", file=sys.stderr)
            return 1
        table = {} if args.runs else read_table(args.runs_dir / "study.csv")
        runs = comparable(runs, "model", "layer", "train_tokens", "rows")
        for make in PICTURES + FIGURES * args.figures:
            draw(make, runs, table, args.out_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
