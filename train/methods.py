"""The methods of training: the sections of a run config that each reads, and what must fit them."""

from typing import TYPE_CHECKING, Any

from llama_jax.weights.lora_config import LoraConfig
from train.sections.data import DataSection
from train.sections.distill import DistillSection
from train.sections.dpo import DpoSection
from train.sections.qat import QatSection
from train.sections.quantization import QuantizationSection

if TYPE_CHECKING:
    from train.config import RunConfig

SECTIONS = ("lora", "quantization", "qat", "dpo", "distill")
NEEDED: dict[str, tuple[str, ...]] = {
    "lora": ("lora",),
    "qlora": ("lora", "quantization"),
    "qat": ("qat",),
    "dpo": ("dpo",),
    "distill": ("distill",),
}
_MAY_HAVE: dict[str, tuple[str, ...]] = {
    "qat": ("lora",),
    "dpo": ("lora", "quantization"),
    "distill": ("lora", "quantization"),
}
# A needed section that is left out; there is no teacher to learn from by default.
_DEFAULTS: dict[str, Any] = {
    "lora": LoraConfig(),
    "quantization": QuantizationSection(),
    "qat": QatSection(),
    "dpo": DpoSection(),
}


def filled_in(run: "RunConfig") -> dict[str, Any]:
    """The sections that the method of `run` needs, where they or fields of them are left out."""
    filled = {
        name: _DEFAULTS[name]
        for name in NEEDED.get(run.method, ())
        if getattr(run, name) is None and name in _DEFAULTS
    }
    dpo: DpoSection | None = filled.get("dpo", run.dpo)
    if dpo is not None and dpo.reference is None:
        chosen = "cached" if run.lora is None else "adapter_off"
        filled["dpo"] = dpo.replace(reference=chosen)
    return filled


def check_sections(run: "RunConfig") -> None:
    """Raises ValueError for a section that the method does not read, or that it cannot follow."""
    reads = NEEDED.get(run.method, ()) + _MAY_HAVE.get(run.method, ())
    for name in SECTIONS:
        if getattr(run, name) is not None and name not in reads:
            raise ValueError(
                f"section {name} is set, but method {run.method} does not read it; remove the "
                f"section or choose another method"
            )
    if run.quantization is not None and run.lora is None:
        raise ValueError(
            "section quantization is set, but quantized weights cannot be trained; add a "
            "section lora, whose adapters can"
        )
    if run.dpo is not None:
        _check_dpo(run, run.dpo)
    if run.method == "distill":
        if run.distill is None:
            raise ValueError("section distill is missing; method distill needs a distill.teacher")
        _check_distill(run, run.distill)


def _check_dpo(run: "RunConfig", dpo: DpoSection) -> None:
    if dpo.reference == "adapter_off" and run.lora is None:
        raise ValueError(
            "dpo.reference is adapter_off, but without a section lora there is no adapter to "
            "switch off; add one, or choose cached"
        )
    if run.data.packing:
        raise ValueError(
            "data.packing is true, but method dpo compares whole sequences; set it to false"
        )
    if run.data.long_texts != DataSection.long_texts:
        raise ValueError(
            f"data.long_texts is {run.data.long_texts}, but method dpo trains on preference rows "
            f"alone, for which data.long_rows speaks; leave it out"
        )


def _check_distill(run: "RunConfig", distill: DistillSection) -> None:
    for name in ("hidden", "attention"):
        if getattr(distill, name) is not None and run.mesh.context != 1:
            raise ValueError(
                f"mesh.context is {run.mesh.context}, but distill.{name} compares whole rows; "
                f"set context to 1"
            )
    if distill.on_policy and run.data.packing:
        raise ValueError(
            "data.packing is true, but distill.on_policy lets the student go on with prompts, "
            "of which a row can hold one; set packing to false"
        )
    if distill.on_policy and run.mesh.context != 1:
        raise ValueError(
            f"mesh.context is {run.mesh.context}, but distill.on_policy writes rows token by "
            f"token, which cannot be divided; set context to 1"
        )
    if distill.step == "pmap":
        _check_copies(run)


def _check_copies(run: "RunConfig") -> None:
    """The step of pmap keeps a copy of both models on every device."""
    if run.optimizer.offload:
        raise ValueError(
            "optimizer.offload is true, but distill.step pmap keeps a copy of everything on "
            "every device; choose distill.step: jit, or set offload to false"
        )
    split = [name for name, size in run.mesh.sizes().items() if name != "data" and size != 1]
    if split:
        raise ValueError(
            f"distill.step is pmap, which copies both models to every device, but mesh."
            f"{split[0]} is {run.mesh.sizes()[split[0]]}; set data: -1 and the other axes of "
            f"the mesh to 1, or choose distill.step: jit"
        )
