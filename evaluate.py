"""The judge: scores a trained sparse autoencoder (SAE) on held-out text.

    python evaluate.py run_2                             score a run again
    python evaluate.py run_2 --model OTHER --out FOLDER  the same SAE on another model of its width
    python evaluate.py FOLDER --model M --layer L        any SAE in SAELens' format

It imports nothing of experiment.py, the file that is edited for every run, and should not change
between runs that are compared: its SHA-256 stands in every score. It writes

    core.json         the keys of SAEBench 0.6.0's core eval, with its numbers
    consistency.json  how the codes behave along a text, and what probes read in them
    final_info.json   the headline: means, standard errors and the value of each seed

No score is written before all of them are computed. What is measured, on documents that were never
trained on; BOS, EOS, PAD and attention sinks are left out:

    explained_variance    1 - sum |x - x_hat|^2 / sum |x - mean x|^2
    mse, cossim, l2_ratio means of (x - x_hat)^2 over tokens and dimensions, of cos(x, x_hat), of
                          |x_hat| / |x|
    relative_reconstruction_bias  sum |x_hat|^2 / sum x . x_hat
    l0, l1, frac_alive    codes that are not 0 a token; sum |f| a token, decoder rows at unit norm;
                          share of latents that fire at all
    ce_loss_score         (CE_ablated - CE_sae) / (CE_ablated - CE_clean), the residual zeroed for
                          the ablation; on the first reconstruction_rows, the rest on the others
    kl_div_score          (KL_ablated - KL_sae) / KL_ablated, against the clean model
    autocorr_1, _16       mean over latents (20 firings or more) of Corr(f_t, f_t+lag) inside
                          documents. _lead, _rest: of the leading latents, of the others; _best: of
                          the best ones, as many as leading latents count
    span                  mean length in tokens of the stretches over which a latent stays on
    smoothness_S          mean over the latents active in a row of max_t |f_t - f_t-1| / |x_t - x_t-1|,
                          then over rows: T-SAE's measure (arXiv 2511.05541); lower is smoother
    token_topic_5         AUROC of a logistic probe for a document's topic from ONE token's code, by
                          the 5 latents whose class means differ most; mean over topics
    token_class_5         the same for the class of a token: word part, punctuation, digit, capital
    document_id           which of 120 documents a token is from: accuracy of one multinomial probe
    document_id_shifted   the same for passages: fitted where each is read alone, scored on its other
                          half after 64 tokens of another document, so place and neighbours do not help
    boundary              AUROC with which 1 - cos(mean leading code of the 8 tokens before, after)
                          tells a join of two documents from a place inside one
    position_probe        accuracy with which a probe on the leading latents tells in which eighth
                          of its row a token stands; chance is .125. _best: on as many of the best
    position_eta2         share of a leading latent's variance that its place in the row explains,
                          less chance
    shift_consistency     correlation of a leading latent's code with itself, the same passage read
                          alone and after 64 tokens of another document
    redundant_share       share of latents whose codes correlate above .9 with another one's
    pw_mcc                between seeds: mean cosine of decoder rows, matched one to one
"""
# Notation: x (..., d_in) an activation, x_hat its reconstruction, f or acts (..., d_sae) the codes.
# doc (N,T) holds 0 at a token that is left out and its document's number + 1 elsewhere: a *valid*
# token. A *segment* is the part of one document inside one row. A *pair* (t, t + lag) is two valid
# tokens of one segment. Latents come in three *groups*: whole, lead (the leading latents, which the
# temporal loss binds) and rest. Sums are in float64 with one division at the end.
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import sys
import time
import uuid
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import prepare  # before torch: it tells OpenMP's threads how to wait
import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import sparse
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits
from tqdm import tqdm

# The mean of nothing is NaN, which becomes null with a reason.
warnings.filterwarnings("ignore", message="Mean of empty slice|invalid value encountered")

SOURCE_SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
RUNS = Path(__file__).resolve().parent / "runs"

# A decorator: BLAS on one thread adds up in a fixed order, and is no slower for small products.
one_thread = threadpool_limits.wrap(limits=1)

ARCHITECTURES = ("standard", "topk", "jumprelu")  # of SAELens, that can be judged
BATCH_ROWS = 16  # SAEBench's batch; its mse and its bias are means over batches of this size
BEST_LAG = 16  # lag at which the best latents are chosen and the slowest directions fitted
MIN_FIRINGS = 20  # latents that fire less often have no correlation worth averaging
SAMPLE_ROWS = 512  # rows whose codes are kept (sparse), for all but fidelity
SAMPLE_CODES = 20_000_000  # and at most so many codes: 240 MB
MATRIX_SIDE = 128  # position matrices are at most this wide; longer contexts share cells
ID_TOKENS = 25  # tokens of a document that the document probe reads
EDGE = 8  # tokens on each side of a place that may be a boundary
FEW_DOCUMENTS = 20  # below which scores come with a warning
PASSAGE = 44  # tokens of a passage that is read twice, at other places
# what config.json or the command line may say of the text, handed on to prepare.text_rows
TEXT_OPTIONS = (
    "context_size", "harvest_tokens", "view_share", "eval_rows", "text_field", "dataset_config",
    "split", "sample_by", "encoding", "cache_dir")


# --------------------------------------------------------------------------------------------------
# 1. Numbers and names; the SAE: any folder in SAELens' format
# --------------------------------------------------------------------------------------------------


def plain(value, digits=None):
    """What JSON can hold: numpy and torch values become Python's, NaN and infinity None.

    digits: significant digits of floats; None keeps them all.
    """
    if isinstance(value, dict):
        return {str(key): plain(part, digits) for key, part in value.items()}
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(part, digits) for part in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        if digits is not None:
            return float(f"{value:.{digits}g}")
    return value


def ratio(a, b):
    """a / b as a float; NaN, which becomes null with a reason, where b is 0."""
    if b == 0:
        return math.nan
    return float(a) / float(b)


def public_name(name):
    """A model's or data set's name as it may be published: of a local path the last part."""
    path = Path(name).expanduser()
    if path.is_absolute() or path.exists():
        return path.resolve().name
    return str(name)


