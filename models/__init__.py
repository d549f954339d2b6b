"""Installed as lmoe_compiler.models."""
