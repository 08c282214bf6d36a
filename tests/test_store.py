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
from teacherstudent.data.packed import PackedShard, PackedWriter, shard_path
from teacherstudent.posteriors import top_k
from teacherstudent.store import TargetStore, TargetWriter, describe

torch.set_num_threads(1)

PROVENANCE = {"teacher": "aa", "inventory": "bb", "features": "cc", "numeric_mode": "fp32"}
DOCUMENT = Path(__file__).parent.parent / "docs" / "store.md"


def make_logits(lengths, num_senones=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"u{i}": 3 * torch.randn(n, num_senones, generator=generator) for i, n in enumerate(lengths)}


def write(folder, logits, number=0, k=20, provenance=PROVENANCE):
    num_senones = next(iter(logits.values())).shape[1]
    with TargetWriter(shard_path(folder, "targets", number), num_senones, k, provenance) as writer:
        for utterance_id, values in logits.items():
            writer.write(utterance_id, values)
    return folder


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 40), st.data())
@settings(max_examples=30, deadline=None)
def test_the_store_gives_back_the_highest_posteriors_renormalised(
    tmp_path_factory, lengths, num_senones, data
):
    k = data.draw(st.integers(1, num_senones))
    logits = make_logits(lengths, num_senones)
    store = TargetStore(write(tmp_path_factory.mktemp("store"), logits, k=k))
    in_order = list(store.iter_shard(0))
    assert [utterance_id for utterance_id, _, _ in in_order] == list(logits) == list(store.shard_ids(0))
    for (utterance_id, ids, log_posteriors), values in zip(in_order, logits.values(), strict=True):
        wide = torch.log_softmax(values.double(), dim=1)
        needed = wide.sort(dim=1, descending=True, stable=True)
        np.testing.assert_array_equal(ids, needed.indices[:, :k])
        assert ids.dtype == np.int32 and log_posteriors.dtype == np.float32
        kept = torch.log_softmax(needed.values[:, :k], dim=1)
        np.testing.assert_allclose(np.exp(log_posteriors), kept.exp(), atol=4e-4)
        np.testing.assert_allclose(np.exp(log_posteriors).sum(axis=1), 1, atol=1e-5)
        assert (np.diff(log_posteriors, axis=1) <= 0).all()
        dropped = 1 - needed.values[:, :k].exp().sum(dim=1)
        np.testing.assert_allclose(store.dropped(utterance_id), dropped, atol=5e-4)
        for again in (store[utterance_id], store.read(0, utterance_id)):
            np.testing.assert_array_equal(again[0], ids)
            np.testing.assert_array_equal(again[1], log_posteriors)


def test_the_stored_values_are_off_by_no_more_than_the_header_says(tmp_path):
    logits = {
        "u": torch.cat([make_logits([400], 300)["u0"] * scale for scale in (1e-3, 0.1, 1.0, 10.0, 300.0)])
    }
    store = TargetStore(write(tmp_path, logits, k=300))
    bound = store.header["coding"]["worst_error"]
    stored = PackedShard(store.shards[0])["u"]["log_posteriors"].astype(np.float64)
    true = top_k(logits["u"], 300).log_posteriors.double().numpy()
    error = np.abs(stored - true)
    assert (error <= np.maximum(bound["relative_nats"] * np.abs(true), bound["absolute_nats"])).all()
    off = np.abs(np.exp(stored) - np.exp(true)).max()
    assert bound["probability"] / 4 < off <= bound["probability"]  # a bound, and one that is not idle


def test_the_worst_error_of_a_probability_holds_for_every_float16_midpoint():
    values = np.arange(0x8000, 0xFC00, dtype="uint16").view("float16").astype(np.float64)  # -0 … -65504
    between = (values[1:] + values[:-1]) / 2
    off = np.abs(np.exp(between)[:, None] - np.exp(np.stack([values[1:], values[:-1]], axis=1))).max()
    assert 1.7e-4 < off <= store_module._coding(np.dtype("uint16"))["worst_error"]["probability"]


