"""What the machine does to a run: a terminal that closes, a clock that is set, a disk or a memory that is full."""

from __future__ import annotations

import errno
import os
import signal
import sys

import pytest
import torch

from rdlm.errors import UserError, out_of_memory
from train import process
from train.launcher import _signals
from train.pretrain import _of_the_machine
from train.process import StopSignal, Terminal, launcher_name, lost_peer, stop_signals, tell
from train.settings import TrainConfig

SMALL = {
    "name": "small", "output": "out", "model": {"family": "llama", "vocab_size": 8, "d_model": 8, "num_heads": 2,
    "mlp_width": 8, "num_layers": 1, "max_seq_len": 8}, "objective": {"name": "next_token"},
    "data": {"kind": "group_product", "group": "s3", "length": 4}, "batch": {"global_size": 2},
    "optimizer": {"lr": 0.1}, "schedule": {"steps": 1},
}  # fmt: skip


def test_a_terminal_that_closes_ends_no_run(capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    terminal = Terminal(os.fdopen(write, "w", buffering=1))
    print("first", file=terminal)
    assert os.read(read, 100) == b"first\n"
    os.close(read)
    print("second", file=terminal, flush=True)
    tell("third", terminal)  # type: ignore[arg-type]
    assert capfd.readouterr().err == "second\nthird\n" and terminal.fileno() == sys.stderr.fileno()


def test_a_line_that_nobody_reads_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(os.dup(write), "w", closefd=False) as closed:
        tell("lost", closed)
        os.dup2(os.open(os.devnull, os.O_WRONLY), closed.fileno())  # its buffer is flushed once more
    os.close(write)


def test_a_closed_terminal_stops_a_run_as_a_signal_does_unless_it_is_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    others = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        assert signal.SIGHUP not in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with _signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            assert received == [signal.SIGHUP]
        stop = StopSignal()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received
    finally:
        signal.signal(signal.SIGHUP, before)
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), others, strict=True):
            signal.signal(number, handler)


def test_the_name_of_a_process_does_not_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    name = launcher_name()
    monkeypatch.setattr(process.psutil.Process, "create_time", lambda self: 5e9)
    assert launcher_name() == name


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "batch.micro_size=2: memory ran out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
        (MemoryError("Unable to allocate 7 GiB"), "memory ran out"),
        (OSError(errno.ENOSPC, "No space left on device"), "output='out'.*No space left"),
    ],
)  # fmt: skip
def test_a_full_memory_or_disk_is_one_line_with_a_remedy(error: Exception, message: str) -> None:
    found = _of_the_machine(error, TrainConfig.model_validate(SMALL))
    assert found is not None
    with pytest.raises(UserError, match=message):
        raise found


def test_other_errors_keep_their_traceback() -> None:
    config = TrainConfig.model_validate(SMALL)
    assert _of_the_machine(RuntimeError("shapes differ"), config) is None
    assert _of_the_machine(ConnectionResetError(errno.ECONNRESET, "reset"), config) is None
    assert not out_of_memory(RuntimeError("index out of range"))


def test_a_lost_peer_is_told_from_other_errors() -> None:
    """gloo's message as it was when another process had ended."""
    text = (
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:47820: "
        "Connection reset by peer. This is typically caused by a remote worker hanging"
    )
    assert lost_peer(RuntimeError(text))
    assert not lost_peer(RuntimeError("shapes differ")) and not lost_peer(OSError("Connection reset by peer"))
