"""Speed beside the machine's own matrix products; a check on a GPU; the known dictionary.

    python bench.py                        # CPU: a step and the harvest -> bench.json
    python bench.py --truth --seeds 11     # is a known dictionary found again? -> truth.json
    python bench.py --device cuda          # is a step on a GPU right, and how fast is it?
    python bench.py --device cpu --tiny    # the same on a CPU, in under a minute

The data are made up here; nothing is downloaded. Rates drift by tens of per cent on a shared
machine, ratios taken in interleaved rounds do not. The measure is the five matrix products that a
dense step cannot do without: encode, decode, the gradients of the codes and of both weights.
"""
import argparse
import contextlib
import functools
import json
import math
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

import experiment  # before torch, as it asks
import numpy as np
import torch
import transformers

import evaluate
import prepare
from experiment import Config

HERE = Path(__file__).parent
KINDS = ("l1", "topk", "batchtopk", "batchtopk + temporal")
ROW = 128  # tokens

# ------------------------------------------------------------------------------------------------
# 1. What is timed, and the clock
# ------------------------------------------------------------------------------------------------


def synthetic_acts(n_rows, seed, d_in=64, n_slow=60, n_fast=100, active=5.0):
    """Activations whose dictionary is known: x = codes @ atoms + mean + noise.

    Slow atoms stay on for 12 tokens on average, fast ones are drawn at each token; `active` of
    either kind are on. -> x (n_rows, 128, d_in) float32, atoms (n_slow + n_fast, d_in) unit rows,
    the slow first, codes (n_rows, 128, n_slow + n_fast). Atoms and mean do not depend on `seed`.
    """
    fixed = np.random.default_rng(1000)
    rng = np.random.default_rng(seed)
    atoms = fixed.standard_normal((n_slow + n_fast, d_in))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    mean = fixed.standard_normal(d_in)
    share = active / n_slow
    p_off = 1 / 12
    p_on = p_off * share / (1 - share)  # so that this share is on at any time
    codes = np.zeros((n_rows, ROW, n_slow + n_fast))
    on = rng.random((n_rows, n_slow)) < share
    strength = rng.uniform(0.7, 1.3, on.shape)
    for t in range(ROW):
        draw = rng.random(on.shape)
        starts = ~on & (draw < p_on)
        if t > 0:
            on = (on & (draw >= p_off)) | starts
        strength = np.where(starts, rng.uniform(0.7, 1.3, on.shape), strength)
        codes[:, t, :n_slow] = on * strength * rng.uniform(0.9, 1.1, on.shape)
    fast = rng.random((n_rows, ROW, n_fast)) < active / n_fast
    codes[..., n_slow:] = fast * rng.uniform(0.7, 1.3, fast.shape)
    x = codes @ atoms + mean + 0.05 * rng.standard_normal((n_rows, ROW, d_in))
    return x.astype(np.float32), atoms.astype(np.float32), codes


def batch_of(acts):
    """Activations (N, 128, d_in) as a training batch: scaled x (N*128, d_in) and their Stats."""
    x = torch.from_numpy(acts).flatten(0, 1)
    mean = x.mean(0)
    power = float(x.square().sum(1).mean())
    scale = math.sqrt(x.shape[1] / power)
    variance = (power - float(mean.square().sum())) * scale**2
    return x * scale, experiment.Stats(mean * scale, scale, variance)


