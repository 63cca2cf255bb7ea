"""Files of torch.save from anyone: read as data, or refused; nothing in them is run, and nothing runs away."""

from __future__ import annotations

import contextlib
import io
import operator
import os
import pickle
import random
import subprocess
import zipfile
from collections import Counter, OrderedDict, defaultdict

import pytest
import torch

from prune_mm.export.torch_file import CodeInFile, read_torch_file

torch.manual_seed(0)
WHOLE = torch.arange(24.0).reshape(4, 6)
HONEST = {
    "tensors": OrderedDict(
        a=WHOLE, view=WHOLE[1:, ::2], scalar=torch.tensor(3), empty=torch.empty(0, 3), mask=WHOLE > 3,
        half=WHOLE.half(), brain=WHOLE.bfloat16(), complex=torch.randn(3, dtype=torch.complex64),
        last=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), parameter=torch.nn.Parameter(WHOLE),
    ),
    "plain": [None, True, -1, 2**70, 0.5, "text\n", b"bytes", b"", (1, (2,)), {3}, 1j, torch.Size([1, 2]), torch.half],
    "counts": Counter({1: 2}),
}  # fmt: skip


def saved(value, zipped=True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def read(content: bytes, folder):
    path = folder / "file.pth"
    path.write_bytes(content)
    return read_torch_file(path)


def refusal(content: bytes, folder) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read(content, folder)
    assert type(caught.value) in (ValueError, CodeInFile)
    return str(caught.value)


def rezipped(content: bytes, change=lambda name, data: data, method=zipfile.ZIP_STORED, twice="") -> bytes:
    """The archive with other parts; ``change`` gives the content of each."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in [*old.namelist(), *([twice] if twice else [])]:
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return out.getvalue()


def with_pickle(data: bytes, content: bytes | None = None, method=zipfile.ZIP_STORED) -> bytes:
    """An archive whose pickle is another."""
    return rezipped(content or saved({"a": WHOLE}), lambda name, old: data if name == "data.pkl" else old, method)


def pickle_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_read(zipped, tmp_path):
    found = read(saved(HONEST, zipped), tmp_path)
    assert found["plain"] == HONEST["plain"]
    assert found["counts"] == HONEST["counts"]
    assert type(found["tensors"]) is OrderedDict
    for name, tensor in HONEST["tensors"].items():
        other = found["tensors"][name]
        assert (other.dtype, other.shape, other.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        assert torch.equal(other, tensor), name
    storages = [found["tensors"][name].untyped_storage().data_ptr() for name in ("a", "view")]
    assert storages[0] == storages[1]


def test_types_without_a_storage_class(tmp_path):
    tensors = {"f8": WHOLE.to(torch.float8_e4m3fn), "u16": WHOLE.to(torch.uint16)}
    found = read(saved(tensors), tmp_path)
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in tensors.items())


class Calls:
    """What a pickle does when it is loaded."""

    def __init__(self, function, *arguments):
        self.how = (function, arguments)

    def __reduce__(self):
        return self.how


GADGETS = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "subprocess": lambda mark: Calls(subprocess.check_call, ["touch", mark]),
    "eval": lambda mark: Calls(eval, f"open({mark!r}, 'w')"),
    "exec": lambda mark: Calls(exec, f"open({mark!r}, 'w')"),
    "open": lambda mark: Calls(open, mark, "w"),
    "import": lambda mark: Calls(__import__, "this"),
    "getattr": lambda mark: Calls(getattr, "text", "format"),
    "attrgetter": lambda mark: operator.attrgetter("system"),
    "unpickle": lambda mark: Calls(pickle.loads, pickle.dumps(Calls(open, mark, "w"))),
    "torch.load": lambda mark: Calls(torch.load, mark),
    "a class": lambda mark: Calls(defaultdict, list),
    "bytearray": lambda mark: Calls(bytearray, 10**9),
    "counter of bytearray": lambda mark: Calls(Counter, Calls(bytearray, 10**9)),
    "storage": lambda mark: Calls(torch.UntypedStorage, 10**12),
    "tensor": lambda mark: Calls(torch.Tensor, 10**12),
    "module": lambda mark: torch.nn.Linear(2, 2),
    "path": lambda mark: tmp(mark),
}


def tmp(mark):
    from pathlib import Path

    return Path(mark)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", GADGETS)
def test_nothing_is_run(name, zipped, tmp_path):
    mark = str(tmp_path / "was_run")
    for place in (GADGETS[name](mark), {"state_dict": {"a": WHOLE}, "meta": [{"x": GADGETS[name](mark)}]}):
        assert refusal(saved(place, zipped), tmp_path)
    assert not os.path.exists(mark)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_are_not_dense(zipped, tmp_path):
    others = {
        "sparse": WHOLE.to_sparse(),
        "csr": WHOLE.to_sparse_csr(),
        "meta": WHOLE.to("meta"),
        "quantized": torch.quantize_per_tensor(WHOLE, 0.1, 0, torch.quint8),
        "conjugate": HONEST["tensors"]["complex"].conj(),
        "attribute": torch.nn.Parameter(WHOLE.clone()),
    }
    others["attribute"].extra = [1]
    for name, tensor in others.items():
        if not (name == "conjugate" and not zipped):
            content = saved({name: tensor}, zipped)
            if name == "attribute":
                assert torch.equal(read(content, tmp_path)[name], tensor)  # the attribute is left out
            else:
                assert refusal(content, tmp_path), name


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def rebuilt(
    offset=b"K\x00", size=b"K\x18\x85", stride=b"K\x01\x85", count=b"K\x18", key=b"X\x01\x00\x00\x000"
) -> bytes:
    """The pickle of one tensor of the storage of ``WHOLE``, whose 24 elements are float32."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + key + b"X\x03\x00\x00\x00cpu" + count + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89N" + b"tR."


def test_a_tensor_lies_within_its_storage(tmp_path):
    assert torch.equal(read(with_pickle(rebuilt()), tmp_path), torch.arange(24.0))
    assert torch.equal(read(with_pickle(rebuilt(number(4), number(5) + b"\x85", number(4) + b"\x85")), tmp_path),
                       torch.arange(4.0, 24.0, 4.0))  # fmt: skip
    huge = b"\x8a\x06" + (2**40).to_bytes(6, "little")
    below = [{"offset": number(-1)}, {"size": number(-2) + b"\x85"}, {"stride": number(-1) + b"\x85"}]
    beyond = [{"offset": number(1)}, {"size": number(25) + b"\x85"}, {"stride": number(2) + b"\x85"}]
    others = [
        {"size": huge + b"\x85", "stride": b"K\x00\x85"},  # 2^40 elements of four bytes
        {"size": huge + huge + b"\x86", "stride": b"K\x00K\x00\x86"},
        {"stride": huge + b"\x85"}, {"offset": huge}, {"count": number(10**9)}, {"count": number(-1)},
        {"count": b"K\x05"}, {"count": huge}, {"count": b"G?\xf0\x00\x00\x00\x00\x00\x00"}, {"offset": b"\x88"},
        {"size": b"K\x18K\x01\x86"}, {"size": b"N"}, {"size": b"]"}, {"size": b"\x88\x85"},
        {"key": b"X\x01\x00\x00\x009"}, {"key": b"X\x0b\x00\x00\x00../data.pkl"}, {"key": b"N"},
        {"size": b"(" + b"K\x01" * 100 + b"t", "stride": b"(" + b"K\x01" * 100 + b"t"},
    ]  # fmt: skip
    for change in below + beyond + others:
        assert refusal(with_pickle(rebuilt(**change)), tmp_path), change


def test_booleans_are_true_or_false(tmp_path):
    content = rezipped(saved({"a": WHOLE > 3}), lambda name, data: bytes([7] * 24) if name == "data/0" else data)
    assert "neither true nor false" in refusal(content, tmp_path)


BOMBS = {
    "a key of nested tuples": b"\x80\x02}K\x01" + b"\x85" * 10**5 + b"K\x02s.",
    "nested tuples": b"\x80\x02K\x01" + b"\x85" * 10**5 + b".",
    "very many parts": b"\x80\x02(" + b"N" * 1_100_000 + b"t.",
    "nested lists": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "a table of itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "lists of the same lists": b"\x80\x02]q\x00"
    + b"".join(b"](" + b"h%c" % i * 30 + b"eq%c" % (i + 1) for i in range(40))
    + b".",
    "a text many times over": b"\x80\x02X\xa0\x86\x01\x00"
    + b"a" * 10**5
    + b"q\x00c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02("
    + b"h\x01h\x00h\x02\x86R" * 10**4 + b"t.",
    "a place that is empty": b"\x80\x02h\x07.",
    "an empty stack": b"\x80\x02.",
    "no mark": b"\x80\x02t.",
    "no end": b"\x80\x02N",
    "a long text": b"\x80\x02X\xff\xff\xff\xff" + b"a" * 100 + b".",
    "an operation of other protocols": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
    "an extension": b"\x80\x02\x82\x01.",
    "an instance": b"\x80\x02(ios\nsystem\n.",
    "an object": b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00lso.",
    "a list as a function": b"\x80\x02])R.",
    "a text of another kind": b"\x80\x02Vabc\n.",
    "a function as data": b"\x80\x02c_codecs\nencode\n.",
    "a storage as data": b"\x80\x02ctorch\nFloatStorage\n.",
    "a state for nothing": b"\x80\x02N}b.",
    "a state for a list": b"\x80\x02]}b.",
    "attributes of a table": b"\x80\x02ccollections\nOrderedDict\n)R}X\x07\x00\x00\x00__dict__]sb.",
    "a reference to no storage": b"\x80\x02X\x01\x00\x00\x00xQ.",
    "an unhashable set": b"\x80\x02c__builtin__\nset\n]]a\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_are_made_to_hurt(name, tmp_path):
    assert refusal(with_pickle(BOMBS[name]), tmp_path)
    assert refusal(BOMBS[name], tmp_path)
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    assert refusal(legacy + BOMBS[name], tmp_path)


def test_a_far_place_to_remember_takes_no_memory(tmp_path):
    assert read(with_pickle(b"\x80\x02Nr\xff\xff\xff\xff."), tmp_path) is None


def test_archives_that_are_made_to_hurt(tmp_path):
    honest = saved({"a": WHOLE})
    assert torch.equal(read(rezipped(honest), tmp_path)["a"], WHOLE)
    text = b"\x80\x02X" + (10**8).to_bytes(4, "little") + b"a" * 10**8 + b"."
    assert "compressed" in refusal(with_pickle(text, method=zipfile.ZIP_DEFLATED), tmp_path)
    with pytest.warns(UserWarning, match="Duplicate"):
        content = rezipped(honest, twice="archive/data.pkl")
    assert "twice" in refusal(content, tmp_path)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "another kind of ZIP" in refusal(other.getvalue(), tmp_path)
    big = rezipped(honest, lambda name, data: b"big" if name == "byteorder" else data)
    assert "another order" in refusal(big, tmp_path)
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), script)
    assert refusal(script.getvalue(), tmp_path)


