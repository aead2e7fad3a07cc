"""Tests: what the scripts promise, on models of three layers and on text made up here.

    python -m pytest -q test_smoke.py

Offline, on a CPU, in about three minutes. The tests speak to the commands, main([...]), and read the
files that these write; of the functions they call the pure ones, losses and readers. Nothing asserts
a time. In reading order: fixtures, temporal losses, training step, text and models, activations, a
run, the judge, going on after a stop, what is refused, several processes, the other scripts, tables.
"""
import contextlib
import copy
import csv
import doctest
import gzip
import hashlib
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
from tokenizers import ByteLevelBPETokenizer

import evaluate
import experiment
import prepare
import train

HERE = Path(__file__).resolve().parent
D_IN, LAYERS, POSITIONS, VOCABULARY = 32, 3, 64, 400
CHOICES = {f.name: f.metadata["choices"] for f in experiment.fields(experiment.Config)}

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


def read(path):
    """The object in a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


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
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def close(ours, theirs, rel=1e-5, floor=1e-9):
    """Numbers, or dicts and lists of them, are equal up to rounding."""
    assert ours == pytest.approx(theirs, rel=rel, abs=floor)


def refused(capsys, call, code, words):
    """`call` gives this exit code and ONE sentence on stderr that holds `words`; no traceback."""
    capsys.readouterr()
    got = call()
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
def no_test_hangs():
    """An endless loop becomes a failure."""
    def late(*_):
        raise TimeoutError("this test hangs")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(170)
    yield
    signal.alarm(0)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A directory for the session. Caches go there too: no test sees the user's."""
    path = tmp_path_factory.mktemp("work")
    os.environ["TEMPORAL_SAE_CACHE"] = str(path / "cache")
    torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives
    return path


TOPICS = {"sea": "ship wave salt harbour sail tide captain", "law": "judge court trial jury verdict appeal",
          "farm": "cow barn wheat plough hay field tractor"}
COMMON = "the a of and to in it was that with for on at by from as 7 42 Mr Anna , . (".split()


def story(i, n_words=44):
    """(text, topic) of document i: half of its words are of its topic, half everyone's."""
    rng = random.Random(i)
    topic = sorted(TOPICS)[i % 3]
    words = []
    for _ in range(n_words):
        words.append(rng.choice(TOPICS[topic].split() if rng.random() < 0.5 else COMMON))
    return f"{i}: " + " ".join(words), topic


STORIES = [{"text": text, "topic": topic} for text, topic in map(story, range(400))]


def json_lines(rows):
    """Rows -> the text of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE of 400 tokens."""
    made = ByteLevelBPETokenizer()
    texts = [row["text"] for row in STORIES[:90]]
    made.train_from_iterator(texts, VOCABULARY, special_tokens=["<bos>", "<eos>"], show_progress=False)
    return made


def tokenizer_of(bpe, bos="<bos>", eos="<eos>", **special):
    """The tokenizer as transformers knows it."""
    names = {"bos_token": bos, "eos_token": eos, **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)


SHAPE = {"vocab_size": VOCABULARY, "hidden_size": D_IN, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": POSITIONS,
         "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": D_IN, "n_layer": LAYERS, "n_head": 4,
        "n_positions": POSITIONS, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}


def random_lm(kind, seed=0):
    """A causal LM with random weights, wide enough apart that predictions depend on the context."""
    grouped = SHAPE | {"num_key_value_heads": 2}
    config = {
        "gpt2": transformers.GPT2Config(**GPT2),
        "gptneox": transformers.GPTNeoXConfig(**SHAPE),
        "llama": transformers.LlamaConfig(**grouped),
        "gemma2": transformers.Gemma2Config(**grouped, head_dim=8, sliding_window=16),
    }[kind]
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


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
def text(work):
    """400 documents with topics, one JSON a line."""
    (work / "stories.jsonl").write_text(json_lines(STORIES))
    return work / "stories.jsonl"


@pytest.fixture(scope="session")
def tiny(lm_dir, text):
    """Settings of a run that takes a second or two."""
    return {"model": lm_dir, "layer": 1, "dtype": "float32", "device": "cpu", "dataset": text,
            "context_size": 32, "chunk_size": 8, "window": 4, "harvest_tokens": 8192,
            "eval_rows": 96, "reconstruction_rows": 8, "d_sae": 64, "k": 4, "batch_size": 256,
            "train_tokens": 256 * 40, "lr": 3e-3, "warmup_steps": 5, "dead_tokens": 2000,
            "temporal_fraction": 0.25, "log_every": 5, "matmul_dtype": "float32"}


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
def acts_file(work):
    """60 rows of own activations: two of ten directions at a time, four tokens each."""
    rng = np.random.default_rng(0)
    codes = rng.random((60, 4, 10)) * (rng.random((60, 4, 10)) < 0.2)
    x = np.repeat(codes, 4, axis=1) @ rng.normal(size=(10, 12)) + 0.05 * rng.normal(size=(60, 16, 12))
    np.save(work / "acts.npy", x.astype(np.float32))
    return work / "acts.npy"


@pytest.fixture(scope="session")
def own(tiny, acts_file):
    """Settings of a run on own activations."""
    return tiny | {"acts": acts_file, "model": None, "dataset": None, "eval_rows": 12,
                   "reconstruction_rows": 0, "d_sae": 48, "k": 3, "window": 4}


def config(settings, **changes):
    """The Config that main() would make of them."""
    return experiment.parse(argv(settings, **changes))


# ------------------------------------------------------------------------------------------------
# Temporal losses: each against loops over tokens
# ------------------------------------------------------------------------------------------------

N_CHUNKS, T_CHUNK = 16, 8


@pytest.fixture(scope="session")
def chunks():
    """codes (N,T,F) >= 0, x (N,T,d) and doc (N,T): chunks of one document, of two, with gaps."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(N_CHUNKS, T_CHUNK, 6, generator=generator)
    codes = codes * (torch.rand(codes.shape, generator=generator) < 0.6)
    x = torch.randn(N_CHUNKS, T_CHUNK, 5, generator=generator)
    doc = torch.arange(1, N_CHUNKS + 1)[:, None].repeat(1, T_CHUNK)
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


def pair_loss_by_hand(name, codes, doc, window):
    """The losses on pairs, as loops, in float64."""
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
    """Neighbours are each other's positives, every fourth; negatives are of other documents."""
    z = codes.double().numpy()
    pairs = [(n, s, t) for n, s, t in pairs_of(doc, 2) if s % 4 == 0]
    total = 0
    for one, other in ((1, 2), (2, 1)):
        for i in pairs:
            logits = []
            for j in pairs:
                a, b = z[i[0], i[one]], z[j[0], j[other]]
                size = np.linalg.norm(a) * np.linalg.norm(b) if cosine else 1
                if j == i:
                    positive = a @ b / size / temperature
                if j == i or doc[i[0], i[1]] != doc[j[0], j[1]]:
                    logits.append(a @ b / size / temperature)
            total += np.log(np.exp(logits).sum()) - positive
    return total / 2 / len(pairs)


def window_mean_by_hand(x, doc, window):
    """Mean over the OTHER tokens of the same document less than `window` away; NaN if too few."""
    out = np.full(x.shape, np.nan)
    x = x.double().numpy()
    for n, row in enumerate(doc.tolist()):
        for t in range(len(row)):
            others = [x[n, s] for s in range(len(row))
                      if s != t and abs(s - t) < window and row[s] == row[t] > 0]
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


@pytest.mark.parametrize("window", [2, 3, 8])
@pytest.mark.parametrize("name", experiment.PAIR_LOSSES)
def test_a_loss_on_pairs_equals_a_loop_and_crosses_no_document(chunks, name, window):
    codes, _, doc = chunks
    value = experiment.PAIR_LOSSES[name](codes, doc, window).item()
    close(value, pair_loss_by_hand(name, codes, doc, window))
    noise = torch.where(doc[..., None] > 0, codes, 1e3)  # what stands where no token is
    close(experiment.PAIR_LOSSES[name](noise, doc, window).item(), value)


@pytest.mark.parametrize("cosine", [True, False])
def test_infonce_equals_a_loop_and_takes_negatives_of_other_documents(chunks, cosine):
    codes, _, doc = chunks
    codes = codes + 0.01
    value = experiment.infonce_loss(codes, doc, 2, 0.5, cosine).item()
    close(value, infonce_by_hand(codes, doc, 0.5, cosine))


def test_the_window_mean_loss_equals_a_loop(chunks):
    _, x, doc = chunks
    guess, bias = x.flip(0), x[0, 0]
    target, enough = experiment.window_mean(x, doc, 4)
    expected = window_mean_by_hand(x, doc, 4)
    error = spread = 0
    for n, t in enough.nonzero().tolist():
        error += ((expected[n, t] - guess[n, t].numpy()) ** 2).sum()
        spread += ((expected[n, t] - bias.numpy()) ** 2).sum()
    close(experiment.window_mean_loss(guess, target, enough, bias).item(), error / spread)


