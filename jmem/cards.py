"""The cards that are known by name: what their makers and XLA say of each.

Sources: the public target specifications of openxla/xla for H200, H100, A100, B200,
B300, RTX A6000 and RTX PRO 6000 (whose memory there is a round 96 GiB). For all others
cores, bandwidth, clock and L2 as NVIDIA publishes them; memory is what CUDA reports on
Linux, a few hundred MiB below what `nvidia-smi` prints, and differs by some MiB between
drivers. Not confirmed on a card: memory of RTX 5080, 4080, 4070 Ti Super and 3060,
L40S, GH200 and RTX PRO 6000, which is what PyTorch's out-of-memory messages name. It
decides what fits, not what is measured; a TOML of one's own says otherwise.
Sizes of an SM's shared memory: the CUDA programming guide, by compute capability.

A card is a row of fields of `jmem.targets.Target`, which explains them and checks them.
"""

from typing import Any

_MiB = 2**20

_HOPPER = {
    "compute_capability": "9.0",
    "cores": 132,
    "fpus_per_core": 128,
    "l2_bytes": 52428800,
    "clock_ghz": 1.98,
    "shared_bytes_per_core": 233472,
    "shared_bytes_per_block": 232448,
}
_A100 = {
    "compute_capability": "8.0",
    "cores": 108,
    "fpus_per_core": 64,
    "l2_bytes": 41943040,
    "clock_ghz": 1.41,
    "shared_bytes_per_core": 167936,
    "shared_bytes_per_block": 166912,
}
_BLACKWELL = {
    "fpus_per_core": 128,
    "clock_ghz": 1.965,
    "shared_bytes_per_core": 233472,
    "shared_bytes_per_block": 232448,
}
_SMALL = {  # 1,536 threads and 100 KiB a core
    "fpus_per_core": 128,
    "shared_bytes_per_core": 102400,
    "shared_bytes_per_block": 101376,
    "threads_per_core": 1536,
}
_AMPERE = _SMALL | {"compute_capability": "8.6", "l2_bytes": 6291456}
_ADA = _SMALL | {"compute_capability": "8.9"}
_RTX_BLACKWELL = _SMALL | {"compute_capability": "12.0"}


