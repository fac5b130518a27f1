"""benchmarks/seeds.py on runs of no step. Its tables are compared with the README's in test_figures.py."""

import importlib
import json

import seeds
import tyro


def test_the_runs_of_a_seed(tmp_path, monkeypatch):
    commands = []

    def in_this_process(name, command, folder):
        _, script, *flags = command
        commands.append(" ".join(command).replace(str(tmp_path), ""))
        module = importlib.import_module(script.removesuffix(".py"))
        module.main(tyro.cli(module.Args, args=flags))
        (folder / name / "cost.json").write_text('{"cpu_seconds": 7}')

    monkeypatch.setattr(seeds, "run", in_this_process)
    args = seeds.Args(
        seeds=[3], only=["sft", "grpo-k1"], reference_samples=20, policy_samples=5, tiny=True,
        folder=str(tmp_path), output=str(tmp_path / "seeds.json"))
    result = seeds.main(args)
    sft, grpo = commands
    assert sft == "python sft.py --seed 3 --output-dir /seed3/sft --num-train-epochs 0"
    assert grpo == ("python grpo.py --model /seed3/sft/model --kl-in reward --seed 3 --output-dir "
                    "/seed3/grpo-k1 --total-episodes 0")
    assert json.loads((tmp_path / "seeds.json").read_text()) == json.loads(json.dumps(result))
    runs = result["seeds"]["3"]["runs"]
    assert runs["sft"]["cpu_seconds"] == 7 and runs["sft"]["before"] == runs["sft"]["after"]
    policy = result["seeds"]["3"]["judged"]["gold"]["policies"]["grpo-k1"]
    assert abs(policy["kl"]) < 1e-6 and policy["fraction"] is None  # it is its reference

    monkeypatch.setattr(seeds.frontier, "main", None)  # what is finished is not made again
    monkeypatch.setattr(seeds, "run", lambda *command: None)
    assert json.loads(json.dumps(seeds.main(args))) == json.loads(json.dumps(result))