class OurStep:
    """A Trainer on x's device; a call is a step that is not logged."""

    def __init__(self, kind, x, stats, d_sae, k, **settings):
        sparsity, _, temporal = kind.partition(" + ")
        if not temporal:
            settings["temp_alpha"] = 0.0
        cfg = Config(d_sae=d_sae, k=k, sparsity=sparsity, batch_size=len(x), **settings)
        self.trainer = experiment.Trainer(cfg, x.shape[1], stats, 0, x.device)
        token = torch.arange(len(x), dtype=torch.int32, device=x.device).view(-1, cfg.chunk_size)
        doc = token // cfg.chunk_size + 1  # each chunk its own document
        viewed = torch.arange(len(doc) // 2, device=x.device)
        view, view_doc = x[: len(x) // 2], doc[viewed]
        bank, bank_doc = x[: cfg.bank], doc.flatten()[: cfg.bank]
        self.batch = experiment.Batch(x, doc, len(x), viewed, view, view_doc, bank, bank_doc)

    def __call__(self):  # step 101: after the warm-up, and without a look at dead latents
        return self.trainer.step(self.batch, 101)


def five_products(x, d_sae, dtype):
    """step(): the five products of a dense step."""
    x = x.to(dtype)
    W = torch.randn(d_sae, x.shape[1], device=x.device).to(dtype)
    codes = torch.randn(len(x), d_sae, device=x.device).to(dtype)

    def step():
        for a, b in ((x, W.t()), (codes, W), (codes.t(), x), (x, W.t()), (x.t(), codes)):
            torch.mm(a, b)

    return step


def random_lm(n_layers, dtype, device="cpu"):
    """A Llama of SmolLM2-135M's shape with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=4096, num_hidden_layers=n_layers, hidden_size=576, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536)
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return lm.eval().requires_grad_(False).to(device)


def interleave(steps, device, rounds, n):
    """{name: step} -> {name: median seconds a step}, n of them back to back in each round."""
    wait = torch.get_device_module(device).synchronize
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            wait()
            began = time.perf_counter()
            for _ in range(n):
                step()
            wait()
            times[name].append((time.perf_counter() - began) / n)
    return {name: float(np.median(found)) for name, found in times.items()}


# ------------------------------------------------------------------------------------------------
# 2. On a CPU
# ------------------------------------------------------------------------------------------------


def bench_cpu(d_in=576, widths=(2304, 9216), batch=4096, k=32):
    """Print this CPU's figures. -> {name: {figure: value}}"""
    found = {"machine": {"machine": platform.machine(), "threads": torch.get_num_threads(),
                         "torch": torch.__version__, "d_in": d_in, "batch": batch, "k": k}}
    lm = random_lm(Config.layer + 2, prepare.pick_dtype("auto", "cpu"))
    tokens = torch.randint(4096, (experiment.FORWARD_ROWS["cpu"], ROW))
    harvest = functools.partial(experiment.residuals, lm, tokens, Config.layer)
    times = interleave({"harvest": harvest}, "cpu", 5, 2)
    found["harvest"] = {"tokens_per_s": round(tokens.numel() / times["harvest"])}
    x, stats = batch_of(synthetic_acts(batch // ROW, 0, d_in, d_in // 2, d_in, k / 2)[0])
    for d_sae in widths:
        steps = {"float32": five_products(x, d_sae, torch.float32),
                 "bfloat16": five_products(x, d_sae, torch.bfloat16)}
        steps |= {kind: OurStep(kind, x, stats, d_sae, k) for kind in KINDS}
        with experiment.malloc_keeps_memory():
            interleave(steps, "cpu", 1, 10)  # codes and thresholds settle
            times = interleave(steps, "cpu", 20, 1)
        for kind in KINDS:
            found[f"step, {kind}, {d_sae} latents"] = {
                "tokens_per_s": round(batch / times[kind]),
                "times_products_float32": round(times[kind] / times["float32"], 3),
                "times_products_bfloat16": round(times[kind] / times["bfloat16"], 3)}
        share = times["batchtopk + temporal"] / times["batchtopk"] - 1
        found[f"temporal term, {d_sae} latents"] = {"share_of_a_step": round(share, 4)}
        print(f"temporal term: {share:+.1%} of a step, {d_sae} latents")
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    return found


# ------------------------------------------------------------------------------------------------
# 3. The known dictionary
# ------------------------------------------------------------------------------------------------


def planted_run(acts, out, n_steps, flags):
    """Run experiment.py on the planted activations `acts`: {metric: value of each seed}."""
    command = ["--acts", acts, "--out_dir", out, "--d_sae", "256", "--k", "12", "--lr", "0.02",
               "--train_tokens", str(4096 * n_steps), "--dead_tokens", "40000",
               "--eval_rows", "64", "--reconstruction_rows", "0", *flags]
    with contextlib.redirect_stdout(sys.stderr):
        code = experiment.main(command)
    if code:
        sys.exit(code)  # experiment.py has said why
    (scores,) = prepare.read_json(Path(out) / "final_info.json").values()
    return scores["final_info_dict"]


def autocorrelation(codes):
    """codes (N, T, F) -> mean over the F of their correlation from one token to the next."""
    now = codes[:, :-1].reshape(-1, codes.shape[-1]).T
    then = codes[:, 1:].reshape(-1, codes.shape[-1]).T
    with np.errstate(invalid="ignore"):  # a latent that never fires has none
        return float(np.nanmean([np.corrcoef(*pair)[0, 1] for pair in zip(now, then)]))


def recovery(folder, held_out, atoms, n_slow):
    """How well a saved SAE finds the atoms: by the best cosine of a decoder row with each."""
    sae = evaluate.load_sae(folder)
    best = (torch.from_numpy(atoms) @ sae.W_dec.t()).max(1)
    found = sae.encode(torch.from_numpy(held_out))[..., best.indices[:n_slow]].numpy()
    return {"slow_recovery": float(best.values[:n_slow].mean()),
            "fast_recovery": float(best.values[n_slow:].mean()),
            "slow_autocorr": autocorrelation(found)}


def truth(n_seeds, flags, n_slow=60, n_steps=1000):
    """Weight 0 against the temporal loss with a lead as large as the number of slow atoms."""
    held_out, atoms, codes = synthetic_acts(192, 2)
    result = {"flags": flags, "seeds": n_seeds, "steps": n_steps,
              "true_slow_autocorr": autocorrelation(codes[..., :n_slow])}
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/acts.npy", synthetic_acts(3456, 1)[0])
        for arm, weight in (("control", ["--temp_alpha", "0"]), ("temporal", [])):
            out = f"{folder}/{arm}"
            options = ["--n_seeds", str(n_seeds), "--temporal_fraction", str(n_slow / 256)]
            scores = planted_run(f"{folder}/acts.npy", out, n_steps, options + flags + weight)
            rows = [recovery(f"{out}/seed_{seed}", held_out, atoms, n_slow)
                    for seed in range(n_seeds)]
            result[arm] = {name: [row[name] for row in rows] for name in rows[0]}
            for name in ("explained_variance", "l0", "frac_alive"):
                result[arm][name] = scores[name]
    for name, control in result["control"].items():
        gaps = np.subtract(result["temporal"][name], control)
        error = np.std(gaps, ddof=1) / math.sqrt(n_seeds) if n_seeds > 1 else math.nan
        print(f"{name}: control {np.mean(control):.4f}, "
              f"difference {gaps.mean():+.4f} ± {error:.4f}")
    return result


# ------------------------------------------------------------------------------------------------
# 4. The check of a device. Parts yield lines: name, ok (None: not judged), what was found
# ------------------------------------------------------------------------------------------------


def one_step(kind, x, stats, dense):
    """Gradients and new weights of a step that has dead latents and clips, on the CPU."""
    step = OurStep(kind, x, stats, 128, 8, temp_alpha=1.0, window=8, temporal_fraction=0.25,
                   init="xavier", matmul_dtype="float32", grad_clip=1e-3)
    trainer = step.trainer
    if dense:
        trainer.encode_batch = experiment.encode_dense
    trainer.dead = torch.arange(5, 128, 9, device=x.device)
    step()
    grads = [p.grad for p in trainer.parameters]
    return [tensor.detach().cpu() for tensor in grads + trainer.parameters]


def check_gradients(device):
    """Float32 gradients and new weights: the device's dense codes, the CPU's dense and sparse."""
    x, stats = batch_of(synthetic_acts(2, 0)[0])
    for kind in ("batchtopk", "batchtopk + temporal", "topk + temporal", "l1"):
        there = one_step(kind, x.to(device), stats, dense=True)
        here = one_step(kind, x, stats, dense=True) + one_step(kind, x, stats, dense=False)
        error = max(float((ours - true).norm() / true.norm())
                    for ours, true in zip(there + there, here, strict=True))
        yield f"gradients, {kind}", error < 1e-4, f"off by {error:.0e}"


def check_hook(device):
    """The hook on the device against hidden_states in float32 on the CPU."""
    tokens = torch.randint(4096, (3, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        lm = random_lm(4, torch.float32)
        true = lm(tokens, output_hidden_states=True).hidden_states[3]  # after block 2
    found = experiment.residuals(random_lm(4, torch.float32, device), tokens, 2).cpu()
    error = float((found - true).norm() / true.norm())
    yield "hook", error < 1e-4, f"off by {error:.0e}"


def host_waits(step):
    """How often the host waits for the device in step(): the waits that PyTorch knows of, and
    one more if step() comes back only when a long kernel that stands before it has ended."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    known = [w for w in seen if "synchronizing CUDA operation" in str(w.message)]
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(400_000_000)  # cycles
    step()
    returned = time.perf_counter() - began
    torch.cuda.synchronize()
    return len(known) + int(returned > 0.7 * (time.perf_counter() - began))


def check_speed(device, judged, d_in, d_sae, batch, k):
    """Unlogged steps: ms beside the five products, memory, waits, temporal term; then the feed."""
    on_gpu = device != "cpu"
    acts = synthetic_acts(batch // ROW, 0, d_in, d_in // 2, d_in, k / 2)[0]
    x, stats = batch_of(acts)
    x = x.to(device)
    times = interleave({"products": five_products(x, d_sae, torch.bfloat16)}, device, 5, 4)
    for kind in KINDS:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = OurStep(kind, x, stats, d_sae, k)
        times |= interleave({kind: step}, device, 5, 4)
        ratio = times[kind] / times["products"]
        found = f"{1e3 * times[kind]:.2f} ms, {ratio:.2f} x the five products"
        if on_gpu:
            found += f", at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
            waits = host_waits(step)
            yield f"no wait, {kind}, {d_in} x {d_sae}", waits == 0, f"{waits} waits"
        yield f"step, {kind}, {d_in} x {d_sae}", None, found
        del step  # its memory does not count for the next one
    share = times["batchtopk + temporal"] / times["batchtopk"] - 1
    found = f"{share:+.1%} of a step"
    yield f"temporal term <= 10 %, {d_in} x {d_sae}", share <= 0.1 if judged else None, found
    share = train_seconds(device, acts, d_sae, k) / times["batchtopk + temporal"] - 1
    found = f"{share:+.1%} of a bare step"
    yield f"feed <= 15 %, {d_in} x {d_sae}", share <= 0.15 if judged else None, found


def train_seconds(device, acts, d_sae, k):
    """Seconds a step of train(), its batches from a Harvest of 16 times the rows of a batch."""
    batch = len(acts) * ROW
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/acts.npy", np.tile(acts, (16, 1, 1)))
        cfg = Config(acts=f"{folder}/acts.npy", out_dir=f"{folder}/run", d_sae=d_sae, k=k,
                     batch_size=batch, train_tokens=101 * batch, device=device)
        cfg.run_dir.mkdir()
        harvest = experiment.Harvest(cfg, experiment.load_inputs(cfg))
        experiment.train(cfg, 0, harvest, prepare.Stop())
        last = (cfg.run_dir / "log.jsonl").read_text().splitlines()[-1]
    return batch / json.loads(last)["tokens_per_s"]


def check_device(device, tiny):
    """Run all parts and print their lines. -> exit code, 1 if one is FAIL"""
    sizes = [(768, 24576, 4096, 32), (2304, 65536, 4096, 32)]  # d_in, d_sae, batch, k
    if tiny:
        sizes = [(32, 256, 512, 8), (48, 512, 512, 8)]
    judged = device != "cpu" and not tiny
    parts = [check_gradients(device), check_hook(device)]
    parts += [check_speed(device, judged, *size) for size in sizes]
    words = {True: "PASS", False: "FAIL", None: "not judged"}
    seen = []
    for part in parts:
        try:
            for name, ok, found in part:
                print(f"{words[ok]:10s} {name}: {found}", flush=True)
                seen.append(ok)
        except Exception as error:  # the other parts are still worth having
            print(f"FAIL       {part.__name__}: {type(error).__name__}: {error}", flush=True)
            seen.append(False)
    card = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}")
    return int(False in seen)


# ------------------------------------------------------------------------------------------------
# 5. The command
# ------------------------------------------------------------------------------------------------


def main(argv=None):
    """The command. -> exit code: 0, 1 a check failed, 2 the user's mistake"""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="", help="cuda (or cpu --tiny): the check of a device")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, as always on a CPU")
    parser.add_argument("--truth", action="store_true", help="takes flags of experiment.py, too")
    parser.add_argument("--seeds", type=int, default=3, help="of --truth [3]")
    parser.add_argument("--out", default="", help="where the figures go")
    args, flags = parser.parse_known_args(argv)
    if flags and not args.truth:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    device = prepare.pick_device(args.device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: this torch build sees no CUDA device")
    if args.truth:
        found = truth(args.seeds, ["--device", args.device or "auto", *flags])
        prepare.write_json(args.out or HERE / "truth.json", found)
    elif device:
        return check_device(device, args.tiny or device == "cpu")
    else:
        prepare.write_json(args.out or HERE / "bench.json", bench_cpu())
    return 0


if __name__ == "__main__":
    sys.exit(main())
