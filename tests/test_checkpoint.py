"""A file of tensors is whole or refused, and its bytes are of its contents alone."""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from teacherstudent.training.checkpoint import load, save

torch.set_num_threads(1)


def contents() -> dict:
    weights = torch.arange(600, dtype=torch.float32).reshape(20, 30)
    half = torch.arange(9).to(torch.bfloat16)
    return {
        "format": 1,
        "weights": OrderedDict(a=weights, b=half, empty=torch.zeros(0, 3)),
        "state": {"residual": [weights[2:4].clone(), None], "lr": 0.1, "step": 2**40},
        "provenance": {"inventory": "0123abcd", "numeric_mode": "fp32"},
    }


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "deep" / "er" / "a.pt", contents())
    loaded, expected = load(tmp_path / "deep" / "er" / "a.pt"), contents()
    assert loaded.keys() == expected.keys()
    for name, value in expected["weights"].items():
        assert loaded["weights"][name].dtype == value.dtype
        assert torch.equal(loaded["weights"][name], value)
    assert torch.equal(loaded["state"].pop("residual")[0], expected["state"].pop("residual")[0])
    assert loaded["state"] == expected["state"]
    assert loaded["provenance"] == expected["provenance"]


def test_the_same_contents_have_the_same_bytes_under_any_name_also_when_saved_again(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", contents())
    save(tmp_path / "elsewhere" / "quite_another_name.bin", contents())
    save(tmp_path / "again.pt", load(tmp_path / "a.pt"))
    expected = (tmp_path / "a.pt").read_bytes()
    assert (tmp_path / "elsewhere" / "quite_another_name.bin").read_bytes() == expected
    assert (tmp_path / "again.pt").read_bytes() == expected


def test_other_contents_have_other_bytes(tmp_path: Path) -> None:
    other = contents()
    other["weights"]["a"][0, 0] = 1e-9
    save(tmp_path / "a.pt", contents())
    save(tmp_path / "b.pt", other)
    assert (tmp_path / "a.pt").read_bytes() != (tmp_path / "b.pt").read_bytes()


def test_a_save_that_fails_leaves_the_file_before_it_whole_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.pt", contents())
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises((AttributeError, TypeError)):
        save(tmp_path / "a.pt", {"cannot be pickled": lambda: None})
    assert (tmp_path / "a.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_file_that_ends_early_is_refused_by_name(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.pt"
    save(path, contents())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"{path} cannot be read: .*remove the folder"):
        load(path)


def test_a_flipped_bit_is_refused_by_name_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save(path, contents())
    whole, expected = path.read_bytes(), contents()
    random = np.random.default_rng(0)
    inside = whole.index(expected["weights"]["a"].numpy().tobytes())  # the weights themselves
    places = [inside + 5, inside + 2399, *random.integers(0, len(whole), 100)]
    refused = []
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            loaded = load(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused.append(place)
        else:  # alignment between the records: nothing that anybody reads
            save(tmp_path / "again.pt", loaded)
            assert (tmp_path / "again.pt").read_bytes() == whole
    assert places[0] in refused
    assert places[1] in refused


@pytest.mark.parametrize("contents", [b"hello", b"PK\x03\x04 not really"])
def test_another_kind_of_file_is_refused_by_name(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(contents)
    with pytest.raises(ValueError, match=r"a\.pt cannot be read"):
        load(tmp_path / "a.pt")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"weights": Evil()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt cannot be read"):
        load(tmp_path / "a.pt")
    assert not (tmp_path / "evil").exists()


def test_a_missing_file_says_which_and_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint at .*best\.pt: the step that trains it has not run"):
        load(tmp_path / "best.pt")
