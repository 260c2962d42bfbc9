"""Registry and base in, hardened model out: compatibility checks, memory estimates, probes, the pipeline.

The methods themselves are in `methods`.
"""
