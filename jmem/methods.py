"""The 21 methods: one card each, and the table of them that stands in the README.

A card's slug is its name everywhere: the module `jmem/<family>/<slug>.py`, the
experiment `experiments/<slug>.py`, the presets and claims `configs/<slug>/`, the tests
`tests/<family>/test_<slug>.py`. tests/test_methods.py keeps the cards true.
"""

import dataclasses
from typing import Literal

Family = Literal[
    "finetune",
    "kvcache",
    "moe",
    "sparse",
    "multimodal",
    "vision",
    "spatial",
    "timeseries",
    "precision",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One published method and where it stands in this library."""

    slug: str
    """The method's one name; a Python identifier."""
    family: Family
    """The package under `jmem` that holds it."""
    title: str
    """The paper's title."""
    arxiv: str
    """The paper's arXiv identifier, without a version."""
    idea: str
    """What it does to memory, in one line."""
    kernels: tuple[str, ...] = ()
    """Folders of `kernels/` that it calls, or will call once built."""
    status: Literal["planned", "built"] = "planned"
    """"built": module, experiment, presets, claims and tests are all there."""

    @property
    def module(self) -> str:
        """Dotted name of the module that implements it."""
        return f"jmem.{self.family}.{self.slug}"

    @property
    def experiment(self) -> str:
        """Dotted name of its experiment, for `python -m`."""
        return f"experiments.{self.slug}"


METHODS: tuple[Method, ...] = (
    Method(
        slug="lisa",
        family="finetune",
        title="LISA: Layerwise Importance Sampling for Memory-Efficient Large Language"
        " Model Fine-Tuning",
        arxiv="2403.17919",
        idea="train embedding, head and a few layers drawn anew every K steps, so that"
        " only those need gradients and moments",
        status="built",
    ),
    Method(
        slug="mixlora",
        family="finetune",
        title="MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based"
        " Mixture of Experts",
        arxiv="2404.15159",
        idea="make a dense model a sparse mixture whose experts are LoRA adapters over"
        " one frozen MLP",
        status="built",
    ),
    Method(
        slug="windowkv",
        family="kvcache",
        title="WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for"
        " Efficient LLM Inference",
        arxiv="2503.17922",
        idea="keep windows of consecutive prompt tokens, chosen once for a group of"
        " layers",
        kernels=("windowed_attention",),
        status="built",
    ),
    Method(
        slug="gemfilter",
        family="kvcache",
        title="Discovering the Gems in Early Layers: Accelerating Long-Context LLMs"
        " with 1000x Input Token Reduction",
        arxiv="2409.17422",
        idea="let an early layer pick the prompt's tokens, then run the whole model on"
        " those only",
        status="built",
    ),
    Method(
        slug="shadowkv",
        family="kvcache",
        title="ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM"
        " Inference",
        arxiv="2410.21465",
        idea="keep low-rank keys on the GPU and values in host memory, and fetch the"
        " chunks that attention selects",
        kernels=("host_gather",),
    ),
    Method(
        slug="retrieval_attention",
        family="kvcache",
        title="RetrievalAttention: Accelerating Long-Context LLM Inference via Vector"
        " Retrieval",
        arxiv="2409.10516",
        idea="keep a small window on the GPU and find the other keys in host memory by"
        " nearest-neighbour search",
    ),
    Method(
        slug="pregated_moe",
        family="moe",
        title="Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable"
        " Mixture-of-Expert Inference",
        arxiv="2308.12066",
        idea="choose experts one block early, so that they are copied from host memory"
        " while the block before computes",
    ),
    Method(
        slug="flash_llm",
        family="sparse",
        title="Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large Generative"
        " Model Inference with Unstructured Sparsity",
        arxiv="2309.10285",
        idea="store pruned weights compressed and expand each tile on chip, just before"
        " the dense product",
        kernels=("spmm",),
    ),
    Method(
        slug="videoscan",
        family="multimodal",
        title="VideoScan: Enabling Efficient Streaming Video Understanding via"
        " Frame-level Semantic Carriers",
        arxiv="2503.09387",
        idea="keep one token's keys and values for each video frame, in a bank of"
        " bounded size",
    ),
    Method(
        slug="dynamic_llava",
        family="multimodal",
        title="Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic"
        " Vision-language Context Sparsification",
        arxiv="2412.00876",
        idea="learned predictors drop image tokens, and decide which generated tokens"
        " enter the cache",
    ),
    Method(
        slug="matvlm",
        family="multimodal",
        title="MaTVLM: Hybrid Mamba-Transformer for Efficient Vision-Language Modeling",
        arxiv="2503.13440",
        idea="replace the attention of some layers by Mamba-2 mixers, whose state does"
        " not grow with the context",
        kernels=("ssd",),
    ),
    Method(
        slug="deer_vla",
        family="multimodal",
        title="DeeR-VLA: Dynamic Inference of Multimodal Large Language Models for"
        " Efficient Robot Execution",
        arxiv="2411.02359",
        idea="leave a robot policy's language model at the first exit whose action"
        " agrees with the exit before",
    ),
    Method(
        slug="proxylessnas",
        family="vision",
        title="ProxylessNAS: Direct Neural Architecture Search on Target Task and"
        " Hardware",
        arxiv="1812.00332",
        idea="search architectures with one sampled path in memory instead of all the"
        " candidates",
    ),
    Method(
        slug="vovnet",
        family="vision",
        title="An Energy and GPU-Computation Efficient Backbone Network for Real-Time"
        " Object Detection",
        arxiv="1904.09730",
        idea="concatenate a block's features once, at its end, instead of at every"
        " layer",
    ),
    Method(
        slug="bcn_ws",
        family="vision",
        title="Micro-Batch Training with Batch-Channel Normalization and Weight"
        " Standardization",
        arxiv="1903.10520",
        idea="normalise so that training works with one or two images in memory",
    ),
    Method(
        slug="h_denseunet",
        family="vision",
        title="H-DenseUNet: Hybrid Densely Connected UNet for Liver and Tumor"
        " Segmentation from CT Volumes",
        arxiv="1709.07330",
        idea="give a light 3D network the class scores of a deep 2D one, so that"
        " volumes fit",
    ),
    Method(
        slug="instantsfm",
        family="spatial",
        title="InstantSfM: Fully Sparse and Parallel Structure-from-Motion",
        arxiv="2510.13310",
        idea="solve global structure from motion as sparse least squares on the GPU",
    ),
    Method(
        slug="gs_livo",
        family="spatial",
        title="GS-LIVO: Real-Time LiDAR, Inertial, and Visual Multisensor Fused"
        " Odometry With Gaussian Mapping",
        arxiv="2501.08672",
        idea="keep the map of Gaussians in host memory and only the visible window on"
        " the GPU",
        kernels=("splat",),
    ),
    Method(
        slug="diffuman4d",
        family="spatial",
        title="Diffuman4D: 4D Consistent Human View Synthesis from Sparse-View Videos"
        " with Spatio-Temporal Diffusion Models",
        arxiv="2507.13344",
        idea="slide a window of constant size over views and frames while denoising",
    ),
    Method(
        slug="trip_llm",
        family="timeseries",
        title="TriP-LLM: A Tri-Branch Patch-wise Large Language Model Framework for"
        " Time-Series Anomaly Detection",
        arxiv="2508.00047",
        idea="feed a frozen language model one sequence a window instead of one for"
        " each channel",
    ),
    Method(
        slug="mixed_precision",
        family="precision",
        title="Improve Machine Learning carbon footprint using Nvidia GPU and Mixed"
        " Precision training for classification models - Part I",
        arxiv="2409.07853",
        idea="compute in 16 bits over 32-bit weights, with loss scaling, and meter the"
        " energy",
    ),
)
"""Every method of the library, in the order of the README table."""


def table() -> str:
    """The README's table of methods, as Markdown lines joined by newlines."""
    rows = ["| method | paper | idea | status |", "| --- | --- | --- | --- |"]
    for method in METHODS:
        built = f"built: `python -m {method.experiment}`"
        status = built if method.status == "built" else method.status
        paper = f"[{method.title}](https://arxiv.org/abs/{method.arxiv})"
        rows.append(f"| `{method.slug}` | {paper} | {method.idea} | {status} |")
    return "\n".join(rows)
