"""Speed beside the machine's own matrix products; the acceptance on a GPU; the truth test.

    python bench.py                        # CPU: step and harvest -> bench.json
    python bench.py --truth --seeds 11     # is a known dictionary found again? -> truth.json
    python bench.py --device cuda          # acceptance and timing on a GPU, under 8 minutes
    python bench.py --device cpu --tiny    # the same on a CPU, in about a minute

The data are made up here; nothing is downloaded. Rates drift by tens of per cent on a shared
machine, ratios taken in interleaved rounds do not. The measure is the five matrix products that a
dense step cannot do without: encode, decode, the gradients of the codes and of both weights.
"""
import argparse
import contextlib
import functools
import gc
import json
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import experiment  # before torch, as it asks
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

import evaluate
import prepare
from experiment import Config

HERE = Path(__file__).parent
KINDS = ("l1", "topk", "batchtopk", "batchtopk + temporal")
ROW = 128  # tokens

# ------------------------------------------------------------------------------------------------
# 1. What is timed
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


def batch_of(x):
    """Activations (N, 128, d_in) as a training batch: scaled x (N*128, d_in) and their Stats."""
    x = torch.from_numpy(x).flatten(0, 1)
    mean = x.mean(0)
    power = float(x.square().sum(1).mean())
    scale = math.sqrt(x.shape[1] / power)
    variance = (power - float(mean.square().sum())) * scale**2
    return x * scale, experiment.Stats(mean * scale, scale, variance)


class OurStep:
    """A Trainer on x's device; a call is a step in mid-run, not logged, no look at dead latents."""

    def __init__(self, kind, x, stats, d_sae, k, **settings):
        sparsity, _, temporal = kind.partition(" + ")
        if not temporal:
            settings["temp_alpha"] = 0.0
        cfg = Config(d_sae=d_sae, k=k, sparsity=sparsity, batch_size=len(x), **settings)
        self.trainer = experiment.Trainer(cfg, x.shape[1], stats, 0, x.device)
        n_chunks = len(x) // cfg.chunk_size
        doc = torch.arange(1, n_chunks + 1, dtype=torch.int32, device=x.device)
        self.doc = doc[:, None].expand(n_chunks, cfg.chunk_size)  # each chunk its own document
        self.step = cfg.steps // 2 // experiment.DEAD_EVERY * experiment.DEAD_EVERY + 1
        self.x = x

    def __call__(self):
        return self.trainer.step(self.x, self.doc, len(self.x), self.step)


def five_products(x, d_sae, dtype):
    """step(): the five products of a dense step, with preallocated results."""
    x = x.to(dtype)
    W = torch.randn(d_sae, x.shape[1], device=x.device).to(dtype)
    codes = torch.randn(len(x), d_sae, device=x.device).to(dtype)
    factors = [(x, W.t()), (codes, W), (codes.t(), x), (x, W.t()), (x.t(), codes)]
    results = [a.new_empty(len(a), b.shape[1]) for a, b in factors]

    def step():
        for (a, b), result in zip(factors, results):
            torch.mm(a, b, out=result)

    return step


def plain_step(x, d_sae, k, decode_sparsely):
    """step(): what other trainers do, in plain PyTorch under autocast.

    BatchTopK by one top-k of the batch and a dense decoder, or the top k of each token and
    embedding_bag. Both with fused Adam, clipping and decoder rows of unit norm.
    """
    W_dec = F.normalize(torch.randn(d_sae, x.shape[1], device=x.device), dim=1).requires_grad_()
    W_enc = W_dec.detach().clone().requires_grad_()
    b_enc = torch.zeros(d_sae, device=x.device, requires_grad=True)
    b_dec = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
    parameters = [W_enc, W_dec, b_enc, b_dec]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def reconstruct():
        acts = F.linear(x - b_dec, W_enc, b_enc).relu()
        if decode_sparsely:
            top = acts.topk(k, dim=-1, sorted=False)
            weights = top.values.float()
            return F.embedding_bag(top.indices, W_dec, mode="sum", per_sample_weights=weights)
        flat = acts.flatten()
        top = flat.topk(k * len(x), sorted=False)
        return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(acts) @ W_dec

    def step():
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = (reconstruct() + b_dec - x).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            W_dec.copy_(F.normalize(W_dec, dim=1))

    return step


