import gzip
import math
import warnings
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.decoding.language_model import BEGIN, END, LanguageModel, estimate_bigram, word_loop

SENTENCES = ["play some music", "play some jazz", "stop the music", "stop", "play the music"]
sentences = st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5).map(" ".join), max_size=12)


def total(model, history):
    return sum(10 ** model.log10_probability(history, word) for word in (*model.words, END))


@settings(max_examples=60, deadline=None)
@given(sentences)
def test_probabilities_sum_to_one_after_every_history(texts):
    model = estimate_bigram(texts, vocabulary=["f", "g"])
    for history in ((), (BEGIN,), *((word,) for word in model.words)):
        assert total(model, history) == pytest.approx(1, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(sentences)
def test_no_backoff_is_a_gain_and_a_seen_pair_is_never_worse_than_backing_off(texts):
    model = estimate_bigram(texts, vocabulary=["f", "g"])
    assert all(score <= 0 for score in model.log10_backoffs.values())
    for history, word in (ngram for ngram in model.log10_probabilities if len(ngram) == 2):
        backed_off = model.log10_backoffs[history,] + model.log10_probabilities[word,]
        assert model.log10_probabilities[history, word] >= backed_off - 1e-6


def test_the_estimate_is_interpolated_kneser_ney():
    """Written out from the formulas, with counts taken naively."""
    model = estimate_bigram(SENTENCES)
    pairs = [pair for text in SENTENCES for pair in zip([BEGIN, *text.split()], [*text.split(), END])]
    counts, vocabulary = Counter(pairs), {word for _, word in pairs}

    def discount(values):
        once, twice = values.count(1), values.count(2)
        return min(max(once / (once + 2 * twice), 0.1), 0.9)

    def unigram(word):
        ways = {w: len({h for h, x in counts if x == w}) for w in vocabulary}
        d = discount(list(ways.values()))
        rest = d * len(ways) / len(counts) / len(vocabulary)
        return max(ways[word] - d, 0) / len(counts) + rest

    def bigram(history, word):
        d, seen = discount(list(counts.values())), [n for (h, _), n in counts.items() if h == history]
        return max(counts[history, word] - d, 0) / sum(seen) + d * len(seen) / sum(seen) * unigram(word)

    for history in (BEGIN, *model.words):
        for word in vocabulary:
            found = 10 ** model.log10_probability((history,), word)
            assert found == pytest.approx(bigram(history, word), rel=1e-5)


def test_a_word_that_was_never_said_can_still_be_said():
    model = estimate_bigram(SENTENCES, vocabulary=["polka"])
    assert -5 < model.log10_probability(("play",), "polka") < 0
    assert model.log10_probability(("play",), "unheard") == -math.inf


def test_without_sentences_all_words_are_as_likely():
    model = estimate_bigram([], vocabulary=["yes", "no", "maybe"])
    assert model.words == ("maybe", "no", "yes")
    for word in (*model.words, END):
        assert model.log10_probability(("yes",), word) == pytest.approx(math.log10(0.25))


def test_nothing_to_estimate_from_and_markers_inside_a_sentence_are_errors():
    with pytest.raises(ValueError, match="no words"):
        estimate_bigram(["", " "])
    with pytest.raises(ValueError, match="added here"):
        estimate_bigram(["<s> play </s>"])


def test_a_model_survives_being_written_and_read(tmp_path):
    model = estimate_bigram(SENTENCES)
    (tmp_path / "lm.arpa").write_text(model.to_arpa())
    assert LanguageModel.read(tmp_path / "lm.arpa") == model
    assert LanguageModel.from_arpa(model.to_arpa()).to_arpa() == model.to_arpa()


def test_the_estimate_does_not_depend_on_the_order_of_the_sentences():
    assert estimate_bigram(SENTENCES).to_arpa() == estimate_bigram(SENTENCES[::-1]).to_arpa()


TRIGRAM = """
\\data\\
ngram 1=4
ngram 2=2
ngram 3=1

\\1-grams:
-99 <s> -0.30103
-0.60206 a -0.30103
-0.60206 b
-0.30103 </s>

\\2-grams:
-0.20412 <s> a -0.1
-0.20412 a b

\\3-grams:
-0.30103 <s> a b

\\end\\
"""


def test_a_trigram_is_read_and_backs_off_step_by_step(monkeypatch):
    with pytest.raises(ValueError, match="sum to"):  # its backoffs are made up
        LanguageModel.from_arpa(TRIGRAM)
    monkeypatch.setattr(LanguageModel, "check", lambda self: self)
    values = LanguageModel.from_arpa(TRIGRAM)
    assert values.order == 3
    assert values.log10_probability((BEGIN, "a"), "b") == -0.30103
    assert values.log10_probability(("b", BEGIN, "a"), END) == pytest.approx(-0.1 - 0.30103 - 0.30103)


def test_a_model_whose_backoffs_do_not_normalise_is_refused_naming_the_history():
    text = estimate_bigram(SENTENCES).to_arpa()
    play = next(row for row in text.splitlines() if "\tplay\t" in row)
    damaged = text.replace(play, play.rsplit("\t", 1)[0] + "\t0.4")
    with pytest.raises(ValueError, match="after 'play' sum to"):
        LanguageModel.from_arpa(damaged)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("hello", r"without \\end\\"),
        ("\\data\\\n\\end\\\n", "no .*1-grams"),
        ("\\1-grams:\nx play\n\\end\\\n", "line 2: got 'x play'"),
        ("\\2-grams:\n-1 play\n\\end\\\n", "line 2"),
        ("\\1-grams:\n-1 a b c\n\\end\\\n", "line 2"),
        ("\\1-grams:\nnan play\n-0.3 </s>\n\\end\\\n", "line 2: got 'nan play'"),
        ("\\1-grams:\n-0.3 play inf\n-0.3 </s>\n\\end\\\n", "line 2: got '-0.3 play inf'"),
        ("\\1-grams:\n-0.3 play\n\\x-grams:\n\\end\\\n", r"line 3: got '\\\\x-grams:', need"),
        ("\\0-grams:\n-0.3 play\n\\end\\\n", "line 1: got"),
        ("\\1-grams:\n-0.3 play\n-0.3 stop\n\\end\\\n", "has no </s> in its .*could end no sentence"),
    ],
)
def test_what_is_not_an_arpa_file_is_refused_naming_the_line(text, what):
    with pytest.raises(ValueError, match=what):
        LanguageModel.from_arpa(text)


