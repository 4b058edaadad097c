"""The parent of one embedded server. Run as a program: `python keeper.py '{"command": …}'`; see `main`.

It stands between tallystick and the server for one reason: if tallystick dies, even by SIGKILL, the server is shut down
in order instead of lingering. The keeper sees that death as the end of its standard input, on every system and whatever
thread started it.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from typing import NoReturn

SHUTDOWN_SECONDS = 30
"""How long a server may take to shut down in order once tallystick is gone; then it is killed."""

PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Run the command given as JSON in the first argument, and end with its exit code.

    The keys: `command`, `environment`, `uid` and `gid` (null: as they are), `stop_signal`, and `lock_fd`, an open
    file that the server and its children inherit, so that the lock on it lasts exactly as long as they do.

    Prints the server's process id; the server's own output goes to standard error. Every line on standard input is the
    number of a signal to send; its end means: shut down.
    """
    order = json.loads(sys.argv[1])
    server = subprocess.Popen(
        order["command"],
        env=order["environment"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        user=order["uid"],
        group=order["gid"],
        extra_groups=None if order["uid"] is None else [],
        umask=0o077,
        pass_fds=[order["lock_fd"]],
        preexec_fn=die_with_parent,  # safe here: no thread has been started yet
    )
    os.close(order["lock_fd"])
    threading.Thread(target=end_with, args=[server], daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        print(server.pid, flush=True)  # noqa: T201 - this is the answer to whoever started the keeper
    for line in sys.stdin:
        server.send_signal(int(line))
    server.send_signal(order["stop_signal"])
    try:
        server.wait(SHUTDOWN_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def die_with_parent() -> None:
    """Have Linux kill the server if the keeper itself is killed. Other systems have no such call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with(server: "subprocess.Popen[bytes]") -> NoReturn:
    """Wait for the server and end the keeper at once, although its main thread still reads standard input."""
    code = server.wait()
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
