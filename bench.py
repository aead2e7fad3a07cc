"""Speed: harvest, training step, end to end, each as a ratio to what the machine itself can do in the same minute.

    python bench.py                       # the embedded model; ~8 minutes on 2 cores
    python bench.py --acts acts.npy       # training steps only, on your own (N,d_in) or (N,T,d_in) float32 activations
    python bench.py --truth --temp_alpha 0.12     # not speed: is a dictionary that is known found again? (truth.json)

Absolute rates drift by tens of per cent on a shared machine; ratios taken in interleaved rounds do not. The dense
roofline is the five matrix products that a dense SAE step cannot do without (encode, decode, and the gradients of the
codes and of both weights), outputs preallocated, in float32 and in bfloat16. Whole runs of experiment.py, each a process
of its own with a new harvest, show what it comes to end to end, and that memory does not grow with the tokens. Results: a
table, and bench.json.
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import experiment
from experiment import SAE, Config, Trainer

BATCH, K = 4096, 32
KINDS = ("l1", "topk", "batchtopk", "batchtopk+temporal")


# ------------------------------------------------------------------------------------------------------------
# What is timed
# ------------------------------------------------------------------------------------------------------------


def roofline(d_in, d_sae, dtype, device):
    """The five dense products of a step: returns step(acts)."""
    make = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    W_enc, W_dec, acts, error = make(d_in, d_sae), make(d_sae, d_in), make(BATCH, d_sae), make(BATCH, d_in)
    shapes = (BATCH, d_sae), (BATCH, d_in), (d_sae, d_in), (d_in, d_sae)
    codes, x_hat, d_dec, d_enc = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)

    def step(x):
        x = x.to(dtype)
        torch.mm(x, W_enc, out=codes), torch.mm(acts, W_dec, out=x_hat)
        torch.mm(acts.t(), error, out=d_dec), torch.mm(error, W_dec.t(), out=codes), torch.mm(x.t(), acts, out=d_enc)

    return step


def make_step(d_in, d_sae, k, kind, matmul_dtype="auto", device="cpu"):
    """A training step as experiment.py does it, AuxK and logging included.

    kind: l1, topk, batchtopk or batchtopk+temporal. Returns step(acts) -> loss (0-dim tensor); acts (batch, d_in)
    float32 on `device`, consecutive rows being consecutive tokens. Scale and mean are taken from the first batch."""
    sparsity, _, temporal = kind.partition("+")
    if kind not in KINDS:
        raise ValueError(f"kind {kind} is not one of {', '.join(KINDS)}")
    default = Config()
    cfg = Config(d_sae=d_sae, k=min(k, d_sae), sparsity=sparsity, matmul_dtype=matmul_dtype, device=device,
                 temp_alpha=default.temp_alpha if temporal else 0.0)
    state = {}
    experiment.keep_freed_memory(True)

    def step(acts):
        if not state:
            mean, power = acts.double().mean(0), acts.double().square().sum(1).mean()
            scale = float((d_in / power).sqrt())
            sae = SAE(d_in, d_sae, cfg.k, sparsity)
            sae.initialise(cfg.init, (mean * scale).float().cpu(), torch.Generator().manual_seed(0))
            variance = float(power - mean.square().sum()) * scale**2
            state.update(scale=scale, trainer=Trainer(cfg, sae, variance, 0.1, device), n=cfg.steps // 2)
        mask = torch.ones(len(acts) // cfg.chunk_size, cfg.chunk_size, dtype=torch.int32, device=acts.device)
        n = state["n"] = state["n"] + 1  # from the middle of a run on: the temporal loss is at its full weight
        return state["trainer"].step(acts * state["scale"], mask, len(acts), n, log=n % cfg.log_every == 0)["loss"]

    return step


def peak_gb():
    """Peak resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def interleave(contenders, batches, rounds):
    """{name: step} -> {name: [seconds a step]}: rounds of two untimed and three timed steps, the order rotating."""
    times, names, at = {name: [] for name in contenders}, list(contenders), 0
    for r in range(rounds):
        for name in names[r % len(names):] + names[: r % len(names)]:
            for i in range(5):
                x = batches[at % len(batches)]
                at += 1
                began = time.perf_counter()
                contenders[name](x)
                if x.is_cuda:
                    torch.cuda.synchronize()
                if i >= 2:
                    times[name].append(time.perf_counter() - began)
    return times


