"""Import it before the native library is loaded: `make test-asan` says which one that is to be."""

import os
from pathlib import Path

from shuteye.native import library

if chosen := os.environ.get("SHUTEYE_TEST_LIBRARY"):
    library.use_library(Path(chosen))
