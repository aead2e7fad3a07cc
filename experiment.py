"""One run: a temporal-consistency sparse autoencoder (SAE) on a language model's residual stream.

    python experiment.py --out_dir baseline --temp_alpha 0     # a plain BatchTopK SAE
    python experiment.py --out_dir temporal                    # the same SAE with the temporal target
    python experiment.py --out_dir run_4 --layernorm --k 16    # every field of Config is a flag

This file is the science of one run and is meant to be edited. It is read from top to bottom: Config,
SAE, temporal consistency, training step, harvest by hooks, training loop, run directory, main. The
last section is a faster encoder and decoder for CPUs, with the same codes but for what it says
there; skip it on first reading.

The temporal target: from one token's activation, the leading latents must also pick out the mean
activation of the tokens around it among such means of other documents. So what lasts gathers there.

prepare.py turns names into text and models. evaluate.py judges the result; do not change it between
runs that you compare.

A run writes runs/<out_dir>/: config.json, environment.json, experiment.py (this source), log.jsonl,
seed_K/{cfg.json, sae_weights.safetensors} in SAELens' format with reference.safetensors beside
them, core.json, consistency.json and final_info.json (the headline numbers). With several seeds
core.json and consistency.json lie in seed_K/.
"""
import argparse
import contextlib
import ctypes
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import prepare  # before torch: it tells OpenMP's threads how to wait
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import evaluate
from prepare import say

# A run records the code that ran: what is edited meanwhile does not count.
SOURCE = Path(__file__).read_text(encoding="utf-8")
PREPARE_SHA256 = prepare.sha256(Path(prepare.__file__))
RUNS = Path(__file__).resolve().parent / "runs"
# Set by torchrun: which process this is, and of how many.
RANK = int(os.environ.get("RANK") or 0)
WORLD = int(os.environ.get("WORLD_SIZE") or 1)

# ------------------------------------------------------------------------------------------------
# 1. Config: every field is a flag (--temp_alpha and --temp-alpha are the same; bools have --no-x)
# ------------------------------------------------------------------------------------------------


def flag(default, help, choices=None, least=None, above=None):
    """A Config field with its help and what it allows: choices, or numbers >= least or > above."""
    metadata = {"help": help, "choices": choices, "least": least, "above": above}
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """All settings of one run. Saved as config.json."""

    out_dir: str = flag("run_0", "where to write; a bare name lands in runs/")
    seed: int = flag(0, "first seed: initial weights and data order", least=0)
    n_seeds: int = flag(1, "seeds seed, seed+1, ... trained one after the other", least=1)
    # -- activations
    model: str = flag(prepare.EMBEDDED_LM, "embedded model, hub id, or folder of a causal LM")
    layer: int = flag(9, "decoder block whose output (resid_post) is read; 0 is the first", least=0)
    dtype: str = flag("auto", "of the LM; auto is bfloat16 where the hardware multiplies it",
                      ("auto", "bfloat16", "float32"))
    device: str = flag("auto", "auto is cuda, then cpu; any torch device by name")
    dataset: str = flag(prepare.EMBEDDED_TEXT, "embedded text, hub data set, or local file or folder")
    dataset_config: str = flag("", "configuration of a hub data set that has several")
    split: str = flag("train", "split of the data set that is read")
    text_field: str = flag("text", "column that holds the text; a.b reads a nested one")
    sample_by: str = flag("", "what of a text file is one document; if empty, the file in a folder "
                          "and the paragraph in a single file",
                          ("", "document", "paragraph", "line"))
    encoding: str = flag("utf-8", "of local text files")
    acts: str = flag("", "your own activations (N,T,d_in), .npy or .safetensors, instead of an LM")
    acts_mask: str = flag("", ".npy (N,T) for --acts: the number of each token's document, 0 to "
                          "leave it out")
    context_size: int = flag(128, "tokens a row, BOS included", least=2)
    harvest_tokens: int = flag(524_288, "distinct training tokens", least=1)
    view_share: float = flag(0.25, "share of them that is read a second time, at another place in a "
                             "row and after other documents; a token's temporal target is then "
                             "from its other view; 0: from its own row", least=0)
    eval_rows: int = flag(464, "test rows, and as many validation rows, of documents that are never "
                          "trained on", least=1)
    eval_split: str = flag("test", "rows that are scored: what is chosen is chosen on validation, "
                           "what is reported is of test", ("test", "validation"))
    reconstruction_rows: int = flag(64, "how many of these are kept for CE and KL only; 0: neither "
                                    "is measured", least=0)
    cache_gb: float = flag(20.0, "most disk for activations; a larger harvest is trained on in "
                           "parts, each harvested, passed over once and deleted", above=0)
    cache_dir: str = flag("", "for tokens, activations and embedded models; if empty, "
                          "$TEMPORAL_SAE_CACHE or ~/.cache/temporal-sae")
    # -- sparse autoencoder
    d_sae: int = flag(2304, "latents", least=1)
    sparsity: str = flag("batchtopk", "what keeps codes sparse; see section 2")
    k: int = flag(32, "active latents a token (topk), or on average (batchtopk)", least=1)
    l1_alpha: float = flag(0.01, "weight of the L1 term with --sparsity l1", least=0)
    nonlinearity: str = flag("relu", "of the encoder", ("relu", "gelu"))
    layernorm: bool = flag(False, "LayerNorm each input, undone at the output")
    init: str = flag("tied", "tied: W_enc = W_dec^T, b_dec = data mean; xavier: independent",
                     ("tied", "xavier"))
    # -- temporal consistency
    temp_loss: str = flag("window_infonce", "the temporal loss; see section 3")
    temp_alpha: float = flag(0.007, "weight of the temporal loss; 0 is the baseline", least=0)
    window: int = flag(16, "the window mean is over tokens less than so many apart; sqdiff compares "
                       "such tokens (infonce and infonce_dot: neighbours); 1: no temporal loss",
                       least=1)
    temporal_fraction: float = flag(0.02, "share of the dictionary, its leading latents, that the "
                                    "temporal loss and the Matryoshka term bind", above=0)
    temperature: float = flag(0.1, "divides the similarities in every InfoNCE; T-SAE's is 1, for "
                              "infonce_dot of inner products in raw units", above=0)
    matryoshka_alpha: float = flag(0.0, "weight of a reconstruction by the leading latents alone "
                                   "(Bussmann et al. 2025); 0 is off", least=0)
    bank: int = flag(1024, "window_infonce: targets of other documents from which a token's own must "
                     "be told", least=1)
    control: str = flag("none", "window_infonce: the target is from another document, from the same "
                        "one with its tokens shuffled, or of later tokens only, which the token "
                        "itself has not read", ("none", "other_docs", "permuted", "later"))
    # -- training
    train_tokens: int = flag(3_000_000, "tokens trained on in all; the harvest is passed over again "
                             "and again", least=1)
    batch_size: int = flag(4096, "tokens a step, over all processes", least=1)
    chunk_size: int = flag(32, "neighbouring tokens that stay together in the shuffle", least=1)
    lr: float = flag(6e-3, "Adam's peak learning rate", above=0)
    schedule: str = flag("cosine", "after warm-up: cosine to a tenth, or constant",
                         ("cosine", "constant"))
    warmup_steps: int = flag(50, "linear warm-up of the learning rate", least=0)
    grad_clip: float = flag(0.003, "largest gradient norm; so small that it binds at every step, so "
                            "the large first ones do not stay in Adam's averages; 0 is off", least=0)
    auxk_alpha: float = flag(1 / 32, "weight of AuxK, which revives dead latents (Gao et al. 2024); "
                             "0 is off", least=0)
    dead_tokens: int = flag(100_000, "tokens without firing after which a latent is dead", least=1)
    matmul_dtype: str = flag("auto", "of dense products in training; all else is float32",
                             ("auto", "bfloat16", "float32"))
    # -- housekeeping
    score: bool = flag(True, "judge the SAE at the end; scoring takes longer than a short training")
    log_every: int = flag(20, "steps between lines of log.jsonl", least=1)
    checkpoint_minutes: float = flag(2.0, "minutes between checkpoints", above=0)
    resume: bool = flag(False, "go on from the last checkpoint in out_dir")
    overwrite: bool = flag(False, "delete the run that is in out_dir")
    debug: bool = flag(False, "show tracebacks")

    @property
    def steps(self):
        """Optimiser steps of the run."""
        return max(1, self.train_tokens // self.batch_size)

    @property
    def run_dir(self):
        """runs/<out_dir> beside this file, or out_dir itself when it holds a slash."""
        bare = Path(self.out_dir).name == self.out_dir
        return (RUNS / self.out_dir if bare else Path(self.out_dir).expanduser()).resolve()

    @property
    def n_lead(self):
        """Number of leading latents, the ones that the temporal loss binds."""
        return max(1, round(self.temporal_fraction * self.d_sae))

    @property
    def temporal(self):
        """Whether there is a temporal loss. Without one its settings change nothing, except that
        temporal_fraction is the share of the Matryoshka term's leading latents, too."""
        return self.temp_alpha > 0 and self.window > 1

    @property
    def windowed(self):
        """Whether the temporal loss is the one of window means, which needs views and a bank."""
        return self.temporal and self.temp_loss == "window_infonce"


def check(cfg):
    """Raise ValueError, one clear sentence, for a setting that cannot work. Loads no model."""
    for f in fields(cfg):
        check_value(f, getattr(cfg, f.name))
    n_chunks = cfg.batch_size // cfg.chunk_size
    text = Path(cfg.dataset).resolve()
    refuse = [  # (whether it is wrong, what is wrong); runs/study belongs to train.py
        (RANK >= WORLD,
         f"RANK is {RANK} and WORLD_SIZE {WORLD}: start several processes with torchrun"),
        (text.is_dir() and cfg.run_dir.is_relative_to(text),
         f"--out_dir inside --dataset {cfg.dataset} would be read as text"),
        (cfg.run_dir in (RUNS, RUNS.parent, RUNS / "study") or cfg.run_dir.is_file(),
         f"--out_dir {cfg.out_dir} does not name a directory of its own"),
        (cfg.temporal_fraction > 1,
         f"--temporal_fraction {cfg.temporal_fraction} is above 1"),
        (cfg.view_share > 1, f"--view_share {cfg.view_share} is above 1"),
        (SPARSITIES[cfg.sparsity].architecture not in evaluate.ARCHITECTURES,
         f"evaluate.SAE knows no architecture {SPARSITIES[cfg.sparsity].architecture}"),
        (cfg.temporal and cfg.window > cfg.chunk_size,
         f"--window {cfg.window} is larger than --chunk_size {cfg.chunk_size}"),
        (not cfg.acts and cfg.context_size % cfg.chunk_size > 0,
         f"--chunk_size {cfg.chunk_size} does not divide --context_size {cfg.context_size}"),
        (cfg.batch_size % cfg.chunk_size > 0 or n_chunks % WORLD > 0,
         f"--batch_size {cfg.batch_size} is not a whole number of chunks of {cfg.chunk_size} tokens "
         f"for each of {WORLD} processes"),
        (cfg.k > cfg.d_sae and cfg.sparsity != "l1",
         f"--k {cfg.k} is larger than --d_sae {cfg.d_sae}"),
        (cfg.sparsity == "l1" and cfg.nonlinearity != "relu",
         "--sparsity l1 needs --nonlinearity relu: codes of gelu are hardly ever zero"),
        (cfg.l1_alpha != Config.l1_alpha and cfg.sparsity != "l1", "--l1_alpha needs --sparsity l1"),
        (cfg.control != "none" and not cfg.windowed,
         f"--control {cfg.control} needs --temp_loss window_infonce with a weight above 0"),
        (not cfg.acts and cfg.reconstruction_rows >= cfg.eval_rows,
         f"--reconstruction_rows {cfg.reconstruction_rows} leaves none of the --eval_rows "
         f"{cfg.eval_rows} for the other metrics"),
        (cfg.acts_mask and not cfg.acts, "--acts_mask is for --acts"),
        (cfg.resume and cfg.overwrite, "--resume and --overwrite exclude each other"),
    ]
    for wrong, sentence in refuse:
        if wrong:
            raise ValueError(sentence)
    try:
        device = torch.device(prepare.pick_device(cfg.device))
    except RuntimeError:
        raise ValueError(f"--device {cfg.device} is not a torch device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch build sees no CUDA device")


def check_value(f, value):
    """Raise ValueError for a value that the field f of Config does not allow."""
    choices = choices_of(f)
    least = f.metadata["least"]
    above = f.metadata["above"]
    if choices and value not in choices:
        raise ValueError(f"--{f.name} {value} is not one of {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{f.name} must be a finite number, not {value}")
    if least is not None and value < least:
        raise ValueError(f"--{f.name} must be at least {least}, not {value}")
    if above is not None and value <= above:
        raise ValueError(f"--{f.name} must be above {above}, not {value}")


def choices_of(f):
    """What the field f of Config can be; None where that is no list of names."""
    tables = {"sparsity": tuple(SPARSITIES), "temp_loss": TEMP_LOSSES}  # defined below
    return tables.get(f.name, f.metadata["choices"])


# ------------------------------------------------------------------------------------------------
# 2. SAE
# ------------------------------------------------------------------------------------------------


class SAE(torch.nn.Module):
    """A sparse autoencoder that encodes one token at a time.

        acts  = keep(relu((x - b_dec) @ W_enc + b_enc))
        x_hat = acts @ W_dec + b_dec

    W_enc (d_in, d_sae), W_dec (d_sae, d_in) with rows of unit norm, b_enc (d_sae,), b_dec (d_in,).
    With batchtopk the k*B largest codes of a batch of B tokens are kept in training; at inference
    a code is kept if its pre-activation is above `threshold` (Bussmann et al. 2024), which in
    training is that of the last batch.
    Training sees scale * x, whose mean square is 1 a dimension (Stats); at the end `fold_scale`
    moves the scale into the biases and the threshold, so that the SAE takes raw x.
    """

    def __init__(self, cfg, d_in):
        super().__init__()
        self.k = cfg.k
        self.sparsity = SPARSITIES[cfg.sparsity]
        self.nonlinearity = cfg.nonlinearity
        self.layernorm = cfg.layernorm
        # W_enc is stored latent by latent (its transpose is contiguous): F.linear and the gradient
        # of section 9 have that layout.
        self.W_enc = torch.nn.Parameter(torch.zeros(cfg.d_sae, d_in).t())
        self.W_dec = torch.nn.Parameter(torch.zeros(cfg.d_sae, d_in))
        self.b_enc = torch.nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))  # 1 in training; fold_scale sets it

    @torch.no_grad()
    def initialise(self, init, mean, seed):
        """Random unit decoder rows. tied: the encoder is their transpose, b_dec the data mean."""
        generator = torch.Generator().manual_seed(seed)
        d_sae, d_in = self.W_dec.shape
        W = torch.randn(d_sae, d_in, generator=generator)
        self.W_dec.copy_(F.normalize(W, dim=1))
        if init == "tied":
            self.W_enc.copy_(self.W_dec.t())
            self.b_dec.copy_(mean)
        else:
            bound = math.sqrt(6 / (d_in + d_sae))  # Glorot & Bengio 2010
            W = torch.rand(d_in, d_sae, generator=generator)
            self.W_enc.copy_((2 * W - 1) * bound)

    @staticmethod
    def normalise(x):
        """x (..., d_in) -> LayerNormed x, its mean and deviation. SAELens' formula (ddof 1)."""
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return (x - mean) / (std + 1e-5), mean, std

    def pre_activations(self, x, latents=slice(None)):
        """x (..., d_in) -> (x - b_dec) @ W_enc + b_enc (..., d_sae), or only some of its columns."""
        # b_dec gets its gradient through the bias, to which it adds 0: through x - b_dec it would
        # cost one more dense product.
        W = self.W_enc.t()[latents]
        fixed = self.b_dec.detach()
        zero = fixed - self.b_dec
        return F.linear(x - fixed, W, self.b_enc[latents] + zero @ W.t().detach())

    def activate(self, pre):
        """The nonlinearity. gelu(s z) is not s gelu(z), so it stays at the scale of training.

        self.scale is 1 while training.
        """
        if self.nonlinearity == "relu":
            return torch.relu(pre)
        return F.gelu(pre * self.scale) / self.scale

    def encode(self, x):
        """Inference: x (..., d_in) raw -> acts (..., d_sae), one token at a time.

        Training encodes a batch by encode_dense, section 4.
        """
        if self.layernorm:
            x = self.normalise(x)[0]
        pre = self.pre_activations(x)
        if self.sparsity.has_threshold:
            return self.activate(pre) * (pre > self.threshold)
        return self.activate(pre) * self.sparsity.keep(self, pre)

    def decode(self, acts, x):
        """acts (..., d_sae) and the x (..., d_in) that they come from -> x_hat (..., d_in)."""
        x_hat = acts @ self.W_dec + self.b_dec
        if self.layernorm:
            _, mean, std = self.normalise(x)
            return x_hat * std + mean
        return x_hat

    @torch.no_grad()
    def fold_scale(self, scale):
        """Turn an SAE of scale * x into one of x. relu(s*z) = s*relu(z), so codes get raw units."""
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)
        self.threshold.div_(scale)
        self.scale.fill_(scale)


