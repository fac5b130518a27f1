"""What others do with a finished run's folder. Each test skips where its package is not installed."""

import copy
import json

import pytest
import reward_model
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


CHAT = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


def test_trl_gets_our_raw_scores_from_the_saved_reward_model(tmp_path, monkeypatch):
    """TRL's GRPOTrainer with the folder as its reward: what it computes of conversations in a template that ends
    an answer with the EOS is what --score writes for them. (From texts it strips the EOS before it scores.)
    """
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
    from datasets import Dataset
    from transformers import AutoTokenizer

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    def talk(row):
        """The same pair as messages."""
        said = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        return {**row, **said, "prompt": [{"role": "user", "content": row["prompt"]}]}

    pairs = [talk(json.loads(line)) for line in open(ROOT / "data" / "preferences.jsonl").readlines()[:64]]
    monkeypatch.chdir(ROOT)
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text("".join(open("data/demonstrations.jsonl").readlines()[:64]))
    sft.main(sft.Args(dataset=str(demonstrations), eval_dataset=str(demonstrations), device="cpu",
                      output_dir=str(tmp_path / "sft")))  # fmt: skip
    policy, run = str(tmp_path / "sft" / "model"), str(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(policy)
    file = write("pairs.jsonl", pairs)
    reward_model.main(reward_model.Args(model=policy, dataset=file, eval_dataset=file, output_dir=run, batch_size=16,
                                        micro_batch_size=16, device="cpu"))  # fmt: skip

    seen = []

    class Trainer(trl.GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, *rest):
            rewards = super()._calculate_rewards(inputs, prompts, completions, *rest)
            seen.extend(zip(copy.deepcopy(prompts), copy.deepcopy(completions), rewards[:, 0].tolist()))
            return rewards

    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=24, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1)  # fmt: skip
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in pairs[:16]])
    trainer = Trainer(model=policy, reward_funcs=f"{run}/model", args=config, train_dataset=prompts)
    trainer.train()

    assert len(seen) == 16 and len({len(completion[0]["content"].split()) for _, completion, _ in seen}) > 3
    rows = write("seen.jsonl", [{"prompt": prompt, "completion": completion} for prompt, completion, _ in seen])
    reward_model.main(reward_model.Args(score=rows, output_dir=run, device="cpu"))
    scores = [json.loads(line)["score"] for line in open(tmp_path / "seen.scores.jsonl")]
    assert [reward for *_, reward in seen] == pytest.approx(scores, abs=1e-4)
    assert max(scores) - min(scores) > 0.1
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert logged == pytest.approx([sum(scores[:8]) / 8, sum(scores[8:]) / 8], abs=1e-4)
