"""SoftCoT-DS: distributed training of soft chain-of-thought (arXiv:2502.12134) with DeepSpeed."""

__version__ = "0.1.0"