def test_parts_that_lie_on_each_other(tmp_path):
    """Entries of an archive that all point at the same bytes, so that they are longer than the file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data/0", bytes(10**5))
        entry = archive.getinfo("archive/data/0")
        for index in range(1, 100):
            again = zipfile.ZipInfo(f"archive/data/{index}")
            again.header_offset, again.file_size, again.compress_size = entry.header_offset, 10**5, 10**5
            again.CRC = entry.CRC
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
            archive._didModify = True
    assert "longer than itself" in refusal(out.getvalue(), tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_any_damage(zipped, tmp_path):
    """Cut short, or with bytes turned over: an error, or values of the same kinds."""
    whole, rng, refused = saved(HONEST, zipped), random.Random(0), 0
    rounds = 300 * max(1, int(os.environ.get("PRUNE_MM_STRESS", "0")))
    for _ in range(rounds):
        data = bytearray(whole)
        kind = rng.randrange(4)
        if kind == 0:
            data = data[: rng.randrange(len(data))]
        elif kind == 1:
            data += rng.randbytes(rng.choice([1, 30, 1000]))
        else:
            for _ in range(rng.choice([1, 4, 64])):
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            found = read(bytes(data), tmp_path)
        except ValueError:
            refused += 1
        else:
            check_tree(found)
    assert refused > rounds // 4


def test_any_pickle_in_an_archive(tmp_path):
    """The pickle itself changed, so that no checksum tells."""
    whole, rng = saved(HONEST), random.Random(1)
    original, operations = pickle_of(whole), [bytes([code]) for code in range(256)]
    for _ in range(200 * max(1, int(os.environ.get("PRUNE_MM_STRESS", "0")))):
        data = bytearray(original)
        for _ in range(rng.choice([1, 2, 8])):
            place = rng.randrange(2, len(data))
            if rng.random() < 0.5:
                data[place] = rng.randrange(256)
            elif rng.random() < 0.5:
                del data[place : place + rng.randrange(1, 8)]
            else:
                data[place:place] = rng.choice(operations) * rng.randrange(1, 4)
        with contextlib.suppress(ValueError):
            check_tree(read(with_pickle(bytes(data), whole), tmp_path))


def check_tree(value) -> None:
    """Nothing but data, that one can walk through and compute with."""
    if isinstance(value, dict):
        for key, item in value.items():
            assert isinstance(key, (str, int, float, type(None)))
            check_tree(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            check_tree(item)
    elif isinstance(value, torch.Tensor):
        assert type(value) is torch.Tensor
        value.clone().sum()
    else:
        kinds = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
        assert isinstance(value, kinds), type(value)
