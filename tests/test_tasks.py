"""Tasks of one's own: the contract, and every command through it."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import prunekit as pk
from commands import Capture, call, document
from prunekit.metric import Metric
from prunekit.tasks import registry
from prunekit.training.events import Scored


class Waves(nn.Module):
    """A small network of sounds `(N, 1, 64)`, with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 8, 5, stride=2), nn.BatchNorm1d(8)
        self.second, self.last = nn.Conv1d(8, 12, 3), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.last(self.second(x)))
        out: Tensor = self.head(x.mean(2))
        return out


class Loudness(pk.Task):
    """How loud a wave is, and how quiet; the score is an error, of which less is better."""

    score: ClassVar[str] = "error"
    higher_is_better: ClassVar[bool] = False

    def examples(self, split: str) -> Any:
        generator = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}[split])
        loud = 4 * torch.rand(80, 1, generator=generator)
        waves = loud * torch.sin(torch.arange(64) / 5 + torch.rand(80, 1, generator=generator))
        return TensorDataset(waves[:, None], torch.cat([loud, -loud], 1))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def scores(self, model: nn.Module, batches: Iterator[Any]) -> Mapping[str, float]:
        errors = torch.cat([(model(x) - y).abs() for x, y in batches])
        return {"error": float(errors.mean()), "worst": float(errors.max())}


def waves() -> nn.Module:
    torch.manual_seed(0)
    return Waves().eval()


CONFIG = pk.TrainConfig(epochs=2, lr=0.02, batch_size=16, device="cpu")


def test_a_network_learns_a_task_that_is_not_classification() -> None:
    task, model = Loudness(), waves()
    before = pk.evaluate(model, task.open("test"))
    done = pk.train(model, pk.TrainConfig(epochs=8, lr=0.02, batch_size=16, device="cpu"), task.open("train"),
                    task.open("val"))  # fmt: skip
    after = pk.evaluate(model, task.open("test"), latency=True)
    assert before.metric == after.metric == Metric("error", higher_is_better=False)
    assert before.score is not None
    assert after.score is not None
    assert after.score < 0.5 * before.score
    assert (after.accuracy, after.balanced_accuracy, done.accuracy) == (None, None, None)
    assert set(after.scores) == {"error", "worst"}
    assert after.images == 80
    assert done.history[-1].val_score == done.score
    x, y = task.examples("test").tensors
    with torch.no_grad():
        assert after.score == pytest.approx(float((model(x) - y).abs().mean()), abs=1e-6)
    assert pk.EvalResult.from_json(json.loads(json.dumps(after.to_json()))).score == after.score


def test_the_best_epoch_of_an_error_is_the_one_with_least() -> None:
    error, share = Metric("error", higher_is_better=False), Metric("share", "%")
    small, large = Scored(1, 0.1, 5.0), Scored(2, 0.2, 1.0)
    assert small.beats(large, error)
    assert not large.beats(small, error)
    assert large.beats(small, share)
    assert Scored(3, 0.1, 4.0).beats(small, error)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    task, whole, halves = Loudness(), waves(), waves()
    sets = task.open("train"), task.open("val")
    pk.train(whole, CONFIG, *sets)

    def stop(event: object) -> None:
        if isinstance(event, pk.SaveEvent) and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pk.train(halves, CONFIG, *sets, state_path=tmp_path / "a.state", on_event=stop)
    done = pk.train(halves, CONFIG, *sets, state_path=tmp_path / "a.state", resume=True)
    assert len(done.history) == 2
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True)
    )


def test_distillation_is_by_the_distance_of_outputs() -> None:
    teacher, task = waves(), Loudness()
    with torch.no_grad():
        teacher.head.bias.add_(3.0)
    student = waves()
    config = pk.TrainConfig(epochs=10, lr=0.02, batch_size=16, device="cpu", distill=1.0)
    pk.train(student, config, task.open("train"), teacher=teacher)
    x = task.examples("test").tensors[0]
    with torch.no_grad():
        wanted, found = teacher(x), student(x)
    assert float((found - wanted).square().mean()) < 0.05 * float(wanted.square().mean())


