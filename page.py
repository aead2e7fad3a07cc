"""A page of latents: what they are about, and how they last along a text.

    python page.py run_6          one run -> runs/run_6/latents.html
    python page.py run_0 run_6    two runs side by side, into the directory of the last one

It encodes the held-out rows with the SAE of each run (of several seeds the first) and writes one
file that asks the network for nothing. Of each latent that fires MIN_FIRINGS times or more it says

    ρ(16), span     as evaluate.py measures them
    typical words   of a leading latent, and a topic: those of the highest lift (see `typical`)
    top tokens      of another latent: the tokens on which its codes add up highest
    start of row    it fires START_LIFT times as often on the first FIRST tokens of rows as on all:
                    it marks the place, not what is said

Where no loss binds leading latents, as many that last longest, by ρ(16), stand for them.
"""
import functools
import json
import re
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer

import evaluate
import prepare

WORD_LIFT, TOPIC_LIFT, LEAST = 3.0, 2.0, 3  # least lifts, and documents with the word or topic
FIRST, START_LIFT = 5, 3.0
BEFORE, AFTER = 24, 12  # tokens of a passage before and after the one it is chosen for
N_TEXTS, HALF = 6, 64  # texts shown with all codes, and tokens before and after their middle


class Text:
    """The held-out rows as a reader sees them. Arrays over tokens are flat."""

    def __init__(self, held_out):
        rows = held_out.rows
        strings = token_strings(rows.tokens, held_out)
        self.strings, self.which = np.unique(strings, return_inverse=True)
        self.shown_at = np.maximum.accumulate(np.where(strings != "", np.arange(len(strings)), 0))
        valid = np.flatnonzero(rows.valid)
        documents, number = np.unique(rows.flat_doc[valid], return_inverse=True)
        share = (1 / np.bincount(number)[number], (number, valid))
        self.average = sparse.csr_matrix(share, (len(documents), rows.doc.size))  # over tokens
        texts = ["".join(strings[rows.flat_doc == document]) for document in documents]
        counter = CountVectorizer(binary=True, token_pattern=r"\w*[^\W\d_]\w+")
        self.words = (counter.fit_transform(texts), counter.get_feature_names_out())
        topics = np.array(list(rows.topic_members), str)
        labels = np.array([rows.topics.get(document - 1, "") for document in documents], str)
        self.topics = ((labels[:, None] == topics).astype(float), topics)
        _, first = np.unique(rows.seg[valid], return_index=True)
        begin = valid[first]  # of each segment
        self.segments = list(zip(begin.tolist(), labels[number[first]].tolist()))
        middle = abs(rows.place[begin] - rows.context / 2)  # a document begins in mid row
        best = begin[np.argsort(middle, kind="stable")[:N_TEXTS]]
        row = best - rows.place[best]  # where the row begins
        edges = [np.maximum(row, best - HALF), np.minimum(row + rows.context, best + HALF)]
        self.excerpts = np.stack(edges, 1).tolist()


def token_strings(tokens, held_out):
    """(n,) the string of each token; joined they are the text. Special tokens are empty, and of a
    character that is split into several tokens all but the first, at which it stands."""
    ids = tokens.ravel().tolist()
    _, special = prepare.special_ids(held_out.tokenizer)
    strings = np.array(["" if token in special else held_out.text(token) for token in ids], object)
    for at in np.flatnonzero([string.endswith("\ufffd") for string in strings]):
        for n in (2, 3, 4):
            whole = held_out.tokenizer.decode(ids[at:at + n])
            if strings[at] and "\ufffd" not in whole:
                strings[at:at + n] = [whole] + [""] * (n - 1)
                break
    return strings


def typical(weight, holds, names, least):
    """[(name, lift)] of up to six names that are typical of documents, the highest lift first.

    weight (documents,): mean code of a latent; holds (documents,names): 1 where one holds a name.
    The weights are worth n = (sum w)^2 / sum w^2 equal ones. Documents with a name have a share p
    of them, a share q of all documents: lift = (n p + 1) / (n q + 1), near 1 where few have a say.
    """
    n = weight.sum()**2 / (weight**2).sum()
    p = holds.T @ weight / weight.sum()
    q = evaluate.column_sums(holds) / len(weight)
    lift = (n * p + 1) / (n * q + 1)
    lift[holds.T @ (weight > 0).astype(float) < LEAST] = 0
    best = np.argsort(-lift, kind="stable")[:6]
    return [(str(names[i]), round(lift[i], 1)) for i in best if lift[i] > least]


