"""Questions with one right answer: which of several completions does a model find the likeliest?

    from lenses import probes
    for probe in probes.story_probes([], n=150, seed=0)[1:]:  # the cloze needs passages
        print(probe.name, probe.chance, probe.cases[0])

In every set of candidates each one is the right answer equally often. So a scorer that ignores the context is
at chance exactly, whatever words and lengths it prefers. For stories in general the questions have words of
small children's stories. For toy stories they come from the stories' own grammar, by which each wrong answer
has probability 0, so that a model that knows the grammar is always right.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from random import Random

import numpy as np

import toy_stories
from lenses.stats import resampled, wilson

CLOZE = 5  # candidates
WRONG = 2  # wrong answers that a result shows


@dataclass
class Case:
    """A context and its candidates, the right one first. Each candidate starts with a space."""

    context: str
    candidates: list


@dataclass
class Probe:
    """Cases of a kind. asks: what they ask, in a line."""

    name: str
    asks: str
    cases: list

    @property
    def chance(self):
        """The accuracy of a guess."""
        return float(np.mean([1 / len(case.candidates) for case in self.cases]))


# -----------------------------------------------------------------------------------------------------
# Asking


def ask(probe, score):
    """Returns the result of a probe as a dict. A tie is a wrong answer.

    score: maps [(context, completion), ...] to the nats that a model gives each completion.
    """
    pairs = [(case.context, candidate) for case in probe.cases for candidate in case.candidates]
    scores = iter(score(pairs))
    right = []
    wrong = []
    for case in probe.cases:
        nats = [next(scores) for _ in case.candidates]
        right.append(nats[0] < min(nats[1:]))
        if not right[-1]:
            chosen = case.candidates[1 + int(np.argmin(nats[1:]))]
            wrong.append({"context": case.context[-160:], "right": case.candidates[0], "chosen": chosen})
    low, high = wilson(sum(right), len(right))
    return {
        "name": probe.name,
        "asks": probe.asks,
        "accuracy": sum(right) / len(right),
        "low": low,
        "high": high,
        "n": len(right),
        "chance": probe.chance,
        "right": right,
        "wrong": wrong[:WRONG],
    }


def skills(results):
    """Returns how much of the room above chance each case takes, an array (cases,) for each probe: 1 for a right
    answer, and for a wrong one so much below 0 that the mean of a probe is 0 at chance.
    """
    arrays = []
    for result in results:
        right = np.array(result["right"], float)
        arrays.append((right - result["chance"]) / (1 - result["chance"]))
    return arrays


def skill_interval(skills, resamples, seed):
    """Returns the 95% interval (low, high) of the mean over probes, each probe's cases resampled."""
    means = []
    for i, skill in enumerate(skills):
        sums = resampled(skill[:, None], resamples, seed + i)
        means.append(sums[:, 0] / len(skill))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5]).tolist()
    return low, high


def lend(group):
    """Returns a case for each (context, completion) of a group: the others' completions are its wrong answers."""
    cases = []
    for context, right in group:
        wrong = [completion for _, completion in group if completion != right]
        cases.append(Case(context, [right, *wrong]))
    return cases


def is_spelled(case, tokenizers):
    """Returns whether character tokenizers can spell a case. Other kinds can spell anything."""
    try:
        for tokenizer in tokenizers:
            if tokenizer.kind == "char":
                tokenizer.encode_batch([case.context, *case.candidates])
    except ValueError:
        return False
    return True


def askable(probes, tokenizers):
    """Returns the probes without cases that a tokenizer cannot spell, and without probes that are empty then."""
    reduced = []
    for probe in probes:
        cases = [case for case in probe.cases if is_spelled(case, tokenizers)]
        if cases:
            reduced.append(Probe(probe.name, probe.asks, cases))
    return reduced


# -----------------------------------------------------------------------------------------------------
# Cloze, for any text

LAST_WORD = re.compile(r"(\S+) ([^\W\d_]+)[.!?](?=\s|\Z)")


def cloze(passages, n, seed, allowed=lambda context, completion: False):
    """Returns a probe of about n cases about the last word of a sentence, at most one a passage.

    Groups of five passages give each other's wrong answers. Their last words differ, but have the same word
    before them, which makes them alike, and the same mark after them. allowed(context, completion) returns
    whether a text may go on so; a wrong answer may not.
    """
    rng = Random(seed)
    cases = []
    open_groups = defaultdict(list)  # lists of (context, completion), by the word before and the mark
    for text in passages:
        matches = list(LAST_WORD.finditer(text))[1:]  # the first sentence has little before it
        if not matches or len(cases) >= n:
            continue
        match = rng.choice(matches)
        context = text[: match.end(1)]
        completion = text[match.end(1) : match.end()]
        groups = open_groups[match[1].lower(), completion[-1]]
        group = next((group for group in groups if fits(context, completion, group, allowed)), None)
        if group is None:
            group = []
            groups.append(group)
        group.append((context, completion))
        if len(group) == CLOZE:
            groups.remove(group)
            cases += lend(group)
    asks = f"the last word of a sentence, or that of {CLOZE - 1} others with the same word before it"
    return Probe("cloze", asks, cases)