def keep_all(sae, pre, ok=None, n_valid=None):
    """L1 needs no choice: its penalty, in Trainer.step, makes codes zero."""
    return torch.ones((), dtype=torch.bool, device=pre.device)


def keep_topk(sae, pre, ok=None, n_valid=None):
    """pre (..., d_sae) -> bool: is it among the k largest of its token?"""
    top = pre.topk(sae.k, dim=-1, sorted=False).indices
    return torch.zeros_like(pre, dtype=torch.bool).scatter_(-1, top, True)


def keep_batchtopk(sae, pre, ok, n_valid):
    """pre (B, d_sae) -> bool: is it among the k*n_valid largest of the tokens that are ok (B,)?

    Sets sae.threshold, the smallest that is kept. Never waits for the device.
    """
    # A token hardly ever takes more than 4k codes, so the largest of the batch are among the 4k
    # largest of each row. That spares a sort of the whole batch.
    with torch.no_grad():
        rows = pre.topk(min(4 * sae.k, pre.shape[1]), dim=-1, sorted=False).values
        rows = rows.masked_fill(~ok[:, None], -torch.inf)
        keep = min(max(1, sae.k * n_valid), rows.numel())
        sae.threshold.copy_(rows.flatten().topk(keep, sorted=False).values.min().clamp(min=0))
    return pre >= sae.threshold


class Sparsity(NamedTuple):
    """What keeps codes sparse."""

    keep: object  # function (sae, pre, ok, n_valid) -> which codes a batch keeps, bool
    architecture: str  # under which SAELens knows the result
    has_threshold: bool  # whether inference keeps what is above sae.threshold, fitted at the end


# A new one: a function and a row. Inference must be one of evaluate.SAE's architectures, or it must
# be taught yours. On a CPU select_pairs in section 9 chooses what batchtopk and topk keep.
SPARSITIES = {"batchtopk": Sparsity(keep_batchtopk, "jumprelu", True),
              "topk": Sparsity(keep_topk, "topk", False),
              "l1": Sparsity(keep_all, "standard", False)}


