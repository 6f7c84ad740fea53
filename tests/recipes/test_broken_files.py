"""Files that are missing, broken or hostile: told with path and reason, never believed or run."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


def refuses(kit, folder: Path, *messages: str) -> None:
    with pytest.raises(kit.formats.DataError) as caught:
        kit.images.load(str(folder))
    for message in messages:
        assert message in str(caught.value)


def test_no_folder_and_no_file(kit, tmp_path):
    refuses(kit, tmp_path / "gone", f"--data {tmp_path / 'gone'}: not a folder", "cifar-10-batches")
    refuses(kit, tmp_path, "none of the known files is there", "train-images-idx3-ubyte", "digits")


def test_two_data_sets(kit, files, tmp_path):
    files.mnist(tmp_path / "MNIST" / "raw")
    files.mnist(tmp_path / "FashionMNIST" / "raw")
    refuses(kit, tmp_path, "several data sets", "FashionMNIST", "point to one of them")


def test_a_missing_file(kit, files, tmp_path):
    files.mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    refuses(kit, tmp_path, str(tmp_path / "t10k-labels-idx1-ubyte"), "missing")
    folder = tmp_path / "cifar-10-batches-py"
    files.cifar10(folder)
    (folder / "data_batch_3").unlink()
    refuses(kit, folder, str(folder / "data_batch_3"), "missing")
    files.pack(folder, tmp_path / "cifar-10-python.tar.gz")
    for file in (*folder.iterdir(), *tmp_path.glob("t*ubyte")):
        file.unlink()
    folder.rmdir()
    refuses(kit, tmp_path, "cifar-10-python.tar.gz: holds no data_batch_3")


def zeros(*shape: int) -> bytes:
    """An IDX file of zeros."""
    sizes = b"".join(n.to_bytes(4) for n in shape)
    return bytes((0, 0, 8, len(shape))) + sizes + bytes(int(np.prod(shape)))


GOOD = zeros(30, 28, 28)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: the magic number needs 4 bytes, 0 are there"),
        (GOOD[:6], "truncated: its list of sizes needs 12 bytes, 2 are there"),
        (GOOD[:-1], "truncated: the shape [30, 28, 28] needs 23520 bytes, 23519 are there"),
        (GOOD + b"\0", "longer than its stated shape [30, 28, 28] needs"),
        (zeros(30), "magic number 0x00000801, expected 0x00000803"),
        (b"\x89PNG" + GOOD, "magic number 0x89504e47, expected 0x00000803"),
        (zeros(0, 28, 28), "states the shape [0, 28, 28], which is empty"),
        (zeros(29, 28, 28), "29 images, but 30 labels beside them"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "truncated: the shape [4294967295,"),
    ],
)
def test_broken_idx(kit, files, tmp_path, content, message, zipped):
    files.mnist(tmp_path, zipped, train_x=content)
    refuses(kit, tmp_path, str(tmp_path / "train-images-idx3-ubyte"), message)


def test_idx_that_contradicts_itself(kit, files, tmp_path):
    files.mnist(tmp_path, train_y=files.idx(np.full(30, 10)))
    refuses(kit, tmp_path, "label 10 beside train-images-idx3-ubyte, expected 0 to 9")
    files.mnist(tmp_path, test_x=zeros(10, 20, 28))
    refuses(kit, tmp_path, "images of [20, 28], the training images are [28, 28]")


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[:20] + b"\xff" * 40 + b[60:]])
def test_a_broken_zip(kit, files, tmp_path, damage):
    files.mnist(tmp_path, zipped=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    refuses(kit, tmp_path, str(file), "can't be unzipped")


class Boom:
    """A pickle that runs a command where it is unpickled by the plain unpickler."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


ARRAY = np.zeros((4, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Boom(), "a call of posix.mkdir, which no batch needs"),
        ([Boom()], "a call of posix.mkdir, which no batch needs"),
        ({b"data": np.array([None]), b"labels": [1]}, "an array of 'O8', not of unsigned bytes"),
        ({b"data": ARRAY.astype(float), b"labels": [1]}, "an array of 'f8', not of unsigned"),
        ({b"data": np.asfortranarray(ARRAY), b"labels": [1]}, "whose kind or order is not"),
        ([1, 2], "a list in the place of a dict"),
        ({}, "no 'data' among nothing"),
        ({b"data": ARRAY}, "no 'labels' among 'data'"),
        ({b"data": ARRAY, b"labels": 4}, "'labels' is 4, expected a list of numbers"),
        ({b"data": b"x", b"labels": [1]}, "in the place of an array"),
        ({b"data": ARRAY, b"labels": [1, 2]}, "[4, 3072] in 12288 bytes, expected [2, 3072] for"),
        ({b"data": ARRAY[:, :9].copy(), b"labels": [1] * 4}, "[4, 9] in 36 bytes, expected [4, 30"),
        ({b"data": ARRAY[:0], b"labels": []}, "'labels' is [], expected a list"),
        ({b"data": ARRAY, b"labels": [1, 2, 3, 10]}, "label 10, expected 0 to 9"),
        ({b"data": ARRAY, b"labels": [1, 2, 3, -1]}, "label -1, expected 0 to 9"),
        ({b"data": ARRAY, b"labels": [1, 2, 3, 1.5]}, "label 1.5, expected 0 to 9"),
        ({b"data": ARRAY, b"labels": [1, 2, 3, True]}, "label True, expected 0 to 9"),
    ],
)
def test_a_batch_that_is_none(kit, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kit.formats.DataError) as caught:
        kit.cifar.read_batch(pickle.dumps(content, 2), "some/file", "labels", 10)
    assert str(caught.value).startswith("some/file: ")
    assert message in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_the_hostile_pickle_is_one(tmp_path, monkeypatch):
    """Else the test above could not fail."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Boom(), 2))
    assert (tmp_path / "harm").exists()


WHOLE = pickle.dumps({b"data": ARRAY[:2], b"labels": [3, 7]}, 2)


@given(
    st.binary(max_size=60)
    | st.builds(
        lambda at, put: WHOLE[:at] + put + WHOLE[at + len(put) + 1 :],
        st.integers(0, 150) | st.integers(len(WHOLE) - 60, len(WHOLE)),
        st.binary(max_size=3),
    )
)
def test_damaged_pickles_are_told(kit, content):
    try:
        x, y = kit.cifar.read_batch(content, "here", "labels", 10)
    except kit.formats.DataError:
        return
    assert x.shape == (len(y), 3, 32, 32)


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", gzip.compress(b"no archive", mtime=0)],
    ids=["empty", "text", "zipped text"],
)
def test_a_broken_archive(kit, tmp_path, content):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    refuses(kit, tmp_path, "cifar-10-python.tar.gz: can't be unpacked")


def test_a_truncated_archive(kit, files, tmp_path):
    files.cifar10(tmp_path / "cifar-10-batches-py")
    out = tmp_path / "packed" / "cifar-10-python.tar.gz"
    out.parent.mkdir()
    files.pack(tmp_path / "cifar-10-batches-py", out)
    out.write_bytes(out.read_bytes()[:20000])
    refuses(kit, out.parent, "cifar-10-python.tar.gz: can't be unpacked")
