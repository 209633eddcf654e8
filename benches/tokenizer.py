"""What bench.py tokenizer runs: our tokenizer beside Hugging Face's."""

import functools

import torch

import prepare
import readers
import toy_stories
from config import Refusal
from measure import convert
from race import ms_columns, race
from tokenizer import Tokenizer
from vocabulary import EOT


def to_tokenizers(tokenizer):
    """Returns our tokenizer in Hugging Face's library. Raises ImportError without it."""
    import tokenizers

    hf_tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    # Text that spells a special token is text, as with ours
    hf_tokenizer.encode_special_tokens = True
    return hf_tokenizer


def train_hf_tokenizer(docs, vocab_size):
    """Returns a byte-level BPE like ours, learned by Hugging Face's library."""
    import tokenizers

    hf_tokenizer = tokenizers.ByteLevelBPETokenizer()
    settings = {"vocab_size": vocab_size, "min_frequency": 0, "special_tokens": [EOT]}
    hf_tokenizer.train_from_iterator(docs, show_progress=False, **settings)
    return hf_tokenizer


def bench_tokenizer(cfg, compute):
    """Times learning a vocabulary and encoding with it, in MB/s of text, beside Hugging Face's."""
    if cfg.text:
        docs = list(readers.documents([cfg.text], prepare.Config(dataset=cfg.text, name="text")))
    else:
        docs = toy_stories.texts(9000, cfg.seed)
    try:
        tokenizer = Tokenizer.train(docs, cfg.vocab_size)
    except ValueError as e:
        raise Refusal(e)
    tasks = {
        "learning": {"ours": functools.partial(Tokenizer.train, docs, cfg.vocab_size)},
        "encoding": {"ours": functools.partial(tokenizer.encode_batch, docs)},
    }
    hf_tokenizer = convert(to_tokenizers, tokenizer)
    if hf_tokenizer:
        learn = functools.partial(train_hf_tokenizer, docs, cfg.vocab_size)
        tasks["learning"]["tokenizers"] = learn
        tasks["encoding"]["tokenizers"] = functools.partial(hf_tokenizer.encode_batch_fast, docs)
    cpu = torch.device("cpu")
    times = {task: race(rivals, cfg.seconds / 2, cpu) for task, rivals in tasks.items()}
    same = {}  # whether Hugging Face's result is ours
    if hf_tokenizer:
        hf_ids = [encoding.ids for encoding in hf_tokenizer.encode_batch_fast(docs)]
        same["encoding", "tokenizers"] = hf_ids == tokenizer.encode_batch(docs)
        same["learning", "tokenizers"] = learn().get_vocab() == hf_tokenizer.get_vocab()
    megabytes = sum(len(text.encode()) for text in docs) / 1e6
    return [
        {
            "what": task,
            "by": name,
            "mb": megabytes,
            "mb_per_s": megabytes / rival_times["median"],
            **ms_columns(rival_times),
            "same": same.get((task, name)),
        }
        for task in tasks
        for name, rival_times in times[task].items()
    ]
