"""The maths that methods, attacks and cloaks share: prompts, latents, denoising losses, sampling, cached drawing.

Nothing here decides what is trained, attacked or judged.
"""
