"""The files are what sclite wants; where it is installed, it counts the errors that we count."""

import random
import re
import shutil
import subprocess

import pytest

from teacherstudent.decoding.decode import TimedWord
from teacherstudent.decoding.error_tables import Utterance
from teacherstudent.decoding.sclite import to_ctm, to_stm, to_trn, write_hypotheses, write_references
from teacherstudent.decoding.scoring import count_errors

TEST = [
    Utterance("b-2", ("play", "it"), "ann_1", 1.52),
    Utterance("a_1", ("stop",), "bo", 0.5),
    Utterance("c", (), "bo", 1.0),
]
TIMED = {
    "b-2": (TimedWord("play", 0.3, 0.6, 0.75), TimedWord("it", 0.9, 1.53, 1.0)),
    "a_1": (),
    "c": (TimedWord("oh", 0.0, 0.03),),
}


def test_the_three_formats_are_as_documented():
    assert to_trn(TEST, [each.words for each in TEST]) == "play it (ann.1-b-2)\nstop (bo-a_1)\n(bo-c)\n"
    assert to_stm(TEST) == "a_1 1 bo 0.000 0.500 stop\nb-2 1 ann.1 0.000 1.520 play it\nc 1 bo 0.000 1.000\n"
    assert to_ctm(TEST, TIMED) == (
        ";; a_1 has no words\n"
        "b-2 1 0.300 0.300 play 0.7500\nb-2 1 0.900 0.620 it 1.0000\n"  # the last frame ends with the audio
        "c 1 0.000 0.030 oh\n"
    )


def test_words_that_sclite_reads_as_marks_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"2 reference words hold characters .*: \(uh\), <noise>"):
        write_references(tmp_path, [Utterance("u", ("(uh)", "yes", "<noise>"), "s", 1.0)])


def test_words_that_were_recognised_are_looked_at_too(tmp_path):
    with pytest.warns(UserWarning, match=r"1 words recognised by x hold characters .*: <noise>"):
        write_hypotheses(
            tmp_path, "x", TEST[:1], {"b-2": [TimedWord(w, 0.0, 0.1) for w in ("<noise>", "it")]}
        )


def make_test(seed):
    """Random references and hypotheses; every word of a hypothesis lasts 0.1 s."""
    draw = random.Random(seed)
    test, timed = [], {}
    for number in range(40):
        words = tuple(draw.choice("abcDd") for _ in range(draw.randint(1, 8)))
        said = [word for word in words if draw.random() < 0.8]
        for _ in range(draw.randint(0, 2)):
            said.insert(draw.randint(0, len(said)), draw.choice("abcDd"))
        name = f"u-{number:02d}"
        test.append(Utterance(name, words, f"sp_{number % 3}", 2.0))
        timed[name] = tuple(TimedWord(word, n / 10, (n + 1) / 10, 0.5) for n, word in enumerate(said))
    return test, timed


@pytest.mark.system
@pytest.mark.parametrize("kind", ["trn", "ctm"])
def test_sclite_counts_the_errors_that_we_count(tmp_path, kind):
    if shutil.which("sctk") is None:
        pytest.skip("sclite is not installed: apt-get install sctk")
    test, timed = make_test(1)
    write_references(tmp_path, test)
    write_hypotheses(tmp_path, "x", test, timed)
    reference = ["-i", "spu_id", "-r", "ref.trn", "trn"] if kind == "trn" else ["-r", "ref.stm", "stm"]
    command = ["sctk", "sclite", "-s", *reference, "-h", f"x.{kind}", kind, "-o", "dtl", "stdout"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {
        name: int(re.search(rf"Percent {name} .*\(\s*(\d+)\)", done.stdout)[1])
        for name in ("Total Error", "Substitution", "Deletions", "Insertions")
    }
    ours = count_errors([each.words for each in test], [[w.word for w in timed[each.id]] for each in test])
    words, substitutions, insertions, deletions = ours.sum(axis=0).tolist()
    assert counts["Total Error"] == substitutions + insertions + deletions
    assert counts["Deletions"] - counts["Insertions"] == deletions - insertions
    assert int(re.search(r"Ref\. words\s+=\s+\(\s*(\d+)\)", done.stdout)[1]) == words
