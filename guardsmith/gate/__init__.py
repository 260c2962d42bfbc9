"""From scores to a verdict: rules, confidence intervals, calibrated levels, and policies.

`rules` is the table of what is checked, `evidence` what it is checked on, `statistics` the intervals, `calibration` what
similarities mean, `policy` the file of limits and levels. Nothing here draws, trains or writes reports.
"""
