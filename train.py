"""The study: a table of runs, each trained and scored by experiment.py.

    python train.py                    # every run that is not done
    python train.py run_0 run_6        # these
    python train.py --list             # the table, and what is done
    python train.py --jobs 2           # two runs at a time, each with half of the cores

A run goes to runs/study/NAME, a cell of the grid to runs/grid/NAME (not in git). After each run its
scores are rows of runs/study.csv, one a seed. That file decides what is done: a run is, if all its
seeds stand there with the flags of the table. An interrupted run is resumed, a failed one is
reported at the end and does not stop the rest.
"""
import argparse
import concurrent.futures
import csv
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import experiment
import prepare

RUNS = experiment.RUNS
TABLE = RUNS / "study.csv"
EXPERIMENT = Path(experiment.__file__)

# ------------------------------------------------------------------------------------------------
# 1. The table: name -> flags of experiment.py
# ------------------------------------------------------------------------------------------------

SQDIFF = "--temp_loss sqdiff --window 2 --temporal_fraction 1"
MEAN = "--temp_loss window_mean --temporal_fraction 0.05"
LEAD = "--temporal_fraction 0.2"
COSINES = f"{LEAD} --temp_loss infonce --temperature 1"
PRODUCTS = f"{LEAD} --temp_loss infonce_dot --temperature 1"
TUNED = f"{PRODUCTS} --temp_alpha 0.5 --matryoshka_alpha 0.15"
GEMMA = ("--model gemma-3-270m --layer 12 --harvest_tokens 262144 --train_tokens 1500000 "
         "--reconstruction_rows 16")
STUDY = {
    # Baseline and default
    "run_0": "--temp_alpha 0 --n_seeds 5",
    "run_6": "--n_seeds 5",
    # A stronger point of the same frontier
    "run_7": "--temp_alpha 0.03 --n_seeds 3",
    # The same target predicted with a squared error, the default before
    "run_8": f"{MEAN} --temp_alpha 0.2 --n_seeds 5",
    # The ladder of the first notebook, each rung on top of the one before; 5 takes LayerNorm out
    "run_1": f"{SQDIFF} --temp_alpha 1e-3 --grad_clip 0 --schedule constant --warmup_steps 0",
    "run_2": f"{SQDIFF} --temp_alpha 1e-3 --schedule constant --warmup_steps 0 --init xavier",
    "run_3": f"{SQDIFF} --temp_alpha 1e-4 --init xavier",
    "run_4": f"{SQDIFF} --temp_alpha 1e-4 --init xavier --layernorm",
    "run_5": f"{SQDIFF} --temp_alpha 1e-4 --init xavier --nonlinearity gelu",
    # T-SAE (Bhalla et al. 2025). Its weights and temperature are in raw units, as there: published
    # |x - x_hat|^2 + |x - x_hat_lead|^2 + CE + CE of cosines; released 0.4 and 0.1 of the squared
    # errors and 0.1 times the mean of two CEs of inner products.
    "matryoshka": f"{LEAD} --temp_alpha 0 --matryoshka_alpha 0.25 --n_seeds 3",
    "tsae_published": f"{COSINES} --temp_alpha 2 --matryoshka_alpha 1 --n_seeds 3",
    "tsae_released": f"{PRODUCTS} --temp_alpha 0.25 --matryoshka_alpha 0.25 --n_seeds 3",
    # Tuned: of sweep_*, the best token_topic_5 + document_id within .01 of explained variance
    "tsae_tuned": f"{TUNED} --n_seeds 3",
    # Other sparsities
    "k16_base": "--k 16 --temp_alpha 0 --n_seeds 3",
    "k16_ours": "--k 16 --n_seeds 3",
    "k64_base": "--k 64 --temp_alpha 0 --n_seeds 3",
    "k64_ours": "--k 64 --n_seeds 3",
    # A second model. Raw units: its variance is 3200 times that of the first one's layer, so these are
    # cosines with the weight 1000 (a good one in short runs) and tsae_tuned
    "gemma_base": f"{GEMMA} --temp_alpha 0 --n_seeds 3",
    "gemma_ours": f"{GEMMA} --n_seeds 3",
    "gemma_strong": f"{GEMMA} --temp_alpha 0.03 --n_seeds 3",
    "gemma_tsae": f"{GEMMA} {COSINES} --temp_alpha 3.2e6 --matryoshka_alpha 0.25 --n_seeds 3",
    "gemma_tsae_dot": f"{GEMMA} {LEAD} --temp_loss infonce_dot --temp_alpha 1600 "
                      "--temperature 3200 --matryoshka_alpha 0.15 --n_seeds 3",
}

