"""The command line. Its commands are in ``app``, imported once an interrupt can no longer hurt."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


def main() -> None:
    """Entry point of the command `transnormer`."""
    # Where the interrupt is ignored (`nohup`, a job in the background) it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from transnormer.cli.app import run

    code = run(sys.argv[1:])
    # What the command did is done: an interrupt of the interpreter's end would only show its parts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or end the process at once while it imports a module.

    An exception amid an import leaves half a module behind, and may come out as any other error.
    """
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            os.write(2, b"interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
