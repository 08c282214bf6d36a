"""N-gram language models in ARPA format, a bigram estimated from sentences, and plain word lists.

The bigram is interpolated Kneser-Ney (Chen & Goodman 1999, "An empirical study of smoothing techniques",
section 4.1.6) with one discount per order:

    p(w | h) = max(c(h w) - d, 0) / c(h) + backoff(h) p(w),    backoff(h) = d N(h .) / c(h)

where N(h .) is how many words follow h. p(w) is discounted in the same way, over how many words w follows, and
interpolated with the uniform distribution, so that every word of the vocabulary has a probability.
"""

import gzip
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from teacherstudent.files import split_lines

BEGIN, END = "<s>", "</s>"
UNKNOWN = frozenset({"<unk>", "<UNK>"})  # what ARPA files call all other words: it cannot be recognised
_NO_WORDS = {BEGIN, END, "<eps>", "#0", *UNKNOWN}  # of Kaldi's words.txt
_NEVER = -99.0  # the log10 probability that ARPA files give to what is never predicted
_SUM_TOLERANCE = 0.02
_DIGITS = 7  # after the point of a logarithm: what is estimated survives being written and read

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class LanguageModel:
    """log10 probabilities of n-grams, and log10 backoffs of histories (0 where not given)."""

    log10_probabilities: dict[Ngram, float]
    log10_backoffs: dict[Ngram, float]

    @cached_property
    def order(self) -> int:
        return max(map(len, self.log10_probabilities))

    @property
    def words(self) -> tuple[str, ...]:
        """Every word that can be said, sorted; the unknown word is none."""
        singles = (ngram[0] for ngram in self.log10_probabilities if len(ngram) == 1)
        return tuple(sorted(word for word in singles if word not in (BEGIN, END) and word not in UNKNOWN))

    def log10_probability(self, history: Sequence[str], word: str) -> float:
        """Of the word after the history (only its last order - 1 words count); -inf for an unknown word."""
        context = tuple(history)[len(history) - min(len(history), self.order - 1) :]
        backoff = 0.0
        while True:
            if (*context, word) in self.log10_probabilities:
                return backoff + self.log10_probabilities[(*context, word)]
            if not context:
                return -math.inf
            backoff += self.log10_backoffs.get(context, 0.0)
            context = context[1:]

    def check(self) -> "LanguageModel":
        """Raises ValueError when the probabilities after some history do not sum to 1."""
        followers: dict[Ngram, list[str]] = {}
        for ngram in self.log10_probabilities:
            if ngram[-1] != BEGIN:
                followers.setdefault(ngram[:-1], []).append(ngram[-1])
        for history, words in sorted(followers.items()):
            total = sum(10 ** self.log10_probabilities[(*history, word)] for word in words)
            if history:
                lower = sum(10 ** self.log10_probability(history[1:], word) for word in words)
                total += 10 ** self.log10_backoffs.get(history, 0.0) * (1 - lower)
            if abs(total - 1) > _SUM_TOLERANCE:
                where = f"after {' '.join(history)!r}" if history else "of single words"
                raise ValueError(
                    f"the language model's probabilities {where} sum to {total:.4f}, not to 1: its probabilities "
                    "or backoffs are wrong (base-10 logarithms are needed)"
                )
        return self

    def to_arpa(self) -> str:
        """What from_arpa reads, and other tools do: for a user who wants the estimated model outside of here."""
        orders = range(1, self.order + 1)
        ngrams = {order: sorted(n for n in self.log10_probabilities if len(n) == order) for order in orders}
        rows = ["\\data\\", *(f"ngram {order}={len(ngrams[order])}" for order in orders)]
        for order in orders:
            rows += ["", f"\\{order}-grams:"]
            for ngram in ngrams[order]:
                row = f"{self.log10_probabilities[ngram]:.{_DIGITS}f}\t{' '.join(ngram)}"
                if ngram in self.log10_backoffs:
                    row += f"\t{self.log10_backoffs[ngram]:.{_DIGITS}f}"
                rows.append(row)
        return "\n".join([*rows, "", "\\end\\", ""])

    @classmethod
    def from_arpa(cls, text: str) -> "LanguageModel":
        """Raises ValueError, naming the line, for text that is not ARPA; for a model that ends no sentence, and for one
        that does not sum to 1. Never is -99, or -inf as some tools write it.
        """
        probabilities: dict[Ngram, float] = {}
        backoffs: dict[Ngram, float] = {}
        for number, order, fields in _arpa_rows(text):
            try:
                ngram, probability = tuple(fields[1 : 1 + order]), _read_log10(fields[0])
                backoff = _read_log10(fields[1 + order]) if len(fields) > 1 + order else None
            except ValueError:
                ngram, backoff = (), None
            if len(ngram) != order or len(fields) > 2 + order:
                what = f"PROBABILITY, {order} words and at most one BACKOFF"
                raise ValueError(f"language model, line {number}: got {' '.join(fields)!r}, need {what}")
            probabilities[ngram] = probability
            if backoff is not None:
                backoffs[ngram] = backoff
        if not any(len(ngram) == 1 for ngram in probabilities):
            raise ValueError("the language model has no \\1-grams: section: is this an ARPA file?")
        if (END,) not in probabilities:
            raise ValueError(f"the language model has no {END} in its \\1-grams: it could end no sentence")
        return cls(probabilities, backoffs).check()

    @classmethod
    def read(cls, path: Path | str, vocabulary: Iterable[str] = ()) -> "LanguageModel":
        """By its name: *.arpa and *.arpa.gz in ARPA format; words.txt a list of words, any of which may follow any
        other, all equally likely; else text, a sentence a line, from which a bigram is estimated over its words
        and the vocabulary. Raises ValueError naming the file.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
            if path.name.endswith((".arpa", ".arpa.gz")):
                return cls.from_arpa(text)
            if path.name == "words.txt":
                return word_loop(line.split()[0] for line in split_lines(text) if line.strip())
            return estimate_bigram(split_lines(text), vocabulary)
        except FileNotFoundError:
            raise ValueError(f"no language model at {path}: set data.language_model") from None
        except (ValueError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: {error}") from None


def _arpa_rows(text: str) -> Iterator[tuple[int, int, list[str]]]:
    """(line number, order, fields) of every n-gram. Raises ValueError naming the line for a section without order."""
    order = 0
    for number, line in enumerate(split_lines(text), 1):
        line = line.strip()
        if line == "\\end\\":
            return
        if line.startswith("\\") and line.endswith("-grams:"):
            section = re.fullmatch(r"\\([1-9][0-9]*)-grams:", line)
            if section is None:
                raise ValueError(
                    f"language model, line {number}: got {line!r}, need \\1-grams: or a higher order"
                )
            order = int(section[1])
        elif line and order:
            yield number, order, line.split()
    raise ValueError("the language model ends without \\end\\: it is cut short, or not an ARPA file")


def estimate_bigram(sentences: Iterable[str], vocabulary: Iterable[str] = ()) -> LanguageModel:
    """A bigram over the words of the sentences and of the vocabulary; without sentences, all are as likely.

    The unknown word, which a lexicon may have, gets a share only where the sentences have it.
    Raises ValueError for no words at all, and for the markers of a sentence's ends inside of a sentence.
    """
    bigrams: Counter[tuple[str, str]] = Counter()
    for sentence in sentences:
        words = sentence.split()
        if BEGIN in words or END in words:
            raise ValueError(f"got {sentence!r}: {BEGIN} and {END} are added here, leave them out")
        if words:
            bigrams.update(zip([BEGIN, *words], [*words, END]))
    known = sorted(
        {*(set(vocabulary) - UNKNOWN), *(word for pair in bigrams for word in pair)} - {BEGIN, END}
    )
    if not known:
        raise ValueError("no words to estimate a language model from: sentences or a vocabulary are needed")
    unigrams = _unigrams([*known, END], Counter(word for _, word in bigrams))
    probabilities: dict[Ngram, float] = {(word,): _log10(p) for word, p in unigrams.items()}
    probabilities[BEGIN,] = _NEVER
    totals: Counter[str] = Counter()
    for (history, _), count in bigrams.items():
        totals[history] += count
    follow = Counter(history for history, _ in bigrams)
    discount = _discount(bigrams.values())
    backoffs = {history: discount * follow[history] / totals[history] for history in totals}
    for (history, word), count in bigrams.items():
        share = (count - discount) / totals[history] + backoffs[history] * unigrams[word]
        probabilities[history, word] = _log10(share)
    return LanguageModel(probabilities, {(history,): _log10(b) for history, b in backoffs.items()})


def word_loop(words: Iterable[str]) -> LanguageModel:
    """Any word may follow any other, and end the sentence, all equally likely. Kaldi's symbols are left out."""
    return estimate_bigram([], set(words) - _NO_WORDS)


def _read_log10(text: str) -> float:
    """Raises ValueError for what is no number, NaN and infinity among it."""
    value = float(text)
    if not value < math.inf:
        raise ValueError
    return max(value, _NEVER)


def _log10(value: float) -> float:
    return round(math.log10(value), _DIGITS)


def _unigrams(words: Sequence[str], counts: Counter[str]) -> dict[str, float]:
    total = sum(counts.values())
    if not total:
        return dict.fromkeys(words, 1 / len(words))
    discount = _discount(counts.values())
    rest = discount * len(counts) / total / len(words)
    return {word: max(counts[word] - discount, 0) / total + rest for word in words}


def _discount(counts: Iterable[int]) -> float:
    """n1 / (n1 + 2 n2), n counting what was seen once and twice (Ney, Essen & Kneser 1994).

    Kept between 0.1 and 0.9: a small made-up grammar may have nothing that was seen once, or nothing else.
    """
    often = Counter(counts)
    once, twice = often[1], often[2]
    return min(max(once / (once + 2 * twice) if once else 0.0, 0.1), 0.9)