# The grids have a fifth of the token visits and no CE or KL, which take half of the scoring.
SHORT = "--train_tokens 600000 --reconstruction_rows 0"
GRID = {"grid_base": f"{SHORT} --temp_alpha 0 --n_seeds 3"}
for window in (2, 4, 8, 16, 32):
    for fraction in (0.01, 0.02, 0.05, 0.1, 0.2):
        flags = f"{SHORT} --temp_alpha 0.01 --window {window} --temporal_fraction {fraction}"
        GRID[f"grid_w{window}_f{fraction}"] = flags
for alpha in (0.003, 0.03):
    GRID[f"grid_a{alpha}"] = f"{SHORT} --temp_alpha {alpha}"
for alpha in (0.05, 0.2, 1):
    GRID[f"grid_mean_a{alpha}"] = f"{SHORT} {MEAN} --temp_alpha {alpha} --n_seeds 3"
OTHER_LOSSES = {"sqdiff": (1e-4, 1e-3, 1e-2), "variance": (0.01, 0.03, 0.1),
                "autocorr": (0.01, 0.03, 0.1), "selective": (0.1, 0.3, 1)}
for loss, alphas in OTHER_LOSSES.items():
    for alpha in alphas:
        flags = f"{SHORT} --temp_loss {loss} --window 2 --temporal_fraction 1 --temp_alpha {alpha}"
        GRID[f"grid_{loss}_a{alpha}"] = flags
for alpha in (0.25, 2.5, 25, 250):
    flags = f"{SHORT} {PRODUCTS} --temp_alpha {alpha} --matryoshka_alpha 0.25"
    GRID[f"grid_infonce_dot_a{alpha}"] = flags
for alpha in (2, 20, 200, 600, 1000, 2000, 6000):
    flags = f"{SHORT} {COSINES} --temp_alpha {alpha} --matryoshka_alpha 0.25"
    GRID[f"grid_infonce_a{alpha}"] = flags

# Whole runs of T-SAE, of which "tuned" is the best: both forms of its loss, its weight and that of the
# Matryoshka term (infonce_dot, 0.25, 0.25 is tsae_released).
for loss, alpha, matryoshka in (
        ("infonce", 200, 0.25), ("infonce", 500, 0.25), ("infonce", 1000, 0.25),
        ("infonce", 2000, 0.25),
        ("infonce_dot", 0.05, 0.25), ("infonce_dot", 0.1, 0.25), ("infonce_dot", 0.2, 0.25),
        ("infonce_dot", 0.5, 0.25), ("infonce_dot", 0.3, 0.15), ("infonce_dot", 0.5, 0.15),
        ("infonce_dot", 0.25, 0.05), ("infonce_dot", 0.5, 0.05)):
    flags = f"--temp_loss {loss} --temp_alpha {alpha} --matryoshka_alpha {matryoshka}"
    GRID[f"sweep_{loss}_a{alpha}_m{matryoshka}"] = f"{LEAD} {flags} --temperature 1"
# The same with a smaller lead, as ours has: the weight of the tuned one, two of the Matryoshka term.
for fraction in (0.02, 0.05):
    for matryoshka in (0.05, 0.15):
        flags = (f"--temporal_fraction {fraction} --temp_loss infonce_dot --temp_alpha 0.5 "
                 f"--matryoshka_alpha {matryoshka} --temperature 1")
        GRID[f"sweep_f{fraction}_a0.5_m{matryoshka}"] = flags

# Whole runs: other weights of ours and of the squared error, and what the controls do
for alpha in (0.003, 0.1):
    GRID[f"whole_a{alpha}"] = f"--temp_alpha {alpha}"
GRID["whole_permuted"] = "--control permuted --n_seeds 3"
GRID["whole_other_docs"] = "--control other_docs"
for alpha in (0.5, 1):
    GRID[f"whole_mean_a{alpha}"] = f"{MEAN} --temp_alpha {alpha} --n_seeds 3"
GRID["whole_mean_other_docs"] = f"{MEAN} --temp_alpha 0.2 --control other_docs"

# Four times the budget: does the gain stay when an SAE is trained for longer?
LONG = "--train_tokens 12000000 --n_seeds 3"
GRID["long_base"] = f"{LONG} --temp_alpha 0"
GRID["long_ours"] = LONG
GRID["long_mean"] = f"{LONG} {MEAN} --temp_alpha 0.2"
GRID["long_mean_a0.5"] = f"{LONG} {MEAN} --temp_alpha 0.5"
GRID["long_tsae"] = f"{LONG} {TUNED}"

ALL = STUDY | GRID

# ------------------------------------------------------------------------------------------------
# 2. What is done
# ------------------------------------------------------------------------------------------------


def folder_of(name):
    """Where a run of the table lies."""
    return RUNS / ("grid" if name in GRID else "study") / name