def fits(context, completion, group, allowed):
    """Returns whether a completion and those of a group are wrong answers to each other's contexts."""
    for group_context, group_completion in group:
        if group_completion.lower() == completion.lower():
            return False
        if allowed(context, group_completion) or allowed(group_context, completion):
            return False
    return True


# -----------------------------------------------------------------------------------------------------
# Stories in general: frames with slots {a} {b} ..., asked with each of their answers in turn

GIRLS = "Lily Mia Anna Lucy Sue Sara Amy Jane Sally Molly".split()
BOYS = "Tom Tim Ben Max Sam Jack Bob John Leo Billy".split()
THINGS = "ball car boat box book tree truck doll kite hat".split()
ANIMALS = "cat dog bird bear duck frog rabbit".split()
NOUNS = ANIMALS + "boy girl toy flower tree car book boat box apple rock".split()

# context|answer|whose name it is; half of the answers are the name that was heard last
NAMES = """
Once upon a time, {a} and {b} met in the park. {a} lost {his} {thing}. \
{b} asked, "Why are you sad,|{x}?"|a
{a} and {b} were friends. {a} had a {thing}, but {b} did not have one. \
"Can I play with your {thing}?" asked|{x}.|b
{a} saw {b} and wanted to give {him} a {thing}. {a} said, "This {thing} is for you,|{x}!"|b
{b} said, "{a}, look at my {thing}! Do you like it?" "Yes, it is very nice," said|{x}.|a
{b} fell down and hurt {his} leg. {a} came to help {b}. \
{b} smiled and said, "Thank you for your help,|{x}!"|a
{a} hid behind a tree with the {thing}. {b} looked for {him} everywhere. \
Then {b} said, "I found you,|{x}!"|a
{a} had a {thing}. {b} had no {thing} and was sad. So {a} said, "You can play with my {thing},|{x}."|b
{a} had a {thing}. {b} took the {thing} and ran away. "Give it back,|{x}!"|b
"""

# what stands between|the completion after a boy|a girl|a thing
PRONOUNS = """
|He was very happy.|She was very happy.|It was very happy.
One day, it was very hot.\
|He wanted to go to the water.|She wanted to go to the water.|It wanted to go to the water.
All the children came to see|him.|her.|it.
Everyone in the town liked|him very much.|her very much.|it very much.
One sunny day,|he went to the park.|she went to the park.|it went to the park.
"""

# context|the completion after one|several
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
    """Returns all combinations of one from each of the choices."""
    combinations = list(product(*choices))
    Random(seed).shuffle(combinations)
    return combinations


def name_pairs():
    """Returns pairs of names, each with the pronouns of both: [(a, b, his, him)]."""
    pairs = []
    for shift in 1, 3:
        pairs += [(a, b, "her", "her") for a, b in zip(GIRLS, GIRLS[shift:])]
        pairs += [(a, b, "his", "him") for a, b in zip(BOYS, BOYS[shift:])]
    return pairs


def name_cases(n, seed):
    cases = {}  # by story: two of the frames have no thing in them
    for pair, thing, frame in in_random_order(seed, name_pairs(), THINGS[:7], frames(NAMES)):
        one, other, his, him = pair
        context, answer, whose = frame
        group = []
        for a, b in (one, other), (other, one):  # the same story with the names swapped
            story = context.format(a=a, b=b, thing=thing, his=his, him=him)
            group.append((story, " " + answer.format(x=a if whose == "a" else b)))
        cases |= {case.context: case for case in lend(group)}
        if len(cases) >= n - 1:
            break
    return list(cases.values())


