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
them, core.json, consistency.json, latents.json and final_info.json (the headline numbers). With
several seeds core.json and consistency.json lie in seed_K/.
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
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
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
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# ------------------------------------------------------------------------------------------------
# 1. Config: every field is a flag (--temp_alpha and --temp-alpha are the same; bools have --no-x)
# ------------------------------------------------------------------------------------------------

# Each --sparsity and what SAELens calls it. At inference batchtopk is a fixed threshold, so it is
# saved as jumprelu. Another sparsity: a name here, a branch of encode_dense (training) and of
# SAE.encode (inference); a penalty goes into Trainer.step, a learned tensor into SAE.__init__, a
# setting into Config and save_sae, a limit on k or the nonlinearity into check; a threshold is fitted
# in train, scaled in fold_scale and saved in save_sae. evaluate.SAE must know what it is called.
ARCHITECTURES = {"batchtopk": "jumprelu", "topk": "topk", "l1": "standard"}


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
    encoding: str = flag("utf-8", "of local text files")
    acts: str = flag("", "your own activations (N,T,d_in), .npy or .safetensors, instead of an LM")
    acts_mask: str = flag("", ".npy (N,T) for --acts: the number of each token's document, 0 to "
                          "leave it out")
    context_size: int = flag(128, "tokens a row, BOS included", least=2)
    harvest_tokens: int = flag(524_288, "distinct training tokens", least=1)
    eval_rows: int = flag(464, "held-out rows, of documents that are never trained on", least=1)
    reconstruction_rows: int = flag(64, "how many of these are kept for CE and KL only; 0: neither "
                                    "is measured", least=0)
    cache_gb: float = flag(20.0, "most disk for activations; a larger harvest is trained on in "
                           "parts, each harvested, passed over once and deleted", above=0)
    cache_dir: str = flag("", "for tokens, activations and embedded models; if empty, "
                          "$TEMPORAL_SAE_CACHE or ~/.cache/temporal-sae")
    # -- sparse autoencoder
    d_sae: int = flag(2304, "latents", least=1)
    sparsity: str = flag("batchtopk", "what keeps codes sparse", tuple(ARCHITECTURES))
    k: int = flag(32, "active latents a token (topk), or on average (batchtopk)", least=1)
    l1_alpha: float = flag(0.01, "weight of the L1 term with --sparsity l1", least=0)
    nonlinearity: str = flag("relu", "of the encoder", ("relu", "gelu"))
    layernorm: bool = flag(False, "LayerNorm each input, undone at the output")
    init: str = flag("tied", "tied: W_enc = W_dec^T, b_dec = data mean; xavier: independent",
                     ("tied", "xavier"))
    # -- temporal consistency
    temp_loss: str = flag("window_infonce", "the temporal loss; see section 3")
    temp_alpha: float = flag(0.009, "weight of the temporal loss; 0 is the baseline", least=0)
    window: int = flag(16, "the window mean is over tokens less than so many apart; other losses "
                       "compare such tokens (infonce and infonce_dot: neighbours); 1: no temporal loss",
                       least=1)
    temporal_fraction: float = flag(0.02, "share of the dictionary (its leading latents) that the "
                                    "temporal loss and the Matryoshka term bind", above=0)
    temperature: float = flag(0.1, "divides the similarities in every InfoNCE; T-SAE's is 1, for "
                              "infonce_dot of inner products in raw units", above=0)
    matryoshka_alpha: float = flag(0.0, "weight of a reconstruction by the leading latents alone "
                                   "(Bussmann et al. 2025); 0 is off", least=0)
    control: str = flag("none", "window_infonce, window_mean: take the target from another chunk, or "
                        "shuffle the tokens of each document first",
                        ("none", "other_docs", "permuted"))
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
        return RUNS / self.out_dir if bare else Path(self.out_dir).expanduser()

    @property
    def n_lead(self):
        """Number of leading latents, the ones that the temporal loss binds."""
        return max(1, round(self.temporal_fraction * self.d_sae))

    @property
    def temporal(self):
        """Whether there is a temporal loss. Without one its settings change nothing, except that
        temporal_fraction is the lead of the Matryoshka term, too."""
        return self.temp_alpha > 0 and self.window > 1


def check(cfg):
    """Raise ValueError, one clear sentence, for a setting that cannot work. Loads no model."""
    for f in fields(cfg):
        check_value(f.name, getattr(cfg, f.name), **f.metadata)
    n_chunks = cfg.batch_size // cfg.chunk_size
    other_documents = ""  # the flag, if any, that needs several documents in a batch
    if cfg.temp_loss == "window_infonce":
        other_documents = "--temp_loss window_infonce"
    elif cfg.control == "other_docs":
        other_documents = "--control other_docs"
    refuse = [  # (whether it is wrong, what is wrong); runs/study belongs to train.py
        (cfg.temp_loss not in TEMP_LOSSES,
         f"--temp_loss {cfg.temp_loss} is not one of {', '.join(TEMP_LOSSES)}"),
        (Path(cfg.out_dir).name in ("", "..") or cfg.run_dir.is_file()
         or cfg.run_dir.resolve() == RUNS / "study",
         f"--out_dir {cfg.out_dir} does not name a directory of its own"),
        (cfg.seed + cfg.n_seeds > 2**63,
         f"--seed {cfg.seed} is too large: it must fit 63 bits"),
        (cfg.temporal_fraction > 1,
         f"--temporal_fraction {cfg.temporal_fraction} is above 1"),
        (cfg.temporal and cfg.window > cfg.chunk_size,
         f"--window {cfg.window} is larger than --chunk_size {cfg.chunk_size}"),
        (not cfg.acts and cfg.context_size % cfg.chunk_size > 0,
         f"--chunk_size {cfg.chunk_size} does not divide --context_size {cfg.context_size}"),
        (cfg.batch_size % cfg.chunk_size > 0,
         f"--chunk_size {cfg.chunk_size} does not divide --batch_size {cfg.batch_size}"),
        (n_chunks % WORLD > 0,
         f"--batch_size: {n_chunks} chunks cannot be shared evenly by {WORLD} processes"),
        (cfg.temporal and other_documents and n_chunks // WORLD < 2,
         f"--batch_size {cfg.batch_size} is too small for {other_documents}: each process needs "
         f"2 chunks of {cfg.chunk_size} tokens, to have other documents"),
        (cfg.k > cfg.d_sae and cfg.sparsity != "l1",
         f"--k {cfg.k} is larger than --d_sae {cfg.d_sae}"),
        (cfg.sparsity == "l1" and cfg.nonlinearity != "relu",
         "--sparsity l1 needs --nonlinearity relu: codes of gelu are hardly ever zero"),
        (cfg.control != "none" and cfg.temp_loss not in WINDOW_LOSSES,
         f"--control {cfg.control} needs --temp_loss {' or '.join(WINDOW_LOSSES)}"),
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


def check_value(name, value, help, choices, least, above):
    """Raise ValueError for a value that its field does not allow."""
    if choices and value not in choices:
        raise ValueError(f"--{name} {value} is not one of {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{name} must be a finite number, not {value}")
    if least is not None and value < least:
        raise ValueError(f"--{name} must be at least {least}, not {value}")
    if above is not None and value <= above:
        raise ValueError(f"--{name} must be above {above}, not {value}")


# ------------------------------------------------------------------------------------------------
# 2. SAE
# ------------------------------------------------------------------------------------------------


class SAE(torch.nn.Module):
    """A sparse autoencoder that encodes one token at a time.

        acts  = keep(relu((x - b_dec) @ W_enc + b_enc))
        x_hat = acts @ W_dec + b_dec

    W_enc (d_in, d_sae), W_dec (d_sae, d_in) with rows of unit norm, b_enc (d_sae,), b_dec (d_in,).
    With batchtopk the k*B largest codes of a batch of B tokens are kept in training; at inference
    a code is kept if its pre-activation is above `threshold` (Bussmann et al. 2024).
    Training sees scale * x, whose mean square is 1 a dimension (Stats); at the end `fold_scale`
    moves the scale into the biases and the threshold, so that the SAE takes raw x.
    """

    def __init__(self, cfg, d_in):
        super().__init__()
        self.k, self.sparsity = cfg.k, cfg.sparsity
        self.nonlinearity, self.layernorm = cfg.nonlinearity, cfg.layernorm
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

    def pre_activations(self, x, latents=None):
        """x (B, d_in) -> (B, d_sae), or only the columns `latents`."""
        W, bias = self.W_enc.t(), self.b_enc
        if latents is not None:
            W, bias = W[latents], bias[latents]
        return pre_activations(x, W.t(), bias, self.b_dec)

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
        acts = self.activate(pre)
        if self.sparsity == "topk":
            return keep_top(acts, pre, self.k)
        if self.sparsity == "batchtopk":
            return acts * (pre > self.threshold)
        if self.sparsity == "l1":
            return acts
        raise ValueError(f"SAE.encode has no branch for --sparsity {self.sparsity}")

    def decode(self, acts, x):
        """acts (..., d_sae) and the x (..., d_in) that they come from -> x_hat (..., d_in)."""
        if self.layernorm:
            x, mean, std = self.normalise(x)
        x_hat = acts @ self.W_dec + self.b_dec
        return x_hat * std + mean if self.layernorm else x_hat

    @torch.no_grad()
    def fold_scale(self, scale):
        """Turn an SAE of scale * x into one of x. relu(s*z) = s*relu(z), so codes get raw units."""
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)
        self.threshold.div_(scale)
        self.scale.fill_(scale)


