import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from apportion.train.run import Run, is_cut_off, latest_checkpoint, read_records, read_settings

CONFIG = "seed: 1\noutput_dir: a\nppo:\n  lam: 0.95\n  cliprange: 0.2\n"


def saved(run: Run, step: int) -> Path:
    return run.save_checkpoint(step, {"weights": {"w": torch.full((3,), float(step))}}, {"step": step}).path


def test_a_killed_writer_always_leaves_a_checkpoint_that_loads_and_the_lines_up_to_it(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_writer.py")
    done = subprocess.run([sys.executable, script, tmp_path / "run", "40"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10, "the writer made no progress between the kills"


def test_a_new_run_writes_its_configuration(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "deep" / "run", CONFIG)
    assert run.folder.joinpath("config.yaml").read_text() == CONFIG
    assert run.latest_checkpoint() is None


def test_a_folder_that_is_not_empty_is_refused_without_resume_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / ".tmp-thesis").write_text("mine too")
    with pytest.raises(ValueError, match=r"is not empty; resume it \(--resume\), or choose another"):
        Run.open(tmp_path, CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-thesis", "thesis.txt"]


def test_resuming_what_is_not_a_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no config\.yaml: not a run folder"):
        Run.open(tmp_path, CONFIG, resume=True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run folder .*file/run cannot be written \(Not a directory\)"):
        Run.open(tmp_path / "file" / "run", CONFIG)


def test_resuming_with_another_configuration_names_the_first_keys_that_differ(tmp_path: Path) -> None:
    Run.open(tmp_path, CONFIG)
    other = "seed: 2\noutput_dir: b\nresume: true\nppo:\n  lam: 0.9\n  gamma: 1.0\n  whiten: false\n"
    with pytest.raises(
        ValueError, match=r"seed is 1 there and 2 here; ppo\.lam is 0\.95 there and 0\.9 here; .*2 more"
    ):
        Run.open(tmp_path, other, resume=True)


def test_the_place_of_a_run_and_the_resume_flag_are_no_part_of_its_configuration(tmp_path: Path) -> None:
    Run.open(tmp_path, CONFIG)
    Run.open(tmp_path, CONFIG.replace("output_dir: a", "output_dir: moved\nresume: true"), resume=True)
    assert tmp_path.joinpath("config.yaml").read_text() == CONFIG
    assert read_settings(CONFIG) == {"seed": 1, "ppo.lam": 0.95, "ppo.cliprange": 0.2}


def test_resuming_an_absent_folder_or_one_killed_before_its_first_line_starts_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".tmp-config.yaml").write_text("see")
    for folder in (tmp_path, tmp_path / "absent"):
        assert Run.open(folder, CONFIG, resume=True).folder.joinpath("config.yaml").read_text() == CONFIG
    assert not (tmp_path / ".tmp-config.yaml").exists()


def test_keeping_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_checkpoints is 0; at least 1"):
        Run.open(tmp_path, CONFIG, keep_checkpoints=0)


def test_a_line_is_strict_json_and_what_is_not_finite_is_null_there_and_nan_when_read(tmp_path: Path) -> None:
    run = Run.open(tmp_path, CONFIG)
    run.log(0, {"samples": 0, "a": math.nan, "b": torch.tensor(0.5), "c": np.float32(-math.inf), "d": np.int64(3)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 0, "samples": 0, "a": null, "b": 0.5, "c": null, "d": 3}\n'
    record = read_records(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(record["a"])
    assert math.isnan(record["c"])
    assert isinstance(record["samples"], int)


def test_a_step_is_logged_once_also_after_a_resume(tmp_path: Path) -> None:
    Run.open(tmp_path, CONFIG).log(3, {})
    run = Run.open(tmp_path, CONFIG, resume=True)
    with pytest.raises(ValueError, match="step 3 after step 3: log all metrics of a step in one call"):
        run.log(3, {})
    run.truncate_after(2)
    run.log(3, {"again": 1.0})
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 3, "again": 1.0}]


def test_samples_keep_any_text_a_tokenizer_may_decode_to(tmp_path: Path) -> None:
    run = Run.open(tmp_path, CONFIG)
    response = "line\nbreak \r \u2028 \x0b \x00 ünï"
    run.log_samples(0, [{"response": response, "score": 1.5}, {"response": "\ud800", "score": math.nan}])
    first, second = read_records(tmp_path / "samples.jsonl")
    assert first == {"step": 0, "response": response, "score": 1.5}
    assert second["response"] == "?"


def test_truncation_drops_later_lines_and_a_line_cut_off_but_no_earlier_one(tmp_path: Path) -> None:
    run = Run.open(tmp_path, CONFIG)
    for step in range(5):
        run.log(step, {"x": step})
    path = tmp_path / "metrics.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept) + b'{"step": 5, "x"')
    assert is_cut_off(path)
    assert len(read_records(path)) == 5
    run.truncate_after(3)
    assert path.read_bytes() == b"".join(kept[:4])
    run.truncate_after(3)
    assert path.read_bytes() == b"".join(kept[:4])
    run.truncate_after(-1)
    assert path.read_bytes() == b""


def test_a_spoilt_line_before_the_last_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nspoilt\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_records(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"loss": 0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not an object with a whole number `step`"):
        read_records(tmp_path / "metrics.jsonl")


def test_the_newest_checkpoints_are_kept_and_load_to_the_bit(tmp_path: Path) -> None:
    run = Run.open(tmp_path, CONFIG, keep_checkpoints=2)
    weights = torch.randn(4, 3, dtype=torch.bfloat16)
    for step in (10, 20, 1_000_000):
        run.save_checkpoint(step, {"w": {"a/b": weights * step}, "empty": {}}, {"step": step, "lr": 0.1 + 0.2})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000020", "step-1000000"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1_000_000
    tensors, state = newest.load()
    assert torch.equal(tensors["w"]["a/b"], weights * 1_000_000)
    assert state == {"step": 1_000_000, "lr": 0.1 + 0.2}


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path: Path, name: str) -> None:
    run = Run.open(tmp_path, CONFIG)
    older, newer = saved(run, 10), saved(run, 20)
    (newer / name).write_bytes((newer / name).read_bytes()[:9])
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    with pytest.raises(ValueError, match=r"step-000020 is damaged .*; remove it to resume from the one before"):
        checkpoint.load()
    shutil.rmtree(newer)  # as it says
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.path == older
    assert checkpoint.load()[1] == {"step": 10}


def test_what_a_callback_writes_lies_in_the_checkpoint(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "config.json").write_text("{}")

    checkpoint = Run.open(tmp_path, CONFIG).save_checkpoint(1, {}, {}, write)
    assert (checkpoint.path / "policy" / "config.json").read_text() == "{}"


def test_a_checkpoint_that_fails_midway_is_not_there_and_is_cleared_by_the_next(tmp_path: Path) -> None:
    def full_disk(_: Path) -> None:
        raise OSError("no space left")

    run = Run.open(tmp_path, CONFIG)
    with pytest.raises(OSError, match="no space left"):
        run.save_checkpoint(1, {"w": {"w": torch.zeros(3)}}, {}, full_disk)
    assert run.latest_checkpoint() is None
    assert saved(run, 2).name == "step-000002"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_a_step_has_one_checkpoint_and_its_state_is_strict_json(tmp_path: Path) -> None:
    run = Run.open(tmp_path, CONFIG)
    saved(run, 1)
    with pytest.raises(ValueError, match="step 1 has a checkpoint already"):
        saved(run, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.save_checkpoint(2, {}, {"loss": math.nan})


def test_nothing_in_a_run_folder_is_a_pickle(tmp_path: Path) -> None:
    run = Run.open(tmp_path, CONFIG)
    run.log(0, {"x": 1})
    saved(run, 0)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]  # the lock is empty
    assert {path.suffix for path in files} == {".yaml", ".jsonl", ".json", ".safetensors"}
    assert json.loads((tmp_path / "checkpoints" / "step-000000" / "state.json").read_text()) == {"step": 0}


def test_a_run_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    text = (
        f"from apportion.train.run import Run; run = Run.open({str(folder)!r}, {CONFIG!r}); print('open', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"{text}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="another process writes into"):
            Run.open(folder, CONFIG, resume=True)
        other.kill()
    Run.open(folder, CONFIG, resume=True)


def test_a_folder_is_written_whole_and_replaces_one_of_its_name(tmp_path: Path) -> None:
    def write(folder: str, text: str) -> None:
        (Path(folder) / "weights").write_text(text)

    run = Run.open(tmp_path, CONFIG)
    for content in ("one", "two"):
        run.write_folder("model", partial(write, text=content))
        assert [path.name for path in tmp_path.glob("*model*")] == ["model"]
        assert (tmp_path / "model" / "weights").read_text() == content

    def fails(folder: str) -> None:
        write(folder, "half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.write_folder("model", fails)
    assert (tmp_path / "model" / "weights").read_text() == "two"
