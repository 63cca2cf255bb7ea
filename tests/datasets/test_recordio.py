"""RecordIO that tools/make_recordio.py packs: what DALI reads, what MXNet defined, the same batches as the folder."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from photos import TRAIN, VAL, make_photos
from PIL import Image

from prune_mm.datasets.recordio import (
    MAGIC,
    RecordIODataset,
    frame_record,
    pack_image_record,
    parse_image_record,
    parse_record,
)
from prune_mm.engine.launch import check_data

dali = pytest.importorskip("nvidia.dali", reason="needs nvidia-dali-cuda130, see requirements/tests.txt")
MAGIC_BYTES = struct.pack("<I", MAGIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, _quick):
    init_default_scope("mmpretrain")
    return make_photos(tmp_path_factory.mktemp("photos") / "imagenet")


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory):
    """Prefix of the packed validation split, made by the tool as a user would."""
    folder = tmp_path_factory.mktemp("records")
    end = tiny.tool(folder, "make_recordio.py", "pack", "val", photos / "val", "--pass-through", "--threads", 3)
    assert end.status == 0, end
    assert "25 images" in end.out
    return folder / "val"


def read_by_hand(prefix):
    """An independent reader: walks over the file by its lengths, and knows nothing of the index."""
    data, at, records = Path(f"{prefix}.rec").read_bytes(), 0, []
    while at < len(data):
        magic, length, flag, label, key, _ = struct.unpack_from("<IIIfQQ", data, at)
        assert (magic, flag) == (0xCED7230A, 0)
        assert length < 1 << 29
        records.append((key, label, at, data[at + 32 : at + 8 + length]))
        at += 8 + (length + 3) // 4 * 4
    return records


def read_with_dali(record_file, index_file, count):
    pipeline = dali.Pipeline(count, 1, None, seed=0)
    with pipeline:
        pipeline.set_outputs(*dali.fn.readers.mxnet(path=str(record_file), index_path=str(index_file)))
    images, labels = pipeline.run()
    return [(float(np.asarray(labels[i])[0]), bytes(np.asarray(images[i]))) for i in range(count)]


def config_of(dataset, pipeline, shuffle=False):
    return {
        "type": "prune_mm.DALIDataLoader",
        "device": "cpu",
        "batch_size": 4,
        "num_workers": 0,
        "dataset": {**dataset, "pipeline": pipeline},
        "sampler": {"type": "DefaultSampler", "shuffle": shuffle},
    }


def loader_of(packed, pipeline=VAL, **options):
    dataset = {"type": "prune_mm.RecordIODataset", "data_root": str(packed.parent), "rec_file": "val.rec"}
    return Runner.build_dataloader(config_of(dataset, pipeline, **options), seed=1)


def test_files_are_packed_byte_by_byte_in_the_order_of_mmpretrain(photos, packed):
    files = [file for folder in sorted((photos / "val").iterdir()) for file in sorted(folder.iterdir())]
    index = [tuple(map(int, line.split("\t"))) for line in Path(f"{packed}.idx").read_text().splitlines()]
    records = read_by_hand(packed)
    assert [(key, at) for key, _, at, _ in records] == index
    assert [image for *_, image in records] == [file.read_bytes() for file in files]
    assert [int(label) for _, label, *_ in records] == [int(file.parent.name[1:]) for file in files]
    lines = Path(f"{packed}.lst").read_text().splitlines()
    assert lines[3] == f"3\t0.000000\t{files[3].relative_to(photos / 'val')}"
    assert read_with_dali(f"{packed}.rec", f"{packed}.idx", 25) == [(label, image) for _, label, _, image in records]


@pytest.mark.parametrize("pipeline", [VAL, TRAIN], ids=["val", "train"])
def test_records_give_the_batches_of_the_folder(photos, packed, pipeline):
    folder = {"type": "CustomDataset", "data_root": str(photos), "data_prefix": "val"}
    expected = Runner.build_dataloader(config_of(folder, pipeline, shuffle=pipeline is TRAIN), seed=1)
    ours = loader_of(packed, pipeline, shuffle=pipeline is TRAIN)
    assert ours.dataset.metainfo["classes"] == ours.dataset.CLASSES == list(expected.dataset.CLASSES)
    for epoch in range(2):
        for loader in (expected, ours):
            loader.sampler.set_epoch(epoch)
        for theirs, batch in zip(expected, ours, strict=True):
            assert torch.equal(theirs["inputs"], batch["inputs"])
            for one, other in zip(theirs["data_samples"], batch["data_samples"]):
                assert (one.gt_label, one.sample_idx) == (other.gt_label, other.sample_idx)
                assert other.img_path.startswith(f"{packed}.rec:")


@given(st.lists(st.one_of(st.binary(max_size=9), st.just(MAGIC_BYTES)), max_size=8).map(b"".join))
@settings(max_examples=300, deadline=None)
def test_content_may_hold_the_magic_number(content):
    framed = frame_record(content)
    assert len(framed) % 4 == 0
    assert parse_record(framed + b"what follows") == (content, len(framed))


def test_dali_reads_records_that_were_split(tmp_path):
    images = [b"abcd" + MAGIC_BYTES * 2 + b"xyz" + MAGIC_BYTES + b"tail", b"plain", b"ends with " + b"12" + MAGIC_BYTES]
    records = [frame_record(pack_image_record(i, i, image)) for i, image in enumerate(images)]
    (tmp_path / "x.rec").write_bytes(b"".join(records))
    starts = np.cumsum([0, *map(len, records)])[:-1]
    (tmp_path / "x.idx").write_text("".join(f"{i}\t{start}\n" for i, start in enumerate(starts)))
    assert read_with_dali(tmp_path / "x.rec", tmp_path / "x.idx", 3) == list(enumerate(images))
    assert [parse_image_record(parse_record(record)[0]) for record in records] == list(enumerate(images))


def test_several_labels_count_by_the_first():
    content = struct.pack("<IfQQ", 2, 0.0, 5, 0) + struct.pack("<ff", 7, 8) + b"image"
    assert parse_image_record(content) == (7, b"image")
    for short in (b"", content[:20], content[:32]):
        with pytest.raises(ValueError, match="record"):
            parse_image_record(short)


# -- the tool ---------------------------------------------------------------------------------------------------------


def test_images_are_scaled_down_and_compressed(photos, tmp_path):
    end = tiny.tool(tmp_path, "make_recordio.py", "pack", "small", photos / "train", "--resize", 48, "--quality", 70)
    assert end.status == 0, end
    sizes = [Image.open(io.BytesIO(image)).size for *_, image in read_by_hand(tmp_path / "small")]
    assert len(sizes) == 21
    assert {min(size) for size in sizes} == {48}
    assert sizes[0] == (64, 48)


def test_lists_come_first_can_be_shuffled_and_are_kept(photos, tmp_path):
    listed = tiny.tool(tmp_path, "make_recordio.py", "list", "deep/some", photos / "train", "--shuffle", 3)
    assert listed.status == 0, listed
    lines = (tmp_path / "deep/some.lst").read_text().splitlines()
    assert lines != sorted(lines, key=lambda line: line.split("\t")[2])
    (tmp_path / "deep/some.lst").write_text("\n".join(lines[:5]) + "\n")
    end = tiny.tool(tmp_path, "make_recordio.py", "pack", "deep/some", photos / "train", "--pass-through")
    assert end.status == 0, end
    images = [image for *_, image in read_by_hand(tmp_path / "deep/some")]
    assert images == [(photos / "train" / line.split("\t")[2]).read_bytes() for line in lines[:5]]


def test_an_annotation_file_gives_the_labels(photos, tmp_path):
    words = ("make_recordio.py", "pack", "val", photos / "val", "--ann-file", photos / "meta/val.txt", "--pass-through")
    assert tiny.tool(tmp_path, *words).status == 0
    assert [int(label) for _, label, *_ in read_by_hand(tmp_path / "val")] == [2, 1, 0, 2, 1, 0]


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (None, ["pack", "x", "{root}/nowhere"], "no folder '{root}/nowhere'"),
        (None, ["pack", "x", "{root}/meta"], "'{root}/meta' holds no images in folders, one folder a class"),
        (
            None,
            ["pack", "x", "{root}/train", "--pass-through", "--resize", 9],
            "--pass-through leaves files as they are",
        ),
        (None, ["pack", "x", "{root}/train", "--quality", 0], "--quality is 0; it must be from 1 to 100"),
        ("x.rec", ["pack", "x", "{root}/train"], "'x.rec' is there already"),
        ("x.lst", ["pack", "x", "{root}/train"], "'x.lst', line 1: 'mine' is not 'key<TAB>label<TAB>path'"),
        ("{root}/train/n0001/0.JPEG", ["pack", "x", "{root}/train"], "'{root}/train/n0001/0.JPEG' cannot be decoded"),
    ],
)
def test_the_tool_refuses_and_leaves_nothing_behind(tmp_path, change, words, message):
    root = make_photos(tmp_path / "photos", 2, 1)
    if change:
        (tmp_path / change.format(root=root)).write_text("mine")
    before = {file.name for file in tmp_path.iterdir()}
    end = tiny.tool(tmp_path, "make_recordio.py", *(str(word).format(root=root) for word in words))
    assert message.format(root=root) in end.one_line_error
    left = {file.name for file in tmp_path.iterdir() if not file.name.startswith("process_")}
    assert left - before <= {"x.lst", "x.classes.txt"}
    if change:
        assert (tmp_path / change.format(root=root)).read_text() == "mine"


# -- bad files --------------------------------------------------------------------------------------------------------


def copy_of(packed, folder):
    for suffix in ("rec", "idx"):
        (folder / f"val.{suffix}").write_bytes(Path(f"{packed}.{suffix}").read_bytes())
    return folder / "val.rec", folder / "val.idx"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rec, idx: idx.write_text(""), "lists no records"),
        (lambda rec, idx: idx.write_text("0\tzero\n"), "is no index"),
        (lambda rec, idx: idx.write_text("0\n1\n"), "is no index"),
        (lambda rec, idx: idx.write_text("0\t0\n1\t99999999\n"), "does not belong to"),
        (lambda rec, idx: idx.write_text("0\t0\n1\t-8\n"), "does not belong to"),
        (lambda rec, idx: idx.write_text("0\t0\n1\t400\n"), "no whole record at byte 400"),
        (lambda rec, idx: rec.write_bytes(rec.read_bytes()[:-9]), "is cut short or its .idx file is another's"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(packed, tmp_path, change, message):
    rec, idx = copy_of(packed, tmp_path)
    change(rec, idx)
    with pytest.raises(ValueError, match=message) as error:
        RecordIODataset(str(rec))
    assert str(tmp_path) in str(error.value)


def test_missing_files_are_named(packed, tmp_path):
    config = Config({"val_dataloader": {"dataset": {"type": "prune_mm.RecordIODataset", "rec_file": "gone.rec"}}})
    with pytest.raises(FileNotFoundError, match=r"val_dataloader: 'gone.rec' is missing.*tools/make_recordio.py"):
        check_data(config, "val_dataloader")
    (tmp_path / "val.rec").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"val\.idx' is missing; tools/make_recordio\.py writes"):
        RecordIODataset("val.rec", str(tmp_path))


@pytest.mark.parametrize("damage", ["header", "image"])
def test_a_damaged_record_is_named(packed, tmp_path, damage):
    rec, idx = copy_of(packed, tmp_path)
    start = int(idx.read_text().splitlines()[5].split("\t")[1])
    data = bytearray(rec.read_bytes())
    at = start if damage == "header" else start + 32
    data[at : at + 8] = b"\0" * 8
    rec.write_bytes(data)
    message = rf"'{rec}' at byte {start}: no record" if damage == "header" else rf"'{rec}:5' cannot be decoded"
    with pytest.raises(ValueError, match=message):
        list(loader_of(tmp_path / "val"))


def test_pytorchs_loader_says_who_reads_records(packed):
    with pytest.raises(TypeError, match=r"prune_mm\.DALIDataLoader"):
        RecordIODataset(f"{packed}.rec")[0]
