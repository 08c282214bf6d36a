import struct

import kaldi_hmm_gmm as khg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.tying.kaldi_io import KaldiWriter
from teacherstudent.tying.kaldi_topology import HmmState, Topology, first_and_later_frames, shortest_duration
from teacherstudent.tying.kaldi_tree import topology_text

CHAIN = (
    "<State> 0 <ForwardPdfClass> 0 <SelfLoopPdfClass> 1 <Transition> 0 0.5 <Transition> 1 0.5 </State>\n"
    "<State> 1 </State>\n"
)
OLD_CHAIN = (
    "<State> 0 <PdfClass> 0 <Transition> 1 0.5 <Transition> 2 0.5 </State>\n"
    "<State> 1 <PdfClass> 1 <Transition> 1 0.75 <Transition> 2 0.25 </State>\n<State> 2 </State>\n"
)
BAKIS = "".join(
    f"<State> {s} <PdfClass> {s} <Transition> {s} 0.75 <Transition> {s + 1} 0.25 </State>\n" for s in range(3)
) + "<State> 3 </State>\n"  # fmt: skip


def topology(*entries):
    """(phones, states) as Kaldi's scripts lay them out."""
    text = "".join(
        f"<TopologyEntry>\n<ForPhones>\n{phones}\n</ForPhones>\n{states}</TopologyEntry>\n"
        for phones, states in entries
    )
    return f"<Topology>\n{text}</Topology>\n"


def parse(text):
    return Topology.parse(text.encode(), "topo")


def kaldis(text):
    read = khg.HmmTopology()
    read.read(text)
    read.check()
    return read


@pytest.mark.parametrize(
    "text",
    [topology(("1 2", CHAIN)), topology(("1 4", BAKIS), ("2 3", OLD_CHAIN)), topology(("1", BAKIS), ("2 3", CHAIN)),
     topology_text(4)],
)  # fmt: skip
def test_kaldi_reads_a_topology_as_we_do_and_writes_it_the_same(text):
    ours, theirs = parse(text), kaldis(text)
    assert ours.text() == str(theirs)
    assert parse(ours.text()) == ours
    for phone in theirs.phones:
        states = ours.states(phone)
        assert shortest_duration(states) == theirs.min_length(phone)
        highest = max(max(state.forward_class, state.loop_class) for state in states)
        assert highest + 1 == theirs.num_pdf_classes(phone)
    assert ours.states(99) is None


STATES = st.integers(1, 4).flatmap(
    lambda size: st.tuples(
        *(
            st.builds(
                HmmState,
                st.integers(0, 3),
                st.integers(0, 3),
                st.sets(st.integers(0, size)).map(
                    lambda following, number=number: tuple(
                        (s, 0.25) for s in sorted({*following, number + 1})
                    )
                ),
            )
            for number in range(size)
        ),
        st.just(HmmState()),
    )
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STATES, min_size=1, max_size=3))
def test_any_topology_survives_a_round_trip_through_text(several):
    ours = Topology(tuple(((2 * index + 1, 2 * index + 2), states) for index, states in enumerate(several)))
    assert parse(ours.text()) == ours
    assert parse(" ".join(ours.text().split())) == ours


def test_the_topology_of_a_binary_model_is_read():
    """The bytes that Kaldi's hmm/hmm-topology.cc writes, in a model."""
    number = lambda value: b"\x04" + struct.pack("<i", value)  # noqa: E731
    share = lambda value: b"\x04" + struct.pack("<f", value)  # noqa: E731
    vector = lambda *values: b"\x04" + struct.pack(f"<{len(values) + 1}i", len(values), *values)  # noqa: E731
    head = b"\0B<TransitionModel> <Topology> " + vector(1, 2) + vector(-1, 0, 0)
    last = number(-1) + number(-1) + number(0)
    one_state = number(0) + number(1) + number(2) + number(0) + share(0.5) + number(1) + share(0.5)
    chain = head + number(-1) + number(1) + number(2) + one_state + last + b"</Topology> <Tuples> "
    assert Topology.parse(chain, "final.mdl") == parse(topology(("1 2", CHAIN)))
    states = b"".join(
        number(s) + number(2) + number(s) + share(0.75) + number(s + 1) + share(0.25) for s in range(3)
    )
    bakis = head + number(1) + number(4) + states + number(-1) + number(0) + b"</Topology> <Triples> "
    assert Topology.parse(bakis, "final.mdl") == parse(topology(("1 2", BAKIS)))


def binary_topology():
    """Phones 1 and 2 of one state each, as Kaldi writes them."""
    writer = KaldiWriter(binary=True)
    writer.token("<Topology>")
    writer.integers((1, 2))
    writer.integers((-1, 0, 0))
    for value in (1, 2, 0, 2, 0):
        writer.integer(value)
    writer.number(0.5)
    writer.integer(1)
    writer.number(0.5)
    for value in (-1, 0):
        writer.integer(value)
    writer.token("</Topology>")
    return b"\0B" + writer.contents()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_binary_topology_is_read_or_refused_by_name_and_nothing_else(data):
    contents = bytearray(binary_topology())
    assert Topology.parse(bytes(contents), "topo").states(2) is not None
    place = data.draw(st.integers(2, len(contents) - 1))
    contents[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(2, len(contents)))
    try:
        Topology.parse(bytes(contents[:end]), "topo")
    except ValueError as error:
        assert str(error).startswith("topo")


def test_a_phone_beyond_the_entries_is_refused():
    contents = binary_topology().replace(struct.pack("<ii", 1, 2), struct.pack("<ii", 1, 9))
    with pytest.raises(
        ValueError, match=r"topo, near byte .*phones from 1 to 2, each with an entry is needed, got '9'"
    ):
        Topology.parse(contents, "topo")


@pytest.mark.parametrize(
    ("states", "expected", "frames"), [(CHAIN, True, 1), (OLD_CHAIN, True, 1), (BAKIS, False, 3)]
)
def test_both_chain_topologies_have_one_class_for_the_first_frame_and_one_for_later_ones(
    states, expected, frames
):
    found = parse(topology(("1", states))).states(1)
    assert first_and_later_frames(found) == expected
    assert shortest_duration(found) == frames


@pytest.mark.parametrize(
    "change",
    [
        ("<SelfLoopPdfClass> 1", "<SelfLoopPdfClass> 0"),  # all frames alike
        ("<SelfLoopPdfClass> 1", "<SelfLoopPdfClass> 2"),
        ("<Transition> 0 0.5 <Transition> 1 0.5", "<Transition> 1 1.0"),  # one frame and no more
    ],
)
def test_other_topologies_are_told_from_those(change):
    assert not first_and_later_frames(parse(topology(("1", CHAIN.replace(*change)))).states(1))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("ContextDependency", "<Topology>, or a model"),
        (topology(("1 x", CHAIN)), "phone's number"),
        (topology(("1", CHAIN.replace("<State> 1", "<State> 2"))), "state 1 is needed"),
        (
            topology(("1", CHAIN.replace("<PdfClass>", ""))).replace("<Transition>", "<Final>"),
            "<Transition> or",
        ),
        (topology(("1", CHAIN))[:-13], "end of the file"),
        (topology(("7 8", CHAIN.replace("<Transition> 1", "<Transition> 5"))), "phones 7 8 has 2 states"),
        (topology(("7 8", CHAIN.replace("<Transition> 1 0.5", ""))), "no way leads"),
    ],
)
def test_a_broken_topology_is_refused_naming_the_file(text, what):
    with pytest.raises(ValueError, match=what) as raised:
        parse(text)
    assert str(raised.value).startswith("topo")
