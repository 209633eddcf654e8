"""An endless offline supply of tiny stories whose exact probability is known.

    python toy_stories.py --n=5 --seed=1
    python -c "import toy_stories as t; print(*(s for s, _ in t.stories(30000)), sep='\\n\\n')" > toy.txt
    python -c "import toy_stories as t; [(s, _)] = t.stories(1, 7); print(s, t.moral(s), t.log_prob(s))"

A small probabilistic grammar writes them: eleven plots, each with its own troubles, helpers and moral,
and with people and things that are carried through the story. Every text can come about in exactly one
way. So its probability is a product of known numbers, and log_prob finds it again from the text alone.

Why this matters: the mean of -log_prob over a set of stories is a floor. On average no model can have a
lower loss on whole stories than the grammar that wrote them. So a loss here, in nats a story, shows how
much is left to learn, not only which of two models is better; and a loss below the floor, by more than
chance, shows that something is wrong.

How to read the book: [a|b|c] becomes one of its options, all equally likely, or by weight: [a*3|b]. A
{slot} becomes a cell of the table that has a column of that name. Its first use in a story draws a row of
the table, all rows equally likely, and that settles all columns of the table for the rest of the story. A
line break is a space (nothing after a |), an empty line a new paragraph.
"""

import math
import re
from bisect import bisect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from random import Random

from config import Refusal, run


@dataclass
class Config:
    only_prints = True  # no key: see config.run

    n: int = 3  # how many stories to print
    seed: int = 0  # another seed, other stories


# ---- the story book
#
# The opening, the plots, each under its moral, and the closing; indented, the tables of their words:
# the columns, then the rows, one a line or with ; between them.
#
# To change it, keep it unambiguous and short: the tests prove both, for whatever stands here. To be
# learnable from 12,000 stories, an option or a row wants a chance of 1 in 300. The animals that are
# heroes play no other part, and what follows "a" begins with a consonant.

