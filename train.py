"""The study: a table of runs, trained and scored one after the other (or side by side) from one harvest.

    python train.py                    # everything that is not done yet
    python train.py run_0 run_6        # only these
    python train.py --list             # the table, and what is done
    python train.py --jobs 2           # two runs at a time, each a process with half of the cores

Each run is `python experiment.py --out_dir NAME` with the flags of its row: no model, loss or default lives here.
A finished run (it has a final_info.json made with these settings) is skipped, an interrupted one is resumed (or begun again,
if settings or experiment.py changed since), a failed one is reported at the end and does not stop the rest. A record without
weights that has other settings is made anew; with its weights there, it is yours, and the run fails instead. After each run
runs/study.csv is written anew: all scores, a row a run and seed.
"""
import argparse
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

import experiment

# ------------------------------------------------------------------------------------------------------------
# The table: name -> flags
# ------------------------------------------------------------------------------------------------------------

# The ladder of the seed experiment, each rung on top of the one before; run_5 takes run_4's LayerNorm out again.
SEEDS, HEADLINE_SEEDS = "--n_seeds 3", "--n_seeds 5"
SQDIFF = "--temp_loss sqdiff --temp_codes post --temp_chunks 8"  # the seed experiment's loss
STUDY = {
    "run_0": f"--temp_alpha 0 {HEADLINE_SEEDS}",
    "run_6": f"{HEADLINE_SEEDS}",  # experiment.py's defaults: our method
    "run_1": f"{SQDIFF} --temp_alpha 0.001 --grad_clip 0 --schedule constant --warmup_steps 0 {SEEDS}",
    "run_2": f"{SQDIFF} --temp_alpha 0.001 --schedule constant --warmup_steps 0 --init xavier {SEEDS}",
    "run_3": f"{SQDIFF} --temp_alpha 0.0001 --init xavier {SEEDS}",
    "run_4": f"{SQDIFF} --temp_alpha 0.0001 --init xavier --layernorm {SEEDS}",
    "run_5": f"{SQDIFF} --temp_alpha 0.0001 --init xavier --nonlinearity gelu {SEEDS}",
}
# Controls: the same loss, but the neighbours that it sees are not neighbours. (The third, weight 0, is run_0.)
STUDY |= {f"control_{control}": f"--control {control} {SEEDS}" for control in ("other_docs", "permuted")}
# Rivals, from their papers, in our trainer. T-SAE (Bhalla et al. 2025): the leading fifth of the latents reconstructs
# alone and carries the InfoNCE; as published (cosines, all weights 1) and as released (inner products, 0.4 / 0.1 / 0.1).
FIFTH = f"--temporal_fraction 0.2 --temp_codes post --temp_chunks 32 --temp_warmup 0 --temperature 1 {SEEDS}"
STUDY |= {
    "tsae_paper": f"--temp_loss infonce --temp_alpha 1 --matryoshka_alpha 1 {FIFTH}",
    "tsae_released": f"--temp_loss infonce_dot --temp_alpha 0.25 --matryoshka_alpha 0.25 {FIFTH}",
    "matryoshka": f"--temp_alpha 0 --matryoshka_alpha 1 {FIFTH}",
}
# Our method at a larger weight, which still costs less explained variance than T-SAE's published form.
STUDY["strong"] = f"--temp_alpha 0.5 {SEEDS}"
# Does the gain hold at other sparsities?
STUDY |= {f"k{k}_{name}": f"--k {k} {flags} {SEEDS}"
          for k in (16, 64) for name, flags in (("base", "--temp_alpha 0"), ("ours", ""))}
# Window x coefficient, and each loss over its coefficients: a fifth of the token budget (equal for all, the baseline
# included), scored without CE and KL to save time.
SHORT = f"--train_tokens 600_000 --reconstruction_rows 0 {SEEDS}"
STUDY["grid_base"] = f"--temp_alpha 0 {SHORT}"
STUDY |= {f"grid_selective_w{w}_a{a:g}": f"--window {w} --temp_alpha {a:g} {SHORT}"
          for w in (2, 4, 8, 16, 32) for a in (0.03, 0.1, 0.3, 1.0, 3.0)}
STUDY |= {f"grid_sqdiff_w{w}_a{a:g}": f"{SQDIFF} --window {w} --temp_alpha {a:g} {SHORT}"
          for w in (2, 4, 8) for a in (0.00001, 0.0001, 0.001)}
STUDY |= {f"grid_{loss}_w2_a{a:g}": f"--temp_loss {loss} --temp_codes pre --temp_chunks 8 --window 2 --temp_alpha {a:g} {SHORT}"
          for loss in ("autocorr", "variance") for a in (0.01, 0.03, 0.1, 0.3)}
STUDY |= {f"grid_infonce_a{a:g}": f"--temp_loss infonce --temp_alpha {a:g} --matryoshka_alpha 1 {FIFTH} {SHORT}"
          for a in (0.03, 0.1, 0.3, 1.0)}
STUDY = {name: flags.split() for name, flags in STUDY.items()}
# The settings that study.csv has beside the scores.
COLUMNS = "temp_loss temp_alpha window temp_codes temp_chunks k train_tokens temporal_fraction matryoshka_alpha control".split()


# ------------------------------------------------------------------------------------------------------------
# Running it
# ------------------------------------------------------------------------------------------------------------


def settings(name):
    """The recorded settings of a run. Where it is older than a Config field, that field does not concern it: its default."""
    return experiment.asdict(experiment.Config()) | json.loads((experiment.RUNS / name / "config.json").read_text())


