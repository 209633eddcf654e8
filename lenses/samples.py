"""The texts of the third lens of eval.py: what models write for fixed prompts, and real text, read by the rules of
reading.py.

A text is a dict: "prompt", "text" with the prompt, "ended" if it came to an end.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data import prompt_ids
from generate import generate
from lenses import reading
from lenses.likelihood import FEW, split_documents
from lenses.stats import mean_interval
from memory import check_memory
from sizes import kv_cache_bytes

PASSAGE_TOKENS = 1 << 22  # at the beginning of a split, from which passages are taken
PROMPTS = 8
PROMPT_WORDS = 4
MADE_UP = 100  # words of a column that are listed


@dataclass
class Rules:
    """Which rules of the reading lens apply.

    toy: the texts are toy stories. ends: documents have ends that a model can have learned.
    known: the training texts of all subjects are here.
    """

    toy: bool
    ends: bool
    known: bool


def passages(documents):
    """Returns the documents or, where they are few, the paragraphs in them."""
    if len(documents) >= FEW:
        return documents
    paragraphs = [part.strip() for text in documents for part in text.split("\n\n")]
    return [paragraph for paragraph in paragraphs if paragraph]


def shuffled(items, seed, n):
    """Returns n of the items in random order."""
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in order[:n]]


def openings(texts, documents):
    """Returns the prompts: the first words of texts, and the beginning of a document."""
    prompts = [""] if len(documents) >= FEW else []
    for text in texts:
        if len(text.split()) > 2 * PROMPT_WORDS:
            beginning = " ".join(text.split(" ")[:PROMPT_WORDS])
            prompts.append(beginning.split("\n")[0])
    return list(dict.fromkeys(prompts))[:PROMPTS] or [""]


def write(subject, prompts, most, compute, cfg):
    """Returns num_samples texts for each prompt, of up to `most` new tokens."""
    model, tokenizer = subject.model, subject.tokenizer
    prompts = [prompt for prompt in prompts for _ in range(cfg.num_samples)]
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    cache = kv_cache_bytes(model.config, len(prompts), model.config.block_size, 4)
    check_memory(compute.device, cache, "try a smaller num_samples")
    settings = {"stop": tokenizer.ends, "seed": cfg.seed, "past_end": "recompute"}
    steps = generate(model, ids, most, cfg.temperature, cfg.top_k, **settings)
    with compute.autocast():
        *_, rows = tqdm(steps, "samples", most, disable=None, leave=False)
    texts = []
    for prompt, row in zip(prompts, rows):
        text = prompt + tokenizer.decode_more(row.ids)
        texts.append({"prompt": prompt, "text": text, "ended": row.end == "stop"})
    return texts


def real(documents, tokenizer, n, most):
    """Returns n of the documents as if they had been written, each cut after `most` tokens."""
    texts = []
    for document in documents[:n]:
        ids = tokenizer.encode(document)
        text = tokenizer.decode(ids[:most])
        texts.append({"prompt": "", "text": text, "ended": len(ids) <= most})
    return texts


def real_training(subject, n, most, seed):
    """Returns n passages of a subject's training text as if they had been written."""
    ids, tokenizer = subject.training
    ids = ids[:PASSAGE_TOKENS]
    documents, _ = split_documents(ids, tokenizer)
    documents = documents[:-1]  # the last one may be cut
    if not documents:
        documents = [tokenizer.decode(ids.tolist())]
    return real(shuffled(passages(documents), seed, n), tokenizer, n, most)


def read(texts, rules, cfg, copied=None, made_up=None):
    """Returns a column: the mean of each rule, the score (their mean) with its interval, and the texts.

    copied (texts,): the share of each text that is in the training text; made_up: the words that are not; both
    are None where there is no training text.
    """
    unknown = made_up if rules.known else None
    marked = []
    for i, text in enumerate(texts):
        ended = text["ended"] if rules.ends else None
        marks = reading.marks(text["text"], ended, unknown, rules.toy)
        share = None if copied is None else float(copied[i])
        marked.append(text | {"marks": marks, "copied": share})
    scores = reading.mean_marks(marked)
    low, high = mean_interval(scores, cfg.resamples, cfg.seed)
    means = {
        rule: float(np.mean([text["marks"][rule] for text in marked])) for rule in marked[0]["marks"]
    }
    column = {
        "score": float(np.mean(scores)),
        "score_low": low,
        "score_high": high,
        "marks": means,
        "n": len(texts),
        "distinct": reading.distinct([text["text"] for text in texts]),
        "texts": marked,
    }
    if copied is not None:
        words = {word for text in texts for word in reading.words_in(text["text"])}
        column["copied"] = float(np.mean(copied))
        column["made_up"] = sorted(words & made_up)[:MADE_UP]
    return column


def read_beside(groups, training, rules, cfg):
    """Returns a column for each group of texts, {key: texts}, beside the same training text.

    training: as in Subject.
    """
    if isinstance(training, str):
        return {key: read(texts, rules, cfg) for key, texts in groups.items()}
    flat = [text["text"] for texts in groups.values() for text in texts]
    copied, made_up = reading.against_training(flat, *training)
    shares = np.split(copied, np.cumsum([len(texts) for texts in groups.values()]))
    columns = {}
    for (key, texts), group_shares in zip(groups.items(), shares):
        columns[key] = read(texts, rules, cfg, group_shares, made_up)
    return columns


def read_all(subjects, prompts, documents, rules, bytes_a_token, compute, cfg):
    """Returns the columns of the reading lens: a list of the subjects', and a dict of real text's.

    Real text is "unseen", which is the documents, and, if it is here, the "training" text of the first subject. A
    subject with shorter tokens, fewer bytes_a_token, may write more of them, so that all texts are cut after as many
    bytes.
    """
    budget = cfg.max_new_tokens * max(bytes_a_token)  # bytes
    most = [round(budget / size) for size in bytes_a_token]
    trainings = {}  # each training text, and the groups to read beside it, so that it is read once
    for i, subject in enumerate(subjects):
        key = subject.dataset, subject.has_training
        _, groups = trainings.setdefault(key, (subject.training, {}))
        groups[i] = write(subject, prompts, most[i], compute, cfg)

    first = subjects[0]
    n = len(prompts) * cfg.num_samples
    _, groups = trainings[first.dataset, first.has_training]
    groups["unseen"] = real(documents, first.tokenizer, n, most[0])
    if first.has_training:
        groups["training"] = real_training(first, n, most[0], cfg.seed)

    columns = {}
    for training, groups in trainings.values():
        columns |= read_beside(groups, training, rules, cfg)
    reference = {key: columns[key] for key in ("unseen", "training") if key in columns}
    return [columns[i] for i in range(len(subjects))], reference
