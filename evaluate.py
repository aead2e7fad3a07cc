"""The judge: scores a trained sparse autoencoder (SAE) on held-out text. Not to be edited between runs that are compared.

    python evaluate.py runs/run_2                     score a run again, through the experiment.py saved inside it
    python evaluate.py runs/run_0 runs/run_4          print a table from scores already on disk
    python evaluate.py runs/run_2 --feature 123       read one latent: its numbers, top tokens, top passages

Writes core.json (the keys of SAEBench 0.6.0's core eval), consistency.json (how codes behave along a text) and
final_info.json (the headline numbers, raw values of every seed kept). Nothing is written until everything is computed.

Notation: x (…,d_in) activation, x_hat its reconstruction, f or acts (…,d_sae) the codes. A *valid* token is none of
{bos, eos, pad}. A *segment* is the part of one document inside one row; a *pair* (t, t+lag) lies inside one segment
with both ends valid. Sums run over all evaluated tokens in float64 with one division at the end. Memory does not grow
with the number of tokens: sums are streamed, and what needs the codes twice keeps them (sparse) for SAMPLE_ROWS rows.
"""
import argparse
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import signal
import sys
import time
import uuid
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score, roc_auc_score, silhouette_score
from threadpoolctl import threadpool_limits
from tqdm import tqdm

SOURCE_SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # stands in every score: which judge said so

BATCH_ROWS = 16      # SAEBench's batch; its mse and its bias are means over batches, so this is part of the protocol
LOGIT_TOKENS = 512   # tokens whose logits are alive at a time: 512 x 49,152 float32 is 100 MB, a few times over
LAGS = (1, 2, 4, 8, 16, 32, 64)
MIN_FIRINGS = 20     # latents that fire less often have no correlation worth averaging
SAMPLE_ROWS = 512    # rows whose codes are kept (sparse) for what needs a second look: matrices, clusters, probes
SAMPLE_NNZ = 20_000_000   # ... and a cap of 160 MB for dictionaries that are not sparse
MATRIX_SIDE = 128    # position matrices are at most this wide; longer contexts share cells
REDUNDANT = 0.9      # two latents are redundant when their codes correlate above this
TOGETHER, PARTNERS = 0.6, 10   # latents fire together when more than so many others correlate with each above this
MAX_COMPARED = 4096  # latents in the latent x latent matrix: 134 MB in float64
PROBE_K = (1, 5, 20)
GROUPS = ("whole", "high", "low")  # high: the leading latents that a temporal loss binds; low: the rest
CORE_KEYS = ("explained_variance", "mse", "cossim", "l2_ratio", "relative_reconstruction_bias", "l0", "l1", "frac_alive",
             "ce_loss_score", "kl_div_score")


# ------------------------------------------------------------------------------------------------ numbers and files


def plain(value, digits=None):
    """numpy/torch scalars and arrays -> what json can hold; NaN and inf -> None; floats to `digits` significant digits."""
    if isinstance(value, dict):
        return {str(k): plain(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v, digits) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    value = float(value) if isinstance(value, (float, np.floating)) else value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.{digits}g}") if digits else value
    return value


def ratio(a, b):
    """a / b as a float, NaN (later: null with a reason) where b is 0."""
    return float(a) / float(b) if b else math.nan


def has_null(value):
    """True when a None stands anywhere inside a JSON-like value."""
    if isinstance(value, (dict, list)):
        return any(has_null(v) for v in (value.values() if isinstance(value, dict) else value))
    return value is None


def write_json(files):
    """{path: object} written beside their targets, fsynced, then renamed: all or nothing, never a half-written score."""
    for path, tree in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        # one line for each top-level key: small files that still diff
        text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in tree.items())
        with open(path.with_name(path.name + ".tmp"), "w") as file:
            file.write("{" + text + "}\n")
            file.flush()
            os.fsync(file.fileno())
    for path in files:
        os.replace(path.with_name(path.name + ".tmp"), path)


def read_json(path):
    """The object in a JSON file; ValueError with one sentence if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as err:
        raise ValueError(f"{path} is not valid JSON ({err})") from None


def sha256(*parts):
    """Hex digest over bytes, arrays (with their shapes) or files."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        elif isinstance(part, np.ndarray):
            digest.update(str(part.shape).encode())
            part = np.ascontiguousarray(part)
        digest.update(part)   # arrays through their buffer: a memory-mapped file is not copied
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ rows of held-out text


class Rows(NamedTuple):
    """Token rows and what is known of each token."""
    tokens: np.ndarray   # (N,T) int64, every row starts with BOS; None when activations were given instead of text
    doc_id: np.ndarray   # (N,T) int32, a BOS belongs to the document it precedes
    valid: np.ndarray    # (N,T) bool, False at bos/eos/pad
    topics: list         # label of each doc_id, or None


def read_rows(path):
    """(N,T) token rows of the user's own, from a .npy that may hold integers only (no pickle)."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except OSError as err:
        raise ValueError(f"{path} cannot be read ({err.strerror or err})") from None
    except (ValueError, EOFError):
        raise ValueError(f"{path} is not a plain .npy file of integers (pickled objects are not read)") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold an int64 array (rows, context), not {getattr(tokens, 'dtype', type(tokens))} "
                         f"of shape {getattr(tokens, 'shape', '?')}")
    return tokens.astype(np.int64)


def special_ids(tokenizer):
    """bos, eos, pad ids, those that exist; the first one starts rows. Id 0 is a real one in Pythia: never test truth."""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return [i for i in ids if i is not None]


def check_tokens(tokens, config, tokenizer):
    """Refuses rows that a model of this config would misread in silence: ids, context length and BOS."""
    vocab = config.vocab_size
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if tokens.size == 0 or tokens.shape[1] < 2:
        raise ValueError(f"token rows of shape {tokens.shape} are too short to score")
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(f"token ids run from {tokens.min()} to {tokens.max()}, the model's vocabulary from 0 to {vocab - 1}")
    if longest and tokens.shape[1] > longest:
        raise ValueError(f"rows of {tokens.shape[1]} tokens are longer than the model's context of {longest}")
    bos = special_ids(tokenizer)[0]
    if (tokens[:, 0] != bos).any():
        row = int(np.flatnonzero(tokens[:, 0] != bos)[0])
        raise ValueError(f"row {row} does not start with BOS (id {bos}): put it in place, scores without it mean nothing")


def token_text(tokenizer):
    """id -> text of that token alone, with its leading space, which sentencepiece's decoder drops."""
    def text(i):
        decoded, piece = tokenizer.decode([i]), tokenizer.convert_ids_to_tokens([i])[0] or ""
        return " " + decoded if piece.startswith("▁") and not decoded.startswith(" ") else decoded
    return functools.cache(text)


def label_tokens(tokens, tokenizer):
    """Rows from bare tokens: a document begins at each BOS and at each row's start; no topics."""
    special = special_ids(tokenizer)
    starts = tokens == special[0]
    starts[:, 0] = True
    doc_id = (np.cumsum(starts.ravel()) - 1).reshape(tokens.shape).astype(np.int32)
    return Rows(tokens, doc_id, ~np.isin(tokens, special), None)


def segment_ids(doc_id, valid):
    """(B,T) doc ids -> (B*T,) number of the segment each token lies in, -1 at special tokens; rows never share one."""
    first = np.ones(doc_id.shape, bool)
    first[:, 1:] = doc_id[:, 1:] != doc_id[:, :-1]
    return np.where(valid.ravel(), np.cumsum(first.ravel()) - 1, -1)


def permute_segments(seg, rng):
    """(n,) index that shuffles the valid tokens inside each segment and leaves special tokens where they are."""
    index = np.arange(seg.size)
    inside = np.flatnonzero(seg >= 0)  # already in order of segment, so sorting by (segment, noise) permutes within
    index[inside] = inside[np.lexsort((rng.random(inside.size), seg[inside]))]
    return index


# ------------------------------------------------------------------------------------------------ fidelity and sparsity


