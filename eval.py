"""Three lenses on a trained model: how well it predicts, what it answers, what it writes.

The result is a report, report.html, and a line of JSON last.

    python eval.py --out_dir=out/ts
    python eval.py --out_dir=out/ts,out/ts-dpo --report_dir=out/compare
    python eval.py --lengths --out_dir=out/rope,out/alibi
    python eval.py --out_dir=out/ts --text=t.txt --judge_url=http://127.0.0.1:8000/v1 --judge_model=NAME

The first evaluates on the validation split of the data that the model was trained on. The second
compares two models on the same text: their bits a byte can be compared, their losses cannot; an adapter
is read over its base. The third has no lenses: lengths.html shows bits a byte by position up to 8
contexts, of rope under each scaling.

1 likelihood (lenses/likelihood.py): loss, perplexity and bits a byte with 95% intervals over documents;
  loss by position; for toy stories the distance to their entropy.
2 probes (lenses/probes.py): questions with one right answer, chance beside the accuracy.
3 reading (lenses/samples.py): samples for fixed prompts at a fixed seed, marked by rules
  (lenses/reading.py) beside real text, and by a judge (lenses/judge.py) if there is one.

The verdict (lenses/verdict.py) says whether the three agree.
"""

import functools
import json
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from config import Refusal, check_range, is_hf, run

# isort: split
import numpy as np

import dataset
import folders
import prepare
from checkpoint import Checkpoint, open_any
from device import resolve
from lenses import judge, lengths, likelihood, page, probes, report
from lenses.likelihood import split_documents
from lenses.samples import Rules, openings, passages, read_all, shuffled
from lenses.verdict import compare, grade, verdict
from model import Transformer
from score import completion_nats
from sizes import num_active_params, num_params
from tokenizer import Tokenizer

PASSAGES = 3000  # from which prompts, the cloze and real text are taken
JUDGED = 12  # texts of each column that the judge reads


@dataclass
class Config:
    out_dir: str = "out"  # a run's or adapter's folder, a file or hf:FOLDER_OR_NAME; A,B,C compares them
    text: str = ""  # a file as prepare.py reads it; "" = the validation split of the first's data
    lengths: bool = False  # bits a byte by position, far past the context, and nothing else
    block_size: int = 0  # another context than the models' own, 0; how far lengths goes, 0 = 8 contexts
    rope_scaling: str = ""  # another one than the models' own, ""; lengths has three without
    report_dir: str = ""  # where report.html goes; "" = out_dir, or out/compare for several and for hf:
    num_samples: int = 6  # texts for each of the 8 prompts
    max_new_tokens: int = 300  # tokens at most, each; where tokenizers differ as many bytes
    temperature: float = 0.8  # of the samples; 0 = always the likeliest token
    top_k: int = 200  # of the samples: keep the k likeliest tokens; 0 = all
    num_cases: int = 150  # about so many questions a probe
    resamples: int = 2000  # of the bootstrap
    seed: int = 1337  # of samples, probes and resampling
    judge_url: str = ""  # an OpenAI-compatible server, http://HOST/v1; its key is $JUDGE_API_KEY
    judge_model: str = "default"  # the server's name for the model that judges
    judge_timeout: float = 60.0  # seconds an answer may take
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"  # of matrix products: auto | float32 | bfloat16 | float16

    def __post_init__(self):
        check_range(self, "at least 1 and at most 1000", "num_samples")
        check_range(self, "at least 1 and at most 1000000", "max_new_tokens")
        check_range(self, "at least 22 and at most 100000", "num_cases")
        check_range(self, "at least 1000 and at most 1000000", "resamples")
        check_range(self, "at least 0", "temperature", "top_k", "seed")
        check_range(self, "above 0 and at most 3600", "judge_timeout")
        if self.judge_url and not is_url(self.judge_url):
            raise ValueError(f"judge_url must be like http://127.0.0.1:8000/v1, not {self.judge_url!r}")
        if not all(part.strip() for part in self.out_dir.split(",")):
            form = "a folder, or several with a comma between"
            raise ValueError(f"out_dir must name {form}, not {self.out_dir!r}")


def is_url(text):
    """Returns whether a text is the address of a web server."""
    try:
        url = urlsplit(text)
        is_server = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        return False
    return bool(is_server and re.fullmatch(r"[!-~]+", text))


