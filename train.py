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
import os
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

import experiment

# ------------------------------------------------------------------------------------------------------------
# The table: name -> flags
# ------------------------------------------------------------------------------------------------------------

THREE = "--n_seeds 3"
# The ladder of the seed experiment, each rung on top of the one before; run_5 takes run_4's LayerNorm out again.
LADDER = {
    "run_0": "--temp_alpha 0",
    "run_1": "--temp_loss sqdiff --temp_alpha 0.1 --grad_clip 0 --schedule constant --warmup_steps 0",
    "run_2": "--temp_loss sqdiff --temp_alpha 0.1 --schedule constant --warmup_steps 0 --init xavier",
    "run_3": "--temp_loss sqdiff --temp_alpha 0.01 --init xavier",
    "run_4": "--temp_loss sqdiff --temp_alpha 0.01 --init xavier --layernorm",
    "run_5": "--temp_loss sqdiff --temp_alpha 0.01 --init xavier --nonlinearity gelu",
    "run_6": "",  # experiment.py's defaults: our method
}
STUDY = {name: f"{flags} {THREE}".split() for name, flags in LADDER.items()}


# ------------------------------------------------------------------------------------------------------------
# Running it
# ------------------------------------------------------------------------------------------------------------


def done(name):
    """A run is done when it is scored."""
    return (experiment.RUNS / name / "final_info.json").exists()


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
            # the first run harvests for all; the others would only wait for its lock
            while waiting and len(running) < (jobs if bar.n else 1):
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