def test_minus_infinity_is_never_as_minus_99_is():
    text = estimate_bigram(SENTENCES).to_arpa()
    assert LanguageModel.from_arpa(text.replace("-99.0000000\t<s>", "-inf\t<s>")) == LanguageModel.from_arpa(
        text
    )


def test_the_unknown_word_of_a_lexicon_gets_no_share():
    words = [*"abc", "<UNK>", "<unk>"]
    assert estimate_bigram(["a b"], words) == estimate_bigram(["a b"], "abc")
    assert 10 ** estimate_bigram(["a <unk> b"], words).log10_probability((), "<unk>") > 0
    with pytest.raises(ValueError, match="no words"):
        estimate_bigram([], ["<UNK>"])


def test_estimating_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_bigram(SENTENCES)


def test_a_file_is_read_by_its_name(tmp_path):
    text = estimate_bigram(SENTENCES).to_arpa()
    (tmp_path / "lm.arpa").write_text(text)
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (tmp_path / "lm_text.txt").write_text("\n".join(SENTENCES))
    (tmp_path / "words.txt").write_text("<eps> 0\nyes 1\n\nno 2\n#0 3\n<s> 4\n</s> 5\n")
    model = estimate_bigram(SENTENCES)
    assert LanguageModel.read(tmp_path / "lm.arpa") == LanguageModel.read(tmp_path / "lm.arpa.gz") == model
    assert LanguageModel.read(tmp_path / "lm_text.txt") == model
    assert "polka" in LanguageModel.read(tmp_path / "lm_text.txt", ["polka"]).words
    assert LanguageModel.read(tmp_path / "words.txt") == word_loop(["no", "yes"])


def test_in_a_word_loop_any_word_may_follow_any_other_equally_likely():
    model = word_loop(["yes", "no", "yes"])
    assert model.words == ("no", "yes")
    for history in ((BEGIN,), ("yes",), ("no", "yes")):
        for word in ("yes", "no", END):
            assert model.log10_probability(history, word) == pytest.approx(math.log10(1 / 3))


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("lm.arpa.gz", b"not gzip", "lm.arpa.gz: Not a gzipped file"),
        ("lm.arpa.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], "lm.arpa.gz: "),
        ("lm.arpa", b"\xff\xfe", "lm.arpa: .*utf-8"),
        ("words.txt", b"<eps> 0\n", "words.txt: no words"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path, name, data, what):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=what):
        LanguageModel.read(tmp_path / name)
    with pytest.raises(ValueError, match=r"no language model at .*set data\.language_model"):
        LanguageModel.read(tmp_path / "absent.arpa")


UNKNOWN_ARPA = """
\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-99 <s> -0.5
-0.60206 a -0.3010300
-0.60206 <unk>
-0.30103 </s>

\\2-grams:
-0.4771213 a a
-0.5228787 a <unk>

\\end\\
"""


def test_the_unknown_word_has_probability_and_cannot_be_said(monkeypatch):
    monkeypatch.setattr(LanguageModel, "check", lambda self: self)
    model = LanguageModel.from_arpa(UNKNOWN_ARPA)
    assert model.words == ("a",)
    assert model.log10_probability(("a",), "<unk>") == -0.5228787
    assert model.log10_probability((), "b") == -math.inf


def test_a_byte_order_mark_is_part_of_no_word(tmp_path):
    (tmp_path / "words.txt").write_bytes(b"\xef\xbb\xbfyes\nno\n")
    assert LanguageModel.read(tmp_path / "words.txt").words == ("no", "yes")
