"""Where and how work runs: devices, worker processes, distributed launches, and the output folder of a run.

No training loops and no models live here.
"""