# ------------------------------------------------------------------------------------------------------------
# The truth test: activations whose dictionary is known
# ------------------------------------------------------------------------------------------------------------

N_SLOW, N_FAST, D_TRUE = 60, 100, 64


def synthetic_acts(n_rows, seed, T=128, lasts=12.0, active=5.0, noise=0.05):
    """x = c @ atoms + mean + noise: slow atoms stay on for `lasts` tokens on average, fast ones are drawn at each token.

    On average `active` of either kind are on. Returns x (n_rows,T,64) float32, atoms (160,64) unit rows, the slow first,
    codes c (n_rows,T,160). The atoms and the mean do not depend on `seed`."""
    fixed, g = np.random.default_rng(1000), np.random.default_rng(seed)
    atoms = fixed.standard_normal((N_SLOW + N_FAST, D_TRUE))
    atoms, mean = atoms / np.linalg.norm(atoms, axis=1, keepdims=True), fixed.standard_normal(D_TRUE)
    p_off, p = 1 / lasts, active / N_SLOW
    p_on = p_off * p / (1 - p)  # so that the share p is on at any time
    size = lambda *shape: g.uniform(0.7, 1.3, shape)
    codes = np.zeros((n_rows, T, N_SLOW + N_FAST))
    on, strength = g.random((n_rows, N_SLOW)) < p, size(n_rows, N_SLOW)
    for t in range(T):
        u = g.random((n_rows, N_SLOW))
        starts = ~on & (u < p_on)
        on = (on & (u >= p_off)) | starts if t else on
        strength = np.where(starts, size(n_rows, N_SLOW), strength)
        codes[:, t, :N_SLOW] = on * strength * g.uniform(0.9, 1.1, on.shape)
    codes[..., N_SLOW:] = (g.random((n_rows, T, N_FAST)) < active / N_FAST) * size(n_rows, T, N_FAST)
    x = codes @ atoms + mean + noise * g.standard_normal((n_rows, T, D_TRUE))
    return x.astype(np.float32), atoms.astype(np.float32), codes


def truth(flags, seeds, out, n_rows=3456, steps=1000):
    """Train on synthetic_acts with `flags` and without a temporal loss, `seeds` seeds each, through experiment.main.

    Prints, and writes to `out`, mean and standard error of: recovery (mean over true atoms of the best decoder cosine)
    of slow and of fast atoms, the autocorrelation of the latents that match slow atoms (and its true value)."""
    held_out, atoms, codes = synthetic_acts(192, seed=2)
    slow = codes[..., :N_SLOW]
    corr = lambda z: np.mean([np.corrcoef(z[:, :-1, i].ravel(), z[:, 1:, i].ravel())[0, 1] for i in range(z.shape[-1])])
    result = {"flags": flags, "seeds": seeds, "steps": steps, "true_slow_autocorr": corr(slow)}
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/acts.npy", synthetic_acts(n_rows, seed=1)[0])
        for arm, extra in (("control", [*flags, "--temp_alpha", "0"]), ("temporal", flags)):
            code = experiment.main(["--out_dir", f"{folder}/{arm}", "--acts", f"{folder}/acts.npy", "--d_sae", "256", "--k", "12",
                                    "--train_tokens", str(steps * BATCH), "--lr", "0.02", "--dead_tokens", "40000", "--eval_rows", "64",
                                    "--reconstruction_rows", "1", "--n_seeds", str(seeds), *extra])
            if code:
                return code
            rows = {"slow_recovery": [], "fast_recovery": [], "slow_autocorr": []}
            for seed in range(seeds):
                sae = experiment.load_sae(f"{folder}/{arm}/seed_{seed}")
                best = (torch.from_numpy(atoms) @ sae.W_dec.t()).max(1)
                rows["slow_recovery"].append(float(best.values[:N_SLOW].mean()))
                rows["fast_recovery"].append(float(best.values[N_SLOW:].mean()))
                found = sae.encode(torch.from_numpy(held_out))[0][..., best.indices[:N_SLOW]].numpy()
                rows["slow_autocorr"].append(float(corr(found)))
            info = next(iter(json.loads(Path(f"{folder}/{arm}/final_info.json").read_text()).values()))["final_info_dict"]
            result[arm] = rows | {name: info[name] for name in ("explained_variance", "l0", "frac_alive")}
    print(f"---\ntrue slow autocorrelation: {result['true_slow_autocorr']:.4f}")
    for name in result["control"]:
        a, b = np.array(result["control"][name]), np.array(result["temporal"][name])
        error = np.std(b - a, ddof=1) / len(a) ** 0.5 if len(a) > 1 else float("nan")
        print(f"{name}: control {a.mean():.4f}  temporal {b.mean():.4f}  difference {np.mean(b - a):+.4f} ± {error:.4f}")
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