def tensor_hash(tensors):
    """SHA-256 over the sorted names and the bytes of {name: tensor}: same weights, same hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class SAE(torch.nn.Module):
    """A sparse autoencoder as it is used: it encodes one token at a time.

        acts  = select(act(W_enc^T (norm(x) - b_dec) + b_enc))
        x_hat = unnorm(W_dec^T acts + b_dec)

    select: nothing (standard), the k largest (topk), what exceeds its threshold (jumprelu). act:
    ReLU, or GELU in our variant. norm: none or layer_norm, as in SAELens. Where
    apply_b_dec_to_input is false, b_dec is not subtracted. All tensors are float32.
    """

    def __init__(self, spec, tensors):
        """spec: the contents of cfg.json. KeyError or ValueError where something is missing."""
        super().__init__()
        self.spec = spec
        self.selection = (spec.get("architecture") or "standard").removeprefix("temporal_sae_")
        self.norm = spec.get("normalize_activations") or "none"
        act = spec.get("activation_fn") or spec.get("activation_fn_str") or "relu"
        supported = {
            "architecture": (self.selection, ARCHITECTURES),
            "normalize_activations": (self.norm, ("none", "layer_norm")),
            "reshape_activations": (spec.get("reshape_activations") or "none", ("none",)),
            "finetuning_scaling_factor": (bool(spec.get("finetuning_scaling_factor")), (False,)),
            "the activation function": (act, ("relu", "topk"))}
        for name, (value, known) in supported.items():
            if value not in known:
                raise ValueError(f"{name} {value} is not supported")
        d_in, d_sae = tensors["W_enc"].shape
        shapes = {
            "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
        if self.selection == "jumprelu":
            shapes["threshold"] = (d_sae,)
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {shape}")
            self.register_buffer(name, tensors[name].float())
        if self.selection == "standard" and act == "topk":  # so SAELens 3 to 5 wrote it
            self.selection = "topk"
        k = spec.get("k", (spec.get("activation_fn_kwargs") or {}).get("k", 100))
        if self.selection == "topk" and not (isinstance(k, (int, float)) and k >= 1 and k % 1 == 0):
            raise ValueError(f"k {k} is not a whole number above 0")
        self.k = min(int(k or 1), d_sae)  # of topk: 100 is SAELens' default where it is absent
        for name in tensors.keys() - shapes.keys() - {"scale"}:
            if name != "scaling_factor" or (tensors[name] != 1).any():  # old SAELens wrote ones
                raise ValueError(f"no {self.selection} SAE has a tensor {name}")
        self.gelu = (spec.get("temporal_sae") or {}).get("nonlinearity") == "gelu"
        self.scale = float(tensors.get("scale", 1.0))
        self.subtracts_b_dec = bool(spec.get("apply_b_dec_to_input", True))
        self.rescaled = bool(spec.get("rescale_acts_by_decoder_norm", False))

    def normalise(self, x):
        """x (..., d_in) -> (normalised x, scale, shift): x = normalised * scale + shift."""
        if self.norm == "layer_norm":  # SAELens' formula: ddof 1, eps 1e-5 beside the deviation
            mean = x.mean(-1, keepdim=True)
            std = x.std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), std, mean
        return x, 1.0, 0.0

    def encode(self, x):
        """x (..., d_in) raw activations in float32 -> acts (..., d_sae)."""
        x, _, _ = self.normalise(x)
        if self.subtracts_b_dec:
            x = x - self.b_dec
        pre = x @ self.W_enc + self.b_enc
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
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no weights ({name} is missing): no SAE in SAELens' "
                             "format, or a run of ours; git keeps no weights, train it again")
    try:
        spec = prepare.read_json(folder / "cfg.json")
        tensors = load_file(folder / "sae_weights.safetensors")
        recorded = (spec.get("temporal_sae") or {}).get("sha256")
        if recorded and tensor_hash(tensors) != recorded:
            raise ValueError("they are not the ones that were trained: their SHA-256 differs")
        return SAE(spec, tensors).to(device)
    except KeyError as error:
        raise ValueError(f"{folder}: the weights have no tensor {error}") from None
    except (SafetensorError, ValueError, TypeError, AttributeError, OSError) as error:
        reason = prepare.first_line(error)
        raise ValueError(f"{folder}: the weights cannot be used ({reason})") from None


# --------------------------------------------------------------------------------------------------
# 2. Rows of held-out text, and the language model that reads them
# --------------------------------------------------------------------------------------------------


class Rows:
    """N rows of T tokens and what is known of each token; the arrays below are flat, n = N*T."""

    def __init__(self, tokens, doc, topics):
        self.tokens = tokens  # (N,T) int64; None when activations were given instead of text
        self.doc = doc  # (N,T): 0 where a token is left out, else its document's number + 1
        self.topics = topics  # document's number -> its label; empty where there are no labels
        self.context = doc.shape[1]
        self.flat_doc = doc.ravel()
        self.valid = self.flat_doc > 0
        self.place = np.arange(doc.size) % self.context  # position in the row

    def cut(self, start, stop):
        """The rows start..stop."""
        tokens = None if self.tokens is None else self.tokens[start:stop]
        return Rows(tokens, self.doc[start:stop], self.topics)

    @functools.cached_property
    def seg(self):
        """(n,) the segment of each token."""
        return segment_ids(self.doc)

    @functools.cached_property
    def into(self):
        """(n,) tokens since the first of its segment, -1 where left out."""
        first = np.full(self.seg.max(initial=0) + 1, self.seg.size)
        at = np.flatnonzero(self.valid)
        np.minimum.at(first, self.seg[at], at)
        return np.where(self.valid, np.arange(self.seg.size) - first[self.seg], -1)

    @functools.cached_property
    def topic_members(self):
        """{topic: (n,) bool, the tokens of its documents}; "Uncategorized" is none."""
        documents = np.array([number + 1 for number in self.topics], int)
        labels = np.array(list(self.topics.values()), object)
        return {label: np.isin(self.flat_doc, documents[labels == label])
                for label in sorted(set(labels)) if label.lower() != "uncategorized"}

    @functools.cached_property
    def in_train(self):
        """(n,) bool: the tokens of 70 % of the documents, drawn at random, that probes fit."""
        documents = np.unique(self.flat_doc[self.valid])
        chosen = np.random.default_rng(0).permutation(len(documents)) < 0.7 * len(documents)
        return np.isin(self.flat_doc, documents[chosen])

    @functools.cached_property
    def draws(self):
        """[(last ID_TOKENS tokens of each of 120 documents or fewer, a random order of them)].

        Four draws among the documents with 40 valid tokens; none if there is one such document.
        """
        documents, size = np.unique(self.flat_doc[self.valid], return_counts=True)
        documents = documents[size >= 40]
        n = min(len(documents), 120)
        rng = np.random.default_rng(0)
        draws = []
        for _ in range(4 if n > 1 else 0):
            chosen = rng.permutation(documents)[:n]
            last = [np.flatnonzero(self.flat_doc == number)[-ID_TOKENS:] for number in chosen]
            draws.append((np.concatenate(last), rng.permutation(n * ID_TOKENS)))
        return draws


def segment_ids(doc):
    """(B,T) doc -> (B*T,) the segment of each token, numbered as they begin; -1 where doc is 0.

    >>> segment_ids(np.array([[0, 7, 0, 7, 3], [3, 3, 0, 0, 0]]))
    array([-1,  0, -1,  0,  1,  2,  2, -1, -1, -1])
    """
    flat = doc.ravel().astype(np.int64)
    valid = np.flatnonzero(flat > 0)
    row = valid // doc.shape[1]
    key = row * (flat.max(initial=0) + 1) + flat[valid]
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    seg = np.full(flat.size, -1)
    seg[valid] = np.argsort(np.argsort(first))[which]
    return seg


def pairs_at(seg, lag):
    """(p,) left ends of the pairs (t, t + lag). Rows never share a segment, so none is crossed."""
    return np.flatnonzero((seg[:-lag] == seg[lag:]) & (seg[lag:] >= 0))


def permute_segments(seg, rng):
    """(n,) index that shuffles the valid tokens of each segment and leaves the others in place."""
    valid = np.flatnonzero(seg >= 0)
    place = valid[np.argsort(seg[valid], kind="stable")]
    index = np.arange(seg.size)
    index[place] = valid[np.lexsort((rng.random(valid.size), seg[valid]))]
    return index


class StopForward(Exception):
    """Raised in a hook: what lies above the hooked block is not computed."""


@contextlib.contextmanager
def output_replaced(block, replace):
    """While open, the residual output h (B,T,d_in) of a decoder block is replace(h)."""

    def hook(module, inputs, output):
        if isinstance(output, tuple):
            return (replace(output[0]), *output[1:])
        return replace(output)

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


def cached_activations(cfg, lm, block, tokens):
    """tokens (N,T) -> their activations (N,T,d_in), from a file under the cache, mapped to memory.

    The file is named by all that it depends on, and made when it is missing.
    """
    identity = {
        "what": "held-out activations", "model": prepare.model_identity(cfg["model"]),
        "dtype": str(lm.dtype), "device": lm.device.type, "layer": cfg["layer"],
        "tokens": prepare.sha256(tokens), "batch_rows": BATCH_ROWS}  # last bits depend on the batch
    path = prepare.cache_root(cfg["cache_dir"]) / f"heldout-{prepare.digest(identity)}.safetensors"
    if not path.exists():
        starts = tqdm(range(0, len(tokens), BATCH_ROWS), "activations", leave=False, disable=None)
        batches = (tokens[start:start + BATCH_ROWS] for start in starts)
        made = {"acts": torch.cat([
            residuals(lm, block, batch).to(lm.dtype).cpu() for batch in batches])}
        prepare.write_whole(path, functools.partial(save_file, made))
    return load_file(path)["acts"]


def leave_out_sinks(rows, acts):
    """Rows with doc 0 at tokens whose activation is no feature of the text.

    As in training, with the median of these rows: attention sinks, whose norm is above
    prepare.sink_limit of the ordinary tokens' norms, and zero activations.
    """
    norms = torch.linalg.vector_norm(acts, dim=-1, dtype=torch.float32).double().numpy()
    valid = rows.doc > 0
    ordinary = valid & (norms > 0)
    if not np.isfinite(norms[valid]).all() or not ordinary.any():
        raise ValueError("the held-out activations hold NaN or infinity, or are all 0")
    left_out = (norms > prepare.sink_limit(norms[ordinary])) | (norms == 0)
    return Rows(rows.tokens, np.where(left_out, 0, rows.doc).astype(np.int32), rows.topics)


@torch.inference_mode()
def lm_behaviour(lm, block, saes, rows):
    """CE (nats) and KL of the model with its residual clean, reconstructed and zeroed.

    CE: mean over valid tokens t <= T-2 of -log p(token t+1). KL: mean over all valid t of
    sum_v p_clean (log p_clean - log p_other). Tokens that are left out keep their activation in the
    SAE runs; the ablation zeroes every position (SAEBench's protocol). The scores are ratios of
    pooled means: 1 is as clean, 0 as ablated. -> one dict for each SAE.
    """
    ce = defaultdict(list)  # values of single tokens
    kl = defaultdict(list)
    ablated = None
    step = max(1, 512 // rows.context)  # logits of 512 tokens at a time: 100 MB of 49,152 words
    for start in tqdm(range(0, len(rows.doc), step), desc="CE and KL", leave=False, disable=None):
        ids = torch.from_numpy(rows.tokens[start:start + step]).to(lm.device)
        valid = torch.from_numpy(rows.doc[start:start + step] > 0).to(lm.device)
        edits = {"clean": torch.clone, "ablation": torch.zeros_like}
        for number, sae in enumerate(saes):
            edits[number] = functools.partial(reconstructed, sae=sae, valid=valid)
        for name, edit in edits.items():
            if name == "ablation" and ablated is not None:
                logp = ablated.expand(len(ids), -1, -1)
            else:
                with output_replaced(block, edit):
                    logp = lm(ids, use_cache=False).logits.float().log_softmax(-1)
            if name == "ablation" and len(ids) > 1 and torch.equal(logp, logp[:1].expand_as(logp)):
                ablated = logp[:1]  # the same for every row: what lies above reads zeros only
            next_logp = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            ce[name].append(-next_logp[valid[:, :-1]].cpu().double())
            if name == "clean":
                clean = logp
                p = logp.exp()
            divergence = (clean - logp).mul_(p).sum(-1)
            kl[name].append(divergence[valid].cpu().double())
    ce = {name: torch.cat(values).mean().item() for name, values in ce.items()}
    kl = {name: torch.cat(values).mean().item() for name, values in kl.items()}
    return [behaviour_scores(ce, kl, number) for number in range(len(saes))]


def reconstructed(h, sae, valid):
    """h (B,T,d_in) -> its reconstruction where valid (B,T) is True, h elsewhere."""
    x = h.float()
    x_hat = sae.decode(sae.encode(x), x).to(h.dtype)
    return torch.where(valid[..., None], x_hat, h)


def behaviour_scores(ce, kl, name):
    """SAEBench's blocks for one SAE, from the mean CE and KL of each kind of run."""
    return {
        "model_behavior_preservation": {
            "kl_div_score": ratio(kl["ablation"] - kl[name], kl["ablation"]),
            "kl_div_with_ablation": kl["ablation"], "kl_div_with_sae": kl[name]},
        "model_performance_preservation": {
            "ce_loss_score": ratio(ce["ablation"] - ce[name], ce["ablation"] - ce["clean"]),
            "ce_loss_with_ablation": ce["ablation"], "ce_loss_with_sae": ce[name],
            "ce_loss_without_sae": ce["clean"]}}


# --------------------------------------------------------------------------------------------------
# 3. Fidelity and sparsity, as we mean them and as SAEBench 0.6.0 does; core.json
# --------------------------------------------------------------------------------------------------


class Fidelity:
    """Sums for reconstruction and sparsity of one SAE, over batches of BATCH_ROWS rows."""

    def __init__(self, W_dec):
        d_sae, d_in = W_dec.shape
        self.unit = W_dec.cpu().double().norm(dim=1).numpy()  # decoder rows count at unit norm
        self.tokens = 0
        self.x_sum = torch.zeros(d_in, dtype=torch.float64)
        self.sums = Counter()  # over tokens; `update` adds
        self.batch_sums = Counter()  # over batches
        self.fires = np.zeros(d_sae, np.int64)  # tokens with f != 0
        self.positive = np.zeros(d_sae, np.int64)  # tokens with f > 0: differs for GELU only
        self.total = np.zeros(d_sae)
        self.absolute = np.zeros(d_sae)

    def update(self, x, x_hat, codes):
        """x, x_hat (n,d_in) at the n valid tokens; codes csr (B*T,d_sae), empty at the others."""
        x = x.cpu().double()
        y = x_hat.cpu().double()
        rr = (x - y).square().sum(1)
        xx = (x * x).sum(1)
        yy = (y * y).sum(1)
        xy = (x * y).sum(1)
        of_tokens = {
            "rr": rr, "xx": xx, "yy": yy, "xy": xy, "norm_in": xx.sqrt(), "norm_out": yy.sqrt(),
            # a zero vector has no direction, its cosine counts as 0; x_hat = x gives exactly 1
            "cos": torch.where(xx * yy > 0, xy / (xx * yy).sqrt(), 0.0),
            "norm_ratio": yy.sqrt() / torch.where(xx.sqrt() < 1e-4, 1.0, xx.sqrt()),
            # SAEBench's explained_variance_legacy, a mean over tokens of each one's own ratio
            "legacy": 1 - rr / (x - x.mean(0)).square().sum(1)}
        self.sums.update({name: value.sum().item() for name, value in of_tokens.items()})
        self.batch_sums.update({
            "n": 1, "mse": rr.mean().item(), "xx": xx.mean().item(),
            "bias": ratio(yy.mean(), xy.mean())})
        self.x_sum += x.sum(0)
        self.tokens += len(x)
        self.fires += codes.getnnz(axis=0)
        self.positive += (codes > 0).getnnz(axis=0)
        self.total += column_sums(codes)
        self.absolute += column_sums(abs(codes))

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
        power = self.batch_sums["xx"] / self.batch_sums["n"]
        residual = self.batch_sums["mse"] / self.batch_sums["n"]  # |x - y|^2 a token
        faulty = power - (power / len(self.x_sum)) ** 2
        return {
            "reconstruction_quality": {
                "explained_variance": 1 - ratio(residual, faulty),
                "explained_variance_legacy": s["legacy"] / n,
                "mse": self.batch_sums["mse"] / n, "cossim": s["cos"] / n},
            "shrinkage": {
                "l2_norm_in": s["norm_in"] / n, "l2_norm_out": s["norm_out"] / n,
                "l2_ratio": s["norm_ratio"] / n,
                "relative_reconstruction_bias": self.batch_sums["bias"] / self.batch_sums["n"]},
            "sparsity": {"l0": self.fires.sum() / n, "l1": self.total.sum() / n}}


def misc_metrics(sae, density):
    """SAEBench's summary of its feature-wise metrics; density (d_sae,): share of tokens with f > 0.

    normalized_freq_over_*: the share of all firings that the frequent latents have.
    """
    out = {
        "frac_alive": (density > 0).mean(),
        "average_max_encoder_cosine_sim": max_cosine(sae.W_enc.T).mean(),
        "average_max_decoder_cosine_sim": max_cosine(sae.W_dec).mean()}
    for percent in (1, 10):
        frequent = density > percent / 100
        out[f"freq_over_{percent}_percent"] = frequent.mean()
        share = density[frequent].sum() / density.sum() if density.any() else 0
        out[f"normalized_freq_over_{percent}_percent"] = share
    return out


def max_cosine(W):
    """(n,d) rows -> (n,) largest cosine of each row with any other, a block of rows at a time."""
    W = F.normalize(W.float(), dim=1)
    best = []
    for start in range(0, len(W), 1024):
        cos = W[start:start + 1024] @ W.T
        own = torch.arange(len(cos), device=W.device)
        cos[own, own + start] = -torch.inf
        best.append(cos.amax(1))
    return torch.cat(best).double().cpu()


def null_notes(blocks):
    """{block: why} of the blocks of JSON that hold a null."""
    why = "null: too few tokens, pairs, latents that fire, documents or topics, or 0/0"
    return {name: why for name, block in blocks.items() if "null" in json.dumps(block)}


def core_json(sae, fidelity, behaviour, record):
    """SAEBench's core result of one seed; our own values stand under eval_result_unstructured.

    Rows of single latents (eval_result_details) are left out. record: what every file of this seed
    says of how it was made: scored_on, counts ("rows" does not include "reconstruction_rows"),
    hashes, notes.
    """
    scored_on = record["scored_on"]
    counts = record["counts"]
    metrics = plain({
        **behaviour,
        **fidelity.saebench(),
        "token_stats": {  # special tokens included
            "total_tokens_eval_reconstruction": counts["reconstruction_rows"] * counts["context"],
            "total_tokens_eval_sparsity_variance": counts["rows"] * counts["context"]},
        "misc_metrics": misc_metrics(sae, fidelity.positive / fidelity.tokens)})
    ours = fidelity.ours()
    ours["ce_loss_score"] = metrics["model_performance_preservation"]["ce_loss_score"]
    ours["kl_div_score"] = metrics["model_behavior_preservation"]["kl_div_score"]
    notes = record["notes"] | null_notes(metrics)
    return plain({
        "eval_type_id": "core",
        "eval_config": {
            "model_name": scored_on["model"], "llm_dtype": scored_on["dtype"],
            "dataset": scored_on["dataset"], "context_size": counts["context"],
            "batch_size_prompts": BATCH_ROWS,
            "n_eval_reconstruction_batches": math.ceil(counts["reconstruction_rows"] / BATCH_ROWS),
            "n_eval_sparsity_variance_batches": math.ceil(counts["rows"] / BATCH_ROWS),
            "compute_kl": True, "compute_ce_loss": True, "compute_l2_norms": True,
            "compute_sparsity_metrics": True, "compute_variance_metrics": True,
            "compute_featurewise_density_statistics": False,
            "compute_featurewise_weight_based_metrics": False,
            "exclude_special_tokens_from_reconstruction": True, "verbose": False},
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": [],
        "sae_bench_commit_hash": f"none: computed by evaluate.py {SOURCE_SHA256[:12]}",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": f"{scored_on['model']}_layer_{scored_on['layer']}",
        "sae_lens_version": None,
        "sae_cfg_dict": sae.spec,
        "eval_result_unstructured": {"ours": ours, **record, "notes": notes}})


# --------------------------------------------------------------------------------------------------
# 4. Along the text, between latents and between seeds
# --------------------------------------------------------------------------------------------------


def column_sums(matrix):
    """(n,d) csr or array -> (d,) sums of its columns."""
    return np.asarray(matrix.sum(0)).ravel()


def column_products(a, b):
    """a, b (n,d), both csr or both arrays -> (d,) column sums of a * b."""
    return column_sums(a.multiply(b) if sparse.issparse(a) else a * b)


def pair_sums(a, b):
    """a, b (n,d) -> (5,d) the sums over the n lines that a correlation needs."""
    return np.stack([
        column_products(a, b), column_sums(a), column_sums(b), column_products(a, a),
        column_products(b, b)])


def pearson(sums, n):
    """(5,d) sums of a b, a, b, a^2, b^2 over n lines -> (d,) correlation of a and b.

    NaN where a side does not vary: below 1e-9 of the second moment a variance is rounding error.
    """
    product, left, right, left2, right2 = sums / max(n, 1)
    cov = product - left * right
    var_left = left2 - left**2
    var_right = right2 - right**2
    varies = (var_left > 1e-9 * left2) & (var_right > 1e-9 * right2) & (n > 1)
    scale = np.sqrt(np.where(varies, var_left * var_right, 1))
    return np.where(varies, cov / scale, np.nan)


def autocorrelation(values, rows, lags):
    """Corr(f_t, f_t+lag) of each column of values (n,d), csr or dense, which are the first of rows.

    Pooled over all pairs and centred globally. -> (L,d)
    """
    sums = [0.0] * len(lags)
    pairs = [0] * len(lags)
    size = BATCH_ROWS * rows.context  # a part at a time, for dense values take much memory
    for start in range(0, values.shape[0], size):
        block = values[start:start + size].astype(np.float64)
        seg = rows.seg[start:start + size]
        for k, lag in enumerate(lags):
            left = pairs_at(seg, lag)
            sums[k] = sums[k] + pair_sums(block[left], block[left + lag])
            pairs[k] += left.size
    return np.stack([pearson(total, n) for total, n in zip(sums, pairs)])


def spans(codes, seg):
    """(d,) mean run length of each latent in tokens: firings / runs; NaN for one that never fires.

    A run starts at a firing whose previous token did not fire.
    """
    fires = codes.getnnz(axis=0)
    left = pairs_at(seg, 1)
    goes_on = codes[left].multiply(codes[left + 1]).astype(bool).getnnz(axis=0)
    return np.divide(fires, fires - goes_on, out=np.full(len(fires), np.nan), where=fires > 0)


def smoothness(codes, x, rows, parts):
    """T-SAE's S (arXiv 2511.05541), {part: S}; x (n,d_in), or more rows, the activations.

    In each row the largest step |f_t+1 - f_t| / |x_t+1 - x_t| of each latent that is active there;
    mean over these latents, then over rows.
    """
    left = pairs_at(rows.seg, 1)
    dx = np.linalg.norm((x[left + 1] - x[left]).astype(np.float64), axis=1)
    left = left[dx > 0]  # two equal activations have equal codes: 0/0, no step
    dx = dx[dx > 0]
    found = {name: [] for name in parts}
    bounds = np.searchsorted(left, np.arange(0, rows.doc.size + 1, rows.context))
    for start, stop in itertools.pairwise(bounds.tolist()):
        before = codes[left[start:stop]]
        after = codes[left[start:stop] + 1]
        active = before.getnnz(axis=0) + after.getnnz(axis=0) > 0
        step = abs(after - before).multiply(1 / dx[start:stop, None])
        peak = step.max(axis=0).toarray()[0] if start < stop else np.zeros(len(active))
        for name, part in parts.items():
            if active[part].any():
                found[name].append(peak[part].sum() / active[part].sum())
    return {name: np.mean(values) for name, values in found.items()}


def group_means(value, keep, parts):
    """(d,) or (L,d) of latents -> {part: mean over its latents in keep}, NaN where there is none."""
    kept = np.where(keep, value, np.nan)
    return {name: np.nanmean(kept[..., part], -1) for name, part in parts.items()}


def best_latents(value, keep, n):
    """(d,) -> indices of the n latents in keep whose value is highest."""
    ranked = np.argsort(-np.where(keep & np.isfinite(value), value, -np.inf), kind="stable")
    return ranked[:min(n, (keep & np.isfinite(value)).sum())]


@one_thread
def position_matrix(values, rows):
    """Correlation of the columns at positions p and q, mean over columns and over rows.

    values (n,d), csr or dense, standardised over ALL valid tokens, so the diagonals of the result
    average to the pooled autocorrelation. Only rows with p and q in one segment count. Contexts
    beyond MATRIX_SIDE share cells. -> (T,T) matrix, NaN where no row has the pair.
    """
    context = rows.context
    step = math.ceil(context / MATRIX_SIDE)
    side = math.ceil(context / step)
    place = (np.arange(context) // step, np.arange(context))
    bins = sparse.csr_matrix((np.ones(context), place), shape=(side, context))
    inside = values[rows.valid].astype(np.float64)
    mean = column_sums(inside) / inside.shape[0]
    scale = np.sqrt(column_products(inside, inside) / inside.shape[0] - mean**2)
    total = np.zeros((side, side))
    count = np.zeros((side, side))
    for start in range(0, len(rows.seg), context):
        seg = rows.seg[start:start + context]
        z = (to_dense(values[start:start + context]) - mean) / scale
        together = (seg[:, None] == seg) & (seg >= 0)
        total += bins @ np.where(together, z @ z.T, 0) @ bins.T
        count += bins @ together.astype(float) @ bins.T
    return np.where(count > 0, total / np.maximum(count, 1) / max(len(mean), 1), np.nan)


def redundancy(codes, n_valid, fires, latents):
    """How many latents have a near copy? codes csr of the sample, fires (d_sae,), latents: scored.

    -> ({"latents", "share_above_0.9"}, {"latents", "corr"} of the 80 that fire most, for a picture,
    ordered by similarity); (None, None) where fewer than two latents vary.
    """
    # of a very large dictionary the 4,096 latents that fire most: 134 MB in float64
    latents = np.sort(latents[np.argsort(-fires[latents], kind="stable")[:4096]])
    codes = codes[:, latents]
    mean = column_sums(codes) / n_valid
    power = column_products(codes, codes) / n_valid
    varies = power - mean**2 > 1e-9 * power  # else the variance is rounding error
    if varies.sum() < 2:
        return None, None
    latents = latents[varies]
    mean = mean[varies]
    codes = codes[:, varies]
    cov = (codes.T @ codes).toarray() / n_valid - np.outer(mean, mean)
    sd = np.sqrt(np.diag(cov))
    corr = cov / np.outer(sd, sd)
    others = corr - 2 * np.eye(len(corr))  # a latent is not its own partner
    share = (others.max(1) > 0.9).mean()
    shown = np.argsort(-fires[latents], kind="stable")[:80]
    distance = squareform(1 - corr[np.ix_(shown, shown)], checks=False)
    shown = shown[leaves_list(linkage(np.clip(distance, 0, 2), "average"))]
    picture = {"latents": latents[shown], "corr": plain(corr[np.ix_(shown, shown)], 3)}
    return {"latents": len(latents), "share_above_0.9": share}, picture


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


# --------------------------------------------------------------------------------------------------
# 5. What features tell: probes on single tokens, boundaries and places in the row
#
# Features are a matrix (n,d): codes (csr), raw activations, slow directions, smoothed codes.
# `parts` names slices of its columns: {"whole": ..., "lead": ..., "rest": ...}.
# --------------------------------------------------------------------------------------------------


def to_dense(matrix):
    """csr or array -> array."""
    return matrix.toarray() if sparse.issparse(matrix) else matrix


def class_gap(values, y):
    """(d,) mean of the lines (csr or dense) where y is True, less that of the others."""
    return np.asarray(values[y].mean(0) - values[~y].mean(0)).ravel()


def fit_probe(train, test, y_train, **options):
    """A logistic probe on lines (csr or dense), their columns scaled by their deviation on train.

    -> the fitted probe, the scaled lines of test
    """
    train = to_dense(train).astype(np.float64)
    test = to_dense(test).astype(np.float64)
    scale = train.std(0)
    scale = np.where(scale > 0, scale, 1)
    return LogisticRegression(**options).fit(train / scale, y_train), test / scale


@one_thread
def accuracy(train, test, y_train, y_test):
    """Accuracy on test of a multinomial probe (C = 0.1) that is fitted on train."""
    probe, scaled = fit_probe(train, test, y_train, max_iter=200, C=0.1)
    return probe.score(scaled, y_test)


@one_thread
def probe_classes(features, members, train, test, least, parts):
    """One class against the rest. -> {part: mean AUROC over classes, NaN where none is left}

    A k-sparse probe (Gurnee et al. 2023): it reads the 5 columns of the part whose class
    means differ most on train. members: {class: (n,) bool}; train, test: indices of tokens. A class
    needs `least` tokens in it and as many out of it on each side, else it is left out.
    """
    a = features[train].astype(np.float64)
    b = features[test].astype(np.float64)
    found = {name: [] for name in parts}
    for member in members.values():
        y_train = member[train]
        y_test = member[test]
        if min(y_train.sum(), (~y_train).sum(), y_test.sum(), (~y_test).sum()) < least:
            continue
        gap = np.abs(class_gap(a, y_train))
        for name, part in parts.items():
            columns = np.arange(len(gap))[part]
            if len(columns) == 0:
                continue
            if name != "raw_all":  # this probe reads every column
                columns = columns[np.argsort(-gap[part], kind="stable")[:5]]
            probe, scaled = fit_probe(a[:, columns], b[:, columns], y_train, max_iter=300)
            found[name].append(roc_auc_score(y_test, probe.decision_function(scaled)))
    return {name: np.mean(values) for name, values in found.items()}


def token_topic(features, rows, parts):
    """token_topic_5: the topic of a document from ONE of its tokens. -> {part: AUROC}

    Of tokens whose topic is known and not "Uncategorized", 8 tokens or more after the first of
    their segment, 9,000 at random; topics with 10 of them on each side.
    """
    labelled = np.any([*rows.topic_members.values(), np.zeros(len(rows.into), bool)], axis=0)
    fit = np.flatnonzero(labelled & (rows.into >= 8))
    fit = np.random.default_rng(0).permutation(fit)[:9000]
    sides = fit[rows.in_train[fit]], fit[~rows.in_train[fit]]
    return probe_classes(features, rows.topic_members, *sides, 10, parts)


def token_class(codes, rows, text, parts):
    """token_class_5: the class of a token from its code, 8,000 a side. -> {part: AUROC}

    Four yes/no properties; a token that does not begin a word has no space before it. text: a
    function, token id -> string; None where there is no text.
    """
    if rows.tokens is None:
        return dict.fromkeys(parts, math.nan)
    sides = []
    for side in (rows.valid & rows.in_train, rows.valid & ~rows.in_train):
        tokens = np.flatnonzero(side)
        sides.append(tokens[::max(1, math.ceil(len(tokens) / 8000))])
    ids, which = np.unique(rows.tokens.ravel(), return_inverse=True)
    strings = [text(i) for i in ids.tolist()]
    bare = [string.strip() for string in strings]
    classes = {
        "word part": [s[:1] == b[:1] and b.isalpha() for s, b in zip(strings, bare)],
        "punctuation": [b != "" and not any(c.isalnum() for c in b) for b in bare],
        "digit": [b.isdigit() for b in bare],
        "capital": [b[:1].isupper() for b in bare]}
    members = {name: np.array(member)[which] for name, member in classes.items()}
    return probe_classes(codes, members, *sides, 2, parts)


def document_id(features, rows):
    """Which document is a token from? T-SAE's context probe (arXiv 2511.05541). -> accuracy

    One multinomial probe on three quarters of the tokens of a draw, scored on the rest; mean over
    draws, for one alone is noisy. It reads the telling_columns of the training side.
    """
    found = []
    for tokens, order in rows.draws:
        y = np.arange(len(tokens)) // ID_TOKENS
        train, test = np.split(order, [int(0.75 * len(y))])
        a = features[tokens[train]].astype(np.float64)
        columns = telling_columns(a, y[train])
        found.append(accuracy(a[:, columns], features[tokens[test]][:, columns], y[train], y[test]))
    return np.mean(found)


def telling_columns(values, y):
    """The union over the classes in y of the 5 columns whose mean exceeds that of the others most."""
    gaps = np.array([class_gap(values, y == number) for number in np.unique(y)])
    return np.unique(np.argsort(-gaps, axis=1, kind="stable")[:, :5])


def document_id_shifted(alone, shifted):
    """Which of 120 passages is a token from, at a place where the probe has not seen it? -> accuracy

    Fitted on the first 22 tokens of each passage read alone, scored on its other 22 tokens read
    after another document. alone, shifted (n,d): the same tokens, 44 a passage. NaN for one passage.
    """
    n = min(alone.shape[0], 120 * PASSAGE)
    if n == PASSAGE:
        return math.nan
    y = np.arange(n) // PASSAGE
    train = np.flatnonzero(np.arange(n) % PASSAGE < PASSAGE // 2)
    test = train + PASSAGE // 2
    a = alone[train].astype(np.float64)
    columns = telling_columns(a, y[train])
    return accuracy(a[:, columns], shifted[test][:, columns], y[train], y[test])


def smoothed(codes, rows):
    """(n,d) csr: the moving average of each latent over the past tokens of its segment.

    Not a code of one token. The weight of the token j back is 0.8^j, up to 32 tokens, divided by
    the sum of those that exist.
    """
    here = [np.flatnonzero(rows.into >= j) for j in range(33)]
    back = [token - j for j, token in enumerate(here)]
    weight = np.repeat(0.8 ** np.arange(len(here)), [len(token) for token in here])
    here = np.concatenate(here)
    weight = weight / np.bincount(here, weight, minlength=1)[here]
    n = codes.shape[0]
    return sparse.csr_matrix((weight, (here, np.concatenate(back))), shape=(n, n)) @ codes


def slow_directions(acts, doc, n):
    """The n slowest directions of the valid tokens of some training rows, fitted at BEST_LAG.

    They are the first n generalised eigenvectors of the lagged covariance against the covariance:
    slow feature analysis (Wiskott & Sejnowski 2002; Blaschke et al. 2006), regularised by 1e-4 of
    the mean eigenvalue. acts (N,T,d) tensor, added up in float64; doc (N,T).
    -> directions (d,n); None where there is no pair or nothing varies
    """
    d = acts.shape[2]
    total = sum(x[ok].double().sum(0) for x, ok in zip(acts, torch.from_numpy(doc > 0)))
    centre = total.numpy() / max((doc > 0).sum(), 1)
    covariance = np.zeros((d, d))
    lagged = np.zeros((d, d))
    pairs = 0
    for start in range(0, len(doc), BATCH_ROWS):
        seg = segment_ids(doc[start:start + BATCH_ROWS])
        x = acts[start:start + BATCH_ROWS].flatten(0, 1).double().numpy() - centre
        left = pairs_at(seg, BEST_LAG)
        covariance += x[seg >= 0].T @ x[seg >= 0]
        lagged += x[left].T @ x[left + BEST_LAG]
        pairs += left.size
    if pairs == 0 or not np.trace(covariance) > 0:
        return None
    covariance /= (doc > 0).sum()
    lagged /= pairs
    ridge = 1e-4 * np.trace(covariance) / d
    _, vectors = scipy.linalg.eigh(
        (lagged + lagged.T) / 2, covariance + ridge * np.eye(d), subset_by_index=[d - n, d - 1])
    return vectors[:, ::-1]


def boundary_places(rows):
    """Places with EDGE valid tokens before and EDGE after. -> (p,2*EDGE) tokens, (p,) joins

    A join lies between two segments that follow each other in a row; a place inside lies every EDGE
    valid tokens of a segment.
    """
    valid = np.flatnonzero(rows.seg >= 0)
    segments = valid[np.argsort(rows.seg[valid], kind="stable")]
    segments = np.split(segments, np.cumsum(np.bincount(rows.seg[valid]))[:-1])
    places = []
    joins = []
    for tokens, following in itertools.zip_longest(segments, segments[1:], fillvalue=()):
        for cut in range(EDGE, len(tokens) - EDGE + 1, EDGE):
            places.append(tokens[cut - EDGE:cut + EDGE])
            joins.append(False)
        long_enough = min(len(tokens), len(following)) >= EDGE
        if long_enough and tokens[0] // rows.context == following[0] // rows.context:
            places.append(np.concatenate([tokens[-EDGE:], following[:EDGE]]))
            joins.append(True)
    return np.array(places, int).reshape(-1, 2 * EDGE), np.array(joins, bool)


def boundary(values, rows, parts):
    """boundary: does the mean of 8 tokens change more at a join than inside? -> {part: AUROC}

    1 - cos of the means before and after, taken as 1 where no latent fires in 8 tokens, is the
    score. values (n,d) csr or array; NaN where all places are of one kind.
    """
    places, joins = boundary_places(rows)
    if joins.all() or not joins.any():
        return dict.fromkeys(parts, math.nan)
    mean = sparse.kron(sparse.eye(len(places)), np.full((1, EDGE), 1 / EDGE), "csr")
    sides = [sparse.csr_matrix(mean @ values[tokens.ravel()])
             for tokens in (places[:, :EDGE], places[:, EDGE:])]
    found = {}
    for name, part in parts.items():
        before, after = [side[:, part] for side in sides]
        dot = before.multiply(after).sum(1).A1
        size = sparse.linalg.norm(before, axis=1) * sparse.linalg.norm(after, axis=1)
        distance = 1 - np.where(size > 0, dot / np.where(size > 0, size, 1), 0)
        found[name] = roc_auc_score(joins, distance)
    return found


def position_probe(features, rows):
    """Accuracy of a probe for the eighth of the row that a token stands in.

    Rows are split 70/30, 8,000 tokens a side.
    """
    rng = np.random.default_rng(0)
    in_train = np.repeat(rng.random(len(rows.doc)) < 0.7, rows.context)
    train = rng.permutation(np.flatnonzero(rows.valid & in_train))[:8000]
    test = rng.permutation(np.flatnonzero(rows.valid & ~in_train))[:8000]
    eighth = rows.place * 8 // rows.context
    if len(np.unique(eighth[train])) < 8 or len(test) == 0:
        return math.nan
    return accuracy(features[train], features[test], eighth[train], eighth[test])


def position_eta2(codes, rows):
    """(d,) share of each latent's variance that its place in the row explains, less chance.

    Chance: (number of places - 1) / tokens. NaN for a latent that does not vary.
    """
    valid = np.flatnonzero(rows.valid)
    place = rows.place[valid]
    n = np.bincount(place, minlength=rows.context)[:, None]
    shape = (rows.context, codes.shape[0])
    pick = sparse.csr_matrix((np.ones(valid.size), (place, valid)), shape=shape)
    means = (pick @ codes).toarray() / np.maximum(n, 1)
    mean = column_sums(codes) / valid.size
    power = column_products(codes, codes) / valid.size
    variance = np.where(power - mean**2 > 1e-9 * power, power - mean**2, np.nan)
    between = (n * (means - mean) ** 2).sum(0) / valid.size
    return between / variance - ((n > 0).sum() - 1) / valid.size


def shift_consistency(alone, shifted):
    """(d_sae,) correlation of each latent's code with itself over the tokens of the passages.

    alone, shifted csr (n,d_sae): codes of the same tokens. NaN for a latent that fires less than
    MIN_FIRINGS times where they are read alone; 0 for one that then never fires again.
    """
    rho = pearson(pair_sums(alone, shifted), alone.shape[0])
    return np.where(alone.getnnz(axis=0) >= MIN_FIRINGS, np.nan_to_num(rho), np.nan)


# --------------------------------------------------------------------------------------------------
# 6. One SAE: its codes, what they are compared with, consistency.json and the headline
# --------------------------------------------------------------------------------------------------


def to_csr(acts):
    """(n,d) tensor -> scipy csr in float64; only what is not zero leaves the device."""
    token, latent = acts.nonzero(as_tuple=True)
    values = acts[token, latent].cpu().double().numpy()
    where = (token.cpu().numpy(), latent.cpu().numpy())
    return sparse.csr_matrix((values, where), shape=tuple(acts.shape))


@torch.inference_mode()
def encode_rows(sae, rows, acts):
    """One pass over rows with activations (N,T,d_in). -> Fidelity over all, csr codes of the first

    Codes are kept of SAMPLE_ROWS rows, and of fewer where SAMPLE_CODES of them are not 0.
    """
    fidelity = Fidelity(sae.W_dec)
    kept = []
    n_codes = 0
    for start in range(0, len(rows.doc), BATCH_ROWS):
        stop = min(start + BATCH_ROWS, len(rows.doc))
        x = acts[start:stop].to(sae.W_dec.device).float().flatten(0, 1)
        valid = torch.from_numpy(rows.doc[start:stop].ravel() > 0).to(x.device)
        f = sae.encode(x)
        x_hat = sae.decode(f, x)
        if not torch.isfinite(x_hat[valid]).all():
            raise ValueError("the SAE gives NaN or infinity on these activations")
        codes = to_csr(torch.where(valid[:, None], f, 0.0))
        if valid.any():
            fidelity.update(x[valid], x_hat[valid], codes)
        n_codes += codes.nnz
        if not kept or (stop <= SAMPLE_ROWS and n_codes <= SAMPLE_CODES):
            kept.append(codes)
    return fidelity, sparse.vstack(kept).tocsr()


@torch.inference_mode()
def encode_passages(sae, acts):
    """Activations (N,T,d_in) -> csr codes (N*T,d_sae)."""
    blocks = acts.to(sae.W_dec.device).split(BATCH_ROWS)
    codes = [to_csr(sae.encode(block.flatten(0, 1).float())) for block in blocks]
    return sparse.vstack(codes).tocsr()


class References:
    """What raw activations and slow linear directions tell: the same for every SAE on these rows.

    blocks: the part of consistency.json that holds it; an SAE's own values are added to a copy.
    """

    def __init__(self, cfg, held_out, n_lead):
        acts = held_out.acts[:SAMPLE_ROWS]
        self.rows = held_out.rows.cut(0, len(acts))
        self.text = held_out.text
        self.n_lead = n_lead
        self.passages = passages(cfg, held_out)  # None or two (n,PASSAGE,d_in)
        self.lags = [lag for lag in (1, 2, 4, 8, 16, 32, 64) if lag < self.rows.context]
        # (n,d_in) raw activations of the sample less their mean, 0 where a token is left out
        x = acts.flatten(0, 1).float().numpy()
        centre = x[self.rows.valid].mean(0, dtype=np.float64).astype(np.float32)
        self.x = (x - centre) * self.rows.valid[:, None]
        n = len(self.rows.draws[0][0]) // ID_TOKENS if self.rows.draws else 0
        raw = {"raw": slice(None)}
        self.blocks = {
            "lags": self.lags,
            "autocorr_raw": autocorrelation(self.x, self.rows, self.lags).mean(1),
            "linear_limit": {"fitted_at": BEST_LAG, "mean": {}},
            "probes": {
                "token_topic": token_topic(self.x, self.rows, raw | {"raw_all": slice(None)}),
                "document_id": {"documents": n, "chance": ratio(1, n)},
                "document_id_shifted": {}},
            "boundary": boundary(self.x, self.rows, raw),
            "position": {"probe": {"raw": position_probe(self.x, self.rows), "chance": 1 / 8},
                         "eta2": {}, "shift": {}}}
        if self.passages is not None:
            alone, shifted = [part.float().flatten(0, 1) for part in self.passages]
            centre = alone.mean(0)
            same = F.cosine_similarity(alone - centre, shifted - centre, dim=-1)
            self.blocks["position"]["shift"]["raw"] = same.mean()
        self.add_slow_directions(*training_rows(cfg, held_out))

    def add_slow_directions(self, acts, doc):
        """Fit the slowest directions on training rows and add what they tell."""
        d = self.x.shape[1]
        firsts = (10, 50, 100)
        directions = slow_directions(acts, doc, min(max(*firsts, self.n_lead), d))
        if directions is None:
            return
        z = self.x @ directions
        rho = autocorrelation(z, self.rows, self.lags)
        for first in firsts:
            mean = rho[:, :first].mean(1) if first <= d else np.full(len(rho), np.nan)
            self.blocks["linear_limit"]["mean"][str(first)] = mean
        lead = z[:, :self.n_lead]
        probes = self.blocks["probes"]
        probes["token_topic"] |= token_topic(lead, self.rows, {"slow": slice(None)})
        probes["document_id"]["slow"] = document_id(lead, self.rows)
        self.blocks["position"]["probe"]["slow"] = position_probe(lead, self.rows)
        if self.passages is not None:
            both = [part.flatten(0, 1).double().numpy() @ directions[:, :self.n_lead]
                    for part in self.passages]
            probes["document_id_shifted"] = {"slow": document_id_shifted(*both)}
            self.blocks["position"]["shift"]["slow"] = pearson(pair_sums(*both), len(both[0])).mean()


def training_rows(cfg, held_out):
    """The first 512 training rows: activations (N,T,d_in), doc (N,T)."""
    inputs = held_out.inputs
    if held_out.lm is None:
        first = inputs.train[:512]
        return inputs.acts[first], inputs.doc[first]
    train = Rows(inputs.train.tokens[:512].astype(np.int64), inputs.train.doc[:512], {})
    acts = cached_activations(cfg, held_out.lm, held_out.block, train.tokens)
    return acts, leave_out_sinks(train, acts).doc


def passages(cfg, held_out):
    """Passages read alone and after another document: two (n,44,d_in) activations, or None.

    Alone: BOS and the first 48 tokens of a document; after another: BOS, the first 64 tokens of
    that one, BOS and the same. The last 44 tokens count. No document is used in both ways.
    """
    if held_out.lm is None:
        return None
    documents = [ids for ids in held_out.inputs.openings[cfg["eval_split"]] if len(ids) >= 66]
    n = min(160, len(documents) // 2)
    bos, _ = prepare.special_ids(held_out.tokenizer)
    alone = [[bos, *ids[:48]] for ids in documents[:n]]
    shifted = [[bos, *other[:64], *ids] for other, ids in zip(documents[n:2 * n], alone)]
    config = held_out.lm.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    if n == 0 or len(shifted[0]) > limit:
        return None
    return [cached_activations(cfg, held_out.lm, held_out.block, np.array(rows))[:, -PASSAGE:]
            for rows in (alone, shifted)]


def consistency(sae, fidelity, codes, refs, is_first):
    """How the codes of one SAE behave along the text. -> the blocks of consistency.json

    is_first: of the first seed the matrices and the table of latents, which pictures show, too.
    """
    rows = refs.rows.cut(0, codes.shape[0] // refs.rows.context)  # fewer, where codes are dense
    n = refs.n_lead
    parts = {"whole": slice(None), "lead": slice(n), "rest": slice(n, None)}
    fires = fidelity.fires
    keep = fires >= MIN_FIRINGS
    latents = np.flatnonzero(keep)
    lead = latents[latents < n]
    out = plain(refs.blocks)  # a copy
    out["counts"] = {"sample_rows": len(rows.doc)}
    out["groups"] = {name: {
        "latents": len(keep[part]), "scored": keep[part].sum(),
        "firing_share": ratio(fires[part].sum(), fires.sum())} for name, part in parts.items()}
    rho = autocorrelation(codes, rows, refs.lags)
    out["autocorr"] = group_means(rho, keep, parts)
    best = [best_latents(line, keep, len(lead)) for line in rho]
    out["autocorr"]["best"] = [np.mean(line[chosen]) for line, chosen in zip(rho, best)]
    null = codes[permute_segments(rows.seg, np.random.default_rng(0))]
    out["autocorr_null"] = group_means(autocorrelation(null, rows, refs.lags), keep, parts)
    span = spans(codes, rows.seg)
    out["span"] = group_means(span, keep, parts)
    out["smoothness_S"] = smoothness(codes, refs.x, rows, parts)
    average = smoothed(codes, rows)
    probes = out["probes"]
    probes["token_topic"] |= token_topic(codes, rows, parts)
    probes["token_topic"] |= token_topic(average, rows, {"smoothed": slice(None)})
    probes["token_class"] = token_class(codes, rows, refs.text, parts)
    probes["document_id"] |= {
        "whole": document_id(codes, rows), "lead": document_id(codes[:, :n], rows),
        "smoothed": document_id(average, rows)}
    out["boundary"] |= boundary(codes, rows, parts)
    at = max(k for k, lag in enumerate(refs.lags) if lag <= BEST_LAG)
    both = None
    if refs.passages is not None:
        both = [encode_passages(sae, part) for part in refs.passages]
        probes["document_id_shifted"] |= {
            "whole": document_id_shifted(*both),
            "lead": document_id_shifted(*[part[:, :n] for part in both])}
    add_position(out["position"], codes, rows, both, {"lead": lead, "best": best[at]})
    out["redundancy"], picture = redundancy(codes, int(rows.valid.sum()), fires, latents)
    if is_first:
        varies = refs.x.std(0) > 0
        out["position_corr"] = {
            "step": math.ceil(rows.context / MATRIX_SIDE),
            "codes": plain(position_matrix(codes[:, latents], rows), 3),
            "raw": plain(position_matrix(refs.x[:codes.shape[0], varies], rows), 3)}
        out["correlation"] = picture
        out["latents"] = plain({
            "index": latents, "rate": fires[latents] / fidelity.tokens, "span": span[latents],
            "autocorr": rho[:, latents]}, 3)
    return out


def add_position(block, codes, rows, both, groups):
    """Add to the block "position" what the latents of each group tell; both: codes of passages."""
    eta2 = position_eta2(codes, rows)
    same = np.full(len(eta2), np.nan)
    if both is not None:
        same = shift_consistency(*both)
        block["shift"]["whole"] = np.nanmean(same)
    for name, latents in groups.items():
        block["eta2"][name] = np.nanmean(eta2[latents])
        block["shift"][name] = np.nanmean(same[latents])
        if len(latents):
            block["probe"][name] = position_probe(codes[:, latents], rows)


def headline(tree):
    """The contents of consistency.json -> {name in final_info.json: value}, None if undefined."""
    auto = tree["autocorr"]
    topic = tree["probes"]["token_topic"]
    position = tree["position"]
    head = {
        "autocorr_1": auto["whole"][0], "span": tree["span"]["whole"],
        "smoothness_S": tree["smoothness_S"]["whole"], "token_topic_5": topic["whole"],
        "token_topic_5_lead": topic["lead"], "token_topic_5_rest": topic["rest"],
        "token_class_5": tree["probes"]["token_class"]["whole"],
        "document_id": tree["probes"]["document_id"]["whole"],
        "document_id_shifted": tree["probes"]["document_id_shifted"].get("whole"),
        "boundary": tree["boundary"]["lead"]}
    for group, ending in (("whole", ""), ("lead", "_lead"), ("rest", "_rest"), ("best", "_best")):
        head[f"autocorr_16{ending}"] = dict(zip(tree["lags"], auto[group])).get(16)
    for group, ending in (("lead", ""), ("best", "_best")):
        head[f"position_probe{ending}"] = position["probe"].get(group)
        head[f"position_eta2{ending}"] = position["eta2"][group]
        head[f"shift_consistency{ending}"] = position["shift"][group]
    if tree["redundancy"]:
        head["redundant_share"] = tree["redundancy"]["share_above_0.9"]
    return head


def summarise(per_seed, mcc):
    """Means, standard errors (ddof 1; none for one seed) and raw values of the headline.

    per_seed: one headline each; a value that is None for some seed is left out. mcc: pw_mcc().
    """
    raw = {name: [seed.get(name) for seed in per_seed] for name in per_seed[0]}
    raw = {name: values for name, values in raw.items() if None not in values}
    stderrs = {name: float(np.std(values, ddof=1) / math.sqrt(len(values)))
               for name, values in raw.items() if len(values) > 1}
    if mcc:
        raw["pw_mcc"] = mcc  # one value a PAIR of seeds; pairs share seeds, so no standard error
    means = {name: float(np.mean(values)) for name, values in raw.items()}
    return {"means": means, "stderrs": stderrs, "final_info_dict": raw}


# --------------------------------------------------------------------------------------------------
# 7. Scoring a run, or a folder with one SAE: the command
# --------------------------------------------------------------------------------------------------

# What the command line may say in place of config.json.
OPTIONS = {
    str: ("model", "dtype", "device", "dataset", "dataset_config", "split", "text_field",
          "sample_by", "encoding", "acts", "acts_mask", "eval_split", "cache_dir"),
    int: ("layer", "context_size", "harvest_tokens", "eval_rows", "reconstruction_rows"),
    float: ("view_share",)}
TEXT_ONLY = (  # of no effect where activations are given
    "model", "layer", "dataset", "dataset_config", "split", "text_field", "sample_by", "encoding",
    "context_size", "harvest_tokens", "view_share", "reconstruction_rows")
DEFAULTS = {  # of what a run's config.json or the command line does not say
    "dtype": "auto", "device": "auto", "dataset": prepare.EMBEDDED_TEXT,
    "acts": "", "acts_mask": "", "context_size": 128, "eval_rows": 464, "eval_split": "test",
    "reconstruction_rows": 64, "cache_dir": ""}


def read_settings(folder, changes):
    """What to score `folder` on: DEFAULTS, its config.json, and the changes asked for.

    -> (settings, notes): "settings" if changes differ from the run, "unread" if some are idle
    """
    run = folder / "config.json"
    spec = folder / "cfg.json"
    own = prepare.read_json(run) if run.is_file() else {}
    if "n_seeds" not in own:  # no run of ours; a foreign config.json says nothing here
        own = read_origin(prepare.read_json(spec)) if spec.is_file() else {}
    cfg = DEFAULTS | own | changes
    if not cfg["acts"] and (cfg.get("model") is None or cfg.get("layer") is None):
        raise ValueError(f"{folder} is no run (config.json): say --model and --layer, or --acts "
                         "FILE, that the SAE in it reads")
    if "resid_pre" in own.get("hook", "") and cfg["layer"] != own["layer"]:
        raise ValueError(f"the SAE reads {own['hook']}, which is the output of block {own['layer']}: "
                         f"leave --layer {cfg['layer']} out")
    notes = {}
    unread = changes.keys() & set(TEXT_ONLY if cfg["acts"] else ())
    if unread:
        notes["unread"] = f"scored on given activations; nothing reads {', '.join(sorted(unread))}"
    differ = []
    for name in changes.keys() & own.keys() - {"device", "cache_dir", "acts"} - unread:
        asked, said = [public_name(str(given[name])) for given in (changes, own)]
        if asked != said:  # by name: a model that was moved is the same one
            differ.append(f"{name} {asked}; the SAE says {said}")
    if differ:
        notes["settings"] = "scored with " + ", ".join(sorted(differ))
    return cfg, notes


def read_origin(spec):
    """What the cfg.json of an SAE without a run says of its input; SAELens 3 to 5 wrote it flat.

    ValueError for a place in the model that is not the output of a decoder block, and for settings
    that change the input and that we do not apply.
    """
    origin = spec | (spec.get("metadata") or {})
    own = {}
    hook = origin.get("hook_name") or origin.get("hook_point")
    if hook:
        found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", str(hook))
        if not found or (found[2] == "pre" and found[1] == "0"):
            raise ValueError(f"the SAE reads {hook}; only the output of a block can be scored "
                             "(hook_resid_post, or hook_resid_pre of the next block)")
        own |= {"hook": hook, "layer": int(found[1]) - (found[2] == "pre")}
    loaded = origin.get("model_from_pretrained_kwargs") or origin.get("from_pretrained_kwargs") or {}
    for name in ("center_writing_weights", "checkpoint_index", "checkpoint_value"):
        if loaded.get(name) not in (None, False):  # fold_ln and others leave the residual as it is
            raise ValueError(f"the SAE was trained on a model that was loaded with {name}: "
                             "its activations are others than those of transformers")
    for name in ("hook_head_index", "hook_point_head_index", "hook_name_out", "seqpos_slice"):
        if origin.get(name) not in (None, [None], [None, None], hook):
            raise ValueError(f"the SAE was trained with {name} {origin[name]}: not supported")
    if origin.get("prepend_bos") is False:
        raise ValueError("the SAE was trained without BOS (prepend_bos false); rows here have one")
    if origin.get("model_name"):
        own["model"] = "@".join(filter(None, [origin["model_name"], loaded.get("revision")]))
    if origin.get("context_size"):
        own["context_size"] = origin["context_size"]
    return own


def find_seeds(folder, cfg):
    """The folders with weights, in order of seed: folder itself or all its seed_K."""
    if (folder / "sae_weights.safetensors").is_file() or "n_seeds" not in cfg:
        return [folder]
    return [folder / f"seed_{seed}" for seed in range(cfg["seed"], cfg["seed"] + cfg["n_seeds"])]


def has_lead(sae):
    """Whether a loss bound leading latents; without one latents have no order."""
    lead = (sae.spec.get("temporal_sae") or {}).get("lead") or 0
    return 0 < lead < sae.W_dec.shape[0]


def leading_latents(sae, cfg):
    """Number of leading latents: what cfg.json says, else the run's fraction, else 20 %."""
    if has_lead(sae):
        return sae.spec["temporal_sae"]["lead"]
    fraction = cfg.get("temporal_fraction", 1.0)
    if not 0 < fraction < 1:
        fraction = 0.2
    return max(1, round(fraction * sae.W_dec.shape[0]))


class HeldOut(NamedTuple):
    """What SAEs are scored on. Without a language model what comes of it is None."""

    rows: Rows  # for everything but CE and KL; sinks are left out
    ce_rows: Rows  # for CE and KL
    acts: torch.Tensor  # (N,T,d_in) activations of `rows`
    inputs: object  # prepare.Inputs or prepare.Acts
    record: dict  # what every file says of it: scored_on, counts
    sha256: str  # of the rows
    lm: torch.nn.Module = None
    block: torch.nn.Module = None  # the hooked decoder block
    tokenizer: object = None
    text: object = None  # function: token id -> string


def hold_out(cfg, width, device):
    """The HeldOut of these settings, for an SAE that reads `width` dimensions."""
    if cfg["acts"]:
        inputs = prepare.load_acts(cfg["acts"], cfg["acts_mask"], cfg["eval_rows"])
        chosen = getattr(inputs, cfg["eval_split"])
        acts = inputs.acts[chosen]
        rows = Rows(None, inputs.doc[chosen], {})
        scored_on = {"model": None, "layer": None, "dtype": str(acts.dtype).removeprefix("torch."),
                     "dataset": Path(cfg["acts"]).stem, "eval_split": cfg["eval_split"]}
        sha256 = prepare.sha256(rows.doc, acts.view(torch.uint8).numpy())
        held_out = HeldOut(rows, rows.cut(0, 0), acts, inputs, {"scored_on": scored_on}, sha256)
    else:
        held_out = read_text(cfg, device)
    if held_out.acts.shape[-1] != width:
        raise ValueError(f"the SAE reads {width} dimensions; here are {held_out.acts.shape[-1]}")
    before = held_out.rows
    rows = leave_out_sinks(before, held_out.acts)
    counts = {
        "rows": len(rows.doc), "reconstruction_rows": len(held_out.ce_rows.doc),
        "context": rows.context, "tokens": int(rows.valid.sum()),
        "left_out": int((before.valid & ~rows.valid).sum()),
        "documents": len(np.unique(rows.flat_doc[rows.valid])),
        "segments": int(rows.seg.max()) + 1}
    return held_out._replace(rows=rows, record=held_out.record | {"counts": counts})


def read_text(cfg, device):
    """The HeldOut of a language model and text, sinks included and without counts."""
    model = cfg["model"]
    layer = cfg["layer"]
    prepare.check_model(model, layer, cfg["context_size"])
    options = {name: cfg[name] for name in TEXT_OPTIONS if name in cfg}
    inputs = prepare.text_rows(cfg["dataset"], model, **options)
    tokens, doc, _ = getattr(inputs, cfg["eval_split"])
    held = Rows(tokens.astype(np.int64), np.array(doc), inputs.topics)
    n_ce = cfg["reconstruction_rows"]
    if not 0 <= n_ce < len(doc):
        raise ValueError(
            f"{n_ce} rows for CE/KL leave none of the {len(doc)} rows for other metrics")
    dtype = prepare.pick_dtype(cfg["dtype"], device)
    lm, tokenizer = prepare.load_lm(model, dtype, device, cfg["cache_dir"])
    block = prepare.decoder_blocks(lm)[layer]
    rows = held.cut(n_ce, len(doc))
    acts = cached_activations(cfg, lm, block, rows.tokens)
    scored_on = {
        "model": public_name(model), "layer": layer, "dtype": str(dtype).removeprefix("torch."),
        "dataset": public_name(cfg["dataset"]), "eval_split": cfg["eval_split"]}
    sha256 = prepare.sha256(held.tokens, held.doc)
    return HeldOut(rows, held.cut(0, n_ce), acts, inputs, {"scored_on": scored_on}, sha256,
                   lm, block, tokenizer, prepare.token_text(tokenizer))


def check_out(run_dir, out, notes, overwrite):
    """ValueError where scores would replace those of a run by others."""
    home = run_dir.resolve()
    if out.is_file():
        raise ValueError(f"--out {out} is a file: name a folder")
    if out.resolve() != home:
        if not overwrite and ((out / "final_info.json").exists() or (out / "cfg.json").exists()):
            raise ValueError(f"{out} holds the scores of a run, or an SAE: give --overwrite, or "
                             "another --out")
    elif "settings" in notes and (home / "config.json").is_file():
        raise ValueError(
            f"{notes['settings']}: give --out FOLDER, so that the run keeps its own scores")
    elif (home.parent / "config.json").is_file():
        raise ValueError(f"{run_dir} is one seed of a run: score the run, or give --out FOLDER")


def score_behaviour(held_out, saes):
    """-> (lm_behaviour of each SAE, all NaN without a model or rows; notes that say why)."""
    if held_out.lm is None:
        reason = "scored on given activations, there is no language model to run"
    elif not held_out.ce_rows.valid.any():
        reason = "no row with an ordinary token was set aside for them"
    else:
        scores = lm_behaviour(held_out.lm, held_out.block, saes, held_out.ce_rows)
        clean = scores[0]["model_performance_preservation"]["ce_loss_without_sae"]
        if math.isfinite(clean):
            return scores, {}
        return scores, {"behaviour": "no CE and no KL: the language model gives NaN or infinity"}
    unknown = dict.fromkeys(("clean", "ablation", "sae"), math.nan)
    notes = {"behaviour": f"no CE and no KL: {reason}"}
    return [behaviour_scores(unknown, unknown, "sae")] * len(saes), notes


def check_lead(sae, fidelity, n_lead):
    """A note where fewer than half of an SAE's leading latents ever fire."""
    alive = (fidelity.fires[:n_lead] > 0).sum()
    if not has_lead(sae) or 2 * alive >= n_lead:
        return {}
    sentence = (f"only {alive} of the {n_lead} leading latents ever fire: the temporal loss drives "
                "them out of use; try another weight")
    prepare.say(f"note: {sentence}")
    return {"leading latents": sentence}


@contextlib.contextmanager
def stages(n):
    """A bar that names what is under way: stage(name) begins the next of n stages."""
    form = "{desc} {n_fmt}/{total_fmt}{postfix} [{elapsed}]"
    with tqdm(total=n, desc="score", bar_format=form, disable=prepare.RANK > 0) as bar:

        def stage(name):
            bar.update()
            bar.set_postfix_str(name)

        yield stage


def evaluate_run(run_dir, *, out=None, overwrite=False, **changes):
    """Score every seed of a run, or one SAE folder; write the three files; return final_info.

    run_dir: a run (config.json, seed_K/...) or a folder with cfg.json and sae_weights.safetensors.
    out: where to write, else run_dir; overwrite: also over the scores of another run there.
    changes: settings that take precedence over config.json (model, layer, dataset, device, ...).
    """
    run_dir = Path(run_dir)
    out = Path(out or run_dir)
    cfg, notes = read_settings(run_dir, changes)
    check_out(run_dir, out, notes, overwrite)
    device = prepare.pick_device(cfg["device"])
    seed_dirs = find_seeds(run_dir, cfg)
    saes = [load_sae(folder, device) for folder in seed_dirs]  # a broken file is refused at once
    with stages(3 + len(saes)) as stage:
        stage("held-out activations")
        held_out = hold_out(cfg, saes[0].W_dec.shape[1], device)
        recorded = run_dir / "environment.json"
        identity = json.loads(json.dumps(held_out.inputs.identity))
        if recorded.is_file() and prepare.read_json(recorded).get("inputs", identity) != identity:
            notes["inputs"] = ("the model or the text is, or may be, another one than the run's: what "
                               "is held out here may have been trained on")
        unread = getattr(held_out.lm, "unread", [])
        if unread:
            notes["weights"] = f"{len(unread)} tensors of the model are not read, as {unread[0]}"
        n_documents = held_out.record["counts"]["documents"]
        if n_documents < FEW_DOCUMENTS:
            notes["documents"] = (f"scored on {n_documents} documents: too few for what is said of "
                                  "topics and documents to mean much")
        stage("CE and KL of the language model")
        behaviour, reasons = score_behaviour(held_out, saes)
        notes |= reasons
        for sentence in notes.values():
            prepare.say(f"note: {sentence}")
        n_lead = leading_latents(saes[0], cfg)
        stage("references: raw activations, slow directions")
        refs = References(cfg, held_out, n_lead)
        files = {}
        heads = []
        for seed_dir, sae, scores in zip(seed_dirs, saes, behaviour):
            stage(f"probes on codes, {seed_dir.name}")
            hashes = {"evaluate": SOURCE_SHA256, "rows": held_out.sha256,
                      "weights": prepare.sha256(seed_dir / "sae_weights.safetensors")}
            record = {"hashes": hashes, **held_out.record, "notes": notes}
            fidelity, codes = encode_rows(sae, held_out.rows, held_out.acts)
            record["notes"] = notes | check_lead(sae, fidelity, n_lead)
            core = core_json(sae, fidelity, scores, record)
            blocks = plain(consistency(sae, fidelity, codes, refs, seed_dir == seed_dirs[0]), 6)
            blocks["counts"] |= record["counts"]
            folder = out / seed_dir.name if len(seed_dirs) > 1 else out
            files[folder / "core.json"] = core
            files[folder / "consistency.json"] = record | blocks
            files[folder / "consistency.json"]["notes"] = record["notes"] | null_notes(blocks)
            heads.append(core["eval_result_unstructured"]["ours"] | headline(blocks))
    block = summarise(heads, pw_mcc([sae.W_dec for sae in saes]))
    block["leading_latents"] = n_lead if has_lead(saes[0]) else None
    block["documents"] = refs.blocks["probes"]["document_id"]["documents"]
    final = {held_out.record["scored_on"]["dataset"]: block}
    files[out / "final_info.json"] = final  # the last one: it says that a new folder is whole
    for path, tree in files.items():
        prepare.write_json(path, tree)
    return final


SHOWN = {  # what is printed at the end: name -> which way is better, what it is
    "token_topic_5": ("higher is better", "topic of a document from one token, 5 latents"),
    "token_topic_5_lead": ("higher is better", "... 5 of {lead}"),
    "document_id": ("higher is better", "which of {documents} documents a token is from"),
    "autocorr_16_lead": ("higher is better", "autocorrelation at lag 16 of {lead}"),
    "position_probe": ("lower is better", "place in the row (chance .125) from {lead}"),
    "explained_variance": ("higher is better", "share of the variance that is explained"),
    "ce_loss_score": ("higher is better", "1: the model predicts as well as without the SAE"),
    "l0": ("", "active latents a token")}


def print_scores(final, folder):
    """The block at the end of a run: eight headline numbers, and where all of them are."""
    print("---")
    for block in final.values():
        n = block["leading_latents"]
        lead = f"the {n} leading latents" if n else "any latents: without a loss none leads"
        for name, (better, what) in SHOWN.items():
            if name in block["means"]:
                what = what.format(lead=lead, documents=block["documents"])
                print(f"{name + ':':20} {block['means'][name]:8.4f}  {better:17} {what}")
    print(f"all scores: {Path(folder) / 'final_info.json'}")


def find_run(name):
    """Folder of a run. A bare name is looked for in runs/ and runs/study/ of this repo first."""
    path = Path(name).expanduser()
    for folder in (RUNS, RUNS / "study", Path()):
        if (folder / path).is_dir():  # of an absolute path: itself
            return folder / path
    raise ValueError(f"{path}: there is no such run")


def parse(argv):
    """Command line -> argparse's namespace; of OPTIONS it holds those that were given."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = prepare.Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="its folder, or its name in runs/ or runs/study/")
    parser.add_argument("--out", metavar="DIR", help="write here, not over the run's own scores")
    parser.add_argument("--overwrite", action="store_true", help="replace scores that are in --out")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    for kind, names in OPTIONS.items():
        for name in names:
            choices = ("test", "validation") if name == "eval_split" else None
            parser.add_argument(f"--{name}", type=kind, choices=choices,
                                default=argparse.SUPPRESS, help="as in experiment.py")
    return parser.parse_args(argv)


def main(argv=None):
    """The command. -> exit code: 0, 1 it failed, 2 bad usage or input, 130 and 143 stopped."""
    debug = "--debug" in (sys.argv if argv is None else argv)
    with prepare.Stop() as stop:
        try:
            changes = vars(parse(argv))
            del changes["debug"]
            out = changes.pop("out")
            run = find_run(changes.pop("run"))
            print_scores(evaluate_run(run, out=out, **changes), out or run)
            return 0
        except prepare.Interrupted:
            return stop.exit_code(argv)
        except Exception as error:  # whatever went wrong, the user gets one sentence
            return prepare.report(error, debug)


if __name__ == "__main__":
    sys.exit(main())