BOOK = """
# The opening
[Once upon a time|Long ago], there was a {mood} {kind} named {hero}.*3|
[Once upon a time|Long ago], a {mood} {kind} named {hero} lived by the {place}.*2|
{hero} was a {mood} {kind} who lived by the {place}.*2|
By the {place} lived a {mood} {kind} named {hero}.

    hero  | kind   | he  | him | his | He  | His
    Lily  | girl   | she | her | her | She | Her;  Tom   | boy    | he  | him | his | He  | His
    Mia   | girl   | she | her | her | She | Her;  Ben   | boy    | he  | him | his | He  | His
    Lucy  | girl   | she | her | her | She | Her;  Max   | boy    | he  | him | his | He  | His
    Anna  | girl   | she | her | her | She | Her;  Sam   | boy    | he  | him | his | He  | His
    Rosie | girl   | she | her | her | She | Her;  Leo   | boy    | he  | him | his | He  | His
    Ella  | girl   | she | her | her | She | Her;  Jack  | boy    | he  | him | his | He  | His
    Ruby  | fox    | she | her | her | She | Her;  Bruno | bear   | he  | him | his | He  | His
    Hazel | rabbit | she | her | her | She | Her;  Pip   | mouse  | he  | him | his | He  | His
    Coco  | kitten | she | her | her | She | Her;  Bingo | puppy  | he  | him | his | He  | His
    Penny | piglet | she | her | her | She | Her;  Milo  | monkey | he  | him | his | He  | His

    mood: little; small; young; merry; cheerful; playful; curious; gentle

    place: forest; river; sea; lake; old mill; green hills

    when: One day; One sunny day; One windy day; One morning; One bright morning; One cold morning
          One afternoon; One warm afternoon

    elder: mom; dad; grandma; grandpa; aunt; uncle

    guest: duck; goat; crow; hen; turtle; squirrel

# Good friends help each other.
{He} had a {toy} [and took it everywhere|that {he} loved very much|and never went out without it].

{when}, the {toy} was gone!
"[What is wrong|Why are you crying|Why are you so sad|Can I help you]?" asked a {finder}.
"[I lost my {toy}|I cannot find my {toy}|My {toy} is gone]," [said|cried|sobbed] {hero}.
The {finder} {sought} and [soon |]found it {spot}!
{hero} [gave the {finder} a big hug|danced with joy|laughed and clapped|said thank you three times].

    toy        | finder   | sought         | spot
    kite       | bird     | flew up        | in a tall tree
    toy boat   | duck     | swam out       | behind a rock
    red ball   | squirrel | jumped up      | on the roof
    toy train  | mole     | dug down       | under the roses
    teddy bear | cat      | looked hard    | under the stairs
    blue scarf | dog      | sniffed around | behind the barn

# You should never give up.
{He} wanted to {dream}.

[At first|The first time], {flop}.
"[I cannot do it|It is too hard|I give up|I will never learn]," [said|sighed|cried] {hero}.
"Try [again|once more|one more time]," said {his} {elder}.
So [{he}|{hero}] tried [again and again|every day|all week long|over and over].
At last, {triumph}!
[Everyone clapped|{His} {elder} clapped|{hero} jumped for joy|The {mood} {kind} was very proud].

    dream         | flop                            | triumph
    bake a cake   | the cake was as flat as a plate | the cake was tall and sweet
    build a boat  | the boat sank like a stone      | the boat sailed like a swan
    paint a horse | the horse looked like a potato  | the horse looked ready to run
    fly a kite    | the kite fell in the mud        | the kite danced in the sky
    ride a bike   | the bike rolled into a tree     | the bike flew down the road
    sing a song   | the song hurt every ear         | the song made the birds sing too

# You should be happy with what you have.

One [dark|quiet|cold] night, {hero} met a {giver}.
"[You may have one wish,|Make a wish,|What is your wish?]" [said|whispered] the {giver}.
"I wish for a [hundred|thousand|million] {wishes}!" [said|shouted] {hero}.
[Poof|Pop|Whoosh]!
There were {wishes} in the [bath|soup|bed]
and {wishes} [up to the roof|behind every door|in every cup].
"Please take them [away|back]!" [begged|cried] {hero}.
The {giver} [laughed|smiled|nodded],
and {hero} was glad to have {his} [old bed|little room|quiet home] back.

    giver: fairy; wizard; genie; mermaid; dragon; ghost

    wishes: cakes; hats; balloons; drums; books; shoes; pies; spoons

# It is good to share.
{He} had {food}.

"May I have some?" asked a hungry {guest}.
"No, [it is all mine|go away|I want it all|I will not share]," said {hero}.
But eating alone [was no fun|made {him} sad|felt wrong].
So [{he}|{hero}] [ran after|looked for|called] the {guest}.
"I am sorry," {he} said. "[Let us eat together|Half is for you|Please have some|We can share]."
They sat [side by side|under a tree|in the sun|on the grass],
and the {treats} tasted [twice as good|better than ever|as sweet as honey].

    food                | treats
    a bag of nuts       | nuts;      a basket of berries | berries;  a bag of plums     | plums
    a plate of pancakes | pancakes;  a basket of buns    | buns;     a bowl of cherries | cherries

# You can be brave even when you are afraid.

One [stormy|wild|dark] night, [thunder shook the house|the wind howled|rain beat on the roof],
and {hero} hid under the [bed|blanket|table].
Then came a [tiny|sad|small] "{cry}!"
It was a {baby}, [wet and cold|lost in the rain|all alone outside].
[{He}|{hero}] was [afraid|scared|shaking], but {he} [ran out|opened the door|took a lamp]
and [led|brought] the {baby} inside.
They sat by the fire [all night|together|until morning],
and [soon|then] the storm did not seem so [big|loud|bad].

    baby  | cry
    chick | Peep, peep;     duckling | Quack, quack;     foal    | Neigh, neigh
    lamb  | Baa, baa;       calf     | Moo, moo;         gosling | Honk, honk

# Slow and steady wins the race.

{when}, a {rival} laughed at {hero}.
"[You are so slow|I am faster than you|You can never beat me|I always win]," it said.
"Let us race to the {goal}," said [{hero}|the {mood} {kind}].
The {rival} was [soon|already] far ahead, so it {pause}.
{hero} [walked on and on|did not stop|just kept going|took step after step].
When the {rival} [looked up|ran on], {hero} was at the {goal}!
[Everyone cheered|The {rival} could not believe it|
The {rival} never laughed again|{hero} did a little dance].

    rival   | pause
    hare    | took a nap under a tree
    horse   | stopped for a cool drink
    dog     | stopped to dig for a bone
    rooster | stopped to sing a song
    goat    | stopped to eat flowers
    cat     | stopped to chase a bird

    goal: bridge; oak tree; red barn; well; white gate; big rock

# It is best to tell the truth.

{when}, {hero} was [dancing|jumping|playing ball|running] in the house.
[Crash|Bang|Oh no]!
{His} {elder}'s {broken} was in pieces.
"[Who did this|What happened|Who broke it]?" asked {his} {elder}.
{hero} wanted to blame the [cat|wind|dog].
But [{he} took a deep breath|{his} heart felt heavy|{he} shook {his} head].
"[It was me|I did it|It was my fault]," [said|whispered] {hero}.
"Thank you for [telling me|being honest]," said {his} {elder},
and they [fixed it|glued it|swept the floor] together.

    broken: vase; teapot; clock; lamp; mirror; plate

# You should be kind to someone new.

{when}, a {stranger} [moved in next door|came to town|joined the class].
[Nobody|No one] played with it because of its {oddity}.
But {hero} [walked over|waved|smiled at it|said hello].
"[Do you want to play|Will you be my friend|Would you like to play]?" {he} asked.
The {stranger} [was so happy|nodded and smiled|jumped for joy].
With its {oddity}, it {knack}!
[Soon|Now] everyone wanted to [play with|sit with|meet] [it|the {stranger}].

    stranger  | oddity       | knack
    giraffe   | long neck    | got the ball down from the roof
    crab      | big claws    | cut the cake for everyone
    hedgehog  | sharp spikes | carried ten apples at once
    crocodile | big teeth    | cracked all the nuts
    camel     | bumpy back   | gave everyone a ride
    kangaroo  | big pocket   | carried all the toys

# Even a small friend can be a big help.

{when}, {hero} [saved|rescued] a little {bug}
from [a deep puddle|a hungry hen|the cold wind|a muddy hole].
"[I will help you one day|One day I will help you too|I will remember this]," said the {bug}.
{hero} laughed. "[You are too small!|How can you help me?|But you are so tiny!]"
That night, [{he}|{hero}] {plight}.
The {bug} [came at once|heard {him}|did not forget] and {remedy}.
"[Thank you|You did it], my [tiny|small|good] friend," said {hero}.

    bug     | plight                     | remedy
    ant     | dropped a key down a crack | went in to get it
    firefly | was lost in the dark       | lit the way home
    spider  | found a hole in the tent   | mended it with silk
    beetle  | was caught in a net        | bit through the rope
    bee     | was very hungry            | showed the way to honey
    cricket | could not sleep            | sang a sweet song

# We can do more when we work together.

{when}, {hero} found a giant {veg} in the [garden|field].
{He} pulled and pulled, but it [would not come out|did not move|stayed in the ground].
{His} {elder} [came to help|pulled too|held on tight], but it still did not move.
Then a {guest} [joined in|came along|lent a hand].
"[One, two, three|Ready, steady|All together], pull!"
[Pop|Plop]! Out came the {veg},
and there was {veg} [soup|pie|stew] for [everyone|the whole town|a week].

    veg: turnip; carrot; pumpkin; potato; cabbage; leek

# Good things take time.

{when}, {hero} planted a {seed} seed.
The next [day|morning], {he} ran out to look, but nothing was there.
"[Grow|Hurry up|Wake up|Come out], little seed!" [shouted|said|begged] {hero}.
"It needs [sun and rain|water and time|a long sleep]," said {his} {elder}.
So [{he}|{hero}] watered it every [day|morning|evening] and [sang to it|told it stories|waited].
When [spring|summer] came, there was {wonder}!

    seed      | wonder
    sunflower | a sunflower as tall as the door
    bean      | a bean plant that reached the roof
    pumpkin   | a pumpkin as big as a cart
    rose      | a rose as red as fire
    melon     | a melon as sweet as honey
    cherry    | a cherry tree full of birds

# The closing
So {hero} learned that {lesson}.*2|
From then on, {hero} knew that {lesson}.*2|
"Now I know that {lesson}," [said|thought] {hero}.*2|
And so the {mood} {kind} learned that {lesson}.*2|
{hero} never forgot [that day|it].|
{hero} thought about it for a long time.
"""


