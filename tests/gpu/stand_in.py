"""The GPU's code on a machine that has none: python -m tests.gpu.stand_in -m pytest tests/gpu -k "memory or waits"

A CUDA build of torch runs under a CUDA runtime, cuBLAS and NCCL that compute nothing (stand_in.c).

    as on a GPU     which code runs, streams, events, pinned copies, what the allocator takes (a plan can be held against it),
                    when the host waits, how many kernels are launched, Triton's compiling, several ranks (torchrun)
    not at all      results, so tests of them fail here; speed; cuDNN, which is left out

Wants gcc and nm, and torch's CUDA build (pip's default on Linux). What follows goes to Python.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

WANTED = re.compile(r"(?:cuda|cu|cublas|nccl|nvml)[A-Z]\w*")  # not __cuda..: kernels register with the real runtime
SITE = "import torch\ntorch.backends.cuda.enable_cudnn_sdp(False)\n"  # in every Python that is started, ranks too


def wanted(libraries: list[Path]) -> set[str]:
    """The functions of CUDA, cuBLAS and NCCL that torch's libraries leave open."""
    told = subprocess.run(
        ["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1].split("@")[0] for line in told.splitlines() if " U " in line}
    return {n for n in names if WANTED.fullmatch(n)}


def build(directory: Path) -> Path:
    """The library, under the driver's name too. ValueError where it cannot be made."""
    import torch

    if torch.version.cuda is None:
        raise ValueError(f"torch {torch.__version__} is a build without CUDA: the stand-in wants one with it")
    try:
        import triton
    except ImportError:
        raise ValueError("triton is not installed: its package has the CUDA headers that the stand-in wants") from None
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    written = Path(__file__).with_suffix(".c").read_text()
    driver = re.findall(r"CUresult CUDAAPI (cu\w+)\(", (headers / "cuda.h").read_text())
    names = wanted(sorted((Path(torch.__file__).parent / "lib").glob("lib*cuda*.so"))) | set(driver)
    missing = sorted(n for n in names if not re.search(rf"\b{n}\(", written))
    source = directory / "stand_in.c"
    source.write_text(written + "".join(f"int {n}(void) {{ return 0; }}\n" for n in missing))
    library = directory / "libcuda.so.1"
    subprocess.run(["gcc", "-w", "-O1", "-shared", "-fPIC", f"-I{headers}", "-o", library, source, "-ldl"], check=True)
    (directory / "libcuda.so").symlink_to(library)
    (directory / "sitecustomize.py").write_text(SITE)
    return library


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as made:
        try:
            library = build(Path(made))
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        paths = {k: os.pathsep.join(filter(None, (made, os.environ.get(k)))) for k in ("LD_LIBRARY_PATH", "PYTHONPATH")}
        found = {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": made}
        return subprocess.run([sys.executable, *arguments], env=os.environ | paths | found, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
