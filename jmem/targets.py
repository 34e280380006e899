"""Described GPUs: what XLA must be told about a card to compile for it without one.

    resolve("h200")            one card of the table in `jmem.cards`
    resolve("h200x8")          eight of them in one host; beyond eight, hosts of eight
    resolve("./mycard.toml")   a card of your own: the fields of `Target`, one a line

A file may name a card of the table and say what differs, in three lines:

    like = "rtx4090"
    memory_gib = 32
    cores = 144

Capacity hardly changes how a program is laid out (matmul tilings do); it decides
whether the program *fits*. `compiler_bytes` is the size XLA is told, `usable_bytes`
what an allocator can really get on that card.
"""

import dataclasses
import difflib
import importlib.util
import pathlib
import re
import tomllib
from collections.abc import Callable
from typing import Any, NoReturn

from jmem.cards import ALSO, CARDS

GiB = 2**30
DRIVER_BYTES = 2 * GiB
"""Bytes no allocator gets unless measured: CUDA context, library handles, driver."""
GPUS_PER_HOST = 8
_MAX_DEVICES = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of GPU, and how many of them a program runs on.

    Raises:
      BadFieldError: a field has a value no GPU has; field, value and rule are named.
    """

    name: str
    """What reports call it, and what `resolve` finds it by."""
    description: str
    """The name the driver gives the device."""
    compute_capability: str
    """Major and minor, as "9.0"."""
    cores: int
    """Streaming multiprocessors."""
    fpus_per_core: int
    compiler_bytes: int
    """Device memory XLA is told of."""
    usable_bytes: int = 0
    """Bytes an allocator can get; 0 stands for `compiler_bytes` - 2 GiB."""
    bandwidth: float
    """Bandwidth of the device memory, in bytes a second."""
    l2_bytes: int
    clock_ghz: float
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    """Most shared memory that one thread block can ask for, in bytes."""
    threads_per_core: int = 2048
    devices: int = 1
    """GPUs of the mesh; beyond eight they sit in hosts of eight."""

    def __post_init__(self):
        if not self.usable_bytes:
            usable = max(self.compiler_bytes - DRIVER_BYTES, 0)
            object.__setattr__(self, "usable_bytes", usable)
        for field, (rule, holds) in _RULES.items():
            value = getattr(self, field)
            if not holds(self, value):
                raise BadFieldError(
                    field, f"{field}={value!r} is refused; need {rule}."
                )

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability as two numbers, so that `>= (9, 0)` can be asked."""
        major, minor = self.compute_capability.split(".")
        return int(major), int(minor)

    @property
    def topology(self) -> str:
        """Partitions x hosts x GPUs a host, the spelling XLA wants."""
        hosts, rest = divmod(self.devices, GPUS_PER_HOST)
        return f"1x{hosts}x{GPUS_PER_HOST}" if hosts else f"1x1x{rest}"

    @property
    def text(self) -> str:
        """The card as XLA's `GpuTargetConfigProto` in text form."""
        major, minor = self.capability
        accelerated = major in (9, 10)  # as XLA describes H200 and B200, not RTX PRO
        extension = "feature_extension: ACCELERATED_FEATURES" if accelerated else ""
        return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {self.threads_per_core}
  core_count: {self.cores}
  fpus_per_core: {self.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_bytes_per_block}
  shared_memory_per_core: {self.shared_bytes_per_core}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  memory_bandwidth: {round(self.bandwidth)}
  device_memory_size: {self.compiler_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.description}"
