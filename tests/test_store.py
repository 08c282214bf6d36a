"""Laws of the target store: what the teacher said is what the student reads, or an error."""
# T frames, S senones, K kept

import multiprocessing
import os
import pickle
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent import store as store_module
from teacherstudent.data.packed import PackedWriter, hash_path, open_shards, shard_path
from teacherstudent.posteriors import TopK, top_k
from teacherstudent.store import TargetStore, TargetWriter
from teacherstudent.targets.codings import CODINGS, PLAIN

torch.set_num_threads(1)

PROVENANCE = {"teacher": "aa", "inventory": "bb", "features": "cc", "numeric_mode": "fp32"}
DOCUMENT = Path(__file__).parent.parent / "docs" / "store.md"


def make_logits(lengths, num_senones=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"u{i}": 3 * torch.randn(n, num_senones, generator=generator) for i, n in enumerate(lengths)}


BOTH = pytest.mark.parametrize("coding", CODINGS)


def write(folder, logits, number=0, k=20, provenance=PROVENANCE, coding="compact"):
    num_senones = next(iter(logits.values())).shape[1]
    with TargetWriter(shard_path(folder, "targets", number), num_senones, k, provenance, coding) as writer:
        for utterance_id, values in logits.items():
            writer.write(utterance_id, values)
    return folder


@BOTH
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 40), st.booleans(), st.data())
@settings(max_examples=20, deadline=None)
def test_the_store_gives_back_the_highest_posteriors_renormalised(
    tmp_path_factory, coding, lengths, num_senones, impossible, data
):
    k = data.draw(st.integers(1, num_senones))
    logits = make_logits(lengths, num_senones)
    if impossible:
        for values in logits.values():
            values[:, 1:][values[:, 1:] < 0] = -torch.inf
    store = TargetStore(write(tmp_path_factory.mktemp("store"), logits, k=k, coding=coding))
    in_order = list(store.iter_shard(0))
    assert [utterance_id for utterance_id, _, _ in in_order] == list(logits) == list(store.shard_ids(0))
    for (utterance_id, ids, log_posteriors), values in zip(in_order, logits.values(), strict=True):
        assert ids.dtype == np.int32 and log_posteriors.dtype == np.float32
        check_targets(ids, log_posteriors, values, store.header["coding"])
        dropped = 1 - torch.softmax(values.double(), 1).sort(dim=1, descending=True).values[:, :k].sum(dim=1)
        off = store.header["coding"]["worst_error"]["dropped"] + 1e-5
        np.testing.assert_allclose(store.dropped(utterance_id), dropped, atol=off)
        for again in (store[utterance_id], store.read(0, utterance_id)):
            np.testing.assert_array_equal(again[0], ids)
            np.testing.assert_array_equal(again[1], log_posteriors)


def check_targets(ids, log_posteriors, logits, coding):
    """Against a full sort in float64: the same senones, sorted by what is stored, the true values within the bound."""
    wide = torch.log_softmax(logits.double(), dim=1)
    needed = wide.sort(dim=1, descending=True, stable=True)
    k = ids.shape[1]
    np.testing.assert_array_equal(np.sort(ids, axis=1), needed.indices[:, :k].sort(dim=1).values)
    assert (log_posteriors[:, 1:] <= log_posteriors[:, :-1]).all()
    equal = log_posteriors[:, 1:] == log_posteriors[:, :-1]
    assert (ids[:, 1:] > ids[:, :-1])[equal].all()
    np.testing.assert_allclose(np.exp(log_posteriors).sum(axis=1), 1, atol=1e-5)
    true = torch.log_softmax(needed.values[:, :k], dim=1)
    stored = np.sort(log_posteriors.astype(np.float64), axis=1)[:, ::-1]  # rounding keeps the order
    finite = np.isfinite(true.numpy())
    assert (np.isfinite(stored) == finite).all()
    error = coding["worst_error"]
    far = np.abs(
        needed.values[:, :k].numpy()[finite]
    )  # renormalising adds the mean error, of values of some nats
    off = error.get("renormalised_nats") or error["relative_nats"] * (far + 8)
    assert (np.abs(stored[finite] - true.numpy()[finite]) <= off + 1e-5).all()


