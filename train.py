"""The study: a table of runs, trained and scored one after the other (or side by side) from one harvest.

    python train.py                    # everything that is not done yet
    python train.py run_0 run_6        # only these
    python train.py --list             # the table, and what is done
    python train.py --jobs 2           # two runs at a time, each a process with half of the cores

Each run is `python experiment.py --out_dir NAME` with the flags of its row: no model, loss or default lives here.
A finished run (it has a final_info.json) is skipped, an interrupted one is resumed, a failed one is reported at
the end and does not stop the rest.
"""
import argparse
import json
import os
import subprocess
import sys
import time

from tqdm import tqdm

import experiment

# ------------------------------------------------------------------------------------------------------------
# The table: name -> flags
# ------------------------------------------------------------------------------------------------------------

# The ladder of the seed experiment, each rung on top of the one before; run_5 takes run_4's LayerNorm out again.
SEEDS, HEADLINE_SEEDS = "--n_seeds 3", "--n_seeds 5"
STUDY = {
    "run_0": f"--temp_alpha 0 {HEADLINE_SEEDS}",
    "run_6": f"{HEADLINE_SEEDS}",  # experiment.py's defaults: our method
    "run_1": f"--temp_loss sqdiff --temp_codes post --temp_alpha 0.001 --grad_clip 0 --schedule constant --warmup_steps 0 {SEEDS}",
    "run_2": f"--temp_loss sqdiff --temp_codes post --temp_alpha 0.001 --schedule constant --warmup_steps 0 --init xavier {SEEDS}",
    "run_3": f"--temp_loss sqdiff --temp_codes post --temp_alpha 0.0001 --init xavier {SEEDS}",
    "run_4": f"--temp_loss sqdiff --temp_codes post --temp_alpha 0.0001 --init xavier --layernorm {SEEDS}",
    "run_5": f"--temp_loss sqdiff --temp_codes post --temp_alpha 0.0001 --init xavier --nonlinearity gelu {SEEDS}",
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
# Does the gain hold at other sparsities?
STUDY |= {f"k{k}_{name}": f"--k {k} {flags} {SEEDS}" for k in (16, 64) for name, flags in (("base", "--temp_alpha 0"), ("ours", ""))}
# Window x coefficient, ours and the seed's, at a third of the token budget (equal for all, the baseline included).
SHORT = "--train_tokens 1_000_000"
ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0)
STUDY["grid_base"] = f"--temp_alpha 0 {SHORT} {SEEDS}"
STUDY |= {f"grid_selective_w{w}_a{a:g}": f"--window {w} --temp_alpha {a:g} {SHORT} {SEEDS}" for w in (2, 4, 8, 16, 32) for a in ALPHAS}
STUDY |= {f"grid_sqdiff_w{w}_a{a:g}": f"--temp_loss sqdiff --temp_codes post --window {w} --temp_alpha {a:g} {SHORT} {SEEDS}"
          for w in (2, 4, 8) for a in (0.00001, 0.0001, 0.001)}
# The frontier: each loss over its coefficients, at the full budget.
STUDY |= {f"frontier_{loss}_{a:g}": f"--temp_loss {loss} --temp_alpha {a:g} {SEEDS}"
          for loss, alphas in (("selective", (0.03, 0.06, 0.15)), ("autocorr", (0.03, 0.1)), ("variance", (0.03, 0.1)),
                               ("sqdiff", (0.00003, 0.0001))) for a in alphas}
STUDY = {name: flags.split() for name, flags in STUDY.items()}


# ------------------------------------------------------------------------------------------------------------
# Running it
# ------------------------------------------------------------------------------------------------------------


def done(name):
    """A run is done when it is scored, with the settings that the table and experiment.py's defaults give it now."""
    folder = experiment.RUNS / name
    if not (folder / "final_info.json").exists():
        return False
    saved, wanted = json.loads((folder / "config.json").read_text()), experiment.parse(["--out_dir", name, *STUDY[name]])
    return all(saved.get(k) == v for k, v in experiment.comparable(wanted).items())


def start(name, jobs):
    """Start one run as a process of its own; its stderr goes to a log beside the runs that git ignores."""
    folder = experiment.RUNS / name
    again = ["--resume"] if (folder / "checkpoint").exists() or list(folder.glob("seed_*/cfg.json")) else ["--overwrite"]
    command = [sys.executable, experiment.__file__, "--out_dir", name, *STUDY[name], *again]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))  # more threads than cores spin against each other
    log = open(experiment.RUNS / f"{name}.log.part", "w")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=os.environ | {"OMP_NUM_THREADS": threads})


def run_all(names, jobs):
    """Run `names`, `jobs` at a time; returns {name: exit code} of those that failed."""
    waiting, running, failed = list(names), {}, {}
    experiment.RUNS.mkdir(exist_ok=True)
    bar = tqdm(total=len(waiting), desc="study", unit="run")
    try:
        while waiting or running:
            # the first run harvests for all: the next one starts when that one trains
            harvested = bar.n or any((experiment.RUNS / name / "log.jsonl").exists() for name in running)
            while waiting and len(running) < (jobs if harvested else 1):
                name = waiting.pop(0)
                running[name] = start(name, jobs)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    bar.update(), bar.set_postfix_str(name)
                    log = experiment.RUNS / f"{name}.log.part"
                    if process.returncode:
                        failed[name] = (log.read_text().strip().splitlines() or [f"exit {process.returncode}"])[-1]
                    log.unlink()
            time.sleep(0.2)
    except KeyboardInterrupt:
        for process in running.values():  # they save what they have and can be resumed
            process.wait()
        raise
    return failed


def main(argv=None):
    """The command. Exit code 0, 1 if a run failed, 2 bad usage, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="runs of the table; all if none is named")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in STUDY]
    if unknown or args.jobs < 1:
        print(f"error: no such run: {', '.join(unknown)}" if unknown else "error: --jobs must be at least 1", file=sys.stderr)
        return 2
    names = args.names or list(STUDY)
    if args.list:
        for name in names:
            print(f"{name:24s} {'done' if done(name) else '':5s} {' '.join(STUDY[name])}")
        return 0
    try:
        failed = run_all([name for name in names if not done(name)], args.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