def pre_activations(x, W_enc, b_enc, b_dec):
    """(x - b_dec) @ W_enc + b_enc: x (..., d_in), W_enc (d_in, F), b_enc (F,) -> (..., F)."""
    # b_dec gets its gradient through the bias, to which it adds 0: through x - b_dec it would cost
    # one more dense product.
    fixed = b_dec.detach()
    zero = fixed - b_dec
    return F.linear(x - fixed, W_enc.t(), b_enc + zero @ W_enc.detach())


def keep_top(acts, pre, k):
    """acts (..., d_sae) with all but those of the k largest `pre` of each token set to zero."""
    top = pre.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(acts).scatter(-1, top, acts.gather(-1, top))


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


def window_mean(x, doc, window, place=None, at=slice(None)):
    """The mean of the other tokens of the same document that are less than `window` away.

    x (N, T, d), doc (N, T); `at`: which T' of the T tokens get a mean; place (N, T): where each
    token stands, if not in the order of x. -> means (N, T', d), and (N, T') bool: are there enough
    tokens for one?

    >>> x = torch.tensor([[[1.], [2.], [6.], [9.]]])
    >>> window_mean(x, torch.tensor([[5, 5, 5, 7]]), 2)[0].flatten()  # 2; (1+6)/2; 2; none
    tensor([2.0000, 3.5000, 2.0000, 0.0000])
    """
    if place is None:
        place = torch.arange(doc.shape[1], device=doc.device).expand(doc.shape)
    away = (place[:, at, None] - place[:, None, :]).abs()
    same = (doc[:, at, None] == doc[:, None, :]) & (doc[:, at, None] > 0)
    others = same & (away > 0) & (away < window)  # the token itself is not part of its own target
    count = others.sum(2)
    means = others.to(x.dtype) @ x
    means /= count.clamp(min=1)[..., None]
    return means, count >= min(MIN_OTHERS, window - 1)


def window_mean_target(x, doc, cfg, step, at=slice(None)):
    """The targets of the leading latents at T' of the T tokens (N, T', d), which of these tokens
    have one, and of which document it is (N, T'); see window_mean.

    Two controls keep the loss and change the target. `other_docs` takes it from another chunk.
    `permuted` shuffles each stretch of one document within the chunk before it takes window means,
    so that the target is the mean of random others of the same document.
    """
    place = shuffle_within_documents(doc, step) if cfg.control == "permuted" else None
    target, enough = window_mean(x, doc, cfg.window, place, at)
    owner = doc[:, at]
    if cfg.control == "other_docs":
        return target.roll(1, 0), enough & enough.roll(1, 0), owner.roll(1, 0)
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


def window_mean_loss(guess, target, enough, b_dec):
    """Sum of |target - guess|^2, divided by the same sum for the guess b_dec.

    >>> one = torch.ones(1, 1, 2)
    >>> window_mean_loss(one, 2 * one, torch.ones(1, 1, dtype=torch.bool), torch.zeros(2))  # 2 / 8
    tensor(0.2500)
    """
    error = F.mse_loss(guess, target, reduction="none").sum(-1)
    spread = (target - b_dec.detach()).square().sum(-1)
    return (error * enough).sum() / (spread * enough).sum().clamp(min=1e-8)