# ---- the grammar


class Choice:
    """One of several options, each (log-probability in nats, the slots it settles, its parts).

    It is made from options with weights in place of log-probabilities. A random number below edges[0]
    draws the first option, one between edges[0] and edges[1] the second, and so on.
    """

    def __init__(self, options):
        *edges, total = accumulate(weight for weight, _, _ in options)
        self.options = [(math.log(weight / total), slots, parts) for weight, slots, parts in options]
        self.edges = [edge / total for edge in edges]


def read(template):
    """Returns the parts of a template, a tuple: each is plain text, a "{slot}" or a Choice."""
    template = re.sub(r"\|\n", "|", template.rstrip())
    template = re.sub(r"\n+", lambda breaks: " " if breaks[0] == "\n" else "\n", template)
    tokens = iter(re.split(r"(\*\d+|[\[|\]]|\{\w+\})", template))

    def read_options():  # up to the closing bracket, each [weight, slots, parts]
        options = [[1, {}, ()]]
        for token in tokens:
            if token == "]":
                break
            elif token == "|":
                options.append([1, {}, ()])
            elif token.startswith("*"):
                options[-1][0] = int(token[1:])
            elif token == "[":
                options[-1][2] += (Choice(read_options()),)
            elif token:
                options[-1][2] += (token,)
        return options

    [(_, _, parts)] = read_options()
    return parts


