"""The judge: scores a trained sparse autoencoder (SAE) on held-out text.

    python evaluate.py run_2                             score a run again
    python evaluate.py run_2 --model OTHER --out FOLDER  the same SAE on another model of its width
    python evaluate.py FOLDER --model M --layer L        any SAE in SAELens' format

Writes core.json (the keys of SAEBench 0.6.0's core eval), consistency.json (how codes behave along
a text), latents.json (what a page about the latents shows) and final_info.json (the headline
numbers with the raw values of every seed). No score is written before all of them are computed.
This file should not change between runs that are compared: its SHA-256 stands in every score.
"""
# For what is measured read sections 7, 9 and 13; for how a run is scored 11 and 15.
#
# Notation: x (..., d_in) an activation, x_hat its reconstruction, f or acts (..., d_sae) the codes.
# doc (N,T) holds 0 at a token that is left out (BOS, EOS, PAD, attention sinks) and a number for its
# document elsewhere: a *valid* token. A *segment* is the part of one document inside one row. A
# *pair* (t, t + lag) is two valid tokens of one segment. Latents come in three *groups*: whole, lead
# (the leading latents that a temporal loss binds) and rest. Sums run over all evaluated tokens in
# float64 with one division at the end. They are streamed; what needs the codes twice (position
# matrices, clusters, probes) uses the first SAMPLE_ROWS rows.
#
# Names that recur, and the function that makes each:
#     groups    {"whole", "lead", "rest": slice of latents} (Scorer)
#     seg       (n,) the segment of each token, -1 where it is left out (segment_ids)
#     known     Tokens: what is known of each token of the sample (sample_tokens)
#     in_train  (n,) bool: tokens of the documents that a probe is fitted on (split_documents)
#     stats     {name: (d_sae,) or (L,d_sae)}, values of each latent (latent_stats); "keep": fires
#               MIN_FIRINGS times or more; "mass": how often it fires; "eighths" is (8,d_sae), its
#               activation in eighths of the row, "eta2_chance" one number, the eta^2 of chance
#     text      a function, token id -> string (prepare.token_text)
#     record    what every file of one seed says of how it was made (evaluate_run)

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import signal
import sys
import time
import traceback
import uuid
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.special import rel_entr
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, silhouette_score
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import prepare

SOURCE_SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
REPO = Path(__file__).resolve().parent

# A decorator that limits BLAS to one thread, which is no slower for small products and adds up in a
# fixed order.
one_thread = threadpool_limits.wrap(limits=1)

BATCH_ROWS = 16  # SAEBench's batch; its mse and its bias are means over batches of this size
LOGIT_TOKENS = 512  # tokens whose logits are alive at a time: 512 x 49,152 float32 is 100 MB
LAGS = (1, 2, 4, 8, 16, 32, 64)
AT_16 = LAGS.index(16)
MIN_FIRINGS = 20  # latents that fire less often have no correlation worth averaging
SAMPLE_ROWS = 512  # rows whose codes are kept (sparse) for what needs a second look
SAMPLE_NNZ = 20_000_000  # and at most so many codes: 160 MB
MATRIX_SIDE = 128  # position matrices are at most this wide; longer contexts share cells
REDUNDANT = 0.9  # two latents are redundant when their codes correlate above this
TOGETHER = 0.6  # a latent fires together with others when its codes correlate above this ...
PARTNERS = 10  # ... with more than so many of them
MAX_COMPARED = 4096  # latents in the latent x latent matrix: 134 MB in float64
DEFAULT_LEAD = 0.2  # share of the dictionary that counts as the lead where a run has none
PROBE_K = (1, 5, 20)
TOPIC_TOKENS = 9000  # single tokens in the topic probe
TOPIC_FROM = 8  # ... each at least so many tokens after the first of its segment
CLASS_TOKENS = 8000  # tokens a side in the token class probe
ID_DOCUMENTS = 120  # documents told apart by the document probe,
ID_LEAST = 40  # each with so many valid tokens at least,
ID_TOKENS = 25  # of which it reads the last so many
ID_DRAWS = 4  # draws of documents and of the training side, of which it gives the mean
LIMIT_LAG = 16  # lag at which the slowest linear directions are fitted
LIMIT_FIRST = (10, 50, 100)
EDGE = 8  # tokens on each side of a place that may be a boundary
GROUPS = ("whole", "lead", "rest")
CORE_KEYS = (
    "explained_variance", "mse", "cossim", "l2_ratio", "relative_reconstruction_bias",
    "l0", "l1", "frac_alive", "ce_loss_score", "kl_div_score")
NO_BEHAVIOUR = "ce_loss_score, kl_div_score"  # the note that says why these are null
# what config.json or the command line may say of the text, handed on to prepare.text_rows
TEXT_OPTIONS = (
    "context_size", "harvest_tokens", "eval_rows", "text_field", "dataset_config", "split",
    "encoding", "cache_dir")


# --------------------------------------------------------------------------------------------------
# 1. Numbers
# --------------------------------------------------------------------------------------------------


