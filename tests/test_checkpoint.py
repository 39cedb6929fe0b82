"""Checkpoints on disk: which are kept, and what is said of damaged ones. No process is started."""

import shutil
from pathlib import Path

from softcot_ds import checkpoint
from softcot_ds.run_dir import MARKER, checkpoints


def empty_checkpoints(run_dir: Path, *steps: int) -> None:
    for step in steps:
        (run_dir / f"checkpoints/step-{step}").mkdir(parents=True)
        (run_dir / f"checkpoints/step-{step}" / MARKER).touch()


def test_old_checkpoint_that_cannot_be_removed_is_a_warning_and_looks_whole_to_nobody(tmp_path, monkeypatch, capsys):
    def busy(path: Path) -> None:
        if path.name == "step-2":
            raise OSError(39, "Directory not empty", str(path))  # what NFS says while somebody reads a file in it
        remove(path)

    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", busy)
    empty_checkpoints(tmp_path, 2, 4, 10, 20)
    checkpoint._prune(tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-10", "step-20"]
    assert not (tmp_path / "checkpoints/step-4").exists()
    assert "step-2 cannot be removed" in capsys.readouterr().out