def test_controls_break_the_order_and_nothing_else(quick, chunks):
    """other_docs: a target of another chunk. permuted: of a random place of the same document."""
    _, _, doc = chunks
    x = doc[..., None].float()  # every token says which document it is of
    target, enough = experiment.window_mean_target(x, doc, config(quick, control="other_docs"), 0)
    whole = (doc == doc[:, :1]).all(1) & (doc > 0).all(1)
    for n in range(1, N_CHUNKS):
        if whole[n] and whole[n - 1]:
            assert enough[n].all() and (target[n] == x[n - 1]).all()
    cfg = config(quick, control="permuted", window=8)
    target, enough = experiment.window_mean_target(x, doc, cfg, 0)
    assert torch.allclose(target[enough], x[enough]), "documents are mixed"
    x = chunks[1]
    found = [experiment.window_mean_target(x, doc, cfg, step)[0] for step in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    plain = experiment.window_mean(x, doc, 8)[0]
    assert torch.allclose(found[0][8].sum(0), plain[8].sum(0), atol=1e-5)  # each token once


def test_scale_and_offset_do_not_lower_the_selective_loss(chunks):
    codes, _, doc = chunks
    codes = codes.clone().requires_grad_()
    (grad,) = torch.autograd.grad(experiment.selective_loss(codes, doc, 3), codes)
    assert abs((grad * codes).sum()) < 1e-6 and grad.sum((0, 1)).abs().max() < 1e-6 < grad.norm()


@pytest.mark.parametrize("module", [experiment, prepare, evaluate], ids=lambda m: m.__name__)
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and (result.attempted > 0 or module is prepare)


# ------------------------------------------------------------------------------------------------
# The training step
# ------------------------------------------------------------------------------------------------


def a_trainer(quick, d_sae=300, **changes):
    """A Trainer with dead latents, and a batch for it: x (256, 64), doc (32, 8), ordinary tokens."""
    settings = {"temp_alpha": 0.5, "grad_clip": 0, "k": 8, "init": "xavier", "window": 3,
                "temporal_fraction": 0.5, "matryoshka_alpha": 0.2}
    cfg = config(quick, d_sae=d_sae, **settings | changes)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    x[1:] += 1.5 * x[:-1]  # neighbours have something in common
    doc = torch.arange(1, 33)[:, None].repeat(1, 8)
    doc[0, 3] = 0
    doc[1, 5:] = 40
    doc[4] = 0
    stats = experiment.Stats(mean=0.1 * torch.ones(64), scale=0.5, variance=100.0, sink_norm=math.inf)
    trainer = experiment.Trainer(cfg, 64, stats, 0, "cpu")
    trainer.dead = torch.arange(5, d_sae, 31)
    return trainer, x, doc, int((doc > 0).sum())


STEPS = {
    **{loss: {"temp_loss": loss} for loss in CHOICES["temp_loss"]},
    **{f"topk {loss}": {"temp_loss": loss, "sparsity": "topk"} for loss in CHOICES["temp_loss"]},
    "layernorm skip gelu": {"layernorm": True, "skip": True, "nonlinearity": "gelu"},
    "topk layernorm skip gelu": {"layernorm": True, "skip": True, "nonlinearity": "gelu",
                                 "sparsity": "topk"},
    "no temporal loss": {"temp_alpha": 0},
}


@pytest.mark.parametrize("name", STEPS)
def test_the_sparse_step_has_the_gradients_of_the_dense_one(quick, name):
    found = []
    for dense in (False, True):
        trainer, *batch = a_trainer(quick, **STEPS[name])
        assert trainer.encode is experiment.encode_sparse
        if dense:
            trainer.encode = experiment.encode_dense
        terms = trainer.step(*batch, step=7, log=True)
        found.append((terms, [p.grad for p in trainer.parameters], trainer.sae.threshold))
    (ours, grads, threshold), (theirs, dense_grads, dense_threshold) = found
    assert ours.keys() == theirs.keys() and {"auxk", "matryoshka", "l0"} <= ours.keys()
    for term in ours:
        close(ours[term].item(), theirs[term].item())
    close(threshold.item(), dense_threshold.item())
    for ours, theirs in zip(grads, dense_grads):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_each_term_of_the_loss_equals_its_formula(quick):
    trainer, x, doc, n_valid = a_trainer(quick)
    before = copy.deepcopy(trainer.sae).requires_grad_(False)
    terms = trainer.step(x, doc, n_valid, 7)
    ok = doc.flatten() > 0
    codes = experiment.encode_dense(before, x, ok, n_valid).dense()
    residual = x - codes @ before.W_dec - before.b_dec
    close(terms["recon"].item(), residual[ok].square().sum().item() / n_valid / 100)
    lead = codes[:, :150] @ before.W_dec[:150] + before.b_dec
    close(terms["matryoshka"].item(), (x - lead)[ok].square().sum().item() / n_valid / 100)
    half = slice(0, 16)  # the temporal target is taken on the first half of the chunks
    mean = window_mean_by_hand(x.view(32, 8, 64)[half], doc[half], 3)
    guess = (0.5 * (lead - before.b_dec) + before.b_dec).view(32, 8, 64)[half].numpy()
    error = np.nansum((mean - guess) ** 2)
    close(terms["temporal"].item(), error / np.nansum((mean - before.b_dec.numpy()) ** 2))
    quarter = slice(0, 64)  # AuxK: the 32 best of the dead latents explain what is left
    dead = torch.arange(5, 300, 31)
    pre = torch.relu((x[quarter] - before.b_dec) @ before.W_enc[:, dead] + before.b_enc[dead])
    left = residual[quarter][ok[quarter]]
    aux = (left - (pre @ before.W_dec[dead])[ok[quarter]]).square().sum() / left.square().sum()
    close(terms["auxk"].item(), aux.item())
    total = terms["recon"] + 0.5 * terms["temporal"] + 0.2 * terms["matryoshka"]
    close(terms["loss"].item(), (total + terms["auxk"] / 32).item())


@pytest.mark.parametrize("encode", [experiment.encode_sparse, experiment.encode_dense])
def test_batchtopk_takes_exactly_the_largest(quick, encode):
    for hint in (0.0, 0.1, 10.0):  # the last step's threshold: none, a good one, far too high
        trainer, x, doc, n_valid = a_trainer(quick, k=5)
        trainer.sae.threshold.fill_(hint)
        ok = doc.flatten() > 0
        pre = ((x - trainer.sae.b_dec) @ trainer.sae.W_enc).detach() * ok[:, None]
        largest = pre.flatten().topk(5 * n_valid)
        codes = encode(trainer.sae, x, ok, n_valid).dense().flatten()
        assert set(codes.nonzero()[:, 0].tolist()) == set(largest.indices.tolist()), f"hint {hint}"
        close(trainer.sae.threshold.item(), largest.values[-1].item())


@pytest.mark.parametrize("where", ["activation", "weight"])
def test_nan_stops_before_the_update(quick, where):
    trainer, x, doc, n_valid = a_trainer(quick)
    if where == "activation":
        x[0, 0] = math.nan
    else:
        trainer.sae.b_enc.data[0] = math.inf
    before = copy.deepcopy(trainer.state())
    with pytest.raises(FloatingPointError, match="step 7"):
        trainer.step(x, doc, n_valid, 7)
    after = trainer.state()["sae"]
    assert all(torch.equal(after[name], before["sae"][name]) for name in ("W_enc", "W_dec", "b_dec"))


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
    changes = {"sparsity": sparsity, "nonlinearity": nonlinearity, "skip": True}
    cfg = config(quick, **changes)
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


def rows_of(dataset, lm_dir, **changes):
    """prepare.text_rows with the sizes of a tiny run."""
    sizes = {"context_size": 32, "harvest_tokens": 4096, "eval_rows": 24, "calibration_rows": 24}
    return prepare.text_rows(str(dataset), str(lm_dir), **sizes | changes)


def documents_in(rows):
    """The numbers of the documents in a split."""
    return set(np.unique(rows[:]["doc"]).tolist()) - {0}


def by_hash(texts):
    """Document numbers in the order of the SHA-256 of their text."""
    return sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode()).hexdigest())


def test_rows_hold_whole_documents_in_order_and_bos_parts_them(text, lm_dir, bpe):
    inputs = rows_of(text, lm_dir)
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
        if split != "train":
            assert all(inputs.topics[number - 1] == STORIES[number - 1]["topic"] for number in at)
    assert list(at) == list(dict.fromkeys(at)) and len(inputs.heldout) == 24


def test_no_document_is_in_two_splits_and_those_held_out_are_spread(text, lm_dir):
    inputs = rows_of(text, lm_dir)
    train_docs, held, calibration = (documents_in(getattr(inputs, split)) for split in SPLITS)
    assert not train_docs & held and not train_docs & calibration and not held & calibration
    read = inputs.report["documents"]
    order = by_hash([row["text"] for row in STORIES[:read]])
    assert sorted(order[: len(held)]) == sorted(number - 1 for number in held)
    assert inputs.report["heldout_documents"] == sorted(number - 1 for number in held)
    assert 0.3 < np.mean(list(held)) / read < 0.7


def test_equal_texts_stay_on_one_side(work, lm_dir):
    doubled = [STORIES[i % 150] for i in range(300)]
    (work / "doubled.jsonl").write_text(json_lines(doubled))
    inputs = rows_of(work / "doubled.jsonl", lm_dir)
    sides = [{doubled[n - 1]["text"] for n in documents_in(getattr(inputs, s))} for s in SPLITS]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert inputs.report["duplicates"] > 50


def test_what_is_longer_than_all_that_is_wanted_is_cut_and_special_tokens_are_dropped(work, lm_dir):
    endless = {"text": "ship <bos> wave <eos> " * 40_000}
    (work / "endless.jsonl").write_text(json_lines([endless, *STORIES]))
    report = rows_of(work / "endless.jsonl", lm_dir, harvest_tokens=1024).report
    assert report["cut"] == 1 and report["special_dropped"] > 100 and report["tokens"] < 30_000
    inputs = rows_of(work / "endless.jsonl", lm_dir, harvest_tokens=1024)
    for split in SPLITS:
        rows = getattr(inputs, split)[:]
        assert not (rows["tokens"] == 1).any(), "EOS spelt out in a text is text no more"


def test_a_text_that_is_too_small_for_the_tokens_asked_for_says_so(text, lm_dir, capsys):
    rows_of(text, lm_dir, harvest_tokens=10**6)
    assert "training goes round them" in capsys.readouterr().err