CARDS: dict[str, dict[str, Any]] = {
    "h200": dict(
        _HOPPER,
        description="NVIDIA H200",
        compiler_bytes=151397597184,
        bandwidth=4.8e12,
    ),
    "h100": dict(
        _HOPPER,
        description="NVIDIA H100 80GB HBM3",
        compiler_bytes=84942979072,
        bandwidth=3.35232e12,
    ),
    "gh200": dict(  # of 96 GB
        _HOPPER | {"l2_bytes": 62914560},
        description="NVIDIA GH200 480GB",
        compiler_bytes=96768 * _MiB,
        bandwidth=4.0e12,
    ),
    "a100-80": dict(
        _A100,
        description="NVIDIA A100-SXM4-80GB",
        compiler_bytes=85100068864,
        bandwidth=2.03904e12,
    ),
    "a100-40": dict(
        _A100,
        description="NVIDIA A100-SXM4-40GB",
        compiler_bytes=42331013120,
        bandwidth=1.5552e12,
    ),
    "b200": dict(
        _BLACKWELL,
        description="NVIDIA B200",
        compute_capability="10.0",
        compiler_bytes=191514411008,
        bandwidth=7.67232e12,
        cores=148,
        l2_bytes=132644864,
    ),
    "b300": dict(
        _BLACKWELL,
        description="NVIDIA B300",
        compute_capability="10.3",
        compiler_bytes=297021865984,
        bandwidth=7.936e12,
        cores=158,
        l2_bytes=135528448,
    ),
    "rtxpro6000": dict(
        _RTX_BLACKWELL,
        description="NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        compiler_bytes=97248 * _MiB,
        bandwidth=1.792e12,
        cores=188,
        l2_bytes=134217728,
        clock_ghz=2.6,
    ),
    "rtx6000ada": dict(
        _ADA,
        description="NVIDIA RTX 6000 Ada Generation",
        compiler_bytes=48632 * _MiB,
        bandwidth=9.6e11,
        cores=142,
        l2_bytes=100663296,
        clock_ghz=2.505,
    ),
    "a6000": dict(
        _AMPERE,
        description="NVIDIA RTX A6000",
        compiler_bytes=51041271808,
        bandwidth=7.68096e11,
        cores=84,
        clock_ghz=1.8,
    ),
    "l40s": dict(
        _ADA,
        description="NVIDIA L40S",
        compiler_bytes=45456 * _MiB,
        bandwidth=8.64e11,
        cores=142,
        l2_bytes=100663296,
        clock_ghz=2.52,
    ),
    "l4": dict(
        _ADA,
        description="NVIDIA L4",
        compiler_bytes=23580639232,
        bandwidth=3.0e11,
        cores=58,
        l2_bytes=50331648,
        clock_ghz=2.04,
    ),
    "a10": dict(
        _AMPERE,
        description="NVIDIA A10",
        compiler_bytes=23609475072,
        bandwidth=6.0e11,
        cores=72,
        clock_ghz=1.695,
    ),
    "t4": dict(
        {"compute_capability": "7.5", "fpus_per_core": 64},
        description="Tesla T4",
        compiler_bytes=15843721216,
        bandwidth=3.2e11,
        cores=40,
        l2_bytes=4194304,
        clock_ghz=1.59,
        shared_bytes_per_core=65536,
        shared_bytes_per_block=65536,
        threads_per_core=1024,
    ),
    "rtx5090": dict(
        _RTX_BLACKWELL,
        description="NVIDIA GeForce RTX 5090",
        compiler_bytes=33677180928,
        bandwidth=1.792e12,
        cores=170,
        l2_bytes=100663296,
        clock_ghz=2.407,
    ),
    "rtx5080": dict(
        _RTX_BLACKWELL,
        description="NVIDIA GeForce RTX 5080",
        compiler_bytes=15824 * _MiB,
        bandwidth=9.6e11,
        cores=84,
        l2_bytes=67108864,
        clock_ghz=2.617,
    ),
    "rtx4090": dict(
        _ADA,
        description="NVIDIA GeForce RTX 4090",
        compiler_bytes=25386352640,
        bandwidth=1.008e12,
        cores=128,
        l2_bytes=75497472,
        clock_ghz=2.52,
    ),
    "rtx4080": dict(
        _ADA,
        description="NVIDIA GeForce RTX 4080",
        compiler_bytes=15936 * _MiB,
        bandwidth=7.168e11,
        cores=76,
        l2_bytes=67108864,
        clock_ghz=2.505,
    ),
    "rtx4070tisuper": dict(
        _ADA,
        description="NVIDIA GeForce RTX 4070 Ti SUPER",
        compiler_bytes=15936 * _MiB,
        bandwidth=6.723e11,
        cores=66,
        l2_bytes=50331648,
        clock_ghz=2.61,
    ),
    "rtx3090": dict(
        _AMPERE,
        description="NVIDIA GeForce RTX 3090",
        compiler_bytes=25438126080,
        bandwidth=9.36e11,
        cores=82,
        clock_ghz=1.695,
    ),
    "rtx3060": dict(  # of 12 GB
        _AMPERE | {"l2_bytes": 2359296},
        description="NVIDIA GeForce RTX 3060",
        compiler_bytes=11904 * _MiB,
        bandwidth=3.6e11,
        cores=28,
        clock_ghz=1.777,
    ),
}
"""Fields of each card, by name."""

ALSO = {"rtx306012": "rtx3060", "gh20096": "gh200"}
"""Other names, without dashes: of cards that are sold with other memories too."""