SLOTS = {}  # "{slot}" -> the Choice of a row of its table


def add_table(block):
    """Puts the columns of a table into SLOTS."""
    names, *rows = [[cell.strip() for cell in row.split("|")] for row in re.split("[:;\n]", block)]
    slots = ["{%s}" % name for name in names]
    rows = [dict(zip(slots, row, strict=True)) for row in rows]
    for slot in slots:
        SLOTS[slot] = Choice([(1, row, (row[slot],)) for row in rows])


def take_tables(text):
    """Puts the indented blocks of a text, which are tables, into SLOTS; returns the rest."""
    blocks = text.rstrip().split("\n\n")
    for block in blocks:
        if block.startswith("    "):
            add_table(block)
    return "\n\n".join(block for block in blocks if not block.startswith("    "))


PLOTS = {title: take_tables(section) for title, section in re.findall(r"# (.+)(\n[^#]+)", BOOK)}
OPENING = PLOTS.pop("The opening").strip()
CLOSING = PLOTS.pop("The closing").strip()
STORY = read(f"[{OPENING}]{{plot}}\n\n[{CLOSING}]")
MORALS = list(PLOTS)


def uncapitalize(sentence):
    return sentence[0].lower() + sentence[1:]


def plot_option(title, plot):
    settled = {"{moral}": title, "{lesson}": uncapitalize(title[:-1])}
    return 1, settled, read(plot)


SLOTS["{plot}"] = Choice([plot_option(title, plot) for title, plot in PLOTS.items()])


def walk(choose, fits, todo=STORY, settled={}, text="", logp=0.0):
    """Yields (text, log-probability in nats, settled slots) of the stories that the parts can become.

    choose(choice) returns the options to follow: a drawn one to write a story, all of them to read one.
    fits(text) returns whether a story that begins so is of interest. As both go through here, writing and
    reading cannot disagree about the grammar.
    """
    for i, part in enumerate(todo):
        part = settled.get(part, part)
        part = SLOTS.get(part, part)
        if isinstance(part, Choice):
            for p, slots, parts in choose(part):
                yield from walk(choose, fits, parts + todo[i + 1 :], settled | slots, text, logp + p)
            return
        text += part
        if not fits(text):
            return
    yield text, logp, settled


def tell(random):
    """Returns one story as (text, log-probability in nats, settled slots).

    random() is called for each choice, in reading order.
    """

    def draw(choice):
        return [choice.options[bisect(choice.edges, random())]]

    return next(walk(draw, fits=bool))


def stories(n, seed=0):
    """Yields n independent stories as (text, log-probability in nats).

    They are not filtered, so that one may come twice. All chance comes from one random.Random(seed), in
    reading order: story i depends only on seed and i, so a larger n continues the same list.
    """
    random = Random(seed).random
    for _ in range(n):
        text, logp, _ = tell(random)
        yield text, logp


def texts(n, seed=0):
    """Returns the texts of stories(n, seed), a list."""
    return [text for text, _ in stories(n, seed)]


def all_options(choice):
    return choice.options


def derivations(text):
    """Returns all ways to write exactly this text, as (log-probability in nats, moral).

    There is one for a story and none for another text.
    """
    candidates = walk(all_options, text.startswith)
    return [(logp, settled["{moral}"]) for story, logp, settled in candidates if story == text]


def log_prob(text):
    """Returns the exact log-probability of a text in nats; -inf where the grammar cannot write it."""
    return max((logp for logp, _ in derivations(text)), default=-math.inf)


def moral(text):
    """Returns the moral of a story, one of MORALS, also where the story leaves it unsaid.

    Raises ValueError if the text is no story.
    """
    ways = derivations(text)
    if not ways:
        raise ValueError("not a story of this grammar")
    _, title = ways[0]
    return title


def continuations(beginning):
    """Yields (text, log-probability in nats, settled slots) of the stories that begin so."""

    def fits(text):
        return text.startswith(beginning) or beginning.startswith(text)

    return (story for story in walk(all_options, fits) if story[0].startswith(beginning))