LM_SIZES = {
    "gpt2": {"hidden_size": 768, "num_attention_heads": 12},
    "gemma2": {"hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4,
               "head_dim": 256, "intermediate_size": 9216},
    "llama": {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
              "intermediate_size": 1536},  # as SmolLM2-135M
    "tiny": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "intermediate_size": 128}}


def random_lm(family, size, n_layers, dtype, device):
    """A causal LM with random weights; size is a key of LM_SIZES."""
    config = transformers.AutoConfig.for_model(
        family, vocab_size=4096, num_hidden_layers=n_layers, **LM_SIZES[size])
    torch.manual_seed(0)
    with torch.device(device):
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return lm.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# 2. The clock
# ------------------------------------------------------------------------------------------------


def wait_for(device):
    """Return when a CUDA device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleave(steps, device, rounds, n):
    """{name: step} -> {name: median seconds a step}, n of them back to back in each round."""
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            wait_for(device)
            began = time.perf_counter()
            for _ in range(n):
                step()
            wait_for(device)
            times[name].append((time.perf_counter() - began) / n)
    return {name: statistics.median(found) for name, found in times.items()}


def host_waits(step):
    """How often the host waits for the device in step(): the waits that PyTorch knows of, and
    one more if step() comes back only when a long kernel that stands before it has ended."""
    wait_for("cuda")
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    known = [w for w in seen if "synchronizing CUDA operation" in str(w.message)]
    wait_for("cuda")
    began = time.perf_counter()
    torch.cuda._sleep(400_000_000)  # cycles
    step()
    returned = time.perf_counter() - began
    wait_for("cuda")
    return len(known) + int(returned > 0.7 * (time.perf_counter() - began))


def harvest_rates(family, size, layer, n_rows, device):
    """Tokens/s of the bare truncated forward, of our hook, and of the hook into a file."""
    dtype = prepare.pick_dtype("auto", device)
    bare = random_lm(family, size, layer + 1, dtype, device).base_model
    lm = random_lm(family, size, layer + 2, dtype, device)
    tokens = torch.randint(4096, (n_rows, ROW))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "shard.safetensors"
        steps = {
            "bare": functools.partial(bare, tokens.to(device), use_cache=False),
            "hook": functools.partial(experiment.residuals, lm, tokens, layer),
            "file": functools.partial(experiment.write_shard, lm, tokens, layer, path, n_rows)}
        times = interleave(steps, device, 5, 2)
    return {name: round(tokens.numel() / t) for name, t in times.items()}


# ------------------------------------------------------------------------------------------------
# 3. On a CPU
# ------------------------------------------------------------------------------------------------


def bench_cpu(d_in=576, widths=(2304, 9216), batch=4096, k=32):
    """This CPU's figures: {name: {figure: value}}."""
    n_rows = experiment.FORWARD_ROWS["cpu"]
    rates = harvest_rates("llama", "llama", Config.layer, n_rows, "cpu")
    rates["of_bare"] = round(rates["hook"] / rates["bare"], 3)
    found = {"harvest, tokens/s": rates}
    x, stats = batch_of(synthetic_acts(batch // ROW, 0, d_in, d_in // 2, d_in, k / 2)[0])
    for d_sae in widths:
        steps = {"float32": five_products(x, d_sae, torch.float32),
                 "bfloat16": five_products(x, d_sae, torch.bfloat16)}
        for kind in KINDS:
            steps[kind] = OurStep(kind, x, stats, d_sae, k)
        with experiment.malloc_keeps_memory():
            interleave(steps, "cpu", 1, 10)  # codes and thresholds settle
            times = interleave(steps, "cpu", 5, 2)
        for kind in KINDS:
            found[f"step, {kind}, {d_sae} latents"] = {
                "tokens_per_s": round(batch / times[kind]),
                "times_products_float32": round(times[kind] / times["float32"], 3),
                "times_products_bfloat16": round(times[kind] / times["bfloat16"], 3)}
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "d_in": d_in, "batch": batch, "k": k}
    return {"machine": machine, **found}


# ------------------------------------------------------------------------------------------------
# 4. The truth test
# ------------------------------------------------------------------------------------------------


def planted_run(acts, out, n_steps, flags):
    """Run experiment.py on the planted activations `acts`: {metric: value of each seed}."""
    command = ["--acts", acts, "--out_dir", out, "--d_sae", "256", "--k", "12", "--lr", "0.02",
               "--train_tokens", str(4096 * n_steps), "--dead_tokens", "40000",
               "--eval_rows", "64", "--reconstruction_rows", "0", *flags]
    with contextlib.redirect_stdout(sys.stderr):
        code = experiment.main(command)
    if code:
        raise RuntimeError(f"experiment.py {' '.join(command)}: exit code {code}")
    (block,) = prepare.read_json(Path(out) / "final_info.json").values()
    return block["final_info_dict"]


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


def truth(seeds, flags, n_slow=60, n_steps=1000):
    """Weight 0 against the temporal loss with a lead as large as the number of slow atoms."""
    held_out, atoms, codes = synthetic_acts(192, 2)
    result = {"flags": flags, "seeds": seeds, "steps": n_steps,
              "true_slow_autocorr": autocorrelation(codes[..., :n_slow])}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        np.save(f"{folder}/acts.npy", synthetic_acts(3456, 1)[0])
        for arm, weight in (("control", ["--temp_alpha", "0"]), ("temporal", [])):
            out = f"{folder}/{arm}"
            options = ["--n_seeds", str(seeds), "--temporal_fraction", str(n_slow / 256)]
            scores = planted_run(f"{folder}/acts.npy", out, n_steps, options + flags + weight)
            rows = [recovery(f"{out}/seed_{seed}", held_out, atoms, n_slow)
                    for seed in range(seeds)]
            result[arm] = {name: [row[name] for row in rows] for name in rows[0]}
            for name in ("explained_variance", "l0", "frac_alive"):
                result[arm][name] = scores[name]
    for name, control in result["control"].items():
        gaps = np.subtract(result["temporal"][name], control)
        error = np.std(gaps, ddof=1) / math.sqrt(seeds) if seeds > 1 else math.nan
        means = f"control {np.mean(control):.4f}, difference {gaps.mean():+.4f}"
        print(f"{name}: {means} ± {error:.4f}")
    return result


# ------------------------------------------------------------------------------------------------
# 5. The acceptance on a device
# ------------------------------------------------------------------------------------------------


class Acceptance:
    """Each part yields its verdicts: name, ok (None: cannot be judged here), what was found."""

    def __init__(self, device, tiny):
        self.device = device
        self.tiny = tiny
        self.on_gpu = device.startswith("cuda")
        self.table = []
        self.shapes = [(768, 24576), (2304, 16384), (2304, 65536)]
        self.batch = 4096
        self.k = 32
        if tiny:
            self.shapes = [(32, 256), (48, 512)]
            self.batch = 512
            self.k = 8

    def run(self):
        """Run all parts; print the table and the verdicts. -> exit code, 1 if one is FAIL."""
        began = time.perf_counter()
        verdicts = []
        for part in (self.gradients, self.nan_step, self.same_bits, self.hooks, self.runs,
                     self.steps, self.feed, self.harvest):
            print(f"{part.__name__}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
            try:
                verdicts += part()
            except Exception as error:  # the other parts are still worth having
                verdicts.append((part.__name__, False, f"{type(error).__name__}: {error}"))
        print("\n".join(self.table))
        words = {True: "PASS", False: "FAIL", None: "not judged"}
        for name, ok, found in verdicts:
            print(f"{words[ok]:10s} {name}: {found}")
        name = torch.cuda.get_device_name() if self.on_gpu else platform.machine()
        print(f"{name}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s")
        return int(any(ok is False for _, ok, _ in verdicts))

    def timed(self, ok):
        """A verdict on times, which count at full size on a GPU."""
        return ok if self.on_gpu and not self.tiny else None

    def gradients(self):
        """Float32 gradients and updated weights: the device's dense codes, the CPU's both kinds."""
        kinds = (*KINDS, "l1 + temporal", "topk + temporal")
        cases = [(kind, "window_infonce") for kind in kinds]
        for loss in (*experiment.PAIR_LOSSES, "window_mean", "infonce", "infonce_dot"):
            cases += [("l1 + temporal", loss), ("batchtopk + temporal", loss)]
        x, stats = batch_of(synthetic_acts(2, 0)[0])
        for kind, loss in cases:
            there, *on_cpu = [
                self.one_step(kind, loss, x.to(device), stats, dense)
                for device, dense in ((self.device, True), ("cpu", True), ("cpu", False))]
            errors = [float((ours - true).norm() / true.norm().clamp(min=1e-12))
                      for cpu in on_cpu for ours, true in zip(there, cpu, strict=True)]
            yield f"gradients, {kind}, {loss}", max(errors) < 1e-4, f"off by {max(errors):.0e}"

    def one_step(self, kind, loss, x, stats, dense):
        """Gradients and new weights of a step that has dead latents and clips, on the CPU."""
        step = OurStep(kind, x, stats, 128, 8, temp_loss=loss, temp_alpha=1.0, window=8,
                       temporal_fraction=0.25, init="xavier", matmul_dtype="float32",
                       grad_clip=1e-3)
        trainer = step.trainer
        if dense:
            trainer.encode_batch = experiment.encode_dense
        trainer.dead = torch.arange(5, 128, 9, device=x.device)
        terms = step()
        if "temporal" in terms and not terms["temporal"] > 0:
            raise ValueError(f"the batch gives {loss} nothing to do")
        grads = [p.grad for p in trainer.parameters if p.grad is not None]
        return [t.detach().cpu() for t in [*grads, *trainer.parameters]]

    def nan_step(self):
        """An unlogged step on a NaN leaves weights and Adam's count alone; the next one works."""
        x, stats = batch_of(synthetic_acts(4, 0)[0])
        step = OurStep(KINDS[-1], x.to(self.device), stats, 128, 8)
        trainer = step.trainer
        step()
        before = [p.detach().clone() for p in trainer.parameters]
        good = step.x
        step.x = good.clone()
        step.x[7, 3] = math.nan
        with contextlib.suppress(FloatingPointError):  # a CPU looks at every step
            step()
        after = [p.detach() for p in trainer.parameters]
        moved = max(float((a - b).abs().max()) for a, b in zip(before, after))
        counts = {float(state["step"]) for state in trainer.optimizer.state.values()}
        step.x = good
        ok = moved < 1e-6 and counts == {1.0} and math.isfinite(step()["loss"])
        yield "NaN step", ok, f"weights moved by {moved:.0e}, Adam's count {counts}"

    def same_bits(self):
        """Five steps in the usual precision, twice: an exact resume rests on it."""
        x, stats = batch_of(synthetic_acts(4, 0)[0])
        for kind in KINDS:
            ends = []
            for _ in range(2):
                step = OurStep(kind, x.to(self.device), stats, 256, 8)
                for _ in range(5):
                    step()
                ends.append(step.trainer.parameters)
            same = all(torch.equal(a, b) for a, b in zip(*ends))
            yield f"same bits twice, {kind}", same, "equal" if same else "they differ"

    def hooks(self):
        """The hook on the device against hidden_states in float32 on the CPU."""
        tokens = torch.randint(4096, (3, 64), generator=torch.Generator().manual_seed(0))
        for family in ("gpt2", "gemma2"):
            size = "tiny" if self.tiny else family
            lm = random_lm(family, size, 4, torch.float32, "cpu")
            with torch.inference_mode():
                true = lm(tokens, output_hidden_states=True).hidden_states[3]  # after block 2
            for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
                there = random_lm(family, size, 4, dtype, self.device)
                there.load_state_dict(lm.state_dict())
                found = experiment.residuals(there, tokens, 2)
                error = float((found.float().cpu() - true).norm() / true.norm())
                yield f"hook, {family}, {dtype}", error < limit, f"off by {error:.0e}"

    def runs(self):
        """experiment.main() on planted activations, on the device and on the CPU."""
        n_rows, n_steps = (96, 8) if self.tiny else (1536, 300)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            np.save(f"{folder}/acts.npy", synthetic_acts(n_rows, 1)[0])
            for sparsity in ("batchtopk", "topk", "l1"):
                scores = []
                for place, device in enumerate((self.device, "cpu")):
                    out = f"{folder}/{sparsity}_{place}"
                    flags = ["--sparsity", sparsity, "--device", device]
                    found = planted_run(f"{folder}/acts.npy", out, n_steps, flags)
                    scores.append(found["explained_variance"][0])
                ok = abs(scores[0] - scores[1]) < 0.01
                yield f"main, {sparsity}", ok, f"EV {scores[0]:.4f}, on the CPU {scores[1]:.4f}"

    def acts(self, d_in):
        """Synthetic activations (N, 128, d_in) for one batch."""
        return synthetic_acts(self.batch // ROW, 0, d_in, d_in // 2, d_in, self.k / 2)[0]

    def steps(self):
        """Unlogged steps: time, peak memory and waits, beside the five products and plain steps."""
        columns = f"{'ms':>8s} {'x five':>7s} {'x plain':>8s}  peak GB, waits"
        self.table.append(f"{'step':44s} {columns}")
        for d_in, d_sae in self.shapes:
            x, stats = batch_of(self.acts(d_in))
            x = x.to(self.device)
            shape = f"{d_in} x {d_sae}"
            builders = {
                "five products": functools.partial(five_products, x, d_sae, torch.bfloat16),
                "plain batchtopk": functools.partial(plain_step, x, d_sae, self.k, False),
                "plain topk, sparse": functools.partial(plain_step, x, d_sae, self.k, True)}
            for kind in KINDS:
                builders[kind] = functools.partial(OurStep, kind, x, stats, d_sae, self.k)
            found = {name: self.measure(build) for name, build in builders.items()}
            ms = {name: row[0] for name, row in found.items()}
            plain = min(ms["plain batchtopk"], ms["plain topk, sparse"])
            for name, (t, memory, waits) in found.items():
                ratios = f"{t:8.2f} {t / ms['five products']:7.2f} {t / plain:8.2f}"
                self.table.append(f"{shape + ', ' + name:44s} {ratios}  {memory}, {waits}")
            for kind in KINDS:
                waits = found[kind][2]
                yield f"no wait, {kind}, {shape}", waits == 0 if self.on_gpu else None, waits
            ratio = ms["batchtopk"] / plain
            yield f"batchtopk <= 1.5 x plain, {shape}", self.timed(ratio <= 1.5), f"{ratio:.2f}"
            added = ms["batchtopk + temporal"] / ms["batchtopk"] - 1
            yield f"temporal <= 10 %, {shape}", self.timed(added <= 0.1), f"{added:+.1%}"

    def measure(self, build):
        """-> ms of the step that build() makes, its peak memory in GB, its waits."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = build()
        ms = 1e3 * interleave({"": step}, self.device, 3, 2 if self.tiny else 8)[""]
        if not self.on_gpu:
            return ms, "not measured on cpu", "not measured on cpu"
        return ms, f"{torch.cuda.max_memory_allocated() / 1e9:.1f}", host_waits(step)

    def feed(self):
        """train() with batches from a Harvest against the bare step."""
        n_steps, every = (8, 2) if self.tiny else (100, 20)
        for d_in, d_sae in self.shapes[:2]:
            acts = self.acts(d_in)
            x, stats = batch_of(acts)
            step = OurStep(KINDS[-1], x.to(self.device), stats, d_sae, self.k)
            bare = 1e3 * interleave({"": step}, self.device, 3, every)[""]
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                stored = torch.from_numpy(acts).bfloat16().repeat(16, 1, 1)
                save_file({"acts": stored}, f"{folder}/acts.safetensors")
                cfg = Config(acts=f"{folder}/acts.safetensors", out_dir=f"{folder}/run",
                             d_sae=d_sae, k=self.k, batch_size=self.batch, device=self.device,
                             train_tokens=self.batch * n_steps, log_every=every)
                cfg.run_dir.mkdir()
                harvest = experiment.Harvest(cfg)
                experiment.train(cfg, 0, harvest, experiment.Stop())
                log = (cfg.run_dir / "log.jsonl").read_text().splitlines()
                waits = "not measured on cpu"
                if self.on_gpu:
                    waits = host_waits(functools.partial(harvest.batch, 0, 1))
            _, first, *_, last = [json.loads(line) for line in log]
            ended, began = [(line["step"] + 1) * self.batch / line["tokens_per_s"]
                            for line in (last, first)]
            ms = 1e3 * (ended - began) / (last["step"] - first["step"])
            found = f"{ms:.2f} ms a step of train(), {bare:.2f} bare"
            yield f"feed <= 15 %, {d_in} x {d_sae}", self.timed(ms <= 1.15 * bare), found
            ok = waits == 0 if self.on_gpu else None
            yield f"no wait in a batch, {d_in} x {d_sae}", ok, waits

    def harvest(self):
        """The hook, and the hook into a file, against the bare truncated forward."""
        self.table.append(f"{'harvest, tokens/s':44s} {'bare':>10s} {'hook':>10s} {'file':>10s}")
        for family, layer in (("gpt2", 8), ("gemma2", 12)):
            size = family
            n_rows = (8, 64, 128)
            if self.tiny:
                size = "tiny"
                layer = 1
                n_rows = (1, 2, 4)
            for n in n_rows:
                rates = harvest_rates(family, size, layer, n, self.device)
                label = f"{family}, {n} rows a forward"
                columns = " ".join(f"{rate:10,d}" for rate in rates.values())
                self.table.append(f"{label:44s} {columns}")
            share = rates["file"] / rates["bare"]
            yield f"harvest >= .9 of bare, {family}", self.timed(share >= 0.9), f"{share:.2f}"


# ------------------------------------------------------------------------------------------------
# 6. The command
# ------------------------------------------------------------------------------------------------


def main(argv=None):
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="", help="cuda (or cpu --tiny): the acceptance there")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a test of the acceptance")
    parser.add_argument("--truth", action="store_true", help="takes flags of experiment.py, too")
    parser.add_argument("--seeds", type=int, default=3, help="of the truth test")
    parser.add_argument("--out", default="", help="where the figures go")
    args, flags = parser.parse_known_args(argv)
    if flags and not args.truth:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if args.truth:
        result = truth(args.seeds, ["--device", args.device or "auto", *flags])
        prepare.write_json(args.out or HERE / "truth.json", result)
        return 0
    if args.device:
        device = prepare.pick_device(args.device)
        if device.startswith("cuda") and not torch.cuda.is_available():
            parser.error("this torch build sees no CUDA device")
        if device == "cpu" and not args.tiny:
            parser.error("--device cpu is for --tiny")
        return Acceptance(device, args.tiny).run()
    found = bench_cpu()
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    prepare.write_json(args.out or HERE / "bench.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
