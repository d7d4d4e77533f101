"""How a command says by its exit code what to do next; launch/README.md says the same to those who read it.

0 is success, 1 a fault that may pass, of which the same command may be tried again, 2 a refusal: another command, or
other data, is needed. Other codes of a run are those below. A code of another host is passed on as it is.
"""

PREEMPTED = 75  # asked to stop, everything is saved: the same command continues
STALLED = 124  # something took longer than it may: the same command continues
STOPPED = 130  # ended by Ctrl-C
