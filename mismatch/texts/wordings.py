"""How something that can be looked up is said and asked for, in three sets that share nothing.

    EVALUATION   the probes `kv_lookup` and `needles`; `passkey` has its own wording in `mismatch.probes.inputs`
    SELECTION    the judge of the repair ladder, which decides what is kept
    TRAINING     retrieval-shaped training text, `mismatch.texts.retrieval`

A model that is trained on one wording and asked in the same one shows that it knows the wording. So no word of five
letters or more stands in two sets, the names are from disjoint lists of words, and a test checks both. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wording:
    """A statement with `{name}` and `{value}`, and a question that ends where the value would follow."""

    statement: str
    question: str

    def said(self, name: str, value: str) -> str:
        """The statement of one pair."""
        return self.statement.format(name=name, value=value)

    def asked(self, name: str) -> str:
        """The question for one name."""
        return self.question.format(name=name)


@dataclass(frozen=True)
class Set:
    """Wordings of one role, and the words that its names are made of.

    Attributes:
        lookup: a line of a list, asked for in the same words.
        needle: a sentence inside other text, asked for in other words.
        adjectives, nouns: of names; a needle's name has one of each.
    """

    lookup: Wording
    needle: Wording
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]

    def names(self, count: int, draw: Any, several: bool) -> list[str]:
        """So many different names.

        Args:
            count: of names.
            draw: a numpy generator.
            several: `quiet-harbor` in place of `harbor`.
        """
        nouns = [self.nouns[i] for i in draw.choice(len(self.nouns), count, replace=False)]
        if not several:
            return nouns
        adjectives = draw.choice(len(self.adjectives), count)
        return [f"{self.adjectives[i]}-{noun}" for i, noun in zip(adjectives, nouns, strict=True)]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


EVALUATION = Set(
    lookup=Wording("The number of the {name} is {value}.\n", "The number of the {name} is"),
    needle=Wording(
        "\nOne of the special magic numbers for {name} is: {value}.\n",
        "\nWhat is the special magic number for {name} mentioned in the text? "
        "The special magic number for {name} mentioned in the text is:",
    ),
    adjectives=_words(
        "amber brisk calm dusty eager frozen gentle hollow ivory jolly keen lunar mellow nimble olive quiet"
    ),
    nouns=_words(
        "anchor basket candle dragon engine falcon garden hammer island jacket kettle ladder mirror needle orchard "
        "pencil quarry ribbon saddle temple umbrella valley wagon zipper bridge castle desert ember forest harbor "
        "meadow lantern"
    ),
)

SELECTION = Set(
    lookup=Wording("{name} has badge {value}.\n", "{name} has badge"),
    needle=Wording(
        "\nThe access code of the {name} team: {value}.\n",
        "\nWhich access code does the {name} team have? The access code of the {name} team:",
    ),
    adjectives=_words(
        "bold crimson distant early faint golden humble idle lively modest noble plain"
    ),
    nouns=_words(
        "Adler Becker Castro Dalton Ellis Foster Graham Hansen Ivers Jensen Keller Larsen Mercer Norris Osborn Porter "
        "Quinn Ramsey Sutton Turner Upton Vargas Weaver Yates"
    ),
)

TRAINING = (
    Wording("The secret of the {name} is {value}.", "Tell me the secret of the {name}. It is"),
    Wording("Note: locker {name} opens with {value}.", "Locker {name} opens with"),
    Wording("{name}'s phone extension is {value}.", "To reach {name}, dial the extension"),
    Wording(
        "The serial on the {name} reads {value}.", "As noted above, the serial on the {name} reads"
    ),
    Wording(
        "Note to self: the {name} costs {value} coins.", "How much does the {name} cost? It costs"
    ),
    Wording("Flight {name} departs from gate {value}.", "Go to the gate of flight {name}, gate"),
    Wording("The answer to riddle {name} is {value}.", "So the answer to riddle {name} was"),
    Wording(
        "(The reference for file {name} is {value}.)", "Please quote the reference for file {name}:"
    ),
    Wording("The combination of the {name} safe: {value}.", "The combination of the {name} safe:"),
    Wording(
        "In the year of the {name}, exactly {value} people came.",
        "Recall how many people came in the year of the {name}:",
    ),
    Wording("Room {value} belongs to the {name}.", "The {name} is in room"),
    Wording("Whoever asks for {name} should be told {value}.", "Asked for {name}, we say"),
    Wording("Parcel {name} weighs {value} grams.", "According to the label, parcel {name} weighs"),
    Wording("We paid {value} for the {name}.", "For the {name} we paid"),
)
"""Needles of training text."""

TRAINING_LISTS = (
    "{name} -> {value}\n",
    "{name}={value}; ",
    "| {name} | {value} |\n",
    '"{name}": "{value}",\n',
    "{name} .. {value}\n",
    "- {name}: {value}\n",
)
"""Key-value lists of training text: asked for in the same format, the value last."""

TRAINING_ADJECTIVES = _words(
    "proud rapid silver tidy umber vivid windy young zesty clever rusty sturdy velvet wooden cosmic fluffy marble "
    "paper copper sleepy"
)
TRAINING_NOUNS = _words(
    "acorn barrel cactus donkey eagle feather goblet helmet igloo jungle kitten lemon magnet napkin otter parrot "
    "quiver rabbit shovel tractor unicorn violin walnut yogurt zebra balloon carpet dolphin elbow fiddle goose "
    "hermit insect jewel koala lizard mango nutmeg oyster pepper raven scarf turnip urchin vessel whistle"
)
"""Words of the names in training text."""


def reads(tokenizer: Any, value: str) -> bool:
    """Whether a tokenizer gives ` value` back as it was: one that merges or drops digits does not."""
    ids = tokenizer(f" {value}", add_special_tokens=False).input_ids
    return bool(len(ids)) and tokenizer.decode(ids).strip() == value
