import kaldifst
import numpy as np
import pytest

from teacherstudent.decoding.openfst import Arcs, make_acceptor

ROWS = [(2, 5, 0, 0.5, 1), (0, 1, 7, 1.5, 2), (0, 2, 8, -0.25, 1), (1, 3, 9, 0.0, 2)]


def listed(fst):
    """(source, input, output, cost, target) of every arc, one after the other through the wheel."""
    return [
        (state, arc.ilabel, arc.olabel, arc.weight.value, arc.nextstate)
        for state in kaldifst.StateIterator(fst)
        for arc in kaldifst.ArcIterator(fst, state)
    ]


def test_the_wheel_reads_what_we_write_and_we_what_it_writes():
    arcs = make_acceptor(0, [np.inf, 2.5, 0.0], ROWS)
    fst = arcs.load()
    assert fst.start == 0
    assert listed(fst) == sorted(ROWS, key=lambda row: row[0])
    assert [fst.final(state).value for state in range(3)] == [np.inf, 2.5, 0.0]
    again = Arcs.of(fst)
    for name in ("start", "final", "source", "target", "inputs", "outputs", "weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(arcs, name))


def test_lattice_weights_survive():
    lattice = kaldifst.Lattice()
    first, second, third = (lattice.add_state() for _ in range(3))
    lattice.start = first
    lattice.add_arc(first, kaldifst.LatticeArc(4, 5, kaldifst.LatticeWeight(0.5, -1.25), second))
    lattice.add_arc(first, kaldifst.LatticeArc(0, 6, kaldifst.LatticeWeight(2.0, 3.0), third))
    lattice.set_final(third, kaldifst.LatticeWeight(1.0, 0.5))
    arcs = Arcs.of(lattice)
    assert arcs.weights.tolist() == [[0.5, -1.25], [2.0, 3.0]]
    assert arcs.final[third].tolist() == [1.0, 0.5]
    assert np.isinf(arcs.final[:third]).all()
    assert (arcs.inputs.tolist(), arcs.outputs.tolist(), arcs.target.tolist()) == ([4, 0], [5, 6], [1, 2])
    assert arcs.load().to_str(show_weight_one=True) == lattice.to_str(show_weight_one=True)


def test_states_without_arcs_and_an_automaton_of_one_state_survive():
    arcs = make_acceptor(0, [0.0, np.inf], [])
    assert Arcs.of(arcs.load()).num_states == 2
    assert listed(arcs.load()) == []


def test_another_kind_of_automaton_is_refused():
    data = make_acceptor(0, [0.0], ROWS[:0]).to_bytes()
    with pytest.raises(ValueError, match="type 'vectox'"):
        Arcs.from_bytes(data.replace(b"vector", b"vectox"))