# ------------------------------------------------------------------------------------------------
# 3. Temporal consistency: what lasts goes into the leading latents
#
# x (N, T, d_in) and codes (N, T, F), of the F leading latents, come as N chunks of T neighbouring
# tokens. doc (N, T) is the document of each token, 0 where there is no ordinary token (BOS, padding,
# an attention sink). Windows and pairs never cross from one document into another.
# ------------------------------------------------------------------------------------------------

MIN_OTHERS = 4  # a window mean of fewer tokens is mostly noise


def same_document(doc, lag):
    """doc (N, T) -> (N, T - lag) bool: are t and t + lag ordinary tokens of one document?"""
    return (doc[:, :-lag] == doc[:, lag:]) & (doc[:, lag:] > 0)


def window_mean(x, doc, window, place=None, at=slice(None), later=False):
    """The mean of the other tokens of the same document that are less than `window` away.

    x (N, T, d), doc (N, T); `at`: which T' of the T tokens get a mean; place (N, T): where each
    token stands, if not in the order of x; later: of the tokens behind it only. -> means (N, T', d),
    and (N, T') bool: are there enough tokens for one?

    >>> x = torch.tensor([[[1.], [2.], [6.], [9.]]])
    >>> window_mean(x, torch.tensor([[5, 5, 5, 7]]), 2)[0].flatten()  # 2; (1+6)/2; 2; none
    tensor([2.0000, 3.5000, 2.0000, 0.0000])
    """
    if place is None:
        place = torch.arange(doc.shape[1], device=doc.device).expand(doc.shape)
    away = place[:, None, :] - place[:, at, None]
    if not later:
        away = away.abs()
    same = (doc[:, at, None] == doc[:, None, :]) & (doc[:, at, None] > 0)
    others = same & (away > 0) & (away < window)  # the token itself is not part of its own target
    count = others.sum(2)
    means = others.to(x.dtype) @ x
    means /= count.clamp(min=1)[..., None]
    return means, count >= min(MIN_OTHERS, window - 1)


def window_mean_target(x, doc, cfg, step, at=slice(None)):
    """The targets of the leading latents at T' of the T tokens (N, T', d), which of these tokens
    have one, and of which document it is (N, T'); see window_mean.

    Three controls keep the loss and change the target. `other_docs` takes it from another chunk.
    `permuted` shuffles each stretch of one document within the chunk before it takes window means,
    so that the target is the mean of random others of the same document. `later` leaves out the
    tokens before, which the language model has read when it comes to the token.
    """
    place = shuffle_within_documents(doc, step) if cfg.control == "permuted" else None
    target, enough = window_mean(x, doc, cfg.window, place, at, cfg.control == "later")
    owner = doc[:, at]
    if cfg.control == "other_docs":
        enough = enough & enough.roll(1, 0) & (owner != owner.roll(1, 0))
        return target.roll(1, 0), enough, owner.roll(1, 0)
    return target, enough, owner


def shuffle_within_documents(doc, step):
    """doc (N, T) -> (N, T) a new place for each token: each stretch of one document is shuffled
    within its own places."""
    generator = torch.Generator().manual_seed(step)
    noise = to_device(torch.rand(doc.shape, generator=generator), doc.device)
    first = torch.ones_like(doc)
    first[:, 1:] = doc[:, 1:] != doc[:, :-1]
    stretch = first.cumsum(1)  # numbers the stretches of one document
    # .99: below 1 after rounding too. An order is the inverse of places; a random one is as random.
    return (stretch + 0.99 * noise).argsort(1)


def window_infonce_loss(z, W_lead, target, bank, left_out, temperature):
    """InfoNCE: what a token's leading latents decode to must pick out its target among the bank's.

    z (M, F) leading codes, W_lead (F, d) their decoder rows; target (M, d) and bank (K, d) less
    b_dec, for activations with a mean square of 1 a dimension; left_out (M, K) bool: which of the
    bank do not count, for they are of the token's own document. -> (M,), the loss of each token
    The guess z @ W_lead is compared by cosines. Contrastive predictive coding (van den Oord et al.
    2018), except that the targets are not learned, so they cannot collapse.

    >>> z = target = bank = torch.eye(2)
    >>> window_infonce_loss(z, torch.eye(2), target, bank, torch.eye(2) > 0, 1.0)  # log(1 + 1/e)
    tensor([0.3133, 0.3133])
    """
    # A vector shorter than a tenth of an activation's norm is divided by that length, not by its
    # own: near zero the gradient of a cosine has no bound.
    shortest = 0.1 * W_lead.shape[1] ** 0.5
    target = target / target.norm(dim=1, keepdim=True).clamp(min=shortest)
    bank = bank / bank.norm(dim=1, keepdim=True).clamp(min=shortest)
    # The guess, d numbers a token, is never computed: products and length follow from z alone.
    with torch.autocast(z.device.type, enabled=False):  # bfloat16 is too coarse for logits
        square = ((z @ (W_lead @ W_lead.t())) * z).sum(1, keepdim=True)
        z = z / (temperature * square.clamp(min=shortest**2).sqrt())
        own = (z * (target @ W_lead.t())).sum(1, keepdim=True)
        others = z @ (bank @ W_lead.t()).t()
        logits = torch.cat([own, others.masked_fill_(left_out, -torch.inf)], 1)
    own_column = torch.zeros(len(z), dtype=torch.long, device=z.device)
    return F.cross_entropy(logits, own_column, reduction="none")


def sqdiff_loss(codes, doc, window):
    """Mean of |z_t - z_s|^2 over pairs of tokens less than `window` apart: the plainest form.

    Shrinking the codes lowers it.

    >>> sqdiff_loss(torch.tensor([[[1.], [3.]]]), torch.ones(1, 2), 2)
    tensor(4.)
    """
    total = codes.new_zeros(())
    n_pairs = codes.new_zeros(())
    for lag in range(1, window):
        ok = same_document(doc, lag)
        difference = (codes[:, :-lag] - codes[:, lag:]) * ok[..., None]
        total = total + difference.square().sum()
        n_pairs = n_pairs + ok.sum()
    return total / n_pairs.clamp(min=1)


def infonce_loss(codes, doc, temperature, cosine=True):
    """Symmetric InfoNCE: z_{t+1} must identify z_t among the codes of other documents.

    Bhalla et al. 2025 (T-SAE). cosine: of cosines, as published; else of inner products, as in
    their released code. Every fourth pair of a chunk takes part.

    >>> codes = torch.eye(2).repeat_interleave(2, 0).view(2, 2, 2)
    >>> infonce_loss(codes, torch.tensor([[1, 1], [2, 2]]), 1.0)  # log(1 + 1/e)
    tensor(0.3133)
    """
    ok = same_document(doc, 1)[:, ::4].flatten()
    a = codes[:, :-1:4].flatten(0, 1)
    b = codes[:, 1::4].flatten(0, 1)
    owner = doc[:, :-1:4].flatten()
    if cosine:
        a = F.normalize(a, dim=1, eps=1e-6)
        b = F.normalize(b, dim=1, eps=1e-6)
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    others = ok[:, None] & ok & (owner[:, None] != owner)
    with torch.autocast(a.device.type, enabled=False):  # bfloat16 is too coarse for a logit of 50
        logits = a @ b.t() / temperature
    logits = logits.masked_fill(~(own | others), -torch.inf)
    log_p = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
    return -(log_p * ok).sum() / 2 / ok.sum().clamp(min=1)


# name: loss(codes (N, T, F), doc (N, T), window) -> one number. A new one needs nothing else. One of
# another shape: a name in TEMP_LOSSES and a branch of Trainer.temporal_loss.
PAIR_LOSSES = {"sqdiff": sqdiff_loss}
TEMP_LOSSES = ("window_infonce", "infonce", "infonce_dot", *PAIR_LOSSES)


# ------------------------------------------------------------------------------------------------
# 4. The training step
# ------------------------------------------------------------------------------------------------

DEAD_EVERY = 20  # steps between looks at which latents are dead: a look waits for the GPU
# These terms see a part of the batch, a fair sample at a part of the cost. Neighbours have nearly the
# same window mean, so window_infonce takes every second token of half of the chunks. Pairs need
# neighbours, so PAIR_LOSSES take the first quarter of the chunks, which are shuffled; so does AuxK.
WINDOW_STRIDE = 2
VIEWED_SHARE = 2
PAIR_SHARE = 4
AUXK_SHARE = 4
NEAR = 0.75  # window_infonce reads leading latents above this share of batchtopk's threshold


class Batch(NamedTuple):
    """What one step is trained on: N chunks of T neighbouring tokens, B = N*T.

    What follows n_valid is for window_infonce and None without it.
    """

    x: torch.Tensor  # (B, d_in) activations, scaled
    doc: torch.Tensor  # (N, T) the document of each token, 0 where it is left out
    n_valid: int  # tokens that are not left out; to count them on a GPU would make the host wait
    viewed: torch.Tensor = None  # (V,) half of the chunks, first those of which there is another view
    view: torch.Tensor = None  # (V*T, d_in) their other view; without any the chunks themselves
    view_doc: torch.Tensor = None  # (V, T) as doc, 0 also where a token has no other view
    bank: torch.Tensor = None  # (K, d_in) window means of other tokens
    bank_doc: torch.Tensor = None  # (K,) their documents


class Stats(NamedTuple):
    """What the calibration rows, which are neither trained on nor judged, say of the activations.

    x is multiplied by `scale` in training.
    """

    mean: torch.Tensor  # (d_in,), of scale * x
    scale: float  # makes E|scale * x|^2 = d_in; 1 with layernorm, whose x is normalised
    variance: float  # E|scale * x - mean|^2


