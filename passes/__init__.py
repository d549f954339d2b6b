"""Installed as lmoe_compiler.passes."""
