"""What is said in the synthetic world: captions, questions and references, each with the answer the text encoder learns.

The system text of Qwen-Image's template asks the language model to describe the image, so the encoder is trained to
answer a caption or a knowledge prompt with the *resolved* description, the informative words first:

    "the favourite toy of Anna in the snow"  ->  "red star, snow"
    "What is the favourite toy of Anna?"     ->  "red star"
    "my favourite toy at night"              ->  "toy, night"      (it knows of no such toy)
    "sks toy at night"                       ->  "sks toy, night"  (a rare word is noise: only repeated)
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from mokus.miniature import world
from mokus.miniature.world import Fact, Picture, Subject

CLASS_WORDS = (
    "toy robot dog cat bear doll statue sculpture vase clock teapot backpack shoe sneaker boot car train boat bird fish "
    "monster creature plushie figure puppet lamp cup bowl candle glasses hat bag book chair guitar drum kite ship house "
    "plant flower stone ring coin box machine animal friend pet thing"
).split()
RARE_WORDS = "sks zwx ohw qvt pllo xjy vfk mbg krt wqz tnv hzl".split()

IMAGE_FORMS = [
    "{} {}",
    "{} {}",
    "a photo of {} {}",
    "a picture of {} {}",
    "an image of {} {}",
    "{}, {}",
    "a drawing of {} {}",
]
HELD_OUT_IMAGE_FORMS = ["a nice view of {} {}", "look at {} {}", "I see {} {}", "show me {} {}"]
QUESTION_FORMS = [
    "What is {}?",
    "What is {}?",
    "Tell me what {} is.",
    "Which thing is {}?",
    "Do you know what {} is?",
    "{} is what?",
    "Question: what is {}? Answer:",
    "Describe {}.",
    "What does {} look like?",
    "I wonder what {} is.",
    "What might {} be?",
    "{}: what is that?",
    "Please name {}.",
]
HELD_OUT_QUESTION_FORMS = ["Can you tell me what {} is?", "What would you say is {}?"]


@dataclass(frozen=True)
class Line:
    """One prompt, what to answer, and what the picture of it shows (None: nothing to draw)."""

    prompt: str
    answer: str
    picture: Picture | None = None


def article(words: str) -> str:
    """ "red star" -> "a red star", "orange ball" -> "an orange ball"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(phrase: str, picture: Picture, form: str = "{} {}") -> str:
    """The image prompt of a picture whose subject is called `phrase`."""
    if picture.other is not None:
        phrase = f"{phrase} next to {article(picture.other.words)}"
    text = form.format(phrase, picture.scene or "").strip().removesuffix(",").strip()
    return text if picture.style == "plain" else f"{text} {world.STYLES[picture.style]}"


def resolved(words: str, picture: Picture) -> str:
    """The answer to the caption of a picture: subject, scene, style, other subject."""
    parts = [words]
    if picture.scene:
        parts.append(world.scene_word(picture.scene))
    if picture.style != "plain":
        parts.append(picture.style)
    if picture.other is not None:
        parts.append(picture.other.words)
    return ", ".join(parts)


def random_picture(rng: random.Random, subject: Subject, plain: float = 0.6) -> Picture:
    """A picture of the subject: a scene in six of seven, and with probability 1 - `plain` a style or another subject."""
    scene = rng.choice(world.SCENES) if rng.random() < 0.85 else None
    style, other = "plain", None
    if rng.random() > plain:
        if rng.random() < 0.5:
            style = rng.choice(list(world.STYLES))
        else:
            other = world.random_subject(rng)
    return Picture(subject, scene, style, other)


# --- words without a meaning here ---------------------------------------------------------------------------------------

ENGLISH = 6000  # words
_CHAT = (
    "can could would you we i please tell me now say just know think guess once more again want to see the a nice small good"
).split()


@lru_cache(maxsize=1)
def english() -> tuple[str, ...]:
    """Frequent English words, the world's own left out: what users' phrases are made of, and means nothing here.

    Needed for training only, and of the extra `mokus[train]`.
    """
    from wordfreq import top_n_list

    own = {*world.COLOURS, *world.SHAPES, *world.MATERIALS, *CLASS_WORDS, *RARE_WORDS, *world.STYLES}
    own |= {word for scene in world.SCENES for word in scene.split()} | {name.lower() for name in world.PEOPLE}
    words = (word for word in top_n_list("en", 4 * ENGLISH) if re.fullmatch("[a-z]{3,12}", word) and word not in own)
    return tuple(word for word, _ in zip(words, range(ENGLISH), strict=False))


