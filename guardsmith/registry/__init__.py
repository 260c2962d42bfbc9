"""Who is protected and who must stay learnable: the registry file, its checks, its pictures, and adding to it.

Nothing here loads a model or trains.
"""
