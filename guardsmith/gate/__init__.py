"""From scores to a verdict: rules, confidence intervals, calibrated levels, and policies.

Nothing here draws, trains or writes reports.
"""