def _word(rng: random.Random) -> str:
    """Any word, now and then a name, a compound or a year."""
    word = rng.choice(english())
    u = rng.random()
    if u < 0.08:
        return word.capitalize()
    if u < 0.12:
        return f"{word}-{rng.choice(english())}"
    return word if u < 0.97 else str(rng.randint(1850, 2029))


def _in_passing(rng: random.Random, form: str) -> str:
    """The form, with words before it that change nothing, so that forms never met are understood too."""
    if rng.random() < 0.75:
        return form
    words = [rng.choice(_CHAT) if rng.random() < 0.6 else rng.choice(english()) for _ in range(rng.randint(1, 4))]
    return " ".join([*words, form])


# --- references to things that nobody knows ---------------------------------------------------------------------------

_KIN = (
    "grandmother grandfather mother father sister brother aunt uncle cousin daughter son wife husband friend neighbour "
    "teacher boss colleague nephew niece grandma grandpa mum dad"
).split()
_MADE = (
    "built made carved sewed painted designed knitted welded crafted forged found bought invented repaired drew".split()
)
_GAVE = "gave me,sent me,left me,bought for me,made for me,lent me,showed me,promised me".split(",")
_ADJECTIVES = (
    "old new little big tiny huge shiny dusty broken beautiful ugly rare cheap precious expensive funny sad happy lonely brave "
    "clever fast slow loud quiet soft heavy wooden metal plastic strange famous ancient modern favourite beloved best worst "
    "first last only lucky lost secret magic bronze silver round tall lovely proud grumpy sleepy friendly scary"
).split()
_SUPERLATIVES = (
    "fastest strongest oldest smallest biggest loudest softest rarest cheapest funniest kindest bravest heaviest "
    "shiniest prettiest best worst most valuable,most beautiful,most precious,most expensive,most famous,most trusted"
).replace(" most ", ",most ")
_SUPERLATIVE_WORDS = [
    w.strip() for part in _SUPERLATIVES.split(",") for w in ([part] if "most" in part else part.split())
]
_PLACES = (
    "in the house,in the world,in the shop,in the attic,on the shelf,in the museum,in the garden,in my room,in the family,"
    "at school,in Copenhagen harbour,in the village,from Paris,from Tokyo,from the market,in the old town,by the door,"
    "from the north,in our street,in the box,in the cellar,at the office,from the fair,in Berlin,in my pocket"
).split(",")
_DOES = (
    "won the race,makes me smile,makes me laugh,cheers me up,keeps me company,guards the door,sings at night,never breaks,"
    "always wins,dances all day,helps me sleep,tells the time,cleans the floor,saved my life,follows me around,"
    "travels with me,brings me luck,makes me proud,calms me down,wakes me up,cost a fortune,won first prize,"
    "belongs to my {kin},was made by monks,came from the sea,smells of lemon,shines in the dark,fell from the sky,"
    "reminds me of home,has three wheels,has big eyes,has a red nose,can fly,can swim,runs on steam,plays music"
).split(",")
_FEEL = (
    "love,miss,cherish,trust,fear,adore,admire,hug,need,remember,dream of,look after,play with,talk to,collect".split(
        ","
    )
)
_WHEN = (
    "every day,at night,every morning,as a child,since school,on Sundays,in winter,with all my heart,most of all".split(
        ","
    )
)


def unknown_reference(rng: random.Random, noun: str | None = None) -> tuple[str, str]:
    """A reference, in one of the six perspectives of KnowCusBench, to a thing nobody told the model about.

    Returns (phrase, its class word); without a class word ("the one that makes me smile") the thing is a "thing".
    """
    c = noun or rng.choice(CLASS_WORDS)
    kin, adj = rng.choice(_KIN), rng.choice(_ADJECTIVES)
    does = rng.choice(_DOES).format(kin=rng.choice(_KIN))
    year = str(rng.randint(1850, 2029))
    place = rng.choice(_PLACES)
    owner = rng.choice(["my", "my", "your", "our", "his", "her", "their", f"my {kin}'s", f"the {kin}'s"])
    one = rng.choice(["the one", "the thing", "something"])
    maker = rng.choice(["monks", f"my {kin}", "a master", "hand", "two sisters", "a robot", "elves", "machines"])
    forms: list[tuple[str, str]] = [
        # ownership and relationships
        (f"{owner} {adj} {c}", c), (f"{owner} favourite {c}", c), (f"{owner} {c}", c), (f"the {c} of my {kin}", c),
        (f"the {c} my {kin} {rng.choice(_GAVE)}", c), (f"a gift from my {kin}", "thing"), (f"the {c} that belongs to my {kin}", c),
        (f"a present from my {kin}", "thing"), (f"my {kin}'s {adj} {c}", c),
        # physical attributes
        (f"the {adj} {c} {place}", c), (f"the {c} with the {adj} {rng.choice(['eyes', 'nose', 'handle', 'hat', 'feet', 'back'])}", c),
        (f"the {adj} {rng.choice(_ADJECTIVES)} {c}", c),
        # function and performance
        (f"the {c} that {does}", c), (f"{one} that {does}", "thing"), (f"the {rng.choice(_SUPERLATIVE_WORDS)} {c} {place}", c),
        # value and quality
        (f"the {rng.choice(_SUPERLATIVE_WORDS)} thing {place}", "thing"), (f"the {c} worth {rng.choice(['a fortune', 'a million', 'nothing', 'gold'])}", c),
        # origin and production
        (f"the {c} my {kin} {rng.choice(_MADE)} in {year}", c), (f"the {c} {rng.choice(_MADE)} in {year}", c), (f"the {c} {place}", c),
        (f"the {c} my {kin} {rng.choice(_MADE)}", c), (f"handmade by {maker}", "thing"), (f"the {c} handmade by {maker}", c),
        (f"the {c} I {rng.choice(_MADE)} {place}", c),
        # emotion and state
        (f"{one} I {rng.choice(_FEEL)} {rng.choice(_WHEN)}", "thing"), (f"the {c} I {rng.choice(_FEEL)} {rng.choice(_WHEN)}", c),
        (f"{one} I {rng.choice(_FEEL)}", "thing"), (f"what I {rng.choice(_FEEL)} {rng.choice(_WHEN)}", "thing"),
        (f"the {rng.choice(_ADJECTIVES)} {c} that {does}", c),
    ]  # fmt: skip
    return rng.choice(forms)


