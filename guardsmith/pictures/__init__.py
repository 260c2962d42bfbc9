"""Work on pictures in place of models: cloaking them, attacking cloaked ones, training a RID defender.

The cloaks themselves are in `cloaks`.
"""