class Fidelity:
    """Reconstruction and sparsity sums of one SAE, both as we mean them and as SAEBench 0.6.0 computes them.

    SAEBench's batch-wise quantities need batches of BATCH_ROWS rows. Both kinds are computed from the same float64 sums.
    """

    def __init__(self, W_dec):
        d_sae, d_in = W_dec.shape
        self.unit = W_dec.double().norm(dim=1).cpu().numpy()   # (d_sae,) codes are measured with decoder rows at unit norm
        self.tokens = self.batches = 0
        self.x_sum = torch.zeros(d_in, dtype=torch.float64)
        self.sums = dict.fromkeys(("rr", "xx", "yy", "xy", "cos", "norm_in", "norm_out", "norm_ratio", "legacy"), 0.0)
        self.batch_sums = dict.fromkeys(("mse", "bias", "rr", "xx"), 0.0)   # means over batches come from these
        self.fires, self.positive, self.rows_fired = (np.zeros(d_sae, np.int64) for _ in range(3))
        self.total, self.absolute = np.zeros(d_sae), np.zeros(d_sae)

    def update(self, x, x_hat, codes, row_of_token):
        """x, x_hat (n,d_in) at the n valid tokens; codes csr (B*T,d_sae), empty at special tokens; row_of_token (B*T,)."""
        x, y = x.double().cpu(), x_hat.double().cpu()
        n = len(x)
        rr, xx, yy, xy = (x - y).square().sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)
        norm_in, norm_out = xx.sqrt(), yy.sqrt()
        legacy = 1 - rr / (x - x.mean(0)).square().sum(1)
        # a zero vector has no direction: its cosine counts as 0 (not NaN); sqrt(a*a) == a, so x_hat = x gives exactly 1
        cos = torch.where(xx * yy > 0, xy / (xx * yy).sqrt(), 0.0)
        norm_ratio = norm_out / torch.where(norm_in < 1e-4, 1.0, norm_in)
        for name, value in (("rr", rr), ("xx", xx), ("yy", yy), ("xy", xy), ("cos", cos), ("norm_in", norm_in),
                            ("norm_out", norm_out), ("norm_ratio", norm_ratio), ("legacy", legacy)):
            self.sums[name] += value.sum().item()
        self.batch_sums["mse"] += rr.sum().item() / n   # sum over tokens of |r|^2 / n_b: theirs, shrinks with batch size
        self.batch_sums["bias"] += ratio(yy.mean(), xy.mean())
        self.batch_sums["rr"] += rr.mean().item()
        self.batch_sums["xx"] += xx.mean().item()
        self.x_sum += x.sum(0)
        self.tokens, self.batches = self.tokens + n, self.batches + 1

        d_sae, latent = codes.shape[1], codes.indices
        row = np.repeat(row_of_token, np.diff(codes.indptr))
        up = codes.data > 0   # SAEBench counts f > 0 in its densities and f != 0 in its l0; they differ for GELU only
        fired = np.zeros((row_of_token.max() + 1, d_sae), bool)
        fired[row[up], latent[up]] = True
        self.fires += np.bincount(latent, minlength=d_sae)
        self.positive += np.bincount(latent[up], minlength=d_sae)
        self.rows_fired += fired.sum(0)
        self.total += np.bincount(latent, codes.data, d_sae)
        self.absolute += np.bincount(latent, np.abs(codes.data), d_sae)

    @property
    def mass(self):
        """(d_sae,) total activation of each latent, sum |f| with its decoder row at unit norm."""
        return self.absolute * self.unit

    def ours(self):
        """The values as we mean them. explained_variance: predicting the mean gives 0, predicting x gives 1."""
        n, d, s = self.tokens, len(self.x_sum), self.sums
        variance = s["xx"] - self.x_sum.square().sum().item() / n   # sum |x - mean|^2
        variance = 0 if variance < 1e-12 * s["xx"] else variance    # rounding error of activations that never change
        return {"explained_variance": 1 - ratio(s["rr"], variance), "mse": s["rr"] / (n * d), "cossim": s["cos"] / n,
                "l2_ratio": s["norm_ratio"] / n, "relative_reconstruction_bias": ratio(s["yy"], s["xy"]),
                "l0": self.fires.sum() / n, "l1": self.mass.sum() / n, "frac_alive": (self.fires > 0).mean()}

    def saebench(self):
        """SAEBench 0.6.0's categories, its faults included: Q - (Q/d)^2 is no variance, legacy averages ratios of tokens."""
        n, s, b = self.tokens, self.sums, {k: v / self.batches for k, v in self.batch_sums.items()}
        q = b["xx"]
        return {"reconstruction_quality": {"explained_variance": 1 - ratio(b["rr"], q - (q / len(self.x_sum)) ** 2),
                                           "explained_variance_legacy": s["legacy"] / n,
                                           "mse": self.batch_sums["mse"] / n, "cossim": s["cos"] / n},
                "shrinkage": {"l2_norm_in": s["norm_in"] / n, "l2_norm_out": s["norm_out"] / n,
                              "l2_ratio": s["norm_ratio"] / n, "relative_reconstruction_bias": b["bias"]},
                "sparsity": {"l0": self.fires.sum() / n, "l1": self.total.sum() / n}}


# ------------------------------------------------------------------------------------------------ behaviour of the LM


@contextlib.contextmanager
def output_replaced(block, fn):
    """While open, the block's residual output h (B,T,d_in) is fn(h)."""
    handle = block.register_forward_hook(
        lambda module, args, out: (fn(out[0]), *out[1:]) if isinstance(out, tuple) else fn(out))
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def lm_behaviour(model, block, saes, tokens, valid):
    """CE (nats) and KL of the model with its residual clean, reconstructed by each SAE, and zeroed. -> dict per SAE.

    CE: mean over valid context tokens t <= T-2 of -log p(token t+1). KL: mean over all valid t of
    sum_v p_clean (log p_clean - log p_other). Special positions keep their activation in the SAE runs; the ablation
    zeroes every position (SAEBench's protocol). Scores are ratios of the pooled means: 1 = as clean, 0 = as ablated.
    """
    device = next(model.parameters()).device
    names = ["clean", "ablation"] + [f"sae{i}" for i in range(len(saes))]
    ce, kl = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    step = max(1, LOGIT_TOKENS // tokens.shape[1])
    for start in tqdm(range(0, len(tokens), step), desc="language model", leave=False, disable=None):
        ids, keep = (torch.from_numpy(a[start:start + step]).to(device) for a in (tokens, valid))

        def reconstruct(sae):
            return lambda h: torch.where(keep[..., None], sae.decode(*sae.encode(h.float())).to(h.dtype), h)

        edits = {"clean": lambda h: h, "ablation": torch.zeros_like}
        edits |= {f"sae{i}": reconstruct(sae) for i, sae in enumerate(saes)}
        for name in names:
            with output_replaced(block, edits[name]):
                logp = model(ids, use_cache=False).logits.float().log_softmax(-1)
            if name == "clean":
                clean, p = logp, logp.exp()
            next_token = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            ce[name] -= next_token[keep[:, :-1]].double().sum().item()
            if name != "clean":
                kl[name] += (clean - logp).mul_(p).sum(-1)[keep].double().sum().item()
    n_ce, n_kl = int(valid[:, :-1].sum()), int(valid.sum())
    ce, kl = {k: ratio(v, n_ce) for k, v in ce.items()}, {k: ratio(v, n_kl) for k, v in kl.items()}
    return [{"kl_div_score": ratio(kl["ablation"] - kl[s], kl["ablation"]), "kl_div_with_ablation": kl["ablation"],
             "kl_div_with_sae": kl[s], "ce_loss_score": ratio(ce["ablation"] - ce[s], ce["ablation"] - ce["clean"]),
             "ce_loss_with_ablation": ce["ablation"], "ce_loss_with_sae": ce[s], "ce_loss_without_sae": ce["clean"]}
            for s in names[2:]]


# ------------------------------------------------------------------------------------------------ SAEBench's core.json


def max_cosine(W):
    """(n,d) rows -> (n,) largest cosine of each row with any other row, a block of rows at a time."""
    W = F.normalize(W.float(), dim=1)
    best = []
    for start in range(0, len(W), 1024):
        cos = W[start:start + 1024] @ W.T
        cos[torch.arange(len(cos)), torch.arange(start, start + len(cos))] = -torch.inf
        best.append(cos.amax(1))
    return torch.cat(best)


def feature_rows(sae, fidelity):
    """One dict a latent, SAEBench's feature-wise metrics. A latent that never fires has 0 tokens a row, not NaN."""
    W_enc, W_dec = sae.W_enc.detach().float().T.cpu(), sae.W_dec.detach().float().cpu()   # both (d_sae,d_in)
    columns = {
        "feature_density": fidelity.positive / fidelity.tokens,
        "consistent_activation_heuristic": fidelity.positive / np.maximum(fidelity.rows_fired, 1),
        "encoder_bias": sae.b_enc.detach().float().cpu().numpy(),
        "encoder_norm": W_enc.norm(dim=1).numpy(),
        "encoder_decoder_cosine_sim": (F.normalize(W_enc, dim=1) * F.normalize(W_dec, dim=1)).sum(1).numpy(),
        "max_decoder_cosine_sim": max_cosine(W_dec).numpy(),
        "max_encoder_cosine_sim": max_cosine(W_enc).numpy()}
    values = zip(*(plain(column, 7) for column in columns.values()))
    return [{"index": i, **dict(zip(columns, v))} for i, v in enumerate(values)]


def misc_metrics(rows):
    """SAEBench's summary of the feature-wise rows; normalized_* is the share of all firings."""
    density = np.array([r["feature_density"] for r in rows])
    out = {"frac_alive": (density > 0).mean()}
    for percent in (1, 10):
        out[f"freq_over_{percent}_percent"] = (density > percent / 100).mean()
        out[f"normalized_freq_over_{percent}_percent"] = ratio(density[density > percent / 100].sum(), density.sum() or 1)
    for side in ("encoder", "decoder"):
        cosines = [r[f"max_{side}_cosine_sim"] for r in rows]
        out[f"average_max_{side}_cosine_sim"] = math.nan if None in cosines else np.mean(cosines)
    return out


def core_json(cfg, seed_dir, sae, fidelity, behaviour, counts, hashes, dataset, dtype, notes):
    """SAEBench's core result for one seed; values whose released formula is faulty stand corrected under "ours"."""
    features = feature_rows(sae, fidelity)
    lm = behaviour or dict.fromkeys(("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae", "ce_loss_score",
                                     "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"))
    tokens = {"total_tokens_eval_reconstruction": counts["reconstruction_rows"] * counts["context"],
              "total_tokens_eval_sparsity_variance": counts["rows"] * counts["context"]}   # special tokens included
    metrics = {"model_behavior_preservation": {k: v for k, v in lm.items() if k.startswith("kl")},
               "model_performance_preservation": {k: v for k, v in lm.items() if k.startswith("ce")},
               **fidelity.saebench(), "token_stats": tokens, "misc_metrics": misc_metrics(features)}
    ours = fidelity.ours() | {"ce_loss_score": lm["ce_loss_score"], "kl_div_score": lm["kl_div_score"]}
    flags = ("compute_kl", "compute_ce_loss", "compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics",
             "compute_featurewise_density_statistics", "compute_featurewise_weight_based_metrics",
             "exclude_special_tokens_from_reconstruction")
    config = {"model_name": str(cfg.model), "llm_dtype": dtype, "batch_size_prompts": BATCH_ROWS,
              "n_eval_reconstruction_batches": math.ceil(counts["reconstruction_rows"] / BATCH_ROWS),
              "n_eval_sparsity_variance_batches": math.ceil(counts["rows"] / BATCH_ROWS),
              "dataset": dataset, "context_size": counts["context"], **dict.fromkeys(flags, True), "verbose": False}
    cfg_file = seed_dir / "cfg.json"
    return plain({
        "eval_type_id": "core", "eval_config": config,
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([hashes, dtype, counts], sort_keys=True))),
        "datetime_epoch_millis": int(time.time() * 1000), "eval_result_metrics": metrics, "eval_result_details": features,
        "sae_bench_commit_hash": f"none: computed by evaluate.py {SOURCE_SHA256[:12]}", "sae_lens_id": "custom_sae",
        "sae_lens_release_id": f"{cfg.model}_layer_{cfg.layer}", "sae_lens_version": None,
        "sae_cfg_dict": read_json(cfg_file) if cfg_file.exists() else None,
        "eval_result_unstructured": {"ours": ours, "counts": counts, "hashes": hashes, "notes": notes}})