def write_text(path, content):
    """A text file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


TEXTS = [row["text"] for row in STORIES[:60]]
PLAIN, LINES = "\n\n".join(TEXTS), json_lines(STORIES[:60])
ACCENTS = "\n\n".join(f"{line} café" for line in TEXTS)
NESTED = json_lines([{"data": {"text": line}} for line in TEXTS])
CHAT = json_lines([{"messages": [{"role": "user", "content": line}]} for line in TEXTS])
TABLE = datasets.Dataset.from_dict({"text": TEXTS})
LOADABLE = {  # name of the file or folder: (what is in it, options)
    "a.jsonl": (LINES, {}),
    "a.ndjson": (LINES, {}),
    "blank_lines.jsonl": (LINES.replace("\n", "\n\n"), {}),
    "byte_order_mark.jsonl": (b"\xef\xbb\xbf" + LINES.encode(), {}),
    "windows.jsonl": (LINES.replace("\n", "\r\n"), {}),
    "array.json": (json.dumps(STORIES[:60]), {}),
    "a.jsonl.gz": (gzip.compress(LINES.encode()), {}),
    "UPPER.TXT": (PLAIN, {}),
    "a.md": (PLAIN, {}),
    "byte_order_mark.txt": (b"\xef\xbb\xbf" + PLAIN.encode(), {}),
    "windows.txt": (PLAIN.replace("\n", "\r\n"), {}),
    "latin.txt": (ACCENTS.encode("latin-1"), {"encoding": "latin-1"}),
    "utf16.txt": (ACCENTS.encode("utf-16"), {"encoding": "utf-16"}),
    "a.csv": ("text\n" + "".join(f'"{line}"\n' for line in TEXTS), {}),
    "nested.jsonl": (NESTED, {"text_field": "data.text"}),
    "chat.jsonl": (CHAT, {"text_field": "messages"}),
    "folder": ({"a.txt": PLAIN, "README.md": "no text", "LICENSE.txt": "none", ".hidden": "x"}, {}),
    "below": ({"data/train-00000.jsonl": LINES, "data/test-00000.jsonl": '{"text": "x"}'}, {}),
    "mixed": ({"a.jsonl": LINES, "notes.txt": "not part of it"}, {}),
    "splits": ({"data/test-0.jsonl": LINES, "data/train-0.jsonl": '{"text": "x"}'}, {"split": "test"}),
}


@pytest.mark.parametrize("name", [*LOADABLE, "a.parquet", "saved", "a.jsonl.zst"])
def test_text_is_read_as_it_comes(work, name):
    path, options = work / "loadable" / name, {}
    path.parent.mkdir(exist_ok=True)
    if name == "a.parquet":
        TABLE.to_parquet(path)
    elif name == "saved":
        TABLE.save_to_disk(path)
    elif name == "a.jsonl.zst":
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
        write_text(path, zstandard.compress(LINES.encode()))
    else:
        content, options = LOADABLE[name]
        for file, inside in (content if isinstance(content, dict) else {"": content}).items():
            write_text(path / file, inside)
    options = {"text_field": "text", "dataset_config": "", "split": "train", "encoding": "utf-8"} | options
    found = [text for text, _ in prepare.read_text(str(path), **options, cache_dir="")]
    expected = TEXTS if "encoding" not in LOADABLE.get(name, [0, {}])[1] else ACCENTS.split("\n\n")
    assert [text.strip() for text in found] == expected


LABELS = [("sea", "sea"), (0, "0"), (7, "7"), (False, "False"), ("", None), (None, None),
          (math.nan, None), (["sea"], None), ({"name": "sea"}, None)]


@pytest.mark.parametrize("given, label", LABELS, ids=str)
def test_a_topic_is_a_label_if_it_is_a_plain_value(given, label):
    assert prepare.label_of({"text": "x", "topic": given}) == label


def test_the_command_shows_what_a_run_would_train_on(text, lm_dir, capsys):
    words = ["--dataset", str(text), "--model", str(lm_dir), "--context_size", "32"]
    words += ["--harvest_tokens", "4096", "--eval_rows", "24", "--calibration_rows", "24"]
    assert prepare.main(words) == 0
    out = capsys.readouterr().out
    report = rows_of(text, lm_dir).report
    assert f"documents read   {report['documents']}" in out and "training row 0" in out
    refused(capsys, lambda: prepare.main(words + ["--split", "no_such"]), 2, "--split")


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
        for x in (experiment.residuals(lm, tokens, layer),
                  evaluate.residuals(lm, blocks[layer], tokens)):
            same = [torch.equal(x, state) for state in states]
            assert same == [i == layer + 1 for i in range(LAYERS + 1)], f"layer {layer}: {same}"
    assert [len(block._forward_hooks) for block in blocks] == hooks, "a hook was left behind"


FAMILIES = {
    "gpt2, BOS is EOS": ("gpt2", {"bos": "<eos>"}, 1),
    "gptneox, both are id 0": ("gptneox", {"eos": "<bos>"}, 0),
    "gptneox, no BOS": ("gptneox", {"bos": None}, 1),
    "gemma2, PAD is EOS": ("gemma2", {"pad_token": "<eos>"}, 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_go_the_whole_way(work, run, quick, bpe, name):
    """CE without an SAE is that of transformers on the held-out rows, BOS and special ids left out."""
    kind, special, bos = FAMILIES[name]
    folder = save_lm(work / "families" / name, random_lm(kind), tokenizer_of(bpe, **special))
    out = run(name, quick, model=folder, reconstruction_rows=4, eval_rows=8)
    rows = rows_of(quick["dataset"], folder, harvest_tokens=8192, eval_rows=8, calibration_rows=128)
    tokens = torch.from_numpy(rows.heldout[:4]["tokens"].astype(np.int64))
    ok = torch.from_numpy(rows.heldout[:4]["doc"] > 0)[:, :-1]
    assert (tokens[:, 0] == bos).all() and not ok[tokens[:, :-1] == bos].any()
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = lm(tokens).logits[:, :-1]
    ce = F.cross_entropy(logits[ok], tokens[:, 1:][ok]).item()
    metrics = read(out / "core.json")["eval_result_metrics"]["model_performance_preservation"]
    close(metrics["ce_loss_without_sae"], ce, 1e-4)
    assert read(out / "seed_0" / "cfg.json")["metadata"]["prepend_bos"] is True


def test_a_model_is_its_files_not_its_name(work, quick, bpe):
    """The folder of a model changes between two runs of one process."""
    found = []
    for seed in (1, 2):
        shutil.rmtree(work / "changing", ignore_errors=True)
        save_lm(work / "changing", random_lm("gpt2", seed), tokenizer_of(bpe))
        cfg = config(quick, model=f"{work / 'changing'}/")  # with a slash or without
        found.append(experiment.Harvest(cfg).batch(0, 0)[0])
    assert not torch.equal(*found)
    again = experiment.Harvest(config(quick, model=work / "changing")).batch(0, 0)[0]
    assert torch.equal(again, found[1])


# ------------------------------------------------------------------------------------------------
# Activations: the harvest, batches, parts; one's own
# ------------------------------------------------------------------------------------------------


def all_chunks(quick):
    """Chunks of the training rows (n, 8 * d_in) and their documents (n, 8), by transformers alone."""
    rows = prepare.text_rows(str(quick["dataset"]), str(quick["model"]), context_size=32,
                             harvest_tokens=8192, eval_rows=4).train[:]
    lm = transformers.AutoModelForCausalLM.from_pretrained(quick["model"], dtype=torch.float32)
    with torch.no_grad():
        tokens = torch.from_numpy(rows["tokens"].astype(np.int64))
        x = lm(tokens, output_hidden_states=True, use_cache=False).hidden_states[2]
    return x.reshape(-1, 8 * D_IN).numpy(), rows["doc"].reshape(-1, 8)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_pass_serves_each_chunk_once_whole_and_as_the_model_gives_it(work, quick, parts):
    """8192 tokens are 256 rows of 4 chunks, of which a step takes 32. Three parts have 85 rows each."""
    cache = work / f"cache_of_{parts}_parts"
    gigabytes = (256 / parts + 1) * 32 * D_IN * 4 / 1e9
    cfg = config(quick, cache_dir=cache, cache_gb=gigabytes)
    harvest = experiment.Harvest(cfg)
    every_chunk, every_doc = all_chunks(quick)
    served = []
    steps = 32 if parts == 1 else 3 * (85 * 4 // 32)
    for step in range(steps):
        x, doc, n_valid = harvest.batch(0, step)
        found = []
        for chunk, owner in zip((x / harvest.stats.scale).view(32, -1).numpy(), doc.numpy()):
            at = int(np.abs(every_chunk - chunk).max(1).argmin())
            assert np.allclose(every_chunk[at], chunk, atol=1e-4), "this chunk is none of the text's"
            assert np.array_equal(every_doc[at], owner)
            found.append(at)
        assert n_valid == (doc > 0).sum() and len({at // 4 for at in found}) > 8, "too few rows"
        served += found
        shards = cache.glob("acts-*/*.safetensors")
        calibration = 128 * 32 * D_IN * 4 / 1e9
        assert sum(shard.stat().st_size for shard in shards) / 1e9 < (gigabytes + calibration) * 1.1
    assert len(set(served)) == len(served) == steps * 32
    again = experiment.Harvest(cfg)
    assert torch.equal(again.batch(0, steps - 1)[0], x), "a batch depends on seed and step alone"
    x = again.batch(0, 0)[0]
    assert not torch.equal(again.batch(1, 0)[0], x)
    other = config(quick, cache_dir=cache, cache_gb=gigabytes, temp_alpha=0, d_sae=128, lr=1e-4)
    assert torch.equal(experiment.Harvest(other).batch(0, 0)[0], x), "compared runs are not paired"


def test_statistics_are_those_of_the_calibration_rows(quick):
    harvest = experiment.Harvest(config(quick))
    x = harvest.calibration_tokens().double() * harvest.stats.scale
    close(x.square().sum(1).mean().item(), D_IN)
    assert torch.allclose(x.mean(0).float(), harvest.stats.mean, atol=1e-5)
    close((x - x.mean(0)).square().sum(1).mean().item(), harvest.stats.variance)


def own_file(work, name, x, **kwargs):
    """Write activations (N,T,d) as .npy and return the path."""
    np.save(work / f"{name}.npy", np.asarray(x, np.float32), **kwargs)
    return work / f"{name}.npy"


def test_attention_sinks_and_zeros_are_left_out_in_training_and_in_judging(work, run, own):
    x = np.load(own["acts"]).copy()
    x[:, 0] *= 500 / np.linalg.norm(x[:, 0], axis=1, keepdims=True)  # at a row's first token
    x[:, 5] = 0
    path = own_file(work, "sinks", x)
    harvest = experiment.Harvest(config(own, acts=path))
    for step in range(3):
        batch, doc, n_valid = harvest.batch(0, step)
        norms = batch.norm(dim=1) / harvest.stats.scale
        assert n_valid == (doc > 0).sum() and n_valid > 0
        assert norms[doc.flatten() > 0].max() < 100 and norms[doc.flatten() > 0].min() > 0
        assert (norms[doc.flatten() == 0] > 100).any() and (norms[doc.flatten() == 0] == 0).any()
    out = run("sinks", own, acts=path)
    counts = read(out / "core.json")["eval_result_unstructured"]["counts"]
    assert counts["left_out"] == 2 * counts["rows"] and counts["tokens"] == 14 * counts["rows"]
    assert means(out)["explained_variance"] > 0.2


def test_sinks_of_a_language_model_are_left_out(work, run, quick, bpe):
    lm = random_lm("llama")
    lm.model.embed_tokens.weight.data[5] *= 1e4  # wherever this token stands
    folder = save_lm(work / "sink_lm", lm, tokenizer_of(bpe))
    out = run("sink_lm", quick, model=folder, eval_rows=48)
    rows = rows_of(quick["dataset"], folder, harvest_tokens=8192, eval_rows=48, calibration_rows=128)
    counts = read(out / "core.json")["eval_result_unstructured"]["counts"]
    assert counts["left_out"] == (rows.heldout[:]["tokens"] == 5).sum() > 0
    harvest = experiment.Harvest(config(quick, model=folder, eval_rows=48))
    n_valid = sum(harvest.batch(0, step)[2] for step in range(32))
    train_rows = rows.train[:]
    assert n_valid == ((train_rows["doc"] > 0) & (train_rows["tokens"] != 5)).sum()


def test_a_mask_gives_own_activations_documents(work, run, own):
    rng = np.random.default_rng(0)
    doc = np.repeat(rng.integers(1, 20, (60, 2)), 8, axis=1).astype(np.int32)
    doc[:, 3] = 0
    np.save(work / "mask.npy", doc)
    acts = prepare.load_acts(own["acts"], work / "mask.npy", 12)
    sides = [set(acts.doc[getattr(acts, split)].ravel()) - {0} for split in SPLITS]
    assert sides[1] and sides[0] and not sides[0] & sides[1] and not sides[0] & sides[2]
    assert not sides[1] & sides[2] and (acts.doc[:, 3] == 0).all()
    everything = np.sort(np.concatenate([acts.train, acts.heldout, acts.calibration]))
    assert np.array_equal(everything, np.arange(60)) and acts.heldout.max() > 20
    out = run("masked", own, acts_mask=work / "mask.npy", batch_size=64)
    counts = read(out / "core.json")["eval_result_unstructured"]["counts"]
    assert counts["tokens"] == (acts.doc[acts.heldout] > 0).sum() and counts["left_out"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_own_activations_come_in_several_types(work, acts_file, dtype):
    x = torch.from_numpy(np.load(acts_file)).to(dtype)
    save_file({"acts": x}, work / f"acts_{dtype}.safetensors")
    assert torch.equal(prepare.load_acts(work / f"acts_{dtype}.safetensors").acts, x)


# ------------------------------------------------------------------------------------------------
# A run: what it leaves, what it learns, what it saves
# ------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(base):
    names = ["config.json", "environment.json", "experiment.py", "log.jsonl", "core.json",
             "consistency.json", "latents.json", "final_info.json", "seed_0/cfg.json",
             "seed_0/sae_weights.safetensors", "seed_0/reference.safetensors"]
    assert tree_hash(base).keys() == set(names), "neither less nor more"
    assert (base / "experiment.py").read_text() == experiment.SOURCE
    assert set(read(base / "config.json")) == {f.name for f in experiment.fields(experiment.Config)}
    made_by = read(base / "environment.json")
    for script in ("experiment", "prepare", "evaluate"):
        assert made_by[f"{script}_sha256"] == prepare.sha256(HERE / f"{script}.py")
    (block,) = read(base / "final_info.json").values()
    assert block["means"].keys() == block["final_info_dict"].keys()
    assert all(math.isfinite(value) for value in block["means"].values())
    headline = """explained_variance l0 frac_alive ce_loss_score kl_div_score autocorr_1 autocorr_16
        autocorr_16_lead autocorr_16_rest autocorr_16_best support_jaccard smoothness_S S_sum
        latents_a_row boundary token_topic_5 token_topic_5_lead token_topic_5_rest doc_topic_5
        token_class_5 token_class_20 document_id separation_topic separation_token redundant_share
        together together_mass_share""".split()
    assert set(headline) <= block["means"].keys()


def test_training_learns_and_keeps_its_sparsity(base):
    log = log_of(base)
    assert [line["step"] for line in log] == [*range(0, 40, 5), 39]
    assert log[-1]["recon"] < 0.8 * log[0]["recon"] and log[-1]["temporal"] < log[0]["temporal"]
    assert all({"loss", "recon", "temporal", "lr", "l0", "dead", "grad_norm"} <= line.keys() for line in log)
    assert all(math.isfinite(value) for line in log for value in line.values())
    close([log[-1]["l0"], means(base)["l0"]], [4, 4], rel=0.1)
    assert means(base)["explained_variance"] > 0.2


SAME_AS_BASELINE = [{"window": 1}, {"window": 1, "temp_loss": "sqdiff"}, {"window": 1, "temp_loss": "infonce"},
                    {"temp_alpha": 0, "temp_loss": "selective"}, {"temp_alpha": 0, "control": "permuted"}]


def test_weight_0_or_window_1_is_the_baseline_bit_for_bit(run, quick):
    baseline = run("baseline", quick, temp_alpha=0)
    for number, changes in enumerate(SAME_AS_BASELINE):
        other = run(f"as_baseline_{number}", quick, **changes)
        assert weight_hash(other) == weight_hash(baseline), changes
        assert log_of(other) == log_of(baseline), changes
    assert weight_hash(run("temporal", quick)) != weight_hash(baseline), "the loss does nothing"


def test_the_same_command_gives_the_same_bytes(run, tiny, base):
    again = run("same_command", tiny)
    assert weight_hash(again) == weight_hash(base) and log_of(again) == log_of(base)
    for name in ("final_info.json", "consistency.json", "seed_0/reference.safetensors"):
        assert (again / name).read_bytes() == (base / name).read_bytes(), name


def test_the_scored_weights_are_the_trained_weights(base, work):
    file = base / "seed_0" / "sae_weights.safetensors"
    assert weight_hash(base) == evaluate.tensor_hash(load_file(file))
    for name in ("core.json", "consistency.json"):
        tree = read(base / name)
        hashes = tree.get("hashes") or tree["eval_result_unstructured"]["hashes"]
        assert hashes["weights"] == hashlib.sha256(file.read_bytes()).hexdigest()
    reference = load_file(base / "seed_0" / "reference.safetensors")
    sae = evaluate.load_sae(base / "seed_0")
    acts = sae.encode(reference["x"])
    assert reference["x"].shape == (8, D_IN) and reference["acts"].count_nonzero() > 0
    assert torch.allclose(acts, reference["acts"], atol=1e-6)
    assert torch.allclose(sae.decode(acts, reference["x"]), reference["x_hat"], atol=1e-6)
    before = tree_hash(base)
    assert evaluate.main([str(base), "--out", str(work / "scored_again")]) == 0
    assert tree_hash(base) == before, "--out must not touch the run"
    again = work / "scored_again" / "final_info.json"
    assert again.read_bytes() == (base / "final_info.json").read_bytes()


def test_seeds_share_a_harvest_and_are_summed_up(run, tiny, base, capsys):
    out = run("seeds", tiny, n_seeds=2)
    assert weight_hash(out) == weight_hash(base), "seed 0 does not depend on how many there are"
    assert weight_hash(out, 1) != weight_hash(out, 0)
    (block,) = read(out / "final_info.json").values()
    a, b = block["final_info_dict"]["explained_variance"]
    assert a != b and len(block["final_info_dict"]["pw_mcc"]) == 1
    close(block["means"]["explained_variance"], (a + b) / 2)
    close(block["stderrs"]["explained_variance"], abs(a - b) / 2)  # ddof 1, over sqrt(2)
    for seed in (0, 1):
        assert (out / f"seed_{seed}" / "consistency.json").exists()
    capsys.readouterr()
    assert evaluate.main([str(out), str(base)]) == 0
    table = capsys.readouterr().out
    assert all(words in table for words in ("explained_variance", "±", "base - seeds"))


VARIANTS = {
    "gelu": {"nonlinearity": "gelu"},
    "layernorm": {"layernorm": True},
    "skip": {"skip": True},
    "topk": {"sparsity": "topk"},
    "l1": {"sparsity": "l1", "l1_alpha": 0.02},
    "xavier": {"init": "xavier"},
    "matryoshka": {"matryoshka_alpha": 0.5, "schedule": "constant", "grad_clip": 0},
    "all": {"nonlinearity": "gelu", "layernorm": True, "skip": True, "sparsity": "topk",
            "init": "xavier", "auxk_alpha": 0},
    "bfloat16": {"dtype": "bfloat16", "matmul_dtype": "bfloat16"},
    **{name: {"temp_loss": name} for name in CHOICES["temp_loss"]},
    **{name: {"control": name} for name in CHOICES["control"] if name != "none"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_and_save_what_they_trained(run, quick, name):
    """The saved SAE on raw activations does what the last step logged: scale, threshold and all."""
    out = run(f"variant_{name}", quick, **VARIANTS[name])
    log = log_of(out)
    assert log[-1]["recon"] < log[0]["recon"] and all(math.isfinite(log[-1][key]) for key in log[-1])
    sae = evaluate.load_sae(out / "seed_0")
    x = experiment.Harvest(config(quick, **VARIANTS[name])).calibration_tokens()
    codes = sae.encode(x)
    x_hat = sae.decode(codes, x)
    unexplained = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
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


SAVED_AS = {"matryoshka": "jumprelu", "topk": "topk", "l1": "standard", "layernorm": "jumprelu"}


@pytest.mark.parametrize("name", SAVED_AS)
def test_the_saved_dictionary_is_in_saelens_format(run, quick, name):
    folder = run(f"variant_{name}", quick, **VARIANTS[name]) / "seed_0"
    spec, w = read(folder / "cfg.json"), load_file(folder / "sae_weights.safetensors")
    architecture = SAVED_AS[name]
    shapes = {"W_enc": (D_IN, 64), "W_dec": (64, D_IN), "b_enc": (64,), "b_dec": (D_IN,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (64,)
    assert {key: tuple(tensor.shape) for key, tensor in w.items()} == shapes
    assert all(tensor.dtype == torch.float32 for tensor in w.values())
    fixed = {"architecture": architecture, "d_in": D_IN, "d_sae": 64, "dtype": "float32",
             "apply_b_dec_to_input": True, "reshape_activations": "none",
             "normalize_activations": "layer_norm" if name == "layernorm" else "none"}
    assert fixed.items() <= spec.items() and spec.get("k") == (4 if architecture == "topk" else None)
    metadata = {"model_name": "lm", "hook_name": "blocks.1.hook_resid_post", "hook_layer": 1,
                "prepend_bos": True, "context_size": 32, "dataset_path": "stories.jsonl"}
    assert metadata.items() <= spec["metadata"].items(), "names, not paths"
    assert int(spec["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    reference = load_file(folder / "reference.safetensors")
    x, std, mean = reference["x"], 1, 0
    if name == "layernorm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    acts = encode_as_published(architecture, x, w, 4)
    assert torch.allclose(acts, reference["acts"], atol=1e-5)
    x_hat = (acts @ w["W_dec"] + w["b_dec"]) * std + mean
    assert torch.allclose(x_hat, reference["x_hat"], atol=1e-5)


def test_what_saelens_cannot_express_gets_a_name_that_it_refuses(run, quick):
    for name in ("gelu", "skip", "all"):
        spec = read(run(f"variant_{name}", quick, **VARIANTS[name]) / "seed_0" / "cfg.json")
        assert spec["architecture"].startswith("temporal_sae_"), name


def test_saelens_loads_it(run, quick):
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (no dependency)")
    for name in SAVED_AS:
        folder = run(f"variant_{name}", quick, **VARIANTS[name]) / "seed_0"
        theirs, reference = sae_lens.SAE.load_from_disk(folder), load_file(folder / "reference.safetensors")
        acts = theirs.encode(reference["x"])
        assert torch.allclose(acts, reference["acts"], atol=1e-5)
        assert torch.allclose(theirs.decode(acts), reference["x_hat"], atol=1e-5)
    with pytest.raises(Exception):
        sae_lens.SAE.load_from_disk(run("variant_gelu", quick, nonlinearity="gelu") / "seed_0")


def save_foreign(folder, architecture, tensors, **changes):
    """An SAE as SAELens saves it: cfg.json and sae_weights.safetensors."""
    folder.mkdir(parents=True)
    d_in, d_sae = tensors["W_enc"].shape
    spec = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32",
            "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
            "reshape_activations": "none", "metadata": {"sae_lens_version": "6.43.0"}}
    (folder / "cfg.json").write_text(json.dumps(spec | changes))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              folder / "sae_weights.safetensors")
    return folder


def random_tensors(d_sae=48):
    """Weights of no meaning."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, d_sae), "W_dec": (d_sae, D_IN), "b_enc": (d_sae,), "b_dec": (D_IN,),
              "threshold": (d_sae,)}
    return {name: 0.3 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def judge_words(settings, **changes):
    """Flags of evaluate.py that score on the held-out rows of a run with these settings."""
    names = ("model", "layer", "dtype", "device", "dataset", "context_size", "harvest_tokens",
             "eval_rows", "reconstruction_rows")
    return argv({name: settings[name] for name in names}, **changes)


def judged(folder, out, settings, **changes):
    """Score an SAE folder by the command. -> core.json, consistency.json"""
    assert evaluate.main([str(folder), "--out", str(out), *judge_words(settings, **changes)]) == 0
    return read(out / "core.json"), read(out / "consistency.json")


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_any_sae_in_saelens_format_is_read_and_judged(work, quick, architecture):
    tensors = random_tensors()
    if architecture != "jumprelu":
        del tensors["threshold"]
    spec = {"k": 7} if architecture == "topk" else {}
    folder = save_foreign(work / "foreign" / architecture, architecture, tensors, **spec)
    sae = evaluate.load_sae(folder)
    x = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(1))
    acts = encode_as_published(architecture, x, tensors, 7)
    assert acts.count_nonzero() > 100 and torch.allclose(sae.encode(x), acts, atol=1e-6)
    assert torch.allclose(sae.decode(acts, x), acts @ tensors["W_dec"] + tensors["b_dec"], atol=1e-6)
    core, _ = judged(folder, work / "foreign_scores" / architecture, quick, reconstruction_rows=2)
    ours = core["eval_result_unstructured"]["ours"]
    assert all(math.isfinite(value) for value in ours.values())
    assert architecture != "topk" or ours["l0"] <= 7