def test_plain_values_are_off_by_no_more_than_the_header_says(tmp_path):
    logits = {
        "u": torch.cat([make_logits([400], 300)["u0"] * scale for scale in (1e-3, 0.1, 1.0, 10.0, 300.0)])
    }
    store = TargetStore(write(tmp_path, logits, k=300, coding="plain"))
    bound = store.header["coding"]["worst_error"]
    stored = open_shards(tmp_path, "targets")[0]["u"]["log_posteriors"].astype(np.float64)
    true = top_k(logits["u"], 300).log_posteriors.double().numpy()
    error = np.abs(stored - true)
    assert (error <= np.maximum(bound["relative_nats"] * np.abs(true), bound["absolute_nats"])).all()
    off = np.abs(np.exp(stored) - np.exp(true)).max()
    assert bound["probability"] / 4 < off <= bound["probability"]  # a bound, and one that is not idle


def test_the_worst_error_of_a_probability_holds_for_every_float16_midpoint():
    values = np.arange(0x8000, 0xFC00, dtype="uint16").view("float16").astype(np.float64)  # -0 … -65504
    between = (values[1:] + values[:-1]) / 2
    off = np.abs(np.exp(between)[:, None] - np.exp(np.stack([values[1:], values[:-1]], axis=1))).max()
    assert 1.7e-4 < off <= PLAIN.facts["worst_error"]["probability"]


@BOTH
def test_impossible_senones_and_values_beyond_reach_have_posterior_zero(tmp_path, coding):
    logits = torch.tensor([[0.0, -1e6, -torch.inf, -1.0]])
    ids, log_posteriors = TargetStore(write(tmp_path, {"u": logits}, k=4, coding=coding))["u"]
    assert ids.tolist() == [[0, 3, 1, 2]]
    np.testing.assert_allclose(np.exp(log_posteriors), [[0.7311, 0.2689, 0, 0]], atol=2e-4)


@BOTH
def test_many_senones_get_wider_ids(tmp_path, coding):
    logits = torch.zeros(1, 70_000)
    logits[0, 69_999] = 5.0
    store = TargetStore(write(tmp_path, {"u": logits}, k=2, coding=coding))
    assert store["u"][0].tolist() == [[69_999, 0]]
    if coding == "plain":
        assert open_shards(tmp_path, "targets")[0].arrays["ids"] == (np.dtype("uint32"), (2,))


@BOTH
def test_the_bytes_depend_on_logits_and_provenance_alone(tmp_path, coding):
    logits = make_logits([40, 0, 300])
    one, two = (write(tmp_path / name, logits, coding=coding) for name in ("one", "two"))
    three = write(tmp_path / "three", logits, provenance=PROVENANCE | {"teacher": "dd"}, coding=coding)
    for name in ("targets.000000.h5", "targets.000000.h5.sha256"):
        assert (one / name).read_bytes() == (two / name).read_bytes() != (three / name).read_bytes()


