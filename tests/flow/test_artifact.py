"""Artifacts: whole or not there, verified when read, here and on an object store."""

import hashlib
import json
import os
import uuid
from pathlib import Path

import fsspec
import pytest

from ling_flow.errors import UserError
from ling_flow.flow.artifact import MANIFEST, SCHEMA_VERSION, ArtifactStore, Manifest, OutputRecord, Ref, normal_root

KEY = "0123456789abcdef"


def make(store: ArtifactStore, text: str = "weights") -> Manifest:
    """A committed artifact with two outputs, one of them nested, one empty."""
    partial = store.partial("train", KEY)
    (partial / "model" / "deep").mkdir(parents=True)
    (partial / "log").mkdir()
    (partial / "model" / "deep" / "a.bin").write_text(text)
    (partial / "model" / "b.bin").write_text("b")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        component="train",
        label="train_short",
        version=1,
        fingerprint=KEY,
        config={"a": 1},
        identity={"a": 1},
        inputs={},
        outputs={
            "model": OutputRecord(kind="system.Model", contract={"vocab_size": 8}),
            "log": OutputRecord(kind="system.Metrics", contract={}),
        },
        result={"loss": 0.5},
        files=store.describe_files("train", KEY),
        code_version="0",
        created="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )
    store.commit(manifest)
    return manifest


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    root = str(tmp_path / "artifacts") if request.param == "local" else f"memory://bucket-{uuid.uuid4().hex}/artifacts"
    return ArtifactStore(root, tmp_path / "cache")


def elsewhere(store: ArtifactStore, tmp_path: Path) -> ArtifactStore:
    """The same root seen from a machine without a cache."""
    return ArtifactStore(store.root, tmp_path / "other-cache")


def change(store: ArtifactStore, name: str, content: bytes | None) -> None:
    """Overwrite or (None) delete a file of the artifact behind the store's back."""
    url = f"{store.root}/train/{KEY}/{name}"
    fs, path = fsspec.core.url_to_fs(url)
    if content is None:
        fs.rm_file(path)
    else:
        fs.pipe_file(path, content)


def test_commit_and_read_back(store: ArtifactStore, tmp_path: Path) -> None:
    manifest = make(store)
    reader = elsewhere(store, tmp_path)
    assert reader.manifest("train", KEY) == manifest
    reader.check_sizes(manifest)
    path, again = reader.open("train", KEY, "model")
    assert (path / "deep" / "a.bin").read_text() == "weights" and again.outputs["model"].contract == {"vocab_size": 8}
    assert list(reader.open("train", KEY, "log")[0].iterdir()) == []
    assert {file.path: file.size for file in manifest.files} == {"model/b.bin": 1, "model/deep/a.bin": 7}
    assert manifest.files[0].sha256 == hashlib.sha256(b"b").hexdigest()
    assert not store.partial("train", KEY).exists()


def test_no_manifest_no_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    make(store)
    change(store, MANIFEST, None)
    reader = elsewhere(store, tmp_path)
    assert reader.manifest("train", KEY) is None and reader.manifest("train", "f" * 16) is None
    with pytest.raises(UserError, match=r"train/0123456789abcdef/model: no such artifact"):
        reader.open("train", KEY, "model")


@pytest.mark.parametrize(
    ("content", "message", "cheap"),
    [
        (None, r"model/deep/a\.bin: missing", True),
        (b"weight", r"model/deep/a\.bin: damaged, 6 bytes instead of 7", True),
        (b"weightz", r"model/deep/a\.bin: damaged, its SHA-256 differs", False),
    ],
)
def test_damage_is_named_with_its_remedy(store: ArtifactStore, tmp_path: Path, content, message, cheap) -> None:
    manifest = make(store)
    change(store, "model/deep/a.bin", content)
    reader = elsewhere(store, tmp_path)
    with pytest.raises(UserError, match=message + ".*--rebuild train_short, or delete the directory train/" + KEY):
        reader.open("train", KEY, "model")
    reader.open("train", KEY, "log")  # other outputs are not held up
    if cheap:
        with pytest.raises(UserError, match=message):
            reader.check_sizes(manifest)
    else:
        reader.check_sizes(manifest)


def test_a_second_commit_replaces_the_first(store: ArtifactStore, tmp_path: Path) -> None:
    make(store, "first")
    make(store, "second")
    path, _ = elsewhere(store, tmp_path).open("train", KEY, "model")
    assert (path / "deep" / "a.bin").read_text() == "second"
    assert [entry.name for entry in (store.local / "train").iterdir()] == [KEY]


