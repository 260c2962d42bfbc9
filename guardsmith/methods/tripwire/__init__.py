"""Tripwire: a recogniser of the protected subjects in reserved channel groups of the U-Net.

`method` has its parameters and its course; `layout` the reserved channels, `trunk` the U-Net that does without them, `recogniser`
and `training` what tells subjects from others, `install` what carries its answer to the output.
"""