FOREIGN_SPECS = {
    "b_dec is not subtracted": ({"apply_b_dec_to_input": False}, None),
    "layer norm": ({"normalize_activations": "layer_norm"}, None),
    "no k: 100, or all": ({"architecture": "topk"}, None),
    "a gated SAE": ({"architecture": "gated"}, "gated"),
    "a factor that is not in cfg.json": ({"normalize_activations": "expected_average_only_in"},
                                         "normalize_activations"),
    "another width": ({"d_in": 31}, "W_enc"),
    "cfg.json a list": (None, "cannot be used"),
    "no d_sae": ({"d_sae": None}, "cannot be used"),
}


@pytest.mark.parametrize("name", FOREIGN_SPECS)
def test_what_is_not_known_of_a_foreign_sae_is_refused_in_a_sentence(work, quick, capsys, name):
    changes, words = FOREIGN_SPECS[name]
    folder = save_foreign(work / "specs" / name, "jumprelu", random_tensors(), **changes or {})
    if changes is None:
        (folder / "cfg.json").write_text("[]")
    if words is not None:
        call = [str(folder), "--out", str(work / "no_scores"), *judge_words(quick)]
        refused(capsys, lambda: evaluate.main(call), 2, words)
        assert not (work / "no_scores").exists()
        return
    x, w = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(1)), random_tensors()
    if "layer norm" in name:
        x_in = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    else:
        x_in = x + w["b_dec"] if "not subtracted" in name else x
    acts = encode_as_published("topk" if "k" in name[:4] else "jumprelu", x_in, w, 48)
    assert torch.allclose(evaluate.load_sae(folder).encode(x), acts, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# The judge: each metric by a second, slower route
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def own_rows(work):
    """26 rows of 24 tokens: BOS in place, some more inside, some EOS; tokens come in runs."""
    rng = np.random.default_rng(1)
    rows = np.repeat(rng.integers(2, VOCABULARY, (26, 12)), 2, axis=1)
    noise = rng.random(rows.shape)
    rows = np.where(noise < 0.5, rows, rng.integers(2, 60, rows.shape))
    rows = np.where(noise < 0.07, 1, rows)
    rows = np.where(noise < 0.04, 0, rows)
    rows[:, 0] = 0
    np.save(work / "rows.npy", rows)
    return rows


@pytest.fixture(scope="session")
def scored(base, own_rows, work):
    """The base run scored on those rows, six of them for CE and KL: core.json, consistency.json."""
    out = work / "scored_on_own_rows"
    words = ["--rows", str(work / "rows.npy"), "--reconstruction_rows", "6", "--out", str(out)]
    assert evaluate.main([str(base), *words]) == 0
    return read(out / "core.json"), read(out / "consistency.json")


class ByHand:
    """x, x_hat and codes f of token rows (N,T,...) in float64, from the files alone."""

    def __init__(self, run, lm_dir, rows, doc):
        self.lm = transformers.AutoModelForCausalLM.from_pretrained(lm_dir, dtype=torch.float32)
        self.w = {name: tensor.double() for name, tensor in weights(run).items()}
        self.rows, self.doc, self.ok = rows, doc, doc > 0
        blocks = []
        with torch.no_grad():
            for first in range(0, len(rows), 16):
                ids = torch.from_numpy(rows[first : first + 16].astype(np.int64))
                blocks.append(self.lm(ids, output_hidden_states=True).hidden_states[2])
        x = torch.cat(blocks).double()
        f, x_hat = self.autoencode(x)
        self.x, self.f, self.x_hat = x.numpy(), f.numpy(), x_hat.numpy()

    def autoencode(self, x):
        """x -> codes, x_hat by the formulas of jumprelu."""
        pre = (x - self.w["b_dec"]) @ self.w["W_enc"] + self.w["b_enc"]
        acts = torch.relu(pre) * (pre > self.w["threshold"])
        return acts, acts @ self.w["W_dec"] + self.w["b_dec"]

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
def by_hand(base, lm_dir, own_rows):
    doc = np.cumsum(own_rows == 0).reshape(own_rows.shape)
    return ByHand(base, lm_dir, own_rows, np.where(own_rows > 1, doc, 0))


@pytest.fixture(scope="session")
def held_out(base, lm_dir, tiny):
    """The held-out rows of the base run that are not for CE and KL, by hand, with their topics."""
    inputs = rows_of(tiny["dataset"], lm_dir, harvest_tokens=8192, eval_rows=96, calibration_rows=128)
    rows = inputs.heldout[8:96]
    h = ByHand(base, lm_dir, rows["tokens"], rows["doc"])
    h.topic = np.vectorize(lambda number: inputs.topics.get(number - 1, ""))(h.doc)
    return h


def test_ce_and_kl_equal_a_loop_over_tokens(scored, by_hand):
    h = by_hand
    sums = dict.fromkeys(("ce clean", "ce ablation", "ce sae", "kl ablation", "kl sae"), 0)
    n_ce = n_kl = 0
    for row, ok in zip(h.rows[:6], h.ok[:6]):
        def log_p(edit):
            def hook(module, inputs, output):
                x = (output if torch.is_tensor(output) else output[0]).clone()
                for t in range(len(row)):
                    x[0, t] = edit(x[0, t], ok[t])
                return x if torch.is_tensor(output) else (x, *output[1:])
            handle = h.lm.model.layers[1].register_forward_hook(hook)
            with torch.no_grad():
                logits = h.lm(torch.from_numpy(row)[None]).logits[0].double()
            handle.remove()
            return logits.log_softmax(-1).numpy()

        p = {"clean": log_p(lambda x, ok: x), "ablation": log_p(lambda x, ok: 0 * x),
             "sae": log_p(lambda x, ok: h.autoencode(x.double())[1].float() if ok else x)}
        for t in np.flatnonzero(ok):
            n_kl += 1
            for name in ("ablation", "sae"):
                gap = p["clean"][t] - p[name][t]
                sums[f"kl {name}"] += (np.exp(p["clean"][t]) * gap).sum()
            if t + 1 < len(row):
                n_ce += 1
                for name in p:
                    sums[f"ce {name}"] -= p[name][t, row[t + 1]]
    value = {name: s / (n_ce if "ce" in name else n_kl) for name, s in sums.items()}
    metrics = scored[0]["eval_result_metrics"]
    close(metrics["model_behavior_preservation"], {
        "kl_div_score": 1 - value["kl sae"] / value["kl ablation"],
        "kl_div_with_ablation": value["kl ablation"], "kl_div_with_sae": value["kl sae"]}, 2e-5)
    gain = value["ce ablation"] - value["ce clean"]
    close(metrics["model_performance_preservation"], {
        "ce_loss_score": (value["ce ablation"] - value["ce sae"]) / gain,
        "ce_loss_with_ablation": value["ce ablation"], "ce_loss_with_sae": value["ce sae"],
        "ce_loss_without_sae": value["ce clean"]}, 2e-5)
    close(value["ce ablation"], math.log(VOCABULARY))  # a Llama that reads nothing says nothing


def test_fidelity_equals_a_loop_over_tokens(scored, by_hand):
    h, core = by_hand, scored[0]
    batches = []  # of at most 16 rows, as SAEBench has them
    for first in (6, 22):
        batch = [(h.x[r, t], h.x_hat[r, t], h.f[r, t]) for r in range(first, min(first + 16, 26))
                 for t in range(24) if h.ok[r, t]]
        batches.append(batch)
    tokens = batches[0] + batches[1]
    n, norm = len(tokens), np.linalg.norm
    x, y, f = (np.array(column) for column in zip(*tokens))
    error = norm(x - y, axis=1) ** 2
    cosine = np.mean([a @ b / norm(a) / norm(b) for a, b in zip(x, y)])
    ratio = np.mean(norm(y, axis=1) / norm(x, axis=1))
    legacy = mse = 0
    bias, power, residual = [], [], []
    for batch in batches:
        a, b, _ = (np.array(column) for column in zip(*batch))
        legacy += sum(1 - norm(a - b, axis=1) ** 2 / norm(a - a.mean(0), axis=1) ** 2)
        mse += sum(norm(a - b, axis=1) ** 2) / len(a)
        bias.append((b * b).sum() / (a * b).sum())
        power.append((a * a).sum() / len(a))
        residual.append(((a - b) ** 2).sum() / len(a))
    q = np.mean(power)
    metrics = core["eval_result_metrics"]
    close(metrics["reconstruction_quality"], {
        "explained_variance": 1 - np.mean(residual) / (q - (q / D_IN) ** 2),
        "explained_variance_legacy": legacy / n, "mse": mse / n, "cossim": cosine})
    close(metrics["shrinkage"], {
        "l2_norm_in": norm(x, axis=1).mean(), "l2_norm_out": norm(y, axis=1).mean(),
        "l2_ratio": ratio, "relative_reconstruction_bias": np.mean(bias)})
    close(metrics["sparsity"], {"l0": (f != 0).sum() / n, "l1": f.sum() / n})
    assert metrics["token_stats"] == {"total_tokens_eval_reconstruction": 6 * 24,
                                      "total_tokens_eval_sparsity_variance": 20 * 24}
    unit = h.w["W_dec"].norm(dim=1).numpy()
    ours = core["eval_result_unstructured"]["ours"]
    expected = {
        "explained_variance": 1 - error.sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse": error.mean() / D_IN, "cossim": cosine, "l2_ratio": ratio,
        "relative_reconstruction_bias": (y * y).sum() / (x * y).sum(), "l0": (f != 0).sum() / n,
        "l1": (np.abs(f) * unit).sum() / n, "frac_alive": (f != 0).any(0).mean()}
    close({name: ours[name] for name in expected}, expected)


def test_rows_of_latents_equal_a_loop(scored, by_hand):
    h, core = by_hand, scored[0]
    W_enc, W_dec = h.w["W_enc"].T.numpy(), h.w["W_dec"].numpy()

    def cos(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    on = (h.f[6:] > 0) & h.ok[6:, :, None]
    density = on.sum((0, 1)) / h.ok[6:].sum()
    rows = core["eval_result_details"]
    for i, row in enumerate(rows):
        rows_fired = on[..., i].any(1).sum()
        others = [j for j in range(64) if j != i]
        close(row, {
            "index": i, "feature_density": density[i], "encoder_bias": h.w["b_enc"][i].item(),
            "consistent_activation_heuristic": on[..., i].sum() / max(rows_fired, 1),
            "encoder_norm": np.linalg.norm(W_enc[i]),
            "encoder_decoder_cosine_sim": cos(W_enc[i], W_dec[i]),
            "max_decoder_cosine_sim": max(cos(W_dec[i], W_dec[j]) for j in others),
            "max_encoder_cosine_sim": max(cos(W_enc[i], W_enc[j]) for j in others)}, floor=1e-6)
    expected = {"frac_alive": (density > 0).mean()}
    for percent in (1, 10):
        often = density > percent / 100
        expected[f"freq_over_{percent}_percent"] = often.mean()
        expected[f"normalized_freq_over_{percent}_percent"] = density[often].sum() / density.sum()
    for side in ("encoder", "decoder"):
        best = [row[f"max_{side}_cosine_sim"] for row in rows]
        expected[f"average_max_{side}_cosine_sim"] = np.mean(best)
    close(core["eval_result_metrics"]["misc_metrics"], expected)


def correlation(a, b):
    """Pearson's r; None where a side does not vary."""
    if a.std() < 1e-9 or b.std() < 1e-9:
        return None
    return np.corrcoef(a, b)[0, 1]


def curves_by_hand(h, f, x, first):
    """{metric: per-latent values, a list over lags 1, 2, 4, 8}, as loops over pairs."""
    pairs = {lag: [p for p in h.pairs(lag) if p[0] >= first] for lag in (1, 2, 4, 8)}
    centred = f.copy()
    for r, piece in h.segments():
        centred[r, piece] -= f[r, piece].mean(0)
    rate = (f[first:][h.ok[first:]] != 0).mean(0)
    out = {"autocorr": [], "autocorr_within": [], "persistence": [], "kappa": []}
    for lag, found in pairs.items():
        row, left, right = map(list, zip(*found))
        for name, values in (("autocorr", f), ("autocorr_within", centred)):
            a, b = values[row, left], values[row, right]
            out[name].append([correlation(a[:, i], b[:, i]) for i in range(f.shape[2])])
        a, b = f[row, left] != 0, f[row, right] != 0
        stay = [b[a[:, i], i].mean() if a[:, i].any() else None for i in range(f.shape[2])]
        out["persistence"].append(stay)
        out["kappa"].append([None if s is None else (s - p) / (1 - p) for s, p in zip(stay, rate)])
    return out


def test_consistency_equals_loops_over_pairs(scored, by_hand):
    h, c, f = by_hand, scored[1], by_hand.f
    valid = f[6:][h.ok[6:]]
    fires = (valid != 0).sum(0)
    kept = [i for i in range(64) if fires[i] >= 20]
    assert len(kept) >= 10 and c["lags"] == [1, 2, 4, 8, 16]
    lead = c["groups"]["lead"]["latents"]
    groups = {"whole": range(64), "lead": range(lead), "rest": range(lead, 64)}
    assert lead == 16

    def expect(block, values):
        for group, members in groups.items():
            found = [(values[i], fires[i]) for i in members if i in kept and values[i] is not None]
            if found:
                v, mass = np.array(found).T
                ours = {"mean": block[group]["mean"], "mass": block[group]["mass"]}
                if "at" in block:
                    ours = {kind: curve[block["at"]] for kind, curve in ours.items()}
                close(ours, {"mean": v.mean(), "mass": (mass * v).sum() / mass.sum()}, 5e-5, 5e-6)

    for name, curve in curves_by_hand(h, f, h.x, 6).items():
        for at, values in enumerate(curve):
            expect(c[name] | {"at": at}, values)
    runs = np.zeros(64)
    for r, piece in h.segments():
        for t in piece:
            before = f[r, t - 1] != 0 if t - 1 in piece else np.zeros(64, bool)
            runs += ((f[r, t] != 0) & ~before) * (r >= 6)
    expect(c["span"], [a / b if b else None for a, b in zip(fires, runs)])
    between = np.zeros(64)
    for t in range(24):
        here = h.ok[6:, t]
        if here.any():
            between += here.sum() * (f[6:, t][here].mean(0) - valid.mean(0)) ** 2
    eta2 = between / np.maximum(len(valid) * valid.var(0), 1e-12)
    expect(c["position_invariance"], [1 - e if v else None for e, v in zip(eta2, valid.var(0) > 0)])


def test_neighbours_equal_loops_over_rows(scored, by_hand):
    """Jaccard, S, S_sum and the number of latents in a row, for whole, lead and rest."""
    h, c, f = by_hand, scored[1], by_hand.f
    for group, members in {"whole": range(64), "lead": range(16), "rest": range(16, 64)}.items():
        members = list(members)
        overlap, smooth, rough, distinct = [], [], [], []
        for r in range(6, 26):
            pairs = [(t, u) for q, t, u in h.pairs(1) if q == r]
            peak = {}
            for t, u in pairs:
                one, two = (set(np.flatnonzero(f[r, at, members])) for at in (t, u))
                if one | two:
                    overlap.append(len(one & two) / len(one | two))
                step = np.linalg.norm(h.x[r, u] - h.x[r, t])
                for i in one | two:
                    change = abs(f[r, u, members[i]] - f[r, t, members[i]]) / step
                    peak[i] = max(peak.get(i, 0), change)
            if peak:
                smooth.append(np.mean(list(peak.values())))
            if pairs:
                rough.append(sum(peak.values()))
            distinct.append((f[r][h.ok[r]][:, members] != 0).any(0).sum())
        expected = [np.mean(overlap), np.mean(smooth), np.mean(rough), np.mean(distinct)]
        names = ("support_jaccard", "smoothness_S", "S_sum", "latents_a_row")
        close([c[name][group] for name in names], expected, 5e-5)


def test_the_position_matrix_equals_a_loop(scored, by_hand):
    h, c = by_hand, scored[1]
    f, ok = h.f[6:], h.ok[6:]
    kept = [i for i in range(64) if (f[ok][:, i] != 0).sum() >= 20]
    z = ((f - f[ok].mean(0)) / np.maximum(f[ok].std(0), 1e-9))[..., kept]
    for p, q in ((1, 2), (3, 3), (5, 9)):
        cell = [np.mean(z[r - 6, p] * z[r - 6, q]) for r, piece in h.segments()
                if r >= 6 and p in piece and q in piece]
        close(c["position_corr"]["codes"][p][q], np.mean(cell), 1e-3, 1e-4)


def auroc(score, y):
    """Share of (positive, negative) pairs in the right order; ties count half."""
    gap = np.asarray(score)[y][:, None] - np.asarray(score)[~y]
    return (gap > 0).mean() + (gap == 0).mean() / 2


def logistic(x, y, l2=1.0):
    """Weights of L2-regularised logistic regression, by Newton's method; no penalty on the bias."""
    x = np.column_stack([x, np.ones(len(x))])
    penalty = np.diag([l2] * (x.shape[1] - 1) + [0])
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (p - y) + penalty @ w
        w -= np.linalg.solve((x.T * (p * (1 - p))) @ x + penalty + 1e-9 * np.eye(len(w)), gradient)
    return w


def probe_by_hand(train, test, y_train, y_test, members, k):
    """AUROC of a probe on the k columns of `members` whose class means differ most."""
    gap = np.abs(train[y_train].mean(0) - train[~y_train].mean(0))
    best = sorted(members, key=lambda i: -gap[i])[:k]
    scale = np.where(train[:, best].std(0) > 0, train[:, best].std(0), 1)
    w = logistic(train[:, best] / scale, y_train)
    return auroc(test[:, best] / scale @ w[:-1], y_test)


def trained_on(doc):
    """Which documents the probes are trained on: 70 % at random."""
    numbers = np.unique(doc[doc > 0])
    chosen = np.random.default_rng(0).permutation(len(numbers)) < 0.7 * len(numbers)
    return np.isin(doc, numbers[chosen])


GROUPS = {"whole": range(64), "lead": range(16), "rest": range(16, 64)}


def test_probes_of_topics_equal_a_slow_probe(base, held_out):
    h, found = held_out, read(base / "consistency.json")["probes"]
    late = np.zeros(h.doc.shape, bool)
    for r, piece in h.segments():
        late[r, [t for t in piece if t - piece[0] >= 8]] = True
    side = trained_on(h.doc)
    train, test = late & side, late & ~side
    names = sorted(TOPICS)
    for k in (1, 5, 20):
        for group, members in GROUPS.items():
            values = [probe_by_hand(h.f[train], h.f[test], h.topic[train] == name,
                                    h.topic[test] == name, members, k) for name in names]
            close(found["token_topic"][group][str(k)], np.mean(values), floor=2e-3)
    x = h.x - h.x[train].mean(0)
    raw = [probe_by_hand(x[train], x[test], h.topic[train] == name, h.topic[test] == name, range(D_IN), D_IN)
           for name in names]
    close(found["raw"]["token_topic"]["all"], np.mean(raw), floor=2e-3)
    numbers = np.unique(h.doc[h.doc > 0])
    mean = np.array([h.f[h.doc == number].mean(0) for number in numbers])
    topic = np.array([h.topic[h.doc == number][0] for number in numbers])
    train = np.array([side[h.doc == number].all() for number in numbers])
    values = [probe_by_hand(mean[train], mean[~train], topic[train] == name, topic[~train] == name,
                            range(64), 5) for name in names]
    close(found["doc_topic"]["whole"]["5"], np.mean(values), floor=2e-3)
    means_ = means(base)
    close(means_["separation_topic"],
          found["token_topic"]["lead"]["5"] - found["token_topic"]["rest"]["5"], 1e-4)


def test_the_probe_of_token_classes_equals_a_slow_probe(base, held_out, bpe):
    h, found = held_out, read(base / "consistency.json")["probes"]
    side = trained_on(h.doc)
    train, test = h.ok & side, h.ok & ~side
    text = np.array([bpe.decode([i]) for i in range(VOCABULARY)])
    classes = {"word_part": [t[:1].isalpha() and t.isalpha() for t in text],
               "punctuation": [bool(t.strip()) and not any(map(str.isalnum, t)) for t in text],
               "digit": [t.strip().isdigit() for t in text],
               "capitalised": [t.strip()[:1].isupper() for t in text]}
    for name, member in classes.items():
        y = np.array(member)[h.rows]
        value = probe_by_hand(h.f[train], h.f[test], y[train], y[test], range(64), 5)
        close(found["by_class"]["token_class"][name]["5"], value, floor=2e-3)
    by_class = [found["by_class"]["token_class"][name]["20"] for name in classes]
    close(found["token_class"]["whole"]["20"], np.mean(by_class), 1e-4)


def test_document_id_equals_a_slow_probe(base, held_out):
    h, found = held_out, read(base / "consistency.json")["probes"]["document_id"]
    flat, f = h.doc.ravel(), h.f.reshape(-1, 64)
    numbers, size = np.unique(flat[flat > 0], return_counts=True)
    rng = np.random.default_rng(0)
    chosen = rng.permutation(numbers[size >= 40])[:120]
    tokens = np.concatenate([np.flatnonzero(flat == number)[-25:] for number in chosen])
    y = np.repeat(np.arange(len(chosen)), 25)
    order = rng.permutation(len(tokens))
    train, test = order[: int(0.75 * len(order))], order[int(0.75 * len(order)) :]
    columns = set()
    for number in range(len(chosen)):
        own_side = y[train] == number
        gap = f[tokens[train]][own_side].mean(0) - f[tokens[train]][~own_side].mean(0)
        columns |= set(np.argsort(-gap, kind="stable")[:5].tolist())
    x = f[tokens][:, sorted(columns)]
    x = torch.from_numpy(x / np.where(x[train].std(0) > 0, x[train].std(0), 1))
    w = torch.zeros(x.shape[1], len(chosen), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(chosen), dtype=torch.float64, requires_grad=True)
    target = torch.from_numpy(y)
    solver = torch.optim.LBFGS([w, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(x[train] @ w + bias, target[train], reduction="sum") * 0.1
        value = value + w.square().sum() / 2
        value.backward()
        return value

    solver.step(loss)
    right = ((x[test] @ w + bias).argmax(1) == target[test]).double().mean().item()
    assert found["documents"] == len(chosen) > 10
    close(found["chance"], 1 / len(chosen), 1e-4)
    close(found["accuracy"], right, floor=0.02)
    assert means(base)["document_id"] == pytest.approx(found["accuracy"], abs=1e-4)


def test_the_linear_limit_equals_another_solver(base, held_out):
    h, found = held_out, read(base / "consistency.json")["linear_limit"]
    numbers = np.unique(h.doc[h.doc > 0])
    half = np.random.default_rng(0).permutation(len(numbers)) < len(numbers) / 2
    fitted = np.isin(h.doc, numbers[half])
    x = h.x - h.x[fitted].mean(0)
    pairs = [p for p in h.pairs(16) if fitted[p[0], p[1]]]
    lagged = sum(np.outer(x[r, t], x[r, u]) for r, t, u in pairs) / len(pairs)
    covariance = x[fitted].T @ x[fitted] / fitted.sum()
    covariance += 1e-4 * np.trace(covariance) / D_IN * np.eye(D_IN)
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors / np.sqrt(values)
    slow = whiten @ np.linalg.eigh(whiten.T @ (lagged + lagged.T) / 2 @ whiten)[1][:, ::-1]
    z = x @ slow[:, :10]
    for at, lag in enumerate(found["lags"]):
        pairs = [p for p in h.pairs(lag) if not fitted[p[0], p[1]]]
        row, left, right = map(list, zip(*pairs))
        rho = [correlation(z[row, left, i], z[row, right, i]) for i in range(10)]
        close(found["mean"]["10"][at], np.mean(rho), 1e-3, 1e-3)
    assert found["fitted_at"] == 16 and set(found["mean"]["50"]) == {None}, "d_in is 32"


def test_the_boundary_equals_a_loop_over_places(base, held_out):
    h, found = held_out, read(base / "consistency.json")["boundary"]
    f = h.f[..., :16]
    distance, join = [], []

    def look(r, before, after):
        a, b = f[r, before].mean(0), f[r, after].mean(0)
        size = np.linalg.norm(a) * np.linalg.norm(b)
        distance.append(1 - (a @ b / size if size > 0 else 0))

    segments = h.segments()
    for (r, piece), following in zip(segments, [*segments[1:], (-1, [])]):
        for cut in range(8, len(piece) - 7, 8):
            look(r, piece[cut - 8 : cut], piece[cut : cut + 8])
            join.append(False)
        if following[0] == r and min(len(piece), len(following[1])) >= 8:
            look(r, piece[-8:], following[1][:8])
            join.append(True)
    assert (found["joins"], found["inside"]) == (sum(join), len(join) - sum(join))
    close(found["lead"], auroc(distance, np.array(join)), floor=1e-3)


def test_the_null_is_what_tokens_permuted_inside_their_segment_give(base, held_out):
    """Its expectation has a closed form: every pair of a segment is as likely as any other."""
    h, c = held_out, read(base / "consistency.json")
    f, fires = h.f, (h.f[h.ok] != 0).sum(0)
    kept = np.flatnonzero(fires >= 20)
    for at, lag in enumerate((1, 4)):
        sums = np.zeros((4, 64))  # of f_s f_t, of f, of f^2, number of pairs
        for r, piece in h.segments():
            n, n_pairs = len(piece), max(0, piece[-1] - piece[0] + 1 - lag)
            if n > 1 and n_pairs > 0:
                total, square = f[r, piece].sum(0), (f[r, piece] ** 2).sum(0)
                sums += n_pairs * np.array([(total**2 - square) / n / (n - 1), total / n, square / n,
                                            np.ones(64)])
        product, mean, square = sums[:3] / sums[3]
        rho = ((product - mean**2) / (square - mean**2))[kept]
        ours = c["autocorr_null"]["whole"]["mean"][{1: 0, 4: 2}[lag]]
        close(ours, rho.mean(), floor=0.03)
        assert at > 0 or c["autocorr"]["whole"]["mean"][0] > ours + 0.05, "order means nothing here"


def test_the_shuffle_of_the_null_crosses_no_segment(by_hand):
    seg = evaluate.segment_ids(by_hand.doc)
    order = evaluate.permute_segments(seg, np.random.default_rng(0))
    assert sorted(order) == list(range(seg.size)) and (seg[order] == seg).all()
    assert (order[seg < 0] == np.flatnonzero(seg < 0)).all() and (order != np.arange(seg.size)).any()


def test_as_many_of_the_best_latents_are_the_measure_of_the_lead(base):
    c = read(base / "consistency.json")
    table = c["latents"]
    best = sorted([rho for rho in table["autocorr_16"] if rho is not None], reverse=True)[:16]
    close(means(base)["autocorr_16_best"], np.mean(best), floor=2e-3)
    assert c["autocorr_best"]["n"] == 16


# -- SAEs whose scores are known


def test_the_identity_scores_exactly_one(work, tiny):
    eye = torch.eye(D_IN)
    tensors = {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye]),
               "b_enc": torch.zeros(2 * D_IN), "b_dec": torch.zeros(D_IN)}
    folder = save_foreign(work / "known" / "identity", "standard", tensors)
    core, _ = judged(folder, work / "known_scores" / "identity", tiny)
    metrics, ours = core["eval_result_metrics"], core["eval_result_unstructured"]["ours"]
    flat = {name: value for block in metrics.values() for name, value in block.items()}
    names = ["explained_variance", "cossim", "l2_ratio", "relative_reconstruction_bias",
             "ce_loss_score", "kl_div_score"]
    assert {name: ours[name] for name in names} == dict.fromkeys(names, 1.0)
    names.append("explained_variance_legacy")
    assert {name: flat[name] for name in names} == dict.fromkeys(names, 1.0)
    assert ours["mse"] == flat["mse"] == flat["kl_div_with_sae"] == 0


def test_predicting_the_mean_explains_nothing_and_zero_less(work, tiny, held_out):
    silent = {"W_enc": torch.zeros(D_IN, 48), "W_dec": torch.eye(48, D_IN),
              "b_enc": -torch.ones(48), "b_dec": torch.zeros(D_IN)}
    mean = torch.from_numpy(held_out.x[held_out.ok].mean(0)).float()
    folder = save_foreign(work / "known" / "mean", "standard", silent | {"b_dec": mean})
    core, _ = judged(folder, work / "known_scores" / "mean", tiny)
    assert core["eval_result_unstructured"]["ours"]["explained_variance"] == pytest.approx(0, abs=1e-5)
    folder = save_foreign(work / "known" / "zero", "standard", silent)
    core, consistency = judged(folder, work / "known_scores" / "zero", tiny)
    ours = core["eval_result_unstructured"]["ours"]
    assert ours["explained_variance"] < 0 and ours["cossim"] == ours["l0"] == ours["frac_alive"] == 0
    # codes that never fire have no correlation: null and a reason, never NaN or -1
    assert ours["relative_reconstruction_bias"] is None
    assert consistency["autocorr"]["whole"]["mean"][0] is None and consistency["notes"]["autocorr"]
    assert all(math.isfinite(value) for value in means(work / "known_scores" / "zero").values())


def test_copied_latents_are_found_redundant_and_together(work, base, tiny):
    core = read(base / "core.json")
    order = np.argsort([-row["feature_density"] for row in core["eval_result_details"]], kind="stable")
    busy, idle = int(order[2]), [int(i) for i in order[-(evaluate.PARTNERS + 1):]]
    for copies in (1, evaluate.PARTNERS, evaluate.PARTNERS + 1):
        tensors = weights(base)
        for i in idle[:copies]:
            tensors["W_enc"][:, i] = tensors["W_enc"][:, busy]
            tensors["W_dec"][i] = tensors["W_dec"][busy]
            tensors["b_enc"][i] = tensors["b_enc"][busy]
        folder = save_foreign(work / "known" / f"copied_{copies}", "jumprelu", tensors)
        out = work / "known_scores" / f"copied_{copies}"
        found = judged(folder, out, tiny)[1]["redundancy"]
        top = found["top_pairs"][0]
        close([top["corr"], top["decoder_cosine"]], [1, 1])
        assert set(top["latents"]) <= {busy, *idle[:copies]}
        assert (copies + 1) / found["latents"] <= found["share_above_0.9"] < 0.7
        block = {busy, *idle[:copies]}
        crowd = copies > evaluate.PARTNERS  # so many partners, not more
        assert block <= set(found["together"]) if crowd else not block & set(found["together"])
    assert 0 < found["together_mass_share"] < 1 and means(out)["together"] == len(found["together"])


def test_matching_across_seeds_undoes_a_permutation():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 8, generator=generator)
    order = torch.randperm(40, generator=generator)
    close(evaluate.pw_mcc([W, 3 * W[order]]), [1])
    assert evaluate.pw_mcc([W, torch.randn(40, 8, generator=generator)])[0] < 0.95


def test_core_json_has_the_keys_of_saebench(scored):
    core = scored[0]
    keys = {
        "model_behavior_preservation": "kl_div_score kl_div_with_ablation kl_div_with_sae",
        "model_performance_preservation":
            "ce_loss_score ce_loss_with_ablation ce_loss_with_sae ce_loss_without_sae",
        "reconstruction_quality": "explained_variance explained_variance_legacy mse cossim",
        "shrinkage": "l2_norm_in l2_norm_out l2_ratio relative_reconstruction_bias",
        "sparsity": "l0 l1",
        "token_stats": "total_tokens_eval_reconstruction total_tokens_eval_sparsity_variance",
        "misc_metrics": "freq_over_1_percent freq_over_10_percent normalized_freq_over_1_percent "
                        "normalized_freq_over_10_percent average_max_encoder_cosine_sim "
                        "average_max_decoder_cosine_sim frac_alive"}
    metrics = core["eval_result_metrics"]
    assert {name: set(block) for name, block in metrics.items()} == {
        name: set(words.split()) for name, words in keys.items()}
    row = """index feature_density consistent_activation_heuristic encoder_bias encoder_norm
        encoder_decoder_cosine_sim max_decoder_cosine_sim max_encoder_cosine_sim""".split()
    assert len(core["eval_result_details"]) == 64
    assert all(set(entry) == set(row) for entry in core["eval_result_details"])
    top = """eval_type_id eval_config eval_id datetime_epoch_millis sae_bench_commit_hash sae_lens_id
        sae_lens_release_id sae_lens_version sae_cfg_dict eval_result_unstructured""".split()
    assert set(top) <= set(core) and core["eval_type_id"] == "core"


LABELLED = {"str": ["sea", "law"], "int": [0, 1], "bool": [False, True], "none": [None, "Uncategorized"],
            "list": [["sea"], ["law"]], "dict": [{"name": "sea"}, {"name": "law"}]}


@pytest.mark.parametrize("kind", LABELLED)
def test_topics_are_scored_as_they_come_and_a_run_never_fails_for_them(work, base, lm_dir, kind):
    """Class 0 counts; lists, dicts and Uncategorized are no topic."""
    first = sorted(TOPICS)[0]
    rows = [{"text": row["text"], "topic": LABELLED[kind][row["topic"] == first]} for row in STORIES]
    (work / f"labelled_{kind}.jsonl").write_text(json_lines(rows))
    out = work / "labelled" / kind
    words = ["--dataset", str(work / f"labelled_{kind}.jsonl"), "--out", str(out)]
    assert evaluate.main([str(base), *words, "--reconstruction_rows", "1"]) == 0
    found = read(out / "consistency.json")["probes"]["by_class"]["token_topic"]
    labels = {str(label) for label in LABELLED[kind]} if kind in ("str", "int", "bool") else set()
    assert set(found) == labels and ("token_topic_5" in means(out)) == bool(labels)


def test_latents_json_says_what_the_codes_say(base, held_out):
    """Rows, documents and passages of the page against the codes by hand."""
    page, h = read(base / "latents.json"), held_out
    assert (page["run"], page["lead"], page["d_sae"], page["seed"]) == ("base", 16, 64, 0)
    assert page["headline"].keys() == means(base).keys() and len(page["rows"]) == 88
    f = h.f * h.ok[..., None]
    for entry in page["latents"]:
        i = entry["i"]
        close(entry["max"], f[..., i].max(), 5e-3)
        close(entry["rate"], (f[..., i] != 0).sum() / h.ok.sum(), 5e-3)
        for passage in entry["passages"]:
            here = range(passage["from"], passage["to"])
            fired = [t for t in here if f[passage["row"], t, i] > 0]
            assert passage["at"] == fired and len(set(h.doc[passage["row"], fired])) == 1
            level = [math.ceil(99 * f[passage["row"], t, i] / f[..., i].max()) for t in fired]
            assert np.abs(np.subtract(passage["a"], level)).max() <= 1
        assert {"top"} <= {passage["q"] for passage in entry["passages"]}
    assert {entry["i"] for entry in page["latents"]} == set(np.flatnonzero(f.any((0, 1))))
    assert {text["kind"] for text in page["texts"]} == {"document", "join"}
