"""An inventory goes to Kaldi and comes back; Kaldi's own trees come as they are."""

import itertools
from pathlib import Path

import kaldi_hmm_gmm as khg
import numpy as np
import pytest

from teacherstudent.config import Senones
from teacherstudent.tying.event_map import PDF_CLASS, Constant, ContextDependency, Split, Table
from teacherstudent.tying.events import Statistics
from teacherstudent.tying.kaldi_inventory import inventory_of, read_kaldi_inventory, read_phone_table
from teacherstudent.tying.kaldi_topology import Topology
from teacherstudent.tying.kaldi_tree import export_kaldi, kaldi_tree_bytes, to_kaldi, topology_text
from teacherstudent.tying.senones import build

PHONES = (
    "SIL",
    *(f"{base}{mark}_{place}" for base in ("AE", "IY") for mark in "01" for place in "BE"),
    "M_B",
    "M_E",
    "T",
)
THREE_STATES = "".join(
    f"<State> {s} <PdfClass> {s} <Transition> {s} 0.5 <Transition> {s + 1} 0.5 </State>\n" for s in range(3)
) + "<State> 3 </State>\n"  # fmt: skip


def grown(shared_roots):
    generator = np.random.default_rng(4)
    means = generator.normal(size=(3, len(PHONES) + 1, 2, 3)) * 2
    statistics = Statistics(len(PHONES), 3)
    for _ in range(200):
        phones = generator.integers(1, len(PHONES) + 1, 20)
        padded = np.pad(phones, 1)
        values = means[0, padded[:-2]] + means[1, phones] + means[2, padded[2:]]
        values = values.reshape(-1, 3)
        statistics.accumulate(
            values + generator.normal(size=values.shape), np.repeat(phones, 2), np.tile([True, False], 20)
        )
    return build(
        statistics, PHONES, Senones(target=90, min_count=10, min_gain=5.0, shared_roots=shared_roots)
    )


@pytest.fixture(scope="module", params=["base", "phone"])
def inventory(request):
    return grown(request.param)


def every_triphone(num_phones):
    contexts, centres = range(num_phones + 1), range(1, num_phones + 1)
    return np.array(list(itertools.product(contexts, centres, contexts, (0, 1))))


def write_folder(folder, tree, topology, table):
    folder.mkdir(exist_ok=True)
    (folder / "tree").write_bytes(tree.binary())
    (folder / "topo").write_text(topology)
    (folder / "phones.txt").write_text("".join(f"{name} {phone}\n" for name, phone in table.items()))
    return folder


def test_what_was_exported_and_read_again_is_the_same_inventory(inventory, tmp_path):
    paths = export_kaldi(inventory, tmp_path / "kaldi")
    assert sorted(path.name for path in paths) == ["phones.txt", "topo", "tree"]
    read = read_kaldi_inventory(tmp_path / "kaldi")
    events = every_triphone(len(PHONES))
    np.testing.assert_array_equal(read.senones(events), inventory.senones(events))
    assert read.phones == inventory.phones
    assert read.num_senones == inventory.num_senones
    assert len(read.nodes) == len(inventory.nodes)
    assert sorted(read.provenance["kaldi"]) == ["phones.txt", "topo", "tree"]
    export_kaldi(read, tmp_path / "again")
    assert (tmp_path / "again" / "tree").read_text() == (tmp_path / "kaldi" / "tree").read_text()


def test_phones_that_share_a_root_have_their_tree_written_once(inventory):
    text = to_kaldi(inventory).text()
    shared = len(set(inventory.roots)) < len(inventory.roots)
    assert text.startswith(
        "ContextDependency 3 1 ToPdf SE 1 [" if shared else "ContextDependency 3 1 ToPdf TE 1"
    )
    assert text.count("CE ") == len(inventory.nodes) + 2 * len(set(inventory.roots))


def test_kaldi_takes_what_was_exported_and_reads_it_as_we_do(inventory, tmp_path):
    export_kaldi(inventory, tmp_path)
    topology = khg.HmmTopology()
    topology.read((tmp_path / "topo").read_text())
    topology.check()
    tree = khg.ContextDependency.__new__(khg.ContextDependency)
    tree.__setstate__(([byte - 256 if byte > 127 else byte for byte in kaldi_tree_bytes(inventory)],))
    assert str(tree) == (tmp_path / "tree").read_text()
    for *phones, state in every_triphone(len(PHONES))[::7].tolist():
        assert tree.compute(phones, state) == (True, inventory.senone(*phones, state))
    assert khg.TransitionModel(tree, topology).num_pdfs == inventory.num_senones