def plain(value, digits=None):
    """What JSON can hold: numpy and torch values become Python's, NaN and infinity None.

    digits: significant digits of floats; None keeps them all.
    """
    if isinstance(value, dict):
        return {str(key): plain(part, digits) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(part, digits) for part in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    if digits is None:
        return value
    return float(f"{value:.{digits}g}")


def ratio(a, b):
    """a / b as a float; NaN, which becomes null with a reason, where b is 0."""
    if b == 0:
        return math.nan
    return float(a) / float(b)


def has_null(value):
    """Whether a None stands anywhere inside a JSON-like value."""
    if isinstance(value, dict):
        return any(has_null(part) for part in value.values())
    if isinstance(value, list):
        return any(has_null(part) for part in value)
    return value is None


def mean_or_nan(values):
    """Mean of a list or array; NaN if it is empty."""
    if len(values) == 0:
        return math.nan
    return np.mean(values)


def public_name(name):
    """A model's or data set's name as it may be published: of a local path the last part."""
    path = Path(name).expanduser()
    if path.is_absolute() or path.exists():
        return path.resolve().name
    return str(name)


# --------------------------------------------------------------------------------------------------
# 2. The SAE: any folder in SAELens' format
# --------------------------------------------------------------------------------------------------


def tensor_hash(tensors):
    """SHA-256 over the sorted names and the bytes of {name: tensor}: same weights, same hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class SAE:
    """A sparse autoencoder as it is used: it encodes one token at a time.

        acts  = select(act(W_enc^T (norm(x) - b_dec) + b_enc))
        x_hat = unnorm(W_dec^T acts + b_dec)

    select: nothing (standard), the k largest (topk), what exceeds its threshold (jumprelu). act:
    ReLU, or GELU in our variant. norm: none, layer_norm or constant_norm_rescale, as in SAELens.
    Where apply_b_dec_to_input is false, b_dec is not subtracted. All tensors are float32.
    """

    def __init__(self, spec, tensors):
        """spec: the contents of cfg.json. KeyError or ValueError where something is missing."""
        self.spec = spec
        ours = spec.get("temporal_sae") or {}
        architecture = spec["architecture"]
        self.selection = architecture.removeprefix("temporal_sae_")
        if self.selection not in ("standard", "topk", "jumprelu"):
            raise ValueError(f"architecture {architecture} is none of standard, topk, jumprelu")
        self.norm = spec.get("normalize_activations") or "none"
        if self.norm not in ("none", "layer_norm", "constant_norm_rescale"):
            raise ValueError(
                f"normalize_activations {self.norm} needs a number that cfg.json does not hold: "
                "fold it into the weights and save the SAE again")
        if spec.get("reshape_activations", "none") not in ("none", None):
            raise ValueError(f"reshape_activations {spec['reshape_activations']} is not supported")
        d_in = spec["d_in"]
        d_sae = spec["d_sae"]
        shapes = {
            "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
        if self.selection == "jumprelu":
            shapes["threshold"] = (d_sae,)
        for name, shape in shapes.items():
            if name not in tensors:
                raise ValueError(f"the tensor {name} is missing")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {shape}")
            setattr(self, name, tensors[name].float())
        self.k = min(spec.get("k") or 100, d_sae)  # of topk: SAELens' default where it is absent
        self.gelu = ours.get("nonlinearity") == "gelu"
        self.scale = float(tensors.get("scale", 1.0))
        self.input_bias = self.b_dec * bool(spec.get("apply_b_dec_to_input", True))
        self.rescaled = bool(spec.get("rescale_acts_by_decoder_norm", False))

    def to(self, device):
        """Move all tensors; returns self."""
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, name, value.to(device))
        return self

    def normalise(self, x):
        """x (..., d_in) -> (normalised x, scale, shift): x = normalised * scale + shift."""
        if self.norm == "layer_norm":  # SAELens' formula: ddof 1, eps 1e-5 beside the deviation
            mean = x.mean(-1, keepdim=True)
            std = x.std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), std, mean
        if self.norm == "constant_norm_rescale":
            size = x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
            return x / size, size, 0.0
        return x, 1.0, 0.0

    def encode(self, x):
        """x (..., d_in) raw activations in float32 -> acts (..., d_sae)."""
        x, _, _ = self.normalise(x)
        pre = (x - self.input_bias) @ self.W_enc + self.b_enc
        if self.rescaled:  # SAELens, for topk: latents compete as if decoder rows had unit norm
            pre = pre * self.W_dec.norm(dim=1)
        if self.gelu:  # not homogeneous, so it is taken at the scale it was trained at
            acts = F.gelu(pre * self.scale) / self.scale
        else:
            acts = torch.relu(pre)
        if self.selection == "jumprelu":
            return acts * (pre > self.threshold)
        if self.selection == "topk":
            top = pre.topk(self.k, dim=-1).indices
            return torch.zeros_like(acts).scatter(-1, top, acts.gather(-1, top))
        return acts

    def decode(self, acts, x):
        """acts (..., d_sae) and the x that they encode -> x_hat (..., d_in)."""
        x, scale, shift = self.normalise(x)
        if self.rescaled:
            acts = acts / self.W_dec.norm(dim=1)
        x_hat = acts @ self.W_dec + self.b_dec
        return x_hat * scale + shift


def load_sae(folder, device="cpu"):
    """The SAE in a folder with cfg.json and sae_weights.safetensors, ours or SAELens'.

    ValueError, one sentence, for weights that are missing, damaged, not the ones that were trained
    or of a kind that is not known here.
    """
    folder = Path(folder)
    spec_file = folder / "cfg.json"
    weights_file = folder / "sae_weights.safetensors"
    for path in (spec_file, weights_file):
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no weights ({path.name} is missing); git does not keep ours: "
                "train the run again")
    try:
        spec = prepare.read_json(spec_file)
        tensors = load_file(weights_file)
        recorded = (spec.get("temporal_sae") or {}).get("sha256")
        if recorded and tensor_hash(tensors) != recorded:
            raise ValueError("they are not the ones that were trained: their SHA-256 differs")
        return SAE(spec, tensors).to(device)
    except KeyError as error:
        raise ValueError(f"{folder}: cfg.json does not say {error}") from None
    except (SafetensorError, ValueError, TypeError, AttributeError, OSError) as error:
        reason = prepare.first_line(error)
        raise ValueError(f"{folder}: the weights cannot be used ({reason})") from None


# --------------------------------------------------------------------------------------------------
# 3. Rows of held-out text
# --------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Token rows and what is known of each token."""

    tokens: np.ndarray  # (N,T) int64; None when activations were given instead of text
    # (N,T) int32: 0 where a token is left out, else its document's number + 1 (--acts: its number)
    doc: np.ndarray
    topics: dict  # document's number -> its label; empty where there are no labels

    def cut(self, start, stop):
        """The rows start..stop."""
        tokens = None
        if self.tokens is not None:
            tokens = self.tokens[start:stop]
        return Rows(tokens, self.doc[start:stop], self.topics)


def segment_ids(doc):
    """(B,T) doc -> (B*T,) the segment of each token, numbered as they begin; -1 where doc is 0.

    >>> segment_ids(np.array([[0, 7, 0, 7, 3], [3, 3, 0, 0, 0]]))
    array([-1,  0, -1,  0,  1,  2,  2, -1, -1, -1])
    """
    flat = doc.ravel().astype(np.int64)
    valid = np.flatnonzero(flat > 0)
    row = valid // doc.shape[1]
    key = row * (flat.max() + 1) + flat[valid]
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    seg = np.full(flat.size, -1)
    seg[valid] = np.argsort(np.argsort(first))[which]
    return seg


def tokens_of_segments(seg):
    """(n,) segment ids -> list of the token indices of each segment, in order."""
    valid = np.flatnonzero(seg >= 0)
    valid = valid[np.argsort(seg[valid], kind="stable")]
    sizes = np.bincount(seg[valid])
    return np.split(valid, np.cumsum(sizes)[:-1])


def pairs_at(seg, lag):
    """(p,) left ends of the pairs (t, t + lag). Rows never share a segment, so none is crossed."""
    return np.flatnonzero((seg[:-lag] == seg[lag:]) & (seg[lag:] >= 0))


def permute_segments(seg, rng):
    """(n,) index that shuffles the valid tokens of each segment and leaves the others in place."""
    valid = np.flatnonzero(seg >= 0)
    place = valid[np.argsort(seg[valid], kind="stable")]
    source = valid[np.lexsort((rng.random(valid.size), seg[valid]))]
    index = np.arange(seg.size)
    index[place] = source
    return index


def sums_by(codes, tokens, label, n):
    """(n,d) sums of codes (csr) over `tokens`, added up by their label (0..n-1)."""
    shape = (n, codes.shape[0])
    pick = sparse.csr_matrix((np.ones(tokens.size), (label, tokens)), shape=shape)
    return (pick @ codes).toarray()


def token_topics(rows):
    """-> (sorted names of the topics, (N*T,) index of each token's topic or -1)."""
    documents, where = np.unique(rows.doc.ravel(), return_inverse=True)
    labels = [rows.topics.get(number - 1) for number in documents.tolist()]  # None: has none
    names = sorted(set(labels) - {None})
    number_of = {name: number for number, name in enumerate(names)}
    index = np.array([number_of.get(label, -1) for label in labels])
    return names, index[where]


# --------------------------------------------------------------------------------------------------
# 4. The language model: its activations, and its behaviour with reconstructed ones
# --------------------------------------------------------------------------------------------------


class StopForward(Exception):
    """Raised in a hook: what lies above the hooked block is not computed."""


@contextlib.contextmanager
def output_replaced(block, replace):
    """While open, the residual output h (B,T,d_in) of a decoder block is replace(h)."""

    def hook(module, inputs, output):
        h = output
        if isinstance(output, tuple):
            h = output[0]
        if not torch.is_tensor(h) or h.ndim != 3:
            raise ValueError(f"the output of {type(block).__name__} is not (rows, tokens, d_in)")
        if isinstance(output, tuple):
            return (replace(h), *output[1:])
        return replace(h)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def residuals(lm, block, tokens):
    """tokens (B,T) int64 -> (B,T,d_in) output of the block, in the model's dtype."""
    kept = []

    def keep(h):
        kept.append(h)
        raise StopForward

    ids = torch.from_numpy(tokens).to(lm.device)
    with output_replaced(block, keep), contextlib.suppress(StopForward):
        lm(ids, use_cache=False)
    return kept[0]


def held_out_activations(cfg, lm, block, tokens, dtype):
    """tokens (N,T) -> their activations (N,T,d_in), from a file under the cache, mapped to memory.

    The file is named by all that it depends on, and made when it is missing.
    """
    identity = {
        "what": "held-out activations", "model": prepare.model_identity(cfg["model"]),
        "dtype": str(dtype), "device": lm.device.type, "layer": cfg["layer"],
        "tokens": prepare.sha256(tokens), "batch_rows": BATCH_ROWS}  # last bits depend on the batch
    path = prepare.cache_root(cfg["cache_dir"]) / f"heldout-{prepare.digest(identity)}.safetensors"
    if not path.exists():
        starts = range(0, len(tokens), BATCH_ROWS)
        blocks = []
        for start in tqdm(starts, desc="held-out activations", leave=False, disable=None):
            x = residuals(lm, block, tokens[start:start + BATCH_ROWS])
            blocks.append(x.to(dtype).cpu())
        made = {"acts": torch.cat(blocks)}
        prepare.write_whole(path, functools.partial(save_file, made))
    try:
        return load_file(path)["acts"]
    except SafetensorError as error:
        reason = prepare.first_line(error)
        raise RuntimeError(f"{path} is damaged ({reason}): delete it and score again") from None


@torch.inference_mode()
def lm_behaviour(lm, block, saes, rows):
    """CE (nats) and KL of the model with its residual clean, reconstructed and zeroed.

    CE: mean over valid tokens t <= T-2 of -log p(token t+1). KL: mean over all valid t of
    sum_v p_clean (log p_clean - log p_other). Tokens that are left out keep their activation in the
    SAE runs; the ablation zeroes every position (SAEBench's protocol). The scores are ratios of
    pooled means: 1 is as clean, 0 as ablated. -> one dict for each SAE.
    """
    names = ["clean", "ablation", *range(len(saes))]
    ce = dict.fromkeys(names, 0.0)
    kl = dict.fromkeys(names, 0.0)
    step = max(1, LOGIT_TOKENS // rows.doc.shape[1])
    starts = range(0, len(rows.doc), step)
    for start in tqdm(starts, desc="language model", leave=False, disable=None):
        ids = torch.from_numpy(rows.tokens[start:start + step]).to(lm.device)
        valid = torch.from_numpy(rows.doc[start:start + step] > 0).to(lm.device)
        edits = {"clean": torch.clone, "ablation": torch.zeros_like}
        for number, sae in enumerate(saes):
            edits[number] = reconstruction(sae, valid)
        for name in names:
            with output_replaced(block, edits[name]):
                logp = lm(ids, use_cache=False).logits.float().log_softmax(-1)
            next_logp = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            ce[name] -= next_logp[valid[:, :-1]].cpu().double().sum().item()
            if name == "clean":
                clean = logp
                p = logp.exp()
            else:
                divergence = (clean - logp).mul_(p).sum(-1)
                kl[name] += divergence[valid].cpu().double().sum().item()
    n_ce = int((rows.doc[:, :-1] > 0).sum())
    n_kl = int((rows.doc > 0).sum())
    ce = {name: ratio(value, n_ce) for name, value in ce.items()}
    kl = {name: ratio(value, n_kl) for name, value in kl.items()}
    return [behaviour_scores(ce, kl, number) for number in range(len(saes))]


def reconstruction(sae, valid):
    """A function that replaces h (B,T,d_in) by its reconstruction where valid (B,T) is True."""

    def replace(h):
        x = h.float()
        x_hat = sae.decode(sae.encode(x), x).to(h.dtype)
        return torch.where(valid[..., None], x_hat, h)
    return replace


def behaviour_scores(ce, kl, name):
    """SAEBench's names for one SAE, from the mean CE and KL of each kind of run."""
    return {
        "kl_div_score": ratio(kl["ablation"] - kl[name], kl["ablation"]),
        "kl_div_with_ablation": kl["ablation"],
        "kl_div_with_sae": kl[name],
        "ce_loss_score": ratio(ce["ablation"] - ce[name], ce["ablation"] - ce["clean"]),
        "ce_loss_with_ablation": ce["ablation"],
        "ce_loss_with_sae": ce[name],
        "ce_loss_without_sae": ce["clean"]}


# --------------------------------------------------------------------------------------------------
# 5. Fidelity and sparsity
# --------------------------------------------------------------------------------------------------


class Fidelity:
    """Sums for reconstruction and sparsity of one SAE, as we mean them and as SAEBench 0.6.0 does.

    SAEBench's batch-wise quantities need batches of BATCH_ROWS rows.
    """

    def __init__(self, W_dec):
        d_sae, d_in = W_dec.shape
        self.unit = W_dec.cpu().double().norm(dim=1).numpy()  # decoder rows count at unit norm
        self.tokens = 0
        self.batches = 0
        self.x_sum = torch.zeros(d_in, dtype=torch.float64)
        self.sums = {}  # over tokens
        self.batch_sums = {}  # over batches
        self.fires = np.zeros(d_sae, np.int64)  # tokens with f != 0
        self.positive = np.zeros(d_sae, np.int64)  # tokens with f > 0: differs for GELU only
        self.rows_fired = np.zeros(d_sae, np.int64)  # rows with f > 0
        self.total = np.zeros(d_sae)
        self.absolute = np.zeros(d_sae)

    def update(self, x, x_hat, codes, row_of_token):
        """x, x_hat (n,d_in) at the n valid tokens; codes csr (B*T,d_sae), empty at the others."""
        x = x.cpu().double()
        y = x_hat.cpu().double()
        rr = (x - y).square().sum(1)
        xx = (x * x).sum(1)
        yy = (y * y).sum(1)
        xy = (x * y).sum(1)
        norm_in = xx.sqrt()
        norm_out = yy.sqrt()
        # a zero vector has no direction, its cosine counts as 0; x_hat = x gives exactly 1
        cos = torch.where(xx * yy > 0, xy / (xx * yy).sqrt(), 0.0)
        by_token = {
            "rr": rr, "xx": xx, "yy": yy, "xy": xy, "cos": cos,
            "norm_in": norm_in, "norm_out": norm_out,
            "norm_ratio": norm_out / torch.where(norm_in < 1e-4, 1.0, norm_in),
            # SAEBench's explained_variance_legacy, a mean over tokens of each one's own ratio
            "legacy": 1 - rr / (x - x.mean(0)).square().sum(1)}
        for name, value in by_token.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.sum().item()
        by_batch = {
            "mse": rr.mean().item(), "bias": ratio(yy.mean(), xy.mean()), "xx": xx.mean().item()}
        for name, value in by_batch.items():
            self.batch_sums[name] = self.batch_sums.get(name, 0.0) + value
        self.x_sum += x.sum(0)
        self.tokens += len(x)
        self.batches += 1
        self.count_codes(codes, row_of_token)

    def count_codes(self, codes, row_of_token):
        """Add up how often and how strongly each latent fires."""
        up = codes > 0
        by_row = sums_by(up, np.arange(len(row_of_token)), row_of_token, row_of_token.max() + 1)
        self.fires += codes.getnnz(axis=0)
        self.positive += up.getnnz(axis=0)
        self.rows_fired += (by_row > 0).sum(0)
        self.total += np.asarray(codes.sum(0)).ravel()
        self.absolute += np.asarray(abs(codes).sum(0)).ravel()

    def ours(self):
        """The values as we mean them. explained_variance: predicting the mean gives 0."""
        n = self.tokens
        s = self.sums
        variance = s["xx"] - self.x_sum.square().sum().item() / n  # sum of |x - mean|^2
        if variance < 1e-12 * s["xx"]:  # rounding error of activations that never change
            variance = 0
        return {
            "explained_variance": 1 - ratio(s["rr"], variance),
            "mse": s["rr"] / (n * len(self.x_sum)),
            "cossim": s["cos"] / n,
            "l2_ratio": s["norm_ratio"] / n,
            "relative_reconstruction_bias": ratio(s["yy"], s["xy"]),
            "l0": self.fires.sum() / n,
            "l1": (self.absolute * self.unit).sum() / n,
            "frac_alive": (self.fires > 0).mean()}

    def saebench(self):
        """SAEBench 0.6.0's values, its faults included.

        Its explained_variance divides by Q - (Q/d)^2, Q the mean of |x|^2: no variance. Its mse
        divides each batch by its size once too often; legacy averages ratios of single tokens.
        """
        n = self.tokens
        s = self.sums
        power = self.batch_sums["xx"] / self.batches
        residual = self.batch_sums["mse"] / self.batches  # |x - y|^2 a token, over all dimensions
        faulty = power - (power / len(self.x_sum)) ** 2
        quality = {
            "explained_variance": 1 - ratio(residual, faulty),
            "explained_variance_legacy": s["legacy"] / n,
            "mse": self.batch_sums["mse"] / n,
            "cossim": s["cos"] / n}
        shrinkage = {
            "l2_norm_in": s["norm_in"] / n,
            "l2_norm_out": s["norm_out"] / n,
            "l2_ratio": s["norm_ratio"] / n,
            "relative_reconstruction_bias": self.batch_sums["bias"] / self.batches}
        sparsity = {"l0": self.fires.sum() / n, "l1": self.total.sum() / n}
        return {"reconstruction_quality": quality, "shrinkage": shrinkage, "sparsity": sparsity}


# --------------------------------------------------------------------------------------------------
# 6. SAEBench's core.json
# --------------------------------------------------------------------------------------------------


def max_cosine(W):
    """(n,d) rows -> (n,) largest cosine of each row with any other, a block of rows at a time."""
    W = F.normalize(W.float(), dim=1)
    best = []
    for start in range(0, len(W), 1024):
        cos = W[start:start + 1024] @ W.T
        own = torch.arange(len(cos), device=W.device)
        cos[own, own + start] = -torch.inf
        best.append(cos.amax(1))
    return torch.cat(best).cpu()


def feature_columns(sae, fidelity):
    """SAEBench's feature-wise metrics, {name: (d_sae,)}, computed on the SAE's device.

    Seven digits of each. A latent that never fires has 0 tokens in a row, not NaN.
    """
    W_enc = sae.W_enc.T  # (d_sae,d_in), as W_dec
    W_dec = sae.W_dec
    cosine = (F.normalize(W_enc, dim=1) * F.normalize(W_dec, dim=1)).sum(1)
    columns = {
        "feature_density": fidelity.positive / fidelity.tokens,
        "consistent_activation_heuristic": fidelity.positive / np.maximum(fidelity.rows_fired, 1),
        "encoder_bias": sae.b_enc.cpu().numpy(),
        "encoder_norm": W_enc.norm(dim=1).cpu().numpy(),
        "encoder_decoder_cosine_sim": cosine.cpu().numpy(),
        "max_decoder_cosine_sim": max_cosine(W_dec).numpy(),
        "max_encoder_cosine_sim": max_cosine(W_enc).numpy()}
    return {name: np.array(plain(column, 7), float) for name, column in columns.items()}


def misc_metrics(columns):
    """SAEBench's summary of the feature-wise metrics; normalized_* is the share of all firings."""
    density = columns["feature_density"]
    out = {"frac_alive": (density > 0).mean()}
    for percent in (1, 10):
        frequent = density > percent / 100
        share = 0.0
        if density.any():
            share = density[frequent].sum() / density.sum()
        out[f"freq_over_{percent}_percent"] = frequent.mean()
        out[f"normalized_freq_over_{percent}_percent"] = share
    for side in ("encoder", "decoder"):
        out[f"average_max_{side}_cosine_sim"] = columns[f"max_{side}_cosine_sim"].mean()
    return out


def core_config(record):
    """SAEBench's eval_config: what was evaluated and which parts of it."""
    counts = record["counts"]
    flags = (
        "compute_kl", "compute_ce_loss", "compute_l2_norms", "compute_sparsity_metrics",
        "compute_variance_metrics", "compute_featurewise_density_statistics",
        "compute_featurewise_weight_based_metrics", "exclude_special_tokens_from_reconstruction")
    return {
        "model_name": record["scored_on"]["model"],
        "llm_dtype": record["scored_on"]["dtype"],
        "batch_size_prompts": BATCH_ROWS,
        "n_eval_reconstruction_batches": math.ceil(counts["reconstruction_rows"] / BATCH_ROWS),
        "n_eval_sparsity_variance_batches": math.ceil(counts["rows"] / BATCH_ROWS),
        "dataset": record["scored_on"]["dataset"],
        "context_size": counts["context"],
        **dict.fromkeys(flags, True),
        "verbose": False}


def core_json(scorer, behaviour, record):
    """SAEBench's core result of one seed; our own values stand under eval_result_unstructured.

    record: what every file of this seed says of how it was made: scored_on, counts (count_rows:
    "rows" does not include "reconstruction_rows"), hashes, notes.
    """
    fidelity = scorer.fidelity
    counts = record["counts"]
    columns = feature_columns(scorer.sae, fidelity)
    features = []
    for i, values in enumerate(zip(*columns.values())):
        features.append({"index": i, **dict(zip(columns, values))})
    special_included = {
        "total_tokens_eval_reconstruction": counts["reconstruction_rows"] * counts["context"],
        "total_tokens_eval_sparsity_variance": counts["rows"] * counts["context"]}
    kl = {name: value for name, value in behaviour.items() if name.startswith("kl")}
    ce = {name: value for name, value in behaviour.items() if name.startswith("ce")}
    of_model = plain({"model_behavior_preservation": kl, "model_performance_preservation": ce})
    of_codes = plain({
        **fidelity.saebench(), "token_stats": special_included,
        "misc_metrics": misc_metrics(columns)})
    ours = fidelity.ours()
    ours["ce_loss_score"] = behaviour["ce_loss_score"]
    ours["kl_div_score"] = behaviour["kl_div_score"]
    notes = dict(record["notes"])
    explained = NO_BEHAVIOUR in notes
    if has_null(of_codes) or (has_null(of_model) and not explained):
        notes["eval_result_metrics"] = (
            "null is 0/0: activations that do not vary, or an all-zero reconstruction")
    scored_on = record["scored_on"]
    identity = json.dumps([record["hashes"], scored_on, counts], sort_keys=True)
    return plain({
        "eval_type_id": "core",
        "eval_config": core_config(record),
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_URL, identity)),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": of_model | of_codes,
        "eval_result_details": features,
        "sae_bench_commit_hash": f"none: computed by evaluate.py {SOURCE_SHA256[:12]}",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": f"{scored_on['model']}_layer_{scored_on['layer']}",
        "sae_lens_version": None,
        "sae_cfg_dict": scorer.sae.spec,
        "eval_result_unstructured": {"ours": ours, **record, "notes": notes}})