def test_files_of_a_build_before_do_not_stay_in_the_cache(tmp_path: Path) -> None:
    store = ArtifactStore(f"memory://bucket-{uuid.uuid4().hex}", tmp_path / "cache")
    make(store)
    reader = elsewhere(store, tmp_path)
    path, _ = reader.open("train", KEY, "model")
    (path / "deep" / "model.safetensors.index.json").write_text("of the build before")
    reader.open("train", KEY, "model")
    assert sorted(found.name for found in path.rglob("*") if found.is_file()) == ["a.bin", "b.bin"]


def test_a_manifest_that_is_a_directory(store: ArtifactStore) -> None:
    if not store.remote:
        (store.local / "train" / KEY / MANIFEST).mkdir(parents=True)
        with pytest.raises(UserError, match=r"manifest\.json: is a directory; delete"):
            store.manifest("train", KEY)


def test_stale_copies_of_remote_files_are_fetched_again(tmp_path: Path) -> None:
    store = ArtifactStore(f"memory://bucket-{uuid.uuid4().hex}", tmp_path / "cache")
    make(store, "first")
    reader = elsewhere(store, tmp_path)
    reader.open("train", KEY, "model")
    make(store, "other")  # same size
    path, _ = reader.open("train", KEY, "model")
    assert (path / "deep" / "a.bin").read_text() == "other"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: b"{", "manifest.json: .*damaged or of another version: delete the directory"),
        (lambda data: b"\xff\xfe", "manifest.json: damaged, not text"),
        (lambda data: json.dumps({**data, "schema_version": 99}).encode(), "schema_version 99, but this code reads 1"),
        (lambda data: json.dumps({**data, "fingerprint": "f" * 16}).encode(), "belongs to train/ffff.*renamed"),
        (lambda data: json.dumps({**data, "more": 1}).encode(), "more: unknown field"),
        (lambda data: b'{"name": "app"}', "manifest.json: is no manifest of a step, so .* is no step's artifact$"),
    ],
)
def test_damaged_manifests(store: ArtifactStore, tmp_path: Path, edit, message) -> None:
    manifest = make(store)
    change(store, MANIFEST, edit(manifest.model_dump()))
    with pytest.raises(UserError, match=message):
        elsewhere(store, tmp_path).manifest("train", KEY)


def test_symbolic_links_are_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts", tmp_path / "cache")
    model = store.partial("train", KEY) / "model"
    model.mkdir(parents=True)
    (model / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="link: an output holds files and directories, not symbolic links"):
        store.describe_files("train", KEY)


def test_file_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts", tmp_path / "cache")
    model = store.partial("train", KEY) / "model"
    model.mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(model) + b"/caf\xe9.txt")).write_text("x")
    with pytest.raises(UserError, match=r"model/caf\\xe9\.txt: a file name of an output must be UTF-8"):
        store.describe_files("train", KEY)


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Else an orphan of a killed step would keep the next one waiting."""
    store = ArtifactStore(tmp_path / "artifacts", tmp_path / "cache")
    with store.lock("train", KEY, print):
        reader, writer = os.pipe()
        ready, begun = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.write(begun, b"x")
            os.read(reader, 1)  # until the parent lets go
            os._exit(0)
        os.read(ready, 1)

    def busy() -> None:
        raise AssertionError("the child holds the lock")

    try:
        with store.lock("train", KEY, busy):
            pass
    finally:
        os.close(writer)
        os.waitpid(child, 0)
        for descriptor in (reader, ready, begun):
            os.close(descriptor)


def test_the_root_of_the_file_system_is_a_root() -> None:
    assert normal_root("/") == normal_root("file:///") == "/"


def test_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Ref.parse("root/train/k/model/") == Ref(f"{os.getcwd()}/root", "train", "k", "model")
    assert Ref.parse("s3://bucket/deep/train/k/model") == Ref("s3://bucket/deep", "train", "k", "model")
    assert str(Ref.parse("s3://bucket/train/k/model")) == "s3://bucket/train/k/model"
    assert ArtifactStore("file:///tmp/x/", tmp_path).ref("train", "k", "model") == "/tmp/x/train/k/model"
    for text in ("/corpus", "s3://bucket/corpus"):
        with pytest.raises(UserError, match="not a step's output; expected <root>/<component>/<fingerprint>/<output>"):
            Ref.parse(text)


def test_unknown_output_and_unknown_store(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts", tmp_path / "cache")
    make(store)
    with pytest.raises(UserError, match="has no output 'weights'; outputs: model, log"):
        store.open("train", KEY, "weights")
    with pytest.raises(UserError, match="nosuch://bucket: "):
        ArtifactStore("nosuch://bucket", tmp_path)


def test_a_root_that_cannot_hold_artifacts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ArtifactStore(tmp_path / "file", tmp_path / "cache")
    with pytest.raises(UserError, match=r"file: cannot be used as artifact root \("), store.lock("train", KEY, print):
        raise AssertionError