def test_validation_examples_are_held_out_where_there_are_none() -> None:
    class Plain(Loudness):
        def examples(self, split: str) -> Any:
            return None if split == "val" else [(torch.full((1,), float(i)), torch.zeros(1)) for i in range(40)]

    train, val = Plain().open("train"), Plain().open("val")
    held = torch.cat([x for x, _ in val.batches()]).flatten().tolist()
    assert held == [9.0, 19.0, 29.0, 39.0]
    assert val.held_out
    seen = torch.cat([x for x, _ in train.batches()]).flatten().tolist()
    assert sorted(seen + held) == list(map(float, range(40)))


def test_batches_are_any_nest_and_loaders_keep_their_own_collation() -> None:
    class Nested(Loudness):
        def examples(self, split: str) -> Any:
            del split
            return [{"x": torch.full((3,), float(i)), "pair": (i, torch.ones(2))} for i in range(6)]

    batch = next(iter(Nested().open("train").subset([0, 1]).batches()))
    assert batch["x"].shape == (2, 3)
    assert batch["pair"][0].tolist() == [0, 1]

    class Loaded(Loudness):
        def examples(self, split: str) -> Any:
            del split
            return DataLoader(range(6), collate_fn=lambda numbers: torch.tensor(numbers) * 10)  # type: ignore[arg-type]

    assert next(iter(Loaded().open("test").batches(3))).tolist() == [0, 10, 20]


class _Broken(Loudness):
    def __init__(self, *, loss: Any = None, scores: Any = None) -> None:
        self._loss, self._scores = loss, scores

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) if self._loss is None else self._loss(model(batch[0]))

    def scores(self, model: nn.Module, batches: Iterator[Any]) -> Mapping[str, float]:
        found = super().scores(model, batches)
        return found if self._scores is None else self._scores(found)


def _fails() -> None:
    raise KeyError("nothing")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (_Broken(loss=lambda y: y), "expected one floating-point number"),
        (_Broken(loss=lambda y: float(y.sum())), "expected one floating-point number"),
        (_Broken(loss=lambda y: y.argmax()), "expected one floating-point number"),
        (_Broken(loss=lambda _: _fails()), "the code of the task _Broken failed: KeyError"),
        (_Broken(scores=lambda _: {"accuracy": 1.0}), "scored by 'error', and its scores are: accuracy"),
        (_Broken(scores=lambda _: 0.5), "scored by 'error', and its scores are: a float"),
        (_Broken(scores=lambda _: {"error": torch.zeros(2)}), "the score 'error' of the task _Broken is a Tensor"),
        (_Broken(loss=lambda y: y.detach().sum()), "its forward lets none through"),
    ],
)
def test_a_task_that_breaks_the_contract_is_told_before_training(task: pk.Task, said: str) -> None:
    with pytest.raises(pk.PrunekitError) as error:
        pk.train(waves(), CONFIG, task.open("train"), task.open("val"))
    assert said in str(error.value)


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(pk.InputError, match="the score 'error' of the task _Broken is nan"):
        pk.evaluate(waves(), _Broken(scores=lambda _: {"error": float("nan")}).open("test"))


def test_examples_of_another_shape_than_the_network_reads() -> None:
    class Wide(Loudness):
        def examples(self, split: str) -> Any:
            del split
            return [(torch.zeros(3, 64), torch.zeros(2)) for _ in range(8)]

    with pytest.raises(pk.PrunekitError, match=r"to have 1 channels|expected input") as error:
        pk.evaluate(waves(), Wide().open("test"), example=torch.zeros(1, 1, 64))
    assert "(8, 3, 64)" in str(error.value)


