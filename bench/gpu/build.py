"""The part `build`: the C++ extension and the CUDA library where the other parts import them, and the probes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu import machine_code
from bench.gpu.task import Task

PROBES = Path("csrc") / "cuda" / "probes"
ARCHITECTURES = (  # the probes': with what only Hopper has, and without it for all others
    "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=[sm_80,compute_80]",
)  # fmt: skip


def cpu(task: Task) -> dict:
    """pyvit_accel._C, against the torch that is here."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", task.lib, "--build-temp", f"{task.work}/temp"]
    _call(command, task, PYVIT_ACCEL_EXT="cpu")
    return {"files": [path.name for path in (Path(task.lib) / "pyvit_accel").glob("_C*.so")]}


def nvcc() -> str | None:
    """Its path, under CUDA_HOME or else on the PATH: where setup.py finds it."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


NO_NVCC = {"status": "not run", "why": "there is no nvcc under CUDA_HOME or on the PATH"}


def cuda(task: Task) -> dict:
    """The CUDA library, copied beside the package's modules."""
    if nvcc() is None:
        return NO_NVCC
    source = Path(task.root) / "pyvit_accel"
    _call([sys.executable, "setup.py", "build_cuda"], task)
    built = sorted(source.glob("libpyvit_accel_cuda*.so"))
    for library in built:
        shutil.copy2(library, Path(task.lib) / "pyvit_accel")
    return {"files": [f"{library.name}, {library.stat().st_size} bytes" for library in built]}


def probes(task: Task) -> dict:
    """The program that measures pipes."""
    if nvcc() is None:
        return NO_NVCC
    compiled = compile_probes(Path(task.root), Path(task.work))
    faults = machine_code.check(compiled)
    if faults:
        return {"status": "failed", "why": f"its machine code: {'; '.join(faults)}"[:400]}
    checked = "machine code not looked at" if faults is None else "machine code as meant"
    return {"files": [f"{compiled.name}, {compiled.stat().st_size} bytes, {checked}"]}


def compile_probes(root: Path, folder: Path) -> Path:
    """nvcc on csrc/cuda/probes, one object a file at once; CalledProcessError holds what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    sources, target = sorted((root / PROBES).glob("*.cu")), folder / "probes"
    newest = max(path.stat().st_mtime for path in (root / PROBES).iterdir())
    if target.exists() and target.stat().st_mtime > newest:
        return target
    flags = ["-O3", "-std=c++17", "-lineinfo", "-Xptxas", "-v", *ARCHITECTURES]
    objects = [folder / f"probe_{path.stem}.o" for path in sources]
    running = [
        subprocess.Popen([nvcc(), *flags, "-c", str(path), "-o", str(made)], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for path, made in zip(sources, objects, strict=True)
    ]  # fmt: skip
    for process, path in zip(running, sources, strict=True):
        printed = process.communicate()[0]
        (folder / f"probe_{path.stem}.txt").write_text(printed, encoding="utf-8")
        if process.returncode:
            raise RuntimeError(f"nvcc on {path.name}: {first_error(printed)}")
    link = [nvcc(), *ARCHITECTURES, *map(str, objects), "-o", str(target)]
    subprocess.run(link, check=True, capture_output=True, text=True)
    return target


def first_error(printed: str) -> str:
    lines = [line for line in printed.splitlines() if "error" in line.lower()]
    return lines[0] if lines else printed.strip()[-300:]


def _call(command: list[str], task: Task, **variables: str) -> None:
    done = subprocess.run(
        command, cwd=task.root, env=os.environ | variables, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])}: {first_error(done.stdout)}")


def main() -> None:
    task = Task.current()
    builds = {"cpu": cpu, "cuda": cuda, "probes": probes} if task.device == "cuda" else {"probes": probes}
    task.device = "cpu"  # nothing here needs the GPU, or torch in this process
    names = list(builds)[task.shard :: task.shards]

    def timed(name: str) -> dict:
        start = time.perf_counter()
        values = builds[name](task)
        return {"seconds": round(time.perf_counter() - start, 1)} | values

    task.run({name: lambda name=name: timed(name) for name in names})


if __name__ == "__main__":
    main()
