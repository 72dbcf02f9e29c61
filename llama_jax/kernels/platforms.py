"""Which kernels run where."""

from llama_jax.config import Compute, ModelConfig

_TPU, _GPU = "tpu", "gpu"  # as JAX calls the platform of a device
_PLATFORMS = {"splash": _TPU, "cudnn": _GPU, "megablox": _TPU}


def check_kernels(compute: Compute, config: ModelConfig, platform: str) -> None:
    """Raises ValueError where a kernel was chosen that devices of this platform cannot run."""
    chosen: dict[str, tuple[str, str]] = {"attention": (compute.attention, "reference")}
    if config.moe is not None:
        chosen["moe"] = (compute.moe, "grouped")
    for field, (kernel, instead) in chosen.items():
        wanted = _PLATFORMS.get(kernel, platform)
        if wanted != platform:
            raise ValueError(
                f"compute.{field} is {kernel}, a kernel for {wanted.upper()}s, but the mesh has "
                f"{platform} devices; set compute.{field} to {instead}"
            )
