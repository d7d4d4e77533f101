"""Prints what a process can know of itself, for `test_processes.py`; with "wait" it waits with a child for ever."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

if sys.argv[1:] == ["wait"]:
    subprocess.Popen(["sleep", "600"])
    print("waiting", flush=True)
    time.sleep(600)
handlers = {number.name: signal.getsignal(number) for number in signal.Signals}
print({name: str(handler) for name, handler in handlers.items()})
print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
print(sys.argv[1:], __name__, threading.current_thread() is threading.main_thread(), threading.active_count())
print(os.getsid(0) == os.getpid() == os.getpgid(0), sys.stdin.read(), sorted(os.listdir("/proc/self/fd"))[:4])
print("LMM_TOLD=" + os.environ["LMM_TOLD"])
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
status = dict(line.split(":\t") for line in lines if line.startswith(("Sig", "ShdPnd")))
KNOWN = 2**31 - 1  # of the next two the C library keeps one for itself, once there is a thread
print({name: int(status[name], 16) & KNOWN for name in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")})
sys.exit(7)
