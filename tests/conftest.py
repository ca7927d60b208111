"""Settings of every test session, and what several files need of the machine."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as main.py does, before torch is imported


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Path]:
    """A folder whose cache serves all runs of a test file.

    They share the process that measures memory as well, which takes seconds to start and answers one request after the
    other anyway, and are alone on this machine, whoever else is at work.
    """
    import torch  # not before its environment is set

    import memory
    import metrics

    with memory.ForwardMemory(torch.device("cpu")) as kept, pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.ForwardMemory, "__exit__", lambda *_: None)
        patch.setattr(metrics, "ForwardMemory", lambda device: kept)
        patch.setattr(metrics, "others", lambda: 0)
        yield tmp_path_factory.mktemp("runs")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def read_only_disk(small_disk):
    """A file system that takes no writing."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return small_disk