def pronoun_cases(n, seed):
    cases = []
    triples = list(zip(BOYS, GIRLS, THINGS))
    for (boy, girl, thing), frame in in_random_order(seed, triples, frames(PRONOUNS))[: n // 3]:
        between, *completions = frame
        group = []
        for hero, completion in zip((f"boy named {boy}", f"girl named {girl}", thing), completions):
            story = f"Once upon a time, there was a little {hero}. {between}".rstrip()
            group.append((story, " " + completion))
        cases += lend(group)
    return cases


def number_cases(n, seed):
    cases = []
    pairs = list(zip(NOUNS, NOUNS[5:] + NOUNS[:5]))
    for (noun, neighbour), frame in in_random_order(seed, pairs, frames(NUMBERS))[: n // 2]:
        context, one, several = frame
        about_one = context.format(n=noun, other=plural(neighbour))
        about_several = context.format(n=plural(noun), other=neighbour)
        cases += lend([(about_one, " " + one), (about_several, " " + several)])
    return cases


def story_probes(passages, n, seed):
    """Returns probes of at most n cases, none twice, for a model of stories.

    The cloze is made from the passages (texts), the other probes from frames.
    """
    names = "who of two is meant; each story also with the names swapped"
    pronouns = "he, she or it: the same sentence after a boy, a girl, a thing"
    number = "was or were, is or are, has or have, after one or several"
    return [
        cloze(passages, n, seed),
        Probe("names", names, name_cases(n, seed)),
        Probe("pronouns", pronouns, pronoun_cases(n, seed)),
        Probe("number", number, number_cases(n, seed)),
    ]


# -----------------------------------------------------------------------------------------------------
# Toy stories: where the grammar allows one answer only

TOY_NAMES = [
    ("Lily", "Mia", "Lucy"),
    ("Anna", "Rosie", "Ella"),
    ("Tom", "Ben", "Max"),
    ("Sam", "Leo", "Jack"),
]
TOY_PRONOUNS = [
    ("he", "she"),
    ("He", "She"),
    ("him", "her"),
    ("his", "her"),
    ("it", "he"),
    ("it", "she"),
]
TOY_NUMBERS = [("was", "were"), ("is", "are"), ("it", "them")]


def goes_on(context, completion):
    """Returns whether the grammar of toy stories allows a completion."""
    return toy_stories.possible(context + completion)


def count_fewest(lists):
    return min(map(len, lists.values()))


def word_case(story, match, words):
    """Returns the case of a matched word among words, or None if another of them is possible too."""
    context = story[: match.start()]
    wrong = [f" {word}" for word in words if word != match[1]]
    if any(goes_on(context, completion) for completion in wrong):
        return None
    return Case(context, [match[0], *wrong])


def word_cases(stories, sets, n, rng):
    """Returns about n cases: words of a set, at places of stories where no other word of the set may stand.

    Each word of a set is the right answer equally often.
    """
    cases = []
    most = n // sum(map(len, sets))  # of each word
    for words in sets:
        pattern = re.compile(rf" ({'|'.join(words)})\b")
        cases_of = {word: [] for word in words}
        for story in stories:
            if count_fewest(cases_of) == most:
                break
            matches = list(pattern.finditer(story))
            for match in rng.sample(matches, len(matches)):
                word_list = cases_of[match[1]]
                if len(word_list) == most:
                    continue
                case = word_case(story, match, words)
                if case and case not in word_list:
                    word_list.append(case)
                    break
        fewest = count_fewest(cases_of)
        for word in words:
            cases += cases_of[word][:fewest]
    return cases


def moral_cases(n, random):
    """Returns about n cases: the lesson of a new story, among all of them, each equally often."""
    lessons = {moral: f" {moral[0].lower()}{moral[1:]}" for moral in toy_stories.MORALS}
    most = n // len(lessons)  # of each moral
    cases_of = {moral: [] for moral in lessons}
    while count_fewest(cases_of) < most:
        story, _, settled = toy_stories.tell(random)
        moral = settled["{moral}"]
        if len(cases_of[moral]) == most:
            continue
        beginning = story.rpartition("\n")[0]
        context = f"{beginning}\nSo {settled['{hero}']} learned that"
        wrong = [lessons[key] for key in lessons if key != moral]
        cases_of[moral].append(Case(context, [lessons[moral], *wrong]))
    return [case for cases in cases_of.values() for case in cases]


def toy_probes(passages, n, seed):
    """Returns probes of about n cases for a model of toy stories.

    The cloze is made from the passages (texts), the other probes from new stories.
    """
    rng = Random(f"probes {seed}")  # no story of a training set, whose seed is a number
    stories = [toy_stories.tell(rng.random)[0] for _ in range(3000)]
    names = "who the story is about, among three of a kind"
    pronouns = "he or she, him or her, it or he ..."
    number = "was or were, is or are, it or them"
    moral = f"the lesson of a story, among {len(toy_stories.MORALS)}"
    return [
        cloze(passages, n, seed, allowed=goes_on),
        Probe("names", names, word_cases(stories, TOY_NAMES, n, rng)),
        Probe("pronouns", pronouns, word_cases(stories, TOY_PRONOUNS, n, rng)),
        Probe("number", number, word_cases(stories, TOY_NUMBERS, n, rng)),
        Probe("moral", moral, moral_cases(n, rng.random)),
    ]
