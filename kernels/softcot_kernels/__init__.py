"""Fused kernels of SoftCoT-DS."""

from softcot_kernels.thought_embedding import thought_embedding

__all__ = ["thought_embedding"]