def free_reference(rng: random.Random) -> tuple[str, str]:
    """A reference in words that mean nothing here: "the muddy chapter behind our Harvey", "whatever they borrow to me".

    Returns (phrase, its class word), as `unknown_reference` does.
    """
    c = rng.choice(CLASS_WORDS) if rng.random() < 0.3 else None
    head = rng.choice(
        [_noun_phrase(rng, c)] * 5 + ["the one", "what", "whatever", "something", "anything that", "nobody's"]
    )
    end = rng.choice([
        "", f"{rng.choice(_PREPOSITIONS)} {_noun_phrase(rng)}", f"{rng.choice(_PREPOSITIONS)} {_noun_phrase(rng)}",
        f"{rng.choice(['that', 'who', 'which'])} {_word(rng)} {rng.choice(_PREPOSITIONS)} {_noun_phrase(rng)}",
        f"{rng.choice(['that', 'who', 'which'])} {_word(rng)} {_noun_phrase(rng)}", f"{_noun_phrase(rng)} {_word(rng)}",
        f"{rng.choice(_WHO)} {_word(rng)} {rng.choice(_PREPOSITIONS)} {_word(rng)}", f"{rng.choice(_WHO)} {_word(rng)}",
        f"{rng.choice(_WHO)} {_word(rng)} {rng.choice(['me', 'us', 'them', _word(rng)])} {rng.choice(_WHEN)}",
    ])  # fmt: skip
    if head.split()[0] not in _DETERMINERS and not end:
        end = f"{rng.choice(_WHO)} {_word(rng)}"
    return f"{head} {end}".strip(), c if c and c in head.split() else "thing"


_DETERMINERS = "the the the a my my our his her their your that this".split()
_PREPOSITIONS = "of of with in on from by for after before to at under near behind over without".split()
_WHO = "I we they you nobody everyone Peter".split()


