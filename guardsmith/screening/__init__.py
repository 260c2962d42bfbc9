"""Screening of uploads: does a set of training pictures, an adapter or a checkpoint show a protected subject?

It is what a hosted service does before it trains anything. Judges are in `metrics`; hardening and attacks have packages of their
own.
"""
