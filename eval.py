"""Three lenses on a trained model: how well it predicts, what it answers, what it writes. A report, report.html, and a line of JSON last.

    python eval.py --out_dir=out/ts                                        on the validation split of the data it was trained on
    python eval.py --out_dir=out/ts,out/small --report_dir=out/compare     several on the same text: bits a byte can be compared, losses cannot
    python eval.py --out_dir=out/ts --text=other.txt --judge_url=http://127.0.0.1:8000/v1 --judge_model=NAME

1 likelihood: loss, perplexity, bits a byte with 95% intervals over documents; loss by position; for toy stories the distance to their entropy.
2 probes (lenses/probes.py): questions with one right answer, chance beside the accuracy. 3 reading (lenses/reading.py): samples for fixed prompts at a fixed
seed, marked by rules beside real text, and by a judge (lenses/judge.py) if there is one. The verdict (lenses/verdict.py) says whether the three agree.
"""
import json
import math
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

import checkpoint
import prepare
import toy_stories
from config import Refusal, is_hf, run
from device import check_memory, resolve
from lenses import judge, page, probes, reading, report
from lenses.stats import bits, bootstrap, mean_interval
from lenses.verdict import compare, grade, verdict
from model import HAS_CHUNKED_LOSS, Transformer, kv_cache_bytes, num_params
from sample import finish, generate, prompt_ids
from tokenizer import Tokenizer
from train import above_floor, documents_of, evaluate, token_nats

FEW = 30            # documents; with fewer, text is resampled in slices, and paragraphs stand for documents
SLICE = 1000        # bytes
BINS = 24           # of the loss by position
LOGITS = 1 << 26    # held at once: 256 MB
PASSAGE_TOKENS = 1 << 22  # of a split, at its beginning, that passages are taken from
PROMPTS, OPENING = 8, 4   # prompts, of so many words
JUDGED = 12         # texts of each column that the judge reads


@dataclass
class Config:
    out_dir: str = "out"          # the folder of a trained model, a checkpoint file, or hf:FOLDER_OR_NAME; A,B,C compares several
    text: str = ""                # a .txt .md .jsonl .parquet file to evaluate on; "" = the validation split of the first model's data
    report_dir: str = ""          # where report.html goes; "" = out_dir, or out/compare for several and for hf:
    num_samples: int = 6          # texts for each of the 8 prompts
    max_new_tokens: int = 300     # tokens at most, each; where tokenizers differ as many bytes
    temperature: float = 0.8      # of the samples; 0 = always the likeliest token
    top_k: int = 200              # of the samples: keep the k likeliest tokens; 0 = all
    num_cases: int = 150          # about so many questions a probe
    resamples: int = 2000         # of the bootstrap
    seed: int = 1337              # of samples, probes and resampling
    judge_url: str = ""           # an OpenAI-compatible server, as http://127.0.0.1:8000/v1; the environment's JUDGE_API_KEY is its key
    judge_model: str = "default"  # the server's name for the model that judges
    judge_timeout: float = 60.0   # seconds an answer may take
    device: str = "auto"          # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"           # of matrix products: auto | float32 | bfloat16 | float16

    def __post_init__(self):
        for key, least, most in (("num_samples", 1, 1000), ("max_new_tokens", 1, 10 ** 6), ("num_cases", 22, 10 ** 5),
                                 ("resamples", 1000, 10 ** 6), ("top_k", 0, 10 ** 9)):
            if not least <= getattr(self, key) <= most:
                raise ValueError(f"{key} must be at least {least} and at most {most:,}, not {getattr(self, key)}")
        if self.temperature < 0:
            raise ValueError("temperature cannot be negative; 0 is greedy")
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError("seed must be at least 0 and below 2^63")
        if self.judge_timeout <= 0 or self.judge_timeout > 3600:
            raise ValueError(f"judge_timeout must be above 0 and at most 3600 seconds, not {self.judge_timeout}")
        if self.judge_url:
            try:
                url = urlsplit(self.judge_url)
                good = url.scheme in ("http", "https") and url.hostname and url.port != 0 and re.fullmatch(r"[!-~]+", self.judge_url)
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"judge_url must be like http://127.0.0.1:8000/v1, not {self.judge_url!r}")
        if not all(part.strip() for part in self.out_dir.split(",")):
            raise ValueError(f"out_dir must name a folder, or several with a comma between, not {self.out_dir!r}")