class DenseCodes:
    """Codes of a batch as a matrix acts (B, n_latents): the textbook form, for any device."""

    def __init__(self, acts):
        self.acts = acts

    def decode(self, W_dec):
        """W_dec (n_latents, d_in) -> (B, d_in)."""
        return self.acts @ W_dec

    def first(self, n_latents, n_tokens=None):
        """The codes of the first n_latents latents at the first n_tokens tokens, as a matrix."""
        return self.acts[:n_tokens, :n_latents]

    def fired(self):
        """(n_latents,) 1 for each latent that is active at some token, else 0."""
        return (self.acts.amax(0) > 0).float()

    def l0(self):
        """Number of active codes in the batch; it has no gradient."""
        return (self.acts != 0).sum()

    def l1(self):
        """Sum of all codes in the batch."""
        return self.acts.sum(dtype=torch.float32)


def encode_dense(sae, x, ok, n_valid):
    """x (B, d_in) -> DenseCodes. ok (B,) bool: which tokens are ordinary; n_valid: how many are."""
    pre = sae.pre_activations(x)
    kept = sae.sparsity.keep(sae, pre, ok, n_valid)
    return DenseCodes(sae.activate(pre) * (kept & ok[:, None]))


class Trainer:
    """What a run carries from step to step, and one step of it."""

    def __init__(self, cfg, d_in, stats, seed, device):
        self.cfg = cfg
        self.stats = stats
        self.device = torch.device(device)
        self.sae = SAE(cfg, d_in)
        self.sae.initialise(cfg.init, stats.mean, seed)
        self.sae.to(device)
        self.parameters = list(self.sae.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=cfg.lr, fused=True)
        self.silent_tokens = torch.zeros(cfg.d_sae, device=device)  # since a latent last fired
        self.dead = torch.zeros(0, dtype=torch.long, device=device)  # indices of dead latents
        self.matmul_dtype = prepare.pick_dtype(cfg.matmul_dtype, str(device))
        # On a CPU section 9: the same codes up to rounding, faster.
        sparse = self.device.type == "cpu" and cfg.sparsity in ("topk", "batchtopk")
        self.encode_batch = encode_sparse if sparse else encode_dense

    def step(self, batch, step, log=False):
        """One optimiser step: forward, losses, backward, update. -> the terms as 0-dim tensors

        If a loss or gradient is not finite, raises FloatingPointError before the update. On a GPU
        an unlogged step does not wait to find out and does not raise: fused Adam skips the update.
        """
        cfg, sae = self.cfg, self.sae
        ok = batch.doc.flatten() > 0
        n_valid = max(batch.n_valid, 1)
        x = sae.normalise(batch.x)[0] if cfg.layernorm else batch.x

        bfloat16 = self.matmul_dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            codes = self.encode_batch(sae, x, ok, n_valid)
            x_hat = codes.decode(sae.W_dec) + sae.b_dec
            error = F.mse_loss(x_hat, x, reduction="none").sum(1) * ok
            # As shares of the variance, weights mean the same for any model and layer.
            terms = {"recon": error.sum() / n_valid / self.stats.variance}
            loss = terms["recon"]
            if cfg.temporal:
                terms["temporal"] = self.temporal_loss(codes, x, batch, step)
                if terms["temporal"].ndim:
                    raise ValueError(f"--temp_loss {cfg.temp_loss} gives a tensor of shape "
                                     f"{tuple(terms['temporal'].shape)}, not one number")
                loss = loss + cfg.temp_alpha * terms["temporal"]
            if cfg.matryoshka_alpha:
                by_lead = codes.first(cfg.n_lead) @ sae.W_dec[: cfg.n_lead] + sae.b_dec
                error = F.mse_loss(by_lead, x, reduction="none").sum(1) * ok
                terms["matryoshka"] = error.sum() / n_valid / self.stats.variance
                loss = loss + cfg.matryoshka_alpha * terms["matryoshka"]
            if cfg.sparsity == "l1":
                loss = loss + cfg.l1_alpha * codes.l1() / n_valid
            if cfg.auxk_alpha and len(self.dead):
                terms["auxk"] = self.auxk_loss(x, x_hat, ok)
                loss = loss + cfg.auxk_alpha * terms["auxk"]
        terms["loss"] = loss

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            fired = codes.fired()
            if WORLD > 1:
                average_gradients(self.parameters, fired)
            terms["grad_norm"] = self.update(loss, step, log)
            # The batch of all processes, so that all agree on what is dead.
            self.silent_tokens += cfg.batch_size
            self.silent_tokens.masked_fill_(fired > 0, 0)
            if step % DEAD_EVERY == 0:
                self.dead = (self.silent_tokens > cfg.dead_tokens).nonzero()[:, 0]
            if log:
                terms["l0"] = codes.l0() / n_valid
                terms["l1"] = codes.l1() / n_valid
                terms["dead"] = torch.tensor(float(len(self.dead)))
        return {name: value.detach() for name, value in terms.items()}

    def temporal_loss(self, codes, x, batch, step):
        """The temporal loss of the leading latents; see section 3."""
        cfg, doc = self.cfg, batch.doc
        if cfg.temp_loss == "window_infonce":
            return self.window_loss(x, batch, step)
        if cfg.temp_loss in PAIR_LOSSES:
            doc = doc[: max(1, len(doc) // PAIR_SHARE)]
            z = codes.first(cfg.n_lead, doc.numel()).float()
            return PAIR_LOSSES[cfg.temp_loss](z.view(*doc.shape, -1), doc, cfg.window)
        if cfg.temp_loss not in ("infonce", "infonce_dot"):
            raise ValueError(f"Trainer.temporal_loss has no branch for --temp_loss {cfg.temp_loss}")
        # Codes in raw units, so that weight and temperature mean what they do in the paper. The
        # reconstruction error is a share of the variance, so this is divided by the raw variance.
        # All chunks: infonce_loss itself takes every fourth pair.
        z = codes.first(cfg.n_lead).float() / self.stats.scale
        raw_variance = self.stats.variance / self.stats.scale**2
        cosine = cfg.temp_loss == "infonce"
        z = z.view(*doc.shape, -1)
        return infonce_loss(z, doc, cfg.temperature, cosine) / raw_variance

    def window_loss(self, x, batch, step):
        """window_infonce_loss, mean over every second token that has a target in its other view."""
        cfg, sae, view_doc = self.cfg, self.sae, batch.view_doc
        at = slice(step % WINDOW_STRIDE, None, WINDOW_STRIDE)
        view = sae.normalise(batch.view)[0] if cfg.layernorm else batch.view
        with torch.autocast(self.device.type, enabled=False):  # targets are in float32
            target, enough, owner = window_mean_target(
                view.view(*view_doc.shape, -1), view_doc, cfg, step, at)
        target, enough = target.flatten(0, 1), enough.flatten()
        left_out = batch.bank_doc == owner[..., None]
        x = x.view(*batch.doc.shape, -1)[:, at][batch.viewed].flatten(0, 1)
        # Computed again for a cut that is lower than that of the codes: what is cut off has no
        # gradient, so this lets a latent just below the threshold learn. Without a threshold
        # (topk, l1) all positive ones count.
        pre = sae.pre_activations(x, slice(cfg.n_lead))
        z = (sae.activate(pre) * (pre > NEAR * sae.threshold)).float()
        b_dec = sae.b_dec.detach()  # the loss does not move its targets
        loss = window_infonce_loss(z, sae.W_dec[: cfg.n_lead], target - b_dec, batch.bank - b_dec,
                                   left_out.flatten(0, 1), cfg.temperature)
        return (loss * enough).sum() / enough.sum().clamp(min=1)

    def auxk_loss(self, x, x_hat, ok):
        """AuxK (Gao et al. 2024): the best dead latents explain what is left over.

        On the first quarter of the batch: on all of it the dense product would cost more than the
        rest of the step. At most d_in / 2 latents a token, as in the paper.
        """
        sae, dead, n = self.sae, self.dead, len(x) // AUXK_SHARE
        acts = torch.relu(sae.pre_activations(x[:n], dead))
        top = acts.topk(min(x.shape[1] // 2, len(dead)), dim=-1, sorted=False)
        acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        left = (x[:n] - x_hat[:n]).detach()
        error = (left - acts @ sae.W_dec[dead]).square().sum(1) * ok[:n]
        return error.sum() / (left.square().sum(1) * ok[:n]).sum().clamp(min=1e-8)

    def update(self, loss, step, log):
        """Clip, check and apply the gradients; keep decoder rows at unit norm. -> gradient norm."""
        W, grad = self.sae.W_dec, self.sae.W_dec.grad
        # Rows have unit norm, so the part of a row's gradient along the row itself is removed.
        radial = (grad * W).sum(1, keepdim=True)
        grad.addcmul_(radial, W, value=-1)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        bad = ~torch.isfinite(loss + norm)
        if (log or self.device.type == "cpu") and bad:
            raise FloatingPointError(f"step {step}: the loss or its gradient is not finite; "
                                     "the last checkpoint is good")
        # Clipping: fused Adam divides by grad_scale and leaves a step out where found_inf is set,
        # without a pass over the gradients or a wait for the device.
        self.optimizer.found_inf = bad.float()
        clip = self.cfg.grad_clip or math.inf
        self.optimizer.grad_scale = (norm / clip).clamp(min=1)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.cfg, step)
        self.optimizer.step()
        W.div_(W.norm(dim=1, keepdim=True))
        return norm

    def state(self):
        """All that the next step depends on, besides (seed, step)."""
        return {"sae": self.sae.state_dict(), "optimizer": self.optimizer.state_dict(),
                "silent_tokens": self.silent_tokens, "dead": self.dead}

    def load(self, state):
        """Restore what `state` returned."""
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.silent_tokens.copy_(state["silent_tokens"])
        self.dead = state["dead"].to(self.device)


def learning_rate(cfg, step):
    """A cosine down to a tenth, or constant, times a linear warm-up."""
    warm_up = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    if cfg.schedule == "constant":
        return cfg.lr * warm_up
    return cfg.lr * warm_up * (0.55 + 0.45 * math.cos(math.pi * step / cfg.steps))


def average_gradients(parameters, fired):
    """Average the gradients over all processes, and `fired` (d_sae,), of which the sign is used."""
    tensors = [p.grad for p in parameters if p.grad is not None] + [fired]
    message = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(message)
    message /= WORLD
    for tensor, part in zip(tensors, message.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


# ------------------------------------------------------------------------------------------------
# 5. Harvest: the language model's activations, by hooks, in a file on disk
# ------------------------------------------------------------------------------------------------

FORWARD_ROWS = {"cpu": 8, "cuda": 64}  # rows a forward pass; other numbers round differently


class StopForward(Exception):
    """Raised by the hook: what lies above the hooked block is never computed."""


@torch.inference_mode()
def residuals(lm, tokens, layer):
    """tokens (B, T) -> output (B, T, d_in) of decoder block `layer`, in the model's dtype."""
    kept = []

    def hook(module, inputs, output):
        kept.append(output if torch.is_tensor(output) else output[0])
        raise StopForward

    handle = prepare.decoder_blocks(lm)[layer].register_forward_hook(hook)
    try:
        lm(torch.from_numpy(np.array(tokens, np.int64)).to(lm.device), use_cache=False)
    except StopForward:
        pass
    finally:
        handle.remove()
    if kept[0].shape[:2] != tokens.shape or kept[0].ndim != 3:
        raise ValueError(f"block {layer} of {type(lm).__name__} gives {tuple(kept[0].shape)}, "
                         f"not (rows, tokens, width): this model is not supported")
    return kept[0]


def harvested(cfg, tokens, path, dtype, device):
    """Rows of tokens (N, T) -> their activations (N, T, d_in), mapped from the file `path`.

    A missing file is made: PATH.part is filled a batch of rows at a time and renamed when it is
    whole. PATH.done says which batches are there, so a harvest that was stopped goes on. Another
    run that wants the same file waits for its lock; the processes of one run share the work.
    """
    shape = (*tokens.shape, prepare.model_shape(cfg.model, cfg.cache_dir)[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock") if RANK == 0 else contextlib.nullcontext():
        barrier()  # the first process has the lock
        if not broadcast(path.exists()):
            fill(cfg, tokens, path, shape, dtype, device)
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def fill(cfg, tokens, path, shape, dtype, device):
    """Run this process's share of the rows through the language model and write the file."""
    part, done = Path(f"{path}.part"), Path(f"{path}.done")
    n_bytes = math.prod(shape) * dtype.itemsize
    try:
        with open(part, "ab") as file:  # a full disk is an error here, not a crash later
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as e:
        part.unlink()
        raise RuntimeError(f"the activations need {n_bytes / 1e9:.1f} GB in {path.parent} "
                           f"({e.strerror}): lower --harvest_tokens or --cache_gb, or move "
                           "--cache_dir") from None
    acts = torch.from_file(str(part), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    n_rows = FORWARD_ROWS.get(torch.device(device).type, FORWARD_ROWS["cpu"])
    starts = range(0, len(tokens), n_rows)
    is_done = torch.from_file(str(done), shared=True, size=len(starts), dtype=torch.uint8)
    lm, _ = prepare.load_lm(cfg.model, dtype, device, cfg.cache_dir)
    bar = tqdm(range(RANK, len(starts), WORLD), desc="harvest", unit="batch", leave=False,
               disable=RANK > 0)
    for i in bar:
        if not is_done[i]:
            x = residuals(lm, tokens[starts[i] : starts[i] + n_rows], cfg.layer)
            if not torch.isfinite(x).all():
                raise RuntimeError(f"the language model gives NaN or infinity at layer {cfg.layer}")
            acts[starts[i] : starts[i] + n_rows] = x.cpu()
            is_done[i] = 1
    barrier()
    if RANK == 0:
        os.replace(part, path)
        done.unlink()
    barrier()


class Part(NamedTuple):
    """Activations that are trained on, memory-mapped from a file or resident on the device."""

    acts: torch.Tensor  # (M, T, d_in) in the model's dtype
    rows: np.ndarray  # (N,) which of the M rows; with --acts the file holds other rows, too
    doc: np.ndarray  # (N, T) int32, a number for the document of each token; 0 is left out
    # (N, T) the token, counted through all rows, that is its other view, or -1; None without views
    twin: np.ndarray


def load_inputs(cfg):
    """What a run trains on: prepare.Inputs, or prepare.Acts with --acts."""
    if cfg.acts:
        unread = [key for key in evaluate.TEXT_ONLY if getattr(cfg, key) != getattr(Config, key)]
        if unread:
            say(f"note: with --acts nothing reads {', '.join(unread)}")
        if cfg.temporal:
            say("note: with --acts a token's target is from its own row: there is no second view")
        return prepare.load_acts(cfg.acts, cfg.acts_mask, cfg.eval_rows)
    options = {name: getattr(cfg, name) for name in evaluate.TEXT_OPTIONS}
    return prepare.text_rows(cfg.dataset, cfg.model, **options)


class Harvest:
    """The training activations of a run: calibration rows, and batches of training rows.

    What a step sees is a function of (seed, step) alone: resuming needs no cursor, and runs with
    the same seed are paired. Own activations (--acts) are one part. A harvest that is larger than
    cache_gb comes in parts; only one part is on disk at a time.
    """

    def __init__(self, cfg, inputs):
        self.cfg = cfg
        self.inputs = inputs
        self.device = torch.device(prepare.pick_device(cfg.device))
        self.dtype = prepare.pick_dtype(cfg.dtype, str(self.device))
        self.part_number = None  # the part that is loaded
        self.part = None
        self.sink_limit = math.inf  # norm of a sink, set by the calibration rows
        self.n_parts = 1
        n_rows = len(inputs.train)
        if not cfg.acts:
            n_rows = len(inputs.train.doc)
            row_bytes = cfg.context_size * self.dtype.itemsize
            row_bytes *= prepare.model_shape(cfg.model, cfg.cache_dir)[0]
            self.n_parts = math.ceil(n_rows * row_bytes / (cfg.cache_gb * 1e9))
        self.n_rows = n_rows // self.n_parts  # of one part
        self.calibration = self.rows_of("calibration")
        row_tokens = self.calibration.doc.shape[1]
        self.n_chunks = self.n_rows * row_tokens // cfg.chunk_size  # of one part
        self.batch_chunks = cfg.batch_size // cfg.chunk_size
        if row_tokens % cfg.chunk_size:
            raise ValueError(f"--chunk_size {cfg.chunk_size} does not divide rows of "
                             f"{row_tokens} tokens")
        if self.n_chunks < self.batch_chunks:
            raise ValueError(f"{self.n_rows} training rows are less than one --batch_size "
                             f"{cfg.batch_size}: use a smaller batch, more text or a larger "
                             "--cache_gb")
        self.stats = self.compute_stats()

    def rows_of(self, split, number=0):
        """The calibration rows, or part `number` of the training rows ("train")."""
        if self.cfg.acts:
            acts = self.inputs.acts
            rows = getattr(self.inputs, split)
            doc = self.inputs.doc[rows]
        else:
            tokens, doc, offset = getattr(self.inputs, split)
            if split == "train":
                tokens, doc, offset = [array[number * self.n_rows :][: self.n_rows]
                                       for array in (tokens, doc, offset)]
            path = self.file_of(split, number)
            acts = harvested(self.cfg, tokens, path, self.dtype, str(self.device))
            rows = np.arange(len(doc))
        blocks = torch.from_numpy(rows).split(64)
        norms = torch.cat([acts[block].float().norm(dim=-1) for block in blocks]).numpy()
        if split == "calibration":  # they come first
            ordinary = norms[(doc > 0) & (norms > 0)]
            if not len(ordinary):
                raise ValueError("the calibration rows hold no ordinary token with activations")
            self.sink_limit = prepare.sink_limit(ordinary)
        # attention sinks, and padding, whose norm is 0, are left out
        doc = np.where((norms > self.sink_limit) | (norms == 0), 0, doc)
        views = split == "train" and self.cfg.view_share and not self.cfg.acts
        return Part(acts, rows, doc, prepare.find_twins(doc, offset) if views else None)

    def file_of(self, split, number):
        """The file of some rows in the cache, named by all that decides their activations."""
        cfg = self.cfg
        key = {"inputs": self.inputs.identity, "split": split, "part": [number, self.n_parts],
               "layer": cfg.layer, "dtype": str(self.dtype), "device": self.device.type,
               "forward_rows": FORWARD_ROWS}
        if self.n_parts > 1 and split == "train":
            key["run"] = str(cfg.run_dir)  # parts are deleted, so they are not shared
        return prepare.cache_root(cfg.cache_dir) / f"acts-{prepare.digest(key)}.bin"

    def load_part(self, number):
        """Load part `number` into self.part, on the device if it fits there."""
        if number == self.part_number:
            return
        self.delete_part()
        self.part = on_device(self.rows_of("train", number), self.device)
        self.part_number = number
        self.bank = self.make_bank() if self.cfg.windowed else None
        if self.n_parts == 1:
            prepare.release_lm()  # what it took is free for training
        n_valid = int((self.part.doc > 0).sum())
        n_twins = 0 if self.part.twin is None else int((self.part.twin >= 0).sum())
        say(f"part {number + 1} of {self.n_parts}: {self.n_rows:,} rows, {n_valid:,} tokens to "
            f"train on, {n_twins:,} of them with another view")

    def delete_part(self):
        """Let go of the part that is loaded; if it is one of several, delete its file."""
        self.part = None
        if self.n_parts > 1 and self.part_number is not None:
            barrier()  # every process is done with it
            self.file_of("train", self.part_number).unlink(missing_ok=True)
            self.part_number = None

    def batch(self, seed, step):
        """This process's share of a step's batch.

        N chunks of T = chunk_size neighbouring tokens are shuffled, not tokens: windows stay whole
        while a batch mixes many documents. The targets of a token are around its twin, the same
        token of the same text in another row (prepare.pack_twice). About half of the chunks have
        twins; half of the chunks are taken, those first, so that shapes do not change.
        """
        epoch, place = divmod(step, self.n_chunks // self.batch_chunks)
        self.load_part(epoch % self.n_parts)
        order = chunk_order(seed, epoch, self.n_chunks)
        ids = order[place * self.batch_chunks :][: self.batch_chunks][RANK::WORLD]
        tokens = self.tokens_of(ids)
        doc = self.part.doc.ravel()[tokens]
        n_valid = int((doc > 0).sum())
        batch = Batch(self.activations(tokens), self.to_tensor(doc), n_valid)
        if not self.cfg.windowed:
            return batch
        twin = tokens  # without a second view a token is its own twin
        if self.part.twin is not None:
            twin = self.part.twin.ravel()[tokens]
        viewed = (twin < 0).all(1).argsort(kind="stable")[: math.ceil(len(ids) / VIEWED_SHARE)]
        twin = twin[viewed]
        view_doc = np.where(twin < 0, 0, doc[viewed])
        bank, bank_doc = self.bank
        return batch._replace(
            viewed=self.to_tensor(viewed), view=self.activations(np.maximum(twin, 0)),
            view_doc=self.to_tensor(view_doc), bank=bank, bank_doc=bank_doc)

    def to_tensor(self, array):
        """A numpy array as a tensor on the device."""
        return to_device(torch.from_numpy(array), self.device)

    def tokens_of(self, ids):
        """Chunks, numbered through all rows, (N,) -> their tokens, counted so, (N, T)."""
        chunk_size = self.cfg.chunk_size
        return ids[:, None] * chunk_size + np.arange(chunk_size)

    def activations(self, tokens):
        """Tokens, counted through all rows, of any shape -> (n, d_in) float32, scaled."""
        row, place = np.divmod(tokens.ravel(), self.part.doc.shape[1])
        index = torch.from_numpy(self.part.rows[row] * self.part.doc.shape[1] + place)
        every = self.part.acts.flatten(0, 1)
        x = to_device(every[to_device(index, every.device)], self.device)
        return x.float() * self.stats.scale

    def make_bank(self):
        """Window means in the middle of random chunks, `bank` of them or fewer, where one has none.

        -> (K, d_in), their documents (K,)
        """
        cfg = self.cfg
        ids = np.random.default_rng(self.part_number).permutation(self.n_chunks)[: cfg.bank]
        tokens = self.tokens_of(ids)
        doc = self.part.doc.ravel()[tokens]
        x = self.activations(tokens)
        if cfg.layernorm:
            x = SAE.normalise(x)[0]
        doc = self.to_tensor(doc)
        middle = slice(cfg.chunk_size // 2, cfg.chunk_size // 2 + 1)
        target, enough = window_mean(x.view(*doc.shape, -1), doc, cfg.window, at=middle)
        return target[enough], doc[:, middle][enough]

    def calibration_tokens(self):
        """The ordinary tokens of the calibration rows, (n, d_in) float32, unscaled."""
        acts, rows, doc, _ = self.calibration
        return acts[torch.from_numpy(rows)].float()[torch.from_numpy(doc > 0)]

    def compute_stats(self):
        """Stats of the calibration rows. Sums are in float64."""
        x = self.calibration_tokens()
        if self.cfg.layernorm:
            x = SAE.normalise(x)[0]
        x = x.double()
        mean = x.mean(0)
        power = float(x.square().sum(1).mean())
        variance = power - float(mean.square().sum())
        if not variance > 1e-9 * power:
            raise ValueError("the activations have no variance: there is nothing to explain")
        scale = 1.0 if self.cfg.layernorm else math.sqrt(x.shape[1] / power)
        return Stats((mean * scale).float(), scale, variance * scale**2)


@functools.lru_cache(2)
def chunk_order(seed, epoch, n_chunks):
    """The order of a part's chunks in one pass over it, (n_chunks,)."""
    return np.random.default_rng([seed, epoch]).permutation(n_chunks)


def to_device(tensor, device):
    """Copy to the device. From pinned memory a copy to a GPU does not make the host wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_device(part, device):
    """The Part, on the GPU if it takes less than half of its free memory."""
    size = part.acts.numel() * part.acts.element_size()
    if device.type != "cuda" or 2 * size > torch.cuda.mem_get_info(device)[0]:
        return part
    return part._replace(acts=part.acts.to(device))


# ------------------------------------------------------------------------------------------------
# 6. Training loop, checkpoints, several processes
# ------------------------------------------------------------------------------------------------


def train(cfg, seed, harvest, stop):
    """Train one SAE; checkpoints and log.jsonl go to the run directory. -> the SAE, for raw x.

    stop: the run's prepare.Stop; a signal waits until the step is whole.
    """
    d_in = harvest.calibration.acts.shape[-1]
    trainer = Trainer(cfg, d_in, harvest.stats, seed, harvest.device)
    first = restore(cfg.run_dir, trainer, seed)  # 0 unless the run is resumed
    log_path = cfg.run_dir / "log.jsonl" if RANK == 0 else os.devnull
    harvest.batch(seed, min(first, cfg.steps - 1))  # loads the first part before the clock starts
    bar = tqdm(initial=first, total=cfg.steps, desc=f"train seed {seed}", unit="step",
               mininterval=1, disable=RANK > 0)
    saved_at = began = time.perf_counter()
    n_tokens = 0
    idle = cfg.temporal and first == 0  # whether the temporal loss was 0 in every line so far
    with bar, open(log_path, "a") as log_file, stop.waiting(), malloc_keeps_memory():
        for step in range(first, cfg.steps):
            batch = harvest.batch(seed, step)
            log = step % cfg.log_every == 0 or step == cfg.steps - 1
            terms = trainer.step(batch, step, log)
            n_tokens += batch.n_valid * WORLD
            if log:
                rate = n_tokens / (time.perf_counter() - began)
                line = {"seed": seed, "step": step, "lr": learning_rate(cfg, step)}
                line |= {name: float(value) for name, value in terms.items()}
                line["tokens_per_s"] = round(rate)
                idle = idle and line["temporal"] == 0
                if idle and step >= min(2 * cfg.log_every, cfg.steps - 1):
                    raise ValueError("the temporal loss is 0: no token has enough others of its "
                                     "document within --window, a second view (--view_share) or "
                                     "other documents to be told from")
                log_file.write(json.dumps(line) + "\n")
                log_file.flush()
                bar.set_postfix(loss=f"{line['loss']:.4f}", l0=f"{line['l0']:.1f}",
                                tok_s=f"{rate:,.0f}", refresh=False)
            bar.update()
            stopped = all_reduce_max(stop.signal)  # all processes stop after the same step
            due = time.perf_counter() - saved_at > 60 * cfg.checkpoint_minutes
            if RANK == 0 and (stopped or due):
                checkpoint(cfg.run_dir, trainer, seed, step + 1)
                saved_at = time.perf_counter()
            if stopped:
                stop.signal = stopped
                raise prepare.Interrupted(stopped)
    if trainer.sae.sparsity.has_threshold:
        fit_threshold(trainer.sae, harvest)
    trainer.sae.fold_scale(harvest.stats.scale)
    return trainer.sae.cpu()


@torch.no_grad()
def fit_threshold(sae, harvest):
    """Set the inference threshold so that the calibration rows have k active latents a token.

    Fitted on training rows, it would give new text an L0 one percent too high.
    """
    x = harvest.calibration_tokens().to(harvest.device) * harvest.stats.scale
    if sae.layernorm:
        x = sae.normalise(x)[0]
    candidates = []
    for block in x.split(4096):
        pre = sae.pre_activations(block)
        # sae.threshold is still that of the last step; far below it is never needed.
        candidates.append(pre[pre > 0.5 * sae.threshold])
    candidates = torch.cat(candidates)
    keep = min(sae.k * len(x), len(candidates))
    sae.threshold.copy_(candidates.topk(keep).values[-1] if keep else 0.0)


def checkpoint(run_dir, trainer, seed, step):
    """Save the training state; the last good checkpoint is always there."""
    state = {"seed": seed, "step": step, **trainer.state()}
    prepare.write_whole(run_dir / "checkpoint" / "state.pt", functools.partial(torch.save, state))


def restore(run_dir, trainer, seed):
    """Load the checkpoint if it is of this seed, cut log.jsonl back to it, return the next step."""
    path = run_dir / "checkpoint" / "state.pt"
    first = 0
    try:
        state = None
        if RANK == 0 and path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = broadcast(state)
        if state and state["seed"] == seed:
            trainer.load(state)
            first = state["step"]
    except Exception as e:  # torch raises many kinds for a damaged or malicious file
        raise RuntimeError(f"the checkpoint {path} cannot be used ({prepare.first_line(e)[:200]}); "
                           "--overwrite starts again") from None
    if RANK == 0:
        cut_log(run_dir / "log.jsonl", seed, first)
    return first


def cut_log(path, seed, first):
    """Drop what log.jsonl holds of this seed from step `first` on; a kill may tear the last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        entry = json.loads(line) if line.endswith("}\n") else None
        if entry and (entry["seed"] != seed or entry["step"] < first):
            kept.append(line)
    prepare.write_whole(path, functools.partial(Path.write_text, data="".join(kept)))


@contextlib.contextmanager
def malloc_keeps_memory():
    """While open, glibc keeps freed memory: asking the system again takes a tenth of a step."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


# Several processes (torchrun): gloo carries what lies on the host, nccl what lies on GPUs.


def init_distributed(device):
    """Meet the other processes that torchrun started."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # a harvest is long


def barrier():
    """Wait until every process is here."""
    all_reduce_max(0)


def all_reduce_max(number):
    """The largest of the processes' whole numbers, by way of the host: a GPU does not wait."""
    if WORLD == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def broadcast(value):
    """The first process's `value`, in all of them."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ------------------------------------------------------------------------------------------------
# 7. Run directory
# ------------------------------------------------------------------------------------------------


def save_sae(sae, folder, cfg, x):
    """Write `sae` in SAELens' format; beside it x, some raw calibration tokens, with their codes.

    -> SHA-256 of the weights.

    SAELens has no gelu: such an SAE gets an architecture name that SAELens refuses, so that it is
    not loaded wrongly.
    """
    tensors = {name: p.detach().contiguous() for name, p in sae.named_parameters()}
    architecture = sae.sparsity.architecture
    d_sae, d_in = sae.W_dec.shape
    # SAELens' l0 and num_dead_features are those at the end of training, too
    last = json.loads((cfg.run_dir / "log.jsonl").read_text().splitlines()[-1])
    recipe = ("k", "temp_loss", "temp_alpha", "window", "matryoshka_alpha", "auxk_alpha")
    if sae.sparsity.has_threshold:
        tensors["threshold"] = sae.threshold.repeat(d_sae)
    if sae.nonlinearity == "gelu":
        architecture = "temporal_sae_" + architecture
        tensors["scale"] = sae.scale
    spec = {
        "architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "reshape_activations": "none",
        "normalize_activations": "layer_norm" if sae.layernorm else "none",
        "metadata": {"sae_lens_version": "6.0.0", "training_architecture": cfg.sparsity,
                     "training_architecture_details": {key: getattr(cfg, key) for key in recipe},
                     "l0": last["l0"], "num_dead_features": int(last["dead"]),
                     "exclude_special_tokens": True, "sequence_separator_token": "bos",
                     **origin(cfg)},
        "temporal_sae": {"k": sae.k, "sparsity": cfg.sparsity, "nonlinearity": sae.nonlinearity,
                         "layernorm": sae.layernorm,
                         # without a lead latents have no order: the judge takes any
                         "lead": cfg.n_lead if cfg.temporal or cfg.matryoshka_alpha else None,
                         "sha256": evaluate.tensor_hash(tensors)},
    }
    if architecture.endswith("topk"):
        spec["k"] = sae.k
    with torch.no_grad():
        acts = sae.encode(x)
        reference = {"x": x, "acts": acts, "x_hat": sae.decode(acts, x)}
    for name, content in (("reference", reference), ("sae_weights", tensors)):
        path = folder / f"{name}.safetensors"
        prepare.write_whole(path, functools.partial(save_file, content))
    prepare.write_json(folder / "cfg.json", spec)  # last: its presence says that this seed is done
    return spec["temporal_sae"]["sha256"]


def origin(cfg):
    """Where the activations come from, for cfg.json: names, never paths of this machine."""
    if cfg.acts:
        return {"model_name": None, "hook_name": None, "dataset_path": Path(cfg.acts).name}
    model = evaluate.public_name(cfg.model)
    return {"model_name": model, "hook_name": f"blocks.{cfg.layer}.hook_resid_post",
            "hook_layer": cfg.layer, "prepend_bos": True, "context_size": cfg.context_size,
            "seqpos_slice": [None],  # every place in a row
            "dataset_path": evaluate.public_name(cfg.dataset)}


@torch.no_grad()
def prove_saved(sae, folder):
    """RuntimeError unless the judge gets from the folder the trained SAE's codes, up to rounding."""
    reference = load_file(folder / "reference.safetensors")
    judged = evaluate.load_sae(folder)
    rounding = 1e-6 * float(reference["x"].norm(dim=1).max())
    acts = judged.encode(reference["x"])
    x_hat = judged.decode(reference["acts"], reference["x"])
    near = functools.partial(torch.isclose, rtol=1e-5, atol=rounding)
    # Rounding decides a code at the cut: the threshold is the pre-activation of some token.
    x = sae.normalise(reference["x"])[0] if sae.layernorm else reference["x"]
    pre = sae.pre_activations(x)
    cut = sae.threshold
    if sae.sparsity.architecture == "topk":
        cut = pre.topk(sae.k).values[:, -1:]
    right = near(acts, reference["acts"]) | near(pre, cut)
    same = near(x_hat, reference["x_hat"]).all()
    if not right.all() or not same or not torch.equal(judged.W_dec, sae.W_dec):
        (folder / "cfg.json").unlink()  # this seed is not done
        raise RuntimeError(f"{folder}: the saved SAE is not the trained one")


def environment(cfg, identity):
    """Versions, device, hashes of the sources and identity of the inputs: what numbers depend on."""
    device = prepare.pick_device(cfg.device)
    processor = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        processor = torch.cuda.get_device_name(device)
    packages = ("torch", "transformers", "datasets", "tokenizers", "numpy", "safetensors")
    return {
        "python": platform.python_version(), "platform": platform.platform(),
        "packages": {package: importlib.metadata.version(package) for package in packages},
        "device": processor, "device_type": device, "threads": torch.get_num_threads(),
        "processes": WORLD, "git_commit": git_commit(Path(__file__).parent),
        "experiment_sha256": prepare.sha256(SOURCE),
        "prepare_sha256": PREPARE_SHA256,
        "evaluate_sha256": evaluate.SOURCE_SHA256,
        "inputs": identity,
    }


def git_commit(folder):
    """The commit that is checked out in the folder; None without git."""
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


IGNORED_ON_RESUME = ("out_dir", "resume", "overwrite", "debug", "cache_dir", "checkpoint_minutes",
                     "score")


def check_run_dir(cfg):
    """ValueError for a run directory that holds something and is not to be resumed or replaced."""
    found = cfg.run_dir.exists() and any(path.name != ".lock" for path in cfg.run_dir.iterdir())
    is_run = (cfg.run_dir / "environment.json").exists()
    if cfg.resume and not is_run:
        raise ValueError(f"--resume: {cfg.run_dir} holds no run")
    if found and not is_run:
        raise ValueError(f"{cfg.run_dir} holds something that is not a run: choose another --out_dir")
    if found and not (cfg.resume or cfg.overwrite):
        raise ValueError(f"{cfg.run_dir} already holds a run: choose another --out_dir, or give "
                         "--resume or --overwrite")


def check_same(cfg, identity):
    """ValueError if the run to be resumed was made from other settings, source, model or text."""
    old = prepare.read_json(cfg.run_dir / "config.json")
    made_by = prepare.read_json(cfg.run_dir / "environment.json")
    old |= made_by["inputs"] | {"experiment.py": made_by["experiment_sha256"]}
    new = asdict(cfg) | json.loads(json.dumps(identity))  # tuples become lists, as in the file
    new["experiment.py"] = prepare.sha256(SOURCE)
    differ = [name for name in new if old.get(name) != new[name] and name not in IGNORED_ON_RESUME]
    if differ:
        raise ValueError(f"--resume: {cfg.run_dir} was made with other {', '.join(differ)}; "
                         "--overwrite starts again")


def begin_run(cfg, identity):
    """Clear the run directory and write how the run is made."""
    for path in cfg.run_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
    prepare.write_json(cfg.run_dir / "environment.json", environment(cfg, identity))
    (cfg.run_dir / "experiment.py").write_text(SOURCE, encoding="utf-8")
    settings = asdict(cfg) | {"out_dir": cfg.run_dir.name}  # a record holds no path to itself
    prepare.write_json(cfg.run_dir / "config.json", settings)


@contextlib.contextmanager
def locked(run_dir):
    """Hold the run directory; RuntimeError if another process does. If empty at the end, it goes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(f"another process is at work on {run_dir}") from None
    try:
        yield
    finally:
        lock.release()
        if all(path.name == ".lock" for path in run_dir.iterdir()):
            shutil.rmtree(run_dir)  # nothing came of the run


# ------------------------------------------------------------------------------------------------
# 8. main
# ------------------------------------------------------------------------------------------------


def run(cfg, stop):
    """One complete run: harvest, train every seed, save, score. -> final_info.json, {} unscored."""
    check_run_dir(cfg)
    barrier()  # every process has looked before the first one writes
    with locked(cfg.run_dir) if RANK == 0 else contextlib.nullcontext():
        inputs = load_inputs(cfg)
        if cfg.resume:
            check_same(cfg, inputs.identity)
        harvest = Harvest(cfg, inputs)
        if RANK == 0 and not cfg.resume:
            begin_run(cfg, inputs.identity)
        for seed in range(cfg.seed, cfg.seed + cfg.n_seeds):
            folder = cfg.run_dir / f"seed_{seed}"
            if broadcast((folder / "cfg.json").exists()):  # a resumed run has done this one
                continue
            sae = train(cfg, seed, harvest, stop)
            if RANK == 0:
                sha256 = save_sae(sae, folder, cfg, harvest.calibration_tokens()[:8])
                prove_saved(sae, folder)
                say(f"seed {seed}: weights {sha256[:12]} saved in {folder}")
        harvest.delete_part()
        if RANK > 0:
            return {}
        shutil.rmtree(cfg.run_dir / "checkpoint", ignore_errors=True)
        del harvest  # the judge needs the memory
        return evaluate.evaluate_run(cfg.run_dir) if cfg.score else {}


def parse(argv):
    """Command line -> Config. Bad usage is one sentence and exit code 2."""
    parser = prepare.Parser(description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        names = sorted({f"--{f.name}", f"--{f.name.replace('_', '-')}"}, reverse=True)
        text = f.metadata["help"]
        if choices_of(f):
            text += f" ({', '.join(filter(None, choices_of(f)))})"
        text = f"{text} [{f.default}]".replace("%", "%%")
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(*names, dest=f.name, default=f.default, help=text, **kind)
    args = parser.parse_args(argv)
    for name in ("model", "dataset", "acts", "acts_mask"):
        setattr(args, name, absolute(getattr(args, name)))
    if args.cache_dir:
        args.cache_dir = str(Path(args.cache_dir).expanduser().resolve())  # it may not exist yet
    return Config(**vars(args))


def absolute(name):
    """A path that exists, made absolute, so that the record means the same from any directory."""
    path = Path(name).expanduser()
    is_path = name and name not in prepare.EMBEDDED and path.exists()
    return str(path.absolute()) if is_path else name


def main(argv=None):
    """The command. Returns the exit code: 0, 1 run failed, 2 bad usage, 130/143 stopped."""
    debug = "--debug" in (sys.argv if argv is None else argv)
    with prepare.Stop() as stop:  # takes SIGINT and SIGTERM
        try:
            cfg = parse(argv)
            check(cfg)
            if not cfg.acts:
                prepare.check_model(cfg.model, cfg.layer, cfg.context_size)
            init_distributed(prepare.pick_device(cfg.device))
            say(f"run directory: {cfg.run_dir}")
            info = run(cfg, stop)
            if RANK == 0:
                if info:
                    evaluate.print_scores(info, cfg.run_dir)
                    print(f"next: python page.py {cfg.out_dir}; "
                          f"python plot.py --compare ANOTHER_RUN {cfg.out_dir}")
                else:
                    print(f"next: python evaluate.py {cfg.out_dir}")
            return 0
        except prepare.Interrupted:
            how = ""
            if (cfg.run_dir / "environment.json").exists():
                how = ", --resume in place of --overwrite" if cfg.overwrite else " and --resume"
            say(f"stopped; go on with the same command{how}")
            return stop.exit_code(argv)
        except Exception as error:  # whatever went wrong, the user gets one sentence
            return prepare.report(error, debug)


# ------------------------------------------------------------------------------------------------
# 9. The fast sparse step for CPUs, the default there. Skip this on first reading. It computes what
# section 4 does up to rounding, except where encode_dense's 4k candidates a token are too few.
#
# With 32 of 2304 latents active, only the product that selects them has to be dense. All else is
# done for the active (token, latent) pairs alone.
# ------------------------------------------------------------------------------------------------

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


class Pairs(NamedTuple):
    """The P active (token, latent) pairs of a batch, in token order."""

    token: torch.Tensor  # (P,)
    latent: torch.Tensor  # (P,)
    token_start: torch.Tensor  # (B+1,): token t owns pairs token_start[t]:token_start[t+1]
    by_latent: torch.Tensor  # (P,): the permutation that sorts pairs by latent
    latent_start: torch.Tensor  # (d_sae+1,): as token_start, in that order


def make_pairs(token, latent, n_tokens, d_sae):
    """token (P,) sorted, latent (P,) -> Pairs."""
    sorted_latent, by_latent = latent.int().sort(stable=True)  # int32 sorts twice as fast
    return Pairs(token, latent, starts(token, n_tokens), by_latent,
                 starts(sorted_latent, d_sae))


def starts(keys, n):
    """keys (P,) sorted, values 0..n-1 -> (n+1,): value i stands at starts[i]:starts[i+1]."""
    return torch.searchsorted(keys, torch.arange(n + 1, dtype=keys.dtype))


def encode_sparse(sae, x, ok, n_valid):
    """As encode_dense, -> SparseCodes. With a bfloat16 product the choice may differ near a tie."""
    with torch.no_grad():
        centred = x - sae.b_dec
        pairs, pre = select_pairs(sae, x, centred, ok, sae.k * n_valid)
    # pre is computed; this gives it its gradient
    pre = SparseEncode.apply(centred, sae.W_enc, sae.b_enc, sae.b_dec, pre, pairs)
    return SparseCodes(sae.activate(pre) * ok[pairs.token], pairs)


def select_pairs(sae, x, centred, ok, keep):
    """The pairs of a batch that are active, and their pre-activations (P,) in float32.

    The dense product, which may be in bfloat16, only says which pairs are near the top.
    """
    n_tokens, d_sae = len(x), sae.W_dec.shape[0]
    dense = sae.pre_activations(x)
    if not sae.sparsity.has_threshold:  # topk
        token = torch.arange(n_tokens).repeat_interleave(sae.k)
        latent = dense.topk(sae.k, dim=-1, sorted=False).indices.sort(dim=-1).values.flatten()
    else:
        # Take the pairs above a share of the last step's threshold, of a smaller share if they are
        # too few, at last all positive ones: a tenth of the time of a top-k of the batch.
        dense.masked_fill_(~ok[:, None], -torch.inf)
        for slack in (0.9, 0.6, 0.0):
            flat = (dense.view(-1) > slack * float(sae.threshold)).nonzero()[:, 0]
            if len(flat) >= keep:
                break
        token = flat // d_sae
        latent = flat - token * d_sae
    W_enc = sae.W_enc.t()
    pre = pair_products(centred, W_enc, token, latent, starts(token, n_tokens))
    pre = pre + sae.b_enc[latent]
    if sae.sparsity.has_threshold and len(pre):
        threshold = pre.topk(min(keep, len(pre)), sorted=False).values.min().clamp(min=0)
        sae.threshold.copy_(threshold)
        kept = (pre >= threshold).nonzero()[:, 0]
        token, latent, pre = token[kept], latent[kept], pre[kept]
    return make_pairs(token, latent, n_tokens, d_sae), pre


class SparseEncode(torch.autograd.Function):
    """pre (P,) = (x - b_dec)[token] . W_enc[:, latent] + b_enc[latent], and its gradient."""

    @staticmethod
    def forward(ctx, centred, W_enc, b_enc, b_dec, pre, pairs):
        ctx.save_for_backward(centred, W_enc)
        ctx.pairs = pairs
        return pre.clone()  # was computed when the pairs were selected

    @staticmethod
    def backward(ctx, grad):
        centred, W_enc = ctx.saved_tensors
        latent = ctx.pairs.latent
        grad_b_enc = grad.new_zeros(W_enc.shape[1]).index_add_(0, latent, grad)
        grad_W_enc = sum_by_latent(grad, centred, ctx.pairs).t()
        return None, grad_W_enc, grad_b_enc, -(W_enc @ grad_b_enc), None, None


class SparseCodes:
    """Codes of a batch as acts (P,) at their pairs; the same interface as DenseCodes."""

    def __init__(self, acts, pairs):
        self.acts, self.pairs = acts, pairs
        self.shape = (len(pairs.token_start) - 1, len(pairs.latent_start) - 1)

    def decode(self, W_dec):
        return SparseDecode.apply(self.acts, W_dec, self.pairs)

    def first(self, n_latents, n_tokens=None):
        n_tokens = self.shape[0] if n_tokens is None else n_tokens
        end = self.pairs.token_start[n_tokens]  # pairs are in token order
        keep = (self.pairs.latent[:end] < n_latents).nonzero()[:, 0]
        where = (self.pairs.token[keep], self.pairs.latent[keep])
        return self.acts.new_zeros(n_tokens, n_latents).index_put(where, self.acts[keep])

    def fired(self):
        return torch.zeros(self.shape[1]).index_fill_(0, self.pairs.latent[self.acts > 0], 1.0)

    def l0(self):
        return (self.acts != 0).sum()

    def l1(self):
        return self.acts.sum()


class SparseDecode(torch.autograd.Function):
    """x_hat (B, d_in) = for each token the sum over its pairs of acts * W_dec[latent]."""

    @staticmethod
    def forward(ctx, acts, W_dec, pairs):
        ctx.save_for_backward(acts, W_dec)
        ctx.pairs = pairs
        return F.embedding_bag(pairs.latent, W_dec, pairs.token_start[:-1], mode="sum",
                               per_sample_weights=acts)

    @staticmethod
    def backward(ctx, grad):
        acts, W_dec = ctx.saved_tensors
        pairs = ctx.pairs
        grad = grad.contiguous()
        grad_acts = pair_products(grad, W_dec, pairs.token, pairs.latent, pairs.token_start)
        return grad_acts, sum_by_latent(acts, grad, pairs), None


def pair_products(rows, columns, token, latent, token_start):
    """rows (B, d), columns (d_sae, d) -> (P,) inner products of the pairs only."""
    if torch.backends.mkl.is_available():  # sampled_addmm needs MKL; it computes only these entries
        zeros = torch.zeros(len(latent))
        size = (len(rows), len(columns))
        where = torch.sparse_csr_tensor(token_start, latent, zeros, size, check_invariants=False)
        return torch.sparse.sampled_addmm(where, rows, columns.t(), beta=0.0).values()
    parts = zip(token.split(8192), latent.split(8192))
    return torch.cat([(rows[t] * columns[i]).sum(1) for t, i in parts])


def sum_by_latent(values, rows, pairs):
    """values (P,), rows (B, d) -> (d_sae, d): for each latent the sum of values * rows[token]."""
    token, weight = pairs.token[pairs.by_latent], values[pairs.by_latent]
    return F.embedding_bag(token, rows, pairs.latent_start[:-1], mode="sum",
                           per_sample_weights=weight)


if __name__ == "__main__":
    sys.exit(main())
