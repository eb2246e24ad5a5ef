"""Teachers of stages: found, checked before the run, shared, freed, in no checkpoint, recognised after a resume."""

from __future__ import annotations

import copy
import gc
import io
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

import moe_lightning as ml
from moe_lightning.callbacks import Compress, FullFineTuning, RouterDistillation
from moe_lightning.callbacks.recovery import teachers
from moe_lightning.callbacks.recovery.teacher_folders import keep_model, opening
from moe_lightning.callbacks.recovery.teachers import TeacherSource
from moe_lightning.recovery import Objective
from moe_lightning.recovery.logit_cache import CacheHeader
from moe_lightning.recovery.logit_cache_writer import LogitCacheWriter
from moe_lightning.recovery.teachers import ModelTeacher
from moe_lightning.statistics.fingerprint import fingerprint
from tests.callbacks.small_fit import batches, fit, loader, tiny_module
from tests.models import SIZES, random_batches, tiny_mixtral

ROOT = Path(__file__).resolve().parents[3]


def half(step: int) -> Compress:
    return Compress([ml.ExpertDrop(ratio=0.5)], at_step=step, batches=random_batches(2))


def imitate(step: int, steps: int | None = None, teacher: str = "before", **options: Any) -> RouterDistillation:
    return RouterDistillation(step, steps=steps, teacher=teacher, **options)