def window_infonce_loss(z, W_lead, target, enough, owner, doc, temperature):
    """InfoNCE: what a token's leading latents decode to must pick out its target among those of
    other documents.

    z (N, T, F) leading codes, W_lead (F, d) their decoder rows; target (N, T, d) less b_dec, for
    activations with a mean square of 1 a dimension; enough (N, T): which tokens have a target;
    owner (N, T): of which document it is; doc (N, T). The guess z @ W_lead is compared by cosines
    with the targets at the same place of all chunks; those of other documents are the negatives.
    Contrastive predictive coding (van den Oord et al. 2018), except that the targets are not
    learned, so they cannot collapse.

    >>> z = target = torch.eye(2).view(2, 1, 2)
    >>> yes = torch.ones(2, 1, dtype=torch.bool)
    >>> doc = torch.tensor([[1], [2]])
    >>> window_infonce_loss(z, torch.eye(2), target, yes, doc, doc, 1.0)  # log(1 + 1/e)
    tensor(0.3133)
    """
    n_chunks, _, d = target.shape
    # A vector shorter than a tenth of an activation's norm is divided by that length, not by its
    # own: near zero the gradient of a cosine has no bound.
    shortest = 0.1 * d**0.5
    # For a small lead the vector z @ W_lead is never computed; its inner products and its length
    # follow from F numbers a token, which is less work than d.
    with torch.autocast(z.device.type, enabled=False):  # bfloat16 is too coarse for logits
        along = target @ W_lead.t() / target.norm(dim=2, keepdim=True).clamp(min=shortest)
        if len(W_lead) < d:
            square = ((z @ (W_lead @ W_lead.t())) * z).sum(2)
        else:
            square = (z @ W_lead).square().sum(2)
        norm = square.clamp(min=shortest**2).sqrt()
        dot = z.transpose(0, 1) @ along.permute(1, 2, 0)  # (T, N of leads, N of targets)
    logits = dot / (temperature * norm.t()[..., None])
    enough, owner, doc = enough.t(), owner.t(), doc.t()
    # Not used as negatives: targets that do not exist, and those of the token's document and of its
    # target's (another one with the control other_docs).
    left_out = ~enough[:, None, :] | (owner[:, None, :] == doc[:, :, None])
    left_out |= owner[:, None, :] == owner[:, :, None]
    left_out.diagonal(dim1=1, dim2=2).fill_(False)  # the right answer stays
    logits = logits.masked_fill(left_out, -torch.inf).flatten(0, 1)  # (T * N, N)
    label = torch.arange(n_chunks, device=target.device).where(enough, -100)  # -100: no target
    loss = F.cross_entropy(logits, label.flatten(), ignore_index=-100, reduction="sum")
    return loss / enough.sum().clamp(min=1)


class PairMoments(NamedTuple):
    """Means over all pairs (a, b) of tokens less than `window` apart, for each latent, all (F,)."""

    difference: torch.Tensor  # E (a - b)^2
    power: torch.Tensor  # E (a^2 + b^2)
    total: torch.Tensor  # E (a + b)

    @property
    def spread(self):
        """2 Var z. The correlation rho of the two codes of a pair is 1 - difference / spread."""
        return self.power - self.total.square() / 2


def pair_moments(codes, doc, window):
    """codes (N, T, F), doc (N, T) -> PairMoments."""
    sums = codes.new_zeros(3, codes.shape[-1])
    n_pairs = codes.new_zeros(())
    for lag in range(1, window):
        ok = same_document(doc, lag)[..., None]
        a = codes[:, :-lag] * ok
        b = codes[:, lag:] * ok
        terms = [(a - b).square(), a.square() + b.square(), a + b]
        sums = sums + torch.stack([term.sum((0, 1)) for term in terms])
        n_pairs = n_pairs + ok.sum()
    return PairMoments(*(sums / n_pairs.clamp(min=1)))


def sqdiff_loss(codes, doc, window):
    """Mean of |z_t - z_s|^2 over pairs. The plainest form; shrinking the codes lowers it.

    >>> sqdiff_loss(torch.tensor([[[1.], [3.]]]), torch.ones(1, 2), 2)
    tensor(4.)
    """
    return pair_moments(codes, doc, window).difference.sum()


def variance_loss(codes, doc, window):
    """sum_i E[variance of z_i among tokens of a window] / sum_i E[z_i^2]: blind to scale.

    The variance of w values is (w - 1) / w times half the mean squared difference of their pairs;
    here each pair of tokens less than `window` apart counts once.

    >>> variance_loss(torch.tensor([[[1.], [3.]]]), torch.ones(1, 2), 2)  # 1 / 5
    tensor(0.2000)
    """
    m = pair_moments(codes, doc, window)
    # power is 2 E z^2, so its 2 cancels the half
    return (window - 1) / window * m.difference.sum() / m.power.sum().clamp(min=1e-8)


def autocorr_loss(codes, doc, window):
    """sum_i v_i (1 - rho_i), v_i the latent's share of the variance of all codes.

    The gradient treats the variance as a constant; otherwise growing it alone would lower the loss.

    >>> autocorr_loss(torch.tensor([[[1.], [3.]]]), torch.ones(1, 2), 2)  # 4 / 2 / variance 1
    tensor(2.)
    """
    m = pair_moments(codes, doc, window)
    # v_i is spread_i / total spread and 1 - rho_i is difference_i / spread_i: spread_i cancels
    return m.difference.sum() / m.spread.detach().sum().clamp(min=1e-8)


def selective_loss(codes, doc, window):
    """Mean over latents of rho_i (1 - rho_i), the first rho_i clipped to [0, 1] and constant to the
    gradient. It binds the latents that prove slow and leaves the others alone.

    >>> codes = torch.tensor([[[0.], [0.], [2.], [2.]]])
    >>> selective_loss(codes, torch.ones(1, 4), 2)  # rho 1 - (4/3) / 2 = 1/3: 1/3 * 2/3
    tensor(0.2222)
    """
    m = pair_moments(codes, doc, window)
    flicker = m.difference / m.spread.clamp(min=1e-8)  # 1 - rho
    weight = (1 - flicker.detach()).clamp(0, 1)
    return (weight * flicker).mean()


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
PAIR_LOSSES = {"sqdiff": sqdiff_loss, "variance": variance_loss, "autocorr": autocorr_loss,
               "selective": selective_loss}
WINDOW_LOSSES = ("window_infonce", "window_mean")  # on the window's mean; the others compare codes
TEMP_LOSSES = (*WINDOW_LOSSES, "infonce", "infonce_dot", *PAIR_LOSSES)


# ------------------------------------------------------------------------------------------------
# 4. The training step
# ------------------------------------------------------------------------------------------------

DEAD_EVERY = 20  # steps between looks at which latents are dead: a look waits for the GPU
# These terms see a quarter of the batch, a fair sample at a part of the cost. Neighbours have nearly
# the same window mean, so WINDOW_LOSSES take every fourth token of all chunks. Pairs need neighbours,
# so PAIR_LOSSES take the first quarter of the chunks, which are shuffled; so does AuxK.
WINDOW_STRIDE = 4
PAIR_SHARE = 4
AUXK_SHARE = 4
NEAR = 0.75  # window_infonce reads leading latents above this share of batchtopk's threshold


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

    def dense(self, n_latents=None, n_tokens=None):
        """The codes of the first n_latents latents at the first n_tokens tokens, as a matrix."""
        return self.acts[:n_tokens, :n_latents]

    def leading(self, n_latents):
        """The codes of the first n_latents latents, as an object that has `decode`."""
        return DenseCodes(self.acts[:, :n_latents])

    def fired(self):
        """(n_latents,) 1 for each latent that is active at some token, else 0."""
        return (self.acts.amax(0) > 0).float()

    def l0(self):
        """Number of active codes in the batch; it has no gradient."""
        return (self.acts != 0).sum()

    def l1(self):
        """Sum of all codes in the batch."""
        return self.acts.sum(dtype=torch.float32)