def test_impossible_senones_and_values_beyond_float16_have_posterior_zero(tmp_path):
    logits = torch.tensor([[0.0, -1e6, -torch.inf, -1.0]])
    ids, log_posteriors = TargetStore(write(tmp_path, {"u": logits}, k=4))["u"]
    assert ids.tolist() == [[0, 3, 1, 2]]
    np.testing.assert_allclose(np.exp(log_posteriors), [[0.7311, 0.2689, 0, 0]], atol=2e-4)


def test_many_senones_get_wider_ids(tmp_path):
    logits = torch.zeros(1, 70_000)
    logits[0, 69_999] = 5.0
    store = TargetStore(write(tmp_path, {"u": logits}, k=2))
    assert store["u"][0].tolist() == [[69_999, 0]]
    assert PackedShard(store.shards[0]).arrays["ids"] == (np.dtype("uint32"), (2,))


def test_the_bytes_depend_on_logits_and_provenance_alone(tmp_path):
    logits = make_logits([40, 0, 300])
    one, two = (write(tmp_path / name, logits) for name in ("one", "two"))
    three = write(tmp_path / "three", logits, provenance=PROVENANCE | {"teacher": "dd"})
    name = "targets.000000.h5"
    assert (one / name).read_bytes() == (two / name).read_bytes() != (three / name).read_bytes()


def test_the_example_of_the_document_decodes_the_store_with_h5py_and_numpy_alone(tmp_path):
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {"json", "zlib", "h5py", "numpy"}
    namespace = {}
    exec(code, namespace)
    store = TargetStore(write(tmp_path, make_logits([300, 0, 1])))
    decoded = list(namespace["decode"](store.shards[0]))
    assert [utterance_id for utterance_id, _, _ in decoded] == ["u0", "u1", "u2"]
    for utterance_id, ids, posteriors in decoded:
        needed_ids, log_posteriors = store[utterance_id]
        np.testing.assert_array_equal(ids, needed_ids)
        np.testing.assert_allclose(posteriors, np.exp(log_posteriors), atol=1e-6)


def test_the_document_names_every_dataset_and_header_key(tmp_path):
    text = DOCUMENT.read_text(encoding="utf-8")
    shard = PackedShard(TargetStore(write(tmp_path, make_logits([3]))).shards[0])
    with h5py.File(shard.path) as file:
        for key in file:
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
    with pytest.raises(ValueError, match="got store version 99, this reader knows version 1"):
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
    for number, row in ((0, 10), (2, 599)):
        with h5py.File(shard_path(tmp_path, "targets", number), "r+") as file:
            file["arrays/dropped"][row] += 1
    with pytest.raises(ValueError) as caught:
        TargetStore(tmp_path).verify()
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "targets.000000.h5: utterance 'u0'" in lines[0] and "targets.000002.h5: utterance 'u1'" in lines[1]


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
        assert mass == pytest.approx(float(best[:, :k].sum(dim=1).mean()), abs=2e-4)
    whole = best / best.sum(dim=1, keepdim=True)
    assert info.entropy_nats == pytest.approx(float(-(whole * whole.log()).sum(dim=1).mean()), abs=1e-3)
    assert info.bytes_per_frame == pytest.approx(sum(p.stat().st_size for p in tmp_path.iterdir()) / 240)
    text = describe(tmp_path)
    assert re.search(r"^frames +240$", text, re.MULTILINE) and re.search(r"^teacher +aa$", text, re.MULTILINE)


def test_info_of_certain_targets_is_zero_nats(tmp_path):
    logits = torch.full((3, 4), -torch.inf)
    logits[:, 1] = 0
    info = TargetStore(write(tmp_path, {"u": logits}, k=2)).info()
    assert info.kept == {1: 1.0, 2: 1.0} and info.entropy_nats == 0


def _read(store):
    return [utterance_id for utterance_id, _, _ in store.iter_shard(0)], store["u1"][1].tolist()


def test_an_opened_store_may_be_pickled_and_used_in_a_spawned_process(tmp_path):
    store = TargetStore(write(tmp_path, make_logits([4, 5])), expect={"teacher": "aa"})
    needed = _read(store)
    assert pickle.loads(pickle.dumps(store)).expect == {"teacher": "aa"}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read, (store,)) == needed
