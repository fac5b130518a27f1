"""What others do with a finished run's folder. Each test skips where its package is not installed."""

import pytest
import sft
from conftest import ROOT


def test_trl_continues_from_the_saved_model(tmp_path, monkeypatch):
    """TRL's DPOTrainer loads model/ with its tokenizer and takes two steps on the committed pairs."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
    from datasets import load_dataset

    monkeypatch.chdir(ROOT)
    dataset = tmp_path / "few.jsonl"
    dataset.write_text("".join(open("data/demonstrations.jsonl").readlines()[:64]))
    sft.main(
        sft.Args(dataset=str(dataset), eval_dataset=str(dataset), output_dir=str(tmp_path / "run"), device="cpu")
    )
    pairs = load_dataset("json", data_files="data/preferences.jsonl", split="train[:16]").remove_columns("mu")
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=8, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no")  # fmt: skip
    trainer = trl.DPOTrainer(model=str(tmp_path / "run" / "model"), args=config, train_dataset=pairs)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[-1]["train_loss"] > 0