class Lead(NamedTuple):
    """The parameters of the leading latents as leaves of their own.

    Autograd would fill the gradient of a slice up with zeros, which costs 4 % of a step.
    """

    W_enc: torch.Tensor  # (d_in, n_lead)
    b_enc: torch.Tensor  # (n_lead,)
    W_dec: torch.Tensor  # (n_lead, d_in)

    @classmethod
    def of(cls, sae, n_lead):
        parts = sae.W_enc[:, :n_lead], sae.b_enc[:n_lead], sae.W_dec[:n_lead]
        return cls(*[part.detach().requires_grad_() for part in parts])

    def add_gradients(self, sae):
        """Add the gradients of the leaves to those of the SAE."""
        n_lead = len(self.b_enc)
        grads = sae.W_enc.grad[:, :n_lead], sae.b_enc.grad[:n_lead], sae.W_dec.grad[:n_lead]
        for part, grad in zip(self, grads):
            if part.grad is not None:
                grad += part.grad


def encode_dense(sae, x, ok, n_valid):
    """x (B, d_in) -> DenseCodes. Never waits for the device.

    ok (B,) bool: which tokens are ordinary; n_valid: how many are.
    """
    pre = sae.pre_activations(x)
    if sae.sparsity == "l1":
        return DenseCodes(sae.activate(pre) * ok[:, None])
    if sae.sparsity == "topk":
        return DenseCodes(keep_top(sae.activate(pre), pre, sae.k) * ok[:, None])
    if sae.sparsity != "batchtopk":
        raise ValueError(f"encode_dense has no branch for --sparsity {sae.sparsity}")
    # A token hardly ever takes more than 4k codes, so the k*B largest of the batch are among the
    # 4k largest of each row. That spares a sort of the whole batch.
    with torch.no_grad():
        rows = pre.topk(min(4 * sae.k, pre.shape[1]), dim=-1, sorted=False).values
        rows = rows.masked_fill(~ok[:, None], -torch.inf)
        keep = min(max(1, sae.k * n_valid), rows.numel())
        threshold = rows.flatten().topk(keep, sorted=False).values.min().clamp(min=0)
        sae.threshold.copy_(threshold)  # for temporal_loss, and fit_threshold in section 6
        least = torch.where(ok, threshold, torch.inf)  # a token that is left out gets no codes
    return DenseCodes(sae.activate(pre) * (pre >= least[:, None]))


