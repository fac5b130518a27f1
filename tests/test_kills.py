"""kill -9 at a random moment of each script and at moments that are rare, and what kills.py says of planted bugs."""

import dataclasses
import fcntl
import functools
import os
import shutil
import signal
import time
import types
from pathlib import Path

import kills
import pytest
import torch
from tiny_runs import SCRIPTS, scripts

KILLS = {kill.script: kill for kill in kills.draw(5, 1, list(SCRIPTS))}


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch):
    """6 in place of 9."""
    monkeypatch.setattr(kills, "FLAGS", {"epochs": 2, "eval_every": 3})
    monkeypatch.setattr(kills, "STEPS", 6)


@pytest.fixture(scope="module")
def kept():
    """Whole runs by script and --save-every, and the files with what they did to theirs."""
    return {}


@pytest.fixture
def whole(script, starts, kept, tmp_path, tmp_path_factory):
    """whole(save_every) -> a run that nothing stops. What it does to its files is in operations.txt. It runs once,
    whichever tests compare with it, unless it is to be another one.
    """

    def run(save_every, anew=False):
        key = script.name, save_every
        if anew or key not in kept:
            folder = tmp_path if anew else tmp_path_factory.mktemp("whole")
            prepare = functools.partial(kills.record, folder / "whole", folder / "operations.txt")
            result = kills.run_whole(script, starts, folder / "whole", save_every, prepare)
            if anew:
                return result
            kept[key] = result
        return kept[key]

    return run


def stories_at(whole, starts, folder, *wanted, anew=False) -> list[kills.Story]:
    """Of runs that are killed at these places, at the last one of each name."""
    run = whole(2, anew)
    places = {place.what: place for place in kills.places_of(run.folder.parent / "operations.txt")}
    assert set(wanted) <= set(places), list(places)
    return [kills.try_place(places[what], starts, run, folder / f"run{i}") for i, what in enumerate(wanted)]


def test_killed_at_a_random_moment(script, whole, starts, tmp_path):
    kill = KILLS[script.name]
    story = kills.try_random(kill, starts, whole(kill.save_every), tmp_path / "run")
    assert story.events and not story.wrong, str(story)


def test_moments_are_spread():
    drawn = kills.draw(100, 2, list(SCRIPTS))
    assert drawn == kills.draw(100, 2, list(SCRIPTS)) != kills.draw(100, 3, list(SCRIPTS))
    for name in SCRIPTS:
        own = [kill for kill in drawn if kill.script == name]
        assert len(own) == 20 and {kill.save_every for kill in own} == {1, 2}
        assert sum(kill.at_checkpoint for kill in own) == 8
        assert 4 <= sum(kill.share > 0.85 for kill in own) < 12
        assert 5 <= sum(kill.again is not None for kill in own) <= 8


@pytest.mark.parametrize("name, places", [
    ("sft", ("within state/checkpoint.tmp", "before os.rename state/checkpoint.tmp", "before os.mkdir model.tmp",
             "within model.tmp/tokenizer.json", "before os.rename model.tmp")),
    ("ppo", ("before os.mkdir critic", "within critic/tokenizer.json"))])
def test_killed_within_a_save(whole, starts, tmp_path, places):
    """A checkpoint that is half on the disk, or not yet in place; args.json is there, and no model/; half a folder."""
    for story in stories_at(whole, starts, tmp_path, *places):
        assert story.events and not story.wrong, str(story)


@scripts("sft")
@pytest.mark.parametrize("place", [
    "within model.tmp/model.safetensors",  # safetensors' own temporary file could stay in model/
    "before os.rmdir state"])  # state/ could stay beside model/
def test_killed_where_something_may_be_left_over(whole, starts, tmp_path, place):
    (story,) = stories_at(whole, starts, tmp_path, place)
    assert story.events and not story.wrong, str(story)


def test_child_and_parent_share_no_open_file(tmp_path):
    """A lock is released when the parent closes its file, whatever its children do, and output is the child's own."""
    def main(args):
        print("started")
        time.sleep(60)

    file = open(tmp_path / "lock", "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    log = tmp_path / "log"
    child = kills.Child(types.SimpleNamespace(module=types.SimpleNamespace(main=main)), None, log)
    try:
        while not (log.exists() and log.read_text().endswith("started\n")):
            assert not child.ended(), log.read_text()
        file.close()
        with open(tmp_path / "lock", "w") as again:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        assert child.kill()
    assert child.code == -signal.SIGKILL


# ---- kills.py finds what is wrong ----

LATE = kills.Kill("sft", 2, 0.7, False, None)  # between the steps 3 and 4: step 2 is long saved


@scripts("sft")
@pytest.mark.parametrize("again", [None, 0.5])
def test_an_optimizer_that_is_forgotten(whole, starts, tmp_path, monkeypatch, again):
    """The weights that follow are others, and so is what is logged."""
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: None)
    kill = dataclasses.replace(LATE, again=again)
    story = kills.try_random(kill, starts, whole(2), tmp_path / "run")
    assert "resumed" in story.events[1]
    assert any(what.startswith("metrics.jsonl:") and "loss" in what for what in story.wrong), story
    assert "model/model.safetensors differs" in story.wrong


@scripts("sft")
def test_a_resumed_run_that_fails(whole, starts, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("colour")

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", fail)
    story = kills.try_random(LATE, starts, whole(2), tmp_path / "run")
    assert any("KeyError: 'colour'" in line for line in story.wrong) and "model is missing" in story.wrong


@scripts("sft")
def test_a_model_folder_that_is_filled_in_place(whole, starts, tmp_path, monkeypatch):
    """Killed before its last file, it looks finished."""
    replace = os.replace

    def copy(source, target):
        if Path(source).name != "model.tmp":
            return replace(source, target)
        os.mkdir(target)
        for path in sorted(Path(source).iterdir()):
            shutil.copy(path, target)
        shutil.rmtree(source)

    monkeypatch.setattr(os, "replace", copy)
    (story,) = stories_at(whole, starts, tmp_path, "before open model/tokenizer_config.json", anew=True)
    assert "model/tokenizer_config.json is missing while there is a model/" in story.wrong


@scripts("sft")
def test_a_checkpoint_that_is_written_in_place(whole, starts, tmp_path, monkeypatch):
    """Half of it is on the disk, and nothing can be resumed."""
    save, replace = torch.save, os.replace

    def skip(source, target):
        if Path(target).name != "checkpoint.pt":
            replace(source, target)

    monkeypatch.setattr(torch, "save", lambda state, path: save(state, path.with_suffix(".pt")))
    monkeypatch.setattr(os, "replace", skip)
    (story,) = stories_at(whole, starts, tmp_path, "within state/checkpoint.pt", anew=True)
    assert story.events[1] == "resumed from a broken checkpoint"
    assert story.wrong[0].startswith("ended with 2: error: --resume: cannot read"), story.wrong