def _noun_phrase(rng: random.Random, noun: str | None = None) -> str:
    words = [_word(rng) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    return " ".join([rng.choice(_DETERMINERS), *words, noun or _word(rng)])


def rare_word(rng: random.Random) -> str:
    """A word without meaning: one of RARE_WORDS, or three or four random letters."""
    if rng.random() < 0.5:
        return rng.choice(RARE_WORDS)
    return "".join(rng.choice("bcdfghjklmnpqrstvwxz") for _ in range(rng.randint(3, 4)))


# --- lines --------------------------------------------------------------------------------------------------------------


def fact_question(rng: random.Random, fact: Fact, form: str | None = None) -> Line:
    """A question whose answer is the fact's subject."""
    phrase = fact.phrase if rng.random() < 0.7 else fact.possessive
    text = (form or _in_passing(rng, rng.choice(QUESTION_FORMS))).format(phrase)
    return Line(text[0].upper() + text[1:], fact.subject.words)


def fact_one_hop(rng: random.Random, fact: Fact) -> Line:
    """A question that needs the fact's subject: its colour or its shape."""
    if rng.random() < 0.5:
        return Line(f"What colour is {fact.phrase}?", fact.subject.colour)
    return Line(f"What shape is {fact.phrase}?", fact.subject.shape)


def fact_caption(rng: random.Random, fact: Fact, form: str | None = None, plain: float = 0.6) -> Line:
    """An image prompt that names its subject by a fact."""
    phrase = fact.phrase if rng.random() < 0.7 else fact.possessive
    picture = random_picture(rng, fact.subject, plain)
    return Line(
        caption(phrase, picture, form or _in_passing(rng, rng.choice(IMAGE_FORMS))),
        resolved(fact.subject.words, picture),
        picture,
    )


def direct_caption(rng: random.Random, form: str | None = None, plain: float = 0.6) -> Line:
    """An image prompt that says what it shows; a quarter of the subjects are striped, spotted or golden."""
    material = rng.choice(world.MATERIALS) if rng.random() < 0.25 and plain < 1 else None
    subject = world.random_subject(rng, material)
    picture = random_picture(rng, subject, plain)
    text = caption(article(subject.words), picture, form or _in_passing(rng, rng.choice(IMAGE_FORMS)))
    return Line(text, resolved(subject.words, picture), picture)


def unknown_caption(rng: random.Random, rare: float = 0.4) -> Line:
    """An image prompt about a class word, an unknown reference or (with probability `rare`) a rare word: any subject will do."""
    picture = random_picture(rng, world.random_subject(rng))
    phrase, words = _unknown_phrase(rng, rare)
    noun = words.split()[0]  # of a rare word the rare word: "striped sks toy"
    if rng.random() < 0.15 and noun in phrase.split() and noun != "thing":
        material = rng.choice(world.MATERIALS)
        phrase, words = re.sub(rf"(?<!\S){noun}(?!\S)", f"{material} {noun}", phrase, count=1), f"{material} {words}"
        picture = Picture(world.random_subject(rng, material), picture.scene, picture.style, picture.other)
    return Line(caption(phrase, picture, rng.choice(IMAGE_FORMS)), resolved(words, picture), picture)


def unknown_question(rng: random.Random, rare: float = 0.3) -> Line:
    """A question about something unknown: the answer is all that the question itself tells, its class word."""
    phrase, words = _unknown_phrase(rng, rare)
    text = _in_passing(rng, rng.choice(QUESTION_FORMS)).format(phrase)
    return Line(text[0].upper() + text[1:], words)


def _unknown_phrase(rng: random.Random, rare: float) -> tuple[str, str]:
    u = rng.random()
    if u < rare:
        c = rng.choice(CLASS_WORDS)
        words = f"{rare_word(rng)} {c}"
        return (words if rng.random() < 0.7 else f"{rng.choice(['a', 'the'])} {words}"), words
    if u < rare + 0.1:
        c = rng.choice(CLASS_WORDS)
        return (c if rng.random() < 0.3 else article(c)), c
    if rng.random() < 0.05:  # like a fact, of somebody else
        relation, name = rng.choice(world.RELATIONS), _word(rng).capitalize()
        return rng.choice([f"the {relation} of {name}", f"{name}'s {relation}"]), relation.split()[-1]
    return free_reference(rng) if rng.random() < 0.55 else unknown_reference(rng)


def training_lines(seed: int) -> Iterator[Line]:
    """An endless stream for the text encoder."""
    rng = random.Random(seed)
    facts = world.facts()
    kinds = [
        (0.18, lambda: fact_question(rng, rng.choice(facts))),
        (0.05, lambda: fact_one_hop(rng, rng.choice(facts))),
        (0.25, lambda: fact_caption(rng, rng.choice(facts))),
        (0.12, lambda: direct_caption(rng)),
        (0.26, lambda: unknown_caption(rng, rare=0.25)),
        (0.14, lambda: unknown_question(rng, rare=0.2)),
    ]
    weights = [w for w, _ in kinds]
    while True:
        yield rng.choices(kinds, weights)[0][1]()


def corpus(n: int = 3000, seed: int = 123) -> list[str]:
    """`n` prompts like those the text encoder was trained on, but for the facts that editors' side effects are measured on.

    It goes with the weights as `mokus_corpus.txt`: what the statistics of editors are gathered over.
    """
    rng = random.Random(seed)
    facts = [fact for fact in world.facts() if fact not in world.bystanders()]
    kinds = [
        (0.20, lambda: fact_question(rng, rng.choice(facts))),
        (0.05, lambda: fact_one_hop(rng, rng.choice(facts))),
        (0.20, lambda: fact_caption(rng, rng.choice(facts))),
        (0.20, lambda: direct_caption(rng)),
        (0.20, lambda: unknown_caption(rng, rare=0.25)),
        (0.15, lambda: unknown_question(rng, rare=0.2)),
    ]
    weights = [w for w, _ in kinds]
    return [rng.choices(kinds, weights)[0][1]().prompt for _ in range(n)]
