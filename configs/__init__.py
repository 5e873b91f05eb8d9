"""Hydra configuration groups (YAML files)."""
