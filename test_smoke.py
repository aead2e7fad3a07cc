"""Tests: what the scripts promise, on models of three layers and on text made up here.

    python -m pytest -q test_smoke.py

Offline, on a CPU, in about three minutes. The tests speak to the commands, main([...]), and read
the files that these write; of the functions they call the pure ones, losses and readers. Nothing
asserts a time. In reading order: helpers and fixtures, temporal losses, training step, text, models,
activations, a run, SAELens' format, the judge, going on after a stop, what is refused, several
processes, the commands and the study, pictures and the page, the generated tables.
"""
import contextlib
import copy
import csv
import doctest
import gzip
import hashlib
import html
import importlib
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
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test may ask the hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import ByteLevelBPETokenizer

import bench
import evaluate
import experiment
import plot
import prepare
import train

HERE = Path(__file__).resolve().parent
D_IN, LAYERS, POSITIONS, VOCABULARY = 32, 3, 64, 400
CHOICES = {f.name: f.metadata["choices"] for f in experiment.fields(experiment.Config)}
LOSSES = ("window_infonce", "window_mean", "infonce", "infonce_dot", *experiment.PAIR_LOSSES)

# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------


def argv(settings, **changes):
    """Settings -> command line. A bool is a flag; None leaves a setting out."""
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


def read(path):
    """The object in a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write(path, content):
    """Write a file of text, bytes or JSON; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (dict, list)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(rows):
    """Rows -> the text of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def means(run):
    """The headline numbers of a run."""
    (block,) = read(run / "final_info.json").values()
    return block["means"]


def log_of(run):
    """The lines of log.jsonl without the one entry that depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_s"]
    return lines


def weights(run, seed=0):
    """{name: tensor} of a saved SAE."""
    return load_file(run / f"seed_{seed}" / "sae_weights.safetensors")


def weight_hash(run, seed=0):
    """The hash of the trained weights, as recorded."""
    return read(run / f"seed_{seed}" / "cfg.json")["temporal_sae"]["sha256"]


def tree_hash(folder):
    """{file: hash} of a folder, to say later that nothing was touched."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            found[str(path.relative_to(folder))] = prepare.sha256(path)
    return found


def close(ours, theirs, rel=1e-5, floor=1e-9):
    """Numbers, or dicts and lists of them, are equal up to rounding."""
    assert ours == pytest.approx(theirs, rel=rel, abs=floor)


def refused(capsys, code, words, main, line):
    """main(line) gives this exit code and ONE sentence that holds `words`; no traceback."""
    capsys.readouterr()
    got = main(line)
    err = capsys.readouterr().err
    sentences = [line for line in err.splitlines() if line.startswith("error: ")]
    assert got == code and "Traceback" not in err, f"exit code {got}\n{err}"
    assert len(sentences) == 1 and words.lower() in sentences[0].lower(), err


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


# ------------------------------------------------------------------------------------------------
# Fixtures: a tokenizer, models, a text, runs
# ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def guard(monkeypatch):
    """What hangs, a stray signal, a look for a host, a handler that main() left: they all fail."""

    def fail(*what):
        raise RuntimeError(f"a test hangs, got a late signal, or asks the network: {what}")

    signal.signal(signal.SIGTERM, fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, fail)
        signal.alarm(170)
    yield
    if hasattr(signal, "SIGALRM"):
        signal.alarm(0)
    assert signal.signal(signal.SIGTERM, signal.SIG_DFL) is fail


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A directory for the session. Caches go there too: no test sees the user's."""
    path = tmp_path_factory.mktemp("work")
    os.environ["TEMPORAL_SAE_CACHE"] = str(path / "cache")
    torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives
    return path


TOPICS = {
    "farm": "cow barn wheat plough hay field tractor",
    "law": "judge court trial jury verdict appeal",
    "sea": "ship wave salt harbour sail tide captain",
}
COMMON = "the a of and to in it was that with for on at by from as 7 42 Mr Anna , . (".split()


def story(i):
    """{"text", "topic"} of document i: half of its words are of its topic, half everyone's."""
    rng = random.Random(i)
    topic = list(TOPICS)[i % 3]
    words = [f"{i}:"]
    for _ in range(44):
        words.append(rng.choice(TOPICS[topic].split() if rng.random() < 0.5 else COMMON))
    return {"text": " ".join(words), "topic": topic}


STORIES = [story(i) for i in range(400)]


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE of 400 tokens."""
    made = ByteLevelBPETokenizer()
    texts = [row["text"] for row in STORIES[:90]]
    special = ["<bos>", "<eos>"]
    made.train_from_iterator(texts, VOCABULARY, special_tokens=special, show_progress=False)
    return made


def tokenizer_of(bpe, bos="<bos>", eos="<eos>", **special):
    """The tokenizer as transformers knows it."""
    names = {"bos_token": bos, "eos_token": eos, **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)


COUNTS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
GPT2 = COUNTS | {"n_embd": D_IN, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
SHAPE = COUNTS | {"hidden_size": D_IN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
                  "intermediate_size": 64, "max_position_embeddings": POSITIONS}
GROUPED = SHAPE | {"num_key_value_heads": 2}


def random_lm(kind, seed=0):
    """A causal LM with random weights, wide enough apart that predictions depend on the context."""
    shape = {
        "gpt2": transformers.GPT2Config(**GPT2),
        "gptneox": transformers.GPTNeoXConfig(**SHAPE),
        "llama": transformers.LlamaConfig(**GROUPED),
        "gemma2": transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=16),
    }[kind]
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()


def save_lm(folder, lm, tokenizer):
    """A model folder as a user would name it with --model."""
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lm_dir(work, bpe):
    """A Llama on disk."""
    return save_lm(work / "lm", random_lm("llama"), tokenizer_of(bpe))


@pytest.fixture(scope="session")
def tiny(work, lm_dir):
    """Settings of a run that takes a second or two, on 400 documents with topics."""
    text = write(work / "stories.jsonl", json_lines(STORIES))
    return {"model": lm_dir, "layer": 1, "dtype": "float32", "device": "cpu", "dataset": text,
            "context_size": 32, "chunk_size": 8, "window": 4, "harvest_tokens": 8192,
            "eval_rows": 96, "reconstruction_rows": 8, "d_sae": 64, "k": 4, "batch_size": 256,
            "train_tokens": 256 * 40, "lr": 3e-3, "warmup_steps": 5, "dead_tokens": 2000,
            "temp_alpha": 0.3, "temporal_fraction": 0.25, "log_every": 5, "matmul_dtype": "float32"}


@pytest.fixture(scope="session")
def quick(tiny):
    """The same for tests of training: hardly anything to score."""
    return tiny | {"eval_rows": 4, "reconstruction_rows": 0}


@pytest.fixture(scope="session")
def run(work):
    """run(name, settings, **changes) -> the folder of that run; made once by experiment.main."""
    made = {}

    def go(name, settings, **changes):
        words = argv(settings, **changes)
        if name not in made:
            assert experiment.main([*words, "--out_dir", str(work / "runs" / name)]) == 0
            made[name] = words
        assert made[name] == words, f"two runs are called {name}"
        return work / "runs" / name

    return go


@pytest.fixture(scope="session")
def base(run, tiny):
    """A run with the temporal loss, scored; many tests read it."""
    return run("base", tiny)


@pytest.fixture(scope="session")
def own(work, tiny):
    """Settings of a run on own activations: two of ten directions at a time, four tokens each."""
    rng = np.random.default_rng(0)
    codes = rng.random((60, 4, 10)) * (rng.random((60, 4, 10)) < 0.2)
    x = np.repeat(codes, 4, axis=1) @ rng.normal(size=(10, 12))
    x += 0.05 * rng.normal(size=x.shape)
    np.save(work / "acts.npy", x.astype(np.float32))
    return tiny | {"acts": work / "acts.npy", "model": None, "dataset": None, "eval_rows": 12,
                   "reconstruction_rows": 0, "d_sae": 48, "k": 3}


# ------------------------------------------------------------------------------------------------
# Temporal losses: each against loops over tokens
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chunks():
    """codes (16,8,6) >= 0, x (16,8,5) and doc (16,8): chunks of one document, of two, with gaps."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(16, 8, 6, generator=generator)
    codes = codes * (torch.rand(codes.shape, generator=generator) < 0.6)
    x = torch.randn(16, 8, 5, generator=generator)
    doc = torch.arange(1, 17)[:, None].repeat(1, 8)
    doc[0, 3] = 0
    doc[1, 5:] = 40
    doc[2, :4] = 41
    doc[4] = 0
    doc[5, 1::2] = 0
    doc[7] = 7  # a document goes on in the next chunk
    return codes, x, doc


def pairs_of(doc, window):
    """[(n, s, t)] of ordinary tokens of one document in one chunk, s < t < s + window."""
    found = []
    for n, row in enumerate(doc.tolist()):
        for s in range(len(row)):
            for t in range(s + 1, min(s + window, len(row))):
                if row[s] == row[t] > 0:
                    found.append((n, s, t))
    return found


# The losses on pairs, and the power of the codes' scale that each is proportional to. A loss of
# your own needs its own test.
SHRINKING = {"sqdiff": 2, "variance": 0, "autocorr": 2, "selective": 0}


def pair_loss_by_hand(name, codes, doc, window):
    """The losses on pairs, in float64."""
    z = codes.double().numpy()
    a = np.array([z[n, s] for n, s, _ in pairs_of(doc, window)])
    b = np.array([z[n, t] for n, _, t in pairs_of(doc, window)])
    difference = ((a - b) ** 2).mean(0)
    variance = np.concatenate([a, b]).var(0)
    if name == "sqdiff":
        return difference.sum()
    if name == "variance":
        return (window - 1) / window * difference.sum() / (a**2 + b**2).mean(0).sum()
    if name == "autocorr":
        return difference.sum() / 2 / variance.sum()
    rho = 1 - difference / 2 / variance
    return np.mean(np.clip(rho, 0, 1) * (1 - rho))


def infonce_by_hand(codes, doc, temperature, cosine):
    """Every fourth neighbour is its anchor's positive; negatives are of other documents."""
    z = codes.double().numpy()
    if cosine:
        z = z / np.linalg.norm(z, axis=2, keepdims=True)
    pairs = [(n, s, t) for n, s, t in pairs_of(doc, 2) if s % 4 == 0]
    total = 0
    for one, other in ((1, 2), (2, 1)):
        for i in pairs:
            logits = []
            for j in pairs:
                if j == i or doc[i[0], i[1]] != doc[j[0], j[1]]:
                    logits.append(z[i[0], i[one]] @ z[j[0], j[other]] / temperature)
            positive = z[i[0], i[one]] @ z[i[0], i[other]] / temperature
            total += np.log(np.exp(logits).sum()) - positive
    return total / 2 / len(pairs)


def window_mean_by_hand(x, doc, window):
    """Mean over the OTHER tokens of the same document less than `window` away; NaN if too few."""
    out = np.full(x.shape, np.nan)
    x = x.double().numpy()
    for n, row in enumerate(doc.tolist()):
        for t in range(len(row)):
            others = []
            for s in range(len(row)):
                if s != t and abs(s - t) < window and row[s] == row[t] > 0:
                    others.append(x[n, s])
            if len(others) >= min(4, window - 1):
                out[n, t] = np.mean(others, axis=0)
    return out


@pytest.mark.parametrize("window", [2, 3, 5, 8])
def test_the_window_mean_equals_a_loop_and_crosses_no_document(chunks, window):
    _, x, doc = chunks
    mean, enough = experiment.window_mean(x, doc, window)
    expected = window_mean_by_hand(x, doc, window)
    assert np.array_equal(enough.numpy(), np.isfinite(expected[..., 0])) and enough.any()
    assert np.allclose(mean[enough].numpy(), expected[enough.numpy()], atol=1e-6)
    found = experiment.window_mean(x, doc, window, at=slice(1, None, 3))  # at a third of the tokens
    assert torch.equal(found[1], enough[:, 1::3])
    assert torch.allclose(found[0], mean[:, 1::3], atol=1e-6)


@pytest.mark.parametrize("window", [2, 3, 8])
@pytest.mark.parametrize("name", SHRINKING)
def test_a_loss_on_pairs_equals_a_loop_and_crosses_no_document(chunks, name, window):
    codes, _, doc = chunks
    value = experiment.PAIR_LOSSES[name](codes, doc, window).item()
    close(value, pair_loss_by_hand(name, codes, doc, window))
    noise = torch.where(doc[..., None] > 0, codes, 1e3)  # what stands where no token is
    close(experiment.PAIR_LOSSES[name](noise, doc, window).item(), value)


@pytest.mark.parametrize("cosine", [True, False])
def test_infonce_equals_a_loop_and_takes_negatives_of_other_documents(chunks, cosine):
    codes, _, doc = chunks
    value = experiment.infonce_loss(codes + 0.01, doc, 0.5, cosine).item()
    close(value, infonce_by_hand(codes + 0.01, doc, 0.5, cosine))


def window_infonce_by_hand(guess, target, enough, doc, temperature):
    """Each guess against the targets of all chunks at its place that are of another document."""
    def direction(v):
        v = v.double().numpy()
        length = np.linalg.norm(v, axis=2, keepdims=True)
        return v / np.maximum(length, 0.1 * math.sqrt(v.shape[2]))

    a, b = direction(guess), direction(target)
    losses = []
    for n, t in enough.nonzero().tolist():
        logits = [a[n, t] @ b[n, t] / temperature]
        for m in range(len(doc)):
            if enough[m, t] and doc[m, t] != doc[n, t]:
                logits.append(a[n, t] @ b[m, t] / temperature)
        losses.append(np.log(np.exp(logits).sum()) - logits[0])
    return np.mean(losses)


@pytest.mark.parametrize("n_lead", [3, 6])  # fewer than the 5 dimensions, and more
def test_the_window_infonce_equals_a_loop_and_takes_negatives_of_other_documents(chunks, n_lead):
    lead, x, doc = chunks
    lead = lead[..., :n_lead].clone()
    lead[0, :3] *= 1e-3  # what they add is shorter than what counts as a direction
    W_lead = torch.randn(lead.shape[2], x.shape[2], generator=torch.Generator().manual_seed(1))
    target, enough = experiment.window_mean(x, doc, 4)
    value = experiment.window_infonce_loss(lead, W_lead, target, enough, doc, doc, 0.3).item()
    close(value, window_infonce_by_hand(lead @ W_lead, target, enough, doc, 0.3))
    lead = torch.where(enough[..., None], lead, 1e3)  # what stands where there is no target
    target = torch.where(enough[..., None], target, -1e3)
    found = experiment.window_infonce_loss(lead, W_lead, target, enough, doc, doc, 0.3).item()
    close(found, value)


def test_what_the_window_infonce_compares_a_token_with():
    """Its target, and those of others; none of its own document when the targets are swapped."""
    generator = torch.Generator().manual_seed(0)
    doc = torch.arange(1, 6)[:, None].expand(5, 3)
    target = torch.randn(5, 3, 8, generator=generator, requires_grad=True)
    twice = torch.tensor([9, 7, 8, 9, 6])[:, None].expand(5, 3)  # two chunks' targets of one document
    for owner, expected in ((doc, [1, 1, 1, 1, 1]), (doc.roll(1, 0), [1, 0, 1, 1, 1]),
                            (twice, [1, 1, 1, 0, 1])):
        lead = torch.zeros(5, 3, 8)
        lead[0] = torch.rand(3, 8, generator=generator)  # the others compare nothing
        loss = experiment.window_infonce_loss(lead, torch.eye(8), target, doc > 0, owner, doc, 1.0)
        (grad,) = torch.autograd.grad(loss, target)
        assert (grad.abs().amax((1, 2)) > 0).tolist() == expected


def test_no_gradient_of_the_window_infonce_is_large_where_no_latent_is_on():
    lead = torch.zeros(4, 3, 64, requires_grad=True)
    target = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    doc = torch.arange(1, 5)[:, None].expand(4, 3)
    loss = experiment.window_infonce_loss(lead, torch.eye(64), target, doc > 0, doc, doc, 1.0)
    (grad,) = torch.autograd.grad(loss, lead)
    assert 0 < grad.norm() < 1


