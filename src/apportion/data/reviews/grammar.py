"""Movie-review clauses from a small grammar: words are separated by one space, punctuation marks are words.

    review  = opening rest " ." clause clause ...
    opening = WHEN WHO SAW DET ADJECTIVE GENRE FILM          8 words without an opinion: the prompt
    rest    = about DET NEUTRAL NOUN
    clause  = (opinion | neutral) END
    opinion = DET ASPECT was [NEGATION] [ADVERB] OPINION  |  WHO [NEGATION] found DET ASPECT [ADVERB] OPINION

An opinion word counts one; a negation turns the opinions that follow it in its own clause. Half of the clauses carry an
opinion, so a review of 160 words has about ten, far from one another: a score for the whole says little of each.
"""

import random
from dataclasses import dataclass

WHEN = tuple(
    f"{first} {second}"
    for first in ("last", "this", "one")
    for second in ("winter", "summer", "evening", "weekend", "monday", "sunday")
)
WHO = ("i", "we", "they", "critics", "viewers", "everybody")
SAW = ("saw", "watched", "rented", "discussed", "remembered", "reviewed")
DET = ("the", "this", "that", "another")
ADJECTIVE = (
    "long",
    "short",
    "recent",
    "french",
    "german",
    "silent",
    "black-and-white",
    "low-budget",
    "animated",
    "foreign",
)
GENRE = ("crime", "war", "horror", "comedy", "western", "spy", "family", "sports", "science", "music")
FILM = ("film", "movie", "picture", "feature")
NOUN = (
    "sailor",
    "teacher",
    "detective",
    "farmer",
    "city",
    "village",
    "train",
    "island",
    "letter",
    "robbery",
    "wedding",
    "journey",
)
NEUTRAL = ("young", "tall", "distant", "small", "northern", "famous")
ASPECT = (
    "plot",
    "acting",
    "music",
    "dialogue",
    "camera",
    "ending",
    "cast",
    "script",
    "lighting",
    "pacing",
    "director",
    "editing",
)
VERB = ("follows", "shows", "meets", "leaves", "visits", "mentions")
PLACE = ("at the cinema", "on television", "in the second act", "near the end", "after the credits", "for two hours")
ADVERB = ("very", "quite", "always")
PRAISING = ("truly", "wonderfully", "delightfully")
BLAMING = ("rather", "painfully", "terribly")
POSITIVE = ("good", "great", "brilliant", "charming", "moving", "funny", "clever", "beautiful", "gripping", "fresh")
NEGATIVE = ("bad", "awful", "boring", "clumsy", "dull", "silly", "tedious", "ugly", "shallow", "stale")
NEGATION = ("not", "never", "hardly")
PUNCTUATION = (".", ",", ";", "!", "?")
CONNECTIVE = ("and", "but", "while", "because", "although", "so")

PROMPT_WORDS = 8
_CLAUSE_ENDS = (" .", " .", " .", " !", " ;", " , and", " , but", " , while", " , although", " , so", " because")


@dataclass(frozen=True, kw_only=True)
class Mood:
    """Say how a reviewer writes.

    Attributes:
        opinions: Share of clauses that carry an opinion, in [0, 1].
        approval: Share of opinions that are meant as praise, after negation, in [0, 1].
        negations: Share of opinions that are said with a negation, in [0, 1].
    """

    opinions: float = 0.5
    approval: float = 0.5
    negations: float = 0.25

    def __post_init__(self) -> None:
        for name in ("opinions", "approval", "negations"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a share lies in [0, 1]")


def vocabulary() -> list[str]:
    """List every word of the grammar once, in a fixed order."""
    groups = (WHEN, WHO, SAW, DET, ADJECTIVE, GENRE, FILM, NOUN, NEUTRAL, ASPECT, VERB, PLACE, ADVERB, PRAISING)
    more = (BLAMING, POSITIVE, NEGATIVE, NEGATION, PUNCTUATION, CONNECTIVE, ("about was found a",))
    phrases = [phrase for group in (*groups, *more) for phrase in group]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def opening(rng: random.Random) -> str:
    """Write the 8 words that begin a review: a prompt. No opinion, no negation, more than half a million of them."""
    return " ".join(map(rng.choice, (WHEN, WHO, SAW, DET, ADJECTIVE, GENRE, FILM)))


def continuation(rng: random.Random, *, words: int, mood: Mood) -> str:
    """Write the rest of a review after its opening: whole clauses until there are at least `words` words."""
    text = f"about a {rng.choice(NEUTRAL)} {rng.choice(NOUN)} ."
    while len(text.split()) < words:
        text += f" {_clause(rng, mood)}{rng.choice(_CLAUSE_ENDS)}"
    return _finish(text)


def _finish(text: str) -> str:
    """Close the last clause: a review does not end in a connective."""
    words = text.split()
    while words[-1] in CONNECTIVE or words[-1] in PUNCTUATION:
        words.pop()
    return " ".join([*words, "."])


def _clause(rng: random.Random, mood: Mood) -> str:
    if rng.random() < mood.opinions:
        return _opinion_clause(rng, mood)
    if rng.random() < 0.5:
        return f"{rng.choice(DET)} {rng.choice(NOUN)} {rng.choice(VERB)} a {rng.choice(NEUTRAL)} {rng.choice(NOUN)}"
    return f"{rng.choice(WHO)} {rng.choice(SAW)} {rng.choice(DET)} {rng.choice(NOUN)} {rng.choice(PLACE)}"


def _opinion_clause(rng: random.Random, mood: Mood) -> str:
    praise, negated = rng.random() < mood.approval, rng.random() < mood.negations
    negation = f" {rng.choice(NEGATION)}" if negated else ""
    positive = praise != negated
    word = rng.choice(POSITIVE if positive else NEGATIVE)
    adverb = f" {rng.choice((*ADVERB, *(PRAISING if positive else BLAMING)))}" if rng.random() < 0.6 else ""
    if rng.random() < 0.6 or negation == " not":
        return f"{rng.choice(DET)} {rng.choice(ASPECT)} was{negation}{adverb} {word}"
    return f"{rng.choice(WHO)}{negation} found {rng.choice(DET)} {rng.choice(ASPECT)}{adverb} {word}"
