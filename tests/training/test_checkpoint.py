import errno
import json
import os

import pytest
import torch

from ling_flow.data.batches import Batches
from ling_flow.data.drawn import Drawn
from ling_flow.errors import UserError
from ling_flow.model.hf import load_pretrained
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training import checkpoint
from ling_flow.training.checkpoint import (
    contents_of,
    drop_training_state,
    latest_checkpoint,
    list_checkpoints,
    load_training_state,
    save_checkpoint,
    verify_checkpoint,
)
from ling_flow.training.loop import train
from ling_flow.training.optimizer import build_optimizer
from ling_flow.training.settings import TrainingState
from tests.training.micro import micro_model, stage_settings

SETTINGS = stage_settings()


def state_at(step):
    return TrainingState(
        stage="short", step=step, stage_start=0, tokens=step * 64, tokens_before=0,
        skipped_steps=0, seconds=1.5, load_violation=0.25, settings=SETTINGS,
        drawn_before={}, drawn={"words": Drawn(tokens=step * 64, order="")},
    )  # fmt: skip


@pytest.fixture
def trained(corpus):
    """A model and its optimizer after two steps."""
    model = BailingMoeV2ForCausalLM(micro_model())
    model.init_weights(seed=0)
    optimizer = build_optimizer(model, SETTINGS.optimizer)
    train(model, optimizer, Batches(corpus, {"words": 1}, 16, 4, seed=0), steps=2, schedule=lambda step: 1e-3)
    return model, optimizer


def test_checkpoint_is_a_model_directory_that_gives_back_every_bit(trained, corpus, tmp_path):
    model, optimizer = trained
    path = save_checkpoint(tmp_path, contents_of(model, optimizer, state_at(2)), corpus.path / "tokenizer")
    assert path.name == "step-00000002"
    assert (path / "config.json").exists() and (path / "tokenizer.json").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    verify_checkpoint(path)

    loaded = load_pretrained(path)
    again = build_optimizer(loaded, SETTINGS.optimizer)
    assert load_training_state(path, loaded, again) == state_at(2)
    names = {name: parameter for name, parameter in model.named_parameters()}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, names[name])
        for key, value in optimizer.state[names[name]].items():
            assert torch.equal(again.state[parameter][key], value), (name, key)
    assert len(again.state) == len(optimizer.state) == len(names)


def test_nothing_is_pickled(trained, corpus, tmp_path):
    path = save_checkpoint(tmp_path, contents_of(*trained, state_at(2)), corpus.path / "tokenizer")
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "training_state/optimizer.safetensors", "training_state/state.json"]
)
def test_one_flipped_bit_is_found_and_the_checkpoint_before_it_taken(trained, tmp_path, name):
    good = save_checkpoint(tmp_path, contents_of(*trained, state_at(1)))
    bad = save_checkpoint(tmp_path, contents_of(*trained, state_at(2)))
    data = bytearray((bad / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bad / name).write_bytes(data)
    lines = []
    assert latest_checkpoint(tmp_path, lines.append) == good
    assert len(lines) == 1 and f"step-00000002/{name}: damaged" in lines[0]
    with pytest.raises(UserError, match="SHA-256"):
        verify_checkpoint(bad)


def test_missing_cut_and_unlisted_files_are_found(trained, tmp_path):
    path = save_checkpoint(tmp_path, contents_of(*trained, state_at(1)))
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match=rf"model.safetensors: damaged \({len(whole) - 1} bytes instead of {len(whole)}\)"
    ):
        verify_checkpoint(path)
    weights.unlink()
    with pytest.raises(UserError, match=r"model.safetensors: missing"):
        verify_checkpoint(path)
    listing = path / "training_state" / "files.json"
    whole = listing.read_text()
    for damaged in ("{", "[]", "{}", whole.replace("bytes", "bytds", 1), whole.replace("config.json", "konfig.json")):
        listing.write_text(damaged)
        with pytest.raises(UserError, match=r"files.json: damaged"):
            verify_checkpoint(path)
    listing.unlink()
    assert latest_checkpoint(tmp_path, lambda line: None) is None


def test_one_that_cannot_be_read_is_skipped_like_a_damaged_one(trained, tmp_path, monkeypatch):
    good = save_checkpoint(tmp_path, contents_of(*trained, state_at(1)))
    bad = save_checkpoint(tmp_path, contents_of(*trained, state_at(2)))
    read = checkpoint._sha256

    def fails(path):
        if path == bad / "model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(checkpoint, "_sha256", fails)
    lines = []
    assert latest_checkpoint(tmp_path, lines.append) == good
    assert lines == [f"checkpoint skipped: {bad / 'model.safetensors'}: cannot be read (Input/output error)"]


def test_a_directory_of_another_name_is_no_checkpoint(trained, tmp_path):
    path = save_checkpoint(tmp_path, contents_of(*trained, state_at(1)))
    path.with_name("step-00000002.bak").mkdir()
    assert latest_checkpoint(tmp_path, lambda line: None) == path


def test_checkpoint_without_training_state_is_a_model_but_no_place_to_resume(trained, tmp_path):
    older = save_checkpoint(tmp_path, contents_of(*trained, state_at(1)))
    newest = save_checkpoint(tmp_path, contents_of(*trained, state_at(2)))
    drop_training_state(newest)
    load_pretrained(newest)
    lines = []
    assert latest_checkpoint(tmp_path, lines.append) == older
    assert lines == []
    assert list_checkpoints(tmp_path) == [older, newest]
    model = load_pretrained(newest)
    with pytest.raises(UserError, match="training cannot go on from step-00000002"):
        load_training_state(newest, model, build_optimizer(model, SETTINGS.optimizer))


def test_saving_again_replaces(trained, tmp_path):
    path = save_checkpoint(tmp_path, contents_of(*trained, state_at(1)))
    (path / "model.safetensors").write_bytes(b"damaged")
    assert save_checkpoint(tmp_path, contents_of(*trained, state_at(1))) == path
    verify_checkpoint(path)


def test_training_state_of_another_model_is_refused(trained, tmp_path):
    path = save_checkpoint(tmp_path, contents_of(*trained, state_at(1)))
    wider = BailingMoeV2ForCausalLM(micro_model(moe_intermediate_size=24))
    with pytest.raises(UserError, match=r"moments of .* have shape"):
        load_training_state(path, wider, build_optimizer(wider, SETTINGS.optimizer))
    shallower = BailingMoeV2ForCausalLM(micro_model(num_nextn_predict_layers=0))
    with pytest.raises(UserError, match="which the model does not have"):
        load_training_state(path, shallower, build_optimizer(shallower, SETTINGS.optimizer))


def test_state_says_where_the_run_stands(trained, tmp_path):
    path = save_checkpoint(tmp_path, contents_of(*trained, state_at(7)))
    state = json.loads((path / "training_state" / "state.json").read_text())
    assert (state["step"], state["tokens"], state["tokens_before"]) == (7, 448, 0)
    assert state["settings"]["optimizer"]["learning_rate"] == 3e-3