def read_table():
    """The rows of study.csv by (run, seed)."""
    if not TABLE.exists():
        return {}
    with open(TABLE, newline="") as file:
        return {(row["run"], row["seed"]): row for row in csv.DictReader(file)}


def is_done(name, rows):
    """Whether all seeds of a run stand in the table with the flags that it has now."""
    settings = experiment.parse(ALL[name].split())
    seeds = range(settings.seed, settings.seed + settings.n_seeds)
    found = [rows.get((name, str(seed)), {}).get("flags") for seed in seeds]
    return all(flags == ALL[name] for flags in found)


def say_revisions(rows):
    """A sentence if the table mixes scores of several revisions."""
    revisions = {(row["experiment_sha256"], row["evaluate_sha256"]) for row in rows.values()}
    if len(revisions) > 1:
        print(f"note: {TABLE.name} holds scores of {len(revisions)} revisions of experiment.py and "
              "evaluate.py", file=sys.stderr)


def record(name):
    """Put the scores of a finished run into study.csv."""
    folder = folder_of(name)
    settings = prepare.read_json(folder / "config.json")
    made_by = prepare.read_json(folder / "environment.json")
    scores = next(iter(prepare.read_json(folder / "final_info.json").values()))["final_info_dict"]
    rows = read_table()
    for i in range(settings["n_seeds"]):
        seed = str(settings["seed"] + i)
        row = {"run": name, "seed": seed, "flags": ALL[name]}
        columns = ("temp_loss", "temp_alpha", "window", "temporal_fraction", "k", "train_tokens")
        row |= {column: settings[column] for column in columns}
        row["experiment_sha256"] = made_by["experiment_sha256"][:12]
        row["evaluate_sha256"] = made_by["evaluate_sha256"][:12]
        row |= {metric: f"{v[i]:.6g}" for metric, v in scores.items() if metric != "pw_mcc"}
        rows[name, seed] = row
    names = list(dict.fromkeys(column for row in rows.values() for column in row))
    order = {run: i for i, run in enumerate(ALL)}
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for key in sorted(rows, key=lambda key: (order.get(key[0], len(order)), int(key[1]))):
        writer.writerow(rows[key])
    prepare.write_whole(TABLE, lambda part: part.write_text(text.getvalue()))


# ------------------------------------------------------------------------------------------------
# 3. Running
# ------------------------------------------------------------------------------------------------

recording = threading.Lock()
children = []


def run_one(name, threads):
    """Train and score one run in a process of its own. -> None, or the sentence it failed with."""
    folder = folder_of(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = (folder / "config.json").exists()
    for how in (["--resume"], ["--overwrite"]) if started else (["--overwrite"],):
        command = [sys.executable, str(EXPERIMENT), "--out_dir", str(folder), *ALL[name].split()]
        with open(f"{folder}.log", "w") as log:
            child = subprocess.Popen(command + how, stdout=log, stderr=subprocess.STDOUT, env=env)
            children.append(child)
            code = child.wait()
            children.remove(child)
        if code != 2:  # 2: it cannot be resumed, for settings or sources have changed
            break
    if code:
        lines = Path(f"{folder}.log").read_text().strip().splitlines() or ["no message"]
        return f"{name}: exit code {code}: {lines[-1]}"
    Path(f"{folder}.log").unlink()
    with recording:
        record(name)
    return None


def run_all(names, jobs):
    """Run the named runs, `jobs` at a time. -> the sentences of those that failed."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    failed = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(run_one, name, threads): name for name in names}
        try:
            for number, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                result = future.result()
                print(f"{number} of {len(names)}: {result or waiting[future] + ' done'}", flush=True)
                if result:
                    failed.append(result)
        except KeyboardInterrupt:
            for future in waiting:
                future.cancel()
            for child in list(children):
                child.send_signal(signal.SIGTERM)  # each saves a checkpoint
            raise
    return failed


def interrupt(number, frame):
    """SIGTERM stops the study as Ctrl-C does."""
    raise KeyboardInterrupt


def main(argv=None):
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="names of the table; none: all that is not done")
    parser.add_argument("--list", action="store_true", help="print the table and what is done")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    args = parser.parse_args(argv)
    unknown = [name for name in args.runs if name not in ALL]
    if unknown or args.jobs < 1:
        problem = f"no such run: {', '.join(unknown)}" if unknown else "--jobs must be at least 1"
        print(f"error: {problem}", file=sys.stderr)
        return 2
    rows = read_table()
    say_revisions(rows)
    if args.list:
        for name, flags in ALL.items():
            print(f"{'done' if is_done(name, rows) else '    '}  {name:24} {flags}")
        return 0
    signal.signal(signal.SIGTERM, interrupt)
    names = [name for name in args.runs or ALL if not is_done(name, rows)]
    try:
        failed = run_all(names, args.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    for sentence in failed:
        print(f"failed: {sentence}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
