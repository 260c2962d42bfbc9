"""The training loop that methods, attacks and cloaks share: optimizer steps, checkpoints, snapshots, trackers.

What is minimised is the business of the method, attack or cloak.
"""