def write_golden(folder, coding):
    """Made of whole numbers, so that no machine rounds them differently."""
    with TargetWriter(shard_path(folder, "targets", 3), 3183, 20, PROVENANCE, coding) as writer:
        for place, num_frames in enumerate((0, 1, 200, 90)):
            frame, rank = np.ogrid[:num_frames, :20]
            ids = (7 * (frame // 3) + 113 * rank + 1000 * (rank % 4 == 3) * frame + place) % 3183
            log_posteriors = -(1 + rank * (1 + frame % 5) + rank * rank % 7 / 16) / 4
            log_posteriors[ids % 100 == 99] = -np.inf
            order = np.lexsort((ids, -log_posteriors), axis=1)
            best = [torch.from_numpy(np.take_along_axis(x, order, axis=1)) for x in (ids, log_posteriors)]
            dropped = torch.arange(num_frames) / 1024
            writer.write_best(f"utterance {place} ü", TopK(best[0], best[1].float(), dropped))
    return shard_path(folder, "targets", 3)


@BOTH
def test_the_golden_shard_comes_out_byte_for_byte(tmp_path, coding):
    """REWRITE_GOLDEN=1 writes the hash anew: only when the format changes, and with it store.STORE_VERSION."""
    golden = Path(__file__).parent / "golden" / f"{coding}.sha256"
    line = hash_path(write_golden(tmp_path, coding)).read_text()
    if os.environ.get("REWRITE_GOLDEN"):
        golden.write_text(line)
    assert golden.read_text() == line


@BOTH
def test_the_example_of_the_document_decodes_the_store_with_h5py_and_numpy_alone(tmp_path, coding):
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {"json", "zlib", "h5py", "numpy"}
    namespace = {}
    exec(code, namespace)
    logits = make_logits([60, 0, 1], 300)
    logits["u0"][:, 200:] = -torch.inf
    logits["far"] = torch.zeros(4, 300) - 2.0 * torch.arange(300)
    for k in (20, 300):
        store = TargetStore(write(tmp_path / str(k), logits, coding=coding, k=k))
        decoded = list(namespace["decode"](tmp_path / str(k) / "targets.000000.h5"))
        assert [utterance_id for utterance_id, *_ in decoded] == list(logits)
        for utterance_id, ids, posteriors, dropped in decoded:
            needed = store.decode(0, utterance_id)
            np.testing.assert_array_equal(ids, needed.ids)
            np.testing.assert_allclose(posteriors, np.exp(needed.log_posteriors), atol=1e-6)
            np.testing.assert_allclose(dropped, needed.dropped, atol=1e-6)


@BOTH
def test_the_document_names_every_dataset_and_header_key(tmp_path, coding):
    text = DOCUMENT.read_text(encoding="utf-8")
    shard = open_shards(write(tmp_path, make_logits([3]), coding=coding), "targets")[0]
    with h5py.File(shard.path) as file:
        for key in (*file, *file["arrays"]):
            assert f"`{key}" in text
    for key in shard.header:
        assert f"`{key}`" in text


@pytest.mark.parametrize("field", ["teacher", "inventory", "features", "numeric_mode", "num_senones", "k"])
def test_a_store_of_something_else_is_refused_naming_field_got_and_needed(tmp_path, field):
    got = (PROVENANCE | {"num_senones": 50, "k": 20})[field]
    write(tmp_path, make_logits([3]))
    TargetStore(tmp_path, expect={field: got})
    with pytest.raises(ValueError, match=rf"got {field} = {got!r}, need 'other'.*Label again"):
        TargetStore(tmp_path, expect={field: "other"})


def test_a_store_without_the_expected_provenance_is_refused(tmp_path):
    write(tmp_path, make_logits([3]), provenance=None)
    with pytest.raises(ValueError, match="got teacher = None, need 'aa'"):
        TargetStore(tmp_path, expect={"teacher": "aa"})


def test_a_shard_of_another_store_is_refused_when_it_is_opened(tmp_path):
    write(tmp_path, make_logits([3]))
    write(tmp_path, make_logits([3]), number=1, k=10)
    with pytest.raises(ValueError, match=r"targets\.000001\.h5: k is 10, need 20 as in targets\.000000\.h5"):
        list(TargetStore(tmp_path).iter_shard(1))


def test_shards_that_changed_places_are_refused(tmp_path):
    for number in (0, 1):
        write(tmp_path, make_logits([3], seed=number), number=number)
    first, second = (shard_path(tmp_path, "targets", number) for number in (0, 1))
    os.replace(first, tmp_path / "elsewhere")
    os.replace(second, first)
    os.replace(tmp_path / "elsewhere", second)
    with pytest.raises(ValueError, match=r"targets\.000000\.h5 was written as shard 1"):
        TargetStore(tmp_path)


def test_another_version_or_another_kind_of_shard_is_refused(tmp_path):
    path = shard_path(tmp_path, "targets", 0)
    with PackedWriter(path, {"store_version": 99}, {"ids": ("uint16", (2,))}):
        pass
    with pytest.raises(ValueError, match="got store version 99, this reader knows version 2"):
        TargetStore(tmp_path)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(3, 49), r"got logits \(3, 49\), need \(frames, 50 senones\)"),
        (torch.full((3, 50), torch.nan), "frame 0 is nan"),
    ],
)
def test_logits_that_do_not_fit_are_refused_naming_the_utterance(tmp_path, logits, message):
    with (
        TargetWriter(tmp_path / "targets.000000.h5", 50) as writer,
        pytest.raises(ValueError, match=message) as caught,
    ):
        writer.write("bad", logits)
    assert "utterance 'bad'" in str(caught.value)