# -- trees that Kaldi made -----------------------------------------------------------------------------------------

# Kaldi's ids: SIL is not the first, one number is free, disambiguation symbols come last.
TABLE = {"<eps>": 0, "A": 1, "SIL": 3, "B": 4, "C": 5, "#0": 6, "#1": 7}
OUR_ID = {0: 0, 3: 1, 1: 2, 4: 3, 5: 4}
LEFT_BIPHONE = ContextDependency(
    2,
    1,
    Split(
        1,
        (1, 3, 6),
        Table(1, (None, Table(PDF_CLASS, (Split(0, (0, 3, 4, 7), Constant(0), Constant(1)), Constant(2))), None,
                  Table(PDF_CLASS, (Constant(3), Constant(3))))),
        # B and C share a root; its table asks about the left neighbour, which no phone of number 2 is
        Table(PDF_CLASS, (
            Table(0, (Constant(4), Constant(4), None, Constant(5), Split(1, (4,), Constant(6), Constant(7)),
                      Constant(6))),
            Split(1, (5, 6), Constant(8), Split(0, (1, 2, 3, 4, 5, 0), Constant(4), Constant(11))),
        )),
    ),
)  # fmt: skip


def chain_topology(phones):
    return topology_text(9).replace(" 1 2 3 4 5 6 7 8 9 ", f" {' '.join(map(str, phones))} ")


@pytest.fixture
def chain(tmp_path):
    return write_folder(tmp_path / "chain", LEFT_BIPHONE, chain_topology([1, 3, 4, 5]), TABLE)


def test_a_chain_models_left_biphone_tree_maps_every_triphone_as_kaldi_does(chain):
    inventory = read_kaldi_inventory(chain)
    assert inventory.phones == ("SIL", "A", "B", "C")
    assert inventory.num_senones == LEFT_BIPHONE.num_pdfs == 12
    for left, centre, right in itertools.product((0, 1, 3, 4, 5), (1, 3, 4, 5), (0, 1, 3, 4, 5)):
        for state in (0, 1):
            ours = inventory.senone(OUR_ID[left], OUR_ID[centre], OUR_ID[right], state)
            assert ours == LEFT_BIPHONE.pdf((left, centre), state), (left, centre, right, state)
    assert inventory.roots[2] == inventory.roots[3]  # B's and C's, shared
    assert inventory.priors.sum() == pytest.approx(1)


def test_a_random_tree_of_three_phones_maps_every_triphone_as_kaldi_does():
    generator = np.random.default_rng(1)
    phones = [1, 3, 4, 5]

    def draw(depth, keys):
        if depth == 0 or generator.random() < 0.1:
            return Constant(int(generator.integers(0, 30)))
        key = int(generator.choice(keys))
        if generator.random() < 0.3:
            return Table(key, tuple(draw(depth - 1, keys) for _ in range(2 if key == PDF_CLASS else 6)))
        return Split(key, tuple(np.flatnonzero(generator.random(6) < 0.5).tolist()), draw(depth - 1, keys),
                     draw(depth - 1, keys))  # fmt: skip

    for _ in range(20):
        tree = ContextDependency(3, 1, Split(1, (3,), Constant(0), draw(6, [PDF_CLASS, 0, 1, 2])))
        inventory = inventory_of(tree, {"SIL": 3, "A": 1, "B": 4, "C": 5}, "tree")
        for left, centre, right in itertools.product([0, *phones], phones, [0, *phones]):
            for state in (0, 1):
                ours = inventory.senone(OUR_ID[left], OUR_ID[centre], OUR_ID[right], state)
                assert ours == tree.pdf((left, centre, right), state)


