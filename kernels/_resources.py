"""Registers, spills, shared memory and instructions of a kernel, with no GPU.

    python -m jmem.kernels._resources windowed_attention            a table
    python -m jmem.kernels._resources windowed_attention --gpu h100

It compiles the calls that the kernel's `shapes.kernel_calls()` lists, and reads what
the assembler and Mosaic print. They print to the process's own output, and only if told
to before the compiler is loaded: hence a process of its own. A kernel's `budget.toml`
says how much of each it may use; its tests compare. Instructions are read by NVIDIA's
disassembler, which the package `nvidia-cuda-nvdisasm` puts where JAX looks for it.
"""

import argparse
import dataclasses
import importlib
import os
import re
import subprocess
import sys

_PRINT = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTXAS", "RESOURCES", "SASS")}
_SHARED = re.compile(r"^Resources\(smem_scratch_bytes=(\d+)", re.M)
_REPORT = re.compile(
    r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)
_CODE = re.compile(r"^\t\.section\t\.text\.(\w+?)_mosaic_gpu_kernel,.*\n", re.M)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*);|^(\.L\w+):", re.M)
_JUMP = re.compile(r"BRA.*\((\.L\w+)\)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel uses."""

    registers: int
    """Of one thread."""
    spill_bytes: int
    """Stored and loaded by one thread, since it has too few registers."""
    shared_bytes: int
    """Of one block."""
    loop: tuple[int, int] = (0, 0)
    """Instructions of a warp, and the tensor-core products among them, in the smallest
    loop that has such; zeros without a disassembler."""

    def blocks_per_core(self, threads: int, shared_per_core: int = 233472) -> int:
        """Blocks that fit on a streaming multiprocessor at once."""
        registers = -(-self.registers // 8) * 8  # given out in eights
        by_registers = 65536 // (registers * threads)
        return min(by_registers, shared_per_core // (self.shared_bytes + 1024))


def resources(kernel: str, gpu: str = "h200", timeout: float = 300) -> dict:
    """`Resources` of every call that `jmem.kernels.<kernel>.shapes` lists, by name.

    Raises:
      RuntimeError: a call does not compile, or the compiler did not report on it; the
        end of what it printed follows.
    """
    module = "jmem.kernels._resources"  # __name__ is "__main__" on the command line
    command = (sys.executable, "-m", module, kernel, "--gpu", gpu, "--worker")
    environment = {**os.environ, **_PRINT, "JAX_PLATFORMS": "cpu"}
    environment.pop("MOSAIC_GPU_DUMP_TO", None)
    done = subprocess.run(
        command, env=environment, capture_output=True, timeout=timeout, check=False
    )
    printed = done.stdout.decode(errors="replace")
    names = re.findall(r"^kernel (\w+)$", printed, re.M)
    shared = [int(size) for size in _SHARED.findall(printed)]
    reports = {name: numbers for name, *numbers in _REPORT.findall(printed)}
    if done.returncode or len(shared) != len(names) or set(reports) != set(names):
        words = done.stderr.decode(errors="replace")[-3000:] or printed[-3000:]
        raise RuntimeError(f"{kernel}: not compiled, or not reported on.\n{words}")
    loops = {name: _find_loop(code) for name, code in _split_code(printed).items()}
    found = {}
    for name, size in zip(names, shared, strict=True):  # printed in the order of calls
        stored, loaded, registers = map(int, reports[name])
        spilled = stored + loaded
        found[name] = Resources(
            registers=registers,
            spill_bytes=spilled,
            shared_bytes=size,
            loop=loops.get(name, (0, 0)),
        )
    return found


def _split_code(printed: str) -> dict[str, str]:
    """What was disassembled, by kernel."""
    _, *parts = _CODE.split(printed)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _find_loop(code: str) -> tuple[int, int]:
    lines = [label or text for text, label in _INSTRUCTION.findall(code)]
    places = {line: at for at, line in enumerate(lines) if line.startswith(".L")}
    loops = []
    for at, line in enumerate(lines):
        if (jump := _JUMP.search(line)) and places.get(jump[1], at) < at:
            inside = lines[places[jump[1]] : at + 1]
            products = sum("GMMA" in text for text in inside)
            if products:
                loops.append((len([t for t in inside if t[0] != "."]), products))
    return min(loops, default=(0, 0))


def _compile(kernel: str, gpu: str) -> None:
    from jmem.program import Program
    from jmem.targets import resolve

    calls = importlib.import_module(f"jmem.kernels.{kernel}.shapes").kernel_calls()

    def every(arguments):  # in one program: the compiler then starts once
        return [fn(*args) for (fn, _), args in zip(calls.values(), arguments)]

    print(*(f"kernel {name}" for name in calls), sep="\n", flush=True)
    program = Program(every, ([args for _, args in calls.values()],))
    program.compile(resolve(gpu))


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kernel", help="a folder of kernels/")
    parser.add_argument("--gpu", default="h200", help="the GPU compiled for")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        _compile(given.kernel, given.gpu)
        return 0
    found = resources(given.kernel, given.gpu)
    width = max(map(len, found))
    heads = f"{'registers':>11}{'spill':>7}{'shared':>9}{'loop':>7}{'products':>10}"
    print(f"{'':<{width}}{heads}")
    for name, one in found.items():
        numbers = f"{one.registers:>11}{one.spill_bytes:>7}{one.shared_bytes:>9,}"
        print(f"{name:<{width}}{numbers}{one.loop[0]:>7}{one.loop[1]:>10}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
