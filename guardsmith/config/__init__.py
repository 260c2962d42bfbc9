"""Recipes: how to harden, attack and judge, read from YAML and checked as a whole.

Levels and rules of the gate as a file of their own are in `gate.policy`.
"""
