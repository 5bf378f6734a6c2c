"""Pipelines in plain KFP v2 DSL, one file each."""
