"""What the tests of all examples have in common."""

import signal

# A shell gives what it starts in the background a SIGINT that is ignored, and so would every example that a test ends so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
