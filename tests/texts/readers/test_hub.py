"""Data sets of Hugging Face: folders on disk as they are, the hub with its address answered here."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import huggingface_hub
import pytest

from mismatch.errors import DataError
from mismatch.texts import documents as data

datasets = pytest.importorskip("datasets")
COMMIT = "f" * 40


def rows(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts), "id": list(range(len(texts)))})


def test_a_saved_data_set(tmp_path):
    rows("one", "two").save_to_disk(tmp_path / "saved")
    found = data.read(tmp_path / "saved")
    assert found.texts == ("one", "two")
    assert found.names == ("saved:1", "saved:2")
    with pytest.raises(DataError, match="has no `body`; it has: text, id"):
        data.read(tmp_path / "saved", field="body")


def test_of_several_splits_one_is_named(tmp_path):
    datasets.DatasetDict(train=rows("a"), test=rows("b")).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="has several splits: train, test") as error:
        data.read(tmp_path / "saved")
    assert f"{tmp_path}/saved/SPLIT" in error.value.hint
    assert data.read(tmp_path / "saved/test").texts == ("b",)
    datasets.DatasetDict(train=rows("a")).save_to_disk(tmp_path / "only")
    assert data.read(tmp_path / "only").texts == ("a",)


def test_a_data_set_in_memory():
    assert data.read(rows("one", "two")).texts == ("one", "two")
    with pytest.raises(DataError, match=r"of a dict of data sets take one split|list of documents"):
        data.read(datasets.DatasetDict(train=rows("a")))


def test_a_broken_folder_is_an_error_of_ours(tmp_path):
    rows("one").save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text("{}")
    with pytest.raises(DataError, match="is no data set that can be read"):
        data.read(tmp_path / "saved")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one data set `me/texts`, which lies in a folder of parquet files; what was asked of it is kept."""
    for name, text in (("train", "a"), ("test", "b")):
        rows(text, text * 2).to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
    asked: list[tuple] = []
    load = datasets.load_dataset

    def info(_self, name, revision=None):
        if name != "me/texts":
            raise huggingface_hub.errors.RepositoryNotFoundError(
                f"404: {name}", response=SimpleNamespace(headers={}, request=None)
            )
        return SimpleNamespace(sha=revision or COMMIT)

    def splits(name, config, revision):
        asked.append((name, config, revision))
        return ["train", "test"]

    def opened(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision, streaming))
        return load("parquet", data_dir=str(tmp_path), split=split, streaming=streaming)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "get_dataset_split_names", splits)
    monkeypatch.setattr(datasets, "load_dataset", opened)
    return asked


def test_a_data_set_of_the_hub_is_read_at_one_commit(hub):
    found = data.read("hf:me/texts:default:test")
    assert found.texts == ("b", "bb")
    assert found.source == "hf:me/texts:default:test"
    assert found.revision == COMMIT
    assert hub == [("me/texts", "default", COMMIT), ("me/texts", "default", "test", COMMIT, True)]
    assert data.read("hf:me/texts@v1.0:default:train").revision == "v1.0"


def test_of_the_hub_too_a_split_is_named(hub):
    with pytest.raises(DataError, match="has several splits: train, test") as error:
        data.read("hf:me/texts")
    assert "hf:me/texts:default:SPLIT" in error.value.hint


def test_what_the_hub_does_not_have(hub):
    with pytest.raises(DataError, match=r"hf:me/none cannot be read from the hub: .*404"):
        data.read("hf:me/none")


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (tmp_path, "hf:me/texts"):
        with pytest.raises(DataError, match="`datasets` is not installed") as error:
            data.read(source)
        assert "llm-mismatch[datasets]" in error.value.hint
