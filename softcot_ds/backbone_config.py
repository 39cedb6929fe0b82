"""The recipe's section that says how the frozen weights are held."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_json
from softcot_ds.section import FREE, Section
from softcot_ds.shipped import found
from softcot_ds.values import Count, ExistingFile

Partition = Literal["none", "zero3", "node", "tensor"]
SPLIT = ("zero3", "node")
"""The partitions in which DeepSpeed splits each weight, and gathers it for each use."""


class BackboneConfig(Section):
    """How the frozen weights are held."""

    partition: Annotated[Partition, FREE] = "zero3"
    """none: each rank holds all of the weights. zero3: each holds 1/N of them. node: the ranks of a node hold a whole
    copy between them, so that no frozen weight crosses nodes once it is loaded. tensor: likewise, but each computes
    with its slice of every layer, so that activations move instead of weights; node where a model cannot be sliced."""
    group_size: Annotated[Count | None, FREE] = None
    """Ranks that hold one copy of the weights between them, where a partition is node or tensor. Default: the ranks of
    a node."""
    resident_gib: Annotated[float | None, FREE] = Field(None, ge=0)
    """Memory of a rank, GiB, in which it holds whole layers of the base beside its share, from the first on, where a
    partition is zero3 or node: they are not gathered. Default: what a GPU has to spare beside all else that training,
    or evaluation, needs, by `softcot-ds plan`; 0 on CPUs."""
    bits: Literal[16, 8, 4] = 16
    """Bits of a frozen weight of the base's linear layers, but its head's. 16: base.dtype, whatever that is. 8: half of
    the memory and of what ranks send each other. 4: a quarter, with bitsandbytes; see models/quantized.py."""
    use_liger_kernel: Annotated[bool, FREE] = True
    """In training, on a GPU with liger-kernel installed: let its kernels compute norms, rotary embeddings and SwiGLUs
    of the base where a trial shows that they change nothing but rounding; see models/fused_layers.py."""
    deepspeed: Annotated[ExistingFile | None, FREE] = None
    """DeepSpeed configuration. Default: ds_configs/replicated.json for none and tensor, ds_configs/zero3.json for zero3
    and node."""

    @model_validator(mode="after")
    def _deepspeed_fits(self) -> "BackboneConfig":
        config, path = self.deepspeed_config(), self.deepspeed_path()
        wrong = [f"{path}: {key} is decided by the recipe: {by}" for key, by in _DECIDED.items() if key in config]
        wrong += [f'{path}: {key} is "auto", which only the Trainer of Hugging Face fills in' for key in _autos(config)]
        zero = config.get("zero_optimization", {})
        if zero.get("zero_hpz_partition_size", 1) != 1:
            wrong.append(
                f"{path}: zero_hpz_partition_size would split the weights a second time: backbone.partition=node holds "
                "them within nodes alone, and backbone.group_size takes another number of ranks"
            )
        if self.resident_gib and zero.get("offload_param"):
            wrong.append(f"{path}: offload_param puts all weights elsewhere, and resident_gib would keep some; set one")
        stage = zero.get("stage", 0)
        if stage not in (0, 1, 2, 3) or type(stage) is not int:
            wrong.append(f"{path}: zero_optimization.stage is 0, 1, 2 or 3, found {stage!r}")
        elif stage not in ((3,) if self.partition in SPLIT else (1, 2)):
            wrong.append(
                f"partition {self.partition!r} does not fit stage {stage} of {path}; "
                "none and tensor need a configuration of stage 1 or 2, zero3 and node one of stage 3"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def deepspeed_path(self) -> Path:
        """The configured file, or the default of the partition: the current directory's own, or the one shipped."""
        if self.deepspeed is not None:
            return self.deepspeed
        name = "zero3.json" if self.partition in SPLIT else "replicated.json"
        return found(Path("ds_configs", name))

    def deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed configuration as read from its file."""
        path = self.deepspeed_path()
        try:
            config = read_json(path)
        except SoftCoTError as error:  # one of the recipe's mistakes, to be told with the others
            raise ValueError(str(error)) from error
        if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
            raise ValueError(f"{path}: no DeepSpeed configuration: expected objects, outermost and zero_optimization")
        return config


_DECIDED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and micro_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "training.learning_rate, betas and weight_decay",
    "scheduler": "training.schedule",
    "bf16": "base.dtype",
    "fp16": "base.dtype",
    "data_types": "gradients are summed in float32",
    "communication_data_type": "gradients are summed in float32",
    "weight_quantization": "backbone.bits",
}
"""Keys of a DeepSpeed configuration that would contradict the recipe, and what to set instead."""


def _autos(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys whose value is "auto", dotted."""
    below = [key for name, v in config.items() if isinstance(v, dict) for key in _autos(v, f"{prefix}{name}.")]
    return [f"{prefix}{name}" for name, value in config.items() if value == "auto"] + below