@dataclass
class Subject:
    """A checkpoint under evaluation, or adapters over one, and its model.

    dataset: the folder of its data, or dataset.ELSEWHERE.
    training: (ids, tokenizer) of its training text, or the sentence that says why there is none.
    """

    name: str
    path: str
    step: int
    model: Transformer
    tokenizer: Tokenizer
    dataset: str
    training: object
    checkpoint: Checkpoint

    @property
    def has_training(self):
        return not isinstance(self.training, str)


# -----------------------------------------------------------------------------------------------------
# What is evaluated, on what


def load_subjects(cfg, compute):
    """Loads the checkpoints that out_dir names. Returns them and the first one's validation split.

    The split is (ids, tokenizer), or None where it cannot be read. Raises Refusal if there is then no
    text to evaluate on.
    """
    names = [cfg.out_dir]
    if not os.path.exists(cfg.out_dir):
        names = [name.strip() for name in cfg.out_dir.split(",")]
    load = functools.cache(dataset.load)  # once a folder, as it reads all of the data to check it
    subjects = []
    validation = None
    for name in names:
        ckpt = open_any(name)
        if not cfg.lengths:
            ckpt.stretch(cfg.rope_scaling, cfg.block_size)
        model, tokenizer = ckpt.restore(compute.device)
        folder = dataset.data_folder(ckpt)
        try:
            _, data, data_tokenizer = dataset.load_data(folder, ckpt, load)
        except Refusal as e:
            training = str(e)
            if not subjects and not cfg.text:
                problem = f"{ckpt.path} was trained on {folder}, which cannot be read: {e}. Or"
                if folder == dataset.ELSEWHERE:
                    problem = f"{ckpt.path}: {e};"
                raise Refusal(f"{problem} give a text with --text=FILE")
        else:
            training = data["train"], data_tokenizer
            if not subjects:
                validation = data["val"], data_tokenizer
        step = ckpt.last["step"]
        subjects.append(Subject(name, ckpt.last_path, step, model, tokenizer, folder, training, ckpt))
    return subjects, validation


# -----------------------------------------------------------------------------------------------------
# The three lenses


def answer(subject, questions, compute, cfg):
    """Returns a dict of the results of probes, and of how much of the room above chance they take together."""
    score = functools.partial(completion_nats, subject.model, subject.tokenizer, compute=compute)
    results = [probes.ask(probe, score) for probe in questions]
    if not results:
        return {"probes": []}
    skills = probes.skills(results)
    low, high = probes.skill_interval(skills, cfg.resamples, cfg.seed)
    mean = float(np.mean([skill.mean() for skill in skills]))
    return {"skill": mean, "skill_low": low, "skill_high": high, "probes": results}


def measure(subject, documents, closed, questions, compute, cfg):
    """Returns a subject's result by the first two lenses, and the likelihood's columns to resample."""
    figures, columns = likelihood.measure(subject, documents, closed, compute, cfg)
    result = {
        "out_dir": subject.name,
        "checkpoint": subject.path,
        "step": subject.step,
        "parameters": num_params(subject.model),
        "active_parameters": num_active_params(subject.model),
        "vocab_size": subject.tokenizer.vocab_size,
        "block_size": subject.model.config.block_size,
        "dataset": subject.dataset,
        "likelihood": figures,
        "probes": answer(subject, questions, compute, cfg),
    }
    return result, columns


