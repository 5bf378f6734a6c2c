"""Hugging Face datasets, written here with pyarrow in the layout of `datasets.save_to_disk` 5.2 and of the Hub."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from ling_flow.config import identity_of
from ling_flow.data.documents import documents, pin
from ling_flow.data.files import Reading
from ling_flow.data.sources import FilesSource
from ling_flow.errors import UserError

TEXTS = [f"document {number}" for number in range(25)]


def dataset(path: Path | str, **fields: Any) -> FilesSource:
    return FilesSource(name="mine", paths=[str(path)], format="hf_dataset", **fields)


def read(source: FilesSource) -> list[str]:
    return list(documents(source, seed=0))


def save_to_disk(folder: Path, texts: list[str], shards: int = 3) -> Path:
    """What `Dataset.from_dict({"text": texts, "n": …}).save_to_disk(folder, num_shards=shards)` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    size = -(-len(texts) // shards)
    for shard, name in enumerate(names):
        part = texts[shard * size : (shard + 1) * size]
        table = pyarrow.table({"text": part, "n": list(range(len(part)))})
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    features = {"text": {"dtype": "string", "_type": "Value"}, "n": {"dtype": "int64", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps({"description": "", "features": features}))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "00d96680c82b5446", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def save_dict(folder: Path, **splits: list[str]) -> Path:
    for split, texts in splits.items():
        save_to_disk(folder / split, texts, shards=1)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def hub(folder: Path, *names: str) -> Path:
    """A repository of parquet files, each of which holds its own name."""
    for name in names:
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table({"text": [name]}), path)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_a_saved_dataset_is_read_in_the_order_of_its_shards(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", TEXTS)
    (folder / "cache-1234.arrow").write_bytes(b"left by Dataset.map, not part of the data")
    assert read(dataset(folder)) == TEXTS
    assert read(dataset(f"file://{folder}/")) == TEXTS
    assert read(dataset(folder, max_documents=7)) == TEXTS[:7]


def test_a_saved_dataset_dict_is_read_by_split(tmp_path: Path) -> None:
    folder = save_dict(tmp_path / "saved", train=TEXTS[:20], test=TEXTS[20:])
    assert read(dataset(folder)) == read(dataset(folder, split="train")) == TEXTS[:20]
    assert read(dataset(folder, split="test")) == read(dataset(folder / "test")) == TEXTS[20:]
    with pytest.raises(UserError, match=r"saved: has no split 'dev'; it has train, test; set split"):
        read(dataset(folder, split="dev"))
    with pytest.raises(UserError, match=r"is one Dataset, without splits; leave split out \(got 'train'\)"):
        read(dataset(folder / "test", split="train"))


def test_on_any_file_system(tmp_path: Path) -> None:
    folder = save_dict(tmp_path / "saved", train=TEXTS)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/saved", recursive=True)
    assert read(dataset("memory://bucket/saved")) == TEXTS
    assert pin(dataset("memory://bucket/saved")).digest == pin(dataset(folder)).digest


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"], None, [0, 1]),
        (["data/train_gen-00000-of-00001", "data/train_sft-00000-of-00001"], "train_sft", [1]),
        (["default/test/0000", "default/train/0000", "default/train/0001"], None, [1, 2]),
        (["test", "train"], "test", [0]),
        (["part_a", "part_b"], None, [0, 1]),
    ],
)
def test_parquet_as_on_the_hub(tmp_path: Path, names: list[str], split: str | None, expected: list[int]) -> None:
    assert read(dataset(hub(tmp_path / "repo", *names), split=split)) == [names[at] for at in expected]


@pytest.mark.parametrize(
    ("names", "split", "complaint"),
    [
        (["data/train-00000-of-00001"], "test", "has no parquet files of split 'test'; it has train; set split"),
        (["a", "b"], "test", "has no parquet files of split 'test'; set split"),
        (["en/train", "de/train"], None, r"holds split 'train' in several folders \(de, en\); name one of them"),
        (
            ["data/train-00000-of-00012", "data/train-00003-of-00012", "data/test-00000-of-00002"],
            None,
            r"data/train-00001-of-00012\.parquet is missing \(2 of 12 files are there\); fetch the rest",
        ),
        ([], None, "holds no dataset: neither state.json nor dataset_dict.json"),
    ],
)
def test_what_the_hub_layout_leaves_open_is_refused(
    tmp_path: Path, names: list[str], split: str | None, complaint: str
) -> None:
    (tmp_path / "repo").mkdir()
    with pytest.raises(UserError, match=rf"sources\.mine\.paths: .*repo: {complaint}"):
        read(dataset(hub(tmp_path / "repo", *names), split=split))


def test_damage_is_named(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", TEXTS)

    def complaint(**fields: Any) -> str:
        with pytest.raises(UserError) as caught:
            read(dataset(folder, **fields))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "data-00000-of-00003.arrow: no column 'body'; it has text, n; set text_field" in complaint(text_field="body")
    assert "data-00000-of-00003.arrow: row 1: field 'n' must be text, not int" in complaint(text_field="n")
    shard = folder / "data-00001-of-00003.arrow"
    shard.write_bytes(shard.read_bytes()[:-300])
    assert f"{shard}: not a whole Arrow stream" in complaint()
    shard.unlink()
    assert f"{shard}: cannot be read (No such file or directory)" in complaint()
    (folder / "state.json").write_text('{"_data_files": [')
    assert "state.json: must be a JSON object with a list '_data_files'" in complaint()
    (folder / "state.json").write_text('{"_data_files": ["a.arrow"]}')
    assert "state.json: '_data_files' must list objects with a 'filename'" in complaint()


def test_a_directory_without_the_format_and_a_split_without_a_dataset_are_refused(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", TEXTS)
    with pytest.raises(UserError, match=r"saved: is a directory; give a pattern such as .* or format hf_dataset"):
        read(FilesSource(name="mine", paths=[str(folder)]))
    with pytest.raises(UserError, match="nowhere: no such directory"):
        read(dataset(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="split: only format hf_dataset has splits"):
        FilesSource(name="mine", paths=["a.parquet"], split="train")


def test_content_bears_identity_and_place_does_not(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", TEXTS)
    pinned = pin(dataset(folder))
    moved = folder.rename(tmp_path / "moved")
    assert identity_of(pin(dataset(moved))) == identity_of(pinned)
    other = save_to_disk(tmp_path / "other", [*TEXTS[:-1], "another document"])
    assert pin(dataset(other)).digest != pinned.digest


def test_how_far_it_has_been_read(tmp_path: Path) -> None:
    reading = Reading()
    shares = [reading.share for _ in documents(dataset(save_to_disk(tmp_path / "saved", TEXTS)), 0, reading)]
    assert shares == sorted(shares) and 0 < shares[0] < 0.5 < shares[-1] <= 1
