"""What every package may use: errors with their exit codes, console output, progress, atomic files, pictures.

Nothing here knows of models, registries or recipes, and nothing here imports another package of guardsmith.
"""