def test_controls_break_the_order_and_nothing_else(quick, chunks):
    """other_docs: a target of another chunk. permuted: random other tokens of the document."""
    _, x, doc = chunks
    plain, plain_enough = experiment.window_mean(x, doc, 4)
    cfg = config(quick, control="other_docs")
    target, enough, owner = experiment.window_mean_target(x, doc, cfg, 0)
    assert torch.equal(target, plain.roll(1, 0)) and torch.equal(owner, doc.roll(1, 0))
    assert torch.equal(enough, plain_enough & plain_enough.roll(1, 0))
    number = doc[..., None].float()  # every token says which document it is of
    cfg = config(quick, control="permuted", window=8)
    target, enough, owner = experiment.window_mean_target(number, doc, cfg, 0)
    assert torch.allclose(target[enough], number[enough]), "documents are mixed"
    assert torch.equal(owner, doc)
    assert torch.allclose(experiment.window_mean_target(x, doc, cfg, 0)[0],
                          experiment.window_mean(x, doc, 8)[0], atol=1e-5)  # all of a chunk is near
    cfg = config(quick, control="permuted", window=4)
    found = [experiment.window_mean_target(x, doc, cfg, step)[0] for step in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=0.1)
    assert not torch.allclose(found[0], plain, atol=0.1)
    every = torch.eye(doc.shape[1]).expand(*doc.shape, -1)  # each token is a direction of its own
    target, *_ = experiment.window_mean_target(every, doc, cfg, 0)
    assert target.sum() > 0 and not target.diagonal(dim1=1, dim2=2).any(), "a token in its target"
    cfg = config(quick, control="permuted", window=2)
    target, *_ = experiment.window_mean_target(every, doc, cfg, 0)
    next_to = target[8] > 0  # chunk 8 is of one document: its tokens stand in a row, each once
    assert torch.equal(next_to, next_to.t())
    assert sorted(next_to.sum(0).tolist()) == [1, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("name", SHRINKING)
def test_what_is_constant_to_the_gradient(chunks, name):
    """Scaling the codes gains as much as the loss's power of them, an offset nothing."""
    codes = chunks[0].clone().requires_grad_()
    loss = experiment.PAIR_LOSSES[name](codes, chunks[2], 3)
    (grad,) = torch.autograd.grad(loss, codes)
    close((grad * codes).sum().item(), SHRINKING[name] * loss.item(), floor=1e-6)
    assert name == "variance" or grad.sum((0, 1)).abs().max() < 1e-5 < grad.norm()


@pytest.mark.parametrize("module", [experiment, prepare, evaluate], ids=str)
def test_the_examples_in_the_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


# ------------------------------------------------------------------------------------------------
# The training step
# ------------------------------------------------------------------------------------------------


def a_trainer(quick, **changes):
    """A Trainer with dead latents, and a batch: x (256, 64), doc (32, 8), number of tokens."""
    settings = {"d_sae": 300, "temp_alpha": 0.5, "grad_clip": 0, "k": 8, "init": "xavier",
                "window": 3, "temporal_fraction": 0.5, "matryoshka_alpha": 0.2}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    x[1:] += 1.5 * x[:-1]  # neighbours have something in common
    doc = torch.arange(1, 33)[:, None].repeat(1, 8)
    doc[0, 3] = 0
    doc[1, 5:] = 40
    doc[4] = 0
    mean = 0.1 * torch.ones(64)
    stats = experiment.Stats(mean=mean, scale=0.5, variance=100.0)
    trainer = experiment.Trainer(config(quick, **settings | changes), 64, stats, 0, "cpu")
    trainer.dead = torch.arange(5, 300, 31)
    return trainer, x, doc, int((doc > 0).sum())


EXTRAS = {"layernorm": True, "nonlinearity": "gelu"}
STEPS = {
    **{loss: {"temp_loss": loss} for loss in LOSSES},
    **{f"topk {loss}": {"temp_loss": loss, "sparsity": "topk"} for loss in LOSSES},
    "extras": EXTRAS,
    "topk extras": EXTRAS | {"sparsity": "topk"},
    "no temporal loss": {"temp_alpha": 0},
}


@pytest.mark.parametrize("name", STEPS)
def test_the_sparse_step_has_the_gradients_of_the_dense_one(quick, name):
    found = []
    for encode in (experiment.encode_sparse, experiment.encode_dense):
        trainer, *batch = a_trainer(quick, **STEPS[name])
        assert trainer.encode_batch is experiment.encode_sparse
        trainer.encode_batch = encode
        terms = trainer.step(*batch, step=7, log=True)
        terms["threshold"] = trainer.sae.threshold
        found.append(({name: value.item() for name, value in terms.items()}, trainer.parameters))
    (ours, parameters), (theirs, dense_parameters) = found
    assert {"auxk", "matryoshka", "l0"} <= ours.keys()
    close(ours, theirs)
    for p, q in zip(parameters, dense_parameters):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm()


def leading_codes(sae, x, threshold):
    """The first 150 codes, those above three quarters of the threshold."""
    pre = (x - sae.b_dec) @ sae.W_enc[:, :150] + sae.b_enc[:150]
    return pre * (pre > 0.75 * threshold)


@pytest.mark.parametrize("loss", experiment.WINDOW_LOSSES)
def test_each_term_of_the_loss_equals_its_formula(quick, loss):
    trainer, x, doc, n_valid = a_trainer(quick, temp_loss=loss, temperature=0.3)
    trainer.sae.b_dec.data.normal_(generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(trainer.sae).requires_grad_(False)
    terms = trainer.step(x, doc, n_valid, 7)
    ok = doc.flatten() > 0
    codes = experiment.encode_dense(before, x, ok, n_valid).dense()
    residual = x - codes @ before.W_dec - before.b_dec
    close(terms["recon"].item(), residual[ok].square().sum().item() / n_valid / 100)
    lead = codes[:, :150] @ before.W_dec[:150]
    error = (x - lead - before.b_dec)[ok].square().sum()
    close(terms["matryoshka"].item(), error.item() / n_valid / 100)
    # step 7 takes the temporal target at the tokens 3 and 7 of each chunk
    mean = window_mean_by_hand(x.view(32, 8, 64), doc, 3)[:, 3::4] - before.b_dec.numpy()
    if loss == "window_mean":  # the gain begins at 1/2
        guess = lead.view(32, 8, 64)[:, 3::4]
        expected = np.nansum((mean - guess.numpy() / 2) ** 2) / np.nansum(mean**2)
    else:
        enough = torch.from_numpy(np.isfinite(mean[..., 0]))
        target = torch.from_numpy(np.nan_to_num(mean))
        guess = leading_codes(before, x, trainer.sae.threshold) @ before.W_dec[:150]
        guess = guess.view(32, 8, 64)[:, 3::4]
        expected = window_infonce_by_hand(guess, target, enough, doc[:, 3::4], 0.3)
    close(terms["temporal"].item(), expected)
    dead = torch.arange(5, 300, 31)  # AuxK: on a quarter, dead latents explain what is left
    aux = torch.relu((x[:64] - before.b_dec) @ before.W_enc[:, dead] + before.b_enc[dead])
    error = (residual[:64] - aux @ before.W_dec[dead])[ok[:64]].square().sum()
    close(terms["auxk"].item(), (error / residual[:64][ok[:64]].square().sum()).item())
    total = terms["recon"] + 0.5 * terms["temporal"] + 0.2 * terms["matryoshka"]
    close(terms["loss"].item(), (total + terms["auxk"] / 32).item())
    along = (trainer.sae.W_dec.grad * before.W_dec).sum(1)
    assert along.abs().max() < 1e-6, "a decoder row's length is no direction to go"


def test_the_window_infonce_moves_neither_its_targets_nor_the_gain(quick):
    """What it adds to b_dec's gradient comes through the codes alone."""
    grads = []
    for alpha in (0, 0.5):
        trainer, *batch = a_trainer(quick, temp_loss="window_infonce", temp_alpha=alpha)
        trainer.step(*batch, 7)
        assert trainer.gain.grad is None
        grads.append(trainer.sae.b_dec.grad)
    trainer, x, doc, n_valid = a_trainer(quick, temp_loss="window_infonce")
    sae = trainer.sae
    experiment.encode_dense(sae, x, doc.flatten() > 0, n_valid)  # finds the threshold
    lead = leading_codes(sae, x, sae.threshold).view(32, 8, 150)[:, 3::4]
    target, enough = experiment.window_mean(x.view(32, 8, 64), doc, 3, at=slice(3, None, 4))
    target, W_lead = target - sae.b_dec.detach(), sae.W_dec[:150]
    doc = doc[:, 3::4]
    loss = experiment.window_infonce_loss(lead, W_lead, target, enough, doc, doc, 0.1)
    (expected,) = torch.autograd.grad(loss, sae.b_dec)
    assert expected.norm() > 0
    assert torch.allclose((grads[1] - grads[0]) / 0.5, expected, atol=1e-6 + 1e-4 * expected.norm())


@pytest.mark.parametrize("loss", experiment.WINDOW_LOSSES)
def test_steps_teach_the_leading_latents_their_target(quick, loss):
    trainer, *batch = a_trainer(quick, temp_loss=loss, temp_alpha=20, window=8,
                                temporal_fraction=1)
    steps = range(0, 240, 4)  # each takes its targets at the same tokens
    values = [trainer.step(*batch, step)["temporal"].item() for step in steps]
    assert values[-1] < values[0] / 2


@pytest.mark.parametrize("loss", experiment.WINDOW_LOSSES)
def test_a_step_of_coarse_products_has_about_the_same_temporal_loss(quick, loss):
    """As on a GPU: dense codes, products in bfloat16."""
    found = []
    for dtype in ("float32", "bfloat16"):
        trainer, *batch = a_trainer(quick, temp_loss=loss, matmul_dtype=dtype)
        trainer.encode_batch = experiment.encode_dense
        found.append(trainer.step(*batch, 7)["temporal"])
    assert found[1].dtype == torch.float32
    close(found[1].item(), found[0].item(), rel=0.01)


def test_a_loss_of_another_shape_is_refused(quick, monkeypatch):
    monkeypatch.setitem(experiment.PAIR_LOSSES, "sqdiff", lambda codes, doc, window: codes.mean(2))
    trainer, *batch = a_trainer(quick, temp_loss="sqdiff")
    with pytest.raises(ValueError, match="--temp_loss sqdiff gives a tensor of shape"):
        trainer.step(*batch, 7)


def test_gradients_are_clipped(quick):
    trainer, *batch = a_trainer(quick, grad_clip=1e-3)
    assert trainer.step(*batch, 7)["grad_norm"] > 1e-2
    seen = [state["exp_avg"] for state in trainer.optimizer.state.values()]  # Adam's 0.1 * gradient
    close(torch.nn.utils.get_total_norm(seen).item(), 1e-4, rel=1e-3)


@pytest.mark.parametrize("hint", [0.0, 0.1, 10.0])  # the last step's threshold
@pytest.mark.parametrize("encode", [experiment.encode_sparse, experiment.encode_dense])
def test_batchtopk_takes_exactly_the_largest(quick, encode, hint):
    trainer, x, doc, n_valid = a_trainer(quick, k=5)
    trainer.sae.threshold.fill_(hint)
    ok = doc.flatten() > 0
    pre = ((x - trainer.sae.b_dec) @ trainer.sae.W_enc).detach() * ok[:, None]
    largest = pre.flatten().topk(5 * n_valid)
    codes = encode(trainer.sae, x, ok, n_valid).dense().flatten()
    assert set(codes.nonzero()[:, 0].tolist()) == set(largest.indices.tolist())
    close(trainer.sae.threshold.item(), largest.values[-1].item())


@pytest.mark.parametrize("where", ["an activation", "a weight"])
def test_nan_stops_before_the_update(quick, where):
    trainer, x, doc, n_valid = a_trainer(quick)
    if where == "an activation":
        x[0, 0] = math.nan
    else:
        trainer.sae.b_enc.data[0] = math.inf
    before = copy.deepcopy(trainer.sae.state_dict())
    with pytest.raises(FloatingPointError, match="step 7"):
        trainer.step(x, doc, n_valid, 7)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(trainer.sae.state_dict()[name], before[name])


def test_decoder_rows_stay_at_unit_norm_and_dead_latents_come_back(quick):
    alive = {}
    for alpha in (0, 1):
        trainer, *batch = a_trainer(quick, dead_tokens=2000, auxk_alpha=alpha, lr=1e-2)
        with torch.no_grad():
            trainer.sae.W_enc[:, 200:] *= 0.02  # far too small to be among the k largest
        for step in range(80):
            trainer.step(*batch, step)
        assert torch.allclose(trainer.sae.W_dec.norm(dim=1), torch.ones(300), atol=1e-5)
        alive[alpha] = (trainer.silent_tokens[200:] < 2000).sum()
    assert alive[1] > alive[0], "AuxK revives nothing"


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(quick):
    cfg = config(quick, lr=1, warmup_steps=4, train_tokens=256 * 100)
    rates = [experiment.learning_rate(cfg, step) for step in (0, 4, 99)]
    close(rates, [0.2, 0.55 + 0.45 * math.cos(math.pi * 0.04), 0.1], rel=0.01)
    assert experiment.learning_rate(config(quick, lr=1, schedule="constant"), 30) == 1


@pytest.mark.parametrize("nonlinearity", CHOICES["nonlinearity"])
@pytest.mark.parametrize("sparsity", CHOICES["sparsity"])
def test_folding_the_scale_into_the_weights_changes_nothing(quick, sparsity, nonlinearity):
    cfg = config(quick, sparsity=sparsity, nonlinearity=nonlinearity)
    generator = torch.Generator().manual_seed(0)
    sae = experiment.SAE(cfg, 16).requires_grad_(False)
    for p in sae.parameters():
        p.normal_(0, 0.3, generator=generator)
    sae.threshold.fill_(0.2)
    x = torch.randn(30, 16, generator=generator)
    codes = sae.encode(0.05 * x)
    x_hat = sae.decode(codes, 0.05 * x)
    sae.fold_scale(0.05)
    raw = sae.encode(x)
    assert codes.count_nonzero() > 50 and torch.allclose(0.05 * raw, codes, atol=1e-6)
    assert torch.allclose(0.05 * sae.decode(raw, x), x_hat, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# Text: documents, splits, rows
# ------------------------------------------------------------------------------------------------

SPLITS = ("train", "heldout", "calibration")
SIZES = {"context_size": 32, "harvest_tokens": 4096, "eval_rows": 24, "calibration_rows": 24}


def rows_of(dataset, lm_dir, **changes):
    """prepare.text_rows with the sizes of a tiny run."""
    return prepare.text_rows(str(dataset), str(lm_dir), **SIZES | changes)


def documents_in(rows):
    """The numbers of the documents in a split, from 0."""
    return {number - 1 for number in np.unique(rows[:]["doc"]).tolist() if number > 0}


def test_rows_hold_whole_documents_in_order_and_bos_parts_them(tiny, bpe):
    inputs = rows_of(tiny["dataset"], tiny["model"])
    source = [bpe.encode(row["text"]).ids for row in STORIES]
    for split in SPLITS:
        rows = getattr(inputs, split)[:]
        assert rows["tokens"].shape == rows["doc"].shape and (rows["tokens"][:, 0] == 0).all()
        assert ((rows["doc"] == 0) == (rows["tokens"] == 0)).all(), "BOS, whose id is 0, is no text"
        at = {}
        for tokens, doc in zip(rows["tokens"], rows["doc"]):
            for number in dict.fromkeys(doc[doc > 0].tolist()):
                piece = tokens[doc == number].tolist()  # goes on where the last row stopped
                start = at.get(number, 0)
                assert source[number - 1][start : start + len(piece)] == piece
                at[number] = start + len(piece)
        if split == "heldout":
            assert all(inputs.topics[n - 1] == STORIES[n - 1]["topic"] for n in at)
    assert [len(getattr(inputs, split)) for split in SPLITS] == [128, 24, 24]


def test_no_document_is_in_two_splits_and_those_held_out_are_spread(tiny):
    inputs = rows_of(tiny["dataset"], tiny["model"])
    trained, held, calibration = (documents_in(getattr(inputs, split)) for split in SPLITS)
    assert not trained & held and not trained & calibration and not held & calibration
    n_read = inputs.documents["number"][-1] + 1
    hashes = [hashlib.sha256(row["text"].encode()).hexdigest() for row in STORIES[:n_read]]
    in_order = sorted(range(n_read), key=hashes.__getitem__)
    reported = set(inputs.documents[inputs.parts["heldout"]]["number"])
    assert held <= reported == set(in_order[: len(reported)]) and len(reported - held) <= 1
    assert 0.3 < np.mean(list(held)) / n_read < 0.7


def test_the_same_inputs_give_the_same_rows(tiny):
    """A cache would go on with the rows of an older revision: if this fails, count FORMAT up."""
    inputs = rows_of(tiny["dataset"], tiny["model"])
    parts = [getattr(inputs, split)[:][column] for split in SPLITS for column in ("tokens", "doc")]
    assert (prepare.FORMAT, prepare.sha256(*parts)[:16]) == (1, "759708da35d2fe65")


def test_equal_texts_stay_on_one_side(work, lm_dir):
    copies = [STORIES[i % 20] for i in range(200)]
    inputs = rows_of(write(work / "copies.jsonl", json_lines(copies)), lm_dir)
    sides = []
    for split in SPLITS:
        sides.append({n % 20 for n in documents_in(getattr(inputs, split))})
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert len(np.unique(inputs.documents["hash"][:])) + 50 < len(inputs.documents)


def test_an_endless_document_is_cut_and_special_tokens_spelt_out_are_dropped(work, lm_dir, capsys):
    endless = {"text": "ship <bos> wave <eos> " * 40_000}
    path = write(work / "endless.jsonl", json_lines([endless, *STORIES]))
    inputs = rows_of(path, lm_dir, harvest_tokens=1024)
    assert sum(inputs.documents["cut"][:]) == 1 and sum(inputs.documents["dropped"][:]) > 100
    assert sum(inputs.documents["length"][:]) < 30_000
    assert not any((getattr(inputs, split)[:]["tokens"] == 1).any() for split in SPLITS)
    rows_of(path, lm_dir, harvest_tokens=10**6)
    assert "training passes over them more often" in capsys.readouterr().err, "a small text says so"


TEXTS = [row["text"] for row in STORIES[:60]]
PLAIN = "\n\n".join(TEXTS)
LINES = json_lines(STORIES[:60])
ACCENTS = [f"{text} café" for text in TEXTS]
CHAT = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
MARK = b"\xef\xbb\xbf"  # of the byte order
LOADABLE = {  # name of the file or folder: (what is in it, options)
    "a.jsonl": (LINES, {}),
    "a.ndjson": (LINES, {}),
    "blank_lines.jsonl": (LINES.replace("\n", "\n\n"), {}),
    "mark.jsonl": (MARK + LINES.encode(), {}),
    "windows.jsonl": (LINES.replace("\n", "\r\n"), {}),
    "a.json": (STORIES[:60], {}),
    "a.jsonl.gz": (gzip.compress(LINES.encode()), {}),
    "a.jsonl.zst": (LINES.encode(), {}),
    "UPPER.TXT": (PLAIN, {}),
    "a.md": (PLAIN, {}),
    "mark.txt": (MARK + PLAIN.encode(), {}),
    "windows.txt": (PLAIN.replace("\n", "\r\n"), {}),
    "latin.txt": ("\n\n".join(ACCENTS).encode("latin-1"), {"encoding": "latin-1"}),
    "utf16.txt": ("\n\n".join(ACCENTS).encode("utf-16"), {"encoding": "utf-16"}),
    "a.csv": ("text\n" + "".join(f'"{text}"\n' for text in TEXTS), {}),
    "a.parquet": (None, {}),
    "saved": (None, {}),
    "nested.jsonl": (json_lines([{"a": {"b": text}} for text in TEXTS]), {"text_field": "a.b"}),
    "chat.jsonl": (json_lines(CHAT), {"text_field": "messages"}),
    "folder": ({"a.txt": PLAIN, "README.md": "no text", "LICENSE.txt": "none", ".x": "x"}, {}),
    "below": ({"data/train-00000.jsonl": LINES, "data/test-00000.jsonl": '{"text": "x"}'}, {}),
    "mixed": ({"a.jsonl": LINES, "notes.txt": "not part of it"}, {}),
    "splits": ({"test-0.jsonl": LINES, "train-0.jsonl": '{"text": "x"}'}, {"split": "test"}),
}


@pytest.mark.parametrize("name", LOADABLE)
def test_text_is_read_as_it_comes(work, name):
    path = work / "loadable" / name
    content, options = LOADABLE[name]
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
        content = zstandard.compress(content)
    if isinstance(content, dict):
        for file, inside in content.items():
            write(path / file, inside)
    elif content is not None:
        write(path, content)
    elif name == "saved":
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
    else:
        datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(path)
    defaults = {"text_field": "text", "dataset_config": "", "split": "train", "encoding": "utf-8"}
    found = prepare.read_text(str(path), **defaults | options, cache_dir="")
    expected = ACCENTS if "encoding" in options else TEXTS
    assert [text.strip() for text, _ in found] == expected


LABELS = [("sea", "sea"), (0, "0"), (7, "7"), (False, "False"), ("", None), (None, None),
          (math.nan, None), (["sea"], None), ({"name": "sea"}, None)]


@pytest.mark.parametrize("given, label", LABELS, ids=str)
def test_a_topic_is_a_label_if_it_is_a_plain_value(given, label):
    assert prepare.label_of({"text": "x", "topic": given}) == label


def test_the_command_shows_what_a_run_would_train_on(tiny, capsys):
    words = argv(SIZES, dataset=tiny["dataset"], model=tiny["model"], calibration_rows=None)
    assert prepare.main(words) == 0
    printed = capsys.readouterr().out
    inputs = rows_of(tiny["dataset"], tiny["model"], calibration_rows=128)
    n_read = inputs.documents["number"][-1] + 1
    assert f"documents read   {n_read}" in printed and "training row 0" in printed
    refused(capsys, 2, "--split", prepare.main, [*words, "--split", "no_such"])


# ------------------------------------------------------------------------------------------------
# Models: the residual stream that is read is the one that is meant
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "gptneox", "llama", "gemma2"])
def test_hooks_read_the_output_of_their_block(kind):
    lm = random_lm(kind)
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, (3, 20))
    blocks = prepare.decoder_blocks(lm)
    last = []  # the last hidden state has the final norm on it: the last block is read by hand

    def keep(module, inputs, output):
        last.append(output if torch.is_tensor(output) else output[0])

    handle = blocks[-1].register_forward_hook(keep)
    with torch.no_grad():
        states = list(lm(torch.from_numpy(tokens), output_hidden_states=True).hidden_states)
    handle.remove()
    states[-1] = last[0]
    hooks = [len(block._forward_hooks) for block in blocks]
    for layer in range(LAYERS):
        trained_on = experiment.residuals(lm, tokens, layer)
        judged_on = evaluate.residuals(lm, blocks[layer], tokens)
        for x in (trained_on, judged_on):
            same = [torch.equal(x, state) for state in states]
            assert same == [i == layer + 1 for i in range(LAYERS + 1)], f"layer {layer}: {same}"
    assert [len(block._forward_hooks) for block in blocks] == hooks, "a hook was left behind"