def test_more_than_all_senones_cannot_be_kept(tmp_path):
    with pytest.raises(ValueError, match="k = 20 of 5 senones"):
        TargetWriter(tmp_path / "targets.000000.h5", 5)


def test_utterances_are_found_in_any_shard_with_few_shards_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 2)
    for number in range(5):
        write(tmp_path, {f"s{number}-{i}": x for i, x in make_logits([2, 3], seed=number).items()}, number)
    store = TargetStore(tmp_path)
    for number in (4, 0, 2, 2, 3, 1):
        assert store[f"s{number}-u1"][0].shape == (3, 20)
        assert len(store._open) <= 2
    with pytest.raises(KeyError, match="no targets for utterance 'nobody'"):
        store["nobody"]


def test_verify_lists_every_damage_of_every_shard(tmp_path):
    for number in range(3):
        write(tmp_path, make_logits([300, 300], seed=number), number)
    TargetStore(tmp_path).verify()
    for number, row in ((0, 10), (2, 15000)):
        with h5py.File(shard_path(tmp_path, "targets", number), "r+") as file:
            file["arrays/records"][row] += 1
    with pytest.raises(ValueError) as caught:
        TargetStore(tmp_path).verify()
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert re.search(
        r"targets\.000000\.h5: utterances 'u0' … 'u1': block 0 of 'records' is damaged", lines[0]
    )
    assert re.search(r"targets\.000002\.h5: utterance 'u1': block 1 of 'records' is damaged", lines[2])
    assert all("its SHA-256 is not the one in" in lines[place] for place in (1, 3))


def test_info_states_sizes_mass_and_entropy(tmp_path):
    for number in range(2):
        write(tmp_path, {f"{number}{i}": x for i, x in make_logits([100, 20], seed=number).items()}, number)
    info = TargetStore(tmp_path).info()
    assert (info.num_shards, info.num_utterances, info.num_frames) == (2, 4, 240)
    assert info.hours == pytest.approx(240 * 0.03 / 3600)
    posteriors = torch.cat(
        [torch.softmax(x.double(), 1) for n in range(2) for x in make_logits([100, 20], seed=n).values()]
    )
    best = posteriors.sort(dim=1, descending=True).values[:, :20]
    assert list(info.kept) == [1, 5, 10, 20]
    for k, mass in info.kept.items():
        assert mass == pytest.approx(float(best[:, :k].sum(dim=1).mean()), abs=3e-3)
        whole = best[:, :k] / best[:, :k].sum(dim=1, keepdim=True)
        assert info.entropy_nats[k] == pytest.approx(
            float(-(whole * whole.log()).sum(dim=1).mean()), abs=5e-3
        )
    assert info.bytes_per_frame == pytest.approx(sum(p.stat().st_size for p in tmp_path.iterdir()) / 240)


@BOTH
def test_info_of_certain_targets_is_zero_nats(tmp_path, coding):
    logits = torch.full((3, 4), -torch.inf)
    logits[:, 1] = 0
    info = TargetStore(write(tmp_path, {"u": logits}, k=2, coding=coding)).info()
    assert info.kept == {1: 1.0, 2: 1.0} and info.entropy_nats == {1: 0.0, 2: 0.0}


def _read(store):
    return [utterance_id for utterance_id, _, _ in store.iter_shard(0)], store["u1"][1].tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_opened_store_may_be_pickled_and_used_in_forked_and_spawned_processes(tmp_path, method):
    store = TargetStore(write(tmp_path, make_logits([4, 5])), expect={"teacher": "aa"})
    needed = _read(store)
    assert pickle.loads(pickle.dumps(store)).expect == {"teacher": "aa"}
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_read, (store,)) == needed