def passages(at, value, rows):
    """[(from, to)] around the highest code of a latent in some documents: the three where it is
    highest, and the median one. at: the tokens where it fires; value: its codes there."""
    order = np.argsort(-value, kind="stable")
    _, first = np.unique(rows.flat_doc[at[order]], return_index=True)
    highest = at[order[np.sort(first)]]
    found = []
    for place in highest[sorted({*range(min(3, len(first))), len(first) // 2})].tolist():
        near = np.arange(max(0, place - BEFORE), min(rows.doc.size, place + AFTER))
        inside = near[rows.seg[near] == rows.seg[place]]
        found.append((int(inside[0]), int(inside[-1]) + 1))
    return found


def digits(at, value, begin, end):
    """The codes of a latent from begin to end: 0 to 9 a token, "(n)" for n zeros in a row."""
    inside = slice(*np.searchsorted(at, [begin, end]))
    line = np.zeros(end - begin, int)
    line[at[inside] - begin] = np.ceil(9 * value[inside] / value.max())
    return re.sub("0{4,}", lambda zeros: f"({len(zeros[0])})", "".join(map(str, line)))


def add_meaning(latents, codes, text, rows):
    """Add to each latent what it is about. codes: (tokens,d_sae) csc, all above 0"""
    weights = (text.average @ codes).tocsc()
    for latent in latents:
        weight = weights[:, [latent["i"]]].toarray().ravel()
        found = typical(weight, *text.words, WORD_LIFT) if latent["lead"] else []
        latent["words"] = [word for word, _ in found]
        latent["topic"] = typical(weight, *text.topics, TOPIC_LIFT)[:1]
        code = codes[:, [latent["i"]]]
        at, value = code.indices, code.data
        total = np.bincount(text.which[text.shown_at[at]], value)
        n_top = min(5, np.count_nonzero(total))
        latent["top"] = text.strings[np.argsort(-total, kind="stable")[:n_top]].tolist()
        places = passages(at, value, rows)
        latent["from"] = [begin for begin, _ in places]
        latent["codes"] = [digits(at, value, *place) for place in places + text.excerpts]


def latents_of(cfg, sae, held_out, text):
    """[{name: value}] of the latents that fire MIN_FIRINGS times or more."""
    rows = held_out.rows
    batches = held_out.acts.flatten(0, 1).split(evaluate.BATCH_ROWS * rows.context)
    blocks = [evaluate.to_csr(sae.encode(x.to(sae.W_dec.device).float())) for x in batches]
    codes = sparse.vstack(blocks).multiply(rows.valid[:, None]).tocsr().maximum(0)
    fires = codes.getnnz(axis=0)
    rate = fires / rows.valid.sum()
    rho = evaluate.autocorrelation(codes, rows, [evaluate.BEST_LAG])[0]
    span = evaluate.spans(codes, rows.seg)
    first = np.flatnonzero(rows.valid & (np.cumsum(rows.doc > 0, axis=1).ravel() <= FIRST))
    start = codes[first].getnnz(axis=0) / len(first) >= START_LIFT * rate
    lead = np.arange(evaluate.leading_latents(sae, cfg))
    if not evaluate.has_lead(sae):
        lead = evaluate.best_latents(rho, fires >= evaluate.MIN_FIRINGS, len(lead))
    found = []
    for i in np.flatnonzero(fires >= evaluate.MIN_FIRINGS):
        numbers = {"i": i, "lead": i in lead, "start": start[i], "rho": rho[i], "span": span[i]}
        found.append(evaluate.plain(numbers | {"rate": 100 * rate[i]}, 3))
    if text is not None:
        add_meaning(found, codes.tocsc(), text, rows)
    return found


def page_data(names, changes):
    """-> (what the page holds, as JSON takes it; folder of the last run)"""
    data = {"runs": []}
    text = None
    tokens = []
    for name in names:
        folder = evaluate.find_run(name)
        cfg, _ = evaluate.read_settings(folder, changes)
        device = prepare.pick_device(cfg["device"])
        sae = evaluate.load_sae(evaluate.find_seeds(folder, cfg)[0], device)
        held_out = evaluate.hold_out(cfg, sae.W_dec.shape[1], device)
        tokens.append(held_out.rows.tokens)
        if not np.array_equal(tokens[0], tokens[-1]):
            raise ValueError(f"{names[0]} and {name} are not judged on the same rows of tokens")
        if text is None and held_out.text is not None:
            text = Text(held_out)
            data |= {"strings": text.strings.tolist(), "tokens": text.which.tolist(),
                     "texts": text.excerpts, "documents": text.segments}
        run = {"run": folder.resolve().name, "bound": evaluate.has_lead(sae), "scores": {}}
        if (folder / "final_info.json").is_file():
            run["scores"] = prepare.read_json(folder / "final_info.json")
        run |= {name: cfg.get(name) for name in ("temp_loss", "temp_alpha", "window")}
        run |= {"d_sae": len(sae.W_dec), "n_lead": evaluate.leading_latents(sae, cfg)}
        run |= held_out.record["scored_on"]
        data["runs"].append(run | {"latents": latents_of(cfg, sae, held_out, text)})
    return data, folder


def write_page(data, out):
    """Write the page: the template with the data in it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # or a text that holds </script> would end the data
    template = Path(__file__).with_name("page_template.html").read_text(encoding="utf-8")
    page = template.replace("__DATA__", text)
    prepare.write_whole(out, functools.partial(
        Path.write_text, data=page, encoding="utf-8", errors="replace", newline="\n"))
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


def main(argv=None):
    """The command. -> exit code: 0, 1 it failed, 2 bad usage or input."""
    parser = prepare.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="one run or two: folder or name")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write here")
    parser.add_argument("--device", help="auto, cpu, cuda, ...")
    parser.add_argument("--cache_dir", help="as in evaluate.py")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    try:
        args = parser.parse_args(argv)
        if len(args.runs) > 2:
            raise ValueError("a page shows one run or two")
        if args.out and args.out.suffix != ".html":  # it would replace a record
            raise ValueError(f"--out {args.out} does not end in .html")
        changes = {name: vars(args)[name] for name in ("device", "cache_dir") if vars(args)[name]}
        data, folder = page_data(args.runs, changes)
        write_page(data, args.out or folder / "latents.html")
        return 0
    except Exception as error:  # whatever went wrong, the user gets one sentence
        return prepare.report(error, "--debug" in (sys.argv if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