@dataclass
class Subject:
    """A checkpoint under evaluation."""
    name: str
    path: str
    step: int
    model: Transformer
    tokenizer: Tokenizer
    dataset: str      # its data's folder
    training: object  # (ids, tokenizer) of its training text, or the sentence that says why there is none


# ---------------------------------------------------------------------------------------------------------------------
# What is evaluated, on what

def subjects(cfg, compute):
    """The checkpoints that out_dir names, and the validation split of the first one's data: (ids, tokenizer) or None."""
    names = [cfg.out_dir] if os.path.exists(cfg.out_dir) else [name.strip() for name in cfg.out_dir.split(",")]
    found, validation, loaded = [], None, {}
    for name in names:
        path = checkpoint.find(name)
        ckpt = checkpoint.load(path)
        model, tokenizer = checkpoint.restore(ckpt, path, compute.device)
        dataset = checkpoint.dataset_of(ckpt)
        elsewhere = is_hf(path) or not dataset
        folder = "data elsewhere" if elsewhere else os.path.join("data", dataset)
        try:
            if elsewhere:
                raise Refusal("it was trained elsewhere, on what is not here")
            if folder not in loaded:
                loaded[folder] = prepare.load(folder)
            _, data, its = loaded[folder]
            if its.sha256 != ckpt["tokenizer_sha256"]:
                raise Refusal(f"{folder} was prepared anew, with another tokenizer than {path} was trained with")
            training = data["train"], its
            if not found:
                validation = data["val"], its
        except Refusal as e:
            training = str(e)
            if not found and not cfg.text:
                raise Refusal(f"{path} was trained on {folder}, which cannot be read: {e}. Or give a text with --text=FILE")
        found.append(Subject(name, path, ckpt["step"], model, tokenizer, folder, training))
    return found, validation


def read_file(path):
    """(the documents of a file, whether each has an end), as prepare.py cuts them. Raises Refusal."""
    cfg = prepare.Config(dataset=path, name="text")
    if not os.path.isfile(path):
        raise Refusal(f"there is no file {path}")
    if not path.lower().endswith(tuple(prepare.READERS)):
        raise Refusal(f"{path}: no text file by its name, which should end in {' '.join(prepare.READERS)}")
    try:
        documents = list(prepare.documents([prepare.Path(path)], cfg))
    except OSError as e:
        raise Refusal(f"cannot read {path}: {e.strerror}")
    if not documents:
        raise Refusal(f"{path}: there is no text in it")
    return documents, len(documents) > 1


def split_documents(ids, tokenizer):
    """(the documents of a split as texts, whether the last one has an end)."""
    closed = len(ids) > 0 and bool(ids[-1] == tokenizer.eot)
    found = documents_of(ids if closed else np.r_[ids, tokenizer.eot], tokenizer)
    return [tokenizer.decode(document.tolist()) for document in found if len(document)], closed


def encode(documents, closed, tokenizer):
    """Their ids as prepare.py has them, with end-of-text between documents, and after the last if closed."""
    ids = [i for document in tokenizer.encode_batch(documents) for i in (*tokenizer.head, *document, tokenizer.eot)]
    return np.array(ids if closed else ids[:-1])


def passages(documents):
    """Documents, or where they are few, the paragraphs in them."""
    if len(documents) >= FEW:
        return documents
    return [p.strip() for text in documents for p in text.split("\n\n") if p.strip()]


def shuffled(items, seed, n):
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))[:n]]


# ---------------------------------------------------------------------------------------------------------------------
# Lens 1: likelihood

def units(ids, tokenizer, few):
    """The unit that each token belongs to: its document with the end-of-text after it, or where they are few its slice of SLICE bytes.
    Also each token's bytes. Both (n,) int64; another tokenizer has the same units on the same text."""
    marks = tokenizer.eot, tokenizer.bos
    lengths = np.array([0 if i in marks else len(token) for i, token in enumerate(tokenizer.tokens)])[ids]
    lengths[np.r_[True, np.isin(ids[:-1], marks)] & (lengths > 0)] -= tokenizer.prefix  # which is not in the text
    if few:
        return (np.cumsum(lengths) - 1).clip(0) // SLICE, lengths  # by the last byte, which another tokenizer's tokens have too
    ended = ids == tokenizer.eot
    return np.cumsum(ended) - ended, lengths