class Trainer:
    """What a run carries from step to step, and one step of it."""

    def __init__(self, cfg, d_in, stats, seed, device):
        self.cfg, self.stats, self.device = cfg, stats, torch.device(device)
        self.sae = SAE(cfg, d_in)
        self.sae.initialise(cfg.init, stats.mean, seed)
        self.sae.to(device)
        # For window_mean. The gain lets a leading latent predict the window's mean, which is smaller
        # than a token's own activation, without shrinking its code. It starts at 0.5, temporal_loss
        # clamps it to [0, 2], and it is used in training only.
        self.gain = torch.nn.Parameter(torch.full((cfg.n_lead,), 0.5, device=device))
        self.parameters = [*self.sae.parameters(), self.gain]
        self.optimizer = torch.optim.Adam(self.parameters, lr=cfg.lr, fused=True)
        self.silent_tokens = torch.zeros(cfg.d_sae, device=device)  # since a latent last fired
        self.dead = torch.zeros(0, dtype=torch.long, device=device)  # indices of dead latents
        self.matmul_dtype = prepare.pick_dtype(cfg.matmul_dtype, str(device))
        # On a CPU section 9: the same codes up to rounding, faster.
        sparse = self.device.type == "cpu" and cfg.sparsity in ("topk", "batchtopk")
        self.encode_batch = encode_sparse if sparse else encode_dense

    def step(self, x, doc, n_valid, step, log=False):
        """One optimiser step: forward, losses, backward, update.

        x (B, d_in) scaled activations, doc (N, T) the document of each of the B = N*T tokens,
        n_valid: how many of them are ordinary (doc > 0), given because counting on a GPU would
        make the host wait. Returns the terms as 0-dim tensors.
        If a loss or gradient is not finite, raises FloatingPointError before the update. On a GPU
        an unlogged step does not wait to find out and does not raise: fused Adam skips the update.
        """
        cfg, sae = self.cfg, self.sae
        ok = doc.flatten() > 0
        n_valid = max(n_valid, 1)
        if cfg.layernorm:
            x = sae.normalise(x)[0]

        lead = Lead.of(sae, cfg.n_lead)
        bfloat16 = self.matmul_dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            codes = self.encode_batch(sae, x, ok, n_valid)
            x_hat = codes.decode(sae.W_dec) + sae.b_dec
            error = F.mse_loss(x_hat, x, reduction="none").sum(1) * ok
            # As shares of the variance, weights mean the same for any model and layer.
            terms = {"recon": error.sum() / n_valid / self.stats.variance}
            loss = terms["recon"]
            if cfg.temporal:
                terms["temporal"] = self.temporal_loss(codes, lead, x, doc, step)
                if terms["temporal"].ndim:
                    raise ValueError(f"--temp_loss {cfg.temp_loss} gives a tensor of shape "
                                     f"{tuple(terms['temporal'].shape)}, not one number")
                loss = loss + cfg.temp_alpha * terms["temporal"]
            if cfg.matryoshka_alpha:
                leading = codes.leading(cfg.n_lead).decode(lead.W_dec) + sae.b_dec
                error = F.mse_loss(leading, x, reduction="none").sum(1) * ok
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
            lead.add_gradients(sae)
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

    def temporal_loss(self, codes, lead, x, doc, step):
        """The temporal loss of the leading latents, whose parameters are `lead`; see section 3."""
        cfg, sae = self.cfg, self.sae
        if cfg.temp_loss in WINDOW_LOSSES:
            stride = min(WINDOW_STRIDE, doc.shape[1])
            at = slice(step % stride, None, stride)
            x = x.view(*doc.shape, -1)
            with torch.autocast(self.device.type, enabled=False):  # the target is in float32
                target, enough, owner = window_mean_target(x, doc, cfg, step, at)
            if cfg.temp_loss == "window_mean":
                z = codes.dense(cfg.n_lead).view(*doc.shape, -1)[:, at]
                guess = z @ (self.gain.clamp(0, 2)[:, None] * lead.W_dec) + sae.b_dec
                return window_mean_loss(guess, target, enough, sae.b_dec)
            # What is cut off has no gradient. The cut is lower than that of the codes, so that a
            # latent just below the threshold can learn. Without a threshold (topk, l1) all positive
            # ones count.
            pre = pre_activations(x[:, at], lead.W_enc, lead.b_enc, sae.b_dec)
            z = (sae.activate(pre) * (pre > NEAR * sae.threshold)).float()
            target = target - sae.b_dec.detach()
            return window_infonce_loss(z, lead.W_dec, target, enough, owner, doc[:, at],
                                       cfg.temperature)
        if cfg.temp_loss in PAIR_LOSSES:
            doc = doc[: max(1, len(doc) // PAIR_SHARE)]
            z = codes.dense(cfg.n_lead, doc.numel()).float()
            return PAIR_LOSSES[cfg.temp_loss](z.view(*doc.shape, -1), doc, cfg.window)
        if cfg.temp_loss not in ("infonce", "infonce_dot"):
            raise ValueError(f"Trainer.temporal_loss has no branch for --temp_loss {cfg.temp_loss}")
        # Codes in raw units, so that weight and temperature mean what they do in the paper. The
        # reconstruction error is a share of the variance, so this is divided by the raw variance.
        # All chunks: infonce_loss itself takes every fourth pair.
        z = codes.dense(cfg.n_lead).float() / self.stats.scale
        raw_variance = self.stats.variance / self.stats.scale**2
        cosine = cfg.temp_loss == "infonce"
        z = z.view(*doc.shape, -1)
        return infonce_loss(z, doc, cfg.temperature, cosine) / raw_variance

    def auxk_loss(self, x, x_hat, ok):
        """AuxK (Gao et al. 2024): the best dead latents explain what is left over.

        On the first quarter of the batch: on all of it the dense product would cost more than the
        rest of the step. At most d_in / 2 latents a token, as in the paper.
        """
        sae, dead, n = self.sae, self.dead, len(x) // AUXK_SHARE
        acts = torch.relu(sae.pre_activations(x[:n], dead))
        acts = keep_top(acts, acts, min(x.shape[1] // 2, len(dead)))
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
        # Fused Adam divides by grad_scale and leaves a step out where found_inf is set, without
        # a pass over the gradients or a wait for the device.
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
                "gain": self.gain.data, "silent_tokens": self.silent_tokens, "dead": self.dead}

    def load(self, state):
        """Restore what `state` returned."""
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.gain.data.copy_(state["gain"])
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
# 5. Harvest: the language model's activations, by hooks, in files on disk
# ------------------------------------------------------------------------------------------------

SHARD_ROWS = 64  # rows a file: 9 MB at 128 tokens of 576 bfloat16 numbers
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
        lm(torch.as_tensor(tokens, dtype=torch.long, device=lm.device), use_cache=False)
    except StopForward:
        pass
    finally:
        handle.remove()
    if kept[0].shape[:2] != tokens.shape or kept[0].ndim != 3:
        raise ValueError(f"block {layer} of {type(lm).__name__} gives {tuple(kept[0].shape)}, "
                         f"not (rows, tokens, width): this model is not supported")
    return kept[0]


class Activations(NamedTuple):
    """Rows of activations, memory-mapped from files or resident on the device."""

    files: list  # tensors (rows_a_file, T, d_in) in the model's dtype; the last may be shorter
    doc: np.ndarray  # (N, T) int32, a number for the document of each token; 0 is left out
    order: np.ndarray  # (N,) row n's place in the files; with --acts these hold other rows, too
    rows_a_file: int

    def chunks(self, ids, chunk_size):
        """Chunks of neighbouring tokens, numbered through all rows: ids (S,) -> (S, C, d_in)."""
        per_row = self.doc.shape[1] // chunk_size
        row, place = self.order[ids // per_row], ids % per_row
        if len(self.files) == 1:  # --acts, all on a GPU, or a small harvest: one gather
            whole = self.files[0].unflatten(1, (per_row, chunk_size)).flatten(0, 1)
            index = torch.from_numpy(row * per_row + place)
            return whole[to_device(index, whole.device)]
        found = []
        for r, at in zip(row, place * chunk_size):
            rows = self.files[r // self.rows_a_file]
            found.append(rows[r % self.rows_a_file, at : at + chunk_size])
        return torch.stack(found)


class Harvest:
    """The training activations of a run: calibration rows, and batches of training rows.

    What a step sees is a function of (seed, step) alone: resuming needs no cursor, and runs with
    the same seed are paired. Own activations (--acts) are one part. A harvest that is larger than
    cache_gb comes in parts; only one part is on disk at a time.
    """

    def __init__(self, cfg):
        self.cfg, self.device = cfg, torch.device(prepare.pick_device(cfg.device))
        self.part_number, self.part = None, None  # the part that is loaded
        self.forward_rows = FORWARD_ROWS.get(self.device.type, FORWARD_ROWS["cpu"])
        self.prefetch = self.device.type == "cuda"  # a CPU has no time to spare during a step
        self.sink_limit = None  # norm of a sink; mask_sinks sets it by the calibration rows
        if cfg.acts:
            self.own = prepare.load_acts(cfg.acts, cfg.acts_mask, cfg.eval_rows)
            self.identity = self.own.identity
            self.n_rows, self.n_parts = len(self.own.train), 1
            self.calibration = self.own_rows(self.own.calibration)
        else:
            self.own = None
            # .train and .calibration are data sets of rows {"tokens": (T,), "doc": (T,)}; the
            # eval_rows held-out rows are read by evaluate.py only.
            self.inputs = prepare.text_rows(
                cfg.dataset, cfg.model, context_size=cfg.context_size, eval_rows=cfg.eval_rows,
                harvest_tokens=cfg.harvest_tokens, **text_options(cfg))
            self.dtype = prepare.pick_dtype(cfg.dtype, str(self.device))
            self.identity = self.inputs.identity
            d_in = prepare.model_shape(cfg.model, cfg.cache_dir)[0]
            row_bytes = cfg.context_size * d_in * self.dtype.itemsize
            self.n_rows = len(self.inputs.train)
            self.n_parts = math.ceil(self.n_rows * row_bytes / (cfg.cache_gb * 1e9))
            self.calibration = self.harvested_rows(self.inputs.calibration, "calibration")
        self.n_rows //= self.n_parts  # of one part
        row_tokens = self.calibration.doc.shape[1]
        if row_tokens % cfg.chunk_size:
            raise ValueError(f"--chunk_size {cfg.chunk_size} does not divide rows of "
                             f"{row_tokens} tokens")
        self.n_chunks = self.n_rows * row_tokens // cfg.chunk_size  # of one part
        self.batch_chunks = cfg.batch_size // cfg.chunk_size
        if self.n_chunks < self.batch_chunks:
            raise ValueError(f"{self.n_rows} training rows are less than one --batch_size "
                             f"{cfg.batch_size}: use a smaller batch, more text or a larger "
                             "--cache_gb")
        self.stats = self.compute_stats()

    def own_rows(self, rows):
        """Rows (row numbers) of the user's own activations."""
        blocks = torch.from_numpy(rows).split(SHARD_ROWS)
        norms = torch.cat([self.own.acts[block].float().norm(dim=-1) for block in blocks])
        doc = self.mask_sinks(self.own.doc[rows], norms.numpy())
        return Activations([self.own.acts], doc, rows, len(self.own.acts))

    def mask_sinks(self, doc, norms):
        """doc (N, T) with 0 also at attention sinks and at padding, whose norm is 0.

        The norm of a sink is above ten times the median of the ordinary tokens of the calibration
        rows, which come first.
        """
        if self.sink_limit is None:
            ordinary = norms[(doc > 0) & (norms > 0)]
            if not len(ordinary):
                raise ValueError("the calibration rows hold no ordinary token with activations")
            self.sink_limit = prepare.sink_limit(ordinary)
        return np.where((norms > self.sink_limit) | (norms == 0), 0, doc)

    def harvested_rows(self, rows, name):
        """Rows of text -> Activations, run through the language model unless they are on disk."""
        cfg = self.cfg
        folder = self.shard_folder(name)
        paths = harvest_shards(cfg, rows, folder, self.dtype, str(self.device), self.forward_rows)
        files = [load_file(path) for path in paths]  # maps the files, reads nothing yet
        doc = np.asarray(rows[: len(rows)]["doc"], np.int32)
        norms = torch.cat([file["norm"] for file in files]).numpy()
        acts = [file["acts"] for file in files]
        return Activations(acts, self.mask_sinks(doc, norms), np.arange(len(doc)), SHARD_ROWS)

    def shard_folder(self, name):
        """The cache folder of the rows `name`; it is named by all that decides their activations."""
        cfg = self.cfg
        key = {"inputs": self.identity, "rows": name, "layer": cfg.layer, "dtype": str(self.dtype),
               "device": self.device.type, "forward_rows": self.forward_rows}
        if self.n_parts > 1 and name != "calibration":
            key["run"] = str(cfg.run_dir.resolve())  # parts are deleted, so they are not shared
        return prepare.cache_root(cfg.cache_dir) / f"acts-{prepare.digest(key)}"

    def part_name(self, number):
        """What shard_folder calls part `number`."""
        return f"train {number} of {self.n_parts}"

    def load_part(self, number):
        """Load part `number` into self.part, on the device if it fits there."""
        if number == self.part_number:
            return
        self.part = None
        if self.own:
            part = self.own_rows(self.own.train)
        else:
            self.delete_part()
            rows = self.inputs.train.select(range(number * self.n_rows, (number + 1) * self.n_rows))
            part = self.harvested_rows(rows, self.part_name(number))
            if self.n_parts == 1:
                prepare.release_lm()  # what it took is free for training
        self.part_number = number
        self.part = on_device(part, self.device)
        n_valid = int((part.doc > 0).sum())
        say(f"part {number + 1} of {self.n_parts}: {len(part.doc):,} rows, {n_valid:,} tokens to "
            "train on")

    def delete_part(self):
        """Delete the files of the part that is loaded, if it is one of several."""
        if self.n_parts > 1 and self.part_number is not None:
            barrier()  # every process is done with it
            shutil.rmtree(self.shard_folder(self.part_name(self.part_number)), ignore_errors=True)
            self.part_number = None

    def batch(self, seed, step):
        """This process's share: x (B, d_in) float32 scaled, doc (N, T), number of ordinary tokens.

        N chunks of T = chunk_size neighbouring tokens are shuffled, not tokens: windows stay whole
        while a batch mixes many documents.
        """
        epoch, place = self.epoch_and_place(step)
        self.load_part(epoch % self.n_parts)
        order = chunk_order(seed, epoch, self.n_chunks)
        ids = order[place * self.batch_chunks :][: self.batch_chunks][RANK::WORLD]
        doc = self.part.doc.reshape(-1, self.cfg.chunk_size)[ids]
        x = to_device(self.part.chunks(ids, self.cfg.chunk_size).flatten(0, 1), self.device)
        n_valid = int((doc > 0).sum())
        return x.float() * self.stats.scale, to_device(torch.from_numpy(doc), self.device), n_valid

    def epoch_and_place(self, step):
        """Which pass over a part this step belongs to, and its place in that pass."""
        return divmod(step, self.n_chunks // self.batch_chunks)

    def batches(self, seed, steps):
        """Yield (step, batch) for a range of steps. A GPU gets the next one prepared meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for step in steps:
                batch = ahead.result() if ahead else self.batch(seed, step)
                # Not across a pass: load_part would replace the part in use.
                same_pass = self.epoch_and_place(step + 1)[1] > 0
                ahead = None
                if self.prefetch and same_pass and step + 1 in steps:
                    ahead = pool.submit(self.batch, seed, step + 1)
                yield step, batch

    def calibration_tokens(self):
        """The ordinary tokens of the calibration rows, (n, d_in) float32, unscaled."""
        acts = self.calibration
        x = acts.chunks(np.arange(len(acts.doc)), acts.doc.shape[1]).float()
        return x[torch.from_numpy(acts.doc > 0)]

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


def text_options(cfg):
    """How the text is read, for the functions of prepare.py."""
    return {"text_field": cfg.text_field, "dataset_config": cfg.dataset_config, "split": cfg.split,
            "encoding": cfg.encoding, "cache_dir": cfg.cache_dir}


def harvest_shards(cfg, rows, folder, dtype, device, forward_rows):
    """Run rows through the LM, SHARD_ROWS a file, and return the files' paths.

    A file is written aside and renamed, so a file that exists is whole, and a harvest that was stopped
    only makes the missing ones. Any number of processes may call this at once: they share the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(rows), SHARD_ROWS)
    paths = [folder / f"{start:09d}.safetensors" for start in starts]
    missing = [path for path in paths if not path.exists()]
    if not missing:
        return paths
    check_disk(cfg, len(missing), folder, dtype)
    lm = prepare.load_lm(cfg.model, dtype, device, cfg.cache_dir)[0]
    for timeout in (0, -1):  # first pass: skip files that others have locked; second: wait for them
        work = list(zip(starts, paths))
        for start, path in tqdm(work, desc="harvest", unit="file", leave=False, disable=RANK > 0):
            if path.exists():
                continue
            with contextlib.suppress(Timeout), FileLock(f"{path}.lock", timeout=timeout):
                if not path.exists():
                    tokens = np.asarray(rows[start : start + SHARD_ROWS]["tokens"])
                    write_shard(lm, tokens, cfg.layer, path, forward_rows)
    for path in paths:
        Path(f"{path}.lock").unlink(missing_ok=True)
    return paths


def write_shard(lm, tokens, layer, path, forward_rows):
    """tokens (R, T) -> a file with their activations (R, T, d_in) and the norms (R, T) of these."""
    blocks = []
    norms = []
    for i in range(0, len(tokens), forward_rows):
        x = residuals(lm, tokens[i : i + forward_rows], layer)
        blocks.append(x.cpu())
        norms.append(x.float().norm(dim=-1).cpu())
    tensors = {"acts": torch.cat(blocks), "norm": torch.cat(norms)}
    if not torch.isfinite(tensors["norm"]).all():
        raise RuntimeError(f"the language model gives NaN or infinity at layer {layer}")
    prepare.write_whole(path, lambda part: save_file(tensors, part))


def check_disk(cfg, n_missing, folder, dtype):
    """RuntimeError if the missing shards do not fit on the disk."""
    d_in = prepare.model_shape(cfg.model, cfg.cache_dir)[0]
    need = n_missing * SHARD_ROWS * cfg.context_size * (d_in * dtype.itemsize + 4)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise RuntimeError(f"the activations need {need / 1e9:.1f} GB in {folder}, "
                           f"{free / 1e9:.1f} GB are free: lower --harvest_tokens or --cache_gb, "
                           "or move --cache_dir")


def to_device(tensor, device):
    """Copy to the device. From pinned memory a copy to a GPU does not make the host wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_device(part, device):
    """The Activations, on the GPU if they take less than half of its free memory."""
    if device.type != "cuda":
        return part
    size = sum(file.numel() * file.element_size() for file in part.files)
    if 2 * size > torch.cuda.mem_get_info(device)[0]:  # the cat below holds it twice
        return part
    whole = torch.cat([file.to(device) for file in part.files])
    return Activations([whole], part.doc, part.order, len(whole))


# ------------------------------------------------------------------------------------------------
# 6. Training loop, checkpoints, signals
# ------------------------------------------------------------------------------------------------


def train(cfg, seed, harvest, stop):
    """Train one SAE; checkpoints and log.jsonl go to the run directory. -> the SAE, for raw x.

    stop: the run's Stop. While it is deferred, a signal only sets stop.signal.
    """
    d_in = harvest.calibration.files[0].shape[-1]
    trainer = Trainer(cfg, d_in, harvest.stats, seed, harvest.device)
    first = restore(cfg.run_dir, trainer, seed)  # 0 unless the run is resumed
    log_path = cfg.run_dir / "log.jsonl" if RANK == 0 else os.devnull
    harvest.batch(seed, min(first, cfg.steps - 1))  # loads the first part before the clock starts
    steps = range(first, cfg.steps)
    bar = tqdm(initial=first, total=cfg.steps, desc=f"train seed {seed}", unit="step",
               mininterval=1, disable=RANK > 0)
    saved_at = began = time.perf_counter()
    n_tokens = 0
    with bar, open(log_path, "a") as log_file, stop.deferred(), malloc_keeps_memory():
        for step, (x, doc, n_valid) in harvest.batches(seed, steps):
            log = step % cfg.log_every == 0 or step == cfg.steps - 1
            terms = trainer.step(x, doc, n_valid, step, log)
            n_tokens += n_valid * WORLD
            if log:
                rate = n_tokens / (time.perf_counter() - began)
                line = {"seed": seed, "step": step, "lr": learning_rate(cfg, step)}
                line |= {name: float(value) for name, value in terms.items()}
                line["tokens_per_s"] = round(rate)
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
                raise Interrupted(stopped)
    if cfg.sparsity == "batchtopk":
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
    path = run_dir / "checkpoint" / "state.pt"
    path.parent.mkdir(exist_ok=True)
    prepare.write_whole(path, lambda part: torch.save(state, part))


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
    prepare.write_whole(path, lambda part: part.write_text("".join(kept)))


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


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; the argument is its number."""


class Stop:
    """SIGINT and SIGTERM, as a context: the previous handlers are restored at its end.

    Inside `deferred` the first signal only sets a flag, which the training loop looks at when a
    step is whole; elsewhere it raises Interrupted. The same signal again leaves at once.
    """

    def __init__(self):
        self.signal, self.wait, self.before = 0, False, {}
        self.can_resume = False  # whether the run directory holds something to go on with

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        """The handler. Under torchrun Ctrl-C comes as SIGINT and SIGTERM: the second is ignored."""
        if self.signal == number:
            os._exit(128 + number)
        if self.signal:
            return
        self.signal = number
        if not self.wait:
            raise Interrupted(number)
        say("stopping after this step (and the harvest, if one is under way); press again to quit "
            "immediately")

    @contextlib.contextmanager
    def deferred(self):
        """While open, a signal waits until the step is whole."""
        self.wait = True
        try:
            yield
        finally:
            self.wait = False
        if self.signal:  # it came after the last step's look
            raise Interrupted(self.signal)


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
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in sae.named_parameters()}
    architecture = ARCHITECTURES[sae.sparsity]
    d_sae, d_in = sae.W_dec.shape
    if sae.sparsity == "batchtopk":
        tensors["threshold"] = sae.threshold.expand(d_sae).contiguous()
    if sae.nonlinearity == "gelu":
        architecture = "temporal_sae_" + architecture
        tensors["scale"] = sae.scale
    spec = {
        "architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "reshape_activations": "none",
        "normalize_activations": "layer_norm" if sae.layernorm else "none",
        "metadata": {"sae_lens_version": "6.0.0", **origin(cfg)},
        "temporal_sae": {"k": sae.k, "sparsity": sae.sparsity, "nonlinearity": sae.nonlinearity,
                         "layernorm": sae.layernorm,
                         # without a lead latents have no order: the judge takes any
                         "lead": cfg.n_lead if cfg.temporal or cfg.matryoshka_alpha else None,
                         "sha256": evaluate.tensor_hash(tensors)},
    }
    if ARCHITECTURES[sae.sparsity] == "topk":
        spec["k"] = sae.k
    with torch.no_grad():
        acts = sae.encode(x)
        reference = {"x": x, "acts": acts, "x_hat": sae.decode(acts, x)}
    for name, content in (("reference", reference), ("sae_weights", tensors)):
        prepare.write_whole(folder / f"{name}.safetensors", lambda part: save_file(content, part))
    prepare.write_json(folder / "cfg.json", spec)  # last: its presence says that this seed is done
    return spec["temporal_sae"]["sha256"]


def origin(cfg):
    """Where the activations come from, for cfg.json: names, never paths of this machine."""
    if cfg.acts:
        return {"model_name": None, "hook_name": None, "dataset_path": Path(cfg.acts).name}
    model = evaluate.public_name(cfg.model)
    return {"model_name": model, "hook_name": f"blocks.{cfg.layer}.hook_resid_post",
            "hook_layer": cfg.layer, "prepend_bos": True, "context_size": cfg.context_size,
            "dataset_path": evaluate.public_name(cfg.dataset)}


def prove_saved(sae, folder):
    """RuntimeError unless the judge gets from the folder the trained SAE's codes, up to rounding."""
    reference = load_file(folder / "reference.safetensors")
    judged = evaluate.load_sae(folder)
    rounding = 1e-6 * float(reference["x"].norm(dim=1).max())
    with torch.no_grad():
        acts = judged.encode(reference["x"])
        x_hat = judged.decode(reference["acts"], reference["x"])
        # The threshold is the pre-activation of some calibration token: if that is one of these,
        # rounding decides whether its code is on.
        edge = sae.activate(sae.threshold)
        on_the_edge = (torch.maximum(acts, reference["acts"]) - edge).abs() <= rounding
        acts = torch.where(on_the_edge, reference["acts"], acts)
    same = torch.allclose(acts, reference["acts"], rtol=1e-5, atol=rounding)
    same = same and torch.allclose(x_hat, reference["x_hat"], rtol=1e-5, atol=rounding)
    if not same or not torch.equal(judged.W_dec, sae.W_dec):
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


IGNORED_ON_RESUME = ("out_dir", "resume", "overwrite", "debug", "cache_dir", "checkpoint_minutes")


def check_run_dir(cfg):
    """ValueError for a run directory that holds something and is not to be resumed or replaced."""
    run_dir, saved = cfg.run_dir, cfg.run_dir / "config.json"
    if cfg.resume:
        if not saved.exists():
            raise ValueError(f"--resume: {run_dir} holds no run")
        old = prepare.read_json(saved)
        new = asdict(cfg)
        kept = [name for name in new if name not in IGNORED_ON_RESUME]
        differ = [name for name in kept if old.get(name) != new[name]]
        if differ:
            raise ValueError(f"--resume: {run_dir} has other settings of {', '.join(differ)}")
        made_by = prepare.read_json(run_dir / "environment.json")["experiment_sha256"]
        if made_by != prepare.sha256(SOURCE):
            raise ValueError(f"--resume: {run_dir} was made by another experiment.py than this one")
        return
    found = run_dir.exists() and any(path.name != ".lock" for path in run_dir.iterdir())
    if found and not (run_dir / "environment.json").exists():
        raise ValueError(f"{run_dir} holds something that is not a run: choose another --out_dir")
    if found and not cfg.overwrite:
        raise ValueError(f"{run_dir} already holds a run: choose another --out_dir, or give "
                         "--resume or --overwrite")


def check_inputs(cfg, identity):
    """ValueError if a run that is resumed was made from another model or other text."""
    old = prepare.read_json(cfg.run_dir / "environment.json")["inputs"]
    new = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differ:
        raise ValueError(f"--resume: {', '.join(sorted(differ))} changed since {cfg.run_dir} was "
                         "made: --overwrite starts again")


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
    """One complete run: harvest, train every seed, save, score. -> contents of final_info.json."""
    check_run_dir(cfg)
    barrier()  # every process has looked before the first one writes
    with locked(cfg.run_dir) if RANK == 0 else contextlib.nullcontext():
        harvest = Harvest(cfg)
        if cfg.resume:
            check_inputs(cfg, harvest.identity)
        elif RANK == 0:
            begin_run(cfg, harvest.identity)
        stop.can_resume = True
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
        return evaluate.evaluate_run(cfg.run_dir)


def parse(argv):
    """Command line -> Config. Bad usage is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        names = [f"--{f.name}"]
        if "_" in f.name:
            names.append(f"--{f.name.replace('_', '-')}")
        text = f.metadata["help"]
        choices = f.metadata["choices"]
        if f.name == "temp_loss":  # they are defined after Config
            choices = TEMP_LOSSES
        if choices:
            text += f" ({', '.join(choices)})"
        text = f"{text} [{f.default}]".replace("%", "%%")
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(*names, dest=f.name, default=f.default, help=text, **kind)
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise ValueError(str(e)) from None
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
    for name in ("model", "dataset", "acts", "acts_mask"):
        setattr(args, name, absolute(getattr(args, name)))
    if args.cache_dir:
        args.cache_dir = str(Path(args.cache_dir).expanduser().resolve())  # it may not exist yet
    return Config(**vars(args))


def absolute(name):
    """A path that exists, made absolute, so that the record means the same from any directory."""
    path = Path(name).expanduser()
    is_path = name and name not in prepare.EMBEDDED and path.exists()
    return str(path.resolve()) if is_path else name


def main(argv=None):
    """The command. Returns the exit code: 0, 1 run failed, 2 bad usage, 130/143 stopped."""
    cfg = None
    with Stop() as stop:  # takes SIGINT and SIGTERM
        try:
            cfg = parse(argv)
            check(cfg)
            if not cfg.acts:
                prepare.check_model(cfg.model, cfg.layer, cfg.context_size)
            init_distributed(prepare.pick_device(cfg.device))
            if RANK == 0:
                print(f"run directory: {cfg.run_dir}", flush=True)
            info = run(cfg, stop)
            if RANK == 0:
                evaluate.print_scores(info)
                print(f"run directory: {cfg.run_dir}\nnext: python plot.py")
            return 0
        except Interrupted as e:
            how = ""
            if stop.can_resume:
                how = ", --resume in place of --overwrite" if cfg.overwrite else " and --resume"
            say(f"stopped; go on with the same command{how}")
            if argv is not None and e.args[0] == signal.SIGINT:
                raise KeyboardInterrupt from None  # called from Python: stop the caller's loop too
            return 128 + e.args[0]
        except Exception as e:  # whatever went wrong, the user gets one sentence
            return report(e, cfg)


def report(error, cfg):
    """Print one sentence for an error (--debug: its traceback too). -> exit code."""
    if cfg and cfg.debug:
        traceback.print_exception(error)
    sentence = prepare.first_line(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "Allocator" in str(error):
        sentence += "; lower --batch_size, --d_sae or --context_size"
    # A ValueError of our own is the user's to mend; one from inside a library is a failed run.
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename).name
    ours = last in ("experiment.py", "prepare.py", "evaluate.py")
    if not ours:
        sentence += " (--debug shows where)"
    if RANK == 0 or not ours:  # an error of ours is the same in every process: one says it
        print(f"error: {sentence}", file=sys.stderr)
    return 2 if ours and isinstance(error, ValueError) else 1


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
    if sae.sparsity == "topk":
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
    if sae.sparsity == "batchtopk" and len(pre):
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
        """Codes, tokens and latents of the pairs of the first latents and tokens; None: of all."""
        n_tokens = self.shape[0] if n_tokens is None else n_tokens
        n_latents = self.shape[1] if n_latents is None else n_latents
        end = self.pairs.token_start[n_tokens]  # pairs are in token order
        keep = (self.pairs.latent[:end] < n_latents).nonzero()[:, 0]
        size = (n_tokens, n_latents)
        return self.acts[keep], self.pairs.token[keep], self.pairs.latent[keep], size

    def leading(self, n_latents):
        acts, token, latent, size = self.first(n_latents)
        return SparseCodes(acts, make_pairs(token, latent, *size))

    def dense(self, n_latents=None, n_tokens=None):
        acts, token, latent, size = self.first(n_latents, n_tokens)
        return acts.new_zeros(size).index_put((token, latent), acts)

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
