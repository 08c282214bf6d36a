"""Sentences that people say to a voice assistant, drawn from a small grammar of about 190 words.

A rule is a name and its alternatives, equally likely; `<name>` in an alternative stands for a rule. There is no
punctuation and no number in figures: what is written is what is said, word for word.
"""

import re
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np

CARRIER_DRAWS = 2000  # among them are the sentences from which the lexicon learns an accent's pronunciations

_NAME = re.compile(r"<(\w+)>")


class Sentences(Protocol):
    """What people say: `Grammar` here, `Vocabulary` in vocabulary.py."""

    @property
    def words(self) -> tuple[str, ...]:
        """Every word that a sentence can have, each once."""

    def draw(self, rng: np.random.Generator) -> str:
        """One sentence: words with single spaces between them."""

    def spell(self, text: str) -> str:
        """What espeak-ng is given for it: as many words, in the same order."""

    def draw_carriers(self, accent: str) -> Iterator[str]:
        """Sentences from which the lexicon learns how an accent says the words: the same for every seed."""


GRAMMAR: dict[str, tuple[str, ...]] = {
    "sentence": (
        "<music>", "<timer>", "<weather>", "<home>", "<alarm>", "<reminder>",
        "<volume>", "<call>", "<shopping>", "<number>", "<question>",
    ),
    "music": (
        "play some <genre> music", "play some <genre> music in the <room>", "please play <genre> in the <room>",
        "play my <genre> list and turn it <updown>", "play the next song from <name> and <name>",
    ),
    "timer": (
        "set a timer for <duration>", "set another timer for <duration> please",
        "how much time is left on the <food> timer", "add <duration> to the timer",
    ),
    "weather": (
        "what's the weather in <city>", "what's the weather in <city> <day>", "will it rain in <city> <day>",
        "how cold is it in <city> <day>", "is it warm in <city> or in <city>",
    ),
    "home": (
        "turn <onoff> the <room> <device>", "please turn <onoff> the <device> in the <room>",
        "turn <onoff> the <room> <device> at <time>", "set the <room> heating to <tens> degrees",
    ),
    "alarm": (
        "set an alarm for <time>", "wake me up at <time> <day>", "set the alarm for <day> at <time>",
        "stop the alarm and play some <genre> music",
    ),
    "reminder": (
        "remind me to <task> <day>", "remind me to <task> at <time>", "please remind me to <task> in <duration>",
    ),
    "volume": (
        "turn the volume <updown> to <tens> percent", "set the volume in the <room> to <tens>",
        "turn the <screen> volume <updown> please",
    ),
    "call": (
        "call <name> and <name>", "please call <name> on the mobile phone", "call <name> at work <day>",
        "send a message to <name> and <name>",
    ),
    "shopping": (
        "add <food> and <food> to my shopping list", "put <food> <food> and <food> on the list",
        "buy <digit> <food> and some <food>", "is there <food> on my shopping list",
    ),
    "number": (
        "call <digit> <digit> <digit> <digit> <digit>", "dial <digit> <digit> <digit> <digit> <digit> <digit>",
        "the number is <digit> <digit> <digit> <digit>", "my code is <digit> <digit> <digit> <digit>",
    ),
    "question": (
        "what time is it in <city>", "how many minutes are left", "when is the next train to <city>",
        "how far is it from <city> to <city>", "when is my meeting with <name> <day>",
    ),
    "duration": (
        "<digit> minutes", "<teen> minutes", "<tens> minutes", "<tens> <digit> minutes", "half an hour",
        "one hour and <teen> minutes", "<tens> <digit> seconds", "<digit> hours",
    ),
    "time": (
        "<hour>", "<hour> <tens>", "<hour> <tens> <digit>", "<hour> <teen>", "half past <hour>",
        "quarter to <hour>", "<hour> in the <daytime>",
    ),
    "day": (
        "today", "tomorrow", "tomorrow <daytime>", "on <weekday>", "on <weekday> <daytime>", "next <weekday>",
    ),
    "task": (
        "call <name>", "buy <food>", "buy <food> and <food>", "water the garden", "clean the <room>",
        "send a message to <name>", "feed the dog", "pay the rent",
    ),
    "genre": ("jazz", "rock", "classical", "dance", "blues", "country", "folk", "pop", "guitar", "piano"),
    "room": ("kitchen", "bedroom", "bathroom", "garden", "office", "hall", "living room"),
    "device": ("lights", "lamp", "heating", "television", "radio", "fan", "speaker"),
    "screen": ("television", "radio", "speaker"),
    "onoff": ("on", "off"),
    "updown": ("up", "down"),
    "city": (
        "london", "paris", "berlin", "boston", "chicago", "dublin", "madrid", "moscow", "rome", "sydney",
        "tokyo", "toronto", "vienna", "denver",
    ),
    "weekday": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "daytime": ("morning", "afternoon", "evening"),
    "name": (
        "anna", "david", "emma", "george", "hannah", "james", "laura", "maria", "oliver", "peter", "sarah",
        "thomas", "mother", "father",
    ),
    "food": (
        "apples", "bananas", "bread", "butter", "cheese", "coffee", "eggs", "fish", "juice", "milk", "onions",
        "pasta", "rice", "soap", "sugar", "tea", "tomatoes",
    ),
    "digit": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "hour": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    "teen": ("ten", "eleven", "twelve", "thirteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
    "tens": ("twenty", "thirty", "forty", "fifty"),
}  # fmt: skip


def draw_sentence(rng: np.random.Generator, rule: str = "sentence") -> str:
    """One sentence: lower-case words with single spaces between them."""
    alternatives = GRAMMAR[rule]
    chosen = alternatives[int(rng.integers(len(alternatives)))]
    return _NAME.sub(lambda match: draw_sentence(rng, match[1]), chosen)


def list_words() -> list[str]:
    """Every word that a sentence can have, sorted."""
    alternatives = (text for texts in GRAMMAR.values() for text in texts)
    return sorted({word for text in alternatives for word in _NAME.sub(" ", text).split()})


class Grammar:
    """The sentences of GRAMMAR, said as they are written."""

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(list_words())

    def draw(self, rng: np.random.Generator) -> str:
        return draw_sentence(rng)

    def spell(self, text: str) -> str:
        return text

    def draw_carriers(self, accent: str) -> Iterator[str]:
        """Every word beside every neighbour that it has: how it is said depends on them. No other by accent."""
        rng = np.random.default_rng([zlib.crc32(b"carriers")])
        seen: set[tuple[str, str]] = set()
        for _ in range(CARRIER_DRAWS):
            text = draw_sentence(rng)
            words = ["", *text.split(), ""]
            pairs = set(pairwise(words))
            if pairs - seen:
                seen |= pairs
                yield text