def wanted(name):
    """The Config that the table and experiment.py's defaults give a run now."""
    return experiment.parse(["--out_dir", name, *STUDY[name]])


def done(name):
    """A run is done when it is scored, with the settings that are wanted now."""
    if not (experiment.RUNS / name / "final_info.json").exists():
        return False
    saved, cfg = settings(name), wanted(name)
    asked = experiment.comparable(cfg).items()
    return all(saved[k] == v for k, v in asked if cfg.temporal or k == "temp_alpha"
               or not k.startswith("temp_"))  # how to do what is off does not matter


def write_csv():
    """runs/study.csv: a row for each run that is done and each of its seeds, in the table's order."""
    rows = []
    for name in filter(done, STUDY):
        config, info = settings(name), json.loads((experiment.RUNS / name / "final_info.json").read_text())
        for scores in (one["final_info_dict"] for one in info.values()):
            scores.pop("pw_mcc", None)  # has a value for each pair of seeds, none for a seed
            for i in range(config["n_seeds"]):
                rows.append({"run": name, "seed": config["seed"] + i} | {k: config[k] for k in COLUMNS}
                            | {k: f"{values[i]:.6g}" for k, values in scores.items()})
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    table.writeheader(), table.writerows(rows)
    experiment.replace(experiment.RUNS / "study.csv", text.getvalue())


def size(name):
    """Tokens that a run visits, all seeds together: what its time goes by."""
    return wanted(name).n_seeds * wanted(name).train_tokens


def visited(name, since):
    """Tokens that a run started at the time `since` has visited, by the last line of its log."""
    cfg, log = wanted(name), experiment.RUNS / name / "log.jsonl"
    try:
        if log.stat().st_mtime > since:  # else it is the log of an earlier record
            last = json.loads(log.read_text().splitlines()[-1])
            return (last["seed"] - cfg.seed) * cfg.train_tokens + last["step"] * cfg.batch_size
    except (OSError, ValueError, IndexError):  # not there yet, empty, or being written
        pass
    return 0


def resumable(name):
    """Whether what is in a run's directory was made with the settings wanted now and by this experiment.py."""
    saved = settings(name)
    same_source = experiment.made_by(experiment.RUNS / name) == experiment.hashlib.sha256(experiment.SOURCE.encode()).hexdigest()
    return same_source and all(saved[k] == v for k, v in experiment.comparable(wanted(name)).items())


def start(name, jobs):
    """Start one run as a process of its own; its stderr goes to a log beside the runs that git ignores."""
    folder = experiment.RUNS / name
    begun = (folder / "checkpoint").exists() or list(folder.glob("seed_*/cfg.json"))
    finished = (folder / "final_info.json").exists() and list(folder.glob("seed_*/sae_weights.safetensors"))
    # a finished run with weights and other settings is the user's: without --overwrite experiment.py leaves it alone
    again = ["--resume"] if begun and resumable(name) else [] if finished else ["--overwrite"]
    command = [sys.executable, experiment.__file__, "--out_dir", name, *STUDY[name], *again]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))  # more threads than cores spin against each other
    log = open(experiment.RUNS / f"{name}.log.part", "w")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=os.environ | {"OMP_NUM_THREADS": threads})


def run_all(names, jobs):
    """Run what is missing of `names`, `jobs` at a time; returns {name: last words} of those that failed."""
    waiting, running, failed = [name for name in names if not done(name)], {}, {}
    over = sum(size(name) for name in names if name not in waiting)  # tokens of the runs that have ended
    experiment.RUNS.mkdir(exist_ok=True)
    bar = tqdm(total=sum(map(size, names)), initial=over, desc="study", unit="tok", unit_scale=True, smoothing=0,
               mininterval=2, miniters=0)
    try:
        while waiting or running:
            # the first run harvests for all: the next one starts when that one trains
            while waiting and len(running) < (jobs if bar.n > bar.initial else 1):
                if Path(experiment.__file__).read_text() != experiment.SOURCE:  # one study, one source
                    failed |= dict.fromkeys(waiting, "not started: experiment.py was edited since the study began")
                    waiting.clear()
                    break
                name = waiting.pop(0)
                running[name] = time.time(), start(name, jobs)
            for name, (_, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    over += size(name)
                    log = experiment.RUNS / f"{name}.log.part"
                    if process.returncode:
                        words = (log.read_text().strip().splitlines() or [""])[-1]
                        failed[name] = f"exit {process.returncode}, see {log}; last words: {words}"
                    else:
                        log.unlink()
                    write_csv()
            bar.set_postfix_str(f"{len(names) - len(waiting) - len(running)}/{len(names)} runs", refresh=False)
            bar.update(over + sum(visited(name, since) for name, (since, _) in running.items()) - bar.n)
            time.sleep(0.2)
    finally:  # those that are still at work when we are stopped save what they have and can be resumed
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        bar.close()
    write_csv()
    return failed


def main(argv=None):
    """The command. Exit code 0, 1 if a run failed, 2 bad usage, 130 or 143 stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="runs of the table; all if none is named")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in STUDY]
    if unknown or args.jobs < 1:
        error = f"no such run: {', '.join(unknown)}" if unknown else "--jobs must be at least 1"
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = args.names or list(STUDY)
    if args.list:
        for name in names:
            print(f"{name:24s} {'done' if done(name) else '':5s} {' '.join(STUDY[name])}")
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        failed = run_all(names, args.jobs)
    except (KeyboardInterrupt, SystemExit) as stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return getattr(stopped, "code", 130)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
