"""Meshes and shardings: which device holds what."""