# ------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------


def bench_steps(batches, widths, rounds, device):
    """Rows for every kind at every width: tokens/s and the ratio to both rooflines of that width."""
    rows, d_in = [], batches[0].shape[1]
    for d_sae in widths:
        contenders = {f"roofline {n}": roofline(d_in, d_sae, getattr(torch, n), device) for n in ("float32", "bfloat16")}
        contenders |= {kind: make_step(d_in, d_sae, K, kind, device=device) for kind in KINDS}
        contenders |= {f"{kind} float32": make_step(d_in, d_sae, K, kind, "float32", device) for kind in ("l1", "batchtopk")}
        for _ in range(12):  # past initialisation: codes, threshold and Adam's state are those of a running training
            for name, step in contenders.items():
                step(batches[_ % len(batches)]) if "roofline" not in name else None
        median = {name: float(np.median(t)) for name, t in interleave(contenders, batches, rounds).items()}
        for name, seconds in median.items():
            rows.append({"part": f"step {name}", "d_sae": d_sae, "tokens_per_s": BATCH / seconds,
                         "ratio_float32": median["roofline float32"] / seconds,
                         "ratio_bfloat16": median["roofline bfloat16"] / seconds, "peak_gb": peak_gb()})
            if name == "batchtopk+temporal":
                rows[-1]["temporal_overhead"] = seconds / median["batchtopk"] - 1
    return rows


def bench_harvest(rounds):
    """Our harvest against the bare forward of a model cut off above the hooked block; and activations to train on."""
    cfg = Config(device="cpu")
    model, tokenizer = experiment.load_lm(cfg)
    tokens = torch.from_numpy(experiment.load_rows(cfg, tokenizer, "eval").tokens)
    blocks, base, kept = experiment.decoder_blocks(model), model.base_model, []

    def bare(rows):
        base.layers, base.config.num_hidden_layers = blocks[: cfg.layer + 1], cfg.layer + 1
        with torch.inference_mode():
            base(rows, use_cache=False)
        base.layers, base.config.num_hidden_layers = blocks, len(blocks)

    def ours(rows):
        kept.append(experiment.residuals(model, rows, cfg.layer))

    times = {"bare": [], "ours": []}
    for r in range(4 * rounds):
        rows = tokens[8 * r % 400 : 8 * r % 400 + 8]
        for name, forward in (("bare", bare), ("ours", ours)) if r % 2 else (("ours", ours), ("bare", bare)):
            began = time.perf_counter()
            forward(rows)
            times[name].append(time.perf_counter() - began)
    median = {name: float(np.median(t[2:])) for name, t in times.items()}
    row = {"part": "harvest", "tokens_per_s": tokens[:8].numel() / median["ours"],
           "bare_tokens_per_s": tokens[:8].numel() / median["bare"], "ratio_bare": median["bare"] / median["ours"], "peak_gb": peak_gb()}
    x = torch.cat([experiment.residuals(model, tokens[i : i + 8], cfg.layer) for i in range(0, len(tokens), 8)])
    return row, x[:, 1:].reshape(-1, x.shape[-1]).float()  # position 0 is the BOS


