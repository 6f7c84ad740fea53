"""Images as they are read: MNIST, CIFAR in every way that it is stored, digits."""

import pickle

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("where", [".", "MNIST/raw"])
def test_mnist(kit, files, tmp_path, zipped, where):
    arrays = files.mnist(tmp_path / where, zipped)
    found = kit.images.load(str(tmp_path))
    assert (found.name, found.classes, found.shape) == ("MNIST", 10, (1, 28, 28))
    assert found.train_x.dtype == torch.uint8
    for key, array in arrays.items():
        assert np.array_equal(getattr(found, key).numpy().reshape(array.shape), array)
    x = found.prepared(found.train_x).double()
    torch.testing.assert_close(x.mean().item(), 0.0, atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(correction=0).item(), 1.0, atol=1e-6, rtol=0)


def test_a_file_beside_its_zipped_twin_is_read_unzipped(kit, files, tmp_path):
    files.mnist(tmp_path)
    files.mnist(tmp_path, zipped=True, train_x=b"broken")
    assert len(kit.images.load(str(tmp_path)).train_x) == 30


@pytest.mark.parametrize("protocol", range(2, 6))
def test_cifar_in_every_protocol_that_numpy_writes(kit, files, tmp_path, protocol):
    batches = files.cifar10(tmp_path / "cifar-10-batches-py", protocol)
    found = kit.images.load(str(tmp_path))
    assert (found.name, found.classes, found.shape, found.varied) == (
        "CIFAR-10",
        10,
        (3, 32, 32),
        True,
    )
    x = np.concatenate([b[b"data"] for b in batches[:5]]).reshape(-1, 3, 32, 32)
    assert np.array_equal(found.train_x.numpy(), x)
    assert found.train_y.tolist() == [y for b in batches[:5] for y in b[b"labels"]]
    assert np.array_equal(found.test_x.numpy().reshape(-1, 3072), batches[5][b"data"])
    standard = found.prepared(found.train_x).double()
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)


def test_cifar_as_python_2_wrote_it(kit, files):
    """Byte strings as str, an array through numpy.core: opcodes that Python 3 no longer writes."""
    content = files.batch(2)
    raw = content[b"data"].tobytes()
    size = len(raw).to_bytes(4, "little")
    pickled = (
        b"\x80\x02}q\x01("
        b"U\x04data" + b"cnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + size + raw + b"tb"
        b"U\x06labels]q\x02(K\x03K\x07e"
        b"u."
    )  # fmt: skip
    assert np.array_equal(pickle.loads(pickled, encoding="bytes")[b"data"], content[b"data"])
    x, y = kit.cifar.read_batch(pickled, "here", "labels", 10)
    assert np.array_equal(x.numpy().reshape(2, 3072), content[b"data"])
    assert y.tolist() == [3, 7]


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-python.tar"])
def test_an_archive_is_read_as_its_folder_is(kit, files, tmp_path, name):
    files.cifar10(tmp_path / "made" / "cifar-10-batches-py")
    (tmp_path / "packed").mkdir()
    files.pack(tmp_path / "made" / "cifar-10-batches-py", tmp_path / "packed" / name)
    packed, made = (kit.images.load(str(tmp_path / where)) for where in ("packed", "made"))
    assert torch.equal(packed.train_x, made.train_x)
    assert torch.equal(packed.test_y, made.test_y)
    assert sorted(p.name for p in (tmp_path / "packed").iterdir()) == [name]  # nothing unpacked


def test_cifar_100(kit, files, tmp_path):
    for seed, name in enumerate(("train", "test")):
        content = files.batch(5, seed, "fine_labels", 100)
        (tmp_path / name).write_bytes(pickle.dumps(content, 2))
    found = kit.images.load(str(tmp_path))
    assert (found.name, found.classes, len(found.train_y)) == ("CIFAR-100", 100, 5)


def test_digits_are_what_is_taken_without_files(kit):
    found = kit.images.load(None)
    assert (found.name, found.shape, len(found.train_y), len(found.test_y)) == (
        "digits",
        (1, 8, 8),
        1297,
        500,
    )
    assert found.prepared(found.train_x).max() == 1.0
    sizes = [len(y) for _, y in found.batches(64)]
    assert sizes == [64] * 20


def test_a_varied_image_is_a_shifted_maybe_mirrored_one(kit):
    x = torch.randn(6, 3, 5, 7)
    y = kit.images.vary(x)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    shifts = set()
    for i in range(6):
        found = [
            (flip, down, right)
            for flip in (False, True)
            for down in range(9)
            for right in range(9)
            if torch.equal(
                (padded[i].flip(2) if flip else padded[i])[:, down : down + 5, right : right + 7],
                y[i],
            )
        ]
        assert found
        shifts.add(found[0])
    assert len(shifts) > 3