"""

    def compile_only_devices(self) -> tuple[Any, ...]:
        """Devices that compile and never run: this card, `devices` times.

        Raises:
          NoCompilerError: JAX has no CUDA plugin here, or it was started without
            JAX_SKIP_CUDA_CONSTRAINTS_CHECK on a machine that has no driver.
        """
        from jax.experimental import topologies

        try:
            described = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                topology=self.topology,
                target_config=self.text,
            )
        except NotImplementedError as error:
            # The plugin is missing, or it refused to load when JAX started.
            if _plugin_installed():
                raise NoCompilerError(_LATE, late=True) from error
            raise NoCompilerError(_MISSING, late=False) from error
        return tuple(described.devices)


class NoCompilerError(RuntimeError):
    """XLA's GPU compiler cannot be reached from this process.

    `late` says that another process could: JAX was merely started too early here.
    """

    def __init__(self, message: str, *, late: bool):
        super().__init__(message)
        self.late = late


_LATE = (
    "JAX was started in this process before its GPU compiler could be loaded.\n"
    "Set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment,\n"
    "or write `import jmem` above the first line that uses JAX."
)
_MISSING = (
    "JAX's CUDA plugin is not installed, and it holds the GPU compiler.\n"
    'Install it (no GPU and no driver is needed): pip install "jmem[cuda13]",\n'
    'or "jmem[cuda12]" where a GPU has a driver older than 580; '
    "in a clone of jmem: uv sync."
)


class BadFieldError(ValueError):
    """A field of a target has a value that no GPU has."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


def _plugin_installed() -> bool:
    plugins = importlib.util.find_spec("jax_plugins")
    return plugins is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}")
        for version in (12, 13)
    )


def _require_between(low: float, high: float, unit: str = ""):
    rule = f"{low:,} to {high:,}{unit}"
    return rule, lambda target, value: low <= value <= high


# Wide enough for cards to come, tight enough to catch a wrong unit (GB for bytes).
_RULES: dict[str, tuple[str, Callable]] = {
    "name": ("a name of one or more characters", lambda target, value: bool(value)),
    "description": (
        "characters that need no escape in XLA's text format",
        lambda target, value: not set(value) & set('"\\\n'),
    ),
    "compute_capability": (
        'a string "major.minor" from "7.5" (the oldest CUDA 13 supports) to "12.9"',
        lambda target, value: (
            re.fullmatch(r"\d{1,2}\.\d", value) is not None
            and (7, 5) <= tuple(map(int, value.split("."))) <= (12, 9)
        ),
    ),
    "cores": _require_between(1, 1024),
    "fpus_per_core": _require_between(16, 1024),
    "compiler_bytes": _require_between(GiB, 4096 * GiB, " bytes"),
    "usable_bytes": (
        "more than 0 and at most compiler_bytes",
        lambda target, value: 0 < value <= target.compiler_bytes,
    ),
    "bandwidth": _require_between(10**9, 10**14, " bytes a second"),
    "l2_bytes": _require_between(2**16, 4 * GiB, " bytes"),
    "clock_ghz": _require_between(0.1, 10, " GHz"),
    "shared_bytes_per_core": _require_between(2**15, 2**24, " bytes"),
    "shared_bytes_per_block": (
        "48 KiB to shared_bytes_per_core",
        lambda target, value: 49152 <= value <= target.shared_bytes_per_core,
    ),
    "threads_per_core": (
        "a multiple of 32 from 1024 to 8192",
        lambda target, value: value % 32 == 0 and 1024 <= value <= 8192,
    ),
    "devices": (
        f"1 to 8, or a multiple of 8 up to {_MAX_DEVICES}",
        lambda target, value: (
            1 <= value <= GPUS_PER_HOST
            or (value % GPUS_PER_HOST == 0 and 0 < value <= _MAX_DEVICES)
        ),
    ),
}

TARGETS: dict[str, Target] = {
    name: Target(name=name, **fields) for name, fields in CARDS.items()
}
"""The cards that are known by name."""


def resolve(target: str | Target) -> Target:
    """The target meant by a name, a mesh of a name, or a TOML file; targets pass.

    Raises:
      ValueError: unknown name (the nearest is offered), unknown field or absurd value
        in a file (with file and line).

    >>> resolve("H200x8").topology
    '1x1x8'
    >>> resolve("rtx4090").usable_bytes // GiB
    21
    """
    if isinstance(target, Target):
        return target
    if not isinstance(target, str):
        raise TypeError(
            f"target={target!r} is a {type(target).__name__}; "
            "need a name, the path of a TOML file, or a jmem.targets.Target."
        )
    if target.endswith(".toml") or "/" in target:
        return _load(pathlib.Path(target))
    name = re.sub(r"[\s_]", "", target.lower())
    if found := _find(name):
        return found
    mesh = re.fullmatch(r"(?P<card>.+)x(?P<devices>\d{1,9})", name)
    if mesh and (card := _find(mesh["card"])):
        return dataclasses.replace(card, name=name, devices=int(mesh["devices"]))
    raise ValueError(
        f"target={target!r} is no known GPU{suggest(name, TARGETS)} Known: "
        f"{', '.join(TARGETS)}; a mesh is written like 'h200x8', your own card like "
        "'./mycard.toml'."
    )


