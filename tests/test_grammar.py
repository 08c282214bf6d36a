import re
from collections import Counter

import numpy as np

from teacherstudent.synthesis.grammar import GRAMMAR, Grammar, draw_sentence, list_words


def draw(num_sentences: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [draw_sentence(rng) for _ in range(num_sentences)]


def test_sentences_are_lower_case_words_with_single_spaces() -> None:
    for sentence in draw(2000):
        assert re.fullmatch(r"[a-z']+( [a-z']+)*", sentence)


def test_every_word_of_the_list_is_said_and_no_other() -> None:
    said = {word for sentence in draw(20000) for word in sentence.split()}
    assert said == set(list_words())
    assert 150 <= len(said) <= 200


def test_every_rule_that_is_named_is_there_and_every_rule_is_named() -> None:
    named = {name for texts in GRAMMAR.values() for text in texts for name in re.findall(r"<(\w+)>", text)}
    assert named | {"sentence"} == set(GRAMMAR)


def test_sentences_have_four_to_fifteen_words_and_seven_on_average() -> None:
    lengths = [len(sentence.split()) for sentence in draw(5000)]
    assert min(lengths) >= 4
    assert max(lengths) <= 15
    assert 6.5 < np.mean(lengths) < 8


def test_alternatives_are_equally_likely() -> None:
    counts = Counter(draw_sentence(np.random.default_rng([7, index]), "digit") for index in range(9000))
    assert set(counts) == set(GRAMMAR["digit"])
    assert all(850 < count < 1150 for count in counts.values())


def test_the_generator_decides() -> None:
    assert draw(50, seed=1) == draw(50, seed=1)
    assert draw(50, seed=1) != draw(50, seed=2)


def test_there_are_many_sentences() -> None:
    assert len(set(draw(10000))) > 4000


def test_carriers_have_every_word_and_are_the_same_for_every_accent() -> None:
    grammar = Grammar()
    carriers = list(grammar.draw_carriers("en"))
    assert {word for text in carriers for word in text.split()} == set(grammar.words) == set(list_words())
    assert carriers == list(grammar.draw_carriers("en-us"))
    assert all(grammar.spell(text) == text for text in carriers[:10])
