"""Measurements, and what they share. The programs: `python -m bench.NAME`."""

import sys

from minillava.command import end_quietly

if sys.argv[0] == "-m":  # so it is until `python -m` has found the program, which then imports what is slow
    end_quietly()