def bench_runs(sizes):
    """Whole runs (harvest, three passes of training, score) for each (harvest_tokens, d_sae): trained tokens/s, peak memory.

    To be called first: a child's peak counts from what this process held when it was started."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (cache := Path(folder) / "cache").mkdir()  # has the embedded model and text, but no harvest
        experiment.lm_path(cfg := Config()), experiment.embedded_file(cfg, cfg.dataset)
        for made in (*experiment.cache_root(cfg).glob("embedded-*"), Path(experiment.lm_path(cfg))):
            (cache / made.name).symlink_to(made)
        for tokens, d_sae in sizes:
            flags = {"out_dir": f"{folder}/{tokens}_{d_sae}", "cache_dir": cache, "harvest_tokens": tokens,
                     "train_tokens": 3 * tokens, "d_sae": d_sae, "eval_rows": 80, "reconstruction_rows": 16}
            command = [sys.executable, experiment.__file__, *(str(word) for f, v in flags.items() for word in (f"--{f}", v))]
            began = time.perf_counter()
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)  # the peak of this child alone
            if status:
                raise RuntimeError(f"{' '.join(command)} failed")
            seconds = time.perf_counter() - began
            rows.append({"part": f"run, {tokens:,} x 3", "d_sae": d_sae, "tokens_per_s": 3 * tokens / seconds, "seconds": seconds,
                         "peak_gb": usage.ru_maxrss / 1e6})
    return rows


def show(rows):
    """The aligned table."""
    print(f"{'part':26s} {'d_sae':>6s} {'tokens/s':>9s} {'x fp32 roof':>11s} {'x bf16 roof':>11s} {'peak GB':>8s}")
    for r in rows:
        number = lambda key, form: format(r[key], form) if key in r else ""
        print(f"{r['part']:26s} {number('d_sae', 'd'):>6s} {number('tokens_per_s', ',.0f'):>9s} {number('ratio_float32', '.2f'):>11s} "
              f"{number('ratio_bfloat16', '.2f'):>11s} {r['peak_gb']:8.2f}"
              + (f"   {r['ratio_bare']:.2f} of the bare forward" if "ratio_bare" in r else "")
              + (f"   temporal loss adds {r['temporal_overhead']:+.1%}" if "temporal_overhead" in r else ""))


def main(argv=None):
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--acts", help="activations to train on; leaves the harvest out")
    parser.add_argument("--d_sae", type=int, nargs="+", default=[2304, 4608, 9216], help="widths")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--device", default="cpu", help="any torch device")
    parser.add_argument("--out", default="", help="where the numbers go (bench.json, or truth.json)")
    parser.add_argument("--truth", action="store_true", help="the truth test instead; further flags are experiment.py's")
    parser.add_argument("--seeds", type=int, default=3, help="of the truth test")
    args, flags = parser.parse_known_args(argv)
    if args.truth:
        if args.acts or args.d_sae != parser.get_default("d_sae"):
            parser.error("--truth makes activations of its own and has 256 latents: no --acts, no --d_sae")
        return truth([*flags, "--device", args.device], args.seeds, args.out or "truth.json")
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    rows = []
    if args.acts:
        acts = np.load(args.acts, mmap_mode="r", allow_pickle=False)
        acts = torch.from_numpy(np.array(acts.reshape(-1, acts.shape[-1])[: 64 * BATCH], dtype=np.float32))
    else:
        rows += bench_runs([(98_304, 2304), (196_608, 2304), (983_040, 2304), (98_304, 36_864)])
        row, acts = bench_harvest(args.rounds)
        rows.append(row)
    batches = [acts[i : i + BATCH].to(args.device) for i in range(0, len(acts) - BATCH + 1, BATCH)]
    if not batches:
        print(f"error: --acts needs at least {BATCH} tokens", file=sys.stderr)
        return 2
    rows += bench_steps(batches, args.d_sae, args.rounds, args.device)
    show(rows)
    Path(args.out or "bench.json").write_text(json.dumps({"machine": platform.machine(), "threads": torch.get_num_threads(),
                                          "torch": torch.__version__, "batch": BATCH, "k": K, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
