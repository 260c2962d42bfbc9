"""Tripwire in channels of its own: a recogniser of the protected subjects in reserved channel groups of the U-Net.

Here live the parts: the reserved channels (`layout`), the trunk that does without them (`trunk`), the recogniser (`recogniser`,
`training`) and what carries its answer to the output (`install`). The method's configuration and its place in the pipeline live
elsewhere.
"""
