"""Fused kernels of SoftCoT-DS."""
