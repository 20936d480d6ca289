"""What cannot be trained is refused with a reason, before weights are read and before anything is written."""

from __future__ import annotations

import json

import pytest
import transformers
from refusals import refused
from trainings import SETTINGS, STEPS, words

import mismatch
from mismatch import cli
from mismatch.errors import DataError, ModelError, UsageError
from mismatch.stages.train.stage import Train


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--kl-weight", "0"], "there is no loss: --kl-weight and --ce-weight are both 0"),
        (
            ["--swap", "layer2:nope", "--parameters", "new"],
            "`layer2:nope` has no new weights, and --parameters new trains nothing else\n\n"
            "hint: --parameters all trains the whole model",
        ),
        (
            ["--trainer", "lerning_rate=1"],
            "transformers' TrainingArguments have no `lerning_rate`\n\nhint: did you mean `learning_rate`?",
        ),
        (["--trainer", "max_steps"], "`trainer` must be name=value, got `max_steps`"),
        (["--trainer", "max_steps=many"], "`trainer`: argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--trainer", "seed=1"], "`trainer` sets seed, which the command sets itself\n\nhint: give --seed"),
        (["--trainer", "report_to=tensorboard"], "report_to=tensorboard, and tensorboard is not installed here"),
        (["--trainer", "lr_scheduler_type=up"], "`trainer`: "),
        (["--trainer", "=1"], "`trainer` must be name=value, got `=1`\n\nhint: write learning_rate=..."),
        (["--trainer", "learning_rate=nan"], "`trainer`: Invalid learning rate: nan"),
        (["--trainer", "learning_rate=-1"], "`trainer`: Invalid learning rate: -1.0"),
        (["--trainer", "optim=galore_adamw"], "`trainer`: You need to install `galore_torch`"),
        (["--trainer", "lr_scheduler_type=cosine_with_min_lr"], "`trainer`: "),
        (["--trainer", "fp16=true"], "fp16 is for a GPU, and this training runs on the CPU"),
        (["--trainer", "dataloader_num_workers=-1"], "num_workers option should be non-negative"),
        (["--trainer", "gradient_accumulation_steps=0"], "gradient_accumulation_steps must be >= 1, got 0"),
        (["--trainer", "max_steps=0"], "`trainer`: max_steps=0 and num_train_epochs=3.0 are no training"),
        (
            ["--trainer", "max_steps=-1", "--trainer", "num_train_epochs=nan"],
            "`trainer`: max_steps=-1 and num_train_epochs=nan are no training",
        ),
        (
            ["--trainer", "label_smoothing_factor=0.1"],
            "`trainer` sets label_smoothing_factor, which is not for here\n\n"
            "hint: the loss is that of --kl-weight and --ce-weight",
        ),
        (["--trainer", "hub_token=x"], "`trainer` sets hub_token, which is not for here"),
        (
            [
                *("--trainer", "load_best_model_at_end=true", "--trainer", "eval_strategy=steps"),
                *("--trainer", "eval_steps=500", "--trainer", "metric_for_best_model=drift/kl"),
            ],
            "metric_for_best_model=drift/kl, and validation text gives the loss alone",
        ),
        (["--batch-size", "9"], "8 windows of training text do not fill one batch of 9"),
        (["--seq-len", "9999"], "is longer than the context"),
        (["--device", "cuda:3"], "--device cuda:3: the Trainer takes the first device that it sees"),
        (["--device-map", "auto"], "--device-map auto spreads a model over devices"),
        (["--probes", "indcution"], "did you mean `induction`?"),
    ],
)  # fmt: skip
def test_settings(more, said, toy_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "mismatch.stages.train.arguments.get_available_reporting_integrations", lambda: ["wandb"]
    )
    line = words(tmp_path, toy_folder)
    if more[0] == "--swap":
        line[line.index("--swap") + 1], more = more[1], more[2:]
    assert said in refused([*line, *more], tmp_path, capsys)


def test_a_swap_whose_weights_change_nothing(toy_teacher):
    with pytest.raises(
        UsageError, match=r"no weight of `layer2\.mlp:zero` changes what the model says"
    ):
        mismatch.train(toy_teacher, "layer2.mlp:zero", trainer=STEPS, **SETTINGS)


def test_text_that_is_trained_on_and_reported_on(toy_folder, tmp_path, capsys):
    line = words(tmp_path, toy_folder)
    line[line.index("--train-data") + 1] = line[line.index("--data") + 1]
    assert "would be trained on and evaluated on" in refused(line, tmp_path, capsys)


def given(line: list[str], student: str) -> list[str]:
    at = line.index("--swap")
    return [*line[:at], "--student", student, *line[at + 2 :]]


def test_students_that_are_none_of_this_teacher(toy_folder, tmp_path, capsys, tiny):
    line = words(tmp_path, toy_folder)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(given(line, str(tmp_path / "empty")), tmp_path, capsys)
    tiny("llama").save_pretrained(tmp_path / "other")
    said = refused(given(line, str(tmp_path / "other")), tmp_path, capsys)
    assert "is not of the teacher's shape: " in said and "vocabulary" in said
    said = refused(given(line, str(toy_folder)), tmp_path, capsys)  # nothing was swapped in it
    assert "there is nothing to train: no module was swapped" in said


def test_a_watcher_of_another_model(toy_teacher, tiny, tmp_path):
    cut = mismatch.windows(
        mismatch.read_documents(["a b c d e f g " * 99]), toy_teacher.tokenizer, 32, 64
    )
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = transformers.Trainer(model=tiny("llama"), args=arguments)
    with pytest.raises(ModelError, match="not of the teacher's shape"):
        mismatch.DriftCallback(trainer, toy_teacher, cut)
    for every in (0, 1.5):
        with pytest.raises(UsageError, match=f"`every` must be int >= 1, got {every}"):
            mismatch.DriftCallback(trainer, toy_teacher, cut, every=every)
    with pytest.raises(UsageError, match=r"takes a transformers\.Trainer, got LlamaForCausalLM"):
        mismatch.DriftCallback(trainer.model, toy_teacher, cut)
    with pytest.raises(
        UsageError, match=r"takes a teacher from mismatch\.load, got LlamaForCausal"
    ):
        mismatch.DriftCallback(trainer, toy_teacher.model, cut)
    with pytest.raises(UsageError, match=r"takes windows from mismatch\.windows, got ndarray"):
        mismatch.DriftCallback(trainer, toy_teacher, cut.ids)
    with pytest.raises(DataError, match="no window to read the drift on"):
        mismatch.DriftCallback(trainer, toy_teacher, cut.part(slice(0)))


def test_a_run_of_other_settings_or_text_is_not_gone_on_with(
    toy_folder, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    line = words(tmp_path, toy_folder, "--output", str(run))

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mismatch.stages.train.trainer.DistillationTrainer.train", stop)
        assert cli.main(line) == 130
    assert f"mismatch train --resume {run}" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(run), "-q", "--ce-weight", "1"]) == 2
    assert "  ce_weight: 0.0 then, 1.0 now" in capsys.readouterr().err
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps({"text": "another text " * 500}) + "\n")
    monkeypatch.setattr(Train, "findings", stop)  # never reached
    assert cli.main(["train", "--resume", str(run), "-q"]) == 2
    assert "was started with other settings:\n  training: " in capsys.readouterr().err
    assert cli.main(["trace", "--resume", str(run), "-q"]) == 2
    assert "was made by `mismatch train`" in capsys.readouterr().err
