"""Who is protected, and who are the controls: the registry file, its checks, its pictures, and adding to it.

Nothing here loads a model or trains.
"""