def ask_judge(columns, cfg):
    """Adds the judge's marks to the columns. Returns the lines that say what went wrong."""
    problems = []
    for column in columns:
        step = max(1, column["n"] // JUDGED)
        texts = [text["text"] for text in column["texts"][::step][:JUDGED]]
        answers, problem = judge.mark_all(texts, cfg.judge_url, cfg.judge_model, cfg.judge_timeout)
        marked = [marks for marks in answers if marks]
        if marked:
            means = {key: float(np.mean([marks[key] for marks in marked])) for key in judge.RUBRIC}
            column["judge"] = means | {"n": len(marked)}
        if problem:
            problems.append(problem)
        if len(answers) < len(texts):  # the judge fails: it is not asked again
            break
    return problems


def cautions(subjects, cfg):
    """Returns the sentences that the figures must be read with."""
    notes = [f"{subject.name}: {subject.training}" for subject in subjects if not subject.has_training]
    first = subjects[0].dataset
    for subject in subjects:
        if subject.dataset != first and not cfg.text:
            trained = f"{subject.name} was trained on {subject.dataset}"
            notes.append(f"{trained}, not on {first}, whose validation split this is")
    if len({subject.tokenizer.sha256 for subject in subjects}) > 1:
        notes.append(
            "tokenizers differ: bits a byte can be compared; "
            "loss, perplexity and what is explained, which are by token, cannot"
        )
    return notes


def evaluate(subjects, documents, closed, text, compute, cfg):
    """Returns the figures of the report by three lenses, a dict. Raises Refusal."""
    texts = shuffled(passages(documents), cfg.seed, PASSAGES)
    toy = likelihood.is_toy(documents)
    make_probes = probes.toy_probes if toy else probes.story_probes
    questions = make_probes(texts, cfg.num_cases, cfg.seed)
    questions = probes.askable(questions, [subject.tokenizer for subject in subjects])
    prompts = openings(texts, documents)

    results = []
    columns = []  # of each subject's likelihood, to resample
    known = all(subject.has_training for subject in subjects)
    rules = Rules(toy, len(documents) >= likelihood.FEW, known)
    try:
        for subject in subjects:
            result, subject_columns = measure(subject, documents, closed, questions, compute, cfg)
            results.append(result)
            columns.append(subject_columns)
        figures = [result["likelihood"] for result in results]
        bytes_a_token = [lens["bytes"] / lens["tokens"] for lens in figures]
        readings, reference = read_all(subjects, prompts, texts, rules, bytes_a_token, compute, cfg)
    except ValueError as e:  # a character that a tokenizer lacks
        raise Refusal(f"{subject.path}: {e}")
    unseen = reference["unseen"]
    problems = ask_judge([*readings, unseen], cfg) if cfg.judge_url else []

    for result, column in zip(results, readings):
        result["reading"] = column
        result["levels"] = grade(result, unseen)
        result["agree"], result["verdict"] = verdict(result["levels"])
    if len(subjects) > 1:
        agree, sentence, ranking = compare(results, columns, unseen, cfg.resamples, cfg.seed)
    else:
        agree, sentence, ranking = results[0]["agree"], results[0]["verdict"], []
    return {
        "text": text,
        "checkpoints": results,
        "reference": reference,
        "seed": cfg.seed,
        "computed": compute.message,
        "notes": problems + cautions(subjects, cfg),
        "agree": agree,
        "verdict": sentence,
        "ranking": ranking,
    }


# -----------------------------------------------------------------------------------------------------
# The report


def report_path(cfg, several):
    """Returns where the report goes: report.html, or lengths.html."""
    folder = cfg.report_dir
    if not folder:
        if several or is_hf(cfg.out_dir):
            folder = "out/compare"
        elif os.path.isdir(cfg.out_dir):
            folder = cfg.out_dir
        else:
            folder = os.path.dirname(cfg.out_dir) or "."
    return os.path.join(folder, "lengths.html" if cfg.lengths else "report.html")


def publish(text, html, path, whole):
    """Prints a report and its figures, and writes its page."""
    print(text)
    page.write(path, html)
    print(f"\n{path}")
    print(json.dumps(report.short(whole), allow_nan=False))


def main(cfg):
    compute = resolve(cfg.device, cfg.dtype, "false")
    subjects, validation = load_subjects(cfg, compute)
    path = report_path(cfg, len(subjects) > 1)
    with folders.without_empty(os.path.dirname(path)):
        page.check(path)
        documents, closed = prepare.read_file(cfg.text) if cfg.text else split_documents(*validation)
        text = cfg.text or f"{subjects[0].dataset}, validation split"
        if cfg.lengths:
            whole = lengths.compare(subjects, documents, text, compute, cfg)
            whole["notes"] = cautions(subjects, cfg)
            publish(lengths.text(whole), lengths.page(whole), path, whole)
        else:
            whole = evaluate(subjects, documents, closed, text, compute, cfg)
            publish(report.text(whole), page.page(whole), path, whole)


if __name__ == "__main__":
    run(main, Config)
