"""Installed as lmoe_compiler.runtime."""
