"""Token ids that were made elsewhere: how wide, divided where, and whose."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from mismatch.errors import DataError
from mismatch.texts import documents as data
from mismatch.texts.windows import windows

DOCUMENTS = ([3, 1, 2], [7, 8], [5] * 40)


class Tokenizer:
    """As many tokens as it is told; token 0 ends a text."""

    eos_token_id = 0

    def __init__(self, size: int = 1024) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, **_: object) -> object:
        return type("Out", (), {"input_ids": [1, 2]})


def ids(found: data.Documents) -> list[list[int]]:
    return [text.ids.tolist() for text in found.texts]


STREAM = [*DOCUMENTS[0], 0, *DOCUMENTS[1], 0, *DOCUMENTS[2], 0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("header", [False, True])
def test_a_bin_is_divided_at_the_ends_of_texts(tmp_path, dtype, header, packed):
    content = np.array(STREAM, dtype).tobytes()
    if header:  # as llm.c writes it
        content = np.array([20240520, 1, len(STREAM), *[0] * 253], "<i4").tobytes() + content
    path = tmp_path / ("tokens.bin.gz" if packed else "tokens.bin")
    path.write_bytes(gzip.compress(content) if packed else content)
    found = data.read(path, tokenizer=Tokenizer())
    assert ids(found) == [*DOCUMENTS]
    assert found.names == (f"{path.name}:1", f"{path.name}:2", f"{path.name}:3")


def test_wide_ids_of_a_large_vocabulary(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.array([100_000, 0, 3], "<u4").tobytes())
    assert ids(data.read(tmp_path / "a.bin", tokenizer=Tokenizer(128_000))) == [[100_000], [3]]


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.array([40_000, 50_000], "<u2").tobytes())
    with pytest.raises(DataError, match="neither as uint16 nor as uint32 are all below 1024"):
        data.read(tmp_path / "a.bin", tokenizer=Tokenizer())
    with pytest.raises(DataError, match="without the model's tokenizer"):
        data.read(tmp_path / "a.bin")
    with pytest.raises(DataError, match="the token id 2000, and the tokenizer has 1024"):
        windows(data.read([[5] * 20 + [2000]]), Tokenizer(), 8, 16)
    (tmp_path / "a.bin").write_bytes(b"odd")
    with pytest.raises(DataError, match="no token ids of this model"):
        data.read(tmp_path / "a.bin", tokenizer=Tokenizer())


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_arrays(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array(STREAM, dtype))
    assert ids(data.read(tmp_path / "a.npy", tokenizer=Tokenizer())) == [*DOCUMENTS]
    assert ids(data.read(np.array(STREAM, dtype), tokenizer=Tokenizer())) == [*DOCUMENTS]
    np.save(tmp_path / "b.npy", np.array([[1, 2], [3, 4]], dtype))
    assert ids(data.read(tmp_path / "b.npy")) == [[1, 2], [3, 4]]
    assert ids(data.read(np.array([[1, 2], [3, 4]], dtype))) == [[1, 2], [3, 4]]
    assert ids(data.read([[1, 2], np.array([3, 4], dtype)])) == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "array", [np.ones(3), np.ones((1, 1, 1), int), np.array([1, -1]), np.array(3), np.array(["a"])]
)
def test_other_arrays_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"whole numbers|token id -1"):
        data.read(tmp_path / "a.npy")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array", b"\x93NUMPY\x01\x00\xff\xff{"])
def test_broken_arrays_are_errors_of_ours(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError):
        data.read(tmp_path / "a.npy")


def test_pickled_arrays_run_nothing(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="is no array of numbers"):
        data.read(tmp_path / "a.npy")


def test_the_same_ids_are_one_document_whatever_holds_them(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3]], "uint16"))
    assert data.read(tmp_path / "a.npy").hashes == data.read([[1, 2, 3]]).hashes
    with pytest.raises(DataError, match="share 1 document"):
        data.assert_disjoint(data.read(tmp_path / "a.npy"), data.read([[1, 2, 3], [4]]))


def test_windows_of_ids_are_the_ids():
    cut = windows(data.read([list(range(2, 42))]), Tokenizer(), 8, 1000)
    assert sorted(cut.ids[:, 0].tolist()) == [2, 10, 18, 26, 34]