class Watch(Callback):
    """Keeps copies of the model before each step, and looks at the teacher."""

    def __init__(self) -> None:
        self.models: list[Any] = []
        self.teachers: list[Any] = []
        self.seen: list[weakref.ref[Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.models.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        teacher = pl_module.objective.teacher
        gc.collect()
        self.teachers.append(None if teacher is None else id(teacher))
        if teacher is not None and not any(seen() is teacher for seen in self.seen):
            self.seen.append(weakref.ref(teacher))
            assert all(not parameter.requires_grad for parameter in teacher.model.parameters())
            assert all(parameter.grad is None for parameter in teacher.model.parameters())
            assert not teacher.model.training


# ------------------------------------------------------------ the model as it was before


def test_before_is_the_model_before_the_first_compression(tmp_path: Path) -> None:
    watch, stage = Watch(), imitate(4)
    module = tiny_module()
    again = Compress([ml.ExpertDrop(ratio=0.25)], at_step=4, batches=random_batches(2))
    fit(module, tmp_path, [watch, half(2), again, stage], steps=6)
    kept = ml.from_pretrained(tmp_path / "teacher")
    # The third batch is the first after two steps; the watch stands before the compression.
    expected = watch.models[2]
    got = kept.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert [teacher is not None for teacher in watch.teachers] == [False] * 4 + [True] * 2
    assert stage.state_dict()["teacher"] == {"name": "before", "fingerprint": fingerprint(kept)}
    assert [path.name for path in tmp_path.glob(".teacher*")] == []


def test_the_teacher_is_in_no_checkpoint(tmp_path: Path) -> None:
    sizes = {}
    for name, stage in (("without", RouterDistillation(2, teacher=None, alpha=0.0)), ("with", imitate(2))):
        saved: dict[str, Any] = {}

        class Save(Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, saved: Any = saved) -> None:
                saved["keys"] = set(pl_module.state_dict())
                trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
                saved["file"] = torch.load(tmp_path / "checkpoint.ckpt", weights_only=True)

        module = tiny_module()
        fit(module, tmp_path / name, [half(2), stage, Save()], steps=4)
        content = saved["file"]
        assert set(content["state_dict"]) == saved["keys"]
        buffer = io.BytesIO()
        torch.save({key: content[key] for key in ("state_dict", "optimizer_states")}, buffer)
        sizes[name] = buffer.tell(), saved["keys"], (tmp_path / "checkpoint.ckpt").stat().st_size
    assert sizes["with"][:2] == sizes["without"][:2]
    # Beside the numbers of the fingerprint.
    assert 0 <= sizes["with"][2] - sizes["without"][2] < 2000


def test_stages_share_a_teacher_which_is_freed_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    load = teachers.from_pretrained
    monkeypatch.setattr(teachers, "from_pretrained", lambda *arguments: opened.append(arguments) or load(*arguments))
    watch = Watch()
    stages = [imitate(2, 2), FullFineTuning(5, steps=2, alpha=0.5)]
    module = tiny_module()
    fit(module, tmp_path, [half(2), *stages, watch], steps=9)
    assert len(opened) == 1
    # After its last step the first stage is over, and between them nobody is imitated.
    assert [step for step, teacher in enumerate(watch.teachers) if teacher is not None] == [2, 5]
    assert len(watch.seen) == 1
    gc.collect()
    assert watch.seen[0]() is None
    assert module.objective == Objective()


def test_the_loss_is_the_divergence_from_the_model_before(tmp_path: Path) -> None:
    """Computed again from copies of both models, on the batch of the step."""
    watch, train, stage = Watch(), batches(5), imitate(3, temperature=2.0)
    ml.save_pretrained(tiny_mixtral(), tmp_path / "start")
    module = ml.MixtralModule(checkpoint=str(tmp_path / "start"), learning_rate=1e-3)
    trainer = fit(module, tmp_path, [half(3), stage, watch], steps=4, train=train)
    student, teacher = copy.deepcopy(module.model), ml.from_pretrained(tmp_path / "teacher")
    student.load_state_dict(watch.models[3])
    with torch.no_grad():
        q, p = (
            torch.log_softmax(model(train[3]["input_ids"]).logits[:, :-1].double() / 2, -1)
            for model in (student, teacher)
        )
    expected = 4 * float((p.exp() * (p - q)).sum(-1).mean())
    assert expected > 1e-3
    assert float(trainer.callback_metrics["train/kl"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        (lambda: [imitate(2)], "nothing is compressed before step 2"),
        (lambda: [half(4), imitate(2)], "nothing is compressed before step 2"),
        (lambda: [imitate(2), half(2)], "stand before the stage in the list"),
    ],
)
def test_nobody_was_before(tmp_path: Path, callbacks: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(tiny_module(), tmp_path, callbacks(), steps=6)
    assert not (tmp_path / "teacher").exists()


def run_to(folder: Path, steps: int, resume: bool = False) -> tuple[Any, Any, Any]:
    """Run, or go on, with a checkpoint after three steps, in the middle of the stage."""

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(folder / "checkpoint.ckpt")

    module, stage = tiny_module(), imitate(2)
    options: dict[str, Any] = dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = Trainer(
        max_steps=steps, default_root_dir=folder, callbacks=[half(2), stage, Save()], logger=False, **options
    )
    data = batches(3, seed=1)
    trainer.fit(module, loader(data), ckpt_path=str(folder / "checkpoint.ckpt") if resume else None)
    return module, stage, trainer


def test_a_resumed_run_finds_its_teacher(tmp_path: Path) -> None:
    run_to(tmp_path, 4)
    before = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    _, stage, _ = run_to(tmp_path, 6, resume=True)
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == before
    assert stage.state_dict()["teacher"]["fingerprint"] == fingerprint(ml.from_pretrained(tmp_path / "teacher"))


def test_another_model_in_its_place_is_refused(tmp_path: Path) -> None:
    run_to(tmp_path, 4)
    keep_model(tiny_mixtral(seed=5), tmp_path / "teacher")
    with pytest.raises(ValueError, match="does not hold the model that this run kept: put the folder back"):
        run_to(tmp_path, 6, resume=True)
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"teacher=before: .*is gone: put it back, or start from a checkpoint before"):
        run_to(tmp_path, 6, resume=True)


def test_a_new_run_replaces_what_an_old_one_kept(tmp_path: Path) -> None:
    keep_model(tiny_mixtral(seed=5), tmp_path / "teacher")
    _, stage, _ = run_to(tmp_path, 4)
    assert stage.state_dict()["teacher"]["fingerprint"] == fingerprint(ml.from_pretrained(tmp_path / "teacher"))


def test_a_teacher_wanted_too_late(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")

    fit(tiny_module(), tmp_path, [half(2), Save()], steps=3)
    trainer = Trainer(
        max_steps=6,
        default_root_dir=tmp_path,
        callbacks=[half(2), imitate(4)],
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.raises(ValueError, match="no stage of its run asked for the model before: name a folder"):
        trainer.fit(tiny_module(), loader(batches(6)), ckpt_path=str(tmp_path / "checkpoint.ckpt"))


def test_a_folder_that_was_half_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mixtral()
    (tmp_path / ".teacher.1.partial").mkdir()  # of a process that was killed
    monkeypatch.setattr(type(model), "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        keep_model(model, tmp_path / "teacher")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_teaches_nothing(tmp_path: Path) -> None:
    model = tiny_mixtral()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"lm_head\.weight is not finite"):
        keep_model(model, tmp_path / "teacher")


# ------------------------------------------------------------ folders


def test_a_folder_teaches_in_the_type_of_the_student(tmp_path: Path) -> None:
    ml.save_pretrained(tiny_mixtral(seed=3, dtype=torch.bfloat16), tmp_path / "model")
    types = set()

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if pl_module.objective.teacher is not None:
                types.add(pl_module.objective.teacher.model.dtype)

    fit(tiny_module(), tmp_path, [Look(), imitate(1, teacher=str(tmp_path / "model"))], steps=2)
    assert types == {torch.float32}


def test_a_compressed_folder_teaches(tmp_path: Path) -> None:
    model = tiny_mixtral(seed=3)
    ml.compress(model, random_batches(2), [ml.BlockDrop(count=1), ml.Novices(ratio=0.5), ml.RTN(bits=8, group_size=16)])
    ml.save_pretrained(model, tmp_path / "model")
    stage = imitate(1, teacher=str(tmp_path / "model"), hidden_weight=0.5)
    trainer = fit(tiny_module(), tmp_path, [stage], steps=2)
    assert float(trainer.callback_metrics["train/kl"]) > 0
    assert float(trainer.callback_metrics["train/hidden_error"]) > 0


def test_precision_is_that_of_the_students_step(tmp_path: Path) -> None:
    """Under autocast a teacher with the student's weights says what the student says, bit by bit."""
    seen = []

    class Compare(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            teacher = ModelTeacher(copy.deepcopy(pl_module.model))
            with trainer.precision_plugin.train_step_context():
                theirs = teacher.targets(batch, 1.0, True)
                mine, _ = pl_module._student(batch, True)
            seen.append((theirs.predictions, mine.logits, theirs.hidden, mine.hidden))

    fit(tiny_module(), tmp_path, [Compare()], steps=1, precision="bf16-mixed")
    theirs, mine, their_hidden, my_hidden = seen[0]
    assert theirs.dtype == torch.bfloat16 and not theirs.requires_grad
    assert torch.equal(theirs, mine)
    assert all(torch.equal(their_hidden[layer], my_hidden[layer]) for layer in my_hidden)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"vocab_size": 80}, {}, "it knows 80 words, the student 64"),
        ({"num_hidden_layers": 2}, {"hidden_weight": 1.0}, "hidden states cannot be compared"),
        ({"hidden_size": 64}, {"hidden_weight": 1.0}, "hidden states cannot be compared"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, changes: Any, options: Any, words: str) -> None:
    ml.save_pretrained(tiny_mixtral(**changes), tmp_path / "model")
    with pytest.raises(ValueError, match=words):
        fit(tiny_module(), tmp_path, [imitate(1, teacher=str(tmp_path / "model"), **options)], steps=2)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RouterDistillation: teacher=nowhere: there is no checkpoint folder nowhere"):
        fit(tiny_module(), tmp_path, [imitate(1, teacher="nowhere")], steps=2)
    with pytest.raises(ValueError, match=r"teacher=some/model: .* hub are not taken: .*hf download some/model"):
        fit(tiny_module(), tmp_path, [imitate(1, teacher="some/model")], steps=2)


def test_a_folder_that_changed_is_refused(tmp_path: Path) -> None:
    ml.save_pretrained(tiny_mixtral(seed=3), tmp_path / "model")
    stage = imitate(1, teacher=str(tmp_path / "model"))
    fit(tiny_module(), tmp_path, [stage], steps=2)
    state = stage.state_dict()["teacher"]
    ml.save_pretrained(tiny_mixtral(seed=4), tmp_path / "model", overwrite=True)
    again = imitate(1, teacher=str(tmp_path / "model"))
    assert again.source is not None
    again.source.load_state_dict(state)
    with pytest.raises(ValueError, match="not the one that this run began with"):
        fit(tiny_module(), tmp_path, [again], steps=2)
    # Of another name nothing is expected.
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    other = imitate(1, teacher=str(tmp_path / "other"))
    assert other.source is not None
    other.source.load_state_dict(state)
    fit(tiny_module(), tmp_path, [other], steps=2)


# ------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 2.0}, "alpha"),
        ({"temperature": -1.0}, "temperature"),
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"alpha": 0.0}, "would run and teach nothing"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"RouterDistillation: .*{words}"):
        imitate(1, **options)
    with pytest.raises(ValueError, match="or a folder"):
        TeacherSource(" ")


def write_cache(folder: Path, data: list[dict[str, Tensor]], model: Any = None, **changes: Any) -> None:
    model = model or tiny_mixtral(seed=3)
    options = {"vocab_size": SIZES["vocab_size"], "block_size": 16, "top_k": 64, "temperature": 1.0, **changes}
    with LogitCacheWriter(folder, CacheHeader(**options, teacher={"fingerprint": fingerprint(model)})) as writer:
        for batch in data:
            with torch.no_grad():
                writer.add(batch["input_ids"], model(batch["input_ids"]).logits)


def test_a_cache_teaches_what_its_model_does(tmp_path: Path) -> None:
    model, train = tiny_mixtral(seed=3), batches(4)
    ml.save_pretrained(model, tmp_path / "model")
    write_cache(tmp_path / "cache", train, model)
    results = {}
    for name in ("model", "cache"):
        module = tiny_module()
        trainer = fit(module, tmp_path / "runs", [imitate(1, teacher=str(tmp_path / name))], steps=3, train=train)
        results[name] = float(trainer.callback_metrics["train/kl"]), module.model.state_dict()
    assert results["cache"][0] == pytest.approx(results["model"][0], rel=1e-4)
    for name, value in results["model"][1].items():
        torch.testing.assert_close(results["cache"][1][name], value, rtol=0, atol=2e-4)


def test_caches_that_do_not_fit(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", batches(1))
    with pytest.raises(ValueError, match=r"predictions are of temperature 1\.0, the stage's is 2\.0"):
        fit(tiny_module(), tmp_path, [imitate(1, teacher=str(tmp_path / "cache"), temperature=2.0)], steps=2)
    with pytest.raises(ValueError, match="cached predictions hold no hidden states"):
        imitate(1, teacher=str(tmp_path / "cache"), hidden_weight=1.0)
    # Other data than a TextDataModule's are not known before the run.
    with pytest.raises(ValueError, match=r"2 of the 2 blocks .* not among the 2"):
        fit(tiny_module(), tmp_path, [imitate(1, teacher=str(tmp_path / "cache"))], steps=2)
    larger = tiny_mixtral(seed=3, vocab_size=80)
    write_cache(tmp_path / "larger", batches(1), larger, vocab_size=80)
    with pytest.raises(ValueError, match="it knows 80 words, the student 64"):
        fit(tiny_module(), tmp_path, [imitate(1, teacher=str(tmp_path / "larger"))], steps=2)


# ------------------------------------------------------------ memory


MEASURE = """
import sys, torch
import moe_lightning as ml

def own_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)
ml.from_pretrained(sys.argv[1])
for folder in sys.argv[2:]:
    before = own_bytes()
    model = ml.from_pretrained(folder)
    print(own_bytes() - before)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc here")
def test_what_is_mapped_takes_no_memory(tmp_path: Path) -> None:
    model = tiny_mixtral(hidden_size=256, intermediate_size=512, num_local_experts=8)
    keep_model(model, tmp_path / "fused")
    ml.save_pretrained(model, tmp_path / "single")
    ml.save_pretrained(tiny_mixtral(), tmp_path / "warm")
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("warm", "fused", "single"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    fused, single = map(int, done.stdout.split()[-2:])
    size = sum(value.numel() * 4 for value in model.state_dict().values())
    assert size > 35e6
    assert fused < 0.3 * size < 0.8 * size < single
    takes = {name: opening(tmp_path / name, torch.float32, torch.device("cpu")) for name in ("fused", "single")}
    assert takes["fused"].mapped and not takes["single"].mapped
    assert takes["fused"].bytes == takes["single"].bytes == size
    assert "memory-mapped" in str(takes["fused"]) and "held in memory" in str(takes["single"])
    half_size = opening(tmp_path / "fused", torch.bfloat16, torch.device("cpu"))
    assert half_size.bytes == size // 2 and not half_size.mapped
    assert not opening(tmp_path / "fused", torch.float32, torch.device("cuda")).mapped
