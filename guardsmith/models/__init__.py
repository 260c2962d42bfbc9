"""Stable Diffusion checkpoints: families, loading, saving, single files, and guardsmith's own small networks.

How a checkpoint draws or trains is in `diffusion` and `training`.
"""