FILE = """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset
    import prunekit as pk

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv1d(1, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8),
                             nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2))

    class Tones(pk.Classification):
        def __init__(self, count=60):
            super().__init__()
            self.count = count

        def examples(self, split):
            generator = torch.Generator().manual_seed(len(split))
            labels = torch.arange(self.count) % 2
            waves = torch.sin(torch.arange(32) * (0.2 + 0.4 * labels[:, None]))
            return TensorDataset(waves[:, None] + 0.1 * torch.randn(self.count, 1, 32, generator=generator), labels)

    class Scoreless(pk.Task):
        def examples(self, split): return [torch.zeros(1, 32)] * 20
        def loss(self, model, batch): return model(batch).mean()
        def scores(self, model, batches): return {}

    class Unfinished(pk.Task):
        score = "error"
        def examples(self, split): return [torch.zeros(1, 32)] * 20

    class Fails(Tones):
        def examples(self, split): raise OSError("the disk is gone")
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(FILE), encoding="utf-8")
    return path


def test_commands_take_a_task_from_a_file(code: Path, tmp_path: Path, capsys: Capture) -> None:
    model, small, merged = (tmp_path / name for name in ("a.pt", "small.pt", "merged.pt"))
    task = ["--arch", f"{code}:Net", "--task", f"{code}:Tones"]
    tuning = ["--batch-size", "10", "--lr", "0.05", "--device", "cpu"]
    trained = document(capsys, "train", *task, "--epochs", "4", "-o", model, *tuning)
    assert trained["metric"]["name"] == "accuracy"
    found = document(capsys, "eval", model, *task)
    assert found["score"] == found["accuracy"] > 0.9
    slimmed = document(capsys, "slim", model, *task, "--ratio", "0.3", "--epochs", "1", "-o", small, *tuning)
    assert slimmed["passes"][0]["score_tuned"] == slimmed["after"]["score"]
    done = document(capsys, "merge", model, *task, "--ratio", "0.3", "-o", merged)
    assert done["plan"]["notes"]["restore"] == "calibrate"
    assert done["plan"]["notes"]["calibration"]["images"] == 60
    few = document(capsys, "eval", small, *task, "--task-args", "count=7", "--no-latency")
    assert few["images"] == 7
    status, out, _ = call(capsys, "compare", model, merged, *task, "--no-latency", "--format", "csv")
    assert status == 0
    assert "score_name" in out.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "{code}:Scoreless"], "the task Scoreless has no score that counts"),
        (["--task", "{code}:Unfinished"], "lacks loss, scores"),
        (["--task", "{code}:Net"], "is no task"),
        (["--task", "{code}:Tone"], "did you mean Tones?"),
        (["--task", "{code}:Fails"], "cannot give its examples for test: OSError: the disk is gone"),
        (["--task", "{code}:Tones", "--task-args", "size=3"], "takes no argument 'size'"),
        (["--task", "{code}:Tones", "--data", "digits"], "takes no --data"),
        (["--task", "{code}:Tones", "--per-class"], "--per-class needs --data, with images to classify"),
        (["--task", "classificaton"], "did you mean classification?"),
        (["--task", "nowhere.py:Tones"], "there is no file nowhere.py"),
        (["--task-args", "count=3"], "--task-args is for a task"),
    ],
)
def test_tasks_that_cannot_be_used(code: Path, arguments: list[str], said: str, capsys: Capture) -> None:
    given = [argument.replace("{code}", str(code)) for argument in arguments]
    status, _, err = call(capsys, "eval", "prunekit:vgg_digits", *given)
    assert status == 2
    assert said in " ".join(err.split())


def test_names_of_tasks() -> None:
    assert "classification" in registry.names()
    task = registry.get("classification", data="digits")
    assert len(task.open("test")) == 355
    assert task.open("test").input_spec is not None


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Its file, its commands from top to bottom, then the rest of its Python; and what it says comes true."""
    text = (Path(__file__).parents[1] / "docs" / "your-own-task.md").read_text(encoding="utf-8")
    file, *rest = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 6
    (tmp_path / "notes.py").write_text(file, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        status, _, err = call(capsys, *shlex.split(command)[1:])
        assert status == 0, err
    task = ["--arch", "notes.py:Net", "--task", "notes.py:Notes", "--no-latency"]
    notes, merged, small = document(capsys, "compare", "notes.pt", "merged.pt", "small.pt", *task)["results"]
    assert notes["metric"] == {"name": "right notes", "unit": "%", "higher_is_better": True}
    assert notes["score"] > 0.8
    assert merged["score"] > notes["score"] - 0.1
    assert small["macs"] <= 0.4 * notes["macs"]
    for block in rest:
        file += block
    exec(compile(file, "notes.py", "exec"), {"__name__": "notes"})
    assert float(capsys.readouterr().out) > 0.3