# ------------------------------------------------------------------------------------------------ consistency by lag


def pearson(product, left, right, left2, right2, pairs):
    """Correlation from sums over pairs; NaN where a side does not vary. `pairs` is (L,), the sums (L,d)."""
    n = np.maximum(pairs, 1)[:, None]
    cov, var_l, var_r = product / n - left * right / n**2, left2 / n - (left / n) ** 2, right2 / n - (right / n) ** 2
    # below 1e-9 of the second moment a variance is rounding error of a constant
    varies = (var_l > 1e-9 * left2 / n) & (var_r > 1e-9 * right2 / n) & (pairs[:, None] > 1)
    return np.where(varies, cov / np.sqrt(np.where(varies, var_l * var_r, 1)), np.nan)


class LagSums:
    """Streaming sums over pairs (t, t+lag) for every column of a (tokens, d) matrix: codes, permuted codes, or raw x."""

    def __init__(self, d, lags, context):
        self.lags, self.pairs = lags, np.zeros(len(lags))
        # f_l f_r, f_l, f_r, f_l^2, f_r^2 for each lag and column; `within` after removal of each segment's own mean
        self.pooled, self.within = np.zeros((5, len(lags), d)), np.zeros((5, len(lags), d))
        self.on_left, self.on_both = np.zeros((len(lags), d)), np.zeros((len(lags), d))
        self.tokens, self.squares = 0, np.zeros(d)
        self.by_position, self.position_tokens = np.zeros((context, d)), np.zeros(context)

    def update(self, codes, seg):
        """codes: csr (n,d) of whole rows, empty at special tokens; seg (n,) from segment_ids."""
        d, context = codes.shape[1], len(self.position_tokens)
        valid, n_seg = np.flatnonzero(seg >= 0), seg.max() + 1
        at = sparse.csr_matrix((np.ones(valid.size), (valid % context, valid)), shape=(context, seg.size))
        self.by_position += (at @ codes).toarray()
        self.position_tokens += np.bincount(valid % context, minlength=context)
        self.squares += np.bincount(codes.indices, codes.data**2, d)
        self.tokens += valid.size

        def by_segment(index):   # (n_seg,d) sums over the tokens in `index`, added up by their segment
            pick = sparse.csr_matrix((np.ones(index.size), (seg[index], index)), shape=(n_seg, seg.size))
            return (pick @ codes).toarray()

        mean = by_segment(valid) / np.maximum(np.bincount(seg[valid], minlength=n_seg), 1)[:, None]
        for k, lag in enumerate(self.lags):
            left = np.flatnonzero((seg[:-lag] == seg[lag:]) & (seg[lag:] >= 0))
            if not left.size:
                continue
            f_l, f_r = codes[left], codes[left + lag]
            both = f_l.multiply(f_r).tocsr()
            A, B, c = by_segment(left), by_segment(left + lag), np.bincount(seg[left], minlength=n_seg)[:, None]
            product, l2, r2 = (np.bincount(m.indices, v, d) for m, v in
                               ((both, both.data), (f_l, f_l.data**2), (f_r, f_r.data**2)))
            # sum (f_l - m)(f_r - m) = sum f_l f_r - m (A + B) + c m^2, segment by segment: f - m is never built
            cm, cm2 = (c * mean).sum(0), (c * mean**2).sum(0)
            self.pooled[:, k] += product, A.sum(0), B.sum(0), l2, r2
            self.within[:, k] += (product - (mean * (A + B)).sum(0) + cm2, A.sum(0) - cm, B.sum(0) - cm,
                                  l2 - 2 * (mean * A).sum(0) + cm2, r2 - 2 * (mean * B).sum(0) + cm2)
            self.on_left[k] += np.bincount(f_l.indices, minlength=d)
            self.on_both[k] += np.bincount(both.indices, minlength=d)
            self.pairs[k] += left.size

    @property
    def mean(self):
        """(d,) mean over valid tokens."""
        return self.by_position.sum(0) / self.tokens

    @property
    def variance(self):
        """(d,) variance over valid tokens."""
        return np.maximum(self.squares / self.tokens - self.mean**2, 0)

    def autocorr(self):
        """(L,d) Corr(f_t, f_t+lag) pooled over all segments, centred globally."""
        return pearson(*self.pooled, self.pairs)

    def autocorr_within(self):
        """(L,d) the same after each segment's own mean is removed; biased by about -1/length, as its null shows."""
        # a column constant inside every segment leaves rounding error only: compare with what was there before
        flat = self.within[3:].min(0) <= 1e-9 * self.pooled[3:].max(0)
        return np.where(flat, np.nan, pearson(*self.within, self.pairs))

    def persistence(self):
        """(L,d) P(on at t+lag | on at t)."""
        return np.divide(self.on_both, self.on_left, out=np.full(self.on_both.shape, np.nan), where=self.on_left > 0)

    def kappa(self, fires):
        """(L,d) persistence beyond chance, (P - p) / (1 - p) with p the firing rate."""
        p = fires / self.tokens
        return np.where(p < 1, (self.persistence() - p) / np.where(p < 1, 1 - p, 1), np.nan)

    def span(self, fires):
        """(d,) mean run length in tokens: firings / runs, and a run starts wherever the token before was not on too."""
        runs = fires - self.on_both[0]
        return np.divide(fires, runs, out=np.full(len(runs), np.nan), where=runs > 0)

    def eta2(self):
        """(d,) share of a column's variance explained by the position in the row."""
        n, seen = self.position_tokens[:, None], self.position_tokens > 0
        between = (n[seen] * (self.by_position[seen] / n[seen] - self.mean) ** 2).sum(0) / self.tokens
        varies = self.variance > 1e-9 * self.squares / self.tokens
        return np.where(varies, between / np.where(varies, self.variance, 1), np.nan)


