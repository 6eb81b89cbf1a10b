"""Compiles the native kernels into the wheel, and beside the sources for editable installs.

Knows nothing of the kernels: src/shuteye/native/build.py does. Without a compiler the package installs all the same.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src", "shuteye", "native")


class NativeBuildHook(BuildHookInterface[Any]):
    """Runs before a wheel is put together; an sdist carries the sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a wheel with a library is for this platform, but for any Python 3."""
        if self.target_name != "wheel":
            return
        build = self._load_build()
        try:
            library: Path = build.build()
        except build.BuildFailed as error:
            build.LIBRARY.unlink(missing_ok=True)
            self.app.display_warning(f"shuteye works, but slower, without its native kernels. {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(str(library.relative_to(self.root)))

    def _load_build(self) -> Any:
        spec = importlib.util.spec_from_file_location("shuteye_native_build", Path(self.root) / NATIVE / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