def _find(name: str) -> Target | None:
    """The card of a name, with or without dashes and the words before it.

    >>> _find("rtx-4070-ti-super").name, _find("5090").name, _find("nvidial40s").name
    ('rtx4070tisuper', 'rtx5090', 'l40s')
    """
    plain = re.sub(r"^(nvidia|geforce)+|gb$", "", name.replace("-", ""))
    known = {card.replace("-", ""): target for card, target in TARGETS.items()}
    known |= {other: TARGETS[card] for other, card in ALSO.items()}
    return known.get(plain) or known.get(f"rtx{plain}")


def suggest(word: str, words) -> str:
    """The tail of an unknown-name message: a suggestion when one is near enough.

    >>> suggest("h20", ["h200", "l4"])
    "; did you mean 'h200'?"
    >>> suggest("zebra", ["h200", "l4"])
    '.'
    """
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _load(path: pathlib.Path) -> Target:
    """A target from the user's own TOML file, every field checked."""
    try:
        text = path.read_bytes().decode()
        values: dict[str, Any] = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable TOML file: {error}") from error

    def refuse(key: str, words: str) -> NoReturn:
        raise ValueError(f"{path}:{_find_line(text, key)}: {words}")

    fields = {field.name: field for field in dataclasses.fields(Target)}
    types = {name: field.type for name, field in fields.items()} | _SHORT
    for key, value in values.items():
        if key not in types:
            refuse(key, f"unknown field {key!r}{suggest(key, types)}")
        wanted = types[key]
        words = {str: "a string", int: "a whole number", float: "a number"}
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if wanted is int and isinstance(value, float) and value.is_integer():
            values[key] = int(value)  # TOML has no 1e9 among its integers
        elif not (number if wanted is float else type(value) is wanted):
            refuse(key, f"{key}={value!r} is refused; need {words[wanted]}.")
    if "memory_gib" in values:
        size = values.pop("memory_gib")
        if "compiler_bytes" in values:
            refuse(
                "memory_gib", "memory_gib and compiler_bytes say the same; give one."
            )
        if not 1 <= size <= 4096:
            refuse("memory_gib", f"memory_gib={size} is refused; need 1 to 4,096 GiB.")
        values["compiler_bytes"] = round(size * GiB)
    if "like" in values:
        name = re.sub(r"[\s_]", "", values.pop("like").lower())
        if (card := _find(name)) is None:
            known = f"{suggest(name, TARGETS)} Known: {', '.join(TARGETS)}."
            refuse("like", f"like={name!r} is no card of the table{known}")
        own: dict[str, Any] = {"name": path.stem, "description": path.stem}
        values = dataclasses.asdict(card) | own | {"usable_bytes": 0} | values
    values.setdefault("name", path.stem)
    values.setdefault("description", values["name"])
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise ValueError(
            f'{path}: missing field {missing[0]!r} (of {missing}); like = "rtx4090" '
            "takes what is not said from that card."
        )
    try:
        return Target(**values)
    except BadFieldError as error:
        refuse(error.field, str(error))


_SHORT = {"like": str, "memory_gib": float}
"""Further keys of a file: a card of the table, and the memory in GiB."""


def _find_line(text: str, key: str) -> int:
    """The line of `text` that assigns `key`, from 1; 1 when it is not written there."""
    assigns = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[.=\]]")
    for number, line in enumerate(text.splitlines(), start=1):
        if assigns.match(line.lstrip(" [")):
            return number
    return 1