def test_what_no_triphone_can_reach_is_left_out():
    """1 and 9 are asked about twice, 2 is no phone."""
    rest = Table(2, (Constant(2), None, None, Constant(2), Constant(3), Constant(3)))
    tree = Split(1, (3,), Constant(4), Split(2, (1, 9), Constant(0), Split(2, (1,), Constant(1), rest)))
    inventory = inventory_of(ContextDependency(3, 1, tree), {"SIL": 3, "A": 1, "B": 4, "C": 5}, "tree")
    assert inventory.nodes == ((2, 0, ~0, 1), (2, 1, ~2, ~3))
    assert inventory.questions == ((2,), (0, 1))
    assert inventory.num_senones == 5


def test_a_monophone_tree_and_a_text_tree_are_read(tmp_path):
    tree = ContextDependency(
        1, 0, Table(0, (None, *(Table(PDF_CLASS, (Constant(i), Constant(i + 1))) for i in (0, 2))))
    )
    folder = write_folder(tmp_path / "mono", tree, chain_topology([1, 2]), {"<eps>": 0, "SIL": 1, "A": 2})
    (folder / "tree").write_text(tree.text())
    inventory = read_kaldi_inventory(folder)
    assert [inventory.senone(0, phone, 1, state) for phone in (1, 2) for state in (0, 1)] == [0, 1, 2, 3]


def test_without_topo_the_topology_of_the_model_is_taken(chain):
    (chain / "final.mdl").write_text(
        "<TransitionModel> " + (chain / "topo").read_text() + "<Triples> 0 </Triples>"
    )
    (chain / "topo").unlink()
    assert read_kaldi_inventory(chain).num_senones == 12
    (chain / "final.mdl").unlink()
    with pytest.raises(ValueError, match=r"final.mdl is missing"):
        read_kaldi_inventory(chain)


def test_a_topology_of_three_states_is_refused_with_the_way_out(chain):
    text = chain_topology([1, 3])
    entry = f"<TopologyEntry>\n<ForPhones> 4 5 </ForPhones>\n{THREE_STATES}</TopologyEntry>\n</Topology>"
    (chain / "topo").write_text(text.replace("</Topology>", entry))
    assert len(Topology.read(chain / "topo").entries) == 2
    with pytest.raises(ValueError, match=r"'B' goes through 3 states.* 90 ms .*kaldi_tree empty.*grown anew"):
        read_kaldi_inventory(chain)


def change(old, new):
    return lambda text: text.replace(old, new)


@pytest.mark.parametrize(
    ("name", "edit", "what"),
    [
        ("phones.txt", change("SIL", "sil"), "has no phone SIL"),
        ("phones.txt", change("B 4", "B 3"), "number of its own"),
        ("phones.txt", change("B 4", "B four"), "line 4: `name number`"),
        ("phones.txt", change("B 4", "B 4\nD 9"), "topo has no states for phone 'D'"),
        ("topo", change(" 4 5 ", " 4 "), "no states for phone 'C'"),
        (
            "topo",
            change("<SelfLoopPdfClass> 1", "<SelfLoopPdfClass> 0"),
            "'SIL' goes through 1 states.* Needed is",
        ),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused_naming_the_file(chain, name, edit, what):
    (chain / name).write_text(edit((chain / name).read_text()))
    with pytest.raises(ValueError, match=what) as raised:
        read_kaldi_inventory(chain)
    assert str(chain) in str(raised.value)


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        (ContextDependency(5, 2, Constant(0)), "looks at 5 phones"),
        (ContextDependency(3, 0, Constant(0)), "looks at 3 phones around number 0"),
        (
            ContextDependency(3, 1, Table(1, (None, Constant(0), None, Constant(1)))),
            "no pdf for a triphone of 'B'",
        ),
        (ContextDependency(3, 1, Table(0, (Constant(0), None))), "no pdf for a triphone of 'A'"),
        (ContextDependency(3, 1, Split(0, (1,), Constant(0), Constant(1))), "neighbours of SIL"),
        (ContextDependency(3, 1, Split(4, (1,), Constant(0), Constant(1))), "asks about key 4"),
    ],
)
def test_a_tree_that_cannot_be_taken_is_refused_with_the_reason(chain, tree, what):
    (chain / "tree").write_bytes(tree.binary())
    with pytest.raises(ValueError, match=what):
        read_kaldi_inventory(chain)


def test_a_phone_table_leaves_out_what_is_no_phone(chain: Path):
    assert read_phone_table(chain / "phones.txt") == {"SIL": 3, "A": 1, "B": 4, "C": 5}
