"""In the place of vLLM's server: becomes `shuteye serve`. Some of its tests start this module as a process."""

from __future__ import annotations

import os
import sys

import in_place

if __name__ == "__main__":
    arguments = sys.argv[1:]
    place = arguments.index("--model")
    model = arguments[place + 1]
    line = in_place.command(model, arguments[:place] + arguments[place + 2 :])
    os.execve(line[0], line, in_place.environment(None))
