"""What the DeepSpeed launcher starts on every process: ``deepspeed --module train.pretrain --config CONFIG [key=value ...]``.

It parses, sets the process up and calls train/trainer.py. Nothing imports this file: launched, it is ``__main__``.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from rdlm.errors import UserError
from train.process import StopSignal, capture_output, die_with_launcher, environment, fail
from train.settings import load


def main() -> int:
    """Exit status: 0 trained or stopped by a signal after a checkpoint, 1 a defect, 2 the user's mistake."""
    parser = argparse.ArgumentParser(prog="train.pretrain")
    parser.add_argument("--config", required=True)
    parser.add_argument("--local_rank", type=int, help="set by the launcher; LOCAL_RANK says the same")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    rank, _ = environment()
    terminal = sys.stderr
    try:
        config = load(arguments.config, arguments.overrides)
        stop = StopSignal()
        die_with_launcher()
        terminal = capture_output(Path(config.output) / "logs", rank)
        from train.run import train  # imports torch and deepspeed, which talk

        train(config, stop, terminal)
        return 0
    except UserError as error:
        if rank == 0:  # every rank finds the same mistake
            fail(str(error), terminal)
        return 2
    except Exception:
        print(f"rdlm train: process {rank} failed:\n{traceback.format_exc()}", file=terminal, flush=True)
        return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written. Taking the interpreter down beside the threads of gloo and torch now and then aborts, which the
    # launcher would report as a failed run.
    os._exit(status)
