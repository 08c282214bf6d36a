import kaldi_hmm_gmm as khg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.tying.event_map import PDF_CLASS, Constant, ContextDependency, Split, Table, find_answer

PHONES, WIDTH = 6, 3
KEYS = st.sampled_from([PDF_CLASS, 0, 1, 2])
LEAVES = st.builds(Constant, st.integers(0, 40))


def larger(maps):
    tables = st.builds(Table, KEYS, st.lists(st.none() | maps, max_size=PHONES + 1).map(tuple))
    members = st.sets(st.integers(0, PHONES)).map(lambda values: tuple(sorted(values)))
    return tables | st.builds(Split, KEYS, members, maps, maps)


TREES = st.builds(ContextDependency, st.just(WIDTH), st.just(1), st.recursive(LEAVES, larger, max_leaves=25))
# As copy-tree of Kaldi writes a small tree of a model with three states, one phone of two.
THREE_STATES = (
    "ContextDependency 3 1 ToPdf TE 1 4 ( NULL TE -1 3 ( CE 0 CE 1 CE 2 ) \n"
    "TE -1 3 ( SE 0 [ 0 1 3 ]\n{ CE 3 CE 4 } \nCE 5 SE 2 [ 1 ]\n{ CE 6 SE 0 [ 2 3 ]\n{ CE 7 CE 8 } \n} \n) \n"
    "SE -1 [ 0 ]\n{ CE 9 CE 10 } \n) \nEndContextDependency "
)


def kaldis(tree):
    """Kaldi's own object, from our binary."""
    read = khg.ContextDependency.__new__(khg.ContextDependency)
    read.__setstate__(([byte - 256 if byte > 127 else byte for byte in tree.binary(header=False)],))
    return read


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_any_tree_survives_text_and_binary(tree):
    for contents in (tree.text().encode(), tree.binary()):
        read = ContextDependency.parse(contents, "tree")
        assert read == tree
        assert read.text() == tree.text()
        assert read.binary() == tree.binary()


@settings(max_examples=60, deadline=None)
@given(TREES, st.lists(st.tuples(*[st.integers(0, PHONES)] * 3, st.integers(0, 2)), max_size=20))
def test_kaldi_reads_our_binary_writes_the_same_text_and_gives_the_same_pdfs(tree, events):
    theirs = kaldis(tree)
    assert str(theirs) == tree.text()
    assert theirs.num_pdfs == tree.num_pdfs
    for *phones, pdf_class in events:
        ours = tree.pdf(tuple(phones), pdf_class)
        assert theirs.compute(phones, pdf_class)[0] == (ours is not None)
        assert ours is None or theirs.compute(phones, pdf_class)[1] == ours


def test_a_file_that_kaldi_wrote_is_read_and_written_again_byte_for_byte(tmp_path):
    theirs = khg.monophone_context_dependency([1, 2, 3], [-1, 3, 3, 5])
    for binary in (True, False):
        theirs.write(binary=binary, filename=str(tmp_path / "tree"))
        contents = (tmp_path / "tree").read_bytes()
        read = ContextDependency.read(tmp_path / "tree")
        assert contents.startswith(b"\0B") == binary
        assert (read.binary() if binary else read.text().encode()) == contents
        assert read.pdf((2,), 1) == theirs.compute([2], 1)[1] == 4


def test_a_tree_of_three_states_in_text_is_read_exactly():
    tree = ContextDependency.parse(THREE_STATES.encode(), "tree")
    assert tree.text() == THREE_STATES
    assert tree.num_pdfs == 11
    assert [tree.pdf((1, 2, 3), state) for state in (0, 1, 2, 3)] == [3, 5, 8, None]
    assert tree.pdf((0, 3, 0), 0) == 9
    assert tree.pdf((0, 0, 0), 0) is None


def test_an_old_tree_that_tells_the_number_of_states_is_read():
    old = THREE_STATES.replace("ToPdf", "ToLength TE 1 2 ( NULL CE 3 ) \nToPdf")
    assert ContextDependency.parse(old.encode(), "tree").text() == THREE_STATES


def test_white_space_does_not_matter_in_text():
    loose = "\n ".join(THREE_STATES.split()) + "\n"
    assert ContextDependency.parse(loose.encode(), "tree").text() == THREE_STATES


def test_a_tree_of_any_depth_is_read_and_written():
    generator = np.random.default_rng(0)
    place = Constant(0)
    for depth in range(1, 5000):
        place = Split(int(generator.integers(0, 3)), (int(generator.integers(0, 9)),), place, Constant(depth))
    tree = ContextDependency(3, 1, place)
    for contents in (tree.text().encode(), tree.binary()):
        read = ContextDependency.parse(contents, "tree")
        assert read.text() == tree.text()
    assert tree.num_pdfs == 5000


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        (b"", "ContextDependency is needed|a word is needed"),
        (b"<TransitionModel> ", "ContextDependency is needed, got '<TransitionModel>'"),
        (THREE_STATES[:-30].encode(), "end of the file"),
        (THREE_STATES.replace("CE 5", "CE five").encode(), "whole number is needed, got 'five'"),
        (THREE_STATES.replace("[ 1 ]", "[ 1.5 ]").encode(), "list of whole numbers"),
        (THREE_STATES.replace("[ 1 ]", "[ 1 ").encode(), "list of whole numbers"),
        (THREE_STATES.replace("CE 9", "NULL").encode(), "an answer to yes and no"),
        (THREE_STATES.replace("SE -1", "XE -1").encode(), "CE, TE, SE or NULL is needed, got 'XE'"),
        (THREE_STATES.replace("TE 1 4", "TE 1 -4").encode(), "size of a table"),
        (THREE_STATES.replace("ToPdf", "ToPhone").encode(), "ToPdf is needed"),
        (b"ContextDependency 3 1 ToPdf NULL EndContextDependency ", "has no pdfs"),
        (b"\0BContextDependency \x08" + bytes(8), "whole number of 4 bytes"),
        (ContextDependency(3, 1, Constant(1)).binary()[:-30], "needed"),
        (ContextDependency(3, 1, Split(0, (1, 2), Constant(0), Constant(1))).binary()[:51], "bytes more"),
    ],
)  # fmt: skip
def test_what_is_no_tree_is_refused_naming_file_and_place(contents, what):
    with pytest.raises(ValueError, match=what) as raised:
        ContextDependency.parse(contents, "some/tree")
    assert str(raised.value).startswith("some/tree")


def test_a_tree_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no decision tree at .*tree"):
        ContextDependency.read(tmp_path / "tree")


def test_a_value_beyond_a_table_has_no_answer():
    assert find_answer(Table(0, (None, Constant(3))), {0: 1}) == 3
    assert find_answer(Table(0, (None, Constant(3))), {0: 2}) is None
    assert find_answer(None, {}) is None
