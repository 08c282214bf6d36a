"""A tiny language for the tests of graphs and decoding, and a search over it that knows nothing of automata."""

import itertools
import math

import numpy as np

from teacherstudent.config import Senones
from teacherstudent.data.lexicon import SILENCE, Lexicon
from teacherstudent.decoding.graph import SILENCE_PROBABILITY
from teacherstudent.decoding.language_model import BEGIN, END, estimate_bigram
from teacherstudent.tying.senones import Statistics, build

# two and too sound alike, to begins both ways of tomb, and tomb has two pronunciations
LEXICON = Lexicon(
    {
        "to": (("T", "U"),),
        "two": (("T", "U", "W"),),
        "too": (("T", "U", "W"),),
        "tomb": (("T", "U", "M"), ("T", "U", "B")),
        "um": (("U", "M"),),
        "mmm": (("M",),),
    }
)
PHONES = (SILENCE, *LEXICON.phones)
LANGUAGE_MODEL = estimate_bigram(
    ["to um", "two um tomb", "too tomb", "um", "mmm mmm to"], LEXICON.pronunciations
)


def tiny_inventory():
    """A tree in which contexts on both sides matter, over random features."""
    generator = np.random.default_rng(4)
    statistics = Statistics(len(PHONES), 2)
    means = generator.normal(size=(7, 7, 7, 2, 2)) * 2
    for _ in range(200):
        phones = generator.integers(1, len(PHONES) + 1, 8)
        phone, first = np.repeat(phones, 2), np.tile([True, False], 8)
        padded = np.pad(phones, 1)
        features = [means[padded[i], padded[i + 1], padded[i + 2], s] for i in range(8) for s in (0, 1)]
        statistics.accumulate(np.array(features) + generator.normal(size=(16, 2)), phone, first)
    return build(statistics, PHONES, Senones(target=50, min_count=10, min_gain=5.0))


def random_posteriors(seed, num_frames, num_senones):
    """Log posteriors (T, S)."""
    logits = 3 * np.random.default_rng([seed, num_frames]).normal(size=(num_frames, num_senones))
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)


def best_state_sequence(scores, inventory, phones):
    """The best score of these phones over all frames, each phone lasting one or more; -inf if they do not fit."""
    ids = [0, *(PHONES.index(phone) + 1 for phone in phones), 0]
    states = [inventory.senone(*ids[i : i + 3], state) for i in range(len(phones)) for state in (0, 1)]
    best = np.full(len(states), -math.inf)
    best[0] = scores[0, states[0]]
    for frame in scores[1:]:
        entered = np.full(len(states), -math.inf)
        for place in range(len(states)):
            if place % 2:  # a later frame of the phone
                before = max(best[place - 1], best[place])
            else:  # its first frame: the phone before ended, after one frame or after more
                before = max(best[place - 1], best[place - 2]) if place else -math.inf
            entered[place] = before + frame[states[place]]
        best = entered
    return max(best[-1], best[-2])


def sentence_score(scores, inventory, words, language_model=LANGUAGE_MODEL):
    """Of its best pronunciations, silences and times; -inf if the words do not fit."""
    sentence = (BEGIN, *words, END)
    grammar = math.log(10) * sum(
        language_model.log10_probability(sentence[:i], sentence[i]) for i in range(1, len(sentence))
    )
    assert SILENCE_PROBABILITY == 0.5  # with silence or without: both are as likely
    grammar += (len(words) + 1) * math.log(SILENCE_PROBABILITY)
    acoustics = -math.inf
    for spoken in itertools.product(*(LEXICON.pronunciations[word] for word in words)):
        for silences in itertools.product(((), (SILENCE,)), repeat=len(words) + 1):
            phones = list(silences[0])
            for pronunciation, silence in zip(spoken, silences[1:]):
                phones += [*pronunciation, *silence]
            if 0 < len(phones) <= len(scores):
                acoustics = max(acoustics, best_state_sequence(scores, inventory, phones))
    return grammar + acoustics


def enumerate_hypotheses(scores, inventory, language_model=LANGUAGE_MODEL, max_words=3):
    """Every sentence of up to max_words words that fits, and its score."""
    found = {
        words: sentence_score(scores, inventory, words, language_model)
        for length in range(max_words + 1)
        for words in itertools.product(LEXICON.words, repeat=length)
    }
    return {words: score for words, score in found.items() if score > -math.inf}