def possible(beginning):
    """Returns whether a story begins so."""
    return any(continuations(beginning))


# The morals as answers. They begin as sentences of the stories do. "Good", "Even" and "Slow" are in no story,
# so that a model that was trained on stories alone cannot say them unless its embedding is trained too.
ANSWERS = [f"So {uncapitalize(title)}" for title in MORALS]


def moral_rows(n, seed=0):
    """Returns n questions with their answers, no two about one story.

    Each is {"prompt": a story and a question, "response": one of ANSWERS}.
    """
    rows = {}
    endless = stories(2**62, seed)
    while len(rows) < n:
        text, _ = next(endless)
        prompt = f"{text}\nWhat is the moral of this story?"
        rows[text] = {"prompt": prompt, "response": ANSWERS[MORALS.index(moral(text))]}
    return list(rows.values())


# Stories to prefer keep their hero's name to the end, and end with the lesson that fits
HEROES = [row["{hero}"] for _, row, _ in SLOTS["{hero}"].options]
LESSONS = [uncapitalize(title[:-1]) for title in MORALS]


def fate(text):
    """Returns (hero, lesson) of the story as which a text begins, however it goes on."""
    # of the longest beginning that is a story's: all shorter ones are, too
    length = bisect(range(1, len(text) + 1), False, key=lambda n: not possible(text[:n]))
    _, _, settled = next(continuations(text[:length]))
    return settled["{hero}"], settled["{lesson}"]


def is_preferred(text):
    """Returns whether a text names no hero but its own, and its last paragraph has that name, the lesson that fits
    and no other lesson.
    """
    return keeps_its_end(text, *fate(text))


def keeps_its_end(text, hero, lesson):
    """Returns is_preferred of a story whose hero and lesson are known."""
    names = set(re.findall(r"\w+", text)) & set(HEROES)
    ending = text.rpartition("\n")[2]
    lessons = [other for other in LESSONS if other in ending]
    return names == {hero} and hero in ending and lessons == [lesson]


def preference_rows(n, seed=0):
    """Returns n rows {"prompt": how a story begins, "chosen": how it goes on, "rejected": the same with a flaw}. No
    two have the same prompt, so that no prompt is both learned and held out. is_preferred tells chosen and
    rejected apart.
    """
    random = Random(seed)
    rows = {}
    while len(rows) < n:
        text, _, settled = tell(random.random)
        hero, lesson = settled["{hero}"], settled["{lesson}"]
        opening, _, _ = text.partition(".")
        body, _, ending = text.rpartition("\n")
        if not keeps_its_end(text, hero, lesson):
            continue
        other_hero = random.choice([name for name in HEROES if name != hero])
        other_lesson = random.choice([other for other in LESSONS if other != lesson])
        nobody = f"{settled['{mood}']} {settled['{kind}']}"
        slip = random.choice([match.start() for match in re.finditer(rf"\b{hero}\b", text)][1:])
        flawed = random.choice(
            [
                text[:slip] + text[slip:].replace(hero, other_hero),  # as a model would, on its way
                text.replace(lesson, other_lesson),
                f"{body}\nAnd so the {nobody} learned that {lesson}.",
                f"{body}\n{hero} never forgot that day.",
            ]
        )
        rows[opening] = {
            "prompt": f"{opening}.",
            "chosen": text.removeprefix(f"{opening}."),
            "rejected": flawed.removeprefix(f"{opening}."),
        }
    return list(rows.values())


@cache
def totals(todo=STORY, settled=frozenset()):
    """Returns (the number of distinct stories, their entropy in nats a story), both exact."""
    for i, part in enumerate(todo):
        part = "" if part in settled else SLOTS.get(part, part)
        if isinstance(part, Choice):
            rest = todo[i + 1 :]
            ways = [(p, *totals(parts + rest, settled.union(slots))) for p, slots, parts in part.options]
            count = sum(n for _, n, _ in ways)
            entropy = sum(math.exp(p) * (h - p) for p, _, h in ways)
            return count, entropy
    return 1, 0.0


def main(cfg):
    if cfg.n < 1:
        raise Refusal(f"n is the number of stories to print: expected 1 or more, got {cfg.n}")
    for text, logp in stories(cfg.n, cfg.seed):
        print(f"{text}\n[log-probability {logp:.3f} nats]\n")
    count, entropy = totals()
    print(f"{count:,} distinct stories, entropy {entropy:.3f} nats a story")


if __name__ == "__main__":
    run(main, Config)
