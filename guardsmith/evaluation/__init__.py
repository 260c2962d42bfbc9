"""Verification: attacks on base and hardened model, drawing without an attack, judging, and the pipeline.

Rules are in `gate`, pages and files for people and machines in `reports`.
"""