# --------------------------------------------------------------------------------------------------
# 7. Consistency along the text: streamed sums over pairs of tokens
# --------------------------------------------------------------------------------------------------


def pearson(product, left, right, left2, right2, pairs):
    """Correlation from sums over pairs: of f g, f, g, f^2, g^2, each (..., d); pairs (...).

    NaN where a side does not vary: below 1e-9 of the second moment a variance is rounding error.
    """
    n = np.maximum(pairs, 1)[..., None]
    cov = product / n - left * right / n**2
    var_left = left2 / n - (left / n) ** 2
    var_right = right2 / n - (right / n) ** 2
    varies = (var_left > 1e-9 * left2 / n) & (var_right > 1e-9 * right2 / n)
    varies &= pairs[..., None] > 1
    scale = np.sqrt(np.where(varies, var_left * var_right, 1))
    return np.where(varies, cov / scale, np.nan)


class LagSums:
    """Sums over pairs (t, t + lag) for each column of a (tokens, d) matrix.

    The columns are codes, codes permuted inside their segments, or raw activations.
    """

    def __init__(self, d, lags, context):
        self.lags = lags
        self.context = context
        self.pairs = np.zeros(len(lags))
        # sums of f_l f_r, f_l, f_r, f_l^2, f_r^2, for each lag and column
        self.pooled = np.zeros((5, len(lags), d))
        self.within = np.zeros((5, len(lags), d))  # the same without each segment's own mean
        self.on_left = np.zeros((len(lags), d))
        self.on_both = np.zeros((len(lags), d))
        self.tokens = 0
        self.squares = np.zeros(d)
        self.by_position = np.zeros((context, d))
        self.position_tokens = np.zeros(context)

    def update(self, codes, seg):
        """codes: csr (n,d) of whole rows, empty at tokens left out; seg (n,) from segment_ids."""
        valid = np.flatnonzero(seg >= 0)
        position = valid % self.context
        self.by_position += sums_by(codes, valid, position, self.context)
        self.position_tokens += np.bincount(position, minlength=self.context)
        self.squares += np.bincount(codes.indices, codes.data**2, codes.shape[1])
        self.tokens += valid.size
        n_seg = seg.max() + 1
        size = np.bincount(seg[valid], minlength=n_seg)
        mean = sums_by(codes, valid, seg[valid], n_seg) / np.maximum(size, 1)[:, None]
        for k, lag in enumerate(self.lags):
            left = pairs_at(seg, lag)
            if left.size:
                self.add_pairs(k, codes, left, left + lag, seg[left], mean)

    def add_pairs(self, k, codes, left, right, seg, mean):
        """Add the pairs (left, right) of lag number k; seg: their segments, mean (n_seg,d)."""
        d = codes.shape[1]
        f_left = codes[left]
        f_right = codes[right]
        both = f_left.multiply(f_right).tocsr()
        product = np.bincount(both.indices, both.data, d)
        left2 = np.bincount(f_left.indices, f_left.data**2, d)
        right2 = np.bincount(f_right.indices, f_right.data**2, d)
        n_seg = len(mean)
        A = sums_by(codes, left, seg, n_seg)
        B = sums_by(codes, right, seg, n_seg)
        count = np.bincount(seg, minlength=n_seg)[:, None]
        self.pooled[:, k] += [product, A.sum(0), B.sum(0), left2, right2]
        # sum (f_l - m)(f_r - m) = sum f_l f_r - m (A + B) + c m^2: f - m is never built
        cm = (count * mean).sum(0)
        cm2 = (count * mean**2).sum(0)
        self.within[0, k] += product - (mean * (A + B)).sum(0) + cm2
        self.within[1, k] += A.sum(0) - cm
        self.within[2, k] += B.sum(0) - cm
        self.within[3, k] += left2 - 2 * (mean * A).sum(0) + cm2
        self.within[4, k] += right2 - 2 * (mean * B).sum(0) + cm2
        self.on_left[k] += np.bincount(f_left.indices, minlength=d)
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
        """(L,d) the same without each segment's own mean; biased by about -1/length."""
        # a column constant inside every segment leaves rounding error only
        flat = self.within[3:].min(0) <= 1e-9 * self.pooled[3:].max(0)
        return np.where(flat, np.nan, pearson(*self.within, self.pairs))

    def kappa(self, fires):
        """(L,d) persistence P(on at t+lag | on at t) beyond chance, (P - p) / (1 - p).

        p: the firing rate.
        """
        undefined = np.full(self.on_both.shape, np.nan)
        stays = np.divide(self.on_both, self.on_left, out=undefined, where=self.on_left > 0)
        p = fires / self.tokens
        return (stays - p) / np.where(p < 1, 1 - p, np.nan)

    def span(self, fires):
        """(d,) mean run length in tokens: firings / runs.

        A run starts at a firing whose previous token did not fire.
        """
        runs = fires - self.on_both[0]  # at lag 1
        return np.divide(fires, runs, out=np.full(len(runs), np.nan), where=runs > 0)

    def eta2(self):
        """(d,) share of a column's variance that the position in the row explains."""
        seen = self.position_tokens > 0
        n = self.position_tokens[seen, None]
        difference = self.by_position[seen] / n - self.mean
        between = (n * difference**2).sum(0) / self.tokens
        varies = self.variance > 1e-9 * self.squares / self.tokens
        return np.where(varies, between / np.where(varies, self.variance, 1), np.nan)


