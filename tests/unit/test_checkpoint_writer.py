"""What a process says about the files that it wrote into a checkpoint."""

import threading
import zlib
from pathlib import Path

import pytest
import torch
from torchport.checkpoint.atomic import MANIFEST, describe, publish, verify
from torchport.checkpoint.writer import FolderWriter
from torchport.errors import CheckpointError


def test_every_file_has_the_size_and_checksum_of_what_is_in_it(tmp_path: Path) -> None:
    with FolderWriter(tmp_path) as writer:
        for index in range(6):
            writer.write(f"{index}.bin", lambda path, index=index: path.write_bytes(bytes([index]) * 70_000))
    assert writer.files == {
        f"{index}.bin": {"size": 70_000, "crc32": f"{zlib.crc32(bytes([index]) * 70_000):08x}"}
        for index in range(6)
    }


def fail(path: Path) -> None:
    raise OSError(f"no space for {path.name}")


def write_two(folder: Path) -> None:
    with FolderWriter(folder) as writer:
        writer.write("first.bin", lambda path: path.write_bytes(b"1"))
        writer.write("second.bin", fail)


def test_a_failing_write_is_raised_and_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no space for second\.bin"):
        write_two(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("torchport-checkpoint")]


def test_torch_save_keeps_its_own_setting_of_checksums(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    with FolderWriter(tmp_path) as writer:
        writer.write("tensor.bin", lambda path: torch.save(torch.arange(3), path))
    assert torch.serialization.get_crc32_options() == before
    assert torch.load(tmp_path / "tensor.bin", weights_only=True).tolist() == [0, 1, 2]


def test_files_nobody_described_are_described_when_the_folder_is_published(tmp_path: Path) -> None:
    folder, target = tmp_path / "writing", tmp_path / "checkpoint"
    folder.mkdir()
    with FolderWriter(folder) as writer:
        writer.write("mine.bin", lambda path: path.write_bytes(b"mine"))
    (folder / "other.bin").write_bytes(b"other")
    publish(folder, target, {}, writer.files)
    assert sorted(verify(target)["files"]) == ["mine.bin", "other.bin"]
    assert not folder.exists()


def test_a_file_that_grew_after_it_was_described_is_refused(tmp_path: Path) -> None:
    with FolderWriter(tmp_path) as writer:
        writer.write("a.bin", lambda path: path.write_bytes(b"1234"))
    (tmp_path / "a.bin").write_bytes(b"12345")
    with pytest.raises(CheckpointError, match="5 bytes instead of the 4"):
        describe(tmp_path, writer.files)


def test_verification_names_every_file_that_differs(tmp_path: Path) -> None:
    folder, target = tmp_path / "writing", tmp_path / "checkpoint"
    folder.mkdir()
    with FolderWriter(folder) as writer:
        for name in ("a.bin", "b.bin", "c.bin"):
            writer.write(name, lambda path: path.write_bytes(b"0123"))
    publish(folder, target, {}, writer.files)
    assert (target / MANIFEST).is_file()
    for name in ("a.bin", "c.bin"):
        (target / name).write_bytes(b"0124")
    with pytest.raises(CheckpointError, match=r"a\.bin, c\.bin differ"):
        verify(target)