FAMILIES = {  # name: (kind, special tokens, id that begins a row)
    "gpt2, BOS is EOS": ("gpt2", {"bos": "<eos>"}, 1),
    "gptneox, both are id 0": ("gptneox", {"eos": "<bos>"}, 0),
    "gptneox, no BOS": ("gptneox", {"bos": None}, 1),
    "gemma2, PAD is EOS": ("gemma2", {"pad_token": "<eos>"}, 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_go_the_whole_way(work, run, quick, bpe, name):
    """CE without an SAE is that of transformers on the held-out rows, special tokens left out."""
    kind, special, bos = FAMILIES[name]
    folder = save_lm(work / "families" / name, random_lm(kind), tokenizer_of(bpe, **special))
    out = run(name, quick, model=folder, reconstruction_rows=4, eval_rows=8)
    sizes = {"harvest_tokens": 8192, "eval_rows": 8, "calibration_rows": 128}
    rows = rows_of(quick["dataset"], folder, **sizes).heldout[:4]
    tokens = torch.from_numpy(rows["tokens"].astype(np.int64))
    ok = torch.from_numpy(rows["doc"] > 0)[:, :-1]
    assert (tokens[:, 0] == bos).all() and not ok[tokens[:, :-1] == bos].any()
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = lm(tokens).logits[:, :-1]
    metrics = read(out / "core.json")["eval_result_metrics"]["model_performance_preservation"]
    ce = F.cross_entropy(logits[ok], tokens[:, 1:][ok]).item()
    close(metrics["ce_loss_without_sae"], ce, 1e-4)


def test_a_model_is_its_files_not_its_name(work, quick, bpe):
    """The folder of a model changes between two runs of one process."""
    found = []
    for seed in (1, 2):
        shutil.rmtree(work / "changing", ignore_errors=True)
        save_lm(work / "changing", random_lm("gpt2", seed), tokenizer_of(bpe))
        cfg = config(quick, model=f"{work / 'changing'}/")  # with a slash or without
        found.append(experiment.Harvest(cfg).batch(0, 0)[0])
    again = experiment.Harvest(config(quick, model=work / "changing")).batch(0, 0)[0]
    assert not torch.equal(found[0], found[1]) and torch.equal(again, found[1])


# ------------------------------------------------------------------------------------------------
# Activations: the harvest, batches, parts; one's own
# ------------------------------------------------------------------------------------------------


def all_chunks(quick):
    """Chunks of the training rows (n, 8 * d_in), their documents (n, 8): by transformers alone."""
    sizes = {"context_size": 32, "harvest_tokens": 8192, "eval_rows": 4}
    rows = prepare.text_rows(str(quick["dataset"]), str(quick["model"]), **sizes).train[:]
    lm = transformers.AutoModelForCausalLM.from_pretrained(quick["model"], dtype=torch.float32)
    with torch.no_grad():
        tokens = torch.from_numpy(rows["tokens"].astype(np.int64))
        x = lm(tokens, output_hidden_states=True, use_cache=False).hidden_states[2]
    return x.reshape(-1, 8 * D_IN).numpy(), rows["doc"].reshape(-1, 8)


@pytest.mark.parametrize("parts, steps", [(1, 32), (3, 30)])
def test_a_pass_serves_each_chunk_once_whole_and_as_the_model_gives_it(work, quick, parts, steps):
    """8192 tokens are 256 rows of 4 chunks; a step takes 32 chunks. A part of three has 85 rows."""
    cache = work / f"cache_of_{parts}_parts"
    gigabytes = (256 / parts + 1) * 32 * D_IN * 4 / 1e9
    cfg = config(quick, cache_dir=cache, cache_gb=gigabytes)
    harvest = experiment.Harvest(cfg)
    every_chunk, every_doc = all_chunks(quick)
    served = []
    batches = []
    for step in range(steps):
        x, doc, n_valid = harvest.batch(0, step)
        batches.append(x)
        found = []
        for chunk, owner in zip((x / harvest.stats.scale).view(32, -1).numpy(), doc.numpy()):
            at = int(np.abs(every_chunk - chunk).max(1).argmin())
            assert np.allclose(every_chunk[at], chunk, atol=1e-4), "no chunk of the text"
            assert np.array_equal(every_doc[at], owner)
            found.append(at)
        assert n_valid == (doc > 0).sum() and len({at // 4 for at in found}) > 8, "too few rows"
        served += found
        on_disk = sum(shard.stat().st_size for shard in cache.glob("acts-*/*.safetensors"))
        assert on_disk < 1.1 * (1e9 * gigabytes + 128 * 32 * D_IN * 4), "more than a part is kept"
    assert len(set(served)) == len(served) == steps * 32
    for prefetch in (False, True):  # True on a GPU
        again = experiment.Harvest(cfg)
        again.prefetch = prefetch
        for step, batch in again.batches(0, range(1, steps)):
            assert torch.equal(batch[0], batches[step])
    assert torch.equal(again.batch(0, steps - 1)[0], x), "a batch depends on seed and step alone"
    x = again.batch(0, 0)[0]
    assert not torch.equal(again.batch(1, 0)[0], x) and not torch.equal(again.batch(0, steps)[0], x)
    x = experiment.Harvest(cfg).batch(0, 0)[0]
    other = config(quick, cache_dir=cache, cache_gb=gigabytes, temp_alpha=0, d_sae=128, lr=1e-4)
    assert torch.equal(experiment.Harvest(other).batch(0, 0)[0], x), "compared runs are not paired"


def test_statistics_are_those_of_the_calibration_rows(quick):
    harvest = experiment.Harvest(config(quick))
    x = harvest.calibration_tokens().double() * harvest.stats.scale
    close(x.square().sum(1).mean().item(), D_IN)
    assert torch.allclose(x.mean(0).float(), harvest.stats.mean, atol=1e-5)
    close((x - x.mean(0)).square().sum(1).mean().item(), harvest.stats.variance)


def counts_of(run):
    """The counts in core.json."""
    return read(run / "core.json")["eval_result_unstructured"]["counts"]


def test_sinks_and_zeros_of_own_activations_are_left_out_of_training_and_judging(work, run, own):
    x = np.load(own["acts"]).copy()
    x[:, 0] *= 500 / np.linalg.norm(x[:, 0], axis=1, keepdims=True)  # at a row's first token
    x[:, 5:14] = 0  # most of a row, so that a median over all would be 0
    np.save(work / "sinks.npy", x)
    harvest = experiment.Harvest(config(own, acts=work / "sinks.npy"))
    for step in range(3):
        batch, doc, n_valid = harvest.batch(0, step)
        norms = batch.norm(dim=1) / harvest.stats.scale
        left_out = doc.flatten() == 0
        assert 0 < n_valid == (~left_out).sum()
        assert norms[~left_out].max() < 100 and norms[~left_out].min() > 0
        assert set((norms[left_out] > 100).tolist()) == {True, False}
    # rows for CE are of no account where there is no language model
    out = run("sinks", own, acts=work / "sinks.npy", reconstruction_rows=own["eval_rows"])
    counts = counts_of(out)
    assert counts["left_out"] == 10 * counts["rows"] and counts["tokens"] == 6 * counts["rows"]
    assert means(out)["explained_variance"] > 0.2


def test_sinks_of_a_language_model_are_left_out_of_training_and_judging(work, run, quick, bpe):
    lm = random_lm("llama")
    settings = quick | {"model": work / "sink_lm", "eval_rows": 48}
    sizes = {"harvest_tokens": 8192, "eval_rows": 48, "calibration_rows": 128}
    rows = rows_of(quick["dataset"], quick["model"], **sizes)
    tokens = rows.heldout[:]["tokens"]
    sink = 2 + np.bincount(tokens.ravel())[2:].argmax()
    lm.model.embed_tokens.weight.data[sink] *= 1e4  # wherever this token stands
    save_lm(work / "sink_lm", lm, tokenizer_of(bpe))
    sinks = (tokens == sink).sum()
    assert counts_of(run("sink_lm", settings))["left_out"] == sinks > 0
    harvest = experiment.Harvest(config(settings))
    n_valid = sum(harvest.batch(0, step)[2] for step in range(32))
    trained = rows.train[:]
    assert n_valid == ((trained["doc"] > 0) & (trained["tokens"] != sink)).sum()


def test_a_mask_gives_own_activations_documents(work, run, own):
    rng = np.random.default_rng(0)
    doc = np.repeat(rng.integers(1, 20, (60, 2)), 8, axis=1)
    doc[:, 3] = 0
    np.save(work / "mask.npy", doc)
    acts = prepare.load_acts(own["acts"], work / "mask.npy", 12)
    sides = [set(acts.doc[getattr(acts, split)].ravel()) - {0} for split in SPLITS]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and not sides[0] & sides[2]
    assert not sides[1] & sides[2] and (acts.doc[:, 3] == 0).all()
    everything = np.concatenate([acts.train, acts.heldout, acts.calibration])
    assert np.array_equal(np.sort(everything), np.arange(60)) and acts.heldout.max() > 20
    out = run("masked", own, acts_mask=work / "mask.npy", batch_size=64)
    assert counts_of(out)["tokens"] == (acts.doc[acts.heldout] > 0).sum()
    metrics = read(out / "core.json")["eval_result_metrics"]
    assert metrics["model_performance_preservation"]["ce_loss_score"] is None
    assert "no language model" in json.dumps(read(out / "core.json"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_own_activations_come_in_several_types(work, own, dtype):
    x = torch.from_numpy(np.load(own["acts"])).to(dtype)
    save_file({"acts": x}, work / f"{dtype}.safetensors")
    assert torch.equal(prepare.load_acts(work / f"{dtype}.safetensors").acts, x)


# ------------------------------------------------------------------------------------------------
# A run: what it leaves, what it learns, what it saves
# ------------------------------------------------------------------------------------------------

PUBLISHED = """environment.json core.json consistency.json latents.json final_info.json
    seed_0/cfg.json log.jsonl"""
OTHERS = """config.json experiment.py seed_0/sae_weights.safetensors seed_0/reference.safetensors"""
HEADLINE = """explained_variance l0 frac_alive ce_loss_score kl_div_score autocorr_1 autocorr_16
    autocorr_16_lead autocorr_16_rest autocorr_16_best support_jaccard smoothness_S S_sum
    latents_a_row boundary token_topic_5 token_topic_5_lead token_topic_5_rest doc_topic_5
    token_class_5 token_class_20 document_id separation_topic separation_token redundant_share
    together together_mass_share"""


def test_a_run_leaves_what_it_promises_and_learns(base, work):
    assert tree_hash(base).keys() == {*PUBLISHED.split(), *OTHERS.split()}, "neither less nor more"
    for name in PUBLISHED.split():
        assert str(work) not in (base / name).read_text(), f"{name} names a path of this machine"
    assert (base / "experiment.py").read_text() == experiment.SOURCE
    assert set(read(base / "config.json")) == {f.name for f in experiment.fields(experiment.Config)}
    made_by = read(base / "environment.json")
    for script in ("experiment", "prepare", "evaluate"):
        assert made_by[f"{script}_sha256"] == prepare.sha256(HERE / f"{script}.py")
    assert set(HEADLINE.split()) <= means(base).keys()
    assert all(math.isfinite(value) for value in means(base).values())
    log = log_of(base)
    assert [line["step"] for line in log] == [*range(0, 40, 5), 39]
    terms = {"loss", "recon", "temporal", "lr", "l0", "dead", "grad_norm"}
    assert all(terms <= line.keys() and all(map(math.isfinite, line.values())) for line in log)
    assert log[-1]["recon"] < 0.8 * log[0]["recon"]
    close([log[-1]["l0"], means(base)["l0"]], [4, 4], rel=0.1)
    assert means(base)["explained_variance"] > 0.2


SAME_AS_BASELINE = [
    {"window": 1},
    {"window": 1, "temp_loss": "sqdiff"},
    {"window": 1, "temp_loss": "infonce"},
    {"temp_alpha": 0, "temp_loss": "selective"},
    {"temp_alpha": 0, "control": "permuted"},
    {"temp_alpha": 0, "window": 16},  # wider than a chunk, but nothing reads it
]


def test_weight_0_or_window_1_is_the_baseline_bit_for_bit(run, quick):
    baseline = run("baseline", quick, temp_alpha=0)
    for number, changes in enumerate(SAME_AS_BASELINE):
        other = run(f"as_baseline_{number}", quick, **changes)
        assert weight_hash(other) == weight_hash(baseline), changes
        assert log_of(other) == log_of(baseline), changes
    assert weight_hash(run("temporal", quick)) != weight_hash(baseline), "the loss does nothing"


def test_the_same_command_gives_the_same_bytes(run, tiny, base):
    again = run("same_command", tiny)
    assert log_of(again) == log_of(base)
    for name in ("final_info.json", "consistency.json", "seed_0/sae_weights.safetensors"):
        assert (again / name).read_bytes() == (base / name).read_bytes(), name


def test_the_scored_weights_are_the_trained_weights(base, work):
    file = base / "seed_0" / "sae_weights.safetensors"
    assert weight_hash(base) == evaluate.tensor_hash(load_file(file))
    hashes = [read(base / "core.json")["eval_result_unstructured"]["hashes"],
              read(base / "consistency.json")["hashes"]]
    assert all(found["weights"] == prepare.sha256(file) for found in hashes)
    before = tree_hash(base)
    assert evaluate.main([str(base), "--out", str(work / "scored_again")]) == 0
    assert tree_hash(base) == before, "--out must not touch the run"
    again = work / "scored_again" / "final_info.json"
    assert again.read_bytes() == (base / "final_info.json").read_bytes()


def test_a_saved_sae_is_as_readable_as_its_record(base):
    modes = {path.name: path.stat().st_mode for path in (base / "seed_0").iterdir()}
    assert len(modes) == 3 and set(modes.values()) == {(base / "config.json").stat().st_mode}


def test_an_sae_without_a_run_knows_its_layer(base, work, tiny, capsys):
    words = ["--model", str(tiny["model"]), "--dataset", str(tiny["dataset"])]
    words += ["--context_size", "32", "--eval_rows", "96", "--reconstruction_rows", "1"]
    folder = shutil.copytree(base / "seed_0", work / "without_a_run")
    spec = read(folder / "cfg.json")
    del spec["metadata"]["hook_layer"]  # as SAELens writes it today
    write(folder / "cfg.json", json.dumps(spec))
    for layer, out, answer in (((), "there", ""), (("--layer", "0"), "elsewhere", "the run says 1")):
        found = [str(folder), *words, *layer, "--out", str(work / "layers" / out)]
        assert evaluate.main(found) == 0
        printed = capsys.readouterr().err
        assert answer in printed and ("scored with layer" in printed) == bool(answer)


@pytest.mark.parametrize("code, proven", [(0, True), (0.5, True), (1, False)])
def test_what_is_saved_is_proven_to_be_what_was_trained(work, quick, code, proven):
    """A code on the very threshold, .5, may be on or off; any other must be as it was."""
    sae = experiment.SAE(config(quick), D_IN).requires_grad_(False)
    sae.initialise("xavier", torch.zeros(D_IN), 0)
    sae.threshold.fill_(0.5)
    folder = work / f"proven_{code}"
    experiment.save_sae(sae, folder, config(quick), torch.randn(8, D_IN))
    found = load_file(folder / "reference.safetensors")
    token, latent = (found["acts"] == 0).nonzero()[0].tolist()
    found["acts"][token, latent] = code
    found["x_hat"] = sae.decode(found["acts"], found["x"])
    save_file(found, folder / "reference.safetensors")
    if proven:
        experiment.prove_saved(sae, folder)
        sae.W_dec[0, 0] += 1e-6
    with pytest.raises(RuntimeError, match="not the trained one"):
        experiment.prove_saved(sae, folder)
    assert not (folder / "cfg.json").exists()  # so --resume trains this seed again


@pytest.fixture(scope="session")
def seeds(run, tiny):
    """The base run's command with two seeds."""
    return run("seeds", tiny, n_seeds=2)


def test_seeds_share_a_harvest_and_are_summed_up(seeds, base, capsys):
    assert weight_hash(seeds) == weight_hash(base), "seed 0 does not depend on how many there are"
    assert weight_hash(seeds, 1) != weight_hash(seeds, 0)
    (block,) = read(seeds / "final_info.json").values()
    a, b = block["final_info_dict"]["explained_variance"]
    assert a != b and len(block["final_info_dict"]["pw_mcc"]) == 1
    close(block["means"]["explained_variance"], (a + b) / 2)
    close(block["stderrs"]["explained_variance"], abs(a - b) / 2)  # ddof 1, over sqrt(2)
    assert all((seeds / f"seed_{seed}" / "consistency.json").exists() for seed in (0, 1))
    capsys.readouterr()
    plot.main(["--compare", str(seeds), str(base)])
    table = capsys.readouterr().out
    assert all(words in table for words in ("explained_variance", "±", "base - seeds"))
    with pytest.raises(SystemExit, match="2"):
        plot.main(["--compare", str(base)])
    assert "--compare takes two runs or more" in capsys.readouterr().err


VARIANTS = {
    "gelu": {"nonlinearity": "gelu"},
    "layernorm": {"layernorm": True},
    "topk": {"sparsity": "topk"},
    "l1": {"sparsity": "l1", "l1_alpha": 0.02},
    "xavier": {"init": "xavier"},
    "matryoshka": {"matryoshka_alpha": 0.5, "schedule": "constant", "grad_clip": 0},
    "all": EXTRAS | {"sparsity": "topk", "init": "xavier", "auxk_alpha": 0},
    "bfloat16": {"dtype": "bfloat16", "matmul_dtype": "bfloat16"},
    **{name: {"temp_loss": name} for name in LOSSES},
    **{name: {"control": name} for name in CHOICES["control"] if name != "none"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_and_save_what_they_trained(run, quick, name):
    """The saved SAE on raw activations does what the last step logged: scale, threshold and all."""
    folder = run(f"variant_{name}", quick, **VARIANTS[name]) / "seed_0"
    log = log_of(folder.parent)
    assert log[-1]["recon"] < log[0]["recon"] and all(map(math.isfinite, log[-1].values()))
    sae = evaluate.load_sae(folder)
    x = experiment.Harvest(config(quick, **VARIANTS[name])).calibration_tokens()
    codes = sae.encode(x)
    unexplained = (x - sae.decode(codes, x)).square().sum() / (x - x.mean(0)).square().sum()
    close(unexplained.item(), log[-1]["recon"], rel=0.25)
    l0 = (codes != 0).sum(1).float().mean().item()
    close(l0, log[-1]["l0"], rel=0.1)
    if sae.selection == "jumprelu":
        close(l0, 4, rel=0.001)  # the threshold lets k latents a token through
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)


# ------------------------------------------------------------------------------------------------
# SAELens' format, both ways
# ------------------------------------------------------------------------------------------------


def encode_as_published(architecture, x, w, k):
    """SAELens' formulas, from the tensors alone."""
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if architecture == "jumprelu":
        return torch.relu(pre) * (pre > w["threshold"])
    if architecture == "topk":
        top = pre.topk(k)
        return torch.zeros_like(pre).scatter(1, top.indices, torch.relu(top.values))
    return torch.relu(pre)


def layer_norm(x):
    """SAELens' layer_norm -> normalised x, deviation, mean."""
    mean = x.mean(-1, keepdim=True)
    std = x.std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), std, mean


SAVED_AS = {"matryoshka": "jumprelu", "topk": "topk", "l1": "standard", "layernorm": "jumprelu"}
METADATA = {"model_name": "lm", "hook_name": "blocks.1.hook_resid_post", "hook_layer": 1,
            "prepend_bos": True, "context_size": 32, "dataset_path": "stories.jsonl"}


@pytest.mark.parametrize("name", SAVED_AS)
def test_the_saved_dictionary_is_in_saelens_format(run, quick, name):
    folder = run(f"variant_{name}", quick, **VARIANTS[name]) / "seed_0"
    spec = read(folder / "cfg.json")
    w = load_file(folder / "sae_weights.safetensors")
    architecture = SAVED_AS[name]
    shapes = {"W_enc": (D_IN, 64), "W_dec": (64, D_IN), "b_enc": (64,), "b_dec": (D_IN,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (64,)
    assert {key: tuple(tensor.shape) for key, tensor in w.items()} == shapes
    assert all(tensor.dtype == torch.float32 for tensor in w.values())
    norm = "layer_norm" if name == "layernorm" else "none"
    fixed = {"architecture": architecture, "d_in": D_IN, "d_sae": 64, "dtype": "float32",
             "apply_b_dec_to_input": True, "normalize_activations": norm}
    assert fixed.items() <= spec.items() and spec.get("k") == (4 if name == "topk" else None)
    assert METADATA.items() <= spec["metadata"].items(), "names, not paths"
    assert int(spec["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    reference = load_file(folder / "reference.safetensors")
    x, std, mean = layer_norm(reference["x"]) if name == "layernorm" else (reference["x"], 1, 0)
    acts = encode_as_published(architecture, x, w, 4)
    assert torch.allclose(acts, reference["acts"], atol=1e-5)
    x_hat = (acts @ w["W_dec"] + w["b_dec"]) * std + mean
    assert torch.allclose(x_hat, reference["x_hat"], atol=1e-5)


def test_what_saelens_cannot_express_gets_a_name_that_it_refuses(run, quick):
    for name in ("gelu", "all"):
        spec = read(run(f"variant_{name}", quick, **VARIANTS[name]) / "seed_0" / "cfg.json")
        assert spec["architecture"].startswith("temporal_sae_"), name


def test_saelens_loads_it(run, quick):
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (no dependency)")
    for name in SAVED_AS:
        folder = run(f"variant_{name}", quick, **VARIANTS[name]) / "seed_0"
        theirs = sae_lens.SAE.load_from_disk(folder)
        reference = load_file(folder / "reference.safetensors")
        acts = theirs.encode(reference["x"])
        assert torch.allclose(acts, reference["acts"], atol=1e-5)
        assert torch.allclose(theirs.decode(acts), reference["x_hat"], atol=1e-5)


def save_foreign(folder, tensors, **changes):
    """A jumprelu SAE, with changes, as SAELens saves one: cfg.json and sae_weights.safetensors."""
    d_in, d_sae = tensors["W_enc"].shape
    spec = {"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "dtype": "float32",
            "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
            "reshape_activations": "none", "metadata": {"sae_lens_version": "6.43.0"}}
    write(folder / "cfg.json", spec | changes)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def random_tensors():
    """Weights of no meaning."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, 48), "W_dec": (48, D_IN), "b_enc": (48,), "b_dec": (D_IN,),
              "threshold": (48,)}
    return {name: 0.3 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def judge_words(settings, **changes):
    """Flags of evaluate.py that score on the held-out rows of a run with these settings."""
    names = ("model", "layer", "dtype", "device", "dataset", "context_size", "harvest_tokens",
             "eval_rows", "reconstruction_rows")
    return argv({name: settings[name] for name in names}, **changes)


def judged(folder, settings, **changes):
    """Score an SAE folder by the command. -> where the scores are"""
    out = folder.parents[1] / "scores" / folder.parent.name / folder.name
    words = judge_words(settings, **changes)
    assert evaluate.main([str(folder), "--out", str(out), *words]) == 0
    return out


def test_the_folder_of_a_seed_is_enough_to_be_judged(base, tiny):
    assert means(judged(base / "seed_0", tiny)) == means(base)


KNOWN_SPECS = {
    "standard": {"architecture": "standard"},
    "topk": {"architecture": "topk", "k": 7},
    "topk without k": {"architecture": "topk"},  # means 100; here all 48
    "jumprelu": {},
    "layer norm": {"normalize_activations": "layer_norm"},
    "b_dec is not subtracted": {"apply_b_dec_to_input": False},
}


@pytest.mark.parametrize("name", KNOWN_SPECS)
def test_any_sae_in_saelens_format_is_read_and_judged(work, quick, name):
    w = random_tensors()
    spec = {"architecture": "jumprelu"} | KNOWN_SPECS[name]
    folder = save_foreign(work / "foreign" / name, w, **spec)
    x = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(1))
    x_in, std, mean = layer_norm(x) if name == "layer norm" else (x, 1, 0)
    if name == "b_dec is not subtracted":
        x_in = x + w["b_dec"]
    acts = encode_as_published(spec["architecture"], x_in, w, spec.get("k", 48))
    sae = evaluate.load_sae(folder)
    assert acts.count_nonzero() > 100 and torch.allclose(sae.encode(x), acts, atol=1e-5)
    x_hat = (acts @ w["W_dec"] + w["b_dec"]) * std + mean
    assert torch.allclose(sae.decode(acts, x), x_hat, atol=1e-5)
    scores = means(judged(folder, quick, reconstruction_rows=2))
    assert all(map(math.isfinite, scores.values())) and (name != "topk" or scores["l0"] <= 7)


# ------------------------------------------------------------------------------------------------
# The judge: each metric of the base run by a second, slower route
# ------------------------------------------------------------------------------------------------

GROUPS = {"whole": range(64), "lead": range(16), "rest": range(16, 64)}


class ByHand:
    """The 96 held-out rows of the base run in float64, from its files and transformers alone.

    x, x_hat (N,T,d_in), codes f (N,T,64), doc, topic (N,T). CE and KL read the first 8 rows; in
    `f`, `x` and the others are the 88 after them.
    """

    def __init__(self, run, settings):
        sizes = {"harvest_tokens": 8192, "eval_rows": 96, "calibration_rows": 128}
        inputs = rows_of(settings["dataset"], settings["model"], **sizes)
        folder = settings["model"]
        self.lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.w = {name: tensor.double() for name, tensor in weights(run).items()}
        self.ce_rows = inputs.heldout[:8]
        self.tokens = inputs.heldout[8:96]["tokens"]
        self.doc = inputs.heldout[8:96]["doc"]
        self.ok = self.doc > 0
        self.topic = np.vectorize(lambda number: inputs.topics.get(number - 1, ""))(self.doc)
        blocks = []
        with torch.no_grad():
            for first in range(0, 88, 16):
                ids = torch.from_numpy(self.tokens[first : first + 16].astype(np.int64))
                blocks.append(self.lm(ids, output_hidden_states=True).hidden_states[2])
        x = torch.cat(blocks).double()
        self.f, self.x_hat = (part.numpy() for part in self.autoencode(x))
        self.x = x.numpy()

    def autoencode(self, x):
        """x -> codes, x_hat by the formulas of jumprelu."""
        acts = encode_as_published("jumprelu", x.flatten(0, -2), self.w, 4)
        x_hat = acts @ self.w["W_dec"] + self.w["b_dec"]
        return acts.view(*x.shape[:-1], -1), x_hat.view(x.shape)

    def segments(self):
        """[(row, [positions])]: the parts of one document in one row."""
        found = []
        for r, row in enumerate(self.doc):
            for number in dict.fromkeys(row[row > 0].tolist()):
                found.append((r, np.flatnonzero(row == number).tolist()))
        return found

    def pairs(self, lag):
        """[(row, t, t + lag)] inside one segment."""
        return [(r, t, t + lag) for r, piece in self.segments() for t in piece if t + lag in piece]


@pytest.fixture(scope="session")
def hand(base, tiny):
    return ByHand(base, tiny)


@pytest.fixture(scope="session")
def core(base):
    return read(base / "core.json")


@pytest.fixture(scope="session")
def consistency(base):
    return read(base / "consistency.json")


def test_ce_and_kl_equal_a_loop_over_tokens(core, hand):
    def log_p(row, ok, edit):
        """(T, vocabulary) of one row, its residual edited token by token."""

        def hook(module, inputs, output):
            x = (output if torch.is_tensor(output) else output[0]).clone()
            for t in range(len(row)):
                if edit == "ablation":
                    x[0, t] = 0
                elif edit == "sae" and ok[t]:
                    x[0, t] = hand.autoencode(x[0, t : t + 1].double())[1][0].float()
            return x if torch.is_tensor(output) else (x, *output[1:])

        handle = hand.lm.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            logits = hand.lm(torch.from_numpy(row.astype(np.int64))[None]).logits[0].double()
        handle.remove()
        return logits.log_softmax(-1).numpy()

    ce = {"clean": [], "ablation": [], "sae": []}
    kl = {"ablation": [], "sae": []}
    for row, doc in zip(hand.ce_rows["tokens"], hand.ce_rows["doc"]):
        p = {edit: log_p(row, doc > 0, edit) for edit in ce}
        for t in np.flatnonzero(doc):
            for edit in kl:
                kl[edit].append(np.exp(p["clean"][t]) @ (p["clean"][t] - p[edit][t]))
            if t + 1 < len(row):
                for edit in ce:
                    ce[edit].append(-p[edit][t, row[t + 1]])
    ce = {edit: np.mean(values) for edit, values in ce.items()}
    kl = {edit: np.mean(values) for edit, values in kl.items()}
    metrics = core["eval_result_metrics"]
    close(metrics["model_behavior_preservation"], {
        "kl_div_score": 1 - kl["sae"] / kl["ablation"],
        "kl_div_with_ablation": kl["ablation"], "kl_div_with_sae": kl["sae"]}, 2e-5)
    close(metrics["model_performance_preservation"], {
        "ce_loss_score": (ce["ablation"] - ce["sae"]) / (ce["ablation"] - ce["clean"]),
        "ce_loss_with_ablation": ce["ablation"], "ce_loss_with_sae": ce["sae"],
        "ce_loss_without_sae": ce["clean"]}, 2e-5)
    close(ce["ablation"], math.log(VOCABULARY))  # a Llama that reads nothing says nothing


def test_fidelity_equals_sums_over_tokens(core, hand):
    batches = []  # of at most 16 rows, as SAEBench has them; the last one is short
    for first in range(0, 88, 16):
        ok = hand.ok[first : first + 16]
        batches.append([part[first : first + 16][ok] for part in (hand.x, hand.x_hat, hand.f)])
    x, y, f = (np.concatenate(parts) for parts in zip(*batches))
    n = len(x)
    norm_x = np.linalg.norm(x, axis=1)
    norm_y = np.linalg.norm(y, axis=1)
    error = ((x - y) ** 2).sum(1)
    legacy = mse = 0
    for a, b, _ in batches:
        residual = ((a - b) ** 2).sum(1)
        legacy += np.sum(1 - residual / ((a - a.mean(0)) ** 2).sum(1)) / n
        mse += residual.mean() / n
    q = np.mean([(a**2).sum(1).mean() for a, _, _ in batches])
    residual = np.mean([((a - b) ** 2).sum(1).mean() for a, b, _ in batches])
    bias = np.mean([(b * b).sum() / (a * b).sum() for a, b, _ in batches])
    cosine = np.mean((x * y).sum(1) / norm_x / norm_y)
    ratio = np.mean(norm_y / norm_x)
    metrics = core["eval_result_metrics"]
    close(metrics["reconstruction_quality"], {
        "explained_variance": 1 - residual / (q - (q / D_IN) ** 2),
        "explained_variance_legacy": legacy, "mse": mse, "cossim": cosine})
    close(metrics["shrinkage"], {
        "l2_norm_in": norm_x.mean(), "l2_norm_out": norm_y.mean(), "l2_ratio": ratio,
        "relative_reconstruction_bias": bias})
    close(metrics["sparsity"], {"l0": (f != 0).sum() / n, "l1": f.sum() / n})
    assert metrics["token_stats"] == {"total_tokens_eval_reconstruction": 8 * 32,
                                      "total_tokens_eval_sparsity_variance": 88 * 32}
    ours = core["eval_result_unstructured"]["ours"]
    close({name: ours[name] for name in ours if not name.endswith("score")}, {
        "explained_variance": 1 - error.sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse": error.mean() / D_IN, "cossim": cosine, "l2_ratio": ratio,
        "relative_reconstruction_bias": (y * y).sum() / (x * y).sum(), "l0": (f != 0).sum() / n,
        "l1": f.sum() / n, "frac_alive": (f != 0).any(0).mean()})


def test_rows_of_latents_equal_a_loop(core, hand):
    W = {"encoder": hand.w["W_enc"].T.numpy(), "decoder": hand.w["W_dec"].numpy()}
    unit = {side: w / np.linalg.norm(w, axis=1, keepdims=True) for side, w in W.items()}
    on = (hand.f > 0) & hand.ok[..., None]
    density = on.sum((0, 1)) / hand.ok.sum()
    for i, row in enumerate(core["eval_result_details"]):
        others = np.arange(64) != i
        expected = {
            "index": i, "feature_density": density[i],
            "consistent_activation_heuristic": on[..., i].sum() / max(on[..., i].any(1).sum(), 1),
            "encoder_bias": hand.w["b_enc"][i].item(),
            "encoder_norm": np.linalg.norm(W["encoder"][i]),
            "encoder_decoder_cosine_sim": unit["encoder"][i] @ unit["decoder"][i]}
        for side, w in unit.items():
            expected[f"max_{side}_cosine_sim"] = (w[others] @ w[i]).max()
        close(row, expected, floor=1e-6)
    misc = {"frac_alive": (density > 0).mean()}
    for percent in (1, 10):
        often = density > percent / 100
        misc[f"freq_over_{percent}_percent"] = often.mean()
        misc[f"normalized_freq_over_{percent}_percent"] = density[often].sum() / density.sum()
    for side, w in unit.items():
        cosine = w @ w.T - 2 * np.eye(64)
        misc[f"average_max_{side}_cosine_sim"] = cosine.max(1).mean()
    close(core["eval_result_metrics"]["misc_metrics"], misc)


def correlation(a, b):
    """Pearson's r; None where a side does not vary."""
    if a.std() < 1e-9 or b.std() < 1e-9:
        return None
    return np.corrcoef(a, b)[0, 1]


def expect(block, values, hand, at=None):
    """A block {group: {"mean", "mass"}} is these per-latent values over the latents that count."""
    fires = (hand.f[hand.ok] != 0).sum(0)
    for group, members in GROUPS.items():
        found = [(values[i], fires[i]) for i in members if fires[i] >= 20 and values[i] is not None]
        v, mass = np.array(found).T
        ours = {kind: block[group][kind] for kind in ("mean", "mass")}
        if at is not None:
            ours = {kind: curve[at] for kind, curve in ours.items()}
        close(ours, {"mean": v.mean(), "mass": (mass * v).sum() / mass.sum()}, 5e-5, 5e-6)


def test_autocorrelation_and_persistence_equal_loops_over_pairs(consistency, hand):
    centred = hand.f.copy()
    for r, piece in hand.segments():
        centred[r, piece] -= hand.f[r, piece].mean(0)
    rate = (hand.f[hand.ok] != 0).mean(0)
    assert consistency["lags"] == [1, 2, 4, 8, 16]
    assert consistency["groups"]["lead"]["latents"] == 16
    for at, lag in enumerate(consistency["lags"]):
        row, left, right = (list(part) for part in zip(*hand.pairs(lag)))
        for name, values in (("autocorr", hand.f), ("autocorr_within", centred)):
            a = values[row, left]
            b = values[row, right]
            rho = [correlation(a[:, i], b[:, i]) for i in range(64)]
            expect(consistency[name], rho, hand, at)
        a = hand.f[row, left] != 0
        b = hand.f[row, right] != 0
        stay = [b[a[:, i], i].mean() if a[:, i].any() else None for i in range(64)]
        beyond = [None if s is None else (s - p) / (1 - p) for s, p in zip(stay, rate)]
        expect(consistency["kappa"], beyond, hand, at)


def test_spans_and_positions_equal_loops(consistency, hand):
    f = hand.f
    valid = f[hand.ok]
    runs = np.zeros(64)
    for r, piece in hand.segments():
        for t in piece:
            before = f[r, t - 1] != 0 if t - 1 in piece else np.zeros(64, bool)
            runs += (f[r, t] != 0) & ~before
    fires = (valid != 0).sum(0)
    expect(consistency["span"], [a / b if b else None for a, b in zip(fires, runs)], hand)
    z = ((f - valid.mean(0)) / np.maximum(valid.std(0), 1e-9))[..., fires >= 20]
    for p, q in ((1, 2), (3, 3), (5, 9)):
        cell = [np.mean(z[r, p] * z[r, q]) for r, piece in hand.segments() if {p, q} <= set(piece)]
        close(consistency["position_corr"]["codes"][p][q], np.mean(cell), 1e-3, 1e-4)


@pytest.mark.parametrize("group", GROUPS)
def test_neighbours_equal_loops_over_rows(consistency, hand, group):
    """Jaccard, S, S_sum and the number of latents in a row."""
    f = hand.f[..., list(GROUPS[group])]
    overlap, smooth, rough, distinct = [], [], [], []
    for r in range(88):
        peak = {}
        for _, t, u in (pair for pair in hand.pairs(1) if pair[0] == r):
            one = set(np.flatnonzero(f[r, t]))
            two = set(np.flatnonzero(f[r, u]))
            if one | two:
                overlap.append(len(one & two) / len(one | two))
            step = np.linalg.norm(hand.x[r, u] - hand.x[r, t])
            for i in one | two:
                peak[i] = max(peak.get(i, 0), abs(f[r, u, i] - f[r, t, i]) / step)
        if peak:
            smooth.append(np.mean(list(peak.values())))
        rough.append(sum(peak.values()))
        distinct.append((f[r][hand.ok[r]] != 0).any(0).sum())
    names = ("support_jaccard", "smoothness_S", "S_sum", "latents_a_row")
    expected = [np.mean(overlap), np.mean(smooth), np.mean(rough), np.mean(distinct)]
    close([consistency[name][group] for name in names], expected, 5e-5)


def probe_by_hand(train, test, y_train, y_test, members, k):
    """AUROC of a logistic probe on the k columns of `members` whose class means differ most."""
    gap = np.abs(train[y_train].mean(0) - train[~y_train].mean(0))
    best = sorted(members, key=lambda i: -gap[i])[:k]
    probe = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(max_iter=1000))
    probe.fit(train[:, best], y_train)
    return roc_auc_score(y_test, probe.decision_function(test[:, best]))


@pytest.fixture(scope="session")
def in_train(hand):
    """(N,T) tokens of the 70 % of documents, at random, that probes are trained on."""
    numbers = np.unique(hand.doc[hand.ok])
    chosen = np.random.default_rng(0).permutation(len(numbers)) < 0.7 * len(numbers)
    return np.isin(hand.doc, numbers[chosen])


def test_probes_of_the_topic_equal_a_slow_probe(base, consistency, hand, in_train):
    """From single tokens that are 8 tokens or more into their segment; from a document's mean."""
    found = consistency["probes"]
    late = np.zeros(hand.doc.shape, bool)
    for r, piece in hand.segments():
        late[r, piece[8:]] = True
    train = late & in_train
    test = late & ~in_train
    centred = hand.x - hand.x[train].mean(0)
    cases = [(hand.f, members, k, found["token_topic"][group][str(k)])
             for group, members in GROUPS.items() for k in (1, 5, 20)]
    cases.append((centred, range(D_IN), D_IN, found["raw"]["token_topic"]["all"]))
    for values, members, k, ours in cases:
        scores = []
        for topic in TOPICS:
            y = hand.topic == topic
            scores.append(probe_by_hand(values[train], values[test], y[train], y[test], members, k))
        close(ours, np.mean(scores), floor=2e-3)
    numbers = np.unique(hand.doc[hand.ok])
    places = [hand.doc == number for number in numbers]
    mean = np.array([hand.f[place].mean(0) for place in places])
    topic_of = np.array([hand.topic[place][0] for place in places])
    side = np.array([in_train[place].all() for place in places])
    scores = []
    for topic in TOPICS:
        y = topic_of == topic
        scores.append(probe_by_hand(mean[side], mean[~side], y[side], y[~side], range(64), 5))
    close(found["doc_topic"]["whole"]["5"], np.mean(scores), floor=2e-3)
    lead, rest = (found["token_topic"][group]["5"] for group in ("lead", "rest"))
    close(means(base)["separation_topic"], lead - rest, 1e-4)


def test_the_probe_of_token_classes_equals_a_slow_probe(consistency, hand, in_train, bpe):
    found = consistency["probes"]["by_class"]["token_class"]
    train = hand.ok & in_train
    test = hand.ok & ~in_train
    text = [bpe.decode([i]) for i in range(VOCABULARY)]
    classes = {
        "word_part": [t[:1].isalpha() and t.isalpha() for t in text],
        "punctuation": [bool(t.strip()) and not any(map(str.isalnum, t)) for t in text],
        "digit": [t.strip().isdigit() for t in text],
        "capitalised": [t.strip()[:1].isupper() for t in text]}
    for name, member in classes.items():
        y = np.array(member)[hand.tokens]
        if min(y[train].sum(), y[test].sum()) < 2:
            assert name not in found, "too few to say"
            continue
        value = probe_by_hand(hand.f[train], hand.f[test], y[train], y[test], range(64), 5)
        close(found[name]["5"], value, floor=2e-3)
    assert len(found) >= 3
    whole = consistency["probes"]["token_class"]["whole"]["20"]
    close(whole, np.mean([scores["20"] for scores in found.values()]), 1e-4)


def id_accuracy_by_hand(f, order):
    """Accuracy of a multinomial probe for which document, 25 lines each, a line of f comes from."""
    train, test = np.split(order, [int(0.75 * len(order))])
    y = np.repeat(np.arange(len(f) // 25), 25)
    columns = set()
    for number in range(len(f) // 25):
        here = y[train] == number
        gap = f[train][here].mean(0) - f[train][~here].mean(0)
        columns |= set(np.argsort(-gap, kind="stable")[:5].tolist())
    f = f[:, sorted(columns)]
    probe = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(C=0.1, max_iter=1000))
    return probe.fit(f[train], y[train]).score(f[test], y[test])


def test_document_id_equals_a_slow_probe(consistency, hand):
    """Documents with 40 tokens or more, the last 25 of each, split 75/25, drawn four times."""
    found = consistency["probes"]["document_id"]
    flat = hand.doc.ravel()
    numbers, size = np.unique(flat[flat > 0], return_counts=True)
    numbers = numbers[size >= 40]
    n = min(len(numbers), 120)
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(4):
        chosen = rng.permutation(numbers)[:n]
        tokens = np.concatenate([np.flatnonzero(flat == number)[-25:] for number in chosen])
        scores.append(id_accuracy_by_hand(hand.f.reshape(-1, 64)[tokens], rng.permutation(n * 25)))
    assert found["documents"] == n > 10
    close(found["chance"], 1 / n, 1e-4)
    close(found["accuracy"], np.mean(scores), floor=0.02)


def test_the_linear_limit_equals_another_solver(consistency, hand):
    found = consistency["linear_limit"]
    numbers = np.unique(hand.doc[hand.ok])
    half = np.random.default_rng(0).permutation(len(numbers)) < len(numbers) / 2
    fitted = np.isin(hand.doc, numbers[half])
    x = hand.x - hand.x[fitted].mean(0)
    pairs = [pair for pair in hand.pairs(16) if fitted[pair[0], pair[1]]]
    lagged = sum(np.outer(x[r, t], x[r, u]) for r, t, u in pairs) / len(pairs)
    covariance = x[fitted].T @ x[fitted] / fitted.sum()
    covariance += 1e-4 * np.trace(covariance) / D_IN * np.eye(D_IN)
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors / np.sqrt(values)
    slow = whiten @ np.linalg.eigh(whiten.T @ (lagged + lagged.T) / 2 @ whiten)[1][:, ::-1]
    z = x @ slow[:, :10]
    for at, lag in enumerate(found["lags"]):
        pairs = [pair for pair in hand.pairs(lag) if not fitted[pair[0], pair[1]]]
        row, left, right = (list(part) for part in zip(*pairs))
        rho = [correlation(z[row, left, i], z[row, right, i]) for i in range(10)]
        close(found["mean"]["10"][at], np.mean(rho), 1e-3, 1e-3)
    assert found["fitted_at"] == 16 and set(found["mean"]["50"]) == {None}, "d_in is 32"


def test_the_boundary_equals_a_loop_over_places(consistency, hand):
    found = consistency["boundary"]
    distance = {True: [], False: []}  # at joins of two documents, and inside one

    def look(r, before, after, join):
        a = hand.f[r, before, :16].mean(0)
        b = hand.f[r, after, :16].mean(0)
        size = np.linalg.norm(a) * np.linalg.norm(b)
        distance[join].append(1 - (a @ b / size if size > 0 else 0))

    segments = [*hand.segments(), (-1, [])]
    for (r, piece), (next_row, following) in zip(segments, segments[1:]):
        for cut in range(8, len(piece) - 7, 8):
            look(r, piece[cut - 8 : cut], piece[cut : cut + 8], False)
        if next_row == r and min(len(piece), len(following)) >= 8:
            look(r, piece[-8:], following[:8], True)
    assert [found["joins"], found["inside"]] == [len(distance[True]), len(distance[False])]
    is_join = np.arange(sum(map(len, distance.values()))) < found["joins"]
    close(found["lead"], roc_auc_score(is_join, distance[True] + distance[False]), floor=1e-3)


def test_the_null_is_what_tokens_permuted_inside_their_segment_give(consistency, hand):
    """Its expectation has a closed form: every pair of a segment is as likely as any other."""
    kept = (hand.f[hand.ok] != 0).sum(0) >= 20
    for lag, at in ((1, 0), (4, 2)):
        sums = np.zeros((4, 64))  # of f_s f_t, of f, of f^2, number of pairs
        for r, piece in hand.segments():
            n = len(piece)
            total = hand.f[r, piece].sum(0)
            square = (hand.f[r, piece] ** 2).sum(0)
            product = (total**2 - square) / max(n * (n - 1), 1)
            sums += max(n - lag, 0) * np.array([product, total / n, square / n, np.ones(64)])
        product, mean, square = sums[:3] / sums[3]
        rho = ((product - mean**2) / (square - mean**2))[kept]
        close(consistency["autocorr_null"]["whole"]["mean"][at], rho.mean(), floor=0.03)
    rho, null = (consistency[name]["whole"]["mean"][0] for name in ("autocorr", "autocorr_null"))
    assert rho > null + 0.03, "order means nothing here"
    seg = evaluate.segment_ids(hand.doc)
    order = evaluate.permute_segments(seg, np.random.default_rng(0))
    assert sorted(order) == list(range(seg.size)) and (seg[order] == seg).all()
    assert (order[seg < 0] == np.flatnonzero(seg < 0)).all()


def test_as_many_of_the_best_latents_are_the_measure_of_the_lead(base, consistency):
    rho = [value for value in consistency["latents"]["autocorr_16"] if value is not None]
    close(means(base)["autocorr_16_best"], np.mean(sorted(rho)[-16:]), floor=2e-3)


# -- SAEs whose scores are known


def test_the_identity_scores_exactly_one(work, tiny):
    eye = torch.eye(D_IN)
    tensors = {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye]),
               "b_enc": torch.zeros(2 * D_IN), "b_dec": torch.zeros(D_IN)}
    folder = save_foreign(work / "known" / "identity", tensors, architecture="standard")
    core = read(judged(folder, tiny) / "core.json")
    ours = core["eval_result_unstructured"]["ours"]
    theirs = {}
    for block in core["eval_result_metrics"].values():
        theirs |= block
    names = ["explained_variance", "cossim", "l2_ratio", "relative_reconstruction_bias",
             "ce_loss_score", "kl_div_score"]
    assert {name: ours[name] for name in names} == dict.fromkeys(names, 1.0)
    names.append("explained_variance_legacy")
    assert {name: theirs[name] for name in names} == dict.fromkeys(names, 1.0)
    assert ours["mse"] == theirs["mse"] == theirs["kl_div_with_sae"] == 0


def test_predicting_the_mean_explains_nothing_and_zero_less(work, tiny, hand):
    silent = {"W_enc": torch.zeros(D_IN, 48), "W_dec": torch.eye(48, D_IN),
              "b_enc": -torch.ones(48), "b_dec": torch.zeros(D_IN)}
    mean = silent | {"b_dec": torch.from_numpy(hand.x[hand.ok].mean(0)).float()}
    folder = save_foreign(work / "known" / "mean", mean, architecture="standard")
    assert means(judged(folder, tiny))["explained_variance"] == pytest.approx(0, abs=1e-5)
    folder = save_foreign(work / "known" / "zero", silent, architecture="standard")
    out = judged(folder, tiny)
    ours = read(out / "core.json")["eval_result_unstructured"]["ours"]
    assert ours["explained_variance"] < 0
    assert ours["cossim"] == ours["l0"] == ours["frac_alive"] == 0
    # codes that never fire have no correlation: null and a reason, never NaN or -1
    found = read(out / "consistency.json")
    assert ours["relative_reconstruction_bias"] is None and found["notes"]["autocorr"]
    assert found["autocorr"]["whole"]["mean"][0] is None
    assert [found[name] for name in ("clusters", "redundancy", "latents")] == [None] * 3
    assert all(map(math.isfinite, means(out).values()))


@pytest.mark.parametrize("copies", [1, evaluate.PARTNERS, evaluate.PARTNERS + 1])
def test_copied_latents_are_found_redundant_and_together(work, base, core, tiny, copies):
    density = [row["feature_density"] for row in core["eval_result_details"]]
    order = np.argsort(-np.array(density), kind="stable").tolist()
    block = {order[2], *order[-copies:]}  # a busy latent and its copies in place of idle ones
    w = weights(base)
    for i in block:
        w["W_enc"][:, i] = w["W_enc"][:, order[2]]
        w["W_dec"][i] = w["W_dec"][order[2]]
        w["b_enc"][i] = w["b_enc"][order[2]]
    out = judged(save_foreign(work / "known" / f"{copies} copies", w), tiny)
    found = read(out / "consistency.json")["redundancy"]
    assert (copies + 1) / found["latents"] <= found["share_above_0.9"] < 0.7
    crowd = copies > evaluate.PARTNERS  # so many partners, not more
    assert len(block & set(found["together"])) == crowd * len(block)
    assert (found["together_mass_share"] > 0) >= crowd
    assert means(out)["together"] == len(found["together"])


@pytest.mark.parametrize("firings", [19, 20])
def test_latents_that_fire_less_than_20_times_do_not_count(work, base, tiny, hand, firings):
    w = weights(base)
    i = int((hand.f[hand.ok] > 0).sum(0).argmax())
    pre = np.sort(hand.f[hand.ok][:, i])
    w["threshold"][i] = (pre[-firings] + pre[-firings - 1]) / 2
    out = judged(save_foreign(work / "known" / f"{firings} firings", w), tiny)
    assert read(out / "consistency.json")["groups"]["whole"]["scored"] == 44 + firings


def test_matching_across_seeds_undoes_a_permutation():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 8, generator=generator)
    order = torch.randperm(40, generator=generator)
    close(evaluate.pw_mcc([W, 3 * W[order]]), [1])
    assert evaluate.pw_mcc([W, torch.randn(40, 8, generator=generator)])[0] < 0.95


SAEBENCH = """eval_type_id eval_config eval_id datetime_epoch_millis eval_result_metrics
    eval_result_details sae_bench_commit_hash sae_lens_id sae_lens_release_id sae_lens_version
    sae_cfg_dict eval_result_unstructured"""


def test_core_json_has_the_keys_of_saebench(core):
    """Those of the metrics are compared one by one above."""
    assert set(core) == set(SAEBENCH.split()) and core["eval_type_id"] == "core"
    assert len(core["eval_result_details"]) == 64 and len(core["eval_result_metrics"]) == 7


@pytest.mark.parametrize("labels, scored", [([0, 1], {"0", "1"}), ([{"a": 1}, ["b"]], set()),
                                            ([None, "Uncategorized"], set())], ids=str)
def test_topics_are_scored_as_they_come_and_no_run_fails_for_them(work, base, labels, scored):
    """Class 0 counts; lists, dicts and Uncategorized are no topic."""
    rows = []
    for number, row in enumerate(STORIES):
        rows.append({"text": row["text"], "topic": labels[row["topic"] == "law"]})
    name = hashlib.sha256(str(labels).encode()).hexdigest()[:8]
    path = write(work / f"labelled_{name}.jsonl", json_lines(rows))
    out = work / "labelled" / name
    words = ["--dataset", str(path), "--out", str(out), "--reconstruction_rows", "1"]
    assert evaluate.main([str(base), *words]) == 0
    found = read(out / "consistency.json")["probes"]["by_class"]
    assert set(found["token_topic"]) == set(found["doc_topic"]) == scored
    assert ("token_topic_5" in means(out)) == bool(scored)


def test_latents_json_says_what_the_codes_say(base, hand):
    """Rows, documents and passages of the page against the codes by hand."""
    page = read(base / "latents.json")
    assert [page[key] for key in ("run", "lead", "d_sae")] == ["base", 16, 64]
    assert page["headline"].keys() == means(base).keys() and len(page["rows"]) == 88
    f = hand.f * hand.ok[..., None]
    assert {entry["i"] for entry in page["latents"]} == set(np.flatnonzero(f.any((0, 1))))
    for entry in page["latents"]:
        own = f[..., entry["i"]]
        close([entry["max"], entry["rate"]], [own.max(), (own != 0).sum() / hand.ok.sum()], 5e-3)
        assert entry["passages"][0]["q"] == "top"
        for passage in entry["passages"]:
            r = passage["row"]
            fired = [t for t in range(passage["from"], passage["to"]) if own[r, t] > 0]
            assert passage["at"] == fired and len(set(hand.doc[r, fired])) == 1
            assert np.allclose(passage["a"], 99 * own[r, fired] / own.max(), atol=1.01)
    assert {text["kind"] for text in page["texts"]} == {"document", "join"}


# ------------------------------------------------------------------------------------------------
# Going on: signals, checkpoints, --resume
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signal_when(ready, number=signal.SIGTERM):
    """While open, a thread sends this process a real signal as soon as ready() is true."""
    if os.name == "nt":
        pytest.skip("Windows has no signals to send")
    over = threading.Event()

    def watch():
        while not over.wait(0.001):
            if ready():
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def n_lines(path):
    """Number of whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stopped_at(out, words, lines, number=signal.SIGTERM):
    """main(words), stopped by a signal when log.jsonl has so many lines. -> exit code"""
    with signal_when(lambda: n_lines(out / "log.jsonl") >= lines, number):
        return experiment.main([*words, "--out_dir", str(out)])


LONG = {"train_tokens": 256 * 250, "log_every": 1, "d_sae": 1024, "auxk_alpha": 0.1,
        "dead_tokens": 2500}
STOPS = {  # name: (settings, lines of the log at which a SIGTERM comes)
    "early and late": ({}, [3, 33, 95]),
    "over two seeds": ({"n_seeds": 2}, [200, 300]),
    "a harvest in parts": ({"cache_gb": 0.0004}, [20, 70]),
    "topk": ({"sparsity": "topk"}, [100]),
}


@pytest.mark.parametrize("name", STOPS)
def test_resuming_is_exact(work, run, quick, name):
    """Stopped at whatever step, a run ends with the same weights, log and scores."""
    changes, stops = STOPS[name]
    whole = run(f"whole {name}", quick, **LONG | changes)
    out = work / f"stopped {name}"
    words = argv(quick, **LONG | changes)
    for lines in stops:
        resume = ["--resume"] if out.exists() else []
        assert stopped_at(out, words + resume, lines) == 143
        assert (out / "checkpoint" / "state.pt").exists() and not (out / "core.json").exists()
    assert experiment.main([*words, "--out_dir", str(out), "--resume"]) == 0
    for seed in range(changes.get("n_seeds", 1)):
        assert weight_hash(out, seed) == weight_hash(whole, seed)
    assert log_of(out) == log_of(whole) and any("auxk" in line for line in log_of(whole))
    assert read(out / "final_info.json") == read(whole / "final_info.json")
    assert not (out / "checkpoint").exists() and not list(out.rglob("*.part"))


def test_a_harvest_in_parts_trains_as_well(run, quick):
    """Three parts, each passed over once and let go."""
    recon = []
    for name in ("early and late", "a harvest in parts"):
        log = log_of(run(f"whole {name}", quick, **LONG | STOPS[name][0]))
        recon.append(np.mean([line["recon"] for line in log[-20:]]))
    close(recon[1], recon[0], rel=0.05)


def test_a_stop_while_harvesting_leaves_no_run_and_loses_no_shard(work, quick, capsys):
    out = work / "stopped_harvest"
    cache = work / "stopped_harvest_cache"
    words = argv(quick, out_dir=out, cache_dir=cache)
    with signal_when(lambda: list(cache.glob("acts-*/*.safetensors"))):
        assert experiment.main(words) == 143
    assert not out.exists() and "go on with the same command\n" in capsys.readouterr().err
    kept = {shard: shard.stat().st_mtime_ns for shard in cache.glob("acts-*/*.safetensors")}
    assert experiment.main(words) == 0 and kept
    assert all(shard.stat().st_mtime_ns == then for shard, then in kept.items())


def test_ctrl_c_stops_a_loop_of_runs_and_handlers_are_restored(work, quick, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        stopped_at(work / "ctrl_c", argv(quick, **LONG), 5, signal.SIGINT)
    assert "the same command and --resume" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_file_is_written_whole_or_not_at_all(work):
    path = write(work / "whole" / "file", "old")

    def fail(part):
        part.write_text("half of it")
        raise OSError("no space left")

    with pytest.raises(OSError):
        prepare.write_whole(path, fail)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    with open(path) as reader:
        prepare.write_whole(path, lambda part: part.write_text("new"))
        assert reader.read() == "old" and path.read_text() == "new"


@pytest.mark.parametrize("damage", ["pickle", "cut", "text", "other"])
def test_a_bad_checkpoint_is_refused(work, quick, damage, capsys):
    out = work / f"checkpoint_{damage}"
    marker = work / f"checkpoint_marker_{damage}"
    assert stopped_at(out, argv(quick, **LONG), 2) == 143
    state = out / "checkpoint" / "state.pt"
    if damage == "pickle":
        state.write_bytes(pickle.dumps(Evil(marker)))
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "text":
        state.write_text("hello")
    else:
        torch.save({"seed": 0, "step": 3}, state)
    before = tree_hash(out)
    words = argv(quick, **LONG, out_dir=out, resume=True)
    refused(capsys, 1, "checkpoint", experiment.main, words)
    assert tree_hash(out) == before and not marker.exists(), "foreign code ran"


def test_resume_refuses_what_changed_by_name(work, quick, bpe, capsys):
    """Settings, the text, the model, the source."""
    text = write(work / "resumed.jsonl", json_lines(STORIES))
    model = save_lm(work / "resumed_lm", random_lm("llama"), tokenizer_of(bpe))
    out = work / "resumed"
    settings = quick | LONG | {"dataset": text, "model": model}
    assert stopped_at(out, argv(settings), 5) == 143
    settings |= {"out_dir": out, "resume": True}
    before = tree_hash(out)
    for changes, names in (({"k": 5}, "k"), ({"d_sae": 128, "lr": 1}, "d_sae, lr")):
        refused(capsys, 2, f"settings of {names}", experiment.main, argv(settings, **changes))
    write(text, json_lines(STORIES + STORIES[:1]))
    refused(capsys, 2, "text changed", experiment.main, argv(settings))
    save_lm(model, random_lm("llama", seed=1), tokenizer_of(bpe))
    refused(capsys, 2, "model, text changed", experiment.main, argv(settings))
    assert tree_hash(out) == before
    made_by = read(out / "environment.json") | {"experiment_sha256": "of another source"}
    write(out / "environment.json", made_by)
    refused(capsys, 2, "another experiment.py", experiment.main, argv(settings))


def test_what_is_there_is_kept_unless_overwritten(work, run, base, quick, bad, capsys):
    before = [tree_hash(base), tree_hash(bad)]
    refused(capsys, 2, "--overwrite", experiment.main, argv(quick, out_dir=base))
    for flag in ({}, {"overwrite": True}, {"resume": True}):
        words = argv(quick, out_dir=bad / "not_a_run", **flag)
        refused(capsys, 2, "not_a_run", experiment.main, words)
    assert [tree_hash(base), tree_hash(bad)] == before
    out = work / "overwritten"
    shutil.copytree(run("baseline", quick, temp_alpha=0), out)
    write(out / "old", "x")
    assert experiment.main(argv(quick, out_dir=out, seed=7, overwrite=True)) == 0
    assert not (out / "old").exists() and [p.name for p in out.glob("seed_*")] == ["seed_7"]


def test_a_run_at_work_is_left_alone(work, base, tiny, capsys):
    before = tree_hash(base)
    begun = work / "just_begun"  # harvesting: nothing there but the lock
    begun.mkdir()
    for out, flags in ((base, {"resume": True}), (base, {"overwrite": True}), (begun, {})):
        with FileLock(out / ".lock"):
            for _ in range(2):  # the first refusal must not open the door to the second
                words = argv(tiny, out_dir=out, **flags)
                refused(capsys, 1, "another process", experiment.main, words)
            assert (out / ".lock").exists()
    assert tree_hash(base) == before


def test_bare_names_land_in_runs_and_study_is_the_table_s():
    assert experiment.parse(["--out_dir", "run_4"]).run_dir == HERE / "runs" / "run_4"
    assert experiment.parse(["--out_dir", "~/x"]).run_dir == Path("~/x").expanduser()
    cache = experiment.parse(["--cache_dir", "not_yet_there"]).cache_dir
    assert cache == str(Path("not_yet_there").resolve()), "it would depend on the directory"
    for name in ("study", "", ".", ".."):
        with pytest.raises(ValueError, match="--out_dir"):
            experiment.check(experiment.parse(["--out_dir", name]))


# ------------------------------------------------------------------------------------------------
# What is refused: one sentence, an exit code, nothing left behind
# ------------------------------------------------------------------------------------------------

BAD_TEXTS = {
    "empty.txt": "",
    "short.txt": "one\n\ntwo",
    "special.txt": "\n\n".join(["<bos> <eos>"] * 50),
    "line_each.txt": "\n".join(row["text"] for row in STORIES),
    "latin.txt": b"caf\xe9\n\n" * 900,
    "broken.jsonl": '{"text": "fine"}\n{"text": \n',
    "numbers.jsonl": '{"text": 5}\n{"text": 6}\n',
    "records.jsonl": '{"text": [{"speaker": "x"}]}\n',
    "nested.jsonl": '{"a": {"b": "x"}}\n',
    "bytes.jsonl": b'{"text": "\xff\xfe"}\n',
    "broken.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 99)[:-20],
    "broken.parquet": "PAR1 no more",
    "table.xls": "text\nhello\n",
    "file": "x",
    "folder/x.bin": "",
    "not_a_run/thesis.txt": "ten years of work",
    "not_a_model/x": "",
    "bad_config/config.json": "{",
    "bert/config.json": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "llava/config.json": {"model_type": "llava"},
}


def bad_arrays():
    """{name: array} that cannot be used as activations or masks."""
    x = np.random.default_rng(0).normal(size=(16, 16, 6)).astype(np.float32)
    nan = x.copy()
    nan[3, 2, 1] = np.nan
    return {
        "good": x, "nan": nan, "rank2": x[0], "single": x[:, :1],
        "float64": x.astype(float), "few": x[:7], "odd": x[:, :13], "zero": 0 * x,
        "constant": 0 * x + np.float32(1.7), "fortran": np.asfortranarray(x),
        "mask_shape": np.ones((16, 15), int),
        "mask_one": np.ones((16, 16), int), "mask_negative": -np.ones((16, 16), int)}


def bad_models(folder, lm_dir):
    """Copies of the model, each with something wrong; foreign code would make the file `marker`."""
    whole = load_file(lm_dir / "model.safetensors")
    for name in ("no_weights", "cut_weights", "pickled_weights", "remote_code", "no_specials",
                 "no_head", "no_tokenizer", "small_embedding"):
        shutil.copytree(lm_dir, folder / name)
    del whole["lm_head.weight"]
    save_file(whole, folder / "no_head" / "model.safetensors", {"format": "pt"})
    (folder / "no_weights" / "model.safetensors").unlink()
    (folder / "pickled_weights" / "model.safetensors").unlink()
    evil = {"lm_head.weight": Evil(folder / "marker")}
    torch.save(evil, folder / "pickled_weights" / "pytorch_model.bin")
    file = folder / "cut_weights" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    spec = read(lm_dir / "config.json") | {"model_type": "novel", "auto_map": code}
    write(folder / "remote_code" / "config.json", spec)
    evil = f"import os; os.system('touch {folder}/marker')"
    write(folder / "remote_code" / "evil.py", evil)
    spec = read(lm_dir / "tokenizer_config.json") | {"bos_token": None, "eos_token": None}
    write(folder / "no_specials" / "tokenizer_config.json", spec)
    for file in (folder / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    small = transformers.LlamaConfig(**GROUPED | {"vocab_size": 300})
    lm = transformers.AutoModelForCausalLM.from_config(small)
    lm.save_pretrained(folder / "small_embedding")


@pytest.fixture(scope="session")
def bad(work, lm_dir):
    """A folder of files that cannot be used, each in its own way."""
    folder = work / "bad"
    for name, content in BAD_TEXTS.items():
        write(folder / name, content)
    for name, array in bad_arrays().items():
        np.save(folder / f"{name}.npy", array)
    evil = np.array([Evil(folder / "marker")], dtype=object)
    np.save(folder / "pickle.npy", evil, allow_pickle=True)
    save_file({"a": torch.zeros(9, 4, 3), "b": torch.zeros(2)}, folder / "two.safetensors")
    bad_models(folder, lm_dir)
    return folder


# Refused before a model is loaded: settings, words of the answer
BAD_SETTINGS = {
    "unknown flag": ({"kk": 3}, "--kk"),
    "abbreviated flag": ({"lay": 1}, "--lay"),
    "k zero": ({"k": 0}, "--k"),
    "k above d_sae": ({"k": 65}, "--d_sae"),
    "layer too high": ({"layer": 3}, "layers 0 to 2"),
    "layer negative": ({"layer": -1}, "--layer"),
    "window above chunk": ({"window": 9}, "--chunk_size"),
    "window zero": ({"window": 0}, "--window"),
    "chunk does not divide context": ({"chunk_size": 10, "batch_size": 250}, "--context_size"),
    "chunk does not divide batch": ({"batch_size": 100}, "--batch_size"),
    "context beyond the model": ({"context_size": 128}, "64 positions"),
    "lr nan": ({"lr": "nan"}, "--lr"),
    "temporal_fraction above one": ({"temporal_fraction": 1.5}, "--temporal_fraction"),
    "unknown sparsity": ({"sparsity": "relu"}, "batchtopk"),
    "l1 with gelu": ({"sparsity": "l1", "nonlinearity": "gelu"}, "relu"),
    "unknown loss": ({"temp_loss": "magic"}, "window_mean"),
    "one chunk": ({"batch_size": 8}, "window_infonce"),
    "one chunk for a control": (
        {"batch_size": 8, "temp_loss": "window_mean", "control": "other_docs"}, "other_docs"),
    "control of another loss": ({"control": "permuted", "temp_loss": "sqdiff"}, "--control"),
    "unknown device": ({"device": "abacus"}, "--device"),
    "cuda that is not there": ({"device": "cuda"}, "CUDA"),
    "flag with a value": ({"layernorm": "yes"}, "yes"),
    "seed too large": ({"seed": 2**70}, "--seed"),
    "no rows for other metrics": ({"eval_rows": 8, "reconstruction_rows": 8}, "--eval_rows"),
    "mask without acts": ({"acts_mask": "x.npy"}, "--acts_mask"),
    "unknown encoding": ({"encoding": "klingon"}, "unknown encoding"),
    "resume and overwrite": ({"resume": True, "overwrite": True}, "exclude"),
    "resume nothing": ({"resume": True}, "no run"),
    "out_dir a file": ({"out_dir": "{bad}/file"}, "--out_dir"),
    "acts missing": ({"acts": "{bad}/missing.npy"}, "no such file"),
    "model missing": ({"model": "/no/such/model"}, "--model"),
    "model a file": ({"model": "{bad}/file"}, "--model"),
    "model without config": ({"model": "{bad}/not_a_model"}, "--model"),
    "model config broken": ({"model": "{bad}/bad_config"}, "--model"),
    "model wants its own code run": ({"model": "{bad}/remote_code"}, "--model"),
    "model BERT": ({"model": "{bad}/bert"}, "BertForMaskedLM, not a causal"),
    "model LLaVA": ({"model": "{bad}/llava"}, "not a causal"),
    "text missing": ({"dataset": "./missing.jsonl"}, "missing.jsonl"),
    "text empty": ({"dataset": "{bad}/empty.txt"}, "holds no text"),
    "text of another kind": ({"dataset": "{bad}/table.xls"}, ".jsonl"),
    "text in another encoding": ({"dataset": "{bad}/latin.txt"}, "--encoding"),
    "folder without text": ({"dataset": "{bad}/folder"}, "folder holds no file"),
    "no such split": ({"split": "test"}, "--split"),
    "no such column": ({"text_field": "body"}, "the columns are text, topic"),
    "nested column": ({"dataset": "{bad}/nested.jsonl"}, "the columns are a"),
    "lines of numbers": ({"dataset": "{bad}/numbers.jsonl"}, "--text_field text is no text"),
    "records without content": ({"dataset": "{bad}/records.jsonl"}, "holds no text"),
    "parquet broken": ({"dataset": "{bad}/broken.parquet"}, "broken.parquet cannot be read"),
}
# Refused once the data or the model have been looked at
GOOD = {"acts": "{bad}/good.npy"}
BAD_DATA = {
    "weights cut": ({"model": "{bad}/cut_weights"}, "its weights cannot be loaded"),
    "weights pickled": ({"model": "{bad}/pickled_weights"}, "its weights cannot be loaded"),
    "no LM head": ({"model": "{bad}/no_head"}, "lm_head.weight"),
    "no tokenizer": ({"model": "{bad}/no_tokenizer"}, "tokenizer"),
    "tokenizer without BOS": ({"model": "{bad}/no_specials"}, "BOS"),
    "embedding too small": ({"model": "{bad}/small_embedding"}, "beyond the 300 of the model"),
    "text too short": ({"dataset": "{bad}/short.txt"}, "held-out rows (--eval_rows)"),
    "text all special": ({"dataset": "{bad}/special.txt"}, "--dataset"),
    "one document a line": ({"dataset": "{bad}/line_each.txt"}, "blank line parts documents"),
    "lines broken": ({"dataset": "{bad}/broken.jsonl"}, "broken.jsonl cannot be read"),
    "lines of bytes": ({"dataset": "{bad}/bytes.jsonl"}, "--encoding"),
    "gzip cut": ({"dataset": "{bad}/broken.jsonl.gz"}, "broken.jsonl.gz cannot be read"),
    "batch above the harvest": ({"batch_size": 8192 * 4}, "--batch_size"),
    "cache too small": ({"cache_gb": 1e-6}, "--cache_gb"),
    "acts of rank 2": ({"acts": "{bad}/rank2.npy"}, "(N,T,d_in)"),
    "acts of single tokens": ({"acts": "{bad}/single.npy"}, "two at least"),
    "acts float64": ({"acts": "{bad}/float64.npy"}, "float32"),
    "acts with NaN": ({"acts": "{bad}/nan.npy"}, "NaN"),
    "acts too few": ({"acts": "{bad}/few.npy"}, "8 are needed"),
    "acts rows of odd length": ({"acts": "{bad}/odd.npy"}, "--chunk_size"),
    "acts all zero": ({"acts": "{bad}/zero.npy", "batch_size": 64}, "ordinary token"),
    "acts constant": ({"acts": "{bad}/constant.npy", "batch_size": 64}, "no variance"),
    "acts pickled": ({"acts": "{bad}/pickle.npy"}, "--acts"),
    "acts in Fortran order": ({"acts": "{bad}/fortran.npy"}, "ascontiguousarray"),
    "acts of two tensors": ({"acts": "{bad}/two.safetensors"}, "a, b"),
    "mask of another shape": (GOOD | {"acts_mask": "{bad}/mask_shape.npy"}, "(16, 16)"),
    "mask negative": (GOOD | {"acts_mask": "{bad}/mask_negative.npy"}, "document's number"),
    "mask of one document": (GOOD | {"acts_mask": "{bad}/mask_one.npy"}, "too few documents"),
    "mask pickled": (GOOD | {"acts_mask": "{bad}/pickle.npy"}, "--acts_mask"),
}


@pytest.mark.parametrize("name", [*BAD_SETTINGS, *BAD_DATA])
def test_what_cannot_work_is_refused_and_leaves_nothing_behind(work, quick, bad, capsys, name):
    """Of BAD_SETTINGS none gets as far as loading the model, which could not be loaded."""
    if name.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    changes, words = (BAD_SETTINGS | BAD_DATA)[name]
    changes = {key: value.format(bad=bad) if isinstance(value, str) else value
               for key, value in changes.items()}
    settings = quick | {"out_dir": work / "refused"}
    if name in BAD_SETTINGS:
        settings["model"] = bad / "no_weights"
    before = tree_hash(bad)
    refused(capsys, 2, words, experiment.main, argv(settings, **changes))
    assert not (work / "refused").exists(), "the corrected command would be blocked"
    assert tree_hash(bad) == before, "foreign code ran, or something was written"


def test_without_a_network_the_sentence_names_what_needs_none(work, quick, capsys):
    for changes in ({"model": "someone/a-model"}, {"dataset": "someone/a-text"}):
        words = argv(quick, out_dir=work / "refused", **changes)
        refused(capsys, 1, "for the embedded one", experiment.main, words)
        assert not (work / "refused").exists()


def test_wheels_are_checked_and_never_executed(work, monkeypatch, capsys):
    """No index; a wheel with other bytes; a source package, which pip would have to execute."""
    (requirement,) = prepare.EMBEDDED[prepare.EMBEDDED_TEXT].wheels
    name, version = requirement.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    index = work / "index"
    index.mkdir()
    for variable, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(index)),
                            ("PIP_CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(variable, value)
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    write(work / "source" / stem / "PKG-INFO", about)
    write(work / "source" / stem / "setup.py", f"open({str(work / 'setup_marker')!r}, 'w')")
    line = ["--out_dir", str(work / "refused"), "--cache_dir", str(work / "wheels_cache")]
    for ending in ("-py3-none-any.whl", ".tar.gz"):
        refused(capsys, 1, "pip cannot fetch", experiment.main, line)
        kind = "gztar" if ending == ".tar.gz" else "zip"
        made = shutil.make_archive(work / "archive", kind, work / "source", stem)
        shutil.move(made, index / f"{stem}{ending}")
    refused(capsys, 1, "pip cannot fetch", experiment.main, line)
    assert not (work / "setup_marker").exists() and not (work / "refused").exists()
    assert not list((work / "wheels_cache").rglob("*.whl"))


def test_a_diverging_run_stops_and_debug_shows_where(work, quick, capsys):
    words = argv(quick, out_dir=work / "diverges", lr=1e38, grad_clip=0, warmup_steps=0)
    refused(capsys, 1, "not finite", experiment.main, words)
    assert experiment.main([*words, "--overwrite", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


BAD_WEIGHTS = {  # (the file that is hurt, or changes of seed_0/cfg.json; part of the answer)
    "cut": ("weights", "seed_0"),
    "flipped": ("weights", "SHA-256"),
    "pickled": ("weights", "seed_0"),
    "no weights": ("weights", "weights"),
    "no cfg": ("cfg.json", "cfg.json"),
    "config broken": ("config.json", "config.json"),
    "another width": ({"d_in": 31}, "seed_0"),
    "a gated SAE": ({"architecture": "gated"}, "gated"),
    "a factor that is nowhere": ({"normalize_activations": "expected_average_only_in"}, "fold it"),
    "no d_sae": ({"d_sae": None}, "cannot be used"),
}


@pytest.mark.parametrize("damage", BAD_WEIGHTS)
def test_damaged_runs_are_refused_and_no_score_is_lost(work, base, damage, capsys):
    what, answer = BAD_WEIGHTS[damage]
    run = shutil.copytree(base, work / "damaged" / damage)
    file = run / "seed_0" / "sae_weights.safetensors"
    whole = file.read_bytes()
    if isinstance(what, dict):
        write(run / "seed_0" / "cfg.json", read(run / "seed_0" / "cfg.json") | what)
    elif damage == "cut":
        file.write_bytes(whole[:-50])
    elif damage == "flipped":
        file.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:])
    elif damage == "pickled":
        file.write_bytes(pickle.dumps(Evil(work / "weights_marker")))
    elif damage == "config broken":
        write(run / "config.json", "{")
    else:
        {"no weights": file, "no cfg": run / "seed_0" / "cfg.json"}[damage].unlink()
    before = tree_hash(run)
    refused(capsys, 2, answer, evaluate.main, [str(run)])
    assert tree_hash(run) == before and not (work / "weights_marker").exists()


BAD_SCORING = {  # words of the command line, part of the answer
    "unknown flag": ("{base} --fast", "--fast"),
    "too many rows for CE": ("{base} --reconstruction_rows 96 --out {bad}/scores", "96"),
    "model gone": ("{base} --model /gone --out {bad}/scores", "/gone"),
    "layer out of range": ("{base} --layer 9 --out {bad}/scores", "--layer 9"),
    "over its own scores": ("{base} --reconstruction_rows 2", "give --out FOLDER"),
    "one seed, over the run's scores": ("{base}/seed_0", "score the run"),
}


@pytest.mark.parametrize("name", BAD_SCORING)
def test_bad_scoring_is_refused_and_overwrites_nothing(base, bad, name, capsys):
    words, answer = BAD_SCORING[name]
    before = [tree_hash(base), tree_hash(bad)]
    line = words.format(base=base, bad=bad).split()
    refused(capsys, 2, answer, evaluate.main, line)
    assert [tree_hash(base), tree_hash(bad)] == before


def test_another_model_and_other_text_are_scored_and_named(work, base, bpe, capsys):
    folder = save_lm(work / "other_lm", random_lm("llama", seed=5), tokenizer_of(bpe))
    text = write(work / "other_stories.jsonl", json_lines([story(i) for i in range(500, 900)]))
    out = work / "scored_otherwise"
    words = ["--model", str(folder), "--dataset", str(text), "--out", str(out)]
    assert evaluate.main([str(base), *words]) == 0
    assert "note: scored with model other_lm" in capsys.readouterr().err
    record = read(out / "core.json")["eval_result_unstructured"]
    assert record["scored_on"]["model"] == "other_lm" and "other_lm" in record["notes"]["settings"]
    assert record["scored_on"]["dataset"] == "other_stories.jsonl"
    capsys.readouterr()
    fewer = shutil.copytree(out, work / "fewer_sample_rows")
    judge = read(out / "consistency.json")
    judge["counts"]["sample_rows"] -= 16
    write(fewer / "consistency.json", json.dumps(judge))
    plot.main(["--compare", str(base), str(out), str(fewer)])
    printed = capsys.readouterr().out
    names = f"note: {out.name} and base were scored"
    assert f"{names} on model other_lm and lm" in printed and f"{names} on the rows" in printed
    assert f"{names} with sample_rows" not in printed
    assert "note: fewer_sample_rows and base were scored with sample_rows" in printed


# ------------------------------------------------------------------------------------------------
# Several processes, and processes that die
# ------------------------------------------------------------------------------------------------

OURS = ("prepare", "evaluate", "experiment", "train", "plot", "bench")


def child(words, report, how):
    """A script in a process of its own, its output in a file. `how`: which one, what trouble."""
    file = os.open(report, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    os.environ.update(how.get("environ", {}))
    os.chdir(how.get("cwd", HERE))
    import resource  # not on Windows
    if "memory" in how:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + how["memory"],) * 2)
    if "file_size" in how:
        resource.setrlimit(resource.RLIMIT_FSIZE, (how["file_size"],) * 2)
    for name in OURS:
        sys.modules.pop(name, None)  # they read RANK when they are imported
    for name in how.get("without", ()):
        sys.modules[name] = None
    sys.path.insert(0, str(how.get("folder", HERE)))
    script = how.get("script", "experiment")
    sys.argv = [f"{script}.py", *words]
    try:
        code = importlib.import_module(script).main()
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


@pytest.fixture(scope="session")
def processes(work):
    """processes(words, report, **how) -> a process that runs `python script.py words`.

    It is forked from one that has imported torch already. All end with the session.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no forkserver")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "test_smoke", "transformers.models.llama.modeling_llama",
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


def said(report):
    """What the processes with this report have printed."""
    return report.read_text(errors="replace") if report.exists() else ""


def ended(started, report, code=0):
    """Wait for processes; all must give this exit code."""
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [code] * len(started), said(report)[-1500:]


def wait_until(ready, process, report):
    """Poll until ready(); the process must not end before."""
    while not ready() and process.is_alive():
        time.sleep(0.002)
    assert ready(), said(report)[-1500:]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_gives_its_exit_code(work, quick, processes, number, code):
    out = work / f"signal_{code}"
    report = work / f"signal_{code}.txt"
    process = processes(argv(quick, **LONG, out_dir=out), report)
    wait_until(lambda: n_lines(out / "log.jsonl") > 2, process, report)
    os.kill(process.pid, number)
    ended([process], report, code)
    assert "the same command and --resume" in said(report) and "Traceback" not in said(report)
    state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == n_lines(out / "log.jsonl")


def test_killed_at_random_a_run_still_ends_the_same(work, run, quick, processes):
    """SIGKILL: between steps, in a checkpoint, in the log. The last checkpoint is always whole."""
    out = work / "killed"
    report = work / "killed.txt"
    rng = random.Random(0)
    words = argv(quick, **LONG, checkpoint_minutes=1e-4, out_dir=out)
    for kill in range(4):
        process = processes(words + ["--resume"] * (kill > 0), report)
        before = n_lines(out / "log.jsonl")
        wait_until(lambda: n_lines(out / "log.jsonl") != before, process, report)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        state = out / "checkpoint" / "state.pt"
        assert not state.exists() or torch.load(state, weights_only=True)["step"] > 0
    ended([processes([*words, "--resume"], report)], report)
    whole = run("whole early and late", quick, **LONG)
    assert weight_hash(out) == weight_hash(whole) and log_of(out) == log_of(whole)
    assert not list(out.rglob("*.part"))


TROUBLE = {"no memory": ({"d_sae": 20_000_000}, {"memory": 10**9}, "--d_sae"),
           "no room for a file": ({}, {"file_size": 200_000}, "error: ")}


@pytest.mark.parametrize("name", TROUBLE)
def test_a_machine_that_is_too_small_is_said_in_a_sentence(work, quick, processes, name):
    changes, how, words = TROUBLE[name]
    cache = work / name / "cache"
    report = work / f"{name}.txt"
    settings = quick | {"out_dir": work / name / "run", "cache_dir": cache, "overwrite": True}
    ended([processes(argv(settings, **changes), report, **how)], report, 1)
    assert words in said(report).splitlines()[-1] and "Traceback" not in said(report)
    assert not list(cache.rglob("*.part"))
    ended([processes(argv(settings), report)], report)


def test_two_runs_make_one_cache_at_the_same_time(work, quick, processes):
    cache = work / "one_cache"
    report = work / "one_cache.txt"
    outs = [work / "at_once_0", work / "at_once_1"]
    started = [processes(argv(quick, out_dir=out, cache_dir=cache), report) for out in outs]
    ended(started, report)
    assert weight_hash(outs[0]) == weight_hash(outs[1]) and log_of(outs[0]) == log_of(outs[1])
    assert not list(cache.glob("acts-*/*.lock")) and not list(cache.rglob("*.part"))


def ranks(processes, words, report):
    """What torchrun does: two processes that know of each other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    started = []
    for rank in ("0", "1"):
        environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(processes(words, report, environ=environ))
    return started


def test_two_processes_train_the_topk_weights_of_one(work, run, own, processes):
    """Each takes its share of the chunks; with topk that changes nothing but the order of sums."""
    settings = own | {"sparsity": "topk", "temp_alpha": 0, "auxk_alpha": 0, "lr": 1e-3}
    one = run("one_process", settings)
    two = work / "two_processes"
    report = work / "two_processes.txt"
    ended(ranks(processes, argv(settings, out_dir=two), report), report)
    theirs = weights(two)
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-4), name
    assert len(log_of(two)) == len(log_of(one))
    assert said(report).count("run directory:") == 2, "the first process alone speaks, twice"


# Each process has negatives of its own share alone, so the contrast has a small weight here.
@pytest.mark.parametrize("loss, alpha", [("window_mean", 0.3), ("window_infonce", 0.01)])
def test_two_processes_share_a_harvest_and_are_as_good_as_one(
        work, run, tiny, processes, loss, alpha):
    longer = tiny | {"train_tokens": 256 * 200, "temp_loss": loss, "temp_alpha": alpha}
    one = run(f"long_{loss}", longer)
    two = work / f"two_{loss}"
    cache = work / f"two_cache_{loss}"
    report = work / f"two_{loss}.txt"
    ended(ranks(processes, argv(longer, out_dir=two, cache_dir=cache), report), report)
    for name, floor in (("explained_variance", 0.01), ("ce_loss_score", 0.02), ("l0", 0.1)):
        close(means(two)[name], means(one)[name], floor=floor)
    for shard in cache.glob("acts-*/*.safetensors"):
        theirs = load_file(work / "cache" / shard.parent.name / shard.name)
        assert torch.allclose(load_file(shard)["acts"], theirs["acts"], atol=1e-5)


def test_two_processes_stop_together_and_go_on(work, quick, processes):
    out = work / "stopped_ranks"
    report = work / "stopped_ranks.txt"
    words = argv(quick, **LONG, out_dir=out)
    two = ranks(processes, words, report)
    wait_until(lambda: n_lines(out / "log.jsonl") > 3, two[0], report)
    os.kill(two[1].pid, signal.SIGTERM)  # one of them is enough
    ended(two, report, 143)
    assert 0 < torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] < 250
    ended(ranks(processes, [*words, "--resume"], report), report)
    assert [line["step"] for line in log_of(out)] == list(range(250))


def test_torchrun_itself(work, own):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    words = argv(own, out_dir=work / "torchrun", train_tokens=256 * 5)
    done = subprocess.run([*command, experiment.__file__, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.count("explained_variance:") == 1


# ------------------------------------------------------------------------------------------------
# The commands from any directory; the study
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def scripts(work):
    """A copy of the scripts, so that bare names land in a runs/ of its own."""
    for name in ("experiment.py", "prepare.py", "evaluate.py", "train.py"):
        write(work / "repo" / name, (HERE / name).read_bytes())
    return work / "repo"


def test_trained_here_scored_from_elsewhere(work, scripts, quick, processes):
    """Relative paths in, absolute ones in the record; a bare name means the same everywhere."""
    settings = quick | {"model": "lm", "dataset": "./stories.jsonl", "out_dir": "bare"}
    report = work / "bare.txt"
    ended([processes(argv(settings), report, folder=scripts, cwd=work)], report)
    out = scripts / "runs" / "bare"
    printed = said(report).splitlines()
    assert f"run directory: {out}" in printed and printed[-1].startswith("next: python plot.py")
    assert read(out / "config.json")["model"] == str(work / "lm")
    before = (out / "final_info.json").read_bytes()
    (out / "final_info.json").unlink()
    (work / "elsewhere").mkdir()
    where = {"folder": scripts, "cwd": work / "elsewhere", "script": "evaluate"}
    ended([processes(["bare"], report, **where)], report)
    assert (out / "final_info.json").read_bytes() == before


def test_help_names_every_flag_and_bad_usage_is_one_line(capsys):
    with pytest.raises(SystemExit, match="0"):
        experiment.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{f.name}" in printed for f in experiment.fields(experiment.Config))
    assert experiment.main(["--temp-alpha", "x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--temp-alpha" in error


def test_each_row_of_the_study_is_a_command_that_experiment_accepts():
    assert {"run_0", "run_6", "grid_base"} <= set(train.ALL)
    for name, flags in train.ALL.items():
        words = [*flags.split(), "--out_dir", str(train.folder_of(name))]
        experiment.check(experiment.parse(words))
    assert not experiment.parse(train.ALL["run_0"].split()).temporal
    assert experiment.parse(train.ALL["run_6"].split()).temporal


STUB = '''
import json, os, sys
from pathlib import Path
from types import SimpleNamespace

RUNS = Path(__file__).resolve().parent / "runs"


def parse(words):
    found = {"seed": 0, "n_seeds": 1, "k": 32, "temp_loss": "window_mean", "temp_alpha": 0.3,
             "window": 16, "temporal_fraction": 0.05, "train_tokens": 1, "out_dir": ""}
    for name, value in zip(words, words[1:] + [""]):
        if name.startswith("--"):
            found[name[2:]] = type(found.get(name[2:], ""))(value)
    return SimpleNamespace(**found)


if __name__ == "__main__":
    cfg = parse(sys.argv[1:])
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with open(RUNS / "calls.txt", "a") as calls:
        calls.write(f"{out.name} {sys.argv[-1]}\\n")
    if out.name == os.environ.get("FAIL"):
        sys.exit("error: it went wrong")
    scores = {"l0": [cfg.k + i for i in range(cfg.n_seeds)], "pw_mcc": [0.5]}
    info = {"text": {"means": {}, "stderrs": {}, "final_info_dict": scores}}
    made_by = {f"{name}_sha256": "f" * 64 for name in ("experiment", "prepare", "evaluate")}
    files = {"config": vars(cfg), "environment": made_by, "final_info": info}
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content))
'''


def test_the_study_runs_what_is_missing_and_reports_what_fails(work, scripts, processes):
    """train.py on a stub of experiment.py that only writes the files of a run."""
    folder = shutil.copytree(scripts, work / "study", ignore=shutil.ignore_patterns("runs"))
    write(folder / "experiment.py", STUB)
    runs = folder / "runs"
    report = folder / "report.txt"

    def study(*words, code=0, **environ):
        """-> what train.py printed, the calls of the stub"""
        write(report, "")
        write(runs / "calls.txt", "")
        how = {"script": "train", "folder": folder, "environ": environ}
        ended([processes(words, report, **how)], report, code)
        return said(report), sorted((runs / "calls.txt").read_text().splitlines())

    printed, calls = study("run_0", "k16_base", "grid_base", code=1, FAIL="run_0")
    assert calls == ["grid_base --overwrite", "k16_base --overwrite", "run_0 --overwrite"]
    assert "failed: run_0" in printed and "it went wrong" in printed
    with open(runs / "study.csv", newline="") as file:
        rows = [(row["run"], row["seed"], row["l0"]) for row in csv.DictReader(file)]
    assert rows == [*[("k16_base", str(seed), str(16 + seed)) for seed in range(3)],
                    *[("grid_base", str(seed), str(32 + seed)) for seed in range(3)]]
    assert (runs / "study" / "k16_base").exists() and (runs / "grid" / "grid_base").exists()
    write(runs / "study" / "run_0" / "config.json", "{}")  # begun: it is resumed
    assert study("run_0", "k16_base")[1] == ["run_0 --resume"]
    listed = {}
    for line in study("--list")[0].splitlines():
        listed[line[6:].split()[0]] = line.startswith("done")
    assert listed.keys() == train.ALL.keys() and sum(listed.values()) == 3 and listed["run_0"]
    table = (folder / "train.py").read_text()
    write(folder / "train.py", table.replace("--k 16 --temp_alpha 0", "--k 17 --temp_alpha 0"))
    assert study("k16_base")[1] == ["k16_base --resume"], "its flags changed: it is not done"
    assert ",17," in (runs / "study.csv").read_text()
    assert "no_such_run" in study("no_such_run", code=2)[0]


# ------------------------------------------------------------------------------------------------
# Pictures and the page, from JSON alone; the benchmark
# ------------------------------------------------------------------------------------------------


def grid_rows():
    """Rows of study.csv for the grid of the study, with made-up scores."""
    rows = []
    for name in train.GRID:
        cfg = experiment.parse(train.GRID[name].split())
        gain = math.log2(1 + cfg.window) * cfg.temp_alpha**0.5
        for seed in range(cfg.n_seeds):
            rows.append({
                "run": name, "seed": seed, "temp_loss": cfg.temp_loss, "temp_alpha": cfg.temp_alpha,
                "window": cfg.window, "temporal_fraction": cfg.temporal_fraction, "k": cfg.k,
                "explained_variance": 0.8 - 0.01 * gain, "l0": 32.1, "document_id": 0.1 + gain / 50,
                "token_topic_5": 0.6, "smoothness_S": 0.12 - gain / 99,
                "token_topic_5_lead": 0.6 + gain / 30 + seed / 999})
    return rows


@pytest.fixture(scope="session")
def records(work, base, seeds):
    """A runs/ directory as it is in git, without weights: two runs of the study, one more."""
    runs = work / "records"
    for name, source in (("study/run_0", seeds), ("study/run_6", seeds), ("mine", base)):
        no_weights = shutil.ignore_patterns("*.safetensors", ".lock")
        shutil.copytree(source, runs / name, ignore=no_weights)
    with open(runs / "study.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(grid_rows()[0]))
        writer.writeheader()
        writer.writerows(grid_rows())
    return runs


WITHOUT = {"script": "plot", "without": ["torch", "transformers", "datasets", "sklearn"]}


def test_all_pictures_are_drawn_from_json_alone(work, records, processes):
    report = work / "pictures.txt"
    words = ["--runs_dir", str(records), "--out_dir", str(work / "pictures")]
    ended([processes(words, report, **WITHOUT)], report)
    assert "skipped" not in said(report) and "Warning" not in said(report)
    for name in plot.PICTURES:
        drawn = (work / "pictures" / name).read_bytes()
        assert drawn.startswith(b"\x89PNG") and len(drawn) > 10_000, name
    words = ["--runs_dir", str(work / "no_records"), "--out_dir", str(work / "no_pictures")]
    ended([processes(words, report, **WITHOUT)], report, 1)
    assert "no run in" in said(report)


NASTY = "</script><script>document.title='hurt'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def page(work, records, processes):
    """The page of two runs on a text with markup in it."""
    for name in ("study/run_0", "mine"):
        tree = read(records / name / "latents.json")
        tree["tokens"][tree["rows"][0][1]] = NASTY
        write(records / name / "latents.json", tree)
    report = work / "page.txt"
    words = ["--page", "run_0", "mine", "--runs_dir", str(records), "--out_dir", str(work)]
    ended([processes(words, report, **WITHOUT)], report)
    return records / "mine" / "latents.html"


def test_the_page_is_one_file_and_text_in_it_is_text(page):
    content = page.read_text(encoding="utf-8")
    assert NASTY not in content and content.count("<script") == content.count("</script>") == 2
    (data,) = re.findall('<script id="data" type="application/json">(.*?)</script>', content, re.S)
    assert [run["run"] for run in json.loads(data)["runs"]] == ["seeds", "base"]
    assert NASTY in json.loads(data)["runs"][1]["tokens"]
    assert not re.findall(r'(?:src|href)="https?://', content), "it asks the network for nothing"


VISIT = """<script>
const row = () => document.querySelectorAll("#latents tbody tr:not(.detail)");
const cells = i => [...row()].map(r => r.cells[i].innerText);
const found = {rows: row().length, title: document.title, images: document.images.length};
document.querySelector("#sort-rate").click();
found.rates = cells(1).map(Number);
document.querySelector("#leading").click();
found.lead = cells(0);
document.querySelector("#latents tbody button").click();
found.passages = document.querySelectorAll("tr.detail .passage").length;
found.strips = document.querySelectorAll("#pictures canvas").length;
found.words = document.querySelectorAll("#words .token").length;
document.body.innerHTML = "";
document.body.dataset.found = JSON.stringify(found);
</script></body>"""


def test_a_browser_shows_sorts_and_filters_the_latents(work, page):
    """In a headless chromium, with a script at the page's end that clicks and reads."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    content = page.read_text(encoding="utf-8")
    assert content.count("</body>") == 1
    write(work / "visited.html", content.replace("</body>", VISIT))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={work / 'profile'}", "--dump-dom"]
    command.append((work / "visited.html").as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Uncaught" not in done.stderr, done.stderr[-1500:]
    (answer,) = re.findall('data-found="(.*?)"', done.stdout)
    found = json.loads(html.unescape(answer))
    assert found["rows"] > 10 and found["title"].startswith("Latents of") and found["images"] == 0
    assert found["rates"] == sorted(found["rates"], reverse=True)
    assert found["lead"] and all("◆" in name for name in found["lead"])
    assert found["passages"] >= 1 and found["strips"] == 2 and found["words"] > 10


@pytest.mark.parametrize("kind", bench.KINDS)
def test_the_benchmark_times_a_step_that_trains(kind):
    x, stats = bench.batch_of(bench.synthetic_acts(4, 0)[0])
    step = bench.OurStep(kind, x, stats, 128, 8, matmul_dtype="float32")
    losses = [float(step()["recon"]) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


# ------------------------------------------------------------------------------------------------
# The tables of README.md and notes.txt are those of the committed records
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "notes.txt"])
def test_generated_tables_are_the_committed_ones(name):
    """`python plot.py --tables` changes nothing."""
    changed = subprocess.run(["git", "-C", HERE, "status", "--porcelain", "--", "runs/study",
                              "runs/study.csv"], capture_output=True, text=True).stdout
    text = (HERE / name).read_text(encoding="utf-8")
    if changed or "table: " not in text:
        pytest.skip("the records are not the committed ones" if changed else "no table yet")
    runs = HERE / "runs"
    found = plot.read_records(plot.find_runs(runs), runs)
    assert plot.fill_tables(text, found) == text