class Neighbours:
    """Sums over neighbouring tokens and rows, by group, under their names in consistency.json."""

    def __init__(self, n_lead):
        self.n_lead = n_lead
        names = ("support_jaccard", "smoothness_S", "S_sum", "latents_a_row")
        self.sums = {name: np.zeros((2, 3)) for name in names}  # sum and count of each group

    def by_group(self, matrix):
        """(n,d) csr or dense -> (3,n) the sum of each row over whole, lead, rest."""
        whole = np.asarray(matrix.sum(1)).ravel()
        lead = np.asarray(matrix[:, :self.n_lead].sum(1)).ravel()
        return np.stack([whole, lead, whole - lead])

    def add(self, name, values, counted):
        """Add values (3,n) up; counted (n,) or (3,n) bool: which of them the mean is over."""
        self.sums[name][0] += values.sum(1)
        self.sums[name][1] += counted.sum(-1)

    def update(self, codes, x, seg, context):
        """codes csr (n,d_sae) and x (n,d_in) float32 numpy of whole rows."""
        active = np.zeros((len(seg) // context, codes.shape[1]), bool)
        row = np.repeat(np.arange(len(seg)) // context, np.diff(codes.indptr))
        active[row, codes.indices] = True
        rows_used = (seg.reshape(-1, context) >= 0).any(1)
        self.add("latents_a_row", self.by_group(active), rows_used)
        left = pairs_at(seg, 1)
        if left.size:
            f_left = codes[left]
            f_right = codes[left + 1]
            on_left = f_left != 0
            on_right = f_right != 0
            common = self.by_group(on_left.multiply(on_right))
            union = self.by_group(on_left) + self.by_group(on_right) - common
            # an empty union has no overlap
            self.add("support_jaccard", common / np.maximum(union, 1), union > 0)
            dx = np.linalg.norm((x[left + 1] - x[left]).astype(np.float64), axis=1)
            moved = dx > 0  # two equal activations have equal codes: 0/0, no step
            self.add_steps(f_left[moved], f_right[moved], dx[moved], left[moved] // context, active)

    def add_steps(self, f_left, f_right, dx, row, active):
        """S and S_sum from the largest step max_t |df_i| / |dx| of each latent in each row.

        S (T-SAE, arXiv 2511.05541): mean over the latents that fire in a row, then over rows. A code
        that holds its latents has fewer of them in a row, so that the same steps give a higher S;
        S_sum adds the steps up instead.
        """
        step = (f_right - f_left).tocsr()
        size = np.diff(step.indptr)
        peak = np.zeros(active.shape)
        place = (np.repeat(row, size), step.indices)
        np.maximum.at(peak, place, np.abs(step.data) / np.repeat(dx, size))
        counted = np.zeros(active.shape, bool)  # active at a token of some pair
        for side in (f_left, f_right):
            counted[np.repeat(row, np.diff(side.indptr)), side.indices] = True
        total = self.by_group(peak)
        n = self.by_group(counted)
        self.add("smoothness_S", total / np.maximum(n, 1), n > 0)
        has_step = np.isin(np.arange(len(active)), row)
        self.add("S_sum", total[:, has_step], has_step)


def by_group_mean(sums):
    """(2,3) sums and counts -> {group: mean}."""
    return {group: ratio(sums[0, i], sums[1, i]) for i, group in enumerate(GROUPS)}


def group_means(value, keep, mass, groups):
    """(d,) or (L,d) -> {group: {"mean": over latents, "mass": weighted by mass}}.

    mass (d,): how often each latent fires. groups: {name: slice of latents}. Only latents in keep
    count, and only where their value is not NaN. NaN where none is left.
    """
    ok = keep & np.isfinite(value)
    value = np.where(ok, value, 0)
    weight = np.where(ok, mass, 0)
    out = {}
    with np.errstate(invalid="ignore"):  # 0/0, where no latent counts, is NaN
        for name, part in groups.items():
            own = value[..., part]
            w = weight[..., part]
            mean = own.sum(-1) / ok[..., part].sum(-1)
            out[name] = {"mean": mean, "mass": (w * own).sum(-1) / w.sum(-1)}
    return out


def best_means(value, keep, n):
    """(L,d) -> list of L: at each lag the mean of the n latents that are best at that lag."""
    means = []
    for line in value:
        ranked = np.sort(line[keep & np.isfinite(line)])[::-1]
        means.append(mean_or_nan(ranked[:n]))
    return means


# --------------------------------------------------------------------------------------------------
# 8. Codes seen twice: correlations between positions and between latents, clusters
# --------------------------------------------------------------------------------------------------


@one_thread
def position_matrix(blocks, seg, mean, scale, context):
    """Correlation of the columns at positions p and q, mean over columns and over rows.

    blocks: (n,d) matrices of whole rows, csr or dense; mean, scale (d,): each column's over ALL
    valid tokens, so the diagonals of the result average to the pooled autocorrelation. Only rows
    with p and q in one segment count. Contexts beyond MATRIX_SIDE share cells.
    -> (T,T) matrix, NaN where no row has the pair; (T,T) number of pairs.
    """
    step = math.ceil(context / MATRIX_SIDE)
    side = math.ceil(context / step)
    place = (np.arange(context) // step, np.arange(context))
    bins = sparse.csr_matrix((np.ones(context), place), shape=(side, context))
    total = np.zeros((side, side))
    count = np.zeros((side, side))
    m = mean / scale
    start = 0
    for block in blocks:
        for row in range(0, block.shape[0], context):
            s = seg[start + row:start + row + context]
            gram, hm = row_gram(block[row:row + context], scale, m)
            together = (s[:, None] == s[None]) & (s >= 0)[:, None]
            covariance = np.where(together, gram - hm[:, None] - hm[None] + m @ m, 0)
            total += bins @ covariance @ bins.T
            count += bins @ together.astype(float) @ bins.T
        start += block.shape[0]
    seen = (count > 0) & (len(m) > 0)
    return np.where(seen, total / np.maximum(count, 1) / max(len(m), 1), np.nan), count


def row_gram(h, scale, m):
    """h (T,d), csr or dense -> products (T,T) of its rows over scale, and each row's with m."""
    if sparse.issparse(h):
        h = h @ sparse.diags(1 / scale)
        return (h @ h.T).toarray(), h @ m
    h = h / scale
    return h @ h.T, h @ m


def toeplitzness(matrix, count):
    """Share of the off-diagonal variance (weighted by pairs) that the distance |p - q| explains."""
    p, q = np.nonzero(np.triu(count, 1))
    weight = count[p, q]
    value = matrix[p, q]
    lag = q - p
    weight_at = np.bincount(lag, weight)
    mean_at = np.bincount(lag, weight * value) / np.maximum(weight_at, 1)
    overall = ratio((weight * value).sum(), weight.sum())
    explained = (weight_at * (mean_at - overall) ** 2).sum()
    return ratio(explained, (weight * (value - overall) ** 2).sum())


def correlation_matrix(codes, n):
    """(m,m) Pearson correlation of the columns of csr (n,m) over its n valid tokens.

    NaN where a column is constant.
    """
    if codes.nnz < 0.05 * n * codes.shape[1]:
        gram = (codes.T @ codes).toarray().astype(np.float64)
    else:  # dense codes (GELU, a light L1): blocks of dense products are faster than sparse ones
        gram = np.zeros((codes.shape[1], codes.shape[1]))
        for start in range(0, codes.shape[0], 4096):
            block = codes[start:start + 4096].toarray()
            gram += block.T @ block
    mean = np.asarray(codes.sum(0), np.float64).ravel() / n
    cov = gram / n - np.outer(mean, mean)
    sd = np.sqrt(np.maximum(np.diag(cov), 0))
    sd[sd**2 <= 1e-9 * np.diag(gram) / n] = np.nan
    return cov / np.outer(sd, sd)


def redundancy(codes, n, latents, stats):
    """Latent x latent correlation of codes: how many distinct patterns do the latents hold?

    codes csr (tokens,d_sae) of the sample, n of them valid tokens; latents: the scored ones; stats:
    latent_stats(), after clusters().
    Effective rank: exp of the entropy of the correlation matrix's normalised eigenvalues (Roy &
    Vetterli 2007). Together: the latents that correlate above TOGETHER with more than PARTNERS
    others. -> its block of consistency.json, None where fewer than two latents vary. Fills
    "partner", the latent whose codes correlate most with each one's, and "partner_corr" in stats.
    """
    corr = correlation_matrix(codes[:, latents], n)
    varies = np.isfinite(np.diag(corr))
    latents = latents[varies]
    corr = corr[np.ix_(varies, varies)]
    if len(latents) < 2:
        return None
    eigen = torch.linalg.eigvalsh(torch.from_numpy(corr)).clamp_min(1e-15)
    p = eigen / eigen.sum()
    others = corr - 2 * np.eye(len(corr))  # a latent is not its own partner
    best = others.max(1)
    stats["partner"][latents] = latents[others.argmax(1)]
    stats["partner_corr"][latents] = best
    counts, edges = np.histogram(best.clip(-1, 1), bins=20, range=(-1, 1))
    mass = stats["mass"]
    cluster = stats["cluster"]
    shown = np.argsort(-mass[latents], kind="stable")[:80]  # for a picture: the heaviest
    shown = shown[np.lexsort((latents[shown], cluster[latents[shown]]))]
    matrix = {
        "latents": latents[shown], "clusters": cluster[latents[shown]],
        "corr": plain(corr[np.ix_(shown, shown)], 3)}
    together = latents[(others > TOGETHER).sum(1) > PARTNERS]
    return {
        "latents": len(latents), "share_above_0.9": (best > REDUNDANT).mean(),
        "effective_rank": math.exp(-(p * p.log()).sum().item()),
        "best_partner_histogram": {"edges": edges, "counts": counts}, "matrix": matrix,
        "together": together, "together_count": len(together),
        "together_mass_share": ratio(mass[together].sum(), mass.sum())}


def pw_mcc(decoders):
    """Mean cosine of decoder rows matched one to one (Hungarian), for each pair of seeds.

    PW-MCC, arXiv 2505.20254. None above 8,192 latents: the matching is cubic.
    """
    if len(decoders) < 2 or len(decoders[0]) > 8192:
        return None
    unit = [F.normalize(W.float().cpu(), dim=1) for W in decoders]
    means = []
    for a, b in itertools.combinations(unit, 2):
        cosine = (a @ b.T).numpy()
        matched = linear_sum_assignment(cosine, maximize=True)
        means.append(float(cosine[matched].mean(dtype=np.float64)))
    return means


@one_thread
def cluster_latents(blocks):
    """K-means on blocks of features [(n,width)]: columns standardised, blocks of equal weight.

    k in 4..8 with the best silhouette. -> labels (n,), numbered by size; silhouette; (n,2)
    principal coordinates for a picture.
    """
    scaled = []
    for block in blocks:
        deviation = np.where(block.std(0) > 1e-9, block.std(0), 1)
        scaled.append((block - block.mean(0)) / deviation / math.sqrt(block.shape[1]))
    z = np.concatenate(scaled, 1)
    best = -2
    labels = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters is fine here
        for k in range(4, 9):
            found = KMeans(k, n_init=4, random_state=0).fit_predict(z)
            if not 1 < len(set(found)) < len(z):
                continue
            score = silhouette_score(z, found, sample_size=min(len(z), 3000), random_state=0)
            if score > best:
                best = score
                labels = found
    if labels is None:
        return np.zeros(len(z), int), math.nan, z[:, :2]
    order = np.argsort(-np.bincount(labels), kind="stable")
    centred = z - z.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    return np.argsort(order)[labels], best, centred @ axes.T


def cluster_name(rho, eta2_excess, lags):
    """Name of a cluster from its mean profile. The thresholds are ours; the profile is saved."""
    far = rho[max(k for k, lag in enumerate(lags) if lag <= 32)]
    if eta2_excess > 0.05:  # position alone explains > 5 % more of the variance than chance
        return "positional"
    if far > 0.02 and far > rho[0] / 4:  # still there 32 tokens on: what the document is about
        return "document/topic"
    if rho[0] > 0.1:  # lasts a phrase
        return "segment"
    return "local/token"


def topic_divergence(codes, topic):
    """How far each latent's activation by topic is from the corpus's: relative entropy in nats.

    codes csr (n,m); topic (n,) int, -1 = none. -> (m,)
    """
    known = np.flatnonzero(topic >= 0)
    strength = sums_by(abs(codes), known, topic[known], topic.max() + 1).T
    share = strength / np.maximum(strength.sum(1, keepdims=True), 1e-12)
    corpus = np.bincount(topic[known]) / known.size
    return rel_entr(share, corpus).sum(1)


def clusters(codes, latents, stats, topic, lags):
    """Latents clustered by activation pattern.

    Pattern: firing rate, span, autocorrelation at each lag and within the segment, activation by
    eighths of the context and eta^2 of position, and, where documents carry topics, how far its
    activation by topic is from the corpus's. stats: latent_stats(); topic (n,) of the tokens, -1 = none.
    -> its block of consistency.json, (latents,2) places in a picture. Fills "cluster" in stats.
    """
    def pick(name):
        return np.nan_to_num(stats[name][..., latents])

    rate = np.log10(np.maximum(pick("rate"), 1e-9))[:, None]
    span = np.log(np.maximum(pick("span"), 1))[:, None]
    along = np.concatenate([pick("autocorr"), pick("autocorr_within")]).T
    position = np.concatenate([pick("eighths"), pick("eta2")[None]]).T
    blocks = [rate, span, along, position]
    if (topic >= 0).any():
        blocks.append(topic_divergence(codes[:, latents], topic)[:, None])
    number, silhouette, xy = cluster_latents(blocks)
    stats["cluster"][latents] = number
    listed = []
    for c in range(number.max() + 1):
        here = number == c
        rho = pick("autocorr")[:, here].mean(1)
        eta2_excess = pick("eta2")[here].mean() - stats["eta2_chance"]
        listed.append({
            "name": cluster_name(rho, eta2_excess, lags), "size": here.sum(),
            "mass_share": pick("mass")[here].sum() / stats["mass"].sum()})
    return {"silhouette": silhouette, "list": listed}, xy


# --------------------------------------------------------------------------------------------------
# 9. What latents tell: probes on single tokens and on documents
# --------------------------------------------------------------------------------------------------


def token_classes(strings):
    """Four yes/no properties of tokens, {name: (n,) bool}. A word's first token has a space."""
    bare = [string.strip() for string in strings]
    part = [string[:1] == b[:1] and b.isalpha() for string, b in zip(strings, bare)]
    punctuation = [bool(b) and not any(c.isalnum() for c in b) for b in bare]
    return {
        "word_part": np.array(part, bool),
        "punctuation": np.array(punctuation, bool),
        "digit": np.array([b.isdigit() for b in bare], bool),
        "capitalised": np.array([b[:1].isupper() for b in bare], bool)}


def to_dense(matrix):
    """csr or array -> array."""
    if sparse.issparse(matrix):
        return matrix.toarray()
    return matrix


def deviation(a):
    """(d,) standard deviation of the columns of a, 1 where a column is constant."""
    scale = a.std(0)
    return np.where(scale > 0, scale, 1)


def class_gap(values, y):
    """(d,) mean of the lines (csr or dense) where y is True, less that of the others."""
    return np.asarray(values[y].mean(0) - values[~y].mean(0)).ravel()


def probe_auroc(train, test, y_train, y_test):
    """AUROC on test of a logistic probe; columns are scaled by their deviation on train."""
    scale = deviation(train)
    fit = LogisticRegression(max_iter=300).fit(train / scale, y_train)
    return roc_auc_score(y_test, fit.decision_function(test / scale))


def probe_classes(members, train, test, least, probe):
    """One class against the rest, for each class. -> {class: probe(y_train, y_test)}

    members: {class: (n,) bool}; train, test: which of the n are on each side. A class needs `least`
    examples in it and as many out of it on each side, else it is left out.
    """
    found = {}
    for name, member in members.items():
        y_train = member[train]
        y_test = member[test]
        if min(y_train.sum(), (~y_train).sum(), y_test.sum(), (~y_test).sum()) >= least:
            found[name] = probe(y_train, y_test)
    return found


def sparse_probes(train, test, y_train, y_test, groups):
    """k-sparse probes (Gurnee et al. 2023): {group: {k: AUROC on test}}.

    The probe reads the k columns of the group whose class means differ most on train. train, test:
    csr or dense (n,d); y bool.
    """
    gap = np.abs(class_gap(train, y_train))
    out = {}
    for name, part in groups.items():
        ranked = np.arange(len(gap))[part]
        ranked = ranked[np.argsort(-gap[part], kind="stable")[:max(PROBE_K)]]
        if len(ranked):
            a = to_dense(train[:, ranked])
            b = to_dense(test[:, ranked])
            out[name] = {
                str(k): probe_auroc(a[:, :k], b[:, :k], y_train, y_test) for k in PROBE_K}
    return out


def mean_over_classes(found, groups):
    """{class: {group: {k: value}}} -> {group: {k: mean over classes}}, NaN where there is none."""
    out = {}
    for group in groups:
        out[group] = {}
        for k in PROBE_K:
            values = [classes[group][str(k)] for classes in found.values() if group in classes]
            out[group][str(k)] = mean_or_nan(values)
    return out


class Tokens(NamedTuple):
    """What is known of the n tokens of the sample."""

    doc: np.ndarray  # (n,) document's number + 1, 0 where left out
    seg: np.ndarray  # (n,) segment, -1 where left out
    into: np.ndarray  # (n,) tokens since the first of its segment
    topic: np.ndarray  # (n,) number of the document's topic, -1 if none
    probed_topic: np.ndarray  # (n,) the same, -1 also where it is "Uncategorized"
    topic_names: list
    ids: np.ndarray  # (n,) token ids; None without text
    context: int


def sample_tokens(rows):
    """Tokens of these rows."""
    seg = segment_ids(rows.doc)
    names, topic = token_topics(rows)
    index = np.arange(len(seg))
    valid = seg >= 0
    first = np.full(max(seg.max() + 1, 1), len(seg))
    np.minimum.at(first, seg[valid], index[valid])
    into = np.where(valid, index - first[seg], -1)
    none = [number for number, name in enumerate(names) if name.lower() == "uncategorized"]
    probed_topic = np.where(np.isin(topic, none), -1, topic)
    ids = None
    if rows.tokens is not None:
        ids = rows.tokens.ravel()
    context = rows.doc.shape[1]
    return Tokens(rows.doc.ravel(), seg, into, topic, probed_topic, names, ids, context)


def split_documents(doc, share):
    """(n,) True at the tokens of this share of the documents, drawn at random."""
    documents = np.unique(doc[doc > 0])
    chosen = np.random.default_rng(0).permutation(len(documents)) < share * len(documents)
    return np.isin(doc, documents[chosen])


def topic_sample(known, in_train):
    """Tokens of the topic probes. -> indices of the training side, of the test side

    Single tokens whose topic is known and not "Uncategorized", TOPIC_FROM tokens or more after the
    first of their segment: TOPIC_TOKENS of them at random.
    """
    fit = np.flatnonzero((known.probed_topic >= 0) & (known.into >= TOPIC_FROM))
    fit = np.random.default_rng(0).permutation(fit)[:TOPIC_TOKENS]
    return fit[in_train[fit]], fit[~in_train[fit]]


def topic_members(names, topic):
    """(n,) topics -> {name: (n,) bool, who is of it}."""
    return {name: topic == number for number, name in enumerate(names)}


def token_topic(codes, known, in_train, groups):
    """token_topic_k: a document's topic from ONE token's code. -> {topic: {group: {k: AUROC}}}

    On topics with 10 tokens or more on each side.
    """
    train, test = topic_sample(known, in_train)
    probe = functools.partial(sparse_probes, codes[train], codes[test], groups=groups)
    members = topic_members(known.topic_names, known.probed_topic)
    return probe_classes(members, train, test, 10, probe)


@one_thread
def raw_token_topic(x, known, in_train):
    """The same from k raw dimensions and from all of them, the ceiling. x (n,d_in) tensor.

    -> {k or "all": mean AUROC over topics}. Dimensions are centred on the training side.
    """
    train, test = topic_sample(known, in_train)
    a = x[train].double().numpy()
    b = x[test].double().numpy()
    centre = a.mean(0) if len(a) else 0
    a = a - centre
    b = b - centre
    members = topic_members(known.topic_names, known.probed_topic)
    probe = functools.partial(sparse_probes, a, b, groups={"raw": slice(None)})
    found = probe_classes(members, train, test, 10, probe)
    every = probe_classes(members, train, test, 10, functools.partial(probe_auroc, a, b))
    means = mean_over_classes(found, ("raw",))["raw"]
    return means | {"all": mean_or_nan(list(every.values()))}


def doc_topic(codes, known, in_train, groups):
    """doc_topic_k: a document's topic from its mean code, on topics with 10 documents or more.

    As in token_topic, only documents whose topic is known and not "Uncategorized" take part.
    """
    valid = np.flatnonzero((known.doc > 0) & (known.probed_topic >= 0))
    documents, first, which = np.unique(
        known.doc[valid], return_index=True, return_inverse=True)
    weight = 1 / np.bincount(which)[which]
    shape = (len(documents), codes.shape[0])
    mean = (sparse.csr_matrix((weight, (which, valid)), shape=shape) @ codes).tocsr()
    train = in_train[valid[first]]
    members = topic_members(known.topic_names, known.probed_topic[valid[first]])
    members = {name: member for name, member in members.items() if member.sum() >= 10}
    probe = functools.partial(sparse_probes, mean[train], mean[~train], groups=groups)
    return probe_classes(members, train, ~train, 2, probe)


def token_class(codes, known, in_train, text, groups):
    """token_class_k: the class of a token from its code, CLASS_TOKENS a side at most.

    text: a function, token id -> string.
    """
    valid = known.doc > 0
    sides = []
    for side in (np.flatnonzero(valid & in_train), np.flatnonzero(valid & ~in_train)):
        sides.append(side[::max(1, math.ceil(len(side) / CLASS_TOKENS))])
    train, test = sides
    ids, which = np.unique(known.ids, return_inverse=True)
    classes = token_classes([text(i) for i in ids.tolist()])
    members = {name: member[which] for name, member in classes.items()}
    probe = functools.partial(sparse_probes, codes[train], codes[test], groups=groups)
    return probe_classes(members, train, test, 2, probe)


def document_id(codes, known):
    """Which document is a token from? T-SAE's context probe (arXiv 2511.05541), ID_DRAWS times.

    A draw takes ID_DOCUMENTS documents at random of those with ID_LEAST valid tokens; the accuracy
    is the mean over draws, for one draw alone is noisy.
    """
    documents, size = np.unique(known.doc[known.doc > 0], return_counts=True)
    documents = documents[size >= ID_LEAST]
    n = min(len(documents), ID_DOCUMENTS)
    out = {"accuracy": math.nan, "documents": n, "chance": ratio(1, n)}
    if n < 2:
        return out
    rng = np.random.default_rng(0)
    found = []
    for _ in range(ID_DRAWS):
        chosen = rng.permutation(documents)[:n]
        last = [np.flatnonzero(known.doc == number)[-ID_TOKENS:] for number in chosen]
        order = rng.permutation(n * ID_TOKENS)
        found.append(id_accuracy(codes[np.concatenate(last)], order))
    out["accuracy"] = float(np.mean(found))
    return out


def id_accuracy(codes, order):
    """Accuracy of one multinomial probe (C = 0.1) for the documents of codes, ID_TOKENS lines each.

    order: a permutation of the lines, of which the first 75 % are the training side. Columns: the
    union over documents of the 5 latents whose mean exceeds that of the other documents most,
    scaled by their deviation. All of it is chosen on the training side.
    """
    y = np.arange(codes.shape[0]) // ID_TOKENS
    cut = int(0.75 * len(y))
    train = order[:cut]
    test = order[cut:]
    a = codes[train]
    picked = set()
    for number in np.unique(y[train]):
        gap = class_gap(a, y[train] == number)
        picked |= set(np.argsort(-gap, kind="stable")[:5].tolist())
    columns = np.array(sorted(picked))
    a = a[:, columns].toarray()
    b = codes[test][:, columns].toarray()
    scale = deviation(a)
    fit = LogisticRegression(max_iter=200, C=0.1).fit(a / scale, y[train])
    return fit.score(b / scale, y[test])


@one_thread
def probes(codes, known, text, groups, raw):
    """Every probe on the sample's codes (csr). raw: what raw_token_topic gave.

    For topics and classes documents are split 70/30 before anything else, and a value is the mean
    over classes; by_class has each class.
    """
    in_train = split_documents(known.doc, 0.7)
    found = {
        "token_topic": token_topic(codes, known, in_train, groups),
        "doc_topic": doc_topic(codes, known, in_train, groups),
        "token_class": {}}
    if known.ids is not None:
        found["token_class"] = token_class(codes, known, in_train, text, groups)
    out = {kind: mean_over_classes(classes, groups) for kind, classes in found.items()}
    by_class = {}
    for kind, classes in found.items():
        by_class[kind] = {name: values["whole"] for name, values in classes.items()}
    return out | {
        "raw": {"token_topic": raw}, "document_id": document_id(codes, known),
        "by_class": by_class}


# --------------------------------------------------------------------------------------------------
# 10. How slow could a read-out be, and do codes switch where the document does?
# --------------------------------------------------------------------------------------------------


def slow_directions(blocks, segs, n):
    """The n slowest directions of the tokens with seg >= 0, fitted at LIMIT_LAG.

    They are the first n generalised eigenvectors of the lagged covariance against the covariance:
    slow feature analysis (Wiskott & Sejnowski 2002; Blaschke et al. 2006), regularised by 1e-4 of
    the mean eigenvalue. blocks: (m,d) tensors of whole rows, added up in float64; segs: (m,) each.
    -> mean (d,), directions (d,n); None where there is no pair or nothing varies
    """
    d = blocks[0].shape[1]
    tokens = sum((seg >= 0).sum() for seg in segs)
    total = sum(x[seg >= 0].double().sum(0) for x, seg in zip(blocks, segs))
    mean = total.numpy() / max(tokens, 1)
    covariance = np.zeros((d, d))
    lagged = np.zeros((d, d))
    pairs = 0
    for x, seg in zip(blocks, segs):
        x = x.double().numpy() - mean
        inside = x[seg >= 0]
        left = pairs_at(seg, LIMIT_LAG)
        covariance += inside.T @ inside
        lagged += x[left].T @ x[left + LIMIT_LAG]
        pairs += left.size
    if pairs == 0 or not np.trace(covariance) > 0:
        return None
    covariance /= tokens
    lagged /= pairs
    ridge = 1e-4 * np.trace(covariance) / d
    _, vectors = scipy.linalg.eigh(
        (lagged + lagged.T) / 2, covariance + ridge * np.eye(d), subset_by_index=[d - n, d - 1])
    return mean, vectors[:, ::-1]


def linear_limit(x, known, lags):
    """How long the slowest linear read-outs of one token last: what a code could reach.

    x (n,d) tensor: the sample's raw activations. Directions are fitted at LIMIT_LAG on one half of
    the documents (at random) and scored on the other: their autocorrelation, pooled and centred
    globally, at each lag; mean over the first 10, 50 and 100. NaN where there are fewer dimensions,
    or no pair in a half.
    """
    d = x.shape[1]
    size = BATCH_ROWS * known.context
    blocks = x.split(size)
    fitted = split_documents(known.doc, 0.5)
    segs = np.split(np.where(fitted, known.seg, -1), range(size, len(x), size))
    found = slow_directions(blocks, segs, min(max(LIMIT_FIRST), d))
    rho = np.full((len(lags), d), np.nan)
    if found is not None:
        mean, directions = found
        z = [(block.double().numpy() - mean) @ directions for block in blocks]
        sums = LagSums(directions.shape[1], lags, known.context)
        scored = np.where(fitted, -1, known.seg)
        z = np.concatenate(z) * (scored >= 0)[:, None]
        sums.update(sparse.csr_matrix(z), scored)
        rho = sums.autocorr()
    means = {str(n): np.full(len(lags), np.nan) for n in LIMIT_FIRST}
    for n in LIMIT_FIRST:
        if n <= d:
            means[str(n)] = rho[:, :n].mean(1)
    return {"lags": lags, "fitted_at": LIMIT_LAG, "mean": means}


def boundary_places(known):
    """Places between EDGE valid tokens before and EDGE after. -> (p,EDGE), (p,EDGE), (p,) joins

    A join lies between two segments that follow each other in a row; a place inside lies every EDGE
    valid tokens of a segment.
    """
    segments = tokens_of_segments(known.seg)
    places = []
    joins = []
    for tokens, following in itertools.zip_longest(segments, segments[1:], fillvalue=()):
        for cut in range(EDGE, len(tokens) - EDGE + 1, EDGE):
            places.append(tokens[cut - EDGE:cut + EDGE])
            joins.append(False)
        long_enough = min(len(tokens), len(following)) >= EDGE
        if long_enough and tokens[0] // known.context == following[0] // known.context:
            places.append(np.concatenate([tokens[-EDGE:], following[:EDGE]]))
            joins.append(True)
    places = np.array(places, int).reshape(-1, 2 * EDGE)
    return places[:, :EDGE], places[:, EDGE:], np.array(joins, bool)


def mean_over(values, places):
    """values (n,d) csr, or a tensor; places (p,EDGE) -> (p,d) mean of each place's lines."""
    if torch.is_tensor(values):
        total = sum(values[places[:, step]].double() for step in range(EDGE))
        return total.numpy() / EDGE
    p = len(places)
    where = (np.repeat(np.arange(p), EDGE), places.ravel())
    pick = sparse.csr_matrix((np.full(p * EDGE, 1 / EDGE), where), shape=(p, values.shape[0]))
    return pick @ values


def cosine_distance(a, b):
    """1 - cos of each line of a with that of b (csr or dense); 1 where a line is zero."""
    if sparse.issparse(a):
        dot = np.asarray(a.multiply(b).sum(1)).ravel()
        size = sparse.linalg.norm(a, axis=1) * sparse.linalg.norm(b, axis=1)
    else:
        dot = (a * b).sum(1)
        size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return 1 - np.where(size > 0, dot / np.where(size > 0, size, 1), 0)


def boundary_auroc(before, after, joins):
    """AUROC with which the distance of the means before and after tells joins from insides.

    before, after: (p,d) csr or dense; joins: (p,) bool. NaN where all places are of one kind.
    """
    if joins.all() or not joins.any():
        return math.nan
    return roc_auc_score(joins, cosine_distance(before, after))


def boundary(codes, known, groups, raw):
    """boundary: does the mean code of 8 tokens change more at a join than inside a document?

    1 - cos, taken as 1 where no latent fires in the 8 tokens, is the score of an AUROC. codes csr
    of the sample; raw: the AUROC of raw activations (centred). The headline is the lead's.
    """
    before, after, joins = boundary_places(known)
    before = mean_over(codes, before)
    after = mean_over(codes, after)
    out = {}
    for group, part in groups.items():
        out[group] = boundary_auroc(before[:, part], after[:, part], joins)
    return out | {"raw": raw, "joins": joins.sum(), "inside": (~joins).sum()}


# --------------------------------------------------------------------------------------------------
# 11. One pass over the rows
# --------------------------------------------------------------------------------------------------


def to_csr(acts):
    """(n,d) tensor -> scipy csr in float64; only what is not zero leaves the device."""
    token, latent = acts.nonzero(as_tuple=True)
    values = acts[token, latent].cpu().double().numpy()
    size = torch.bincount(token, minlength=len(acts)).cpu().numpy()
    indptr = np.concatenate([[0], np.cumsum(size)])
    return sparse.csr_matrix((values, latent.cpu().numpy(), indptr), shape=tuple(acts.shape))


class Scorer:
    """All streamed sums of one SAE, and the sample of its codes."""

    def __init__(self, sae, n_lead, lags, context):
        d_sae = sae.W_dec.shape[0]
        self.sae = sae
        self.n_lead = n_lead
        self.context = context
        self.groups = {
            "whole": slice(0, d_sae), "lead": slice(0, n_lead), "rest": slice(n_lead, d_sae)}
        self.fidelity = Fidelity(sae.W_dec)
        self.lags = LagSums(d_sae, lags, context)
        self.neighbours = Neighbours(n_lead)
        # the null: tokens permuted inside their segments
        self.null_lags = LagSums(d_sae, lags, context)
        self.null_neighbours = Neighbours(n_lead)
        self.sample = []  # codes (csr, float32) of the first rows, for what needs them twice
        self.seen = np.zeros(2, int)  # rows and codes

    def update(self, x, seg, shuffled):
        """x (B*T,d_in) float32 on the SAE's device; seg (B*T,); shuffled (B*T,) permutation."""
        valid = torch.from_numpy(seg >= 0).to(x.device)
        acts = self.sae.encode(x)
        x_hat = self.sae.decode(acts, x)
        if not torch.isfinite(x_hat[valid]).all():
            raise ValueError("the SAE gives NaN or infinity on these activations")
        codes = to_csr(torch.where(valid[:, None], acts, 0.0))
        row_of_token = np.arange(len(seg)) // self.context
        if valid.any():
            self.fidelity.update(x[valid], x_hat[valid], codes, row_of_token)
            raw = x.cpu().numpy()
            permuted = codes[shuffled]
            self.lags.update(codes, seg)
            self.neighbours.update(codes, raw, seg, self.context)
            self.null_lags.update(permuted, seg)
            self.null_neighbours.update(permuted, raw[shuffled], seg, self.context)
        self.seen += (len(seg) // self.context, codes.nnz)
        # one batch at least; self.seen only grows, so the sample is an unbroken beginning
        if not self.sample or (self.seen <= (SAMPLE_ROWS, SAMPLE_NNZ)).all():
            self.sample.append(codes.astype(np.float32))

    @property
    def sample_rows(self):
        """Number of rows whose codes are kept."""
        return sum(block.shape[0] for block in self.sample) // self.context


def leave_out_sinks(rows, acts):
    """Rows with doc 0 at tokens whose activation is no feature of the text, and their number.

    As in training, with the median of these rows: attention sinks, whose norm is above
    prepare.sink_limit of the ordinary tokens' norms, and zero activations.
    """
    norms = torch.linalg.vector_norm(acts, dim=-1, dtype=torch.float32).double().numpy()
    valid = rows.doc > 0
    if not valid.any():
        raise ValueError("the rows hold no ordinary token to score")
    if not np.isfinite(norms[valid]).all():
        raise ValueError("the held-out activations hold NaN or infinity")
    ordinary = norms[valid & (norms > 0)]
    out = valid & ((norms > prepare.sink_limit(ordinary)) | (norms == 0))
    if (out == valid).all():
        raise ValueError("the rows hold no ordinary token to score: all activations are 0")
    return rows._replace(doc=np.where(out, 0, rows.doc).astype(np.int32)), int(out.sum())


@torch.inference_mode()
def stream(rows, acts, saes, n_lead):
    """One pass over the rows, with their activations (N,T,d_in), for all seeds.

    -> Scorer of each SAE, LagSums of the raw activations, (n,d_in) raw activations of the sample
    """
    context = rows.doc.shape[1]
    lags = tuple(lag for lag in LAGS if lag < context)
    scorers = [Scorer(sae, n_lead, lags, context) for sae in saes]
    raw = LagSums(saes[0].W_dec.shape[1], lags, context)
    device = saes[0].W_dec.device
    rng = np.random.default_rng(0)
    kept = []
    starts = range(0, len(rows.doc), BATCH_ROWS)
    for start in tqdm(starts, desc="activations and codes", leave=False, disable=None):
        x = acts[start:start + BATCH_ROWS].flatten(0, 1)
        seg = segment_ids(rows.doc[start:start + BATCH_ROWS])
        shuffled = permute_segments(seg, rng)  # the same for every seed and run
        if start < SAMPLE_ROWS:
            kept.append(x)
        if (seg >= 0).any():
            inside = x.double().numpy() * (seg >= 0)[:, None]
            raw.update(sparse.csr_matrix(inside), seg)
        x = x.to(device).float()
        for scorer in scorers:
            scorer.update(x, seg, shuffled)
    return scorers, raw, torch.cat(kept)[:SAMPLE_ROWS * context]


# --------------------------------------------------------------------------------------------------
# 12. consistency.json
# --------------------------------------------------------------------------------------------------

NO_VALUE = "null: too few tokens, pairs, latents that fire, documents or topics to give a value"


class RawScores(NamedTuple):
    """What the raw activations alone give: the same for every SAE on these rows."""

    sums: LagSums
    limit: dict  # linear_limit
    token_topic: dict
    boundary: float
    position: tuple  # position_matrix of the activations


def raw_scores(sums, x, rows):
    """RawScores of the rows that x (n,d_in) holds."""
    context = rows.doc.shape[1]
    known = sample_tokens(rows.cut(0, len(x) // context))
    in_train = split_documents(known.doc, 0.7)
    varies = sums.variance > 0
    scale = np.sqrt(sums.variance[varies])
    blocks = (block.double().numpy()[:, varies] for block in x.split(BATCH_ROWS * context))
    position = position_matrix(blocks, known.seg, sums.mean[varies], scale, context)
    topic = raw_token_topic(x, known, in_train)
    before, after, joins = boundary_places(known)
    before = mean_over(x, before) - sums.mean
    after = mean_over(x, after) - sums.mean
    edge = boundary_auroc(before, after, joins)
    limit = linear_limit(x, known, sums.lags)
    return RawScores(sums, limit, topic, edge, position)


def latent_stats(scorer):
    """The stats described at the top of this file, of the codes with no token permuted.

    The last three are for clusters() and redundancy() to fill: -1 and NaN mean none.
    """
    fires = scorer.fidelity.fires
    d_sae = len(fires)
    sums = scorer.lags
    context = scorer.context
    stats = pair_stats(sums, fires)
    eighth = np.arange(context) * 8 // context
    masks = [eighth == part for part in range(8)]
    by_eighth = np.array([
        np.abs(sums.by_position[here]).sum(0) / max(sums.position_tokens[here].sum(), 1)
        for here in masks])
    stats["rate"] = fires / scorer.fidelity.tokens
    stats["mass"] = fires.astype(float)  # how often, not how strongly: no scale enters
    stats["keep"] = fires >= MIN_FIRINGS
    stats["eighths"] = by_eighth / np.maximum(by_eighth.sum(0), 1e-12)
    stats["eta2"] = sums.eta2()
    stats["eta2_chance"] = (context - 1) / scorer.fidelity.tokens
    stats["autocorr_16"] = np.full(d_sae, np.nan)
    if 16 in sums.lags:
        stats["autocorr_16"] = stats["autocorr"][AT_16]
    stats["cluster"] = np.full(d_sae, -1)
    stats["partner"] = np.full(d_sae, -1)
    stats["partner_corr"] = np.full(d_sae, np.nan)
    return stats


def pair_stats(sums, fires):
    """The values of a LagSums that have a null, by their names in consistency.json."""
    return {
        "autocorr": sums.autocorr(), "autocorr_within": sums.autocorr_within(),
        "kappa": sums.kappa(fires), "span": sums.span(fires)}


def pair_blocks(stats, scorer):
    """The blocks of consistency.json that have a null, and under their names + _null the null."""
    out = {}
    for name, value in pair_stats(scorer.null_lags, scorer.fidelity.fires).items():
        out[name] = group_means(stats[name], stats["keep"], stats["mass"], scorer.groups)
        out[name + "_null"] = group_means(value, stats["keep"], stats["mass"], scorer.groups)
    for name in ("support_jaccard", "smoothness_S", "S_sum"):
        out[name] = by_group_mean(scorer.neighbours.sums[name])
        out[name + "_null"] = by_group_mean(scorer.null_neighbours.sums[name])
    return out


def consistency_json(scorer, raw, rows, record, text):
    """Every consistency value of one seed; those of pairs of tokens with their null beside them.

    -> (the contents of consistency.json, latent_stats)
    """
    lags = scorer.lags.lags
    stats = latent_stats(scorer)
    keep = stats["keep"]
    mass = stats["mass"]
    groups = {}
    for group, part in scorer.groups.items():
        share = ratio(mass[part].sum(), mass.sum())
        groups[group] = {
            "latents": len(keep[part]), "scored": keep[part].sum(), "mass_share": share}
    out = {
        "hashes": record["hashes"], "scored_on": record["scored_on"],
        "counts": record["counts"] | {"sample_rows": scorer.sample_rows},
        "lags": lags, "groups": groups}
    out |= pair_blocks(stats, scorer)
    out["latents_a_row"] = by_group_mean(scorer.neighbours.sums["latents_a_row"])
    out["autocorr_best"] = {
        "n": scorer.n_lead, "mean": best_means(stats["autocorr"], keep, scorer.n_lead)}
    every = {"raw": slice(None)}
    for name, value in (
            ("autocorr_raw", raw.sums.autocorr()),
            ("autocorr_within_raw", raw.sums.autocorr_within())):  # the ceiling
        kept = np.ones(value.shape[1], bool)
        # dimensions do not fire: "mass" weights them by their variance
        out[name] = group_means(value, kept, raw.sums.variance, every)["raw"]
    out["linear_limit"] = raw.limit
    out |= sample_blocks(scorer, raw, rows, stats, text)
    out = plain(out, 6)
    notes = dict(record["notes"])
    for key, value in out.items():
        if key != "scored_on" and has_null(value):
            notes[key] = NO_VALUE
    out["notes"] = notes
    return out, stats


def sample_blocks(scorer, raw, rows, stats, text):
    """The blocks of consistency.json that need the codes twice."""
    known = sample_tokens(rows.cut(0, scorer.sample_rows))
    codes = sparse.vstack(scorer.sample).tocsr()
    varies = stats["keep"] & (scorer.lags.variance > 0)
    latents = np.flatnonzero(varies)
    scale = np.sqrt(scorer.lags.variance[varies])
    blocks = (block[:, latents] for block in scorer.sample)
    matrix, count = position_matrix(
        blocks, known.seg, scorer.lags.mean[varies], scale, scorer.context)
    toeplitz = {"codes": toeplitzness(matrix, count), "raw": toeplitzness(*raw.position)}
    position = {
        "step": math.ceil(scorer.context / MATRIX_SIDE), "codes": plain(matrix, 5),
        "raw": plain(raw.position[0], 5), "toeplitzness": toeplitz}
    out = {"position_corr": position, "clusters": None, "redundancy": None, "latents": None}
    if len(latents) >= 10:
        out["clusters"], xy = clusters(codes, latents, stats, known.topic, scorer.lags.lags)
        # of a very large dictionary the heaviest latents only
        listed = np.sort(np.argsort(-stats["mass"][latents], kind="stable")[:MAX_COMPARED])
        at = latents[listed]
        out["redundancy"] = redundancy(codes, int((known.doc > 0).sum()), at, stats)
        table = {
            "index": at, "autocorr_1": stats["autocorr"][0, at], "x": xy[listed, 0],
            "y": xy[listed, 1]}
        for name in ("autocorr_16", "cluster", "partner", "partner_corr"):
            table[name] = stats[name][at]
        out["latents"] = {name: plain(value, 3) for name, value in table.items()}
    return out | {
        "probes": probes(codes, known, text, scorer.groups, raw.token_topic),
        "boundary": boundary(codes, known, scorer.groups, raw.boundary)}


# --------------------------------------------------------------------------------------------------
# 13. final_info.json: the headline
# --------------------------------------------------------------------------------------------------


HEADLINE = {  # name in final_info.json: where the value stands in consistency.json
    "autocorr_1": ("autocorr", "whole", "mean", 0),
    "autocorr_1_mass": ("autocorr", "whole", "mass", 0),
    "autocorr_within_1": ("autocorr_within", "whole", "mean", 0),
    "autocorr_16": ("autocorr", "whole", "mean", AT_16),
    "autocorr_16_lead": ("autocorr", "lead", "mean", AT_16),
    "autocorr_16_rest": ("autocorr", "rest", "mean", AT_16),
    "autocorr_16_best": ("autocorr_best", "mean", AT_16),
    "support_jaccard": ("support_jaccard", "whole"),
    "kappa_1": ("kappa", "whole", "mean", 0),
    "smoothness_S": ("smoothness_S", "whole"),
    "S_sum": ("S_sum", "whole"),
    "latents_a_row": ("latents_a_row", "whole"),
    "span": ("span", "whole", "mean"),
    "token_topic_5": ("probes", "token_topic", "whole", "5"),
    "token_topic_5_lead": ("probes", "token_topic", "lead", "5"),
    "token_topic_5_rest": ("probes", "token_topic", "rest", "5"),
    "doc_topic_5": ("probes", "doc_topic", "whole", "5"),
    "document_id": ("probes", "document_id", "accuracy"),
    "token_class_5": ("probes", "token_class", "whole", "5"),
    "token_class_20": ("probes", "token_class", "whole", "20"),
    "boundary": ("boundary", "lead"),
    "redundant_share": ("redundancy", "share_above_0.9"),
    "together": ("redundancy", "together_count"),
    "together_mass_share": ("redundancy", "together_mass_share")}
SEPARATIONS = {  # name: the probe, the group that should know more, the one that should know less
    "separation_topic": ("token_topic", "lead", "rest"),
    "separation_token": ("token_class", "rest", "lead")}


def look_up(tree, path):
    """The value at a path of keys and list indices; None where a block is, or a list is too short."""
    for key in path:
        if tree is None or (isinstance(tree, list) and key >= len(tree)):
            return None
        tree = tree[key]
    return tree


def headline(core, consistency):
    """The values of final_info.json for one seed. What is None here is left out there."""
    ours = core["eval_result_unstructured"]["ours"]
    out = {name: ours[name] for name in CORE_KEYS}
    for name, path in HEADLINE.items():
        out[name] = look_up(consistency, path)
    for name, (kind, more, less) in SEPARATIONS.items():
        pair = [consistency["probes"][kind][group]["5"] for group in (more, less)]
        out[name] = None if None in pair else pair[0] - pair[1]
    return out


def summarise(per_seed, mcc):
    """Means, standard errors (ddof 1; none for one seed) and raw values of the headline.

    per_seed: one headline() each; a value that is None for some seed is left out. mcc: pw_mcc().
    """
    raw = {}
    for name in per_seed[0]:
        values = [seed[name] for seed in per_seed]
        if None not in values:
            raw[name] = values
    stderrs = {}
    n = len(per_seed)
    if n > 1:
        for name, values in raw.items():
            stderrs[name] = float(np.std(values, ddof=1) / math.sqrt(n))
    if mcc:
        raw["pw_mcc"] = mcc  # one value a PAIR of seeds; pairs share seeds, so no standard error
    means = {name: float(np.mean(values)) for name, values in raw.items()}
    return {"means": means, "stderrs": stderrs, "final_info_dict": raw}


# --------------------------------------------------------------------------------------------------
# 14. latents.json: what a page about the latents shows
# --------------------------------------------------------------------------------------------------

PAGE_TOKENS = 65_536  # tokens of the rows that the page can show
PAGE_LATENTS = 4096  # latents listed at most
PUSHED_UP = 8  # tokens named that a latent's decoder row raises most
BEFORE = 16  # tokens of a passage before the one it is chosen for
AFTER = 8  # ... and after it
QUANTILES = (("90%", 0.9), ("50%", 0.5), ("10%", 0.1))
TEXTS = 6  # passages whose codes are saved whole, besides one that joins two documents


@torch.inference_mode()
def pushed_up(lm, W_dec, latents, text):
    """The tokens that each latent's decoder row raises most through the unembedding.

    The final norm is left out: it would need the rest of the residual stream. -> list of lists
    """
    head = lm.get_output_embeddings()
    if head is None:
        return [[] for _ in latents]
    found = []
    for start in range(0, len(latents), 256):
        rows = W_dec[torch.from_numpy(latents[start:start + 256]).to(W_dec.device)]
        logits = rows.to(head.weight.device, head.weight.dtype) @ head.weight.T
        top = logits.topk(min(PUSHED_UP, logits.shape[1]), dim=1).indices
        found += top.cpu().tolist()
    return [[text(token) for token in tokens] for tokens in found]


def topic_preference(codes, topic, n_topics):
    """The topic that each latent prefers, and its firing rate there over its rate everywhere.

    Preferred: the topic in which it fires most beyond what its share of the tokens would give,
    counted in standard deviations of that number. -> (d_sae,) topic or -1, (d_sae,) lift
    """
    known = np.flatnonzero(topic >= 0)
    if known.size == 0:
        return np.full(codes.shape[1], -1), np.full(codes.shape[1], math.nan)
    fires = sums_by(codes != 0, known, topic[known], n_topics)
    share = np.bincount(topic[known], minlength=n_topics) / known.size
    expected = share[:, None] * fires.sum(0)
    beyond = (fires - expected) / np.sqrt(np.maximum(expected, 1e-12))
    beyond[share == 0] = -np.inf
    best = beyond.argmax(0)
    every = np.arange(codes.shape[1])
    fired = fires.sum(0) > 0
    lift = fires[best, every] / np.where(fired, expected[best, every], 1)
    return np.where(fired, best, -1), np.where(fired, lift, math.nan)


def pick_firings(value, doc, place, n_top=5):
    """Which firings of one latent to show. value (m,) activations, doc (m,) their documents, place
    (m,) the numbers of the stretches of BEFORE + AFTER tokens that they lie in.

    The n_top highest, each of another document while there are such, else of another place; then
    the firing nearest to each quantile, in a document not shown yet if there is one.
    -> [(index, name)]
    """
    order = np.argsort(-value, kind="stable")
    chosen = []
    for label in (doc, place):
        unused = order[~np.isin(label[order], label[chosen])]
        _, first = np.unique(label[unused], return_index=True)
        chosen += unused[np.sort(first)][:n_top - len(chosen)].tolist()
    named = [(index, "top") for index in chosen]
    for name, q in QUANTILES:
        free = np.flatnonzero(~np.isin(doc, doc[chosen]))
        if len(free) == 0:
            free = np.setdiff1d(np.arange(len(value)), chosen)
        if len(free) == 0:
            break
        index = int(free[np.abs(value[free] - np.quantile(value, q)).argmin()])
        chosen.append(index)
        named.append((index, name))
    return named


def levels(value, peak):
    """Activations as whole numbers 0..99 of `peak`; what fires is at least 1."""
    return np.ceil(99 * np.clip(value / peak, 0, 1)).astype(int).tolist()


class Page:
    """The rows, documents and tokens that latents.json holds, and the passages in them.

    Positions count from the row's start; from..to is half-open, as in Python.
    """

    def __init__(self, rows, scorer, text):
        context = rows.doc.shape[1]
        n_rows = min(scorer.sample_rows, max(1, PAGE_TOKENS // context))
        self.context = context
        self.known = sample_tokens(rows.cut(0, n_rows))
        codes = sparse.vstack(scorer.sample).tocsr()
        self.codes = codes[:n_rows * context]
        self.columns = self.codes.tocsc()
        self.columns.sort_indices()
        self.segments = [  # (row, from, to) of each segment
            (int(tokens[0]) // context, int(tokens[0]) % context, int(tokens[-1]) % context + 1)
            for tokens in tokens_of_segments(self.known.seg)]
        self.strings = []
        self.index = np.empty((0, context), int)
        if rows.tokens is not None:
            ids, where = np.unique(self.known.ids, return_inverse=True)
            self.strings = [text(token) for token in ids.tolist()]
            self.index = where.reshape(-1, context)

    def documents(self):
        """[[from, to, topic]] of each row; topic -1 where there is none."""
        out = [[] for _ in self.index]
        if len(out):
            for row, start, stop in self.segments:
                topic = int(self.known.topic[row * self.context + start])
                out[row].append([start, stop, topic])
        return out

    def firings(self, latent):
        """Token indices at which a latent is above 0, in order, and its activations there."""
        part = slice(self.columns.indptr[latent], self.columns.indptr[latent + 1])
        at = self.columns.indices[part]
        value = self.columns.data[part]
        return at[value > 0], value[value > 0]

    def top(self, latent):
        """Numbers of the tokens, in the page's list, on which the latent adds up highest."""
        if len(self.index) == 0:
            return []
        at, value = self.firings(latent)
        total = np.bincount(self.index.ravel()[at], value, 1)
        best = np.argsort(-total, kind="stable")[:5]
        return best[total[best] > 0].tolist()

    def passages(self, latent):
        """Where the latent fires: its highest firings and some nearer to the middle."""
        at, value = self.firings(latent)
        out = []
        if len(at) == 0 or len(self.index) == 0:
            return out
        peak = value.max()
        for index, name in pick_firings(value, self.known.doc[at], at // (BEFORE + AFTER)):
            row, first, last = self.segments[self.known.seg[at[index]]]
            position = int(at[index]) % self.context
            start = max(first, position - BEFORE)
            stop = min(last, position + AFTER + 1)
            shown = slice(*np.searchsorted(at, row * self.context + np.array([start, stop])))
            out.append({
                "row": row, "from": start, "to": stop, "at": (at[shown] % self.context).tolist(),
                "a": levels(value[shown], peak), "q": name})
        return out

    def codes_along(self, row, start, stop):
        """[[latent, [positions], [levels]]] of every latent that fires there."""
        part = self.codes[row * self.context + start:row * self.context + stop].tocsc()
        part.sort_indices()
        out = []
        for latent in np.flatnonzero(np.diff(part.indptr)).tolist():
            here = slice(part.indptr[latent], part.indptr[latent + 1])
            value = part.data[here]
            up = value > 0
            if up.any():
                _, every = self.firings(latent)
                position = (part.indices[here][up] + start).tolist()
                out.append([latent, position, levels(value[up], every.max())])
        return out

    def texts(self):
        """Whole documents with all their codes, and one row's part that joins two documents.

        They depend on the rows alone, so that two runs show the same ones. A document is whole if
        it lies in one row and another one follows it there; where there are too few, parts will do.
        Longer ones and other topics come first.
        """
        if len(self.index) == 0:
            return []
        begins = [row * self.context + start for row, start, _ in self.segments]
        docs = self.known.doc[begins]
        topics = self.known.probed_topic[begins]
        times = np.bincount(docs)
        keys = []
        for number, (row, start, stop) in enumerate(self.segments):
            follows = number + 1 < len(docs) and self.segments[number + 1][0] == row
            # the first row may begin with the end of a document that is not here
            whole = follows and times[docs[number]] == 1 and row > 0
            keys.append((not whole, start - stop, number))
        ranked = [number for _, _, number in sorted(keys)]
        best = {}  # of each topic
        for number in ranked:
            best.setdefault(topics[number], number)
        picked = list(dict.fromkeys([*best.values(), *ranked]))[:TEXTS]
        out = [self.excerpt("document", *self.segments[number]) for number in sorted(picked)]
        return out + self.join()

    def join(self):
        """The two neighbouring segments of which the shorter one is longest, if there are two."""
        best = 0
        found = []
        for (row, start, cut), (other, begin, stop) in itertools.pairwise(self.segments):
            if row == other and min(cut - start, stop - begin) > best:
                best = min(cut - start, stop - begin)
                found = [self.excerpt("join", row, start, stop)]
        return found

    def excerpt(self, kind, row, start, stop):
        """One entry of "texts"."""
        return {
            "row": row, "from": start, "to": stop, "kind": kind,
            "codes": self.codes_along(row, start, stop)}


def listed_latents(stats, fires):
    """(indices of the latents that latents.json lists, a sentence that says which)."""
    alive = np.flatnonzero(fires > 0)
    if len(alive) <= PAGE_LATENTS:
        return alive, f"all {len(alive)} latents that fire"
    rho = np.where(stats["keep"], np.nan_to_num(stats["autocorr"][-1], nan=-1), -1)
    heavy = alive[np.argsort(-fires[alive], kind="stable")[:PAGE_LATENTS // 2]]
    others = np.setdiff1d(alive, heavy)
    slow = others[np.argsort(-rho[others], kind="stable")[:PAGE_LATENTS - len(heavy)]]
    note = (
        f"{PAGE_LATENTS} of {len(alive)} latents that fire: the {len(heavy)} that fire most, and "
        "of the others those whose autocorrelation at the longest lag is highest")
    return np.sort(np.concatenate([heavy, slow])), note


def page_latents(page, stats, listed, up):
    """The entries of "latents". up: the tokens that each one listed pushes up."""
    best, lift = topic_preference(page.codes, page.known.probed_topic, len(page.known.topic_names))
    scored = stats["keep"]
    rho1 = np.where(scored, stats["autocorr"][0], np.nan)
    rho16 = np.where(scored, stats["autocorr_16"], np.nan)
    out = []
    for latent, tokens in zip(listed.tolist(), up):
        _, value = page.firings(latent)
        entry = {
            "i": latent, "rate": stats["rate"][latent], "span": stats["span"][latent],
            "rho1": rho1[latent], "rho16": rho16[latent], "cluster": stats["cluster"][latent],
            "partner": stats["partner"][latent], "partner_corr": stats["partner_corr"][latent],
            "topic": best[latent], "topic_lift": lift[latent], "top": page.top(latent),
            "up": tokens, "max": value.max(initial=0.0)}
        out.append(plain(entry, 3) | {"passages": page.passages(latent)})
    return out


def latents_json(cfg, held_out, scorer, stats, consistency, final, run):
    """The contents of latents.json; of a run with several seeds for the first one.

    final: the contents of final_info.json.
    """
    sae = scorer.sae
    ours = sae.spec.get("temporal_sae") or {}
    page = Page(held_out.rows, scorer, held_out.text)
    listed, note = listed_latents(stats, scorer.fidelity.fires)
    up = [[] for _ in listed]
    if held_out.lm is not None:
        up = pushed_up(held_out.lm, sae.W_dec, listed, held_out.text)
    found = next(iter(final.values()))
    numbers = {}
    for name, value in found["means"].items():
        numbers[name] = [value, found["stderrs"].get(name)]
    scored_on = consistency["scored_on"]
    about = {
        "run": run, "model": scored_on["model"], "layer": scored_on["layer"],
        "d_sae": sae.W_dec.shape[0], "k": ours.get("k", sae.spec.get("k")),
        "sparsity": ours.get("sparsity", sae.selection), "lead": scorer.n_lead,
        "dataset": scored_on["dataset"], "temp_loss": cfg.get("temp_loss"),
        "temp_alpha": cfg.get("temp_alpha"), "window": cfg.get("window"),
        "headline": numbers, "note": note}
    kinds = consistency["clusters"] or {"list": []}
    return plain(about, 5) | {
        "clusters": [cluster["name"] for cluster in kinds["list"]],
        "topics": page.known.topic_names, "tokens": page.strings, "rows": page.index.tolist(),
        "docs": page.documents(),
        "latents": page_latents(page, stats, listed, up),
        "texts": page.texts()}


# --------------------------------------------------------------------------------------------------
# 15. Scoring a run, or a folder with one SAE
# --------------------------------------------------------------------------------------------------

DEFAULTS = {  # of what a run's config.json or the command line does not say
    "n_seeds": 1, "dtype": "auto", "device": "auto", "dataset": prepare.EMBEDDED_TEXT,
    "acts": "", "acts_mask": "", "context_size": 128, "eval_rows": 464, "reconstruction_rows": 64,
    "cache_dir": ""}


def read_settings(folder, changes):
    """What to score `folder` on: DEFAULTS, its config.json, and the changes asked for.

    -> (settings, {"settings": a sentence} if the changes differ from what the run says)
    """
    config_file = folder / "config.json"
    own = {}
    if config_file.is_file():
        own = prepare.read_json(config_file)
    elif not folder.is_dir():
        raise ValueError(f"{folder}: there is no such run")
    elif not (folder / "sae_weights.safetensors").is_file():
        raise ValueError(
            f"{folder} holds neither a run (config.json) nor an SAE (sae_weights.safetensors)")
    elif (folder / "cfg.json").is_file():
        origin = prepare.read_json(folder / "cfg.json").get("metadata") or {}
        hooked = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", str(origin.get("hook_name")))
        if hooked:  # hook_layer, beside it, is missing from newer files of SAELens
            own = {"layer": int(hooked[1])}
    cfg = DEFAULTS | own | changes
    if not cfg["acts"] and (cfg.get("model") is None or cfg.get("layer") is None):
        raise ValueError(
            f"{folder} is an SAE without a run: say --model and --layer, or --acts FILE")
    differ = [name for name, value in changes.items() if name in own and own[name] != value]
    differ = [name for name in differ if name not in ("device", "cache_dir")]
    notes = {}
    if differ:
        notes["settings"] = (
            "scored with " + ", ".join(f"{name} {public_name(str(cfg[name]))}" for name in differ)
            + "; the run says " + ", ".join(public_name(str(own[name])) for name in differ))
    return cfg, notes


def find_seeds(folder, cfg):
    """The folders with weights, in order of seed: folder itself or all its seed_K."""
    if (folder / "sae_weights.safetensors").is_file():
        return [folder]
    found = {}
    for path in folder.glob("seed_*"):
        number = path.name.removeprefix("seed_")
        if number.isdigit() and (path / "sae_weights.safetensors").is_file():
            found[int(number)] = path
    if len(found) != cfg["n_seeds"]:
        raise ValueError(
            f"{folder} holds trained weights (seed_*/sae_weights.safetensors) for {len(found)} of "
            f"its {cfg['n_seeds']} seeds")
    return [found[number] for number in sorted(found)]


def leading_latents(sae, cfg):
    """Number of latents in the lead: what cfg.json says, else the run's fraction, else 20 %."""
    d_sae = sae.W_dec.shape[0]
    said = (sae.spec.get("temporal_sae") or {}).get("lead") or 0
    if 0 < said < d_sae:
        return said
    fraction = cfg.get("temporal_fraction", 1.0)
    if not 0 < fraction < 1:
        fraction = DEFAULT_LEAD
    return max(1, round(fraction * d_sae))


class HeldOut(NamedTuple):
    """What SAEs are scored on."""

    lm: torch.nn.Module  # None where activations were given
    block: torch.nn.Module  # the hooked decoder block; None likewise
    text: object  # function: token id -> string, not called where there is no text
    ce_rows: Rows  # for CE and KL
    rows: Rows  # for everything else
    acts: torch.Tensor  # (N,T,d_in) activations of `rows`
    hash: str  # of what the rows hold
    identity: dict  # of model and text, as a run records it
    scored_on: dict  # model, layer, dtype and data set, as the record names them


def check_width(d_in, width, what):
    """ValueError where an SAE of input width `width` cannot read d_in dimensions."""
    if d_in != width:
        raise ValueError(f"the SAE reads {width} dimensions, {what} gives {d_in}")


def hold_out_acts(cfg, width):
    """HeldOut of a file of activations: the rows that prepare.load_acts holds out."""
    data = prepare.load_acts(cfg["acts"], cfg["acts_mask"], cfg["eval_rows"])
    check_width(data.acts.shape[-1], width, public_name(cfg["acts"]))
    held = np.asarray(data.heldout)
    doc = np.asarray(data.doc)[held]
    acts = data.acts[held]
    digest = prepare.sha256(doc, acts.view(torch.uint8).numpy())
    scored_on = {
        "model": None, "layer": None, "dtype": str(data.acts.dtype).removeprefix("torch."),
        "dataset": Path(cfg["acts"]).stem}
    rows = Rows(None, doc, {})
    return HeldOut(
        None, None, str, rows.cut(0, 0), rows, acts, digest, data.identity, scored_on)


def hold_out_text(cfg, width, device):
    """HeldOut of the data set's held-out rows, with the model loaded."""
    model = cfg["model"]
    cache = cfg["cache_dir"]
    prepare.check_model(model, cfg["layer"], cfg["context_size"])
    d_in = prepare.model_shape(model, cache)[0]
    check_width(d_in, width, f"a layer of {public_name(model)}")
    options = {name: cfg[name] for name in TEXT_OPTIONS if name in cfg}
    inputs = prepare.text_rows(cfg["dataset"], model, **options)
    held = inputs.heldout[0:len(inputs.heldout)]
    rows = Rows(
        np.asarray(held["tokens"], np.int64), np.asarray(held["doc"], np.int32),
        inputs.topics)
    n_ce = cfg["reconstruction_rows"]
    if not 0 <= n_ce < len(rows.tokens):
        raise ValueError(
            f"{n_ce} rows for CE/KL leave none of the {len(rows.tokens)} rows for other metrics")
    dtype = prepare.pick_dtype(cfg["dtype"], device)
    lm, tokenizer = prepare.load_lm(model, dtype, device, cache)
    block = prepare.decoder_blocks(lm)[cfg["layer"]]
    rest = rows.cut(n_ce, len(rows.tokens))
    acts = held_out_activations(cfg, lm, block, rest.tokens, dtype)
    scored_on = {
        "model": public_name(model), "layer": cfg["layer"],
        "dtype": str(dtype).removeprefix("torch."), "dataset": public_name(cfg["dataset"])}
    return HeldOut(
        lm, block, prepare.token_text(tokenizer), rows.cut(0, n_ce), rest, acts,
        prepare.sha256(rows.tokens, rows.doc), inputs.identity, scored_on)


def check_recorded(run_dir, identity):
    """A note where the run's record names other inputs: then what is held out may be trained on."""
    recorded = None
    if (run_dir / "environment.json").is_file():
        recorded = prepare.read_json(run_dir / "environment.json").get("inputs")
    if recorded is None or recorded == json.loads(json.dumps(identity)):
        return {}
    return {
        "inputs": "the model or the text is not, or may not be, the one of the run's record: "
        "documents held out here may have been trained on"}


def score_behaviour(held_out, saes):
    """-> (lm_behaviour of each SAE, all NaN without a model or rows; notes that say why)."""
    reason = None
    if held_out.lm is None:
        reason = "scored on given activations: there is no language model to run"
    elif not (held_out.ce_rows.doc > 0).any():
        reason = "no row with an ordinary token was set aside for them"
    if reason:
        unknown = dict.fromkeys(("clean", "ablation", "sae"), math.nan)
        scores = behaviour_scores(unknown, unknown, "sae")
        return [scores] * len(saes), {NO_BEHAVIOUR: reason}
    return lm_behaviour(held_out.lm, held_out.block, saes, held_out.ce_rows), {}


def count_rows(held_out, rows, left_out):
    """The counts that stand in every file. rows: held_out.rows, with doc 0 at sinks, too."""
    seg = segment_ids(rows.doc)
    return {
        "rows": len(rows.doc), "reconstruction_rows": len(held_out.ce_rows.doc),
        "context": rows.doc.shape[1], "tokens": int((rows.doc > 0).sum()), "left_out": left_out,
        "documents": len(np.unique(rows.doc[rows.doc > 0])), "segments": int(seg.max()) + 1}


def evaluate_run(run_dir, *, out=None, **changes):
    """Score every seed of a run, or one SAE folder; write the four files; return final_info.

    run_dir: a run (config.json, seed_K/...) or a folder with cfg.json and sae_weights.safetensors.
    out: where to write, else run_dir.
    changes: settings that take precedence over config.json (model, layer, dataset, device, ...).
    All seeds share one pass over the rows. No score is written before all of them are computed.
    """
    run_dir = Path(run_dir)
    out = Path(out or run_dir)
    home = run_dir.resolve()
    in_place = out.resolve() == home
    if in_place and home.name.startswith("seed_") and (home.parent / "config.json").is_file():
        raise ValueError(
            f"{run_dir} is one seed of a run, which keeps its own scores: score the run, or give "
            "--out FOLDER")
    cfg, notes = read_settings(run_dir, changes)
    if in_place and "settings" in notes and (home / "config.json").is_file():
        raise ValueError(
            f"{notes['settings']}: give --out FOLDER, so that the run keeps its own scores")
    seed_dirs = find_seeds(run_dir, cfg)
    saes = [load_sae(folder) for folder in seed_dirs]  # a broken file is refused before the rest
    device = prepare.pick_device(cfg["device"])
    width = saes[0].W_dec.shape[1]
    if cfg["acts"]:
        held_out = hold_out_acts(cfg, width)
    else:
        held_out = hold_out_text(cfg, width, device)
    notes |= check_recorded(run_dir, held_out.identity)
    for sentence in notes.values():
        prepare.say(f"note: {sentence}")
    for sae in saes:
        sae.to(device)
    rows, left_out = leave_out_sinks(held_out.rows, held_out.acts)
    held_out = held_out._replace(rows=rows)
    behaviour, reasons = score_behaviour(held_out, saes)
    scorers, sums, x = stream(rows, held_out.acts, saes, leading_latents(saes[0], cfg))
    raw = raw_scores(sums, x, rows)

    counts = count_rows(held_out, rows, left_out)
    files = {}
    heads = []
    for seed_dir, scorer, lm_scores in zip(seed_dirs, scorers, behaviour):
        weights = prepare.sha256(seed_dir / "sae_weights.safetensors")
        hashes = {"evaluate": SOURCE_SHA256, "rows": held_out.hash, "weights": weights}
        record = {
            "scored_on": held_out.scored_on, "counts": counts, "hashes": hashes,
            "notes": notes | reasons}
        core = core_json(scorer, lm_scores, record)
        consistency, stats = consistency_json(scorer, raw, rows, record, held_out.text)
        folder = out
        if len(seed_dirs) > 1:
            folder = out / seed_dir.name
        files[folder / "core.json"] = core
        files[folder / "consistency.json"] = consistency
        heads.append(headline(core, consistency))
        if seed_dir == seed_dirs[0]:
            first = (scorer, stats, consistency)
    mcc = pw_mcc([sae.W_dec for sae in saes])
    final = {held_out.scored_on["dataset"]: summarise(heads, mcc)}
    page = latents_json(cfg, held_out, *first, final, home.name)
    for path, tree in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        prepare.write_json(path, tree)
    prepare.write_json(out / "latents.json", page)
    prepare.write_json(out / "final_info.json", final)  # last: it says that a new folder is whole
    return final


def print_scores(final):
    """The block at the end of a run, one "name: value" a line."""
    print("---")
    for block in final.values():
        for name, value in block["means"].items():
            print(f"{name}: {value:.6g}")


# --------------------------------------------------------------------------------------------------
# 16. Command line
# --------------------------------------------------------------------------------------------------

OPTIONS = (  # name, type, help; all of them take precedence over the run's config.json
    ("model", str, "language model: a local folder, a hub id, or an embedded one by name"),
    ("layer", int, "decoder block whose output the SAE reads; 0 is the first"),
    ("dtype", str, "of the language model: auto, float32 or bfloat16"),
    ("device", str, "auto, cpu, cuda, ..."),
    ("dataset", str, "text, as in experiment.py"),
    ("dataset_config", str, "configuration of a hub data set"),
    ("split", str, "split of a hub data set"),
    ("text_field", str, "column that holds the text"),
    ("encoding", str, "of text files"),
    ("acts", str, "file of activations (N,T,d_in) in place of a model and text"),
    ("acts_mask", str, "its documents: (N,T) int, 0 = leave out"),
    ("context_size", int, "tokens a row"),
    ("harvest_tokens", int, "training tokens of the run whose held-out rows these are"),
    ("eval_rows", int, "held-out rows"),
    ("reconstruction_rows", int, "leading rows for CE/KL; the rest is for all else (64)"),
    ("cache_dir", str, "if empty, $TEMPORAL_SAE_CACHE or ~/.cache/temporal-sae"))


def find_run(name):
    """Folder of a run. A bare name is looked for in runs/ and runs/study/ of this repo first."""
    path = Path(name).expanduser()
    if len(path.parts) == 1:
        for folder in (REPO / "runs", REPO / "runs" / "study"):
            if (folder / path).is_dir():
                return folder / path
    return path


def parse(argv):
    """Command line -> argparse's namespace; of OPTIONS it holds those that were given."""
    parser = prepare.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="its folder, or its name in runs/ or runs/study/")
    parser.add_argument("--out", metavar="DIR", help="write here, not over the run's own scores")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    for name, kind, text in OPTIONS:
        flags = sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)
        parser.add_argument(*flags, dest=name, type=kind, default=argparse.SUPPRESS, help=text)
    return parser.parse_args(argv)


def report(error, debug):
    """Print one sentence for an error, with debug its traceback too. -> exit code

    A ValueError of our own is the user's to mend (2); one from inside a library is a failure (1).
    """
    if debug:
        traceback.print_exception(error)
    sentence = prepare.first_line(error)
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename).name
    ours = last in ("evaluate.py", "prepare.py")
    if not ours and not debug:
        sentence += " (--debug shows where)"
    print(f"error: {sentence}", file=sys.stderr)
    if ours and isinstance(error, ValueError):
        return 2
    return 1


def main(argv=None):
    """The command. -> exit code: 0, 1 it failed, 2 bad usage or input, 130 stopped by Ctrl-C."""
    debug = False
    try:
        changes = vars(parse(argv))
        debug = changes.pop("debug")
        out = changes.pop("out")
        run = find_run(changes.pop("run"))
        print_scores(evaluate_run(run, out=out, **changes))
        print(f"written: {out or run}")
    except Exception as error:  # whatever went wrong, the user gets one sentence
        return report(error, debug)
    except KeyboardInterrupt:
        if argv is not None:  # called from Python: stop the caller's loop too
            raise
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def terminate(number, frame):
    """The handler of SIGTERM: exit with 143, so that `finally` removes half-written files."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