def likelihood(subject, documents, closed, compute, cfg):
    """(the figures, columns (units, 4) of nats, targets, tokens, bytes to resample)."""
    c = subject.model.config
    T, rows = c.block_size, min(32, LOGITS // (c.block_size * c.vocab_size))  # 0: even one row's logits would be too many
    B, subject.model.chunked_loss = max(1, rows), not rows and HAS_CHUNKED_LOSS
    ids = encode(documents, closed, subject.tokenizer)
    if len(ids) < 2:
        raise Refusal(f"the text has {len(ids)} tokens and needs 2")
    nats = token_nats(subject.model, ids, T, compute, B).astype(np.float64)
    if not np.isfinite(nats).all():
        raise Refusal(f"{subject.path}: its loss is not finite; it was damaged in training", status=1)
    if subject.tokenizer.head:
        nats[ids[1:] == subject.tokenizer.bos] = 0  # what is known to follow end-of-text is not predicted
    few = len(documents) < FEW
    unit, lengths = units(ids, subject.tokenizer, few)
    columns = np.column_stack([np.bincount(unit[1:], nats, unit[-1] + 1), np.bincount(unit[1:], minlength=unit[-1] + 1),
                               np.bincount(unit), np.bincount(unit, lengths)])
    loss, total = nats.mean(), lengths.sum()
    low, high = bootstrap(columns, lambda s: s[:, 0] / s[:, 1], cfg.resamples, cfg.seed)
    frequencies = np.bincount(ids[1:]) / len(nats)
    unigram = -(frequencies[frequencies > 0] * np.log(frequencies[frequencies > 0])).sum()
    found = {"loss": loss, "loss_low": low, "loss_high": high, "bits_per_byte": loss * len(ids) / total / math.log(2), "tokens": len(ids),
             "bytes": int(total), "units": len(columns), "unit": f"slices of {SLICE:,} bytes" if few else "documents", "unigram": unigram,
             "explained": 1 - loss / unigram if unigram else 0.0, "by_position": by_position(nats, T)}
    for end in "", "_low", "_high":
        found[f"perplexity{end}"] = math.exp(min(found[f"loss{end}"], 700))
    found["bits_low"], found["bits_high"] = bootstrap(columns, bits, cfg.resamples, cfg.seed)
    if not isinstance(subject.training, str):
        found["training_loss"] = evaluate(subject.model, subject.training[0], T, B, compute, 1 << 16)
    return found | toy_gap(subject, documents, closed, ids, compute), columns


def by_position(nats, T):
    """[first, last, mean nats, targets] over the number of tokens of context, from 1 to T, in at most BINS bins, narrow ones first."""
    place = np.arange(len(nats)) % T
    sums, counts = np.bincount(place, nats), np.bincount(place)
    edges = np.unique(np.r_[np.geomspace(1, len(counts) + 1, BINS + 1).astype(int), len(counts) + 1])
    return [[int(a), int(b - 1), float(sums[a - 1:b - 1].sum() / counts[a - 1:b - 1].sum()), int(counts[a - 1:b - 1].sum())]
            for a, b in zip(edges, edges[1:])]


def is_toy(documents):
    return all(toy_stories.log_prob(text) > -math.inf for text in documents[:20])


def toy_gap(subject, documents, closed, ids, compute):
    """For toy stories the nats a story above their exact entropy. Nothing for other texts, or where a story is longer than the context."""
    if not is_toy(documents):
        return {}
    try:
        floor, gap = above_floor(subject.model, subject.tokenizer, ids if closed else np.r_[ids, subject.tokenizer.eot], compute)
    except ValueError:
        return {}
    if not np.isfinite(floor).all():  # stories of another kind among them
        return {}
    return {"floor": floor.mean(), "above_floor": gap.mean(), "above_floor_error": gap.std() / len(gap) ** 0.5, "stories": len(gap)}


# ---------------------------------------------------------------------------------------------------------------------
# Lens 2: probes

def probe(subject, asked, compute, cfg):
    def nats(pairs):
        return probes.completion_nats(subject.model, subject.tokenizer, pairs, compute)
    results = [probes.ask(p, nats) for p in asked]
    if not results:
        return {"probes": []}
    skills = probes.skills(results)
    low, high = probes.skill_interval(skills, cfg.resamples, cfg.seed)
    return {"skill": float(np.mean([s.mean() for s in skills])), "skill_low": low, "skill_high": high, "probes": results}


# ---------------------------------------------------------------------------------------------------------------------
# Lens 3: reading

def openings(found, documents):
    """The prompts: the first words of passages, the beginning of a document among them."""
    texts = [" ".join(p.split(" ")[:OPENING]) for p in found if len(p.split()) > 2 * OPENING]
    prompts = [""] * (len(documents) >= FEW) + list(dict.fromkeys(t.split("\n")[0] for t in texts))
    return prompts[:PROMPTS] or [""]


def write(subject, prompts, most, compute, cfg):
    """[(prompt, text with the prompt, whether it came to an end)], of up to `most` new tokens."""
    asked = [prompt for prompt in prompts for _ in range(cfg.num_samples)]
    ids = [prompt_ids(subject.tokenizer, prompt) for prompt in asked]
    c = subject.model.config
    check_memory(compute.device, kv_cache_bytes(c, len(asked), c.block_size, 4), "try a smaller num_samples")
    with compute.autocast(), tqdm(total=most, desc="samples", disable=None, leave=False) as bar:
        new, ended = finish(generate(subject.model, ids, most, cfg.temperature, cfg.top_k, stop=subject.tokenizer.eot, seed=cfg.seed,
                                     past_end="recompute"), lambda _: bar.update())
    return [(prompt, prompt + subject.tokenizer.decode_more(row), end == "stop") for prompt, row, end in zip(asked, new, ended)]


def real(found, tokenizer, n, most):
    """n passages as if they had been written: [(prompt, text, whether it came to an end)], cut where a sample would be."""
    ids = [tokenizer.encode(text) for text in found[:n]]
    return [("", tokenizer.decode(row[:most]), len(row) <= most) for row in ids]


def read(written, copied, made_up, kind, cfg):
    """The figures of a column: each rule's mean, the score (their mean) with its interval, and what was written with its marks."""
    toy, ends, known = kind
    marked = [reading.marks(text, ended if ends else None, made_up if known else None, toy) for _, text, ended in written]
    scores = [float(np.mean(list(m.values()))) for m in marked]
    low, high = mean_interval(scores, cfg.resamples, cfg.seed)
    found = {"score": float(np.mean(scores)), "score_low": low, "score_high": high,
             "marks": {key: float(np.mean([m[key] for m in marked])) for key in marked[0]}, "n": len(written),
             "distinct": reading.distinct([text for _, text, _ in written]),
             "texts": [{"prompt": p, "text": text, "ended": ended, "marks": m, "copied": None if copied is None else float(copied[i])}
                       for i, ((p, text, ended), m) in enumerate(zip(written, marked))]}
    if copied is not None:
        found["copied"] = float(np.mean(copied))
        found["made_up"] = sorted({word for _, text, _ in written for word in reading.WORD.findall(text.lower())} & made_up)[:100]
    return found


def read_all(found, prompts, passages_, kind, bytes_a_token, compute, cfg):
    """The columns of the reading lens: a dict for each subject, then {"unseen": ..., "training": ...} of real text.
    kind: whether they are toy stories, whether documents have ends that a model can have learned, whether all training texts are here.
    bytes_a_token: of each subject; where they differ, one with shorter tokens may write more of them, so that texts are cut alike."""
    most = [round(cfg.max_new_tokens * max(bytes_a_token) / its) for its in bytes_a_token]
    written = [write(s, prompts, m, compute, cfg) for s, m in zip(found, most)]
    n = len(written[0])
    unseen, columns = real(passages_, found[0].tokenizer, n, most[0]), {}
    for source in dict.fromkeys((s.dataset, type(s.training)) for s in found):
        mine = [i for i, s in enumerate(found) if (s.dataset, type(s.training)) == source]
        training = found[mine[0]].training
        if isinstance(training, str):
            columns |= {i: read(written[i], None, None, kind, cfg) for i in mine}
            if 0 in mine:
                columns["unseen"] = read(unseen, None, None, kind, cfg)
            continue
        ids, tokenizer = training
        groups = [(i, written[i]) for i in mine]
        if 0 in mine:
            seen = passages(split_documents(ids[:PASSAGE_TOKENS], tokenizer)[0][:-1] or [tokenizer.decode(ids[:PASSAGE_TOKENS].tolist())])
            groups += [("unseen", unseen), ("training", real(shuffled(seen, cfg.seed, n), tokenizer, n, most[0]))]
        copied, made_up = reading.against_training([text for _, group in groups for _, text, _ in group], ids, tokenizer)
        for key, group in groups:
            columns[key] = read(group, copied[:len(group)], made_up, kind, cfg)
            copied = copied[len(group):]
    return [columns[i] for i in range(len(found))], {key: columns[key] for key in ("unseen", "training") if key in columns}


def ask_judge(columns, cfg):
    """Adds the judge's marks to the columns; returns the lines that say what went wrong."""
    said = []
    for column in columns:
        texts = [t["text"] for t in column["texts"]][::max(1, column["n"] // JUDGED)][:JUDGED]
        marks, problem = judge.mark_all(texts, cfg.judge_url, cfg.judge_model, cfg.judge_timeout)
        given = [m for m in marks if m]
        if given:
            column["judge"] = {key: float(np.mean([m[key] for m in given])) for key in judge.RUBRIC} | {"n": len(given)}
        if problem:
            said.append(problem)
            if "given up" in problem:
                break
    return said


# ---------------------------------------------------------------------------------------------------------------------

def main(cfg):
    compute = resolve(cfg.device, cfg.dtype, "false")
    found, validation = subjects(cfg, compute)
    own = cfg.out_dir if os.path.isdir(cfg.out_dir) else os.path.dirname(cfg.out_dir) or "."
    path = os.path.join(cfg.report_dir or ("out/compare" if len(found) > 1 or is_hf(cfg.out_dir) else own), "report.html")
    page.check(path)
    documents, closed = read_file(cfg.text) if cfg.text else split_documents(*validation)
    toy, some = is_toy(documents), shuffled(passages(documents), cfg.seed, 3000)
    asked = (probes.toy_probes if toy else probes.story_probes)(some, cfg.num_cases, cfg.seed)
    asked = probes.askable(asked, [s.tokenizer for s in found])
    prompts = openings(some, documents)

    results, columns = [], []
    try:
        for s in found:
            figures, column = likelihood(s, documents, closed, compute, cfg)
            results.append({"out_dir": s.name, "checkpoint": s.path, "step": s.step, "parameters": num_params(s.model),
                            "vocab_size": s.tokenizer.vocab_size, "block_size": s.model.config.block_size, "dataset": s.dataset,
                            "likelihood": figures, "probes": probe(s, asked, compute, cfg)})
            columns.append(column)
        kind = toy, len(documents) >= FEW, not any(isinstance(s.training, str) for s in found)
        bytes_a_token = [result["likelihood"]["bytes"] / result["likelihood"]["tokens"] for result in results]
        read_by, reference = read_all(found, prompts, some, kind, bytes_a_token, compute, cfg)
    except ValueError as e:  # a character that a tokenizer lacks
        raise Refusal(f"{s.path}: {e}")
    problems = ask_judge([*read_by, reference["unseen"]], cfg) if cfg.judge_url else []
    for result, column in zip(results, read_by):
        result["reading"] = column
        result["levels"] = grade(result, reference["unseen"])
        result["agree"], result["verdict"] = verdict(result["levels"])
    whole = {"text": cfg.text or f"{found[0].dataset}, validation split", "checkpoints": results, "reference": reference, "seed": cfg.seed,
             "computed": compute.said, "notes": problems + cautions(found, cfg)}
    whole["agree"], whole["verdict"], whole["ranking"] = results[0]["agree"], results[0]["verdict"], []
    if len(found) > 1:
        whole["agree"], whole["verdict"], whole["ranking"] = compare(results, columns, reference["unseen"], cfg.resamples, cfg.seed)
    print(report.text(whole))
    page.write(path, whole)
    print(f"\n{path}")
    print(json.dumps(report.short(whole), allow_nan=False))


def cautions(found, cfg):
    """What the figures must be read with."""
    said = [f"{s.name}: {s.training}" for s in found if isinstance(s.training, str)]
    if not cfg.text:
        said += [f"{s.name} was trained on {s.dataset}, not on {found[0].dataset}, whose validation split this is"
                 for s in found if s.dataset != found[0].dataset]
    if len({s.tokenizer.sha256 for s in found}) > 1:
        said.append("tokenizers differ: bits a byte can be compared; loss, perplexity and what is explained, which are by token, cannot")
    return said


if __name__ == "__main__":
    run(main, Config)
