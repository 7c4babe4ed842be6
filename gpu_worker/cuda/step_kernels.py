"""The CUDA kernels of a step, but for its attention; `forward.py` launches them."""

from __future__ import annotations

from gpu_worker.cuda.build import ITEMSIZE, Build
from gpu_worker.cuda.driver import Kernel, Module
from gpu_worker.cuda.linears import LinearKernel, best_cut, best_mid_cut
from gpu_worker.loading.quantization import FP8_GROUP

DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}  # macro DTYPE
SLOTS, INPUTS = "PPPPii", "PPPPPPPPP"  # plan.cu's structs in a signature (`driver.py`)
PREPARE = SLOTS + INPUTS + "PiiPiiiiiiiiiii"  # of `DeviceState.prepare_arguments`


class StepKernels:
    """Kernels whose compilation has begun."""

    def __init__(self, build: Build) -> None:
        c, arch, pdl, dtype = build.config, build.card.arch, build.pdl, build.dtype
        few = build.options.few and build.card.hopper and dtype == "bfloat16"  # elsewhere cuBLAS does it

        linears: dict[str, tuple[int, int, dict[str, bool]]] = {
            "qkv": (c.q_size + 2 * c.kv_size, c.hidden, {"norm": True, "bias": c.qkv_bias}),
            "o": (c.hidden, c.q_size, {"residual": True, "bias": c.o_bias}),
            "gate_up": (2 * c.intermediate, c.hidden, {"norm": True, "silu": True}),
            "down": (c.hidden, c.intermediate, {"residual": True}),
            "head": (c.vocab_size, c.hidden, {}),
        }

        def begin(name: str, fp8: int) -> LinearKernel:
            n, k, roles = linears[name]
            cut = best_cut(n, k, "norm" in roles, build.card.sms, fp8) if few else None
            return LinearKernel(cut, best_mid_cut(n, k) if few and not fp8 else None, arch, c.norm_eps, **roles)

        self.linears = {name: begin(name, 0) for name in linears}
        self.fp8_linears: dict[str, LinearKernel] = {}  # of few tokens, where a checkpoint's weights are fp8
        if c.quantization is not None and few and build.options.few_fp8:
            scales = FP8_GROUP if c.quantization.by_block else 1
            self.fp8_linears = {name: begin(name, scales) for name in linears if name != "head"}
        plan = Module.of("plan.cu", arch)
        macros = {"DTYPE": DTYPES[dtype], "DIM": c.head_dim} | ({"KV8": 1} if build.fp8_cache else {})
        elementwise = Module.of("elementwise.cu", arch, macros)
        self.prepare = Kernel(plan, "prepare", PREPARE, 1024, pdl=False)
        self.prepare_packed = self.prepare
        if build.pack > 1:
            packing = Module.of("plan.cu", arch, {"PACK": build.pack})
            self.prepare_packed = Kernel(packing, "prepare", PREPARE, 1024, pdl=False)
        self.expand = Kernel(plan, "expand", SLOTS + INPUTS + "Pii", 256, pdl=pdl)
        self.copy = Kernel(plan, "copy_blocks", INPUTS + "PiiPiPii", 256, pdl=False)
        self.mark = Kernel(plan, "mark", INPUTS + "Pi", 1, pdl=False)
        self.embed = Kernel(elementwise, "embed", "PPPi", 128, pdl=pdl)
        vectors = c.hidden * ITEMSIZE[dtype] // 16
        self.norm = Kernel(elementwise, "rms_norm", "PPPPif", min(256, -(-vectors // 32) * 32), pdl=pdl)
        self.rotate = Kernel(elementwise, "rotate_and_store", "PPPPPPPPiiif" + "P" * build.fp8_cache, 256, pdl=pdl)
        self.silu = Kernel(elementwise, "silu_mul", "PPq", 256, pdl=pdl)
        self.sample, self.sample_wide = (
            Kernel(Module.of("sampler.cu", arch, {"DTYPE": DTYPES[of]}), "sample", "PPPPPPPPPiii", 256, pdl=pdl)
            for of in (dtype, "float32")
        )
        self.filter = Kernel(Module.of("filter.cu", arch), "filter", "PiPPPPP", 1024, pdl=False) if build.options.filter_kernel else None