class Neighbours:
    """Streaming Jaccard overlap of the supports, and smoothness S, of neighbouring tokens, by group of latents."""

    def __init__(self, n_high):
        self.n_high = n_high
        self.jaccard, self.smoothness = np.zeros((2, 3)), np.zeros((2, 3))   # (sum, count) for whole, high, low

    def count(self, matrix):
        """(n,d) csr -> (3,n) entries of each row in whole, high, low."""
        whole = np.diff(matrix.indptr)
        row = np.repeat(np.arange(len(whole)), whole)
        high = np.bincount(row[matrix.indices < self.n_high], minlength=len(whole))
        return np.stack([whole, high, whole - high])

    def update(self, codes, x, seg, context):
        """codes csr (n,d_sae) and x (n,d_in) of whole rows, x in float32 numpy."""
        left = np.flatnonzero((seg[:-1] == seg[1:]) & (seg[1:] >= 0))
        if not left.size:
            return
        f_l, f_r = codes[left], codes[left + 1]
        common = self.count(f_l.multiply(f_r).tocsr())
        union = self.count(f_l) + self.count(f_r) - common
        self.jaccard += (common / np.maximum(union, 1)).sum(1), (union > 0).sum(1)   # an empty union has no overlap
        # S (T-SAE, arXiv 2511.05541): for each row, mean over latents active in it of max_t |df| / |dx|
        dx = np.linalg.norm((x[left + 1] - x[left]).astype(np.float64), axis=1)
        moved = dx > 0   # two equal activations have equal codes: 0/0, no step
        f_l, f_r, row = f_l[moved], f_r[moved], left[moved] // context
        step = (f_r - f_l).tocsr()
        peak = np.zeros((len(seg) // context, codes.shape[1]))
        size = np.diff(step.indptr)
        np.maximum.at(peak, (np.repeat(row, size), step.indices), np.abs(step.data) / np.repeat(dx[moved], size))
        active = np.zeros(peak.shape, bool)
        for side in (f_l, f_r):
            active[np.repeat(row, np.diff(side.indptr)), side.indices] = True
        for g, part in enumerate((slice(None), slice(0, self.n_high), slice(self.n_high, None))):
            n = active[:, part].sum(1)
            mean = peak[:, part].sum(1)[n > 0] / n[n > 0]   # a latent that is not active has peak 0
            self.smoothness[:, g] += mean.sum(), len(mean)

    def values(self, sums):
        """{group: mean} of a (sum, count) pair."""
        return {g: ratio(*sums[:, i]) for i, g in enumerate(GROUPS)}


def decay_length(curve, lags):
    """Smallest measured lag at which the correlation lies below its value at lag 1 divided by e; NaN if none does."""
    below = [lag for lag, rho in zip(lags, curve) if rho < curve[0] / math.e]
    return below[0] if below and curve[0] > 0 else math.nan


def group_means(value, keep, mass, groups):
    """(d,) or (L,d) -> {group: {"mean", "mass"}}: unweighted and mass-weighted mean over latents in `keep`, NaN left out."""
    def means(row, part):
        ok = keep[part] & np.isfinite(row[part])
        w = mass[part][ok]
        return (row[part][ok].mean() if ok.any() else math.nan, ratio((w * row[part][ok]).sum(), w.sum()))

    out = {}
    for name, part in groups.items():
        pairs = [means(row, part) for row in np.atleast_2d(value)]
        pick = (lambda i: [p[i] for p in pairs]) if value.ndim == 2 else (lambda i: pairs[0][i])
        out[name] = {"mean": pick(0), "mass": pick(1)}
    return out


# ------------------------------------------------------------------------------------------------ codes seen twice


class Sample:
    """The codes (sparse) and activations of the first SAMPLE_ROWS rows at most, for what cannot be streamed."""

    def __init__(self):
        self.codes, self.x, self.rows, self.nnz, self.closed = [], [], 0, 0, False

    def update(self, codes, x):
        """codes csr (n,d_sae); x (B,T,d_in) in the model's own dtype. One batch at least is kept."""
        fits = self.rows + len(x) <= SAMPLE_ROWS and self.nnz + codes.nnz <= SAMPLE_NNZ
        self.closed |= bool(self.codes) and not fits   # for good: the sample is the leading rows, without a gap
        if not self.closed:
            self.codes.append(codes.astype(np.float32))
            self.x.append(x.cpu())
            self.rows, self.nnz = self.rows + len(x), self.nnz + codes.nnz


def position_matrix(blocks, seg, mean, scale, context):
    """Correlation of a row's columns at positions p and q, mean over columns and over rows with (p, q) in one segment.

    blocks: (n,d) matrices of whole rows, csr or dense; mean, scale (d,): each column's over ALL valid tokens, so the
    diagonals of the result average to the pooled autocorrelation. -> (T,T) matrix with NaN where no row has the pair,
    (T,T) number of pairs. Contexts beyond MATRIX_SIDE share cells.
    """
    step = math.ceil(context / MATRIX_SIDE)
    side = math.ceil(context / step)
    bins = sparse.csr_matrix((np.ones(context), (np.arange(context) // step, np.arange(context))), shape=(side, context))
    total, count = np.zeros((side, side)), np.zeros((side, side))
    m, start = mean / scale, 0
    for block in blocks:
        for row in range(0, block.shape[0], context):
            s = seg[start + row:start + row + context]
            h = block[row:row + context]
            h = h @ sparse.diags(1 / scale) if sparse.issparse(h) else h / scale
            hm, gram = h @ m, h @ h.T
            gram = gram.toarray() if sparse.issparse(gram) else gram
            together = (s[:, None] == s[None]) & (s >= 0)[:, None]
            total += bins @ np.where(together, gram - hm[:, None] - hm[None] + m @ m, 0) @ bins.T
            count += bins @ together.astype(float) @ bins.T
        start += block.shape[0]
    return np.where(count > 0, total / np.maximum(count, 1) / max(len(m), 1), np.nan if len(m) else count * np.nan), count


def toeplitzness(matrix, count):
    """Share of the off-diagonal variance (weighted by pairs) that the distance |p - q| alone explains; 1 = shift-invariant."""
    p, q = np.nonzero(np.triu(count, 1))
    w, v, lag = count[p, q], matrix[p, q], q - p
    weight = np.bincount(lag, w)
    mean = np.bincount(lag, w * v) / np.maximum(weight, 1)
    overall = ratio((w * v).sum(), w.sum())
    return ratio((weight * (mean - overall) ** 2).sum(), (w * (v - overall) ** 2).sum())


def top_tokens(codes, tokens, latent, n=5):
    """Ids of the tokens on which a latent's activation adds up highest. codes csc (n,d); tokens (n,) or None."""
    if tokens is None:
        return []
    part = slice(codes.indptr[latent], codes.indptr[latent + 1])
    ids, where = np.unique(tokens[codes.indices[part]], return_inverse=True)
    return ids[np.argsort(-np.bincount(where, codes.data[part]), kind="stable")[:n]].tolist() if len(ids) else []


def correlation_matrix(codes, n):
    """(m,m) Pearson correlation of the columns of csr (n,m) over its n valid tokens, NaN where a column is constant."""
    if codes.nnz < 0.05 * n * codes.shape[1]:
        gram = (codes.T @ codes).toarray().astype(np.float64)
    else:   # dense codes (GELU, L1 at low weight): blocks of dense products are faster than sparse ones
        gram = np.zeros((codes.shape[1],) * 2)
        for start in range(0, codes.shape[0], 4096):
            block = codes[start:start + 4096].toarray()
            gram += block.T @ block
    mean = np.asarray(codes.sum(0), np.float64).ravel() / n
    cov = gram / n - np.outer(mean, mean)
    sd = np.sqrt(np.maximum(np.diag(cov), 0))
    sd[sd**2 <= 1e-9 * np.diag(gram) / n] = np.nan
    return cov / np.outer(sd, sd)


def redundancy(codes, n, tokens, latents, mass, cluster, W_dec, name_tokens):
    """Latent x latent correlation of codes over token positions: how many distinct patterns do the latents hold?

    codes csr (tokens,d_sae) of the sample, n its valid tokens; latents: scored ones. Effective rank: exp of the entropy
    of the correlation matrix's normalised eigenvalues (Roy & Vetterli 2007). "together": the latents that correlate with more
    than PARTNERS others above TOGETHER: dozens that tell one fact.
    """
    corr = correlation_matrix(codes[:, latents], n)
    varies = np.isfinite(np.diag(corr))
    latents, corr = latents[varies], corr[np.ix_(varies, varies)]
    if len(latents) < 2:
        return {"latents": len(latents), "share_above_0.9": None, "effective_rank": None, "best_partner_histogram": None,
                "together": [], "top_pairs": [], "matrix": None}
    eigen = torch.linalg.eigvalsh(torch.from_numpy(corr)).clamp_min(1e-15)
    p = eigen / eigen.sum()
    others = corr - 2 * np.eye(len(corr))   # a latent is not its own partner
    best = others.max(1)
    counts, edges = np.histogram(best.clip(-1, 1), bins=20, range=(-1, 1))
    i, j = np.triu_indices(len(corr), 1)
    top = np.argpartition(-corr[i, j], min(20, len(i) - 1))[:20]
    top = top[np.lexsort((j[top], i[top], -corr[i[top], j[top]]))]
    columns, unit = codes.tocsc(), F.normalize(W_dec, dim=1)
    pairs = []
    for a, b in zip(i[top], j[top]):
        la, lb = int(latents[a]), int(latents[b])
        pairs.append({"latents": [la, lb], "corr": corr[a, b], "decoder_cosine": (unit[la] @ unit[lb]).item(),
                      "tokens": [name_tokens(top_tokens(columns, tokens, x)) for x in (la, lb)]})
    shown = np.argsort(-mass[latents], kind="stable")[:80]          # for the picture: the heaviest, ordered by cluster
    shown = shown[np.lexsort((latents[shown], cluster[latents[shown]]))]
    return {"latents": len(latents), "share_above_0.9": (best > REDUNDANT).mean(),
            "effective_rank": math.exp(-(p * p.log()).sum().item()),
            "best_partner_histogram": {"edges": edges, "counts": counts},
            "together": latents[(others > TOGETHER).sum(1) > PARTNERS], "top_pairs": pairs,
            "matrix": {"latents": latents[shown], "clusters": cluster[latents[shown]],
                       "corr": plain(corr[np.ix_(shown, shown)], 3)}}


def pw_mcc(decoders):
    """Mean cosine of decoder rows matched one to one (Hungarian), for each pair of seeds. None above 8,192 latents."""
    unit = [F.normalize(W.detach().float().cpu(), dim=1) for W in decoders]
    if len(unit) < 2 or len(unit[0]) > 8192:   # the matching is cubic
        return None
    cosines = [(a @ b.T).numpy() for a, b in itertools.combinations(unit, 2)]
    return [float(c[linear_sum_assignment(c, maximize=True)].mean(dtype=np.float64)) for c in cosines]


# ------------------------------------------------------------------------------------------------ what latents are for


def token_classes(strings):
    """Four yes/no properties of tokens, {name: (n,) bool}. A word's first token starts with a space."""
    bare = [s.strip() for s in strings]
    return {"word_part": np.array([s[:1] == b[:1] and b.isalpha() for s, b in zip(strings, bare)]),
            "punctuation": np.array([bool(b) and not any(c.isalnum() for c in b) for b in bare]),
            "digit": np.array([b.isdigit() for b in bare]),
            "capitalised": np.array([b[:1].isupper() for b in bare])}


def strongest_latent(codes, latents):
    """(n,) which of `latents` is most active at each token, -1 where none fires."""
    part = codes[:, latents]
    out, rows = np.full(part.shape[0], -1), np.flatnonzero(np.diff(part.indptr))
    if len(rows):
        peak = np.maximum.reduceat(part.data, part.indptr[rows])
        row = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
        where = np.flatnonzero(part.data == np.repeat(peak, np.diff(part.indptr)[rows]))[::-1]
        out[row[where]] = part.indices[where]   # reversed, so that the first of equals stays
    return out


def mutual_information(codes, latents, labels):
    """Adjusted mutual information of "which of these latents is the strongest" with each labelling of tokens.

    labels {name: (n,) int, -1 = leave out, or None}. On 10,000 tokens at most: its exact chance term is slow.
    """
    strongest, out = strongest_latent(codes, latents), {}
    for name, label in labels.items():
        keep = np.flatnonzero((strongest >= 0) & (label >= 0)) if label is not None else np.empty(0, int)
        keep = keep[::max(1, math.ceil(len(keep) / 10_000))]
        out[name] = adjusted_mutual_info_score(label[keep], strongest[keep]) if len(keep) > 100 else math.nan
    return out


def cluster_latents(blocks):
    """K-means on blocks of features [(n,width)], each column standardised, each block of equal weight.

    k in 4..8 with the best silhouette. -> labels (n,), by size; silhouette; (n,2) principal coordinates for a picture.
    """
    z = [(b - b.mean(0)) / np.where(b.std(0) > 1e-9, b.std(0), 1) / math.sqrt(b.shape[1]) for b in blocks]
    z, best = np.concatenate(z, 1), (-2, None)
    with threadpool_limits(1), warnings.catch_warnings():   # one thread: sums in a fixed order, so the same clusters
        warnings.simplefilter("ignore")                     # fewer distinct points than clusters is fine here
        for k in range(4, 9):
            labels = KMeans(k, n_init=4, random_state=0).fit_predict(z)
            if 1 < len(set(labels)) < len(z):
                score = silhouette_score(z, labels, sample_size=min(len(z), 3000), random_state=0)
                best = max(best, (score, labels), key=lambda pair: pair[0])
    score, labels = best
    if labels is None:
        return np.zeros(len(z), int), math.nan, z[:, :2]
    order = np.argsort(-np.bincount(labels), kind="stable")
    centred = z - z.mean(0)
    return np.argsort(order)[labels], score, centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T


def cluster_name(rho, eta2_excess, lags):
    """Name of a cluster from its mean profile; the thresholds are ours, the profile is printed beside the name."""
    far = rho[max(k for k, lag in enumerate(lags) if lag <= 32)]
    if eta2_excess > 0.05:              # position alone explains > 5 % more of the variance than chance
        return "positional"
    if far > 0.02 and far > rho[0] / 4:  # still there 32 tokens on: what the document is about
        return "document/topic"
    return "segment" if rho[0] > 0.1 else "local/token"   # else: lasts a phrase, or belongs to single tokens


def clusters(codes, latents, stats, topic, token, tokens, mass, groups, lags, name_tokens):
    """Latents clustered by activation pattern. -> (JSON block, (d_sae,) cluster of each latent, -1 if not scored)

    Pattern: firing rate, span, autocorrelation at each lag and within the segment, firing by eighths of the context and
    eta^2 of position, and, where documents carry topics, how far its mass by topic is from the corpus (nats).
    """
    n_topic = int(topic.max()) + 1 if topic is not None else 0
    pick = lambda name: np.nan_to_num(stats[name][..., latents])
    blocks = [np.log10(np.maximum(pick("rate"), 1e-9))[:, None], np.log(np.maximum(pick("span"), 1))[:, None],
              np.concatenate([pick("autocorr"), pick("autocorr_within")]).T,
              np.concatenate([pick("eighths"), pick("eta2")[None]]).T]
    topic_share = np.full(len(latents), math.nan)
    if n_topic:
        one_hot = sparse.csr_matrix((topic >= 0, (np.maximum(topic, 0), np.arange(len(topic)))), dtype=np.float64)
        by_topic = np.asarray((one_hot @ abs(codes[:, latents])).toarray()).T
        q = by_topic / np.maximum(by_topic.sum(1, keepdims=True), 1e-12)
        corpus = np.bincount(topic[topic >= 0], minlength=n_topic) / (topic >= 0).sum()
        topic_share = q.max(1)
        blocks.append((q * np.log(np.maximum(q, 1e-12) / np.maximum(corpus, 1e-12))).sum(1)[:, None])
    labels, silhouette, xy = cluster_latents(blocks)
    columns, listed = codes.tocsc(), []
    for c in range(labels.max() + 1):
        mine = latents[labels == c]
        rho, within = pick("autocorr")[:, labels == c].mean(1), pick("autocorr_within")[:, labels == c].mean(1)
        eta2 = pick("eta2")[labels == c].mean()
        ami = mutual_information(codes, mine, {"topic": topic, "token": token})
        heavy = mine[np.argsort(-mass[mine], kind="stable")[:3]]
        listed.append({"name": cluster_name(rho, eta2 - stats["eta2_chance"], lags), "size": len(mine),
                       "mass_share": mass[mine].sum() / mass.sum(), "rate": pick("rate")[labels == c].mean(),
                       "span": pick("span")[labels == c].mean(), "autocorr": rho, "autocorr_within": within,
                       "position": pick("eighths")[:, labels == c].mean(1), "eta2": eta2,
                       "topic_share": topic_share[labels == c].mean(), "ami_topic": ami["topic"], "ami_token": ami["token"],
                       "examples": [{"latent": i, "tokens": name_tokens(top_tokens(columns, tokens, i))} for i in heavy]})
    whole = {g: mutual_information(codes, np.arange(codes.shape[1])[part], {"topic": topic, "token": token})
             for g, part in groups.items()}
    of = np.full(codes.shape[1], -1)
    of[latents] = labels
    return {"silhouette": silhouette, "list": listed, "ami": whole}, of, xy


def sparse_probes(train, test, y_train, y_test, groups):
    """AUROC on test of a logistic probe on the k latents whose class means differ most on train (Gurnee et al. 2023).

    train, test csr (n,d_sae), y bool. -> {group: {k: AUROC}}, or None when a side has fewer than 2 examples of a class.
    """
    if min(y_train.sum(), (~y_train).sum(), y_test.sum(), (~y_test).sum()) < 2:
        return None
    gap = np.asarray(train[y_train].mean(0) - train[~y_train].mean(0)).ravel()
    out = {}
    for name, part in groups.items():
        ranked = np.arange(len(gap))[part][np.argsort(-np.abs(gap[part]), kind="stable")[:max(PROBE_K)]]
        a, b = train[:, ranked].toarray(), test[:, ranked].toarray()
        scale = np.where(a.std(0) > 0, a.std(0), 1)
        fits = {k: LogisticRegression(max_iter=300).fit(a[:, :k] / scale[:k], y_train) for k in PROBE_K if len(ranked)}
        out[name] = {str(k): roc_auc_score(y_test, fit.decision_function(b[:, :k] / scale[:k])) for k, fit in fits.items()}
    return out


def probes(codes, doc, topic, topic_names, tokens, text, groups):
    """k-sparse probes: topic of a document from its mean code (should persist), class of a token from its code (should not).

    Documents are split 70/30 before anything else, so no document has tokens on both sides. One probe per class against
    the rest; the value is the mean AUROC over classes. Tokens: 8,000 a side at most.
    """
    inside = np.flatnonzero(doc >= 0)
    ids, index = np.unique(doc[inside], return_inverse=True)
    in_train = np.random.default_rng(0).permutation(len(ids)) < 0.7 * len(ids)
    results = {"topic": {}, "token": {}}
    if topic is not None:
        pool = sparse.csr_matrix((1 / np.bincount(index)[index], (index, inside)), shape=(len(ids), codes.shape[0]))
        mean = (pool @ codes).tocsr()
        label = np.full(len(ids), -1)
        label[index] = topic[inside]
        for t, name in enumerate(topic_names):
            y = label == t
            if y.sum() >= 10:
                results["topic"][name] = sparse_probes(mean[in_train], mean[~in_train], y[in_train], y[~in_train], groups)
    if tokens is not None:
        sides = [inside[in_train[index]], inside[~in_train[index]]]
        train, test = (side[::max(1, math.ceil(len(side) / 8000))] for side in sides)
        ids, which = np.unique(tokens, return_inverse=True)
        for name, member in token_classes([text(i) for i in ids.tolist()]).items():
            y = member[which]
            results["token"][name] = sparse_probes(codes[train], codes[test], y[train], y[test], groups)
    results = {kind: {name: r for name, r in found.items() if r} for kind, found in results.items()}
    mean = {kind: {g: {str(k): np.mean([r[g].get(str(k), math.nan) for r in found.values()]) if found else math.nan
                       for k in PROBE_K} for g in GROUPS} for kind, found in results.items()}
    return mean | {"by_class": {kind: {n: r["whole"] for n, r in found.items()} for kind, found in results.items()}}


# ------------------------------------------------------------------------------------------------ one pass over the rows


class Scorer:
    """All streaming sums of one SAE."""

    def __init__(self, sae, n_high, lags, context):
        self.sae, self.context = sae, context
        d_sae = sae.W_dec.shape[0]
        self.n_high = n_high
        self.groups = {"whole": slice(0, d_sae), "high": slice(0, n_high), "low": slice(n_high, d_sae)}
        self.fidelity, self.sample = Fidelity(sae.W_dec.detach()), Sample()
        self.lags, self.null_lags = LagSums(d_sae, lags, context), LagSums(d_sae, lags, context)
        self.neighbours, self.null_neighbours = Neighbours(n_high), Neighbours(n_high)

    def update(self, x, seg, shuffled):
        """x (B,T,d_in) in the model's dtype; seg (B*T,); shuffled (B*T,) permutation of tokens inside their segments."""
        valid = torch.from_numpy(seg >= 0).to(x.device)
        acts, info = self.sae.encode(x.float())
        x_hat = self.sae.decode(acts, info).reshape(-1, x.shape[-1])
        if not torch.isfinite(x_hat).all():
            raise ValueError("the SAE gives NaN or infinity on these activations: its weights are broken or they are")
        flat, acts = x.reshape(-1, x.shape[-1]).float(), acts.reshape(len(seg), -1) * valid[:, None]
        codes = sparse.csr_matrix(acts.cpu().numpy()).astype(np.float64)
        self.fidelity.update(flat[valid], x_hat[valid], codes, np.arange(len(seg)) // self.context)
        raw = flat.cpu().numpy()
        self.lags.update(codes, seg)
        self.neighbours.update(codes, raw, seg, self.context)
        self.null_lags.update(codes[shuffled], seg)
        self.null_neighbours.update(codes[shuffled], raw[shuffled], seg, self.context)
        self.sample.update(codes, x)


def batches(exp, cfg, model, rows, acts):
    """Yields (x (B,T,d_in), segment ids) over the rows, BATCH_ROWS at a time, from the model or, if not None, from acts."""
    for start in tqdm(range(0, len(rows.doc_id), BATCH_ROWS), desc="activations and codes", leave=False, disable=None):
        part = slice(start, start + BATCH_ROWS)
        seg = segment_ids(rows.doc_id[part], rows.valid[part])
        if acts is not None:
            x = torch.from_numpy(np.array(acts[part]))
            yield x.view(torch.bfloat16) if acts.dtype == np.uint16 else x, seg   # numpy has no bfloat16
        else:
            ids = torch.from_numpy(rows.tokens[part]).to(next(model.parameters()).device)
            yield exp.residuals(model, ids, cfg.layer), seg


@torch.inference_mode()
def stream(exp, cfg, model, rows, acts, saes, n_high):
    """One pass over the variance rows for all seeds. -> (list of Scorer, LagSums of the raw activations)"""
    context = rows.doc_id.shape[1]
    lags = tuple(lag for lag in LAGS if lag < context)
    scorers, raw, rng = [Scorer(sae, n_high, lags, context) for sae in saes], None, np.random.default_rng(0)
    device = saes[0].W_dec.device
    for x, seg in batches(exp, cfg, model, rows, acts):
        if not (seg >= 0).any():   # nothing but special tokens: no sums, but the sample stays in step with the rows
            for scorer in scorers:
                scorer.sample.update(sparse.csr_matrix((len(seg), scorer.sae.W_dec.shape[0])), x)
            continue
        x, shuffled = x.to(device), permute_segments(seg, rng)   # the same permutation for every seed and run
        raw = raw or LagSums(x.shape[-1], lags, context)
        flat = x.reshape(-1, x.shape[-1]).double().cpu().numpy() * (seg >= 0)[:, None]
        raw.update(sparse.csr_matrix(flat), seg)
        for scorer in scorers:
            scorer.update(x, seg, shuffled)
    if raw is None:
        raise ValueError("the rows hold no ordinary token to score")
    return scorers, raw


def consistency_json(s, raw, rows, counts, hashes, text):
    """Every consistency number of one seed; each mean with its null (tokens permuted inside segments) beside it."""
    lags, fires, context = s.lags.lags, s.fidelity.fires, counts["context"]
    mass = fires.astype(float)   # firing mass: how often, not how strongly, so that no scale enters
    keep = fires >= MIN_FIRINGS
    out = {"hashes": hashes, "counts": counts | {"sample_rows": s.sample.rows}, "lags": lags,
           "groups": {g: {"latents": len(keep[p]), "scored": keep[p].sum(), "mass_share": ratio(mass[p].sum(), mass.sum())}
                      for g, p in s.groups.items()}}
    for suffix, sums, near in (("_null", s.null_lags, s.null_neighbours), ("", s.lags, s.neighbours)):
        own = {"autocorr": sums.autocorr(), "autocorr_within": sums.autocorr_within(), "persistence": sums.persistence(),
               "kappa": sums.kappa(fires), "span": sums.span(fires), "position_invariance": 1 - sums.eta2()}
        out |= {name + suffix: group_means(value, keep, mass, s.groups) for name, value in own.items()}
        out["support_jaccard" + suffix] = near.values(near.jaccard)
        out["smoothness_S" + suffix] = near.values(near.smoothness)
        for g, part in s.groups.items():
            spans = own["span"][part][keep[part] & np.isfinite(own["span"][part])]
            out["span" + suffix][g]["top100"] = np.sort(spans)[-100:].mean() if len(spans) else math.nan
    for name, value in (("autocorr_raw", raw.autocorr()), ("autocorr_within_raw", raw.autocorr_within())):   # the ceiling
        out[name] = group_means(value, raw.variance >= 0, raw.variance, {"raw": slice(None)})["raw"]
    out["decay_length"] = {g: {k: decay_length(v, lags) for k, v in out["autocorr"][g].items()} for g in GROUPS}
    out["decay_length_raw"] = {k: decay_length(v, lags) for k, v in out["autocorr_raw"].items()}
    eighth = np.arange(context) * 8 // context
    by_eighth = np.stack([np.abs(s.lags.by_position[eighth == e]).sum(0) / max(s.lags.position_tokens[eighth == e].sum(), 1)
                          for e in range(8)])
    own |= {"rate": fires / s.fidelity.tokens, "eighths": by_eighth / np.maximum(by_eighth.sum(0), 1e-12),
            "eta2": 1 - own["position_invariance"], "eta2_chance": (context - 1) / s.fidelity.tokens}
    out |= sample_blocks(s, raw, rows, own, keep, mass, text)
    counted, edges = np.histogram(np.log10(own["rate"][fires > 0]), bins=24, range=(-6, 0))
    out["density_histogram"] = {"log10_edges": edges, "counts": counted, "dead": (fires == 0).sum()}
    out = plain(out, 6)
    reasons = {key: NULL_REASONS.get(key, NULL_REASONS["default"]) for key, value in out.items() if has_null(value)}
    return out | {"notes": reasons}


NULL_REASONS = {   # why a value may be null, by the top-level key it stands under
    "default": f"no pair of tokens, or no latent with {MIN_FIRINGS} firings that varies",
    "decay_length": "the correlation is not above 0 at lag 1, or never falls below its value there / e",
    "decay_length_raw": "the correlation is not above 0 at lag 1, or never falls below its value there / e",
    "position_corr": "no row holds the two positions inside one document, or no latent was scored",
    "clusters": "no topic labels, no token identities, or fewer than 10 latents were scored",
    "probes": "no topic labels, no tokens, or too few examples of a class on a side of the split"}


def timeline(codes, seg, rows, context, text, n=12):
    """The codes of the n most active latents along one passage: the first row that is one document for half its length."""
    if rows.tokens is None:
        return None
    longest = [np.bincount(s[s >= 0], minlength=1) for s in seg.reshape(-1, context)]
    row = next((i for i, sizes in enumerate(longest) if sizes.max() >= context / 2), int(np.argmax([s.max() for s in longest])))
    at = row * context + np.flatnonzero(seg[row * context:(row + 1) * context] == longest[row].argmax())
    passage = codes[at].toarray()
    latents = np.sort(np.argsort(-np.abs(passage).sum(0), kind="stable")[:n])
    return {"row": row, "tokens": [text(i) for i in rows.tokens.ravel()[at]], "latents": latents,
            "codes": plain(passage[:, latents].T, 3), "doc": f"row {row}" + (f", {rows.topics[rows.doc_id.ravel()[at[0]]]}" if rows.topics else "")}


def sample_blocks(s, raw, rows, own, keep, mass, text):
    """The blocks that need the codes twice: position matrices, clusters, redundancy, probes, table of latents."""
    part = slice(0, s.sample.rows)
    seg, codes = segment_ids(rows.doc_id[part], rows.valid[part]), sparse.vstack(s.sample.codes).tocsr()
    varies, lags = keep & (s.lags.variance > 0), s.lags.lags
    doc = np.where(seg >= 0, rows.doc_id[part].ravel(), -1)
    tokens = rows.tokens[part].ravel() if rows.tokens is not None else None
    names, topic, token = [], None, None
    if rows.topics is not None:   # a document may go without a label
        names, number = np.unique([label or "" for label in rows.topics], return_inverse=True)
        topic = np.where((doc >= 0) & (names[number] != "")[doc], number[doc], -1)
    if tokens is not None:   # identity of the 100 commonest tokens; rarer ones carry no measurable information
        _, where, count = np.unique(tokens[doc >= 0], return_inverse=True, return_counts=True)
        rank = np.argsort(np.argsort(-count, kind="stable"))[where]
        token = np.full(len(tokens), -1)
        token[doc >= 0] = np.where(rank < 100, rank, -1)

    position, toeplitz = {"step": math.ceil(s.context / MATRIX_SIDE)}, {}
    x = (block.reshape(-1, block.shape[-1]).double().numpy() for block in s.sample.x)
    for name, blocks, sums, columns in (("codes", s.sample.codes, s.lags, varies), ("raw", x, raw, raw.variance > 0)):
        matrix, count = position_matrix((b[:, columns] for b in blocks), seg, sums.mean[columns],
                                        np.sqrt(sums.variance[columns]), s.context)
        position[name], toeplitz[name] = plain(matrix, 5), toeplitzness(matrix, count)

    name_tokens = lambda ids: [text(i) for i in ids]
    latents, of, xy = np.flatnonzero(varies), np.full(len(keep), -1), np.zeros((varies.sum(), 2))
    block = {"silhouette": None, "list": [], "ami": None}
    if len(latents) >= 10:
        block, of, xy = clusters(codes, latents, own, topic, token, tokens, mass, s.groups, lags, name_tokens)
    W_dec, n = s.sae.W_dec.detach().float().cpu(), int((seg >= 0).sum())
    listed = np.sort(np.argsort(-mass[latents], kind="stable")[:MAX_COMPARED])   # the heaviest of a very large dictionary
    at, lag16 = latents[listed], max(k for k, lag in enumerate(lags) if lag <= 16)
    table = {"index": at, "rate": own["rate"][at], "mass": s.fidelity.mass[at], "span": own["span"][at],
             "autocorr_1": own["autocorr"][0, at], "autocorr_16": own["autocorr"][lag16, at],
             "within_1": own["autocorr_within"][0, at], "eta2": own["eta2"][at], "cluster": of[at],
             "x": xy[listed, 0], "y": xy[listed, 1]}
    redundant = redundancy(codes, n, tokens, at, mass, of, W_dec, name_tokens)
    crowd = np.isin(np.arange(len(keep)), redundant["together"])   # apart: the scores without them
    redundant["together_mass_share"] = ratio(mass[crowd].sum(), mass.sum())
    redundant["apart"] = {name: group_means(own[name][0], keep & ~crowd, mass, {"whole": slice(None)})["whole"]
                          for name in ("autocorr", "autocorr_within")}
    return {"position_corr": position | {"toeplitzness": toeplitz}, "clusters": block, "redundancy": redundant,
            "latents": {k: plain(v, 3) for k, v in table.items()}, "timeline": timeline(codes, seg, rows, s.context, text),
            "probes": probes(codes, doc, topic, names, tokens, text, s.groups)}


# ------------------------------------------------------------------------------------------------ scoring a run


def dataset_name(cfg):
    """The key of final_info.json."""
    return Path(cfg.acts).stem if getattr(cfg, "acts", "") else str(getattr(cfg, "dataset", "") or "default")


def read_config(run_dir, exp, dtype=None, device=None):
    """The run's Config, with the model's dtype or the device replaced on request."""
    fields = read_json(Path(run_dir) / "config.json")
    fields |= {k: v for k, v in (("dtype", dtype), ("device", device)) if v}
    try:
        return exp.Config(**fields)
    except TypeError as err:
        raise ValueError(f"{run_dir}/config.json does not fit the Config of its experiment.py ({err})") from None


def find_seeds(run_dir, cfg):
    """The run's seed_K directories in order of K; all of them must be there."""
    found = sorted(Path(run_dir).glob("seed_*"), key=lambda p: int(p.name[5:]) if p.name[5:].isdigit() else -1)
    found = [p for p in found if (p / "sae_weights.safetensors").is_file()]
    if len(found) != cfg.n_seeds:
        raise ValueError(f"{run_dir} holds trained weights (seed_*/sae_weights.safetensors) for {len(found)} "
                         f"of its {cfg.n_seeds} seeds")
    return found


def headline(core, consistency):
    """The flat names of final_info.json; a null is left out by the caller."""
    ours, c = core["eval_result_unstructured"]["ours"], consistency
    return {**{k: ours[k] for k in CORE_KEYS}, "autocorr_1": c["autocorr"]["whole"]["mean"][0],
            "autocorr_1_mass": c["autocorr"]["whole"]["mass"][0],
            "autocorr_within_1": c["autocorr_within"]["whole"]["mean"][0], "support_jaccard": c["support_jaccard"]["whole"],
            "kappa_1": c["kappa"]["whole"]["mean"][0], "smoothness_S": c["smoothness_S"]["whole"],
            "span": c["span"]["whole"]["mean"], "probe_topic_5": c["probes"]["topic"]["whole"]["5"],
            "probe_token_5": c["probes"]["token"]["whole"]["5"], "together_mass_share": c["redundancy"]["together_mass_share"],
            "autocorr_1_apart": c["redundancy"]["apart"]["autocorr"]["mean"],
            "autocorr_1_mass_apart": c["redundancy"]["apart"]["autocorr"]["mass"],
            "autocorr_within_1_apart": c["redundancy"]["apart"]["autocorr_within"]["mean"]}


def summarise(per_seed, mcc):
    """Means, standard errors (ddof 1; none for a single seed) and raw values. A metric null for a seed is left out."""
    raw = {k: [h[k] for h in per_seed] for k in per_seed[0]}
    raw = {k: v for k, v in raw.items() if None not in v}
    n = len(per_seed)
    stderrs = {k: float(np.std(v, ddof=1) / math.sqrt(n)) for k, v in raw.items()} if n > 1 else {}
    if mcc:
        raw["pw_mcc"] = mcc   # one value a PAIR of seeds; pairs share seeds, so no standard error
    return {"means": {k: float(np.mean(v)) for k, v in raw.items()}, "stderrs": stderrs, "final_info_dict": raw}


def load_inputs(exp, cfg, rows_file, reconstruction_rows):
    """The rows and what yields their activations. -> (model or None, id -> text, CE rows, other rows, acts or None)

    The variance rows' activations come from the cache that the run's experiment.py keeps; the model is loaded only if
    they cannot or if there are CE rows."""
    if getattr(cfg, "acts", ""):
        if rows_file:
            raise ValueError("--rows needs a language model, but this run was trained on an activations file")
        x, doc_id, valid = exp.load_acts(cfg, "eval")
        return None, None, Rows(None, doc_id[:0], valid[:0], None), Rows(None, doc_id, valid, None), x
    tokens = read_rows(rows_file) if rows_file else None
    caches = hasattr(exp, "fits_cache")   # an older experiment.py does not
    config, tokenizer = exp.load_tokenizer(cfg) if caches else ((lm := exp.load_lm(cfg))[0].config, lm[1])
    rows = label_tokens(tokens, tokenizer) if rows_file else Rows(*exp.load_rows(cfg, tokenizer, "eval"))
    check_tokens(rows.tokens, config.get_text_config(), tokenizer)
    if not 0 <= reconstruction_rows < len(rows.tokens):
        raise ValueError(f"{reconstruction_rows} rows for CE/KL leave none of the {len(rows.tokens)} rows for the other metrics")
    for_ce, rest = (Rows(rows.tokens[p], rows.doc_id[p], rows.valid[p], rows.topics)
                    for p in (slice(0, reconstruction_rows), slice(reconstruction_rows, None)))
    cached = caches and not rows_file and exp.fits_cache(cfg, config, rest.tokens)
    acts = exp.cached_residuals(cfg, rest.tokens, BATCH_ROWS) if cached else None
    model = None if cached and not reconstruction_rows else exp.load_lm(cfg)[0]
    return model, token_text(tokenizer), for_ce, rest, acts


def evaluate_run(run_dir, exp, *, rows_file=None, reconstruction_rows=None, dtype=None, out=None, device=None):
    """Scores every seed of a run and writes core.json, consistency.json and final_info.json; returns final_info's dict.

    exp: the module that made the run (Config, load_lm, load_tokenizer, load_sae, load_rows, residuals,
    fits_cache, cached_residuals, decoder_blocks, load_acts, pick_device, pick_dtype).
    The files go into `out` if given, else into the run. All seeds share one pass over the rows.
    """
    run_dir, out = Path(run_dir), Path(out or run_dir)
    cfg = read_config(run_dir, exp, dtype, device)
    seed_dirs = find_seeds(run_dir, cfg)
    n_ce = cfg.reconstruction_rows if reconstruction_rows is None else reconstruction_rows
    weights = [sha256(d / "sae_weights.safetensors") for d in seed_dirs]
    saes = [exp.load_sae(d) for d in seed_dirs]    # before the slow part: a broken file is refused at once
    model, text, ce_rows, rows, acts = load_inputs(exp, cfg, rows_file, n_ce)
    where = "cpu" if rows.tokens is None else exp.pick_device(cfg.device)
    if where != "cpu":
        saes = [exp.load_sae(d, device=where) for d in seed_dirs]
    fraction = cfg.temporal_fraction if 0 < cfg.temporal_fraction < 1 else 0.2
    n_high = round(fraction * saes[0].W_dec.shape[0])

    behaviour, notes = [None] * len(saes), {}
    if rows.tokens is None:
        notes["ce_loss_score, kl_div_score"] = "scored on given activations: there is no language model to run"
    elif not ce_rows.valid.any():
        notes["ce_loss_score, kl_div_score"] = "no row with an ordinary token was set aside for them"
    else:
        block = exp.decoder_blocks(model)[cfg.layer]
        behaviour = lm_behaviour(model, block, saes, ce_rows.tokens, ce_rows.valid)
    scorers, raw = stream(exp, cfg, model, rows, acts, saes, n_high)

    context, seg = rows.doc_id.shape[1], segment_ids(rows.doc_id, rows.valid)
    name = Path(rows_file).stem if rows_file else dataset_name(cfg)
    used = str(acts.dtype if rows.tokens is None else exp.pick_dtype(cfg.dtype, where)).removeprefix("torch.")
    counts = {"rows": len(rows.doc_id), "reconstruction_rows": len(ce_rows.doc_id), "context": context,
              "tokens": int(rows.valid.sum()), "documents": len(np.unique(rows.doc_id[rows.valid])),
              "segments": len(np.unique(seg[seg >= 0]))}
    hashed = (rows.doc_id, acts) if rows.tokens is None else (np.concatenate([ce_rows.tokens, rows.tokens]).astype(np.int64),)
    rows_hash = sha256(*(np.asarray(part) for part in hashed))
    files, heads = {}, []
    for seed_dir, weight, s, lm in zip(seed_dirs, weights, scorers, behaviour):
        hashes = {"evaluate": SOURCE_SHA256, "rows": rows_hash, "weights": weight}
        core = core_json(cfg, seed_dir, s.sae, s.fidelity, lm, counts, hashes, name, used, dict(notes))
        core_notes = core["eval_result_unstructured"]["notes"]
        if has_null(core["eval_result_metrics"]) and not core_notes:
            core_notes["eval_result_metrics"] = "null is 0/0: activations that do not vary, or an all-zero reconstruction"
        consistency = consistency_json(s, raw, rows, counts, hashes, text)
        home = out if cfg.n_seeds == 1 else out / seed_dir.name
        files |= {home / "core.json": core, home / "consistency.json": consistency}
        heads.append(headline(core, consistency))
    mcc = pw_mcc([s.W_dec for s in saes])
    final = {name: summarise(heads, mcc)}
    write_json(files | {out / "final_info.json": final})
    return final


def print_scores(final):
    """The greppable block at the end of a run."""
    print("---")
    for block in final.values():
        for name, value in block["means"].items():
            print(f"{name}: {value:.6g}")


# ------------------------------------------------------------------------------------------------ reading one latent


@torch.inference_mode()
def feature_report(run_dir, exp, latent, rows_file=None, dtype=None, device=None, passages=8):
    """Prints one latent of the first seed: numbers, top tokens through the unembedding, passages with «firing» tokens."""
    cfg = read_config(run_dir, exp, dtype, device)
    seed_dir = find_seeds(run_dir, cfg)[0]
    sae = exp.load_sae(seed_dir)
    d_sae = sae.W_dec.shape[0]
    if not 0 <= latent < d_sae:
        raise ValueError(f"latent {latent} is out of range: this dictionary holds 0 to {d_sae - 1}")
    model, text, _, rows, acts = load_inputs(exp, cfg, rows_file, cfg.reconstruction_rows)
    f = np.zeros(rows.doc_id.size)   # this latent alone, at every token
    end = 0
    for x, seg in batches(exp, cfg, model, rows, acts):
        codes, _ = sae.encode(x.float().cpu())
        f[end:end + len(seg)] = codes[..., latent].reshape(-1).numpy() * (seg >= 0)
        end += len(seg)
    print(f"latent {latent} of {run_dir} ({seed_dir.name})")
    print(f"  fires on {np.mean(f[rows.valid.ravel()] != 0):.4%} of {rows.valid.sum()} tokens, largest activation {f.max():.4g}")
    scores = [p for p in (Path(run_dir), seed_dir) if (p / "consistency.json").exists()]
    table = read_json(scores[0] / "consistency.json") if scores else None
    if table and latent in table["latents"]["index"]:
        at = table["latents"]["index"].index(latent)
        one = {k: v[at] for k, v in table["latents"].items()}
        listed = table["clusters"]["list"]
        cluster = f"{one['cluster']} ({listed[one['cluster']]['name']})" if listed else "none"
        print(f"  span {one['span']} tokens, autocorrelation {one['autocorr_1']} at lag 1 and {one['autocorr_16']} at lag 16, "
              f"{one['within_1']} within documents, position eta^2 {one['eta2']}, cluster {cluster}")
    if rows.tokens is None:
        return
    model = model or exp.load_lm(cfg)[0]   # for the unembedding
    show = lambda i: text(int(i)).replace("\n", "\\n")
    head = model.get_output_embeddings()
    if head is not None:
        logits = head.weight.float().cpu() @ sae.W_dec[latent].float().cpu()
        print("  pushes up", "  ".join(repr(show(i)) for i in logits.topk(10).indices.tolist()))
    grid = f.reshape(rows.doc_id.shape)
    for row in np.argsort(-grid.max(1), kind="stable")[:passages]:
        if grid[row].max() <= 0:
            break
        peak = int(grid[row].argmax())
        here = [t for t in range(max(0, peak - 24), min(grid.shape[1], peak + 25)) if rows.doc_id[row, t] == rows.doc_id[row, peak]]
        marked = [f"«{show(rows.tokens[row, t])}»" if grid[row, t] else show(rows.tokens[row, t]) for t in here if rows.valid[row, t]]
        topic = f"  [{rows.topics[rows.doc_id[row, peak]]}]" if rows.topics is not None else ""
        print(f"  {grid[row, peak]:8.4g}{topic} {''.join(marked).replace('»«', '·')}")


# ------------------------------------------------------------------------------------------------ comparing runs


def compare(run_dirs):
    """Prints scores on disk side by side; columns after the first also show the difference to it, paired by seed."""
    infos, seeds, judges = [], [], []
    for run in run_dirs:
        infos.append(next(iter(read_json(run / "final_info.json").values())))
        config = read_json(run / "config.json")
        seeds.append((config.get("seed", 0), config.get("n_seeds", 1)))
        scored = sorted([run / "consistency.json", *sorted(run.glob("seed_*/consistency.json"))], key=lambda p: not p.exists())[0]
        hashes = read_json(scored)["hashes"] if scored.exists() else None   # of the grid git keeps the headline numbers only
        judges.append(hashes and (hashes["evaluate"], hashes["rows"]))
    names = list(dict.fromkeys(name for info in infos for name in info["means"]))
    title = [run.name for run in run_dirs] if len({run.name for run in run_dirs}) == len(run_dirs) else list(map(str, run_dirs))
    table = [["", *title, *(f"{t} - {title[0]}" for t in title[1:])]]
    for name in names:
        line = [name]
        for info in infos:
            error = f" ± {info['stderrs'][name]:.2g}" if name in info["stderrs"] else ""
            line.append(f"{info['means'][name]:.4g}{error}" if name in info["means"] else "-")
        first = infos[0]["final_info_dict"].get(name)
        for info, seed in zip(infos[1:], seeds[1:]):
            other = info["final_info_dict"].get(name)
            if not first or not other or name == "pw_mcc":
                line.append("-")
                continue
            paired = seed == seeds[0] and len(first) == len(other) > 1
            gap = np.subtract(other, first) if paired else np.mean(other) - np.mean(first)
            line.append(f"{np.mean(gap):+.4g}" + (f" ± {np.std(gap, ddof=1) / math.sqrt(len(gap)):.2g}" if paired else ""))
        table.append(line)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip())
    l0 = [info["means"].get("l0") for info in infos]
    for run, value, judge in zip(title[1:], l0[1:], judges[1:]):
        if l0[0] and value and abs(value / l0[0] - 1) > 0.01:
            print(f"note: {run} has L0 {value:.4g} against {l0[0]:.4g}: not within 1 %, so smoothness and "
                  "autocorrelation are not comparable")
        if not (judge and judges[0]):
            print(f"note: without both consistency.json nothing shows that {run} and {title[0]} were scored alike")
        elif judge != judges[0]:
            print(f"note: {run} was scored by another evaluate.py or on other rows than {title[0]}")


# ------------------------------------------------------------------------------------------------ command line


def load_experiment(run_dir, trust):
    """The experiment.py saved in a run, as a module; executed only if it is the file whose hash the run recorded."""
    path = run_dir / "experiment.py"
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no experiment.py to read its weights with")
    recorded = read_json(run_dir / "environment.json").get("experiment_sha256")
    same = sha256(path) == recorded
    if not same and not trust:
        raise ValueError(f"{path} is not the source that this run recorded (its sha256 differs): "
                         "read it, then pass --trust to execute it")
    print(f"scoring through {path} ({'sha256 as recorded' if same else 'NOT as recorded, trusted by --trust'})", file=sys.stderr)
    sys.modules.setdefault("evaluate", sys.modules[__name__])   # that file imports the judge: it must be this one
    spec = importlib.util.spec_from_file_location("saved_experiment", path)
    module = sys.modules["saved_experiment"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv=None):
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Score a run, compare scored runs, or read one latent.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="one: score it; several: compare their scores")
    parser.add_argument("--rows", metavar="FILE.npy", help="int64 (N,T) token rows of your own, BOS in place")
    parser.add_argument("--reconstruction_rows", type=int, help="leading rows for CE/KL; the rest is for all else (64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="the language model's, instead of the run's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write here, not over the run's own scores")
    parser.add_argument("--feature", type=int, metavar="N", help="read latent N instead of scoring")
    parser.add_argument("--trust", action="store_true", help="execute a saved experiment.py that was edited since")
    parser.add_argument("--device", help="cpu, cuda, ...")
    args = parser.parse_args(argv)
    options = {"rows_file": args.rows, "dtype": args.dtype, "device": args.device}
    try:
        # a bare name is looked for under runs/ too, as experiment.py's --out_dir does
        runs = [Path("runs") / r if not r.exists() and (Path("runs") / r).exists() else r for r in args.runs]
        if len(runs) > 1:
            if any([args.rows, args.reconstruction_rows, args.dtype, args.out, args.feature is not None]):
                raise ValueError("several runs are compared from the scores on disk; scoring options take one run at a time")
            compare(runs)
            return 0
        exp = load_experiment(runs[0], args.trust)
        if args.feature is not None:
            feature_report(runs[0], exp, args.feature, **options)
            return 0
        final = evaluate_run(runs[0], exp, reconstruction_rows=args.reconstruction_rows, out=args.out, **options)
        print_scores(final)
        print(f"written: {args.out or runs[0]}")
        return 0
    except (ValueError, RuntimeError, OSError, MemoryError) as err:
        print(f"error: {str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__}", file=sys.stderr)
        return 2 if isinstance(err, ValueError) else 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
