"""Questions with one right answer: which of several completions of a context does a model find the likeliest?

    from lenses import probes; [print(p.name, p.chance, p.cases[0]) for p in probes.story_probes([], n=150, seed=0)]

Every set of candidates is asked with each of them being the right one, equally often. So who ignores the context, whatever words
and lengths it prefers, is at chance exactly. Stories in general are asked about words that small children's stories have. Toy stories are
asked about their own: the grammar says that each wrong answer has probability 0, so that what knows the grammar is always right.
"""
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import toy_stories
from lenses.stats import resampled, wilson
from sample import prompt_ids
from train import evaluating

CLOZE = 5  # candidates
BATCH_TOKENS = 8192


@dataclass
class Case:
    context: str
    candidates: list  # the right one first; each starts with a space


@dataclass
class Probe:
    name: str
    asks: str  # what it asks, in a line
    cases: list

    @property
    def chance(self):
        return float(np.mean([1 / len(case.candidates) for case in self.cases]))


# ---- asking

def completion_nats(model, tokenizer, pairs, compute):
    """-log p of each completion after its context, in nats: float64 (n,). A context too long for the model loses its beginning."""
    rows = []
    for context, completion in pairs:
        new = tokenizer.encode_more(completion)
        rows.append(((prompt_ids(tokenizer, context) + new)[-model.config.block_size - 1:], len(new)))
    nats, order = np.zeros(len(rows)), sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    with evaluating(model), tqdm(total=len(rows), desc="probes", disable=None, leave=False) as bar:
        while order:
            some = order[-max(1, BATCH_TOKENS // len(rows[order[-1]][0])):]  # the longest ones that are left
            del order[-len(some):]
            ids = torch.zeros(len(some), len(rows[some[-1]][0]), dtype=torch.long)
            asked = torch.zeros_like(ids, dtype=torch.bool)
            for i, j in enumerate(some):
                row, new = rows[j]
                ids[i, :len(row)] = torch.tensor(row)
                asked[i, max(1, len(row) - new):len(row)] = True
            ids, asked = ids.to(compute.device), asked[:, 1:].to(compute.device)
            with compute.autocast():
                logits = model.head(model.hidden(ids[:, :-1])[asked])  # of the completions alone
                each = F.cross_entropy(logits.float(), ids[:, 1:][asked], reduction="none").double()
            nats[some] = torch.zeros(asked.shape, dtype=torch.double).masked_scatter_(asked.cpu(), each.cpu()).sum(1).numpy()
            bar.update(len(some))
    return nats


def ask(probe, nats):
    """The result of a probe as a dict; nats([(context, completion), ...]) is what a model gives them. A tie is a wrong answer."""
    scores = iter(nats([(case.context, candidate) for case in probe.cases for candidate in case.candidates]))
    scores = [[next(scores) for _ in case.candidates] for case in probe.cases]
    right = [s[0] < min(s[1:]) for s in scores]
    low, high = wilson(sum(right), len(right))
    wrong = [{"context": case.context[-160:], "right": case.candidates[0], "chosen": case.candidates[1 + int(np.argmin(s[1:]))]}
             for case, s, ok in zip(probe.cases, scores, right) if not ok]
    return {"name": probe.name, "asks": probe.asks, "accuracy": sum(right) / len(right), "low": low, "high": high, "n": len(right),
            "chance": probe.chance, "right": right, "wrong": wrong[:2]}


def skills(results):
    """What of the room above chance each case takes, one array a probe: 1 is right; the mean over a probe is 0 at chance."""
    return [(np.array(r["right"], float) - r["chance"]) / (1 - r["chance"]) for r in results]


def skill_interval(skills, resamples, seed):
    """The 95% interval of the mean over probes, each probe's cases resampled."""
    means = [resampled(s[:, None], resamples, seed + i)[:, 0] / len(s) for i, s in enumerate(skills)]
    return tuple(np.percentile(np.mean(means, axis=0), [2.5, 97.5]).tolist())


def askable(probes, tokenizers):
    """The probes without the cases that some character tokenizer cannot spell, nor probes that have none left."""
    def spelled(case):
        try:
            return all(t.encode(text) for t in tokenizers if t.kind == "char" for text in (case.context, *case.candidates))
        except ValueError:
            return False
    kept = [Probe(p.name, p.asks, [case for case in p.cases if spelled(case)]) for p in probes]
    return [p for p in kept if p.cases]


# ---- cloze, for any text

def cloze(passages, n, seed, allowed=lambda context, completion: False):
    """Cases about the last word of a sentence, one a passage. Five passages lend each other the wrong answers: their words differ, but
    neither the word before them, which makes them of a kind, nor the mark after them. None is `allowed` where it is wrong."""
    rng, cases, open_groups = Random(seed), [], defaultdict(list)
    for text in passages:
        ends = list(re.finditer(r"(\S+) ([^\W\d_]+)[.!?](?=\s|\Z)", text))[1:]  # the first sentence has little before it
        if not ends or len(cases) >= n:
            continue
        end = rng.choice(ends)
        context, completion = text[:end.end(1)], text[end.end(1):end.end()]
        groups = open_groups[end[1].lower(), completion[-1]]
        for group in groups:
            if all(word.lower() != completion.lower() and not allowed(context, word) and not allowed(other, completion)
                   for other, word in group):
                group.append((context, completion))
                if len(group) == CLOZE:
                    groups.remove(group)
                    cases += [Case(c, [word, *(w for _, w in group if w != word)]) for c, word in group]
                break
        else:
            groups.append([(context, completion)])
    return Probe("cloze", f"the last word of a sentence, or that of {CLOZE - 1} others with the same word before it", cases)


# ---- stories in general: frames, with the slots {a} {b} ... and with each answer in turn

GIRLS = "Lily Mia Anna Lucy Sue Sara Amy Jane Sally Molly".split()
BOYS = "Tom Tim Ben Max Sam Jack Bob John Leo Billy".split()
THINGS = "ball car boat box book tree truck doll kite hat".split()
NOUNS = "cat dog bird bear duck frog rabbit boy girl toy flower tree car book boat box apple rock".split()

# half of the answers are the name that was heard last
NAMES = """
Once upon a time, {a} and {b} met in the park. {a} lost {his} {thing}. {b} asked, "Why are you sad,|{x}?"|a
{a} and {b} were friends. {a} had a {thing}, but {b} did not have one. "Can I play with your {thing}?" asked|{x}.|b
{a} saw {b} and wanted to give {him} a {thing}. {a} said, "This {thing} is for you,|{x}!"|b
{b} said, "{a}, look at my {thing}! Do you like it?" "Yes, it is very nice," said|{x}.|a
{b} fell down and hurt {his} leg. {a} came to help {b}. {b} smiled and said, "Thank you for your help,|{x}!"|a
{a} hid behind a tree with the {thing}. {b} looked for {him} everywhere. Then {b} said, "I found you,|{x}!"|a
{a} had a {thing}. {b} had no {thing} and was sad. So {a} said, "You can play with my {thing},|{x}."|b
{a} had a {thing}. {b} took the {thing} and ran away. "Give it back,|{x}!"|b
"""

PRONOUNS = """
|He was very happy.|She was very happy.|It was very happy.
One day, it was very hot.|He wanted to go to the water.|She wanted to go to the water.|It wanted to go to the water.
All the children came to see|him.|her.|it.
Everyone in the town liked|him very much.|her very much.|it very much.
One sunny day,|he went to the park.|she went to the park.|it went to the park.
"""

NUMBERS = """
The {n}|was very happy.|were very happy.
One day, the {n}|was in the park.|were in the park.
Lily said, "Look! The {n}|is so big!"|are so big!"
Mom said that the {n} in the garden|was very pretty.|were very pretty.
The little {n}|has a new home.|have a new home.
The {n} near the {other}|was very old.|were very old.
"""


def plural(noun):
    return noun + ("es" if noun.endswith("x") else "s")


def frames(text):
    return [line.split("|") for line in text.strip("\n").split("\n")]


def in_random_order(seed, *choices):
    """All combinations of one from each."""
    every = list(product(*choices))
    Random(seed).shuffle(every)
    return every


def name_cases(n, seed):
    pairs = [(a, b, his, him) for shift in (1, 3) for names, his, him in ((GIRLS, "her", "her"), (BOYS, "his", "him"))
             for a, b in zip(names, names[shift:])]
    cases = {}  # by story: two of the frames have no thing in them
    for (a, b, his, him), thing, (context, answer, who) in in_random_order(seed, pairs, THINGS[:7], frames(NAMES)):
        for a, b in (a, b), (b, a):  # the same story with the names swapped
            right, other = (a, b) if who == "a" else (b, a)
            told = context.format(a=a, b=b, thing=thing, his=his, him=him)
            cases[told] = Case(told, [" " + answer.format(x=x) for x in (right, other)])
        if len(cases) >= n - 1:
            break
    return list(cases.values())


def pronoun_cases(n, seed):
    cases = []
    for people, (between, *completions) in in_random_order(seed, list(zip(BOYS, GIRLS, THINGS)), frames(PRONOUNS))[:n // 3]:
        for i, who in enumerate(("boy named {}", "girl named {}", "{}")):
            told = f"Once upon a time, there was a little {who.format(people[i])}. {between}".rstrip()
            cases.append(Case(told, [" " + completions[i], *(" " + c for c in completions[:i] + completions[i + 1:])]))
    return cases


def number_cases(n, seed):
    cases = []
    for (noun, other), (context, one, many) in in_random_order(seed, list(zip(NOUNS, NOUNS[5:] + NOUNS[:5])), frames(NUMBERS))[:n // 2]:
        cases += [Case(context.format(n=noun, other=plural(other)), [" " + one, " " + many]),
                  Case(context.format(n=plural(noun), other=other), [" " + many, " " + one])]
    return cases


def story_probes(passages, n, seed):
    """At most n cases a probe, none twice, for a model of stories; cloze from the passages (texts), the others from frames."""
    found = [cloze(passages, n, seed),
             Probe("names", "who of two is meant; each story also with the names swapped", name_cases(n, seed)),
             Probe("pronouns", "he, she or it: the same sentence after a boy, a girl, a thing", pronoun_cases(n, seed)),
             Probe("number", "was or were, is or are, has or have, after one or several", number_cases(n, seed))]
    return [probe for probe in found if probe.cases]


# ---- toy stories: where the grammar allows one answer only

TOY_NAMES = [("Lily", "Mia", "Lucy"), ("Anna", "Rosie", "Ella"), ("Tom", "Ben", "Max"), ("Sam", "Leo", "Jack")]
TOY_PRONOUNS = [("he", "she"), ("He", "She"), ("him", "her"), ("his", "her"), ("it", "he"), ("it", "she")]
TOY_NUMBERS = [("was", "were"), ("is", "are"), ("it", "them")]


def places(stories, sets, n, rng):
    """About n cases: words of a set where they stand in stories and the grammar allows no other of the set; each word equally often."""
    cases, most = [], n // sum(map(len, sets))
    for words in sets:
        found = {word: [] for word in words}
        for text in stories:
            if min(map(len, found.values())) == most:
                break
            there = list(re.finditer(rf" ({'|'.join(words)})\b", text))
            for m in rng.sample(there, len(there)):
                context, others = text[:m.start()], [f" {word}" for word in words if word != m[1]]
                case = Case(context, [m[0], *others])
                if len(found[m[1]]) < most and case not in found[m[1]] and not any(toy_stories.possible(context + other) for other in others):
                    found[m[1]].append(case)
                    break
        fewest = min(map(len, found.values()))
        cases += [case for some in found.values() for case in some[:fewest]]
    return cases


def moral_cases(n, random):
    """The lesson of a new story, among all of them: {moral: case}, each moral equally often."""
    lessons = {moral: f" {moral[0].lower()}{moral[1:]}" for moral in toy_stories.MORALS}
    found = {moral: [] for moral in lessons}
    while min(map(len, found.values())) < n // len(lessons):
        text, _, settled = toy_stories.tell(random)
        moral = settled["{moral}"]
        if len(found[moral]) < n // len(lessons):
            found[moral].append(Case(f"{text.rpartition(chr(10))[0]}\nSo {settled['{hero}']} learned that",
                                     [lessons[moral], *(lesson for m, lesson in lessons.items() if m != moral)]))
    return [case for some in found.values() for case in some]


def toy_probes(passages, n, seed):
    """About n cases a probe, for a model of toy stories; the stories are new ones but for the cloze's."""
    rng = Random(f"probes {seed}")  # no story of a training set, whose seed is a number
    told = [toy_stories.tell(rng.random)[0] for _ in range(3000)]
    found = [cloze(passages, n, seed, allowed=lambda context, completion: toy_stories.possible(context + completion)),
             Probe("names", "who the story is about, among three of a kind", places(told, TOY_NAMES, n, rng)),
             Probe("pronouns", "he or she, him or her, it or he ...", places(told, TOY_PRONOUNS, n, rng)),
             Probe("number", "was or were, is or are, it or them", places(told, TOY_NUMBERS, n, rng)),
             Probe("moral", f"the lesson of a story, among {len(toy_stories.MORALS)}", moral_cases(n, rng.random))]
    return [probe for probe in found if probe.cases]
